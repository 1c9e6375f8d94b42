"""Rules of Hyper-V's MSRs, which KVM emulates (arch/x86/kvm/hyperv.c), as a VMM meets them: it may more than a guest.

Every rule was met as a divergence from the lab's kernels, or guards against one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.msr_rule import MsrRule, in_ram
from migstream.backends.sim.rules import U64, bits, mask
from migstream.registers import ids, x86_64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Guest, Mask, Rows
    from migstream.backends.sim.msr_rule import Column
    from migstream.model import Words

GUEST_OS_ID, HYPERCALL, VP_INDEX = 0x4000_0000, 0x4000_0001, 0x4000_0002
VP_RUNTIME, TIME_REF_COUNT = 0x4000_0010, 0x4000_0020
TSC_FREQUENCY, APIC_FREQUENCY, VP_ASSIST = 0x4000_0022, 0x4000_0023, 0x4000_0073
PV_EOI_EN = 0x4B56_4D04
_ENABLE, _LOW = 1, 0xFFFF_FFFF
_PAGE = U64 & ~0xFFF
_CODE = 4
"""Bytes that KVM writes into a hypercall page: VMMCALL or VMCALL, RET."""


def _never(rows: Rows, values: Column) -> Mask:
    return np.zeros(len(values), np.bool_)


def _no_hypercall_page(rows: Rows, values: Column) -> Mask:
    named = mask(rows.get(ids.msr_id(GUEST_OS_ID))[:, 0] != 0)
    return named & _beyond_memory(rows, values)


def _hypercall(rows: Rows, values: Column) -> Column:
    """Ignored while no guest has said who it is."""
    named = rows.get(ids.msr_id(GUEST_OS_ID))[:, 0] != 0
    return np.where(named, values, rows.get(ids.msr_id(HYPERCALL))[:, 0])


def _os_id(rows: Rows, values: Column) -> Column:
    """A guest that is nobody has no hypercall page."""
    page = rows.get(ids.msr_id(HYPERCALL)).copy()
    page[values == 0] &= np.uint64(U64 & ~_ENABLE)
    rows.put(ids.msr_id(HYPERCALL), page)
    return values


def _no_vp(rows: Rows, values: Column) -> Mask:
    return mask((values & np.uint64(_LOW)) >= rows.guest.profile.max_vcpus)


def _vp(rows: Rows, values: Column) -> Column:
    return values & np.uint64(_LOW)


def _no_assist_page(rows: Rows, values: Column) -> Mask:
    return _beyond_memory(rows, values)


def _beyond_memory(rows: Rows, values: Column) -> Mask:
    """An enabled page outside of RAM. A vCPU in system management mode has another address space, which is empty."""
    there = in_ram(rows, values & np.uint64(_PAGE), _CODE) & ~bits(rows.get(x86_64.VCPU_EVENTS.id)[:, 3], 0xFF)
    return bits(values, _ENABLE) & ~there


def _assist(rows: Rows, values: Column) -> Column:
    """The end-of-interrupt flag lies in the assist page: one state for both MSRs."""
    on = bits(values, _ENABLE)
    flag = np.where(on, values & np.uint64(_PAGE) | np.uint64(_ENABLE), np.uint64(0))
    rows.put(ids.msr_id(PV_EOI_EN), flag[:, np.newaxis])
    return values


def _tsc_frequency(rows: Rows, values: Column) -> Column:
    khz: Column = rows.get(x86_64.TSC_KHZ.id)[:, 0] & np.uint64(_LOW)
    return khz * np.uint64(1000)


def _as_it_is(index: int) -> MsrRule:
    def keep(rows: Rows, values: Column) -> Column:
        stored: Column = rows.get(ids.msr_id(index))[:, 0]
        return stored

    return MsrRule("a write is taken and ignored", (index,), "kvm_hv_set_msr: read-only", refuse=_never, keep=keep,
                   show=_tsc_frequency if index == TSC_FREQUENCY else None)


RULES = (
    MsrRule("ignored without GUEST_OS_ID, else enabled in guest memory", (HYPERCALL,), "kvm_hv_set_msr_pw",
            refuse=_no_hypercall_page, keep=_hypercall),
    MsrRule("0 disables the hypercall page", (GUEST_OS_ID,), "kvm_hv_set_msr_pw", refuse=_never, keep=_os_id),
    MsrRule("32 bits, below the number of vCPUs that a VM may have", (VP_INDEX,), "kvm_hv_set_msr: KVM_MAX_VCPUS",
            refuse=_no_vp, keep=_vp),
    MsrRule("enabled in guest memory; sets PV EOI", (VP_ASSIST,), "kvm_hv_set_msr: kvm_lapic_set_pv_eoi",
            refuse=_no_assist_page, keep=_assist),
    _as_it_is(TSC_FREQUENCY), _as_it_is(APIC_FREQUENCY), _as_it_is(TIME_REF_COUNT), _as_it_is(VP_RUNTIME),
)


def _reset_vp_index(guest: Guest, numbers: NDArray[np.uint64], rows: Words) -> None:
    rows[:, 0] = numbers


RESETS = {ids.msr_id(VP_INDEX): _reset_vp_index}
"""kvm_hv_vcpu_init: the index of the vCPU."""
