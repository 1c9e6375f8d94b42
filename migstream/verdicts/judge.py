"""Gives every register of a saved guest its verdict on a host, and says what has to be written besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from migstream.contract import BASELINE
from migstream.host.baseline_x86_64 import shown
from migstream.host.profile import HostProfile
from migstream.model import Arch, Klass, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import Register, lookup
from migstream.verdicts import arm64 as arm64_rules
from migstream.verdicts import id_fields, seen
from migstream.verdicts import x86_64 as x86_rules
from migstream.verdicts.facts import BY_NAME, Case, NotYet, Pair
from migstream.verdicts.model import Answer, Kernel, Question, Verdict
from migstream.verdicts.rule import Rule

_Exception = Callable[[Slot, Register, HostProfile], Verdict | None]
_Structure = Callable[[Slot, HostProfile], Verdict | None]


def judge(pair: Pair, slot: Slot) -> Verdict:
    """Return the verdict for one register; `pending` where its value comes with the pause."""
    if (fits := _plain_fit(pair.arch, slot)) is not None and Case(pair, slot).listed:
        return fits
    row = lookup(slot.id)
    for exception in _EXCEPTIONS:
        if (verdict := exception(slot, row, pair.host)) is not None:
            return verdict
    if slot.id in _STRUCTURES and (verdict := _STRUCTURES[slot.id](slot, pair.host)) is not None:
        return verdict
    case = Case(pair, slot)
    try:
        return _by_rules(case, row)
    except NotYet:
        return Verdict(slot, Answer.FITS, slot if case.listed else None,
                       "" if case.listed else "not here; whether that is harmless depends on its value", pending=True,
                       kernel=Kernel.TAKES if case.listed else Kernel.REFUSES)


@cache
def _plain_fit(arch: Arch, slot: Slot) -> Verdict | None:
    """The verdict of a register that no row is about but the last, which is for absent ones; None for any other."""
    row = lookup(slot.id)
    if not row.known or _other_size(slot, row, None) or is_id_register(arch, row.name) or slot.id in _STRUCTURES:
        return None
    only_absent = arch == Arch.ARM64 and rules_for(arch, row.name) == (arm64_rules.RULES[-1],)
    return Verdict(slot, Answer.FITS, slot) if only_absent else None


def _by_rules(case: Case, row: Register) -> Verdict:
    if (verdict := _behaves_so(case)) is not None:
        return verdict
    for rule in rules_for(case.pair.arch, row.name):
        if rule.when(case):
            return rule.verdict(case)
    if is_id_register(case.pair.arch, row.name):
        verdict = seen.judge(case) or id_fields.judge(case)
        if verdict is not None:
            return verdict
    return Verdict(case.slot, Answer.FITS, case.slot)


def _behaves_so(case: Case) -> Verdict | None:
    """A register that the host hasn't got, and whose value is what its kernel told a guest that it behaves as."""
    if case.listed:
        return None
    told = case.pair.host_behaves_as.get(case.slot.id)
    if told is None or not case.known.only(int.from_bytes(told, "little")):
        return None
    return Verdict(case.slot, Answer.HARMLESS, None,
                   f"a kernel without the register behaves as {int.from_bytes(told, 'little'):#x}",
                   "profile: what this kernel answered to a guest", kernel=Kernel.REFUSES)


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


def deciding(host: HostProfile, slot: Slot) -> Iterable[Question]:
    """What the verdict on a register goes by: of values with the same answers it is the same."""
    narrow = x86_rules.DECIDING.get(lookup(slot.id).name)
    return narrow(host, slot) if narrow else whole(slot)


def whole(slot: Slot) -> Iterable[Question]:
    """All bits of a value, as `deciding`."""
    return (Question(word) for word in range(slot.words))


# What no value can change: sizes, structures that stand for another.


def _refuse(slot: Slot, reason: str, source: str, kernel: Kernel = Kernel.UNKNOWN) -> Verdict:
    return Verdict(slot, Answer.REFUSED, None, reason, source, kernel=kernel)


def _other_size(slot: Slot, row: Register, host: HostProfile | None) -> Verdict | None:
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


def _as_sregs(slot: Slot, host: HostProfile) -> Verdict | None:
    if host.capabilities.get("SREGS2"):
        return None
    return Verdict(slot, Answer.WRITTEN_AS, Slot(x86_64.SREGS.id, 312), "KVM_SREGS: this kernel has no KVM_CAP_SREGS2",
                   "Linux 5.14, KVM_CAP_SREGS2", kernel=Kernel.REFUSES)


def _longer_xsave(slot: Slot, host: HostProfile) -> Verdict | None:
    size = host.sizes.get(slot.id, 0)
    if size <= slot.size or not host.capabilities.get("XSAVE"):
        return None
    return Verdict(slot, Answer.WRITTEN_AS, Slot(slot.id, size),
                   f"{size} bytes: the host's further components start out unused", "KVM_CAP_XSAVE2",
                   kernel=Kernel.UNKNOWN)


_EXCEPTIONS: tuple[_Exception, ...] = (_other_size, _unknown)
_STRUCTURES: dict[int, _Structure] = {x86_64.SREGS2.id: _as_sregs, x86_64.XSAVE.id: _longer_xsave}


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
    saved = pair.saved.ids
    promised = pair.saved.contract.behaves_as if pair.saved.contract else {}
    for id in sorted((_there(pair) & promised.keys()) - saved):
        row, value = lookup(id), promised[id]
        slot = Slot(id, len(value))
        case = Case(replace_saved(pair, id, value), slot)
        verdict = _by_rules(case, row)
        if verdict.answer == Answer.FITS:
            verdict = Verdict(slot, Answer.WRITTEN_AS, slot, f"{int.from_bytes(value, 'little'):#x}: the saving kernel "
                              "has no such register, and this is what it behaves as",
                              pair.saved.contract.behaviour.how.get(id, "") if pair.saved.contract else "", value)
        yield Addition(verdict, row.scope)


def _there(pair: Pair) -> frozenset[int]:
    """Registers that the host has for a vCPU like the guest's: KVM_GET_REG_LIST, on x86-64 MSRs, feature MSRs too."""
    return pair.host.listed | {ids.msr_id(index) for index in (*pair.msrs, *pair.host.feature_msrs)}


def replace_saved(pair: Pair, id: int, value: bytes) -> Pair:
    """The same pair, with one more register known."""
    return pair.with_value(Slot(id, len(value)), value)


def unhidden(pair: Pair) -> Iterator[Addition]:
    """What neither kernel has a register for, where the target is known to behave otherwise: nothing can hide it."""
    saved = pair.saved.ids
    promised = pair.saved.contract.behaves_as if pair.saved.contract else {}
    for id in sorted((promised.keys() & pair.host_behaves_as.keys()) - saved - _there(pair)):
        value, here = promised[id], pair.host_behaves_as[id]
        if value != here:
            slot = Slot(id, len(value))
            text = (f"the guest's kernel behaved as {int.from_bytes(value, 'little'):#x}, this one as "
                    f"{int.from_bytes(here, 'little'):#x}, and neither has a register to set it")
            yield Addition(Verdict(slot, Answer.NOTICED, None, text, "what both kernels answered to a guest",
                                   kernel=Kernel.REFUSES), lookup(id).scope)


def caveats(pair: Pair) -> Iterator[str]:
    """What the host's profile can't say, a line each."""
    if not pair.host.scopes and not pair.host.says_scope:
        yield "scope from catalogue: this host's profile was captured without the experiment"
    if not pair.host.register_bits and not pair.host.msr_bits:
        yield ("which bits this kernel lets be changed nobody has tried: its profile was captured without the "
               "experiment")


def uncounted(pair: Pair) -> Iterator[str]:
    """A guest of a kernel that could not set its physical counter: it jumps with every move, wherever that goes."""
    clock, physical = BY_NAME["TIMER_CNT"], BY_NAME["PTIMER_CNT"]
    if pair.arch == Arch.ARM64 and clock in pair.saved.ids and physical not in pair.saved.ids:
        yield ("PTIMER_CNT: the stream lacks it: the saving kernel showed the guest its host's own physical counter, "
               "so CNTPCT_EL0 jumps with any move; CNTVCT_EL0 goes on")


def unexplained(pair: Pair) -> Iterator[str]:
    """Feature registers that the host has, the stream lacks and no contract tells of, a warning each.

    Not those that are off by default.
    """
    saved = pair.saved.ids
    contract = pair.saved.contract
    known = contract.behaves_as if contract else {}
    why = "the contract does not pin it" if contract and contract.behaviour.found == BASELINE else \
        "the stream lacks it and nobody asked the saving kernel what it behaves as"
    for id in sorted(_there(pair) - saved - known.keys()):
        row = lookup(id)
        if row.klass == Klass.FEATURE and row.known and (here := _met_here(pair, id)):
            yield f"{row.name}: {why}: the guest meets this kernel's default, {here:#x}"


def _met_here(pair: Pair, id: int) -> int | None:
    """What a guest meets in a register that nobody writes: of a feature MSR, what a vCPU with a CPUID shows."""
    index = ids.msr_index(id)
    return shown(pair.host, index) if index is not None and index in pair.host.feature_msrs else pair.default(id)
