"""What a restore has written so far, kept for read-back and for settling refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from migstream.backends.base import Vm
from migstream.model import Bank, Layout, Phase, Scope
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


def repeats(vm: Vm, layout: Layout, per_vcpu: bool) -> int:
    """How often a layout is read or written: once, unless VM-scoped registers go once for each vCPU on request.

    What a VM is made with is told before there is a vCPU, and once in any case.
    """
    often = per_vcpu and layout.scope == Scope.VM and layout.phase != Phase.CREATE
    return vm.machine.vcpus if often else 1
