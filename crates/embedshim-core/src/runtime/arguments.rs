//! The command lines of an OCI runtime, as go-runc builds them. Pure: nothing is run here.

use std::ffi::OsString;
use std::path::Path;

/// `create`.
#[derive(Clone, Debug)]
pub(crate) struct Create<'a> {
    /// The container's id.
    pub(crate) id: &'a str,
    /// The bundle directory.
    pub(crate) bundle: &'a Path,
    /// Where the init's pid is to be written.
    pub(crate) pid_file: &'a Path,
    /// Where the terminal's master is to be sent.
    pub(crate) console_socket: Option<&'a Path>,
    /// The runtime's log.
    pub(crate) log: &'a Path,
    /// Move the root instead of pivoting.
    pub(crate) no_pivot_root: bool,
    /// Inherit the session keyring.
    pub(crate) no_new_keyring: bool,
}

impl Create<'_> {
    pub(super) fn build(&self) -> Vec<OsString> {
        let mut line = line(["create", "--bundle"]);
        line.extend([
            self.bundle.into(),
            "--pid-file".into(),
            self.pid_file.into(),
        ]);
        push_console_socket(&mut line, self.console_socket);
        push_flag(&mut line, "--no-pivot", self.no_pivot_root);
        push_flag(&mut line, "--no-new-keyring", self.no_new_keyring);
        line.push(self.id.into());
        line
    }
}

/// `exec --detach`.
#[derive(Clone, Debug)]
pub(crate) struct Exec<'a> {
    /// The container's id.
    pub(crate) id: &'a str,
    /// A file with the OCI `Process` document.
    pub(crate) process: &'a Path,
    /// Where the process's pid is to be written.
    pub(crate) pid_file: &'a Path,
    /// Is there from when the runtime is called.
    pub(crate) mark: &'a Path,
    /// Where the terminal's master is to be sent.
    pub(crate) console_socket: Option<&'a Path>,
    /// The runtime's log.
    pub(crate) log: &'a Path,
}

impl Exec<'_> {
    pub(super) fn build(&self) -> Vec<OsString> {
        let mut line = line(["exec", "--detach", "--process"]);
        line.extend([
            self.process.into(),
            "--pid-file".into(),
            self.pid_file.into(),
        ]);
        push_console_socket(&mut line, self.console_socket);
        line.push(self.id.into());
        line
    }
}

/// `checkpoint`.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are the runtime's independent flags"
)]
pub(crate) struct Checkpoint<'a> {
    /// The container's id.
    pub(crate) id: &'a str,
    /// Where the image goes.
    pub(crate) image: &'a Path,
    /// Where CRIU works and logs.
    pub(crate) work: &'a Path,
    /// Leave the container running.
    pub(crate) leave_running: bool,
    /// Allow open TCP connections.
    pub(crate) tcp: bool,
    /// Allow external unix sockets.
    pub(crate) unix_sockets: bool,
    /// Allow a shell job.
    pub(crate) terminal: bool,
    /// Allow file locks.
    pub(crate) file_locks: bool,
    /// Namespaces that are not written.
    pub(crate) empty_namespaces: &'a [String],
    /// `--manage-cgroups-mode`, or empty.
    pub(crate) cgroups_mode: &'a str,
}

impl Checkpoint<'_> {
    /// The command line.
    pub(crate) fn build(&self) -> Vec<OsString> {
        let mut line = line(["checkpoint", "--image-path"]);
        line.extend([self.image.into(), "--work-path".into(), self.work.into()]);
        push_flag(&mut line, "--leave-running", self.leave_running);
        push_flag(&mut line, "--tcp-established", self.tcp);
        push_flag(&mut line, "--ext-unix-sk", self.unix_sockets);
        push_flag(&mut line, "--shell-job", self.terminal);
        push_flag(&mut line, "--file-locks", self.file_locks);
        for namespace in self.empty_namespaces {
            line.extend(["--empty-ns".into(), namespace.into()]);
        }
        if !self.cgroups_mode.is_empty() {
            line.extend(["--manage-cgroups-mode".into(), self.cgroups_mode.into()]);
        }
        line.push(self.id.into());
        line
    }
}

/// `restore --detach`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Restore<'a> {
    /// What `create` would get.
    pub(crate) create: &'a Create<'a>,
    /// The image to restore from.
    pub(crate) image: &'a Path,
    /// Where CRIU works and logs.
    pub(crate) work: &'a Path,
}

impl Restore<'_> {
    /// The command line.
    pub(crate) fn build(&self) -> Vec<OsString> {
        let create = self.create;
        let mut line = line(["restore", "--detach", "--image-path"]);
        line.extend([self.image.into(), "--work-path".into(), self.work.into()]);
        line.extend([
            "--bundle".into(),
            create.bundle.into(),
            "--pid-file".into(),
            create.pid_file.into(),
        ]);
        push_console_socket(&mut line, create.console_socket);
        push_flag(&mut line, "--no-pivot", create.no_pivot_root);
        line.push(create.id.into());
        line
    }
}

pub(super) fn start(id: &str) -> Vec<OsString> {
    line(["start", id])
}

pub(super) fn kill(id: &str, signal: u32, all: bool) -> Vec<OsString> {
    let mut line = line(["kill"]);
    push_flag(&mut line, "--all", all);
    line.extend([id.into(), signal.to_string().into()]);
    line
}

pub(super) fn delete(id: &str, force: bool) -> Vec<OsString> {
    let mut line = line(["delete"]);
    push_flag(&mut line, "--force", force);
    line.push(id.into());
    line
}

pub(super) fn state(id: &str) -> Vec<OsString> {
    line(["state", id])
}

pub(super) fn pause(id: &str) -> Vec<OsString> {
    line(["pause", id])
}

pub(super) fn resume(id: &str) -> Vec<OsString> {
    line(["resume", id])
}

/// The resources come on standard input.
pub(super) fn update(id: &str) -> Vec<OsString> {
    line(["update", "--resources", "-", id])
}

fn line<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}

fn push_flag(line: &mut Vec<OsString>, flag: &str, set: bool) {
    if set {
        line.push(flag.into());
    }
}

fn push_console_socket(line: &mut Vec<OsString>, socket: Option<&Path>) {
    if let Some(socket) = socket {
        line.extend(["--console-socket".into(), socket.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &[OsString]) -> String {
        line.iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_lines_are_go_runcs() {
        let create = Create {
            id: "c",
            bundle: Path::new("/b"),
            pid_file: Path::new("/b/init.pid"),
            console_socket: Some(Path::new("/s")),
            log: Path::new("/b/log.json"),
            no_pivot_root: true,
            no_new_keyring: false,
        };
        let exec = Exec {
            id: "c",
            process: Path::new("/b/e.process"),
            mark: Path::new("/b/mark"),
            pid_file: Path::new("/b/e.pid"),
            console_socket: None,
            log: Path::new("/b/e.log"),
        };
        let checkpoint = Checkpoint {
            id: "c",
            image: Path::new("/i"),
            work: Path::new("/w"),
            leave_running: true,
            tcp: false,
            unix_sockets: false,
            terminal: false,
            file_locks: true,
            empty_namespaces: &["network".to_owned()],
            cgroups_mode: "soft",
        };
        let restore = Restore {
            create: &create,
            image: Path::new("/i"),
            work: Path::new("/w"),
        };
        let lines = [
            create.build(),
            start("c"),
            exec.build(),
            kill("c", 9, true),
            delete("c", true),
            pause("c"),
            resume("c"),
            update("c"),
            checkpoint.build(),
            restore.build(),
        ];
        insta::assert_snapshot!(lines.map(|line| text(&line)).join("\n"), @r"
        create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot c
        start c
        exec --detach --process /b/e.process --pid-file /b/e.pid c
        kill --all c 9
        delete --force c
        pause c
        resume c
        update --resources - c
        checkpoint --image-path /i --work-path /w --leave-running --file-locks --empty-ns network --manage-cgroups-mode soft c
        restore --detach --image-path /i --work-path /w --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot c
        ");
    }
}
