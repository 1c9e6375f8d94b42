"""What a run has measured so far, on disk: a header, then a line for each sample as it comes.

A run that was interrupted goes on where it stopped when it is started again with the same options on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migstream.errors import OutputError, UsageError

Key = tuple[int, str, int]
"""vCPUs, the thing's name, the round."""


class Journal:
    """An append-only file of samples. A context manager: it closes the file."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open the file, made if it isn't there. Raises: UsageError for another run's file, OutputError."""
        self.path, self.header = path, header
        self.samples: dict[Key, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep = self._load(path.read_bytes()) if path.exists() else 0
            self._file = path.open("ab")
            self._file.truncate(keep)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}") from error
        self.resumed = len(self.samples)
        if not keep:
            self._append(header)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self, data: bytes) -> int:
        """Take the whole lines; a last line that was cut is dropped. Returns the bytes to keep."""
        keep = data.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in data[:keep].splitlines()]
            samples = {(line["vcpus"], line["thing"], line["round"]): line["sample"] for line in lines[1:]}
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{self.path} is no journal of a benchmark; take another directory") from error
        if lines and lines[0] != self.header:
            other = ", ".join(name for name in self.header if lines[0].get(name) != self.header[name])
            raise UsageError(f"{self.path} holds another run (other {other}); take another directory with -o")
        self.samples.update(samples)
        return keep

    def add(self, key: Key, sample: dict[str, Any]) -> None:
        """Keep a sample; it is in the file when this returns. Raises: OutputError."""
        self.samples[key] = sample
        self._append({"vcpus": key[0], "thing": key[1], "round": key[2], "sample": sample})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror or error}") from error

    def of(self, vcpus: int, thing: str) -> Iterator[dict[str, Any]]:
        """The samples of one thing at one vCPU count, by round."""
        keys = sorted(key for key in self.samples if key[:2] == (vcpus, thing))
        return (self.samples[key] for key in keys)
