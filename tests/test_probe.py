"""The probe: a profile that it captures makes a simulator that it captures the same profile from."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from migstream.backends.base import SHORT_COUNT
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import DEFAULT, SimBackend
from migstream.errors import UsageError
from migstream.host import profiles
from migstream.host.probe import capture
from migstream.host.probe_x86_64 import TRAITS, VM_CAPS
from migstream.host.profile import HostProfile, cpuid_word, from_json, to_json
from migstream.host.scratch import DEVICES
from migstream.model import Arch
from migstream.plan import DEVICES as PLANNED
from migstream.registers import ids, x86_64
from tests.contract.access import still

pytestmark = pytest.mark.sim

RECORDED = profiles.load(DEFAULT)
FIELDS = ("capabilities", "msrs", "feature_msrs", "sizes", "refused", "msr_bits", "cpuid_forced", "enable_caps",
          "behaviour", "arch")
"""What is the same each time: not the defaults of clocks, nor the APIC id of the CPU that answered."""


EXPERIMENTS = ("scopes", "register_bits", "bit_errnos", "after_run")
"""What a profile has since experiments are part of the probe."""


@cache
def of_simulator() -> HostProfile:
    return capture(SimBackend(), "pytest")


def steady(profile: HostProfile, field: str) -> dict[int, object]:
    """What an experiment found of the registers that do not run by themselves."""
    return {id: found for id, found in getattr(profile, field).items() if id not in x86_64.RUNNING}


def defaults(profile: HostProfile) -> dict[int, bytes]:
    """Defaults without the bits that run."""
    return {id: still(id, value) for id, value in profile.defaults.items()}


@pytest.mark.parametrize("field", FIELDS)
def test_the_simulator_answers_every_trial_as_the_recorded_host_did(field: str) -> None:
    assert getattr(of_simulator(), field) == getattr(RECORDED, field)


def test_the_simulators_defaults_are_the_recorded_ones() -> None:
    assert defaults(of_simulator()) == defaults(RECORDED)


@pytest.mark.kvm
def test_the_recorded_profile_is_of_this_host_or_of_another() -> None:
    here = KvmBackend().profile()
    if (here.kernel, here.cpu) != (RECORDED.kernel, RECORDED.cpu):
        pytest.skip(f"{DEFAULT} is {RECORDED.kernel} on {RECORDED.cpu}; this is {here.kernel} on {here.cpu}")
    captured = capture(KvmBackend(), "pytest")
    assert [field for field in FIELDS if getattr(captured, field) != getattr(RECORDED, field)] == []
    assert defaults(captured) == defaults(RECORDED)
    again = capture(SimBackend(captured), "pytest")
    assert [field for field in FIELDS if getattr(again, field) != getattr(captured, field)] == []
    assert [field for field in EXPERIMENTS if steady(again, field) != steady(captured, field)] == []
    assert again.readback.keys() == captured.readback.keys()  # the values are a running clock's
    assert len(captured.scopes) == len({*captured.msrs, *captured.feature_msrs})


def test_a_profile_goes_through_json_and_back() -> None:
    assert from_json(to_json(RECORDED)) == RECORDED
    assert from_json(to_json(of_simulator())) == of_simulator()


def test_the_command_that_made_a_profile_is_in_it() -> None:
    assert of_simulator().made_by == "pytest"
    assert RECORDED.made_by.startswith("migstream host capture -o ")
    assert RECORDED.backend == "kvm"


def test_both_forms_of_sregs_have_a_default() -> None:
    assert RECORDED.defaults[x86_64.SREGS.id][:280] == RECORDED.defaults[x86_64.SREGS2.id][:280]


def test_what_a_kernel_lists_and_can_not_read_or_write_is_recorded() -> None:
    """Two MSRs that this host has not: one write-only, one read-only, one that answers nothing."""
    write_only, read_only, neither = (ids.msr_id(index) for index in (0x49, 0xFE, 0x123))
    profile = dataclasses.replace(RECORDED, msrs=(*RECORDED.msrs, 0x49, 0xFE, 0x123), refused={
        write_only: (SHORT_COUNT, 0), read_only: (0, SHORT_COUNT), neither: (SHORT_COUNT, SHORT_COUNT)})
    captured = capture(SimBackend(profile), "pytest")
    assert captured.refused == profile.refused
    assert not {write_only, neither} & captured.defaults.keys()
    assert captured.msr_bits[0xFE] == (0, 0)


@pytest.mark.parametrize(("name", "value"), [
    ("tsc_follows", 1), ("tsc_offset_kept", 1), ("smm", 1), ("legacy_paging", 1), ("cr4_taken", 0x20),
    ("efer_taken", 0xD01), ("rflags_kept", 0x246FD7)])
def test_a_kernel_that_differs_in_a_trial_is_found_out(name: str, value: int) -> None:
    changed = dataclasses.replace(RECORDED, behaviour={**RECORDED.behaviour, name: value})
    found = next(trial for trial in TRAITS if trial.name == name).run(SimBackend(changed), changed)
    assert found == value
    assert RECORDED.behaviour[name] != value


def test_a_kernel_that_lets_cpuid_alone_is_found_out() -> None:
    key = cpuid_word(7, 0, 1)
    forced = {key: (0xFFFF_FF00, 0x41)}
    captured = capture(SimBackend(dataclasses.replace(RECORDED, cpuid_forced=forced, enable_caps={})), "pytest")
    assert captured.cpuid_forced[key] == forced[key]
    assert cpuid_word(7, 0, 3) not in captured.cpuid_forced
    assert captured.enable_caps == {}


def test_every_trial_is_told_in_words_and_recorded() -> None:
    assert {trial.name for trial in TRAITS} == RECORDED.behaviour.keys()
    assert all(len(trial.meaning) > 20 for trial in TRAITS)
    assert RECORDED.enable_caps.keys() <= set(VM_CAPS)
    assert DEVICES[Arch.X86_64].keys() == PLANNED[Arch.X86_64]


def test_profiles_are_found_by_name() -> None:
    assert profiles.names() == tuple(sorted(profiles.names()))
    assert profiles.load(DEFAULT) is profiles.load(DEFAULT)
    with pytest.raises(UsageError, match=f"no host profile 'x86_64-0.1'; there are .*{DEFAULT}"):
        profiles.load("x86_64-0.1")
