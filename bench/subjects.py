"""What is measured side by side in a blackout run: the library's strategies, the C programs, QEMU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench.strategies import Sample, Strategy, blackout
from migstream.backends.base import Backend, Vm

if TYPE_CHECKING:
    from bench.floor import Floor
    from bench.qemu import Qemu


class Subject(ABC):
    """Something that saves and restores a VM of N vCPUs on demand.

    Attributes:
        name: in tables and plots. most_vcpus: what it can do at most. rounds: how many it takes part in.
    """

    name: str
    most_vcpus: int = 1 << 20
    rounds: int = 1 << 30

    @abstractmethod
    def sample(self, vcpus: int) -> dict[str, Any]:
        """Measure once. Raises: MigstreamError."""


class Library(Subject):
    """The library with one strategy."""

    def __init__(self, backend: Backend, sources: Mapping[int, Vm], strategy: Strategy, threads: int) -> None:
        self.backend, self.sources, self.strategy, self.threads = backend, sources, strategy, threads
        self.host = backend.summary()
        self.name = strategy.name

    def sample(self, vcpus: int) -> dict[str, Any]:
        """One blackout; see `strategies.Sample`."""
        return blackout(self.backend, self.sources[vcpus], self.host, self.strategy, self.threads).document()


def c_name(mode: str, threads: int) -> str:
    """What `floor.c` in a mode is called in tables."""
    return f"C {mode}" + (f", {threads} threads" if threads > 1 else "")


class CProgram(Subject):
    """`floor.c` in one mode."""

    def __init__(self, floor: Floor, mode: str, threads: int) -> None:
        self.floor, self.mode, self.threads = floor, mode, threads
        self.name = c_name(mode, threads)

    def sample(self, vcpus: int) -> dict[str, Any]:
        """Its own two times; it has neither stream nor phases."""
        save, load = self.floor.round(vcpus, self.mode, self.threads)
        return Sample(total=save + load, save=save, load=load).document()


class Peer(Subject):
    """QEMU, by its own events."""

    name = "QEMU"

    def __init__(self, qemu: Qemu, rounds: int) -> None:
        self.qemu, self.rounds, self.most_vcpus = qemu, rounds, qemu.most_vcpus

    def sample(self, vcpus: int) -> dict[str, Any]:
        """Device-state save, load, and the stream's length without RAM."""
        moved = self.qemu.move(vcpus)
        return Sample(total=moved.save + moved.load, save=moved.save, load=moved.load, bytes=moved.bytes).document()
