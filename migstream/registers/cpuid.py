"""The words of a `struct kvm_cpuid2` (include/uapi/asm/kvm.h of x86)."""

from __future__ import annotations

import struct
from functools import lru_cache

from migstream.registers.bits import Field, flags

Word = tuple[int, int, int]
"""Leaf, subleaf, and 0 to 3 for EAX to EDX."""

EAX, EBX, ECX, EDX = range(4)


@lru_cache(maxsize=64)
def cpuid_words(value: bytes) -> dict[Word, int]:
    """Words of a `struct kvm_cpuid2`; none for no table. Kept, because many hosts are asked: not to be changed."""
    (count,) = struct.unpack_from("<I", value) if len(value) >= 4 else (0,)
    out: dict[Word, int] = {}
    for at in range(8, min(8 + 40 * count, len(value) - 39), 40):
        function, index, _, *words = struct.unpack_from("<7I", value, at)
        out |= {(function, index, n): word for n, word in enumerate(words)}
    return out


FEATURE_WORDS: frozenset[Word] = frozenset((leaf, subleaf, word) for leaf, subleaf, words in (
    (1, 0, (ECX, EDX)), (6, 0, (EAX,)), (7, 0, (EBX, ECX, EDX)), (7, 1, (EAX, EBX, ECX, EDX)), (7, 2, (EDX,)),
    (0xD, 0, (EAX, EDX)), (0xD, 1, (EAX, ECX, EDX)), (0x12, 0, (EAX,)), (0x14, 0, (EBX, ECX)), (0x19, 0, (EBX,)),
    (0x1E, 1, (EAX,)), (0x24, 0, (EBX,)), (0x4000_0001, 0, (EAX,)), (0x8000_0001, 0, (ECX, EDX)),
    (0x8000_0007, 0, (EBX, EDX)), (0x8000_0008, 0, (EBX,)), (0x8000_000A, 0, (EDX,)), (0x8000_001F, 0, (EAX,)),
    (0x8000_0021, 0, (EAX,)), (0x8000_0022, 0, (EAX,)), (0xC000_0001, 0, (EDX,)),
) for word in words)
"""Words that are sets of features, one bit each (Intel SDM 2A, AMD APM 3; KVM's own at 0x40000001; Centaur's at
0xC0000001). A bit is there for a fleet if all hosts have it; one that the guest saw was a promise."""

COMPUTED: dict[Word, int] = {
    (1, 0, EBX): 0xFFFF_0000, (0xB, 0, EDX): 0xFFFF_FFFF, (0xB, 1, EDX): 0xFFFF_FFFF, (0x1F, 0, EDX): 0xFFFF_FFFF,
    (0x8000_001E, 0, EAX): 0xFFFF_FFFF, (0x8000_001E, 0, EBX): 0xFFFF_FFFF,
    (0xD, 0, EBX): 0xFFFF_FFFF, (0xD, 1, EBX): 0xFFFF_FFFF,
}
"""Bits that are each vCPU's own (APIC ids) or that KVM computes (sizes of what is enabled): not compared."""

STATE_BITS: dict[Word, int] = {(1, 0, ECX): 1 << 27, (1, 0, EDX): 1 << 9, (7, 0, ECX): 1 << 4}
"""Bits that KVM computes from the vCPU's state: OSXSAVE, APIC, OSPKE."""

_SIZES: tuple[Word, ...] = ((0xD, 0, EBX), (0xD, 1, EBX))
"""What the XSAVE area of the components that are on now takes, bytes."""


def follows_state(value: bytes) -> bytes:
    """A mask, as long as a `struct kvm_cpuid2`, of what KVM computes anew when the vCPU's state is written: OSXSAVE,
    APIC, OSPKE and the size of the XSAVE area (arch/x86/kvm/cpuid.c, kvm_update_cpuid_runtime)."""
    bits = STATE_BITS | dict.fromkeys(_SIZES, 0xFFFF_FFFF)
    mask = bytearray(len(value))
    (count,) = struct.unpack_from("<I", value)
    for at in range(8, min(8 + 40 * count, len(value) - 39), 40):
        leaf, subleaf = struct.unpack_from("<2I", value, at)
        for word in (EAX, EBX, ECX, EDX):
            struct.pack_into("<I", mask, at + 12 + 4 * word, bits.get((leaf, subleaf, word), 0))
    return bytes(mask)


RUNTIME_BITS: dict[Word, int] = {
    (1, 0, 2): 1 << 27 | 1 << 31 | 1 << 24 | 1 << 21 | 1 << 3,  # OSXSAVE, hypervisor, TSC_DEADLINE, x2APIC; MONITOR
    (1, 0, 3): 1 << 9 | 1 << 28,                                # APIC follows APICBASE; HTT is topology
    (7, 0, 2): 1 << 4,                                          # OSPKE follows CR4.PKE
}
"""Bits that a guest's own registers, its VMM or the topology decide, whatever KVM_GET_SUPPORTED_CPUID says."""


def bit_name(leaf: int, subleaf: int, word: int, bit: int) -> str:
    """`bit 31 HYPERVISOR`; a bit without a name by its number alone."""
    names = NAMES.get((leaf, subleaf, word), ())
    return " ".join((f"bit {bit}", *(field.name for field in names if field.low == bit)))


NAMES: dict[Word, tuple[Field, ...]] = {
    (1, 0, 2): flags(
        "0:SSE3 1:PCLMULQDQ 2:DTES64 3:MONITOR 4:DS_CPL 5:VMX 6:SMX 7:EST 8:TM2 9:SSSE3 10:CNXT_ID 11:SDBG 12:FMA "
        "13:CX16 14:XTPR 15:PDCM 17:PCID 18:DCA 19:SSE4_1 20:SSE4_2 21:X2APIC 22:MOVBE 23:POPCNT 24:TSC_DEADLINE "
        "25:AES 26:XSAVE 27:OSXSAVE 28:AVX 29:F16C 30:RDRAND 31:HYPERVISOR"),
    (1, 0, 3): flags(
        "0:FPU 1:VME 2:DE 3:PSE 4:TSC 5:MSR 6:PAE 7:MCE 8:CX8 9:APIC 11:SEP 12:MTRR 13:PGE 14:MCA 15:CMOV 16:PAT "
        "17:PSE36 18:PSN 19:CLFSH 21:DS 22:ACPI 23:MMX 24:FXSR 25:SSE 26:SSE2 27:SS 28:HTT 29:TM 31:PBE"),
    (7, 0, 1): flags(
        "0:FSGSBASE 1:TSC_ADJUST 2:SGX 3:BMI1 4:HLE 5:AVX2 6:FDP_EXCPTN_ONLY 7:SMEP 8:BMI2 9:ERMS 10:INVPCID 11:RTM "
        "12:CQM 13:ZERO_FCS_FDS 14:MPX 15:RDT_A 16:AVX512F 17:AVX512DQ 18:RDSEED 19:ADX 20:SMAP 21:AVX512IFMA "
        "23:CLFLUSHOPT 24:CLWB 25:INTEL_PT 26:AVX512PF 27:AVX512ER 28:AVX512CD 29:SHA 30:AVX512BW 31:AVX512VL"),
    (7, 0, 2): flags(
        "1:AVX512VBMI 2:UMIP 3:PKU 4:OSPKE 5:WAITPKG 6:AVX512_VBMI2 7:SHSTK 8:GFNI 9:VAES 10:VPCLMULQDQ "
        "11:AVX512_VNNI 12:AVX512_BITALG 14:AVX512_VPOPCNTDQ 16:LA57 22:RDPID 24:BUS_LOCK_DETECT 25:CLDEMOTE "
        "27:MOVDIRI 28:MOVDIR64B 29:ENQCMD 30:SGX_LC"),
    (7, 0, 3): flags(
        "2:AVX512_4VNNIW 3:AVX512_4FMAPS 4:FSRM 8:AVX512_VP2INTERSECT 9:SRBDS_CTRL 10:MD_CLEAR 13:TSX_FORCE_ABORT "
        "14:SERIALIZE 15:HYBRID 16:TSXLDTRK 18:PCONFIG 19:ARCH_LBR 20:IBT 22:AMX_BF16 23:AVX512_FP16 24:AMX_TILE "
        "25:AMX_INT8 26:SPEC_CTRL 27:STIBP 28:FLUSH_L1D 29:ARCH_CAPABILITIES 30:CORE_CAPABILITIES 31:SSBD"),
    (0xD, 1, 0): flags("0:XSAVEOPT 1:XSAVEC 2:XGETBV1 3:XSAVES 4:XFD"),
    (0x4000_0001, 0, 0): flags(
        "0:CLOCKSOURCE 1:NOP_IO_DELAY 2:MMU_OP 3:CLOCKSOURCE2 4:ASYNC_PF 5:STEAL_TIME 6:PV_EOI 7:PV_UNHALT "
        "9:PV_TLB_FLUSH 10:ASYNC_PF_VMEXIT 11:PV_SEND_IPI 12:POLL_CONTROL 13:PV_SCHED_YIELD 14:ASYNC_PF_INT "
        "15:MSI_EXT_DEST_ID 16:HC_MAP_GPA_RANGE 17:MIGRATION_CONTROL 24:CLOCKSOURCE_STABLE"),
    (0x8000_0001, 0, 2): flags(
        "0:LAHF_LM 1:CMP_LEGACY 2:SVM 3:EXTAPIC 4:CR8_LEGACY 5:ABM 6:SSE4A 7:MISALIGNSSE 8:3DNOWPREFETCH 9:OSVW "
        "10:IBS 11:XOP 12:SKINIT 13:WDT 15:LWP 16:FMA4 17:TCE 19:NODEID_MSR 21:TBM 22:TOPOEXT 23:PERFCTR_CORE "
        "24:PERFCTR_NB 26:BPEXT 27:PTSC 28:PERFCTR_LLC 29:MWAITX"),
    (0x8000_0001, 0, 3): flags("11:SYSCALL 20:NX 22:MMXEXT 25:FXSR_OPT 26:GBPAGES 27:RDTSCP 29:LM 30:3DNOWEXT "
                               "31:3DNOW"),
    (0x8000_0008, 0, 1): flags(
        "0:CLZERO 1:IRPERF 2:XSAVEERPTR 4:RDPRU 9:WBNOINVD 12:IBPB 14:IBRS 15:STIBP 17:STIBP_ALWAYS_ON 24:SSBD "
        "25:VIRT_SSBD 26:SSB_NO 28:PSFD 29:BTC_NO"),
    (0x8000_000A, 0, 3): flags(
        "0:NPT 1:LBRV 2:SVM_LOCK 3:NRIPS 4:TSC_SCALE 5:VMCB_CLEAN 6:FLUSHBYASID 7:DECODEASSISTS 10:PAUSEFILTER "
        "12:PFTHRESHOLD 13:AVIC 15:V_VMSAVE_VMLOAD 16:VGIF 25:VNMI"),
}
"""Feature bits by leaf, subleaf and word: Intel SDM 2A CPUID, AMD APM 3 appendix E, uapi/asm/kvm_para.h."""
