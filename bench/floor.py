"""`bench/floor.c` beside the library: the same registers, their values from the same saved guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bench.program import Talk, build
from migstream.backends.base import Vm
from migstream.model import Arch, Bank, Layout, Phase, Scope
from migstream.registers import ids
from migstream.registers.catalogue import lookup
from migstream.transport import capture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODES = ("plain", "best")


def columns(layout: Layout) -> Iterator[tuple[str, int, int, list[int]]]:
    """What `floor.c` does for a layout: (name, first word, bytes, MSR indices); neighbouring MSRs are one ioctl."""
    run: list[tuple[int, int]] = []
    for slot, word in zip(layout.slots, layout.offsets, strict=False):
        index = ids.msr_index(slot.id)
        if index is not None:
            run.append((index, word))
            continue
        if run:
            yield _msrs(run)
            run = []
        yield lookup(slot.id).name, word, slot.size, []
    if run:
        yield _msrs(run)


def _msrs(run: list[tuple[int, int]]) -> tuple[str, int, int, list[int]]:
    return "MSRS", run[0][1], 8 * len(run), [index for index, _ in run]


def write_work(vm: Vm, file: BinaryIO) -> None:
    """Write which registers `floor.c` reads and writes, and their values as they are now; the vCPUs stand still.

    Capabilities that a VM was made with are left out: the program enables the demo's one itself. Raises: BackendError.
    """
    layouts = [layout for layout in vm.layouts()[0] if (layout.scope, layout.phase) != (Scope.VM, Phase.CREATE)]
    places, width = _places(layouts)
    memory = sum(region.size for region in vm.machine.memory)
    file.write(f"row {width * 8} memory {memory}\n".encode())
    for layout, start in zip(layouts, places, strict=True):
        for line in _lines(layout, start):
            file.write(line.encode())
    file.write(b"values\n")
    file.write(_rows(vm, layouts, places, width).tobytes())


def _places(layouts: list[Layout]) -> tuple[list[int], int]:
    """The word at which each layout begins in its scope's row, and the longest row's width."""
    ends, places = {Scope.VM: 0, Scope.VCPU: 0}, []
    for layout in layouts:
        places.append(ends[layout.scope])
        ends[layout.scope] += layout.row_words
    return places, max(ends.values())


def _lines(layout: Layout, start: int) -> Iterator[str]:
    vm = layout.scope == Scope.VM
    through_vcpu = not vm or layout.phase == Phase.FEATURE
    for name, word, size, indices in columns(layout):
        numbers = "".join(f" {index:x}" for index in indices)
        yield f"{name} {(start + word) * 8} {size} {vm:d} {through_vcpu:d} {layout.phase.prologue:d}{numbers}\n"


def _rows(vm: Vm, layouts: list[Layout], places: list[int], width: int) -> NDArray[np.uint64]:
    import numpy as np

    rows = np.zeros((vm.machine.vcpus + 1, width), np.uint64)
    for layout, start in zip(layouts, places, strict=True):
        for bank in capture(vm, layout):
            rows[_range(bank, vm.machine.vcpus), start:start + layout.row_words] = bank.values
    return rows


def _range(bank: Bank, vcpus: int) -> slice:
    first = vcpus if bank.layout.scope == Scope.VM else bank.first_vcpu
    return slice(first, first + bank.rows)


class Floor:
    """The running C program with the source VMs that it was given. A context manager. Raises: LeftOut."""

    def __init__(self, folder: Path, arch: Arch) -> None:
        from bench.program import LeftOut

        if arch != Arch.X86_64:
            raise LeftOut(f"floor.c: it is for x86-64, this host is {arch.label}")
        self._folder, self._talk = folder, Talk(build("floor", folder))

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *details: object) -> None:
        self._talk.__exit__(None, None, None)

    def load(self, vm: Vm) -> None:
        """Give it a VM like `vm`, with its values. Raises: LeftOut, BackendError."""
        path = self._folder / f"work-{vm.machine.vcpus}"
        with path.open("wb") as file:
            write_work(vm, file)
        self._talk.ask(f"load {vm.machine.vcpus} {path}")
        path.unlink()

    def round(self, vcpus: int, mode: str, threads: int) -> tuple[int, int]:
        """Save and restore once; ns of each. Raises: LeftOut."""
        saved, restored = self._talk.ask(f"round {vcpus} {mode} {threads}").split()
        return int(saved), int(restored)

    def differing(self, vcpus: int, mode: str, threads: int) -> int:
        """Save and restore once and return how many vCPUs read back different from the library's guest."""
        return int(self._talk.ask(f"check {vcpus} {mode} {threads}"))
