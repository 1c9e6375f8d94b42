"""The demo's sequence: make a VM, let it count, save it mid-run, restore it in another process, check every counter."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from migstream.backends.base import Backend, Vm
from migstream.errors import BackendError, MigstreamError, UsageError
from migstream.model import PAGE, Arch, Machine, MemoryRegion, OpaqueState
from migstream.report import Report
from migstream.transport import Sink, capture_prologue, save

KVM_CAP_X2APIC_API = 129
X2APIC_32BIT_IDS = 3
"""KVM_X2APIC_API_USE_32BIT_IDS | _DISABLE_BROADCAST_QUIRK: ids above 254 in LAPIC state and routes."""

LOW_RAM = 0x7000_0000
"""RAM below 4 GiB ends here; what lies between belongs to devices."""

_DEVICES = {Arch.X86_64: {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}}
_CAPS = {Arch.X86_64: {KVM_CAP_X2APIC_API: (X2APIC_32BIT_IDS,)}}


class DemoFailed(MigstreamError):
    """A counter did not go on as it should: the demo found a lost or repeated step."""

    exit_status = 11


def guest_for(arch: Arch) -> ModuleType:
    """The demo guest of an architecture. Raises: UsageError."""
    if arch != Arch.X86_64:
        raise UsageError(f"no demo guest for {arch.label}")
    from migstream.demo import guest_x86_64

    return guest_x86_64


def machine(arch: Arch, vcpus: int, memory: int) -> Machine:
    """The demo's machine; `memory` in bytes. Raises: UsageError for a size that the guest can't use."""
    smallest = guest_for(arch).min_memory(vcpus)
    if memory % PAGE or memory < smallest:
        raise UsageError(f"--memory: whole pages of {PAGE} bytes, and {smallest} bytes or more for {vcpus} vCPUs")
    regions = [MemoryRegion(0, min(memory, LOW_RAM))]
    if memory > LOW_RAM:
        regions.append(MemoryRegion(1 << 32, memory - LOW_RAM))
    return Machine(arch, vcpus, tuple(regions), _DEVICES[arch])


@dataclass(frozen=True)
class Saved:
    """The first half's result: how far each vCPU had counted at the pause, and the save's report."""

    steps: list[int]
    report: Report


def run_and_save(backend: Backend, wanted: Machine, out: Sink, *, steps: int = 50, level: int = 1,
                 progress: Callable[[str], None] = lambda _: None) -> Saved:
    """Make the VM, let every vCPU do at least `steps` steps, save it mid-run, check it, destroy it.

    Raises: DemoFailed, BackendError, OutputError.
    """
    guest = guest_for(wanted.arch)
    progress(f"making a VM of {wanted.vcpus} vCPUs on {backend.name}")
    with backend.create(wanted, _CAPS[wanted.arch]) as vm:
        vm.create_vcpus()
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        prologue = capture_prologue(vm)
        vm.start()
        wait_for(vm, guest, [steps] * wanted.vcpus, progress)
        marker = OpaqueState(guest.NAME, struct.pack("<II", guest.CODE, guest.CELLS))
        report = save(vm, out, host=backend.summary(), pause=vm.pause, prologue=prologue, level=level,
                      opaque=[marker])
        return Saved(check(vm, guest), report)


def wait_for(vm: Vm, guest: ModuleType, targets: list[int], progress: Callable[[str], None],
             limit_s: float = 120) -> None:
    """Wait until each vCPU has counted to its target. Raises: DemoFailed when one exits or time is up."""
    start = time.monotonic()
    while True:
        done = sum(now >= target for now, target in zip(guest.counts(vm), targets, strict=True))
        progress(f"running: {done} of {len(targets)} vCPUs have counted far enough")
        if done == len(targets):
            return
        if vm.exits() or time.monotonic() - start > limit_s:
            vm.pause()
            exits = "".join(f"; vCPU {k}: {why}" for k, why in sorted(vm.exits().items())[:3])
            raise DemoFailed(f"only {done} of {len(targets)} vCPUs counted on within {limit_s:.0f} s{exits}")
        time.sleep(0.01)


def check(vm: Vm, guest: ModuleType) -> list[int]:
    """Return each vCPU's step count after checking it against everything else. Raises: DemoFailed."""
    counters = guest.counters(vm)
    faults = [c.fault for c in counters if c.fault]
    if faults:
        raise DemoFailed(f"{faults[0]}{f' (and {len(faults) - 1} more vCPUs)' if len(faults) > 1 else ''}")
    return [c.steps for c in counters]


def continue_guest(vm: Vm, opaque: list[OpaqueState], seconds: float) -> dict[str, object]:
    """Let a restored guest run on for `seconds` and longer if a vCPU of the demo guest has not had its turn.

    Returns, for the demo guest, the steps of each vCPU before and after; for any guest, the vCPUs that stopped by
    themselves. Raises: DemoFailed.
    """
    guest = guest_for(vm.machine.arch) if vm.machine.arch == Arch.X86_64 else None
    if guest is None or guest.NAME not in [state.name for state in opaque]:
        vm.start()
        time.sleep(seconds)
        vm.pause()
        return {"exits": vm.exits()}
    before = check(vm, guest)
    vm.start()
    time.sleep(seconds)
    wait_for(vm, guest, [steps + 1 for steps in before], lambda _: None)
    vm.pause()
    return {"exits": vm.exits(), "steps_before": before, "steps_after": check(vm, guest)}


def replay_elsewhere(path: str, backend_name: str, seconds: float) -> dict[str, object]:
    """Run `migstream replay` on a file in a process of its own and return its JSON. Raises: DemoFailed."""
    command = [sys.executable, "-m", "migstream", "replay", path, "--backend", backend_name, "--readback",
               "--run", str(seconds), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        document = json.loads(result.stdout)
    except ValueError:
        raise BackendError("migstream replay", what=(result.stderr.strip().splitlines() or ["no answer"])[-1]) from None
    if not isinstance(document, dict) or "steps_after" not in document.get("run", {}):
        raise DemoFailed(f"the restoring process said: {document.get('message', result.stderr.strip())}")
    return document


def compare(saved: list[int], document: dict[str, object]) -> None:
    """Check the restored process's counters against the saving one's. Raises: DemoFailed."""
    run = document["run"]
    assert isinstance(run, dict)
    for vcpu, (at_save, restored, later) in enumerate(zip(saved, run["steps_before"], run["steps_after"], strict=True)):
        if restored != at_save or later <= restored:
            raise DemoFailed(f"vCPU {vcpu}: {at_save} steps at the save, {restored} after the restore, {later} later")
