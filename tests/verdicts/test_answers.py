"""Answers of real kernels to values of no guest, each of which a rule had wrong once: found by `tests.verdicts`.

The kernels are those of the lab on QEMU's `max` CPU, as their recorded profiles are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from migstream.host import profiles
from migstream.host.baseline import baseline
from migstream.host.behaviour import of_profile
from migstream.model import Arch, Bank, Layout, Machine, Phase, Scope, Slot
from migstream.plan import make_plan
from migstream.registers import arm64, gic, ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import BY_NAME, Pair
from migstream.verdicts.guest import fresh
from migstream.verdicts.judge import judge
from migstream.verdicts.model import Answer, Column, Kernel
from migstream.verdicts.policy import parse

TAKES, DROPS, REFUSES = Kernel.TAKES, Kernel.DROPS, Kernel.REFUSES
CCSIDR = {f"CCSIDR[{n}]": row.id for n, row in enumerate(arm64.CCSIDR)}


@pytest.mark.parametrize(("kernel", "register", "value", "answer"), [
    ("6.12", "CLIDR_EL1", 0x2_0006_0002_000_021, REFUSES),
    ("6.12", "CLIDR_EL1", 0x0200_0600_0200_0021, REFUSES),     # RES0 above bit 46
    ("7.2", "CLIDR_EL1", 0x0000_8000_0200_1021, REFUSES),
    ("6.12", "CCSIDR[1]", 0x0100_0000, REFUSES),               # lines shorter than CTR_EL0's least
    ("7.2", "CCSIDR[0]", 0x0800_0050, REFUSES),
    ("6.12", "CCSIDR[0]", 0x701F_E00A, TAKES),                 # a u32 has no reserved bits
    ("6.12", "PSCI_VERSION", 0x1, REFUSES),                    # 0.1 is for vCPUs without PSCI_0_2
    ("7.2", "PSCI_VERSION", 0x2, TAKES),
    ("6.12", "SMCCC_ARCH_WORKAROUND_2", 0x1, DROPS),           # UNKNOWN counts as NOT_AVAIL
    ("6.12", "SMCCC_ARCH_WORKAROUND_2", 0x2, REFUSES),
    ("5.10", "SMCCC_ARCH_WORKAROUND_3", 0x0, DROPS),
    ("6.12", "ID_MMFR4_EL1", 0x1_1115, TAKES),                 # SpecSEI: higher is safe
    ("7.2", "ID_AA64MMFR1_EL1", 0x10_1D21_1122, TAKES),        # the same, and HCX is writable
    ("6.12", "ID_AA64MMFR1_EL1", 0x10_1021_1122, REFUSES),     # HCX is not: what stops 6.1 -> 6.12
    ("6.12", "ID_MMFR0_EL1", 0xA010_1105, TAKES),              # InnerShr is signed
    ("6.12", "MVFR2_EL1", 0x100_0043, REFUSES),                # bits without a name
    ("6.12", "ID_MMFR5_EL1", 0x8_0000, REFUSES),
    ("7.2", "ID_PFR2_EL1", 0x4011, REFUSES),
    ("6.12", "ID_DFR0_EL1", 0x101_0009, REFUSES),              # no PMUv1
    ("7.2", "ID_AA64MMFR0_EL1", 0x303_1020_1126, REFUSES),     # TGRAN64_2 is exact
    ("7.2", "ID_AA64MMFR0_EL1", 0x323_1020_1126, TAKES),
    ("7.2", "CTR_EL0", 0x9444_4004, REFUSES),                  # L1Ip is exact: VIPT and nothing else
    ("7.2", "CTR_EL0", 0x9444_8004, TAKES),
    ("7.2", "GICD_IIDR", 0x4B00_043B, REFUSES),                # no revision below 2
    ("7.2", "GICD_IIDR", 0x4B00_243B, TAKES),
    ("7.2", "OSLSR_EL1", 0xA, TAKES),                          # OSLK alone can be another
    ("7.2", "OSLSR_EL1", 0x9, REFUSES),
    ("7.2", "PSTATE", 0x6000_03D0, TAKES),                     # AArch32 User: the CPU has 32-bit EL0
    ("7.2", "PSTATE", 0x6000_03D3, REFUSES),                   # AArch32 Supervisor
    ("7.2", "PSTATE", 0x6000_03C9, REFUSES),                   # EL2h
    ("7.2", "ID_AA64MMFR2_EL1", 0x1021_0110_1200_1011, REFUSES),  # NV: the CPU has none
    ("6.12", "ID_AA64PFR0_EL1", 0x1101_0B10_2111_0222, REFUSES),  # MPAM likewise
    ("6.12", "ID_DFR0_EL1", 0xF01_0009, DROPS),                # IMPDEF: taken, and 0 then
    ("6.1", "ID_DFR0_EL1", 0xF01_0009, REFUSES),
    ("7.2", "ID_AA64PFR0_EL1", 0x1101_0010_2111_0220, REFUSES),  # EL0 has to be something
    ("6.12", "ID_AA64PFR0_EL1", 0x1101_0010_2111_0220, TAKES),
])
def test_what_a_kernel_answered(kernel: str, register: str, value: int, answer: Kernel) -> None:
    host = profiles.load(f"arm64-{kernel}")
    id = CCSIDR.get(register) or BY_NAME[register]
    features = vcpu_features.parse("pmu_v3") if register == "ID_DFR0_EL1" else vcpu_features.DEFAULT
    slot = Slot(id, ids.size_in_id(id) or 8)
    guest = fresh(host, features)
    column = Column.of(slot, value.to_bytes(slot.size, "little"))
    pair = Pair(replace(guest, columns={**guest.columns, id: column}), host)
    assert judge(pair, slot).kernel == answer


@pytest.mark.parametrize(("lengths", "answer"), [(0xFFFF, TAKES), (0x7F, TAKES), (1, TAKES), (0x17F, REFUSES),
                                                 (0x1_FFFF, REFUSES), (0, REFUSES)])
def test_vector_lengths_up_to_a_maximum(lengths: int, answer: Kernel) -> None:
    host, slot = profiles.load("arm64-6.12"), Slot(arm64.SVE_VLS, 64)
    guest = fresh(host, vcpu_features.parse("sve"))
    column = Column.of(slot, lengths.to_bytes(64, "little"))
    pair = Pair(replace(guest, columns={**guest.columns, slot.id: column}), host)
    assert judge(pair, slot).kernel == answer


def test_what_a_run_without_an_interrupt_controller_changes_is_not_what_a_guest_reads_otherwise() -> None:
    """6.12 clears GIC in ID_AA64PFR0_EL1 with the first run; the register can be written, so it is what is shown."""
    host = profiles.load("arm64-6.12")
    pfr0 = BY_NAME["ID_AA64PFR0_EL1"]
    assert host.guest_registers[pfr0] != int.from_bytes(host.defaults[pfr0], "little")
    assert of_profile(host).sees == {}
    assert {lookup(id).name for id in of_profile(profiles.load("arm64-6.1")).sees} == {"CTR_EL0"}


def test_a_baseline_has_what_guests_read() -> None:
    hosts = {name: profiles.load(name) for name in ("arm64-6.1", "arm64-7.2")}
    found = baseline(hosts)
    assert not [line for line in found.refusals if line.startswith("CTR_EL0")]
    assert int.from_bytes(found.contract.values[BY_NAME["CTR_EL0"]], "little") == 0x8444_C004


TOLERATE = """
migstream_policy = 1
[[tolerate]]
register = "GIC*"
reason = "to see what comes after it"
guest_notices = true
"""


def test_what_came_with_one_bank_decides_of_another_at_the_pause() -> None:
    """GICR_CTLR reads back otherwise where the interrupt controller is an older revision: GICD_IIDR came before it."""
    chip = Layout(Scope.VM, Phase.INTERRUPTS, (Slot(BY_NAME["GICD_IIDR"], 4),))
    control = next(id for id in profiles.load("arm64-5.10").attributes if lookup(id).name == "GICR_CTLR")
    redistributor = Layout(Scope.VCPU, Phase.INTERRUPTS, (Slot(control, 4),))
    assert gic.access(control) is not None
    plan = make_plan(Machine(Arch.ARM64, 1, ()), [chip, redistributor], profiles.load("arm64-5.10"),
                     policy=parse(TOLERATE))
    assert all(verdict.pending for verdict in plan.verdicts)
    steps = [plan.at_the_pause(number, Bank(layout, 0, np.array([[value]], np.uint64)))
             for number, (layout, value) in enumerate(((chip, 0x4B00_343B), (redistributor, 0x7)))]
    (verdict,) = steps[1].verdicts
    assert (verdict.answer, verdict.kernel) == (Answer.NOTICED, Kernel.DROPS)
