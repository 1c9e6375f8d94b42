"""An interpreter for the A64 instructions that the demo guest and small test guests are made of.

64-bit integer instructions at EL1, little-endian, without exceptions: what it does not know, or what would trap, ends
the vCPU with the reason. Encodings: Arm ARM (DDI 0487), C4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from migstream.backends.sim.mmu import Exit
from migstream.errors import UsageError

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory

_U64 = (1 << 64) - 1
_N, _Z, _C, _V = 1 << 31, 1 << 30, 1 << 29, 1 << 28
_PAGE = 4096
_TABLE, _VALID = 0b10, 0b01
_OUTPUT = (1 << 48) - (1 << 12)


def mmio() -> Exit:
    """No RAM there: KVM asks the VMM."""
    return Exit("KVM_EXIT_MMIO")


def unknown() -> Exit:
    """An exception that this interpreter can't take."""
    return Exit("KVM_EXIT_INTERNAL_ERROR")


@dataclass
class Translation:
    """Stage 1 of EL1, TTBR0 half, 4 KiB granule (D8.2 of the Arm ARM). Translations are kept: no guest changes them.

    Attributes:
        on: SCTLR_EL1.M. tcr, table: TCR_EL1 and TTBR0_EL1.
    """

    memory: GuestMemory
    on: bool
    tcr: int
    table: int
    _pages: dict[int, int] = field(default_factory=dict)

    def physical(self, address: int) -> int:
        """Guest-physical address. Raises: Exit."""
        if not self.on:
            return address
        page = self._pages.get(address >> 12)
        if page is None:
            page = self._pages[address >> 12] = self._walk(address) >> 12
        return page << 12 | address & _PAGE - 1

    def _walk(self, address: int) -> int:
        bits = 64 - (self.tcr & 0x3F)
        if address >> bits:
            raise unknown()
        table = self.table & _OUTPUT
        for level in range(4 - -(-(bits - 12) // 9), 4):
            low = 39 - 9 * level
            entry = self.word(table + 8 * (address >> low & 0x1FF), 8)
            if not entry & _VALID:
                raise unknown()
            if level == 3 or not entry & _TABLE:
                inside = (1 << low) - 1
                return entry & _OUTPUT & ~inside | address & inside
            table = entry & _OUTPUT
        raise unknown()

    def word(self, physical: int, size: int) -> int:
        """Read guest RAM. Raises: Exit."""
        try:
            return int.from_bytes(self.memory.view(physical, size), "little")
        except UsageError:
            raise mmio() from None

    def read(self, address: int, size: int) -> int:
        """Read at a virtual address. Raises: Exit."""
        return self.word(self.physical(address), size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write at a virtual address. Raises: Exit."""
        try:
            self.memory.view(self.physical(address), size)[:] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        except UsageError:
            raise mmio() from None


class Host(Protocol):
    """Who answers what an instruction asks of the hypervisor."""

    def system_register(self, encoding: int) -> int | None:
        """MRS: the value of a register, by op0 to op2 as in KVM's ids; None where the instruction is undefined."""

    def hypercall(self, function: int, argument: int) -> int:
        """HVC: what X0 becomes."""


Step = Callable[["Cpu"], None]


@dataclass
class Cpu:
    """One vCPU: 31 registers and the zero register, SP, PC, NZCV."""

    x: list[int]
    sp: int
    pc: int
    pstate: int
    translation: Translation
    decoded: dict[int, Step]
    host: Host | None = None

    def run(self, count: int) -> None:
        """Run instructions. Raises: Exit, with PC at the instruction that it is about."""
        for _ in range(count):
            word = self.translation.read(self.pc, 4)
            step = self.decoded.get(word)
            if step is None:
                step = self.decoded[word] = decode(word)
            step(self)

    def get(self, number: int) -> int:
        """A register, 31 being zero."""
        return self.x[number] if number < 31 else 0

    def put(self, number: int, value: int) -> None:
        """Set a register, 31 being nowhere; go on to the next instruction."""
        if number < 31:
            self.x[number] = value & _U64
        self.pc += 4

    def base(self, number: int) -> int:
        """A register, 31 being SP."""
        return self.x[number] if number < 31 else self.sp

    def compare(self, left: int, right: int) -> int:
        """left - right, with the flags."""
        result = left - right & _U64
        overflow = (left ^ right) & (left ^ result) & 1 << 63
        self.pstate &= ~(_N | _Z | _C | _V)
        self.pstate |= (result >> 63 and _N) | (not result and _Z) | (left >= right and _C) | (overflow and _V)
        return result


@dataclass(frozen=True, slots=True)
class Form:
    """Instructions that agree in some bits, and how one of them becomes a step."""

    mask: int
    value: int
    name: str
    make: Callable[[int], Step]


def decode(word: int) -> Step:
    """The step of an instruction; one that raises where it is not known."""
    for form in FORMS:
        if word & form.mask == form.value:
            return form.make(word)

    def stop(cpu: Cpu) -> None:
        raise unknown()

    return stop


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


def _operands(word: int) -> tuple[int, int, int]:
    """Rd, Rn, Rm."""
    return word & 31, word >> 5 & 31, word >> 16 & 31


def _add_immediate(word: int) -> Step:
    rd, rn, _ = _operands(word)
    amount = (word >> 10 & 0xFFF) << (12 if word >> 22 & 1 else 0)
    amount = -amount if word >> 30 & 1 else amount

    def step(cpu: Cpu) -> None:
        value = cpu.base(rn) + amount & _U64
        if rd == 31:
            cpu.sp = value
        cpu.put(rd, value)

    return step


def _add_register(word: int) -> Step:
    (rd, rn, rm), shift = _operands(word), word >> 10 & 0x3F
    subtract, flags = word >> 30 & 1, word >> 29 & 1

    def step(cpu: Cpu) -> None:
        left, right = cpu.get(rn), cpu.get(rm) << shift & _U64
        cpu.put(rd, cpu.compare(left, right) if flags else left - right if subtract else left + right)

    return step


def _multiply_add(word: int) -> Step:
    (rd, rn, rm), ra = _operands(word), word >> 10 & 31

    def step(cpu: Cpu) -> None:
        cpu.put(rd, cpu.get(ra) + cpu.get(rn) * cpu.get(rm))

    return step


def _transfer(word: int) -> Step:
    rt, rn, _ = _operands(word)
    size = 1 << (word >> 30)
    offset, load = (word >> 10 & 0xFFF) * size, word >> 22 & 1

    def step(cpu: Cpu) -> None:
        address = cpu.base(rn) + offset & _U64
        if load:
            cpu.put(rt, cpu.translation.read(address, size))
        else:
            cpu.translation.write(address, size, cpu.get(rt))
            cpu.pc += 4

    return step


def _branch(word: int) -> Step:
    distance = 4 * _signed(word & 0x3FF_FFFF, 26)

    def step(cpu: Cpu) -> None:
        cpu.pc += distance

    return step


def _equal_branch(word: int) -> Step:
    distance, unequal = 4 * _signed(word >> 5 & 0x7_FFFF, 19), word & 1

    def step(cpu: Cpu) -> None:
        taken = bool(cpu.pstate & _Z) != bool(unequal)
        cpu.pc += distance if taken else 4

    return step


def _move_wide(word: int) -> Step:
    rd, shift, value = word & 31, 16 * (word >> 21 & 3), word >> 5 & 0xFFFF
    kind = word >> 29 & 3

    def step(cpu: Cpu) -> None:
        if kind == 1:  # unallocated
            raise unknown()
        moved = value << shift
        cpu.put(rd, {0: ~moved, 2: moved, 3: cpu.get(rd) & ~(0xFFFF << shift) | moved}[kind])

    return step


def _nothing(word: int) -> Step:
    def step(cpu: Cpu) -> None:
        cpu.pc += 4

    return step


def _move_register(word: int) -> Step:
    rd, _, rm = _operands(word)

    def step(cpu: Cpu) -> None:
        cpu.put(rd, cpu.get(rm))

    return step


def _read_system(word: int) -> Step:
    rt, encoding = word & 31, word >> 5 & 0x7FFF | 0x8000

    def step(cpu: Cpu) -> None:
        value = cpu.host.system_register(encoding) if cpu.host else None
        if value is None:
            raise unknown()
        cpu.put(rt, value)

    return step


def _hypercall(word: int) -> Step:
    def step(cpu: Cpu) -> None:
        if not cpu.host:
            raise unknown()
        cpu.put(0, cpu.host.hypercall(cpu.x[0] & 0xFFFF_FFFF, cpu.x[1]))

    return step


def _wait(word: int) -> Step:
    """WFI: waits for an interrupt, and none is delivered here."""
    def step(cpu: Cpu) -> None:
        cpu.pc += 4
        raise Exit("WFI")

    return step


FORMS: tuple[Form, ...] = (
    Form(0xBF80_0000, 0x9100_0000, "ADD, SUB (immediate)", _add_immediate),
    Form(0xFFE0_0000, 0x8B00_0000, "ADD (shifted register, LSL)", _add_register),
    Form(0xDFE0_0000, 0xCB00_0000, "SUB, SUBS (shifted register, LSL)", _add_register),
    Form(0xFFE0_8000, 0x9B00_0000, "MADD", _multiply_add),
    Form(0x3F80_0000, 0x3900_0000, "LDR, STR (unsigned offset; bytes to 64 bits)", _transfer),
    Form(0xFC00_0000, 0x1400_0000, "B", _branch),
    Form(0xFF00_001E, 0x5400_0000, "B.EQ, B.NE", _equal_branch),
    Form(0xFF80_0000, 0x9280_0000, "MOVN", _move_wide),
    Form(0xDF80_0000, 0xD280_0000, "MOVZ, MOVK", _move_wide),
    Form(0xFFE0_FFE0, 0xAA00_03E0, "MOV (register)", _move_register),
    Form(0xFFF0_0000, 0xD530_0000, "MRS", _read_system),
    Form(0xFFFF_FFFF, 0xD400_0002, "HVC #0", _hypercall),
    Form(0xFFFF_FFFF, 0xD503_201F, "NOP", _nothing),
    Form(0xFFFF_FFFF, 0xD503_207F, "WFI", _wait),
)
"""The first that fits counts."""
