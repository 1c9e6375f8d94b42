"""The words of a verdict, and the values that it is about."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from migstream.bounds import bound
from migstream.model import Bank, Layout, Machine, Slot
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.contract import Contract
    from migstream.model import Words


class Answer(enum.StrEnum):
    """What is said of one register, the best first."""

    FITS = "fits"
    WRITTEN_AS = "fits, written as"
    HARMLESS = "absent, harmless because"
    NOTICED = "guest would notice"
    REFUSED = "refused"


class Kernel(enum.StrEnum):
    """What the target's kernel itself would say to the saved value, were it written as it is."""

    TAKES = "takes"          # and reads back the same, but for what runs by itself
    DROPS = "drops"          # no error, and reads back different
    REFUSES = "refuses"
    UNKNOWN = "unknown"      # nobody has tried


@dataclass(frozen=True, slots=True)
class Overruled:
    """What a policy made of a verdict: the word that did, its reason, and the answer as it was before."""

    verb: str
    reason: str
    was: Answer

    def __str__(self) -> str:
        return f"policy, {self.verb}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for one register of a saved guest on one host.

    Attributes:
        slot: the stream's column. answer: see `Answer`.
        target: the column that is written, None where nothing is.
        reason: "" for a plain fit. source: where the reason comes from.
        value: what is written on every vCPU instead of the saved value; None: the saved value.
        kernel: what a write without thinking would meet.
        pending: the answer depends on a value that comes with the pause, and is given again then.
        tolerated: the policy's reason for going on although the guest may notice.
        overruled: what a policy changed; None where it changed nothing.
    """

    slot: Slot
    answer: Answer
    target: Slot | None
    reason: str = ""
    source: str = ""
    value: bytes | None = None
    kernel: Kernel = Kernel.TAKES
    pending: bool = False
    tolerated: str = ""
    overruled: Overruled | None = None

    @property
    def name(self) -> str:
        """The register's name."""
        return lookup(self.slot.id).name

    @property
    def stands_in_the_way(self) -> bool:
        """True where a restore can't go on."""
        return self.answer in (Answer.NOTICED, Answer.REFUSED) and not self.tolerated

    @property
    def loses(self) -> bool:
        """True where the guest may notice and the policy lets it."""
        return self.answer in (Answer.NOTICED, Answer.REFUSED) and bool(self.tolerated)

    def __str__(self) -> str:
        text = f"{self.name}: {self.answer}{': ' if self.answer != Answer.HARMLESS else ' '}{self.reason}"
        return text.rstrip(": ") + (f" ({self.overruled})" if self.overruled else "")


class Question(NamedTuple):
    """A part of a value by which rules tell values apart.

    Attributes:
        word, mask: these bits of this 64-bit word of the value. least, most: all of a range (round the end of the
            numbers where `most` is below `least`) are alike; None where each is another.
    """

    word: int
    mask: int = 2**64 - 1
    least: int | None = None
    most: int | None = None

    def like(self, value: int, start: int) -> bytes:
        """The bound (`bounds.bound`) of what is like a word of this value, in a row whose column begins at `start`."""
        found, least, most = value & self.mask, self.least, self.most
        if least is None or most is None or (found - least) % 2**64 > (most - least) % 2**64:
            least = most = found
        return bound(start + self.word, least, most, mask=self.mask)


class Column:
    """All values of one register of a saved guest, looked at as a whole and never vCPU by vCPU.

    Attributes:
        slot: the column. known: False where the values come with the pause.
    """

    def __init__(self, slot: Slot, parts: Sequence[Words] | None) -> None:
        """`parts` are the column's words of each bank, rows x `slot.words`; None where they are not there yet."""
        self.slot, self._parts = slot, parts

    @classmethod
    def of(cls, slot: Slot, value: bytes) -> Column:
        """A column with one value."""
        import numpy as np

        padded = value.ljust(slot.words * 8, b"\0")
        return cls(slot, [np.frombuffer(padded, np.uint64).reshape(1, slot.words)])

    @property
    def known(self) -> bool:
        """Whether the values are there."""
        return bool(self._parts)

    @cached_property
    def distinct(self) -> tuple[bytes, ...]:
        """Every value once, ascending as bytes; empty where not known."""
        some, every = self._reduced
        if self.known and some == every:
            return (some.to_bytes(self.slot.words * 8, "little")[:self.slot.size],)
        rows = {row for part in self._parts or () for row in _rows(part)}
        return tuple(sorted(row[:self.slot.size] for row in rows))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The same as numbers."""
        return tuple(int.from_bytes(value, "little") for value in self.distinct)

    @cached_property
    def _reduced(self) -> tuple[int, int]:
        """(bits that are 1 on some vCPU, bits that are 1 on all)."""
        import numpy as np

        some = every = None
        for part in self._parts or ():
            here_some, here_every = np.bitwise_or.reduce(part, 0), np.bitwise_and.reduce(part, 0)
            some = here_some if some is None else some | here_some
            every = here_every if every is None else every & here_every
        if some is None or every is None:
            return 0, 0
        return int.from_bytes(some.tobytes(), "little"), int.from_bytes(every.tobytes(), "little")

    def differing(self, value: int) -> int:
        """Bits in which some vCPU's value differs from `value`."""
        some, every = self._reduced
        full = (1 << 8 * self.slot.size) - 1
        return (some & ~value | ~every & value) & full

    def only(self, value: int) -> bool:
        """True where all vCPUs have this value."""
        return self.known and not self.differing(value)


def _rows(part: Words) -> set[bytes]:
    """The distinct rows of a matrix. One that is everywhere the same, as most are, costs one comparison."""
    if len(part) == 1 or bool((part == part[0]).all()):
        return {part[0].tobytes()}
    return {row.tobytes() for row in part}


@dataclass(frozen=True)
class Saved:
    """A saved guest, as far as it is known when it is judged.

    Attributes:
        machine: what to create. layouts: of the whole stream.
        columns: by register id, those whose values are known.
        contract: what its guest was promised.
    """

    machine: Machine
    layouts: tuple[Layout, ...]
    columns: Mapping[int, Column] = field(default_factory=dict)
    contract: Contract | None = None

    @cached_property
    def ids(self) -> frozenset[int]:
        """All registers of the stream, with values or without yet."""
        return frozenset(slot.id for layout in self.layouts for slot in layout.slots)

    @classmethod
    def of(cls, machine: Machine, layouts: Iterable[Layout], banks: Iterable[Bank],
           contract: Contract | None = None) -> Saved:
        """Collect the values of a stream's banks; an update bank takes the place of what it updates."""
        parts: dict[int, list[Words]] = {}
        slots: dict[int, Slot] = {}
        for bank in banks:
            offsets = bank.layout.offsets
            for column, slot in enumerate(bank.layout.slots):
                values = bank.values[:, offsets[column]:offsets[column + 1]]
                known = parts.setdefault(slot.id, [])
                if bank.update:
                    known.clear()
                known.append(values)
                slots[slot.id] = slot
        columns = {id: Column(slots[id], values) for id, values in parts.items()}
        return cls(machine, tuple(layouts), columns, contract)
