"""Annotated hex: bytes in groups, each with its offset and what it is. `tests.build.parse_hex` is the way back.

A line is `OFFSET: HEX # WORDS`, the offset in hexadecimal; `#` begins a comment, empty lines are nothing. The
annotation follows the stream as far as its lengths lead, so a broken stream is described up to where it breaks.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgpack

from migstream.errors import printable
from migstream.wire import stream as wire
from tests.bless.layouts import STREAM, walk

_WIDE = 32
_MSGPACK = (b"MACH", b"HOST", b"CNTR", b"OPAQ")
_Group = tuple[bytes, str]

# Fields of a preamble and a header that share a line, in bytes: 8 | 12 | 12, and 4+4+4 | 12 | 16 | 8.
_PREAMBLE_LINES = (8, 12, 12)
_HEADER_LINES = (12, 12, 16, 8)

# kind: (head schema, row schema), and how many rows the head's count says.
_TABLES = {
    b"REGL": ("REGL_head", "REGL_slot"),
    b"RAML": ("RAML_head", "RAML_region"),
    b"RAMP": ("RAMP_head", "RAMP_run"),
}


def dump(data: bytes, title: str) -> str:
    """Text of `data`, with `title` in its first lines."""
    lines = [f"# {line}" for line in title.splitlines()]
    position = 0
    for chunk, words in _groups(data):
        for start in range(0, len(chunk), _WIDE):
            note = (words if not start else "").replace("\n", " ")
            text = f"{position:04x}: {chunk[start:start + _WIDE].hex(' ')}"
            lines.append(f"{text:<54} # {note}" if note else text)
            position += len(chunk[start:start + _WIDE])
    return "\n".join(lines) + "\n"


def _groups(data: bytes) -> Iterator[_Group]:
    yield from _fields("preamble", data[:wire.PREAMBLE_SIZE], _PREAMBLE_LINES)
    position = wire.PREAMBLE_SIZE
    while position < len(data):
        header = data[position:position + wire.HEADER_SIZE]
        yield from _fields("section_header", header, _HEADER_LINES)
        position += len(header)
        if len(header) == wire.HEADER_SIZE:
            length = int.from_bytes(header[24:32], "little")
            payload, padding = data[position:position + length], data[position + length:position + length + -length % 8]
            yield from _payload(header, payload)
            yield padding, "padding"
            position += len(payload) + len(padding)


def _fields(name: str, data: bytes, lines: tuple[int, ...]) -> Iterator[_Group]:
    """Fields of a fixed struct, several on a line."""
    start = 0
    for length in lines:
        inside = [row for row in walk(STREAM[name]) if start <= row["offset"] < start + length]
        words = ", ".join(_word(data, row["name"], row["offset"], row["size"], row["type"]) for row in inside)
        yield data[start:start + length], words
        start += length


def _word(data: bytes, name: str, offset: int, size: int, kind: str) -> str:
    value = data[offset:offset + size]
    if name == "kind" and size == 4 and offset == 0:
        return f"kind {printable(value.decode('latin-1'))!r}"
    if kind == "bytes" or kind.startswith("constant"):
        return name
    number = int.from_bytes(value, "little")
    return f"{name} {number}" if number < 1 << 16 and "crc" not in name else f"{name} {number:#x}"


def _payload(header: bytes, payload: bytes) -> Iterator[_Group]:
    kind, coded = header[:4], header[9]
    if coded:
        yield payload, "payload, zstd"
    elif kind in _TABLES:
        yield from _table(payload, *_TABLES[kind])
    elif kind == b"END ":
        yield from _fields("END", payload[:16], (16,))
        yield payload[16:], "more than an end section"
    else:
        yield payload, _text(payload) if kind in _MSGPACK else "payload"


def _table(payload: bytes, head: str, row: str) -> Iterator[_Group]:
    first, each = STREAM[head].sizeof(), STREAM[row].sizeof()
    yield from _fields(head, payload[:first], (first,))
    at = {name["name"]: name["offset"] for name in walk(STREAM[head])}["count"]
    count = min(int.from_bytes(payload[at:at + 4], "little"), (len(payload) - first) // each if payload else 0)
    for start in range(first, first + count * each, each):
        yield from _fields(row, payload[start:start + each], (each,))
    yield payload[first + count * each:], "data"


def _text(payload: bytes) -> str:
    try:
        return "msgpack " + printable(msgpack.unpackb(payload), 200)
    except Exception as error:  # the payload is wrong on purpose: anything may come
        return f"msgpack that is wrong: {printable(error)}"
