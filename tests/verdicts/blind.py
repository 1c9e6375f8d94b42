"""What a kernel itself says to each register of a stream: written one by one in the stream's order, without a plan."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from migstream.backends.base import Backend, Vm
from migstream.errors import MigstreamError
from migstream.model import Bank, Layout, Machine, Phase, Scope
from migstream.reader import StreamReader
from migstream.sections import EncodedBank
from migstream.transport import read_items

NOT_TRIED = -2
"""In place of an errno: the backend can't even try."""

Rows = list[list[Any]]
"""[id in hexadecimal, vCPU or None, errno of the write, what was read back]: "" where it reads as it was written."""


def load(path: str) -> tuple[StreamReader, list[Bank]]:
    """A stream and all its banks but updates."""
    reader = StreamReader()
    with open(path, "rb") as source:
        banks = [item.decode() for _, item in read_items(source, reader) if isinstance(item, EncodedBank)]
    return reader, [bank for bank in banks if not bank.update]


def answers(backend: Backend, machine: Machine, banks: Sequence[Bank], only: Container[int] | None = None) -> Rows:
    """The kernel's answers. Raises: MigstreamError where it can't even make the VM.

    Args:
        only: registers to be written after the prologue; all where it isn't given.
    """
    alone = [one for bank in banks for one in _alone(bank)
             if only is None or bank.layout.phase.prologue or one.layout.slots[0].id in only]
    with backend.create(machine) as vm:
        written = [row for one in alone for row in _write(vm, one)]
        found = {key: value for one in alone for key, value in _read(vm, one)}
    return [[f"{id:#x}", vcpu, errno, found.get((id, vcpu), "")] for id, vcpu, errno in written]


def _alone(bank: Bank) -> Iterator[Bank]:
    """A bank of each column, so that nothing that one register does to a call touches another."""
    offsets = bank.layout.offsets
    for column, slot in enumerate(bank.layout.slots):
        layout = Layout(bank.layout.scope, bank.layout.phase, (slot,))
        yield Bank(layout, bank.first_vcpu, bank.values[:, offsets[column]:offsets[column + 1]].copy())


def _write(vm: Vm, one: Bank) -> Iterator[tuple[int, int | None, int]]:
    if (one.layout.scope, one.layout.phase) != (Scope.VM, Phase.CREATE):
        vm.create_vcpus()
    try:
        refused = {no.vcpu: no.errno for no in vm.write(one.layout, one.first_vcpu, one.values)}
    except MigstreamError:
        refused = dict.fromkeys(_vcpus(one), NOT_TRIED)
    yield from ((one.layout.slots[0].id, vcpu, refused.get(vcpu, 0)) for vcpu in _vcpus(one))


def _vcpus(bank: Bank) -> list[int | None]:
    return [None] if bank.layout.scope == Scope.VM else [bank.first_vcpu + row for row in range(bank.rows)]


def _read(vm: Vm, one: Bank) -> Iterator[tuple[tuple[int, int | None], str]]:
    """By register and vCPU: "", or the value in hexadecimal, or the errno of the read."""
    values = one.values.copy()
    values[:] = 0
    try:
        refused = {no.vcpu: no.errno for no in vm.read(one.layout, one.first_vcpu, values)}
    except MigstreamError:
        refused = dict.fromkeys(_vcpus(one), NOT_TRIED)
    for row, vcpu in enumerate(_vcpus(one)):
        same = (values[row] == one.values[row]).all()
        found = f"errno {refused[vcpu]}" if vcpu in refused else "" if same else values[row].tobytes().hex()
        yield (one.layout.slots[0].id, vcpu), found
