"""The contract on arm64: what every backend does with registers, vCPUs that run, streams and descriptors."""

from __future__ import annotations

import errno
import io
import os
import struct
import time
from collections.abc import Iterator

import pytest

from migstream.backends.base import Backend, Vm
from migstream.demo import guest_arm64 as guest
from migstream.errors import BackendError, DoesNotFit, UsageError
from migstream.model import Klass, Layout, Machine, Phase, Scope
from migstream.registers import arm64_ids, vcpu_features
from migstream.registers.catalogue import lookup, running
from migstream.transport import capture_prologue, restore, save
from tests.contract.access import run_a_little, u64
from tests.contract.arm64 import (
    BACKENDS,
    BOARD,
    DEFAULT,
    MEMORY,
    OPENERS,
    Owner,
    OwnersHost,
    by_name,
    create,
    everything,
    installed,
    machine,
    read,
    through_vcpu,
    write_errnos,
)  # fmt: skip

VCPUS = 3

EXCEPTIONS: dict[str, tuple[list[int], str]] = {
    "SVE_VLS": ([errno.EPERM] * VCPUS, "chosen: the vCPUs are finalized"),
    **{f"PM{what}CLR_EL{level}": ([], "ones that are written become zeroes; the SET register puts them back")
       for what, level in (("OVS", 0), ("CNTEN", 0), ("INTEN", 1))},
}
"""Registers that are not as before when they were given their own value: the errnos, and the reason."""


def still(id: int, values: list[bytes]) -> list[int]:
    """The values without the bits that may read back different."""
    moving = running(id)
    mask = sum((1 << width) - 1 << low for low, width in moving.spans) if moving else 0
    return [int.from_bytes(value, "little") & ~mask for value in values]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return OPENERS[request.param]()


@pytest.fixture
def vm(backend: Backend) -> Iterator[Vm]:
    with create(backend, VCPUS) as made:
        yield made


# registers


@pytest.mark.parametrize("full", [False, True], ids=["PSCI_0_2", "all features"])
def test_what_every_layout_reads_is_taken_back_and_read_again(backend: Backend, full: bool) -> None:
    with create(backend, VCPUS, everything(backend) if full else DEFAULT) as vm:
        layouts, refused = vm.layouts()
        assert {lookup(no.register).name for no in refused} <= {"KVM_ARM_VCPU_PMU_V3_IRQ"}, "nobody has set it yet"
        wrong = []
        for at in layouts:
            for slot in at.slots:
                before = read(vm, (at, slot))
                errnos = write_errnos(vm, (at, slot), before)
                expected = EXCEPTIONS.get(lookup(slot.id).name)
                moves = expected or lookup(slot.id).klass == Klass.CLOCK
                after = before if moves else read(vm, (at, slot))
                if errnos != (expected[0] if expected else []) or still(slot.id, after) != still(slot.id, before):
                    wrong.append((lookup(slot.id).name, errnos, [value.hex() for value in (*before, *after)]))
        assert wrong == []


def test_layouts_have_every_listed_register_once_in_the_order_of_the_phases(backend: Backend) -> None:
    features = everything(backend)
    with create(backend, 1, features) as vm:
        layouts, refused = vm.layouts()
    there = [slot.id for at in layouts for slot in at.slots] + [no.register for no in refused]
    assert len(there) == len(set(there))
    listed = set(backend.profile().with_features(features).registers)
    assert listed <= set(there)
    assert [at.phase for at in layouts] == sorted(at.phase for at in layouts)
    unknown = [hex(id) for id in there if not lookup(id).known]
    assert len(unknown) <= len(there) / 100, unknown


OWN = ("X0", "X30", "PC", "SP_EL1", "ELR_EL1", "V7", "TPIDR_EL0", "TPIDR_EL1", "FAR_EL1", "PAR_EL1", "TIMER_CVAL",
       "APIAKEYLO_EL1", "PMEVCNTR0_EL0", "P3", "Z5")
"""Registers that take any value, of every kind and width."""


@pytest.mark.parametrize("name", OWN)
def test_each_vcpu_keeps_a_value_of_its_own(backend: Backend, name: str) -> None:
    with create(backend, VCPUS, DEFAULT if name.startswith("V") else everything(backend)) as vm:
        if (place := by_name(vm).get(name)) is None:
            pytest.skip(f"vCPUs with all features have no {name} here")
        size = 4 if name.startswith("PMEV") else place[1].size
        values = [bytes(16 * k + n % 13 + 1 for n in range(size)).ljust(place[1].size, b"\0") for k in range(VCPUS)]
        assert write_errnos(vm, place, values) == []
        assert read(vm, place) == values
        assert write_errnos(vm, place, [values[0]], first_vcpu=2) == []
        assert read(vm, place) == [values[0], values[1], values[0]]


def test_a_vm_wide_register_is_one_whichever_vcpu_is_asked(vm: Vm) -> None:
    place = by_name(vm)["PSCI_VERSION"]
    assert place[0].scope == Scope.VM and read(vm, place) != [u64(2)]
    assert write_errnos(vm, place, [u64(2)]) == []
    assert read(vm, through_vcpu(place[1].id, 8)) == [u64(2)] * VCPUS


def test_every_vm_wide_register_is_the_same_on_every_vcpu(vm: Vm) -> None:
    for at, slot in by_name(vm).values():
        if at.scope == Scope.VM and slot.id >> 56 == 0x60 and lookup(slot.id).klass != Klass.CLOCK:
            assert len(set(read(vm, through_vcpu(slot.id, slot.size)))) == 1, lookup(slot.id).name


@pytest.mark.parametrize(("id", "value", "no", "why"), [
    (arm64_ids.firmware(0), u64(0x7FFF_FFFF), errno.EINVAL, "a PSCI version that nobody has"),
    (arm64_ids.firmware(0), u64(1), errno.EINVAL, "PSCI 0.1 on a vCPU with the feature PSCI_0_2"),
    (arm64_ids.sysreg(3, 0, 0, 0, 0), u64(0xBAD), errno.EINVAL, "MIDR_EL1 that is no host's"),
    (arm64_ids.sysreg(3, 0, 9, 15, 7), u64(0), errno.ENOENT, "no such system register"),
    (0x6030_0000_0010_0042, u64(0x1F), errno.EINVAL, "PSTATE: a mode that does not exist"),
])
def test_a_value_gets_the_answer_that_the_kernel_gives(vm: Vm, id: int, value: bytes, no: int, why: str) -> None:
    assert write_errnos(vm, through_vcpu(id, 8), [value]) == [no], why


def test_a_register_that_is_refused_is_named_and_hides_no_other(vm: Vm) -> None:
    x0, none = by_name(vm)["X0"][1], arm64_ids.sysreg(3, 0, 9, 15, 7)
    at = Layout(Scope.VCPU, Phase.STATE, (through_vcpu(none, 8)[1], x0))
    import numpy as np

    refused = vm.write(at, 1, np.array([[5, 77]], np.uint64))
    assert [(no.register, no.vcpu, no.errno) for no in refused] == [(none, 1, errno.ENOENT)]
    assert read(vm, by_name(vm)["X0"])[1] == u64(77)


# what a run ends


def test_bitmaps_are_fixed_once_a_vcpu_has_run_and_psci_version_is_not(backend: Backend) -> None:
    with installed(backend, 2) as vm:
        place = by_name(vm)
        if "STD_BMAP" not in place:
            pytest.skip(f"{backend.profile().kernel} has no firmware bitmaps")
        run_a_little(vm)
        (now,) = read(vm, place["STD_BMAP"])
        assert write_errnos(vm, place["STD_BMAP"], [now]) == []
        assert write_errnos(vm, place["STD_BMAP"], [u64(0)]) == [errno.EBUSY]
        assert write_errnos(vm, place["PSCI_VERSION"], [u64(0x1_0000)]) == []


def test_entering_is_no_step(backend: Backend) -> None:
    with installed(backend, 1) as vm:
        vm.enter(0)
        assert guest.counters(vm)[0].steps == 0
        run_a_little(vm)


# running


@pytest.mark.parametrize("vcpus", [1, 4])
def test_every_vcpu_counts_and_is_stopped_between_two_instructions(backend: Backend, vcpus: int) -> None:
    with installed(backend, vcpus) as vm:
        for _ in range(3):
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


def test_a_guest_whose_self_check_fails_tells_the_host(backend: Backend) -> None:
    with installed(backend, 1) as vm:
        run_a_little(vm)
        place = by_name(vm)["X0"]
        (count,) = struct.unpack("<Q", read(vm, place)[0])
        assert write_errnos(vm, place, [u64(count + 5)]) == []  # in RAM the guest might be about to overwrite it
        vm.start()
        deadline = time.monotonic() + 30
        while not vm.exits() and time.monotonic() < deadline:
            time.sleep(0.01)
        vm.pause()
        assert vm.exits() == {0: "KVM_EXIT_MMIO"}
        assert "self-check failed" in guest.counters(vm)[0].fault


# making and unmaking


def test_a_vm_that_is_closed_leaves_no_file_descriptor(backend: Backend) -> None:
    backend.profile()
    before = sorted(os.listdir("/proc/self/fd"))
    create(backend, VCPUS).close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_feature_that_the_kernel_refuses_is_named_and_leaves_nothing(backend: Backend) -> None:
    profile = backend.profile()
    bit = next(f for f in vcpu_features.FEATURES if f.name == "HAS_EL2")
    if profile.vcpu_features & bit.mask:
        pytest.skip("this kernel's vCPUs may have EL2")
    before = sorted(os.listdir("/proc/self/fd"))
    with backend.create(machine(2, DEFAULT | bit.mask)) as vm, pytest.raises(BackendError, match=bit.name) as caught:
        vm.create_vcpus()
    assert (caught.value.vcpu, caught.value.operation) == (0, "KVM_ARM_VCPU_INIT")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("wanted", "match"), [
    ({"gic_distributor": 0x1001, "gic_redistributors": 0x1000_0000}, "KVM_SET_DEVICE_ATTR"),
    ({**BOARD, "gic_irqs": 33}, "KVM_SET_DEVICE_ATTR"), ({**BOARD, "its": 0x123}, "KVM_SET_DEVICE_ATTR"),
])
def test_devices_that_can_not_be(backend: Backend, wanted: dict[str, int], match: str) -> None:
    with backend.create(Machine(machine().arch, 1, MEMORY, wanted)) as vm, pytest.raises(BackendError, match=match):
        vm.create_vcpus()


# streams


def saved(backend: Backend, vcpus: int, features: int = DEFAULT) -> tuple[bytes, list[int]]:
    """A stream of a guest that runs, and the steps at its pause."""
    out = io.BytesIO()
    with installed(backend, vcpus, features) as vm:
        prologue = capture_prologue(vm)
        run_a_little(vm)
        vm.start()
        save(vm, out, host=backend.summary(), pause=vm.pause, prologue=prologue)
        counters = guest.counters(vm)
        assert [one.fault for one in counters] == [""] * vcpus
    return out.getvalue(), [one.steps for one in counters]


@pytest.mark.parametrize("full", [False, True], ids=["PSCI_0_2", "all features"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_guest_goes_on_counting_in_another_vm(backend: Backend, vcpus: int, full: bool) -> None:
    stream, steps = saved(backend, vcpus, everything(backend) if full else DEFAULT)
    vm, report = restore(io.BytesIO(stream), backend, readback=True)
    with vm:
        assert [(one.steps, one.fault) for one in guest.counters(vm)] == [(then, "") for then in steps]
        run_a_little(vm)
        assert {one.fault for one in guest.counters(vm)} == {""}
    assert [str(d) for d in report.differs if not d.reason] == []
    assert [str(no) for no, reason in report.refused if not reason] == []


def test_vm_scoped_writes_do_not_grow_with_the_vcpus(backend: Backend) -> None:
    writes = []
    for vcpus in (1, 3):
        vm, report = restore(io.BytesIO(saved(backend, vcpus)[0]), backend)
        vm.close()
        writes.append({phase: count[Scope.VM] for phase, count in report.writes.items() if count.get(Scope.VM)})
    assert writes[0] == writes[1] and sum(writes[0].values()) > 0


def test_a_plan_that_says_no_has_made_no_vm(backend: Backend) -> None:
    bit = next(f for f in reversed(vcpu_features.FEATURES) if not f.mask & backend.profile().vcpu_features)
    out = io.BytesIO()
    with create(backend, 1) as vm:
        vm.machine = machine(1, DEFAULT | bit.mask)
        save(vm, out, host=backend.summary(), pause=lambda: None)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(DoesNotFit, match=bit.name):
        restore(io.BytesIO(out.getvalue()), backend)
    assert sorted(os.listdir("/proc/self/fd")) == before


# a VMM's own descriptors


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    """A VMM with two vCPUs, a GICv3 and an ITS."""
    made = Owner(machine(2, getattr(request, "param", DEFAULT)))
    yield made
    made.close()


@pytest.mark.kvm_arm64
def test_letting_go_closes_nothing(owner: Owner) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    vm = owner.attach()
    assert write_errnos(vm, by_name(vm)["X0"], [u64(1), u64(2)]) == []
    vm.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    for fd in (owner.kvm, owner.vm, *owner.vcpus, *owner.devices.values()):
        os.fstat(fd)
    with owner.attach() as again:
        assert read(again, by_name(again)["X0"]) == [u64(1), u64(2)]
        with pytest.raises(UsageError, match="whoever owns it"):
            again.start()


@pytest.mark.kvm_arm64
@pytest.mark.parametrize("owner", [DEFAULT, DEFAULT | vcpu_features.SVE | vcpu_features.PMU_V3], indirect=True,
                         ids=["PSCI_0_2", "SVE and PMU"])
def test_a_stream_is_restored_into_an_attached_vm_and_saved_from_it(owner: Owner) -> None:
    """Counters, marks of the interrupt controller and RAM: in the owner's VM as in the stream, and out again."""
    host = OwnersHost(owner)
    if missing := owner.wanted.devices["vcpu_features"] & ~host.profile().vcpu_features:
        pytest.skip(f"no {vcpu_features.names(missing)} here")
    stream, steps = saved(OPENERS["kvm"](), 2, owner.wanted.devices["vcpu_features"])
    vm, report = restore(io.BytesIO(stream), host, readback=True)
    assert [(one.steps, one.fault) for one in guest.counters(vm)] == [(then, "") for then in steps]
    assert [str(d) for d in report.differs if not d.reason] == []
    again = io.BytesIO()
    save(vm, again, host=host.summary(), pause=lambda: None)
    vm.close()
    third, _ = restore(io.BytesIO(again.getvalue()), OPENERS["kvm"](), readback=True)
    with third:
        assert [one.steps for one in guest.counters(third)] == steps
        run_a_little(third)
        assert {one.fault for one in guest.counters(third)} == {""}
