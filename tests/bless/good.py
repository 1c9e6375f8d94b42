"""Streams that every reader of major 1 must take: one row a vector, with what it shows."""

from __future__ import annotations

from dataclasses import dataclass

from migstream import codec, limits
from tests import build as b
from tests.build import VCPU, VM, Part


@dataclass(frozen=True)
class Good:
    """A vector: what it shows and its bytes.

    Attributes:
        made_by_zstd: True where a zstd library made part of it, so that another version may make other bytes.
    """

    what: str
    data: bytes
    made_by_zstd: bool = False


_DEVICES = {"irqchip": True, "pit": True, "tss_address": 0xFFFB_D000}
_VCPU_LAYOUT = b.regl(VCPU, 4, *b.SLOTS)
_ROWS3 = [b.row(k) for k in range(3)]
_UNKNOWN = Part(b"XTRA", b"later", version=9, flags=0, layout=7, vcpu_count=3)
_EARLY = b.regl(VM, 3, (b.WALL_CLOCK, 8), (b.MSR | 0x4000_0020, 8))
_CLOCK_LAYOUT = b.regl(VM, 6, (b.CLOCK, 48))
_CLOCK = b.bank(2, [[1000, 0, 0, 0, 0, 0]], scope=VM)
_RUNS = ((0x0, 1, 0), (0x1000, 2, 1), (0x3000, 1, 0))
_PAGES = b.ramp(*_RUNS, data=b.page(0xA5) + b.page(0x5A))
_TABLE = _PAGES.payload[:-2 * 4096]
_PACKED = b.zstd(_PAGES, b.zstd_frame(b.zstd_blocks(_TABLE, (0xA5, 4096), (0x5A, 4096)), len(_PAGES.payload)))


def _coded(filter: int, coded: bool) -> bytes:
    values = b.bank(0, _ROWS3, filter=filter)
    return b.stream(b.mach(3), _VCPU_LAYOUT, b.zstd(values) if coded else values)


def _by_library() -> bytes:
    parts = [b.mach(16), _VCPU_LAYOUT, b.bank(0, [b.row(k) for k in range(16)], filter=codec.DELTA)]
    return b.encode(b.decode(b.stream(*parts)).saved(), level=1)


def _many() -> bytes:
    rows = [[0x1000]] * (limits.MAX_VCPUS - 1) + [[0x2000]]
    values = b.bank(0, rows, filter=2)
    raw = values.payload
    frame = b.zstd_frame(b.zstd_blocks(raw[:16], (0, len(raw) - 24), raw[-8:]), len(raw))
    return b.stream(b.mach(limits.MAX_VCPUS), b.regl(VCPU, 4, (b.LSTAR, 8)), b.zstd(values, frame))


VECTORS: dict[str, Good] = {
    "bare": Good("a machine and nothing else: no register, no RAM", b.stream(b.mach())),
    "minimal": Good("one vCPU, one VM register, no RAM", b.stream(*b.plain(1))),
    **{f"filter-{filter}-codec-{int(coded)}": Good(
        f"three vCPUs under filter {filter}, codec {int(coded)}", _coded(filter, coded))
       for filter in (0, 1, 2) for coded in (False, True)},
    "delta-all-equal": Good("filter 2 over vCPUs that are all equal: no difference follows the bitmap", b.stream(
        b.mach(3), b.regl(VCPU, 4, (b.LSTAR, 8), (b.STAR, 8)), b.bank(0, [[7, 8]] * 3, filter=2))),
    "delta-wraps": Good("filter 2 where differences wrap around 2^64", b.stream(
        b.mach(3), b.regl(VCPU, 4, (b.LSTAR, 8)), b.bank(0, [[2**64 - 1], [0], [2**63]], filter=2))),
    "delta-65-words": Good("filter 2 over 65 words: the bitmap takes two words, and its last bit is set", b.stream(
        b.mach(2), b.regl(VCPU, 4, *((b.MSR | 0x9000_0000 + n, 8) for n in range(65))),
        b.bank(0, [[1] * 65, [1] * 64 + [2]], filter=2))),
    "ranges": Good("five vCPUs in banks of three and two", b.stream(
        b.mach(5), _VCPU_LAYOUT, b.bank(0, _ROWS3, filter=2),
        b.bank(0, [b.row(3), b.row(4)], first=3, filter=1))),
    "vcpus-4096": Good("as many vCPUs as the format allows", _many()),
    "phases": Good("prologue and blackout, VM and vCPU scope, in their order", b.stream(
        b.mach(2, devices=_DEVICES), b.host(), _EARLY, _VCPU_LAYOUT, _CLOCK_LAYOUT,
        b.bank(0, [[0x1234, 0x5678]], scope=VM), b.bank(1, [b.row(0), b.row(1)], filter=2), _CLOCK)),
    "update": Good("a VM bank of the prologue, sent again because it had changed by the pause", b.stream(
        b.mach(1), _EARLY, _VCPU_LAYOUT, b.bank(0, [[0x1234, 0x5678]], scope=VM),
        b.bank(0, [[0x1234, 0x9999]], scope=VM, flags=b.CRITICAL | b.UPDATE), b.bank(1, [b.row(0)]))),
    "ram": Good("four pages: data, two zero pages, data; zstd", b.stream(*b.with_ram(_PACKED))),
    "ram-zero-runs": Good("RAM in two sections, zero pages only, stored", b.stream(
        *b.with_ram(b.ramp((0, 3, 1)), b.ramp((0x3000, 1, 1))))),
    "ram-part": Good("two ranges of the machine's memory; what is between, the VMM carries itself", b.stream(
        *b.with_ram(b.ramp((0x1000, 1, 1), (0x3000, 1, 1)), regions=((0x1000, 0x1000), (0x3000, 0x1000))))),
    "opaque": Good("state of two devices of a VMM", b.stream(
        b.mach(), b.opaq("disk", bytes(range(16))), b.opaq("net/0", b""))),
    "ancillary-unknown": Good("unknown ancillary sections first, between and last: skipped and reported", b.stream(
        _UNKNOWN, b.mach(), _UNKNOWN.but(kind=b"ZZZZ", payload=b""), b.opaq(), _UNKNOWN)),
    "ancillary-newer-version": Good("a newer version of an ancillary kind: skipped and reported", b.stream(
        b.mach(), b.host().but(version=2, payload=b"not of version 1"))),
    "newer-minor": Good("a newer minor version with an ancillary section of its own", b.stream(
        b.mach(), _UNKNOWN, start=b.preamble(minor=7))),
    "text": Good("host strings with terminal escapes and other scripts: legal, and a reader escapes what it shows",
                 b.stream(b.mach(), b.host("\x1b[2J\x1b]0;title\x07", "\u202ecpu\r", "Gäste-Zähler", ["a\nb", ""]))),
    "arm64": Good("another architecture: arm64 with a register of KVM's own id", b.stream(
        b.mach(2, arch=b.ARM64), b.regl(VCPU, 4, (0x6030_0000_0010_0000, 8)),
        b.bank(0, [[1], [2]], filter=2), start=b.preamble(arch=b.ARM64))),
    "contract": Good("minor 1: what the saving kernel behaved as where it had no register, beside the others", b.stream(
        b.mach(1, arch=b.ARM64), b.host(), b.cntr(), b.regl(VM, 3, (b.PSCI, 8)), b.bank(0, [[0x1_0000]], scope=VM),
        start=b.preamble(minor=1, arch=b.ARM64))),
    "contract-unknown": Good("a contract that says what could not be found out, before the host", b.stream(
        b.mach(1), b.cntr(found="derived", behaves_as=(), firmware=(), unknown=["nobody could ask"]), b.host(),
        start=b.preamble(minor=1))),
    "level-1": Good("16 vCPUs as the writer stores them: filter 2, zstd level 1", _by_library(), made_by_zstd=True),
    "everything": Good("every kind of major 1 in one stream", b.stream(
        b.mach(2, memory=[[0, 0x4000]], devices=_DEVICES), b.host(notes=["MSR 0x345 not readable here"]),
        _EARLY, _VCPU_LAYOUT, _CLOCK_LAYOUT, b.bank(0, [[1, 2]], scope=VM),
        b.bank(0, [[1, 3]], scope=VM, flags=b.CRITICAL | b.UPDATE), b.raml((0, 0x4000)), _PACKED,
        b.bank(1, [b.row(0), b.row(1)], filter=2), _CLOCK, b.opaq())),
    "everything-1": Good("every kind of minor 1 in one stream", b.stream(
        b.mach(2, memory=[[0, 0x4000]], devices=_DEVICES), b.host(notes=["MSR 0x345 not readable here"]),
        b.cntr(behaves_as=[[b.MSR | 0xC001_1029, b"\2" + bytes(7), "a feature MSR"]], firmware=()),
        _EARLY, _VCPU_LAYOUT, _CLOCK_LAYOUT, b.bank(0, [[1, 2]], scope=VM),
        b.bank(0, [[1, 3]], scope=VM, flags=b.CRITICAL | b.UPDATE), b.raml((0, 0x4000)), _PACKED,
        b.bank(1, [b.row(0), b.row(1)], filter=2), _CLOCK, b.opaq(), start=b.preamble(minor=1))),
}
