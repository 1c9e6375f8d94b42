"""A blackout run that is stopped, goes on, finds its files damaged or its disk full, and what it compares with."""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import blackout, children, output, qemu, summary
from bench.__main__ import main
from bench.journal import Journal
from bench.program import LeftOut
from bench.samples import line_check
from bench.stop import Interrupted
from bench.strategies import PHASES, Sample
from migstream.errors import OutputError, UsageError
from tests.test_bench import WORDS, Bench, Clockwork, options, tell


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(Clockwork("scoped", 50), Clockwork("prologue", 30), Clockwork("C best", 25), Clockwork("QEMU", 300))
    monkeypatch.setattr(blackout, "open_host", lambda *_, **__: (made, []))
    monkeypatch.setattr(blackout, "versions", lambda names: dict.fromkeys(names, "1.0"))
    return made


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.plot.draw", lambda *_: [])


def interrupting(number: int = 0) -> Callable[[int], dict[str, Any]]:
    def sample(_: int) -> dict[str, Any]:
        if number:
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt
    return sample


# Signals


def test_an_interrupt_before_the_first_sample_is_one_line(host: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host.given[0], "sample", interrupting())
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("bench: ")


def test_sigterm_keeps_what_was_measured(host: Bench, no_pictures: None, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(host.given[1], "sample", interrupting(signal.SIGTERM))
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == 128 + 15
    assert "interrupted" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) is before
    assert json.loads((tmp_path / "blackout.json").read_text())["curves"].keys() == {"scoped"}


def test_an_interrupt_while_opening_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(blackout, "open_host", interrupted)
    with pytest.raises(Interrupted):
        blackout.run(options(tmp_path), tell)


def test_an_interrupted_drawing_loses_nothing(host: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    def half(_: Any, folder: Path) -> list[Path]:
        (folder / "blackout.png").write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr("bench.plot.draw", half)
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == 130
    assert "drawing was interrupted" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blackout.json", "samples.jsonl"]
    assert json.loads((tmp_path / "blackout.json").read_text())["plots"] == []


def test_after_an_interrupt_other_troubles_are_still_said(host: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")
    monkeypatch.setattr("bench.plot.draw", full)
    monkeypatch.setattr(host.given[1], "sample", interrupting(signal.SIGINT))
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == 130
    out, err = capsys.readouterr()
    assert "No space left" in err and "drawing was interrupted" not in out


def test_c_alone_has_no_model(host: Bench, no_pictures: None, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "layouts", lambda: [None])
    host.given = [Clockwork("C best", 25)]
    assert blackout.run(options(tmp_path, *WORDS), tell)["model"] is None


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)


def test_no_qemu_outlives_an_interrupted_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path / qemu.PROGRAM, f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def interrupted(*_: Any) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            pass
        raise KeyboardInterrupt
    monkeypatch.setattr(qemu.Monitor, "_accept", interrupted)
    with pytest.raises(KeyboardInterrupt), qemu.Monitor(tmp_path, 1):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_program_dies_with_a_bench_that_is_killed(tmp_path: Path) -> None:
    _program(tmp_path / "talker", "exec sleep 1000")
    words = ("import sys, time; from pathlib import Path; from bench.program import Talk; "
             "print(Talk(Path(sys.argv[1]))._process.pid, flush=True); time.sleep(100)")
    import subprocess

    with subprocess.Popen([sys.executable, "-c", words, str(tmp_path / "talker")], stdout=subprocess.PIPE) as bench:
        assert bench.stdout
        pid = int(bench.stdout.readline())
        bench.kill()
    status = Path(f"/proc/{pid}/status")
    for _ in range(500):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        import time
        time.sleep(0.01)
    else:
        pytest.fail("it is still there")


# QEMU that is broken


@pytest.mark.parametrize(("text", "said"), [
    ("echo no such library >&2; exit 1", "exit status 1: no such library"), ("sleep 1000", "no answer"),
    ('test "$1" = --version && echo QEMU && exit; echo bad CPU >&2; exit 1', "bad CPU"),
    ('test "$1" = --version && echo QEMU && exit; exit 3', "exit status 3")])
def test_a_broken_qemu_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    _program(tmp_path / qemu.PROGRAM, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(qemu, "version", lambda path: children.version(path, 0.5))
    with pytest.raises(LeftOut, match=said):
        qemu.Qemu(tmp_path)


# Going on


def test_a_run_that_is_done_says_so(host: Bench, no_pictures: None, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    blackout.run(options(tmp_path, *WORDS), tell)
    path = tmp_path / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | ({"date": "2026-01-02"} if "date" in line else {})) + "\n"
                            for line in lines))
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == 0
    out, err = capsys.readouterr()
    assert "96 samples of 2026-01-02 kept from an earlier run" in err and "resumed" in out
    document = json.loads((tmp_path / "blackout.json").read_text())
    assert document["date"] == "2026-01-02" and document["migstream_json"] == 1
    assert document["software"].keys() == {"migstream", "revision", "native", "c", "qemu"}
    assert document["software"]["native"] in out


def test_a_journal_of_another_run_says_which_field(tmp_path: Path) -> None:
    header = {"bench": "blackout", "software": {"native": "pure"}, "options": {"reps": 2}}
    with Journal(tmp_path / "j", header):
        pass
    for other, said in ((header | {"software": {"native": "compiled"}}, "software.native: pure there, compiled here"),
                        ({**header, "more": 1}, "more: nothing there, 1 here"),
                        ({"bench": "blackout", "software": {"native": "pure"}}, "options")):
        with pytest.raises(UsageError, match=said):
            Journal(tmp_path / "j", other)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"bench": "x"}) as first:
        with pytest.raises(UsageError, match="another run"):
            Journal(tmp_path / "j", {"bench": "x"})
        first.add((1, "scoped", 0), {})
    with Journal(tmp_path / "j", {"bench": "x"}) as again:
        assert again.resumed == 1


# A damaged journal


SAMPLE = Sample(30, 10, 20, dict.fromkeys(PHASES, 0)).document()
LINE = {"vcpus": 1, "thing": "scoped", "round": 0, "date": "2026-01-02", "sample": SAMPLE}
TRUSTED = {"bench": "blackout"}


def _journal(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in (json.dumps(TRUSTED), *lines)))
    return path


def _open(path: Path) -> Journal:
    return Journal(path, TRUSTED, line_check((1, 2), {"scoped"}, 2))


_NO_LINE: tuple[dict[str, Any], ...] = (
    {"sample": {}}, {"sample": None}, {"round": "0"}, {"round": 99}, {"round": -1}, {"round": True}, {"vcpus": 4},
    {"vcpus": "1"}, {"vcpus": True}, {"thing": "C best"}, {"thing": None}, {"thing": []}, {"date": "today"},
    {"date": None}, {"more": 1})
_NO_SAMPLE: tuple[dict[str, Any], ...] = (
    {"phases": []}, {"phases": {"what": 1}}, {"phases": {**SAMPLE["phases"], "encode": "x"}}, {"more": 1},
    {"total": 31}, {"bytes": -1}, {"before": 1.5}, {"still": None})


@pytest.mark.parametrize("line", [
    "[]", "5", "null", "{}", "no json", "[" * 100_000, "",
    *(json.dumps({**LINE, **change}) for change in _NO_LINE),
    *(json.dumps({**LINE, "sample": {**SAMPLE, **change}}) for change in _NO_SAMPLE),
    *(json.dumps(LINE).replace('"save": 10', f'"save": {number}') for number in (
        '"x"', "null", "true", "-1", "0", "NaN", "Infinity", "1" + "0" * 400, "1" + "0" * 5000, "[]")),
], ids=range(40))
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = _journal(tmp_path / "j", json.dumps({**LINE, "round": 1}), line)
    whole = path.read_bytes()
    with pytest.raises(UsageError, match=r"line 3: .*without that line the rest can be used") as error:
        _open(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and path.read_bytes() == whole
    with _open(_journal(path, json.dumps({**LINE, "round": 1}))) as journal:
        assert journal.resumed == 1


@pytest.mark.parametrize("text", ["[]\n", "5\n", "null\n", "{}\n", "[" * 100_000 + "\n", "my notes", "{"])
def test_what_is_no_journal_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j"
    path.write_text(text)
    if text == "{":
        with _open(path) as journal:  # our own header, cut by a full disk
            assert journal.resumed == 0
        return
    with pytest.raises(UsageError, match="no journal"):
        _open(path)
    assert path.read_text() == text


def test_a_sample_counts_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 3: .*there already"):
        _open(_journal(tmp_path / "j", json.dumps(LINE), json.dumps(LINE)))


# Disk and directories


def test_a_full_disk_shows_what_there_is(host: Bench, no_pictures: None, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real, calls = Journal._append, []

    def full(self: Journal, line: dict[str, Any]) -> None:
        calls.append(line)
        if len(calls) > 5:
            raise OutputError(f"{self.path}: {os.strerror(errno.ENOSPC)}")
        real(self, line)
    monkeypatch.setattr(Journal, "_append", full)
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == 74
    out, err = capsys.readouterr()
    assert "No space left" in err and err.count("\n") == 1 and "scoped" in out


def test_a_journal_that_finds_no_room_raises_once_and_goes_on_later(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OutputError, match="too large"), Journal(tmp_path / "j", TRUSTED) as journal:
        journal.add((1, "scoped", 0), SAMPLE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "j").stat().st_size + 20, limits[1]))
        try:
            journal.add((2, "scoped", 0), SAMPLE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with _open(tmp_path / "j") as journal:
        assert journal.samples.keys() == {(1, "scoped", 0)}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("font")])
def test_a_drawing_that_fails_loses_nothing(host: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def fails(*_: Any) -> None:
        raise error
    monkeypatch.setattr("bench.plot.draw", fails)
    assert main(["blackout", "-o", str(tmp_path), *WORDS]) == (74 if isinstance(error, OSError) else 70)
    out, err = capsys.readouterr()
    assert "scoped" in out and err.count("\n") == 1 and (tmp_path / "blackout.json").exists()


def test_a_directory_is_wanted(host: Bench, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("mine")
    (tmp_path / "d" / "phases.svg").mkdir(parents=True)
    for name in ("afile", "afile/below", "d"):
        with pytest.raises(UsageError, match="directory"):
            blackout.run(options(tmp_path / name, *WORDS), tell)
    with pytest.raises(UsageError, match="directory"):
        output.prepare(Path("/dev/null"))
    with pytest.raises(argparse.ArgumentTypeError, match="directory"):
        output.directory("")
    assert not any(subject.calls for subject in host.given if isinstance(subject, Clockwork))


# Options and tables


@pytest.mark.parametrize("words", [("--threads", "10000"), ("--threads", "0")])
def test_threads_have_a_range(host: Bench, tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"--threads \d+: 1 to 256"):
        blackout.run(options(tmp_path / "out", *words), tell)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "text"), [
    (blackout.vcpu_counts, "1,,2"), (blackout.vcpu_counts, "abc"), (blackout.vcpu_counts, "1.5"),
    (blackout.vcpu_counts, "0"), (blackout.vcpu_counts, "9" * 5000), (blackout.beside, "c,none"),
    (blackout.beside, ""), (blackout.strategies, "")])
def test_words_that_say_what_is_wrong(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)


def test_counts_have_no_times(no_pictures: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["blackout", "--backend", "sim:arm64-6.12", "--counts", "--vcpus", "1,4", "--reps", "7"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert " ms" not in shown and "MODELLED" not in shown and "rounds 2 to 7" in shown
    document = json.loads((tmp_path / "blackout.json").read_text())
    assert document["kind"] == "counted" and "total" not in document["curves"]["scoped"]["points"][0]


def test_zeroed_registers_are_compared_with_qemu_alone(host: Bench, no_pictures: None, tmp_path: Path) -> None:
    for one in blackout.run(options(tmp_path, *WORDS), tell)["ratios"]:
        assert (one["still"] is not None) == (one["against"] == summary.QEMU)


# Comparing


def _document(**change: Any) -> dict[str, Any]:
    return {"migstream_json": 1, "bench": "blackout", "kind": "measured", "backend": "kvm", "options": {"threads": 2},
            "machine": {"cpu": "A", "cpus": 2, "kernel": "6.1", "system": "Linux", "python": "3.11.7"},
            "software": {"native": "compiled batch"}, "curves": _curves(4, {"p50": 100}), **change}


def _curves(vcpus: Any, total: Any) -> dict[str, Any]:
    return {"scoped": {"points": [{"vcpus": vcpus, "total": total, "vm_writes": 7, "vcpu_writes": 9,
                                   "early_writes": 0}]}}


def _compared(folder: Path, *documents: Any) -> int:
    names = [str(folder / f"{number}.json") for number in range(len(documents))]
    for name, document in zip(names, documents, strict=True):
        Path(name).write_text(document if isinstance(document, str) else json.dumps(document))
    return main(["compare", *names])


DAMAGED: list[Any] = [
    "", "[" * 100_000, "null", "5", "[]", {"bench": "lock"}, _document(machine=None), _document(machine={"cpu": []}),
    _document(machine={"cpus": "x"}), _document(kind=None), _document(kind=[]), _document(kind="other"),
    _document(curves=None), _document(curves=[]), _document(curves={"scoped": None}), _document(curves={"scoped": {}}),
    _document(curves={"scoped": {"points": 1}}), _document(curves={"scoped": {"points": [1]}}),
    _document(curves={"scoped": {"points": [{}]}}), _document(migstream_json=2), _document(migstream_json="1"),
    _document(options=[]), _document(options={"threads": "x"}), _document(software=1), _document(backend={}),
    *(_document(curves=_curves(vcpus, {"p50": 1})) for vcpus in (None, "4", 0, True, 10**400)),
    *(_document(curves=_curves(4, total)) for total in (None, 1, {}, {"p50": "x"}, {"p50": 0}, {"p50": float("nan")},
                                                        {"p50": float("inf")}, {"p50": -1}, {"p50": 10**400},
                                                        {"p50": True}, {"p50": None}))]


@pytest.mark.parametrize("document", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_result_is_one_line(tmp_path: Path, document: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for pair in ((_document(), document), (document, _document())):
        assert _compared(tmp_path, *pair) == 64
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "no result of" in err and len(err) < 400


@pytest.mark.parametrize(("change", "said"), [
    ({"curves": {}}, "nothing in common"), ({"curves": _curves(8, {"p50": 1})}, "nothing in common"),
    ({"kind": "counted"}, "counted"), ({"kind": "modelled"}, "modelled")])
def test_what_can_not_be_compared(tmp_path: Path, change: dict[str, Any], said: str,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert _compared(tmp_path, _document(), _document(**change)) == 64
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_other_simulated_kernels_are_other_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (_document(kind="modelled", backend=f"sim:arm64-{kernel}") for kernel in ("5.10", "6.12"))
    assert _compared(tmp_path, one, other) == 64 and _compared(tmp_path, one, one) == 0
    assert "backend sim:arm64-5.10 and sim:arm64-6.12" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "said"), [
    ({"options": {"threads": 8}}, "threads: 2 and 8"),
    ({"software": {"native": "pure Python"}}, "compiled part: compiled batch and pure Python"),
    ({"machine": {**_document()["machine"], "python": "3.12.1"}}, "Python: 3.11.7 and 3.12.1")])
def test_what_differs_is_said(tmp_path: Path, change: dict[str, Any], said: str,
                              capsys: pytest.CaptureFixture[str]) -> None:
    assert _compared(tmp_path, _document(), _document(**change)) == 0
    assert said in capsys.readouterr().out


def test_software_that_only_one_names_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {name: value for name, value in _document().items() if name not in ("software", "migstream_json")}
    assert _compared(tmp_path, old, _document()) == 0
    assert "before does not say" in capsys.readouterr().out


def test_counted_runs_show_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = _document(kind="counted", curves=_curves(4, None))
    assert _compared(tmp_path, counted, counted) == 0
    shown = capsys.readouterr().out
    assert " ms" not in shown and "vcpu" in shown
    assert _compared(tmp_path, counted, {**counted, "curves": {"scoped": {"points": [{"vcpus": 4}]}}}) == 64


def test_a_directory_is_its_document(tmp_path: Path) -> None:
    (tmp_path / "blackout.json").write_text(json.dumps(_document()))
    assert main(["compare", str(tmp_path), str(tmp_path / "blackout.json")]) == 0
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "empty"), str(tmp_path)]) == 74
