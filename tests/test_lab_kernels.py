"""What has to hold on real KVM: each row of IN_GUEST runs inside every kernel of the lab."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from tests.lab import boot, kernels, tier


@dataclass(frozen=True)
class InGuest:
    """A command that has to succeed in a guest: its limit in seconds counts from the start of the boot."""

    name: str
    command: tuple[str, ...]
    kernels: tuple[kernels.Kernel, ...]
    time_limit_s: float
    reason: str


ARM64 = kernels.select("arm64")
X86_64 = kernels.select("x86_64")

IN_GUEST = [
    InGuest("smoke", ("python3", "tests/lab/guest/smoke_kvm.py"), ARM64 + X86_64, 120,
            "the other rows mean nothing where /dev/kvm does not make a VM"),
    InGuest("imports", ("python3", "-c", "import construct, crc32c, msgpack, numpy, zstandard, migstream"),
            ARM64 + X86_64, 120, "wheels of the wrong platform show here, not in the middle of a test"),
    InGuest("demo", ("migstream", "demo", "--vcpus", "4"), ARM64 + X86_64, 240,
            "a guest saved mid-run counts on in another process; 10 where a register reads back different unexplained"),
    InGuest("fidelity", ("python3", "-m", "tests.fidelity.guest", "fresh", "40"), X86_64, 300,
            "random calls on the simulator and on the kernel, with a new seed each time: it keeps looking"),
    InGuest("recorded", ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fidelity/test_recorded.py"),
            X86_64, 240, "the answers that the simulator was mended for are the kernel's"),
]  # fmt: skip

CASES = [pytest.param(where, row, id=f"{where.name}-{row.name}") for row in IN_GUEST for where in row.kernels]


@pytest.mark.lab
@pytest.mark.parametrize(("kernel", "row"), CASES)
def test_in_guest(kernel: kernels.Kernel, row: InGuest) -> None:
    tier.need(kernel)
    result = boot.run(kernel, row.command, time_limit_s=row.time_limit_s)
    sys.stdout.write(result.stdout.decode(errors="replace") + result.stderr.decode(errors="replace"))
    assert result.status == 0
