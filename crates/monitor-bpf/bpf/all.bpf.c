// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * Tells of every exit on the machine, by a ring buffer (Linux 5.8): for `embedshimd watch --all`. Never attached by the daemon.
 *
 * What exit.bpf.c says of two threads that end at once, and of copies of the program, is so here as well: an exit can be told of
 * more than once, and the last time counts. User space waits for a moment before it believes one.
 */
#include "exit.h"

enum { BPF_MAP_TYPE_ARRAY = 2, BPF_MAP_TYPE_RINGBUF = 27 };

/* crates/monitor-bpf/src/all.rs reads it. */
struct exit_event {
	struct exit_record record;
	__u64 number;
	char command[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} exits SEC(".maps");

/* How many exits found no room in the ring. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline int tell(struct task_struct *task)
{
	struct signal_struct *signal = BPF_CORE_READ(task, signal);
	struct task_struct *leader;
	struct exit_record record = {};
	struct exit_event *event;
	__u32 number, zero = 0;
	__u64 *count;

	if (BPF_CORE_READ(signal, live.counter) != 0)
		return 0;
	number = number_of(task, signal);
	if (!number)
		return 0;
	event = bpf_ringbuf_reserve(&exits, sizeof(*event), 0);
	if (!event) {
		count = bpf_map_lookup_elem(&lost, &zero);
		if (count)
			__sync_fetch_and_add(count, 1);
		return 0;
	}
	leader = BPF_CORE_READ(task, group_leader);
	record.start_ticks = START_TICKS(leader);
	NOTE_EXIT(record, signal, leader);
	event->record = record;
	event->number = number;
	BPF_CORE_READ_INTO(&event->command, leader, comm);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int tell_exit(__u64 *args)
{
	return tell((struct task_struct *)args[0]);
}

SEC("raw_tp/sched_process_exit")
int tell_exit_2(__u64 *args)
{
	return tell((struct task_struct *)args[0]);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
