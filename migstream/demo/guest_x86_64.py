"""The demo guest for x86-64: real machine code that counts in a register and in RAM, and checks itself.

Each vCPU runs the same loop in 64-bit mode, identity-mapped, interrupts off, integer instructions only (one kind of
KVM emulates ring-0 code and has no SSE there):

    step:  inc  rax              count in a register
           imul rbx, rcx         a chain of values, each from the one before: a step that is lost or
           add  rbx, rdx         done twice leaves it wrong for ever
           inc  qword [rdi]      count in RAM
           cmp  rax, [rdi]
           jne  fail
           mov  [rdi+8], rbx     chain in RAM
           jmp  step
    fail:  mov  [rdi+16], rax
           mov  [rsi], rax       no RAM there: KVM_EXIT_MMIO, the host sees it

The state between any two instructions is known (`_STATES`), so the host checks the guest exactly, wherever the pause
fell: `f(n)`, the chain after n steps, is computed without running them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from migstream.backends.base import Vm
from migstream.errors import BackendError
from migstream.model import PAGE, Layout, Phase, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.wire import structs

NAME = "migstream.demo.x86_64"
MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407
"""Knuth's MMIX linear congruential generator: every step changes the value, modulo 2^64."""

PML4, PDPT, PD, GDT, CODE, CELLS = 0x1000, 0x2000, 0x3000, 0x8000, 0x9000, 0x10000
CELL = 64
NO_RAM = 0xD000_0000
"""In the hole that a PC keeps for devices: mapped by the page tables, not backed by RAM."""

PROGRAM = bytes.fromhex("48ffc0 480fafd9 4801d3 48ff07 483b07 7506 48895f08 ebe8 48894710 488906 ebfe")

_F, _F1, _MUL = "f(n)", "f(n-1)", "f(n-1)*multiplier"
_STATES = {  # RIP relative to step: (chain in rbx, RAM count minus n, chain in RAM)
    0: (_F, 0, _F),
    3: (_F1, -1, _F1),
    7: (_MUL, -1, _F1),
    10: (_F, -1, _F1),
    13: (_F, 0, _F1),
    16: (_F, 0, _F1),
    18: (_F, 0, _F1),
    22: (_F, 0, _F),
}


def min_memory(vcpus: int) -> int:
    """Bytes of RAM that the guest needs."""
    return -(-(CELLS + CELL * vcpus) // PAGE) * PAGE


def seed(vcpu: int) -> int:
    """The chain's value before the first step; another one for each vCPU."""
    return (vcpu + 1) * 0x9E3779B97F4A7C15 % 2**64


def chain(vcpu: int, steps: int) -> int:
    """The chain's value after `steps` steps, by repeated squaring."""
    a, c, total_a, total_c, n = MULTIPLIER, INCREMENT, 1, 0, steps
    while n:
        if n & 1:
            total_a, total_c = total_a * a % 2**64, (total_c * a + c) % 2**64
        a, c, n = a * a % 2**64, (a + 1) * c % 2**64, n >> 1
    return (total_a * seed(vcpu) + total_c) % 2**64


@dataclass(frozen=True, slots=True)
class Counter:
    """What one vCPU has counted, and what is wrong with it ("" for nothing)."""

    steps: int
    fault: str


def install(vm: Vm, cpuid: bytes, capabilities: Mapping[str, int]) -> None:
    """Put the guest into a fresh VM with vCPUs: RAM, CPUID, registers. Raises: BackendError."""
    _load_ram(vm)
    _write(vm, Phase.CREATE, x86_64.CPUID2.id, [_cpuid(cpuid, k) for k in range(vm.machine.vcpus)])
    sregs = x86_64.SREGS2 if capabilities.get("SREGS2") else x86_64.SREGS
    size = sregs.size or 0
    _write(vm, Phase.STATE, sregs.id, [_long_mode(sregs.struct, old) for old in _read(vm, Phase.STATE, sregs.id, size)])
    _write(vm, Phase.STATE, x86_64.REGS.id, [_registers(k) for k in range(vm.machine.vcpus)])
    _write(vm, Phase.STATE, x86_64.XSAVE.id, [_vectors(k) for k in range(vm.machine.vcpus)])
    for index, value in _MSRS.items():
        _write(vm, Phase.STATE, ids.msr_id(index), [struct.pack("<Q", value(k)) for k in range(vm.machine.vcpus)])
    _write(vm, Phase.STATE, x86_64.MP_STATE.id, [bytes(4)] * vm.machine.vcpus)


def _load_ram(vm: Vm) -> None:
    writable, large = 0x3, 0x80
    tables = {PML4: [PDPT | writable], PDPT: [(PD + PAGE * k) | writable for k in range(4)]}
    tables |= {PD + PAGE * k: [(k << 30 | n << 21) | writable | large for n in range(512)] for k in range(4)}
    tables[GDT] = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF]
    for address, entries in tables.items():
        vm.memory.view(address, 8 * len(entries))[:] = struct.pack(f"<{len(entries)}Q", *entries)
    vm.memory.view(CODE, len(PROGRAM))[:] = PROGRAM
    for k in range(vm.machine.vcpus):
        vm.memory.view(CELLS + CELL * k, 16)[:] = struct.pack("<QQ", 0, seed(k))


def _cpuid(table: bytes, vcpu: int) -> bytes:
    """The host's supported CPUID with the vCPU's own APIC id (leaf 1 EBX 31:24, leaves 0xb and 0x1f EDX)."""
    out = bytearray(table)
    for offset in range(8, len(out), 40):
        (leaf,) = struct.unpack_from("<I", out, offset)
        if leaf == 1:
            out[offset + 19] = vcpu & 0xFF
        if leaf in (0xB, 0x1F):
            struct.pack_into("<I", out, offset + 24, vcpu)
    return bytes(out)


def _long_mode(struct_name: str, old: bytes) -> bytes:
    fields = structs.parse(struct_name, old)
    code = {"base": 0, "limit": 0xFFFFFFFF, "selector": 8, "type": 11, "present": 1, "dpl": 0, "db": 0, "s": 1, "l": 1,
            "g": 1, "avl": 0, "unusable": 0, "padding": 0}
    data = {**code, "selector": 16, "type": 3, "db": 1, "l": 0}
    fields.update({"cs": code, **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)})
    fields["gdt"] = {"base": GDT, "limit": 23, "padding": [0, 0, 0]}
    fields["gs"] = {**data, "base": _PER_CPU}
    fields.update(cr0=0x80010033, cr3=PML4, cr4=0x20, efer=0x500)
    return structs.build(struct_name, fields)


def _registers(vcpu: int) -> bytes:
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
             "r15", "rip", "rflags")
    values = dict.fromkeys(names, vcpu) | {
        "rax": 0, "rbx": seed(vcpu), "rcx": MULTIPLIER, "rdx": INCREMENT, "rsi": NO_RAM, "rdi": CELLS + CELL * vcpu,
        "rsp": CODE, "rip": CODE, "rflags": 2}
    return struct.pack("<18Q", *(values[name] for name in names))


_PER_CPU, _PER_CPU_SIZE = 0xFFFF_8880_0000_0000, 0x4_0000

_MSRS: dict[int, Callable[[int], int]] = {
    0x174: lambda vcpu: 0x10,                                           # MSR_IA32_SYSENTER_CS
    0x175: lambda vcpu: _PER_CPU + vcpu * _PER_CPU_SIZE + 0x3000,       # MSR_IA32_SYSENTER_ESP: a stack of its own
    0xC0000081: lambda vcpu: 0x0023001000000000,                        # MSR_STAR
    0xC0000082: lambda vcpu: 0xFFFF_FFFF_8100_0000,                     # MSR_LSTAR: one kernel for all
    0xC0000102: lambda vcpu: _PER_CPU + vcpu * _PER_CPU_SIZE,           # MSR_KERNEL_GS_BASE
}
"""What a kernel would have put there: the guest's code does not use it, a save and restore must keep it."""


def scattered(number: int) -> int:
    """64 bits with no pattern between vCPUs (Steele's SplitMix64 finalizer): real vectors compress badly."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _vectors(vcpu: int) -> bytes:
    """An XSAVE area (without components past SSE) with another value in every XMM register of every vCPU."""
    area = bytearray(4096)
    struct.pack_into("<HH", area, 0, 0x37F, 0)
    struct.pack_into("<I", area, 24, 0x1F80)
    struct.pack_into("<32Q", area, 160, *(scattered(vcpu * 32 + n) for n in range(32)))
    struct.pack_into("<Q", area, 512, 0x3)
    return bytes(area)


def _layout(phase: Phase, id: int, size: int) -> Layout:
    return Layout(Scope.VCPU, phase, (Slot(id, size),))


def _write(vm: Vm, phase: Phase, id: int, values: list[bytes]) -> None:
    layout = _layout(phase, id, len(values[0]))
    width = layout.row_words * 8
    matrix = np.frombuffer(b"".join(v.ljust(width, b"\0") for v in values), np.uint64).reshape(len(values), -1).copy()
    for refusal in vm.write(layout, 0, matrix):
        raise BackendError(refusal.operation, errno=max(refusal.errno, 0), vcpu=refusal.vcpu, what=str(refusal))


def _read(vm: Vm, phase: Phase, id: int, size: int) -> list[bytes]:
    layout = _layout(phase, id, size)
    matrix = np.zeros((vm.machine.vcpus, layout.row_words), np.uint64)
    for refusal in vm.read(layout, 0, matrix):
        raise BackendError(refusal.operation, errno=max(refusal.errno, 0), vcpu=refusal.vcpu, what=str(refusal))
    return [row.tobytes()[:size] for row in matrix]


def counts(vm: Vm) -> list[int]:
    """Steps of each vCPU as its RAM cell shows them; may be asked while the guest runs."""
    return [struct.unpack("<Q", vm.memory.view(CELLS + CELL * k, 8))[0] for k in range(vm.machine.vcpus)]


def counters(vm: Vm) -> list[Counter]:
    """Check every vCPU of a paused guest against what its count says everything else must be."""
    regs = _read(vm, Phase.STATE, x86_64.REGS.id, 144)
    return [_check(vm, k, struct.unpack("<18Q", value)) for k, value in enumerate(regs)]


def _check(vm: Vm, vcpu: int, regs: tuple[int, ...]) -> Counter:
    steps, place = regs[0], regs[16] - CODE
    ram_count, ram_chain, failed = struct.unpack("<3Q", vm.memory.view(CELLS + CELL * vcpu, 24))
    if place not in _STATES or failed:
        return Counter(steps, f"vCPU {vcpu} is at step{place:+#x}: its self-check failed at step {failed}")
    register_chain, lag, memory_chain = _STATES[place]
    before = chain(vcpu, steps - 1) if steps else seed(vcpu)
    values = {_F: chain(vcpu, steps), _F1: before, _MUL: before * MULTIPLIER % 2**64}
    wanted = (values[register_chain], steps + lag, values[memory_chain], *(vcpu,) * 8)
    found = (regs[1], ram_count, ram_chain, *regs[8:16])
    names = ("rbx", "count in RAM", "chain in RAM", *(f"r{n}" for n in range(8, 16)))
    wrong = [f"{name} {f:#x}, expected {w:#x}" for name, w, f in zip(names, wanted, found, strict=True) if w != f]
    return Counter(steps, f"vCPU {vcpu} at step {steps}: {wrong[0]}" if wrong else "")
