"""The directory of a blackout run's results: found good before anything is measured, filled so that nothing is lost."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.stop import INTERRUPTED
from migstream.errors import MigstreamError, OutputError, UsageError

JOURNAL, DOCUMENT = "samples.jsonl", "blackout.json"
PICTURES = tuple(f"{name}.{suffix}" for name in ("blackout", "phases", "model") for suffix in ("png", "svg"))
JSON_VERSION = 1


def directory(text: str) -> Path:
    """An argument that names a directory. Raises: ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError("a directory is wanted, not an empty name")
    return Path(text)


def prepare(folder: Path) -> None:
    """Make the directory, and see that each file can be written there. Raises: UsageError, OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"-o {folder}: a directory is wanted, and that is none") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"-o {folder}: {getattr(error, 'strerror', None) or error}") from error
    for path in (folder / name for name in (JOURNAL, DOCUMENT, *PICTURES)):
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file, and the run would write one there; take another directory with -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"-o {folder}: no permission to write there")


def failed(document: dict[str, Any], error: MigstreamError) -> None:
    """Say on standard error what went wrong; the document is still shown, and the command ends with the status.

    What follows from the first trouble, as a second file on a full disk, is told in `left_out` alone.
    """
    document["left_out"].append(str(error))
    if not document.get("failed"):
        print(f"bench: {error}", file=sys.stderr)
    document["failed"] = True
    document["exit_status"] = document.get("exit_status") or error.exit_status


def write(folder: Path, document: dict[str, Any]) -> None:
    """Put the document into its file, whole or not at all. Raises: OutputError."""
    words = {"migstream_json": JSON_VERSION, "command": "bench blackout", **document}
    path = folder / DOCUMENT
    part = path.with_name(f".{DOCUMENT}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def draw(folder: Path, document: dict[str, Any], stopped: Callable[[BaseException], bool]) -> None:
    """Draw the pictures, each whole or not at all; what keeps one from being drawn is said in `left_out`.

    Args:
        stopped: whether an exception comes from a signal that said stop.
    """
    from bench import plot

    try:
        with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder) as part:
            for path in plot.draw(document, Path(part)):
                document["plots"].append(str(path.replace(folder / path.name)))
    except BaseException as error:
        if stopped(error):
            document["left_out"].append("plots: the drawing was interrupted; the same command draws them again")
            document["exit_status"] = document.get("exit_status") or INTERRUPTED
        elif isinstance(error, OSError):
            failed(document, OutputError(f"{folder}: plots: {error.strerror or error}"))
        elif isinstance(error, Exception):
            failed(document, MigstreamError(f"plots: a bug of ours: {type(error).__name__}: {error}"))
        else:
            raise
