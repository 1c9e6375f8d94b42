"""Locks: formats/ and the code say the same, and what was released only grows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from migstream import codec, frames, limits
from migstream.errors import EXIT_STATUS
from migstream.host import profile
from migstream.model import Klass, Phase
from migstream.reader import _RANKS
from migstream.registers import ids, x86_64
from migstream.wire import stream as wire
from migstream.wire import x86_64 as structs
from tests import build
from tests.bless import catalogue, files, good, layouts
from tests.bless.files import BAD, FORMATS

MADE = files.made()
SPEC = (FORMATS / "SPEC.md").read_text("utf-8")
NUMBERS = {name: value for name, value in vars(limits).items() if name.isupper()}


def _made_elsewhere(path: str) -> bool:
    """True for a vector in which another zstd version than ours made part."""
    expected = (FORMATS / path).with_suffix(".json")
    if not path.startswith("vectors/") or not expected.exists():
        return False
    made_by = json.loads(expected.read_text("utf-8")).get("made_by_zstd", files.ZSTD)
    return bool(made_by != files.ZSTD)


@pytest.mark.parametrize("path", MADE)
def test_file_is_what_the_code_makes(path: str) -> None:
    if _made_elsewhere(path):
        pytest.skip(f"zstd {files.ZSTD} may make other bytes; test_vectors reads the ones that are there")
    assert (FORMATS / path).read_text("utf-8") == MADE[path], "python -m tests.bless"


def test_nothing_else_is_there() -> None:
    there = {str(path.relative_to(FORMATS)) for path in FORMATS.rglob("*") if path.is_file()}
    assert there == MADE.keys() | {"SPEC.md"}


def test_files_hold_no_python() -> None:
    assert not list(FORMATS.rglob("*.py"))


@pytest.mark.parametrize("path", [path for path in MADE if path.endswith(".hex")])
def test_annotated_hex_comes_back(path: str) -> None:
    name = Path(path).stem
    vectors: dict[str, Any] = BAD if "/bad/" in path else good.VECTORS
    assert build.parse_hex(MADE[path]) == vectors[name].data


@pytest.mark.parametrize("line", ("0010: 00", "zz", "0000: 0", "0000 00", "0000: 00 0g"))
def test_hex_that_is_wrong(line: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        build.parse_hex(line)


# What a released file may become: (path, old, new, may it).
_STRUCT, _OTHER = '{"a": {"size": 1}}', '{"a": {"size": 2}}'
GROWTH = (
    ("vectors/x.hex", "0000: 00\n", "0000: 00\n", True),
    ("vectors/x.hex", "0000: 00\n", "0000: 01\n", False),
    ("vectors/bad/x.json", "{}\n", '{"a": 1}\n', False),
    ("layouts/x.json", _STRUCT, '{"a": {"size": 1}, "b": {"size": 1}}', True),
    ("layouts/x.json", _STRUCT, _OTHER, False),
    ("layouts/x.json", _STRUCT, "{}", False),
    ("registers/x.txt", "a 1\nb 2\n", "a 1\nc 3\nb 2\n", True),
    ("registers/x.txt", "a 1\nb 2\n", "a 1\n", False),
    ("registers/x.txt", "a 1\nb 2\n", "b 2\na 1\n", False),
    ("registers/x.txt", "a 1\nb 2\n", "a 1\nb 3\n", False),
)


@pytest.mark.parametrize(("path", "old", "new", "may"), GROWTH)
def test_released_files_only_grow(path: str, old: str, new: str, may: bool) -> None:
    assert files.may_become(path, old, new) is may


def test_bless_writes_what_is_missing_and_leaves_what_was_released(tmp_path: Path) -> None:
    written, refused = files.write(tmp_path)
    assert (set(written), refused) == (set(MADE), [])
    assert files.write(tmp_path) == ([], [])
    vector = "vectors/minimal.hex"
    (tmp_path / vector).write_text("0000: 00\n")
    assert files.write(tmp_path) == ([], [vector])
    assert (tmp_path / vector).read_text() == "0000: 00\n"
    assert files.write(tmp_path, force=True) == ([vector], [])
    assert (tmp_path / vector).read_text() == MADE[vector]


@pytest.mark.parametrize("name", layouts.STREAM)
def test_fields_of_the_stream_follow_one_another(name: str) -> None:
    schema = layouts.STREAM[name]
    rows = list(layouts.walk(schema))
    ends = [row["offset"] + row["size"] for row in rows]
    assert [row["offset"] for row in rows] == [0, *ends[:-1]]
    assert ends[-1] == schema.sizeof()


@pytest.mark.parametrize("name", [s.name for s in structs.STRUCTS.values() if s.size is not None])
def test_frozen_size_of_each_struct(name: str) -> None:
    frozen = json.loads(MADE["layouts/kvm-x86_64.json"])[name]
    assert frozen["size"] == structs.STRUCTS[name].size
    assert max(f["offset"] + f.get("size", 0) for f in frozen["fields"]) == frozen["size"]


@pytest.mark.parametrize("kind", wire.KINDS.values(), ids=lambda kind: kind.name)
def test_every_kind_has_vectors(kind: wire.Kind) -> None:
    text = [json.loads(MADE[path]) for path in MADE if re.fullmatch(r"vectors/[^/]+\.json", path)]
    assert any(section["kind"] == kind.name for vector in text for section in vector["sections"])
    assert any(kind.name.strip() in bad.section for bad in BAD.values())


# SPEC.md: a section for each, and the numbers in its tables.


def heading(pattern: str) -> bool:
    """The specification has such a heading."""
    return re.search(rf"^#+ .*{pattern}", SPEC, re.MULTILINE) is not None


def in_a_row(*cells: str) -> bool:
    """Some row of a table has all these cells, each as one cell, in this order."""
    rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in SPEC.splitlines() if "|" in line)
    return any(all(cell in rest for cell in cells) for rest in map(iter, rows))


@pytest.mark.parametrize("kind", wire.KINDS.values(), ids=lambda kind: kind.name)
def test_spec_draws_every_kind(kind: wire.Kind) -> None:
    assert heading(f"`{re.escape(kind.name)}`")
    assert in_a_row(f"`{kind.name}`", str(kind.version), "yes" if kind.critical else "no")


@pytest.mark.parametrize("name", NUMBERS)
def test_spec_has_every_limit(name: str) -> None:
    assert in_a_row(f"`{name}`", str(NUMBERS[name]))


@pytest.mark.parametrize("row", [row for row in catalogue.rows() if row.struct != "msr"], ids=lambda row: row.name)
def test_spec_has_every_row_of_the_catalogue(row: Any) -> None:
    size = "host" if row.size is None else str(row.size)
    assert in_a_row(f"`{row.id:#018x}`", f"`{row.name}`", size, str(row.scope), row.phase.name.lower(),
                    str(row.klass))


@pytest.mark.parametrize("name", layouts.STREAM)
def test_spec_has_every_field_at_its_offset(name: str) -> None:
    for row in layouts.walk(layouts.STREAM[name]):
        assert in_a_row(str(row["offset"]), str(row["size"]), f"`{row['name']}`"), row


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.name)
def test_spec_has_every_phase(phase: Phase) -> None:
    assert in_a_row(str(int(phase)), f"`{phase.name.lower()}`", "yes" if phase.prologue else "no")


@pytest.mark.parametrize("klass", Klass)
def test_spec_has_every_class(klass: Klass) -> None:
    assert in_a_row(f"`{klass}`")


@pytest.mark.parametrize("status", EXIT_STATUS)
def test_spec_has_every_exit_status(status: int) -> None:
    assert in_a_row(str(status), EXIT_STATUS[status])


@pytest.mark.parametrize("rank", range(len(_RANKS)))
def test_spec_has_the_order_of_sections(rank: int) -> None:
    assert in_a_row(str(rank), _RANKS[rank])


@pytest.mark.parametrize(("number", "name"), [*wire.CODECS.items(), *wire.FILTERS.items()])
def test_spec_has_every_codec_and_filter(number: int, name: str) -> None:
    assert in_a_row(str(number), name)


@pytest.mark.parametrize("field", profile._READERS)
def test_spec_has_every_field_of_a_host_profile(field: str) -> None:
    assert in_a_row(f"`{field}`")


FACTS = {
    "magic": wire.MAGIC.hex(" "),
    "major and minor": f"major {wire.MAJOR}, minor {wire.MINOR}",
    "alignment": f"multiple of {wire.ALIGN}",
    "default level": f"level {codec.DEFAULT_LEVEL}",
    "levels": f"{codec.LEVELS.start} to {codec.LEVELS.stop - 1}",
    "feed": f"{frames.MAX_FEED} bytes",
    "namespace": f"{ids.OURS:#x}",
    "MSR ids": f"{ids.KVM_REG_X86_MSR:#018x}",
    "KVM-defined ids": f"{ids.KVM_REG_X86_KVM:#018x}",
    "host profile version": f'"migstream_host_profile": {profile.PROFILE_VERSION}',
    "rows": f"{len(x86_64.ROWS)} rows",
}


@pytest.mark.parametrize("fact", FACTS)
def test_spec_states(fact: str) -> None:
    assert FACTS[fact] in SPEC


@pytest.mark.parametrize("title", ("Unknown sections", "Versions", "Errata", "Determinism", "Limits", "Errors",
                                   "Host profile", "How a schema changes", "msgpack"))
def test_spec_has_a_chapter_on(title: str) -> None:
    assert heading(title)
