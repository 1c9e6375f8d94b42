"""Simulated kernels: names, kernels that offer less, time, rules as data, and what is put on the columns."""

from __future__ import annotations

import dataclasses
import errno
import struct

import numpy as np
import pytest

import migstream
from migstream.backends.base import SHORT_COUNT, Vm
from migstream.backends.sim import DEFAULT, SimBackend, access, rules_msrs
from migstream.backends.sim.cpuid import ECX, EDX, Tables, word
from migstream.backends.sim.rules import Refuse
from migstream.backends.sim.vm import SimVm
from migstream.demo import guest_x86_64 as guest
from migstream.errors import BackendError, BackendUnavailable, UsageError
from migstream.host import profiles
from migstream.host.profile import from_json, to_json
from migstream.model import Arch, Scope
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from tests.contract.access import LSTAR, create, machine, msr, patched, read, u64, write, write_errno


def test_the_default_kernel_and_its_names() -> None:
    assert SimBackend().name == SimBackend("sim").name == SimBackend(DEFAULT).name == f"sim:{DEFAULT}"
    assert SimBackend.named().name == SimBackend.named(DEFAULT).name == SimBackend(f"sim:{DEFAULT}").name
    assert SimBackend().profile().backend == f"sim:{DEFAULT}"
    assert SimBackend().summary().backend == f"sim:{DEFAULT}"
    assert migstream.open_backend("sim").name == f"sim:{DEFAULT}"


@pytest.mark.parametrize(("name", "near"), [
    ("x86_64-6.18", DEFAULT), ("x86-6.18-pvm", DEFAULT), ("sim:x86_64-6.19-pvm", DEFAULT), ("nonsense", "")])
def test_an_unknown_name_lists_the_near_ones(name: str, near: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"near: sim:") as caught:
        SimBackend(name)
    listed = str(caught.value).partition("near: ")[2].split(", ")
    assert {one.removeprefix("sim:") for one in listed} <= set(profiles.names())
    assert not near or f"sim:{near}" in listed
    assert caught.value.exit_status == 69
    assert "\n" not in str(caught.value)


def test_an_unknown_capability_lists_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="SREGS3"):
        SimBackend(without=("SREGS3",))


def test_a_kernel_that_offers_less_is_named_after_that() -> None:
    less = SimBackend(without=("XSAVE2", "SREGS2"))
    assert less.name == f"sim:{DEFAULT}-SREGS2-XSAVE2"
    assert (less.profile().capabilities["SREGS2"], SimBackend().profile().capabilities["SREGS2"]) == (0, 1)


def test_a_machine_of_another_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="host"):
        SimBackend("arm64-6.12").create(machine())


def test_a_profile_that_was_edited_is_a_kernel() -> None:
    """Through JSON, as an operator's file would come."""
    profile = dataclasses.replace(SimBackend().profile(), kernel="Linux of mine", capabilities={
        **SimBackend().profile().capabilities, "MAX_VCPUS": 3})
    backend = SimBackend(from_json(to_json(profile)))
    assert backend.name == "sim:Linux of mine"
    with backend.create(machine(4)) as vm, pytest.raises(BackendError) as caught:
        vm.create_vcpus()
    assert (caught.value.vcpu, caught.value.errno) == (3, errno.EINVAL)


class Time:
    """A host's time that goes on when it is told to."""

    def __init__(self) -> None:
        self.ns = 10**9

    def __call__(self) -> int:
        return self.ns


def test_clocks_follow_the_time_that_the_host_has() -> None:
    now = Time()
    with create(SimBackend(now_ns=now), 2) as vm:
        assert struct.unpack("<6Q", read(vm, x86_64.CLOCK.id)[0]) == (0, 0, 0, 0, 0, 0)
        (khz,) = struct.unpack("<I", read(vm, x86_64.TSC_KHZ.id)[0])
        before = [int.from_bytes(v, "little") for v in read(vm, msr(0x10))]
        now.ns += 5_000_000
        assert struct.unpack_from("<Q", read(vm, x86_64.CLOCK.id)[0])[0] == 5_000_000
        after = [int.from_bytes(v, "little") for v in read(vm, msr(0x10))]
        assert [late - early for late, early in zip(after, before, strict=True)] == [5 * khz] * 2
        assert write(vm, x86_64.CLOCK.id, [u64(77, 0, 0, 0, 0, 0)]) == []
        now.ns += 3
        assert struct.unpack_from("<QQ", read(vm, x86_64.CLOCK.id)[0]) == (80, 0b1110)


def following() -> SimBackend:
    """A kernel whose TSC can be set, as most can: a number in the profile, no other code."""
    profile = SimBackend().profile()
    return SimBackend(dataclasses.replace(profile, behaviour={
        **profile.behaviour, "tsc_follows": 1, "tsc_offset_kept": 1}), now_ns=Time())


def test_a_tsc_that_can_be_set_goes_on_from_there_on_each_vcpu() -> None:
    with create(following(), 2) as vm:
        assert write(vm, msr(0x10), [u64(1000), u64(5000)]) == []
        assert read(vm, msr(0x10)) == [u64(1000), u64(5000)]
        offsets = [int.from_bytes(v, "little") for v in read(vm, x86_64.TSC_OFFSET.id)]
        assert (offsets[1] - offsets[0]) % 2**64 == 4000
        assert write(vm, x86_64.TSC_OFFSET.id, [u64(offsets[0] + 7)]) == []
        assert read(vm, msr(0x10)) == [u64(1007), u64(5000)]


def test_offsets_that_differ_are_restored_from_the_hosts_clocks() -> None:
    """The clock step of a restore, on a kernel where it does something."""
    import io

    from migstream.transport import restore, save

    backend, out = following(), io.BytesIO()
    with create(backend, 2) as vm:
        assert write(vm, x86_64.CLOCK.id, [u64(10**9, 0, 0, 0, 0, 0)]) == []
        assert write(vm, msr(0x10), [u64(1000), u64(5000)]) == []
        save(vm, out, host=backend.summary(), pause=vm.pause)
    restored, report = restore(io.BytesIO(out.getvalue()), backend)
    with restored:
        tsc = [int.from_bytes(v, "little") for v in read(restored, msr(0x10))]
    assert tsc == [1000, 5000]
    assert report.notes == []


def test_a_feature_msr_that_reads_as_write_only_is_that() -> None:
    """PRED_CMD is taken and can't be read; the profile says so and the simulator does so."""
    profile = SimBackend().profile()
    index = 0x49
    backend = SimBackend(dataclasses.replace(profile, msrs=(*profile.msrs, index), refused={
        msr(index): (SHORT_COUNT, 0), msr(LSTAR): (0, SHORT_COUNT)}))
    with create(backend, 2) as vm:
        layouts, refused = vm.layouts()
        assert [(no.register, no.errno) for no in refused] == [(msr(index), SHORT_COUNT)]
        assert msr(index) not in {slot.id for at in layouts for slot in at.slots}
        assert write_errno(vm, msr(index), u64(1)) == 0
        assert write_errno(vm, msr(LSTAR), u64(0)) == SHORT_COUNT
        assert read(vm, msr(LSTAR))[0] == u64(0)


ONE_BY_ONE = 0x0505_0505_0505_0505
"""Bits of PAT that a kernel takes one at a time when it looks at memory types."""


@pytest.mark.parametrize(("index", "bits", "value", "taken", "why"), [
    (0x277, (ONE_BY_ONE, ONE_BY_ONE), 0x0407_0506_0007_0106, True, "PAT as Linux sets it"),
    (0x277, (ONE_BY_ONE, ONE_BY_ONE), 0x0002, False, "PAT: memory type 2 does not exist"),
    (0x277, (ONE_BY_ONE, ONE_BY_ONE), 0x0003, False, "PAT: nor does 3"),
    (0x277, (ONE_BY_ONE, ONE_BY_ONE), 0x0800, False, "PAT: nor 8"),
    (LSTAR, ((1 << 56) - 1,) * 2, (1 << 56) - 1, True, "57-bit addresses on a host with 5-level paging"),
    (LSTAR, ((1 << 56) - 1,) * 2, 1 << 56, False, "not canonical in 57 bits"),
    (LSTAR, ((1 << 47) - 1,) * 2, (1 << 56) - 1, False, "not canonical in 48 bits"),
])
def test_msrs_of_other_kernels(index: int, bits: tuple[int, int], value: int, taken: bool, why: str) -> None:
    profile = SimBackend().profile()
    backend = SimBackend(dataclasses.replace(profile, msr_bits={**profile.msr_bits, index: bits}))
    with create(backend, 1) as vm:
        assert write_errno(vm, msr(index), u64(value)) == (0 if taken else SHORT_COUNT), why
        assert (read(vm, msr(index)) == [u64(value)]) == taken


def test_amd_keeps_half_of_an_entry_point() -> None:
    profile = SimBackend().profile()
    backend = SimBackend(dataclasses.replace(profile, msr_bits={**profile.msr_bits, 0x176: (2**64 - 1, 2**32 - 1)}))
    with create(backend, 1) as vm:
        assert write(vm, msr(0x176), [u64(0xFFFF_8000_1234_5678)]) == []
        assert read(vm, msr(0x176)) == [u64(0x1234_5678)]


def test_registers_are_not_touched_while_the_vcpus_run() -> None:
    with create(SimBackend(), 1) as vm:
        guest.install(vm, SimBackend().profile().cpuid, SimBackend().profile().capabilities)
        vm.start()
        with pytest.raises(UsageError, match=r"pause\(\) first"):
            read(vm, x86_64.REGS.id)
        vm.pause()
        read(vm, x86_64.REGS.id)


def test_vcpus_are_made_one_after_the_other_in_order() -> None:
    with SimBackend().create(machine(3)) as vm:
        assert isinstance(vm, SimVm)
        vm.create_vcpu(0)
        assert write(vm, msr(LSTAR), [u64(0x77)]) == []
        with pytest.raises(UsageError, match="without a gap"):
            vm.create_vcpu(2)
        vm.create_vcpu(1)
        vm.create_vcpus()
        assert read(vm, msr(LSTAR)) == [u64(0x77), u64(0), u64(0)]
        assert [v[0] for v in read(vm, x86_64.MP_STATE.id)] == [0, 1, 1]


def test_legacy_paging_where_the_kernel_has_it_keeps_its_pdptrs() -> None:
    profile = SimBackend().profile()
    modern = SimBackend(dataclasses.replace(profile, behaviour={**profile.behaviour, "legacy_paging": 1}))
    pae = {28: 0x8000_0011, 31: 0x20, 35: 1, 36: 0x1001, 39: 0x4001}
    for backend, kept in ((modern, True), (SimBackend(), False)):
        with create(backend, 1, enabled_caps={218: (1,)}) as vm:
            assert write_errno(vm, x86_64.SREGS2.id, patched(read(vm, x86_64.SREGS2.id)[0], pae)) == 0
            found = struct.unpack("<40Q", read(vm, x86_64.SREGS2.id)[0])
            assert (found[28] >> 31, found[35], found[36], found[39]) == ((1, 1, 0x1001, 0x4001) if kept else (0,) * 4)
            triple_fault = read(vm, x86_64.VCPU_EVENTS.id)[0][28]
            assert triple_fault == (0 if kept else 1)


def test_an_interrupt_of_the_slave_pic_reaches_the_master() -> None:
    with create(SimBackend(), 1) as vm:
        slave = bytearray(read(vm, x86_64.PIC_SLAVE.id)[0])
        slave[9] = 1
        assert write(vm, x86_64.PIC_SLAVE.id, [bytes(slave)]) == []
        assert read(vm, x86_64.PIC_MASTER.id)[0][9] == 1 << 2


def test_a_chip_is_the_one_that_its_number_says() -> None:
    with create(SimBackend(), 1) as vm:
        master = bytearray(read(vm, x86_64.PIC_MASTER.id)[0])
        master[0], master[10] = 1, 0xA5
        assert write(vm, x86_64.PIC_MASTER.id, [bytes(master)]) == []
        assert read(vm, x86_64.PIC_SLAVE.id)[0][10] == 0xA5
        assert read(vm, x86_64.PIC_MASTER.id)[0][10] == 0


def everything(vm: Vm) -> dict[int, list[bytes]]:
    """All registers but the running ones."""
    slots = [slot for at in vm.layouts()[0] for slot in at.slots]
    return {slot.id: read(vm, slot.id, slot.size) for slot in slots if slot.id not in x86_64.RUNNING}


def test_a_refused_row_changes_no_vcpu_and_the_others_are_written() -> None:
    with create(SimBackend(), 3) as vm:
        sregs = read(vm, x86_64.SREGS.id)
        before = everything(vm)
        bad = [patched(v, {29: 0x1000 * (k + 1), 31: (k == 1) << 63}) for k, v in enumerate(sregs)]
        refused = write(vm, x86_64.SREGS.id, bad)
        assert [(no.vcpu, no.operation, no.errno) for no in refused] == [(1, "KVM_SET_SREGS", errno.EINVAL)]
        assert [struct.unpack_from("<Q", v, 8 * 29)[0] for v in read(vm, x86_64.SREGS.id)] == [0x1000, 0, 0x3000]
        assert {id for id, value in everything(vm).items() if value != before[id]} == {x86_64.SREGS2.id}


TABLE = struct.pack("<II10I10I", 2, 0, 1, 0, 0, 0xA, 0xB, 0xC, 0xD, 0, 0, 0, 7, 1, 1, 1, 2, 3, 4, 0, 0, 0)
OTHER = struct.pack("<II10I10I", 1, 0, 7, 1, 1, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0, 9, 9, 9, 9, 0, 0, 0)


@pytest.mark.parametrize("tables", [(TABLE, TABLE), (TABLE, OTHER)], ids=["all alike", "one by one"])
def test_cpuid_tables_are_looked_up_alike_or_one_by_one(tables: tuple[bytes, bytes]) -> None:
    values = np.frombuffer(b"".join(tables), np.uint64).reshape(2, -1).copy()
    same = tables[0] == tables[1]
    assert word(values, 1, 0, ECX).tolist() == [0xC, 0xC if same else 0], "past its count a table has no leaf"
    assert word(values, 7, 1, EDX).tolist() == [4, 4 if same else 8]
    Tables(values).change((7, 1, EDX), 0xFFFF_FFF8, np.array([1, 2], np.uint64))
    assert word(values, 7, 1, EDX).tolist() == [1, 2 if same else 8 | 2]
    Tables(values).change((3, 3, EDX), 0, 0xFF)
    assert struct.unpack_from("<I", values[0].tobytes(), 8 + 12)[0] == 0xA


def test_each_rule_says_where_it_comes_from_and_is_about_registers_of_the_catalogue() -> None:
    tables = (access.ABSENT, access.REFUSALS, access.KEEPS, access.AFTERS, access.SHOWS)
    rules = [(id, rule) for table in tables for id, those in table.items() for rule in those]
    assert len(rules) > 50
    assert [id for id, _ in rules if not lookup(id).known] == []
    assert [rule.name for _, rule in rules if not rule.name or not rule.source] == []
    assert [rule.name for rule in rules_msrs.RULES if not rule.source or not rule.indices] == []
    numbers = {rule.errno for _, rule in rules if isinstance(rule, Refuse)}
    assert numbers <= {errno.EINVAL, errno.E2BIG, errno.EPERM}


def test_no_msr_has_two_rules() -> None:
    indices = [index for rule in rules_msrs.RULES for index in rule.indices]
    assert len(indices) == len(set(indices))


def test_every_recorded_profile_is_a_kernel_that_works() -> None:
    assert DEFAULT in profiles.names()
    for name in profiles.names():
        if profiles.load(name).arch != Arch.X86_64:
            continue
        with create(SimBackend(name), 2) as vm:
            for at in vm.layouts()[0]:
                values = np.zeros((2 if at.scope == Scope.VCPU else 1, at.row_words), np.uint64)
                assert (vm.read(at, 0, values), vm.write(at, 0, values)) == ([], [])


def test_a_capability_keeps_what_it_was_told() -> None:
    with create(SimBackend(), 1, enabled_caps={129: (3,), 164: (1,)}) as vm:
        assert read(vm, ids.capability_id(Arch.X86_64, 129), 40) == [u64(129, 3, 0, 0, 0)]
