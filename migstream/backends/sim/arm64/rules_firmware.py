"""Firmware pseudo-registers: PSCI version, workarounds, bitmaps (arch/arm64/kvm/hypercalls.c, psci.c up to 5.18)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.rules import Rule, invalid, mask, refused, registers, since, taken
from migstream.registers import vcpu_features

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Access, Errnos, Guest
    from migstream.host.profile import HostProfile
    from migstream.model import Words

PSCI_0_1 = 1
PSCI_VERSIONS = (0x0000_0002, 0x0001_0000, 0x0001_0001, 0x0001_0002, 0x0001_0003)
"""Since 0.2, ascending: major in the upper half, minor in the lower."""


def latest_psci(guest: Guest) -> int:
    """The newest version of a kernel, which vCPUs are made with."""
    return guest.notes.get("psci") or guest.initial(ids.PSCI_VERSION, vcpu_features.PSCI_0_2)


def _with_psci(at: Access) -> NDArray[np.bool_]:
    return np.asarray(at.features & vcpu_features.PSCI_0_2 != 0)


def _psci(at: Access, values: Words) -> Errnos:
    latest = latest_psci(at.guest)
    known = np.isin(values[:, 0], np.array([*(one for one in PSCI_VERSIONS if one <= latest), latest], np.uint64))
    return invalid(np.where(_with_psci(at), ~known, values[:, 0] != PSCI_0_1))


def _show_psci(at: Access, values: Words) -> Words:
    """0.1 without the feature; what was told, else the latest."""
    return np.where(_with_psci(at)[:, np.newaxis], values, np.uint64(PSCI_0_1))


def _level(at: Access, values: Words) -> Errnos:
    words, host = values[:, 0], at.initials()
    return invalid((words & mask(~0xF) != 0) | (words > host))


_AVAIL, _ENABLED = 2, 1 << 4


def _ssb_level(at: Access, values: Words) -> Errnos:
    """0 and 1 want nothing, 2 and 3 a host that needs no workaround (its level is 3)."""
    words, host = values[:, 0], _host_ssb(at)
    level = words & np.uint64(0xF)
    wanted = np.where(level >= _AVAIL, np.uint64(3), np.uint64(0))
    enabled = words & np.uint64(_ENABLED) != 0
    unknown = words & mask(~(0xF | _ENABLED)) != 0
    return invalid(unknown | (enabled & (level != _AVAIL)) | (level > 3) | (host < wanted))


def _host_ssb(at: Access) -> NDArray[np.uint64]:
    """Where the VM's ID_AA64PFR1_EL1 was told to have no SSBS, a host that is not vulnerable says so: 3."""
    level = at.initials()
    if not since(at.guest.profile, 6, 12):
        return level
    ssbs = at.of(ids.ID_AA64PFR1).word() >> np.uint64(4) & np.uint64(0xF)
    return np.where(ssbs == 0, np.uint64(3), level)


def _show_ssb(at: Access, values: Words) -> Words:
    return _host_ssb(at)[:, np.newaxis]


def _host_level(at: Access, values: Words) -> Words:
    return at.initials()[:, np.newaxis]


def _has_bitmap(profile: HostProfile, id: int) -> bool:
    return id in ids.BITMAPS


def _bitmap_bits(at: Access, values: Words) -> Errnos:
    return invalid(values[:, 0] & mask(~supported(at.guest, at.id)) != 0)


def supported(guest: Guest, id: int) -> int:
    """Bits that a firmware bitmap of this kernel may have."""
    return taken(guest.profile, id) | guest.initial(id, 0) | guest.notes.get(f"bitmap {id:#x}", 0)


def _bitmap_busy(at: Access, values: Words) -> Errnos:
    if not at.guest.entered:
        return np.zeros(len(values), np.int64)
    return refused(values[:, 0] != at.word(), errno.EBUSY)


RULES: tuple[Rule, ...] = (
    Rule("a version that the kernel has, or 0.1 without the feature", registers(ids.PSCI_VERSION),
         "kvm_arm_set_fw_reg(); no check of a run: it stays writable", refuse=_psci),
    Rule("0.1 without the feature", registers(ids.PSCI_VERSION), "kvm_psci_version()", show=_show_psci),
    Rule("a level that the host has", registers(ids.WORKAROUND_1, ids.WORKAROUND_3), "kvm_arm_set_fw_reg()",
         refuse=_level),
    Rule("a level of speculative store bypass that the host has", registers(ids.WORKAROUND_2), "kvm_arm_set_fw_reg()",
         refuse=_ssb_level),
    Rule("the host's level, whatever was written", registers(ids.WORKAROUND_1, ids.WORKAROUND_3),
         "get_kernel_wa_level()", show=_host_level),
    Rule("the host's, and the VM's SSBS", registers(ids.WORKAROUND_2),
         "get_kernel_wa_level(); measured: 6.12 looks at the VM's ID register", show=_show_ssb),
    Rule("bits that the kernel knows", _has_bitmap, "kvm_arm_set_fw_reg_bmap(): before the check of a run",
         refuse=_bitmap_bits),
    Rule("final after the first run", _has_bitmap, "kvm_arm_set_fw_reg_bmap()", refuse=_bitmap_busy),
)
