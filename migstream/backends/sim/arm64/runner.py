"""The thread that runs a simulated arm64 VM's vCPUs, one after the other, a few instructions each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.cpu import Cpu, Step, Translation
from migstream.backends.sim.arm64.entering import through_cpu
from migstream.backends.sim.arm64.eyes import Eyes
from migstream.backends.sim.mmu import Exit
from migstream.backends.sim.turns import Turns
from migstream.errors import UsageError

if TYPE_CHECKING:
    from migstream.backends.base import GuestMemory
    from migstream.backends.sim.arm64.guest import Guest

_RUNNABLE = 0
_EL1H, _MODE = 0b00101, 0x1F


class Runner(Turns):
    """Runs the vCPUs of a guest from `start()` to `pause()`; its registers are in the columns before and after."""

    def __init__(self, guest: Guest, memory: GuestMemory, only: tuple[int, ...] | None = None) -> None:
        """`only`: these vCPUs, where not all run."""
        super().__init__()
        self._guest, self._only = guest, only
        self._cpus = self._load(memory)

    def start(self) -> None:
        """Let the vCPUs run."""
        self._guest.ran[list(self._cpus)] = True
        self._thread.start()

    def until_exit(self, instructions: int) -> str:
        """Run the one vCPU here and now; the kernel's name of what stopped it."""
        ((k, cpu),) = self._cpus.items()
        try:
            cpu.run(instructions)
        except Exit as stopped:
            self._store()
            return stopped.reason
        raise UsageError(f"nothing stopped vCPU {k} within {instructions} instructions")

    def _loaded(self) -> dict[int, Cpu]:
        return self._cpus

    def _load(self, memory: GuestMemory) -> dict[int, Cpu]:
        """The vCPUs that may run. One that is not at EL1 with its own stack is beyond this interpreter."""
        columns = {id: self._guest.column(id)[:, 0].tolist()
                   for id in (*ids.X, ids.SP_EL1, ids.PC, ids.PSTATE, ids.SCTLR, ids.TCR, ids.TTBR0, ids.MP_STATE)}
        decoded: dict[int, Step] = {}
        spaces: dict[tuple[bool, int, int], Translation] = {}
        cpus = {}
        runnable = np.flatnonzero(np.array(columns[ids.MP_STATE]) == _RUNNABLE).tolist()
        for k in runnable if self._only is None else self._only:
            space = bool(columns[ids.SCTLR][k] & 1), columns[ids.TCR][k], columns[ids.TTBR0][k]
            translation = spaces.setdefault(space, Translation(memory, *space))
            cpus[k] = Cpu([columns[id][k] for id in ids.X], columns[ids.SP_EL1][k], columns[ids.PC][k],
                          columns[ids.PSTATE][k], translation, decoded, Eyes(self._guest, k))
            if columns[ids.PSTATE][k] & _MODE != _EL1H:
                self.exits[k] = "KVM_EXIT_INTERNAL_ERROR"
        return cpus

    def _stopped(self, k: int, reason: str) -> None:
        """One that waits for an interrupt waits in the kernel, and is no exit."""
        if reason != "WFI":
            self.exits[k] = reason

    def _store(self) -> None:
        chosen = np.array(sorted(self._cpus), np.intp)
        for number, id in enumerate(ids.X):
            self._guest.column(id)[chosen, 0] = [self._cpus[k].x[number] for k in chosen.tolist()]
        for id, name in ((ids.PC, "pc"), (ids.SP_EL1, "sp"), (ids.PSTATE, "pstate")):
            self._guest.column(id)[chosen, 0] = [getattr(self._cpus[k], name) for k in chosen.tolist()]
        if len(chosen):
            through_cpu(self._guest, chosen, inside=True)
        self._cpus = {}
