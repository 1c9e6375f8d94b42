"""arm64: device attributes that a kernel may know, and which of them it does (KVM_HAS_DEVICE_ATTR).

What the catalogue has rows for is asked by them; what has none (orders, filters, later additions) is listed here, and
of the CPU interface every encoding is asked: a kernel may have registers that we don't know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from migstream.registers import gic, ids
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.host.scratch import Scratch

_PMU, _TIMER, _PV_TIME, _SMCCC = 0, 1, 2, 0


@dataclass(frozen=True, slots=True)
class Known:
    """An attribute without a row in the catalogue: nothing of a guest's state."""

    device: int
    group: int
    attribute: int
    name: str

    @property
    def id(self) -> int:
        """Its id in our namespace."""
        return ids.attribute_id(self.device, self.group, self.attribute)


KNOWN: tuple[Known, ...] = (
    Known(gic.GICV3, gic.ADDRESSES, 2, "KVM_VGIC_V3_ADDR_TYPE_DIST"),
    Known(gic.GICV3, gic.ADDRESSES, 3, "KVM_VGIC_V3_ADDR_TYPE_REDIST"),
    Known(gic.GICV3, gic.ADDRESSES, 5, "KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION"),
    Known(gic.GICV3, gic.IRQ_COUNT, 0, "KVM_DEV_ARM_VGIC_GRP_NR_IRQS"),
    Known(gic.GICV3, gic.CONTROL, gic.INIT, "KVM_DEV_ARM_VGIC_CTRL_INIT"),
    Known(gic.GICV3, gic.CONTROL, gic.SAVE_PENDING_TABLES, "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES"),
    Known(gic.GICV3, 9, 0, "KVM_DEV_ARM_VGIC_GRP_MAINT_IRQ"),
    Known(gic.ITS, gic.ADDRESSES, 4, "KVM_VGIC_ITS_ADDR_TYPE"),
    Known(gic.ITS, gic.CONTROL, gic.INIT, "KVM_DEV_ARM_ITS_CTRL_INIT"),
    Known(gic.ITS, gic.CONTROL, gic.ITS_SAVE_TABLES, "KVM_DEV_ARM_ITS_SAVE_TABLES"),
    Known(gic.ITS, gic.CONTROL, gic.ITS_RESTORE_TABLES, "KVM_DEV_ARM_ITS_RESTORE_TABLES"),
    Known(gic.ITS, gic.CONTROL, 4, "KVM_DEV_ARM_ITS_CTRL_RESET"),
    Known(ids.ARM64_VCPU_FD, _PMU, 1, "KVM_ARM_VCPU_PMU_V3_INIT"),
    Known(ids.ARM64_VCPU_FD, _PMU, 2, "KVM_ARM_VCPU_PMU_V3_FILTER"),
    Known(ids.ARM64_VCPU_FD, _PMU, 3, "KVM_ARM_VCPU_PMU_V3_SET_PMU"),
    Known(ids.ARM64_VCPU_FD, _PMU, 4, "KVM_ARM_VCPU_PMU_V3_SET_NR_COUNTERS"),
    Known(ids.ARM64_VCPU_FD, _TIMER, 2, "KVM_ARM_VCPU_TIMER_IRQ_HVTIMER"),
    Known(ids.ARM64_VCPU_FD, _TIMER, 3, "KVM_ARM_VCPU_TIMER_IRQ_HPTIMER"),
    Known(ids.ARM64_VCPU_FD, _PV_TIME, 0, "KVM_ARM_VCPU_PVTIME_IPA"),
    Known(ids.ARM64_VM_FD, _SMCCC, 0, "KVM_ARM_VM_SMCCC_FILTER"),
)
"""Linux arch/arm64/include/uapi/asm/kvm.h; Documentation/virt/kvm/devices/{arm-vgic-v3,arm-vgic-its,vcpu,vm}.rst."""

_NAMES = {row.id: row.name for row in KNOWN}


def name(id: int) -> str:
    """As in the catalogue, else as in KVM's header."""
    return _NAMES.get(id) or lookup(id).name


@cache
def _candidates(irqs: int) -> tuple[int, ...]:
    rows = [slot.id for layout in gic.layouts(irqs, 4, True) for slot in layout.slots]
    lines = [row.id for row in (gic.VTIMER_IRQ, gic.PTIMER_IRQ, gic.PMU_IRQ)]
    return tuple(dict.fromkeys((*rows, *_cpu_interface(), *lines, *_NAMES)))


def _cpu_interface() -> list[int]:
    """Every register with op0 3 and CRn 4 (ICC_PMR_EL1) or 12, at EL1 and EL2: op1 0 and 4."""
    return [ids.attribute_id(gic.GICV3, gic.CPU_INTERFACE, 3 << 14 | op1 << 11 | crn << 7 | crm_op2)
            for op1 in (0, 4) for crn in (4, 12) for crm_op2 in range(1 << 7)]


def ask(scratch: Scratch, irqs: int) -> dict[int, bytes]:
    """The attributes that a VM with an interrupt controller and an ITS knows, with their values.

    Args:
        irqs: of its interrupt controller.

    Returns: by id, ascending: vCPU 0's or the VM's value; empty for what can't be read.
    """
    return {id: _value(scratch, id) for id in sorted(_candidates(irqs)) if scratch.vm.has_attribute(id)}


def _value(scratch: Scratch, id: int) -> bytes:
    row = lookup(id)
    value = scratch.read(id, row.size, 0) if row.known and row.size else b""
    return value if isinstance(value, bytes) else b""
