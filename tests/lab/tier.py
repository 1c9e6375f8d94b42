"""The tier of tests that boot real kernels: when it can run, and what a newcomer is told when it can't."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.lab import cache, fetch, kernels, tools
from tests.lab.kernels import Kernel
from tests.lab.rows import Summary

in_guests: list[str] = []
"""Lines about test runs in guests, for the end of this run: counts, and what was skipped there and why."""


totals: Counter[str] = Counter()
"""Tests inside guests, of all kernels: how many passed, failed, …, in pytest's words and by its own count there."""

kernels_with_tests: set[str] = set()
_RAN = ("passed", "failed", "error")


def ran_in_guest(kernel: Kernel, row: str, found: Summary, seconds: float) -> None:
    """Keep the summary of a test run in a guest."""
    words = ", ".join(f"{number} {word}" for word, number in found.counts.items()) or "no word about its tests"
    in_guests.append(f"{row} in {kernel.name}: {words} in {seconds:.0f} s of the emulated clock")
    in_guests.extend(f"  {skip}" for skip in found.skips)
    totals.update(found.counts)
    kernels_with_tests.add(kernel.name)


def inside() -> str:
    """What the tier's own count leaves out: tests inside the kernels; "" where there were none."""
    if not kernels_with_tests:
        return ""
    ran, passed = sum(totals[word] for word in _RAN), totals["passed"]
    count = len(kernels_with_tests)
    failed = f", {ran - passed} failed" if ran > passed else ""
    return f"{ran} tests ran inside {count} kernel{'s' if count > 1 else ''}{failed}, {totals['skipped']} skipped there"


REQUIRED_ENV = "MIGSTREAM_LAB_REQUIRED"
"""Set to 1 where the tier has to run, as in CI: what would be skipped fails instead."""


def unavailable(kernel: Kernel) -> str | None:
    """Why tests can't boot this kernel here, in one line with the command that helps; None if they can."""
    if "MIGSTREAM_LAB" in os.environ:
        return "this is a lab guest; it has no lab of its own"
    packages = tools.missing((kernels.arch(kernel.arch).emulator, "setpriv"))
    if packages:
        return f"no emulator for the kernel lab; run: apt-get install {' '.join(packages)}"
    found = {item.status(cache.cache_root())[0] for item in fetch.items([kernel])}
    # The same words for every kernel, so that pytest's summary has one line for all of them.
    return None if found == {fetch.Status.READY} else f"the lab's kernels are not fetched; run: {cache.FETCH}"


def need(kernel: Kernel) -> None:
    """Skip the calling test, or fail it where the tier is required, when this kernel can't be booted."""
    reason = unavailable(kernel)
    if reason and os.environ.get(REQUIRED_ENV) == "1":
        pytest.fail(f"{REQUIRED_ENV}=1, but {reason}")
    if reason:
        pytest.skip(reason)
