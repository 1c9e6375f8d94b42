"""Rules of x86-64 that no kernel of the lab can show: XSAVE components of other CPUs, VMX MSRs under an eVMCS."""

from __future__ import annotations

import io
import struct
from dataclasses import replace

import pytest

from migstream.backends.sim import SimBackend
from migstream.backends.sim.variants_x86_64 import GENERATIONS
from migstream.contract import RECORDED, Behaviour
from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.host.scratch import Scratch
from migstream.model import Arch, Layout, Machine, Phase, Scope, Slot
from migstream.plan import plan_for
from migstream.registers import ids, x86_64
from migstream.registers.x86_64 import CPUID2
from migstream.transport import capture_prologue, restore, save
from migstream.verdicts.model import Answer, Column, Kernel, Saved, Verdict

FP_SSE, AVX, AVX512 = 0b11, 0b100, 0b1110_0000


def host(components: int, size: int) -> HostProfile:
    entry = struct.pack("<10I", 0xD, 0, 1, components & 0xFFFF_FFFF, 0, size, components >> 32, 0, 0, 0)
    return HostProfile(Arch.X86_64, "Linux 6.12", "cpu", "kvm", {"MAX_VCPUS": 8, "XSAVE": 1},
                       sizes={x86_64.XSAVE.id: size}, cpuid=struct.pack("<II", 1, 0) + entry)


def xsave(in_use: int, size: int, target: HostProfile) -> Verdict:
    value = bytearray(size)
    struct.pack_into("<Q", value, 512, in_use)
    slot = Slot(x86_64.XSAVE.id, size)
    saved = Saved(Machine(Arch.X86_64, 1, ()), (Layout(Scope.VCPU, Phase.STATE, (slot,)),),
                  {slot.id: Column.of(slot, bytes(value))})
    (found,) = plan_for(saved, target).verdicts
    return found


@pytest.mark.parametrize(("in_use", "size", "target", "answer", "written"), [
    (FP_SSE, 4096, host(FP_SSE | AVX, 4096), Answer.FITS, 4096),
    (FP_SSE | AVX, 4096, host(FP_SSE | AVX | AVX512, 4096), Answer.FITS, 4096),
    (FP_SSE | AVX, 4096, host(FP_SSE, 4096), Answer.REFUSED, None),
    (FP_SSE | AVX512, 4096, host(FP_SSE | AVX, 4096), Answer.REFUSED, None),
    (FP_SSE | AVX, 11008, host(FP_SSE | AVX, 4096), Answer.WRITTEN_AS, 4096),     # AMX was there and not in use
    (FP_SSE | 1 << 18, 11008, host(FP_SSE | AVX, 4096), Answer.REFUSED, None),    # AMX tiles in use
    (FP_SSE, 4096, host(FP_SSE | 1 << 18, 11008), Answer.WRITTEN_AS, 11008),
])
def test_xsave_is_judged_by_the_components_in_use(in_use: int, size: int, target: HostProfile, answer: Answer,
                                                  written: int | None) -> None:
    found = xsave(in_use, size, target)
    assert (found.answer, found.target and found.target.size) == (answer, written)


def test_what_is_missing_is_named() -> None:
    found = xsave(FP_SSE | AVX, 4096, host(FP_SSE, 4096))
    assert "AVX" in found.reason or "YMM" in found.reason
    assert found.kernel == Kernel.REFUSES


# eVMCS: guests of a simulated kernel whose VMX MSRs read filtered.


def promised(generation: str, evmcs: int = 1) -> Saved:
    """A guest that was offered what this generation leaves; `evmcs` is the version in its CPUID."""
    profile = SimBackend(f"x86_64-7.2+evmcs={generation}").profile()
    values = {0x2030_0002_0000_0000 | int(name.removeprefix("evmcs_msr_"), 16): value.to_bytes(8, "little")
              for name, value in profile.behaviour.items() if name.startswith("evmcs_msr_")}
    entry = struct.pack("<10I", 0x4000_000A, 0, 0, evmcs, 0, 0, 0, 0, 0, 0)
    values[CPUID2.id] = struct.pack("<II", 1, 0) + entry
    slots = tuple(Slot(id, len(value)) for id, value in values.items())
    columns = {slot.id: Column.of(slot, values[slot.id]) for slot in slots}
    return Saved(Machine(Arch.X86_64, 1, ()), (Layout(Scope.VCPU, Phase.FEATURE, slots),), columns)


def noticed(saved: Saved, target: HostProfile) -> set[str]:
    return {v.name for v in plan_for(saved, target).verdicts if v.answer == Answer.NOTICED and "VMX" in v.name}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_guest_with_an_evmcs_goes_where_the_same_filter_is(generation: str) -> None:
    assert not noticed(promised(generation), SimBackend(f"x86_64-7.2+evmcs={generation}").profile())


@pytest.mark.parametrize(("source", "target", "lost"), [
    ("6.1", "5.17", {"MSR_IA32_VMX_TRUE_EXIT_CTLS", "MSR_IA32_VMX_EXIT_CTLS", "MSR_IA32_VMX_TRUE_ENTRY_CTLS",
                     "MSR_IA32_VMX_ENTRY_CTLS"}),
    ("5.17", "6.1", set()),  # what KVM makes follows the TRUE forms, which travel
])
def test_a_version_1_that_is_another_set(source: str, target: str, lost: set[str]) -> None:
    assert noticed(promised(source), SimBackend(f"x86_64-7.2+evmcs={target}").profile()) == lost


def test_a_control_msr_that_kvm_makes_fits_where_its_true_form_says_the_same() -> None:
    """A control that the VMM took away is missing from both; with the made one alone it is another guest's."""
    target = SimBackend("x86_64-7.2+evmcs=6.1").profile()
    pin, true = ids.msr_id(0x481), ids.msr_id(0x48D)
    host = target.behaviour["evmcs_msr_48d"]

    def answer(made: int, form: int) -> Answer:
        entry = struct.pack("<10I", 0x4000_000A, 0, 0, 1, 0, 0, 0, 0, 0, 0)
        values = {CPUID2.id: struct.pack("<II", 1, 0) + entry,
                  pin: made.to_bytes(8, "little"), true: form.to_bytes(8, "little")}
        slots = tuple(Slot(id, len(value)) for id, value in values.items())
        columns = {slot.id: Column.of(slot, values[slot.id]) for slot in slots}
        saved = Saved(Machine(Arch.X86_64, 1, ()), (Layout(Scope.VCPU, Phase.FEATURE, slots),), columns)
        return next(v.answer for v in plan_for(saved, target).verdicts if v.slot.id == pin)

    less = host & ~(1 << 35)
    assert answer(host, host) == answer(less, less) == Answer.FITS
    assert answer(less, host) == Answer.NOTICED


def test_a_host_that_nobody_has_asked_is_not_called_fitting() -> None:
    target = SimBackend("x86_64-7.2+evmcs=6.1").profile()
    unasked = replace(target, behaviour={k: v for k, v in target.behaviour.items() if not k.startswith("evmcs_msr")})
    assert "MSR_IA32_VMX_TRUE_EXIT_CTLS" in noticed(promised("6.1"), unasked)
    assert not noticed(promised("6.1", evmcs=0), unasked)


def test_a_kvm_without_an_evmcs() -> None:
    (found,) = (v for v in plan_for(promised("6.1"), profiles.load("x86_64-7.2")).verdicts if v.name == "KVM_CPUID2")
    assert found.answer == Answer.REFUSED and "enlightened VMCS" in found.reason


# A feature MSR that the saving kernel could tell and not save, end to end.


@pytest.mark.sim
@pytest.mark.parametrize("promised", [0, 2])
def test_a_promise_is_written_and_read_back(promised: int) -> None:
    """MSR_AMD64_DE_CFG of a kernel without it: 7.2 starts with 2, and shows what the guest has met."""
    id, stream = ids.msr_id(0xC001_1029), io.BytesIO()
    old, new = SimBackend("x86_64-6.12+hide-msr=MSR_AMD64_DE_CFG"), SimBackend("x86_64-7.2")
    with old.create(Machine(Arch.X86_64, 2, ())) as vm:
        vm.create_vcpus()
        prologue = capture_prologue(vm, Behaviour(RECORDED, {id: promised.to_bytes(8, "little")}))
        save(vm, stream, host=old.summary(), pause=lambda: None, prologue=prologue)
    stream.seek(0)
    vm, report = restore(stream, new, readback=True)
    with vm:
        assert [Scratch(vm, 2).read(id, 8, vcpu) for vcpu in (0, 1)] == [promised.to_bytes(8, "little")] * 2
    assert not [str(one) for one in report.differs if not one.reason]
