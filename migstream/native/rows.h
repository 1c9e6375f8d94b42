/* One row of a program, as `migstream/backends/kvm/batch.py` packs it, and whole batches of them. Part of _native.c. */
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

enum kind {
    STRUCT,   /* the argument is the column; `head` (head_bytes) is put there before */
    COUNTED,  /* the same, if the length that it states is within the column: head is {at, before, each, errno} */
    ADDRESS,  /* the argument is `head`, then the column's address: KVM_*_ONE_REG, KVM_*_DEVICE_ATTR */
    MSRS,     /* the argument is struct kvm_msrs, made here; `extra` is the place of the indices */
    INTEGER,  /* the argument is a 32-bit number, written only where `other` answers another */
    FIRST     /* the argument is a struct of `size` bytes: the column's first 8, then zeros */
};

enum flags {
    GATE = 1,      /* KVM_GET_LAPIC: also decides whether the run page is still the vCPU's state */
    SETTLED = 2    /* not written where the target is known to have this very value */
};

struct entry {
    uint32_t kind, start, size, head_bytes;
    uint64_t request, other;
    uint32_t extra, count;       /* MSRs: where their indices begin, and how many */
    uint32_t page, page_size;    /* taken from the run page where that is current: offset and bytes, 0 for never */
    uint32_t flags, unused;
    uint8_t head[16];
};

enum { MOST_MSRS = 255 /* KVM takes fewer than KVM_MAX_MSR_ENTRIES */, MOST_FIRST = 64 };

struct msrs {
    uint32_t count, pad;
    struct { uint32_t index, reserved; uint64_t value; } entry[MOST_MSRS];
};

struct job {
    const struct entry *entries;
    const uint32_t *indices;
    const int32_t *fds;
    const uint64_t *pages;       /* addresses of the rows' run pages, or NULL */
    const uint8_t *there;        /* what the target has, as `values`, or NULL */
    uint8_t *values;
    uint64_t *results;           /* a row: 0, or entry + 1 in the upper half and errno (short count: all ones) */
    size_t width;
    unsigned count, rows, shared, writing;
};

/* Programs that are run in one go: row after row of the shared ones by all threads, then the rows of the others. */
struct batch {
    const struct job *jobs;
    unsigned count, rows;        /* rows: of the longest shared one */
    int64_t *ns;                 /* a job: what it took; all shared ones together at the first of them */
    const struct job *carrier, *rider; /* the rider's MSRs, of the VM, are read with those of the carrier's row 0 */
    atomic_int rode;             /* it was done so */
    atomic_uint next, stopped;   /* the next row; rows that an entry stopped */
};

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- struct kvm_run of x86-64 (include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h) ---- */

enum { RUN_SREGS = 448, SREGS_CR0 = 224, SREGS_CR4 = 248, SREGS_EFER = 264, LAPIC_SPIV = 0xf0,
       CR0_PG = 1u << 31, CR4_PAE = 1 << 5, EFER_LMA = 1 << 10, SPIV_ENABLED = 1 << 8 };

static uint64_t word_at(const uint8_t *from) { uint64_t value; memcpy(&value, from, 8); return value; }

/* The page holds registers as of the last exit, and nobody wrote any since. What else changes them is an INIT, which
 * KVM_GET_MP_STATE lets happen: it was read before, and an INIT leaves the APIC disabled by software (SPIV), which only
 * a guest that runs enables again. In PAE mode KVM_SREGS2 has more than the page. */
static int page_is_current(const uint8_t *page, const uint8_t *lapic)
{
    const uint8_t *sregs = page + RUN_SREGS;
    int pae = word_at(sregs + SREGS_CR0) & CR0_PG && word_at(sregs + SREGS_CR4) & CR4_PAE
              && !(word_at(sregs + SREGS_EFER) & EFER_LMA);
    return word_at(lapic + LAPIC_SPIV) & SPIV_ENABLED && !pae;
}

/* ---- One entry for one row; 0 or an errno, -1 for a short count ---- */

static int plain(int fd, uint64_t request, void *argument)
{
    return ioctl(fd, request, argument) < 0 ? errno : 0;
}

static int counted(int fd, const struct entry *e, uint8_t *column)
{
    uint32_t rule[4], stated;
    memcpy(rule, e->head, 16);
    memcpy(&stated, column + rule[0], 4);
    return rule[1] + (uint64_t)stated * rule[2] > e->size ? (int)rule[3] : plain(fd, e->request, column);
}

static int by_address(int fd, const struct entry *e, uint8_t *column)
{
    uint64_t argument[3], address = (uintptr_t)column;
    memcpy(argument, e->head, e->head_bytes);
    memcpy((uint8_t *)argument + e->head_bytes, &address, 8);
    return plain(fd, e->request, argument);
}

static void add_msrs(struct msrs *buffer, const struct job *job, const struct entry *e, const uint8_t *column)
{
    for (uint32_t k = 0; k < e->count; k++, buffer->count++) {
        buffer->entry[buffer->count].index = job->indices[e->extra + k];
        buffer->entry[buffer->count].value = job->writing ? word_at(column + 8 * k) : 0;
    }
}

static void take_msrs(const struct msrs *buffer, uint32_t first, const struct entry *e, uint8_t *column)
{
    for (uint32_t k = 0; k < e->count; k++)
        memcpy(column + 8 * k, &buffer->entry[first + k].value, 8);
}

/* With a rider both in one ioctl. What the kernel refuses of the rider's is left to a call of its own. */
static int msrs(const struct job *job, int fd, const struct entry *e, uint8_t *column, struct msrs *buffer,
                const struct job *rider, atomic_int *rode)
{
    buffer->count = 0;
    add_msrs(buffer, job, e, column);
    if (rider)
        add_msrs(buffer, rider, rider->entries, NULL);
    int done = ioctl(fd, e->request, buffer);
    if (done < (int)e->count)
        return done < 0 ? errno : -1;
    if (!job->writing)
        take_msrs(buffer, 0, e, column);
    if (rider && done == (int)buffer->count) {
        take_msrs(buffer, e->count, rider->entries, rider->values + rider->entries->start);
        atomic_store(rode, 1);
    }
    return 0;
}

static int integer(const struct job *job, int fd, const struct entry *e, uint8_t *column)
{
    uint32_t wanted;
    int now = ioctl(fd, job->writing ? e->other : e->request, 0);
    if (now < 0)
        return errno;
    memcpy(&wanted, column, 4);
    if (!job->writing)
        memcpy(column, &now, 4);
    else if (wanted >> 31)
        return EINVAL;
    else if ((uint32_t)now != wanted && ioctl(fd, e->request, (unsigned long)wanted) < 0)
        return errno;
    return 0;
}

static int first(int fd, const struct entry *e, const uint8_t *column)
{
    uint8_t argument[MOST_FIRST] = { 0 };
    memcpy(argument, column, 8);
    return plain(fd, e->request, argument);
}

static int perform(struct batch *batch, const struct job *job, unsigned row, const struct entry *e, uint8_t *column,
                   struct msrs *buffer)
{
    int fd = job->fds[row];
    switch (e->kind) {
    case COUNTED: return counted(fd, e, column);
    case ADDRESS: return by_address(fd, e, column);
    case MSRS:
        return msrs(job, fd, e, column, buffer, job == batch->carrier && !row ? batch->rider : NULL, &batch->rode);
    case INTEGER: return integer(job, fd, e, column);
    case FIRST: return first(fd, e, column);
    default:
        memcpy(column, e->head, e->head_bytes);
        return plain(fd, e->request, column);
    }
}

/* Serve one row; 1 where an entry stopped it. */
static unsigned one_row(struct batch *batch, const struct job *job, unsigned row, struct msrs *buffer)
{
    uint8_t *values = job->values + row * job->width;
    const uint8_t *there = job->there ? job->there + row * job->width : NULL;
    const uint8_t *page = job->pages ? (const uint8_t *)(uintptr_t)job->pages[row] : NULL;
    int current = 0;
    for (unsigned k = 0; k < job->count; k++) {
        const struct entry *e = job->entries + k;
        uint8_t *column = values + e->start;
        if (there && e->flags & SETTLED && !memcmp(column, there + e->start, e->size))
            continue;
        if (current && e->page) {
            memcpy(column, page + e->page, e->page_size);
            memset(column + e->page_size, 0, e->size - e->page_size);
            continue;
        }
        int error = perform(batch, job, row, e, column, buffer);
        if (error) {
            job->results[row] = (uint64_t)(k + 1) << 32 | (uint32_t)error;
            return 1;
        }
        if (e->flags & GATE)
            current = page && page_is_current(page, column);
    }
    return 0;
}

/* A vCPU's rows of all programs come one after the other: its state is in the caches then. */
static void work(struct batch *batch, struct msrs *buffer)
{
    unsigned row, stopped = 0;
    while ((row = atomic_fetch_add(&batch->next, 1)) < batch->rows)
        for (unsigned k = 0; k < batch->count; k++)
            if (batch->jobs[k].shared && row < batch->jobs[k].rows)
                stopped += one_row(batch, batch->jobs + k, row, buffer);
    atomic_fetch_add(&batch->stopped, stopped);
}

static void work_alone(struct batch *batch, struct msrs *buffer)
{
    unsigned stopped = 0;
    for (unsigned k = 0; k < batch->count; k++) {
        int64_t start = now_ns();
        const struct job *job = batch->jobs + k;
        if (job->shared)
            continue;
        int done = job == batch->rider && atomic_load(&batch->rode);
        for (unsigned row = 0; row < job->rows && !done; row++)
            stopped += one_row(batch, job, row, buffer);
        batch->ns[k] = now_ns() - start;
    }
    atomic_fetch_add(&batch->stopped, stopped);
}

static int is_one_run(const struct job *job)
{
    return !job->shared && !job->writing && job->rows == 1 && job->count == 1 && job->entries->kind == MSRS;
}

static int carries(const struct job *job, const struct job *rider)
{
    unsigned runs = 0, fits = 0;
    for (unsigned k = 0; k < job->count; k++)
        if (job->entries[k].kind == MSRS) {
            runs++;
            fits = job->entries[k].count + rider->entries->count <= MOST_MSRS
                   && job->entries[k].request == rider->entries->request;
        }
    return job->shared && job->rows && runs == 1 && fits && job->fds[0] == rider->fds[0];
}

/* VM-wide MSRs go through a vCPU: where that one's own are read, too, an ioctl is spared. */
static void pair_up(struct batch *batch)
{
    for (unsigned r = 0; r < batch->count; r++)
        for (unsigned k = 0; is_one_run(batch->jobs + r) && k < batch->count; k++)
            if (carries(batch->jobs + k, batch->jobs + r)) {
                batch->rider = batch->jobs + r;
                batch->carrier = batch->jobs + k;
            }
}

static int64_t *first_shared(const struct batch *batch)
{
    for (unsigned k = 0; k < batch->count; k++)
        if (batch->jobs[k].shared)
            return batch->ns + k;
    return NULL;
}
