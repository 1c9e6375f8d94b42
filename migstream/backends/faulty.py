"""Faults on purpose: any primitive of any backend fails, is slow, answers short, or lies, at its n-th use.

A wrapper around a backend and its VMs, real or simulated. One fault at a time, so that what comes of it can be said.
Uses are counted over the backend's life; a use of `read` and `write` that names a register is one that carries it.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from migstream.backends.base import SHORT_COUNT, Backend, Refusal, Vm
from migstream.errors import BackendError, UsageError
from migstream.model import Layout, Machine, Scope
from migstream.registers import arm64, ids, x86_64
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile
    from migstream.model import Words


class Kind(StrEnum):
    """What goes wrong."""

    ERRNO = "errno"  # the primitive raises; one register of a read or write: it is refused and left alone
    SLOW = "slow"    # it works, later
    SHORT = "short"  # a register of a read or write is refused without an errno, as a short count of MSRs does
    LIE = "lie"      # a register is read with its lowest bit inverted, or said to be written and left alone


PRIMITIVES = ("profile", "create", "create_vcpus", "layouts", "read", "write", "start", "pause", "enter", "exits")
"""What may fail. `close` may not: nobody could do anything about it."""

REGISTER_KINDS = (Kind.ERRNO, Kind.SHORT, Kind.LIE)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        primitive: of PRIMITIVES. kind: what happens. nth: at which use, from 1 on.
        register: id: of one register alone, and uses that carry it are counted. vcpu: its row, None for the VM's.
        errno: for Kind.ERRNO. delay: seconds, for Kind.SLOW.
    """

    primitive: str
    kind: Kind
    nth: int = 1
    register: int | None = None
    vcpu: int | None = None
    errno: int = errno.EIO
    delay: float = 0.05

    def __post_init__(self) -> None:
        if self.primitive not in PRIMITIVES:
            raise UsageError(f"no primitive {self.primitive!r}: {', '.join(PRIMITIVES)}")
        if self.register is None and self.kind in (Kind.SHORT, Kind.LIE):
            raise UsageError(f"a {self.kind} fault is one of a register")
        if self.register is not None and self.primitive not in ("read", "write"):
            raise UsageError(f"{self.primitive} has no registers")

    def __str__(self) -> str:
        what = self.primitive if self.register is None else f"{self.primitive}:{lookup(self.register).name}"
        where = "" if self.vcpu is None else f"@{self.vcpu}"
        how = errno.errorcode.get(self.errno, str(self.errno)) if self.kind == Kind.ERRNO else self.kind
        return f"{what}{where}#{self.nth}={how}"


@dataclass
class Switch:
    """Counts uses and says when the fault is due. Shared by a backend and its VMs.

    Attributes:
        happened: whether it was. uses: by primitive; layouts: of each read and write, with first vCPU and rows.
        open_vms: VMs that were made and not closed.
    """

    fault: Fault | None
    sleep: Callable[[float], object] = time.sleep
    happened: bool = False
    uses: dict[str, int] = field(default_factory=dict)
    carried: int = 0
    layouts: list[tuple[str, Layout, int, int]] = field(default_factory=list)
    open_vms: int = 0

    def use(self, primitive: str) -> None:
        """A use of a primitive as a whole. Raises: BackendError where that is the fault."""
        self.uses[primitive] = self.uses.get(primitive, 0) + 1
        fault = self.fault
        if fault is None or fault.register is not None or fault.primitive != primitive:
            return
        if fault.nth != self.uses[primitive]:
            return
        self.happened = True
        if fault.kind == Kind.ERRNO:
            raise BackendError(primitive, errno=fault.errno)
        self.sleep(fault.delay)

    def register_fault(self, primitive: str, layout: Layout, first: int, rows: int) -> tuple[Fault, int] | None:
        """The fault and the row of the matrix that it is in, where it is due in this read or write."""
        self.layouts.append((primitive, layout, first, rows))
        fault = self.fault
        if fault is None or fault.primitive != primitive or fault.register not in layout.index:
            return None
        row = (fault.vcpu or 0) - first if layout.scope == Scope.VCPU else 0
        if not 0 <= row < rows:
            return None
        self.carried += 1
        if self.carried != fault.nth:
            return None
        self.happened = True
        if fault.kind == Kind.SLOW:
            self.sleep(fault.delay)
            return None
        return fault, row


class FaultyVm(Vm):
    """A VM whose primitives fail as they are told to; everything else is the VM's that it wraps, which it owns."""

    def __init__(self, vm: Vm, switch: Switch) -> None:
        self._vm, self._switch = vm, switch
        self.machine, self.memory, self.stopwatch = vm.machine, vm.memory, vm.stopwatch
        self._open = True
        switch.open_vms += 1

    def create_vcpus(self) -> None:
        """See `Vm.create_vcpus`."""
        self._switch.use("create_vcpus")
        self._vm.create_vcpus()

    def layouts(self) -> tuple[tuple[Layout, ...], list[Refusal]]:
        """See `Vm.layouts`."""
        self._switch.use("layouts")
        return self._vm.layouts()

    def read(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.read`."""
        self._switch.use("read")
        refused = self._vm.read(layout, first_vcpu, values)
        due = self._switch.register_fault("read", layout, first_vcpu, len(values))
        if due is None:
            return refused
        fault, row = due
        cells = _cells(layout, fault)
        if fault.kind == Kind.LIE:
            values[row, cells.start] ^= 1
            return refused
        values[row, cells] = 0
        return [*refused, _refusal(layout, fault, first_vcpu + row)]

    def write(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.write`."""
        self._switch.use("write")
        due = self._switch.register_fault("write", layout, first_vcpu, len(values))
        if due is None:
            return self._vm.write(layout, first_vcpu, values)
        fault, row = due
        refused = self._vm.write(layout, first_vcpu, values[:row].copy()) if row else []
        refused += self._without(layout, _cells(layout, fault), first_vcpu + row, values[row:row + 1], fault)
        if row + 1 < len(values):
            refused += self._vm.write(layout, first_vcpu + row + 1, values[row + 1:].copy())
        return refused if fault.kind == Kind.LIE else [*refused, _refusal(layout, fault, first_vcpu + row)]

    def _without(self, layout: Layout, cells: slice, vcpu: int, row: Words, fault: Fault) -> list[Refusal]:
        """Write a row without one of its columns."""
        import numpy as np

        slots = tuple(slot for slot in layout.slots if slot.id != fault.register)
        if not slots:
            return []
        rest = np.delete(row, np.r_[cells], axis=1)
        return self._vm.write(replace(layout, slots=slots), vcpu, np.ascontiguousarray(rest))

    def prepare(self, layouts: Sequence[Layout]) -> None:
        """See `Vm.prepare`."""
        self._vm.prepare(layouts)

    def take_stock(self, layouts: Sequence[Layout]) -> dict[Layout, Words]:
        """See `Vm.take_stock`. Nothing depends on it being done, so nothing fails."""
        return self._vm.take_stock(layouts)

    def warm(self, layouts: Sequence[Layout] = ()) -> None:
        """See `Vm.warm`."""
        self._vm.warm(layouts)

    def start(self) -> None:
        """See `Vm.start`."""
        self._switch.use("start")
        self._vm.start()

    def pause(self) -> None:
        """See `Vm.pause`."""
        self._switch.use("pause")
        self._vm.pause()

    def enter(self, vcpu: int) -> None:
        """See `Vm.enter`."""
        self._switch.use("enter")
        self._vm.enter(vcpu)

    def exits(self) -> dict[int, str]:
        """See `Vm.exits`."""
        self._switch.use("exits")
        return self._vm.exits()

    def close(self) -> None:
        """See `Vm.close`; never fails."""
        if self._open:
            self._open = False
            self._switch.open_vms -= 1
        self._vm.close()


def _cells(layout: Layout, fault: Fault) -> slice:
    assert fault.register is not None
    column = layout.index[fault.register]
    return slice(layout.offsets[column], layout.offsets[column + 1])


def _refusal(layout: Layout, fault: Fault, vcpu: int) -> Refusal:
    assert fault.register is not None
    number = SHORT_COUNT if fault.kind == Kind.SHORT else fault.errno
    return Refusal(fault.register, vcpu if layout.scope == Scope.VCPU else None, f"{fault.primitive} (a fault)", number)


class FaultyBackend(Backend):
    """A backend with one fault.

    Attributes:
        switch: what was used and whether the fault has happened.
    """

    def __init__(self, backend: Backend, fault: Fault | None = None, *,
                 sleep: Callable[[float], object] = time.sleep) -> None:
        """Wrap a backend, which stays the caller's; without a fault uses are only counted."""
        self._backend, self.switch = backend, Switch(fault, sleep)
        self.name, self.arch, self.stopwatch = backend.name, backend.arch, backend.stopwatch

    def profile(self) -> HostProfile:
        """See `Backend.profile`."""
        self.switch.use("profile")
        return self._backend.profile()

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> FaultyVm:
        """See `Backend.create`."""
        self.switch.use("create")
        return FaultyVm(self._backend.create(machine, enabled_caps), self.switch)

    def check(self) -> None:
        """Raises: UsageError where the fault has not happened: whatever came out says nothing about it."""
        if self.switch.fault is not None and not self.switch.happened:
            raise UsageError(f"the fault {self.switch.fault} did not happen: there was no such use")


def every_fault(seen: Switch) -> list[Fault]:
    """All single faults of what a run without a fault did: primitive x use x kind, down to each register of each row.

    A VM-scoped register has one row; of vCPUs, each has its own.
    """
    whole = [Fault(primitive, kind, nth) for primitive, uses in seen.uses.items() for nth in range(1, uses + 1)
             for kind in (Kind.ERRNO, Kind.SLOW)]
    counts: dict[tuple[str, int, int | None], int] = {}
    for primitive, layout, first, rows in seen.layouts:
        vcpus: Sequence[int | None] = range(first, first + rows) if layout.scope == Scope.VCPU else (None,)
        for slot in layout.slots:
            for vcpu in vcpus:
                counts[primitive, slot.id, vcpu] = counts.get((primitive, slot.id, vcpu), 0) + 1
    named = [Fault(primitive, kind, nth, register, vcpu) for (primitive, register, vcpu), uses in counts.items()
             for nth in range(1, uses + 1) for kind in REGISTER_KINDS]
    return whole + named


_TEXT = re.compile(r"(?P<primitive>\w+)(:(?P<register>[^@#=]+))?(@(?P<vcpu>\d+))?(#(?P<nth>[1-9]\d*))?=(?P<how>\w+)")


def parse(text: str, profile: HostProfile) -> Fault:
    """Read `PRIMITIVE[:REGISTER[@VCPU]][#NTH]=ERRNO|slow|short|lie`, as `str()` of a fault writes it.

    Args:
        profile: the host whose registers can be named. Raises: UsageError.
    """
    match = _TEXT.fullmatch(text)
    numbers = {name: number for number, name in errno.errorcode.items()}
    if match is None or match["how"] not in (*numbers, "slow", "short", "lie"):
        raise UsageError(f"--fault {text!r}: PRIMITIVE[:REGISTER[@VCPU]][#NTH]=ERRNO|slow|short|lie")
    kind = Kind.ERRNO if match["how"] in numbers else Kind(match["how"])
    return Fault(match["primitive"], kind, int(match["nth"] or 1), _register(match["register"], profile),
                 None if match["vcpu"] is None else int(match["vcpu"]), numbers.get(match["how"], errno.EIO))


def _register(name: str | None, profile: HostProfile) -> int | None:
    if name is None:
        return None
    known = (*profile.registers, *map(ids.msr_id, (*profile.msrs, *profile.feature_msrs)),
             *(row.id for row in (*x86_64.ROWS, *arm64.ROWS)))
    for id in known:
        if lookup(id).name == name:
            return id
    raise UsageError(f"no register {name!r} on {profile.kernel}")
