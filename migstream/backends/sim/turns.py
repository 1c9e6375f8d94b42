"""The thread that runs a simulated VM's vCPUs, a few instructions of each in turn, and the VM that has such a thread:
what both architectures share."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from migstream.backends.base import GuestMemory, Vm
from migstream.backends.sim.memory import Memory
from migstream.backends.sim.mmu import Exit
from migstream.errors import UsageError
from migstream.model import Scope

if TYPE_CHECKING:
    from migstream.model import Layout, Machine, Words

SLICE = 200
"""Instructions of one vCPU before the next has its turn; a pause waits for at most one slice."""


class Runs(Protocol):
    """An interpreter of one vCPU."""

    def run(self, count: int) -> None:
        """Run so many instructions. Raises: Exit."""


class Turns(ABC):
    """Runs vCPUs in turn on a thread; a subclass loads their registers before, and stores them after.

    Attributes:
        exits: vCPUs that stopped by themselves, with the kernel's name of the reason.
    """

    def __init__(self) -> None:
        self.exits: dict[int, str] = {}
        self._stop = False  # no Event: a set() that Ctrl-C interrupts may keep its lock
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="migstream-sim", daemon=True)

    @abstractmethod
    def _loaded(self) -> Mapping[int, Runs]:
        """The vCPUs that may run, by number; those in `exits` have stopped already."""

    @abstractmethod
    def _stopped(self, k: int, reason: str) -> None:
        """Note why a vCPU stopped: in `exits`, unless it waits in the kernel."""

    @abstractmethod
    def _store(self) -> None:
        """Put the registers back."""

    def pause(self) -> None:
        """Stop between two instructions and put the registers back. Raises: what went wrong in the thread."""
        self._stop = True
        self._thread.join()
        self._store()
        if self._error:
            raise self._error

    def _run(self) -> None:
        running = {k: cpu for k, cpu in self._loaded().items() if k not in self.exits}
        try:
            while running and not self._stop:
                for k, cpu in tuple(running.items()):
                    if self._stop or self._turn(k, cpu):
                        running.pop(k)
        except BaseException as error:
            self._error = error

    def _turn(self, k: int, cpu: Runs) -> bool:
        """Run a vCPU for a slice; True where it has stopped."""
        try:
            cpu.run(SLICE)
        except Exit as stopped:
            self._stopped(k, stopped.reason)
            return True
        return False


class TurnsVm(Vm):
    """A VM whose vCPUs take turns; a subclass's `start()` makes the runner. It owns its guest memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory = GuestMemory([])
        self._ram = Memory()
        self._runner: Turns | None = None
        self._exits: dict[int, str] = {}

    def pause(self) -> None:
        """See `Vm.pause`."""
        runner, self._runner = self._runner, None
        if runner:
            runner.pause()
            self._exits = dict(runner.exits)

    def exits(self) -> dict[int, str]:
        """See `Vm.exits`."""
        return dict(self._runner.exits if self._runner else self._exits)

    def close(self) -> None:
        """See `Vm.close`."""
        self.closed = True
        self.pause()
        self.memory.release()
        self._ram.close()

    def _check_still(self) -> None:
        """Raises: UsageError while the vCPUs run, and on a closed VM."""
        self._check_open()
        if self._runner:
            raise UsageError("the vCPUs run already")

    def _check_bank(self, layout: Layout, first: int, values: Words, vcpus: int) -> None:
        """Raises: UsageError where rows from `first` on can't be read or written now, on a VM of so many vCPUs."""
        self._check_open()
        if self._runner:
            raise UsageError("registers can be read and written while the vCPUs stand still: pause() first")
        if not values.flags.c_contiguous or values.shape[1] != layout.row_words:
            raise UsageError("a bank is a C-contiguous matrix of its layout's width")
        if first + len(values) > (1 if layout.scope == Scope.VM else vcpus):
            raise UsageError(f"rows {first} to {first + len(values)} of {layout.title}: the VM has fewer")
