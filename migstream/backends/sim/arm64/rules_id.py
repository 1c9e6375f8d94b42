"""ID registers: fields that may only be lowered, those that are otherwise, and the end of it with the first run."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.rules import About, Rule, invalid, kept, mask, refused, registers, since
from migstream.backends.sim.arm64.rules import taken as taken_bits
from migstream.backends.sim.msr_rule import version

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Access, Errnos
    from migstream.host.profile import HostProfile
    from migstream.model import Words

_ALL = 0xFFFF
_EIGHT_UP = 0xFF00
_MEASURED = "measured: all 16 values of each nibble written on the lab's kernels"


@dataclass(frozen=True, slots=True)
class Field:
    """A field in which other values than the lower ones are taken, where the kernel lets it be written at all.

    Attributes:
        values: bit v set where value v is taken whatever the host has; below: lower ones are, too, from `lowest` on.
        since: release from which the row counts. why: the field.
    """

    register: int
    low: int
    values: int
    why: str
    below: bool = True
    lowest: int = 0
    since: tuple[int, int] = (0, 0)


FIELDS: tuple[Field, ...] = (
    Field(ids.ID_MMFR0, 8, _EIGHT_UP, "OuterShr is signed: 8 to 15 are below 0"),
    Field(ids.ID_MMFR0, 28, _EIGHT_UP, "InnerShr is signed"),
    Field(ids.ID_MMFR4, 0, _ALL, "SpecSEI: higher is safe"),
    Field(ids.ID_AA64MMFR1, 24, _ALL, "SpecSEI: higher is safe"),
    Field(ids.ID_AA64DFR0, 36, _EIGHT_UP, "DoubleLock is signed"),
    Field(ids.ID_AA64DFR0, 0, 0, "DebugVer: not below Armv8.0", lowest=6),
    Field(ids.ID_AA64DFR0, 8, 1 << 15, "PMUVer: implementation-defined, as KVM once said"),
    Field(ids.ID_DFR0, 0, 0, "CopDbg: not below Armv8.0", lowest=6),
    Field(ids.ID_DFR0, 24, 1 << 15 | 1, "PerfMon: implementation-defined, none, or PMUv3", lowest=3),
    Field(ids.ID_AA64MMFR0, 24, _EIGHT_UP, "TGRAN64 is signed"),
    Field(ids.ID_AA64MMFR0, 28, _EIGHT_UP, "TGRAN4 is signed"),
    Field(ids.ID_AA64MMFR0, 32, 1 << 1, "TGRAN16_2: the host's, or none", below=False),
    Field(ids.ID_AA64MMFR0, 36, 1 << 1, "TGRAN64_2: the host's, or none", below=False),
    Field(ids.ID_AA64MMFR0, 40, 1 << 1, "TGRAN4_2: the host's, or none", below=False),
    Field(ids.ID_AA64PFR0, 0, 0, "EL0: not without AArch64", lowest=1, since=(6, 16)),
    Field(ids.ID_AA64PFR0, 4, 0, "EL1: not without AArch64", lowest=1, since=(6, 16)),
    Field(ids.CTR, 12, 1 << 8, "L1Ip: the host's, or VIPT", below=False),
)
"""Source: measured; the kernel's own table is arch/arm64/kernel/cpufeature.c (FTR_SIGNED, FTR_HIGHER_SAFE, FTR_EXACT),
with KVM's exceptions in arch/arm64/kvm/sys_regs.c (kvm_arm64_ftr_safe_value, set_id_aa64dfr0_el1, set_id_dfr0_el1)."""

_FIELDS = {(field.register, field.low): field for field in FIELDS}


def _is_id(profile: HostProfile, id: int) -> bool:
    return ids.fields_of(id)


def writable(profile: HostProfile, id: int) -> int:
    """Bits of the fields that a kernel lets be changed: what it says, else the nibbles in which a flip was taken."""
    if profile.writable_masks:
        return profile.writable_masks.get(id, 0)
    flips = taken_bits(profile, id)
    return sum(0xF << low for low in range(0, 64, 4) if flips >> low & 0xF)


@cache
def allowed(id: int, limit: int, may: int, release: tuple[int, int]) -> tuple[int, ...]:
    """Per nibble a mask of the values that it may have, where `limit` is the host's value of the register."""
    return tuple(_nibble(id, low, limit >> low & 0xF, may >> low & 0xF, release) for low in range(0, 64, 4))


def _nibble(id: int, low: int, host: int, may: int, release: tuple[int, int]) -> int:
    if not may:
        return 1 << host
    field = _FIELDS.get((id, low))
    field = field if field and release >= field.since else None
    if field is None or (may != 0xF and field.below):
        return sum(1 << v for v in range(16) if v & ~may == host & ~may and v & may <= host & may)
    lower = sum(1 << v for v in range(field.lowest, host)) if field.below else 0
    return 1 << host | field.values | lower


def _fields(at: Access, values: Words) -> Errnos:
    """Whatever field is outside of what the host allows: EINVAL, all features of the value being judged at once."""
    may, words = writable(at.guest.profile, at.id), values[:, 0]
    out = np.zeros(len(words), np.bool_)
    for limit, chosen in _groups(at):
        fixed = mask(~sum(0xF << 4 * n for n in range(16) if may >> 4 * n & 0xF))
        bad = (words ^ np.uint64(limit)) & fixed != 0
        for n, values_allowed in enumerate(allowed(at.id, limit, may, version(at.guest.profile))):
            if may >> 4 * n & 0xF and values_allowed != _ALL:
                nibble = words >> np.uint64(4 * n) & np.uint64(0xF)
                bad |= np.uint64(values_allowed) >> nibble & np.uint64(1) == 0
        out |= bad & chosen
    return invalid(out)


def _groups(at: Access) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The host's values of a register, mostly one, and the vCPUs that have each."""
    limits = at.initials()
    for limit in np.unique(limits).tolist():
        yield int(limit), limits == np.uint64(limit)


def ends_with_run(profile: HostProfile, id: int) -> bool:
    """Whether this kernel has ID registers that it compares with EBUSY after a run (since 6.5)."""
    return ids.fields_of(id) and any(no == errno.EBUSY for other, (no, _) in profile.after_run.items()
                                     if ids.fields_of(other))


def _busy(at: Access, values: Words) -> Errnos:
    if not at.guest.entered:
        return np.zeros(len(values), np.int64)
    wanted = _drop_implementation_defined(at, values) if at.id in _NONE_FIELDS else values
    return refused(wanted[:, 0] != at.word(), errno.EBUSY)


_NONE_FIELDS = {ids.ID_AA64DFR0: 8, ids.ID_DFR0: 24}


def _drop_implementation_defined(at: Access, values: Words) -> Words:
    low = np.uint64(_NONE_FIELDS[at.id])
    nibble = np.uint64(0xF) << low
    return np.where(values & nibble == nibble, values & ~nibble, values)


def _first_debug(at: Access, values: Words) -> Errnos:
    return invalid(values[:, 0] & np.uint64(0xF) < np.uint64(6))


def _first_perfmon(at: Access, values: Words) -> Errnos:
    """PMUv3 or none; all ones are none."""
    version = values[:, 0] >> np.uint64(24) & np.uint64(0xF)
    return invalid((version != 0) & (version < np.uint64(3)))


def _first_aarch64(at: Access, values: Words) -> Errnos:
    """EL0 and EL1 with AArch64."""
    return invalid((values[:, 0] & np.uint64(0xF) == 0) | (values[:, 0] & np.uint64(0xF0) == 0))


def _first_l1ip(at: Access, values: Words) -> Errnos:
    """VPIPT (0) and AIVIVT (1) are reserved."""
    return invalid(values[:, 0] >> np.uint64(14) & np.uint64(3) < np.uint64(2))


def _looked_at_first(*wanted: int, release: tuple[int, int] = (6, 7)) -> About:
    """Registers whose own check comes before that of a run, on kernels that have ID registers once a VM."""
    return lambda profile, id: id in wanted and since(profile, *release) and ends_with_run(profile, id)


def _implementation(at: Access, values: Words) -> Errnos:
    """Only the value that it has, unless KVM_CAP_ARM_WRITABLE_IMP_ID_REGS was enabled and no vCPU has run."""
    other = values[:, 0] != at.word()
    if _WRITABLE_IMP_ID_REGS not in at.guest.told:
        return invalid(other)
    if at.guest.entered:
        return refused(other, errno.EBUSY)
    return invalid(other & (values[:, 0] & mask(~at.guest.profile.writable_masks.get(at.id, 0)) != 0))


_WRITABLE_IMP_ID_REGS = 239


def _clidr(at: Access, values: Words) -> Errnos:
    """Without the host's CTR_EL0.IDC (read_sanitised_ftr_reg) a hierarchy that needs no cleaning to a level of
    unification is refused; what the guest's CTR_EL0 says does not count."""
    words = values[:, 0]
    louis, loc, louu = (words >> np.uint64(low) & np.uint64(7) for low in (21, 24, 27))
    needs_none = (loc == 0) | ((louis == 0) & (louu == 0))
    idc = at.of(ids.CTR).initials() >> np.uint64(28) & np.uint64(1)
    fixed = mask(~taken_bits(at.guest.profile, at.id))
    return invalid((words & fixed != 0) | (needs_none & (idc == 0)))


def _clidr_written(profile: HostProfile, id: int) -> bool:
    return id == ids.CLIDR and taken_bits(profile, id) != 0


def _clidr_fixed(profile: HostProfile, id: int) -> bool:
    return id == ids.CLIDR and taken_bits(profile, id) == 0


def _same(at: Access, values: Words) -> Errnos:
    return invalid(values[:, 0] != at.word())


def _ccsidr(at: Access, values: Words) -> Errnos:
    """A cache line shorter than CTR_EL0 promises is refused: log2 of its words is DminLine, or IminLine."""
    selector = at.id & 0xFF
    low = np.uint64(0 if selector & 1 else 16)
    shortest = (at.of(ids.CTR).initials() >> low & np.uint64(0xF)) + np.uint64(2)
    fixed = mask(~kept(at.guest.profile, at.id))
    short = (values[:, 0] & np.uint64(7)) + np.uint64(4) < shortest
    return invalid(short | (values[:, 0] & fixed & np.uint64(0xFFFF_FFFF) != 0))


def _ccsidr_written(profile: HostProfile, id: int) -> bool:
    return id in ids.CCSIDR_IDS and taken_bits(profile, id) != 0


def _ccsidr_fixed(profile: HostProfile, id: int) -> bool:
    return id in ids.CCSIDR_IDS and taken_bits(profile, id) == 0


RULES: tuple[Rule, ...] = (
    Rule("a debug version of Armv8.0 or later", _looked_at_first(ids.ID_AA64DFR0, ids.ID_DFR0),
         "set_id_aa64dfr0_el1(), set_id_dfr0_el1() since 6.7", refuse=_first_debug),
    Rule("PMUv3 or none", _looked_at_first(ids.ID_DFR0), "set_id_dfr0_el1() since 6.7", refuse=_first_perfmon),
    Rule("AArch64 at EL0 and EL1", _looked_at_first(ids.ID_AA64PFR0, release=(6, 16)),
         "set_id_aa64pfr0_el1(), measured: 7.2, not 6.12", refuse=_first_aarch64),
    Rule("an instruction cache policy that is not reserved", _looked_at_first(ids.CTR, release=(6, 14)),
         "set_ctr_el0(), measured: 7.2, not 6.12", refuse=_first_l1ip),
    Rule("final after the first run", ends_with_run, "set_id_reg() since 6.5", refuse=_busy),
    Rule("fields are the host's or lower", _is_id, f"arm64_check_features(); {_MEASURED}", refuse=_fields),
    Rule("an implementation-defined PMU is none", registers(*_NONE_FIELDS), "set_id_aa64dfr0_el1(), set_id_dfr0_el1()",
         keep=_drop_implementation_defined),
    Rule("implementation ids", registers(*ids.IMPLEMENTATION), "set_imp_id_reg() since 6.15, before that invariant",
         refuse=_implementation),
    Rule("cache levels fit CTR_EL0", _clidr_written, "set_clidr() since 6.3", refuse=_clidr),
    Rule("cache levels are the host's", _clidr_fixed, "invariant up to 6.2", refuse=_same),
    Rule("cache lines fit CTR_EL0", _ccsidr_written, "set_ccsidr() since 6.3", refuse=_ccsidr),
    Rule("cache geometry is the host's", _ccsidr_fixed, "demux_c15_set() up to 6.2", refuse=_same),
)
