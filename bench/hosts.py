"""Where a blackout run takes its samples: real KVM (time), a simulated kernel (modelled), a lab kernel (counts)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.children import die_with_parent
from bench.floor import MODES, Floor
from bench.program import LeftOut
from bench.qemu import Qemu
from bench.strategies import STRATEGIES, source_vm
from bench.subjects import CProgram, Library, Peer, Subject
from migstream.backends.base import Backend, Vm
from migstream.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from bench.blackout import Plan
    from migstream.backends.sim.costs import Calibration
    from migstream.host.profile import HostProfile
    from migstream.model import Layout

Tell = Callable[[str], None]
SIM, LAB = "sim", "lab:"
MEASURED, MODELLED, COUNTED = "measured", "modelled", "counted"
"""What a document's times are."""


class Host(ABC):
    """Something that gives subjects.

    Attributes:
        name: as `--backend` takes it. kind: MEASURED, MODELLED or COUNTED. most_vcpus: of a VM on it.
    """

    name: str
    kind: str
    most_vcpus: int

    @abstractmethod
    def subjects(self, plan: Plan, folder: Path, stack: contextlib.ExitStack, left_out: list[str],
                 tell: Tell) -> list[Subject]:
        """What can be measured here. What can't is left out with a reason."""

    def layouts(self) -> Sequence[Layout]:
        """Of a VM that was measured; empty before, and where nothing is."""
        return ()

    def capabilities(self) -> Mapping[str, int]:
        """Of a kernel that was measured."""
        return {}


class RealKvm(Host):
    """This machine's KVM, with C and QEMU beside it."""

    kind = MEASURED

    def __init__(self, backend: Backend, counts_only: bool) -> None:
        self.backend, self.name, self.most_vcpus = backend, backend.name, backend.profile().max_vcpus
        self.kind = COUNTED if counts_only else MEASURED
        self._layouts: Sequence[Layout] = ()

    def subjects(self, plan: Plan, folder: Path, stack: contextlib.ExitStack, left_out: list[str],
                 tell: Tell) -> list[Subject]:
        """The library on guests that have run; then C and QEMU. Raises: MigstreamError."""
        sources: dict[int, Vm] = {}
        for vcpus in plan.vcpus:
            tell(f"a guest of {vcpus} vCPUs runs for a moment")
            sources[vcpus] = stack.enter_context(source_vm(self.backend, vcpus))
        self._layouts = sources[plan.vcpus[0]].layouts()[0]
        out: list[Subject] = [Library(self.backend, sources, STRATEGIES[name], plan.threads)
                              for name in plan.strategies]
        makers: dict[str, Callable[[], Iterable[Subject]]] = {
            "c": lambda: self._c_programs(plan, folder, stack, sources),
            "qemu": lambda: [Peer(Qemu(folder), max(plan.reps // 2, 1))]}
        for name in plan.beside:
            tell(f"making ready {name}")
            try:
                out += makers[name]()
            except LeftOut as reason:
                left_out.append(str(reason))
        return out

    def _c_programs(self, plan: Plan, folder: Path, stack: contextlib.ExitStack,
                    sources: dict[int, Vm]) -> list[Subject]:
        floor = stack.enter_context(Floor(folder, self.backend.arch))
        for vm in sources.values():
            floor.load(vm)
        return [CProgram(floor, mode, threads) for mode in MODES for threads in sorted({1, plan.threads})
                if mode == "best" or threads == 1]

    def layouts(self) -> Sequence[Layout]:
        """Of the measured guests."""
        return self._layouts

    def capabilities(self) -> Mapping[str, int]:
        """Of this machine's KVM."""
        return self.backend.profile().capabilities


class Simulated(Host):
    """A kernel that is known by its profile: the model's times."""

    kind = MODELLED

    def __init__(self, profile: HostProfile, name: str, calibration: Calibration, counts_only: bool) -> None:
        self.kind = COUNTED if counts_only else MODELLED
        self.name, self.profile, self.calibration = name, profile, calibration
        self.most_vcpus = 1 << 16

    def subjects(self, plan: Plan, folder: Path, stack: contextlib.ExitStack, left_out: list[str],
                 tell: Tell) -> list[Subject]:
        """Strategies alone."""
        from bench.model import assumptions
        from bench.modelled import Modelled

        if self.kind == MODELLED:
            left_out += [f"{name}: beside modelled time it would say nothing" for name in plan.beside]
            left_out += [f"assumed, not calibrated: {why}" for why in assumptions(self.calibration, self.profile)]
        return [Modelled(self.profile, self.calibration, STRATEGIES[name], plan.threads) for name in plan.strategies]


def open_host(name: str, *, counts_only: bool = False) -> tuple[Host, list[str]]:
    """Return the host and what had to be left out to have one: `auto` is real KVM, else a simulated kernel.

    Raises: UsageError, BackendUnavailable.
    """
    from migstream.backends import open_backend

    if name == "auto":
        try:
            return RealKvm(open_backend("kvm"), counts_only), []
        except BackendUnavailable as reason:
            return _simulated(SIM, counts_only), [f"real KVM: {reason}"]
    if name.partition(":")[0] == SIM:
        return _simulated(name, counts_only), []
    if name != "kvm":
        raise UsageError(f"no backend {name!r}: auto, kvm, sim:NAME, lab:ARCH-KERNEL")
    return RealKvm(open_backend(name), counts_only), []


def _simulated(name: str, counts_only: bool) -> Simulated:
    from bench.model import load_calibration
    from migstream.backends.sim.backend import PREFIX, recorded

    title, profile = recorded(name)
    return Simulated(profile, PREFIX + title, load_calibration(), counts_only)


def in_lab(name: str, plan_words: Sequence[str], tell: Tell) -> dict[str, Any]:
    """Run this command in a lab kernel and return its document: counts, no times (the lab's CPU is software).

    Raises: UsageError, LeftOut with the lab's words.
    """
    arch, _, kernel = name.removeprefix(LAB).partition("-")
    if not arch or not kernel:
        raise UsageError(f"--backend {name}: lab:ARCH-KERNEL, as lab:arm64-6.12; `python -m tests.lab list` has them")
    tell(f"booting {arch} {kernel} in the lab")
    command = [sys.executable, "-m", "tests.lab", "run", "--arch", arch, "--kernel", kernel, "--",
               "python3", "-m", "bench", "blackout", "--backend", "kvm", "--counts", "--json", "-o", "/tmp/counts",
               *plan_words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=die_with_parent)
    start = done.stdout.find('{\n "migstream_json"')
    if done.returncode or start < 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LeftOut(f"{name}: {said[-1] if said else f'exit status {done.returncode}'}")
    document = json.loads(done.stdout[start:done.stdout.rindex("}") + 1])
    del document["migstream_json"], document["command"]
    return dict(document) | {"backend": name}
