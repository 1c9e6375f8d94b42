"""How a program of ours ends: signals, errors and standard output become an exit status and at most one line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from migstream.errors import MigstreamError, OutputError, printable


def run(program: str, body: Callable[[list[str]], int], argv: Sequence[str] | None = None,
        stopped: Callable[[int], None] = lambda _: None) -> int:
    """Run a program's body and return its exit status (`errors.EXIT_STATUS`); 128 + the number of a signal that said
    stop.

    Args:
        program: its name, for messages.
        body: takes the arguments, returns the status.
        argv: the arguments; None for those of the process, whose signals are listened to then.
        stopped: is told the number of the signal, so that it can say what became of the work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    told = _Told()
    if argv is None:
        told.listen()
    try:
        status = _body(body, arguments)
    except BaseException as error:
        if not told.status and ("--debug" in arguments or isinstance(error, SystemExit)):
            raise
        status = told.status or _why(program, error, "--json" in arguments)
    told.rest()
    status = told.status or status
    if status > 128:
        stopped(status - 128)
    return status


def _body(body: Callable[[list[str]], int], arguments: list[str]) -> int:
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    try:
        return body(arguments)
    finally:  # --help leaves by SystemExit; what it printed counts too
        sys.stdout.flush()


def _why(program: str, error: BaseException, as_json: bool) -> int:
    """Say in one line what went wrong; its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return int(getattr(error, "exit_status", 128 + signal.SIGINT))
    if isinstance(error, MigstreamError):
        return _say(program, error, as_json)
    if isinstance(error, OSError):
        return _no_output(program, error)
    print(f"{program}: a bug of ours: {type(error).__name__}: {error}; please report it with the output of --debug",
          file=sys.stderr)
    return 70


class _Told:
    """Which signal said stop: SIGTERM and SIGHUP end a command as Ctrl-C does, and unwind it: files go, VMs are closed.

    Whatever is raised after one follows from it, under whatever name it comes: an interrupted import is a RuntimeError,
    views that an interrupted frame holds are a BufferError.

    Attributes:
        status: the exit status then; 0 while none came.
    """

    def __init__(self) -> None:
        self.status = 0
        self._numbers: list[int] = []

    def __call__(self, number: int, frame: object) -> NoReturn:
        """The handler."""
        self.status = self.status or 128 + number
        raise KeyboardInterrupt

    def listen(self) -> None:
        """From here on. What is ignored (nohup, a script's background) stays ignored."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)
                self._numbers.append(number)
        shown = sys.unraisablehook
        sys.unraisablehook = lambda what: None if self.status else shown(what)

    def rest(self) -> None:
        """What comes while the interpreter ends just ends it, without a traceback."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)


def _no_output(program: str, error: OSError) -> int:
    """Standard output went away or is full. What it still holds is dropped, so that the interpreter's exit is quiet."""
    if not isinstance(error, BrokenPipeError):
        what = printable(error.filename) if error.filename else "standard output"
        print(f"{program}: {what}: {error.strerror or error}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError.exit_status


def _say(program: str, error: MigstreamError, as_json: bool) -> int:
    print(f"{program}: {printable(error, 2000)}", file=sys.stderr)
    if isinstance(error.__cause__, BrokenPipeError):
        return _no_output(program, error.__cause__)
    if as_json and sys.stdout is not None:
        from migstream.show import error_json, print_json

        print_json("error", error_json(error))
    return error.exit_status
