//! A daemon that cannot serve while there is no keeper: it becomes the keeper of what it was given,
//! since all of that would be closed with it. Owns what is tried then, and for how long.

use std::os::fd::OwnedFd;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use embedshim_core::chain;
use tracing::error;

use super::guardian::{ALONE, Keeper, RETRY};
use crate::cli::Serve;
use crate::keep::Succession;
use crate::logging;
use crate::outcome::{Code, Failure};
use crate::state_dir::lock;

/// How long it is tried. The clients of a process that does not serve wait for it in vain.
const LIMIT: Duration = Duration::from_mins(1);

/// Becomes the keeper in the place of ending with this failure, if the keeper has ended; otherwise,
/// or if that fails, returns it.
pub(super) fn succeed_instead(
    failure: Failure,
    keeper: Option<&Keeper>,
    options: &Serve,
    descriptors: Vec<(String, OwnedFd)>,
) -> Failure {
    if !keeper.is_some_and(Keeper::has_ended) {
        return failure;
    }
    logging::start_plain(&options.locations.state_dir);
    error!(
        error = chain(failure.error.as_ref()),
        "embedshimd cannot serve, and the keeper has ended: this process becomes the keeper and \
         starts another embedshimd"
    );
    become_keeper(options, descriptors);
    failure
}

/// Becomes the keeper of these descriptors; returns only if that fails. Blocks; no runtime may run
/// that reaps children.
pub(super) fn become_keeper(options: &Serve, descriptors: Vec<(String, OwnedFd)>) -> Failure {
    let deadline = Instant::now() + LIMIT;
    loop {
        let prepared =
            Succession::prepare(options, |command| command.spawn().map(Box::<Child>::new));
        let error = match prepared {
            Ok(succession) => match succession.become_keeper(descriptors) {
                Ok(never) => match never {},
                // Its descriptors are closed.
                Err(error) => return Failure::new(Code::Failed, error),
            },
            Err(error) => error,
        };
        error!(
            error = format!("{error:#}"),
            "cannot become the keeper; {ALONE}"
        );
        let path = lock::keeper_path(&options.locations.state_dir);
        let has_other = lock::read_owner(&path).is_ok_and(|owner| owner.is_some());
        if has_other || Instant::now() >= deadline {
            return Failure::new(Code::Failed, error);
        }
        sleep(RETRY);
    }
}
