"""Schemas of the KVM structs of x86-64 that travel in a stream; field names are the kernel's.

Sources: Linux arch/x86/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h; the local APIC's registers
arch/x86/include/asm/apicdef.h; the XSAVE area Intel SDM volume 1, 13.4. All little-endian. A schema keeps
every byte: padding is a named field, so that `build(name, parse(name, data)) == data`. Nothing here is on the
way of a restore: the bytes go to the kernel as they are; this is for showing, comparing and editing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from construct import (
    Array,
    BitsInteger,
    BitStruct,
    Bytes,
    ByteSwapped,
    Construct,
    ConstructError,
    GreedyBytes,
    Int8ul,
    Int16ul,
    Int32ul,
    Int64sl,
    Int64ul,
    Struct,
    Switch,
    this,
)

_Any: TypeAlias = "Construct[Any, Any]"


@dataclass(frozen=True, slots=True)
class Schema:
    """One struct of KVM's UAPI.

    Attributes:
        name: the kernel's name for it, or ours where the kernel has none.
        construct: the schema.
        size: bytes; None where the struct has no one size.
        source: kernel file that defines it.
        minimum: bytes of the part that is always there; equal to `size` where that is not None.
    """

    name: str
    construct: Construct[Any, Any]
    size: int | None
    source: str
    minimum: int


@dataclass(frozen=True, slots=True)
class Count:
    """A number in a struct that says how much of the rest is in use.

    Attributes:
        field: the number's name.
        offset: where it is, in bytes; it is a u32.
        capacity: largest value that the kernel takes; None for the length of the data.
        entry: bytes of one entry where the length must match the number, else 0.
    """

    field: str
    offset: int
    capacity: int | None
    entry: int = 0


def _fields(kind: _Any, names: str) -> list[_Any]:
    return [name / kind for name in names.split()]


def _raw(name: str, size: int) -> _Any:
    field: _Any = name / Bytes(size)
    return field


_SEGMENT = Struct(
    "base" / Int64ul,
    "limit" / Int32ul,
    "selector" / Int16ul,
    *_fields(Int8ul, "type present dpl db s l g avl unusable padding"),
)
_DTABLE = Struct("base" / Int64ul, "limit" / Int16ul, "padding" / Array(3, Int16ul))
_REGS = Struct(*_fields(Int64ul, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"))
_SREGS_COMMON = (
    *_fields(_SEGMENT, "cs ds es fs gs ss tr ldt"),
    *_fields(_DTABLE, "gdt idt"),
    *_fields(Int64ul, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
)
_SREGS = Struct(*_SREGS_COMMON, "interrupt_bitmap" / Array(4, Int64ul))
_SREGS2 = Struct(*_SREGS_COMMON, "flags" / Int64ul, "pdptrs" / Array(4, Int64ul))

_XSAVE = Struct(
    *_fields(Int16ul, "fcw fsw"),
    *_fields(Int8ul, "ftw reserved_5"),
    "fop" / Int16ul,
    *_fields(Int64ul, "rip rdp"),
    *_fields(Int32ul, "mxcsr mxcsr_mask"),
    "st" / Array(8, Bytes(16)),
    "xmm" / Array(16, Bytes(16)),
    _raw("reserved_416", 48),
    _raw("sw_reserved", 48),
    *_fields(Int64ul, "xstate_bv xcomp_bv"),
    _raw("reserved_528", 48),
    _raw("extended", 4096 - 576),
    "extra" / GreedyBytes,
)
_XCR = Struct(*_fields(Int32ul, "xcr reserved"), "value" / Int64ul)
_XCRS = Struct(*_fields(Int32ul, "nr_xcrs flags"), "xcrs" / Array(16, _XCR), "padding" / Array(16, Int64ul))
_DEBUGREGS = Struct(
    "db" / Array(4, Int64ul),
    *_fields(Int64ul, "dr6 dr7 flags"),
    "reserved" / Array(9, Int64ul),
)

_APIC_REGISTERS: tuple[tuple[int, str, int], ...] = (
    (0x020, "id", 1), (0x030, "lvr", 1), (0x080, "taskpri", 1), (0x090, "arbpri", 1), (0x0A0, "procpri", 1),
    (0x0B0, "eoi", 1), (0x0C0, "rrr", 1), (0x0D0, "ldr", 1), (0x0E0, "dfr", 1), (0x0F0, "spiv", 1),
    (0x100, "isr", 8), (0x180, "tmr", 8), (0x200, "irr", 8), (0x280, "esr", 1), (0x2F0, "lvtcmci", 1),
    (0x300, "icr", 1), (0x310, "icr2", 1), (0x320, "lvtt", 1), (0x330, "lvtthmr", 1), (0x340, "lvtpc", 1),
    (0x350, "lvt0", 1), (0x360, "lvt1", 1), (0x370, "lvterr", 1), (0x380, "tmict", 1), (0x390, "tmcct", 1),
    (0x3E0, "tdcr", 1), (0x3F0, "self_ipi", 1),
)
_APIC_PAGE = 1024
_APIC_WORD = Struct("value" / Int32ul, "unused" / Bytes(12))


def _apic_page() -> _Any:
    """The registers at their offsets, 32 bits in 16 bytes each; what lies between is kept as `unused_0x…`."""
    fields: list[_Any] = []
    position = 0
    for offset, name, count in _APIC_REGISTERS:
        if offset > position:
            fields.append(_raw(f"unused_{position:#05x}", offset - position))
        one = [name / Int32ul, _raw(f"unused_{name}", 12)]
        fields += [name / Array(count, _APIC_WORD)] if count > 1 else one
        position = offset + 16 * count
    assert position == _APIC_PAGE
    return Struct(*fields)


_MP_STATE = Struct("mp_state" / Int32ul)
_VCPU_EVENTS = Struct(
    "exception" / Struct(*_fields(Int8ul, "injected nr has_error_code pending"), "error_code" / Int32ul),
    "interrupt" / Struct(*_fields(Int8ul, "injected nr soft shadow")),
    "nmi" / Struct(*_fields(Int8ul, "injected pending masked pad")),
    *_fields(Int32ul, "sipi_vector flags"),
    "smi" / Struct(*_fields(Int8ul, "smm pending smm_inside_nmi latched_init")),
    "triple_fault" / Struct("pending" / Int8ul),
    _raw("reserved", 26),
    "exception_has_payload" / Int8ul,
    "exception_payload" / Int64ul,
)

_NESTED_VMX = Struct(
    *_fields(Int64ul, "vmxon_pa vmcs12_pa"),
    "smm" / Struct("flags" / Int16ul),
    "pad" / Int16ul,
    "flags" / Int32ul,
    "preemption_timer_deadline" / Int64ul,
    _raw("reserved", 88),
)
_NESTED_SVM = Struct("vmcb_pa" / Int64ul, _raw("reserved", 112))
_NESTED_STATE = Struct(
    *_fields(Int16ul, "flags format"),
    "size" / Int32ul,
    "hdr" / Switch(this.format, {0: _NESTED_VMX, 1: _NESTED_SVM}, default=Bytes(120)),
    "data" / GreedyBytes,
)

_CPUID_ENTRY2 = Struct(
    *_fields(Int32ul, "function index flags eax ebx ecx edx"),
    "padding" / Array(3, Int32ul),
)
_CPUID2 = Struct(*_fields(Int32ul, "nent padding"), "entries" / Array(this.nent, _CPUID_ENTRY2))
_CLOCK_DATA = Struct(
    "clock" / Int64ul,
    *_fields(Int32ul, "flags pad0"),
    *_fields(Int64ul, "realtime host_tsc"),
    "pad" / Array(4, Int32ul),
)

_PIC_STATE = Struct(*_fields(
    Int8ul, "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state "
            "auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"))
_REDIRECTION = ByteSwapped(BitStruct(
    "dest_id" / BitsInteger(8),
    "reserved" / BitsInteger(32),
    "reserve" / BitsInteger(7),
    *_fields(BitsInteger(1), "mask trig_mode remote_irr polarity delivery_status dest_mode"),
    "delivery_mode" / BitsInteger(3),
    "vector" / BitsInteger(8),
))
_IOAPIC_STATE = Struct(
    "base_address" / Int64ul,
    *_fields(Int32ul, "ioregsel id irr pad"),
    "redirtbl" / Array(24, _REDIRECTION),
)
_IRQCHIP_PIC = Struct(*_fields(Int32ul, "chip_id pad"), "pic" / _PIC_STATE, _raw("dummy", 496))
_IRQCHIP_IOAPIC = Struct(*_fields(Int32ul, "chip_id pad"), "ioapic" / _IOAPIC_STATE, _raw("dummy", 296))
_PIT_CHANNEL = Struct(
    "count" / Int32ul,
    "latched_count" / Int16ul,
    *_fields(Int8ul, "count_latched status_latched status read_state write_state write_latch"),
    *_fields(Int8ul, "rw_mode mode bcd gate"),
    "count_load_time" / Int64sl,
)
_PIT_STATE2 = Struct("channels" / Array(3, _PIT_CHANNEL), "flags" / Int32ul, "reserved" / Array(9, Int32ul))

_CAP_TOLD = (*_fields(Int32ul, "cap flags"), "args" / Array(4, Int64ul))
_ENABLE_CAP = Struct(*_CAP_TOLD, _raw("pad", 64))
_ENABLED_CAP = Struct(*_CAP_TOLD)
_MSR_ENTRY = Struct(*_fields(Int32ul, "index reserved"), "data" / Int64ul)
_MSRS = Struct(*_fields(Int32ul, "nmsrs pad"))

_X86 = "arch/x86/include/uapi/asm/kvm.h"
_ALL = "include/uapi/linux/kvm.h"


def _fixed(name: str, size: int, construct: _Any, source: str = _X86) -> Schema:
    return Schema(name, construct, size, source, size)


_SCHEMAS = (
    _fixed("kvm_segment", 24, _SEGMENT),
    _fixed("kvm_dtable", 16, _DTABLE),
    _fixed("kvm_regs", 144, _REGS),
    _fixed("kvm_sregs", 312, _SREGS),
    _fixed("kvm_sregs2", 320, _SREGS2),
    Schema("kvm_xsave", _XSAVE, None, _X86, 4096),
    _fixed("kvm_xcrs", 392, _XCRS),
    _fixed("kvm_debugregs", 128, _DEBUGREGS),
    _fixed("kvm_lapic_state", _APIC_PAGE, _apic_page()),
    _fixed("kvm_mp_state", 4, _MP_STATE, _ALL),
    _fixed("kvm_vcpu_events", 64, _VCPU_EVENTS),
    Schema("kvm_nested_state", _NESTED_STATE, None, _X86, 128),
    _fixed("kvm_cpuid_entry2", 40, _CPUID_ENTRY2),
    Schema("kvm_cpuid2", _CPUID2, None, _X86, 8),
    _fixed("kvm_clock_data", 48, _CLOCK_DATA, _ALL),
    _fixed("kvm_pic_state", 16, _PIC_STATE),
    _fixed("kvm_ioapic_state", 216, _IOAPIC_STATE),
    _fixed("kvm_irqchip_pic", 520, _IRQCHIP_PIC, _ALL),
    _fixed("kvm_irqchip_ioapic", 520, _IRQCHIP_IOAPIC, _ALL),
    _fixed("kvm_pit_channel_state", 24, _PIT_CHANNEL),
    _fixed("kvm_pit_state2", 112, _PIT_STATE2),
    _fixed("kvm_enable_cap", 104, _ENABLE_CAP, _ALL),
    _fixed("enabled_cap", 40, _ENABLED_CAP, _ALL),
    _fixed("kvm_msr_entry", 16, _MSR_ENTRY),
    _fixed("kvm_msrs", 8, _MSRS),
    _fixed("tsc_khz", 4, Struct("tsc_khz" / Int32ul), _ALL),
    _fixed("tsc_offset", 8, Struct("tsc_offset" / Int64ul), _X86),
    _fixed("msr", 8, Struct("data" / Int64ul), _X86),
)

STRUCTS: Mapping[str, Schema] = MappingProxyType({schema.name: schema for schema in _SCHEMAS})
"""Every schema by name. `kvm_irqchip_pic` serves both PICs; `enabled_cap` is kvm_enable_cap without its pad;
`tsc_khz` (kHz), `tsc_offset` (cycles, two's complement) and `msr` are single numbers that the kernel has no
struct for; `kvm_msrs` is the header only."""

COUNTS: Mapping[str, Count] = MappingProxyType({
    "kvm_xcrs": Count("nr_xcrs", 0, 16),
    "kvm_cpuid2": Count("nent", 0, 256, entry=40),
    "kvm_nested_state": Count("size", 4, None),
})
"""The counts inside structs: KVM_MAX_XCRS, KVM_MAX_CPUID_ENTRIES, and the bytes of nested state in use."""


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
