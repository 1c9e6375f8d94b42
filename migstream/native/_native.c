/* The compiled part of migstream: whole vCPU ranges between kernel and matrix, and the bank filter.
 *
 * Everything here has a counterpart in Python that gives the same bytes and the same answers; `migstream.native` says
 * which of the two is used. Python owns all memory; the GIL is released while the kernel or the filter works.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#define VERSION 4

/* ---- One row of a program: `migstream/backends/kvm/batch.py` packs it. ---- */

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

enum { MOST_MSRS = 256 /* KVM's own limit */, MOST_FIRST = 64 };

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
    atomic_uint next, stopped;   /* the next row; rows that an entry stopped */
};

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

static int msrs(const struct job *job, int fd, const struct entry *e, uint8_t *column, struct msrs *buffer)
{
    const uint32_t *indices = job->indices + e->extra;
    buffer->count = e->count;
    for (uint32_t k = 0; k < e->count; k++) {
        buffer->entry[k].index = indices[k];
        buffer->entry[k].value = job->writing ? word_at(column + 8 * k) : 0;
    }
    int done = ioctl(fd, e->request, buffer);
    if (done != (int)e->count)
        return done < 0 ? errno : -1;
    if (!job->writing)
        for (uint32_t k = 0; k < e->count; k++)
            memcpy(column + 8 * k, &buffer->entry[k].value, 8);
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

static int perform(const struct job *job, int fd, const struct entry *e, uint8_t *column, struct msrs *buffer)
{
    switch (e->kind) {
    case COUNTED: return counted(fd, e, column);
    case ADDRESS: return by_address(fd, e, column);
    case MSRS: return msrs(job, fd, e, column, buffer);
    case INTEGER: return integer(job, fd, e, column);
    case FIRST: return first(fd, e, column);
    default:
        memcpy(column, e->head, e->head_bytes);
        return plain(fd, e->request, column);
    }
}

/* Serve one row; 1 where an entry stopped it. */
static unsigned one_row(const struct job *job, unsigned row, struct msrs *buffer)
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
        int error = perform(job, job->fds[row], e, column, buffer);
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
                stopped += one_row(batch->jobs + k, row, buffer);
    atomic_fetch_add(&batch->stopped, stopped);
}

static void work_alone(struct batch *batch, struct msrs *buffer)
{
    unsigned stopped = 0;
    for (unsigned k = 0; k < batch->count; k++)
        for (unsigned row = 0; !batch->jobs[k].shared && row < batch->jobs[k].rows; row++)
            stopped += one_row(batch->jobs + k, row, buffer);
    atomic_fetch_add(&batch->stopped, stopped);
}

/* ---- Threads: pinned, living, spinning for a while after work, then asleep ---- */

enum { MOST_WORKERS = 255, IDLE = 0, POSTED = 1, RUNNING = 2 };
static const int64_t SPIN_NS = 2000000;

struct worker {
    pthread_t thread;
    atomic_int state;
    char apart[56];              /* workers spin on lines of their own */
    struct msrs buffer;
};

static struct {
    pthread_mutex_t owner;       /* one run at a time has the workers; another goes alone */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_int asleep;
    atomic_llong awake_until;
    struct batch *batch;
    unsigned count;
    struct worker *workers[MOST_WORKERS];
} pool = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, NULL, 0, { NULL } };

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_for_work(struct worker *self)
{
    for (unsigned spins = 0; atomic_load(&self->state) != POSTED; spins++) {
        relax();
        if (spins % 256 || now_ns() < atomic_load(&pool.awake_until))
            continue;
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.asleep, 1);
        while (atomic_load(&self->state) != POSTED && now_ns() >= atomic_load(&pool.awake_until))
            pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.asleep, 1);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void *worker_main(void *argument)
{
    struct worker *self = argument;
    for (;;) {
        wait_for_work(self);
        int expected = POSTED;
        if (atomic_compare_exchange_strong(&self->state, &expected, RUNNING)) {
            work(pool.batch, &self->buffer);
            atomic_store(&self->state, IDLE);
        }
    }
    return NULL;
}

/* The k-th of the CPUs that this thread may use, round and round. */
static void nth_cpu(const cpu_set_t *allowed, unsigned k, cpu_set_t *out)
{
    k %= (unsigned)CPU_COUNT(allowed);
    CPU_ZERO(out);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, allowed) && k-- == 0) {
            CPU_SET(cpu, out);
            return;
        }
}

static int add_worker(const cpu_set_t *allowed)
{
    struct worker *self = calloc(1, sizeof *self);
    pthread_attr_t attributes;
    sigset_t all, before;
    cpu_set_t cpu;
    if (!self)
        return 0;
    nth_cpu(allowed, pool.count + 1, &cpu);
    pthread_attr_init(&attributes);
    pthread_attr_setaffinity_np(&attributes, sizeof cpu, &cpu);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&self->thread, &attributes, worker_main, self);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (failed)
        free(self);
    else
        pool.workers[pool.count++] = self;
    return !failed;
}

/* Have so many workers, awake. With `owner` held. */
static unsigned have_workers(unsigned wanted, const cpu_set_t *allowed)
{
    atomic_store(&pool.awake_until, now_ns() + SPIN_NS);
    if (wanted > MOST_WORKERS)
        wanted = MOST_WORKERS;
    while (pool.count < wanted && add_worker(allowed))
        ;
    return wanted < pool.count ? wanted : pool.count;
}

/* The calling thread's own CPU is the first: being moved there takes long, staying there nothing. */
static void take_place(const cpu_set_t *allowed)
{
    cpu_set_t mine;
    nth_cpu(allowed, 0, &mine);
    sched_setaffinity(0, sizeof mine, &mine);
}

static void wake_sleepers(void)
{
    if (!atomic_load(&pool.asleep))
        return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* A worker that has not begun when all rows are taken is not waited for. */
static void settle(struct worker *worker)
{
    int expected = POSTED;
    if (atomic_compare_exchange_strong(&worker->state, &expected, IDLE))
        return;
    while (atomic_load(&worker->state) != IDLE)
        relax();
}

static void run_together(struct batch *batch, unsigned threads, struct msrs *buffer)
{
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    unsigned helpers = have_workers(threads - 1, &allowed);
    take_place(&allowed);
    pool.batch = batch;
    for (unsigned k = 0; k < helpers; k++)
        atomic_store(&pool.workers[k]->state, POSTED);
    wake_sleepers();
    work(batch, buffer);
    for (unsigned k = 0; k < helpers; k++)
        settle(pool.workers[k]);
    atomic_store(&pool.awake_until, now_ns() + SPIN_NS);
    sched_setaffinity(0, sizeof allowed, &allowed);
}

static void run_batch(struct batch *batch, unsigned threads)
{
    struct msrs buffer = { 0 };
    if (threads > batch->rows)
        threads = batch->rows;
    if (threads > 1 && pthread_mutex_trylock(&pool.owner) == 0) {
        run_together(batch, threads, &buffer);
        pthread_mutex_unlock(&pool.owner);
    } else {
        work(batch, &buffer);
    }
    work_alone(batch, &buffer);
}

/* A child of fork() has none of its parent's threads. */
static void forget_workers(void)
{
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.asleep, 0);
    pool.count = 0;
}

/* ---- The bank filter: `migstream.codec` says what the bytes are ---- */

static size_t bitmap_bytes(size_t words) { return (words + 63) / 64 * 8; }

/* Which words differ from row 0 anywhere: their numbers into `columns`; how many. */
static size_t differing(const uint64_t *values, size_t rows, size_t words, uint64_t *any, uint32_t *columns)
{
    size_t count = 0;
    memset(any, 0, words * 8);
    for (size_t row = 1; row < rows; row++)
        for (size_t word = 0; word < words; word++)
            any[word] |= values[row * words + word] ^ values[word];
    for (size_t word = 0; word < words; word++)
        if (any[word])
            columns[count++] = (uint32_t)word;
    return count;
}

static void put_delta(const uint64_t *values, size_t rows, size_t words, const uint32_t *columns, size_t count,
                      uint8_t *out)
{
    uint8_t *bitmap = out + words * 8;
    uint64_t *steps = (uint64_t *)(bitmap + bitmap_bytes(words));
    memcpy(out, values, words * 8);
    memset(bitmap, 0, bitmap_bytes(words));
    for (size_t k = 0; k < count; k++)
        bitmap[columns[k] / 8] |= (uint8_t)(1u << columns[k] % 8);
    for (size_t row = 1; row < rows; row++, steps++) {
        const uint64_t *now = values + row * words, *before = now - words;
        for (size_t k = 0; k < count; k++)
            steps[k * (rows - 1)] = now[columns[k]] - before[columns[k]];
    }
}

/* 0, or 1 for what is no filtered bank: the path in Python then says what is wrong. */
static int take_delta(const uint8_t *raw, size_t length, size_t rows, size_t words, uint64_t *out, uint64_t *any,
                      uint32_t *columns)
{
    size_t head = words * 8 + bitmap_bytes(words), count = 0;
    if (length < head)
        return 1;
    for (size_t bit = 0; bit < bitmap_bytes(words) * 8; bit++)
        if (raw[words * 8 + bit / 8] >> bit % 8 & 1) {
            if (bit >= words)
                return 1;
            columns[count++] = (uint32_t)bit;
        }
    if ((count && rows == 1) || length != head + count * (rows - 1) * 8)
        return 1;
    const uint64_t *steps = (const uint64_t *)(raw + head);
    memcpy(out, raw, words * 8);
    memset(any, 0, count * 8);
    for (size_t row = 1; row < rows; row++, steps++) {
        uint64_t *now = out + row * words;
        memcpy(now, raw, words * 8);
        for (size_t k = 0; k < count; k++) {
            uint64_t step = steps[k * (rows - 1)];
            any[k] |= step;
            now[columns[k]] = (now - words)[columns[k]] + step;
        }
    }
    for (size_t k = 0; k < count; k++)
        if (!any[k])
            return 1;
    return 0;
}

/* ---- Python ---- */

/* delta(values, rows, words) -> bytes */
static PyObject *delta(PyObject *module, PyObject *arguments)
{
    Py_buffer values;
    Py_ssize_t rows, words;
    PyObject *out = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nn", &values, &rows, &words))
        return NULL;
    uint64_t *any = words > 0 ? malloc((size_t)words * 12) : NULL;
    if (rows < 1 || words < 1 || words > UINT32_MAX || values.len / 8 / words != rows || values.len % (8 * words)) {
        PyErr_SetString(PyExc_ValueError, "the matrix has another shape");
    } else if (!any) {
        PyErr_NoMemory();
    } else {
        uint32_t *columns = (uint32_t *)(any + words);
        size_t count;
        Py_BEGIN_ALLOW_THREADS
        count = differing(values.buf, (size_t)rows, (size_t)words, any, columns);
        Py_END_ALLOW_THREADS
        size_t size = (size_t)words * 8 + bitmap_bytes((size_t)words) + count * ((size_t)rows - 1) * 8;
        out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
        if (out) {
            uint8_t *place = (uint8_t *)PyBytes_AsString(out);
            Py_BEGIN_ALLOW_THREADS
            put_delta(values.buf, (size_t)rows, (size_t)words, columns, count, place);
            Py_END_ALLOW_THREADS
        }
    }
    free(any);
    PyBuffer_Release(&values);
    return out;
}

/* undelta(raw, rows, words, out) -> True, or False for what is no filtered bank */
static PyObject *undelta(PyObject *module, PyObject *arguments)
{
    Py_buffer raw, out;
    Py_ssize_t rows, words;
    int wrong = -1;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nnw*", &raw, &rows, &words, &out))
        return NULL;
    uint64_t *any = words > 0 ? malloc((size_t)words * 12 + 768) : NULL;
    if (rows < 1 || words < 1 || words > UINT32_MAX || out.len / 8 / words != rows || out.len % (8 * words)) {
        PyErr_SetString(PyExc_ValueError, "the matrix has another shape");
    } else if (!any) {
        PyErr_NoMemory();
    } else {
        Py_BEGIN_ALLOW_THREADS
        wrong = take_delta(raw.buf, (size_t)raw.len, (size_t)rows, (size_t)words, out.buf, any,
                           (uint32_t *)(any + words));
        Py_END_ALLOW_THREADS
    }
    free(any);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&out);
    return wrong < 0 ? NULL : PyBool_FromLong(!wrong);
}

/* One question to a column: (word >> shift & mask) of every row is from `least` to `most`. */
struct bound { uint64_t word, shift, mask, least, most; };

static int within(const uint64_t *values, size_t rows, size_t words, const struct bound *bounds, size_t count)
{
    for (size_t k = 0; k < count; k++) {
        const struct bound *b = bounds + k;
        for (size_t row = 0; row < rows; row++) {
            uint64_t found = values[row * words + b->word] >> b->shift & b->mask;
            if (found < b->least || found > b->most)
                return 0;
        }
    }
    return 1;
}

/* bounded(values, rows, words, bounds) -> whether every value is within its bounds */
static PyObject *bounded(PyObject *module, PyObject *arguments)
{
    Py_buffer values, bounds;
    Py_ssize_t rows, words;
    int good;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nny*", &values, &rows, &words, &bounds))
        return NULL;
    size_t count = (size_t)bounds.len / sizeof(struct bound);
    const struct bound *b = bounds.buf;
    good = rows >= 0 && words > 0 && (size_t)values.len == (size_t)rows * (size_t)words * 8;
    for (size_t k = 0; good && k < count; k++)
        good = b[k].word < (size_t)words && b[k].shift < 64;
    if (!good)
        PyErr_SetString(PyExc_ValueError, "the bounds do not fit the matrix");
    PyObject *answer = good ? PyBool_FromLong(within(values.buf, (size_t)rows, (size_t)words, b, count)) : NULL;
    PyBuffer_Release(&values);
    PyBuffer_Release(&bounds);
    return answer;
}

/* Whether an entry stays within its row, its indices and a run page. */
static int fits(const struct entry *e, size_t width, size_t indices)
{
    return e->head_bytes <= 16 && (uint64_t)e->start + e->size <= width && e->count <= MOST_MSRS
           && (uint64_t)e->extra + e->count <= indices && (uint64_t)e->page + e->page_size <= 4096
           && e->page_size <= e->size && (e->kind != FIRST || (e->size >= 8 && e->size <= MOST_FIRST))
           && (!(e->flags & GATE) || e->size >= LAPIC_SPIV + 8);
}

/* A job as Python gives it: the buffers that it points into are held until all is done. */
enum { ENTRIES, INDICES, FDS, PAGES, THERE, VALUES, RESULTS, BUFFERS };

struct held {
    Py_buffer buffer[BUFFERS];
    int taken;
};

static int sound(const struct job *job, const struct held *held)
{
    const Py_buffer *b = held->buffer;
    int good = b[ENTRIES].len % (Py_ssize_t)sizeof(struct entry) == 0 && b[FDS].len % 4 == 0
               && (size_t)b[VALUES].len == (size_t)job->rows * job->width
               && (size_t)b[RESULTS].len == 8 * (size_t)job->rows
               && (!b[PAGES].len || (size_t)b[PAGES].len == 8 * (size_t)job->rows)
               && (!b[THERE].len || b[THERE].len == b[VALUES].len);
    for (unsigned k = 0; good && k < job->count; k++)
        good = fits(job->entries + k, job->width, (size_t)b[INDICES].len / 4);
    return good;
}

/* (entries, indices, fds, pages, there, values, results, width, shared) */
static int take_job(PyObject *tuple, struct held *held, struct job *job, int writing)
{
    Py_buffer *b = held->buffer;
    unsigned width;
    int shared;
    if (!PyArg_ParseTuple(tuple, "y*y*y*y*y*w*w*Ip", b, b + 1, b + 2, b + 3, b + 4, b + 5, b + 6, &width, &shared))
        return 0;
    held->taken = 1;
    *job = (struct job){
        .entries = b[ENTRIES].buf, .indices = b[INDICES].buf, .fds = b[FDS].buf,
        .pages = b[PAGES].len ? b[PAGES].buf : NULL, .there = b[THERE].len ? b[THERE].buf : NULL,
        .values = b[VALUES].buf, .results = b[RESULTS].buf, .width = width, .shared = (unsigned)shared,
        .writing = (unsigned)writing, .count = (unsigned)((size_t)b[ENTRIES].len / sizeof(struct entry)),
        .rows = (unsigned)(b[FDS].len / 4),
    };
    if (sound(job, held))
        return 1;
    PyErr_SetString(PyExc_ValueError, "the program does not fit the matrix");
    return 0;
}

static int take_jobs(PyObject *list, Py_ssize_t count, struct held *held, struct job *jobs, struct batch *batch,
                     int writing)
{
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *tuple = PyList_GetItem(list, k); /* borrowed */
        if (!tuple || !take_job(tuple, held + k, jobs + k, writing))
            return 0;
        if (jobs[k].shared && jobs[k].rows > batch->rows)
            batch->rows = jobs[k].rows;
    }
    return 1;
}

/* run(jobs, writing, threads) -> rows that were stopped */
static PyObject *run(PyObject *module, PyObject *arguments)
{
    PyObject *list, *answer = NULL;
    unsigned threads;
    int writing;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OpI", &list, &writing, &threads))
        return NULL;
    Py_ssize_t count = PyList_Size(list);
    if (count < 0)
        return NULL;
    struct held *held = calloc((size_t)count + 1, sizeof *held);
    struct job *jobs = calloc((size_t)count + 1, sizeof *jobs);
    struct batch batch = { .jobs = jobs, .count = (unsigned)count };
    if (!held || !jobs) {
        PyErr_NoMemory();
    } else if (take_jobs(list, count, held, jobs, &batch, writing)) {
        Py_BEGIN_ALLOW_THREADS
        run_batch(&batch, threads);
        Py_END_ALLOW_THREADS
        answer = PyLong_FromUnsignedLong(atomic_load(&batch.stopped));
    }
    for (Py_ssize_t k = 0; held && k < count && held[k].taken; k++)
        for (int n = 0; n < BUFFERS; n++)
            PyBuffer_Release(&held[k].buffer[n]);
    free(held);
    free(jobs);
    return answer;
}

/* warm(threads): let the workers be there and spin for a moment, so that the next run finds them awake, and the caller
 * where it will work. */
static PyObject *warm(PyObject *module, PyObject *argument)
{
    unsigned long threads = PyLong_AsUnsignedLong(argument);
    cpu_set_t allowed;
    (void)module;
    if (PyErr_Occurred())
        return NULL;
    if (threads > 1 && pthread_mutex_trylock(&pool.owner) == 0) {
        sched_getaffinity(0, sizeof allowed, &allowed);
        have_workers((unsigned)(threads < MOST_WORKERS ? threads : MOST_WORKERS) - 1, &allowed);
        wake_sleepers();
        take_place(&allowed);
        sched_setaffinity(0, sizeof allowed, &allowed);
        pthread_mutex_unlock(&pool.owner);
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    { "run", run, METH_VARARGS, NULL },
    { "warm", warm, METH_O, NULL },
    { "bounded", bounded, METH_VARARGS, NULL },
    { "delta", delta, METH_VARARGS, NULL },
    { "undelta", undelta, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static int fill(PyObject *module)
{
    pthread_atfork(NULL, NULL, forget_workers);
    return PyModule_AddIntConstant(module, "VERSION", VERSION)
        || PyModule_AddIntConstant(module, "ENTRY_SIZE", sizeof(struct entry));
}

static PyModuleDef_Slot slots[] = { { Py_mod_exec, fill }, { 0, NULL } };

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", NULL, 0, functions, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
