"""Questions to the words of a matrix, all rows at once: is (word >> shift & mask) from a least to a greatest value?"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from migstream.native import compiled

if TYPE_CHECKING:
    from migstream.model import Words

_BOUND = struct.Struct("<5Q")
_ALL = 2**64 - 1


def bound(word: int, least: int, most: int | None = None, *, shift: int = 0, mask: int = _ALL) -> bytes:
    """One question to column `word`; without `most` the value must be `least`. Several are put one after the other.

    A `most` below `least` goes round the end of the numbers: from `least` up, or up to `most`, as canonical addresses.
    """
    return _BOUND.pack(word, shift, mask, least, least if most is None else most)


def within(values: Words, bounds: bytes) -> bool:
    """Whether every row of a matrix (C-contiguous, 64-bit words) is within all bounds."""
    if compiled is not None:
        return bool(compiled.bounded(values, *values.shape, bounds))
    return all(_within(values, *one) for one in _BOUND.iter_unpack(bounds))


def _within(values: Words, word: int, shift: int, mask: int, least: int, most: int) -> bool:
    import numpy as np

    found = values[:, word] >> np.uint64(shift) & np.uint64(mask)
    return not (found - np.uint64(least) > np.uint64((most - least) & _ALL)).any()
