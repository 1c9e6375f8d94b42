"""(saved VM, host profile) -> a verdict for every register and the layouts to write. Pure: nothing is touched.

The plan is made from the prologue, before the pause and before a VM exists: it knows which registers come, not yet
all their values. Each rule is a row with its reason; the first that applies to a register decides.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from migstream.errors import DoesNotFit
from migstream.host.profile import FIXED, HostProfile
from migstream.model import Arch, Layout, Machine, Scope, Slot
from migstream.registers import ids, vcpu_features, x86_64
from migstream.registers.catalogue import Register, lookup

if TYPE_CHECKING:
    from migstream.model import Words

DEVICES: dict[Arch, frozenset[str]] = {
    Arch.X86_64: frozenset(("irqchip", "pit", "tss_address")),
    Arch.ARM64: frozenset(("gic_distributor", "gic_redistributors", "gic_irqs", "its", "vcpu_features")),
}
"""What a machine section may ask a backend to make, in this version; `formats/SPEC.md` says what each value means."""


class Answer(enum.StrEnum):
    """What the plan says of one register."""

    FITS = "fits"
    WRITTEN_AS = "written as"
    SKIPPED = "skipped"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The plan's answer for one register, with its reason.

    Attributes:
        target: the column that is written, None where nothing is.
        reason: "" for a plain fit.
    """

    slot: Slot
    answer: Answer
    target: Slot | None
    reason: str = ""

    @property
    def name(self) -> str:
        """The register's name."""
        return lookup(self.slot.id).name

    def __str__(self) -> str:
        return f"{self.name}: {self.answer}{': ' + self.reason if self.reason else ''}"


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

    def fit(self, values: Words) -> Words:
        """Return the matrix for `target`: `values` itself where the layouts are equal."""
        if self.target == self.source:
            return values
        return _convert(self, values)


@dataclass(frozen=True)
class Plan:
    """The ordered steps of a restore, one a layout of the stream, and what stands in its way."""

    steps: tuple[Step, ...]
    obstacles: tuple[str, ...] = field(default=())

    @property
    def verdicts(self) -> list[Verdict]:
        """All registers' verdicts, in restore order."""
        return [verdict for step in self.steps for verdict in step.verdicts]

    @property
    def refusals(self) -> list[str]:
        """Why it can't be done, one line each; empty where it can."""
        refused = [str(v) for v in self.verdicts if v.answer == Answer.REFUSED]
        return [*self.obstacles, *refused]

    def require(self) -> Plan:
        """Return the plan itself. Raises: DoesNotFit with all reasons."""
        if self.refusals:
            raise DoesNotFit(self.refusals)
        return self


def make_plan(machine: Machine, layouts: Sequence[Layout], host: HostProfile) -> Plan:
    """Judge a saved VM against a host. Never raises for what doesn't fit: ask `refusals` or call `require()`."""
    obstacles = tuple(reason for rule in _MACHINE_RULES if (reason := rule(machine, host)))
    if machine.arch != host.arch:
        return Plan((), obstacles)
    if machine.arch == Arch.ARM64 and not obstacles:
        host = host.with_features(machine.devices.get("vcpu_features", vcpu_features.DEFAULT))
    return Plan(tuple(_step(layout, host) for layout in layouts), obstacles)


def scope_notes(layouts: Sequence[Layout], host: HostProfile) -> list[str]:
    """Registers whose scope in the stream is not what an experiment found on this host, a line each.

    They are written as the stream says. Saved once a VM: through one vCPU, and a host that keeps it for each gives the
    others its default. Saved for each vCPU: as often, the last one wins.
    """
    known = {**host.scopes, **host.feature_scopes}
    return [_SCOPE_NOTES[layout.scope].format(name=lookup(slot.id).name)
            for layout in layouts for slot in layout.slots
            if known.get(slot.id, FIXED) not in (FIXED, layout.scope)]


_SCOPE_NOTES = {
    Scope.VM: "{name}: saved once a VM; this kernel keeps it for each vCPU (by experiment): only vCPU 0 gets it",
    Scope.VCPU: "{name}: saved for each vCPU; this kernel keeps it once a VM (by experiment): the last vCPU's stays",
}


def _step(layout: Layout, host: HostProfile) -> Step:
    verdicts = tuple(_judge(slot, host) for slot in layout.slots)
    targets = tuple(v.target for v in verdicts if v.target is not None)
    if targets == layout.slots:
        return Step(layout, layout, verdicts)
    return Step(layout, Layout(layout.scope, layout.phase, targets) if targets else None, verdicts)


def _judge(slot: Slot, host: HostProfile) -> Verdict:
    row = lookup(slot.id)
    for rule in _RULES:
        verdict = rule(slot, row, host)
        if verdict is not None:
            return verdict
    return Verdict(slot, Answer.FITS, slot)


def _refuse(slot: Slot, reason: str) -> Verdict:
    return Verdict(slot, Answer.REFUSED, None, reason)


def _unknown(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    if row.known or ids.msr_index(slot.id) is not None or slot.id in host.listed:
        return None
    return _refuse(slot, "no row in the catalogue; a newer migstream may know how to write it")


def _written_by_clock_step(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    """TSC offsets need both hosts' clocks; `transport` writes them where the vCPUs' offsets differ."""
    if slot.id != x86_64.TSC_OFFSET.id:
        return None
    return Verdict(slot, Answer.SKIPPED, None, "relative to one host's TSC; MSR_IA32_TSC restores the guest's")


def _as_sregs(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    if slot.id != x86_64.SREGS2.id or host.capabilities.get("SREGS2"):
        return None
    return Verdict(slot, Answer.WRITTEN_AS, Slot(x86_64.SREGS.id, 312), "KVM_SREGS: this kernel has no KVM_CAP_SREGS2")


def _xsave_size(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    size = host.sizes.get(slot.id, 0)
    if slot.id != x86_64.XSAVE.id or size == slot.size or not host.capabilities.get("XSAVE"):
        return None
    if size < slot.size:
        return _refuse(slot, f"{slot.size} bytes of XSAVE components, this host has {size}")
    return Verdict(slot, Answer.WRITTEN_AS, Slot(slot.id, size),
                   f"{size} bytes: the host's further components start out unused")


def _capability(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    if not row.needs or host.capabilities.get(row.needs):
        return None
    return _refuse(slot, f"this kernel has no KVM_CAP_{row.needs}")


def _listed_msr(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    index = ids.msr_index(slot.id)
    if index is None or index in host.msrs or index in host.feature_msrs:
        return None
    return _refuse(slot, "this kernel does not list the MSR")


def _unlisted(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    if not host.registers or slot.id >> 56 == ids.OURS or slot.id in host.listed:
        return None
    needed = [name for mask, changed in host.feature_registers.items() if slot.id in changed
              for name in vcpu_features.names(mask & ~vcpu_features.DEFAULT)]
    where = f" for a vCPU like this; it depends on {' and '.join(needed)}" if needed else ""
    return _refuse(slot, f"this kernel does not list the register{where}")


def _other_size(slot: Slot, row: Register, host: HostProfile) -> Verdict | None:
    size = ids.size_in_id(slot.id)
    if size is None or size == slot.size:
        return None
    return _refuse(slot, f"{slot.size} bytes for a register of {size}: KVM would read or write past its value")


_Rule = Callable[[Slot, Register, HostProfile], Verdict | None]

_RULES: tuple[_Rule, ...] = (_written_by_clock_step, _other_size, _unlisted, _unknown, _as_sregs, _xsave_size,
                             _capability, _listed_msr)
"""In order: exceptions that say how before the general rules that say no."""


def _other_arch(machine: Machine, host: HostProfile) -> str:
    return "" if machine.arch == host.arch else f"the stream is {machine.arch.label}, this host is {host.arch.label}"


def _too_many_vcpus(machine: Machine, host: HostProfile) -> str:
    return "" if machine.vcpus <= host.max_vcpus else f"{machine.vcpus} vCPUs; this kernel allows {host.max_vcpus}"


def _unknown_device(machine: Machine, host: HostProfile) -> str:
    unknown = sorted(machine.devices.keys() - DEVICES[machine.arch])
    return f"device {unknown[0]!r} is not known to this migstream" if unknown else ""


def _device_value(machine: Machine, host: HostProfile) -> str:
    bad = [name for name, value in machine.devices.items() if not isinstance(value, int) or not 0 <= value < 1 << 63]
    return f"device {bad[0]!r} has a value that is no address, number or flag" if bad else ""


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
    missing = sorted(wanted[name] for name in devices & wanted.keys() if host.devices)
    missing = [name for name in missing if name not in host.devices]
    return f"this kernel can't make a device {missing[0]}" if missing else ""


_MACHINE_RULES = (_other_arch, _too_many_vcpus, _unknown_device, _device_value, _vcpu_features, _gic)


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
        if verdict.target.id != verdict.slot.id:
            words = _SHARED_WORDS[verdict.slot.id, verdict.target.id]
        out[:, target:target + words] = values[:, source:source + words]
    return out


_SHARED_WORDS = {(x86_64.SREGS2.id, x86_64.SREGS.id): 35}
"""64-bit words that two structs share from their start: segments, tables and control registers up to apic_base.
KVM_SREGS ends with an interrupt bitmap (unused with an interrupt chip in the kernel) where KVM_SREGS2 has flags and
PDPTRs; a guest in PAE mode gets its PDPTRs from memory then, as on every kernel before 5.14."""
