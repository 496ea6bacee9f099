//! Old kernels, and containers that forbid things, on this machine: a seccomp filter answers system
//! calls as they would, and the suite runs behind it, so each fallback runs wherever the tests do.
//! Also a pid namespace and a time namespace, in which the kernel's pids and times differ from
//! those of the tests.

use std::collections::BTreeMap;
use std::process::Command;

use exit_conformance::libtest_mimic::{Failed, Trial};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Names the emulation that a process is to run behind.
const VARIABLE: &str = "EMBEDSHIM_TEST_KERNEL";
/// Tells the suite that no tracer can be started.
const NO_PTRACE: (&str, &str) = ("EXIT_CONFORMANCE_NO_PTRACE", "1");
const PIDFD_GET_INFO: u64 = 0xC040_FF0B;

/// A kernel, or a container, that lacks something.
struct Emulation {
    name: &'static str,
    /// Calls that are refused, with what they answer: of one argument's value, or of any.
    refused: &'static [Refused],
    /// Which backends must pass behind it.
    passes: &'static [&'static str],
    /// Which backends must know that they cannot run.
    skips: &'static [&'static str],
}

impl Emulation {
    fn forbids_ptrace(&self) -> bool {
        let mut refused = self.refused.iter();
        refused.any(|refused| refused.call == libc::SYS_ptrace)
    }

    /// What starts the program that runs behind it.
    fn starter(&self) -> &'static [&'static str] {
        match self.name {
            NESTED => &["unshare", "--pid", "--fork", "--mount-proc"],
            OTHER_TIME | OLD_OTHER_TIME => &[
                "/usr/bin/unshare",
                "--time",
                "--boottime",
                "1000",
                "--monotonic",
                "70",
                "--fork",
            ],
            _ => &["env"],
        }
    }
}

/// Lacks nothing, but numbers its processes itself.
const NESTED: &str = "nested_pid_namespace";
/// Nor does this lack anything, but its clocks are ahead of the kernel's, by two different times.
const OTHER_TIME: &str = "time_namespace";

/// The same before Linux 5.11, where the start times in `/proc` are the kernel's: they cannot be
/// compared with clocks, and BPF has to know that it records nothing.
const OLD_OTHER_TIME: &str = "time_namespace_before_5_11";

struct Refused {
    call: libc::c_long,
    errno: i32,
    argument: Option<(u8, u64)>,
}

const fn any(call: libc::c_long, errno: i32) -> Refused {
    Refused {
        call,
        errno,
        argument: None,
    }
}

const fn with(call: libc::c_long, errno: i32, index: u8, value: u64) -> Refused {
    Refused {
        call,
        errno,
        argument: Some((index, value)),
    }
}

const NO_EXIT_INFO: Refused = with(libc::SYS_ioctl, libc::ENOTTY, 1, PIDFD_GET_INFO);
const NO_WAIT_BY_PIDFD: Refused = with(libc::SYS_waitid, libc::EINVAL, 0, libc::P_PIDFD as u64);
const BPF_OBJ_PIN: u64 = 6;

const EMULATIONS: [Emulation; 9] = [
    Emulation {
        name: "linux_6_14",
        refused: &[NO_EXIT_INFO],
        passes: &["pidfd", "bpf-alone", "ptrace"],
        skips: &[],
    },
    Emulation {
        name: "linux_5_3",
        refused: &[NO_EXIT_INFO, NO_WAIT_BY_PIDFD],
        passes: &["pidfd", "bpf-alone", "ptrace"],
        skips: &[],
    },
    Emulation {
        name: "linux_5_2",
        refused: &[
            NO_EXIT_INFO,
            NO_WAIT_BY_PIDFD,
            any(libc::SYS_pidfd_open, libc::ENOSYS),
            any(libc::SYS_pidfd_send_signal, libc::ENOSYS),
        ],
        passes: &["pidfd", "bpf-alone", "ptrace"],
        skips: &[],
    },
    Emulation {
        name: "no_bpf",
        refused: &[any(libc::SYS_bpf, libc::EPERM), NO_EXIT_INFO],
        passes: &["pidfd", "ptrace"],
        skips: &["bpf", "bpf-alone", "bpf-unpinned"],
    },
    Emulation {
        name: "no_pins",
        refused: &[with(libc::SYS_bpf, libc::EPERM, 0, BPF_OBJ_PIN)],
        passes: &["bpf-unpinned"],
        skips: &["bpf", "bpf-alone"],
    },
    Emulation {
        name: "no_ptrace",
        refused: &[any(libc::SYS_ptrace, libc::EPERM)],
        passes: &["pidfd"],
        skips: &["ptrace"],
    },
    Emulation {
        name: NESTED,
        refused: &[],
        passes: &["pidfd", "bpf-alone", "ptrace"],
        skips: &[],
    },
    Emulation {
        name: OTHER_TIME,
        refused: &[],
        passes: &["pidfd", "bpf-alone", "bpf-old-clock", "ptrace"],
        skips: &[],
    },
    Emulation {
        name: OLD_OTHER_TIME,
        refused: &[],
        passes: &["pidfd", "ptrace"],
        skips: &["bpf-alone", "bpf-old-clock"],
    },
];

/// One trial for each emulation, which runs this very program behind it.
pub(crate) fn trials() -> Vec<Trial> {
    if is_old() {
        return Vec::new();
    }
    // In a guest the kernel is a real one.
    let is_guest = std::env::var_os("EXIT_CONFORMANCE_SLOW").is_some();
    let of_namespaces = [NESTED, OTHER_TIME, OLD_OTHER_TIME];
    let elsewhere = if has_start_times_of_the_namespace() {
        OLD_OTHER_TIME
    } else {
        OTHER_TIME
    };
    EMULATIONS
        .iter()
        .filter(|emulation| !is_guest || of_namespaces.contains(&emulation.name))
        .filter(|emulation| emulation.name != elsewhere)
        .map(|emulation| {
            let name = format!("{}::the_suite_passes", emulation.name);
            Trial::test(name, move || emulation.run())
        })
        .collect()
}

/// Since Linux 5.11.
fn has_start_times_of_the_namespace() -> bool {
    let release = nix::sys::utsname::uname().unwrap();
    let release = release.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(5), Some(11))
}

/// Whether this process runs behind a filter.
pub(crate) fn is_old() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// If this process was started to be old, it is from here on.
pub(crate) fn become_old() {
    let Ok(name) = std::env::var(VARIABLE) else {
        return;
    };
    let emulation = EMULATIONS.iter().find(|emulation| emulation.name == name);
    emulation.expect("an emulation of that name").apply();
}

impl Emulation {
    fn run(&self) -> Result<(), Failed> {
        let program = std::env::current_exe()?;
        let (starter, arguments) = self.starter().split_first().ok_or("no starter")?;
        for backend in self.passes.iter().chain(self.skips) {
            let output = Command::new(starter)
                .args(arguments)
                .arg(&program)
                .arg(format!("{backend}::"))
                // Its heaviest checks are the same behind a filter.
                .args(["--skip", "thousands", "--skip", "all_threads"])
                .env(VARIABLE, self.name)
                .envs(self.forbids_ptrace().then_some(NO_PTRACE))
                .output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let count = |what: &str| {
                let line = text.lines().find(|line| line.starts_with("test result"));
                let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
                let place = words
                    .iter()
                    .position(|word| word.trim_end_matches(';') == what);
                place.and_then(|place| words[place - 1].parse::<u32>().ok())
            };
            let is_skipped = self.skips.contains(backend);
            let has_run = count("passed").is_some_and(|passed| passed > 0);
            if !output.status.success() || has_run == is_skipped {
                return Err(Failed::from(format!("{backend}: {text}")));
            }
        }
        Ok(())
    }

    fn apply(&self) {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let errnos: Vec<i32> = self.refused.iter().map(|refused| refused.errno).collect();
        // A filter has one answer; several answers are several filters.
        for errno in [libc::ENOSYS, libc::ENOTTY, libc::EINVAL, libc::EPERM] {
            if !errnos.contains(&errno) {
                continue;
            }
            rules.clear();
            for refused in self.refused.iter().filter(|refused| refused.errno == errno) {
                let rules = rules.entry(refused.call).or_default();
                if let Some((index, value)) = refused.argument {
                    let is = SeccompCondition::new(
                        index,
                        SeccompCmpArgLen::Dword,
                        SeccompCmpOp::Eq,
                        value,
                    );
                    rules.push(SeccompRule::new(vec![is.unwrap()]).unwrap());
                }
            }
            let filter = SeccompFilter::new(
                rules.clone(),
                SeccompAction::Allow,
                SeccompAction::Errno(errno.unsigned_abs()),
                std::env::consts::ARCH.try_into().unwrap(),
            );
            let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
            seccompiler::apply_filter(&program).unwrap();
        }
    }
}
