"""arm64: divergences that were met and mended; see `test_recorded`."""

from __future__ import annotations

import pytest

from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.backends.sim.arm64 import ids
from migstream.registers import gic, vcpu_features
from migstream.registers import ids as all_ids
from tests.fidelity.calls import Call, call
from tests.fidelity.recorded import Recorded
from tests.fidelity.test_recorded import ask, here

V510, V61, V612, V72 = "arm64-5.10", "arm64-6.1", "arm64-6.12", "arm64-7.2"
ALL, OLD, NEW = (V510, V61, V612, V72), (V510, V61), (V612, V72)
PSCI, PMU = vcpu_features.PSCI_0_2, vcpu_features.PSCI_0_2 | vcpu_features.PMU_V3
POWER_OFF, E2H0, UNKNOWN = 1, 1 << 8, 1 << 31
RUN, INIT = call("run", vcpu=0), call("init", vcpu=0, features=PSCI)


def vm(vcpus: int = 1, features: int = PSCI, caps: tuple[int, ...] = ()) -> tuple[Call, ...]:
    """A VM with vCPUs."""
    return (call("create", vcpus=vcpus, caps=list(caps)),
            *(call("init", vcpu=vcpu, features=features) for vcpu in range(vcpus)))


def get(id: int, vcpu: int = 0) -> Call:
    return call("get", vcpu=vcpu, id=id)


def put(id: int, value: int, vcpu: int = 0, size: int = 8) -> Call:
    return call("set", vcpu=vcpu, id=id, value=value.to_bytes(size, "little").hex())


def word(value: int) -> dict[str, str]:
    return {"value": value.to_bytes(8, "little").hex()}


def sees(*asked: int) -> Call:
    return call("execute", vcpu=0, asked=list(asked))


def saw(value: int) -> dict[str, str]:
    return {"exit": "KVM_EXIT_MMIO", "seen": hex(value)}


NEVER_WRITTEN = 0x1DE7_EC7E_DBAD_C0DE
SERROR = put(ids.VCPU_EVENTS, 1, size=64)
NO_SERROR = {"value": (0x100).to_bytes(64, "little").hex()}
AN_SERROR = {"value": (0x101 | 1 << 88).to_bytes(64, "little").hex()}
PFR0 = 0x1101_0010_2111_0222

ROWS: tuple[Recorded, ...] = (
    Recorded(NEW, (*vm(), RUN, get(ids.ID_PFR1)), word(0x11001), "a run without a vGIC takes GIC from ID_PFR1_EL1"),
    Recorded(NEW, (*vm(), RUN, put(ids.ID_AA64PFR0, PFR0)), {"set": {"errno": 16}}, "and it can't be put back"),
    Recorded(OLD, (*vm(), RUN, get(ids.ID_AA64PFR0)), word(PFR0), "before 6.12 GIC stays"),
    Recorded((V61, *NEW), (*vm(), RUN, get(ids.AFSR0)), word(0), "AFSR0_EL1 goes through the CPU, which has none"),
    Recorded((V510,), (*vm(), RUN, get(ids.AFSR0)), word(NEVER_WRITTEN), "5.10 leaves before it loads the CPU"),
    Recorded(ALL, (*vm(), sees(ids.MIDR), get(ids.AFSR0)), word(0), "a guest that ran has been in the CPU"),
    Recorded((V61,), (*vm(), RUN, get(ids.CSSELR)), word(0xE), "CSSELR_EL1 too, up to 6.2"),
    Recorded(ALL, (*vm(), put(ids.VBAR, (1 << 64) - 1), sees(ids.MIDR), get(ids.VBAR)), word((1 << 64) - 32),
             "VBAR_EL1 has no low bits"),
    Recorded((V510, V61, V612), (call("create", vcpus=1), get(ids.VCPU_EVENTS)), NO_SERROR, "events before init"),
    Recorded((V72,), (call("create", vcpus=1), get(ids.VCPU_EVENTS)), {"errno": 8}, "since 6.18 they want init"),
    Recorded(OLD, (*vm(), call("init", vcpu=0, features=PSCI | POWER_OFF)), {"errno": 22}, "POWER_OFF is a feature"),
    Recorded(NEW, (*vm(), call("init", vcpu=0, features=PSCI | POWER_OFF)), {"errno": 0}, "POWER_OFF is none any more"),
    Recorded(OLD, (call("create", vcpus=1), call("init", vcpu=0, features=PSCI | UNKNOWN),
                   call("init", vcpu=0, features=0), put(ids.PSCI_VERSION, 2)), {"set": {"errno": 0}},
             "features that a refused init left"),
    Recorded((V510,), (*vm(1, PMU), RUN), {"errno": 0}, "5.10 runs a PMU that nobody initialized"),
    Recorded((V61, *NEW), (*vm(1, PMU), RUN), {"errno": 22}, "since 5.11 a PMU has to be initialized"),
    Recorded(NEW, (*vm(), RUN, put(ids.ID_AA64DFR0, 0x3C5)), {"set": {"errno": 22}}, "DebugVer before the run"),
    Recorded((V612,), (*vm(), RUN, put(ids.CTR, 0)), {"set": {"errno": 16}}, "6.12: CTR_EL0 after a run"),
    Recorded((V72,), (*vm(), RUN, put(ids.CTR, 0)), {"set": {"errno": 22}}, "7.2: L1Ip before that"),
    Recorded((V612,), (*vm(), RUN, put(ids.ID_AA64PFR0, 0x20)), {"set": {"errno": 16}}, "6.12: EL0 after a run"),
    Recorded((V72,), (*vm(), RUN, put(ids.ID_AA64PFR0, 0x20)), {"set": {"errno": 22}}, "7.2: EL0 before that"),
    Recorded((V612,), (*vm(2, PMU), put(ids.PMCNTENCLR, (1 << 64) - 1)), {"vCPU 0": word(0),
                                                                          "vCPU 1": word(0x8000_001E)},
             "PMCNTENCLR_EL0 is a vCPU's own"),
    Recorded(NEW, (*vm(1, PMU), put(ids.PMCR, 0), get(ids.PMCNTENSET)), word(0x8000_0000), "fewer counters and bits"),
    Recorded(ALL, (*vm(), put(ids.ELR_EL1, 77), INIT, get(ids.ELR_EL1)), word(77), "init leaves ELR_EL1"),
    Recorded(OLD, (*vm(), put(ids.MPIDR, 0x8000_0007), INIT, get(ids.MPIDR)), word(0x8000_0000), "init resets MPIDR"),
    Recorded(NEW, (*vm(), put(ids.MPIDR, 0x8000_0007), INIT, get(ids.MPIDR)), word(0x8000_0007), "init leaves MPIDR"),
    Recorded((V510, V61, V612), (*vm(), put(ids.TIMER_CVAL, 1 << 63), INIT, get(ids.TIMER_CVAL)), word(1 << 63),
             "init leaves TIMER_CVAL"),
    Recorded((V72,), (*vm(), put(ids.TIMER_CVAL, 1 << 63), INIT, get(ids.TIMER_CVAL)), word(0),
             "7.2 resets TIMER_CVAL"),
    Recorded((V72,), (*vm(), put(ids.TIMER_CTL, 0xFF01), RUN, get(ids.TIMER_CTL)), word(5),
             "7.2 keeps the CPU's ISTATUS"),
    Recorded((V72,), (*vm(), put(ids.TIMER_CTL, 1), get(ids.TIMER_CTL)), word(1), "and computes none"),
    Recorded((V61, V612), (*vm(), put(ids.TIMER_CTL, 0xFF01), RUN, get(ids.TIMER_CTL)), word(5), "three bits are left"),
    Recorded(NEW, (*vm(), RUN, SERROR, INIT, get(ids.VCPU_EVENTS)), AN_SERROR, "an SError survives init after a run"),
    Recorded(NEW, (*vm(), SERROR, INIT, get(ids.VCPU_EVENTS)), NO_SERROR, "and not before one"),
    Recorded((V72,), (*vm(), put(ids.PSTATE, 0), SERROR, get(ids.PC)), word(0x580), "an unmasked SError from EL0"),
    Recorded((V72,), (*vm(), put(ids.PSTATE, 0), SERROR, get(ids.ESR)), word(0xBF00_0000), "its syndrome"),
    Recorded((V72,), (*vm(), put(ids.PSTATE, 0), SERROR, get(ids.VCPU_EVENTS)), NO_SERROR, "it is taken at once"),
    Recorded((V72,), (*vm(), put(ids.PSTATE, 0x10004), SERROR, get(ids.VCPU_EVENTS)), NO_SERROR, "from EL1t, too"),
    Recorded((V510, V61, V612), (*vm(), put(ids.PSTATE, 0), SERROR, get(ids.VCPU_EVENTS)), AN_SERROR,
             "before 6.17 it waits for a run"),
    Recorded((V72,), (*vm(1, PSCI | E2H0), get(ids.PSCI_VERSION)), word(0x10003), "E2H0 without EL2 means nothing"),
    Recorded((V612,), (call("create", vcpus=1), call("init", vcpu=0, features=PSCI | E2H0)), {"errno": 2},
             "6.12 does not know it"),
    Recorded((V72,), (*vm(1, PMU), put(ids.ID_AA64DFR0, 0x1030_5209), call("init", vcpu=0, features=PMU),
                      get(ids.PMEVTYPER[0])), word(0xC800_0000), "PMUVer 2 has no events"),
    Recorded((V72,), (*vm(), put(ids.PTIMER_CNT, 1 << 48), put(ids.PTIMER_CTL, 3), RUN, get(ids.PTIMER_CTL)), word(3),
             "CVAL with an offset that wraps is far away"),
    Recorded((V61,), (*vm(), RUN, SERROR, INIT, get(ids.VCPU_EVENTS)), NO_SERROR, "6.1: it does not"),
    Recorded(OLD, (*vm(), sees(ids.CTR)), {"CTR_EL0": saw(0x8444_C004)}, "the guest reads the host's CTR_EL0"),
    Recorded(NEW, (*vm(), sees(ids.CTR)), {"CTR_EL0": saw(0x9444_C004)}, "the guest reads the VM's CTR_EL0"),
    Recorded((V61, *NEW), (*vm(), put(ids.BITMAPS[0], 0), sees(0x8400_0050 << 32)),
             {"TRNG_VERSION": saw((1 << 64) - 1)}, "a guest does not get what a bitmap hides"),
)


GICD, GICR, ICC = gic.DISTRIBUTOR, gic.REDISTRIBUTOR, gic.CPU_INTERFACE


def chip(group: int, offset: int) -> int:
    return all_ids.attribute_id(gic.GICV3, group, offset)


def making(group: int, attribute: int, value: int = 0) -> Call:
    return call("gic", verb="set", group=group, attribute=attribute, value=value)


DISTRIBUTOR, REDISTRIBUTORS = making(gic.ADDRESSES, 2, 0x800_0000), making(gic.ADDRESSES, 3, 0x80A_0000)
GIC = (call("gic_create"), DISTRIBUTOR, REDISTRIBUTORS, making(gic.IRQ_COUNT, 0, 96), making(gic.CONTROL, gic.INIT))


def gic_get(id: int, vcpu: int = 0) -> Call:
    return call("gic_get", vcpu=vcpu, id=id)


def gic_set(id: int, value: int, vcpu: int = 0) -> Call:
    return call("gic_set", vcpu=vcpu, id=id, value=value)


def shows(value: int, size: int = 4) -> dict[str, str]:
    return {"value": value.to_bytes(size, "little").hex()}


def line(attribute: int, value: int = 0, vcpu: int = 0, group: int = 0) -> Call:
    return call("line", verb="set", vcpu=vcpu, group=group, attribute=attribute, value=value)


ICC_CTLR, PROPBASER, PENDBASER = gic.ICC_CTLR, chip(GICR, 0x70), chip(GICR, 0x78)
IMP_ID = 239
IRQ, MAKE, FILTER = 0, 1, 2

DEVICE_ROWS = (
    Recorded(ALL, (*vm(), *GIC, gic_get(chip(GICD, 0x10))), shows(0xFFFF_FFFF), "GICD_STATUSR reads as ones"),
    Recorded(ALL, (*vm(), *GIC, gic_get(chip(GICR, 0x10))), shows(0), "GICR_STATUSR does not"),
    Recorded(ALL, (*vm(), *GIC, gic_set(chip(GICR, 0x1_0C04), 0xFFFF_FFFF)), {"get": shows(0)}, "PPIs stay level"),
    Recorded(ALL, (*vm(), *GIC, gic_set(chip(gic.LINE_LEVEL, 0), 0x55)), {"get": shows(0)}, "SGIs have no line"),
    Recorded(ALL, (*vm(), *GIC, gic_set(chip(gic.LINE_LEVEL, 32), 0x55)), {"get": shows(0)}, "edges show no line"),
    Recorded(ALL, (*vm(2), *GIC, gic_get(PROPBASER, 1)), shows(0, 8), "GICR_PROPBASER is 0 without an ITS"),
    Recorded(ALL, (*vm(2), *GIC, gic_set(PROPBASER, 0xF8, 1), gic_get(PROPBASER)), shows(0x198, 8),
             "and it is one for all vCPUs"),
    Recorded(ALL, (*vm(), *GIC, gic_set(PENDBASER, 0xFFFF_FFFF)), {"get": shows(0xFFFF_0F80, 8)},
             "GICR_PENDBASER's attributes are what KVM can do"),
    Recorded(ALL, (*vm(), *GIC, gic_set(ICC_CTLR, 0)), {"set": {"errno": 22}, "get": shows(0x8000, 8)},
             "ICC_CTLR_EL1: refused for A3V, and has fewer bits all the same"),
    Recorded(NEW, (*vm(), *GIC, gic_set(chip(GICR, 0), 1)), {"get": shows(6)}, "no LPIs without an ITS"),
    Recorded((V72,), (*vm(), *GIC, gic_set(chip(GICD, 0xC), 9)), {"set": {"errno": 16}}, "7.2: GICD_TYPER2 is final"),
    Recorded((V510, V61, V612), (*vm(), *GIC, gic_set(chip(GICD, 0xC), 9)), {"set": {"errno": 22}},
             "before, it was only its own"),
    Recorded((V61, *NEW), (*vm(), call("gic_create"), RUN, get(ids.PC)), {"errno": 5},
             "a run without the vGIC's addresses is the VM's end"),
    Recorded((V510,), (*vm(), call("gic_create"), RUN, get(ids.PC)), {"value": bytes(8).hex()}, "5.10: it is not"),
    Recorded((V510,), (*vm(), call("gic_create"), DISTRIBUTOR, making(gic.IRQ_COUNT, 0, 96),
                       making(gic.CONTROL, gic.INIT), RUN, gic_get(chip(GICD, 0x10))), {"errno": 16},
             "5.10: but the vGIC's"),
    Recorded((V510,), (*vm(), *GIC, REDISTRIBUTORS), {"errno": 22}, "5.10: a second region for redistributors"),
    Recorded((V61, *NEW), (*vm(), *GIC, REDISTRIBUTORS), {"errno": 17}, "since 5.13 it exists already"),
    Recorded((V510,), (*vm(), call("offset", offset=0, reserved=0)), {"errno": 22}, "5.10: no counter offset"),
    Recorded((V72,), (*vm(), call("enable", capability=IMP_ID)), {"errno": 22}, "too late once there is a vCPU"),
    Recorded((V72,), (*vm(caps=(IMP_ID,)), put(ids.REVIDR, 7)), {"set": {"errno": 0}}, "in time"),
    Recorded((V72,), (*vm(caps=(IMP_ID,)), RUN, put(ids.MIDR, 1 << 63)), {"set": {"errno": 16}}, "after a run"),
    Recorded(NEW, (*vm(), RUN, put(ids.ID_AA64DFR0, 0x1030_5F09)), {"set": {"errno": 0}},
             "an implementation-defined PMU is none also after a run"),
    Recorded(NEW, (call("create", vcpus=2), call("init", vcpu=0, features=PMU), line(MAKE, vcpu=1)), {"errno": 0},
             "features are the VM's"),
    Recorded(OLD, (call("create", vcpus=2), call("init", vcpu=0, features=PMU), line(MAKE, vcpu=1)), {"errno": 19},
             "features were a vCPU's"),
    Recorded((V612,), (*vm(), put(ids.ID_AA64PFR0, PFR0 & ~0xF0)), {"set": {"errno": 0}}, "6.12: no AArch64 at EL1"),
    Recorded((V72,), (*vm(), put(ids.ID_AA64PFR0, PFR0 & ~0xF0)), {"set": {"errno": 22}}, "7.2: AArch64 at EL1"),
    Recorded((V612,), (*vm(), put(ids.ID_AA64PFR1, 0x01), get(ids.WORKAROUND_2)), word(3), "no SSBS: not vulnerable"),
    Recorded((V61, V612), (*vm(), *GIC, RUN, gic_get(chip(ICC, 0xC643))), shows(2, 8), "a binary point of the CPU"),
    Recorded((V61, V612), (*vm(), line(0, 0x8000, group=2), sees(0xC500_0020 << 32 | 0xC500_0020)),
             {"PV_TIME_FEATURES(PV_TIME_FEATURES)": saw(0)}, "PV time, once the vCPU has a page for it"),
    Recorded(ALL, (*vm(), *GIC[:1], making(gic.IRQ_COUNT, 0, 1024)), {"errno": 22}, "1024 interrupts are too many"),
    Recorded(ALL, (*vm(), *GIC[:1], making(gic.ADDRESSES, 2, (1 << 40) - (1 << 16))), {"errno": 0}, "the last frame"),
    Recorded(ALL, (*vm(), *GIC, put(ids.MPIDR, 0x8000_0005), gic_get(chip(gic.LINE_LEVEL, 64))), {"errno": 22},
             "lines are asked by the affinity of a vCPU"),
    Recorded((V61,), (*vm(2, PMU), *GIC, call("run", vcpu=1), line(4, 16, vcpu=1, group=1)), {"errno": 16},
             "6.1: timers that a failed run enabled"),
    Recorded(ALL, (*vm(1, PMU), *GIC, line(IRQ, 23), line(MAKE), call("init", vcpu=0, features=PMU), RUN),
             {"errno": 0}, "a PMU's interrupt stays with a second init"),
    Recorded(ALL, (*vm(), sees(ids.MIDR), put(ids.PSTATE, 0x20_0C04), RUN, get(ids.PSTATE)), word(4),
             "an MMIO exit's instruction ends: no BTYPE, no SS"),
    Recorded(ALL, (*vm(), sees(ids.MIDR), put(ids.PSTATE, 0x620_FC30), RUN, get(ids.PSTATE)), word(0x400_FC30),
             "an instruction of an IT block less"),
    Recorded((V612,), (*vm(), *GIC, put(ids.ID_AA64PFR0, PFR0 & ~(0xF << 24)), RUN, get(ids.ID_AA64PFR0)),
             word(PFR0 & ~(0xF << 24)), "6.12: a vGIC that the ID registers do not show"),
    Recorded((V72,), (*vm(), *GIC, put(ids.ID_AA64PFR0, PFR0 & ~(0xF << 24)), RUN, get(ids.ID_AA64PFR0)), word(PFR0),
             "7.2: the first run shows it"),
    Recorded(ALL, (*vm(), *GIC[:1], making(gic.IRQ_COUNT, 0, 992)), {"errno": 0}, "992 interrupts are the most"),
    Recorded((V61,), (*vm(1, PMU), put(ids.PMEVCNTR[3], 1 << 32 | 7)), {"vCPU 0": word(7)}, "6.1: 32 bits"),
    Recorded(NEW, (*vm(1, PMU), put(ids.PMEVCNTR[3], 1 << 32 | 7)), {"vCPU 0": word(1 << 32 | 7)}, "PMUv3p5: 64 bits"),
    Recorded(NEW, (*vm(1, PMU), put(ids.ID_AA64DFR0, 0x1030_5509), put(ids.PMEVCNTR[3], 1 << 32 | 7)),
             {"vCPU 0": word(7)}, "a PMU before v3p5: 32 bits"),
    Recorded((V510,), (*vm(2, PMU), line(MAKE), RUN, line(FILTER, 0x1_0011, vcpu=1)), {"errno": 0},
             "5.10: events are filtered also after a run"),
    Recorded((V61, *NEW), (*vm(2, PMU), line(MAKE), RUN, line(FILTER, 0x1_0011, vcpu=1)), {"errno": 16},
             "since 5.18 events are chosen before a run"),
)
NARROW = PSCI | vcpu_features.EL1_32BIT
MANY = (1 << 64) - 1

NARROW_ROWS = (
    Recorded(ALL, (*vm(1, NARROW), get(ids.PSTATE)), word(0x1D3), "AArch32 at EL1 begins in SVC"),
    Recorded(ALL, (*vm(1, NARROW), put(ids.PSTATE, 5)), {"set": {"errno": 22}}, "and has no EL1h"),
    Recorded(ALL, (*vm(1, PSCI), put(ids.PSTATE, 0x1D3)), {"set": {"errno": 22}}, "which AArch64 has"),
    Recorded(ALL, (*vm(1, NARROW), put(ids.PSTATE, 0x1DF)), {"set": {"errno": 0}}, "SYS is a mode"),
    Recorded((V61, *NEW), vm(2, NARROW), {"errno": 0}, "two vCPUs with AArch32"),
    Recorded((V510,), vm(2, NARROW), {"errno": 22}, "5.10: a vCPU that was not initialized is AArch64"),
    Recorded((V61,), (call("create", vcpus=2), call("init", vcpu=0, features=NARROW),
                      call("init", vcpu=1, features=PSCI)), {"errno": 22}, "6.1: the first vCPU decides the width"),
    Recorded((V510,), (*vm(1, NARROW), put(ids.X[23], MANY)), {"vCPU 0": word(MANY)}, "5.10: R13 of UND stays in SVC"),
    Recorded((V510,), (*vm(1, NARROW), put(ids.X[19], MANY)), {"vCPU 0": word(0xFFFF_FFFF)}, "5.10: R13 of SVC is cut"),
    Recorded((V61, *NEW), (*vm(1, NARROW), put(ids.X[23], MANY)), {"vCPU 0": word(0xFFFF_FFFF)}, "all are cut in SVC"),
)

ITS_ADDRESS, RESET, ITS_CBASER, ITS_CWRITER, ITS_CREADR, ITS_BASER0 = 4, 4, 0x80, 0x88, 0x90, 0x100
VALID = 1 << 63


def its(group: int, attribute: int, value: int = 0, verb: str = "set") -> Call:
    return call("its", verb=verb, group=group, attribute=attribute, value=value)


def its_register(offset: int, value: int) -> Call:
    return its(gic.ITS_REGISTERS, offset, value)


def its_get(offset: int) -> Call:
    return its(gic.ITS_REGISTERS, offset, verb="get")


def command(*words: int) -> Call:
    return call("its_command", words=[*words, *(0,) * (4 - len(words))])


AN_ITS = (*vm(2), *GIC, call("its_create"), its(gic.ADDRESSES, ITS_ADDRESS, 0x808_0000),
          its_register(ITS_BASER0, VALID | 0x2_0000), its_register(ITS_BASER0 + 8, VALID | 0x3_0000),
          its_register(ITS_CBASER, VALID | 0x4_0000), gic_set(PROPBASER, 0x5_000F),
          *(call_ for vcpu in (0, 1) for call_ in (gic_set(PENDBASER, 0x6_0000 + 0x1_0000 * vcpu, vcpu),
                                                   gic_set(chip(GICR, 0), 1, vcpu))), its_register(0, 1))
MAPPED = (*AN_ITS, command(8 | 1 << 32, 4, VALID | 0xA_0000), command(9, 0, VALID | 1 << 16 | 5),
          command(9, 0, VALID | 2), command(10 | 1 << 32, 8192 << 32 | 3, 5), command(3 | 1 << 32, 3))
DEVICE_TABLES = {"0xb0000": "0x80000000000c0000"}
"""Of the vocabulary's making."""

DEVICE, EVENT = "0x20008", "0xa0018"
SAVED = {DEVICE: "0x8000000000014004", "0x30000": "0x8000000000010005", "0x30008": "0x8000000000000002",
         EVENT: "0x20000005", **DEVICE_TABLES}

ITS_ROWS = (
    Recorded(ALL, (*vm(), call("its_create"), its_get(0)), {"errno": 6}, "an ITS without an address has no registers"),
    Recorded((V72,), (*vm(), call("its_create"), its(gic.CONTROL, 9)), {"errno": 6}, "an order that there is not"),
    Recorded((V510, V61, V612), (*vm(), call("its_create"), its(gic.CONTROL, 9)), {"errno": 0}, "6.12: it is good"),
    Recorded(ALL, (*AN_ITS, its_get(0)), shows(0x8000_0001, 8), "on and idle"),
    Recorded(ALL, (*AN_ITS[:-1], command(9, 0, VALID), its_get(0)), shows(0, 8), "off, and commands wait"),
    Recorded(ALL, (*AN_ITS[:-1], its_register(ITS_BASER0, 0), its_register(0, 1), its_get(0)), shows(0x8000_0000, 8),
             "not on without a table of devices"),
    Recorded(ALL, (*AN_ITS, its_register(ITS_CBASER, 0), its_get(ITS_CBASER)), shows(VALID | 3 << 59 | 0x4_0000, 8),
             "the queue stays while it is on; its memory is write-back"),
    Recorded(ALL, (*AN_ITS, its_register(ITS_CREADR, 0)), {"errno": 16}, "and so does the read pointer"),
    Recorded(ALL, (*AN_ITS, its_register(4, 1 << 24)), {"errno": 0}, "GITS_IIDR: the revision alone is looked at"),
    Recorded(ALL, (*AN_ITS, its_register(4, 1 << 12)), {"errno": 22}, "and there is only one"),
    Recorded(ALL, (*MAPPED, call("its_save")), {"tables": SAVED}, "collections are saved in the order of their making"),
    Recorded(ALL, (*MAPPED, call("gic_pending")), {"tables": {"0x70400": "0x1", **DEVICE_TABLES}},
             "an LPI that is pending, in the table of its vCPU"),
    Recorded((V61, *NEW), (*MAPPED, call("its_save"), command(15 | 1 << 32, 3), call("its_save")),
             {"tables": {at: entry for at, entry in SAVED.items() if at != EVENT}}, "DISCARD clears what was saved"),
    Recorded((V510,), (*MAPPED, call("its_save"), command(15 | 1 << 32, 3), call("its_save")), {"tables": SAVED},
             "5.10: it does not"),
    Recorded((V61, *NEW), (*MAPPED, call("its_save"), command(8 | 1 << 32), call("its_save")),
             {"tables": {at: entry for at, entry in SAVED.items() if at != DEVICE}}, "MAPD without V, too"),
    Recorded((V510,), (*MAPPED, call("its_save"), command(8 | 1 << 32), call("its_save")), {"tables": SAVED},
             "5.10: neither does it"),
    Recorded(ALL, (*MAPPED, gic_set(PENDBASER, 0, 1)), {"get": shows(0x7_0180, 8)}, "it stays while LPIs are on"),
    Recorded(ALL, (*MAPPED, call("its_save"), its(gic.CONTROL, gic.ITS_RESTORE_TABLES)), {"errno": 17},
             "collections that are there already"),
)
ROWS += (*DEVICE_ROWS, *NARROW_ROWS, *ITS_ROWS)

CASES = [pytest.param(name, row, id=f"{name}-{row.why}") for row in ROWS for name in row.kernels]


@pytest.mark.sim
@pytest.mark.parametrize(("name", "row"), CASES)
def test_the_simulator_gives_the_recorded_answer(name: str, row: Recorded) -> None:
    assert ask(SimBackend(name), name, row) == row.expected


@pytest.mark.kvm_arm64
@pytest.mark.parametrize(("name", "row"), CASES)
def test_the_kernel_itself_gives_it(name: str, row: Recorded) -> None:
    if name != here():
        pytest.skip(f"this is not {name}")
    assert ask(KvmBackend(), name, row) == row.expected
