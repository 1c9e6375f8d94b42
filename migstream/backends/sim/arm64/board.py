"""Making the interrupt controller of a simulated VM: what each attribute is refused for, in the order of the calls.

Sources: Linux Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst; arch/arm64/kvm/vgic/
vgic-kvm-device.c, vgic_check_iorange().
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migstream.backends.sim.arm64.vgic import Vgic
from migstream.errors import BackendError
from migstream.registers import gic

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

_GRANULE = 1 << 16
_ADDRESS_BITS = 40
"""KVM_CREATE_VM with type 0: guest-physical addresses of 40 bits."""

_DEFAULT_IRQS = 64


@dataclass(frozen=True, slots=True)
class Attribute:
    """One KVM_SET_DEVICE_ATTR that a machine's `device` asks for; `refuse` gives the errno for a value, 0 for none."""

    device: str
    name: str
    refuse: Callable[[int], int]


def _address(value: int) -> int:
    """Beyond the VM's addresses, then where no register frame can begin."""
    if value >> _ADDRESS_BITS:
        return errno.E2BIG
    return errno.EINVAL if value % _GRANULE else 0


def _irqs(value: int) -> int:
    return 0 if 64 <= value <= gic.MOST_IRQS and value % 32 == 0 else errno.EINVAL


ATTRIBUTES = (
    Attribute("gic_distributor", "KVM_VGIC_V3_ADDR_TYPE_DIST", _address),
    Attribute("gic_redistributors", "KVM_VGIC_V3_ADDR_TYPE_REDIST", _address),
    Attribute("gic_irqs", "KVM_DEV_ARM_VGIC_GRP_NR_IRQS", _irqs),
    Attribute("its", "KVM_VGIC_ITS_ADDR_TYPE", _address),
)
_KINDS = {"gic_distributor": "gicv3", "its": "its"}


def make_devices(profile: HostProfile, devices: Mapping[str, int], vcpus: int) -> Vgic | None:
    """The initialized interrupt controller, None without one; refuse what KVM would.

    Raises: BackendError with the ioctl, the errno and the attribute.
    """
    for name, kind in _KINDS.items():
        if name in devices and kind not in profile.devices:
            raise BackendError("KVM_CREATE_DEVICE", errno=errno.ENODEV, register=kind)
    for attribute in ATTRIBUTES:
        default = _DEFAULT_IRQS if attribute.device == "gic_irqs" else None
        value = devices.get(attribute.device, default)
        if value is not None and (no := attribute.refuse(int(value))):
            raise BackendError("KVM_SET_DEVICE_ATTR", errno=no, register=attribute.name)
    if "gic_distributor" not in devices:
        return None
    return Vgic(vcpus, irqs=devices.get("gic_irqs", _DEFAULT_IRQS), initialized=True,
                distributor=devices["gic_distributor"], redistributors=devices["gic_redistributors"])
