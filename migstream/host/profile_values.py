"""Values of a host profile's JSON, each read strictly: what is not exactly of its form is refused, with its place.

A reader takes a value as JSON gives it and returns ours. Raises: ValueError; OverLimit for too many or too long.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

from migstream import limits

T = TypeVar("T")
K = TypeVar("K")
Reader = Callable[[Any], T]

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
_DIGITS = 21
"""Characters of the longest number of 64 bits, with its sign."""

_HEX = re.compile("0x(?:0|[1-9a-f][0-9a-f]{0,15})")
_BYTES = re.compile("(?:[0-9a-f]{2})*")


class OverLimit(ValueError):
    """Above one of the limits of formats/SPEC.md."""


@dataclass(frozen=True)
class _Wrong:
    """What stands in the place of a value that JSON's reader would take and we don't, until its place is known."""

    why: str


def _refuse(refused: list[_Wrong], why: str) -> _Wrong:
    refused.append(_Wrong(why))
    return refused[-1]


def document(text: str) -> Any:
    """The value of a JSON text. A key that stands there twice, NaN and numbers above 64 bits are refused, with their
    field."""
    refused: list[_Wrong] = []
    found = _document(text, refused)
    if refused:
        path, why = next(_wrong((), found))
        field = f"field {shown(path[0])}: " if path else ""
        raise ValueError(field + "".join(f"{name}: " for name in path[1:]) + why)
    return found


def _wrong(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where values are that can't be, and why."""
    if isinstance(value, _Wrong):
        yield path, value.why
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _wrong((*path, name), item)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, (dict, list, _Wrong)):
                yield from _wrong((*path, str(number)), item)


def _document(text: str, refused: list[_Wrong]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=partial(_once, refused), parse_int=partial(_parse_int, refused),
                          parse_constant=partial(_no_number, refused))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that anybody wrote: nested too deep") from error


def _once(refused: list[_Wrong], pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Wrong:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # always None
        return _refuse(refused, f"{shown(twice)} is there twice")
    return found


def _parse_int(refused: list[_Wrong], digits: str) -> int | _Wrong:
    if len(digits) > _DIGITS:
        return _refuse(refused, f"a number of {len(digits)} digits; 64 bits are the most")
    return int(digits)


def _no_number(refused: list[_Wrong], word: str) -> _Wrong:
    return _refuse(refused, f"{word} is no number of JSON")


def shown(value: object) -> str:
    """A value for a message: short, and safe for a terminal."""
    plain = ascii(value)
    return plain if len(plain) <= 60 else f"{plain[:59]}…"


def text(value: Any) -> str:
    """A string without control characters."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no text")
    if len(value) > limits.MAX_PROFILE_TEXT:
        raise OverLimit(f"a text of {len(value)} characters; {limits.MAX_PROFILE_TEXT} are the most")
    if not value.isprintable():
        raise ValueError(f"{shown(value)} holds a control character")
    return value


def whole(least: int, most: int) -> Reader[int]:
    """A whole number from `least` to `most`."""
    def read(value: Any) -> int:
        if type(value) is not int:
            raise ValueError(f"{shown(value)} is no whole number")
        if not least <= value <= most:
            raise ValueError(f"{shown(value)} is not from {least} to {most:#x}")
        return value

    return read


def hexadecimal(most: int) -> Reader[int]:
    """A number up to `most`, as a string: `0x`, small letters, no zero in front."""
    def read(value: Any) -> int:
        number = _number(value) if isinstance(value, str) else None
        if number is None:
            raise ValueError(f"{shown(value)} is no number of 64 bits in hexadecimal, as in '0x1f'")
        if number > most:
            raise ValueError(f"{value} is not from 0 to {most:#x}")
        return number

    return read


@lru_cache(maxsize=1 << 15)
def _number(digits: str) -> int | None:
    """The number; None where it is none. Kept: one profile's ids are the next one's."""
    return int(digits, 16) if _HEX.fullmatch(digits) else None


def raw(value: Any) -> bytes:
    """Bytes, as a string of hexadecimal digits; as many as a bank's row may have."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no string of pairs of hexadecimal digits")
    return _short(value) if len(value) <= _SHORT else _bytes(value)


def _bytes(digits: str) -> bytes:
    if not _BYTES.fullmatch(digits):
        raise ValueError(f"{shown(digits)} is no string of pairs of hexadecimal digits")
    if len(digits) > 2 * limits.MAX_ROW:
        raise OverLimit(f"{len(digits) // 2} bytes; {limits.MAX_ROW} are the most")
    return bytes.fromhex(digits)


_SHORT = 32
_short = lru_cache(maxsize=1 << 14)(_bytes)
"""Kept for registers' values: most are the same in many profiles."""


def pair(first: Reader[T], second: Reader[T]) -> Reader[tuple[T, T]]:
    """A list of two."""
    def read(value: Any) -> tuple[T, T]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{shown(value)} is no pair")
        return first(value[0]), second(value[1])

    return read


def listing(item: Reader[T], ascending: bool = False) -> Reader[tuple[T, ...]]:
    """A list; none is there twice where they are ascending."""
    def read(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{shown(value)} is no list")
        found = tuple(map(item, _few(value)))
        if ascending and any(a >= b for a, b in itertools.pairwise(found)):  # type: ignore[operator]  # all int
            raise ValueError("not in ascending order, or one is there twice")
        return found

    return read


def table(key: Reader[K], value: Reader[T]) -> Reader[dict[K, T]]:
    """An object; what is wrong is said with its key."""
    def read(found: Any) -> dict[K, T]:
        if not isinstance(found, dict):
            raise ValueError(f"{shown(found)} is no object")
        names = list(map(key, _few(found)))
        try:
            return dict(zip(names, map(value, found.values()), strict=True))
        except ValueError:
            for name, item in found.items():
                _say_where(name, item, value)
            raise

    return read


def _say_where(name: str, item: Any, read: Reader[T]) -> None:
    try:
        read(item)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from error


def _few(many: Any) -> Any:
    if len(many) > limits.MAX_PROFILE_ROWS:
        raise OverLimit(f"{len(many)} entries; {limits.MAX_PROFILE_ROWS} are the most")
    return many
