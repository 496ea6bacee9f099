//! One datagram of `sd_notify(3)`, read. Pure; what nobody asked us for is passed over, as systemd
//! does.

/// The longest name that systemd takes, and we.
const MAX_NAME: usize = 255;
/// The name of a descriptor that came without.
const NAMELESS: &str = "stored";

/// Ours alone: systemd reaps its zombies by itself.
pub(crate) const REAP: &str = "X_EMBEDSHIM_REAP";

/// Ours alone: what was in the state directory has been removed, and is made again.
pub(crate) const RESTORE: &str = "X_EMBEDSHIM_RESTORE";

/// Ours alone: how a process that we have reaped has ended is written to the pipe that comes with
/// it.
pub(crate) const REAPED: &str = "X_EMBEDSHIM_REAPED";

/// What a datagram asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// Keep what came with it.
    Store(&'a str),
    /// Close what is kept.
    Remove(&'a str),
    /// Close what came with it, now that all before it is done.
    Barrier,
    /// Make your files in the state directory again.
    Restore,
    /// The daemon serves.
    Ready,
    /// The daemon leaves.
    Stopping,
    /// The daemon is alive.
    Alive,
    /// The process with this number that began at this tick is a zombie that nobody needs any more.
    Reap { pid: i32, start_ticks: u64 },
    /// How have processes with this number ended?
    Reaped { pid: i32 },
    /// Nothing that concerns us, such as `STATUS=`.
    Other,
}

impl<'a> Message<'a> {
    /// Reads one; `None` if it is not of this protocol.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let text = str::from_utf8(bytes).ok()?;
        let mut message = Self::Other;
        let mut name = NAMELESS;
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (key, value) = line.split_once('=')?;
            match (key, value) {
                ("FDNAME", value) => name = Some(value).filter(|name| is_name(name))?,
                ("FDSTORE", "1") => message = Self::Store(NAMELESS),
                ("FDSTOREREMOVE", "1") => message = Self::Remove(NAMELESS),
                ("BARRIER", "1") => message = Self::Barrier,
                ("READY", "1") => message = Self::Ready,
                ("STOPPING", "1") => message = Self::Stopping,
                ("WATCHDOG", "1") => message = Self::Alive,
                (RESTORE, "1") => message = Self::Restore,
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
        Some(match message {
            Self::Store(_) => Self::Store(name),
            Self::Remove(_) => Self::Remove(name),
            other => other,
        })
    }
}

/// As systemd's `fdname_is_valid`: it must fit between two colons of `LISTEN_FDNAMES`.
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
    fn what_daemons_send_is_understood() {
        for (text, message) in [
            (
                "FDSTORE=1\nFDNAME=conn/7\nFDPOLL=0\n",
                Message::Store("conn/7"),
            ),
            ("FDNAME=conn/7\nFDSTORE=1", Message::Store("conn/7")),
            ("FDSTORE=1", Message::Store("stored")),
            ("FDSTOREREMOVE=1\nFDNAME=conn/7", Message::Remove("conn/7")),
            ("BARRIER=1", Message::Barrier),
            ("READY=1\nSTATUS=well\n", Message::Ready),
            ("STOPPING=1", Message::Stopping),
            ("WATCHDOG=1\n", Message::Alive),
            (
                "X_EMBEDSHIM_REAP=42 4711\n",
                Message::Reap {
                    pid: 42,
                    start_ticks: 4711,
                },
            ),
            ("X_EMBEDSHIM_REAPED=42\n", Message::Reaped { pid: 42 }),
            ("X_EMBEDSHIM_RESTORE=1\n", Message::Restore),
            ("STATUS=a=b", Message::Other),
            ("READY=0", Message::Other),
            ("", Message::Other),
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
