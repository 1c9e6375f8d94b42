"""The three proposals that never merged, each from end to end on the command line: saved, inspected by name, judged,
replayed with read-back, what is the VM's written once; and what a kernel without the proposal says.

Register scope (a flag in the id), SDEI (pseudo-registers that the stream knows nothing of), the VMX MSRs that KVM
filters for the enlightened VMCS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migstream.backends.base import Vm
from migstream.backends.sim import SimBackend
from migstream.backends.sim.arm64.proposals import EVENTS, HANDLERS, SDEI_VERSIONS
from migstream.backends.sim.variants_x86_64 import EVMCS_CAP, VMX
from migstream.cli import main
from migstream.demo import guest_arm64 as guest
from migstream.model import Scope
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from migstream.transport import open_output, save
from tests.contract import access
from tests.contract.arm64 import by_name, installed, read, write_errnos

pytestmark = pytest.mark.sim

Capture = pytest.CaptureFixture[str]
VCPUS, KERNEL = 3, "arm64-7.2"


def saved(kernel: str, path: Path, prepare: Callable[[Vm], object] = lambda vm: None, vcpus: int = VCPUS) -> str:
    """A demo guest that has run, saved to a file."""
    backend = SimBackend(kernel)
    with installed(backend, vcpus) as vm:
        prepare(vm)
        access.run_a_little(vm)
        with open_output(str(path)) as out:
            save(vm, out, host=backend.summary(), pause=vm.pause)
        assert {one.fault for one in guest.counters(vm)} == {""}
    return str(path)


def called(capsys: Capture, *command: str, status: int = 0) -> dict[str, Any]:
    """The JSON of a command, whose exit status is checked."""
    found = main([*command, "--json"])
    out, err = capsys.readouterr()
    assert found == status, err
    document: dict[str, Any] = json.loads(out)
    return document


def replayed(capsys: Capture, file: str, kernel: str) -> dict[str, Any]:
    """Restored with read-back, in which nothing differs for no reason."""
    document = called(capsys, "replay", file, "--backend", f"sim:{kernel}", "--readback")
    assert [one for one in document["readback"]["differs"] if not one["reason"]] == []
    assert document["readback"]["compared"] > 100
    return document


def once(document: dict[str, Any], phase: str) -> int:
    """VM-scoped writes of a phase."""
    count: int = document["writes"][phase]["vm"]
    return count


# register scope


def test_a_kernel_that_says_the_scope_has_each_vm_register_saved_and_written_once(
        tmp_path: Path, capsys: Capture) -> None:
    """By the kernel's word alone: its flags count more than the experiment that the profile records."""
    kernel = f"{KERNEL}+reg-scope"
    counts = []
    for vcpus in (1, VCPUS):
        file = saved(kernel, tmp_path / "scope.mig", vcpus=vcpus)
        document = replayed(capsys, file, kernel)
        counts.append((once(document, "feature"), once(document, "clock")))
        assert document["notes"] == [], "no register's scope is another than the stream's"
    assert counts[0] == counts[1]
    flags = SimBackend(kernel).profile().scope_flags
    assert sum(counts[1]) == len(flags) + 2, "with the interrupts of two timers"
    shown = called(capsys, "inspect", file, "--reg", "PSCI_VERSION")["registers"]
    assert [(one["id"], one["vcpus"]) for one in shown] == [("0x6030000000140000", [])], "no flag in the stream"
    replayed(capsys, file, KERNEL)
    assert called(capsys, "check", file, "--host", KERNEL)["hosts"][KERNEL]["status"] == 0


def test_what_the_series_did_not_flag_is_saved_for_each_vcpu_and_right_all_the_same(
        tmp_path: Path, capsys: Capture) -> None:
    """Version 4 flags the workarounds and bitmaps. ID registers then go to each vCPU; PSCI_VERSION is the VM's
    wherever it exists."""
    partly, all_of_them = f"{KERNEL}+reg-scope=v4", f"{KERNEL}+reg-scope"
    file = saved(partly, tmp_path / "v4.mig")
    document = replayed(capsys, file, partly)
    whole = replayed(capsys, saved(all_of_them, tmp_path / "all.mig"), all_of_them)
    moved = once(whole, "feature") - once(document, "feature")
    assert moved > 10
    assert document["writes"]["feature"]["vcpu"] == whole["writes"]["feature"]["vcpu"] + VCPUS * moved
    (shown,) = called(capsys, "inspect", file, "--reg", "PSCI_VERSION")["registers"]
    assert shown["vcpus"] == []
    notes = replayed(capsys, file, KERNEL)["notes"]
    wanted = "ID_AA64PFR0_EL1: saved for each vCPU; this kernel keeps it once a VM"
    assert any(note.startswith(wanted) for note in notes)


# SDEI


def fill(version: int) -> Callable[[Vm], None]:
    """Give every SDEI pseudo-register a value that the proposal lets it keep, and each vCPU its own."""
    def prepare(vm: Vm) -> None:
        places = by_name(vm)
        for number, row in enumerate(SDEI_VERSIONS[version]):
            place = places[lookup(row.id).name]
            rows = VCPUS if row.scope == Scope.VCPU else 1
            values = [_value(number, k, len(row.reset)) for k in range(rows)]
            assert write_errnos(vm, place, values) == []
    return prepare


def _value(number: int, vcpu: int, size: int) -> bytes:
    if size == 8:
        return access.u64(vcpu % (1 << EVENTS))
    return bytes((16 * number + 3 * vcpu + n) % 255 + 1 for n in range(size))


@pytest.mark.parametrize(("version", "of_vm", "widths"), [(7, 0, {8, 16, 256}), (5, 2 * EVENTS, {16, 32, 256})])
@pytest.mark.parametrize("scope", ["", "+reg-scope"])
def test_sdei_travels_without_the_stream_knowing_of_it(
        tmp_path: Path, capsys: Capture, version: int, of_vm: int, widths: set[int], scope: str) -> None:
    """64, 128 and 2048 bits of each vCPU; exposed and registered events of the VM once, by experiment or by flag."""
    kernel, rows = f"{KERNEL}{scope}+sdei=v{version}", SDEI_VERSIONS[version]
    file = saved(kernel, tmp_path / "sdei.mig", fill(version))
    shown = called(capsys, "inspect", file, "--vm", "--vcpu", "1", "--reg", "KVM_REG_ARM_FW_REG*")["registers"]
    found = {one["id"]: one for one in shown}
    assert found.keys() == {f"{row.id:#018x}" for row in rows}, "by the number that KVM gave each"
    assert sum(not one["vcpus"] for one in shown) == of_vm
    assert {len(row.reset) for row in rows} == widths
    document = replayed(capsys, file, kernel)
    state = document["writes"]["state"]
    plain = replayed(capsys, saved(KERNEL, tmp_path / "plain.mig"), KERNEL)["writes"]["state"]
    assert state["vm"] - plain["vm"] == of_vm, "written once"
    assert state["vcpu"] - plain["vcpu"] == VCPUS * (len(rows) - of_vm)


@pytest.mark.parametrize("version", [5, 7])
def test_sdei_values_arrive(tmp_path: Path, capsys: Capture, version: int) -> None:
    kernel = f"{KERNEL}+sdei=v{version}"
    first = saved(kernel, tmp_path / "one.mig", fill(version))

    def values(file: str) -> list[tuple[Any, ...]]:
        shown = called(capsys, "inspect", file, "--vm", "--vcpu", "all", "--reg", "KVM_REG_ARM_FW_REG*")["registers"]
        return [(one["id"], tuple(one["vcpus"]), one["value"]) for one in shown]

    before = values(first)
    from migstream.transport import restore

    backend = SimBackend(kernel)
    with Path(first).open("rb") as source:
        vm, _ = restore(source, backend)
    second = tmp_path / "two.mig"
    with vm, open_output(str(second)) as out:
        save(vm, out, host=backend.summary(), pause=vm.pause)
    assert values(str(second)) == before
    assert len({value for *_, value in before}) >= 4, "the values tell the registers apart"


@pytest.mark.parametrize("version", [5, 7])
def test_a_kernel_without_sdei_refuses_each_of_its_registers_by_name(
        tmp_path: Path, capsys: Capture, version: int) -> None:
    file = saved(f"{KERNEL}+sdei=v{version}", tmp_path / "sdei.mig", fill(version))
    judged = called(capsys, "check", file, "--host", KERNEL, status=11)["hosts"][KERNEL]
    refused = [one["register"] for one in judged["verdicts"] if one["answer"] == "refused"]
    assert sorted(refused) == sorted(lookup(row.id).name for row in SDEI_VERSIONS[version])
    error = called(capsys, "replay", file, "--backend", f"sim:{KERNEL}", status=11)
    assert all(any(reason.startswith(name) for reason in error["reasons"]) for name in refused)
    other = 12 - version
    assert called(capsys, "check", file, "--host", f"{KERNEL}+sdei=v{other}", status=11)
    assert called(capsys, "check", file, "--host", f"{KERNEL}+sdei=v{version}")


@pytest.mark.parametrize("scope", ["", "+reg-scope"])
@pytest.mark.parametrize("version", [5, 7])
def test_every_word_of_an_sdei_register_is_kept(version: int, scope: str) -> None:
    with installed(SimBackend(f"{KERNEL}{scope}+sdei=v{version}"), VCPUS) as vm:
        fill(version)(vm)
        places = by_name(vm)
        for number, row in enumerate(SDEI_VERSIONS[version]):
            if len(row.reset) > 8 and row not in HANDLERS[EVENTS:]:
                rows = VCPUS if row.scope == Scope.VCPU else 1
                wanted = [_value(number, k, len(row.reset)) for k in range(rows)]
                assert read(vm, places[lookup(row.id).name]) == wanted, row.what


@pytest.mark.parametrize(("rule", "told"), [
    ("sdei", {"KVM_REG_ARM_FW_REG(4)": "all", "KVM_REG_ARM_FW_REG(8)": "all", "KVM_REG_ARM_FW_REG(9)": "all"}),
    ("sdei=v5", {"KVM_REG_ARM_FW_REG(256)": "vm", "KVM_REG_ARM_FW_REG(272)": "vm"}),
])
def test_the_demos_guest_has_a_registered_event_that_travels(
        tmp_path: Path, capsys: Capture, rule: str, told: dict[str, str]) -> None:
    kernel, file = f"{KERNEL}+reg-scope+{rule}", str(tmp_path / "sdei.mig")
    called(capsys, "demo", "--backend", f"sim:{kernel}", "--vcpus", "2", "--memory", "8M", "--run", "0", "-o", file)
    shown = called(capsys, "inspect", file, "--vm", "--vcpu", "all", "--reg", "KVM_REG_ARM_FW_REG(*")["registers"]
    used = {one["name"]: "all" if one["vcpus"] else "vm" for one in shown if int(one["value"], 16)}
    assert told.items() <= used.items()
    replayed(capsys, file, kernel)


# eVMCS


@pytest.mark.parametrize("generation", ["5.17", "6.1", "allow-list"])
def test_the_demos_guest_has_its_vmx_msrs_filtered(tmp_path: Path, capsys: Capture, generation: str) -> None:
    """As in README: saved, inspected by name, checked, replayed with read-back."""
    kernel, file = f"x86_64-7.2+evmcs={generation}", str(tmp_path / "evmcs.mig")
    called(capsys, "demo", "--backend", f"sim:{kernel}", "--vcpus", "2", "--memory", "8M", "--run", "0", "-o", file)
    shown = called(capsys, "inspect", file, "--vcpu", "all", "--reg", "MSR_IA32_VMX_*")["registers"]
    found = {one["name"]: int.from_bytes(bytes.fromhex(one["value"]), "little") for one in shown}
    left = SimBackend(kernel).profile().behaviour
    assert found["MSR_IA32_VMX_TRUE_EXIT_CTLS"] == left["evmcs_msr_48f"] != VMX[0x48F]
    assert found["MSR_IA32_VMX_VMFUNC"] == 0
    assert called(capsys, "check", file, "--host", kernel)["hosts"][kernel]["status"] == 0
    other = "x86_64-7.2+evmcs=5.17" if generation != "5.17" else "x86_64-7.2"
    assert called(capsys, "check", file, "--host", other, status=11)
    assert once(replayed(capsys, file, kernel), "create") == 2


X86 = "x86_64-7.2"
GENERATIONS = ("5.17", "6.1", "allow-list")


def evmcs(generation: str, path: Path, when: str, perf_global: bool = True) -> str:
    """vCPUs with one VMX control taken away by the VMM, eVMCS enabled before or after that was written.

    `perf_global`: the VMM says in CPUID that the enlightened VMCS has PERF_GLOBAL_CTRL.
    """
    on: dict[int, tuple[int, ...]] = {EVMCS_CAP: (0x0101,)} if when == "before" else {}
    backend = SimBackend(f"{X86}+evmcs={generation}")
    pin, table = ids.msr_id(0x48D), backend.profile().cpuid
    table = access.with_leaf(table, access.PERF_GLOBAL_LEAF) if perf_global else table
    with access.create(backend, VCPUS, cpuid=False, enabled_caps=on) as vm:
        assert access.write(vm, x86_64.CPUID2.id, [table] * VCPUS) == []
        (value, *_) = access.read(vm, pin)
        less = int.from_bytes(value, "little") & ~(1 << 35)
        assert access.write(vm, pin, [access.u64(less)] * VCPUS) == []
        if when == "after":
            told = ids.capability_id(backend.arch, EVMCS_CAP)
            assert access.write(vm, told, [access.u64(EVMCS_CAP, 0x0101, 0, 0, 0)]) == []
        with open_output(str(path)) as out:
            save(vm, out, host=backend.summary(), pause=vm.pause)
    return str(path)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_filtered_vmx_msrs_travel(tmp_path: Path, capsys: Capture, generation: str, when: str) -> None:
    """Saved as a guest reads them, shown by name with the controls, written back; the capability goes once."""
    kernel, file = f"{X86}+evmcs={generation}", evmcs(generation, tmp_path / "evmcs.mig", when)
    shown = called(capsys, "inspect", file, "--vcpu", "all", "--reg", "MSR_IA32_VMX_*")["registers"]
    assert len({one["name"] for one in shown}) == 18
    (pin,) = (one for one in shown if one["name"] == "MSR_IA32_VMX_TRUE_PINBASED_CTLS")
    assert pin["bits"] == {"value": ["MUST_BE_1=0x16", "MAY_BE_1=0x37"]}, "without NMI exiting"
    (cap,) = called(capsys, "inspect", file, "--vm", "--reg", f"KVM_ENABLE_CAP({EVMCS_CAP})")["registers"]
    assert cap["vcpus"] == []
    document = replayed(capsys, file, kernel)
    assert once(document, "create") == 1


@pytest.mark.parametrize("target", [*GENERATIONS, ""])
@pytest.mark.parametrize("source", GENERATIONS)
def test_the_filtered_msrs_decide_and_no_version_does(
        tmp_path: Path, capsys: Capture, source: str, target: str) -> None:
    """The same eVMCS version 1: what a guest may have met is compared control by control; a kernel without the
    capability refuses it by name. 6.1 leaves all that 5.17 does, and a guest's MSRs stay as they were."""
    file = evmcs(source, tmp_path / "evmcs.mig", "before")
    kernel = f"sim:{X86}+evmcs={target}" if target else f"sim:{X86}"
    status = main(["replay", file, "--backend", kernel, "--readback"])
    err = capsys.readouterr().err
    if source == target or (source, target) == ("5.17", "6.1"):
        assert status == 0, err
        return
    assert status == 11
    assert ("MSR_IA32_VMX_" if target else "KVM_CPUID2: refused: its guest uses the enlightened VMCS") in err


def test_a_guest_that_was_promised_no_perf_global_control_goes_back(tmp_path: Path, capsys: Capture) -> None:
    """Without its bit in CPUID 6.1 shows the controls that 5.17 shows, and that is all that counts."""
    replayed(capsys, evmcs("6.1", tmp_path / "evmcs.mig", "before", perf_global=False), f"{X86}+evmcs=5.17")


def test_a_stream_of_one_filter_is_no_stream_of_a_plain_kernel(tmp_path: Path, capsys: Capture) -> None:
    file = evmcs("6.1", tmp_path / "evmcs.mig", "before")
    judged = called(capsys, "check", file, "--host", X86, status=11)["hosts"][X86]
    refused = {one["register"] for one in judged["verdicts"] if one["answer"] == "refused"}
    refused.remove("KVM_CPUID2")
    assert len(refused) == 17 and all(name.startswith("MSR_IA32_VMX_") for name in refused)
    assert "MSR_IA32_VMX_VMFUNC" not in refused, "0 for a guest of eVMCS, which is what nobody misses"


@pytest.mark.parametrize("kernel", [
    f"{KERNEL}+reg-scope+sdei=v5", f"{KERNEL}+reg-scope=v4+sdei", f"{KERNEL}+psci1.4+bitmap-bit+add-register",
    "arm64-5.10+reg-scope+sdei", f"{X86}+evmcs=allow-list"])
def test_the_demo_passes_on_kernels_that_nobody_has(capsys: Capture, kernel: str) -> None:
    document = called(capsys, "demo", "--backend", f"sim:{kernel}", "--vcpus", "2", "--memory", "8M", "--run", "0.02")
    assert all(after > before for before, after in zip(document["steps_at_save"], document["steps_after"], strict=True))
