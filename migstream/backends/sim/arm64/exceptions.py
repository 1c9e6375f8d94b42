"""What the kernel does to PC and PSTATE while userspace waits: an exception at EL1, an instruction that it did itself.

Sources: enter_exception64() in exception.c, kvm_skip_instr() in kvm_emulate.h and kvm_skip_instr32() beside it.

What a PSTATE becomes is the Arm ARM's AArch64.TakeException(): flags, DIT and PAN stay, SCTLR_EL1 decides PAN and SSBS,
all interrupts are masked. TCO, which a VM with MTE gets, is not here: no recorded kernel has MTE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Access, Guest

    Column = NDArray[np.uint64]

SERROR = 0x180
"""Offset of the SError entry in each quarter of the vector table."""

SYNDROME = 0x2F << 26 | 1 << 25
"""ESR_ELx_EC_SERROR and ESR_ELx_IL."""

_A = np.uint64(1 << 8)
_EL1H, _STACK, _MODE = np.uint64(0b00101), np.uint64(1), np.uint64(0x1F)
_AARCH32 = np.uint64(1 << 4)
_SAME_EL, _SAME_EL_SP0, _LOWER, _LOWER_AARCH32 = (np.uint64(n) for n in (0x200, 0, 0x400, 0x600))
_KEPT = np.uint64(0xF << 28 | 1 << 24 | 1 << 22)
"""N, Z, C, V, DIT, PAN."""

_PAN, _SSBS, _MASKED = np.uint64(1 << 22), np.uint64(1 << 12), np.uint64(0xF << 6)
_SPAN, _DSSBS = np.uint64(1 << 23), np.uint64(1 << 44)


def unmasked(at: Access) -> NDArray[np.bool_]:
    """Which vCPUs would take an SError now: PSTATE.A is clear. SCTLR2_EL1.NMEA is not looked at: no profile has it."""
    return np.asarray(at.of(ids.PSTATE).word() & _A == 0)


def take(at: Access, kind: int, syndrome: Column) -> None:
    """Make all these vCPUs take an exception: `kind` is the vector's offset, `syndrome` what ESR_EL1 becomes."""
    pstate, control = at.of(ids.PSTATE).word().copy(), at.of(ids.SCTLR).word()
    entry = at.of(ids.VBAR).word() + _quarter(pstate) + np.uint64(kind)
    for id, value in ((ids.ESR, syndrome), (ids.ELR_EL1, at.of(ids.PC).word()), (ids.SPSR_EL1, pstate),
                      (ids.PC, entry), (ids.PSTATE, _after(pstate, control))):
        at.of(id).store(value[:, np.newaxis].copy())
    at.guest.exited.difference_update(at.numbers.tolist())  # mmio_needed = false: PC is the vector's


_BTYPE_SS = 3 << 10 | 1 << 21
_IT, _THUMB = 0x600_FC00, 1 << 5


def skip(guest: Guest, vcpu: int) -> None:
    """kvm_incr_pc(): PC goes on by an instruction of four bytes, PSTATE as it does then."""
    pc, pstate = guest.column(ids.PC), guest.column(ids.PSTATE)
    state = int(pstate[vcpu, 0])
    narrow = state & int(_AARCH32)
    pc[vcpu] = int(pc[vcpu, 0]) + 4 & (1 << 32 if narrow else 1 << 64) - 1
    state = _it_advance(state) & ~(1 << 21) if narrow else state & ~_BTYPE_SS
    pstate[vcpu] = state


def _it_advance(state: int) -> int:
    """kvm_adjust_itstate(): what is left of a Thumb IT block after one instruction."""
    if not state & _THUMB or not state & _IT:
        return state
    condition, block = state >> 13 & 7, state >> 8 & 0x1C | state >> 25 & 3
    condition, block = (condition, block << 1 & 0x1F) if block & 7 else (0, 0)
    return state & ~_IT | condition << 13 | (block & 0x1C) << 8 | (block & 3) << 25


def _quarter(pstate: Column) -> Column:
    mode = pstate & _MODE
    lower = np.where(mode & _AARCH32 != 0, _LOWER_AARCH32, _LOWER)
    return np.where(mode == _EL1H, _SAME_EL, np.where(mode | _STACK == _EL1H, _SAME_EL_SP0, lower))


def _after(pstate: Column, control: Column) -> Column:
    pan = np.where(control & _SPAN == 0, _PAN, np.uint64(0))
    ssbs = np.where(control & _DSSBS != 0, _SSBS, np.uint64(0))
    return np.asarray(pstate & _KEPT | pan | ssbs | _MASKED | _EL1H)
