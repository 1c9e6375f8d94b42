"""Failures that were published, each by its name: what check says where a plain restore fails or a guest is deceived.

Guests are those that recorded profiles make (`migstream.verdicts.guest.fresh`), with values of the test's own where it
says so. What a blind restore would meet is the verdict's `kernel`; `tests.verdicts` holds that against real kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from migstream.contract import Contract
from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.model import Slot
from migstream.plan import Plan, plan_for
from migstream.registers import arm64_ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import BY_NAME
from migstream.verdicts.guest import fresh
from migstream.verdicts.model import Answer, Column, Kernel, Saved, Verdict

ALL = vcpu_features.parse("sve,pmu_v3,ptrauth")
PMU = vcpu_features.parse("pmu_v3")
PSCI, BMAP_2 = arm64_ids.firmware(0), arm64_ids.bitmap(3)


def host(version: str) -> HostProfile:
    return profiles.load(f"arm64-{version}")


def with_values(saved: Saved, values: dict[int, int]) -> Saved:
    """The same guest with other values, in registers that it has or has not yet."""
    columns = {id: Column.of(Slot(id, 8), value.to_bytes(8, "little")) for id, value in values.items()}
    return replace(saved, columns={**saved.columns, **columns})


def verdict(plan: Plan, name: str) -> Verdict:
    (found,) = (v for v in plan.verdicts if v.name == name)
    return found


def check(source: str, target: str, name: str, features: int = vcpu_features.DEFAULT,
          values: dict[int, int] | None = None) -> Verdict:
    saved = with_values(fresh(host(source), features), values or {})
    return verdict(plan_for(saved, host(target)), name)


@pytest.mark.parametrize(("bits", "answer"), [(0, Answer.HARMLESS), (1, Answer.NOTICED), (3, Answer.NOTICED)])
def test_a_newer_kernels_extra_bitmap_register_on_an_older_one(bits: int, answer: Answer) -> None:
    """QEMU of 2025 fails the whole load with `2 vs 3 registers`: KVM lists VENDOR_HYP_BMAP_2 since 6.15, even at 0."""
    found = check("7.2", "6.12", "VENDOR_HYP_BMAP_2", values={BMAP_2: bits})
    assert (found.answer, found.target, found.kernel) == (answer, None, Kernel.REFUSES)
    if bits:
        assert "hypercalls go away" in found.reason and "DISCOVER_IMPL_VER" in found.reason


def test_on_the_way_back_it_is_written_as_what_the_older_kernel_behaved_as() -> None:
    found = check("6.12", "7.2", "VENDOR_HYP_BMAP_2")
    assert (found.answer, found.value) == (Answer.WRITTEN_AS, bytes(8))


@pytest.mark.parametrize("name", ["TCR2_EL1", "PIR_EL1", "PIRE0_EL1"])
def test_three_registers_that_6_13_hides(name: str) -> None:
    """KVM up to 6.12 lists them on every CPU; since 6.13 (0fcb4eea5345, a68cddbe47ef) where the guest has the feature.
    """
    assert BY_NAME[name] in host("6.12").listed and BY_NAME[name] not in host("7.2").listed
    found = check("6.12", "7.2", name, values={BY_NAME[name]: 0x1234})
    assert (found.answer, found.target, found.kernel) == (Answer.HARMLESS, None, Kernel.REFUSES)
    assert "ID_AA64MMFR3_EL1 has no" in found.reason


@pytest.mark.parametrize(("name", "field"), [("TCR2_EL1", 0), ("PIR_EL1", 8), ("PIRE0_EL1", 8)])
def test_a_guest_that_has_their_feature_does_not_lose_them(name: str, field: int) -> None:
    found = check("6.12", "7.2", name, values={BY_NAME[name]: 0x1234, BY_NAME["ID_AA64MMFR3_EL1"]: 1 << field})
    assert found.answer == Answer.REFUSED


def test_psci_1_3_by_default_does_not_go_back() -> None:
    """Linux 6.13 shows PSCI 1.3 unless it is told otherwise: a guest started there can't return."""
    found = check("7.2", "6.12", "PSCI_VERSION")
    assert (found.answer, found.kernel) == (Answer.REFUSED, Kernel.REFUSES)
    assert "0x10003, this kernel has at most 0x10001" in found.reason


def test_a_guest_that_was_told_psci_1_1_does() -> None:
    assert check("7.2", "6.12", "PSCI_VERSION", values={PSCI: 0x1_0001}).answer == Answer.FITS


def test_a_guest_of_5_10_wakes_up_on_7_2_with_psci_1_0_and_no_new_calls() -> None:
    saved = fresh(host("5.10"))
    assert not {arm64_ids.bitmap(n) for n in range(4)} & saved.columns.keys()
    plan = plan_for(saved, host("7.2"))
    assert verdict(plan, "PSCI_VERSION").answer == Answer.FITS
    written = {name: verdict(plan, name).value for name in ("STD_BMAP", "STD_HYP_BMAP", "VENDOR_HYP_BMAP",
                                                            "VENDOR_HYP_BMAP_2")}
    assert written == {"STD_BMAP": bytes(8), "STD_HYP_BMAP": b"\1" + bytes(7), "VENDOR_HYP_BMAP": bytes(8),
                       "VENDOR_HYP_BMAP_2": bytes(8)}


def _with_counters(profile: HostProfile, number: int) -> HostProfile:
    """A kernel that lists as many event counters as there are, instead of all 31."""
    more = {mask: tuple(id for id in listed if not _counter(id) or id & 0x1F < number)
            for mask, listed in profile.feature_registers.items()}
    plain = tuple(id for id in profile.registers if not _counter(id) or id & 0x1F < number)
    return replace(profile, registers=plain, feature_registers=more)


def _counter(id: int) -> bool:
    return lookup(id).name.startswith(("PMEVCNTR", "PMEVTYPER"))


@pytest.mark.parametrize("stem", ["PMEVCNTR{}_EL0", "PMEVTYPER{}_EL0"])
def test_a_list_of_pmu_event_registers_that_differs(stem: str) -> None:
    """The guest's PMCR_EL0.N says how many it can reach: of these none may be missing, the others nobody misses."""
    target = _with_counters(host("6.12"), 6)
    pmcr = BY_NAME["PMCR_EL0"]
    counters = {BY_NAME[stem.format(n)]: n + 1 for n in range(31)}
    plan = plan_for(with_values(fresh(host("7.2"), PMU), {pmcr: 6 << 11, **counters}), target)
    answers = [verdict(plan, stem.format(n)).answer for n in range(31)]
    assert answers == [Answer.FITS] * 6 + [Answer.HARMLESS] * 25
    more = plan_for(with_values(fresh(host("7.2"), PMU), {pmcr: 8 << 11, **counters}), target)
    assert [verdict(more, stem.format(n)).answer for n in (5, 6, 7, 8)] == [
        Answer.FITS, Answer.REFUSED, Answer.REFUSED, Answer.HARMLESS]


def test_pmu_registers_that_5_10_lists_without_a_pmu() -> None:
    """74 of them, reading 0x1de7ec7edbadc0de: a later kernel refuses each, and no guest can have met one."""
    saved = fresh(host("5.10"))
    plan = plan_for(saved, host("6.1"))
    found = [v for v in plan.verdicts if v.name.startswith("PM") and v.slot.id not in host("6.1").listed]
    assert len(found) == 74
    assert {(v.answer, v.kernel) for v in found} == {(Answer.HARMLESS, Kernel.REFUSES)}


def test_id_aa64zfr0_el1_without_sve() -> None:
    """73433762fcae hid it from guests without SVE: a list that differs by a register that reads 0."""
    zfr0 = BY_NAME["ID_AA64ZFR0_EL1"]
    without = replace(host("6.12"), registers=tuple(id for id in host("6.12").registers if id != zfr0))
    assert zfr0 in host("5.10").listed
    found = verdict(plan_for(with_values(fresh(host("5.10")), {zfr0: 0}), without), "ID_AA64ZFR0_EL1")
    assert (found.answer, found.target) == (Answer.HARMLESS, None)
    assert "no SVE" in found.reason


# What the guest reads and KVM_GET_ONE_REG does not say: 5.10 and 6.1 on a CPU without CTR_EL0.IDC.

CTR = BY_NAME["CTR_EL0"]
SEEN, REGISTER = 0x8444_C004, 0x9444_C004


def test_the_recorded_kernels_show_what_the_lab_measured() -> None:
    assert [host(v).guest_registers[CTR] for v in ("5.10", "6.1", "6.12", "7.2")] == [SEEN, SEEN, REGISTER, REGISTER]
    assert {int.from_bytes(host(v).defaults[CTR], "little") for v in ("5.10", "6.1", "6.12", "7.2")} == {REGISTER}


@pytest.mark.parametrize(("source", "target", "value", "answer", "written"), [
    ("5.10", "6.1", REGISTER, Answer.FITS, None),
    ("6.1", "7.2", REGISTER, Answer.WRITTEN_AS, SEEN),
    ("7.2", "6.1", REGISTER, Answer.NOTICED, None),
    ("7.2", "6.1", SEEN, Answer.HARMLESS, None),
    ("6.12", "7.2", REGISTER, Answer.FITS, None),
])
def test_ctr_el0_by_what_the_guest_reads(source: str, target: str, value: int, answer: Answer,
                                         written: int | None) -> None:
    found = check(source, target, "CTR_EL0", values={CTR: value})
    assert found.answer == answer
    assert found.value == (None if written is None else written.to_bytes(8, "little"))


def test_a_contract_holds_what_the_guest_has_met() -> None:
    saved = fresh(host("6.1"))
    assert isinstance(saved.contract, Contract)
    contract = replace(saved.contract, values={CTR: REGISTER.to_bytes(8, "little")})
    assert contract.registers[CTR] == SEEN.to_bytes(8, "little")
