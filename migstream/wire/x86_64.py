"""Schemas of the KVM structs of x86-64 that travel in a stream; field names are the kernel's.

Sources: Linux arch/x86/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h; the local APIC's registers
arch/x86/include/asm/apicdef.h; the XSAVE area Intel SDM volume 1, 13.4. All little-endian. A schema keeps
every byte: padding is a named field, so that `build(name, parse(name, data)) == data`. Nothing here is on the
way of a restore: the bytes go to the kernel as they are; this is for showing, comparing and editing.
`migstream.wire.structs` parses and builds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from construct import (
    Array,
    BitsInteger,
    BitStruct,
    Bytes,
    ByteSwapped,
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

from migstream.wire.schema import AnyConstruct, Count, Schema, fields, fixed, raw

_SEGMENT = Struct(
    "base" / Int64ul,
    "limit" / Int32ul,
    "selector" / Int16ul,
    *fields(Int8ul, "type present dpl db s l g avl unusable padding"),
)
_DTABLE = Struct("base" / Int64ul, "limit" / Int16ul, "padding" / Array(3, Int16ul))
_REGS = Struct(*fields(Int64ul, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"))
_SREGS_COMMON = (
    *fields(_SEGMENT, "cs ds es fs gs ss tr ldt"),
    *fields(_DTABLE, "gdt idt"),
    *fields(Int64ul, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
)
_SREGS = Struct(*_SREGS_COMMON, "interrupt_bitmap" / Array(4, Int64ul))
_SREGS2 = Struct(*_SREGS_COMMON, "flags" / Int64ul, "pdptrs" / Array(4, Int64ul))

_XSAVE = Struct(
    *fields(Int16ul, "fcw fsw"),
    *fields(Int8ul, "ftw reserved_5"),
    "fop" / Int16ul,
    *fields(Int64ul, "rip rdp"),
    *fields(Int32ul, "mxcsr mxcsr_mask"),
    "st" / Array(8, Bytes(16)),
    "xmm" / Array(16, Bytes(16)),
    raw("reserved_416", 48),
    raw("sw_reserved", 48),
    *fields(Int64ul, "xstate_bv xcomp_bv"),
    raw("reserved_528", 48),
    raw("extended", 4096 - 576),
    "extra" / GreedyBytes,
)
_XCR = Struct(*fields(Int32ul, "xcr reserved"), "value" / Int64ul)
_XCRS = Struct(*fields(Int32ul, "nr_xcrs flags"), "xcrs" / Array(16, _XCR), "padding" / Array(16, Int64ul))
_DEBUGREGS = Struct(
    "db" / Array(4, Int64ul),
    *fields(Int64ul, "dr6 dr7 flags"),
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


def _apic_page() -> AnyConstruct:
    """The registers at their offsets, 32 bits in 16 bytes each; what lies between is kept as `unused_0x…`."""
    page: list[AnyConstruct] = []
    position = 0
    for offset, name, count in _APIC_REGISTERS:
        if offset > position:
            page.append(raw(f"unused_{position:#05x}", offset - position))
        one = [name / Int32ul, raw(f"unused_{name}", 12)]
        page += [name / Array(count, _APIC_WORD)] if count > 1 else one
        position = offset + 16 * count
    assert position == _APIC_PAGE
    return Struct(*page)


_MP_STATE = Struct("mp_state" / Int32ul)
_VCPU_EVENTS = Struct(
    "exception" / Struct(*fields(Int8ul, "injected nr has_error_code pending"), "error_code" / Int32ul),
    "interrupt" / Struct(*fields(Int8ul, "injected nr soft shadow")),
    "nmi" / Struct(*fields(Int8ul, "injected pending masked pad")),
    *fields(Int32ul, "sipi_vector flags"),
    "smi" / Struct(*fields(Int8ul, "smm pending smm_inside_nmi latched_init")),
    "triple_fault" / Struct("pending" / Int8ul),
    raw("reserved", 26),
    "exception_has_payload" / Int8ul,
    "exception_payload" / Int64ul,
)

_NESTED_VMX = Struct(
    *fields(Int64ul, "vmxon_pa vmcs12_pa"),
    "smm" / Struct("flags" / Int16ul),
    "pad" / Int16ul,
    "flags" / Int32ul,
    "preemption_timer_deadline" / Int64ul,
    raw("reserved", 88),
)
_NESTED_SVM = Struct("vmcb_pa" / Int64ul, raw("reserved", 112))
_NESTED_STATE = Struct(
    *fields(Int16ul, "flags format"),
    "size" / Int32ul,
    "hdr" / Switch(this.format, {0: _NESTED_VMX, 1: _NESTED_SVM}, default=Bytes(120)),
    "data" / GreedyBytes,
)

_CPUID_ENTRY2 = Struct(
    *fields(Int32ul, "function index flags eax ebx ecx edx"),
    "padding" / Array(3, Int32ul),
)
_CPUID2 = Struct(*fields(Int32ul, "nent padding"), "entries" / Array(this.nent, _CPUID_ENTRY2))
_CLOCK_DATA = Struct(
    "clock" / Int64ul,
    *fields(Int32ul, "flags pad0"),
    *fields(Int64ul, "realtime host_tsc"),
    "pad" / Array(4, Int32ul),
)

_PIC_STATE = Struct(*fields(
    Int8ul, "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state "
            "auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"))
_REDIRECTION = ByteSwapped(BitStruct(
    "dest_id" / BitsInteger(8),
    "reserved" / BitsInteger(32),
    "reserve" / BitsInteger(7),
    *fields(BitsInteger(1), "mask trig_mode remote_irr polarity delivery_status dest_mode"),
    "delivery_mode" / BitsInteger(3),
    "vector" / BitsInteger(8),
))
_IOAPIC_STATE = Struct(
    "base_address" / Int64ul,
    *fields(Int32ul, "ioregsel id irr pad"),
    "redirtbl" / Array(24, _REDIRECTION),
)
_IRQCHIP_PIC = Struct(*fields(Int32ul, "chip_id pad"), "pic" / _PIC_STATE, raw("dummy", 496))
_IRQCHIP_IOAPIC = Struct(*fields(Int32ul, "chip_id pad"), "ioapic" / _IOAPIC_STATE, raw("dummy", 296))
_PIT_CHANNEL = Struct(
    "count" / Int32ul,
    "latched_count" / Int16ul,
    *fields(Int8ul, "count_latched status_latched status read_state write_state write_latch"),
    *fields(Int8ul, "rw_mode mode bcd gate"),
    "count_load_time" / Int64sl,
)
_PIT_STATE2 = Struct("channels" / Array(3, _PIT_CHANNEL), "flags" / Int32ul, "reserved" / Array(9, Int32ul))

_CAP_TOLD = (*fields(Int32ul, "cap flags"), "args" / Array(4, Int64ul))
_ENABLE_CAP = Struct(*_CAP_TOLD, raw("pad", 64))
_ENABLED_CAP = Struct(*_CAP_TOLD)
_MSR_ENTRY = Struct(*fields(Int32ul, "index reserved"), "data" / Int64ul)
_MSRS = Struct(*fields(Int32ul, "nmsrs pad"))

_X86 = "arch/x86/include/uapi/asm/kvm.h"
_ALL = "include/uapi/linux/kvm.h"


_SCHEMAS = (
    fixed("kvm_segment", 24, _SEGMENT, _X86),
    fixed("kvm_dtable", 16, _DTABLE, _X86),
    fixed("kvm_regs", 144, _REGS, _X86),
    fixed("kvm_sregs", 312, _SREGS, _X86),
    fixed("kvm_sregs2", 320, _SREGS2, _X86),
    Schema("kvm_xsave", _XSAVE, None, _X86, 4096),
    fixed("kvm_xcrs", 392, _XCRS, _X86),
    fixed("kvm_debugregs", 128, _DEBUGREGS, _X86),
    fixed("kvm_lapic_state", _APIC_PAGE, _apic_page(), _X86),
    fixed("kvm_mp_state", 4, _MP_STATE, _ALL),
    fixed("kvm_vcpu_events", 64, _VCPU_EVENTS, _X86),
    Schema("kvm_nested_state", _NESTED_STATE, None, _X86, 128),
    fixed("kvm_cpuid_entry2", 40, _CPUID_ENTRY2, _X86),
    Schema("kvm_cpuid2", _CPUID2, None, _X86, 8),
    fixed("kvm_clock_data", 48, _CLOCK_DATA, _ALL),
    fixed("kvm_pic_state", 16, _PIC_STATE, _X86),
    fixed("kvm_ioapic_state", 216, _IOAPIC_STATE, _X86),
    fixed("kvm_irqchip_pic", 520, _IRQCHIP_PIC, _ALL),
    fixed("kvm_irqchip_ioapic", 520, _IRQCHIP_IOAPIC, _ALL),
    fixed("kvm_pit_channel_state", 24, _PIT_CHANNEL, _X86),
    fixed("kvm_pit_state2", 112, _PIT_STATE2, _X86),
    fixed("kvm_enable_cap", 104, _ENABLE_CAP, _ALL),
    fixed("enabled_cap", 40, _ENABLED_CAP, _ALL),
    fixed("kvm_msr_entry", 16, _MSR_ENTRY, _X86),
    fixed("kvm_msrs", 8, _MSRS, _X86),
    fixed("tsc_khz", 4, Struct("tsc_khz" / Int32ul), _ALL),
    fixed("tsc_offset", 8, Struct("tsc_offset" / Int64ul), _X86),
    fixed("msr", 8, Struct("data" / Int64ul), _X86),
)

STRUCTS: Mapping[str, Schema] = MappingProxyType({schema.name: schema for schema in _SCHEMAS})
"""Every schema by name; kvm_mp_state and the enabled capability are arm64's, too. `kvm_irqchip_pic` serves both PICs;
`enabled_cap` is kvm_enable_cap without its pad; `tsc_khz` (kHz), `tsc_offset` (cycles, two's complement) and `msr` are
single numbers that the kernel has no struct for; `kvm_msrs` is the header only."""

COUNTS: Mapping[str, Count] = MappingProxyType({
    "kvm_xcrs": Count("nr_xcrs", 0, 16),
    "kvm_cpuid2": Count("nent", 0, 256, entry=40),
    "kvm_nested_state": Count("size", 4, None),
})
"""The counts inside structs: KVM_MAX_XCRS, KVM_MAX_CPUID_ENTRIES, and the bytes of nested state in use."""
