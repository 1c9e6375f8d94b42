"""A row of the rules."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

from migstream.model import Slot
from migstream.registers.bits import describe
from migstream.verdicts.facts import Case, Condition
from migstream.verdicts.model import Answer, Kernel, Verdict


@dataclass(frozen=True)
class Rule:
    """One row: for these registers, where this holds, the answer is this, for this reason.

    Attributes:
        registers: names or globs, with spaces between them.
        when: the condition; it may ask for values.
        reason: text, or what makes it of a case. `{value}`, `{host}`: the guest's and the host's value;
            `{bits}`: names of the guest's bits that the host's value has not.
        source: where that can be read.
        kernel: what a write of the saved value would meet, or what tells it of a case.
        write: for WRITTEN_AS: the value; None where the saved one is not written.
        target: for WRITTEN_AS: another column, as long as the host has the register.
    """

    registers: str
    when: Condition
    answer: Answer
    reason: str | Callable[[Case], str]
    source: str
    kernel: Kernel | Callable[[Case], Kernel] = Kernel.REFUSES
    write: Callable[[Case], int] | None = None
    target: Callable[[Case], Slot] | None = None

    def names(self, register: str) -> bool:
        """Whether the row is about a register of this name."""
        return any(fnmatch.fnmatchcase(register, glob) for glob in self.registers.split())

    def verdict(self, case: Case) -> Verdict:
        """The row's answer, its condition being true. Raises: NotYet."""
        kernel = self.kernel if isinstance(self.kernel, Kernel) else self.kernel(case)
        value = None if self.write is None else self.write(case).to_bytes(case.slot.size, "little")
        written = value is not None or (self.answer == Answer.NOTICED and kernel in (Kernel.TAKES, Kernel.DROPS))
        if self.target is not None:
            return Verdict(case.slot, self.answer, self.target(case), self._text(case), self.source, kernel=kernel)
        return Verdict(case.slot, self.answer, case.slot if written else None, self._text(case), self.source, value,
                       kernel)

    def _text(self, case: Case) -> str:
        if not isinstance(self.reason, str):
            return self.reason(case)
        if "{" not in self.reason:
            return self.reason
        return self.reason.format(value=_shown(case), host="unknown" if case.default is None else f"{case.default:#x}",
                                  bits=", ".join(guest_only(case)) or "nothing")


def _shown(case: Case) -> str:
    numbers = case.known.numbers
    return f"{numbers[0]:#x}" if len(numbers) == 1 else f"{len(numbers)} values from {numbers[0]:#x}"


def guest_only(case: Case) -> list[str]:
    """Names of the bits that some vCPU has and the host's value has not."""
    host = case.default or 0
    return describe(case.fields, case.known.differing(host) & ~host)
