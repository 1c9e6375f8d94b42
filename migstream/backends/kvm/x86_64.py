"""How each x86-64 row of the catalogue is read from and written to KVM, and what an x86-64 VM is made of.

An operation works in the bank's memory: no value becomes a Python object, except in the rows of MSRs that a kernel
refuses.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from migstream.backends.base import SHORT_COUNT, Refusal
from migstream.backends.kvm import offered_x86_64 as offered
from migstream.backends.kvm import uapi
from migstream.backends.kvm.arch import ArchHost, ArchVm
from migstream.backends.kvm.batch import Entry, Kind
from migstream.backends.kvm.offered_x86_64 import CPUID_CAPACITY, CPUID_ENTRY
from migstream.backends.kvm.operations import (
    ATTRIBUTE,
    ByAddress,
    EnabledCap,
    Operation,
    Row,
    Struct,
    register_list,
)
from migstream.backends.kvm.shared import IN_PAGE, SETTLED, Shared
from migstream.backends.kvm.uapi import Request
from migstream.errors import BackendError
from migstream.model import Arch, Layout, Phase, Scope
from migstream.registers import ids
from migstream.registers import x86_64 as rows
from migstream.registers.bit_tables import decode

if TYPE_CHECKING:
    from migstream.backends.kvm.backend import KvmBackend, KvmVm
    from migstream.host.profile import HostProfile

_OWN_ATTRIBUTE = ids.attribute_id(0, 0, 0) >> 40
"""Ids of attributes of the vCPU's own file descriptor; bits 39:32 are the group."""


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

    def entry(self, writing: bool) -> Entry | None:
        """With the rule that `write` checks."""
        entry = super().entry(writing)
        if entry is None or not writing:
            return entry
        return replace(entry, kind=Kind.COUNTED, head=struct.pack("<4I", *self.count))


class Cpuid(Counted):
    """KVM_CPUID2. Kernels before 6.6 leave the count as they were asked, however few entries they give."""

    def read(self, row: Row) -> list[Refusal]:
        """As `Struct.read`, with the count of the entries that were given."""
        memory = row.memory[self.slice]
        memory[8:] = b"\xff" * (len(memory) - 8)
        refused = super().read(row)
        entries = 0 if refused else _entries(memory)
        struct.pack_into("<I", memory, 0, entries if not refused else struct.unpack_from("<I", memory)[0])
        memory[8 + CPUID_ENTRY * entries:] = bytes(len(memory) - 8 - CPUID_ENTRY * entries)
        return refused

    def entry(self, writing: bool) -> Entry | None:
        """Reading is more than an ioctl, so it is not for the batch."""
        return super().entry(writing) if writing else None


_UNTOUCHED = 0xFFFF_FFFF
"""A leaf that no table has: what stands in an entry that the kernel did not write."""


def _entries(table: bytearray | memoryview) -> int:
    """How many entries of a struct kvm_cpuid2 full of 0xff the kernel has written."""
    (count,) = struct.unpack_from("<I", table)
    leaves = (struct.unpack_from("<I", table, 8 + CPUID_ENTRY * number)[0] for number in range(count))
    return next((number for number, leaf in enumerate(leaves) if leaf == _UNTOUCHED), count)


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

    def entry(self, writing: bool) -> Entry | None:
        """What is written is the column's first word."""
        entry = super().entry(writing)
        return entry and replace(entry, kind=Kind.FIRST) if writing else entry


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

    def entry(self, writing: bool) -> Entry | None:
        """By value, asked first."""
        request = uapi.SET_TSC_KHZ if writing else uapi.GET_TSC_KHZ
        return Entry(Kind.INTEGER, self.start, 4, request, other=uapi.GET_TSC_KHZ.number)


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

    def entry(self, writing: bool) -> Entry | None:
        """The indices; the argument is made per thread."""
        request = uapi.SET_MSRS if writing else uapi.GET_MSRS
        return Entry(Kind.MSRS, self.word * 8, 8 * len(self.indices), request, msrs=tuple(self.indices))

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

_CLASSES: dict[int, type[Struct]] = {rows.CPUID2.id: Cpuid, rows.NESTED_STATE.id: Counted}
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
        return _CLASSES.get(id, Shared)(id, start, size, *_STRUCTS[id], _prepare(id, size))
    if id == rows.XSAVE.id:
        get = uapi.GET_XSAVE2 if capabilities.get("XSAVE2") else uapi.GET_XSAVE
        return Struct(id, start, size, get, uapi.SET_XSAVE)
    if id == rows.CLOCK.id:
        return Clock(id, start, size, uapi.GET_CLOCK, uapi.SET_CLOCK)
    if id == rows.TSC_KHZ.id:
        return TscKhz(id, start)
    if id >> 40 == _OWN_ATTRIBUTE:
        head = ATTRIBUTE.pack(0, id >> 32 & 0xFF, id & 0xFFFF_FFFF, 0)[:16]
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
    for operation in out if rows.NESTED_STATE.id not in layout.index else ():  # entering L2 loads debug registers
        if isinstance(operation, Shared):
            operation.settled = operation.id in SETTLED
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
    """The operations in the order of a save: MP_STATE first, because reading it accepts pending INIT and SIPI; then the
    LAPIC, which shows whether an INIT came (`batch.Flag.GATE`)."""
    if layout.scope == Scope.VM:
        return program
    return sorted(program, key=lambda op: _READ_FIRST.get(op.id, len(_READ_FIRST)))


_READ_FIRST = {rows.MP_STATE.id: 0, rows.LAPIC.id: 1}


class X86Host(ArchHost):
    """What an x86-64 kernel says of itself on the system fd."""

    arch = Arch.X86_64
    capabilities = uapi.CAPABILITIES

    def complete(self, backend: KvmBackend, profile: HostProfile) -> HostProfile:
        """MSRs, CPUID and the sizes that the host tells. Raises: BackendError."""
        capabilities = profile.capabilities
        features = capabilities["GET_MSR_FEATURES"] and offered.msr_list(backend.fd, uapi.GET_MSR_FEATURE_INDEX_LIST)
        return replace(profile, msrs=offered.msr_list(backend.fd, uapi.GET_MSR_INDEX_LIST),
                       feature_msrs={index: offered.feature_msr(backend.fd, index) for index in features or ()},
                       sizes=offered.sizes(capabilities), cpuid=(cpuid := offered.supported_cpuid(backend.fd)),
                       cpuid_forced=offered.forced_cpuid(backend.fd, cpuid),
                       xsave_components=tuple(decode("XCR0", offered.xsave_mask(backend.fd, capabilities, cpuid))))

    def vm(self, vm: KvmVm) -> X86Vm:
        """The x86-64 part of a VM."""
        return X86Vm(vm)


class X86Vm(ArchVm):
    """Interrupt chips, CPUID and MSRs of one VM."""

    def make_devices(self) -> None:
        """In KVM's order. Raises: BackendError."""
        for name, make in _DEVICES.items():
            if value := self.vm.machine.devices.get(name):
                make(self.vm.fd, int(value))

    def vcpus_created(self) -> None:
        """Nothing: an x86-64 vCPU is complete when it is made."""

    def layouts(self) -> tuple[Layout, ...]:
        """The host's MSRs and structs, as far as this VM has their device."""
        profile = self.vm.backend.profile()
        sizes = {**profile.sizes, rows.CPUID2.id: self._cpuid_size()}
        msr_list = profile.msrs + tuple(i for i in profile.feature_msrs if i not in profile.msrs)
        capabilities = {**profile.capabilities, **self._devices_offered()}
        return rows.layouts(capabilities, sizes, msr_list, self._kvm_registers(), self.vm.enabled_caps,
                            profile.bank_scopes)

    def operations(self, layout: Layout) -> list[Operation]:
        """See `operations`."""
        return operations(layout, self.vm.backend.profile().capabilities, self.vm.enabled_caps)

    def page_registers(self) -> int:
        """General and segment registers, where KVM_CAP_SYNC_REGS offers both."""
        return IN_PAGE if int(self.vm.backend.profile().capabilities.get("SYNC_REGS", 0)) & IN_PAGE == IN_PAGE else 0

    def read_order(self, layout: Layout, program: list[Operation]) -> list[Operation]:
        """MP_STATE first; see `read_order`."""
        return read_order(layout, program)

    def through_vcpu(self, layout: Layout) -> bool:
        """VM-wide MSRs go through a vCPU; all else of the VM has ioctls of its own."""
        return layout.scope == Scope.VCPU or layout.phase == Phase.FEATURE

    def _devices_offered(self) -> dict[str, int]:
        """A capability of the host is no device of this VM."""
        devices = self.vm.machine.devices
        return {name: 0 for name, needs in (("IRQCHIP", "irqchip"), ("PIT_STATE2", "pit")) if not devices.get(needs)}

    def _cpuid_size(self) -> int:
        """Bytes of the longest CPUID2 table of this VM's vCPUs."""
        longest = 0
        for k, fd in enumerate(self.vm.vcpu_fds):
            buffer = bytearray(b"\xff") * (8 + CPUID_ENTRY * CPUID_CAPACITY)
            struct.pack_into("<II", buffer, 0, CPUID_CAPACITY, 0)
            uapi.call(fd, uapi.GET_CPUID2, buffer, vcpu=k)
            longest = max(longest, _entries(buffer))
        return 8 + CPUID_ENTRY * longest

    def _kvm_registers(self) -> tuple[int, ...]:
        """KVM_GET_REG_LIST: registers that KVM defines; none before 6.18."""
        if not self.vm.backend.profile().capabilities["ONE_REG"]:
            return ()
        try:
            return register_list(self.vm.vcpu_fds[0])
        except BackendError:
            return ()


def _set_tss(fd: int, address: int) -> None:
    uapi.call(fd, uapi.SET_TSS_ADDR, address)


def _irqchip(fd: int, _: int) -> None:
    uapi.call(fd, uapi.CREATE_IRQCHIP)


def _pit(fd: int, _: int) -> None:
    uapi.call(fd, uapi.CREATE_PIT2, bytearray(64))


_DEVICES = {
    "tss_address": _set_tss,   # Intel without unrestricted guest needs it before the first KVM_RUN
    "irqchip": _irqchip,       # before the vCPUs, which get a LAPIC only then
    "pit": _pit,               # needs the irqchip
}
