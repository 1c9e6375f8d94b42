"""KVM_GET_ONE_REG and KVM_SET_ONE_REG of many vCPUs at once: what exists, then the rules in their order."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.guest import NO_FEATURES, Access, Guest
from migstream.backends.sim.arm64.rules import since
from migstream.registers import arm64_ids, vcpu_features
from migstream.registers import ids as all_ids
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Errnos
    from migstream.model import Words

_SIZE = 0xF << 52
_REGS_WORDS = 216
"""32-bit words of struct kvm_regs (864 bytes)."""

_Z_FIRST, _P_FIRST = arm64_ids.zreg(0), arm64_ids.preg(0)
_Z_LAST, _P_LAST = arm64_ids.zreg(31) | arm64_ids.SLICE_MASK, arm64_ids.preg(16) | arm64_ids.SLICE_MASK
_STRUCTS = frozenset((ids.MP_STATE, ids.VCPU_EVENTS))
_UNTIL_INIT: dict[int, tuple[int, ...]] = {ids.MP_STATE: (99,), ids.VCPU_EVENTS: (6, 18)}
"""Structs that a vCPU has before KVM_ARM_VCPU_INIT, up to a release: kvm_arch_vcpu_ioctl_get_mpstate() looks at
nothing else; KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS in kvm_arch_vcpu_ioctl() did not before 6.18."""


def missing(guest: Guest, id: int, features: int, finalized: bool) -> int:
    """The errno of an id on a vCPU with these features; 0 for a register that it has.

    The order is kvm_arm_get_reg()'s: architecture, then by class.
    """
    if features == NO_FEATURES:
        until = _UNTIL_INIT.get(id)
        return 0 if until and not since(guest.profile, *until) else errno.ENOEXEC
    if id in _STRUCTS:
        return 0
    if (id & ~_SIZE) >> 32 != arm64_ids.ARM64 >> 32:
        return errno.EINVAL
    kind = id & arm64_ids.CLASS_MASK
    if kind == arm64_ids.SVE:
        return _missing_sve(id, bool(features & vcpu_features.SVE), finalized)
    if id in guest.listed(features):
        return 0
    return _missing_core(id) if kind == arm64_ids.CORE else errno.ENOENT


def _missing_core(id: int) -> int:
    """get_core_reg(): beyond the struct ENOENT; within it a wrong size or offset, or a V register with SVE: EINVAL."""
    word = id & ~(0xFF << 56 | _SIZE | arm64_ids.CORE)
    size = 1 << (id >> 52 & 0xF)
    return errno.ENOENT if word >= _REGS_WORDS or word + size // 4 >= _REGS_WORDS else errno.EINVAL


def _missing_sve(id: int, has: bool, finalized: bool) -> int:
    if id == ids.SVE_VLS:
        return 0 if has else errno.ENOENT
    if not (_Z_FIRST <= id <= _Z_LAST or _P_FIRST <= id <= _P_LAST):
        return errno.EINVAL
    if not has or id & arm64_ids.SLICE_MASK:
        return errno.ENOENT
    return 0 if finalized else errno.EPERM


def absent(at: Access) -> Errnos:
    """`missing` of each vCPU."""
    guest = at.guest
    features, finalized = at.features, guest.finalized[at.index]
    if guest.uniform is not None and (id_class := at.id & arm64_ids.CLASS_MASK) != arm64_ids.SVE:
        return np.full(len(features), missing(guest, at.id, guest.uniform, bool(id_class)), np.int64)
    vcpus = list(zip(features.tolist(), finalized.tolist(), strict=True))
    kinds = {pair: missing(guest, at.id, *pair) for pair in set(vcpus)}
    return np.array([kinds[pair] for pair in vcpus], np.int64)


def read(at: Access, values: Words) -> Errnos:
    """Fill `values` (zeroed by the caller) with what each vCPU shows; an errno a vCPU."""
    errnos = absent(at)
    if (errnos != 0).all():
        return errnos
    good = errnos == 0
    chosen = at.where(good)
    shown = _shown(chosen)
    words = min(shown.shape[1], values.shape[1])
    if good.all():
        values[:, :words] = shown[:, :words]
    else:
        values[good, :words] = shown[:, :words]
    return errnos


def _shown(at: Access) -> Words:
    shown = at.load()
    for rule in at.guest.program(at.id):
        if rule.show:
            shown = rule.show(at, shown)
    return shown


def write(at: Access, values: Words) -> Errnos:
    """Store what is not refused; an errno a vCPU."""
    errnos = absent(at)
    program = at.guest.program(at.id)
    for rule in program:
        if rule.refuse and not errnos.all():
            errnos = np.where(errnos, errnos, rule.refuse(at, values))
    good = errnos == 0
    if good.any():
        _store(at.where(good), values if good.all() else values[good])
    return errnos


def _store(at: Access, values: Words) -> None:
    program = at.guest.program(at.id)
    kept = values
    for rule in program:
        if rule.keep:
            kept = rule.keep(at, kept)
    at.store(kept)
    for rule in program:
        if rule.after:
            rule.after(at, values)


def operation(id: int, verb: str) -> str:
    """Name of the ioctl that reads (`GET`) or writes (`SET`) a register."""
    if id >> 56 != all_ids.OURS:
        return f"KVM_{verb}_ONE_REG"
    if all_ids.capability_number(id) is not None:
        return "KVM_ENABLE_CAP"
    name = lookup(id).name
    if name.startswith("KVM_ARM_VCPU_") or not name.startswith("KVM_"):
        return name if name == "KVM_ARM_VCPU_INIT" else f"KVM_{verb}_DEVICE_ATTR"
    return f"KVM_{verb}_{name.removeprefix('KVM_')}"


@dataclass(frozen=True, slots=True)
class Column:
    """One ONE_REG register or struct of a bank."""

    id: int

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `read`."""
        return read(Access(guest, guest.resolve(self.id), rows, numbers), values)

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `write`."""
        return write(Access(guest, guest.resolve(self.id), rows, numbers), values)


class FinalizingColumn(Column):
    """KVM_REG_ARM64_SVE_VLS of a bank: written, then KVM_ARM_VCPU_FINALIZE."""

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """See `Column.write`."""
        errnos = Column.write(self, guest, rows, numbers, values)
        guest.finalized[rows] |= errnos == 0
        return errnos
