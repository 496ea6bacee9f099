/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The kernel types that the programs read, with only the fields it reads. Their offsets here mean nothing: every access
 * is relocated at load time against the running kernel's BTF (CO-RE). Checked against 5.10, 6.1, 6.12, 6.16 and 7.3.
 */
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
enum { BPF_ANY = 0 };
enum { BPF_F_NO_PREALLOC = 1 };

/* linux/sched/signal.h: the whole group ends with group_exit_code. Unchanged since 2.6; not in BTF, being a macro. */
#define SIGNAL_GROUP_EXIT 0x00000004
/* linux/pid.h: enum pid_type, since 4.19. */
#define PIDTYPE_TGID 1
/* linux/pid_namespace.h: MAX_PID_NS_LEVEL. */
#define MAX_LEVEL 32

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct atomic {
	int counter;
};

struct ns_common {
	unsigned int inum;
};

struct pid_namespace {
	struct ns_common ns;
	int reboot;
};

struct upid {
	int nr;
	struct pid_namespace *ns;
};

struct pid {
	unsigned int level;
	struct upid numbers[1];
};

struct signal_struct {
	struct atomic live;
	unsigned int flags;
	int group_exit_code;
	struct pid *pids[4];
};

struct task_struct {
	int tgid;
	int exit_code;
	struct task_struct *group_leader;
	struct signal_struct *signal;
	__u64 start_boottime;
	char comm[16];
};

/* The same field under its older name; what follows the three underscores is ignored by CO-RE. */
struct task_struct___before_5_5 {
	__u64 real_start_time;
};

#pragma clang attribute pop
