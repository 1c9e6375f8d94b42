"""The ITS of a simulated VM: commands from the guest's queue, and its tables in guest RAM.

Sources: Arm IHI 0069, chapter 5 (commands); Linux Documentation/virt/kvm/devices/arm-vgic-its.rst (the tables' layout,
ABI revision 0) and arch/arm64/kvm/vgic/vgic-its.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from migstream.errors import UsageError

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory

CTLR, IIDR, CBASER, CWRITER, CREADR, BASER0 = 0x00, 0x04, 0x80, 0x88, 0x90, 0x100
_IIDR = 0x4B00_043B
_ENABLED, _QUIESCENT, _VALID = 1, 1 << 31, 1 << 63
_ADDRESS = (1 << 48) - (1 << 12)
"""Bits 47:12; what is above is something else in a GITS_BASER, and no guest of ours has that much memory."""

_READ_ONLY = 7 << 56 | 0x1F << 48
_BASERS = {BASER0: 1 << 56 | 7 << 48, BASER0 + 8: 4 << 56 | 7 << 48}
"""Type (devices, collections) and size of an entry, which can't be changed; the other six are not there."""

_OFFSET = (1 << 20) - (1 << 5)
"""Bits of GITS_CWRITER and GITS_CREADR that say where in the queue: commands have 32 bytes."""

_MAPD, _MAPC, _MAPTI, _MAPI, _INT, _CLEAR = 0x08, 0x09, 0x0A, 0x0B, 0x03, 0x04
_FIRST_LPI = 8192


def _in_ram(order: Callable[[Its], None]) -> Callable[[Its], bool]:
    """An order about tables; False where one of them is not in guest RAM."""
    def carry_out(self: Its) -> bool:
        try:
            order(self)
        except UsageError:
            return False
        return True

    carry_out.__doc__ = order.__doc__
    return carry_out


class Its:
    """One ITS.

    Attributes:
        devices: by id, the address of the translation table and the bits of an event's number.
        collections: vCPU by collection. events: by device and event, interrupt and collection. pending: LPIs.
    """

    def __init__(self, memory: Callable[[], GuestMemory], pending_tables: Callable[[], list[int]]) -> None:
        """`memory` gives guest RAM, `pending_tables` GICR_PENDBASER of each vCPU."""
        self._memory, self._pending_tables = memory, pending_tables
        self._registers: dict[int, int] = {CTLR: 0, CBASER: 0, CWRITER: 0, CREADR: 0, **_BASERS}
        self.devices: dict[int, tuple[int, int]] = {}
        self.collections: dict[int, int] = {}
        self.events: dict[tuple[int, int], tuple[int, int]] = {}
        self.pending: set[int] = set()

    def read(self, offset: int) -> int:
        """A register's value."""
        if offset == IIDR:
            return _IIDR
        return self._registers.get(offset, 0) | (_QUIESCENT if offset == CTLR else 0)

    def write(self, offset: int, value: int) -> bool:
        """Store a register and do what follows from it; False where the value is refused."""
        if offset == IIDR:
            return value == _IIDR
        if offset in (CWRITER, CREADR):
            value &= _OFFSET
            if value >= self._queue_size:
                return offset == CWRITER  # vgic_mmio_write_its_cwriter() ignores it, ..._uaccess_write_its_creadr() not
        if offset == CTLR:
            self._registers[CTLR] = value & _ENABLED
        elif offset in _BASERS:
            self._registers[offset] = value & ~_READ_ONLY | _BASERS[offset]
        elif offset in self._registers:
            self._registers[offset] = value
            if offset == CBASER:
                self._registers[CREADR] = 0
        if self._registers[CTLR] & _ENABLED:
            self._obey()
        return True

    def _obey(self) -> None:
        """The commands between the two pointers."""
        base = self._registers[CBASER] & _ADDRESS
        while self._registers[CREADR] != self._registers[CWRITER]:
            at = self._registers[CREADR]
            with suppress(UsageError):  # vgic_its_process_commands() passes over what can't be read
                self._command(struct.unpack("<4Q", self._memory().view(base + at, 32)))
            self._registers[CREADR] = (at + 32) % self._queue_size

    @property
    def _queue_size(self) -> int:
        return ((self._registers[CBASER] & 0xFF) + 1) * 4096

    def _command(self, words: tuple[int, ...]) -> None:
        what, device, event = words[0] & 0xFF, words[0] >> 32, words[1] & 0xFFFF_FFFF
        if what == _MAPD and words[2] & _VALID:
            self.devices[device] = words[2] & (1 << 52) - (1 << 8), (words[1] & 0x1F) + 1
        elif what == _MAPC and words[2] & _VALID:
            self.collections[words[2] & 0xFFFF] = words[2] >> 16 & 0xFFFF_FFFF
        elif what in (_MAPTI, _MAPI):
            self.events[device, event] = words[1] >> 32 if what == _MAPTI else event, words[2] & 0xFFFF
        elif what == _INT and (device, event) in self.events:
            self.pending.add(self.events[device, event][0])
        elif what == _CLEAR and (device, event) in self.events:
            self.pending.discard(self.events[device, event][0])

    @_in_ram
    def save_tables(self) -> None:
        """KVM_DEV_ARM_ITS_SAVE_TABLES: devices, their events, and collections go to guest RAM."""
        devices, collections = (self._registers[BASER0 + 8 * n] for n in (0, 1))
        if devices & _VALID:
            for id, (table, bits) in self.devices.items():
                entry = _VALID | _next(id, list(self.devices), 14) << 49 | table >> 8 << 5 | bits - 1
                self._put(devices & _ADDRESS, id, entry)
                mine = [event for of, event in self.events if of == id]
                for event in mine:
                    lpi, collection = self.events[id, event]
                    self._put(table, event, _next(event, mine, 16) << 48 | lpi << 16 | collection)
        if collections & _VALID:
            for n, (collection, vcpu) in enumerate(sorted(self.collections.items())):
                self._put(collections & _ADDRESS, n, _VALID | vcpu << 16 | collection)

    @_in_ram
    def save_pending(self) -> None:
        """KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: a bit for each LPI, in the table of the vCPU that takes it."""
        for lpi, table in self._targets():
            byte = self._memory().view((table & _ADDRESS) + lpi // 8, 1)
            byte[0] = byte[0] & ~(1 << lpi % 8) | (lpi in self.pending) << lpi % 8

    @_in_ram
    def restore_tables(self) -> None:
        """KVM_DEV_ARM_ITS_RESTORE_TABLES, and which of the LPIs are pending."""
        devices, collections = (self._registers[BASER0 + 8 * n] for n in (0, 1))
        if collections & _VALID:
            for _, entry in self._entries(collections, collections & _ADDRESS):
                self.collections[entry & 0xFFFF] = entry >> 16 & 0xFFFF_FFFF
        if devices & _VALID:
            for id, entry in self._entries(devices, devices & _ADDRESS):
                table, bits = (entry >> 5 & (1 << 44) - 1) << 8, (entry & 0x1F) + 1
                self.devices[id] = table, bits
                for event, inner in self._array(table, 8 << bits):
                    self.events[id, event] = inner >> 16 & 0xFFFF_FFFF, inner & 0xFFFF
        for lpi, table in self._targets():
            if self._memory().view((table & _ADDRESS) + lpi // 8, 1)[0] >> lpi % 8 & 1:
                self.pending.add(lpi)

    def _targets(self) -> Iterator[tuple[int, int]]:
        """LPIs with the pending table of the vCPU that takes each."""
        tables = self._pending_tables()
        for lpi, collection in self.events.values():
            vcpu = self.collections.get(collection)
            if vcpu is not None and vcpu < len(tables) and lpi >= _FIRST_LPI:
                yield lpi, tables[vcpu]

    def _entries(self, register: int, table: int) -> Iterator[tuple[int, int]]:
        pages = (register & 0xFF) + 1
        for number, entry in self._array(table, pages * (4096, 16384, 65536, 65536)[register >> 8 & 3]):
            if entry & _VALID:
                yield number, entry

    def _array(self, table: int, size: int) -> Iterator[tuple[int, int]]:
        """The entries that are not zero, with their numbers; a table outside of RAM has none."""
        try:
            entries = np.frombuffer(self._memory().view(table, size), np.uint64)
        except UsageError:
            return
        yield from ((int(n), int(entries[n])) for n in np.flatnonzero(entries))

    def _put(self, table: int, number: int, entry: int) -> None:
        self._memory().view(table + 8 * number, 8)[:] = struct.pack("<Q", entry)


def _next(number: int, numbers: list[int], bits: int) -> int:
    """How far the next one is, as far as the field can say; 0 for the last."""
    later = [other - number for other in numbers if other > number]
    return min(min(later), (1 << bits) - 1) if later else 0
