"""Making and destroying VMs: what there is, in which order, and with which errno it is refused."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import resource
from collections.abc import Callable

import numpy as np
import pytest

from migstream.backends.base import Backend, Vm
from migstream.backends.kvm import uapi
from migstream.backends.kvm.backend import KvmVm
from migstream.backends.sim.vm import SimVm
from migstream.errors import BackendError, UsageError
from migstream.model import PAGE, Arch, Bank, HostSummary, Layout, Machine, MemoryRegion, Phase, Scope
from migstream.registers import ids, msrs, x86_64
from migstream.transport import save
from tests.contract import arm64
from tests.contract.access import create, layout, machine, write
from tests.contract.conftest import SIMULATED, opened

X86_64, ARM64 = Arch.X86_64, Arch.ARM64


EVERYWHERE = (*((X86_64, name) for name in SIMULATED), *((ARM64, name) for name in arm64.SIMULATED),
              pytest.param((X86_64, "kvm"), marks=pytest.mark.kvm, id="kvm"),
              pytest.param((X86_64, "kvm-pure"), marks=pytest.mark.kvm, id="kvm-pure"),
              pytest.param((ARM64, "kvm"), marks=pytest.mark.kvm_arm64, id="kvm-arm64"))
"""Every backend of both architectures."""


@pytest.fixture(params=EVERYWHERE, ids=lambda one: one[1])
def everywhere(request: pytest.FixtureRequest) -> Backend:
    arch, name = request.param
    return opened(name) if arch == X86_64 else arm64.OPENERS[name]()


def made(backend: Backend, vcpus: int = 2) -> Vm:
    """A VM without vCPUs."""
    return backend.create(machine(vcpus) if backend.arch == X86_64 else arm64.machine(vcpus))


USES: dict[str, Callable[[Vm, Layout], object]] = {
    "create_vcpus": lambda vm, at: vm.create_vcpus(),
    "layouts": lambda vm, at: vm.layouts(),
    "read": lambda vm, at: vm.read(at, 0, np.zeros((1, at.row_words), np.uint64)),
    "write": lambda vm, at: vm.write(at, 0, np.zeros((1, at.row_words), np.uint64)),
    "read_all": lambda vm, at: vm.read_all([Bank(at, 0, np.zeros((1, at.row_words), np.uint64))]),
    "take_stock": lambda vm, at: vm.take_stock([at]),
    "start": lambda vm, at: vm.start(),
    "enter": lambda vm, at: vm.enter(0),
    "save": lambda vm, at: save(vm, io.BytesIO(), host=HostSummary("", "", ""), pause=vm.pause),
}


@pytest.mark.parametrize("use", USES)
def test_a_vm_that_is_closed_is_used_no_more(everywhere: Backend, use: str) -> None:
    vm = made(everywhere)
    vm.create_vcpus()
    at = next(at for at in vm.layouts()[0] if at.scope == Scope.VCPU)
    vm.close()
    with pytest.raises(UsageError, match="the VM is closed"):
        USES[use](vm, at)
    vm.pause()
    vm.close()
    assert vm.exits() == {}


def test_vcpus_are_created_once(everywhere: Backend) -> None:
    with made(everywhere) as vm:
        vm.create_vcpus()
        before = vm.layouts()
        vm.create_vcpus()
        assert vm.layouts() == before


@pytest.mark.parametrize("vcpus", [0, -1])
def test_a_machine_without_vcpus_is_no_machine(everywhere: Backend, vcpus: int) -> None:
    with pytest.raises(UsageError, match=f"a machine of {vcpus} vCPUs: it needs at least one"):
        made(everywhere, vcpus)


def test_nothing_starts_before_there_are_vcpus(everywhere: Backend) -> None:
    with made(everywhere) as vm:
        with pytest.raises(UsageError, match="no vCPU to run: create_vcpus"):
            vm.start()
        vm.create_vcpus()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_vm_that_is_closed_leaves_no_file_descriptor_and_no_memory(backend: Backend) -> None:
    create(backend).close()
    before = open_files()
    vm = create(backend, 8)
    vm.memory.view(0, 8)[:] = b"8 bytes."
    vm.close()
    vm.close()
    assert open_files() == before
    with pytest.raises(UsageError, match="no guest RAM"):
        vm.memory.view(0, 8)


def test_vcpus_that_are_there_are_not_created_again(vm: Vm) -> None:
    vm.create_vcpus()
    assert len(vm.layouts()[0]) > 5


def create_vcpu(vm: Vm, number: int) -> None:
    """KVM_CREATE_VCPU, which the primitives do for all at once."""
    if isinstance(vm, KvmVm):
        os.close(uapi.call(vm.fd, uapi.CREATE_VCPU, number))
    else:
        assert isinstance(vm, SimVm)
        vm.create_vcpu(number)


@pytest.mark.parametrize(("number", "expected", "why"), [
    (0, errno.EEXIST, "there is a vCPU 0"),
    (1, errno.EEXIST, "there is a vCPU 1"),
    ("MAX_VCPU_ID", errno.EINVAL, "ids end below KVM_CAP_MAX_VCPU_ID"),
    ((1 << 31) + 1, errno.EINVAL, "an id that no C int holds"),
])
def test_a_vcpu_that_can_not_be(backend: Backend, vm: Vm, number: int | str, expected: int, why: str) -> None:
    id = backend.profile().capabilities[number] if isinstance(number, str) else number
    with pytest.raises(BackendError, match="KVM_CREATE_VCPU") as caught:
        create_vcpu(vm, id)
    assert caught.value.errno == expected, why


def test_one_vcpu_too_many_is_named(backend: Backend) -> None:
    most = backend.profile().max_vcpus
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most > 1100 or 3 * most > most_files:
        pytest.skip(f"{most} vCPUs are allowed here: {most_files} file descriptors may not be enough")
    with backend.create(machine(most + 1, memory=())) as vm, pytest.raises(BackendError, match="CREATE_VCPU") as caught:
        vm.create_vcpus()
    assert (caught.value.errno, caught.value.vcpu) == (errno.EINVAL, most)


MIB = 1 << 20


@pytest.mark.parametrize(("regions", "expected", "why"), [
    ([(0, MIB), (MIB // 2, MIB)], errno.EEXIST, "the second overlaps the first"),
    ([(0, MIB), (0, MIB)], errno.EEXIST, "twice the same"),
    ([(PAGE // 2, MIB)], errno.EINVAL, "an address within a page"),
    ([(0, PAGE + 1)], errno.EINVAL, "a size that is not whole pages"),
    ([(0, 0)], errno.EINVAL, "no memory at all"),
    ([(1 << 52, MIB)], errno.EINVAL, "above all physical addresses"),
    ([(2**64 - MIB, MIB)], errno.EINVAL, "the end wraps round"),
    ([(0, 1 << 60)], errno.ENOMEM, "more than the host's address space"),
])
def test_memory_that_can_not_be(backend: Backend, regions: list[tuple[int, int]], expected: int, why: str) -> None:
    before = open_files()
    with pytest.raises(BackendError) as caught:
        backend.create(machine(memory=tuple(MemoryRegion(*region) for region in regions)))
    assert caught.value.errno == expected, why
    assert open_files() == before


def test_memory_that_there_is_not_says_what_to_do(everywhere: Backend) -> None:
    plain = made(everywhere)
    plain.close()
    wanted = dataclasses.replace(plain.machine, memory=(MemoryRegion(1 << 30, 1 << 60),))
    with pytest.raises(BackendError, match=f"mmap 0x40000000: ENOMEM: no {1 << 60} bytes .* ask for less memory"):
        everywhere.create(wanted)


def test_memory_regions_side_by_side_are_memory(backend: Backend) -> None:
    regions = (MemoryRegion(0, MIB), MemoryRegion(MIB, MIB), MemoryRegion(1 << 32, MIB))
    with backend.create(machine(memory=regions)) as vm:
        vm.memory.view((1 << 32) + 8, 4)[:] = b"high"
        assert bytes(vm.memory.view((1 << 32) + 8, 4)) == b"high"
        vm.memory.zero(1 << 32, PAGE)
        assert bytes(vm.memory.view(1 << 32, PAGE)) == bytes(PAGE)
        for address in (2 * MIB, (1 << 32) + MIB - 2, MIB - 2):
            with pytest.raises(UsageError, match="no guest RAM"):
                vm.memory.view(address, 4)


@pytest.mark.parametrize(("devices", "expected", "why"), [
    ({"pit": True}, errno.ENOENT, "a PIT without an interrupt chip to raise interrupts on"),
])
@pytest.mark.usefixtures("newer_than_6_1")
def test_devices_that_can_not_be(backend: Backend, devices: dict[str, object], expected: int, why: str) -> None:
    with pytest.raises(BackendError) as caught:
        backend.create(machine(devices=devices))
    assert caught.value.errno == expected, why


def test_a_tss_address_as_qemu_uses_it_is_no_c_int_and_taken(backend: Backend) -> None:
    backend.create(machine(devices={"irqchip": True, "tss_address": 0xFEFF_D000})).close()


def test_an_unknown_device_is_named(backend: Backend) -> None:
    with pytest.raises(UsageError, match="'floppy'"):
        backend.create(machine(devices={"floppy": True}))


def test_a_machine_of_another_architecture_is_not_made(backend: Backend) -> None:
    with pytest.raises(UsageError, match="arm64"):
        backend.create(Machine(Arch.ARM64, 1, ()))


@pytest.mark.parametrize(("capability", "argument", "expected", "why"), [
    (99999, 0, errno.EINVAL, "no such capability"),
    (129, 1 << 40, errno.EINVAL, "KVM_CAP_X2APIC_API: an unknown flag"),
    (129, 3, 0, "KVM_CAP_X2APIC_API: 32-bit ids, no broadcast quirk"),
    (164, 1, 0, "KVM_CAP_EXCEPTION_PAYLOAD"),
])
def test_capabilities_are_enabled_or_refused(backend: Backend, capability: int, argument: int, expected: int,
                                             why: str) -> None:
    try:
        vm = backend.create(machine(), {capability: (argument,)})
    except BackendError as error:
        assert error.errno == expected, why
        return
    with vm:
        vm.create_vcpus()
        told = [slot.id for at in vm.layouts()[0] for slot in at.slots if at.phase == Phase.CREATE]
    assert expected == 0, why
    assert ids.capability_id(Arch.X86_64, capability) in told


def test_layouts_have_each_register_once_in_the_catalogues_order(vm: Vm) -> None:
    layouts, refused = vm.layouts()
    slots = [slot.id for at in layouts for slot in at.slots]
    assert len(slots) == len(set(slots))
    assert not {no.register for no in refused} & set(slots)
    assert [at.phase for at in layouts] == sorted(at.phase for at in layouts)
    state = next(at for at in layouts if (at.scope, at.phase) == (Scope.VCPU, Phase.STATE))
    order = [slot.id for slot in state.slots]
    indices = [index for id in order if (index := ids.msr_index(id)) is not None]
    assert indices == msrs.sort_for_restore(indices)
    rows = [row.id for row in x86_64.ROWS if row.id in order]
    assert [id for id in order if id in rows] == rows


def test_a_vm_without_devices_has_no_registers_of_them(backend: Backend) -> None:
    with create(backend, devices={}) as vm:
        slots = {slot.id for at in vm.layouts()[0] for slot in at.slots}
    assert not slots & {x86_64.LAPIC.id, x86_64.PIC_MASTER.id, x86_64.IOAPIC.id, x86_64.PIT2.id}
    assert x86_64.REGS.id in slots


def test_rows_that_there_are_not_are_a_mistake_of_the_caller(vm: Vm) -> None:
    with pytest.raises(UsageError, match="fewer"):
        write(vm, x86_64.MP_STATE.id, [bytes(4)] * 2, first_vcpu=1)
    with pytest.raises(UsageError, match="width"):
        vm.read(layout((x86_64.REGS.id, 144)), 0, np.zeros((1, 3), np.uint64))
