"""What a restore has written so far, kept for read-back and for settling refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from migstream.model import Bank, Layout
from migstream.plan import Step

if TYPE_CHECKING:
    from migstream.model import Words


@dataclass(frozen=True)
class Written:
    """A bank, the plan's step for it, and the matrix that was written (None where nothing was)."""

    step: Step
    target: Layout
    bank: Bank
    values: Words | None

    def column(self, id: int) -> Words | None:
        """The saved values of a register, vCPU by word; None where this bank doesn't have it."""
        place = self.bank.layout.index.get(id)
        return None if place is None else self.bank.values[:, columns(self.bank.layout, place)]


def columns(layout: Layout, column: int) -> slice:
    """The words of one column in a row."""
    return slice(layout.offsets[column], layout.offsets[column + 1])
