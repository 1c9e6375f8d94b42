"""Optional rules of x86-64 kernels: MSRs that come and go, CPUID bits that go, VMX MSRs filtered for eVMCS."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migstream.backends.sim.variants import Subject, Variant, behaves
from migstream.errors import UsageError
from migstream.model import Arch
from migstream.registers import ids
from migstream.registers.msrs import MSRS, name

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

_U64 = (1 << 64) - 1
_X86 = (Arch.X86_64,)

EVMCS_CAP = 163
"""KVM_CAP_HYPERV_ENLIGHTENED_VMCS; its first argument is the version range, 0x0101 today."""

GENERATIONS = {"5.17": 1, "6.1": 2, "allow-list": 3}
"""The filters that eVMCS version 1 has had, by the trait `evmcs_filter`."""

_PIN, _PROC, _EXIT, _ENTRY = 0x0000_0016, 0x0401_E172, 0x0003_6DFF, 0x0000_11FF
VMX = {
    0x480: 0x00DA_0400_1100_0001, 0x481: 0xFF << 32 | _PIN, 0x482: 0xFFFF_FFFE << 32 | _PROC,
    0x483: 0x03FF_FFFF << 32 | _EXIT, 0x484: 0x0007_FFFF << 32 | _ENTRY, 0x485: 0x2000_0065, 0x486: 0x8000_0021,
    0x487: 0xFFFF_FFFF, 0x488: 0x2000, 0x489: 0x0037_27FF, 0x48A: 0x2E, 0x48B: 0xC71B_FFFF << 32,
    0x48C: 0x0F01_0673_4141, 0x48D: 0xFF << 32 | _PIN, 0x48E: 0xFFFF_FFFE << 32 | 0x0400_6172,
    0x48F: 0x03FF_FFFF << 32 | 0x0003_6DFB, 0x490: 0x0007_FFFF << 32 | 0x0000_11FB, 0x491: 0x1,
}
"""VMX capability MSRs of a kernel with nested VMX, unfiltered: allowed-1 settings in the high half hold every control
that one of the filters knows; must-be-1 settings in the low half are those of the SDM (volume 3, appendix A)."""

DERIVED = (0x481, 0x482, 0x483, 0x484, 0x487, 0x489)
"""VMX MSRs that KVM makes from the TRUE forms or from CPUID, and refuses to have written (`rules_vmx`)."""

_HIGH = _U64 ^ 0xFFFF_FFFF


def _kept(high: int) -> int:
    return high << 32 | 0xFFFF_FFFF


def _removed(high: int) -> int:
    return _U64 ^ high << 32


PERF_GLOBAL = {0x483: _removed(0x1000), 0x48F: _removed(0x1000), 0x484: _removed(0x2000), 0x490: _removed(0x2000)}
"""LOAD_IA32_PERF_GLOBAL_CTRL among the VM-exit and VM-entry controls, as a filter: since 6.1 it stays where the VMM
sets `PERF_GLOBAL_CPUID`, and for no guest before."""

PERF_GLOBAL_CPUID = (0x4000_000A, 0, 1, 0)
"""HYPERV_CPUID_NESTED_FEATURES: leaf, subleaf, EBX, bit; HV_X64_NESTED_EVMCS1_PERF_GLOBAL_CTRL."""

FILTERS: dict[int, dict[int, int]] = {
    1: {0x481: _removed(0xC0), 0x48D: _removed(0xC0), 0x48B: _removed(0x0202_6701), 0x483: _removed(0x0040_1000),
        0x48F: _removed(0x0040_1000), 0x484: _removed(0x2000), 0x490: _removed(0x2000), 0x491: _U64 ^ 1},
    2: {0x481: _removed(0xC0), 0x48D: _removed(0xC0), 0x48B: _removed(0x0202_6701), 0x483: _removed(0x0040_0000),
        0x48F: _removed(0x0040_0000), 0x491: _U64 ^ 1},
    3: {0x481: _kept(0x3F), 0x48D: _kept(0x3F), 0x482: _kept(0xFFF9_FFFE), 0x48E: _kept(0xFFF9_FFFE),
        0x48B: _kept(0xC719_98FE), 0x483: _kept(0x03BF_FFFF), 0x48F: _kept(0x03BF_FFFF), 0x484: _kept(0x0007_F3FF),
        0x490: _kept(0x0007_F3FF), 0x491: 0},
}
"""By generation: MSR to the bits that stay. 1: arch/x86/kvm/vmx/evmcs.h of 5.17. 2: 6.1, which allows the two
PERF_GLOBAL_CTRL controls. 3: the allow-list of vmx/hyperv_evmcs.h. In 2 and 3 `PERF_GLOBAL` goes, too, without its
bit in CPUID."""


def _evmcs(profile: HostProfile, argument: str) -> HostProfile:
    offered = {index: value for index, value in VMX.items() if index not in profile.feature_msrs}
    if len(offered) < len(VMX):
        raise UsageError("the kernel has VMX MSRs of its own")
    fixed = {ids.msr_id(index): (0, 0) for index in DERIVED}
    bits = {index: (0, 0) if index in DERIVED else (value, value) for index, value in offered.items()}
    return behaves(
        replace(profile, feature_msrs={**profile.feature_msrs, **offered},
                capabilities={**profile.capabilities, "HYPERV_ENLIGHTENED_VMCS": 1},
                enable_caps={**profile.enable_caps, EVMCS_CAP: 0xFFFF},
                defaults={**profile.defaults, **{ids.msr_id(n): struct.pack("<Q", v) for n, v in offered.items()}},
                msr_bits={**profile.msr_bits, **bits},
                scopes={**profile.scopes, **dict.fromkeys(map(ids.msr_id, offered), "vcpu"),
                        **dict.fromkeys(fixed, "fixed")}),
        evmcs_filter=GENERATIONS[argument.removeprefix("=")],
        **{f"evmcs_msr_{index:x}": value & FILTERS[GENERATIONS[argument.removeprefix("=")]].get(index, _U64)
           for index, value in VMX.items()})


_BY_NAME = {row.name: row.index for row in MSRS}


def _msr(argument: str) -> int:
    word = argument.removeprefix("=")
    try:
        return _BY_NAME[word] if word in _BY_NAME else int(word, 0)
    except ValueError:
        raise UsageError(f"no MSR {word!r}; give its number or the kernel's name") from None


def _subject(argument: str) -> Subject:
    try:
        return ("MSR", _msr(argument))
    except UsageError:
        return ("MSR", argument)


def _hide_msr(profile: HostProfile, argument: str) -> HostProfile:
    index = _msr(argument)
    if index not in profile.msrs and index not in profile.feature_msrs:
        raise UsageError(f"the kernel has no {name(index)} to hide")
    id = ids.msr_id(index)
    by_id = ("defaults", "refused", "scopes", "scope_found", "register_bits", "bit_errnos", "readback", "after_run")
    gone: dict[str, Any] = {field: {key: value for key, value in getattr(profile, field).items() if key != id}
                            for field in by_id}
    return replace(profile, msrs=tuple(n for n in profile.msrs if n != index),
                   feature_msrs={n: v for n, v in profile.feature_msrs.items() if n != index},
                   msr_bits={n: pair for n, pair in profile.msr_bits.items() if n != index}, **gone)


UNLISTED = frozenset((0x1B, 0xC000_0080, 0xC000_0100, 0xC000_0101, *range(0x400, 0x480), *range(0x800, 0x900)))
"""MSRs that KVM has whatever it lists: those of kvm_sregs (APIC base, EFER, FS and GS base), the banks of
KVM_X86_SETUP_MCE and the x2APIC's registers (kvm_get_msr_common)."""


def _add_msr(profile: HostProfile, argument: str) -> HostProfile:
    index = _msr(argument)
    if index in profile.msrs or index in profile.feature_msrs:
        raise UsageError(f"the kernel has {name(index)} already")
    if index >> 32:
        raise UsageError(f"{index:#x} is no MSR: they have 32 bits")
    if index in UNLISTED:
        raise UsageError(f"the kernel has {name(index)} already, and does not list it")
    id = ids.msr_id(index)
    return replace(profile, msrs=(*profile.msrs, index), defaults={**profile.defaults, id: bytes(8)},
                   msr_bits={**profile.msr_bits, index: (_U64, _U64)}, scopes={**profile.scopes, id: "vcpu"})


_REGISTERS = ("eax", "ebx", "ecx", "edx")


def _clear_cpuid(profile: HostProfile, argument: str) -> HostProfile:
    leaf, subleaf, register, bit = argument.removeprefix("=").split(".")
    wanted, flag = (int(leaf, 0), int(subleaf, 0)), 1 << int(bit)
    table = bytearray(profile.cpuid)
    for entry in range(8, len(table), 40):
        place = entry + 12 + 4 * _REGISTERS.index(register)
        (value,) = struct.unpack_from("<I", table, place)
        if struct.unpack_from("<II", table, entry) == wanted and value & flag:
            struct.pack_into("<I", table, place, value ^ flag)
            return replace(profile, cpuid=bytes(table))
    raise UsageError("the kernel's KVM_GET_SUPPORTED_CPUID has no such bit set")


_AN_MSR = "an MSR's number or the kernel's name of it"
_NUMBER = "0x[0-9a-f]{1,8}|[0-9]{1,10}"

VARIANTS = (
    Variant("evmcs", "=5.17|6.1|allow-list", "=(?:5[.]17|6[.]1|allow-list)", _X86,
            "VMX MSRs, taken as vmx_set_vmx_msr does; they read filtered once KVM_CAP_HYPERV_ENLIGHTENED_VMCS is "
            "enabled (of the VM). They alone: no VMX in CPUID; nested state stays SVM's on an AMD kernel",
            "the review of KVM_CAP_HYPERV_ENLIGHTENED_VMCS2 (2022): expose the filtered VMX MSRs", _evmcs,
            takes="one of 5.17, 6.1 and allow-list, whose filter it is"),
    Variant("hide-msr", "=MSR", "=[A-Za-z0-9_]+", _X86, "the kernel knows this MSR no more",
            "6.1 lists 97 MSRs, 6.12 68 of them", _hide_msr, several=True, subject=_subject, takes=_AN_MSR),
    Variant("add-msr", "=MSR", "=[A-Za-z0-9_]+", _X86, "a new MSR of a vCPU: all bits are kept, 0 at first",
            "7.2 lists MSRs that 6.12 has not", _add_msr, several=True, subject=_subject, takes=_AN_MSR),
    Variant("clear-cpuid", "=LEAF.SUBLEAF.REGISTER.BIT",
            f"=(?:{_NUMBER})[.](?:{_NUMBER})[.]e[abcd]x[.](?:[12]?[0-9]|3[01])", _X86,
            "KVM_GET_SUPPORTED_CPUID without one bit, such as 0x7.0.ebx.20",
            "a microcode update or a mitigation that takes a feature away (TSX)", _clear_cpuid, several=True,
            takes="leaf and subleaf as numbers, a register of eax, ebx, ecx and edx, a bit from 0 to 31"),
)
