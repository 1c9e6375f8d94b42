"""`migstream host show` and `host diff` on recorded profiles and on bad files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from migstream import backends
from migstream.cli import main
from migstream.cli_host import RUN_BY
from migstream.errors import BackendUnavailable, UsageError
from migstream.host import profiles
from migstream.host.compare import differences
from migstream.host.firmware_arm64 import questions
from migstream.host.profile import HostProfile, to_json
from migstream.registers import x86_64
from migstream.registers.firmware_arm64 import CALL_NAMES
from tests.lab import boot, kernels


def test_show_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "show", "arm64-6.12"]) == 0
    out = capsys.readouterr().out
    assert "35 VM-scoped, 190 vCPU-scoped, 34 fixed" in out and len(out.splitlines()) <= 24


def test_show_a_register_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "show", "arm64-6.12", "--reg", "id_aa64pfr0*"]) == 0
    assert "CSV3=IMP" in capsys.readouterr().out
    assert main(["host", "show", "arm64-6.12", "--reg", "PSCI_VERSION", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["registers"]
    assert row["scope"] == "vm" and row["after_run"] == [0, 0]


def test_diff_names_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "diff", "arm64-6.12", "arm64-7.2", "--json"]) == 0
    changes = {(c["name"], c["what"]): c for c in json.loads(capsys.readouterr().out)["changes"]}
    assert changes["TCR2_EL1", "listed"]["right"] == "no" and changes["VENDOR_HYP_BMAP_2", "listed"]["left"] == "no"
    assert changes["PSCI_VERSION", "default"]["right"] == "PSCI=1.3"
    assert main(["host", "diff", "arm64-6.12", "arm64-6.12"]) == 0
    assert capsys.readouterr().out == "no difference\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"migstream_host_profile": 0}', '{"migstream_host_profile": 1}',
                                  '{"migstream_host_profile": 1, "arch": "arm64", "scopes": {"0x1": "world"}}'])
def test_a_bad_profile_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert main(["host", "show", str(tmp_path / "bad.json")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("words", [["show", "nowhere"], ["diff", "arm64-6.1", "x86_64-6.1"],
                                   ["show", "arm64-6.1", "--reg", "nothing*"]])
def test_misuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", *words]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HostProfile)])
def test_a_field_that_is_damaged_is_named(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(to_json(profiles.load("arm64-6.1")))
    (tmp_path / "bad.json").write_text(json.dumps({**data, field: 5.5}))
    assert main(["host", "diff", str(tmp_path / "bad.json"), "arm64-6.1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"field '{field}'" in line and "bad.json" in line


@pytest.mark.parametrize(("change", "words"), [
    ({"migstream_host_profile": 1}, "field 'migstream_host_profile': version 1; this migstream reads 2; capture it ag"),
    ({"migstream_host_profile": 3}, "field 'migstream_host_profile': version 3; this migstream reads 2"),
    ({"registers_base": []}, "unknown field 'registers_base'"), ({"kernel": None}, "field 'kernel': None is no text"),
])
def test_an_older_or_newer_profile_says_so(change: dict[str, object], words: str, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(to_json(profiles.load("arm64-6.1")))
    (tmp_path / "old.json").write_text(json.dumps({**data, **change}))
    assert main(["host", "show", str(tmp_path / "old.json")]) == (3 if "version 3" in words else 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_field_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare.json").write_text('{"migstream_host_profile": 2, "arch": "arm64", "cpu": "", "backend": ""}')
    assert main(["host", "show", str(tmp_path / "bare.json")]) == 1
    assert "no field 'kernel'" in capsys.readouterr().err


def test_a_profile_for_a_simulator_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "nothing.mig", "--backend", "sim", "--host", "x86_64-6.1"]) == 64
    assert "for real KVM" in capsys.readouterr().err


def changes(left: HostProfile, right: HostProfile) -> set[tuple[str, str]]:
    """(name, property) of all that differs."""
    return {(one.name, one.what) for one in differences(left, right)}


SAYS_NOTHING = {
    "arch": "two architectures are not compared", "kernel": "named by whoever asks", "cpu": "likewise",
    "backend": "how it was asked", "made_by": "likewise", "scope_found": "words about `scopes`",
    "readback": "an example of `register_bits`", "registers": "the keys of defaults and refused",
    "feature_registers": "likewise, with all features", "msrs": "the keys of defaults and refused",
    "scope_flags": "no real kernel has any", "msr_bits": "`register_bits` has them, too",
}
"""Fields that `host diff` does not compare, with the reason."""


ANOTHER: dict[str, Any] = {"register_bits": (b"\1", b"\1"), "feature_bits": (b"\1", b"\1"), "scopes": "other",
                           "feature_scopes": "other", "after_run": (5, 5)}
"""Another result of each trial: what was never tried is not compared."""


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HostProfile)])
def test_a_diff_leaves_nothing_out(field: str) -> None:
    """Each table of a profile emptied, on the architecture that has it, is seen."""
    whole = next((p for p in map(profiles.load, profiles.names()) if getattr(p, field)), None)
    if field in SAYS_NOTHING or whole is None:
        assert field in SAYS_NOTHING or field == "refused"
        return
    value = getattr(whole, field)
    new: Any = dict.fromkeys(value, ANOTHER[field]) if field in ANOTHER else type(value)()
    other = dataclasses.replace(whole, **{field: new})
    assert changes(whole, other) and changes(other, whole)


def test_diff_shows_what_a_guest_was_told_and_leaves_out_what_runs() -> None:
    old, new = profiles.load("arm64-5.10"), profiles.load("arm64-7.2")
    assert ("PSCI_VERSION", "a guest's HVC, X0") in changes(old, new)
    assert ("host", "a guest's MRS") in changes(old, dataclasses.replace(old, guest_registers={}))
    pit = profiles.load("x86_64-6.12")
    assert not [name for name, _ in changes(pit, profiles.load("x86_64-7.2")) if name == "KVM_PIT2"]
    defaults = {**pit.defaults, x86_64.PIT2.id: bytes(len(pit.defaults[x86_64.PIT2.id]))}
    cpuid = bytearray(pit.cpuid)
    ebx = 8 + 40 + 16  # of the second entry, which is leaf 1
    for byte, seen in ((3, False), (1, True)):  # the APIC id; the size of a cache line
        cpuid[ebx + byte] ^= 1
        found = changes(pit, dataclasses.replace(pit, cpuid=bytes(cpuid)))
        assert (("CPUID 0x1.0 EBX", "supported CPUID") in found) == seen
    assert ("KVM_PIT2", "default") in changes(pit, dataclasses.replace(pit, defaults=defaults))


def test_the_command_that_made_a_profile_has_what_ran_it(monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The lab says how it was called; so that the line can be typed again."""
    machine = boot.Machine(features=("sve",), mode="nvhe")
    before = boot.environment(kernels.kernel("arm64", "6.12"), machine)[RUN_BY]
    assert before == "python -m tests.lab run --arch arm64 --kernel 6.12 --features sve --mode nvhe --"
    monkeypatch.setenv(RUN_BY, before)
    assert main(["host", "capture", "--backend", "sim", "--no-experiment"]) == 0
    made_by = json.loads(capsys.readouterr().out)["made_by"]
    assert made_by == f"{before} migstream host capture --backend sim --no-experiment"


@pytest.mark.parametrize("name", [name for name in profiles.names() if "pvm" not in name])
def test_recorded_profiles_say_the_exact_command(name: str) -> None:
    arch, kernel = name.split("-")
    before = boot.command_line(kernels.kernel(arch, kernel), boot.Machine())
    assert profiles.load(name).made_by == f"{before} migstream host capture -o profile.json"


@pytest.mark.parametrize("name", [name for name in profiles.names() if name.startswith("arm64")])
def test_recorded_arm64_profiles_know_what_a_guest_was_told(name: str) -> None:
    profile = profiles.load(name)
    assert profile.firmware.keys() == CALL_NAMES.keys()
    assert {*profile.firmware, *profile.guest_registers} == {question.key for question in questions()}


def test_diff_shows_what_features_change_and_attributes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "diff", "arm64-6.12", "arm64-7.2", "--json"]) == 0
    changes = {(c["name"], c["what"]): c for c in json.loads(capsys.readouterr().out)["changes"]}
    assert changes["ID_AA64PFR0_EL1", "with all features"]["right"] == "writable: only RAS[1]"
    assert changes["KVM_DEV_ARM_VGIC_GRP_MAINT_IRQ", "listed"]["left"] == "no"
    assert main(["host", "diff", "x86_64-6.12", "x86_64-6.18-pvm"]) == 0
    assert "XSAVE components" in capsys.readouterr().out
    assert main(["host", "show", "arm64-6.12", "--reg", "ID_AA64PFR0_EL1"]) == 0
    assert "with all vCPU features: 0x1101001121110222; writable: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["arm64-6.12", "x86_64-7.2"])
def test_scope_counts_are_by_feature_set_in_both_forms(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the README's table has them, each number on the screen, too."""
    assert main(["host", "show", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scopes"]
    assert main(["host", "show", name]) == 0
    text = capsys.readouterr().out
    cells = [(f"{row['vm']} VM-scoped, {row['vcpu']} vCPU-scoped, {row['fixed']} fixed", row["writes_each_on_each"],
              row["writes_after_pause"]) for row in found]
    assert [row["features"] for row in found] == (["PSCI_0_2", "all"] if "arm64" in name else ["MSRs"])
    for counts, each, late in cells:
        assert f"{counts}, by experiment; 64 vCPUs: {each} writes, each register on each; {late} after the" in text


def test_a_frequency_that_each_boot_measures_anew_is_no_difference(capsys: pytest.CaptureFixture[str],
                                                                   tmp_path: Path) -> None:
    """A count in a line, not a row; another CPU's frequency is a difference."""
    plain, khz = profiles.load("x86_64-6.12"), x86_64.TSC_KHZ.id
    now = int.from_bytes(plain.defaults[khz], "little")
    for factor, said in ((1.0001, "no difference\nnot compared: KVM_TSC_KHZ: "), (1.2, "KVM_TSC_KHZ")):
        other = dataclasses.replace(plain, defaults={**plain.defaults, khz: int(now * factor).to_bytes(4, "little")})
        path = tmp_path / f"{factor}.json"
        path.write_text(to_json(other))
        assert main(["host", "diff", "x86_64-6.12", str(path)]) == 0
        out = capsys.readouterr().out
        assert said in out and ("not compared" in out) == (factor < 1.01)
        assert main(["host", "diff", "x86_64-6.12", str(path), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["changes"] == [], document["calibrated"] == ["KVM_TSC_KHZ"]) == (factor < 1.01,) * 2


def test_a_default_without_named_bits_is_not_shown_as_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "diff", "arm64-6.1", "arm64-6.12", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["changes"]
    (found,) = [row for row in rows if (row["name"], row["what"]) == ("CCSIDR[0]", "default")]
    assert found["left"].startswith("Associativity=") and found["right"] == "0x2"


def test_a_register_that_takes_whole_values_alone_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """5.10's PSCI_VERSION: another version is taken, and no version is one bit away from 1.0."""
    assert main(["host", "show", "arm64-5.10", "--reg", "PSCI_VERSION"]) == 0
    assert "no bit of its default alone, but other values as a whole" in capsys.readouterr().out


def test_another_architectures_profile_is_named() -> None:
    with pytest.raises(UsageError, match="is of arch arm64, this host is x86_64"):
        profiles.load("x86_64-6.12").measured_by(profiles.load("arm64-6.12"))


def test_capture_has_real_kvm_as_its_default_and_says_so(monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    def none(name: str) -> Any:
        assert name == "kvm"
        raise BackendUnavailable("no /dev/kvm")

    monkeypatch.setattr(backends, "open_backend", none)
    assert main(["host", "capture"]) == 69
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["host", "capture", "--help"])
    assert "kvm (this: no simulator is taken in its place)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("words", "why"), [
    ("ptrauth_address", "needs ptrauth_generic"), ("sve,ptrauth_generic", "needs ptrauth_generic"),
    ("el1_32bit", "such a vCPU is AArch32's")])
def test_vcpu_features_that_the_demo_can_not_have_say_why(words: str, why: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--backend", "sim:arm64-6.12", "--vcpu-features", words]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and "--vcpu-features" in line


def test_a_stream_of_the_other_architecture_is_shown_where_to_go(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    stream = str(tmp_path / "v.mig")
    assert main(["demo", "--backend", "sim:arm64-6.12", "--vcpus", "1", "-o", stream]) == 0
    capsys.readouterr()
    assert main(["replay", stream, "--backend", "sim"]) == 11
    assert "sim:arm64-" in capsys.readouterr().err
    assert main(["replay", stream, "--backend", "sim:arm64-6.12+nosuch"]) == 69
    assert "`migstream host list` names all" in capsys.readouterr().err
