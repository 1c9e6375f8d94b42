"""The system registers that KVM/arm64 lists: one row each, by the architecture's names, grouped by what brings them.

Names and encodings: Arm ARM (DDI 0487) and Linux arch/arm64/tools/sysreg. Which KVM lists, when, and what a write
checks: arch/arm64/kvm/sys_regs.c, 5.10 to 7.x; what each vCPU feature adds:
tools/testing/selftests/kvm/arm64/get-reg-list.c. A reserved encoding of the ID space is named as sys_regs.c
names it, `S3_0_0_c4_3`.

The order of the rows is the order of a restore; ORDER_AFTER in `migstream.registers.arm64` says where it matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from migstream.model import Klass, Phase, Scope
from migstream.registers.arm64_ids import sysreg
from migstream.registers.catalogue import Register

Encoding = tuple[int, int, int, int, int]
"""op0, op1, CRn, CRm, op2."""


@dataclass(frozen=True, slots=True)
class SysReg:
    """One row, or with `count` a row for each number from 0, which becomes `{}` in the name.

    Attributes:
        name: the architecture's. encoding: of the first. why: reason, "" for the group's.
        step: distance of two numbered ones; the encoding counts as one number, op2 lowest.
    """

    name: str
    encoding: Encoding
    why: str = ""
    count: int = 1
    step: int = 1

    def expand(self) -> Iterator[tuple[int, str]]:
        """Ids and names."""
        first = sysreg(*self.encoding)
        for number in range(self.count):
            yield first + number * self.step, self.name.format(number)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with one reason and one place in a restore.

    Attributes:
        why: for the rows that have none of their own.
        scope_fixed: False where kernels differ in whether they keep the register once a VM.
    """

    rows: tuple[SysReg, ...]
    why: str
    scope: Scope = Scope.VCPU
    phase: Phase = Phase.STATE
    klass: Klass = Klass.STATE
    scope_fixed: bool = True

    def registers(self) -> Iterator[Register]:
        """The rows of the catalogue. A numbered register's bit table is that of its name with `n`."""
        for row in self.rows:
            for id, name in row.expand():
                yield Register(id, name, 8, self.scope, self.phase, self.klass, row.why or self.why,
                               bits=row.name.format("n"), scope_fixed=self.scope_fixed)


_NAMED_IDS: dict[tuple[int, int], str] = {
    **{(1, op2): f"ID_{name}_EL1" for op2, name in enumerate(
        ("PFR0", "PFR1", "DFR0", "AFR0", "MMFR0", "MMFR1", "MMFR2", "MMFR3"))},
    **{(2, op2): f"ID_{name}_EL1" for op2, name in enumerate(
        ("ISAR0", "ISAR1", "ISAR2", "ISAR3", "ISAR4", "ISAR5", "MMFR4", "ISAR6"))},
    (3, 0): "MVFR0_EL1", (3, 1): "MVFR1_EL1", (3, 2): "MVFR2_EL1",
    (3, 4): "ID_PFR2_EL1", (3, 5): "ID_DFR1_EL1", (3, 6): "ID_MMFR5_EL1",
    (4, 0): "ID_AA64PFR0_EL1", (4, 1): "ID_AA64PFR1_EL1", (4, 2): "ID_AA64PFR2_EL1", (4, 4): "ID_AA64ZFR0_EL1",
    (4, 5): "ID_AA64SMFR0_EL1", (4, 7): "ID_AA64FPFR0_EL1",
    (5, 0): "ID_AA64DFR0_EL1", (5, 1): "ID_AA64DFR1_EL1", (5, 2): "ID_AA64DFR2_EL1", (5, 4): "ID_AA64AFR0_EL1",
    (5, 5): "ID_AA64AFR1_EL1",
    **{(6, op2): f"ID_AA64ISAR{op2}_EL1" for op2 in range(4)},
    **{(7, op2): f"ID_AA64MMFR{op2}_EL1" for op2 in range(5)},
}

_READS_0 = "reserved in the ID space: reads 0, only 0 may be written"
_ID_WHY = {
    "ID_AA64PFR0_EL1": "once a VM in 6.1 already (CSV2, CSV3); its SVE field says whether ID_AA64ZFR0_EL1 is seen",
    "ID_AA64PFR1_EL1": "once a VM since 6.5; its SSBS field decides what SMCCC_ARCH_WORKAROUND_2 is checked against",
    "ID_AA64MMFR3_EL1": "once a VM since 6.5; TCRX, S1PIE, S1POE and SCTLRX say which of TCR2, PIR, POR, SCTLR2 exist",
}
ID_REGISTERS = Group(
    tuple(SysReg(name, (3, 0, 0, crm, op2), _ID_WHY.get(name, _READS_0 if name.startswith("S3") else ""))
          for crm in range(1, 8) for op2 in range(8)
          for name in [_NAMED_IDS.get((crm, op2), f"S3_0_0_c{crm}_{op2}")]),
    "once a VM since 6.5, before that a constant that a write must match; fixed by the first KVM_RUN",
    Scope.VM, Phase.FEATURE, Klass.FEATURE, scope_fixed=False)

CTR = Group(
    (SysReg("CTR_EL0", (3, 3, 0, 0, 1)),),
    "once a VM and writable since 6.11, before that a constant that a write must match; CLIDR_EL1 is checked against "
    "its IDC",
    Scope.VM, Phase.FEATURE, Klass.FEATURE, scope_fixed=False)

IMPLEMENTATION = Group(
    (SysReg("MIDR_EL1", (3, 0, 0, 0, 0)), SysReg("REVIDR_EL1", (3, 0, 0, 0, 6)), SysReg("AIDR_EL1", (3, 1, 0, 0, 7))),
    "the host CPU's, and a write must match; once a VM and writable with KVM_CAP_ARM_WRITABLE_IMP_ID_REGS (6.15)",
    Scope.VM, Phase.FEATURE, Klass.IDENTITY, scope_fixed=False)

TOPOLOGY = Group(
    (SysReg("MPIDR_EL1", (3, 0, 0, 0, 5), "which vCPU this is: before the GIC, whose redistributors are told by it, "
                                          "and before the first KVM_RUN, when newer kernels index vCPUs by it"),
     SysReg("CLIDR_EL1", (3, 1, 0, 0, 1), "cache geometry: the host's up to 6.2, then a value of the vCPU's own, "
                                          "checked against CTR_EL0.IDC")),
    "", Scope.VCPU, Phase.FEATURE, Klass.IDENTITY)

VECTOR_CONTROL = Group(
    (SysReg("ZCR_EL1", (3, 0, 1, 2, 0)), SysReg("ZCR_EL2", (3, 4, 1, 2, 0)),
     SysReg("SMCR_EL1", (3, 0, 1, 2, 6)), SysReg("SMCR_EL2", (3, 4, 1, 2, 6)),
     SysReg("SMPRI_EL1", (3, 0, 1, 2, 4)), SysReg("SMPRIMAP_EL2", (3, 4, 1, 2, 5)),
     SysReg("SVCR", (3, 3, 4, 2, 2), "SVCR.SM says which vector registers there are: before Z, P and FFR"),
     SysReg("FPMR", (3, 3, 4, 4, 2), "FP8 mode: before the vector registers, beside SVCR")),
    "vector length and mode: before Z, P and FFR, which it shapes")

EL2 = Group(
    (SysReg("HCR_EL2", (3, 4, 1, 1, 0), "nested: its E2H says how the other EL2 registers are laid out: first of them"),
     SysReg("VPIDR_EL2", (3, 4, 0, 0, 0)), SysReg("VMPIDR_EL2", (3, 4, 0, 0, 5)),
     SysReg("SCTLR_EL2", (3, 4, 1, 0, 0)), SysReg("ACTLR_EL2", (3, 4, 1, 0, 1)), SysReg("SCTLR2_EL2", (3, 4, 1, 0, 3)),
     SysReg("MDCR_EL2", (3, 4, 1, 1, 1)), SysReg("CPTR_EL2", (3, 4, 1, 1, 2)), SysReg("HSTR_EL2", (3, 4, 1, 1, 3)),
     SysReg("HFGRTR_EL2", (3, 4, 1, 1, 4)), SysReg("HFGWTR_EL2", (3, 4, 1, 1, 5)),
     SysReg("HFGITR_EL2", (3, 4, 1, 1, 6)), SysReg("HACR_EL2", (3, 4, 1, 1, 7)), SysReg("TRFCR_EL2", (3, 4, 1, 2, 1)),
     SysReg("HCRX_EL2", (3, 4, 1, 2, 2)), SysReg("SDER32_EL2", (3, 4, 1, 3, 1)), SysReg("NVHCR_EL2", (3, 4, 1, 5, 0)),
     SysReg("TTBR0_EL2", (3, 4, 2, 0, 0)), SysReg("TTBR1_EL2", (3, 4, 2, 0, 1)), SysReg("TCR_EL2", (3, 4, 2, 0, 2)),
     SysReg("TCR2_EL2", (3, 4, 2, 0, 3)), SysReg("VTTBR_EL2", (3, 4, 2, 1, 0)), SysReg("VTCR_EL2", (3, 4, 2, 1, 2)),
     SysReg("VNCR_EL2", (3, 4, 2, 2, 0)), SysReg("GCSCR_EL2", (3, 4, 2, 5, 0)), SysReg("GCSPR_EL2", (3, 4, 2, 5, 1)),
     SysReg("HDFGRTR2_EL2", (3, 4, 3, 1, 0)), SysReg("HDFGWTR2_EL2", (3, 4, 3, 1, 1)),
     SysReg("HFGRTR2_EL2", (3, 4, 3, 1, 2)), SysReg("HFGWTR2_EL2", (3, 4, 3, 1, 3)),
     SysReg("HDFGRTR_EL2", (3, 4, 3, 1, 4)), SysReg("HDFGWTR_EL2", (3, 4, 3, 1, 5)),
     SysReg("HAFGRTR_EL2", (3, 4, 3, 1, 6)), SysReg("HFGITR2_EL2", (3, 4, 3, 1, 7)),
     SysReg("SPSR_EL2", (3, 4, 4, 0, 0)), SysReg("ELR_EL2", (3, 4, 4, 0, 1)), SysReg("SP_EL2", (3, 6, 4, 1, 0)),
     SysReg("AFSR0_EL2", (3, 4, 5, 1, 0)), SysReg("AFSR1_EL2", (3, 4, 5, 1, 1)), SysReg("ESR_EL2", (3, 4, 5, 2, 0)),
     SysReg("VSESR_EL2", (3, 4, 5, 2, 3)), SysReg("TFSR_EL2", (3, 4, 5, 6, 0)), SysReg("FAR_EL2", (3, 4, 6, 0, 0)),
     SysReg("HPFAR_EL2", (3, 4, 6, 0, 4)), SysReg("MAIR_EL2", (3, 4, 10, 2, 0)), SysReg("PIRE0_EL2", (3, 4, 10, 2, 2)),
     SysReg("PIR_EL2", (3, 4, 10, 2, 3)), SysReg("POR_EL2", (3, 4, 10, 2, 4)), SysReg("AMAIR_EL2", (3, 4, 10, 3, 0)),
     SysReg("VBAR_EL2", (3, 4, 12, 0, 0)), SysReg("RVBAR_EL2", (3, 4, 12, 0, 1)), SysReg("VDISR_EL2", (3, 4, 12, 1, 1)),
     SysReg("ICH_AP0R{}_EL2", (3, 4, 12, 8, 0), count=4), SysReg("ICH_AP1R{}_EL2", (3, 4, 12, 9, 0), count=4),
     SysReg("ICH_HCR_EL2", (3, 4, 12, 11, 0)), SysReg("ICH_VMCR_EL2", (3, 4, 12, 11, 7)),
     SysReg("ICH_LR{}_EL2", (3, 4, 12, 12, 0), count=16),
     SysReg("CONTEXTIDR_EL2", (3, 4, 13, 0, 1)), SysReg("TPIDR_EL2", (3, 4, 13, 0, 2)),
     SysReg("CNTHCTL_EL2", (3, 4, 14, 1, 0)), SysReg("CNTVOFF_EL2", (3, 4, 14, 0, 3))),
    "nested (KVM_ARM_VCPU_HAS_EL2): state of the guest's own hypervisor")

EL1 = Group(
    (SysReg("SCTLR_EL1", (3, 0, 1, 0, 0)), SysReg("ACTLR_EL1", (3, 0, 1, 0, 1)), SysReg("CPACR_EL1", (3, 0, 1, 0, 2)),
     SysReg("SCTLR2_EL1", (3, 0, 1, 0, 3), "exists where ID_AA64MMFR3_EL1.SCTLRX says so"),
     SysReg("TTBR0_EL1", (3, 0, 2, 0, 0)), SysReg("TTBR1_EL1", (3, 0, 2, 0, 1)), SysReg("TCR_EL1", (3, 0, 2, 0, 2)),
     SysReg("TCR2_EL1", (3, 0, 2, 0, 3), "6.12 lists it always, 6.13 where ID_AA64MMFR3_EL1.TCRX says so"),
     SysReg("AFSR0_EL1", (3, 0, 5, 1, 0)), SysReg("AFSR1_EL1", (3, 0, 5, 1, 1)), SysReg("ESR_EL1", (3, 0, 5, 2, 0)),
     SysReg("FAR_EL1", (3, 0, 6, 0, 0)), SysReg("PAR_EL1", (3, 0, 7, 4, 0)), SysReg("MAIR_EL1", (3, 0, 10, 2, 0)),
     SysReg("PIRE0_EL1", (3, 0, 10, 2, 2), "6.12 lists it always, 6.13 where ID_AA64MMFR3_EL1.S1PIE says so"),
     SysReg("PIR_EL1", (3, 0, 10, 2, 3), "6.12 lists it always, 6.13 where ID_AA64MMFR3_EL1.S1PIE says so"),
     SysReg("POR_EL1", (3, 0, 10, 2, 4), "exists where ID_AA64MMFR3_EL1.S1POE says so"),
     SysReg("POR_EL0", (3, 3, 10, 2, 4), "exists where ID_AA64MMFR3_EL1.S1POE says so"),
     SysReg("AMAIR_EL1", (3, 0, 10, 3, 0)), SysReg("VBAR_EL1", (3, 0, 12, 0, 0)), SysReg("DISR_EL1", (3, 0, 12, 1, 1)),
     SysReg("CONTEXTIDR_EL1", (3, 0, 13, 0, 1)), SysReg("TPIDR_EL1", (3, 0, 13, 0, 4)),
     SysReg("TPIDR_EL0", (3, 3, 13, 0, 2)), SysReg("TPIDRRO_EL0", (3, 3, 13, 0, 3)),
     SysReg("CNTKCTL_EL1", (3, 0, 14, 1, 0)), SysReg("CSSELR_EL1", (3, 2, 0, 0, 0))),
    "control and memory management of EL1 and EL0, kept as written")

AARCH32 = Group(
    (SysReg("DACR32_EL2", (3, 4, 3, 0, 0)), SysReg("IFSR32_EL2", (3, 4, 5, 0, 1)),
     SysReg("FPEXC32_EL2", (3, 4, 5, 3, 0)), SysReg("DBGVCR32_EL2", (2, 4, 0, 7, 0))),
    "AArch32 state of EL1; listed for every vCPU, KVM_ARM_VCPU_EL1_32BIT or not")

DEBUG = Group(
    (SysReg("OSLSR_EL1", (2, 0, 1, 1, 4), "stands for the OS lock; only OSLK may be written (since 5.18)"),
     SysReg("MDCCINT_EL1", (2, 0, 0, 2, 0)), SysReg("MDSCR_EL1", (2, 0, 0, 2, 2)),
     SysReg("DBGBVR{}_EL1", (2, 0, 0, 0, 4), count=16, step=8),
     SysReg("DBGBCR{}_EL1", (2, 0, 0, 0, 5), count=16, step=8),
     SysReg("DBGWVR{}_EL1", (2, 0, 0, 0, 6), count=16, step=8),
     SysReg("DBGWCR{}_EL1", (2, 0, 0, 0, 7), count=16, step=8)),
    "self-hosted debug; all 16 of each are listed, however many ID_AA64DFR0_EL1 admits")

POINTER_AUTH_ADDRESS = Group(
    tuple(SysReg(f"AP{key}KEY{half}_EL1", (3, 0, 2, crm, base + op2))
          for key, crm, base in (("IA", 1, 0), ("IB", 1, 2), ("DA", 2, 0), ("DB", 2, 2))
          for op2, half in enumerate(("LO", "HI"))),
    "pointer authentication key (KVM_ARM_VCPU_PTRAUTH_ADDRESS)")
POINTER_AUTH_GENERIC = Group(
    (SysReg("APGAKEYLO_EL1", (3, 0, 2, 3, 0)), SysReg("APGAKEYHI_EL1", (3, 0, 2, 3, 1))),
    "pointer authentication key (KVM_ARM_VCPU_PTRAUTH_GENERIC)")

MTE = Group(
    (SysReg("RGSR_EL1", (3, 0, 1, 0, 5)), SysReg("GCR_EL1", (3, 0, 1, 0, 6)), SysReg("TFSR_EL1", (3, 0, 5, 6, 0)),
     SysReg("TFSRE0_EL1", (3, 0, 5, 6, 1))),
    "memory tagging (KVM_CAP_ARM_MTE); the tags themselves travel with the RAM")

GCS_SME = Group(
    (SysReg("GCSCR_EL1", (3, 0, 2, 5, 0)), SysReg("GCSPR_EL1", (3, 0, 2, 5, 1)), SysReg("GCSCRE0_EL1", (3, 0, 2, 5, 2)),
     SysReg("GCSPR_EL0", (3, 3, 2, 5, 1)), SysReg("TPIDR2_EL0", (3, 3, 13, 0, 5)),
     SysReg("SMIDR_EL1", (3, 1, 0, 0, 6))),
    "guarded control stack and SME: in series on the list, in no kernel of the lab")

_RAW = "a second view of the SET register; 6.8 to 6.14 clear by it instead of storing: before SET"
PMU = Group(
    (SysReg("PMCR_EL0", (3, 3, 9, 12, 0), "its N says how many counters there are, which masks the others: first"),
     SysReg("PMSELR_EL0", (3, 3, 9, 12, 5)), SysReg("PMUSERENR_EL0", (3, 3, 9, 14, 0)),
     SysReg("PMSWINC_EL0", (3, 3, 9, 12, 4), "write-only to a guest; listed by mistake, reads 0, a write is ignored"),
     SysReg("PMCCFILTR_EL0", (3, 3, 14, 15, 7)),
     SysReg("PMEVTYPER{}_EL0", (3, 3, 14, 12, 0), "what is counted: before the count", count=31),
     SysReg("PMCCNTR_EL0", (3, 3, 9, 13, 0)), SysReg("PMEVCNTR{}_EL0", (3, 3, 14, 8, 0), count=31),
     SysReg("PMOVSCLR_EL0", (3, 3, 9, 12, 3), _RAW), SysReg("PMOVSSET_EL0", (3, 3, 9, 14, 3)),
     SysReg("PMINTENCLR_EL1", (3, 0, 9, 14, 2), _RAW), SysReg("PMINTENSET_EL1", (3, 0, 9, 14, 1)),
     SysReg("PMCNTENCLR_EL0", (3, 3, 9, 12, 2), _RAW),
     SysReg("PMCNTENSET_EL0", (3, 3, 9, 12, 1), "starts what it enables: last of the PMU")),
    "KVM_ARM_VCPU_PMU_V3; 5.10 lists them without it, and they read the pattern of what was never written")

PHYSICAL_TIMER_EL2 = Group(
    (SysReg("CNTHP_CVAL_EL2", (3, 4, 14, 2, 2)), SysReg("CNTHP_CTL_EL2", (3, 4, 14, 2, 1)),
     SysReg("CNTHV_CVAL_EL2", (3, 4, 14, 3, 2)), SysReg("CNTHV_CTL_EL2", (3, 4, 14, 3, 1))),
    "nested: the EL2 timers; compare value before control, which enables")
