"""Whatever scopes a host profile says: what is saved with it can be read, or the profile is refused by name."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.strategies  # noqa: F401 - the settings of hypothesis
from migstream import save
from migstream.backends.sim import SimBackend
from migstream.demo import run
from migstream.errors import ProfileError
from migstream.host import experiment, profiles
from migstream.host.experiment import Found
from migstream.host.profile import FIXED, SCOPE_CAPABILITY, HostProfile, from_json, to_json
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from migstream.survey import survey

ARM, X86 = "arm64-7.2", "x86_64-7.2"
STEAL_TIME, TSC, PSCI = ids.msr_id(0x4B56_4D03), ids.msr_id(0x10), 0x6030_0000_0014_0000
SCOPES = ("vm", "vcpu", FIXED)


def plain(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json(profiles.load(name)))
    return found


def verified(host: HostProfile) -> None:
    """Saved on a kernel with this profile, and read again."""
    backend, out = SimBackend(host), io.BytesIO()
    with backend.create(run.machine(host.arch, 2, 1 << 20)) as vm:
        vm.create_vcpus()
        save(vm, out, host=backend.summary(), pause=vm.pause)
    assert survey(io.BytesIO(out.getvalue())).error is None


def impossible(scopes: dict[int, str]) -> set[int]:
    """What the catalogue has at another scope on every kernel."""
    rows = ((lookup(id), scope) for id, scope in scopes.items() if scope != FIXED)
    return {row.id for row, scope in rows if row.known and row.scope_fixed and row.scope != scope}


@pytest.mark.parametrize(("name", "field", "id", "scope"), [
    (X86, "scopes", STEAL_TIME, "vm"), (X86, "scopes", TSC, "vm"), (X86, "scopes", ids.msr_id(0x4000_0020), "vcpu"),
    (X86, "scopes", ids.msr_id(0x345), "vm"), (ARM, "scopes", PSCI, "vcpu"), (ARM, "feature_scopes", PSCI, "vcpu"),
])
def test_a_scope_that_no_stream_may_have_is_refused_by_name(name: str, field: str, id: int, scope: str) -> None:
    data = plain(name)
    data[field][f"{id:#x}"] = scope
    with pytest.raises(ProfileError, match=f"field '{field}': {id:#x}: {scope}; {lookup(id).name} is ") as caught:
        from_json(json.dumps(data), "p.json")
    assert caught.value.exit_status == 1
    edited: Any = {field: {**getattr(profiles.load(name), field), id: scope}}
    verified(replace(profiles.load(name), **edited))


def test_a_kernel_that_is_otherwise_is_recorded_as_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment's own word stays in the words, and the profile can be read again."""
    monkeypatch.setattr(experiment, "_scope", lambda scratch, id, trial: Found("vm", "seen so"))
    found = experiment.scopes(None, dict.fromkeys((STEAL_TIME, ids.msr_id(0xDEAD))))  # type: ignore[arg-type]  # no VM is asked
    assert found[STEAL_TIME] == Found("vcpu", "as on every other kernel, though by experiment vm: seen so")
    assert found[ids.msr_id(0xDEAD)] == Found("vm", "seen so")


@cache
def named(name: str) -> tuple[int, ...]:
    """Registers of which a profile says a scope; most can be at both, which would be a poor test."""
    host = profiles.load(name)
    strict = [id for id in host.scopes if lookup(id).known and lookup(id).scope_fixed]
    return (*strict, *(set(host.scopes) - {*strict}), x86_64.REGS.id if name == X86 else PSCI)


@settings(max_examples=40)
@given(st.sampled_from((ARM, X86)), st.data())
def test_a_stream_of_any_accepted_profile_can_be_read(name: str, data: st.DataObject) -> None:
    said = data.draw(st.dictionaries(st.sampled_from(named(name)), st.sampled_from(SCOPES), min_size=1, max_size=6))
    text = plain(name)
    text["scopes"] |= {f"{id:#x}": scope for id, scope in said.items() if id in profiles.load(name).scopes}
    if wrong := impossible({int(id, 16): scope for id, scope in text["scopes"].items()}):
        with pytest.raises(ProfileError, match="field 'scopes'") as caught:
            from_json(json.dumps(text))
        assert any(lookup(id).name in str(caught.value) for id in wrong)
    else:
        verified(from_json(json.dumps(text)))


@settings(max_examples=30)
@given(st.sampled_from((ARM, X86)), st.data())
def test_nor_does_a_kernel_that_answers_otherwise_break_a_save(name: str, data: st.DataObject) -> None:
    """By experiment, or by the flag of its list: not a file, so nobody refused it."""
    host = profiles.load(name)
    said = data.draw(st.dictionaries(st.sampled_from(sorted(host.scopes)), st.sampled_from(SCOPES), max_size=6))
    host = replace(host, scopes={**host.scopes, **said}, feature_scopes={})
    told: bool = data.draw(st.booleans())
    if host.registers and told:
        flags = data.draw(st.lists(st.sampled_from(host.registers), unique=True))
        host = replace(host, scope_flags=tuple(flags), capabilities={**host.capabilities, SCOPE_CAPABILITY: 1})
    verified(host)
