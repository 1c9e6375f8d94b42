"""Reading and writing one register of many vCPUs, by the tables of rules. The operations are named as KVM's ioctls."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.base import SHORT_COUNT
from migstream.backends.sim import cpuid, rules_cpu, rules_devices, rules_fpu, rules_msrs, rules_svm
from migstream.backends.sim.rules import Refuse, by_register
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Guest, Rows
    from migstream.model import Slot, Words

    Errnos = NDArray[np.int64]

ABSENT = by_register(rules_devices.ABSENT)
REFUSALS = by_register((*cpuid.REFUSALS, *rules_cpu.REFUSALS, *rules_fpu.REFUSALS, *rules_devices.REFUSALS,
                        *rules_svm.REFUSALS))
KEEPS = by_register((*cpuid.KEEPS, *rules_cpu.KEEPS, *rules_fpu.KEEPS, *rules_devices.KEEPS, *rules_svm.KEEPS))
AFTERS = by_register((*cpuid.AFTERS, *rules_cpu.AFTERS, *rules_devices.AFTERS, *rules_svm.AFTERS))
SHOWS = by_register((*cpuid.SHOWS, *rules_cpu.SHOWS, *rules_fpu.SHOWS, *rules_devices.SHOWS, *rules_svm.SHOWS))

_LOW = np.uint64(0xFFFF_FFFF)
_SAME_IOCTL = dict.fromkeys(rules_devices.CHIPS, "IRQCHIP")
_ATTRIBUTE = ids.attribute_id(0, 0, 0) >> 48


def operation(guest: Guest, id: int, verb: str) -> str:
    """Name of the ioctl that reads (`GET`) or writes (`SET`) a register."""
    if ids.msr_index(id) is not None:
        return f"KVM_{verb}_MSRS"
    if id >> 48 == _ATTRIBUTE:
        return f"KVM_{verb}_DEVICE_ATTR"
    if ids.capability_number(id) is not None:
        return "KVM_ENABLE_CAP"
    if id == x86_64.XSAVE.id and verb == "GET" and guest.profile.capabilities.get("XSAVE2"):
        return "KVM_GET_XSAVE2"
    name = lookup(id).name.removeprefix("KVM_")
    return f"KVM_{verb}_{_SAME_IOCTL.get(id, name)}" if lookup(id).struct else f"KVM_{verb}_ONE_REG"


@dataclass(frozen=True, slots=True)
class Column:
    """One register of a bank: how it is read and written on a guest. Errnos are 0 where it went well."""

    slot: Slot

    def read(self, rows: Rows, values: Words) -> Errnos:
        """Fill `values` (zeroed by the caller) and return an errno a row."""
        if no := _missing(rows.guest, self.slot.id):
            return np.full(len(values), no)
        shown = _stored(rows, self.slot.id)
        for rule in SHOWS.get(self.slot.id, ()):
            shown = rule.apply(rows, shown)
        words = min(shown.shape[1], values.shape[1])
        values[:, :words] = shown[:, :words]
        return _no_room(values, self.slot)

    def write(self, rows: Rows, values: Words) -> Errnos:
        """Store what is not refused and return an errno a row."""
        if no := _missing(rows.guest, self.slot.id):
            return np.full(len(values), no)
        refusals = REFUSALS.get(self.slot.id, ())
        late = _judge(tuple(rule for rule in refusals if rule.stored), rows, values)
        errnos = _judge(tuple(rule for rule in refusals if not rule.stored), rows, values)
        good = errnos == 0
        if good.any():
            self._store(rows.where(good), values if good.all() else values[good])
        return np.where(good, late, errnos)

    def _store(self, rows: Rows, values: Words) -> None:
        kept, afters = values, AFTERS.get(self.slot.id, ())
        before = _stored(rows, self.slot.id).copy() if afters else values
        for rule in KEEPS.get(self.slot.id, ()):
            kept = rule.apply(rows, kept)
        rows.put(_place(self.slot.id, values), kept)
        for after in afters:
            after.apply(rows, values, before)


def _judge(rules: tuple[Refuse, ...], rows: Rows, values: Words) -> Errnos:
    """The errno of the first rule that refuses a row."""
    errnos = np.zeros(len(values), np.int64)
    for rule in rules:
        errnos[rule.test(rows, values) & (errnos == 0)] = rule.errno
    return errnos


def _missing(guest: Guest, id: int) -> int:
    """The errno of a register that this VM has not, 0 for one that it has."""
    for rule in ABSENT.get(id, ()):
        if rule.test(guest):
            return rule.errno
    row = lookup(id)
    if id >> 48 == _ATTRIBUTE and not row.known:
        return errno.ENXIO
    needed = bool(row.needs) and not guest.profile.capabilities.get(row.needs)
    return errno.EINVAL if needed or not row.known or not row.struct else 0


def _stored(rows: Rows, id: int) -> Words:
    return rows.get(x86_64.SREGS2.id if id == x86_64.SREGS.id else id)


def _place(id: int, values: Words) -> int:
    """Where a written value goes: both forms of SREGS are one, and an interrupt chip is named by its number."""
    if id in rules_devices.CHIPS:
        return rules_devices.CHIPS[int(values[0, 0] & _LOW)]
    return x86_64.SREGS2.id if id == x86_64.SREGS.id else id


def _no_room(values: Words, slot: Slot) -> Errnos:
    """KVM_GET_CPUID2 into too short an array."""
    if slot.id != cpuid.ID:
        return np.zeros(len(values), np.int64)
    return np.where((values[:, 0] & _LOW) > (slot.size - 8) // 40, errno.E2BIG, 0)


@dataclass(frozen=True, slots=True)
class MsrColumn:
    """One MSR of a bank. KVM gives no errno for it: the count ends there."""

    slot: Slot
    index: int

    def read(self, rows: Rows, values: Words) -> Errnos:
        """See `Column.read`."""
        if rules_msrs.unreadable(rows, self.index):
            return np.full(len(values), SHORT_COUNT)
        values[:, 0] = rules_msrs.show(rows, self.index)
        return np.zeros(len(values), np.int64)

    def write(self, rows: Rows, values: Words) -> Errnos:
        """See `Column.write`."""
        no = rules_msrs.refused(rows, self.index, values[:, 0])
        if not no.all():
            chosen = rows.where(~no)
            kept = rules_msrs.keep(chosen, self.index, values[~no, 0] if no.any() else values[:, 0])
            chosen.put(rules_msrs.storage(self.index), kept[:, np.newaxis])
        return np.where(no | rules_msrs.refused_late(rows, self.index, values[:, 0]), SHORT_COUNT, 0)


@dataclass(frozen=True, slots=True)
class CapabilityColumn:
    """A capability that somebody enabled: told, never asked."""

    slot: Slot
    number: int

    def read(self, rows: Rows, values: Words) -> Errnos:
        """Give what was told, as the start of struct kvm_enable_cap."""
        told = rows.guest.told.get(self.number)
        if told is None:
            return np.full(len(values), errno.ENOENT)
        values[:, :5] = [self.number, *(*told, 0, 0, 0, 0)[:4]]
        return np.zeros(len(values), np.int64)

    def write(self, rows: Rows, values: Words) -> Errnos:
        """KVM_ENABLE_CAP: flags must be 0, and the first argument one that the kernel takes."""
        flags, args = int(values[0, 0]) >> 32, tuple(values[0, 1:5].tolist())
        no = errno.EINVAL if flags else enable(rows.guest, self.number, args)
        return np.full(len(values), no)


def enable(guest: Guest, capability: int, args: tuple[int, ...]) -> int:
    """KVM_ENABLE_CAP on a VM: 0, or EINVAL (kvm_vm_ioctl_enable_cap; `enable_caps` of the profile)."""
    taken = guest.profile.enable_caps.get(capability)
    if taken is None or (*args, 0)[0] & ~taken:
        return errno.EINVAL
    guest.told[capability] = args
    return 0


AnyColumn = Column | MsrColumn | CapabilityColumn


def column(slot: Slot) -> AnyColumn:
    """How a slot of a layout is served."""
    index, capability = ids.msr_index(slot.id), ids.capability_number(slot.id)
    if index is not None:
        return MsrColumn(slot, index)
    return Column(slot) if capability is None else CapabilityColumn(slot, capability)
