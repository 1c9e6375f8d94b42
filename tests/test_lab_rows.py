"""Several commands in one boot: what a guest's runner prints is what the lab reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests import conftest
from tests.lab import kernels, rows, tier
from tests.lab.guest import rows as guest


def test_what_the_runner_prints_is_read_back() -> None:
    commands = [("good", ["sh", "-c", "echo out; echo err >&2"], 60),
                ("bad", ["sh", "-c", "printf no-newline; exit 3"], 60), ("slow", ["sleep", "1000"], 0.1)]
    printed = subprocess.run([sys.executable, guest.__file__, json.dumps(commands)], capture_output=True, text=True)
    found = rows.parse(printed.stdout)
    assert {name: (one.status, one.output.split()) for name, one in found.items()} == {
        "good": (0, ["out", "err"]), "bad": (3, ["no-newline"]), "slow": (guest.TIMED_OUT, [])}


def test_a_row_that_did_not_end_is_not_there() -> None:
    assert rows.parse(f"{guest.MARK}one begins\nhalf of it\n") == {}


def test_the_summary_of_a_test_run() -> None:
    said = ("..s.\nSKIPPED [2] tests/x.py:1: for a reason\n"
            "1 failed, 44 passed, 2 skipped, 416 deselected, 1 error in 20.30s\n")
    assert rows.summary(said) == rows.Summary({"failed": 1, "passed": 44, "skipped": 2, "error": 1},
                                              ("SKIPPED [2] tests/x.py:1: for a reason",))
    assert rows.summary("Traceback\nImportError: no pytest\n").counts == {}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No guest has run tests yet."""
    for name in ("totals", "in_guests", "kernels_with_tests"):
        monkeypatch.setattr(tier, name, type(getattr(tier, name))())


def last_line() -> str:
    """The lab's part of the line with the tiers, after three of its tests."""
    line = conftest.tiers_line(Counter({conftest.LAB: 3}), Counter({"unit": 1}), tier.inside())
    assert line.startswith("tiers: unit: 0 ran, 1 skipped · ")
    return line.rsplit(" · ", 1)[-1]


@pytest.mark.usefixtures("fresh")
def test_the_tiers_say_how_many_tests_ran_inside_the_kernels() -> None:
    assert last_line() == "kernel lab: 3 ran"
    new, old = kernels.kernel("arm64", "6.12"), kernels.kernel("arm64", "5.10")
    said = "SKIPPED [2] tests/x.py:1: for a reason\n41 passed, 2 skipped, 416 deselected in 20.30s\n"
    tier.ran_in_guest(new, "contract", rows.summary(said), 20.3)
    assert last_line() == "kernel lab: 3 ran, 41 tests ran inside 1 kernel, 2 skipped there"
    tier.ran_in_guest(new, "recorded", rows.summary("9 passed in 1.00s\n"), 1)
    said = "1 failed, 5 passed, 1 skipped, 2 errors in 61.02s (0:01:01)\n"
    tier.ran_in_guest(old, "contract", rows.summary(said), 61)
    assert last_line() == "kernel lab: 3 ran, 58 tests ran inside 2 kernels, 3 failed, 3 skipped there"
    assert tier.in_guests[:2] == ["contract in arm64-6.12: 41 passed, 2 skipped in 20 s of the emulated clock",
                                  "  SKIPPED [2] tests/x.py:1: for a reason"]


@pytest.mark.usefixtures("fresh")
def test_a_guest_that_says_nothing_of_its_tests_counts_for_none() -> None:
    tier.ran_in_guest(kernels.kernel("arm64", "6.12"), "contract", rows.summary("Killed\n"), 1)
    assert last_line() == "kernel lab: 3 ran, 0 tests ran inside 1 kernel, 0 skipped there"
    assert "no word" in tier.in_guests[0]
