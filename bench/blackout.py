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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import measure, summary
from bench.hosts import COUNTED, LAB, MEASURED, Host, in_lab, open_host
from bench.journal import Journal
from bench.program import LeftOut
from bench.strategies import STRATEGIES
from bench.subjects import Subject
from migstream.errors import MigstreamError, OutputError, UsageError

VCPUS = (1, 2, 4, 8, 16, 32, 64, 128, 240, 256, 512, 1024)
"""240 is what QEMU's plain PC takes."""

QUICK_VCPUS = (1, 4, 16, 64, 128, 256)
QUICK_S = 44.0
"""When a quick run stops measuring, so that it ends within a minute with its plots."""

LAB_VCPUS = (1, 2, 4)
REPS = 20
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

    def header(self, kind: str) -> dict[str, Any]:
        """What a journal must agree with to be gone on with."""
        return {"bench": "blackout", "kind": kind, "machine": measure.machine(), "options": {
            "backend": self.backend, "vcpus": list(self.vcpus), "strategies": list(self.strategies),
            "threads": self.threads, "reps": self.reps, "beside": list(self.beside)}}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK_VCPUS[-1]} vCPUs, within a minute, no QEMU")
    parser.add_argument("--vcpus", type=_numbers, help="counts, as 1,2,4")
    parser.add_argument("--backend", default="auto",
                        help="kvm; sim:NAME (modelled time); lab:ARCH-KERNEL (counts of writes only)")
    parser.add_argument("--strategies", type=_names, default=tuple(STRATEGIES), help=", ".join(STRATEGIES))
    parser.add_argument("--threads", type=int, default=2, help="of prologue+threads and of the C program (default 2)")
    parser.add_argument("--reps", type=int, help=f"interleaved rounds (default {REPS})")
    parser.add_argument("--beside", type=_beside, help="c, qemu, or none (default c,qemu)")
    parser.add_argument("--counts", action="store_true", help="count register writes only, one round")
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


def make_plan(options: argparse.Namespace, host: Host) -> Plan:
    """The options with their defaults. Raises: UsageError."""
    quick = options.quick
    vcpus = options.vcpus or tuple(n for n in (QUICK_VCPUS if quick else VCPUS) if n <= host.most_vcpus)
    if vcpus[-1] > host.most_vcpus:
        raise UsageError(f"--vcpus {vcpus[-1]}: {host.name} allows {host.most_vcpus}")
    reps = 1 if host.kind != MEASURED else REPS if options.reps is None else options.reps
    if reps < 1 or options.threads < 1:
        raise UsageError("--reps and --threads begin at 1")
    beside: tuple[str, ...] = BESIDE[:1] if quick else BESIDE
    beside = () if host.kind == COUNTED else beside if options.beside is None else options.beside
    return Plan(host.name, vcpus, options.strategies, options.threads, reps, beside, QUICK_S if quick else 0)


def run(options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Measure and return the document that `--json` prints; all times in ns. Raises: MigstreamError."""
    if options.backend.startswith(LAB):
        document = in_lab(options.backend, _lab_words(options), tell)
    else:
        host, left_out = open_host(options.backend, counts_only=options.counts)
        plan = make_plan(options, host)
        with Journal(options.folder / JOURNAL, plan.header(host.kind)) as journal:
            bench = Bench(plan, host, journal, left_out, tell)
            with contextlib.suppress(KeyboardInterrupt):
                bench.measure()
                bench.complete = True
            document = bench.document()
    _save(options.folder, document, tell)
    return document


def _lab_words(options: argparse.Namespace) -> list[str]:
    counts = ",".join(str(n) for n in options.vcpus or LAB_VCPUS)
    return ["--vcpus", counts, "--strategies", ",".join(options.strategies), "--threads", str(options.threads)]


class Bench:
    """One run: its subjects and its rounds."""

    def __init__(self, plan: Plan, host: Host, journal: Journal, left_out: list[str], tell: Tell) -> None:
        self.plan, self.host, self.journal, self.left_out, self.tell = plan, host, journal, left_out, tell
        self.complete = False

    def measure(self) -> None:
        """All rounds; each sample is in the journal at once. Raises: MigstreamError, KeyboardInterrupt."""
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="migstream-")))
            subjects = self.host.subjects(self.plan, folder, stack, self.left_out, self.tell)
            for number in range(self.plan.reps):
                if self.plan.seconds and time.monotonic() - start > self.plan.seconds:
                    self.left_out.append(f"rounds from {number + 1} to {self.plan.reps}: time was up")
                    break
                self._round(number, subjects)

    def _round(self, number: int, subjects: Sequence[Subject]) -> None:
        """Every subject at every vCPU count once, so that a change of the machine's mood hits all alike."""
        for vcpus in self.plan.vcpus:
            for subject in _in_turn(subjects, number):
                key = vcpus, subject.name, number
                if key in self.journal.samples or vcpus > subject.most_vcpus or number >= subject.rounds:
                    continue
                self.tell(f"round {number + 1} of {self.plan.reps}: {vcpus} vCPUs, {subject.name}")
                self._sample(key, subject)

    def _sample(self, key: tuple[int, str, int], subject: Subject) -> None:
        """One sample. A peer or C program that fails is left out from here on; the library's failure ends the run."""
        try:
            self.journal.add(key, subject.sample(key[0]))
        except LeftOut as reason:
            subject.rounds = 0
            self.left_out.append(f"{subject.name} from {key[0]} vCPUs of round {key[2] + 1} on: {reason}")

    def document(self) -> dict[str, Any]:
        """What was measured so far."""
        things = list(dict.fromkeys(thing for _, thing, _ in self.journal.samples))
        order = [*self.plan.strategies, *(thing for thing in things if thing not in STRATEGIES)]
        document: dict[str, Any] = {
            **self.journal.header, "date": time.strftime("%Y-%m-%d", time.gmtime()), "backend": self.plan.backend,
            "complete": self.complete, "resumed_samples": self.journal.resumed,
            "left_out": [*self.left_out, *([] if self.complete else ["what was to come after the interruption"])],
            "curves": summary.summarize(self.journal, order, self.plan.vcpus)}
        document["ratios"] = summary.ratios(document, self.plan.strategies)
        document["model"] = self._model(document)
        return document

    def _model(self, document: dict[str, Any]) -> dict[str, Any] | None:
        """The model beside what was measured, where it was calibrated on this machine."""
        if self.host.kind != MEASURED or not self.host.layouts():
            return None
        from bench.model import load_calibration
        from bench.modelled import beside_measured

        try:
            calibration = load_calibration()
        except MigstreamError as error:
            document["left_out"].append(f"model: {error}")
            return None
        own, kept = document["machine"], calibration.machine
        if other := [name for name in ("cpu", "kernel") if own[name] != kept.get(name)]:
            document["left_out"].append(f"model: calibrated on another machine ({', '.join(other)}); "
                                        "`python -m bench calibrate` does it here")
            return None
        return beside_measured(document, self.host.layouts(), calibration)


def _in_turn(subjects: Sequence[Subject], number: int) -> Iterator[Subject]:
    """Another one begins in each round: who comes after whom must not matter."""
    shift = number % len(subjects)
    yield from (*subjects[shift:], *subjects[:shift])


def _save(folder: Path, document: dict[str, Any], tell: Tell) -> None:
    from bench import plot

    tell("drawing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document["plots"] = [str(path) for path in plot.draw(document, folder)]
        (folder / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}") from error


def print_result(document: dict[str, Any]) -> None:
    """The document as tables, and where the plots are."""
    summary.print_document(document)
    for path in document.get("plots", ()):
        print(path)
