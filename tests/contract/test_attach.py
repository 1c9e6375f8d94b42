"""A VMM that owns its file descriptors: `attach` works with them and touches nothing else."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from ctypes import addressof, c_char
from dataclasses import dataclass

import pytest

from migstream.backends.base import Vm
from migstream.backends.kvm import KvmBackend, uapi
from migstream.demo import guest_x86_64 as guest
from migstream.errors import UsageError
from migstream.model import Arch, Machine, MemoryRegion, Phase
from migstream.registers import ids, x86_64
from tests.contract.access import LSTAR, msr, read, u64, write

pytestmark = pytest.mark.kvm
SIZE = 1 << 20


@dataclass
class Owner:
    """A VMM of this test's own: file descriptors, memory, nothing of migstream's."""

    kvm: int
    vm: int
    vcpus: list[int]
    memory: mmap.mmap

    def attach(self, vcpus: int = 2, enabled_caps: dict[int, tuple[int, ...]] | None = None) -> Vm:
        made = Machine(Arch.X86_64, vcpus, (MemoryRegion(0, SIZE),), {"irqchip": True})
        return KvmBackend.attach(self.kvm, self.vm, self.vcpus, made, [memoryview(self.memory)],
                                 enabled_caps=enabled_caps)


@pytest.fixture
def owner() -> Iterator[Owner]:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, 0xAE01, 0)
    memory = mmap.mmap(-1, SIZE)
    anchor = c_char.from_buffer(memory)
    fcntl.ioctl(vm, 0x4020AE46, struct.pack("<IIQQQ", 0, 0, 0, SIZE, addressof(anchor)))
    del anchor
    fcntl.ioctl(vm, 0xAE60, 0)
    vcpus = [fcntl.ioctl(vm, 0xAE41, k) for k in range(2)]
    yield Owner(kvm, vm, vcpus, memory)
    for fd in (*vcpus, vm, kvm):
        os.close(fd)
    memory.close()


def test_the_owners_registers_are_read_and_written(owner: Owner) -> None:
    with owner.attach() as vm:
        assert write(vm, msr(LSTAR), [u64(0x1000), u64(0x2000)]) == []
        assert read(vm, msr(LSTAR)) == [u64(0x1000), u64(0x2000)]
        assert len(vm.layouts()[0]) > 5
    entry = bytearray(struct.pack("<IIIIQ", 1, 0, LSTAR, 0, 0))
    assert fcntl.ioctl(owner.vcpus[1], 0xC008AE88, entry) == 1
    assert struct.unpack_from("<Q", entry, 16) == (0x2000,)


def test_the_guest_is_installed_and_its_memory_is_the_owners(owner: Owner) -> None:
    with owner.attach() as vm:
        profile = KvmBackend().profile()
        guest.install(vm, profile.cpuid, profile.capabilities)
        assert [one.fault for one in guest.counters(vm)] == ["", ""]
    assert owner.memory[guest.CODE:guest.CODE + 3] == guest.PROGRAM[:3]


def test_letting_go_closes_nothing(owner: Owner) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    vm = owner.attach()
    vm.close()
    vm.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    for fd in (owner.kvm, owner.vm, *owner.vcpus):
        os.fstat(fd)
    with owner.attach() as again:
        assert read(again, x86_64.MP_STATE.id) == [struct.pack("<I", 0), struct.pack("<I", 1)]


def test_letting_go_gives_the_memory_back(owner: Owner) -> None:
    """An mmap that somebody still looks into can't be closed: BufferError."""
    vm = owner.attach()
    vm.memory.view(0, 4)[:] = b"mine"
    vm.close()
    assert owner.memory[:4] == b"mine"
    owner.memory.close()
    with pytest.raises(UsageError, match="no guest RAM"):
        vm.memory.view(0, 4)


def test_running_is_the_owners_business(owner: Owner) -> None:
    with owner.attach() as vm, pytest.raises(UsageError, match="whoever owns it"):
        vm.start()


def test_capabilities_that_the_owner_enabled_travel(owner: Owner) -> None:
    fcntl.ioctl(owner.vm, uapi.ENABLE_CAP.number, bytearray(struct.pack("<II4Q64x", 129, 0, 3, 0, 0, 0)))
    with owner.attach(enabled_caps={129: (3,)}) as vm:
        slots = [slot.id for at in vm.layouts()[0] if at.phase == Phase.CREATE for slot in at.slots]
        assert ids.capability_id(Arch.X86_64, 129) in slots


def test_a_wrong_number_of_file_descriptors_is_a_mistake_of_the_caller(owner: Owner) -> None:
    with pytest.raises(UsageError, match="one fd a vCPU"):
        owner.attach(vcpus=3)


@pytest.mark.parametrize("memory", [bytes(SIZE), bytearray(SIZE - 4096), bytearray(SIZE + 4096)],
                         ids=["read-only", "too short", "too long"])
def test_memory_that_is_not_the_guests_is_refused(owner: Owner, memory: bytes | bytearray) -> None:
    made = Machine(Arch.X86_64, 2, (MemoryRegion(0, SIZE),), {"irqchip": True})
    with pytest.raises(UsageError, match=f"RAM at 0x0 needs a writable buffer of {SIZE} bytes"):
        KvmBackend.attach(owner.kvm, owner.vm, owner.vcpus, made, [memoryview(memory)])
