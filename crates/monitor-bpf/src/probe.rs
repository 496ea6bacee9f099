//! What this machine allows of BPF, found out by loading, attaching, recording an exit and pinning
//! for real, and taking it all back.

use std::error::Error;
use std::path::Path;

use exit_monitor::{Availability, Backend, Exactness, Feature, Guarantees, Survives};

use crate::monitor::BpfConfig;
use crate::pins::Pins;
use crate::program::{Loading, OWN_BTF, OpenError, Program};

const MOUNT: &str = "mount -t bpf bpf /sys/fs/bpf";

type Tried = Result<(), (String, Option<String>)>;

/// Tries everything this backend needs. The directory for the pins is not made. `readiness` is what
/// the wrapped monitor survives: where nothing can be pinned, that is all.
pub fn probe(wanted: &BpfConfig, readiness: Survives) -> Availability {
    let how = &wanted.loading;
    let program = Program::open_unpinned(wanted.capacity, how);
    let types = how.btf.as_deref().unwrap_or(Path::new(OWN_BTF));
    let btf: Tried = if types.exists() {
        Ok(())
    } else {
        Err((format!("{} is missing", types.display()), None))
    };
    let clock: Tried = if is_without_boot_clock(&program, how) {
        let why = "exit times ignore what the machine sleeps from now on".to_owned();
        Err((why, Some("run Linux 5.8 or newer".to_owned())))
    } else {
        Ok(())
    };
    let not_tried = || Err(("not tried: the program cannot be loaded".into(), None));
    let (attached, recorded): (Tried, Tried) = match &program {
        Ok(_) => (Ok(()), Ok(())),
        Err(error @ OpenError::RecordsNothing(_)) => (Ok(()), Err((chain(error), None))),
        Err(error) => (Err((chain(error), remedy(error))), not_tried()),
    };
    let pinned: Tried = match program {
        Ok(program) => try_pinning(program, &wanted.pin_dir),
        Err(OpenError::RecordsNothing(_)) => Err(("not tried: it would be of no use".into(), None)),
        Err(_) => not_tried(),
    };
    let survives = if pinned.is_ok() {
        Survives::Everything
    } else {
        readiness
    };
    let verdict = match (&attached, &recorded) {
        (Err((why, _)), _) | (_, Err((why, _))) => Err(why.clone()),
        (Ok(()), Ok(())) => Ok(Guarantees {
            survives,
            others: Exactness::Always,
            exact_time: true,
        }),
    };
    let remedies = [&attached, &pinned]
        .into_iter()
        .filter_map(|tried| tried.as_ref().err()?.1.clone())
        .collect();
    let room: Tried = match &attached {
        Ok(()) => Ok(()),
        Err(_) => not_tried(),
    };
    let purpose = format!("room for {} watched processes", wanted.capacity);
    let features = vec![
        Feature::tried("BTF", "5.2", "to find the fields of kernel structures", btf),
        Feature::tried("raw tracepoint", "4.17", "to see every exit", attached),
        Feature::tried("hash maps", "4.6", &purpose, room),
        Feature::tried("bpf_ktime_get_boot_ns", "5.8", "the time of an exit", clock),
        Feature::tried(
            "record of an exit",
            "5.2",
            "to know how a process ended",
            recorded,
        ),
        Feature::tried(
            "pinned link",
            "5.7",
            "to record while no daemon runs",
            pinned,
        ),
    ];
    Availability {
        backend: Backend::Bpf,
        features,
        verdict,
        remedies,
    }
}

/// Pins a map where the daemon's directory would be, or in its nearest parent, and removes it
/// again.
fn try_pinning(program: Program, pin_dir: &Path) -> Tried {
    let pins = Pins::new(pin_dir);
    pins.on_bpffs().map_err(|path| {
        (
            format!("{} is not a bpffs", path.display()),
            Some(MOUNT.to_owned()),
        )
    })?;
    let parent = pin_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(pin_dir);
    let path = parent.join(format!("embedshim-probe-{}", std::process::id()));
    let pinned = program.try_pinning(&path).map_err(|error| {
        let why = format!("cannot pin at {}: {}", path.display(), chain(&*error));
        (why, None)
    });
    let _ = std::fs::remove_file(&path);
    pinned
}

/// The program is loaded, but would not be with the boot clock.
fn is_without_boot_clock(program: &Result<Program, OpenError>, how: &Loading) -> bool {
    program
        .as_ref()
        .is_ok_and(|program| !program.has_boot_clock)
        && !how.without_boot_clock
}

fn remedy(error: &OpenError) -> Option<String> {
    match error {
        OpenError::Denied(_) => Some("run as root, or grant CAP_BPF and CAP_PERFMON".to_owned()),
        OpenError::NoBtf => Some(
            "run a kernel built with CONFIG_DEBUG_INFO_BTF, or set monitor.btf to a file with its types"
                .to_owned(),
        ),
        _ => None,
    }
}

/// The error with its causes.
fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
