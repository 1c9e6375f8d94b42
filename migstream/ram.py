"""Guest RAM as runs of pages: zero pages are counted, not carried; memory use is one chunk whatever the guest's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from migstream import limits
from migstream.model import PAGE, RamRun

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory
    from migstream.model import MemoryRegion

_WINDOW_PAGES = limits.RAM_CHUNK // PAGE


def runs(memory: GuestMemory, regions: Iterable[MemoryRegion]) -> Iterator[RamRun]:
    """Give the regions' pages as ascending runs of at most `limits.RAM_CHUNK` bytes of data; data are views of RAM."""
    for region in regions:
        for start in range(region.guest_address, region.end, limits.RAM_CHUNK):
            length = min(limits.RAM_CHUNK, region.end - start)
            yield from _window(start, memory.view(start, length))


def _window(start: int, view: memoryview) -> Iterator[RamRun]:
    import numpy as np

    pages = np.frombuffer(view, np.uint64).reshape(-1, PAGE // 8)
    used = pages.any(axis=1)
    edges = [0, *(np.flatnonzero(used[1:] != used[:-1]) + 1).tolist(), len(used)]
    for first, end in zip(edges, edges[1:], strict=False):
        data = view[first * PAGE:end * PAGE] if used[first] else None
        yield RamRun(start + first * PAGE, end - first, data)


def pack(pages: Iterable[RamRun]) -> Iterator[list[RamRun]]:
    """Group runs into sections: neighbouring zero runs become one, data stays within `limits.RAM_CHUNK`."""
    group: list[RamRun] = []
    size = 0
    for run in pages:
        length = 0 if run.data is None else run.pages * PAGE
        if group and (size + length > limits.RAM_CHUNK or len(group) >= limits.MAX_RUNS):
            yield group
            group, size = [], 0
        if group and _joins(group[-1], run):
            run = RamRun(group[-1].guest_address, group.pop().pages + run.pages, None)
        group.append(run)
        size += length
    if group:
        yield group


def _joins(last: RamRun, run: RamRun) -> bool:
    return last.data is None and run.data is None and last.guest_address + last.pages * PAGE == run.guest_address


def load(memory: GuestMemory, pages: Iterable[RamRun]) -> None:
    """Put runs into guest RAM. Raises: UsageError where the VM has no RAM there."""
    for run in pages:
        if run.data is None:
            memory.zero(run.guest_address, run.pages * PAGE)
        else:
            memory.view(run.guest_address, run.pages * PAGE)[:] = run.data
