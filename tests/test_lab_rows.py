"""Several commands in one boot: what a guest's runner prints is what the lab reads."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.lab import rows
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
