"""`python -m bench simulator`: how long the simulator itself takes to restore a stream. Its own wall time, not KVM's.

A whole restore: read, check, decompress, plan, make the VM, write every register of every vCPU by the simulated
kernel's rules. The guest is the demo's, installed and not run, so that registers differ from vCPU to vCPU.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.measure import interleaved, machine
from bench.options import number_of_rounds
from migstream.backends.base import Backend
from migstream.backends.sim import SimBackend
from migstream.demo import run as demo
from migstream.host import profiles
from migstream.model import Arch, Machine, Scope
from migstream.registers import vcpu_features
from migstream.report import Report
from migstream.show import Table, milliseconds, print_pairs, print_table, size
from migstream.transport import restore, save

KERNELS = ("x86_64-7.2", "arm64-6.12")
VCPUS = {512: 0.2, 4096: 2.0}
"""vCPU counts, and the seconds that a restore is to stay below."""

_FEATURES = vcpu_features.parse("sve,ptrauth")
"""arm64: more registers than a default vCPU has; no interrupt controller, which ends at 512 vCPUs."""


@dataclass(frozen=True)
class Saved:
    """A stream, and what is in it for each vCPU."""

    backend: Backend
    stream: bytes
    registers: int
    words: int

    def restore(self) -> Report:
        """Restore it once, and let go of the VM."""
        vm, report = restore(io.BytesIO(self.stream), self.backend)
        vm.close()
        return report


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=number_of_rounds, default=11, help="interleaved rounds")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """See `measure`."""
    return measure(options.rounds, tell)


def measure(rounds: int, tell: Callable[[str], None], vcpus: dict[int, float] | None = None) -> dict[str, Any]:
    """Measure and return the document that `--json` prints; times in ns."""
    counts, things = vcpus or VCPUS, {}
    for name in KERNELS:
        for count in counts:
            tell(f"saving {count} vCPUs on sim:{name}")
            things[name, count] = saved(name, count)
    timings = interleaved({f"{name} {count}": thing.restore for (name, count), thing in things.items()}, rounds,
                          tell=tell)
    rows = [{"kernel": name, "vcpus": count, "registers": thing.registers, "words": thing.words,
             "stream": len(thing.stream), "median_ns": timings[f"{name} {count}"].median,
             "worst_ns": max(timings[f"{name} {count}"].samples), "goal_ns": counts[count] * 1e9}
            for (name, count), thing in things.items()]
    return {"machine": machine(), "rounds": rounds, "time": "wall time of the simulator itself", "rows": rows}


def saved(kernel: str, vcpus: int) -> Saved:
    """A guest of so many vCPUs on a kernel that allows them."""
    known = profiles.load(kernel)
    most = {"MAX_VCPUS": max(known.max_vcpus, vcpus)}
    backend, out = SimBackend(replace(known, capabilities={**known.capabilities, **most})), io.BytesIO()
    guest = demo.guest_for(known.arch)
    with backend.create(_machine(known.arch, vcpus), demo.BOARDS[known.arch].caps) as vm:
        vm.create_vcpus()
        guest.install(vm, known.cpuid, known.capabilities)
        save(vm, out, host=backend.summary(), pause=vm.pause)
        layouts = [layout for layout in vm.layouts()[0] if layout.scope == Scope.VCPU]
    return Saved(backend, out.getvalue(), sum(len(layout.slots) for layout in layouts),
                 sum(layout.row_words for layout in layouts))


def _machine(arch: Arch, vcpus: int) -> Machine:
    made = demo.machine(arch, vcpus, 16 << 20)
    return replace(made, devices={"vcpu_features": _FEATURES}) if arch == Arch.ARM64 else made


def print_result(result: dict[str, Any]) -> None:
    """The document as a table."""
    print_pairs([("simulator", f"wall time of whole restores by the simulator itself, not KVM's; {result['rounds']} "
                               f"interleaved rounds, {result['machine']['cpu']}")])
    print_table(Table(("kernel", ">vCPUs", ">registers a vCPU", ">64-bit words", ">stream", ">median", ">worst",
                       ">goal"), [
        (row["kernel"], str(row["vcpus"]), str(row["registers"]), str(row["words"]), size(row["stream"]),
         milliseconds(int(row["median_ns"])), milliseconds(int(row["worst_ns"])),
         f"below {milliseconds(int(row['goal_ns']))}") for row in result["rows"]]))
