"""`migstream host show` and `host diff` on recorded profiles and on bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from migstream.cli import main


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
    assert main(["host", "show", str(tmp_path / "bad.json")]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("words", [["show", "nowhere"], ["diff", "arm64-6.1", "x86_64-6.1"],
                                   ["show", "arm64-6.1", "--reg", "nothing*"]])
def test_misuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", *words]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1
