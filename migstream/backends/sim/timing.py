"""What reading and writing registers costs on a calibrated machine: modelled time, never KVM's.

A bank's ioctls, their cost by `migstream.backends.sim.costs`, and the threads that share its rows. Not in it: encoding,
decoding, RAM, making a VM, starting threads. `ModelledTime` is the stopwatch of a simulated host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migstream.backends.base import MODELLED, Refusal, Stopwatch, Vm
from migstream.backends.sim.costs import Calibration, Cost, Segment, Work, elapsed
from migstream.model import Layout, Phase, Scope
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.model import Words

CALIBRATION = Path(__file__).with_name("calibration.json")
"""What `python -m bench calibrate` measured, with the description of its machine."""

PER_THREAD = 4
"""Rows for each of the threads that a backend takes when it is not told."""


@dataclass(frozen=True, slots=True)
class Use:
    """A primitive and how many registers it carries."""

    cost: Cost
    registers: int


def work(layout: Layout, verb: str, vcpus: int, rows: int, threads: int, calibration: Calibration, kernel: str = "",
         per_call: float = 0.0, spared: frozenset[int] = frozenset()) -> list[Work]:
    """The work of each thread when a bank of so many rows is read (`get`) or written (`set`): contiguous ranges.

    Args:
        vcpus: of the VM. kernel: as in a host profile, for what was not measured. per_call: ns of the caller's own for
            each ioctl. spared: registers that take none.
    """
    uses = [Use(_find(f"{verb} {name}", id, layout, calibration, kernel), registers)
            for name, id, registers in _ioctls(layout, verb) if id not in spared]
    shared = min(threads, rows)
    if not uses:
        return []
    segments, tail = _row(uses, vcpus, per_call, shared)
    first = sum(use.cost.first for use in uses)
    return [Work(rows // shared + (k < rows % shared), segments, tail, first) for k in range(shared)]


def _row(uses: list[Use], vcpus: int, per_call: float, threads: int) -> tuple[tuple[Segment, ...], float]:
    """One row: what is done between two locks is one stretch of time; alone, a lock is only time."""
    segments, free = [], 0.0
    for use in uses:
        cost, held = use.cost, use.cost.held(vcpus)
        total = cost.total(vcpus, use.registers) + per_call
        if not held or threads == 1:
            free += total * (cost.parallel if threads > 1 else 1.0)
            continue
        segments.append(Segment(free + total - held, held))
        free = 0.0
    return tuple(segments), free


def _ioctls(layout: Layout, verb: str) -> Iterator[tuple[str, int, int]]:
    """Name, id and number of registers of each ioctl of a row."""
    if (layout.scope, layout.phase) == (Scope.VM, Phase.CREATE):
        return  # capabilities: told when the VM is made, kept by this process
    run = 0
    for slot in layout.slots:
        if ids.msr_index(slot.id) is not None:
            run += 1
            continue
        if run:
            yield "MSRs", 0, run
        run = 0
        if (verb, slot.id) != ("set", x86_64.TSC_OFFSET.id):  # written only where the offsets differ
            yield lookup(slot.id).name, slot.id, 1
    if run:
        yield "MSRs", 0, run


@dataclass(frozen=True, slots=True)
class Assumption:
    """What stands in for a primitive that was not measured: `like`, a write of it changed by `change`."""

    applies: Callable[[int, Layout, str], bool]
    like: str
    why: str
    change: Callable[[Cost, Calibration], Cost] = lambda cost, _: cost


def _arm64(id: int) -> bool:
    return id >> 60 == 6


def _counter_for_all(id: int, layout: Layout, kernel: str) -> bool:
    """Linux before 6.4: update_vtimer_cntvoff() sets the offset of every vCPU under kvm->lock."""
    version = re.search(r"(\d+)\.(\d+)", kernel)
    return lookup(id).name in _COUNTERS and version is not None and tuple(map(int, version.groups())) < (6, 4)


_COUNTERS = ("TIMER_CNT", "PTIMER_CNT")


def _locked(cost: Cost, calibration: Calibration) -> Cost:
    """With a short hold of the VM-wide lock: what the shortest VM ioctl takes."""
    return replace(cost, hold=calibration.cost("set KVM_IRQCHIP_PIC_SLAVE").base)


def _loop(cost: Cost, calibration: Calibration) -> Cost:
    """With a hold that grows with vCPUs as KVM_SET_IRQCHIP of the IOAPIC does."""
    loop = calibration.cost("set KVM_IRQCHIP_IOAPIC")
    return replace(cost, hold=loop.hold or 0.0, per_vcpu=loop.per_vcpu)


ASSUMPTIONS: tuple[Assumption, ...] = (
    Assumption(_counter_for_all, "ONE_REG", "arm64 before 6.4: writing a counter sets every vCPU's offset under "
               "kvm->lock (arch/arm64/kvm/arch_timer.c); as long a hold as the IOAPIC's", _loop),
    Assumption(lambda id, layout, _: _arm64(id) and layout.scope == Scope.VM, "ONE_REG",
               "arm64: a VM-scoped register is a ONE_REG that holds kvm->arch.config_lock or kvm->lock as long as the "
               "shortest VM ioctl takes (arch/arm64/kvm/hypercalls.c, sys_regs.c)", _locked),
    Assumption(lambda id, _, __: _arm64(id) or id >> 56 == 0x20, "ONE_REG",
               "a register by KVM_GET_ONE_REG and KVM_SET_ONE_REG costs what an MSR costs by them on the calibrated "
               "x86-64 machine, without a lock"),
    Assumption(lambda id, layout, _: layout.scope == Scope.VCPU, "KVM_VCPU_EVENTS",
               "a vCPU struct that this machine doesn't have costs what KVM_VCPU_EVENTS costs"),
    Assumption(lambda *_: True, "KVM_PIT2", "any other VM-wide state costs what KVM_PIT2 costs"),
)
"""In order; the first that applies serves a primitive that the calibration doesn't have."""


def _find(name: str, id: int, layout: Layout, calibration: Calibration, kernel: str) -> Cost:
    if name in calibration.costs:
        return calibration.costs[name]
    row, verb = next(row for row in ASSUMPTIONS if row.applies(id, layout, kernel)), name.split()[0]
    stand_in = calibration.cost(f"{verb} {row.like}")
    return row.change(stand_in, calibration) if verb == "set" else stand_in


def assumptions(calibration: Calibration, layouts: Iterable[Layout], kernel: str) -> list[str]:
    """Why the times of these layouts are more than this calibration: one line for each assumption that they rest on."""
    used = {row.why: None for layout in layouts for name, id, _ in _ioctls(layout, "set")
            if f"set {name}" not in calibration.costs
            for row in [next(row for row in ASSUMPTIONS if row.applies(id, layout, kernel))]}
    return list(used)


class ModelledTime(Stopwatch):
    """The stopwatch of a simulated host: it goes on by what each read and write of registers would have taken."""

    kind = MODELLED

    def __init__(self, kernel: str = "") -> None:
        """`kernel` as in a host profile. The calibration is read when it is needed first."""
        self._kernel, self._passed = kernel, 0.0
        self._known: Calibration | None = None

    @property
    def what(self) -> str:
        """Of which machine the costs are."""
        machine = self._calibration().machine
        return (f"from what ioctls cost on {machine['cpu']}, Linux {machine['kernel']}, or one like them; only reading "
                "and writing registers is in it")

    def now_ns(self) -> int:
        """ns of all that was read and written."""
        return round(self._passed)

    def spend(self, verb: str, layout: Layout, rows: int, vm: Vm) -> None:
        """A bank was read (`get`) or written (`set`)."""
        calibration = self._calibration()
        cpus = int(calibration.machine.get("cpus", 1))
        threads = vm.threads or max(1, min(cpus, rows // PER_THREAD))
        todo = work(layout, verb, vm.machine.vcpus, rows, threads, calibration, self._kernel)
        self._passed += elapsed(todo, calibration.handoff)

    def _calibration(self) -> Calibration:
        if self._known is None:
            self._known = Calibration.from_json(CALIBRATION.read_text(encoding="utf-8"))
        return self._known


Access = Callable[[Any, Layout, int, "Words"], list[Refusal]]


def timed(verb: str) -> Callable[[Access], Access]:
    """A VM's `read` (`get`) or `write` (`set`) whose modelled time passes on its stopwatch."""
    def decorate(access: Access) -> Access:
        @wraps(access)
        def spending(vm: Any, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
            refused = access(vm, layout, first_vcpu, values)
            if isinstance(vm.stopwatch, ModelledTime):
                vm.stopwatch.spend(verb, layout, len(values), vm)
            return refused

        return spending

    return decorate
