"""Answers that hang on two registers, or on a host of which the lab has none: each row of the rules by an example."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from migstream.contract import Behaviour, Contract
from migstream.host import profiles
from migstream.host.baseline import baseline
from migstream.host.profile import HostProfile, cpuid_word
from migstream.model import Arch, Slot
from migstream.plan import plan_for
from migstream.registers import ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.registers.msrs import MSRS
from migstream.registers.x86_64 import CPUID2, SREGS2, TSC_KHZ
from migstream.verdicts.facts import BY_NAME, Pair
from migstream.verdicts.guest import fresh
from migstream.verdicts.judge import judge
from migstream.verdicts.model import Answer, Column, Kernel, Saved, Verdict

TAKES, DROPS, REFUSES = Kernel.TAKES, Kernel.DROPS, Kernel.REFUSES
PMU = vcpu_features.parse("pmu_v3")
MSR = {row.name: ids.msr_id(row.index) for row in MSRS}


def guest(host: HostProfile, values: dict[int, bytes], features: int = vcpu_features.DEFAULT) -> Saved:
    """One that comes fresh from this very host, with other values."""
    made = fresh(host, features)
    columns = {id: Column.of(Slot(id, len(value)), value) for id, value in values.items()}
    return replace(made, columns={**made.columns, **columns})


def verdict(saved: Saved, host: HostProfile, id: int) -> Verdict:
    return judge(Pair(saved, host), saved.columns[id].slot)


def arm64(kernel: str, values: dict[str, int], features: int = vcpu_features.DEFAULT) -> Verdict:
    """The verdict of the last of these values."""
    host = profiles.load(f"arm64-{kernel}")
    numbers = {BY_NAME[name]: value.to_bytes(8, "little") for name, value in values.items()}
    return verdict(guest(host, numbers, features), host, [*numbers][-1])


SSBS, NO_SSBS, NO_SSBS_AND_MORE = 0x21, 0x1, 0x0F00_0001


@pytest.mark.parametrize(("kernel", "pfr1", "level", "kernel_says", "answer"), [
    ("6.12", NO_SSBS, 3, TAKES, Answer.FITS),          # NOT_REQUIRED, as 6.12 itself then says
    ("7.2", NO_SSBS, 0, DROPS, Answer.NOTICED),        # was NOT_AVAIL where it was saved
    ("7.2", NO_SSBS, 0x12, DROPS, Answer.FITS),        # 3 with the flag that says that it is on
    ("7.2", NO_SSBS, 4, REFUSES, Answer.REFUSED),
    ("7.2", SSBS, 3, REFUSES, Answer.REFUSED),         # the guest has SSBS: NOT_AVAIL and nothing above
    ("6.1", NO_SSBS, 3, REFUSES, Answer.REFUSED),      # SSBS stays there: what the guest has does not count
    ("6.1", NO_SSBS, 0, TAKES, Answer.FITS),
    ("6.12", NO_SSBS_AND_MORE, 3, REFUSES, Answer.NOTICED),   # not taken as it is, so SSBS stays
    ("6.12", NO_SSBS_AND_MORE, 0, TAKES, Answer.NOTICED),
])
def test_workaround_2_of_a_guest_without_ssbs(kernel: str, pfr1: int, level: int, kernel_says: Kernel,
                                              answer: Answer) -> None:
    found = arm64(kernel, {"ID_AA64PFR1_EL1": pfr1, "SMCCC_ARCH_WORKAROUND_2": level})
    assert (found.kernel, found.answer) == (kernel_says, answer)


def test_a_workaround_level_above_the_hosts_is_refused_by_name() -> None:
    found = arm64("6.12", {"SMCCC_ARCH_WORKAROUND_3": 2})
    assert (found.answer, found.kernel) == (Answer.REFUSED, REFUSES)
    assert found.reason == "the guest was told level 0x2, this host has 0x0 for it; a write only checks, and this " \
        "one is refused"


@pytest.mark.parametrize(("nv", "kernel", "answer"), [(2, DROPS, Answer.NOTICED), (1, REFUSES, Answer.NOTICED),
                                                      (3, REFUSES, Answer.NOTICED), (0, TAKES, Answer.FITS)])
def test_a_field_that_is_taken_at_the_cpus_value_and_not_shown(nv: int, kernel: Kernel, answer: Answer) -> None:
    """ID_AA64MMFR2_EL1.NV of a CPU with FEAT_NV2: since 6.15 the kernel takes 2 and shows 0."""
    host, id = profiles.load("arm64-7.2"), BY_NAME["ID_AA64MMFR2_EL1"]
    taken, kept = host.register_bits[id]
    host = replace(host, register_bits={**host.register_bits, id: (
        (int.from_bytes(taken, "little") | 2 << 24).to_bytes(8, "little"), kept)})
    own = int.from_bytes(host.defaults[id], "little")
    found = verdict(guest(host, {id: (own | nv << 24).to_bytes(8, "little")}), host, id)
    assert (found.kernel, found.answer) == (kernel, answer)
    if kernel == DROPS:
        assert found.target is not None and "shows its own" in found.reason


@pytest.mark.parametrize(("register", "value", "dfr0", "kernel"), [
    ("PMCR_EL0", 0x800, None, TAKES),            # fewer counters than the host has
    ("PMCR_EL0", 0x3800, None, DROPS),           # more
    ("PMCR_EL0", 0x4101_3000, None, DROPS),      # implementer and ID code are the host's
    ("PMEVCNTR3_EL0", 1 << 40 | 5, 0x1030_5409, DROPS),    # PMUVer 4: counters of 32 bits
    ("PMEVCNTR3_EL0", 5, 0x1030_5409, TAKES),
    ("PMEVCNTR3_EL0", 1 << 40 | 5, 0x1030_5609, TAKES),
])
def test_counters(register: str, value: int, dfr0: int | None, kernel: Kernel) -> None:
    before = {"ID_AA64DFR0_EL1": dfr0} if dfr0 else {}
    assert arm64("6.12", {**before, register: value}, PMU).kernel == kernel


def test_a_stream_that_does_not_say_what_its_guest_read() -> None:
    """Older ones of 5.10 and 6.1: nobody claims to know what CTR_EL0 was for them."""
    host, id = profiles.load("arm64-6.1"), BY_NAME["CTR_EL0"]
    saved = fresh(host)
    quiet = replace(saved, contract=Contract(Arch.ARM64, "Linux 5.10", "cpu"))
    found = verdict(quiet, host, id)
    assert found.answer == Answer.NOTICED
    assert found.reason.startswith("a guest reads 0x8444c004 here, whatever the register has; the register had 0x9444")
    assert "does not say whether the guest read that" in found.reason
    same = replace(saved, contract=Contract(Arch.ARM64, host.kernel, host.cpu))
    assert verdict(same, host, id).answer == Answer.FITS


def test_a_baseline_pins_cache_geometry_where_all_take_it() -> None:
    id = BY_NAME["CLIDR_EL1"]
    both = baseline({name: profiles.load(name) for name in ("arm64-6.1", "arm64-7.2")}).contract
    assert int.from_bytes(both.values[id], "little") == 0x200_0023
    host = profiles.load("arm64-6.1")
    other = replace(host, defaults={**host.defaults, id: (0x200_0021).to_bytes(8, "little")},
                    guest_registers={**host.guest_registers, id: 0x200_0021})
    found = baseline({"a": host, "b": other})
    assert id not in found.contract.values
    assert "CLIDR_EL1: cache geometry: hosts differ, and no value serves all" in found.left_out


# x86-64


def x86(kernel: str) -> HostProfile:
    return profiles.load(f"x86_64-{kernel}")


def with_words(cpuid: bytes, words: dict[tuple[int, int, int], int]) -> bytes:
    """The table with these words; an entry that it has not is appended."""
    table = bytearray(cpuid)
    for (leaf, subleaf, n), word in words.items():
        at = next((at for at in range(8, len(table), 40) if struct.unpack_from("<II", table, at) == (leaf, subleaf)),
                  len(table))
        if at == len(table):
            table += struct.pack("<II", leaf, subleaf) + bytes(32)
        struct.pack_into("<I", table, at + 12 + 4 * n, word)
    struct.pack_into("<I", table, 0, (len(table) - 8) // 40)
    return bytes(table)


@pytest.mark.parametrize(("words", "answer", "kernel", "reason"), [
    ({}, Answer.FITS, TAKES, ""),
    ({(0xD, 0, 0): 1 << 18 | 7}, Answer.REFUSED, REFUSES, "XTILEDATA"),
    ({(0x8000_0008, 0, 0): 0x3428}, Answer.REFUSED, REFUSES, "linear addresses of 52 bits"),
    ({(7, 0, 2): 1 << 30}, Answer.NOTICED, TAKES, "SGX_LC: not supported here"),
    ({(0xD, 1, 0): 2, (0xD, 1, 1): 0}, Answer.NOTICED, DROPS, "XSAVEC"),
])
def test_cpuid(words: dict[tuple[int, int, int], int], answer: Answer, kernel: Kernel, reason: str) -> None:
    host = x86("7.2")
    found = verdict(guest(host, {CPUID2.id: with_words(host.cpuid, words)}), host, CPUID2.id)
    assert (found.answer, found.kernel) == (answer, kernel)
    assert reason.lower() in found.reason.lower().replace("_", "") or reason in found.reason


def test_a_feature_that_a_host_shows_whatever_is_written() -> None:
    """AVX2 of a host that can't trap CPUID: its guests have it, one from elsewhere would meet it."""
    host = x86("7.2")
    avx2 = 1 << 5
    forced = replace(host, cpuid_forced={**host.cpuid_forced, cpuid_word(7, 0, 1): (0xFFFF_FFFF ^ avx2, avx2)},
                     cpuid=with_words(host.cpuid, {(7, 0, 1): 0}))
    assert verdict(fresh(forced), forced, CPUID2.id).answer == Answer.FITS
    came = verdict(guest(host, {CPUID2.id: with_words(host.cpuid, {(7, 0, 1): 0})}), forced, CPUID2.id)
    assert (came.answer, came.kernel) == (Answer.NOTICED, DROPS)
    assert came.reason == "CPUID 0x7.0:EBX bit 5 AVX2: shown otherwise here, whatever is written"


@pytest.mark.parametrize(("khz", "kernel"), [(1_000_000, REFUSES), (9_000_000, TAKES)])
def test_a_tsc_that_can_not_be_scaled(khz: int, kernel: Kernel) -> None:
    """A slower one is refused, a faster one caught up with; the MSR that says so follows what was told."""
    host = x86("6.12")
    saved = guest(host, {TSC_KHZ.id: khz.to_bytes(4, "little")})
    found = verdict(saved, host, TSC_KHZ.id)
    assert (found.answer, found.kernel) == (Answer.NOTICED, kernel)
    assert verdict(saved, host, MSR["HV_X64_MSR_TSC_FREQUENCY"]).kernel == DROPS


@pytest.mark.parametrize(("kernel", "address", "la57", "answer"), [
    ("6.1", 0x7FFF_FFFF_F000, 0, Answer.FITS), ("6.1", 0xFFFF_8000_0000_0000, 0, Answer.FITS),
    ("6.1", 0x40_0000_0000_0000, 0, Answer.REFUSED), ("6.1", 0x40_0000_0000_0000, 1, Answer.FITS),
    ("6.12", 0x40_0000_0000_0000, 0, Answer.FITS), ("6.12", 0x8000_0000_0000_0000, 1, Answer.REFUSED)])
def test_an_address_as_wide_as_the_kernel_takes(kernel: str, address: int, la57: int, answer: Answer) -> None:
    host = x86(kernel)
    sregs = bytearray(host.defaults[SREGS2.id])
    struct.pack_into("<Q", sregs, 248, la57 << 12)
    saved = guest(host, {SREGS2.id: bytes(sregs), MSR["MSR_CSTAR"]: address.to_bytes(8, "little")})
    assert verdict(saved, host, MSR["MSR_CSTAR"]).answer == answer


@pytest.mark.parametrize(("info", "answer"), [(0, Answer.REFUSED), (1 << 31, Answer.FITS)])
def test_cpuid_faulting_needs_the_platforms_offer(info: int, answer: Answer) -> None:
    host = x86("6.12")
    values = {MSR["MSR_PLATFORM_INFO"]: info.to_bytes(8, "little"),
              MSR["MSR_MISC_FEATURES_ENABLES"]: (1).to_bytes(8, "little")}
    assert verdict(guest(host, values), host, MSR["MSR_MISC_FEATURES_ENABLES"]).answer == answer


@pytest.mark.parametrize(("kernel", "edx", "answer", "says"), [
    ("7.2", 0, Answer.HARMLESS, REFUSES), ("7.2", 1 << 29, Answer.FITS, TAKES), ("6.12", 0, Answer.FITS, TAKES)])
def test_arch_capabilities_that_the_guest_can_not_read(kernel: str, edx: int, answer: Answer, says: Kernel) -> None:
    host, id = x86(kernel), MSR["MSR_IA32_ARCH_CAPABILITIES"]
    values = {CPUID2.id: with_words(host.cpuid, {(7, 0, 3): edx}), id: (0x79).to_bytes(8, "little")}
    found = verdict(guest(host, values), host, id)
    assert (found.answer, found.kernel) == (answer, says)


def test_a_feature_msr_that_the_stream_lacks_is_written_as_promised() -> None:
    """MSR_AMD64_DE_CFG of a kernel that could tell it and not save it; without a promise it is named."""
    old, new, id = x86("6.12"), x86("7.2"), ids.msr_id(0xC001_1029)
    without = replace(old, defaults={key: value for key, value in old.defaults.items() if key != id})
    saved = fresh(without)
    assert id not in saved.ids and saved.contract is not None
    assert saved.contract.behaves_as[id] == (2).to_bytes(8, "little")
    (added,) = plan_for(saved, new).additions
    assert (added.verdict.answer, added.verdict.value) == (Answer.WRITTEN_AS, (2).to_bytes(8, "little"))
    assert not plan_for(fresh(old), new).additions
    unasked = replace(saved, contract=Contract(Arch.X86_64, "k", "c", behaviour=Behaviour()))
    assert [note for note in plan_for(unasked, new).notes if note.startswith(lookup(id).name)] == [
        "MSR_AMD64_DE_CFG: the stream lacks it and nobody asked the saving kernel what it behaves as: the guest meets "
        "this kernel's default, 0x2"]
