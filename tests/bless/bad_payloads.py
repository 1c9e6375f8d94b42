"""Streams that every reader must refuse, 2: checksums right and content wrong; msgpack, layouts, banks, zstd, RAM."""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded, StreamError, TooNew
from tests import build as b
from tests.bless.bad_frames import Bad
from tests.build import VCPU, VM, Part

_MACH = b.mach()
_FIELDS = {"arch": b.X86_64, "devices": {}, "memory": [], "vcpus": 1}


def _at(what: str, error: type[StreamError], name: str, field: str, *parts: Part, **start: Any) -> Bad:
    """Section `name` (such as `#1 REGL`) is wrong."""
    data = b.stream(*parts, start=b.preamble(**start))
    return Bad(what, error, name, field, data, at=int(name[1:].split()[0]))


def _mach(what: str, error: type[StreamError], field: str, **fields: Any) -> Bad:
    return _at(what, error, "#0 MACH", field, b.mach(**fields))


def _packed(what: str, field: str, payload: bytes, error: type[StreamError] = Corrupt) -> Bad:
    """A machine of these msgpack bytes."""
    return _at(what, error, "#0 MACH", field, Part(b"MACH", payload))


def _with(**fields: Any) -> bytes:
    return b.pack({**_FIELDS, **fields})


_MSGPACK = _with()
_AFTER_MEMORY = _MSGPACK.index(b"\xa5vcpus")
_NESTED: Any = 0
for _ in range(8):
    _NESTED = [_NESTED]
_DEEP = b.zstd(Part(b"OPAQ", b"\x91" * limits.MAX_RAW),
               b.zstd_frame(b.zstd_blocks((0x91, limits.MAX_RAW)), limits.MAX_RAW))
_WIDE_RAW = b"\xdd" + (limits.MAX_RAW - 5).to_bytes(4, "big")
_WIDE = b.zstd(Part(b"OPAQ", bytes(limits.MAX_RAW)),
               b.zstd_frame(b.zstd_blocks(_WIDE_RAW, (0x90, limits.MAX_RAW - 5)), limits.MAX_RAW))

MACHINE: dict[str, Bad] = {
    "vcpus-0": _mach("no vCPU", LimitExceeded, "vcpus", vcpus=0),
    "vcpus-4097": _mach("one vCPU too many", LimitExceeded, "vcpus", vcpus=limits.MAX_VCPUS + 1),
    "vcpus-negative": _mach("a negative number of vCPUs", LimitExceeded, "vcpus", vcpus=-1),
    "vcpus-max": _mach("2^64 - 1 vCPUs", LimitExceeded, "vcpus", vcpus=2**64 - 1),
    "vcpus-bool": _mach("true vCPUs", Corrupt, "vcpus", vcpus=True),
    "arch-contradicts": _mach("another architecture than the preamble's", Corrupt, "arch", arch=b.ARM64),
    "machine-arch-unknown": _mach("an unknown architecture", TooNew, "arch", arch=243),
    "memory-unaligned": _mach("memory that does not begin on a page", Corrupt, "memory", memory=[[1, 4096]]),
    "memory-size-unaligned": _mach("memory of half a page", Corrupt, "memory", memory=[[0, 2048]]),
    "memory-empty": _mach("memory of no page", Corrupt, "memory", memory=[[0, 0]]),
    "memory-negative": _mach("a negative address", Corrupt, "memory", memory=[[-4096, 4096]]),
    "memory-negative-size": _mach("a negative size", Corrupt, "memory", memory=[[4096, -4096]]),
    "memory-overlaps": _mach("regions that overlap", Corrupt, "memory", memory=[[0, 8192], [4096, 8192]]),
    "memory-descending": _mach("regions in descending order", Corrupt, "memory", memory=[[8192, 4096], [0, 4096]]),
    "memory-address-over": _mach("memory one page beyond the limit", LimitExceeded, "memory",
                                 memory=[[limits.MAX_ADDRESS - 4096, 8192]]),
    "memory-wraps": _mach("memory that wraps around 2^64", LimitExceeded, "memory", memory=[[2**64 - 4096, 4096]]),
    "memory-three": _mach("a region of three numbers", Corrupt, "memory", memory=[[0, 4096, 1]]),
    "memory-no-pair": _mach("a region that is a number", Corrupt, "memory", memory=[0]),
    "memory-text": _mach("a region of text", Corrupt, "memory", memory=[["0", 4096]]),
    "devices-type": _mach("a device that takes a list", Corrupt, "devices.irqchip", devices={"irqchip": [1]}),
    "devices-escape": _mach("a device whose name would clear a terminal", Corrupt, "devices.\x1b[2J\x1b[H",
                            devices={"\x1b[2J\x1b[H": [1]}),
    "machine-empty": _packed("an empty machine section", "payload byte 0", b""),
    "machine-field-missing": _packed("a field missing", "", b.pack({"arch": b.X86_64, "vcpus": 1})),
    "machine-field-more": _packed("a field too many", "", _with(extra=1)),
    "machine-field-escape": _packed("a field too many, with a terminal escape", "", _with(**{"\x1b[31m": 1})),
    "machine-not-a-map": _packed("a list in place of a map", "", b"\x90"),
}

MSGPACK: dict[str, Bad] = {
    "msgpack-wide-integer": _packed("1 in two bytes", "", _MSGPACK[:-1] + b"\xcc\x01"),
    "msgpack-wide-text": _packed("a short string with a long head", "", _MSGPACK.replace(b"\xa5vcpus",
                                 b"\xd9\x05vcpus")),
    "msgpack-wide-map": _packed("a short map with a long head", "", b"\xde\x00\x04" + _MSGPACK[1:]),
    "msgpack-key-order": _packed("keys in another order", "", b"\x84" + _MSGPACK[_AFTER_MEMORY:]
                                 + _MSGPACK[1:_AFTER_MEMORY]),
    "msgpack-key-twice": _packed("a key twice", "", b"\x85" + _MSGPACK[1:] + b"\xa5vcpus\x01"),
    "msgpack-key-bytes": _packed("a key of bytes", "", _MSGPACK.replace(b"\xa5vcpus", b"\xc4\x05vcpus")),
    "msgpack-key-number": _packed("a key that is a number", "", b"\x81\x01\x01"),
    "msgpack-trailing": _packed("a byte after the value", "", _MSGPACK + b"\0"),
    "msgpack-cut": _packed("a value cut short", f"payload byte {len(_MSGPACK) - 1}", _MSGPACK[:-1]),
    "msgpack-extension": _packed("an extension type", f"payload byte {len(_MSGPACK) - 1}",
                                 _MSGPACK[:-1] + bytes(msgpack.packb(msgpack.ExtType(5, b"x")))),
    "msgpack-timestamp": _packed("a timestamp, msgpack's own extension", f"payload byte {len(_MSGPACK) - 1}",
                                 _MSGPACK[:-1] + bytes(msgpack.packb(msgpack.Timestamp(1)))),
    "msgpack-nil": _packed("nil", f"payload byte {len(_MSGPACK) - 1}", _MSGPACK[:-1] + b"\xc0"),
    "msgpack-float": _packed("a float", f"payload byte {len(_MSGPACK) - 1}", _with(vcpus=1.0)),
    "msgpack-never": _packed("the byte that msgpack never uses", "payload byte 0", b"\xc1"),
    "msgpack-utf8": _at("text that is not UTF-8", Corrupt, "#1 HOST", "", _MACH,
                        Part(b"HOST", b.host().payload.replace(b"A CPU", b"A \xff\xfeU"), flags=0)),
    "msgpack-surrogate": _at("text with a surrogate", Corrupt, "#1 HOST", "", _MACH,
                             Part(b"HOST", b.host().payload.replace(b"A CPU", b"A\xed\xa0\x80U"), flags=0)),
    "msgpack-deep": _packed("nine levels", "", _with(devices={"a": _NESTED}), LimitExceeded),
    "msgpack-deep-bomb": _at("16 Mi levels in 500 bytes", LimitExceeded, "#1 OPAQ", "", _MACH, _DEEP),
    "msgpack-wide-bomb": _at("16 Mi empty arrays in 500 bytes", LimitExceeded, "#1 OPAQ", "", _MACH, _WIDE),
    "msgpack-array-claims": _packed("an array that claims 2^32 - 1 values", "", b"\xdd\xff\xff\xff\xff", LimitExceeded),
    "msgpack-map-claims": _packed("a map that claims 2^32 - 1 pairs", "", b"\xdf\xff\xff\xff\xff", LimitExceeded),
    "msgpack-text-claims": _packed("a string that claims 2^32 - 1 bytes", "", b"\xdb\xff\xff\xff\xff"),
    "msgpack-text-over": _at("a machine of more than 1 MiB", LimitExceeded, "#0 MACH", "", b.zstd(
        Part(b"MACH", bytes(limits.MAX_TEXT + 1)), b.zstd_frame(b.zstd_blocks((0, limits.MAX_TEXT + 1)),
                                                                limits.MAX_TEXT + 1))),
    "opaque-name-type": _at("opaque state without a name in text", Corrupt, "#1 OPAQ", "name", _MACH,
                            b.opaq(name=b"x")),
    "opaque-data-type": _at("opaque data as text", Corrupt, "#1 OPAQ", "data", _MACH, b.opaq(data="x")),
    "host-notes-type": _at("a note that is a number", Corrupt, "#1 HOST", "notes", _MACH, b.host(notes=[1])),
}


def _cntr(what: str, field: str, *, arch: int = b.ARM64, **fields: Any) -> Bad:
    return _at(what, Corrupt, "#1 CNTR", field, b.mach(arch=arch), b.cntr(**fields), minor=1, arch=arch)


_HALF = [b.STD, bytes(4), ""]
CONTRACT: dict[str, Bad] = {
    "contract-found": _cntr("a way to find a contract that there isn't", "found", found="guessed"),
    "contract-arch": _cntr("an arm64 register in the contract of an x86-64 guest", "behaves_as STD_BMAP",
                           arch=b.X86_64),
    "contract-size": _cntr("4 bytes for a register of 8", "behaves_as STD_BMAP", behaves_as=[_HALF]),
    "contract-order": _cntr("registers that are not ascending", "behaves_as", behaves_as=b.BEHAVES_AS[::-1]),
    "contract-register-twice": _cntr("a register twice", "behaves_as", behaves_as=[b.BEHAVES_AS[0]] * 2),
    "contract-row": _cntr("a register without its reason", "behaves_as", behaves_as=[b.BEHAVES_AS[0][:2]]),
    "contract-row-number": _cntr("a row that is a number", "behaves_as", behaves_as=[1]),
    "contract-value-number": _cntr("a value that is a number", "behaves_as", behaves_as=[[b.STD, 1, ""]]),
    "contract-id-negative": _cntr("a negative id", "behaves_as", behaves_as=[[-1, bytes(8), ""]]),
    "contract-answer-negative": _cntr("an answer below 0", "firmware", firmware=[[b.TRNG, -1]]),
    "contract-answer-twice": _cntr("a call twice", "firmware", firmware=[[b.TRNG, 1], [b.TRNG, 2]]),
    "contract-unknown-type": _cntr("a remark that is a number", "unknown", unknown=[1]),
}


def _regl(what: str, error: type[StreamError], field: str, layout: Part, *before: Part) -> Bad:
    return _at(what, error, f"#{1 + len(before)} REGL", field, _MACH, *before, layout)


_ONE = (b.LSTAR, 8)
_ONE_LAYOUT = b.regl(VCPU, 4, _ONE)
_OURS = b.STRUCT | 0x8000  # ids that no row has: any size and scope

LAYOUT: dict[str, Bad] = {
    "layout-count-more": _regl("a count above the slots", Corrupt, "count", b.regl(VCPU, 4, _ONE, count=2)),
    "layout-count-less": _regl("a count below the slots", Corrupt, "count", b.regl(VCPU, 4, _ONE, count=0)),
    "layout-count-over": _regl("a count above the limit", LimitExceeded, "count",
                               b.regl(VCPU, 4, _ONE, count=limits.MAX_SLOTS + 1)),
    "layout-count-max": _regl("2^32 - 1 slots", LimitExceeded, "count", b.regl(VCPU, 4, _ONE, count=2**32 - 1)),
    "layout-no-register": _regl("a layout of no register", Corrupt, "", b.regl(VCPU, 4)),
    "layout-empty": _regl("an empty layout section", Corrupt, "phase", Part(b"REGL", scope=VCPU)),
    "layout-phase-0": _regl("phase 0", Corrupt, "", b.regl(VCPU, 0, _ONE)),
    "layout-phase-7": _regl("phase 7", Corrupt, "", b.regl(VCPU, 7, _ONE)),
    "layout-scope-0": _regl("no scope", Corrupt, "", b.regl(0, 4, _ONE)),
    "layout-reserved": _regl("reserved bytes of the head set", Corrupt, "reserved", b.regl(VCPU, 4, _ONE, reserved=1)),
    "slot-reserved": _regl("reserved bytes of a slot set", Corrupt, f"{b.LSTAR:#018x}", _ONE_LAYOUT.but(
        payload=_ONE_LAYOUT.payload[:-1] + b"\x01")),
    "slot-size-0": _regl("a register of no byte", Corrupt, f"{_OURS:#018x}", b.regl(VCPU, 4, (_OURS, 0))),
    "slot-size-over": _regl("a register above the limit of a row", Corrupt, f"{_OURS:#018x}",
                            b.regl(VCPU, 4, (_OURS, limits.MAX_ROW + 1))),
    "slot-size-max": _regl("a register of 2^32 - 1 bytes", Corrupt, f"{_OURS:#018x}",
                           b.regl(VCPU, 4, (_OURS, 2**32 - 1))),
    "slot-size-in-id": _regl("16 bytes where the id says 8", Corrupt, f"{b.LSTAR:#018x}", b.regl(VCPU, 4, (b.LSTAR,
                             16))),
    "slot-size-known": _regl("8 bytes of a struct of 144: a kernel would read what follows", Corrupt, "KVM_REGS",
                             b.regl(VCPU, 4, (b.REGS, 8))),
    "slot-size-least": _regl("nested state without its header", Corrupt, "KVM_NESTED_STATE",
                             b.regl(VCPU, 4, (b.NESTED, 64))),
    "row-over": _regl("two registers, a row above the limit", LimitExceeded, "",
                      b.regl(VCPU, 4, (_OURS, limits.MAX_ROW), (_OURS + 1, 8))),
    "state-over": _regl("three layouts, together above the limit of a vCPU", LimitExceeded, "",
                        b.regl(VCPU, 4, (_OURS + 2, 8)),
                        *(b.regl(VCPU, 4, (_OURS + n, limits.MAX_ROW)) for n in range(2))),
    "register-twice": _regl("a register twice in a layout", Corrupt, "id", b.regl(VCPU, 4, _ONE, _ONE)),
    "register-in-two-layouts": _regl("a register in two layouts", Corrupt, f"{b.LSTAR:#018x}",
                                     b.regl(VCPU, 5, _ONE), _ONE_LAYOUT),
    "register-of-arm64": _regl("a register of arm64", Corrupt, "0x6030000000100000",
                               b.regl(VCPU, 4, (0x6030_0000_0010_0000, 8))),
    "register-of-arm64-ours": _regl("an id of ours for arm64", Corrupt, "0xf00100b700000001",
                                    b.regl(VCPU, 4, (0xF001_00B7_0000_0001, 8))),
    "register-of-x86": _at("a register of x86-64 in a stream of arm64", Corrupt, "#1 REGL", f"{b.LSTAR:#018x}",
                           b.mach(arch=b.ARM64), b.regl(VCPU, 4, _ONE), arch=b.ARM64),
    "vm-register-in-vcpu": _regl("a VM-wide MSR in a vCPU layout", Corrupt, "MSR_KVM_WALL_CLOCK",
                                 b.regl(VCPU, 3, (b.WALL_CLOCK, 8))),
    "vcpu-register-in-vm": _regl("a vCPU's MSR in a VM layout", Corrupt, "MSR_LSTAR", b.regl(VM, 4, _ONE)),
}


def _bank(what: str, error: type[StreamError], field: str, *banks: Part, vcpus: int = 2, at: int | None = None,
          layout: Part = _ONE_LAYOUT) -> Bad:
    """Banks of one layout; the last is wrong."""
    number = 1 + len(banks) if at is None else at
    return _at(what, error, f"#{number} BANK", field, b.mach(vcpus), layout, *banks)


_LAST = b.bank(0, [[1]], first=1)
_MP_LAYOUT = b.regl(VCPU, 4, (b.MP_STATE, 4))
_DELTA = b.filtered([[1], [2]], 2)

BANKS: dict[str, Bad] = {
    "vcpu-twice": _bank("a vCPU in two banks", Corrupt, "first_vcpu", b.bank(0, [[1]]), b.bank(0, [[1], [2]])),
    "vcpu-overlap": _bank("banks that overlap by a vCPU", Corrupt, "first_vcpu", b.bank(0, [[1], [2]]), _LAST, vcpus=3),
    "vcpu-gap": _bank("a gap between banks", Corrupt, "first_vcpu", b.bank(0, [[1]]), b.bank(0, [[1]], first=2),
                      vcpus=3),
    "vcpu-not-from-0": _bank("the first bank begins at vCPU 1", Corrupt, "first_vcpu", _LAST),
    "vcpu-beyond": _bank("a vCPU beyond the machine's", Corrupt, "first_vcpu", b.bank(0, [[1], [2], [3]])),
    "vcpu-beyond-after": _bank("a bank after the last vCPU", Corrupt, "first_vcpu", b.bank(0, [[1], [2]]),
                               b.bank(0, [[3]], first=2)),
    "vcpu-missing": _at("the last vCPU never comes", Corrupt, "#3 END", "layout 0 (vcpu/state)",
                        b.mach(2), _ONE_LAYOUT, b.bank(0, [[1]])),
    "bank-no-vcpu": _bank("a bank of no vCPU", Corrupt, "vcpu_count", b.bank(0, [[1]], vcpu_count=0)),
    "bank-layout-max": _bank("a bank of layout 2^32 - 1", Corrupt, "layout", b.bank(2**32 - 1, [[1], [2]])),
    "bank-scope": _bank("a VM bank of a vCPU layout", Corrupt, "scope", b.bank(0, [[1]], scope=VM)),
    "bank-scope-0": _bank("a bank of no scope", Corrupt, "scope", b.bank(0, [[1], [2]], scope=0, vcpu_count=2)),
    "bank-vm-count": _at("a VM bank that counts a vCPU", Corrupt, "#2 BANK", "scope", _MACH,
                         b.regl(VM, 3, (b.WALL_CLOCK, 8)), b.bank(0, [[1]], scope=VM, vcpu_count=1)),
    "bank-vm-first": _at("a VM bank that begins at a vCPU", Corrupt, "#2 BANK", "first_vcpu", _MACH,
                         b.regl(VM, 3, (b.WALL_CLOCK, 8)), b.bank(0, [[1]], scope=VM, first=1)),
    "update-first": _at("an update that begins at a vCPU", Corrupt, "#3 BANK", "first_vcpu", _MACH,
                        b.regl(VM, 3, (b.WALL_CLOCK, 8)), b.bank(0, [[1]], scope=VM),
                        b.bank(0, [[2]], scope=VM, first=1, flags=b.CRITICAL | b.UPDATE)),
    "bank-vm-twice": _at("a second VM bank", Corrupt, "#3 BANK", "first_vcpu", _MACH,
                         b.regl(VM, 3, (b.WALL_CLOCK, 8)), *[b.bank(0, [[1]], scope=VM)] * 2),
    "bank-matrix-over": _bank("4096 vCPUs of 64 KiB in one bank", LimitExceeded, "",
                              b.bank(0, [[1]], vcpu_count=limits.MAX_VCPUS), vcpus=limits.MAX_VCPUS,
                              layout=b.regl(VCPU, 4, (_OURS, limits.MAX_ROW))),
    **{f"bank-{word}-{filter}": _bank(f"filter {filter}, payload {word}", Corrupt, "payload", b.bank(
        0, [], filter=filter, vcpu_count=2, raw=raw))
       for filter in (0, 1) for word, raw in (("short", bytes(8)), ("long", bytes(24)), ("empty", b""))},
    "delta-empty": _bank("filter 2, payload empty", Corrupt, "payload", b.bank(0, [], filter=2, vcpu_count=2, raw=b"")),
    "delta-no-bitmap": _bank("filter 2, the first row alone", Corrupt, "payload",
                             b.bank(0, [], filter=2, vcpu_count=2, raw=bytes(8))),
    "delta-short": _bank("filter 2, a difference missing", Corrupt, "payload",
                         b.bank(0, [], filter=2, vcpu_count=2, raw=_DELTA[:-8])),
    "delta-long": _bank("filter 2, a difference too many", Corrupt, "payload",
                        b.bank(0, [], filter=2, vcpu_count=2, raw=_DELTA + bytes(8))),
    "delta-stray-bit": _bank("filter 2, a bit past the last word", Corrupt, "payload.bitmap", b.bank(
        0, [], filter=2, vcpu_count=2, raw=_DELTA[:8] + b"\x03" + _DELTA[9:])),
    "delta-stray-padding": _bank("filter 2, a bit in the bitmap's padding", Corrupt, "payload.bitmap", b.bank(
        0, [], filter=2, vcpu_count=2, raw=_DELTA[:15] + b"\x80" + _DELTA[16:])),
    "delta-not-canonical": _bank("filter 2, a word marked that does not differ", Corrupt, "payload.bitmap", b.bank(
        0, [], filter=2, vcpu_count=2, raw=_DELTA[:16] + bytes(8))),
    "delta-one-row": _bank("filter 2, a word marked in a bank of one vCPU", Corrupt, "payload.bitmap", b.bank(
        0, [], filter=2, vcpu_count=1, raw=_DELTA[:16]), vcpus=1),
    "value-padding": _bank("a bit past the 4 bytes of a register", Corrupt, f"{b.MP_STATE:#018x}", b.bank(
        0, [[0], [1 << 32]]), layout=_MP_LAYOUT),
    "value-cpuid-count": _bank("CPUID entries beyond the register: a kernel would read what follows", Corrupt,
                               "KVM_CPUID2.nent", b.bank(0, [[1, *[0] * 5], [2, *[0] * 5]]),
                               layout=b.regl(VCPU, 1, (b.CPUID2, 48))),
    "value-nested-size": _bank("nested state that says 2^32 - 1 bytes", Corrupt, "KVM_NESTED_STATE.size", b.bank(
        0, [[128 << 32, *[0] * 15], [(2**32 - 1) << 32, *[0] * 15]]), layout=b.regl(VCPU, 4, (b.NESTED, 128))),
}

_RAW = _MACH.payload
_FRAME = b.zstd_frame(b.zstd_blocks(_RAW), len(_RAW))


def _frame(what: str, field: str, stored: bytes, **fields: Any) -> Bad:
    """A machine in this zstd frame."""
    return _at(what, Corrupt, "#0 MACH", field, b.zstd(_MACH, stored).but(**fields))


ZSTD: dict[str, Bad] = {
    "zstd-none": _frame("no zstd frame", "payload", _RAW),
    "zstd-empty": _at("no byte of a frame", Corrupt, "#0 MACH", "payload", Part(b"MACH", codec=1)),
    "zstd-two-frames": _frame("two frames", "payload", _FRAME + _FRAME),
    "zstd-junk": _frame("a byte after the frame", "payload", _FRAME + b"\0"),
    "zstd-cut": _frame("a frame cut short, checksum right", "payload", _FRAME[:-1]),
    "zstd-head-cut": _frame("half a frame header", "payload", _FRAME[:8]),
    "zstd-no-size": _frame("a frame that states no size", "raw_length", b.zstd_frame(b.zstd_blocks(_RAW), None)),
    "zstd-size-small": _frame("a frame that states a byte less", "raw_length",
                              b.zstd_frame(b.zstd_blocks(_RAW), len(_RAW) - 1)),
    "zstd-size-lies-small": _frame("frame and header state a byte less than there is", "payload",
                                   b.zstd_frame(b.zstd_blocks(_RAW), len(_RAW) - 1), raw_length=len(_RAW) - 1),
    "zstd-size-lies-large": _frame("frame and header state a byte more than there is", "payload",
                                   b.zstd_frame(b.zstd_blocks(_RAW), len(_RAW) + 1), raw_length=len(_RAW) + 1),
    "zstd-1-tib": _frame("a frame that claims 1 TiB", "raw_length", b.zstd_frame(b.zstd_blocks(_RAW), 1 << 40)),
    "zstd-2-63": _frame("a frame that claims 2^63 bytes", "raw_length", b.zstd_frame(b.zstd_blocks(_RAW), 1 << 63)),
    "zstd-ratio": _frame("16 MiB in a frame that states a few bytes", "payload",
                         b.zstd_frame(b.zstd_blocks((0, limits.MAX_RAW)), len(_RAW))),
    "zstd-ratio-no-size": _frame("1 MiB in a frame that states no size", "raw_length",
                                 b.zstd_frame(b.zstd_blocks((0, 1 << 20)), None)),
    "zstd-skippable": _frame("a skippable frame: a size, and nothing in it", "payload",
                             struct.pack("<II", 0x184D2A50, len(_RAW)) + _RAW),
    "zstd-dictionary": _frame("a frame that needs a dictionary", "payload", b.ZSTD_MAGIC + b"\xe3"
                              + (7).to_bytes(4, "little") + len(_RAW).to_bytes(8, "little") + b.zstd_blocks(_RAW)),
    "zstd-reserved-bit": _frame("a reserved bit of the frame's head", "payload",
                                b.ZSTD_MAGIC + b"\xe8" + _FRAME[5:]),
    "zstd-block-type": _frame("a block of the reserved type", "payload", _FRAME[:13] + b"\x07\0\0"),
    "bomb-bank": _at("16 MiB in a frame of 500 bytes, for a bank of 8", Corrupt, "#2 BANK", "payload", _MACH,
                     _ONE_LAYOUT, b.zstd(b.bank(0, [[1]], raw=bytes(limits.MAX_RAW), vcpu_count=1), b.zstd_frame(
                         b.zstd_blocks((0, limits.MAX_RAW)), limits.MAX_RAW))),
}


def _ram(what: str, error: type[StreamError], field: str, name: str, *parts: Part) -> Bad:
    return _at(what, error, name, field, b.mach(memory=[[0, 0x4000]]), *parts)


def _pages(what: str, error: type[StreamError], field: str, *pages: Part) -> Bad:
    """Four pages; the last section of them is wrong."""
    return _ram(what, error, field, f"#{1 + len(pages)} RAMP", b.raml((0, 0x4000)), *pages)


_ALL = b.ramp((0, 4, 1))

RAM: dict[str, Bad] = {
    "ram-page-size-0": _ram("pages of no byte", Corrupt, "page_size", "#1 RAML", b.raml((0, 0x4000), page_size=0)),
    "ram-page-size": _ram("pages of 16 KiB", Corrupt, "page_size", "#1 RAML", b.raml((0, 0x4000), page_size=16384)),
    "ram-layout-count": _ram("a count above the ranges", Corrupt, "count", "#1 RAML", b.raml((0, 0x4000), count=2)),
    "ram-layout-count-max": _ram("2^32 - 1 ranges", LimitExceeded, "count", "#1 RAML", b.raml(count=2**32 - 1)),
    "ram-layout-empty": _ram("an empty RAM layout section", Corrupt, "page_size", "#1 RAML", Part(b"RAML")),
    "ram-layout-outside": _ram("a range outside the machine's memory", Corrupt, "", "#1 RAML", b.raml((0x4000,
                               0x1000))),
    "ram-layout-beyond": _ram("a range one page beyond the machine's memory", Corrupt, "", "#1 RAML",
                              b.raml((0, 0x5000))),
    "ram-layout-overlap": _ram("ranges that overlap", Corrupt, "memory", "#1 RAML", b.raml((0, 0x2000), (0x1000,
                               0x1000))),
    "ram-layout-wraps": _ram("a range that wraps around 2^64", LimitExceeded, "memory", "#1 RAML",
                             b.raml((2**64 - 4096, 4096))),
    "ram-no-layout": _ram("pages without a layout", Corrupt, "", "#1 RAMP", _ALL),
    "ram-missing": _ram("the last page never comes", Corrupt, "RAMP", "#3 END", b.raml((0, 0x4000)), b.ramp((0, 3, 1))),
    "ram-none": _ram("no page comes", Corrupt, "RAMP", "#2 END", b.raml((0, 0x4000))),
    "ram-twice": _pages("a page twice", Corrupt, "run", b.ramp((0, 2, 1), (0x1000, 3, 1))),
    "ram-gap": _pages("a page left out", Corrupt, "run", b.ramp((0, 1, 1), (0x2000, 2, 1))),
    "ram-order": _pages("runs in descending order", Corrupt, "run", b.ramp((0x2000, 2, 1), (0, 2, 1))),
    "ram-beyond": _pages("a run one page beyond its range", Corrupt, "run", b.ramp((0, 5, 1))),
    "ram-after-all": _pages("pages after the last", Corrupt, "run", _ALL, b.ramp((0, 1, 1))),
    "ram-unaligned": _pages("a run that does not begin on a page", Corrupt, "run at 0x800", b.ramp((0x800, 1, 1))),
    "ram-run-empty": _pages("a run of no page", Corrupt, "run at 0x0", b.ramp((0, 0, 1))),
    "ram-run-kind": _pages("a run of kind 2", Corrupt, "run at 0x0", b.ramp((0, 4, 2))),
    "ram-run-reserved": _pages("reserved bytes of a run set", Corrupt, "run at 0x0",
                               _ALL.but(payload=_ALL.payload[:-1] + b"\x01")),
    "ram-reserved": _pages("reserved bytes of the head set", Corrupt, "reserved", b.ramp((0, 4, 1), reserved=1)),
    "ram-count-0": _pages("no run", LimitExceeded, "count", b.ramp()),
    "ram-count-max": _pages("2^32 - 1 runs", LimitExceeded, "count", b.ramp((0, 4, 1), count=2**32 - 1)),
    "ram-count-more": _pages("a count above the runs", Corrupt, "count", b.ramp((0, 4, 1), count=2)),
    "ram-count-less": _pages("a count below the runs", Corrupt, "data", b.ramp((0, 2, 1), (0x2000, 2, 1), count=1)),
    "ram-pages-max": _pages("a run of 2^64 - 1 pages", LimitExceeded, "pages", b.ramp((0, 2**64 - 1, 0))),
    "ram-data-short": _pages("a run of data longer than the section", Corrupt, "run at 0x0",
                             b.ramp((0, 4, 0), data=b"\x01" * 8)),
    "ram-data-long": _pages("bytes after the last run", Corrupt, "data", b.ramp((0, 4, 1), data=b"\x01" * 8)),
    "ram-empty": _pages("an empty pages section", Corrupt, "count", Part(b"RAMP")),
}

VECTORS: dict[str, Bad] = {**MACHINE, **MSGPACK, **CONTRACT, **LAYOUT, **BANKS, **ZSTD, **RAM}
