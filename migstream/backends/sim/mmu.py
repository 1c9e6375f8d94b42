"""Address translation of a simulated vCPU: the 4-level walk of 64-bit mode, and what is behind a physical address.

Source: Intel SDM volume 3, 5.5 (4-level paging). Supervisor mode only. There is no delivery of exceptions here, so a
fault ends the vCPU as a triple fault does: `KVM_EXIT_SHUTDOWN`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from migstream.backends.base import GuestMemory
from migstream.errors import UsageError
from migstream.model import PAGE

PRESENT, WRITABLE, ACCESSED, DIRTY, LARGE = 1 << 0, 1 << 1, 1 << 5, 1 << 6, 1 << 7
_FRAME = (1 << 52) - PAGE
_WRITE_PROTECT = 1 << 16
_TLB_ENTRIES = 64
_WORD = struct.Struct("<Q")


class Exit(Exception):
    """A vCPU that stops by itself, with the kernel's name of the reason; the instruction was not done."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Page(NamedTuple):
    """4 KiB of guest RAM: guest-physical address and the memory."""

    address: int
    memory: memoryview


class Mmu:
    """One vCPU's translation, with a small TLB for reads and one for writes."""

    def __init__(self, memory: GuestMemory, cr0: int, cr3: int) -> None:
        self._memory, self._root = memory, cr3 & _FRAME
        self._protect = bool(cr0 & _WRITE_PROTECT)
        self._tlbs: tuple[dict[int, Page], dict[int, Page]] = ({}, {})

    def page(self, address: int, write: bool) -> Page:
        """Return the page of RAM behind a linear address. Raises: Exit for a fault and for what is not RAM."""
        tlb = self._tlbs[write]
        found = tlb.get(address >> 12)
        if found is None:
            if len(tlb) >= _TLB_ENTRIES:
                tlb.clear()
            found = tlb[address >> 12] = self._ram(self._walk(address, write))
        return found

    def load(self, address: int, size: int) -> int:
        """Read an unsigned number of `size` bytes."""
        offset = address & 0xFFF
        if offset + size > PAGE:
            first = PAGE - offset
            return self.load(address, first) | self.load(address + first & _LINEAR, size - first) << 8 * first
        memory = self.page(address, False).memory
        return int(_WORD.unpack_from(memory, offset)[0]) if size == 8 \
            else int.from_bytes(memory[offset:offset + size], "little")

    def store(self, address: int, size: int, value: int) -> tuple[int, ...]:
        """Write a number of `size` bytes and return the guest-physical pages that it is in."""
        offset = address & 0xFFF
        if offset + size > PAGE:
            first = PAGE - offset
            self.page(address + first & _LINEAR, True)
            return (*self.store(address, first, value & (1 << 8 * first) - 1),
                    *self.store(address + first & _LINEAR, size - first, value >> 8 * first))
        page = self.page(address, True)
        page.memory[offset:offset + size] = value.to_bytes(size, "little")
        return (page.address,)

    def _ram(self, physical: int) -> Page:
        address = physical & ~0xFFF
        try:
            return Page(address, self._memory.view(address, PAGE))
        except UsageError:
            raise Exit("KVM_EXIT_MMIO") from None

    def _walk(self, address: int, write: bool) -> int:
        """The physical address, with the accessed and dirty bits set on the way."""
        if address >> 47 not in (0, 0x1FFFF):
            raise Exit("KVM_EXIT_SHUTDOWN")
        table = self._root
        for shift in (39, 30, 21, 12):
            at = table + (address >> shift & 0x1FF) * 8
            entry = self._entry(at, write)
            last = shift == 12 or (bool(entry & LARGE) and shift != 39)
            self._mark(at, entry | ACCESSED | (DIRTY if last and write else 0), entry)
            if last:
                low = (1 << shift) - 1
                return entry & _FRAME & ~low | address & low
            table = entry & _FRAME
        raise AssertionError("the last level ends the walk")

    def _entry(self, at: int, write: bool) -> int:
        entry = int(_WORD.unpack_from(self._ram(at).memory, at & 0xFFF)[0])
        if not entry & PRESENT or (write and self._protect and not entry & WRITABLE):
            raise Exit("KVM_EXIT_SHUTDOWN")
        return entry

    def _mark(self, at: int, new: int, old: int) -> None:
        if new != old:
            _WORD.pack_into(self._ram(at).memory, at & 0xFFF, new)


_LINEAR = (1 << 64) - 1
