"""`python -m bench lock`: one write for each vCPU, by one thread and by several, for real and in the model.

Real KVM: `lock.c` writes a register through each vCPU (or, for the VM's own state, as often). Model: the same bursts
with the costs of a calibration, threads at a VM-wide lock as a discrete-event system; its error is printed beside it.
Then the model alone, to 4096 vCPUs and 128 threads, as if the calibrated machine had that many CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import Timing, machine
from bench.model import load_calibration
from bench.options import number_of_rounds
from bench.program import LeftOut, Talk, build
from migstream.backends import open_backend
from migstream.backends.sim.costs import Calibration, Segment, Work, elapsed
from migstream.errors import BackendUnavailable, OutputError
from migstream.model import Arch
from migstream.show import Table, print_pairs, print_table

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Write:
    """A write that is done once for each vCPU.

    Attributes:
        command: for `lock.c`. cost: in a calibration. what: for people.
    """

    command: str
    cost: str
    what: str


WRITES = (
    Write("lstar", "set MSRs", "vCPU-scoped: MSR_LSTAR of each vCPU"),
    Write("wall-clock", "set MSRs", "VM-scoped, no lock: MSR_KVM_WALL_CLOCK through each vCPU"),
    Write("clock", "set KVM_CLOCK", "VM-scoped, loops over all vCPUs: KVM_SET_CLOCK"),
    Write("ioapic", "set KVM_IRQCHIP_IOAPIC", "VM-scoped, loops under the VM's lock: KVM_SET_IRQCHIP (IOAPIC)"),
)
LAPIC_WAYS = {
    "in-order": "vCPU 0 to N-1, one thread: what a restore does",
    "reversed": "vCPU N-1 to 0",
    "again": "a second time, the same values",
    "while-disabled": "APICs disabled in the APIC base before; their LAPICs written and enabled again (timed)",
    "sregs-alone": "GET and SET of SREGS2 without a change: what of the way above is not the APIC",
    "threads": "shared among a thread for each CPU",
    "32-threads": "shared among 32 threads: those that wait for the map's mutex leave the rebuild to one of them",
    "software-off": "in order, with APICs that their guest has not enabled (SPIV bit 8), as the demo's guest's",
    "as-created": "each as soon as its vCPU is made, when there are few: no way for a pause, it shows the loop",
    "without-ioapic": "in a VM with KVM_CAP_SPLIT_IRQCHIP: without the requests to all vCPUs to look at an IOAPIC",
    "msrs": "nine registers of it as x2APIC MSRs: no map is made, but ISR, IRR and the timer are left out",
}
"""Ways to write all LAPICs of a fresh VM, for `lock.c`."""

VCPUS, QUICK_VCPUS = (1, 16, 64, 128, 256, 512, 1024), (1, 64, 256)
LEAST_LAPICS = 64
FAR_VCPUS, FAR_THREADS = (64, 256, 1024, 4096), (1, 2, 8, 32, 128)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK_VCPUS[-1]} vCPUs")
    parser.add_argument("--reps", type=number_of_rounds, default=20, help="interleaved rounds")
    parser.add_argument("--calibration", type=Path, help="of `python -m bench calibrate` (default: the one kept here)")
    parser.add_argument("-o", dest="folder", type=Path, default=Path("lock"), help="directory of the results")


def run(options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Measure, model and return the document that `--json` prints; times in ns. Raises: MigstreamError."""
    calibration, left_out = load_calibration(options.calibration), []
    model, found, complete = far(calibration), Found(), True
    _make(options.folder)
    try:
        measure(QUICK_VCPUS if options.quick else VCPUS, options.reps, tell, found)
    except (LeftOut, BackendUnavailable) as reason:
        left_out.append(f"real KVM: {reason}")
    except KeyboardInterrupt:
        if not found.bursts:
            raise
        complete = False
        left_out.append("what was to come after the interruption")
    for at in found.bursts:
        at["modelled"] = modelled(calibration, _write(at["write"]), at["vcpus"], at["threads"])
        at["error"] = at["modelled"] / at["p50"] - 1
    document = {"bench": "lock", "machine": machine(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "calibration": {"machine": dict(calibration.machine), "method": calibration.method,
                                "handoff": calibration.handoff},
                "complete": complete, "measured": found.bursts, "lapic": found.lapics, "model": model,
                "left_out": left_out}
    _save(options.folder, document)
    return document


def _write(command: str) -> Write:
    return next(write for write in WRITES if write.command == command)


@dataclass
class Found:
    """What was measured so far, a row for each vCPU count and thing; of an interrupted one the rounds that ended."""

    bursts: list[dict[str, Any]] = field(default_factory=list)
    lapics: list[dict[str, Any]] = field(default_factory=list)


def measure(counts: Sequence[int], rounds: int, tell: Tell, found: Found) -> None:
    """Bursts of writes, and ways to write LAPICs, on real KVM. Raises: LeftOut, BackendUnavailable."""
    backend = open_backend("kvm")
    if backend.arch != Arch.X86_64:
        raise LeftOut(f"lock.c is for x86-64, this host is {backend.arch.label}")
    with tempfile.TemporaryDirectory(prefix="migstream-") as folder, Talk(build("lock", Path(folder))) as talk:
        for vcpus in (n for n in counts if n <= backend.profile().max_vcpus):
            talk.ask(f"vm {vcpus}")
            tell(f"{vcpus} vCPUs")
            bursts = [({"vcpus": vcpus, "write": write.command, "threads": threads}, _burst(talk, write, threads))
                      for write in WRITES for threads in sorted({1, os.cpu_count() or 1}) if threads <= vcpus]
            _rounds(found.bursts, bursts, rounds)
            ways = LAPIC_WAYS if vcpus >= LEAST_LAPICS else ()
            _rounds(found.lapics, [({"vcpus": vcpus, "way": way}, _lapic(talk, vcpus, way)) for way in ways], rounds)


def _spread(timing: Timing) -> dict[str, Any]:
    return {"samples": len(timing.samples), "p50": timing.median, "p99": timing.p99, "max": max(timing.samples)}


def _lapic(talk: Talk, vcpus: int, way: str) -> Callable[[], int]:
    return lambda: int(talk.ask(f"lapic {vcpus} {way}"))


def _burst(talk: Talk, write: Write, threads: int) -> Callable[[], int]:
    return lambda: int(talk.ask(f"burst {write.command} {threads}"))


def _rounds(out: list[dict[str, Any]], things: Sequence[tuple[dict[str, Any], Callable[[], int]]],
            rounds: int) -> None:
    """Each thing once a round, the C program's own times; `out` gets a row for each, whatever ends this too early."""
    done: list[list[int]] = []
    try:
        for _ in range(rounds):
            done.append([thing() for _, thing in things])
    finally:
        if done:
            out += [{**row, **_spread(Timing(samples))}
                    for (row, _), samples in zip(things, zip(*done, strict=True), strict=True)]


def modelled(calibration: Calibration, write: Write, vcpus: int, threads: int) -> float:
    """ns that the model gives for a burst: one write a vCPU, divided among threads, each on a CPU of its own."""
    cost = calibration.cost(write.cost)
    total, held = cost.total(vcpus), cost.held(vcpus)
    alone = threads == 1
    rows = [vcpus // threads + (k < vcpus % threads) for k in range(min(threads, vcpus))]
    if alone or not held:
        return elapsed([Work(n, (), total * (1 if alone else cost.parallel)) for n in rows], calibration.handoff)
    return elapsed([Work(n, (Segment(total - held, held),)) for n in rows], calibration.handoff)


def far(calibration: Calibration) -> list[dict[str, Any]]:
    """The model alone, where no machine was: ns for a burst, and for one write instead."""
    return [{"write": write.command, "vcpus": vcpus, "threads": threads,
             "modelled": modelled(calibration, write, vcpus, threads),
             "once": calibration.cost(write.cost).total(vcpus)}
            for write in WRITES for vcpus in FAR_VCPUS for threads in FAR_THREADS if threads <= vcpus]


def _save(folder: Path, document: dict[str, Any]) -> None:
    from bench import plot

    try:
        document["plots"] = [str(path) for path in plot.draw_lock(document, folder)]
        with plot.whole(folder / "lock.json") as path:
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}") from error


def _make(folder: Path) -> None:
    """The directory of the results, before anything is measured. Raises: OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}") from error


def print_result(document: dict[str, Any]) -> None:
    """The document as tables."""
    own, kept = document["machine"], document["calibration"]["machine"]
    print_pairs([("lock", f"{own['cpu']}, {own['cpus']} CPUs, {own['kernel']}; {document['date']}"),
                 ("calibration", f"{kept['cpu']}, {kept.get('cpus')} CPUs, {kept['kernel']}: "
                                 f"{document['calibration']['method']}"),
                 *((write.command, write.what) for write in WRITES),
                 *(("left out", reason) for reason in document["left_out"])])
    if document["measured"]:
        print_table(Table(("one write a vCPU", ">vCPUs", ">threads", ">p50 ms", ">p99", ">max", ">MODELLED ms",
                           ">model's error"), [
            (at["write"], str(at["vcpus"]), str(at["threads"]), *(_ms(at[key]) for key in ("p50", "p99", "max")),
             _ms(at["modelled"]), f"{at['error']:+.0%}") for at in document["measured"]]))
    _print_lapics(document)
    threads = FAR_THREADS
    cells = {(at["write"], at["vcpus"], at["threads"]): at for at in document["model"]}
    print_table(Table(("MODELLED, not measured", ">vCPUs", *(f">{n} thr. ms" for n in threads), ">once, ms"), [
        (write.command, str(vcpus), *(_ms(at["modelled"]) if (at := cells.get((write.command, vcpus, n))) else ""
                                      for n in threads), _ms(cells[write.command, vcpus, 1]["once"]))
        for write in WRITES for vcpus in FAR_VCPUS]))
    for path in document.get("plots", ()):
        print(path)


def _print_lapics(document: dict[str, Any]) -> None:
    if document["lapic"]:
        print_table(Table(("KVM_SET_LAPIC of all vCPUs", ">vCPUs", ">p50 ms", ">us a vCPU", "what"), [
            (at["way"], str(at["vcpus"]), _ms(at["p50"]), f"{at['p50'] / at['vcpus'] / 1e3:.1f}", LAPIC_WAYS[at["way"]])
            for at in document["lapic"]]))


def _ms(ns: float) -> str:
    return f"{ns / 1e6:,.3f}"
