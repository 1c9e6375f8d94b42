"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from migstream.cli import main
from migstream.errors import EXIT_STATUS
from migstream.host import profiles
from migstream.model import Arch

Capture = pytest.CaptureFixture[str]
VECTORS = Path(__file__).parent.parent / "formats" / "vectors"

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo guest of 4 vCPUs, saved mid-run in the simulator."""
    path = tmp_path_factory.mktemp("cli") / "v.mig"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["demo", "--backend", "sim", "--vcpus", "4", "--run", "0", "-o", str(path)]) == 0
    return path


def run(capsys: Capture, *argv: object) -> tuple[int, str, str]:
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out, err


def document(capsys: Capture, *argv: object) -> dict[str, Any]:
    status, out, _ = run(capsys, *argv, "--json")
    result = json.loads(out)
    assert (status, result["migstream_json"]) == (0, 1)
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("words", [["--reg", "PC"], ["--vcpu", "3"], ["--vm"], ["--section", "90"], ["--contract"]])
@pytest.mark.parametrize("kept", [70, 300, 1200, None], ids=str)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["", "json"])
def test_a_broken_stream_is_the_answer_whatever_was_asked(capsys: Capture, stream: Path, tmp_path: Path,
                                                          more: list[str], words: list[str], kept: int | None) -> None:
    """What is asked for may stand behind the fault: it is not said to be missing."""
    data = bytearray(stream.read_bytes())
    if kept is None:
        data[700] ^= 0xFF
    path = tmp_path / "broken.mig"
    path.write_bytes(data[:kept])
    status, out, err = run(capsys, "inspect", path, *words, *more)
    assert status == (1 if kept is None else 2) and err.count("\n") == 1
    assert f"{path}: offset " in err and (not more or json.loads(out))


def test_demo_counts_on_and_says_so_on_one_screen(capsys: Capture) -> None:
    status, out, err = run(capsys, "demo", "--backend", "sim", "--vcpus", "9", "--run", "0")
    assert (status, err) == (0, "")
    assert "every counter went on without a gap" in out
    assert "modelled time, from what ioctls cost on" in out and "it is not KVM's" in out
    assert len(out.splitlines()) <= 40


@pytest.mark.parametrize("vcpus", [1, 4, 64, 240])
def test_vm_scoped_writes_do_not_grow_with_the_vcpus(capsys: Capture, vcpus: int) -> None:
    result = document(capsys, "demo", "--backend", "sim", "--vcpus", vcpus, "--run", "0")
    writes = result["replay"]["writes"]
    assert {phase: row["vm"] for phase, row in writes.items()} == {
        "create": 1, "feature": 2, "state": 0, "interrupts": 4, "clock": 1}
    assert writes["state"]["vcpu"] % vcpus == 0
    steps = zip(result["steps_at_save"], result["steps_after"], strict=True)
    assert [after > before for before, after in steps] == [True] * vcpus


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 4, 64, 240])
def test_demo_on_real_kvm(capsys: Capture, vcpus: int) -> None:
    result = document(capsys, "demo", "--backend", "kvm", "--vcpus", vcpus)
    assert result["backend"] == "kvm"
    assert result["replay"]["run"]["steps_before"] == result["steps_at_save"]
    assert all(after > before for before, after in zip(result["steps_at_save"], result["steps_after"], strict=True))
    assert {phase: row["vm"] for phase, row in result["replay"]["writes"].items()} == {
        "create": 1, "feature": 2, "state": 0, "interrupts": 4, "clock": 1}
    assert [d for d in result["replay"]["readback"]["differs"] if not d["reason"]] == []


_FEATURES: dict[Arch, list[list[str]]] = {
    Arch.X86_64: [[]], Arch.ARM64: [[], ["--vcpu-features", "sve,pmu_v3,ptrauth"]]}


@pytest.mark.sim
@pytest.mark.parametrize(("kernel", "features"), [
    pytest.param(kernel, features, id=" ".join((kernel, *features[1:])))
    for kernel in profiles.names() for features in _FEATURES[profiles.load(kernel).arch]])
def test_demo_on_every_simulated_kernel(capsys: Capture, kernel: str, features: list[str]) -> None:
    """Saved mid-run, restored in another process with read-back, counting on without a gap."""
    result = document(capsys, "demo", "--backend", f"sim:{kernel}", "--vcpus", "3", "--memory", "8M", "--run", "0.05",
                      *features)
    assert all(after > before for before, after in zip(result["steps_at_save"], result["steps_after"], strict=True))
    readback = result["replay"]["readback"]
    assert readback["compared"] > 100 and [d for d in readback["differs"] if not d["reason"]] == []


@pytest.mark.kvm
def test_a_stream_of_real_kvm_is_replayed_in_the_simulator_and_on_kvm(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "v.mig"
    document(capsys, "demo", "--backend", "kvm", "--vcpus", "4", "-o", path)
    for backend in ("sim", "kvm"):
        result = document(capsys, "replay", path, "--backend", backend, "--readback", "--run", "0.1")
        assert [d for d in result["readback"]["differs"] if not d["reason"]] == [], backend
        assert result["run"]["exits"] == {}


def test_inspect_shows_one_screen(capsys: Capture, stream: Path) -> None:
    status, out, err = run(capsys, "inspect", stream)
    assert (status, err) == (0, "")
    for text in ("migstream 1.1, x86_64", "4 vCPUs", "vm scope", "vcpu scope", "BANK", "END", "good"):
        assert text in out
    assert len(out.splitlines()) <= 40


@pytest.mark.parametrize(("options", "expected"), [
    (["--vcpu", "2", "--reg", "rip"], "rip = 0x9"),
    (["--vcpu", "all", "--reg", "cr0"], "(PE, MP, ET, NE, WP, PG)"),
    (["--vcpu", "0", "--reg", "KVM_SREGS*"], "efer = 0x500  (LME, LMA)"),
    (["--vcpu", "all", "--reg", "MSR_LSTAR"], "0x20300002c0000082  vCPUs 0-3  0xffffffff81000000"),
    (["--vcpu", "1", "--reg", "xstate_bv"], "(x87, SSE)"),
    (["--vm"], "KVM_IRQCHIP_IOAPIC"),
    (["--vm", "--reg", "MSR_KVM_WALL_CLOCK*"], "VM  0x0"),
    (["--section", "0"], "MACH"),
    (["--section", "0", "--hex"], "|memory."),
])
def test_inspect_names_and_decodes(capsys: Capture, stream: Path, options: list[str], expected: str) -> None:
    status, out, _ = run(capsys, "inspect", stream, *options)
    assert status == 0
    assert expected.lower() in out.lower()


def test_inspect_json_has_every_register_of_a_vcpu(capsys: Capture, stream: Path) -> None:
    result = document(capsys, "inspect", stream, "--vcpu", "3")
    assert len(result["registers"]) == result["scopes"]["vcpu"]["registers"]
    regs = next(r for r in result["registers"] if r["name"] == "KVM_REGS")
    assert regs["vcpus"] == [3]
    assert regs["fields"]["r8"] == 3


def test_inspect_and_verify_read_a_pipe(stream: Path) -> None:
    for command in ("inspect", "verify"):
        with stream.open("rb") as source:
            result = subprocess.run([sys.executable, "-m", "migstream", command, "-"], stdin=source,
                                    capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert "4 vCPUs" in result.stdout


def _bad() -> list[Path]:
    return sorted((VECTORS / "bad").glob("*.json"))


@pytest.mark.parametrize("path", _bad(), ids=lambda p: p.stem)
def test_verify_gives_each_bad_vector_its_exit_status(capsys: Capture, tmp_path: Path, path: Path) -> None:
    from tests.build import read_hex

    expected = json.loads(path.read_text())
    file = tmp_path / "bad.mig"
    file.write_bytes(read_hex(path.with_suffix(".hex")))
    status, out, err = run(capsys, "verify", file)
    assert (status, out) == (expected["exit_status"], "")
    assert len(err.splitlines()) == 1
    assert str(file) in err
    assert err.rstrip("\n").isprintable()


def test_there_are_bad_vectors() -> None:
    assert len(_bad()) > 30


def test_text_from_a_stream_is_escaped(capsys: Capture, tmp_path: Path) -> None:
    from tests import build

    file = tmp_path / "x.mig"
    host = build.host("Linux \x1b]0;owned\x07\x1b[2J", "cpu", "kvm", ["note \r\x1b[31m"])
    file.write_bytes(build.stream(build.mach(), host))
    for options in ([], ["--section", "1"], ["--section", "1", "--hex"]):
        status, out, _ = run(capsys, "inspect", file, *options)
        assert status == 0
        assert not [c for c in out if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize(("argv", "status", "text"), [
    (["frobnicate"], 64, "invalid choice"),
    ([], 64, "required"),
    (["demo", "--vcpus", "0"], 64, "1 to 4096"),
    (["demo", "--vcpus", "5000"], 64, "1 to 4096"),
    (["demo", "--memory", "64X"], 64, "is not a size"),
    (["demo", "--memory", "1000", "--backend", "sim"], 64, "whole pages"),
    (["demo", "--backend", "xen"], 64, "no backend 'xen'"),
    (["demo", "--backend", "sim:nonesuch"], 69, "nonesuch"),
    (["demo", "--backend", "sim", "--level", "99"], 64, "zstd level 99"),
    (["inspect", "/nonexistent/v.mig"], 74, "No such file"),
    (["verify", "/"], 74, "Is a directory"),
    (["demo", "--backend", "sim", "-o", "/nonexistent/v.mig"], 74, "No such file"),
    (["replay", "/nonexistent/v.mig", "--backend", "sim"], 74, "No such file"),
    (["replay", "v.mig", "--run", "-1"], 64, "seconds"),
])
def test_errors_are_one_line_with_a_status(capsys: Capture, argv: list[str], status: int, text: str) -> None:
    found, out, err = run(capsys, *argv)
    assert (found, out) == (status, "")
    assert text in err
    assert len(err.splitlines()) == 1
    assert found in EXIT_STATUS


@pytest.mark.parametrize("options", [["--vcpu", "9"], ["--vcpu", "x"], ["--reg", "nonesuch"], ["--section", "999"]])
def test_inspect_asked_for_what_is_not_there(capsys: Capture, stream: Path, options: list[str]) -> None:
    status, out, err = run(capsys, "inspect", stream, *options)
    assert (status, out, len(err.splitlines())) == (64, "", 1)


def test_no_kvm_is_one_line_and_69(capsys: Capture, stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from migstream.backends.kvm import uapi

    def refuse(path: str = "/dev/kvm") -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(uapi, "open_kvm", refuse)
    status, _, err = run(capsys, "replay", stream, "--backend", "kvm")
    assert status == 69
    assert "EACCES" in err
    assert "--backend sim" in err
    status, out, _ = run(capsys, "demo", "--run", "0")
    assert status == 0
    assert "not on real KVM: /dev/kvm: EACCES" in out


def test_another_architecture_is_refused_before_anything_is_made(capsys: Capture, tmp_path: Path) -> None:
    from migstream.model import Arch
    from tests import build

    file = tmp_path / "arm.mig"
    file.write_bytes(build.stream(build.mach(arch=int(Arch.ARM64)), start=build.preamble(arch=Arch.ARM64)))
    status, _, err = run(capsys, "replay", file, "--backend", "sim")
    assert status == 11
    assert "the stream is arm64, this host is x86_64" in err


def test_a_broken_stream_shows_what_came_before(capsys: Capture, stream: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mig"
    cut.write_bytes(stream.read_bytes()[:-100])
    status, out, err = run(capsys, "inspect", cut)
    assert status == 2
    assert "4 vCPUs" in out
    assert "offset" in err


def test_debug_shows_the_traceback(stream: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "migstream", "verify", "/nonexistent", "--debug"],
                            capture_output=True, text=True, check=False)
    assert "Traceback" in result.stderr


def test_our_own_bug_is_70(capsys: Capture, stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import migstream.survey

    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(migstream.survey, "survey", broken)
    status, _, err = run(capsys, "inspect", stream)
    assert (status, len(err.splitlines())) == (70, 1)
    assert "a bug of ours: ZeroDivisionError: oops" in err


def test_a_killed_writer_never_leaves_a_half_file(tmp_path: Path) -> None:
    """Kill `demo -o` at random moments: the name is either absent or a good stream."""
    rng = random.Random(20261121)
    target = tmp_path / "v.mig"
    seen = {"absent": 0, "good": 0}
    for _ in range(12):
        target.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-m", "migstream", "demo", "--backend", "sim", "--memory", "16M",
                                  "--run", "0", "-o", str(target)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + rng.uniform(0.1, 1.6)
        while time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        seen["good" if target.exists() else "absent"] += 1
        if target.exists():
            assert main(["verify", "-q", str(target)]) == 0
    assert seen["absent"] > 0


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(stream: Path, tmp_path: Path) -> None:
    from migstream.transport import open_output

    target = tmp_path / "v.mig"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), open_output(str(target)) as file:
        file.write(b"half")
        raise RuntimeError("stop")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["v.mig"]


def test_a_device_or_pipe_is_written_and_never_replaced(stream: Path, tmp_path: Path) -> None:
    from migstream.transport import open_output

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen([sys.executable, "-m", "migstream", "verify", "-q", str(pipe)])
    with open_output(str(pipe)) as file:
        file.write(stream.read_bytes())
    assert reader.wait(20) == 0
    assert pipe.is_fifo()


def test_a_link_is_followed_and_a_mode_is_kept(tmp_path: Path) -> None:
    from migstream.transport import open_output

    target, link = tmp_path / "real.mig", tmp_path / "link.mig"
    target.write_bytes(b"old")
    target.chmod(0o644)
    link.symlink_to(target)
    with open_output(str(link)) as file:
        file.write(b"new")
    assert (link.is_symlink(), target.read_bytes(), target.stat().st_mode & 0o777) == (True, b"new", 0o644)


@pytest.mark.parametrize(("redirect", "text"), [(">/dev/full", "No space left"), (">&-", "standard output is closed")])
@pytest.mark.parametrize("command", ["inspect", "verify", "inspect --json"])
def test_output_that_can_not_be_written_is_io(stream: Path, redirect: str, text: str, command: str) -> None:
    result = subprocess.run(["bash", "-c", f"{sys.executable} -m migstream {command} {stream} {redirect}"],
                            capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (74, 1)
    assert text in result.stderr


def test_a_closed_standard_input_is_io() -> None:
    result = subprocess.run(["bash", "-c", f"{sys.executable} -m migstream verify - <&-"], capture_output=True,
                            text=True, check=False)
    assert (result.returncode, result.stderr) == (74, "migstream: standard input is closed\n")


@pytest.mark.parametrize("argv", [
    ["inspect", "V", "--hex"], ["inspect", "V", "--section", "1", "--vm"], ["inspect", "V", "--reg", ""],
    ["demo", "--backend", "sim", "-o", ""], ["demo", "--backend", "sim", "-o", "-"],
    ["demo", "--backend", "sim", "--vcpus", "4000"],
])
def test_what_makes_no_sense_is_usage(capsys: Capture, stream: Path, argv: list[str]) -> None:
    status, out, err = run(capsys, *(stream if word == "V" else word for word in argv))
    assert (status, out, len(err.splitlines())) == (64, "", 1)


def test_a_name_with_escapes_is_shown_escaped(capsys: Capture) -> None:
    _, _, err = run(capsys, "verify", "a\x1b[31mb\nc")
    assert err == "migstream: a\\x1b[31mb\\nc: No such file or directory\n"


def test_sigterm_leaves_no_temporary_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "migstream", "demo", "--backend", "sim", "--vcpus", "64", "--run", "30", "-o",
               str(tmp_path / "v.mig")]
    child = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 20
    while not (tmp_path / "v.mig").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 128 + signal.SIGTERM
    assert [p.name for p in tmp_path.iterdir()] == ["v.mig"]


def test_output_to_a_closed_pipe_is_no_traceback(stream: Path) -> None:
    command = f"{sys.executable} -m migstream inspect {stream} --vcpu all | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert result.returncode in (0, 74)
