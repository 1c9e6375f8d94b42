"""A message interrupt for the arm64 demo guest: mapped by the ITS, pending, and never taken.

Its state is in no register: the mapping is in tables in guest RAM and in the kernel, and whether it is pending is in
a table in guest RAM and in the kernel. A save has to bring both to RAM, a restore has to read them from there. The
ITS is set up as a guest would do it, with commands in a queue (Arm IHI 0069, chapter 5); KVM's tables have the layout
of Linux Documentation/virt/kvm/devices/arm-vgic-its.rst.
"""

from __future__ import annotations

import struct

from migstream.backends.base import GuestMemory

DEVICES, COLLECTIONS, PROPERTIES, PENDING, TRANSLATIONS, QUEUE, END = (n << 16 for n in range(1, 8))
"""Offsets in RAM; the first four tables and the guest's own pages are 64 KiB each."""

DEVICE, EVENT, LPI, COLLECTION = 3, 1, 8192 + 40, 2
"""Device 3 sends event 1, which is interrupt 8232 of collection 2, which vCPU 0 takes."""

_EVENT_BITS = 4
_VALID = 1 << 63
_WRITE_BACK = 1 << 10 | 3 << 59
"""Inner shareable, read-allocate write-back: what KVM leaves as it is."""

_PAGES_64K = 2 << 8
PROPBASER = PROPERTIES | 1 << 10 | 3 << 7 | 15
"""16 bits of interrupt id; write-back."""

PENDBASER = PENDING | 1 << 10 | 3 << 7
TABLE_REGISTERS = {
    "GITS_CBASER": _VALID | _WRITE_BACK | QUEUE,
    "GITS_BASER0": _VALID | _WRITE_BACK | 1 << 56 | 7 << 48 | _PAGES_64K | DEVICES,
    "GITS_BASER1": _VALID | _WRITE_BACK | 4 << 56 | 7 << 48 | _PAGES_64K | COLLECTIONS,
}
"""Where the ITS has its tables, with what each is for and the size of an entry (8 bytes); addresses relative to RAM."""

_INT, _MAPD, _MAPC, _MAPTI = 0x03, 0x08, 0x09, 0x0A


def _commands(ram: int) -> bytes:
    commands = (
        (_MAPD | DEVICE << 32, _EVENT_BITS - 1, _VALID | ram + TRANSLATIONS, 0),
        (_MAPC, 0, _VALID | COLLECTION, 0),
        (_MAPTI | DEVICE << 32, EVENT | LPI << 32, COLLECTION, 0),
        (_INT | DEVICE << 32, EVENT, 0, 0),
    )
    return b"".join(struct.pack("<4Q", *command) for command in commands)


QUEUE_LENGTH = len(_commands(0))
"""Bytes of commands, which is where the ITS's pointers are when it has done them."""


def _saved(ram: int) -> dict[int, tuple[str, bytes]]:
    """What KVM saves to RAM: by offset, the name of an entry and its bytes."""
    device = _VALID | (ram + TRANSLATIONS) >> 8 << 5 | _EVENT_BITS - 1
    return {
        DEVICES + 8 * DEVICE: ("device table entry", struct.pack("<Q", device)),
        COLLECTIONS: ("collection table entry", struct.pack("<Q", _VALID | COLLECTION)),
        TRANSLATIONS + 8 * EVENT: ("translation table entry", struct.pack("<Q", LPI << 16 | COLLECTION)),
        PENDING + LPI // 8: ("pending bit", bytes([1 << LPI % 8])),
    }


def load(memory: GuestMemory, ram: int) -> None:
    """Put the command queue and the interrupt's properties (priority 0xa0, enabled) into RAM, which begins at `ram`."""
    memory.view(ram + QUEUE, QUEUE_LENGTH)[:] = _commands(ram)
    memory.view(ram + PROPERTIES + LPI - 8192, 1)[:] = bytes([0xA0 | 1])


def forget_tables(memory: GuestMemory, ram: int) -> None:
    """Wipe out of RAM what the kernel has saved there: what comes back with the next save is what the kernel knows."""
    for offset, (_, entry) in _saved(ram).items():
        memory.view(ram + offset, len(entry))[:] = bytes(len(entry))


def lost(memory: GuestMemory, ram: int) -> str:
    """What of the interrupt is not in RAM after the ITS and pending tables were saved; "" for nothing."""
    for offset, (name, entry) in _saved(ram).items():
        found = bytes(memory.view(ram + offset, len(entry)))
        if found != entry:
            return f"message interrupt: {name} {found.hex()}, expected {entry.hex()}"
    return ""
