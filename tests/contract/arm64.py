"""arm64 for the contract: which backends, which machine, and a VMM that owns its file descriptors."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from migstream.backends.base import Backend, Vm
from migstream.backends.kvm import KvmBackend, uapi
from migstream.demo import guest_arm64 as guest
from migstream.demo.run import BOARDS
from migstream.model import Arch, Layout, Machine, MemoryRegion, Phase, Scope, Slot
from migstream.registers import gic, vcpu_features
from migstream.registers.catalogue import lookup

OPENERS: dict[str, Callable[[], Backend]] = {"kvm": KvmBackend}
"""Backends by the name of their parameter."""

BACKENDS = (pytest.param("kvm", marks=pytest.mark.kvm_arm64),)

BOARD = BOARDS[Arch.ARM64].devices
MEMORY = (MemoryRegion(guest.RAM, 4 << 20),)
DEFAULT = vcpu_features.DEFAULT


def everything(backend: Backend) -> int:
    """All features that a vCPU can have together on this host."""
    return DEFAULT | vcpu_features.together(backend.profile().vcpu_features)


def machine(vcpus: int = 2, features: int = DEFAULT, devices: Mapping[str, int] = BOARD) -> Machine:
    """The demo's machine, with less memory."""
    return Machine(Arch.ARM64, vcpus, MEMORY, {**devices, "vcpu_features": features})


def create(backend: Backend, vcpus: int = 2, features: int = DEFAULT, devices: Mapping[str, int] = BOARD) -> Vm:
    """A VM with vCPUs that never ran and whose set of registers is closed."""
    vm = backend.create(machine(vcpus, features, devices))
    vm.create_vcpus()
    vm.layouts()
    return vm


def installed(backend: Backend, vcpus: int, features: int = DEFAULT) -> Vm:
    """The same with the demo guest in it."""
    vm = create(backend, vcpus, features)
    guest.install(vm, b"", {})
    return vm


def by_name(vm: Vm) -> dict[str, tuple[Layout, Slot]]:
    """Every register that can be saved: its layout and slot."""
    return {lookup(slot.id).name: (at, slot) for at in vm.layouts()[0] for slot in at.slots}


def read(vm: Vm, place: tuple[Layout, Slot], rows: int | None = None) -> list[bytes]:
    """The value of each vCPU, or of the VM; it must be readable."""
    at, slot = place
    alone = Layout(at.scope, at.phase, (slot,))
    rows = rows or (vm.machine.vcpus if at.scope == Scope.VCPU else 1)
    values = np.zeros((rows, alone.row_words), np.uint64)
    assert vm.read(alone, 0, values) == []
    return [row.tobytes()[:slot.size] for row in values]


def write_errnos(vm: Vm, place: tuple[Layout, Slot], values: list[bytes], first_vcpu: int = 0) -> list[int]:
    """Write a register of some vCPUs; the errnos of the refusals."""
    at, slot = place
    alone = Layout(at.scope, at.phase, (slot,))
    rows = b"".join(value.ljust(8 * alone.row_words, b"\0") for value in values)
    matrix = np.frombuffer(rows, np.uint64).reshape(len(values), -1).copy()
    return [no.errno for no in vm.write(alone, first_vcpu, matrix)]


def through_vcpu(id: int, size: int) -> tuple[Layout, Slot]:
    """A place that asks each vCPU, whatever the register's scope."""
    slot = Slot(id, size)
    return Layout(Scope.VCPU, Phase.STATE, (slot,)), slot


@dataclass
class Owner:
    """A VMM of the tests' own: file descriptors, memory, an interrupt controller, nothing of migstream's.

    As a VMM does it (Documentation/virt/kvm/api.rst): VM, memory, vCPUs with KVM_ARM_VCPU_INIT, GICv3, ITS.
    """

    wanted: Machine
    devices: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (region,) = self.wanted.memory
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(self.kvm, uapi.CREATE_VM.number, 0)
        self.memory = mmap.mmap(-1, region.size)
        anchor = ctypes.c_char.from_buffer(self.memory)
        slot = struct.pack("<IIQQQ", 0, 0, region.guest_address, region.size, ctypes.addressof(anchor))
        del anchor
        fcntl.ioctl(self.vm, uapi.SET_USER_MEMORY_REGION.number, slot)
        self.vcpus = [fcntl.ioctl(self.vm, uapi.CREATE_VCPU.number, k) for k in range(self.wanted.vcpus)]
        init = bytearray(32)
        fcntl.ioctl(self.vm, uapi.ARM_PREFERRED_TARGET.number, init)
        struct.pack_into("<I", init, 4, self.wanted.devices["vcpu_features"])
        for fd in self.vcpus:
            fcntl.ioctl(fd, uapi.ARM_VCPU_INIT.number, bytes(init))
        self._device("gic", gic.GICV3, {2: BOARD["gic_distributor"], 3: BOARD["gic_redistributors"]}, BOARD["gic_irqs"])
        self._device("its", gic.ITS, {4: BOARD["its"]})

    def _device(self, name: str, kind: int, addresses: dict[int, int], irqs: int = 0) -> None:
        made = bytearray(struct.pack("<III", kind, 0, 0))
        fcntl.ioctl(self.vm, uapi.CREATE_DEVICE.number, made)
        fd = self.devices[name] = struct.unpack_from("<I", made, 4)[0]
        values = {(gic.ADDRESSES, number): ctypes.c_uint64(at) for number, at in addresses.items()}
        places = {key: ctypes.addressof(value) for key, value in values.items()}
        count = ctypes.c_uint32(irqs)
        places |= {(gic.IRQ_COUNT, 0): ctypes.addressof(count)} if irqs else {}
        for (group, attribute), address in {**places, (gic.CONTROL, gic.INIT): 0}.items():
            fcntl.ioctl(fd, uapi.SET_DEVICE_ATTR.number, struct.pack("<IIQQ", 0, group, attribute, address))

    def attach(self) -> Vm:
        """The same VM as migstream sees it."""
        return KvmBackend.attach(self.kvm, self.vm, self.vcpus, self.wanted, [memoryview(self.memory)],
                                 device_fds=self.devices)

    def close(self) -> None:
        """Close all that was made here."""
        for fd in (*self.devices.values(), *self.vcpus, self.vm, self.kvm):
            os.close(fd)
        self.memory.close()


class OwnersHost(KvmBackend):
    """A host that hands out the VM that its owner made: how a VMM restores into descriptors of its own."""

    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self.owner = owner

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> Vm:  # type: ignore[override]  # any VM, not a KvmVm
        """The owner's for the owner's machine; a scratch VM for any other: the host is asked what it offers."""
        return self.owner.attach() if machine == self.owner.wanted else super().create(machine, enabled_caps)
