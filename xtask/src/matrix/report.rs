//! What became of each kernel: read off its console, shown as a table, as `JUnit` XML and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use super::guest::Console;

/// How many lines of a console are shown of a guest that failed.
const TAIL: usize = 25;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

/// One test in one guest.
#[derive(Debug, Serialize)]
struct Case {
    name: String,
    verdict: Verdict,
}

/// One kernel.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    kernel: String,
    architecture: &'static str,
    seconds: u64,
    cases: Vec<Case>,
    /// Why the guest as a whole is no good.
    failure: Option<String>,
    #[serde(skip)]
    console: String,
}

impl Outcome {
    pub(super) fn of(
        kernel: &str,
        architecture: &'static str,
        console: Console,
        duration: Duration,
    ) -> Self {
        let cases: Vec<Case> = console.text.lines().filter_map(case).collect();
        let failure = match console.end {
            Err(error) => Some(format!("{error:#}")),
            Ok(()) if cases.is_empty() => Some("no test was run".into()),
            Ok(()) => failed_suite(&console.text),
        };
        Self {
            kernel: kernel.into(),
            architecture,
            seconds: duration.as_secs(),
            cases,
            failure,
            console: console.text,
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.failure.is_none()
            && self.count(Verdict::Failed) == 0
            && self.count(Verdict::Skipped) == 0
    }

    /// What tells it from all others.
    fn name(&self) -> String {
        format!("{} {}", self.kernel, self.architecture)
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.cases
            .iter()
            .filter(|case| case.verdict == verdict)
            .count()
    }

    /// One line when the guest is done, with the reasons if it was no good.
    pub(super) fn line(&self) -> String {
        let mut text = format!(
            "{}: {} passed, {} failed, {} skipped, {} s",
            self.name(),
            self.count(Verdict::Passed),
            self.count(Verdict::Failed),
            self.count(Verdict::Skipped),
            self.seconds
        );
        if let Some(failure) = &self.failure {
            let lines: Vec<&str> = self.console.lines().collect();
            let tail = lines
                .get(lines.len().saturating_sub(TAIL)..)
                .unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n{failure}; its console ends with\n{}",
                tail.join("\n")
            );
        }
        for block in self.console.split("\n---- ").skip(1) {
            let _ = write!(
                text,
                "\n---- {}",
                block.split("\n\n").next().unwrap_or_default()
            );
        }
        text
    }
}

/// `test pidfd::a_name ... ok`
fn case(line: &str) -> Option<Case> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once("... ")?;
    let verdict = match result.trim() {
        "ok" => Verdict::Passed,
        "FAILED" => Verdict::Failed,
        "ignored" => Verdict::Skipped,
        _ => return None,
    };
    Some(Case {
        name: name.trim().into(),
        verdict,
    })
}

fn failed_suite(console: &str) -> Option<String> {
    let ends = console
        .lines()
        .filter_map(|line| line.strip_prefix("=== end "));
    // A probe that finds something missing is for the suite to judge.
    let mut failed = ends.filter(|end| !end.ends_with(" 0") && !end.starts_with("probe"));
    failed.next().map(|end| format!("exit status of {end}"))
}

/// Kernels down, backends across: passed of all that were run.
pub(super) fn table(outcomes: &[Outcome]) -> String {
    let mut groups: Vec<String> = Vec::new();
    let mut cells: BTreeMap<(usize, String), (usize, usize)> = BTreeMap::new();
    for (row, outcome) in outcomes.iter().enumerate() {
        for case in &outcome.cases {
            let group = group(&case.name);
            if !groups.contains(&group) {
                groups.push(group.clone());
            }
            let cell = cells.entry((row, group)).or_default();
            cell.0 += usize::from(case.verdict == Verdict::Passed);
            cell.1 += 1;
        }
    }
    let width = outcomes
        .iter()
        .map(|outcome| outcome.kernel.len())
        .max()
        .unwrap_or(0)
        .max(6);
    let mut text = format!("{:width$}  {:7}", "kernel", "arch");
    for group in &groups {
        let _ = write!(text, "  {group:>12}");
    }
    text.push('\n');
    for (row, outcome) in outcomes.iter().enumerate() {
        let _ = write!(
            text,
            "{:width$}  {:7}",
            outcome.kernel, outcome.architecture
        );
        for group in &groups {
            let cell = cells.get(&(row, group.clone()));
            let shown = cell.map_or("-".into(), |(passed, all)| format!("{passed}/{all}"));
            let _ = write!(text, "  {shown:>12}");
        }
        text.push_str(if outcome.is_good() {
            "\n"
        } else {
            "  FAILED\n"
        });
    }
    text
}

/// The backend, the emulated kernels together, or the suite.
fn group(name: &str) -> String {
    let first = name.split("::").next().unwrap_or(name);
    match first {
        "pidfd" | "ptrace" | "smoke" => first.into(),
        _ if first.starts_with("bpf") || first.starts_with("libbpf") => first.into(),
        _ => "emulated".into(),
    }
}

pub(super) fn junit(outcomes: &[Outcome]) -> String {
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n");
    for outcome in outcomes {
        let _ = writeln!(
            text,
            "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" skipped=\"{}\" time=\"{}\">",
            escape(&outcome.name()),
            outcome.cases.len(),
            outcome.count(Verdict::Failed) + usize::from(outcome.failure.is_some()),
            outcome.count(Verdict::Skipped),
            outcome.seconds
        );
        for case in &outcome.cases {
            let inner = match case.verdict {
                Verdict::Passed => "",
                Verdict::Failed => "<failure/>",
                Verdict::Skipped => "<skipped/>",
            };
            let (kernel, name) = (escape(&outcome.name()), escape(&case.name));
            let _ = writeln!(
                text,
                "    <testcase classname=\"{kernel}\" name=\"{name}\">{inner}</testcase>"
            );
        }
        if let Some(failure) = &outcome.failure {
            let message = escape(failure);
            let _ = writeln!(
                text,
                "    <testcase name=\"the guest\"><failure message=\"{message}\"/></testcase>"
            );
        }
        text.push_str("  </testsuite>\n");
    }
    text.push_str("</testsuites>\n");
    text
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

pub(super) fn json(outcomes: &[Outcome]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str, end: anyhow::Result<()>) -> Outcome {
        let console = Console {
            text: text.into(),
            end,
        };
        Outcome::of("6.12.1+deb13", "aarch64", console, Duration::from_secs(9))
    }

    #[test]
    fn a_console_is_read_and_shown() {
        let good = outcome(
            "=== begin conformance\ntest pidfd::a ... ok\ntest bpf-alone::a   ... ok\n=== end conformance 0\n",
            Ok(()),
        );
        let bad = outcome(
            "test pidfd::a <x> ... FAILED\n=== end conformance 101\n",
            Ok(()),
        );
        let dead = outcome(
            "Kernel panic",
            Err(anyhow::anyhow!("it ended before its time")),
        );
        assert!(good.is_good() && !bad.is_good() && !dead.is_good());
        let all = [good, bad, dead];
        assert_eq!(
            table(&all),
            "kernel        arch            pidfd     bpf-alone\n\
             6.12.1+deb13  aarch64           1/1           1/1\n\
             6.12.1+deb13  aarch64           0/1             -  FAILED\n\
             6.12.1+deb13  aarch64             -             -  FAILED\n"
        );
        let xml = junit(&all);
        assert!(
            xml.contains(
                "classname=\"6.12.1+deb13 aarch64\" name=\"pidfd::a &lt;x&gt;\"><failure/>"
            ),
            "{xml}"
        );
        assert!(
            xml.contains("message=\"it ended before its time\""),
            "{xml}"
        );
    }
}
