"""A register's value in words: field names, numbers, and the bits that are set, by name. Nothing is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from migstream.model import Slot
from migstream.registers.bit_tables import BITS, decode
from migstream.registers.catalogue import Register, lookup
from migstream.wire import structs


@dataclass(frozen=True, slots=True)
class Shown:
    """One field of a register.

    Attributes:
        path: name within the register, such as `cs.limit`; "" where the register is a plain number.
        value: a number or bytes. bits: names of what is set in it, empty where it has no bit table.
    """

    path: str
    value: int | bytes
    bits: tuple[str, ...]

    @property
    def filler(self) -> bool:
        """True for padding and reserved bytes that are zero, which people needn't see."""
        last = self.path.rsplit(".", 1)[-1]
        return last.startswith(_FILLERS) and not (any(self.value) if isinstance(self.value, bytes) else self.value)


_FILLERS = ("pad", "reserved", "unused", "dummy")

_TABLES = {
    "cr0": "CR0", "cr4": "CR4", "efer": "EFER", "rflags": "RFLAGS", "xstate_bv": "XSTATE_BV", "xcomp_bv": "XCOMP_BV",
    "dr6": "DR6", "dr7": "DR7", "apic_base": "APIC_BASE", "mp_state": "MP_STATE",
    "lvtt": "APIC_LVTT", "spiv": "APIC_SPIV", "lvt0": "APIC_LVT", "lvt1": "APIC_LVT",
    "lvtpc": "APIC_LVT", "lvtthmr": "APIC_LVT", "lvterr": "APIC_LVT",
    "xcrs.0.value": "XCR0",
}
"""Bit table by field; a field of a struct that is not here is looked up as `struct.field`."""


def fields(slot: Slot, value: bytes) -> list[Shown]:
    """Return the fields of a register's value. A value that doesn't parse is one field, its bytes."""
    row = lookup(slot.id)
    if row.struct not in structs.STRUCTS or row.struct == "msr":
        return [_plain(row, value)]
    try:
        parsed = structs.parse(row.struct, value)
    except ValueError as error:
        return [Shown(f"does not parse ({error})", value, ())]
    return [_shown(row.struct, path, leaf) for path, leaf in _leaves("", parsed)]


def _plain(row: Register, value: bytes) -> Shown:
    if len(value) > 8:
        return Shown("", value, ())
    number = int.from_bytes(value, "little")
    names = tuple(decode(row.bits, number)) if row.bits in BITS else ()
    return Shown("", number, names)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, int | bytes]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        yield path, value
        return
    for name, child in children:
        yield from _leaves(f"{path}.{name}" if path else str(name), child)


def _shown(struct: str, path: str, leaf: int | bytes) -> Shown:
    table = _TABLES.get(path) or _TABLES.get(path.rsplit(".", 1)[-1]) or f"{struct}.{path}"
    known = isinstance(leaf, int) and table in BITS
    return Shown(path, leaf, tuple(decode(table, leaf)) if known and isinstance(leaf, int) else ())
