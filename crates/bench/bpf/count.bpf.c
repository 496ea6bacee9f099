// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * Counts what processes cost: system calls, context switches, time on a processor. Only those of the bench and of whatever
 * it has started, however deep, are counted; each by its number and by the name of its main thread, which changes at execve().
 *
 * The fork program runs as long as the bench, so that none is missed; the other two only while something is measured. Linux
 * 5.18 and newer: before, sched_switch does not tell the state in which a task leaves the processor.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* crates/bench/src/count/mod.rs reads both as bytes. */
struct key {
	__u32 number;
	char name[16];
};

struct value {
	__u64 calls;
	__u64 switches;
	__u64 voluntary;
	__u64 on_cpu_ns;
};

/* Descendants of the bench, by the number in the initial pid namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u8);
} tracked SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__type(key, struct key);
	__type(value, struct value);
} counts SEC(".maps");

/* The bench's number in its pid namespace, and the device and inode of that. Set before loading. */
const volatile __u32 bench = 0;
const volatile __u64 namespace_device = 0;
const volatile __u64 namespace_inode = 0;

/* As the bench knows it; 0 if it is in another pid namespace than the bench. */
static __always_inline __u32 number_of_current(void)
{
	struct bpf_pidns_info info = {};

	if (bpf_get_ns_current_pid_tgid(namespace_device, namespace_inode, &info, sizeof(info)))
		return 0;
	return info.tgid;
}

static __always_inline struct value *counts_of_current(void)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;
	struct task_struct *task = (void *)bpf_get_current_task();
	struct value *found, none = {};
	struct key key = {};

	if (!bpf_map_lookup_elem(&tracked, &process))
		return 0;
	key.number = number_of_current();
	BPF_CORE_READ_STR_INTO(&key.name, task, group_leader, comm);
	found = bpf_map_lookup_elem(&counts, &key);
	if (found)
		return found;
	bpf_map_update_elem(&counts, &key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&counts, &key);
}

SEC("raw_tp/sched_process_fork")
int bench_fork(struct bpf_raw_tracepoint_args *context)
{
	struct task_struct *child_task = (void *)context->args[1];
	__u32 parent = bpf_get_current_pid_tgid() >> 32;
	__u32 child = BPF_CORE_READ(child_task, tgid);
	__u8 one = 1;

	if (parent == child)
		return 0; /* a thread */
	if (bpf_map_lookup_elem(&tracked, &parent) || number_of_current() == bench)
		bpf_map_update_elem(&tracked, &child, &one, BPF_ANY);
	else
		bpf_map_delete_elem(&tracked, &child); /* its number was another's before */
	return 0;
}

SEC("raw_tp/sys_enter")
int bench_call(void *context)
{
	struct value *value = counts_of_current();

	if (value)
		__sync_fetch_and_add(&value->calls, 1);
	return 0;
}

SEC("raw_tp/sched_switch")
int bench_switch(struct bpf_raw_tracepoint_args *context)
{
	struct task_struct *leaving = (void *)context->args[1];
	struct value *value;
	__u64 on_cpu;

	/* The current task is still the one that leaves. */
	value = counts_of_current();
	if (!value)
		return 0;
	__sync_fetch_and_add(&value->switches, 1);
	/* Since it was put there, without interrupts and what a hypervisor has stolen. */
	on_cpu = BPF_CORE_READ(leaving, se.sum_exec_runtime) -
		 BPF_CORE_READ(leaving, se.prev_sum_exec_runtime);
	__sync_fetch_and_add(&value->on_cpu_ns, on_cpu);
	if (!context->args[0] && context->args[3])
		__sync_fetch_and_add(&value->voluntary, 1);
	return 0;
}
