"""The compiled batch against the operations in Python: threads, fork, run pages, what a fresh vCPU has already."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from migstream.backends.kvm import KvmBackend, uapi
from migstream.backends.kvm.backend import KvmVm
from migstream.backends.kvm.batch import Flag, Kind
from migstream.demo import guest_x86_64 as guest
from migstream.model import Bank, Layout
from migstream.native import compiled
from migstream.registers import ids, x86_64
from tests.contract.access import machine, run_a_little

if TYPE_CHECKING:
    from migstream.model import Words

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(compiled is None, reason="nothing compiled is here")]

SIGNAL_MSI, INIT = 0x4020AEA5, 0x4500
"""KVM_SIGNAL_MSI; level assert and delivery mode INIT (Intel SDM 3A, 11.11.2)."""

SPIV, ENABLED = 0xF0, 1 << 8
LSTAR, TSC = ids.msr_id(0xC0000082), ids.msr_id(0x10)
RUNS_ON = frozenset((TSC, x86_64.LAPIC.id, ids.msr_id(0x4000_0010)))
"""Of a guest that stands still: its time; HV_X64_MSR_VP_RUNTIME is the time of whoever asks."""


@pytest.fixture
def vm() -> Iterator[KvmVm]:
    """Five vCPUs that never ran, with the demo's guest, on the compiled path."""
    backend = KvmBackend()
    with backend.create(machine(5), {}) as made:
        made.create_vcpus()
        guest.install(made, backend.profile().cpuid, backend.profile().capabilities)
        yield made


def state_of(vm: KvmVm) -> Layout:
    return next(layout for layout in vm.layouts()[0] if x86_64.REGS.id in layout.index)


def cut(layout: Layout, *wanted: int) -> Layout:
    return Layout(layout.scope, layout.phase, tuple(slot for slot in layout.slots if slot.id in wanted))


def read(vm: KvmVm, layout: Layout) -> Words:
    values = np.zeros((vm.machine.vcpus, layout.row_words), np.uint64)
    assert vm.read(layout, 0, values) == []
    return values


def words(layout: Layout, id: int) -> slice:
    at = layout.offsets[layout.index[id]]
    return slice(at, at + layout.slots[layout.index[id]].words)


def enable_apics(vm: KvmVm) -> None:
    lapic = cut(state_of(vm), x86_64.LAPIC.id)
    values = read(vm, lapic)
    values[:, SPIV // 8] |= np.uint64(ENABLED)
    assert vm.write(lapic, 0, values) == []


def run_and_mark_pages(vm: KvmVm) -> None:
    """Let the guest run, then put a RAX into each run page that no vCPU has: who reads it read the page."""
    run_a_little(vm)
    for page in vm._run_pages:
        struct.pack_into("<Q", page, uapi.RUN_REGS, 0x5EED)


def rax(vm: KvmVm) -> list[int]:
    layout = state_of(vm)
    return [int(value) for value in read(vm, layout)[:, words(layout, x86_64.REGS.id).start]]


# The run page


def test_the_run_page_has_what_the_ioctls_say(vm: KvmVm) -> None:
    enable_apics(vm)
    run_a_little(vm)
    layout = state_of(vm)
    through_page = read(vm, layout)
    assert any(vm._pages)
    vm._pages[:] = bytes(len(vm._pages))
    by_ioctl = read(vm, layout)
    for slot in layout.slots:
        if slot.id not in RUNS_ON:
            part = words(layout, slot.id)
            assert (through_page[:, part] == by_ioctl[:, part]).all(), hex(slot.id)


def test_general_registers_come_from_the_page_of_a_guest_that_ran(vm: KvmVm) -> None:
    enable_apics(vm)
    assert 0x5EED not in rax(vm), "it never ran"
    run_and_mark_pages(vm)
    assert rax(vm) == [0x5EED] * 5


def test_a_vcpu_whose_apic_is_not_enabled_is_asked(vm: KvmVm) -> None:
    run_and_mark_pages(vm)
    assert 0x5EED not in rax(vm)


def test_a_kernel_that_offers_half_of_it_is_asked(vm: KvmVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vm.backend.profile().capabilities, "SYNC_REGS", 1)
    enable_apics(vm)
    run_and_mark_pages(vm)
    assert 0x5EED not in rax(vm)


def test_what_was_written_since_is_not_taken_from_the_page(vm: KvmVm) -> None:
    enable_apics(vm)
    run_and_mark_pages(vm)
    star = cut(state_of(vm), LSTAR)
    assert vm.write(star, 0, read(vm, star)) == []
    assert 0x5EED not in rax(vm)


def test_an_init_that_came_after_the_pause_is_seen(vm: KvmVm) -> None:
    """Reading MP_STATE lets it happen: the page then has the registers of a vCPU that is no more."""
    enable_apics(vm)
    run_and_mark_pages(vm)
    fcntl.ioctl(vm.fd, SIGNAL_MSI, struct.pack("<4I16x", 0xFEE0_0000 | 3 << 12, 0, INIT, 0))
    layout = state_of(vm)
    values = read(vm, layout)
    first = words(layout, x86_64.REGS.id).start
    assert [int(row[first]) == 0x5EED for row in values] == [True, True, True, False, True]
    assert int(values[3][first + 16]) == 0xFFF0, "RIP of a vCPU that was reset"


# What a fresh vCPU has already


def test_what_is_there_is_left_out_once(vm: KvmVm) -> None:
    layout = cut(state_of(vm), x86_64.DEBUGREGS.id, x86_64.XCRS.id, x86_64.VCPU_EVENTS.id)
    fresh = read(vm, layout)
    other = fresh.copy()
    other[:, words(layout, x86_64.DEBUGREGS.id).start] = range(1, 6)
    for values in (fresh, other, fresh):
        assert vm.write(layout, 0, values.copy()) == []
        assert (read(vm, layout) == values).all()
    vm.take_stock([layout])
    for values in (fresh, other, fresh):
        assert vm.write(layout, 0, values.copy()) == []
        assert (read(vm, layout) == values).all()


def test_the_stock_is_what_is_compared_with(vm: KvmVm) -> None:
    """A stock that lies shows that the write was left out: nothing else does."""
    layout = cut(state_of(vm), x86_64.DEBUGREGS.id)
    fresh = read(vm, layout)
    vm.take_stock([layout])
    vm._there[layout][:, 0] = 7
    wanted = fresh.copy()
    wanted[:, 0] = 7
    wanted[2, 0] = 8
    assert vm.write(layout, 0, wanted) == []
    assert [int(row[0]) for row in read(vm, layout)] == [0, 0, 8, 0, 0]


def test_a_prepared_write_goes_by_the_stock_of_its_moment(vm: KvmVm) -> None:
    """A stock that lies shows what is left out; any write, stock or run since then ends what the prepared one knows."""
    layout = cut(state_of(vm), x86_64.DEBUGREGS.id)
    start = words(layout, x86_64.DEBUGREGS.id).start
    fresh = read(vm, layout)
    wanted = fresh.copy()
    wanted[:, start] = 7

    def left_out(between: Callable[[], object]) -> bool:
        assert vm.write(layout, 0, fresh.copy()) == []
        vm.take_stock([layout])
        vm._there[layout][:, start] = 7
        todo = vm.writing([Bank(layout, 0, wanted)])
        between()
        assert todo() == []
        return bool((read(vm, layout)[:, start] != 7).all())

    assert left_out(lambda: None)
    assert not left_out(lambda: vm.write(layout, 0, fresh.copy()))
    assert not left_out(lambda: vm.take_stock([layout]))
    assert not left_out(lambda: run_a_little(vm))
    assert not left_out(vm.writing([Bank(layout, 0, fresh.copy())]))


def test_a_prepared_write_ends_what_is_known(vm: KvmVm) -> None:
    """The run pages, and the stock of what it wrote."""
    enable_apics(vm)
    run_and_mark_pages(vm)
    star = cut(state_of(vm), LSTAR)
    assert vm.writing([Bank(star, 0, read(vm, star))])() == []
    assert 0x5EED not in rax(vm)
    layout = cut(state_of(vm), x86_64.DEBUGREGS.id)
    fresh = read(vm, layout)
    other = fresh.copy()
    other[:, words(layout, x86_64.DEBUGREGS.id).start] = range(1, 6)
    vm.take_stock([layout])
    assert vm.writing([Bank(layout, 0, other)])() == []
    assert vm.write(layout, 0, fresh.copy()) == []
    assert (read(vm, layout) == fresh).all()


def test_the_same_layout_twice_is_written_twice(vm: KvmVm) -> None:
    layout = cut(state_of(vm), x86_64.DEBUGREGS.id)
    fresh = read(vm, layout)
    other = fresh.copy()
    other[:, words(layout, x86_64.DEBUGREGS.id).start] = 0x99
    vm.take_stock([layout])
    assert vm.writing([Bank(layout, 0, other), Bank(layout, 0, fresh.copy())])() == []
    assert (read(vm, layout) == fresh).all()


def test_a_vcpu_that_was_entered_is_asked(vm: KvmVm) -> None:
    enable_apics(vm)
    run_and_mark_pages(vm)
    vm.enter(0)
    assert 0x5EED not in rax(vm)


def test_some_vcpus_are_read_from_their_own_pages(vm: KvmVm) -> None:
    enable_apics(vm)
    run_and_mark_pages(vm)
    for k, page in enumerate(vm._run_pages):
        struct.pack_into("<Q", page, uapi.RUN_REGS, 0x5EED + k)
    layout = state_of(vm)
    values = np.zeros((2, layout.row_words), np.uint64)
    assert vm.read(layout, 3, values) == []
    first = words(layout, x86_64.REGS.id).start
    assert [int(row[first]) for row in values] == [0x5EED + 3, 0x5EED + 4]


def test_a_refusal_is_said_of_the_call_that_had_it(vm: KvmVm) -> None:
    layout = cut(state_of(vm), LSTAR)
    values = read(vm, layout)
    todo = vm.writing([Bank(layout, 0, values)])
    for refused in (1, 2):
        values[:] = 0x1000
        values[refused] = 1 << 63
        assert [no.vcpu for no in todo()] == [refused]


def test_a_prepared_read_knows_whether_the_run_page_may_be_used_now(vm: KvmVm) -> None:
    layout = state_of(vm)
    values = np.zeros((5, layout.row_words), np.uint64)
    look = vm.reading([Bank(layout, 0, values)])
    enable_apics(vm)
    run_and_mark_pages(vm)
    first = words(layout, x86_64.REGS.id).start
    for expected in (True, False):
        assert look() == []
        assert [int(row[first]) == 0x5EED for row in values] == [expected] * 5
        assert vm.write(cut(layout, LSTAR), 0, read(vm, cut(layout, LSTAR))) == []


def test_a_run_ends_what_is_known(vm: KvmVm) -> None:
    vm.take_stock([state_of(vm)])
    run_a_little(vm)
    assert not vm._there


# Threads


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(vm: KvmVm, threads: int) -> None:
    layout = cut(state_of(vm), *(slot.id for slot in state_of(vm).slots if slot.id not in RUNS_ON))
    vm.threads = 1
    alone = read(vm, layout)
    vm.threads = threads
    vm.warm()
    assert (read(vm, layout) == alone).all()
    star = words(layout, LSTAR).start
    alone[:, star] = range(0x1000, 0x1005)
    assert vm.write(layout, 0, alone) == []
    vm.threads = 1
    assert (read(vm, layout) == alone).all()


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_refusals_are_the_same_on_both_paths_and_in_order(vm: KvmVm, threads: int) -> None:
    layout = cut(state_of(vm), LSTAR, x86_64.DEBUGREGS.id)
    values = read(vm, layout)
    values[1::2, words(layout, LSTAR)] = 1 << 63      # not canonical
    values[2:, words(layout, x86_64.DEBUGREGS.id).start + 5] = 1 << 40  # DR7 has 32 bits
    vm.threads = threads
    refused = vm.write(layout, 0, values)
    program = vm._program(layout).writing
    alone = [no for row in vm._rows(layout, 0, values) for op in program.operations for no in op.write(row)]
    assert refused == alone
    assert {no.vcpu for no in refused} >= {1, 3}


def test_a_child_of_a_process_with_threads_works(vm: KvmVm) -> None:
    """A forked child has none of its parent's workers; KVM refuses it the VM (EIO), and it must not hang."""
    layout = cut(state_of(vm), LSTAR)
    vm.threads = 3
    read(vm, layout)
    child = os.fork()
    if not child:
        refused = vm.read(layout, 0, np.zeros((5, 1), np.uint64))
        os._exit(0 if len(refused) in (0, 5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(vm, layout).shape == (5, 1)


# What the compiled part is given


FIELDS = ("kind", "start", "size", "head_bytes", "request", "other", "extra", "count", "page", "page_size", "flags",
          "unused")


@pytest.mark.parametrize("wrong", [
    {"start": 5}, {"size": 17}, {"head_bytes": 17}, {"count": 1}, {"page": 4090, "page_size": 8}, {"page_size": 9},
    {"flags": Flag.GATE}, {"kind": Kind.FIRST, "size": 4}, {"head_bytes": 9}, {"kind": Kind.INTEGER, "size": 3},
    {"kind": Kind.COUNTED, "size": 3}], ids=str)
def test_a_program_that_leaves_its_row_is_refused(wrong: dict[str, int]) -> None:
    entry = struct.pack("<4I2Q6I16s", *({"size": 8, **wrong}.get(name, 0) for name in FIELDS), b"")
    assert compiled is not None
    assert len(entry) == compiled.ENTRY_SIZE
    job = (entry, b"", struct.pack("<i", -1), b"", b"", bytearray(8), bytearray(8), 8, True)
    with pytest.raises(ValueError, match="does not fit"):
        compiled.prepare([job], False, bytearray(8))
