"""Timing of several things side by side: interleaved rounds, medians, one process."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Wall times of one thing, ns, in the order of the rounds."""

    samples: tuple[int, ...]

    @property
    def median(self) -> float:
        """ns."""
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        """ns; the worst sample where there are fewer than a hundred."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def interleaved(things: Mapping[str, Callable[[], object]], rounds: int, slow: Mapping[str, int] | None = None,
                tell: Callable[[str], None] = lambda _: None) -> dict[str, Timing]:
    """Run each thing once a round, so that a change of the machine's mood hits all alike.

    Args:
        slow: things that get fewer rounds than `rounds`, by name.
    """
    limits = {name: (slow or {}).get(name, rounds) for name in things}
    samples: dict[str, list[int]] = {name: [] for name in things}
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for name, thing in things.items():
            if number < limits[name]:
                start = time.perf_counter_ns()
                thing()
                samples[name].append(time.perf_counter_ns() - start)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from migstream.backends.kvm.backend import cpu_model

    return {"cpu": cpu_model(), "cpus": os.cpu_count(), "kernel": platform.release(),
            "python": platform.python_version(), "implementation": sys.implementation.name, "system": platform.system()}


def software() -> dict[str, str | None]:
    """What of ours measured: version, commit (None outside a checkout), and whether the compiled part is there."""
    from migstream import __version__, native

    return {"migstream": __version__, "revision": _revision(), "native": native.DESCRIPTION}


def _revision() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--match="],
                              capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def microseconds(ns: float) -> str:
    """A time for a table."""
    return f"{ns / 1000:,.1f}"
