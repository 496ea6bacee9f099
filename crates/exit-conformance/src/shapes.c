/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ways in which a Linux process can end, and a parent whose verdict on them counts.
 *
 *   shapes SHAPE [CODE]           waits for a byte on its input, so that its watcher is ready, then ends as asked for
 *   shapes parent N SHAPE [CODE]  starts N of those ("#" as the code: the number of the child), prints their pids, and takes orders:
 *                                 g  lets them go    k SIGNAL  sends it    w  waits, prints the wait status of each
 *                                 r CODE  starts another one that has the first one's number again
 *   shapes nested N SHAPE [CODE]  the same, each in a pid namespace of its own
 *   shapes storm MS               starts processes that end at once, for that long; prints how many
 *   shapes trace PID              traces a process until it ends
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/reboot.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <sys/wait.h>
#include <unistd.h>

static char *self;
/* The first process of a pid namespace. */
static int is_first;

static void thread(void *(*body)(void *), void *argument)
{
	pthread_t id;

	if (pthread_create(&id, NULL, body, argument) != 0)
		_exit(99);
}

static void pause_ms(int ms)
{
	usleep(ms * 1000);
}

/* Only this thread, as pthread_exit() or a raw exit system call do it. */
static void end_thread(int code)
{
	syscall(SYS_exit, code);
}

static void *exits_the_group(void *code)
{
	pause_ms(20);
	_exit((int)(intptr_t)code);
}

static void *returns_late(void *unused)
{
	(void)unused;
	pause_ms(20);
	return NULL;
}

static void *aborts(void *unused)
{
	(void)unused;
	pause_ms(20);
	abort();
}

static void *execs(void *code)
{
	pause_ms(20);
	execl(self, self, "now", (char *)code, (char *)NULL);
	_exit(98);
}

static void *ends_at_once(void *code)
{
	end_thread((int)(intptr_t)code);
	return NULL;
}

/*
 * Reboots the pid namespace of which this is the first process: never the machine, whose first
 * process this program never is. The kernel kills the first process, and its parent sees the signal
 * that stands for the command.
 */
static void reboot_namespace(const char *how)
{
	unsigned int command = 0;

	if (strcmp(how, "restart") == 0)
		command = LINUX_REBOOT_CMD_RESTART;
	if (strcmp(how, "restart2") == 0)
		command = LINUX_REBOOT_CMD_RESTART2;
	if (strcmp(how, "halt") == 0)
		command = LINUX_REBOOT_CMD_HALT;
	if (strcmp(how, "power-off") == 0)
		command = LINUX_REBOOT_CMD_POWER_OFF;
	if (is_first && command)
		syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, command, "again");
	_exit(94);
}

static void *reboots(void *how)
{
	pause_ms(20);
	reboot_namespace(how);
	return NULL;
}

static void *waits_for_ever(void *unused)
{
	(void)unused;
	for (;;)
		pause();
	return NULL;
}

static void on_term(int signal)
{
	(void)signal;
}

#define MOST 8192
static pid_t children[MOST];
static int count;
static int go[2];

/* As clone3() has it: with the number that the child is to have, or 0 (Linux 5.5). */
static pid_t start(int flags, pid_t number, char **shape)
{
	struct {
		uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size;
	} how = { .flags = flags, .exit_signal = SIGCHLD, 
		.set_tid = number ? (uint64_t)(uintptr_t)&number : 0, .set_tid_size = number ? 1 : 0 };
	pid_t pid;

	if (!flags && !number)
		pid = fork();
	else
		pid = syscall(SYS_clone3, &how, sizeof(how));
	if (pid == 0) {
		dup2(go[0], 0);
		close(go[0]);
		close(go[1]);
		close(1);
		execv(self, shape);
		_exit(95);
	}
	return pid;
}

static int parent(int flags, int many, char **shape)
{
	char line[64], number[16];
	char *code = shape[2];
	int i, status;

	if (pipe(go) != 0 || many > MOST)
		return 90;
	for (count = 0; count < many; count++) {
		if (code && strcmp(code, "#") == 0) {
			snprintf(number, sizeof(number), "%d", count % 256);
			shape[2] = number;
		}
		children[count] = start(flags, 0, shape);
		if (children[count] < 0)
			return 91;
		printf("%d\n", children[count]);
	}
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (line[0] == 'g') {
			for (i = 0; i < count; i++)
				if (write(go[1], "x", 1) != 1)
					return 92;
		} else if (line[0] == 'k') {
			for (i = 0; i < count; i++)
				kill(children[i], atoi(line + 2));
		} else if (line[0] == 'w') {
			for (i = 0; i < count; i++) {
				if (waitpid(children[i], &status, 0) != children[i])
					status = -1;
				printf("%d\n", status);
			}
		} else if (line[0] == 'r') {
			char *again[] = { self, "exit", line + 2, NULL };

			line[strcspn(line, "\n")] = 0;
			children[0] = start(0, children[0], again);
			printf("%d\n", children[0] < 0 ? -errno : children[0]);
			count = children[0] < 0 ? 0 : 1;
		}
		fflush(stdout);
	}
	for (i = 0; i < count; i++)
		kill(children[i], SIGKILL);
	return 0;
}

static int storm(int ms)
{
	struct timespec begin, now;
	volatile long started = 0;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	do {
		pid_t child = vfork();

		if (child == 0)
			_exit(1);
		waitpid(child, NULL, 0);
		started++;
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((now.tv_sec - begin.tv_sec) * 1000 + (now.tv_nsec - begin.tv_nsec) / 1000000 < ms);
	printf("%ld\n", started);
	return 0;
}

static int trace(pid_t pid)
{
	int status;

	if (ptrace(PTRACE_SEIZE, pid, 0, 0) != 0)
		return 93;
	printf("%d\n", pid);
	fflush(stdout);
	while (waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status))
		ptrace(PTRACE_CONT, pid, 0, status >> 16 ? 0 : WSTOPSIG(status));
	return 0;
}

int main(int argc, char **argv)
{
	const char *shape = argc > 1 ? argv[1] : "";
	const struct rlimit no_core = { 0, 0 };
	sigset_t none;
	char byte;
	int i;

	// The process that runs the tests may have blocked signals.
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	self = argv[0];
	is_first = getpid() == 1;
	if (argc > 3 && (strcmp(shape, "parent") == 0 || strcmp(shape, "nested") == 0)) {
		i = atoi(argv[2]);
		argv[2] = self;
		return parent(shape[0] == 'n' ? CLONE_NEWPID : 0, i, argv + 2);
	}
	if (argc > 2 && strcmp(shape, "storm") == 0)
		return storm(atoi(argv[2]));
	if (argc > 2 && strcmp(shape, "trace") == 0)
		return trace(atoi(argv[2]));
	/* Twenty programs after each other, the first of which waits. */
	if (strcmp(shape, "exec-chain") == 0 && argc > 2 && atoi(argv[2]) > 0) {
		char next[16];

		if (atoi(argv[2]) == 20)
			_exit(23);
		snprintf(next, sizeof(next), "%d", atoi(argv[2]) + 1);
		execl(self, self, "exec-chain", next, (char *)NULL);
	}
	if (strcmp(shape, "now") == 0)
		return argc > 2 ? atoi(argv[2]) : 97;
	setrlimit(RLIMIT_CORE, &no_core);
	if (strcmp(shape, "ignored-term-exec") == 0)
		signal(SIGTERM, SIG_IGN);
	if (strcmp(shape, "handled-term") == 0)
		signal(SIGTERM, on_term);
	if (read(0, &byte, 1) != 1)
		_exit(96);
	if (strcmp(shape, "exec-chain") == 0)
		execl(self, self, "exec-chain", "1", (char *)NULL);

	if (strcmp(shape, "exit") == 0)
		_exit(atoi(argv[2]));
	if (strcmp(shape, "raise") == 0)
		raise(atoi(argv[2]));
	if (strcmp(shape, "abort") == 0)
		abort();
	if (strcmp(shape, "group-exit-by-thread") == 0) {
		thread(exits_the_group, (void *)33);
		waits_for_ever(NULL);
	}
	if (strcmp(shape, "leader-first") == 0) {
		thread(exits_the_group, (void *)44);
		end_thread(0);
	}
	if (strcmp(shape, "leader-first-others-return") == 0) {
		for (i = 0; i < 4; i++)
			thread(returns_late, NULL);
		end_thread(0);
	}
	if (strcmp(shape, "leader-exits-5-others-live") == 0) {
		thread(returns_late, NULL);
		end_thread(5);
	}
	if (strcmp(shape, "thread-exec") == 0) {
		thread(execs, "21");
		waits_for_ever(NULL);
	}
	if (strcmp(shape, "leader-gone-thread-exec") == 0) {
		thread(execs, "22");
		end_thread(0);
	}
	if (strcmp(shape, "leader-gone-then-signal") == 0) {
		thread(waits_for_ever, NULL);
		end_thread(0);
	}
	if (strcmp(shape, "thread-aborts") == 0) {
		thread(aborts, NULL);
		waits_for_ever(NULL);
	}
	if (strcmp(shape, "64-threads") == 0) {
		for (i = 0; i < 63; i++)
			thread(waits_for_ever, NULL);
		_exit(64);
	}
	if (strcmp(shape, "all-at-once") == 0) {
		for (i = 0; i < 32; i++)
			thread(ends_at_once, (void *)7);
		end_thread(12);
	}
	if (strcmp(shape, "vfork-child") == 0) {
		pid_t child = vfork();

		if (child == 0)
			_exit(1);
		waitpid(child, NULL, 0);
		_exit(18);
	}
	if (strcmp(shape, "ignored-term-exec") == 0) {
		raise(SIGTERM);
		execl(self, self, "now", "15", (char *)NULL);
	}
	if (strcmp(shape, "stopped-and-continued") == 0) {
		pid_t me = getpid();

		/* Again and again: the first may come before the stop. */
		if (fork() == 0) {
			while (getppid() == me) {
				pause_ms(20);
				kill(me, SIGCONT);
			}
			_exit(0);
		}
		raise(SIGSTOP);
		_exit(19);
	}
	if (strcmp(shape, "handled-term") == 0) {
		raise(SIGTERM);
		_exit(20);
	}
	if (strcmp(shape, "reboot") == 0)
		reboot_namespace(argv[2]);
	if (strcmp(shape, "reboot-beside-threads") == 0) {
		for (i = 0; i < 8; i++)
			thread(waits_for_ever, NULL);
		reboot_namespace(argv[2]);
	}
	if (strcmp(shape, "thread-reboots") == 0)
		thread(reboots, argv[2]);
	if (strcmp(shape, "leader-gone-thread-reboots") == 0) {
		thread(reboots, argv[2]);
		end_thread(0);
	}
	if (strcmp(shape, "child-reboots") == 0 && fork() == 0)
		reboot_namespace(argv[2]);
	waits_for_ever(NULL);
	return 0;
}
