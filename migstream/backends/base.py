"""The primitives that a backend has. The sequence of a save or restore is not here: it lives once, in `transport`.

A backend is a host; a `Vm` is one guest on it. A `Vm` reads and writes whole banks: it is given a layout and a
matrix and works from and into that memory. What the host refuses comes back as a list, named, so that a caller
decides what a refusal means; only a broken request raises.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from migstream.contract import Behaviour
from migstream.errors import BackendError, UsageError, errno_name
from migstream.model import Arch, Bank, HostSummary, Layout, Machine, MemoryRegion
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile
    from migstream.model import Words

SHORT_COUNT = -1
"""`Refusal.errno` of KVM_GET_MSRS and KVM_SET_MSRS, which stop at the MSR that they refuse and give no errno."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The host's no to one register.

    Attributes:
        register: its id. vcpu: index, None for a VM register.
        operation: the ioctl or primitive. errno: the kernel's number, or SHORT_COUNT.
    """

    register: int
    vcpu: int | None
    operation: str
    errno: int

    def __str__(self) -> str:
        where = "VM" if self.vcpu is None else f"vCPU {self.vcpu}"
        why = "stopped here (short count)" if self.errno == SHORT_COUNT else errno_name(self.errno)
        return f"{where}: {lookup(self.register).name}: {self.operation}: {why}"


MAX_THREADS = 256


def check_threads(threads: int) -> int:
    """Return `threads` if a backend can be asked for so many; 0 leaves it to the backend. Raises: UsageError."""
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads; 1 to {MAX_THREADS}, 0 for what the backend chooses")
    return threads


class GuestMemory:
    """Guest RAM by guest-physical address. The buffers belong to whoever made the VM."""

    def __init__(self, parts: list[tuple[MemoryRegion, memoryview]],
                 discard: Callable[[int, int, int], None] | None = None) -> None:
        """`discard(part, start, length)` makes bytes of a part zero without touching them, where that can be done."""
        self._parts, self._discard = parts, discard

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The RAM regions, ascending."""
        return tuple(region for region, _ in self._parts)

    def view(self, guest_address: int, length: int) -> memoryview:
        """Return writable memory of `length` bytes at a guest-physical address; valid until the VM is closed.

        Raises: UsageError where the range is not within one region.
        """
        part, start = self._find(guest_address, length)
        return self._parts[part][1][start:start + length]

    def zero(self, guest_address: int, length: int) -> None:
        """Make whole pages zero. Raises: UsageError where the range is not within one region."""
        part, start = self._find(guest_address, length)
        if self._discard:
            self._discard(part, start, length)
        else:
            self._parts[part][1][start:start + length] = bytes(length)

    def _find(self, guest_address: int, length: int) -> tuple[int, int]:
        for part, (region, _) in enumerate(self._parts):
            if region.guest_address <= guest_address and guest_address + length <= region.end:
                return part, guest_address - region.guest_address
        raise UsageError(f"no guest RAM at {guest_address:#x}..{guest_address + length:#x}")

    def release(self) -> None:
        """Drop the views, so that their buffers can be closed."""
        for _, buffer in self._parts:
            buffer.release()
        self._parts = []


MEASURED, MODELLED = "measured", "modelled"
"""What a report's times are: this machine's wall time, or what a model of a machine says."""


class Stopwatch:
    """What a report's times are taken with: wall time here, a model's time on a simulated host.

    Attributes:
        kind: MEASURED or MODELLED. what: of what, for people; "" for wall time.
    """

    kind = MEASURED

    @property
    def what(self) -> str:
        """See the class."""
        return ""

    now_ns: Callable[[], int] = staticmethod(time.perf_counter_ns)
    """ns since some moment."""


WALL = Stopwatch()


class Prepared:
    """Writes that were made ready: a call does them all and returns what was refused.

    Attributes:
        ns: what each took at the last call, by the VM's stopwatch; a backend that does several at once may tell their
            sum at the first of them.
    """

    def __init__(self, writes: Sequence[Callable[[], list[Refusal]]], stopwatch: Stopwatch) -> None:
        self._writes, self._stopwatch = writes, stopwatch
        self.ns: Sequence[int] = [0] * len(writes)

    def __call__(self) -> list[Refusal]:
        """Write. Raises: UsageError where the VM was closed since."""
        refused, moments = [], [self._stopwatch.now_ns()]
        for write in self._writes:
            refused += write()
            moments.append(self._stopwatch.now_ns())
        self.ns = [end - start for start, end in pairwise(moments)]
        return refused


class Vm(ABC):
    """One guest. Made without vCPUs, so that what must precede them can be written first."""

    machine: Machine
    memory: GuestMemory
    threads: int = 0
    """How many threads a read or write may use; 0 leaves it to the backend."""

    stopwatch: Stopwatch = WALL
    """What the time of its primitives is taken with."""

    closed: bool = False
    """Whether `close()` was called; after it every primitive but `pause`, `exits` and `close` is a UsageError."""

    def _check_open(self) -> None:
        """Raises: UsageError on a VM that was closed."""
        if self.closed:
            raise UsageError("the VM is closed")

    @abstractmethod
    def create_vcpus(self) -> None:
        """Create `machine.vcpus` vCPUs with ids 0, 1, 2 …; those that are there stay. Raises: BackendError."""

    @abstractmethod
    def layouts(self) -> tuple[tuple[Layout, ...], list[Refusal]]:
        """Return what has to be saved here, in restore order, and what the host lists but refuses to read."""

    @abstractmethod
    def read(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """Fill `values` (rows x layout.row_words, zeroed by the caller) from vCPUs `first_vcpu` on, or the VM."""

    def read_all(self, banks: Sequence[Bank]) -> list[Refusal]:
        """Fill the values of several banks (zeroed by the caller), those of vCPUs and of the VM in any order."""
        return [no for bank in banks for no in self.read(bank.layout, bank.first_vcpu, bank.values)]

    @abstractmethod
    def write(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """Write all columns of all rows, in the layout's order within a row; goes on after a refusal."""

    def reading(self, banks: Sequence[Bank]) -> Callable[[], list[Refusal]]:
        """What calls `read_all(banks)`, with as much of it done now as can be: the banks' memory must stay."""
        return partial(self.read_all, banks)

    def writing(self, banks: Sequence[Bank]) -> Prepared:
        """What writes several banks, with as much of it done now as can be: their memory must stay.

        Those of vCPUs come first, the VM's follow. A change of their registers by another layout must not come between.
        """
        return Prepared([partial(self.write, bank.layout, bank.first_vcpu, bank.values) for bank in banks],
                        self.stopwatch)

    def prepare(self, layouts: Sequence[Layout]) -> None:  # noqa: B027 - most backends have nothing to do
        """Make what reading and writing these layouts takes, so that it is not made while the guest stands still."""

    def take_stock(self, layouts: Sequence[Layout]) -> dict[Layout, Words]:
        """Look at what registers are now: the next write of a layout may leave out what has its value already.

        Its registers must not be written by another layout in between. Returns the first vCPU's row (or the VM's) of
        each layout that can be read.
        """
        import numpy as np

        rows = {layout: np.zeros((1, layout.row_words), np.uint64) for layout in layouts}
        return {layout: row for layout, row in rows.items() if not self.read(layout, 0, row)}

    def warm(self, layouts: Sequence[Layout] = ()) -> None:  # noqa: B027 - most backends have no threads of their own
        """Have the threads awake: the next call is a read or write of many vCPUs.

        And go once through reading and writing `layouts` without a row, so that the code is in the caches.
        """

    @abstractmethod
    def start(self) -> None:
        """Let all vCPUs run. Raises: BackendError, UsageError if they run already or there is none."""

    @abstractmethod
    def pause(self) -> None:
        """Stop all vCPUs between two instructions; nothing of this VM runs when it returns."""

    def enter(self, vcpu: int) -> None:
        """Begin to run a vCPU and leave before its first instruction; for probing what a run ends.

        Raises: UsageError where the backend can't, BackendError.
        """
        raise UsageError("this backend can't enter a vCPU without running it")

    def _check_vcpu(self, vcpu: int, made: int) -> None:
        """Raises: UsageError where there is no such vCPU by now."""
        if not 0 <= vcpu < made:
            raise UsageError(f"there is no vCPU {vcpu}: {made} were made, numbered from 0")

    def has_attribute(self, id: int) -> bool:
        """Whether the device, vCPU 0 or VM that an attribute's id names knows it (KVM_HAS_DEVICE_ATTR).

        False where this VM has no such device, or the backend none at all.
        """
        return False

    def behaviour(self) -> Behaviour:
        """What this VM's kernel behaves as where it has no register; what can't be found out is named in it."""
        return Behaviour(unknown=("what the kernel behaves as where it has no register: this backend can't tell",))

    @abstractmethod
    def exits(self) -> dict[int, str]:
        """vCPUs that stopped by themselves since `start()`, with the reason."""

    @abstractmethod
    def close(self) -> None:
        """Destroy the VM, or let go of one that somebody else owns."""

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_machine(machine: Machine, arch: Arch) -> None:
    """Raises: UsageError for a machine that no VM of a host of this architecture can be."""
    if machine.arch != arch:
        raise UsageError(f"a {machine.arch.label} machine on a {arch.label} host")
    if machine.vcpus < 1:
        raise UsageError(f"a machine of {machine.vcpus} vCPUs: it needs at least one")


def no_memory(region: MemoryRegion, number: int) -> BackendError:
    """The error of a region that could not be mapped, with the errno."""
    return BackendError("mmap", errno=number, register=f"{region.guest_address:#x}",
                        what=f"{errno_name(number)}: no {region.size} bytes for guest RAM here; ask for less memory")


def check_startable(vcpus: int) -> None:
    """Raises: UsageError where no vCPU was created that could run."""
    if not vcpus:
        raise UsageError("there is no vCPU to run: create_vcpus() first")


class Backend(ABC):
    """A host that can make VMs."""

    name: str
    arch: Arch
    stopwatch: Stopwatch = WALL
    """What the time of its VMs' primitives is taken with."""

    @abstractmethod
    def profile(self) -> HostProfile:
        """What this host offers, asked without making a VM."""

    def know(self, profile: HostProfile) -> None:
        """Take the scopes that were found by experiment on this host, as `migstream host capture` records them.

        Raises: UsageError where the profile is of another kernel or CPU: scope is the kernel's doing.
        """
        raise UsageError(f"{self.name}: a simulator is its profile; a captured one is for real KVM")

    @abstractmethod
    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> Vm:
        """Make a VM with memory and interrupt chips, without vCPUs. Raises: BackendError, UsageError.

        Args:
            enabled_caps: KVM_ENABLE_CAP on the VM before its vCPUs: capability number to up to four arguments.
        """

    def behaviour(self) -> Behaviour:
        """What this host's kernel behaves as where it has no register; what can't be found out is named in it."""
        from migstream.host.behaviour import of_profile

        return of_profile(self.profile())

    def summary(self) -> HostSummary:
        """Who saved, for the stream."""
        profile = self.profile()
        return HostSummary(profile.kernel, profile.cpu, self.name)
