"""Bytes <-> sections, without I/O: `feed()` and `next_section()` one way, `send()` the other.

What this layer promises: a section comes out only after its header's and its payload's checksum were right, its
lengths were within the limits and its padding was zero; the end section's counts agree with what went by; after an
error the object is dead. It knows no payload. At most one section and what the caller fed in one go is held.

The end section's checksum runs over preamble and headers *without* the checksum that each ends with: a CRC over data
followed by their own CRC is the same number whatever the data, and would miss sections that changed places.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from crc32c import crc32c

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded, StreamError, TooNew, Truncated, UsageError
from migstream.model import Arch
from migstream.native import compiled
from migstream.wire import stream as wire
from migstream.wire.record import Record

MAX_FEED = 4 << 20
"""Bytes that `feed()` takes at once."""


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first 32 bytes: versions and architecture."""

    major: int
    minor: int
    arch: Arch


class Section(NamedTuple):
    """A section as stored.

    Attributes:
        kind: four characters; `layout`, `first_vcpu`, `vcpu_count` and `filter` matter to banks only, else 0.
        stored: payload after filter and codec; `raw_length` is its length in bytes before the codec.
        offset: of the header, bytes from the start of the stream; 0 in a section to be sent.
        number: position in the stream, from 0; 0 in a section to be sent.
    """

    kind: str
    stored: bytes | memoryview
    raw_length: int
    codec: int = 0
    filter: int = 0
    flags: int = wire.CRITICAL
    version: int = 1
    scope: int = 0
    layout: int = 0
    first_vcpu: int = 0
    vcpu_count: int = 0
    offset: int = 0
    number: int = 0

    @property
    def critical(self) -> bool:
        """True where a reader that doesn't know the section has to refuse the stream."""
        return bool(self.flags & wire.CRITICAL)

    @property
    def title(self) -> str:
        """Short text for people and errors: `#4 BANK`."""
        return f"#{self.number} {self.kind.strip()}"


class SmallBank(NamedTuple):
    """A bank that can go through the compiled part, many in one call: sent, or expected with room for its values.

    Attributes:
        head: its section's header without lengths and checksums (`head_of`). values: a view of its matrix.
        words: width of a row. bounds: what its values must be within (`migstream.bounds`).
    """

    head: bytes
    values: memoryview
    words: int
    bounds: bytes


class SmallBanks:
    """Banks in their order, given to the compiled part once: their memory must stay where it is."""

    def __init__(self, banks: Sequence[SmallBank], filled: bool = False) -> None:
        """`filled`: they are expected, and their matrices are filled when they come."""
        self.made = compiled.small(list(banks), filled) if compiled else None
        self.length = len(banks)


_PREAMBLE, _HEADER, _END = Record(wire.PREAMBLE), Record(wire.SECTION_HEADER), Record(wire.END)


def head_of(section: Section) -> bytes:
    """A section's header with zero for its lengths and checksums."""
    return _HEADER.build({
        "kind": section.kind.encode("ascii"), "version": section.version, "flags": section.flags,
        "scope": section.scope, "codec": section.codec, "filter": section.filter, "layout": section.layout,
        "first_vcpu": section.first_vcpu, "vcpu_count": section.vcpu_count,
        "stored_length": 0, "raw_length": 0, "payload_crc": 0, "header_crc": 0})


def framing(sections: int, end: bool) -> int:
    """Bytes of so many sections that are no payload of a bank: headers, and the end's payload."""
    return sections * wire.HEADER_SIZE + (_END.size if end else 0)


_END_HEAD = head_of(Section("END ", b"", 0))
_COUNTS = struct.Struct("<IIQ")
"""What has gone by, as the end section states it: sections, checksum over their headers, bytes."""
_LENGTHS = struct.Struct("<QQI")
"""The last fields of a header before its own checksum: stored and raw length, checksum of the payload."""


def _parse(record: Record, data: bytes, offset: int, name: str, number: int = 0) -> Any:
    try:
        return record.parse(data)
    except ValueError as error:
        raise Corrupt("constant or reserved bytes are wrong", offset=offset, section=name or f"#{number} header",
                      field=str(error)) from error


class FrameReader:
    """Turns the bytes of one stream into checked sections.

    Feed bytes as they come, take sections until `next_section()` gives None, call `end_of_input()` once.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._base = 0
        self._headers_crc = 0
        self._count = 0
        self._ended = False
        self._dead: StreamError | None = None
        self._header: tuple[Any, int] | None = None
        self.preamble: Preamble | None = None

    @property
    def offset(self) -> int:
        """Bytes consumed so far, from the start of the stream."""
        return self._base

    @property
    def wanted(self) -> int:
        """Bytes still missing for the next step; 0 once the end section was read."""
        need = wire.PREAMBLE_SIZE if self.preamble is None else wire.HEADER_SIZE
        if self._header:
            need = _padded(int(self._header[0].stored_length))
        return 0 if self._ended else max(need - len(self._buffer), 0)

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes (at most `MAX_FEED`; copied). Raises: UsageError, or the error that killed this reader."""
        self._check_alive()
        if memoryview(data).nbytes > MAX_FEED or len(self._buffer) > limits.MAX_STORED + MAX_FEED:
            raise UsageError(f"feed() takes at most {MAX_FEED} bytes at once; take the sections out between calls")
        self._buffer += data

    def next_section(self) -> Section | None:
        """Return the next whole section, or None when more bytes are needed. Raises: StreamError and below."""
        self._check_alive()
        try:
            return self._step()
        except StreamError as error:
            self._dead = error
            raise

    def take_banks(self, banks: SmallBanks, first: int, end: bool) -> int:
        """Take banks from number `first` on, and the end where it may follow, if they come next, whole and as expected.

        Returns how many sections that were.

        All else is for `next_section()`: it says what is wrong, or decodes what the compiled part does not.
        """
        self._check_alive()
        if compiled is None or self._header or self.preamble is None or self._ended:
            return 0
        counts = bytearray(_COUNTS.pack(self._count, self._headers_crc, self._base))
        taken: int = compiled.unpack(banks.made, first, counts, _END_HEAD if end else b"", self._buffer)
        self._count, self._headers_crc, passed = _COUNTS.unpack(counts)
        del self._buffer[:passed - self._base]
        self._base, self._ended = passed, first + taken > banks.length
        return taken

    def end_of_input(self) -> None:
        """Say that no more bytes come. Raises: Truncated when the end section has not been read."""
        self._check_alive()
        if not self._ended:
            what = self._header[0].kind.decode("latin-1").strip() if self._header else "preamble"
            what = what if self._header or self.preamble is None else "section header"
            raise Truncated("the stream ends here", offset=self._base + len(self._buffer), section=what,
                            expected=f"{self.wanted} more bytes and an end section", found="end of input")

    def kill(self, error: StreamError) -> None:
        """Make every later call raise `error`: for a layer above that found the stream wrong."""
        self._dead = error

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _step(self) -> Section | None:
        if self._ended:
            if self._buffer:
                raise Corrupt("bytes after the end section", offset=self._base, section="end")
            return None
        if self.preamble is None and not self._read_preamble():
            return None
        if self._header is None and not self._read_header():
            return None
        return self._read_payload()

    def _take(self, length: int) -> bytes:
        data = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        self._base += length
        return data

    def _read_preamble(self) -> bool:
        start = bytes(self._buffer[:len(wire.MAGIC)])
        if not wire.MAGIC.startswith(start):
            raise Corrupt("not a migstream stream", offset=0, section="preamble", field="magic",
                          expected=wire.MAGIC.hex(), found=start.hex())
        if len(self._buffer) < wire.PREAMBLE_SIZE:
            return False
        data = self._take(wire.PREAMBLE_SIZE)
        self.preamble = _check_preamble(data)
        self._headers_crc = crc32c(data[:-4])
        return True

    def _read_header(self) -> bool:
        if len(self._buffer) < wire.HEADER_SIZE:
            return False
        offset = self._base
        data = self._take(wire.HEADER_SIZE)
        crc = int.from_bytes(data[-4:], "little")
        head = data[:-4]
        if crc32c(head) != crc:
            raise Corrupt("header checksum is wrong", offset=offset, section=f"#{self._count} header",
                          field="header_crc", expected=f"{crc32c(head):08x}", found=f"{crc:08x}")
        header = _parse(_HEADER, data, offset, "", self._count)
        _check_header(header, offset, self._count)
        self._header = (header, offset)
        if header.kind != b"END ":
            self._headers_crc = crc32c(head, self._headers_crc)
        return True

    def _read_payload(self) -> Section | None:
        assert self._header is not None
        header, offset = self._header
        length = int(header.stored_length)
        if len(self._buffer) < _padded(length):
            return None
        section = _section(header, self._take(length), offset, self._count)
        padding = self._take(-length % wire.ALIGN)
        found = crc32c(section.stored)
        if found != header.payload_crc:
            raise Corrupt("payload checksum is wrong", offset=offset, section=section.title, field="payload_crc",
                          expected=f"{header.payload_crc:08x}", found=f"{found:08x}")
        if any(padding):
            raise Corrupt("padding is not zero", offset=self._base - len(padding), section=section.title)
        self._header = None
        self._count += 1
        if section.kind == "END " and section.version == wire.KINDS["END "].version:
            self._check_end(section)
        return section

    def _check_end(self, section: Section) -> None:
        if len(section.stored) != _END.size:
            raise Corrupt("end section has another length", offset=section.offset, section=section.title,
                          expected=_END.size, found=len(section.stored))
        end = _parse(_END, bytes(section.stored), section.offset, section.title)
        found = {"sections": self._count, "headers_crc": self._headers_crc, "total_length": self._base}
        for field, value in found.items():
            if getattr(end, field) != value:
                raise Corrupt("end section disagrees with the stream", offset=section.offset, section=section.title,
                              field=field, expected=getattr(end, field), found=value)
        self._ended = True

    @property
    def ended(self) -> bool:
        """True once the end section was read and its counts agreed."""
        return self._ended


def _padded(length: int) -> int:
    return length + -length % wire.ALIGN


def _kind_text(kind: bytes) -> str:
    return kind.decode("latin-1").strip()


def _check_preamble(data: bytes) -> Preamble:
    where: dict[str, Any] = {"offset": 0, "section": "preamble"}
    crc = int.from_bytes(data[-4:], "little")
    if crc32c(data[:-4]) != crc:
        raise Corrupt("checksum is wrong", field="crc", expected=f"{crc32c(data[:-4]):08x}", found=f"{crc:08x}",
                      **where)
    major = int.from_bytes(data[8:10], "little")
    if major > wire.MAJOR:
        raise TooNew("the stream is of a newer major version; read it with a newer migstream", field="major",
                     expected=f"<= {wire.MAJOR}", found=major, **where)
    fields = _parse(_PREAMBLE, data, 0, "preamble")
    if major < 1 or fields.flags or fields.header_length != wire.PREAMBLE_SIZE:
        raise Corrupt("no such version, flags or header length", found=f"major {major}, flags {fields.flags:#x}, "
                      f"header_length {fields.header_length}", **where)
    if fields.arch not in list(Arch):
        raise TooNew("unknown architecture", field="arch", expected=", ".join(f"{a.value} ({a.label})" for a in Arch),
                     found=fields.arch, **where)
    return Preamble(major, int(fields.minor), Arch(fields.arch))


_HEADER_RULES: tuple[tuple[str, Callable[[Any], bool], type[StreamError], str], ...] = (
    ("kind", lambda h: all(0x20 <= c < 0x7F for c in h.kind), Corrupt, "kind is not four printable characters"),
    ("version", lambda h: h.version >= 1, Corrupt, "version 0"),
    ("flags", lambda h: not h.flags & ~wire.FLAGS, TooNew, "unknown section flag"),
    ("scope", lambda h: h.scope in wire.SCOPE_CODES, TooNew, "unknown scope"),
    ("codec", lambda h: h.codec in wire.CODECS, TooNew, "unknown codec"),
    ("filter", lambda h: h.filter in wire.FILTERS, TooNew, "unknown filter"),
    ("stored_length", lambda h: h.stored_length <= limits.MAX_STORED, LimitExceeded, "section too long"),
    ("raw_length", lambda h: h.raw_length <= limits.MAX_RAW, LimitExceeded, "section too long when decoded"),
    ("raw_length", lambda h: h.codec or h.raw_length == h.stored_length, Corrupt, "lengths differ without a codec"),
    ("raw_length", lambda h: h.raw_length or not h.stored_length, Corrupt, "stored bytes of an empty section"),
    ("first_vcpu", lambda h: h.first_vcpu + h.vcpu_count <= limits.MAX_VCPUS, LimitExceeded, "too many vCPUs"),
)


def _check_header(header: Any, offset: int, number: int) -> None:
    for field, good, error, what in _HEADER_RULES:
        if not good(header):
            raise error(what, offset=offset, section=f"#{number} {_kind_text(header.kind)}", field=field,
                        found=getattr(header, field))


def _section(header: Any, stored: bytes, offset: int, number: int) -> Section:
    return Section(header.kind.decode("ascii"), stored, header.raw_length, header.codec, header.filter, header.flags,
                   header.version, header.scope, header.layout, header.first_vcpu, header.vcpu_count, offset, number)


class FrameWriter:
    """Turns sections into the bytes of one stream; keeps the counts that the end section states."""

    def __init__(self, arch: Arch, minor: int = wire.MINOR) -> None:
        """`minor`: the lowest that has all kinds that will be sent."""
        self._arch, self._minor = arch, minor
        self._count = 0
        self._length = 0
        self._headers_crc = 0
        self._ended = False

    @property
    def offset(self) -> int:
        """Bytes given out so far."""
        return self._length

    def begin(self) -> bytes:
        """Return the preamble; call once, first."""
        head = _PREAMBLE.build({"major": wire.MAJOR, "minor": self._minor, "arch": self._arch, "flags": 0,
                                    "header_length": wire.PREAMBLE_SIZE, "crc": 0})[:-4]
        data = head + struct.pack("<I", crc32c(head))
        self._headers_crc = crc32c(head)
        self._length = len(data)
        return data

    def send(self, section: Section) -> list[bytes | memoryview]:
        """Return the buffers to write, in order; the payload is `section.stored` itself, not a copy.

        Raises: UsageError after `end()`.
        """
        self._check_open(section.kind)
        header = self._header(section)
        if section.kind != "END ":
            self._headers_crc = crc32c(header[:-4], self._headers_crc)
        padding = bytes(-len(section.stored) % wire.ALIGN)
        self._count += 1
        self._length += len(header) + len(section.stored) + len(padding)
        return [header, section.stored, padding] if padding else [header, section.stored]

    def send_banks(self, banks: SmallBanks, first: int, end: bool, worth: int) -> tuple[bytes, int]:
        """Return the bytes of the sections of banks from number `first` on, and of the end, and how many they are.

        It stops at a bank with a value out of its bounds or a payload of `worth` bytes or more, which is for `send()`;
        0 sections where nothing is compiled. Raises: UsageError after `end()`.
        """
        self._check_open("BANK")
        if compiled is None:
            return b"", 0
        counts = bytearray(_COUNTS.pack(self._count, self._headers_crc, self._length))
        data, sent = compiled.pack(banks.made, first, counts, _END_HEAD if end else b"", worth)
        self._count, self._headers_crc, self._length = _COUNTS.unpack(counts)
        self._ended = first + sent > banks.length
        return data, sent

    @property
    def ended(self) -> bool:
        """True once the end section was given out."""
        return self._ended

    def end(self) -> list[bytes | memoryview]:
        """Return the end section's buffers; nothing may follow. Raises: UsageError the second time."""
        total = self._length + wire.HEADER_SIZE + _END.size
        stored = _END.build({"sections": self._count + 1, "headers_crc": self._headers_crc, "total_length": total})
        buffers = self.send(Section("END ", stored, len(stored)))
        self._ended = True
        return buffers

    def _check_open(self, kind: str) -> None:
        if self._ended:
            raise UsageError(f"a section {kind.strip()} after the end section: no reader would take the stream")

    def _header(self, section: Section) -> bytes:
        lengths = _LENGTHS.pack(len(section.stored), section.raw_length, crc32c(section.stored))
        head = head_of(section)[:-4 - _LENGTHS.size] + lengths
        return head + struct.pack("<I", crc32c(head))
