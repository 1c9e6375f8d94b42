"""KVM_CREATE_DEVICE of a vGICv3, and the attributes that make it: addresses, number of interrupts, init.

Sources: arch/arm64/kvm/vgic/vgic-init.c, vgic-kvm-device.c, vgic-mmio-v3.c.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from migstream.registers import gic

UNDEFINED = (1 << 64) - 1
"""VGIC_ADDR_UNDEF: what an address that was not set reads as."""

DISTRIBUTOR, REDISTRIBUTORS = 2, 3
"""KVM_VGIC_V3_ADDR_TYPE_DIST and _REDIST."""

_FRAME, _REDISTRIBUTOR_SIZE, _LEGACY_IRQS = 0x1_0000, 0x2_0000, 256


@dataclass
class Vgic:
    """The interrupt controller of a VM.

    Attributes:
        vcpus: how many the VM has. address_bits: of guest-physical addresses. release: of the kernel. irqs: with the 32
            private ones, 0 where not told. distributor, redistributors: addresses. initialized: its registers are
            there. ready: a vCPU has run. placed: each vCPU knows its redistributor's address.
    """

    vcpus: int
    address_bits: int = 40
    release: tuple[int, int] = (99, 0)
    irqs: int = 0
    distributor: int = UNDEFINED
    redistributors: int = UNDEFINED
    initialized: bool = False
    ready: bool = False
    placed: bool = False

    def __post_init__(self) -> None:
        self.placed = self.redistributors != UNDEFINED

    def map_resources(self) -> int:
        """kvm_vgic_map_resources() at the first run of a vCPU."""
        if self.ready:
            return 0
        if not self.placed or self.distributor == UNDEFINED:
            return errno.ENXIO
        if not self.initialized:
            return errno.EBUSY
        self.ready = True
        return 0

    def destroy(self) -> None:
        """__kvm_vgic_destroy(): it stays the VM's, with nothing set; vCPUs keep where their redistributors were."""
        self.irqs, self.initialized, self.redistributors = 0, False, UNDEFINED

    def get(self, group: int, attribute: int) -> tuple[int, int]:
        """(errno, value) of an attribute that makes it."""
        if group == gic.IRQ_COUNT:
            return 0, max(self.irqs, gic.PRIVATE_IRQS)
        if group != gic.ADDRESSES:
            return errno.ENXIO, 0
        if attribute == DISTRIBUTOR:
            return 0, self.distributor
        return (0, self.redistributors) if attribute == REDISTRIBUTORS else (errno.ENXIO, 0)

    def set(self, group: int, attribute: int, value: int) -> int:
        """The errno of setting one."""
        if group == gic.IRQ_COUNT:
            return self._count(value)
        if group == gic.CONTROL and attribute == gic.INIT:
            return self._init()
        if group != gic.ADDRESSES:
            return errno.ENXIO
        if attribute == DISTRIBUTOR:
            return self._distributor(value)
        return self._redistributors(value) if attribute == REDISTRIBUTORS else errno.ENXIO

    def _count(self, value: int) -> int:
        """vgic_set_common_attr()."""
        if value < gic.PRIVATE_IRQS + 32 or value > gic.MOST_IRQS or value & 31:
            return errno.EINVAL
        if self.ready or self.irqs:
            return errno.EBUSY
        self.irqs = value
        return 0

    def _init(self) -> int:
        """vgic_init(); a second time does nothing."""
        self.irqs = self.irqs or _LEGACY_IRQS
        self.initialized = True
        return 0

    def _range(self, address: int, size: int) -> int:
        """vgic_check_iorange() since 5.16, vgic_check_ioaddr() before, with the size first and looking at no end."""
        last = address + max(size, 1) - 1 if self.release >= (5, 16) else address
        big, crooked = bool(last >> self.address_bits), bool(address % _FRAME)
        if self.release < (5, 16) and big:
            return errno.E2BIG
        return errno.EINVAL if crooked else errno.E2BIG if big else 0

    def _distributor(self, value: int) -> int:
        no = self.frame(self.distributor, value, _FRAME)
        if not no:
            self.distributor = value
        return no

    def frame(self, now: int, value: int, size: int) -> int:
        """The errno of a frame of registers at an address that is set once."""
        wrong, twice = self._range(value, size), errno.EEXIST if now != UNDEFINED else 0
        return twice or wrong if self.release >= (5, 16) else wrong or twice

    def _redistributors(self, value: int) -> int:
        """vgic_v3_set_redist_base(): one region for all vCPUs, not over the distributor."""
        if self.redistributors != UNDEFINED:
            return errno.EEXIST if self.release >= (5, 13) else errno.EINVAL
        if no := self._range(value, 0):
            return no
        end = value + self.vcpus * _REDISTRIBUTOR_SIZE
        if self.distributor != UNDEFINED and value < self.distributor + _FRAME and end > self.distributor:
            return errno.EINVAL
        self.redistributors, self.placed = value, True
        return 0
