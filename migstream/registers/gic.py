"""arm64: the interrupt controller (GICv3 and ITS) and the interrupt lines of a vCPU's own devices.

KVM has them as device attributes (Linux Documentation/virt/kvm/devices/arm-vgic-v3.rst, arm-vgic-its.rst, vcpu.rst).
Names and offsets are the architecture's (Arm IHI 0069). The tables are in the order of a restore: distributor, then
redistributors and CPU interfaces, then the ITS, which maps its collections to redistributors.

Redistributor and CPU interface attributes carry the vCPU's affinity in bits 63:32; an id does not: the backend adds
that of the row's vCPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from migstream.model import Klass, Layout, Phase, Scope, Slot
from migstream.registers import ids
from migstream.registers.catalogue import Register, Running

GICV3, ITS = 7, 8
"""KVM_DEV_TYPE_ARM_VGIC_V3, KVM_DEV_TYPE_ARM_VGIC_ITS."""

ADDRESSES, DISTRIBUTOR, IRQ_COUNT, CONTROL = 0, 1, 3, 4
REDISTRIBUTOR, CPU_INTERFACE, LINE_LEVEL, ITS_REGISTERS = 5, 6, 7, 8
"""KVM_DEV_ARM_VGIC_GRP_*: the attribute groups."""

INIT, ITS_SAVE_TABLES, ITS_RESTORE_TABLES, SAVE_PENDING_TABLES = 0, 1, 2, 3
"""Attributes of group CONTROL."""

PRIVATE_IRQS = 32
"""Interrupts of a vCPU's own (SGIs and PPIs); shared ones (SPIs) follow."""

MOST_IRQS = 992
"""The most that KVM_DEV_ARM_VGIC_GRP_NR_IRQS takes: multiples of 32 below 1024 (measured: all kernels of the lab)."""

_ARCHITECTURES_IRQS = 1024
"""Registers have names for all of the architecture's; interrupts 1020 to 1023 are special and have no state."""

_VM, _VCPU = Scope.VM, Scope.VCPU


@dataclass(frozen=True, slots=True)
class GicRow:
    """One register, or a run of registers of one kind.

    Attributes:
        group, offset: of its first attribute. size: bytes; an 8-byte register of the distributor or of a
            redistributor is two 4-byte attributes.
        irqs: interrupts that one register is about, 0 where it is about none (and there is one).
        clear: offset of the register that clears bits, where a write to this one only sets them; else None.
    """

    name: str
    group: int
    offset: int
    size: int
    klass: Klass
    why: str
    irqs: int = 0
    clear: int | None = None
    device: int = GICV3

    @property
    def scope(self) -> Scope:
        """The distributor and the ITS are the VM's; so are the lines of shared interrupts."""
        private = self.group in (REDISTRIBUTOR, CPU_INTERFACE) or (self.group == LINE_LEVEL and not self.irqs)
        return _VCPU if private else _VM


_STATE, _FEATURE, _IDENTITY = Klass.STATE, Klass.FEATURE, Klass.IDENTITY

_DISTRIBUTOR: tuple[GicRow, ...] = (
    GicRow("GICD_IIDR", DISTRIBUTOR, 0x0008, 4, _FEATURE,
           "first: its revision decides what the other registers mean; KVM refuses one that it can't be"),
    GicRow("GICD_TYPER2", DISTRIBUTOR, 0x000C, 4, _IDENTITY, "KVM takes only its own value: a guest may have seen it"),
    GicRow("GICD_CTLR", DISTRIBUTOR, 0x0000, 4, _STATE, "before the interrupts that it lets through"),
    GicRow("GICD_STATUSR", DISTRIBUTOR, 0x0010, 4, _STATE, "error flags; KVM keeps none and ignores the write"),
    GicRow("GICD_IGROUPR", DISTRIBUTOR, 0x0080, 4, _STATE, "decides how a pending interrupt is signalled", 32),
    GicRow("GICD_ICFGR", DISTRIBUTOR, 0x0C00, 4, _STATE, "edge or level: before pending", 16),
    GicRow("GICD_IROUTER", DISTRIBUTOR, 0x6000, 8, _STATE, "targets before pending, which is queued on the target", 1),
    GicRow("GICD_IPRIORITYR", DISTRIBUTOR, 0x0400, 4, _STATE, "before pending and enabled, which compare it", 4),
    GicRow("GICD_ISENABLER", DISTRIBUTOR, 0x0100, 4, _STATE, "set-only: cleared first, so that what is off is off", 32,
           clear=0x0180),
    GicRow("GICD_LINE_LEVEL", LINE_LEVEL, 0, 4, _STATE, "input lines: before the latches", 32),
    GicRow("GICD_ISPENDR", DISTRIBUTOR, 0x0200, 4, _STATE, "the latch alone, exactly as written; it queues", 32),
    GicRow("GICD_ISACTIVER", DISTRIBUTOR, 0x0300, 4, _STATE, "set-only: cleared first", 32, clear=0x0380),
)

_SGI_FRAME = 0x1_0000
"""The redistributor's second page, with the registers of private interrupts."""

_REDISTRIBUTOR: tuple[GicRow, ...] = (
    GicRow("GICR_PROPBASER", REDISTRIBUTOR, 0x0070, 8, _STATE, "fixed once GICR_CTLR enables LPIs: before it"),
    GicRow("GICR_PENDBASER", REDISTRIBUTOR, 0x0078, 8, _STATE, "as PROPBASER: the table is read when LPIs go on"),
    GicRow("GICR_CTLR", REDISTRIBUTOR, 0x0000, 4, _STATE, "enables LPIs, which reads the pending table in RAM"),
    GicRow("GICR_STATUSR", REDISTRIBUTOR, 0x0010, 4, _STATE, "error flags; KVM keeps none and ignores the write"),
    GicRow("GICR_WAKER", REDISTRIBUTOR, 0x0014, 4, _STATE, "sleep handshake; KVM keeps none and ignores the write"),
    GicRow("GICR_IGROUPR0", REDISTRIBUTOR, _SGI_FRAME + 0x080, 4, _STATE, "as GICD_IGROUPR"),
    GicRow("GICR_ICFGR1", REDISTRIBUTOR, _SGI_FRAME + 0xC04, 4, _STATE, "PPIs, before pending; SGIs are always edge"),
    *(GicRow(f"GICR_IPRIORITYR{n}", REDISTRIBUTOR, _SGI_FRAME + 0x400 + 4 * n, 4, _STATE, "before pending and enabled")
      for n in range(8)),
    GicRow("GICR_ISENABLER0", REDISTRIBUTOR, _SGI_FRAME + 0x100, 4, _STATE,
           "set-only, and SGIs start out enabled: cleared first", clear=_SGI_FRAME + 0x180),
    GicRow("GICR_LINE_LEVEL", LINE_LEVEL, 0, 4, _STATE, "input lines of the PPIs: before the latches"),
    GicRow("GICR_ISPENDR0", REDISTRIBUTOR, _SGI_FRAME + 0x200, 4, _STATE, "the latch alone, exactly as written"),
    GicRow("GICR_ISACTIVER0", REDISTRIBUTOR, _SGI_FRAME + 0x300, 4, _STATE, "set-only: cleared first",
           clear=_SGI_FRAME + 0x380),
)


def _icc(name: str, crm: int, op2: int, why: str, klass: Klass = _STATE) -> GicRow:
    """A CPU interface register: S3_0_C12_<crm>_<op2> (ICC_PMR_EL1 alone is S3_0_C4_C6_0)."""
    crn = 4 if name == "ICC_PMR_EL1" else 12
    return GicRow(name, CPU_INTERFACE, 3 << 14 | crn << 7 | crm << 3 | op2, 8, klass, why)


_CPU_INTERFACE: tuple[GicRow, ...] = (
    _icc("ICC_SRE_EL1", 12, 5, "says that the others are system registers; KVM takes only its own value", _IDENTITY),
    _icc("ICC_CTLR_EL1", 12, 4, "priority and id bits are checked against the host's before anything depends on them"),
    _icc("ICC_IGRPEN0_EL1", 12, 6, "group enables"),
    _icc("ICC_IGRPEN1_EL1", 12, 7, "group enables"),
    _icc("ICC_PMR_EL1", 6, 0, "priority mask"),
    _icc("ICC_BPR0_EL1", 8, 3, "after ICC_CTLR_EL1.CBPR, which decides what a write of BPR1 does"),
    _icc("ICC_BPR1_EL1", 12, 3, "after ICC_CTLR_EL1.CBPR"),
    *(_icc(f"ICC_AP0R{n}_EL1", 8, 4 + n, "active priorities; as many as there are priority bits") for n in range(4)),
    *(_icc(f"ICC_AP1R{n}_EL1", 9, n, "active priorities; as many as there are priority bits") for n in range(4)),
)

_ITS: tuple[GicRow, ...] = tuple(
    GicRow(name, ITS_REGISTERS, offset, 8, klass, why, device=ITS) for name, offset, klass, why in (
        ("GITS_IIDR", 0x0004, _FEATURE, "first: its revision says how the tables in guest RAM are laid out"),
        ("GITS_CBASER", 0x0080, _STATE, "resets the read pointer: before GITS_CREADR"),
        ("GITS_CREADR", 0x0090, _STATE, "after GITS_CBASER"),
        ("GITS_CWRITER", 0x0088, _STATE, "after the read pointer; commands between the two run when GITS_CTLR enables"),
        *((f"GITS_BASER{n}", 0x0100 + 8 * n, _STATE, "where the tables are: before they are read") for n in range(8)),
        ("GITS_CTLR", 0x0000, _STATE, "last: the tables are read out of guest RAM just before it, then it enables"),
    ))

BEFORE_READ: dict[int, int] = {
    ids.attribute_id(GICV3, DISTRIBUTOR, 0x0008): SAVE_PENDING_TABLES,  # LPI latches go to guest RAM, saved later
    ids.attribute_id(ITS, ITS_REGISTERS, 0x0004): ITS_SAVE_TABLES,      # mappings go to guest RAM
}
"""Attribute of group CONTROL to set on the register's device before it is read: registers are read before RAM."""

BEFORE_WRITE: dict[int, int] = {
    ids.attribute_id(ITS, ITS_REGISTERS, 0x0000): ITS_RESTORE_TABLES,   # after GITS_BASER, before GITS_CTLR enables
}
"""The same before it is written: RAM is restored before the registers of this phase."""

ICC_CTLR = ids.attribute_id(GICV3, CPU_INTERFACE, 3 << 14 | 12 << 7 | 12 << 3 | 4)
"""Bits 10:8 are the number of priority bits less one."""


def _line(group: int, attribute: int, name: str, scope: Scope, why: str) -> Register:
    id = ids.attribute_id(ids.ARM64_VCPU_FD, group, attribute)
    return Register(id, f"KVM_ARM_VCPU_{name}", 4, scope, Phase.FEATURE, _FEATURE, why)


_TIMER_IRQ = "a PPI of all vCPUs, set through one of them; fixed after the first KVM_RUN"
VTIMER_IRQ = _line(1, 0, "TIMER_IRQ_VTIMER", _VM, _TIMER_IRQ)
PTIMER_IRQ = _line(1, 1, "TIMER_IRQ_PTIMER", _VM, _TIMER_IRQ)
PMU_IRQ = _line(0, 0, "PMU_V3_IRQ", _VCPU, "one PPI for all vCPUs or an SPI for each; then KVM_ARM_VCPU_PMU_V3_INIT, "
                                           "without which the vCPU does not run")

LINES = {row.id: row for row in (VTIMER_IRQ, PTIMER_IRQ, PMU_IRQ)}
"""Interrupt lines of a vCPU's own devices; attributes of the vCPU's file descriptor."""


_MEMORY = "KVM replaces memory attributes that it can't keep: outer shareable and non-cacheable ones"
_ITS_BASE = Running(((10, 2), (53, 3), (59, 3)), _MEMORY)
_REDISTRIBUTOR_BASE = Running(((7, 3), (10, 2), (56, 3)), _MEMORY)
RUNNING: dict[int, Running] = {
    **{ids.attribute_id(ITS, ITS_REGISTERS, offset): _ITS_BASE for offset in (0x80, *range(0x100, 0x140, 8))},
    **{ids.attribute_id(GICV3, REDISTRIBUTOR, offset): _REDISTRIBUTOR_BASE for offset in (0x70, 0x78)},
}
"""What differs on read-back though nothing was lost."""


def _registers(row: GicRow, irqs: int) -> Iterator[tuple[Register, GicRow]]:
    """The registers of a row: one, or those of the shared interrupts 32 to `irqs` - 1."""
    first, last = (PRIVATE_IRQS // row.irqs, min(irqs, 1020)) if row.irqs else (0, 1)
    for n in range(first, -(-last // (row.irqs or 1))):
        step = 32 if row.group == LINE_LEVEL else row.size
        id = ids.attribute_id(row.device, row.group, row.offset + n * step)
        yield Register(id, f"{row.name}{n}" if row.irqs else row.name, row.size, row.scope, Phase.INTERRUPTS,
                       row.klass, row.why), row


@cache
def _all() -> dict[int, tuple[Register, GicRow]]:
    rows = (*_DISTRIBUTOR, *_REDISTRIBUTOR, *_CPU_INTERFACE, *_ITS)
    return {register.id: (register, row) for row in rows for register, row in _registers(row, _ARCHITECTURES_IRQS)}


def lookup(id: int) -> Register | None:
    """The row of an id of the interrupt controller or of an interrupt line; else None."""
    found = _all().get(id)
    return found[0] if found else LINES.get(id)


def names() -> tuple[str, ...]:
    """Names of all registers of the interrupt controller."""
    return tuple(register.name for register, _ in _all().values())


def access(id: int) -> GicRow | None:
    """How a register of the interrupt controller is reached; None for any other id."""
    found = _all().get(id)
    return found[1] if found else None


def attribute(id: int) -> tuple[int, int]:
    """Group and attribute (without affinity) that an id names."""
    return id >> 32 & 0xFF, id & 0xFFFF_FFFF


def active_priority_registers(icc_ctlr: int) -> int:
    """ICC_AP0Rn and ICC_AP1Rn registers that exist with this ICC_CTLR_EL1: 4 for 7 priority bits, 2 for 6, else 1."""
    return {7: 4, 6: 2}.get((icc_ctlr >> 8 & 7) + 1, 1)


def layouts(irqs: int, priorities: int, its: bool) -> tuple[Layout, ...]:
    """The layouts of an interrupt controller, in restore order.

    Args:
        irqs: interrupts including the 32 private ones. priorities: active priority registers of a group.
        its: whether the VM has an ITS.
    """
    unused = {f"ICC_AP{group}R{n}_EL1" for group in (0, 1) for n in range(priorities, 4)}
    vcpu = [row for row in (*_REDISTRIBUTOR, *_CPU_INTERFACE) if row.name not in unused]
    parts: tuple[tuple[Scope, Sequence[GicRow]], ...] = ((_VM, _DISTRIBUTOR), (_VCPU, vcpu), (_VM, _ITS if its else ()))
    return tuple(Layout(scope, Phase.INTERRUPTS, _slots(rows, irqs)) for scope, rows in parts if rows)


def _slots(rows: Sequence[GicRow], irqs: int) -> tuple[Slot, ...]:
    return tuple(Slot(register.id, row.size) for row in rows for register, _ in _registers(row, irqs))
