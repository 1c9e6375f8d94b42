"""Files that come back from a guest: names and sizes are checked before anything is written.

A guest is code under test on a kernel under test: what it says about where a file belongs is not believed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.lab import cpio
from tests.lab.errors import LabError

_NAME_LIMIT = 255
_NO_NAMES = ("", ".", "..")
_ESCAPED = frozenset(map(chr, range(0xDC80, 0xDD00)))
"""What a byte becomes that is no UTF-8 (PEP 383)."""
_ELSEWHERE = "choose another folder with --out"


@dataclass(frozen=True)
class GuestFile:
    """A file that the command wrote: a relative path with safe parts, and its bytes."""

    name: PurePosixPath
    data: bytes


def safe_name(name: str) -> PurePosixPath:
    """A path from the guest, relative and without `..`; raises LabError for any other.

    Bytes that are no UTF-8 are a name like any other: escaped, they come out as they went in.
    """
    parts = name.removeprefix("./").split("/")
    if not all(part not in _NO_NAMES and _plain(part) and len(os.fsencode(part)) <= _NAME_LIMIT for part in parts):
        raise LabError(f"the guest sent a file with the unsafe name {name[:80]!r}; nothing was written")
    return PurePosixPath(*parts)


def _plain(part: str) -> bool:
    return all(c.isprintable() or c in _ESCAPED for c in part)


def unpack(archive: bytes) -> tuple[GuestFile, ...]:
    """The files of a cpio archive; raises LabError when it is damaged, or holds anything but plain files."""
    try:
        entries = list(cpio.read(archive))
    except ValueError as error:
        raise LabError(f"the guest's archive of files is damaged ({error}); nothing was written") from error
    # Of a file with several names only one entry has the content.
    content = {entry.inode: entry.data for entry in sorted(entries, key=lambda entry: len(entry.data))}
    return tuple(GuestFile(_plain_name(entry), content[entry.inode]) for entry in entries)


def require_folder(out: Path) -> None:
    """Raise LabError for a folder that files can't be written to; what is missing of it is not made yet."""
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise LabError(f"--out {out} can't be written to: {error.strerror}; {_ELSEWHERE}") from error


def save(files: Sequence[GuestFile], out: Path) -> None:
    """Write all files below a folder, or none; raises LabError rather than follow a symbolic link out of it."""
    if not files:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        top = out.resolve()
        for file in files:
            _check(file, top, {other.name for other in files})
        with tempfile.TemporaryDirectory(dir=top, prefix=".lab-") as staged:
            for number, file in enumerate(files):
                _write(Path(staged, str(number)), file.data)
            for number, file in enumerate(files):
                target = top.joinpath(file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(staged, str(number)), target)
    except OSError as error:
        raise LabError(f"the guest's files can't be written: {error}; {_ELSEWHERE}") from error


def _check(file: GuestFile, top: Path, names: Set[PurePosixPath]) -> None:
    """Whether a file finds its place: nothing is written before all do."""
    target = top.joinpath(file.name)
    if not target.parent.resolve().is_relative_to(top):
        raise LabError(f"{file.name} is not written: a link leads out of {top}; nothing was written; {_ELSEWHERE}")
    above = [top.joinpath(parent) for parent in file.name.parents]
    in_the_way = [path for path in above if os.path.lexists(path) and not path.is_dir()]
    if target.is_dir() and not target.is_symlink():
        in_the_way.append(target)
    if in_the_way or names & set(file.name.parents):
        what = in_the_way[0] if in_the_way else file.name
        raise LabError(f"{file.name} can't be written: {what} is in the way; nothing was written; {_ELSEWHERE}")


def _plain_name(entry: cpio.Entry) -> PurePosixPath:
    if not stat.S_ISREG(entry.mode):
        raise LabError(f"the guest sent {entry.name[:80]!r}, which is no plain file; nothing was written")
    return safe_name(entry.name)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.chmod(path, 0o666 & ~_umask())  # the folder's mode is private; these are as any file that a command writes


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
