"""The interrupt controller of a simulated VM: its registers' rules, and the interrupt lines of a vCPU's own devices.

Sources: arch/arm64/kvm/vgic/vgic-mmio-v3.c and vgic-sys-reg-v3.c; Documentation/virt/kvm/devices/vcpu.rst. Nothing is
delivered to a guest here: interrupts stay pending.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64.guest import Access, Guest
from migstream.backends.sim.arm64.rules import refused, since
from migstream.registers import gic, ids, vcpu_features
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Errnos, Mask
    from migstream.backends.sim.arm64.its import Its
    from migstream.model import Words

    Column = NDArray[np.uint64]

_ALL, _HALF = (1 << 64) - 1, (1 << 32) - 1
_REVISION = 0xF << 12


@dataclass(frozen=True, slots=True)
class GicRule:
    """What a register of the interrupt controller keeps.

    Attributes:
        start: value of a new VM. stored: bits that a write changes; the rest stays. same: bits that a write must
            give as they are (EINVAL). why: kernel function. keep: what of (VM, vCPUs, values before, values written)
            is stored, where that is no matter of bits. show: what of (VM, vCPUs, values) is read. refuse: where a
            value is refused besides; left: what is stored of one that is refused.
            shared: one for all vCPUs. errno: of what is refused.
    """

    start: int
    stored: int
    why: str
    same: int = 0
    keep: Callable[[Guest, slice, Column, Column], Column] | None = None
    show: Callable[[Guest, slice, Column], Column] | None = None
    refuse: Callable[[Guest, Column, Column], Mask] | None = None
    left: Callable[[Column, Column], Column] | None = None
    shared: bool = False
    errno: int = errno.EINVAL


def _bits(values: Column, low: int, count: int) -> Column:
    return values >> np.uint64(low) & np.uint64((1 << count) - 1)


_PENDING_ZERO = 1 << 62
"""GICR_PENDBASER.PTZ: kept, and read as 0."""

_RESERVED = {"GICR_PENDBASER": 0x1FF << 55 & ~(7 << 56) & ~_PENDING_ZERO | 0xF << 52 | 0xF << 12 | 0x7F,
             "GICR_PROPBASER": 0x1F << 59 | 0xF << 52 | 3 << 5}


def _table_base(name: str) -> Callable[[Guest, slice, Column, Column], Column]:
    """vgic_sanitise_*: outer shareable becomes inner, inner non-cacheable RaWb, outer what is not non-cacheable 0."""
    def keep(guest: Guest, rows: slice, old: Column, new: Column) -> Column:
        share, inner, outer = _bits(new, 10, 2), _bits(new, 7, 3), _bits(new, 56, 3)
        share = np.where(share == 2, 1, share).astype(np.uint64)
        inner = np.where(inner <= 1, 3, inner).astype(np.uint64)
        outer = np.where(outer <= 1, outer, 0).astype(np.uint64)
        fields = np.uint64(3 << 10 | 7 << 7 | 7 << 56)
        out = new & ~fields | share << np.uint64(10) | inner << np.uint64(7) | outer << np.uint64(56)
        return np.where(lpis_on(guest, rows), old, out & ~np.uint64(_RESERVED[name] & _ALL))

    return keep


def lpis_on(guest: Guest, rows: slice) -> Mask:
    """GICR_CTLR.EnableLPIs of some vCPUs."""
    return np.asarray(guest.column(GICR_CTLR)[rows, 0] & np.uint64(1) != 0)


def _without_ptz(guest: Guest, rows: slice, values: Column) -> Column:
    return values & np.uint64(~_PENDING_ZERO & _ALL)


def _revision(guest: Guest, old: Column, new: Column) -> Mask:
    """5.10 knows its own alone; since 5.18 (and before it in 6.1's line) revisions 2 and 3 can be told apart."""
    revision = _bits(new, 12, 4)
    told_apart = np.isin(revision, np.array((2, 3), np.uint64))
    return np.asarray(~told_apart if since(guest.profile, 5, 18) else new != old)


def _with_rev3(guest: Guest, rows: slice, values: Column) -> Column:
    """vgic_mmio_read_v3r_ctlr(): CES and IR where GICD_IIDR's revision is 3 (KVM_VGIC_IMP_REV_3) or above."""
    revision = _bits(guest.column(_GICD_IIDR)[0, 0] ^ np.uint64(rule(guest, _GICD_IIDR).start), 12, 4)
    return values if revision >= 3 else values & np.uint64(~_CES_IR & _ALL)


_CES_IR = 1 << 1 | 1 << 2
_GICD_IIDR = ids.attribute_id(gic.GICV3, gic.DISTRIBUTOR, 8)


def _icc_ctlr_refused(guest: Guest, old: Column, new: Column) -> Mask:
    """Priority and interrupt id bits no more than there are; SEIS and A3V the host's."""
    more = (_bits(new, 8, 3) > _bits(old, 8, 3)) | (_bits(new, 11, 3) > _bits(old, 11, 3))
    return np.asarray(more | (_bits(new ^ old, 14, 2) != 0))


def _icc_ctlr_left(old: Column, new: Column) -> Column:
    """The numbers of bits are stored one after the other, before SEIS and A3V are looked at."""
    priority, number = np.uint64(7 << 8), np.uint64(7 << 11)
    fewer = new & priority <= old & priority
    out = np.where(fewer, old & ~priority | new & priority, old)
    return np.where(fewer & (new & number <= old & number), out & ~number | new & number, out)


def _bpr1_shown(guest: Guest, rows: slice, values: Column) -> Column:
    """With ICC_CTLR_EL1.CBPR it is BPR0 plus 1, at most 7."""
    common = _of(guest, rows, "ICC_CTLR_EL1") & np.uint64(1) != 0
    return np.where(common, np.minimum(_of(guest, rows, "ICC_BPR0_EL1") + np.uint64(1), np.uint64(7)), values)


def _bpr1_kept(guest: Guest, rows: slice, old: Column, new: Column) -> Column:
    common = _of(guest, rows, "ICC_CTLR_EL1") & np.uint64(1) != 0
    return np.where(common, old, new & np.uint64(7))


def _of(guest: Guest, rows: slice, name: str) -> Column:
    id = ICC[name]
    return guest.column(id)[rows, 0] ^ np.uint64(rule(guest, id).start)


ICC = {name: ids.attribute_id(gic.GICV3, gic.CPU_INTERFACE, 3 << 14 | crn << 7 | crm << 3 | op2)
       for name, crn, crm, op2 in (("ICC_CTLR_EL1", 12, 12, 4), ("ICC_BPR0_EL1", 12, 8, 3), ("ICC_BPR1_EL1", 12, 12, 3),
                                   ("ICC_PMR_EL1", 4, 6, 0))}
GICR_CTLR = ids.attribute_id(gic.GICV3, gic.REDISTRIBUTOR, 0)
LEAST_POINTS = {"ICC_BPR0_EL1": 2, "ICC_BPR1_EL1": 3}


def _not_the_timers(guest: Guest, rows: slice, old: Column, new: Column) -> Column:
    """vgic_hw_irq_change_active(): once a vCPU has run, its timers' interrupts are the hardware's."""
    lines = sum(1 << guest.timer_line(n) for n in range(2))
    return np.where(guest.ran[rows], new & np.uint64(~lines & _HALF), new)


def _spi_levels(id: int) -> Callable[[Guest, slice, Column], Column]:
    """vgic_read_irq_line_level_info(): of interrupts that are configured as level."""
    def show(guest: Guest, rows: slice, values: Column) -> Column:
        first = id & 0xFFFF_FFFF
        edges = 0
        for half in (0, 1):
            config = ids.attribute_id(gic.GICV3, gic.DISTRIBUTOR, 0xC00 + first // 4 + 4 * half)
            if gic.access(config):
                word = int(guest.column(config)[0, 0]) ^ rule(guest, config).start
                edges |= sum((word >> 2 * n + 1 & 1) << n for n in range(16)) << 16 * half
        return values & np.uint64(~edges & _HALF)

    return show


BEFORE_INIT = ("GICD_IIDR", "GICD_TYPER2")
"""Registers that are there before KVM_DEV_ARM_VGIC_CTRL_INIT since 6.17: reg_allowed_pre_init()."""

_PLAIN = GicRule(0, _ALL, "as written")

RULES: dict[str, GicRule] = {
    "GICD_IIDR": GicRule(0x4B00_143B, _REVISION, "vgic_mmio_uaccess_write_v3_misc: the implementer and product are "
                         "KVM's", same=~_REVISION, refuse=_revision),
    "GICD_TYPER2": GicRule(0, 0, "vgic_mmio_uaccess_write_v3_misc: only its own value", same=_ALL),
    "GICD_CTLR": GicRule(0x50, 1 << 1, "vgic_mmio_write_v3_misc: group 1 enable; affinity routing and DS are fixed"),
    "GICD_STATUSR": GicRule(_HALF, 0, "vgic_v3_dist_registers: reads as ones, writes are ignored"),
    "GICR_STATUSR": GicRule(0, 0, "vgic_v3_rd_registers: reads as zero"),
    "GICR_WAKER": GicRule(0, 0, "not kept"),
    "GICD_IGROUPR": GicRule(0xFFFF_FFFF, 0xFFFF_FFFF, "kvm_vgic_dist_init: group 1"),
    "GICR_IGROUPR0": GicRule(0xFFFF_FFFF, 0xFFFF_FFFF, "kvm_vgic_vcpu_init: group 1"),
    "GICD_ICFGR": GicRule(0, 0xAAAA_AAAA, "vgic_mmio_write_config: the upper bit of each pair"),
    "GICR_ICFGR1": GicRule(0, 0, "vgic_mmio_write_config: private interrupts are left as they are"),
    "GICD_IROUTER": GicRule(0, 0xFF_FFFF, "vgic_mmio_write_irouter: Aff2 to Aff0"),
    "GICD_IPRIORITYR": GicRule(0, 0xF8F8_F8F8, "vgic_mmio_write_priority: VGIC_PRI_BITS is 5"),
    "GICR_IPRIORITYR": GicRule(0, 0xF8F8_F8F8, "vgic_mmio_write_priority: VGIC_PRI_BITS is 5"),
    "GICR_ISACTIVER0": GicRule(0, _HALF, "vgic_mmio_uaccess_write_sactive", keep=_not_the_timers),
    "GICR_ISENABLER0": GicRule(0xFFFF, 0xFFFF_FFFF, "kvm_vgic_vcpu_init: SGIs are enabled"),
    "GICR_CTLR": GicRule(6, 1, "vgic_mmio_write_v3r_ctlr: LPIs on, where there is an ITS; IR and CES since 5.19",
                         show=_with_rev3),
    "GICR_PENDBASER": GicRule(0, _ALL, "vgic_mmio_write_pendbase: PTZ reads 0", keep=_table_base("GICR_PENDBASER"),
                              show=_without_ptz),
    "GICR_PROPBASER": GicRule(0, _ALL, "vgic_mmio_write_propbase: struct vgic_dist has one",
                              keep=_table_base("GICR_PROPBASER"), shared=True),
    "GICR_LINE_LEVEL": GicRule(0, 0xFFFF_0000, "vgic_write_irq_line_level_info: SGIs have no line"),
    "ICC_SRE_EL1": GicRule(7, 0, "set_gic_sre: SRE has to be set, the rest is not looked at", same=1),
    "ICC_CTLR_EL1": GicRule(0x8C00, 0x3F03, "set_gic_ctlr: EOImode, CBPR, fewer priority and id bits",
                            refuse=_icc_ctlr_refused, left=_icc_ctlr_left),
    "ICC_IGRPEN0_EL1": GicRule(0, 1, "set_gic_grpen0"), "ICC_IGRPEN1_EL1": GicRule(0, 1, "set_gic_grpen1"),
    "ICC_PMR_EL1": GicRule(0, 0xFF, "set_gic_pmr"), "ICC_BPR0_EL1": GicRule(0, 7, "set_gic_bpr0"),
    "ICC_BPR1_EL1": GicRule(0, 7, "set_gic_bpr1", keep=_bpr1_kept, show=_bpr1_shown),
    "ICC_AP0R0_EL1": GicRule(0, _HALF, "set_gic_ap0r"), "ICC_AP1R0_EL1": GicRule(0, _HALF, "set_gic_ap1r"),
}
"""By name, without the number of a run of registers; what is not here is kept as written."""

def rule(guest: Guest, id: int) -> GicRule:
    """The rule of a register on this kernel; it starts as the profile's does, or as the first of its run there."""
    row = gic.access(id)
    assert row is not None
    found = RULES.get(lookup(id).name) or RULES.get(row.name) or RULES.get(row.name.rstrip("0123456789")) or _PLAIN
    known = guest.profile.attributes
    first = ids.attribute_id(row.device, row.group, row.offset + (row.size * gic.PRIVATE_IRQS // row.irqs if row.irqs
                                                                  else 0))
    start = known.get(id) or known.get(first)
    if row.name == "GICR_CTLR" and not guest.has_its:
        found = replace(found, stored=0)
    if row.name == "GICR_PROPBASER" and not guest.has_its:
        start = None  # vgic_its_create() sets it, and profiles are captured with an ITS
    if row.name == "GICD_TYPER2" and since(guest.profile, 6, 17) and guest.vgic and guest.vgic.initialized:
        found = replace(found, errno=errno.EBUSY)  # it could be chosen until then; measured: 7.2
    if row.name == "GICD_LINE_LEVEL":
        found = replace(found, show=_spi_levels(id))
    return found if not start else replace(found, start=int.from_bytes(start, "little"))


@dataclass(frozen=True, slots=True)
class GicColumn:
    """A register of the distributor, a redistributor or a CPU interface; stored as the difference from its start."""

    id: int
    rule: GicRule

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_GET_DEVICE_ATTR."""
        rows = slice(0, 1) if self.rule.shared else rows
        shown = self._stored(guest, rows)
        values[:, 0] = self.rule.show(guest, rows, shown) if self.rule.show else shown
        return np.zeros(len(values), np.int64)

    def _stored(self, guest: Guest, rows: slice) -> NDArray[np.uint64]:
        return guest.column(self.id)[rows, 0] ^ np.uint64(self.rule.start)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_SET_DEVICE_ATTR; bits that a write only sets were cleared before, so the value is the register's."""
        if self.rule.shared and len(values) > 1:
            return np.repeat(self.write(guest, slice(0, 1), numbers[:1], values[-1:]), len(values))
        own, rows = rows, slice(0, 1) if self.rule.shared else rows
        old, new = self._stored(guest, rows), values[:, 0]
        wrong = (new ^ np.uint64(self.rule.start)) & np.uint64(self.rule.same & 0xFFFF_FFFF if self._half else
                                                               self.rule.same & _ALL) != 0
        if self.rule.refuse:
            wrong |= self.rule.refuse(guest, old, new)
        stored = np.uint64(self.rule.stored & _ALL)
        kept = self.rule.keep(guest, own, old, new) if self.rule.keep else old & ~stored | new & stored
        left = self.rule.left(old, new) if self.rule.left else old
        guest.column(self.id)[rows, 0] = np.where(wrong, left, kept) ^ np.uint64(self.rule.start)
        return refused(wrong, self.rule.errno)

    @property
    def _half(self) -> bool:
        return lookup(self.id).size == 4


@dataclass(frozen=True, slots=True)
class Ordered:
    """A register that something has to be done before or after: tables in guest RAM are saved or read.

    What comes before gives an errno.
    """

    column: GicColumn | ItsColumn
    before_read: Callable[[], int] | None = None
    before_write: Callable[[], int] | None = None
    after_write: Callable[[], None] | None = None

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `GicColumn.read`."""
        if self.before_read and (no := self.before_read()):
            return np.full(len(values), no, np.int64)
        return self.column.read(guest, rows, numbers, values)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `GicColumn.write`."""
        if self.before_write and (no := self.before_write()):
            return np.full(len(values), no, np.int64)
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
        return np.array([self.its.write(self.offset, int(value)) for value in values[:, 0]], np.int64)


_FIRST_PPI, _PRIVATE = 16, 32
_TIMERS = {gic.VTIMER_IRQ.id: 0, gic.PTIMER_IRQ.id: 1}


@dataclass(frozen=True, slots=True)
class TimerLine:
    """The interrupt of a timer: a PPI of all vCPUs, until the first run (kvm_arm_timer_set_attr)."""

    id: int

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_GET_DEVICE_ATTR of a vCPU."""
        values[:, 0] = guest.timer_line(_TIMERS[self.id])
        return np.zeros(len(values), np.int64)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """KVM_SET_DEVICE_ATTR of a vCPU: EINVAL for what is no PPI, then EBUSY."""
        line = int(values[-1, 0]) & 0xFFFF_FFFF
        no = errno.EINVAL if not _FIRST_PPI <= line < _PRIVATE else errno.EBUSY if guest.entered else 0
        if not no:
            guest.set_timer_line(_TIMERS[self.id], line)
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
        guest.pmu_made[rows] |= errnos == 0
        return errnos
