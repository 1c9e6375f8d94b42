"""Hypothesis strategies: models of saved VMs, matrices as guests have them, ways to cut and to break bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from migstream.contract import FOUND, Behaviour
from migstream.model import (
    PAGE,
    Arch,
    Bank,
    HostSummary,
    Layout,
    Machine,
    MemoryRegion,
    OpaqueState,
    Phase,
    RamRun,
    Scope,
    Slot,
)
from migstream.registers import ids
from migstream.sections import RamLayout
from tests import build

# How long an example takes is the machine's business; `test_hostile` has a guard of its own against hangs.
settings.register_profile("migstream", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("migstream")

words = st.integers(0, 2**64 - 1)
edge_words = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]) | words
chunk_sizes = st.lists(st.integers(1, 200), max_size=60)
levels = st.sampled_from([-7, -5, 0, 1, 3, 19])
filters = st.sampled_from([0, 1, 2])

# How a register looks over the vCPUs: one value, a step, one vCPU that differs, noise.
_COLUMNS: tuple[Callable[[int, int, int], list[int]], ...] = (
    lambda rows, a, b: [a] * rows,
    lambda rows, a, b: [(a + b * k) % 2**64 for k in range(rows)],
    lambda rows, a, b: [a] * (rows - 1) + [b],
    lambda rows, a, b: [b] + [a] * (rows - 1),
    lambda rows, a, b: [pow(a | 1, k + 1, 2**64) ^ b for k in range(rows)],
)


@st.composite
def matrices(draw: st.DrawFn, rows: int | None = None, width: int | None = None) -> Any:
    """vCPU by word, C-contiguous uint64."""
    rows = draw(st.integers(1, 12)) if rows is None else rows
    width = draw(st.integers(1, 70)) if width is None else width
    shapes = draw(st.lists(st.sampled_from(_COLUMNS), min_size=width, max_size=width))
    seed = draw(st.lists(edge_words, min_size=2, max_size=2))
    columns = [shape(rows, (seed[0] + n) % 2**64, seed[1]) for n, shape in enumerate(shapes)]
    return np.ascontiguousarray(np.array(columns, np.uint64).T)


_MSR_IDS = st.integers(0x9000_0000, 0x9000_00FF).map(ids.msr_id)


@st.composite
def behaviours(draw: st.DrawFn) -> Behaviour:
    """A contract section."""
    values = draw(st.dictionaries(_MSR_IDS, st.binary(min_size=8, max_size=8), max_size=4))
    how = {id: draw(text.filter(bool)) for id in values if draw(st.booleans())}
    answers = draw(st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), max_size=4))
    return Behaviour(draw(st.sampled_from(FOUND)), values, how, answers, tuple(draw(st.lists(text, max_size=2))))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
hosts = st.builds(HostSummary, text, text, text, st.lists(text, max_size=3).map(tuple))
opaque = st.builds(OpaqueState, text, st.binary(max_size=100))
devices = st.dictionaries(text, st.booleans() | st.integers(-2**63, 2**64 - 1) | text, max_size=4)

_UNKNOWN = [Slot(ids.struct_id(Arch.X86_64, 0x8000 + n), size) for n, size in enumerate((1, 3, 4, 8, 9, 40, 100))]
_MSRS = [Slot(ids.msr_id(0x9000_0000 + n), 8) for n in range(40)]  # numbers that no row has: any scope
_PLACES = [(phase, scope) for phase in Phase for scope in (Scope.VM, Scope.VCPU)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, ...]:
    """Layouts in the order of a stream, no register twice."""
    slots = draw(st.permutations([*_UNKNOWN, *_MSRS]))
    places = sorted(draw(st.lists(st.sampled_from(_PLACES), max_size=4)), key=lambda place: place[0])
    out, start = [], 0
    for phase, scope in places:
        count = draw(st.integers(1, 8))
        out.append(Layout(scope, phase, tuple(slots[start:start + count])))
        start += count
    return tuple(out)


def _masked(layout: Layout, values: Any) -> Any:
    """The same with zeros past each register's size."""
    for column, slot in enumerate(layout.slots):
        if slot.size % 8:
            values[:, layout.offsets[column + 1] - 1] &= np.uint64((1 << 8 * (slot.size % 8)) - 1)
    return values


@st.composite
def _banks(draw: st.DrawFn, layout: Layout, vcpus: int) -> list[Bank]:
    rows = vcpus if layout.scope == Scope.VCPU else 1
    values = _masked(layout, draw(matrices(rows, layout.row_words)))
    cut = draw(st.integers(0, rows - 1))
    ranges = [(0, cut), (cut, rows)] if cut else [(0, rows)]
    return [Bank(layout, first, np.ascontiguousarray(values[first:end])) for first, end in ranges]


@st.composite
def _ram(draw: st.DrawFn) -> tuple[tuple[MemoryRegion, ...], tuple[RamRun, ...]]:
    """Regions of a few pages, some side by side, and their runs."""
    regions, runs, address = [], [], 0
    for pages in draw(st.lists(st.integers(1, 3), max_size=3)):
        address += PAGE * draw(st.integers(0, 2))
        regions.append(MemoryRegion(address, pages * PAGE))
        for page in range(pages):
            fill = draw(st.sampled_from([None, 0, 7]))
            runs.append(RamRun(address + page * PAGE, 1, None if fill is None else build.page(fill)))
        address += pages * PAGE
    return tuple(regions), tuple(runs)


@st.composite
def saved(draw: st.DrawFn) -> build.Saved:
    """A whole VM."""
    vcpus = draw(st.integers(1, 6))
    regions, runs = draw(_ram())
    found = draw(layouts())
    banks = [bank for layout in found for bank in draw(_banks(layout, vcpus))]
    banks += [Bank(layout, 0, _masked(layout, draw(matrices(1, layout.row_words))), update=True)
              for layout in found if layout.scope == Scope.VM and layout.phase.prologue and draw(st.booleans())]
    return build.Saved(
        Machine(Arch.X86_64, vcpus, regions, draw(devices)), draw(st.none() | hosts), draw(st.none() | behaviours()),
        found, tuple(sorted(banks, key=_bank_place)), RamLayout(regions) if regions else None, runs,
        tuple(draw(st.lists(opaque, max_size=2))))


def _bank_place(bank: Bank) -> int:
    return 1 if bank.update else 2 * (not bank.layout.phase.prologue)


# Ways to break a stream; the checksums are made right afterwards, so that the layers above them are reached.

EDGES = (0, 1, 7, 8, 0x7F, 0x80, 0xFF, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@st.composite
def broken(draw: st.DrawFn, streams: list[bytes]) -> bytes:
    """A good stream with some bytes changed, numbers put in, pieces cut out or repeated; checksums right again."""
    data = draw(st.sampled_from(streams))
    for _ in range(draw(st.integers(1, 4))):
        data = draw(st.sampled_from(_BREAKS))(draw, data)
    return build.resum(data)


def _place(draw: st.DrawFn, data: bytes) -> int:
    """Anywhere, or near the beginning of a section, where the lengths and counts are."""
    starts = build.offsets(data) or [0]
    near = st.tuples(st.sampled_from(starts), st.integers(0, 80)).map(sum)
    return min(draw(near | st.integers(8, max(len(data), 8))), len(data))  # a wrong magic is soon found


def _byte(draw: st.DrawFn, data: bytes) -> bytes:
    at = _place(draw, data)
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1:]


def _number(draw: st.DrawFn, data: bytes) -> bytes:
    at, code = _place(draw, data), draw(st.sampled_from("BHIQ"))
    value = draw(st.sampled_from(EDGES)) % (1 << 8 * struct.calcsize(code))
    return data[:at] + struct.pack(f"<{code}", value) + data[at + struct.calcsize(code):]


def _cut(draw: st.DrawFn, data: bytes) -> bytes:
    at = _place(draw, data)
    return data[:at] + data[at + 8 * draw(st.integers(1, 8)):]


def _section(draw: st.DrawFn, data: bytes) -> bytes:
    """A section twice, taken out, or moved."""
    starts = [*build.offsets(data), len(data)]
    if len(starts) < 2:
        return data
    n = draw(st.integers(0, len(starts) - 2))
    piece, rest = data[starts[n]:starts[n + 1]], data[:starts[n]] + data[starts[n + 1]:]
    at = draw(st.sampled_from([start for start in starts if start <= len(rest)] or [0]))
    return draw(st.sampled_from([rest, data[:starts[n]] + piece + data[starts[n]:], rest[:at] + piece + rest[at:]]))


_BREAKS: tuple[Callable[[st.DrawFn, bytes], bytes], ...] = (_byte, _number, _cut, _section)
