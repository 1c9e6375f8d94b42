"""Optional rules of simulated arm64 kernels by name: what each changes, what contradicts what, and nonsense refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from migstream.backends.sim import SimBackend
from migstream.backends.sim.arm64 import Arm64SimVm
from migstream.backends.sim.arm64.proposals import ASYMMETRIC_CAP, EVENTS, SCOPE_CAP, SDEI_VERSIONS
from migstream.backends.sim.clock import HostClock
from migstream.cli import main
from migstream.errors import BackendError, BackendUnavailable, MigstreamError, ProfileError, UsageError
from migstream.host import profiles
from migstream.host.profile import to_json
from migstream.model import Scope
from migstream.registers import arm64_ids, ids, vcpu_features
from migstream.registers.catalogue import lookup
from tests.contract.access import u64
from tests.contract.arm64 import DEFAULT, by_name, create, machine, read, write_errnos

pytestmark = pytest.mark.sim

ARM64 = tuple(name for name in profiles.names() if name.startswith("arm64-"))
KERNEL = "arm64-7.2"
FLAG = ids.KVM_REG_ARM_SCOPE_VM
PSCI, STD, VENDOR_2 = arm64_ids.firmware(0), arm64_ids.bitmap(0), arm64_ids.bitmap(3)


@pytest.mark.parametrize(("name", "error", "words"), [
    ("arm64-7.3", BackendUnavailable, "near: sim:arm64-7.2"),
    (f"{KERNEL}+reg-scop", BackendUnavailable, "near: +reg-scope[=v4]"),
    (f"{KERNEL}+sdei=v6", UsageError, "+sdei[=v5|v7] takes v5 or v7"),
    (f"{KERNEL}+psci0.2", UsageError, "+psciMAJOR.MINOR takes a version from 1.0 to 9.99"),
    (f"{KERNEL}+psci9999.4", UsageError, "from 1.0 to 9.99"),
    (f"{KERNEL}+psci1.4+psci1.4", UsageError, "+psci1.4 is there twice"),
    (f"{KERNEL}+psci1.4+psci1.5", UsageError, "+psci1.4 and +psci1.5 contradict each other"),
    (f"{KERNEL}+bitmap-bit=NOPE", UsageError, "one of STD_BMAP, STD_HYP_BMAP, VENDOR_HYP_BMAP, VENDOR_HYP_BMAP_2"),
    (f"{KERNEL}+asymmetric=1", UsageError, "takes no argument"),
    ("sim:+psci1.4", UsageError, "names no simulated kernel"),
    (f"{KERNEL}+psc", BackendUnavailable, "near: +psciMAJOR.MINOR"),
    (f"{KERNEL}+evmcs=6.1", BackendUnavailable, "no rule 'evmcs=6.1'"),
    ("x86_64-7.2+sdei", BackendUnavailable, "no rule 'sdei'"),
    (f"{KERNEL}+bitmap-bit=STD_BMAP.64", UsageError, "a bit from 0 to 63"),
    (f"{KERNEL}+sdei+sdei=v5", UsageError, "+sdei and +sdei=v5 contradict each other"),
    (f"{KERNEL}+reg-scope+reg-scope=v4", UsageError, "+reg-scope and +reg-scope=v4 contradict each other"),
    (f"{KERNEL}+psci1.4+hide-register=PSCI_VERSION", UsageError,
     "+psci1.4 and +hide-register=PSCI_VERSION contradict each other"),
    (f"{KERNEL}+hide-register=STD_BMAP+bitmap-bit", UsageError,
     "+hide-register=STD_BMAP and +bitmap-bit contradict each other"),
    (f"{KERNEL}+bitmap-bit=STD_BMAP.9+hide-register=0x6030000000160000", UsageError, "contradict each other"),
    (f"{KERNEL}+hide-register=TCR2_EL1+add-register=TCR2_EL1", UsageError, "contradict each other"),
    (f"{KERNEL}+bitmap-bit+bitmap-bit", UsageError, "+bitmap-bit is there twice"),
    (f"{KERNEL}+psci1.3", UsageError, "has PSCI 1.3 already"),
    (f"{KERNEL}+bitmap-bit=STD_BMAP.0", UsageError, "has bit 0 already"),
    ("arm64-5.10+bitmap-bit", UsageError, "no STD_BMAP"),
    (f"{KERNEL}+add-register=PSCI_VERSION", UsageError, "PSCI_VERSION already"),
    (f"{KERNEL}+add-register=0x12345", UsageError, "no id of a system or firmware register"),
    (f"{KERNEL}+add-register=NOBODY_EL1", UsageError, "no register 'NOBODY_EL1'"),
    (f"{KERNEL}+hide-register=0x6030000000140099", UsageError, "no KVM_REG_ARM_FW_REG(153) to hide"),
    (f"{KERNEL}+hide-register=PC", UsageError, "core registers"),
    ("arm64-5.10+asymmetric", UsageError, "anyway"),
])
def test_a_name_that_makes_no_kernel_is_one_line(name: str, error: type[MigstreamError], words: str) -> None:
    with pytest.raises(error) as caught:
        SimBackend.named(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == (69 if error is BackendUnavailable else 64)


@pytest.mark.parametrize(("name", "pair"), [
    ("x86_64-7.2+hide-msr=MSR_STAR+add-msr=0xc0000081", "+hide-msr=MSR_STAR and +add-msr=0xc0000081"),
    ("x86_64-7.2+hide-msr=MSR_STAR+hide-msr=0xc0000081", "+hide-msr=MSR_STAR and +hide-msr=0xc0000081"),
])
def test_one_msr_by_number_and_by_name_is_one(name: str, pair: str) -> None:
    with pytest.raises(UsageError) as caught:
        SimBackend.named(name)
    assert f"{pair} contradict each other" in str(caught.value)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("vcpu_features", 1 << 12, "no vCPU feature"),
    ("vcpu_features", 0, "PSCI_0_2"),
    ("feature_registers", {1 << 8: (PSCI,)}, "not all in 'vcpu_features'"),
    ("feature_registers", {8: (PSCI, PSCI)}, "PSCI_VERSION is there twice"),
    ("devices", ("gicv3", "floppy"), "no device 'floppy'"),
    ("registers", (PSCI, PSCI), "PSCI_VERSION is there twice"),
    ("defaults", {PSCI: b"1234"}, "PSCI_VERSION has 8 bytes, its default 4"),
    ("feature_defaults", {PSCI: b"1234"}, "PSCI_VERSION has 8 bytes, its default 4"),
    ("writable_masks", {PSCI: 1 << 64}, "PSCI_VERSION is"),
    ("scope_flags", (0x6030_0000_0014_0099,), "not in 'registers'"),
    ("firmware", {0x8400_0000 << 32: -1}, "call 0x8400000000000000 is -1"),
    ("behaviour", {"sdei": -7}, "sdei"),
    ("register_bits", {STD: (b"\1", b"\2")}, "kept and not taken"),
    ("scopes", {0x6030_0000_0014_0099: "vm"}, "not in 'defaults'"),
    ("capabilities", {"MAX_VCPUS": 0}, "MAX_VCPUS"),
])
def test_a_profile_edited_to_nonsense_is_refused_with_the_field(field: str, value: Any, words: str) -> None:
    edited: Any = {field: value}
    with pytest.raises(ProfileError, match=f"field '{field}'") as caught:
        SimBackend(dataclasses.replace(profiles.load(KERNEL), **edited))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_edited_to_nonsense_is_one_line_with_the_field(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, wherever a profile is taken."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(to_json(profiles.load(KERNEL)))
    assert main(["host", "diff", str(good), KERNEL]) == 0
    edited = json.loads(good.read_text())
    edited["vcpu_features"] = 1 << 12
    bad.write_text(json.dumps(edited))
    capsys.readouterr()
    assert main(["host", "diff", str(bad), KERNEL]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"migstream: {bad}: field 'vcpu_features': 0x1000 has bits that are no vCPU feature"]


def test_a_kernel_under_rules_is_shown_and_compared_as_any(capsys: pytest.CaptureFixture[str]) -> None:
    """`host list` has the rules; `host diff` takes the name and says what a rule changed."""
    assert main(["host", "list", "--json"]) == 0
    rules = {rule["name"]: rule for rule in json.loads(capsys.readouterr().out)["rules"]}
    assert {"reg-scope[=v4]", "sdei[=v5|v7]", "asymmetric", "psciMAJOR.MINOR", "bitmap-bit[=BITMAP[.BIT]]",
            "add-register[=REGISTER]", "hide-register=REGISTER"} <= rules.keys()
    assert all(rule["what"] and rule["source"] for rule in rules.values())
    assert main(["host", "diff", KERNEL, f"{KERNEL}+psci1.4+bitmap-bit+hide-register=TPIDR_EL1"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("PSCI_VERSION", "STD_BMAP", "TPIDR_EL1"))


# register scope


@pytest.mark.parametrize("kernel", ARM64)
def test_the_list_flags_what_the_vm_has_once_and_both_forms_are_taken(kernel: str) -> None:
    backend = SimBackend(f"{kernel}+reg-scope")
    with create(backend, 2) as vm:
        assert isinstance(vm, Arm64SimVm)
        listed = set(struct.unpack(f"<{len(backend.profile().registers)}Q", vm.listed(0, 999)[1]))
        flagged = {id & ~FLAG for id in listed if id & FLAG}
        assert {id & ~FLAG for id in listed} == set(backend.profile().registers)
        of_vm = (at for at in vm.layouts()[0] if at.scope == Scope.VM)
        saved = {slot.id for at in of_vm for slot in at.slots if slot.id >> 56 == 0x60}
        assert saved == flagged and PSCI in flagged and len(flagged) >= 3
        for form in (PSCI, PSCI | FLAG):
            assert vm.set(0, form, u64(0x1_0000)) == (0, b"")
            assert vm.get(1, form ^ FLAG) == (0, u64(0x1_0000))


def test_the_flag_is_asked_for_without_arguments_and_not_there_before() -> None:
    profile = SimBackend(f"{KERNEL}+reg-scope").profile()
    vm = Arm64SimVm(profile, machine(1, devices={}), HostClock(1_000_000, lambda: 0))
    vm.create_vcpus()
    assert vm.get(0, PSCI | FLAG)[0] == errno.ENOENT
    assert not any(id & FLAG for id in vm.guest.named(DEFAULT))
    assert (vm.enable(SCOPE_CAP, (), flags=1), vm.enable(SCOPE_CAP, (1,))) == (errno.EINVAL, errno.EINVAL)
    assert vm.get(0, PSCI | FLAG)[0] == errno.ENOENT
    assert vm.enable(SCOPE_CAP, ()) == 0, "with vCPUs there: nothing checks that"
    assert vm.get(0, PSCI | FLAG)[0] == 0
    plain = Arm64SimVm(profiles.load(KERNEL), machine(1, devices={}), HostClock(1_000_000, lambda: 0))
    assert plain.enable(SCOPE_CAP, ()) == errno.EINVAL
    vm.close()
    plain.close()


# SDEI


@pytest.mark.parametrize(("version", "sizes", "of_vm"), [("v7", {8, 16, 256}, 0), ("v5", {16, 32, 256}, 2 * EVENTS)])
def test_sdei_registers_are_of_their_sizes_and_scopes(version: str, sizes: set[int], of_vm: int) -> None:
    with create(SimBackend(f"{KERNEL}+sdei={version}"), 2) as vm:
        rows = {row.id: row for row in SDEI_VERSIONS[int(version[1:])]}
        found = {slot.id: (at.scope, slot.size) for at in vm.layouts()[0] for slot in at.slots if slot.id in rows}
        assert found == {id: (row.scope, len(row.reset)) for id, row in rows.items()}
    assert {size for _, size in found.values()} == sizes
    assert sum(scope == Scope.VM for scope, _ in found.values()) == of_vm


def test_sdei_v7_keeps_bits_and_handlers_of_events_that_there_are() -> None:
    with create(SimBackend(f"{KERNEL}+sdei"), 2) as vm:
        place = by_name(vm)
        for number in range(8, 12):
            at = place[f"KVM_REG_ARM_FW_REG({number})"]
            assert write_errnos(vm, at, [u64(-1), u64(1)]) == []
            assert read(vm, at) == [u64((1 << EVENTS) - 1), u64(1)]
        for number in range(4):
            at, value = place[f"KVM_REG_ARM_FW_REG({4 + number})"], u64(0x4000_0000 + number, 7)
            assert write_errnos(vm, at, [value, value]) == [], "a handler of no event is no error"
            assert read(vm, at) == [value if number < EVENTS else bytes(16)] * 2
        assert read(vm, place["KVM_REG_ARM_FW_REG(13)"]) == [u64(1)] * 2, "masked at reset"


def test_a_kernel_without_sdei_has_none_of_it() -> None:
    with create(SimBackend(KERNEL), 1) as vm:
        assert isinstance(vm, Arm64SimVm)
        for row in (*SDEI_VERSIONS[5], *SDEI_VERSIONS[7]):
            assert vm.get(0, row.id)[0] == errno.ENOENT


# vCPUs with different features


def test_vcpus_differ_where_that_was_asked_for() -> None:
    profile, wide = SimBackend(f"{KERNEL}+asymmetric").profile(), DEFAULT | vcpu_features.PMU_V3
    vm = Arm64SimVm(profile, machine(2, devices={}), HostClock(1_000_000, lambda: 0))
    vm.guest.add_vcpus(2)
    assert vm.init(0, DEFAULT) == (0, b"")
    assert vm.init(1, wide) == (errno.EINVAL, b"")
    assert vm.enable(ASYMMETRIC_CAP, ()) in (errno.EBUSY, errno.EINVAL), "before the first vCPU"
    vm.close()
    vm = Arm64SimVm(profile, machine(2, devices={}), HostClock(1_000_000, lambda: 0))
    assert vm.enable(ASYMMETRIC_CAP, ()) == 0
    vm.guest.add_vcpus(2)
    assert (vm.init(0, DEFAULT), vm.init(1, wide)) == ((0, b""), (0, b""))
    (pmcr,) = (id for id in vm.guest.named(wide) if lookup(id).name == "PMCR_EL0")
    answers = [vm.get(k, pmcr)[0] for k in range(2)]
    assert answers[1] == 0 and len(vm.guest.named(wide)) > len(vm.guest.named(DEFAULT))
    assert answers[0] == (0 if pmcr in vm.guest.named(DEFAULT) else errno.ENOENT)
    with pytest.raises(UsageError, match="different features"):
        vm.layouts()
    vm.close()
    plain = Arm64SimVm(profiles.load(KERNEL), machine(2), HostClock(1_000_000, lambda: 0))
    assert plain.enable(ASYMMETRIC_CAP, ()) == errno.EINVAL
    plain.close()


# the next kernel


def test_a_newer_psci_is_the_default_and_older_ones_are_taken() -> None:
    with create(SimBackend(f"{KERNEL}+psci2.1"), 1) as vm:
        place = by_name(vm)["PSCI_VERSION"]
        assert read(vm, place) == [u64(0x2_0001)]
        for version, no in ((0x1_0003, []), (0x1_0004, [errno.EINVAL]), (0x2_0002, [errno.EINVAL]), (0x2_0001, [])):
            assert write_errnos(vm, place, [u64(version)]) == no, hex(version)


@pytest.mark.parametrize(("rule", "name", "default"), [
    ("bitmap-bit", "STD_BMAP", 0b11), ("bitmap-bit=VENDOR_HYP_BMAP.7", "VENDOR_HYP_BMAP", 0b1000_0011),
    ("bitmap-bit=VENDOR_HYP_BMAP_2", "VENDOR_HYP_BMAP_2", 0),
])
def test_a_new_service_is_on_unless_opt_in_and_can_be_written(rule: str, name: str, default: int) -> None:
    with create(SimBackend(f"{KERNEL}+{rule}"), 1) as vm, create(SimBackend(KERNEL), 1) as old:
        place = by_name(vm)[name]
        assert read(vm, place) == [u64(default)]
        newest = default or 0b100
        assert write_errnos(old, place, [u64(newest)]) == [errno.EINVAL]
        assert write_errnos(vm, place, [u64(newest)]) == []
        assert write_errnos(vm, place, [u64(0)]) == []
        assert write_errnos(vm, place, [u64(1 << 62)]) == [errno.EINVAL]


def test_added_and_hidden_registers() -> None:
    new = arm64_ids.sysreg(3, 0, 11, 3, 1)
    with create(SimBackend(f"{KERNEL}+add-register+hide-register=TPIDR_EL1+hide-register=VENDOR_HYP_BMAP_2"), 2) as vm:
        assert isinstance(vm, Arm64SimVm)
        place = by_name(vm)
        assert not {"TPIDR_EL1", "VENDOR_HYP_BMAP_2"} & place.keys()
        assert vm.get(0, VENDOR_2) == (errno.ENOENT, b"")
        at = place[lookup(new).name]
        assert write_errnos(vm, at, [u64(5), u64(-1)]) == []
        assert read(vm, at) == [u64(5), u64(-1)]


def test_the_example_of_the_documentation_is_a_kernel() -> None:
    backend = SimBackend("sim:arm64-7.2+psci1.4+bitmap-bit")
    assert backend.name == "sim:arm64-7.2+psci1.4+bitmap-bit"
    with create(backend, 1) as vm:
        assert read(vm, by_name(vm)["PSCI_VERSION"]) == [u64(0x1_0004)]


@pytest.mark.parametrize("rule", ["reg-scope", "reg-scope=v4", "sdei", "sdei=v5", "psci1.9", "add-register"])
@pytest.mark.parametrize("kernel", ARM64)
def test_every_rule_makes_a_kernel_of_every_profile(kernel: str, rule: str) -> None:
    with create(SimBackend(f"{kernel}+{rule}"), 2) as vm:
        assert vm.layouts()[0]


def test_devices_that_this_kernel_can_not_make_are_named() -> None:
    profile = dataclasses.replace(profiles.load(KERNEL), devices=("gicv3",))
    no_its = pytest.raises(BackendError, match="KVM_CREATE_DEVICE its: ENODEV")
    with SimBackend(profile).create(machine(1)) as vm, no_its:
        vm.create_vcpus()
