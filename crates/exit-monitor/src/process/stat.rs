//! `/proc/PID/stat`: the one correct reader of its fields, which a process can fill with anything
//! in its name. Never decides what a field means.

use std::fs::File;
use std::io::{self, Read};

/// The field of `/proc/PID/stat` with the start time.
pub(super) const START_TIME: usize = 22;
/// It has 52 numbers and a name of 64 bytes at most.
const LONG: usize = 1024;
const LONGEST: u64 = 4096;

/// The whole line. The kernel says that its size is 0, and the readers of `std::fs` would begin
/// with 32 bytes.
pub(super) fn read(pid: i32) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(LONG);
    let file = File::open(format!("/proc/{pid}/stat"))?;
    file.take(LONGEST).read_to_end(&mut line)?;
    Ok(line)
}

pub(super) fn read_start_ticks(pid: i32) -> io::Result<u64> {
    parse_stat_field(&read(pid)?, START_TIME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time"))
}

/// One numeric field (1-based, as proc(5) counts, 3 or later) of `/proc/PID/stat`.
///
/// The command name in field 2 is the process's own choice and may hold blanks and parentheses: the
/// last closing parenthesis ends it.
pub fn parse_stat_field(stat: &[u8], field: usize) -> Option<u64> {
    let close = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    rest.split_ascii_whitespace()
        .nth(field.checked_sub(3)?)?
        .parse()
        .ok()
}

/// The state, which is the third field and no number.
pub(super) fn stat_state(stat: &[u8]) -> Option<u8> {
    let close = stat.iter().rposition(|&byte| byte == b')')?;
    stat.get(close + 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = b"42 (a) R 9 (x)) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 9";
        assert_eq!(parse_stat_field(stat, 22), Some(777));
        assert_eq!(parse_stat_field(b"", 22), None);
        assert_eq!(parse_stat_field(b"1 (x)", 2), None);
    }
}
