"""Every struct of KVM's UAPI that travels in a stream, of all architectures: bytes to fields and back.

A name is one struct: where two architectures have different structs of one name, arm64's has `_arm64` behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from construct import ConstructError

from migstream.wire import arm64, x86_64
from migstream.wire.schema import Count, Schema

STRUCTS: Mapping[str, Schema] = MappingProxyType({**x86_64.STRUCTS, **arm64.STRUCTS})
"""Every schema by name."""

COUNTS: Mapping[str, Count] = x86_64.COUNTS
"""The counts inside structs, by struct; arm64's have none."""


def parse(name: str, data: bytes) -> dict[str, Any]:
    """The fields of a struct as plain dicts, lists, ints and bytes.

    Raises:
        ValueError: no such struct, a wrong length or a count beyond its capacity; with the field's path.
    """
    schema = _schema(name)
    _check_length(schema, len(data))
    _check_count(schema, data)
    try:
        parsed = schema.construct.parse(data)
    except ConstructError as error:
        raise ValueError(f"{_path(name, error)}: {_reason(error)}") from error
    fields: dict[str, Any] = _plain(parsed)
    return fields


def build(name: str, fields: Mapping[str, Any]) -> bytes:
    """The bytes of a struct from what `parse` returned, changed or not.

    Raises:
        ValueError: no such struct; a field missing, unknown, out of range or of the wrong type.
    """
    schema = _schema(name)
    try:
        data: bytes = schema.construct.build(fields)
    except ConstructError as error:
        raise ValueError(f"{_path(name, error)}: {_reason(error)}") from error
    except KeyError as error:
        raise ValueError(f"{name}: field {error} is missing") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: a field has the wrong type: {error}") from error
    # construct ignores keys that it doesn't know: a misspelt field would be lost without a word.
    if parse(name, data) != fields:
        raise ValueError(f"{name}: these fields do not come back as given: one is unknown or of another type")
    return data


def _schema(name: str) -> Schema:
    if name not in STRUCTS:
        raise ValueError(f"{name}: no such struct")
    return STRUCTS[name]


def _check_length(schema: Schema, length: int) -> None:
    if schema.size is not None and length != schema.size:
        raise ValueError(f"{schema.name}: expected {schema.size} bytes, found {length}")
    if length < schema.minimum:
        raise ValueError(f"{schema.name}: expected at least {schema.minimum} bytes, found {length}")


def _check_count(schema: Schema, data: bytes) -> None:
    count = COUNTS.get(schema.name)
    if count is None:
        return
    value = int.from_bytes(data[count.offset:count.offset + 4], "little")
    capacity = len(data) if count.capacity is None else count.capacity
    if value > capacity:
        raise ValueError(f"{schema.name}.{count.field}: expected at most {capacity}, found {value}")
    expected = schema.minimum + value * count.entry
    if count.entry and len(data) != expected:
        raise ValueError(f"{schema.name}.{count.field}: expected {expected} bytes for {value} entries, "
                         f"found {len(data)}")


def _path(name: str, error: ConstructError) -> str:
    """`kvm_sregs.cs.base` out of construct's `(parsing) -> cs -> base`."""
    steps = str(error.path or "").split(" -> ")[1:]
    return ".".join([name, *steps])


def _reason(error: ConstructError) -> str:
    """The last line of construct's message; the ones before repeat the path."""
    lines = str(error).splitlines()
    return lines[-1] if lines else type(error).__name__


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "_io"}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
