"""The text of every file under formats/ that is made from code, and what may change in one that is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from migstream.errors import EXIT_STATUS
from tests.bless import annotate, bad_frames, bad_payloads, catalogue, content, good, layouts
from tests.bless.bad_frames import Bad
from tests.bless.good import Good

FORMATS = Path(__file__).resolve().parents[2] / "formats"
ZSTD = ".".join(map(str, zstandard.ZSTD_VERSION))
BAD: dict[str, Bad] = {**bad_frames.VECTORS, **bad_payloads.VECTORS}


def made() -> dict[str, str]:
    """Text by path under formats/."""
    out = {**layouts.files(), **catalogue.files()}
    for name, vector in good.VECTORS.items():
        out[f"vectors/{name}.hex"] = annotate.dump(vector.data, f"{name}: {vector.what}")
        out[f"vectors/{name}.json"] = content.text(_good(vector))
    for name, wrong in BAD.items():
        out[f"vectors/bad/{name}.hex"] = annotate.dump(wrong.data, f"{name}: {wrong.what}")
        out[f"vectors/bad/{name}.json"] = content.text(_bad(wrong))
    return out


def _good(vector: Good) -> content.Json:
    made_by = {"made_by_zstd": ZSTD} if vector.made_by_zstd else {}
    return {"what": vector.what, **made_by, **content.content(vector.data)}


def _bad(wrong: Bad) -> content.Json:
    status = wrong.error.exit_status
    return {"what": wrong.what, "error": wrong.error.__name__, "exit_status": status, "meaning": EXIT_STATUS[status],
            "offset": wrong.expected_offset, "section": wrong.section, "field": wrong.field}


def _same(old: str, new: str) -> bool:
    return old == new


def _lines_kept(old: str, new: str) -> bool:
    """Every line is still there, in the same order."""
    rest = iter(new.splitlines())
    return all(line in rest for line in old.splitlines())


def _structs_kept(old: str, new: str) -> bool:
    """Every struct is still there and the same."""
    now: dict[str, Any] = json.loads(new)
    before: dict[str, Any] = json.loads(old)
    return all(now.get(name) == layout for name, layout in before.items())


# What a released file may become without --force, by folder.
_MAY: dict[str, Callable[[str, str], bool]] = {
    "vectors": _same,              # other readers are tested with these bytes
    "layouts": _structs_kept,      # a struct is added, never changed
    "registers": _lines_kept,      # a register is added, never changed
}


def may_become(path: str, old: str, new: str) -> bool:
    """False where `new` takes back what was released in `old`."""
    return _MAY[path.split("/")[0]](old, new)


def write(root: Path = FORMATS, *, force: bool = False) -> tuple[list[str], list[str]]:
    """Write what is missing or may change; return (paths written, paths refused). Removes nothing."""
    written, refused = [], []
    for path, text in made().items():
        target = root / path
        old = target.read_text("utf-8") if target.exists() else None
        if old == text:
            continue
        if old is not None and not force and not may_become(path, old, text):
            refused.append(path)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
        written.append(path)
    return written, refused
