/* The compiled part of migstream: whole vCPU ranges between kernel and matrix, and the bank filter.
 *
 * Everything here has a counterpart in Python that gives the same bytes and the same answers; `migstream.native` says
 * which of the two is used. Python owns all memory; the GIL is released while the kernel or the filter works.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <stdlib.h>

#include "pool.h"
#include "sections.h"

#define VERSION 6

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
    good = rows >= 0 && words > 0 && words <= UINT32_MAX && rows <= UINT32_MAX && values.len % (words * 8) == 0
           && values.len / (words * 8) == rows && bounds.len % (Py_ssize_t)sizeof(struct bound) == 0;
    for (size_t k = 0; good && k < count; k++)
        good = b[k].word < (size_t)words && b[k].shift < 64;
    if (!good)
        PyErr_SetString(PyExc_ValueError, "the bounds do not fit the matrix");
    PyObject *answer = good ? PyBool_FromLong(within(values.buf, (size_t)rows, (size_t)words, b, count)) : NULL;
    PyBuffer_Release(&values);
    PyBuffer_Release(&bounds);
    return answer;
}

/* Small banks with all their buffers, borrowed once and kept: what they are is in sections.h. */
struct small {
    size_t count;
    struct bank *banks;
    struct lent { Py_buffer head, values, bounds; int taken; } *lent;
    uint64_t *scratch;           /* for the widest; the GIL is held while it is used */
};

static const char SMALL[] = "migstream small banks";

static void let_small_go(struct small *small)
{
    for (size_t k = 0; small->lent && k < small->count && small->lent[k].taken; k++) {
        PyBuffer_Release(&small->lent[k].head);
        PyBuffer_Release(&small->lent[k].values);
        PyBuffer_Release(&small->lent[k].bounds);
    }
    free(small->banks);
    free(small->lent);
    free(small->scratch);
    free(small);
}

static void drop_small(PyObject *capsule) { let_small_go(PyCapsule_GetPointer(capsule, SMALL)); }

static int is_tuple(PyObject *object)
{
    if (object && !PyTuple_Check(object))
        PyErr_SetString(PyExc_TypeError, "a list of tuples");
    return object && PyTuple_Check(object);
}

static int bounds_fit(const struct bank *bank)
{
    for (size_t k = 0; k < bank->bound_count; k++)
        if (bank->bounds[k].word >= bank->words || bank->bounds[k].shift >= 64)
            return 0;
    return 1;
}

/* (head, values, words, bounds); the width, or 0 */
static size_t borrow(PyObject *tuple, const char *format, struct lent *lent, struct bank *bank)
{
    Py_ssize_t words;
    if (!is_tuple(tuple) || !PyArg_ParseTuple(tuple, format, &lent->head, &lent->values, &words, &lent->bounds))
        return 0;
    lent->taken = 1;
    size_t row = words > 0 && words <= UINT32_MAX ? (size_t)words * 8 : SIZE_MAX, size = (size_t)lent->values.len;
    *bank = (struct bank){ .values = lent->values.buf, .rows = size / row, .words = (size_t)words,
                           .bounds = lent->bounds.buf, .bound_count = (size_t)lent->bounds.len / sizeof(struct bound) };
    if (!bank->rows || size % row || lent->head.len != HEAD || lent->bounds.len % (Py_ssize_t)sizeof(struct bound)
        || !bounds_fit(bank)) {
        PyErr_SetString(PyExc_ValueError, "the bank does not fit its matrix");
        return 0;
    }
    memcpy(&bank->head, lent->head.buf, HEAD);
    return bank->words;
}

static int borrow_all(PyObject *list, struct small *small, int filled)
{
    size_t widest = 0;
    for (size_t k = 0; k < small->count; k++) {
        PyObject *tuple = PyList_GetItem(list, (Py_ssize_t)k); /* borrowed */
        size_t words = borrow(tuple, filled ? "y*w*ny*" : "y*y*ny*", small->lent + k, small->banks + k);
        if (!words)
            return 0;
        widest = words > widest ? words : widest;
    }
    small->scratch = malloc(widest * 12 + 768);
    if (!small->scratch)
        PyErr_NoMemory();
    return small->scratch != NULL;
}

/* small(banks, filled) -> what `pack` and `unpack` are given; banks that will be `filled` have memory for that */
static PyObject *small(PyObject *module, PyObject *arguments)
{
    PyObject *list, *answer = NULL;
    int filled;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O!p", &PyList_Type, &list, &filled))
        return NULL;
    struct small *made = calloc(1, sizeof *made);
    if (!made)
        return PyErr_NoMemory();
    made->count = (size_t)PyList_Size(list);
    made->banks = calloc(made->count + 1, sizeof *made->banks);
    made->lent = calloc(made->count + 1, sizeof *made->lent);
    if (!made->banks || !made->lent)
        PyErr_NoMemory();
    else if (borrow_all(list, made, filled))
        answer = PyCapsule_New(made, SMALL, drop_small);
    if (!answer)
        let_small_go(made);
    return answer;
}

/* What both directions are given: the banks from one of them on, how far the stream is (it is brought up to date), and
 * the end's header where the end may follow. */
struct course {
    const struct small *small;
    size_t first, done, offset;
    Py_buffer counts, end;
    struct counts now;
    struct head last;
};

static int sound_course(struct course *course, PyObject *capsule)
{
    course->small = PyCapsule_GetPointer(capsule, SMALL);
    if (!course->small)
        return 0;
    if (course->first <= course->small->count && course->counts.len == sizeof course->now
        && (course->end.len == HEAD || !course->end.len)) {
        memcpy(&course->now, course->counts.buf, sizeof course->now);
        memcpy(&course->last, course->end.buf, (size_t)course->end.len);
        return 1;
    }
    PyErr_SetString(PyExc_ValueError, "no counts, no header, or no such bank");
    return 0;
}

/* Bring the caller's counts up to date, and give the buffers back. */
static void end_course(struct course *course)
{
    if (course->done)
        memcpy(course->counts.buf, &course->now, sizeof course->now);
    PyBuffer_Release(&course->counts);
    PyBuffer_Release(&course->end);
}

static void step(struct course *course, size_t length)
{
    course->done += length > 0;
    course->offset += length;
}

enum { MOST_WORTH = 1 << 24 };

static size_t room_for(const struct course *course, size_t worth)
{
    return (course->small->count - course->first) * (HEAD + worth) + HEAD + sizeof(struct counts);
}

static void put_all(struct course *course, uint8_t *out, size_t worth)
{
    const struct small *small = course->small;
    size_t length = 1;
    for (size_t k = course->first; k < small->count && length; k++)
        step(course, length = put_bank(small->banks + k, worth, out + course->offset, &course->now, small->scratch));
    if (length && course->end.len)
        step(course, put_end(course->last, out + course->offset, &course->now));
}

static void take_all(struct course *course, const uint8_t *data, size_t size)
{
    const struct small *small = course->small;
    size_t length = 1;
    for (size_t k = course->first; k < small->count && length; k++)
        step(course, length = take_bank(small->banks + k, data + course->offset, size - course->offset, &course->now,
                                        small->scratch));
    if (length && course->end.len)
        step(course, take_end(course->last, data + course->offset, size - course->offset, &course->now));
}

/* pack(small, first, counts, end, worth) -> (bytes, sections) */
static PyObject *pack(PyObject *module, PyObject *arguments)
{
    struct course course = { .done = 0 };
    Py_ssize_t first, worth;
    PyObject *capsule, *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "Onw*y*n", &capsule, &first, &course.counts, &course.end, &worth))
        return NULL;
    course.first = (size_t)first;
    if (worth < 0 || worth > MOST_WORTH) {
        PyErr_SetString(PyExc_ValueError, "nothing of that length is small");
    } else if (sound_course(&course, capsule)) {
        uint8_t *out = malloc(room_for(&course, (size_t)worth));
        if (out) {
            put_all(&course, out, (size_t)worth);
            answer = Py_BuildValue("y#n", out, (Py_ssize_t)course.offset, (Py_ssize_t)course.done);
        } else {
            PyErr_NoMemory();
        }
        free(out);
    }
    end_course(&course);
    return answer;
}

/* unpack(small, first, counts, end, data) -> sections */
static PyObject *unpack(PyObject *module, PyObject *arguments)
{
    struct course course = { .done = 0 };
    Py_ssize_t first;
    Py_buffer data;
    PyObject *capsule, *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "Onw*y*y*", &capsule, &first, &course.counts, &course.end, &data))
        return NULL;
    course.first = (size_t)first;
    if (sound_course(&course, capsule)) {
        take_all(&course, data.buf, (size_t)data.len);
        answer = PyLong_FromSize_t(course.done);
    }
    end_course(&course);
    PyBuffer_Release(&data);
    return answer;
}

/* checksum(data, portable) -> CRC-32C */
static PyObject *checksum(PyObject *module, PyObject *arguments)
{
    Py_buffer data;
    int portable;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*p", &data, &portable))
        return NULL;
    uint32_t crc = (portable ? crc_portable : crc32c)(0, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static int counts_within(const struct entry *e)
{
    uint32_t at;
    memcpy(&at, e->head, 4);
    return (uint64_t)at + 4 <= e->size;
}

/* Whether an entry stays within its row, its indices and a run page. */
static int fits(const struct entry *e, size_t width, size_t indices)
{
    return e->head_bytes <= 16 && (uint64_t)e->start + e->size <= width && e->count <= MOST_MSRS
           && (uint64_t)e->extra + e->count <= indices && (uint64_t)e->page + e->page_size <= 4096
           && e->page_size <= e->size && (e->kind != FIRST || (e->size >= 8 && e->size <= MOST_FIRST))
           && (!(e->flags & GATE) || e->size >= LAPIC_SPIV + 8) && (e->kind != STRUCT || e->head_bytes <= e->size)
           && (e->kind != MSRS || e->count * 8 <= e->size) && (e->kind != INTEGER || e->size >= 4)
           && (e->kind != COUNTED || counts_within(e));
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

/* Jobs with all their buffers, borrowed once and kept, because that takes as long as some of the ioctls. */
struct kept {
    struct batch batch;
    struct held *held;
    Py_buffer ns;
};

static const char KEPT[] = "migstream batch";

static void let_go(struct kept *kept)
{
    for (unsigned k = 0; kept->held && k < kept->batch.count && kept->held[k].taken; k++)
        for (int n = 0; n < BUFFERS; n++)
            PyBuffer_Release(&kept->held[k].buffer[n]);
    PyBuffer_Release(&kept->ns);
    free(kept->held);
    free((void *)kept->batch.jobs);
    free(kept);
}

static void drop(PyObject *capsule) { let_go(PyCapsule_GetPointer(capsule, KEPT)); }

static int take_jobs(PyObject *list, struct kept *kept, struct job *jobs, int writing)
{
    for (unsigned k = 0; k < kept->batch.count; k++) {
        PyObject *tuple = PyList_GetItem(list, (Py_ssize_t)k); /* borrowed */
        if (!is_tuple(tuple) || !take_job(tuple, kept->held + k, jobs + k, writing))
            return 0;
        if (jobs[k].shared && jobs[k].rows > kept->batch.rows)
            kept->batch.rows = jobs[k].rows;
    }
    return 1;
}

/* prepare(jobs, writing, ns) -> what `run` is given; `ns` gets 8 bytes a job then (see `struct batch`) */
static PyObject *prepare(PyObject *module, PyObject *arguments)
{
    PyObject *list, *answer = NULL;
    struct kept *kept = calloc(1, sizeof *kept);
    int writing;
    (void)module;
    if (!kept)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(arguments, "O!pw*", &PyList_Type, &list, &writing, &kept->ns)) {
        free(kept);
        return NULL;
    }
    size_t count = (size_t)PyList_Size(list);
    struct job *jobs = calloc(count + 1, sizeof *jobs);
    kept->held = calloc(count + 1, sizeof *kept->held);
    kept->batch = (struct batch){ .jobs = jobs, .count = (unsigned)count, .ns = kept->ns.buf };
    if (!kept->held || !jobs)
        PyErr_NoMemory();
    else if ((size_t)kept->ns.len != count * 8)
        PyErr_SetString(PyExc_ValueError, "8 bytes a job");
    else if (take_jobs(list, kept, jobs, writing)) {
        pair_up(&kept->batch);
        answer = PyCapsule_New(kept, KEPT, drop);
    }
    if (!answer)
        let_go(kept);
    return answer;
}

/* run(batch, threads) -> rows that were stopped */
static PyObject *run(PyObject *module, PyObject *arguments)
{
    PyObject *capsule;
    unsigned threads;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OI", &capsule, &threads))
        return NULL;
    const struct kept *kept = PyCapsule_GetPointer(capsule, KEPT);
    if (!kept)
        return NULL;
    struct batch batch = { .jobs = kept->batch.jobs, .count = kept->batch.count, .rows = kept->batch.rows,
                           .ns = kept->batch.ns, .carrier = kept->batch.carrier, .rider = kept->batch.rider };
    Py_BEGIN_ALLOW_THREADS
    run_batch(&batch, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(atomic_load(&batch.stopped));
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
    { "prepare", prepare, METH_VARARGS, NULL },
    { "run", run, METH_VARARGS, NULL },
    { "warm", warm, METH_O, NULL },
    { "bounded", bounded, METH_VARARGS, NULL },
    { "delta", delta, METH_VARARGS, NULL },
    { "undelta", undelta, METH_VARARGS, NULL },
    { "small", small, METH_VARARGS, NULL },
    { "pack", pack, METH_VARARGS, NULL },
    { "unpack", unpack, METH_VARARGS, NULL },
    { "checksum", checksum, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static int fill(PyObject *module)
{
    pthread_atfork(NULL, NULL, forget_workers);
    choose_crc();
    return PyModule_AddIntConstant(module, "VERSION", VERSION)
        || PyModule_AddIntConstant(module, "ENTRY_SIZE", sizeof(struct entry));
}

static PyModuleDef_Slot slots[] = { { Py_mod_exec, fill }, { 0, NULL } };

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", NULL, 0, functions, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
