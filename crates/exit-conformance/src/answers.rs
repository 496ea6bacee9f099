//! [`Answers`]: the lines of a helper program, each awaited until a deadline. A helper that hangs
//! fails its test, and does not hang it.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Lines that come by a pipe.
#[derive(Debug)]
pub(crate) struct Answers<R> {
    pipe: R,
    read: Vec<u8>,
}

impl<R: Read + AsFd> Answers<R> {
    /// Of this pipe.
    pub(crate) fn new(pipe: R) -> Self {
        let read = Vec::new();
        Self { pipe, read }
    }

    /// The next line, without its end, if it comes within this time.
    pub(crate) fn next_within(&mut self, limit: Duration) -> io::Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.read.drain(..=end).collect();
                line.truncate(end);
                return String::from_utf8(line).map_err(io::Error::other);
            }
            self.wait(deadline)?;
            let mut buffer = [0; 4096];
            let length = self.pipe.read(&mut buffer)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.read.extend(buffer.get(..length).into_iter().flatten());
        }
    }

    fn wait(&self, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut polled = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, timeout) {
                Ok(1..) => return Ok(()),
                Ok(_) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn a_line_that_does_not_come_is_given_up_and_not_lost() {
        let (pipe, mut helper) = io::pipe().unwrap();
        let mut answers = Answers::new(pipe);
        helper.write_all(b"first\nsec").unwrap();
        assert_eq!(answers.next_within(SHORT).unwrap(), "first");
        let late = answers.next_within(SHORT).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        helper.write_all(b"ond\n").unwrap();
        assert_eq!(answers.next_within(SHORT).unwrap(), "second");
        drop(helper);
        let end = answers.next_within(SHORT).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }
}
