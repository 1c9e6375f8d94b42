"""The vectors of formats/, read from the files alone: good ones give their JSON and bytes again, bad ones an error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from migstream import codec, errors, sections
from migstream.errors import EXIT_STATUS, StreamError
from migstream.frames import FrameWriter, Section
from migstream.reader import StreamReader
from migstream.sections import EncodedBank, End, Item, RamPages, Skipped
from migstream.transport.streams import verify
from migstream.wire import stream as wire
from tests import build
from tests.bless import content
from tests.bless.files import FORMATS
from tests.build import guarded

GOOD = sorted((FORMATS / "vectors").glob("*.hex"))
BAD = sorted((FORMATS / "vectors" / "bad").glob("*.hex"))


def _name(path: Path) -> str:
    return path.stem


def load(path: Path) -> tuple[bytes, Any]:
    """Bytes of a vector and what is expected of it."""
    return build.read_hex(path), json.loads(path.with_suffix(".json").read_text("utf-8"))


def failure(data: bytes, sizes: list[int]) -> StreamError:
    """The error that a stream gives, fed in these sizes."""
    with pytest.raises(StreamError) as caught:
        build.decode(data, sizes)
    return caught.value


def place(error: StreamError) -> tuple[Any, ...]:
    """What a vector says of an error."""
    return type(error).__name__, error.exit_status, error.offset, error.section, error.field


@pytest.mark.parametrize("path", GOOD, ids=_name)
def test_good_content(path: Path) -> None:
    data, expected = load(path)
    with guarded():
        found = content.content(data)
    # through JSON, which has no tuples
    assert json.loads(content.text(found)) == {k: v for k, v in expected.items() if k not in ("what", "made_by_zstd")}


@pytest.mark.parametrize("path", GOOD, ids=_name)
@pytest.mark.parametrize("size", (1, 7))
def test_good_in_pieces(path: Path, size: int) -> None:
    data, _ = load(path)
    whole, pieces = build.decode(data), build.decode(data, [size] * (len(data) // size))
    assert [s for s, _ in pieces.items] == [s for s, _ in whole.items]
    assert build.equal(pieces.saved(), whole.saved())


@pytest.mark.parametrize("path", GOOD, ids=_name)
def test_good_sections_written_again(path: Path) -> None:
    """From what was decoded, not from what was stored: the writer makes the same sections, so the same stream."""
    data, _ = load(path)
    read = build.decode(data)
    preamble = read.reader.preamble
    assert preamble is not None
    writer = FrameWriter(preamble.arch, min(preamble.minor, wire.MINOR))
    out: list[bytes | memoryview] = [writer.begin()]
    for section, item in read.items[:-1]:
        out += writer.send(again(section, item, read.reader))
    again_whole = b"".join([*out, *writer.end()])
    assert again_whole == data if preamble.minor <= wire.MINOR else len(again_whole) == len(data)


def again(section: Section, item: Item, reader: StreamReader) -> Section:
    """The section as the writer makes it, with the codec's bytes kept: what zstd makes depends on its version."""
    made = _encode(section, item)
    if section.codec:
        raw = codec.decompress(section.codec, bytes(section.stored), section.raw_length)
        assert raw == bytes(made.stored)
        made = made._replace(codec=section.codec, stored=section.stored, raw_length=len(raw))
    assert made._replace(offset=section.offset, number=section.number, stored=section.stored) == section
    assert bytes(made.stored) == bytes(section.stored)
    return made


def _encode(section: Section, item: Item) -> Section:
    if isinstance(item, Skipped):
        return section._replace(offset=0, number=0)
    if isinstance(item, EncodedBank):
        return sections.encode_bank(item.decode(), section.layout, 0, section.filter)
    if isinstance(item, RamPages):
        return sections.encode_ram(list(item.runs), 0)
    assert not isinstance(item, End)
    return sections.encode(item)


@pytest.mark.parametrize("path", BAD, ids=_name)
def test_bad_error(path: Path) -> None:
    data, expected = load(path)
    with guarded():
        error = failure(data, [])
    assert place(error) == tuple(expected[key] for key in ("error", "exit_status", "offset", "section", "field"))
    assert EXIT_STATUS[error.exit_status] == expected["meaning"]
    assert issubclass(getattr(errors, expected["error"]), StreamError)


@pytest.mark.parametrize("path", BAD, ids=_name)
def test_bad_error_is_one_line_that_a_terminal_can_show(path: Path) -> None:
    line = str(failure(load(path)[0], []))
    assert line.isprintable() and line.startswith("offset ") and len(line) < 400


@pytest.mark.parametrize("path", BAD, ids=_name)
def test_bad_in_pieces(path: Path) -> None:
    data, _ = load(path)
    whole = place(failure(data, []))
    for size in (1, 48):
        assert place(failure(data, [size] * (len(data) // size))) == whole


@pytest.mark.parametrize("path", BAD, ids=_name)
def test_bad_is_not_verified(path: Path) -> None:
    data, expected = load(path)
    with guarded(), pytest.raises(StreamError) as caught:
        verify(io.BytesIO(data), StreamReader())
    assert (caught.value.exit_status, caught.value.offset) == (expected["exit_status"], expected["offset"])


@pytest.mark.parametrize("path", GOOD, ids=_name)
def test_good_is_verified(path: Path) -> None:
    data, expected = load(path)
    with guarded():
        assert verify(io.BytesIO(data), StreamReader()) == expected["length"]
