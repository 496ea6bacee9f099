/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * What is read of a process when its last thread exits: its number, its start, its wait status. Shared by exit.bpf.c and all.bpf.c.
 */
#pragma once

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

/* nsec_to_clock_t() of field 22 in /proc/PID/stat: USER_HZ is 100 on every architecture we build for. */
#define NS_PER_TICK 10000000

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

/* What user space finds of an exit. */
struct exit_record {
	__u64 start_ticks;
	__u64 at_boot_ns;
	__u64 wait_status;
};

/* As timens_add_boottime_ns() does before the kernel prints field 22. */
#define START_TICKS(leader) ((start_time(leader) + boot_offset_ns) / NS_PER_TICK)

/*
 * Notes in a record what the parent's waitpid() gets, and when that is, of a process whose last thread exits. A macro, so that the
 * program of exit.bpf.c is the one that every kernel was tested with, whatever else uses this.
 */
#define NOTE_EXIT(record, signal, leader)                                                                 \
	do {                                                                                              \
		if (has_boot_clock)                                                                       \
			(record).at_boot_ns = bpf_ktime_get_boot_ns();                                    \
		else                                                                                      \
			(record).at_boot_ns = bpf_ktime_get_ns() + asleep_ns;                             \
		(record).at_boot_ns += boot_offset_ns;                                                    \
		if (BPF_CORE_READ(signal, flags) & SIGNAL_GROUP_EXIT) {                                   \
			/* As in wait_task_zombie(): without that flag the group's code does not count. */ \
			(record).wait_status = (__u32)rebooted_by(signal);                                \
			if (!(record).wait_status)                                                        \
				(record).wait_status = (__u32)BPF_CORE_READ(signal, group_exit_code);     \
		} else {                                                                                  \
			(record).wait_status = (__u32)BPF_CORE_READ(leader, exit_code);                   \
		}                                                                                         \
	} while (0)
