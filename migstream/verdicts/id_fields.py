"""ID registers: judged field by field, as KVM compares them (arch/arm64/kernel/cpufeature.c, arm64_ftr_safe_value).

A field of a fresh VM may be lowered where the kernel says that it is writable; what `lower` is, the field's sign
decides. After the first KVM_RUN nothing may change any more, but a restore's VM never ran.
"""

from __future__ import annotations

from migstream.registers.bits import Field
from migstream.verdicts.facts import Case
from migstream.verdicts.model import Answer, Kernel, Verdict

_SOURCE = "arch/arm64/kvm/sys_regs.c set_id_reg, cpufeature.c arm64_ftr_safe_value; profile: writable bits, by trial"

LOWEST: dict[tuple[str, str], int] = {
    ("ID_AA64DFR0_EL1", "DebugVer"): 6,   # sys_regs.c set_id_aa64dfr0_el1: at least Armv8.0
    ("ID_DFR0_EL1", "CopDbg"): 6,         # sys_regs.c set_id_dfr0_el1
}
"""Fields that the kernel takes no lower than this."""

TAKEN_AND_DROPPED: frozenset[tuple[str, str]] = frozenset((
    ("ID_AA64PFR0_EL1", "MPAM"), ("ID_AA64PFR1_EL1", "MPAM_frac"), ("ID_AA64MMFR2_EL1", "NV")))
"""Fields that newer kernels take at the host CPU's own value and show as 0; whether they do, no profile says."""


def judge(case: Case) -> Verdict | None:
    """The answer for an ID register; None where the host's default isn't recorded or there is no difference.

    Raises: NotYet.
    """
    default = case.default
    if default is None or not (changed := case.known.differing(default)):
        return None
    fields = [field for field in case.fields if field.mask & changed]
    number = case.known.numbers[0]
    bad = [(field, why) for field in fields if (why := _refusal(case, field, number, default))]
    unnamed = changed & ~sum(field.mask for field in case.fields)
    if not bad and not (unnamed and not _writable(case, unnamed)):
        return Verdict(case.slot, Answer.FITS, case.slot, source=_SOURCE)
    names = [_difference(field, number, default) + (f" ({why})" if why else "") for field, why in bad]
    names += [f"bits {unnamed:#x}"] if unnamed else []
    open_question = all((case.row.name, field.name) in TAKEN_AND_DROPPED for field, _ in bad) and bad
    kernel = Kernel.UNKNOWN if open_question or not _tried(case) else Kernel.REFUSES
    return Verdict(case.slot, Answer.NOTICED, None, ", ".join(names), _SOURCE, kernel=kernel)


def _refusal(case: Case, field: Field, number: int, default: int) -> str:
    """Why a field can't be what the guest saw; "" where it can."""
    wanted, has = _signed(field, number), _signed(field, default)
    if not _writable(case, field.mask):
        return "this kernel lets nobody change it" if _tried(case) else _NOBODY_TRIED
    if wanted > has:
        return "the host has less"
    lowest = LOWEST.get((case.row.name, field.name))
    return f"this kernel takes nothing below {lowest}" if lowest is not None and wanted < lowest else ""


def _signed(field: Field, number: int) -> int:
    value = (number & field.mask) >> field.low
    return value - (1 << field.width) if field.signed and value >> field.width - 1 else value


_NOBODY_TRIED = "nobody has tried whether this kernel lets it be changed"


def _tried(case: Case) -> bool:
    """Whether the profile was captured with the experiment, or the kernel says itself what can be written."""
    return bool(case.host.register_bits) or case.slot.id in case.host.writable_masks


def _writable(case: Case, mask: int) -> bool:
    """By trial, or where single flips can't tell, by the kernel's own word."""
    tried = case.pair.bits(case.slot.id)
    told = case.host.writable_masks.get(case.slot.id, 0)
    return bool(((tried[0] if tried else 0) | told) & mask)


def _difference(field: Field, number: int, default: int) -> str:
    shown = [field.show(value & field.mask).partition("=")[2] or str((value & field.mask) >> field.low)
             for value in (number, default)]
    return f"{field.name} {shown[0]}, here {shown[1]}"


def nearest(case: Case) -> int | None:
    """The value that is the guest's in every field that the host can have so, and the host's own elsewhere."""
    default = case.default
    if default is None:
        return None
    number = case.known.numbers[0]
    value = default
    for field in case.fields:
        if not _refusal(case, field, number, default):
            value = value & ~field.mask | number & field.mask
    return value
