"""What is known of an MSR by its number, and the order in which a set of them is written back.

The rows are in `migstream.registers.msr_rows`. Source of the order: what arch/x86/kvm checks, clears or
starts when the VMM writes (KVM_SET_MSRS); each rule says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from migstream.model import Klass, Scope
from migstream.registers.msr_rows import MSRS, Msr

__all__ = ["MSRS", "ORDER_AFTER", "Msr", "lookup", "name", "sort_for_restore"]

_BY_INDEX = {row.index: row for row in MSRS}
_RANK = {row.index: rank for rank, row in enumerate(MSRS)}

_FRESH_PMU = "a changed PERF_CAPABILITIES resets the PMU"
_COUNTING = "the global control starts what it enables, from the value that is there"
_TRACING = "KVM refuses a write while RTIT_CTL has TraceEn set"
_STIMER = "up to 6.5 a write of COUNT enables (auto-enable) or disables (0) the timer"

_RULES: tuple[tuple[str, str, str], ...] = (
    ("MSR_IA32_TSC_DEADLINE", "MSR_IA32_TSC",
     "the timer is armed against the TSC: a wrong one fires it now or never"),
    ("MSR_IA32_TSC_DEADLINE", "MSR_IA32_APICBASE", "ignored while the APIC is off"),
    ("MSR_IA32_TSC_DEADLINE", "X2APIC_LVTT", "ignored unless the timer is in deadline mode"),
    ("HV_X64_MSR_HYPERCALL", "HV_X64_MSR_GUEST_OS_ID", "ignored while GUEST_OS_ID is 0"),
    ("HV_X64_MSR_STIMER0_CONFIG", "HV_X64_MSR_STIMER0_COUNT", _STIMER),
    ("HV_X64_MSR_STIMER1_CONFIG", "HV_X64_MSR_STIMER1_COUNT", _STIMER),
    ("HV_X64_MSR_STIMER2_CONFIG", "HV_X64_MSR_STIMER2_COUNT", _STIMER),
    ("HV_X64_MSR_STIMER3_CONFIG", "HV_X64_MSR_STIMER3_COUNT", _STIMER),
    ("MSR_KVM_PV_EOI_EN", "HV_X64_MSR_VP_ASSIST_PAGE",
     "one state for both: an assist page of 0 clears PV EOI"),
    ("MSR_KVM_ASYNC_PF_EN", "MSR_KVM_ASYNC_PF_INT", "enabling queues an event that takes this vector"),
    ("MSR_MISC_FEATURES_ENABLES", "MSR_PLATFORM_INFO",
     "mainline refuses CPUID faulting that PLATFORM_INFO lacks"),
    ("MSR_IA32_VMX_MISC", "MSR_IA32_VMX_TRUE_PINBASED_CTLS",
     "a preemption-timer rate other than the host's is refused while the pin controls offer that timer"),
    ("MSR_IA32_TSX_CTRL", "MSR_IA32_ARCH_CAPABILITIES", "which says that the MSR exists"),
    ("MSR_ARCH_PERFMON_*", "MSR_IA32_PERF_CAPABILITIES", _FRESH_PMU),
    ("MSR_IA32_PMC*", "MSR_IA32_PERF_CAPABILITIES",
     "full-width writes need FW_WRITES, and a change resets the PMU"),
    ("MSR_CORE_PERF_*", "MSR_IA32_PERF_CAPABILITIES", _FRESH_PMU),
    ("MSR_IA32_PEBS_ENABLE", "MSR_IA32_PERF_CAPABILITIES", "the PEBS format there says that the MSR exists"),
    ("MSR_PEBS_DATA_CFG", "MSR_IA32_PERF_CAPABILITIES", "PEBS_BASELINE there says that the MSR exists"),
    ("MSR_IA32_DS_AREA", "MSR_IA32_PERF_CAPABILITIES", _FRESH_PMU),
    ("MSR_CORE_PERF_GLOBAL_CTRL", "MSR_ARCH_PERFMON_*", _COUNTING),
    ("MSR_CORE_PERF_GLOBAL_CTRL", "MSR_IA32_PMC*", _COUNTING),
    ("MSR_CORE_PERF_GLOBAL_CTRL", "MSR_CORE_PERF_FIXED_*", _COUNTING),
    ("MSR_AMD64_PERF_CNTR_GLOBAL_CTL", "MSR_F15H_PERF_*", _COUNTING),
    ("MSR_AMD64_PERF_CNTR_GLOBAL_CTL", "MSR_K7_EVNTSEL*", _COUNTING),
    ("MSR_AMD64_PERF_CNTR_GLOBAL_CTL", "MSR_K7_PERFCTR*", _COUNTING),
    ("MSR_IA32_RTIT_CTL", "MSR_IA32_RTIT_STATUS", _TRACING),
    ("MSR_IA32_RTIT_CTL", "MSR_IA32_RTIT_CR3_MATCH", _TRACING),
    ("MSR_IA32_RTIT_CTL", "MSR_IA32_RTIT_OUTPUT_*", _TRACING),
    ("MSR_IA32_RTIT_CTL", "MSR_IA32_RTIT_ADDR*", _TRACING),
    ("MSR_ARCH_LBR_FROM_*", "MSR_ARCH_LBR_DEPTH", "the CPU clears the records when DEPTH is written"),
    ("MSR_ARCH_LBR_TO_*", "MSR_ARCH_LBR_DEPTH", "the CPU clears the records when DEPTH is written"),
    ("MSR_ARCH_LBR_INFO_*", "MSR_ARCH_LBR_DEPTH", "the CPU clears the records when DEPTH is written"),
    ("X2APIC_*", "MSR_IA32_APICBASE", "the window exists in x2APIC mode only"),
    ("X2APIC_LVT*", "X2APIC_SPIV", "KVM masks a local vector while SPIV has the APIC off"),
    ("X2APIC_TMICT", "X2APIC_LVTT", "what a write of the count starts depends on the timer's mode"),
    ("X2APIC_TMICT", "X2APIC_TDCR", "a write of the count starts the timer at this rate"),
)


def _matching(pattern: str) -> list[int]:
    prefix = pattern.removesuffix("*")
    if prefix == pattern:
        return [row.index for row in MSRS if row.name == pattern]
    return [row.index for row in MSRS if row.name.startswith(prefix)]


def _expand() -> Iterator[tuple[int, int, str]]:
    for later, earlier, reason in _RULES:
        for before in _matching(earlier):
            yield from ((index, before, reason) for index in _matching(later))


ORDER_AFTER: tuple[tuple[int, int, str], ...] = tuple(_expand())
"""(MSR, MSR that must be written before it, reason). The order of the table obeys all; a test holds it."""


def name(index: int) -> str:
    """The kernel's word for an MSR, or its number as `MSR_0xc0000081`."""
    row = _BY_INDEX.get(index)
    return row.name if row else f"MSR_{index:#010x}"


def lookup(index: int) -> Msr:
    """The row of an MSR. One without a row is state of its vCPU: the only guess that loses nothing."""
    return _BY_INDEX.get(index) or Msr(index, name(index), Scope.VCPU, Klass.STATE, "not in the table")


def sort_for_restore(indices: Iterable[int]) -> list[int]:
    """The same MSRs in the order in which a restore writes them: as in the table, unknown ones last."""
    return sorted(indices, key=lambda index: (_RANK.get(index, len(MSRS)), index))
