//! [`Results`]: what test programs say at their end: how many tests passed, and of each that failed
//! its name and its reason. Owns the reading of their output, and what is said after the last.

use std::collections::VecDeque;
use std::fmt;

use anyhow::bail;

/// Of the reason of a failure, so many lines from its beginning and from its end are kept: the
/// error is at one of them, and what a daemon has logged is between.
const KEPT: usize = 20;
/// A longer line is cut.
const WIDTH: usize = 500;

/// How many tests passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) skipped: u32,
}

/// What test programs have said.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) counts: Counts,
    failures: Vec<Failure>,
    /// The last of the failures is what the lines are about.
    is_in_failure: bool,
}

/// A test that failed.
#[derive(Debug, Default)]
struct Failure {
    name: String,
    first: Vec<String>,
    last: VecDeque<String>,
    left_out: usize,
}

impl Results {
    /// Reads a line, such as `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0
    /// filtered out`.
    pub(crate) fn read(&mut self, line: &str) {
        let header = line.strip_prefix("---- ");
        if let Some(name) = header.and_then(|rest| rest.strip_suffix(" ----")) {
            self.is_in_failure = true;
            self.failures.push(Failure::of(name));
        } else if let Some((_, numbers)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        {
            self.is_in_failure = false;
            self.counts.add(numbers);
        } else if line == "failures:" {
            self.is_in_failure = false;
        } else if let Some(failure) = self.failures.last_mut().filter(|_| self.is_in_failure) {
            failure.read(line);
        }
    }

    /// A test that is no test program's.
    pub(crate) fn add(&mut self, name: &str, result: anyhow::Result<()>) {
        match result {
            Ok(()) => {
                self.counts.passed += 1;
                println!("test {name} ... ok");
            }
            Err(error) => {
                self.counts.failed += 1;
                println!("test {name} ... FAILED: {error:#}");
                let mut failure = Failure::of(name);
                format!("{error:#}")
                    .lines()
                    .for_each(|line| failure.read(line));
                self.failures.push(failure);
            }
        }
    }

    pub(crate) fn append(&mut self, mut other: Self) {
        self.counts.passed += other.counts.passed;
        self.counts.failed += other.counts.failed;
        self.counts.skipped += other.counts.skipped;
        self.failures.append(&mut other.failures);
        self.is_in_failure = false;
    }

    /// Says all of it, what failed first; an error if that is anything, or if no test was run.
    pub(crate) fn conclude(&self) -> anyhow::Result<()> {
        for failure in &self.failures {
            print!("\n{failure}");
        }
        let counts = self.counts;
        println!(
            "\n{} passed, {} failed, {} skipped",
            counts.passed, counts.failed, counts.skipped
        );
        if counts.failed > 0 {
            bail!("tests failed");
        }
        if counts.passed == 0 {
            bail!("no test was run");
        }
        if counts.skipped > 0 && std::env::var_os("CI").is_some() {
            bail!("tests were skipped, which CI does not accept");
        }
        Ok(())
    }
}

impl Counts {
    fn add(&mut self, numbers: &str) {
        for part in numbers.split(';') {
            let mut words = part.split_whitespace();
            let number = words
                .next()
                .and_then(|number| number.parse().ok())
                .unwrap_or(0);
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.skipped += number,
                _ => {}
            }
        }
    }
}

impl Failure {
    fn of(name: &str) -> Self {
        Self {
            // The standard library's harness says of what the lines are.
            name: name.strip_suffix(" stdout").unwrap_or(name).to_owned(),
            ..Self::default()
        }
    }

    fn read(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        let line = line.chars().take(WIDTH).collect();
        if self.first.len() < KEPT {
            self.first.push(line);
            return;
        }
        self.last.push_back(line);
        if self.last.len() > KEPT {
            self.last.pop_front();
            self.left_out += 1;
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "failed: {}", self.name)?;
        for line in &self.first {
            writeln!(f, "    {line}")?;
        }
        if self.left_out > 0 {
            writeln!(f, "    ... {} lines, which are above ...", self.left_out)?;
        }
        for line in &self.last {
            writeln!(f, "    {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let mut results = Results::default();
        results.read("running 4 tests");
        results.read("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.1s");
        results.read("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        assert_eq!(
            results.counts,
            Counts {
                passed: 4,
                failed: 2,
                skipped: 1
            }
        );
        assert!(results.failures.is_empty());
    }

    #[test]
    fn the_reason_of_each_failure_is_repeated() {
        let mut results = Results::default();
        let log: Vec<_> = (0..100).map(|number| format!("log {number}")).collect();
        let log = log.join("\n");
        let output = format!(
            "test a ... FAILED\n\nfailures:\n\n---- a ----\nnot 137\n\n---- b::c stdout ----\n{log}\
             \n\n\nCaused by:\n    not 7\n\nfailures:\n    a\n    b::c\n\ntest result: FAILED. 0 \
             passed; 2 failed; 0 ignored\n     Running other\n"
        );
        output.lines().for_each(|line| results.read(line));
        let said: Vec<_> = results.failures.iter().map(ToString::to_string).collect();
        assert_eq!(said[0], "failed: a\n    not 137\n");
        assert!(said[1].starts_with("failed: b::c\n    log 0\n"));
        assert!(said[1].contains("    ... 62 lines, which are above ...\n    log 82\n"));
        assert!(said[1].ends_with("    Caused by:\n        not 7\n"));
        assert!(results.conclude().is_err());
    }
}
