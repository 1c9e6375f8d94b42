"""A small interpreter of x86-64 machine code: integer instructions in 64-bit mode, ring 0, interrupts off.

Enough for a guest with page tables that counts, checks itself and talks to a device: MOV, ADD, OR, AND, SUB, XOR, CMP,
TEST, INC, DEC, IMUL, NOP, short JMP and Jcc, HLT, with 32- and 64-bit operands and every addressing form of ModRM and
SIB. Any other opcode is `KVM_EXIT_INTERNAL_ERROR`, as in a KVM that has to emulate what it can't decode.

An instruction is decoded once into a function of the vCPU. Source: Intel SDM volume 2, and volume 1 3.4.3 for flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from migstream.backends.sim.mmu import Exit, Mmu

CF, PF, AF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
_ARITHMETIC = CF | PF | AF | ZF | SF | OF
_U64 = (1 << 64) - 1
_PARITY = tuple(PF if byte.bit_count() % 2 == 0 else 0 for byte in range(256))
_LONGEST = 15
"""Bytes that an instruction may have."""

Instruction = Callable[["Cpu"], None]


class Cpu:
    """One vCPU while it runs.

    Attributes:
        registers: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of their numbers in machine code.
        rip, rflags: as in the CPU. code: decoded instructions by address, shared by vCPUs with the same page tables.
    """

    __slots__ = ("code", "mmu", "registers", "rflags", "rip")

    def __init__(self, registers: list[int], rip: int, rflags: int, mmu: Mmu, code: CodeCache) -> None:
        self.registers, self.rip, self.rflags, self.mmu, self.code = registers, rip, rflags, mmu, code

    def run(self, instructions: int) -> None:
        """Run so many instructions. Raises: Exit, with RIP at the instruction that could not be done."""
        known = self.code.instructions
        for _ in range(instructions):
            step = known.get(self.rip)
            if step is None:
                step = self.code.decode(self.mmu, self.rip)
            step(self)

    def store(self, address: int, size: int, value: int) -> None:
        """Write guest memory; forget instructions that were decoded from there."""
        for page in self.mmu.store(address, size, value):
            if page in self.code.pages:
                self.code.forget()

    def set_flags(self, flags: int, changed: int = _ARITHMETIC) -> None:
        """Replace the flags in `changed`."""
        self.rflags = self.rflags & ~changed | flags


class CodeCache:
    """Decoded instructions of one address space, and the physical pages that they came from."""

    def __init__(self) -> None:
        self.instructions: dict[int, Instruction] = {}
        self.pages: set[int] = set()

    def forget(self) -> None:
        """A page with code was written: decode again."""
        self.instructions.clear()
        self.pages.clear()

    def decode(self, mmu: Mmu, rip: int) -> Instruction:
        """Decode the instruction at `rip`. Raises: Exit."""
        reader = _Reader(mmu, rip)
        instruction = _decode(reader)
        self.pages |= reader.pages
        self.instructions[rip] = instruction
        return instruction


class _Reader:
    """The bytes of one instruction, and its prefix."""

    def __init__(self, mmu: Mmu, rip: int) -> None:
        self.mmu, self.start, self.at = mmu, rip, rip
        self.pages: set[int] = set()
        self.rex = 0

    def unsigned(self, size: int) -> int:
        """The next number of `size` bytes."""
        value = 0
        for shift in range(0, 8 * size, 8):
            if self.at - self.start >= _LONGEST:
                raise Exit("KVM_EXIT_SHUTDOWN")
            page = self.mmu.page(self.at & _U64, False)
            self.pages.add(page.address)
            value |= page.memory[self.at & 0xFFF] << shift
            self.at += 1
        return value

    def signed(self, size: int) -> int:
        """The next number of `size` bytes, two's complement."""
        value = self.unsigned(size)
        return value - (value >> 8 * size - 1 << 8 * size)

    @property
    def width(self) -> int:
        """Bits of the operands: REX.W makes them 64."""
        return 64 if self.rex & 8 else 32

    @property
    def next(self) -> int:
        """Address of the next instruction, once this one is read to its end."""
        return self.at & _U64


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a value is read and written: a register, or memory at an address that is computed each time."""

    read: Callable[[Cpu], int]
    write: Callable[[Cpu, int], None]


def _register(number: int, width: int) -> Operand:
    """A register. A 32-bit write makes the upper half zero."""
    mask = (1 << width) - 1

    def read(cpu: Cpu) -> int:
        return cpu.registers[number] & mask

    def write(cpu: Cpu, value: int) -> None:
        cpu.registers[number] = value

    return Operand(read, write)


def _memory(address: Callable[[Cpu], int], width: int) -> Operand:
    size = width // 8

    def read(cpu: Cpu) -> int:
        return cpu.mmu.load(address(cpu), size)

    def write(cpu: Cpu, value: int) -> None:
        cpu.store(address(cpu), size, value)

    return Operand(read, write)


def _modrm(reader: _Reader) -> tuple[Operand, int]:
    """The operand of a ModRM byte, and the number in its middle field (REX.R included)."""
    byte = reader.unsigned(1)
    mode, middle, low = byte >> 6, byte >> 3 & 7 | (reader.rex & 4) << 1, byte & 7
    if mode == 3:
        return _register(low | (reader.rex & 1) << 3, reader.width), middle
    return _memory(_address(reader, mode, low), reader.width), middle


def _address(reader: _Reader, mode: int, low: int) -> Callable[[Cpu], int]:
    base: int | None = low | (reader.rex & 1) << 3
    index, scale = None, 0
    if low == 4:
        base, index, scale = _sib(reader, mode)
    elif low == 5 and mode == 0:
        return _relative(reader)
    displacement = reader.signed({0: 4 if base is None else 0, 1: 1, 2: 4}[mode]) if mode or base is None else 0
    return _effective(base, index, scale, displacement)


def _sib(reader: _Reader, mode: int) -> tuple[int | None, int | None, int]:
    byte = reader.unsigned(1)
    index, low = byte >> 3 & 7 | (reader.rex & 2) << 2, byte & 7
    base = None if low == 5 and mode == 0 else low | (reader.rex & 1) << 3
    return base, None if index == 4 else index, byte >> 6


def _relative(reader: _Reader) -> Callable[[Cpu], int]:
    """RIP-relative: from the end of the instruction, which is not read yet."""
    displacement = reader.signed(4)
    return lambda cpu: reader.next + displacement & _U64


def _effective(base: int | None, index: int | None, scale: int, displacement: int) -> Callable[[Cpu], int]:
    if base is not None and index is None:
        return lambda cpu: cpu.registers[base] + displacement & _U64

    def address(cpu: Cpu) -> int:
        registers = cpu.registers
        total = displacement + (0 if base is None else registers[base])
        return total + (0 if index is None else registers[index] << scale) & _U64

    return address


def _result_flags(value: int, width: int) -> int:
    return _PARITY[value & 0xFF] | (0 if value else ZF) | (SF if value >> width - 1 else 0)


def _add(a: int, b: int, width: int) -> tuple[int, int]:
    """Sum and flags."""
    total = a + b
    value = total & (1 << width) - 1
    overflow = ((a ^ value) & (b ^ value)) >> width - 1
    return value, _result_flags(value, width) | total >> width | (a ^ b ^ value) & AF | (OF if overflow else 0)


def _subtract(a: int, b: int, width: int) -> tuple[int, int]:
    """Difference and flags."""
    value = a - b & (1 << width) - 1
    overflow = ((a ^ b) & (a ^ value)) >> width - 1
    return value, _result_flags(value, width) | (CF if a < b else 0) | (a ^ b ^ value) & AF | (OF if overflow else 0)


def _logical(operation: Callable[[int, int], int]) -> Callable[[int, int, int], tuple[int, int]]:
    """AND, OR, XOR: CF and OF are 0 (so is AF here, which the CPU leaves undefined)."""
    def compute(a: int, b: int, width: int) -> tuple[int, int]:
        value = operation(a, b)
        return value, _result_flags(value, width)

    return compute


Compute = Callable[[int, int, int], tuple[int, int]]

_AND = _logical(lambda a, b: a & b)
_GROUP: dict[int, tuple[Compute, bool]] = {
    0: (_add, True), 1: (_logical(lambda a, b: a | b), True), 4: (_AND, True), 5: (_subtract, True),
    6: (_logical(lambda a, b: a ^ b), True), 7: (_subtract, False),
}
"""Arithmetic by its number in opcodes and in ModRM: what is computed, and whether the result is stored."""


def _binary(reader: _Reader, compute: Compute, stores: bool, target: Operand,
            source: Callable[[Cpu], int]) -> Instruction:
    width, after = reader.width, reader.next

    def step(cpu: Cpu) -> None:
        value, flags = compute(target.read(cpu), source(cpu), width)
        if stores:
            target.write(cpu, value)
        cpu.set_flags(flags)
        cpu.rip = after

    return step


def _arithmetic(reader: _Reader, opcode: int) -> Instruction:
    """`op r/m, r` and `op r, r/m`."""
    compute, stores = _row(opcode >> 3)
    operand, number = _modrm(reader)
    register = _register(number, reader.width)
    target, source = (register, operand) if opcode & 2 else (operand, register)
    return _binary(reader, compute, stores, target, source.read)


def _row(number: int) -> tuple[Compute, bool]:
    if number not in _GROUP:
        raise Exit("KVM_EXIT_INTERNAL_ERROR")
    return _GROUP[number]


def _immediate(reader: _Reader, opcode: int) -> Instruction:
    """`op r/m, imm`: sign-extended from 8 or 32 bits."""
    operand, number = _modrm(reader)
    compute, stores = _row(number & 7)
    value = reader.signed(1 if opcode == 0x83 else 4) & (1 << reader.width) - 1
    return _binary(reader, compute, stores, operand, lambda cpu: value)


def _test(reader: _Reader, opcode: int) -> Instruction:
    operand, number = _modrm(reader)
    return _binary(reader, _AND, False, operand, _register(number, reader.width).read)


def _test_immediate(reader: _Reader, opcode: int) -> Instruction:
    operand, number = _modrm(reader)
    if number & 7 > 1:
        raise Exit("KVM_EXIT_INTERNAL_ERROR")
    value = reader.signed(4) & (1 << reader.width) - 1
    return _binary(reader, _AND, False, operand, lambda cpu: value)


def _move(reader: _Reader, read: Callable[[Cpu], int], target: Operand) -> Instruction:
    after = reader.next

    def step(cpu: Cpu) -> None:
        target.write(cpu, read(cpu))
        cpu.rip = after

    return step


def _mov(reader: _Reader, opcode: int) -> Instruction:
    operand, number = _modrm(reader)
    register = _register(number, reader.width)
    return _move(reader, operand.read, register) if opcode & 2 else _move(reader, register.read, operand)


def _mov_immediate(reader: _Reader, opcode: int) -> Instruction:
    operand, number = _modrm(reader)
    if number & 7:
        raise Exit("KVM_EXIT_INTERNAL_ERROR")
    value = reader.signed(4) & (1 << reader.width) - 1
    return _move(reader, lambda cpu: value, operand)


def _mov_register(reader: _Reader, opcode: int) -> Instruction:
    value = reader.unsigned(reader.width // 8)
    return _move(reader, lambda cpu: value, _register(opcode & 7 | (reader.rex & 1) << 3, reader.width))


def _step_by_one(reader: _Reader, opcode: int) -> Instruction:
    """INC and DEC: CF stays."""
    operand, number = _modrm(reader)
    if number & 7 > 1:
        raise Exit("KVM_EXIT_INTERNAL_ERROR")
    compute, width, after = _subtract if number & 1 else _add, reader.width, reader.next

    def step(cpu: Cpu) -> None:
        value, flags = compute(operand.read(cpu), 1, width)
        operand.write(cpu, value)
        cpu.set_flags(flags & ~CF, _ARITHMETIC & ~CF)
        cpu.rip = after

    return step


def _signed(value: int, width: int) -> int:
    return value - (value >> width - 1 << width)


def _imul(reader: _Reader, opcode: int) -> Instruction:
    """`imul r, r/m`: CF and OF where the product does not fit; the other flags, undefined in the CPU, stay."""
    operand, number = _modrm(reader)
    width, after = reader.width, reader.next
    register = _register(number, width)

    def step(cpu: Cpu) -> None:
        product = _signed(register.read(cpu), width) * _signed(operand.read(cpu), width)
        value = product & (1 << width) - 1
        register.write(cpu, value)
        cpu.set_flags(0 if _signed(value, width) == product else CF | OF, CF | OF)
        cpu.rip = after

    return step


_CONDITIONS: tuple[Callable[[int], object], ...] = (
    lambda f: f & OF, lambda f: f & CF, lambda f: f & ZF, lambda f: f & (CF | ZF), lambda f: f & SF, lambda f: f & PF,
    lambda f: bool(f & SF) != bool(f & OF), lambda f: f & ZF or bool(f & SF) != bool(f & OF),
)
"""O, B, Z, BE, S, P, L, LE; the odd opcodes are their opposites."""


def _jump_if(reader: _Reader, opcode: int) -> Instruction:
    holds, wanted = _CONDITIONS[opcode >> 1 & 7], not opcode & 1
    displacement = reader.signed(1)
    after, target = reader.next, reader.next + displacement & _U64

    def step(cpu: Cpu) -> None:
        cpu.rip = target if bool(holds(cpu.rflags)) == wanted else after

    return step


def _jump(reader: _Reader, opcode: int) -> Instruction:
    displacement = reader.signed(1)
    target = reader.next + displacement & _U64

    def step(cpu: Cpu) -> None:
        cpu.rip = target

    return step


def _halt(reader: _Reader, opcode: int) -> Instruction:
    """The vCPU stands behind the instruction."""
    after = reader.next

    def step(cpu: Cpu) -> None:
        cpu.rip = after
        raise Exit("KVM_EXIT_HLT")

    return step


def _nop(reader: _Reader, opcode: int) -> Instruction:
    after = reader.next

    def step(cpu: Cpu) -> None:
        cpu.rip = after

    return step


Decoder = Callable[[_Reader, int], Instruction]

_OPCODES: dict[int, Decoder] = {
    **{number << 3 | form: _arithmetic for number in _GROUP for form in (1, 3)},
    0x81: _immediate, 0x83: _immediate, 0x85: _test, 0x89: _mov, 0x8B: _mov, 0x90: _nop, 0xC7: _mov_immediate,
    0xEB: _jump, 0xF4: _halt, 0xF7: _test_immediate, 0xFF: _step_by_one, 0x0FAF: _imul,
    **dict.fromkeys(range(0x70, 0x80), _jump_if), **dict.fromkeys(range(0xB8, 0xC0), _mov_register),
}


def _decode(reader: _Reader) -> Instruction:
    opcode = reader.unsigned(1)
    if opcode & 0xF0 == 0x40:
        reader.rex, opcode = opcode, reader.unsigned(1)
    if opcode == 0x0F:
        opcode = 0x0F00 | reader.unsigned(1)
    if opcode not in _OPCODES or (opcode == 0x90 and reader.rex & 1):
        raise Exit("KVM_EXIT_INTERNAL_ERROR")
    return _OPCODES[opcode](reader, opcode)
