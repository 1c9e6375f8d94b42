"""Wrong values, with the errno that KVM gives: one table, true of the simulator and of real KVM.

A row says what the register held before, which words of it change, and what the kernel answers. Rows of `MEASURED` are
answers of one kernel where another may well say something else; they are skipped on any other.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

import numpy as np
import pytest

from migstream.backends.base import SHORT_COUNT, Backend, Vm
from migstream.backends.sim import SimBackend
from migstream.demo import guest_x86_64 as guest
from migstream.model import Arch
from migstream.registers import ids, x86_64
from tests.contract.access import (
    CSTAR,
    DEVICES,
    KERNEL_GS,
    LSTAR,
    SIZES,
    create,
    layout,
    msr,
    patched,
    read,
    run_a_little,
    u64,
    write_errno,
)

SREGS, SREGS2, REGS, XCRS = x86_64.SREGS.id, x86_64.SREGS2.id, x86_64.REGS.id, x86_64.XCRS.id
XSAVE, DEBUGREGS, EVENTS, MP_STATE = x86_64.XSAVE.id, x86_64.DEBUGREGS.id, x86_64.VCPU_EVENTS.id, x86_64.MP_STATE.id
LAPIC, PIC, IOAPIC, PIT2 = x86_64.LAPIC.id, x86_64.PIC_MASTER.id, x86_64.IOAPIC.id, x86_64.PIT2.id
CPUID2, TSC_KHZ, CLOCK, NESTED = x86_64.CPUID2.id, x86_64.TSC_KHZ.id, x86_64.CLOCK.id, x86_64.NESTED_STATE.id
EINVAL, E2BIG, ENXIO, EPERM = errno.EINVAL, errno.E2BIG, errno.ENXIO, errno.EPERM

CR0, CR3, CR4, CR8, EFER, APIC_BASE, FLAGS = 28, 30, 31, 32, 33, 34, 35
LONG_MODE = {CR0: 0x8001_0033, CR3: 0x1000, CR4: 0x20, EFER: 0x500}


@dataclass(frozen=True, slots=True)
class Row:
    """A register, what is written over its present value (word to value, or all of it), the errno, and why."""

    register: int
    change: dict[int, int] | bytes
    errno: int
    why: str
    long_mode: bool = False

    def value(self, old: bytes) -> bytes:
        """The value to write."""
        return self.change if isinstance(self.change, bytes) else patched(old, self.change)


_CAPABILITY = ids.capability_id(Arch.X86_64, 0)

ROWS = (
    Row(SREGS, {}, 0, "what is there is taken"),
    Row(SREGS, {CR0: 1 << 32 | 0x6000_0010}, EINVAL, "CR0 has 32 bits"),
    Row(SREGS, {CR0: 0x8000_0010}, EINVAL, "CR0.PG needs PE"),
    Row(SREGS, {CR0: 0x2000_0010}, EINVAL, "CR0.NW needs CD"),
    Row(SREGS, {CR0: 0x6000_0018}, 0, "CR0.TS alone is fine"),
    Row(SREGS, {CR4: 1 << 63}, EINVAL, "CR4: reserved"),
    Row(SREGS, {CR4: 1 << 15}, EINVAL, "CR4: reserved"),
    Row(SREGS, {EFER: 1 << 10}, EINVAL, "EFER.LMA without 64-bit paging"),
    Row(SREGS, {EFER: 1 << 8}, 0, "EFER.LME before paging, as a guest on its way to 64-bit mode has it"),
    Row(SREGS, {2: 1 << 24}, EINVAL, "CS.L without 64-bit paging"),
    Row(SREGS, {CR8: 0x10}, 0, "an impossible CR8 is ignored, not refused"),
    Row(SREGS, {APIC_BASE: 0xFEE0_0901}, EINVAL, "APIC base: bits 0 to 7 are reserved"),
    Row(SREGS, {APIC_BASE: 0xFEE0_0900 | 1 << 62}, EINVAL, "APIC base: above the guest's physical addresses"),
    Row(SREGS, {APIC_BASE: 0xFEE0_0500}, EINVAL, "APIC base: x2APIC without the enable bit is no mode"),
    Row(SREGS, LONG_MODE, 0, "64-bit mode"),
    Row(SREGS, LONG_MODE | {CR4: 0}, EINVAL, "64-bit paging needs CR4.PAE"),
    Row(SREGS, LONG_MODE | {EFER: 0x100}, EINVAL, "64-bit paging needs EFER.LMA"),
    Row(SREGS, LONG_MODE | {CR3: 1 << 60}, EINVAL, "CR3: above the guest's physical addresses"),
    Row(SREGS, {CR0: 0x11}, EINVAL, "64-bit mode with PG off has EFER.LMA left over", long_mode=True),
    Row(SREGS, {2: 0x1 << 24}, 0, "CS.L in 64-bit mode", long_mode=True),
    Row(SREGS2, {}, 0, "what is there is taken"),
    Row(SREGS2, {FLAGS: 1}, EINVAL, "PDPTRs without PAE paging"),
    Row(SREGS2, {FLAGS: 2}, EINVAL, "unknown flag"),
    Row(SREGS2, {CR0: 0x8000_0010}, EINVAL, "the same checks as KVM_SET_SREGS"),
    Row(XCRS, {0: 17}, EINVAL, "KVM_MAX_XCRS is 16"),
    Row(XCRS, {0: 16}, 0, "16 are looked at, and the first is XCR0"),
    Row(XCRS, {0: 1 | 1 << 32}, EINVAL, "flags"),
    Row(XCRS, {2: 0}, EINVAL, "XCR0 without x87"),
    Row(XCRS, {2: 0b101}, EINVAL, "XCR0: AVX without SSE"),
    Row(XCRS, {2: 1 << 62 | 1}, EINVAL, "XCR0: a component that no CPUID has"),
    Row(XCRS, {0: 0, 2: 0}, 0, "a list of nothing"),
    Row(XCRS, {1: 1, 2: 0}, 0, "another XCR: not looked at"),
    Row(DEBUGREGS, {4: 1 << 32}, EINVAL, "DR6 has 32 bits"),
    Row(DEBUGREGS, {5: 1 << 32}, EINVAL, "DR7 has 32 bits"),
    Row(DEBUGREGS, {6: 1}, EINVAL, "flags"),
    Row(DEBUGREGS, {0: 2**64 - 1, 4: 0xFFFF_0FF0, 5: 0x400}, 0, "addresses are what they are"),
    Row(XSAVE, {64: 1 << 62}, EINVAL, "XSTATE_BV: a component that the host has not"),
    Row(XSAVE, {65: 1}, EINVAL, "XCOMP_BV: not the compacted form"),
    Row(XSAVE, {66: 1}, EINVAL, "XSAVE header: reserved"),
    Row(XSAVE, {64: 0b11, 3: 1 << 16}, EINVAL, "MXCSR: reserved"),
    Row(XSAVE, {64: 0b11, 3: 0x1F80, 51: 2**64 - 1}, 0, "xmm15"),
    Row(EVENTS, {2: 0x40 << 32}, EINVAL, "unknown flag"),
    Row(EVENTS, {2: 0x1D << 32}, EINVAL, "an exception payload without KVM_CAP_EXCEPTION_PAYLOAD"),
    Row(EVENTS, {0: 0x2001}, EINVAL, "an exception has a vector below 32"),
    Row(EVENTS, {0: 0x0201}, EINVAL, "vector 2 is an NMI and no exception"),
    Row(EVENTS, {0: 0x0E01}, 0, "a page fault"),
    Row(MP_STATE, struct.pack("<I", 5), EINVAL, "STOPPED is another architecture's"),
    Row(MP_STATE, struct.pack("<I", 11), EINVAL, "no such state"),
    Row(MP_STATE, struct.pack("<I", 2**32 - 1), EINVAL, "no such state"),
    Row(MP_STATE, struct.pack("<I", 3), 0, "HALTED"),
    Row(PIC, {0: 3}, EINVAL, "there are three chips"),
    Row(IOAPIC, {0: 2**32 - 1}, EINVAL, "there are three chips"),
    Row(PIT2, {3: 0}, 0, "a count of 0 is 65536"),
    Row(CPUID2, struct.pack("<II", 257, 0) + bytes(257 * 40), E2BIG, "KVM_MAX_CPUID_ENTRIES is 256"),
    Row(CPUID2, struct.pack("<II", 2, 0) + bytes(40), E2BIG, "more entries than were given: the kernel would read on"),
    Row(CPUID2, struct.pack("<II", 2**32 - 1, 0) + bytes(40), E2BIG, "more entries than were given"),
    Row(CPUID2, struct.pack("<II10I", 1, 0, 0x8000_0008, 0, 0, 0x2030, *(0,) * 6), EINVAL,
        "virtual addresses are 48 or 57 bits wide"),
    Row(CPUID2, struct.pack("<II10I", 1, 0, 0xD, 0, 1, 0x60003, *(0,) * 6), EPERM,
        "AMX, for which the process has not asked the host"),
    Row(CPUID2, struct.pack("<II", 0, 0), 0, "an empty table"),
    Row(TSC_KHZ, struct.pack("<I", 0), 0, "0 is the host's"),
    Row(TSC_KHZ, struct.pack("<I", 2**31), EINVAL, "KVM_GET_TSC_KHZ would answer with a negative number"),
    Row(NESTED, u64(2**48 - 1, *(0,) * 15), EINVAL, "a size beyond what was given, or no nested virtualization at all"),
    Row(CLOCK, u64(2**64 - 1, 2**64 - 1, 0, 0, 0, 0), 0, "the value alone is passed on"),
    Row(ids.attribute_id(0, 0, 7), u64(0), ENXIO, "no such attribute in the group of the TSC"),
    Row(ids.attribute_id(0, 9, 0), u64(0), ENXIO, "no such group"),
    Row(0x2030_0003_0000_0063, u64(0), EINVAL, "no such register in KVM's own"),
    Row(_CAPABILITY + 99999, u64(99999, 0, 0, 0, 0), EINVAL, "no such capability"),
    Row(_CAPABILITY + 129, u64(129 | 1 << 32, 3, 0, 0, 0), EINVAL, "KVM_ENABLE_CAP has no flags"),
    Row(msr(LSTAR), u64(1 << 57), SHORT_COUNT, "not canonical, in 48 bits or in 57"),
    Row(msr(CSTAR), u64(1 << 63), SHORT_COUNT, "not canonical"),
    Row(msr(KERNEL_GS), u64(2**64 - 2**47), 0, "the first canonical address of the upper half"),
    Row(msr(0x4B56_4D03), u64(2), SHORT_COUNT, "STEAL_TIME: reserved bits"),
    Row(msr(0x4B56_4D06), u64(0x100), SHORT_COUNT, "ASYNC_PF_INT: a vector has 8 bits"),
    Row(msr(0x4B56_4D05), u64(2), SHORT_COUNT, "POLL_CONTROL: one bit"),
    Row(msr(0x4B56_4D04), u64(3), SHORT_COUNT, "PV_EOI: reserved bit"),
    Row(msr(0x4B56_4D04), u64(0x4000_0001), SHORT_COUNT, "PV_EOI: a flag where there is no guest memory"),
    Row(msr(0x4B56_4D02), u64(0x4000_0009), SHORT_COUNT, "ASYNC_PF: an area where there is no guest memory"),
    Row(msr(0x4B56_4D02), u64(0x4000_0000), 0, "ASYNC_PF: the same, and off"),
)

MEASURED = (
    Row(SREGS, LONG_MODE | {CR4: 0x20 | 1 << 17}, EINVAL, "CR4.PCIDE is not offered where ring 0 is emulated"),
    Row(SREGS, LONG_MODE | {CR4: 0x20 | 1 << 20}, 0, "CR4.SMEP is taken though CPUID has it not"),
    Row(SREGS, LONG_MODE | {EFER: 0x500 | 1 << 63}, 0, "EFER: SET_SREGS looks at the mode alone"),
    Row(EVENTS, {3: 1}, EINVAL, "a kernel without CONFIG_KVM_SMM has no system management mode"),
    Row(XSAVE, {64: 0, 3: 1 << 20}, 0, "MXCSR is not looked at while neither SSE nor AVX is in use"),
    Row(TSC_KHZ, struct.pack("<I", 1_000_000), EINVAL, "slower than the host, and no TSC scaling"),
    Row(TSC_KHZ, struct.pack("<I", 5_000_000), 0, "faster than the host: KVM catches up"),
    Row(msr(0x277), u64(0x0202_0202_0202_0202), 0, "PAT: memory type 2 does not exist, and is taken"),
    Row(msr(0x10A), u64(1), SHORT_COUNT, "ARCH_CAPABILITIES: 0 alone, though the feature list offers more"),
    Row(msr(0x345), u64(1), SHORT_COUNT, "PERF_CAPABILITIES: there is no PMU"),
    Row(msr(0xC001_0015), u64(1), SHORT_COUNT, "HWCR: SMMLOCK"),
    Row(msr(0xC001_0015), u64(1 << 24), 0, "HWCR: the TSC's frequency"),
    Row(msr(0x17B), u64(1), SHORT_COUNT, "MCG_CTL: 0 or all ones, and there is no MCG_CTL_P"),
    Row(msr(0x1DB), u64(1), SHORT_COUNT, "LASTBRANCHFROMIP: only 0"),
)


def present(vm: Vm, row: Row) -> bytes:
    return b"" if isinstance(row.change, bytes) else read(vm, row.register)[0]


def check(backend: Backend, row: Row) -> None:
    with create(backend, 1) as vm:
        if row.long_mode:
            old = read(vm, SREGS)[0]
            assert write_errno(vm, SREGS, patched(old, LONG_MODE)) == 0
        before = present(vm, row)
        assert write_errno(vm, row.register, row.value(before)) == row.errno, row.why
        if row.errno and before and row.register != EVENTS:
            assert present(vm, row) == before, "what is refused is not stored"


def name(row: Row) -> str:
    return row.why.replace(" ", "-")


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_value_gets_the_answer_that_the_kernel_gives(backend: Backend, row: Row) -> None:
    if row.register in (SREGS2, XCRS, DEBUGREGS, NESTED) and not backend.profile().capabilities["SREGS2"]:
        pytest.skip("a kernel without KVM_CAP_SREGS2")
    check(backend, row)


@pytest.mark.parametrize("row", MEASURED, ids=name)
@pytest.mark.usefixtures("recorded_kernel")
def test_an_answer_of_the_recorded_kernel(backend: Backend, row: Row) -> None:
    check(backend, row)


WITHOUT_CHIPS = (
    (LAPIC, bytes(1024), EINVAL, "no local APIC"),
    (PIC, bytes(520), ENXIO, "no PICs"),
    (IOAPIC, struct.pack("<I", 2) + bytes(516), ENXIO, "no IOAPIC"),
    (PIT2, bytes(112), ENXIO, "no PIT"),
    (MP_STATE, struct.pack("<I", 1), EINVAL, "the VMM keeps the state of vCPUs that wait"),
    (MP_STATE, struct.pack("<I", 0), 0, "RUNNABLE is what they are"),
    (msr(0x4B56_4D06), u64(0x20), SHORT_COUNT, "ASYNC_PF_INT: no APIC to interrupt"),
    (msr(0x4B56_4D02), u64(1), SHORT_COUNT, "ASYNC_PF: no APIC to interrupt"),
)


@pytest.mark.parametrize(("register", "value", "expected", "why"), WITHOUT_CHIPS)
def test_a_vm_without_interrupt_chips(backend: Backend, register: int, value: bytes, expected: int, why: str) -> None:
    with create(backend, 1, devices={}) as vm:
        assert write_errno(vm, register, value) == expected, why


def started(backend: Backend) -> Vm:
    vm = create(backend, 2)
    guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
    run_a_little(vm)
    return vm


def test_cpuid_is_fixed_once_a_vcpu_has_run(backend: Backend) -> None:
    with started(backend) as vm:
        table = read(vm, CPUID2, len(backend.profile().cpuid))[0]
        assert write_errno(vm, CPUID2, table) == 0, "an equal table is taken"
        assert write_errno(vm, CPUID2, table[:20] + bytes([table[20] ^ 1]) + table[21:]) == EINVAL
        assert write_errno(vm, CPUID2, struct.pack("<II", 0, 0)) == EINVAL
        assert read(vm, CPUID2, len(table))[0] == table


def test_feature_msrs_are_fixed_once_a_vcpu_has_run_and_microcode_is_not(backend: Backend) -> None:
    if not {0xCE, 0x8B} <= backend.profile().feature_msrs.keys():
        pytest.skip("PLATFORM_INFO and UCODE_REV are no feature MSRs here")
    with started(backend) as vm:
        now = read(vm, msr(0xCE))[0]
        assert write_errno(vm, msr(0xCE), now) == 0
        assert write_errno(vm, msr(0xCE), u64(int.from_bytes(now, "little") ^ 1 << 31)) == SHORT_COUNT
        assert write_errno(vm, msr(0x8B), u64(0x1234 << 32)) == 0
    with create(backend, 1) as fresh:
        assert write_errno(fresh, msr(0xCE), u64(0)) == 0


def test_a_refused_frequency_stays(backend: Backend, recorded_kernel: None) -> None:
    """Kept as measured: KVM_SET_TSC_KHZ stores the frequency before it finds that it can't have it."""
    with create(backend, 1) as vm:
        assert write_errno(vm, TSC_KHZ, struct.pack("<I", 1_000_000)) == EINVAL
        assert read(vm, TSC_KHZ) == [struct.pack("<I", 1_000_000)]


@pytest.mark.parametrize("long_ids", [False, True])
@pytest.mark.usefixtures("newer_than_6_1")
def test_the_apic_id_in_x2apic_mode(backend: Backend, long_ids: bool) -> None:
    with create(backend, 2, enabled_caps={129: (3,)} if long_ids else None) as vm:
        sregs = read(vm, SREGS)[1]
        assert write_errno(vm, SREGS, patched(sregs, {APIC_BASE: 0xFEE0_0C00}), vcpu=1) == 0
        page = read(vm, LAPIC)[1]
        assert struct.unpack_from("<I", page, 0x20)[0] == (1 if long_ids else 1 << 24)
        assert struct.unpack_from("<I", page, 0xD0)[0] == 0b10, "the logical id follows from the id"
        wrong = page[:0x20] + struct.pack("<I", 7) + page[0x24:]
        assert write_errno(vm, LAPIC, wrong, vcpu=1) == (EINVAL if long_ids else 0)
        assert read(vm, LAPIC)[1] == page


def test_a_capability_that_nobody_enabled_reads_as_a_refusal(backend: Backend) -> None:
    with create(backend, 1) as vm:
        at = layout((_CAPABILITY + 129, 40))
        refused = vm.read(at, 0, np.zeros((1, 5), np.uint64))
    assert [(no.operation, no.errno) for no in refused] == [("KVM_ENABLE_CAP", errno.ENOENT)]


def test_every_struct_register_has_a_row() -> None:
    """So that a new row of the catalogue gets a wrong value here, too."""
    with_rows = {row.register for row in (*ROWS, *MEASURED)} | {id for id, *_ in WITHOUT_CHIPS}
    fine = {REGS: "takes everything", x86_64.PIC_SLAVE.id: "as its master", x86_64.TSC_OFFSET.id: "takes everything"}
    assert set(SIZES) - with_rows == set(fine)
    assert DEVICES.keys() == {"irqchip", "pit", "tss_address"}
    assert SimBackend().profile().behaviour["legacy_paging"] == 0
