//! aya's side of the loading.

use std::io;

use aya::maps::{Map, MapData};
use aya::programs::RawTracePoint;
use aya::{Btf, Ebpf, EbpfLoader};

use super::{Link, LoadError, Loaded, Plan};
use crate::clocks::Offsets;
use crate::object::{OBJECT, PROGRAMS, TRACEPOINT, own_pid_namespace};

pub(super) fn load(plan: &Plan<'_>) -> Result<Loaded, LoadError> {
    let (namespace, has_boot_clock) = (own_pid_namespace(), u32::from(plan.has_boot_clock));
    let offsets = Offsets::own();
    let (asleep, boot_offset) = (offsets.asleep(), offsets.boot());
    let btf = plan
        .btf
        .map(|path| Btf::parse_file(path, aya::Endianness::default()))
        .transpose()?;
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries("tracked", plan.capacity)
        .map_max_entries("exited", plan.capacity)
        .override_global("pid_namespace", &namespace, true)
        .override_global("has_boot_clock", &has_boot_clock, true)
        .override_global("asleep_ns", &asleep, true)
        .override_global("boot_offset_ns", &boot_offset, true);
    if btf.is_some() {
        loader.btf(btf.as_ref());
    }
    if let Some(pins) = plan.pins {
        loader
            .map_pin_path("tracked", pins.tracked())
            .map_pin_path("exited", pins.exited());
    }
    let mut object = loader.load(OBJECT)?;
    let links = PROGRAMS.iter().map(|name| attach(&mut object, name));
    let links = links.collect::<Result<_, _>>()?;
    Ok(Loaded {
        tracked: take_map(&mut object, "tracked")?,
        exited: take_map(&mut object, "exited")?,
        links,
    })
}

fn attach(object: &mut Ebpf, name: &str) -> Result<Link, LoadError> {
    let program: &mut RawTracePoint = object
        .program_mut(name)
        .ok_or_else(|| missing(name))?
        .try_into()?;
    program.load()?;
    let link = program.attach(TRACEPOINT)?;
    Ok(Link::Aya(program.take_link(link)?.into()))
}

fn take_map(object: &mut Ebpf, name: &str) -> Result<MapData, LoadError> {
    match object.take_map(name) {
        Some(Map::HashMap(data)) => Ok(data),
        _ => Err(missing(name).into()),
    }
}

fn missing(what: &str) -> io::Error {
    io::Error::other(format!("the object lacks {what}"))
}
