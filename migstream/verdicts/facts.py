"""What rules ask: of the saved guest, of the host, of both together. Each question is one small function.

A question about values that are not known yet raises `NotYet`; the judge then gives the answer again at the pause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property

from migstream.host.behaviour import of_profile, unlike
from migstream.host.profile import HostProfile
from migstream.model import Arch, Slot
from migstream.registers import arm64 as arm64_rows
from migstream.registers import gic, ids, vcpu_features
from migstream.registers.bit_tables import BITS
from migstream.registers.bits import Field
from migstream.registers.catalogue import Register, lookup
from migstream.verdicts.model import Column, Saved

NEVER_WRITTEN = 0x1DE7_EC7E_DBAD_C0DE
"""What arm64 KVM resets a register to whose value after reset is UNKNOWN (sys_regs.c, reset_unknown)."""


class NotYet(Exception):
    """The answer depends on a value that comes with the pause."""


class Pair:
    """A saved guest and a host: what does not depend on a single register."""

    def __init__(self, saved: Saved, host: HostProfile) -> None:
        self.saved, self.arch = saved, saved.machine.arch
        self.features = int(saved.machine.devices.get("vcpu_features", vcpu_features.DEFAULT)) \
            if self.arch == Arch.ARM64 else 0
        self.host = host.with_features(self.features) if self.arch == Arch.ARM64 else host

    def knowing(self, columns: Mapping[int, Column]) -> Pair:
        """The same with other values: what is the host's is taken over."""
        other = copy(self)
        other.saved = replace(self.saved, columns=columns)
        other.host_behaves_as, other.host_unlike = self.host_behaves_as, self.host_unlike  # once a host
        return other

    def with_value(self, slot: Slot, value: bytes) -> Pair:
        """The same where a register has one value on all vCPUs."""
        return self.knowing({**self.saved.columns, slot.id: Column.of(slot, value)})

    def column(self, id: int) -> Column:
        """The values of a register; without values where they come later. Raises: NotYet, KeyError if not saved."""
        found = self.saved.columns.get(id)
        if found is not None:
            return found
        if id in self._slots:
            raise NotYet
        raise KeyError(id)

    @cached_property
    def msrs(self) -> frozenset[int]:
        """MSRs that the host lists."""
        return frozenset(self.host.msrs)

    @cached_property
    def _slots(self) -> dict[int, Slot]:
        return {slot.id: slot for layout in self.saved.layouts for slot in layout.slots}

    @cached_property
    def host_behaves_as(self) -> Mapping[int, bytes]:
        """What the host behaves as where it has no register, as far as its profile was told by a guest."""
        return of_profile(self.host).behaves_as

    @cached_property
    def host_unlike(self) -> Mapping[int, int]:
        """arm64: what guests of the host read otherwise than KVM_GET_ONE_REG has it."""
        return unlike(self.host)

    def default(self, id: int) -> int | None:
        """The value that a fresh vCPU with the guest's features has on the host; None where nobody has recorded it."""
        needed = vcpu_features.DEPENDENT.get(lookup(id).name, 0)
        wide = needed & self.features or id not in self.host.defaults
        value = (self.host.feature_defaults.get(id) if wide else None) or self.host.defaults.get(id) \
            or self.host.attributes.get(id)
        return None if value is None else int.from_bytes(value, "little")

    def bits(self, id: int) -> tuple[int, int] | None:
        """(bits of the default that the host takes flipped, those of them that read back so); None if not tried."""
        needed = vcpu_features.DEPENDENT.get(lookup(id).name, 0)
        pair = (self.host.feature_bits.get(id) if needed & self.features else None) or self.host.register_bits.get(id)
        if pair is not None:
            return int.from_bytes(pair[0], "little"), int.from_bytes(pair[1], "little")
        index = ids.msr_index(id)
        return self.host.msr_bits.get(index) if index is not None else None


class Case:
    """One register of a pair."""

    def __init__(self, pair: Pair, slot: Slot) -> None:
        self.pair, self.slot, self.host = pair, slot, pair.host
        self.row: Register = lookup(slot.id)
        self.asked = False

    @property
    def known(self) -> Column:
        """The register's values. Raises: NotYet."""
        return self.pair.column(self.slot.id)

    def with_value(self, number: int) -> Case:
        """The same register with another value."""
        return Case(self.pair.with_value(self.slot, number.to_bytes(self.slot.size, "little")), self.slot)

    @property
    def default(self) -> int | None:
        """The host's own."""
        return self.pair.default(self.slot.id)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """Named fields of the register."""
        return BITS.get(self.row.bits, ())

    @property
    def listed(self) -> bool:
        """Whether the host has the register for a vCPU like the guest's; True where the profile has no list."""
        if self.slot.id >> 56 == ids.OURS:
            return not self.row.needs or bool(self.host.capabilities.get(self.row.needs))
        index = ids.msr_index(self.slot.id)
        if index is not None:
            return index in self.pair.msrs or index in self.host.feature_msrs
        return not self.host.registers or self.slot.id in self.host.listed

    def field_of(self, register: str, name: str) -> int | None:
        """The guest's value of a field of another register (the largest of its vCPUs); None where it isn't saved."""
        id = BY_NAME[register]
        try:
            column = self.pair.column(id)
        except KeyError:
            return None
        field = next(field for field in BITS[lookup(id).bits] if field.name == name)
        return max((number & field.mask) >> field.low for number in column.numbers)


BY_NAME: dict[str, int] = {
    **{row.name: row.id for row in arm64_rows.ROWS},
    "GICD_IIDR": ids.attribute_id(gic.GICV3, gic.DISTRIBUTOR, 8),
}
"""Ids of arm64 registers, by name."""

Condition = Callable[[Case], bool]


# Conditions: each is one question with a yes or no. Rows combine them.


def absent(case: Case) -> bool:
    """The host does not have the register."""
    return not case.listed


def value(number: int) -> Condition:
    """All vCPUs have this value."""
    return lambda case: case.known.only(number)


def bits_clear(mask: int) -> Condition:
    """None of these bits is set on any vCPU."""
    return lambda case: not any(number & mask for number in case.known.numbers)


def no_feature(mask: int) -> Condition:
    """The guest's vCPUs are without a vCPU feature."""
    return lambda case: not case.pair.features & mask


def guest_lacks(register: str, field: str) -> Condition:
    """The guest's own ID register says that it has no such thing; a kernel without the field said so, too."""
    return lambda case: not case.field_of(register, field)


def saved_with(register: str, condition: Condition) -> Condition:
    """A condition on another register of the same guest; true where the guest has none."""
    def ask(case: Case) -> bool:
        other = Case(case.pair, Slot(BY_NAME[register], 8))
        try:
            return condition(other)
        except KeyError:
            return True
    return ask


def differs(case: Case) -> bool:
    """Some vCPU has another value than a fresh one on the host."""
    return case.default is not None and bool(case.known.differing(case.default))


def constant(case: Case) -> bool:
    """The host lets no bit of the register be changed."""
    bits = case.pair.bits(case.slot.id)
    return bits is not None and bits[0] == 0


def loses_bits(case: Case) -> bool:
    """The host takes the value, and some bits of it read back as the host's own."""
    bits, default = case.pair.bits(case.slot.id), case.default
    return bits is not None and default is not None and bool(case.known.differing(default) & bits[0] & ~bits[1])


def refuses_bits(case: Case) -> bool:
    """A bit differs from the host's default that the host lets nobody change."""
    bits, default = case.pair.bits(case.slot.id), case.default
    return bits is not None and default is not None and bool(case.known.differing(default) & ~bits[0])


def above_default(case: Case) -> bool:
    """Some vCPU's value is above the host's own."""
    return case.default is not None and max(case.known.numbers) > case.default


def lacks(capability: str) -> Condition:
    """The host has no such capability."""
    return lambda case: not case.host.capabilities.get(capability)


def both(*conditions: Condition) -> Condition:
    """All of them, asked in this order."""
    return lambda case: all(condition(case) for condition in conditions)
