"""`python -m bench model`: the model against real KVM, point by point, with its error.

What is measured are whole saves and restores on fresh VMs, interleaved, at vCPU counts that the calibration was not
made at: by the C program of `bench.native`, without a clock inside; and by the library itself, those parts of a
blackout that are ioctls. The model gets nothing from these runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from bench import native, strategies
from bench.calibrate import cpus, kvm
from bench.measure import machine
from bench.model import STRATEGIES, load_calibration, predict, spared_by_library, title
from bench.modelled import KNOWN_PARTS
from bench.options import number_of_rounds
from bench.program import LeftOut
from bench.restores import Guest, Ioctls, fresh_vm, restores, saved_guest, saves, split
from bench.subjects import Library
from migstream.backends.kvm.backend import KvmBackend
from migstream.backends.sim.costs import Calibration
from migstream.errors import UsageError
from migstream.model import Layout
from migstream.show import Table, milliseconds, print_pairs, print_table

CHECKED = tuple(1 << k for k in range(10))
"""vCPU counts."""

STRATEGY_THREADS = (("per-vCPU", 1), ("per-vCPU", 2), ("scoped", 1), ("scoped", 2), ("prologue", 1),
                    ("prologue+threads", 2))
"""What is compared; a strategy without threads of its own is looked at with two, too."""

LIBRARY = tuple(strategies.STRATEGIES)
"""The library's own; `prologue+threads` with two."""

C, OURS = "C", "library"
"""Who saved and restored."""

Times = dict[tuple[int, int, bool], dict[str, list[int]]]
"""By vCPUs, threads, VM-scoped once a vCPU: ns of each phase, a round each."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One point: ns of the model and of real KVM (median and least of the rounds), and by whom: C or OURS."""

    who: str
    strategy: str
    threads: int
    vcpus: int
    modelled: float
    measured: float
    fastest: float

    @property
    def error(self) -> float:
        """Of the model, as a part of what was measured."""
        return self.modelled / self.measured - 1


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=number_of_rounds, default=11, help="interleaved rounds")
    parser.add_argument("--backend", default="auto", help="kvm, or auto, which must be it")
    parser.add_argument("--calibration", metavar="FILE", help="the calibration to check (the simulator's)")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """See `measure`."""
    return measure(options.rounds, options.backend, tell, load_calibration(options.calibration))


def measure(rounds: int, backend_name: str, tell: Callable[[str], None],
            calibration: Calibration | None = None) -> dict[str, Any]:
    """Measure, predict and return the document that `--json` prints."""
    calibration = calibration or load_calibration()
    backend = kvm(backend_name)
    _same_machine(calibration)
    tell(f"saving a guest of {max(CHECKED)} vCPUs mid-run")
    guest = saved_guest(backend, max(CHECKED))
    layouts = tuple(layout for layout, _ in guest.banks)
    points, left_out = [], []
    try:
        times = _times(backend, guest, rounds, tell)
        points = [_compare(strategy, threads, vcpus, times, layouts, calibration)
                  for strategy, threads in STRATEGY_THREADS if threads <= cpus() for vcpus in CHECKED]
    except LeftOut as reason:
        left_out.append(str(reason))
    ours = _library_times(backend, rounds, tell)
    capabilities = backend.profile().capabilities
    points += [_against_library(name, threads, vcpus, samples, layouts, calibration,
                                spared_by_library(name, capabilities))
               for (name, threads, vcpus), samples in ours.items()]
    return {"machine": {**machine(), "cpus": cpus()}, "calibration": dict(calibration.machine), "rounds": rounds,
            "points": [{**asdict(point), "error": point.error} for point in points], "error": _errors(points),
            "left_out": left_out}


def _same_machine(calibration: Calibration) -> None:
    here = machine()
    for name in ("cpu", "kernel"):
        if calibration.machine.get(name) != here[name]:
            raise UsageError(f"the calibration is of another machine ({name} {calibration.machine.get(name)!r}, here "
                             f"{here[name]!r}): run `python -m bench calibrate -o FILE` and give --calibration FILE")
    if same := set(calibration.points) & set(CHECKED):
        raise UsageError(f"{min(same)} vCPUs are a point of the calibration: to check it there says nothing")


def _times(backend: KvmBackend, guest: Guest, rounds: int, tell: Callable[[str], None]) -> Times:
    times: Times = {}
    for number in range(rounds):
        for vcpus in CHECKED:
            tell(f"round {number + 1} of {rounds}: {vcpus} vCPUs")
            for threads in (1, 2)[:cpus()]:
                for per_vcpu in (False, True):
                    phases = times.setdefault((vcpus, threads, per_vcpu), {})
                    for name, ns in _run(backend, guest.first(vcpus), vcpus, threads, per_vcpu):
                        phases.setdefault(name, []).append(ns)
    return times


def _run(backend: KvmBackend, guest: Guest, vcpus: int, threads: int, per_vcpu: bool) -> Iterator[tuple[str, int]]:
    with fresh_vm(backend, vcpus) as vm:
        for verb, todo in (("restore", restores(vm, guest, per_vcpu=per_vcpu)),
                           ("save", saves(vm, guest, per_vcpu=per_vcpu))):
            for one in todo:
                yield f"{verb} {title(one.layout)}", native.run_parts(_parts(one, threads))


def _library_times(backend: KvmBackend, rounds: int, tell: Callable[[str], None]) -> dict[Any, list[int]]:
    """By strategy, threads and vCPUs: ns of all the parts that are ioctls, a round each."""
    samples: dict[Any, list[int]] = {}
    with ExitStack() as stack:
        sources = {vcpus: stack.enter_context(strategies.source_vm(backend, vcpus)) for vcpus in CHECKED}
        kinds = [(name, 2 if strategies.STRATEGIES[name].threads else 1) for name in LIBRARY]
        for number in range(rounds):
            tell(f"the library's own: round {number + 1} of {rounds}")
            for vcpus, (name, threads) in product(CHECKED, [kind for kind in kinds if kind[1] <= cpus()]):
                subject = Library(backend, sources, strategies.STRATEGIES[name], threads)
                phases = subject.sample(vcpus)["phases"]
                samples.setdefault((name, threads, vcpus), []).append(sum(phases[part] for part in KNOWN_PARTS))
    return samples


def _against_library(strategy: str, threads: int, vcpus: int, samples: list[int], layouts: tuple[Layout, ...],
                     calibration: Calibration, spared: Mapping[str, frozenset[int]]) -> Compared:
    modelled = sum(predict(strategy, vcpus, threads, calibration, layouts, spared=spared).values())
    return Compared(OURS, strategy, threads, vcpus, modelled, statistics.median(samples), min(samples))


def _parts(one: Ioctls, threads: int) -> list[Any]:
    return split(one.calls, threads)


def _compare(strategy: str, threads: int, vcpus: int, times: Times, layouts: tuple[Layout, ...],
             calibration: Calibration) -> Compared:
    modelled = predict(strategy, vcpus, threads, calibration, layouts)
    phases = times[vcpus, threads, STRATEGIES[strategy].each_vcpu]
    whole = [sum(samples) for samples in zip(*(phases[name] for name in modelled), strict=True)]
    return Compared(C, strategy, threads, vcpus, sum(modelled.values()), statistics.median(whole), min(whole))


def _errors(points: list[Compared]) -> dict[str, dict[str, float]]:
    """Median and worst of the absolute error, by who saved and restored and by number of threads; and over vCPUs."""
    kinds = sorted({(p.who, p.threads) for p in points})
    groups = {f"{who}, {threads} thread{'s' * (threads > 1)}": [p for p in points if p.who == who
                                                                and p.threads == threads] for who, threads in kinds}
    groups |= {f"{who}, {few} to {many} vCPUs": [p for p in points if p.who == who and few <= p.vcpus <= many]
               for who in (C, OURS) for few, many in ((1, 4), (8, 32), (64, 512))}
    groups |= {f"{who}, all": [p for p in points if p.who == who] for who in (C, OURS)}
    return {name: {"median": statistics.median(abs(p.error) for p in group), "worst": max(abs(p.error) for p in group)}
            for name, group in {**groups, "all": points}.items() if group}


def print_result(result: dict[str, Any]) -> None:
    """The document as tables."""
    print_pairs([("model", f"against real KVM: median of {result['rounds']} rounds, the model's error behind it; "
                           f"{result['machine']['cpu']}, {result['machine']['cpus']} CPUs, "
                           f"Linux {result['machine']['kernel']}"),
                 *(("left out", reason) for reason in result["left_out"])])
    for who, what in ((C, "C ioctls"), (OURS, "the library, without codec and planning")):
        if points := [point for point in result["points"] if point["who"] == who]:
            print_pairs([(who, what)])
            print_table(_points_table(points))
    print_table(Table(("error of the model", ">median", ">worst"), [
        (name, f"{error['median']:.1%}", f"{error['worst']:.1%}") for name, error in result["error"].items()]))


def _points_table(found: list[dict[str, Any]]) -> Table:
    points = {(p["strategy"], p["threads"], p["vcpus"]): p for p in found}
    kinds = list(dict.fromkeys(place[:2] for place in points))
    titles = [f">{strategy}, {threads}" for strategy, threads in kinds]
    return Table((">vCPUs", *titles), [
        (str(vcpus), *(_cell(points[*kind, vcpus]) for kind in kinds)) for vcpus in CHECKED])


def _cell(point: dict[str, Any]) -> str:
    return f"{milliseconds(int(point['measured']))} {point['error']:+.0%}"
