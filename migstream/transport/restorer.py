"""Restoring: plan from the prologue, make the VM, write banks as they arrive, account for every refusal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migstream import limits, ram, sections
from migstream.backends.base import Backend, Prepared, Refusal, Vm, check_threads
from migstream.contract import Contract
from migstream.errors import DoesNotFit, MigstreamError, RestoreFailed, UsageError
from migstream.frames import FrameReader, FrameWriter, Section, SmallBank
from migstream.host import profiles
from migstream.model import Bank, Layout, OpaqueState, Phase, Scope
from migstream.plan import Plan, Step, added_bank, make_plan, scope_notes
from migstream.reader import StreamReader
from migstream.registers import arm64_ids, ids
from migstream.report import Report
from migstream.sections import EncodedBank, Item, RamPages
from migstream.transport import readback as check
from migstream.transport.lost import settle
from migstream.transport.streams import Source, read_chunks
from migstream.transport.tsc import restore_offsets
from migstream.transport.written import Written, columns, repeats
from migstream.verdicts.policy import NO_POLICY, Policy

if TYPE_CHECKING:
    from migstream.model import Words


@dataclass(frozen=True)
class _Together:
    """All late banks, to be written by one call, and what to say of them then: nothing is made in the pause.

    Attributes:
        done: what will be written, and what won't. banks: all of them. names: of those that are written, among the
            report's times. counted: their registers, for the report.
    """

    done: list[Written]
    banks: list[Bank]
    write: Prepared
    names: list[str]
    counted: Report

    @classmethod
    def of(cls, vm: Vm, done: list[Written]) -> _Together | None:
        """None where some of the VM's would have to be written before some of a vCPU's."""
        written = [one for one in done if one.values is not None]
        of_vm = [one.target.scope == Scope.VM for one in written]
        if of_vm != sorted(of_vm):
            return None
        counted = Report()
        for one in written:
            counted.count(one.target.step, one.target.scope, one.bank.rows * len(one.target.slots))
        write = vm.writing([one.bank for one in written])
        return cls(done, [one.bank for one in done], write, [one.target.timed_as for one in written], counted)


class Restorer:
    """One restore, incremental: `feed` it the stream's bytes as they arrive, or `take` the sections of its reader.

    A context manager: the VM is closed unless `finish()` gave it to the caller.
    """

    def __init__(self, backend: Backend, *, readback: bool = False, policy: Policy = NO_POLICY,
                 threads: int = 0, vm_scope_per_vcpu: bool = False) -> None:
        """See `restore`. Raises: UsageError."""
        self.reader = StreamReader()
        self._threads = check_threads(threads)
        self.report = Report(backend.stopwatch)
        self._backend, self._readback, self._per_vcpu = backend, readback, vm_scope_per_vcpu
        self._policy = policy
        self._plan: Plan | None = None
        self._waiting: list[tuple[int, Bank]] = []
        self._vm: Vm | None = None
        self._complete = self._is_ready = self._handed_over = False
        self._room: dict[int, Words] = {}
        self._late: dict[int, Written] = {}
        self._together: _Together | None = None
        self._written: list[Written] = []
        self._refused: list[tuple[Refusal, Written]] = []

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._vm is not None:
            self._vm.close()

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes of the stream as they come, at most `frames.MAX_FEED` at once, and act on all whole sections.

        Raises: as `take`.
        """
        self.reader.feed(data)
        if self._late and self._vm is not None:
            self._vm.warm()
        while True:
            self._take_expected()
            if (found := self.reader.next()) is None:
                return
            self.take(*found)

    def _take_expected(self) -> None:
        """Banks that came as `ready` foresaw: their values are in place, checked and judged by one compiled call."""
        if not self._late:
            return
        with self.report.phase("decode"):
            numbers = self.reader.take_banks()
        if not numbers:
            return
        assert self._vm is not None and self._plan is not None
        if self._together is not None and len(numbers) == len(self._together.banks):
            self._late = {}
            self._plan.came.extend(self._together.banks)
            self._write_together(self._together)
            return
        for number in numbers:
            done = self._late.pop(number)
            self._plan.came.append(done.bank)
            self._write(self._vm, done)

    def take(self, section: Section, item: Item) -> None:
        """Act on one section. Raises: DoesNotFit before anything was made; StreamError, RestoreFailed, BackendError."""
        if isinstance(item, EncodedBank):
            self._take_bank(section.layout, item)
        elif isinstance(item, RamPages):
            with self.report.phase("ram"):
                ram.load(self._with_vcpus(self._ready()).memory, item.runs)
        elif isinstance(item, OpaqueState):
            self.report.opaque.append(item)

    def _take_bank(self, number: int, encoded: EncodedBank) -> None:
        """Decode where the kernel will be pointed to; the prologue's values wait until all of them can be judged."""
        early = encoded.layout.phase.prologue
        vm = None if early else self._with_vcpus(self._ready())
        if vm is not None and encoded.layout.scope == Scope.VCPU:
            vm.warm()
        with self.report.phase("prologue decode" if early else "decode"):
            bank = encoded.decode(self._place(number, encoded))
        if early and self._plan is None:
            self._prologue(number, bank)
        else:
            self._bank(vm or self._ready(), number, bank)

    def ready(self) -> bool:
        """Do what can be done ahead of the pause, once the prologue is written: `restore` calls it after each chunk.

        Looks at what the fresh vCPUs have, so that the same need not be written in the pause, and goes once through
        all that will be done with the values. Nothing comes of it once the pause is there. Returns whether it was done.
        Raises: BackendError.
        """
        if self._vm is None or self._plan is None or self._is_ready or self.reader.paused:
            return self._is_ready
        self._is_ready = True
        with self.report.phase("ready"):
            vm = self._with_vcpus(self._vm)
            fresh = vm.take_stock([step.target for step in self._plan.in_the_pause.values()
                                   if step.target is not None and step.target.scope == Scope.VCPU])
            self._rehearse(self._plan, fresh)
            self._expect(self._plan, vm)
            vm.warm([step.target for step in self._plan.in_the_pause.values() if step.target is not None])
        return True

    def _rehearse(self, plan: Plan, fresh: Mapping[Layout, Words]) -> None:
        """Decode and judge a bank of zeros of each late layout, so that what the real one takes is made by then.

        A fresh vCPU's values are judged: those that the guest has not changed need not be looked at again.
        """
        assert self._vm is not None
        frames, reader = FrameWriter(self._vm.machine.arch), FrameReader()
        reader.feed(frames.begin())
        for number, step in plan.in_the_pause.items():
            values = self._room.get(number)
            if values is None:
                continue
            with suppress(MigstreamError):
                for buffer in frames.send(sections.encode_bank(Bank(step.source, 0, values), number)):
                    reader.feed(buffer)
                section = reader.next_section()
                assert section is not None
                item = sections.decode(section, self.reader.layouts)
                assert isinstance(item, EncodedBank)
                bank = item.decode(values)
                if step.as_saved and step.source in fresh:
                    plan.foresee(number, Bank(step.source, 0, fresh[step.source]))
                elif step.target is not None:
                    step.fit(bank.values)

    def _expect(self, plan: Plan, vm: Vm) -> None:
        """Have the reader put late banks where they will be written from, but those whose step may yet change."""
        expected: list[SmallBank | None] = []
        for number, step in plan.in_the_pause.items():
            bounds, room = plan.bounds(number), self._room.get(number)
            if bounds is None or room is None or not (step.target is None or step.as_saved):
                expected.append(None)
                continue
            bank = Bank(step.source, 0, room)
            self._late[number] = Written(step, step.target or step.source, bank, room if step.target else None)
            expected.append(sections.small_bank(bank, number, bounds))
        self.reader.expect(expected)
        if all(expected) and not self._per_vcpu:
            self._together = _Together.of(vm, [*self._late.values()])

    def finish(self) -> tuple[Vm, Report]:
        """Settle refusals, read back when asked, and hand over the VM: complete, paused, the caller's to close.

        Raises: RestoreFailed, for what the target refused and for what read back different; DoesNotFit; Truncated
            before the end of the stream, or the error that it had; UsageError the second time.
        """
        if self._handed_over:
            raise UsageError("finish() has handed the VM over already")
        self.reader.end_of_input()
        vm = self._with_vcpus(self._ready())
        if vm.machine.vcpus > 1:
            with self.report.phase("clock (vcpu)"):
                restore_offsets(vm, self._written, self.report)
        refused = self._settle(vm)
        self.report.bytes = self.reader.frames.offset
        self.report.notes += [f"skipped unknown section {s.kind!r} version {s.version}" for s in self.reader.skipped]
        if self._readback:
            with self.report.phase("readback"):
                check.compare(vm, self._written, self.report)
        if refused:
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise RestoreFailed(f"the target refused {refused[0]}{more}; the VM was destroyed", self.report)
        if self._readback:
            settle(self.report, self._policy)
        self._vm, self._handed_over = None, True
        return vm, self.report

    def _prologue(self, number: int, bank: Bank) -> None:
        """Keep banks until the plan can judge all their values: with the last one, before the pause."""
        self._waiting.append((number, bank))
        rows = sum(bank.rows for _, bank in self._waiting)
        assert self.reader.machine is not None
        vcpus = self.reader.machine.vcpus
        if rows == sum(vcpus if layout.scope == Scope.VCPU else 1
                       for layout in self.reader.layouts if layout.phase.prologue):
            self._ready()

    def _ready(self) -> Vm:
        """The VM with all its prologue; made when the first thing comes that has to be put into it, if it fits."""
        if self._vm is None:
            machine = self.reader.machine
            if machine is None:
                raise UsageError("the stream has not begun")
            with self.report.phase("plan"):
                self._judge([bank for _, bank in self._waiting])
            with self.report.phase("create"):
                self._vm = self._backend.create(machine)
                self._vm.threads = self._threads
            for number, bank in self._waiting:
                self._bank(self._vm, number, bank)
            self._waiting.clear()
            self._add(self._vm)
            self._close_lengths(self._vm)
        return self._vm

    def _judge(self, banks: list[Bank]) -> None:
        """Make the plan; nothing has been touched. Raises: DoesNotFit, PolicyError."""
        reader, told = self.reader, self._backend.profile()
        assert reader.machine is not None
        contract = Contract.of(
            reader.machine.arch, banks, kernel=reader.host.kernel if reader.host else "",
            vcpu_features=int(reader.machine.devices.get("vcpu_features", 0)), behaviour=reader.behaviour)
        plan = make_plan(reader.machine, reader.layouts, told.completed_by(profiles.recorded(told)), banks=banks,
                         contract=contract, policy=self._policy)
        self._plan = plan.require()
        self.report.verdicts = [v for v in plan.verdicts if v.reason]
        self.report.notes += [*scope_notes(reader.layouts, told), *plan.notes]

    def _add(self, vm: Vm) -> None:
        """Write the feature registers that the saving kernel did not have as what it behaved as."""
        assert self._plan is not None
        for scope in Scope if self._plan.additions else ():
            found = added_bank(self._plan.additions, scope, vm.machine.vcpus)
            if found is not None:
                step, bank = found
                self._with_vcpus(vm)
                self._write(vm, Written(step, step.source, bank, bank.values))

    def _close_lengths(self, vm: Vm) -> None:
        """Vector lengths that a policy kept from being written become the host's: asking for the list closes them."""
        assert self._plan is not None
        if any(v.slot.id == arm64_ids.SVE_VLS and v.target is None for v in self._plan.verdicts):
            self._with_vcpus(vm).layouts()

    def _with_vcpus(self, vm: Vm) -> Vm:
        if not self._complete:
            with self.report.phase("create"):
                vm.create_vcpus()
                self._get_ready(vm)
            self._complete = True
        return vm

    def _bank(self, vm: Vm, number: int, bank: Bank) -> None:
        step = self._step(number, bank)
        if (step.source.scope, step.source.phase) != (Scope.VM, Phase.CREATE):
            self._with_vcpus(vm)
        if step.target is None:
            self._write(vm, Written(step, step.source, bank, None))
        elif bank.update:
            self._update(vm, Written(step, step.target, bank, step.fit(bank.values)))
        else:
            self._write(vm, Written(step, step.target, bank, step.fit(bank.values)))

    def _step(self, number: int, bank: Bank) -> Step:
        """The plan's step, judged again where it depends on a value that came only now. Raises: RestoreFailed."""
        assert self._plan is not None
        try:
            step = self._plan.at_the_pause(number, bank)
        except DoesNotFit as error:
            raise RestoreFailed(f"at the pause: {error.reasons[0]}; the VM was destroyed", self.report) from error
        if step is not self._plan.steps[number]:
            again = {v.slot.id for v in step.verdicts}
            kept = [v for v in self.report.verdicts if not (v.pending and v.slot.id in again)]
            known = {v.slot.id for v in kept}
            self.report.verdicts = [*kept, *(v for v in step.verdicts if v.reason and v.slot.id not in known)]
        return step

    def _get_ready(self, vm: Vm) -> None:
        """Before the pause: programs, and touched memory for what comes after it (a first touch is slow)."""
        import numpy as np

        assert self._plan is not None
        late = self._plan.in_the_pause
        vm.prepare([step.target for step in late.values() if step.target is not None])
        for number, step in late.items():
            shape = vm.machine.vcpus if step.source.scope == Scope.VCPU else 1, step.source.row_words
            if shape[0] * shape[1] * 8 <= limits.MAX_MATRIX:
                self._room[number] = np.empty(shape, np.uint64)
                self._room[number].fill(0)

    def _place(self, number: int, encoded: EncodedBank) -> Words | None:
        """The rows of a bank in the memory that was made for its layout."""
        room = self._room.get(number)
        return None if room is None else room[encoded.first_vcpu:encoded.first_vcpu + encoded.rows]

    def _write_together(self, late: _Together) -> None:
        self._written += late.done
        refused = late.write()
        times, ns = self.report.times, late.write.ns
        for k, name in enumerate(late.names):
            times[name] = times.get(name, 0) + ns[k]
        self.report.add(late.counted)
        for no in refused:
            self._refused.append((no, next(done for done in late.done if no.register in done.target.index)))

    def _write(self, vm: Vm, done: Written) -> None:
        """Write what is to be written."""
        self._written.append(done)
        if done.values is None:
            return
        times = repeats(vm, done.target, self._per_vcpu) if self._per_vcpu else 1
        with self.report.phase(done.target.timed_as):
            for _ in range(times):
                refused = vm.write(done.target, done.bank.first_vcpu, done.values)
        self.report.count(done.target.step, done.target.scope, done.bank.rows * len(done.target.slots) * times)
        self._refused += [(no, done) for no in refused]

    def _update(self, vm: Vm, now: Written) -> None:
        """Write the registers that changed between prologue and pause, and these alone."""
        before = next(w for w in self._written if w.step.source == now.step.source)
        assert now.values is not None and before.values is not None
        differ = now.values[0] != before.values[0]
        changed = [c for c in range(len(now.target.slots)) if differ[columns(now.target, c)].any()]
        self._written.remove(before)
        self._written.append(now)
        for column in changed:
            layout = Layout(now.target.scope, now.target.phase, (now.target.slots[column],))
            part = now.values[:, columns(now.target, column)].copy()
            refused = vm.write(layout, 0, part)
            self.report.count("update", Scope.VM, 1)
            self._refused += [(no, now) for no in refused]

    def _settle(self, vm: Vm) -> list[str]:
        """A refused write lost nothing where the register has the value anyway. Return the others, a line each."""
        fatal = []
        for refusal, done in self._refused:
            reason = _harmless(vm, refusal, done)
            self.report.refused.append((refusal, reason))
            if not reason:
                fatal.append(str(refusal))
        return fatal


def _harmless(vm: Vm, refusal: Refusal, done: Written) -> str:
    """Why a refused write lost nothing; "" where it did."""
    import numpy as np

    assert done.values is not None
    column = done.target.index[refusal.register]
    alone = Layout(done.target.scope, done.target.phase, (done.target.slots[column],))
    actual = np.zeros((1, alone.row_words), np.uint64)
    unread = vm.read(alone, refusal.vcpu or 0, actual)
    row = 0 if refusal.vcpu is None else refusal.vcpu - done.bank.first_vcpu
    if not unread and (actual[0] == done.values[row, columns(done.target, column)]).all():
        return "the register has this value already"
    return _RESTORED_OTHERWISE.get(refusal.register, "")


_RESTORED_OTHERWISE = {ids.msr_id(0x4000_0020): "KVM_CLOCK restores it"}
"""Registers whose refusal loses nothing (HV_X64_MSR_TIME_REF_COUNT). Any other clock that can't be set would jump."""


def restore(source: Source, backend: Backend, *, readback: bool = False, policy: Policy = NO_POLICY,
            threads: int = 0, vm_scope_per_vcpu: bool = False) -> tuple[Vm, Report]:
    """Restore a stream into a fresh VM, which is complete and paused; `vm.start()` lets it run.

    Args:
        source: read in order to the end of the stream. backend: where the VM is made.
        readback: read every register back and compare. What differs for no known reason was lost: the VM is closed and
            RestoreFailed has the report, unless the policy tolerates the register and says that a guest may notice;
            then the VM is handed over and `report.lossy` is true. Without it nobody looks.
        policy: what the operator tolerates (`verdicts.policy`).
        threads: that write registers; 0 leaves it to the backend. More than one needs the compiled batch.
        vm_scope_per_vcpu: write VM-scoped registers once for each vCPU, as a VMM that knows no scope does: the same
            values again and again. For measuring; not for a VM with an ITS.

    Raises: StreamError and below, PolicyError, DoesNotFit (nothing was made), RestoreFailed (the VM was closed),
        BackendError, UsageError.
    """
    with Restorer(backend, readback=readback, policy=policy, threads=threads,
                  vm_scope_per_vcpu=vm_scope_per_vcpu) as restorer:
        for data in read_chunks(source, restorer.reader):
            restorer.feed(data)
            restorer.ready()
            if vm_scope_per_vcpu and restorer.reader.machine and "its" in restorer.reader.machine.devices:
                raise UsageError("vm_scope_per_vcpu: an ITS takes its tables from RAM once: a second write spoils them")
        return restorer.finish()
