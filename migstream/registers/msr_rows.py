"""The MSRs that KVM lists or takes on x86-64: one row each, in the order in which a restore writes them.

Names and numbers: Linux arch/x86/include/asm/msr-index.h, perf_event.h, mtrr.h, apicdef.h,
uapi/asm/kvm_para.h, asm/hyperv-tlfs.h (later include/hyperv/hvgdk_mini.h) and arch/x86/kvm/hyperv.h. Which of
them KVM lists: arch/x86/kvm/x86.c, 5.10 to 7.x. What a write checks or sets off, which is what `why` says:
arch/x86/kvm: x86.c, hyperv.c, lapic.c, pmu.c, vmx/vmx.c, vmx/nested.c, vmx/pmu_intel.c, svm/svm.c.
`migstream.registers.msrs` looks rows up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from migstream.model import Klass, Scope

_VM, _VCPU = Scope.VM, Scope.VCPU
_FEATURE, _IDENTITY, _STATE, _CLOCK = Klass.FEATURE, Klass.IDENTITY, Klass.STATE, Klass.CLOCK


@dataclass(frozen=True, slots=True)
class Msr:
    """One MSR: its number, the kernel's word for it, and how it travels.

    Attributes:
        index: number as in RDMSR, 32 bits.
        name: as in the kernel's headers.
        scope: VM for what KVM keeps once a VM though it is reached through a vCPU.
        klass: feature, identity, state or clock.
        why: one line of reason for scope, class or place in the order; "" for plain state.
    """

    index: int
    name: str
    scope: Scope = _VCPU
    klass: Klass = _STATE
    why: str = ""


@dataclass(frozen=True, slots=True)
class MsrRange:
    """A row that stands for `count` MSRs, `stride` apart; `{}` in the name becomes the number, from 0."""

    index: int
    name: str
    count: int
    scope: Scope = _VCPU
    klass: Klass = _STATE
    why: str = ""
    stride: int = 1

    def expand(self) -> Iterator[Msr]:
        """The single rows, ascending."""
        for number in range(self.count):
            index, name = self.index + number * self.stride, self.name.format(number)
            yield Msr(index, name, self.scope, self.klass, self.why)


Row = Msr | MsrRange

_VMX = "VMX capability: the host's value is the ceiling, fixed once the vCPU has run"
_DERIVED = "VMX capability that KVM makes from its TRUE form: readable, every write refused"
_FROM_CPUID = "VMX capability that KVM makes from CPUID: readable, every write refused"

_FEATURES: tuple[Row, ...] = (
    Msr(0x10A, "MSR_IA32_ARCH_CAPABILITIES", _VCPU, _FEATURE,
        "which CPU bugs the guest believes it has: fixed once the vCPU has run"),
    Msr(0x345, "MSR_IA32_PERF_CAPABILITIES", _VCPU, _FEATURE,
        "a changed value resets the virtual PMU: before every PMU MSR"),
    Msr(0xCE, "MSR_PLATFORM_INFO", _VCPU, _FEATURE,
        "its CPUID-fault bit decides what MISC_FEATURES_ENABLES may hold"),
    Msr(0xC0011029, "MSR_AMD64_DE_CFG", _VCPU, _FEATURE,
        "says whether LFENCE serializes: fixed once the vCPU has run"),
    Msr(0x179, "MSR_IA32_MCG_CAP", _VCPU, _FEATURE,
        "number of MCE banks: set by KVM_X86_SETUP_MCE, not by a write"),
    Msr(0x480, "MSR_IA32_VMX_BASIC", _VCPU, _FEATURE, _VMX),
    Msr(0x48D, "MSR_IA32_VMX_TRUE_PINBASED_CTLS", _VCPU, _FEATURE, _VMX),
    Msr(0x48E, "MSR_IA32_VMX_TRUE_PROCBASED_CTLS", _VCPU, _FEATURE, _VMX),
    Msr(0x48F, "MSR_IA32_VMX_TRUE_EXIT_CTLS", _VCPU, _FEATURE, _VMX),
    Msr(0x490, "MSR_IA32_VMX_TRUE_ENTRY_CTLS", _VCPU, _FEATURE, _VMX),
    Msr(0x48B, "MSR_IA32_VMX_PROCBASED_CTLS2", _VCPU, _FEATURE, _VMX),
    Msr(0x485, "MSR_IA32_VMX_MISC", _VCPU, _FEATURE,
        "its preemption-timer rate must be the host's while PINBASED offers that timer"),
    Msr(0x486, "MSR_IA32_VMX_CR0_FIXED0", _VCPU, _FEATURE, _VMX),
    Msr(0x488, "MSR_IA32_VMX_CR4_FIXED0", _VCPU, _FEATURE, _VMX),
    Msr(0x48A, "MSR_IA32_VMX_VMCS_ENUM", _VCPU, _FEATURE, _VMX),
    Msr(0x48C, "MSR_IA32_VMX_EPT_VPID_CAP", _VCPU, _FEATURE, _VMX),
    Msr(0x491, "MSR_IA32_VMX_VMFUNC", _VCPU, _FEATURE, _VMX),
    Msr(0x492, "MSR_IA32_VMX_PROCBASED_CTLS3", _VCPU, _FEATURE,
        "tertiary controls: KVM up to 6.19 offers none"),
    Msr(0x481, "MSR_IA32_VMX_PINBASED_CTLS", _VCPU, _FEATURE, _DERIVED),
    Msr(0x482, "MSR_IA32_VMX_PROCBASED_CTLS", _VCPU, _FEATURE, _DERIVED),
    Msr(0x483, "MSR_IA32_VMX_EXIT_CTLS", _VCPU, _FEATURE, _DERIVED),
    Msr(0x484, "MSR_IA32_VMX_ENTRY_CTLS", _VCPU, _FEATURE, _DERIVED),
    Msr(0x487, "MSR_IA32_VMX_CR0_FIXED1", _VCPU, _FEATURE, _FROM_CPUID),
    Msr(0x489, "MSR_IA32_VMX_CR4_FIXED1", _VCPU, _FEATURE, _FROM_CPUID),
)

_IDENTITIES: tuple[Row, ...] = (
    Msr(0x8B, "MSR_IA32_UCODE_REV", _VCPU, _IDENTITY,
        "microcode of the host (AMD: PATCH_LEVEL); in the feature list, yet writable after the vCPU has run"),
    Msr(0x17, "MSR_IA32_PLATFORM_ID", _VCPU, _IDENTITY, "KVM answers 0"),
    Msr(0x2C, "MSR_EBC_FREQUENCY_ID", _VCPU, _IDENTITY, "KVM answers a constant"),
    Msr(0xCD, "MSR_FSB_FREQ", _VCPU, _IDENTITY, "KVM answers a constant"),
    Msr(0xFE, "MSR_MTRRcap", _VCPU, _IDENTITY, "KVM's fixed eight variable ranges; a write is refused"),
    Msr(0x198, "MSR_IA32_PERF_STATUS", _VCPU, _IDENTITY, "KVM answers a constant"),
    Msr(0x40000022, "HV_X64_MSR_TSC_FREQUENCY", _VCPU, _IDENTITY,
        "Hz, from the vCPU's TSC rate; KVM takes a write and ignores it"),
    Msr(0x40000023, "HV_X64_MSR_APIC_FREQUENCY", _VCPU, _IDENTITY,
        "Hz of the local APIC timer; KVM takes a write and ignores it"),
)

_IN_SREGS = "also in kvm_sregs, which is where it is restored"
_NOT_IN_XSAVE = "supervisor xstate: KVM_GET_XSAVE leaves it out"
_FRED = "FRED event delivery"

_CPU: tuple[Row, ...] = (
    Msr(0x3A, "MSR_IA32_FEAT_CTL",
        why="before nested state: a write of 0 takes the vCPU out of VMX operation"),
    Msr(0x1B, "MSR_IA32_APICBASE", why=_IN_SREGS),
    Msr(0xC0000080, "MSR_EFER", why=_IN_SREGS),
    Msr(0xC0000100, "MSR_FS_BASE", why=_IN_SREGS),
    Msr(0xC0000101, "MSR_GS_BASE", why=_IN_SREGS),
    Msr(0x174, "MSR_IA32_SYSENTER_CS"),
    Msr(0x175, "MSR_IA32_SYSENTER_ESP"),
    Msr(0x176, "MSR_IA32_SYSENTER_EIP"),
    Msr(0xC0000081, "MSR_STAR"),
    Msr(0xC0000082, "MSR_LSTAR"),
    Msr(0xC0000083, "MSR_CSTAR"),
    Msr(0xC0000084, "MSR_SYSCALL_MASK"),
    Msr(0xC0000102, "MSR_KERNEL_GS_BASE"),
    Msr(0xC0000103, "MSR_TSC_AUX", why="needs RDTSCP or RDPID in CPUID unless 0"),
    Msr(0x277, "MSR_IA32_CR_PAT"),
    Msr(0x1A0, "MSR_IA32_MISC_ENABLE", why="its MWAIT bit can change CPUID.1:ECX.MONITOR"),
    Msr(0x140, "MSR_MISC_FEATURES_ENABLES",
        why="CPUID faulting needs the bit in PLATFORM_INFO, for the VMM too"),
    Msr(0x48, "MSR_IA32_SPEC_CTRL", why="each bit is checked against what the host CPU takes"),
    Msr(0xC001011F, "MSR_AMD64_VIRT_SPEC_CTRL"),
    Msr(0x122, "MSR_IA32_TSX_CTRL", why="offered only where ARCH_CAPABILITIES says so"),
    Msr(0xE1, "MSR_IA32_UMWAIT_CONTROL"),
    Msr(0x1FC, "MSR_IA32_POWER_CTL"),
    Msr(0x9E, "MSR_IA32_SMBASE", why="KVM takes it from the VMM only; no SMM in the kernel, no such MSR"),
    Msr(0x34, "MSR_SMI_COUNT", why="counts SMIs; a guest can't write it"),
    Msr(0xD90, "MSR_IA32_BNDCFGS", why="needs MPX in CPUID"),
    Msr(0x1C4, "MSR_IA32_XFD", why="checked against the xstate components that CPUID allows"),
    Msr(0x1C5, "MSR_IA32_XFD_ERR"),
    Msr(0xDA0, "MSR_IA32_XSS", why="checked against the supervisor components that CPUID allows"),
    Msr(0x6A0, "MSR_IA32_U_CET", why=_NOT_IN_XSAVE),
    Msr(0x6A2, "MSR_IA32_S_CET", why="before GUEST_SSP, which shadow stacks give a meaning"),
    MsrRange(0x6A4, "MSR_IA32_PL{}_SSP", 4, why=_NOT_IN_XSAVE),
    Msr(0x6A8, "MSR_IA32_INT_SSP_TAB"),
    MsrRange(0x1CC, "MSR_IA32_FRED_RSP{}", 4, why=_FRED),
    Msr(0x1D0, "MSR_IA32_FRED_STKLVLS", why=_FRED),
    Msr(0x1D1, "MSR_IA32_FRED_SSP1", why="FRED event delivery; level 0 is PL0_SSP"),
    Msr(0x1D2, "MSR_IA32_FRED_SSP2", why=_FRED),
    Msr(0x1D3, "MSR_IA32_FRED_SSP3", why=_FRED),
    Msr(0x1D4, "MSR_IA32_FRED_CONFIG", why=_FRED),
    MsrRange(0x8C, "MSR_IA32_SGXLEPUBKEYHASH{}", 4, why="SGX launch control: what ENCLS[EINIT] accepts"),
)

_AMD: tuple[Row, ...] = (
    Msr(0xC0010015, "MSR_K7_HWCR", why="KVM takes McStatusWrEn and TscFreqSel, drops bits that it ignores"),
    Msr(0xC0010114, "MSR_VM_CR", why="its lock and disable bits decide whether the guest may set EFER.SVME"),
    Msr(0xC0010117, "MSR_VM_HSAVE_PA", why="nested SVM's host save area"),
    Msr(0xC0000104, "MSR_AMD64_TSC_RATIO",
        why="what a nested hypervisor set for its guests, not this vCPU's own rate"),
    Msr(0xC0010140, "MSR_AMD64_OSVW_ID_LENGTH", why="errata that the guest may see"),
    Msr(0xC0010141, "MSR_AMD64_OSVW_STATUS", why="errata that the guest may see"),
)

_MTRR: tuple[Row, ...] = (
    MsrRange(0x200, "MSR_MTRRphysBase{}", 8, stride=2),
    MsrRange(0x201, "MSR_MTRRphysMask{}", 8, stride=2),
    Msr(0x250, "MSR_MTRRfix64K_00000"),
    Msr(0x258, "MSR_MTRRfix16K_80000"),
    Msr(0x259, "MSR_MTRRfix16K_A0000"),
    Msr(0x268, "MSR_MTRRfix4K_C0000"),
    Msr(0x269, "MSR_MTRRfix4K_C8000"),
    Msr(0x26A, "MSR_MTRRfix4K_D0000"),
    Msr(0x26B, "MSR_MTRRfix4K_D8000"),
    Msr(0x26C, "MSR_MTRRfix4K_E0000"),
    Msr(0x26D, "MSR_MTRRfix4K_E8000"),
    Msr(0x26E, "MSR_MTRRfix4K_F0000"),
    Msr(0x26F, "MSR_MTRRfix4K_F8000"),
    Msr(0x2FF, "MSR_MTRRdefType", why="enables the others: as on hardware, last"),
)

_BANK = "exists for as many banks as MCG_CAP says"

_MCE: tuple[Row, ...] = (
    Msr(0x17A, "MSR_IA32_MCG_STATUS"),
    Msr(0x17B, "MSR_IA32_MCG_CTL", why="needs MCG_CTL_P in MCG_CAP unless 0"),
    Msr(0x4D0, "MSR_IA32_MCG_EXT_CTL", why="local machine checks: FEAT_CTL.LMCE lets a guest reach it"),
    MsrRange(0x280, "MSR_IA32_MC{}_CTL2", 32, why="needs CMCI in MCG_CAP"),
    MsrRange(0x400, "MSR_IA32_MC{}_CTL", 32, why=_BANK, stride=4),
    MsrRange(0x401, "MSR_IA32_MC{}_STATUS", 32, why=_BANK, stride=4),
    MsrRange(0x402, "MSR_IA32_MC{}_ADDR", 32, why=_BANK, stride=4),
    MsrRange(0x403, "MSR_IA32_MC{}_MISC", 32, why=_BANK, stride=4),
)

_LBR = "a record that the CPU makes: KVM passes it through or lists it only with virtual LBR"

_DEBUG: tuple[Row, ...] = (
    Msr(0x1D9, "MSR_IA32_DEBUGCTLMSR", why="its LBR bit starts recording"),
    Msr(0x1DB, "MSR_IA32_LASTBRANCHFROMIP", why=_LBR),
    Msr(0x1DC, "MSR_IA32_LASTBRANCHTOIP", why=_LBR),
    Msr(0x1DD, "MSR_IA32_LASTINTFROMIP", why=_LBR),
    Msr(0x1DE, "MSR_IA32_LASTINTTOIP", why=_LBR),
    Msr(0x1C8, "MSR_LBR_SELECT"),
    Msr(0x1C9, "MSR_LBR_TOS"),
    MsrRange(0x680, "MSR_LBR_NHM_FROM{}", 32, why=_LBR),
    MsrRange(0x6C0, "MSR_LBR_NHM_TO{}", 32, why=_LBR),
    MsrRange(0xDC0, "MSR_LBR_INFO_{}", 32, why=_LBR),
    Msr(0xC000010E, "MSR_AMD64_LBR_SELECT"),
    Msr(0x14CF, "MSR_ARCH_LBR_DEPTH", why="the CPU clears all records when it is written: before them"),
    MsrRange(0x1500, "MSR_ARCH_LBR_FROM_{}", 32, why=_LBR),
    MsrRange(0x1600, "MSR_ARCH_LBR_TO_{}", 32, why=_LBR),
    MsrRange(0x1200, "MSR_ARCH_LBR_INFO_{}", 32, why=_LBR),
    Msr(0x14CE, "MSR_ARCH_LBR_CTL", why="starts recording: after the records"),
)

_TRACED = "KVM refuses a write while RTIT_CTL traces: before it"

_TRACE: tuple[Row, ...] = (
    Msr(0x571, "MSR_IA32_RTIT_STATUS", why=_TRACED),
    Msr(0x572, "MSR_IA32_RTIT_CR3_MATCH", why=_TRACED),
    Msr(0x560, "MSR_IA32_RTIT_OUTPUT_BASE", why=_TRACED),
    Msr(0x561, "MSR_IA32_RTIT_OUTPUT_MASK", why=_TRACED),
    MsrRange(0x580, "MSR_IA32_RTIT_ADDR{}_A", 4, why=_TRACED, stride=2),
    MsrRange(0x581, "MSR_IA32_RTIT_ADDR{}_B", 4, why=_TRACED, stride=2),
    Msr(0x570, "MSR_IA32_RTIT_CTL", why="starts the trace; KVM refuses it once the vCPU is in VMX operation"),
)

_COUNTS = "counts while its event is enabled"
_GLOBAL = "starts what the selectors chose: after counters and selectors"

_PMU: tuple[Row, ...] = (
    MsrRange(0x186, "MSR_ARCH_PERFMON_EVENTSEL{}", 12),
    MsrRange(0xC1, "MSR_ARCH_PERFMON_PERFCTR{}", 12,
        why="counts while its event is enabled; a write is 32 bits wide"),
    MsrRange(0x4C1, "MSR_IA32_PMC{}", 12,
        why="the counters at full width: needs FW_WRITES in PERF_CAPABILITIES"),
    MsrRange(0x309, "MSR_CORE_PERF_FIXED_CTR{}", 4, why=_COUNTS),
    Msr(0x38D, "MSR_CORE_PERF_FIXED_CTR_CTRL"),
    Msr(0x600, "MSR_IA32_DS_AREA"),
    Msr(0x3F2, "MSR_PEBS_DATA_CFG", why="needs PEBS_BASELINE in PERF_CAPABILITIES"),
    Msr(0x3F1, "MSR_IA32_PEBS_ENABLE", why="needs a PEBS format in PERF_CAPABILITIES"),
    Msr(0x390, "MSR_CORE_PERF_GLOBAL_OVF_CTRL",
        why="a guest clears overflows with it; the VMM's write only stores"),
    Msr(0x38E, "MSR_CORE_PERF_GLOBAL_STATUS", why="read-only to the guest, written by the VMM"),
    Msr(0x38F, "MSR_CORE_PERF_GLOBAL_CTRL", why=_GLOBAL),
    MsrRange(0xC0010000, "MSR_K7_EVNTSEL{}", 4),
    MsrRange(0xC0010004, "MSR_K7_PERFCTR{}", 4, why=_COUNTS),
    MsrRange(0xC0010200, "MSR_F15H_PERF_CTL{}", 6, why="the first four are the K7 selectors again", stride=2),
    MsrRange(0xC0010201, "MSR_F15H_PERF_CTR{}", 6, why="the first four are the K7 counters again", stride=2),
    Msr(0xC0000302, "MSR_AMD64_PERF_CNTR_GLOBAL_STATUS_CLR", why="reads 0; the VMM's write changes nothing"),
    Msr(0xC0000303, "MSR_AMD64_PERF_CNTR_GLOBAL_STATUS_SET", why="reads 0; the VMM's write changes nothing"),
    Msr(0xC0000300, "MSR_AMD64_PERF_CNTR_GLOBAL_STATUS", why="read-only to the guest, written by the VMM"),
    Msr(0xC0000301, "MSR_AMD64_PERF_CNTR_GLOBAL_CTL", why=_GLOBAL),
)

_IN_LAPIC = "a window on kvm_lapic_state, open in x2APIC mode only: that struct restores it"
_LVT = "KVM masks it while SPIV has the APIC off; otherwise restored by kvm_lapic_state"

_X2APIC: tuple[Row, ...] = (
    Msr(0x802, "X2APIC_ID", why=_IN_LAPIC),
    Msr(0x803, "X2APIC_LVR", why=_IN_LAPIC),
    Msr(0x808, "X2APIC_TASKPRI", why=_IN_LAPIC),
    Msr(0x80A, "X2APIC_PROCPRI", why=_IN_LAPIC),
    Msr(0x80B, "X2APIC_EOI", why="a command: a write ends an interrupt"),
    Msr(0x80D, "X2APIC_LDR", why=_IN_LAPIC),
    Msr(0x80F, "X2APIC_SPIV", why=_IN_LAPIC),
    MsrRange(0x810, "X2APIC_ISR{}", 8, why=_IN_LAPIC),
    MsrRange(0x818, "X2APIC_TMR{}", 8, why=_IN_LAPIC),
    MsrRange(0x820, "X2APIC_IRR{}", 8, why=_IN_LAPIC),
    Msr(0x828, "X2APIC_ESR", why=_IN_LAPIC),
    Msr(0x82F, "X2APIC_LVTCMCI", why=_LVT),
    Msr(0x830, "X2APIC_ICR", why="a command: a write sends an interrupt"),
    Msr(0x832, "X2APIC_LVTT", why=_LVT),
    Msr(0x833, "X2APIC_LVTTHMR", why=_LVT),
    Msr(0x834, "X2APIC_LVTPC", why=_LVT),
    Msr(0x835, "X2APIC_LVT0", why=_LVT),
    Msr(0x836, "X2APIC_LVT1", why=_LVT),
    Msr(0x837, "X2APIC_LVTERR", why=_LVT),
    Msr(0x83E, "X2APIC_TDCR", why=_IN_LAPIC),
    Msr(0x838, "X2APIC_TMICT", why="a write starts the timer at the rate of TDCR"),
    Msr(0x839, "X2APIC_TMCCT", _VCPU, _CLOCK, "the timer's countdown; a write is refused"),
    Msr(0x83F, "X2APIC_SELF_IPI", why="a command: a write sends an interrupt"),
)

_CRASH = "partition-wide: one crash report a VM"
_SYNDBG = "partition-wide: one debugger connection a VM"
_APIC_ALIAS = "another way to an APIC register: kvm_lapic_state restores it"
_SYNIC = "needs KVM_CAP_HYPERV_SYNIC or SYNIC2 on the vCPU unless 0"

_HYPERV: tuple[Row, ...] = (
    Msr(0x40000000, "HV_X64_MSR_GUEST_OS_ID", _VM, why="partition-wide; 0 switches the hypercall page off"),
    Msr(0x40000001, "HV_X64_MSR_HYPERCALL", _VM,
        why="partition-wide; ignored while GUEST_OS_ID is 0; a write puts the hypercall page into guest RAM"),
    Msr(0x40000003, "HV_X64_MSR_RESET", _VM, why="partition-wide command: reads 0, writing 1 resets the VM"),
    Msr(0x40000021, "HV_X64_MSR_REFERENCE_TSC", _VM,
        why="partition-wide; KVM fills the page at the next entry"),
    Msr(0x40000106, "HV_X64_MSR_REENLIGHTENMENT_CONTROL", _VM, why="partition-wide"),
    Msr(0x40000107, "HV_X64_MSR_TSC_EMULATION_CONTROL", _VM, why="partition-wide"),
    Msr(0x40000108, "HV_X64_MSR_TSC_EMULATION_STATUS", _VM, why="partition-wide"),
    Msr(0x40000118, "HV_X64_MSR_TSC_INVARIANT_CONTROL", _VM,
        why="partition-wide; once set, the guest's CPUID shows an invariant TSC"),
    MsrRange(0x40000100, "HV_X64_MSR_CRASH_P{}", 5, _VM, why=_CRASH),
    Msr(0x40000105, "HV_X64_MSR_CRASH_CTL", _VM, why="partition-wide; only a guest's write reports a crash"),
    Msr(0x400000F1, "HV_X64_MSR_SYNDBG_CONTROL", _VM, why=_SYNDBG),
    Msr(0x400000F2, "HV_X64_MSR_SYNDBG_STATUS", _VM, why=_SYNDBG),
    Msr(0x400000F3, "HV_X64_MSR_SYNDBG_SEND_BUFFER", _VM, why=_SYNDBG),
    Msr(0x400000F4, "HV_X64_MSR_SYNDBG_RECV_BUFFER", _VM, why=_SYNDBG),
    Msr(0x400000F5, "HV_X64_MSR_SYNDBG_PENDING_BUFFER", _VM, why=_SYNDBG),
    Msr(0x400000FF, "HV_X64_MSR_SYNDBG_OPTIONS", _VM, why=_SYNDBG),
    Msr(0x40000002, "HV_X64_MSR_VP_INDEX",
        why="how the guest names this vCPU; KVM takes it from the VMM only"),
    Msr(0x40000073, "HV_X64_MSR_VP_ASSIST_PAGE",
        why="a write switches PV EOI on or off: before PV_EOI_EN; clears four bytes of its page"),
    Msr(0x40000070, "HV_X64_MSR_EOI", why="a command: a write ends an interrupt"),
    Msr(0x40000071, "HV_X64_MSR_ICR", why=_APIC_ALIAS),
    Msr(0x40000072, "HV_X64_MSR_TPR", why=_APIC_ALIAS),
    Msr(0x40000080, "HV_X64_MSR_SCONTROL", why=_SYNIC),
    Msr(0x40000081, "HV_X64_MSR_SVERSION", why="KVM's constant; needs the SynIC"),
    Msr(0x40000082, "HV_X64_MSR_SIEFP", why=_SYNIC),
    Msr(0x40000083, "HV_X64_MSR_SIMP", why=_SYNIC),
    MsrRange(0x40000090, "HV_X64_MSR_SINT{}", 16, why=_SYNIC),
    Msr(0x40000084, "HV_X64_MSR_EOM", why="a command: reads 0, a write says that a message was taken"),
    MsrRange(0x400000B1, "HV_X64_MSR_STIMER{}_COUNT", 4, stride=2,
             why="before CONFIG: up to 6.5 KVM enables or disables the timer when it is written"),
    MsrRange(0x400000B0, "HV_X64_MSR_STIMER{}_CONFIG", 4, stride=2, why="arms the timer: after COUNT"),
    Msr(0x400000F0, "HV_X64_MSR_GUEST_IDLE", why="a command: a read halts"),
)

_WALL = "kept once a VM; a write puts the boot time, taken from kvmclock, into guest RAM"
_PVCLOCK = "where this vCPU's kvmclock page is; both numbers are one value"

_KVM: tuple[Row, ...] = (
    Msr(0x11, "MSR_KVM_WALL_CLOCK", _VM, why=_WALL),
    Msr(0x4B564D00, "MSR_KVM_WALL_CLOCK_NEW", _VM, why=_WALL),
    Msr(0x12, "MSR_KVM_SYSTEM_TIME", why=_PVCLOCK),
    Msr(0x4B564D01, "MSR_KVM_SYSTEM_TIME_NEW", why=_PVCLOCK),
    Msr(0x4B564D03, "MSR_KVM_STEAL_TIME"),
    Msr(0x4B564D04, "MSR_KVM_PV_EOI_EN", why="shares its state with VP_ASSIST_PAGE: after it"),
    Msr(0x4B564D05, "MSR_KVM_POLL_CONTROL"),
    Msr(0x4B564D06, "MSR_KVM_ASYNC_PF_INT", why="the vector of page-ready events: before ASYNC_PF_EN"),
    Msr(0x4B564D02, "MSR_KVM_ASYNC_PF_EN",
        why="a write queues a page-ready event that wakes every waiting task"),
    Msr(0x4B564D07, "MSR_KVM_ASYNC_PF_ACK",
        why="a command: reads 0, writing 1 asks for the next page-ready event"),
    Msr(0x4B564D08, "MSR_KVM_MIGRATION_CONTROL",
        why="KVM keeps no value (reads 0): the VMM that traps it does"),
)

_CLOCKS: tuple[Row, ...] = (
    Msr(0x40000020, "HV_X64_MSR_TIME_REF_COUNT", _VM, _CLOCK,
        "partition-wide; 100 ns units of kvmclock: KVM_SET_CLOCK restores it, a write is ignored"),
    Msr(0x40000010, "HV_X64_MSR_VP_RUNTIME", _VCPU, _CLOCK,
        "100 ns units of run time: goes on from what is written"),
    Msr(0xE7, "MSR_IA32_MPERF", _VCPU, _CLOCK, "counts at the TSC's rate while the vCPU runs"),
    Msr(0xE8, "MSR_IA32_APERF", _VCPU, _CLOCK, "counts at the CPU's real rate while the vCPU runs"),
    Msr(0x3B, "MSR_IA32_TSC_ADJUST", _VCPU, _CLOCK,
        "goes with the TSC; written by the VMM it is stored and does not move the TSC"),
    Msr(0x10, "MSR_IA32_TSC", _VCPU, _CLOCK,
        "runs from the write; vCPUs written about a second apart or less are taken as one clock"),
    Msr(0x6E0, "MSR_IA32_TSC_DEADLINE", _VCPU, _CLOCK,
        "armed against the TSC, and ignored unless the LAPIC's timer is in deadline mode: last; 0 disarms"),
)

_GROUPS = (_FEATURES, _IDENTITIES, _CPU, _AMD, _MTRR, _MCE, _DEBUG, _TRACE, _PMU, _X2APIC, _HYPERV, _KVM,
           _CLOCKS)


def _expand() -> Iterator[Msr]:
    for group in _GROUPS:
        for row in group:
            yield from row.expand() if isinstance(row, MsrRange) else (row,)


MSRS: tuple[Msr, ...] = tuple(_expand())
"""Every row, ranges expanded, in restore order: features first, clocks last."""
