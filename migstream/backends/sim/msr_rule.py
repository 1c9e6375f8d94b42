"""What a rule of an MSR is, and what several of them look at."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Mask, Rows
    from migstream.host.profile import HostProfile

    Column = NDArray[np.uint64]


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


def in_ram(rows: Rows, addresses: Column, size: int) -> Mask:
    """Whether guest memory is there."""
    found = np.zeros(len(addresses), np.bool_)
    for region in rows.guest.machine.memory:
        found |= (addresses >= region.guest_address) & (addresses + np.uint64(size) <= region.end)
    return found


def version(profile: HostProfile) -> tuple[int, int]:
    """The kernel's release, for rules that came with one and that no capability tells; (0, 0) where it says none."""
    found = re.search(r"([0-9]+)[.]([0-9]+)", profile.kernel)
    return (int(found[1]), int(found[2])) if found else (0, 0)


DE_CFG = 0xC001_1029


def is_svm(profile: HostProfile) -> bool:
    """Whether this is kvm-amd, which alone offers this feature MSR (svm_get_feature_msr)."""
    return DE_CFG in profile.feature_msrs
