"""The benchmarks' command line: how it ends, what it refuses before anything is measured, and what it says then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import calibrate, codec, lock, native, plot, program, restores
from bench.__main__ import main
from bench.model import load_calibration
from bench.program import LeftOut
from migstream.backends.sim import SimBackend, timing
from migstream.errors import Corrupt, MigstreamError, OutputError

RUN = str(Path(program.__file__).with_name("results") / "blackout.json")
ROUNDS = {"calibrate": "--rounds", "check": "--rounds", "codec": "--rounds", "lock": "--reps", "model": "--rounds",
          "simulator": "--rounds", "startup": "--rounds"}


def tell(_: str) -> None:
    """No progress."""


# Signals


STOPPED = """
import os, signal, sys
from bench import commands, {module}
def act(options, tell):
    os.kill(os.getpid(), signal.{signal})
    import time; time.sleep(20)
{module}.run = act
sys.argv = ["bench", "{command}"]
sys.exit(commands.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("command", "module"), [("codec", "codec"), ("model", "against"), ("calibrate", "calibrate")])
def test_a_signal_is_one_line_and_its_status(number: signal.Signals, command: str, module: str) -> None:
    code = STOPPED.format(module=module, command=command, signal=number.name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"bench: stopped by {number.name}; nothing was kept\n"


def _interrupted(after: int) -> Any:
    """A stand-in for `lock.measure` that Ctrl-C ends in a round."""
    def thing() -> int:
        nonlocal after
        after -= 1
        if after < 0:
            raise KeyboardInterrupt
        return 1000

    def measure(counts: Any, rounds: int, tell: Any, found: lock.Found) -> None:
        row = {"vcpus": 1, "write": "lstar", "threads": 1}
        lock._rounds(found.bursts, [(row, thing), ({**row, "write": "clock"}, thing)], rounds)

    return measure


def test_an_interrupted_lock_keeps_its_whole_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lock, "measure", _interrupted(5))
    assert main(["lock", "-o", str(tmp_path)]) == 130
    kept = json.loads((tmp_path / "lock.json").read_text())
    assert not kept["complete"] and [at["samples"] for at in kept["measured"]] == [2, 2]
    assert capsys.readouterr().err == f"bench: stopped by SIGINT; what was measured until then is in {tmp_path}\n"
    (tmp_path / "lock.json").write_text("earlier")
    monkeypatch.setattr(lock, "measure", _interrupted(1))
    assert main(["lock", "-o", str(tmp_path)]) == 130
    assert (tmp_path / "lock.json").read_text() == "earlier" and "nothing was kept" in capsys.readouterr().err


# Misuse


@pytest.mark.parametrize("words", [
    *([command, option, number] for command, option in ROUNDS.items() for number in ("0", "-1", "x")),
    ["blackout", "--vcpus", "0"], ["nothing"], ["codec", "--nothing"]])
def test_misuse_is_one_line_of_ours(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("bench: ") and " _" not in said and "--help" in said


def test_no_command_is_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64
    out, err = capsys.readouterr()
    assert not out and "blackout against vCPU count" in err


# The C compiler


def _compiler(folder: Path, text: str) -> str:
    path = folder / "some-cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("compiler", ["gcc -O0", "env gcc"])
def test_a_compiler_may_have_arguments(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    assert program.build("lock", tmp_path).stat().st_size


@pytest.mark.parametrize(("compiler", "said"), [("true", "made nothing"), ("false", "exit status 1"),
                                                ("no-such-cc", "no C compiler"), ("gcc '", "No closing quotation")])
def test_a_compiler_that_fails_is_named_with_a_cure(compiler: str, said: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    native.library.cache_clear()
    for build in (lambda: program.build("floor", tmp_path), native.library):
        with pytest.raises(LeftOut) as caught:
            build()
        line = str(caught.value)
        assert said in line and compiler in line and program.CURE in line and "\n" not in line


def test_what_a_compiler_made_need_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", _compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo no >"$2"'))
    native.library.cache_clear()
    with pytest.raises(LeftOut, match="can't be loaded"):
        native.library()
    with pytest.raises(LeftOut, match="does not run"):
        program.Talk(program.build("floor", tmp_path))


# Files


@pytest.mark.parametrize("place", [".", "no/such/place"])
def test_an_output_that_can_not_be_is_said_before_measuring(place: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured"))
    assert main(["calibrate", "-o", str(tmp_path / place)]) == 74
    monkeypatch.setattr(lock, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert main(["lock", "-o", str(tmp_path / "file" / place)]) == 74


@pytest.mark.parametrize(("change", "said"), [
    (lambda raw: raw["costs"].update({"set MSRs": {"bases": 1}}), "set MSRs: not a cost"),
    (lambda raw: raw["costs"].update({"set MSRs": {"base": "1"}}), "set MSRs.base: a time"),
    (lambda raw: raw["costs"].update({"set MSRs": 5}), "set MSRs: not a cost"),
    (lambda raw: raw.update(points=["a"]), "points"), (lambda raw: raw.pop("machine"), "machine: missing"),
    (lambda raw: raw["machine"].pop("cpu"), "machine.cpu"), (lambda raw: raw.update(handoff=-1), "handoff"),
    (lambda raw: raw.update(more=1), "more"), (lambda raw: raw.clear(), "bench calibrate")])
def test_a_damaged_calibration_names_the_field(change: Any, said: str, tmp_path: Path) -> None:
    raw = json.loads(timing.CALIBRATION.read_text())
    change(raw)
    (tmp_path / "c.json").write_text(json.dumps(raw))
    with pytest.raises(Corrupt) as caught:
        load_calibration(tmp_path / "c.json")
    line = str(caught.value)
    assert line.startswith(str(tmp_path)) and said in line and "Error" not in line and "**" not in line


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"NaN"])
def test_what_is_no_calibration(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(data)
    with pytest.raises(MigstreamError, match="not a calibration") as caught:
        load_calibration(tmp_path / "c.json")
    assert "Error" not in str(caught.value)


def test_a_calibration_that_is_not_there_is_named_once() -> None:
    with pytest.raises(OutputError) as caught:
        load_calibration("/nope")
    assert str(caught.value).count("/nope") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["compare", RUN, RUN], ["compare", RUN, RUN, "--json"], ["--help"]])
def test_a_full_output_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "bench", *words], stdout=full,
                              stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (74, "bench: standard output: No space left on device\n")


# Pictures


@pytest.fixture
def pictured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """A run of three vCPU counts, with pictures."""
    pytest.importorskip("matplotlib", reason="plots need the extra: pip install -e '.[bench]'")
    assert main(["blackout", "--backend", "sim:x86_64-7.2", "--vcpus", "1,2,4", "-o", str(tmp_path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_title_ends_inside_its_picture(pictured: dict[str, Any]) -> None:
    for document in (pictured, {**pictured, "curves": {name: {"points": curve["points"][:1]}
                                                       for name, curve in pictured["curves"].items()}}):
        for draw in (plot._phases, plot._curves):
            figure = draw(document)
            figure.canvas.draw()
            assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1


@pytest.mark.parametrize("most", [1.02, 1.5, 3, 8, 40, 500, 10_000])
def test_a_logarithmic_axis_has_numbers_to_read_values_by(most: float) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="plots need the extra: pip install -e '.[bench]'")
    figure, axes = pyplot.subplots()
    axes.plot([1, 2, 4], [7, 7.01, 7 * most])
    axes.set_yscale("log")
    plot._log_axes(axes, [1, 2, 4])
    figure.canvas.draw()
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    assert len({tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high} - {""}) >= 3
    pyplot.close(figure)


def test_bars_are_drawn_where_they_are_claimed_and_whole(pictured: dict[str, Any]) -> None:
    """To the 99th percentile for everything that was measured; modelled time has none."""
    assert "bars" not in plot._curves(pictured).axes[0].get_ylabel()
    curves = {**pictured["curves"], "QEMU": pictured["curves"]["scoped"]}
    for curve in curves.values():
        for at in curve["points"]:
            at["total"]["p99"] = 3 * at["total"]["p50"]
    linear = plot._curves({**pictured, "kind": "measured", "curves": curves}).axes[0]
    assert "bars" in linear.get_ylabel() and len(linear.containers) == len(curves)
    bars = [bar for container in linear.containers for bar in container.lines[2][0].get_segments()]
    assert len(bars) == 3 * len(curves)
    assert all(top > 2.9 * low and top < linear.get_ylim()[1] for (_, low), (_, top) in bars)


def test_each_line_of_the_lock_has_a_name_of_its_own() -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra: pip install -e '.[bench]'")
    run = json.loads((Path(program.__file__).with_name("results") / "lock.json").read_text())
    figure = plot._lock(run)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == 7
    signs = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert signs == ["measured, 1 thread", "modelled, 1 thread", "measured, 2 threads", "modelled, 2 threads"]
    nothing = plot._lock({**run, "measured": []})
    assert "measured on" not in nothing._suptitle.get_text() and "nothing" in nothing.axes[0].get_title()


def test_no_part_of_a_picture_stays(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="plots need the extra: pip install -e '.[bench]'")

    def savefig(path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    figure = pyplot.figure()
    figure.savefig = savefig
    (tmp_path / "a.png").write_bytes(b"earlier")
    with pytest.raises(OSError, match="space"):
        list(plot._save(figure, tmp_path, "a"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"earlier")]


# A guest whose vCPUs need not all have had a turn


@pytest.mark.sim
def test_no_benchmark_waits_for_every_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from migstream.demo import run as demo

    monkeypatch.setattr(demo, "wait_for", lambda *_, **__: pytest.fail("waited"))
    assert codec.saved_state(3, "sim")[1].rows == 3
    assert restores.saved_stream(SimBackend(), 2)[:4]
