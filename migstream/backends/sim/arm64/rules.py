"""What a rule of a simulated arm64 kernel is, and what follows from a recorded profile alone.

A kernel is its profile and a sequence of rules, in the order of its checks. A rule says of which registers it is, on
which kernels, and where that is known from; then what a write is refused for (`refuse`: an errno a vCPU), what of
a value is kept (`keep`), what else a write changes (`after`), and what a read gives (`show`), each for a whole column.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.msr_rule import version
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Access, Errnos, Mask
    from migstream.host.profile import HostProfile
    from migstream.model import Words

About = Callable[["HostProfile", int], bool]

U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One fact about writing or reading a register.

    Attributes:
        name: the fact in a few words. about: which registers on which kernels. source: kernel function, or `measured`.
        refuse: an errno a vCPU, 0 for none. keep: what is stored, in new memory or the same. after: what else changes.
        show: what a read gives, in new memory.
    """

    name: str
    about: About
    source: str
    refuse: Callable[[Access, Words], Errnos] | None = None
    keep: Callable[[Access, Words], Words] | None = None
    after: Callable[[Access, Words], None] | None = None
    show: Callable[[Access, Words], Words] | None = None


def registers(*wanted: int) -> About:
    """The registers, on all kernels."""
    chosen = frozenset(wanted)
    return lambda profile, id: id in chosen


def since(profile: HostProfile, *release: int) -> bool:
    """Whether a kernel is this one or a later one: for what no capability and no trial of a profile tells."""
    return version(profile) >= release


def refused(rows: Mask | NDArray[np.bool_], no: int) -> Errnos:
    """The errno where True."""
    return np.where(rows, no, 0).astype(np.int64)


def invalid(rows: Mask | NDArray[np.bool_]) -> Errnos:
    """EINVAL where True."""
    return refused(rows, errno.EINVAL)


def mask(number: int) -> np.uint64:
    """A mask as numpy takes it."""
    return np.uint64(number & U64)


def taken(profile: HostProfile, id: int) -> int:
    """Bits that a write may flip, from the profile; 0 for a register that was never tried."""
    return int.from_bytes(profile.register_bits.get(id, (b"", b""))[0], "little")


def kept(profile: HostProfile, id: int) -> int:
    """Bits that read back flipped, from the profile."""
    return int.from_bytes(profile.register_bits.get(id, (b"", b""))[1], "little")


def _all(id: int) -> int:
    return (1 << 8 * (lookup(id).size or 8)) - 1


SPECIAL = frozenset((
    ids.PSTATE, ids.PSCI_VERSION, *ids.WORKAROUNDS, *ids.BITMAPS, ids.TIMER_CTL, ids.PTIMER_CTL, *ids.CLOCKS,
    *ids.CCSIDR_IDS, ids.CLIDR, ids.PMCR, *ids.SAME_STORAGE, *ids.SAME_STORAGE.values(), ids.SVE_VLS,
    *ids.IMPLEMENTATION))
"""Registers with rules of their own in place of the ones here."""


def _plain(profile: HostProfile, id: int) -> bool:
    return id in profile.register_bits and id not in SPECIAL and not ids.fields_of(id) and (lookup(id).size or 0) <= 8


def _fixed_bits(profile: HostProfile, id: int) -> bool:
    return _plain(profile, id) and taken(profile, id) != _all(id)


def _dropped_bits(profile: HostProfile, id: int) -> bool:
    return _plain(profile, id) and taken(profile, id) == _all(id) != kept(profile, id)


def _refuse_fixed(at: Access, values: Words) -> Errnos:
    fixed = mask(~taken(at.guest.profile, at.id))
    return invalid((values[:, 0] ^ at.initials()) & fixed != 0)


def _drop(at: Access, values: Words) -> Words:
    bits = mask(kept(at.guest.profile, at.id))
    return (values & bits) | (at.initials()[:, np.newaxis] & ~bits)


PROFILE_RULES: tuple[Rule, ...] = (
    Rule("bits that no write flips", _fixed_bits, "profile: register_bits", refuse=_refuse_fixed),
    Rule("bits that are taken and dropped", _dropped_bits, "profile: register_bits", keep=_drop),
)
"""For registers that have no rules of their own."""
