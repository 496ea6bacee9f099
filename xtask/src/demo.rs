//! `cargo xtask demo`: the promises, one after the other, on this very machine, each with what was
//! run and what came out. A step that shows something else ends the demo with an error.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::products::{self, Profile};
use testbed::sandbox::{EMBEDSHIM, Finished, PATIENCE, Running, Sandbox, is_alive, until};
use testbed::{image, machine};

/// Runs all steps.
pub(crate) fn run() -> anyhow::Result<()> {
    machine::prepare()?;
    println!("Building embedshimd (release)...");
    let binaries = products::build(Profile::Release)?;
    println!("Making an image of busybox and a small static program...");
    let image = tempfile::tempdir()?;
    let archive = image::build(image.path())?;
    let sandbox = Sandbox::start(&binaries, EMBEDSHIM, &archive)?;
    println!(
        "A private containerd runs in {}; the system's is not touched.",
        sandbox.directory().display()
    );
    let mut demo = Demo { sandbox, steps: 0 };
    demo.output()?;
    demo.exit_code()?;
    demo.killed()?;
    demo.leader_first()?;
    demo.two_processes()?;
    demo.killed_daemon()?;
    demo.nobody_there()?;
    println!("\nAll of it is true on this machine. Nothing is left behind.");
    Ok(())
}

struct Demo {
    sandbox: Sandbox,
    steps: u32,
}

impl Demo {
    fn step(&mut self, what: &str) {
        self.steps += 1;
        println!("\n{}. {what}", self.steps);
    }

    fn output(&mut self) -> anyhow::Result<()> {
        self.step("A container runs through an unmodified containerd; its output arrives.");
        let finished = show(&mut self.sandbox.run(
            &["--rm"],
            "hello",
            &["echo", "hello from a container"],
        ))?;
        ensure!(
            finished.code == Some(0) && finished.stdout == "hello from a container\n",
            "got {finished:?}"
        );
        Ok(())
    }

    fn exit_code(&mut self) -> anyhow::Result<()> {
        self.step("Its exit code arrives.");
        expect(
            &mut self
                .sandbox
                .run(&["--rm"], "seven", &["sh", "-c", "exit 7"]),
            7,
        )
    }

    fn killed(&mut self) -> anyhow::Result<()> {
        self.step("Death by SIGKILL is 128 + 9 = 137.");
        let mut command = self.sandbox.run(&["--rm"], "victim", &["sleep", "1000"]);
        say(&command);
        let mut run = Running::capture(&mut command)?;
        self.sandbox.wait_for_status("victim", "RUNNING")?;
        show(
            &mut self
                .sandbox
                .ctr(["task", "kill", "--signal", "KILL", "victim"]),
        )?;
        report(&run.finish(PATIENCE)?, 137)
    }

    fn leader_first(&mut self) -> anyhow::Result<()> {
        self.step("The main thread ends first, another thread exits with 44: 44 counts, not the main thread's 0.");
        expect(
            &mut self
                .sandbox
                .run(&["--rm"], "leader", &["guest", "leader-first", "44", "200"]),
            44,
        )
    }

    fn two_processes(&mut self) -> anyhow::Result<()> {
        self.step(
            "Ten containers, and still no more than a daemon and its keeper. (containerd's own shims would be ten.)",
        );
        for number in 0..10 {
            self.sandbox
                .detached(&[], &format!("c{number}"), &["sleep", "1000"])?;
        }
        let daemon = self
            .sandbox
            .daemon_pid()
            .context("the daemon is not there")?;
        let keeper = self
            .sandbox
            .keeper_pid()
            .context("the keeper is not there")?;
        let mut ours = processes_named("embedshimd", self.sandbox.directory())?;
        ours.sort_by_key(|&pid| pid != daemon);
        let (of_daemon, of_keeper) = (pss(daemon)?, pss(keeper)?);
        println!(
            "   containers: 10   embedshim processes: {}   memory (Pss): daemon {of_daemon} kB + keeper {of_keeper} kB = {} kB",
            ours.len(),
            of_daemon + of_keeper
        );
        ensure!(ours == [daemon, keeper], "processes: {ours:?}");
        for number in 0..10 {
            let id = format!("c{number}");
            quiet(&mut self.sandbox.ctr(["task", "rm", "--force", &id]))?;
            quiet(&mut self.sandbox.ctr(["container", "rm", &id]))?;
        }
        Ok(())
    }

    fn killed_daemon(&mut self) -> anyhow::Result<()> {
        self.step("embedshimd is killed under a running container, which ends before the next one is there. containerd does not notice.");
        let mut command = self
            .sandbox
            .run(&["--rm"], "survivor", &["guest", "until-term", "9"]);
        say(&command);
        let mut run = Running::capture(&mut command)?;
        self.sandbox.wait_for_status("survivor", "RUNNING")?;
        let container = self.sandbox.task("survivor")?.pid;
        let daemon = self
            .sandbox
            .daemon_pid()
            .context("the daemon is not there")?;
        let keeper = self
            .sandbox
            .keeper_pid()
            .context("the keeper is not there")?;
        let before = self.disconnections()?;
        // It would start the next daemon before the container has ended.
        kill(Pid::from_raw(keeper), Signal::SIGSTOP)?;
        kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
        until("it ends", || Ok(!is_alive(daemon)))?;
        println!("   embedshimd (pid {daemon}) is killed by SIGKILL, and its keeper is stopped");
        kill(Pid::from_raw(container), Signal::SIGTERM)?;
        until("it ends", || Ok(!is_alive(container)))?;
        ensure!(
            self.disconnections()? == before,
            "containerd has lost a connection"
        );
        println!("   the container has exited with 9; `ctr run` waits, containerd's log is silent");
        kill(Pid::from_raw(keeper), Signal::SIGCONT)?;
        let next = self.sandbox.successor_of(daemon)?;
        println!("   the keeper goes on and starts embedshimd again (pid {next})");
        report(&run.finish(PATIENCE)?, 9)?;
        Ok(())
    }

    /// How often containerd has reported a shim whose connection has ended, as it does after each
    /// deletion, too.
    fn disconnections(&self) -> anyhow::Result<usize> {
        let log = std::fs::read_to_string(self.sandbox.containerd_log())?;
        Ok(log.matches("shim disconnected").count())
    }

    fn nobody_there(&mut self) -> anyhow::Result<()> {
        self.step("containerd is stopped, embedshimd and its keeper are killed, and then two containers end. No daemon is there to see it.");
        let nine = self
            .sandbox
            .detached(&[], "nine", &["guest", "until-term", "9"])?;
        let killed = self.sandbox.detached(&[], "killed", &["sleep", "1000"])?;
        println!("   running: nine (pid {nine}) and killed (pid {killed})");
        self.sandbox.stop_containerd()?;
        println!("   containerd is stopped");
        let daemon = self
            .sandbox
            .daemon_pid()
            .context("the daemon is not there")?;
        self.sandbox.end_daemon(Signal::SIGKILL)?;
        println!(
            "   embedshimd (pid {daemon}) and its keeper are killed by SIGKILL; the containers run on"
        );
        ensure!(
            is_alive(nine) && is_alive(killed),
            "a container died with the daemon"
        );
        kill(Pid::from_raw(nine), Signal::SIGTERM)?;
        kill(Pid::from_raw(killed), Signal::SIGKILL)?;
        until("both end", || Ok(!is_alive(nine) && !is_alive(killed)))?;
        println!(
            "   nine has exited with 9, killed was killed by SIGKILL; the kernel's BPF program has seen it"
        );
        self.sandbox.start_daemon()?;
        self.sandbox.start_containerd()?;
        println!("   a new embedshimd and containerd are there");
        for (id, code) in [("nine", 9), ("killed", 137)] {
            self.sandbox.wait_for_status(id, "STOPPED")?;
            let told = self.sandbox.delete_task(id)?;
            println!("   containerd says of {id}: exit code {told}");
            ensure!(told == code, "exit code {code} was expected");
            quiet(&mut self.sandbox.ctr(["container", "rm", id]))?;
        }
        Ok(())
    }
}

/// The command as a reader would type it, without the sandbox's paths.
fn say(command: &Command) {
    let mut words = Vec::new();
    let mut arguments = command
        .get_args()
        .map(|argument| argument.to_string_lossy().into_owned());
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--address" | "--namespace" | "--fifo-dir" => drop(arguments.next()),
            _ if word.contains(' ') => words.push(format!("'{word}'")),
            _ => words.push(word),
        }
    }
    println!("   $ ctr {}", words.join(" "));
}

fn quiet(command: &mut Command) -> anyhow::Result<Finished> {
    Running::capture(command)?.finish(PATIENCE)
}

fn show(command: &mut Command) -> anyhow::Result<Finished> {
    say(command);
    let finished = quiet(command)?;
    for line in finished.stdout.lines().chain(finished.stderr.lines()) {
        println!("   {line}");
    }
    Ok(finished)
}

fn expect(command: &mut Command, code: i32) -> anyhow::Result<()> {
    let finished = show(command)?;
    report(&finished, code)
}

fn report(finished: &Finished, code: i32) -> anyhow::Result<()> {
    match finished.code {
        Some(got) if got == code => {
            println!("   exit code: {got}");
            Ok(())
        }
        _ => bail!("exit code {code} was expected: {finished:?}"),
    }
}

/// The processes of this name that belong to the sandbox.
pub(crate) fn processes_named(name: &str, directory: &Path) -> anyhow::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(name) && line.contains(&*directory.to_string_lossy()) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Memory that is this process's alone, and its share of what it shares; in kB.
pub(crate) fn pss(pid: i32) -> anyhow::Result<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .context("no Pss in smaps_rollup")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}
