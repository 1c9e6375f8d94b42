/*
 * One write for each vCPU of a VM, divided among threads: what a VM-wide lock, or a handler that loops over all vCPUs,
 * does to a restore that writes a VM-scoped register N times. Threads are pinned and spin until the burst begins.
 *
 *   vm N               make a VM of N vCPUs (the one before is closed)
 *   burst OP T         N writes by T threads: "ns"
 *   lapic N HOW        KVM_SET_LAPIC of every vCPU of a fresh VM, in one of several ways: "ns" (see `hows`)
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

/*
 * KVM_SET_LAPIC rebuilds a map of the VM's APICs each time: a loop over all vCPUs. Ways that might avoid it.
 */

static void enable_apic(int vcpu, int on)
{
	struct kvm_sregs2 sregs;

	call(vm.fds[vcpu], KVM_GET_SREGS2, &sregs, "GET_SREGS2");
	sregs.apic_base = on ? sregs.apic_base | 0x800 : sregs.apic_base & ~0x800ULL;
	call(vm.fds[vcpu], KVM_SET_SREGS2, &sregs, "SET_SREGS2");
}

static struct kvm_lapic_state *states;

static void set_lapic(int vcpu)
{
	call(vm.fds[vcpu], KVM_SET_LAPIC, &states[vcpu], "SET_LAPIC");
}

static int64_t lapics_in_order(void)
{
	int64_t start = now_ns();

	for (int k = 0; k < vm.vcpus; k++)
		set_lapic(k);
	return now_ns() - start;
}

static int64_t lapics_reversed(void)
{
	int64_t start = now_ns();

	for (int k = vm.vcpus - 1; k >= 0; k--)
		set_lapic(k);
	return now_ns() - start;
}

static int64_t lapics_again(void)
{
	lapics_in_order();
	return lapics_in_order();
}

static int64_t lapics_while_disabled(void)
{
	int64_t start;

	for (int k = 0; k < vm.vcpus; k++)
		enable_apic(k, 0); /* a target could be made so before the pause */
	start = now_ns();
	for (int k = 0; k < vm.vcpus; k++)
		set_lapic(k);
	for (int k = 0; k < vm.vcpus; k++)
		enable_apic(k, 1);
	return now_ns() - start;
}

static int64_t sregs_alone(void) /* what the SREGS of the way before cost where nothing is switched */
{
	int64_t start = now_ns();

	for (int k = 0; k < vm.vcpus; k++)
		enable_apic(k, 1);
	return now_ns() - start;
}

static int64_t lapics_by_threads(void)
{
	current = set_lapic;
	threads = sysconf(_SC_NPROCESSORS_ONLN);
	return burst();
}

static int64_t lapics_by_many(void)
{
	current = set_lapic;
	threads = 32;
	return burst();
}

static int64_t lapics_off_by_software(void)
{
	for (int k = 0; k < vm.vcpus; k++)
		*(uint32_t *)(states[k].regs + 0xf0) &= ~0x100;
	return lapics_in_order();
}

/* Another VM with as many vCPUs, each made by `add_vcpu`. Its run pages are nobody's. */
static void bare_vm(int split)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
	struct vm other = vm_new(0, 1 << 20, 0, !split);

	if (split)
		call(other.fd, KVM_ENABLE_CAP, &cap, "SPLIT_IRQCHIP");
	for (int k = 0; k < vm.vcpus; k++) {
		munmap(vm.pages[k], run_size);
		close(vm.fds[k]);
	}
	close(vm.fd);
	munmap(vm.memory, vm.memory_size);
	vm.fd = other.fd;
	vm.memory = other.memory;
	free(other.fds);
	free(other.pages);
}

static void add_vcpu(int k)
{
	vm.fds[k] = call(vm.fd, KVM_CREATE_VCPU, (void *)(long)k, "CREATE_VCPU");
	vm.pages[k] = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm.fds[k], 0);
}

static int64_t lapics_as_created(void) /* only the writes are timed */
{
	int64_t spent = 0;

	bare_vm(0);
	for (int k = 0; k < vm.vcpus; k++) {
		add_vcpu(k);
		int64_t start = now_ns();
		set_lapic(k);
		spent += now_ns() - start;
	}
	return spent;
}

static int64_t lapics_without_ioapic(void)
{
	bare_vm(1);
	for (int k = 0; k < vm.vcpus; k++)
		add_vcpu(k);
	return lapics_in_order();
}

static int64_t lapics_as_msrs(void) /* without ISR, IRR and timer, which MSRs can't restore */
{
	static const uint16_t offsets[] = {0x08, 0x0f, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x3e};
	enum { COUNT = sizeof offsets / sizeof *offsets };
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry[COUNT];
	} list = {{COUNT, 0}, {{0}}};
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entry[256];
	} cpuid;
	int64_t start;

	cpuid.head.nent = 256;
	call(kvm_fd, KVM_GET_SUPPORTED_CPUID, &cpuid, "GET_SUPPORTED_CPUID");
	for (int k = 0; k < vm.vcpus; k++) { /* before the pause: enabled, in x2APIC mode */
		struct kvm_sregs2 sregs;

		call(vm.fds[k], KVM_SET_CPUID2, &cpuid, "SET_CPUID2");
		set_lapic(k);
		call(vm.fds[k], KVM_GET_SREGS2, &sregs, "GET_SREGS2");
		sregs.apic_base |= 0xc00;
		call(vm.fds[k], KVM_SET_SREGS2, &sregs, "SET_SREGS2");
	}
	start = now_ns();
	for (int k = 0; k < vm.vcpus; k++) {
		for (int n = 0; n < COUNT; n++) {
			list.entry[n].index = 0x800 + offsets[n];
			list.entry[n].data = *(uint32_t *)(states[k].regs + offsets[n] * 16);
		}
		if (call(vm.fds[k], KVM_SET_MSRS, &list, "SET_MSRS") != COUNT)
			fail("an x2APIC MSR was refused", "SET_MSRS");
	}
	return now_ns() - start;
}

static const struct {
	const char *name;
	int64_t (*run)(void);
} hows[] = {{"in-order", lapics_in_order}, {"reversed", lapics_reversed}, {"again", lapics_again},
	    {"while-disabled", lapics_while_disabled}, {"sregs-alone", sregs_alone}, {"threads", lapics_by_threads},
	    {"32-threads", lapics_by_many}, {"software-off", lapics_off_by_software},
	    {"as-created", lapics_as_created}, {"without-ioapic", lapics_without_ioapic}, {"msrs", lapics_as_msrs}};

static void make_vm(int vcpus)
{
	if (vm.fds)
		vm_close(&vm);
	vm = vm_new(vcpus, 1 << 20, 1, 1);
	call(vm.fd, KVM_GET_IRQCHIP, &ioapic, "GET_IRQCHIP");
	call(vm.fd, KVM_GET_CLOCK, &clock_value, "GET_CLOCK");
}

static int64_t lapic_round(int vcpus, const char *how)
{
	make_vm(vcpus);
	free(states);
	states = calloc(vcpus, sizeof *states);
	for (int k = 0; k < vcpus; k++) {
		call(vm.fds[k], KVM_GET_LAPIC, &states[k], "GET_LAPIC");
		*(uint32_t *)(states[k].regs + 0xf0) |= 0x100; /* SPIV: enabled by software, as in a running guest */
	}
	for (size_t n = 0; n < sizeof hows / sizeof *hows; n++)
		if (!strcmp(hows[n].name, how))
			return hows[n].run();
	return -1;
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
			make_vm(vcpus);
			printf("ok\n");
			continue;
		}
		if (sscanf(line, "lapic %d %31s", &vcpus, name) == 2) {
			printf("%lld\n", (long long)lapic_round(vcpus, name));
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
