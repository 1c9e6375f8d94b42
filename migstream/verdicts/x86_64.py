"""Rules for x86-64, the exceptions before what they are exceptions from. Measured on the lab's kernels 6.1 to 7.2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, reduce
from operator import or_

from migstream.host.profile import HostProfile, cpuid_word
from migstream.model import Arch, Slot
from migstream.registers import ids
from migstream.registers.bit_tables import BITS
from migstream.registers.bits import describe
from migstream.registers.cpuid import EAX, EBX, EDX, FEATURE_WORDS, RUNTIME_BITS, Word, bit_name, cpuid_words
from migstream.registers.x86_64 import CPUID2, SREGS2, TSC_KHZ
from migstream.verdicts.facts import Case, absent, both, constant, loses_bits, refuses_bits, value
from migstream.verdicts.model import Answer, Kernel, Question
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

IN_PART = ("MSR_IA32_DEBUGCTLMSR MSR_AMD64_VIRT_SPEC_CTRL MSR_AMD64_TSC_RATIO MSR_VM_HSAVE_PA MSR_TSC_AUX "
           "MSR_K7_EVNTSEL* MSR_K7_PERFCTR* HV_X64_MSR_VP_INDEX HV_X64_MSR_CRASH_CTL HV_X64_MSR_APIC_FREQUENCY")
"""MSRs of which some kernel takes bits that it does not keep: all of them where it has no such thing for a guest."""

_TSC_ADJUSTABLE = 250
"""Parts in a million: tsc_tolerance_ppm of kvm.ko."""

_VMX_CONTROLS = ("MSR_IA32_VMX_PINBASED_CTLS MSR_IA32_VMX_PROCBASED_CTLS MSR_IA32_VMX_EXIT_CTLS "
                 "MSR_IA32_VMX_ENTRY_CTLS MSR_IA32_VMX_PROCBASED_CTLS2 MSR_IA32_VMX_TRUE_*")

_EVMCS_FILTERED = f"{_VMX_CONTROLS} MSR_IA32_VMX_VMFUNC"
_EVMCS_SOURCE = ("arch/x86/kvm/vmx/hyperv.c nested_evmcs_filter_control_msr; the review of "
                 "KVM_CAP_HYPERV_ENLIGHTENED_VMCS2 (2022): expose the filtered MSRs, go by values and not by a version")

_EVMCS = (0x4000_000A, 0, EAX)
"""Hyper-V's nested features; the word has the version of the enlightened VMCS."""


_WIDTHS, _COMPACT_SIZE = (0x8000_0008, 0, EAX), (0xD, 1, EBX)

_ASKED = FEATURE_WORDS | {_EVMCS, _WIDTHS, _COMPACT_SIZE}
"""Words that rules look at: none that is each vCPU's own, so that the tables of many vCPUs are one."""


@lru_cache(maxsize=8)
def kinds_of(cpuids: tuple[bytes, ...]) -> tuple[dict[Word, int], ...]:
    """These tables as far as rules look at them, each once. Kept: many hosts are asked of one guest."""
    tables = ({word: value for word, value in cpuid_words(cpuid).items() if word in _ASKED} for cpuid in cpuids)
    return tuple({tuple(sorted(table.items())): table for table in tables}.values())


@lru_cache(maxsize=8)
def features_of(cpuids: tuple[bytes, ...]) -> dict[Word, int]:
    """Feature bits that some of these tables have, by word."""
    found: dict[Word, int] = {}
    for table in kinds_of(cpuids):
        for word in table.keys() - {_WIDTHS, _COMPACT_SIZE}:
            found[word] = found.get(word, 0) | table[word]
    return dict(sorted(found.items()))


def _named(word: Word, bits: int) -> Iterator[str]:
    leaf, subleaf, register = word
    for bit in (bit for bit in range(32) if bits >> bit & 1):
        yield f"CPUID {leaf:#x}.{subleaf}:{('EAX', 'EBX', 'ECX', 'EDX')[register]} {bit_name(*word, bit)}"


def _promised(case: Case) -> Iterator[str]:
    """Features that the guest's CPUID has and this KVM does not support."""
    here = cpuid_words(case.host.cpuid)
    for word, had in features_of(case.known.distinct).items():
        _, forced = case.host.cpuid_forced.get(cpuid_word(*word), (0, 0))
        if word != _EVMCS:
            yield from _named(word, had & ~(here.get(word, 0) | forced | RUNTIME_BITS.get(word, 0)))


def _missing_features(case: Case) -> bool:
    return bool(case.host.cpuid) and next(_promised(case), None) is not None


def _otherwise(case: Case) -> Iterator[str]:
    """Features that this KVM shows whatever is written, and the guest's CPUID has otherwise."""
    for table in kinds_of(case.known.distinct):
        for word in sorted(FEATURE_WORDS & table.keys()):
            kept, put = case.host.cpuid_forced.get(cpuid_word(*word), (_WHOLE, 0))
            had = table[word]
            yield from _named(word, (had ^ (had & kept | put)) & ~RUNTIME_BITS.get(word, 0))


_WHOLE = 0xFFFF_FFFF


def _shown_otherwise(case: Case) -> bool:
    return bool(case.host.cpuid_forced) and next(_otherwise(case), None) is not None


def _list(found: Iterator[str], then: str) -> str:
    names = list(dict.fromkeys(found))
    return f"{', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}: {then}"


_XSTATE_BV = slice(512, 520)
"""Of KVM_XSAVE: the components that are not in their initial state (struct xstate_header; Intel SDM 1, 13.4.2)."""


def components(cpuid: bytes) -> int:
    """XSAVE components that a table of CPUID has, a bit each: leaf 0xD, EAX and EDX of subleaf 0."""
    return _components(cpuid_words(cpuid))


def _components(words: Mapping[Word, int]) -> int:
    return words.get((0xD, 0, EDX), 0) << 32 | words.get((0xD, 0, EAX), 0)


def _not_here(case: Case) -> int:
    """Components in use that the host has not; 0 where its profile does not say what it has."""
    here = components(case.host.cpuid)
    used = [int.from_bytes(value[_XSTATE_BV], "little") for value in case.known.distinct]
    return reduce(or_, used, 0) & ~(here | _ALWAYS) if here else 0


_ALWAYS = 0b11
"""x87 and SSE: every CPU with FXSAVE."""


def _named_components(bits: int) -> str:
    return ", ".join(describe(BITS["XCR0"], bits)) or f"{bits:#x}"


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
    version = features_of(case.known.distinct).get(_EVMCS, 0) & 0xFFFF
    return bool(version) and not case.host.capabilities.get("HYPERV_ENLIGHTENED_VMCS")


EVMCS_CAP = 163
"""KVM_CAP_HYPERV_ENLIGHTENED_VMCS."""


def _uses_evmcs(case: Case) -> bool:
    """Its CPUID has a version of the enlightened VMCS, or its VMM has enabled it."""
    if ids.capability_id(Arch.X86_64, EVMCS_CAP) in case.pair.saved.columns:
        return True
    cpuid = case.pair.saved.columns.get(CPUID2.id)
    return cpuid is not None and bool(features_of(cpuid.distinct).get(_EVMCS, 0) & 0xFFFF)


def _left_by_evmcs(case: Case) -> int | None:
    """The MSR as a guest with an enlightened VMCS reads it on the host; None where nobody has recorded that."""
    return case.host.behaviour.get(f"evmcs_msr_{ids.msr_index(case.slot.id) or 0:x}")


def _evmcs_loses(case: Case) -> int:
    """Controls that the guest was offered and does not find here: the allowed ones, or what VMFUNC has."""
    here, width = _left_by_evmcs(case), 0 if case.row.name.endswith("_VMFUNC") else 32
    return 0 if here is None else reduce(or_, case.known.numbers) >> width & ~(here >> width)


def _evmcs_less(case: Case) -> bool:
    return _uses_evmcs(case) and bool(_evmcs_loses(case))


_TRUE_FORMS = {0x481: (0x48D, 0x16), 0x482: (0x48E, 0x0401_E172), 0x483: (0x48F, 0x0003_6DFF), 0x484: (0x490, 0x11FF)}
"""VMX MSR that KVM makes: of which TRUE form, with what must be 1 besides (SDM volume 3, appendix A.2)."""


def _follows_true_form(case: Case) -> bool:
    """The host makes it of the TRUE form, which comes along and says the same."""
    true, ones = _TRUE_FORMS.get(ids.msr_index(case.slot.id) or 0, (0, 0))
    if true not in case.host.feature_msrs or not constant(case) or _controls_missing(case):
        return False
    try:
        form = case.pair.column(ids.msr_id(true))
    except KeyError:
        return False
    return {number | ones for number in form.numbers} == set(case.known.numbers)


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


def _not_of_tsc_khz(case: Case) -> bool:
    """The MSR is not a thousand times the TSC frequency that is written before it."""
    khz = case.pair.saved.columns.get(TSC_KHZ.id)
    rates = khz.numbers if khz is not None else (case.pair.default(TSC_KHZ.id) or 0,)
    return any(not case.known.only(1000 * rate) for rate in rates)


def _no_fault_offered(case: Case) -> bool:
    """CPUID faulting is on, and the MSR_PLATFORM_INFO that is written before does not offer it."""
    info = case.pair.saved.columns.get(ids.msr_id(_PLATFORM_INFO))
    offers = min(info.numbers) if info is not None else case.pair.default(ids.msr_id(_PLATFORM_INFO)) or 0
    return not offers & _CPUID_FAULT and any(number & 1 for number in case.known.numbers)


_PLATFORM_INFO, _CPUID_FAULT = 0xCE, 1 << 31


def _cpuid_refusals(case: Case) -> Iterator[str]:
    """What kvm_check_cpuid() refuses of the guest's CPUID."""
    here = components(case.host.cpuid)
    for table in kinds_of(case.known.distinct):
        if dynamic := _components(table) & _DYNAMIC & ~here:
            yield f"XSAVE components that a process has to ask for and this host has not: {_named_components(dynamic)}"
        width = table.get(_WIDTHS, 0) >> 8 & 0xFF
        if width not in (0, 48, 57):
            yield f"linear addresses of {width} bits: 48 or 57"


_DYNAMIC = 1 << 18
"""XFEATURE_MASK_USER_DYNAMIC: XTILE_DATA."""


def _cpuid_refused(case: Case) -> bool:
    return next(_cpuid_refusals(case), None) is not None


def _without_cpuid(case: Case) -> bool:
    """The guest's CPUID is refused, and this KVM has no such MSR for a vCPU without CPUID."""
    offered = case.host.feature_msrs.get(_ARCH_CAPABILITIES)
    whole = CPUID2.id in case.pair.saved.columns and _cpuid_refused(Case(case.pair, Slot(CPUID2.id, 8)))
    return bool(offered) and not case.default and whole and not case.known.only(0)


def _unseen_capabilities(case: Case) -> bool:
    """The guest's CPUID has no ARCH_CAPABILITIES, and this KVM then has no such MSR: a vCPU without CPUID reads 0."""
    cpuid, offered = case.pair.saved.columns.get(CPUID2.id), case.host.feature_msrs.get(_ARCH_CAPABILITIES)
    told = cpuid is None or any(table.get((7, 0, EDX), 0) & 1 << 29 for table in kinds_of(cpuid.distinct))
    return bool(offered) and not case.default and not told and not case.known.only(0)


_ARCH_CAPABILITIES = 0x10A


def _size_computed(case: Case) -> bool:
    """XSAVEC or XSAVES without the size that KVM then puts beside them."""
    tables = kinds_of(case.known.distinct)
    return any(words.get((0xD, 1, EAX), 0) & 0b1010 and not words.get(_COMPACT_SIZE) for words in tables)


def _cpuid_met(case: Case) -> Kernel:
    """KVM takes any CPUID here; some of it reads back otherwise."""
    return Kernel.DROPS if _shown_otherwise(case) or _size_computed(case) else Kernel.TAKES


ADDRESSES = "MSR_LSTAR MSR_CSTAR MSR_KERNEL_GS_BASE"
"""MSRs that KVM takes canonical addresses for."""


ENTRIES = "MSR_IA32_SYSENTER_ESP MSR_IA32_SYSENTER_EIP"
"""Addresses that KVM takes whatever they are, and may keep a part of."""


def _not_canonical(case: Case) -> bool:
    """An address wider than KVM takes: by the trials (all bits of the lower half), or by the guest's own CR4.LA57."""
    taken, _ = case.host.msr_bits.get(ids.msr_index(case.slot.id) or 0, (0, 0))
    if not taken or taken & taken + 1:  # not tried, or no run of bits from 0
        return False
    half = taken.bit_length()
    return any(_beyond(number, half) and (_beyond(number, _HALF_57) or not _has_la57(case))
               for number in case.known.numbers)


_HALF_57, _LA57, _CR4 = 56, 1 << 12, slice(248, 256)


def _beyond(number: int, half: int) -> bool:
    return number >> half not in (0, (1 << 64 - half) - 1)


def _has_la57(case: Case) -> bool:
    """KVM_SREGS2 is written before the MSRs."""
    try:
        sregs = case.pair.column(SREGS2.id)
    except KeyError:
        return False
    return any(int.from_bytes(value[_CR4], "little") & _LA57 for value in sregs.distinct)


def _entry_lost(case: Case) -> bool:
    """Of a run of bits that reads back: with fewer than addresses have, what is above; else what is not canonical."""
    _, kept = case.host.msr_bits.get(ids.msr_index(case.slot.id) or 0, (0, 0))
    if not kept or kept & kept + 1 or kept >> 64 - 1:  # not tried, no run of bits from 0, or all of them
        return False
    half = kept.bit_length() - 1
    return any(number & ~kept if half < _HALF_48 else _beyond(number, half) for number in case.known.numbers)


_HALF_48 = 47


def _bad_types(case: Case) -> bool:
    """A PAT entry that is no memory type: 0, 1, 4, 5, 6 and 7 are."""
    return any(byte not in (0, 1, 4, 5, 6, 7) for value in case.known.distinct for byte in value)



def _efer_refused(case: Case) -> bool:
    taken = case.host.behaviour.get("efer_taken")
    return taken is not None and any(number & ~taken for number in case.known.numbers)


def _xsave_decides(host: HostProfile, slot: Slot) -> tuple[Question, ...]:
    """Components that the host has not, of XSTATE_BV; the rest of KVM_XSAVE is the guest's own affair."""
    here = components(host.cpuid)
    return (Question(_XSTATE_BV.start // 8, ~(here | _ALWAYS) & 2**64 - 1),) if here else ()


def _address_decides(host: HostProfile, slot: Slot) -> tuple[Question, ...]:
    """Addresses of 48 bits are all taken, where wider ones may not be."""
    taken, _ = host.msr_bits.get(ids.msr_index(slot.id) or 0, (0, 0))
    return (_CANONICAL_48 if not taken or taken.bit_length() >= _HALF_48 else Question(0),)


def _entry_decides(host: HostProfile, slot: Slot) -> tuple[Question, ...]:
    """The same of addresses that are kept in part, or what is kept of fewer bits."""
    _, kept = host.msr_bits.get(ids.msr_index(slot.id) or 0, (0, 0))
    if not kept or kept.bit_length() > _HALF_48:
        return (_CANONICAL_48,)
    return (Question(0, least=0, most=kept) if kept & kept + 1 == 0 else Question(0),)


_CANONICAL_48 = Question(0, least=2**64 - (1 << _HALF_48), most=(1 << _HALF_48) - 1)

DECIDING: dict[str, Callable[[HostProfile, Slot], tuple[Question, ...]]] = {
    "KVM_XSAVE": _xsave_decides, **dict.fromkeys(ADDRESSES.split(), _address_decides),
    **dict.fromkeys(ENTRIES.split(), _entry_decides),
}
"""Registers of whose values the rules below tell few apart: most of this state is never the same twice."""


RULES: tuple[Rule, ...] = (
    Rule("KVM_VCPU_TSC_OFFSET", lambda case: True, _HARMLESS,
         "it is relative to one host's TSC; MSR_IA32_TSC restores the guest's, and offsets that differ are moved",
         "Documentation/virt/kvm/devices/vcpu.rst; profile: tsc_offset_kept",
         lambda case: Kernel.TAKES if case.host.behaviour.get("tsc_offset_kept") else Kernel.UNKNOWN),
    Rule("KVM_CPUID2", _cpuid_refused, _REFUSED, lambda case: _list(_cpuid_refusals(case), "refused here"),
         "arch/x86/kvm/cpuid.c kvm_check_cpuid: EPERM, EINVAL"),
    Rule("KVM_CPUID2", _evmcs, _REFUSED, "its guest uses the enlightened VMCS, which this KVM hasn't",
         "KVM_CAP_HYPERV_ENLIGHTENED_VMCS; CPUID 0x4000000A.EAX", _cpuid_met),
    Rule("KVM_CPUID2", _missing_features, _NOTICED, lambda case: _list(_promised(case), "not supported here"),
         "KVM_GET_SUPPORTED_CPUID; KVM_SET_CPUID2 takes more and then an instruction of it ends in #UD",
         _cpuid_met),
    Rule("KVM_CPUID2", _shown_otherwise, _NOTICED,
         lambda case: _list(_otherwise(case), "shown otherwise here, whatever is written"),
         "profile: cpuid_forced, by writing each word as 0 and as all ones", Kernel.DROPS),
    Rule("KVM_CPUID2", _size_computed, _FITS, "KVM computes the size of XSAVE's compact form itself",
         "arch/x86/kvm/cpuid.c kvm_update_cpuid_runtime", Kernel.DROPS, target=lambda case: case.slot),
    Rule("KVM_TSC_KHZ", _other_rate, _NOTICED, "{value} kHz, this host's TSC runs at {host} and can't be scaled",
         "arch/x86/kvm/x86.c set_tsc_khz: a slower one is refused, a faster one caught up with at each exit; "
         "KVM_CAP_TSC_CONTROL", lambda case: Kernel.TAKES if min(case.known.numbers) > (case.default or 0)
         else Kernel.REFUSES),
    Rule("KVM_XSAVE", lambda case: bool(_not_here(case)), _REFUSED,
         lambda case: f"components in use that this host has not: {_named_components(_not_here(case))}",
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
    Rule(_VMX_CONTROLS, both(_follows_true_form, lambda case: case.default != case.known.numbers[0]), _FITS,
         "KVM makes it of its TRUE form, whatever is written", "arch/x86/kvm/vmx/nested.c vmx_get_vmx_msr, "
         "vmx_set_vmx_msr", Kernel.REFUSES),
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
    Rule("HV_X64_MSR_TSC_FREQUENCY", _not_of_tsc_khz, _FITS, "KVM makes it of KVM_TSC_KHZ, whatever is written",
         "arch/x86/kvm/hyperv.c kvm_hv_get_msr: virtual_tsc_khz", Kernel.DROPS),
    Rule("MSR_IA32_ARCH_CAPABILITIES", _without_cpuid, _REFUSED, "the guest's CPUID is refused, and without one this "
         "kernel has no such MSR", f"{_X86}: guest_cpu_cap_has (6.14 or so)"),
    Rule("MSR_IA32_ARCH_CAPABILITIES", _unseen_capabilities, _HARMLESS, "the guest's CPUID has no ARCH_CAPABILITIES: "
         "it can't read it", f"{_X86}: guest_cpu_cap_has (6.14 or so)"),
    Rule("MSR_MISC_FEATURES_ENABLES", _no_fault_offered, _REFUSED, "CPUID faulting is on, and the guest's "
         "MSR_PLATFORM_INFO does not offer it", f"{_X86}: supports_cpuid_fault"),
    Rule("MSR_IA32_CR_PAT", _bad_types, _REFUSED, "{value} has a memory type that there is not",
         f"{_X86} kvm_pat_valid"),
    Rule(ADDRESSES, _not_canonical, _REFUSED, "{value}: this kernel takes no such wide address",
         f"{_X86}: is_noncanonical_address, by the guest's CR4.LA57 up to 6.1, later by the host's"),
    Rule(ENTRIES, _entry_lost, _NOTICED, "{value}: bits of it are not kept here",
         f"{_MSR_BITS}; arch/x86/kvm/svm/svm.c svm_set_msr: bits 31:0 alone, of a vCPU that is not Intel's; "
         "x86.c __kvm_set_msr: made canonical",
         Kernel.DROPS),
    Rule("MSR_EFER", _efer_refused, _REFUSED, "{value}: bits that this kernel does not take", "profile: efer_taken"),
    Rule(FLAGS, refuses_bits, _REFUSED, "{value}: bits that this kernel refuses: {bits}", _MSR_BITS),
    Rule(f"{FLAGS} {IN_PART}", loses_bits, _NOTICED, "{value}: bits of it read back as here: {bits}", _MSR_BITS,
         Kernel.DROPS),
)

