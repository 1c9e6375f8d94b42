"""The thread that runs a simulated VM's vCPUs, one after the other, a few instructions each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.base import GuestMemory
from migstream.backends.sim import rules_cpu
from migstream.backends.sim.cpu_x86_64 import CodeCache, Cpu
from migstream.backends.sim.guest import Rows
from migstream.backends.sim.mmu import Mmu
from migstream.backends.sim.turns import Turns

if TYPE_CHECKING:
    from migstream.backends.sim.guest import Guest

_RUNNABLE, _HALTED = 0, 3
_LMA, _CS_LONG, _CS_DPL = 1 << 10, 1 << 24, 0xFF
_ENCODING = (0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)
"""Number in machine code of each register of struct kvm_regs, in its order: RAX, RBX, RCX, RDX, RSI, RDI, RSP, …"""


class Runner(Turns):
    """Runs the vCPUs of a guest from `start()` to `pause()`; its registers are in the columns before and after."""

    def __init__(self, guest: Guest, memory: GuestMemory) -> None:
        super().__init__()
        self._guest = guest
        self._cpus = self._load(memory)

    def start(self) -> None:
        """Let the vCPUs run."""
        self._guest.ran[[k for k in self._cpus if self.exits.get(k) != "KVM_EXIT_SHUTDOWN"]] = True
        self._guest.clock.master = True
        self._thread.start()

    def _loaded(self) -> dict[int, Cpu]:
        return self._cpus

    def _load(self, memory: GuestMemory) -> dict[int, Cpu]:
        """The vCPUs that may run. A vCPU outside of 64-bit mode in ring 0 is beyond this interpreter."""
        rows = Rows.span(self._guest, 0, self._guest.vcpus)
        states = rules_cpu.accept_sipi(rows, rows.get(rules_cpu.MP_STATE))[:, 0]
        rules_cpu.enter(rows)
        faults = rules_cpu.take_triple_faults(rows.where(states == _RUNNABLE))
        self.exits.update(dict.fromkeys(np.flatnonzero(states == _RUNNABLE)[faults].tolist(), "KVM_EXIT_SHUTDOWN"))
        regs, sregs = rows.get(rules_cpu.REGS), rows.get(rules_cpu.SREGS2)
        spaces: dict[int, CodeCache] = {}
        cpus = {}
        for k in np.flatnonzero(states == _RUNNABLE).tolist():
            words = sregs[k].tolist()
            cpus[k] = _cpu(regs[k].tolist(), words, memory, spaces.setdefault(words[rules_cpu.CR3], CodeCache()))
            if k in self.exits:
                continue
            if not words[rules_cpu.EFER] & _LMA or not words[2] & _CS_LONG or words[2] & _CS_DPL:
                self.exits[k] = "KVM_EXIT_INTERNAL_ERROR"
        return cpus

    def _stopped(self, k: int, reason: str) -> None:
        """With an interrupt chip in the kernel, a vCPU that halts waits there and is no exit."""
        if reason == "KVM_EXIT_HLT" and self._guest.has("irqchip"):
            self._guest.column(rules_cpu.MP_STATE)[k] = _HALTED
        else:
            self.exits[k] = reason

    def _store(self) -> None:
        regs = self._guest.column(rules_cpu.REGS)
        for k, cpu in self._cpus.items():
            regs[k, :16] = [cpu.registers[number] for number in _ENCODING]
            regs[k, rules_cpu.RIP], regs[k, rules_cpu.RFLAGS] = cpu.rip, cpu.rflags
        self._cpus = {}


def _cpu(regs: list[int], sregs: list[int], memory: GuestMemory, code: CodeCache) -> Cpu:
    registers = [0] * 16
    for place, number in enumerate(_ENCODING):
        registers[number] = regs[place]
    mmu = Mmu(memory, sregs[rules_cpu.CR0], sregs[rules_cpu.CR3])
    return Cpu(registers, regs[rules_cpu.RIP], regs[rules_cpu.RFLAGS], mmu, code)
