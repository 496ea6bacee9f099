// What a shell cannot do, for the containers of demo and tests. Static; no argument is trusted to be sane, since we write them.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static int code;

static void sleep_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static void *leave_later(void *ms)
{
	sleep_ms((long)ms);
	exit(code);
}

// The main thread, whose pid is the process's, is gone when another thread ends the process.
static int leader_first(char **arg)
{
	pthread_t other;

	code = atoi(arg[0]);
	if (pthread_create(&other, NULL, leave_later, (void *)atol(arg[1])))
		return 125;
	pthread_exit(NULL);
}

// Touches memory until the limit of the cgroup is met.
static int allocate(char **arg)
{
	size_t size = strtoul(arg[0], NULL, 10) << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return 125;
	memset(memory, 1, size);
	puts("allocated");
	return 0;
}

// Dies by a signal that init of a pid namespace would otherwise not feel: the default action, sent by the kernel.
static int fault(char **arg)
{
	(void)arg;
	return *(volatile int *)NULL;
}

// As many bytes as asked for, as fast as possible, and the exit right behind the last one.
static int flood(char **arg)
{
	static const char line[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
	long lines = atol(arg[0]);

	while (lines-- > 0)
		fputs(line, stdout);
	return fflush(stdout) ? 125 : 0;
}

// A grandchild keeps the output open when the process ends.
static int orphan(char **arg)
{
	if (fork() == 0) {
		sleep_ms(atol(arg[0]));
		_exit(0);
	}
	return 0;
}

// Ends with this code at SIGTERM; without it, never.
static void end_by_code(int signal)
{
	(void)signal;
	_exit(code);
}

static int until_term(char **arg)
{
	code = atoi(arg[0]);
	signal(SIGTERM, end_by_code);
	puts("ready");
	fflush(stdout);
	while (pause())
		;
	return 0;
}

// Holds the lock of the pipe of its output, as soon as that is empty: splices from a socket on which
// nothing comes.
static int hold_output(char **argv)
{
	int pair[2], unread = 1;

	(void)argv;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		return 125;
	while (unread)
		if (ioctl(1, FIONREAD, &unread))
			return 125;
	return splice(pair[0], NULL, 1, NULL, 1, 0) < 0 ? 124 : 0;
}

// Declares so many megabytes to be its arguments, in which any root's process that reads them drowns.
static int long_arguments(char **arg)
{
	size_t size = strtoul(arg[0], NULL, 10) << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	unsigned long fields[64] = { 0 };
	char stat[4096];
	FILE *file = fopen("/proc/self/stat", "r");
	size_t length = file ? fread(stat, 1, sizeof(stat) - 1, file) : 0;
	char *field;

	if (memory == MAP_FAILED || !length)
		return 125;
	stat[length] = 0;
	field = strtok(strrchr(stat, ')') + 2, " ");
	for (int i = 3; field && i < 64; i++, field = strtok(NULL, " "))
		fields[i] = strtoul(field, NULL, 10);
	struct prctl_mm_map map = {
		.start_code = fields[26], .end_code = fields[27], .start_data = fields[45], .end_data = fields[46],
		.start_brk = fields[47], .brk = (unsigned long)sbrk(0), .start_stack = fields[28],
		.arg_start = (unsigned long)memory, .arg_end = (unsigned long)memory + size,
		.env_start = fields[50], .env_end = fields[51], .exe_fd = -1,
	};

	if (prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof(map), 0))
		return 124;
	puts("declared");
	fflush(stdout);
	while (pause())
		;
	return 0;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int arguments;
		int (*run)(char **);
	} commands[] = {
		{ "leader-first", 2, leader_first }, { "allocate", 1, allocate },     { "fault", 0, fault },
		{ "flood", 1, flood },               { "until-term", 1, until_term }, { "orphan", 1, orphan },
		{ "hold-output", 0, hold_output },   { "long-arguments", 1, long_arguments },
	};

	for (size_t i = 0; argc > 1 && i < sizeof(commands) / sizeof(*commands); i++)
		if (!strcmp(argv[1], commands[i].name) && argc == commands[i].arguments + 2)
			return commands[i].run(argv + 2);
	fputs("usage: guest leader-first CODE MS | allocate MB | fault | flood LINES | until-term CODE | orphan MS | hold-output | long-arguments MB\n", stderr);
	return 126;
}
