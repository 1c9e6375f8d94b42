"""The plan for arm64: registers in the target's list or refused by name, vCPU features, devices; its profile fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from migstream.host import profiles
from migstream.host.profile import HostProfile, from_json, to_json
from migstream.model import Arch, Layout, Machine, Phase, Scope, Slot
from migstream.plan import Answer, make_plan
from migstream.registers import arm64 as rows
from migstream.registers import arm64_ids, gic, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import Pair
from migstream.verdicts.model import Saved

X0, Z3, PSCI_VERSION = arm64_ids.core(0), arm64_ids.zreg(3), arm64_ids.firmware(0)
V0, PMCR = arm64_ids.core(84, arm64_ids.U128), arm64_ids.sysreg(3, 3, 9, 12, 0)
HOST = HostProfile(
    Arch.ARM64, "Linux 6.12", "cpu", "kvm", {"MAX_VCPUS": 8, "VCPU_EVENTS": 1, "MP_STATE": 1},
    registers=tuple(sorted((X0, V0, PSCI_VERSION))), vcpu_features=0x1C, devices=("gicv3", "its"),
    feature_registers={vcpu_features.PMU_V3: (PMCR,), vcpu_features.SVE: tuple(sorted((V0, Z3)))},
    writable_masks={arm64_ids.sysreg(3, 0, 0, 4, 0): (1 << 64) - 1}, scopes={PSCI_VERSION: Scope.VM})


def layout_of(*slots: tuple[int, int]) -> Layout:
    return Layout(Scope.VCPU, Phase.STATE, tuple(Slot(*slot) for slot in slots))


def _plan(slots: list[tuple[int, int]], devices: dict[str, Any] | None = None, vcpus: int = 1) -> list[str]:
    machine = Machine(Arch.ARM64, vcpus, (), devices or {})
    return make_plan(machine, [layout_of(*slots)], HOST).refusals


def test_what_the_target_lists_fits() -> None:
    assert _plan([(X0, 8), (V0, 16), (PSCI_VERSION, 8), (rows.MP_STATE.id, 4), (gic.VTIMER_IRQ.id, 4)]) == []


_UNLISTED = "refused: this kernel does not list the register"
_NOT_SO = f"{_UNLISTED} for a vCPU like this; it depends on"


@pytest.mark.parametrize(("features", "slot", "reason"), [
    (0x04, (arm64_ids.core(2), 8), f"X1: {_UNLISTED}"),
    (0x04, (PMCR, 8), ""),  # harmless: a vCPU without a PMU
    (0x0C, (PMCR, 8), ""),
    (0x14, (V0, 16), f"V0: {_NOT_SO} SVE"),
    (0x14, (Z3, 256), ""),
    (0x04, (Z3, 256), f"Z3: {_NOT_SO} SVE"),
    (0x04, (X0, 4), "X0: refused: 4 bytes for a register of 8: KVM would read or write past its value"),
])
def test_the_list_depends_on_the_vcpus_features(features: int, slot: tuple[int, int], reason: str) -> None:
    assert _plan([slot], {"vcpu_features": features}) == ([reason] if reason else [])


def test_a_register_without_a_row_goes_to_a_kernel_that_lists_it() -> None:
    unknown = arm64_ids.sysreg(3, 3, 15, 15, 7)
    assert not lookup(unknown).known
    assert "does not list" in _plan([(unknown, 8)])[0]
    host = HostProfile(Arch.ARM64, "", "", "kvm", {"MAX_VCPUS": 8}, registers=(unknown,), vcpu_features=4)
    (verdict,) = make_plan(Machine(Arch.ARM64, 1, ()), [layout_of((unknown, 8))], host).verdicts
    assert verdict.answer == Answer.FITS


@pytest.mark.parametrize(("devices", "reason"), [
    ({"irqchip": True}, "device 'irqchip' is not known to this migstream"),
    ({"vcpu_features": 0x24}, "this kernel has no vCPU feature PTRAUTH_ADDRESS"),
    ({"vcpu_features": 1 << 20 | 4}, "this kernel has no vCPU feature bit 20"),
    ({"vcpu_features": "all"}, "device 'vcpu_features' has a value that is no address, number or flag"),
    ({"vcpu_features": -1}, "device 'vcpu_features' has a value that is no address, number or flag"),
    ({"gic_distributor": 1 << 27}, "a GICv3 needs both of gic_distributor and gic_redistributors"),
    ({"its": 1 << 27}, "its without a GICv3"),
])
def test_machines_that_can_not_be_made(devices: dict[str, Any], reason: str) -> None:
    assert _plan([], devices)[0] == reason


def test_a_profile_survives_json() -> None:
    host = replace(HOST, defaults={X0: bytes(8)})
    assert from_json(to_json(host)) == host


def test_a_profile_without_a_list_judges_no_register_by_it() -> None:
    host = HostProfile(Arch.ARM64, "", "", "sim", {"MAX_VCPUS": 8}, vcpu_features=4)
    assert make_plan(Machine(Arch.ARM64, 1, ()), [layout_of((X0, 8))], host).refusals == []


@pytest.mark.parametrize(("text", "mask"), [("", 0x04), ("sve", 0x14), ("ptrauth,PMU_V3", 0x6C), ("sve,sve", 0x14)])
def test_features_by_name(text: str, mask: int) -> None:
    assert vcpu_features.parse(text) == mask
    assert vcpu_features.names(0x14) == ["PSCI_0_2", "SVE"]
    with pytest.raises(KeyError):
        vcpu_features.parse("sve2")


def test_a_vcpu_has_its_features_once_however_often_it_is_judged() -> None:
    """At the pause the values are others and the host is the same: its PMU's registers are still listed."""
    host = profiles.load("arm64-6.12")
    machine = Machine(Arch.ARM64, 1, (), {"vcpu_features": vcpu_features.parse("pmu_v3")})
    first = Pair(Saved.of(machine, (), ()), host)
    assert first.knowing({}).host.listed == first.host.listed > host.listed


def test_a_host_that_makes_no_device_makes_no_gic() -> None:
    chip = {"gic_distributor": 1 << 27, "gic_redistributors": 1 << 28, "its": 1 << 29}
    plan = make_plan(Machine(Arch.ARM64, 1, (), chip), [layout_of((X0, 8))], replace(HOST, devices=()))
    assert plan.obstacles == ("this kernel can't make a device gicv3",)


def test_an_obstacle_of_the_machine_leaves_the_vcpus_their_features() -> None:
    """Nine vCPUs are too many; their vector registers are no reason besides."""
    for devices in ({"vcpu_features": 0x14}, {"vcpu_features": 0x14, "its": "high"}):
        plan = make_plan(Machine(Arch.ARM64, 9, (), devices), [layout_of((Z3, 256))], HOST)
        assert plan.refusals == list(plan.obstacles) and plan.obstacles, plan.refusals
