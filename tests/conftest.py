"""What all tests share: the tiers, counted at the end of each run, and the simulator and KVM as fixtures."""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

_SIMULATOR = re.compile(r"(^|/)(contract/|test_sim_)")
"""Places whose tests run a simulated kernel unless they are marked for a real one."""

LAB = "kernel lab"
TIERS = ("unit", "simulator", "real KVM x86", "real KVM arm64", LAB)
_counts: Counter[str] = Counter()
_skipped: Counter[str] = Counter()


def tier(nodeid: str, markers: set[str]) -> str:
    """The tier that a test belongs to: what it needs decides, not where it lies."""
    if "lab" in markers:
        return LAB
    if "kvm_arm64" in markers:
        return "real KVM arm64"
    if "kvm" in markers:
        return "real KVM x86"
    return "simulator" if "sim" in markers or _SIMULATOR.search(nodeid) else "unit"


def pytest_configure() -> None:
    """A run in the background of a shell script was started with SIGINT ignored, and its children would be, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's result has no types
    name = tier(item.nodeid, {mark.name for mark in item.iter_markers()})
    if report.skipped:
        _skipped[name] += 1
    elif report.when == "call":
        _counts[name] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lab = sys.modules.get("tests.lab.tier")
    for line in lab.in_guests if lab else ():
        terminalreporter.write_line(line)
    terminalreporter.write_line(tiers_line(_counts, _skipped, lab.inside() if lab else ""))


def tiers_line(counts: Counter[str], skipped: Counter[str], inside: str) -> str:
    """How many tests of each tier ran and were skipped.

    Of the lab's tier these are its own tests, most of them a row, which is a command in a guest; `inside` says how
    many tests such commands ran.
    """
    parts = {name: [f"{counts[name]} ran", f"{skipped[name]} skipped" if skipped[name] else ""] for name in TIERS}
    parts[LAB].append(inside)
    return "tiers: " + " · ".join(f"{name}: {', '.join(filter(None, words))}" for name, words in parts.items())


def kvm_problem() -> str:
    """Why real KVM can't be used here, "" where it can."""
    if not os.path.exists("/dev/kvm"):
        return "no /dev/kvm: load the kvm module, or run on a machine with virtualization"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no permission for /dev/kvm: join the group that owns it"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, machine in (("kvm", "x86_64"), ("kvm_arm64", "aarch64")):
        other = f"real KVM of {machine} is needed, this machine is {platform.machine()}; the lab's rows run it"
        problem = kvm_problem() if platform.machine() == machine else other
        for item in items:
            if problem and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=problem))
