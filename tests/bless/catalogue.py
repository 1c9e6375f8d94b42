"""The blessed list of x86-64 registers: one line a row of the catalogue."""

from __future__ import annotations

from migstream.registers import ids, x86_64
from migstream.registers.catalogue import Register, lookup
from migstream.registers.msrs import MSRS

_HEAD = """\
# x86-64 registers of stream major 1: id, name, size in bytes (host: the host tells), scope, phase, class.
# Structs in restore order, then KVM-defined registers, then MSRs in restore order. Lines are added, never changed.
"""


def rows() -> list[Register]:
    """Every row of the catalogue."""
    msrs = [lookup(ids.msr_id(msr.index)) for msr in MSRS]
    return [*x86_64.ROWS, lookup(ids.KVM_REG_X86_KVM), *msrs]


def line(row: Register) -> str:
    """One row as text."""
    size = "host" if row.size is None else str(row.size)
    return f"{row.id:#018x} {row.name} {size} {row.scope} {row.phase.name.lower()} {row.klass}"


def files() -> dict[str, str]:
    """Text of the list by path under formats/."""
    return {"registers/x86_64.txt": _HEAD + "".join(line(row) + "\n" for row in rows())}
