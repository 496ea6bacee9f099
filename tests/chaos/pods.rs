//! Pods: a container whose namespaces others join, as the CRI plugin makes them. The others live
//! their lives in it, several at a time; of a shared pid namespace nothing outlives the first.

use anyhow::{Context, bail};

use crate::bundle::Joined;
use crate::client::Client;
use crate::direct::{self, Container};
use crate::ground::Ground;
use crate::plan::{End, Life, ProcessPlan};
use crate::program::Program;
use crate::random::Random;

/// What happens in one pod.
#[derive(Clone, Debug)]
struct Plan {
    shares_pids: bool,
    members: Vec<Life>,
    /// Is still there when the first container ends.
    last: Option<Life>,
}

impl Plan {
    fn of(random: &mut Random) -> Self {
        let shares_pids = random.chance(60);
        let count = 1 + random.below(3);
        let members = (0..count).map(|_| member(random)).collect();
        let mut last = ProcessPlan::plain(Program::Sleep, End::WithPod);
        last.is_awaited = true;
        let has_last = shares_pids && random.chance(50);
        Self {
            shares_pids,
            members,
            last: has_last.then(|| Life::of_init(last)),
        }
    }
}

/// CRIU knows nothing of namespaces that are joined.
pub(crate) fn member(random: &mut Random) -> Life {
    loop {
        let life = Life::of(random);
        if !life.is_checkpointed {
            return life;
        }
    }
}

/// Lives the lives of one pod. An error is a failure.
pub(crate) fn live(ground: &Ground, id: &str, random: &mut Random) {
    let plan = Plan::of(random);
    ground.ledger.note(&format!("{id} {plan:?}"));
    if let Err(error) = play(ground, id, &plan) {
        ground.ledger.failure(&format!("{id}: {error:#}; {plan:?}"));
    }
    ground.ledger.count(|counts| {
        counts.pods += 1;
        counts.lives += 1 + u64::from(plan.last.is_some());
    });
}

fn play(ground: &Ground, id: &str, plan: &Plan) -> anyhow::Result<()> {
    let mut joined = Joined {
        id: id.into(),
        pid: None,
        shares_pids: plan.shares_pids,
    };
    let first = Life::of_init(ProcessPlan::plain(Program::Sleep, End::KillAll));
    let client = Client::connect(ground, id)?;
    let mut first = Container::new(ground, id, &first, client, Some(&joined))?;
    first.create()?;
    let Some(wait) = first.begin()? else {
        return Ok(());
    };
    joined.pid = Some(first.pid);
    live_members(ground, id, &plan.members, &joined)?;
    let Some(life) = &plan.last else {
        return first.finish(wait);
    };
    let last = format!("{id}-last");
    let client = Client::connect(ground, &last)?;
    let mut last = Container::new(ground, &last, life, client, Some(&joined))?;
    last.create()?;
    let end = last.begin()?;
    first.finish(wait)?;
    end.map_or(Ok(()), |end| last.finish(end))
        .context("what was left in the pod")
}

/// Lives all of these at once.
pub(crate) fn live_members(
    ground: &Ground,
    id: &str,
    members: &[Life],
    pod: &Joined,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(members)
            .map(|(number, life): (u32, _)| {
                scope.spawn(move || direct::live_in(ground, &format!("{id}-{number}"), life, pod))
            })
            .collect();
        for thread in threads {
            if thread.join().is_err() {
                bail!("a member of a pod panicked");
            }
        }
        Ok(())
    })
}
