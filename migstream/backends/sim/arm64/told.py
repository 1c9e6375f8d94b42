"""What KVM/arm64 can be told and not asked: vCPU features, capabilities, the counter offset."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.proposals import ASYMMETRIC, ASYMMETRIC_CAP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Errnos, Guest
    from migstream.model import Words


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability that KVM_ENABLE_CAP takes on an arm64 VM; `before_vcpus`: EINVAL once there is one."""

    capability: str
    before_vcpus: bool
    source: str


CAPABILITIES: dict[int, Capability] = {
    205: Capability("ARM_MTE", True, "kvm_vm_ioctl_enable_cap()"),
    216: Capability("ARM_SYSTEM_SUSPEND", False, "kvm_vm_ioctl_enable_cap() since 5.20"),
    239: Capability("ARM_WRITABLE_IMP_ID_REGS", True, "kvm_vm_ioctl_enable_cap() since 6.15"),
    ASYMMETRIC_CAP: Capability(ASYMMETRIC, True, "nobody's yet"),
}
"""By number."""


@dataclass(frozen=True, slots=True)
class InitColumn:
    """struct kvm_vcpu_init: reading gives what the vCPUs were made with."""

    features: int

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """Target and features as told."""
        values[:, 0] = _TARGET | self.features << 32
        return np.zeros(len(values), np.int64)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """Nothing where the features are those that the machine was made with; they can't be changed any more."""
        wrong = (values[:, 0] >> np.uint64(32) != self.features) | (values[:, 1:] != 0).any(axis=1)
        return np.where(wrong, errno.EINVAL, 0).astype(np.int64)


_TARGET = 5


@dataclass(frozen=True, slots=True)
class OffsetColumn:
    """struct kvm_arm_counter_offset."""

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """As told."""
        values[:] = guest.counter_offset or (0, 0)
        return np.zeros(len(values), np.int64)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_ARM_SET_COUNTER_OFFSET: both counters become the host's less this; later writes of them are ignored."""
        if not guest.profile.capabilities.get("COUNTER_OFFSET"):
            return np.full(len(values), errno.EINVAL, np.int64)  # kvm_arch_vm_ioctl() knows no better
        if values[-1, 1]:
            return np.full(len(values), errno.EINVAL, np.int64)
        guest.counter_offset = int(values[-1, 0]), 0
        guest.offsets = dict.fromkeys(ids.CLOCKS, int(values[-1, 0]))
        return np.zeros(len(values), np.int64)


@dataclass(frozen=True, slots=True)
class CapabilityColumn:
    """A capability that somebody enabled."""

    number: int
    enable: Callable[[int, tuple[int, ...], int], int]

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """Give what was told, as the start of struct kvm_enable_cap."""
        told = guest.told.get(self.number)
        if told is None:
            return np.full(len(values), errno.ENOENT, np.int64)
        values[:, :5] = [self.number, *(*told, 0, 0, 0, 0)[:4]]
        return np.zeros(len(values), np.int64)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_ENABLE_CAP; one that is enabled already stays so."""
        args = tuple(values[0, 1:5].tolist())
        again = guest.told.get(self.number)
        if again is not None and (*again, 0, 0, 0, 0)[:4] == args and not int(values[0, 0]) >> 32:
            return np.zeros(len(values), np.int64)
        return np.full(len(values), self.enable(self.number, args, int(values[0, 0]) >> 32), np.int64)
