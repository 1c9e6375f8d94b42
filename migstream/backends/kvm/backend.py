"""The kvm backend: a host's /dev/kvm, and VMs on it, made here or attached to."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from migstream.backends.base import (
    Backend,
    GuestMemory,
    Prepared,
    Refusal,
    Vm,
    check_machine,
    check_startable,
    no_memory,
)
from migstream.backends.kvm import batch, uapi
from migstream.backends.kvm.arch import arch_host, host_arch
from migstream.backends.kvm.operations import ATTRIBUTE, Operation, Rows
from migstream.backends.kvm.run import Runner
from migstream.contract import Behaviour
from migstream.errors import BackendError, BackendUnavailable, UsageError, errno_name
from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.model import Bank, Layout, Machine, MemoryRegion, Scope
from migstream.plan import DEVICES, check_devices

if TYPE_CHECKING:
    from migstream.model import Words


class KvmBackend(Backend):
    """Real KVM. Owns the system fd; `close()` or garbage collection gives it back."""

    name = "kvm"
    batched = True
    """Use the compiled batch where it is there; False is for comparing the two."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open the device. Raises: BackendUnavailable, one line with what to do."""
        self.host = arch_host(host_arch())
        self.arch = self.host.arch
        try:
            self.fd = uapi.open_kvm(path)
        except OSError as error:
            hint = {"ENOENT": "load the kvm module", "EACCES": "join the group that owns it"}
            name = errno_name(error.errno or 0)
            raise BackendUnavailable(f"{path}: {name}: no real KVM here; {hint.get(name, 'check the device')}, "
                                     "or use --backend sim") from error
        self._check_version(path)
        self._profile: HostProfile | None = None
        self._behaviour: Behaviour | None = None

    def _check_version(self, path: str) -> None:
        try:
            version = uapi.call(self.fd, uapi.GET_API_VERSION)
        except BackendError as error:
            raise BackendUnavailable(f"{path}: {errno_name(error.errno)}: not a KVM; use --backend sim") from error
        if version != uapi.API_VERSION:
            raise BackendUnavailable(f"{path}: KVM API version {version}; expected {uapi.API_VERSION}")

    def close(self) -> None:
        """Close the system fd; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def profile(self) -> HostProfile:
        """Ask the system fd, and a scratch VM where only a VM knows; once. Raises: BackendError."""
        if self._profile is None:
            capabilities = {name: uapi.check_extension(self.fd, name) for name in self.host.capabilities}
            told = self.host.complete(self, HostProfile(
                arch=self.arch, kernel=f"Linux {platform.release()}", cpu=cpu_model(), backend=self.name,
                capabilities=capabilities))
            self._profile = told.measured_by(profiles.recorded(told))
        return self._profile

    def know(self, profile: HostProfile) -> None:
        """See `Backend.know`."""
        self._profile = self.profile().measured_by(profile)

    def behaviour(self) -> Behaviour:
        """Ask the kernel, on arm64 through a scratch guest; once."""
        if self._behaviour is None:
            self._behaviour = self.host.behaviour(self)
        return self._behaviour

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> KvmVm:
        """Make a VM; see `Backend.create`. Raises: BackendError, UsageError."""
        check_machine(machine, self.arch)
        check_devices(machine)
        vm_fd = uapi.call(self.fd, uapi.CREATE_VM, self.host.vm_type(self.fd))
        vm = KvmVm(self, machine, vm_fd, owned=True)
        try:
            vm.build(dict(enabled_caps or {}))
        except BaseException:
            vm.close()
            raise
        return vm

    @classmethod
    def attach(cls, kvm_fd: int, vm_fd: int, vcpu_fds: Sequence[int], machine: Machine, memory: Sequence[memoryview],
               enabled_caps: Mapping[int, tuple[int, ...]] | None = None,
               device_fds: Mapping[str, int] | None = None) -> KvmVm:
        """Return a `Vm` on file descriptors that the caller owns; nothing that was not given is touched.

        Args:
            machine: what the caller made: `memory[i]` is the writable buffer of `machine.memory[i]`.
            enabled_caps: VM capabilities that the caller has enabled, by number; KVM can't be asked for them.
            device_fds: of KVM_CREATE_DEVICE, by the name that the machine's devices begin with: `gic`, `its`.

        The caller runs and pauses its vCPUs itself and closes its fds; `close()` only lets go of them.
        """
        if len(vcpu_fds) != machine.vcpus or len(memory) != len(machine.memory):
            raise UsageError("attach: one fd a vCPU and one buffer a memory region")
        backend = cls.__new__(cls)
        backend.host = arch_host(host_arch())
        backend.arch, backend.fd, backend._profile = backend.host.arch, kvm_fd, None
        backend._behaviour = None
        vm = KvmVm(backend, machine, vm_fd, owned=False)
        vm.enabled_caps = dict(enabled_caps or {})
        vm.vcpu_fds, vm.device_fds = list(vcpu_fds), dict(device_fds or {})
        buffers = [buffer.cast("B") for buffer in memory]
        for region, buffer in zip(machine.memory, buffers, strict=True):
            if buffer.readonly or len(buffer) != region.size:
                where = f"RAM at {region.guest_address:#x}"
                raise UsageError(f"attach: {where} needs a writable buffer of {region.size} bytes")
        vm.memory = GuestMemory(list(zip(machine.memory, buffers, strict=True)))
        return vm


def cpu_model() -> str:
    """The CPU as /proc/cpuinfo names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    parts = [f"{name.removeprefix('CPU ')} {found[name]}" for name in _ARM_CPU if name in found]
    return found.get("model name") or ", ".join(parts) or platform.machine()


_ARM_CPU = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
"""What arm64 kernels say instead of a model name."""


class KvmVm(Vm):
    """A VM behind KVM file descriptors."""

    def __init__(self, backend: KvmBackend, machine: Machine, vm_fd: int, owned: bool) -> None:
        self.backend, self.machine, self.fd, self._owned = backend, machine, vm_fd, owned
        self.memory = GuestMemory([])
        self.enabled_caps: dict[int, tuple[int, ...]] = {}
        self.vcpu_fds: list[int] = []
        self.device_fds: dict[str, int] = {}
        self.arch = backend.host.vm(self)
        self._mappings: list[mmap.mmap] = []
        self._run_pages: list[mmap.mmap] = []
        self._runner: Runner | None = None
        self._programs: dict[Layout, _Program] = {}
        self._there: dict[Layout, Words] = {}
        self._epoch = 0
        self._pages, self._pages_known = bytearray(), False

    def build(self, enabled_caps: dict[int, tuple[int, ...]]) -> None:
        """Memory, then what the interrupt chips need, in KVM's order. Raises: BackendError, UsageError."""
        parts = [self._add_memory(slot, region) for slot, region in enumerate(self.machine.memory)]
        self.memory = GuestMemory(parts, self._discard)
        known = DEVICES[self.machine.arch]
        if unknown := self.machine.devices.keys() - known:
            raise UsageError(f"kvm can't make a device {min(unknown)!r}; it knows {', '.join(sorted(known))}")
        self.arch.make_devices()
        for capability, args in enabled_caps.items():
            argument = bytearray(struct.pack("<II4Q64x", capability, 0, *(*args, 0, 0, 0, 0)[:4]))
            uapi.call(self.fd, uapi.ENABLE_CAP, argument, register=f"capability {capability}")
            self.enabled_caps[capability] = args

    def _add_memory(self, slot: int, region: MemoryRegion) -> tuple[MemoryRegion, memoryview]:
        mapping = _map(region)
        self._mappings.append(mapping)
        argument = struct.pack("<IIQQQ", slot, 0, region.guest_address, region.size, _address(mapping))
        uapi.call(self.fd, uapi.SET_USER_MEMORY_REGION, bytearray(argument), register=f"{region.guest_address:#x}")
        return region, memoryview(mapping)

    def _discard(self, part: int, start: int, length: int) -> None:
        """Anonymous memory that is given back reads as zero."""
        self._mappings[part].madvise(mmap.MADV_DONTNEED, start, length)

    def create_vcpus(self) -> None:
        """Create the vCPUs, map their run pages, make what needs all of them. Raises: BackendError."""
        self._check_open()
        if len(self.vcpu_fds) == self.machine.vcpus:
            return
        size = uapi.call(self.backend.fd, uapi.GET_VCPU_MMAP_SIZE)
        for k in range(len(self.vcpu_fds), self.machine.vcpus):
            fd = uapi.call(self.fd, uapi.CREATE_VCPU, k, vcpu=k)
            self.vcpu_fds.append(fd)
            self._run_pages.append(mmap.mmap(fd, size))
        self._pages = bytearray(8 * len(self._run_pages))
        self.arch.vcpus_created()

    def layouts(self) -> tuple[tuple[Layout, ...], list[Refusal]]:
        """What this VM's kernel has, without the MSRs that it lists and refuses to read on vCPU 0."""
        self._check_open()
        layouts = self.arch.layouts()
        refused = self._unreadable(layouts)
        bad = {refusal.register for refusal in refused}
        kept = (Layout(at.scope, at.phase, tuple(s for s in at.slots if s.id not in bad)) for at in layouts)
        return tuple(layout.shared for layout in kept if layout.slots), refused

    def _unreadable(self, layouts: Sequence[Layout]) -> list[Refusal]:
        import numpy as np

        refused = []
        for layout in layouts:
            refused += self.read(layout, 0, np.zeros((1, layout.row_words), np.uint64))
        return refused

    def read(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.read`."""
        part, rows = self._program(layout).reading, self._rows(layout, first_vcpu, values)
        if part.table is not None:
            return self._run(batch.Batch([self._reading(part.table, rows, first_vcpu)]), len(rows))
        return [no for row in rows for op in part.operations for no in op.read(row)]

    def read_all(self, banks: Sequence[Bank]) -> list[Refusal]:
        """See `Vm.read_all`: in one call of the compiled part, where it has all of them."""
        return self.reading(banks)()

    def reading(self, banks: Sequence[Bank]) -> Callable[[], list[Refusal]]:
        """See `Vm.reading`."""
        tables = [self._program(bank.layout).reading.table for bank in banks]
        jobs = [self._reading(table, self._rows(bank.layout, bank.first_vcpu, bank.values), bank.first_vcpu)
                for table, bank in zip(tables, banks, strict=True) if table is not None]
        if not jobs or len(jobs) < len(banks):
            return partial(super().read_all, banks)
        return partial(self._run, batch.Batch(jobs), len(self.vcpu_fds))

    def _run(self, work: batch.Batch, rows: int) -> list[Refusal]:
        self._check_open()
        return work.run(self.threads or batch.default_threads(rows))

    def _reading(self, table: batch.Table, rows: Rows, first_vcpu: int) -> batch.Job:
        return table.job(rows, memoryview(self._pages)[8 * first_vcpu:][:8 * len(rows)] if rows.of_vcpus else b"")

    def write(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.write`."""
        job = self._writing(layout, first_vcpu, values)
        if job is not None:
            self._changes(layout)
            return self._run(batch.Batch([job]), len(values))
        rows = self._rows(layout, first_vcpu, values)
        self._changes(layout)
        return [no for row in rows for op in self._program(layout).writing.operations for no in op.write(row)]

    def writing(self, banks: Sequence[Bank]) -> Prepared:
        """See `Vm.writing`: one call of the compiled part, where it has all of them, each layout once."""
        jobs = [job for bank in banks if (job := self._writing(bank.layout, bank.first_vcpu, bank.values)) is not None]
        plain = super().writing(banks)
        if not jobs or len(jobs) < len(banks) or len({bank.layout for bank in banks}) < len(banks):
            return plain
        return _Writes(self, [bank.layout for bank in banks], jobs, plain)

    def _writing(self, layout: Layout, first_vcpu: int, values: Words) -> batch.Job | None:
        part, rows = self._program(layout).writing, self._rows(layout, first_vcpu, values)
        if part.table is None:
            return None
        there = self._there.get(layout)
        return part.table.job(rows, there=None if there is None else there[first_vcpu:first_vcpu + len(values)])

    def _changes(self, *layouts: Layout) -> None:
        """What was known of the vCPUs' registers, and of these layouts', is so no more: they are written."""
        self._forget_pages()
        for layout in layouts:
            self._there.pop(layout, None)
        self._epoch += 1

    def _forget_pages(self) -> None:
        if self._pages_known:
            self._pages[:] = bytes(len(self._pages))
            self._pages_known = False

    def _rows(self, layout: Layout, first_vcpu: int, values: Words) -> Rows:
        self._check_open()
        if not values.flags.c_contiguous or values.shape[1] != layout.row_words:
            raise UsageError("a bank is a C-contiguous matrix of its layout's width")
        if first_vcpu + len(values) > (1 if layout.scope == Scope.VM else len(self.vcpu_fds)):
            raise UsageError(f"rows {first_vcpu} to {first_vcpu + len(values)} of {layout.title}: the VM has fewer")
        fds = self.vcpu_fds if self.arch.through_vcpu(layout) else [self.fd]
        return Rows(fds[first_vcpu:first_vcpu + len(values)], values,
                    first_vcpu if layout.scope == Scope.VCPU else None)

    def _program(self, layout: Layout) -> _Program:
        if layout not in self._programs:
            operations = self.arch.operations(layout)
            reading = self.arch.read_order(layout, operations)
            settled = [op for op in operations if (e := op.entry(writing=True)) and e.flags & batch.Flag.SETTLED]
            self._programs[layout] = _Program(self._part(reading, writing=False),
                                              self._part(operations, writing=True), self._part(settled, writing=False))
        return self._programs[layout]

    def _part(self, operations: list[Operation], writing: bool) -> _Part:
        return _Part(operations, batch.make_table(operations, writing) if self.backend.batched else None)

    def prepare(self, layouts: Sequence[Layout]) -> None:
        """See `Vm.prepare`."""
        for layout in layouts:
            self._program(layout)

    def take_stock(self, layouts: Sequence[Layout]) -> dict[Layout, Words]:
        """See `Vm.take_stock`. Only columns that no other write can change are looked at (`batch.Flag.SETTLED`)."""
        import numpy as np

        for layout in layouts:
            table = self._program(layout).settled.table
            if table is None or not table.length:
                continue
            has = np.zeros((len(self.vcpu_fds), layout.row_words), np.uint64)
            if not self._run(batch.Batch([table.job(self._rows(layout, 0, has))]), len(has)):
                self._there[layout] = has
                self._epoch += 1
        return super().take_stock(layouts)

    def warm(self, layouts: Sequence[Layout] = ()) -> None:
        """See `Vm.warm`."""
        if self.threads != 1:
            batch.warm(min(self.threads or batch.default_threads(len(self.vcpu_fds)), len(self.vcpu_fds)))
        for layout in layouts:
            self._run_empty(layout)

    def _run_empty(self, layout: Layout) -> None:
        import numpy as np

        program, nothing = self._program(layout), np.zeros((0, layout.row_words), np.uint64)
        for part in (program.reading, program.writing):
            if part.table is not None:
                self._run(batch.Batch([part.table.job(self._rows(layout, 0, nothing))]), 0)

    def __enter__(self) -> KvmVm:
        return self

    def behaviour(self) -> Behaviour:
        """See `Backend.behaviour`; of an attached VM, by a scratch VM made through its /dev/kvm."""
        return self.backend.behaviour()

    def start(self) -> None:
        """See `Vm.start`."""
        self._check_open()
        check_startable(len(self.vcpu_fds))
        if not self._run_pages:
            raise UsageError("an attached VM is run by whoever owns it")
        self._forget()
        for page in self._run_pages:
            struct.pack_into("<Q", page, uapi.RUN_VALID_REGS, self.arch.page_registers())
        self._runner = self._runner or Runner(self.vcpu_fds, self._run_pages)
        self._runner.start()

    def _forget(self) -> None:
        """What was known of the vCPUs' registers is so no more: they run."""
        self._forget_pages()
        self._there.clear()
        self._epoch += 1

    def enter(self, vcpu: int) -> None:
        """KVM_RUN with `immediate_exit`. Raises: BackendError for any end of it but EINTR."""
        self._check_open()
        self._check_vcpu(vcpu, len(self._run_pages))
        self._forget()
        page = self._run_pages[vcpu]
        page[uapi.RUN_IMMEDIATE_EXIT] = 1
        try:
            uapi.call(self.vcpu_fds[vcpu], uapi.RUN, vcpu=vcpu)
        except BackendError as error:
            if error.errno != errno.EINTR:
                raise
        finally:
            page[uapi.RUN_IMMEDIATE_EXIT] = 0

    def has_attribute(self, id: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on the device's, the first vCPU's or the VM's fd."""
        fd = self.arch.attribute_fd(id)
        if fd is None:
            return False
        try:
            uapi.call(fd, uapi.HAS_DEVICE_ATTR, bytearray(ATTRIBUTE.pack(0, id >> 32 & 0xFF, id & 0xFFFF_FFFF, 0)))
        except BackendError:
            return False
        return True

    def pause(self) -> None:
        """See `Vm.pause`. From here to the next write, the run pages have the registers of the last exit."""
        if self._runner and self._runner.pause() and self.arch.page_registers():
            self._pages[:] = array("Q", [_address(page) for page in self._run_pages]).tobytes()
            self._pages_known = True

    def exits(self) -> dict[int, str]:
        """See `Vm.exits`."""
        return dict(self._runner.exits) if self._runner else {}

    def close(self) -> None:
        """Stop, then close what was made here; an attached VM's fds stay open."""
        self.closed = True
        self.pause()
        self.memory.release()
        if not self._owned:
            return
        for mapping in (*self._run_pages, *self._mappings):
            mapping.close()
        for fd in (*self.device_fds.values(), *self.vcpu_fds, self.fd):
            if fd >= 0:
                os.close(fd)
        self._run_pages, self._mappings, self.vcpu_fds, self.device_fds, self.fd = [], [], [], {}, -1
        self._forget()
        self._runner = None


class _Writes(Prepared):
    """Several banks in one call of the compiled part; one by one where what is known of the VM has changed since."""

    def __init__(self, vm: KvmVm, layouts: Sequence[Layout], jobs: Sequence[batch.Job], plain: Prepared) -> None:
        self._vm, self._plain = vm, plain
        self._layouts = [layout for layout in layouts if layout in vm._there]
        self._work, self._epoch = batch.Batch(jobs), vm._epoch

    def __call__(self) -> list[Refusal]:
        """See `Prepared`."""
        vm = self._vm
        if vm._epoch != self._epoch:
            refused, self.ns = self._plain(), self._plain.ns
            return refused
        vm._changes(*self._layouts)
        self.ns = self._work.ns
        return vm._run(self._work, len(vm.vcpu_fds))


@dataclass(frozen=True)
class _Part:
    """Operations in their order, and the same as a table where that can be."""

    operations: list[Operation]
    table: batch.Table | None


@dataclass(frozen=True)
class _Program:
    """How a layout is read and written; `settled` reads the columns of `batch.Flag.SETTLED`."""

    reading: _Part
    writing: _Part
    settled: _Part


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _map(region: MemoryRegion) -> mmap.mmap:
    """Anonymous memory for a region. Raises: BackendError for a size that the host hasn't got."""
    try:
        mapping = mmap.mmap(-1, region.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.ENOMEM
        raise no_memory(region, number) from error
    return mapping
