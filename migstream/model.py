"""What a saved VM is: frozen dataclasses and banks. No bytes on the wire, no file descriptors.

numpy is imported where a bank is made, not here: a tool that only lists sections never pays for it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]


class Arch(enum.IntEnum):
    """Architecture of a stream: the ELF machine number (System V ABI, `e_machine`)."""

    X86_64 = 62
    ARM64 = 183

    @property
    def label(self) -> str:
        """The word that people and file names use: `x86_64`, `arm64`."""
        return self.name.lower()


class Scope(enum.StrEnum):
    """Whether a register exists once a VM or once a vCPU."""

    VM = "vm"
    VCPU = "vcpu"


class Klass(enum.StrEnum):
    """What a register is to the guest."""

    FEATURE = "feature"    # guest ABI: pinned for the guest's life
    IDENTITY = "identity"  # a fact of the host that must match
    STATE = "state"
    CLOCK = "clock"        # runs by itself: a read-back differs


class Phase(enum.IntEnum):
    """When a register is written; the order of the numbers is the order of a restore. 1 to 3 are the prologue."""

    CREATE = 1      # what a VM or vCPU is made with: capabilities, CPUID
    FINALIZE = 2    # what closes the set of registers (SVE vector lengths)
    FEATURE = 3     # VM-wide registers that a guest meets at boot
    STATE = 4
    INTERRUPTS = 5
    CLOCK = 6       # once, last

    @property
    def prologue(self) -> bool:
        """True for what is saved and restored before the pause."""
        return self <= Phase.FEATURE


OURS = 0xF0
"""Bits 63:56 of the ids that we give (see `migstream.registers.ids`); no kernel uses it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One column of a bank: a register's id and its size in bytes."""

    id: int
    size: int

    @property
    def words(self) -> int:
        """64-bit words that the column takes in a row; the bytes past `size` are zero."""
        return (self.size + 7) // 8


@dataclass(frozen=True)
class Layout:
    """The columns of a bank, in the order in which they are written at restore."""

    scope: Scope
    phase: Phase
    slots: tuple[Slot, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.scope, self.phase, self.slots))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Word offset of each column in a row, with the row's width as a last element."""
        out = [0]
        for slot in self.slots:
            out.append(out[-1] + slot.words)
        return tuple(out)

    @cached_property
    def row_words(self) -> int:
        """Width of a row in 64-bit words."""
        return self.offsets[-1]

    @cached_property
    def index(self) -> dict[int, int]:
        """Column number by register id."""
        return {slot.id: column for column, slot in enumerate(self.slots)}

    @cached_property
    def partial(self) -> tuple[tuple[int, int], ...]:
        """Columns whose last word is not full: (column, bytes of the value in that word)."""
        return tuple((column, slot.size % 8) for column, slot in enumerate(self.slots) if slot.size % 8)

    @cached_property
    def ours(self) -> tuple[tuple[int, Slot], ...]:
        """Columns whose id is of our namespace: structs, capabilities and device attributes."""
        return tuple((column, slot) for column, slot in enumerate(self.slots) if slot.id >> 56 == OURS)

    @cached_property
    def step(self) -> str:
        """The name of its phase in a report: `state`."""
        return self.phase.name.lower()

    @cached_property
    def timed_as(self) -> str:
        """What a report calls the time of writing it: `state (vcpu)`."""
        return f"{self.step} ({self.scope})"

    @property
    def title(self) -> str:
        """Short text for people: `vcpu/state`."""
        return f"{self.scope}/{self.phase.name.lower()}"

    @property
    def shared(self) -> Layout:
        """The first of all equal layouts: what is kept by layout is found without comparing slot by slot."""
        return _first_of(self)


@lru_cache(maxsize=256)
def _first_of(layout: Layout) -> Layout:
    return layout


@dataclass(frozen=True)
class Bank:
    """Register values of a range of vCPUs (or of the VM: one row).

    Attributes:
        layout: what the columns are.
        first_vcpu: index of the vCPU of row 0; 0 for the VM.
        values: C-contiguous uint64 matrix, rows x `layout.row_words`. The bank owns it; a backend may point the
            kernel into it while a call lasts.
        update: the registers as they were at the pause, sent only because they had changed since the prologue.
    """

    layout: Layout
    first_vcpu: int
    values: Words
    update: bool = False

    @property
    def rows(self) -> int:
        """Number of vCPUs covered; 1 for the VM."""
        return int(self.values.shape[0])

    def raw(self, row: int, column: int) -> bytes:
        """Value of one register, `size` bytes, little-endian. For showing and testing, not for the way to a kernel."""
        start = self.layout.offsets[column]
        slot = self.layout.slots[column]
        return self.values[row, start:start + slot.words].tobytes()[:slot.size]

    def items(self, row: int) -> Iterator[tuple[Slot, bytes]]:
        """All registers of one row with their values."""
        for column, slot in enumerate(self.layout.slots):
            yield slot, self.raw(row, column)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A range of guest RAM: guest-physical start and size, both in bytes and multiples of 4096."""

    guest_address: int
    size: int

    @property
    def end(self) -> int:
        """First guest-physical address after the region."""
        return self.guest_address + self.size


@dataclass(frozen=True)
class Machine:
    """What has to be created before a register can be written.

    Attributes:
        arch: architecture of the guest.
        vcpus: number of vCPUs; vCPU k has KVM id k.
        memory: RAM regions, ascending, not overlapping.
        devices: what the kernel emulates, by name, with what it takes to make it, such as
            `{"irqchip": True, "pit": True, "tss_address": 0x7ffbd000}`. Plain msgpack types.
    """

    arch: Arch
    vcpus: int
    memory: tuple[MemoryRegion, ...]
    devices: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HostSummary:
    """Where a stream was saved; for people and for reasons in a plan, never needed to restore.

    `notes` are one-line facts about the save, such as an MSR that the kernel lists and can't read.
    """

    kernel: str
    cpu: str
    backend: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpaqueState:
    """State of a device that a VMM emulates: a name of the VMM's own and bytes that only it understands."""

    name: str
    data: bytes


PAGE = 4096


@dataclass(frozen=True)
class RamRun:
    """Consecutive guest pages: `data` holds them, or is None for pages that are all zero."""

    guest_address: int
    pages: int
    data: memoryview | bytes | None
