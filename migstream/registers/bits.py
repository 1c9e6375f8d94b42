"""Fields of a register and the words for what is set in them; the tables are in `bits_x86_64` and `bits_arm64*`.

Tables are written as text, one word a field, because a register's fields are best read in one line:

| word                 | field                                                                              |
|----------------------|------------------------------------------------------------------------------------|
| `31:N`               | a flag                                                                             |
| `0/6:T0SZ`           | six bits from bit 0, a number                                                      |
| `14/2:TG0@4K,64K`    | values have names: 0 is 4K, 1 is 64K                                               |
| `30/2:TG1@1.16K,4K`  | the same, from 1 on; a later `N.` jumps again                                      |
| `16:FP~IMP,FP16`     | signed, as the kernel compares it: 0 is IMP, 1 is FP16 and all ones is NI          |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Field:
    """A flag (width 1) or a number in a register: its lowest bit, its width in bits, names of its values.

    `signed`: the number is in two's complement, and so a bigger one is not always a better one.
    """

    name: str
    low: int
    width: int = 1
    values: Mapping[int, str] = field(default_factory=dict)
    signed: bool = False

    @property
    def mask(self) -> int:
        """The bits that the field covers."""
        return ((1 << self.width) - 1) << self.low

    def show(self, value: int) -> str:
        """`NAME` of a set flag, `NAME=value` of a number; "" for 0, unless that value has a name."""
        number = (value & self.mask) >> self.low
        if self.width == 1 and not self.values:
            return self.name if number else ""
        if number not in self.values:
            return f"{self.name}={self._number(number)}" if number else ""
        return f"{self.name}={self.values[number]}"

    def _number(self, number: int) -> str:
        if self.signed and number >> self.width - 1:
            number -= 1 << self.width
        text = f"{number:#x}" if self.width > 8 else str(number)
        return f"{number:#x}" if text in self.values.values() else text  # ASIDBITS=8 is the name of another value


def flags(names: str) -> tuple[Field, ...]:
    """Flags from `bit:NAME` words."""
    return fields(names)


def fields(words: str, width: int = 1) -> tuple[Field, ...]:
    """Fields from words as in the head of this module; `width` is that of a word that names none."""
    return tuple(_field(word, width) for word in words.split())


def id_fields(words: str) -> tuple[Field, ...]:
    """Fields of an ID register: four bits where the word doesn't say; 1 means IMP where it names no values.

    `#` after the name is a plain number, without names.
    """
    named = ((word if set("@~#") & set(word) else f"{word}@1.IMP") for word in words.split())
    return tuple(_field(word.rstrip("#"), 4) for word in named)


def _field(word: str, width: int) -> Field:
    place, _, rest = word.partition(":")
    low, _, bits = place.partition("/")
    signed = "~" in rest
    name, _, values = rest.partition("~" if signed else "@")
    size = int(bits or width)
    top = {(1 << size) - 1: "NI"} if signed else {}
    return Field(name, int(low), size, top | dict(_values(values)), signed)


def _values(names: str) -> Iterator[tuple[int, str]]:
    number = 0
    for item in filter(None, names.split(",")):
        jump, dot, name = item.partition(".")
        number, name = (int(jump), name) if dot else (number, item)
        yield number, name
        number += 1


def describe(table: tuple[Field, ...], value: int) -> list[str]:
    """What a value says: set flags by name, numbers as `NAME=value`, set bits without a name as `bit N`.

    Numbers wider than eight bits are in hexadecimal; fields that hold 0 are left out, unless 0 has a name.
    """
    shown = [(row.low, row.show(value)) for row in table]
    shown += [(bit, f"bit {bit}") for bit in _unknown(table, value)]
    return [text for _, text in sorted(shown) if text]


def _unknown(table: tuple[Field, ...], value: int) -> Iterator[int]:
    for row in table:
        value &= ~row.mask
    return (bit for bit in range(value.bit_length()) if value >> bit & 1)
