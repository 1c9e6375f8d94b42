"""The programs that the lab calls, and the Debian package that brings each."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.lab.errors import LabError

PACKAGES = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "apt-config": "apt",
    "dpkg-deb": "dpkg",
    "setpriv": "util-linux",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
}


def missing(programs: Sequence[str]) -> tuple[str, ...]:
    """The packages that have to be installed before these programs can be called."""
    return tuple(dict.fromkeys(PACKAGES[name] for name in programs if shutil.which(name) is None))


def require(programs: Sequence[str]) -> None:
    """Raise LabError, naming the packages to install, unless all programs are there."""
    packages = missing(programs)
    if packages:
        raise LabError(f"programs are missing; run: apt-get install {' '.join(packages)}")


def tied(command: Sequence[str]) -> list[str]:
    """The command, killed by the kernel as soon as the calling thread is gone, however that came about."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command]


def output(command: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a program printed; raises LabError with the most telling line of its stderr when it failed."""
    done = subprocess.run(tied(command), cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, errors="replace")  # fmt: skip
    if done.returncode:
        raise LabError(f"{Path(command[0]).name} failed: {complaint(done.stderr)}")
    return done.stdout


def complaint(stderr: str) -> str:
    """The first line that a tool marked as an error, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith(("E:", "ERROR:", "Err:"))]
    return (marked or lines[-1:] or ["no message"])[0]
