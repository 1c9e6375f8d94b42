"""Programs that a benchmark starts: none outlives it, however it ends, and each question to one has a time limit."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping

_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
ASK_S = 10.0


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills the program when the thread that started it ends (prctl(2))."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@functools.cache
def version(program: str, seconds: float = ASK_S) -> tuple[str | None, str]:
    """The first line of `PROGRAM --version` and "", or None and why there is none. `program` is a path."""
    with tempfile.TemporaryFile() as out:  # no pipe: a grandchild that holds it would be waited for without a limit
        try:
            process = subprocess.Popen([program, "--version"], stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent)
        except OSError as error:
            return None, f"it can't be started: {error.strerror or error}"
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None, f"`--version`: no answer within {seconds:.0f} s"
        finally:
            end(process)
        out.seek(0)
        said = out.read(4096).decode(errors="replace").strip().splitlines()
    line = said[0].strip() if said else ""
    if status or not line:
        return None, f"`--version`: exit status {status}{': ' + line if line else ''}"
    return line, ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program of a session of its own, with what it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:  # its session isn't there yet, or it has just ended
            process.kill()
    process.wait()


def compiler() -> str:
    """The C compiler's name: CC's first word, as make takes it, else cc or gcc."""
    try:
        words = shlex.split(os.environ.get("CC", ""))
    except ValueError:
        words = []
    return words[0] if words else "cc" if shutil.which("cc") else "gcc"


def versions(programs: Mapping[str, str]) -> dict[str, str | None]:
    """What each says of itself; None for one that isn't there or doesn't answer."""
    found = {name: shutil.which(program) for name, program in programs.items()}
    return {name: path and version(path)[0] for name, path in found.items()}
