"""Payloads: one canonical form, the gate for errors, and a writer that refuses what a reader would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import limits, packing, sections
from migstream.errors import Corrupt, LimitExceeded, StreamError, TooNew, UsageError
from migstream.frames import Section
from migstream.model import PAGE, Arch, HostSummary, Layout, Machine, MemoryRegion, OpaqueState, Phase, Scope, Slot
from migstream.registers import x86_64
from migstream.registers.catalogue import Register
from migstream.sections import RamLayout, Skipped
from migstream.wire import stream as wire
from tests import build, strategies

_ONE = (Slot(build.LSTAR, 8),)
_SCALARS = st.booleans() | st.integers(-2**63, 2**64 - 1) | strategies.text | st.binary(max_size=300)
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=20)
                       | st.dictionaries(strategies.text, inner, max_size=20), max_leaves=60)


def opaque_section(payload: bytes) -> Section:
    """A section of these bytes, for the msgpack gate."""
    return Section("OPAQ", payload, len(payload))


def depth(value: Any) -> int:
    """Levels of a value, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, inner), default=0)


@given(st.builds(Machine, st.just(Arch.X86_64), st.integers(1, limits.MAX_VCPUS), st.just(()), strategies.devices)
       | strategies.hosts | strategies.opaque)
def test_model_to_payload_to_model(item: Any) -> None:
    section = sections.encode(item)
    assert sections.decode(section, []) == item
    assert sections.encode(item) == section


@given(strategies.devices)
def test_order_of_keys_does_not_matter(devices: dict[str, Any]) -> None:
    machine = Machine(Arch.X86_64, 1, (), devices)
    turned = replace(machine, devices=dict(reversed(devices.items())))
    assert sections.encode(turned) == sections.encode(machine)


@given(_VALUES)
def test_the_walk_knows_what_msgpack_knows(value: Any) -> None:
    """The structure check lets through exactly the packed values that are within the limits."""
    packed = build.pack(value)
    if depth(value) > limits.MAX_MSGPACK_DEPTH:
        with pytest.raises(LimitExceeded):
            packing._check_structure(packed)
    else:
        packing._check_structure(packed)
        for wrong in (packed[:-1], packed + b"\0"):
            with pytest.raises(Corrupt):
                packing._check_structure(wrong)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_refused(payload: bytes) -> None:
    try:
        packing._check_structure(payload)
    except StreamError as error:
        assert error.exit_status in (1, 4)
        return
    try:  # strings that are not UTF-8 and keys that are lists are for msgpack to find
        msgpack.unpackb(payload, raw=False, strict_map_key=False)
    except (UnicodeDecodeError, TypeError) as error:
        assert isinstance(sections_error(payload), Corrupt), error


def sections_error(payload: bytes) -> StreamError | None:
    """What the gate makes of a payload."""
    try:
        sections.decode(opaque_section(payload), [])
    except StreamError as error:
        return error
    return None


@pytest.mark.parametrize("count", (limits.MAX_ITEMS - 1, limits.MAX_ITEMS))
def test_number_of_values_at_its_limit(count: int) -> None:
    error = sections_error(b"\xdd" + count.to_bytes(4, "big") + b"\x01" * count)
    assert type(error) is (LimitExceeded if count == limits.MAX_ITEMS else Corrupt)


def test_greatest_opaque_state() -> None:
    room = limits.MAX_RAW - len(build.pack({"name": "d", "data": b""})) - 3  # its length takes 4 bytes, not 1
    state = OpaqueState("d", bytes(room))
    assert sections.decode(sections.encode(state), []) == state
    with pytest.raises(UsageError):
        sections.encode(OpaqueState("d", bytes(room + 1)))


UNSAVABLE: dict[str, Any] = {
    "no vCPU": Machine(Arch.X86_64, 0, ()),
    "too many vCPUs": Machine(Arch.X86_64, limits.MAX_VCPUS + 1, ()),
    "half a page": Machine(Arch.X86_64, 1, (MemoryRegion(0, 2048),)),
    "regions that overlap": Machine(Arch.X86_64, 1, (MemoryRegion(0, 2 * PAGE), MemoryRegion(PAGE, PAGE))),
    "too many regions": Machine(Arch.X86_64, 1, tuple(
        MemoryRegion(2 * n * PAGE, PAGE) for n in range(limits.MAX_REGIONS + 1))),
    "a device that takes a float": Machine(Arch.X86_64, 1, (), {"pit": 1.0}),
    "a device that takes a list": Machine(Arch.X86_64, 1, (), {"pit": [1]}),
    "a device that takes nothing": Machine(Arch.X86_64, 1, (), {"pit": None}),
    "too long a host": HostSummary("x" * limits.MAX_TEXT, "", ""),
    "no register": Layout(Scope.VCPU, Phase.STATE, ()),
    "a register twice": Layout(Scope.VCPU, Phase.STATE, _ONE * 2),
    "a register of no byte": Layout(Scope.VCPU, Phase.STATE, (Slot(build.STRUCT | 0x8000, 0),)),
    "another size than the id's": Layout(Scope.VCPU, Phase.STATE, (Slot(build.LSTAR, 4),)),
    "too many registers": Layout(Scope.VCPU, Phase.STATE, tuple(
        Slot(build.MSR | n, 8) for n in range(limits.MAX_SLOTS + 1))),
    "too long a row": Layout(Scope.VCPU, Phase.STATE, (Slot(build.STRUCT | 0x8000, limits.MAX_ROW), *_ONE)),
    "too many RAM ranges": RamLayout(tuple(MemoryRegion(2 * n * PAGE, PAGE) for n in range(limits.MAX_REGIONS + 1))),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_a_reader_would_refuse_is_not_written(case: str) -> None:
    with pytest.raises(UsageError, match="can't be saved"):
        sections.encode(UNSAVABLE[case])


def test_a_bank_that_is_too_large_is_not_written() -> None:
    layout = Layout(Scope.VCPU, Phase.STATE, (Slot(build.STRUCT | 0x8000, limits.MAX_ROW),))
    rows = limits.MAX_MATRIX // limits.MAX_ROW + 1
    with pytest.raises(UsageError):
        sections.encode_bank(build.values_bank(layout, [[0] * layout.row_words] * rows), 0)


@pytest.mark.parametrize("version", (1, 2, 0xFFFF))
def test_unknown_ancillary_sections_are_skipped(version: int) -> None:
    section = Section("XTRA", b"\xff", 1, flags=0, version=version)
    assert sections.decode(section, []) == Skipped("XTRA", version)


@pytest.mark.parametrize("kind", wire.KINDS)
def test_a_newer_version_of_each_kind(kind: str) -> None:
    with pytest.raises(TooNew):
        sections.decode(Section(kind, b"", 0, version=wire.KINDS[kind].version + 1), [])


@pytest.mark.parametrize("kind", [kind.name for kind in wire.KINDS.values() if kind.critical])
@pytest.mark.parametrize("version", (1, 2))
def test_a_critical_kind_can_not_be_skipped(kind: str, version: int) -> None:
    with pytest.raises(Corrupt) as caught:
        sections.decode(Section(kind, b"", 0, version=version, flags=0), [])
    assert caught.value.field == "flags"


@pytest.mark.parametrize("size", (1, 3, 4, 7, 8, 9, 15, 16))
def test_bytes_past_a_register_are_zero(size: int) -> None:
    layout = Layout(Scope.VCPU, Phase.STATE, (Slot(build.STRUCT | 0x8000, size),))
    for byte in range(layout.row_words * 8):
        values = build.matrix([[0] * layout.row_words] * 2)
        values.view("u1")[1, byte] = 0x80
        if byte < size:
            sections.check_padding(layout, values)
        else:
            with pytest.raises(Corrupt):
                sections.check_padding(layout, values)


@pytest.mark.parametrize(("id", "size", "word", "shift", "limit"), (
    (x86_64.CPUID2.id, 8, 0, 0, 0), (x86_64.CPUID2.id, 88, 0, 0, 2), (x86_64.CPUID2.id, 8 + 300 * 40, 0, 0, 256),
    (x86_64.XCRS.id, 392, 0, 0, 16), (x86_64.NESTED_STATE.id, 128, 0, 32, 128),
    (x86_64.NESTED_STATE.id, 4224, 0, 32, 4224)))
@pytest.mark.parametrize("beyond", (0, 1, 2**31, 2**32))
def test_counts_in_values_stay_within_the_register(id: int, size: int, word: int, shift: int, limit: int,
                                                   beyond: int) -> None:
    layout = Layout(Scope.VCPU, Phase.STATE, (Slot(build.LSTAR, 8), Slot(id, size)))
    values = build.matrix([[2**64 - 1] + [0] * (layout.row_words - 1)] * 2)
    values[1, 1 + word] = min(limit + beyond, 2**32 - 1) << shift
    if beyond:
        with pytest.raises(Corrupt):
            sections.check_values(layout, values)
    else:
        sections.check_values(layout, values)


@pytest.mark.parametrize(("row", "number"), [(x86_64.PIC_MASTER, 0), (x86_64.PIC_SLAVE, 1), (x86_64.IOAPIC, 2)])
@pytest.mark.parametrize("found", range(4))
def test_a_chip_that_names_another_chip_is_refused(row: Register, number: int, found: int) -> None:
    layout = Layout(Scope.VM, Phase.INTERRUPTS, (Slot(row.id, 520),))
    values = build.matrix([[found] + [0] * 64])
    if found == number:
        sections.check_values(layout, values)
    else:
        with pytest.raises(Corrupt, match=f"{row.name}: value names another register; expected {number}"):
            sections.check_values(layout, values)


def test_errors_say_where() -> None:
    section = opaque_section(b"\xa3abc")._replace(offset=4711, number=8)
    with pytest.raises(Corrupt) as caught:
        sections.decode(section, [])
    assert (caught.value.offset, caught.value.section) == (4711, "#8 OPAQ")
    assert str(caught.value).startswith("offset 4711: #8 OPAQ: ")
