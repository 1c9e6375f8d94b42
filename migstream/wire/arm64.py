"""Schemas of the KVM structs of arm64 that travel in a stream; field names are the kernel's.

Sources: Linux arch/arm64/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h. All little-endian. As in
`migstream.wire.x86_64` a schema keeps every byte. kvm_mp_state and the enabled capability are the same on both
architectures and are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from construct import Array, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from migstream.wire.schema import Schema, fields, fixed, raw

_VCPU_INIT = Struct("target" / Int32ul, "features" / Array(7, Int32ul))
_VCPU_EVENTS = Struct(
    "exception" / Struct(
        *fields(Int8ul, "serror_pending serror_has_esr ext_dabt_pending"),
        raw("pad", 5),
        "serror_esr" / Int64ul,
    ),
    raw("reserved", 48),
)
_COUNTER_OFFSET = Struct(*fields(Int64ul, "counter_offset reserved"))
_SMCCC_FILTER = Struct(*fields(Int32ul, "base nr_functions"), "action" / Int8ul, raw("pad", 15))
_PMU_EVENT_FILTER = Struct(*fields(Int16ul, "base_event nevents"), "action" / Int8ul, raw("pad", 3))
_SVE_VLS = Struct("vqs" / Array(8, Int64ul))

_ARM64 = "arch/arm64/include/uapi/asm/kvm.h"

_SCHEMAS = (
    fixed("kvm_vcpu_init", 32, _VCPU_INIT, _ARM64),
    fixed("kvm_vcpu_events_arm64", 64, _VCPU_EVENTS, _ARM64),
    fixed("kvm_arm_counter_offset", 16, _COUNTER_OFFSET, _ARM64),
    fixed("kvm_smccc_filter", 24, _SMCCC_FILTER, _ARM64),
    fixed("kvm_pmu_event_filter_arm64", 8, _PMU_EVENT_FILTER, _ARM64),
    fixed("sve_vls", 64, _SVE_VLS, _ARM64),
)

STRUCTS: Mapping[str, Schema] = MappingProxyType({schema.name: schema for schema in _SCHEMAS})
"""Every schema by name. `_arm64` is behind the names that x86-64 has for another struct; `sve_vls` is ours for
KVM_REG_ARM64_SVE_VLS, a bitmap of vector lengths in quadwords. kvm_smccc_filter and kvm_pmu_event_filter_arm64 are
what KVM_SET_DEVICE_ATTR points at; KVM can be told them but not asked."""
