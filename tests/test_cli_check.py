"""`migstream check`: answers, exit status, and what it says to input that is none."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.cli import main
from migstream.cli_check import read_input
from migstream.errors import MigstreamError
from migstream.host import profiles
from migstream.host.profile import to_json
from tests import build

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
@pytest.mark.parametrize(("text", "status", "message"), [
    ("[[tolerate]]", 1, "no migstream_policy"),
    ("migstream_policy = 9", 3, "policy version 9"),
    ("migstream_policy = 0", 1, "policy version 0"),
    ("migstream_policy = 1\n[[tolerate]]\nregister = 'NO_SUCH'\nreason = 'x'", 1, "no register is called 'NO_SUCH'"),
    ("migstream_policy = 1\n[[tolerate]]\nregister = 'KVM_CPUID2'", 1, "no reason"),
    ("not toml", 1, "not TOML"),
    (f"migstream_policy = 1\n[[tolerate]]\nregister = {['*_EL1'] * 1025}\nreason = 'x'", 4, "1025 names and globs"),
    ("migstream_policy = 1\n" + "#" * (1 << 20), 4, "over 1048576 bytes"),
])
def test_a_policy_that_is_none(capsys: Capture, stream: Path, tmp_path: Path, text: str, status: int,
                               message: str) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(text)
    assert main(["check", str(stream), "--host", HOST, "--policy", str(policy)]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_file_that_is_no_stream(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("not a stream, but long enough to hold the preamble of one\n" * 4)
    assert main(["check", str(path), "--host", HOST]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Contracts, the way back, policies, many hosts.


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "c.json"
    assert main(["host", "baseline", "x86_64-6.1", "x86_64-6.12", "x86_64-7.2", "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "a.mig"
    assert main(["demo", "--backend", "sim:arm64-7.2", "--vcpus", "2", "--memory", "4M", "--run", "0",
                 "-o", str(path)]) == 0
    return path


PSCI_POLICY = """migstream_policy = 1
[[clamp]]
register = "PSCI_VERSION"
reason = "our guests ask at boot only"
guest_notices = {notices}
[[tolerate]]
register = "MDCR_EL2"
reason = "never there"
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "p.toml"
    path.write_text(PSCI_POLICY.format(notices="true"))
    return path


def test_a_baseline_contract_fits_each_of_its_hosts(capsys: Capture, contract: Path) -> None:
    hosts = ["x86_64-6.1", "x86_64-6.12", "x86_64-7.2"]
    words = [word for name in hosts for word in ("--host", name)]
    assert main(["check", str(contract), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "contract"
    assert {name: answer["status"] for name, answer in document["hosts"].items()} == dict.fromkeys(hosts, 0)


def test_a_contract_is_judged_by_its_values(capsys: Capture, contract: Path, tmp_path: Path) -> None:
    assert main(["check", str(contract), "--host", "arm64-7.2"]) == 11
    assert "the stream is x86_64, this host is arm64" in capsys.readouterr().out


def test_a_contract_from_a_pipe_is_known_by_its_content(contract: Path) -> None:
    words = [sys.executable, "-m", "migstream", "check", "-", "--host", "x86_64-7.2", "--json"]
    done = subprocess.run(words, input=contract.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "contract"


@pytest.mark.sim
def test_a_stream_from_a_pipe_is_known_by_its_content(stream: Path) -> None:
    words = [sys.executable, "-m", "migstream", "check", "-", "--host", HOST, "--json"]
    done = subprocess.run(words, input=stream.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "stream"


@pytest.mark.sim
def test_what_differs_between_vcpus_is_said(capsys: Capture, stream: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(stream), "--contract", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["contract"]
    del shown["registers"]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(shown))
    assert main(["check", str(path), "--host", HOST]) == 0
    assert "KVM_CPUID2: not the same on all vCPUs; judged by vCPU 0's" in capsys.readouterr().out


@pytest.mark.sim
def test_there_and_back(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "v.mig"
    assert main(["demo", "--backend", "sim:arm64-6.12", "--vcpus", "1", "--memory", "4M", "--run", "0",
                 "-o", str(path)]) == 0
    assert main(["check", str(path), "--host", "arm64-7.2", "--reverse"]) == 0
    assert "arm64-7.2 and back  fits" in capsys.readouterr().out
    assert main(["check", str(path), "--host", "arm64-7.2", "--reverse", "--source", "arm64-5.10", "--json"]) == 11
    answer = json.loads(capsys.readouterr().out)["hosts"]["arm64-7.2"]
    assert answer["status"] == 0 and answer["back"]["status"] == 11


@pytest.mark.sim
def test_no_way_back_where_there_is_none_there(capsys: Capture, arm64: Path) -> None:
    assert main(["check", str(arm64), "--host", "arm64-6.12", "--reverse"]) == 11
    assert "arm64-6.12 and back  does not fit: the guest does not get there" in capsys.readouterr().out
    assert main(["check", str(arm64), "--host", "arm64-6.12", "--reverse", "--json"]) == 11
    assert json.loads(capsys.readouterr().out)["hosts"]["arm64-6.12"]["back"] is None


def test_a_contract_comes_from_nowhere(capsys: Capture, contract: Path) -> None:
    words = ["check", str(contract), "--host", "x86_64-7.2", "--reverse"]
    assert main(words) == 64
    err = capsys.readouterr().err
    assert "name it with --source" in err and err.count("\n") == 1
    assert main([*words, "--source", "x86_64-6.1"]) == 0


@pytest.mark.sim
def test_many_hosts_are_a_line_each(capsys: Capture, arm64: Path) -> None:
    hosts = [word for name in ("arm64-5.10", "arm64-6.1", "arm64-6.12", "arm64-7.2") for word in ("--host", name)]
    assert main(["check", str(arm64), *hosts]) == 11
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].split()[:2] == ["arm64-7.2", "fits"]
    assert main(["check", str(arm64), *hosts, "--all"]) == 11
    assert len(capsys.readouterr().out.splitlines()) > 20


@pytest.mark.sim
def test_a_policy_is_in_every_report(capsys: Capture, arm64: Path, policy: Path) -> None:
    words = [str(arm64), "--policy", str(policy)]
    assert main(["check", *words, "--host", "arm64-6.12"]) == 10
    out = capsys.readouterr().out
    assert "written as 0x10001 (policy, clamp: our guests ask at boot only)" in out
    assert "policy: tolerate MDCR_EL2: changes nothing here" in out
    assert main(["check", *words, "--host", "arm64-6.12", "--json"]) == 10
    answer = json.loads(capsys.readouterr().out)["hosts"]["arm64-6.12"]
    assert answer["policy"] == {"changed": 1, "idle": ["tolerate MDCR_EL2"]}
    by = {v["register"]: v["policy"] for v in answer["verdicts"]}
    assert by["PSCI_VERSION"] == {"verb": "clamp", "reason": "our guests ask at boot only", "was": "refused"}


@pytest.mark.sim
def test_replay_takes_the_same_policy(capsys: Capture, arm64: Path, policy: Path) -> None:
    words = ["replay", str(arm64), "--backend", "sim:arm64-6.12", "--readback"]
    assert main(words) == 11
    capsys.readouterr()
    assert main([*words, "--policy", str(policy)]) == 10
    out = capsys.readouterr().out
    assert "PSCI_VERSION: guest would notice" in out and "(policy, clamp: our guests ask at boot only)" in out
    assert main([*words, "--policy", str(policy), "--json"]) == 10
    report = json.loads(capsys.readouterr().out)
    changed = {v["register"]: v["policy"] for v in report["verdicts"] if v["policy"]}
    assert changed == {"PSCI_VERSION": {"verb": "clamp", "reason": "our guests ask at boot only", "was": "refused"}}


@pytest.mark.sim
@pytest.mark.parametrize("command", (["check", "--host", "arm64-6.12"], ["replay", "--backend", "sim:arm64-6.12"]))
def test_a_policy_that_does_not_say_what_it_does(capsys: Capture, arm64: Path, policy: Path,
                                                 command: list[str]) -> None:
    policy.write_text(PSCI_POLICY.format(notices="false"))
    assert main([command[0], str(arm64), *command[1:], "--policy", str(policy)]) == 4
    err = capsys.readouterr().err
    assert "clamp PSCI_VERSION: a guest would notice: " in err and err.count("\n") == 1


# Files of the wrong kind, architecture or version.


@pytest.fixture(scope="module")
def kinds(stream: Path, contract: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good file of each kind, and files that are none."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = {"policy": PSCI_POLICY.format(notices="true"), "profile": to_json(profiles.load("x86_64-7.2")),
             "text": "hello, this is a file of another kind, long enough for a preamble to be read from it\n",
             "empty": "", "json": json.dumps({"migstream_json": 1}), "deep": "[" * 100_000,
             "newer contract": contract.read_text().replace('"migstream_contract": 1', '"migstream_contract": 2'),
             "newer profile": to_json(profiles.load("x86_64-7.2")).replace(
                 '"migstream_host_profile": 2', '"migstream_host_profile": 3'),
             "newer policy": "migstream_policy = 2\n",
             "page": "# On policies\n\n    migstream_policy = 1\n    [[tolerate]]\n\nare written so.\n"}
    out = {"stream": stream, "contract": contract, "folder": folder, "none": folder / "none"}
    for name, text in texts.items():
        out[name] = folder / name.replace(" ", "-")
        out[name].write_text(text)
    newer = bytearray(stream.read_bytes())
    newer[8:10] = (9).to_bytes(2, "little")
    out["newer stream"] = folder / "newer-stream"
    out["newer stream"].write_bytes(build.resum(bytes(newer)))
    return out


WRONG = (
    # what is given as the stream or contract
    ("file", "policy", 64, "neither a stream nor a contract (this is a policy)"),
    ("file", "profile", 64, "(this is a host profile)"),
    ("file", "text", 1, ""), ("file", "page", 1, "not a migstream stream"), ("file", "empty", 2, ""),
    ("file", "json", 64, "(this is the --json output of a command)"),
    ("file", "deep", 1, "not a contract: not JSON"), ("file", "newer contract", 3, "contract version 2"),
    ("file", "newer stream", 3, ""), ("file", "folder", 74, "directory"), ("file", "none", 74, "No such file"),
    # as the host
    ("host", "stream", 64, "not a host profile (this is a stream)"),
    ("host", "contract", 64, "no object with a field 'migstream_host_profile' (this is a contract)"),
    ("host", "policy", 64, "not a host profile (this is a policy)"), ("host", "empty", 1, "not a host profile: "),
    ("host", "page", 1, "not a host profile: not JSON"),
    ("host", "deep", 1, "nested too deep"), ("host", "newer profile", 3, "version 3; this migstream reads 2"),
    ("host", "none", 74, "No such file"), ("host", "folder", 74, "directory"),
    # as the policy
    ("policy", "stream", 64, "not a policy (this is a stream)"), ("policy", "contract", 64, "(this is a contract)"),
    ("policy", "profile", 64, "(this is a host profile)"), ("policy", "text", 1, "not a policy: not TOML"),
    ("policy", "empty", 1, "no migstream_policy = 1"), ("policy", "newer policy", 3, "policy version 2"),
    ("policy", "none", 74, "No such file"), ("policy", "folder", 74, "directory"),
)


@pytest.mark.sim
@pytest.mark.parametrize(("place", "kind", "status", "message"), WRONG)
def test_a_file_of_another_kind_is_one_clear_line(capsys: Capture, kinds: dict[str, Path], place: str, kind: str,
                                                  status: int, message: str) -> None:
    good = {"file": str(kinds["stream"]), "host": HOST, "policy": str(kinds["policy"])} | {place: str(kinds[kind])}
    words = ["check", good["file"], "--host", good["host"], "--policy", good["policy"]]
    capsys.readouterr()
    assert main(words) == status
    err = capsys.readouterr().err
    assert err.startswith("migstream: ") and err.count("\n") == 1
    assert message in err and (kind == "none" or str(kinds[kind]) in err)


@pytest.mark.sim
def test_a_profile_without_the_experiment(capsys: Capture, stream: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(to_json(replace(profiles.load(HOST), scopes={}, scope_found={}, register_bits={}, msr_bits={})))
    assert main(["check", str(stream), "--host", str(path)]) == 0
    assert "scope from catalogue: " in capsys.readouterr().out
    assert main(["check", str(stream), "--host", HOST]) == 0
    assert "scope from catalogue" not in capsys.readouterr().out


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode)
       | st.dictionaries(st.sampled_from(["migstream_contract", "arch", "values", "x"]), st.integers() | st.text(),
                         max_size=4).map(lambda fields: json.dumps(fields).encode()))
def test_any_bytes_are_judged_or_refused(data: bytes) -> None:
    """The first byte decides who reads; whoever it is, it is our error."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(MigstreamError) as caught:
            read_input(file.name)
    assert caught.value.exit_status in (1, 2, 3, 4, 64) and "\n" not in str(caught.value)


@pytest.mark.sim
def test_what_check_calls_a_fit_is_restored(capsys: Capture, tmp_path: Path) -> None:
    """A guest of 6.1 reads a CTR_EL0 without IDC; what CLIDR_EL1 may be goes by the host's."""
    path = tmp_path / "v.mig"
    assert main(["demo", "--backend", "sim:arm64-6.1", "--vcpus", "1", "--memory", "4M", "-o", str(path)]) == 0
    assert main(["check", str(path), "--host", "arm64-7.2"]) == 0
    assert main(["replay", str(path), "--backend", "sim:arm64-7.2", "--readback"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ({"values": {}}, "field 'values': is empty: it promises nothing that could be judged"),
    ({"values": {"-1": "00"}}, "field 'values': no register id: -1"),
    ({"varies": ["-0x1"]}, "field 'varies': no register id: -0x1"),
    ({"values": {"0x10000000000000000": "00"}}, "field 'values': no register id: 0x10000000000000000"),
])
def test_a_contract_of_nothing(capsys: Capture, contract: Path, tmp_path: Path, change: dict[str, Any],
                               message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**json.loads(contract.read_text()), **change}))
    assert main(["check", str(path), "--host", "x86_64-7.2"]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.sim
def test_one_spelling_of_an_answer(capsys: Capture, arm64: Path, policy: Path) -> None:
    words = ["--policy", str(policy), "--json"]
    main(["check", str(arm64), "--host", "arm64-6.12", *words])
    host = json.loads(capsys.readouterr().out)["hosts"]["arm64-6.12"]
    said = {(v["register"], v["answer"]) for v in host["verdicts"]}
    main(["replay", str(arm64), "--backend", "sim:arm64-6.12", *words])
    document = json.loads(capsys.readouterr().out)
    done = {(v["register"], v["answer"]) for v in document["verdicts"]}
    assert done and done <= said, (done - said)


@pytest.mark.sim
def test_a_clamp_that_has_nothing_to_write(capsys: Capture, arm64: Path, tmp_path: Path) -> None:
    """CTR_EL0 is taken as saved and shown otherwise, PTIMER_CNT is not there: neither has a nearest value."""
    path = tmp_path / "p.toml"
    path.write_text("migstream_policy = 1\n[[clamp]]\nregister = ['CTR_EL0', 'PTIMER_CNT']\nreason = 'r'\n"
                    "guest_notices = true\n")
    assert main(["check", str(arm64), "--host", "arm64-6.1", "--policy", str(path)]) == 11
    out = capsys.readouterr().out
    assert "clamp CTR_EL0, PTIMER_CNT: there is no nearer value to write; tolerate is the word" in out
    assert "(policy, clamp" not in out


@pytest.mark.sim
def test_a_physical_counter_that_no_move_keeps_is_said(capsys: Capture, arm64: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.mig"
    assert main(["demo", "--backend", "sim:arm64-6.1", "--vcpus", "1", "--memory", "4M", "-o", str(path)]) == 0
    assert main(["check", str(path), "--host", "arm64-7.2"]) == 0
    assert "so CNTPCT_EL0 jumps with any move" in capsys.readouterr().out
    main(["check", str(arm64), "--host", "arm64-6.1"])
    out = capsys.readouterr().out
    assert "PTIMER_CNT: guest would notice: CNTPCT_EL0 jumps" in out and "with any move" not in out


def test_what_a_contract_leaves_free_is_not_what_nobody_asked(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert main(["host", "baseline", "arm64-6.12", "arm64-7.2", "--free", "ID_AA64MMFR0_EL1*", "-o", str(path)]) == 0
    capsys.readouterr()
    assert main(["check", str(path), "--host", "arm64-6.12"]) == 0
    assert "ID_AA64MMFR0_EL1: the contract does not pin it: the guest meets" in capsys.readouterr().out
    assert main(["inspect", str(path), "--contract"]) == 0
    assert "ID_AA64PFR0_EL1" in capsys.readouterr().out
    assert main(["inspect", str(path), "--contract", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contract"]["found"] == "baseline"


@pytest.mark.sim
def test_where_a_register_is_shown(capsys: Capture, arm64: Path) -> None:
    assert main(["inspect", str(arm64), "--vcpu", "0", "--reg", "PSCI_VERSION"]) == 64
    assert capsys.readouterr().err.rstrip().endswith("matches 'PSCI_VERSION'; --vm shows one")
    assert main(["inspect", str(arm64), "--vm", "--reg", "nothing"]) == 64
    assert capsys.readouterr().err.rstrip().endswith("matches 'nothing'")


@pytest.mark.sim
@pytest.mark.parametrize("kind", ["contract", "policy", "profile"])
@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["replay", "--backend", "sim"]])
def test_a_file_of_ours_that_is_no_stream(capsys: Capture, kinds: dict[str, Path], words: list[str],
                                          kind: str) -> None:
    assert main([words[0], str(kinds[kind]), *words[1:]]) == 64
    err = capsys.readouterr().err
    assert "not a stream (this is a " in err and err.count("\n") == 1


def test_a_source_of_another_architecture_is_named(capsys: Capture, arm64: Path) -> None:
    assert main(["check", str(arm64), "--host", "arm64-6.12", "--reverse", "--source", "x86_64-6.1"]) == 64
    assert "--source x86_64-6.1: a host of x86_64; the guest is of arm64" in capsys.readouterr().err


@pytest.mark.sim
def test_what_the_guest_read_is_known_where_its_kernel_shows_the_register(capsys: Capture, arm64: Path) -> None:
    """CTR_EL0 of 7.2 is trapped; 5.10 shows the CPU's own."""
    main(["check", str(arm64), "--host", "arm64-5.10", "--all"])
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "CTR_EL0" in line and "CCSIDR" not in line]
    assert "the guest read 0x" in line and "older" not in line


@pytest.mark.sim
def test_a_streams_contract_in_a_file(capsys: Capture, arm64: Path, contract: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    assert main(["inspect", str(arm64), "--contract", "-o", str(out)]) == 0
    assert main(["check", str(out), "--host", "arm64-7.2"]) == 0
    assert main(["demo", "--backend", "sim:arm64-7.2", "--vcpus", "1", "--memory", "4M", "--run", "0",
                 "--contract", str(out), "-o", str(tmp_path / "v.mig")]) == 0
    assert main(["inspect", str(contract), "--contract", "-o", str(out)]) == 64
    assert main(["inspect", str(arm64), "-o", str(out)]) == 64
    assert "inspect -o: a file for what --contract shows" in capsys.readouterr().err
