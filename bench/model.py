"""The model: what a strategy costs on a calibrated machine, by phase. Modelled time, never KVM's.

`predict` is the whole interface. Registers and their scope come from a host profile (or from layouts); what each ioctl
costs comes from a calibration (`python -m bench calibrate`). Threads, and the VM-wide lock that some ioctls hold, are a
discrete-event system (`migstream.backends.sim.costs`). Not in it: encoding, decoding, RAM, starting threads, and what a
caller needs between two ioctls, unless told as `per_call`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migstream.backends.kvm.shared import IN_PAGE, PAGED, SETTLED
from migstream.backends.sim import timing
from migstream.backends.sim.costs import Calibration, elapsed
from migstream.errors import Corrupt, OutputError, UsageError, printable
from migstream.host.profile import FIXED, HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Phase, Scope
from migstream.registers import arm64


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


_NOTHING: Mapping[str, frozenset[int]] = {}


def predict(strategy: str, vcpus: int, threads: int, calibration: Calibration, host: HostProfile | Sequence[Layout], *,
            per_call: float = 0.0, spared: Mapping[str, frozenset[int]] = _NOTHING) -> dict[str, float]:
    """Return ns in the pause, by phase: `save state (vcpu)`, …, `restore clock (vm)`; their sum is the blackout.

    Args:
        strategy: a name of STRATEGIES. One without threads of its own takes `threads` all the same, so that a strategy
            can be looked at with any number; pass 1 for what it stands for.
        threads: each on a CPU of its own.
        host: the kernel, or the layouts that a VM on it has (`vm.layouts()[0]`).
        per_call: ns that the caller needs for each ioctl.
        spared: registers that the caller needs no ioctl for, by `get` and `set` (`spared_by_library`).

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
            each = layout.scope == Scope.VCPU or (plan.each_vcpu and layout.phase != Phase.CREATE)
            work = timing.work(layout, _PRIMITIVE[verb], vcpus, vcpus if each else 1, threads, calibration, kernel,
                               per_call, spared.get(_PRIMITIVE[verb], frozenset()))
            if work:
                found[f"{verb} {title(layout)}"] = elapsed(work, calibration.handoff)
    return found


_PRIMITIVE = {"save": "get", "restore": "set"}


def spared_by_library(strategy: str, capabilities: Mapping[str, int]) -> dict[str, frozenset[int]]:
    """What the library needs no ioctl for on real KVM: registers that a pause leaves in the run page, and, where it
    could look at the target before the pause, those that the demo's guest leaves as a fresh vCPU has them.
    """
    paged = int(capabilities.get("SYNC_REGS", 0)) & IN_PAGE == IN_PAGE
    return {"get": PAGED if paged else frozenset(), "set": SETTLED if STRATEGIES[strategy].prologue else frozenset()}


def title(layout: Layout) -> str:
    """As `Report.times` names the phase of a layout."""
    return f"{layout.phase.name.lower()} ({layout.scope})"


def _looked_at_again(verb: str, layout: Layout) -> bool:
    """VM-wide registers that a guest may write are saved early and read again at the pause."""
    return verb == "save" and (layout.scope, layout.phase) == (Scope.VM, Phase.FEATURE)


def assumptions(calibration: Calibration, host: HostProfile) -> list[str]:
    """Why a kernel's prediction is more than this calibration: one line for each assumption that it rests on."""
    return timing.assumptions(calibration, layouts_of(host), host.kernel)


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
    """Read a calibration; without a path, the one that the simulator has.

    Raises: OutputError, UsageError, Corrupt.
    """
    path = path or timing.CALIBRATION
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # bytes that are no UTF-8, a path with a NUL in it
        raise UsageError(f"{printable(path)}: not a calibration: no text") from error
    try:
        calibration = Calibration.from_json(text)
        for name in ("cpu", "kernel"):
            if not isinstance(calibration.machine.get(name), str):
                raise Corrupt("missing, or no text", section="calibration", field=f"machine.{name}")
    except Corrupt as error:
        raise error.in_file(str(path)) from error.__cause__
    return calibration
