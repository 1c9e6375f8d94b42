"""What a save or restore did: for people, for machines, and for whoever decides whether the guest may run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from migstream.backends.base import Refusal
from migstream.model import OpaqueState, Scope
from migstream.plan import Verdict
from migstream.registers.catalogue import lookup


@dataclass(frozen=True, slots=True)
class Difference:
    """A register that reads back differently from what was written.

    Attributes:
        register: id. vcpus: indices that differ, empty for a VM register.
        reason: why that is to be expected, "" where it is not: then something was lost.
    """

    register: int
    vcpus: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        where = "VM" if not self.vcpus else f"{len(self.vcpus)} vCPUs from {self.vcpus[0]}"
        return f"{lookup(self.register).name} ({where}): {self.reason or 'read back different, for no known reason'}"


@dataclass
class Report:
    """Filled while a save or restore goes on.

    Attributes:
        times: ns of each phase, in the order in which they began. Wall time; on the simulator it is the
            simulator's own and says nothing about KVM.
        writes: register writes (restore) or reads (save) by phase name, then by scope.
        refused: what the host refused, and why that lost nothing.
        verdicts: the plan's answers other than a plain fit.
        differs: what read back different. readback: registers compared, 0 where none were.
        bytes: of the stream. raw_bytes: of `registers` and `ram` before filter and codec; stored_bytes: after them.
        opaque: device state of the VMM's own that the stream carried, in its order (restore).
        notes: other things worth knowing, a line each.
    """

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

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to phase `name`."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0) + time.perf_counter_ns() - start

    def count(self, phase: str, scope: Scope, registers: int) -> None:
        """Add register writes or reads."""
        row = self.writes.setdefault(phase, {Scope.VM: 0, Scope.VCPU: 0})
        row[scope] += registers

    @property
    def lossy(self) -> bool:
        """True where something read back different for no known reason."""
        return any(not difference.reason for difference in self.differs)
