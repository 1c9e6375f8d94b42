"""Ids of the registers that the rules of the arm64 simulator name."""

from __future__ import annotations

from migstream.registers import arm64_ids
from migstream.registers.arm64 import MP_STATE as _MP_STATE
from migstream.registers.arm64 import VCPU_EVENTS as _VCPU_EVENTS
from migstream.registers.ids import OURS as OURS

_sys = arm64_ids.sysreg

MIDR, MPIDR, REVIDR, AIDR = _sys(3, 0, 0, 0, 0), _sys(3, 0, 0, 0, 5), _sys(3, 0, 0, 0, 6), _sys(3, 1, 0, 0, 7)
IMPLEMENTATION = (MIDR, REVIDR, AIDR)
CTR, CLIDR, OSLSR = _sys(3, 3, 0, 0, 1), _sys(3, 1, 0, 0, 1), _sys(2, 0, 1, 1, 4)
ID_SPACE = frozenset(_sys(3, 0, 0, crm, op2) for crm in range(1, 8) for op2 in range(8))
"""op0 3, op1 0, CRn 0, CRm 1 to 7: the ID registers, with those that are reserved."""

ID_PFR1, ID_DFR0, ID_MMFR0 = _sys(3, 0, 0, 1, 1), _sys(3, 0, 0, 1, 2), _sys(3, 0, 0, 1, 4)
ID_MMFR4 = _sys(3, 0, 0, 2, 6)
ID_AA64PFR0, ID_AA64PFR1, ID_AA64ZFR0 = _sys(3, 0, 0, 4, 0), _sys(3, 0, 0, 4, 1), _sys(3, 0, 0, 4, 4)
ID_AA64DFR0, ID_AA64ISAR1 = _sys(3, 0, 0, 5, 0), _sys(3, 0, 0, 6, 1)
ID_AA64MMFR0, ID_AA64MMFR1, ID_AA64MMFR2 = (_sys(3, 0, 0, 7, op2) for op2 in range(3))

SVE_VLS = arm64_ids.SVE_VLS
CCSIDR_IDS = frozenset(arm64_ids.ccsidr(n) for n in range(14))
PSCI_VERSION, WORKAROUND_1, WORKAROUND_2, WORKAROUND_3 = (arm64_ids.firmware(n) for n in range(4))
WORKAROUNDS = (WORKAROUND_1, WORKAROUND_2, WORKAROUND_3)
BITMAPS = tuple(arm64_ids.bitmap(n) for n in range(4))

X = tuple(arm64_ids.core(2 * n) for n in range(31))
SP, PC, PSTATE, SP_EL1 = (arm64_ids.core(word) for word in (62, 64, 66, 68))
ELR_EL1, SPSR_EL1 = arm64_ids.core(70), arm64_ids.core(72)
V = tuple(arm64_ids.core(84 + 4 * n, arm64_ids.U128) for n in range(32))
Z, P = tuple(arm64_ids.zreg(n) for n in range(32)), tuple(arm64_ids.preg(n) for n in range(17))
"""P[16] is FFR."""

TIMER_CVAL, TIMER_CTL = _sys(3, 3, 14, 0, 2), _sys(3, 3, 14, 3, 1)
PTIMER_CVAL, PTIMER_CTL = _sys(3, 3, 14, 2, 2), _sys(3, 3, 14, 2, 1)
TIMER_CNT, PTIMER_CNT = _sys(3, 3, 14, 3, 2), _sys(3, 3, 14, 0, 1)
CLOCKS = (TIMER_CNT, PTIMER_CNT)

PMCR, PMSWINC = _sys(3, 3, 9, 12, 0), _sys(3, 3, 9, 12, 4)
PMCNTENSET, PMCNTENCLR = _sys(3, 3, 9, 12, 1), _sys(3, 3, 9, 12, 2)
PMOVSSET, PMOVSCLR = _sys(3, 3, 9, 14, 3), _sys(3, 3, 9, 12, 3)
PMINTENSET, PMINTENCLR = _sys(3, 0, 9, 14, 1), _sys(3, 0, 9, 14, 2)
PMEVCNTR = tuple(_sys(3, 3, 14, 8 + n // 8, n % 8) for n in range(31))
PMEVTYPER = tuple(_sys(3, 3, 14, 12 + n // 8, n % 8) for n in range(31))
SAME_STORAGE = {PMCNTENCLR: PMCNTENSET, PMOVSCLR: PMOVSSET, PMINTENCLR: PMINTENSET}
"""Pairs that set and clear the same bits: the second is where they are kept."""

CSSELR, VBAR, AMAIR = _sys(3, 2, 0, 0, 0), _sys(3, 0, 12, 0, 0), _sys(3, 0, 10, 3, 0)
AFSR0, AFSR1, ESR, MDSCR = _sys(3, 0, 5, 1, 0), _sys(3, 0, 5, 1, 1), _sys(3, 0, 5, 2, 0), _sys(2, 0, 0, 2, 2)
DBGVCR32 = _sys(2, 4, 0, 7, 0)
TTBR0, TCR, SCTLR = _sys(3, 0, 2, 0, 0), _sys(3, 0, 2, 0, 2), _sys(3, 0, 1, 0, 0)
MP_STATE, VCPU_EVENTS = _MP_STATE.id, _VCPU_EVENTS.id

ALWAYS_SHARED = frozenset((*BITMAPS, PSCI_VERSION, *WORKAROUNDS))
NEVER_SHARED = frozenset((MPIDR, *CLOCKS, SVE_VLS, *CCSIDR_IDS, CLIDR, PMSWINC, OSLSR, *SAME_STORAGE,
                          *SAME_STORAGE.values()))
"""What no write of the probe changed, and is a vCPU's own all the same."""


def fields_of(id: int) -> bool:
    """Whether a register's value is made of ID fields: the ID space and CTR_EL0."""
    return id in ID_SPACE or id == CTR
