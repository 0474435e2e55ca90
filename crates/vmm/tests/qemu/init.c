/* PID 1 of the test guest: loads the modules of the initramfs in the order of their names, reports what
 * it sees on the console, then ticks and obeys single letters from the control port:
 * p power off, r reboot, c crash (PID 1 ends: the kernel panics), e echo, m or M fill 64 or 300 MiB with a
 * pattern and answer, v answer E if the pattern is there, else B, f free them and answer, u answer with the kernel's
 * next random UUID, read as soon as the letter is. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

static void read_line(const char *path, char *to, int size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	int n = fd < 0 ? 0 : read(fd, to, size - 1);
	if (fd >= 0)
		close(fd);
	to[n < 0 ? 0 : n] = 0;
	to[strcspn(to, "\n")] = 0;
}

static void load_modules(void)
{
	struct dirent **list;
	int n = scandir("/modules", &list, 0, alphasort);
	for (int i = 0; i < n; i++) {
		char path[300];
		if (list[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/modules/%s", list[i]->d_name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (syscall(SYS_finit_module, fd, "", 0))
			printf("test: module %s refused: %m\n", list[i]->d_name);
		close(fd);
	}
}

/* Prints `what name=value ...` for each entry of a folder of /sys that begins with `first`. */
static void show(const char *what, const char *folder, char first, const char *const *attributes)
{
	DIR *d = opendir(folder);
	struct dirent *e;
	while (d && (e = readdir(d))) {
		if (e->d_name[0] != first)
			continue;
		printf("test: %s", what);
		for (const char *const *a = attributes; *a; a++) {
			char path[400], value[100];
			snprintf(path, sizeof path, "%s/%s/%s", folder, e->d_name, *a);
			read_line(path, value, sizeof value);
			printf(" %s=%s", *a, value);
		}
		printf("\n");
	}
}

static int open_port(const char *wanted)
{
	DIR *d = opendir("/sys/class/virtio-ports");
	struct dirent *e;
	while (d && (e = readdir(d))) {
		char path[400], name[100];
		snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
		read_line(path, name, sizeof name);
		if (strcmp(name, wanted))
			continue;
		snprintf(path, sizeof path, "/dev/%s", e->d_name);
		return open(path, O_RDWR | O_NONBLOCK);
	}
	return -1;
}

/* Every word differs, from its neighbour and from its place in another page. */
static unsigned long pattern(size_t i)
{
	return (i + 1) * 0x9e3779b97f4a7c15ul;
}

int main(void)
{
	char uptime[100];
	unsigned long *filled = 0;
	size_t size = 0;
	mount("proc", "/proc", "proc", 0, 0);
	mount("sysfs", "/sys", "sysfs", 0, 0);
	mount("dev", "/dev", "devtmpfs", 0, 0);
	setvbuf(stdout, 0, _IOLBF, 0);
	read_line("/proc/uptime", uptime, sizeof uptime);
	printf("test: init %s\n", uptime);
	load_modules();
	show("disk", "/sys/block", 'v', (const char *const[]){ "serial", "ro", "size", 0 });
	show("nic", "/sys/class/net", 'e', (const char *const[]){ "address", 0 });
	int app = open_port("doze.app.0"), control = open_port("doze.agent.0");
	printf("test: ports app=%d control=%d\n", app >= 0, control >= 0);
	dprintf(app, "hello from the program\n");
	printf("test: generation driver=%d\n", !access("/sys/bus/acpi/drivers/vmgenid", F_OK));
	printf("test: ready\n");
	for (int i = 0;; i++) {
		char c;
		printf("test: tick %d\n", i);
		usleep(100000);
		if (read(control, &c, 1) != 1)
			continue;
		if (c == 'p')
			reboot(RB_POWER_OFF);
		if (c == 'r')
			reboot(RB_AUTOBOOT);
		if (c == 'c')
			return 1;
		if (c == 'm' || c == 'M') {
			size = (c == 'm' ? 64ul : 300ul) << 20;
			filled = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			for (size_t w = 0; w < size / sizeof *filled; w++)
				filled[w] = pattern(w);
		}
		if (c == 'v') {
			size_t w = 0;
			while (w < size / sizeof *filled && filled[w] == pattern(w))
				w++;
			write(control, size && w == size / sizeof *filled ? "E" : "B", 1);
		}
		if (c == 'f')
			munmap(filled, size);
		if (c == 'u') {
			char uuid[100];
			read_line("/proc/sys/kernel/random/uuid", uuid, sizeof uuid);
			write(control, uuid, 36);
		}
		if (c == 'e' || c == 'm' || c == 'M' || c == 'f')
			write(control, "E", 1);
	}
}
