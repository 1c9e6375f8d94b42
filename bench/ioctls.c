/* Runs lists of ioctls on pinned threads and tells how long they took: what `bench.native` loads.
 *
 * All threads meet at a spinning barrier first, so that a thread's creation is not part of the time.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <time.h>

struct op {
	long fd;
	unsigned long request;
	unsigned long argument;
};

struct part {
	const struct op *ops;
	long first, end;
	long *each;	/* ns of every op, or 0 */
	long begin_ns, end_ns, failures;
	int cpu, threads;
	atomic_int *waiting;
};

static long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void timed(struct part *p)
{
	long before = now();

	for (long k = p->first; k < p->end; k++) {
		p->failures += ioctl(p->ops[k].fd, p->ops[k].request, p->ops[k].argument) < 0;
		long after = now();
		p->each[k] = after - before;
		before = after;
	}
}

static void plain(struct part *p)
{
	for (long k = p->first; k < p->end; k++)
		p->failures += ioctl(p->ops[k].fd, p->ops[k].request, p->ops[k].argument) < 0;
}

static void *work(void *argument)
{
	struct part *p = argument;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(p->cpu, &set);
	pthread_setaffinity_np(pthread_self(), sizeof set, &set);
	atomic_fetch_add(p->waiting, 1);
	while (atomic_load(p->waiting) < p->threads)
		;
	p->begin_ns = now();
	if (p->each)
		timed(p);
	else
		plain(p);
	p->end_ns = now();
	return 0;
}

/* Thread t does ops[first[t]] to ops[first[t + 1] - 1] on cpus[t]. Gives ns from the first start to the last end;
 * *failures counts ioctls that answered an error. Minus one where a thread could not be made.
 */
long run(const struct op *ops, const long *first, const int *cpus, int threads, long *each, long *failures)
{
	struct part parts[threads];
	pthread_t ids[threads];
	atomic_int waiting = 0;
	long begin, end;

	for (int t = 0; t < threads; t++) {
		parts[t] = (struct part){ ops, first[t], first[t + 1], each, 0, 0, 0, cpus[t], threads, &waiting };
		if (pthread_create(&ids[t], 0, work, &parts[t])) {
			atomic_fetch_add(&waiting, threads);
			for (int k = 0; k < t; k++)
				pthread_join(ids[k], 0);
			return -1;
		}
	}
	*failures = 0;
	for (int t = 0; t < threads; t++) {
		pthread_join(ids[t], 0);
		begin = t == 0 || parts[t].begin_ns < begin ? parts[t].begin_ns : begin;
		end = t == 0 || parts[t].end_ns > end ? parts[t].end_ns : end;
		*failures += parts[t].failures;
	}
	return end - begin;
}
