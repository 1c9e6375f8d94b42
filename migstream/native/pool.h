/* Threads: pinned, living, spinning for a while after work, then asleep. Part of _native.c. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>

#include "rows.h"

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
    int64_t start = now_ns(), *ns = first_shared(batch);
    if (threads > batch->rows)
        threads = batch->rows;
    if (threads > 1 && pthread_mutex_trylock(&pool.owner) == 0) {
        run_together(batch, threads, &buffer);
        pthread_mutex_unlock(&pool.owner);
    } else {
        work(batch, &buffer);
    }
    if (ns)
        *ns = now_ns() - start;
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
