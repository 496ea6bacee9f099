//! What is measured: [`Subject`] makes containers, [`Container`] takes one through its life. The
//! same steps for shims and for the bare runtime below them.

mod bare;
mod ground;
mod peers;
mod shim;
pub(crate) mod spawn;

use anyhow::Context;
use nix::sys::prctl::set_child_subreaper;

pub(crate) use bare::Bare;
pub(crate) use ground::{Bundle, Ground};
pub(crate) use peers::{Chosen, choose};
pub(crate) use shim::{Shim, ShimContainer, fake_runtime};

/// A shim, or the runtime without one.
#[derive(Debug)]
pub(crate) enum Subject {
    Bare(Bare),
    Shim(Shim),
}

/// A container of either.
#[derive(Debug)]
pub(crate) enum Container {
    Bare(bare::BareContainer),
    Shim(ShimContainer),
}

impl Subject {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Bare(bare) => bare.name(),
            Self::Shim(shim) => shim.name(),
        }
    }

    /// The shim, if it is one.
    pub(crate) fn shim(&self) -> Option<&Shim> {
        match self {
            Self::Bare(_) => None,
            Self::Shim(shim) => Some(shim),
        }
    }

    /// What containerd does before `Create`: the launcher, and a connection to what it names. With
    /// a bare runtime there is nothing to do.
    pub(crate) fn launch(
        &self,
        ground: &Ground,
        id: &str,
        bundle: Bundle,
    ) -> anyhow::Result<Container> {
        // A runtime's orphans are to be reaped at once, as a shim does: a container's init does not
        // end before its execs are reaped, and the machine's first process takes its time. Shims
        // are orphans, too, and not the bench's to reap. Only one subject is measured at a time.
        set_child_subreaper(self.shim().is_none())?;
        match self {
            Self::Bare(bare) => Ok(Container::Bare(bare.container(ground, id, bundle))),
            Self::Shim(shim) => Ok(Container::Shim(shim.launch(ground, id, bundle)?)),
        }
    }
}

impl Container {
    pub(crate) fn create(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Bare(bare) => bare.create(),
            Self::Shim(shim) => shim.create(|_| {}),
        }
        .context("create")
    }

    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Bare(bare) => bare.start(),
            Self::Shim(shim) => shim.start(),
        }
        .context("start")
    }

    /// Executes `true` in it, up to the deletion of the exec.
    pub(crate) fn exec(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Bare(bare) => bare.exec(),
            Self::Shim(shim) => shim.exec(),
        }
        .context("exec")
    }

    /// Kills it. A bare runtime is not asked: `kill(2)` takes its place.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Bare(bare) => bare.kill(),
            Self::Shim(shim) => shim.kill(),
        }
        .context("kill")
    }

    /// Waits to be told that it has ended.
    pub(crate) fn wait(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Bare(bare) => bare.wait(),
            Self::Shim(shim) => shim.wait(),
        }
        .context("wait")
    }

    pub(crate) fn delete(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Bare(bare) => bare.delete(),
            Self::Shim(shim) => shim.delete(),
        }
        .context("delete")
    }

    /// What containerd does after `Delete`: `Shutdown`, and the launcher.
    pub(crate) fn clean_up(self) -> anyhow::Result<Bundle> {
        match self {
            Self::Bare(bare) => Ok(bare.into_bundle()),
            Self::Shim(shim) => shim.clean_up(),
        }
        .context("clean-up")
    }

    /// The whole rest of a life that is not to be timed.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.kill()?;
        self.wait()?;
        self.delete()?;
        self.clean_up()?.remove()
    }

    /// The process that serves it, if there is one.
    pub(crate) fn shim_pid(&mut self) -> anyhow::Result<Option<u32>> {
        match self {
            Self::Bare(_) => Ok(None),
            Self::Shim(shim) => shim.shim_pid().map(Some),
        }
    }
}
