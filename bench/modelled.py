"""Blackouts of a simulated kernel: modelled time (`bench.model`), and how many registers each strategy writes.

Nothing here is measured. The model knows ioctls, threads and the VM-wide lock; encoding and decoding are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.model import layouts_of, predict, spared_by_library
from bench.strategies import PART_OF, PHASES, STRATEGIES, Sample, Strategy
from bench.subjects import Subject
from migstream.backends.sim.costs import Calibration
from migstream.host.profile import HostProfile
from migstream.model import Layout, Phase, Scope
from migstream.registers import x86_64


class Modelled(Subject):
    """One strategy on a kernel that is known by its profile."""

    rounds = 1

    def __init__(self, host: HostProfile | Sequence[Layout], calibration: Calibration, strategy: Strategy,
                 threads: int, spared: Mapping[str, frozenset[int]] | None = None) -> None:
        self.layouts = layouts_of(host) if isinstance(host, HostProfile) else tuple(host)
        self.host, self.calibration, self.strategy = host, calibration, strategy
        self._spared = spared or {}
        self.name, self.threads, self.most_vcpus = strategy.name, threads if strategy.threads else 1, 1 << 20

    def sample(self, vcpus: int) -> dict[str, Any]:
        """The model's times, ns, in the parts of a measured sample."""
        found = predict(self.name, vcpus, self.threads, self.calibration, self.host, spared=self._spared)
        out = Sample(phases=dict.fromkeys(PHASES, 0))
        for name, ns in found.items():
            verb, _, phase = name.partition(" ")
            out.phases["read registers" if verb == "save" else PART_OF[phase]] += round(ns)
        out.save = out.phases["read registers"]
        out.total = sum(out.phases.values())
        out.load = out.total - out.save
        count_writes(out, self.layouts, self.strategy, vcpus)
        return out.document()


def count_writes(sample: Sample, layouts: Sequence[Layout], strategy: Strategy, vcpus: int) -> None:
    """Fill in how many register writes a restore does in the pause, and before it."""
    for layout, registers in _written(layouts):
        once = layout.scope == Scope.VM and (not strategy.per_vcpu or layout.phase == Phase.CREATE)
        writes = registers * (1 if once else vcpus)
        if strategy.early and layout.phase.prologue:
            sample.early_writes += writes
        elif layout.scope == Scope.VM:
            sample.vm_writes += writes
        else:
            sample.vcpu_writes += writes


def _written(layouts: Sequence[Layout]) -> Iterator[tuple[Layout, int]]:
    """Each layout with the number of its registers that a restore writes."""
    for layout in layouts:
        yield layout, sum(slot.id != x86_64.TSC_OFFSET.id for slot in layout.slots)


def beside_measured(document: dict[str, Any], layouts: Sequence[Layout], calibration: Calibration,
                    capabilities: Mapping[str, int]) -> dict[str, Any]:
    """What the model says at every measured point, for the parts that it has; with its error. Times in ns."""
    threads, out = document["options"]["threads"], {}
    for name, curve in document["curves"].items():
        if name in STRATEGIES:
            spared = spared_by_library(name, capabilities)
            model = Modelled(layouts, calibration, STRATEGIES[name], threads, spared)
            out[name] = [_against(at, model.sample(at["vcpus"])) for at in curve["points"]]
    errors = sorted(abs(at["error"]) for points in out.values() for at in points)
    return {"calibration": {"machine": dict(calibration.machine), "method": calibration.method},
            "curves": out, "median_error": errors[len(errors) // 2] if errors else None,
            "worst_error": errors[-1] if errors else None}


def _against(at: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    measured = sum(at["phases"][name] for name in KNOWN_PARTS)
    return {"vcpus": at["vcpus"], "modelled": sample["total"], "measured": measured,
            "error": sample["total"] / measured - 1}


KNOWN_PARTS = ("read registers", "CPUID and features", "vCPU registers", "VM registers")
"""Parts of a blackout that the model has: those that are ioctls."""
