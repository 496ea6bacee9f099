//! The command line of `embedshimd`, and the texts of its `--help` and man pages.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueHint};

/// The exit codes, a line for each after the first line.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  all is well
  1  something failed; the message says what
  2  the command line is wrong
  3  the configuration is not valid
  4  no exit monitor can run on this kernel with these rights
  6  another daemon or keeper works on this state directory
  7  probe: it would run, but exits can be lost while the daemon is down
  8  status: the daemon serves, but something needs attention
  9  no daemon answers, or the one that was followed has ended";

const KEEP: &str = "\
Starts `embedshimd serve` and keeps it running: starts it again whenever it ends, and holds its \
connections and other descriptors in the meantime, so that containerd does not notice.

Normally containerd runs `containerd-shim-embed-v1`, which starts the keeper when no process \
listens on STATE_DIR/shim.sock. Where systemd starts the daemon, systemd is the keeper itself.

If the keeper itself ends, the daemon takes its place and starts another daemon.

Signals:
  SIGHUP           replace the daemon: another binary, another configuration
  SIGUSR2          replace keeper and daemon by the binary on disk; see `embedshimd upgrade`
  SIGTERM, SIGINT  end the daemon and the keeper; containers run on, but stop containerd first,
                   since it destroys the containers of a shim whose connection is lost";

const SERVE: &str = "\
Serves containerd's shim API for all containers of this node on STATE_DIR/shim.sock.

Normally `embedshimd keep` or systemd starts the daemon, and again whenever it ends; they hold its \
connections in the meantime (NOTIFY_SOCKET, FDSTORE). Without them stop containerd before the \
daemon, since it destroys the containers of a shim whose connection is lost. Containers run on \
when the daemon ends, and their exits are recorded in the kernel.

Signals:
  SIGTERM, SIGINT, SIGHUP  leave; containers run on, and the keeper or systemd starts the next
                           daemon";

const UPGRADE: &str = "\
Replaces the running keeper and daemon by the binary that is on disk now, without losing a \
connection or a container; a new configuration file is read, too. Install the new binary first, \
to the same path. If it cannot run, the old keeper and daemon continue.

Where systemd started the daemon, this prints the command that does the same.";

const PROBE: &str = "\
Tries on this kernel, with the rights of the caller, everything that the exit monitors need. \
Prints which one the daemon would choose, why, and what would make it better. Changes nothing.";

const STATUS: &str = "\
Shows what the daemon does: its restarts, its exit monitor, tasks by state, what is stored for a \
successor, and what waits: events for containerd, calls of the OCI runtime, streams that are \
not read. What needs attention comes first, and is the exit code. Pins that are left of state \
directories that are gone come last; see `embedshimd pins`.

The daemon answers on STATE_DIR/admin.sock, by HTTP and for root alone, in threads of its own: \
also while everything else waits. `curl --unix-socket STATE_DIR/admin.sock http://localhost/v1/status` \
prints the same as `--json`.";

const PS: &str = "\
Lists the tasks that the daemon serves, those that are being created included. AGE is that of the \
container's first process, EXECS counts those that were not deleted, MEMORY is what the cgroup is \
charged with. With `--sandboxes` it lists the pods without a pause container, of which this daemon \
is the sandbox controller: created (not started yet), ready, or stopped, with 255 if the namespaces \
were lost.";

const INSPECT: &str = "\
Shows all that the daemon knows of one task: bundle, cgroup, streams, execs, calls of the OCI \
runtime in flight, and how each process ended with the evidence for it: wait (by its parent), bpf, \
ptrace, zombie, pidfd_info, or none; and what has happened to it, as far as this daemon remembers \
(see `embedshimd events`).

The id may be that of a sandbox, a pod without a pause container: then its record, its namespaces \
with their pins, its files and its containers are shown.";

const EVENTS: &str = "\
Shows what has happened to tasks and sandboxes since the daemon began, the last thousand events: \
create, start, exit, oom, delete, paused, resumed, exec-added, exec-started, sandbox-started, \
sandbox-stopped, sandbox-removed; with the namespace, the id, the process and its exit code. A daemon \
that takes over tells again of the exits of tasks that are not deleted, with the times of the exits.

With `--follow` it shows each event when it happens, until it is interrupted. When the daemon ends it \
says so and goes on with the next one; no exit is missing or shown twice. If none serves within ten \
seconds that is exit code 9. A reader that is too slow misses the oldest events and is told how many; \
it holds up nothing. With `--json` each line is an object, {\"lost\":NUMBER} where events are missing, \
{\"daemon_since\":SECONDS} where another daemon goes on.";

const METRICS: &str = "\
Prints the metrics as Prometheus reads them: tasks, exits by evidence, durations of requests and of \
calls of the OCI runtime, events that wait, descriptors, restarts. A scraper gets the same from \
`[metrics] listen` of the configuration, by TCP and without a password, or from \
STATE_DIR/admin.sock at /metrics.";

const WATCH: &str = "\
Waits until all these processes have ended, and prints a line for each: its status as its parent \
sees it, the time of the exit, and who knows it. As root by a BPF program, which records the exit in \
the kernel and is gone with this command; otherwise by pidfds, which know the status since Linux \
6.15. With `--all` it prints every exit on the machine from now on, until it is interrupted. Needs no \
daemon and changes nothing.";

const CONFIG: &str = "\
Reads the configuration as a daemon does that starts now. `check` says whether it is valid, and by the \
exit code 3 that it is not: such a daemon would not start. `show` lists every setting with its value \
and the line that it is from. A running daemon reads a changed file when it is replaced: by \
`systemctl restart embedshimd`, or by SIGHUP to the keeper.";

const REPORT: &str = "\
Writes a tar archive, for root's eyes alone, with the status of the daemon, its tasks and metrics, \
what the kernel offers, the configuration, versions, the end of the log, and the task records. \
Environments, arguments, standard streams and mount options of containers are left out; names are \
not: look through it before you publish it. Works without a daemon, too.";

const PINS: &str = "\
Lists the BPF programs that daemons have pinned. They record exits while no daemon runs, so they \
outlive the daemon: when its state directory is gone, three programs still run at each exit on the \
machine. `--remove` removes those: no process uses them, and their state directory is \
gone. Needs root, and no daemon.";

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
    /// Show which exit monitor works here, and what would make it better
    #[command(long_about = PROBE, after_help = EXIT_CODES)]
    Probe(Probe),
    /// Show what the daemon does, and whether something needs attention
    #[command(long_about = STATUS, after_help = EXIT_CODES)]
    Status(Status),
    /// List the tasks of this node, or its sandboxes
    #[command(long_about = PS, after_help = EXIT_CODES)]
    Ps(Ps),
    /// Show all that is known of one task or sandbox
    #[command(long_about = INSPECT, after_help = EXIT_CODES)]
    Inspect(Inspect),
    /// Show what happens to tasks and sandboxes, and the last of what has
    #[command(long_about = EVENTS, after_help = EXIT_CODES)]
    Events(Events),
    /// Print what is counted, for Prometheus
    #[command(long_about = METRICS, after_help = EXIT_CODES)]
    Metrics(Metrics),
    /// Say how processes end that are no children of this program
    #[command(long_about = WATCH, after_help = EXIT_CODES)]
    Watch(Watch),
    /// List the pinned BPF programs, and remove those that nothing will use again
    #[command(long_about = PINS, after_help = EXIT_CODES)]
    Pins(Pins),
    /// Write an archive with all that a bug report needs
    #[command(long_about = REPORT, after_help = EXIT_CODES)]
    Report(Report),
    /// Check the configuration, or show where each value is from
    #[command(long_about = CONFIG, after_help = EXIT_CODES)]
    Config(Config),
    /// Replace the running keeper and daemon by the binary on disk
    #[command(long_about = UPGRADE, after_help = EXIT_CODES)]
    Upgrade(Upgrade),
    /// Write man pages and shell completions into a directory, laid out as below /usr/share
    #[command(hide = true)]
    Documents(Documents),
}

/// The paths that several commands need.
#[derive(Args, Clone, Debug)]
pub(crate) struct Locations {
    /// Directory of the socket, the lock and the task records; on tmpfs, owned by root alone
    #[arg(
        long,
        value_name = "DIR",
        env = "EMBEDSHIM_STATE_DIR",
        value_hint = ValueHint::DirPath,
        default_value = "/run/embedshim"
    )]
    pub(crate) state_dir: PathBuf,
    /// Configuration file; without this option, /etc/embedshim/config.toml if it exists
    #[arg(long, value_name = "FILE", env = "EMBEDSHIM_CONFIG", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Serve {
    #[command(flatten)]
    pub(crate) locations: Locations,
    /// Log messages of this level and above: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, value_name = "LEVEL", env = LOG_VARIABLE)]
    pub(crate) log_level: Option<String>,
    /// The keeper's `--watchdog`, for the case that this process becomes the keeper
    #[arg(long, hide = true, value_name = "SECONDS", env = WATCHDOG_VARIABLE)]
    pub(crate) keeper_watchdog: Option<u64>,
}

/// The variable that says what is logged.
pub(crate) const LOG_VARIABLE: &str = "EMBEDSHIM_LOG";
/// The default of `--watchdog`, in seconds.
pub(crate) const WATCHDOG: u64 = 30;
/// The variable that passes `--watchdog` to a daemon and to the next keeper.
pub(crate) const WATCHDOG_VARIABLE: &str = "EMBEDSHIM_WATCHDOG";

/// The option by which a keeper asks a program, before it becomes that, whether it can take over.
pub(crate) const UNDERSTANDS: &str = "--understands";

#[derive(Args, Clone, Debug)]
pub(crate) struct Keep {
    #[command(flatten)]
    pub(crate) locations: Locations,
    /// Log messages of the daemon of this level and above: error, warn, info, debug, trace, or a
    /// tracing filter
    #[arg(long, value_name = "LEVEL", env = LOG_VARIABLE)]
    pub(crate) log_level: Option<String>,
    /// Kill and restart a daemon that does not say for so long that it is alive; 0 for never
    #[arg(long, value_name = "SECONDS", env = WATCHDOG_VARIABLE, default_value_t = WATCHDOG)]
    pub(crate) watchdog: u64,
    /// Leave the session and close the descriptors of the process that started it
    #[arg(long, hide = true)]
    pub(crate) detached: bool,
    /// Take over from the keeper that has written the memory file of this descriptor
    #[arg(long, hide = true, value_name = "NUMBER")]
    pub(crate) resume: Option<i32>,
    /// Exit with 0 if this program can take over from a keeper in this format, with 1 if not
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
        value_hint = ValueHint::DirPath,
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

/// Which daemon is asked, and for whom.
#[derive(Args, Clone, Debug)]
pub(crate) struct Asked {
    /// Directory of the daemon's socket
    #[arg(
        long,
        value_name = "DIR",
        env = "EMBEDSHIM_STATE_DIR",
        value_hint = ValueHint::DirPath,
        default_value = "/run/embedshim"
    )]
    pub(crate) state_dir: PathBuf,
    /// Print JSON for programs instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) daemon: Asked,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Ps {
    #[command(flatten)]
    pub(crate) daemon: Asked,
    /// List again after so many seconds, until it is interrupted
    #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
    pub(crate) watch: Option<u64>,
    /// List pods without a pause container instead of tasks
    #[arg(long)]
    pub(crate) sandboxes: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Events {
    #[command(flatten)]
    pub(crate) daemon: Asked,
    /// Show each event when it happens
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Show only so many of those that the daemon remembers; with --follow there are none without
    /// this option
    #[arg(long, short = 'n', value_name = "NUMBER")]
    pub(crate) last: Option<usize>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Metrics {
    /// Directory of the daemon's socket
    #[arg(
        long,
        value_name = "DIR",
        env = "EMBEDSHIM_STATE_DIR",
        value_hint = ValueHint::DirPath,
        default_value = "/run/embedshim"
    )]
    pub(crate) state_dir: PathBuf,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Watch {
    /// Processes, by their numbers
    #[arg(
        value_name = "PID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pub(crate) pids: Vec<i32>,
    /// Print every exit on the machine, until it is interrupted (Linux 5.8, root)
    #[arg(long)]
    pub(crate) all: bool,
    /// Print a JSON object for each exit instead of a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Pins {
    /// Only those of this state directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) of: Option<PathBuf>,
    /// Remove those whose state directory is gone and that no process uses
    #[arg(long)]
    pub(crate) remove: bool,
    /// Print JSON for programs instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Config {
    #[command(subcommand)]
    pub(crate) command: ConfigCommand,
    /// Configuration file; without this option, /etc/embedshim/config.toml if it exists
    #[arg(
        long = "config",
        value_name = "FILE",
        env = "EMBEDSHIM_CONFIG",
        value_hint = ValueHint::FilePath,
        global = true
    )]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Say whether the configuration is valid
    Check,
    /// List every setting, its value and where that is from
    Show,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Report {
    #[command(flatten)]
    pub(crate) locations: Locations,
    /// File that is created; without this option, in the working directory, named after the time
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) daemon: Asked,
    /// The id of a container or of a sandbox
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// containerd's namespace; needed if several have this id
    #[arg(long, short, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Documents {
    /// Directory that the files are written into
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,
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
        insta::assert_snapshot!("help_status", help(&["status"]));
        insta::assert_snapshot!("help_ps", help(&["ps"]));
        insta::assert_snapshot!("help_inspect", help(&["inspect"]));
        insta::assert_snapshot!("help_events", help(&["events"]));
        insta::assert_snapshot!("help_metrics", help(&["metrics"]));
        insta::assert_snapshot!("help_watch", help(&["watch"]));
        insta::assert_snapshot!("help_config", help(&["config"]));
        insta::assert_snapshot!("help_pins", help(&["pins"]));
        insta::assert_snapshot!("help_report", help(&["report"]));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
