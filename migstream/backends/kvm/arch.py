"""What differs between the architectures of KVM: an interface for a host, and one for a VM on it.

File descriptors, memory, the runner and the rows of a bank are the same for all and live in `backend` and `run`.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from migstream.contract import MEASURED, Behaviour
from migstream.errors import BackendUnavailable
from migstream.model import Arch, Layout

if TYPE_CHECKING:
    from migstream.backends.kvm.backend import KvmBackend, KvmVm
    from migstream.backends.kvm.operations import Operation
    from migstream.host.profile import HostProfile


class ArchVm(ABC):
    """An architecture's part of one VM: what is made besides memory and vCPUs, and how registers are reached."""

    def __init__(self, vm: KvmVm) -> None:
        self.vm = vm

    @abstractmethod
    def make_devices(self) -> None:
        """Make what must be there before the vCPUs. Raises: BackendError."""

    @abstractmethod
    def vcpus_created(self) -> None:
        """Make what needs all vCPUs to exist; called once. Raises: BackendError."""

    @abstractmethod
    def layouts(self) -> tuple[Layout, ...]:
        """Everything that this VM's kernel says can be saved, in restore order. Raises: BackendError."""

    @abstractmethod
    def operations(self, layout: Layout) -> list[Operation]:
        """The layout's operations in its order."""

    @abstractmethod
    def read_order(self, layout: Layout, program: list[Operation]) -> list[Operation]:
        """The operations in the order of a save."""

    @abstractmethod
    def through_vcpu(self, layout: Layout) -> bool:
        """Whether a layout's rows are served by vCPU file descriptors; VM-wide ones by the first."""

    def page_registers(self) -> int:
        """What KVM puts into the run page at each exit, as bits of `kvm_valid_regs`; 0 for nothing."""
        return 0

    def attribute_fd(self, id: int) -> int | None:
        """The file descriptor that knows the attribute of an id; None where this VM has none."""
        return None


class ArchHost(ABC):
    """An architecture's part of the host."""

    arch: Arch
    capabilities: Mapping[str, int]
    """What its profile asks for: number by name."""

    @abstractmethod
    def complete(self, backend: KvmBackend, profile: HostProfile) -> HostProfile:
        """Add to a profile with capabilities what only this architecture has. Raises: BackendError."""

    def behaviour(self, backend: KvmBackend) -> Behaviour:
        """What the kernel behaves as where it has no register."""
        from migstream.host.behaviour import of_profile

        return of_profile(backend.profile(), MEASURED)

    def vm_type(self, kvm_fd: int) -> int:
        """The argument of KVM_CREATE_VM."""
        return 0

    @abstractmethod
    def vm(self, vm: KvmVm) -> ArchVm:
        """The architecture's part of a VM."""


_MACHINES = {"x86_64": Arch.X86_64, "aarch64": Arch.ARM64}
"""`uname -m` of the hosts that have a kvm backend."""


def host_arch() -> Arch:
    """Architecture of this machine. Raises: BackendUnavailable for one without a kvm backend."""
    machine = platform.machine()
    if machine not in _MACHINES:
        raise BackendUnavailable(f"no kvm backend for {machine}; use --backend sim")
    return _MACHINES[machine]


def arch_host(arch: Arch) -> ArchHost:
    """The host part of an architecture; its module is loaded here."""
    if arch == Arch.X86_64:
        from migstream.backends.kvm.x86_64 import X86Host

        return X86Host()
    from migstream.backends.kvm.arm64 import Arm64Host

    return Arm64Host()
