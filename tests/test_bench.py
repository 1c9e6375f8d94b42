"""The benchmark's own logic: fits, journals, counts, tables, what is left out. Nothing here looks at times."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import blackout, compare, lock, plot, program, summary
from bench.__main__ import main
from bench.document import load
from bench.fit import fit_curve
from bench.hosts import Host, open_host
from bench.journal import Journal
from bench.model import load_calibration
from bench.modelled import count_writes
from bench.program import LeftOut
from bench.strategies import PHASES, STRATEGIES, Sample, machine_for, source_vm
from bench.strategies import blackout as one_blackout
from bench.subjects import Subject
from migstream.backends.sim import SimBackend
from migstream.errors import BackendUnavailable, OutputError, UsageError
from migstream.model import Layout


def tell(_: str) -> None:
    """No progress."""


# Least squares


def test_a_known_curve_is_found() -> None:
    fit = fit_curve({n: [100 + 7 * n + 0.25 * n * n] * 6 for n in (1, 4, 16, 64, 256)})
    assert fit is not None
    assert fit.terms == pytest.approx((100, 7, 0.25))
    assert fit.low == pytest.approx(fit.terms) and fit.high == pytest.approx(fit.terms)
    assert fit.worst < 1e-9 and fit.at(10) == pytest.approx(195)


def test_a_slow_round_widens_the_interval_and_leaves_the_curve() -> None:
    steady = {n: [50.0 + 3 * n] * 9 for n in (1, 8, 64, 512)}
    fit = fit_curve({n: [values[0] * (1.5 if k in (2, 5, 7) else 1) for k in range(9)] for n, values in steady.items()})
    assert fit is not None and fit.low is not None and fit.high is not None
    assert fit.terms == pytest.approx((50, 3, 0), abs=1e-6)
    assert fit.high[1] > 3.5 and fit.low[1] == pytest.approx(3)


def test_too_few_points_or_rounds_promise_nothing() -> None:
    assert fit_curve({1: [1.0], 2: [2.0], 4: [4.0]}) is None
    fit = fit_curve({n: [float(n)] * 4 for n in (1, 2, 4, 8)})
    assert fit is not None and fit.low is None and fit.document()["slope"] == {
        "value": pytest.approx(1), "low": None, "high": None}


# The journal


HEADER = {"bench": "blackout", "options": {"reps": 2}}


def test_a_journal_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "run" / "samples.jsonl"
    with Journal(path, HEADER) as journal:
        journal.add((1, "scoped", 0), {"total": 5})
        journal.add((2, "scoped", 0), {"total": 6})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with Journal(path, HEADER) as journal:
        assert journal.resumed == 1 and journal.samples == {(1, "scoped", 0): {"total": 5}}
        journal.add((2, "scoped", 0), {"total": 6})
    assert path.read_bytes() == whole


def test_a_journal_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", HEADER):
        pass
    with pytest.raises(UsageError, match="other options"):
        Journal(tmp_path / "j", {**HEADER, "options": {"reps": 3}})
    (tmp_path / "j").write_text("no json\n")
    with pytest.raises(UsageError, match="no journal"):
        Journal(tmp_path / "j", HEADER)
    with pytest.raises(OutputError):
        Journal(tmp_path / "j" / "below", HEADER)


# A run with subjects that need no kernel


class Clockwork(Subject):
    """Times that follow from vCPUs and round."""

    def __init__(self, name: str, each: int, fails: Exception | None = None) -> None:
        self.name, self.each, self.fails, self.calls = name, each, fails, 0

    def sample(self, vcpus: int) -> dict[str, Any]:
        self.calls += 1
        if self.fails:
            raise self.fails
        save, load = 1000 + self.each * vcpus, 2000 + 2 * self.each * vcpus
        phases = dict.fromkeys(PHASES, 0) | {"read registers": save, "vCPU registers": load}
        return Sample(save + load, save, load, phases, vm_writes=7, vcpu_writes=vcpus, bytes=100 * vcpus).document()


class Bench(Host):
    """A host whose subjects are given."""

    name, kind, most_vcpus = "kvm", "measured", 64

    def __init__(self, *given: Subject) -> None:
        self.given = list(given)

    def subjects(self, *_: Any) -> list[Subject]:
        return self.given


def options(folder: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    blackout.arguments(parser)
    return parser.parse_args(["-o", str(folder), *words])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(Clockwork("scoped", 50), Clockwork("prologue", 30), Clockwork("C best", 25), Clockwork("QEMU", 300))
    monkeypatch.setattr(blackout, "open_host", lambda *_, **__: (made, []))
    return made


WORDS = ("--vcpus", "1,2,4,8", "--reps", "6", "--strategies", "scoped,prologue")


def test_the_document_and_its_tables(host: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = blackout.run(options(tmp_path, *WORDS), tell)
    assert document["complete"] and set(document["curves"]) == {"scoped", "prologue", "C best", "QEMU"}
    point = summary.point(document, "scoped", 4)
    assert point and point["samples"] == 6
    assert point["total"] == {"min": 3600, "p50": 3600, "p99": 3600, "max": 3600}
    assert point["vm_writes"] == 7 and sum(point["phases"].values()) == 3600
    assert document["curves"]["scoped"]["fit"]["total"]["slope"]["value"] == pytest.approx(150)
    ratio = next(one for one in document["ratios"]
                 if (one["thing"], one["against"], one["vcpus"]) == ("prologue", "C best", 8))
    assert ratio["total"] == pytest.approx((3000 + 90 * 8) / (3000 + 75 * 8))
    assert {"min", "p50"} <= point["load"].keys() and document["options"]["vcpus"] == [1, 2, 4, 8]
    assert json.loads((tmp_path / "blackout.json").read_text())["curves"] == document["curves"]
    blackout.print_result(document)
    shown = capsys.readouterr().out
    assert "slope" in shown and "C best" in shown and "wall time" in shown


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(host: Bench, tmp_path: Path) -> None:
    last = host.given[3]
    assert isinstance(last, Clockwork)
    last.fails = KeyboardInterrupt()  # type: ignore[assignment]  # no MigstreamError, on purpose
    first = blackout.run(options(tmp_path, *WORDS), tell)
    assert not first["complete"] and first["left_out"] and summary.point(first, "scoped", 1)
    kept = len((tmp_path / "samples.jsonl").read_text().splitlines()) - 1
    assert kept == 3
    last.fails = None
    second = blackout.run(options(tmp_path, *WORDS), tell)
    assert second["complete"] and second["resumed_samples"] == kept
    assert sum(subject.calls for subject in host.given if isinstance(subject, Clockwork)) == 4 * 4 * 6 + 1


def test_a_peer_that_fails_is_left_out_and_the_rest_goes_on(host: Bench, tmp_path: Path) -> None:
    assert isinstance(host.given[3], Clockwork)
    host.given[3].fails = LeftOut("qemu-system-x86_64: it ended")
    document = blackout.run(options(tmp_path, *WORDS), tell)
    assert document["complete"] and "QEMU" not in document["curves"] and host.given[3].calls == 1
    assert any("QEMU" in line and "it ended" in line for line in document["left_out"])


def test_plots_are_made(host: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra: pip install -e '.[bench]'")
    document = blackout.run(options(tmp_path, *WORDS), tell)
    for name in ("blackout", "phases"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        svg = (tmp_path / f"{name}.svg").read_text()
        assert "<svg" in svg
    assert len(document["plots"]) == 4


def test_no_matplotlib_is_said_and_the_rest_is_there(host: Bench, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    document = blackout.run(options(tmp_path, *WORDS), tell)
    assert document["plots"] == [] and any("matplotlib" in line for line in document["left_out"])
    assert (tmp_path / "blackout.json").exists()


@pytest.mark.parametrize("words", [("--vcpus", "65"), ("--reps", "0"), ("--threads", "0")])
def test_bad_options_are_usage_errors(host: Bench, tmp_path: Path, words: Sequence[str]) -> None:
    with pytest.raises(UsageError):
        blackout.run(options(tmp_path, *words), tell)


@pytest.mark.parametrize("words", [("--vcpus", "0"), ("--strategies", "scope"), ("--beside", "vmware"),
                                   ("--vcpus", "two")])
def test_bad_words_never_begin_a_run(tmp_path: Path, words: Sequence[str]) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path, *words)


# What a machine lacks


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(LeftOut, match="no C compiler"):
        program.build("floor", tmp_path)


def test_a_program_that_ends_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_text("#!/bin/sh\necho open /dev/kvm: Permission denied >&2\nexit 1\n")
    path.chmod(0o700)
    with program.Talk(path) as talk, pytest.raises(LeftOut, match="Permission denied"):
        talk.ask("load 1 x")


def test_no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.qemu import Qemu

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LeftOut, match="not installed"):
        Qemu(tmp_path)


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import migstream.backends

    real = migstream.backends.open_backend

    def without(name: str = "auto") -> Any:
        if name == "kvm":
            raise BackendUnavailable("/dev/kvm: ENOENT: no real KVM here")
        return real(name)

    monkeypatch.setattr(migstream.backends, "open_backend", without)
    monkeypatch.setattr(lock, "open_backend", without)
    yield


def test_without_kvm_auto_is_modelled_and_says_so(no_kvm: None, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blackout", "--vcpus", "1,2,4,8", "-o", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["migstream_json"] == 1 and document["command"] == "bench blackout"
    assert document["kind"] == "modelled" and document["backend"].startswith("sim:")
    assert any("no real KVM" in line for line in document["left_out"])
    assert main(["blackout", "--backend", "kvm", "-o", str(tmp_path / "k")]) == 69


def test_without_kvm_the_lock_is_the_model_alone(no_kvm: None, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lock", "--quick", "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "MODELLED" in shown and "no real KVM" in shown
    assert json.loads((tmp_path / "lock.json").read_text())["measured"] == []


def test_an_unknown_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blackout", "--backend", "xen", "-o", str(tmp_path)]) == 64
    assert main(["blackout", "--backend", "lab:", "-o", str(tmp_path)]) == 64
    assert main(["blackout", "--backend", "sim:none", "-o", str(tmp_path)]) == 69
    assert capsys.readouterr().err.count("\n") == 3


# Comparing runs


def _run(path: Path, **machine: Any) -> str:
    points = [{"vcpus": 4, "total": {"p50": machine.pop("ns", 100)}}]
    path.write_text(json.dumps({
        "bench": "blackout", "kind": "measured", "curves": {"scoped": {"points": points}},
        "machine": {"cpu": "A", "cpus": 2, "kernel": "6.1", "system": "Linux", **machine}}))
    return str(path)


def test_runs_of_one_machine_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", _run(tmp_path / "a", python="3.11"), _run(tmp_path / "b", ns=150, python="3.12")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratios"] == [
        {"vcpus": 4, "thing": "scoped", "before": 100, "after": 150, "ratio": 1.5}]


@pytest.mark.parametrize("other", [{"cpu": "B"}, {"cpus": 4}, {"kernel": "6.2"}])
def test_other_machines_only_when_told(tmp_path: Path, other: dict[str, Any],
                                       capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", _run(tmp_path / "a"), _run(tmp_path / "b", **other)]
    assert main(words) == 64
    assert next(iter(other)) in capsys.readouterr().err
    assert main([*words, "--other-machine"]) == 0


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    for name, text in (("list", "[]"), ("other", '{"bench": "lock"}'), ("torn", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError):
            load(tmp_path / name)
        assert main(["compare", run, str(tmp_path / name)]) == 64
    assert main(["compare", run, str(tmp_path / "none")]) == 74


# What the strategies write


@pytest.mark.sim
@pytest.mark.parametrize("vcpus", [1, 3])
def test_vm_scoped_writes_by_strategy(vcpus: int) -> None:
    """Counted while the library restores; N-fold per vCPU, once scoped, only what runs on with a prologue."""
    backend = SimBackend()
    with source_vm(backend, vcpus) as source:
        samples = {name: one_blackout(backend, source, backend.summary(), strategy, 1)
                   for name, strategy in STRATEGIES.items()}
        layouts = source.layouts()[0]
    told, chips_and_clock, msrs = 1, 5, 2
    assert samples["per-vCPU"].vm_writes == told + (chips_and_clock + msrs) * vcpus
    assert samples["scoped"].vm_writes == told + chips_and_clock + msrs
    assert samples["prologue"].vm_writes == samples["prologue+threads"].vm_writes == chips_and_clock
    assert samples["prologue"].vcpu_writes < samples["scoped"].vcpu_writes
    _agree_with_the_plan(layouts, samples, vcpus)


def _agree_with_the_plan(layouts: Sequence[Layout], samples: dict[str, Sample], vcpus: int) -> None:
    for name, sample in samples.items():
        planned = Sample()
        count_writes(planned, layouts, STRATEGIES[name], vcpus)
        assert ((planned.vm_writes, planned.vcpu_writes, planned.early_writes)
                == (sample.vm_writes, sample.vcpu_writes, sample.early_writes)), name


@pytest.mark.sim
def test_a_sample_adds_up() -> None:
    backend = SimBackend()
    with source_vm(backend, 2) as source:
        for strategy in STRATEGIES.values():
            sample = one_blackout(backend, source, backend.summary(), strategy, 1)
            assert sample.total == sample.save + sample.load == sum(sample.phases.values())
            assert min(sample.phases.values()) >= 0 and set(sample.phases) == set(PHASES)
            assert 0 < sample.bytes <= sample.stream and (sample.bytes < sample.stream) == strategy.early
            assert (sample.early_writes > 0) == strategy.early


def test_the_machine_has_no_more_ram_than_its_guest_needs() -> None:
    assert sum(region.size for region in machine_for(SimBackend(), 512).memory) < 1 << 20


def test_modelled_times_of_a_named_kernel() -> None:
    host, left_out = open_host("sim:arm64-6.12")
    assert host.kind == "modelled" and not left_out
    plan = blackout.make_plan(options(Path(), "--vcpus", "4"), host)
    notes: list[str] = []
    import contextlib

    with contextlib.ExitStack() as stack:
        subjects = host.subjects(plan, Path(), stack, notes, tell)
        samples = {subject.name: subject.sample(64) for subject in subjects}
    assert any("ONE_REG" in note for note in notes)
    assert samples["per-vCPU"]["vm_writes"] == 64 * samples["scoped"]["vm_writes"]
    assert samples["prologue"]["vm_writes"] < samples["scoped"]["vm_writes"]
    assert samples["per-vCPU"]["total"] > samples["scoped"]["total"] > samples["prologue"]["total"]
    assert samples["prologue+threads"]["total"] < samples["prologue"]["total"]
    assert all(sum(sample["phases"].values()) == sample["total"] for sample in samples.values())


def test_the_modelled_lock() -> None:
    calibration = load_calibration()
    scoped, locked = lock.WRITES[0], lock.WRITES[-1]

    def gain(write: lock.Write) -> float:
        return lock.modelled(calibration, write, 4096, 1) / lock.modelled(calibration, write, 4096, 128)

    assert gain(scoped) > 60 and gain(locked) < 1.1
    rows = lock.far(calibration)
    assert {(at["vcpus"], at["threads"]) for at in rows} >= {(4096, 128), (64, 1)}
    assert all(at["threads"] <= at["vcpus"] for at in rows)


def test_a_lock_plot_is_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra: pip install -e '.[bench]'")
    calibration = load_calibration()
    at = {"vcpus": 64, "write": "ioapic", "threads": 1, "p50": 10.0, "modelled": 9.0, "error": -0.1}
    document = {"machine": {"cpu": "A", "cpus": 2, "kernel": "6.1"}, "date": "today", "left_out": [],
                "calibration": {"machine": dict(calibration.machine)}, "measured": [at], "model": lock.far(calibration)}
    assert len(plot.draw_lock(document, tmp_path)) == 2


# Real KVM


@pytest.mark.kvm
def test_the_c_programs_restore_what_the_library_saved(tmp_path: Path) -> None:
    from bench.floor import Floor
    from migstream.backends import open_backend

    backend = open_backend("kvm")
    with Floor(tmp_path, backend.arch) as floor, source_vm(backend, 5) as source:
        floor.load(source)
        for mode, threads in (("plain", 1), ("best", 1), ("best", 2), ("plain", 1)):
            assert floor.differing(5, mode, threads) == 0, (mode, threads)
            assert min(floor.round(5, mode, threads)) > 0


@pytest.mark.kvm
def test_a_short_run_on_real_kvm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["blackout", "--vcpus", "1,2", "--reps", "2", "--beside", "c", "-o", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"per-vCPU", "prologue+threads", "C plain", "C best"} <= document["curves"].keys()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_samples"] == sum(
        point["samples"] for curve in document["curves"].values() for point in curve["points"])


@pytest.mark.kvm
def test_the_lock_on_real_kvm(tmp_path: Path) -> None:
    found = lock.Found()
    lock.measure((1, 64), 2, tell, found)
    measured, lapics = found.bursts, found.lapics
    assert {(at["write"], at["threads"]) for at in measured if at["vcpus"] == 64} >= {
        ("lstar", 1), ("ioapic", 1), ("clock", 1), ("wall-clock", 1)}
    assert {at["way"] for at in lapics} == lock.LAPIC_WAYS.keys()
    assert all(at["p50"] > 0 for at in (*measured, *lapics))


# What is kept


def test_the_results_that_are_kept_can_be_read_and_say_their_machine() -> None:
    kept = Path(blackout.__file__).with_name("results")
    run = load(kept / "blackout.json")
    assert run["kind"] == "measured" and run["complete"] and run["machine"].keys() >= set(compare.SAME_MACHINE)
    assert {"per-vCPU", "scoped", "prologue", "prologue+threads", "C best, 2 threads", "QEMU"} <= run["curves"].keys()
    assert all((kept / name).exists() for name in ("blackout.png", "blackout.svg", "phases.png", "lock.png"))
    assert json.loads((kept / "lock.json").read_text())["measured"]


# Check


@pytest.mark.sim
def test_check_measures_every_part_for_both_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import check

    result = check.measure(1, tell, vcpus=2, hosts=5)
    parts = ("read the stream", "read the profiles", "judge", "migstream check, from nothing")
    assert set(result["median_ns"]) == {f"{arch}: {part}" for arch in ("arm64", "x86_64") for part in parts}
    assert all(ns > 0 for ns in result["median_ns"].values()) and (result["vcpus"], result["hosts"]) == (2, 5)
    check.print_result(result)
    assert "against 5 profile files" in capsys.readouterr().out
