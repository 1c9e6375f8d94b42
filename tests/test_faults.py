"""Restores and saves under every single fault of a small VM: what comes of each, counted.

A restore with read-back ends as one of two: the VM is right and the report says nothing else; or it failed with 11 or
69, the report names the register and vCPU of the fault, and every VM that was made is closed. A value that reads back
different is handed over only to who accepts it by name (exit status 10). A save ends with a whole stream or none.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from migstream.backends import open_backend
from migstream.backends.base import Backend
from migstream.backends.faulty import Fault, FaultyBackend, Kind, parse
from migstream.cli import main
from migstream.demo import run
from migstream.errors import BackendError, MigstreamError, RestoreFailed, UsageError
from migstream.model import Arch, Layout, Phase, Scope, Slot
from migstream.reader import StreamReader
from migstream.registers import arm64, ids, x86_64
from migstream.registers.catalogue import lookup
from migstream.report import Report
from migstream.transport import capture_prologue, open_output, restore, save, verify
from migstream.verdicts.policy import NO_POLICY, Policy
from migstream.verdicts.policy import parse as parse_policy
from tests import faults
from tests.faults import MEMORY, RIGHT, chosen, faults_of, restored, stream, try_all

BACKENDS = [pytest.param("sim", marks=pytest.mark.sim), pytest.param("sim:arm64-7.2", marks=pytest.mark.sim),
            pytest.param("kvm", marks=pytest.mark.kvm)]
VCPUS = 2
LSTAR = ids.msr_id(0xC000_0082)


@pytest.mark.parametrize(("arguments", "status", "words"), [
    (("--backend", "nope"), 64, "no backend 'nope'"), (("--backend", "sim:nope"), 69, "near: sim:"),
    (("--vcpus", "0"), 64, "--vcpus: 0 is not 1"), (("--every", "0"), 64, "--every: 0 is not 1"),
    (("--every", "-3"), 64, "--every: -3 is not 1"), (("--vcpus", "9999999"), 64, "for 9999999 vCPUs"),
])
def test_what_can_not_be_tried_is_one_line(arguments: tuple[str, ...], status: int, words: str,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("faults: ") and words in line


@pytest.mark.parametrize(("name", "vcpus", "every"), [
    pytest.param("sim", 2, 1, marks=pytest.mark.sim),
    pytest.param("sim:x86_64-7.2", 1, 8, marks=pytest.mark.sim),
    pytest.param("sim:arm64-7.2", 1, 8, marks=pytest.mark.sim),
    pytest.param("sim:arm64-5.10", 1, 32, marks=pytest.mark.sim),
    pytest.param("kvm", 1, 1, marks=pytest.mark.kvm),
])
def test_a_restore_under_every_single_fault_is_right_or_can_not_run(name: str, vcpus: int, every: int) -> None:
    """Of the larger ones a part, another in each run; `python -m tests.faults` takes all."""
    counts = try_all(name, vcpus, every, random.SystemRandom().randrange(1 << 32) if every > 1 else 0)
    assert sum(counts.values()) > 100
    if every == 1:  # in a small part there may be none of a kind
        assert counts["lie", "destroyed, 11: read back different"] > 0 and counts["lie", RIGHT] > 0
    assert counted("slow", counts) == {RIGHT}


def counted(kind: str, counts: Counter[tuple[str, str]]) -> set[str]:
    """The outcomes of a kind of fault."""
    return {what for (one, what), _ in counts.items() if one == kind}


SAVED = ("whole", "none")


def save_outcome(backend: Backend, fault: Fault, folder: Path) -> str:
    """What a save to a file under a fault ended in."""
    path = folder / "guest.mig"
    path.unlink(missing_ok=True)
    faulty = FaultyBackend(backend, fault, sleep=lambda _: None)
    try:
        save_all(faulty, str(path))
    except MigstreamError as error:
        assert isinstance(error, BackendError), f"{fault}: {type(error).__name__}: {error}"
        assert fault.register is None or lookup(fault.register).name in str(error), f"{fault}: {error}"
        assert list(folder.iterdir()) == [], f"{fault}: {list(folder.iterdir())}"
        assert faulty.switch.happened and faulty.switch.open_vms == 0
        return "none"
    assert faulty.switch.happened and faulty.switch.open_vms == 0
    with path.open("rb") as file:
        verify(file, StreamReader())
    return "whole"


def save_all(backend: Backend, path: str) -> None:
    """Make a VM, capture its prologue, save it to a file."""
    with backend.create(run.machine(backend.arch, VCPUS, MEMORY), run.BOARDS[backend.arch].caps) as vm:
        vm.create_vcpus()
        prologue = capture_prologue(vm)
        with open_output(path) as out:
            save(vm, out, host=backend.summary(), pause=vm.pause, prologue=prologue)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_save_under_every_single_fault_is_whole_or_not_there(name: str, tmp_path: Path) -> None:
    backend = open_backend(name)
    faults = faults_of(backend, lambda faulty: save_all(faulty, str(tmp_path / "guest.mig")))
    if name == "kvm":
        faults = [fault for fault in faults if fault.vcpu != 0]
    if name.startswith("sim:"):
        faults = chosen(faults, 8, random.SystemRandom().randrange(1 << 32))
    counts = Counter((fault.kind.value, save_outcome(backend, fault, tmp_path)) for fault in faults)
    print(f"{name}: {len(faults)} faults of a save: {dict(counts)}")
    assert len(faults) > 100
    assert (counted("errno", counts), counted("short", counts)) == ({"none"}, {"none"})
    assert counted("slow", counts) == {"whole"}
    assert "whole" in counted("lie", counts)
    if backend.arch == Arch.X86_64:
        assert "none" in counted("lie", counts), "told only where the answer contradicts itself: counts, selectors"


@pytest.mark.parametrize(("primitive", "nth"), [("start", 1), ("start", 2), ("pause", 1), ("exits", 1), ("enter", 1)])
@pytest.mark.sim
def test_a_primitive_of_running_fails_when_told_and_closes_well(primitive: str, nth: int) -> None:
    backend = FaultyBackend(open_backend("sim"), Fault(primitive, Kind.ERRNO, nth))
    with pytest.raises(BackendError, match=f"{primitive}: EIO"), restored(backend, "sim", VCPUS)[0] as vm:
        for _ in range(nth):
            vm.start()
            vm.exits()
            vm.pause()
            if primitive == "enter":
                vm.enter(0)
    assert backend.switch.happened
    assert backend.switch.open_vms == 0


@pytest.mark.parametrize(("text", "message"), [
    ("explode=EIO", "no primitive 'explode': profile, create"), ("write:NO_SUCH=EIO", "no register 'NO_SUCH'"),
    ("write", "write"), ("write=EFOO", "EFOO"), ("write=lie", "one of a register"),
    ("start:MSR_LSTAR=EIO", "registers"), ("write#0=EIO", "write#0"), ("write#x=EIO", "write#x"), ("", "--fault ''")])
def test_a_fault_that_can_t_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, open_backend("sim").profile())


@pytest.mark.parametrize(("text", "fault"), [
    ("create=ENOMEM", Fault("create", Kind.ERRNO, errno=12)),
    ("read#3=slow", Fault("read", Kind.SLOW, 3)),
    ("write:MSR_LSTAR@1#2=lie", Fault("write", Kind.LIE, 2, LSTAR, 1)),
    ("write:KVM_CLOCK=EINVAL", Fault("write", Kind.ERRNO, 1, x86_64.CLOCK.id, None, 22)),
    ("read:MSR_LSTAR@0=short", Fault("read", Kind.SHORT, 1, LSTAR, 0))])
def test_a_fault_is_read_as_it_is_written(text: str, fault: Fault) -> None:
    profile = open_backend("sim").profile()
    assert parse(text, profile) == fault == parse(str(fault), profile)


@pytest.mark.parametrize(("text", "status", "said"), [
    ("create=ENOMEM", 69, "create: ENOMEM"), ("write:MSR_LSTAR@1=EINVAL", 11, "MSR_LSTAR: write (a fault): EINVAL"),
   
    ("write:MSR_LSTAR@1=lie", 11, "MSR_LSTAR (1 vCPUs from 1): read back different, for no known reason; the VM was"),
    ("read:MSR_LSTAR@1=lie", 0, "right when it was read again"),
    ("write:KVM_CLOCK=EPERM", 11, "KVM_CLOCK"), ("write=slow", 0, ""), ("write:NO_SUCH=EIO", 64, "NO_SUCH"),
    ("start=EINTR", 69, "start: EINTR"), ("start#2=EIO", 64, "did not happen")])
@pytest.mark.sim
def test_replay_with_a_fault_gives_its_exit_status(text: str, status: int, said: str, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "guest.mig"
    path.write_bytes(stream("sim", VCPUS))
    assert main(["replay", str(path), "--backend", "sim", "--readback", "--run", "0", "--fault", text]) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


TOLERATED = """
migstream_policy = 1
[[tolerate]]
register = "MSR_LSTAR"
reason = "this guest makes no system calls"
"""


@pytest.mark.parametrize(("text", "handed_over"), [
    ("", False), (TOLERATED, False), (TOLERATED.replace("LSTAR", "CSTAR") + "guest_notices = true", False),
    (TOLERATED + "guest_notices = true", True)])
@pytest.mark.sim
def test_a_lost_value_is_handed_over_only_where_the_policy_says_so(text: str, handed_over: bool) -> None:
    """By name, and with the word that a guest may notice: otherwise there is no VM, and the report says why."""
    backend = FaultyBackend(open_backend("sim"), Fault("write", Kind.LIE, 1, LSTAR, 1))
    policy: Policy = parse_policy(text) if text else NO_POLICY
    data = io.BytesIO(stream("sim", VCPUS))
    if not handed_over:
        with pytest.raises(RestoreFailed, match=r"MSR_LSTAR .*for no known reason; the VM was destroyed") as caught:
            restore(data, backend, readback=True, policy=policy)
        assert isinstance(caught.value.report, Report)
        assert [one.vcpus for one in caught.value.report.differs if not one.reason] == [(1,)]
    else:
        vm, report = restore(data, backend, readback=True, policy=policy)
        with vm:
            (lost,) = (one for one in report.differs if not one.reason)
            assert report.lossy and (lost.register, lost.vcpus) == (LSTAR, (1,))
            assert str(lost).endswith("(tolerated: this guest makes no system calls)")
    assert backend.switch.open_vms == 0


@pytest.mark.parametrize(("name", "register"), [
    ("sim", x86_64.CLOCK.id), ("sim:arm64-7.2", next(row.id for row in arm64.COUNTERS if row.name == "TIMER_CNT"))])
@pytest.mark.sim
def test_a_clock_that_went_back_is_a_lost_value(name: str, register: int) -> None:
    """A counter runs, so it reads another value; a smaller one means that nobody set it."""
    data = _older(name)
    backend = FaultyBackend(open_backend(name), Fault("write", Kind.LIE, 1, register))
    with pytest.raises(RestoreFailed, match=lookup(register).name):
        restore(io.BytesIO(data), backend, readback=True)
    vm, report = restore(io.BytesIO(data), open_backend(name), readback=True)
    vm.close()
    assert not report.lossy


def _older(name: str) -> bytes:
    """A guest whose clocks have run for a long time."""
    backend, out = open_backend(name), io.BytesIO()
    with backend.create(run.machine(backend.arch, 1, MEMORY)) as vm:
        vm.create_vcpus()
        run.guest_for(backend.arch).install(vm, backend.profile().cpuid, backend.profile().capabilities)
        clocks = [x86_64.CLOCK] if name == "sim" else list(arm64.COUNTERS)
        for row in clocks:
            at = Layout(Scope.VM, Phase.CLOCK, (Slot(row.id, row.size or 8),))
            values = np.zeros((1, at.row_words), np.uint64)
            values[0, 0] = 10**16
            assert vm.write(at, 0, values) == []
        save(vm, out, host=backend.summary(), pause=vm.pause)
    return out.getvalue()
