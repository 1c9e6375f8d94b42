"""`migstream convert`: for another host, for an older reader; only what the guest can't have seen changes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from migstream.cli import main
from migstream.contract import Behaviour
from migstream.errors import DoesNotFit
from migstream.host import profiles
from migstream.host.profile import HostProfile, to_json
from migstream.model import Bank
from migstream.reader import StreamReader
from migstream.registers import arm64_ids
from migstream.registers.firmware_arm64 import ABSENT
from migstream.survey import survey
from migstream.transport import convert, plan_conversion
from tests import build, strategies
from tests.bless import good

Capture = pytest.CaptureFixture[str]
Save = Callable[[str], Path]
STD = arm64_ids.bitmap(0)


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """A demo guest of two vCPUs, saved on a simulated kernel; each kernel's once."""
    made: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("convert") / f"{name}.mig"
            assert main(["demo", "--backend", f"sim:{name}", "--vcpus", "2", "--memory", "4M", "--run", "0",
                         "-o", str(made[name])]) == 0
        return made[name]
    return once


def converted(data: bytes, host: HostProfile | None, minor: int | None) -> tuple[bytes, list[str]]:
    """The new stream, and what changed."""
    seen = survey(io.BytesIO(data))
    contract = seen.contract()
    assert seen.error is None and contract is not None
    wanted = plan_conversion(seen.reader, seen.banks, contract, host, minor)
    out = io.BytesIO()
    assert convert(io.BytesIO(data), out, seen.reader, wanted) == len(out.getvalue())
    return out.getvalue(), [str(change) for change in wanted.changes]


def minor_of(data: bytes) -> int:
    reader = StreamReader()
    reader.feed(data[:32])
    reader.next()
    assert reader.preamble is not None
    return reader.preamble.minor


# Nothing to change.


@given(strategies.saved())
def test_a_stream_for_no_host_says_the_same(saved: build.Saved) -> None:
    data = build.encode(saved)
    again, changes = converted(data, None, None)
    assert changes == [] and build.equal(build.decode(again).saved(), saved)


@given(strategies.saved())
def test_minor_0_loses_the_contract_section_alone_or_refuses(saved: build.Saved) -> None:
    data = build.encode(saved)
    there = {slot.id for layout in saved.layouts for slot in layout.slots}
    promised = (saved.behaviour.behaves_as if saved.behaviour else {}).keys() - there
    if promised:
        with pytest.raises(DoesNotFit, match=r"behaved as .* which minor 0 can't say") as caught:
            converted(data, None, 0)
        assert len(caught.value.reasons) == len(promised)
        return
    again, changes = converted(data, None, 0)
    assert minor_of(again) == 0 and len(changes) == (saved.behaviour is not None)
    assert build.equal(replace(build.decode(again).saved(), host=None), replace(saved, host=None, behaviour=None))


@pytest.mark.parametrize("name", [name for name, vector in good.VECTORS.items()
                                  if survey(io.BytesIO(vector.data)).contract() is not None])
def test_every_vector_can_be_converted_to_itself(name: str) -> None:
    data = good.VECTORS[name].data
    again, changes = converted(data, None, None)
    before, after = build.decode(data), build.decode(again)
    assert build.equal(replace(after.saved(), host=None), replace(before.saved(), host=None))
    assert all("left out: this version doesn't know it" in change for change in changes)


# For a host.

FITTING = (("x86_64-6.1", "x86_64-6.12"), ("x86_64-6.1", "x86_64-7.2"), ("x86_64-6.12", "x86_64-7.2"),
           ("arm64-6.12", "arm64-7.2"))


@pytest.mark.sim
@pytest.mark.parametrize(("source", "target"), FITTING)
def test_a_converted_stream_restores_there_as_the_first_would(save: Save, tmp_path: Path, capsys: Capture,
                                                              source: str, target: str) -> None:
    out, path = tmp_path / "w.mig", save(source)
    capsys.readouterr()
    assert main(["convert", str(path), "-o", str(out), "--for-host", target, "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert main(["verify", "-q", str(out)]) == 0
    assert main(["replay", str(out), "--backend", f"sim:{target}", "--readback", "--run", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["readback"]["compared"] > 100 and report["run"]["steps_after"] is not None
    assert main(["check", str(out), "--host", target, "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["hosts"][target]["verdicts"]
    changed = {change.split(":")[0] for change in changes}
    assert not changed & {v["register"] for v in left if v["answer"] in ("harmless", "written_as")}


@pytest.mark.sim
@pytest.mark.parametrize(("source", "target"), FITTING)
def test_what_is_not_named_is_as_it_was(save: Save, source: str, target: str) -> None:
    """Each register that is not among the changes has its value; RAM and device state are the same; notes name all."""
    data = save(source).read_bytes()
    again, changes = converted(data, profiles.load(target), None)
    before, after = build.decode(data).saved(), build.decode(again).saved()
    assert (before.machine, before.runs, before.opaque) == (after.machine, after.runs, after.opaque)
    assert before.host is not None and after.host is not None
    assert list(after.host.notes) == [*before.host.notes, *(f"converted: {change}" for change in changes)]
    old, new, named = _values(before), _values(after), {change.split(":")[0] for change in changes}
    assert {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} <= named


def _values(saved: build.Saved) -> dict[str, list[bytes]]:
    from migstream.registers.catalogue import lookup

    return {lookup(slot.id).name: [bank.raw(row, column) for bank in saved.banks for row in range(bank.rows)
                                   for column, s in enumerate(bank.layout.slots) if s == slot]
            for bank in saved.banks for slot in bank.layout.slots}


@pytest.mark.sim
@pytest.mark.parametrize(("source", "target", "register"), [
    ("arm64-7.2", "arm64-6.12", "PSCI_VERSION"), ("arm64-7.2", "arm64-5.10", "PSCI_VERSION"),
    ("x86_64-6.18-pvm", "x86_64-6.1", "KVM_CPUID2"), ("x86_64-7.2", "arm64-7.2", "the stream is x86_64")])
def test_what_the_guest_would_notice_is_refused_by_name(save: Save, tmp_path: Path, capsys: Capture, source: str,
                                                        target: str, register: str) -> None:
    out, path = tmp_path / "w.mig", save(source)
    capsys.readouterr()
    assert main(["convert", str(path), "-o", str(out), "--for-host", target]) == 11
    err = capsys.readouterr().err
    assert f"can't be converted so that its guest can't tell: {register}" in err and err.count("\n") == 1
    assert not out.exists() and list(tmp_path.iterdir()) == []


def _told(profile: HostProfile, **answers: int) -> HostProfile:
    """A host that was asked every interface: none is there, but what `answers` says."""
    asked = {call.key: 2**64 - 1 for row in ABSENT for call in row.asked}
    return replace(profile, firmware={**profile.firmware, **asked, **{0x8400_0050 << 32: answers["trng"]}})


@pytest.mark.sim
def test_a_register_that_the_saving_kernel_lacked_gets_what_it_behaved_as(save: Save, tmp_path: Path,
                                                                          capsys: Capture) -> None:
    """Taken out of the stream and put into its contract; converting brings it back into a bank."""
    data = save("arm64-7.2").read_bytes()
    stream = build.decode(data).saved()
    banks = tuple(_without(bank, STD) for bank in stream.banks)
    layouts = tuple(replace(at, slots=tuple(s for s in at.slots if s.id != STD)) for at in stream.layouts)
    old = replace(stream, layouts=layouts, banks=banks,
                  behaviour=Behaviour("measured", {STD: word(0)}, {STD: "TRNG_VERSION: not supported"}))
    again, changes = converted(build.encode(old), profiles.load("arm64-7.2"), 0)
    assert any(change.startswith("STD_BMAP: added: 0x0: the saving kernel has no such register") for change in changes)
    assert minor_of(again) == 0 and _values(build.decode(again).saved())["STD_BMAP"] == [word(0)]
    out = tmp_path / "w.mig"
    out.write_bytes(again)
    assert main(["replay", str(out), "--backend", "sim:arm64-7.2", "--readback"]) == 0
    capsys.readouterr()


def _without(bank: Bank, id: int) -> Bank:
    import numpy as np

    if id not in bank.layout.index:
        return bank
    column = bank.layout.offsets[bank.layout.index[id]]
    slots = tuple(slot for slot in bank.layout.slots if slot.id != id)
    return replace(bank, layout=replace(bank.layout, slots=slots),
                   values=np.ascontiguousarray(np.delete(bank.values, column, axis=1)))


def test_minor_0_for_a_host_that_behaves_so() -> None:
    """What only the contract section said may go where the host is known to behave the same."""
    saved = build.decode(good.VECTORS["arm64"].data).saved()
    promised = replace(saved, behaviour=Behaviour("measured", {STD: word(0)}))
    known = replace(profiles.load("arm64-5.10"), firmware={})
    same, other = _told(known, trng=2**64 - 1), _told(known, trng=0x10000)
    data = build.encode(promised)
    found = survey(io.BytesIO(data))
    if converted_or_reasons(data, same) is None:
        pytest.skip("the vector's registers don't fit the recorded host")
    assert found.reader.behaviour is not None
    again = converted_or_reasons(data, same)
    assert isinstance(again, bytes) and minor_of(again) == 0
    reasons = converted_or_reasons(data, other)
    assert isinstance(reasons, list) and any("STD_BMAP" in reason for reason in reasons)


def converted_or_reasons(data: bytes, host: HostProfile) -> bytes | list[str] | None:
    try:
        return converted(data, host, 0)[0]
    except DoesNotFit as error:
        return error.reasons if all("STD_BMAP" in reason for reason in error.reasons) else None


# Misuse.


@pytest.mark.sim
@pytest.mark.parametrize(("words", "status", "message"), [
    ([], 64, "--for-host or --format-minor says what for"), (["--format-minor", "2"], 64, "there are 0 to 1"),
    (["--format-minor", "-1"], 64, "there are 0 to 1"), (["--for-host", "none"], 64, "no host profile"),
    (["--format-minor", "x"], 64, "--format-minor")])
def test_misuse_is_one_clear_line(save: Save, tmp_path: Path, capsys: Capture, words: list[str], status: int,
                                  message: str) -> None:
    out = tmp_path / "w.mig"
    path = save("x86_64-6.1")
    capsys.readouterr()
    assert main(["convert", str(path), "-o", str(out), *words]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not out.exists()


@pytest.mark.sim
def test_pipes_and_broken_streams(save: Save, tmp_path: Path, capsys: Capture) -> None:
    out, data = tmp_path / "w.mig", save("x86_64-6.1").read_bytes()
    assert main(["convert", "-", "-o", str(out), "--format-minor", "0"]) == 64
    assert main(["convert", str(save("x86_64-6.1")), "-o", "-", "--format-minor", "0"]) == 64
    for broken, status in ((data[:-7], 2), (data[:200] + b"\0" + data[201:], 1), (b"x" * 100, 1)):
        path = tmp_path / "v.mig"
        path.write_bytes(broken)
        capsys.readouterr()
        assert main(["convert", str(path), "-o", str(out), "--for-host", "x86_64-7.2"]) == status
        assert capsys.readouterr().err.startswith(f"migstream: {path}: ") and not out.exists()


@pytest.mark.sim
def test_for_people(save: Save, tmp_path: Path, capsys: Capture) -> None:
    profile = tmp_path / "here.json"
    profile.write_text(to_json(profiles.load("x86_64-7.2")))
    out = tmp_path / "w.mig"
    assert main(["convert", str(save("x86_64-6.1")), "-o", str(out), "--for-host", str(profile)]) == 0
    shown = capsys.readouterr().out
    assert "format 1.1" in shown and "changed" in shown


@pytest.mark.sim
def test_a_stream_is_not_converted_onto_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v.mig"
    assert main(["demo", "--backend", "sim:arm64-7.2", "--vcpus", "1", "--memory", "4M", "-o", str(path)]) == 0
    before = path.read_bytes()
    (tmp_path / "same").symlink_to(path)
    assert main(["convert", str(path), "-o", str(tmp_path / "same"), "--format-minor", "0"]) == 64
    assert "name another file" in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.parametrize(("text", "status", "message"), [
    (None, 74, "in: No such file"), ('{"migstream_contract": 1}', 64, "in: not a stream (this is a contract)"),
    ("migstream_policy = 1", 64, "in: not a stream (this is a policy)"), ("", 2, ""),
    ("anything else, " * 9, 1, "magic")])
def test_an_input_that_is_no_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, status: int,
                                    message: str) -> None:
    """Also where the output is there already."""
    (tmp_path / "out").write_text("kept")
    if text is not None:
        (tmp_path / "in").write_text(text)
    assert main(["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--format-minor", "0"]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and (tmp_path / "out").read_text() == "kept"


@pytest.mark.sim
def test_a_newer_minor_than_needed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, old, new = (str(tmp_path / name) for name in ("v.mig", "0.mig", "1.mig"))
    assert main(["demo", "--backend", "sim:arm64-7.2", "--vcpus", "1", "--memory", "4M", "-o", saved]) == 0
    assert main(["convert", saved, "-o", old, "--for-host", "arm64-7.2", "--format-minor", "0"]) == 0
    capsys.readouterr()
    assert main(["convert", old, "-o", new, "--format-minor", "1"]) == 0
    assert "format 1.0: nothing in it needs a newer one" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["/dev/null", "pipe"])
def test_what_can_be_read_once_alone_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["convert", name if name[0] == "/" else str(pipe), "-o", str(tmp_path / "out"), "--format-minor", "0"]
    assert main(words) == 64
    assert "convert reads its input twice" in capsys.readouterr().err
