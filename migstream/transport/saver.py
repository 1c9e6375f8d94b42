"""Saving: capture from a backend, encode, write."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from migstream import codec, limits, ram, sections
from migstream.backends.base import Refusal, Vm, check_threads
from migstream.contract import Behaviour
from migstream.errors import BackendError, Corrupt, UsageError
from migstream.frames import FrameWriter, Section, SmallBanks, framing
from migstream.model import Bank, HostSummary, Layout, OpaqueState, Phase, Scope
from migstream.report import Report
from migstream.sections import RamLayout
from migstream.transport.streams import Held, Sink
from migstream.transport.written import repeats


@dataclass(frozen=True)
class Prologue:
    """What is captured before the pause.

    Attributes:
        layouts: all layouts of the VM, also of what follows later. banks: values of the prologue's layouts.
        refused: registers that the host lists and refuses to read.
        behaviour: what the kernel behaves as where it has no register: the contract section.
    """

    layouts: tuple[Layout, ...]
    banks: tuple[Bank, ...]
    refused: tuple[Refusal, ...]
    behaviour: Behaviour = field(default_factory=Behaviour)


def capture_prologue(vm: Vm, behaviour: Behaviour | None = None) -> Prologue:
    """Capture what can't change once the VM has run. Call it before the first run, or while the vCPUs stand still.

    Args:
        behaviour: what the kernel behaves as where it has no register, from `host.behaviour.of_profile` of a captured
            profile; without it the backend finds out, on arm64 by a scratch VM whose guest asks, once a backend.

    Raises: BackendError.
    """
    layouts, refused = vm.layouts()
    banks = tuple(bank for layout in layouts if layout.phase.prologue for bank in capture(vm, layout))
    return Prologue(layouts, banks, tuple(refused), vm.behaviour() if behaviour is None else behaviour)


def capture(vm: Vm, layout: Layout) -> list[Bank]:
    """Read all rows of a layout, split so that each bank is within the limits. Raises: BackendError by name."""
    banks = empty_banks(vm, layout)
    raise_first(vm.read_all(banks))
    for bank in banks:
        _check(bank)
    return banks


def empty_banks(vm: Vm, layout: Layout) -> list[Bank]:
    """The banks of a layout, all zero. Their memory is touched: a first touch costs more than what is put there."""
    import numpy as np

    rows = vm.machine.vcpus if layout.scope == Scope.VCPU else 1
    step = max(limits.MAX_MATRIX // (layout.row_words * 8), 1)
    banks = [Bank(layout, first, np.empty((min(step, rows - first), layout.row_words), np.uint64))
             for first in range(0, rows, step)]
    for bank in banks:
        bank.values.fill(0)
    return banks




def _check(bank: Bank) -> None:
    """Refuse what no reader would take: the host's answer contradicts itself. Raises: BackendError."""
    try:
        sections.check_bank(bank.layout, bank.values)
    except Corrupt as error:
        raise BackendError("reading", what=f"the host's answer can't be: {error}") from error


def _check_of(vm: Vm, captured: Prologue) -> None:
    """Raises: UsageError where a prologue has other vCPUs than the VM."""
    rows: dict[Layout, int] = {}
    for bank in captured.banks:
        rows[bank.layout] = rows.get(bank.layout, 0) + bank.rows
    for layout, found in rows.items():
        if found != (expected := vm.machine.vcpus if layout.scope == Scope.VCPU else 1):
            raise UsageError(f"the prologue is of another VM: {layout.title} of {found} vCPUs, this one has {expected}")


def raise_first(refused: Sequence[Refusal]) -> None:
    """Refusals make an error. Raises: BackendError by the first one's name."""
    if refused:
        first = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise BackendError(first.operation, errno=max(first.errno, 0), vcpu=first.vcpu, what=f"{first}{more}")


class Saver:
    """One save onto a sink, in two calls: `prologue()` while the guest may run, `state()` once it is paused."""

    def __init__(self, vm: Vm, out: Sink, *, host: HostSummary, level: int = codec.DEFAULT_LEVEL,
                 threads: int = 0, vm_scope_per_vcpu: bool = False) -> None:
        """See `save`; `vm_scope_per_vcpu` reads VM-scoped registers once for each vCPU, to measure it.

        Raises: UsageError.
        """
        self.vm, self.host, self.report = vm, host, Report(vm.stopwatch)
        self._per_vcpu = vm_scope_per_vcpu
        vm.threads = check_threads(threads)
        self._out, self._level = Held(out), codec.check_level(level)
        self._frames = FrameWriter(vm.machine.arch)
        self._prologue: Prologue | None = None
        self._banks: list[Bank] = []
        self._small = SmallBanks(())
        self._again: list[tuple[Bank, Bank]] = []
        self._numbers: dict[Layout, int] = {}
        self._read: Callable[[], list[Refusal]] = list

    def prologue(self, captured: Prologue | None = None) -> None:
        """Write the part that is sent before the pause.

        Raises: BackendError, OutputError; UsageError the second time, and for what was captured of another VM.
        """
        if self._prologue is not None:
            raise UsageError("the prologue was written already")
        with self.report.phase("prologue"):
            captured = captured or capture_prologue(self.vm)
            _check_of(self.vm, captured)
            self._prologue = captured
            self._numbers = {layout: number for number, layout in enumerate(captured.layouts)}
            self._out.add([self._frames.begin()])
            notes = tuple(f"not readable here: {no}" for no in captured.refused)
            self.report.notes += notes
            self._send(sections.encode(self.vm.machine))
            self._send(sections.encode(HostSummary(self.host.kernel, self.host.cpu, self.host.backend, notes)))
            self._send(sections.encode(captured.behaviour))
            for layout in captured.layouts:
                self._send(sections.encode(layout))
            for bank in captured.banks:
                self._count(bank)
                self._bank(bank)
            self._out.flush()
            late = [layout for layout in captured.layouts if not layout.phase.prologue]
            self.vm.prepare(late)
            self._banks = [bank for layout in late for bank in empty_banks(self.vm, layout)]
            self._again = [(bank, empty_banks(self.vm, bank.layout)[0]) for bank in captured.banks
                           if bank.layout.scope == Scope.VM and bank.layout.phase == Phase.FEATURE]
            for bank in self._banks:
                self._count(bank)
            self._small = SmallBanks([sections.small_bank(bank, self._numbers[bank.layout]) for bank in self._banks])
            often = [bank for bank in self._banks for _ in range(repeats(self.vm, bank.layout, self._per_vcpu))]
            self._read = self.vm.reading([*often, *(new for _, new in self._again)])

    def ready(self) -> None:
        """Do what can be done just before the pause, after the prologue: `save` calls it there.

        Has the threads awake, and sends the empty banks to nowhere once, so that nothing of it is done for the first
        time later.
        """
        with self.report.phase("ready"):
            rehearsal = Saver(self.vm, io.BytesIO(), host=self.host, level=self._level, threads=self.vm.threads)
            rehearsal._numbers = self._numbers
            for bank in self._banks:
                rehearsal._bank(bank)
            rehearsal._small = SmallBanks([sections.small_bank(bank, self._numbers[bank.layout])._replace(bounds=b"")
                                           for bank in self._banks])
            rehearsal._send_small(0, end=True)
            rehearsal._out.flush()
            self.vm.warm([bank.layout for bank in self._banks])

    def state(self, *, ram_too: bool = True, opaque: Sequence[OpaqueState] = ()) -> Report:
        """Write all the rest; the vCPUs stand still.

        Raises: BackendError, OutputError; UsageError for opaque state over the format's limits, and without a prologue.
        """
        if self._prologue is None:
            raise UsageError("write the prologue() first")
        self.vm.warm()
        with self.report.phase("registers"):
            raise_first(self._read())
            updates = self._changed()
        if updates:
            with self.report.phase("encode"):
                for bank in updates:
                    self._count(bank)
                    self._bank(bank)
        if ram_too:
            with self.report.phase("ram"):
                self._ram()
        with self.report.phase("encode"):
            self._finish(opaque)
        self.report.bytes = self._frames.offset
        return self.report

    def _finish(self, opaque: Sequence[OpaqueState]) -> None:
        """All that comes after the RAM."""
        sent = 0
        while sent < len(self._banks):
            sent = self._send_small(sent, end=not opaque)
            if sent < len(self._banks):
                _check(self._banks[sent])
                self._bank(self._banks[sent], codec.WORTH_IN_A_PAUSE)
                sent += 1
        for section in sections.encode_opaque(opaque) if opaque else ():
            self._send(section)
        if not self._frames.ended:
            self._out.add(self._frames.end())
        self._out.flush()

    def _send_small(self, first: int, end: bool) -> int:
        """Send banks from number `first` on, and the end, up to one that is not small or not right; its number."""
        data, sent = self._frames.send_banks(self._small, first, end, codec.WORTH_IN_A_PAUSE)
        self._out.add([data])
        stored = self.report.stored_bytes
        stored["registers"] = stored.get("registers", 0) + len(data) - framing(sent, self._frames.ended)
        return first + sent

    def _changed(self) -> list[Bank]:
        """VM-wide registers that a guest may write are sent early and looked at again: changed ones go twice."""
        changed = [Bank(new.layout, 0, new.values, update=True) for old, new in self._again
                   if old.values.tobytes() != new.values.tobytes()]
        for bank in changed:
            _check(bank)
        return changed

    def _bank(self, bank: Bank, worth: int = codec.WORTH) -> None:
        self._send(sections.encode_bank(bank, self._numbers[bank.layout], self._level, worth=worth), "registers")

    def _count(self, bank: Bank) -> None:
        """A bank that was read, or will be in the pause: there is no time for it then."""
        self.report.count(bank.layout.step, bank.layout.scope, bank.rows * len(bank.layout.slots))
        self._raw("registers", bank.values.nbytes)

    def _ram(self) -> None:
        regions = self.vm.memory.regions
        self._send(sections.encode(RamLayout(regions)))
        self._raw("ram", sum(region.size for region in regions))
        for group in ram.pack(ram.runs(self.vm.memory, regions)):
            self._send(sections.encode_ram(group, self._level), "ram")

    def _raw(self, what: str, size: int) -> None:
        self.report.raw_bytes[what] = self.report.raw_bytes.get(what, 0) + size

    def _send(self, section: Section, what: str = "other") -> None:
        stored = self.report.stored_bytes
        stored[what] = stored.get(what, 0) + len(section.stored)
        self._out.add(self._frames.send(section))


def save(vm: Vm, out: Sink, *, host: HostSummary, pause: Callable[[], None], prologue: Prologue | None = None,
         level: int = codec.DEFAULT_LEVEL, opaque: Sequence[OpaqueState] = (), threads: int = 0) -> Report:
    """Save a VM onto a sink and leave it paused.

    Args:
        vm: where to read. out: takes the bytes in order; never asked to seek.
        host: for the stream's host section: `backend.summary()`.
        pause: called once, after the prologue was written: stops the vCPUs (`vm.pause`, or the VMM's own).
        prologue: from `capture_prologue`, taken earlier. KVM lets nobody read a vCPU that runs, so a guest that is
            running needs it; without it the prologue is read here, after `pause`.
        level: zstd level; 0 stores.
        opaque: device state that the caller emulates itself; all together at most `limits.MAX_OPAQUE` bytes.
        threads: that read registers; 0 leaves it to the backend. More than one needs the compiled batch.

    Raises: BackendError, OutputError. The VM is left paused then, too. UsageError for opaque state over the format's
        limits: nothing was written, and `pause` was not called.
    """
    sections.encode_opaque(opaque)
    saver = Saver(vm, out, host=host, level=level, threads=threads)
    if prologue is None:
        with saver.report.phase("pause"):
            pause()
        saver.prologue()
    else:
        saver.prologue(prologue)
        saver.ready()
        with saver.report.phase("pause"):
            pause()
    return saver.state(opaque=opaque)
