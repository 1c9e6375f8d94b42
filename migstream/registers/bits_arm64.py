"""Names of bits and fields of arm64 registers other than the ID registers, and of KVM's own for arm64.

Sources: Arm ARM (DDI 0487); Linux arch/arm64/tools/sysreg, arch/arm64/include/uapi/asm/kvm.h and ptrace.h. A table of
a struct's field is `struct.field`; `n` in a name stands for a number, `ELx` for an exception level.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from migstream.registers.bits import Field, fields

_MODES = {
    0x0: "EL0t", 0x4: "EL1t", 0x5: "EL1h", 0x8: "EL2t", 0x9: "EL2h", 0xC: "EL3t", 0xD: "EL3h", 0x10: "usr", 0x11: "fiq",
    0x12: "irq", 0x13: "svc", 0x16: "mon", 0x17: "abt", 0x1A: "hyp", 0x1B: "und", 0x1F: "sys",
}
_PSTATE = (Field("M", 0, 5, _MODES), *fields(
    "5:T 6:F 7:I 8:A 9:D 10/2:BTYPE 12:SSBS 13:ALLINT 16/4:GE 20:IL 21:SS 22:PAN 23:UAO 24:DIT 25:TCO 27:Q 28:V 29:C "
    "30:Z 31:N 32:PM 33:PPEND 34:EXLOCK 35:PACM"))
_EXCEPTIONS = {
    0x01: "WFx", 0x07: "FP_ASIMD", 0x09: "PAC", 0x0D: "BTI", 0x0E: "ILL", 0x11: "SVC32", 0x15: "SVC64", 0x16: "HVC64",
    0x17: "SMC64", 0x18: "SYS64", 0x19: "SVE", 0x1A: "ERET", 0x1C: "FPAC", 0x20: "IABT_LOW", 0x21: "IABT_CUR",
    0x22: "PC_ALIGN", 0x24: "DABT_LOW", 0x25: "DABT_CUR", 0x26: "SP_ALIGN", 0x2C: "FP_EXC64", 0x2D: "GCS",
    0x2F: "SERROR", 0x30: "BREAKPT_LOW", 0x31: "BREAKPT_CUR", 0x32: "SOFTSTP_LOW", 0x33: "SOFTSTP_CUR",
    0x34: "WATCHPT_LOW", 0x35: "WATCHPT_CUR", 0x3C: "BRK64",
}
_ESR = (*fields("0/25:ISS 25:IL"), Field("EC", 26, 6, _EXCEPTIONS), *fields("32/24:ISS2"))
_SIZES = "@32,36,40,42,44,48,52,56"
_TCF = "@1.SYNC,ASYNC,ASYMM"
_TTBR = fields("0:CnP 1/47:BADDR 48/16:ASID")
_VTTBR = fields("0:CnP 1/47:BADDR 48/16:VMID")
_MAIR = fields(" ".join(f"{8 * n}/8:Attr{n}" for n in range(8)))
_PERMISSIONS = fields(" ".join(f"{4 * n}/4:Perm{n}" for n in range(16)))
_LENGTH = fields("0/4:LEN")
_SMCR = fields("0/4:LEN 30:EZT0 31:FA64")
_TCR2 = "0:PnCH 1:PIE 2:E0POE 3:POE 4:AIE 5:D128 10:PTTWI 11:HAFT"
_GCSCR = fields("0:PCRSEL 5:RVCHKEN 6:EXLOCKEN 8:PUSHMEn 9:STREn")

_CORE: dict[str, tuple[Field, ...]] = {
    "PSTATE": _PSTATE,
    "FPCR": fields("0:FIZ 1:AH 2:NEP 8:IOE 9:DZE 10:OFE 11:UFE 12:IXE 13:EBF 15:IDE 16/3:Len 19:FZ16 20/2:Stride "
                   "22/2:RMode@RN,RP,RM,RZ 24:FZ 25:DN 26:AHP"),
    "FPSR": fields("0:IOC 1:DZC 2:OFC 3:UFC 4:IXC 7:IDC 27:QC 28:V 29:C 30:Z 31:N"),
    "SVCR": fields("0:SM 1:ZA"),
    "FPMR": fields("0/3:F8S1 3/3:F8S2 6/3:F8D 14:OSM 15:OSC 16/7:LSCALE 24/8:NSCALE 32/6:LSCALE2"),
}

_CONTROL: dict[str, tuple[Field, ...]] = {
    "SCTLR_EL1": fields(
        "0:M 1:A 2:C 3:SA 4:SA0 5:CP15BEN 6:nAA 7:ITD 8:SED 9:UMA 10:EnRCTX 11:EOS 12:I 13:EnDB 14:DZE 15:UCT 16:nTWI "
        "18:nTWE 19:WXN 20:TSCXT 21:IESB 22:EIS 23:SPAN 24:E0E 25:EE 26:UCI 27:EnDA 28:nTLSMD 29:LSMAOE 30:EnIB "
        "31:EnIA "
        f"32:CMOW 33:MSCEn 34:EnFPM 35:BT0 36:BT1 37:ITFSB 38/2:TCF0{_TCF} 40/2:TCF{_TCF} 42:ATA0 43:ATA 44:DSSBS "
        "45:TWEDEn 46/4:TWEDEL 50:TMT0 51:TMT 52:TME0 53:TME 54:EnASR 55:EnAS0 56:EnALS 57:EPAN 58:TCSO0 59:TCSO "
        "60:EnTP2 61:NMI 62:SPINTMASK 63:TIDCP"),
    "SCTLR2_EL1": fields("2:NMEA 3:EnADERR 4:EnANERR 5:EASE 6:EnIDCP128 7:EnPACM 8:EnPACM0 9:CPTA 10:CPTA0 11:CPTM "
                         "12:CPTM0"),
    "CPACR_EL1": fields("16/2:ZEN 20/2:FPEN 24/2:SMEN 28:TTA 29:E0POE 30:TAM 31:TCPAC"),
    "TCR_EL1": fields(
        "0/6:T0SZ 7:EPD0 8/2:IRGN0 10/2:ORGN0 12/2:SH0 14/2:TG0@4K,64K,16K 16/6:T1SZ 22:A1 23:EPD1 24/2:IRGN1 "
        "26/2:ORGN1 "
        f"28/2:SH1 30/2:TG1@1.16K,4K,64K 32/3:IPS{_SIZES} 36:AS 37:TBI0 38:TBI1 39:HA 40:HD 41:HPD0 42:HPD1 43:HWU059 "
        "44:HWU060 45:HWU061 46:HWU062 47:HWU159 48:HWU160 49:HWU161 50:HWU162 51:TBID0 52:TBID1 53:NFD0 54:NFD1 "
        "55:E0PD0 56:E0PD1 57:TCMA0 58:TCMA1 59:DS 60:MTX0 61:MTX1"),
    "TCR2_EL1": fields(f"{_TCR2} 14:DisCH0 15:DisCH1 16:A2 17:FNG0 18:FNG1 20:FNGNA0 21:FNGNA1"),
    "TCR2_EL2": fields(f"{_TCR2} 12:AMEC0 13:AMEC1 14:DisCH0 15:DisCH1 16:A2 17:FNG0 18:FNG1"),
    "TTBR0_EL1": _TTBR,
    "TTBR1_EL1": _TTBR,
    "TTBR0_EL2": _TTBR,
    "TTBR1_EL2": _TTBR,
    "MAIR_EL1": _MAIR,
    "MAIR_EL2": _MAIR,
    **{f"{name}_EL{level}": _PERMISSIONS for name in ("PIR", "PIRE0", "POR") for level in (1, 2)},
    "POR_EL0": _PERMISSIONS,
    "ESR_EL1": _ESR,
    "ESR_EL2": _ESR,
    "DISR_EL1": fields("0/24:ISS 24:IDS 31:A"),
    "ZCR_EL1": _LENGTH,
    "ZCR_EL2": _LENGTH,
    "SMCR_EL1": _SMCR,
    "SMCR_EL2": _SMCR,
    "SMPRI_EL1": fields("0/4:PRIORITY"),
    "GCSCR_EL1": _GCSCR,
    "GCSCR_EL2": _GCSCR,
    "GCSCRE0_EL1": fields("0:PCRSEL 5:RVCHKEN 8:PUSHMEn 9:STREn 10:nTR"),
    "GCR_EL1": fields("0/16:Exclude 16:RRND"),
    "RGSR_EL1": fields("0/4:TAG 8/16:SEED"),
    "TFSR_EL1": fields("0:TF0 1:TF1"),
    "TFSR_EL2": fields("0:TF0 1:TF1"),
    "TFSRE0_EL1": fields("0:TF0 1:TF1"),
}

_EL2: dict[str, tuple[Field, ...]] = {
    "HCR_EL2": fields(
        "0:VM 1:SWIO 2:PTW 3:FMO 4:IMO 5:AMO 6:VF 7:VI 8:VSE 9:FB 10/2:BSU 12:DC 13:TWI 14:TWE 15:TID0 16:TID1 17:TID2 "
        "18:TID3 19:TSC 20:TIDCP 21:TACR 22:TSW 23:TPCP 24:TPU 25:TTLB 26:TVM 27:TGE 28:TDZ 29:HCD 30:TRVM 31:RW 32:CD "
        "33:ID 34:E2H 35:TLOR 36:TERR 37:TEA 40:APK 41:API 42:NV 43:NV1 44:AT 45:NV2 46:FWB 47:FIEN 48:GPF 49:TID4 "
        "50:TICAB 51:AMVOFFEN 52:TOCU 53:EnSCXT 54:TTLBIS 55:TTLBOS 56:ATA 57:DCT 58:TID5 59:TWEDEn 60/4:TWEDEL"),
    "HCRX_EL2": fields(
        "0:EnAS0 1:EnALS 2:EnASR 3:FnXS 4:FGTnXS 5:SMPME 6:TALLINT 7:VINMI 8:VFNMI 9:CMOW 10:MCE2 11:MSCEn 14:TCR2En "
        "15:SCTLR2En 16:PTTWI 17:D128En 18:SnERR 19:TMEA 20:EnSDERR 21:EnIDCP128 22:GCSEn 23:EnFPM 24:PACMEn "
        "25:VTLBIDEn "
        "26:SRMASKEn 27:NVTGE"),
    "VTTBR_EL2": _VTTBR,
    "VTCR_EL2": fields(f"0/6:T0SZ 6/2:SL0 8/2:IRGN0 10/2:ORGN0 12/2:SH0 14/2:TG0@4K,64K,16K 16/3:PS{_SIZES} 19:VS "
                       "21:HA 22:HD 25:HWU59 26:HWU60 27:HWU61 28:HWU62 29:NSW 30:NSA 31:RES1 32:DS 33:SL2"),
    "ICH_HCR_EL2": fields("0:En 1:UIE 2:LRENPIE 3:NPIE 4:VGRP0EIE 5:VGRP0DIE 6:VGRP1EIE 7:VGRP1DIE 8:vSGIEOICount "
                          "10:TC 11:TALL0 12:TALL1 13:TSEI 14:TDIR 15:DVIM 27/5:EOIcount"),
    "ICH_VMCR_EL2": fields("0:VENG0 1:VENG1 2:VAckCtl 3:VFIQEn 4:VCBPR 9:VEOIM 18/3:VBPR1 21/3:VBPR0 24/8:VPMR"),
    "ICH_LRn_EL2": fields("0/32:vINTID 32/13:pINTID 48/8:Priority 59:NMI 60:Group 61:HW "
                          "62/2:State@INACTIVE,PENDING,ACTIVE,PENDING_ACTIVE"),
}

_COUNTERS = fields("0/31:P 31:C 32:F0")
_EVENT_FILTER = "24:SH 26:M 27:NSH 28:NSU 29:NSK 30:U 31:P"
_TIMER = fields("0:ENABLE 1:IMASK 2:ISTATUS")

_DEBUG_PMU_TIMER: dict[str, tuple[Field, ...]] = {
    "MDSCR_EL1": fields("0:SS 6:ERR 12:TDCC 13:KDE 14:HDE 15:MDE 19:SC2 21:TDA 22/2:INTdis 26:TXU 27:RXO 29:TXfull "
                        "30:RXfull 31:TFO 32:EMBWE 33:TTA 34:EnSPM 35:EHBWE"),
    "MDCCINT_EL1": fields("29:TX 30:RX"),
    "OSLSR_EL1": fields("0:OSLM0 1:OSLK 2:nTT 3:OSLM1"),
    "DBGBCRn_EL1": fields("0:E 1/2:PMC 5/4:BAS 13:HMC 14/2:SSC 16/4:LBN 20/4:BT 24/5:MASK 29:SSCE 30/2:LBNX"),
    "DBGWCRn_EL1": fields("0:E 1/2:PAC 3/2:LSC@1.LOAD,STORE,ANY 5/8:BAS 13:HMC 14/2:SSC 16/4:LBN 20:WT 24/5:MASK "
                          "29:SSCE 30/2:LBNX"),
    "PMCR_EL0": fields("0:E 1:P 2:C 3:D 4:X 5:DP 6:LC 7:LP 9:FZO 11/5:N 16/8:IDCODE 24/8:IMP 32:FZS"),
    **{f"{name}_EL0": _COUNTERS for name in ("PMCNTENSET", "PMCNTENCLR", "PMOVSSET", "PMOVSCLR")},
    "PMINTENSET_EL1": _COUNTERS,
    "PMINTENCLR_EL1": _COUNTERS,
    "PMUSERENR_EL0": fields("0:EN 1:SW 2:CR 3:ER 4:UEN 5:IR 6:TID"),
    "PMSELR_EL0": fields("0/5:SEL"),
    "PMEVTYPERn_EL0": fields(f"0/16:evtCount {_EVENT_FILTER} 32/12:TH 61/3:TC"),
    "PMCCFILTR_EL0": fields(_EVENT_FILTER),
    "CNTKCTL_EL1": fields("0:EL0PCTEN 1:EL0VCTEN 2:EVNTEN 3:EVNTDIR 4/4:EVNTI 8:EL0VTEN 9:EL0PTEN 17:EVNTIS "
                          "18:CNTVMASK 19:CNTPMASK"),
    **{name: _TIMER for name in ("TIMER_CTL", "PTIMER_CTL", "CNTHP_CTL_EL2", "CNTHV_CTL_EL2")},
}

_FEATURES = fields("0:POWER_OFF 1:EL1_32BIT 2:PSCI_0_2 3:PMU_V3 4:SVE 5:PTRAUTH_ADDRESS 6:PTRAUTH_GENERIC 7:HAS_EL2 "
                   "8:HAS_EL2_E2H0")
_PSCI = {major << 16 | minor: f"{major}.{minor}" for major in (0, 1) for minor in range(16)}
_SPECTRE = fields("0/4:LEVEL@NOT_AVAIL,AVAIL,NOT_REQUIRED")
_VECTOR_LENGTHS = {
    f"sve_vls.vqs.{word}": fields(" ".join(f"{bit}:{128 * (64 * word + bit + 1)}" for bit in range(64)))
    for word in range(8)
}

_KVM: dict[str, tuple[Field, ...]] = {
    "PSCI_VERSION": (Field("PSCI", 0, 32, _PSCI),),
    "SMCCC_ARCH_WORKAROUND_1": _SPECTRE,
    "SMCCC_ARCH_WORKAROUND_2": fields("0/4:LEVEL@NOT_AVAIL,UNKNOWN,AVAIL,NOT_REQUIRED 4:ENABLED"),
    "SMCCC_ARCH_WORKAROUND_3": _SPECTRE,
    "STD_BMAP": fields("0:TRNG_V1_0"),
    "STD_HYP_BMAP": fields("0:PV_TIME"),
    "VENDOR_HYP_BMAP": fields("0:FUNC_FEAT 1:PTP"),
    "VENDOR_HYP_BMAP_2": fields("0:DISCOVER_IMPL_VER 1:DISCOVER_IMPL_CPUS"),
    "kvm_vcpu_init.target": (Field("TARGET", 0, 32, {
        0: "AEM_V8", 1: "FOUNDATION_V8", 2: "CORTEX_A57", 3: "XGENE_POTENZA", 4: "CORTEX_A53", 5: "GENERIC_V8"}),),
    "kvm_vcpu_init.features.0": _FEATURES,
    **_VECTOR_LENGTHS,
}

BITS: Mapping[str, tuple[Field, ...]] = MappingProxyType({**_CORE, **_CONTROL, **_EL2, **_DEBUG_PMU_TIMER, **_KVM})
"""Fields by table name, ascending and not overlapping. A bit of `sve_vls` is named by its vector length in bits."""
