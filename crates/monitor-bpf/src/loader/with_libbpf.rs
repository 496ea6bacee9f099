//! libbpf's side of the loading.

use std::io;
use std::os::fd::AsFd;

use aya::maps::MapData;
use libbpf_rs::{MapCore, ObjectBuilder, OpenMapMut, OpenObject, PrintLevel, set_print};
use tracing::{debug, warn};

use super::{Link, LoadError, Loaded, Plan};
use crate::clocks::Offsets;
use crate::maps::GLOBALS;
use crate::object::{OBJECT, PROGRAMS, TRACEPOINT, own_pid_namespace};

pub(super) fn load(plan: &Plan<'_>) -> Result<Loaded, LoadError> {
    // libbpf has one voice for the whole program, and it is stderr unless it is told otherwise.
    set_print(Some((PrintLevel::Info, say)));
    let mut builder = ObjectBuilder::default();
    if let Some(btf) = plan.btf {
        builder.btf_custom_path(btf)?;
    }
    let mut object = builder.open_memory(OBJECT)?;
    let path = |name: &str| {
        let pins = plan.pins?;
        Some(if name == "tracked" {
            pins.tracked()
        } else {
            pins.exited()
        })
    };
    for name in ["tracked", "exited"] {
        let mut map = open_map(&mut object, name)?;
        map.set_max_entries(plan.capacity)?;
        if let Some(path) = path(name) {
            // Also takes what is pinned there.
            map.set_pin_path(path)?;
        }
    }
    set_globals(&mut object, plan)?;
    let object = object.load()?;
    let attach = |name: &&str| -> Result<Link, LoadError> {
        let program = object.progs_mut().find(|program| program.name() == *name);
        let program = program.ok_or_else(|| missing(name))?;
        Ok(Link::Libbpf(program.attach_raw_tracepoint(TRACEPOINT)?))
    };
    let links = PROGRAMS.iter().map(attach).collect::<Result<_, _>>()?;
    let map = |name: &str| -> Result<MapData, LoadError> {
        let map = object.maps().find(|map| map.name() == name);
        let map = map.ok_or_else(|| missing(name))?;
        Ok(MapData::from_fd(map.as_fd().try_clone_to_owned()?)?)
    };
    Ok(Loaded {
        tracked: map("tracked")?,
        exited: map("exited")?,
        links,
    })
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "libbpf-rs gives the line away"
)]
fn say(level: PrintLevel, line: String) {
    let line = line.trim_end();
    match level {
        PrintLevel::Warn => warn!("{line}"),
        PrintLevel::Info | PrintLevel::Debug => debug!("{line}"),
    }
}

fn open_map<'a>(object: &'a mut OpenObject, name: &str) -> Result<OpenMapMut<'a>, LoadError> {
    let map = object.maps_mut().find(|map| map.name() == name);
    map.ok_or_else(|| missing(name).into())
}

/// The constants of the program lie in the order of their declaration, as `maps::GLOBALS` has them.
fn set_globals(object: &mut OpenObject, plan: &Plan<'_>) -> Result<(), LoadError> {
    let mut globals = object
        .maps_mut()
        .find(|map| map.name().to_string_lossy().ends_with(".rodata"))
        .ok_or_else(|| missing(".rodata"))?;
    let bytes = globals
        .initial_value_mut()
        .ok_or_else(|| missing(".rodata"))?;
    let offsets = Offsets::own();
    let values = [
        u64::from(own_pid_namespace()),
        u64::from(plan.has_boot_clock),
        offsets.asleep(),
        offsets.boot(),
    ];
    for ((offset, size), value) in GLOBALS.into_iter().zip(values) {
        let value = value.to_ne_bytes();
        let value = if cfg!(target_endian = "little") {
            value.get(..size)
        } else {
            value.get(value.len() - size..)
        };
        let place = bytes.get_mut(offset..offset + size);
        place
            .zip(value)
            .ok_or_else(|| missing("a constant"))
            .map(|(place, value)| place.copy_from_slice(value))?;
    }
    Ok(())
}

fn missing(what: &str) -> io::Error {
    io::Error::other(format!("the object lacks {what}"))
}
