"""Rules of a vCPU's FPU on x86-64: XCR0 and the XSAVE area. Sources are named as in `rules_cpu`."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import cpuid
from migstream.backends.sim.rules import U64, Keep, Refuse, Show, bits, mask
from migstream.registers import x86_64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Mask, Rows
    from migstream.model import Words

XCRS, XSAVE = x86_64.XCRS.id, x86_64.XSAVE.id


def _too_many_xcrs(rows: Rows, values: Words) -> Mask:
    return mask((values[:, 0] & np.uint64(0xFFFF_FFFF)) > 16)


def _xcrs_flags(rows: Rows, values: Words) -> Mask:
    return mask((values[:, 0] >> np.uint64(32)) != 0)


def _asked_xcr0(rows: Rows, values: Words) -> tuple[Mask, NDArray[np.uint64]]:
    """Whether the list names XCR0, and the first value that it gives it."""
    entries = values[:, 1:33].reshape(-1, 16, 2)
    used = np.arange(16, dtype=np.uint64) < (values[:, :1] & np.uint64(0xFFFF_FFFF))
    named = used & ((entries[:, :, 0] & np.uint64(0xFFFF_FFFF)) == 0)
    first = named.argmax(axis=1)
    return named.any(axis=1), np.take_along_axis(entries[:, :, 1], first[:, np.newaxis], axis=1)[:, 0]


_TOGETHER = ((0b110, 0b100, "AVX needs SSE"), (0b11000, 0b11000, "both MPX components or none"),
             (0b1110_0100, 0b1110_0000, "AVX-512 needs AVX, and all three of its components"),
             (0b11 << 17, 0b11 << 17, "both AMX components or none"))
"""(components, those of them that need all the others, why); Intel SDM volume 1, 13.3."""


def _xcr0(rows: Rows, values: Words) -> Mask:
    named, xcr0 = _asked_xcr0(rows, values)
    allowed = cpuid.user_xcr0(rows.get(cpuid.ID)) | np.uint64(1)
    bad = mask((xcr0 & ~allowed) != 0) | ~bits(xcr0, 1)
    for group, needy, _ in _TOGETHER:
        bad |= bits(xcr0, needy) & mask((xcr0 & np.uint64(group)) != group)
    return mask(named & bad)


_BV, _HEADER, _MXCSR = 64, slice(65, 72), 3
_SSE, _FP_SSE, _SSE_AVX = 0b10, 0b11, 0b110


def host_components(rows: Rows) -> int:
    """XSAVE components of the host."""
    table = np.frombuffer(rows.guest.profile.cpuid, np.uint64)[np.newaxis]
    return int(cpuid.user_xcr0(table)[0]) | _FP_SSE


def _unknown_component(rows: Rows, values: Words) -> Mask:
    return bits(values[:, _BV], U64 & ~host_components(rows))


def _xsave_header(rows: Rows, values: Words) -> Mask:
    return mask(values[:, _HEADER].any(axis=1))


def _mxcsr(rows: Rows, values: Words) -> Mask:
    default = np.frombuffer(rows.guest.profile.defaults[XSAVE], np.uint64)
    mask = int(default[_MXCSR]) >> 32 or 0xFFBF
    return bits(values[:, _BV], _FP_SSE | _SSE_AVX) & bits(values[:, _MXCSR], 0xFFFF_FFFF & ~mask)


def _components(rows: Rows) -> list[tuple[int, list[slice]]]:
    """(component, its words in the area), as the host's CPUID places them."""
    found = [(number, [slice(start // 8, (start + size) // 8)])
             for number, start, size, _ in cpuid.extents(rows.guest.profile.cpuid)]
    return [(0, [slice(0, 3), slice(4, 20)]), (1, [slice(20, 52)]), *found]


def _keep_xcrs(rows: Rows, values: Words) -> Words:
    named, xcr0 = _asked_xcr0(rows, values)
    out = np.zeros_like(values)
    out[:, 0] = 1
    out[:, 2] = np.where(named, xcr0, rows.get(XCRS)[:, 2])
    return out


def _keep_xsave(rows: Rows, values: Words) -> Words:
    """Components out of use go back to their initial state; bytes that belong to none are lost. MXCSR stays as it is
    where nothing that uses it is written, and as it is written where x87 is, which does not show it."""
    out = _select(rows, values, values[:, _BV])
    written = bits(values[:, _BV], _FP_SSE | _SSE_AVX)
    out[:, _MXCSR] = np.where(written, values[:, _MXCSR], rows.get(XSAVE)[:, _MXCSR])
    return out


def _select(rows: Rows, values: Words, used: NDArray[np.uint64]) -> Words:
    initial = np.frombuffer(rows.guest.profile.defaults[XSAVE], np.uint64)
    out = np.repeat(initial[np.newaxis], len(values), axis=0)
    for number, places in _components(rows):
        here = bits(used, 1 << number)[:, np.newaxis]
        for words in places:
            out[:, words] = np.where(here, values[:, words], initial[words])
    out[:, _MXCSR] = np.where(bits(used, _SSE_AVX), values[:, _MXCSR], initial[_MXCSR])
    out[:, _BV] = used
    return out


def _show_xsave(rows: Rows, values: Words) -> Words:
    allowed = cpuid.user_xcr0(rows.get(cpuid.ID)) | np.uint64(_FP_SSE)
    return _select(rows, values, values[:, _BV] & allowed)


_XSAVEOPT, _XSAVEC, _XSAVES = 1 << 0, 1 << 1, 1 << 3


def _standard(rows: Rows) -> bool:
    """Whether the host keeps areas in the standard form, as the lab's does: XRSTOR then takes MXCSR from the area
    whatever is in use; from a compacted one, it does where SSE is. A table without XSAVEOPT hides what there is."""
    table = np.frombuffer(rows.guest.profile.cpuid, np.uint64)[np.newaxis]
    return int(cpuid.word(table, 0xD, 1, cpuid.EAX)[0]) & (_XSAVEOPT | _XSAVEC | _XSAVES) == _XSAVEOPT


def enter(rows: Rows) -> None:
    """KVM_RUN loads the area and saves it again: an MXCSR that is not the initial one is then in use."""
    initial = np.frombuffer(rows.guest.profile.defaults[XSAVE], np.uint64)
    area = rows.get(XSAVE)
    other = bits(area[:, _MXCSR] ^ initial[_MXCSR], 0xFFFF_FFFF)
    if other.any() and _standard(rows):
        area = area.copy()
        area[other, _BV] |= np.uint64(_SSE)
        rows.put(XSAVE, area)


REFUSALS = (
    Refuse("more than 16 XCRs", (XCRS,), errno.EINVAL, _too_many_xcrs, "kvm_vcpu_ioctl_x86_set_xcrs: KVM_MAX_XCRS"),
    Refuse("flags", (XCRS,), errno.EINVAL, _xcrs_flags, "kvm_vcpu_ioctl_x86_set_xcrs"),
    Refuse("XCR0: not in CPUID leaf 0xd, or an impossible set", (XCRS,), errno.EINVAL, _xcr0, "__kvm_set_xcr"),
    Refuse("XSTATE_BV: a component that the host has not", (XSAVE,), errno.EINVAL, _unknown_component,
           "fpu_copy_uabi_to_guest_fpstate"),
    Refuse("XSAVE header: compacted, or reserved bytes in use", (XSAVE,), errno.EINVAL, _xsave_header,
           "validate_user_xstate_header"),
    Refuse("MXCSR: reserved bits, where XSTATE_BV has x87, SSE or AVX", (XSAVE,), errno.EINVAL, _mxcsr,
           "copy_uabi_to_xstate; measured: not looked at where XSTATE_BV has none of them"),
)

KEEPS = (
    Keep("XCR0 alone exists", (XCRS,), _keep_xcrs, "kvm_vcpu_ioctl_x86_set_xcrs"),
    Keep("components out of use are initial", (XSAVE,), _keep_xsave, "copy_uabi_to_xstate"),
)

SHOWS = (
    Show("components that the vCPU's CPUID has", (XSAVE,), _show_xsave, "kvm_vcpu_ioctl_x86_get_xsave2"),
)
