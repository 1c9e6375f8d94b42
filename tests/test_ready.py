"""What both sides do ahead of the pause changes nothing but the time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import migstream
from migstream import frames
from migstream.backends.base import Vm
from migstream.backends.faulty import Fault, FaultyBackend, Kind
from migstream.demo import run
from migstream.errors import BackendError, Corrupt, DoesNotFit, RestoreFailed, Truncated, UsageError
from migstream.frames import FrameWriter
from migstream.model import Arch, Bank, Layout, OpaqueState, Phase, Scope, Slot
from migstream.native import compiled
from migstream.reader import StreamReader
from migstream.registers import ids, x86_64
from migstream.report import Report
from migstream.sections import EncodedBank, encode_bank
from migstream.transport import Restorer, capture, capture_prologue, save
from migstream.transport.saver import Saver
from migstream.verdicts.policy import NO_POLICY, parse
from tests.strategies import chunk_sizes

pytestmark = pytest.mark.sim

LSTAR, PAT = ids.msr_id(0xC0000082), ids.msr_id(0x277)
AT = Layout(Scope.VCPU, Phase.STATE, (Slot(LSTAR, 8),))


@pytest.fixture
def vm() -> Iterator[Vm]:
    with migstream.open_backend("sim").create(run.machine(Arch.X86_64, 3, 4 << 20)) as made:
        made.create_vcpus()
        yield made


def test_the_stream_and_the_target_are_the_same(vm: Vm) -> None:
    backend, out, plain = migstream.open_backend("sim"), io.BytesIO(), io.BytesIO()
    assert vm.write(AT, 0, np.array([[0x1000], [0x2000], [0x3000]], np.uint64)) == []
    save(vm, plain, host=backend.summary(), pause=vm.pause, prologue=capture_prologue(vm))
    saver = Saver(vm, out, host=backend.summary())
    with Restorer(backend, readback=True) as restorer:
        assert not restorer.ready(), "nothing came yet"
        saver.prologue()
        restorer.feed(out.getvalue())
        written = {name: dict(row) for name, row in restorer.report.writes.items()}
        assert restorer.ready()
        assert restorer.ready(), "a second time is nothing"
        assert restorer.report.writes == written
        saver.ready()
        early = len(out.getvalue())
        saver.state()
        restorer.feed(out.getvalue()[early:])
        target, report = restorer.finish()
    with target:
        values = np.zeros((3, 1), np.uint64)
        assert target.read(AT, 0, values) == []
        assert values[:, 0].tolist() == [0x1000, 0x2000, 0x3000]
    assert len(out.getvalue()) == len(plain.getvalue())
    assert [difference for difference in report.differs if not difference.reason] == []


def test_state_that_no_verdict_goes_by_is_foreseen(vm: Vm) -> None:
    """Any XMM registers, but a component that the host has not; with a policy nothing but the very same value."""
    policy = parse('migstream_policy = 1\n[[tolerate]]\nregister = "MSR_STAR"\nreason = "a trial"\n'
                   'guest_notices = true\n')
    for chosen, expected in ((NO_POLICY, True), (policy, False)):
        out = io.BytesIO()
        saver = Saver(vm, out, host=migstream.open_backend("sim").summary())
        with Restorer(migstream.open_backend("sim"), policy=chosen) as restorer:
            saver.prologue()
            restorer.feed(out.getvalue())
            assert restorer.ready()
            plan = restorer._plan
            assert plan is not None
            number, step = next((n, s) for n, s in plan.in_the_pause.items() if x86_64.XSAVE.id in s.source.index)
            values = np.zeros((3, step.source.row_words), np.uint64)
            assert vm.read(step.source, 0, values) == []
            assert plan._is_foreseen(number, Bank(step.source, 0, values))
            start = step.source.offsets[step.source.index[x86_64.XSAVE.id]]
            values[:, start + 20:start + 52] = 0x1234_5678_9ABC_DEF0
            assert plan._is_foreseen(number, Bank(step.source, 0, values)) == expected
            values[1, start + 64] |= np.uint64(1 << 62)
            assert not plan._is_foreseen(number, Bank(step.source, 0, values))


def test_a_value_that_was_not_foreseen_is_judged(vm: Vm) -> None:
    """The plan has seen a fresh vCPU's PAT; one vCPU's other one, of no type that there is, is found at the pause."""
    backend, out = migstream.open_backend("sim"), io.BytesIO()
    saver = Saver(vm, out, host=backend.summary())
    with Restorer(backend) as restorer:
        saver.prologue()
        restorer.feed(out.getvalue())
        assert restorer.ready()
        plan = restorer._plan
        assert plan is not None
        number, step = next((n, s) for n, s in plan.in_the_pause.items() if PAT in s.source.index)
        assert number in plan.foreseen
        values = np.zeros((3, step.source.row_words), np.uint64)
        assert vm.read(step.source, 0, values) == []
        assert plan.at_the_pause(number, Bank(step.source, 0, values)) is step
        values[2, step.source.offsets[step.source.index[PAT]]] = 2
        with pytest.raises(DoesNotFit, match="MSR_IA32_CR_PAT"):
            plan.at_the_pause(number, Bank(step.source, 0, values))


# The blackout's banks by the way of their own (`reader.take_banks`), and by the other


class Half:
    """A save whose prologue a restorer has, both ready for the pause."""

    def __init__(self, vm: Vm, **options: Any) -> None:
        self.out, self.backend = io.BytesIO(), migstream.open_backend("sim")
        self.saver = Saver(vm, self.out, host=self.backend.summary())
        self.restorer = Restorer(self.backend, **options)
        self.saver.prologue()
        self.restorer.feed(self.out.getvalue())
        self.early = len(self.out.getvalue())

    def ready(self) -> None:
        """Both."""
        assert self.restorer.ready()
        self.saver.ready()

    def late(self, **options: Any) -> bytes:
        """What is written in the pause."""
        self.saver.state(**options)
        return self.out.getvalue()[self.early:]

    def finish(self, late: bytes, sizes: Sequence[int] = ()) -> tuple[list[int], Report]:
        """Feed in these sizes, then the rest; the target's LSTARs then, and the report."""
        position = 0
        with self.restorer:
            for size in (*sizes, len(late)):
                self.restorer.feed(late[position:position + size])
                position += size
            target, report = self.restorer.finish()
            with target:
                return [int(value) for bank in capture(target, AT) for value in bank.values[:, 0]], report


def write_some(vm: Vm) -> None:
    """Values that a fresh vCPU has not."""
    assert vm.write(AT, 0, np.array([[0x1000], [0x2000], [0x3000]], np.uint64)) == []


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of each bank that took the way of its own."""
    taken: list[int] = []
    original = StreamReader.take_banks

    def watched(self: StreamReader) -> list[int]:
        numbers = original(self)
        taken.extend(numbers)
        return numbers

    monkeypatch.setattr(StreamReader, "take_banks", watched)
    return taken


def compared(report: Report) -> list[Any]:
    """What a report says, but times."""
    return [report.writes, report.refused, list(map(str, report.verdicts)), report.differs, report.notes, report.bytes]


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here")
@given(sizes=chunk_sizes)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_the_pause_arrives(vm: Vm, way: list[int], sizes: list[int]) -> None:
    write_some(vm)
    way.clear()
    slow, fast = Half(vm, readback=True), Half(vm, readback=True)
    fast.ready()
    late = slow.late(ram_too=False)
    expected, one = slow.finish(late)
    assert way == []
    found, other = fast.finish(late, sizes)
    assert found == expected == [0x1000, 0x2000, 0x3000]
    assert compared(other) == compared(one)
    assert other.readback == one.readback > 100
    if not sizes:  # a piece that ends behind a header sends that bank the other way
        assert len(way) == sum(not layout.phase.prologue for layout in fast.restorer.reader.layouts)


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here")
def test_ram_and_opaque_state_go_the_other_way(vm: Vm, way: list[int]) -> None:
    half = Half(vm)
    half.ready()
    late = half.late(opaque=[OpaqueState("disk", b"1")])
    _, report = half.finish(late)
    assert len(way) == 4
    assert report.opaque == [OpaqueState("disk", b"1")]


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here")
@pytest.mark.parametrize("ready", [False, True])
def test_a_value_that_no_verdict_foresaw_is_refused_on_both_ways(vm: Vm, way: list[int], ready: bool) -> None:
    half = Half(vm)
    if ready:
        half.ready()
    late = bytearray(half.late(ram_too=False))
    layouts = half.restorer.reader.layouts
    number, layout = next((n, layout) for n, layout in enumerate(layouts) if PAT in layout.index)
    banks = [Bank(at, 0, np.zeros((3 if at.scope == Scope.VCPU else 1, at.row_words), np.uint64)) for at in layouts]
    reader = StreamReader()
    reader.feed(half.out.getvalue())
    for section, item in iter(reader.next, None):
        if isinstance(item, EncodedBank) and section.layout == number:
            place, banks[number] = section.offset - half.early, item.decode()
    banks[number].values[2, layout.offsets[layout.index[PAT]]] = 2
    section = encode_bank(banks[number], number, worth=1 << 20)
    forged = b"".join(FrameWriter(Arch.X86_64).send(section))
    late[place:place + len(forged)] = forged
    with half.restorer, pytest.raises(RestoreFailed, match="MSR_IA32_CR_PAT"):
        half.restorer.feed(bytes(late))
    assert number not in way


def test_a_register_of_the_vm_that_changed_by_the_pause(vm: Vm) -> None:
    """WALL_CLOCK was sent early: an update goes before the banks, which then are written one by one."""
    at = Layout(Scope.VM, Phase.FEATURE, (Slot(ids.msr_id(0x11), 8),))
    results = []
    for ready in (False, True):
        assert vm.write(at, 0, np.zeros((1, 1), np.uint64)) == []
        half = Half(vm)
        if ready:
            half.ready()
        assert vm.write(at, 0, np.array([[0x5000]], np.uint64)) == []
        found, report = half.finish(half.late(ram_too=False))
        results.append((found, compared(report)))
        assert report.writes["update"] == {Scope.VM: 2, Scope.VCPU: 0}, "the old MSR and the new one are the same"
    assert results[0] == results[1]


@pytest.mark.parametrize("per_vcpu", [False, True])
def test_writes_are_counted_alike(vm: Vm, per_vcpu: bool) -> None:
    reports = []
    for ready in (False, True):
        half = Half(vm, vm_scope_per_vcpu=per_vcpu)
        if ready:
            half.ready()
        reports.append(half.finish(half.late(ram_too=False))[1])
    assert compared(reports[0]) == compared(reports[1])
    assert reports[0].writes["interrupts"][Scope.VM] == 4 * (3 if per_vcpu else 1)


def test_a_refusal_in_the_pause_is_named_on_both_ways(vm: Vm) -> None:
    fault = Fault("write", Kind.ERRNO, register=LSTAR, vcpu=1, nth=1)
    write_some(vm)
    for ready in (False, True):
        half = Half(vm)
        half.restorer = Restorer(FaultyBackend(half.backend, fault))
        half.restorer.feed(half.out.getvalue())
        if ready:
            half.ready()
        with pytest.raises(RestoreFailed, match=r"vCPU 1: MSR_LSTAR: .*EIO"):
            half.finish(half.late(ram_too=False))


def test_ready_is_nothing_once_the_pause_is_there(vm: Vm) -> None:
    """What came with it is in the memory that getting ready would use."""
    half = Half(vm, readback=True)
    write_some(vm)
    late = half.late()
    half.restorer.feed(late[:-16])
    assert not half.restorer.ready()
    found, report = half.finish(late[-16:])
    assert found == [0x1000, 0x2000, 0x3000]
    assert "ready" not in report.times


def test_an_update_alone_is_the_pause(vm: Vm) -> None:
    at = Layout(Scope.VM, Phase.FEATURE, (Slot(ids.msr_id(0x11), 8),))
    half = Half(vm)
    assert vm.write(at, 0, np.array([[0x5000]], np.uint64)) == []
    late = half.late(ram_too=False)
    reader = StreamReader()
    reader.feed(half.out.getvalue())
    ends = [section.offset - half.early + 48 + -(-len(section.stored) // 8) * 8
            for section, item in iter(reader.next, None) if isinstance(item, EncodedBank) and item.update]
    half.restorer.feed(late[:ends[-1]])
    assert not half.restorer.ready()
    assert half.finish(late[ends[-1]:])[1].writes["update"][Scope.VM] == 2


def test_an_answer_that_can_not_be_is_not_saved(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the pause the host says of one chip that it is another."""
    half = Half(vm)
    original = vm.read

    def lying(layout: Layout, first: int, values: Any) -> Any:
        refused = original(layout, first, values)
        if (column := layout.index.get(x86_64.PIC_SLAVE.id)) is not None:
            values[0, layout.offsets[column]] = 7
        return refused

    monkeypatch.setattr(vm, "read", lying)
    with pytest.raises(BackendError, match="PIC_SLAVE"):
        half.saver.state(ram_too=False)
    assert not half.saver._frames.ended


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here")
@pytest.mark.parametrize("vcpus", [1, 3, 40])
def test_a_save_is_the_same_without_the_compiled_part(vcpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its clocks: which sections, how they are stored, and what the report says of them."""
    backend, found = migstream.open_backend("sim"), []
    for module in (compiled, None):
        monkeypatch.setattr(frames, "compiled", module)
        with backend.create(run.machine(Arch.X86_64, vcpus, 4 << 20)) as made:
            made.create_vcpus()
            half = Half(made)
            half.saver.ready()
            half.saver.state(ram_too=False)
            reader = StreamReader()
            reader.feed(half.out.getvalue())
            stored = [(section.title, section.codec, section.filter, section.raw_length)
                      for section, _ in iter(reader.next, None)]
            banks = sum(len(section.stored) for section, item in _items(half.out) if isinstance(item, EncodedBank))
            assert half.saver.report.stored_bytes["registers"] == banks
            found.append((stored, half.saver.report.writes, half.saver.report.raw_bytes))
    assert found[0] == found[1]


def _items(out: io.BytesIO) -> list[Any]:
    reader = StreamReader()
    reader.feed(out.getvalue())
    return list(iter(reader.next, None))


@pytest.mark.parametrize("missing", [1, 16, 64, 1000, None])
def test_half_a_stream_is_no_vm(vm: Vm, missing: int | None) -> None:
    for readback in (False, True):
        half = Half(vm, readback=readback)
        half.ready()
        late = half.late(ram_too=False)
        with half.restorer, pytest.raises(Truncated):
            half.restorer.feed(late[:-missing] if missing else b"")
            half.restorer.finish()


def test_a_stream_that_was_wrong_is_no_vm_and_a_vm_is_handed_over_once(vm: Vm) -> None:
    half = Half(vm)
    half.ready()
    late = bytearray(half.late(ram_too=False))
    late[100] ^= 1
    with half.restorer:
        for use in (lambda: half.restorer.feed(bytes(late)), half.restorer.finish):
            with pytest.raises(Corrupt, match="checksum"):
                use()
    half = Half(vm)
    half.finish(half.late(ram_too=False))
    with pytest.raises(UsageError, match="handed the VM over"):
        half.restorer.finish()


def test_a_saver_that_is_used_out_of_order(vm: Vm) -> None:
    saver = Saver(vm, io.BytesIO(), host=migstream.open_backend("sim").summary())
    with pytest.raises(UsageError, match=r"prologue\(\) first"):
        saver.state()
    with migstream.open_backend("sim").create(run.machine(Arch.X86_64, 2, 4 << 20)) as other:
        other.create_vcpus()
        with pytest.raises(UsageError, match=r"of another VM: vcpu/\w+ of 2 vCPUs, this one has 3"):
            saver.prologue(capture_prologue(other))
    saver.prologue()
    with pytest.raises(UsageError, match="already"):
        saver.prologue()


@pytest.mark.parametrize("arch", list(Arch))
def test_without_the_compiled_part_it_is_the_same_way_for_all(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty bank is no bank of a guest (a chip's state names the chip): getting ready must not mind."""
    monkeypatch.setattr(frames, "compiled", None)
    backend = migstream.open_backend(KERNELS[arch])
    with backend.create(run.machine(arch, 3, 4 << 20)) as made:
        made.create_vcpus()
        out = io.BytesIO()
        saver = Saver(made, out, host=backend.summary())
        with Restorer(backend, readback=True) as restorer:
            saver.prologue()
            restorer.feed(out.getvalue())
            saver.ready()
            assert restorer.ready()
            early = len(out.getvalue())
            saver.state()
            restorer.feed(out.getvalue()[early:])
            target, report = restorer.finish()
            target.close()
    assert restorer.reader.frames.ended
    assert [difference for difference in report.differs if not difference.reason] == []


KERNELS = {Arch.X86_64: "sim", Arch.ARM64: "sim:arm64-6.12"}
