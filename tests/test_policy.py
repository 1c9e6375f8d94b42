"""Policies: what each word does to a verdict, what a policy may not do in silence, and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from migstream import show_check
from migstream.contract import Behaviour, Contract
from migstream.errors import DocumentError, MigstreamError
from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, Phase, Scope, Slot
from migstream.plan import Plan, plan_for
from migstream.registers import arm64_ids, x86_64
from migstream.registers.catalogue import lookup
from migstream.verdicts.guest import fresh
from migstream.verdicts.model import Answer, Column, Saved
from migstream.verdicts.policy import NO_POLICY, STRICTEST_FIRST, VERBS, Policy, PolicyError, known_names, parse

PSCI, STD, MMFR1 = arm64_ids.firmware(0), arm64_ids.bitmap(0), arm64_ids.sysreg(3, 0, 0, 7, 1)
X0 = arm64_ids.core(0)


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


HOST = HostProfile(
    Arch.ARM64, "Linux T", "cpu", "kvm", {"MAX_VCPUS": 8}, registers=tuple(sorted((X0, PSCI, STD, MMFR1))),
    defaults={X0: word(0), PSCI: word(0x10001), STD: word(1), MMFR1: word(0x10)},
    register_bits={X0: (word(2**64 - 1), word(2**64 - 1)), MMFR1: (word(0xF0), word(0xF0)), STD: (word(1), word(1))},
    scopes={X0: "vcpu"}, vcpu_features=4)
"""A small kernel: PSCI 1.1, ID_AA64MMFR1_EL1 writable in its VMIDBits alone."""


def guest(contract: Contract | None = None, **values: int) -> Saved:
    """A guest with these registers: psci, std, mmfr1, x0."""
    ids = {"psci": PSCI, "std": STD, "mmfr1": MMFR1, "x0": X0}
    columns = {ids[name]: Column.of(Slot(ids[name], 8), word(value)) for name, value in values.items()}
    layout = Layout(Scope.VCPU, Phase.FEATURE, tuple(column.slot for column in columns.values()))
    return Saved(Machine(Arch.ARM64, 1, (), {}), (layout,), columns, contract)


def policy(verb: str, register: str = "PSCI_VERSION", notices: bool = True) -> Policy:
    return parse(f"migstream_policy = 1\n[[{verb}]]\nregister = '{register}'\nreason = 'ours'\n"
                 f"guest_notices = {str(notices).lower()}\n", "p.toml")


def judged(saved: Saved, *policies: Policy) -> Plan:
    return plan_for(saved, HOST, Policy(tuple(clause for one in policies for clause in one.clauses), "p.toml"))


def test_nothing_is_overruled_without_a_policy() -> None:
    (verdict,) = judged(guest(psci=0x10003)).verdicts
    assert verdict.answer == Answer.REFUSED and verdict.stands_in_the_way and verdict.overruled is None


def test_tolerate_goes_on_and_says_so() -> None:
    plan = judged(guest(psci=0x10003), policy("tolerate"))
    (verdict,) = plan.verdicts
    assert plan.refusals == [] and verdict.loses and verdict.target is None
    assert verdict.overruled is not None
    assert (verdict.overruled.verb, verdict.overruled.reason, verdict.overruled.was) == ("tolerate", "ours",
                                                                                         Answer.REFUSED)
    assert str(verdict) == ("PSCI_VERSION: guest would notice: PSCI 0x10003, this kernel has at most 0x10001 "
                            "(policy, tolerate: ours)")


def test_clamp_writes_the_nearest_value() -> None:
    (verdict,) = judged(guest(psci=0x10003), policy("clamp")).verdicts
    assert verdict.loses and verdict.target == verdict.slot and verdict.value == word(0x10001)


def test_clamp_keeps_the_fields_that_the_host_can_have() -> None:
    """VMIDBits may be lowered, HAFDBS may not: the guest's own value in the first, the host's in the second."""
    (verdict,) = judged(guest(mmfr1=0x02), policy("clamp", "ID_AA64MMFR1_EL1")).verdicts
    assert verdict.loses and verdict.value == word(0x00)


def test_clamp_leaves_what_fits_and_what_is_no_number() -> None:
    assert judged(guest(psci=0x10000), policy("clamp")).verdicts[0].overruled is None
    host = profiles.load("x86_64-6.1")
    plan = plan_for(fresh(profiles.load("x86_64-6.18-pvm")), host, policy("clamp", "KVM_CPUID2"))
    verdict = next(v for v in plan.verdicts if v.slot.id == x86_64.CPUID2.id)
    assert verdict.stands_in_the_way and verdict.overruled is None


def test_ignore_of_a_value_that_a_fresh_vm_has_anyway() -> None:
    (verdict,) = judged(guest(psci=0x10001), policy("ignore", notices=False)).verdicts
    assert (verdict.answer, verdict.target) == (Answer.HARMLESS, None)
    assert verdict.overruled is not None and verdict.overruled.was == Answer.FITS


@pytest.mark.parametrize("register", ("PSCI_VERSION", "*"))
def test_ignore_of_another_value_is_noticed(register: str) -> None:
    (verdict,) = judged(guest(psci=0x10000), policy("ignore", register)).verdicts
    assert verdict.loses and verdict.target is None and "own value stays" in verdict.reason


def test_ignore_of_what_is_left_out_anyway_changes_nothing() -> None:
    saved = guest(contract=None, psci=0x10001)
    absent = arm64_ids.bitmap(3)
    column = Column.of(Slot(absent, 8), word(0))
    layouts = (*saved.layouts, Layout(Scope.VM, Phase.FEATURE, (column.slot,)))
    saved = replace(saved, layouts=layouts, columns={**saved.columns, absent: column})
    plan = judged(saved, policy("ignore", lookup(absent).name, notices=False))
    assert plan.refusals == [] and plan.verdicts[1].overruled is None


def test_require_refuses_what_the_rules_let_pass() -> None:
    contract = Contract(Arch.ARM64, "k", "c", behaviour=Behaviour("measured", {STD: word(0)}))
    plan = judged(guest(contract, psci=0x10001), policy("require", "STD_BMAP"))
    assert plan.refusals == ["STD_BMAP: refused: the policy requires it as saved; it is: fits, written as: 0x0: the "
                             "saving kernel has no such register, and this is what it behaves as (policy, require: "
                             "ours)"]
    assert judged(guest(psci=0x10001), policy("require")).refusals == []


def test_a_contracts_register_can_be_ignored() -> None:
    """The value that counts is the contract's: the stream has no such register."""
    contract = Contract(Arch.ARM64, "k", "c", behaviour=Behaviour("measured", {STD: word(0)}))
    (_, verdict) = judged(guest(contract, psci=0x10001), policy("ignore", "STD_BMAP")).verdicts
    assert verdict.loses and verdict.target is None
    same = replace(contract, behaviour=Behaviour("measured", {STD: word(1)}))
    (_, verdict) = judged(guest(same, psci=0x10001), policy("ignore", "STD_BMAP", notices=False)).verdicts
    assert verdict.answer == Answer.HARMLESS


def test_the_strictest_word_wins() -> None:
    plan = judged(guest(psci=0x10003), policy("tolerate"), policy("require"), policy("clamp"))
    assert plan.refusals[0].startswith("PSCI_VERSION: refused: the policy requires")


@pytest.mark.parametrize("verb", ("tolerate", "clamp", "ignore"))
def test_what_a_guest_would_notice_has_to_be_said(verb: str) -> None:
    with pytest.raises(PolicyError) as caught:
        judged(guest(psci=0x10003), policy(verb, notices=False))
    line = str(caught.value)
    assert caught.value.exit_status == 4 and "\n" not in line
    assert line.startswith(f"p.toml: {verb} PSCI_VERSION: a guest would notice: ") and "guest_notices = true" in line


def test_a_clock_that_is_ignored_is_noticed() -> None:
    host = profiles.load("x86_64-7.2")
    with pytest.raises(PolicyError, match=r"MSR_IA32_TSC: a guest would notice: the target's own clock goes on"):
        plan_for(fresh(profiles.load("x86_64-6.1")), host, policy("ignore", "MSR_IA32_TSC", notices=False))


HOSTS = [name for name in profiles.names() if name.startswith("arm64")]


@given(st.sampled_from(HOSTS), st.sampled_from(HOSTS), st.sampled_from(VERBS), st.sampled_from(
    ("*", "ID_*", "PSCI_VERSION", "*_BMAP", "PM*", "X?", "SMCCC_*", "TIMER_*", "GIC*")), st.booleans())
def test_any_policy_on_any_pair(a: str, b: str, verb: str, register: str, notices: bool) -> None:
    """A verdict is overruled or as it was; nothing is lost without `guest_notices`; `require` never helps."""
    saved, host = fresh(profiles.load(a)), profiles.load(b)
    before = {v.slot.id: v for v in plan_for(saved, host).verdicts}
    try:
        plan = plan_for(saved, host, policy(verb, register, notices))
    except PolicyError:
        assert not notices and verb != "require"
        return
    for verdict in plan.verdicts:
        old = before[verdict.slot.id]
        assert verdict == old if verdict.overruled is None else verdict.overruled.was == old.answer
        assert notices or not verdict.loses
        if verb == "require":
            assert verdict.answer in (old.answer, Answer.REFUSED) and not verdict.loses


# Files.

FORMATS = Path(__file__).parent.parent / "formats"
README = Path(__file__).parent.parent / "README.md"


def test_the_readme_s_policy_is_one() -> None:
    text = README.read_text().split("```toml\n")[1].split("```")[0]
    assert [clause.verb for clause in parse(text).clauses] == list(VERBS)


def test_the_specification_has_every_word_and_field() -> None:
    text = (FORMATS / "SPEC.md").read_text().split("### 8.2")[1].split("## 9.")[0]
    words = [f"| `{word}` |" for word in (*VERBS, "register", "reason", "guest_notices")]
    answers = [f"| `{answer.name.lower()}` | `{answer}` |" for answer in Answer]
    assert [row for row in (*words, *answers) if row not in text] == []
    order = [text.index(f"| `{verb}` |") for verb in STRICTEST_FIRST]
    assert order == sorted(order) and {*STRICTEST_FIRST} == {*VERBS}


HEAD = "migstream_policy = 1\n"
BAD = (
    ("", "not a policy: no migstream_policy = 1"), ("x", "not a policy: not TOML"),
    ("migstream_policy = 2", "policy version 2; this migstream reads 1"),
    ("migstream_policy = true", "policy version True"), ("migstream_policy = 1.0", "policy version 1.0"),
    ("migstream_policy = '1'", "policy version '1'"), (f"migstream_policy = {'9' * 5000}", "not a policy: not TOML"),
    (HEAD + "[[allow]]", "unknown word 'allow'; there are tolerate, clamp, ignore, require"),
    (HEAD + "tolerate = 1", "tolerate: rows are written [[tolerate]]"),
    (HEAD + "[tolerate]", "tolerate: rows are written [[tolerate]]"),
    (HEAD + "[[tolerate]]", "[[tolerate]]: register: expected a name, a glob, or a list of them"),
    (HEAD + "[[clamp]]\nregister = 5", "register: expected a name"),
    (HEAD + "[[clamp]]\nregister = []", "register: expected a name"),
    (HEAD + "[[clamp]]\nregister = ['X0', 1]", "register: expected a name"),
    (HEAD + "[[clamp]]\nregister = 'X0'", "[[clamp]] X0: no reason"),
    (HEAD + "[[clamp]]\nregister = 'X0'\nreason = '  '", "[[clamp]] X0: no reason"),
    (HEAD + "[[clamp]]\nregister = 'X0'\nreason = 7", "[[clamp]] X0: no reason"),
    (HEAD + "[[ignore]]\nregister = 'X0'\nreason = 'r'\nguest_notices = 1", "guest_notices: expected true or false"),
    (HEAD + "[[ignore]]\nregister = 'X0'\nreason = 'r'\nwhy = 'r'", "[[ignore]]: unknown field 'why'"),
    (HEAD + "[[ignore]]\nregister = 'PSCI'\nreason = 'r'", "[[ignore]]: no register is called 'PSCI'"),
    (HEAD + "[[ignore]]\nregister = 'NO_SUCH_*'\nreason = 'r'", "no register is called 'NO_SUCH_*'"),
    (HEAD + "[[ignore]]\nregister = ['X0', '']\nreason = 'r'", "no register is called ''"),
    (HEAD + '[[ignore]]\nregister = "\\u001b[2J"\nreason = "r"', "no register is called '\\x1b[2J'"),
)


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_file_that_is_none_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text, "p.toml")
    line = str(caught.value)
    assert line.startswith("p.toml: ") and "\n" not in line and "\x1b" not in line
    assert message in line


def test_a_policy_as_the_documentation_shows_it() -> None:
    found = parse(HEAD + "[[tolerate]]\nregister = ['ID_AA64DFR0_EL1', 'PM*']\nreason = 'why'\nguest_notices = true\n"
                  "[[ignore]]\nregister = 'MSR_IA32_TSC'\nreason = 'restarts'\n")
    assert [(c.verb, c.registers, c.reason, c.guest_notices) for c in found.clauses] == [
        ("tolerate", ("ID_AA64DFR0_EL1", "PM*"), "why", True), ("ignore", ("MSR_IA32_TSC",), "restarts", False)]
    assert parse(HEAD).clauses == NO_POLICY.clauses


_scalars = st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_names = st.sampled_from(["X0", "PSCI_VERSION", "ID_*", "PM*", "[", "[!", "[]", "[z-a]", "*" * 40, "?", "X[0-9]"])
_values = _scalars | _names | st.lists(_names | _scalars, max_size=3)
_fields = st.dictionaries(st.sampled_from(["register", "reason", "guest_notices", "why"]), _values, max_size=4)
_tables = st.lists(st.tuples(st.sampled_from([*VERBS, "allow"]), _fields), max_size=4)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


@given(_tables, st.sampled_from([1, 1, 1, 2, True, "1"]))
def test_any_toml_is_a_policy_or_our_error(tables: list[tuple[str, dict[str, Any]]], version: Any) -> None:
    rows = [f"[[{verb}]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in fields.items())
            for verb, fields in tables]
    _policy_or_error(f"migstream_policy = {_toml(version)}\n" + "".join(rows))


@given(st.text())
@example("a = [" * 3000)
@example("migstream_policy = 1979-99-99")
def test_any_text_is_a_policy_or_our_error(text: str) -> None:
    _policy_or_error(text)


def _policy_or_error(text: str) -> None:
    try:
        found = parse(text, "p.toml")
    except MigstreamError as error:
        assert error.exit_status in (1, 3, 4) and "\n" not in str(error) and str(error).startswith("p.toml: ")
        return
    assert all(clause.reason and any(clause.names(name) for name in known_names()) for clause in found.clauses)


def test_a_row_of_many_names_is_one_short_line() -> None:
    """And one that names many is held against a register as one pattern."""
    policy = parse(HEAD + f"[[tolerate]]\nregister = {['ID_*_EL1'] * 999 + ['KVM_CLOCK']}\nreason = 'r'\n")
    (clause,) = policy.clauses
    assert [clause.names(name) for name in ("ID_PFR0_EL1", "KVM_CLOCK", "KVM_CLOCKS", "ID_PFR0", "xID_PFR0_EL1")] == [
        True, True, False, False, False]
    assert show_check._names(clause) == f"{', '.join(['ID_*_EL1'] * 6)} and 994 more"


@pytest.mark.parametrize(("rows", "message"), [
    ('[[tolerate]]\nregister = "ID_AA64DFR0_EL1.PMUVer"\nreason = "x"', "a policy is about whole registers"),
    ('[[tolerate]]\nregister = "PSCI_VERSOIN"\nreason = "x"', "nearest is PSCI_VERSION"),
    ('[[tolerate]]\nregister = "ID_*"\nreason = "x"\n[[tolerate]]\nregister = "ID_AA64DFR0_EL1"\nreason = "y"',
     "[[tolerate]] ID_AA64DFR0_EL1: an earlier [[tolerate]] row is about it already"),
])
def test_a_row_that_could_not_do_anything(rows: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(f"migstream_policy = 1\n{rows}\n")
    assert message in str(caught.value)


def test_a_row_before_a_wider_one_is_none_of_these() -> None:
    assert len(parse('migstream_policy = 1\n[[clamp]]\nregister = "ID_PFR0_EL1"\nreason = "x"\n'
                     '[[clamp]]\nregister = "ID_*"\nreason = "y"\n').clauses) == 2
