"""Single ioctls of a simulated arm64 VM that no bank is made of: devices and their attributes, guest programs.

Each gives an errno and what was read.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from migstream.backends.sim.arm64 import attributes, entering, ids
from migstream.backends.sim.arm64 import gic as chip
from migstream.backends.sim.arm64.guest import NO_FEATURES
from migstream.backends.sim.arm64.rules import since
from migstream.backends.sim.arm64.runner import Runner
from migstream.backends.sim.arm64.told import OffsetColumn
from migstream.backends.sim.arm64.vgic import Vgic
from migstream.backends.sim.msr_rule import version
from migstream.model import Scope
from migstream.registers import gic
from migstream.registers import ids as all_ids

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory
    from migstream.backends.sim.arm64.guest import Guest
    from migstream.host.profile import HostProfile

Single = TypeVar("Single", bound=Callable[..., tuple[int, bytes]])


def alive(ioctl: Single) -> Single:
    """EIO from a VM that the kernel gave up: kvm_vm_dead()."""
    @wraps(ioctl)
    def checked(vm: DeviceIoctls, *args: Any, **kwargs: Any) -> tuple[int, bytes]:
        return (errno.EIO, b"") if vm.guest.dead else ioctl(vm, *args, **kwargs)

    return cast(Single, checked)


class DeviceIoctls:
    """What `Arm64SimVm` can be asked besides its banks."""

    guest: Guest
    memory: GuestMemory
    profile: HostProfile

    @alive
    def execute(self, vcpu: int, instructions: int) -> tuple[int, bytes]:
        """KVM_RUN until something stops it: the exit's name; UsageError where nothing did."""
        if no := entering.enter(self.guest, vcpu):
            return no, b""
        entering.complete(self.guest, vcpu)
        stopped = Runner(self.guest, self.memory, (vcpu,)).until_exit(instructions)
        if stopped == "KVM_EXIT_MMIO":
            self.guest.exited.add(vcpu)
        return 0, stopped.encode()

    def plain(self, vcpu: int, ids: Sequence[int]) -> list[bytes]:
        """KVM_GET_ONE_REG of many; empty where it is refused."""
        return [self.get(vcpu, id)[1] for id in ids]

    def get(self, vcpu: int, id: int) -> tuple[int, bytes]:
        """KVM_GET_ONE_REG."""
        raise NotImplementedError

    def set_counter_offset(self, offset: int, reserved: int) -> int:
        """KVM_ARM_SET_COUNTER_OFFSET."""
        if self.guest.dead:
            return errno.EIO
        values = np.array([[offset, reserved]], np.uint64)
        return int(OffsetColumn().write(self.guest, slice(0, 1), np.arange(1), values)[0])

    def load(self, address: int, code: bytes) -> None:
        """Put a program into guest RAM."""
        self.memory.view(address, len(code))[:] = code

    def create_gic(self) -> int:
        """KVM_CREATE_DEVICE of a vGICv3: once, before any vCPU has run."""
        if self.guest.dead:
            return errno.EIO
        if self.guest.vgic:
            return errno.EEXIST
        if self.guest.ran.any():
            return errno.EBUSY
        if since(self.profile, 6, 17):
            entering.show_gic(self.guest)
        self.guest.vgic = Vgic(self.guest.vcpus, release=version(self.profile))
        return 0

    @alive
    def gic_attribute(self, verb: str, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]:
        """KVM_HAS, GET and SET_DEVICE_ATTR of what makes the vGIC."""
        if self.guest.vgic is None:
            return errno.EBADF, b""
        if verb == "has":
            known = all_ids.attribute_id(gic.GICV3, group, attribute) in self.profile.attributes
            return 0 if known else errno.ENXIO, b""
        if verb == "set":
            return self.guest.vgic.set(group, attribute, value), b""
        no, found = self.guest.vgic.get(group, attribute)
        return no, b"" if no else struct.pack("<Q", found)

    @alive
    def gic_register(self, verb: str, vcpu: int, id: int, value: int = 0) -> tuple[int, bytes]:
        """KVM_GET and SET_DEVICE_ATTR of a register, by the affinity that this vCPU is made with."""
        row, vgic = gic.access(id), self.guest.vgic
        assert row is not None
        if vgic is None:
            return errno.EBADF, b""
        at = 0 if row.group == gic.DISTRIBUTOR else self._with_affinity(0 if row.scope == Scope.VM else vcpu)
        if at is None:
            return errno.EINVAL, b""
        at = 0 if row.scope == Scope.VM else at
        if not vgic.initialized and not (since(self.profile, 6, 17) and row.name in chip.BEFORE_INIT):
            return errno.EBUSY, b""
        rows, values = slice(at, at + 1), np.full((1, 1), value, np.uint64)
        column = chip.GicColumn(id, chip.rule(self.guest, id))
        no = int((column.write if verb == "set" else column.read)(self.guest, rows, np.arange(at, at + 1), values)[0])
        return no, b"" if no or verb == "set" else values.tobytes()[:row.size]

    def _with_affinity(self, wanted: int) -> int | None:
        """kvm_mpidr_to_vcpu(): the first with this affinity; one that was not initialized has 0."""
        numbers = self.guest.column(ids.MPIDR)[:, 0] & np.uint64(0xFF_00FF_FFFF)
        numbers = np.where(self.guest.features == NO_FEATURES, 0, numbers)
        found = np.flatnonzero(numbers == wanted)
        return int(found[0]) if len(found) else None

    @alive
    def line(self, verb: str, vcpu: int, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]:
        """KVM_HAS, GET and SET_DEVICE_ATTR of a vCPU."""
        if verb == "has":
            return attributes.has(self.guest, vcpu, group, attribute), b""
        if verb == "set":
            return attributes.set(self.guest, vcpu, group, attribute, value), b""
        no, found = attributes.get(self.guest, vcpu, group, attribute)
        return no, found.ljust(8, b"\0") if found else b""
