"""What a struct of KVM's UAPI is to this project, and the small words that its schemas are written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from construct import Bytes, Construct

AnyConstruct: TypeAlias = "Construct[Any, Any]"


@dataclass(frozen=True, slots=True)
class Schema:
    """One struct of KVM's UAPI.

    Attributes:
        name: the kernel's name for it, or ours where the kernel has none.
        construct: the schema.
        size: bytes; None where the struct has no one size.
        source: kernel file that defines it.
        minimum: bytes of the part that is always there; equal to `size` where that is not None.
    """

    name: str
    construct: AnyConstruct
    size: int | None
    source: str
    minimum: int


@dataclass(frozen=True, slots=True)
class Count:
    """A number in a struct that says how much of the rest is in use.

    Attributes:
        field: the number's name.
        offset: where it is, in bytes; it is a u32.
        capacity: largest value that the kernel takes; None for the length of the data.
        entry: bytes of one entry where the length must match the number, else 0.
    """

    field: str
    offset: int
    capacity: int | None
    entry: int = 0


def fixed(name: str, size: int, construct: AnyConstruct, source: str) -> Schema:
    """A struct of one size."""
    return Schema(name, construct, size, source, size)


def fields(kind: AnyConstruct, names: str) -> list[AnyConstruct]:
    """Fields of one type, by their names with blanks between."""
    return [name / kind for name in names.split()]


def raw(name: str, size: int) -> AnyConstruct:
    """Bytes that are kept as they are."""
    field: AnyConstruct = name / Bytes(size)
    return field
