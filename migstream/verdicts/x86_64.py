"""Rules for x86-64, the exceptions before what they are exceptions from. Measured on the lab's kernels 6.1 to 7.2."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from operator import or_

from migstream.host.profile import HostProfile, cpuid_word
from migstream.model import Arch, Slot
from migstream.registers import ids
from migstream.registers.bit_tables import BITS
from migstream.registers.bits import describe
from migstream.registers.cpuid import RUNTIME_BITS, bit_name
from migstream.registers.x86_64 import CPUID2, XSAVE
from migstream.verdicts.facts import Case, absent, both, constant, loses_bits, refuses_bits, value
from migstream.verdicts.model import Answer, Kernel
from migstream.verdicts.rule import Rule

_FITS, _AS, _HARMLESS, _NOTICED, _REFUSED = Answer
_X86 = "arch/x86/kvm/x86.c kvm_set_msr_common"
_MSR_BITS = "profile: bits that KVM_SET_MSRS takes, by trial"
FLAGS = ("MSR_IA32_SPEC_CTRL MSR_IA32_FEAT_CTL MSR_IA32_MISC_ENABLE MSR_MISC_FEATURES_ENABLES MSR_IA32_XSS "
          "MSR_IA32_TSX_CTRL MSR_IA32_ARCH_CAPABILITIES MSR_IA32_PERF_CAPABILITIES MSR_PLATFORM_INFO MSR_K7_HWCR "
          "MSR_KVM_POLL_CONTROL MSR_KVM_MIGRATION_CONTROL MSR_AMD64_DE_CFG MSR_VM_CR MSR_IA32_VMX_MISC "
          "MSR_IA32_VMX_EPT_VPID_CAP MSR_IA32_VMX_BASIC MSR_IA32_VMX_VMFUNC HV_X64_MSR_TSC_INVARIANT_CONTROL "
          "HV_X64_MSR_TSC_EMULATION_CONTROL")
"""MSRs that are sets of flags: of these, trials of single bits tell of any value. Of addresses (canonical or not),
memory types and counters they don't; their values are the guest's state, and KVM takes what it has put out."""

_TSC_ADJUSTABLE = 250
"""Parts in a million: tsc_tolerance_ppm of kvm.ko."""

_VMX_CONTROLS = ("MSR_IA32_VMX_PINBASED_CTLS MSR_IA32_VMX_PROCBASED_CTLS MSR_IA32_VMX_EXIT_CTLS "
                 "MSR_IA32_VMX_ENTRY_CTLS MSR_IA32_VMX_PROCBASED_CTLS2 MSR_IA32_VMX_TRUE_*")

_EVMCS_FILTERED = f"{_VMX_CONTROLS} MSR_IA32_VMX_VMFUNC"
_EVMCS_SOURCE = ("arch/x86/kvm/vmx/hyperv.c nested_evmcs_filter_control_msr; the review of "
                 "KVM_CAP_HYPERV_ENLIGHTENED_VMCS2 (2022): expose the filtered MSRs, go by values and not by a version")

CpuidKey = tuple[int, int]

FEATURE_WORDS: dict[CpuidKey, tuple[int, ...]] = {
    (1, 0): (2, 3), (6, 0): (0,), (7, 0): (1, 2, 3), (7, 1): (0, 1, 3), (7, 2): (3,), (0xD, 0): (0, 3),
    (0xD, 1): (0, 2, 3), (0x14, 0): (1, 2), (0x1E, 1): (0,), (0x24, 0): (1,), (0x4000_0001, 0): (0,),
    (0x8000_0001, 0): (2, 3), (0x8000_0007, 0): (3,), (0x8000_0008, 0): (1,), (0x8000_000A, 0): (3,),
    (0x8000_001F, 0): (0,), (0x8000_0021, 0): (0,),
}
"""Words of CPUID that are sets of features, one bit each: leaf and subleaf, EAX to EDX as 0 to 3 (Intel SDM 2A, AMD
APM 3; KVM's own at 0x40000001). A bit that the guest saw and this KVM does not support was a promise."""

_EVMCS: CpuidKey = (0x4000_000A, 0)
"""Hyper-V's nested features; EAX has the version of the enlightened VMCS."""

@lru_cache(maxsize=64)
def entries(cpuid: bytes) -> dict[CpuidKey, tuple[int, int, int, int]]:
    """struct kvm_cpuid2 as a table: EAX, EBX, ECX, EDX by leaf and subleaf."""
    count = struct.unpack_from("<I", cpuid)[0] if len(cpuid) >= 8 else 0
    rows = (struct.unpack_from("<7I", cpuid, 8 + 40 * k) for k in range(min(count, (len(cpuid) - 8) // 40)))
    return {(function, index): tuple(words) for function, index, _, *words in rows}


@lru_cache(maxsize=8)
def features_of(cpuids: tuple[bytes, ...]) -> dict[tuple[int, int, int], int]:
    """Feature bits that some of these tables have, by leaf, subleaf and word. Kept: many hosts are asked."""
    found: dict[tuple[int, int, int], int] = {}
    for table in map(entries, cpuids):
        for key, words in (*FEATURE_WORDS.items(), (_EVMCS, (0,))):
            for word in words if key in table else ():
                found[(*key, word)] = found.get((*key, word), 0) | table[key][word]
    return found


def _promised(case: Case) -> Iterator[str]:
    """Features that the guest's CPUID has and this KVM does not support."""
    here = entries(case.host.cpuid)
    for (leaf, index, word), had in features_of(case.known.distinct).items():
        if (leaf, index) == _EVMCS:
            continue
        _, forced = case.host.cpuid_forced.get(cpuid_word(leaf, index, word), (0, 0))
        known = here.get((leaf, index), (0, 0, 0, 0))[word] | forced | RUNTIME_BITS.get((leaf, index, word), 0)
        for bit in (bit for bit in range(32) if had & ~known & 1 << bit):
            yield f"CPUID {leaf:#x}.{index}:{('EAX', 'EBX', 'ECX', 'EDX')[word]} {bit_name(leaf, index, word, bit)}"


def _missing_features(case: Case) -> bool:
    return bool(case.host.cpuid) and next(_promised(case), None) is not None


def _cpuid_text(case: Case) -> str:
    found = list(_promised(case))
    return f"{', '.join(found[:6])}{f' and {len(found) - 6} more' if len(found) > 6 else ''}: not supported here"


_XSTATE_BV = slice(512, 520)
"""Of KVM_XSAVE: the components that are not in their initial state (struct xstate_header; Intel SDM 1, 13.4.2)."""


def components(cpuid: bytes) -> int:
    """XSAVE components that a table of CPUID has, a bit each: leaf 0xD, EAX and EDX of subleaf 0."""
    low, _, _, high = entries(cpuid).get((0xD, 0), (0, 0, 0, 0))
    return high << 32 | low


def _not_here(case: Case) -> int:
    """Components in use that the host has not; 0 where its profile does not say what it has."""
    here = components(case.host.cpuid)
    used = [int.from_bytes(value[_XSTATE_BV], "little") for value in case.known.distinct]
    return reduce(or_, used, 0) & ~(here | _ALWAYS) if here else 0


_ALWAYS = 0b11
"""x87 and SSE: every CPU with FXSAVE."""


def _xsave_decides(host: HostProfile) -> tuple[tuple[int, int], ...]:
    """Components that the host has not, of XSTATE_BV; the rest of KVM_XSAVE is the guest's own affair."""
    here = components(host.cpuid)
    return ((_XSTATE_BV.start // 8, ~(here | _ALWAYS) & 2**64 - 1),) if here else ()


DECIDING: dict[int, Callable[[HostProfile], tuple[tuple[int, int], ...]]] = {XSAVE.id: _xsave_decides}
"""Registers of whose value the rules below look at a part alone: (word, bits); the rest is never the same twice."""


def _component_names(case: Case) -> str:
    return ", ".join(describe(BITS["XCR0"], _not_here(case))) or f"{_not_here(case):#x}"


def _wider(case: Case) -> bool:
    size = case.host.sizes.get(case.slot.id, 0)
    return 0 < size < case.slot.size


def _controls_missing(case: Case) -> bool:
    """A control that the guest may set (high half) and the host may not, or must set here and the guest need not."""
    here = case.host.feature_msrs.get(ids.msr_index(case.slot.id) or 0)
    if here is None:
        return False
    high, low = here >> 32, here & 0xFFFF_FFFF
    return any(number >> 32 & ~high or low & ~(number & 0xFFFF_FFFF) for number in case.known.numbers)


def _controls(case: Case) -> str:
    here = case.host.feature_msrs[ids.msr_index(case.slot.id) or 0]
    lost = {number >> 32 & ~(here >> 32) for number in case.known.numbers}
    return f"VMX controls {max(lost):#x} that a nested hypervisor was offered are not here"


def _evmcs(case: Case) -> bool:
    """The guest's CPUID has an enlightened VMCS version (0x4000000A.EAX), and this KVM has none."""
    version = features_of(case.known.distinct).get((*_EVMCS, 0), 0) & 0xFFFF
    return bool(version) and not case.host.capabilities.get("HYPERV_ENLIGHTENED_VMCS")


EVMCS_CAP = 163
"""KVM_CAP_HYPERV_ENLIGHTENED_VMCS."""


def _uses_evmcs(case: Case) -> bool:
    """Its CPUID has a version of the enlightened VMCS, or its VMM has enabled it."""
    if ids.capability_id(Arch.X86_64, EVMCS_CAP) in case.pair.saved.columns:
        return True
    cpuid = case.pair.saved.columns.get(CPUID2.id)
    return cpuid is not None and bool(features_of(cpuid.distinct).get((*_EVMCS, 0), 0) & 0xFFFF)


def _left_by_evmcs(case: Case) -> int | None:
    """The MSR as a guest with an enlightened VMCS reads it on the host; None where nobody has recorded that."""
    return case.host.behaviour.get(f"evmcs_msr_{ids.msr_index(case.slot.id) or 0:x}")


def _evmcs_loses(case: Case) -> int:
    """Controls that the guest was offered and does not find here: the allowed ones, or what VMFUNC has."""
    here, width = _left_by_evmcs(case), 0 if case.row.name.endswith("_VMFUNC") else 32
    return 0 if here is None else reduce(or_, case.known.numbers) >> width & ~(here >> width)


def _evmcs_less(case: Case) -> bool:
    return _uses_evmcs(case) and bool(_evmcs_loses(case))


def _evmcs_made_here(case: Case) -> bool:
    here = _left_by_evmcs(case)
    return _uses_evmcs(case) and here is not None and constant(case) and bool(case.known.differing(here))


def _evmcs_unknown(case: Case) -> bool:
    """Nobody has recorded the filter here, and the guest is another kernel's."""
    contract = case.pair.saved.contract
    elsewhere = contract is None or contract.kernel != case.host.kernel
    return elsewhere and _uses_evmcs(case) and _left_by_evmcs(case) is None


def _other_rate(case: Case) -> bool:
    """Another TSC frequency than the host's, by more than KVM lets pass, without a TSC that can be scaled."""
    host = case.default
    if not host or case.host.capabilities.get("TSC_CONTROL"):
        return False
    return any(abs(number - host) * 1_000_000 > _TSC_ADJUSTABLE * host for number in case.known.numbers)


def _bad_types(case: Case) -> bool:
    """A PAT entry that is no memory type: 0, 1, 4, 5, 6 and 7 are."""
    return any(byte not in (0, 1, 4, 5, 6, 7) for value in case.known.distinct for byte in value)



def _efer_refused(case: Case) -> bool:
    taken = case.host.behaviour.get("efer_taken")
    return taken is not None and any(number & ~taken for number in case.known.numbers)


RULES: tuple[Rule, ...] = (
    Rule("KVM_VCPU_TSC_OFFSET", lambda case: True, _HARMLESS,
         "it is relative to one host's TSC; MSR_IA32_TSC restores the guest's, and offsets that differ are moved",
         "Documentation/virt/kvm/devices/vcpu.rst; profile: tsc_offset_kept",
         lambda case: Kernel.TAKES if case.host.behaviour.get("tsc_offset_kept") else Kernel.UNKNOWN),
    Rule("KVM_CPUID2", _evmcs, _REFUSED, "its guest uses the enlightened VMCS, which this KVM hasn't",
         "KVM_CAP_HYPERV_ENLIGHTENED_VMCS; CPUID 0x4000000A.EAX", Kernel.TAKES),
    Rule("KVM_CPUID2", _missing_features, _NOTICED, _cpuid_text,
         "KVM_GET_SUPPORTED_CPUID; KVM_SET_CPUID2 takes more and then an instruction of it ends in #UD", Kernel.TAKES),
    Rule("KVM_TSC_KHZ", _other_rate, _NOTICED, "{value} kHz, this host's TSC runs at {host} and can't be scaled",
         "arch/x86/kvm/x86.c set_tsc_khz; KVM_CAP_TSC_CONTROL", Kernel.UNKNOWN),
    Rule("KVM_XSAVE", lambda case: bool(_not_here(case)), _REFUSED,
         lambda case: f"components in use that this host has not: {_component_names(case)}",
         "arch/x86/kernel/fpu/xstate.c validate_user_xstate_header; CPUID 0xD.0", Kernel.REFUSES),
    Rule("KVM_XSAVE", both(_wider, lambda case: bool(components(case.host.cpuid))), _AS,
         lambda case: f"{case.host.sizes[case.slot.id]} of {case.slot.size} bytes: what is not here is not in use",
         "KVM_CAP_XSAVE2: KVM_SET_XSAVE reads as many bytes as the host has", Kernel.TAKES,
         target=lambda case: Slot(case.slot.id, case.host.sizes[case.slot.id])),
    Rule("KVM_XSAVE", _wider, _REFUSED, lambda case: f"{case.slot.size} bytes of XSAVE components, this host has "
         f"{case.host.sizes[case.slot.id]}", "KVM_CAP_XSAVE2", Kernel.UNKNOWN),
    Rule(_EVMCS_FILTERED, _evmcs_less, _NOTICED, lambda case: f"controls {_evmcs_loses(case):#x} that a nested "
         "hypervisor with an enlightened VMCS was offered are filtered here", _EVMCS_SOURCE,
         lambda case: Kernel.REFUSES if constant(case) else Kernel.DROPS),
    Rule(_EVMCS_FILTERED, _evmcs_made_here, _NOTICED, lambda case: f"KVM makes it itself, and shows a guest with an "
         f"enlightened VMCS {_left_by_evmcs(case):#x} here; it was {case.known.numbers[0]:#x}", _EVMCS_SOURCE),
    Rule(_EVMCS_FILTERED, _evmcs_unknown, _NOTICED, "its guest uses the enlightened VMCS; nobody has recorded which "
         "of these controls this KVM leaves it: version 1 has had three sets", _EVMCS_SOURCE, Kernel.UNKNOWN),
    Rule(_VMX_CONTROLS, _controls_missing, _NOTICED, _controls,
         "Intel SDM 3D, A.3: the high half may be 1, the low half must be; filtered sets differ under eVMCS"),
    # not listed: KVM gives the number no state, and most answer 0 to a read
    Rule("MSR_K7_EVNTSEL* MSR_K7_PERFCTR*", both(absent, value(0)), _HARMLESS,
         "its counters were never used; this kernel has no vPMU and ignores a write of 0",
         f"{_X86}: K7 numbers are taken and dropped without a vPMU; measured in the lab", Kernel.TAKES),
    Rule("MSR_IA32_DEBUGCTLMSR", both(absent, value(0)), _HARMLESS,
         "no branch tracing was on; older kernels take the MSR without listing it",
         "arch/x86/kvm/svm/svm.c svm_set_msr, listed since 6.18 or so; measured in the lab", Kernel.TAKES),
    Rule("MSR_* HV_X64_MSR_* X2APIC_*", both(absent, value(0)), _HARMLESS,
         "this kernel has no such MSR, and the guest's is 0: what it was never given a value reads as",
         "profile: KVM_GET_MSR_INDEX_LIST"),
    Rule("MSR_* HV_X64_MSR_* X2APIC_*", absent, _REFUSED, "this kernel does not list the MSR, and the guest's is "
         "{value}", "profile: KVM_GET_MSR_INDEX_LIST"),
    Rule("KVM_*", absent, _REFUSED,
         lambda case: f"this kernel has no KVM_CAP_{case.row.needs}", "profile: capabilities"),
    # values
    Rule("MSR_IA32_CR_PAT", _bad_types, _REFUSED, "{value} has a memory type that there is not",
         f"{_X86} kvm_pat_valid"),
    Rule("MSR_EFER", _efer_refused, _REFUSED, "{value}: bits that this kernel does not take", "profile: efer_taken"),
    Rule(FLAGS, refuses_bits, _REFUSED, "{value}: bits that this kernel refuses: {bits}", _MSR_BITS),
    Rule(FLAGS, loses_bits, _NOTICED, "{value}: bits of it read back as here: {bits}", _MSR_BITS, Kernel.DROPS),
)

