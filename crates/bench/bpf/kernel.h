/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/* The kernel types that count.bpf.c reads, with only the fields it reads; relocated at load time (CO-RE). */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

/* linux/bpf.h */
enum { BPF_MAP_TYPE_HASH = 1 };
enum { BPF_ANY = 0, BPF_NOEXIST = 1 };

struct bpf_pidns_info {
	__u32 pid;
	__u32 tgid;
};

struct bpf_raw_tracepoint_args {
	__u64 args[0];
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sched_entity {
	__u64 sum_exec_runtime;
	__u64 prev_sum_exec_runtime;
};

struct task_struct {
	struct sched_entity se;
	int tgid;
	char comm[16];
	struct task_struct *group_leader;
};

#pragma clang attribute pop
