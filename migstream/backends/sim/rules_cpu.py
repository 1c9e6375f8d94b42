"""Rules of a vCPU's own registers on x86-64: control registers, general registers, FPU, events.

`source` names the function of arch/x86/kvm that does it; `measured` means that the kernel of the profile
x86_64-6.18-pvm answers so, which the contract suite holds against real KVM.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import cpuid, rules_fpu
from migstream.backends.sim.msr_rule import version
from migstream.backends.sim.rules import U64, After, Keep, Refuse, Show, bits, mask
from migstream.registers import x86_64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Mask, Rows
    from migstream.model import Words

REGS, SREGS, SREGS2, XCRS = x86_64.REGS.id, x86_64.SREGS.id, x86_64.SREGS2.id, x86_64.XCRS.id
XSAVE, DEBUGREGS, EVENTS, MP_STATE = x86_64.XSAVE.id, x86_64.DEBUGREGS.id, x86_64.VCPU_EVENTS.id, x86_64.MP_STATE.id
BOTH_SREGS = (SREGS, SREGS2)

CR0, CR3, CR4, CR8, EFER, APIC_BASE = 28, 30, 31, 32, 33, 34
FLAGS, PDPTRS = 35, 36
RIP, RFLAGS = 16, 17
SHARED = 35
"""64-bit words that kvm_sregs and kvm_sregs2 have in common."""

_PE, _NW, _CD, _PG = 1 << 0, 1 << 29, 1 << 30, 1 << 31
_PAE, _LME, _LMA = 1 << 5, 1 << 8, 1 << 10
_APIC_ENABLE, _X2APIC = 1 << 11, 1 << 10
_CS_LONG = 0xFF << 24
_DTABLES = (25, 27)


def _cr0(rows: Rows, values: Words) -> Mask:
    cr0 = values[:, CR0]
    return mask(bits(cr0, U64 << 32 & U64) | bits(cr0, _PG) & ~bits(cr0, _PE) | bits(cr0, _NW) & ~bits(cr0, _CD))


_CR4_FEATURES = ((11, 7, 0, cpuid.ECX, 2), (12, 7, 0, cpuid.ECX, 16), (16, 7, 0, cpuid.EBX, 0),
                 (17, 1, 0, cpuid.ECX, 17), (18, 1, 0, cpuid.ECX, 26), (20, 7, 0, cpuid.EBX, 7),
                 (21, 7, 0, cpuid.EBX, 20), (22, 7, 0, cpuid.ECX, 3))
"""(bit of CR4, leaf, subleaf, register, bit of CPUID that offers it): UMIP, LA57, FSGSBASE, PCID, XSAVE, SMEP, SMAP,
PKU."""

_EFER_FEATURES = ((8, 0x8000_0001, 0, cpuid.EDX, 29), (10, 0x8000_0001, 0, cpuid.EDX, 29),
                  (11, 0x8000_0001, 0, cpuid.EDX, 20), (12, 0x8000_0001, 0, cpuid.ECX, 2),
                  (14, 0x8000_0001, 0, cpuid.EDX, 25))
"""The same of EFER: long mode for LME and LMA, NX, SVM, FXSR_OPT."""


def _not_offered(rows: Rows, register: NDArray[np.uint64], features: tuple[tuple[int, ...], ...]) -> Mask:
    """Rows where a bit is set whose feature the vCPU's CPUID has not, though the kernel's supported CPUID has it.

    A feature that the kernel puts into every table itself is there without one (guest_cpu_cap_set; measured on pvm).
    """
    bad = np.zeros(len(register), np.bool_)
    if not bits(register, sum({1 << bit for bit, *_ in features})).any():
        return bad
    table = cpuid.Tables(rows.get(cpuid.ID))
    known = cpuid.Tables(np.frombuffer(rows.guest.profile.cpuid, np.uint64)[np.newaxis])
    for bit, leaf, subleaf, where, feature in features:
        _, forced = rows.guest.profile.cpuid_forced.get(leaf << 32 | subleaf << 8 | where, (0, 0))
        if forced >> feature & 1:
            continue
        there, here = (bits(one.word(leaf, subleaf, where), 1 << feature) for one in (known, table))
        bad |= bits(register, 1 << bit) & there & ~here
    return bad


def _looks_at_cpuid(rows: Rows) -> Mask:
    """Before 6.14 nothing is checked against the CPUID of a vCPU that was given none (kvm_arch_vcpu_create)."""
    return mask(rows.guest.has_cpuid[rows.numbers] | (version(rows.guest.profile) >= (6, 14)))


def _cr4(rows: Rows, values: Words) -> Mask:
    beyond = bits(values[:, CR4], U64 & ~rows.guest.profile.behaviour.get("cr4_taken", U64))
    return beyond | _looks_at_cpuid(rows) & _not_offered(rows, values[:, CR4], _CR4_FEATURES)


def _efer(rows: Rows, values: Words) -> Mask:
    taken = rows.guest.profile.behaviour.get("efer_taken", U64)
    if taken == U64:
        return np.zeros(len(values), np.bool_)
    return bits(values[:, EFER], U64 & ~taken) | _not_offered(rows, values[:, EFER], _EFER_FEATURES)


def _long(values: Words) -> Mask:
    return bits(values[:, EFER], _LME) & bits(values[:, CR0], _PG)


def _long_mode(rows: Rows, values: Words) -> Mask:
    width = cpuid.physical_bits(rows.get(cpuid.ID))
    bad_cr3 = mask((values[:, CR3] >> width) != 0)
    return _long(values) & (~bits(values[:, CR4], _PAE) | ~bits(values[:, EFER], _LMA) | bad_cr3)


def _other_mode(rows: Rows, values: Words) -> Mask:
    return ~_long(values) & (bits(values[:, EFER], _LMA) | bits(values[:, 2], _CS_LONG))


def bad_apic_base(rows: Rows, values: Words) -> Mask:
    """The rows whose APIC base (in a word of KVM_SREGS2) is refused."""
    base, tables = values[:, APIC_BASE], rows.get(cpuid.ID)
    x2apic = bits(cpuid.word(tables, 1, 0, cpuid.ECX), 1 << 21)
    beyond = mask((base >> cpuid.physical_bits(tables)) != 0)
    bad = beyond | bits(base, 0x2FF) | bits(base, _X2APIC) & ~x2apic | bits(base, _X2APIC) & ~bits(base, _APIC_ENABLE)
    unlooked = version(rows.guest.profile) >= (6, 13)  # since then an equal value is not looked at
    return mask(bad & ~((base == rows.get(SREGS2)[:, APIC_BASE]) & unlooked))


def _pdptrs(rows: Rows, values: Words) -> Mask:
    pae = bits(values[:, CR0], _PG) & bits(values[:, CR4], _PAE) & ~bits(values[:, EFER], _LMA)
    return bits(values[:, FLAGS], U64 - 1) | bits(values[:, FLAGS], 1) & ~pae


def _debugregs_flags(rows: Rows, values: Words) -> Mask:
    return mask(values[:, 6] != 0)


def _high_halves(rows: Rows, values: Words) -> Mask:
    return mask((values[:, 4:6] >> np.uint64(32)).any(axis=1))


_SHADOW, _PAYLOAD, _TRIPLE = 4, 0x10, 0x20
_NMI, _SIPI, _SMM = 1, 2, 8
_CAP_PAYLOAD, _CAP_TRIPLE = 164, 218


def _enabled(rows: Rows, capability: int) -> bool:
    return bool((*rows.guest.told.get(capability, ()), 0)[0])


def _event_flags(rows: Rows) -> int:
    return (_NMI | _SHADOW | _SMM | (_PAYLOAD if _enabled(rows, _CAP_PAYLOAD) else 0)
            | (_TRIPLE if _enabled(rows, _CAP_TRIPLE) else 0))


def _flags(values: Words) -> NDArray[np.uint64]:
    return values[:, 2] >> np.uint64(32)


def _bad_event_flags(rows: Rows, values: Words) -> Mask:
    return bits(_flags(values), 0xFFFF_FFFF & ~(_event_flags(rows) | _SIPI | _TRIPLE))


def _untold_triple_fault(rows: Rows, values: Words) -> Mask:
    return bits(_flags(values), _TRIPLE) & (not _enabled(rows, _CAP_TRIPLE))


def _bytes(values: Words) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8)


def _bad_vector(rows: Rows, values: Words) -> Mask:
    event = _bytes(values)
    raised = (event[:, 0] != 0) | (event[:, 3] != 0) & bits(_flags(values), _PAYLOAD)
    return mask(raised & ((event[:, 1] > 31) | (event[:, 1] == 2)))


_INIT_AND_SMM = (6, 18)
"""Since when a state that waits for INIT or SIPI and SMM don't refuse each other: 6.12 does, 6.18 does not."""


def _init_in_smm(rows: Rows, values: Words) -> Mask:
    if version(rows.guest.profile) >= _INIT_AND_SMM:
        return np.zeros(len(values), np.bool_)
    in_smm = mask((_bytes(values)[:, 24:26] != 0).any(axis=1)) & bits(_flags(values), _SMM)
    return in_smm & mask(np.isin(rows.get(MP_STATE)[:, 0], _WAITING))


def _no_smm(rows: Rows, values: Words) -> Mask:
    in_smm = _bytes(values)[:, 24:27].any(axis=1) & bits(_flags(values), _SMM)
    return in_smm & (not rows.guest.profile.behaviour.get("smm", 1))


_INIT_RECEIVED, _SIPI_RECEIVED = 2, 4
_WAITING = (_INIT_RECEIVED, _SIPI_RECEIVED)
_SVM_FORMAT, _GIF = 1 << 16, 0x100


def _init_blocked(rows: Rows) -> Mask:
    """In system management mode, and on kvm-amd without the global interrupt flag (kvm_apic_init_sipi_allowed)."""
    head = rows.get(x86_64.NESTED_STATE.id)[:, 0]
    return bits(rows.get(EVENTS)[:, 3], 0xFF) | bits(head, _SVM_FORMAT) & ~bits(head, _GIF)


def _blocked_state(rows: Rows, values: Words) -> Mask:
    if version(rows.guest.profile) >= _INIT_AND_SMM:
        return np.zeros(len(values), np.bool_)
    pending = bits(rows.get(EVENTS)[:, 3], 0xFF << 8)
    return mask(np.isin(values[:, 0] & np.uint64(0xFFFF_FFFF), _WAITING)) & (_init_blocked(rows) | pending)


_MP_STATES = (0, 1, 2, 3, _SIPI_RECEIVED, 9)


def _mp_state(rows: Rows, values: Words) -> Mask:
    allowed = _MP_STATES if rows.guest.has("irqchip") else (0,)
    return mask(~np.isin(values[:, 0] & np.uint64(0xFFFF_FFFF), allowed))


REFUSALS = (
    Refuse("CR0: high half, PG without PE, NW without CD", BOTH_SREGS, errno.EINVAL, _cr0, "kvm_is_valid_cr0"),
    Refuse("CR4: a bit that the kernel does not offer", BOTH_SREGS, errno.EINVAL, _cr4,
           "kvm_is_valid_cr4; `cr4_taken` of the profile"),
    Refuse("EFER: a bit that the kernel does not take", BOTH_SREGS, errno.EINVAL, _efer, "`efer_taken` of the profile"),
    Refuse("64-bit paging without PAE, without EFER.LMA, or with CR3 too wide", BOTH_SREGS, errno.EINVAL, _long_mode,
           "kvm_is_valid_sregs"),
    Refuse("EFER.LMA or a 64-bit CS without 64-bit paging", BOTH_SREGS, errno.EINVAL, _other_mode,
           "kvm_is_valid_sregs"),
    Refuse("APIC base: reserved bits, x2APIC without CPUID or without the enable bit", BOTH_SREGS, errno.EINVAL,
           bad_apic_base, "kvm_apic_set_base"),
    Refuse("PDPTRs outside of PAE paging, unknown flags", (SREGS2,), errno.EINVAL, _pdptrs, "__set_sregs2"),
    Refuse("flags", (DEBUGREGS,), errno.EINVAL, _debugregs_flags, "kvm_vcpu_ioctl_x86_set_debugregs"),
    Refuse("high half of DR6 or DR7", (DEBUGREGS,), errno.EINVAL, _high_halves, "kvm_dr6_valid, kvm_dr7_valid"),
    Refuse("unknown flags, a payload that is not enabled", (EVENTS,), errno.EINVAL, _bad_event_flags,
           "kvm_vcpu_ioctl_x86_set_vcpu_events; KVM_CAP_EXCEPTION_PAYLOAD"),
    Refuse("an exception with vector 2 or above 31", (EVENTS,), errno.EINVAL, _bad_vector,
           "kvm_vcpu_ioctl_x86_set_vcpu_events"),
    Refuse("system management mode on a vCPU that waits for its SIPI", (EVENTS,), errno.EINVAL, _init_in_smm,
           "kvm_vcpu_ioctl_x86_set_vcpu_events: INITs are latched while in SMM; measured: no more since 6.18"),
    Refuse("system management mode where the kernel has none", (EVENTS,), errno.EINVAL, _no_smm,
           "kvm_vcpu_ioctl_x86_set_vcpu_events; `smm` of the profile; what stands before it is stored", stored=True),
    Refuse("a triple fault that is not enabled", (EVENTS,), errno.EINVAL, _untold_triple_fault,
           "kvm_vcpu_ioctl_x86_set_vcpu_events, at its end; KVM_CAP_X86_TRIPLE_FAULT_EVENT", stored=True),
    Refuse("a state that x86 has not, or any but RUNNABLE without an interrupt chip", (MP_STATE,), errno.EINVAL,
           _mp_state, "kvm_arch_vcpu_ioctl_set_mpstate"),
    Refuse("INIT or SIPI where they are blocked, or an SMI is pending", (MP_STATE,), errno.EINVAL, _blocked_state,
           "kvm_arch_vcpu_ioctl_set_mpstate; measured: no more since 6.18"),
)


def _legacy(values: Words) -> Mask:
    """Paging outside of 64-bit mode."""
    return bits(values[:, CR0], _PG) & ~bits(values[:, EFER], _LMA)


def _keep_sregs(rows: Rows, values: Words) -> Words:
    out = np.zeros((len(values), 40), np.uint64)
    out[:, :SHARED] = values[:, :SHARED]
    for word in _DTABLES:
        out[:, word] &= np.uint64(0xFFFF)
    if not rows.guest.profile.behaviour.get("legacy_paging", 1):
        out[:, CR0] &= ~np.where(_legacy(values), np.uint64(_PG), np.uint64(0))
    out[:, CR8] = np.where(values[:, CR8] > 0xF, rows.get(SREGS2)[:, CR8], values[:, CR8])
    return out


def _keep_sregs2(rows: Rows, values: Words) -> Words:
    out = _keep_sregs(rows, values)
    valid = np.where(bits(out[:, CR0], _PG), values[:, FLAGS] & np.uint64(1), np.uint64(0))
    out[:, FLAGS] = valid
    out[:, PDPTRS:] = values[:, PDPTRS:] * valid[:, np.newaxis]
    return out


def _keep_regs(rows: Rows, values: Words) -> Words:
    out = values.copy()
    out[:, RFLAGS] &= np.uint64(rows.guest.profile.behaviour.get("rflags_kept", U64))
    out[:, RFLAGS] |= np.uint64(2)
    return out


def _keep_debugregs(rows: Rows, values: Words) -> Words:
    out = np.zeros_like(values)
    out[:, :6] = values[:, :6]
    return out


def _keep_mp_state(rows: Rows, values: Words) -> Words:
    return values & np.uint64(0xFFFF_FFFF)


_BOOLEANS = (0, 2, 3, 8, 12, 14, 24, 25, 26, 27, 28, 55)
"""Bytes of struct kvm_vcpu_events that are true or false: injected, has_error_code, pending, …"""


_PARTS = ((_SHADOW, False, [11]), (_NMI, False, [13]), (_SIPI, False, [16, 17, 18, 19]), (_SMM, True, [24, 25, 26, 27]),
          (_TRIPLE, True, [28]))
"""(flag without which a part stays, whether it comes after the check of SMM, its bytes)."""

_SOFT = (3, 4)
"""#BP and #OF: raised by instructions, so never reported; the guest meets them again."""


def _keep_events(rows: Rows, values: Words) -> Words:
    """Byte offsets are those of struct kvm_vcpu_events."""
    event, now, flags = _bytes(values).copy(), _bytes(rows.get(EVENTS)), _flags(values)
    flags &= np.uint64(0xFFFF_FFFF if _enabled(rows, _CAP_TRIPLE) else 0xFFFF_FFFF & ~_TRIPLE)
    event[:, _BOOLEANS] = event[:, _BOOLEANS] != 0
    event[event[:, 10] != 0, 8] = event[:, 10] = 0
    event[:, 15] = event[:, 29:55] = 0
    if not rows.guest.profile.behaviour.get("smm", 1):
        event[:, 24:27] = 0
    _payload(event, bits(flags, _PAYLOAD))
    reached = ~_no_smm(rows, values)
    for flag, last, places in _PARTS:
        said = (bits(flags, flag) & (reached | (not last)))[:, np.newaxis]
        event[:, places] = np.where(said, event[:, places], now[:, places])
    event[event[:, 24] == 0, 26] = 0
    event[:, 13] = np.minimum(event[:, 13], np.where((event[:, 12] | event[:, 14]) != 0, 1, 2))
    event[:, 20:24] = 0
    event[:, 27] *= rows.guest.has("irqchip")
    return event.view(np.uint64)


def _payload(event: NDArray[np.uint8], told: Mask) -> None:
    """A pending exception takes the place of an injected one; without the flag there are only injected ones."""
    pending = told & (event[:, 3] != 0)
    event[pending, 0] = 0
    event[~told, 3] = 0
    event[~pending, 55] = 0


KEEPS = (
    Keep("descriptor tables have 16-bit limits; an impossible CR8 is ignored", (SREGS,), _keep_sregs,
         "__set_sregs_common"),
    Keep("the same, and PDPTRs where there is PAE paging", (SREGS2,), _keep_sregs2, "__set_sregs2"),
    Keep("RFLAGS: bit 1 is always set", (REGS,), _keep_regs, "__set_regs; `rflags_kept` of the profile"),
    Keep("reserved words are not stored", (DEBUGREGS,), _keep_debugregs, "kvm_vcpu_ioctl_x86_set_debugregs"),
    Keep("32 bits", (MP_STATE,), _keep_mp_state, "struct kvm_mp_state"),
    Keep("truth values are 0 or 1; parts without their flag stay", (EVENTS,), _keep_events,
         "kvm_vcpu_ioctl_x86_set_vcpu_events"),
)


def _clear_pending(rows: Rows, values: Words, before: Words) -> None:
    events = rows.get(EVENTS).copy()
    events[:, 0] &= np.uint64(~(0xFF << 24) & U64)
    rows.put(EVENTS, events)


def _queue_interrupt(rows: Rows, values: Words, before: Words) -> None:
    """The first bit of the bitmap becomes the injected interrupt."""
    bitmap = np.unpackbits(_bytes(values[:, 35:39]), axis=1, bitorder="little")
    raised = mask(bitmap.any(axis=1))
    if raised.any():
        events = rows.get(EVENTS)[raised].copy()
        vector = bitmap[raised].argmax(axis=1).astype(np.uint64)
        events[:, 1] = events[:, 1] & np.uint64(U64 << 24 & U64) | vector << np.uint64(8) | np.uint64(1)
        rows.where(raised).put(EVENTS, events)


def _triple_fault(rows: Rows, values: Words, before: Words) -> None:
    fault = _legacy(values) & (not rows.guest.profile.behaviour.get("legacy_paging", 1))
    if fault.any():
        events = rows.get(EVENTS)[fault].copy()
        events[:, 3] |= np.uint64(1 << 32)
        rows.where(fault).put(EVENTS, events)


AFTERS = (
    After("paging that the kernel can't do is a triple fault", BOTH_SREGS, _triple_fault, "`legacy_paging`; measured"),
    After("a pending exception is dropped", (REGS,), _clear_pending, "__set_regs"),
    After("the interrupt bitmap queues an interrupt", (SREGS,), _queue_interrupt, "__set_sregs: kvm_queue_interrupt"),
)


def enter(rows: Rows) -> None:
    """What KVM_RUN does before anything runs: without a local APIC in the kernel, CR8 is that of struct kvm_run, which
    is 0 as long as the guest does not set it; and the FPU is loaded."""
    rules_fpu.enter(rows)
    if not rows.guest.has("irqchip"):
        sregs = rows.get(SREGS2).copy()
        sregs[:, CR8] = 0
        rows.put(SREGS2, sregs)


def take_triple_faults(rows: Rows) -> Mask:
    """The vCPUs that a pending triple fault shuts down as soon as they are run; it is pending no more."""
    events = rows.get(EVENTS).copy()
    pending = bits(events[:, 3], 0xFF << 32)
    events[:, 3] &= np.uint64(U64 & ~(0xFF << 32))
    rows.put(EVENTS, events)
    return pending


def _show_sregs(rows: Rows, values: Words) -> Words:
    """kvm_sregs out of the stored kvm_sregs2, with the injected interrupt as a bitmap."""
    out = np.zeros((len(values), 39), np.uint64)
    out[:, :SHARED] = values[:, :SHARED]
    event = _bytes(rows.get(EVENTS))
    for row in np.flatnonzero(event[:, 8]):
        vector = int(event[row, 9])
        out[row, 35 + vector // 64] = 1 << vector % 64
    return out


def _show_sregs2(rows: Rows, values: Words) -> Words:
    """In PAE paging there are always PDPTRs to show; what guest memory would load into them is not looked up."""
    out, pae = values.copy(), _legacy(values) & bits(values[:, CR4], _PAE)
    out[:, FLAGS] |= np.where(pae, np.uint64(1), np.uint64(0))
    return out


def _show_events(rows: Rows, values: Words) -> Words:
    event = _bytes(values).copy()
    soft = np.isin(event[:, 1], _SOFT)
    event[soft, 0] = event[soft, 3] = 0
    event[:, 28] *= _enabled(rows, _CAP_TRIPLE)
    if version(rows.guest.profile) < (6, 4):  # since then it is a count
        event[:, 13] = event[:, 13] != 0
    out = event.view(np.uint64)
    out[:, 2] = np.uint64(_event_flags(rows) << 32)
    return out


def accept_sipi(rows: Rows, values: Words) -> Words:
    """Reading accepts a pending start-up interrupt: the vCPU then stands at its vector, in real mode."""
    waiting = mask(values[:, 0] == _SIPI_RECEIVED)
    blocked = waiting & _init_blocked(rows)
    if blocked.any():  # the SIPI is dropped
        rows.where(blocked).put(MP_STATE, np.full((int(blocked.sum()), 1), _INIT_RECEIVED, np.uint64))
        values, waiting = np.where(blocked[:, np.newaxis], np.uint64(_INIT_RECEIVED), values), waiting & ~blocked
    if waiting.any():
        chosen = rows.where(waiting)
        sregs, regs, events = (chosen.get(id).copy() for id in (SREGS2, REGS, EVENTS))
        vector = events[:, 2] & np.uint64(0xFF)
        sregs[:, 0] = vector << np.uint64(12)
        sregs[:, 1] = sregs[:, 1] & np.uint64(U64 & ~(0xFFFF << 32)) | vector << np.uint64(40)
        regs[:, RIP] = 0
        for id, new in ((SREGS2, sregs), (REGS, regs), (MP_STATE, np.zeros((len(vector), 1), np.uint64))):
            chosen.put(id, new)
    return np.where(waiting[:, np.newaxis], np.uint64(0), values)


SHOWS = (
    Show("the interrupt bitmap is the injected interrupt", (SREGS,), _show_sregs, "__get_sregs"),
    Show("PDPTRs are valid in PAE paging", (SREGS2,), _show_sregs2, "__get_sregs2: is_pae_paging"),
    Show("the flags say what the kernel gives; no SIPI vector", (EVENTS,), _show_events,
         "kvm_vcpu_ioctl_x86_get_vcpu_events"),
    Show("pending INIT and SIPI are accepted", (MP_STATE,), accept_sipi,
         "kvm_arch_vcpu_ioctl_get_mpstate: kvm_apic_accept_events"),
)
