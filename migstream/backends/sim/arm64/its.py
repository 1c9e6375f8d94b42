"""The ITS of a simulated VM: commands from the guest's queue, and its tables in guest RAM.

Sources: Arm IHI 0069, chapter 5 (commands); Linux Documentation/virt/kvm/devices/arm-vgic-its.rst (the tables' layout,
ABI revision 0) and arch/arm64/kvm/vgic/vgic-its.c, whose functions are named beside what follows them.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING

import numpy as np

from migstream.errors import UsageError

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory

CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR, BASER0 = 0x00, 0x04, 0x08, 0x80, 0x88, 0x90, 0x100
_DEVICES, _COLLECTIONS = BASER0, BASER0 + 8
_IIDR = 0x4B00_043B
_REVISION = 0xF << 12
_TYPER = 1 | 7 << 4 | 15 << 8 | 15 << 13
"""Physical LPIs, entries of 8 bytes, 16 bits of event and of device."""

_IDENTIFICATION = {0xFFE0: 0x92, 0xFFE4: 0xB4, 0xFFE8: 0x3B, 0xFFD0: 0x40,
                   0xFFF0: 0x0D, 0xFFF4: 0xF0, 0xFFF8: 0x05, 0xFFFC: 0xB1}
_ENABLED, _QUIESCENT, _VALID, _INDIRECT = 1, 1 << 31, 1 << 63, 1 << 62
_FIXED_FIELDS = 7 << 56 | 0x1F << 48
_BASERS = {_DEVICES: 1 << 56 | 7 << 48, _COLLECTIONS: 4 << 56 | 7 << 48}
"""Type (devices, collections) and size of an entry, which can't be changed; the other six are not there."""

_INITIAL = 1 << 10 | 3 << 59 | 2 << 8
"""INITIAL_BASER_VALUE: inner shareable, read-allocate write-back, pages of 64 KiB."""

_OFFSET = (1 << 20) - (1 << 5)
"""Bits of GITS_CWRITER and GITS_CREADR that say where in the queue: commands have 32 bytes."""

_PAGE, _ENTRY = 1 << 16, 8
_FIRST_LPI, _MOST_IDS, _MOST_BITS = 8192, 1 << 16, 16
NOT_MAPPED = 0xFFFF_FFFF
"""COLLECTION_NOT_MAPPED: the vCPU of a collection that events were mapped to before it was."""


@dataclass(frozen=True, slots=True)
class Redistributors:
    """What the ITS needs of them: GICR_PENDBASER and whether LPIs are on, of each vCPU; GICR_PROPBASER."""

    pending: list[int]
    on: list[bool]
    properties: int


class _Refused(Exception):
    """The errno of an order about tables."""


def _order(order: Callable[[Its], None]) -> Callable[[Its], int]:
    """An order about tables; gives its errno: EFAULT where one of them is not in guest RAM."""
    @wraps(order)
    def carry_out(self: Its) -> int:
        try:
            order(self)
        except UsageError:
            return errno.EFAULT
        except _Refused as refused:
            return int(refused.args[0])
        return 0

    return carry_out


class Its:
    """One ITS.

    Attributes:
        devices: by id, the address of the translation table and the bits of an event's number.
        collections: vCPU by collection, in the order in which they were made. events: by device and event, interrupt
            and collection. targets: the LPIs that there are, with the vCPU that takes each. pending: LPIs.
        undoes: whether a restore that fails leaves nothing (since 5.19). clears: whether what is unmapped is cleared
            in guest RAM.
    """

    def __init__(self, memory: Callable[[], GuestMemory], redistributors: Callable[[], Redistributors],
                 undoes: bool = True, clears: bool = True) -> None:
        """`memory` gives guest RAM."""
        self._memory, self._redistributors = memory, redistributors
        self.undoes, self.clears = undoes, clears
        self._registers: dict[int, int] = {CTLR: 0, CBASER: 0, CWRITER: 0, CREADR: 0,
                                           **{offset: fixed | _INITIAL for offset, fixed in _BASERS.items()}}
        self.devices: dict[int, tuple[int, int]] = {}
        self.collections: dict[int, int] = {}
        self.events: dict[tuple[int, int], tuple[int, int]] = {}
        self.targets: dict[int, int | None] = {}
        self.pending: set[int] = set()
        self._on: list[bool] = []

    # registers

    def read(self, offset: int) -> int:
        """A register's value."""
        if offset == IIDR:
            return _IIDR
        if offset == CTLR:
            idle = self._registers[CREADR] == self._registers[CWRITER]
            return self._registers[CTLR] | (_QUIESCENT if idle else 0)
        return self._registers.get(offset, _TYPER if offset == TYPER else _IDENTIFICATION.get(offset, 0))

    def write(self, offset: int, value: int) -> int:
        """Store a register and do what follows from it: errno."""
        if offset == IIDR:
            return errno.EINVAL if value & _REVISION else 0
        if offset == CREADR:
            return self._set_creadr(value & _OFFSET)
        if offset == CTLR:
            self._switch(value & _ENABLED)
        elif offset == CWRITER and value & _OFFSET < self._queue_size:
            self._registers[CWRITER] = value & _OFFSET
        elif (offset == CBASER or offset in _BASERS) and not self._registers[CTLR]:
            self._set_table(offset, value)
        self._obey()
        return 0

    def _set_creadr(self, value: int) -> int:
        """vgic_mmio_uaccess_write_its_creadr()."""
        if self._registers[CTLR]:
            return errno.EBUSY
        if value >= self._queue_size:
            return errno.EINVAL
        self._registers[CREADR] = value
        return 0

    def _switch(self, on: int) -> None:
        """vgic_mmio_write_its_ctlr(): on only with a queue and both tables."""
        if not on or all(self._registers[offset] & _VALID for offset in (CBASER, *_BASERS)):
            self._registers[CTLR] = on

    def _set_table(self, offset: int, value: int) -> None:
        """vgic_mmio_write_its_cbaser() and vgic_mmio_write_its_baser()."""
        value = _memory_attributes(value)
        if offset == CBASER:
            self._registers.update({CBASER: value & ~0xF000, CREADR: 0, CWRITER: 0})
            return
        value = self._registers[offset] = value & ~(_FIXED_FIELDS | 3 << 8) | 2 << 8 | _BASERS[offset]
        if not value & _VALID:
            self._free_devices() if offset == _DEVICES else self.collections.clear()

    @property
    def _queue_size(self) -> int:
        return ((self._registers[CBASER] & 0xFF) + 1) * 4096

    def reset(self) -> None:
        """KVM_DEV_ARM_ITS_CTRL_RESET: vgic_its_reset()."""
        self._registers.update({offset: 0 for offset in (CTLR, CBASER, CREADR, CWRITER)})
        for offset in _BASERS:
            self._registers[offset] &= ~_VALID
        self._free_devices()
        self.collections.clear()

    # commands

    def _obey(self) -> None:
        """vgic_its_process_commands(): those between the two pointers; one that can't be read is passed over."""
        base = self._registers[CBASER] & (1 << 52) - (1 << 12)
        while self._registers[CTLR] and self._registers[CREADR] != self._registers[CWRITER]:
            at = self._registers[CREADR]
            with suppress(UsageError, _Refused):
                self._command(struct.unpack("<4Q", self._memory().view(base + at, 32)))
            self._registers[CREADR] = (at + 32) % self._queue_size

    def _command(self, words: tuple[int, ...]) -> None:
        if carry_out := _COMMANDS.get(words[0] & 0xFF):
            carry_out(self, words, words[0] >> 32, words[1] & 0xFFFF_FFFF)

    def _mapd(self, words: tuple[int, ...], device: int, event: int) -> None:
        place, bits = self._place(_DEVICES, device), (words[1] & 0x1F) + 1
        if place is None or (words[2] & _VALID and bits > _MOST_BITS):
            return
        self._free(device)
        if words[2] & _VALID:
            self.devices[device] = words[2] & (1 << 52) - (1 << 8), bits
        elif self.clears:
            self._put(place, 0)

    def _mapc(self, words: tuple[int, ...], device: int, event: int) -> None:
        collection, vcpu = words[2] & 0xFFFF, words[2] >> 16 & 0xFFFF_FFFF
        if not words[2] & _VALID:
            self.collections.pop(collection, None)
        elif vcpu < len(self._redistributors().on) and self._has_collection(collection):
            self.collections[collection] = vcpu
            for lpi, of in self.events.values():
                if of == collection:
                    self.targets[lpi] = vcpu

    def _has_collection(self, collection: int) -> bool:
        return collection in self.collections or self._place(_COLLECTIONS, collection) is not None

    def _mapti(self, words: tuple[int, ...], device: int, event: int) -> None:
        lpi, collection = words[1] >> 32 if words[0] & 0xFF == _MAPTI else event, words[2] & 0xFFFF
        most = 1 << min((self._redistributors().properties & 0x1F) + 1, _MOST_BITS)
        if (device not in self.devices or event >> self.devices[device][1] or not _FIRST_LPI <= lpi < most
                or (device, event) in self.events or not self._has_collection(collection)):
            return
        new = collection not in self.collections
        try:
            self._add(lpi, self.collections.setdefault(collection, NOT_MAPPED))
        except (_Refused, UsageError):
            if new:
                del self.collections[collection]
            return
        self.events[device, event] = lpi, collection

    def _add(self, lpi: int, vcpu: int) -> None:
        """vgic_add_lpi(): its properties are read, and whether it is pending, which is taken out of the table.

        Raises: UsageError where one of the tables is not in guest RAM.
        """
        if lpi in self.targets:
            return
        found = self._redistributors()
        self._memory().view((found.properties & (1 << 52) - (1 << 12)) + lpi - _FIRST_LPI, 1)
        if vcpu != NOT_MAPPED:
            byte = self._pending_byte(lpi, found.pending[vcpu])
            if byte[0] >> lpi % 8 & 1:
                self.pending.add(lpi)
                byte[0] &= ~(1 << lpi % 8) & 0xFF
        self.targets[lpi] = None if vcpu == NOT_MAPPED else vcpu

    def _pending_byte(self, lpi: int, table: int) -> memoryview:
        return self._memory().view((table & (1 << 52) - (1 << 16)) + lpi // 8, 1)

    def _mapped(self, device: int, event: int) -> int | None:
        """The LPI of an event whose collection a vCPU takes."""
        lpi, collection = self.events.get((device, event), (None, -1))
        return lpi if self.collections.get(collection, NOT_MAPPED) != NOT_MAPPED else None

    def _movi(self, words: tuple[int, ...], device: int, event: int) -> None:
        lpi, collection = self._mapped(device, event), words[2] & 0xFFFF
        vcpu = self.collections.get(collection, NOT_MAPPED)
        if lpi is not None and vcpu != NOT_MAPPED:
            self.events[device, event] = lpi, collection
            self.targets[lpi] = vcpu

    def _movall(self, words: tuple[int, ...], device: int, event: int) -> None:
        source, target = words[2] >> 16 & 0xFFFF_FFFF, words[3] >> 16 & 0xFFFF_FFFF
        if max(source, target) < len(self._redistributors().on):
            self.targets.update({lpi: target for lpi, vcpu in self.targets.items() if vcpu == source})

    def _int(self, words: tuple[int, ...], device: int, event: int) -> None:
        lpi = self._mapped(device, event)
        if lpi is not None and self._redistributors().on[self.collections[self.events[device, event][1]]]:
            self.pending.add(lpi)

    def _clear(self, words: tuple[int, ...], device: int, event: int) -> None:
        if (device, event) in self.events:
            self.pending.discard(self.events[device, event][0])

    def _discard(self, words: tuple[int, ...], device: int, event: int) -> None:
        if self._mapped(device, event) is not None:
            self._free_event(device, event)
            if self.clears:
                self._put(self.devices[device][0] + _ENTRY * event, 0)

    def _free_event(self, device: int, event: int) -> None:
        """An LPI that no event is any more is forgotten, with what is pending."""
        lpi, _ = self.events.pop((device, event))
        if all(other != lpi for other, _ in self.events.values()):
            self.targets.pop(lpi, None)
            self.pending.discard(lpi)

    def _free(self, device: int) -> None:
        for of, event in list(self.events):
            if of == device:
                self._free_event(of, event)
        self.devices.pop(device, None)

    def _free_devices(self) -> None:
        for device in list(self.devices):
            self._free(device)

    # tables

    def _place(self, register: int, id: int) -> int | None:
        """vgic_its_check_id(): the address of an entry; None where the table has none, or it is not in guest RAM."""
        value = self._registers[register]
        table, size = _table(value), ((value & 0xFF) + 1) * _PAGE
        if id >= _MOST_IDS:
            return None
        with suppress(UsageError):
            if value & _INDIRECT:
                index, id = divmod(id, _PAGE // _ENTRY)
                if index >= size // 8:
                    return None
                first = int.from_bytes(self._memory().view(table + 8 * index, 8), "little")
                if not first & _VALID:
                    return None
                table, size = first & (1 << 52) - (1 << 16), _PAGE
            if id < size // _ENTRY:
                self._memory().view(table + _ENTRY * id, 1)
                return table + _ENTRY * id
        return None

    @_order
    def save_tables(self) -> None:
        """KVM_DEV_ARM_ITS_SAVE_TABLES: devices, their events, and collections go to guest RAM."""
        if self._registers[_DEVICES] & _VALID:
            for id in sorted(self.devices):
                self._save_device(id)
        if self._registers[_COLLECTIONS] & _VALID:
            table = _table(self._registers[_COLLECTIONS])
            entries = [_VALID | vcpu << 16 | collection for collection, vcpu in self.collections.items()]
            room = ((self._registers[_COLLECTIONS] & 0xFF) + 1) * _PAGE // _ENTRY
            for n, entry in enumerate((*entries, 0)[:room]):  # an entry of zeros says that there are no more
                self._put(table + _ENTRY * n, entry)

    def _save_device(self, id: int) -> None:
        place = self._place(_DEVICES, id)
        if place is None:
            raise _Refused(errno.EINVAL)
        table, bits = self.devices[id]
        mine = sorted(event for of, event in self.events if of == id)
        for event in mine:
            lpi, collection = self.events[id, event]
            self._put(table + _ENTRY * event, _next(event, mine, 16) << 48 | lpi << 16 | collection)
        self._put(place, _VALID | _next(id, list(self.devices), 14) << 49 | table >> 8 << 5 | bits - 1)

    @_order
    def save_pending(self) -> None:
        """KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: a bit for each LPI, in the table of the vCPU that takes it."""
        tables = self._redistributors().pending
        for lpi, vcpu in self.targets.items():
            if vcpu is not None:
                byte = self._pending_byte(lpi, tables[vcpu])
                byte[0] = byte[0] & ~(1 << lpi % 8) | (lpi in self.pending) << lpi % 8

    def switched(self) -> None:
        """GICR_CTLR was written: its_sync_lpi_pending_table() of vCPUs whose LPIs went on."""
        found, before = self._redistributors(), self._on
        self._on = found.on
        for lpi, vcpu in self.targets.items():
            if vcpu is None or not found.on[vcpu] or (vcpu < len(before) and before[vcpu]):
                continue
            if found.pending[vcpu] & _PENDING_ZERO:
                continue
            with suppress(UsageError):
                pends = self._pending_byte(lpi, found.pending[vcpu])[0] >> lpi % 8 & 1
                (self.pending.add if pends else self.pending.discard)(lpi)

    @_order
    def restore_tables(self) -> None:
        """KVM_DEV_ARM_ITS_RESTORE_TABLES, and which of the LPIs are pending."""
        try:
            self._restore_collections()
            self._restore_devices()
        except (_Refused, UsageError):
            if self.undoes:
                self._free_devices()
                self.collections.clear()
            raise

    def _restore_collections(self) -> None:
        value = self._registers[_COLLECTIONS]
        if not value & _VALID:
            return
        for n in range(((value & 0xFF) + 1) * _PAGE // _ENTRY):
            entry = int.from_bytes(self._memory().view(_table(value) + _ENTRY * n, _ENTRY), "little")
            if not entry & _VALID:
                return
            collection, vcpu = entry & 0xFFFF, entry >> 16 & 0xFFFF_FFFF
            if vcpu != NOT_MAPPED and vcpu >= len(self._redistributors().on):
                raise _Refused(errno.EINVAL)
            if collection in self.collections:
                raise _Refused(errno.EEXIST)
            if self._place(_COLLECTIONS, collection) is None:
                raise _Refused(errno.EINVAL)
            self.collections[collection] = vcpu

    def _restore_devices(self) -> None:
        value = self._registers[_DEVICES]
        if not value & _VALID:
            return
        size = ((value & 0xFF) + 1) * _PAGE
        if not value & _INDIRECT:
            self._scan(_table(value), size, 0, self._restore_device)
            return

        def second_level(n: int, entry: int) -> int:
            more = not entry & _VALID or self._scan(entry & (1 << 52) - (1 << 16), _PAGE, n * _PAGE // _ENTRY,
                                                    self._restore_device)
            return 1 if more else 0

        self._scan(_table(value), size, 0, second_level)

    def _restore_device(self, id: int, entry: int) -> int:
        if not entry & _VALID:
            return 1
        table, bits = (entry >> 5 & (1 << 44) - 1) << 8, (entry & 0x1F) + 1
        self.devices[id] = table, bits
        try:
            self._scan(table, _ENTRY << bits, 0, lambda event, inner: self._restore_event(id, event, inner))
        except (_Refused, UsageError):
            self._free(id)
            raise
        return entry >> 49 & 0x3FFF

    def _restore_event(self, device: int, event: int, entry: int) -> int:
        lpi, collection, step = entry >> 16 & 0xFFFF_FFFF, entry & 0xFFFF, entry >> 48
        if not lpi:
            return 1
        if lpi < _FIRST_LPI or event + step >= 1 << self.devices[device][1] or collection not in self.collections:
            raise _Refused(errno.EINVAL)
        self._add(lpi, self.collections[collection])
        self.events[device, event] = lpi, collection
        return step

    def _scan(self, table: int, size: int, first: int, visit: Callable[[int, int], int]) -> bool:
        """scan_its_table(): each entry says how far the next one is; False where one said that it is the last."""
        at, count = 0, size // _ENTRY
        while at < count:
            words = np.frombuffer(self._memory().view(table + _ENTRY * at, _ENTRY * min(512 - at % 512, count - at)),
                                  np.uint64)
            found = np.flatnonzero(words)
            if not len(found):
                at += len(words)
                continue
            at += int(found[0])
            step = visit(first + at, int(words[found[0]]))
            if not step:
                return False
            at += step
        return True

    def _put(self, address: int, entry: int) -> None:
        self._memory().view(address, 8)[:] = struct.pack("<Q", entry)


_MAPTI = 0x0A
_COMMANDS: dict[int, Callable[[Its, tuple[int, ...], int, int], None]] = {
    0x01: Its._movi, 0x03: Its._int, 0x04: Its._clear, 0x08: Its._mapd, 0x09: Its._mapc, _MAPTI: Its._mapti,
    0x0B: Its._mapti, 0x0E: Its._movall, 0x0F: Its._discard,
}
"""By number. SYNC, INV and INVALL change nothing that is seen here."""

_PENDING_ZERO = 1 << 62
"""GICR_PENDBASER.PTZ."""


def _memory_attributes(value: int) -> int:
    """vgic_sanitise_field() of shareability (11:10), inner (61:59) and outer cacheability (55:53)."""
    share, inner, outer = value >> 10 & 3, value >> 59 & 7, value >> 53 & 7
    share, inner, outer = 1 if share == 2 else share, 3 if inner <= 1 else inner, outer if outer <= 1 else 0
    return value & ~(3 << 10 | 7 << 59 | 7 << 53) | share << 10 | inner << 59 | outer << 53


def _table(value: int) -> int:
    """GITS_BASER_ADDR_48_to_52()."""
    return value & (1 << 48) - (1 << 16) | (value >> 12 & 0xF) << 48


def _next(number: int, numbers: list[int], bits: int) -> int:
    """How far the next one is, as far as the field can say; 0 for the last."""
    later = [other - number for other in numbers if other > number]
    return min(min(later), (1 << bits) - 1) if later else 0


def missing(offset: int) -> int:
    """vgic_its_has_attr_regs(): EINVAL for half of a register, ENXIO for one that there is not."""
    if offset & (3 if offset < TYPER or offset >= 0xFFD0 else 7):
        return errno.EINVAL
    known = offset in (CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR) or BASER0 <= offset < BASER0 + 0x40
    return 0 if known or 0xFFD0 <= offset < 0x1_0000 else errno.ENXIO
