"""arm64: a guest program that asks its firmware by HVC and reads its ID registers, and hands the answers to the host.

The program is straight code. Answers gather in X4 to X28, which no call changes (SMCCC keeps X4 to X17, KVM the rest);
when these are full it stores to an address without memory: KVM_RUN ends with KVM_EXIT_MMIO, the host reads the
registers, and the next KVM_RUN goes on behind the store. At its end it begins again. Nothing goes through guest RAM,
so caches don't matter and the MMU may be off.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from migstream.errors import BackendError
from migstream.host.scratch import Host, Scratch, ScratchVm, scratch_vm
from migstream.registers import arm64_ids
from migstream.registers.firmware_arm64 import CALLS, Call

ADDRESS = 0x4000
"""Where the program is in a scratch VM, whose RAM begins at 0."""

NO_RAM = 0x0900_0000
"""Neither in a scratch VM's RAM nor in that of the demo's board."""

_FIRST, _LAST = 4, 28
_BASE = 29
_EL1H_MASKED = 0x3C5
_NOP, _HVC = 0xD503_201F, 0xD400_0002
_PC, _PSTATE = arm64_ids.core(64), arm64_ids.core(66)
_LIMIT_S = 30
_MMIO = "KVM_EXIT_MMIO"


class RunningVm(ScratchVm, Protocol):
    """A VM whose vCPUs can be let run until they stop by themselves; see `migstream.backends.base.Vm`."""

    def exits(self) -> dict[int, str]:
        """vCPUs that stopped by themselves, with the reason."""


@dataclass(frozen=True, slots=True)
class SystemRegister:
    """A question: MRS of a system register, by KVM's id."""

    name: str
    key: int

    def answer(self, value: int) -> int:
        """What is kept of it: all."""
        return value


Question = Call | SystemRegister


def _id_registers() -> Iterator[SystemRegister]:
    """What is read-only at EL1 and tells of the CPU: the ID space, and its implementation."""
    from migstream.registers.catalogue import lookup

    ids = [arm64_ids.sysreg(3, 0, 0, crm, op2) for crm in range(1, 8) for op2 in range(8)]
    ids += [arm64_ids.sysreg(*encoding) for encoding in (
        (3, 0, 0, 0, 0), (3, 0, 0, 0, 5), (3, 0, 0, 0, 6), (3, 1, 0, 0, 1), (3, 1, 0, 0, 7), (3, 3, 0, 0, 1))]
    yield from (SystemRegister(lookup(id).name, id) for id in ids)
    yield SystemRegister("DCZID_EL0", arm64_ids.sysreg(3, 3, 0, 0, 7))
    yield SystemRegister("CNTFRQ_EL0", arm64_ids.sysreg(3, 3, 14, 0, 0))


def questions() -> tuple[Question, ...]:
    """All that can be asked: firmware calls, then registers. Names and keys are unique."""
    return (*CALLS, *_id_registers())


def program(asked: Sequence[Question]) -> bytes:
    """Return the machine code; it can be put at any address that is a multiple of 4."""
    code = [_NOP]  # an MMIO exit's PC is only moved by the next KVM_RUN, which then begins behind this one
    for batch in _batches(asked):
        for place, question in enumerate(batch, _FIRST):
            code += _ask(question, place)
        code += [*_load(_BASE, NO_RAM), 0xF900_0000 | _BASE << 5]
    code.append(0x1400_0000 | -len(code) & 0x3FF_FFFF)
    return struct.pack(f"<{len(code)}I", *code)


def _batches(asked: Sequence[Question]) -> list[Sequence[Question]]:
    size = _LAST - _FIRST + 1
    return [asked[start:start + size] for start in range(0, len(asked), size)]


def _ask(question: Question, place: int) -> list[int]:
    if isinstance(question, SystemRegister):
        return [0xD530_0000 | (question.key & 0xFFFF) - 0x8000 << 5 | place]
    call = [*_load(0, question.function), *_load(1, question.argument), *_load(2, 0), *_load(3, 0), _HVC]
    return [*call, 0xAA00_03E0 | place]


def _load(register: int, value: int) -> list[int]:
    """MOVZ, MOVK: 32 bits."""
    return [0xD280_0000 | (value & 0xFFFF) << 5 | register, 0xF2A0_0000 | (value >> 16) << 5 | register]


def look(vm: RunningVm, asked: Sequence[Question], address: int, vcpus: int = 1) -> list[dict[int, int]]:
    """Let each vCPU of a paused VM run the program once, from its beginning, and return its answers by key.

    Args:
        vm: has `program(asked)` in its RAM, and no vCPU that does anything else. The program reads and changes X0 to
            X29, PC and PSTATE, and nothing else.
        address: guest-physical, where the program is; the MMU is off, or maps it and `NO_RAM` to themselves.

    Raises: BackendError where a vCPU does not answer.
    """
    scratch = Scratch(vm, vcpus)
    for vcpu in range(vcpus):
        for id, value in ((_PC, address), (_PSTATE, _EL1H_MASKED)):
            if errno := scratch.write(id, struct.pack("<Q", value), vcpu):
                raise BackendError("KVM_SET_ONE_REG", errno=errno, register="PC or PSTATE", vcpu=vcpu)
    answers: list[dict[int, int]] = [{} for _ in range(vcpus)]
    for batch in _batches(asked):
        _until_exit(vm, vcpus)
        for vcpu in range(vcpus):
            answers[vcpu] |= {q.key: q.answer(_x(scratch, place, vcpu)) for place, q in enumerate(batch, _FIRST)}
    return answers


def _x(scratch: Scratch, number: int, vcpu: int) -> int:
    value = scratch.read(arm64_ids.core(2 * number), 8, vcpu)
    if isinstance(value, int):
        raise BackendError("KVM_GET_ONE_REG", errno=value, register=f"X{number}", vcpu=vcpu)
    return int.from_bytes(value, "little")


def _until_exit(vm: RunningVm, vcpus: int) -> None:
    deadline = time.monotonic() + _LIMIT_S
    vm.start()
    while len(vm.exits()) < vcpus and time.monotonic() < deadline:
        time.sleep(0.0002)
    vm.pause()
    stopped = vm.exits()
    for vcpu in range(vcpus):
        if stopped.get(vcpu) != _MMIO:
            raise BackendError("KVM_RUN", vcpu=vcpu, what=f"a guest that asks its firmware: "
                               f"{stopped.get(vcpu, f'no answer in {_LIMIT_S} s')}; expected {_MMIO}")


class MemoryOf(Protocol):
    """Guest RAM; see `migstream.backends.base.GuestMemory`."""

    def view(self, guest_address: int, length: int) -> memoryview:
        """Writable memory."""


def install(memory: MemoryOf, asked: Sequence[Question], address: int) -> None:
    """Put the program into guest RAM."""
    code = program(asked)
    memory.view(address, len(code))[:] = code


def ask(host: Host, asked: Sequence[Question] = ()) -> Mapping[int, int]:
    """Return a host's answers to a guest of a scratch VM with nothing set, by key. Raises: BackendError, UsageError.

    Args:
        asked: all that can be asked where nothing is given.
    """
    every = asked or questions()
    with scratch_vm(host) as scratch:
        vm = scratch.vm
        install(vm.memory, every, ADDRESS)  # type: ignore[attr-defined]  # a scratch VM has RAM
        return look(vm, every, ADDRESS)[0]  # type: ignore[arg-type]  # and stops by itself
