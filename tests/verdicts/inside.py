"""The part that runs inside a lab guest: saves a running guest, or restores streams blindly and tells every answer.

    python3 -m tests.verdicts.inside save            writes FEATURES.mig for each set of vCPU features
    python3 -m tests.verdicts.inside restore FILE…   writes answers.json

*Blindly* is register by register as the stream has it, without a plan: what the kernel itself says to each. The
same boot then does what a user would do: `replay`, verdicts applied, read back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migstream.backends import open_backend
from migstream.backends.base import Backend, Vm
from migstream.demo import run
from migstream.errors import MigstreamError
from migstream.model import Arch, Bank, Layout, Phase, Scope
from migstream.reader import StreamReader
from migstream.registers import vcpu_features
from migstream.sections import EncodedBank
from migstream.transport import read_items, restore

VCPUS, MEMORY = 2, 4 << 20
FEATURES = {Arch.ARM64: {"plain": 0, "all": vcpu_features.parse("sve,pmu_v3,ptrauth")}, Arch.X86_64: {"plain": 0}}
"""vCPU features of the saved machines, by the name of the set."""


def save() -> None:
    """Save a guest mid-run, once for each set of features that the host has."""
    backend = open_backend("kvm")
    for name, features in FEATURES[backend.arch].items():
        with open(f"{name}.mig", "wb") as out:
            run.run_and_save(backend, run.machine(backend.arch, VCPUS, MEMORY, features), out, steps=5)


def answers(files: list[str]) -> dict[str, Any]:
    """What this kernel says to each stream, by file name without its suffix."""
    backend = open_backend("kvm")
    return {Path(file).stem: {"blind": _blind(backend, file), "replay": _replay(backend, file)} for file in files}


def _banks(file: str) -> tuple[StreamReader, list[Bank]]:
    reader = StreamReader()
    with open(file, "rb") as source:
        banks = [item.decode() for _, item in read_items(source, reader) if isinstance(item, EncodedBank)]
    return reader, [bank for bank in banks if not bank.update]


def _blind(backend: Backend, file: str) -> dict[str, Any]:
    reader, banks = _banks(file)
    assert reader.machine is not None
    try:
        with backend.create(reader.machine) as vm:
            written = [row for bank in banks for row in _write(vm, bank)]
            found = {key: value for bank in banks for key, value in _read(vm, bank)}
    except MigstreamError as error:
        return {"failed": str(error)}
    return {"registers": [[f"{id:#x}", vcpu, errno, found.get((id, vcpu), "")] for id, vcpu, errno in written]}


def _alone(bank: Bank) -> Iterator[Bank]:
    """A bank of each column, so that nothing that one register does to a call touches another."""
    offsets = bank.layout.offsets
    for column, slot in enumerate(bank.layout.slots):
        layout = Layout(bank.layout.scope, bank.layout.phase, (slot,))
        yield Bank(layout, bank.first_vcpu, bank.values[:, offsets[column]:offsets[column + 1]].copy())


def _write(vm: Vm, bank: Bank) -> Iterator[tuple[int, int | None, int]]:
    """(register, vCPU, errno of the write) for every register of a bank; -2 for one that we can't even try."""
    if (bank.layout.scope, bank.layout.phase) != (Scope.VM, Phase.CREATE):
        vm.create_vcpus()
    for one in _alone(bank):
        id = one.layout.slots[0].id
        try:
            refused = {no.vcpu: no.errno for no in vm.write(one.layout, one.first_vcpu, one.values)}
        except MigstreamError:
            refused = dict.fromkeys(_vcpus(one), -2)
        yield from ((id, vcpu, refused.get(vcpu, 0)) for vcpu in _vcpus(one))


def _vcpus(bank: Bank) -> list[int | None]:
    return [None] if bank.layout.scope == Scope.VM else [bank.first_vcpu + row for row in range(bank.rows)]


def _read(vm: Vm, bank: Bank) -> Iterator[tuple[tuple[int, int | None], str]]:
    """"" where a register reads as it was written, else its value in hexadecimal or the errno of the read."""
    for one in _alone(bank):
        values = one.values.copy()
        values[:] = 0
        try:
            refused = {no.vcpu: no.errno for no in vm.read(one.layout, one.first_vcpu, values)}
        except MigstreamError:
            refused = dict.fromkeys(_vcpus(one), -2)
        for row, vcpu in enumerate(_vcpus(one)):
            same = (values[row] == one.values[row]).all()
            found = f"errno {refused[vcpu]}" if vcpu in refused else "" if same else values[row].tobytes().hex()
            yield (one.layout.slots[0].id, vcpu), found


def _replay(backend: Backend, file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as source:
            vm, report = restore(source, backend, readback=True)
    except MigstreamError as error:
        return {"error": type(error).__name__, "message": str(error)}
    with vm:
        return {"refused": [f"{no}: {why}" for no, why in report.refused], "readback": report.readback,
                "differs": [str(one) for one in report.differs if not one.reason],
                "ran": len(run.continue_guest(vm, report.opaque, 0.1).get("exits", {})) == 0}  # type: ignore[arg-type]  # its "exits" is a dict


def main(words: list[str]) -> int:
    """Run one verb."""
    if words[0] == "save":
        save()
    else:
        Path("answers.json").write_text(json.dumps(answers(words[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
