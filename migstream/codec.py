"""Bank filters and zstd: values <-> stored bytes, within the limits.

A bank is a matrix, vCPU by 64-bit word. Three filters make it small, the codec follows:

- `NONE`: the rows as they are.
- `MAJOR`: register-major, that is word by word over all vCPUs.
- `DELTA`: register-major with difference to the vCPU before. Most words are the same in every vCPU (359 of 400 in
  real x86 state), so the first row is stored once, then a bitmap of the words that differ anywhere, then for these
  alone the differences from vCPU to vCPU, modulo 2^64. Both directions touch the constant words once, which makes
  them cheaper than zstd on the whole matrix. XOR instead of the difference was measured and is worse.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import zstandard

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded, UsageError
from migstream.native import compiled

if TYPE_CHECKING:
    from migstream.model import Words

NONE, MAJOR, DELTA = 0, 1, 2
STORE, ZSTD = 0, 1
DEFAULT_LEVEL = 1
WORTH = 256
"""Bytes below which data are stored: there is nothing to win."""
WORTH_IN_A_PAUSE = 16384
"""The same for what is sent while the guest stands still. The 11 KB of 8 vCPUs cost zstd 85 us there and back, with
caches as they are then, to become 4 KB: a link of 1 Gb/s carries the difference in 60 us."""
LEVELS = range(-7, 20)


def check_level(level: int) -> int:
    """Return `level` if zstd has it (-7 to 19; 0 means no compression). Raises: UsageError."""
    if level not in LEVELS:
        raise UsageError(f"zstd level {level} is not in {LEVELS.start}..{LEVELS.stop - 1} (0 = none)")
    return level


def compress(raw: bytes | memoryview, level: int, worth: int = WORTH) -> tuple[int, bytes | memoryview]:
    """Return (codec number, stored bytes). Level 0 stores; what is below `worth` bytes or doesn't shrink is stored too.
    """
    if level == 0 or len(raw) < worth:
        return STORE, raw
    packed = _compressor(level).compress(raw)
    return (ZSTD, packed) if len(packed) < len(raw) else (STORE, raw)


def decompress(codec: int, stored: bytes, raw_length: int) -> bytes:
    """Return exactly `raw_length` bytes. Raises: Corrupt, LimitExceeded; nothing is allocated before the check.

    zstandard trusts the size that a frame states over any limit given to it, so the frame must state one and it
    must be the section header's, which is capped.
    """
    if raw_length > limits.MAX_RAW:
        raise LimitExceeded("section too long", field="raw_length", expected=f"<= {limits.MAX_RAW}", found=raw_length)
    if codec == STORE:
        if len(stored) != raw_length:
            raise Corrupt("stored and raw length differ without a codec", field="raw_length",
                          expected=len(stored), found=raw_length)
        return stored
    return _unzstd(stored, raw_length)


def _unzstd(stored: bytes, raw_length: int) -> bytes:
    try:
        stated = zstandard.get_frame_parameters(stored).content_size
        if stated != raw_length:
            raise Corrupt("zstd frame and header differ", field="raw_length", expected=stated, found=raw_length)
        return _decompressor().decompress(stored, allow_extra_data=False) if raw_length else b""
    except zstandard.ZstdError as error:
        raise Corrupt(f"zstd: {error}", field="payload") from error


_own = threading.local()
"""A thread's contexts: making one takes longer than a small bank, and none may be used by two threads at a time."""


def _compressor(level: int) -> zstandard.ZstdCompressor:
    made: dict[int, zstandard.ZstdCompressor] = _own.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return made[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_own, "decompressor"):
        _own.decompressor = zstandard.ZstdDecompressor()
    made: zstandard.ZstdDecompressor = _own.decompressor
    return made


def filter_bank(values: Words, how: int) -> bytes | memoryview:
    """Return the bytes of a matrix (rows x words, C-contiguous uint64) under filter `how`. Raises: UsageError."""
    if how not in (NONE, MAJOR, DELTA) or not values.size:
        raise UsageError(f"no filter {how}, or an empty matrix")
    if how == NONE:
        return values.data.cast("B")
    if how == MAJOR:
        return values.T.tobytes()
    if compiled is not None and values.flags.c_contiguous:
        return compiled.delta(values, *values.shape)  # type: ignore[no-any-return]  # the compiled module has no types
    return _delta(values)


def _delta(values: Words) -> bytes:
    import numpy as np

    differ = (values[1:] != values[0]).any(axis=0) if len(values) > 1 else np.zeros(values.shape[1], bool)
    columns = values[:, differ].T
    return b"".join((values[0].tobytes(), _bitmap(differ), np.diff(columns, axis=1).tobytes()))


def _bitmap(differ: Words) -> bytes:
    import numpy as np

    packed = np.packbits(differ, bitorder="little").tobytes()
    return packed + bytes(-len(packed) % 8)


def unfilter_bank(raw: bytes, how: int, rows: int, words: int, out: Words | None = None) -> Words:
    """Return the matrix, rows x words. Raises: Corrupt where `raw` has another length or a stray bit.

    Args:
        out: a C-contiguous matrix of that shape that may be filled and returned. Otherwise the result owns its memory;
            it is writable in any case: a kernel is pointed into it.
    """
    import numpy as np

    if how == DELTA:
        if compiled is not None:
            matrix = np.empty((rows, words), np.uint64) if out is None else out
            if compiled.undelta(raw, rows, words, matrix):
                return matrix
        return _undelta(raw, rows, words)
    _expect_length(raw, rows * words * 8)
    flat = np.frombuffer(raw, np.uint64)
    return flat.reshape(rows, words).copy() if how == NONE else flat.reshape(words, rows).T.copy()


def _undelta(raw: bytes, rows: int, words: int) -> Words:
    import numpy as np

    bitmap_bytes = (words + 63) // 64 * 8
    head = words * 8 + bitmap_bytes
    if len(raw) < head:
        _expect_length(raw, head)
    bits = np.unpackbits(np.frombuffer(raw, np.uint8, bitmap_bytes, words * 8), bitorder="little")
    if bits[words:].any():
        raise Corrupt("bit set past the last word", field="payload.bitmap")
    differ = np.flatnonzero(bits)
    if len(differ) and rows == 1:
        raise Corrupt("word marked as differing in a bank of one row", field="payload.bitmap")
    _expect_length(raw, head + len(differ) * (rows - 1) * 8)
    first = np.frombuffer(raw, np.uint64, words)
    out = np.empty((rows, words), np.uint64)
    out[:] = first
    if len(differ):
        steps = np.frombuffer(raw, np.uint64, offset=head).reshape(len(differ), rows - 1)
        if not steps.any(axis=1).all():
            raise Corrupt("word marked as differing does not differ", field="payload.bitmap")
        values = np.cumsum(steps, axis=1, dtype=np.uint64)
        values += first[differ][:, None]
        out[1:, differ] = values.T
    return out


def _expect_length(raw: bytes, expected: int) -> None:
    if len(raw) != expected:
        raise Corrupt("bank has another length than its layout says", field="payload", expected=expected,
                      found=len(raw))
