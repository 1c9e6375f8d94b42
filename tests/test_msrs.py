"""The MSR table, its order, and the names of bits."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.model import Klass, Scope
from migstream.registers import msrs
from migstream.registers.bit_tables import BITS, decode
from migstream.registers.bits import Field

TSC, TSC_DEADLINE = 0x10, 0x6E0

VM_WIDE = {
    0x11, 0x4B564D00,
    0x40000000, 0x40000001, 0x40000003, 0x40000020, 0x40000021,
    *range(0x400000F1, 0x400000F6), 0x400000FF,
    *range(0x40000100, 0x40000109), 0x40000118,
}

LISTED_BY_ONE_HOST = [
    0x174, 0x175, 0x176, 0xC0000081, 0xC0000083, 0xC0000102, 0xC0000084, 0xC0000082, 0x10, 0x277, 0xC0010117,
    0x1D9, 0x1DB, 0x1DC, 0x1DD, 0x1DE, 0x12, 0x11, 0x4B564D01, 0x4B564D00, 0x4B564D02, 0x4B564D03, 0x4B564D04,
    0x4B564D06, 0x4B564D07, 0x3B, 0x6E0, 0x10A, 0x345, 0x1A0, 0x17A, 0x17B, 0x34, 0xCE, 0x140, 0xC001011F,
    0x1FC, 0x8B, 0xC0010015, 0x4B564D05,
]

KNOWN = {
    0xC0000082: "MSR_LSTAR", 0x4B564D00: "MSR_KVM_WALL_CLOCK_NEW", 0x40000000: "HV_X64_MSR_GUEST_OS_ID",
    0x400000B0: "HV_X64_MSR_STIMER0_CONFIG", 0x400000B7: "HV_X64_MSR_STIMER3_COUNT",
    0x4000009F: "HV_X64_MSR_SINT15", 0x480: "MSR_IA32_VMX_BASIC", 0x491: "MSR_IA32_VMX_VMFUNC",
    0x20F: "MSR_MTRRphysMask7", 0x18D: "MSR_ARCH_PERFMON_EVENTSEL7", 0xC8: "MSR_ARCH_PERFMON_PERFCTR7",
    0xC001020B: "MSR_F15H_PERF_CTR5", 0x41D: "MSR_IA32_MC7_STATUS", 0x29F: "MSR_IA32_MC31_CTL2",
    0x587: "MSR_IA32_RTIT_ADDR3_B", 0x6A7: "MSR_IA32_PL3_SSP", 0x832: "X2APIC_LVTT",
    0x8F: "MSR_IA32_SGXLEPUBKEYHASH3",
}

every_msr = [row.index for row in msrs.MSRS]
any_msrs = st.lists(st.sampled_from(every_msr) | st.integers(0, 2**32 - 1), max_size=200)


def test_names_and_numbers_are_unique() -> None:
    assert len({row.index for row in msrs.MSRS}) == len(msrs.MSRS)
    assert len({row.name for row in msrs.MSRS}) == len(msrs.MSRS)


def test_rows_are_well_formed() -> None:
    for row in msrs.MSRS:
        assert 0 <= row.index < 2**32
        assert row.why or (row.scope, row.klass) == (Scope.VCPU, Klass.STATE), row.name
        assert "\n" not in row.why and "{" not in row.name


@pytest.mark.parametrize(("index", "name"), KNOWN.items())
def test_known_names(index: int, name: str) -> None:
    assert (msrs.name(index), msrs.lookup(index).name) == (name, name)


def test_unknown_msr_is_kept_as_state_of_its_vcpu() -> None:
    row = msrs.lookup(0xC0DE)
    assert row == msrs.Msr(0xC0DE, "MSR_0x0000c0de", Scope.VCPU, Klass.STATE, "not in the table")


def test_vm_wide_set_is_the_kernels() -> None:
    assert {row.index for row in msrs.MSRS if row.scope is Scope.VM} == VM_WIDE


def test_vmx_capabilities_are_features() -> None:
    assert {msrs.lookup(index).klass for index in range(0x480, 0x492)} == {Klass.FEATURE}


@pytest.mark.parametrize("index", [0x10, 0x3B, 0x6E0, 0xE7, 0xE8, 0x40000020, 0x40000010])
def test_what_runs_by_itself_is_clock(index: int) -> None:
    assert msrs.lookup(index).klass is Klass.CLOCK


def test_every_msr_that_a_host_lists_has_a_row() -> None:
    assert [hex(index) for index in LISTED_BY_ONE_HOST if index not in every_msr] == []


def test_order_rules_name_rows_and_give_a_reason() -> None:
    rows = {row.index for row in msrs.MSRS}
    for later, earlier, reason in msrs.ORDER_AFTER:
        assert {later, earlier} <= rows and later != earlier and reason


def test_each_rule_of_order_names_msrs() -> None:
    rules = {reason for *_, reason in msrs.ORDER_AFTER}
    assert rules == {reason for *_, reason in msrs._RULES}


@given(any_msrs)
def test_order_is_obeyed(indices: list[int]) -> None:
    place = {index: position for position, index in enumerate(msrs.sort_for_restore(indices))}
    for later, earlier, reason in msrs.ORDER_AFTER:
        if later in place and earlier in place:
            assert place[earlier] < place[later], reason


@given(st.permutations(every_msr))
def test_order_of_all_does_not_depend_on_the_input(indices: list[int]) -> None:
    assert msrs.sort_for_restore(indices) == every_msr


@given(any_msrs)
def test_order_keeps_everything_features_first_unknown_last(indices: list[int]) -> None:
    ordered = msrs.sort_for_restore(indices)
    assert sorted(ordered) == sorted(indices)
    rows = [msrs.lookup(index) for index in ordered]
    ranks = [2 if row.why == "not in the table" else int(row.klass is not Klass.FEATURE) for row in rows]
    assert ranks == sorted(ranks)


def test_deadline_is_last_of_the_known() -> None:
    assert msrs.sort_for_restore([0xC0DE, TSC_DEADLINE, TSC, 0x480]) == [0x480, TSC, TSC_DEADLINE, 0xC0DE]


def test_table_costs_no_heavy_import() -> None:
    code = ("import sys; from migstream.registers import msrs, bit_tables; "
            "sys.exit(bool({'numpy', 'construct'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("table", BITS)
def test_fields_ascend_and_do_not_overlap(table: str) -> None:
    fields = BITS[table]
    assert all(a.low + a.width <= b.low for a, b in pairwise(fields))
    assert fields[-1].low + fields[-1].width <= 64
    assert len({field.name for field in fields}) == len(fields)


def test_tables_of_msrs_have_the_names_of_rows() -> None:
    names = {row.name for row in msrs.MSRS}
    assert [table for table in BITS if table.startswith(("MSR_", "HV_")) and table not in names] == []


@pytest.mark.parametrize(("table", "value", "shown"), [
    ("CR0", 0x80050033, ["PE", "MP", "ET", "NE", "WP", "AM", "PG"]),
    ("EFER", 0xD01, ["SCE", "LME", "LMA", "NX"]),
    ("RFLAGS", 0x3202, ["FIXED", "IF", "IOPL=3"]),
    ("XCR0", 0x602E7, ["X87", "SSE", "AVX", "OPMASK", "ZMM_HI256", "HI16_ZMM", "PKRU", "XTILE_CFG",
                       "XTILE_DATA"]),
    ("APIC_BASE", 0xFEE00D00, ["BSP", "EXTD", "ENABLE", "PAGE=0xfee00"]),
    ("MP_STATE", 0, ["MP_STATE=RUNNABLE"]),
    ("MP_STATE", 3, ["MP_STATE=HALTED"]),
    ("MP_STATE", 77, ["MP_STATE=0x4d"]),
    ("kvm_clock_data.flags", 0xE, ["TSC_STABLE", "REALTIME", "HOST_TSC"]),
    ("MSR_IA32_FEAT_CTL", 5, ["LOCKED", "VMX_ENABLED_OUTSIDE_SMX"]),
    ("MSR_IA32_ARCH_CAPABILITIES", 1 << 62 | 1 << 22, ["bit 22", "ITS_NO"]),
    ("CR4", 1 << 63 | 1 << 5, ["PAE", "bit 63"]),
    ("APIC_LVTT", 0x400EC, ["VECTOR=236", "DELIVERY=FIXED", "MODE=TSC_DEADLINE"]),
    ("no such table", 5, ["bit 0", "bit 2"]),
])
def test_decode(table: str, value: int, shown: list[str]) -> None:
    assert decode(table, value) == shown


def bits_of(field: Field, text: str) -> int:
    """The bits that one shown word stands for."""
    value = text.partition("=")[2]
    if not value:
        return field.mask
    names = {name: number for number, name in field.values.items()}
    return (names[value] if value in names else int(value, 0)) << field.low & field.mask


@given(st.sampled_from(list(BITS)), st.integers(0, 2**64 - 1))
def test_no_set_bit_is_dropped(table: str, value: int) -> None:
    fields = {field.name: field for field in BITS[table]}
    back = 0
    for text in decode(table, value):
        bit = text.removeprefix("bit ")
        back |= 1 << int(bit) if bit != text else bits_of(fields[text.partition("=")[0]], text)
    assert back == value


def test_negative_value_is_refused() -> None:
    with pytest.raises(ValueError, match="CR0"):
        decode("CR0", -1)
