"""Bounds of a matrix: the compiled part, Python, and the words themselves agree."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import bounds
from migstream.native import compiled

words = st.integers(0, 2**64 - 1) | st.integers(0, 3)


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int, int, int, int]]]:
    """A matrix, and a few bounds: word, shift, mask, least, most."""
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(words, min_size=width, max_size=width), min_size=1, max_size=4))
    one = st.tuples(st.integers(0, width - 1), st.integers(0, 63), words, words, words)
    return rows, draw(st.lists(one, max_size=3))


@given(questions())
def test_both_paths_say_what_the_words_say(asked: tuple[list[list[int]], list[tuple[int, int, int, int, int]]]) -> None:
    rows, found = asked
    values = np.array(rows, np.uint64)
    packed = b"".join(bounds.bound(word, least, most, shift=shift, mask=mask)
                      for word, shift, mask, least, most in found)
    expected = all(((row[word] >> shift & mask) - least) % 2**64 <= (most - least) % 2**64
                   for word, shift, mask, least, most in found for row in rows)
    assert bounds.within(values, packed) == expected
    with mock.patch.object(bounds, "compiled", None):
        assert bounds.within(values, packed) == expected


def test_without_a_greatest_value_it_must_be_the_least() -> None:
    values = np.array([[5], [5]], np.uint64)
    assert bounds.within(values, bounds.bound(0, 5))
    assert not bounds.within(values, bounds.bound(0, 4))
    values[1] = 6
    assert not bounds.within(values, bounds.bound(0, 5))


@pytest.mark.parametrize(("value", "good"), [
    (0, True), (2**47 - 1, True), (2**47, False), (2**63, False), (2**64 - 2**47 - 1, False), (2**64 - 2**47, True),
    (2**64 - 1, True)])
def test_canonical_addresses_are_one_question(value: int, good: bool) -> None:
    values = np.array([[value]], np.uint64)
    asked = bounds.bound(0, 2**64 - 2**47, 2**47 - 1)
    assert bounds.within(values, asked) == good
    with mock.patch.object(bounds, "compiled", None):
        assert bounds.within(values, asked) == good


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here")
@pytest.mark.parametrize("packed", [bounds.bound(2, 0), bounds.bound(0, 0, shift=64)], ids=["word", "shift"])
def test_bounds_outside_the_matrix_are_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        bounds.within(np.zeros((1, 2), np.uint64), packed)
