//! What containerd was told by events of the containers that ended: each exit, with the code that
//! `Wait` told, and in order. An event may come more than once, since who died after sending it
//! cannot have noted that it arrived.

use std::collections::BTreeMap;

use anyhow::ensure;
use embedshim_tests::Heard;
use testbed::sandbox::until;

use crate::ground::Ground;
use crate::ledger::Process;

/// The order of the first of each kind in a container's life.
const ORDER: [&str; 4] = ["create", "start", "exit", "delete"];

/// Waits until all exits are told, and compares.
pub(crate) fn check(ground: &Ground) -> anyhow::Result<()> {
    let ends = ground.ledger.ends();
    let mut missing = Vec::new();
    let told = until("all exits are told by events", || {
        let told = exits(&ground.listener.heard());
        missing = ends
            .keys()
            .filter(|process| !told.contains_key(*process))
            .cloned()
            .collect();
        Ok(missing.is_empty())
    });
    ensure!(
        told.is_ok(),
        "{} of {} exits are told by no event: {:?} ...",
        missing.len(),
        ends.len(),
        missing.iter().take(5).collect::<Vec<_>>()
    );
    let heard = ground.listener.heard();
    for (process, codes) in exits(&heard) {
        let (container, exec) = &process;
        let name = format!("{container} {}", exec.as_deref().unwrap_or_default());
        for code in codes {
            if let Some(due) = ends.get(&process) {
                ground.ledger.code(&name, "an event", code, due);
            }
        }
    }
    for (container, exec) in ends.keys() {
        if exec.is_none() {
            check_order(container, &heard)?;
        }
    }
    Ok(())
}

fn exits(heard: &[Heard]) -> BTreeMap<Process, Vec<u32>> {
    let mut exits: BTreeMap<Process, Vec<u32>> = BTreeMap::new();
    for event in heard.iter().filter(|event| event.topic == "exit") {
        let process = (event.container.clone(), event.exec.clone());
        exits.entry(process).or_default().extend(event.code);
    }
    exits
}

fn check_order(container: &str, heard: &[Heard]) -> anyhow::Result<()> {
    let first = |topic| {
        heard.iter().position(|event| {
            event.container == container && event.exec.is_none() && event.topic == topic
        })
    };
    let places = ORDER.map(first);
    ensure!(
        places.is_sorted() && places.iter().all(Option::is_some),
        "{container}: events are missing or out of order: {places:?} of {ORDER:?}"
    );
    Ok(())
}
