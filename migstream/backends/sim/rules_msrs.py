"""Rules of MSRs on x86-64: what a kernel takes, stores and shows.

Which bits of an MSR are taken and kept is data of the profile (`msr_bits`). Here is what no trial of single bits
shows: values that must be sign-extended, two names of one MSR, MSRs that follow something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import cpuid
from migstream.backends.sim.rules import U64, bits, mask
from migstream.backends.sim.rules_devices import LAPIC
from migstream.backends.sim.variants_x86_64 import EVMCS_CAP, FILTERS
from migstream.registers import ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Mask, Rows

    Column = NDArray[np.uint64]

TSC, TSC_ADJUST, TSC_DEADLINE, UCODE_REV = 0x10, 0x3B, 0x6E0, 0x8B
LSTAR, SYSENTER_EIP, PAT = 0xC000_0082, 0x176, 0x277
ASYNC_PF_EN, PV_EOI_EN, ASYNC_PF_INT = 0x4B56_4D02, 0x4B56_4D04, 0x4B56_4D06
_BY_INTERRUPT = 0b1001
"""KVM_ASYNC_PF_ENABLED and KVM_ASYNC_PF_DELIVERY_AS_INT."""

_DEADLINE_MODE, _TIMER_MODE, _LVTT = 0b10 << 17, 0b11 << 17, 0x320 // 8


@dataclass(frozen=True, slots=True)
class MsrRule:
    """How an MSR differs from plain storage of the bits that the profile says.

    Attributes:
        indices: MSRs. refuse: rows that are refused, instead of what `msr_bits` says. keep: what is stored of a value,
            likewise. late: rows that are refused after the value was stored. show: what a read gives for the stored
        value. source: kernel function, or `measured`.
    """

    name: str
    indices: tuple[int, ...]
    source: str
    refuse: Callable[[Rows, Column], Mask] | None = None
    keep: Callable[[Rows, Column], Column] | None = None
    late: Callable[[Rows, Column], Mask] | None = None
    show: Callable[[Rows, Column], Column] | None = None


def _canonical(values: Column, width: int = 48) -> Column:
    """The value with the highest bit of a linear address copied into the bits above it."""
    high = np.uint64(U64 << width & U64)
    return np.where(bits(values, 1 << width - 1), values | high, values & ~high)


def _whole(rows: Rows, values: Column) -> Column:
    return values


def _taken(rows: Rows, index: int) -> int:
    return rows.guest.profile.msr_bits.get(index, (U64, U64))[0]


def _not_canonical(rows: Rows, values: Column) -> Mask:
    """48 bits, or 57 on a host with 5-level paging: LSTAR took one bit less."""
    width = 57 if _taken(rows, LSTAR) >> 48 & 1 else 48
    return mask(_canonical(values, width) != values)


def _entry_point(rows: Rows, values: Column) -> Column:
    """Made canonical; on AMD only the low 32 bits are kept (svm_set_msr)."""
    _, kept = rows.guest.profile.msr_bits.get(SYSENTER_EIP, (U64, U64))
    return _canonical(values) if kept >> 47 & 1 else values & np.uint64(kept)


def _no_memory_type(rows: Rows, values: Column) -> Mask:
    """Memory types are 0, 1 and 4 to 7, on a kernel that looks (2 alone was refused)."""
    unknown = bits(values, 0xF8F8_F8F8_F8F8_F8F8) | bits(values & ~(values >> np.uint64(1)), 0x0202_0202_0202_0202)
    return mask(unknown & (not _taken(rows, PAT) >> 1 & 1))


def _tsc(rows: Rows, values: Column) -> Column:
    return rows.guest.tsc_offsets[rows.numbers] + np.uint64(rows.guest.clock.host.tsc())


def _write_tsc(rows: Rows, values: Column) -> Column:
    """The vCPU's offset makes its TSC go on from the value, where the kernel does that."""
    if rows.guest.profile.behaviour.get("tsc_follows", 1):
        rows.guest.tsc_offsets[rows.index] = values - np.uint64(rows.guest.clock.host.tsc())
    return values


def _deadline_mode(rows: Rows) -> Mask:
    if not rows.guest.has("irqchip"):
        return np.zeros(len(rows.numbers), np.bool_)
    return mask((rows.get(LAPIC)[:, _LVTT] & np.uint64(_TIMER_MODE)) == _DEADLINE_MODE)


def _deadline(rows: Rows, values: Column) -> Column:
    return np.where(_deadline_mode(rows), values, np.uint64(0))


def _adjust(rows: Rows, values: Column) -> Column:
    offered = bits(cpuid.word(rows.get(cpuid.ID), 7, 0, cpuid.EBX), 1 << 1)
    return np.where(offered, values, rows.get(ids.msr_id(TSC_ADJUST))[:, 0])


def _nothing(rows: Rows, values: Column) -> Mask:
    return np.zeros(len(values), np.bool_)


def _in_ram(rows: Rows, addresses: Column, size: int) -> Mask:
    """Whether the kernel can find the guest memory that an MSR points to."""
    found = np.zeros(len(addresses), np.bool_)
    for region in rows.guest.machine.memory:
        found |= (addresses >= region.guest_address) & (addresses + np.uint64(size) <= region.end)
    return found


def _no_page_faults(rows: Rows, values: Column) -> Mask:
    return mask(_not_taken(rows, ASYNC_PF_EN, values) | mask(values != 0) & (not rows.guest.has("irqchip")))


def _no_page_fault_area(rows: Rows, values: Column) -> Mask:
    on = mask((values & np.uint64(_BY_INTERRUPT)) == _BY_INTERRUPT)
    return mask(on & ~_in_ram(rows, values & np.uint64(U64 & ~0x3F), 8))


def _no_page_fault_vector(rows: Rows, values: Column) -> Mask:
    return mask(_not_taken(rows, ASYNC_PF_INT, values) | (not rows.guest.has("irqchip")))


def _no_eoi_flag(rows: Rows, values: Column) -> Mask:
    lost = bits(values, 1) & ~_in_ram(rows, values & np.uint64(U64 & ~1), 1)
    return _not_taken(rows, PV_EOI_EN, values) | lost


RULES = (
    MsrRule("needs an APIC, and an area in guest memory: looked for when the value is stored", (ASYNC_PF_EN,),
            "kvm_pv_enable_async_pf", refuse=_no_page_faults, late=_no_page_fault_area),
    MsrRule("needs an APIC", (ASYNC_PF_INT,), "kvm_pv_enable_async_pf_int", refuse=_no_page_fault_vector),
    MsrRule("needs guest memory", (PV_EOI_EN,), "kvm_lapic_set_pv_eoi", refuse=_no_eoi_flag),
    MsrRule("addresses must be canonical", (LSTAR, 0xC000_0083, 0xC000_0102), "__kvm_set_msr",
            refuse=_not_canonical, keep=_whole),
    MsrRule("addresses are made canonical", (0x175, SYSENTER_EIP), "__kvm_set_msr: __canonical_address",
            refuse=_nothing, keep=_entry_point),
    MsrRule("eight memory types", (PAT,), "kvm_pat_valid", refuse=_no_memory_type, keep=_whole),
    MsrRule("a running clock", (TSC,), "kvm_synchronize_tsc; `tsc_follows`", refuse=_nothing, keep=_write_tsc,
            show=_tsc),
    MsrRule("kept in the timer's deadline mode alone", (TSC_DEADLINE,), "kvm_set_lapic_tscdeadline_msr",
            refuse=_nothing, keep=_deadline, show=_deadline),
    MsrRule("ignored unless CPUID has it", (TSC_ADJUST,), "kvm_set_msr_common: X86_FEATURE_TSC_ADJUST",
            refuse=_nothing, keep=_adjust),
)

_BY_INDEX = {index: rule for rule in RULES for index in rule.indices}
_PLAIN = MsrRule("plain storage", (), "")

ALIASES = {0x4B56_4D00: 0x11, 0x4B56_4D01: 0x12}
"""MSRs that share their storage with another: the new and the old name of kvmclock's two (kvm_set_msr_common)."""


def storage(index: int) -> int:
    """Id of the register in which an MSR is stored."""
    return ids.msr_id(ALIASES.get(index, index))


def listed(rows: Rows, index: int) -> bool:
    """Whether the kernel knows the MSR at all: this simulator has those that the profile lists."""
    profile = rows.guest.profile
    return index in profile.msrs or index in profile.feature_msrs


def refused(rows: Rows, index: int, values: Column) -> Mask:
    """The rows that KVM_SET_MSRS stops at."""
    if not listed(rows, index) or _write_errno(rows, index):
        return np.ones(len(values), np.bool_)
    rule = _BY_INDEX.get(index, _PLAIN)
    no = rule.refuse(rows, values) if rule.refuse else _not_taken(rows, index, values)
    return mask(no | _fixed_by_run(rows, index, values))


def _write_errno(rows: Rows, index: int) -> int:
    return rows.guest.profile.refused.get(ids.msr_id(index), (0, 0))[1]


def _not_taken(rows: Rows, index: int, values: Column) -> Mask:
    """A bit that is not taken, unless the value is the one that every vCPU starts with."""
    taken, _ = rows.guest.profile.msr_bits.get(index, (U64, U64))
    return bits(values, U64 & ~taken) & mask(values != _default(rows, index))


def _fixed_by_run(rows: Rows, index: int, values: Column) -> Mask:
    """Feature MSRs can't change once the vCPU has run (kvm_is_immutable_feature_msr); microcode revisions can."""
    if index not in rows.guest.profile.feature_msrs or index == UCODE_REV:
        return np.zeros(len(values), np.bool_)
    return mask(rows.guest.ran[rows.numbers] & (values != rows.get(storage(index))[:, 0]))


def _default(rows: Rows, index: int) -> np.uint64:
    default = rows.guest.profile.defaults.get(ids.msr_id(index), bytes(8))
    return np.uint64(int.from_bytes(default, "little"))


def refused_late(rows: Rows, index: int, values: Column) -> Mask:
    """The rows that KVM_SET_MSRS stops at though the value is there now."""
    rule = _BY_INDEX.get(index, _PLAIN)
    return rule.late(rows, values) if rule.late else np.zeros(len(values), np.bool_)


def keep(rows: Rows, index: int, values: Column) -> Column:
    """What is stored of values that are not refused."""
    rule = _BY_INDEX.get(index, _PLAIN)
    if rule.keep:
        return rule.keep(rows, values)
    _, kept = rows.guest.profile.msr_bits.get(index, (U64, U64))
    return values & np.uint64(kept) | _default(rows, index) & np.uint64(U64 & ~kept)


def show(rows: Rows, index: int) -> Column:
    """What KVM_GET_MSRS gives."""
    stored: Column = rows.get(storage(index))[:, 0]
    rule = _BY_INDEX.get(index, _PLAIN)
    shown = rule.show(rows, stored) if rule.show else stored
    return _filtered(rows, index, shown)


def _filtered(rows: Rows, index: int, values: Column) -> Column:
    """The optional rule `evmcs`: VMX MSRs without the controls that an enlightened VMCS has no field for."""
    generation = rows.guest.profile.behaviour.get("evmcs_filter", 0)
    if not generation or not (*rows.guest.told.get(EVMCS_CAP, ()), 0)[0]:
        return values
    return values & np.uint64(FILTERS[generation].get(index, U64))


def unreadable(rows: Rows, index: int) -> bool:
    """Whether KVM_GET_MSRS stops at the MSR."""
    return not listed(rows, index) or bool(rows.guest.profile.refused.get(ids.msr_id(index), (0, 0))[0])
