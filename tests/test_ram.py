"""Guest RAM as runs: every page once, zero pages counted, memory bounded."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise

import pytest

from migstream import limits, ram
from migstream.backends.base import GuestMemory
from migstream.errors import UsageError
from migstream.model import PAGE, MemoryRegion, RamRun

REGIONS = (MemoryRegion(0, 6 * PAGE), MemoryRegion(6 * PAGE, 3 * PAGE), MemoryRegion(1 << 32, 2 * PAGE))


def memory(regions: tuple[MemoryRegion, ...] = REGIONS) -> GuestMemory:
    """Guest RAM, all zero."""
    return GuestMemory([(region, memoryview(bytearray(region.size))) for region in regions])


def dump(guest: GuestMemory) -> list[bytes]:
    """All RAM, by region."""
    return [bytes(guest.view(region.guest_address, region.size)) for region in guest.regions]


def filled(seed: int) -> GuestMemory:
    """About half of the pages hold something; some of them in their last byte only."""
    guest, choose = memory(), random.Random(seed)
    for region in guest.regions:
        for address in range(region.guest_address, region.end, PAGE):
            if choose.random() < 0.5:
                guest.view(address + choose.choice((0, PAGE - 1)), 1)[:] = b"\x01"
    return guest


def shape(runs: list[RamRun]) -> list[tuple[int, int, bool]]:
    """Address, pages, and whether there are data."""
    return [(run.guest_address, run.pages, run.data is not None) for run in runs]


@pytest.mark.parametrize("seed", range(30))
def test_round_trip(seed: int) -> None:
    source, target = filled(seed), filled(seed + 1000)
    for group in ram.pack(ram.runs(source, source.regions)):
        ram.load(target, group)
    assert dump(target) == dump(source)


@pytest.mark.parametrize("seed", range(30))
def test_runs_cover_each_region_in_order(seed: int) -> None:
    guest = filled(seed)
    runs = list(ram.runs(guest, guest.regions))
    for region in guest.regions:
        inside = [run for run in runs if region.guest_address <= run.guest_address < region.end]
        assert inside[0].guest_address == region.guest_address
        assert [run.guest_address for run in inside[1:]] == [r.guest_address + r.pages * PAGE for r in inside[:-1]]
        assert inside[-1].guest_address + inside[-1].pages * PAGE == region.end
        assert all((a.data is None) != (b.data is None) for a, b in pairwise(inside))


def test_no_run_goes_beyond_its_region() -> None:
    """Regions side by side: a reader takes runs region by region, and a target may map each by itself."""
    guest = memory()
    assert shape(list(ram.runs(guest, guest.regions))) == [(0, 6, False), (6 * PAGE, 3, False), (1 << 32, 2, False)]


def test_zero_pages_are_one_run_over_all_windows() -> None:
    region = MemoryRegion(0, 3 * limits.RAM_CHUNK + PAGE)
    guest = memory((region,))
    guest.view(region.end - 1, 1)[:] = b"\x01"
    pages = region.size // PAGE
    assert shape(list(ram.runs(guest, [region]))) == [(0, pages - 1, False), (region.size - PAGE, 1, True)]


def test_data_are_views_of_the_guest() -> None:
    guest = memory()
    guest.view(0, 1)[:] = b"\x01"
    run = next(iter(ram.runs(guest, guest.regions)))
    guest.view(5, 1)[:] = b"\x07"
    assert run.data is not None and run.data[5] == 7


def test_sections_stay_within_their_chunk() -> None:
    page = bytes(PAGE)
    half = limits.RAM_CHUNK // PAGE // 2
    runs = [RamRun(n * half * PAGE, half, memoryview(page * half)) for n in range(5)]
    groups = list(ram.pack(runs))
    assert [len(group) for group in groups] == [2, 2, 1]
    assert [run for group in groups for run in group] == runs


def test_sections_stay_within_their_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_RUNS", 3)
    runs = [RamRun(n * 2 * PAGE, 1, None) for n in range(7)]
    assert [len(group) for group in ram.pack(runs)] == [3, 3, 1]


def test_nothing_to_pack() -> None:
    assert list(ram.pack([])) == []
    assert list(ram.runs(memory(()), ())) == []


def test_loading_where_there_is_no_ram() -> None:
    for run in (RamRun(1 << 40, 1, None), RamRun(1 << 40, 1, bytes(PAGE)), RamRun(5 * PAGE, 2, None)):
        with pytest.raises(UsageError):
            ram.load(memory(), [run])


def test_memory_does_not_grow_with_the_guest() -> None:
    region = MemoryRegion(0, 64 << 20)
    guest = memory((region,))
    guest.view(0, region.size)[::PAGE * 2] = b"\x01" * (region.size // PAGE // 2)
    tracemalloc.start()
    count = sum(len(group) for group in ram.pack(ram.runs(guest, [region])))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == region.size // PAGE
    assert peak < 4 * limits.RAM_CHUNK
