"""The arm64 demo guest on a stand-in for a CPU: its code, every state that a pause can find, what a loss looks like."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from migstream.backends.base import GuestMemory
from migstream.demo import guest_arm64 as guest
from migstream.demo import msi_arm64, run
from migstream.errors import UsageError
from migstream.model import Arch, Machine, MemoryRegion
from migstream.registers import vcpu_features


def _assemble() -> bytes:
    """The guest's program by the encodings of the Arm Architecture Reference Manual, C6.2."""
    def add_imm(d: int, n: int, imm: int) -> int:
        return 0b1_0_0_100010_0 << 22 | imm << 10 | n << 5 | d

    def add_reg(d: int, n: int, m: int) -> int:
        return 0b1_0_0_01011_00_0 << 21 | m << 16 | n << 5 | d

    def mul(d: int, n: int, m: int) -> int:
        return 0b1_00_11011_000 << 21 | m << 16 | 31 << 10 | n << 5 | d

    def memory(load: bool, t: int, n: int, offset: int) -> int:
        return 0b11_111_0_01_00 << 22 | load << 22 | offset // 8 << 10 | n << 5 | t

    cmp = 0b1_1_1_01011_00_0 << 21 | 7 << 16 | 0 << 5 | 31

    def branch(words: int) -> int:
        return 0b0_00101 << 26 | words & (1 << 26) - 1

    b_ne = 0b0101010_0 << 24 | 3 << 5 | 1
    return struct.pack("<14I", add_imm(0, 0, 1), mul(1, 1, 2), add_reg(1, 1, 3), memory(True, 6, 4, 0),
                       add_imm(6, 6, 1), memory(False, 6, 4, 0), memory(True, 7, 4, 0), cmp,
                       b_ne, memory(False, 1, 4, 8), branch(-10), memory(False, 0, 4, 16),
                       memory(False, 0, 5, 0), branch(0))


def test_the_program_is_what_its_listing_says() -> None:
    assert _assemble() == guest.PROGRAM


class Cpu:
    """Runs the guest's few instructions."""

    def __init__(self, memory: GuestMemory, vcpu: int) -> None:
        self.memory, self.exited = memory, False
        self.x = [guest._START[f"X{n}"](vcpu) if n < 8 else 0 for n in range(31)]
        self.pc, self.pstate = guest._START["PC"](vcpu), guest._START["PSTATE"](vcpu)

    def step(self) -> None:
        (word,) = struct.unpack("<I", self.memory.view(self.pc, 4))
        d, n, m, imm = word & 31, word >> 5 & 31, word >> 16 & 31, word >> 10 & 0xFFF
        following = self.pc + 4
        if word >> 22 == 0b1001000100:
            self.x[d] = (self.x[n] + imm) % 2**64
        elif word >> 21 == 0b10011011000:
            self.x[d] = self.x[n] * self.x[m] % 2**64
        elif word >> 21 == 0b10001011000:
            self.x[d] = (self.x[n] + self.x[m]) % 2**64
        elif word >> 21 == 0b11101011000:
            equal = self.x[n] == self.x[m]
            self.pstate = self.pstate & 0xFFF_FFFF | (0x6000_0000 if equal else 0)
        elif word >> 23 == 0b111110010:
            self._memory(word >> 22 & 1, d, self.x[n] + 8 * imm)
        elif word >> 24 == 0b01010100:
            following = self.pc + 4 * (word >> 5 & 0x7FFFF) if not self.pstate >> 30 & 1 else following
        else:
            offset = word & 0x3FF_FFFF
            following = self.pc + 4 * (offset - (offset >> 25 << 26))
        self.pc = following

    def _memory(self, load: int, t: int, address: int) -> None:
        if address == guest.NO_RAM:
            self.exited = True
        elif load:
            (self.x[t],) = struct.unpack("<Q", self.memory.view(address, 8))
        else:
            self.memory.view(address, 8)[:] = struct.pack("<Q", self.x[t])

    def registers(self) -> dict[str, int]:
        return {**{f"X{n}": value for n, value in enumerate(self.x)}, "PC": self.pc, "PSTATE": self.pstate}


@dataclass
class Ram:
    """As much of a VM as the guest's RAM needs."""

    machine: Machine
    memory: GuestMemory


@pytest.fixture
def ram() -> Iterator[Any]:
    machine = run.machine(Arch.ARM64, 2, guest.min_memory(2))
    (region,) = machine.memory
    vm = Ram(machine, GuestMemory([(region, memoryview(bytearray(region.size)))]))
    guest._load_ram(vm)  # type: ignore[arg-type]  # all that is used of a VM
    yield vm


def test_every_state_between_two_instructions_is_known(ram: Any) -> None:
    for vcpu in range(2):
        cpu = Cpu(ram.memory, vcpu)
        for n in range(11 * 20):
            counter = guest._check(ram, vcpu, cpu.registers(), "")
            assert (counter.fault, counter.steps) == ("", (n + 10) // 11)
            cpu.step()
    assert guest.counts(ram) == [20, 20]


def test_each_lost_bit_of_the_loops_state_is_seen(ram: Any) -> None:
    cpu = Cpu(ram.memory, 0)
    for _ in range(11 * 5 + 11):
        cpu.step()
        for name in ("X0", "X1", "X2", "X3", "X4", "X5", "X6", "X7", "PC", "PSTATE"):
            assert guest._check(ram, 0, {**cpu.registers(), name: cpu.registers()[name] ^ 0x8}, "").fault, name
        for offset in (0, 8):
            cell = ram.memory.view(guest.CELLS + offset, 8)
            cell[3] ^= 0x10
            assert guest._check(ram, 0, cpu.registers(), "").fault
            cell[3] ^= 0x10


def test_a_guest_that_finds_its_count_wrong_leaves_through_mmio(ram: Any) -> None:
    cpu = Cpu(ram.memory, 1)
    for _ in range(30):
        cpu.step()
    cpu.x[0] += 7
    for _ in range(30):
        cpu.step()
    assert cpu.exited
    assert "self-check failed" in guest._check(ram, 1, cpu.registers(), "").fault


def test_marks_differ_from_vcpu_to_vcpu() -> None:
    marks = {name: mark for name, mark in guest._MARKS.items() if name.startswith(("X", "V", "TPIDR", "AP"))}
    values = [mark(k) for mark in marks.values() for k in range(8)]
    assert len(marks) == 23 + 33 + 3 + 10
    assert len({*values}) == len(values)


def test_a_message_interrupt_that_is_not_saved_is_missed(ram: Any) -> None:
    msi_arm64.forget_tables(ram.memory, guest.RAM)
    assert "device table entry" in msi_arm64.lost(ram.memory, guest.RAM)
    for offset, (_, entry) in msi_arm64._saved(guest.RAM).items():
        ram.memory.view(guest.RAM + offset, len(entry))[:] = entry
    assert msi_arm64.lost(ram.memory, guest.RAM) == ""


def test_the_demos_machines() -> None:
    arm = run.machine(Arch.ARM64, 8, 64 << 20, vcpu_features.parse("sve"))
    assert arm.memory == (MemoryRegion(guest.RAM, 64 << 20),)
    assert arm.devices["vcpu_features"] == 0x14
    pc = run.machine(Arch.X86_64, 1, 3 << 30)
    assert pc.memory == (MemoryRegion(0, 0x7000_0000), MemoryRegion(1 << 32, (3 << 30) - 0x7000_0000))
    with pytest.raises(UsageError, match="at least"):
        run.machine(Arch.ARM64, 4, 4096)
