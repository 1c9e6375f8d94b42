"""Filters and zstd: round trips, the words of SPEC.md, and everything that a frame can lie about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migstream import codec, limits
from migstream.errors import Corrupt, LimitExceeded, StreamError, UsageError
from migstream.native import compiled
from tests import build, strategies

RAW = bytes(range(200)) * 2
FRAME = zstandard.ZstdCompressor(level=1).compress(RAW)


@given(strategies.matrices(), strategies.filters, strategies.levels)
def test_round_trip(values: Any, how: int, level: int) -> None:
    raw = codec.filter_bank(values, how)
    number, stored = codec.compress(raw, level)
    back = codec.decompress(number, bytes(stored), len(raw))
    assert (codec.unfilter_bank(back, how, *values.shape) == values).all()


@given(strategies.matrices(), strategies.filters)
def test_filters_are_as_specified(values: Any, how: int) -> None:
    assert bytes(codec.filter_bank(values, how)) == build.filtered(values.tolist(), how)


@given(strategies.matrices(), strategies.filters, strategies.levels)
def test_same_values_same_bytes(values: Any, how: int, level: int) -> None:
    first = codec.compress(codec.filter_bank(values, how), level)
    again = codec.compress(codec.filter_bank(values.copy(), how), level)
    assert first == again


@given(strategies.matrices(), st.data())
def test_delta_has_one_form(values: Any, data: st.DataObject) -> None:
    """Whatever bit of a delta bank is changed: it is another matrix, or it is refused."""
    raw = bytearray(codec.filter_bank(values, codec.DELTA))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    try:
        other = codec.unfilter_bank(bytes(raw), codec.DELTA, *values.shape)
    except Corrupt:
        return
    assert (other != values).any()
    assert bytes(codec.filter_bank(other, codec.DELTA)) == raw


@given(st.binary(max_size=300), strategies.filters, st.integers(1, 5), st.integers(1, 70))
def test_any_bytes_unfilter_or_are_refused(raw: bytes, how: int, rows: int, words: int) -> None:
    try:
        values = codec.unfilter_bank(raw, how, rows, words)
    except Corrupt:
        return
    assert values.shape == (rows, words)
    assert bytes(codec.filter_bank(values, how)) == raw


@pytest.mark.parametrize("how", (codec.NONE, codec.MAJOR, codec.DELTA))
def test_a_kernel_can_be_pointed_into_the_matrix(how: int) -> None:
    raw = bytes(codec.filter_bank(build.matrix([[1, 2], [3, 4]]), how))
    values = codec.unfilter_bank(raw, how, 2, 2)
    assert values.flags.c_contiguous and values.flags.writeable and values.dtype == np.uint64
    values[:] = 9
    assert (codec.unfilter_bank(raw, how, 2, 2) == [[1, 2], [3, 4]]).all()


@pytest.mark.parametrize("level", codec.LEVELS)
def test_every_level(level: int) -> None:
    number, stored = codec.compress(RAW * 10, codec.check_level(level))
    assert number == (codec.ZSTD if level else codec.STORE)
    assert codec.decompress(number, bytes(stored), len(RAW) * 10) == RAW * 10


@pytest.mark.parametrize("level", (-8, 20, 2**31, -(2**31)))
def test_levels_that_are_none(level: int) -> None:
    with pytest.raises(UsageError):
        codec.check_level(level)


def test_what_is_tiny_is_stored() -> None:
    assert [codec.compress(bytes(size), 1)[0] for size in (0, codec.WORTH - 1, codec.WORTH)] == [
        codec.STORE, codec.STORE, codec.ZSTD]


def test_what_does_not_shrink_is_stored() -> None:
    assert codec.compress(b"", 1) == (codec.STORE, b"")
    assert codec.compress(b"\x01\x02\x03", 19) == (codec.STORE, b"\x01\x02\x03")


@pytest.mark.parametrize("how", (-1, 3, 255))
def test_a_filter_that_is_none(how: int) -> None:
    with pytest.raises(UsageError):
        codec.filter_bank(build.matrix([[1]]), how)


@pytest.mark.parametrize("shape", ((0, 3), (3, 0)))
def test_an_empty_matrix(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError):
        codec.filter_bank(np.zeros(shape, np.uint64), codec.DELTA)


def test_the_greatest_section() -> None:
    raw = bytes(limits.MAX_RAW)
    number, stored = codec.compress(raw, 1)
    assert codec.decompress(number, bytes(stored), limits.MAX_RAW) == raw


LIES: dict[str, tuple[int, bytes, int, type[StreamError]]] = {
    "one above the limit": (codec.ZSTD, FRAME, limits.MAX_RAW + 1, LimitExceeded),
    "one above the limit, stored": (codec.STORE, RAW, limits.MAX_RAW + 1, LimitExceeded),
    "1 TiB": (codec.ZSTD, build.zstd_frame(build.zstd_blocks(RAW), 1 << 40), 1 << 40, LimitExceeded),
    "frame says 1 TiB": (codec.ZSTD, build.zstd_frame(build.zstd_blocks(RAW), 1 << 40), len(RAW), Corrupt),
    "frame says less than it holds": (codec.ZSTD, build.zstd_frame(build.zstd_blocks(RAW), 10), 10, Corrupt),
    "frame says more than it holds": (codec.ZSTD, build.zstd_frame(build.zstd_blocks(RAW), 999), 999, Corrupt),
    "frame says nothing": (codec.ZSTD, build.zstd_frame(build.zstd_blocks(RAW), None), len(RAW), Corrupt),
    "header says less": (codec.ZSTD, FRAME, len(RAW) - 1, Corrupt),
    "header says more": (codec.ZSTD, FRAME, len(RAW) + 1, Corrupt),
    "two frames": (codec.ZSTD, FRAME + FRAME, len(RAW), Corrupt),
    "a byte after the frame": (codec.ZSTD, FRAME + b"\0", len(RAW), Corrupt),
    "no byte": (codec.ZSTD, b"", 0, Corrupt),
    "stored, other length": (codec.STORE, RAW, len(RAW) + 1, Corrupt),
}


@pytest.mark.parametrize("case", LIES)
def test_lengths_that_lie(case: str) -> None:
    number, stored, raw_length, error = LIES[case]
    with pytest.raises(error):
        codec.decompress(number, stored, raw_length)


@pytest.mark.parametrize("length", range(len(FRAME)))
def test_a_frame_cut_short(length: int) -> None:
    with pytest.raises(Corrupt):
        codec.decompress(codec.ZSTD, FRAME[:length], len(RAW))


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_any_bytes_decompress_or_are_refused(stored: bytes, raw_length: int) -> None:
    try:
        assert len(codec.decompress(codec.ZSTD, build.ZSTD_MAGIC + stored, raw_length)) == raw_length
    except Corrupt as error:
        assert error.exit_status == 1


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here")
@given(strategies.matrices(), st.data())
def test_the_compiled_filter_and_python_agree(values: Any, data: st.DataObject) -> None:
    """The same bytes; and of bytes with a bit changed, the same matrix, or refused by both."""
    raw = bytearray(codec.filter_bank(values, codec.DELTA))
    assert bytes(raw) == codec._delta(values)
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    out = np.empty_like(values)
    taken = compiled is not None and compiled.undelta(bytes(raw), *values.shape, out)
    try:
        in_python = codec._undelta(bytes(raw), *values.shape)
    except Corrupt:
        assert not taken
    else:
        assert taken
        assert (out == in_python).all()
