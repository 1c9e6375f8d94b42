"""Rules for arm64, the exceptions before what they are exceptions from. Measured on the lab's kernels 5.10 to 7.2."""

from __future__ import annotations

from collections.abc import Callable

from migstream.model import Slot
from migstream.registers import vcpu_features
from migstream.registers.bits import describe
from migstream.verdicts import facts, id_fields
from migstream.verdicts.facts import (
    BY_NAME,
    NEVER_WRITTEN,
    Case,
    above_default,
    absent,
    bits_clear,
    both,
    constant,
    guest_lacks,
    loses_bits,
    no_feature,
    refuses_bits,
    saved_with,
    value,
)
from migstream.verdicts.model import Answer, Kernel
from migstream.verdicts.rule import Rule

_FITS, _AS, _HARMLESS, _NOTICED, _REFUSED = Answer
_SYSREGS = "arch/arm64/kvm/sys_regs.c"
_HYPERCALLS = "arch/arm64/kvm/hypercalls.c; Documentation/virt/kvm/arm/fw-pseudo-registers.rst"
_LAB = "measured in the lab"
_TIMER_ON, _OS_LOCK_CLEAR, _PMUV3P5 = 1, 8, 6


def _never_written(case: Case) -> bool:
    """The saving kernel never had it written, and the host's own reset value is another."""
    return case.known.only(NEVER_WRITTEN) and case.default not in (None, NEVER_WRITTEN)


def _counters_of_32_bits(dfr0: Case) -> bool:
    return max(dfr0.known.numbers) >> 8 & 0xF < _PMUV3P5


def _host_default(case: Case) -> int:
    assert case.default is not None
    return case.default


def _behaves_as(case: Case) -> int | None:
    """What the host behaves as where it has no such register; None where its profile does not say."""
    known = case.pair.host_behaves_as.get(case.slot.id)
    return int.from_bytes(known, "little") if known is not None else BEHAVES_AS.get(case.row.name)


BEHAVES_AS: dict[str, int] = {"VENDOR_HYP_BMAP_2": 0}
"""What every kernel without the register behaves as, where that is one and the same (hypercalls.c before 6.15)."""


def _like_the_host(case: Case) -> bool:
    """The value is what the host behaves as without the register."""
    meant = _behaves_as(case)
    return meant is not None and case.known.only(meant)


def _lost_calls(case: Case) -> str:
    meant = _behaves_as(case)
    lost = case.known.numbers[-1] & ~(meant or 0)
    names = ", ".join(describe(case.fields, lost)) or "nothing"
    if meant is None:
        return f"this kernel has no such register, and nobody has asked what it behaves as; the guest has {names}"
    return f"hypercalls go away ({names})" if lost else f"new hypercalls appear; this kernel can't hide {meant:#x}"


def _listed_for(case: Case) -> str:
    needed = [name for mask, changed in case.host.feature_registers.items() if case.slot.id in changed
              for name in vcpu_features.names(mask & ~vcpu_features.DEFAULT)]
    where = f" for a vCPU like this; it depends on {' and '.join(needed)}" if needed else ""
    return f"this kernel does not list the register{where}"


def _dropped(case: Case) -> str:
    bits, default = case.pair.bits(case.slot.id), case.default
    assert bits is not None and default is not None
    lost = case.known.differing(default) & bits[0] & ~bits[1]
    return f"{', '.join(describe(case.fields, lost))} read as on this host: {default & lost:#x}"


_MODES_64, _MODES_EL2, _MODES_32 = {0, 4, 5}, {8, 9}, {0x11, 0x12, 0x13, 0x17, 0x1B, 0x1F}
_USER_32 = 0x10


def _bad_mode(case: Case) -> bool:
    """PSTATE.M: EL0t, EL1t, EL1h; EL2t and EL2h of a nested guest; of EL1_32BIT the AArch32 ones; User where the CPU
    has 32-bit EL0 (ID_AA64PFR0_EL1.EL0 is 2)."""
    features = case.pair.features
    allowed = _MODES_32 if features & 1 << 1 else _MODES_64 | (_MODES_EL2 if features & 1 << 7 else set())
    user = {_USER_32} if (case.pair.default(BY_NAME["ID_AA64PFR0_EL1"]) or 0) & 0xF == 2 else set()
    return any(number & 0x1F not in allowed | user for number in case.known.numbers)


def _not_the_lock(case: Case) -> bool:
    """Other bits than OSLK differ."""
    return case.default is not None and bool(case.known.differing(case.default) & ~_OSLK)


_OSLK, _COUNTERS, _UPPER = 2, 0xF800, 0xFFFF_FFFF << 32


def _fewer_counters(case: Case) -> bool:
    """PMCR_EL0.N is kept up to the host's, and there is nothing else that is not."""
    bits, default = case.pair.bits(case.slot.id), case.default
    if bits is None or default is None or not bits[0] & ~bits[1] & _COUNTERS:
        return False
    lost = case.known.differing(default) & bits[0] & ~bits[1] & ~_COUNTERS
    return not lost and all(number & _COUNTERS <= default & _COUNTERS for number in case.known.numbers)


def _upper_half_gone(case: Case) -> bool:
    """The host keeps 32 bits of this guest's counters: its PMUVer, where the host takes that, is below V3P5."""
    if case.default in (None, NEVER_WRITTEN) or bits_clear(_UPPER)(case):
        return False
    dfr0 = Case(case.pair, Slot(BY_NAME["ID_AA64DFR0_EL1"], 8))
    return _counters_of_32_bits(dfr0 if _taken(dfr0) or dfr0.default is None else dfr0.with_value(dfr0.default))


def _bitmap_above(case: Case) -> bool:
    if case.default is None:
        return False
    flipped = (case.pair.bits(case.slot.id) or (0, 0))[0]
    return bool(case.known.differing(case.default) & ~(flipped | case.default))


_PSCI_0_1, _PSCI_0_2, _PSCI_1_0 = 0x1, 0x2, 0x1_0000


def _no_psci(case: Case) -> bool:
    """No version at all, or one of the other kind: 0.1 is for vCPUs without PSCI_0_2, all others for those with it."""
    if not case.pair.features & vcpu_features.PSCI_0_2:
        return not case.known.only(_PSCI_0_1)
    return any(number != _PSCI_0_2 and number < _PSCI_1_0 for number in case.known.numbers)


_LEVELS_2 = {0: 0, 1: 0, 2: 3, 3: 3, 0x12: 3}
"""SMCCC_ARCH_WORKAROUND_2: what a write is checked as (hypercalls.c kvm_arm_set_fw_reg): 1 is UNKNOWN, 0x10 ENABLED."""


def _level(case: Case) -> int:
    """The level that KVM takes a written value for; above all levels where it is none."""
    number = max(case.known.numbers)
    return _LEVELS_2.get(number, 0x100) if case.row.name.endswith("_2") else number


_NOT_REQUIRED = 3
_PFR1, _SSBS = "ID_AA64PFR1_EL1", 0xF0


def _ssbs_goes(case: Case) -> bool:
    """The guest has no SSBS, the host has, and lets it be taken away: since 6.12, where a guest's own SSBS counts."""
    id = BY_NAME[_PFR1]
    host, bits = case.pair.default(id) or 0, case.pair.bits(id)
    return bool(host & _SSBS) and bits is not None and bool(bits[0] & _SSBS) and case.field_of(_PFR1, "SSBS") == 0


def _host_level(case: Case) -> int | None:
    """The level that the kernel has for this guest when the write comes: ID registers are written before.

    A CPU that is MITIGATED says NOT_AVAIL to those who have SSBS (PSTATE.SSBS is better) and NOT_REQUIRED to others.
    A CPU with SSBS that is VULNERABLE all the same (nospectre_v4) can't be told from it: no profile knows.
    """
    if case.row.name.endswith("_2") and case.default == 0 and _ssbs_goes(case) and _pfr1_taken(case):
        return _NOT_REQUIRED
    return case.default


def _pfr1_taken(case: Case) -> bool:
    return _taken(Case(case.pair, Slot(BY_NAME[_PFR1], 8)))


def _level_above(case: Case) -> bool:
    host = _host_level(case)
    return host is not None and _level(case) > host


def _level_below(case: Case) -> bool:
    host = _host_level(case)
    return host is not None and _level(case) < host


def _level_differs(case: Case) -> bool:
    host = _host_level(case)
    return host is not None and not case.known.only(host)


def _ssbs_open(case: Case) -> bool:
    """SSBS would go, but the register that has it is not taken as it was saved: what will be written decides."""
    return _ssbs_goes(case) and not _pfr1_taken(case)


def _level_met(case: Case) -> Kernel:
    """What a write of the saved level meets."""
    if _level_above(case):
        return Kernel.REFUSES
    return Kernel.DROPS if _level_differs(case) else Kernel.TAKES


def _told(case: Case, then: str) -> str:
    host = _host_level(case)
    return f"the guest was told level {max(case.known.numbers):#x}, this host has {host or 0:#x} for it; {then}"


def _level_text(then: str) -> Callable[[Case], str]:
    return lambda case: _told(case, then)


def _taken(case: Case) -> bool:
    verdict = id_fields.judge(case)
    return verdict is None or verdict.answer == Answer.FITS


def _gic_hidden(case: Case) -> bool:
    """There is an interrupt controller, and the guest's register says that there is none."""
    contract, fields = case.pair.saved.contract, {field.name: field for field in case.fields}
    mask = fields["GIC"].mask
    return "gic_distributor" in case.pair.saved.machine.devices and bits_clear(mask)(case) \
        and bool((case.default or 0) & mask) and not (contract and contract.kernel == case.host.kernel)


def _took_no_line(case: Case) -> bool:
    """A CCSIDR that set_ccsidr refuses: lines shorter than CTR_EL0's least."""
    ctr = case.pair.default(BY_NAME["CTR_EL0"])
    if constant(case) or ctr is None:
        return False
    shift = 0 if (case.slot.id & 1) else 16
    least = (ctr >> shift & 0xF) - 2  # log2 of words, of bytes less 4
    return any(number & 7 < least for number in case.known.numbers)


def _lengths_refused(case: Case) -> bool:
    """KVM takes all of the host's lengths up to some maximum, and no other set."""
    host = case.default or 0
    return any(not number or number != host & (1 << number.bit_length()) - 1 for number in case.known.numbers)


def _beyond_counters(case: Case) -> bool:
    """A counter that the guest's PMCR_EL0.N does not admit: its accesses are UNDEFINED, so nothing is lost."""
    number = case.slot.id & 0x1F  # PMEVCNTR<n>_EL0 and PMEVTYPER<n>_EL0: CRm<1:0>, op2
    here = case.field_of("PMCR_EL0", "N")
    return here is not None and number >= here


def _revision_above(case: Case) -> bool:
    return case.default is not None and case.known.numbers[-1] >> 12 & 0xF > case.default >> 12 & 0xF


def _other_chip(case: Case) -> bool:
    """Other bits than the revision differ."""
    return case.default is not None and bool(case.known.differing(case.default) & ~_REVISION)


_REVISION, _FIRST_REVISION = 0xF000, 2


def _unequal_identity(case: Case) -> bool:
    return facts.differs(case) and constant(case)


RULES: tuple[Rule, ...] = (
    # not there, and the guest can't tell
    Rule("PM*", both(absent, no_feature(vcpu_features.PMU_V3)), _HARMLESS,
         "its vCPUs have no PMU; the saving kernel lists PMU registers all the same",
         f"{_SYSREGS} pmu_visibility (since 5.11); 5.10 lists 74 which read 0x1de7ec7edbadc0de, {_LAB}"),
    Rule("TCR2_EL1 TCR2_EL2", both(absent, guest_lacks("ID_AA64MMFR3_EL1", "TCRX")), _HARMLESS,
         "the guest's ID_AA64MMFR3_EL1 has no TCRX", f"{_SYSREGS} tcr2_visibility (6.13, 0fcb4eea5345)"),
    Rule("PIR_EL? PIRE0_EL?", both(absent, guest_lacks("ID_AA64MMFR3_EL1", "S1PIE")), _HARMLESS,
         "the guest's ID_AA64MMFR3_EL1 has no S1PIE", f"{_SYSREGS} s1pie_visibility (6.13, a68cddbe47ef)"),
    Rule("POR_EL?", both(absent, guest_lacks("ID_AA64MMFR3_EL1", "S1POE")), _HARMLESS,
         "the guest's ID_AA64MMFR3_EL1 has no S1POE", f"{_SYSREGS} s1poe_visibility"),
    Rule("SCTLR2_EL?", both(absent, guest_lacks("ID_AA64MMFR3_EL1", "SCTLRX")), _HARMLESS,
         "the guest's ID_AA64MMFR3_EL1 has no SCTLRX", f"{_SYSREGS} sctlr2_visibility"),
    Rule("ID_AA64ZFR0_EL1", both(absent, guest_lacks("ID_AA64PFR0_EL1", "SVE"), value(0)), _HARMLESS,
         "the guest's ID_AA64PFR0_EL1 has no SVE, and the register reads 0 without it",
         f"{_SYSREGS} (73433762fcae hid it without SVE: a register list that differs)"),
    Rule("ID_* S3_0_0_* MVFR?_EL1", both(absent, value(0)), _HARMLESS,
         "an ID register that is not listed reads 0, as the guest saw it", f"{_SYSREGS} ID_UNALLOCATED, ID_HIDDEN"),
    Rule("OSLSR_EL1", both(absent, value(_OS_LOCK_CLEAR)), _HARMLESS,
         "the OS lock is clear, and kernels without the register show it clear",
         f"{_SYSREGS} trap_oslsr_el1; writable since 5.18 (d42e26716d03)"),
    Rule("OSLSR_EL1", absent, _NOTICED, "the OS lock is set, and this kernel shows it clear", _SYSREGS),
    Rule("PTIMER_CTL", both(absent, bits_clear(_TIMER_ON)), _HARMLESS, "the physical timer is off",
         "arch/arm64/kvm/arch_timer.c; listed since 6.4"),
    Rule("PTIMER_CVAL", both(absent, saved_with("PTIMER_CTL", bits_clear(_TIMER_ON))), _HARMLESS,
         "the physical timer is off", "arch/arm64/kvm/arch_timer.c; listed since 6.4"),
    Rule("PTIMER_CTL PTIMER_CVAL", absent, _NOTICED, "the physical timer runs, and this kernel can't set it: it never "
         "fires", "arch/arm64/kvm/arch_timer.c; listed since 6.4"),
    Rule("PTIMER_CNT", absent, _NOTICED, "CNTPCT_EL0 jumps: this kernel shows the host's physical counter, the "
         "saving one kept the guest's own going",
         "arch/arm64/kvm/arch_timer.c; a physical offset since 6.4"),
    Rule("CCSIDR*", absent, _HARMLESS, "cache geometry is the host's; set/way maintenance by a guest is trapped",
         f"{_SYSREGS} demux_c15_set; design: not the guest's business unless policy says so"),
    # firmware
    Rule("*_BMAP *_BMAP_2 KVM_REG_ARM_FW_FEAT_BMAP_REG*", both(absent, _like_the_host), _HARMLESS,
         "a kernel without the register behaves as {value}", _HYPERCALLS),
    Rule("*_BMAP *_BMAP_2 KVM_REG_ARM_FW_FEAT_BMAP_REG*", absent, _NOTICED, _lost_calls, _HYPERCALLS),
    Rule("*_BMAP *_BMAP_2 KVM_REG_ARM_FW_FEAT_BMAP_REG*", _bitmap_above, _NOTICED,
         "hypercalls that this kernel has not: {bits}", _HYPERCALLS),
    Rule("PSCI_VERSION", _no_psci, _REFUSED, "{value} is no PSCI version for a vCPU with these features",
         "arch/arm64/kvm/hypercalls.c kvm_arm_set_fw_reg"),
    Rule("PSCI_VERSION", above_default, _REFUSED, "PSCI {value}, this kernel has at most {host}", _HYPERCALLS),
    Rule("SMCCC_ARCH_WORKAROUND_?", absent, _NOTICED, "this kernel does not say whether the guest needs the "
         "workaround; the guest was told {value}", _HYPERCALLS),
    Rule("SMCCC_ARCH_WORKAROUND_2", _ssbs_open, _NOTICED, "the guest's ID_AA64PFR1_EL1 has no SSBS and can't be taken "
         "as it is: SSBS, and with it this level, is what is written instead; the guest was told {value}",
         "arch/arm64/kvm/hypercalls.c get_kernel_wa_level: kvm_has_feat SSBS (6.12, e8d164974cfa)", _level_met),
    Rule("SMCCC_ARCH_WORKAROUND_?", _level_above, _REFUSED,
         _level_text("a write only checks, and this one is refused"), _HYPERCALLS),
    Rule("SMCCC_ARCH_WORKAROUND_?", _level_below, _NOTICED, _level_text("it hears that when it asks again: a write is "
         "only checked, not stored"), _HYPERCALLS, Kernel.DROPS),
    Rule("SMCCC_ARCH_WORKAROUND_?", _level_differs, _FITS,
         "level {value} is checked against the host's {host} and not stored", _HYPERCALLS, Kernel.DROPS),
    # identity and geometry
    Rule("CLIDR_EL1 CCSIDR*", _unequal_identity, _HARMLESS,
         "cache geometry {value} is not this host's {host}, which it lets nobody change; a guest's set/way maintenance "
         "is trapped", f"{_SYSREGS} set_invariant_sys_reg, demux_c15_set: a constant up to 6.2"),
    Rule("CLIDR_EL1", refuses_bits, _HARMLESS, "cache geometry {value} has bits that this kernel takes from nobody "
         "({host} stays); a guest's set/way maintenance is trapped", f"{_SYSREGS} set_clidr"),
    Rule("CCSIDR*", _took_no_line, _HARMLESS, "cache geometry {value} has lines shorter than CTR_EL0's least "
         "({host} stays); a guest's set/way maintenance is trapped", f"{_SYSREGS} set_ccsidr"),
    Rule("MIDR_EL1 REVIDR_EL1 AIDR_EL1", _unequal_identity, _NOTICED,
         "{value}, this host's CPU is {host}: errata that a guest works around go by it",
         f"{_SYSREGS} set_imp_id_reg; writable with KVM_CAP_ARM_WRITABLE_IMP_ID_REGS (6.15) only"),
    Rule("SVE_VLS", _lengths_refused, _NOTICED,
         "vector lengths {value}, this host has {host}", "arch/arm64/kvm/guest.c set_sve_vls: all the host's lengths "
         "up to a maximum"),
    Rule("ID_AA64PFR0_EL1 ID_PFR1_EL1", both(_taken, _gic_hidden), _NOTICED, "GIC 0, and the VM has a GICv3: some "
         "kernels say so again with the first run",
         "arch/arm64/kvm/vgic/vgic-init.c kvm_vgic_finalize_idregs; measured: 6.12 keeps the 0, 7.2 does not",
         Kernel.TAKES),
    # interrupt controller
    Rule("GICD_IIDR", _other_chip, _NOTICED, "{value}, this kernel's interrupt controller is {host}: another "
         "implementation", "arch/arm64/kvm/vgic/vgic-mmio-v3.c vgic_mmio_uaccess_write_v3_misc"),
    Rule("GICD_IIDR", _revision_above, _NOTICED, "{value}, this kernel's interrupt controller is an older revision "
         "({host})", "Documentation/virt/kvm/devices/arm-vgic-v3.rst"),
    Rule("GICD_IIDR", lambda case: min(case.known.numbers) >> 12 & 0xF < _FIRST_REVISION, _NOTICED,
         "{value}: kernels take no revision below 2", "arch/arm64/kvm/vgic/vgic-mmio-v3.c; measured on 5.10 to 7.2"),
    Rule("GICR_CTLR", saved_with("GICD_IIDR", _revision_above), _NOTICED,
         "CES and IR read 0 before revision 3", "arch/arm64/kvm/vgic/vgic-mmio-v3.c", Kernel.DROPS),
    # state
    Rule("PMEVCNTR*", both(_never_written, saved_with("ID_AA64DFR0_EL1", _counters_of_32_bits)), _AS,
         "{host}: never written by the guest, and its counters have 32 bits",
         "arch/arm64/kvm/pmu-emul.c kvm_pmc_is_64bit: PMUVer below V3P5", Kernel.DROPS, write=_host_default),
    Rule("PM*", both(_never_written, loses_bits), _AS,
         "{host}: never written by the guest, so UNKNOWN after reset; this kernel's own reset value",
         f"{_SYSREGS} reset_unknown, reset_pmu_reg (5.14)", Kernel.DROPS, write=_host_default),
    Rule("PSTATE", _bad_mode, _REFUSED, "a mode that a vCPU with these features can't be in",
         "arch/arm64/kvm/guest.c set_core_reg"),
    Rule("OSLSR_EL1", _not_the_lock, _REFUSED, "{value}: only OSLK may be another than in {host}",
         f"{_SYSREGS} set_oslsr_el1"),
    Rule("PMCR_EL0", _fewer_counters, _FITS, "",
         f"{_SYSREGS} set_pmcr: a number of counters up to the host's is kept, a larger one ignored (6.7)",
         Kernel.TAKES, target=lambda case: case.slot),
    Rule("PMEVCNTR*", _upper_half_gone, _FITS, "the guest's counters have 32 bits; what is above is not kept",
         "arch/arm64/kvm/pmu-emul.c kvm_pmc_is_64bit: PMUVer below V3P5", Kernel.DROPS,
         target=lambda case: case.slot),
    Rule("PM*", loses_bits, _NOTICED, _dropped, "profile: bits that read back, by trial", Kernel.DROPS),
    Rule("PMEVCNTR* PMEVTYPER*", both(absent, _beyond_counters), _HARMLESS,
         "the guest's PMCR_EL0.N has no such counter", "Arm ARM D24.5, PMEVCNTR<n>_EL0; pmu-emul.c: a list of 31 "
         "whatever N is, or of those that there are"),
    # and what is left
    Rule("*", absent, _REFUSED, _listed_for, "profile: KVM_GET_REG_LIST"),
)

ID_REGISTERS = "ID_* S3_0_0_* MVFR?_EL1 CTR_EL0"
"""Judged field by field, after the rows above."""
