//! [`Condition`]: what a node's administrator, or its distribution, makes of a kernel before the
//! daemon runs. Owns how a guest gets it and how it proves that it has it.

use clap::ValueEnum;

/// What is different in a guest beside its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Condition {
    /// Nothing: cgroup v2 only, as all guests have but for `cgroup1`
    Plain,
    /// The kernel is locked down for its integrity, as it is where Secure Boot is on
    Lockdown,
    /// Users without rights may not use bpf(2), and nothing short of a reboot changes that
    UnprivilegedBpfDisabled,
    /// 64 kB of memory may be locked, and before Linux 5.11 BPF maps count
    LowMemlock,
    /// cgroup v1 only
    Cgroup1,
}

/// Beside the plain kernels: where each condition means most.
pub(super) const OF_SERIES: [(&str, Condition); 5] = [
    ("5.10", Condition::LowMemlock),
    ("5.10", Condition::Cgroup1),
    ("6.1", Condition::UnprivilegedBpfDisabled),
    ("6.12", Condition::Lockdown),
    ("newest", Condition::Lockdown),
];

impl Condition {
    /// The name of a guest with this kernel.
    pub(super) fn of(self, kernel: &str) -> String {
        match self {
            Self::Plain => kernel.to_owned(),
            Self::Lockdown => format!("{kernel}, lockdown=integrity"),
            Self::UnprivilegedBpfDisabled => format!("{kernel}, unprivileged_bpf_disabled=2"),
            Self::LowMemlock => format!("{kernel}, memlock 64 kB"),
            Self::Cgroup1 => format!("{kernel}, cgroup v1"),
        }
    }

    /// What the kernel is told. The guest's init reads the name.
    pub(super) fn arguments(self) -> &'static str {
        match self {
            Self::Plain => "embedshim.condition=plain",
            Self::Lockdown => "embedshim.condition=lockdown lockdown=integrity",
            Self::UnprivilegedBpfDisabled => {
                "embedshim.condition=bpf sysctl.kernel.unprivileged_bpf_disabled=2"
            }
            Self::LowMemlock => "embedshim.condition=memlock",
            Self::Cgroup1 => "embedshim.condition=cgroup1",
        }
    }
}

/// The part of the guest's init that makes the condition and shows it. Needs procfs and sysfs; what
/// it prints is read by `report`.
pub(super) const MAKE: &str = "
condition=$(sed -n 's/.*embedshim.condition=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
case $condition in
  cgroup1)
    mount -t tmpfs cgroup /sys/fs/cgroup
    sed -n 's/^\\([a-z_]*\\)\\t.*\\t1$/\\1/p' /proc/cgroups | while read each; do
      mkdir /sys/fs/cgroup/$each
      mount -t cgroup -o $each cgroup /sys/fs/cgroup/$each || rmdir /sys/fs/cgroup/$each
    done ;;
  *) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
esac
made=FAILED
case $condition in
  lockdown)
    mount -t securityfs security /sys/kernel/security
    case $(cat /sys/kernel/security/lockdown) in *'[integrity]'*) made=ok ;; esac ;;
  bpf) case $(cat /proc/sys/kernel/unprivileged_bpf_disabled) in 2) made=ok ;; esac ;;
  memlock)
    ulimit -l 64
    case $(ulimit -H -l) in 64) made=ok ;; esac ;;
  cgroup1) test -d /sys/fs/cgroup/freezer && test -d /sys/fs/cgroup/memory && made=ok ;;
  plain) test -e /sys/fs/cgroup/cgroup.controllers && made=ok ;;
esac
echo \"test guest::has_its_condition ... $made\"
";
