// An OCI runtime whose containers are one small process each, without namespaces, cgroup and root file system: for tests that
// need thousands. The process returns each input on both outputs, and ends at the end of its input; at SIGUSR1 it says so on both.
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int write_all(int fd, const char *bytes, ssize_t count)
{
	while (count > 0) {
		ssize_t written = write(fd, bytes, count);

		if (written < 0)
			return -1;
		bytes += written;
		count -= written;
	}
	return 0;
}

static void wake(int number)
{
	static const char woken[] = "woken\n";

	(void)number;
	write_all(1, woken, sizeof(woken) - 1);
	write_all(2, woken, sizeof(woken) - 1);
}

static int echo(void)
{
	struct sigaction action = { .sa_handler = wake, .sa_flags = SA_RESTART };

	char bytes[256];
	struct stat input;
	ssize_t count;

	sigaction(SIGUSR1, &action, NULL);
	while ((count = read(0, bytes, sizeof(bytes))) > 0)
		if (write_all(1, bytes, count) || write_all(2, bytes, count))
			return 1;
	// Without an input, which /dev/null stands for, it lives until it is killed.
	while (!fstat(0, &input) && S_ISCHR(input.st_mode))
		pause();
	return 0;
}

static int create(const char *pid_file, int argc, char **argv)
{
	pid_t pid = fork();
	FILE *file;

	if (pid < 0)
		return 1;
	if (pid == 0) {
		// A container is no call of the runtime, which is known by its arguments.
		for (int i = 1; i < argc; i++)
			memset(argv[i], 0, strlen(argv[i]));
		_exit(echo());
	}
	file = fopen(pid_file, "w");
	return !file || fprintf(file, "%d", (int)pid) < 0 || fclose(file);
}

int main(int argc, char **argv)
{
	const char *pid_file = NULL;
	int is_create = 0;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "create"))
			is_create = 1;
		if (!strcmp(argv[i], "--pid-file") && i + 1 < argc)
			pid_file = argv[++i];
	}
	// `start`, `delete` and all others have nothing to do.
	return is_create ? !pid_file || create(pid_file, argc, argv) : 0;
}
