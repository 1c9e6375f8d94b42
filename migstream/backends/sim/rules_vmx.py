"""Rules of the VMX capability MSRs: what a VMM may restore of them (arch/x86/kvm/vmx/nested.c, vmx_set_vmx_msr).

The host's value, `HostProfile.feature_msrs`, is the ceiling. What KVM makes of other MSRs or of CPUID it refuses even
with the value that it has; a restore that meets such a refusal looks whether the value is there anyway. No vCPU is in
VMX operation here, in which all of them would be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.msr_rule import MsrRule
from migstream.backends.sim.rules import U64, bits, mask
from migstream.registers import ids

if TYPE_CHECKING:
    from migstream.backends.sim.guest import Mask, Rows
    from migstream.backends.sim.msr_rule import Column

BASIC, MISC, VMCS_ENUM, CTLS2, EPT_VPID_CAP, VMFUNC = 0x480, 0x485, 0x48A, 0x48B, 0x48C, 0x491
TRUE_PIN = 0x48D
FIXED0, FIXED1 = (0x486, 0x488), (0x487, 0x489)
TRUE_FORMS = {0x481: TRUE_PIN, 0x482: 0x48E, 0x483: 0x48F, 0x484: 0x490}
"""Control MSRs that KVM makes, to those that it makes them of."""

DEFAULT1 = {0x481: 0x16, 0x482: 0x0401_E172, 0x483: 0x0003_6DFF, 0x484: 0x11FF}
"""Controls that must be 1 for a hypervisor that knows no TRUE forms (SDM volume 3, appendix A.2)."""

_LOW = 0xFFFF_FFFF
_BASIC_FEATURES = 1 << 31 | 0b111 << 45 | 1 << 49 | 0b11 << 54 | 0xFF << 56
_BASIC_32BIT, _REVISION, _VMCS_SIZE = 1 << 48, 0x7FFF_FFFF, 0x1FFF << 32
_MISC_FEATURES = 1 << 5 | 0b111 << 6 | 0b1_1111 << 9 | 0b11 << 14 | 0b1111 << 28
_TIMER_RATE, _CR3_COUNT, _MAX_MSR, _MSEG_REVISION = 0x1F, 0x1FF << 16, 0b111 << 25, _LOW << 32
_PREEMPTION_TIMER = 1 << 38
"""In the high half of the pin-based controls."""


def _host(rows: Rows, index: int) -> int:
    return rows.guest.profile.feature_msrs.get(index, 0)


def _all(rows: Rows, values: Column) -> Mask:
    return np.ones(len(values), np.bool_)


def _none(rows: Rows, values: Column) -> Mask:
    return np.zeros(len(values), np.bool_)


def _as_written(rows: Rows, values: Column) -> Column:
    return values


def _more(values: Column, host: int, within: int = U64) -> Mask:
    """A bit that the host has not."""
    return bits(values, within & ~host)


def _less(values: Column, host: int, within: int = U64) -> Mask:
    """A bit of the host's is missing."""
    return bits(~values, within & host)


def _beyond(values: Column, host: int, field: int) -> Mask:
    return mask((values & np.uint64(field)) > np.uint64(host & field))


def _another(values: Column, host: int, field: int) -> Mask:
    return mask((values & np.uint64(field)) != np.uint64(host & field))


def _bad_basic(rows: Rows, values: Column) -> Mask:
    host = _host(rows, BASIC)
    small = mask((values & np.uint64(_VMCS_SIZE)) < np.uint64(host & _VMCS_SIZE))
    return _more(values, host, _BASIC_FEATURES) | bits(values, _BASIC_32BIT) | _another(values, host, _REVISION) | small


def _bad_misc(rows: Rows, values: Column) -> Mask:
    host = _host(rows, MISC)
    timer = bits(rows.get(ids.msr_id(TRUE_PIN))[:, 0], _PREEMPTION_TIMER)
    return (_more(values, host, _MISC_FEATURES) | timer & _another(values, host, _TIMER_RATE)
            | _beyond(values, host, _CR3_COUNT) | _beyond(values, host, _MAX_MSR)
            | _another(values, host, _MSEG_REVISION))


def _bad_control(index: int) -> Callable[[Rows, Column], Mask]:
    def test(rows: Rows, values: Column) -> Mask:
        host = _host(rows, index)
        return _less(values, host, _LOW) | _more(values, host, _LOW << 32)

    return test


def _bad_fixed(index: int) -> Callable[[Rows, Column], Mask]:
    return lambda rows, values: _less(values, _host(rows, index))


def _not_offered(index: int) -> Callable[[Rows, Column], Mask]:
    return lambda rows, values: _more(values, _host(rows, index))


def _of_true_form(index: int) -> Callable[[Rows, Column], Column]:
    def show(rows: Rows, values: Column) -> Column:
        if TRUE_FORMS[index] not in rows.guest.profile.feature_msrs:
            return values
        true: Column = rows.get(ids.msr_id(TRUE_FORMS[index]))[:, 0]
        return true | np.uint64(DEFAULT1[index])

    return show


RULES = (
    MsrRule("the same revision, no smaller a VMCS, no new feature", (BASIC,), "vmx_restore_vmx_basic",
            refuse=_bad_basic, keep=_as_written),
    *(MsrRule("what must be 1 is 1, what may not be 1 is 0", (index,), "vmx_restore_control_msr",
              refuse=_bad_control(index), keep=_as_written) for index in (CTLS2, *TRUE_FORMS.values())),
    *(MsrRule("made of the TRUE form: never written", (index,), "vmx_set_vmx_msr: -EINVAL; vmx_get_vmx_msr",
              refuse=_all, show=_of_true_form(index)) for index in TRUE_FORMS),
    MsrRule("no new feature; the timer's rate and the MSEG revision stay, counts may fall", (MISC,),
            "vmx_restore_vmx_misc", refuse=_bad_misc, keep=_as_written),
    *(MsrRule("what must be 1 is 1; more may be", (index,), "vmx_restore_fixed0_msr", refuse=_bad_fixed(index),
              keep=_as_written) for index in FIXED0),
    MsrRule("made of CPUID: never written", FIXED1, "vmx_set_vmx_msr: -EINVAL", refuse=_all),
    MsrRule("no new feature", (EPT_VPID_CAP,), "vmx_restore_vmx_ept_vpid_cap", refuse=_not_offered(EPT_VPID_CAP),
            keep=_as_written),
    MsrRule("taken as it is", (VMCS_ENUM,), "vmx_set_vmx_msr", refuse=_none, keep=_as_written),
    MsrRule("no new function", (VMFUNC,), "vmx_set_vmx_msr: vmfunc_controls", refuse=_not_offered(VMFUNC),
            keep=_as_written),
)
