"""`python -m tests.fidelity`: how many random sequences the simulator answers as the real kernel does.

What is not compared is printed with its reason. The last line is `N sequences of C or more calls, M calls, D
divergences, seed S, kernel K`. Exit status: 0 none diverges, 1 some do, 64 misuse, 69 the kernel can't be had here, and
the lab's own for a lab that failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from migstream.backends.kvm import KvmBackend
from migstream.errors import BackendUnavailable, MigstreamError, UsageError
from migstream.host import profiles
from migstream.host.profile import HostProfile
from tests.fidelity import answers, driver, guest, recorded
from tests.fidelity.vocabularies import VOCABULARIES, vocabulary
from tests.lab import boot, kernels, tier
from tests.lab.errors import LabError

HOST = "host"
"""This machine's own KVM; every other name is a recorded profile of a lab kernel."""

MOST_SHRUNK = 5
"""Divergences that are made short and printed; one rule that is missing makes hundreds."""


@dataclass
class Outcome:
    """What a run found. `fewest` calls are in the shortest of the sequences."""

    kernel: str
    seed: int
    sequences: int
    calls: int
    fewest: int
    divergences: list[int] = field(default_factory=list)
    tests: str = ""
    excluded: list[dict[str, str]] = field(default_factory=list)

    def line(self) -> str:
        """The figures in one line."""
        return (f"{self.sequences} sequences of {self.fewest} or more calls, {self.calls} calls, "
                f"{len(self.divergences)} divergences, seed {self.seed}, kernel {self.kernel}")


def on_host(seed: int, sequences: int, calls: int) -> Outcome:
    """Compare with this machine's KVM. Raises: BackendUnavailable."""
    real = KvmBackend()
    name, profile = _here(real)
    packed = guest.record(real, profile, seed, calls, range(sequences))
    found = guest.compare(profile, seed, calls, range(sequences), packed)
    out = _outcome(name, profile, seed, sequences, calls, found)
    shrunk = (guest.shrunk(real, profile, seed, calls, index) for index in out.divergences[:MOST_SHRUNK])
    tests = "\n\n".join(recorded.pasteable(one, name, profile.arch, seed) for one in shrunk if one)
    out.tests = tests + recorded.not_shown(out.divergences, MOST_SHRUNK)
    return out


def _here(real: KvmBackend) -> tuple[str, HostProfile]:
    """The recorded profile of this machine's kernel, or one that is captured now."""
    here = real.profile()
    for name in profiles.names():
        known = profiles.load(name)
        if (known.arch, known.kernel, known.cpu, known.msrs) == (here.arch, here.kernel, here.cpu, here.msrs):
            return name, known
    from migstream.host.probe import capture

    return f"host ({here.kernel})", capture(real, "tests.fidelity")


def in_lab(name: str, seed: int, sequences: int, calls: int, time_limit_s: float = boot.TIME_LIMIT_S,
           kept: Path | None = None) -> Outcome:
    """Compare with a lab kernel: one boot for all sequences, one more where some diverge.

    `kept`: a file of answers of before, or where to keep those of now. Raises: LabError, UsageError.
    """
    profile, kernel = profiles.load(name), _lab_kernel(name)

    def record() -> bytes:
        return _in_guest(kernel, ("record", name, seed, calls, _ANSWERS, 0, sequences), time_limit_s)

    packed = answers.kept(kept, answers.digest(profile, seed, calls, sequences), record) if kept else record()
    found = guest.compare(profile, seed, calls, range(sequences), packed)
    out = _outcome(name, profile, seed, sequences, calls, found)
    if out.divergences:
        shown = out.divergences[:MOST_SHRUNK]
        tests = _in_guest(kernel, ("shrink", name, seed, calls, _ANSWERS, *shown), time_limit_s).decode()
        out.tests = tests + recorded.not_shown(out.divergences, MOST_SHRUNK)
    return out


_ANSWERS = "answers"


def _in_guest(kernel: kernels.Kernel, words: Sequence[object], time_limit_s: float) -> bytes:
    command = ("python3", "-m", "tests.fidelity.guest", *map(str, words))
    result = boot.run(kernel, command, time_limit_s=time_limit_s)
    if result.status:
        raise LabError(f"status {result.status} in the guest: {result.stderr.decode(errors='replace').strip()}")
    return next(file.data for file in result.files if file.name.name == _ANSWERS)


def _lab_kernel(name: str) -> kernels.Kernel:
    arch, _, version = name.partition("-")
    found = kernels.select(arch, version)[0]
    if reason := tier.unavailable(found):
        raise BackendUnavailable(reason)
    return found


def _outcome(name: str, profile: HostProfile, seed: int, sequences: int, calls: int,
             found: list[driver.Divergence]) -> Outcome:
    words = vocabulary(profile.arch)
    made = [len(driver.story(words, profile, seed, index, calls)) for index in range(sequences)]
    return Outcome(name, seed, sequences, sum(made), min(made, default=0), [one.index for one in found],
                   excluded=[row._asdict() for row in words.excluded])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.excluded:
        return _print_excluded(options.json)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    try:
        if options.kernel is None:
            raise UsageError("which kernel? --kernel host, or one of migstream host list")
        if options.kernel == HOST:
            out = on_host(seed, options.sequences, options.calls)
        else:
            out = in_lab(options.kernel, seed, options.sequences, options.calls, options.time_limit, options.answers)
    except MigstreamError as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return error.exit_status
    except LabError as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return error.status
    _print(out, options.json)
    return 1 if out.divergences else 0


def _print(out: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"migstream_json": 1, "command": "fidelity", **asdict(out)}))
        return
    if out.tests:
        print(out.tests)
    for row in out.excluded:
        print(f"not compared: {row['what']}: {row['reason']}")
    print(out.line())


def _print_excluded(as_json: bool) -> int:
    rows = {arch.label: [row._asdict() for row in vocabulary(arch).excluded] for arch in sorted(VOCABULARIES)}
    if as_json:
        print(json.dumps({"migstream_json": 1, "command": "fidelity", "excluded": rows}))
        return 0
    for name, found in rows.items():
        print("\n".join(f"{name}: {row['what']}: {row['reason']}" for row in found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fidelity", description=__doc__)
    parser.add_argument("--kernel", metavar="NAME", help="host, or a lab kernel: x86_64-7.2, arm64-6.12, …")
    parser.add_argument("--sequences", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, metavar="S", help="a new one each time, which is printed")
    parser.add_argument("--calls", type=int, default=30, metavar="N", help="calls of each sequence (30)")
    parser.add_argument("--time-limit", type=float, default=boot.TIME_LIMIT_S, metavar="S", help="of a lab run (600)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="of a lab kernel: compare with those that FILE "
                        "holds; where there is no FILE, keep the kernel's answers there")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--excluded", action="store_true", help="what is not compared, and why")
    return parser


if __name__ == "__main__":
    sys.exit(main())
