"""The guest's own eyes, arm64: a guest that asks its firmware by HVC and reads its ID registers, wherever it is.

    machine = eyes.machine()                 # a VM for it; vCPU features as a mask
    eyes.install(vm)                         # after vm.create_vcpus(), before the first save; puts nothing on vCPUs
    before = eyes.look(vm)                   # runs, and leaves the VM paused: now save it, restore it anywhere
    after = eyes.look(restored)              # by name: {"PSCI_VERSION": 0x10001, "ID_AA64PFR0_EL1": ...}
    eyes.differences(before, after)          # [] where the guest can't tell; else a line each

The code is in guest RAM, so it travels in the stream. `python -m tests.eyes_arm64 [--features LIST]` in a lab guest
prints what a guest of that kernel sees, as JSON; with `--save FILE` it saves the guest that has looked, with
`--restore FILE` it restores one blindly (no plan: what a VMM without verdicts does is `tests.verdicts`' own business)
and looks again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence

from migstream.backends import open_backend
from migstream.backends.base import Vm
from migstream.host import firmware_arm64
from migstream.model import Arch, Machine, MemoryRegion
from migstream.registers import gic, vcpu_features

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
    from migstream.host.scratch import Scratch

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


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this module."""
    parser = argparse.ArgumentParser(prog="python -m tests.eyes_arm64")
    parser.add_argument("--features", type=vcpu_features.parse, default=vcpu_features.DEFAULT)
    parser.add_argument("--save", metavar="FILE")
    options = parser.parse_args(argv)
    backend = open_backend("kvm")
    with backend.create(machine(options.features)) as vm:
        vm.create_vcpus()
        install(vm)
        seen = look(vm)
        if options.save:
            from migstream.transport import capture_prologue, save

            with open(options.save, "wb") as out:
                save(vm, out, host=backend.summary(), pause=vm.pause, prologue=capture_prologue(vm))
    json.dump({"kernel": backend.profile().kernel, "sees": {name: f"{value:#x}" for name, value in seen.items()}},
              sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
