"""Streams that every reader must refuse, 1: preamble, headers, end, unknown kinds, the order of sections."""

from __future__ import annotations

from dataclasses import dataclass

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded, StreamError, TooNew, Truncated
from tests import build as b
from tests.build import VCPU, VM, Part


@dataclass(frozen=True)
class Bad:
    """A vector: what is wrong with it and what a reader says.

    Attributes:
        section, field: as in the error.
        at: number of the section that the offset points to; None: `offset` says.
        offset: bytes from the start of the stream; -1: the end of the data.
    """

    what: str
    error: type[StreamError]
    section: str
    field: str
    data: bytes
    at: int | None = None
    offset: int = 0

    @property
    def expected_offset(self) -> int:
        """Offset that the error states."""
        if self.at is not None:
            return b.offsets(self.data)[self.at]
        return self.offset if self.offset >= 0 else len(self.data)


_MACH, _HOST, _OPAQ = b.mach(), b.host(), b.opaq()
_CNTR = b.cntr(behaves_as=())
_PLAIN = b.plain(1)
_VM_LAYOUT, _VCPU_LAYOUT, _VM_BANK, _BANK = _PLAIN[1:]
_UNKNOWN = Part(b"XTRA", b"later")
_GOOD = b.stream(*_PLAIN)
_LATE = _OPAQ.payload


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1:]


def _first(what: str, error: type[StreamError], field: str, **wrong: object) -> Bad:
    """A wrong header of the first section."""
    return Bad(what, error, "#0 MACH", field, b.stream(_MACH.but(**wrong)), at=0)


PREAMBLE: dict[str, Bad] = {
    "empty": Bad("no byte at all", Truncated, "preamble", "", b""),
    "magic-cut": Bad("half a magic", Truncated, "preamble", "", b.MAGIC[:4], offset=-1),
    "magic-text-mode": Bad("CR LF became LF on the way", Corrupt, "preamble", "magic",
                           _GOOD.replace(b"\r\n", b"\n", 1)),
    "magic-other": Bad("another kind of file", Corrupt, "preamble", "magic", b"\x7fELF\x02\x01\x01\x00" + bytes(24)),
    "preamble-crc": Bad("one bit of the preamble", Corrupt, "preamble", "crc", _flip(_GOOD, 10)),
    "newer-major": Bad("major 2, and nothing after the preamble that major 1 knows", TooNew, "preamble", "major",
                       b.preamble(major=2, header_length=64, flags=1, reserved=b"\x01" * 8) + b"another format"),
    "newer-major-65535": Bad("the greatest major", TooNew, "preamble", "major", b.preamble(major=0xFFFF)),
    "major-0": Bad("major 0", Corrupt, "preamble", "", b.stream(_MACH, start=b.preamble(major=0))),
    "preamble-flags": Bad("a flag in the preamble", Corrupt, "preamble", "",
                          b.stream(_MACH, start=b.preamble(flags=1))),
    "preamble-length": Bad("a preamble of 40 bytes", Corrupt, "preamble", "",
                           b.stream(_MACH, start=b.preamble(header_length=40))),
    "preamble-reserved": Bad("reserved bytes of the preamble set", Corrupt, "preamble", "reserved",
                             b.stream(_MACH, start=b.preamble(reserved=bytes(7) + b"\x01"))),
    "arch-unknown": Bad("an architecture that is none of ours", TooNew, "preamble", "arch",
                        b.stream(_MACH, start=b.preamble(arch=243))),
}

HEADER: dict[str, Bad] = {
    "header-crc": Bad("one bit of a header", Corrupt, "#0 header", "header_crc", _flip(_GOOD, 34), at=0),
    "header-crc-zero": Bad("no header checksum", Corrupt, "#0 header", "header_crc",
                           b.stream(_MACH.but(header_crc=0)), at=0),
    "payload-crc": _first("one bit of a payload", Corrupt, "payload_crc", payload_crc=1),
    "header-reserved": Bad("the reserved byte of a header set", Corrupt, "#0 header", "reserved",
                           b.stream(_MACH.but(reserved=1)), at=0),
    "kind-escape": Bad("a kind that would clear a terminal", Corrupt, "#0 \x1b[2J", "kind",
                       b.stream(_MACH.but(kind=b"\x1b[2J")), at=0),
    "kind-zero": Bad("a kind of zero bytes", Corrupt, "#0 \0\0\0\0", "kind", b.stream(_MACH.but(kind=bytes(4))), at=0),
    "version-0": _first("version 0", Corrupt, "version", version=0),
    "flag-unknown": _first("a flag that nobody knows", TooNew, "flags", flags=0x8001),
    "flag-unknown-ancillary": Bad("an unknown flag on an unknown ancillary section", TooNew, "#0 XTRA", "flags",
                                  b.stream(_UNKNOWN.but(flags=4), _MACH), at=0),
    "scope-unknown": _first("scope 3", TooNew, "scope", scope=3),
    "codec-unknown": _first("codec 2", TooNew, "codec", codec=2),
    "filter-unknown": _first("filter 3", TooNew, "filter", filter=3),
    "stored-length-max": _first("a stored length of 2^64 - 1", LimitExceeded, "stored_length",
                                stored_length=2**64 - 1),
    "stored-length-2-63": _first("a stored length of 2^63, negative where signed", LimitExceeded, "stored_length",
                                 stored_length=2**63),
    "stored-length-over": _first("a stored length of one above the limit", LimitExceeded, "stored_length",
                                 stored_length=limits.MAX_STORED + 1),
    "stored-length-beyond": Bad("a stored length of the limit in a short stream", Truncated, "MACH", "",
                                b.stream(_MACH.but(stored_length=limits.MAX_RAW, raw_length=limits.MAX_RAW)),
                                offset=-1),
    "stored-length-short": Bad("a stored length 8 too small: the next header is payload", Corrupt, "#0 MACH",
                               "payload_crc", b.stream(_MACH.but(stored_length=len(_MACH.payload) - 8)), at=0),
    "raw-length-1-tib": _first("a section that claims 1 TiB when decoded", LimitExceeded, "raw_length",
                               codec=1, raw_length=1 << 40),
    "raw-length-max": _first("a raw length of 2^64 - 1", LimitExceeded, "raw_length", codec=1, raw_length=2**64 - 1),
    "raw-length-over": _first("a raw length of one above the limit", LimitExceeded, "raw_length",
                              codec=1, raw_length=limits.MAX_RAW + 1),
    "raw-length-differs": _first("lengths that differ without a codec", Corrupt, "raw_length",
                                 raw_length=len(_MACH.payload) + 1),
    "raw-length-zero": _first("stored bytes of an empty section", Corrupt, "raw_length", codec=1, raw_length=0),
    "vcpus-over-header": _first("a vCPU range one beyond the limit", LimitExceeded, "first_vcpu",
                                first_vcpu=limits.MAX_VCPUS, vcpu_count=1),
    "vcpus-max-header": _first("a vCPU range of 2^32 - 1 from 2^32 - 1", LimitExceeded, "first_vcpu",
                               first_vcpu=2**32 - 1, vcpu_count=2**32 - 1),
    "padding": Bad("a bit in the padding", Corrupt, "#0 MACH", "",
                   b.stream(_MACH.but(padding=b"\x01")), offset=b.PREAMBLE_SIZE + b.HEADER_SIZE + len(_MACH.payload)),
    "cut-in-header": Bad("the stream ends within a header", Truncated, "section header", "",
                         _GOOD[:b.PREAMBLE_SIZE + 20], offset=-1),
    "cut-in-payload": Bad("the stream ends within a payload", Truncated, "MACH", "",
                          _GOOD[:b.PREAMBLE_SIZE + b.HEADER_SIZE + 10], offset=-1),
    **{f"unused-{field}": _first(f"{field} set in a section that has no use for it", Corrupt, field, **{field: 1})
       for field in ("scope", "filter", "layout", "first_vcpu", "vcpu_count")},
    "unused-layout-count": Bad("vcpu_count set in a register layout", Corrupt, "#1 REGL", "vcpu_count",
                               b.stream(_MACH, _VM_LAYOUT.but(vcpu_count=1)), at=1),
    "update-on-machine": _first("the update flag on a machine", Corrupt, "flags", flags=3),
}

UNKNOWN: dict[str, Bad] = {
    "unknown-critical": Bad("an unknown kind that is critical", TooNew, "#1 XTRA", "", b.stream(_MACH, _UNKNOWN), at=1),
    "newer-version": Bad("a newer version of a critical kind", TooNew, "#1 OPAQ", "",
                         b.stream(_MACH, _OPAQ.but(version=2)), at=1),
    "newer-version-65535": Bad("the greatest version", TooNew, "#0 MACH", "", b.stream(_MACH.but(version=0xFFFF)),
                               at=0),
    "newer-host-critical": Bad("a newer version of an ancillary kind that calls itself critical", TooNew, "#1 HOST", "",
                               b.stream(_MACH, _HOST.but(version=2, flags=1)), at=1),
    "newer-end": Bad("a newer version of the end section", TooNew, "#1 END", "",
                     b.stream(_MACH, end=lambda e: e.but(version=2)), at=1),
    "critical-as-ancillary": Bad("a critical kind without the flag: skipped, it would be lost", Corrupt, "#1 OPAQ",
                                 "flags", b.stream(_MACH, _OPAQ.but(flags=0)), at=1),
    "newer-as-ancillary": Bad("a newer version of a critical kind without the flag", Corrupt, "#1 OPAQ", "flags",
                              b.stream(_MACH, _OPAQ.but(version=2, flags=0)), at=1),
    "end-as-ancillary": Bad("an end section of a newer version without the flag: nothing would be complete", Corrupt,
                            "#2 END", "flags",
                            b.stream(_MACH, _VM_LAYOUT, end=lambda e: e.but(version=2, flags=0)), at=2),
    "host-critical": Bad("the ancillary kind with the flag", Corrupt, "#1 HOST", "flags",
                         b.stream(_MACH, _HOST.but(flags=1)), at=1),
}

END: dict[str, Bad] = {
    "missing-end": Bad("no end section", Truncated, "section header", "", b.stream(*_PLAIN, end=None), offset=-1),
    "only-preamble": Bad("nothing after the preamble", Truncated, "section header", "", b.preamble(), offset=-1),
    "end-sections": Bad("the end counts a section too many", Corrupt, "#5 END", "sections",
                        b.stream(*_PLAIN, sections=7), at=5),
    "end-sections-few": Bad("a section was taken out, and the end knows", Corrupt, "#1 END", "sections",
                            b.stream(_MACH, end=lambda _: b.end_part(b.preamble(), [_MACH, _HOST])), at=1),
    "end-headers-crc": Bad("the end's checksum over the headers", Corrupt, "#5 END", "headers_crc",
                           b.stream(*_PLAIN, headers_crc=0), at=5),
    "end-total-length": Bad("the end's total length", Corrupt, "#5 END", "total_length",
                            b.stream(*_PLAIN, total_length=2**64 - 1), at=5),
    "end-short": Bad("an end section of 8 bytes", Corrupt, "#1 END", "",
                     b.stream(_MACH, end=lambda e: e.but(payload=e.payload[:8])), at=1),
    "end-long": Bad("an end section of 24 bytes", Corrupt, "#1 END", "",
                    b.stream(_MACH, end=lambda e: e.but(payload=e.payload + bytes(8))), at=1),
    "end-empty": Bad("an empty end section", Corrupt, "#1 END", "",
                     b.stream(_MACH, end=lambda e: e.but(payload=b"")), at=1),
    "end-codec": Bad("an end section that says it is compressed", Corrupt, "#1 END", "codec",
                     b.stream(_MACH, end=lambda e: e.but(codec=1, raw_length=5)), at=1),
    "sections-swapped": Bad("two sections swapped on the way", Corrupt, "#3 END", "headers_crc", b.stream(
        _MACH, _OPAQ, b.opaq("net"),
        end=lambda _: b.end_part(b.preamble(), [_MACH, b.opaq("net"), _OPAQ])), at=3),
    "after-end": Bad("one byte after the end", Corrupt, "end", "", _GOOD + b"\0", offset=len(_GOOD)),
    "two-streams": Bad("a stream after the stream", Corrupt, "end", "", _GOOD + _GOOD, offset=len(_GOOD)),
    "end-twice": Bad("two end sections", Corrupt, "end", "", _GOOD + _GOOD[-64:], offset=len(_GOOD)),
}


def _order(what: str, number: int, kind: str, *parts: Part, field: str = "") -> Bad:
    """Sections of which number `number` comes at the wrong place."""
    return Bad(what, Corrupt, f"#{number} {kind}", field, b.stream(*parts), at=number)


_RAM = b.with_ram(b.ramp((0, 4, 1)))
_UPDATE = _VM_BANK.but(flags=b.CRITICAL | b.UPDATE)

ORDER: dict[str, Bad] = {
    "no-machine": _order("an end and nothing else", 0, "END"),
    "machine-not-first": _order("a register layout before the machine", 0, "REGL", *_PLAIN[1:]),
    "machine-twice": _order("two machines", 1, "MACH", _MACH, _MACH),
    "machine-late": _order("a machine after the layouts", 2, "MACH", _MACH, _VM_LAYOUT, _MACH),
    "host-twice": _order("two host sections", 2, "HOST", _MACH, _HOST, _HOST),
    "host-late": _order("the host after a layout", 2, "HOST", _MACH, _VM_LAYOUT, _HOST),
    "contract-twice": _order("two contract sections", 2, "CNTR", _MACH, _CNTR, _CNTR),
    "contract-late": _order("the contract after a layout", 2, "CNTR", _MACH, _VM_LAYOUT, _CNTR),
    "layout-after-bank": _order("a layout after a bank", 3, "REGL", _MACH, _VM_LAYOUT, _VM_BANK, _VCPU_LAYOUT),
    "layout-earlier-phase": _order("a layout of an earlier phase", 2, "REGL", _MACH, _VCPU_LAYOUT, _VM_LAYOUT,
                                   field="phase"),
    "bank-before-layout": _order("a bank of a layout that has not come", 2, "BANK", _MACH, _VM_LAYOUT, _BANK,
                                 field="layout"),
    "banks-swapped": _order("banks in another order than their layouts", 4, "BANK", _MACH, _VCPU_LAYOUT,
                            b.regl(VCPU, 4, (b.STAR, 8)), b.bank(1, [[1]]), _BANK.but(layout=0), field="layout"),
    "blackout-before-prologue": _order("a blackout bank before the prologue is complete", 3, "BANK",
                                       _MACH, _VM_LAYOUT, _VCPU_LAYOUT, _BANK, _VM_BANK,
                                       field="layout 0 (vm/feature)"),
    "update-before-bank": _order("an update of a bank that has not come", 2, "BANK", _MACH, _VM_LAYOUT, _UPDATE,
                                 field="layout 0 (vm/feature)"),
    "update-twice": _order("two updates of one bank", 4, "BANK", _MACH, _VM_LAYOUT, _VM_BANK, _UPDATE, _UPDATE,
                           field="flags"),
    "update-vcpu": _order("an update of a vCPU bank", 4, "BANK", _MACH, b.regl(VCPU, 3, (b.LSTAR, 8)),
                          _VCPU_LAYOUT.but(payload=b.regl(VCPU, 4, (b.STAR, 8)).payload), b.bank(0, [[1]]),
                          b.bank(0, [[2]], flags=3), field="flags"),
    "update-blackout": _order("an update of a blackout bank", 2, "BANK", _MACH, b.regl(VM, 6, (b.CLOCK, 48)),
                              b.bank(0, [[0] * 6], scope=VM, flags=3), field="flags"),
    "update-after-ram": _order("an update after the RAM layout", 5, "BANK", _RAM[0], _VM_LAYOUT, _VM_BANK, *_RAM[1:],
                               _UPDATE),
    "ram-after-blackout": _order("RAM after the blackout banks", 3, "RAML", _RAM[0], _VCPU_LAYOUT,
                                 b.bank(0, [b.row(0)]), *_RAM[1:]),
    "ram-layout-twice": _order("two RAM layouts", 2, "RAML", *_RAM[:2], _RAM[1]),
    "ram-layout-late": _order("a RAM layout after pages", 3, "RAML", *_RAM, _RAM[1]),
    "bank-after-opaque": _order("a bank after opaque state", 3, "BANK", _MACH, _VCPU_LAYOUT, _OPAQ,
                                b.bank(0, [b.row(0)])),
    "prologue-missing": _order("the prologue bank never comes", 4, "BANK", _MACH, _VM_LAYOUT, _VCPU_LAYOUT, _HOST.but(
        kind=b"XTRA"), _BANK, field="layout 0 (vm/feature)"),
    "blackout-missing": _order("the blackout bank never comes", 2, "END", _MACH, _VCPU_LAYOUT,
                               field="layout 0 (vcpu/state)"),
}

VECTORS: dict[str, Bad] = {**PREAMBLE, **HEADER, **UNKNOWN, **END, **ORDER}
