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
from migstream.backends.sim.arm64.its import Its, Redistributors
from migstream.backends.sim.arm64.its import missing as its_missing
from migstream.backends.sim.arm64.rules import since
from migstream.backends.sim.arm64.runner import Runner
from migstream.backends.sim.arm64.told import OffsetColumn
from migstream.backends.sim.arm64.vgic import UNDEFINED, Vgic
from migstream.backends.sim.msr_rule import version
from migstream.model import Scope
from migstream.registers import gic
from migstream.registers import ids as all_ids

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory
    from migstream.backends.sim.arm64.guest import Guest
    from migstream.host.profile import HostProfile

_ITS_ADDRESS, _ITS_RESET, _ITS_SIZE = 4, 4, 0x2_0000
"""KVM_VGIC_ITS_ADDR_TYPE, KVM_DEV_ARM_ITS_CTRL_RESET, KVM_VGIC_V3_ITS_SIZE."""

_CLEARS = (6, 1)
"""vgic_its_cmd_handle_mapd() and _discard() clear an entry in guest RAM: 6.13, and later ones of its stable lines."""

_PENDBASER, _PROPBASER = (all_ids.attribute_id(gic.GICV3, gic.REDISTRIBUTOR, offset) for offset in (0x78, 0x70))

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
    its: Its | None
    its_base: int = UNDEFINED

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
        if verb == "set" and (group, attribute) == (gic.CONTROL, gic.SAVE_PENDING_TABLES):
            return self._save_pending(self.guest.vgic), b""
        if verb == "set":
            return self.guest.vgic.set(group, attribute, value), b""
        no, found = self.guest.vgic.get(group, attribute)
        return no, b"" if no else struct.pack("<Q", found)

    def _save_pending(self, vgic: Vgic) -> int:
        """vgic_v3_save_pending_tables()."""
        if not vgic.initialized and since(self.profile, 5, 13):
            return errno.ENXIO
        return self.its.save_pending() if self.its else 0

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
        after = self.its.switched if id == chip.GICR_CTLR and self.its else None
        column = chip.Ordered(chip.GicColumn(id, chip.rule(self.guest, id)), after_write=after)
        no = int((column.write if verb == "set" else column.read)(self.guest, rows, np.arange(at, at + 1), values)[0])
        return no, b"" if no or verb == "set" else values.tobytes()[:row.size]

    def _with_affinity(self, wanted: int) -> int | None:
        """kvm_mpidr_to_vcpu(): the first with this affinity; one that was not initialized has 0."""
        numbers = self.guest.column(ids.MPIDR)[:, 0] & np.uint64(0xFF_00FF_FFFF)
        numbers = np.where(self.guest.features == NO_FEATURES, 0, numbers)
        found = np.flatnonzero(numbers == wanted)
        return int(found[0]) if len(found) else None

    def new_its(self) -> Its:
        """One that knows this VM's redistributors."""
        return Its(lambda: self.memory, self._redistributors, undoes=since(self.profile, 5, 19),
                   clears=since(self.profile, *_CLEARS))

    def _redistributors(self) -> Redistributors:
        def words(id: int) -> list[int]:
            start = chip.rule(self.guest, id).start
            return [int(value) ^ start for value in self.guest.column(id)[:, 0]]

        return Redistributors(words(_PENDBASER), chip.lpis_on(self.guest, slice(None)).tolist(), words(_PROPBASER)[0])

    def create_its(self) -> int:
        """KVM_CREATE_DEVICE of an ITS: vgic_its_create(), which also sets GICR_PROPBASER."""
        if self.guest.dead:
            return errno.EIO
        self.guest.has_its = True
        self.guest.column(_PROPBASER)[:] = 0
        self.its = self.new_its()
        return 0

    @alive
    def its_attribute(self, verb: str, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]:
        """KVM_HAS, GET and SET_DEVICE_ATTR of an ITS that `create_its` made."""
        if self.its is None:
            return errno.EBADF, b""
        if group == gic.ITS_REGISTERS:
            return self._its_register(self.its, verb, attribute, value)
        if verb == "has":
            known = all_ids.attribute_id(gic.ITS, group, attribute) in self.profile.attributes
            return 0 if known else errno.ENXIO, b""
        if group == gic.ADDRESSES:
            return self._its_address(verb, attribute, value)
        return self._its_order(self.its, attribute) if verb == "set" and group == gic.CONTROL else errno.ENXIO, b""

    def _its_address(self, verb: str, attribute: int, value: int) -> tuple[int, bytes]:
        if attribute != _ITS_ADDRESS:
            return errno.ENODEV, b""
        if verb == "get":
            return 0, struct.pack("<Q", self.its_base)
        no = Vgic(self.guest.vcpus, release=version(self.profile)).frame(self.its_base, value, _ITS_SIZE)
        self.its_base = self.its_base if no else value
        return no, b""

    def _its_order(self, its: Its, attribute: int) -> int:
        """vgic_its_ctrl(): one that there is not is good, up to 6.12 at least."""
        if attribute == gic.ITS_SAVE_TABLES:
            return its.save_tables()
        if attribute == gic.ITS_RESTORE_TABLES:
            return its.restore_tables()
        if attribute == _ITS_RESET:
            its.reset()
        return errno.ENXIO if attribute not in (_ITS_RESET, gic.INIT) and since(self.profile, 6, 13) else 0

    def _its_register(self, its: Its, verb: str, offset: int, value: int) -> tuple[int, bytes]:
        """vgic_its_attr_regs_access()."""
        no = its_missing(offset)
        if verb != "has" and no != errno.EINVAL and self.its_base == UNDEFINED:
            no = errno.ENXIO
        if no or verb == "has":
            return no, b""
        return (its.write(offset, value), b"") if verb == "set" else (0, struct.pack("<Q", its.read(offset)))

    def peek(self, address: int, size: int) -> bytes:
        """Guest RAM."""
        return bytes(self.memory.view(address, size))

    @alive
    def line(self, verb: str, vcpu: int, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]:
        """KVM_HAS, GET and SET_DEVICE_ATTR of a vCPU."""
        if verb == "has":
            return attributes.has(self.guest, vcpu, group, attribute), b""
        if verb == "set":
            return attributes.set(self.guest, vcpu, group, attribute, value), b""
        no, found = attributes.get(self.guest, vcpu, group, attribute)
        return no, found.ljust(8, b"\0") if found else b""
