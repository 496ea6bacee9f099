//! Pods of our sandbox controller: what their containers share has no process, or an init of ours.
//! They are made and ended over gRPC as containerd does it, and their containers live their lives
//! in them. A call that a daemon's death cuts short is asked again.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use embedshim_tests::Controller;
use nix::sys::signal::Signal;
use tonic::{Code, Status};

use crate::bundle::Joined;
use crate::daemon::Victim;
use crate::ground::Ground;
use crate::ledger::DEADLINE;
use crate::plan::Life;
use crate::pods::{live_members, member};
use crate::random::Random;

/// The time before a call is asked again.
const PAUSE: Duration = Duration::from_millis(20);
/// How an init ends that was killed.
const KILLED: u32 = 137;

/// What happens in one pod.
#[derive(Clone, Debug)]
struct Plan {
    shares_processes: bool,
    members: Vec<Life>,
    /// Its init is killed in the end, instead of the pod's stop.
    loses_init: bool,
}

impl Plan {
    fn of(random: &mut Random) -> Self {
        let shares_processes = random.chance(50);
        let count = 1 + random.below(3);
        Self {
            shares_processes,
            members: (0..count).map(|_| member(random)).collect(),
            loses_init: shares_processes && random.chance(30),
        }
    }
}

/// Writes the daemon's configuration, with directories for the pods' files.
pub(crate) fn configure(directory: &Path) -> anyhow::Result<PathBuf> {
    let cri = directory.join("cri");
    for part in ["root", "state"] {
        fs::create_dir_all(cri.join(part))?;
    }
    let (cri, directory) = (cri.display(), directory.display());
    let text = format!(
        "[sandbox]\nenabled = true\ncri_root = \"{cri}/root\"\ncri_state = \"{cri}/state\"\n\
         containerd = \"{directory}/c.sock\"\nevents = \"{directory}/events.ttrpc\"\n"
    );
    let path = PathBuf::from(format!("{directory}/embedshim.toml"));
    fs::write(&path, text)?;
    Ok(path)
}

/// What the first pod costs once for all.
pub(crate) fn warm_up(ground: &Ground) -> anyhow::Result<()> {
    let plan = Plan {
        shares_processes: true,
        members: Vec::new(),
        loses_init: false,
    };
    play(ground, "first-sandbox", &plan)
}

/// Lives the lives of one pod. An error is a failure.
pub(crate) fn live(ground: &Ground, id: &str, random: &mut Random) {
    let plan = Plan::of(random);
    ground.ledger.note(&format!("{id} sandbox {plan:?}"));
    if let Err(error) = play(ground, id, &plan) {
        let failure = format!("{id}: sandbox: {error:#}; {plan:?}");
        ground.ledger.failure(&failure);
    }
    ground.ledger.count(|counts| counts.pods += 1);
}

fn play(ground: &Ground, id: &str, plan: &Plan) -> anyhow::Result<()> {
    let mut pod = Pod::begin(ground, id, plan.shares_processes)?;
    ensure!(pod.is_ready()?, "it is not ready");
    let init = plan.shares_processes.then(|| pod.init()).transpose()?;
    let joined = Joined {
        id: id.into(),
        pid: Some(0),
        shares_pids: plan.shares_processes,
    };
    live_members(ground, id, &plan.members, &joined)?;
    ensure!(pod.is_ready()?, "it is not ready any more");
    let due = match init {
        Some(init) if plan.loses_init => {
            ground.ledger.kill("a pod's init killed");
            ensure!(init.signal(Signal::SIGKILL), "the init has gone");
            KILLED
        }
        _ => {
            pod.ask("Stop")?;
            0
        }
    };
    let code = exit_status(&pod.ask("Wait")?);
    ground.ledger.code(id, "Wait of a sandbox", code, &[due]);
    ensure!(!pod.is_ready()?, "it is ready");
    pod.ask("Shutdown")?;
    pod.check_gone(init)
}

/// One pod, as containerd knows it.
struct Pod<'a> {
    ground: &'a Ground,
    id: &'a str,
    controller: Controller,
}

impl<'a> Pod<'a> {
    /// Creates and starts it. A daemon that dies forgets what was created, and undoes what was
    /// being started.
    fn begin(ground: &'a Ground, id: &'a str, shares_processes: bool) -> anyhow::Result<Self> {
        let socket = ground.state_dir.join("pods.sock");
        let controller = Controller::connect_as(&socket, &ground.namespace)?;
        let mut pod = Self {
            ground,
            id,
            controller,
        };
        let since = Instant::now();
        loop {
            let created = pod.controller.create_plain(id, shares_processes);
            pod.ground
                .ledger
                .note(&format!("{id} sandbox Create: {created:?}"));
            let started = match created {
                // It may be that of the last attempt.
                None | Some(Code::AlreadyExists) => pod.try_to_ask("Start"),
                Some(code) => Err(Status::new(code, "Create")),
            };
            match started {
                Ok(_) => return Ok(pod),
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => again(&status, since)?,
            }
        }
    }

    /// One attempt of a call.
    fn try_to_ask(&mut self, method: &str) -> Result<Vec<u8>, Status> {
        let answer = self.controller.ask(method, self.id);
        let shown = answer.as_ref().map(|_| "ok").map_err(Status::message);
        let id = self.id;
        let note = format!("{id} sandbox {method}: {shown:?}");
        self.ground.ledger.note(&note);
        answer
    }

    /// The answer, of the next daemon if need be.
    fn ask(&mut self, method: &str) -> anyhow::Result<Vec<u8>> {
        let since = Instant::now();
        loop {
            match self.try_to_ask(method) {
                Ok(answer) => {
                    let what = format!("{} sandbox {method}", self.id);
                    self.ground.ledger.answered(&what, "ok", since.elapsed());
                    return Ok(answer);
                }
                Err(status) => again(&status, since).context(method.to_owned())?,
            }
        }
    }

    fn is_ready(&mut self) -> anyhow::Result<bool> {
        let answer = self.ask("Status")?;
        Ok(contains(&answer, b"SANDBOX_READY"))
    }

    fn record(&self) -> PathBuf {
        let name = format!("{}:{}.json", self.ground.namespace, self.id);
        self.ground.state_dir.join("sandboxes").join(name)
    }

    fn init(&self) -> anyhow::Result<Victim> {
        let record: serde_json::Value = serde_json::from_slice(&fs::read(self.record())?)?;
        let pid = record.pointer("/init/identity/pid");
        let pid = pid.and_then(serde_json::Value::as_i64).context("no init")?;
        Victim::at(i32::try_from(pid)?).context("the init has gone")
    }

    fn check_gone(&mut self, init: Option<Victim>) -> anyhow::Result<()> {
        ensure!(!init.is_some_and(Victim::is_alive), "its init lives on");
        ensure!(!self.record().exists(), "there is a record");
        let place = self
            .ground
            .state_dir
            .join("pods")
            .join(&self.ground.namespace);
        ensure!(!place.join(self.id).exists(), "there are files");
        let since = Instant::now();
        loop {
            match self.try_to_ask("Status") {
                Err(status) if status.code() == Code::NotFound => return Ok(()),
                Err(status) => again(&status, since)?,
                Ok(_) => bail!("the controller knows it"),
            }
        }
    }
}

/// Waits for another daemon; any other error is a failure.
fn again(status: &Status, since: Instant) -> anyhow::Result<()> {
    // What the library says of a connection that ends within a call.
    let is_lost = matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled
    );
    if !is_lost || since.elapsed() > DEADLINE {
        bail!("{status:?}");
    }
    sleep(PAUSE);
    Ok(())
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// The first field, a number; 0 is left out.
fn exit_status(answer: &[u8]) -> u32 {
    const EXIT_STATUS: u8 = 1 << 3;
    match answer {
        [EXIT_STATUS, low, ..] if low & 0x80 == 0 => u32::from(*low),
        [EXIT_STATUS, low, high, ..] => u32::from(low & 0x7f) | u32::from(*high) << 7,
        _ => 0,
    }
}
