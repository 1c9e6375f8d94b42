"""A kernel's answers against what the rules say of the same stream and that kernel's recorded profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migstream.host.profile import HostProfile
from migstream.model import Bank, Slot
from migstream.reader import StreamReader
from migstream.registers.catalogue import lookup, running
from migstream.verdicts.facts import Pair
from migstream.verdicts.judge import judge
from migstream.verdicts.model import Kernel, Saved


@dataclass(frozen=True)
class Difference:
    """A register whose answer was not what the rules say."""

    register: int
    predicted: Kernel
    answered: str

    def __str__(self) -> str:
        return f"{lookup(self.register).name}: predicted {self.predicted}, the kernel {self.answered}"


@dataclass(frozen=True)
class Outcome:
    """Registers compared (each of each vCPU), how many of them nobody could predict, and the differences."""

    registers: int
    refused: int
    unknown: int
    differences: tuple[Difference, ...]


def compare(reader: StreamReader, banks: list[Bank], host: HostProfile, blind: dict[str, Any]) -> Outcome:
    """Hold one target's blind answers against the rules."""
    assert reader.machine is not None
    pair = Pair(Saved.of(reader.machine, tuple(reader.layouts), banks), host)
    slots = {slot.id: slot for layout in reader.layouts for slot in layout.slots}
    said = {id: judge(pair, slot).kernel for id, slot in slots.items()}
    rows = [(int(id, 16), errno, found) for id, _, errno, found in blind["registers"]]
    differences = dict.fromkeys(d for row in rows if (d := _difference(slots[row[0]], said[row[0]], *row[1:])))
    return Outcome(len(rows), sum(errno != 0 for _, errno, _ in rows),
                   sum(said[id] == Kernel.UNKNOWN for id, _, _ in rows), tuple(differences))


def _difference(slot: Slot, predicted: Kernel, errno: int, found: str) -> Difference | None:
    if predicted == Kernel.UNKNOWN:
        return None
    if errno:
        return None if predicted == Kernel.REFUSES else Difference(slot.id, predicted, f"refused it ({errno})")
    if predicted == Kernel.REFUSES:
        return Difference(slot.id, predicted, "took it")
    dropped = bool(found) and running(slot.id) is None
    if dropped != (predicted == Kernel.DROPS) and running(slot.id) is None:
        return Difference(slot.id, predicted, f"read back {found[:40]}" if dropped else "read it back the same")
    return None


