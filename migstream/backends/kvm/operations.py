"""How columns of a bank are read from and written to KVM: what both architectures use.

A layout becomes a list of operations once; a row of a bank is then served by calling each with the row's memory. An
operation works in that memory: no value becomes a Python object.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migstream.backends.base import Refusal
from migstream.backends.kvm import uapi
from migstream.backends.kvm.batch import Entry, Kind
from migstream.backends.kvm.uapi import Request
from migstream.errors import BackendError
from migstream.registers import ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from migstream.model import Words

ATTRIBUTE = struct.Struct("<IIQQ")
"""struct kvm_device_attr: flags, group, attribute, address of the value."""

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


class Rows(Sequence[Row]):
    """A matrix's rows, each with the fd that serves it; a `Row` is made only where Python works on one."""

    def __init__(self, fds: Sequence[int], values: Words, first_vcpu: int | None) -> None:
        """`first_vcpu` is the vCPU of row 0, None for the VM."""
        self.fds, self.values, self._first = array("i", fds), values, first_vcpu
        self.of_vcpus = first_vcpu is not None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, k: int) -> Row:  # type: ignore[override]  # nobody slices it
        words = self.values[k]
        return Row(self.fds[k], None if self._first is None else self._first + k, memoryview(words.data).cast("B"),
                   int(words.ctypes.data), words)


class Operation(ABC):
    """Reads and writes one column, or a run of MSR columns, of one row."""

    id: int = 0
    """The register; 0 where it is a run of MSRs."""

    @abstractmethod
    def read(self, row: Row) -> list[Refusal]:
        """Fill the column from the kernel."""

    @abstractmethod
    def write(self, row: Row) -> list[Refusal]:
        """Give the column to the kernel."""

    def entry(self, writing: bool) -> Entry | None:
        """The same for the compiled batch; None where it takes Python."""
        return None


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

    def entry(self, writing: bool) -> Entry | None:
        """In place."""
        start, size = self.slice.start, self.slice.stop - self.slice.start
        if writing:
            return Entry(Kind.STRUCT, start, size, self.set)
        return Entry(Kind.STRUCT, start, size, self.get, head=self.prepare)


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

    def entry(self, writing: bool) -> Entry | None:
        """What stands before the address, and the column's place."""
        return Entry(Kind.ADDRESS, self.start, 8, self.set if writing else self.get, head=self.head)


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


_REGISTERS_AT_FIRST = 1024
"""Room for a first try; the longest list seen has 362."""


def register_list(fd: int) -> tuple[int, ...]:
    """KVM_GET_REG_LIST of a vCPU, in the kernel's order. Raises: BackendError."""
    count = _REGISTERS_AT_FIRST
    while True:
        buffer = bytearray(8 + 8 * count)
        struct.pack_into("<Q", buffer, 0, count)
        try:
            uapi.call(fd, uapi.GET_REG_LIST, buffer)
        except BackendError as error:
            if error.errno != errno.E2BIG:
                raise
        (listed,) = struct.unpack_from("<Q", buffer)
        if listed <= count:
            return struct.unpack_from(f"<{listed}Q", buffer, 8)
        count = listed
