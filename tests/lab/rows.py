"""Several commands in one boot of a kernel, and what each came to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.lab import boot
from tests.lab.errors import LabError
from tests.lab.kernels import Kernel

_ROWS = re.compile(r"^== lab row (\S+) begins\n(.*?)^== lab row \1 ends (-?\d+) ([\d.]+)$", re.DOTALL | re.MULTILINE)
_COUNT = re.compile(r"\b(\d+) (passed|failed|skipped|errors?)\b")
_SKIP = re.compile(r"^SKIPPED .*$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command for a guest: its name (one word), and how many seconds it may take there."""

    name: str
    words: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """What a command came to; `seconds` in the guest, whose clock is an emulator's."""

    status: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Summary:
    """The last line of a pytest run, as numbers by its words, and its lines about what was skipped."""

    counts: dict[str, int] = field(default_factory=dict)
    skips: tuple[str, ...] = ()


def run(kernel: Kernel, commands: Sequence[Command], boot_limit_s: float = boot.BOOT_LIMIT_S) -> dict[str, Outcome]:
    """Boot once and run all, in their order; outcomes by name.

    Raises: LabError as `boot.run`, and where the guest ended before the last command.
    """
    rows = json.dumps([(one.name, one.words, one.limit_s) for one in commands])
    limit_s = boot_limit_s + sum(one.limit_s for one in commands)
    result = boot.run(kernel, ["python3", "tests/lab/guest/rows.py", rows], time_limit_s=limit_s)
    outcomes = parse(result.stdout.decode(errors="replace"))
    if missing := [one.name for one in commands if one.name not in outcomes]:
        raise LabError(f"{kernel.name}: {missing[0]} did not end: {result.stderr.decode(errors='replace')[-500:]}")
    return outcomes


def parse(text: str) -> dict[str, Outcome]:
    """Outcomes by name, from what a guest's rows.py printed."""
    return {name: Outcome(int(status), output, float(seconds)) for name, output, status, seconds in _ROWS.findall(text)}


def summary(output: str) -> Summary:
    """What a pytest run in a guest says at its end; no counts where it says nothing."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r" in [\d.]+s\b", line)), "")
    counts = {word.rstrip("s") if word.startswith("error") else word: int(n) for n, word in _COUNT.findall(last)}
    return Summary(counts, tuple(_SKIP.findall(output)))
