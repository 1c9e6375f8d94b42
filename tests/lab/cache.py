"""The cache folder: complete items only, each with a manifest of what it was made from and its checksums.

An item is made in a folder of its own below `partial/` and renamed when it is whole, so a folder with a
manifest is a finished item, and whatever an interrupted fetch left is below `partial/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.lab.errors import LabError

CACHE_ENV = "MIGSTREAM_LAB_CACHE"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
FETCH = "python -m tests.lab fetch"


@dataclass(frozen=True)
class Origin:
    """A package or wheel that an item was made from: size in bytes, sha256 in hexadecimal."""

    name: str
    version: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is known of an item: what it was made for, what from, and size and sha256 of each of its files."""

    title: str
    key: str
    """Changes when the item has to be made again: the tool's recipe, the project's dependencies."""
    version: str
    origins: tuple[Origin, ...]
    files: dict[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Bytes that the item's files take."""
        return sum(size for size, _ in self.files.values())


def cache_root() -> Path:
    """The cache folder: MIGSTREAM_LAB_CACHE, else migstream-lab in the user's cache folder."""
    chosen = os.environ.get(CACHE_ENV)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(caches) / "migstream-lab"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, title: str, key: str, version: str, origins: tuple[Origin, ...]) -> Manifest:
    """Write the manifest of a folder whose files are complete."""
    files = {
        str(path.relative_to(folder)): (path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = Manifest(title, key, version, origins, files)
    text = json.dumps({"format": MANIFEST_FORMAT, **asdict(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")
    return manifest


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a finished item, None when there is none; raises LabError when it can't be read."""
    try:
        raw = json.loads((folder / MANIFEST).read_text())
        return _manifest(raw)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{folder.name}: its manifest is damaged; run: {FETCH}") from error


def checked(folder: Path) -> Manifest | None:
    """The manifest, after every file was compared with it.

    Returns None when the item was never fetched; raises LabError when a file is missing, changed or cut off.
    """
    manifest = manifest_of(folder)
    for name, (size, digest) in (manifest.files if manifest else {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
            raise LabError(f"{folder.name}/{name} is not what was fetched; run: {FETCH}")
    return manifest


def install(made: Path, final: Path) -> None:
    """Put a sealed folder in its final place; an older item there is replaced."""
    final.parent.mkdir(parents=True, exist_ok=True)
    old = made.with_name(made.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    made.rename(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def only_fetch(root: Path) -> Iterator[None]:
    """Hold the cache for one fetch; raises LabError while another one runs, or when it can't be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("w")
    except OSError as error:
        raise LabError(f"cannot write the cache ({error}); set {CACHE_ENV} to another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LabError("another fetch is at work in this cache; wait for it to end") from error
        yield


def _manifest(raw: dict[str, Any]) -> Manifest:
    if raw["format"] != MANIFEST_FORMAT:
        raise ValueError(raw["format"])
    files = {str(name): (int(size), str(digest)) for name, (size, digest) in raw["files"].items()}
    origins = tuple(Origin(**row) for row in raw["origins"])
    return Manifest(str(raw["title"]), str(raw["key"]), str(raw["version"]), origins, files)
