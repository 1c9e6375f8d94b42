"""Construct schemas as plain rows: name, offset, size and type of every field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from construct import Construct

from migstream.wire import stream, x86_64

Row = dict[str, Any]
_Any: TypeAlias = "Construct[Any, Any]"

STREAM = {
    "preamble": stream.PREAMBLE,
    "section_header": stream.SECTION_HEADER,
    "REGL_head": stream.LAYOUT_HEAD,
    "REGL_slot": stream.LAYOUT_SLOT,
    "RAML_head": stream.RAM_LAYOUT_HEAD,
    "RAML_region": stream.RAM_REGION,
    "RAMP_head": stream.RAM_PAGES_HEAD,
    "RAMP_run": stream.RAM_RUN,
    "END": stream.END,
}

_NUMBERS = {"B": "u8", "H": "u16", "L": "u32", "I": "u32", "Q": "u64", "q": "s64", "l": "s32", "h": "s16", "b": "s8"}


def size_of(schema: _Any) -> int | None:
    """Bytes of a schema; None where the data say."""
    inner: Any = schema
    while type(inner).__name__ == "Renamed":
        inner = inner.subcon
    if type(inner).__name__ == "Switch":  # has no size of its own, even where all cases have the same
        sizes = {size_of(case) for case in (*inner.cases.values(), inner.default)}
        return sizes.pop() if len(sizes) == 1 else None
    try:
        return int(schema.sizeof())
    except Exception:  # construct evaluates lambdas without a context: whatever comes, there is no one size
        return None


def walk(schema: _Any, path: str = "", offset: int = 0) -> Iterator[Row]:
    """The fields of a schema in order; of an array the fields of its first element, of a choice those of each case."""
    yield from _WALKERS[type(schema).__name__](schema, path, offset)


def _row(path: str, offset: int, schema: _Any, kind: str) -> Row:
    return {"name": path, "offset": offset, "size": size_of(schema), "type": kind}


def _struct(schema: Any, path: str, offset: int) -> Iterator[Row]:
    for sub in schema.subcons:
        yield from walk(sub.subcon, f"{path}.{sub.name}" if path else sub.name, offset)
        offset += size_of(sub) or 0


def _array(schema: Any, path: str, offset: int) -> Iterator[Row]:
    fixed = isinstance(schema.count, int)
    yield _row(path, offset, schema, f"array of {schema.count if fixed else 'as many as counted'}")
    yield from walk(schema.subcon, f"{path}[0]", offset)


def _switch(schema: Any, path: str, offset: int) -> Iterator[Row]:
    yield _row(path, offset, schema, f"one of cases {sorted(schema.cases)}")
    for key, case in schema.cases.items():
        yield from walk(case, f"{path}<{key}>", offset)


def _bits(schema: Any, path: str, offset: int) -> Iterator[Row]:
    """A number cut into bits, the highest first: `ByteSwapped(BitStruct(…))` of a little-endian register."""
    fields = schema.subcon.subcon.subcons
    yield _row(path, offset, schema, "bits")
    bit = sum(int(f.sizeof()) for f in fields)
    for item in fields:
        width = int(item.sizeof())
        bit -= width
        yield {"name": f"{path}.{item.name}", "offset": offset, "bit": bit, "width": width}


_WALKERS: dict[str, Callable[[Any, str, int], Iterator[Row]]] = {
    "Struct": _struct,
    "Array": _array,
    "Switch": _switch,
    "Transformed": _bits,
    "Renamed": lambda s, path, offset: walk(s.subcon, path, offset),
    "FormatField": lambda s, path, offset: iter([_row(path, offset, s, _NUMBERS[s.fmtstr[-1]])]),
    "Bytes": lambda s, path, offset: iter([_row(path, offset, s, "bytes")]),
    "GreedyBytes": lambda s, path, offset: iter([_row(path, offset, s, "the rest")]),
    "Const": lambda s, path, offset: iter([_row(path, offset, s, f"constant {s.value.hex()}")]),
}


def _table(schemas: dict[str, _Any]) -> str:
    """One line a field: a change shows as one line."""
    parts = []
    for name, schema in schemas.items():
        rows = ",\n".join("   " + json.dumps(row) for row in walk(schema))
        size = json.dumps(size_of(schema))
        parts.append(f' {json.dumps(name)}: {{\n  "size": {size},\n  "fields": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def files() -> dict[str, str]:
    """Text of the frozen layouts by path under formats/."""
    return {
        f"layouts/stream-{stream.MAJOR}.json": _table(STREAM),
        "layouts/kvm-x86_64.json": _table({name: schema.construct for name, schema in x86_64.STRUCTS.items()}),
    }
