"""Rules of kvm-amd: what goes through a VMCB comes back in the VMCB's form, and nested state is SVM's.

`source` names functions of arch/x86/kvm/svm; all were met as divergences from the lab's kernels.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import rules_devices
from migstream.backends.sim.msr_rule import is_svm, version
from migstream.backends.sim.rules import U64, After, Keep, Refuse, Show, bits, mask
from migstream.registers import x86_64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Guest, Mask, Rows
    from migstream.model import Words

SREGS, SREGS2, NESTED_STATE = x86_64.SREGS.id, x86_64.SREGS2.id, x86_64.NESTED_STATE.id
EVENTS = x86_64.VCPU_EVENTS.id


_DATA, _SS, _TR = (1, 2, 3, 4), 5, 6
"""Segments by their place in struct kvm_sregs: CS, DS, ES, FS, GS, SS, TR, LDT."""

_TYPE, _PRESENT, _DPL, _DB, _S, _L, _G, _AVL, _UNUSABLE = range(9)
_FIELDS = ((1, 48, 0xF), (1, 56, 1), (2, 0, 3), (2, 8, 1), (2, 16, 1), (2, 24, 1), (2, 32, 1), (2, 40, 1), (2, 48, 1))
"""(word of struct kvm_segment, shift, bits that a VMCB keeps)."""


def _keep_segments(rows: Rows, values: Words) -> Words:
    if not is_svm(rows.guest.profile):
        return values
    out = values.copy()
    for number in range(8):
        _pack(out[:, 3 * number:3 * number + 3], number)
    return out


def _pack(words: Words, number: int) -> None:
    """In place: a segment as svm_set_segment stores it and svm_get_segment gives it back."""
    field = [words[:, word] >> np.uint64(shift) & np.uint64(kept) for word, shift, kept in _FIELDS]
    limit = words[:, 1] & np.uint64(0xFFFF_FFFF)
    usable = field[_PRESENT] & ~_truth(words[:, 2] >> np.uint64(48) & np.uint64(0xFF))
    field[_PRESENT], field[_UNUSABLE] = usable, usable ^ np.uint64(1)
    field[_G] = mask(limit > 0xF_FFFF).astype(np.uint64)
    if number == _TR:
        field[_TYPE] |= np.uint64(2)
    if number in _DATA:
        field[_TYPE] |= usable
    if number == _SS:
        field[_DB] &= usable
    words[:, 1] &= np.uint64(0xFFFF_FFFF_FFFF)
    words[:, 2] = 0
    for (word, shift, _), value in zip(_FIELDS, field, strict=True):
        words[:, word] |= value << np.uint64(shift)


def _truth(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return mask(values != 0).astype(np.uint64)


_GIF = 0x100
_FORMAT_SVM, _HEADER, _SVME = 1, 128, 1 << 12
_EFER = 33


def _no_svm(guest: Guest) -> bool:
    return not is_svm(guest.profile)


def _bad_nested(rows: Rows, values: Words) -> Mask:
    """All checks in the kernel's order end in EINVAL. Guest mode too: this simulator has no VMCB to enter."""
    if _no_svm(rows.guest):
        return np.zeros(len(values), np.bool_)
    head = values[:, 0]
    flags, form, size = head & np.uint64(0xFFFF), head >> np.uint64(16) & np.uint64(0xFFFF), head >> np.uint64(32)
    bad = mask((size < _HEADER) | (size > 8 * values.shape[1])) | mask(form != _FORMAT_SVM)
    svme = bits(rows.get(SREGS2)[:, _EFER], _SVME)
    gif_off = ~svme & mask(flags != _GIF) & (version(rows.guest.profile) < (7, 0))
    return bad | bits(flags, 0xFFFF & ~_GIF) | gif_off


def _keep_nested(rows: Rows, values: Words) -> Words:
    """Outside of guest mode the global interrupt flag is all there is."""
    if _no_svm(rows.guest):
        return values
    out = np.zeros_like(values)
    flags = values[:, 0] & np.uint64(_GIF)
    out[:, 0] = flags | np.uint64(_FORMAT_SVM << 16 | _HEADER << 32)
    return out


REFUSALS = (
    Refuse("nested state of another format or size, guest mode without a VMCB, GIF off without SVME",
           (NESTED_STATE,), errno.EINVAL, _bad_nested, "svm_set_nested_state; measured: GIF may be off in 7.2"),
)

KEEPS = (
    Keep("segments in a VMCB's form", (SREGS, SREGS2), _keep_segments, "svm_set_segment, svm_get_segment"),
    Keep("GIF alone, outside of guest mode", (NESTED_STATE,), _keep_nested, "svm_set_nested_state"),
)


_APIC_BASE, _APIC_ENABLE = 34, 1 << 11
_NMI_PENDING, _SMI_PENDING = (1, 0xFF << 40), (3, 0xFF << 8)


def _look_for_interrupts(rows: Rows, values: Words, before: Words) -> None:
    """Setting GIF looks for an interrupt to inject, unless an SMI or NMI is pending anyway; that computes the PPR."""
    events = rows.get(EVENTS)
    pending = bits(events[:, 1], _NMI_PENDING[1]) | bits(events[:, 3], _SMI_PENDING[1])
    looks = bits(values[:, 0], _GIF) & bits(rows.get(SREGS2)[:, _APIC_BASE], _APIC_ENABLE) & ~pending
    if is_svm(rows.guest.profile) and rows.guest.has("irqchip") and looks.any():
        rules_devices.update_priority(rows.where(looks))


_GIF_STAYS = (7, 0)
"""Between 6.12 and 7.2 nobody has looked."""


def svm_off(rows: Rows, values: Words, before: Words) -> None:
    """Clearing EFER.SVME sets GIF, and with it looks for interrupts. Measured: 6.1 and 6.12 do, 7.2 does not."""
    if not is_svm(rows.guest.profile) or version(rows.guest.profile) >= _GIF_STAYS:
        return
    off = bits(before[:, _EFER], _SVME) & ~bits(values[:, _EFER], _SVME)
    chosen = rows.where(off)
    if off.any():
        head = chosen.get(NESTED_STATE).copy()
        head[:, 0] |= np.uint64(_GIF)
        chosen.put(NESTED_STATE, head)
        _look_for_interrupts(chosen, head, head)


AFTERS = (
    After("GIF on with EFER.SVME off", (SREGS, SREGS2), svm_off, "svm_set_efer: svm_set_gif"),
    After("GIF on: the processor priority", (NESTED_STATE,), _look_for_interrupts,
          "svm_set_gif: kvm_cpu_has_injectable_intr"),
)


def _show_shadow(rows: Rows, values: Words) -> Words:
    if not is_svm(rows.guest.profile):
        return values
    out = values.copy()
    shadow = bits(out[:, 1], 0xFF << 24)
    out[:, 1] = out[:, 1] & np.uint64(U64 & ~(0xFF << 24)) | np.where(shadow, np.uint64(3 << 24), np.uint64(0))
    return out


SHOWS = (
    Show("an interrupt shadow is of both kinds", (EVENTS,), _show_shadow, "svm_get_interrupt_shadow"),
)
