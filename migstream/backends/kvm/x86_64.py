"""How each x86-64 row of the catalogue is read from and written to KVM.

A layout becomes a list of operations once; a row of a bank is then served by calling each with the row's memory. An
operation works in that memory: no value becomes a Python object, except in the rows of MSRs that a kernel refuses.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migstream.backends.base import SHORT_COUNT, Refusal
from migstream.backends.kvm import uapi
from migstream.backends.kvm.uapi import Request
from migstream.model import Layout, Scope
from migstream.registers import ids
from migstream.registers import x86_64 as rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CPUID_ENTRY = 40
_ATTR = struct.Struct("<IIQQ")
_OWN_ATTRIBUTE = ids.attribute_id(0, 0, 0) >> 40
"""Ids of attributes of the vCPU's own file descriptor; bits 39:32 are the group."""

_ENABLE_CAP = struct.Struct("<II4Q")
_ENABLE_CAP_SIZE = 104


@dataclass(frozen=True, slots=True)
class Row:
    """The memory of one bank row and who it belongs to.

    Attributes:
        fd: the vCPU's or VM's file descriptor. vcpu: index, None for the VM.
        memory: the row's bytes, writable. address: where they are in this process.
        words: the same memory as 64-bit words.
    """

    fd: int
    vcpu: int | None
    memory: memoryview
    address: int
    words: NDArray[np.uint64]


class Operation(ABC):
    """Reads and writes one column, or a run of MSR columns, of one row."""

    @abstractmethod
    def read(self, row: Row) -> list[Refusal]:
        """Fill the column from the kernel."""

    @abstractmethod
    def write(self, row: Row) -> list[Refusal]:
        """Give the column to the kernel."""


class Struct(Operation):
    """A register that two ioctls read and write in place."""

    def __init__(self, id: int, start: int, size: int, get: Request, set: Request, prepare: bytes = b"") -> None:
        self.id, self.slice, self.get, self.set, self.prepare = id, slice(start, start + size), get, set, prepare

    def _do(self, row: Row, request: Request) -> list[Refusal]:
        try:
            fcntl.ioctl(row.fd, request.number, row.memory[self.slice])
        except OSError as error:
            return [Refusal(self.id, row.vcpu, request.name, error.errno or errno.EIO)]
        return []

    def read(self, row: Row) -> list[Refusal]:
        """Put in what the kernel wants to find there (a chip number, a capacity), then ask."""
        if self.prepare:
            start = self.slice.start
            row.memory[start:start + len(self.prepare)] = self.prepare
        return self._do(row, self.get)

    def write(self, row: Row) -> list[Refusal]:
        """One ioctl from the bank's memory."""
        return self._do(row, self.set)


class Counted(Struct):
    """A register that says itself how long it is. The kernel believes it and would read past the bank's memory."""

    def __init__(self, id: int, start: int, size: int, get: Request, set: Request, prepare: bytes = b"") -> None:
        super().__init__(id, start, size, get, set, prepare)
        self.size, self.count = size, _COUNTED[id]

    def write(self, row: Row) -> list[Refusal]:
        """As `Struct.write`, unless the length is beyond the column."""
        at, header, each, number = self.count
        (count,) = struct.unpack_from("<I", row.memory, self.slice.start + at)
        if header + count * each > self.size:
            return [Refusal(self.id, row.vcpu, self.set.name, number)]
        return super().write(row)


class Clock(Struct):
    """KVM_CLOCK: only the clock value is written, so that guest time goes on from the pause.

    The saved flags and host times serve the TSC offsets; kernels before 5.16 refuse any flag.
    """

    def write(self, row: Row) -> list[Refusal]:
        """KVM_SET_CLOCK with the value alone."""
        value = bytearray(48)
        value[:8] = row.memory[self.slice.start:self.slice.start + 8]
        try:
            fcntl.ioctl(row.fd, self.set.number, value)
        except OSError as error:
            return [Refusal(self.id, row.vcpu, self.set.name, error.errno or errno.EIO)]
        return []


class TscKhz(Operation):
    """The vCPU's TSC frequency, an integer argument and result; kHz."""

    def __init__(self, id: int, start: int) -> None:
        self.id, self.start = id, start

    def read(self, row: Row) -> list[Refusal]:
        """KVM_GET_TSC_KHZ."""
        try:
            struct.pack_into("<I", row.memory, self.start, fcntl.ioctl(row.fd, uapi.GET_TSC_KHZ.number, 0))
        except OSError as error:
            return [Refusal(self.id, row.vcpu, uapi.GET_TSC_KHZ.name, error.errno or errno.EIO)]
        return []

    def write(self, row: Row) -> list[Refusal]:
        """KVM_SET_TSC_KHZ where the vCPU's frequency differs: setting it may turn on scaling."""
        (khz,) = struct.unpack_from("<I", row.memory, self.start)
        if khz >> 31:  # the kernel would take it, and then answer KVM_GET_TSC_KHZ with a negative number: an error
            return [Refusal(self.id, row.vcpu, uapi.SET_TSC_KHZ.name, errno.EINVAL)]
        try:
            if fcntl.ioctl(row.fd, uapi.GET_TSC_KHZ.number, 0) != khz:
                fcntl.ioctl(row.fd, uapi.SET_TSC_KHZ.number, khz)
        except OSError as error:
            return [Refusal(self.id, row.vcpu, uapi.SET_TSC_KHZ.name, error.errno or errno.EIO)]
        return []


class ByAddress(Operation):
    """A 64-bit register that KVM reads or writes through a pointer: device attributes and ONE_REG."""

    def __init__(self, id: int, start: int, get: Request, set: Request, head: bytes) -> None:
        self.id, self.start, self.get, self.set, self.head = id, start, get, set, head

    def _do(self, row: Row, request: Request) -> list[Refusal]:
        argument = bytearray(self.head + struct.pack("<Q", row.address + self.start))
        try:
            fcntl.ioctl(row.fd, request.number, argument)
        except OSError as error:
            return [Refusal(self.id, row.vcpu, request.name, error.errno or errno.EIO)]
        return []

    def read(self, row: Row) -> list[Refusal]:
        """The kernel writes into the bank."""
        return self._do(row, self.get)

    def write(self, row: Row) -> list[Refusal]:
        """The kernel reads from the bank."""
        return self._do(row, self.set)


class EnabledCap(Operation):
    """A capability that somebody enabled: told, never asked. Reading gives what was told."""

    def __init__(self, id: int, start: int, told: dict[int, tuple[int, ...]]) -> None:
        self.id, self.start, self.told = id, start, told
        self.capability = ids.capability_number(id) or 0

    def read(self, row: Row) -> list[Refusal]:
        """The start of struct kvm_enable_cap: capability, flags (0), four arguments, as told; else ENOENT."""
        if self.capability not in self.told:
            return [Refusal(self.id, row.vcpu, uapi.ENABLE_CAP.name, errno.ENOENT)]
        args = (*self.told[self.capability], 0, 0, 0, 0)[:4]
        _ENABLE_CAP.pack_into(row.memory, self.start, self.capability, 0, *args)
        return []

    def write(self, row: Row) -> list[Refusal]:
        """KVM_ENABLE_CAP."""
        _, flags, *args = _ENABLE_CAP.unpack_from(row.memory, self.start)
        argument = bytearray(_ENABLE_CAP_SIZE)
        _ENABLE_CAP.pack_into(argument, 0, self.capability, flags, *args)
        try:
            fcntl.ioctl(row.fd, uapi.ENABLE_CAP.number, argument)
        except OSError as error:
            return [Refusal(self.id, row.vcpu, uapi.ENABLE_CAP.name, error.errno or errno.EIO)]
        self.told[self.capability] = tuple(args)
        return []


class Msrs(Operation):
    """A run of MSR columns, in one KVM_GET_MSRS or KVM_SET_MSRS.

    KVM stops at the first MSR that it refuses and returns the count so far. That MSR is named, and the run goes on
    after it: one refusal must not hide the rest.
    """

    def __init__(self, indices: list[int], word: int) -> None:
        import numpy as np

        self.indices, self.word = indices, word
        self.buffer = bytearray(8 + 16 * len(indices))
        struct.pack_into("<I", self.buffer, 0, len(indices))
        self.entries = np.frombuffer(self.buffer, np.uint64, offset=8).reshape(len(indices), 2)
        self.entries[:, 0] = indices
        self.values = self.entries[:, 1]

    def read(self, row: Row) -> list[Refusal]:
        """One ioctl, then one copy of the values into the bank."""
        self.values[:] = 0
        refused = self._do(row, uapi.GET_MSRS)
        row.words[self.word:self.word + len(self.indices)] = self.values
        return refused

    def write(self, row: Row) -> list[Refusal]:
        """One copy of the values out of the bank, then one ioctl."""
        self.values[:] = row.words[self.word:self.word + len(self.indices)]
        return self._do(row, uapi.SET_MSRS)

    def _do(self, row: Row, request: Request) -> list[Refusal]:
        done = self._ioctl(row, request, self.buffer)
        if done == len(self.indices):
            return []
        refused = [self._refusal(row, request, done)]
        start = max(done, 0) + 1
        while start < len(self.indices):
            start = self._resume(row, request, start, refused)
        return refused

    def _resume(self, row: Row, request: Request, start: int, refused: list[Refusal]) -> int:
        rest = bytearray(self.buffer[:8]) + self.buffer[8 + 16 * start:]
        struct.pack_into("<I", rest, 0, len(self.indices) - start)
        done = self._ioctl(row, request, rest)
        end = start + max(done, 0)
        if request is uapi.GET_MSRS:
            self.buffer[8 + 16 * start:8 + 16 * end] = rest[8:8 + 16 * (end - start)]
        if end < len(self.indices):
            refused.append(self._refusal(row, request, end if done >= 0 else done, end))
        return end + 1

    def _ioctl(self, row: Row, request: Request, buffer: bytearray) -> int:
        """The count, or minus the errno."""
        try:
            return int(fcntl.ioctl(row.fd, request.number, buffer))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _refusal(self, row: Row, request: Request, done: int, at: int | None = None) -> Refusal:
        index = self.indices[max(done, 0) if at is None else at]
        return Refusal(ids.msr_id(index), row.vcpu, request.name, SHORT_COUNT if done >= 0 else -done)


_STRUCTS: dict[int, tuple[Request, Request]] = {
    rows.SREGS2.id: (uapi.GET_SREGS2, uapi.SET_SREGS2),
    rows.SREGS.id: (uapi.GET_SREGS, uapi.SET_SREGS),
    rows.REGS.id: (uapi.GET_REGS, uapi.SET_REGS),
    rows.XCRS.id: (uapi.GET_XCRS, uapi.SET_XCRS),
    rows.DEBUGREGS.id: (uapi.GET_DEBUGREGS, uapi.SET_DEBUGREGS),
    rows.LAPIC.id: (uapi.GET_LAPIC, uapi.SET_LAPIC),
    rows.VCPU_EVENTS.id: (uapi.GET_VCPU_EVENTS, uapi.SET_VCPU_EVENTS),
    rows.MP_STATE.id: (uapi.GET_MP_STATE, uapi.SET_MP_STATE),
    rows.PIT2.id: (uapi.GET_PIT2, uapi.SET_PIT2),
    rows.PIC_MASTER.id: (uapi.GET_IRQCHIP, uapi.SET_IRQCHIP),
    rows.PIC_SLAVE.id: (uapi.GET_IRQCHIP, uapi.SET_IRQCHIP),
    rows.IOAPIC.id: (uapi.GET_IRQCHIP, uapi.SET_IRQCHIP),
    rows.CPUID2.id: (uapi.GET_CPUID2, uapi.SET_CPUID2),
    rows.NESTED_STATE.id: (uapi.GET_NESTED_STATE, uapi.SET_NESTED_STATE),
}

_COUNTED = {rows.CPUID2.id: (0, 8, CPUID_ENTRY, errno.E2BIG), rows.NESTED_STATE.id: (4, 0, 1, errno.EINVAL)}
"""Registers with a length of their own: where it is (a u32), what it counts (bytes before, bytes of each), and the
errno for one that is too long."""

_CHIPS = {rows.PIC_MASTER.id: 0, rows.PIC_SLAVE.id: 1, rows.IOAPIC.id: 2}


def _prepare(id: int, size: int) -> bytes:
    """What a struct must hold before the kernel is asked for it."""
    if id in _CHIPS:
        return struct.pack("<I", _CHIPS[id])
    if id == rows.CPUID2.id:
        return struct.pack("<I", (size - 8) // CPUID_ENTRY)
    return struct.pack("<HHI", 0, 0, size) if id == rows.NESTED_STATE.id else b""


def _operation(id: int, start: int, size: int, capabilities: Mapping[str, int],
               told: dict[int, tuple[int, ...]]) -> Operation:
    if id in _STRUCTS:
        return (Counted if id in _COUNTED else Struct)(id, start, size, *_STRUCTS[id], _prepare(id, size))
    if id == rows.XSAVE.id:
        get = uapi.GET_XSAVE2 if capabilities.get("XSAVE2") else uapi.GET_XSAVE
        return Struct(id, start, size, get, uapi.SET_XSAVE)
    if id == rows.CLOCK.id:
        return Clock(id, start, size, uapi.GET_CLOCK, uapi.SET_CLOCK)
    if id == rows.TSC_KHZ.id:
        return TscKhz(id, start)
    if id >> 40 == _OWN_ATTRIBUTE:
        head = _ATTR.pack(0, id >> 32 & 0xFF, id & 0xFFFF_FFFF, 0)[:16]
        return ByAddress(id, start, uapi.GET_DEVICE_ATTR, uapi.SET_DEVICE_ATTR, head)
    if ids.capability_number(id) is not None:
        return EnabledCap(id, start, told)
    return ByAddress(id, start, uapi.GET_ONE_REG, uapi.SET_ONE_REG, struct.pack("<Q", id))


def operations(layout: Layout, capabilities: Mapping[str, int], told: dict[int, tuple[int, ...]]) -> list[Operation]:
    """The layout's operations in its order; neighbouring MSRs become one."""
    out: list[Operation] = []
    column = 0
    while column < len(layout.slots):
        run = _msr_run(layout, column)
        slot, word = layout.slots[column], layout.offsets[column]
        out.append(Msrs(run, word) if run else _operation(slot.id, word * 8, slot.size, capabilities, told))
        column += len(run) or 1
    return out


def _msr_run(layout: Layout, column: int) -> list[int]:
    run: list[int] = []
    for slot in layout.slots[column:]:
        index = ids.msr_index(slot.id)
        if index is None:
            break
        run.append(index)
    return run


def read_order(layout: Layout, program: list[Operation]) -> list[Operation]:
    """The operations in the order of a save: MP_STATE first, because reading it accepts pending INIT and SIPI."""
    if layout.scope == Scope.VM:
        return program
    return sorted(program, key=lambda op: getattr(op, "id", 0) != rows.MP_STATE.id)
