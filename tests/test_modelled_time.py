"""Times of a simulated kernel: modelled, the same each time, said to be so; never this machine's, never KVM's."""

from __future__ import annotations

import io
import json
import re

import pytest

from bench.model import load_calibration, predict
from migstream.backends.base import MEASURED, MODELLED, Backend, Vm
from migstream.backends.faulty import FaultyBackend
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.cli import main
from migstream.demo import run as demo
from migstream.model import Machine, MemoryRegion
from migstream.report import Report
from migstream.transport import restore, save

pytestmark = pytest.mark.sim
KERNELS = ("x86_64-7.2", "x86_64-6.18-pvm", "arm64-6.12")
READ_OR_WRITTEN = re.compile(
    r"(create|finalize|feature|state|interrupts|clock) \((vm|vcpu)\)|registers|prologue|ready|readback")


def made(backend: Backend, vcpus: int) -> Vm:
    """A VM that never ran."""
    devices = {"irqchip": True, "pit": True} if backend.name.startswith("sim:x86") else {}
    vm = backend.create(Machine(backend.arch, vcpus, (MemoryRegion(0, 1 << 20),), devices))
    vm.create_vcpus()
    return vm


def there_and_back(backend: Backend, vcpus: int, threads: int = 1) -> tuple[Report, Report]:
    """Reports of a save and of the restore."""
    out = io.BytesIO()
    with made(backend, vcpus) as vm:
        saved = save(vm, out, host=backend.summary(), pause=vm.pause, threads=threads)
    vm, restored = restore(io.BytesIO(out.getvalue()), backend, readback=True, threads=threads)
    vm.close()
    return saved, restored


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_report_of_a_simulated_kernel_has_modelled_time_and_nothing_else(kernel: str) -> None:
    for report in there_and_back(SimBackend(kernel), 8):
        assert report.stopwatch.kind == MODELLED
        assert report.times and all(ns > 0 for ns in report.times.values())
        assert all(READ_OR_WRITTEN.fullmatch(name) for name in report.times), report.times


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_same_each_time(kernel: str) -> None:
    first, second = (there_and_back(SimBackend(kernel), 8) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.times.keys() == other.times.keys()
        assert all(abs(ns - other.times[name]) <= 2 for name, ns in one.times.items()), "rounded to ns"


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_what_the_model_predicts(threads: int) -> None:
    """The bench's strategy without a prologue: the same layouts, the same costs, the same threads."""
    backend = SimBackend("x86_64-6.18-pvm")
    with made(backend, 64) as vm:
        layouts = vm.layouts()[0]
    told = predict("scoped", 64, threads, load_calibration(), layouts)
    _, restored = there_and_back(backend, 64, threads)
    found = {f"restore {name}": ns for name, ns in restored.times.items() if name not in ("ready", "readback")}
    assert {name: round(ns) for name, ns in told.items() if name.startswith("restore")} == pytest.approx(found, abs=2)


def test_threads_and_vcpus_count() -> None:
    backend = SimBackend("x86_64-7.2")
    times = {(vcpus, threads): sum(there_and_back(backend, vcpus, threads)[1].times.values())
             for vcpus in (16, 128) for threads in (1, 2)}
    assert times[128, 2] < times[128, 1] and times[16, 1] < times[128, 1] / 4


def test_a_fault_does_not_change_what_time_it_is() -> None:
    _, report = there_and_back(FaultyBackend(SimBackend("x86_64-7.2")), 2)
    assert report.stopwatch.kind == MODELLED


def test_the_command_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    path = f"{tmp_path}/a.mig"
    assert main(["demo", "--backend", "sim:x86_64-7.2", "--vcpus", "2", "--run", "0", "-o", path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for part in (document, document["save"], document["replay"]):
        assert part["time"]["kind"] == MODELLED and "AMD EPYC" in part["time"]["what"]
    assert main(["replay", path, "--backend", "sim:x86_64-7.2"]) == 0
    out = capsys.readouterr().out
    assert "modelled time" in out and "time  modelled " in out and "it is not KVM's" in out


@pytest.mark.kvm
def test_real_kvm_is_measured() -> None:
    backend, out = KvmBackend(), io.BytesIO()
    saved = demo.run_and_save(backend, demo.machine(backend.arch, 2, 64 << 20), out)
    vm, restored = restore(io.BytesIO(out.getvalue()), backend)
    vm.close()
    assert saved.report.stopwatch.kind == restored.stopwatch.kind == MEASURED
    assert "encode" in saved.report.times and "decode" in restored.times
