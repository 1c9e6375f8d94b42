"""Single registers of a VM, for tests: what the suite reads and writes with."""

from __future__ import annotations

import struct
import time

import numpy as np

from migstream.backends.base import Backend, Refusal, Vm
from migstream.backends.sim import SimBackend
from migstream.demo.run import guest_for
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup

DEVICES = {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}
MEMORY = (MemoryRegion(0, 1 << 20),)

STAR, LSTAR, CSTAR, KERNEL_GS = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0102
WALL_CLOCK, WALL_CLOCK_NEW, SYSTEM_TIME, SYSTEM_TIME_NEW = 0x11, 0x4B56_4D00, 0x12, 0x4B56_4D01
UNKNOWN_MSR = 0x0123_4567

SIZES = {row.id: row.size for row in x86_64.ROWS if row.size} | {x86_64.XSAVE.id: 4096, x86_64.NESTED_STATE.id: 128}


def recorded_profile(backend: Backend) -> HostProfile:
    """The profile to change for a kernel like the backend's: the simulator's own, the recorded one for real KVM."""
    return SimBackend().profile() if backend.name == "kvm" else backend.profile()


def machine(vcpus: int = 2, memory: tuple[MemoryRegion, ...] = MEMORY,
            devices: dict[str, object] | None = None) -> Machine:
    """A small x86-64 machine; with all devices unless told otherwise."""
    return Machine(Arch.X86_64, vcpus, memory, DEVICES if devices is None else devices)


def create(backend: Backend, vcpus: int = 2, *, cpuid: bool = True, devices: dict[str, object] | None = None,
           enabled_caps: dict[int, tuple[int, ...]] | None = None) -> Vm:
    """A VM with vCPUs that have the supported CPUID."""
    vm = backend.create(machine(vcpus, devices=devices), enabled_caps)
    vm.create_vcpus()
    if cpuid:
        assert write(vm, x86_64.CPUID2.id, [backend.profile().cpuid] * vcpus) == []
    return vm


def layout(*slots: tuple[int, int]) -> Layout:
    """A layout of (id, size) in the scope and phase of the first."""
    row = lookup(slots[0][0])
    return Layout(row.scope, row.phase, tuple(Slot(id, size) for id, size in slots))


def rows(vm: Vm, at: Layout) -> int:
    """Rows of a whole bank."""
    return vm.machine.vcpus if at.scope == Scope.VCPU else 1


def read(vm: Vm, id: int, size: int | None = None) -> list[bytes]:
    """A register of every vCPU (one value of the VM's); it must be readable."""
    size = size or SIZES.get(id, 8)
    at = layout((id, size))
    values = np.zeros((rows(vm, at), at.row_words), np.uint64)
    assert vm.read(at, 0, values) == []
    return [row.tobytes()[:size] for row in values]


def write(vm: Vm, id: int, values: list[bytes], first_vcpu: int = 0) -> list[Refusal]:
    """Write a register of some vCPUs."""
    at = layout((id, len(values[0])))
    matrix = np.frombuffer(b"".join(v.ljust(at.row_words * 8, b"\0") for v in values), np.uint64)
    return vm.write(at, first_vcpu, matrix.reshape(len(values), -1).copy())


def write_errno(vm: Vm, id: int, value: bytes, vcpu: int = 0) -> int:
    """Write a register of one vCPU, or of the VM, and return the errno, 0 for none."""
    refused = write(vm, id, [value], vcpu if lookup(id).scope == Scope.VCPU else 0)
    return refused[0].errno if refused else 0


def still(id: int, value: bytes) -> bytes:
    """The value with the bits that run by themselves cleared."""
    number = int.from_bytes(value, "little")
    for low, width in x86_64.RUNNING[id].spans if id in x86_64.RUNNING else ():
        number &= ~((1 << width) - 1 << low)
    return number.to_bytes(len(value), "little")


def run_a_little(vm: Vm, steps: int = 20) -> None:
    """Run the demo guest, which is installed, until every vCPU has counted so many steps more; then pause it."""
    guest = guest_for(vm.machine.arch)
    before = guest.counts(vm)
    vm.start()
    deadline = time.monotonic() + 30
    while any(now - then < steps for now, then in zip(guest.counts(vm), before, strict=True)):
        assert not vm.exits(), vm.exits()
        assert time.monotonic() < deadline, "a vCPU does not get on"
        time.sleep(0.005)
    vm.pause()


def msr(index: int) -> int:
    """Id of an MSR."""
    return ids.msr_id(index)


def u64(*words: int) -> bytes:
    """64-bit words, little-endian."""
    return struct.pack(f"<{len(words)}Q", *(word % 2**64 for word in words))


def patched(value: bytes, words: dict[int, int]) -> bytes:
    """The value with some of its 64-bit words replaced."""
    out = bytearray(value)
    for word, new in words.items():
        struct.pack_into("<Q", out, 8 * word, new % 2**64)
    return bytes(out)


PERF_GLOBAL_LEAF = struct.pack("<3I", 0x4000_000A, 0, 0) + struct.pack("<4I", 0x0101, 1, 0, 0) + bytes(12)
"""An entry of struct kvm_cpuid2: HYPERV_CPUID_NESTED_FEATURES, eVMCS version 1, with PERF_GLOBAL_CTRL."""


def with_leaf(table: bytes, entry: bytes) -> bytes:
    """A CPUID table with one more entry."""
    return struct.pack("<I", struct.unpack_from("<I", table)[0] + 1) + table[4:] + entry
