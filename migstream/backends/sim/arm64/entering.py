"""What the first KVM_RUN of a vCPU looks at and decides, and what a run does to registers that go through the CPU.

Source: kvm_arch_vcpu_run_pid_change() in arch/arm64/kvm/arm.c; up to 5.15 kvm_vcpu_first_run_init().
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import exceptions, ids
from migstream.backends.sim.arm64 import gic as chip
from migstream.backends.sim.arm64.guest import NO_FEATURES, Access
from migstream.backends.sim.arm64.rules import mask, since
from migstream.backends.sim.arm64.rules_cpu import reached
from migstream.registers import gic, vcpu_features

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Guest

CPU_KEEPS: dict[int, int] = {
    ids.AFSR0: 0, ids.AFSR1: 0, ids.AMAIR: 0, ids.VBAR: ~0x1F, ids.CSSELR: 0xF,
    ids.SCTLR: 0xFFFF_F01F_FFFF_FFFF, ids.TIMER_CTL: 7, ids.PTIMER_CTL: 7,
}
"""Bits of EL1 registers that the CPU has: KVM loads a vCPU's registers into it, and saves what it finds there.

Measured: all ones, 0x5a… and 0xa5… written to each register of the list, then KVM_RUN, on the lab's `-cpu max`.
"""

_CACHES_EMULATED = (6, 3)
"""Since then the guest's CSSELR_EL1 is never in the CPU: accesses to it trap."""

GIC_FIELDS = ((ids.ID_AA64PFR0, 0xF << 24), (ids.ID_PFR1, 0xF << 28))


def unfinished(guest: Guest, vcpu: int) -> int:
    """The errno of a vCPU that is not made yet: no features, or SVE that was not finalized."""
    features = int(guest.features[vcpu])
    if features == NO_FEATURES:
        return errno.ENOEXEC
    return errno.EPERM if features & vcpu_features.SVE and not guest.finalized[vcpu] else 0


def enter(guest: Guest, vcpu: int) -> int:
    """The errno of a KVM_RUN before it reaches the guest; what the first one decides is decided then."""
    if guest.ran[vcpu]:
        return 0
    if no := unfinished(guest, vcpu):
        return no
    if not since(guest.profile, 5, 16):
        guest.ran[vcpu] = True  # has_run_once is set before the checks: a second try passes
    if no := _first(guest, vcpu):
        return no
    guest.ran[vcpu] = guest.entered = True
    return 0


def _first(guest: Guest, vcpu: int) -> int:
    if guest.vgic and (no := guest.vgic.map_resources()):
        guest.dead = since(guest.profile, 5, 16)  # kvm_vm_dead(), measured: 6.1 and later
        guest.vgic.destroy()  # what kvm_vgic_map_resources() did before, measured: 5.10
        return no
    if not guest.entered:
        _finalize_gic(guest)
    if no := _timers(guest, vcpu):
        return no
    return _pmu(guest, vcpu)


def _finalize_gic(guest: Guest) -> None:
    """kvm_finalize_sys_regs(): the ID registers have a GICv3 CPU interface if and only if there is a vGIC."""
    if guest.vgic and since(guest.profile, 6, 17):
        show_gic(guest)
    if not guest.vgic and since(guest.profile, 6, 12):
        _hide_gic(guest)


def _hide_gic(guest: Guest) -> None:
    """No vGIC: since 6.12."""
    for id, field in GIC_FIELDS:
        at = Access(guest, id, slice(0, 1), np.arange(1))
        at.store(at.load() & mask(~field))


def show_gic(guest: Guest) -> None:
    """kvm_vgic_finalize_idregs(), measured: 7.2: fields that a failed run or a write took are there again."""
    for id, field in GIC_FIELDS:
        at = Access(guest, id, slice(0, 1), np.arange(1))
        at.store(at.load() & mask(~field) | (at.initials() & mask(field))[:, np.newaxis])


def _timers(guest: Guest, vcpu: int) -> int:
    """timer_irqs_are_valid(): each timer its own PPI; from then on they stay."""
    if not guest.vgic:
        return 0
    lines = [guest.timer_line(n) for n in range(2)]
    if lines[0] == lines[1]:
        return errno.EINVAL
    guest.lines_fixed = True
    guest.timers_on.add(vcpu)
    return 0


def _pmu(guest: Guest, vcpu: int) -> int:
    """kvm_arm_pmu_v3_enable(): initialized; with an interrupt if and only if there is a vGIC."""
    if not int(guest.features[vcpu]) & vcpu_features.PMU_V3 or not (
            guest.pmu_made[vcpu] or since(guest.profile, 5, 11)):  # before, one that was not made did not matter
        return 0
    line = int(guest.column(gic.PMU_IRQ.id)[vcpu, 0])
    return 0 if guest.pmu_made[vcpu] and bool(line) == bool(guest.vgic) else errno.EINVAL


def complete(guest: Guest, vcpu: int) -> None:
    """kvm_handle_mmio_return(): an MMIO exit's instruction is done, and PC goes on, at the next KVM_RUN."""
    if vcpu in guest.exited:
        guest.exited.remove(vcpu)
        exceptions.skip(guest, vcpu)


def through_cpu(guest: Guest, vcpus: NDArray[np.intp], inside: bool = False) -> None:
    """What a run does to registers that the CPU has not all bits of; vCPUs with the same features.

    `inside`: the guest itself ran.
    """
    listed = guest.listed(int(guest.features[vcpus[0]]))
    for id, bits in CPU_KEEPS.items():
        if id in listed and not (id == ids.CSSELR and since(guest.profile, *_CACHES_EMULATED)):
            guest.column(id)[vcpus] &= mask(bits)
    if guest.vgic and (inside or not since(guest.profile, 7, 0)):  # measured: 7.2 loads it for the guest alone
        _interface(guest, vcpus)
    for id in (ids.TIMER_CTL, ids.PTIMER_CTL):
        _save_status(Access(guest, id, vcpus, vcpus))


def _interface(guest: Guest, vcpus: NDArray[np.intp]) -> None:
    """The GIC's CPU interface of the lab's `-cpu max`: 5 priority bits, points of at least 2 and 3 (measured)."""
    for name, least in chip.LEAST_POINTS.items():
        column, start = guest.column(chip.ICC[name]), np.uint64(chip.rule(guest, chip.ICC[name]).start)
        column[vcpus] = np.maximum(column[vcpus] ^ start, np.uint64(least)) ^ start
    guest.column(chip.ICC["ICC_PMR_EL1"])[vcpus] &= np.uint64(0xF8)


_ENABLE, _ISTATUS = np.uint64(1), np.uint64(4)


def _save_status(at: Access) -> None:
    """A timer's control is saved as the CPU has it, with ISTATUS where it is on; the next write takes it away."""
    value, due = at.load(), reached(at)
    if at.id == ids.PTIMER_CTL:
        due = at.of(ids.PTIMER_CVAL).load() + np.uint64(at.guest.offsets[ids.PTIMER_CNT]) <= np.uint64(
            at.guest.host.tsc())  # no CNTPOFF_EL2: timer_restore_state() adds it to CVAL, which may wrap; measured: 7.2
    at.store(np.where((value & _ENABLE != 0) & due, value | _ISTATUS, value & ~_ISTATUS))
