"""`python -m bench blackout`: blackout against vCPU count, by strategy, beside C and QEMU, with the curve as a picture.

Every sample is appended to DIR/samples.jsonl as it comes; the same command goes on where it was interrupted. At the end
(or at Ctrl-C) DIR gets blackout.json and the plots.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import measure, output, summary
from bench.children import compiler, versions
from bench.floor import MODES
from bench.hosts import COUNTED, LAB, MEASURED, Host, in_lab, open_host
from bench.journal import Journal
from bench.output import JOURNAL
from bench.program import LeftOut
from bench.qemu import PROGRAM
from bench.samples import line_check
from bench.stop import INTERRUPTED, Interrupted, Stop
from bench.strategies import STRATEGIES
from bench.subjects import Peer, Subject, c_name
from migstream.backends.base import MAX_THREADS
from migstream.errors import MigstreamError, OutputError, UsageError

VCPUS = (1, 2, 4, 8, 16, 32, 64, 128, 240, 256, 512, 1024)
"""240 is what QEMU's plain PC takes."""

QUICK_VCPUS = (1, 4, 16, 64, 128, 256)
QUICK_S = 44.0
"""When a quick run stops measuring, so that it ends within a minute with its plots."""

LAB_VCPUS = (1, 2, 4)
REPS = 20
BESIDE = ("c", "qemu")
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
        programs = {"c": compiler(), "qemu": PROGRAM}
        known = versions({name: programs[name] for name in self.beside if kind == MEASURED})
        return {"bench": "blackout", "kind": kind, "machine": measure.machine(), "software": {
            **measure.software(), **known}, "options": {
            "backend": self.backend, "vcpus": list(self.vcpus), "strategies": list(self.strategies),
            "threads": self.threads, "reps": self.reps, "beside": list(self.beside)}}

    def things(self) -> set[str]:
        """Names of everything that such a run can measure."""
        c = {c_name(mode, threads) for mode in MODES for threads in (1, self.threads)} if "c" in self.beside else set()
        return {*self.strategies, *c, *((Peer.name,) if "qemu" in self.beside else ())}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK_VCPUS[-1]} vCPUs, within a minute, no QEMU")
    parser.add_argument("--vcpus", type=vcpu_counts, help="counts, as 1,2,4")
    parser.add_argument("--backend", default="auto",
                        help="kvm; sim:NAME (modelled time); lab:ARCH-KERNEL (counts of writes only)")
    parser.add_argument("--strategies", type=strategies, default=tuple(STRATEGIES), help=", ".join(STRATEGIES))
    parser.add_argument("--threads", type=int, default=2,
                        help=f"of prologue+threads and of the C program, 1 to {MAX_THREADS} (default 2)")
    parser.add_argument("--reps", type=int, help=f"interleaved rounds (default {REPS})")
    parser.add_argument("--beside", type=beside, help="c, qemu, or none (default c,qemu)")
    parser.add_argument("--counts", action="store_true", help="count register writes only, one round")
    parser.add_argument("-o", dest="folder", type=output.directory, default=Path("blackout"),
                        help="directory of the results")


def vcpu_counts(text: str) -> tuple[int, ...]:
    """`1,2,4`, in order and each once. Raises: ArgumentTypeError."""
    for word in text.split(","):
        if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word)):
            raise argparse.ArgumentTypeError(f"{word!r} is no vCPU count; whole numbers from 1 are wanted, as 1,2,4")
    return tuple(sorted({int(word) for word in text.split(",")}))


def strategies(text: str) -> tuple[str, ...]:
    """Names of STRATEGIES, each once. Raises: ArgumentTypeError."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise argparse.ArgumentTypeError(f"no strategy {unknown[0]!r}: {', '.join(STRATEGIES)}")
    return names


def beside(text: str) -> tuple[str, ...]:
    """Names of BESIDE, each once, or `none`. Raises: ArgumentTypeError."""
    names = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    if "none" in names:
        raise argparse.ArgumentTypeError(f"{text!r} contradicts itself: none stands alone")
    if unknown := [name for name in names if name not in BESIDE]:
        raise argparse.ArgumentTypeError(f"nothing beside called {unknown[0]!r}: {', '.join(BESIDE)}, none")
    return names


def check_numbers(options: argparse.Namespace) -> None:
    """Raises: UsageError for numbers that no host takes."""
    if not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(f"--threads {options.threads}: 1 to {MAX_THREADS}")
    if options.reps is not None and options.reps < 1:
        raise UsageError(f"--reps {options.reps}: at least 1")


def make_plan(options: argparse.Namespace, host: Host, left_out: list[str] | None = None) -> Plan:
    """The options with their defaults; what of them has no meaning here goes to `left_out`. Raises: UsageError."""
    check_numbers(options)
    quick = options.quick
    vcpus = options.vcpus or tuple(n for n in (QUICK_VCPUS if quick else VCPUS) if n <= host.most_vcpus)
    if vcpus[-1] > host.most_vcpus:
        raise UsageError(f"--vcpus {vcpus[-1]}: {host.name} allows {host.most_vcpus}")
    reps = 1 if host.kind != MEASURED else REPS if options.reps is None else options.reps
    if left_out is not None and (options.reps or reps) > reps:
        left_out.append(f"rounds 2 to {options.reps}: what is {host.kind} is the same in each")
    beside: tuple[str, ...] = BESIDE[:1] if quick else BESIDE
    beside = beside if options.beside is None else options.beside
    if left_out is not None and host.kind == COUNTED and options.beside:
        left_out.append(f"{', '.join(beside)}: only register writes of the library are counted")
    return Plan(host.name, vcpus, options.strategies, options.threads, reps, () if host.kind == COUNTED else beside,
                QUICK_S if quick else 0)


def run(options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Measure and return the document that `--json` prints; all times in ns.

    A run that a signal or a full disk ended gives what it has; `exit_status` is there then. Raises: MigstreamError,
    Interrupted when there is nothing.
    """
    check_numbers(options)
    output.prepare(options.folder)
    with Stop() as stop:
        try:
            document = _measured(options, tell, stop)
            _keep(options.folder, document, tell, stop)
        except BaseException as error:
            if not stop.caused(error) or isinstance(error, Interrupted):
                raise
            kept = options.folder / JOURNAL
            raise Interrupted(f"interrupted; {kept} has what was measured" if kept.exists() else
                              "interrupted before anything was measured", stop.status) from None
    return document


def _measured(options: argparse.Namespace, tell: Tell, stop: Stop) -> dict[str, Any]:
    if options.backend.startswith(LAB):
        document = in_lab(options.backend, _lab_words(options), tell)
        document["left_out"] += [f"{name}: a lab counts register writes of the library, one round" for name, given in
                                 (("--reps", options.reps), ("--beside", options.beside)) if given]
        return document
    host, left_out = open_host(options.backend, counts_only=options.counts)
    plan = make_plan(options, host, left_out)
    check = line_check(plan.vcpus, plan.things(), plan.reps)
    with Journal(options.folder / JOURNAL, plan.header(host.kind), check) as journal:
        bench = Bench(plan, host, journal, left_out, tell)
        if said := bench.resumed():
            print(f"bench: {said}", file=sys.stderr)
        failure = _until_stopped(bench, stop)
        if not journal.samples:
            raise failure or Interrupted("interrupted before the first sample: nothing was measured", stop.status)
        document = bench.document()
    if failure:
        output.failed(document, failure)
    elif not bench.complete:
        document["exit_status"] = stop.status or INTERRUPTED
    return document


def _until_stopped(bench: Bench, stop: Stop) -> OutputError | None:
    """Measure until all is there, a signal says stop, or no sample can be kept any more: that error is returned."""
    try:
        bench.measure()
        bench.complete = True
    except OutputError as error:
        return error
    except BaseException as error:
        if not stop.caused(error):
            raise
    stop.handled()
    return None


def _keep(folder: Path, document: dict[str, Any], tell: Tell, stop: Stop) -> None:
    """Write the document, then draw, then say in it what was drawn."""
    document["plots"] = []
    try:
        output.write(folder, document)
        if document["kind"] != COUNTED:
            tell("drawing")
            output.draw(folder, document, stop.caused)
        output.write(folder, document)
    except OutputError as error:
        output.failed(document, error)


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
            self._too_many(subjects)
            for number in range(self.plan.reps):
                if self.plan.seconds and time.monotonic() - start > self.plan.seconds:
                    self.left_out.append(f"rounds from {number + 1} to {self.plan.reps}: time was up")
                    break
                self._round(number, subjects)

    def _too_many(self, subjects: Sequence[Subject]) -> None:
        """Say which subjects can't have as many vCPUs as were asked for."""
        for subject in subjects:
            if beyond := [vcpus for vcpus in self.plan.vcpus if vcpus > subject.most_vcpus]:
                self.left_out.append(f"{subject.name} at {', '.join(map(str, beyond))} vCPUs: it can have "
                                     f"{subject.most_vcpus}")

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

    def resumed(self) -> str:
        """What was found of an earlier run, in words; "" for nothing."""
        journal = self.journal
        if not journal.resumed:
            return ""
        return (f"{journal.resumed} samples of {', '.join(journal.resumed_dates)} kept from an earlier run in "
                f"{journal.path}; another -o measures all anew")

    def document(self) -> dict[str, Any]:
        """What was measured so far."""
        things = list(dict.fromkeys(thing for _, thing, _ in self.journal.samples))
        order = [*self.plan.strategies, *(thing for thing in things if thing not in STRATEGIES)]
        document: dict[str, Any] = {
            **self.journal.header, "date": ", ".join(sorted(set(self.journal.dates.values()))),
            "backend": self.plan.backend, "complete": self.complete, "resumed_samples": self.journal.resumed,
            "resumed": self.resumed(),
            "left_out": [*self.left_out, *([] if self.complete else ["what was to come after it was interrupted"])],
            "curves": summary.summarize(self.journal, order, self.plan.vcpus, times=self.host.kind != COUNTED)}
        document["ratios"] = summary.ratios(document, self.plan.strategies) if self.host.kind != COUNTED else []
        document["model"] = self._model(document)
        return document

    def _model(self, document: dict[str, Any]) -> dict[str, Any] | None:
        """The model beside what was measured, where it was calibrated on this machine."""
        if self.host.kind != MEASURED or not self.host.layouts() or not document["curves"].keys() & STRATEGIES.keys():
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
        return beside_measured(document, self.host.layouts(), calibration, self.host.capabilities())


def _in_turn(subjects: Sequence[Subject], number: int) -> Iterator[Subject]:
    """Another one begins in each round: who comes after whom must not matter."""
    shift = number % len(subjects)
    yield from (*subjects[shift:], *subjects[:shift])


def print_result(document: dict[str, Any]) -> None:
    """The document as tables, and where the plots are."""
    summary.print_document(document)
    for path in document.get("plots", ()):
        print(path)
