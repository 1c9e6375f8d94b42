"""Streams for tests, right and wrong, made with `struct` alone: a second writer beside the library's, from SPEC.md.

Every field of a section can be set to what it should not be; checksums and the end section are right unless a test
says otherwise, so that what is wrong is reached.
"""

from __future__ import annotations

import re
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import msgpack
import numpy as np
from crc32c import crc32c

from migstream import codec, sections
from migstream.contract import Behaviour
from migstream.frames import FrameWriter, Section
from migstream.model import Bank, HostSummary, Layout, Machine, OpaqueState, RamRun, Scope
from migstream.reader import StreamReader
from migstream.sections import EncodedBank, Item, RamLayout, RamPages

MAGIC = bytes.fromhex("894d49470d0a1a0a")
PREAMBLE = struct.Struct("<8sHHHHI8s")
HEADER = struct.Struct("<4sHHBBBBIIIQQI")
PREAMBLE_SIZE, HEADER_SIZE = 32, 48
X86_64, ARM64 = 62, 183
VM, VCPU = 1, 2
CRITICAL, UPDATE = 1, 2
MSR = 0x2030_0002_0000_0000
STRUCT = 0xF001_003E_0000_0000
LSTAR, STAR, TSC_AUX, WALL_CLOCK = MSR | 0xC000_0082, MSR | 0xC000_0081, MSR | 0xC000_0103, MSR | 0x11
REGS, MP_STATE, CLOCK, CPUID2, NESTED = STRUCT | 6, STRUCT | 12, STRUCT | 17, STRUCT | 1, STRUCT | 5


@dataclass(frozen=True)
class Part:
    """A section as it will be written. None: what is right for the rest."""

    kind: bytes
    payload: bytes = b""
    version: int = 1
    flags: int = CRITICAL
    scope: int = 0
    codec: int = 0
    filter: int = 0
    reserved: int = 0
    layout: int = 0
    first_vcpu: int = 0
    vcpu_count: int = 0
    stored_length: int | None = None
    raw_length: int | None = None
    payload_crc: int | None = None
    header_crc: int | None = None
    padding: bytes | None = None

    def but(self, **fields: Any) -> Part:
        """The same section with other fields."""
        return replace(self, **fields)

    def header(self) -> bytes:
        """48 bytes."""
        length = len(self.payload) if self.stored_length is None else self.stored_length
        head = HEADER.pack(self.kind, self.version, self.flags, self.scope, self.codec, self.filter, self.reserved,
                           self.layout, self.first_vcpu, self.vcpu_count, length,
                           length if self.raw_length is None else self.raw_length,
                           crc32c(self.payload) if self.payload_crc is None else self.payload_crc)
        return head + (crc32c(head) if self.header_crc is None else self.header_crc).to_bytes(4, "little")

    def bytes(self) -> bytes:
        """Header, payload and padding."""
        padding = bytes(-len(self.payload) % 8) if self.padding is None else self.padding
        return self.header() + self.payload + padding


def preamble(*, magic: bytes = MAGIC, major: int = 1, minor: int = 0, arch: int = X86_64, flags: int = 0,
             header_length: int = PREAMBLE_SIZE, reserved: bytes = bytes(8)) -> bytes:
    """32 bytes with their checksum."""
    head = PREAMBLE.pack(magic, major, minor, arch, flags, header_length, reserved)
    return head + crc32c(head).to_bytes(4, "little")


def end_part(start: bytes, parts: Sequence[Part], **fields: int) -> Part:
    """The end section for what goes before; `sections`, `headers_crc` and `total_length` can be set wrong."""
    headers = b"".join((start[:-4], *(p.header()[:-4] for p in parts)))
    right = {"sections": len(parts) + 1, "headers_crc": crc32c(headers),
             "total_length": len(start) + sum(len(p.bytes()) for p in parts) + HEADER_SIZE + 16}
    assert fields.keys() <= right.keys()
    return Part(b"END ", struct.pack("<IIQ", *{**right, **fields}.values()))


def stream(*parts: Part, start: bytes | None = None, end: Callable[[Part], Part] | None = lambda part: part,
           **end_fields: int) -> bytes:
    """A whole stream. `end` may change the end section, or be None to leave it out."""
    start = preamble() if start is None else start
    body = b"".join(part.bytes() for part in parts)
    return start + body + (end(end_part(start, parts, **end_fields)).bytes() if end else b"")


def offsets(data: bytes) -> list[int]:
    """Offset of each section's header, by number; stops where a stated length leads out of the data."""
    out, position = [], PREAMBLE_SIZE
    while position + HEADER_SIZE <= len(data):
        out.append(position)
        (length,) = struct.unpack_from("<Q", data, position + 24)
        position += HEADER_SIZE + length + -length % 8
    return out


def resum(data: bytes) -> bytes:
    """The same bytes with all checksums, padding and end counts made right, as far as the lengths lead."""
    out = bytearray(data)
    _sum(out, 0, PREAMBLE_SIZE)
    headers = crc32c(bytes(out[:PREAMBLE_SIZE - 4]))
    for number, offset in enumerate(offsets(data)):
        start = offset + HEADER_SIZE
        (length,) = struct.unpack_from("<Q", out, offset + 24)
        if bytes(out[offset:offset + 4]) == b"END " and length == 16 and start + 16 <= len(out):
            struct.pack_into("<IIQ", out, start, number + 1, headers, start + 16)
        struct.pack_into("<I", out, offset + 40, crc32c(bytes(out[start:start + length])))
        _sum(out, offset, HEADER_SIZE)
        headers = crc32c(bytes(out[offset:start - 4]), headers)
    return bytes(out)


def _sum(out: bytearray, offset: int, length: int) -> None:
    if offset + length <= len(out):
        struct.pack_into("<I", out, offset + length - 4, crc32c(bytes(out[offset:offset + length - 4])))


# Payloads.


def pack(value: Any) -> bytes:
    """Canonical msgpack."""
    return bytes(msgpack.packb(_sorted(value), use_bin_type=True))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list | tuple) else value


def mach(vcpus: Any = 1, *, arch: Any = X86_64, memory: Any = (), devices: Any = None) -> Part:
    """A machine section."""
    return Part(b"MACH", pack({"arch": arch, "vcpus": vcpus, "memory": memory, "devices": devices or {}}))


def host(kernel: Any = "6.18.5", cpu: Any = "A CPU", backend: Any = "kvm", notes: Any = ()) -> Part:
    """A host section, which is ancillary."""
    return Part(b"HOST", pack({"kernel": kernel, "cpu": cpu, "backend": backend, "notes": notes}), flags=0)


PSCI, STD, STD_HYP = 0x6030_0000_0014_0000, 0x6030_0000_0016_0000, 0x6030_0000_0016_0001
TRNG, PV_TIME = 0x8400_0050 << 32, 0x8000_0001 << 32 | 0xC500_0020
BEHAVES_AS = ([STD, bytes(8), "TRNG_VERSION: not supported"], [STD_HYP, b"\1" + bytes(7), "PV_TIME_FEATURES: 0x0"])


def cntr(*, found: Any = "measured", behaves_as: Any = BEHAVES_AS, firmware: Any = ([PV_TIME, 0], [TRNG, 2**64 - 1]),
         unknown: Any = ()) -> Part:
    """A contract section, which is ancillary."""
    fields = {"found": found, "behaves_as": behaves_as, "firmware": firmware, "unknown": unknown}
    return Part(b"CNTR", pack(fields), flags=0)


def regl(scope: int, phase: int, *slots: tuple[int, int], count: int | None = None, reserved: int = 0) -> Part:
    """A register layout of (id, size) columns."""
    head = struct.pack("<HHI", phase, reserved, len(slots) if count is None else count)
    return Part(b"REGL", head + b"".join(struct.pack("<QII", id, size, 0) for id, size in slots), scope=scope)


def bank(layout: int, rows: Sequence[Sequence[int]], *, scope: int = VCPU, first: int = 0, filter: int = 0,
         raw: bytes | None = None, **fields: Any) -> Part:
    """A stored bank, vCPU by word; `raw` instead of filtered rows. A VM bank has one row."""
    payload = filtered(rows, filter) if raw is None else raw
    return Part(b"BANK", payload, scope=scope, filter=filter, layout=layout,
                **{"first_vcpu": first, "vcpu_count": len(rows) if scope == VCPU else 0, **fields})


def filtered(rows: Sequence[Sequence[int]], how: int) -> bytes:
    """The three filters word by word, as SPEC.md says it; slow on purpose."""
    columns = list(zip(*rows, strict=True))
    if how < 2:
        return b"".join(word.to_bytes(8, "little") for line in (rows, columns)[how] for word in line)
    marked = [any(word != column[0] for word in column) for column in columns]
    bitmap = bytearray((len(marked) + 63) // 64 * 8)
    for i, mark in enumerate(marked):
        bitmap[i // 8] |= mark << i % 8
    steps = [(b - a) % 2**64 for column, mark in zip(columns, marked, strict=True) if mark
             for a, b in pairwise(column)]
    first, rest = (b"".join(word.to_bytes(8, "little") for word in words) for words in (rows[0], steps))
    return first + bytes(bitmap) + rest


def raml(*regions: tuple[int, int], page_size: int = 4096, count: int | None = None) -> Part:
    """A RAM layout of (address, size) ranges."""
    head = struct.pack("<II", page_size, len(regions) if count is None else count)
    return Part(b"RAML", head + b"".join(struct.pack("<QQ", *region) for region in regions))


def ramp(*runs: tuple[int, int, int], data: bytes = b"", count: int | None = None, reserved: int = 0) -> Part:
    """RAM pages: (address, pages, kind) runs; `data` as needed for the data runs, else that of a test's choice."""
    head = struct.pack("<II", len(runs) if count is None else count, reserved)
    return Part(b"RAMP", head + b"".join(struct.pack("<QQII", *run, 0) for run in runs) + data)


def opaq(name: Any = "disk", data: Any = b"\x01\x02") -> Part:
    """Opaque state."""
    return Part(b"OPAQ", pack({"name": name, "data": data}))


# Annotated hex: `OFFSET: HEX # WORDS`, the offset in hexadecimal.

_LINE = re.compile(r"([0-9a-f]+): ((?:[0-9a-f]{2} ?)*)$")


def parse_hex(text: str) -> bytes:
    """The bytes of annotated hex. Raises: ValueError for a line that is none, or whose offset is wrong."""
    out = bytearray()
    for number, line in enumerate(text.splitlines(), 1):
        plain = line.split("#")[0].strip()
        found = _LINE.match(plain)
        if plain and (not found or int(found[1], 16) != len(out)):
            raise ValueError(f"line {number}: not `OFFSET: HEX`, or the offset is not {len(out):#x}")
        out += bytes.fromhex(found[2] if found else "")
    return bytes(out)


def read_hex(path: str | Path) -> bytes:
    """The bytes of an annotated hex file."""
    return parse_hex(Path(path).read_text("utf-8"))


# zstd frames by hand (RFC 8878), so that they can be wrong, and are the same with every zstd library.

ZSTD_MAGIC = bytes.fromhex("28b52ffd")
BLOCK = 128 << 10


def zstd_frame(blocks: bytes, size: int | None) -> bytes:
    """One single-segment frame that states `size` in 8 bytes; None: states none, with the smallest window."""
    head = b"\x00\x38" if size is None else b"\xe0" + size.to_bytes(8, "little")
    return ZSTD_MAGIC + head + blocks


def zstd_blocks(*pieces: bytes | tuple[int, int]) -> bytes:
    """Blocks for these pieces, one after another: bytes as they are, or (byte, how often): 4 bytes for each 128 KiB."""
    blocks = [block for piece in pieces for block in _blocks(piece)]
    last = [0] * (len(blocks) - 1) + [1]
    return b"".join((size << 3 | kind << 1 | end).to_bytes(3, "little") + body
                    for (size, kind, body), end in zip(blocks, last, strict=True))


def _blocks(piece: bytes | tuple[int, int]) -> list[tuple[int, int, bytes]]:
    if isinstance(piece, bytes):
        return [(len(piece), 0, piece)]
    byte, count = piece
    return [(min(BLOCK, count - start), 1, bytes([byte])) for start in range(0, count, BLOCK)]


def zstd(part: Part, stored: bytes | None = None) -> Part:
    """The same section in a frame of one stored block; or with `stored` in place of that frame."""
    raw = part.payload
    stored = zstd_frame(zstd_blocks(raw), len(raw)) if stored is None else stored
    return part.but(payload=stored, codec=1, raw_length=len(raw))


# Parts of good streams that tests change.

SLOTS = ((LSTAR, 8), (REGS, 144), (MP_STATE, 4))
ROW_WORDS = 20


def row(vcpu: int) -> list[int]:
    """Values of `SLOTS`: the first and last word and one between differ from vCPU to vCPU."""
    return [0xFFFF_FFFF_8100_0000 - vcpu, *(5 if n == 3 else 0x1000 * vcpu + n for n in range(18)), vcpu % 2]


def plain(vcpus: int = 1) -> list[Part]:
    """Machine, one layout of each scope and their banks: the smallest stream with both."""
    return [mach(vcpus), regl(VM, 3, (WALL_CLOCK, 8)), regl(VCPU, 4, *SLOTS),
            bank(0, [[0x1234]], scope=VM, filter=2), bank(1, [row(k) for k in range(vcpus)], filter=2)]


def with_ram(*pages: Part, regions: tuple[tuple[int, int], ...] = ((0, 0x4000),)) -> list[Part]:
    """A machine of four pages, their layout and these pages."""
    return [mach(memory=[[0, 0x4000]]), raml(*regions), *pages]


def page(byte: int) -> bytes:
    """One page, the same byte all over."""
    return bytes([byte]) * 4096


@contextmanager
def guarded(seconds: float = 2.0) -> Iterator[None]:
    """Fail what takes longer: a stream must not be able to keep a reader busy. Raises: TimeoutError."""
    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Model <-> bytes through the library.


@dataclass(frozen=True)
class Saved:
    """All that a stream can hold."""

    machine: Machine
    host: HostSummary | None = None
    behaviour: Behaviour | None = None
    layouts: tuple[Layout, ...] = ()
    banks: tuple[Bank, ...] = ()
    ram: RamLayout | None = None
    runs: tuple[RamRun, ...] = ()
    opaque: tuple[OpaqueState, ...] = ()


def encode(saved: Saved, *, level: int = codec.DEFAULT_LEVEL, how: int = codec.DELTA) -> bytes:
    """The stream of a model, through the library's writer."""
    writer = FrameWriter(saved.machine.arch, int(saved.behaviour is not None))
    out: list[bytes | memoryview] = [writer.begin()]
    for section in _sections(saved, level, how):
        out += writer.send(section)
    return b"".join([*out, *writer.end()])


def _sections(saved: Saved, level: int, how: int) -> Iterator[Section]:
    late = [b for b in saved.banks if not b.layout.phase.prologue]
    early = [b for b in saved.banks if b.layout.phase.prologue and not b.update]
    updates = [b for b in saved.banks if b.update]
    yield sections.encode(saved.machine)
    if saved.host:
        yield sections.encode(saved.host)
    if saved.behaviour:
        yield sections.encode(saved.behaviour)
    yield from (sections.encode(layout) for layout in saved.layouts)
    yield from (_bank(saved, b, level, how) for b in (*early, *updates))
    if saved.ram:
        yield sections.encode(saved.ram)
    yield from (sections.encode_ram([run], level) for run in saved.runs)
    yield from (_bank(saved, b, level, how) for b in late)
    yield from (sections.encode(state) for state in saved.opaque)


def _bank(saved: Saved, item: Bank, level: int, how: int) -> Section:
    return sections.encode_bank(item, saved.layouts.index(item.layout), level, how)


@dataclass
class Read:
    """What came out of a stream."""

    reader: StreamReader = field(default_factory=StreamReader)
    items: list[tuple[Section, Item]] = field(default_factory=list)

    def take(self, data: bytes) -> None:
        """Feed one chunk and take what it completes."""
        self.reader.feed(data)
        while found := self.reader.next():
            self.items.append(found)

    def saved(self) -> Saved:
        """The model, banks decoded."""
        assert self.reader.machine is not None
        found = [item for _, item in self.items]
        return Saved(self.reader.machine, self.reader.host, self.reader.behaviour, tuple(self.reader.layouts),
                     tuple(item.decode() for item in found if isinstance(item, EncodedBank)),
                     next((item for item in found if isinstance(item, RamLayout)), None),
                     tuple(run for item in found if isinstance(item, RamPages) for run in item.runs),
                     tuple(item for item in found if isinstance(item, OpaqueState)))


def decode(data: bytes, sizes: Iterable[int] = ()) -> Read:
    """Read a whole stream, in chunks of these sizes (then the rest), every bank's values too. Raises: StreamError."""
    read, position = Read(), 0
    for size in sizes:
        read.take(data[position:position + size])
        position += size
    read.take(data[position:])
    read.reader.end_of_input()
    for _, item in read.items:
        if isinstance(item, EncodedBank):
            item.decode()
    return read


def equal(a: Saved, b: Saved) -> bool:
    """Two models are the same, matrices and pages included."""
    return bool(_plain(a) == _plain(b))


def _plain(saved: Saved) -> Any:
    banks = [(b.layout, b.first_vcpu, b.update, b.values.tolist()) for b in saved.banks]
    runs = [(r.guest_address, r.pages, None if r.data is None else bytes(r.data)) for r in saved.runs]
    return replace(saved, banks=(), runs=()), banks, runs


def matrix(rows: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A bank's values."""
    return np.array(rows, np.uint64)


def values_bank(layout: Layout, rows: Sequence[Sequence[int]], first: int = 0, *, update: bool = False) -> Bank:
    """A bank of these rows."""
    assert layout.scope == Scope.VCPU or len(rows) == 1
    return Bank(layout, first, matrix(rows), update)
