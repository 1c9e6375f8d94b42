"""Damaged host profiles: each is one line that names the field, with the status that says whose fault it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from migstream import limits
from migstream.cli import main
from migstream.errors import MigstreamError, ProfileError
from migstream.host import profile_rules, profiles
from migstream.host.profile import HostProfile, from_json, to_json

ARM, X86 = "arm64-7.2", "x86_64-6.12"
PSCI, ACTLR = "0x6030000000140000", "0x603000000013c081"
TSC = "0x2030000200000010"
PLAIN = {name: json.loads(to_json(profiles.load(name))) for name in (ARM, X86)}
MANY = {f"0x6030000001{k:06x}": "00" * 8 for k in range(limits.MAX_PROFILE_ROWS + 1)}

# (profile, field, what it becomes, or an entry more; status; words of the message)
DAMAGED: tuple[tuple[str, str, Any, int, str], ...] = (
    # ids
    (ARM, "registers", ["-0x1"], 1, "is no number of 64 bits"), (ARM, "registers", ["0x" + "f" * 40], 1, "64 bits"),
    (ARM, "registers", ["0x_1"], 1, "64 bits"), (ARM, "registers", ["  0x1 "], 1, "64 bits"),
    (ARM, "registers", ["0x\uff11"], 1, "64 bits"), (ARM, "registers", ["0X1F"], 1, "64 bits"),
    (ARM, "registers", ["0x01"], 1, "64 bits"), (ARM, "registers", [1], 1, "64 bits"),
    (ARM, "registers", [PSCI, PSCI], 1, "ascending"), (ARM, "registers", "0x1", 1, "no list"),
    (ARM, "registers", [TSC], 1, "is no register of arm64"), (ARM, "registers", ["0x1"], 1, "no register of arm64"),
    (ARM, "defaults", {"-0x1": "00"}, 1, "64 bits"), (ARM, "scopes", {TSC: "vm"}, 1, "is no register of arm64"),
    (X86, "scopes", {PSCI: "vm"}, 1, "is no register of x86_64"),
    # values
    (ARM, "defaults", {PSCI: "00"}, 1, "1 bytes; PSCI_VERSION has 8"), (ARM, "defaults", {PSCI: "0"}, 1, "pairs of"),
    (ARM, "defaults", {PSCI: "00 00"}, 1, "pairs of"), (ARM, "defaults", None, 1, "is no object"),
    (ARM, "register_bits", {PSCI: ["00"]}, 1, "is no pair"), (ARM, "register_bits", {PSCI: []}, 1, "is no pair"),
    (ARM, "register_bits", {PSCI: ["00" * 8, "00" * 4]}, 1, "has 8"), (ARM, "attributes", {ACTLR: "00"}, 1, "has 8"),
    (ARM, "capabilities", {"MAX_VCPUS": -5}, 1, "is not from 0"), (ARM, "capabilities", {"A": True}, 1, "whole number"),
    (ARM, "capabilities", {"A": 1 << 40}, 1, "is not from 0"), (ARM, "capabilities", [], 1, "is no object"),
    (ARM, "vcpu_features", -1, 1, "is not from 0"), (ARM, "vcpu_features", 2.0, 1, "whole number"),
    (ARM, "after_run", {PSCI: [0, -22]}, 1, "is not from 0"), (ARM, "after_run", {PSCI: [0]}, 1, "is no pair"),
    (ARM, "scopes", {PSCI: "world"}, 1, "no scope 'world'"), (ARM, "scopes", {PSCI: ["vm"]}, 1, "no scope"),
    (ARM, "firmware", {"0x1": 5}, 1, "64 bits"), (ARM, "devices", ["\x1b[2J"], 1, "control character"),
    (ARM, "cpu", "\ud800", 1, "control character"), (ARM, "arch", "riscv", 1, "no architecture"),
    (ARM, "arch", [], 1, "no architecture"), (ARM, "arch", "x86_64", 1, "has no such thing"),
    (X86, "arch", "arm64", 1, "has no such thing"), (X86, "registers", [PSCI], 1, "x86_64 has no such thing"),
    (X86, "feature_msrs", {"0x10a": 1 << 80}, 1, "64 bits"), (X86, "feature_msrs", {"0x1000000000": 1}, 1, "not from"),
    (X86, "msrs", [-1], 1, "is not from 0"), (X86, "msrs", [1 << 32], 1, "is not from 0"),
    (X86, "sizes", {TSC: 10**15}, 1, "is not from 0"), (X86, "sizes", {TSC: -4096}, 1, "is not from 0"),
    (X86, "cpuid", "ff" * 100, 1, "no struct kvm_cpuid2"), (X86, "cpuid", "00" * 8, 1, "no struct kvm_cpuid2"),
    (X86, "cpuid", "zz", 1, "pairs of hexadecimal"), (X86, "cpuid", "", 1, "is empty"),
    (X86, "enable_caps", {"0x1": 1 << 64}, 1, "is not from"), (X86, "behaviour", {"smm": -1}, 1, "is not from"),
    # versions
    (ARM, "migstream_host_profile", 2.0, 1, "version 2.0"), (ARM, "migstream_host_profile", "2", 1, "version '2'"),
    (ARM, "migstream_host_profile", True, 1, "version True"), (ARM, "migstream_host_profile", -1, 1, "version -1"),
    (ARM, "migstream_host_profile", 1, 1, "capture it again"), (ARM, "migstream_host_profile", 99, 3, "version 99"),
    # limits
    (ARM, "defaults", MANY, 4, "8193 entries; 8192 are the most"), (ARM, "cpu", "x" * 5000, 4, "4096 are the most"),
    (ARM, "registers", list(MANY), 4, "8192 are the most"), (X86, "cpuid", "00" * 70000, 4, "65536 are the most"),
    (ARM, "made_by", "x" * limits.MAX_PROFILE, 4, f"over {limits.MAX_PROFILE} bytes"),
)


@pytest.mark.parametrize(("name", "field", "value", "status", "words"), DAMAGED,
                         ids=[f"{row[1]}-{k}" for k, row in enumerate(DAMAGED)])
def test_what_is_damaged_is_named(name: str, field: str, value: Any, status: int, words: str, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**PLAIN[name], field: value}))
    assert main(["host", "show", str(path), "--reg", "*"]) == status
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert words in line and line.startswith(f"migstream: {path}: not a host profile: ") and said.out == ""
    whole_file = "64 bits are the most" in line or "over" in words
    assert whole_file or f"field '{field}'" in line or (field == "arch" and "field '" in line)


# (what stands in the file, status, words)
TEXTS = (
    ("", 1, "not JSON"), ("{", 1, "not JSON"), ("[]", 1, "no object with a field"),
    ("[" * 100_000, 1, "nested too deep"), ('{"migstream_contract": 1}', 64, "is a contract"),
    ('{"a": 1, "a": 2}', 1, "'a' is there twice"), ('{"migstream_host_profile": NaN}', 1, "NaN"),
    ('{"migstream_host_profile": ' + "9" * 5000 + "}", 1, "64 bits"),
    ("\ufeff{}", 1, "not JSON"), ('{"migstream_host_profile": 2, "\\u001b": 1}', 1, "unknown field '\\x1b'"),
)


@pytest.mark.parametrize(("edit", "words"), [
    (('"vcpu_features": 4,', '"vcpu_features": NaN,'), "field 'vcpu_features': NaN is no number"),
    (('"MAX_VCPUS": ', '"MAX_VCPUS": -Infinity, "A": '), "field 'capabilities': MAX_VCPUS: -Infinity is no number"),
    (('"MAX_VCPUS": ', f'"MAX_VCPUS": {"9" * 30}, "A": '), "field 'capabilities': MAX_VCPUS: a number of 30 digits"),
    (('"MAX_VCPUS": ', '"MAX_VCPUS": 1, "MAX_VCPUS": '), "field 'capabilities': 'MAX_VCPUS' is there twice"),
    (('"after_run": {', '"after_run": {"0x1": [0, Infinity], '), "field 'after_run': 0x1: 1: Infinity is no"),
    (('"arch": ', '"arch": "arm64", "arch": '), "'arch' is there twice"),
])
def test_what_is_no_value_is_named_with_its_field(edit: tuple[str, str], words: str) -> None:
    text = json.dumps({**PLAIN[ARM], "vcpu_features": 4})
    assert edit[0] in text
    with pytest.raises(ProfileError) as caught:
        from_json(text.replace(*edit, 1), "p.json")
    assert words in str(caught.value)


def test_a_profile_that_contradicts_itself_is_corrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By any command that reads it; where one of two fields must be wrong, both are named."""
    path = tmp_path / "p.json"
    for name, field, value in ((ARM, "feature_defaults", {}), (X86, "capabilities", {"MAX_VCPUS": 0})):
        path.write_text(json.dumps({**PLAIN[name], field: value}))
        for command in (["host", "show", str(path)], ["host", "diff", str(path), str(path)]):
            assert main(command) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert f"'{field}'" in line


@pytest.mark.parametrize(("text", "status", "words"), TEXTS)
def test_what_is_no_profile_says_so(text: str, status: int, words: str, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    assert main(["host", "show", str(path)]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and len(line) < 300 and "object has no attribute" not in line


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_bytes(b"{\xff\xfe")
    assert main(["host", "show", str(tmp_path / "p.json")]) == 1
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "status", "words"), [
    ("./none.json", 74, "No such file"), ("none.json", 74, "No such file"), (".", 74, "Is a directory"),
    ("nowhere", 64, "no host profile 'nowhere'; there are "), ("a\0b.json", 74, "null"),
])
def test_what_can_not_be_read_says_why(name: str, status: int, words: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["host", "show", name]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize("name", [ARM, X86])
def test_each_field_that_is_missing_is_named(name: str) -> None:
    """All of its architecture: none is taken for an empty one."""
    host = profiles.load(name)
    wanted = {field for field, archs in profile_rules.FIELDS.items() if host.arch in archs}
    for field in wanted:
        rest = {key: value for key, value in PLAIN[name].items() if key != field}
        with pytest.raises(ProfileError, match=f"field '{field}': is missing; capture"):
            from_json(json.dumps(rest), "p.json")
    of_this = {key: value for key, value in PLAIN[name].items() if key in wanted or key in
               ("migstream_host_profile", "arch", "kernel", "cpu", "backend")}
    assert from_json(json.dumps(of_this)) == host


@pytest.mark.parametrize(("name", "field"), [(profiles_name, field) for profiles_name in (ARM, X86)
                                             for field in profile_rules.FILLED[profiles.load(profiles_name).arch]])
def test_what_verdicts_rest_on_is_not_empty(name: str, field: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**PLAIN[name], field: type(PLAIN[name][field])()}))
    assert main(["check", "--matrix", name, str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"field '{field}': is empty: it says " in line


def test_every_field_has_its_architectures() -> None:
    """A field that no capture needs to have stands here with the reason."""
    named = profile_rules.FIELDS.keys() | {"arch", "kernel", "cpu", "backend"}
    assert HostProfile.__dataclass_fields__.keys() - named == {"scope_flags"}  # came with a proposal; none where absent


@pytest.mark.parametrize("name", profiles.names())
def test_a_recorded_profile_goes_through(name: str) -> None:
    assert from_json(to_json(profiles.load(name)), name) == profiles.load(name)


def test_the_largest_profile_is_compared_at_once() -> None:
    """At the limit of entries, a diff is made; above it nothing is read."""
    full = {**PLAIN[ARM], "defaults": dict(list(MANY.items())[:limits.MAX_PROFILE_ROWS])}
    profile = from_json(json.dumps(full))
    assert len(profile.defaults) == limits.MAX_PROFILE_ROWS
    with pytest.raises(MigstreamError):
        from_json(json.dumps({**full, "defaults": MANY}))
