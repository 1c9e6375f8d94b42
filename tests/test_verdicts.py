"""Verdicts: the words and their order, exit status, guests made of profiles and contracts, what profiles can't say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import show_check
from migstream.bounds import within
from migstream.contract import BASELINE, Behaviour, Contract
from migstream.host import profiles
from migstream.host.baseline import baseline
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, Phase, Scope, Slot
from migstream.plan import Plan, Step, plan_for
from migstream.registers import arm64_ids, ids, vcpu_features, x86_64
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import Pair
from migstream.verdicts.guest import fresh, moved, of_contract
from migstream.verdicts.judge import deciding, judge
from migstream.verdicts.model import Answer, Column, Kernel, Overruled, Saved, Verdict

PSCI, STD = arm64_ids.firmware(0), arm64_ids.bitmap(0)
X0, X1 = arm64_ids.core(0), arm64_ids.core(2)
ALL = vcpu_features.parse("sve,pmu_v3,ptrauth")


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def verdict(answer: Answer, id: int = X0, **more: object) -> Verdict:
    slot = Slot(id, 8)
    written = slot if answer in (Answer.FITS, Answer.WRITTEN_AS) else None
    reason = "" if answer == Answer.FITS else "why"
    return replace(Verdict(slot, answer, written, reason), **more)  # type: ignore[arg-type]  # of many kinds


def plan(*verdicts: Verdict, obstacles: tuple[str, ...] = ()) -> Plan:
    layout = Layout(Scope.VCPU, Phase.STATE, tuple(v.slot for v in verdicts))
    return Plan((Step(layout, layout, verdicts),), obstacles)


def lost() -> Verdict:
    """What a policy lets a guest notice."""
    return verdict(Answer.NOTICED, tolerated="ours", overruled=Overruled("tolerate", "ours", Answer.REFUSED))


# Words.


@pytest.mark.parametrize(("one", "text"), [
    (verdict(Answer.FITS), "X0: fits"),
    (verdict(Answer.WRITTEN_AS, reason="0x0: why"), "X0: fits, written as: 0x0: why"),
    (verdict(Answer.HARMLESS), "X0: absent, harmless because why"),
    (verdict(Answer.NOTICED), "X0: guest would notice: why"),
    (verdict(Answer.REFUSED), "X0: refused: why"),
    (lost(), "X0: guest would notice: why (policy, tolerate: ours)"),
])
def test_what_a_verdict_says(one: Verdict, text: str) -> None:
    assert str(one) == text


@pytest.mark.parametrize(("one", "in_the_way", "loses"), [
    (verdict(Answer.FITS), False, False), (verdict(Answer.WRITTEN_AS), False, False),
    (verdict(Answer.HARMLESS), False, False), (verdict(Answer.NOTICED), True, False),
    (verdict(Answer.REFUSED), True, False), (lost(), False, True)])
def test_what_stands_in_the_way(one: Verdict, in_the_way: bool, loses: bool) -> None:
    assert (one.stands_in_the_way, one.loses) == (in_the_way, loses)


@pytest.mark.parametrize(("judged", "status"), [
    (plan(), 0), (plan(verdict(Answer.FITS), verdict(Answer.HARMLESS)), 0), (plan(verdict(Answer.WRITTEN_AS)), 0),
    (plan(verdict(Answer.FITS), lost()), 10), (plan(lost(), verdict(Answer.NOTICED)), 11),
    (plan(verdict(Answer.REFUSED)), 11), (plan(obstacles=("another architecture",)), 11),
    (plan(lost(), obstacles=("too many vCPUs",)), 11)])
def test_exit_status(judged: Plan, status: int) -> None:
    assert show_check.status(judged) == status
    assert show_check.said(judged).startswith(show_check.WORDS[status])


_verdicts = st.lists(st.builds(verdict, st.sampled_from(Answer), st.sampled_from([X0, X1, PSCI])) | st.builds(lost),
                     max_size=30)


@given(_verdicts, st.lists(st.just("too many vCPUs"), max_size=1))
def test_the_worst_comes_first_and_nothing_is_left_out(verdicts: list[Verdict], obstacles: list[str]) -> None:
    judged = plan(*verdicts, obstacles=tuple(obstacles))
    document = show_check.plain(judged)
    assert sum(document["counts"].values()) == len(verdicts)
    order = [answer.name.lower() for answer in reversed(Answer)]
    assert list(document["counts"]) == [name for name in order if name in document["counts"]]
    lines = [line for _, line in show_check.host_pairs("h", judged, True)][1:]
    assert lines[:len(obstacles)] == obstacles
    told = [answer for line in lines[len(obstacles):] for answer in Answer
            if answer != Answer.FITS and line.partition(": ")[2].startswith(answer)]
    assert len(told) == len(lines) - len(obstacles) == sum(bool(v.reason) for v in verdicts)
    assert told == sorted(told, key=lambda answer: order.index(answer.name.lower()))
    bad = [v for v in verdicts if v.stands_in_the_way]
    assert len(judged.refusals) == len(bad) + len(obstacles)
    if bad:
        first = judged.refusals[len(obstacles)]
        assert ("refused" in first) == any(v.answer == Answer.REFUSED for v in bad)


def test_one_screen_is_one_screen() -> None:
    judged = plan(*[verdict(Answer.NOTICED)] * 100)
    lines = show_check.host_pairs("h", judged, False)
    assert len(lines) == show_check.SCREEN + 2 and "80 more; --all" in lines[-1][1]
    assert len(show_check.host_pairs("h", judged, True)) == 101


def test_several_hosts_the_worst_first() -> None:
    table = show_check.hosts_table({"good": plan(verdict(Answer.FITS)), "bad": plan(verdict(Answer.REFUSED)),
                                    "so-so": plan(lost())})
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        ("bad", "does not fit", "X0: refused: why"),
        ("so-so", "fits with loss", "X0: guest would notice: why (policy, tolerate: ours)"), ("good", "fits", "")]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=60, unique=True))
def test_every_reason_has_a_letter_of_its_own(reasons: list[str]) -> None:
    legend = show_check.Legend()
    keys = [legend.key(reason) for reason in reasons]
    assert len(set(keys)) == len(reasons) and keys == [legend.key(reason) for reason in reasons]
    assert [key for key, _ in legend.pairs(True)] == keys


# Columns.


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_a_column_is_judged_as_a_whole(values: list[int], other: int, cut: int) -> None:
    """Against the plain way: value by value."""
    matrix = np.array(values, np.uint64).reshape(-1, 1)
    parts = [part for part in (matrix[:cut], matrix[cut:]) if len(part)]
    column = Column(Slot(X0, 8), parts)
    assert set(column.numbers) == set(values) and len(column.numbers) == len(set(values))
    differing = 0
    for value in values:
        differing |= value ^ other
    assert column.differing(other) == differing
    assert column.only(other) == (set(values) == {other})


X86 = [name for name in profiles.names() if name.startswith("x86_64")]


def judged(host: HostProfile, slot: Slot, value: bytes) -> Verdict:
    columns = {slot.id: Column.of(slot, value)}
    return judge(Pair(Saved(Machine(Arch.X86_64, 1, ()), (), columns), host), slot)


@pytest.mark.parametrize("name", X86)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 2**64 - 1))
def test_the_same_deciding_bits_the_same_verdict(name: str, noise: bytes, components: int) -> None:
    """Of KVM_XSAVE the components that the host has not; all else of it is the guest's own."""
    host = profiles.load(name)
    slot = Slot(x86_64.XSAVE.id, host.sizes.get(x86_64.XSAVE.id, 4096))
    (asked,) = deciding(host, slot)
    plain, other = bytearray(slot.size), bytearray((noise * (slot.size // 64))[:slot.size])
    plain[8 * asked.word:8 * asked.word + 8] = word(components & asked.mask)
    other[8 * asked.word:8 * asked.word + 8] = word(components)
    assert judged(host, slot, bytes(plain)) == judged(host, slot, bytes(other))
    assert (judged(host, slot, bytes(other)).answer == Answer.REFUSED) == bool(components & asked.mask)


ADDRESSES = st.integers(0, 2**64 - 1) | st.builds(lambda bit, few, sign: (sign << 64) + (-1) ** sign * (1 << bit) + few,
                                                 st.integers(8, 63), st.integers(-2, 2), st.integers(0, 1))


@pytest.mark.parametrize("name", X86)
@given(st.sampled_from((0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000102)), ADDRESSES, ADDRESSES)
def test_addresses_that_are_alike_get_the_same_verdict(name: str, index: int, one: int, other: int) -> None:
    host, slot = profiles.load(name), Slot(ids.msr_id(index), 8)
    one, other = one % 2**64, other % 2**64
    alike = b"".join(asked.like(one, 0) for asked in deciding(host, slot))
    if within(np.array([[other]], np.uint64), alike):
        assert judged(host, slot, word(one)) == judged(host, slot, word(other))
    assert within(np.array([[one]], np.uint64), alike)
    kernel_text = b"".join(asked.like(0, 0) for asked in deciding(host, slot))
    assert index < 0x1000 or within(np.array([[0xFFFF_FFFF_8100_0000]], np.uint64), kernel_text)


# Guests of profiles.


@pytest.mark.parametrize("name", profiles.names())
@pytest.mark.parametrize("features", (vcpu_features.DEFAULT, ALL), ids=("plain", "all"))
def test_a_fresh_guest_fits_its_own_host_and_is_the_same_after_a_move_to_it(name: str, features: int) -> None:
    host = profiles.load(name)
    guest = fresh(host, features)
    judged = plan_for(guest, host)
    assert judged.refusals == [] and len(guest.columns) > 40
    assert judged.pair is not None
    again = moved(judged.pair, judged.verdicts)
    assert {id: column.distinct for id, column in again.columns.items()} == {
        id: column.distinct for id, column in guest.columns.items()}


@pytest.mark.parametrize("name", profiles.names())
def test_a_guest_under_a_baseline_of_one_kernel_fits_it(name: str) -> None:
    host = profiles.load(name)
    contract = baseline({"a": host, "b": host}).contract
    assert contract.behaviour.found == BASELINE and contract.values
    assert plan_for(of_contract(contract, host), host).refusals == []
    assert plan_for(fresh(host, contract.vcpu_features, contract), host).refusals == []


def pairs() -> Iterator[tuple[str, str]]:
    return ((a, b) for a in profiles.names() for b in profiles.names()
            if a != b and a.split("-")[0] == b.split("-")[0])


@pytest.mark.parametrize(("a", "b"), list(pairs()))
def test_a_guest_that_has_moved_is_what_the_verdicts_say(a: str, b: str) -> None:
    """What was written is there, what was dropped is gone or the host's own; and it stays where it is."""
    guest, host = fresh(profiles.load(a)), profiles.load(b)
    judged = plan_for(guest, host)
    assert judged.pair is not None
    there = moved(judged.pair, judged.verdicts)
    for one in judged.verdicts:
        if one.target == one.slot and one.value is None and one.kernel != Kernel.DROPS:
            assert there.columns[one.slot.id].distinct == guest.columns[one.slot.id].distinct
        if one.value is not None:
            assert there.columns[one.slot.id].distinct == (one.value,)
    if not judged.refusals:
        assert plan_for(there, host).refusals == []


def test_what_a_contract_leaves_free_is_as_on_the_host() -> None:
    host = profiles.load("arm64-7.2")
    value = int.from_bytes(host.defaults[PSCI], "little")
    pinned = Contract(Arch.ARM64, "k", "c", vcpu_features.DEFAULT, {PSCI: word(value ^ 0xF)})
    assert plan_for(of_contract(pinned, host), host).verdicts[0].answer == \
        (Answer.REFUSED if value ^ 0xF > value else Answer.FITS)
    free = replace(pinned, free={PSCI: 0xF})
    assert of_contract(free, host).columns[PSCI].numbers == (value,)


def test_guests_of_another_architecture_are_not_judged() -> None:
    judged = plan_for(fresh(profiles.load("arm64-7.2")), profiles.load("x86_64-7.2"))
    assert judged.refusals == ["the stream is arm64, this host is x86_64"]
    assert show_check.said(judged) == "does not fit: not judged"


# What neither kernel has a register for.


def _kernel(**more: object) -> HostProfile:
    return replace(HostProfile(Arch.ARM64, "Linux T", "cpu", "kvm", {"MAX_VCPUS": 8}, registers=(X0,),
                               defaults={X0: word(0)}, register_bits={X0: (word(1), word(1))}, scopes={X0: "vcpu"},
                               vcpu_features=vcpu_features.DEFAULT), **more)  # type: ignore[arg-type]  # likewise


def _guest(promised: dict[int, bytes]) -> Saved:
    column = Column.of(Slot(X0, 8), word(0))
    return Saved(Machine(Arch.ARM64, 1, (), {}), (Layout(Scope.VCPU, Phase.STATE, (column.slot,)),), {X0: column},
                 Contract(Arch.ARM64, "k", "c", behaviour=Behaviour("measured", promised)))


TRNG_VERSION = 0x8400_0050 << 32


@pytest.mark.parametrize(("firmware", "promised", "refusals"), [
    ({}, 0, []), ({TRNG_VERSION: 2**64 - 1}, 0, []), ({TRNG_VERSION: 0x10000}, 1, []),
    ({TRNG_VERSION: 0x10000}, 0, ["STD_BMAP: guest would notice: the guest's kernel behaved as 0x0, this one as 0x1, "
                                  "and neither has a register to set it"])])
def test_a_behaviour_that_no_register_can_hide(firmware: dict[int, int], promised: int, refusals: list[str]) -> None:
    host = _kernel(firmware=firmware)
    assert plan_for(_guest({STD: word(promised)}), host).refusals == refusals


def test_an_absent_register_is_harmless_where_the_kernel_behaves_so() -> None:
    column = Column.of(Slot(STD, 8), word(1))
    saved = Saved(Machine(Arch.ARM64, 1, (), {}), (Layout(Scope.VM, Phase.FEATURE, (column.slot,)),), {STD: column})
    asked = plan_for(saved, _kernel(firmware={TRNG_VERSION: 0x10000}))
    assert [str(v) for v in asked.verdicts] == [
        "STD_BMAP: absent, harmless because a kernel without the register behaves as 0x1"]
    assert plan_for(saved, _kernel(firmware={TRNG_VERSION: 2**64 - 1})).refusals


# A profile that was captured without the experiment.


@pytest.mark.parametrize("name", ("arm64-7.2", "x86_64-7.2"))
def test_without_the_experiment_verdicts_say_so(name: str) -> None:
    host = replace(profiles.load(name), scopes={}, feature_scopes={}, scope_found={}, register_bits={},
                   feature_bits={}, msr_bits={}, readback={}, after_run={}, bit_errnos={})
    judged = plan_for(fresh(profiles.load(name)), host)
    assert "scope from catalogue: this host's profile was captured without the experiment" in judged.notes
    assert any("which bits this kernel lets be changed nobody has tried" in note for note in judged.notes)
    assert not any("experiment" in note for note in plan_for(fresh(host), profiles.load(name)).notes)


def test_an_id_register_that_nobody_tried_to_change() -> None:
    host = replace(profiles.load("arm64-6.12"), register_bits={}, feature_bits={}, writable_masks={})
    id = arm64_ids.sysreg(3, 0, 0, 7, 2)  # ID_AA64MMFR2_EL1
    guest = fresh(profiles.load("arm64-6.12"))
    value = guest.columns[id].numbers[0]
    lowered = replace(guest, columns={**guest.columns, id: Column.of(Slot(id, 8), word(value & ~0xF))})
    if lowered.columns[id].numbers == (value,):
        pytest.skip("CnP is 0 on the recorded host")
    (one,) = [v for v in plan_for(lowered, host).verdicts if v.slot.id == id]
    assert one.kernel == Kernel.UNKNOWN and "nobody has tried whether this kernel lets it be changed" in one.reason


def test_every_verdict_of_every_pair_has_a_reason_where_it_is_no_plain_fit() -> None:
    for a, b in pairs():
        for one in plan_for(fresh(profiles.load(a), ALL), profiles.load(b)).verdicts:
            assert one.answer == Answer.FITS or (one.reason and one.source), (a, b, str(one))
            assert one.answer not in (Answer.REFUSED, Answer.HARMLESS) or one.target is None
            assert lookup(one.slot.id).name == one.name and ids.size_in_id(one.slot.id) in (None, one.slot.size)


def test_the_last_row_of_arm64_is_for_what_is_absent_and_nothing_else() -> None:
    """The judge gives a register that no other row is about a plain fit without asking, where it is listed."""
    from migstream.verdicts import arm64
    from migstream.verdicts.facts import absent

    assert (arm64.RULES[-1].registers, arm64.RULES[-1].when) == ("*", absent)
