"""Guest RAM as runs of pages: zero pages are counted, not carried; one chunk is held whatever the guest's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from migstream import limits
from migstream.model import PAGE, RamRun

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory
    from migstream.model import MemoryRegion

_WINDOW_PAGES = limits.RAM_CHUNK // PAGE


def runs(memory: GuestMemory, regions: Iterable[MemoryRegion]) -> Iterator[RamRun]:
    """Give the regions' pages as ascending runs of at most `limits.RAM_CHUNK` bytes of data; data are views of RAM.

    Zero pages in a row are one run, whatever their number; no run goes beyond its region.
    """
    for region in regions:
        yield from _join_zero(_windows(memory, region))


def _windows(memory: GuestMemory, region: MemoryRegion) -> Iterator[RamRun]:
    for start in range(region.guest_address, region.end, limits.RAM_CHUNK):
        length = min(limits.RAM_CHUNK, region.end - start)
        yield from _window(start, memory.view(start, length))


def _join_zero(pieces: Iterable[RamRun]) -> Iterator[RamRun]:
    zero: RamRun | None = None
    for run in pieces:
        if run.data is None:
            zero = RamRun(zero.guest_address, zero.pages + run.pages, None) if zero else run
            continue
        if zero:
            yield zero
        zero = None
        yield run
    if zero:
        yield zero


def _window(start: int, view: memoryview) -> Iterator[RamRun]:
    import numpy as np

    pages = np.frombuffer(view, np.uint64).reshape(-1, PAGE // 8)
    used = np.asarray(pages.any(axis=1))
    edges = [0, *(np.flatnonzero(used[1:] != used[:-1]) + 1).tolist(), len(used)]
    for first, end in pairwise(edges):
        data = view[first * PAGE:end * PAGE] if used[first] else None
        yield RamRun(start + first * PAGE, end - first, data)


def pack(pages: Iterable[RamRun]) -> Iterator[list[RamRun]]:
    """Group runs into sections, each within `limits.RAM_CHUNK` bytes of data and `limits.MAX_RUNS` runs."""
    group: list[RamRun] = []
    size = 0
    for run in pages:
        length = 0 if run.data is None else run.pages * PAGE
        if group and (size + length > limits.RAM_CHUNK or len(group) >= limits.MAX_RUNS):
            yield group
            group, size = [], 0
        group.append(run)
        size += length
    if group:
        yield group


def load(memory: GuestMemory, pages: Iterable[RamRun]) -> None:
    """Put runs into guest RAM. Raises: UsageError where the VM has no RAM there."""
    for run in pages:
        if run.data is None:
            memory.zero(run.guest_address, run.pages * PAGE)
        else:
            memory.view(run.guest_address, run.pages * PAGE)[:] = run.data
