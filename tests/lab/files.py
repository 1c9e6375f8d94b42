"""Files that come back from a guest: names and sizes are checked before anything is written.

A guest is code under test on a kernel under test: what it says about where a file belongs is not believed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.lab import cpio
from tests.lab.errors import LabError

_NAME_LIMIT = 255
_NO_NAMES = ("", ".", "..")
_ELSEWHERE = "choose another folder with --out"


@dataclass(frozen=True)
class GuestFile:
    """A file that the command wrote: a relative path with safe parts, and its bytes."""

    name: PurePosixPath
    data: bytes


def safe_name(name: str) -> PurePosixPath:
    """A path from the guest, relative and without `..`; raises LabError for any other."""
    parts = name.removeprefix("./").split("/")
    if not all(part not in _NO_NAMES and part.isprintable() and len(part) <= _NAME_LIMIT for part in parts):
        raise LabError(f"the guest sent a file with the unsafe name {name[:80]!r}; nothing was written")
    return PurePosixPath(*parts)


def unpack(archive: bytes) -> tuple[GuestFile, ...]:
    """The files of a cpio archive; raises LabError when it is damaged, or holds anything but plain files."""
    try:
        entries = list(cpio.read(archive))
    except ValueError as error:
        raise LabError(f"the guest's archive of files is damaged ({error}); nothing was written") from error
    # Of a file with several names only one entry has the content.
    content = {entry.inode: entry.data for entry in sorted(entries, key=lambda entry: len(entry.data))}
    return tuple(GuestFile(_plain_name(entry), content[entry.inode]) for entry in entries)


def save(files: Iterable[GuestFile], out: Path) -> None:
    """Write files below a folder; raises LabError rather than follow a symbolic link out of it."""
    for file in files:
        try:
            out.mkdir(parents=True, exist_ok=True)
            _save(file, out.resolve())
        except OSError as error:
            raise LabError(f"{file.name} can't be written: {error}; {_ELSEWHERE}") from error


def _save(file: GuestFile, top: Path) -> None:
    folder = top.joinpath(*file.name.parts[:-1])
    if not folder.resolve().is_relative_to(top):
        raise LabError(f"{file.name} is not written: a link leads out of {top}; {_ELSEWHERE}")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / file.name.name, file.data)


def _plain_name(entry: cpio.Entry) -> PurePosixPath:
    if not stat.S_ISREG(entry.mode):
        raise LabError(f"the guest sent {entry.name[:80]!r}, which is no plain file; nothing was written")
    return safe_name(entry.name)


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".lab-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp's files are private; these are as any file that a command writes.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
