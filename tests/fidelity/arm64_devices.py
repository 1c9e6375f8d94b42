"""What is said to the devices of an arm64 VM: vGICv3, PMU, timers, paravirtualized time."""

from __future__ import annotations

import random

from migstream.registers import gic
from migstream.registers.catalogue import lookup
from tests.fidelity.calls import Call, call

_DISTRIBUTOR, _REDISTRIBUTORS = 0x0800_0000, 0x080A_0000
_ADDRESSES = (_DISTRIBUTOR, _REDISTRIBUTORS, 0x0800_1000, 0x0801_0000, 1 << 40, (1 << 40) - (1 << 16), 1 << 60)
_IRQS = (64, 96, 128, 32, 65, 1024, 1056, 0)
_LINES = (27, 30, 23, 20, 15, 16, 31, 32, 40, 1019, 1020, 0)
_PV_TIMES = (0x8000, 0x8040, 0x8001, 0x1000_0000)
_FILTERS = (0x11 | 1 << 16, 0x11 | 1 << 16 | 1 << 32, 2 << 32, 0xFFFF | 0xFFFF << 16)
_WORDS = (0, 1, 3, 0x55, 0xF8, 0xFFFF, 0xAAAA_AAAA, 0xFFFF_FFFF, 1 << 32 | 1, (1 << 64) - 1)

REGISTERS = tuple(slot.id for layout in gic.layouts(96, 1, False) for slot in layout.slots)
"""Of a vGIC with 96 interrupts."""


def made(source: random.Random) -> list[Call]:
    """A vGIC as a VMM makes it; now and then something is left out, or another order."""
    out = [call("gic", verb="set", group=gic.ADDRESSES, attribute=2, value=_DISTRIBUTOR),
           call("gic", verb="set", group=gic.ADDRESSES, attribute=3, value=_REDISTRIBUTORS),
           call("gic", verb="set", group=gic.IRQ_COUNT, attribute=0, value=96),
           call("gic", verb="set", group=gic.CONTROL, attribute=gic.INIT)]
    if source.random() < 0.15:
        source.shuffle(out)
    if source.random() < 0.1:
        out.pop(source.randrange(len(out)))
    return [call("gic_create"), *out]


def pmu(source: random.Random, vcpus: int, chip: bool) -> list[Call]:
    """PMUs as a VMM makes them."""
    out = []
    for vcpu in range(vcpus):
        if chip and source.random() < 0.9:
            out.append(call("line", verb="set", vcpu=vcpu, group=0, attribute=0, value=23))
        if source.random() < 0.9:
            out.append(call("line", verb="set", vcpu=vcpu, group=0, attribute=1))
    return out


def any_call(source: random.Random, vcpu: int, chip: bool) -> Call:
    """One call; of a VM with a vGIC mostly to its registers."""
    kind = source.random()
    if chip and kind < 0.6:
        return _register(source, vcpu)
    if kind < (0.7 if chip else 0.2):
        return _making(source)
    return _line(source, vcpu)


def _register(source: random.Random, vcpu: int) -> Call:
    id = source.choice(REGISTERS)
    if source.random() < 0.3:
        return call("gic_get", vcpu=vcpu, id=id)
    size = lookup(id).size or 4
    value = source.choice((*_WORDS, source.getrandbits(32), source.getrandbits(64)))
    return call("gic_set", vcpu=vcpu, id=id, value=value & (1 << 8 * size) - 1)


def _making(source: random.Random) -> Call:
    verb, kind = source.choice(("set", "set", "get", "has")), source.random()
    if kind < 0.15:
        return call("gic_create")
    if kind < 0.55:
        return call("gic", verb=verb, group=gic.ADDRESSES, attribute=source.choice((2, 3, 9)),
                    value=source.choice(_ADDRESSES))
    if kind < 0.8:
        return call("gic", verb=verb, group=gic.IRQ_COUNT, attribute=0, value=source.choice(_IRQS))
    if verb == "get":
        return call("gic", verb=verb, group=gic.CONTROL, attribute=gic.INIT)
    return call("gic", verb=verb, group=gic.CONTROL, attribute=source.choice((gic.INIT, 9)))


def _line(source: random.Random, vcpu: int) -> Call:
    verb, group = source.choice(("set", "set", "get", "has")), source.choice((0, 0, 1, 1, 2, 3))
    attribute = source.choice({0: (0, 0, 1, 2, 3, 4, 5), 1: (0, 1, 0, 1, 2, 3, 4), 2: (0, 0, 1), 3: (0,)}[group])
    values = {(0, 2): _FILTERS, (0, 3): (0xFFFF,), (0, 4): (0, 3, 6, 7, 31), (2, 0): _PV_TIMES}
    return call("line", verb=verb, vcpu=vcpu, group=group, attribute=attribute,
                value=source.choice(values.get((group, attribute), _LINES)))
