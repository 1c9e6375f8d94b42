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

#include "filter.h"
#include "pool.h"

#define VERSION 5

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
