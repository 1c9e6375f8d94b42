"""`migstream check`: answers, exit status, and what it says to input that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from migstream.cli import main

Capture = pytest.CaptureFixture[str]
HOST = "x86_64-6.18-pvm"


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "v.mig"
    assert main(["demo", "--backend", f"sim:{HOST}", "--vcpus", "2", "-o", str(path)]) == 0
    return path


@pytest.mark.sim
def test_a_stream_fits_the_host_that_saved_it(capsys: Capture, stream: Path) -> None:
    assert main(["check", str(stream), "--host", HOST]) == 0
    assert f"{HOST}  fits: " in capsys.readouterr().out


@pytest.mark.sim
def test_the_worst_host_decides_and_every_reason_is_there(capsys: Capture, stream: Path) -> None:
    assert main(["check", str(stream), "--host", HOST, "--host", "arm64-7.2", "--host", "x86_64-6.1", "--json"]) == 11
    hosts = json.loads(capsys.readouterr().out)["hosts"]
    assert {name: answer["status"] for name, answer in hosts.items()} == {HOST: 0, "arm64-7.2": 11, "x86_64-6.1": 11}
    assert hosts["arm64-7.2"]["obstacles"] == ["the stream is x86_64, this host is arm64"]
    refused = [v for v in hosts["x86_64-6.1"]["verdicts"] if v["answer"] in ("refused", "noticed")]
    assert refused and all(v["reason"] and v["register"] for v in refused)


@pytest.mark.sim
def test_what_check_refuses_is_what_replay_refuses(capsys: Capture, stream: Path) -> None:
    assert main(["check", str(stream), "--host", "x86_64-6.1"]) == 11
    said = capsys.readouterr().out
    assert main(["replay", str(stream), "--backend", "sim:x86_64-6.1"]) == 11
    first = capsys.readouterr().err.split("does not fit this host: ")[1].split(":")[0]
    assert first in said


@pytest.mark.sim
@pytest.mark.parametrize(("text", "message"), [
    ("[[tolerate]]", "no migstream_policy"),
    ("migstream_policy = 9", "policy version 9"),
    ("migstream_policy = 1\n[[tolerate]]\nregister = 'NO_SUCH'\nreason = 'x'", "no register is called 'NO_SUCH'"),
    ("migstream_policy = 1\n[[tolerate]]\nregister = 'KVM_CPUID2'", "no reason"),
    ("not toml", "not TOML"),
])
def test_a_policy_that_is_none(capsys: Capture, stream: Path, tmp_path: Path, text: str, message: str) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(text)
    assert main(["check", str(stream), "--host", HOST, "--policy", str(policy)]) == 64
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_file_that_is_no_stream(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("not a stream, but long enough to hold the preamble of one\n" * 4)
    assert main(["check", str(path), "--host", HOST]) == 1
    assert capsys.readouterr().err.count("\n") == 1
