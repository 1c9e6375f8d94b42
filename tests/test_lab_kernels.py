"""What has to hold on real KVM: each row of IN_GUEST runs inside every kernel of the lab, all rows in one boot."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import pytest

from tests.lab import kernels, rows, tier

ARM64 = kernels.select("arm64")
X86_64 = kernels.select("x86_64")

CONTRACT = "contract"
DEMO = ("migstream", "demo", "--vcpus")
PYTEST = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract", "-m")


@dataclass(frozen=True)
class InGuest:
    """A command that has to succeed in a guest, and the seconds that it may take there: many times what it takes."""

    name: str
    command: tuple[str, ...]
    kernels: tuple[kernels.Kernel, ...]
    limit_s: float
    reason: str
    may_find: bool = False
    """It looks for what is not known yet: what it finds (status 1) is told at the run's end, and is no failure."""


IN_GUEST = [
    InGuest("smoke", ("python3", "tests/lab/guest/smoke_kvm.py"), ARM64 + X86_64, 60,
            "the other rows mean nothing where /dev/kvm does not make a VM"),
    InGuest("imports", ("python3", "-c", "import construct, crc32c, msgpack, numpy, zstandard, migstream"),
            ARM64 + X86_64, 60, "wheels of the wrong platform show here, not in the middle of a test"),
    InGuest("demo", (*DEMO, "4"), ARM64 + X86_64, 120,
            "a guest saved mid-run counts on in another process; 10 where a register reads back different unexplained"),
    InGuest("demo-8", (*DEMO, "8"), ARM64, 180, "eight redistributors; more vCPUs than the emulated machine has CPUs"),
    InGuest("demo-features", (*DEMO, "4", "--vcpu-features", "sve,pmu_v3,ptrauth"), ARM64, 180,
            "every register that KVM can list for a guest of ours holds a mark"),
    InGuest(CONTRACT, (*PYTEST, "kvm_arm64"), ARM64, 300, "what all backends have in common holds here, too"),
    InGuest(CONTRACT, (*PYTEST, "kvm"), X86_64, 300, "what all backends have in common holds here, too"),
    InGuest("fidelity", ("python3", "-m", "tests.fidelity.guest", "fresh", "40", "401"), ARM64 + X86_64, 300,
            "random calls on the simulator and on the kernel, always the same: what agreed once goes on agreeing"),
    InGuest("search", ("python3", "-m", "tests.fidelity.guest", "fresh", "40"), ARM64 + X86_64, 300,
            "the same with a new seed each time: it keeps looking", may_find=True),
    InGuest("recorded", ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fidelity/test_recorded.py"),
            X86_64, 240, "the answers that the simulator was mended for are the kernel's"),
    InGuest("recorded", ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider",
                         "tests/fidelity/test_recorded_arm64.py"), ARM64, 240, "the same"),
]  # fmt: skip

CASES = [pytest.param(where, row, id=f"{where.name}-{row.name}") for where in ARM64 + X86_64 for row in IN_GUEST
         if where in row.kernels]


@cache
def booted(kernel: kernels.Kernel) -> dict[str, rows.Outcome] | Exception:
    """All rows of a kernel, in one boot; what ended it, for every row to say."""
    commands = [rows.Command(row.name, row.command, row.limit_s) for row in IN_GUEST if kernel in row.kernels]
    try:
        return rows.run(kernel, commands)
    except Exception as error:
        return error


@pytest.mark.lab
@pytest.mark.parametrize(("kernel", "row"), CASES)
def test_in_guest(kernel: kernels.Kernel, row: InGuest) -> None:
    tier.need(kernel)
    outcomes = booted(kernel)
    if isinstance(outcomes, Exception):
        raise outcomes
    outcome = outcomes[row.name]
    sys.stdout.write(outcome.output)
    found = rows.summary(outcome.output) if "pytest" in row.command else None
    if found:
        tier.ran_in_guest(kernel, row.name, found, outcome.seconds)
    if "tests.fidelity.guest" in row.command:
        tier.in_guests += outcome.output.strip().splitlines()[0 if outcome.status == 1 else -1:]
    good = (0, 1) if row.may_find else (0,)
    assert outcome.status in good, f"{' '.join(row.command)} ended with {outcome.status} on {kernel.name}: {row.reason}"
    assert found is None or found.counts.get("passed", 0) > 0, "nothing ran"
