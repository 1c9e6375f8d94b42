"""Optional rules of simulated kernels by name, kernels that make no sense, and the filtered VMX MSRs end to end."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

import migstream
from migstream.backends.sim import SimBackend
from migstream.backends.sim.variants_x86_64 import EVMCS_CAP, FILTERS, GENERATIONS, VMX
from migstream.cli import main
from migstream.errors import BackendUnavailable, DoesNotFit, MigstreamError, ProfileError, UsageError
from migstream.host import profiles
from migstream.host.profile import to_json
from migstream.model import Arch
from migstream.registers import ids, x86_64
from migstream.transport import restore, save
from tests.contract.access import PERF_GLOBAL_LEAF, create, msr, read, u64, with_leaf, write, write_errno

pytestmark = pytest.mark.sim

KERNEL = "x86_64-7.2"
STAR, NEW = 0xC000_0081, 0x4B56_4D10
PIN, EXIT, VMFUNC = 0x48D, 0x48F, 0x491


def test_a_rule_is_part_of_the_name() -> None:
    made = migstream.open_backend(f"sim:{KERNEL}+hide-msr=MSR_STAR+add-msr={NEW:#x}")
    assert made.name == f"sim:{KERNEL}+hide-msr=MSR_STAR+add-msr={NEW:#x}"
    assert STAR not in made.profile().msrs and NEW in made.profile().msrs
    assert migstream.open_backend(f"sim+add-msr={NEW:#x}").arch == Arch.X86_64


@pytest.mark.parametrize(("name", "error", "words"), [
    ("x86_64-7.3", BackendUnavailable, "near: sim:x86_64-7.2"),
    (f"{KERNEL}+evmc=6.1", BackendUnavailable, "near: +evmcs=5.17|6.1|allow-list"),
    (f"{KERNEL}+evmcs=6.2", UsageError, "+evmcs=5.17|6.1|allow-list takes one of 5.17, 6.1 and allow-list"),
    (f"{KERNEL}+evmcs", UsageError, "takes one of 5.17, 6.1 and allow-list"),
    (f"{KERNEL}+hide-msr=-1", UsageError, "+hide-msr=MSR takes an MSR's number or the kernel's name of it"),
    (f"{KERNEL}+clear-cpuid=0x7.0.ebx.99", UsageError, "a bit from 0 to 31"),
    (f"{KERNEL}+hide-msrs=1", BackendUnavailable, "near: +hide-msr=MSR"),
    ("sim:", UsageError, "'sim:' names no simulated kernel"),
    (f"sim:+add-msr={NEW:#x}", UsageError, "names no simulated kernel: sim:NAME, or plain sim"),
    (f"{KERNEL}+add-msr=MSR_EFER", UsageError, "the kernel has MSR_EFER already, and does not list it"),
    (f"{KERNEL}+add-msr=0x1b", UsageError, "MSR_IA32_APICBASE already"),
    (f"{KERNEL}+nonsense", BackendUnavailable, "no rule 'nonsense'"),
    (f"{KERNEL}+", BackendUnavailable, "no rule ''"),
    (f"{KERNEL}+evmcs=6.1+evmcs=5.17", UsageError, "+evmcs=6.1 and +evmcs=5.17 contradict each other"),
    (f"{KERNEL}+hide-msr=MSR_STAR+hide-msr=MSR_STAR", UsageError, "+hide-msr=MSR_STAR is there twice"),
    (f"{KERNEL}+hide-msr=0x12345", UsageError, "no MSR_0x00012345 to hide"),
    (f"{KERNEL}+add-msr=MSR_STAR", UsageError, "MSR_STAR already"),
    (f"{KERNEL}+add-msr=MSR_NOBODY", UsageError, "no MSR 'MSR_NOBODY'"),
    (f"{KERNEL}+add-msr=0x123456789", UsageError, "32 bits"),
    (f"{KERNEL}+clear-cpuid=0x7.0.ebx.31", UsageError, "no such bit"),
])
def test_a_name_that_makes_no_kernel_is_one_line(name: str, error: type[MigstreamError], words: str) -> None:
    with pytest.raises(error) as caught:
        SimBackend.named(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == (69 if error is BackendUnavailable else 64)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("capabilities", {"MAX_VCPUS": 0}, "MAX_VCPUS"),
    ("capabilities", {"MAX_VCPUS": 8, "XSAVE": -1}, "XSAVE is -1"),
    ("behaviour", {"smm": -1}, "smm"),
    ("behaviour", {"smn": 1}, "no trait 'smn'; there are tsc_follows"),
    ("xsave_components", ("X87", "x"), "no XSAVE component 'x'; there are X87"),
    ("xsave_components", ("X87", "X87"), "X87 is there twice"),
    ("sizes", {x86_64.XSAVE.id: 5000}, "KVM_XSAVE has 5000 bytes, its default 4096"),
    ("defaults", {msr(STAR): b"1234"}, "MSR_STAR has 8 bytes, its default 4"),
    ("msrs", (1, 2, 1), "MSR 0x1 is there twice"),
    ("msrs", (1 << 32,), "32 bits"),
    ("feature_msrs", {0x10A: 1 << 64}, "MSR 0x10a"),
    ("cpuid", bytes(50), "50 bytes"),
    ("cpuid_forced", {0: (1 << 32, 0)}, "32 bits"),
    ("msr_bits", {STAR: (1, 3)}, "bits 0x2 are kept and not taken"),
    ("msr_bits", {STAR: (1 << 64, 0)}, "beyond"),
    ("register_bits", {msr(STAR): (bytes(9), b"")}, "beyond"),
    ("register_bits", {msr(STAR): (b"\1", b"\2")}, "kept and not taken"),
    ("register_bits", {msr(0x123): (b"", b"")}, "not in 'defaults'"),
    ("scopes", {msr(0x123): "vm"}, "not in 'defaults'"),
    ("refused", {msr(STAR): (-2, 0)}, "-2 is no errno"),
    ("after_run", {msr(STAR): (0, 5000)}, "5000 is no errno"),
])
def test_a_profile_edited_to_nonsense_is_refused_with_the_field(field: str, value: Any, words: str) -> None:
    edited: Any = {field: value}
    with pytest.raises(ProfileError, match=f"field '{field}'") as caught:
        SimBackend(dataclasses.replace(profiles.load(KERNEL), **edited))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", profiles.names())
def test_no_recorded_profile_is_nonsense(name: str) -> None:
    from migstream.backends.sim.validate import check

    check(profiles.load(name), name)


def test_hidden_and_added_msrs_and_cpuid_bits() -> None:
    backend = SimBackend(f"{KERNEL}+hide-msr=MSR_STAR+add-msr={NEW:#x}+clear-cpuid=0x7.0.ebx.20")
    changed = bytes(a ^ b for a, b in zip(backend.profile().cpuid, profiles.load(KERNEL).cpuid, strict=True))
    assert changed.count(0x10) == 1
    with create(backend) as vm:
        assert write_errno(vm, msr(STAR), u64(0)) == -1
        assert write_errno(vm, msr(NEW), u64(0x1234)) == 0
        assert read(vm, msr(NEW))[0] == u64(0x1234)


def test_a_captured_profile_is_a_simulated_kernel_by_its_file(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under rules; a file that can't be read or is none is said by name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my+host.json").write_text(to_json(profiles.load(KERNEL)))
    for name in ("sim:my+host.json", "sim:./my+host.json+evmcs=6.1", f"sim:{tmp_path}/my+host.json"):
        assert main(["demo", "--backend", name, "--vcpus", "1", "--memory", "8M", "--run", "0", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["backend"] == name
    assert main(["host", "show", "./my+host.json+hide-msr=MSR_STAR", "--reg", "MSR_STAR"]) == 64
    assert "no register here matches" in capsys.readouterr().err
    assert main(["demo", "--backend", "sim:./nobody.json"]) == 74
    assert "./nobody.json: No such file" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    assert main(["demo", "--backend", "sim:bad.json"]) == ProfileError.exit_status
    assert "bad.json: not a host profile" in capsys.readouterr().err


def test_host_list_shows_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "list", "--json"]) == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    assert {"evmcs=5.17|6.1|allow-list", "hide-msr=MSR"} <= {rule["name"] for rule in rules}
    assert all(rule["what"] and rule["source"] for rule in rules)


ON: dict[int, tuple[int, ...]] = {EVMCS_CAP: (0x0101,)}


def vmx(backend: SimBackend, enabled: bool, perf_global: bool = True) -> dict[int, int]:
    """What the VMX MSRs of a vCPU read; the VMM tells its guest that eVMCS has PERF_GLOBAL_CTRL, or not."""
    with create(backend, 1, cpuid=False, enabled_caps=ON if enabled else {}) as vm:
        table = backend.profile().cpuid
        table = with_leaf(table, PERF_GLOBAL_LEAF) if perf_global else table
        assert write(vm, x86_64.CPUID2.id, [table]) == []
        return {index: int.from_bytes(read(vm, msr(index))[0], "little") for index in VMX}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_filtered_vmx_msrs_lack_controls_and_gain_none(generation: str) -> None:
    backend = SimBackend(f"{KERNEL}+evmcs={generation}")
    assert vmx(backend, False) == VMX
    filtered = vmx(backend, True)
    assert all(filtered[index] & ~VMX[index] == 0 for index in VMX)
    assert filtered != VMX and filtered[VMFUNC] == 0


def test_the_three_generations_offer_a_guest_three_different_sets() -> None:
    """The same eVMCS version 1: what a version number can't tell."""
    shown = [vmx(SimBackend(f"{KERNEL}+evmcs={name}"), True) for name in GENERATIONS]
    assert len({tuple(one.items()) for one in shown}) == 3
    perf_global = [one[EXIT] >> 32 & 0x1000 for one in shown]
    assert perf_global == [0, 0x1000, 0x1000]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_perf_global_control_is_there_where_cpuid_says_so(generation: str) -> None:
    """Since 6.1 by CPUID 0x4000000A.EBX bit 0; nothing else depends on it."""
    backend = SimBackend(f"{KERNEL}+evmcs={generation}")
    said, unsaid = vmx(backend, True), vmx(backend, True, perf_global=False)
    changed = {index: said[index] ^ unsaid[index] for index in VMX if said[index] != unsaid[index]}
    assert changed == ({} if generation == "5.17" else {
        0x483: 0x1000 << 32, 0x48F: 0x1000 << 32, 0x484: 0x2000 << 32, 0x490: 0x2000 << 32})
    assert vmx(backend, False, perf_global=False) == VMX


@pytest.mark.parametrize("first", ["capability", "msrs"])
def test_evmcs_may_be_enabled_before_or_after_the_msrs_are_written(first: str) -> None:
    """The stored value is whole either way; the filter is on what is shown."""
    backend, less = SimBackend(f"{KERNEL}+evmcs=5.17"), VMX[PIN] & ~(1 << 32)
    enable = (ids.capability_id(Arch.X86_64, EVMCS_CAP), u64(EVMCS_CAP, 0x0101, 0, 0, 0))
    steps = [enable, (msr(PIN), u64(less))]
    with create(backend, 1) as vm:
        for id, value in steps if first == "capability" else reversed(steps):
            assert write(vm, id, [value]) == []
        assert read(vm, msr(PIN)) == [u64(less & FILTERS[1][PIN])]


BASIC, PROC, MISC, FIXED0, FIXED1, ENUM, CTLS2, EPT = 0x480, 0x482, 0x485, 0x486, 0x487, 0x48A, 0x48B, 0x48C
NO = -1
"""A short count, which is how KVM_SET_MSRS refuses."""


@pytest.mark.parametrize(("index", "value", "expected", "why"), [
    *((index, VMX[index], 0, "what it has") for index in (*range(0x48A, 0x492), BASIC, MISC, FIXED0, 0x488)),
    *((index, VMX[index], NO, "made by KVM") for index in (0x481, PROC, 0x483, 0x484, FIXED1, 0x489)),
    (BASIC, VMX[BASIC] ^ 2, NO, "another revision"), (BASIC, VMX[BASIC] + (1 << 32), 0, "a larger VMCS"),
    (BASIC, VMX[BASIC] - (1 << 32), NO, "a smaller VMCS"), (BASIC, VMX[BASIC] | 1 << 48, NO, "addresses of 32 bits"),
    (BASIC, VMX[BASIC] & ~(1 << 55), 0, "no TRUE forms"), (BASIC, VMX[BASIC] | 1 << 56, NO, "not offered"),
    (PIN, VMX[PIN] & ~2, NO, "must be 1"), (PIN, VMX[PIN] | 1, 0, "one more that must be 1"),
    (PIN, VMX[PIN] & ~(1 << 35), 0, "a control less"), (PIN, VMX[PIN] | 1 << 40, NO, "a control that the host has not"),
    (EXIT, VMX[EXIT] & ~1, NO, "must be 1"), (CTLS2, VMX[CTLS2] | 1 << 59, NO, "a control that the host has not"),
    (CTLS2, 0, 0, "no secondary control"),
    (MISC, VMX[MISC] ^ 1, NO, "another rate of the preemption timer"), (MISC, VMX[MISC] & ~(1 << 29), 0, "less"),
    (MISC, VMX[MISC] | 1 << 30, NO, "a feature that the host has not"), (MISC, VMX[MISC] | 1 << 16, NO, "CR3 targets"),
    (MISC, VMX[MISC] | 1 << 25, NO, "longer MSR lists"), (MISC, VMX[MISC] | 1 << 32, NO, "another MSEG revision"),
    (FIXED0, VMX[FIXED0] & ~1, NO, "a bit that must be 1"), (FIXED0, VMX[FIXED0] | 2, 0, "one more"),
    (ENUM, 0x1234, 0, "stored as it is"), (EPT, VMX[EPT] | 1 << 63, NO, "not offered"), (EPT, 0, 0, "none"),
    (VMFUNC, 2, NO, "not offered"), (VMFUNC, 0, 0, "none"),
])
def test_vmx_msrs_are_taken_and_refused_as_by_kvm(index: int, value: int, expected: int, why: str) -> None:
    with create(SimBackend(f"{KERNEL}+evmcs=6.1"), 1) as vm:
        before = read(vm, msr(index))
        assert write_errno(vm, msr(index), u64(value)) == expected, why
        assert read(vm, msr(index)) == (before if expected else [u64(value)])


def test_the_rate_of_a_timer_that_the_vcpu_has_not_may_be_any() -> None:
    with create(SimBackend(f"{KERNEL}+evmcs=6.1"), 1) as vm:
        assert write_errno(vm, msr(PIN), u64(VMX[PIN] & ~(1 << 38))) == 0
        assert write_errno(vm, msr(MISC), u64(VMX[MISC] ^ 1)) == 0


def test_control_msrs_follow_their_true_forms() -> None:
    """vmx_get_vmx_msr: the TRUE form, with the controls that must be 1 for who knows no TRUE forms."""
    with create(SimBackend(f"{KERNEL}+evmcs=6.1"), 1) as vm:
        assert write_errno(vm, msr(0x48E), u64(VMX[0x48E] & ~(1 << 63))) == 0
        assert read(vm, msr(PROC)) == [u64(VMX[PROC] & ~(1 << 63))]


def saved(kernel: str) -> bytes:
    backend, out = SimBackend(kernel), io.BytesIO()
    with create(backend, 2, cpuid=False, enabled_caps=ON) as vm:
        assert write(vm, x86_64.CPUID2.id, [with_leaf(backend.profile().cpuid, PERF_GLOBAL_LEAF)] * 2) == []
        save(vm, out, host=backend.summary(), pause=vm.pause)
    return out.getvalue()


def test_filtered_vmx_msrs_are_saved_inspected_by_name_and_replayed(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel, file = f"{KERNEL}+evmcs=6.1", tmp_path / "evmcs.mig"
    file.write_bytes(saved(kernel))
    assert main(["inspect", str(file), "--reg", "MSR_IA32_VMX_TRUE_PINBASED_CTLS", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["registers"]
    assert shown["bits"] == {"value": ["MUST_BE_1=0x16", "MAY_BE_1=0x3f"]}
    assert main(["replay", str(file), "--backend", f"sim:{kernel}"]) == 0


def test_a_generation_that_filters_more_is_refused_by_the_names_of_what_the_guest_would_miss() -> None:
    """From 6.1's filter to 5.17's: exit and entry controls that 5.17 takes away; before anything is made."""
    with pytest.raises(DoesNotFit) as caught:
        restore(io.BytesIO(saved(f"{KERNEL}+evmcs=6.1")), SimBackend(f"{KERNEL}+evmcs=5.17"))
    assert {line.split(":")[0] for line in caught.value.reasons} == {
        "MSR_IA32_VMX_EXIT_CTLS", "MSR_IA32_VMX_TRUE_EXIT_CTLS", "MSR_IA32_VMX_ENTRY_CTLS",
        "MSR_IA32_VMX_TRUE_ENTRY_CTLS"}
    assert "controls 0x1000 that a nested hypervisor with an enlightened VMCS was offered" in str(caught.value)
