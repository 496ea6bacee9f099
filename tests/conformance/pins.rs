//! What is pinned below bpffs: its capacity, and where it must not be.

use std::sync::Arc;

use embedshim_core::exit::{Adopted, ExitMonitor};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;

use crate::backends::{Kind, Place, next};
use crate::subject::Family;
use crate::{Check, checks};

pub(crate) fn checks() -> Vec<Check> {
    let once = checks!(|kind| kind == Kind::Bpf;
        another_capacity_takes_effect_when_nobody_is_watched,
        without_bpffs_the_error_says_how_to_mount_it,
    );
    let each = checks!(|kind| kind.is_pinned() && kind != Kind::Bpf;
        another_version_is_replaced_without_a_gap,
        types_can_come_from_a_file,
    );
    once.into_iter().chain(each).collect()
}

fn open(place: &Place, capacity: u32) -> BpfMonitor {
    let config = BpfConfig {
        pin_dir: place.pin_dir().to_owned(),
        capacity,
        loading: Loading::default(),
    };
    BpfMonitor::open(&config, Arc::new(PidfdMonitor::new().unwrap())).unwrap()
}

async fn another_capacity_takes_effect_when_nobody_is_watched(_: Kind) {
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
        loading: Loading::default(),
    };
    let readiness = Arc::new(PidfdMonitor::new().unwrap());
    let error = BpfMonitor::open(&config, readiness).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("mount -t bpf bpf /sys/fs/bpf"), "{text}");
    assert!(!config.pin_dir.exists());
}

fn links(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.pin_dir()).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut links: Vec<String> = names.filter(|name| name.starts_with("link-")).collect();
    links.sort();
    links
}

/// What an older daemon has pinned is known by its name; the maps with their watches are kept.
async fn another_version_is_replaced_without_a_gap(kind: Kind) {
    let place = Place::new();
    let monitor = place.open(kind);
    let ours = links(&place);
    let mut family = Family::of_one(&["exit", "5"]);
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    drop(monitor);
    for (number, link) in ours.iter().enumerate() {
        let old = format!("link-0123456789abcdef-{number}");
        std::fs::rename(place.pin_dir().join(link), place.pin_dir().join(old)).unwrap();
    }
    let monitor = place.open(kind);
    assert_eq!(links(&place), ours);
    let adopted = monitor.adopt(vec![family.identity().into()]).await.unwrap();
    assert!(matches!(&adopted[0], Adopted::Armed(_)), "{adopted:?}");
    let verdict = family.end(None);
    let record = next(&monitor, 1).await.remove(0);
    verdict.check(&record, monitor.guarantees(), "after the replacement");
}

/// A kernel that does not describe its types is helped by a file that does.
async fn types_can_come_from_a_file(kind: Kind) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vmlinux.btf");
    std::fs::copy("/sys/kernel/btf/vmlinux", &file).unwrap();
    let place = Place::new();
    let readiness = || Arc::new(PidfdMonitor::new().unwrap());
    let mut config = BpfConfig {
        pin_dir: place.pin_dir().to_owned(),
        capacity: 16,
        loading: kind.loading(),
    };
    config.loading.btf = Some(file.clone());
    let monitor = BpfMonitor::open(&config, readiness()).unwrap();
    let mut family = Family::of_one(&["exit", "6"]);
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    family.let_go();
    let mut records = Vec::new();
    monitor.next_exits(&mut records).await.unwrap();
    assert_eq!(records[0].status, family.verdicts()[0]);
    drop(monitor);
    drop(place);
    // Another place, or what is pinned would be taken over as it is.
    let place = Place::new();
    place.pin_dir().clone_into(&mut config.pin_dir);
    std::fs::write(&file, "no BTF").unwrap();
    assert!(BpfMonitor::open(&config, readiness()).is_err());
}
