"""All bit tables, of all architectures, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from migstream.registers import bits_arm64, bits_arm64_id, bits_x86_64
from migstream.registers.bits import Field, describe

BITS: Mapping[str, tuple[Field, ...]] = MappingProxyType({**bits_x86_64.BITS, **bits_arm64_id.BITS, **bits_arm64.BITS})
"""Fields by table name, ascending and not overlapping; no name is in two tables."""


def decode(table: str, value: int) -> list[str]:
    """What a value says, as `migstream.registers.bits.describe` words it.

    A table that does not exist has no names, so every set bit is shown.

    Raises:
        ValueError: the value is negative.
    """
    if value < 0:
        raise ValueError(f"{table}: expected a value of no sign, found {value}")
    return describe(BITS.get(table, ()), value)
