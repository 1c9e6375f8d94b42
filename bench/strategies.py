"""One blackout through the library, in each of the ways that are compared: saved, encoded, decoded, restored.

The guest stands still before and after: stopping and starting vCPU threads is the VMM's. Making the target's VM, its
memory and its vCPUs is not part of a blackout in any way (a VMM that takes a guest was started before); it is measured
beside it. RAM is not sent.
"""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from migstream.backends.base import Backend, Vm
from migstream.frames import MAX_FEED
from migstream.model import Bank, HostSummary, Layout, Machine, Scope
from migstream.reader import StreamReader
from migstream.registers import x86_64
from migstream.report import Report
from migstream.sections import EncodedBank, encode_bank
from migstream.transport import Restorer, read_items
from migstream.transport.saver import Saver, capture, raise_first


@dataclass(frozen=True)
class Strategy:
    """A way to restore.

    Attributes:
        per_vcpu: VM-scoped registers are read and written once for each vCPU. early: what can't change once the guest
            has run goes before the pause. threads: vCPU registers are read and written by several threads.
    """

    name: str
    per_vcpu: bool
    early: bool
    threads: bool
    what: str


STRATEGIES = {one.name: one for one in (
    Strategy("per-vCPU", True, False, False, "VM-scoped registers once for each vCPU, everything in the pause"),
    Strategy("scoped", False, False, False, "VM-scoped registers once, everything in the pause"),
    Strategy("prologue", False, True, False, "and CPUID, feature and immutable registers before the pause"),
    Strategy("prologue+threads", False, True, True, "and vCPUs by several threads"),
)}

PHASES = ("read registers", "encode", "decode", "CPUID and features", "vCPU registers", "VM registers", "rest")
"""Parts of a blackout in their order; `rest` is framing, planning, settling: what no other part counts."""

PART_OF = {"create (vm)": "CPUID and features", "create (vcpu)": "CPUID and features",
           "finalize (vcpu)": "CPUID and features", "feature (vm)": "VM registers",
           "feature (vcpu)": "CPUID and features", "state (vcpu)": "vCPU registers", "state (vm)": "VM registers",
           "interrupts (vm)": "VM registers", "interrupts (vcpu)": "vCPU registers", "clock (vm)": "VM registers",
           "clock (vcpu)": "vCPU registers", "decode": "decode", "prologue decode": "decode",
           "registers": "read registers", "prologue": "read registers", "encode": "encode"}
"""A report's phase to the part that shows it."""

_OUTSIDE = "create"
"""A report's phase that is no part of a blackout."""


@dataclass
class Sample:
    """One blackout.

    Attributes:
        total: ns. save, load: its two halves, ns (load is decode and restore). phases: ns of each of PHASES.
        before: ns of what was done before the pause, without making the VM. made: ns of making VM and vCPUs.
        vm_writes, vcpu_writes: register writes in the blackout. early_writes: before it.
        bytes: of the stream's part that is sent in the blackout. stream: of the whole stream.
        still: the same part were all XMM registers zero, as those of QEMU's guest are; 0 where nobody asked.
    """

    total: int = 0
    save: int = 0
    load: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    before: int = 0
    made: int = 0
    vm_writes: int = 0
    vcpu_writes: int = 0
    early_writes: int = 0
    bytes: int = 0
    stream: int = 0
    still: int = 0

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class Run:
    """The two halves of one blackout, on a paused source VM and a fresh target."""

    def __init__(self, backend: Backend, source: Vm, host: HostSummary, strategy: Strategy, threads: int) -> None:
        self.strategy, self.out = strategy, io.BytesIO()
        self.saver = Saver(source, self.out, host=host, threads=threads, vm_scope_per_vcpu=strategy.per_vcpu)
        self.restorer = Restorer(backend, threads=threads, vm_scope_per_vcpu=strategy.per_vcpu)
        self._fed = 0

    def send(self) -> int:
        """Give what was written since to the restorer; returns its length."""
        with self.out.getbuffer() as data:
            start, end = self._fed, len(data)
            for at in range(start, end, MAX_FEED):
                self.restorer.feed(data[at:at + MAX_FEED])
        self._fed = end
        return end - start


def blackout(backend: Backend, source: Vm, host: HostSummary, strategy: Strategy, threads: int) -> Sample:
    """Save `source`, which stands still, and restore it into a fresh VM, which is closed. Raises: MigstreamError."""
    run = Run(backend, source, host, strategy, threads if strategy.threads else 1)
    sample = Sample()
    with run.restorer, _no_collector():
        start = time.perf_counter_ns()
        if strategy.early:
            run.saver.prologue()
            run.send()
            run.restorer.ready()
            run.saver.ready()
        sample.before = time.perf_counter_ns() - start
        early = {name: dict(row) for name, row in run.restorer.report.writes.items()}
        made, known = run.restorer.report.times.get(_OUTSIDE, 0), _parts(run)
        start = time.perf_counter_ns()
        if not strategy.early:
            run.saver.prologue()
        run.saver.state(ram_too=False)
        saved = time.perf_counter_ns()
        sample.bytes = run.send()
        vm, report = run.restorer.finish()
        end = time.perf_counter_ns()
        vm.close()
    sample.made = report.times.get(_OUTSIDE, 0)
    inside = sample.made - made
    sample.before -= made
    sample.save, sample.load = saved - start, end - saved - inside
    sample.total = sample.save + sample.load
    _fill(sample, report, early, {name: ns - known.get(name, 0) for name, ns in _parts(run).items()})
    sample.stream = run.saver.report.bytes
    sample.still = sample.bytes - _noise(run.out)
    return sample


def _noise(out: io.BytesIO) -> int:
    """Bytes of a stream that are there because the demo's guest has other XMM registers in each vCPU."""
    out.seek(0)
    banks = ((section, item) for section, item in read_items(out, StreamReader()) if isinstance(item, EncodedBank))
    return sum(len(section.stored) - len(encode_bank(without_xmm(item.decode()), 0).stored)
               for section, item in banks if x86_64.XSAVE.id in item.layout.index)


def without_xmm(state: Bank) -> Bank:
    """The same with the XMM registers zero, as a BIOS leaves them: the demo's guest gives each vCPU sixteen at random.
    """
    place = state.layout.index.get(x86_64.XSAVE.id)
    if place is None:
        return state
    first = state.layout.offsets[place] + _XMM // 8
    values = state.values.copy()
    values[:, first:first + 32] = 0
    return Bank(state.layout, state.first_vcpu, values)


_XMM = 160
"""Byte offset of XMM0 in the legacy area of XSAVE (Intel SDM 1, 10.5.1)."""


def _parts(run: Run) -> dict[str, int]:
    """ns so far of each part, of both halves."""
    out: dict[str, int] = {}
    for report in (run.saver.report, run.restorer.report):
        for name, ns in report.times.items():
            if name in PART_OF:
                out[PART_OF[name]] = out.get(PART_OF[name], 0) + ns
    return out


def _fill(sample: Sample, report: Report, early: dict[str, dict[Scope, int]], parts: dict[str, int]) -> None:
    sample.phases = {name: parts.get(name, 0) for name in PHASES}
    sample.phases["rest"] = sample.total - sum(sample.phases.values())
    for name, row in report.writes.items():
        before = early.get(name, {})
        sample.vm_writes += row[Scope.VM] - before.get(Scope.VM, 0)
        sample.vcpu_writes += row[Scope.VCPU] - before.get(Scope.VCPU, 0)
        sample.early_writes += sum(before.values())


@contextmanager
def _no_collector() -> Iterator[None]:
    """No garbage collection inside a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def machine_for(backend: Backend, vcpus: int) -> Machine:
    """The demo's machine with as little RAM as its guest needs: RAM is not measured. Raises: UsageError."""
    from migstream.demo import run

    return run.machine(backend.arch, vcpus, run.guest_for(backend.arch).min_memory(vcpus))


def _enable_apics(vm: Vm) -> None:
    """Every operating system does (SPIV, Intel SDM 3A 11.9); the demo's guest has no need to. Raises: BackendError."""
    for layout in vm.layouts()[0]:
        if (column := layout.index.get(x86_64.LAPIC.id)) is not None:
            alone = Layout(layout.scope, layout.phase, (layout.slots[column],))
            for bank in capture(vm, alone):
                bank.values[:, _SPIV // 8] |= np.uint64(_SPIV_ENABLED)
                raise_first(vm.write(alone, bank.first_vcpu, bank.values))


_SPIV, _SPIV_ENABLED = 0xF0, 1 << 8


def source_vm(backend: Backend, vcpus: int, seconds: float = 2.0) -> Vm:
    """Make a demo guest that has run for a moment and stands still; the caller's to close. Raises: MigstreamError."""
    from migstream.demo import run

    guest, machine = run.guest_for(backend.arch), machine_for(backend, vcpus)
    vm = backend.create(machine, run.BOARDS[backend.arch].caps)
    try:
        vm.create_vcpus()
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        _enable_apics(vm)
        vm.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(count < 1 for count in guest.counts(vm)) and not vm.exits():
            time.sleep(0.01)
        vm.pause()
    except BaseException:
        vm.close()
        raise
    return vm
