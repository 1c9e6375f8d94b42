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

NOT_TAKEN: dict[tuple[str, str], frozenset[int]] = {
    ("ID_DFR0_EL1", "PerfMon"): frozenset((1, 2)),   # sys_regs.c set_id_dfr0_el1: KVM has no PMUv1 and PMUv2
}
"""Values that the kernel refuses whatever the host has."""

TAKEN_AS_0: dict[tuple[str, str], int] = {
    ("ID_DFR0_EL1", "PerfMon"): 0xF, ("ID_AA64DFR0_EL1", "PMUVer"): 0xF,
}
"""IMPDEF: once shown to guests by mistake; a kernel that lets the register be changed takes it, and has 0 for it
(sys_regs.c set_id_dfr0_el1, set_id_aa64dfr0_el1)."""

EXACT: dict[tuple[str, str], int] = {
    ("CTR_EL0", "L1Ip"): 2, ("ID_AA64MMFR0_EL1", "TGRAN4_2"): 1, ("ID_AA64MMFR0_EL1", "TGRAN16_2"): 1,
    ("ID_AA64MMFR0_EL1", "TGRAN64_2"): 1, ("ID_AA64ISAR1_EL1", "APA"): 0, ("ID_AA64ISAR1_EL1", "API"): 0,
    ("ID_AA64ISAR2_EL1", "APA3"): 0,
}
"""FTR_EXACT: another value than the host's has to be the one that the kernel calls safe."""

HIGHER: frozenset[tuple[str, str]] = frozenset((
    ("ID_AA64MMFR1_EL1", "SpecSEI"), ("ID_MMFR4_EL1", "SpecSEI")))
"""FTR_HIGHER_SAFE: to be told of an SError that never comes is safe, not to be told is not."""

SIGNED: frozenset[tuple[str, str]] = frozenset((("ID_MMFR0_EL1", "InnerShr"), ("ID_MMFR0_EL1", "OuterShr")))
"""S_ARM64_FTR_BITS whose names don't show it (cpufeature.c ftr_id_mmfr0)."""

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
    unnamed &= ~_tried(case)
    if not bad and not unnamed:
        return _taken(case, fields, number, default)
    names = [_difference(field, number, default) + (f" ({why})" if why else "") for field, why in bad]
    names += [f"bits {unnamed:#x}"] if unnamed else []
    kernel = Kernel.REFUSES if _has_trials(case) else Kernel.UNKNOWN
    return Verdict(case.slot, Answer.NOTICED, None, ", ".join(names), _SOURCE, kernel=kernel)


def _taken(case: Case, fields: list[Field], number: int, default: int) -> Verdict:
    """The kernel takes it; of some fields it takes the CPU's own value and goes on showing 0.

    ID_AA64PFR0_EL1.MPAM, ID_AA64PFR1_EL1.MPAM_frac, ID_AA64MMFR2_EL1.NV: shown by mistake once, so that older streams
    have them. No other value than the CPU's is taken. Those values are one bit each (0, 1; of NV also 2), so the
    trials of single bits, in which such a bit is taken and does not read back, have met all that there are.
    """
    lost = _dropped(case) | sum(field.mask for field in fields if _taken_as_0(case, field, number))
    names = [_difference(field, number, default) for field in fields if field.mask & lost & (number ^ default)]
    if not names:
        return Verdict(case.slot, Answer.FITS, case.slot, source=_SOURCE)
    return Verdict(case.slot, Answer.NOTICED, case.slot, f"{', '.join(names)} (this kernel takes it and shows its own)",
                   _SOURCE, kernel=Kernel.DROPS)


def _taken_as_0(case: Case, field: Field, number: int) -> bool:
    meant = TAKEN_AS_0.get((case.row.name, field.name))
    writable = _tried(case) or case.host.writable_masks.get(case.slot.id)
    return bool(writable) and meant is not None and (number & field.mask) >> field.low == meant


def _dropped(case: Case) -> int:
    """Bits that the kernel took flipped, and that read back as they were."""
    tried = case.pair.bits(case.slot.id)
    return tried[0] & ~tried[1] if tried else 0


def _refusal(case: Case, field: Field, number: int, default: int) -> str:
    """Why a field can't be what the guest saw; "" where it can."""
    key, changed = (case.row.name, field.name), (number ^ default) & field.mask
    if not changed:
        return ""
    if _taken_as_0(case, field, number):
        return ""
    if not (_tried(case) | case.host.writable_masks.get(case.slot.id, 0)) & field.mask:
        return "this kernel lets nobody change it" if _has_trials(case) else _NOBODY_TRIED
    if case.pair.bits(case.slot.id) is not None and changed.bit_count() == 1:  # this very value was tried
        return "" if changed & _tried(case) else "this kernel refused just that"
    wanted, has = _signed(case, field, number), _signed(case, field, default)
    if key in EXACT:
        return "" if wanted == EXACT[key] else f"this kernel takes {EXACT[key]} for it and nothing else"
    if (wanted < has) if key in HIGHER else (wanted > has):
        return "the host has more" if key in HIGHER else "the host has less"
    if wanted in NOT_TAKEN.get(key, ()):
        return "no kernel takes that"
    lowest = LOWEST.get(key)
    return f"this kernel takes nothing below {lowest}" if lowest is not None and wanted < lowest else ""


def _signed(case: Case, field: Field, number: int) -> int:
    value, signed = (number & field.mask) >> field.low, field.signed or (case.row.name, field.name) in SIGNED
    return value - (1 << field.width) if signed and value >> field.width - 1 else value


_NOBODY_TRIED = "nobody has tried whether this kernel lets it be changed"


def _has_trials(case: Case) -> bool:
    """Whether the profile was captured with the experiment, or the kernel says itself what can be written."""
    return bool(case.host.register_bits) or case.slot.id in case.host.writable_masks


def _tried(case: Case) -> int:
    """Bits that the kernel took flipped, one at a time."""
    tried = case.pair.bits(case.slot.id)
    return tried[0] if tried else 0


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
