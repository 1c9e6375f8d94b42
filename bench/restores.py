"""The ioctls of a save or restore on real KVM, by phase and name, ready to be run by `bench.native`.

The same lists are what is measured, what the model is calibrated with, and what it is checked against. Values are those
of a guest that was saved mid-run; every restore goes into a VM of its own, because a second one costs less.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.strategies import source_vm
from migstream.backends.base import Backend
from migstream.backends.kvm import uapi, x86_64
from migstream.backends.kvm.backend import KvmBackend, KvmVm
from migstream.backends.kvm.operations import ByAddress, Operation, Struct
from migstream.demo import run
from migstream.model import Layout, Phase, Scope
from migstream.reader import StreamReader
from migstream.registers import x86_64 as rows
from migstream.registers.catalogue import lookup
from migstream.sections import EncodedBank
from migstream.transport import read_items, save

if TYPE_CHECKING:
    from bench.native import Longs
    from migstream.model import Words

MEMORY = 16 << 20


@dataclass(frozen=True)
class Guest:
    """A saved guest: each layout with its matrix, in restore order."""

    banks: tuple[tuple[Layout, Words], ...]

    def first(self, vcpus: int) -> Guest:
        """The same guest with fewer vCPUs."""
        return Guest(tuple((layout, values[:vcpus] if layout.scope == Scope.VCPU else values)
                           for layout, values in self.banks))


def saved_stream(backend: Backend, vcpus: int) -> bytes:
    """Save a demo guest mid-run; where many vCPUs share a CPU not every one had its turn. Raises: MigstreamError."""
    out = io.BytesIO()
    with source_vm(backend, vcpus) as vm:
        save(vm, out, host=backend.summary(), pause=vm.pause)
    return out.getvalue()


def saved_guest(backend: Backend, vcpus: int) -> Guest:
    """The same as matrices. Raises: MigstreamError."""
    import numpy as np

    found: dict[Layout, list[Words]] = {}
    for _, item in read_items(io.BytesIO(saved_stream(backend, vcpus)), StreamReader()):
        if isinstance(item, EncodedBank):
            bank = item.decode()
            found[item.layout] = [bank.values] if bank.update else [*found.get(item.layout, []), bank.values]
    return Guest(tuple((layout, np.concatenate(parts)) for layout, parts in found.items()))


def run_memory(backend: Backend, vcpus: int) -> int:
    """Enough RAM for the demo guest."""
    smallest: int = run.guest_for(backend.arch).min_memory(vcpus)
    return max(MEMORY, smallest)


@contextmanager
def fresh_vm(backend: KvmBackend, vcpus: int) -> Iterator[KvmVm]:
    """A VM whose registers nobody has written."""
    board = run.BOARDS[backend.arch]
    with backend.create(run.machine(backend.arch, vcpus, run_memory(backend, vcpus)), board.caps) as vm:
        vm.create_vcpus()
        yield vm


@dataclass(frozen=True)
class Ioctls:
    """What is done of one layout.

    Attributes:
        layout: of a stream. names: of each ioctl of a row, as in a calibration.
        registers: how many registers each of them carries. calls: rows x ioctls x (fd, request, argument).
        memory: keeps alive what the arguments point to.
    """

    layout: Layout
    names: tuple[str, ...]
    registers: tuple[int, ...]
    calls: Longs
    memory: list[Any]


def restores(vm: KvmVm, guest: Guest, *, per_vcpu: bool = False) -> list[Ioctls]:
    """The writes of a restore. With `per_vcpu`, those of VM-scoped layouts as often as there are vCPUs."""
    return [ioctls(vm, layout, values, len(vm.vcpu_fds) if per_vcpu else 1, "set")
            for layout, values in guest.banks if layout.slots[0].id != rows.TSC_OFFSET.id and _asked(layout)]


def saves(vm: KvmVm, guest: Guest, *, per_vcpu: bool = False) -> list[Ioctls]:
    """The reads of a save, into copies of the guest's matrices."""
    return [ioctls(vm, layout, values.copy(), len(vm.vcpu_fds) if per_vcpu else 1, "get")
            for layout, values in guest.banks if _asked(layout)]


def _asked(layout: Layout) -> bool:
    """False for the capabilities of a VM: they are told when it is made."""
    return (layout.scope, layout.phase) != (Scope.VM, Phase.CREATE)


def ioctls(vm: KvmVm, layout: Layout, values: Words, times: int, verb: str) -> Ioctls:
    """What reads (`get`) or writes (`set`) a matrix; a VM-scoped one so many times."""
    import numpy as np

    program = vm.arch.operations(layout)
    names, registers = zip(*(_name(op, verb) for op in program), strict=True)
    memory: list[Any] = [values]
    fds = vm.vcpu_fds if vm.arch.through_vcpu(layout) else [vm.fd] * times
    count = len(values) if layout.scope == Scope.VCPU else times
    row = [[_call(op, fds[k], values[k % len(values)], verb, memory) for op in program] for k in range(count)]
    return Ioctls(layout, names, registers, np.array(row, np.int64), memory)


def _name(op: Operation, verb: str) -> tuple[str, int]:
    """What a calibration calls an operation, and how many registers it carries."""
    if isinstance(op, x86_64.Msrs):
        return f"{verb} MSRs", len(op.indices)
    name = lookup(getattr(op, "id", 0)).name
    return f"{verb} {name}", 1


def _call(op: Operation, fd: int, row: Words, verb: str, memory: list[Any]) -> tuple[int, int, int]:
    """One ioctl: fd, request, argument."""
    import numpy as np

    address = int(row.ctypes.data)
    if isinstance(op, x86_64.Msrs):
        buffer = np.zeros(1 + 2 * len(op.indices), np.uint64)
        buffer[0], buffer[1::2] = len(op.indices), op.indices
        buffer[2::2] = row[op.word:op.word + len(op.indices)]
        memory.append(buffer)
        return fd, _request(verb, uapi.GET_MSRS, uapi.SET_MSRS), int(buffer.ctypes.data)
    if isinstance(op, x86_64.TscKhz):  # a restore asks, and sets where the frequency differs: here it doesn't
        return fd, uapi.GET_TSC_KHZ.number, 0
    if isinstance(op, x86_64.Clock) and verb == "set":
        value = np.array([row[op.slice.start // 8], 0, 0, 0, 0, 0], np.uint64)
        memory.append(value)
        return fd, uapi.SET_CLOCK.number, int(value.ctypes.data)
    if isinstance(op, Struct):
        return fd, _request(verb, op.get, op.set), address + op.slice.start
    assert isinstance(op, ByAddress)
    argument = np.frombuffer(bytearray(op.head + struct.pack("<Q", address + op.start)), np.uint8)
    memory.append(argument)
    return fd, _request(verb, op.get, op.set), int(argument.ctypes.data)


def _request(verb: str, get: uapi.Request, set: uapi.Request) -> int:
    return get.number if verb == "get" else set.number


def split(calls: Longs, threads: int) -> list[Longs]:
    """The rows in contiguous ranges, one a thread; fewer where there are fewer rows."""
    import numpy as np

    return [part.reshape(-1, 3) for part in np.array_split(calls, min(threads, len(calls)))]
