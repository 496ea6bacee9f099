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
#include "exit.h"

/* crates/monitor-bpf/src/maps.rs reads a struct exit_record as three u64. */

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
	record.start_ticks = START_TICKS(leader);
	if (record.start_ticks != *start_ticks)
		return 0; /* another process with a tracked number that is free again */
	NOTE_EXIT(record, signal, leader);
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
