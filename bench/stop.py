"""How a long benchmark is told to stop: Ctrl-C, SIGTERM and SIGHUP unwind it, so that programs end and files go."""

from __future__ import annotations

import signal
import sys
import threading
from types import TracebackType
from typing import Any, NoReturn

from migstream.errors import MigstreamError

INTERRUPTED = 128 + signal.SIGINT
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(MigstreamError, KeyboardInterrupt):
    """A signal came before there was anything to show: an error with a line to say and a status, and an interrupt."""

    def __init__(self, what: str, status: int) -> None:
        self.exit_status = status
        super().__init__(what)


class Stop:
    """While it is entered, each of the signals raises KeyboardInterrupt. What is ignored (nohup) stays ignored.

    Attributes:
        status: the exit status that the first signal stands for; 0 while none came.
    """

    def __init__(self) -> None:
        self.status = 0
        self._new = False
        self._before: dict[int, Any] = {}
        self._shown = sys.unraisablehook

    def __call__(self, number: int, frame: object) -> NoReturn:
        """The handler."""
        self.status, self._new = self.status or 128 + number, True
        before = self._before.get(number)
        if callable(before):  # the program's own: it may count signals too
            before(number, frame)
        raise KeyboardInterrupt

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self)
        self._shown = sys.unraisablehook
        sys.unraisablehook = lambda what: None if self._new else self._shown(what)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.unraisablehook = self._shown
        for number, before in self._before.items():
            signal.signal(number, before)

    def caused(self, error: BaseException) -> bool:
        """Whether a signal is behind it, and so what it says means nothing: an interrupted frame whose views are still
        held is a BufferError, an interrupted import a RuntimeError.
        """
        if isinstance(error, KeyboardInterrupt):
            self.status, self._new = self.status or INTERRUPTED, True
        return self._new

    def handled(self) -> None:
        """What came so far is dealt with: an error from here on has another cause, or another signal."""
        self._new = False
