"""A program of operations as a table, and whole vCPU ranges through it with the GIL released.

The compiled part (`migstream.native`) stops a row at the first entry that the kernel refuses and says which and why;
the operations in Python then go on from there, so that both paths give the same answers.
"""

from __future__ import annotations

import enum
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from migstream.backends.base import Refusal
from migstream.native import compiled

if TYPE_CHECKING:
    from migstream.backends.kvm.operations import Operation, Row, Rows
    from migstream.backends.kvm.uapi import Request
    from migstream.model import Words

_ENTRY = struct.Struct("<4I2Q6I16s")
MOST_MSRS = 255
"""Of one KVM_GET_MSRS or KVM_SET_MSRS: KVM refuses KVM_MAX_MSR_ENTRIES, 256, with E2BIG."""

PER_THREAD = 4
"""vCPUs that are worth a thread: a spinning worker paid from 4 vCPUs in a C trial; not measured with this code."""


class Kind(enum.IntEnum):
    """What the ioctl's argument is; the numbers of `enum kind` in `_native.c`."""

    STRUCT = 0
    COUNTED = 1
    ADDRESS = 2
    MSRS = 3
    INTEGER = 4
    FIRST = 5


class Flag(enum.IntFlag):
    """What else an entry is; the numbers of `enum flags` in `_native.c`."""

    GATE = 1
    """KVM_GET_LAPIC of a read: where it shows that no INIT came, columns after it are taken from the run page."""
    SETTLED = 2
    """Not written where the target was read to have this very value."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One ioctl of a row.

    Attributes:
        start, size: the column, bytes of the row. request: the ioctl; `other`: the one that asks first (INTEGER).
        head: what stands before the value or address, or (COUNTED) where the length is and how it counts.
        msrs: indices of a run of MSRs. page, page_size: where the run page has the column's start, 0 for nowhere; the
            rest of the column is zero then.
    """

    kind: Kind
    start: int
    size: int
    request: Request
    other: int = 0
    head: bytes = b""
    msrs: tuple[int, ...] = ()
    page: int = 0
    page_size: int = 0
    flags: int = 0


class Job(NamedTuple):
    """A table and the rows that it is to serve; `packed` is the same for the compiled part."""

    table: Table
    rows: Rows
    results: bytearray
    packed: tuple[object, ...]

    def refused(self) -> list[Refusal]:
        """What was refused, in the order of the rows; the rest of a row that was stopped is done now."""
        results = struct.unpack(f"{len(self.rows)}Q", self.results)
        self.results[:] = bytes(len(self.results))
        return [no for k, result in enumerate(results) if result for no in self.table.go_on(self.rows[k], result)]


class Batch:
    """Jobs that are done in one call, all of which read or all write.

    The rows of vCPUs are shared among the threads, those of one vCPU one after the other; the VM's come last.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        assert compiled is not None
        self._jobs = jobs
        self.ns = array("q", bytes(8 * len(jobs)))
        """What each job took at the last `run`; the vCPUs' all together at the first of theirs."""
        self._made = compiled.prepare([job.packed for job in jobs], bool(jobs) and jobs[0].table.writing, self.ns)

    def run(self, threads: int) -> list[Refusal]:
        """Serve all rows, and return what was refused, in the order of the jobs."""
        assert compiled is not None
        if not compiled.run(self._made, threads):
            return []
        return [no for job in self._jobs for no in job.refused()]


class Table:
    """A program in the form that the compiled part reads, with the operations that it stands for."""

    def __init__(self, program: Sequence[tuple[Entry, Operation]], writing: bool) -> None:
        indices = array("I")
        packed = []
        for e, _ in program:
            packed.append(_ENTRY.pack(e.kind, e.start, e.size, len(e.head), e.request.number, e.other, len(indices),
                                      len(e.msrs), e.page, e.page_size, e.flags, 0, e.head))
            indices.extend(e.msrs)
        self._program, self.writing = program, writing
        self._entries, self._indices = b"".join(packed), indices.tobytes()
        self.length = len(program)

    def job(self, rows: Rows, pages: bytes | memoryview = b"", there: Words | None = None) -> Job:
        """All rows of a matrix, to be run.

        Args:
            pages: addresses of the rows' run pages, 0 where one may not be used (see `Flag.GATE`); empty for none. What
                is in it when the job runs counts.
            there: what the target has, a matrix like the rows' (see `Flag.SETTLED`), if that is known.
        """
        results, has = bytearray(8 * len(rows)), b"" if there is None else there.data
        return Job(self, rows, results, (self._entries, self._indices, rows.fds, pages, has, rows.values.data, results,
                                         rows.values.shape[1] * 8, rows.of_vcpus))

    def go_on(self, row: Row, result: int) -> list[Refusal]:
        """Name the refusal and do the rest of the row in Python. A run of MSRs is done again: it names each."""
        at, number = (result >> 32) - 1, result & 0xFFFF_FFFF
        entry, operation = self._program[at]
        if entry.msrs:
            at -= 1
            refused = []
        else:
            refused = [Refusal(operation.id, row.vcpu, entry.request.name, number)]
        rest = (operation for _, operation in self._program[at + 1:])
        return refused + [no for op in rest for no in (op.write(row) if self.writing else op.read(row))]


def make_table(operations: Sequence[Operation], writing: bool) -> Table | None:
    """The operations as a table; None where one of them can't be in it, or nothing compiled is there."""
    if compiled is None:
        return None
    program: list[tuple[Entry, Operation]] = []
    for operation in operations:
        entry = operation.entry(writing)
        if entry is None or len(entry.msrs) > MOST_MSRS:
            return None
        program.append((entry, operation))
    return Table(program, writing)


def default_threads(vcpus: int) -> int:
    """One for every `PER_THREAD` vCPUs, as many as there are CPUs for this process."""
    return max(1, min(len(os.sched_getaffinity(0)), vcpus // PER_THREAD))


def warm(threads: int) -> None:
    """Have the threads awake for the next call, which is about to come."""
    if compiled is not None:
        compiled.warm(threads)
