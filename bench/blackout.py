"""`python -m bench blackout`: blackout against vCPU count, by strategy, beside C and QEMU, with the curve as a picture.

Every sample is appended to DIR/samples.jsonl as it comes; the same command goes on where it was interrupted. At the end
(or at Ctrl-C) DIR gets blackout.json and the plots.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import measure, summary
from bench.floor import MODES, Floor
from bench.journal import Journal
from bench.program import LeftOut
from bench.qemu import Qemu
from bench.strategies import STRATEGIES, source_vm
from bench.subjects import CProgram, Library, Peer, Subject
from migstream.backends import open_backend
from migstream.backends.base import Backend, Vm
from migstream.errors import OutputError, UsageError

VCPUS = (1, 2, 4, 8, 16, 32, 64, 128, 240, 256, 512, 1024)
"""240 is what QEMU's plain PC takes."""

QUICK_VCPUS = (1, 4, 16, 64, 128, 256)
QUICK_S = 38.0
"""When a quick run stops measuring, so that it ends within a minute with its plots."""

REPS, QUICK_REPS = 20, 20
BESIDE = ("c", "qemu")
JOURNAL, DOCUMENT = "samples.jsonl", "blackout.json"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        seconds: when it stops at a round's end; 0 for never.
    """

    backend: str
    vcpus: tuple[int, ...]
    strategies: tuple[str, ...]
    threads: int
    reps: int
    beside: tuple[str, ...]
    seconds: float = 0

    def header(self) -> dict[str, Any]:
        """What a journal must agree with to be gone on with."""
        return {"bench": "blackout", "machine": measure.machine(), "options": {
            "backend": self.backend, "vcpus": list(self.vcpus), "strategies": list(self.strategies),
            "threads": self.threads, "reps": self.reps, "beside": list(self.beside)}}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK_VCPUS[-1]} vCPUs, within a minute, no QEMU")
    parser.add_argument("--vcpus", type=_numbers, help="counts, as 1,2,4")
    parser.add_argument("--backend", default="auto", help="kvm, sim:NAME (modelled time), lab:ARCH-KERNEL (counts)")
    parser.add_argument("--strategies", type=_names, default=tuple(STRATEGIES), help=", ".join(STRATEGIES))
    parser.add_argument("--threads", type=int, default=2, help="of prologue+threads and of the C program (default 2)")
    parser.add_argument("--reps", type=int, help=f"interleaved rounds (default {REPS})")
    parser.add_argument("--beside", type=_beside, help="c, qemu, or none (default c,qemu)")
    parser.add_argument("-o", dest="folder", type=Path, default=Path("blackout"), help="directory of the results")


def _numbers(text: str) -> tuple[int, ...]:
    numbers = sorted({int(word) for word in text.split(",")})
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError("vCPU counts begin at 1")
    return tuple(numbers)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise argparse.ArgumentTypeError(f"no strategy {unknown[0]!r}: {', '.join(STRATEGIES)}")
    return names


def _beside(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    if unknown := [name for name in names if name not in BESIDE]:
        raise argparse.ArgumentTypeError(f"nothing beside called {unknown[0]!r}: {', '.join(BESIDE)}, none")
    return names


def make_plan(options: argparse.Namespace, backend: Backend) -> Plan:
    """The options with their defaults. Raises: UsageError."""
    quick, most = options.quick, backend.profile().max_vcpus
    vcpus = options.vcpus or tuple(n for n in (QUICK_VCPUS if quick else VCPUS) if n <= most)
    if vcpus[-1] > most:
        raise UsageError(f"--vcpus {vcpus[-1]}: {backend.name} allows {most}")
    reps = options.reps or (QUICK_REPS if quick else REPS)
    if reps < 1 or options.threads < 1:
        raise UsageError("--reps and --threads begin at 1")
    beside = options.beside if options.beside is not None else BESIDE[:1] if quick else BESIDE
    return Plan(backend.name, vcpus, options.strategies, options.threads, reps, beside, QUICK_S if quick else 0)


def run(options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Measure and return the document that `--json` prints; all times in ns. Raises: MigstreamError."""
    backend = open_backend(options.backend)
    plan = make_plan(options, backend)
    with Journal(options.folder / JOURNAL, plan.header()) as journal:
        bench = Bench(plan, backend, journal, tell)
        with contextlib.suppress(KeyboardInterrupt):
            bench.measure()
            bench.complete = True
        document = bench.document()
    _save(options.folder, document, tell)
    return document


class Bench:
    """One run: its source VMs, its subjects, its rounds."""

    def __init__(self, plan: Plan, backend: Backend, journal: Journal, tell: Tell) -> None:
        self.plan, self.backend, self.journal, self.tell = plan, backend, journal, tell
        self.left_out: list[str] = []
        self.complete = False
        self._sources: dict[int, Vm] = {}

    def measure(self) -> None:
        """All rounds; each sample is in the journal at once. Raises: MigstreamError, KeyboardInterrupt."""
        start = time.monotonic()
        with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="migstream-") as folder:
            for vcpus in self.plan.vcpus:
                self.tell(f"a guest of {vcpus} vCPUs runs for a moment")
                self._sources[vcpus] = stack.enter_context(source_vm(self.backend, vcpus))
            subjects = self._subjects(Path(folder), stack)
            for number in range(self.plan.reps):
                if self.plan.seconds and time.monotonic() - start > self.plan.seconds:
                    self.left_out.append(f"rounds from {number + 1} to {self.plan.reps}: time was up")
                    break
                self._round(number, subjects)

    def _subjects(self, folder: Path, stack: contextlib.ExitStack) -> list[Subject]:
        threads = self.plan.threads
        subjects: list[Subject] = [Library(self.backend, self._sources, STRATEGIES[name], threads)
                                   for name in self.plan.strategies]
        makers: dict[str, Callable[[], Iterable[Subject]]] = {
            "c": lambda: self._c_programs(folder, stack), "qemu": lambda: self._qemu(folder)}
        for name in self.plan.beside:
            try:
                subjects += makers[name]()
            except LeftOut as reason:
                self.left_out.append(str(reason))
        return subjects

    def _c_programs(self, folder: Path, stack: contextlib.ExitStack) -> list[Subject]:
        self._only_real()
        self.tell("compiling floor.c")
        floor = stack.enter_context(Floor(folder, self.backend.arch))
        for vm in self._sources.values():
            floor.load(vm)
        pairs = [(mode, threads) for mode in MODES for threads in sorted({1, self.plan.threads})
                 if mode == "best" or threads == 1]
        return [CProgram(floor, mode, threads) for mode, threads in pairs]

    def _qemu(self, folder: Path) -> list[Subject]:
        self._only_real()
        return [Peer(Qemu(folder), max(self.plan.reps // 2, 1))]

    def _only_real(self) -> None:
        if self.backend.name != "kvm":
            raise LeftOut(f"C and QEMU: they need real KVM, this is {self.backend.name}")

    def _round(self, number: int, subjects: Sequence[Subject]) -> None:
        """Every subject at every vCPU count once, so that a change of the machine's mood hits all alike."""
        for vcpus in self.plan.vcpus:
            for subject in self._in_turn(subjects, number):
                key = vcpus, subject.name, number
                if key in self.journal.samples or vcpus > subject.most_vcpus or number >= (subject.rounds or 1 << 30):
                    continue
                self.tell(f"round {number + 1} of {self.plan.reps}: {vcpus} vCPUs, {subject.name}")
                self.journal.add(key, subject.sample(vcpus))

    @staticmethod
    def _in_turn(subjects: Sequence[Subject], number: int) -> Iterator[Subject]:
        """Another one begins in each round: who comes after whom must not matter."""
        shift = number % len(subjects)
        yield from (*subjects[shift:], *subjects[:shift])

    def document(self) -> dict[str, Any]:
        """What was measured so far."""
        things = list(dict.fromkeys(thing for _, thing, _ in self.journal.samples))
        order = [*self.plan.strategies, *(thing for thing in things if thing not in STRATEGIES)]
        document: dict[str, Any] = {
            **self.journal.header, "date": time.strftime("%Y-%m-%d", time.gmtime()), "backend": self.plan.backend,
            "modelled": False, "complete": self.complete, "resumed_samples": self.journal.resumed,
            "left_out": [*self.left_out, *([] if self.complete else ["what was to come after the interruption"])],
            "curves": summary.summarize(self.journal, order, self.plan.vcpus)}
        return document | {"ratios": summary.ratios(document, self.plan.strategies)}


def _save(folder: Path, document: dict[str, Any], tell: Tell) -> None:
    from bench import plot

    tell("drawing")
    try:
        document["plots"] = [str(path) for path in plot.draw(document, folder)]
    except LeftOut as reason:
        document["left_out"].append(str(reason))
    try:
        (folder / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder / DOCUMENT}: {error.strerror or error}") from error


def print_result(document: dict[str, Any]) -> None:
    """The document as tables, and where the plots are."""
    summary.print_document(document)
    for path in document.get("plots", ()):
        print(path)
