"""The arm64 simulator's modules one by one: interpreter, ITS, firmware registers, interrupt controller, devices."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.backends.base import GuestMemory
from migstream.backends.sim import SimBackend
from migstream.backends.sim.arm64 import Arm64SimVm, its
from migstream.backends.sim.arm64.board import make_devices
from migstream.backends.sim.arm64.cpu import FORMS, Cpu, Translation, decode
from migstream.backends.sim.clock import HostClock
from migstream.backends.sim.mmu import Exit
from migstream.errors import BackendError
from migstream.host import profiles
from migstream.model import Layout, MemoryRegion, Phase, Scope, Slot
from migstream.registers import arm64, arm64_ids, gic, vcpu_features
from tests.contract.access import u64
from tests.contract.arm64 import BOARD, DEFAULT, by_name, create, machine, read, through_vcpu, write_errnos

pytestmark = pytest.mark.sim

KERNELS = tuple(name for name in profiles.names() if name.startswith("arm64-"))
U64 = (1 << 64) - 1
BASE, SIZE = 0x4000_0000, 1 << 20
N, Z, C, V = 1 << 31, 1 << 30, 1 << 29, 1 << 28

number = st.integers(0, U64) | st.sampled_from([0, 1, 1 << 63, (1 << 63) - 1, U64])
register = st.integers(0, 30)


def ram() -> GuestMemory:
    return GuestMemory([(MemoryRegion(BASE, SIZE), memoryview(bytearray(SIZE)))])


def cpu(memory: GuestMemory | None = None, *, on: bool = False, tcr: int = 0, table: int = 0) -> Cpu:
    """A vCPU at the start of RAM whose register n has the value n * 0x101."""
    translation = Translation(memory or ram(), on, tcr, table)
    return Cpu([n * 0x101 for n in range(31)], BASE + 0x8000, BASE, 0x3C5, translation, {})


def done(one: Cpu, *words: int) -> Cpu:
    """The vCPU after these instructions."""
    code = struct.pack(f"<{len(words)}I", *words)
    one.translation.memory.view(one.pc, len(code))[:] = code
    one.run(len(words))
    return one


# the interpreter: encodings are the Arm ARM's, C4.1, written again from there


def add_sub_immediate(op: int, rd: int, rn: int, imm: int, shift: int = 0) -> int:
    return 1 << 31 | op << 30 | 0b100010 << 23 | shift << 22 | imm << 10 | rn << 5 | rd


def add_sub_register(op: int, flags: int, rd: int, rn: int, rm: int, amount: int = 0) -> int:
    return 1 << 31 | op << 30 | flags << 29 | 0b01011 << 24 | rm << 16 | amount << 10 | rn << 5 | rd


def transfer(size: int, load: int, rt: int, rn: int, imm: int) -> int:
    return size << 30 | 0b111001 << 24 | load << 22 | imm << 10 | rn << 5 | rt


@given(register, register, number, st.integers(0, 4095), st.booleans(), st.booleans())
def test_add_and_subtract_an_immediate(rd: int, rn: int, value: int, imm: int, subtract: bool, shift: bool) -> None:
    one = cpu()
    one.x[rn] = value
    done(one, add_sub_immediate(subtract, rd, rn, imm, shift))
    amount = imm << 12 if shift else imm
    assert one.x[rd] == (value - amount if subtract else value + amount) % 2**64
    assert (one.pc, one.pstate) == (BASE + 4, 0x3C5)


def test_register_31_is_the_stack_pointer_here_and_zero_there() -> None:
    one = done(cpu(), add_sub_immediate(1, 31, 31, 0x10))
    assert one.sp == BASE + 0x7FF0
    assert done(one, add_sub_register(0, 0, 5, 31, 6)).x[5] == 6 * 0x101
    before = list(one.x)
    assert done(one, add_sub_register(0, 0, 31, 1, 2)).x == before, "written to the zero register"
    one = done(cpu(), transfer(3, 0, 31, 31, 0))
    assert bytes(one.translation.memory.view(BASE + 0x8000, 8)) == bytes(8)


@given(number, number, st.integers(0, 63))
def test_add_and_subtract_registers(left: int, right: int, amount: int) -> None:
    one = cpu()
    one.x[1], one.x[2] = left, right
    done(one, add_sub_register(0, 0, 3, 1, 2, amount), add_sub_register(1, 0, 4, 1, 2, amount))
    shifted = right << amount & U64
    assert one.x[3:5] == [(left + shifted) % 2**64, (left - shifted) % 2**64]


@given(number, number)
def test_compare_sets_the_four_flags(left: int, right: int) -> None:
    """By signed and unsigned comparison of Python's numbers."""
    one = cpu()
    one.x[1], one.x[2] = left, right
    done(one, add_sub_register(1, 1, 31, 1, 2))
    signed = [value - 2**64 if value >> 63 else value for value in (left, right)]
    difference = signed[0] - signed[1]
    wanted = ((left - right) % 2**64 >> 63 and N) | (left == right and Z) | (left >= right and C)
    assert one.pstate & (N | Z | C | V) == wanted | (0 if -2**63 <= difference < 2**63 else V)
    assert one.pstate & ~(N | Z | C | V) == 0x3C5


@given(number, number, number)
def test_multiply_add(left: int, right: int, more: int) -> None:
    one = cpu()
    one.x[1:4] = left, right, more
    assert done(one, 0b1_00_11011_000 << 21 | 2 << 16 | 3 << 10 | 1 << 5 | 4).x[4] == (left * right + more) % 2**64


@pytest.mark.parametrize("size", range(4))
def test_loads_and_stores_are_of_their_size(size: int) -> None:
    one, width = cpu(), 1 << size
    one.x[1], one.x[2] = 0x8877_6655_4433_2211, BASE + 0x4000
    one.translation.memory.view(BASE + 0x4000, 64)[:] = b"\xee" * 64
    done(one, transfer(size, 0, 1, 2, 3), transfer(size, 1, 4, 2, 3), transfer(size, 1, 5, 2, 4))
    assert one.x[4] == one.x[1] % (1 << 8 * width)
    assert one.x[5] == int.from_bytes(b"\xee" * width, "little"), "nothing beside it"


@pytest.mark.parametrize(("word", "wanted"), [
    (0xD2800000 | 0x1234 << 5 | 1, 0x1234), (0xD2E00000 | 0x1234 << 5 | 1, 0x1234 << 48),
    (0x92800000 | 0x1234 << 5 | 1, U64 ^ 0x1234), (0xF2A00000 | 0x1234 << 5 | 1, 0x1234_0101)])
def test_move_wide(word: int, wanted: int) -> None:
    assert done(cpu(), word).x[1] == wanted


@pytest.mark.parametrize(("word", "equal", "distance"), [
    (0x14000000 | 4, False, 16), (0x14000000 | (1 << 26) - 2, False, -8), (0x54000000 | 3 << 5, True, 12),
    (0x54000000 | 3 << 5, False, 4), (0x54000001 | 3 << 5, False, 12), (0x54000001 | (1 << 19) - 1 << 5, False, -4),
    (0xD503201F, False, 4)])
def test_branches(word: int, equal: bool, distance: int) -> None:
    one = cpu()
    one.pc += 64
    one.pstate |= Z if equal else 0
    assert done(one, word).pc == BASE + 64 + distance


@given(st.integers(0, (1 << 32) - 1))
def test_any_word_is_an_instruction_or_ends_the_vcpu(word: int) -> None:
    """Nothing else is raised, and the vCPU stands at what it could not do."""
    one = cpu()
    try:
        done(one, word)
    except Exit as stopped:
        assert stopped.reason in ("KVM_EXIT_INTERNAL_ERROR", "KVM_EXIT_MMIO", "WFI")
        assert one.pc == BASE + (4 if stopped.reason == "WFI" else 0)


def test_a_word_has_one_form() -> None:
    for number, one in enumerate(FORMS):
        assert one.value & ~one.mask == 0, one.name
        for other in FORMS[:number]:
            both = one.mask & other.mask
            assert one.value & both != other.value & both, (one.name, other.name)


def test_unallocated_moves_are_no_instruction() -> None:
    with pytest.raises(Exit, match="INTERNAL_ERROR"):
        decode(0xB2800000)(cpu())


def test_no_ram_is_the_vmms_and_a_bad_table_is_beyond_this_interpreter() -> None:
    one = cpu()
    one.x[1] = 0x0900_0000
    with pytest.raises(Exit, match="KVM_EXIT_MMIO"):
        done(one, transfer(3, 0, 0, 1, 0))
    assert one.pc == BASE


_TCR_39 = 25
"""T0SZ of 39 bits of address."""


def test_stage_1_translates_blocks_and_pages() -> None:
    memory, table = ram(), BASE + 0x10000

    def put(at: int, entry: int) -> None:
        memory.view(at, 8)[:] = struct.pack("<Q", entry)

    put(table + 8 * 1, BASE | 0x701)                                  # 1 GiB, as it is
    put(table + 8 * 2, table + 0x1000 | 3)
    put(table + 0x1000 + 8 * 5, table + 0x2000 | 3)                   # 2 MiB further: pages
    put(table + 0x2000 + 8 * 7, BASE + 0x3000 | 0x703)
    put(table + 0x1000 + 8 * 6, BASE | 0x701)                         # a block of 2 MiB
    translation = Translation(memory, True, _TCR_39, table)
    assert translation.physical(BASE + 0x1234) == BASE + 0x1234
    assert translation.physical((2 << 30) + (5 << 21) + (7 << 12) + 0xABC) == BASE + 0x3ABC
    assert translation.physical((2 << 30) + (6 << 21) + 0x12345) == BASE + 0x12345
    for nowhere in (3 << 30, (2 << 30) + (5 << 21), 1 << 39):
        with pytest.raises(Exit, match="INTERNAL_ERROR"):
            translation.physical(nowhere)
    with pytest.raises(Exit, match="MMIO"):
        Translation(memory, True, _TCR_39, 0x1000).physical(0)


# the ITS


QUEUE, DEVICES, COLLECTIONS, EVENTS, PENDING = (BASE + 0x10000 * n for n in range(1, 6))
VALID = 1 << 63


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = ram()
    yield made


def made(memory: GuestMemory, pending: int | None = None) -> its.Its:
    """An ITS with its queue and tables in RAM, of two vCPUs."""
    tables = [PENDING, PENDING + 0x10000] if pending is None else [pending, pending]
    one = its.Its(lambda: memory, lambda: its.Redistributors(tables, [True, True], DEVICES + 0x8000 | 15))
    for offset, value in ((its.CBASER, VALID | QUEUE), (its.BASER0, VALID | DEVICES), (its.BASER0 + 8,
                                                                                      VALID | COLLECTIONS)):
        assert one.write(offset, value) == 0
    return one


def order(memory: GuestMemory, one: its.Its, *commands: tuple[int, int, int]) -> None:
    """Put commands (first three words) where the queue's end is, and move it."""
    for command in commands:
        at = one.read(its.CWRITER)
        memory.view(QUEUE + at, 32)[:] = struct.pack("<4Q", *command, 0)
        assert one.write(its.CWRITER, (at + 32) % 4096) == 0


def mapd(device: int, bits: int = 5) -> tuple[int, int, int]:
    return 0x08 | device << 32, bits - 1, VALID | EVENTS + 0x800 * device


def mapc(collection: int, vcpu: int) -> tuple[int, int, int]:
    return 0x09, 0, VALID | vcpu << 16 | collection


def mapti(device: int, event: int, lpi: int, collection: int) -> tuple[int, int, int]:
    return 0x0A | device << 32, lpi << 32 | event, collection


SETUP = (mapd(2), mapd(7), mapc(0, 0), mapc(1, 1), mapti(2, 0, 8192, 0), mapti(2, 3, 8200, 1), mapti(7, 1, 8193, 1))


def test_commands_wait_for_the_its_to_be_on(memory: GuestMemory) -> None:
    one = made(memory)
    order(memory, one, *SETUP)
    assert (one.devices, one.read(its.CREADR)) == ({}, 0)
    assert one.read(its.CTLR) == 0, "not quiescent"
    assert one.write(its.CTLR, 1) == 0
    assert one.read(its.CTLR) == 1 << 31 | 1
    assert one.read(its.CREADR) == one.read(its.CWRITER) == 32 * len(SETUP)
    assert one.collections == {0: 0, 1: 1} and one.devices.keys() == {2, 7}
    assert one.events == {(2, 0): (8192, 0), (2, 3): (8200, 1), (7, 1): (8193, 1)}


def test_interrupts_become_pending_and_are_cleared(memory: GuestMemory) -> None:
    one = made(memory)
    assert one.write(its.CTLR, 1) == 0
    order(memory, one, *SETUP, (0x03 | 2 << 32, 3, 0), (0x03 | 7 << 32, 1, 0), (0x03 | 7 << 32, 9, 0))
    assert one.pending == {8200, 8193}, "an event that is not mapped is none"
    order(memory, one, (0x04 | 7 << 32, 1, 0))
    assert one.pending == {8200}


def test_the_queue_goes_round(memory: GuestMemory) -> None:
    one = made(memory)
    assert one.write(its.CTLR, 1) == 0
    for turn in range(300):
        order(memory, one, mapc(turn % 7, turn % 2))
    assert one.read(its.CREADR) == one.read(its.CWRITER) == 32 * 300 % 4096
    assert len(one.collections) == 7


def test_tables_in_guest_ram_carry_everything_to_another_its(memory: GuestMemory) -> None:
    one = made(memory)
    assert one.write(its.CTLR, 1) == 0
    order(memory, one, *SETUP, (0x03 | 2 << 32, 3, 0))
    assert one.save_tables() == one.save_pending() == 0
    assert struct.unpack("<Q", memory.view(DEVICES + 8 * 2, 8))[0] >> 63 == 1
    assert memory.view(PENDING + 0x10000 + 8200 // 8, 1)[0] >> 8200 % 8 & 1 == 1
    other = made(memory)
    assert other.restore_tables() == 0
    assert (other.devices, other.collections, other.events, other.pending) == (
        one.devices, one.collections, one.events, {8200})


@pytest.mark.parametrize(("offset", "value", "no"), [
    (its.CWRITER, 4096, 0), (its.CWRITER, 0x21, 0), (its.CREADR, 4096, errno.EINVAL), (its.CREADR, 64, 0),
    (its.IIDR, 0x4B00_043B, 0), (its.IIDR, 0x1234, errno.EINVAL)])
def test_a_queue_ends_whatever_its_pointers_are(memory: GuestMemory, offset: int, value: int, no: int) -> None:
    """A value beyond the queue or within a command can come out of a stream: it must not be followed for ever."""
    one = made(memory)
    assert one.write(offset, value) == no
    assert one.write(its.CTLR, 1) == 0
    assert one.read(its.CREADR) == one.read(its.CWRITER) < 4096


def test_a_queue_outside_of_ram_is_passed_over() -> None:
    memory = ram()
    one = made(memory)
    assert one.write(its.CBASER, VALID | 0x10_0000) == 0
    assert one.write(its.CTLR, 1) == one.write(its.CWRITER, 64) == 0
    assert (one.read(its.CREADR), one.devices) == (64, {})


def test_tables_outside_of_ram_are_refused(memory: GuestMemory) -> None:
    """KVM_DEV_ARM_ITS_RESTORE_TABLES: EFAULT, as for a stream whose GICR_PENDBASER was refused; nothing is left."""
    one = made(memory)
    assert one.write(its.CTLR, 1) == 0
    order(memory, one, *SETUP)
    assert one.save_tables() == 0
    other = made(memory, pending=0)
    assert (other.restore_tables(), other.devices, other.collections) == (errno.EFAULT, {}, {})


def test_tables_are_restored_once(memory: GuestMemory) -> None:
    one = made(memory)
    assert one.write(its.CTLR, 1) == 0
    order(memory, one, *SETUP)
    assert (one.save_tables(), one.restore_tables()) == (0, errno.EEXIST)


# firmware: documentation and hypercalls.c, rows in words


@pytest.mark.parametrize("kernel", KERNELS)
def test_psci_versions_go_up_to_the_kernels_own(kernel: str) -> None:
    with create(SimBackend(kernel), 1) as vm:
        place = by_name(vm)["PSCI_VERSION"]
        latest = int.from_bytes(read(vm, place)[0], "little")
        for version in (2, 0x1_0000, 0x1_0001, 0x1_0002, 0x1_0003, 0x1_0004):
            assert write_errnos(vm, place, [u64(version)]) == ([] if version <= latest else [errno.EINVAL])
        assert write_errnos(vm, place, [u64(1)]) == [errno.EINVAL], "0.1 is for vCPUs without the feature"
        assert write_errnos(vm, place, [u64(2 | 1 << 40)]) == [errno.EINVAL]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_vcpu_without_the_feature_has_psci_0_1(kernel: str) -> None:
    vm = Arm64SimVm(profiles.load(kernel), machine(1, devices={}), HostClock(1_000_000, lambda: 0))
    vm.guest.add_vcpus(1)
    assert vm.init(0, 0) == (0, b"")
    psci = arm64_ids.firmware(0)
    assert vm.get(0, psci) == (0, u64(1))
    assert [vm.set(0, psci, u64(value))[0] for value in (1, 2, 0x1_0000)] == [0, errno.EINVAL, errno.EINVAL]
    vm.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_workaround_is_checked_against_the_hosts_level_and_not_stored(kernel: str) -> None:
    with create(SimBackend(kernel), 1) as vm:
        for name in ("SMCCC_ARCH_WORKAROUND_1", "SMCCC_ARCH_WORKAROUND_3"):
            place = by_name(vm)[name]
            (host,) = read(vm, place)
            level = int.from_bytes(host, "little")
            for value in range(3):
                assert write_errnos(vm, place, [u64(value)]) == ([] if value <= level else [errno.EINVAL]), name
                assert read(vm, place) == [host]
            assert write_errnos(vm, place, [u64(1 << 4)]) == [errno.EINVAL]
        place = by_name(vm)["SMCCC_ARCH_WORKAROUND_2"]
        (host,) = read(vm, place)
        needed = int.from_bytes(host, "little") < 3
        for value, refused in ((0, False), (1, False), (2, needed), (3, needed), (2 | 1 << 4, needed),
                               (1 | 1 << 4, True), (4, True), (1 << 8, True)):
            assert write_errnos(vm, place, [u64(value)]) == ([errno.EINVAL] if refused else []), value
            assert read(vm, place) == [host]


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_bitmaps_unknown_bits_come_before_the_check_of_a_run(kernel: str) -> None:
    with create(SimBackend(kernel), 2) as vm:
        place = by_name(vm)["VENDOR_HYP_BMAP"]
        assert write_errnos(vm, place, [u64(1)]) == []
        vm.enter(0)
        rows: tuple[tuple[int, list[int]], ...] = (
            (1, []), (3, [errno.EBUSY]), (0, [errno.EBUSY]), (1 << 60, [errno.EINVAL]))
        assert [write_errnos(vm, place, [u64(value)]) for value, _ in rows] == [answer for _, answer in rows]
        assert read(vm, place) == [u64(1)]


# the interrupt controller


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_registers_of_the_interrupt_controller_keep(kernel: str) -> None:
    """arch/arm64/kvm/vgic: fixed bits of GICD_CTLR, five bits of priority, affinity of 24 bits, one bit a group."""
    with create(SimBackend(kernel), 1) as vm:
        places = by_name(vm)
        for name, value, kept in (
                ("GICD_CTLR", 0, 0x50), ("GICD_CTLR", 0xFFFF_FFFF, 0x52),
                ("GICD_IPRIORITYR9", 0xFFFF_FFFF, 0xF8F8_F8F8), ("GICD_IROUTER40", U64, 0xFF_FFFF),
                ("GICD_ICFGR2", 0xFFFF_FFFF, 0xAAAA_AAAA),
                ("ICC_PMR_EL1", U64, 0xF8 | 7), ("ICC_BPR0_EL1", U64, 7), ("ICC_IGRPEN1_EL1", 1, 1),
                ("GICD_ISENABLER1", 0x1234_5678, 0x1234_5678), ("GICR_ISENABLER0", 0xFFFF_0000, 0xFFFF_0000)):
            at = places[name]
            assert write_errnos(vm, at, [value.to_bytes(8, "little")[:at[1].size]]) == [], name
            (found,) = read(vm, at)
            assert int.from_bytes(found, "little") in (kept, kept & 0xF8), f"{name}: {found.hex()}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_who_made_the_interrupt_controller_can_not_be_changed(kernel: str) -> None:
    with create(SimBackend(kernel), 1) as vm:
        place = by_name(vm)["GICD_IIDR"]
        (own,) = read(vm, place)
        assert write_errnos(vm, place, [own]) == []
        assert write_errnos(vm, place, [struct.pack("<I", int.from_bytes(own, "little") ^ 1 << 24)]) == [errno.EINVAL]
        assert read(vm, place) == [own]


def test_timer_lines_are_private_of_all_vcpus_and_final_after_a_run() -> None:
    with create(SimBackend("arm64-6.12"), 2) as vm:
        place = by_name(vm)["KVM_ARM_VCPU_TIMER_IRQ_VTIMER"]
        rows = len(read(vm, place))
        assert read(vm, place) == [struct.pack("<I", 27)] * rows
        assert write_errnos(vm, place, [struct.pack("<I", 26)] * rows) == []
        for line in (15, 32, 99):
            assert errno.EINVAL in write_errnos(vm, place, [struct.pack("<I", line)] * rows)
        vm.enter(1)
        assert errno.EBUSY in write_errnos(vm, place, [struct.pack("<I", 26)] * rows)
        assert read(vm, place) == [struct.pack("<I", 26)] * rows


def test_a_pmus_line_is_set_once_and_a_vcpu_without_it_does_not_run() -> None:
    with create(SimBackend("arm64-6.12"), 2, DEFAULT | vcpu_features.PMU_V3) as vm:
        line, ppi = through_vcpu(gic.PMU_IRQ.id, 4), struct.pack("<I", 23)
        with pytest.raises(BackendError, match="KVM_RUN: EINVAL"):
            vm.enter(0)
        assert write_errnos(vm, line, [struct.pack("<I", 3)] * 2) == [errno.EINVAL] * 2
        assert write_errnos(vm, line, [ppi] * 2) == []
        assert write_errnos(vm, line, [ppi] * 2) == [errno.EBUSY] * 2
        vm.enter(0)


@pytest.mark.parametrize(("change", "no", "attribute"), [
    ({"gic_distributor": 0x1001}, errno.EINVAL, "DIST"), ({"gic_distributor": 1 << 41}, errno.E2BIG, "DIST"),
    ({"gic_redistributors": 0x8000}, errno.EINVAL, "REDIST"), ({"gic_irqs": 33}, errno.EINVAL, "NR_IRQS"),
    ({"gic_irqs": 32}, errno.EINVAL, "NR_IRQS"), ({"its": 0x123}, errno.EINVAL, "ITS"), ({}, 0, "")])
def test_devices_are_refused_as_the_kernel_does(change: dict[str, int], no: int, attribute: str) -> None:
    profile, wanted = profiles.load("arm64-6.12"), {**BOARD, **change}
    if not no:
        make_devices(profile, wanted, 1)
        return
    with pytest.raises(BackendError, match=attribute) as caught:
        make_devices(profile, wanted, 1)
    assert (caught.value.errno, caught.value.operation) == (no, "KVM_SET_DEVICE_ATTR")


# what KVM can be told and not asked


class Time:
    """A host's clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now


def counters(vm: Arm64SimVm) -> list[int]:
    """The virtual and the physical counter."""
    return [int.from_bytes(read(vm, by_name(vm)[name])[0], "little") for name in ("TIMER_CNT", "PTIMER_CNT")]


OFFSET = Layout(Scope.VM, Phase.CLOCK, (Slot(arm64.COUNTER_OFFSET.id, 16),)), Slot(arm64.COUNTER_OFFSET.id, 16)


def test_a_counter_offset_decides_for_both_counters_from_then_on() -> None:
    time = Time()
    with SimBackend("arm64-6.12", now_ns=time).create(machine(1)) as vm:
        assert isinstance(vm, Arm64SimVm)
        vm.create_vcpus()
        place = by_name(vm)["TIMER_CNT"]
        assert write_errnos(vm, place, [u64(5000)]) == []
        virtual, physical = counters(vm)
        assert virtual == 5000
        time.now += 10**9
        after = counters(vm)
        assert after[0] - virtual == after[1] - physical > 0, "both run, at one rate"
        assert write_errnos(vm, OFFSET, [u64(1, 1)]) == [errno.EINVAL], "reserved"
        assert arm64.COUNTER_OFFSET.name not in by_name(vm)
        assert write_errnos(vm, OFFSET, [u64(123, 0)]) == []
        assert len(set(counters(vm))) == 1 and read(vm, OFFSET) == [u64(123, 0)]
        now = counters(vm)
        assert write_errnos(vm, place, [u64(5000)]) == [] and counters(vm) == now, "ignored, without an error"
        assert arm64.COUNTER_OFFSET.name in by_name(vm), "so that it travels"


def test_a_kernel_without_counter_offsets_has_no_such_ioctl() -> None:
    with create(SimBackend("arm64-6.1"), 1) as vm:
        assert write_errnos(vm, OFFSET, [u64(123, 0)]) == [errno.EINVAL]


def test_a_vcpu_more_sets_the_virtual_counter_back() -> None:
    time = Time()
    vm = Arm64SimVm(profiles.load("arm64-6.12"), machine(2, devices={}), HostClock(1_000_000, time))
    vm.guest.add_vcpus(1)
    time.now += 10**9
    before = int.from_bytes(_count(vm), "little")
    vm.guest.add_vcpus(1)
    assert before > 0 and int.from_bytes(_count(vm), "little") == 0
    vm.close()


def _count(vm: Arm64SimVm) -> bytes:
    assert vm.init(0, DEFAULT) == (0, b"")
    return vm.get(0, next(row.id for row in arm64.COUNTERS if row.name == "TIMER_CNT"))[1]


@pytest.mark.parametrize(("capability", "args", "flags", "taken"), [
    (216, (), 0, True), (216, (), 1, False), (99999, (), 0, False), (239, (), 0, False)])
def test_capabilities_are_told_where_the_kernel_offers_them(
        capability: int, args: tuple[int, ...], flags: int, taken: bool) -> None:
    """On 6.12: ARM_SYSTEM_SUSPEND is there, ARM_WRITABLE_IMP_ID_REGS is not, flags are none."""
    vm = Arm64SimVm(profiles.load("arm64-6.12"), machine(1, devices={}), HostClock(1_000_000, lambda: 0))
    assert (vm.enable(capability, args, flags) == 0) == taken
    assert (capability in vm.guest.told) == taken
    vm.close()
