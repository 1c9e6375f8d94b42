"""The state of one simulated VM: a matrix for each register, vCPU by 64-bit word.

Columnar on purpose: reading or writing a register of all vCPUs is one numpy operation, however many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.clock import GuestClock, HostClock
from migstream.model import Machine, Scope
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from migstream.host.profile import HostProfile
    from migstream.model import Words

    Mask = NDArray[np.bool_]
    Reset = Callable[["Guest", NDArray[np.uint64], Words], None]


class Guest:
    """Registers of a VM on a kernel that a profile describes.

    Attributes:
        profile: the kernel. machine: what was created. vcpus: how many there are by now.
        ran: whether a vCPU has ever run, one element each. has_cpuid: whether it was given a table, be it empty.
        deadline: whether its APIC timer is in TSC-deadline mode, which KVM_SET_LAPIC alone looks up.
        told: capabilities enabled, with their arguments.
        clock: the VM's kvmclock. tsc_offsets: what is added to the host's TSC, ticks, one element a vCPU.
    """

    def __init__(self, profile: HostProfile, machine: Machine, host: HostClock, resets: Mapping[int, Reset]) -> None:
        self.profile, self.machine = profile, machine
        self.vcpus = 0
        self.ran: Mask = np.zeros(0, np.bool_)
        self.has_cpuid: Mask = np.zeros(0, np.bool_)
        self.deadline: Mask = np.zeros(0, np.bool_)
        self.told: dict[int, tuple[int, ...]] = {}
        self.clock = GuestClock(host)
        self.tsc_offsets = np.zeros(0, np.uint64)
        self._resets = resets
        self._columns: dict[int, Words] = {}

    def add_vcpus(self, count: int) -> None:
        """Make room for more vCPUs, with the values of a vCPU that never ran."""
        numbers = np.arange(self.vcpus, self.vcpus + count, dtype=np.uint64)
        for id, column in self._columns.items():
            if lookup(id).scope == Scope.VCPU:
                self._columns[id] = np.vstack([column, self._fresh(id, numbers)])
        self.vcpus += count
        self.ran = np.append(self.ran, np.zeros(count, np.bool_))
        self.has_cpuid = np.append(self.has_cpuid, np.zeros(count, np.bool_))
        self.deadline = np.append(self.deadline, np.zeros(count, np.bool_))
        self.tsc_offsets = np.append(self.tsc_offsets, np.zeros(count, np.uint64))

    def has(self, device: str) -> bool:
        """Whether the VM was made with a device."""
        return bool(self.machine.devices.get(device))

    def column(self, id: int) -> Words:
        """The matrix of a register: one row a vCPU, or one row for what the VM has once."""
        if id not in self._columns:
            once = lookup(id).scope == Scope.VM
            self._columns[id] = self._fresh(id, np.arange(1 if once else self.vcpus, dtype=np.uint64))
        return self._columns[id]

    def widen(self, id: int, words: int) -> None:
        """Make a register's column at least this wide; new words are zero."""
        column = self.column(id)
        if column.shape[1] < words:
            self._columns[id] = np.pad(column, ((0, 0), (0, words - column.shape[1])))

    def _fresh(self, id: int, numbers: NDArray[np.uint64]) -> Words:
        default = _initial(self.profile, id)
        row = np.frombuffer(default.ljust(-(-len(default) // 8) * 8, b"\0"), np.uint64)
        rows = np.repeat(row[np.newaxis], len(numbers), axis=0)
        if reset := self._resets.get(id):
            reset(self, numbers, rows)
        return rows


_ARCH_CAPABILITIES = 0x10A
"""A vCPU has the host's from the start, seen or not (kvm_arch_vcpu_create); the probe asked one without CPUID."""


def _initial(profile: HostProfile, id: int) -> bytes:
    """The register on vCPU 0 before its first run; kvm_sregs2 from kvm_sregs on a kernel that has only that."""
    if id == x86_64.SREGS2.id and id not in profile.defaults:
        return profile.defaults[x86_64.SREGS.id][:280].ljust(320, b"\0")
    if id == x86_64.CPUID2.id:  # a vCPU has no table before KVM_SET_CPUID2, whatever its count said when it was asked
        return bytes(8)
    if id == ids.msr_id(_ARCH_CAPABILITIES) and _ARCH_CAPABILITIES in profile.feature_msrs:
        return profile.feature_msrs[_ARCH_CAPABILITIES].to_bytes(8, "little")
    return profile.defaults.get(id) or bytes(lookup(id).size or 8)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some vCPUs of a guest: what a rule is given to look at and to change.

    Attributes:
        index: which rows of the columns, as numpy takes it. numbers: the vCPUs' indices.
    """

    guest: Guest
    index: slice | NDArray[np.intp]
    numbers: NDArray[np.intp]

    @classmethod
    def span(cls, guest: Guest, first: int, count: int) -> Rows:
        """Consecutive vCPUs; the first alone stands for the VM."""
        return cls(guest, slice(first, first + count), np.arange(first, first + count))

    def where(self, chosen: Mask) -> Rows:
        """The chosen of these rows; the object itself where that is all."""
        return self if chosen.all() else Rows(self.guest, self.numbers[chosen], self.numbers[chosen])

    def get(self, id: int) -> Words:
        """The rows' values of another register; to be read only."""
        column = self.guest.column(id)
        if lookup(id).scope == Scope.VM:
            return np.broadcast_to(column, (len(self.numbers), column.shape[1]))
        return column[self.index]

    def put(self, id: int, values: Words) -> None:
        """Store whole values. What the VM has once keeps the last row's: KVM was told in this order."""
        column = self.guest.column(id)
        words = min(column.shape[1], values.shape[1])
        if lookup(id).scope == Scope.VM:
            column[0, :words] = values[-1, :words]
        else:
            column[self.index, :words] = values[:, :words]
