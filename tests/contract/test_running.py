"""Guests run, stop exactly, and go on elsewhere: on every pair of backends."""

from __future__ import annotations

import io
import struct
import time

import pytest

from migstream.backends.base import Backend, Vm
from migstream.demo import guest_x86_64 as guest
from migstream.errors import UsageError
from migstream.model import MemoryRegion
from migstream.registers import x86_64
from migstream.report import Report
from migstream.transport import capture_prologue, restore, save
from tests.contract.access import create, machine, patched, read, run_a_little, write
from tests.contract.conftest import SIMULATED, opened

FAR = 0x4000_0000
"""Mapped by the demo guest's page tables, and no RAM there."""

HALT, LOOP = b"\xf4", b"\xeb\xfe"
STORE = bytes.fromhex("488906")
"""mov [rsi], rax"""


def installed(backend: Backend, vcpus: int) -> Vm:
    vm = backend.create(machine(vcpus), {129: (3,)} if 129 in told(backend) else {})
    vm.create_vcpus()
    guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
    return vm


def told(backend: Backend) -> tuple[int, ...]:
    """VM capabilities to enable, so that one travels."""
    return (129,) if backend.profile().capabilities.get("X2APIC_API") else ()


@pytest.mark.parametrize("vcpus", [1, 3, 16])
def test_every_vcpu_counts_and_is_stopped_between_two_instructions(backend: Backend, vcpus: int) -> None:
    with installed(backend, vcpus) as vm:
        for _ in range(4):
            run_a_little(vm)
            counters = guest.counters(vm)
            assert [one.fault for one in counters] == [""] * vcpus
            assert [one.steps for one in counters] == [one.steps for one in guest.counters(vm)], "it stands still"
        assert vm.exits() == {}


def test_a_vm_that_runs_is_not_started_twice_and_is_closed_all_the_same(backend: Backend) -> None:
    with installed(backend, 2) as vm:
        vm.start()
        with pytest.raises(UsageError, match="run already"):
            vm.start()
    vm.pause()


def test_a_pause_before_any_start_is_nothing(backend: Backend) -> None:
    with installed(backend, 1) as vm:
        vm.pause()
        assert guest.counters(vm)[0].steps == 0


def stopped(vm: Vm, code: bytes) -> dict[int, str]:
    """Run code in place of the demo guest's until vCPU 0 stops by itself, and return the exits."""
    vm.memory.view(guest.CODE, len(code))[:] = code
    vm.start()
    deadline = time.monotonic() + 20
    while 0 not in vm.exits() and time.monotonic() < deadline:
        time.sleep(0.005)
    vm.pause()
    return vm.exits()


def test_a_store_to_where_no_ram_is_ends_in_an_mmio_exit(backend: Backend) -> None:
    with installed(backend, 1) as vm:
        assert write(vm, x86_64.REGS.id, [patched(read(vm, x86_64.REGS.id)[0], {4: FAR})]) == []
        assert stopped(vm, STORE + LOOP) == {0: "KVM_EXIT_MMIO"}


def test_a_guest_whose_self_check_fails_tells_the_host(backend: Backend) -> None:
    """A count that was changed behind the guest's back is found by the guest, and by the host."""
    with installed(backend, 1) as vm:
        run_a_little(vm)
        at = vm.memory.view(guest.CELLS, 8)
        at[:] = struct.pack("<Q", struct.unpack("<Q", at)[0] + 5)
        del at
        assert guest.counters(vm)[0].fault
        assert stopped(vm, guest.PROGRAM) == {0: "KVM_EXIT_MMIO"}
        assert "self-check failed" in guest.counters(vm)[0].fault


def test_a_halt_is_an_exit_where_no_interrupt_can_come(backend: Backend) -> None:
    with create(backend, 1, devices={"tss_address": 0x7FFB_D000}) as vm:
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        assert stopped(vm, HALT + LOOP) == {0: "KVM_EXIT_HLT"}
        assert struct.unpack_from("<Q", read(vm, x86_64.REGS.id)[0], 128)[0] == guest.CODE + 1


def test_a_halt_waits_in_the_kernel_where_interrupt_chips_are_its_own(backend: Backend) -> None:
    with installed(backend, 1) as vm:
        vm.memory.view(guest.CODE + guest.PROGRAM.index(b"\xeb\xe8"), 2)[:] = HALT + HALT
        vm.start()
        deadline = time.monotonic() + 10
        while guest.counts(vm) != [1] and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        vm.pause()
        assert (vm.exits(), guest.counts(vm)) == ({}, [1])
        assert read(vm, x86_64.MP_STATE.id) == [struct.pack("<I", 3)], "HALTED"


def test_memory_behind_the_guest_shows_its_progress(backend: Backend) -> None:
    with installed(backend, 2) as vm:
        run_a_little(vm)
        assert guest.counts(vm) == pytest.approx([one.steps for one in guest.counters(vm)], abs=1)


def migrated(source: Backend, target: Backend, vcpus: int) -> tuple[Vm, Report, list[int]]:
    """Run, save mid-run, restore with read-back; the target VM, the report, and the steps at the pause."""
    out = io.BytesIO()
    with installed(source, vcpus) as vm:
        prologue = capture_prologue(vm)
        run_a_little(vm)
        vm.start()
        save(vm, out, host=source.summary(), pause=vm.pause, prologue=prologue)
        counters = guest.counters(vm)
        assert [one.fault for one in counters] == [""] * vcpus
    restored, report = restore(io.BytesIO(out.getvalue()), target, readback=True)
    return restored, report, [one.steps for one in counters]


PAIRS = [*((name, name) for name in SIMULATED),
         *(pytest.param(*pair, marks=pytest.mark.kvm) for pair in (("kvm", "kvm"), ("sim", "kvm"), ("kvm", "sim")))]
"""Each kernel's stream on the same kernel, and between real KVM and its simulator: between others it need not fit."""


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("vcpus", [1, 6])
def test_a_guest_goes_on_counting_on_another_backend(source: str, target: str, vcpus: int) -> None:
    backend, other = opened(source), opened(target)
    there, here = other.profile(), backend.profile()
    if (there.msrs, there.cpu) != (here.msrs, here.cpu):
        pytest.skip(f"a stream of {here.kernel} on {here.cpu} need not fit {there.kernel} on {there.cpu}")
    vm, report, steps = migrated(backend, other, vcpus)
    with vm:
        counters = guest.counters(vm)
        assert ([one.steps for one in counters], {one.fault for one in counters}) == (steps, {""})
        run_a_little(vm)
        after = guest.counters(vm)
        assert {one.fault for one in after} == {""}
        assert all(one.steps >= then + 20 for one, then in zip(after, steps, strict=True))
        assert vm.exits() == {}
    if other.profile().cpu == backend.profile().cpu:
        assert [str(d) for d in report.differs if not d.reason] == []
        assert report.refused == []


def test_memory_of_several_regions_travels(backend: Backend) -> None:
    regions = (MemoryRegion(0, 1 << 20), MemoryRegion(1 << 32, 1 << 20))
    out = io.BytesIO()
    with backend.create(machine(1, regions)) as vm:
        vm.create_vcpus()
        vm.memory.view((1 << 32) + 0x5000, 6)[:] = b"second"
        save(vm, out, host=backend.summary(), pause=vm.pause)
    restored, _ = restore(io.BytesIO(out.getvalue()), backend)
    with restored:
        assert bytes(restored.memory.view((1 << 32) + 0x5000, 6)) == b"second"
        assert restored.memory.regions == regions
