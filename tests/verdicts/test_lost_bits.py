"""Bits that a kernel takes and does not keep: a rule asks for each of them, or it is said here why none does."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import pytest

from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.model import Arch, Slot
from migstream.registers import ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import Pair
from migstream.verdicts.guest import fresh
from migstream.verdicts.judge import judge
from migstream.verdicts.model import Answer, Kernel

NO_LOSS = {
    "*TIMER_CTL": "ISTATUS is what the counter and CVAL say; bits 63:32 are reserved (Arm ARM, CNTV_CTL_EL0)",
    "PMEVCNTR*": "a rule of its own calls it a fit: the guest's counters have 32 bits",
    "SMCCC_ARCH_WORKAROUND_?": "a rule of its own: a level is checked and not stored",
    "HV_X64_MSR_TSC_FREQUENCY": "KVM makes it of KVM_TSC_KHZ, which is judged",
    "HV_X64_MSR_TIME_REF_COUNT": "a running clock",
    "MSR_IA32_TSC": "a running clock",
    "HV_X64_MSR_RESET": "an order, not a state: it reads 0 on every kernel (kvm_hv_get_msr)",
    "MSR_KVM_ASYNC_PF_ACK": "an order, not a state: it reads 0 on every kernel (kvm_get_msr_common)",
    "MSR_IA32_TSC_DEADLINE": "kept in the LAPIC timer's TSC-deadline mode, which the LAPIC brings before it; tried "
                             "without",
}
"""By name, why the rules need not ask."""


def lost(host: HostProfile) -> Iterator[tuple[Pair, Slot, int]]:
    """Registers of fresh guests of which bits are taken and not kept, with those bits."""
    wide = vcpu_features.DEFAULT | vcpu_features.together(host.vcpu_features)
    for features in {vcpu_features.DEFAULT, wide} if host.arch == Arch.ARM64 else {0}:
        guest = fresh(host, features)
        pair = Pair(guest, host)
        for slot in (slot for layout in guest.layouts for slot in layout.slots):
            taken, kept = pair.bits(slot.id) or (0, 0)
            if taken & ~kept:
                yield pair, slot, taken & ~kept


@pytest.mark.parametrize("name", profiles.names())
def test_bits_that_are_not_kept_are_asked_for(name: str) -> None:
    silent = []
    for pair, slot, bits in lost(profiles.load(name)):
        bit = 1 << bits.bit_length() - 1
        value = ((pair.default(slot.id) or 0) ^ bit).to_bytes(slot.size, "little")
        verdict = judge(pair.with_value(slot, value), slot)
        excused = any(fnmatch.fnmatchcase(verdict.name, glob) for glob in NO_LOSS)
        if verdict.answer == Answer.FITS and not excused:
            silent.append(verdict.name)
    assert not silent


def test_no_excuse_without_a_register() -> None:
    found = {lookup(slot.id).name for name in profiles.names() for _, slot, _ in lost(profiles.load(name))}
    assert not [glob for glob in NO_LOSS if not fnmatch.filter(found, glob)]


@pytest.mark.parametrize(("name", "value", "answer"), [
    ("x86_64-6.12", 0xFFFF_8880_0000_1000, Answer.NOTICED), ("x86_64-6.12", 0x1_0000_0000, Answer.NOTICED),
    ("x86_64-6.12", 0x8880_1000, Answer.FITS), ("x86_64-6.18-pvm", 0xFFFF_8880_0000_1000, Answer.FITS),
    ("x86_64-6.18-pvm", 0x7FFF_0000_1000, Answer.FITS), ("x86_64-6.18-pvm", 0x1_8000_0000_0000, Answer.NOTICED),
])
def test_where_sysenter_goes(name: str, value: int, answer: Answer) -> None:
    """kvm-amd keeps bits 31:0 of it; elsewhere an address is kept, and what is none is made one."""
    host = profiles.load(name)
    for index in (0x175, 0x176):
        slot = Slot(ids.msr_id(index), 8)
        verdict = judge(Pair(fresh(host, 0), host).with_value(slot, value.to_bytes(8, "little")), slot)
        assert (verdict.answer, verdict.kernel == Kernel.DROPS) == (answer, answer == Answer.NOTICED)
