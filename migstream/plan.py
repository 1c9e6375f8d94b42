"""(saved VM, host profile) -> a verdict for every register and the layouts to write. Pure: nothing is touched.

The plan is made from the prologue, before the pause and before a VM exists: it knows which registers come, and of
the prologue's their values. The rules are in `migstream.verdicts`; what depends on a value that comes with the pause
is judged again then (`Plan.at_the_pause`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from migstream.bounds import within
from migstream.errors import DoesNotFit, UsageError
from migstream.host.profile import HostProfile
from migstream.model import Arch, Bank, Layout, Machine, Phase, Scope
from migstream.registers import vcpu_features, x86_64
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import Pair
from migstream.verdicts.judge import (
    Addition,
    additions,
    caveats,
    deciding,
    judge,
    replace_saved,
    uncounted,
    unexplained,
    unhidden,
    whole,
)
from migstream.verdicts.model import Answer, Saved, Verdict
from migstream.verdicts.policy import NO_POLICY, Policy

if TYPE_CHECKING:
    from migstream.contract import Contract
    from migstream.model import Words

__all__ = ["DEVICES", "Addition", "Answer", "Plan", "Step", "Verdict", "added_bank",
           "check_devices", "make_plan", "plan_for",
           "scope_notes"]

DEVICES: dict[Arch, frozenset[str]] = {
    Arch.X86_64: frozenset(("irqchip", "pit", "tss_address")),
    Arch.ARM64: frozenset(("gic_distributor", "gic_redistributors", "gic_irqs", "its", "vcpu_features")),
}
"""What a machine section may ask a backend to make, in this version; `formats/SPEC.md` says what each value means."""


@dataclass(frozen=True)
class Step:
    """What is written of one layout of the stream.

    Attributes:
        source: the stream's layout. target: the layout that the backend is given; equal to `source` in most cases,
            and then the decoded matrix goes to the kernel as it is. None where nothing of it is written.
    """

    source: Layout
    target: Layout | None
    verdicts: tuple[Verdict, ...]

    @cached_property
    def as_saved(self) -> bool:
        """True where the decoded matrix goes to the kernel as it is."""
        return self.target == self.source and all(v.value is None for v in self.verdicts)

    def fit(self, values: Words) -> Words:
        """Return the matrix for `target`: `values` itself where the layouts are equal."""
        return values if self.as_saved else _convert(self, values)


@dataclass(frozen=True)
class Plan:
    """The ordered steps of a restore, one a layout of the stream, and what stands in its way.

    Attributes:
        additions: feature registers that the saving kernel did not have, written after the prologue.
        notes: warnings, a line each.
        pair: the guest and the host that were judged; None where they are of two architectures.
        came: banks since the pause: what came with one may decide of what comes with another.
        foreseen: values of pending registers that were judged and fit as they are, by layout (`foresee`).
    """

    steps: tuple[Step, ...]
    obstacles: tuple[str, ...] = field(default=())
    additions: tuple[Addition, ...] = ()
    notes: tuple[str, ...] = ()
    pair: Pair | None = None
    policy: Policy = NO_POLICY
    came: list[Bank] = field(default_factory=list, compare=False, repr=False)
    foreseen: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """All registers' verdicts, in restore order; additions last."""
        return [*(verdict for step in self.steps for verdict in step.verdicts),
                *(addition.verdict for addition in self.additions)]

    @cached_property
    def refusals(self) -> list[str]:
        """Why it can't be done, one line each, what is refused first; empty where it can."""
        bad = [v for v in self.verdicts if v.stands_in_the_way]
        return [*self.obstacles, *(str(v) for v in sorted(bad, key=lambda v: v.answer != Answer.REFUSED))]

    def require(self) -> Plan:
        """Return the plan itself. Raises: DoesNotFit with all reasons."""
        if self.refusals:
            raise DoesNotFit(self.refusals)
        return self

    def at_the_pause(self, number: int, bank: Bank) -> Step:
        """The step for a bank of layout `number`, whose values are known now: pending verdicts are given again.

        Raises: DoesNotFit.
        """
        step = self.steps[number]
        self.came.append(bank)
        if not bank.update and self._is_foreseen(number, bank):
            return step
        again = [bank.update or v.pending for v in step.verdicts]
        if self.pair is None or not any(again):
            return step
        columns = {**self.pair.saved.columns, **Saved.of(self.pair.saved.machine, (), self.came).columns}
        pair = self.pair.knowing(columns)
        verdicts = tuple(self.policy.apply(pair, judge(pair, v.slot)) if late else v
                         for late, v in zip(again, step.verdicts, strict=True))
        if lost := [v for v in verdicts if v.pending and v.target is None]:
            raise DoesNotFit([f"{v}; what decides that comes later in the stream" for v in lost])
        now = Plan((_step(step.source, verdicts),)).require().steps[0]
        if bank.update and now.target != step.target:
            changed = next(v for old, v in zip(step.verdicts, verdicts, strict=True) if old.target != v.target)
            raise DoesNotFit([f"{changed}; it was another value in the prologue"])
        return now

    def foresee(self, number: int, bank: Bank) -> None:
        """Judge values that may come with the pause, as a fresh vCPU has: if they do, it is not done again then.

        Only an answer that no other late value can change is kept. It stands for every value that rules do not
        tell from it (`judge.deciding`); with a policy, which may ask for more, for that value alone.

        Raises: DoesNotFit, PolicyError.
        """
        step = self.steps[number]
        now = Plan(self.steps, pair=self.pair, policy=self.policy).at_the_pause(number, bank)
        columns = [column for column, v in enumerate(step.verdicts) if v.pending]
        if columns and now.as_saved and step.as_saved and not any(now.verdicts[c].pending or now.verdicts[c].reason
                                                                  for c in columns):
            assert self.pair is not None
            self.foreseen[number] = b"".join(self._alike(self.pair, bank, column) for column in columns)

    def _alike(self, pair: Pair, bank: Bank, column: int) -> bytes:
        """The bounds of the values of a column that get the verdict of the bank's first row."""
        slot, start = bank.layout.slots[column], bank.layout.offsets[column]
        questions = whole(slot) if self.policy.clauses else deciding(pair.host, slot)
        return b"".join(asked.like(int(bank.values[0, start + asked.word]), start) for asked in questions)

    def bounds(self, number: int) -> bytes | None:
        """What a bank's values must be within, for its step to be as planned; None where it must be judged then."""
        pending = any(v.pending for v in self.steps[number].verdicts)
        return self.foreseen.get(number) if pending else b""

    def _is_foreseen(self, number: int, bank: Bank) -> bool:
        """Whether all pending registers have the values that were judged before, on all vCPUs."""
        known = self.foreseen.get(number)
        return known is not None and within(bank.values, known)

    @cached_property
    def in_the_pause(self) -> dict[int, Step]:
        """The steps of the layouts whose values come with the pause, by number."""
        return {number: step for number, step in enumerate(self.steps) if not step.source.phase.prologue}


def make_plan(machine: Machine, layouts: Sequence[Layout], host: HostProfile, *, banks: Sequence[Bank] = (),
              contract: Contract | None = None, policy: Policy = NO_POLICY) -> Plan:
    """Judge a saved VM against a host. Never raises for what doesn't fit: ask `refusals` or call `require()`.

    Args:
        machine, layouts: of the stream. host: what the target offers.
        banks: values that are known: a stream's prologue, or all of it.
        contract: what the guest was promised by a kernel that lacked registers.
        policy: the operator's.

    Raises: PolicyError where the policy lets a guest notice something without saying so.
    """
    return plan_for(Saved.of(machine, layouts, banks, contract), host, policy)


def plan_for(saved: Saved, host: HostProfile, policy: Policy = NO_POLICY) -> Plan:
    """The same for a guest whose values are collected already. Raises: PolicyError."""
    if other := _other_arch(saved.machine, host):
        return Plan((), (other,), policy=policy)
    obstacles = tuple(reason for rule in _MACHINE_RULES if (reason := rule(saved.machine, host)))
    if bad := _bad_values(saved.machine):
        sound = {name: value for name, value in saved.machine.devices.items() if name not in bad}
        saved = replace(saved, machine=replace(saved.machine, devices=sound))
    pair = Pair(saved, host)
    steps = tuple(_step(layout, tuple(policy.apply(pair, judge(pair, slot)) for slot in layout.slots))
                  for layout in saved.layouts)
    added = tuple(_overruled(one, pair, policy) for one in (*additions(pair), *unhidden(pair)))
    return Plan(steps, obstacles, added, (*caveats(pair), *uncounted(pair), *unexplained(pair)), pair, policy)


def _overruled(one: Addition, pair: Pair, policy: Policy) -> Addition:
    """An addition as the policy wants it; its value is the contract's, not a bank's."""
    if not policy.clauses:
        return one
    assert pair.saved.contract is not None
    promised = replace_saved(pair, one.slot.id, pair.saved.contract.behaves_as[one.slot.id])
    return replace(one, verdict=policy.apply(promised, one.verdict))


def scope_notes(layouts: Sequence[Layout], host: HostProfile) -> list[str]:
    """Registers whose scope in the stream is not this host's (`HostProfile.known_scopes`), a line each.

    They are written as the stream says. Saved once a VM: through one vCPU, and a host that keeps it for each gives the
    others its default. Saved for each vCPU: as often, the last one wins.
    """
    known, how = host.known_scopes, "it says so" if host.says_scope else "by experiment"
    return [_SCOPE_NOTES[layout.scope].format(name=lookup(slot.id).name, how=how)
            for layout in layouts for slot in layout.slots
            if known.get(slot.id, layout.scope) != layout.scope]


_SCOPE_NOTES = {
    Scope.VM: "{name}: saved once a VM; this kernel keeps it for each vCPU ({how}): only vCPU 0 gets it",
    Scope.VCPU: "{name}: saved for each vCPU; this kernel keeps it once a VM ({how}): the last vCPU's stays",
}


def _step(layout: Layout, verdicts: tuple[Verdict, ...]) -> Step:
    targets = tuple(v.target for v in verdicts if v.target is not None)
    if targets == layout.slots:
        return Step(layout, layout, verdicts)
    return Step(layout, Layout(layout.scope, layout.phase, targets) if targets else None, verdicts)


def added_bank(added: Sequence[Addition], scope: Scope, vcpus: int) -> tuple[Step, Bank] | None:
    """What `Plan.additions` of one scope are written with; None where there is nothing to write."""
    import numpy as np

    wanted = [one.verdict for one in added if one.scope == scope and one.verdict.target]
    if not wanted:
        return None
    layout = Layout(scope, Phase.FEATURE, tuple(v.slot for v in wanted))
    row = np.frombuffer(b"".join((v.value or b"").ljust(v.slot.words * 8, b"\0") for v in wanted), np.uint64)
    values = np.tile(row, (vcpus if scope == Scope.VCPU else 1, 1))
    plain = tuple(replace(v, value=None) for v in wanted)
    return Step(layout, layout, plain), Bank(layout, 0, values)


def _other_arch(machine: Machine, host: HostProfile) -> str:
    if machine.arch == host.arch:
        return ""
    there = machine.arch.label
    hint = f"; `migstream host list` names simulated ones, sim:{there}-…" if host.backend.startswith("sim:") else ""
    return f"the stream is {there}, this host is {host.arch.label}{hint}"


def _too_many_vcpus(machine: Machine, host: HostProfile) -> str:
    return "" if machine.vcpus <= host.max_vcpus else f"{machine.vcpus} vCPUs; this kernel allows {host.max_vcpus}"


def _unknown_device(machine: Machine, host: HostProfile) -> str:
    unknown = sorted(machine.devices.keys() - DEVICES[machine.arch])
    return f"device {unknown[0]!r} is not known to this migstream" if unknown else ""


def _bad_values(machine: Machine) -> list[str]:
    return [name for name, value in machine.devices.items() if not isinstance(value, int) or not 0 <= value < 1 << 63]


def _device_value(machine: Machine, host: HostProfile) -> str:
    bad = _bad_values(machine)
    return f"device {bad[0]!r} has a value that is no address, number or flag" if bad else ""


def check_devices(machine: Machine) -> None:
    """Raises: UsageError for a device value that no backend can be given."""
    if bad := _bad_values(machine):
        raise UsageError(f"device {bad[0]!r}: {machine.devices[bad[0]]!r:.60} is no address, number or flag")


def _vcpu_features(machine: Machine, host: HostProfile) -> str:
    """A vCPU without a feature that its guest uses stops at the first instruction of it."""
    if machine.arch != Arch.ARM64 or _device_value(machine, host):
        return ""
    missing = machine.devices.get("vcpu_features", vcpu_features.DEFAULT) & ~host.vcpu_features
    return f"this kernel has no vCPU feature {', '.join(vcpu_features.names(missing))}" if missing else ""


def _gic(machine: Machine, host: HostProfile) -> str:
    """The interrupt controller is one device with two addresses; the ITS hangs on it."""
    gic, devices = ("gic_distributor", "gic_redistributors"), machine.devices.keys()
    if 0 < len(devices & {*gic}) < 2:
        return f"a GICv3 needs both of {' and '.join(gic)}"
    if devices & {"its", "gic_irqs"} and not devices & {*gic}:
        return f"{min(devices & {'its', 'gic_irqs'})} without a GICv3"
    wanted = {"gic_distributor": "gicv3", "its": "its"}
    missing = sorted(wanted[name] for name in devices & wanted.keys() if wanted[name] not in host.devices)
    return f"this kernel can't make a device {missing[0]}" if missing else ""


_MACHINE_RULES = (_too_many_vcpus, _unknown_device, _device_value, _vcpu_features, _gic)


def _convert(step: Step, values: Words) -> Words:
    """Copy the written columns into the target layout. A longer target is zero past the value: its initial state."""
    import numpy as np

    assert step.target is not None
    out = np.zeros((len(values), step.target.row_words), np.uint64)
    written = [(column, v) for column, v in enumerate(step.verdicts) if v.target is not None]
    for place, (column, verdict) in enumerate(written):
        source, target = step.source.offsets[column], step.target.offsets[place]
        assert verdict.target is not None
        words = verdict.slot.words
        if verdict.value is not None:
            out[:, target:target + words] = np.frombuffer(verdict.value.ljust(words * 8, b"\0"), np.uint64)
            continue
        if verdict.target.id != verdict.slot.id:
            words = _SHARED_WORDS[verdict.slot.id, verdict.target.id]
        words = min(words, verdict.target.words)
        out[:, target:target + words] = values[:, source:source + words]
    return out


_SHARED_WORDS = {(x86_64.SREGS2.id, x86_64.SREGS.id): 35}
"""64-bit words that two structs share from their start: segments, tables and control registers up to apic_base.
KVM_SREGS ends with an interrupt bitmap (unused with an interrupt chip in the kernel) where KVM_SREGS2 has flags and
PDPTRs; a guest in PAE mode gets its PDPTRs from memory then, as on every kernel before 5.14."""
