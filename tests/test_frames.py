"""Bytes <-> sections: however the bytes come, what is held, and that nothing lives on after an error."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded, StreamError, Truncated, UsageError
from migstream.frames import MAX_FEED, FrameReader, FrameWriter, Section
from migstream.model import Arch
from migstream.wire import stream as wire
from tests import build
from tests.bless import good
from tests.strategies import chunk_sizes

STREAM = good.VECTORS["everything-1"].data


def sections(data: bytes, sizes: Iterable[int]) -> list[Section]:
    """All sections, the bytes fed in these sizes, then the rest."""
    reader, out, position = FrameReader(), [], 0
    for size in (*sizes, len(data)):
        reader.feed(data[position:position + size])
        position += size
        while section := reader.next_section():
            out.append(section)
    reader.end_of_input()
    return out


WHOLE = sections(STREAM, ())


def test_sizes_of_the_fixed_parts() -> None:
    assert (wire.PREAMBLE_SIZE, wire.HEADER_SIZE, wire.END.sizeof()) == (32, 48, 16)


def test_whole() -> None:
    assert [s.offset for s in WHOLE] == build.offsets(STREAM)
    assert [s.number for s in WHOLE] == list(range(len(WHOLE)))
    assert {s.kind for s in WHOLE} == set(wire.KINDS)


def test_byte_by_byte() -> None:
    assert sections(STREAM, [1] * len(STREAM)) == WHOLE


@given(chunk_sizes)
def test_any_chunks(sizes: list[int]) -> None:
    assert sections(STREAM, sizes) == WHOLE


def test_wanted_is_never_too_much() -> None:
    """A reader of a pipe asks for `wanted` bytes and never takes one that belongs to what follows."""
    reader, position = FrameReader(), 0
    while wanted := reader.wanted:
        reader.feed(STREAM[position:position + wanted])
        position += wanted
        while reader.next_section():
            pass
    assert (position, reader.offset, reader.ended) == (len(STREAM), len(STREAM), True)


@given(st.binary(min_size=1, max_size=100), st.booleans())
def test_with_a_tail(tail: bytes, at_once: bool) -> None:
    reader = FrameReader()
    reader.feed(STREAM + tail if at_once else STREAM)
    assert [reader.next_section() for _ in WHOLE] == WHOLE
    if not at_once:
        assert reader.next_section() is None
        reader.feed(tail)
    with pytest.raises(Corrupt) as caught:
        reader.next_section()
    assert (caught.value.offset, caught.value.section) == (len(STREAM), "end")


@pytest.mark.parametrize("call", ("feed", "next_section", "end_of_input"))
def test_dead_after_an_error(call: str) -> None:
    reader = FrameReader()
    reader.feed(b"not a stream")
    with pytest.raises(Corrupt) as first:
        reader.next_section()
    arguments = [STREAM] if call == "feed" else []
    with pytest.raises(Corrupt) as again:
        getattr(reader, call)(*arguments)
    assert again.value is first.value


def test_killed_from_above() -> None:
    reader, error = FrameReader(), Corrupt("wrong", offset=5)
    reader.kill(error)
    with pytest.raises(Corrupt) as caught:
        reader.feed(b"")
    assert caught.value is error


def test_too_much_at_once() -> None:
    reader = FrameReader()
    with pytest.raises(UsageError):
        reader.feed(bytes(MAX_FEED + 1))
    with pytest.raises(UsageError):
        reader.feed(memoryview(array.array("Q", bytes(8 + MAX_FEED))))
    reader.feed(STREAM)
    assert reader.next_section() == WHOLE[0]


def test_a_caller_that_never_takes_sections() -> None:
    reader, fed = FrameReader(), 0
    with pytest.raises(UsageError):
        for _ in range(100):
            reader.feed(bytes(MAX_FEED))
            fed += MAX_FEED
    assert fed <= limits.MAX_STORED + 2 * MAX_FEED


@pytest.mark.parametrize(("length", "error"), (
    (limits.MAX_STORED, None), (limits.MAX_STORED + 1, LimitExceeded), (2**31, LimitExceeded),
    (2**32 - 1, LimitExceeded), (2**63, LimitExceeded), (2**64 - 1, LimitExceeded)))
def test_stored_length_at_its_limit(length: int, error: type[StreamError] | None) -> None:
    reader = FrameReader()
    reader.feed(build.preamble() + build.Part(b"OPAQ", stored_length=length, raw_length=1, codec=1).header())
    if error is None:
        assert reader.next_section() is None
        assert reader.wanted == length + -length % 8
    else:
        with pytest.raises(error):
            reader.next_section()


@pytest.mark.parametrize("major", (2, 3, 0xFFFF))
def test_too_new_from_the_preamble_alone(major: int) -> None:
    reader = FrameReader()
    reader.feed(build.preamble(major=major))
    with pytest.raises(StreamError) as caught:
        reader.next_section()
    assert caught.value.exit_status == 3
    assert reader.preamble is None


def test_the_two_writers_agree() -> None:
    writer = FrameWriter(Arch.X86_64)
    out: list[bytes | memoryview] = [writer.begin()]
    for section in WHOLE[:-1]:
        out += writer.send(section)
    assert b"".join([*out, *writer.end()]) == STREAM
    assert writer.offset == len(STREAM)


@pytest.mark.parametrize("call", (lambda w: w.send(WHOLE[0]), lambda w: w.end()))
def test_nothing_follows_the_end(call: Callable[[FrameWriter], object]) -> None:
    writer = FrameWriter(Arch.X86_64)
    writer.begin()
    writer.end()
    length = writer.offset
    with pytest.raises(UsageError, match="after the end section"):
        call(writer)
    assert writer.offset == length


def test_a_payload_is_not_copied() -> None:
    payload = memoryview(bytes(5))
    assert FrameWriter(Arch.X86_64).send(Section("OPAQ", payload, 5))[1] is payload


@pytest.mark.parametrize("length", range(9))
def test_payloads_are_padded_to_eight(length: int) -> None:
    part = build.Part(b"ZZZZ", bytes(range(length)), flags=0)
    assert len(part.bytes()) % 8 == 0
    assert bytes(sections(build.stream(part), ())[0].stored) == bytes(range(length))


def test_sections_that_changed_places_are_noticed() -> None:
    """Two sections of equal length swapped, each header and payload right: only the end's checksum can tell."""
    one, two = build.opaq("a"), build.opaq("b")
    data = build.stream(build.mach(), one, two)
    swapped = data.replace(one.bytes() + two.bytes(), two.bytes() + one.bytes())
    with pytest.raises(Corrupt) as caught:
        sections(swapped, ())
    assert caught.value.field == "headers_crc"


@pytest.mark.parametrize(("length", "section"), ((0, "preamble"), (31, "preamble"), (32, "section header"),
                                                 (79, "section header"), (80, "MACH")))
def test_end_of_input_names_what_is_missing(length: int, section: str) -> None:
    reader = FrameReader()
    reader.feed(STREAM[:length])
    assert reader.next_section() is None
    with pytest.raises(Truncated) as caught:
        reader.end_of_input()
    assert (caught.value.offset, caught.value.section) == (length, section)
