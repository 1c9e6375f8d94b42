"""The guest program that asks its firmware, on a processor of the test's own; what answers say of absent registers."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping

import numpy as np
import pytest

from migstream.backends.base import GuestMemory, Refusal
from migstream.contract import DERIVED, MEASURED, RECORDED
from migstream.errors import BackendError
from migstream.host import firmware_arm64 as guest
from migstream.host import profiles
from migstream.host.behaviour import of_profile
from migstream.host.profile import from_json, to_json
from migstream.model import Layout, MemoryRegion
from migstream.registers import arm64_ids
from migstream.registers import firmware_arm64 as calls
from migstream.registers.catalogue import lookup

NO = calls.NOT_SUPPORTED
STD, STD_HYP, VENDOR, VENDOR_2 = (arm64_ids.bitmap(n) for n in range(4))

# What Linux 5.10.0-32-arm64 answered in the lab to a guest of QEMU's `max` CPU.
LAB_5_10 = {calls.PSCI_VERSION: 0x1_0000, calls.WORKAROUND_1: 1, calls.WORKAROUND_2: NO, calls.WORKAROUND_3: 1,
            calls.PV_TIME: 0, calls.TRNG_VERSION: NO, calls.VENDOR_UID: NO, calls.VENDOR_FEATURES: NO, calls.PTP: NO,
            calls.IMPL_VERSION: NO, calls.IMPL_CPUS: NO}
# The same of Linux 6.12.107+deb13-arm64.
LAB_6_12 = {**LAB_5_10, calls.PSCI_VERSION: 0x1_0001, calls.WORKAROUND_3: NO, calls.TRNG_VERSION: 0x1_0000,
            calls.VENDOR_UID: 0xB66F_B428, calls.VENDOR_FEATURES: 3, calls.PTP: 0}


def keyed(answers: Mapping[calls.Call, int]) -> dict[int, int]:
    """By key."""
    return {call.key: x0 for call, x0 in answers.items()}


class Processor:
    """A VM of one vCPU that knows the eight instructions of the program, decoded from the Arm ARM's tables."""

    def __init__(self, firmware: Mapping[tuple[int, int], int], registers: Mapping[int, int]) -> None:
        self.buffer = bytearray(1 << 16)
        self.memory = GuestMemory([(MemoryRegion(0, 1 << 16), memoryview(self.buffer))])
        self.firmware, self.system = firmware, registers
        self.x = [0] * 32
        self.pc = self.pstate = 0
        self.reason = ""
        self.calls: list[tuple[int, int, int, int]] = []

    def _slot(self, id: int) -> int | None:
        return (id & 0xFFFF) // 2 if (id & 0xFFFF) < 62 else None

    def read(self, layout: Layout, first_vcpu: int, values: np.ndarray) -> list[Refusal]:
        number = self._slot(layout.slots[0].id)
        assert number is not None
        values[0, 0] = self.x[number]
        return []

    def write(self, layout: Layout, first_vcpu: int, values: np.ndarray) -> list[Refusal]:
        name = {arm64_ids.core(64): "pc", arm64_ids.core(66): "pstate"}[layout.slots[0].id]
        setattr(self, name, int(values[0, 0]))
        return []

    def start(self) -> None:
        if self.reason:
            self.pc += 4  # KVM steps over the store when it runs on
        self.reason = ""
        while not self.reason:
            self.step()

    def pause(self) -> None:
        """It stands still already."""

    def exits(self) -> dict[int, str]:
        return {0: self.reason}

    def step(self) -> None:
        (code,) = struct.unpack_from("<I", self.buffer, self.pc)
        rd, rn, imm = code & 31, code >> 5 & 31, code >> 5 & 0xFFFF
        if code >> 26 == 0b000101:
            offset = code & 0x3FF_FFFF
            self.pc += 4 * (offset - (1 << 26) if offset >> 25 else offset)
            return
        if code & 0xFFC0_0000 == 0xF900_0000:
            self.reason = "KVM_EXIT_MMIO" if self.x[rn] == guest.NO_RAM else "a store to RAM"
            return
        if code >> 21 == 0b110_1001_0100:
            self.x[rd] = imm
        elif code >> 21 == 0b111_1001_0101:
            self.x[rd] = self.x[rd] & ~0xFFFF_0000 | imm << 16
        elif code == 0xD400_0002:
            self.calls.append((self.x[0], self.x[1], self.x[2], self.x[3]))
            self.x[:4] = [self.firmware.get((self.x[0], self.x[1]), NO), 0xDEAD, 0xDEAD, 0xDEAD]
        elif code & 0xFFE0_FFE0 == 0xAA00_03E0:
            self.x[rd] = self.x[code >> 16 & 31]
        elif code >> 20 == 0xD53:
            self.x[rd] = self.system[arm64_ids.sysreg(2 + (code >> 19 & 1), code >> 16 & 7, code >> 12 & 15,
                                                      code >> 8 & 15, code >> 5 & 7)]
        else:
            assert code == 0xD503_201F, f"{code:#x} at {self.pc:#x}"
        self.pc += 4


def processor() -> Processor:
    """One on which everything has a value of its own, and the program."""
    system = {q.key: 0x1111 * n for n, q in enumerate(guest.questions()) if isinstance(q, guest.SystemRegister)}
    vm = Processor({(c.function, c.argument): x0 for c, x0 in LAB_6_12.items()}, system)
    guest.install(vm.memory, guest.questions(), guest.ADDRESS)
    return vm


def test_every_question_has_its_answer() -> None:
    vm = processor()
    for _ in range(2):  # from its beginning whenever it is asked
        (seen,) = guest.look(vm, guest.questions(), guest.ADDRESS)  # type: ignore[arg-type]  # all that is used of a VM
        assert seen == {**{call.key: LAB_6_12.get(call, NO) for call in calls.CALLS}, **vm.system}
    assert vm.pstate == 0x3C5
    assert {row[2:] for row in vm.calls} == {(0, 0)}


def test_it_begins_again_behind_its_end() -> None:
    vm = processor()
    (first,) = guest.look(vm, guest.questions(), guest.ADDRESS)  # type: ignore[arg-type]  # likewise
    vm.start()
    assert vm.reason == "KVM_EXIT_MMIO"
    assert vm.x[4] == next(iter(first.values()))


def test_a_vcpu_that_does_not_answer_is_an_error() -> None:
    vm = processor()
    vm.exits = lambda: {0: "KVM_EXIT_SHUTDOWN"}  # type: ignore[method-assign]  # this VM alone
    with pytest.raises(BackendError, match="vCPU 0: KVM_RUN: a guest that asks its firmware: KVM_EXIT_SHUTDOWN"):
        guest.look(vm, guest.questions(), guest.ADDRESS)  # type: ignore[arg-type]  # likewise


def test_questions_are_unique_and_change_nothing() -> None:
    asked = guest.questions()
    assert len({q.key for q in asked}) == len({q.name for q in asked}) == len(asked)
    powers = {0x8400_0002, 0x8400_0008, 0x8400_0009, 0xC400_0001, 0xC400_0003, 0xC400_000E, 0xC400_0012, 0xC400_0015}
    assert not powers & {call.function for call in calls.CALLS}


def test_a_time_is_no_answer_to_keep() -> None:
    assert (calls.PTP.answer(12345), calls.PTP.answer(NO), calls.PTP.answer(0xFFFF_FFFF)) == (0, NO, NO)


# register, answers, what the kernel behaves as.
BEHAVES = (
    (arm64_ids.firmware(0), LAB_5_10, 0x1_0000), (arm64_ids.firmware(0), LAB_6_12, 0x1_0001),
    (arm64_ids.firmware(1), LAB_5_10, 2), (arm64_ids.firmware(2), LAB_5_10, 0),
    (arm64_ids.firmware(3), LAB_5_10, 2), (arm64_ids.firmware(3), LAB_6_12, 0),
    (arm64_ids.firmware(2), {calls.WORKAROUND_2: NO - 1}, 3), (arm64_ids.firmware(2), {calls.WORKAROUND_2: 0}, 2),
    (arm64_ids.firmware(1), {calls.WORKAROUND_1: 0}, 1),
    (STD, LAB_5_10, 0), (STD_HYP, LAB_5_10, 1), (VENDOR, LAB_5_10, 0), (VENDOR_2, LAB_5_10, 0),
    (STD, LAB_6_12, 1), (STD_HYP, LAB_6_12, 1), (VENDOR, LAB_6_12, 3), (VENDOR_2, LAB_6_12, 0),
    (VENDOR_2, {calls.IMPL_VERSION: NO, calls.IMPL_CPUS: 0}, 2),
)


@pytest.mark.parametrize(("register", "answers", "expected"), BEHAVES)
def test_what_answers_say(register: int, answers: dict[calls.Call, int], expected: int) -> None:
    values, how, _ = calls.behaves_as(keyed(answers), frozenset())
    assert values[register] == expected.to_bytes(8, "little")
    assert all(call.name in how[register] for row in calls.ABSENT if row.register == register for call in row.asked)


def test_the_table_agrees_with_the_registers_of_a_kernel_that_has_them() -> None:
    """What the lab's 6.12 answers is what its registers say: the table can be believed where there are none."""
    values, _, _ = calls.behaves_as(keyed(LAB_6_12), frozenset())
    recorded = profiles.load("arm64-6.12")
    there = {row.register: recorded.defaults[row.register] for row in calls.ABSENT if row.register in recorded.listed}
    assert len(there) == 7
    assert {id: values[id] for id in there} == there


def test_what_nobody_asked_is_named() -> None:
    values, _, unknown = calls.behaves_as({}, frozenset({arm64_ids.firmware(0)}))
    assert values == {}
    assert len(unknown) == len(calls.ABSENT) - 1
    assert "STD_BMAP: this kernel has none, and nobody asked it TRNG_VERSION" in unknown


def test_a_profile_with_answers_says_what_its_kernel_behaves_as() -> None:
    recorded = dataclasses.replace(profiles.load("arm64-5.10"), firmware=keyed(LAB_5_10), guest_registers={STD: 7})
    assert from_json(to_json(recorded)) == recorded
    found = of_profile(recorded)
    assert (found.found, found.unknown) == (RECORDED, ())
    assert {lookup(id).name: value[0] for id, value in found.behaves_as.items()} == {
        "STD_BMAP": 0, "STD_HYP_BMAP": 1, "VENDOR_HYP_BMAP": 0, "VENDOR_HYP_BMAP_2": 0}
    assert of_profile(recorded, MEASURED).found == MEASURED


def test_a_profile_without_answers_says_that_it_does_not_know() -> None:
    found = of_profile(dataclasses.replace(profiles.load("arm64-5.10"), firmware={}))
    assert (found.found, dict(found.behaves_as)) == (DERIVED, {})
    assert [line.split(":")[0] for line in found.unknown] == [
        "STD_BMAP", "STD_HYP_BMAP", "VENDOR_HYP_BMAP", "VENDOR_HYP_BMAP_2"]


def test_x86_feature_msrs_that_no_bank_carries() -> None:
    found = of_profile(profiles.load("x86_64-6.12"))
    assert [lookup(id).name for id in found.behaves_as] == [lookup(0x2030_0002_C001_1029).name]
