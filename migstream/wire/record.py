"""A fixed-size construct schema run by `struct`: the same fields, the same bytes, a twentieth of the time.

construct takes some 50 us for a section header, which would be a third of what decoding a whole bank takes. The
format string is derived from the schema, so the two can't differ in layout; tests hold them equal on any bytes.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

from construct import Bytes, Const, Construct, FormatField


class Record:
    """Parses and builds a `construct.Struct` of integers, byte strings and constants."""

    def __init__(self, schema: Construct[Any, Any]) -> None:
        """Raises: TypeError for a schema with anything else in it."""
        fields: list[Construct[Any, Any]] = schema.subcons  # type: ignore[attr-defined]  # a Struct's
        self._names = [str(field.name) for field in fields]
        constants = [f for f in fields if isinstance(_bare(f), Const)]
        self._constants = {str(f.name): f.subcon.value for f in constants}  # type: ignore[attr-defined]  # a Renamed's
        self._struct = struct.Struct("<" + "".join(_code(_bare(field)) for field in fields))
        self.size = self._struct.size
        assert self.size == schema.sizeof()
        self._fields = _fields(self._names)

    def parse(self, data: bytes | memoryview) -> Any:
        """Return the fields as attributes. Raises: ValueError naming the first constant that is wrong."""
        values = self._fields._make(self._struct.unpack(data))
        for name, constant in self._constants.items():
            if getattr(values, name) != constant:
                raise ValueError(name)
        return values

    def build(self, fields: Mapping[str, Any]) -> bytes:
        """Return the bytes; constants fill themselves in."""
        every = {**fields, **self._constants}
        return self._struct.pack(*map(every.__getitem__, self._names))


def _bare(field: Construct[Any, Any]) -> Any:
    return field.subcon  # type: ignore[attr-defined]  # a Renamed's


def _code(field: Any) -> str:
    if isinstance(field, FormatField):
        return str(field.fmtstr).lstrip("<")
    if isinstance(field, Const):
        return _code(field.subcon)
    if isinstance(field, Bytes):
        return f"{field.length}s"
    raise TypeError(f"no struct code for {field!r}")


def _fields(names: list[str]) -> Any:
    return namedtuple("Fields", names)  # its fields are the schema's
