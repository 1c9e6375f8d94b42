"""What the guest's console said: kept short, made safe to show, and searched for the reason of a failure."""

from __future__ import annotations

import re
from pathlib import Path

from tests.lab.errors import LabError

# Enough for a panic with its registers and call trace.
_KEPT = 64 << 10
_SHOWN_LINES = 15

_PANIC = "Kernel panic"
# The first pattern that is found names the failure.
_FAILURES = (
    (re.compile(r"lab: (.*)"), "the guest's init said: {0}"),
    (re.compile(rf"({_PANIC}[^\n]*)"), "{0}"),
    (re.compile(r"((?:BUG|Oops|Internal error|Unable to handle)[^\n]*)"), "the kernel broke: {0}"),
)


class Console:
    """Takes the console's bytes as they come and keeps the last of them; a log file gets all."""

    def __init__(self, log: Path | None = None) -> None:
        self._kept = bytearray()
        self._path = log
        try:
            self._log = log.open("wb", buffering=0) if log else None
        except OSError as error:
            raise self._failed(error) from error

    def feed(self, data: bytes) -> None:
        """Take what came."""
        self._kept += data
        del self._kept[:-_KEPT]
        try:
            if self._log:
                self._log.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> LabError:
        return LabError(f"--console {self._path}: {error.strerror}")

    def close(self) -> None:
        """Close the log file."""
        if self._log:
            self._log.close()

    @property
    def text(self) -> str:
        """The last 64 KiB, with everything unprintable escaped."""
        lines = self._kept.decode(errors="replace").splitlines()
        return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)

    def failure(self) -> str | None:
        """What the console says went wrong, in one line; None if it says nothing of the kind."""
        found = ((pattern.search(self.text), message) for pattern, message in _FAILURES)
        return next((message.format(hit[1].strip()) for hit, message in found if hit), None)

    def last_lines(self) -> str:
        """The end of the console, indented, for the end of an error message.

        It ends with a panic's first line where there is one: what led there says more than the call trace.
        """
        lines = [line for line in self.text.splitlines() if line.strip()]
        panic = next((number for number, line in enumerate(lines, 1) if _PANIC in line), len(lines))
        shown = lines[:panic][-_SHOWN_LINES:]
        return "\n".join(["console:", *(f"  {line}" for line in shown)]) if shown else "console: silent"
