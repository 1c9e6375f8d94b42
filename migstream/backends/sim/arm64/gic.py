"""The interrupt controller of a simulated VM: its registers' rules, and the interrupt lines of a vCPU's own devices.

Sources: arch/arm64/kvm/vgic/vgic-mmio-v3.c and vgic-sys-reg-v3.c; Documentation/virt/kvm/devices/vcpu.rst. Nothing is
delivered to a guest here: interrupts stay pending.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64.guest import Access, Guest
from migstream.backends.sim.arm64.rules import invalid
from migstream.registers import gic, vcpu_features
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Errnos
    from migstream.backends.sim.arm64.its import Its
    from migstream.model import Words

_ALL = (1 << 64) - 1
_REVISION = 0xF << 12


@dataclass(frozen=True, slots=True)
class GicRule:
    """What a register of the interrupt controller keeps.

    Attributes:
        start: value of a new VM. stored: bits that a write changes; the rest stays. same: bits that a write must
            give as they are (EINVAL). why: kernel function.
    """

    start: int
    stored: int
    why: str
    same: int = 0


_PLAIN = GicRule(0, _ALL, "as written")

RULES: dict[str, GicRule] = {
    "GICD_IIDR": GicRule(0x4B00_143B, 0, "vgic_mmio_uaccess_write_v3_misc: the implementer and product are KVM's",
                         same=~_REVISION),
    "GICD_TYPER2": GicRule(0, 0, "vgic_mmio_uaccess_write_v3_misc: only its own value", same=_ALL),
    "GICD_CTLR": GicRule(0x50, 1 << 1, "vgic_mmio_write_v3_misc: group 1 enable; affinity routing and DS are fixed"),
    "GICD_STATUSR": GicRule(0, 0, "not kept"),
    "GICR_STATUSR": GicRule(0, 0, "not kept"),
    "GICR_WAKER": GicRule(0, 0, "not kept"),
    "GICD_IGROUPR": GicRule(0xFFFF_FFFF, 0xFFFF_FFFF, "kvm_vgic_dist_init: group 1"),
    "GICR_IGROUPR0": GicRule(0xFFFF_FFFF, 0xFFFF_FFFF, "kvm_vgic_vcpu_init: group 1"),
    "GICD_ICFGR": GicRule(0, 0xAAAA_AAAA, "vgic_mmio_write_config: the upper bit of each pair"),
    "GICR_ICFGR1": GicRule(0, 0xAAAA_AAAA, "vgic_mmio_write_config: the upper bit of each pair"),
    "GICD_IROUTER": GicRule(0, 0xFF_FFFF, "vgic_mmio_write_irouter: Aff2 to Aff0"),
    "GICD_IPRIORITYR": GicRule(0, 0xF8F8_F8F8, "vgic_mmio_write_priority: VGIC_PRI_BITS is 5"),
    "GICR_IPRIORITYR": GicRule(0, 0xF8F8_F8F8, "vgic_mmio_write_priority: VGIC_PRI_BITS is 5"),
    "GICR_ISENABLER0": GicRule(0xFFFF, 0xFFFF_FFFF, "kvm_vgic_vcpu_init: SGIs are enabled"),
    "GICR_CTLR": GicRule(6, 1, "vgic_mmio_write_v3r_ctlr: LPIs on; IR and CES are shown since 5.19"),
    "GICR_PENDBASER": GicRule(0, _ALL & ~(1 << 62), "vgic_mmio_write_pendbase: PTZ reads 0"),
    "ICC_SRE_EL1": GicRule(7, 0, "set_gic_sre: only its own value", same=_ALL),
    "ICC_CTLR_EL1": GicRule(0x8C00, 0b11, "set_gic_ctlr: EOImode and CBPR; the rest is the host's", same=~0b11),
    "ICC_IGRPEN0_EL1": GicRule(0, 1, "set_gic_grpen0"), "ICC_IGRPEN1_EL1": GicRule(0, 1, "set_gic_grpen1"),
    "ICC_PMR_EL1": GicRule(0, 0xFF, "set_gic_pmr"), "ICC_BPR0_EL1": GicRule(0, 7, "set_gic_bpr0"),
    "ICC_BPR1_EL1": GicRule(0, 7, "set_gic_bpr1"),
}
"""By name, without the number of a run of registers; what is not here is kept as written."""

_OLD_STARTS = {"GICD_IIDR": 0x4B00_043B, "GICR_CTLR": 0}
"""Measured on 5.10: the revision before 5.18's, and no IR and CES."""


def rule(guest: Guest, id: int) -> GicRule:
    """The rule of a register on this kernel."""
    row = gic.access(id)
    assert row is not None
    found = RULES.get(lookup(id).name) or RULES.get(row.name) or RULES.get(row.name.rstrip("0123456789")) or _PLAIN
    old = _OLD_STARTS.get(row.name) if not guest.profile.capabilities.get("ARM_SYSTEM_SUSPEND") else None
    return found if old is None else GicRule(old, found.stored, found.why, found.same)


@dataclass(frozen=True, slots=True)
class GicColumn:
    """A register of the distributor, a redistributor or a CPU interface; stored as the difference from its start."""

    id: int
    rule: GicRule

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_GET_DEVICE_ATTR."""
        values[:, 0] = self._stored(guest, rows)
        return np.zeros(len(values), np.int64)

    def _stored(self, guest: Guest, rows: slice) -> NDArray[np.uint64]:
        return guest.column(self.id)[rows, 0] ^ np.uint64(self.rule.start)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_SET_DEVICE_ATTR; bits that a write only sets were cleared before, so the value is the register's."""
        old, new = self._stored(guest, rows), values[:, 0]
        wrong = (new ^ np.uint64(self.rule.start)) & np.uint64(self.rule.same & 0xFFFF_FFFF if self._half else
                                                               self.rule.same & _ALL) != 0
        stored = np.uint64(self.rule.stored & _ALL)
        kept = old & ~stored | new & stored
        guest.column(self.id)[rows, 0] = np.where(wrong, old, kept) ^ np.uint64(self.rule.start)
        return invalid(wrong)

    @property
    def _half(self) -> bool:
        return lookup(self.id).size == 4


@dataclass(frozen=True, slots=True)
class Ordered:
    """A register that something has to be done before or after: tables in guest RAM are saved or read.

    False of what comes before: EFAULT, they are not in guest RAM.
    """

    column: GicColumn | ItsColumn
    before_read: Callable[[], bool] | None = None
    before_write: Callable[[], bool] | None = None
    after_write: Callable[[], None] | None = None

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `GicColumn.read`."""
        if self.before_read and not self.before_read():
            return np.full(len(values), errno.EFAULT, np.int64)
        return self.column.read(guest, rows, numbers, values)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `GicColumn.write`."""
        if self.before_write and not self.before_write():
            return np.full(len(values), errno.EFAULT, np.int64)
        errnos = self.column.write(guest, rows, numbers, values)
        if self.after_write:
            self.after_write()
        return errnos


@dataclass(frozen=True, slots=True)
class ItsColumn:
    """A register of the ITS, by its offset."""

    its: Its
    offset: int

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_GET_DEVICE_ATTR."""
        values[:, 0] = self.its.read(self.offset)
        return np.zeros(len(values), np.int64)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_SET_DEVICE_ATTR."""
        return invalid(np.array([not self.its.write(self.offset, int(value)) for value in values[:, 0]]))


_FIRST_PPI, _PRIVATE = 16, 32
_DEFAULT_LINES = {gic.VTIMER_IRQ.id: 27, gic.PTIMER_IRQ.id: 30}


@dataclass(frozen=True, slots=True)
class TimerLine:
    """The interrupt of a timer: a PPI of all vCPUs, until the first run (kvm_arm_timer_set_attr)."""

    id: int

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_GET_DEVICE_ATTR of a vCPU."""
        values[:, 0] = guest.notes.get(lookup(self.id).name, _DEFAULT_LINES[self.id])
        return np.zeros(len(values), np.int64)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_SET_DEVICE_ATTR of a vCPU: EINVAL for what is no PPI, then EBUSY."""
        line = int(values[-1, 0]) & 0xFFFF_FFFF
        no = errno.EINVAL if not _FIRST_PPI <= line < _PRIVATE else errno.EBUSY if guest.entered else 0
        if not no:
            guest.notes[lookup(self.id).name] = line
        return np.full(len(values), no, np.int64)


@dataclass(frozen=True, slots=True)
class PmuLine:
    """The interrupt of a PMU, set once; then the PMU is complete (kvm_arm_pmu_v3_set_attr)."""

    id: int

    def _lacks(self, at: Access) -> Errnos:
        return np.where(at.features & vcpu_features.PMU_V3 == 0, errno.ENODEV, 0).astype(np.int64)

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_GET_DEVICE_ATTR of a vCPU: ENXIO before it is set."""
        at = Access(guest, self.id, rows, numbers)
        lines, lacks = guest.column(self.id)[rows, 0], self._lacks(at)
        values[:, 0] = lines
        return np.where(lacks != 0, lacks, np.where(lines == 0, errno.ENXIO, 0))

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_SET_DEVICE_ATTR of a vCPU: a private or shared interrupt that there is; once."""
        at = Access(guest, self.id, rows, numbers)
        lines, old, lacks = values[:, 0] & np.uint64(0xFFFF_FFFF), guest.column(self.id)[rows, 0], self._lacks(at)
        most = int(guest.machine.devices.get("gic_irqs", 64))
        wrong = (lines < _FIRST_PPI) | (lines >= most)
        errnos = np.where(lacks != 0, lacks, np.where(wrong, errno.EINVAL, np.where(old != 0, errno.EBUSY, 0)))
        guest.column(self.id)[rows, 0] = np.where(errnos == 0, lines, old)
        return errnos
