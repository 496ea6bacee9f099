//! Single steps: the same short lives again and again, and each time the daemon dies at the next of
//! its lasting steps, right before and right after it. It is the place where no luck is needed.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use testbed::chaos::Options;
use testbed::sandbox::until;

use crate::direct;
use crate::ground::Ground;
use crate::plan::{End, Life, ProcessPlan, Sink, Step};
use crate::program::Program;
use crate::random::Random;

const STEPS: u64 = 4;
/// More lines than pipe and fifo hold.
const MANY: u64 = 30_000;
/// So many times fewer deaths for a life that takes so many times longer.
const SLOW: u64 = 4;
/// A daemon that dies in all its steps and has more than this is not what this suite was made for.
const TOO_MANY: u64 = 1000;

/// The lives whose steps are taken: together they do everything that lasts.
fn lives() -> Vec<(&'static str, Life)> {
    let plain = ProcessPlan::plain;
    let short = |code| plain(Program::Exit { code, after_ms: 0 }, End::Itself);
    let copies = |code| plain(Program::UntilEof { code }, End::CloseIo);
    let sleeps = |end| plain(Program::Sleep, end);
    let many = |mut plan: ProcessPlan| {
        plan.lines.out = MANY;
        plan
    };
    let mut early = copies(9);
    early.streams.writes_early = true;
    let alone = |plan| (plan, Vec::new());
    let with = |plan, steps: &[Step]| (plan, steps.to_vec());
    let killed = sleeps(End::Kill);
    let lives = [
        ("plain", alone(short(37))),
        (
            "exec",
            with(
                plain(Program::UntilTerm { code: 9 }, End::Term),
                &[
                    Step::Exec(short(41)),
                    Step::Exec(killed),
                    Step::Exec(sleeps(End::WithInit)),
                ],
            ),
        ),
        (
            "failing create",
            alone(plain(Program::Missing, End::Itself)),
        ),
        (
            "failing exec",
            with(killed, &[Step::Exec(plain(Program::Missing, End::Itself))]),
        ),
        ("pause", with(killed, &[Step::Pause])),
        ("input", alone(copies(8))),
        ("early input", alone(early)),
        ("unstarted", alone(sleeps(End::Unstarted))),
        ("terminal", alone(short(12).on_terminal())),
        ("terminal input", alone(copies(13).on_terminal())),
        (
            "exec terminal",
            with(killed, &[Step::Exec(short(14).on_terminal())]),
        ),
        (
            "exec input",
            with(
                killed,
                &[Step::Exec(copies(15)), Step::Exec(copies(16).on_terminal())],
            ),
        ),
        ("logger", alone(short(17).to(Sink::Logger))),
        (
            "terminal logger",
            alone(short(18).on_terminal().to(Sink::Logger)),
        ),
        ("log file", alone(short(19).to(Sink::File))),
        (
            "terminal log file",
            alone(short(20).on_terminal().to(Sink::File)),
        ),
        ("much", alone(many(short(21)))),
        ("much on a terminal", alone(many(short(22).on_terminal()))),
        ("much to a log file", alone(many(short(23).to(Sink::File)))),
    ];
    lives
        .map(|(name, (init, steps))| {
            (
                name,
                Life {
                    steps,
                    ..Life::of_init(init)
                },
            )
        })
        .into_iter()
        .chain([(
            "checkpoint",
            Life::checkpointed(Program::UntilTerm { code: 24 }, End::Term),
        )])
        .collect()
}

/// Takes the steps: all of them, or as many as are asked for, chosen by the seed.
pub(crate) fn take(ground: &Ground, options: &Options) -> anyhow::Result<()> {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // So many deaths would make the keeper wait for a second before each new daemon, in which
        // nothing is to be learned.
        scope.spawn(|| {
            let mut was_there = true;
            while !is_done.load(Ordering::Relaxed) {
                // Twice in a row, or the one that is just being started would be asked to leave.
                let is_there = ground.daemons.current().is_some();
                if !is_there && !was_there {
                    ground.daemons.hurry();
                }
                was_there = is_there;
                std::thread::sleep(Duration::from_millis(30));
            }
        });
        let taken = take_all(ground, options);
        is_done.store(true, Ordering::Relaxed);
        taken
    })
}

fn take_all(ground: &Ground, options: &Options) -> anyhow::Result<()> {
    for (number, (name, life)) in (0..).zip(lives()) {
        if !options.lives.is_empty() && !options.lives.iter().any(|wanted| wanted == name) {
            continue;
        }
        let mut random = Random::of(options.seed(), &[STEPS, number]);
        // Without --every-step each life has so many deaths, spread over it.
        let stride = match (options.every_step, life.is_checkpointed) {
            (true, _) => 1,
            (false, false) => options.stride,
            // CRIU takes its time.
            (false, true) => SLOW * options.stride,
        };
        let mut step = 1 + random.below(stride);
        let mut deaths = 0;
        // Twice, since a keeper that is hurried sometimes asks the armed daemon to leave.
        while take_one(ground, name, &life, step, &mut random)?
            || take_one(ground, name, &life, step, &mut random)?
        {
            deaths += 1;
            step += stride;
            if step > TOO_MANY || (ground.ledger.has_failures() && !options.go_on) {
                break;
            }
        }
        println!("  {name}: died at {deaths} of at most {} steps", step - 1);
        if ground.ledger.has_failures() && !options.go_on {
            break;
        }
    }
    Ok(())
}

/// Lives a life whose daemon dies at this step; false if the life had no such step.
fn take_one(
    ground: &Ground,
    name: &str,
    life: &Life,
    step: u64,
    random: &mut Random,
) -> anyhow::Result<bool> {
    let id = format!("s{step}-{}", name.replace(' ', "-"));
    let before = deaths(ground);
    arm(ground, step)?;
    // Sometimes the successor dies as well, while it takes over.
    let second = random.chance(30).then(|| 1 + random.below(8));
    if let Some(second) = second {
        fs::write(ground.state_dir.join("failpoint"), second.to_string())?;
    }
    ground
        .ledger
        .note(&format!("{name}: step {step}, then {second:?}"));
    direct::live(ground, &id, life);
    let has_died = deaths(ground) > before;
    if has_died {
        ground.ledger.count(|counts| counts.steps += 1);
    }
    // No daemon may be armed any more.
    let _ = fs::remove_file(ground.state_dir.join("failpoint"));
    let daemon = ground.daemons.successor(None)?;
    daemon.signal(Signal::SIGKILL);
    ground.daemons.successor(Some(daemon))?;
    Ok(has_died)
}

/// Has a daemon serve that will die at this step.
fn arm(ground: &Ground, step: u64) -> anyhow::Result<()> {
    let file = ground.state_dir.join("failpoint");
    let daemon = ground.daemons.successor(None)?;
    let unarmed = ground.state_dir.join("failpoint.new");
    fs::write(&unarmed, step.to_string())?;
    fs::rename(&unarmed, &file)?;
    daemon.signal(Signal::SIGKILL);
    ground.daemons.successor(Some(daemon))?;
    until("the daemon has read its failpoint", || Ok(!file.exists()))
        .context("was embedshimd built with the feature `failpoints`?")
}

fn deaths(ground: &Ground) -> usize {
    ground.sandbox().daemon_log().matches("failpoint:").count()
}
