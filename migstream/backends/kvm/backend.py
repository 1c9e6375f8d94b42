"""The kvm backend: a host's /dev/kvm, and VMs on it, made here or attached to."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from migstream.backends.base import Backend, GuestMemory, Refusal, Vm
from migstream.backends.kvm import uapi, x86_64
from migstream.backends.kvm.run import Runner
from migstream.errors import BackendError, BackendUnavailable, UsageError, errno_name
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Phase, Scope
from migstream.registers import x86_64 as rows

if TYPE_CHECKING:
    from migstream.model import Words

_MSR_LIST_CAPACITY = 4096
_CPUID_CAPACITY = 256


def host_arch() -> Arch:
    """Architecture of this machine. Raises: BackendUnavailable for one without a kvm backend."""
    names = {"x86_64": Arch.X86_64}
    machine = platform.machine()
    if machine not in names:
        raise BackendUnavailable(f"no kvm backend for {machine}; use --backend sim")
    return names[machine]


class KvmBackend(Backend):
    """Real KVM. Owns the system fd; `close()` or garbage collection gives it back."""

    name = "kvm"

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open the device. Raises: BackendUnavailable, one line with what to do."""
        self.arch = host_arch()
        try:
            self.fd = uapi.open_kvm(path)
        except OSError as error:
            hint = {"ENOENT": "load the kvm module", "EACCES": "join the group that owns it"}
            name = errno_name(error.errno or 0)
            raise BackendUnavailable(f"{path}: {name}: no real KVM here; {hint.get(name, 'check the device')}, "
                                     "or use --backend sim") from error
        if (version := uapi.call(self.fd, uapi.GET_API_VERSION)) != uapi.API_VERSION:
            raise BackendUnavailable(f"{path}: KVM API version {version}; expected {uapi.API_VERSION}")
        self._profile: HostProfile | None = None

    def close(self) -> None:
        """Close the system fd; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def profile(self) -> HostProfile:
        """Ask the system fd, once. Raises: BackendError."""
        if self._profile is None:
            capabilities = {name: uapi.check_extension(self.fd, name) for name in uapi.CAPABILITIES}
            features = self._msr_list(uapi.GET_MSR_FEATURE_INDEX_LIST) if capabilities["GET_MSR_FEATURES"] else ()
            self._profile = HostProfile(
                arch=self.arch, kernel=f"Linux {platform.release()}", cpu=cpu_model(), backend=self.name,
                capabilities=capabilities, msrs=self._msr_list(uapi.GET_MSR_INDEX_LIST),
                feature_msrs={index: self._feature_msr(index) for index in features},
                sizes=_sizes(capabilities), cpuid=self._supported_cpuid())
        return self._profile

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> KvmVm:
        """Make a VM; see `Backend.create`. Raises: BackendError, UsageError."""
        if machine.arch != self.arch:
            raise UsageError(f"a {machine.arch.label} machine on a {self.arch.label} host")
        vm_fd = uapi.call(self.fd, uapi.CREATE_VM)
        vm = KvmVm(self, machine, vm_fd, owned=True)
        try:
            vm.build(dict(enabled_caps or {}))
        except BaseException:
            vm.close()
            raise
        return vm

    @classmethod
    def attach(cls, kvm_fd: int, vm_fd: int, vcpu_fds: Sequence[int], machine: Machine, memory: Sequence[memoryview],
               enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> KvmVm:
        """Return a `Vm` on file descriptors that the caller owns; nothing that was not given is touched.

        Args:
            machine: what the caller made: `memory[i]` is the writable buffer of `machine.memory[i]`.
            enabled_caps: VM capabilities that the caller has enabled, by number; KVM can't be asked for them.

        The caller runs and pauses its vCPUs itself and closes its fds; `close()` only lets go of them.
        """
        if len(vcpu_fds) != machine.vcpus or len(memory) != len(machine.memory):
            raise UsageError("attach: one fd a vCPU and one buffer a memory region")
        backend = cls.__new__(cls)
        backend.arch, backend.fd, backend._profile = host_arch(), kvm_fd, None
        vm = KvmVm(backend, machine, vm_fd, owned=False)
        vm.enabled_caps = dict(enabled_caps or {})
        vm.vcpu_fds = list(vcpu_fds)
        buffers = [buffer.cast("B") for buffer in memory]
        vm.memory = GuestMemory(list(zip(machine.memory, buffers, strict=True)))
        return vm

    def _msr_list(self, request: uapi.Request) -> tuple[int, ...]:
        buffer = bytearray(4 + 4 * _MSR_LIST_CAPACITY)
        struct.pack_into("<I", buffer, 0, _MSR_LIST_CAPACITY)
        uapi.call(self.fd, request, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return struct.unpack_from(f"<{count}I", buffer, 4)

    def _feature_msr(self, index: int) -> int:
        buffer = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        uapi.call(self.fd, uapi.GET_FEATURE_MSRS, buffer, register=f"{index:#x}")
        return int(struct.unpack_from("<Q", buffer, 16)[0])

    def _supported_cpuid(self) -> bytes:
        buffer = bytearray(8 + x86_64.CPUID_ENTRY * _CPUID_CAPACITY)
        struct.pack_into("<I", buffer, 0, _CPUID_CAPACITY)
        uapi.call(self.fd, uapi.GET_SUPPORTED_CPUID, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return bytes(buffer[:8 + x86_64.CPUID_ENTRY * count])


def _sizes(capabilities: Mapping[str, int]) -> dict[int, int]:
    return {rows.XSAVE.id: max(capabilities["XSAVE2"], 4096), rows.NESTED_STATE.id: capabilities["NESTED_STATE"]}


def cpu_model() -> str:
    """The CPU as /proc/cpuinfo names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class KvmVm(Vm):
    """A VM behind KVM file descriptors."""

    def __init__(self, backend: KvmBackend, machine: Machine, vm_fd: int, owned: bool) -> None:
        self.backend, self.machine, self.fd, self._owned = backend, machine, vm_fd, owned
        self.memory = GuestMemory([])
        self.enabled_caps: dict[int, tuple[int, ...]] = {}
        self.vcpu_fds: list[int] = []
        self._mappings: list[mmap.mmap] = []
        self._run_pages: list[mmap.mmap] = []
        self._runner: Runner | None = None
        self._programs: dict[Layout, list[x86_64.Operation]] = {}

    def build(self, enabled_caps: dict[int, tuple[int, ...]]) -> None:
        """Memory, then what the interrupt chips need, in KVM's order. Raises: BackendError, UsageError."""
        parts = [self._add_memory(slot, region) for slot, region in enumerate(self.machine.memory)]
        self.memory = GuestMemory(parts, self._discard)
        if unknown := self.machine.devices.keys() - _DEVICES.keys():
            raise UsageError(f"kvm can't make a device {min(unknown)!r}; it knows {', '.join(_DEVICES)}")
        for name, make in _DEVICES.items():
            if value := self.machine.devices.get(name):
                make(self.fd, int(value))
        for capability, args in enabled_caps.items():
            argument = bytearray(struct.pack("<II4Q64x", capability, 0, *(*args, 0, 0, 0, 0)[:4]))
            uapi.call(self.fd, uapi.ENABLE_CAP, argument, register=f"capability {capability}")
            self.enabled_caps[capability] = args

    def _add_memory(self, slot: int, region: MemoryRegion) -> tuple[MemoryRegion, memoryview]:
        mapping = _map(region)
        self._mappings.append(mapping)
        anchor = ctypes.c_char.from_buffer(mapping)
        argument = struct.pack("<IIQQQ", slot, 0, region.guest_address, region.size, ctypes.addressof(anchor))
        del anchor
        uapi.call(self.fd, uapi.SET_USER_MEMORY_REGION, bytearray(argument), register=f"{region.guest_address:#x}")
        return region, memoryview(mapping)

    def _discard(self, part: int, start: int, length: int) -> None:
        """Anonymous memory that is given back reads as zero."""
        self._mappings[part].madvise(mmap.MADV_DONTNEED, start, length)

    def create_vcpus(self) -> None:
        """Create the vCPUs and map their run pages. Raises: BackendError."""
        size = uapi.call(self.backend.fd, uapi.GET_VCPU_MMAP_SIZE)
        for k in range(len(self.vcpu_fds), self.machine.vcpus):
            fd = uapi.call(self.fd, uapi.CREATE_VCPU, k, vcpu=k)
            self.vcpu_fds.append(fd)
            self._run_pages.append(mmap.mmap(fd, size))

    def layouts(self) -> tuple[tuple[Layout, ...], list[Refusal]]:
        """What this VM's kernel has, without the MSRs that it lists and refuses to read on vCPU 0."""
        profile = self.backend.profile()
        sizes = {**profile.sizes, rows.CPUID2.id: self._cpuid_size()}
        msr_list = profile.msrs + tuple(i for i in profile.feature_msrs if i not in profile.msrs)
        capabilities = {**profile.capabilities, **self._devices_offered()}
        layouts = rows.layouts(capabilities, sizes, msr_list, self._kvm_registers(), self.enabled_caps)
        refused = self._unreadable(layouts)
        bad = {refusal.register for refusal in refused}
        kept = (Layout(at.scope, at.phase, tuple(s for s in at.slots if s.id not in bad)) for at in layouts)
        return tuple(layout for layout in kept if layout.slots), refused

    def _devices_offered(self) -> dict[str, int]:
        """A capability of the host is no device of this VM."""
        devices = self.machine.devices
        return {name: 0 for name, needs in (("IRQCHIP", "irqchip"), ("PIT_STATE2", "pit")) if not devices.get(needs)}

    def _unreadable(self, layouts: Sequence[Layout]) -> list[Refusal]:
        import numpy as np

        refused = []
        for layout in layouts:
            refused += self.read(layout, 0, np.zeros((1, layout.row_words), np.uint64))
        return refused

    def _cpuid_size(self) -> int:
        """Bytes of the longest CPUID2 table of this VM's vCPUs."""
        longest = 0
        for k, fd in enumerate(self.vcpu_fds):
            buffer = bytearray(8 + x86_64.CPUID_ENTRY * _CPUID_CAPACITY)
            struct.pack_into("<I", buffer, 0, _CPUID_CAPACITY)
            uapi.call(fd, uapi.GET_CPUID2, buffer, vcpu=k)
            longest = max(longest, struct.unpack_from("<I", buffer)[0])
        return 8 + x86_64.CPUID_ENTRY * longest

    def _kvm_registers(self) -> tuple[int, ...]:
        """KVM_GET_REG_LIST: registers that KVM defines; none before 6.18."""
        if not self.backend.profile().capabilities["ONE_REG"]:
            return ()
        buffer = bytearray(8 + 8 * 64)
        struct.pack_into("<Q", buffer, 0, 64)
        try:
            uapi.call(self.vcpu_fds[0], uapi.GET_REG_LIST, buffer, vcpu=0)
        except BackendError:
            return ()
        (count,) = struct.unpack_from("<Q", buffer)
        return struct.unpack_from(f"<{count}Q", buffer, 8)

    def read(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.read`."""
        program = x86_64.read_order(layout, self._program(layout))
        return [no for row in self._rows(layout, first_vcpu, values) for op in program for no in op.read(row)]

    def write(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.write`."""
        program = self._program(layout)
        return [no for row in self._rows(layout, first_vcpu, values) for op in program for no in op.write(row)]

    def _program(self, layout: Layout) -> list[x86_64.Operation]:
        if layout not in self._programs:
            capabilities = self.backend.profile().capabilities
            self._programs[layout] = x86_64.operations(layout, capabilities, self.enabled_caps)
        return self._programs[layout]

    def _rows(self, layout: Layout, first_vcpu: int, values: Words) -> list[x86_64.Row]:
        """The matrix's rows with the fd that serves each: VM-wide MSRs go through a vCPU, any one will do."""
        if not values.flags.c_contiguous or values.shape[1] != layout.row_words:
            raise UsageError("a bank is a C-contiguous matrix of its layout's width")
        if first_vcpu + len(values) > (1 if layout.scope == Scope.VM else len(self.vcpu_fds)):
            raise UsageError(f"rows {first_vcpu} to {first_vcpu + len(values)} of {layout.title}: the VM has fewer")
        memory, width, base = memoryview(values.data).cast("B"), layout.row_words * 8, int(values.ctypes.data)
        through_vcpu = layout.scope == Scope.VCPU or layout.phase == Phase.FEATURE
        fds = self.vcpu_fds if through_vcpu else [self.fd]
        return [x86_64.Row(fds[first_vcpu + k], first_vcpu + k if layout.scope == Scope.VCPU else None,
                           memory[k * width:(k + 1) * width], base + k * width, values[k])
                for k in range(len(values))]

    def start(self) -> None:
        """See `Vm.start`."""
        if not self._run_pages:
            raise UsageError("an attached VM is run by whoever owns it")
        self._runner = self._runner or Runner(self.vcpu_fds, self._run_pages)
        self._runner.start()

    def pause(self) -> None:
        """See `Vm.pause`."""
        if self._runner:
            self._runner.pause()

    def exits(self) -> dict[int, str]:
        """See `Vm.exits`."""
        return dict(self._runner.exits) if self._runner else {}

    def close(self) -> None:
        """Stop, then close what was made here; an attached VM's fds stay open."""
        self.pause()
        if not self._owned:
            return
        self.memory.release()
        for mapping in (*self._run_pages, *self._mappings):
            mapping.close()
        for fd in (*self.vcpu_fds, self.fd):
            if fd >= 0:
                os.close(fd)
        self._run_pages, self._mappings, self.vcpu_fds, self.fd = [], [], [], -1
        self._runner = None


def _map(region: MemoryRegion) -> mmap.mmap:
    """Anonymous memory for a region. Raises: BackendError for a size that the host hasn't got."""
    try:
        mapping = mmap.mmap(-1, region.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.ENOMEM
        raise BackendError("mmap", errno=number, register=f"{region.guest_address:#x}") from error
    return mapping


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
