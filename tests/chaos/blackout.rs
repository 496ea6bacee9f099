//! The blackout: containerd is stopped, keeper and daemon are killed, and containers end while none
//! of them runs. Afterwards the code of each is known, who lived lives, and what loggers and log
//! files got is whole.

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{Sandbox, is_alive, until};

use crate::client::{Client, accepted};
use crate::direct::handles_term;
use crate::ground::Ground;
use crate::plan::{End, Life, ProcessPlan, Sink};
use crate::program::{KILLED, Program};
use crate::streams::ClientStreams;

/// What the containers do, and which signal they get in the dark.
const CROWD: [(Program, Option<Signal>); 5] = [
    (Program::UntilTerm { code: 9 }, Some(Signal::SIGTERM)),
    (Program::Sleep, Some(Signal::SIGKILL)),
    (Program::Sleep, None),
    (
        Program::LeaderFirst {
            code: 44,
            after_ms: 1500,
        },
        None,
    ),
    (
        Program::Exit {
            code: 17,
            after_ms: 1500,
        },
        None,
    ),
];

struct Member<'a> {
    id: String,
    pid: u32,
    program: Program,
    signal: Option<Signal>,
    streams: ClientStreams<'a>,
}

/// Turns the light off and on again.
pub(crate) fn happen(ground: &Ground, has_containerd: bool) -> anyhow::Result<()> {
    ground.ledger.note("blackout");
    let mut crowd = Vec::new();
    for (number, (program, signal)) in CROWD.into_iter().enumerate() {
        // A client that reads a fifo is not there either, in a blackout: it would be containerd.
        let sink = if number % 2 == 0 {
            Sink::Logger
        } else {
            Sink::File
        };
        crowd.push(begin(ground, format!("b{number}"), program, signal, sink)?);
    }
    if has_containerd {
        let sandbox = ground.sandbox();
        sandbox.detached(&[], "b-sleep", &["sleep", "100000"])?;
        sandbox.detached(&[], "b-dark", &["sleep", "100000"])?;
    }
    let in_the_dark = |sandbox: &mut Sandbox| {
        ground.ledger.kill("both killed");
        ground.daemons.kill_both()?;
        for member in &crowd {
            end(member)?;
        }
        sandbox.start_daemon()
    };
    if has_containerd {
        let dark = ground.sandbox().task("b-dark")?.pid;
        ground.without_containerd(true, |sandbox| {
            in_the_dark(sandbox)?;
            kill(Pid::from_raw(dark), Signal::SIGKILL).context("cannot kill b-dark")
        })?;
    } else {
        ground.with_sandbox(in_the_dark)?;
    }
    for member in &crowd {
        look(ground, member).with_context(|| member.id.clone())?;
    }
    if has_containerd {
        look_by_containerd(ground)?;
    }
    Ok(())
}

fn begin(
    ground: &Ground,
    id: String,
    program: Program,
    signal: Option<Signal>,
    sink: Sink,
) -> anyhow::Result<Member<'_>> {
    let mut life = Life::of_init(ProcessPlan::plain(program, End::Itself).to(sink));
    life.init.is_awaited = true;
    let bundle = ground.bundles.make(&id, &life, None)?;
    let streams = ClientStreams::open(ground, &id, "", &life.init)?;
    let client = Client::connect(ground, &id)?;
    accepted("Create", client.create(&bundle, &streams))?;
    let pid = accepted("Start", client.start(""))?;
    streams.await_lines()?;
    if signal == Some(Signal::SIGTERM) {
        handles_term(pid)?;
    }
    Ok(Member {
        id,
        pid,
        program,
        signal,
        streams,
    })
}

/// Waits for the end of each life that ends in the dark, after helping.
fn end(member: &Member<'_>) -> anyhow::Result<()> {
    let pid = i32::try_from(member.pid)?;
    if let Some(signal) = member.signal {
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot kill {}", member.id))?;
    }
    if member.signal.is_none() && member.program.is_lasting() {
        return Ok(());
    }
    until("it ends in the dark", || Ok(!is_alive(pid)))
}

fn look(ground: &Ground, member: &Member<'_>) -> anyhow::Result<()> {
    let client = Client::connect(ground, &member.id)?;
    let due = if member.signal == Some(Signal::SIGKILL) {
        KILLED
    } else {
        member.program.own_code()
    };
    if member.signal.is_none() && member.program.is_lasting() {
        let pid = accepted("State", client.state(""))?.pid;
        ensure!(pid == member.pid, "{pid} instead of {}", member.pid);
        accepted("Kill", client.kill("", Signal::SIGKILL))?;
    }
    let told = accepted("Wait", client.wait("").answer())?.exit_status;
    ground.ledger.code(&member.id, "Wait", told, &[due]);
    let told = accepted("Delete", client.delete(""))?;
    ground.ledger.code(&member.id, "Delete", told, &[due]);
    member.streams.check_deleted(told)?;
    ground.ledger.count(|counts| counts.lives += 1);
    ground.check_gone(&member.id)?;
    ground.bundles.remove(&member.id)
}

fn look_by_containerd(ground: &Ground) -> anyhow::Result<()> {
    let sandbox = ground.sandbox();
    let task = sandbox.task("b-sleep")?;
    ensure!(task.status == "RUNNING", "{task:?}");
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "b-sleep"])?;
    for id in ["b-sleep", "b-dark"] {
        sandbox.wait_for_status(id, "STOPPED")?;
        let told = u32::try_from(sandbox.delete_task(id)?)?;
        ground.ledger.code(id, "ctr task rm", told, &[KILLED]);
        sandbox.ctr_ok(&["container", "rm", id])?;
        ground.ledger.count(|counts| counts.lives += 1);
    }
    Ok(())
}
