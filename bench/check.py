"""`python -m bench check`: a stream of 512 vCPUs judged against 100 host profiles, and where the time goes.

The profiles are files, as captured ones are: recorded profiles of the architecture in turn, each under another CPU's
name, so that no answer can be kept from one for the next. The whole command is timed from nothing, as a process.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.measure import interleaved, machine
from bench.options import number_of_rounds
from migstream.backends import open_backend
from migstream.demo import run as demo
from migstream.host import profiles
from migstream.host.profile import from_json, to_json
from migstream.model import Arch
from migstream.plan import plan_for
from migstream.show import Table, milliseconds, print_pairs, print_table
from migstream.survey import survey
from migstream.verdicts.model import Saved

VCPUS, HOSTS, MEMORY = 512, 100, 64 << 20
SAVED_ON = {Arch.ARM64: "arm64-7.2", Arch.X86_64: "x86_64-7.2"}
FAILS = (0, 10, 11)
"""Exit statuses of `check` that are answers."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=number_of_rounds, default=11, help="interleaved rounds")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """See `measure`."""
    return measure(options.rounds, tell)


def measure(rounds: int, tell: Callable[[str], None], vcpus: int = VCPUS, hosts: int = HOSTS) -> dict[str, Any]:
    """Measure and return the document that `--json` prints; times in ns."""
    with tempfile.TemporaryDirectory(prefix="migstream-") as folder:
        things: dict[str, Callable[[], object]] = {}
        for arch, name in SAVED_ON.items():
            tell(f"saving {vcpus} vCPUs on sim:{name}")
            stream = _save(Path(folder) / f"{name}.mig", name, vcpus)
            files = _profiles(Path(folder), arch, hosts)
            things |= {f"{arch.label}: {what}": thing for what, thing in _things(stream, files).items()}
        timings = interleaved(things, rounds, tell=tell)
    return {"machine": machine(), "vcpus": vcpus, "hosts": hosts, "rounds": rounds, "saved_on": list(SAVED_ON.values()),
            "median_ns": {name: timing.median for name, timing in timings.items()},
            "p99_ns": {name: timing.p99 for name, timing in timings.items()}}


def _save(path: Path, name: str, vcpus: int) -> Path:
    backend = open_backend(f"sim:{name}")
    with path.open("wb") as out:
        demo.run_and_save(backend, demo.machine(backend.arch, vcpus, MEMORY), out)
    return path


def _profiles(folder: Path, arch: Arch, count: int) -> list[Path]:
    known = [profiles.load(name) for name in profiles.names() if name.startswith(arch.label)]
    out = []
    for number, profile in enumerate(islice(cycle(known), count)):
        out.append(folder / f"{arch.label}-{number}.json")
        out[-1].write_text(to_json(replace(profile, cpu=f"{profile.cpu}, host {number}")))
    return out


def _things(stream: Path, files: Sequence[Path]) -> dict[str, Callable[[], object]]:
    data, texts = stream.read_bytes(), [path.read_text() for path in files]
    guest, hosts = _guest(data), [from_json(text) for text in texts]
    command = [sys.executable, "-m", "migstream", "check", str(stream)]
    for path in files:
        command += ["--host", str(path)]
    return {
        "read the stream": lambda: _guest(data),
        "read the profiles": lambda: [from_json(text) for text in texts],
        "judge": lambda: [plan_for(guest, host) for host in hosts],
        "migstream check, from nothing": lambda: _check(command),
    }


def _guest(data: bytes) -> Saved:
    seen = survey(io.BytesIO(data))
    assert seen.reader.machine is not None
    return Saved.of(seen.reader.machine, seen.reader.layouts, [bank.decode() for bank in seen.banks], seen.contract())


def _check(command: Sequence[str]) -> None:
    status = subprocess.run(command, capture_output=True, check=False).returncode
    if status not in FAILS:
        raise RuntimeError(f"check ended with status {status}")


def print_result(result: dict[str, Any]) -> None:
    """The document as a table."""
    print_pairs([("check", f"{result['vcpus']} vCPUs, saved on {' and '.join(result['saved_on'])} (simulated), against "
                           f"{result['hosts']} profile files; {result['rounds']} interleaved rounds"),
                 ("machine", f"{result['machine']['cpu']}, Python {result['machine']['python']}")])
    print_table(Table(("what", ">median", ">p99"), [
        (name, milliseconds(int(ns)), milliseconds(int(result["p99_ns"][name])))
        for name, ns in result["median_ns"].items()]))
