"""MSRs that every kernel knows and none lists: KVM_GET_MSRS and KVM_SET_MSRS reach two words of KVM_SREGS by them.

A save has these words in KVM_SREGS; a VMM may use either way. `measured` is on 6.1, 6.12, 7.2 and 6.18-pvm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import cpuid, rules_cpu, rules_devices, rules_svm
from migstream.backends.sim.msr_rule import MsrRule
from migstream.backends.sim.rules import U64, bits

if TYPE_CHECKING:
    from migstream.backends.sim.guest import Mask, Rows
    from migstream.backends.sim.msr_rule import Column
    from migstream.host.profile import HostProfile
    from migstream.model import Words

EFER, APIC_BASE = 0xC000_0080, 0x1B
UNLISTED = (EFER, APIC_BASE)

_ALWAYS = 0x501
"""EFER.SCE, LME and LMA, on a 64-bit kernel (efer_reserved_bits)."""

_LMA = 1 << 10
_BY_FEATURE = ((1 << 11, cpuid.EDX, 20), (0b11 << 12, cpuid.ECX, 2))
"""(bits of EFER, register and bit of CPUID leaf 0x80000001 with which the kernel enables them): NX; SVME and LMSLE."""

_UNKNOWN = U64
"""`efer_taken` of a kernel that takes everything by KVM_SET_SREGS, which says nothing of KVM_SET_MSRS."""


def _efer_bits(profile: HostProfile) -> int:
    """Bits that the kernel enabled, whatever the vCPU's CPUID says: the host's own write is not held against it."""
    taken = profile.behaviour.get("efer_taken", _UNKNOWN)
    if taken != _UNKNOWN:
        return taken
    table = np.frombuffer(profile.cpuid, np.uint64)[np.newaxis]
    return _ALWAYS | sum(wanted for wanted, register, bit in _BY_FEATURE
                         if int(cpuid.word(table, 0x8000_0001, 0, register)[0]) >> bit & 1)


def _efer_beyond(rows: Rows, values: Column) -> Mask:
    return bits(values, U64 & ~_efer_bits(rows.guest.profile))


def _keep_efer(rows: Rows, values: Column) -> Column:
    """LMA follows paging: it stays as it is."""
    now, before = _replaced(rows, rules_cpu.EFER, values)
    kept = values & np.uint64(U64 & ~_LMA) | before[:, rules_cpu.EFER] & np.uint64(_LMA)
    now[:, rules_cpu.EFER] = kept
    rows.put(rules_cpu.SREGS2, now)
    rules_svm.svm_off(rows, now, before)
    return kept


def _show_efer(rows: Rows, values: Column) -> Column:
    return rows.get(rules_cpu.SREGS2)[:, rules_cpu.EFER]


def _no_base(rows: Rows, values: Column) -> Mask:
    return rules_cpu.bad_apic_base(rows, _replaced(rows, rules_cpu.APIC_BASE, values)[0])


def _keep_base(rows: Rows, values: Column) -> Column:
    now, before = _replaced(rows, rules_cpu.APIC_BASE, values)
    rows.put(rules_cpu.SREGS2, now)
    rules_devices.mode_changed(rows, now, before)
    return values


def _show_base(rows: Rows, values: Column) -> Column:
    return rows.get(rules_cpu.SREGS2)[:, rules_cpu.APIC_BASE]


def _replaced(rows: Rows, word: int, values: Column) -> tuple[Words, Words]:
    """KVM_SREGS2 with one word changed, and as it is."""
    before = rows.get(rules_cpu.SREGS2).copy()
    now = before.copy()
    now[:, word] = values
    return now, before


RULES = (
    MsrRule("EFER: what the kernel enabled; LMA stays", (EFER,), "set_efer, host_initiated; measured",
            refuse=_efer_beyond, keep=_keep_efer, show=_show_efer),
    MsrRule("APIC base: as by KVM_SET_SREGS", (APIC_BASE,), "kvm_apic_set_base, host_initiated; measured",
            refuse=_no_base, keep=_keep_base, show=_show_base),
)
