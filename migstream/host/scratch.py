"""A scratch VM, and what can be done to single registers of it. No architecture here.

The backend comes in as an object: this layer is below the backends and only says (as protocols) what it uses of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from migstream.model import Arch, Layout, Machine, MemoryRegion, Phase, Scope, Slot
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from types import TracebackType

    from migstream.host.profile import HostProfile
    from migstream.model import Words

DEVICES: dict[Arch, dict[str, int]] = {
    Arch.X86_64: {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}, Arch.ARM64: {}}
"""What a scratch VM has. x86-64: all that KVM emulates, and the TSS address that some Intel hosts want."""

MEMORY = 1 << 20
"""Bytes of guest RAM from address 0, all zero."""


class Refused(Protocol):
    """What a host says no with; see `migstream.backends.base.Refusal`."""

    @property
    def register(self) -> int:
        """Id of the register."""

    @property
    def errno(self) -> int:
        """The kernel's number, or -1 for a short count."""


class ScratchVm(Protocol):
    """What a probe does with a VM; see `migstream.backends.base.Vm`."""

    def create_vcpus(self) -> None:
        """Create the vCPUs."""

    def layouts(self) -> tuple[tuple[Layout, ...], Sequence[Refused]]:
        """What can be saved, and what is listed and can't be read."""

    def read(self, layout: Layout, first_vcpu: int, values: Words) -> Sequence[Refused]:
        """Fill `values`."""

    def write(self, layout: Layout, first_vcpu: int, values: Words) -> Sequence[Refused]:
        """Write `values`."""

    def start(self) -> None:
        """Let all vCPUs run."""

    def pause(self) -> None:
        """Stop them."""

    def enter(self, vcpu: int) -> None:
        """Begin to run a vCPU and leave before its first instruction."""

    def has_attribute(self, id: int) -> bool:
        """Whether the device, vCPU 0 or VM that an attribute's id names knows it."""

    def __enter__(self) -> Any:
        """Give the VM itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None, /) -> None:
        """Close it."""


class Host(Protocol):
    """What a probe does with a backend; see `migstream.backends.base.Backend`."""

    def profile(self) -> HostProfile:
        """What the host says of itself without a VM."""

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> ScratchVm:
        """Make a VM without vCPUs."""


class Scratch:
    """A VM that is nobody's, and access to single registers of its vCPUs."""

    def __init__(self, vm: ScratchVm, vcpus: int = 1) -> None:
        self.vm, self.vcpus = vm, vcpus
        self._cells: dict[tuple[int, int, bool], tuple[Layout, Words, memoryview]] = {}

    def read(self, id: int, size: int, vcpu: int | None = None) -> bytes | int:
        """The register's value, or the errno of the refusal; without a vCPU, as the catalogue's scope says."""
        layout, values, memory = self._cell(id, size, vcpu)
        values[:] = 0
        refused = self.vm.read(layout, vcpu or 0, values)
        return refused[0].errno if refused else bytes(memory[:size])

    def write(self, id: int, value: bytes, vcpu: int | None = None) -> int:
        """0, or the errno of the refusal."""
        layout, values, memory = self._cell(id, len(value), vcpu)
        values[:] = 0
        memory[:len(value)] = value
        refused = self.vm.write(layout, vcpu or 0, values)
        return refused[0].errno if refused else 0

    def number(self, id: int) -> int | None:
        """A 64-bit register as a number; None where it can't be read."""
        value = self.read(id, 8)
        return int.from_bytes(value, "little") if isinstance(value, bytes) else None

    def put(self, id: int, number: int) -> int:
        """Write a 64-bit register; 0, or the errno of the refusal."""
        return self.write(id, number.to_bytes(8, "little"))

    def _cell(self, id: int, size: int, vcpu: int | None) -> tuple[Layout, Words, memoryview]:
        """Layout and memory of one register, made once: trials touch it thousands of times."""
        import numpy as np

        key = id, size, vcpu is None
        if key not in self._cells:
            row = lookup(id)
            scope, phase = (row.scope, row.phase) if vcpu is None else (Scope.VCPU, Phase.STATE)
            layout = Layout(scope, phase, (Slot(id, size),))
            values = np.zeros((1, layout.row_words), np.uint64)
            self._cells[key] = layout, values, memoryview(values.data).cast("B")
        return self._cells[key]


@contextmanager
def scratch_vm(host: Host, vcpus: int = 1, enabled_caps: dict[int, tuple[int, ...]] | None = None,
               devices: Mapping[str, int] | None = None) -> Iterator[Scratch]:
    """A VM with vCPUs that never ran; `devices` are added to `DEVICES`. Raises: BackendError."""
    arch = host.profile().arch
    machine = Machine(arch, vcpus, (MemoryRegion(0, MEMORY),), {**DEVICES[arch], **(devices or {})})
    with host.create(machine, enabled_caps) as vm:
        vm.create_vcpus()
        yield Scratch(vm, vcpus)
