"""Schemas of the stream itself: preamble, section header, and the fixed part of each section's payload.

formats/SPEC.md is normative and formats/layouts/stream-1.json is this file's frozen picture. All integers are
little-endian. A released schema never changes: new content gets a new version or a new kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from construct import Bytes, Const, Construct, Int8ul, Int16ul, Int32ul, Int64ul, Struct

MAGIC = b"\x89MIG\r\n\x1a\n"
"""As PNG's: a high bit that 7-bit paths strip, CR LF and LF that text modes change, a DOS end of file."""

MAJOR = 1
MINOR = 1
"""The newest minor whose kinds this version knows. A writer states the lowest that has all kinds of its stream."""

PREAMBLE: Construct[Any, Any] = Struct(
    "magic" / Const(MAGIC),
    "major" / Int16ul,
    "minor" / Int16ul,
    "arch" / Int16ul,
    "flags" / Int16ul,
    "header_length" / Int32ul,
    "reserved" / Const(bytes(8)),
    "crc" / Int32ul,
)

SECTION_HEADER: Construct[Any, Any] = Struct(
    "kind" / Bytes(4),
    "version" / Int16ul,
    "flags" / Int16ul,
    "scope" / Int8ul,
    "codec" / Int8ul,
    "filter" / Int8ul,
    "reserved" / Const(bytes(1)),
    "layout" / Int32ul,
    "first_vcpu" / Int32ul,
    "vcpu_count" / Int32ul,
    "stored_length" / Int64ul,
    "raw_length" / Int64ul,
    "payload_crc" / Int32ul,
    "header_crc" / Int32ul,
)

LAYOUT_HEAD: Construct[Any, Any] = Struct("phase" / Int16ul, "reserved" / Const(bytes(2)), "count" / Int32ul)
LAYOUT_SLOT: Construct[Any, Any] = Struct("id" / Int64ul, "size" / Int32ul, "reserved" / Const(bytes(4)))

RAM_LAYOUT_HEAD: Construct[Any, Any] = Struct("page_size" / Int32ul, "count" / Int32ul)
RAM_REGION: Construct[Any, Any] = Struct("guest_address" / Int64ul, "size" / Int64ul)

RAM_PAGES_HEAD: Construct[Any, Any] = Struct("count" / Int32ul, "reserved" / Const(bytes(4)))
RAM_RUN: Construct[Any, Any] = Struct("guest_address" / Int64ul, "pages" / Int64ul, "kind" / Int32ul,
                                     "reserved" / Const(bytes(4)))

END: Construct[Any, Any] = Struct("sections" / Int32ul, "headers_crc" / Int32ul, "total_length" / Int64ul)

PREAMBLE_SIZE = PREAMBLE.sizeof()
HEADER_SIZE = SECTION_HEADER.sizeof()
ALIGN = 8


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of section: its four characters, the newest version known, its use, and the first minor with it."""

    name: str
    version: int
    critical: bool
    what: str
    minor: int = 0


KINDS = {
    kind.name: kind
    for kind in (
        Kind("MACH", 1, True, "machine: vCPUs, memory map, devices to create (msgpack)"),
        Kind("HOST", 1, False, "where it was saved, and notes of the save (msgpack)"),
        Kind("CNTR", 1, False, "contract: what the kernel behaved as where it has no register (msgpack)", minor=1),
        Kind("REGL", 1, True, "register layout: ids and sizes of a bank's columns"),
        Kind("BANK", 1, True, "register values: a matrix, vCPU by register (VM bank: one row)"),
        Kind("RAML", 1, True, "RAM layout: which guest-physical ranges follow"),
        Kind("RAMP", 1, True, "RAM pages: runs of data and of zero pages"),
        Kind("OPAQ", 1, True, "opaque device state of a VMM (msgpack)"),
        Kind("END ", 1, True, "counts, total length, checksum over all section headers"),
    )
}

CRITICAL = 1 << 0
"""Section flag: a reader that doesn't know the kind or version must refuse; without it, skip and report."""

UPDATE = 1 << 1
"""Section flag of a VM bank: values of an earlier bank that had changed by the pause."""

FLAGS = CRITICAL | UPDATE

SCOPE_CODES = {0: "", 1: "vm", 2: "vcpu"}
CODECS = {0: "none", 1: "zstd"}
FILTERS = {0: "none", 1: "register-major", 2: "register-major delta"}
RUN_DATA, RUN_ZERO = 0, 1
