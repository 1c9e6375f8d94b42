"""The bench's C programs: compiled on the fly, talked to over pipes, a line a command."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from bench.children import die_with_parent
from migstream.errors import MigstreamError

HERE = Path(__file__).parent
FLAGS = ("-O2", "-Wall", "-Wextra")


class LeftOut(MigstreamError):
    """Part of a benchmark that this machine can't run; the rest goes on without it."""

    exit_status = 69


def build(name: str, folder: Path) -> Path:
    """Compile `bench/NAME.c` into `folder` and return the program. Raises: LeftOut with what is missing."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise LeftOut(f"{name}.c: no C compiler (cc); install one, or set CC")
    program = folder / name
    done = subprocess.run([compiler, *FLAGS, "-o", str(program), str(HERE / f"{name}.c"), "-lpthread"],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        first = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise LeftOut(f"{name}.c does not compile here: {first}")
    return program


class Talk:
    """A running C program. A context manager: the program ends with it."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self._process = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True, bufsize=1,
                                         preexec_fn=die_with_parent)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):  # a command that the program never read
                pipe.close()
        self._process.kill()
        self._process.wait()

    def ask(self, command: str) -> str:
        """Send a line and return the answer. Raises: LeftOut with what the program said when it ended instead."""
        assert self._process.stdin and self._process.stdout and self._process.stderr
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        except OSError:
            answer = ""
        if not answer:
            raise LeftOut(f"{self.program.name}: {self._process.stderr.readline().strip() or 'it ended'}")
        return answer
