//! [`FdRole`]: what a descriptor is to its process. Owns the letter that stands for it in a set.

/// What a descriptor is to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FdRole {
    /// The client's end of its input, a fifo: open for reading alone, and not yet decided whether
    /// it is to outlive its client.
    StdinNew,
    /// The same, to outlive its client: open for reading and writing, or about to be.
    StdinHeld,
    /// The same, open for reading alone: the input ends with the client's writers.
    StdinLast,
    /// The writing end of its input pipe.
    StdinPipe,
    /// The client's end of its output: a fifo, a log file, or for a terminal the pipe of a logger.
    StdoutClient,
    /// The reading end of its output pipe.
    StdoutPipe,
    /// The client's end of its error output.
    StderrClient,
    /// The reading end of its error pipe.
    StderrPipe,
    /// A pipe between the two ends of its input, open for reading and writing: what is on
    /// its way. With it no call has the lock of a pipe that a container can hold and that of the
    /// client's fifo at once.
    StdinStage,
    /// The same of its output.
    StdoutStage,
    /// The same of its error output.
    StderrStage,
    /// The master of its pseudo-terminal.
    Terminal,
    /// The socket over which the OCI runtime hands over its terminal.
    Console,
    /// The connection to that socket, with the terminal in its queue.
    ConsoleConnection,
    /// Its pidfd.
    Pidfd,
}

impl FdRole {
    const ALL: [(Self, u8); 15] = [
        (Self::StdinNew, b'n'),
        (Self::StdinHeld, b'i'),
        (Self::StdinLast, b'x'),
        (Self::StdinPipe, b'I'),
        (Self::StdoutClient, b'o'),
        (Self::StdoutPipe, b'O'),
        (Self::StderrClient, b'e'),
        (Self::StderrPipe, b'E'),
        (Self::StdinStage, b'a'),
        (Self::StdoutStage, b'b'),
        (Self::StderrStage, b'd'),
        (Self::Terminal, b't'),
        (Self::Console, b'c'),
        (Self::ConsoleConnection, b'C'),
        (Self::Pidfd, b'p'),
    ];

    /// Whether it is an end that a client waits at.
    pub(super) fn is_of_client(self) -> bool {
        matches!(
            self,
            Self::StdinNew
                | Self::StdinHeld
                | Self::StdinLast
                | Self::StdoutClient
                | Self::StderrClient
        )
    }

    pub(super) fn letter(self) -> u8 {
        let found = Self::ALL.iter().find(|(role, _)| *role == self);
        found.map_or(b'?', |(_, letter)| *letter)
    }

    pub(super) fn of(letter: u8) -> Option<Self> {
        let found = Self::ALL.iter().find(|(_, known)| *known == letter);
        found.map(|(role, _)| *role)
    }
}
