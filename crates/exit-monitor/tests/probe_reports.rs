//! What `embedshimd probe` says on kernels that are not here: feature sets that were recorded there
//! (`probe --json` of the guests of `cargo xtask test-matrix`, and of this machine without bpffs or
//! without rights), ranked and printed by the code of today.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;

use exit_monitor::{Availability, Backend, Durability, Policy, Report};

fn recorded(name: &str) -> Vec<Availability> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/probes");
    let text = fs::read_to_string(directory.join(format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn every_recorded_kernel_is_told_what_it_can_do() {
    let expected = [
        ("linux_5_10", Backend::Bpf, Durability::Always),
        ("linux_6_12", Backend::Bpf, Durability::Always),
        ("linux_7_3", Backend::Bpf, Durability::Always),
        (
            "linux_6_18_without_bpffs",
            Backend::Bpf,
            Durability::WhileDaemonRuns,
        ),
        (
            "linux_6_18_unprivileged",
            Backend::Pidfd,
            Durability::WhileDaemonRuns,
        ),
    ];
    for (name, backend, promise) in expected {
        let report = Report::new(recorded(name), Policy::Auto);
        insta::assert_snapshot!(name, report);
        let choice = report.choice().unwrap();
        assert_eq!(
            (choice.backend, report.durability),
            (backend, promise),
            "{name}"
        );
    }
}

#[test]
fn what_is_asked_for_and_cannot_run_is_refused_in_words() {
    let report = Report::new(
        recorded("linux_6_18_unprivileged"),
        Policy::Only(Backend::Bpf),
    );
    insta::assert_snapshot!("forced", report);
    assert_eq!(report.durability, Durability::Unsupported);
    let refusal = report.choice().unwrap_err().to_string();
    assert!(refusal.contains("no permission for BPF"), "{refusal}");
}
