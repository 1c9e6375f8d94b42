/*
 * One write for each vCPU of a VM, divided among threads: what a VM-wide lock, or a handler that loops over all vCPUs,
 * does to a restore that writes a VM-scoped register N times. Threads are pinned and spin until the burst begins.
 *
 *   vm N               make a VM of N vCPUs (the one before is closed)
 *   burst OP T         N writes by T threads: "ns"
 */
#include "kvm.h"

#define MAX_THREADS 256

static struct vm vm;
static struct kvm_irqchip ioapic = {.chip_id = KVM_IRQCHIP_IOAPIC};
static struct kvm_clock_data clock_value;

static void set_msr(int vcpu, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} list = {{1, 0}, {index, 0, value}};

	if (call(vm.fds[vcpu], KVM_SET_MSRS, &list, "SET_MSRS") != 1)
		fail("an MSR was refused", "SET_MSRS");
}

static void lstar(int vcpu)
{
	set_msr(vcpu, 0xc0000082, 0xffffffff81000000ULL);
}

static void wall_clock(int vcpu)
{
	set_msr(vcpu, 0x4b564d00, 0);
}

static void set_clock(int vcpu)
{
	struct kvm_clock_data value = {.clock = clock_value.clock};

	(void)vcpu;
	call(vm.fd, KVM_SET_CLOCK, &value, "SET_CLOCK");
}

static void set_ioapic(int vcpu)
{
	(void)vcpu;
	call(vm.fd, KVM_SET_IRQCHIP, &ioapic, "SET_IRQCHIP");
}

static const struct {
	const char *name;
	void (*write)(int vcpu);
} writes[] = {{"lstar", lstar}, {"wall-clock", wall_clock}, {"clock", set_clock}, {"ioapic", set_ioapic}};

static atomic_int ready, go;
static void (*current)(int vcpu);
static int threads;

static void share(int number)
{
	int first = (int64_t)vm.vcpus * number / threads, end = (int64_t)vm.vcpus * (number + 1) / threads;

	for (int k = first; k < end; k++)
		current(k);
}

static void *worker(void *argument)
{
	int number = (intptr_t)argument;

	pin(number);
	atomic_fetch_add(&ready, 1);
	while (!atomic_load(&go)) {
		if (threads > sysconf(_SC_NPROCESSORS_ONLN))
			sched_yield();
	}
	share(number);
	return NULL;
}

static int64_t burst(void)
{
	pthread_t ids[MAX_THREADS];
	int64_t start;

	atomic_store(&ready, 0);
	atomic_store(&go, 0);
	for (intptr_t k = 1; k < threads; k++)
		pthread_create(&ids[k], NULL, worker, (void *)k);
	while (atomic_load(&ready) < threads - 1)
		sched_yield();
	start = now_ns();
	atomic_store(&go, 1);
	share(0);
	for (int k = 1; k < threads; k++)
		pthread_join(ids[k], NULL);
	return now_ns() - start;
}

int main(void)
{
	char line[256], name[32];
	int vcpus;

	open_kvm();
	pin(0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while (fgets(line, sizeof line, stdin)) {
		current = NULL;
		if (sscanf(line, "vm %d", &vcpus) == 1) {
			if (vm.fds)
				vm_close(&vm);
			vm = vm_new(vcpus, 1 << 20, 1, 1);
			call(vm.fd, KVM_GET_IRQCHIP, &ioapic, "GET_IRQCHIP");
			call(vm.fd, KVM_GET_CLOCK, &clock_value, "GET_CLOCK");
			printf("ok\n");
			continue;
		}
		if (sscanf(line, "burst %31s %d", name, &threads) == 2 && threads > 0 && threads <= MAX_THREADS)
			for (size_t n = 0; n < sizeof writes / sizeof *writes; n++)
				if (!strcmp(writes[n].name, name))
					current = writes[n].write;
		if (current && vm.fds)
			printf("%lld\n", (long long)burst());
		else
			printf("unknown command\n");
	}
	return 0;
}
