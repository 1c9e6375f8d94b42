"""arm64: one row a register, in the order in which a restore writes them, and the layouts of a VM.

The order's sources: Linux Documentation/virt/kvm/api.rst and arm/vcpu-features.rst (ID registers before everything
else), arch/arm64/kvm/{guest,sys_regs,hypercalls,arch_timer,pmu-emul}.c (what a write checks), and the orders that QEMU
and Firecracker use in production. Where a rule matters it is in ORDER_AFTER, with the reason.

What a kernel lists depends on its version, the CPU and the vCPU's features; the rows are for all of it, and
`layouts` takes what KVM_GET_REG_LIST said. Scope is the catalogue's guess until a host profile's experiment says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from migstream.model import Arch, Klass, Layout, Phase, Scope, Slot
from migstream.registers import arm64_ids as kvm
from migstream.registers import arm64_sysregs as sysregs
from migstream.registers import ids
from migstream.registers.catalogue import Register, Running, enabled_capability
from migstream.registers.catalogue import lookup as any_lookup

_ARM64 = Arch.ARM64
_VM, _VCPU = Scope.VM, Scope.VCPU
_FEATURE, _IDENTITY, _STATE, _CLOCK = Klass.FEATURE, Klass.IDENTITY, Klass.STATE, Klass.CLOCK

VCPU_INIT = Register(
    ids.struct_id(_ARM64, 1), "KVM_ARM_VCPU_INIT", 32, _VCPU, Phase.CREATE, _FEATURE,
    "without it no register exists; the same features for all vCPUs but POWER_OFF; KVM can be told but not asked",
    struct="kvm_vcpu_init")
VCPU_EVENTS = Register(
    ids.struct_id(_ARM64, 11), "KVM_VCPU_EVENTS", 64, _VCPU, Phase.STATE, _STATE,
    "an injected exception changes PC, PSTATE and ESR_EL1: after all registers", needs="VCPU_EVENTS",
    struct="kvm_vcpu_events_arm64")
MP_STATE = Register(
    ids.struct_id(_ARM64, 12), "KVM_MP_STATE", 4, _VCPU, Phase.STATE, _STATE,
    "last: it says whether a vCPU that is now complete may run", needs="MP_STATE", struct="kvm_mp_state")
COUNTER_OFFSET = Register(
    ids.struct_id(_ARM64, 17), "KVM_ARM_COUNTER_OFFSET", 16, _VM, Phase.CLOCK, _CLOCK,
    "from then on writes of TIMER_CNT and PTIMER_CNT are ignored: after them; KVM can be told but not asked",
    needs="COUNTER_OFFSET", struct="kvm_arm_counter_offset")

MPIDR_EL1, SVE_VLS = kvm.sysreg(3, 0, 0, 0, 5), kvm.SVE_VLS
"""Ids that a backend treats in a way of its own: what GIC attributes carry, and what a vCPU is finalized after."""

sysreg_id = kvm.sysreg
"""Id of a system register by op0, op1, CRn, CRm and op2."""

_VECTOR_LENGTHS = Register(
    SVE_VLS, "SVE_VLS", 64, _VCPU, Phase.FINALIZE, _FEATURE,
    "vector lengths: EPERM after KVM_ARM_VCPU_FINALIZE, without which Z, P and FFR can't be touched", struct="sve_vls")


def _firmware(number: int, name: str, why: str, *, scope_fixed: bool = True) -> Register:
    return Register(kvm.firmware(number), name, 8, _VM, Phase.FEATURE, _FEATURE, why, bits=name,
                    scope_fixed=scope_fixed)


def _bitmap(number: int, name: str, why: str, *, known: bool = True) -> Register:
    return Register(kvm.bitmap(number), name, 8, _VM, Phase.FEATURE, _FEATURE, why, bits=name, known=known)


_CHECKED = "the host's level: a write stores nothing, it is refused where the host offers less"
_BITMAP = "kept once a VM; a change after the first KVM_RUN is refused (EBUSY), the same value is not"
FIRMWARE: tuple[Register, ...] = (
    _firmware(0, "PSCI_VERSION", "kept once a VM; checked against the vCPU feature PSCI_0_2, so after "
                                 "KVM_ARM_VCPU_INIT; KVM takes a change even after the first KVM_RUN"),
    _firmware(1, "SMCCC_ARCH_WORKAROUND_1", _CHECKED),
    _firmware(2, "SMCCC_ARCH_WORKAROUND_2", f"{_CHECKED}; newer kernels look at ID_AA64PFR1_EL1.SSBS: after it",
              scope_fixed=False),
    _firmware(3, "SMCCC_ARCH_WORKAROUND_3", _CHECKED),
)
BITMAPS: tuple[Register, ...] = (
    _bitmap(0, "STD_BMAP", _BITMAP),
    _bitmap(1, "STD_HYP_BMAP", _BITMAP),
    _bitmap(2, "VENDOR_HYP_BMAP", _BITMAP),
    _bitmap(3, "VENDOR_HYP_BMAP_2", f"{_BITMAP}; 0 unless the VMM asks; since 6.15"),
)
CCSIDR: tuple[Register, ...] = tuple(
    Register(kvm.ccsidr(n), f"CCSIDR[{n}]", 4, _VCPU, Phase.FEATURE, _IDENTITY,
             "cache geometry as CSSELR_EL1 selects it: the host's up to 6.2, then a value of the vCPU's own; 6.1 lists "
             "what CLIDR_EL1 has, 6.12 all", bits="CCSIDR")
    for n in range(14))


def _core(word: int, name: str, why: str = "core register", size: int = kvm.U64, bits: str = "") -> Register:
    id = kvm.core(word, size)
    return Register(id, name, ids.size_in_id(id), _VCPU, Phase.STATE, _STATE, why, bits=bits)


CORE: tuple[Register, ...] = (
    *(_core(2 * n, f"X{n}") for n in range(31)),
    _core(62, "SP", "SP_EL0"),
    _core(68, "SP_EL1"),
    _core(66, "PSTATE", "its mode is checked against KVM_ARM_VCPU_EL1_32BIT; an AArch32 mode cuts X0 to X30 to 32 bits",
          bits="PSTATE"),
    _core(64, "PC"),
    _core(70, "ELR_EL1"),
    *(_core(72 + 2 * n, f"SPSR_{name}", bits="PSTATE") for n, name in enumerate(("EL1", "ABT", "UND", "IRQ", "FIQ"))),
)
FP_STATUS: tuple[Register, ...] = (
    _core(212, "FPSR", size=kvm.U32, bits="FPSR"), _core(213, "FPCR", size=kvm.U32, bits="FPCR"))
VREGS: tuple[Register, ...] = tuple(
    _core(84 + 4 * n, f"V{n}", "FP/SIMD register; not listed with SVE, whose Z registers hold it", kvm.U128)
    for n in range(32))


def _sve(id: int, name: str) -> Register:
    return Register(id, name, ids.size_in_id(id), _VCPU, Phase.STATE, _STATE,
                    "SVE register; bits above the vector length are 0; after SVE_VLS and KVM_ARM_VCPU_FINALIZE")


SVE: tuple[Register, ...] = (
    *(_sve(kvm.zreg(n), f"Z{n}") for n in range(32)),
    *(_sve(kvm.preg(n), f"P{n}") for n in range(16)),
    _sve(kvm.preg(16), "FFR"),
)

_COUNTER = ("once a VM, whichever vCPU it is written through; runs from then on, so once and last, when all vCPUs "
            "exist (making one sets it back)")
_SWAPPED = "KVM's encoding of TIMER_CNT and TIMER_CVAL is swapped, for ever"


def _timer(encoding: sysregs.Encoding, name: str, why: str) -> Register:
    return Register(kvm.sysreg(*encoding), name, 8, _VCPU, Phase.STATE, _STATE, why, bits=name)


TIMERS: tuple[Register, ...] = (
    _timer((3, 3, 14, 0, 2), "TIMER_CVAL", f"CNTV_CVAL_EL0; compare value before control; {_SWAPPED}"),
    _timer((3, 3, 14, 3, 1), "TIMER_CTL", "CNTV_CTL_EL0; enables, so after the compare value"),
    _timer((3, 3, 14, 2, 2), "PTIMER_CVAL", "CNTP_CVAL_EL0; compare value before control; listed since 6.4"),
    _timer((3, 3, 14, 2, 1), "PTIMER_CTL", "CNTP_CTL_EL0; enables, so after the compare value; listed since 6.4"),
)
COUNTERS: tuple[Register, ...] = (
    Register(kvm.sysreg(3, 3, 14, 3, 2), "TIMER_CNT", 8, _VM, Phase.CLOCK, _CLOCK,
             f"CNTVCT_EL0; {_COUNTER}; {_SWAPPED}"),
    Register(kvm.sysreg(3, 3, 14, 0, 1), "PTIMER_CNT", 8, _VM, Phase.CLOCK, _CLOCK,
             f"CNTPCT_EL0; {_COUNTER}; listed since 6.4"),
)


def _registers(*groups: sysregs.Group) -> tuple[Register, ...]:
    return tuple(register for group in groups for register in group.registers())


_REGISTERS: tuple[Register, ...] = (
    VCPU_INIT,
    _VECTOR_LENGTHS,
    *_registers(sysregs.ID_REGISTERS, sysregs.CTR, sysregs.IMPLEMENTATION),
    *FIRMWARE, *BITMAPS,
    *_registers(sysregs.TOPOLOGY), *CCSIDR,
    *CORE, *_registers(sysregs.VECTOR_CONTROL), *VREGS, *SVE, *FP_STATUS,
    *_registers(sysregs.EL2, sysregs.EL1, sysregs.AARCH32, sysregs.POINTER_AUTH_ADDRESS, sysregs.POINTER_AUTH_GENERIC,
                sysregs.MTE, sysregs.GCS_SME, sysregs.DEBUG, sysregs.PMU, sysregs.PHYSICAL_TIMER_EL2),
    *TIMERS,
    *COUNTERS,
)

_STRUCTS = (VCPU_EVENTS, MP_STATE, COUNTER_OFFSET)
ROWS: tuple[Register, ...] = (*_REGISTERS, *_STRUCTS)
"""Every row, in restore order within each phase."""

ORDER_AFTER: tuple[tuple[str, str, str], ...] = (
    ("SMCCC_ARCH_WORKAROUND_2", "ID_AA64PFR1_EL1", "its SSBS field decides what the write is checked against"),
    ("ID_AA64ZFR0_EL1", "ID_AA64PFR0_EL1", "hidden where the SVE field is 0"),
    ("PSCI_VERSION", "KVM_ARM_VCPU_INIT", "0.1 needs a vCPU without PSCI_0_2, the others one with it"),
    ("CLIDR_EL1", "CTR_EL0", "refused where its LoUIS does not agree with CTR_EL0.IDC"),
    ("Z0", "SVE_VLS", "EPERM before the vector lengths are final"),
    ("Z0", "SVCR", "the mode says which vector registers there are"),
    ("TCR2_EL1", "ID_AA64MMFR3_EL1", "exists where TCRX says so"),
    ("PIR_EL1", "ID_AA64MMFR3_EL1", "exists where S1PIE says so"),
    ("POR_EL1", "ID_AA64MMFR3_EL1", "exists where S1POE says so"),
    ("CPTR_EL2", "HCR_EL2", "E2H says how it is laid out"),
    ("PMCNTENSET_EL0", "PMCR_EL0", "masked to the counters that PMCR_EL0.N admits"),
    ("PMCNTENSET_EL0", "PMCNTENCLR_EL0", "6.8 to 6.14: a write of CLR clears what SET had set"),
    ("PMINTENSET_EL1", "PMINTENCLR_EL1", "6.8 to 6.14: a write of CLR clears what SET had set"),
    ("PMOVSSET_EL0", "PMOVSCLR_EL0", "6.8 to 6.14: a write of CLR clears what SET had set"),
    ("PMCNTENSET_EL0", "PMEVCNTR30_EL0", "counting starts"),
    ("PMEVCNTR0_EL0", "PMEVTYPER0_EL0", "a counter is started with its event"),
    ("TIMER_CTL", "TIMER_CVAL", "an enabled timer fires at once with an old compare value"),
    ("PTIMER_CTL", "PTIMER_CVAL", "an enabled timer fires at once with an old compare value"),
    ("KVM_VCPU_EVENTS", "PC", "an injected exception changes PC and PSTATE"),
    ("KVM_VCPU_EVENTS", "ESR_EL1", "an injected exception changes it"),
    ("KVM_MP_STATE", "KVM_VCPU_EVENTS", "the vCPU may run"),
    ("TIMER_CNT", "KVM_MP_STATE", "guest time stands still until everything else is there"),
    ("KVM_ARM_COUNTER_OFFSET", "PTIMER_CNT", "later writes of the counters are ignored"),
)
"""(register, register that must be written before it, reason); a test holds the order of ROWS to it."""

_ISTATUS = Running(((2, 1),), "ISTATUS says whether the timer has fired")
_LEVEL = Running(((0, 64),), "the host's level; a write only checks")
RUNNING: dict[int, Running] = {
    **{row.id: Running(((0, 64),), "a running counter") for row in COUNTERS},
    **{row.id: _ISTATUS for row in ROWS if row.name in ("TIMER_CTL", "PTIMER_CTL", "CNTHP_CTL_EL2", "CNTHV_CTL_EL2")},
    **{row.id: _LEVEL for row in FIRMWARE[1:]},
    kvm.sysreg(3, 0, 0, 4, 0): Running(((40, 4),), "MPAM is taken and dropped: no guest has it since 6.13"),
    kvm.sysreg(3, 0, 0, 4, 1): Running(((16, 4),), "MPAM_frac is taken and dropped: no guest has it since 6.13"),
    kvm.sysreg(3, 0, 0, 5, 0): Running(((8, 4),), "an implementation-defined PMUVer is taken as none"),
    kvm.sysreg(3, 0, 0, 1, 2): Running(((24, 4),), "an implementation-defined PerfMon is taken as none"),
    kvm.sysreg(3, 0, 0, 7, 2): Running(((24, 4),), "NV is taken and dropped where the vCPU has no EL2"),
    VCPU_EVENTS.id: Running(((16, 8),), "ext_dabt_pending is never read back"),
}
"""What differs on read-back though nothing was lost."""

_BY_ID = {row.id: row for row in ROWS}
_RANK = {row.id: rank for rank, row in enumerate(_REGISTERS)} | {
    row.id: rank for rank, row in enumerate(_STRUCTS, len(_REGISTERS) + 1)}


def lookup(id: int) -> Register | None:
    """The row of an id of KVM/arm64's or of ours for arm64; None for one of another architecture.

    A system or firmware register without a row is state of its vCPU, under a name by its number. An id with the scope
    flag that was proposed for KVM is the same register, kept once a VM.
    """
    if ids.arch_of(id) != _ARM64:
        return None
    if id >> 56 == kvm.ARM64 >> 56 and id & ids.KVM_REG_ARM_SCOPE_VM:
        base = _find(id & ~ids.KVM_REG_ARM_SCOPE_VM)
        return base and replace(base, id=id, scope=_VM, scope_fixed=True)
    return _find(id)


def _find(id: int) -> Register | None:
    return _BY_ID.get(id) or enabled_capability(id) or _slice(id) or _unnamed(id)


def _slice(id: int) -> Register | None:
    """A further slice of an SVE register: `Z0[1]`."""
    first = _BY_ID.get(id & ~kvm.SLICE_MASK)
    if first is None or kvm.class_of(id) != kvm.SVE:
        return None
    return replace(first, id=id, name=f"{first.name}[{id & kvm.SLICE_MASK}]")


def _unnamed(id: int) -> Register | None:
    kind, number = kvm.class_of(id), id & 0xFFFF
    if id & 0xF << 52 != kvm.U64 and kind != kvm.FW:
        return None
    if kind == kvm.FW_FEAT_BMAP:
        return _bitmap(number, f"KVM_REG_ARM_FW_FEAT_BMAP_REG({number})",
                       "not in the catalogue; all bitmaps are kept once a VM", known=False)
    names = {kvm.SYSREG: kvm.sysreg_name(id), kvm.FW: f"KVM_REG_ARM_FW_REG({number})"}
    return None if kind not in names else Register(
        id, names[kind], ids.size_in_id(id), _VCPU, Phase.STATE, _STATE, "not in the catalogue", known=False)


def layouts(reg_list: Iterable[int], scopes: Mapping[int, Scope] | None = None,
            extra: Iterable[int] = ()) -> tuple[Layout, ...]:
    """The layouts of a VM, in restore order; KVM_ARM_VCPU_INIT is always in them, and every id once.

    Args:
        reg_list: KVM_GET_REG_LIST of a finalized vCPU, in any order.
        scopes: what an experiment found, by id; the catalogue's scope otherwise.
        extra: what the kernel doesn't list and this VM has: KVM_VCPU_EVENTS and KVM_MP_STATE, interrupt lines,
            capabilities that were enabled, a counter offset that was set. Rows of any room, with a size of their own.
    """
    by_place: dict[tuple[Phase, Scope], list[Slot]] = {}
    for id in sort_for_restore({VCPU_INIT.id, *reg_list, *extra}):
        row = any_lookup(id)
        assert row.size is not None, row.name
        by_place.setdefault((row.phase, (scopes or {}).get(id, row.scope)), []).append(Slot(id, row.size))
    return tuple(Layout(scope, phase, tuple(slots))
                 for (phase, scope), slots in sorted(by_place.items(), key=lambda kv: _place(*kv[0])))


def _place(phase: Phase, scope: Scope) -> tuple[int, bool]:
    """VM before vCPU within a phase: CTR_EL0 before CLIDR_EL1, the distributor before the redistributors."""
    return phase, scope == _VCPU


def sort_for_restore(reg_list: Iterable[int]) -> list[int]:
    """The same ids in the order in which a restore writes them: as in ROWS.

    Ids that are not there come by number, behind the registers and before the structs, which depend on all registers.
    """
    def rank(id: int) -> tuple[int, int]:
        return _RANK.get(id & ~ids.KVM_REG_ARM_SCOPE_VM if id >> 56 != ids.OURS else id, len(_REGISTERS)), id
    return sorted(reg_list, key=rank)
