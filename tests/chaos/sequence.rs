//! Numbered lines, and [`Due`]: what a stream has to bring, and whether what came is that: each
//! number once and in order. Pure.

use std::fmt::Write;

/// What is shown of a difference, on each side of it.
const SHOWN: usize = 48;
/// So many bytes tell where a stream that has jumped goes on.
const WINDOW: usize = 64;
/// What a daemon that dies while it appends to a log file may append twice, while output flows.
pub(crate) const CHUNK: usize = 256 * 1024;

/// The numbers from `first` on, one a line.
pub(crate) fn lines(first: u64, count: u64) -> Vec<u8> {
    let mut text = String::new();
    for number in first..first + count {
        let _ = writeln!(text, "{number}");
    }
    text.into_bytes()
}

/// What a stream has to bring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// All that its process can have written.
    pub(crate) all: Vec<u8>,
    /// So many bytes of it must have come; the rest may be missing, but never a part in the middle.
    pub(crate) at_least: usize,
}

impl Due {
    /// The same through a terminal, which ends its lines by two characters.
    pub(crate) fn on_terminal(&self) -> Self {
        let through = |text: &[u8]| -> Vec<u8> {
            let mut result = Vec::with_capacity(2 * text.len());
            for &byte in text {
                if byte == b'\n' {
                    result.push(b'\r');
                }
                result.push(byte);
            }
            result
        };
        let at_least = through(self.all.get(..self.at_least).unwrap_or_default()).len();
        Self {
            all: through(&self.all),
            at_least,
        }
    }

    /// Whether these bytes are what is due: each number once and in order. Tells what is wrong.
    pub(crate) fn check(&self, came: &[u8]) -> Result<(), String> {
        let same = common(came, &self.all);
        if same < came.len() {
            return Err(self.difference(came, same, same));
        }
        self.check_length(same)
    }

    /// The same for a log file: a daemon that died may have appended a piece of at most [`CHUNK`]
    /// twice. Returns how many bytes came again.
    pub(crate) fn check_with_repeats(&self, came: &[u8]) -> Result<usize, String> {
        let (mut at, mut due, mut repeated, mut furthest) = (0, 0, 0, 0);
        loop {
            let same = common(tail(came, at), tail(&self.all, due));
            (at, due) = (at + same, due + same);
            furthest = furthest.max(due);
            if at == came.len() {
                break;
            }
            let back = self.jump(came, at, due);
            let Some(start) = back else {
                return Err(self.difference(came, at, due));
            };
            repeated += due - start;
            due = start;
        }
        self.check_length(furthest)?;
        if due == furthest {
            return Ok(repeated);
        }
        Err(format!(
            "the last {} bytes came before, and what followed them does not come again",
            furthest - due
        ))
    }

    fn check_length(&self, length: usize) -> Result<(), String> {
        if length >= self.at_least {
            return Ok(());
        }
        Err(format!(
            "it ends after {length} of {} bytes, at least {} are due; its last: {}",
            self.all.len(),
            self.at_least,
            show(before(&self.all, length)),
        ))
    }

    /// Where in what is due a stream goes on that has gone back by at most one piece.
    fn jump(&self, came: &[u8], at: usize, due: usize) -> Option<usize> {
        let next = tail(came, at);
        let longest = next.len().min(WINDOW);
        // A short piece that came twice is followed by what comes after it: there is always a whole
        // window, but at the end.
        let window = next.get(..longest)?;
        let from = due.saturating_sub(CHUNK);
        let place = find(
            self.all
                .get(from..due.saturating_add(longest))
                .unwrap_or(tail(&self.all, from)),
            window,
        )?;
        (place + from < due).then_some(place + from)
    }

    fn difference(&self, came: &[u8], at: usize, due: usize) -> String {
        let window = tail(came, at);
        let window = window.get(..WINDOW.min(window.len())).unwrap_or_default();
        let verdict = match find(&self.all, window) {
            Some(place) if place > due => format!("{} bytes are missing", place - due),
            Some(place) => format!("it goes back by {} bytes", due - place),
            None => "what follows is not due anywhere".into(),
        };
        format!(
            "byte {at} of {} is wrong: {verdict}; before it {}, then {} instead of {}",
            came.len(),
            show(before(came, at)),
            show(window),
            show(tail(&self.all, due)),
        )
    }
}

fn common(left: &[u8], right: &[u8]) -> usize {
    left.iter().zip(right).take_while(|(a, b)| a == b).count()
}

fn tail(bytes: &[u8], from: usize) -> &[u8] {
    bytes.get(from..).unwrap_or_default()
}

fn before(bytes: &[u8], end: usize) -> &[u8] {
    bytes
        .get(end.saturating_sub(SHOWN)..end)
        .unwrap_or_default()
}

fn show(bytes: &[u8]) -> String {
    let shown = bytes.get(..SHOWN.min(bytes.len())).unwrap_or_default();
    format!("{:?}", String::from_utf8_lossy(shown))
}

fn find(bytes: &[u8], window: &[u8]) -> Option<usize> {
    if window.is_empty() {
        return None;
    }
    bytes
        .windows(window.len())
        .rposition(|found| found == window)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(count: u64) -> Due {
        let all = lines(1, count);
        Due {
            at_least: all.len(),
            all,
        }
    }

    #[test]
    fn each_number_once_and_in_order_is_right_and_nothing_else() {
        let due = due(1000);
        let all = due.all.as_slice();
        assert_eq!(due.check(all), Ok(()));
        let lost = [&all[..500], &all[600..]].concat();
        assert!(
            due.check(&lost)
                .unwrap_err()
                .contains("100 bytes are missing")
        );
        let twice = [&all[..500], &all[300..]].concat();
        assert!(due.check(&twice).unwrap_err().contains("back by 200 bytes"));
        let short = &all[..all.len() - 1];
        assert!(due.check(short).unwrap_err().contains("it ends after"));
        let more = [all, b"runc: no"].concat();
        assert!(due.check(&more).unwrap_err().contains("not due anywhere"));
    }

    #[test]
    fn a_prefix_is_enough_where_no_more_is_due() {
        let mut due = due(1000);
        due.at_least = 100;
        for length in [100, 101, due.all.len()] {
            assert_eq!(due.check(&due.all[..length]), Ok(()));
        }
        assert!(due.check(&due.all[..99]).is_err());
        assert_eq!(Due::default().check(b""), Ok(()));
        assert!(Due::default().check(b"x").is_err());
    }

    #[test]
    fn a_log_file_may_have_a_piece_twice_but_lacks_nothing() {
        let due = due(60_000);
        let all = due.all.as_slice();
        assert_eq!(due.check_with_repeats(all), Ok(0));
        for (end, start) in [
            (70_003, 20_001),
            (501, 500),
            (30, 0),
            (all.len(), all.len() - 7),
        ] {
            let twice = [&all[..end], &all[start..]].concat();
            assert_eq!(
                due.check_with_repeats(&twice),
                Ok(end - start),
                "{end} {start}"
            );
        }
        let thrice = [&all[..5000], &all[..6000], &all[3000..]].concat();
        assert_eq!(due.check_with_repeats(&thrice), Ok(8000));
        let lost = [&all[..5000], &all[5100..]].concat();
        assert!(
            due.check_with_repeats(&lost)
                .unwrap_err()
                .contains("100 bytes are missing")
        );
        let far = [&all[..300_000], all].concat();
        assert!(due.check_with_repeats(&far).is_err());
        assert!(due.check_with_repeats(&all[..5000]).is_err());
    }

    #[test]
    fn a_terminal_ends_lines_by_two_characters() {
        let mut due = due(2);
        due.at_least = 2;
        let through = due.on_terminal();
        assert_eq!(
            (through.all.as_slice(), through.at_least),
            (&b"1\r\n2\r\n"[..], 3)
        );
    }
}
