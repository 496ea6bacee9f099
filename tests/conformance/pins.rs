//! What is pinned below bpffs: its capacity, and where it must not be.

use std::path::PathBuf;
use std::sync::Arc;

use exit_conformance::libtest_mimic::Trial;
use exit_conformance::{Family, Place, Subject, block_on, next, trial};
use exit_monitor::{Adopted, ExitMonitor};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;

use crate::backends::Kind;

/// Lists checks by their functions, which have a name that says what must hold.
macro_rules! checks {
    ($kinds:expr; $($name:ident),+ $(,)?) => {
        $kinds.flat_map(|kind| [$({
            let subject: Arc<dyn Subject> = Arc::new(kind);
            let its = Arc::clone(&subject);
            trial(&subject, stringify!($name), move || block_on($name(kind, &its)))
        }),+])
    };
}

pub(crate) fn trials() -> Vec<Trial> {
    let once = checks!(Kind::all_that(|kind| kind == Kind::Bpf);
        another_capacity_takes_effect_when_nobody_is_watched,
        without_bpffs_the_error_says_how_to_mount_it,
    );
    let each = checks!(Kind::all_that(|kind| kind.is_pinned() && kind != Kind::Bpf);
        another_version_is_replaced_without_a_gap,
        types_can_come_from_a_file,
    );
    once.chain(each).collect()
}

fn pin_dir(place: &Place) -> PathBuf {
    monitor_bpf::pin_dir_for(place.directory())
}

fn open(place: &Place, capacity: u32) -> BpfMonitor {
    let config = BpfConfig {
        pin_dir: pin_dir(place),
        capacity,
        loading: Loading::default(),
    };
    BpfMonitor::open(&config, Arc::new(PidfdMonitor::new().unwrap())).unwrap()
}

async fn another_capacity_takes_effect_when_nobody_is_watched(_: Kind, subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    drop(open(&place, 16));
    let monitor = open(&place, 32);
    assert_eq!(monitor.capacity(), 32);
    let family = Family::of_one(&["exit", "0"]);
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    drop(monitor);
    let kept = open(&place, 64).capacity();
    assert_eq!(kept, 32, "a watched process must not be forgotten");
}

async fn without_bpffs_the_error_says_how_to_mount_it(_: Kind, _: &Arc<dyn Subject>) {
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
    let entries = std::fs::read_dir(pin_dir(place)).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut links: Vec<String> = names.filter(|name| name.starts_with("link-")).collect();
    links.sort();
    links
}

/// What an older daemon has pinned is known by its name; the maps with their watches are kept.
async fn another_version_is_replaced_without_a_gap(_: Kind, subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let ours = links(&place);
    let mut family = Family::of_one(&["exit", "5"]);
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    drop(monitor);
    for (number, link) in ours.iter().enumerate() {
        let old = format!("link-0123456789abcdef-{number}");
        std::fs::rename(pin_dir(&place).join(link), pin_dir(&place).join(old)).unwrap();
    }
    let monitor = place.open();
    assert_eq!(links(&place), ours);
    let adopted = monitor.adopt(vec![family.identity().into()]).await.unwrap();
    assert!(matches!(&adopted[0], Adopted::Armed(_)), "{adopted:?}");
    let verdict = family.end(None);
    let record = next(&monitor, 1).await.remove(0);
    verdict.check(&record, monitor.guarantees(), "after the replacement");
}

/// A kernel that does not describe its types is helped by a file that does.
async fn types_can_come_from_a_file(kind: Kind, subject: &Arc<dyn Subject>) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vmlinux.btf");
    std::fs::copy("/sys/kernel/btf/vmlinux", &file).unwrap();
    let place = Place::new(subject);
    let readiness = || Arc::new(PidfdMonitor::new().unwrap());
    let mut config = BpfConfig {
        pin_dir: pin_dir(&place),
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
    let place = Place::new(subject);
    config.pin_dir = pin_dir(&place);
    std::fs::write(&file, "no BTF").unwrap();
    assert!(BpfMonitor::open(&config, readiness()).is_err());
}
