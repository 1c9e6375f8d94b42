"""msgpack payloads in one canonical form: the same state gives the same bytes, and a reader accepts no others.

A payload's structure is walked before any object is made from it: half a kilobyte can describe millions of values.
"""

from __future__ import annotations

from typing import Any

import msgpack

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded


def pack(fields: dict[str, Any]) -> bytes:
    """Return the canonical bytes of a map."""
    return bytes(msgpack.packb(_sorted(fields), use_bin_type=True))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list | tuple) else value


def unpack(raw: bytes, fields: dict[str, type], limit: int = limits.MAX_TEXT) -> dict[str, Any]:
    """Return a map of exactly `fields`, each of its type. Raises: Corrupt, LimitExceeded, ValueError."""
    if len(raw) > limit:
        raise LimitExceeded("msgpack payload too long", expected=f"<= {limit}", found=len(raw))
    _check_structure(raw)
    value = msgpack.unpackb(raw, raw=False, strict_map_key=True)
    if not isinstance(value, dict) or value.keys() != fields.keys():
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise Corrupt("wrong fields", expected=sorted(fields), found=found)
    for name, wanted in fields.items():
        if type(value[name]) is not wanted:
            raise Corrupt("wrong type", field=name, expected=wanted.__name__, found=type(value[name]).__name__)
    if pack(value) != raw:
        raise Corrupt("msgpack is not in its one canonical form")
    return value


_LEAVES = {
    **dict.fromkeys((*range(0x80), *range(0xE0, 0x100)), 0),  # integers in the byte itself
    **{0xA0 + length: length for length in range(32)},        # short strings
    0xC2: 0, 0xC3: 0,                                         # false, true
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,                       # unsigned
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,                       # signed
}
"""First byte of a value of known length: bytes after it. nil, floats and extensions are in no field of ours."""

_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""First byte of bytes and strings: width of the length that follows."""

_OPENING = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""First byte of arrays and maps: width of the count that follows, values for each of it."""

_INLINE = {**{0x90 + count: count for count in range(16)}, **{0x80 + count: 2 * count for count in range(16)}}
"""First byte of short arrays and maps: values in them."""


def _check_structure(raw: bytes) -> None:
    """Walk the values and build none: objects are made once their number and depth are known to be small."""
    position, items, open_counts = 0, 1, [1]
    while open_counts:
        open_counts[-1] -= 1
        length, children = _token(raw, position)
        position, items = position + length, items + children
        if items > limits.MAX_ITEMS:
            raise LimitExceeded("values in a msgpack payload", expected=f"<= {limits.MAX_ITEMS}", found=items)
        if children:
            open_counts.append(children)
        if len(open_counts) > limits.MAX_MSGPACK_DEPTH:
            raise LimitExceeded("msgpack nested too deep", expected=f"<= {limits.MAX_MSGPACK_DEPTH}")
        while open_counts and not open_counts[-1]:
            open_counts.pop()
    if position != len(raw):
        raise Corrupt("msgpack payload and its one value differ in length", expected=position, found=len(raw))


def _token(raw: bytes, position: int) -> tuple[int, int]:
    """Bytes of the value at `position` without the values in it, and how many values those are."""
    first = raw[position] if position < len(raw) else -1
    if first in _LEAVES:
        return 1 + _LEAVES[first], 0
    if first in _INLINE:
        return 1, _INLINE[first]
    width, each = _OPENING.get(first, (_SIZED.get(first, 0), 0))
    if not width:
        what = "a type that no field has" if first >= 0 else "cut short"
        raise Corrupt(f"msgpack: {what}", field=f"payload byte {position}", found=f"{first:#04x}" if first >= 0 else "")
    count = int.from_bytes(raw[position + 1:position + 1 + width], "big")
    return (1 + width, each * count) if each else (1 + width + count, 0)


def typed_list(value: list[Any], kind: type, name: str) -> list[Any]:
    """Return `value` if every item is of `kind`. Raises: Corrupt naming the field."""
    if any(type(item) is not kind for item in value):
        raise Corrupt("wrong type", field=name, expected=f"list of {kind.__name__}")
    return value
