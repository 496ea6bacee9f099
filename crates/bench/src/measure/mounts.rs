//! Lives on a machine with many mounts, for which a shim pays that reads `/proc/self/mountinfo`.
//! They are in the bench's own mount namespace, so the machine does not have them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Bench;
use super::lives::live;

/// Beyond those that the machine has.
const STEPS: [usize; 4] = [0, 200, 500, 2000];

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let place = bench.ground.directory().join("mounts");
    fs::create_dir_all(&place)?;
    let mut mounted = Mounted(Vec::new());
    for step in STEPS {
        while mounted.0.len() < step {
            mounted.add(&place)?;
        }
        let at = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
        let at = u64::try_from(at).ok();
        for round in 0..bench.rounds(10, 3).min(20) {
            for subject in bench.in_turn(round) {
                let id = bench.id();
                let life = live(bench.ground, subject, &id, true)?;
                bench.time("mounts/life", at, subject.name(), life.total());
                if subject.shim().is_some() {
                    let clean_up = life.took("clean-up");
                    bench.time("mounts/clean-up", at, subject.name(), clean_up);
                }
            }
        }
    }
    Ok(())
}

/// Unmounts all when it is dropped.
struct Mounted(Vec<PathBuf>);

impl Mounted {
    fn add(&mut self, place: &Path) -> anyhow::Result<()> {
        let target = place.join(self.0.len().to_string());
        fs::create_dir(&target)?;
        let bind = MsFlags::MS_BIND;
        mount(Some(&target), &target, None::<&str>, bind, None::<&str>)
            .with_context(|| target.display().to_string())?;
        self.0.push(target);
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
}
