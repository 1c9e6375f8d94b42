"""The demo's sequence: make a VM, let it count, save it mid-run, restore it in another process, check every counter."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from migstream.backends.base import Backend, Vm
from migstream.contract import Contract
from migstream.errors import BackendError, MigstreamError, UsageError
from migstream.model import PAGE, Arch, Machine, MemoryRegion, OpaqueState
from migstream.registers import x86_64
from migstream.registers.vcpu_features import EL1_32BIT, PTRAUTH
from migstream.report import Report
from migstream.transport import Sink, apply_contract, capture_prologue, save

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

KVM_CAP_X2APIC_API = 129
X2APIC_32BIT_IDS = 3
"""KVM_X2APIC_API_USE_32BIT_IDS | _DISABLE_BROADCAST_QUIRK: ids above 254 in LAPIC state and routes."""


@dataclass(frozen=True)
class Board:
    """What the demo's machine of an architecture looks like.

    Attributes:
        guest: module with the guest's code.
        ram: (guest-physical start, most bytes) of each range, in the order in which they are filled.
        devices: for `Machine`. caps: VM capabilities to enable before the vCPUs.
    """

    guest: str
    ram: tuple[tuple[int, int], ...]
    devices: dict[str, int]
    caps: dict[int, tuple[int, ...]]


BOARDS: dict[Arch, Board] = {
    # RAM below 4 GiB ends where a PC's devices begin
    Arch.X86_64: Board("migstream.demo.guest_x86_64", ((0, 0x7000_0000), (1 << 32, 1 << 40)),
                       {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000},
                       {KVM_CAP_X2APIC_API: (X2APIC_32BIT_IDS,)}),
    # room for 512 redistributors of 128 KiB below RAM; its 511 GiB are what the guest's page table maps
    Arch.ARM64: Board("migstream.demo.guest_arm64", ((0x4000_0000, 511 << 30),),
                      {"gic_distributor": 0x0800_0000, "gic_redistributors": 0x1000_0000, "gic_irqs": 96,
                       "its": 0x0808_0000}, {}),
}


KVM_CAP_HYPERV_ENLIGHTENED_VMCS = 163
_EVMCS_VERSIONS = 0x0101
"""The newest and the oldest version of the enlightened VMCS: both 1."""

_NESTED_FEATURES = struct.pack("<10I", 0x4000_000A, 0, 0, _EVMCS_VERSIONS, 1, 0, 0, 0, 0, 0)
"""An entry of CPUID: HYPERV_CPUID_NESTED_FEATURES, with those versions and PERF_GLOBAL_CTRL."""


def enlightened(profile: HostProfile) -> tuple[dict[int, tuple[int, ...]], bytes]:
    """Capabilities to enable and CPUID entries to add, so that a simulated kernel with the optional rule `evmcs` shows
    its VMX MSRs filtered; nothing for another host: in KVM the capability is each vCPU's."""
    if "evmcs_filter" not in profile.behaviour:
        return {}, b""
    return {KVM_CAP_HYPERV_ENLIGHTENED_VMCS: (_EVMCS_VERSIONS,)}, _NESTED_FEATURES


def _with_entries(table: bytes, entries: bytes) -> bytes:
    """A struct kvm_cpuid2 with more entries, of 40 bytes each."""
    count = int.from_bytes(table[:4], "little") + len(entries) // 40
    return count.to_bytes(4, "little") + table[4:] + entries if entries else table


class DemoFailed(MigstreamError):
    """A counter did not go on as it should: the demo found a lost or repeated step."""

    exit_status = 11


def guest_for(arch: Arch) -> ModuleType:
    """The demo guest of an architecture."""
    return import_module(BOARDS[arch].guest)


def machine(arch: Arch, vcpus: int, memory: int, vcpu_features: int = 0) -> Machine:
    """The demo's machine; `memory` in bytes, `vcpu_features` as KVM_ARM_VCPU_INIT takes them (0 for the default).

    Raises: UsageError for a size that the guest can't use.
    """
    if vcpu_features and arch != Arch.ARM64:
        raise UsageError("--vcpu-features: vCPUs of arm64 have them, this machine's are x86_64's")
    for refuses, why in _FEATURES if arch == Arch.ARM64 else ():
        if refuses(vcpu_features):
            raise UsageError(f"--vcpu-features: {why}")
    board, smallest = BOARDS[arch], guest_for(arch).min_memory(vcpus)
    if memory % PAGE or not smallest <= memory <= sum(most for _, most in board.ram):
        raise UsageError(f"--memory: whole pages of {PAGE} bytes, at least {smallest} bytes for {vcpus} vCPUs")
    regions, left = [], memory
    for start, most in board.ram:
        if left:
            regions.append(MemoryRegion(start, min(left, most)))
            left -= min(left, most)
    features = {"vcpu_features": vcpu_features} if vcpu_features else {}
    return Machine(arch, vcpus, tuple(regions), {**board.devices, **features})


_FEATURES: tuple[tuple[Callable[[int], bool], str], ...] = (
    (lambda mask: mask & PTRAUTH not in (0, PTRAUTH),
     "ptrauth_address needs ptrauth_generic and the other way round: KVM takes both or neither; `ptrauth` is both"),
    (lambda mask: bool(mask & EL1_32BIT), "el1_32bit: such a vCPU is AArch32's, the demo's guest 64-bit code"),
)
"""(whether these features can't be, why)."""


@dataclass(frozen=True)
class Saved:
    """The first half's result: each vCPU's count at the pause, the save's report, registers held to a contract."""

    steps: list[int]
    report: Report
    pinned: int = 0


def run_and_save(backend: Backend, wanted: Machine, out: Sink, *, steps: int = 50, level: int = 1,
                 threads: int = 0, progress: Callable[[str], None] = lambda _: None,
                 contract: Contract | None = None) -> Saved:
    """Make the VM, let every vCPU do at least `steps` steps, save it mid-run, check it, destroy it.

    Args:
        contract: what the guest is started under.

    Raises: DemoFailed, BackendError, OutputError; DoesNotFit for a contract that this host can't keep.
    """
    guest, most = guest_for(wanted.arch), backend.profile().max_vcpus
    if wanted.vcpus > most:
        raise UsageError(f"--vcpus {wanted.vcpus}: {backend.name} allows {most}")
    progress(f"making a VM of {wanted.vcpus} vCPUs on {backend.name}")
    profile = backend.profile()
    caps, entries = enlightened(profile)
    with backend.create(wanted, {**BOARDS[wanted.arch].caps, **caps}) as vm:
        vm.create_vcpus()
        cpuid = contract.values.get(x86_64.CPUID2.id) if contract else None
        if contract and wanted.arch == Arch.ARM64:
            apply_contract(vm, contract)
        guest.install(vm, cpuid or _with_entries(profile.cpuid, entries), profile.capabilities)
        pinned = apply_contract(vm, contract) if contract else 0
        prologue = capture_prologue(vm)
        vm.start()
        wait_for(vm, guest, [steps] * wanted.vcpus, progress)
        marker = OpaqueState(guest.NAME, struct.pack("<II", guest.CODE, guest.CELLS))
        report = save(vm, out, host=backend.summary(), pause=vm.pause, prologue=prologue, level=level,
                      opaque=[marker], threads=threads)
        return Saved(check(vm, guest), report, pinned)


def wait_for(vm: Vm, guest: ModuleType, targets: list[int], progress: Callable[[str], None],
             limit_s: float = 120) -> None:
    """Wait until each vCPU has counted to its target. Raises: DemoFailed when one exits or time is up.

    Args:
        limit_s: for a few; a vCPU's first turn comes late where hundreds share a CPU, so it is longer for more.
    """
    start, limit_s = time.monotonic(), limit_s + len(targets) / 2
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
    guest = guest_for(vm.machine.arch)
    if guest.NAME not in [state.name for state in opaque]:
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


def replay_elsewhere(path: str, backend_name: str, seconds: float, threads: int = 0) -> dict[str, object]:
    """Run `migstream replay` on a file in a process of its own and return its JSON. Raises: DemoFailed."""
    command = [sys.executable, "-m", "migstream", "replay", path, "--backend", backend_name, "--readback",
               "--run", str(seconds), "--threads", str(threads), "--json"]
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
