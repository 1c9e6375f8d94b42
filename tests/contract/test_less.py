"""Kernels that offer less, restores that are refused, and restores that fail half-way."""

from __future__ import annotations

import dataclasses
import errno
import io
from collections.abc import Mapping
from typing import Any

import pytest

from migstream.backends.base import SHORT_COUNT, Backend, Refusal, Vm
from migstream.backends.sim import SimBackend
from migstream.demo import guest_x86_64 as guest
from migstream.errors import DoesNotFit, RestoreFailed, Truncated
from migstream.model import Layout, Machine, Scope
from migstream.plan import Answer
from migstream.registers import x86_64
from migstream.transport import capture_prologue, restore, save
from tests.contract.access import (
    LSTAR,
    create,
    machine,
    msr,
    read,
    recorded_profile,
    run_a_little,
    u64,
    write,
    write_errno,
)


def stream(backend: Backend, vcpus: int = 2) -> bytes:
    """A demo guest, saved mid-run."""
    out = io.BytesIO()
    with backend.create(machine(vcpus)) as vm:
        vm.create_vcpus()
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        assert write(vm, msr(LSTAR), [u64(0x1000 * k) for k in range(vcpus)]) == []
        prologue = capture_prologue(vm)
        run_a_little(vm)
        save(vm, out, host=backend.summary(), pause=vm.pause, prologue=prologue)
    return out.getvalue()


LESS = (("SREGS2",), ("XSAVE2",), ("ONE_REG",), ("VCPU_ATTRIBUTES",),
        ("SREGS2", "XSAVE2", "ONE_REG", "VCPU_ATTRIBUTES"))


@pytest.mark.parametrize("without", LESS)
def test_a_kernel_that_offers_less_saves_restores_and_runs(without: tuple[str, ...]) -> None:
    old = SimBackend(without=without)
    vm, report = restore(io.BytesIO(stream(old)), old, readback=True)
    with vm:
        run_a_little(vm)
        assert {one.fault for one in guest.counters(vm)} == {""}
        assert read(vm, msr(LSTAR)) == [u64(0), u64(0x1000)]
    assert not report.lossy
    assert report.refused == []


@pytest.mark.parametrize("without", LESS)
@pytest.mark.usefixtures("recorded_kernel")
def test_a_stream_of_a_kernel_that_offers_less_is_restored_by_any(backend: Backend, without: tuple[str, ...]) -> None:
    vm, report = restore(io.BytesIO(stream(SimBackend(recorded_profile(backend), without=without))), backend,
                         readback=True)
    with vm:
        run_a_little(vm)
        assert {one.fault for one in guest.counters(vm)} == {""}
    assert report.refused == []


@pytest.mark.usefixtures("recorded_kernel")
def test_sregs2_of_a_stream_is_written_as_sregs_where_the_kernel_has_only_that(backend: Backend) -> None:
    old = SimBackend(recorded_profile(backend), without=("SREGS2",))
    vm, report = restore(io.BytesIO(stream(backend)), old, readback=True)
    with vm:
        assert [v.answer for v in report.verdicts if v.slot.id == x86_64.SREGS2.id] == [Answer.WRITTEN_AS]
        assert {slot.id for at in vm.layouts()[0] for slot in at.slots} & {x86_64.SREGS.id, x86_64.SREGS2.id} == {
            x86_64.SREGS.id}
        run_a_little(vm)
        assert {one.fault for one in guest.counters(vm)} == {""}
    assert not report.lossy


@pytest.mark.parametrize("without", ["SREGS2", "VCPU_ATTRIBUTES", "VCPU_EVENTS", "DEBUGREGS"])
def test_the_ioctl_of_a_capability_that_is_not_there_is_unknown(without: str) -> None:
    row = next(row for row in x86_64.ROWS if row.needs == without)
    with create(SimBackend(without=(without,)), 1) as vm:
        assert write_errno(vm, row.id, bytes(row.size or 8)) == errno.EINVAL
        assert row.id not in {slot.id for at in vm.layouts()[0] for slot in at.slots}


class Counting(Backend):
    """A backend that notes what is made and closed, and whose VMs refuse what they are told to."""

    def __init__(self, backend: Backend, refuse: tuple[int, ...] = ()) -> None:
        self.backend, self.refuse, self.arch, self.name = backend, refuse, backend.arch, backend.name
        self.made: list[Vm] = []
        self.closed = 0

    def profile(self) -> Any:
        return self.backend.profile()

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> Vm:
        vm = self.backend.create(machine, enabled_caps)
        self.made.append(vm)
        write, close = vm.write, vm.close

        def refusing(layout: Layout, first_vcpu: int, values: Any) -> list[Refusal]:
            found = write(layout, first_vcpu, values)
            bad = [id for id in self.refuse if id in layout.index]
            values[:, [layout.offsets[layout.index[id]] for id in bad]] ^= 1  # so that it does not look harmless
            return found + [Refusal(id, first_vcpu, "KVM_SET_MSRS", SHORT_COUNT) for id in bad]

        def closing() -> None:
            self.closed += 1
            close()

        vm.write, vm.close = refusing, closing  # type: ignore[method-assign]  # this VM alone
        return vm


NEEDED = ("VCPU_EVENTS", "DEBUGREGS", "XCRS", "MP_STATE")


@pytest.mark.parametrize("without", NEEDED)
@pytest.mark.usefixtures("recorded_kernel")
def test_a_plan_that_says_no_has_made_no_vm(backend: Backend, without: str) -> None:
    target = Counting(SimBackend(recorded_profile(backend), without=(without,)))
    with pytest.raises(DoesNotFit, match=f"KVM_CAP_{without}"):
        restore(io.BytesIO(stream(backend)), target)
    assert target.made == []


def test_a_restore_that_fails_half_way_leaves_no_vm(backend: Backend) -> None:
    data = stream(backend)
    target = Counting(backend, refuse=(msr(LSTAR),))
    with pytest.raises(RestoreFailed, match="MSR_LSTAR") as caught:
        restore(io.BytesIO(data), target)
    assert (len(target.made), target.closed) == (1, 1)
    report: Any = caught.value.report
    assert {no.register for no, reason in report.refused if not reason} == {msr(LSTAR)}


def test_a_stream_that_ends_half_way_leaves_no_vm(backend: Backend) -> None:
    data = stream(backend)
    target = Counting(backend)
    with pytest.raises(Truncated):
        restore(io.BytesIO(data[:-40]), target)
    assert (len(target.made), target.closed) == (1, 1)


@pytest.mark.usefixtures("recorded_kernel")
def test_a_capability_that_the_target_refuses_ends_the_restore(backend: Backend) -> None:
    """The kernel can't be asked what is enabled, so a refusal is never harmless; it used to end in a KeyError."""
    recorded = recorded_profile(backend)
    willing = SimBackend(dataclasses.replace(recorded, enable_caps={**recorded.enable_caps, 999: 7}))
    out = io.BytesIO()
    with willing.create(machine(1), {999: (5,)}) as vm:
        vm.create_vcpus()
        save(vm, out, host=willing.summary(), pause=vm.pause)
    target = Counting(backend)
    with pytest.raises(RestoreFailed, match=r"KVM_ENABLE_CAP\(999\)"):
        restore(io.BytesIO(out.getvalue()), target)
    assert target.closed == 1


def test_vm_scoped_writes_do_not_grow_with_the_vcpus(backend: Backend) -> None:
    found = []
    for vcpus in (1, 12):
        vm, report = restore(io.BytesIO(stream(backend, vcpus)), backend)
        vm.close()
        found.append({phase: row[Scope.VM] for phase, row in report.writes.items()})
    assert found[0] == found[1]
    assert found[0]["interrupts"] == 4
    assert found[0]["clock"] == 1
