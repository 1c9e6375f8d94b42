"""Names of bits and fields of x86-64 registers, for people who read a value.

Sources: Intel SDM volumes 3 and 4, AMD APM volume 2, Linux arch/x86/include/asm/msr-index.h and
uapi/asm/processor-flags.h, kvm.h, kvm_para.h; include/uapi/linux/kvm.h. A table of an MSR has the MSR's name;
one of a struct's field is `struct.field`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from migstream.registers.bits import Field, flags

_MP_STATES = dict(enumerate((
    "RUNNABLE", "UNINITIALIZED", "INIT_RECEIVED", "HALTED", "SIPI_RECEIVED", "STOPPED", "CHECK_STOP",
    "OPERATING", "LOAD", "AP_RESET_HOLD", "SUSPENDED",
)))
_DELIVERY = {0: "FIXED", 2: "SMI", 4: "NMI", 5: "INIT", 7: "EXTINT"}
_TIMER_MODES = {0: "ONESHOT", 1: "PERIODIC", 2: "TSC_DEADLINE"}
_ACCESS = {1: "WRITE", 2: "IO", 3: "READ_WRITE"}
_LENGTH = {1: "2", 2: "8", 3: "4"}

_EFER = flags(
    "0:SCE 8:LME 10:LMA 11:NX 12:SVME 13:LMSLE 14:FFXSR 15:TCE 17:MCOMMIT 18:INTWB 20:UAIE 21:AUTOIBRS")
_XSTATE = flags(
    "0:X87 1:SSE 2:AVX 3:BNDREGS 4:BNDCSR 5:OPMASK 6:ZMM_HI256 7:HI16_ZMM 8:PT 9:PKRU 10:PASID 11:CET_U "
    "12:CET_S 13:HDC 14:UINTR 15:LBR 16:HWP 17:XTILE_CFG 18:XTILE_DATA 19:APX")
_APIC_BASE = (*flags("8:BSP 10:EXTD 11:ENABLE"), Field("PAGE", 12, 40))
_CET = (*flags("0:SHSTK_EN 1:WRSS_EN 2:ENDBR_EN 3:LEG_IW_EN 4:NO_TRACK_EN 5:SUPPRESS_DISABLE 10:SUPPRESS "
                "11:WAIT_ENDBR"), Field("LEG_BITMAP_PAGE", 12, 52))
_EVNTSEL = (
    Field("EVENT", 0, 8), Field("UMASK", 8, 8),
    *flags("16:USR 17:OS 18:EDGE 19:PIN_CONTROL 20:INT 21:ANY 22:ENABLE 23:INV"), Field("CMASK", 24, 8),
    *flags("32:IN_TX 33:IN_TX_CP"),
)
_AMD_EVNTSEL = (
    Field("EVENT", 0, 8), Field("UMASK", 8, 8), *flags("16:USR 17:OS 18:EDGE 20:INT 22:ENABLE 23:INV"),
    Field("CMASK", 24, 8), Field("EVENT_HIGH", 32, 4), *flags("40:GUEST_ONLY 41:HOST_ONLY"),
)
_LVT = (
    Field("VECTOR", 0, 8), Field("DELIVERY", 8, 3, _DELIVERY),
    *flags("12:PENDING 13:ACTIVE_LOW 14:REMOTE_IRR 15:LEVEL 16:MASKED"),
)
_VMX_CONTROLS = (Field("MUST_BE_1", 0, 32), Field("MAY_BE_1", 32, 32))
_HV_PAGE = (Field("ENABLE", 0), Field("PAGE", 12, 52))

_REGISTERS: dict[str, tuple[Field, ...]] = {
    "CR0": flags("0:PE 1:MP 2:EM 3:TS 4:ET 5:NE 16:WP 18:AM 29:NW 30:CD 31:PG"),
    "CR4": flags(
        "0:VME 1:PVI 2:TSD 3:DE 4:PSE 5:PAE 6:MCE 7:PGE 8:PCE 9:OSFXSR 10:OSXMMEXCPT 11:UMIP 12:LA57 13:VMXE "
        "14:SMXE 16:FSGSBASE 17:PCIDE 18:OSXSAVE 19:KL 20:SMEP 21:SMAP 22:PKE 23:CET 24:PKS 25:UINTR 27:LASS "
        "28:LAM_SUP 32:FRED"),
    "EFER": _EFER,
    "RFLAGS": (
        *flags("0:CF 1:FIXED 2:PF 4:AF 6:ZF 7:SF 8:TF 9:IF 10:DF 11:OF"), Field("IOPL", 12, 2),
        *flags("14:NT 16:RF 17:VM 18:AC 19:VIF 20:VIP 21:ID")),
    "XCR0": _XSTATE,
    "XSTATE_BV": _XSTATE,
    "XCOMP_BV": (*_XSTATE, Field("COMPACTED", 63)),
    "DR6": (*flags("0:B0 1:B1 2:B2 3:B3"), Field("FIXED_10_4", 4, 7),
            *flags("11:NOT_BUS_LOCK 12:BIT12 13:BD 14:BS 15:BT 16:NOT_RTM"), Field("FIXED_31_17", 17, 15)),
    "DR7": (
        *flags("0:L0 1:G0 2:L1 3:G1 4:L2 5:G2 6:L3 7:G3 8:LE 9:GE 10:FIXED 11:RTM 13:GD"),
        Field("RW0", 16, 2, _ACCESS), Field("LEN0", 18, 2, _LENGTH),
        Field("RW1", 20, 2, _ACCESS), Field("LEN1", 22, 2, _LENGTH),
        Field("RW2", 24, 2, _ACCESS), Field("LEN2", 26, 2, _LENGTH),
        Field("RW3", 28, 2, _ACCESS), Field("LEN3", 30, 2, _LENGTH)),
    "APIC_BASE": _APIC_BASE,
    "APIC_LVT": _LVT,
    "APIC_LVTT": (*_LVT, Field("MODE", 17, 2, _TIMER_MODES)),
    "APIC_SPIV": (Field("VECTOR", 0, 8), *flags("8:ENABLED 9:FOCUS_DISABLED 12:DIRECTED_EOI")),
    "MP_STATE": (Field("MP_STATE", 0, 32, _MP_STATES),),
}

_STRUCT_FIELDS: dict[str, tuple[Field, ...]] = {
    "kvm_vcpu_events.flags": flags(
        "0:VALID_NMI_PENDING 1:VALID_SIPI_VECTOR 2:VALID_SHADOW 3:VALID_SMM 4:VALID_PAYLOAD "
        "5:VALID_TRIPLE_FAULT"),
    "kvm_vcpu_events.interrupt.shadow": flags("0:MOV_SS 1:STI"),
    "kvm_clock_data.flags": flags("1:TSC_STABLE 2:REALTIME 3:HOST_TSC"),
    "kvm_sregs2.flags": flags("0:PDPTRS_VALID"),
    "kvm_nested_state.flags": flags("0:GUEST_MODE 1:RUN_PENDING 2:EVMCS 3:MTF_PENDING 8:GIF_SET"),
    "kvm_nested_state.format": (Field("FORMAT", 0, 16, {0: "VMX", 1: "SVM"}),),
    "kvm_nested_state.hdr.smm.flags": flags("0:SMM_GUEST_MODE 1:SMM_VMXON"),
    "kvm_nested_state.hdr.flags": flags("0:PREEMPTION_TIMER_DEADLINE"),
    "kvm_cpuid_entry2.flags": flags("0:SIGNIFICANT_INDEX 1:STATEFUL_FUNC 2:STATE_READ_NEXT"),
    "kvm_pit_state2.flags": flags("0:HPET_LEGACY 1:SPEAKER_DATA_ON"),
    "kvm_irqchip.chip_id": (Field("CHIP", 0, 32, {0: "PIC_MASTER", 1: "PIC_SLAVE", 2: "IOAPIC"}),),
}

_CPU_MSRS: dict[str, tuple[Field, ...]] = {
    "MSR_EFER": _EFER,
    "MSR_IA32_APICBASE": _APIC_BASE,
    "MSR_IA32_XSS": _XSTATE,
    "MSR_IA32_XFD": _XSTATE,
    "MSR_IA32_XFD_ERR": _XSTATE,
    "MSR_IA32_FEAT_CTL": (
        *flags("0:LOCKED 1:VMX_ENABLED_INSIDE_SMX 2:VMX_ENABLED_OUTSIDE_SMX"), Field("SENTER_LOCAL", 8, 7),
        *flags("15:SENTER_GLOBAL 17:SGX_LC_ENABLED 18:SGX_ENABLED 20:LMCE_ENABLED")),
    "MSR_IA32_SPEC_CTRL": flags(
        "0:IBRS 1:STIBP 2:SSBD 3:IPRED_DIS_U 4:IPRED_DIS_S 5:RRSBA_DIS_U 6:RRSBA_DIS_S 7:PSFD "
        "8:DDPD_U 10:BHI_DIS_S"),
    "MSR_AMD64_VIRT_SPEC_CTRL": flags("2:SSBD"),
    "MSR_IA32_TSX_CTRL": flags("0:RTM_DISABLE 1:CPUID_CLEAR"),
    "MSR_IA32_ARCH_CAPABILITIES": flags(
        "0:RDCL_NO 1:IBRS_ALL 2:RSBA 3:SKIP_VMENTRY_L1DFLUSH 4:SSB_NO 5:MDS_NO 6:PSCHANGE_MC_NO "
        "7:TSX_CTRL_MSR 8:TAA_NO 9:MCU_CONTROL 10:MISC_PACKAGE_CTLS 11:ENERGY_FILTERING_CTL 12:DOITM "
        "13:SBDR_SSDP_NO 14:FBSDP_NO 15:PSDP_NO 16:MCU_ENUMERATION 17:FB_CLEAR 18:FB_CLEAR_CTRL "
        "19:RRSBA 20:BHI_NO 21:XAPIC_DISABLE 23:OVERCLOCKING_STATUS 24:PBRSB_NO 25:GDS_CTRL 26:GDS_NO "
        "27:RFDS_NO 28:RFDS_CLEAR 29:IGN_UMONITOR 30:MON_UMON_MITG 62:ITS_NO"),
    "MSR_IA32_MISC_ENABLE": flags(
        "0:FAST_STRING 1:TCC 2:X87_COMPAT 3:TM1 4:SPLIT_LOCK_DISABLE 6:L3CACHE_DISABLE 7:EMON "
        "8:SUPPRESS_LOCK 9:PREFETCH_DISABLE 10:FERR 11:BTS_UNAVAIL 12:PEBS_UNAVAIL 13:TM2 "
        "16:ENHANCED_SPEEDSTEP 18:MWAIT 19:ADJ_PREF_DISABLE 20:SPEEDSTEP_LOCK 22:LIMIT_CPUID 23:XTPR_DISABLE "
        "24:L1D_CONTEXT 34:XD_DISABLE 37:DCU_PREF_DISABLE 38:TURBO_DISABLE 39:IP_PREF_DISABLE"),
    "MSR_MISC_FEATURES_ENABLES": flags("0:CPUID_FAULT 1:RING3MWAIT"),
    "MSR_PLATFORM_INFO": (Field("MAX_NON_TURBO_RATIO", 8, 8), Field("CPUID_FAULT", 31)),
    "MSR_IA32_UCODE_REV": (Field("PATCH_LEVEL", 0, 32), Field("REVISION", 32, 32)),
    "MSR_IA32_UMWAIT_CONTROL": (Field("C02_DISABLE", 0), Field("MAX_TIME", 2, 30)),
    "MSR_IA32_U_CET": _CET,
    "MSR_IA32_S_CET": _CET,
    "MSR_IA32_BNDCFGS": (*flags("0:ENABLE 1:PRESERVE"), Field("DIRECTORY_PAGE", 12, 52)),
    "MSR_IA32_MCG_CAP": (Field("BANKS", 0, 8), *flags("8:CTL_P 9:EXT_P 10:CMCI_P 11:TES_P"),
                         Field("EXT_COUNT", 16, 8), *flags("24:SER_P 25:EMC_P 26:ELOG_P 27:LMCE_P")),
    "MSR_IA32_MCG_STATUS": flags("0:RIPV 1:EIPV 2:MCIP 3:LMCES"),
    "MSR_IA32_MCG_EXT_CTL": flags("0:LMCE_EN"),
    "MSR_IA32_DEBUGCTLMSR": flags(
        "0:LBR 1:BTF 2:BUS_LOCK_DETECT 6:TR 7:BTS 8:BTINT 9:BTS_OFF_OS 10:BTS_OFF_USR 11:FREEZE_LBRS_ON_PMI "
        "12:FREEZE_PERFMON_ON_PMI 14:FREEZE_IN_SMM 15:RTM_DEBUG"),
    "MSR_MTRRdefType": (Field("TYPE", 0, 8, {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}),
                        *flags("10:FIXED_ENABLE 11:ENABLE")),
    "MSR_IA32_RTIT_CTL": (
        *flags("0:TRACEEN 1:CYCLEACC 2:OS 3:USR 4:PWR_EVT_EN 5:FUP_ON_PTW 6:FABRIC_EN 7:CR3EN 8:TOPA "
                "9:MTC_EN 10:TSC_EN 11:DISRETC 12:PTW_EN 13:BRANCH_EN"),
        Field("MTC_RANGE", 14, 4), Field("CYC_THRESH", 19, 4), Field("PSB_FREQ", 24, 4),
        Field("EVENT_EN", 31), Field("ADDR0", 32, 4), Field("ADDR1", 36, 4), Field("ADDR2", 40, 4),
        Field("ADDR3", 44, 4), Field("NOTNT", 55)),
    "MSR_IA32_RTIT_STATUS": (
        *flags("0:FILTEREN 1:CONTEXTEN 2:TRIGGEREN 3:BUFFOVF 4:ERROR 5:STOPPED"), Field("BYTECNT", 32, 17)),
    "MSR_AMD64_DE_CFG": flags("1:LFENCE_SERIALIZE 9:ZEN2_FP_BACKUP_FIX"),
    "MSR_K7_HWCR": flags("0:SMMLOCK 3:TLBCACHEDIS 6:FFDIS 8:IGNNE_EM 18:MCI_STATUS_WR_EN 24:TSC_FREQ_SEL "
                          "30:IRPERF_EN 35:CPUID_USER_DIS"),
    "MSR_VM_CR": flags("0:DPD 1:R_INIT 2:DIS_A20M 3:SVM_LOCK 4:SVM_DIS"),
}

_PMU_MSRS: dict[str, tuple[Field, ...]] = {
    "MSR_IA32_PERF_CAPABILITIES": (
        Field("LBR_FORMAT", 0, 6), *flags("6:PEBS_TRAP 7:PEBS_ARCH_REG"), Field("PEBS_FORMAT", 8, 4),
        *flags("12:FREEZE_WHILE_SMM 13:FW_WRITES 14:PEBS_BASELINE 15:PERF_METRICS 16:PEBS_OUTPUT_PT "
                "17:PEBS_TIMING_INFO")),
    "MSR_CORE_PERF_FIXED_CTR_CTRL": (
        Field("CTR0", 0, 4), Field("CTR1", 4, 4), Field("CTR2", 8, 4), Field("CTR3", 12, 4)),
    "MSR_CORE_PERF_GLOBAL_CTRL": (Field("PMC", 0, 32), Field("FIXED", 32, 16), Field("PERF_METRICS", 48)),
    "MSR_CORE_PERF_GLOBAL_STATUS": (
        Field("PMC", 0, 32), Field("FIXED", 32, 16),
        *flags("48:PERF_METRICS 55:TRACE_TOPA_PMI 58:LBR_FROZEN 59:COUNTERS_FROZEN 60:ASCI 61:OVF_UNCORE "
                "62:OVF_BUF 63:COND_CHGD")),
    "MSR_IA32_PEBS_ENABLE": (Field("PMC", 0, 32), Field("FIXED", 32, 16)),
    **{f"MSR_ARCH_PERFMON_EVENTSEL{n}": _EVNTSEL for n in range(12)},
    **{f"MSR_K7_EVNTSEL{n}": _AMD_EVNTSEL for n in range(4)},
    **{f"MSR_F15H_PERF_CTL{n}": _AMD_EVNTSEL for n in range(6)},
}

_VMX_MSRS: dict[str, tuple[Field, ...]] = {
    "MSR_IA32_VMX_BASIC": (
        Field("REVISION", 0, 31), Field("VMCS_SIZE", 32, 13), *flags("48:PHYS_32BIT 49:DUAL_MONITOR"),
        Field("MEM_TYPE", 50, 4, {6: "WB"}), *flags("54:INOUT 55:TRUE_CTLS 56:NO_HW_ERROR_CODE_CC")),
    "MSR_IA32_VMX_MISC": (
        Field("PREEMPTION_TIMER_RATE", 0, 5),
        *flags("5:SAVE_EFER_LMA 6:ACTIVITY_HLT 7:ACTIVITY_SHUTDOWN 8:ACTIVITY_WAIT_SIPI 14:INTEL_PT "
                "15:RDMSR_IN_SMM"),
        Field("CR3_TARGETS", 16, 9), Field("MAX_MSR", 25, 3),
        *flags("28:VMXOFF_BLOCK_SMI 29:VMWRITE_SHADOW_RO_FIELDS 30:ZERO_LEN_INS"),
        Field("MSEG_REVID", 32, 32)),
    "MSR_IA32_VMX_EPT_VPID_CAP": flags(
        "0:EPT_EXECUTE_ONLY 6:EPT_PAGE_WALK_4 7:EPT_PAGE_WALK_5 8:EPTP_UC 14:EPTP_WB 16:EPT_2MB 17:EPT_1GB "
        "20:INVEPT 21:EPT_AD 22:EPT_EXIT_INFO 23:EPT_SUPERVISOR_SHADOW_STACK 25:INVEPT_CONTEXT "
        "26:INVEPT_GLOBAL 32:INVVPID 40:INVVPID_ADDRESS 41:INVVPID_CONTEXT 42:INVVPID_GLOBAL "
        "43:INVVPID_CONTEXT_NO_GLOBALS"),
    "MSR_IA32_VMX_VMFUNC": flags("0:EPTP_SWITCHING"),
    **{f"MSR_IA32_VMX_{name}_CTLS": _VMX_CONTROLS for name in (
        "PINBASED", "PROCBASED", "EXIT", "ENTRY",
        "TRUE_PINBASED", "TRUE_PROCBASED", "TRUE_EXIT", "TRUE_ENTRY")},
    "MSR_IA32_VMX_PROCBASED_CTLS2": _VMX_CONTROLS,
}

_PV_MSRS: dict[str, tuple[Field, ...]] = {
    "MSR_KVM_SYSTEM_TIME": (Field("ENABLED", 0), Field("ADDRESS_DIV_2", 1, 63)),
    "MSR_KVM_SYSTEM_TIME_NEW": (Field("ENABLED", 0), Field("ADDRESS_DIV_2", 1, 63)),
    "MSR_KVM_STEAL_TIME": (Field("ENABLED", 0), Field("ADDRESS_DIV_64", 6, 58)),
    "MSR_KVM_PV_EOI_EN": (Field("ENABLED", 0), Field("ADDRESS_DIV_4", 2, 62)),
    "MSR_KVM_POLL_CONTROL": flags("0:HOST_POLLS"),
    "MSR_KVM_ASYNC_PF_EN": (*flags("0:ENABLED 1:SEND_ALWAYS 2:DELIVERY_AS_PF_VMEXIT 3:DELIVERY_AS_INT"),
                            Field("ADDRESS_DIV_64", 6, 58)),
    "MSR_KVM_ASYNC_PF_INT": (Field("VECTOR", 0, 8),),
    "MSR_KVM_MIGRATION_CONTROL": flags("0:READY"),
    "HV_X64_MSR_HYPERCALL": (*flags("0:ENABLE 1:LOCKED"), Field("PAGE", 12, 52)),
    "HV_X64_MSR_REFERENCE_TSC": _HV_PAGE,
    "HV_X64_MSR_VP_ASSIST_PAGE": _HV_PAGE,
    "HV_X64_MSR_SIEFP": _HV_PAGE,
    "HV_X64_MSR_SIMP": _HV_PAGE,
    "HV_X64_MSR_SCONTROL": flags("0:ENABLE"),
    "HV_X64_MSR_REENLIGHTENMENT_CONTROL": (
        Field("VECTOR", 0, 8), Field("ENABLED", 16), Field("TARGET_VP", 32, 32)),
    "HV_X64_MSR_TSC_EMULATION_CONTROL": flags("0:ENABLED"),
    "HV_X64_MSR_TSC_EMULATION_STATUS": flags("0:IN_PROGRESS"),
    "HV_X64_MSR_TSC_INVARIANT_CONTROL": flags("0:EXPOSE_INVARIANT_TSC"),
    "HV_X64_MSR_CRASH_CTL": flags("62:NOTIFY_MSG 63:NOTIFY"),
    **{f"HV_X64_MSR_SINT{n}": (Field("VECTOR", 0, 8), *flags("16:MASKED 17:AUTO_EOI 18:POLLING"))
       for n in range(16)},
    **{f"HV_X64_MSR_STIMER{n}_CONFIG": (
        *flags("0:ENABLE 1:PERIODIC 2:LAZY 3:AUTO_ENABLE"), Field("APIC_VECTOR", 4, 8),
        Field("DIRECT_MODE", 12), Field("SINTX", 16, 4)) for n in range(4)},
}

BITS: Mapping[str, tuple[Field, ...]] = MappingProxyType({
    **_REGISTERS, **_STRUCT_FIELDS, **_CPU_MSRS, **_PMU_MSRS, **_VMX_MSRS, **_PV_MSRS,
})
"""Fields by table name, ascending and not overlapping."""
