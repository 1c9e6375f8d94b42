"""The guest's own eyes, arm64: a guest that asks its firmware by HVC and reads its ID registers, wherever it is.

    machine = eyes.machine()                 # a VM for it; vCPU features as a mask
    eyes.install(vm)                         # after vm.create_vcpus(), before the first save; puts nothing on vCPUs
    before = eyes.look(vm)                   # runs, and leaves the VM paused: now save it, restore it anywhere
    after = eyes.look(restored)              # by name: {"PSCI_VERSION": 0x10001, "ID_AA64PFR0_EL1": ...}
    eyes.differences(before, after)          # [] where the guest can't tell; else a line each

The code is in guest RAM, so it travels in the stream; what the guest has seen can, too, as opaque state (`SEEN`).
In a lab guest, each prints one JSON object and ends with 10 where the guest could tell something apart:

    python -m tests.eyes_arm64 [--features LIST]          what a guest of this kernel sees
    python -m tests.eyes_arm64 --contract FILE            started under a contract: what it sees otherwise
    python -m tests.eyes_arm64 --save FILE                saves the guest that has looked
    python -m tests.eyes_arm64 --restore FILE             restores it, lets it look again and compares
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from migstream.backends import open_backend
from migstream.backends.base import Backend, Vm
from migstream.contract import Contract, from_json
from migstream.host import firmware_arm64
from migstream.host.scratch import Scratch
from migstream.model import Arch, HostSummary, Machine, MemoryRegion, OpaqueState
from migstream.registers import firmware_arm64 as firmware_arm64_calls
from migstream.registers import gic, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.transport import apply_contract, capture_prologue, restore, save

RAM = 0x4000_0000
CODE = RAM + 0x4000
PMU_PPI = 23
QUESTIONS = firmware_arm64.questions()
NAMES = {question.key: question.name for question in QUESTIONS}
_BOARD = {"gic_distributor": 0x0800_0000, "gic_redistributors": 0x1000_0000, "gic_irqs": 96}


def machine(features: int = vcpu_features.DEFAULT, vcpus: int = 1) -> Machine:
    """A machine for the guest: 1 MiB of RAM and a GICv3 (a PMU needs one)."""
    return Machine(Arch.ARM64, vcpus, (MemoryRegion(RAM, 1 << 20),), {**_BOARD, "vcpu_features": features})


def install(vm: Vm) -> None:
    """Put the program into RAM, and give a PMU its interrupt, without which its vCPU does not run."""
    firmware_arm64.install(vm.memory, QUESTIONS, CODE)
    features = int(vm.machine.devices.get("vcpu_features", 0))
    vm.layouts()  # closes the set of registers: SVE
    if features & vcpu_features.PMU_V3:
        for vcpu in range(vm.machine.vcpus):
            assert Scratch(vm).write(gic.PMU_IRQ.id, PMU_PPI.to_bytes(4, "little"), vcpu) == 0


def look(vm: Vm) -> dict[str, int]:
    """What vCPU 0 sees, by name; the VM is paused before and after, its PC and X0 to X29 are changed.

    Raises: BackendError where a vCPU does not answer; AssertionError where another vCPU sees another thing (MPIDR_EL1
    apart).
    """
    found = firmware_arm64.look(vm, QUESTIONS, CODE, vm.machine.vcpus)
    named = [{NAMES[key]: answer for key, answer in one.items()} for one in found]
    for other in named[1:]:
        assert {**other, "MPIDR_EL1": named[0]["MPIDR_EL1"]} == named[0]
    return named[0]


def differences(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What the guest can tell apart, a line each."""
    return [f"{name}: {before.get(name, -1):#x} before, {after.get(name, -1):#x} after"
            for name in {**before, **after} if before.get(name) != after.get(name)]


def contradictions(contract: Contract, seen: Mapping[str, int]) -> list[str]:
    """What a guest sees otherwise than its contract says: ID registers by MRS, firmware registers by their calls."""
    wrong = []
    for id, value in contract.registers.items():
        wanted, mask = int.from_bytes(value, "little"), ~contract.free.get(id, 0)
        row = _ABSENT.get(id)
        found = row.value(*(seen[call.name] for call in row.asked)) if row else seen.get(lookup(id).name, wanted)
        if (wanted ^ found) & mask:
            wrong.append(f"{lookup(id).name}: {wanted:#x} in the contract, the guest sees {found:#x}")
    return wrong


_ABSENT = {row.register: row for row in firmware_arm64_calls.ABSENT}
SEEN = "tests.eyes_arm64"
"""Name of the opaque state that carries what the guest had seen."""


def save_seen(vm: Vm, path: str, host: HostSummary) -> dict[str, int]:
    """Look, then save the VM with what was seen."""
    seen = look(vm)
    with open(path, "wb") as out:
        save(vm, out, host=host, pause=vm.pause, prologue=capture_prologue(vm),
             opaque=[OpaqueState(SEEN, json.dumps(seen).encode())])
    return seen


def restore_and_look(path: str, backend: Backend) -> tuple[dict[str, int], dict[str, int]]:
    """Restore what `save_seen` saved: what the guest had seen, and what it sees now."""
    with open(path, "rb") as source:
        vm, report = restore(source, backend)
    with vm:
        return json.loads(next(state.data for state in report.opaque if state.name == SEEN)), look(vm)


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this module."""
    parser = argparse.ArgumentParser(prog="python -m tests.eyes_arm64")
    parser.add_argument("--features", type=vcpu_features.parse, default=vcpu_features.DEFAULT)
    for name in ("--contract", "--save", "--restore"):
        parser.add_argument(name, metavar="FILE")
    options = parser.parse_args(argv)
    backend = open_backend("kvm")
    wrong: list[str] = []
    if options.restore:
        before, seen = restore_and_look(options.restore, backend)
        wrong = differences(before, seen)
    else:
        contract = from_json(Path(options.contract).read_text(), options.contract) if options.contract else None
        with backend.create(machine(contract.vcpu_features if contract else options.features)) as vm:
            vm.create_vcpus()
            if contract:
                apply_contract(vm, contract)
            install(vm)
            seen = save_seen(vm, options.save, backend.summary()) if options.save else look(vm)
        wrong = contradictions(contract, seen) if contract else []
    document = {"kernel": backend.profile().kernel, "wrong": wrong,
                "sees": {name: f"{value:#x}" for name, value in seen.items()}}
    json.dump(document, sys.stdout, indent=1)
    print()
    return 10 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
