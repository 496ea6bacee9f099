//! [`Message`]: one datagram of `sd_notify(3)`, written by the daemon and read by the keeper. Pure.
//! Lines that are not known are ignored, as systemd does.

use std::fmt;

/// The longest name of a descriptor, as in systemd.
const MAX_NAME: usize = 255;
/// The name of a descriptor that is stored without one.
const DEFAULT_NAME: &str = "stored";

// Keys of this project alone; systemd ignores them.
const REAP: &str = "X_EMBEDSHIM_REAP";
const REAPED: &str = "X_EMBEDSHIM_REAPED";
const RECREATE_FILES: &str = "X_EMBEDSHIM_RESTORE";

/// What a datagram asks for or says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// Store the descriptors that come with it, under this name.
    Store(&'a str),
    /// Close everything that is stored under this name.
    Remove(&'a str),
    /// Close the descriptor that comes with it: all datagrams before it are handled.
    Barrier,
    /// The state directory was removed: the keeper has to make its files there again.
    RecreateFiles,
    /// The daemon serves.
    Ready,
    /// The daemon leaves.
    Stopping,
    /// The daemon is alive.
    Alive,
    /// What the daemon does, in a line for people. The keeper ignores it.
    Status(&'a str),
    /// The daemon still starts, and may take so many microseconds more until it says so again.
    ExtendStart { microseconds: u64 },
    /// Reap the zombie with this pid that began at this tick: its status is no longer needed.
    Reap { pid: i32, start_ticks: u64 },
    /// Write to the pipe that comes with it how the reaped processes with this pid have ended.
    Reaped { pid: i32 },
    /// Nothing that the keeper acts on.
    Other,
}

impl<'a> Message<'a> {
    /// Reads a datagram; `None` if it is not of this protocol.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let text = str::from_utf8(bytes).ok()?;
        let mut message = Self::Other;
        let mut name = DEFAULT_NAME;
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (key, value) = line.split_once('=')?;
            match (key, value) {
                ("FDNAME", value) => name = Some(value).filter(|name| is_name(name))?,
                ("FDSTORE", "1") => message = Self::Store(DEFAULT_NAME),
                ("FDSTOREREMOVE", "1") => message = Self::Remove(DEFAULT_NAME),
                ("BARRIER", "1") => message = Self::Barrier,
                ("READY", "1") => message = Self::Ready,
                ("STOPPING", "1") => message = Self::Stopping,
                ("WATCHDOG", "1") => message = Self::Alive,
                ("EXTEND_TIMEOUT_USEC", value) => {
                    message = Self::ExtendStart {
                        microseconds: value.parse().ok()?,
                    };
                }
                (RECREATE_FILES, "1") => message = Self::RecreateFiles,
                (REAP, value) => {
                    let (pid, start_ticks) = value.split_once(' ')?;
                    message = Self::Reap {
                        pid: pid.parse().ok()?,
                        start_ticks: start_ticks.parse().ok()?,
                    };
                }
                (REAPED, value) => {
                    message = Self::Reaped {
                        pid: value.parse().ok()?,
                    };
                }
                _ => {}
            }
        }
        // The name may come before or after the line that needs it.
        Some(match message {
            Self::Store(_) => Self::Store(name),
            Self::Remove(_) => Self::Remove(name),
            other => other,
        })
    }
}

/// The text of the datagram.
impl fmt::Display for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // `FDPOLL=0`: systemd keeps a connection whose client has left, too. The successor has
            // to see that it has.
            Self::Store(name) => write!(f, "FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"),
            Self::Remove(name) => write!(f, "FDSTOREREMOVE=1\nFDNAME={name}\n"),
            Self::Barrier => f.write_str("BARRIER=1\n"),
            Self::RecreateFiles => writeln!(f, "{RECREATE_FILES}=1"),
            Self::Ready => f.write_str("READY=1\n"),
            Self::Stopping => f.write_str("STOPPING=1\n"),
            Self::Alive => f.write_str("WATCHDOG=1\n"),
            Self::Status(text) => writeln!(f, "STATUS={text}"),
            Self::ExtendStart { microseconds } => {
                writeln!(f, "EXTEND_TIMEOUT_USEC={microseconds}")
            }
            Self::Reap { pid, start_ticks } => writeln!(f, "{REAP}={pid} {start_ticks}"),
            Self::Reaped { pid } => writeln!(f, "{REAPED}={pid}"),
            Self::Other => Ok(()),
        }
    }
}

/// Whether a descriptor can have this name. As systemd's `fdname_is_valid`: it must fit between two
/// colons of `LISTEN_FDNAMES`.
pub(crate) fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME
        && text
            .bytes()
            .all(|byte| (b' '..0x7f).contains(&byte) && byte != b':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_writes_is_what_the_keeper_reads() {
        let (pid, start_ticks) = (42, 4711);
        for (message, text) in [
            (
                Message::Store("conn/7"),
                "FDSTORE=1\nFDNAME=conn/7\nFDPOLL=0\n",
            ),
            (
                Message::Remove("conn/7"),
                "FDSTOREREMOVE=1\nFDNAME=conn/7\n",
            ),
            (Message::Barrier, "BARRIER=1\n"),
            (Message::Ready, "READY=1\n"),
            (Message::Stopping, "STOPPING=1\n"),
            (Message::Alive, "WATCHDOG=1\n"),
            (
                Message::ExtendStart {
                    microseconds: 90_000_000,
                },
                "EXTEND_TIMEOUT_USEC=90000000\n",
            ),
            (
                Message::Reap { pid, start_ticks },
                "X_EMBEDSHIM_REAP=42 4711\n",
            ),
            (Message::Reaped { pid }, "X_EMBEDSHIM_REAPED=42\n"),
            (Message::RecreateFiles, "X_EMBEDSHIM_RESTORE=1\n"),
            (Message::Other, ""),
        ] {
            assert_eq!(message.to_string(), text);
            assert_eq!(Message::parse(text.as_bytes()), Some(message), "{text}");
        }
    }

    #[test]
    fn what_the_daemon_does_is_for_people_alone() {
        let text = Message::Status("serving 2 tasks").to_string();
        assert_eq!(text, "STATUS=serving 2 tasks\n");
        assert_eq!(Message::parse(text.as_bytes()), Some(Message::Other));
    }

    #[test]
    fn what_other_daemons_send_is_understood() {
        for (text, message) in [
            ("FDNAME=conn/7\nFDSTORE=1", Message::Store("conn/7")),
            ("FDSTORE=1", Message::Store("stored")),
            ("BARRIER=1", Message::Barrier),
            ("READY=1\nSTATUS=well\n", Message::Ready),
            ("STATUS=a=b", Message::Other),
            ("READY=0", Message::Other),
        ] {
            assert_eq!(Message::parse(text.as_bytes()), Some(message), "{text}");
        }
    }

    #[test]
    fn what_is_not_of_the_protocol_is_refused() {
        let long = format!("FDSTORE=1\nFDNAME={}", "a".repeat(256));
        for text in [
            &b"\xff\xfe"[..],
            b"hello",
            b"X_EMBEDSHIM_REAP=42",
            b"FDSTORE=1\nFDNAME=a:b",
            b"FDSTORE=1\nFDNAME=a\tb",
            b"FDSTORE=1\nFDNAME=a\0b",
            b"FDSTORE=1\nFDNAME=\xc3\xa4",
            long.as_bytes(),
        ] {
            assert_eq!(Message::parse(text), None, "{text:?}");
        }
    }
}
