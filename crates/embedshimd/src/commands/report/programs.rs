//! What other programs say of themselves. Owns the bounds: of the time that each may take, and of
//! what is read of it.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take.
const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
/// The most that is read of what one says.
const MAX_OUTPUT: u64 = 4 << 20;

/// The versions of what embedshim works with.
pub(super) fn versions(own: &str) -> String {
    let mut text = format!("embedshimd {own}\n");
    for file in ["/proc/version", "/etc/os-release"] {
        text.push_str(&read(file));
    }
    for program in ["runc", "crun", "containerd", "systemctl"] {
        text.push_str(&format_answer(program, &ask(program, &["--version"])));
    }
    text
}

/// The end of the daemon's log in systemd's journal.
pub(super) fn journal() -> Vec<u8> {
    let arguments = ["--unit=embedshimd", "--lines=10000", "--no-pager"];
    ask("journalctl", &arguments).unwrap_or_else(String::into_bytes)
}

fn format_answer(program: &str, answer: &Result<Vec<u8>, String>) -> String {
    match answer {
        Ok(said) => format!("\n$ {program} --version\n{}", String::from_utf8_lossy(said)),
        Err(why) => format!("\n$ {program} --version\n({why})\n"),
    }
}

fn read(path: &str) -> String {
    let mut text = String::new();
    if let Ok(file) = File::open(path) {
        // What is no text is left out.
        let _ = file.take(MAX_OUTPUT).read_to_string(&mut text);
    }
    text
}

/// What a program prints; an error says why it prints nothing.
fn ask(program: &str, arguments: &[&str]) -> Result<Vec<u8>, String> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let stdout = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(stdout) = stdout {
            // What was read until it failed is told.
            let _ = stdout.take(MAX_OUTPUT).read_to_end(&mut said);
        }
        said
    });
    let deadline = Instant::now() + LIMIT;
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < deadline => thread::sleep(PAUSE),
            Ok(Some(_)) => break,
            late_or_failed => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(match late_or_failed {
                    Err(error) => error.to_string(),
                    Ok(_) => format!("it took longer than {LIMIT:?}"),
                });
            }
        }
    }
    reader.join().map_err(|_| "it could not be read".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_there_is_not_is_told_of() {
        assert_eq!(ask("echo", &["hello"]).unwrap(), b"hello\n");
        assert!(ask("/nonexistent/program", &[]).is_err());
    }
}
