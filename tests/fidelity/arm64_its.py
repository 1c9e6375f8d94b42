"""What is said to an ITS: its making, its registers, commands in a queue in guest RAM, tables saved and read again."""

from __future__ import annotations

import random

from migstream.registers import gic, ids
from tests.fidelity.calls import Call, call

_ADDRESS = 0x0808_0000
DEVICES, COLLECTIONS, QUEUE, _PROPERTIES, _PENDING, _TRANSLATIONS = (
    0x2_0000, 0x3_0000, 0x4_0000, 0x5_0000, 0x6_0000, 0xA_0000)
"""Where things are in guest RAM, which ends at 1 MiB; a pending table for each of three vCPUs."""

TABLES = ((DEVICES, QUEUE), (_PENDING, 1 << 20))
"""What of RAM the kernel writes."""

_NO_RAM, _FIRST_LEVEL = 0x20_0000, 0xB_0000
_VALID, _INDIRECT, _WRITE_BACK = 1 << 63, 1 << 62, 1 << 10 | 3 << 59
ITS_ADDRESS = 4
_CTLR, _IIDR, _CBASER, _CWRITER, _CREADR, _BASER0, _BASER1 = 0x00, 0x04, 0x80, 0x88, 0x90, 0x100, 0x108
_REDISTRIBUTOR = {name: ids.attribute_id(gic.GICV3, gic.REDISTRIBUTOR, offset)
                  for name, offset in (("CTLR", 0), ("PROPBASER", 0x70), ("PENDBASER", 0x78))}
FIRST_LEVEL_TABLE = _FIRST_LEVEL, (1 << 63 | 0xC_0000).to_bytes(8, "little")
"""Address and bytes of a table of device tables: there is one."""

_MAPD, _MAPC, _MAPTI, _MAPI, _MOVI, _INT, _CLEAR, _DISCARD, _MOVALL = 8, 9, 10, 11, 1, 3, 4, 15, 14
_FIRST = tuple(call("its_command", words=words) for words in (
    [_MAPD | 1 << 32, 4, _VALID | _TRANSLATIONS, 0], [_MAPD | 2 << 32, 1, _VALID | _TRANSLATIONS + 0x1000, 0],
    [_MAPC, 0, _VALID | 1, 0], [_MAPC, 0, _VALID, 0], [_MAPTI | 1 << 32, 8192 << 32 | 1, 1, 0],
    [_MAPTI | 2 << 32, 8193 << 32, 0, 0], [_INT | 1 << 32, 1, 0, 0]))
"""Two devices, two collections, an event of each device, and one of them happens."""

_REGISTERS = (0x00, 0x04, 0x08, 0x0C, 0x80, 0x84, 0x88, 0x90, 0x98, 0x100, 0x108, 0x110, 0x138, 0x140, 0xFFE8, 0x1_0000)
_WRITTEN = {_CTLR: (0, 1, 1, 2), _IIDR: (0x4B00_043B, 0, 0x1000, 0xF000, 1 << 24), 0x08: (0, 1), 0x110: (_VALID,),
            _CWRITER: (0, 32, 64, 0x21, 4096, 1 << 20), _CREADR: (0, 32, 64, 0x21, 4096, 1 << 20)}
"""Values by offset. What CWRITER passes over is what the queue held before: no command, or commands."""


def made(source: random.Random, vcpus: int) -> list[Call]:
    """An ITS as a VMM and its guest make it; now and then something is left out, or another order."""
    out = [_set(gic.ADDRESSES, ITS_ADDRESS, _ADDRESS), _set(gic.CONTROL, gic.INIT),
           _set(gic.ITS_REGISTERS, _BASER0, _VALID | _WRITE_BACK | DEVICES),
           _set(gic.ITS_REGISTERS, _BASER1, _VALID | _WRITE_BACK | COLLECTIONS),
           _set(gic.ITS_REGISTERS, _CBASER, _VALID | _WRITE_BACK | QUEUE),
           call("gic_set", vcpu=0, id=_REDISTRIBUTOR["PROPBASER"], value=_PROPERTIES | 15)]
    for vcpu in range(vcpus):
        out += [call("gic_set", vcpu=vcpu, id=_REDISTRIBUTOR["PENDBASER"], value=_PENDING + 0x1_0000 * vcpu),
                call("gic_set", vcpu=vcpu, id=_REDISTRIBUTOR["CTLR"], value=1)]
    out.append(_set(gic.ITS_REGISTERS, _CTLR, 1))
    if source.random() < 0.15:
        source.shuffle(out)
    if source.random() < 0.15:
        out.pop(source.randrange(len(out)))
    return [call("its_create"), *out, *(_FIRST if source.random() < 0.8 else ())]


def any_call(source: random.Random) -> Call:
    """One call."""
    kind = source.random()
    if kind < 0.5:
        return _command(source)
    if kind < 0.6:
        return call("its_save")
    if kind < 0.68:
        return call("its_restore")
    if kind < 0.78:
        return call("gic_pending")
    if kind < 0.82:
        return _making(source)
    return _register(source)


def _set(group: int, attribute: int, value: int = 0) -> Call:
    return call("its", verb="set", group=group, attribute=attribute, value=value)


def _making(source: random.Random) -> Call:
    verb, group = source.choice(("set", "set", "get", "has")), source.choice((gic.ADDRESSES, gic.CONTROL, 2))
    attribute = source.choice((4, 4, 3, 9) if group == gic.ADDRESSES else (0, 9))
    return call("its", verb=verb, group=group, attribute=attribute,
                value=source.choice((_ADDRESS, _ADDRESS + 0x1000, 1 << 40, (1 << 40) - (1 << 16))))


def _register(source: random.Random) -> Call:
    verb, offset = source.choice(("set", "set", "get", "has")), source.choice(_REGISTERS)
    memory = source.getrandbits(2) << 10 | source.getrandbits(3) << 59 | source.getrandbits(3) << 53
    tables = {_CBASER: (QUEUE, QUEUE | 0x1000, _NO_RAM, QUEUE | 1),
              _BASER1: (COLLECTIONS, COLLECTIONS | 0x1000, _NO_RAM),
              _BASER0: (DEVICES, DEVICES | 0x300, _NO_RAM, _FIRST_LEVEL | _INDIRECT, DEVICES | 7 << 56)}
    if offset in tables:
        valid = _VALID if offset == _BASER1 or source.random() < 0.8 else 0
        value = source.choice(tables[offset]) | memory | valid
    else:
        value = source.choice(_WRITTEN.get(offset, (0,)))
    return call("its", verb=verb, group=gic.ITS_REGISTERS, attribute=offset, value=value)


def _command(source: random.Random) -> Call:
    """A command's four words: few devices, events and collections, so that they meet."""
    device, event = source.choice((*(0, 1, 1, 2, 2, 5) * 2, 8191, 8192, 1 << 16)), source.choice((0, 1, 1, 2, 30, 33))
    collection, vcpu = source.choice((0, 0, 1, 1, 2, 8191, 8192)), source.choice((0, 0, 1, 2, 3))
    lpi = source.choice((8192, 8193, 8194, 8195, 8200, 8191, 0xFFFF, 1 << 16))
    table = source.choice(tuple(_TRANSLATIONS + 0x1000 * n for n in range(5)) * 2 + (_NO_RAM,))
    words = {
        _MAPD: (0, source.choice((0, 4, 4, 4, 5, 15, 16)), table | (_VALID if source.random() < 0.85 else 0), 0),
        _MAPC: (0, 0, _VALID | vcpu << 16 | collection, 0),
        _MAPTI: (0, lpi << 32 | event, collection, 0),
        _MAPI: (0, source.choice((event, 8192)), collection, 0),
        _MOVI: (0, event, collection, 0),
        _MOVALL: (0, 0, vcpu << 16, source.choice((0, 1, 2)) << 16),
    }
    what = source.choice((_MAPD, _MAPD, _MAPC, _MAPC, _MAPTI, _MAPTI, _MAPTI, _MAPI, _MOVI, _INT, _INT, _INT, _CLEAR,
                          _DISCARD, _DISCARD, _MOVALL, 5, 13, 0x7F))
    first, *rest = words.get(what, (0, event, 0, 0))
    return call("its_command", words=[what | device << 32 | first, *rest])
