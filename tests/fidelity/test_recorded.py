"""Divergences that were met and mended: short sequences with the real kernel's last answer.

They run on the simulator of the kernel, and on the kernel itself where this is it: in the lab, or this machine's own.
`expected` is what the answer must hold; None is a word that reads 0.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from migstream.backends.base import Backend
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.host import profiles
from migstream.registers import ids, x86_64
from tests.conftest import kvm_problem
from tests.fidelity import driver
from tests.fidelity.calls import Call, call
from tests.fidelity.recorded import Recorded, holds
from tests.fidelity.vocabularies import vocabulary

V61, V612, V72, PVM = "x86_64-6.1", "x86_64-6.12", "x86_64-7.2", "x86_64-6.18-pvm"
SREGS, SREGS2, EVENTS, MP_STATE = x86_64.SREGS.id, x86_64.SREGS2.id, x86_64.VCPU_EVENTS.id, x86_64.MP_STATE.id
NESTED, XSAVE, LAPIC = x86_64.NESTED_STATE.id, x86_64.XSAVE.id, x86_64.LAPIC.id
REGS, XCRS, PIT2, TSC_KHZ = x86_64.REGS.id, x86_64.XCRS.id, x86_64.PIT2.id, x86_64.TSC_KHZ.id
PIC_MASTER, PIC_SLAVE = x86_64.PIC_MASTER.id, x86_64.PIC_SLAVE.id
CHIPS = {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}

ARCH_CAPABILITIES, DE_CFG, TSC_AUX, SYSENTER_EIP = (ids.msr_id(n) for n in (0x10A, 0xC001_1029, 0xC000_0103, 0x176))
VP_INDEX, TIME_REF, APIC_FREQUENCY, VP_ASSIST, TSC_RATIO = (
    ids.msr_id(n) for n in (0x4000_0002, 0x4000_0020, 0x4000_0023, 0x4000_0073, 0xC000_0104))
OS_ID, HYPERCALL, TSC_FREQUENCY = (ids.msr_id(n) for n in (0x4000_0000, 0x4000_0001, 0x4000_0022))
ASYNC_PF_EN, PV_EOI_EN, ASYNC_PF_INT = (ids.msr_id(n) for n in (0x4B56_4D02, 0x4B56_4D04, 0x4B56_4D06))
TSC_ADJUST, UCODE_REV, PAT, TSC_DEADLINE = (ids.msr_id(n) for n in (0x3B, 0x8B, 0x277, 0x6E0))


def vm(vcpus: int = 1, devices: dict[str, Any] | None = None, **caps: list[int]) -> Call:
    """A VM, with interrupt chips unless told otherwise."""
    return call("create", vcpus=vcpus, devices=CHIPS if devices is None else devices,
                caps={name.removeprefix("cap"): args for name, args in caps.items()})


def change(register: int, *edits: tuple[int, str, int], vcpu: int = 0) -> Call:
    return call("change", register=register, vcpu=vcpu, edits=[list(edit) for edit in edits])


def cpuid(*clear: tuple[int, int, int, int], vcpu: int = 0) -> Call:
    return call("cpuid", vcpu=vcpu, clear=[list(bit) for bit in clear])


def write(register: int, value: int) -> Call:
    return call("write", register=register, vcpu=0, value=value)


def read(register: int, vcpu: int = 0) -> Call:
    return call("read", register=register, vcpu=vcpu)


def refused(register: str, ioctl: str, why: str) -> list[str]:
    return [f"vCPU 0: {register}: {ioctl}: {why}"]


def short(register: str) -> list[str]:
    return refused(register, "KVM_SET_MSRS", "stopped here (short count)")


LAB = (V61, V612, V72)
NARROW, NO_LM, NO_ARCH_CAP = (0x8000_0008, 0, 0, 5), (0x8000_0001, 0, 3, 29), (7, 0, 3, 29)
NO_DEADLINE = (1, 0, 2, 24)

X2APIC, XAPIC = (change(SREGS, (272, "word", base), vcpu=1) for base in (0xFEE0_0C00, 0xFEE0_0800))
IN_X2APIC = (vm(2), cpuid(vcpu=1), X2APIC)
IN_DEADLINE_MODE = (vm(), cpuid(), change(LAPIC, (0x320, "word", 0x4_00EC)))

ROWS: tuple[Recorded, ...] = (
    Recorded(LAB, (*IN_X2APIC, change(LAPIC, (0x310, "word", 0x500), vcpu=1)), {"value.96": None, "value.98": "0x500"},
             "kvm-amd keeps the halves of an x2APIC's ICR apart"),
    Recorded((PVM,), (*IN_X2APIC, change(LAPIC, (0x310, "word", 0x500), vcpu=1)),
             {"value.96": "0x50000000000", "value.98": "0x500"}, "elsewhere the ICR is one register of 64 bits"),
    Recorded((V61,), (*IN_X2APIC, change(LAPIC, (0x20, "word", 5 << 24), vcpu=1)),
             {"value.4": "0x5000000", "value.26": "0x20"}, "6.1 keeps the id that is written in x2APIC mode"),
    Recorded((V61,), (*IN_X2APIC, change(LAPIC, (0x20, "word", 5 << 24), vcpu=1), XAPIC, read(LAPIC, 1)),
             {"value.4": "0x5", "value.26": "0x20"}, "and leaves it as it is in xAPIC mode"),
    Recorded((V612, V72, PVM), (*IN_X2APIC, change(LAPIC, (0x20, "word", 5 << 24), vcpu=1)),
             {"value.4": "0x1000000", "value.26": "0x2"}, "later ones know the vCPU's number"),
    Recorded((V612, V72, PVM), (*IN_X2APIC, change(LAPIC, (0xD0, "word", 0xFF00_0000), vcpu=1), XAPIC, read(LAPIC, 1)),
             {"value.4": "0x1000000", "value.26": "0x2"}, "in xAPIC mode the id is short again, the logical id stays"),
    Recorded((*LAB, PVM), (vm(2, cap129=[1]), cpuid(vcpu=1), X2APIC,
                           change(LAPIC, (0x20, "word", 5), (0xF0, "word", 0x1FF), vcpu=1)),
             {"answer": ["vCPU 1: KVM_LAPIC: KVM_SET_LAPIC: EINVAL"], "value.4": "0x1", "value.30": "0x1ff"},
             "a wrong long id is refused when the spurious vector is stored"),
    Recorded((V61, V612), (vm(1, {}), call("run", steps=1), call("cpuid", vcpu=0, clear=[], entries=0),
                           change(SREGS, (248, "word", 0x10_0020))),
             {"answer": [], "value.31": "0x100020"}, "no table again is none to a vCPU that ran without one"),
    Recorded(LAB, (vm(), cpuid(), change(LAPIC, (0x80, "word", 0x20), (0x120, "word", 0x100)),
                   change(NESTED, (1, "byte", 1)), read(LAPIC)),
             {"value.20": "0x40"}, "setting GIF computes the processor priority anew"),
    Recorded(LAB, (vm(), write(HYPERCALL, 0x1001)), {"answer": [], "value.0": None},
             "ignored as long as no guest said who it is"),
    Recorded(LAB, (vm(), write(OS_ID, 1), write(HYPERCALL, 0x1001), write(OS_ID, 0), read(HYPERCALL)),
             {"value.0": "0x1000"}, "a guest that is nobody has no hypercall page"),
    Recorded(LAB, (vm(), write(VP_ASSIST, 0x1001), read(PV_EOI_EN)), {"value.0": "0x1001"},
             "the assist page is where PV EOI is"),
    Recorded(LAB, (vm(), write(VP_INDEX, 1 << 30)), {"answer": short("HV_X64_MSR_VP_INDEX"), "value.0": None},
             "a number that no vCPU may have"),
    Recorded(LAB, (vm(), write(TSC_KHZ, 3_000_000), read(TSC_FREQUENCY)), {"value.0": "0xb2d05e00"},
             "Hz of what the vCPU was told in kHz"),
    Recorded((*LAB, PVM), (vm(), write(TSC_KHZ, 1000)),
             {"answer": refused("KVM_TSC_KHZ", "KVM_SET_TSC_KHZ", "EINVAL"), "value.0": "0x3e8"},
             "too slow without TSC scaling; it stays all the same"),
    Recorded((*LAB, PVM), (vm(), cpuid(), write(TSC_DEADLINE, 1 << 62)), {"answer": [], "value.0": None},
             "ignored outside of deadline mode"),
    Recorded((V61, V612), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62)), {"answer": [], "value.0": None},
             "whose CPUID has no TSC deadline, has no deadline mode"),
    Recorded((V72, PVM), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62)),
             {"answer": [], "value.0": "0x4000000000000000"}, "kept in it"),
    Recorded((V72, PVM), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62), cpuid(NO_DEADLINE), read(TSC_DEADLINE)),
             {"value.0": "0x4000000000000000"}, "a new table does not end it"),
    Recorded((V72, PVM), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62), cpuid(NO_DEADLINE),
                          change(LAPIC, (0x80, "word", 0x20)), read(TSC_DEADLINE)), {"value.0": None},
             "the next KVM_SET_LAPIC does"),
    Recorded((V72, PVM), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62), change(LAPIC, (0x320, "word", 0x1_0000)),
                          change(LAPIC, (0x320, "word", 0x4_00EC)), read(TSC_DEADLINE)), {"value.0": None},
             "leaving it forgets the deadline"),
    Recorded((V72, PVM), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62), change(SREGS, (272, "word", 0xFEE0_0100)),
                          read(TSC_DEADLINE)), {"value.0": None}, "not shown while the APIC is off"),
    Recorded((V72, PVM), (*IN_DEADLINE_MODE, write(TSC_DEADLINE, 1 << 62), change(SREGS, (272, "word", 0xFEE0_0100)),
                          write(TSC_DEADLINE, 0), change(SREGS, (272, "word", 0xFEE0_0900)), read(TSC_DEADLINE)),
             {"value.0": "0x4000000000000000"}, "nor written"),
    Recorded((*LAB, PVM), (vm(), write(TSC_ADJUST, 7)), {"answer": [], "value.0": None}, "ignored without CPUID"),
    Recorded((*LAB, PVM), (vm(), cpuid(), write(TSC_ADJUST, 7)), {"answer": [], "value.0": "0x7"}, "kept with it"),
    Recorded((V61, V612, PVM), (vm(), cpuid(), write(ASYNC_PF_EN, 1 << 40 | 9)),
             {"answer": short("MSR_KVM_ASYNC_PF_EN"), "value.0": "0x10000000009"},
             "an area outside of RAM is refused when it is stored"),
    Recorded((V72,), (vm(), cpuid(), write(ASYNC_PF_EN, 0x1009), write(ASYNC_PF_EN, 1 << 40 | 9)),
             {"answer": short("MSR_KVM_ASYNC_PF_EN"), "value.0": "0x1009"}, "7.2 looks first"),
    Recorded((*LAB, PVM), (vm(1, {}), cpuid(), change(EVENTS, (20, "byte", 0x20), (28, "byte", 1)),
                           call("run", steps=5)),
             {"exits": {"0": "KVM_EXIT_MMIO"}}, "a triple fault that was refused is not pending"),
    Recorded((*LAB, PVM), (vm(1, {}), write(ASYNC_PF_INT, 0xEC)), {"answer": short("MSR_KVM_ASYNC_PF_INT")},
             "no vector without an APIC"),
    Recorded(LAB, (vm(), write(PAT, 0x0007_0406_0007_0402)), {"answer": short("MSR_IA32_CR_PAT")},
             "2 is no memory type"),
    Recorded(LAB, (vm(), write(TSC_RATIO, 1 << 33)), {"answer": short("MSR_AMD64_TSC_RATIO")},
             "another ratio without TSC scaling"),
    Recorded((V61,), (vm(), cpuid(), call("run", steps=1), write(ARCH_CAPABILITIES, 0)),
             {"answer": [], "value.0": None},
             "before 6.4 a feature MSR changes after a run"),
    Recorded((V612, V72), (vm(), cpuid(), call("run", steps=1), write(ARCH_CAPABILITIES, 0)),
             {"answer": short("MSR_IA32_ARCH_CAPABILITIES"), "value.0": "0x400000000c000079"},
             "since then it does not"),
    Recorded((*LAB, PVM), (vm(), cpuid(), call("run", steps=1), write(UCODE_REV, 7)), {"answer": [], "value.0": "0x7"},
             "microcode does"),
    Recorded((*LAB, PVM), (vm(2), change(EVENTS, (16, "byte", 0x9F), (20, "byte", 2), vcpu=1),
                           change(MP_STATE, (0, "byte", 4), vcpu=1), read(SREGS, 1)), {"value.0": "0x9f000"},
             "reading the state accepted the SIPI"),
    Recorded((V61, V612), (vm(), cpuid(), change(SREGS, (264, "word", 0x1000)), change(NESTED, (1, "byte", 0)),
                           change(MP_STATE, (0, "byte", 4))),
             {"answer": refused("KVM_MP_STATE", "KVM_SET_MP_STATE", "EINVAL")}, "no SIPI without GIF"),
    Recorded((V72,), (vm(), cpuid(), change(SREGS, (264, "word", 0x1000)), change(NESTED, (1, "byte", 0)),
                      change(MP_STATE, (0, "byte", 4))), {"answer": [], "value.0": "0x2"},
             "7.2 takes it and drops the SIPI"),
    Recorded((*LAB, PVM), (vm(), change(SREGS, (256, "word", 5)), change(SREGS, (256, "word", 16))),
             {"answer": [], "value.32": "0x5"}, "an impossible CR8 is ignored"),
    Recorded((*LAB, PVM), (vm(), change(SREGS, (256, "word", 5)), read(LAPIC)),
             {"value.16": "0x50", "value.20": "0x50"}, "CR8 is the task priority"),
    Recorded((*LAB, PVM), (vm(), change(SREGS, (280, "word", 1 << 32)), read(EVENTS)), {"value.1": "0x2001"},
             "the bitmap's first bit is the injected interrupt"),
    Recorded((*LAB, PVM), (vm(1, cap164=[1]), change(EVENTS, (3, "byte", 1), (1, "byte", 14), (20, "byte", 0x10)),
                           change(REGS), read(EVENTS)), {"value.0": "0xe00"},
             "KVM_SET_REGS drops a pending exception"),
    Recorded((*LAB, PVM), (vm(), change(EVENTS, (12, "byte", 1), (20, "byte", 0x20))),
             {"answer": refused("KVM_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "EINVAL"), "value.1": "0x100000000"},
             "a triple fault that nobody asked for is refused at the end"),
    Recorded((*LAB, PVM), (vm(), change(EVENTS, (0, "byte", 1), (1, "byte", 3))), {"answer": [], "value.0": "0x300"},
             "#BP comes from an instruction, which the guest meets again"),
    Recorded((*LAB, PVM), (vm(), cpuid(), change(XCRS, (16, "word", 5))),
             {"answer": refused("KVM_XCRS", "KVM_SET_XCRS", "EINVAL")}, "AVX without SSE"),
    Recorded((*LAB, PVM), (vm(), change(XCRS, (16, "word", 3))),
             {"answer": refused("KVM_XCRS", "KVM_SET_XCRS", "EINVAL")}, "XCR0 without CPUID"),
    Recorded((*LAB, PVM), (vm(), change(PIC_SLAVE, (9, "byte", 0x10)), read(PIC_MASTER)),
             {"value.1": "0x400"}, "a request of the slave is one on the master's line 2"),
    Recorded((*LAB, PVM), (vm(), change(PIT2, (24, "word", 0))), {"value.3": "0x10000"}, "a count of 0 is 65536"),
    Recorded((*LAB, PVM), (vm(), change(MP_STATE, (0, "byte", 3)), change(SREGS), read(MP_STATE)), {"value.0": None},
             "a boot processor at the reset vector is woken"),
    Recorded((*LAB, PVM), (vm(), cpuid(), call("run", steps=1), cpuid((1, 0, 2, 26))),
             {"answer": refused("KVM_CPUID2", "KVM_SET_CPUID2", "EINVAL")}, "another table after a run"),
    Recorded((V61, V612), (vm(), cpuid(), change(SREGS2, (248, "word", 0x4_0020)), read(x86_64.CPUID2.id)),
             {"value.8": "0x7ef8320300000800"}, "OSXSAVE in the table is CR4's"),
    Recorded(LAB, (vm(), cpuid((7, 0, 1, 0)), change(SREGS, (248, "word", 0x1_0000))),
             {"answer": refused("KVM_SREGS", "KVM_SET_SREGS", "EINVAL")}, "CR4.FSGSBASE without CPUID"),
    Recorded((PVM,), (vm(1, {}, cap218=[1]), change(EVENTS, (28, "flip", 0)), call("run", steps=5)),
             {"exits": {"0": "KVM_EXIT_SHUTDOWN"}}, "a pending triple fault shuts the vCPU down at once"),
    Recorded((PVM,), (vm(2, {}, cap218=[1]), change(EVENTS, (28, "flip", 5)), call("run", steps=1), cpuid()),
             {"answer": []}, "a vCPU that was shut down before it ran has not run"),
    Recorded((PVM,), (vm(1, {}), call("run", steps=5), call("write", register=ARCH_CAPABILITIES, vcpu=0, value=0)),
             {"answer": []}, "after a run a feature MSR takes what it reads, here 0"),
    Recorded((PVM,), (vm(1, {}), change(SREGS2, (0x100, "byte", 4)), call("enter", vcpu=0),
                      call("read", register=SREGS2, vcpu=0)),
             {"value.32": None}, "without an APIC in the kernel KVM_RUN takes CR8 from struct kvm_run"),
    Recorded((PVM,), (vm(1, {}), change(SREGS2, (249, "flip", 3))), {"answer": [], "value.31": "0x800"},
             "CR4.UMIP without CPUID, where the kernel puts UMIP into every table itself"),
    Recorded((PVM,), (vm(1, {}), call("cpuid", vcpu=0, clear=[], entries=5)),
             {"answer": [], "refused": refused("KVM_CPUID2", "KVM_GET_CPUID2", "E2BIG")},
             "a table with leaf 1 and without 0xd has six entries more when it is read"),
    Recorded((PVM,), (vm(1, {}), call("cpuid", vcpu=0, clear=[], entries=1)), {"answer": [], "value.0": "0x1"},
             "one without leaf 1 is as it was"),
    Recorded((*LAB, PVM), (vm(1, cap116=[1]), call("read", register=LAPIC, vcpu=0)), {"value.106": "0x10000"},
             "without KVM_X86_QUIRK_LINT0_REENABLED the boot processor's LINT0 is masked"),
    Recorded((*LAB, PVM), (vm(1, {}), change(XSAVE, (512, "word", 1), (26, "byte", 1))),
             {"answer": refused("KVM_XSAVE", "KVM_SET_XSAVE", "EINVAL")},
             "MXCSR is looked at where x87 alone is in use"),
    Recorded((*LAB, PVM), (vm(1, {}), change(XSAVE, (512, "word", 4), (24, "byte", 0))), {"value.3": "0x1f80"},
             "where the vCPU's CPUID has neither SSE nor the AVX that is in use, MXCSR reads as after a reset"),
    Recorded(LAB, (vm(1, {}), change(XSAVE, (512, "word", 1), (24, "byte", 0)), call("enter", vcpu=0), read(XSAVE)),
             {"value.3": "0x1f00"}, "once the FPU was loaded, an MXCSR that came with x87 is in use"),
    Recorded(LAB, (vm(1, {}), change(XSAVE, (512, "word", 2), (24, "byte", 0)), change(XSAVE, (512, "word", 0)),
                   call("enter", vcpu=0), read(XSAVE)),
             {"value.3": "0x1f00"}, "so is one that was there before components were taken out of use"),
    Recorded((PVM,), (vm(1, {}), change(XSAVE, (512, "word", 1), (24, "byte", 0)), call("enter", vcpu=0), read(XSAVE)),
             {"value.3": "0x1f80"}, "a compacted area without SSE loads the initial MXCSR"),
    Recorded((V61, V612), (vm(1, {}), cpuid(), change(SREGS, (264, "word", 0x1000)), change(NESTED, (1, "byte", 0)),
                   change(SREGS, (264, "word", 0)), call("read", register=NESTED, vcpu=0)),
             {"value.0": "0x8000010100"}, "clearing EFER.SVME sets GIF"),
    Recorded((V72,), (vm(1, {}), cpuid(), change(SREGS, (264, "word", 0x1000)), change(NESTED, (1, "byte", 0)),
                   change(SREGS, (264, "word", 0)), call("read", register=NESTED, vcpu=0)),
             {"value.0": "0x8000010000"}, "it does no more"),
    Recorded((V612,), (vm(1, {}), call("cpuid", vcpu=0, clear=[], entries=0), change(SREGS, (248, "word", 0x800))),
             {"answer": refused("KVM_SREGS", "KVM_SET_SREGS", "EINVAL")}, "an empty table has no UMIP"),
    Recorded((PVM,), (vm(), change(MP_STATE, (0, "byte", 2)), change(EVENTS, (25, "byte", 1), (9, "byte", 255))),
             {"answer": refused("KVM_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "EINVAL"), "value.1": "0xff00"},
             "6.18 without SMM refuses it at the end, whatever the vCPU waits for"),
    Recorded((PVM, V72), (vm(), cpuid(NARROW), change(SREGS)), {"answer": []},
             "since 6.13 an APIC base that does not change is not looked at"),
    Recorded((V61, V612), (vm(), cpuid(NARROW), change(SREGS)),
             {"answer": refused("KVM_SREGS", "KVM_SET_SREGS", "EINVAL")}, "before, it was"),
    Recorded(LAB, (vm(), cpuid(), change(SREGS2, (56, "word", 0x1001))), {"value.8": "0x1000000010000"},
             "a segment that is not present is unusable, and the other way round"),
    Recorded(LAB, (vm(), cpuid(), change(SREGS2, (152, "word", 0xFFFF_F001))), {"value.20": "0x1000100000000"},
             "TR's limit decides its granularity"),
    Recorded(LAB, (vm(2), call("read", register=VP_INDEX, vcpu=1)), {"value.0": "0x1"}, "the vCPU's number"),
    Recorded(LAB, (vm(), call("write", register=TIME_REF, vcpu=0, value=231)), {"answer": []}, "a write is ignored"),
    Recorded(LAB, (vm(), call("write", register=APIC_FREQUENCY, vcpu=0, value=1)), {"value.0": "0x3b9aca00"},
             "a write is ignored"),
    Recorded(LAB, (vm(), call("write", register=TSC_RATIO, vcpu=0, value=0)), {"answer": [], "value.0": "0x100000000"},
             "0 is taken and ignored"),
    Recorded(LAB, (vm(), cpuid(), call("write", register=DE_CFG, vcpu=0, value=231)),
             {"answer": short("MSR_AMD64_DE_CFG")}, "bits beyond the host's"),
    Recorded(LAB, (vm(), cpuid(), call("read", register=ARCH_CAPABILITIES, vcpu=0)), {"value.0": "0x400000000c000079"},
             "a vCPU has the host's from the start"),
    Recorded((V72,), (vm(), cpuid(NO_ARCH_CAP), call("write", register=ARCH_CAPABILITIES, vcpu=0, value=4)),
             {"answer": short("MSR_IA32_ARCH_CAPABILITIES"), "value.0": None}, "an MSR that its CPUID has not"),
    Recorded((V72,), (vm(), call("write", register=ARCH_CAPABILITIES, vcpu=0, value=0), cpuid(),
                      call("read", register=ARCH_CAPABILITIES, vcpu=0)), {"value.0": "0x400000000c000079"},
             "a 0 that was taken without CPUID was not stored"),
    Recorded((V72,), (vm(), change(SYSENTER_EIP, (3, "byte", 128), (4, "flip", 7))), {"value.0": "0x8080000000"},
             "a vCPU without CPUID counts as Intel's: 64 bits"),
    Recorded((V72,), (vm(), change(SYSENTER_EIP, (4, "byte", 4)), cpuid(),
                      call("read", register=SYSENTER_EIP, vcpu=0)), {"value.0": None},
             "until CPUID says that it is AMD's"),
    Recorded((V72,), (vm(), change(TSC_AUX, (5, "flip", 0))), {"answer": short("MSR_TSC_AUX")},
             "and Intel's refuses the high half"),
    Recorded((V72,), (vm(), change(SREGS, (249, "flip", 3))),
             {"answer": refused("KVM_SREGS", "KVM_SET_SREGS", "EINVAL")}, "CR4.UMIP without CPUID, since 6.14"),
    Recorded((V72,), (vm(), cpuid(NO_LM), call("run", steps=1)),
             {"refused": refused("KVM_SREGS", "KVM_SET_SREGS", "EINVAL")}, "EFER.LME without long mode in CPUID"),
    Recorded(LAB, (vm(), cpuid(), change(NESTED, (0, "word", 2))),
             {"answer": refused("KVM_NESTED_STATE", "KVM_SET_NESTED_STATE", "EINVAL")}, "not SVM's format"),
    Recorded((V61, V612), (vm(), cpuid(), change(NESTED, (1, "flip", 0))),
             {"answer": refused("KVM_NESTED_STATE", "KVM_SET_NESTED_STATE", "EINVAL")}, "GIF off without EFER.SVME"),
    Recorded((V72,), (vm(), cpuid(), change(NESTED, (1, "flip", 0))), {"answer": [], "value.0": "0x8000010000"},
             "which 7.2 takes"),
    Recorded(LAB, (vm(), cpuid(), change(EVENTS, (24, "word", 1))), {"value.3": "0x1"}, "SMM is kept"),
    Recorded(LAB, (vm(), cpuid(), change(EVENTS, (11, "flip", 0))), {"value.1": "0x3000000"},
             "a VMCB has one interrupt shadow for both kinds"),
    Recorded((V61,), (vm(), cpuid(), change(EVENTS, (13, "flip", 3))), {"value.1": "0x10000000000"},
             "before 6.4 a pending NMI is a truth value"),
    Recorded((V612, V72), (vm(), cpuid(), change(EVENTS, (13, "flip", 3))), {"value.1": "0x20000000000"},
             "since then a count, at most 2"),
    Recorded(LAB, (vm(), cpuid(), change(EVENTS, (24, "word", 3)),
                   call("write", register=VP_ASSIST, vcpu=0, value=231)),
             {"answer": short("HV_X64_MSR_VP_ASSIST_PAGE")}, "in SMM a vCPU sees another address space"),
    Recorded((V61,), (vm(), cpuid(), change(EVENTS, (25, "byte", 2)), change(MP_STATE, (0, "flip", 2))),
             {"answer": refused("KVM_MP_STATE", "KVM_SET_MP_STATE", "EINVAL")}, "no SIPI while an SMI is pending"),
    Recorded((V72,), (vm(), cpuid(), change(EVENTS, (25, "byte", 2)), change(MP_STATE, (0, "flip", 2))),
             {"answer": []}, "7.2 takes it"),
    Recorded((V72,), (vm(), cpuid(), change(MP_STATE, (0, "flip", 1)), change(EVENTS, (24, "word", 17))),
             {"answer": [], "value.3": "0x1"}, "7.2 takes SMM while the vCPU waits for its SIPI"),
    Recorded((V61, V612), (vm(), cpuid(), change(MP_STATE, (0, "flip", 1)), change(EVENTS, (24, "word", 17))),
             {"answer": refused("KVM_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "EINVAL")}, "INITs are latched while in SMM"),
)

EFER, APIC_BASE, PLATFORM_INFO, MISC_FEATURES = (ids.msr_id(n) for n in (0xC000_0080, 0x1B, 0xCE, 0x140))
FAULTS_OFF = {"answer": short("MSR_MISC_FEATURES_ENABLES"), "value.0": None}
LONG_MODE = change(SREGS2, (248, "word", 0x20), (240, "word", 0x1000), (264, "word", 0x500), (224, "word", 0x8001_0033))


def reads(value: int | None) -> dict[str, Any]:
    return {"answer": [], "value.0": value and hex(value)}


def base(value: int) -> dict[str, Any]:
    return {"answer": short("MSR_IA32_APICBASE"), "value.0": hex(value)}


ROWS += (
    Recorded((V61, V612), (vm(), write(MISC_FEATURES, 1), write(PLATFORM_INFO, 0)),
             {"answer": short("MSR_PLATFORM_INFO"), "value.0": "0x80000000"}, "faults of CPUID are on: it stays"),
    Recorded((V72, PVM), (vm(), write(MISC_FEATURES, 1), write(PLATFORM_INFO, 0)), reads(None), "6.18, 7.2: need not"),
    Recorded(LAB, (vm(), write(PLATFORM_INFO, 0), write(MISC_FEATURES, 1)), FAULTS_OFF, "none where there are none"),
    Recorded(LAB, (vm(), write(PLATFORM_INFO, 0x20), write(MISC_FEATURES, 1)), FAULTS_OFF, "nor where others are"),
    Recorded(LAB, (vm(), write(PLATFORM_INFO, 0), write(PLATFORM_INFO, 1 << 31), write(MISC_FEATURES, 1)), reads(1),
             "and again where there are"),
    Recorded((PVM,), (vm(), write(PLATFORM_INFO, 0), write(MISC_FEATURES, 3)), reads(3), "pvm takes any value"),
    Recorded((*LAB, PVM), (vm(), write(EFER, 0xD01)), reads(0x901), "EFER, which no kernel lists; LMA is the mode's"),
    Recorded((*LAB, PVM), (vm(), write(EFER, 0x901), read(SREGS)), {"value.33": "0x901"}, "and is KVM_SREGS'"),
    Recorded((*LAB, PVM), (vm(), cpuid(), LONG_MODE, write(EFER, 0)), reads(0x400), "LMA stays while there is paging"),
    Recorded((*LAB, PVM), (vm(), cpuid((0x8000_0001, 0, 3, 20)), write(EFER, 0x800)), reads(0x800),
             "a VMM's EFER is not held against CPUID: NX"),
    Recorded(LAB, (vm(), write(EFER, 0x3000)), reads(0x3000), "with SVM: SVME, LMSLE"),
    Recorded((PVM,), (vm(), write(EFER, 0x1000)), {"answer": short("MSR_EFER"), "value.0": None}, "without: no SVME"),
    Recorded((*LAB, PVM), (vm(), write(EFER, 0x4000)), {"answer": short("MSR_EFER"), "value.0": None}, "no FFXSR"),
    Recorded((*LAB, PVM), (vm(), read(APIC_BASE)), {"refused": [], "value.0": "0xfee00900"}, "the APIC base, likewise"),
    Recorded((*LAB, PVM), (vm(), write(APIC_BASE, 0xFEE0_0D00)), base(0xFEE0_0900), "no x2APIC without CPUID"),
    Recorded((*LAB, PVM), (vm(), cpuid(), write(APIC_BASE, 0xFEE0_0D00), read(SREGS)), {"value.34": "0xfee00d00"},
             "with it there is, in KVM_SREGS, too"),
    Recorded((*LAB, PVM), (vm(), cpuid(), write(APIC_BASE, 0xFEE0_0400)), base(0xFEE0_0900), "not while it is off"),
    Recorded((*LAB, PVM), (vm(devices={}), cpuid(), write(APIC_BASE, 0xFEE0_0000)), reads(0xFEE0_0000),
             "off, also without an irqchip"),
    Recorded((*LAB, PVM), (vm(), write(APIC_BASE, 1 << 36 | 0x900)), base(0xFEE0_0900), "36 bits without CPUID"),
)
CASES = [pytest.param(name, row, id=f"{name}-{row.why}") for row in ROWS for name in row.kernels]


def ask(backend: Backend, name: str, row: Recorded) -> dict[str, Any]:
    profile = profiles.load(name)
    *_, last = driver.play(vocabulary(profile.arch), backend, profile, row.calls)
    return holds(last, row.expected)


@pytest.mark.sim
@pytest.mark.parametrize(("name", "row"), CASES)
def test_the_simulator_gives_the_recorded_answer(name: str, row: Recorded) -> None:
    assert ask(SimBackend(name), name, row) == row.expected


@pytest.mark.kvm
@pytest.mark.parametrize(("name", "row"), CASES)
def test_the_kernel_itself_gives_it(name: str, row: Recorded) -> None:
    if name != here():
        pytest.skip(f"this is not {name}")
    assert ask(KvmBackend(), name, row) == row.expected


def here() -> str:
    """The name of the kernel that this runs on, where it is a recorded one."""
    if "MIGSTREAM_LAB" in os.environ or kvm_problem():
        return os.environ.get("MIGSTREAM_LAB", "")
    found = KvmBackend().profile()
    known = {(one.kernel, one.cpu): name for name in profiles.names() for one in (profiles.load(name),)}
    return known.get((found.kernel, found.cpu), "")


@pytest.mark.kvm
def test_a_few_new_sequences_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """With a new seed each time, printed: it keeps looking."""
    if "MIGSTREAM_LAB" in os.environ:
        pytest.skip("the lab has a row of its own for this")
    from tests.fidelity.__main__ import main

    status = main(["--kernel", "host", "--sequences", "40"])
    said = capsys.readouterr().out
    with capsys.disabled():
        print(said.splitlines()[-1])
    assert status == 0, said
