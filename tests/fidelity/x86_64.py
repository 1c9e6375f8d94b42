"""What is said to an x86-64 kernel."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from migstream.backends.base import Backend
from migstream.host.profile import HostProfile
from migstream.model import Arch
from migstream.registers import ids, x86_64
from tests.fidelity.calls import Call, call
from tests.fidelity.x86_64_stage import ABSOLUTE, EXCLUDED, SIZES, UNREADABLE, X86Stage

DEVICES: tuple[dict[str, Any], ...] = (
    {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}, {"irqchip": True}, {})
CAPS: tuple[dict[str, list[int]], ...] = (
    {}, {}, {}, {"129": [3]}, {"164": [1]}, {"218": [1]}, {"164": [1], "218": [1], "129": [1]}, {"164": [1]},
    {"218": [1], "188": [7]}, {"116": [1]}, {"129": [2], "159": [0]}, {"129": [0x20]}, {"188": [8]}, {"999": [1]})
"""KVM_ENABLE_CAP by number: X2APIC_API, EXCEPTION_PAYLOAD, X86_TRIPLE_FAULT_EVENT, X86_USER_SPACE_MSR, DISABLE_QUIRKS
(LINT0), MSR_PLATFORM_INFO; then arguments that no kernel takes, and a capability that none has."""

BUSY = (x86_64.SREGS2.id, x86_64.SREGS.id, x86_64.LAPIC.id, x86_64.VCPU_EVENTS.id, x86_64.MP_STATE.id, x86_64.XCRS.id,
        x86_64.XSAVE.id, x86_64.REGS.id)
"""Registers with more rules than others are written more often."""

WORDS = (0, 1, 2, 3, 4, 7, 0xFF, 0x20, 0x500, 0x8001_0033, 0x11, 0xE7, 0xFEE0_0900, 0xFEE0_0D00, 1 << 47, (1 << 48) - 1,
         0x1001, 0x7_F001, 0xFFFF_F001, 0x0007_0406_0007_0406, (1 << 64) - 1)
"""64-bit words that mean something somewhere: modes, APIC bases, an area in RAM and one outside, memory types."""

_SEGMENTS = (
    (224, "word", (0x8001_0033, 0x6000_0010, 0x11, 0x10, 0x8000_0001, 0x2000_0010, 1 << 32)),       # CR0
    (240, "word", (0, 0x1000, 1 << 51, (1 << 63) | 0x1000)),                                        # CR3
    (248, "word", (0, 0x20, 0x6A0, 0x4_0020, 0x1_0000, 0x2_0020, 0x2000, 0x30_0000, 0x1000, 0x800)),  # CR4
    (256, "word", (0, 5, 15, 16)),                                                                  # CR8
    (264, "word", (0, 0x500, 0x1500, 0x1000, 0x100, 0xD01, 0x800, 0x400, 0x4000)),                  # EFER
    (272, "word", (0xFEE0_0900, 0xFEE0_0D00, 0xFEE0_0C00, 0xFEE0_0800, 0xFEE0_0400, 0xFEE0_0000, 0x1234_5900)),
    (13, "byte", (0, 1)), (12, "byte", (0, 3, 11)), (14, "byte", (0, 3)),                           # CS
    (132, "byte", (0, 3)), (134, "byte", (0, 3)),                                                   # SS
)
AIMS: dict[int, tuple[tuple[int, str, tuple[int, ...]], ...]] = {
    x86_64.SREGS.id: (*_SEGMENTS, (280, "word", (0, 1 << 32, 1 << 63))),
    x86_64.SREGS2.id: (*_SEGMENTS, (280, "word", (0, 1, 2)), (288, "word", (0x1001, 0x2001))),
    x86_64.REGS.id: ((136, "word", (2, 0x202, 0x1_0002, 0x2_0002, 0x102, 0)), (128, "word", (0, 0xFFF0, 1 << 47))),
    x86_64.LAPIC.id: tuple((offset, "word", values) for offset, values in (
        (0x20, (0, 1, 1 << 24, 0xFF00_0000)), (0x30, (0, 0x5_0014)), (0x80, (0, 0x20, 0xFF)), (0xA0, (0, 0x30)),
        (0xD0, (0, 1 << 24, 0xFF00_0000)), (0xE0, (0xFFFF_FFFF, 0x0FFF_FFFF, 0)), (0xF0, (0xFF, 0x1FF, 0x11FF, 0x10)),
        (0x100, (0, 1 << 31)), (0x120, (0, 1 << 8)), (0x170, (0, 1 << 31)), (0x180, (1 << 4,)), (0x270, (0, 1 << 31)),
        (0x220, (0, 1 << 8)), (0x280, (0, 0x40)), (0x300, (0, 0x8_00F1, 0x4500, 0x1000)), (0x310, (0, 1 << 24, 1)),
        (0x320, (0x1_0000, 0x2_00EC, 0x4_00EC, 0x6_00EC, 0xEC)), (0x350, (0x700, 0x1_0000, 0x8700)),
        (0x360, (0x400, 0x1_0400)), (0x3E0, (0, 0xB)))),
    x86_64.VCPU_EVENTS.id: ((0, "byte", (0, 1)), (1, "byte", (1, 2, 3, 4, 14, 32)), (2, "byte", (0, 1)),
                            (3, "byte", (0, 1)), (8, "byte", (0, 1)), (9, "byte", (0x20, 0xFF)), (10, "byte", (0, 1)),
                            (11, "byte", (0, 1, 2, 3)), (12, "byte", (0, 1)), (13, "byte", (0, 1, 2, 3)),
                            (14, "byte", (0, 1)), (16, "byte", (0, 0x9F)), (24, "byte", (0, 1)), (25, "byte", (0, 1)),
                            (26, "byte", (0, 1)), (28, "byte", (0, 1)), (55, "byte", (0, 1)), (56, "word", (0, 0x1000)),
                            (20, "byte", (0, 1, 2, 4, 8, 0xD, 0xF, 0x10, 0x1F, 0x20, 0x2F, 0x3F, 0x40))),
    x86_64.MP_STATE.id: ((0, "byte", (0, 1, 2, 3, 4, 5, 9, 10)),),
    x86_64.XCRS.id: ((0, "byte", (0, 1, 2, 17)), (4, "byte", (0, 1)), (8, "byte", (0, 1)),
                     (16, "word", (0, 1, 2, 3, 5, 6, 7, 0xE7, 1 << 63))),
    x86_64.XSAVE.id: ((512, "word", (0, 1, 2, 3, 4, 7, 0xE7, 1 << 62)), (520, "word", (0, 1 << 63)),
                      (24, "byte", (0, 0x80)), (26, "byte", (0, 1)), (160, "word", (0, 1)), (576, "word", (0, 7))),
    x86_64.NESTED_STATE.id: ((0, "byte", (0, 1, 2, 4)), (1, "byte", (0, 1, 2)), (2, "byte", (0, 1, 2)),
                             (4, "byte", (0, 0x7F, 0x80)), (0, "word", (0x80_0001_0100, 0x80_0001_0000))),
    x86_64.DEBUGREGS.id: ((0, "word", (0, 1 << 63)), (32, "word", (0xFFFF_0FF0, 0, 0x4000, 1 << 32)),
                          (40, "word", (0x400, 0, 0xFF, 1 << 32)), (48, "word", (0, 1))),
}
"""(place, how, values) as `do_change` takes them: modes, interrupt controller states, pending events."""

MODES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (0xC000_0080, (0, 1, 0x100, 0x400, 0x500, 0x800, 0xD01, 0x1000, 0x1100, 0x2000, 0x4000, 0x8000, 1 << 20, 1 << 63)),
    (0x1B, (0xFEE0_0900, 0xFEE0_0D00, 0xFEE0_0C00, 0xFEE0_0800, 0xFEE0_0400, 0xFEE0_0000, 0x1234_5900, 0xFEE0_0901, 0,
            1 << 36 | 0x900, 1 << 40 | 0x900, 1 << 52 | 0x900)),
    (0xCE, (0, 0x20, 1 << 31, 1 << 31 | 0x20, (1 << 64) - 1)), (0x140, (0, 1, 1, 2, 3)))
"""(MSR, values): EFER and the APIC base, which no kernel lists; MSR_PLATFORM_INFO and MSR_MISC_FEATURES_ENABLES, which
are checked against each other."""

STRANGE_MSRS = (0x0123_4567, 0x5000_0000, 0xC000_0999)
"""MSRs that no kernel has."""


class X86Vocabulary:
    """Calls of a VMM that saves, restores and now and then does what it should not."""

    arch = Arch.X86_64
    excluded = EXCLUDED

    def stage(self, backend: Backend, profile: HostProfile) -> X86Stage:
        """See `Vocabulary.stage`."""
        return X86Stage(backend, profile)

    def facts(self, real: Backend) -> dict[str, int]:
        """The TSC's frequency, which a kernel measures when it boots."""
        stage = X86Stage(real, real.profile())
        try:
            stage.do_create(1, {}, {})
            return {"tsc_khz": int(stage.do_read(x86_64.TSC_KHZ.id, 0)["value"].get("0", "0"), 16)}
        finally:
            stage.close()

    def told(self, profile: HostProfile, facts: dict[str, int]) -> HostProfile:
        """The profile with that frequency."""
        khz = facts["tsc_khz"].to_bytes(4, "little")
        return replace(profile, defaults={**profile.defaults, x86_64.TSC_KHZ.id: khz})

    def story(self, source: random.Random, profile: HostProfile, calls: int) -> list[Call]:
        """See `Vocabulary.story`."""
        return list(_story(source, profile, calls))


def _story(source: random.Random, profile: HostProfile, calls: int) -> Iterator[Call]:
    vcpus = source.choice((1, 2, 2, 3))
    yield call("create", vcpus=vcpus, devices=source.choice(DEVICES), caps=source.choice(CAPS))
    first = [call("cpuid", vcpu=k, clear=_cleared(source)) for k in range(vcpus)] if source.random() < 0.85 else []
    yield from first
    last = [call("dump", vcpu=source.randrange(vcpus)) for _ in range(2)]
    for _ in range(calls - 1 - len(first) - len(last)):
        make = source.choices(*_WEIGHTED)[0]
        yield make(source, profile, source.randrange(vcpus))
    yield from last


def _cleared(source: random.Random) -> list[list[int]]:
    """What is taken from a table; often nothing, so that a vCPU that ran is given the same one again."""
    if source.random() < 0.6:
        return []
    return [list(source.choice(_FEATURES)) for _ in range(source.choice((1, 1, 2)))]


_FEATURES = ((1, 0, 2, 21), (1, 0, 2, 26), (1, 0, 2, 17), (1, 0, 2, 24), (1, 0, 3, 14), (7, 0, 1, 1), (7, 0, 1, 0),
             (7, 0, 2, 3), (7, 0, 1, 7), (7, 0, 3, 29), (7, 0, 1, 20), (0xD, 0, 0, 2), (0x8000_0001, 0, 2, 2),
             (0x8000_0001, 0, 3, 20), (0x8000_0001, 0, 3, 29), (0x8000_0008, 0, 0, 5), (0x8000_000A, 0, 3, 4))
"""(leaf, subleaf, register, bit) of features that something else is checked against: x2APIC, XSAVE, PCID, TSC
deadline, PGE, TSC_ADJUST, FSGSBASE, PKU, SMEP, SMAP, AVX state, SVM, NX, long mode, ARCH_CAPABILITIES, a narrower
physical address, TSC rate."""


def _struct(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    register = source.choice(BUSY) if source.random() < 0.6 else source.choice(_structs(profile))
    return call("change", register=register, vcpu=vcpu, edits=_edits(source, _length(profile, register)))


def _aimed(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    """Values that switch something on or off, in places where a rule looks."""
    register = source.choice([id for id in AIMS if id != x86_64.NESTED_STATE.id or profile.sizes.get(id)])
    places = [source.choice(AIMS[register]) for _ in range(source.choice((1, 1, 2, 3)))]
    edits = [[place, how, source.choice(values)] for place, how, values in places]
    return call("change", register=register, vcpu=vcpu, edits=edits)


def _structs(profile: HostProfile) -> list[int]:
    kept = [id for id in SIZES if id not in ABSOLUTE]
    return [*kept, *(id for id in (x86_64.NESTED_STATE.id,) if profile.sizes.get(id))]


def _length(profile: HostProfile, id: int) -> int:
    return 24 if id == x86_64.NESTED_STATE.id else min(profile.sizes.get(id) or SIZES.get(id, 8), 1024)


def _edits(source: random.Random, length: int) -> list[list[Any]]:
    return [_edit(source, length) for _ in range(source.choice((1, 1, 2, 3, 8)))]


def _edit(source: random.Random, length: int) -> list[Any]:
    place, kind = source.randrange(length), source.random()
    if kind < 0.5 or length < 8:
        return [place, "flip", source.randrange(8)]
    if kind < 0.8:
        return [place // 8 * 8, "word", source.choice(WORDS)]
    return [place, "byte", source.choice((0, 1, 2, 4, 0x80, 0xFF))]


def _msr(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    index = source.choice((*profile.msrs, *profile.feature_msrs))
    register = ids.msr_id(index)
    if index == _HV_RESET:
        return call("write", register=register, vcpu=vcpu, value=_value(source) & ~1)
    if register in UNREADABLE or source.random() < 0.2:
        return call("write", register=register, vcpu=vcpu, value=_value(source))
    return call("change", register=register, vcpu=vcpu, edits=_edits(source, 8))


_HV_RESET = 0x4000_0003


def _value(source: random.Random) -> int:
    return source.choice((*WORDS, 1 << source.randrange(64), source.randrange(1 << 64)))


def _strange_msr(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("write", register=ids.msr_id(source.choice(STRANGE_MSRS)), vcpu=vcpu, value=_value(source))


def _mode(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    index, values = source.choice(MODES)
    if source.random() < 0.2:
        return call("read", register=ids.msr_id(index), vcpu=vcpu)
    return call("write", register=ids.msr_id(index), vcpu=vcpu, value=source.choice(values))


def _clock(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("goes_on", register=source.choice(ABSOLUTE), vcpu=vcpu, value=source.randrange(1 << 36, 1 << 40))


def _read(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    msrs = (*profile.msrs, *profile.feature_msrs, *STRANGE_MSRS)
    register = source.choice((*_structs(profile), *map(ids.msr_id, msrs)))
    return call("read", register=register, vcpu=vcpu)


def _cpuid(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    if source.random() < 0.85:
        return call("cpuid", vcpu=vcpu, clear=_cleared(source))
    return call("cpuid", vcpu=vcpu, clear=[], entries=source.choice((0, 1, 2, 5, 12, 20, 257)))


def _copy(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("copy", source=source.choice((0, vcpu)), vcpu=vcpu)


def _host(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("host")


def _enter(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("enter", vcpu=vcpu)


def _run(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("run", steps=source.choice((1, 5, 300)))


def _list(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("list")


_WEIGHTS: tuple[tuple[Callable[[random.Random, HostProfile, int], Call], float], ...] = (
    (_struct, 30), (_aimed, 20), (_msr, 25), (_mode, 5), (_strange_msr, 3), (_clock, 3), (_read, 7), (_cpuid, 4),
    (_copy, 2), (_enter, 4), (_run, 3), (_list, 1), (_host, 0.3))
_WEIGHTED = ([make for make, _ in _WEIGHTS], [weight for _, weight in _WEIGHTS])

VOCABULARY = X86Vocabulary()
