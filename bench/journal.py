"""What a run has measured so far, on disk: a header, then a line for each sample as it comes.

A run that was interrupted goes on where it stopped when it is started again with the same options and programs on the
same machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.samples import Wrong, key_check
from migstream.errors import OutputError, UsageError, printable

Key = tuple[int, str, int]
"""vCPUs, the thing's name, the round."""

Check = Callable[[Mapping[str, Any]], None]
"""Raises `samples.Wrong` for a line that such a run can't have written."""


class Journal:
    """An append-only file of samples that one process at a time holds. A context manager: it closes the file.

    Attributes:
        samples: by key. dates: the day of each, UTC. resumed: how many were there when it was opened; resumed_dates:
            their days.
    """

    def __init__(self, path: Path, header: dict[str, Any], check: Check = lambda _: None) -> None:
        """Open the file, made if it isn't there. Raises: UsageError for another run's file, a damaged one and one that
        is in use; OutputError.
        """
        self.path, self.header, self._check = path, header, check
        self.samples: dict[Key, dict[str, Any]] = {}
        self.dates: dict[Key, str] = {}
        with contextlib.ExitStack() as undo:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = undo.enter_context(path.open("a+b", buffering=0))  # unbuffered: nothing is left for close
                self._lock()
                self._file.seek(0)
                keep = self._load(self._file.read() or b"")
                self._file.truncate(keep)
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror or error}") from error
            if not keep:
                self._append(header)
            undo.pop_all()
        self.resumed, self.resumed_dates = len(self.samples), sorted(set(self.dates.values()))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path}: another run is writing it; take another directory with -o") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # each sample was written when it came, or said why not
            self._file.close()

    def _load(self, data: bytes) -> int:
        """Take the whole lines; a last line that was cut is dropped. Returns the bytes to keep."""
        keep = data.rfind(b"\n") + 1
        if not keep:
            if not _line(self.header).startswith(data):
                raise UsageError(f"{self.path} is no journal of a benchmark; take another directory with -o")
            return 0
        lines = data[:keep].splitlines()
        self._compare(lines[0])
        for number, line in enumerate(lines[1:], 2):
            try:
                self._take(_parsed(line))
            except Wrong as wrong:
                raise UsageError(f"{self.path}: line {number}: {wrong}; without that line the rest can be used, or "
                                 "take another directory with -o") from None
        return keep

    def _compare(self, line: bytes) -> None:
        """Raises: UsageError when the header is none, or another run's."""
        try:
            found = _parsed(line)
        except Wrong:
            found = None
        if not isinstance(found, dict) or "bench" not in found:
            raise UsageError(f"{self.path}: line 1: it is no journal of a benchmark; take another directory with -o")
        if other := list(differing(found, self.header)):
            raise UsageError(f"{self.path} holds another run (other {'; '.join(other)}); take another directory "
                             "with -o")

    def _take(self, line: Any) -> None:
        key_check(line)
        self._check(line)
        key = line["vcpus"], line["thing"], line["round"]
        if key in self.samples:
            raise Wrong("this sample is there already")
        self.samples[key], self.dates[key] = line["sample"], line["date"]

    def add(self, key: Key, sample: dict[str, Any]) -> None:
        """Keep a sample; it is in the file when this returns. Raises: OutputError."""
        date = time.strftime("%Y-%m-%d", time.gmtime())
        self.samples[key], self.dates[key] = sample, date
        self._append({"vcpus": key[0], "thing": key[1], "round": key[2], "date": date, "sample": sample})

    def _append(self, line: dict[str, Any]) -> None:
        rest = memoryview(_line(line))
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0:]
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror or error}") from error

    def of(self, vcpus: int, thing: str) -> Iterator[dict[str, Any]]:
        """The samples of one thing at one vCPU count, by round."""
        keys = sorted(key for key in self.samples if key[:2] == (vcpus, thing))
        return (self.samples[key] for key in keys)


def _line(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise Wrong("it is no JSON") from None


def differing(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Each field in which a header is another: `options.reps: 3 there, 2 here`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differing(found.get(key), wanted.get(key), f"{name}.{printable(key)}".lstrip("."))
    elif found != wanted or type(found) is not type(wanted):
        yield f"{name}: {_said(found)} there, {_said(wanted)} here"


def _said(value: Any) -> str:
    return "nothing" if value is None else printable(value if isinstance(value, str) else repr(value), 60)
