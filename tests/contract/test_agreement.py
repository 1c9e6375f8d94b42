"""Random sequences of writes on the simulator and on real KVM: every answer and every register afterwards is the same.

A seed that fails is printed with the steps that led there, so that it can become a row of `test_errnos.py`. Real KVM is
paired with the simulator of its own kernel; where there is no profile of that, the test says so and is skipped.

Left out, with the reason: CPUID2 (a leaf 0xd of its own appears where a table has none), the clocks and the PIT's load
times (they run), a latched INIT (the simulator resets no vCPU), interrupts pending in the IOAPIC (nor delivers any),
the APIC timer's count.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from migstream.backends.base import Vm
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.demo import guest_x86_64 as guest
from migstream.host import profiles
from migstream.registers import x86_64
from migstream.registers.catalogue import lookup
from tests.contract.access import DEVICES, SIZES, create, layout, msr, read, rows, write
from tests.fidelity.vocabularies import vocabulary

pytestmark = pytest.mark.kvm

APIC_BASE = 34
HV_TIME_REF_COUNT, HV_VP_RUNTIME = msr(0x4000_0020), msr(0x4000_0010)
LEFT_OUT = {x86_64.CLOCK.id, x86_64.TSC_OFFSET.id, x86_64.NESTED_STATE.id, x86_64.PIT2.id, msr(0x10), HV_TIME_REF_COUNT,
            HV_VP_RUNTIME}
CHIP_IDS = (x86_64.PIC_MASTER.id, x86_64.PIC_SLAVE.id, x86_64.IOAPIC.id)
BUSY = (x86_64.SREGS2.id, x86_64.SREGS.id, x86_64.LAPIC.id, x86_64.VCPU_EVENTS.id, x86_64.MP_STATE.id, x86_64.XCRS.id,
        x86_64.XSAVE.id, x86_64.REGS.id)
"""Registers with more rules than others are written more often."""

WORDS = (0, 1, 2, 3, 4, 7, 0xFF, 0x20, 0x500, 0x8001_0033, 0x11, 0xE7, 0xFEE0_0900, 0xFEE0_0D00, 1 << 47, (1 << 48) - 1,
         (1 << 64) - 1)
CAPS: tuple[dict[int, tuple[int, ...]], ...] = (
    {}, {129: (3,)}, {164: (1,)}, {218: (1,)}, {164: (1,), 218: (1,), 129: (1,)})
CHIPS: tuple[dict[str, object], ...] = ({**DEVICES}, {"irqchip": True}, {})


@cache
def simulated() -> SimBackend:
    """The simulator of the kernel that runs here, with what a boot may change (the TSC's frequency) as it is here."""
    real = KvmBackend()
    here = real.profile()
    recorded = profiles.recorded(here)
    if recorded is None:
        pytest.skip(f"there is no profile of this kernel yet: {here.kernel} on {here.cpu}")
    words = vocabulary(recorded.arch)
    return SimBackend(words.told(recorded, words.facts(real)))


def nothing(vm: Vm) -> None:
    """The vCPUs as they are made, with their CPUID."""


def long_mode(vm: Vm) -> None:
    """The demo guest, ready to run."""
    guest.install(vm, simulated().profile().cpuid, simulated().profile().capabilities)


def x2apic(vm: Vm) -> None:
    """x2APIC mode on every vCPU that has an APIC."""
    if vm.machine.devices.get("irqchip"):
        sregs = [bytearray(v) for v in read(vm, x86_64.SREGS.id)]
        for value in sregs:
            value[8 * APIC_BASE + 1] |= 4
        assert write(vm, x86_64.SREGS.id, [bytes(v) for v in sregs]) == []


STARTS: tuple[Callable[[Vm], None], ...] = (nothing, long_mode, x2apic)


class Pair:
    """The same VM twice, and the sequence that it was put through."""

    def __init__(self, random: random.Random) -> None:
        self.random, self.log = random, [""]
        caps, devices, start = random.choice(CAPS), random.choice(CHIPS), random.choice(STARTS)
        cpuid = random.random() < 0.8 or start is not nothing
        self.real, self.sim = (create(backend, 2, cpuid=False, devices=devices, enabled_caps=caps)
                               for backend in (KvmBackend(), simulated()))
        for vm in (self.real, self.sim):
            if cpuid:  # one table for both: the host's has the number of the CPU that was asked
                assert write(vm, x86_64.CPUID2.id, [simulated().profile().cpuid] * 2) == []
            start(vm)
        self.log = [f"{start.__name__} caps={caps} devices={devices} cpuid={cpuid}"]
        listed = map(msr, KvmBackend().profile().msrs)
        self.registers = [id for id in (*SIZES, *listed) if id not in LEFT_OUT]

    def close(self) -> None:
        self.real.close()
        self.sim.close()

    def step(self) -> None:
        """Change a register a little, on both, and compare the answers and what it holds then."""
        id = self.random.choice(BUSY if self.random.random() < 0.4 else self.registers)
        at = layout((id, self.size(id)))
        vcpu = self.random.randrange(rows(self.real, at))
        old, _ = self.value(self.real, id, vcpu)
        new = self.changed(id, old)
        self.log.append(f"{lookup(id).name} vCPU {vcpu}: {words(old)} -> {words(new)}")
        answers = [self.write(vm, id, vcpu, new) for vm in (self.real, self.sim)]
        assert answers[0] == answers[1], self.story()
        self.same(id, vcpu)

    def changed(self, id: int, old: bytes) -> bytes:
        out = bytearray(old)
        for _ in range(self.random.choice((1, 1, 2, 3, 8))):
            place, kind = self.random.randrange(len(out)), self.random.random()
            if kind < 0.5:
                out[place] ^= 1 << self.random.randrange(8)
            elif kind < 0.8 and len(out) >= 8:
                struct.pack_into("<Q", out, place // 8 * 8, self.random.choice(WORDS))
            else:
                out[place] = self.random.choice((0, 1, 2, 4, 0x80, 0xFF))
        if id == x86_64.VCPU_EVENTS.id:
            out[27] = 0
        if id == x86_64.LAPIC.id:
            out[0x380:0x3A0] = bytes(0x20)
        if id in CHIP_IDS:  # by its number any of them may turn out to be the IOAPIC
            out[24:28] = bytes(4)
        if id == x86_64.TSC_KHZ.id:
            out[3] &= 0x7F
        return bytes(out)

    def write(self, vm: Vm, id: int, vcpu: int, value: bytes) -> list[str]:
        return [str(no) for no in write(vm, id, [value], vcpu)]

    def size(self, id: int) -> int:
        return len(simulated().profile().cpuid) if id == x86_64.CPUID2.id else SIZES.get(id, 8)

    def value(self, vm: Vm, id: int, vcpu: int) -> tuple[bytes, list[str]]:
        at = layout((id, self.size(id)))
        values = np.zeros((1, at.row_words), np.uint64)
        refused = [str(no) for no in vm.read(at, vcpu, values)]
        return bytes(self.size(id)) if refused else values.tobytes()[:self.size(id)], refused

    def compare(self) -> None:
        """Every register of every vCPU, and of the VM."""
        for id in (*self.registers, x86_64.CPUID2.id):
            for vcpu in range(rows(self.real, layout((id, 8)))):
                self.same(id, vcpu)

    def same(self, id: int, vcpu: int) -> None:
        """Both hold the same."""
        real, sim = (self.value(vm, id, vcpu) for vm in (self.real, self.sim))
        if real != sim:
            ours, theirs = words(real[0]), words(sim[0])
            only = {n: (ours.get(n), theirs.get(n)) for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)}
            pytest.fail(f"{lookup(id).name} vCPU {vcpu}: real, simulated: {only}; {real[1]} {sim[1]}\n{self.story()}")

    def story(self) -> str:
        return "\n".join(self.log)


def words(value: bytes) -> dict[int, str]:
    """The words that are not zero."""
    padded = value.ljust(-(-len(value) // 8) * 8, b"\0")
    return {n: f"{word:#x}" for n, word in enumerate(struct.unpack(f"<{len(padded) // 8}Q", padded)) if word}


@pytest.mark.parametrize("seed", range(24))
def test_the_simulator_and_real_kvm_answer_alike(seed: int) -> None:
    pair = Pair(random.Random(seed))
    try:
        pair.compare()
        for _ in range(40):
            pair.step()
        pair.compare()
    finally:
        pair.close()
