/* What the two C programs of the bench share: one line about an error, time, VMs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define TSS_ADDRESS 0x7ffbd000
#define X2APIC_32BIT_IDS 3 /* as the library's own guest: ids above 254 */

static int kvm_fd, run_size;

static void fail(const char *what, const char *which)
{
	fprintf(stderr, "%s %s: %s\n", what, which, strerror(errno));
	exit(1);
}

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int call(int fd, unsigned long request, void *argument, const char *name)
{
	int got = ioctl(fd, request, argument);

	if (got < 0)
		fail("ioctl", name);
	return got;
}

static void pin(int cpu)
{
	cpu_set_t set;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	CPU_ZERO(&set);
	CPU_SET(cpu % cpus, &set);
	pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

struct vm {
	int fd, vcpus, *fds;
	struct kvm_run **pages;
	char *memory;
	size_t memory_size;
};

static struct vm vm_new(int vcpus, size_t memory_size, int pit, int irqchip)
{
	struct vm vm = {call(kvm_fd, KVM_CREATE_VM, 0, "CREATE_VM"), vcpus, calloc(vcpus, sizeof(int)),
			calloc(vcpus, sizeof(void *)), NULL, memory_size};
	struct kvm_userspace_memory_region region = {0, 0, 0, memory_size, 0};
	struct kvm_pit_config config = {0};
	struct kvm_enable_cap cap = {.cap = KVM_CAP_X2APIC_API, .args = {X2APIC_32BIT_IDS}};

	vm.memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (vm.memory == MAP_FAILED)
		fail("mmap", "guest memory");
	region.userspace_addr = (uintptr_t)vm.memory;
	call(vm.fd, KVM_SET_USER_MEMORY_REGION, &region, "SET_USER_MEMORY_REGION");
	call(vm.fd, KVM_SET_TSS_ADDR, (void *)TSS_ADDRESS, "SET_TSS_ADDR");
	if (irqchip)
		call(vm.fd, KVM_CREATE_IRQCHIP, 0, "CREATE_IRQCHIP");
	if (pit)
		call(vm.fd, KVM_CREATE_PIT2, &config, "CREATE_PIT2");
	call(vm.fd, KVM_ENABLE_CAP, &cap, "ENABLE_CAP");
	for (long k = 0; k < vcpus; k++) {
		vm.fds[k] = call(vm.fd, KVM_CREATE_VCPU, (void *)k, "CREATE_VCPU");
		vm.pages[k] = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm.fds[k], 0);
		if (vm.pages[k] == MAP_FAILED)
			fail("mmap", "run page");
	}
	return vm;
}

static void vm_close(struct vm *vm)
{
	for (int k = 0; k < vm->vcpus; k++) {
		munmap(vm->pages[k], run_size);
		close(vm->fds[k]);
	}
	close(vm->fd);
	munmap(vm->memory, vm->memory_size);
	free(vm->fds);
	free(vm->pages);
}

static void open_kvm(void)
{
	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0)
		fail("open", "/dev/kvm");
	run_size = call(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0, "GET_VCPU_MMAP_SIZE");
}
