/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ways in which a Linux process can end, one per argument: the shapes that the recording rule is tested with.
 * Waits for a byte on its input, so that its watcher is ready, then ends in the way that is asked for.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char *self;

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

static void *waits_for_ever(void *unused)
{
	(void)unused;
	for (;;)
		pause();
}

static void on_term(int signal)
{
	(void)signal;
}

int main(int argc, char **argv)
{
	const char *shape = argc > 1 ? argv[1] : "";
	const struct rlimit no_core = { 0, 0 };
	sigset_t none;
	char byte;
	int i;

	// Whoever runs the tests may have blocked signals.
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	self = argv[0];
	if (strcmp(shape, "now") == 0)
		return argc > 2 ? atoi(argv[2]) : 97;
	setrlimit(RLIMIT_CORE, &no_core);
	if (strcmp(shape, "ignored-term-exec") == 0)
		signal(SIGTERM, SIG_IGN);
	if (strcmp(shape, "handled-term") == 0)
		signal(SIGTERM, on_term);
	if (read(0, &byte, 1) != 1)
		_exit(96);

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

		if (fork() == 0) {
			pause_ms(20);
			kill(me, SIGCONT);
			_exit(0);
		}
		raise(SIGSTOP);
		_exit(19);
	}
	if (strcmp(shape, "handled-term") == 0) {
		raise(SIGTERM);
		_exit(20);
	}
	waits_for_ever(NULL);
	return 0;
}
