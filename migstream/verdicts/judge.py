"""Gives every register of a saved guest its verdict on a host, and says what has to be written besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from migstream.host.profile import HostProfile
from migstream.model import Arch, Klass, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import Register, lookup
from migstream.verdicts import arm64 as arm64_rules
from migstream.verdicts import id_fields
from migstream.verdicts import x86_64 as x86_rules
from migstream.verdicts.facts import Case, NotYet, Pair
from migstream.verdicts.model import Answer, Kernel, Verdict
from migstream.verdicts.rule import Rule

_Exception = Callable[[Slot, Register, HostProfile], Verdict | None]


def judge(pair: Pair, slot: Slot) -> Verdict:
    """Return the verdict for one register; `pending` where its value comes with the pause."""
    row = lookup(slot.id)
    for exception in _EXCEPTIONS:
        if (verdict := exception(slot, row, pair.host)) is not None:
            return verdict
    case = Case(pair, slot)
    try:
        return _by_rules(case, row)
    except NotYet:
        return Verdict(slot, Answer.FITS, slot if case.listed else None,
                       "" if case.listed else "not here; whether that is harmless depends on its value", pending=True,
                       kernel=Kernel.TAKES if case.listed else Kernel.REFUSES)


def _by_rules(case: Case, row: Register) -> Verdict:
    for rule in rules_for(case.pair.arch, row.name):
        if rule.when(case):
            return rule.verdict(case)
    if is_id_register(case.pair.arch, row.name) and (verdict := id_fields.judge(case)) is not None:
        return verdict
    return Verdict(case.slot, Answer.FITS, case.slot)


@cache
def rules_for(arch: Arch, name: str) -> tuple[Rule, ...]:
    """The rows that are about a register, in order."""
    rows = arm64_rules.RULES if arch == Arch.ARM64 else x86_rules.RULES
    return tuple(rule for rule in rows if rule.names(name))


@cache
def is_id_register(arch: Arch, name: str) -> bool:
    """Whether a register is judged field by field."""
    whole = Rule(arm64_rules.ID_REGISTERS, lambda case: True, Answer.FITS, "", "")
    return arch == Arch.ARM64 and whole.names(name)


# What no value can change: sizes, structures that stand for another.


def _refuse(slot: Slot, reason: str, source: str, kernel: Kernel = Kernel.UNKNOWN) -> Verdict:
    return Verdict(slot, Answer.REFUSED, None, reason, source, kernel=kernel)


def _other_size(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    size = ids.size_in_id(slot.id)
    if size is None or size == slot.size:
        return None
    return _refuse(slot, f"{slot.size} bytes for a register of {size}: KVM would read or write past its value",
                   "Documentation/virt/kvm/api.rst, KVM_SET_ONE_REG")


def _unknown(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    if row.known or ids.msr_index(slot.id) is not None or slot.id in host.listed \
            or (host.registers and slot.id >> 56 != ids.OURS):
        return None
    return _refuse(slot, "no row in the catalogue; a newer migstream may know how to write it", "migstream's catalogue")


def _as_sregs(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    if slot.id != x86_64.SREGS2.id or host.capabilities.get("SREGS2"):
        return None
    return Verdict(slot, Answer.WRITTEN_AS, Slot(x86_64.SREGS.id, 312), "KVM_SREGS: this kernel has no KVM_CAP_SREGS2",
                   "Linux 5.14, KVM_CAP_SREGS2", kernel=Kernel.REFUSES)


def _longer_xsave(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    size = host.sizes.get(slot.id, 0)
    if slot.id != x86_64.XSAVE.id or size <= slot.size or not host.capabilities.get("XSAVE"):
        return None
    return Verdict(slot, Answer.WRITTEN_AS, Slot(slot.id, size),
                   f"{size} bytes: the host's further components start out unused", "KVM_CAP_XSAVE2",
                   kernel=Kernel.UNKNOWN)


_EXCEPTIONS: tuple[_Exception, ...] = (_other_size, _unknown, _as_sregs, _longer_xsave)


# What the stream lacks and the host has.


@dataclass(frozen=True)
class Addition:
    """A feature register that the saving kernel did not have, and what is written so that the guest can't tell."""

    verdict: Verdict
    scope: Scope

    @property
    def slot(self) -> Slot:
        """The register."""
        return self.verdict.slot


def additions(pair: Pair) -> Iterator[Addition]:
    """What a fresh VM would show beyond what the guest has met, set to what its kernel behaved as."""
    saved = {slot.id for layout in pair.saved.layouts for slot in layout.slots}
    promised = pair.saved.contract.behaves_as if pair.saved.contract else {}
    for id in sorted((pair.host.listed & promised.keys()) - saved):
        row, value = lookup(id), promised[id]
        slot = Slot(id, len(value))
        case = Case(replace_saved(pair, id, value), slot)
        verdict = _by_rules(case, row)
        if verdict.answer == Answer.FITS:
            verdict = Verdict(slot, Answer.WRITTEN_AS, slot, f"{int.from_bytes(value, 'little'):#x}: the saving kernel "
                              "has no such register, and this is what it behaves as",
                              pair.saved.contract.behaviour.how.get(id, "") if pair.saved.contract else "", value)
        yield Addition(verdict, row.scope)


def replace_saved(pair: Pair, id: int, value: bytes) -> Pair:
    """The same pair, with one more register known."""
    from migstream.verdicts.model import Column

    columns = {**pair.saved.columns, id: Column.of(Slot(id, len(value)), value)}
    return pair.knowing(columns)


def unexplained(pair: Pair) -> Iterator[str]:
    """Feature registers that the host has, the stream lacks and no contract tells of, a warning each.

    Not those that are off by default.
    """
    saved = {slot.id for layout in pair.saved.layouts for slot in layout.slots}
    known = pair.saved.contract.behaves_as if pair.saved.contract else {}
    for id in sorted(pair.host.listed - saved - known.keys()):
        row = lookup(id)
        if row.klass == Klass.FEATURE and row.known and pair.default(id):
            yield (f"{row.name}: the stream lacks it and nobody asked the saving kernel what it behaves as: "
                   f"the guest meets this kernel's default, {pair.default(id):#x}")


