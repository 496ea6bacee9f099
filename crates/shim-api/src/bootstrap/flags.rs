//! [`Flags`]: the command line as Go's `flag` package reads it: one dash or two, `-k v` or `-k=v`,
//! the action last. Owns that a flag of a later containerd is skipped with its value: to refuse it
//! would break every container of the node.

use std::ffi::OsString;
use std::path::PathBuf;

use super::failure::Failure;

const USAGE: &str = "\
containerd runs this program; it is not meant to be run by hand. It expects one of
  -namespace NS -id ID -address SOCKET [-publish-binary BIN] [-debug] start    (in the bundle's directory)
  -namespace NS -id ID [-bundle DIR] [-debug] delete
  -info    -v
The daemon that it speaks to is embedshimd; see `embedshimd --help`";

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Start,
    Delete,
    Info,
    Version,
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) action: Action,
    pub(super) namespace: String,
    pub(super) id: String,
    /// The path of containerd's gRPC socket.
    pub(super) address: String,
    pub(super) bundle: Option<PathBuf>,
}

impl Flags {
    /// The flags of a command line, without the program's name.
    pub(super) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, Failure> {
        let mut flags = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
        };
        let arguments = arguments.map(|argument| {
            let text = argument.into_string();
            text.map_err(|_| usage("an argument is not valid UTF-8"))
        });
        let arguments: Vec<String> = arguments.collect::<Result<_, _>>()?;
        let mut arguments = arguments.into_iter().peekable();
        let mut action = None;
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix('-') else {
                action = Some(argument);
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            // Flags without a value; the first three need no action.
            let only = match name {
                "v" | "version" => Some(Action::Version),
                "info" => Some(Action::Info),
                "h" | "help" => return Err(Failure::Usage(USAGE.into())),
                "debug" => continue,
                _ => None,
            };
            if let Some(action) = only {
                return Ok(Self { action, ..flags });
            }
            // What follows an unknown flag may be its value, but the last word of the line is the
            // action.
            let action_next = !KNOWN.contains(&name) && arguments.len() == 1;
            let follows = |next: &String| !next.starts_with('-') && !action_next;
            let value = inline
                .or_else(|| arguments.next_if(follows))
                .unwrap_or_default();
            flags.set(name, value);
        }
        flags.action = match action.as_deref() {
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some(other) => return Err(usage(&format!("unknown action {other:?}"))),
            None => return Err(usage("no action")),
        };
        Ok(flags)
    }

    /// Takes the value of a flag; a later containerd's is skipped.
    fn set(&mut self, name: &str, value: String) {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "bundle" => self.bundle = (!value.is_empty()).then(|| value.into()),
            _ => {}
        }
    }
}

/// The flags that have a value.
const KNOWN: [&str; 4] = ["namespace", "id", "address", "bundle"];

fn usage(what: &str) -> Failure {
    Failure::Usage(format!("{what}\n{USAGE}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, String> {
        Flags::parse(line.split_whitespace().map(OsString::from))
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn containerds_command_lines_are_read() {
        let start = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 -debug start",
        );
        let start = start.unwrap();
        assert_eq!(
            (start.action, start.namespace.as_str(), start.id.as_str()),
            (Action::Start, "k8s.io", "c1")
        );
        assert_eq!(
            (start.address.as_str(), start.bundle),
            ("/run/c.sock", None)
        );
        let delete = parse("--namespace=default -id c1 -bundle /b delete").unwrap();
        assert_eq!(
            (delete.action, delete.bundle),
            (Action::Delete, Some("/b".into()))
        );
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn flags_of_a_later_containerd_are_skipped() {
        for line in [
            "-new x -id c1 start",
            "-new=x -id c1 start",
            "-id c1 -new start",
            "-new -id c1 start",
        ] {
            let flags = parse(line).unwrap();
            assert_eq!(
                (flags.action, flags.id.as_str()),
                (Action::Start, "c1"),
                "{line}"
            );
        }
    }

    #[test]
    fn a_wrong_line_says_what_is_expected() {
        for line in ["", "-id c1", "-id c1 frobnicate", "-h"] {
            assert!(
                parse(line)
                    .unwrap_err()
                    .contains("containerd runs this program"),
                "{line}"
            );
        }
    }
}
