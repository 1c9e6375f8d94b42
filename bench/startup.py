"""`python -m bench startup`: how long a command takes from nothing, beside the bare interpreter."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure import interleaved, machine
from bench.options import number_of_rounds
from bench.restores import saved_stream
from migstream.backends import open_backend
from migstream.show import Table, milliseconds, print_pairs, print_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=number_of_rounds, default=21, help="interleaved rounds")
    parser.add_argument("--backend", default="auto", help="where the guest is saved: auto, kvm, sim")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """See `measure`."""
    return measure(options.rounds, options.backend, tell)


def measure(rounds: int, backend_name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure and return the document that `--json` prints; times in ns."""
    backend = open_backend(backend_name)
    with tempfile.TemporaryDirectory(prefix="migstream-") as folder:
        path = Path(folder) / "512.mig"
        tell("saving a guest of 512 vCPUs")
        path.write_bytes(saved_stream(backend, 512))
        commands = {
            "bare interpreter": ["-c", "pass"],
            "migstream --version": ["-m", "migstream", "--version"],
            "migstream inspect, 512 vCPUs": ["-m", "migstream", "inspect", str(path)],
            "migstream verify, 512 vCPUs": ["-m", "migstream", "verify", str(path)],
        }
        timings = interleaved({name: _runner(words) for name, words in commands.items()}, rounds, tell=tell)
    medians = {name: timing.median for name, timing in timings.items()}
    return {"machine": machine(), "rounds": rounds, "median_ns": medians,
            "p99_ns": {name: timing.p99 for name, timing in timings.items()},
            "ratios": {name: ns / medians["bare interpreter"] for name, ns in medians.items()}}


def _runner(words: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


def print_result(result: dict[str, Any]) -> None:
    """The document as a table."""
    print_pairs([("start-up", f"{result['rounds']} interleaved rounds, {result['machine']['cpu']}")])
    print_table(Table(("command", ">median", ">p99", ">x bare interpreter"), [
        (name, milliseconds(int(ns)), milliseconds(int(result["p99_ns"][name])), f"{result['ratios'][name]:.2f}")
        for name, ns in result["median_ns"].items()]))
