"""Where bytes come from and go to: files under a temporary name, pipes, sockets."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO, cast

from migstream.errors import OutputError, UsageError, printable
from migstream.frames import MAX_FEED, Section
from migstream.reader import StreamReader
from migstream.sections import EncodedBank, Item


class Sink(Protocol):
    """Anything with a `write`: a file, a pipe, a socket's makefile."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take bytes of `data` from its start and return how many; None means all."""


class Source(Protocol):
    """Anything with a `read`."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""


def read_items(source: Source, reader: StreamReader) -> Iterator[tuple[Section, Item]]:
    """Give the sections of a stream as they come, to its end. Raises: StreamError and below, OutputError."""
    for data in read_chunks(source, reader):
        reader.feed(data)
        while (found := reader.next()) is not None:
            yield found


def read_chunks(source: Source, reader: StreamReader) -> Iterator[bytes]:
    """Give the bytes of a stream as they come, to its end and one more: whoever takes them feeds the reader.

    A source with a `read1` gives what is there, be it many sections; another is asked for just what is missing.
    Raises: StreamError and below, OutputError.
    """
    read1 = getattr(source, "read1", None)
    while reader.wanted:
        size = min(max(reader.wanted, _CHUNK if read1 else 0), MAX_FEED)
        data = _read(read1 or source.read, size)
        if not data:
            reader.end_of_input()
        yield data
    yield _read(source.read, 1)


_CHUNK = 1 << 16
"""Bytes that are asked for where fewer may come."""


def _read(read: Callable[[int], bytes], size: int) -> bytes:
    try:
        return read(size)
    except OSError as error:
        raise OutputError(f"reading the stream: {error.strerror or error}") from error


_JOINED = 1 << 16
"""Bytes up to which a copy is cheaper than another write."""


def write_all(out: Sink, buffers: Sequence[bytes | memoryview]) -> None:
    """Write all of some buffers, in order; neighbours that are short in one call. Raises: OutputError."""
    for long, group in groupby(buffers, lambda buffer: len(buffer) > _JOINED):
        for buffer in group if long else (b"".join(group),):
            _write_whole(out, buffer)


class Held:
    """A sink for many short buffers: they are held until they are worth a write, or until `flush()`."""

    def __init__(self, out: Sink) -> None:
        self._out = out
        self._buffers: list[bytes | memoryview] = []
        self._bytes = 0

    def add(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Take buffers, which must stay as they are. Raises: OutputError."""
        self._buffers += buffers
        self._bytes += sum(map(len, buffers))
        if self._bytes > _JOINED:
            self.flush()

    def flush(self) -> None:
        """Write what is held. Raises: OutputError."""
        buffers, self._buffers, size, self._bytes = self._buffers, [], self._bytes, 0
        if size > _JOINED:
            write_all(self._out, buffers)
        else:
            _write_whole(self._out, b"".join(buffers))


def _write_whole(out: Sink, buffer: bytes | memoryview) -> None:
    """A raw pipe or socket may take less at once, and says how much. Raises: OutputError."""
    rest = memoryview(buffer).cast("B")
    while rest:
        try:
            taken = out.write(rest)
        except OSError as error:
            raise OutputError(f"writing the stream: {error.strerror or error}") from error
        if taken is None or taken == len(rest):
            return
        if not isinstance(taken, int) or not 0 < taken <= len(rest):
            raise OutputError(f"the sink took {taken!r} of {len(rest)} bytes")
        rest = rest[taken:]


def verify(source: Source, reader: StreamReader) -> int:
    """Read a stream to its end, decode everything, and return its length in bytes. Raises: StreamError and below."""
    for _, item in read_items(source, reader):
        if isinstance(item, EncodedBank):
            item.decode()
    return reader.frames.offset


@contextmanager
def open_source(name: str) -> Iterator[BinaryIO]:
    """Open a stream file, or standard input for `-`. Raises: OutputError."""
    if name == "-":
        yield _standard(sys.stdin, "standard input")
        return
    with _opened(name, "rb") as file:
        yield file


def _standard(stream: TextIO | None, name: str) -> BinaryIO:
    if stream is None:
        raise OutputError(f"{name} is closed")
    return stream.buffer


def _opened(name: str, mode: str) -> BinaryIO:
    try:
        return cast(BinaryIO, open(name, mode))
    except (OSError, ValueError) as error:
        raise OutputError(f"{printable(name)}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def open_output(name: str, check: Callable[[BinaryIO], object] | None = None) -> Iterator[BinaryIO]:
    """Give a file to write; it gets its final name only when the body has ended well and `check` has read it back.

    A writer that is killed leaves at most a hidden `.NAME.*.partial` beside it. A symbolic link is followed; a new file
    may be read by its owner alone, one that was there keeps its mode. Standard output (`-`), devices, pipes and sockets
    are written as the bytes come. Raises: OutputError, and what `check` raises.
    """
    if not name:
        raise UsageError("an empty name is no file")
    if name == "-" or _is_special(name):
        yield from _straight(name)
        return
    target = Path(os.path.realpath(name))
    if target.is_dir():
        raise OutputError(f"{printable(name)}: {os.strerror(errno.EISDIR)}")
    try:
        fd, temporary = tempfile.mkstemp(".partial", f".{target.name}.", target.parent)
    except (OSError, ValueError) as error:
        raise OutputError(f"{printable(name)}: {getattr(error, 'strerror', None) or error}") from error
    try:
        with open(fd, "w+b") as file:
            yield file
            _finish(file, target, check)
        os.replace(temporary, target)
    except OSError as error:
        os.unlink(temporary)
        raise OutputError(f"{printable(name)}: {error.strerror}") from error
    except BaseException:
        os.unlink(temporary)
        raise


def _is_special(name: str) -> bool:
    """True for what must not be replaced by a file: a device, a pipe, a socket."""
    path = Path(name)
    return path.exists() and not path.is_file() and not path.is_dir()


def _straight(name: str) -> Iterator[BinaryIO]:
    file = _standard(sys.stdout, "standard output") if name == "-" else _opened(name, "wb")
    try:
        yield file
        file.flush()
    except OSError as error:
        raise OutputError(f"{printable(name)}: {error.strerror}") from error
    finally:
        if name != "-":
            with suppress(OSError):  # what could not be flushed was said above
                file.close()


def _finish(file: BinaryIO, target: Path, check: Callable[[BinaryIO], object] | None) -> None:
    if target.exists():
        os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
    file.flush()
    os.fsync(file.fileno())
    if check:
        file.seek(0)
        check(file)
