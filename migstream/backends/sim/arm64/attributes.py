"""Device attributes of a vCPU, one ioctl each: PMU, timers, paravirtualized time.

Sources: arch/arm64/kvm/pmu-emul.c (kvm_arm_pmu_v3_set_attr), arch_timer.c (kvm_arm_timer_set_attr), pvtime.c.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from migstream.backends.sim.arm64.guest import NO_FEATURES
from migstream.backends.sim.arm64.rules import since
from migstream.registers import gic, ids, vcpu_features

if TYPE_CHECKING:
    from migstream.backends.sim.arm64.guest import Guest

PMU, TIMER, PV_TIME = 0, 1, 2
"""KVM_ARM_VCPU_PMU_V3_CTRL, _TIMER_CTRL, _PVTIME_CTRL."""

IRQ, INIT, FILTER, SET_PMU, COUNTERS = range(5)
_FIRST_PPI, _FIRST_SPI = 16, 32
_MOST_SPI = 1019
_MOST_EVENTS = 1 << 16
"""Of a PMU since Armv8.1."""

_STEAL_TIME = 64
"""Bytes of struct pvclock_vcpu_stolen_time, and its alignment."""


def has(guest: Guest, vcpu: int, group: int, attribute: int) -> int:
    """KVM_HAS_DEVICE_ATTR of a vCPU: what the profile's kernel knows; PMU attributes where there is a PMU."""
    known = ids.attribute_id(ids.ARM64_VCPU_FD, group, attribute) in guest.profile.attributes
    return 0 if known and (group != PMU or _has_pmu(guest, vcpu)) else errno.ENXIO


def get(guest: Guest, vcpu: int, group: int, attribute: int) -> tuple[int, bytes]:
    """KVM_GET_DEVICE_ATTR of a vCPU: errno and value."""
    if group == PMU:
        return _get_pmu(guest, vcpu, attribute)
    if no := has(guest, vcpu, group, attribute):
        return no, b""
    if group == TIMER:
        return 0, struct.pack("<I", guest.timer_line(attribute))
    return 0, struct.pack("<Q", guest.steal_time.get(vcpu, (1 << 64) - 1))


def set(guest: Guest, vcpu: int, group: int, attribute: int, value: int) -> int:
    """KVM_SET_DEVICE_ATTR of a vCPU: errno."""
    if group == PMU:
        return _set_pmu(guest, vcpu, attribute, value)
    if group == TIMER:
        return _set_timer(guest, vcpu, attribute, value & 0xFFFF_FFFF)
    if no := has(guest, vcpu, group, attribute):
        return no
    return _set_steal_time(guest, vcpu, value)


def _has_pmu(guest: Guest, vcpu: int) -> bool:
    """vcpu_has_feature(): since 6.5 the VM's features, which the first vCPU that is initialized decides."""
    all_of_them = guest.features if since(guest.profile, 6, 5) else guest.features[vcpu:vcpu + 1]
    made = all_of_them[all_of_them != NO_FEATURES]
    return bool((made & vcpu_features.PMU_V3).any()) or bool(guest.left_over.get(vcpu, 0) & vcpu_features.PMU_V3)


def _get_pmu(guest: Guest, vcpu: int, attribute: int) -> tuple[int, bytes]:
    if attribute != IRQ:
        return errno.ENXIO, b""
    if not guest.vgic:
        return errno.EINVAL, b""
    if not _has_pmu(guest, vcpu):
        return errno.ENODEV, b""
    line = int(guest.column(gic.PMU_IRQ.id)[vcpu, 0])
    return (0, struct.pack("<I", line)) if line else (errno.ENXIO, b"")


def _set_pmu(guest: Guest, vcpu: int, attribute: int, value: int) -> int:
    if not _has_pmu(guest, vcpu):
        return errno.ENODEV
    if guest.pmu_made[vcpu]:
        return errno.EBUSY
    if attribute == IRQ:
        return _set_irq(guest, vcpu, value & 0xFFFF_FFFF)
    if attribute == INIT:
        return _init(guest, vcpu)
    if attribute == FILTER:
        return _filter(guest, value)
    if attribute == COUNTERS and not has(guest, vcpu, PMU, COUNTERS):
        return _counters(guest, value & 0xFFFF_FFFF)
    return errno.ENXIO


def _set_irq(guest: Guest, vcpu: int, line: int) -> int:
    """A PPI that all vCPUs share, or an SPI that no other one has; once."""
    if not guest.vgic or not _FIRST_PPI <= line <= _MOST_SPI:
        return errno.EINVAL
    lines = guest.column(gic.PMU_IRQ.id)[:, 0]
    others = {int(other) for other in lines if other}
    if others - {line} if line < _FIRST_SPI else line in others:
        return errno.EINVAL
    if lines[vcpu]:
        return errno.EBUSY
    lines[vcpu] = line
    return 0


def _init(guest: Guest, vcpu: int) -> int:
    if guest.vgic:
        if not guest.vgic.initialized:
            return errno.ENODEV
        if not guest.column(gic.PMU_IRQ.id)[vcpu, 0]:
            return errno.ENXIO
    guest.pmu_made[vcpu] = True
    return 0


def _filter(guest: Guest, value: int) -> int:
    """struct kvm_pmu_event_filter: first event, how many, allow or deny; after a run EBUSY (since 5.18)."""
    first, count, action = value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 0xFF
    if first + count > _MOST_EVENTS or action > 1:
        return errno.EINVAL
    return errno.EBUSY if guest.entered and since(guest.profile, 5, 18) else 0


def _counters(guest: Guest, number: int) -> int:
    """kvm_arm_pmu_v3_set_nr_counters() since 6.16."""
    if number > guest.most_counters:
        return errno.EINVAL
    guest.notes["counters"] = number
    return 0


def _set_timer(guest: Guest, vcpu: int, attribute: int, line: int) -> int:
    """A PPI, for all vCPUs, until timers were first enabled."""
    if not guest.vgic or not _FIRST_PPI <= line < _FIRST_SPI:
        return errno.EINVAL
    fixed = guest.lines_fixed if since(guest.profile, 6, 4) else vcpu in guest.timers_on
    if fixed:
        return errno.EBUSY
    if no := has(guest, vcpu, TIMER, attribute):
        return no
    guest.set_timer_line(attribute, line)
    return 0


def _set_steal_time(guest: Guest, vcpu: int, address: int) -> int:
    if address % _STEAL_TIME:
        return errno.EINVAL
    if vcpu in guest.steal_time:
        return errno.EEXIST
    if not any(region.guest_address <= address < region.end for region in guest.machine.memory):
        return errno.EINVAL
    guest.steal_time[vcpu] = address
    return 0
