"""The bench's C programs: compiled on the fly, talked to over pipes, a line a command."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from bench.children import die_with_parent
from migstream.errors import MigstreamError

HERE = Path(__file__).parent
FLAGS = ("-O2", "-Wall", "-Wextra")
CURE = "install a C compiler (Debian: gcc), or set CC to one that works"


class LeftOut(MigstreamError):
    """Part of a benchmark that this machine can't run; the rest goes on without it."""

    exit_status = 69


def build(name: str, folder: Path) -> Path:
    """Compile `bench/NAME.c` into `folder` and return the program. Raises: LeftOut with what is missing."""
    return compile_c(HERE / f"{name}.c", folder / name)


def compile_c(source: Path, out: Path, *more: str) -> Path:
    """Compile with `CC`, which may have arguments as in make, else cc or gcc. Raises: LeftOut and what to do."""
    compiler = _compiler(source)
    command = shlex.join(compiler)
    done = subprocess.run([*compiler, *FLAGS, *more, "-o", str(out), str(source), "-lpthread"],
                          capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        first = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise LeftOut(f"{source.name}: `{command}` does not compile it: {first}; {CURE}")
    if not out.is_file():
        raise LeftOut(f"{source.name}: `{command}` made nothing of it; {CURE}")
    return out


def _compiler(source: Path) -> list[str]:
    said = os.environ.get("CC", "")
    try:
        compiler = shlex.split(said) or ["cc" if shutil.which("cc") else "gcc"]
    except ValueError as error:
        raise LeftOut(f"{source.name}: CC={said}: {error}; {CURE}") from error
    if not shutil.which(compiler[0]):
        raise LeftOut(f"{source.name}: no C compiler {compiler[0]}; {CURE}")
    return compiler


class Talk:
    """A running C program. A context manager: the program ends with it. Raises: LeftOut where it can't be run."""

    def __init__(self, program: Path) -> None:
        self.program = program
        try:
            self._process = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE, text=True, bufsize=1,
                                             preexec_fn=die_with_parent)
        except OSError as error:
            raise LeftOut(f"{program.name}: what the C compiler made does not run: {error.strerror}; {CURE}") from error

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
