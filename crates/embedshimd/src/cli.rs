//! The command line of `embedshimd`, and what its `--help` teaches.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes:
  0  all is well
  1  something failed; the message says what
  2  the command line is wrong
  3  the configuration is not valid
  4  no exit monitor can run on this kernel with these rights
  6  another daemon works on this state directory
  7  probe: it would run, but exits can be lost while the daemon is down";

const SERVE: &str = "\
Serves containerd's shim API for all containers of this node on STATE_DIR/shim.sock.

Normally nobody types this: containerd runs `containerd-shim-embed-v1`, which starts the daemon when \
none is there. Containers run on when the daemon ends, and their exits are recorded in the kernel; but \
stop containerd first, since it destroys the containers of a shim whose connection is lost.";

const PROBE: &str = "\
Tries, on this very kernel and with the rights you have now, everything the exit monitors need, and says \
which one the daemon would choose, why, and what would make it better. Changes nothing.";

/// Runs containerd's containers without a shim process for each, and never loses an exit.
#[derive(Debug, Parser)]
#[command(name = "embedshimd", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve containerd's shim API for all containers of this node
    #[command(long_about = SERVE, after_help = EXIT_CODES)]
    Serve(Serve),
    /// Tell which exit monitor works here, and what would make it better
    #[command(long_about = PROBE, after_help = EXIT_CODES)]
    Probe(Probe),
}

/// Where things are; the same for every command.
#[derive(Args, Clone, Debug)]
pub(crate) struct Locations {
    /// Directory of the socket, the lock and the task records; on tmpfs, owned by root alone
    #[arg(
        long,
        value_name = "DIR",
        env = "EMBEDSHIM_STATE_DIR",
        default_value = "/run/embedshim"
    )]
    pub(crate) state_dir: PathBuf,
    /// Configuration file; without this option, /etc/embedshim/config.toml if it exists
    #[arg(long, value_name = "FILE", env = "EMBEDSHIM_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Serve {
    #[command(flatten)]
    pub(crate) locations: Locations,
    /// Log messages of this level and above: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, value_name = "LEVEL", env = "EMBEDSHIM_LOG")]
    pub(crate) log_level: Option<String>,
    /// Leave the session of whoever started it
    #[arg(long, hide = true)]
    pub(crate) detached: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Probe {
    #[command(flatten)]
    pub(crate) locations: Locations,
    /// Print JSON for programs instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn help(of: &[&str]) -> String {
        let mut command = Cli::command().term_width(100);
        command.build();
        let mut command = &mut command;
        for name in of {
            command = command.find_subcommand_mut(name).unwrap();
        }
        let mut command = command
            .clone()
            .mut_args(|argument| argument.hide_env_values(true));
        command.render_long_help().to_string()
    }

    #[test]
    fn the_help_teaches() {
        insta::assert_snapshot!("help", help(&[]));
        insta::assert_snapshot!("help_serve", help(&["serve"]));
        insta::assert_snapshot!("help_probe", help(&["probe"]));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
