"""A guest that ends: 64-bit code that counts, stores what it counted, and stops at an address without RAM.

    step:  imul rbx, rcx         a chain of values
           add  rbx, rdx
           inc  rax
           mov  [rdi], rax       count in RAM
           mov  [rdi+8], rbx     chain in RAM
           cmp  rax, rbp
           jne  step
           mov  [rsi], rax       no RAM there: KVM_EXIT_MMIO
           jmp  step

Its tables and code lie where a stray paravirtual area (a power of two, most often) does not reach; they are written
anew before each run.
"""

from __future__ import annotations

import struct

import numpy as np

from migstream.backends.base import Refusal, Vm
from migstream.demo.guest_x86_64 import INCREMENT, MULTIPLIER, NO_RAM, seed
from migstream.model import PAGE, Layout, Slot
from migstream.registers import x86_64
from migstream.registers.catalogue import lookup
from migstream.wire import structs

PML4, PDPT, PD, GDT, CODE, CELLS = 0x35000, 0x36000, 0x37000, 0x3B000, 0x3D000, 0x3E000
CELL = 64
PROGRAM = bytes.fromhex("480fafd9 4801d3 48ffc0 488907 48895f08 4839e8 75ea 488906 ebe5")
_RESET = {"cr0": 0x80010033, "cr2": 0, "cr3": PML4, "cr4": 0x20, "cr8": 0, "efer": 0x500}


def install(vm: Vm, steps: int) -> list[Refusal]:
    """Put the guest on all vCPUs; what the kernel refused of it, in which case it can't run."""
    _load(vm)
    count = vm.machine.vcpus
    sregs = _read(vm, x86_64.SREGS.id, 312)
    events = bytearray(64)
    struct.pack_into("<I", events, 20, 0xD)  # NMI, shadow and SMM parts are meant: all of them off
    refused = _write(vm, x86_64.SREGS.id, [_long_mode(value) for value in sregs])
    refused += _write(vm, x86_64.REGS.id, [_registers(k, steps) for k in range(count)])
    refused += _write(vm, x86_64.XSAVE.id, [_vectors(k) for k in range(count)])
    refused += _write(vm, x86_64.DEBUGREGS.id, [_DEBUGREGS] * count)
    refused += _write(vm, x86_64.VCPU_EVENTS.id, [bytes(events)] * count)
    return refused + _write(vm, x86_64.MP_STATE.id, [bytes(4)] * count)


_DEBUGREGS = struct.pack("<16Q", 0, 0, 0, 0, 0xFFFF0FF0, 0x400, *(0,) * 10)


def _vectors(vcpu: int) -> bytes:
    """An XSAVE area with something in every register, so that the CPU counts both components as in use."""
    area = bytearray(4096)
    struct.pack_into("<HHI", area, 0, 0x37F, 0, 0)
    struct.pack_into("<I", area, 24, 0x1F80)
    struct.pack_into("<16Q", area, 32, *(1 << 63 | vcpu + 1, 0x3FFF) * 8)
    struct.pack_into("<32Q", area, 160, *range(vcpu + 1, vcpu + 33))
    struct.pack_into("<Q", area, 512, 0x3)
    return bytes(area)


def results(vm: Vm) -> list[list[str]]:
    """Of each vCPU: general registers but RIP, and the cell in RAM. RIP is made the same again."""
    regs = _read(vm, x86_64.REGS.id, 144)
    _write(vm, x86_64.REGS.id, [value[:128] + struct.pack("<QQ", CODE, 2) for value in regs])
    cells = [bytes(vm.memory.view(CELLS + CELL * k, 16)) for k in range(vm.machine.vcpus)]
    return [[f"{word:#x}" for word in (*struct.unpack("<16Q", value[:128]), *struct.unpack("<QQ", cell))]
            for value, cell in zip(regs, cells, strict=True)]


def _load(vm: Vm) -> None:
    writable, large = 0x3, 0x80
    tables = {PML4: [PDPT | writable], PDPT: [(PD + PAGE * k) | writable for k in range(4)]}
    tables |= {PD + PAGE * k: [(k << 30 | n << 21) | writable | large for n in range(512)] for k in range(4)}
    tables[GDT] = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF]
    for address, entries in tables.items():
        vm.memory.view(address, 8 * len(entries))[:] = struct.pack(f"<{len(entries)}Q", *entries)
    vm.memory.view(CODE, len(PROGRAM))[:] = PROGRAM


def _long_mode(old: bytes) -> bytes:
    fields = structs.parse("kvm_sregs", old)
    code = {"base": 0, "limit": 0xFFFFFFFF, "selector": 8, "type": 11, "present": 1, "dpl": 0, "db": 0, "s": 1, "l": 1,
            "g": 1, "avl": 0, "unusable": 0, "padding": 0}
    data = {**code, "selector": 16, "type": 3, "db": 1, "l": 0}
    task = {**code, "selector": 0, "type": 11, "l": 0, "s": 0, "g": 0, "limit": 0xFFFF}
    fields.update({"cs": code, **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data), "tr": task})
    fields["gdt"] = {"base": GDT, "limit": 23, "padding": [0, 0, 0]}
    fields["idt"] = {"base": 0, "limit": 0, "padding": [0, 0, 0]}
    fields.update(_RESET)
    out = structs.build("kvm_sregs", fields)
    return out[:280] + bytes(32)


def _registers(vcpu: int, steps: int) -> bytes:
    rest = (*(vcpu,) * 8, CODE, 2)
    return struct.pack("<18Q", 0, seed(vcpu), MULTIPLIER, INCREMENT, NO_RAM, CELLS + CELL * vcpu, CODE, steps, *rest)


def _at(id: int, size: int) -> Layout:
    row = lookup(id)
    return Layout(row.scope, row.phase, (Slot(id, size),))


def _write(vm: Vm, id: int, values: list[bytes]) -> list[Refusal]:
    at = _at(id, len(values[0]))
    packed = b"".join(value.ljust(at.row_words * 8, b"\0") for value in values)
    return vm.write(at, 0, np.frombuffer(packed, np.uint64).reshape(len(values), -1).copy())


def _read(vm: Vm, id: int, size: int) -> list[bytes]:
    at = _at(id, size)
    matrix = np.zeros((vm.machine.vcpus, at.row_words), np.uint64)
    vm.read(at, 0, matrix)
    return [row.tobytes()[:size] for row in matrix]
