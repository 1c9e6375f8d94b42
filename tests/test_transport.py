"""Saving and restoring over the simulator: the sequence, what changes at the pause, refusals, and pipes."""

from __future__ import annotations

import dataclasses
import io
import os
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pytest

import migstream
from migstream import limits, ram
from migstream.backends.base import Backend, GuestMemory, Refusal, Vm
from migstream.demo import run
from migstream.errors import Corrupt, DoesNotFit, OutputError, RestoreFailed, Truncated, UsageError
from migstream.model import PAGE, Arch, Bank, Klass, Layout, Machine, MemoryRegion, OpaqueState, Phase, Scope, Slot
from migstream.reader import StreamReader
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from migstream.report import Report
from migstream.sections import EncodedBank, encode, encode_opaque
from migstream.transport import Restorer, capture_prologue, read_items, restore, save
from migstream.transport.tsc import restore_offsets
from migstream.transport.written import Written

pytestmark = pytest.mark.sim

WALL_CLOCK = ids.msr_id(0x4B564D00)
LSTAR = ids.msr_id(0xC0000082)


@pytest.fixture
def vm() -> Iterator[Vm]:
    backend = migstream.open_backend("sim")
    with backend.create(run.machine(Arch.X86_64, 3, 4 << 20)) as made:
        made.create_vcpus()
        yield made


def put(vm: Vm, id: int, values: list[int], scope: Scope = Scope.VCPU, phase: Phase = Phase.STATE) -> None:
    layout = Layout(scope, phase, (Slot(id, 8),))
    assert vm.write(layout, 0, np.array(values, np.uint64).reshape(-1, 1)) == []


def get(vm: Vm, id: int, scope: Scope = Scope.VCPU, phase: Phase = Phase.STATE) -> list[int]:
    values = np.zeros((vm.machine.vcpus if scope == Scope.VCPU else 1, 1), np.uint64)
    assert vm.read(Layout(scope, phase, (Slot(id, 8),)), 0, values) == []
    return [int(v) for v in values[:, 0]]


def saved(vm: Vm, **options: Any) -> bytes:
    out = io.BytesIO()
    save(vm, out, host=migstream.open_backend("sim").summary(), pause=vm.pause, **options)
    return out.getvalue()


def items(data: bytes) -> list[Any]:
    return [item for _, item in read_items(io.BytesIO(data), StreamReader())]


def test_vm_wide_registers_that_changed_since_the_prologue_are_sent_again_and_these_alone(vm: Vm) -> None:
    prologue = capture_prologue(vm)
    put(vm, WALL_CLOCK, [0x1234_5000], Scope.VM, Phase.FEATURE)
    data = saved(vm, prologue=prologue)
    assert [bank.update for bank in items(data) if isinstance(bank, EncodedBank)].count(True) == 1
    target, report = restore(io.BytesIO(data), migstream.open_backend("sim"), readback=True)
    with target:
        assert get(target, WALL_CLOCK, Scope.VM, Phase.FEATURE) == [0x1234_5000]
    assert report.writes["update"] == {Scope.VM: 2, Scope.VCPU: 0}  # one value, which has two MSR numbers
    assert [d for d in report.differs if not d.reason] == []


def test_without_a_change_nothing_is_sent_twice(vm: Vm) -> None:
    data = saved(vm, prologue=capture_prologue(vm))
    assert not [bank for bank in items(data) if isinstance(bank, EncodedBank) and bank.update]


def test_a_prologue_is_captured_after_the_pause_when_none_is_given(vm: Vm) -> None:
    calls: list[str] = []
    save(vm, io.BytesIO(), host=migstream.open_backend("sim").summary(), pause=lambda: calls.append("pause"))
    assert calls == ["pause"]


def test_the_clock_is_the_last_register_written(vm: Vm) -> None:
    banks = [item for item in items(saved(vm)) if isinstance(item, EncodedBank)]
    titles = [bank.layout.title for bank in banks]
    assert titles[-2:] == ["vm/clock", "vcpu/clock"]
    assert sorted(titles, key=lambda t: Phase[t.split("/")[1].upper()]) == titles


class Sip:
    """A raw sink that takes seven bytes at a time, as a socket may."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes | memoryview) -> int:
        self.data += bytes(data[:7])
        return len(data[:7])


def test_a_sink_that_takes_less_gets_everything(vm: Vm) -> None:
    sip = Sip()
    report = save(vm, sip, host=migstream.open_backend("sim").summary(), pause=vm.pause)
    assert len(sip.data) == report.bytes
    assert items(sip.data)


def test_a_sink_that_takes_nothing_is_an_error(vm: Vm) -> None:
    class Full:
        def write(self, data: bytes | memoryview) -> int:
            return 0

    with pytest.raises(OutputError, match="took 0 of"):
        save(vm, Full(), host=migstream.open_backend("sim").summary(), pause=vm.pause)


def test_opaque_state_comes_back(vm: Vm) -> None:
    source = io.BytesIO(saved(vm, opaque=[OpaqueState("virtio-net", b"\0\1\2")]))
    target, report = restore(source, migstream.open_backend("sim"))
    target.close()
    assert report.opaque == [OpaqueState("virtio-net", b"\0\1\2")]


def test_more_opaque_state_than_a_reader_takes_is_refused_before_the_pause(vm: Vm) -> None:
    """Each part is within the limit of a section; all together are one byte over a stream's, or just within it."""
    part, parts = 15 << 20, 5
    raw = encode(OpaqueState("d0", bytes(part))).raw_length
    sizes = [part] * (parts - 1) + [limits.MAX_OPAQUE - (parts - 1) * raw - (raw - part)]
    states = [OpaqueState(f"d{n}", bytes(size)) for n, size in enumerate(sizes)]
    assert sum(section.raw_length for section in encode_opaque(states)) == limits.MAX_OPAQUE
    states[-1] = OpaqueState(f"d{parts - 1}", bytes(sizes[-1] + 1))
    out, paused = io.BytesIO(), []
    most = limits.MAX_OPAQUE
    with pytest.raises(UsageError, match=f"opaque state: {most + 1} bytes; .* at most {most}"):
        save(vm, out, host=migstream.open_backend("sim").summary(), pause=lambda: paused.append(1), opaque=states)
    assert (out.getvalue(), paused) == (b"", [])


def test_one_opaque_state_over_a_sections_limit_is_refused(vm: Vm) -> None:
    with pytest.raises(UsageError, match="can't be saved"):
        saved(vm, opaque=[OpaqueState("d", bytes(limits.MAX_RAW))])


def test_a_stream_goes_through_a_pipe_in_one_pass(vm: Vm) -> None:
    read_fd, write_fd = os.pipe()
    vm.memory.view(0x5000, 8)[:] = b"in RAM.."
    put(vm, LSTAR, [7, 8, 9])

    def writer() -> None:
        with open(write_fd, "wb", buffering=0) as out:
            save(vm, out, host=migstream.open_backend("sim").summary(), pause=vm.pause)

    thread = threading.Thread(target=writer)
    thread.start()
    with open(read_fd, "rb") as source:
        target, _ = restore(source, migstream.open_backend("sim"))
    thread.join()
    with target:
        assert get(target, LSTAR) == [7, 8, 9]
        assert bytes(target.memory.view(0x5000, 8)) == b"in RAM.."


def test_a_target_is_ready_before_the_pause_reaches_it(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a socket: what is there is taken at once, and nobody waits for more."""
    here, there = socket.socketpair()
    made = threading.Event()
    original = Restorer.ready

    def watched(self: Restorer) -> bool:
        if is_ready := original(self):
            made.set()
        return is_ready

    monkeypatch.setattr(Restorer, "ready", watched)

    def paused() -> None:
        assert made.wait(60), "the restorer waits for bytes that come after the pause"

    def send() -> None:
        with here, here.makefile("wb", buffering=0) as out:
            save(vm, out, host=migstream.open_backend("sim").summary(), pause=paused, prologue=capture_prologue(vm))

    thread = threading.Thread(target=send)
    thread.start()
    with there, there.makefile("rb") as source:
        target, _ = restore(source, migstream.open_backend("sim"))
    thread.join()
    with target:
        assert get(target, LSTAR) == get(vm, LSTAR)


class OnlyRead:
    """A source without `read1`, whose `read` waits for all that it was asked for: it must be asked for no more."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def read(self, size: int) -> bytes:
        at, self.position = self.position, self.position + size
        assert self.position <= len(self.data) + 1, "the one byte behind the end is asked for to see that there is none"
        return self.data[at:self.position]


def test_a_source_that_waits_is_asked_for_what_is_missing_alone(vm: Vm) -> None:
    data = saved(vm)
    for one in (OnlyRead(data), io.BytesIO(data)):
        target, report = restore(one, migstream.open_backend("sim"))
        target.close()
        assert report.bytes == len(data)
    for one in (OnlyRead(data + b"\0"), io.BytesIO(data + b"\0")):
        with pytest.raises(Corrupt, match="bytes after the end section"):
            restore(one, migstream.open_backend("sim"))


def test_a_guest_page_of_zeros_overwrites_what_the_prologue_left_there(
        vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring a VM-wide MSR may write guest RAM (the wall clock does): the saved RAM wins."""
    data = saved(vm)
    backend = migstream.open_backend("sim")
    made: list[Vm] = []
    original = backend.create

    def create(machine: Machine, *args: Any) -> Vm:
        made.append(original(machine, *args))
        made[0].memory.view(0x7000, 4)[:] = b"dirt"
        return made[0]

    monkeypatch.setattr(backend, "create", create)
    target, _ = restore(io.BytesIO(data), backend)
    with target:
        assert bytes(target.memory.view(0x7000, 4)) == bytes(4)


class Stubborn:
    """A VM that refuses writes of one register; everything else goes to the real one."""

    def __init__(self, vm: Vm, id: int, forced: int | None = None) -> None:
        self._vm, self._id, self._forced = vm, id, forced
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vm, name)

    def write(self, layout: Layout, first: int, values: Any) -> list[Refusal]:
        if self._id not in layout.index:
            return self._vm.write(layout, first, values)
        kept = np.zeros_like(values)
        self._vm.read(layout, first, kept)
        column = layout.offsets[layout.index[self._id]]
        changed = values.copy()
        changed[:, column] = kept[:, column]
        refused = self._vm.write(layout, first, changed)
        return refused + [Refusal(self._id, first + k, "KVM_SET_MSRS", -1) for k in range(len(values))]

    def close(self) -> None:
        self.closed = True
        self._vm.close()


class OneVm(Protocol):
    """Makes a backend that gives out one VM."""

    def __call__(self, made: object) -> Backend:
        """The backend."""


@pytest.fixture
def one_vm(monkeypatch: pytest.MonkeyPatch) -> OneVm:
    def make(made: object) -> Backend:
        backend = migstream.open_backend("sim")
        monkeypatch.setattr(backend, "create", lambda *_: made)
        return backend

    return make


def stubborn_for(data: bytes, id: int) -> Stubborn:
    return Stubborn(migstream.open_backend("sim").create(next(i for i in items(data) if isinstance(i, Machine))), id)


def test_a_refused_register_that_matters_fails_the_restore_by_name_and_closes_the_vm(vm: Vm, one_vm: OneVm) -> None:
    put(vm, LSTAR, [1, 2, 3])
    data = saved(vm)
    stubborn = stubborn_for(data, LSTAR)
    with pytest.raises(RestoreFailed, match="MSR_LSTAR: KVM_SET_MSRS: stopped here") as caught:
        restore(io.BytesIO(data), one_vm(stubborn))
    assert stubborn.closed
    assert isinstance(caught.value.report, Report)
    assert len(caught.value.report.refused) == 3


def test_a_refused_register_that_has_the_value_anyway_is_reported_and_harmless(vm: Vm, one_vm: OneVm) -> None:
    data = saved(vm)
    stubborn = stubborn_for(data, LSTAR)
    _, report = restore(io.BytesIO(data), one_vm(stubborn))
    assert [(lookup(no.register).name, why) for no, why in report.refused] == [
        ("MSR_LSTAR", "the register has this value already")] * 3
    assert not stubborn.closed


def test_a_refused_clock_fails_the_restore_because_it_would_jump(vm: Vm, one_vm: OneVm) -> None:
    tsc = ids.msr_id(0x10)
    assert lookup(tsc).klass == Klass.CLOCK
    data = saved(vm)
    with pytest.raises(RestoreFailed, match="MSR_IA32_TSC"):
        restore(io.BytesIO(data), one_vm(stubborn_for(data, tsc)))


def test_a_plan_that_fails_makes_no_vm(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(vm)
    backend = migstream.open_backend("sim")
    profile = backend.profile()
    small = dataclasses.replace(profile, capabilities={**profile.capabilities, "MAX_VCPUS": 2})
    calls: list[object] = []
    monkeypatch.setattr(backend, "profile", lambda: small)
    monkeypatch.setattr(backend, "create", lambda *a: calls.append(a))
    with pytest.raises(DoesNotFit, match="3 vCPUs; this kernel allows 2"):
        restore(io.BytesIO(data), backend)
    assert calls == []


@pytest.mark.parametrize("fraction", [0.9, 0.99, 0.999])
def test_a_stream_that_stops_closes_the_vm(vm: Vm, one_vm: OneVm, fraction: float) -> None:
    data = saved(vm)
    stubborn = stubborn_for(data, LSTAR)
    with pytest.raises(Truncated):
        restore(io.BytesIO(data[:int(len(data) * fraction)]), one_vm(stubborn))
    assert stubborn.closed


# TSC offsets


class ClockOnly:
    """Answers KVM_GET_CLOCK and remembers the offsets that are written."""

    def __init__(self, clock: int, flags: int, host_tsc: int) -> None:
        self._value = struct.pack("<QIIQQ16x", clock, flags, 0, 0, host_tsc)
        self.offsets: list[int] = []

    def read(self, layout: Layout, first: int, values: Any) -> list[Refusal]:
        assert layout.slots[0].id == x86_64.CLOCK.id
        values[0] = np.frombuffer(self._value, np.uint64)
        return []

    def write(self, layout: Layout, first: int, values: Any) -> list[Refusal]:
        assert layout.slots == (Slot(x86_64.TSC_OFFSET.id, 8),)
        self.offsets = [int(v) for v in values[:, 0]]
        return []


def written(scope: Scope, phase: Phase, slot: Slot, rows: list[bytes]) -> Written:
    layout = Layout(scope, phase, (slot,))
    values = np.frombuffer(b"".join(row.ljust(slot.words * 8, b"\0") for row in rows), np.uint64).reshape(len(rows), -1)
    return Written(None, layout, Bank(layout, 0, values), None)  # type: ignore[arg-type]  # a step is not looked at


def tsc_case(offsets: list[int], flags: int) -> list[Written]:
    clock = struct.pack("<QIIQQ16x", 5_000_000_000, flags, 0, 0, 1_000_000_000)
    return [
        written(Scope.VCPU, Phase.CREATE, Slot(x86_64.TSC_KHZ.id, 4), [struct.pack("<I", 2_000_000)] * len(offsets)),
        written(Scope.VM, Phase.CLOCK, Slot(x86_64.CLOCK.id, 48), [clock]),
        written(Scope.VCPU, Phase.CLOCK, Slot(x86_64.TSC_OFFSET.id, 8),
                [struct.pack("<Q", offset % 2**64) for offset in offsets]),
    ]


def test_equal_offsets_are_left_to_the_tsc_msr() -> None:
    vm, report = ClockOnly(0, 14, 0), Report()
    restore_offsets(vm, tsc_case([-7, -7], 14), report)  # type: ignore[arg-type]  # all that is used of a VM
    assert (vm.offsets, report.notes, report.writes) == ([], [], {})


def test_different_offsets_are_moved_by_both_hosts_clocks() -> None:
    """2 GHz; the target's guest clock is 1 ms ahead of the saved one: 2 000 000 ticks; its host TSC is 300 lower."""
    vm, report = ClockOnly(5_001_000_000, 14, 999_999_700), Report()
    restore_offsets(vm, tsc_case([-1000, -400], 14), report)  # type: ignore[arg-type]  # likewise
    assert vm.offsets == [-1000 + 300 + 2_000_000, -400 + 300 + 2_000_000]
    assert report.writes["clock"][Scope.VCPU] == 2


@pytest.mark.parametrize(("then", "now"), [(6, 14), (14, 6)])
def test_different_offsets_without_a_host_tsc_are_reported(then: int, now: int) -> None:
    vm, report = ClockOnly(0, now, 0), Report()
    restore_offsets(vm, tsc_case([1, 2], then), report)  # type: ignore[arg-type]  # likewise
    assert vm.offsets == []
    assert "KVM_VCPU_TSC_OFFSET" in report.notes[0]


# RAM


def test_ram_of_any_size_takes_bounded_memory() -> None:
    import mmap

    size = 1 << 30
    with mmap.mmap(-1, size) as mapping:
        memory = GuestMemory([(MemoryRegion(0, size), memoryview(mapping))])
        for page in range(0, 4096, 7):
            memory.view(page * PAGE, 4)[:] = b"data"
        tracemalloc.start()
        sections = sum(1 for _ in ram.pack(ram.runs(memory, memory.regions)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        memory.release()
    assert sections >= 1
    assert peak < 32 << 20


OSXSAVE = 1 << 18
"""CR4; CPUID leaf 1 shows it in bit 27 of ECX."""


@pytest.mark.parametrize("name", ["sim", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_cpuid_follows_what_the_guest_turned_on_since_the_prologue(name: str) -> None:
    """Every operating system turns XSAVE on; KVM then shows OSXSAVE in a CPUID that was saved without it."""
    backend = migstream.open_backend(name)
    guest = run.guest_for(Arch.X86_64)
    with backend.create(run.machine(Arch.X86_64, 2, 4 << 20), run.BOARDS[Arch.X86_64].caps) as source:
        source.create_vcpus()
        guest.install(source, backend.profile().cpuid, backend.profile().capabilities)
        prologue = capture_prologue(source)
        at = Layout(Scope.VCPU, Phase.STATE, (Slot(x86_64.SREGS2.id, 320),))
        values = np.zeros((2, at.row_words), np.uint64)
        assert source.read(at, 0, values) == []
        values[:, 31] |= np.uint64(OSXSAVE)
        assert source.write(at, 0, values) == []
        out = io.BytesIO()
        save(source, out, host=backend.summary(), pause=source.pause, prologue=prologue)
    target, report = restore(io.BytesIO(out.getvalue()), backend, readback=True)
    with target:
        again = np.zeros((2, at.row_words), np.uint64)
        assert target.read(at, 0, again) == []
        assert (again[:, 31] & np.uint64(OSXSAVE)).all()
    assert [d.reason for d in report.differs if d.register == x86_64.CPUID2.id] == [
        "KVM computes OSXSAVE, APIC, OSPKE and the size of the XSAVE area from the vCPU's state"]


def test_an_its_is_not_written_once_for_each_vcpu() -> None:
    backend = migstream.open_backend("sim:arm64-6.12")
    devices = {"gic_distributor": 0x0800_0000, "gic_redistributors": 0x1000_0000, "gic_irqs": 96, "its": 0x0808_0000}
    machine = dataclasses.replace(run.machine(Arch.ARM64, 2, 4 << 20), devices=devices)
    out = io.BytesIO()
    with backend.create(machine) as source:
        source.create_vcpus()
        save(source, out, host=backend.summary(), pause=source.pause)
    restore(io.BytesIO(out.getvalue()), backend)[0].close()
    with pytest.raises(UsageError, match="an ITS takes its tables from RAM once"):
        restore(io.BytesIO(out.getvalue()), backend, vm_scope_per_vcpu=True)
