"""arm64 in the catalogue and the inspector, held to what two real kernels listed and to the kernel's own test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream import sections
from migstream.describe import fields
from migstream.frames import FrameWriter
from migstream.model import Arch, Bank, HostSummary, Klass, Layout, Machine, Phase, Scope, Slot
from migstream.reader import StreamReader
from migstream.registers import arm64, arm64_ids, arm64_sysregs, ids, x86_64
from migstream.registers.bit_tables import BITS, decode
from migstream.registers.bits import fields as bit_fields
from migstream.registers.catalogue import Register, lookup, running
from migstream.sections import EncodedBank
from migstream.wire import structs
from migstream.wire import x86_64 as wire_x86_64

DATA = Path(__file__).parent / "data" / "arm64"
SCOPE_FLAG = ids.KVM_REG_ARM_SCOPE_VM
STRUCTS = {arm64.VCPU_EVENTS.id, arm64.MP_STATE.id}


class Listed(NamedTuple):
    """One line of a real kernel's list: `effect` is vm, vcpu or fixed (no single-bit flip stuck)."""

    id: int
    size: int
    value: bytes
    effect: str


def listed(kernel: str) -> list[Listed]:
    """What KVM_GET_REG_LIST of this kernel gave, in the kernel's order."""
    lines = (line.split("\t") for line in (DATA / f"linux-{kernel}.tsv").read_text().splitlines() if line[0] != "#")
    return [Listed(int(id, 16), int(size), bytes.fromhex(value), effect)
            for id, size, value, _, effect, _ in lines]


KERNELS = ("6.1", "6.12")
REAL = {kernel: listed(kernel) for kernel in KERNELS}
ALL_IDS = [row.id for row in arm64.ROWS]
PLACE = {row.id: place for place, row in enumerate(
    sorted(arm64.ROWS, key=lambda row: (row.phase, row.scope == Scope.VCPU)))}
BY_NAME = {row.name: row for row in arm64.ROWS}

OTHER_SCOPE: dict[tuple[str, str], str] = {}
"""(kernel, register) where the experiment found another scope than the catalogue has: the reason. None is known."""


# The rows.


def test_ids_and_names_are_unique() -> None:
    assert len(set(ALL_IDS)) == len(ALL_IDS)
    assert len(BY_NAME) == len(arm64.ROWS)


@pytest.mark.parametrize("row", arm64.ROWS, ids=lambda row: row.name)
def test_row_is_well_formed(row: Register) -> None:
    assert lookup(row.id) is row
    assert row.known and row.why and "{" not in row.name + row.why
    assert row.size == (ids.size_in_id(row.id) or structs.STRUCTS[row.struct].size)
    assert not row.struct or structs.STRUCTS[row.struct].size == row.size
    assert ids.arch_of(row.id) == Arch.ARM64
    assert (row.phase == Phase.CLOCK) == (row.klass == Klass.CLOCK)
    assert row.phase != Phase.STATE or (row.scope, row.klass) == (Scope.VCPU, Klass.STATE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_listed_register_has_a_row_of_its_size(kernel: str) -> None:
    rows = [(lookup(real.id), real) for real in REAL[kernel]]
    assert [row.name for row, _ in rows if not row.known] == []
    assert [row.name for row, real in rows if row.size != real.size or real.size != len(real.value)] == []


def lists() -> dict[tuple[str, str], set[int]]:
    """What four kernels list, by kernel and `base` or `all` vCPU features."""
    out: dict[tuple[str, str], set[int]] = {}
    for line in (DATA / "lists.tsv").read_text().splitlines():
        id, *by_features = line.split("\t")
        for features, kernels in zip(("base", "all"), by_features if line[0] != "#" else (), strict=False):
            for kernel in kernels.split(","):
                out.setdefault((kernel, features), set()).add(int(id, 16))
    return out


@pytest.mark.parametrize(("kernel", "base", "everything"), [
    ("5.10", 312, 341), ("6.1", 242, 345), ("6.12", 259, 362), ("7.2", 257, 360)])
def test_every_register_of_four_kernels_has_a_row(kernel: str, base: int, everything: int) -> None:
    plain, most = lists()[kernel, "base"], lists()[kernel, "all"]
    assert (len(plain), len(most)) == (base, everything)
    assert [hex(id) for id in plain | most if not lookup(id).known] == []
    assert {real.id for real in REAL.get(kernel, ())} <= plain
    gone = {lookup(id).name for id in plain - most}
    assert gone == {f"V{n}" for n in range(32)}             # their bits are in Z0 to Z31


@pytest.mark.parametrize("kernel", KERNELS)
def test_scope_agrees_with_the_experiment(kernel: str) -> None:
    """Write through one vCPU, read through another. `fixed` says nothing; 6.1 fixes what 6.12 keeps once a VM."""
    found = {(kernel, lookup(real.id).name) for real in REAL[kernel]
             if real.effect not in ("fixed", lookup(real.id).scope)}
    assert found == {key for key in OTHER_SCOPE if key[0] == kernel}


def test_what_kernels_keep_in_different_ways_is_marked() -> None:
    for before, after in ((a, b) for a in REAL["6.1"] for b in REAL["6.12"] if a.id == b.id):
        if (before.effect, after.effect) == ("fixed", "vm"):
            assert not lookup(after.id).scope_fixed, lookup(after.id).name


WORKED = {
    "X0": 0x6030000000100000, "X30": 0x603000000010003C, "SP": 0x603000000010003E, "PC": 0x6030000000100040,
    "PSTATE": 0x6030000000100042, "SP_EL1": 0x6030000000100044, "ELR_EL1": 0x6030000000100046,
    "SPSR_EL1": 0x6030000000100048, "SPSR_FIQ": 0x6030000000100050, "V0": 0x6040000000100054,
    "V31": 0x60400000001000D0, "FPSR": 0x60200000001000D4, "FPCR": 0x60200000001000D5, "CCSIDR[2]": 0x6020000000110002,
    "PSCI_VERSION": 0x6030000000140000, "SMCCC_ARCH_WORKAROUND_1": 0x6030000000140001,
    "SMCCC_ARCH_WORKAROUND_3": 0x6030000000140003, "STD_BMAP": 0x6030000000160000,
    "STD_HYP_BMAP": 0x6030000000160001, "VENDOR_HYP_BMAP": 0x6030000000160002,
    "VENDOR_HYP_BMAP_2": 0x6030000000160003, "SVE_VLS": 0x606000000015FFFF, "Z0": 0x6080000000150000,
    "P0": 0x6050000000150400, "FFR": 0x6050000000150600, "MIDR_EL1": 0x603000000013C000,
    "MPIDR_EL1": 0x603000000013C005, "REVIDR_EL1": 0x603000000013C006, "AIDR_EL1": 0x603000000013C807,
    "CLIDR_EL1": 0x603000000013C801, "CTR_EL0": 0x603000000013D801, "ID_AA64PFR0_EL1": 0x603000000013C020,
    "ID_AA64ZFR0_EL1": 0x603000000013C024, "ID_AA64DFR0_EL1": 0x603000000013C028,
    "ID_AA64ISAR0_EL1": 0x603000000013C030, "ID_AA64MMFR0_EL1": 0x603000000013C038, "SCTLR_EL1": 0x603000000013C080,
    "TCR2_EL1": 0x603000000013C103, "PIRE0_EL1": 0x603000000013C512, "PIR_EL1": 0x603000000013C513,
    "TIMER_CTL": 0x603000000013DF19, "TIMER_CNT": 0x603000000013DF1A, "TIMER_CVAL": 0x603000000013DF02,
    "PTIMER_CTL": 0x603000000013DF11, "PTIMER_CVAL": 0x603000000013DF12, "PTIMER_CNT": 0x603000000013DF01,
}


@pytest.mark.parametrize(("name", "id"), WORKED.items())
def test_worked_ids(name: str, id: int) -> None:
    assert BY_NAME[name].id == id


def test_the_swapped_timer_encodings() -> None:
    """TIMER_CNT has the encoding of CNTV_CVAL_EL0 and TIMER_CVAL that of CNTVCT_EL0; the physical ones are right."""
    assert BY_NAME["TIMER_CNT"].id == arm64_ids.sysreg(3, 3, 14, 3, 2)
    assert BY_NAME["TIMER_CVAL"].id == arm64_ids.sysreg(3, 3, 14, 0, 2)
    assert BY_NAME["PTIMER_CNT"].id == arm64_ids.sysreg(3, 3, 14, 0, 1)


def count(*groups: arm64_sysregs.Group) -> int:
    """Registers of groups."""
    return sum(1 for group in groups for _ in group.registers())


def test_counts_of_the_kernels_own_test() -> None:
    """The sub-lists of Linux's get-reg-list selftest, which leaves the demux registers out."""
    core = len(arm64.CORE) + len(arm64.FP_STATUS)
    timers = len(arm64.TIMERS) + len(arm64.COUNTERS)
    system = count(arm64_sysregs.ID_REGISTERS, arm64_sysregs.CTR, arm64_sysregs.IMPLEMENTATION, arm64_sysregs.TOPOLOGY,
                   arm64_sysregs.EL1, arm64_sysregs.AARCH32, arm64_sysregs.DEBUG)
    zcr = sum(row.name == "ZCR_EL1" for row in arm64_sysregs.VECTOR_CONTROL.rows)
    assert (core, count(arm64_sysregs.ID_REGISTERS)) == (43, 56)
    assert core + len(arm64.FIRMWARE) + len(arm64.BITMAPS) + timers + system == 217
    assert len(arm64.VREGS) == 32
    assert count(arm64_sysregs.PMU) == 74
    assert 1 + len(arm64.SVE) + zcr == 51
    assert (count(arm64_sysregs.POINTER_AUTH_ADDRESS), count(arm64_sysregs.POINTER_AUTH_GENERIC)) == (8, 2)


IN_NO_SELFTEST = ("ICH_", "GCS", "TRFCR", "SDER32", "TFSR", "RVBAR")
"""EL2 registers that KVM has shown or hidden at times, or that a series on the list adds."""


def test_el2_registers_are_those_of_the_kernels_own_test() -> None:
    el2 = [row.name for group in (arm64_sysregs.EL2, arm64_sysregs.PHYSICAL_TIMER_EL2) for row in group.registers()]
    assert len([name for name in el2 if not name.startswith(IN_NO_SELFTEST)]) + len(["ZCR_EL2"]) == 55


def test_registers_of_6_12_by_the_catalogue() -> None:
    """217 of the base list, less what is newer or hidden there, with V registers and cache geometries, are 259."""
    newer = {"VENDOR_HYP_BMAP_2", "SCTLR2_EL1", "POR_EL1", "POR_EL0"}
    names = {lookup(real.id).name for real in REAL["6.12"]}
    assert not newer & names
    assert len(names) == 259 == 217 - len(newer) + 32 + 14


# Any id at all.


@given(st.integers(0, 2**64 - 1) | st.integers(0, 2**32 - 1).map(lambda low: 0x6030 << 48 | low))
@settings(max_examples=500)
def test_any_id_has_a_row(id: int) -> None:
    row = lookup(id)
    assert row.id == id and row.name and row.name.isprintable()
    assert not row.known or row.size is not None or ids.arch_of(id) is not Arch.ARM64


@pytest.mark.parametrize(("id", "name"), [
    (arm64_ids.sysreg(3, 0, 1, 2, 3), "ARM64_SYS_REG(3, 0, 1, 2, 3)"),
    (arm64_ids.sysreg(2, 7, 15, 15, 7), "ARM64_SYS_REG(2, 7, 15, 15, 7)"),
    (arm64_ids.firmware(9), "KVM_REG_ARM_FW_REG(9)"),
    (0x6040000000140004, "KVM_REG_ARM_FW_REG(4)"),      # an SDEI handler: 128 bits
    (0x60200000001000D6, "0x60200000001000d6"),
    (0x6030000080100000, "0x6030000080100000"),      # a bit that means nothing
    (0x9030000000100000, "0x9030000000100000"),
])
def test_id_without_a_row_is_kept_as_state_of_its_vcpu(id: int, name: str) -> None:
    row = lookup(id)
    assert (row.name, row.known, row.scope, row.phase) == (name, False, Scope.VCPU, Phase.STATE)
    assert row.size == ids.size_in_id(id)


def test_bitmap_without_a_row_is_the_vms_before_it_runs() -> None:
    row = lookup(arm64_ids.bitmap(4))
    assert (row.known, row.scope, row.phase, row.name) == (
        False, Scope.VM, Phase.FEATURE, "KVM_REG_ARM_FW_FEAT_BMAP_REG(4)")


def test_reserved_id_registers_have_the_kernels_names() -> None:
    assert lookup(arm64_ids.sysreg(3, 0, 0, 4, 3)).name == "S3_0_0_c4_3"


def test_a_further_sve_slice_is_known_by_its_first() -> None:
    row = lookup(arm64_ids.zreg(3) | 2)
    assert (row.name, row.size, row.known) == ("Z3[2]", 256, True)


@pytest.mark.parametrize("name", ["STD_BMAP", "SMCCC_ARCH_WORKAROUND_1", "X5"])
def test_the_proposed_scope_flag_wins(name: str) -> None:
    row = lookup(BY_NAME[name].id | SCOPE_FLAG)
    assert (row.name, row.scope, row.scope_fixed, row.size) == (name, Scope.VM, True, 8)


def test_enabled_capability_is_the_vms_and_comes_first() -> None:
    row = lookup(ids.capability_id(Arch.ARM64, 205))
    assert (row.name, row.scope, row.phase, row.struct) == (
        "KVM_ENABLE_CAP(205)", Scope.VM, Phase.CREATE, "enabled_cap")


# The order.


@pytest.mark.parametrize(("later", "earlier", "reason"), arm64.ORDER_AFTER)
def test_order_rule_is_obeyed(later: str, earlier: str, reason: str) -> None:
    assert reason and PLACE[BY_NAME[earlier].id] < PLACE[BY_NAME[later].id]


def test_id_registers_come_before_every_register_that_they_can_hide() -> None:
    last = max(PLACE[row.id] for row in arm64_sysregs.ID_REGISTERS.registers())
    assert last < min(PLACE[row.id] for row in arm64.ROWS if row.phase == Phase.STATE)


kernel_lists = st.sampled_from(KERNELS).map(lambda kernel: [real.id for real in REAL[kernel]])
odd_lists = st.lists(st.sampled_from(ALL_IDS) | st.integers(0x6030 << 48, (0x6030 << 48) + 2**29), max_size=60)
scope_maps = st.dictionaries(st.sampled_from(ALL_IDS), st.sampled_from(list(Scope)), max_size=40)


@given(kernel_lists | odd_lists, st.randoms(use_true_random=False), scope_maps)
@settings(max_examples=60, deadline=None)
def test_each_register_is_in_one_layout_whatever_the_order(reg_list: list[int], random: Random,
                                                           scopes: dict[int, Scope]) -> None:
    shuffled = reg_list * 2
    random.shuffle(shuffled)
    layouts = arm64.layouts(shuffled, scopes, STRUCTS)
    assert layouts == arm64.layouts(reg_list, scopes, STRUCTS)
    slots = [slot for layout in layouts for slot in layout.slots]
    assert sorted(slot.id for slot in slots) == sorted({*reg_list, *STRUCTS, arm64.VCPU_INIT.id})
    assert all(slot.size == lookup(slot.id).size for slot in slots)
    for layout in layouts:
        assert {scopes.get(slot.id, lookup(slot.id).scope) for slot in layout.slots} == {layout.scope}
        assert {lookup(slot.id).phase for slot in layout.slots} == {layout.phase}
    assert all((a.phase, a.scope == Scope.VCPU) < (b.phase, b.scope == Scope.VCPU) for a, b in pairwise(layouts))


@given(kernel_lists, st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_layouts_obey_the_order_rules(reg_list: list[int], random: Random) -> None:
    random.shuffle(reg_list)
    layouts = arm64.layouts(reg_list, extra=STRUCTS)
    place = {lookup(slot.id).name: n for n, slot in enumerate(slot for layout in layouts for slot in layout.slots)}
    for later, earlier, reason in arm64.ORDER_AFTER:
        if later in place and earlier in place:
            assert place[earlier] < place[later], reason


def test_unknown_registers_come_before_the_structs_that_depend_on_all() -> None:
    unknown = arm64_ids.sysreg(3, 0, 15, 0, 0)
    layouts = arm64.layouts([unknown, BY_NAME["TIMER_CTL"].id], extra=STRUCTS)
    assert [slot.id for slot in layouts[-1].slots] == [
        BY_NAME["TIMER_CTL"].id, unknown, arm64.VCPU_EVENTS.id, arm64.MP_STATE.id]


def test_what_6_12_keeps_once_a_vm_is_written_once() -> None:
    """35 by the experiment, all in VM layouts; with what is fixed there, 69 of 259."""
    layouts = arm64.layouts([real.id for real in REAL["6.12"]])
    once = {slot.id for layout in layouts if layout.scope == Scope.VM for slot in layout.slots}
    found = {real.id for real in REAL["6.12"] if real.effect == "vm"}
    assert len(found) == 35 and found <= once and len(once) == 69


def test_a_profile_decides_the_scope() -> None:
    reg_list, sctlr = [real.id for real in REAL["6.12"]], BY_NAME["SCTLR_EL1"].id
    scopes = {sctlr: Scope.VM, BY_NAME["ID_AA64PFR0_EL1"].id: Scope.VCPU}
    by_id = {slot.id: layout for layout in arm64.layouts(reg_list, scopes) for slot in layout.slots}
    assert all(by_id[id].scope == scope for id, scope in scopes.items())


# Bits and structs.


ARM64_TABLES = [table for row in arm64.ROWS if (table := row.bits) in BITS]


def test_every_id_register_has_a_bit_table() -> None:
    names = {row.name for row in arm64_sysregs.ID_REGISTERS.registers() if not row.name.startswith("S3_")}
    assert names - BITS.keys() == {"ID_AA64AFR1_EL1"}       # no field is allocated


def test_bit_tables_have_the_names_of_rows_or_of_struct_fields() -> None:
    from migstream.registers import bits_arm64, bits_arm64_id

    used = {row.bits for row in arm64.ROWS}
    tables = {*bits_arm64.BITS, *bits_arm64_id.BITS}
    assert {name for name in tables - used if name.split(".")[0] not in structs.STRUCTS} == set()


@given(st.sampled_from(ARM64_TABLES), st.integers(0, 2**64 - 1))
def test_every_set_bit_without_a_name_is_shown(table: str, value: int) -> None:
    unnamed = value
    for field in BITS[table]:
        unnamed &= ~field.mask
    shown = {int(text.removeprefix("bit ")) for text in decode(table, value) if text.startswith("bit ")}
    assert shown == {bit for bit in range(64) if unnamed >> bit & 1}
    named = [field for field in BITS[table] if value & field.mask]
    assert len(decode(table, value)) >= len(named) + len(shown)


@pytest.mark.parametrize(("table", "value", "shown"), [
    ("PSCI_VERSION", 0x10003, ["PSCI=1.3"]),
    ("PSCI_VERSION", 0x2, ["PSCI=0.2"]),
    ("PSCI_VERSION", 0x20000, ["PSCI=0x20000"]),
    ("SMCCC_ARCH_WORKAROUND_1", 2, ["LEVEL=NOT_REQUIRED"]),
    ("SMCCC_ARCH_WORKAROUND_2", 0x12, ["LEVEL=AVAIL", "ENABLED"]),
    ("VENDOR_HYP_BMAP", 7, ["FUNC_FEAT", "PTP", "bit 2"]),
    ("VENDOR_HYP_BMAP_2", 3, ["DISCOVER_IMPL_VER", "DISCOVER_IMPL_CPUS"]),
    ("PSTATE", 0x3C5, ["M=EL1h", "F", "I", "A", "D"]),
    ("PSTATE", 0x600001D3, ["M=svc", "F", "I", "A", "C", "Z"]),
    ("ID_AA64PFR0_EL1", 0x11, ["EL0=IMP", "EL1=IMP", "FP=IMP", "AdvSIMD=IMP"]),
    ("ID_AA64PFR0_EL1", 0x0000_0001_00FF_0002, ["EL0=AARCH32", "FP=NI", "AdvSIMD=NI", "SVE=IMP"]),
    ("ID_AA64PFR0_EL1", 0x7 << 16, ["FP=7", "AdvSIMD=IMP"]),
    ("ID_AA64PFR0_EL1", 0xE << 16, ["FP=-2", "AdvSIMD=IMP"]),
    ("ID_AA64DFR0_EL1", 0x10305009, ["DebugVer=V8P4", "BRPs=5", "WRPs=3", "CTX_CMPs=1", "DoubleLock=IMP",
                                     "MTPMU=NI_IMPDEF"]),
    ("ID_AA64MMFR0_EL1", 0x0F00_0080, ["PARANGE=32", "ASIDBITS=0x8", "TGRAN64=NI", "TGRAN4=IMP", "TGRAN16_2=TGRAN16",
                                       "TGRAN64_2=TGRAN64", "TGRAN4_2=TGRAN4"]),
    ("ID_DFR0_EL1", 5 << 24, ["PerfMon=PMUv3p4"]),
    ("CTR_EL0", 0x9444C004, ["IminLine=4", "L1Ip=PIPT", "DminLine=4", "ERG=4", "CWG=4", "IDC", "RES1"]),
    ("CLIDR_EL1", 0x21 | 2 << 32, ["Ctype1=INST", "Ctype2=UNIFIED", "Ttype1=1"]),
    ("MIDR_EL1", 0x413FD0C1, ["REVISION=1", "PARTNUM=0xd0c", "ARCHITECTURE=15", "VARIANT=3", "IMPLEMENTER=ARM"]),
    ("MPIDR_EL1", 0x80000301, ["Aff0=1", "Aff1=3", "RES1"]),
    ("TIMER_CTL", 5, ["ENABLE", "ISTATUS"]),
    ("TCR_EL1", 0x80000019, ["T0SZ=25", "TG0=4K", "TG1=4K", "IPS=32"]),
    ("ESR_EL1", 0x56000000, ["IL", "EC=SVC64"]),
    ("kvm_vcpu_init.features.0", 0x1C, ["PSCI_0_2", "PMU_V3", "SVE"]),
])
def test_decode(table: str, value: int, shown: list[str]) -> None:
    assert decode(table, value) == shown


def test_words_of_the_field_language() -> None:
    flag, number, signed = bit_fields("31:N 0/6:T0SZ 8/4:FP~IMP,FP16")
    assert (flag.mask, number.mask, dict(number.values)) == (1 << 31, 0x3F, {})
    assert (signed.signed, dict(signed.values)) == (True, {0: "IMP", 1: "FP16", 15: "NI"})
    assert dict(bit_fields("0/4:A@1.X,Y,15.Z")[0].values) == {1: "X", 2: "Y", 15: "Z"}


def shown(row: Register, value: bytes) -> dict[str, tuple[object, tuple[str, ...]]]:
    """Fields of a value by path."""
    assert row.size == len(value)
    return {field.path: (field.value, field.bits) for field in fields(Slot(row.id, len(value)), value)}


def test_vector_lengths_are_shown_in_bits() -> None:
    value = (1 << 0 | 1 << 1 | 1 << 3 | 1 << 15).to_bytes(64, "little")
    assert shown(BY_NAME["SVE_VLS"], value)["vqs.0"][1] == ("128", "256", "512", "2048")
    assert shown(BY_NAME["SVE_VLS"], bytes(56) + bytes(7) + b"\x80")["vqs.7"][1] == ("65536",)


def test_vcpu_init_by_field() -> None:
    init = shown(arm64.VCPU_INIT, (5 | 0xC << 32).to_bytes(32, "little"))
    assert init["target"] == (5, ("TARGET=GENERIC_V8",))
    assert init["features.0"] == (0xC, ("PSCI_0_2", "PMU_V3"))


def test_events_and_state_by_field() -> None:
    events = shown(arm64.VCPU_EVENTS, bytes((1, 1, 0)) + bytes(5) + (0x1234).to_bytes(8, "little") + bytes(48))
    assert events["exception.serror_pending"][0] == 1 and events["exception.serror_esr"][0] == 0x1234
    assert shown(arm64.MP_STATE, b"\x05\0\0\0")["mp_state"][1] == ("MP_STATE=STOPPED",)


def test_a_wide_register_keeps_every_byte() -> None:
    value = Random(1).randbytes(256)
    assert shown(BY_NAME["Z7"], value) == {"": (value, ())}


@pytest.mark.parametrize("name", structs.STRUCTS.keys() - wire_x86_64.STRUCTS.keys())
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_no_byte_of_a_struct_is_lost(name: str, seed: int) -> None:
    size = structs.STRUCTS[name].size
    assert size is not None and structs.STRUCTS[name].construct.sizeof() == size
    raw = Random(seed).randbytes(size)
    assert structs.build(name, structs.parse(name, raw)) == raw


def test_struct_sizes_are_the_kernels() -> None:
    sizes = {"kvm_vcpu_init": 32, "kvm_vcpu_events_arm64": 64, "kvm_arm_counter_offset": 16, "kvm_smccc_filter": 24,
             "kvm_pmu_event_filter_arm64": 8, "sve_vls": 64}
    assert {name: structs.STRUCTS[name].size for name in structs.STRUCTS.keys() - wire_x86_64.STRUCTS.keys()} == sizes


def test_what_may_differ_on_read_back() -> None:
    timer = running(BY_NAME["TIMER_CTL"].id)
    assert timer is not None and timer.spans == ((2, 1),)
    assert running(BY_NAME["TIMER_CNT"].id) is not None and running(BY_NAME["SCTLR_EL1"].id) is None
    assert running(x86_64.CLOCK.id) is x86_64.RUNNING[x86_64.CLOCK.id]
    for id, known in arm64.RUNNING.items():
        assert lookup(id).known and known.reason
        assert all(low + width <= (lookup(id).size or 0) * 8 for low, width in known.spans)


# A stream of the real list.


def banks(kernel: str, vcpus: int) -> list[Bank]:
    """Banks of what a real kernel listed with the values that it had, on each vCPU."""
    values = {real.id: real.value for real in REAL[kernel]}
    return [Bank(layout, 0, np.array([_row(layout, values)] * (vcpus if layout.scope == Scope.VCPU else 1)))
            for layout in arm64.layouts(list(values), extra=STRUCTS)]


def _row(layout: Layout, values: dict[int, bytes]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    parts = (values.get(slot.id, bytes(slot.size)).ljust(slot.words * 8, b"\0") for slot in layout.slots)
    return np.frombuffer(b"".join(parts), np.uint64)


def stream(made: list[Bank], vcpus: int) -> bytes:
    """A stream of banks, prologue first."""
    writer = FrameWriter(Arch.ARM64)
    machine, host = Machine(Arch.ARM64, vcpus, ()), HostSummary("6.12.107", "QEMU max", "kvm")
    head = [sections.encode(machine), sections.encode(host), *(sections.encode(bank.layout) for bank in made)]
    parts = [writer.begin(), *(part for section in head for part in writer.send(section))]
    for number, bank in enumerate(made):
        parts += writer.send(sections.encode_bank(bank, number))
    return b"".join([*parts, *writer.end()])


def decoded(data: bytes) -> Iterator[Bank]:
    """Banks of a stream."""
    reader = StreamReader()
    reader.feed(data)
    while (found := reader.next()) is not None:
        if isinstance(found[1], EncodedBank):
            yield found[1].decode()
    reader.end_of_input()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stream_of_the_real_list_comes_back_and_names_every_register(kernel: str) -> None:
    made = banks(kernel, vcpus=3)
    back = list(decoded(stream(made, vcpus=3)))
    assert [(bank.layout, bank.values.tolist()) for bank in back] == [
        (bank.layout, bank.values.tolist()) for bank in made]
    names = [lookup(slot.id).name for bank in back for slot, _ in bank.items(0)]
    assert len(set(names)) == len(names) == len(REAL[kernel]) + 3
    values = {slot.id: value for bank in back for slot, value in bank.items(0)}
    assert all(values[real.id] == real.value for real in REAL[kernel])
    assert all(fields(slot, value) for bank in back for slot, value in bank.items(bank.rows - 1))


def test_every_row_at_once_fits_a_stream() -> None:
    """More than any vCPU has: V beside Z registers, EL2, SVE, every other feature."""
    values = {row.id: b"\x03" * (row.size or 0) for row in arm64.ROWS if row.id not in STRUCTS}
    made = [Bank(layout, 0, np.array([_row(layout, values)])) for layout in arm64.layouts(values)]
    back = {slot.id: value for bank in decoded(stream(made, vcpus=1)) for slot, value in bank.items(0)}
    assert back == values
