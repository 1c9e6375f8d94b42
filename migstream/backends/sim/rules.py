"""What a rule of a simulated kernel is. The rules themselves are tables, in the modules beside this one.

A register of the simulator is its column plus the rows of these tables that name it: `Refuse` says no before anything
is stored, `Keep` says what of a written value is stored, `After` what else a write changes, `Show` what a read gives.
Every check is over the whole column at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Guest, Mask, Rows
    from migstream.model import Words

U64 = (1 << 64) - 1
"""The largest 64-bit word: all bits."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A register that a VM does not have, with the errno of every access.

    Attributes:
        name: in a few words, the condition. registers: ids. test: True where it is absent.
        source: kernel function, or `measured` with what on.
    """

    name: str
    registers: tuple[int, ...]
    errno: int
    test: Callable[[Guest], bool]
    source: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """A value that the kernel refuses.

    Attributes:
        test: the rows that are refused. stored: the kernel checks after it has stored the value.
    """

    name: str
    registers: tuple[int, ...]
    errno: int
    test: Callable[[Rows, Words], Mask]
    source: str
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Keep:
    """What of a written value is stored: `apply` returns it, in new memory or the same."""

    name: str
    registers: tuple[int, ...]
    apply: Callable[[Rows, Words], Words]
    source: str


@dataclass(frozen=True, slots=True)
class After:
    """What a write changes in other registers; `apply` is given the values as written."""

    name: str
    registers: tuple[int, ...]
    apply: Callable[[Rows, Words], None]
    source: str


@dataclass(frozen=True, slots=True)
class Show:
    """What a read gives for the stored value: `apply` returns it, in new memory."""

    name: str
    registers: tuple[int, ...]
    apply: Callable[[Rows, Words], Words]
    source: str


def mask(values: Any) -> Mask:
    """Rows as numpy's truth values, whatever expression they came from."""
    return np.asarray(values, np.bool_)


def bits(values: NDArray[np.uint64], wanted: int) -> Mask:
    """The rows where any of the wanted bits is set."""
    return mask((values & np.uint64(wanted)) != 0)


class _Rule(Protocol):
    @property
    def registers(self) -> tuple[int, ...]:
        """Ids that the rule is about."""


_R = TypeVar("_R", bound=_Rule)


def by_register(rules: Iterable[_R]) -> dict[int, tuple[_R, ...]]:
    """The rules of each register, in the order of the table."""
    out: dict[int, tuple[_R, ...]] = {}
    for rule in rules:
        for id in rule.registers:
            out[id] = (*out.get(id, ()), rule)
    return out
