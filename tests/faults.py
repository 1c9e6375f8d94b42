"""A restore under every single fault of a small VM, and what comes of each: right, or failed and nothing that can run.

    python -m tests.faults --backend sim:arm64-7.2 [--vcpus N] [--every N] [--seed S]

prints how many ended how, and fails at the first that is neither. The VM is the demo's, with its interrupt controller;
with read-back, which alone can tell a value that was lost. `--every N` takes one of N of the registers' faults.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from migstream.backends import open_backend
from migstream.backends.base import Backend, Vm
from migstream.backends.faulty import Fault, FaultyBackend, Kind, every_fault
from migstream.demo import run
from migstream.errors import BackendError, MigstreamError, RestoreFailed, UsageError
from migstream.model import Arch, Bank, Layout, Phase, Scope, Slot
from migstream.progress import progress
from migstream.reader import StreamReader
from migstream.registers import ids
from migstream.registers.catalogue import lookup, running
from migstream.report import Report
from migstream.sections import EncodedBank
from migstream.transport import capture_prologue, read_items, restore, save
from migstream.transport.clocks import FORWARD

MEMORY = 1 << 20
OWN_VALUES = (0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0102, 0x3B)
"""SYSENTER, STAR, LSTAR, CSTAR, KERNEL_GS_BASE, TSC_ADJUST."""

RIGHT = "right"


@cache
def stream(name: str, vcpus: int) -> bytes:
    """The guest of `source`, saved."""
    backend, out = open_backend(name), io.BytesIO()
    with source(backend, vcpus) as vm:
        save(vm, out, host=backend.summary(), pause=vm.pause, prologue=capture_prologue(vm))
    return out.getvalue()


def source(backend: Backend, vcpus: int) -> Vm:
    """A demo guest, stopped mid-run, with values of its own in registers that it does not use."""
    guest = run.guest_for(backend.arch)
    vm = backend.create(run.machine(backend.arch, vcpus, MEMORY), run.BOARDS[backend.arch].caps)
    vm.create_vcpus()
    guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
    vm.start()
    run.wait_for(vm, guest, [3] * vcpus, lambda _: None)
    vm.pause()
    for number, index in enumerate(OWN_VALUES if backend.arch == Arch.X86_64 else ()):  # arm64's guest has its marks
        layout = Layout(Scope.VCPU, Phase.STATE, (Slot(ids.msr_id(index), 8),))
        values = np.arange(1, vcpus + 1, dtype=np.uint64).reshape(-1, 1) * 0x1000 * (number + 1)
        assert vm.write(layout, 0, values) == []
    return vm


@cache
def banks(name: str, vcpus: int) -> tuple[Bank, ...]:
    """The registers of the stream."""
    data = io.BytesIO(stream(name, vcpus))
    return tuple(item.decode() for _, item in read_items(data, StreamReader()) if isinstance(item, EncodedBank))


def wrong(vm: Vm, name: str) -> list[tuple[str, int | None]]:
    """Registers (and vCPUs) of a VM that are not the stream's, apart from bits that run by themselves, forwards."""
    found: list[tuple[str, int | None]] = []
    for bank in banks(name, vm.machine.vcpus):
        actual = np.zeros_like(bank.values)
        refused = vm.read(bank.layout, bank.first_vcpu, actual)
        there = Bank(bank.layout, bank.first_vcpu, actual)
        unread = {(no.register, no.vcpu) for no in refused}
        for row in range(bank.rows):
            vcpu = bank.first_vcpu + row if bank.layout.scope == Scope.VCPU else None
            found += [(lookup(slot.id).name, vcpu)
                      for (slot, one), (_, other) in zip(bank.items(row), there.items(row), strict=True)
                      if (slot.id, vcpu) in unread or _still(slot, one) != _still(slot, other)
                      or (slot.id in FORWARD and other[:8][::-1] < one[:8][::-1])]
    return found


def _still(slot: Slot, value: bytes) -> int:
    number, known = int.from_bytes(value, "little"), running(slot.id)
    for low, width in known.spans if known else ():
        number &= ~((1 << width) - 1 << low)
    return number


def restored(backend: FaultyBackend, name: str, vcpus: int) -> tuple[Vm, Report]:
    """A restore with read-back."""
    return restore(io.BytesIO(stream(name, vcpus)), backend, readback=True)


def faults_of(backend: Backend, work: Callable[[FaultyBackend], object]) -> list[Fault]:
    """Every single fault of a piece of work."""
    plain = FaultyBackend(backend)
    work(plain)
    return every_fault(plain.switch)


def faults_of_restore(backend: Backend, name: str, vcpus: int) -> list[Fault]:
    """Every single fault of a restore, which without one is right."""
    def work(faulty: FaultyBackend) -> None:
        with restored(faulty, name, vcpus)[0] as vm:
            assert wrong(vm, name) == []
            count = len(banks(name, vcpus))
            faulty.switch.layouts = faulty.switch.layouts[:-count]  # those of `wrong`
            faulty.switch.uses["read"] -= count

    return faults_of(backend, work)


def outcome(backend: Backend, name: str, vcpus: int, fault: Fault) -> str:
    """What a restore under a fault ended in. Raises: AssertionError for a wrong VM, status or report."""
    slept: list[float] = []
    faulty = FaultyBackend(backend, fault, sleep=slept.append)
    try:
        vm, report = restored(faulty, name, vcpus)
    except MigstreamError as error:
        assert faulty.switch.happened, f"{fault}: {error} without a fault"
        assert faulty.switch.open_vms == 0, f"{fault}: a VM is left open"
        return _failed(fault, error)
    with vm:
        assert faulty.switch.happened, f"{fault} did not happen"
        assert bool(slept) == (fault.kind == Kind.SLOW)
        assert not report.lossy, f"{fault}: handed over though {[str(one) for one in report.differs]}"
        bad = wrong(vm, name)
        assert bad == [], f"{fault}: a VM that could run has {bad}, and nobody said so"
        assert _said(fault, report), f"{fault}: not a word in the report"
    assert faulty.switch.open_vms == 0
    return RIGHT


def _failed(fault: Fault, error: MigstreamError) -> str:
    """The error has the exit status of its kind, and names the register; the report has what was lost."""
    assert isinstance(error, RestoreFailed | BackendError), f"{fault}: {type(error).__name__}"
    assert error.exit_status == (11 if isinstance(error, RestoreFailed) else 69)
    if fault.register is None or isinstance(error, BackendError):
        return f"destroyed, {error.exit_status}"
    named, report = lookup(fault.register).name, error.report
    assert isinstance(report, Report)
    lost = {(lookup(one.register).name, vcpu) for one in report.differs if not one.reason
            for vcpu in one.vcpus or (None,)}
    refused = {(lookup(no.register).name, no.vcpu) for no, why in report.refused if not why}
    follows = fault.kind == Kind.LIE and bool(refused)  # nobody looks any more where another write was refused for it
    assert (named, fault.vcpu) in lost | refused or follows, f"{fault}: the report has {lost | refused}"
    if len(lost | refused) == 1:
        assert named in str(error), f"{fault}: {error}"
    return f"destroyed, 11: {'refused' if refused else 'read back different'}"


def _said(fault: Fault, report: Report) -> bool:
    """A register's fault that lost nothing is in the report, unless nobody could tell."""
    if fault.register is None or fault.kind == Kind.LIE:
        return True
    name = lookup(fault.register).name
    told = [lookup(no.register).name for no, why in report.refused if why]
    return name in told or any(name in note for note in report.notes)


def chosen(faults: Sequence[Fault], every: int, seed: int) -> list[Fault]:
    """All faults of whole primitives, and one of `every` of the registers'."""
    named = [fault for fault in faults if fault.register is not None]
    picked = named if every == 1 else random.Random(seed).sample(named, len(named) // every)
    return [*(fault for fault in faults if fault.register is None), *picked]


def table(counts: Counter[tuple[str, str]]) -> str:
    """Outcomes of each kind, in a line."""
    kinds = sorted({kind for kind, _ in counts})
    return "; ".join(f"{kind}: " + ", ".join(f"{n} {what}" for (one, what), n in sorted(counts.items()) if one == kind)
                     for kind in kinds)


def try_all(name: str, vcpus: int, every: int = 1, seed: int = 0) -> Counter[tuple[str, str]]:
    """Kinds and outcomes of the faults of a restore, counted.

    Raises: AssertionError for one that is wrong; UsageError, BackendUnavailable before the first.
    """
    for given, option in ((vcpus, "--vcpus"), (every, "--every")):
        if given < 1:
            raise UsageError(f"{option}: {given} is not 1 or more")
    backend, counts = open_backend(name), Counter[tuple[str, str]]()
    faults = chosen(faults_of_restore(backend, name, vcpus), every, seed)
    with progress() as say:
        for number, fault in enumerate(faults):
            say(f"fault {number} of {len(faults)}: {fault}")
            counts[fault.kind.value, outcome(backend, name, vcpus, fault)] += 1
    right = sum(n for (_, what), n in counts.items() if what == RIGHT)
    print(f"{name}, {vcpus} vCPUs, {len(faults)} single faults of a restore (1 of {every}, seed {seed}): "
          f"{right} right, {len(faults) - right} failed and destroyed, 0 handed over wrong ({table(counts)})")
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--backend", default="sim")
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        try_all(options.backend, options.vcpus, options.every, options.seed)
    except MigstreamError as error:
        print(f"faults: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
