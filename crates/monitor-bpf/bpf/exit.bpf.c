// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * Records how tracked processes end: the wait status that their parent's waitpid() gets, and when.
 *
 * sched_process_exit fires once per thread, in do_exit(), after signal->live was decremented. The process is over when
 * live is 0, and its status is then the group's if the group was told to exit (exit_group, a deadly signal),
 * else what the thread-group leader passed to exit() - whichever thread ends last, also if the
 * leader went first. A reboot of its pid namespace comes before both: see rebooted_by().
 *
 * Before 6.16 two threads can both decrement before either gets here, so two events can see live == 0, the first perhaps too
 * early for the leader's exit_code: so the last write wins, and nothing is deleted here. User space takes the
 * record only when the pidfd says that the process is dead, which is later than any of these events.
 *
 * The kernel does not run a program on a processor where the same program is under way already. Since 7.0 tracepoints can be
 * preempted (srcu_fast), so that is no longer impossible: a task preempted in here would cost the exits of all others on that
 * processor, and it did (measured on 7.3: recursion_misses of 1 exit in 8 under emulation). So there are several copies, attached
 * one after the other; an exit is missed only if a task is preempted in each of them at the same time.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

/* nsec_to_clock_t() of field 22 in /proc/PID/stat: USER_HZ is 100 on every architecture we build for. */
#define NS_PER_TICK 10000000

/* What user space finds; crates/monitor-bpf/src/maps.rs reads it as three u64. */
struct exit_record {
	__u64 start_ticks;
	__u64 at_boot_ns;
	__u64 wait_status;
};

/*
 * Written by user space only: start time of each watched process, by its number in the daemon's pid namespace. Preallocated,
 * although nothing is allocated in the tracepoint: before 6.1 the kernel warns (WARN_ONCE, so it may panic) when it loads a tracing
 * program with any other hash map.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, __u64);
} tracked SEC(".maps");

/* Preallocated: an allocation here could fail just when the OOM killer is at work. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct exit_record);
} exited SEC(".maps");

/* The daemon's pid namespace; 0 for the initial one. Set before loading, as is the rest. */
const volatile __u32 pid_namespace = 0;
/* Before 5.8 there is no bpf_ktime_get_boot_ns(): then the verifier finds its call unreachable. */
const volatile __u32 has_boot_clock = 1;
/* And time asleep until the loading, in nanoseconds, is added to the monotonic clock. */
const volatile __u64 asleep_ns = 0;
/* The daemon's boot clock is ahead of the kernel's, in its time namespace; may wrap around. */
const volatile __u64 boot_offset_ns = 0;

/* The process's number as the daemon knows it; 0 if it is in none of the daemon's namespaces. */
static __always_inline __u32 number_of(struct task_struct *task, struct signal_struct *signal)
{
	struct pid *pid;
	void *upid;
	__u32 level, i;

	if (!pid_namespace)
		return BPF_CORE_READ(task, tgid);

	pid = BPF_CORE_READ(signal, pids[PIDTYPE_TGID]);
	level = BPF_CORE_READ(pid, level);
	upid = (void *)pid + bpf_core_field_offset(struct pid, numbers);
	for (i = 0; i <= MAX_LEVEL; i++) {
		if (i > level)
			break;
		struct upid *at = upid;

		if (BPF_CORE_READ(at, ns, ns.inum) == pid_namespace)
			return BPF_CORE_READ(at, nr);
		upid += bpf_core_type_size(struct upid);
	}
	return 0;
}

/* On the kernel's boot clock. */
static __always_inline __u64 start_time(struct task_struct *leader)
{
	struct task_struct___before_5_5 *older = (void *)leader;

	if (bpf_core_field_exists(leader->start_boottime))
		return BPF_CORE_READ(leader, start_boottime);
	return BPF_CORE_READ(older, real_start_time);
}

/*
 * reboot(2) within a pid namespace kills its first process and notes the signal that is to stand for
 * the command: SIGHUP for a restart, SIGINT for a halt. zap_pid_ns_processes() makes it the group's
 * code, later in do_exit(), when the rest of the namespace is dead. A reboot() that another process
 * calls in between, while the first one is ending by itself, is not seen here.
 * 0 if there was none, or if this process is not the first of its namespace.
 */
static __always_inline int rebooted_by(struct signal_struct *signal)
{
	struct pid *pid = BPF_CORE_READ(signal, pids[PIDTYPE_TGID]);
	struct upid *innermost = (void *)pid + bpf_core_field_offset(struct pid, numbers) +
				 BPF_CORE_READ(pid, level) * bpf_core_type_size(struct upid);

	if (BPF_CORE_READ(innermost, nr) != 1 || !bpf_core_field_exists(struct pid_namespace, reboot))
		return 0;
	return BPF_CORE_READ(innermost, ns, reboot);
}

static __always_inline int record_once(struct task_struct *task)
{
	struct signal_struct *signal = BPF_CORE_READ(task, signal);
	struct exit_record record = {};
	struct task_struct *leader;
	__u64 *start_ticks;
	__u32 number;

	if (BPF_CORE_READ(signal, live.counter) != 0)
		return 0;
	number = number_of(task, signal);
	start_ticks = bpf_map_lookup_elem(&tracked, &number);
	if (!start_ticks)
		return 0;
	/* An execve() by another thread makes that thread the leader, with the old leader's start time. */
	leader = BPF_CORE_READ(task, group_leader);
	/* As timens_add_boottime_ns() does before the kernel prints field 22. */
	record.start_ticks = (start_time(leader) + boot_offset_ns) / NS_PER_TICK;
	if (record.start_ticks != *start_ticks)
		return 0; /* another process with a tracked number that is free again */
	if (has_boot_clock)
		record.at_boot_ns = bpf_ktime_get_boot_ns();
	else
		record.at_boot_ns = bpf_ktime_get_ns() + asleep_ns;
	record.at_boot_ns += boot_offset_ns;
	if (BPF_CORE_READ(signal, flags) & SIGNAL_GROUP_EXIT) {
		/* As in wait_task_zombie(): without that flag the group's code does not count. */
		record.wait_status = (__u32)rebooted_by(signal);
		if (!record.wait_status)
			record.wait_status = (__u32)BPF_CORE_READ(signal, group_exit_code);
	} else {
		record.wait_status = (__u32)BPF_CORE_READ(leader, exit_code);
	}
	bpf_map_update_elem(&exited, &number, &record, BPF_ANY);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int record_exit(__u64 *args)
{
	return record_once((struct task_struct *)args[0]);
}

SEC("raw_tp/sched_process_exit")
int record_exit_2(__u64 *args)
{
	return record_once((struct task_struct *)args[0]);
}

SEC("raw_tp/sched_process_exit")
int record_exit_3(__u64 *args)
{
	return record_once((struct task_struct *)args[0]);
}

/* bpf_probe_read_kernel() and bpf_ktime_get_boot_ns() are for GPL-compatible programs only. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";
