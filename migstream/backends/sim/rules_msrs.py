"""Rules of MSRs on x86-64: what a kernel takes, stores and shows.

Which bits of an MSR are taken and kept is data of the profile (`msr_bits`). Here is what no trial of single bits
shows: values that must be sign-extended, two names of one MSR, MSRs that follow something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import cpuid, rules_hyperv, rules_modes
from migstream.backends.sim.msr_rule import MsrRule, in_ram, version
from migstream.backends.sim.rules import U64, bits, mask
from migstream.backends.sim.rules_vmx import RULES as VMX_RULES
from migstream.backends.sim.variants_x86_64 import EVMCS_CAP, FILTERS, PERF_GLOBAL, PERF_GLOBAL_CPUID
from migstream.registers import ids, x86_64

if TYPE_CHECKING:
    from migstream.backends.sim.guest import Mask, Rows
    from migstream.backends.sim.msr_rule import Column

TSC, TSC_ADJUST, TSC_DEADLINE, UCODE_REV = 0x10, 0x3B, 0x6E0, 0x8B
TSC_RATIO, TSC_AUX = 0xC000_0104, 0xC000_0103
LSTAR, SYSENTER_EIP, PAT = 0xC000_0082, 0x176, 0x277
ASYNC_PF_EN, PV_EOI_EN, ASYNC_PF_INT = 0x4B56_4D02, 0x4B56_4D04, 0x4B56_4D06
PLATFORM_INFO, MISC_FEATURES = 0xCE, 0x140
_CPUID_FAULT, _CPUID_FAULTS = 1 << 31, 1
"""Of MSR_PLATFORM_INFO: there are faults of CPUID. Of MSR_MISC_FEATURES_ENABLES: they are on."""

_FAULTS_MAY_STAY = (6, 18)
_CR4, _LA57 = 31, 1 << 12
_BY_INTERRUPT = 0b1001
"""KVM_ASYNC_PF_ENABLED and KVM_ASYNC_PF_DELIVERY_AS_INT."""

_APIC_BASE, _APIC_ENABLE = 34, 1 << 11


def _canonical(values: Column, width: int) -> Column:
    """The value with the highest bit of a linear address copied into the bits above it."""
    high = np.uint64(U64 << width & U64)
    return np.where(bits(values, 1 << width - 1), values | high, values & ~high)


def _whole(rows: Rows, values: Column) -> Column:
    return values


def _taken(rows: Rows, index: int) -> int:
    return rows.guest.profile.msr_bits.get(index, (U64, U64))[0]


def _as_address(rows: Rows, values: Column) -> Column:
    """48 bits, or 57: on a host with 5-level paging (LSTAR took one bit less), or while the vCPU has it on."""
    if _taken(rows, LSTAR) >> 48 & 1:
        return _canonical(values, 57)
    wide = bits(rows.get(x86_64.SREGS2.id)[:, _CR4], _LA57)
    return np.where(wide, _canonical(values, 57), _canonical(values, 48))


def _not_canonical(rows: Rows, values: Column) -> Mask:
    return mask(_as_address(rows, values) != values)


def _counts_as_intel(rows: Rows) -> Mask:
    """A vCPU without CPUID, since 6.9 (guest_cpuid_is_intel_compatible)."""
    nobody = cpuid.word(rows.get(cpuid.ID), 0, 0, cpuid.EBX) == 0
    return mask(nobody & (version(rows.guest.profile) >= (6, 9)))


def _beyond_aux(rows: Rows, values: Column) -> Mask:
    return _not_taken(rows, TSC_AUX, values) | _counts_as_intel(rows) & mask(values >> np.uint64(32) != 0)


def _entry_point(rows: Rows, values: Column) -> Column:
    """Made canonical; of a vCPU that is AMD's, kvm-amd keeps the low 32 bits (svm_set_msr)."""
    _, kept = rows.guest.profile.msr_bits.get(SYSENTER_EIP, (U64, U64))
    if kept >> 47 & 1:
        return _as_address(rows, values)
    return np.where(_counts_as_intel(rows), _as_address(rows, values), values & np.uint64(kept))


def _shown_entry_point(rows: Rows, values: Column) -> Column:
    """kvm-amd shows the high half to a vCPU of Intel's alone, which CPUID may end (svm_get_msr)."""
    _, kept = rows.guest.profile.msr_bits.get(SYSENTER_EIP, (U64, U64))
    if kept >> 47 & 1:
        return values
    return np.where(_counts_as_intel(rows), values, values & np.uint64(kept))


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
    enabled = bits(rows.get(x86_64.SREGS2.id)[:, _APIC_BASE], _APIC_ENABLE)
    return rows.guest.deadline[rows.numbers] & enabled


def _keep_deadline(rows: Rows, values: Column) -> Column:
    return np.where(_deadline_mode(rows), values, rows.get(ids.msr_id(TSC_DEADLINE))[:, 0])


def _show_deadline(rows: Rows, values: Column) -> Column:
    return np.where(_deadline_mode(rows), values, np.uint64(0))


def _adjust(rows: Rows, values: Column) -> Column:
    offered = bits(cpuid.word(rows.get(cpuid.ID), 7, 0, cpuid.EBX), 1 << 1)
    return np.where(offered, values, rows.get(ids.msr_id(TSC_ADJUST))[:, 0])


def _nothing(rows: Rows, values: Column) -> Mask:
    return np.zeros(len(values), np.bool_)


_AREA_FIRST = (7, 0)
"""Release since which an area outside of RAM is refused before the value is stored; measured: 7.2 does, 6.18 not."""


def _no_page_faults(rows: Rows, values: Column) -> Mask:
    no = mask(_not_taken(rows, ASYNC_PF_EN, values) | mask(values != 0) & (not rows.guest.has("irqchip")))
    return no | _no_page_fault_area(rows, values) & (version(rows.guest.profile) >= _AREA_FIRST)


def _no_page_fault_area(rows: Rows, values: Column) -> Mask:
    on = mask((values & np.uint64(_BY_INTERRUPT)) == _BY_INTERRUPT)
    return mask(on & ~in_ram(rows, values & np.uint64(U64 & ~0x3F), 8))


def _no_page_fault_vector(rows: Rows, values: Column) -> Mask:
    return mask(_not_taken(rows, ASYNC_PF_INT, values) | (not rows.guest.has("irqchip")))


def _no_eoi_flag(rows: Rows, values: Column) -> Mask:
    lost = bits(values, 1) & ~in_ram(rows, values & np.uint64(U64 & ~1), 1)
    return _not_taken(rows, PV_EOI_EN, values) | lost


def _another_ratio(rows: Rows, values: Column) -> Mask:
    return mask((values != 0) & (values != rows.get(ids.msr_id(TSC_RATIO))[:, 0]))


def _same_ratio(rows: Rows, values: Column) -> Column:
    stored: Column = rows.get(ids.msr_id(TSC_RATIO))[:, 0]
    return stored


def _faults(rows: Rows) -> Mask:
    return bits(rows.get(ids.msr_id(MISC_FEATURES))[:, 0], _CPUID_FAULTS)


def _ends_faulting(rows: Rows, values: Column) -> Mask:
    """A vCPU that has faults of CPUID on can't be told that there are none, on kernels before 6.18."""
    looks = version(rows.guest.profile) < _FAULTS_MAY_STAY
    return _not_taken(rows, PLATFORM_INFO, values) | _faults(rows) & ~bits(values, _CPUID_FAULT) & looks


def _no_faulting(rows: Rows, values: Column) -> Mask:
    """Nor can they be put on where there are none; a kernel that takes any value does not look."""
    offered = bits(rows.get(ids.msr_id(PLATFORM_INFO))[:, 0], _CPUID_FAULT)
    looks = _taken(rows, MISC_FEATURES) != U64
    return _not_taken(rows, MISC_FEATURES, values) | bits(values, _CPUID_FAULTS) & ~offered & looks


RULES = (
    MsrRule("faults of CPUID are offered as long as they are on", (PLATFORM_INFO,),
            "kvm_set_msr_common: cpuid_fault_enabled; measured: 6.12 looks, 6.18 and 7.2 do not",
            refuse=_ends_faulting),
    MsrRule("faults of CPUID where they are offered", (MISC_FEATURES,),
            "kvm_set_msr_common: supports_cpuid_fault; measured: 6.18-pvm takes any value", refuse=_no_faulting),
    MsrRule("needs an APIC, and an area in guest memory", (ASYNC_PF_EN,),
            "kvm_pv_enable_async_pf", refuse=_no_page_faults, late=_no_page_fault_area),
    MsrRule("needs an APIC", (ASYNC_PF_INT,), "kvm_pv_enable_async_pf_int", refuse=_no_page_fault_vector),
    MsrRule("needs guest memory", (PV_EOI_EN,), "kvm_lapic_set_pv_eoi", refuse=_no_eoi_flag),
    MsrRule("addresses must be canonical", (LSTAR, 0xC000_0083, 0xC000_0102), "__kvm_set_msr",
            refuse=_not_canonical, keep=_whole),
    MsrRule("addresses are made canonical", (0x175, SYSENTER_EIP), "__kvm_set_msr: __canonical_address",
            refuse=_nothing, keep=_entry_point, show=_shown_entry_point),
    MsrRule("eight memory types", (PAT,), "kvm_pat_valid", refuse=_no_memory_type, keep=_whole),
    MsrRule("a running clock", (TSC,), "kvm_synchronize_tsc; `tsc_follows`", refuse=_nothing, keep=_write_tsc,
            show=_tsc),
    MsrRule("32 bits; of an Intel vCPU the others are refused", (TSC_AUX,), "kvm_set_msr: MSR_TSC_AUX",
            refuse=_beyond_aux),
    MsrRule("nothing but the ratio that it has, or 0, which is ignored", (TSC_RATIO,), "svm_set_msr: no TSC scaling",
            refuse=_another_ratio, keep=_same_ratio),
    MsrRule("kept in the timer's deadline mode alone, shown while the APIC is enabled, too", (TSC_DEADLINE,),
            "kvm_set_lapic_tscdeadline_msr, kvm_get_lapic_tscdeadline_msr: kvm_apic_present",
            refuse=_nothing, keep=_keep_deadline, show=_show_deadline),
    MsrRule("ignored unless CPUID has it", (TSC_ADJUST,), "kvm_set_msr_common: X86_FEATURE_TSC_ADJUST",
            refuse=_nothing, keep=_adjust),
    *VMX_RULES,
)

_BY_INDEX = {index: rule for rule in (*RULES, *rules_hyperv.RULES, *rules_modes.RULES) for index in rule.indices}
_PLAIN = MsrRule("plain storage", (), "")

ALIASES = {0x4B56_4D00: 0x11, 0x4B56_4D01: 0x12}
"""MSRs that share their storage with another: the new and the old name of kvmclock's two (kvm_set_msr_common)."""


def storage(index: int) -> int:
    """Id of the register in which an MSR is stored."""
    return ids.msr_id(ALIASES.get(index, index))


def listed(rows: Rows, index: int) -> bool:
    """Whether the kernel knows the MSR at all: here those that the profile lists, and two that no kernel lists."""
    profile = rows.guest.profile
    return index in profile.msrs or index in profile.feature_msrs or index in rules_modes.UNLISTED


GATES: dict[int, tuple[int, int, int, int]] = {
    0x10A: (7, 0, cpuid.EDX, 29),
}
"""MSRs that only a vCPU with a CPUID bit has (leaf, subleaf, register, bit), since 6.13: without it they read 0, and
nothing but 0 is taken (kvm_do_msr_access). IA32_ARCH_CAPABILITIES."""


def _offered(rows: Rows, index: int) -> Mask:
    gate = GATES.get(index)
    if gate is None or version(rows.guest.profile) < (6, 13):
        return np.ones(len(rows.numbers), np.bool_)
    return bits(cpuid.word(rows.get(cpuid.ID), *gate[:3]), 1 << gate[3])


def refused(rows: Rows, index: int, values: Column) -> Mask:
    """The rows that KVM_SET_MSRS stops at."""
    if not listed(rows, index) or _write_errno(rows, index):
        return np.ones(len(values), np.bool_)
    rule = _BY_INDEX.get(index, _PLAIN)
    no = rule.refuse(rows, values) if rule.refuse else _not_taken(rows, index, values)
    return mask(no | _fixed_by_run(rows, index, values) | ~_offered(rows, index) & (values != 0))


def _write_errno(rows: Rows, index: int) -> int:
    return rows.guest.profile.refused.get(ids.msr_id(index), (0, 0))[1]


def _not_taken(rows: Rows, index: int, values: Column) -> Mask:
    """A bit that is not taken, unless the value is the one that every vCPU starts with."""
    taken, _ = _tried(rows, index)
    return bits(values, U64 & ~taken) & mask(values != _default(rows, index))


def _tried(rows: Rows, index: int) -> tuple[int, int]:
    """Bits that are taken, and kept, as tried on the recorded kernel; feature MSRs were tried with the registers."""
    profile = rows.guest.profile
    if index in profile.msr_bits:
        return profile.msr_bits[index]
    taken, kept = profile.register_bits.get(ids.msr_id(index), (b"", b""))
    return (int.from_bytes(taken, "little"), int.from_bytes(kept, "little")) if taken else (U64, U64)


def _fixed_by_run(rows: Rows, index: int, values: Column) -> Mask:
    """Feature MSRs can't change once the vCPU has run, since 6.4 (kvm_is_immutable_feature_msr); microcode can."""
    profile = rows.guest.profile
    if index not in profile.feature_msrs or index == UCODE_REV or version(profile) < (6, 4):
        return np.zeros(len(values), np.bool_)
    return mask(rows.guest.ran[rows.numbers] & (values != show(rows, index)))


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
    if index in GATES:  # the 0 that a vCPU without the MSR takes is not stored
        return np.where(_offered(rows, index), values, rows.get(storage(index))[:, 0])
    if rule.keep:
        return rule.keep(rows, values)
    _, kept = _tried(rows, index)
    return values & np.uint64(kept) | _default(rows, index) & np.uint64(U64 & ~kept)


def show(rows: Rows, index: int) -> Column:
    """What KVM_GET_MSRS gives."""
    stored: Column = rows.get(storage(index))[:, 0]
    rule = _BY_INDEX.get(index, _PLAIN)
    shown = rule.show(rows, stored) if rule.show else stored
    return np.where(_offered(rows, index), _filtered(rows, index, shown), np.uint64(0))


def _filtered(rows: Rows, index: int, values: Column) -> Column:
    """The optional rule `evmcs`: VMX MSRs without the controls that an enlightened VMCS has no field for."""
    generation = rows.guest.profile.behaviour.get("evmcs_filter", 0)
    if not generation or not (*rows.guest.told.get(EVMCS_CAP, ()), 0)[0]:
        return values
    kept = values & np.uint64(FILTERS[generation].get(index, U64))
    if index not in PERF_GLOBAL:
        return kept
    leaf, subleaf, register, bit = PERF_GLOBAL_CPUID
    allowed = bits(cpuid.word(rows.get(cpuid.ID), leaf, subleaf, register), 1 << bit)
    return np.where(allowed, kept, kept & np.uint64(PERF_GLOBAL[index]))


def unreadable(rows: Rows, index: int) -> bool:
    """Whether KVM_GET_MSRS stops at the MSR."""
    return not listed(rows, index) or bool(rows.guest.profile.refused.get(ids.msr_id(index), (0, 0))[0])
