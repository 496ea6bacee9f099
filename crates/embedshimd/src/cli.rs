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
  6  another daemon or keeper works on this state directory
  7  probe: it would run, but exits can be lost while the daemon is down";

const KEEP: &str = "\
Starts `embedshimd serve` and keeps it running: starts it again whenever it ends, and holds its \
connections and other descriptors meanwhile, so that containerd does not notice.

Normally nobody types this: containerd runs `containerd-shim-embed-v1`, which starts the keeper when \
nobody listens on STATE_DIR/shim.sock. Where systemd starts the daemon it is the keeper itself.

Should the keeper itself end, the daemon takes its place and starts another daemon.

Signals:
  SIGHUP           replace the daemon: another binary, another configuration
  SIGUSR2          replace keeper and daemon by the binary on disk; see `embedshimd upgrade`
  SIGTERM, SIGINT  end the daemon and the keeper; containers run on, but stop containerd first,
                   since it destroys the containers of a shim whose connection is lost";

const SERVE: &str = "\
Serves containerd's shim API for all containers of this node on STATE_DIR/shim.sock.

Normally `embedshimd keep` or systemd starts this, and again whenever it ends; they hold its connections \
meanwhile (NOTIFY_SOCKET, FDSTORE). Without them stop containerd before the daemon, since it destroys the \
containers of a shim whose connection is lost. Containers run on when the daemon ends, and their exits are \
recorded in the kernel.

Signals:
  SIGTERM, SIGINT, SIGHUP  leave; containers run on, and whoever keeps us starts the next one";

const UPGRADE: &str = "\
Replaces the running keeper and daemon by the binary that is on disk now, without losing a connection \
or a container; a new configuration file is read too. Install the new binary first, to the same path. If it cannot run, the old ones go on.

Where systemd keeps the daemon, this says which command does the same.";

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
    /// Start the daemon, keep it running, and hold its connections while it is replaced
    #[command(long_about = KEEP, after_help = EXIT_CODES)]
    Keep(Keep),
    /// Serve containerd's shim API for all containers of this node
    #[command(long_about = SERVE, after_help = EXIT_CODES)]
    Serve(Serve),
    /// Tell which exit monitor works here, and what would make it better
    #[command(long_about = PROBE, after_help = EXIT_CODES)]
    Probe(Probe),
    /// Replace the running keeper and daemon by the binary on disk
    #[command(long_about = UPGRADE, after_help = EXIT_CODES)]
    Upgrade(Upgrade),
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
    /// The keeper's option, to be passed on should this process become the keeper
    #[arg(long, hide = true, value_name = "SECONDS", env = WATCHDOG_VARIABLE)]
    pub(crate) keeper_watchdog: Option<u64>,
}

/// For how many seconds a daemon may not say that it is alive.
pub(crate) const WATCHDOG: u64 = 30;
/// The same, told to a daemon and to another keeper.
pub(crate) const WATCHDOG_VARIABLE: &str = "EMBEDSHIM_WATCHDOG";

/// What a keeper asks a program before it becomes that.
pub(crate) const UNDERSTANDS: &str = "--understands";

#[derive(Args, Clone, Debug)]
pub(crate) struct Keep {
    #[command(flatten)]
    pub(crate) locations: Locations,
    /// Log messages of the daemon of this level and above: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, value_name = "LEVEL", env = "EMBEDSHIM_LOG")]
    pub(crate) log_level: Option<String>,
    /// Kill and start again a daemon that for so long does not say that it is alive; 0 for never
    #[arg(long, value_name = "SECONDS", env = WATCHDOG_VARIABLE, default_value_t = WATCHDOG)]
    pub(crate) watchdog: u64,
    /// Leave the session of whoever started it
    #[arg(long, hide = true)]
    pub(crate) detached: bool,
    /// Go on with what another keeper tells in the file of this descriptor
    #[arg(long, hide = true, value_name = "NUMBER")]
    pub(crate) resume: Option<i32>,
    /// Only say by the exit code whether what a keeper tells in this format can be gone on with
    #[arg(long, hide = true, value_name = "FORMAT")]
    pub(crate) understands: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Upgrade {
    /// Directory of the socket, the lock and the task records; on tmpfs, owned by root alone
    #[arg(
        long,
        value_name = "DIR",
        env = "EMBEDSHIM_STATE_DIR",
        default_value = "/run/embedshim"
    )]
    pub(crate) state_dir: PathBuf,
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
        insta::assert_snapshot!("help_keep", help(&["keep"]));
        insta::assert_snapshot!("help_serve", help(&["serve"]));
        insta::assert_snapshot!("help_upgrade", help(&["upgrade"]));
        insta::assert_snapshot!("help_probe", help(&["probe"]));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
