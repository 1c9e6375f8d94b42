"""What a save or restore did: for people, for machines, and for whoever decides whether the guest may run."""

from __future__ import annotations

from dataclasses import dataclass, field

from migstream.backends.base import MEASURED, WALL, Refusal, Stopwatch
from migstream.model import OpaqueState, Scope
from migstream.plan import Verdict
from migstream.registers.catalogue import lookup


@dataclass(frozen=True, slots=True)
class Difference:
    """A register that reads back differently from what was written.

    Attributes:
        register: id. vcpus: indices that differ, empty for a VM register.
        reason: why that is to be expected, "" where it is not: then something was lost.
        tolerated: the policy's reason for handing the VM over all the same; "" where it has none: then there is no VM.
    """

    register: int
    vcpus: tuple[int, ...]
    reason: str
    tolerated: str = ""

    def __str__(self) -> str:
        where = "VM" if not self.vcpus else f"{len(self.vcpus)} vCPUs from {self.vcpus[0]}"
        what = self.reason or "read back different, for no known reason"
        accepted = f" (tolerated: {self.tolerated})" if self.tolerated else ""
        return f"{lookup(self.register).name} ({where}): {what}{accepted}"


class _Phase:
    """A body that is timed; written out because a generator costs more than some of the bodies."""

    __slots__ = ("name", "report", "start")

    def __init__(self, report: Report, name: str) -> None:
        self.report, self.name = report, name

    def __enter__(self) -> None:
        self.start = self.report.stopwatch.now_ns()

    def __exit__(self, *_: object) -> None:
        stopwatch, times = self.report.stopwatch, self.report.times
        passed = stopwatch.now_ns() - self.start
        if passed or stopwatch.kind == MEASURED:
            times[self.name] = times.get(self.name, 0) + passed


@dataclass
class Report:
    """Filled while a save or restore goes on.

    Attributes:
        stopwatch: what the times were taken with: the backend's.
        times: ns of each phase, in the order in which they began. Of modelled time, only phases that are in the model.
        writes: register writes (restore) or reads (save) by phase name, then by scope.
        refused: what the host refused, and why that lost nothing.
        verdicts: the plan's answers other than a plain fit.
        differs: what read back different. readback: registers compared, 0 where none were.
        bytes: of the stream. raw_bytes: of `registers` and `ram` before filter and codec; stored_bytes: after them.
        opaque: device state of the VMM's own that the stream carried, in its order (restore).
        notes: other things worth knowing, a line each.
    """

    stopwatch: Stopwatch = WALL
    times: dict[str, int] = field(default_factory=dict)
    writes: dict[str, dict[Scope, int]] = field(default_factory=dict)
    refused: list[tuple[Refusal, str]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    differs: list[Difference] = field(default_factory=list)
    readback: int = 0
    bytes: int = 0
    raw_bytes: dict[str, int] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    opaque: list[OpaqueState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def phase(self, name: str) -> _Phase:
        """A context manager: adds the time of the body to phase `name`."""
        return _Phase(self, name)

    def count(self, phase: str, scope: Scope, registers: int) -> None:
        """Add register writes or reads."""
        row = self.writes.setdefault(phase, {Scope.VM: 0, Scope.VCPU: 0})
        row[scope] += registers

    def add(self, counted: Report) -> None:
        """Add the register writes of another report, which is given up."""
        for phase, row in counted.writes.items():
            known = self.writes.setdefault(phase, row)
            if known is not row:
                for scope, registers in row.items():
                    known[scope] += registers

    @property
    def lossy(self) -> bool:
        """True where something read back different for no known reason; a VM that was handed over was tolerated so."""
        return any(not difference.reason for difference in self.differs)
