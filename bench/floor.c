/*
 * What a save and restore of a VM's registers costs in C, with nothing around it: no stream, no codec, no checks.
 *
 * plain: every ioctl inside the pause, one thread, VM-scoped registers once.
 * best:  CPUID, feature MSRs, memory and vCPUs before the pause; general, segment and event registers through the
 *        shared run page (KVM_CAP_SYNC_REGS); pinned threads that live and spin; VM-scoped registers once.
 *
 * It reads which registers there are, where each is in a row, and their values from files that the bench wrote from a
 * saved guest: the same sets as the library's, in its order. Commands come on standard input, a line each; each is
 * answered with a line:
 *
 *   load N PATH        make the source VM of N vCPUs
 *   round N MODE T     save from it and restore into a fresh VM: "save_ns restore_ns"
 *   check N MODE T     the same, then read everything back: "differing_vcpus"
 *   drop N             close the source VM
 */
#include "kvm.h"

enum kind { STRUCT, PREPARED, MSRS, KHZ, TSC_OFFSET, CLOCK };

static const struct known {
	const char *name;
	unsigned long get, set;
	enum kind kind;
	uint32_t prepare; /* what KVM wants to find in the first word before a read */
	uint32_t sync;    /* KVM_SYNC_X86_* that has it in the run page */
} known[] = {
	{"KVM_CPUID2", KVM_GET_CPUID2, KVM_SET_CPUID2, PREPARED, 0, 0},
	{"KVM_TSC_KHZ", KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ, KHZ, 0, 0},
	{"KVM_SREGS2", KVM_GET_SREGS2, KVM_SET_SREGS2, STRUCT, 0, KVM_SYNC_X86_SREGS},
	{"KVM_REGS", KVM_GET_REGS, KVM_SET_REGS, STRUCT, 0, KVM_SYNC_X86_REGS},
	{"KVM_XSAVE", KVM_GET_XSAVE2, KVM_SET_XSAVE, STRUCT, 0, 0},
	{"KVM_XCRS", KVM_GET_XCRS, KVM_SET_XCRS, STRUCT, 0, 0},
	{"KVM_DEBUGREGS", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, STRUCT, 0, 0},
	{"KVM_LAPIC", KVM_GET_LAPIC, KVM_SET_LAPIC, STRUCT, 0, 0},
	{"KVM_VCPU_EVENTS", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, STRUCT, 0, KVM_SYNC_X86_EVENTS},
	{"KVM_MP_STATE", KVM_GET_MP_STATE, KVM_SET_MP_STATE, STRUCT, 0, 0},
	{"MSRS", KVM_GET_MSRS, KVM_SET_MSRS, MSRS, 0, 0},
	{"KVM_VCPU_TSC_OFFSET", KVM_GET_DEVICE_ATTR, 0, TSC_OFFSET, 0, 0}, /* saved; written only where they differ */
	{"KVM_IRQCHIP_PIC_MASTER", KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, PREPARED, KVM_IRQCHIP_PIC_MASTER, 0},
	{"KVM_IRQCHIP_PIC_SLAVE", KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, PREPARED, KVM_IRQCHIP_PIC_SLAVE, 0},
	{"KVM_IRQCHIP_IOAPIC", KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, PREPARED, KVM_IRQCHIP_IOAPIC, 0},
	{"KVM_PIT2", KVM_GET_PIT2, KVM_SET_PIT2, STRUCT, 0, 0},
	{"KVM_CLOCK", KVM_GET_CLOCK, KVM_SET_CLOCK, CLOCK, 0, 0},
};

#define MAX_OPS 64
#define MAX_MSRS 1024
#define MAX_SOURCES 32

struct op {
	const struct known *known;
	size_t offset, size;
	int vm, through_vcpu, prologue, count;
	uint32_t index[MAX_MSRS];
};

static struct op ops[MAX_OPS];
static int op_count;

struct work { /* one source VM and the values that were saved from the library's guest */
	struct vm vm;
	size_t row, memory_size;
	char *rows; /* vcpus + 1 rows: the last is the VM's */
} sources[MAX_SOURCES];

static uint32_t sync_offered;

/* One register of one row */

static void do_msrs(const struct op *op, int fd, char *at, int set)
{
	static _Thread_local struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[MAX_MSRS];
	} list;
	uint64_t *values = (uint64_t *)at;

	list.head.nmsrs = op->count;
	for (int k = 0; k < op->count; k++) {
		list.entries[k].index = op->index[k];
		list.entries[k].data = set ? values[k] : 0;
	}
	if (call(fd, set ? KVM_SET_MSRS : KVM_GET_MSRS, &list, "MSRS") != op->count)
		fail("an MSR was refused", set ? "SET_MSRS" : "GET_MSRS");
	for (int k = 0; !set && k < op->count; k++)
		values[k] = list.entries[k].data;
}

static void read_one(const struct op *op, int fd, char *row)
{
	char *at = row + op->offset;
	struct kvm_device_attr attribute = {0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, (uintptr_t)at};

	switch (op->known->kind) {
	case MSRS:
		do_msrs(op, fd, at, 0);
		return;
	case KHZ:
		*(uint32_t *)at = call(fd, KVM_GET_TSC_KHZ, 0, "GET_TSC_KHZ");
		return;
	case TSC_OFFSET:
		call(fd, KVM_GET_DEVICE_ATTR, &attribute, "KVM_VCPU_TSC_OFFSET");
		return;
	case PREPARED:
		*(uint32_t *)at = op->known->get == KVM_GET_CPUID2 ? (op->size - 8) / 40 : op->known->prepare;
		/* fall through */
	default:
		call(fd, op->known->get, at, op->known->name);
	}
}

static void write_one(const struct op *op, int fd, char *row)
{
	char *at = row + op->offset;
	struct kvm_clock_data clock = {0};

	switch (op->known->kind) {
	case MSRS:
		do_msrs(op, fd, at, 1);
		return;
	case KHZ: /* as the library: only where it differs */
		if (call(fd, KVM_GET_TSC_KHZ, 0, "GET_TSC_KHZ") != *(int *)at)
			call(fd, KVM_SET_TSC_KHZ, (void *)(uintptr_t)*(uint32_t *)at, "SET_TSC_KHZ");
		return;
	case TSC_OFFSET:
		return;
	case CLOCK:
		clock.clock = *(uint64_t *)at;
		call(fd, KVM_SET_CLOCK, &clock, "SET_CLOCK");
		return;
	default:
		call(fd, op->known->set, at, op->known->name);
	}
}

/* The run page: three structs for one KVM_RUN that never enters the guest */

static void enter(int fd)
{
	if (ioctl(fd, KVM_RUN, 0) != -1 || errno != EINTR)
		fail("KVM_RUN", "with immediate_exit");
}

static void read_page(struct vm *vm, int k, char *row)
{
	struct kvm_run *page = vm->pages[k];

	page->immediate_exit = 1;
	page->kvm_valid_regs = sync_offered;
	enter(vm->fds[k]);
	page->kvm_valid_regs = 0;
	for (int n = 0; n < op_count; n++) {
		char *at = row + ops[n].offset;

		switch (ops[n].known->sync & sync_offered) {
		case KVM_SYNC_X86_REGS:
			memcpy(at, &page->s.regs.regs, sizeof page->s.regs.regs);
			break;
		case KVM_SYNC_X86_SREGS: /* kvm_sregs2 begins as kvm_sregs does, up to apic_base */
			memcpy(at, &page->s.regs.sregs, offsetof(struct kvm_sregs, interrupt_bitmap));
			break;
		case KVM_SYNC_X86_EVENTS:
			memcpy(at, &page->s.regs.events, sizeof page->s.regs.events);
		}
	}
}

static void write_page(struct vm *vm, int k, const char *row)
{
	struct kvm_run *page = vm->pages[k];

	for (int n = 0; n < op_count; n++) {
		const char *at = row + ops[n].offset;

		switch (ops[n].known->sync & sync_offered) {
		case KVM_SYNC_X86_REGS:
			memcpy(&page->s.regs.regs, at, sizeof page->s.regs.regs);
			break;
		case KVM_SYNC_X86_SREGS:
			memset(&page->s.regs.sregs, 0, sizeof page->s.regs.sregs);
			memcpy(&page->s.regs.sregs, at, offsetof(struct kvm_sregs, interrupt_bitmap));
			break;
		case KVM_SYNC_X86_EVENTS:
			memcpy(&page->s.regs.events, at, sizeof page->s.regs.events);
		}
	}
	page->immediate_exit = 1;
	page->kvm_dirty_regs = sync_offered;
	enter(vm->fds[k]);
}

/* All registers of a range of vCPUs */

static int wanted(const struct op *op, int best, int prologue, int vm)
{
	if (op->vm != vm || (best && op->known->sync & sync_offered))
		return 0;
	return op->prologue ? !best || prologue : !prologue;
}

static int is_mp_state(const struct op *op)
{
	return op->known->get == KVM_GET_MP_STATE;
}

static void save_vcpus(struct vm *vm, int first, int end, size_t width, char *rows, int best)
{
	for (int k = first; k < end; k++) {
		char *row = rows + k * width;

		for (int n = 0; n < op_count; n++) /* first: reading it accepts pending INIT and SIPI */
			if (is_mp_state(&ops[n]))
				read_one(&ops[n], vm->fds[k], row);
		for (int n = 0; n < op_count; n++)
			if (!is_mp_state(&ops[n]) && wanted(&ops[n], best, 0, 0))
				read_one(&ops[n], vm->fds[k], row);
		if (best && sync_offered)
			read_page(vm, k, row);
	}
}

static void restore_vcpus(struct vm *vm, int first, int end, size_t width, char *rows, int best)
{
	for (int k = first; k < end; k++) {
		char *row = rows + k * width;

		if (best && sync_offered) { /* KVM_RUN of a vCPU that waits for INIT looks at nothing: MP_STATE first */
			for (int n = 0; n < op_count; n++)
				if (is_mp_state(&ops[n]))
					write_one(&ops[n], vm->fds[k], row);
			write_page(vm, k, row);
		}
		for (int n = 0; n < op_count; n++)
			if (wanted(&ops[n], best, 0, 0) && !(best && sync_offered && is_mp_state(&ops[n])))
				write_one(&ops[n], vm->fds[k], row);
	}
}

/* Workers: pinned, alive all the time; woken before a round and spinning when it begins */

struct job {
	struct vm *vm;
	size_t width;
	char *rows;
	int restore, best, threads;
};

static struct job job;
static atomic_int generation, finished, awake, gate_open;
static int worker_count;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;

static void share(int number)
{
	int first = (int64_t)job.vm->vcpus * number / job.threads;
	int end = (int64_t)job.vm->vcpus * (number + 1) / job.threads;

	if (job.restore)
		restore_vcpus(job.vm, first, end, job.width, job.rows, job.best);
	else
		save_vcpus(job.vm, first, end, job.width, job.rows, job.best);
}

static void *worker(void *argument)
{
	int number = (intptr_t)argument;

	pin(number);
	for (;;) {
		pthread_mutex_lock(&gate);
		while (!atomic_load(&gate_open))
			pthread_cond_wait(&opened, &gate);
		pthread_mutex_unlock(&gate);
		int seen = atomic_load(&generation);
		atomic_fetch_add(&awake, 1);
		while (atomic_load(&gate_open)) {
			int now = atomic_load(&generation);

			if (now == seen) {
				__builtin_ia32_pause();
				continue;
			}
			seen = now;
			if (number < job.threads)
				share(number);
			atomic_fetch_add(&finished, 1);
		}
		atomic_fetch_sub(&awake, 1);
	}
	return NULL;
}

static void wake_workers(int threads)
{
	pthread_t id;

	for (; worker_count < threads - 1; worker_count++)
		pthread_create(&id, NULL, worker, (void *)(intptr_t)(worker_count + 1));
	pthread_mutex_lock(&gate);
	atomic_store(&gate_open, 1);
	pthread_cond_broadcast(&opened);
	pthread_mutex_unlock(&gate);
	while (atomic_load(&awake) < worker_count)
		;
}

static void rest_workers(void)
{
	atomic_store(&gate_open, 0);
	while (atomic_load(&awake))
		sched_yield();
}

static void all_vcpus(struct job now)
{
	job = now;
	atomic_store(&finished, 0);
	if (job.threads > 1)
		atomic_fetch_add(&generation, 1);
	share(0);
	while (job.threads > 1 && atomic_load(&finished) < worker_count)
		;
}

/* Rounds */

static void vm_registers(struct vm *vm, char *row, int restore, int best, int prologue)
{
	for (int n = 0; n < op_count; n++)
		if (wanted(&ops[n], best, prologue, 1))
			(restore ? write_one : read_one)(&ops[n], ops[n].through_vcpu ? vm->fds[0] : vm->fd, row);
}

static void prestage(struct vm *vm, struct work *work)
{
	for (int k = 0; k < vm->vcpus; k++)
		for (int n = 0; n < op_count; n++)
			if (ops[n].prologue && !ops[n].vm)
				write_one(&ops[n], vm->fds[k], work->rows + k * work->row);
	for (int n = 0; n < op_count; n++)
		if (ops[n].prologue && ops[n].vm)
			write_one(&ops[n], ops[n].through_vcpu ? vm->fds[0] : vm->fd, work->rows + vm->vcpus * work->row);
}

static int64_t do_save(struct work *work, char *rows, int best, int threads)
{
	int64_t start = now_ns();

	all_vcpus((struct job){&work->vm, work->row, rows, 0, best, threads});
	vm_registers(&work->vm, rows + work->vm.vcpus * work->row, 0, best, 0);
	return now_ns() - start;
}

static int64_t do_restore(struct vm *vm, struct work *work, char *rows, int best, int threads)
{
	int64_t start = now_ns();

	all_vcpus((struct job){vm, work->row, rows, 1, best, threads});
	vm_registers(vm, rows + vm->vcpus * work->row, 1, best, 0);
	return now_ns() - start;
}

static int differing(struct vm *vm, struct work *work)
{
	static const char *exact[] = {"KVM_CPUID2", "KVM_SREGS2", "KVM_REGS", "KVM_XSAVE", "KVM_XCRS", "KVM_DEBUGREGS",
				      "KVM_VCPU_EVENTS", "KVM_MP_STATE"};
	char *row = calloc(1, work->row);
	int differ = 0;

	for (int k = 0; k < vm->vcpus; k++) {
		int same = 1;

		for (int n = 0; n < op_count; n++)
			for (size_t e = 0; e < sizeof exact / sizeof *exact; e++)
				if (!ops[n].vm && !strcmp(ops[n].known->name, exact[e])) {
					read_one(&ops[n], vm->fds[k], row);
					same &= !memcmp(row + ops[n].offset,
							work->rows + k * work->row + ops[n].offset, ops[n].size);
				}
		differ += !same;
	}
	free(row);
	return differ;
}

static void do_round(struct work *work, int best, int threads, int check)
{
	int64_t saved, restored;
	size_t size = (work->vm.vcpus + 1) * work->row;
	char *rows = malloc(size);
	struct vm target = vm_new(work->vm.vcpus, work->memory_size, 1, 1);

	memcpy(rows, work->rows, size);
	if (best)
		prestage(&target, work);
	if (threads > 1)
		wake_workers(threads);
	saved = do_save(work, rows, best, threads);
	restored = do_restore(&target, work, rows, best, threads);
	rest_workers();
	if (check)
		printf("%d\n", differing(&target, work));
	else
		printf("%lld %lld\n", (long long)saved, (long long)restored);
	vm_close(&target);
	free(rows);
}

/* The file: lines of text up to "values", then the rows */

static void add_op(FILE *file, const char *name)
{
	struct op *op = &ops[op_count];

	if (op_count == MAX_OPS || fscanf(file, "%zu %zu %d %d %d", &op->offset, &op->size, &op->vm, &op->through_vcpu,
					  &op->prologue) != 5)
		fail("file", name);
	for (size_t n = 0; n < sizeof known / sizeof *known; n++)
		if (!strcmp(known[n].name, name))
			op->known = &known[n];
	if (!op->known) {
		errno = ENOTSUP;
		fail("register", name);
	}
	op->count = op->known->kind == MSRS ? op->size / 8 : 0;
	for (int k = 0; k < op->count; k++)
		if (k == MAX_MSRS || fscanf(file, "%x", &op->index[k]) != 1)
			fail("file", "MSRS");
	op_count++;
}

static void load(struct work *work, int vcpus, const char *path)
{
	FILE *file = fopen(path, "rb");
	char name[64];

	if (!file || fscanf(file, "row %zu memory %zu", &work->row, &work->memory_size) != 2)
		fail("open", path);
	for (op_count = 0; fscanf(file, "%63s", name) == 1 && strcmp(name, "values");)
		add_op(file, name);
	fgetc(file);
	work->rows = malloc((vcpus + 1) * work->row);
	if (fread(work->rows, work->row, vcpus + 1, file) != (size_t)vcpus + 1)
		fail("read", path);
	fclose(file);
	work->vm = vm_new(vcpus, work->memory_size, 1, 1);
	restore_vcpus(&work->vm, 0, vcpus, work->row, work->rows, 0);
	vm_registers(&work->vm, work->rows + vcpus * work->row, 1, 0, 0);
	printf("ok\n");
}

static struct work *source_of(int vcpus)
{
	struct work *free_place = NULL;

	for (int n = 0; n < MAX_SOURCES; n++) {
		if (sources[n].rows && sources[n].vm.vcpus == vcpus)
			return &sources[n];
		if (!sources[n].rows)
			free_place = &sources[n];
	}
	return free_place;
}

int main(void)
{
	char line[4096], path[4000], mode[16];
	int vcpus, threads;

	open_kvm();
	pin(0);
	sync_offered = ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS) &
		       (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "load %d %3999s", &vcpus, path) == 2) {
			load(source_of(vcpus), vcpus, path);
		} else if (sscanf(line, "round %d %15s %d", &vcpus, mode, &threads) == 3) {
			do_round(source_of(vcpus), !strcmp(mode, "best"), threads, 0);
		} else if (sscanf(line, "check %d %15s %d", &vcpus, mode, &threads) == 3) {
			do_round(source_of(vcpus), !strcmp(mode, "best"), threads, 1);
		} else if (sscanf(line, "drop %d", &vcpus) == 1) {
			vm_close(&source_of(vcpus)->vm);
			free(source_of(vcpus)->rows);
			source_of(vcpus)->rows = NULL;
			printf("ok\n");
		} else {
			printf("unknown command\n");
		}
	}
	return 0;
}
