"""The model: what a strategy costs on a calibrated machine, by phase. Modelled time, never KVM's.

`predict` is the whole interface. Registers and their scope come from a host profile (or from layouts); what each ioctl
costs comes from a calibration (`python -m bench calibrate`). Threads, and the VM-wide lock that some ioctls hold, are a
discrete-event system (`migstream.backends.sim.costs`). Not in it: encoding, decoding, RAM, starting threads, and what a
caller needs between two ioctls, unless told as `per_call`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from migstream.backends.sim.costs import Calibration, Cost, Segment, Work, elapsed
from migstream.errors import Corrupt, OutputError, UsageError
from migstream.host.profile import FIXED, HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Phase, Scope
from migstream.registers import arm64, ids, x86_64
from migstream.registers.catalogue import lookup

DATA = Path(__file__).with_name("data")
"""Results that are kept, each with the description of its machine."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a VMM saves and restores.

    Attributes:
        each_vcpu: VM-scoped registers are read and written through every vCPU, not once.
        prologue: what can't change once a guest runs is done before the pause. threads: vCPUs are shared out.
    """

    each_vcpu: bool
    prologue: bool
    threads: bool


STRATEGIES = {
    "per-vCPU": Strategy(each_vcpu=True, prologue=False, threads=False),
    "scoped": Strategy(each_vcpu=False, prologue=False, threads=False),
    "prologue": Strategy(each_vcpu=False, prologue=True, threads=False),
    "prologue+threads": Strategy(each_vcpu=False, prologue=True, threads=True),
}


def predict(strategy: str, vcpus: int, threads: int, calibration: Calibration, host: HostProfile | Sequence[Layout], *,
            per_call: float = 0.0) -> dict[str, float]:
    """Return ns in the pause, by phase: `save state (vcpu)`, …, `restore clock (vm)`; their sum is the blackout.

    Args:
        strategy: a name of STRATEGIES. One without threads of its own takes `threads` all the same, so that a strategy
            can be looked at with any number; pass 1 for what it stands for.
        threads: each on a CPU of its own.
        host: the kernel, or the layouts that a VM on it has (`vm.layouts()[0]`).
        per_call: ns that the caller needs for each ioctl.

    Raises: UsageError for a strategy or primitive that is not known.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"no strategy {strategy!r}: {', '.join(STRATEGIES)}")
    if vcpus < 1 or threads < 1:
        raise UsageError("vCPUs and threads are numbers from 1 on")
    plan = STRATEGIES[strategy]
    layouts = layouts_of(host) if isinstance(host, HostProfile) else tuple(host)
    kernel = host.kernel if isinstance(host, HostProfile) else ""
    found = {}
    for verb in ("save", "restore"):
        for layout in layouts:
            if plan.prologue and layout.phase.prologue and not _looked_at_again(verb, layout):
                continue
            work = _threads(_costs(layout, verb, calibration, kernel), layout, vcpus, threads, plan, per_call)
            if work:
                found[f"{verb} {title(layout)}"] = elapsed(work, calibration.handoff)
    return found


def title(layout: Layout) -> str:
    """As `Report.times` names the phase of a layout."""
    return f"{layout.phase.name.lower()} ({layout.scope})"


def _looked_at_again(verb: str, layout: Layout) -> bool:
    """VM-wide registers that a guest may write are saved early and read again at the pause."""
    return verb == "save" and (layout.scope, layout.phase) == (Scope.VM, Phase.FEATURE)


@dataclass(frozen=True, slots=True)
class Use:
    """A primitive and how many registers it carries."""

    cost: Cost
    registers: int


def _threads(uses: list[Use], layout: Layout, vcpus: int, threads: int, plan: Strategy,
             per_call: float) -> list[Work]:
    """The work of each thread: contiguous ranges of rows."""
    rows = vcpus if layout.scope == Scope.VCPU or (plan.each_vcpu and layout.phase != Phase.CREATE) else 1
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


def _costs(layout: Layout, verb: str, calibration: Calibration, kernel: str) -> list[Use]:
    """The ioctls of a row, each with its cost; one for neighbouring MSRs."""
    get_set = "get" if verb == "save" else "set"
    return [Use(_find(f"{get_set} {name}", id, layout, calibration, kernel), registers)
            for name, id, registers in _ioctls(layout, verb)]


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
        if (verb, slot.id) != ("restore", x86_64.TSC_OFFSET.id):  # written only where the offsets differ
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


def assumptions(calibration: Calibration, host: HostProfile) -> list[str]:
    """Why a kernel's prediction is more than this calibration: one line for each assumption that it rests on."""
    used = {row.why: None for layout in layouts_of(host) for name, id, _ in _ioctls(layout, "restore")
            if f"set {name}" not in calibration.costs
            for row in [next(row for row in ASSUMPTIONS if row.applies(id, layout, host.kernel))]}
    return list(used)


def layouts_of(profile: HostProfile) -> tuple[Layout, ...]:
    """What a VM on this kernel has to save, in restore order; arm64: for a default vCPU, no interrupt controller."""
    if profile.arch == Arch.ARM64:
        scopes = {id: Scope(name) for id, name in profile.scopes.items() if name != FIXED}
        return arm64.layouts(profile.registers, scopes, (arm64.VCPU_EVENTS.id, arm64.MP_STATE.id))
    from migstream.backends.sim import SimBackend

    devices = {"irqchip": True, "pit": True}
    with SimBackend(profile).create(Machine(Arch.X86_64, 1, (MemoryRegion(0, 4096),), devices)) as vm:
        vm.create_vcpus()
        return vm.layouts()[0]


def load_calibration(path: str | Path | None = None) -> Calibration:
    """Read a calibration; without a path, the one that is kept in `bench/data`.

    Raises: OutputError, Corrupt.
    """
    path = path or DATA / "calibration.json"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: {error}") from error
    try:
        return Calibration.from_json(text)
    except Corrupt as error:
        raise error.in_file(str(path)) from error.__cause__
