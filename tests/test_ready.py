"""What both sides do ahead of the pause changes nothing but the time."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest

import migstream
from migstream.backends.base import Vm
from migstream.demo import run
from migstream.errors import DoesNotFit
from migstream.model import Arch, Bank, Layout, Phase, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.transport import Restorer, capture_prologue, save
from migstream.transport.saver import Saver
from migstream.verdicts.policy import NO_POLICY, parse

pytestmark = pytest.mark.sim

LSTAR, PAT = ids.msr_id(0xC0000082), ids.msr_id(0x277)
AT = Layout(Scope.VCPU, Phase.STATE, (Slot(LSTAR, 8),))


@pytest.fixture
def vm() -> Iterator[Vm]:
    with migstream.open_backend("sim").create(run.machine(Arch.X86_64, 3, 4 << 20)) as made:
        made.create_vcpus()
        yield made


def feed(restorer: Restorer, data: bytes) -> None:
    restorer.reader.feed(data)
    while (found := restorer.reader.next()) is not None:
        restorer.take(*found)


def test_the_stream_and_the_target_are_the_same(vm: Vm) -> None:
    backend, out, plain = migstream.open_backend("sim"), io.BytesIO(), io.BytesIO()
    assert vm.write(AT, 0, np.array([[0x1000], [0x2000], [0x3000]], np.uint64)) == []
    save(vm, plain, host=backend.summary(), pause=vm.pause, prologue=capture_prologue(vm))
    saver = Saver(vm, out, host=backend.summary())
    with Restorer(backend, readback=True) as restorer:
        assert not restorer.ready(), "nothing came yet"
        saver.prologue()
        feed(restorer, out.getvalue())
        written = {name: dict(row) for name, row in restorer.report.writes.items()}
        assert restorer.ready()
        assert restorer.ready(), "a second time is nothing"
        assert restorer.report.writes == written
        saver.ready()
        early = len(out.getvalue())
        saver.state()
        feed(restorer, out.getvalue()[early:])
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
            feed(restorer, out.getvalue())
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
        feed(restorer, out.getvalue())
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
