"""`python -m bench calibrate [-o FILE]`: what each ioctl of a save and restore costs on this machine's KVM.

Whole saves and restores are run by a C program, a fresh VM each time, every ioctl timed: at several vCPU counts, with
one and two threads, VM-scoped state once and once a vCPU, interleaved. Each ioctl gets the cost that fits the medians
best (least squares of the relative error): a constant, a part per vCPU of the VM, a part per register of an MSR batch,
and what the first use by a thread costs more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench import native
from bench.measure import machine
from bench.options import number_of_rounds
from bench.restores import Guest, Ioctls, fresh_vm, ioctls, restores, saved_guest, saves, split
from migstream.backends import open_backend
from migstream.backends.kvm import uapi
from migstream.backends.kvm.backend import KvmBackend, KvmVm
from migstream.backends.sim.costs import Calibration, Cost
from migstream.errors import BackendUnavailable
from migstream.model import Layout, Phase, Scope
from migstream.registers import ids
from migstream.show import Table, print_pairs, print_table
from migstream.transport import open_output

POINTS = (3, 5, 6, 12, 24, 48, 96, 192, 384)
"""vCPU counts; the model is checked at others."""

BATCHES = (1, 4, 16)
"""Registers of the MSR batches that are measured beside the whole one."""

BATCH_POINT = 48
LSTAR = 0xC000_0082
SERIAL = 1.5
"""A VM ioctl that takes so many times longer beside another thread's has a lock that the other one waits for."""

LOCKED = "a row of interrupt chips, from start to end"
"""Name of the samples of a whole row, in which the IOAPIC's lock is all that two threads wait for."""

METHOD = ("whole saves and restores by a C program with pinned threads, every ioctl timed, fresh VMs, interleaved; "
          "least squares of the relative error on medians")


@dataclass(frozen=True, slots=True)
class Sample:
    """The mean time of one kind of ioctl in one run.

    Attributes:
        name: as in a calibration. vcpus: of the VM. rows: how often a thread did it. registers: of a batch.
        threads: at the same time. ns: mean of one.
    """

    name: str
    vcpus: int
    rows: float
    registers: int
    threads: int
    ns: float


def kvm(name: str) -> KvmBackend:
    """Real KVM. Raises: BackendUnavailable: nothing else has a cost worth modelling."""
    if name not in ("auto", "kvm"):
        raise BackendUnavailable(f"--backend {name}: costs are measured on real KVM; a simulated time is no cost")
    backend = open_backend("kvm")
    assert isinstance(backend, KvmBackend)
    return backend


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=number_of_rounds, default=11, help="interleaved rounds")
    parser.add_argument("--backend", default="auto", help="kvm, or auto, which must be it")
    parser.add_argument("-o", dest="output", metavar="FILE", help="write the calibration to FILE")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """See `measure`; with -o the file is there when everything was measured, else it is as it was."""
    if not options.output:
        return measure(options.rounds, options.backend, tell)
    with open_output(options.output) as file:  # opened before minutes of measuring, not after
        result = measure(options.rounds, options.backend, tell)
        file.write((json.dumps(result["calibration"], indent=1) + "\n").encode())
    return result


def measure(rounds: int, backend_name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Calibrate and return the document that `--json` prints."""
    backend = kvm(backend_name)
    native.library()
    tell(f"saving a guest of {max(POINTS)} vCPUs mid-run")
    guest = saved_guest(backend, max(POINTS))
    samples = [sample for number in range(rounds) for vcpus in POINTS
               for sample in _round(backend, guest.first(vcpus), vcpus, tell, f"round {number + 1} of {rounds}")]
    calibration = fit(samples, {**machine(), "cpus": cpus()})
    return {"calibration": json.loads(calibration.to_json()), "rounds": rounds}


def _round(backend: KvmBackend, guest: Guest, vcpus: int, tell: Callable[[str], None], where: str) -> Iterator[Sample]:
    tell(f"{where}: {vcpus} vCPUs")
    for threads in (1, 2)[:cpus()]:
        for per_vcpu in (False, True):
            with fresh_vm(backend, vcpus) as vm:
                for todo in (*restores(vm, guest, per_vcpu=per_vcpu), *saves(vm, guest, per_vcpu=per_vcpu)):
                    yield from _timed(todo, vcpus, threads)
    if vcpus == BATCH_POINT:
        with fresh_vm(backend, vcpus) as vm:
            for todo in (*restores(vm, guest), *_batches(vm, guest)):
                yield from _timed(todo, vcpus, 1)


def _batches(vm: KvmVm, guest: Guest) -> Iterator[Ioctls]:
    """Parts of the MSR batch, and one MSR by KVM_SET_ONE_REG where this kernel has it."""
    layout, values = next(bank for bank in guest.banks
                          if (bank[0].scope, bank[0].phase) == (Scope.VCPU, Phase.STATE))
    at = [column for column, slot in enumerate(layout.slots) if ids.msr_index(slot.id) is not None]
    for verb in ("set", "get"):
        for count in BATCHES:
            start = layout.offsets[at[0]]
            part = np.ascontiguousarray(values[:, start:start + count])
            yield ioctls(vm, Layout(layout.scope, layout.phase, layout.slots[at[0]:at[0] + count]), part, 1, verb)
        if vm.backend.profile().capabilities["ONE_REG"]:
            yield _one_reg(vm, layout, values[:, layout.offsets[layout.index[ids.msr_id(LSTAR)]]].copy(), verb)


def _one_reg(vm: KvmVm, layout: Layout, values: np.ndarray[Any, Any], verb: str) -> Ioctls:
    request = uapi.GET_ONE_REG if verb == "get" else uapi.SET_ONE_REG
    arguments = [np.frombuffer(bytearray(struct.pack("<QQ", ids.msr_id(LSTAR), values.ctypes.data + 8 * k)), np.uint8)
                 for k in range(len(values))]
    calls = [[(fd, request.number, int(argument.ctypes.data))]
             for fd, argument in zip(vm.vcpu_fds, arguments, strict=True)]
    return Ioctls(layout, (f"{verb} ONE_REG",), (1,), np.array(calls, np.int64), [values, *arguments])


def _timed(todo: Ioctls, vcpus: int, threads: int) -> Iterator[Sample]:
    parts = split(todo.calls, threads)
    each = np.zeros(todo.calls.shape[0] * todo.calls.shape[1], np.int64)
    ns = native.run_parts(parts, each=each)
    means = each.reshape(todo.calls.shape[:2]).mean(axis=0)
    for name, registers, mean in zip(todo.names, todo.registers, means, strict=True):
        yield Sample(name, vcpus, len(todo.calls) / len(parts), registers, len(parts), float(mean))
    if "set KVM_IRQCHIP_IOAPIC" in todo.names:
        yield Sample(LOCKED, vcpus, len(todo.calls) / len(parts), 1, len(parts), ns / len(todo.calls))


Point = tuple[int, float, int]
"""vCPUs, rows of a thread, registers."""


def fit(samples: list[Sample], described: dict[str, Any]) -> Calibration:
    """Turn samples into a calibration."""
    medians = _medians(samples)
    costs = {name: _cost(alone) for (name, threads), alone in medians.items() if threads == 1 and name != LOCKED}
    shortest = min(cost.base for name, cost in costs.items() if name.startswith("set KVM_IRQCHIP"))
    for name, cost in costs.items():
        costs[name] = _with_threads(cost, medians[name, 1], medians.get((name, 2), {}), shortest)
    handoff = _handoff(medians.get((LOCKED, 2), {}), costs["set KVM_IRQCHIP_IOAPIC"])
    return Calibration(described, costs, handoff, METHOD, tuple(sorted({s.vcpus for s in samples})))


def _medians(samples: list[Sample]) -> dict[tuple[str, int], dict[Point, float]]:
    grouped: dict[tuple[str, int], dict[Point, list[float]]] = {}
    for s in samples:
        points = grouped.setdefault((s.name, s.threads), {})
        points.setdefault((s.vcpus, s.rows, s.registers), []).append(s.ns)
    return {key: {point: statistics.median(values) for point, values in points.items()}
            for key, points in grouped.items()}


def _cost(alone: dict[Point, float]) -> Cost:
    """Constant, per vCPU, per register, first use; a part that would be negative is nothing."""
    points = np.array([(1.0, vcpus, registers, 1 / rows) for vcpus, rows, registers in alone])
    times = np.array(list(alone.values()))
    used = [column for column in range(4) if not column or len(set(points[:, column])) > 1]
    while True:
        found, *_ = np.linalg.lstsq(points[:, used] / times[:, None], np.ones(len(times)), rcond=None)
        negative = [k for k, value in zip(used, found, strict=True) if value < 0 and k]
        if not negative:
            break
        used.remove(negative[0])
    parts = dict(zip(used, map(float, found), strict=True))
    return Cost(max(parts[0], 0.0), parts.get(1, 0.0), parts.get(2, 0.0), parts.get(3, 0.0))


def _with_threads(cost: Cost, alone: dict[Point, float], together: dict[Point, float], shortest: float) -> Cost:
    """What another thread changes: a wait for the lock, or a factor."""
    ratios = {point: ns / cost.total(point[0], point[2]) for point, ns in together.items()
              if point[0] >= 12 and point[1] > 1}
    if not ratios:
        return cost
    most = max(ratios)
    if ratios[most] > SERIAL and cost.per_vcpu * most[0] > cost.base:
        hold = max(cost.base - shortest, 0.0)
        return Cost(cost.base, cost.per_vcpu, cost.per_register, cost.first, hold)
    parallel = max(statistics.median(ratios.values()), 1.0)
    return Cost(cost.base, cost.per_vcpu, cost.per_register, cost.first, None, parallel)


def _handoff(walls: dict[Point, float], cost: Cost) -> float:
    """Of two threads that do little else one always waits for the other; what its hold does not explain."""
    left = [ns - cost.held(point[0]) for point, ns in walls.items() if point[0] >= BATCH_POINT and point[1] > 1]
    return max(statistics.median(left), 0.0) if left else 0.0


def print_result(result: dict[str, Any]) -> None:
    """The document as a table."""
    calibration = Calibration.from_json(json.dumps(result["calibration"]))
    described = calibration.machine
    print_pairs([("machine", f"{described['cpu']}, {described['cpus']} CPUs, Linux {described['kernel']}"),
                 ("measured at", f"{', '.join(map(str, calibration.points))} vCPUs, {result['rounds']} rounds"),
                 ("hand-off", f"{calibration.handoff:.0f} ns")])
    print_table(Table(("ioctl", ">ns", ">a vCPU", ">a register", ">first", "lock, or x with 2 threads"), [
        (name, f"{cost.base:,.0f}", f"{cost.per_vcpu:.2f}", f"{cost.per_register:.1f}", f"{cost.first:,.0f}",
         f"x{cost.parallel:.2f}" if cost.hold is None else f"VM-wide, from {cost.hold:.0f} ns")
        for name, cost in sorted(calibration.costs.items())]))
