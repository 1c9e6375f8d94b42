"""The time model: costs, threads at a lock, strategies, and that what is kept as data is what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import against, calibrate, model
from bench.calibrate import Sample, fit
from migstream.backends.sim.costs import Calibration, Cost, Segment, Work, elapsed
from migstream.errors import BackendUnavailable, Corrupt, OutputError, UsageError
from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.model import Scope

KERNELS = profiles.names()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return model.load_calibration()


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> HostProfile:
    return profiles.load(request.param)


def test_a_lock_held_all_the_time_makes_threads_take_turns() -> None:
    work = Work(10, (Segment(0.0, 100.0),))
    assert elapsed([work], 0.0) == 1000
    assert elapsed([work, work], 0.0) == 2000
    assert elapsed([work, work], 5.0) == 2000 + 19 * 5  # the first to hold it got it from nobody


def test_without_a_lock_the_slowest_thread_counts() -> None:
    assert elapsed([Work(3, (), 10.0, 1.0), Work(2, (), 10.0, 1.0)], 50.0) == 31
    assert elapsed([], 0.0) == 0


def test_a_short_hold_hides_behind_what_is_done_outside() -> None:
    work = Work(100, (Segment(900.0, 100.0),))
    assert elapsed([work] * 2, 0.0) == pytest.approx(100_000, rel=0.01)
    assert elapsed([work] * 10, 0.0) == pytest.approx(100_000, rel=0.02)
    assert elapsed([work] * 20, 0.0) == pytest.approx(200_000, rel=0.02)


@given(st.lists(st.builds(Work, st.integers(1, 9), st.lists(st.builds(
    Segment, st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=3).map(tuple),
    st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=5), st.floats(0, 100))
def test_no_thread_is_faster_than_alone_and_no_lock_is_held_twice(threads: list[Work], handoff: float) -> None:
    together, alone = elapsed(threads, handoff), [elapsed([work], handoff) for work in threads]
    held = sum(work.rows * sum(segment.held for segment in work.segments) for work in threads)
    locks = sum(work.rows * len(work.segments) for work in threads)
    assert together >= max(*alone, held) * (1 - 1e-9)
    assert together <= (sum(alone) + locks * handoff) * (1 + 1e-9)


def test_one_thread_needs_the_sum_of_its_parts() -> None:
    work = Work(4, (Segment(1.0, 2.0), Segment(3.0, 4.0)), 5.0, 6.0)
    assert elapsed([work], 99.0) == 6 + 4 * 15


def test_a_calibration_is_read_as_it_was_written(calibration: Calibration) -> None:
    again = Calibration.from_json(calibration.to_json())
    assert again == calibration and again.costs["set KVM_LAPIC"].per_vcpu > 0


@pytest.mark.parametrize(("change", "field"), [
    ({"migstream_calibration": 2}, "version"), ({"costs": {"x": {"base": -1.0}}}, "x.base"),
    ({"costs": {"x": {"bass": 1.0}}}, "x: not a cost"), ({"costs": {"x": {"base": "1"}}}, "x.base"),
    ({"costs": 3}, "costs"),
    ({"more": 1}, "more"), ({"points": None}, "points|NoneType"), ({"costs": {"x": {"base": float("nan")}}}, "x.base"),
    ({"handoff": "soon"}, "handoff"), ({"handoff": -1.0}, "handoff"), ({"machine": 7}, "machine")])
def test_nonsense_is_no_calibration(calibration: Calibration, change: dict[str, object], field: str) -> None:
    document = {**json.loads(calibration.to_json()), **change}
    with pytest.raises(Corrupt, match=field):
        Calibration.from_json(json.dumps(document))


def test_a_file_that_is_not_there_or_no_calibration_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nothing\.json"):
        model.load_calibration(tmp_path / "nothing.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(Corrupt, match=r"list\.json"):
        model.load_calibration(tmp_path / "list.json")


def test_the_calibration_that_is_kept_names_its_machine_and_its_points(calibration: Calibration) -> None:
    assert {"cpu", "kernel", "cpus"} <= calibration.machine.keys()
    assert not set(calibration.points) & set(against.CHECKED)
    assert calibration.costs["set KVM_IRQCHIP_IOAPIC"].hold is not None, "the lock that everything is about"


@pytest.mark.sim
def test_vm_scoped_state_costs_once_or_as_often_as_there_are_vcpus(calibration: Calibration,
                                                                   kernel: HostProfile) -> None:
    for vcpus in (1, 64, 512):
        each = model.predict("per-vCPU", vcpus, 1, calibration, kernel)
        once = model.predict("scoped", vcpus, 1, calibration, kernel)
        late = model.predict("prologue", vcpus, 1, calibration, kernel)
        assert each.keys() == once.keys() > late.keys()
        for phase, ns in each.items():
            assert ns == pytest.approx(once[phase]) if f"({Scope.VCPU})" in phase or vcpus == 1 else ns > once[phase]
        assert sum(late.values()) < sum(once.values())
        assert all(ns == once[phase] for phase, ns in late.items())


@pytest.mark.sim
def test_threads_help_and_not_without_end(calibration: Calibration, kernel: HostProfile) -> None:
    whole = [sum(model.predict("prologue+threads", 512, threads, calibration, kernel).values())
             for threads in (1, 2, 8, 128, 512, 1024)]
    assert whole[1] < 0.7 * whole[0]
    assert sorted(whole, reverse=True) == whole and whole[-1] == whole[-2]
    assert whole[3] >= whole[0] / 128


@pytest.mark.sim
def test_the_ioapic_written_by_every_vcpu_gains_nothing_from_threads(calibration: Calibration) -> None:
    profile = profiles.load("x86_64-6.18-pvm")
    one, many = (model.predict("per-vCPU", 512, threads, calibration, profile)["restore interrupts (vm)"]
                 for threads in (1, 64))
    assert many > 0.9 * one


@pytest.mark.sim
def test_a_counter_of_an_old_arm64_kernel_loops_over_all_vcpus(calibration: Calibration) -> None:
    def clock(name: str, vcpus: int) -> float:
        found = model.predict("per-vCPU", vcpus, 1, calibration, profiles.load(name))
        return found["restore clock (vm)"] / vcpus

    assert clock("arm64-6.1", 512) > 5 * clock("arm64-6.1", 1)
    assert clock("arm64-7.2", 512) <= clock("arm64-7.2", 1)
    assert any("6.4" in line for line in model.assumptions(calibration, profiles.load("arm64-6.1")))
    assert not any("6.4" in line for line in model.assumptions(calibration, profiles.load("arm64-7.2")))


@pytest.mark.sim
def test_the_machine_s_own_kernel_needs_no_assumption(calibration: Calibration) -> None:
    assert model.assumptions(calibration, profiles.load("x86_64-6.18-pvm")) == []


def test_what_is_not_known_is_refused(calibration: Calibration) -> None:
    profile = profiles.load("arm64-7.2")
    with pytest.raises(UsageError, match="no strategy 'fast': per-vCPU, scoped"):
        model.predict("fast", 1, 1, calibration, profile)
    with pytest.raises(UsageError, match="from 1 on"):
        model.predict("scoped", 0, 1, calibration, profile)
    with pytest.raises(UsageError, match="KVM_VCPU_EVENTS: not in this calibration"):
        model.predict("scoped", 1, 1, dataclasses.replace(calibration, costs={}), profile)


def test_what_a_caller_needs_for_each_ioctl_is_added(calibration: Calibration) -> None:
    profile = profiles.load("arm64-7.2")
    plain, slow = (sum(model.predict("scoped", 8, 1, calibration, profile, per_call=more).values())
                   for more in (0.0, 1000.0))
    ioctls = sum((8 if layout.scope == Scope.VCPU else 1) * len(layout.slots) * 2
                 for layout in model.layouts_of(profile))
    assert slow - plain == pytest.approx(1000 * ioctls)


def _samples(cost: Cost, name: str, threads: int, times: float = 1.0) -> list[Sample]:
    return [Sample(name, vcpus, vcpus / threads, 1, threads,
                   cost.total(vcpus) * times + cost.first * threads / vcpus) for vcpus in calibrate.POINTS]


def test_a_fit_finds_the_costs_that_made_the_samples() -> None:
    linear, flat = Cost(5000.0, 200.0, 0.0, 300.0), Cost(400.0)
    samples = [*_samples(linear, "set KVM_LAPIC", 1), *_samples(linear, "set KVM_LAPIC", 2, 1.1),
               *_samples(flat, "set KVM_IRQCHIP_PIC_SLAVE", 1), *_samples(linear, "set KVM_IRQCHIP_IOAPIC", 1),
               *_samples(linear, "set KVM_IRQCHIP_IOAPIC", 2, 1.9)]
    samples += [Sample("set MSRs", 48, 48, registers, 1, 5000 + 60 * registers) for registers in (1, 4, 16, 34)]
    samples += [Sample(calibrate.LOCKED, vcpus, vcpus / 2, 1, 2, 4600 + 200 * vcpus + 700) for vcpus in (48, 96)]
    found = fit(samples, {})
    lapic, ioapic, msrs = (found.costs[f"set {name}"] for name in ("KVM_LAPIC", "KVM_IRQCHIP_IOAPIC", "MSRs"))
    assert (lapic.base, lapic.per_vcpu, lapic.first) == pytest.approx((5000, 200, 300))
    assert lapic.hold is None and lapic.parallel == pytest.approx(1.1, rel=0.02)
    assert ioapic.hold == pytest.approx(4600) and found.handoff == pytest.approx(700)
    assert (msrs.base, msrs.per_register) == pytest.approx((5000, 60))
    assert found.points == tuple(sorted({*calibrate.POINTS}))


def test_costs_are_measured_on_real_kvm_only() -> None:
    with pytest.raises(BackendUnavailable, match="simulated time is no cost"):
        calibrate.measure(1, "sim", lambda _: None)


@pytest.mark.kvm
def test_a_calibration_of_another_machine_is_not_checked_here(calibration: Calibration) -> None:
    other = dataclasses.replace(calibration, machine={**calibration.machine, "cpu": "a 6502"})
    with pytest.raises(UsageError, match="another machine"):
        against.measure(1, "kvm", lambda _: None, other)


@pytest.mark.kvm
def test_the_ioctls_that_are_measured_are_a_whole_restore() -> None:
    """What the C program writes is what the library reads back: nothing is left out, nothing is wrong."""
    import numpy as np

    from bench import native
    from bench.restores import fresh_vm, restores, saved_guest, saves, split
    from migstream.registers.catalogue import running

    backend = calibrate.kvm("kvm")
    guest = saved_guest(backend, 3)
    with fresh_vm(backend, 3) as vm:
        for todo in restores(vm, guest):
            native.run_parts(split(todo.calls, 2))
        for layout, values in guest.banks:
            actual = np.zeros_like(values)
            assert vm.read(layout, 0, actual) == []
            still = [word for column, slot in enumerate(layout.slots) if running(slot.id) is None
                     for word in range(layout.offsets[column], layout.offsets[column + 1])]
            assert (actual[:, still] == values[:, still]).all(), layout.title
        for todo in saves(vm, guest):
            native.run_parts(split(todo.calls, 1))
            assert todo.calls.shape[1] == len(todo.names) == len(todo.registers)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import native
    from bench.program import LeftOut

    monkeypatch.setenv("PATH", "")
    native.library.cache_clear()
    with pytest.raises(LeftOut, match="no C compiler"):
        native.library()


@pytest.mark.sim
def test_what_the_library_needs_no_ioctl_for(calibration: Calibration) -> None:
    layouts = model.layouts_of(profiles.load("x86_64-6.18-pvm"))
    capabilities = {"SYNC_REGS": 3}
    for strategy, spares in (("scoped", {"get"}), ("prologue", {"get", "set"})):
        spared = model.spared_by_library(strategy, capabilities)
        assert {verb for verb, registers in spared.items() if registers} == spares
        plain = model.predict(strategy, 8, 1, calibration, layouts)
        less = model.predict(strategy, 8, 1, calibration, layouts, spared=spared)
        changed = {name for name in plain if less[name] < plain[name]}
        assert changed == {{"get": "save state (vcpu)", "set": "restore state (vcpu)"}[verb] for verb in spares}
    for offered in ({}, {"SYNC_REGS": 1}):
        assert not model.spared_by_library("scoped", offered)["get"]
