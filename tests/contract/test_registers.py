"""Registers go in and come out: every one, for every vCPU, and those of the VM once."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from migstream.backends.base import SHORT_COUNT, Backend, Vm
from migstream.model import Bank, Layout, Phase, Scope, Slot
from migstream.registers import x86_64
from migstream.registers.catalogue import lookup
from tests.contract.access import (
    CSTAR,
    KERNEL_GS,
    LSTAR,
    SIZES,
    STAR,
    SYSTEM_TIME,
    SYSTEM_TIME_NEW,
    UNKNOWN_MSR,
    WALL_CLOCK,
    WALL_CLOCK_NEW,
    create,
    msr,
    patched,
    read,
    rows,
    still,
    u64,
    write,
)

VCPUS = 5


@pytest.fixture
def five(backend: Backend) -> Iterator[Vm]:
    with create(backend, VCPUS) as made:
        yield made


def test_what_every_layout_reads_is_taken_back_and_read_again(five: Vm) -> None:
    layouts, _ = five.layouts()
    for layout in layouts:
        first = np.zeros((rows(five, layout), layout.row_words), np.uint64)
        second = np.zeros_like(first)
        assert five.read(layout, 0, first) == []
        assert five.write(layout, 0, first) == []
        assert five.read(layout, 0, second) == []
        for row in range(len(first)):
            pairs = zip(Bank(layout, 0, first).items(row), Bank(layout, 0, second).items(row), strict=True)
            changed = [slot.id for (slot, was), (_, now) in pairs if still(slot.id, was) != still(slot.id, now)]
            assert [lookup(id).name for id in changed] == []
    assert sum(len(layout.slots) for layout in layouts) > 40


def test_all_banks_at_once_are_the_same_as_one_after_the_other(five: Vm) -> None:
    """Also a bank of some vCPUs alone, one twice, and none."""
    layouts, _ = five.layouts()

    def banks(first: int) -> list[Bank]:
        return [Bank(layout, from_, np.zeros((rows(five, layout) - from_, layout.row_words), np.uint64))
                for layout in layouts for from_ in (first if layout.scope == Scope.VCPU else 0,)]

    for first in (0, 2):
        alone, together = banks(first), banks(first)
        for bank in alone:
            assert five.read(bank.layout, bank.first_vcpu, bank.values) == []
        assert five.read_all([*together, together[-1]]) == []
        for one, other in zip(alone, together, strict=True):
            for row in range(len(one.values)):
                pairs = zip(one.items(row), other.items(row), strict=True)
                assert [lookup(slot.id).name for (slot, was), (_, now) in pairs
                        if still(slot.id, was) != still(slot.id, now)] == []
    assert five.read_all([]) == []


def test_what_is_refused_in_one_of_many_banks_hides_nothing(five: Vm) -> None:
    good = Layout(Scope.VCPU, Phase.STATE, (Slot(msr(LSTAR), 8),))
    bad = Layout(Scope.VCPU, Phase.STATE, (Slot(msr(UNKNOWN_MSR), 8), Slot(msr(STAR), 8)))
    assert write(five, msr(LSTAR), [u64(k + 1) for k in range(VCPUS)]) == []
    assert write(five, msr(STAR), [u64(k << 32) for k in range(VCPUS)]) == []
    banks = [Bank(layout, 0, np.zeros((VCPUS, layout.row_words), np.uint64)) for layout in (bad, good)]
    refused = five.read_all(banks)
    assert [(no.register, no.vcpu, no.errno) for no in refused] == [
        (msr(UNKNOWN_MSR), k, SHORT_COUNT) for k in range(VCPUS)]
    assert banks[0].values[:, 1].tolist() == [k << 32 for k in range(VCPUS)]
    assert banks[1].values[:, 0].tolist() == [k + 1 for k in range(VCPUS)]


def _event(k: int, old: bytes) -> bytes:
    return old[:1] + bytes([13]) + old[2:4] + struct.pack("<I", k) + old[8:9] + bytes([0x30 + k]) + old[10:]


DISTINCT: dict[str, tuple[int, Callable[[int, bytes], bytes]]] = {
    "general registers": (x86_64.REGS.id, lambda k, old: patched(old, {0: k + 1, 15: 2**63 + k, 16: 0x9000 + k})),
    "CR2, CR8 and a segment": (x86_64.SREGS.id, lambda k, old: patched(old, {3: k << 12, 29: k, 32: k})),
    "xmm0, xmm15 and MXCSR": (x86_64.XSAVE.id, lambda k, old: patched(old, {20: k, 51: 2**60 + k, 64: 3})),
    "XCR0": (x86_64.XCRS.id, lambda k, old: patched(old, {2: 1 + k % 2 * 2})),
    "debug addresses": (x86_64.DEBUGREGS.id, lambda k, old: patched(old, {0: k, 3: 0x1000 * k})),
    "APIC vectors and ids": (x86_64.LAPIC.id,
                             lambda k, old: patched(old, {4: k << 24, 16: k, 26: k << 24, 102: 0x10020 + k})),
    "event numbers": (x86_64.VCPU_EVENTS.id, _event),
    "MP state": (x86_64.MP_STATE.id, lambda k, old: struct.pack("<I", k % 4)),
    "STAR": (msr(STAR), lambda k, old: u64(k << 48)),
    "LSTAR": (msr(LSTAR), lambda k, old: u64(2**64 - 0x1000 * (k + 1))),
    "KERNEL_GS_BASE": (msr(KERNEL_GS), lambda k, old: u64(0x7FFF_0000_0000 + k)),
    "TSC frequency": (x86_64.TSC_KHZ.id, lambda k, old: struct.pack("<I", struct.unpack("<I", old)[0] + k)),
}


@pytest.mark.parametrize("name", DISTINCT)
def test_each_vcpu_keeps_a_value_of_its_own(five: Vm, name: str) -> None:
    id, make = DISTINCT[name]
    values = [make(k, old) for k, old in enumerate(read(five, id))]
    assert len(set(values)) > 1
    assert write(five, id, values) == []
    found = read(five, id)
    if id == x86_64.LAPIC.id:  # the processor priority follows from the task priority
        found = [patched(v, {20: 0}) for v in found]
        values = [patched(v, {20: 0}) for v in values]
    assert found == values


def test_a_range_of_vcpus_is_read_and_written_alone(five: Vm) -> None:
    assert write(five, msr(LSTAR), [u64(0x1000), u64(0x2000)], first_vcpu=2) == []
    assert [struct.unpack("<Q", v)[0] for v in read(five, msr(LSTAR))] == [0, 0, 0x1000, 0x2000, 0]


def test_cpuid_may_differ_and_reads_back_as_the_longest_table(five: Vm, backend: Backend) -> None:
    """Tables differ by leaves after 0xd: where that one is missing, a pagetable-based KVM adds its own."""
    full = backend.profile().cpuid
    short = struct.pack("<I", 30) + full[4:8 + 30 * 40]
    assert write(five, x86_64.CPUID2.id, [short], first_vcpu=1) == []
    size = next(s.size for at in five.layouts()[0] for s in at.slots if s.id == x86_64.CPUID2.id)
    tables = read(five, x86_64.CPUID2.id, size)
    assert size == len(full)
    entries = (len(full) - 8) // 40
    assert [struct.unpack_from("<I", table)[0] for table in tables] == [entries, 30, entries, entries, entries]
    assert tables[1][8 + 30 * 40:] == bytes(size - 8 - 30 * 40)


def test_a_vm_wide_register_is_one_whichever_vcpu_is_asked(five: Vm) -> None:
    assert write(five, msr(WALL_CLOCK_NEW), [u64(0x5000)]) == []
    through = Layout(Scope.VCPU, Phase.STATE, (Slot(msr(WALL_CLOCK_NEW), 8),))
    values = np.zeros((VCPUS, 1), np.uint64)
    assert five.read(through, 0, values) == []
    assert set(values[:, 0].tolist()) == {0x5000}
    assert five.write(through, 3, np.array([[0x6000]], np.uint64)) == []
    assert read(five, msr(WALL_CLOCK_NEW)) == [u64(0x6000)]


@pytest.mark.parametrize(("written", "other", "of_vm"), [
    (WALL_CLOCK_NEW, WALL_CLOCK, True), (WALL_CLOCK, WALL_CLOCK_NEW, True),
    (SYSTEM_TIME_NEW, SYSTEM_TIME, False), (SYSTEM_TIME, SYSTEM_TIME_NEW, False),
])
def test_the_old_and_the_new_number_of_kvmclock_are_one_register(
        five: Vm, written: int, other: int, of_vm: bool) -> None:
    values = [u64(0x7000)] if of_vm else [u64(0x7000 + k) for k in range(VCPUS)]
    assert write(five, msr(written), values) == []
    assert read(five, msr(other)) == values


def test_an_msr_that_is_refused_is_named_and_hides_no_other(five: Vm) -> None:
    indices = (LSTAR, UNKNOWN_MSR, CSTAR, STAR)
    layout = Layout(Scope.VCPU, Phase.STATE, tuple(Slot(msr(index), 8) for index in indices))
    values = np.arange(VCPUS * 4, dtype=np.uint64).reshape(VCPUS, 4) + np.uint64(1)
    values[3, 2] = 1 << 60
    refused = five.write(layout, 0, values)
    wanted = [(msr(UNKNOWN_MSR), k) for k in range(VCPUS)]
    wanted.insert(4, (msr(CSTAR), 3))
    assert [(no.register, no.vcpu) for no in refused] == wanted
    assert {(no.operation, no.errno) for no in refused} == {("KVM_SET_MSRS", SHORT_COUNT)}
    actual = np.zeros_like(values)
    refused = five.read(layout, 0, actual)
    assert [(no.register, no.operation) for no in refused] == [(msr(UNKNOWN_MSR), "KVM_GET_MSRS")] * VCPUS
    values[:, 1], values[3, 2] = 0, 0
    assert (actual == values).all()


def test_both_forms_of_sregs_are_one_register(five: Vm) -> None:
    old = read(five, x86_64.SREGS.id)
    assert write(five, x86_64.SREGS.id, [patched(v, {29: 0x1230 + k}) for k, v in enumerate(old)]) == []
    new = read(five, x86_64.SREGS2.id)
    assert [v[:280] for v in new] == [v[:280] for v in read(five, x86_64.SREGS.id)]
    assert [struct.unpack_from("<Q", v, 8 * 29)[0] for v in new] == [0x1230 + k for k in range(VCPUS)]


def test_writing_general_registers_drops_a_pending_exception_and_keeps_an_injected_one(backend: Backend) -> None:
    with create(backend, 2, enabled_caps={164: (1,)}) as vm:
        flags = struct.unpack_from("<I", read(vm, x86_64.VCPU_EVENTS.id)[0], 20)[0]
        assert flags & 0x10, "KVM_VCPUEVENT_VALID_PAYLOAD comes with KVM_CAP_EXCEPTION_PAYLOAD"
        raised = [bytes([1, 14, 0, 0]), bytes([0, 14, 0, 1])]
        old = read(vm, x86_64.VCPU_EVENTS.id)
        assert write(vm, x86_64.VCPU_EVENTS.id, [new + v[4:] for new, v in zip(raised, old, strict=True)]) == []
        assert [v[:4] for v in read(vm, x86_64.VCPU_EVENTS.id)] == raised
        assert write(vm, x86_64.REGS.id, read(vm, x86_64.REGS.id)) == []
        assert [v[:4] for v in read(vm, x86_64.VCPU_EVENTS.id)] == [raised[0], bytes([0, 14, 0, 0])]


def test_the_clock_runs_on_from_what_it_was_set_to(five: Vm) -> None:
    assert write(five, x86_64.CLOCK.id, [u64(10**15, 0xFF, 1, 2, 0, 0)]) == []
    clock, flags, realtime, host_tsc, *_ = struct.unpack("<6Q", read(five, x86_64.CLOCK.id)[0])
    assert 10**15 <= clock < 10**15 + 10**10
    assert struct.unpack("<Q", read(five, x86_64.CLOCK.id)[0][:8])[0] > clock
    assert flags & ~0b1110 == 0, "the flags that were given are not passed on"
    assert (realtime > 1) == bool(flags & 4)
    assert (host_tsc > 2) == bool(flags & 8)


def test_the_start_up_vector_is_where_the_vcpu_stands_once_its_state_is_read(five: Vm) -> None:
    """Reading MP_STATE accepts the pending SIPI: that is why a save reads it first."""
    events = [v[:16] + struct.pack("<II", 9, 0xF) + v[24:] for v in read(five, x86_64.VCPU_EVENTS.id)]
    assert write(five, x86_64.VCPU_EVENTS.id, events) == []
    assert write(five, x86_64.MP_STATE.id, [struct.pack("<I", 4)] * VCPUS) == []
    assert {struct.unpack_from("<Q", v, 128)[0] for v in read(five, x86_64.REGS.id)} == {0xFFF0}
    layout = next(at for at in five.layouts()[0] if (at.scope, at.phase) == (Scope.VCPU, Phase.STATE))
    values = np.zeros((VCPUS, layout.row_words), np.uint64)
    assert five.read(layout, 0, values) == []
    regs, sregs, state = (layout.offsets[layout.index[row.id]]
                          for row in (x86_64.REGS, x86_64.SREGS2, x86_64.MP_STATE))
    assert set(values[:, regs + 16].tolist()) == {0}
    assert set(values[:, sregs].tolist()) == {0x9000}
    assert set(values[:, state].tolist()) == {0}


def test_an_in_kernel_register_of_every_kind_was_tried() -> None:
    tried = {id for id, _ in DISTINCT.values()}
    per_vcpu = {row.id for row in x86_64.ROWS if row.scope == Scope.VCPU and row.id in SIZES}
    untried = {x86_64.SREGS2.id: "with SREGS", x86_64.NESTED_STATE.id: "not on this kernel",
               x86_64.TSC_OFFSET.id: "relative to the host's TSC"}
    assert per_vcpu - tried == set(untried)


