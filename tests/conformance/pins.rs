//! What is pinned below bpffs: its capacity, and where it must not be.

use std::sync::Arc;

use monitor_bpf::{BpfConfig, BpfMonitor};
use monitor_pidfd::PidfdMonitor;

use crate::backends::{Kind, Place};
use crate::subject::Family;
use crate::{Check, checks};

pub(crate) fn checks() -> [Check; 2] {
    checks!(|kind| kind == Kind::Bpf;
        another_capacity_takes_effect_when_nobody_is_watched,
        without_bpffs_the_error_says_how_to_mount_it,
    )
}

fn open(place: &Place, capacity: u32) -> BpfMonitor {
    let config = BpfConfig {
        pin_dir: place.pin_dir().to_owned(),
        capacity,
    };
    BpfMonitor::open(&config, Arc::new(PidfdMonitor::new().unwrap())).unwrap()
}

async fn another_capacity_takes_effect_when_nobody_is_watched(_: Kind) {
    use embedshim_core::exit::ExitMonitor;
    let place = Place::new();
    drop(open(&place, 16));
    let monitor = open(&place, 32);
    assert_eq!(monitor.capacity(), 32);
    let family = Family::of_one(&["exit", "0"]);
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    drop(monitor);
    let kept = open(&place, 64).capacity();
    assert_eq!(kept, 32, "a watched process must not be forgotten");
}

async fn without_bpffs_the_error_says_how_to_mount_it(_: Kind) {
    let directory = tempfile::tempdir().unwrap();
    let config = BpfConfig {
        pin_dir: directory.path().join("v1"),
        capacity: 16,
    };
    let readiness = Arc::new(PidfdMonitor::new().unwrap());
    let error = BpfMonitor::open(&config, readiness).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("mount -t bpf bpf /sys/fs/bpf"), "{text}");
    assert!(!config.pin_dir.exists());
}
