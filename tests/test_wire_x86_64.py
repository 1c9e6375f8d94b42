"""The KVM structs of x86-64: sizes, offsets, and that no byte is lost."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.wire import structs
from migstream.wire import x86_64 as wire

SIZES = {
    "kvm_segment": 24, "kvm_dtable": 16, "kvm_regs": 144, "kvm_sregs": 312, "kvm_sregs2": 320,
    "kvm_xcrs": 392, "kvm_debugregs": 128, "kvm_lapic_state": 1024, "kvm_mp_state": 4, "kvm_vcpu_events": 64,
    "kvm_cpuid_entry2": 40, "kvm_clock_data": 48, "kvm_pic_state": 16, "kvm_ioapic_state": 216,
    "kvm_irqchip_pic": 520, "kvm_irqchip_ioapic": 520, "kvm_pit_channel_state": 24, "kvm_pit_state2": 112,
    "kvm_enable_cap": 104, "kvm_msr_entry": 16, "kvm_msrs": 8, "enabled_cap": 40, "tsc_khz": 4,
    "tsc_offset": 8, "msr": 8,
}
VARIABLE = {"kvm_xsave": 4096, "kvm_nested_state": 128, "kvm_cpuid2": 8}

OFFSETS = [
    ("kvm_regs", "rsp", 48, 8), ("kvm_regs", "rip", 128, 8), ("kvm_regs", "rflags", 136, 8),
    ("kvm_segment", "limit", 8, 4), ("kvm_segment", "selector", 12, 2), ("kvm_segment", "unusable", 22, 1),
    ("kvm_dtable", "limit", 8, 2),
    ("kvm_sregs", "tr.base", 144, 8), ("kvm_sregs", "gdt.base", 192, 8), ("kvm_sregs", "cr0", 224, 8),
    ("kvm_sregs", "efer", 264, 8), ("kvm_sregs", "apic_base", 272, 8),
    ("kvm_sregs", "interrupt_bitmap.0", 280, 8),
    ("kvm_sregs2", "flags", 280, 8), ("kvm_sregs2", "pdptrs.0", 288, 8), ("kvm_sregs2", "pdptrs.3", 312, 8),
    ("kvm_xsave", "ftw", 4, 1), ("kvm_xsave", "fop", 6, 2), ("kvm_xsave", "mxcsr", 24, 4),
    ("kvm_xsave", "xstate_bv", 512, 8), ("kvm_xsave", "xcomp_bv", 520, 8),
    ("kvm_xcrs", "xcrs.0.value", 16, 8), ("kvm_xcrs", "xcrs.15.xcr", 248, 4),
    ("kvm_xcrs", "padding.0", 264, 8),
    ("kvm_debugregs", "dr6", 32, 8), ("kvm_debugregs", "flags", 48, 8),
    ("kvm_lapic_state", "id", 0x20, 4), ("kvm_lapic_state", "lvr", 0x30, 4),
    ("kvm_lapic_state", "taskpri", 0x80, 4), ("kvm_lapic_state", "isr.7.value", 0x170, 4),
    ("kvm_lapic_state", "irr.0.value", 0x200, 4), ("kvm_lapic_state", "esr", 0x280, 4),
    ("kvm_lapic_state", "icr", 0x300, 4), ("kvm_lapic_state", "lvtt", 0x320, 4),
    ("kvm_lapic_state", "tmcct", 0x390, 4), ("kvm_lapic_state", "tdcr", 0x3E0, 4),
    ("kvm_vcpu_events", "exception.error_code", 4, 4), ("kvm_vcpu_events", "interrupt.shadow", 11, 1),
    ("kvm_vcpu_events", "nmi.masked", 14, 1), ("kvm_vcpu_events", "sipi_vector", 16, 4),
    ("kvm_vcpu_events", "flags", 20, 4), ("kvm_vcpu_events", "smi.smm", 24, 1),
    ("kvm_vcpu_events", "triple_fault.pending", 28, 1), ("kvm_vcpu_events", "exception_has_payload", 55, 1),
    ("kvm_vcpu_events", "exception_payload", 56, 8),
    ("kvm_cpuid_entry2", "flags", 8, 4), ("kvm_cpuid_entry2", "edx", 24, 4),
    ("kvm_clock_data", "flags", 8, 4), ("kvm_clock_data", "realtime", 16, 8),
    ("kvm_clock_data", "host_tsc", 24, 8),
    ("kvm_ioapic_state", "ioregsel", 8, 4), ("kvm_ioapic_state", "redirtbl.0.vector", 24, 1),
    ("kvm_ioapic_state", "redirtbl.0.dest_id", 31, 1), ("kvm_ioapic_state", "redirtbl.23.vector", 208, 1),
    ("kvm_irqchip_pic", "pic.imr", 10, 1), ("kvm_irqchip_pic", "pic.elcr_mask", 23, 1),
    ("kvm_irqchip_ioapic", "ioapic.base_address", 8, 8),
    ("kvm_pit_channel_state", "gate", 15, 1), ("kvm_pit_channel_state", "count_load_time", 16, 8),
    ("kvm_pit_state2", "channels.2.count", 48, 4), ("kvm_pit_state2", "flags", 72, 4),
    ("kvm_enable_cap", "args.0", 8, 8), ("kvm_msr_entry", "data", 8, 8),
]


def length(name: str) -> int:
    """Bytes of the shortest value of a struct."""
    return SIZES[name] if name in SIZES else VARIABLE[name]


def follow(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    value: Any = fields
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def with_counts(name: str, data: bytes) -> bytes:
    """`data` with the struct's count made one that fits, since a random one never does."""
    count = wire.COUNTS.get(name)
    if count is None:
        return data
    entries = (len(data) - length(name)) // count.entry if count.entry else 16
    return data[:count.offset] + entries.to_bytes(4, "little") + data[count.offset + 4:]


def plain(value: object) -> bool:
    """True where a value is made of builtins only."""
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    return all(map(plain, value)) if type(value) is list else type(value) in (int, bytes)


def test_every_struct_is_in_this_test() -> None:
    assert set(wire.STRUCTS) == SIZES.keys() | VARIABLE.keys()
    assert all(name == schema.name for name, schema in wire.STRUCTS.items())


@pytest.mark.parametrize("name", wire.STRUCTS)
def test_size_is_the_kernels(name: str) -> None:
    schema = wire.STRUCTS[name]
    assert (schema.size, schema.minimum) == (SIZES.get(name), length(name))
    if schema.size is not None:
        assert schema.construct.sizeof() == schema.size


@pytest.mark.parametrize("name", wire.STRUCTS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), entries=st.integers(0, 3))
def test_no_byte_is_lost(name: str, seed: int, entries: int) -> None:
    extra = entries * 40 if name in VARIABLE else 0
    raw = with_counts(name, Random(seed).randbytes(length(name) + extra))
    fields = structs.parse(name, raw)
    assert plain(fields)
    assert structs.build(name, fields) == raw


@pytest.mark.parametrize(("name", "path", "offset", "size"), OFFSETS)
def test_field_is_where_the_kernel_has_it(name: str, path: str, offset: int, size: int) -> None:
    marker = bytes(range(0x11, 0x11 + size))
    raw = bytearray(length(name))
    raw[offset:offset + size] = marker
    assert follow(structs.parse(name, bytes(raw)), path) == int.from_bytes(marker, "little")


@pytest.mark.parametrize(("name", "change"), [
    *((name, -1) for name in wire.STRUCTS), *((name, 1) for name in SIZES), ("kvm_cpuid2", 1),
])
def test_wrong_length_is_refused(name: str, change: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name}(\.nent)?: expected .* found"):
        structs.parse(name, bytes(length(name) + change))


@pytest.mark.parametrize(("name", "size", "offset", "message"), [
    ("kvm_xcrs", 392, 0, r"kvm_xcrs\.nr_xcrs: expected at most 16, found 17"),
    ("kvm_cpuid2", 8, 0, r"kvm_cpuid2\.nent: expected 688 bytes for 17 entries, found 8"),
    ("kvm_nested_state", 128, 5, r"kvm_nested_state\.size: expected at most 128, found 4352"),
])
def test_count_beyond_capacity_is_refused(name: str, size: int, offset: int, message: str) -> None:
    raw = bytearray(size)
    raw[offset] = 17
    with pytest.raises(ValueError, match=message):
        structs.parse(name, bytes(raw))


def test_huge_cpuid_count_is_refused_before_it_is_believed() -> None:
    with pytest.raises(ValueError, match="nent: expected at most 256"):
        structs.parse("kvm_cpuid2", b"\xff" * 48)


def test_xsave_grows_with_dynamic_features() -> None:
    raw = bytes(4096) + b"tile" * 2048
    assert structs.parse("kvm_xsave", raw)["extra"] == b"tile" * 2048


def test_xsave_legacy_area() -> None:
    raw = bytearray(4096)
    raw[32 + 16 * 7:32 + 16 * 8] = b"7" * 16
    raw[160 + 16 * 15:160 + 16 * 16] = b"f" * 16
    fields = structs.parse("kvm_xsave", bytes(raw))
    assert (fields["st"][7], fields["xmm"][15]) == (b"7" * 16, b"f" * 16)


@pytest.mark.parametrize(("format", "field"), [(0, "vmxon_pa"), (1, "vmcb_pa")])
def test_nested_header_is_the_vendors(format: int, field: str) -> None:
    raw = bytes((0, 0, format, 0)) + (128).to_bytes(4, "little") + b"\x05" + bytes(119)
    assert structs.parse("kvm_nested_state", raw)["hdr"][field] == 5


def test_nested_header_of_an_unknown_format_is_kept() -> None:
    raw = bytes((0, 0, 9, 0)) + (128).to_bytes(4, "little") + bytes(range(120))
    assert structs.parse("kvm_nested_state", raw)["hdr"] == bytes(range(120))


def test_nested_vmx_header_fields() -> None:
    raw = bytes(8) + bytes(range(120)) + b"data"
    header = structs.parse("kvm_nested_state", raw)["hdr"]
    assert header["smm"]["flags"] == 0x1110
    assert header["flags"] == 0x17161514
    assert header["preemption_timer_deadline"] == int.from_bytes(bytes(range(24, 32)), "little")


def test_redirection_entry_bits() -> None:
    raw = bytearray(216)
    raw[24:32] = (0x31 | 1 << 8 | 1 << 11 | 1 << 13 | 1 << 15 | 1 << 16 | 3 << 56).to_bytes(8, "little")
    entry = structs.parse("kvm_ioapic_state", bytes(raw))["redirtbl"][0]
    assert {key: value for key, value in entry.items() if value} == {
        "vector": 0x31, "delivery_mode": 1, "dest_mode": 1, "polarity": 1, "trig_mode": 1, "mask": 1,
        "dest_id": 3,
    }


def test_cpuid_entries() -> None:
    entries = b"".join(n.to_bytes(4, "little") * 10 for n in (7, 8))
    fields = structs.parse("kvm_cpuid2", (2).to_bytes(8, "little") + entries)
    assert [entry["function"] for entry in fields["entries"]] == [7, 8]


def test_edited_field_is_built() -> None:
    fields = structs.parse("kvm_regs", bytes(144))
    fields["rip"] = 0xFFFF_FFFF_8100_0000
    assert structs.parse("kvm_regs", structs.build("kvm_regs", fields)) == fields


@pytest.mark.parametrize(("edit", "message"), [
    ({"rip": 1 << 64}, r"^kvm_regs\.rip: "),
    ({"rip": "a word"}, r"^kvm_regs\.rip: "),
    ({"rop": 1}, "unknown"),
    ({"rip": None}, r"^kvm_regs\.rip: "),
])
def test_bad_field_is_refused(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structs.build("kvm_regs", {**structs.parse("kvm_regs", bytes(144)), **edit})


def test_missing_field_is_refused() -> None:
    fields = structs.parse("kvm_sregs", bytes(312))
    del fields["gdt"]["base"]
    with pytest.raises(ValueError, match="kvm_sregs: field 'base' is missing"):
        structs.build("kvm_sregs", fields)


@pytest.mark.parametrize("wrong", [3, None, b"", [], "text"])
def test_field_of_another_type_is_refused(wrong: object) -> None:
    fields = structs.parse("kvm_sregs", bytes(312))
    for name in ("cs", "interrupt_bitmap"):
        with pytest.raises(ValueError, match="kvm_sregs"):
            structs.build("kvm_sregs", {**fields, name: wrong})


def test_count_that_does_not_match_is_refused() -> None:
    with pytest.raises(ValueError, match="kvm_cpuid2"):
        structs.build("kvm_cpuid2", {"nent": 2, "padding": 0, "entries": []})


def test_unknown_struct_is_refused() -> None:
    with pytest.raises(ValueError, match="no such struct"):
        structs.parse("kvm_nothing", b"")
    with pytest.raises(ValueError, match="no such struct"):
        structs.build("kvm_nothing", {})
