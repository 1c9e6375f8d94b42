"""A blackout run's document as a file: read back, and every part that a comparison looks at found good first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.hosts import COUNTED, MEASURED, MODELLED
from bench.output import DOCUMENT, JSON_VERSION
from bench.samples import MOST, Wrong, whole
from migstream.errors import OutputError, UsageError, printable

MOST_VCPUS = 1 << 20
_COUNTS = ("vm_writes", "vcpu_writes", "early_writes")
_LABELS = (("machine", ("cpu", "kernel", "system", "python", "implementation")),
           ("software", ("migstream", "native", "c", "qemu")))


def load(path: Path) -> dict[str, Any]:
    """Read a run's document; `path` may be the run's directory. Raises: OutputError, UsageError."""
    try:
        file = path / DOCUMENT if path.is_dir() else path
        document = json.loads(file.read_text(encoding="utf-8"))
        _check(document)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error
    except Wrong as wrong:
        raise UsageError(f"{path} is no result of `python -m bench blackout`: {wrong}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no result of `python -m bench blackout`: it is no JSON") from None
    return dict(document)


def _check(document: Any) -> None:
    if not isinstance(document, dict) or document.get("bench") != "blackout":
        raise Wrong("it is no object with \"bench\": \"blackout\"")
    if (found := document.get("migstream_json", JSON_VERSION)) != JSON_VERSION or isinstance(found, bool):
        raise Wrong(f"migstream_json is {printable(found)}; this migstream knows {JSON_VERSION}")
    kinds = (MEASURED, MODELLED, COUNTED)
    if document.get("kind") not in kinds:
        raise Wrong(f"kind is {printable(document.get('kind'))}, not one of {', '.join(kinds)}")
    _object(document, "machine", "the document")
    _labels(document)
    curves = _object(document, "curves", "the document")
    for thing in curves:
        curve = _object(curves, thing, "curves")
        for number, at in enumerate(_points(curve, thing)):
            _point(at, f"{printable(thing)}: point {number}", document["kind"])


def _labels(document: dict[str, Any]) -> None:
    """Raises: Wrong for what is shown as text or a number and is neither."""
    for part, names in _LABELS:
        found = _object(document, part, "the document") if part in document else {}
        for name in names:
            if not isinstance(found.get(name), str | None):
                raise Wrong(f"{part}.{name} is no text")
    if not isinstance(document.get("backend"), str | None):
        raise Wrong("backend is no text")
    for part, name in (("machine", "cpus"), ("options", "threads")):
        if part in document and name in _object(document, part, "the document"):
            whole(document[part][name], 1, MOST_VCPUS, f"{part}.{name}")


def _object(parent: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = parent.get(name)
    if not isinstance(found, dict):
        raise Wrong(f"{where}: {printable(name)} is {'no object' if name in parent else 'missing'}")
    return found


def _points(curve: dict[str, Any], thing: str) -> Iterator[dict[str, Any]]:
    points = curve.get("points")
    if not isinstance(points, list) or not all(isinstance(at, dict) for at in points):
        raise Wrong(f"{printable(thing)}: points is no list of objects")
    yield from points


def _point(at: dict[str, Any], where: str, kind: str) -> None:
    whole(at.get("vcpus"), 1, MOST_VCPUS, f"{where}: vcpus")
    if kind == COUNTED:
        for name in _COUNTS:
            _number(at.get(name), f"{where}: {name}")
    elif not _number(_object(at, "total", where).get("p50"), f"{where}: total.p50"):
        raise Wrong(f"{where}: total.p50 is 0")


def _number(value: object, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST and math.isfinite(value):
        return float(value)
    raise Wrong(f"{name} is no number of 0 and more")
