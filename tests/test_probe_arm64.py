"""Recorded arm64 profiles against what was found independently, and the experiments against fakes."""

from __future__ import annotations

import errno
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from migstream.backends.base import Refusal
from migstream.errors import UsageError
from migstream.host import experiment, profiles
from migstream.host.attributes_arm64 import name
from migstream.host.profile import HostProfile
from migstream.host.scratch import Scratch
from migstream.model import Layout, Phase, Scope, Slot
from migstream.plan import scope_notes
from migstream.registers.catalogue import lookup

DATA = Path(__file__).parent / "data" / "arm64"
KERNELS = ("6.1", "6.12")
COUNTS = {"5.10": (3, 243, 66), "6.1": (6, 170, 66), "6.12": (35, 190, 34), "7.2": (36, 187, 34)}
"""VM-scoped, vCPU-scoped, fixed registers of a vCPU with PSCI_0_2 alone. On 5.10 PSCI_VERSION is among the first: no
bit of 1.0 can be flipped, but 0.2 is taken, which an experiment with single bits alone does not see."""

DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    ("value", "*TIMER_CNT", "a running counter"),
    ("bits", "V[0-9]*", "the file has the low 64 bits of 128"),
    ("bits", "CCSIDR*", "tried at once: the complement is taken, where bit 1 alone is not (no cache has such a line)"),
    ("errnos", "CCSIDR*", "tried at once, so nothing was refused"),
)
"""(what, registers, reason) of every difference between the files and the profiles."""


def rows(kernel: str) -> dict[int, list[str]]:
    lines = (DATA / f"linux-{kernel}.tsv").read_text().splitlines()
    return {int(line.split("\t")[0], 16): line.split("\t") for line in lines if line[0] != "#"}


def explained(what: str, name: str) -> bool:
    return any(what == row[0] and fnmatchcase(name, row[1]) for row in DIFFERENCES)


def found(profile: HostProfile, id: int, row: list[str]) -> dict[str, bool]:
    """Whether each property of a row agrees."""
    errnos = profile.bit_errnos.get(id, ())
    return {"size": len(profile.defaults[id]) == int(row[1]), "value": profile.defaults[id].hex() == row[2],
            "bits": int.from_bytes(profile.register_bits[id][1], "little") == int(row[3], 16),
            "scope": profile.scopes[id] == row[4], "errnos": (-int(row[5]) in errnos) if row[5] != "0" else not errnos}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_profile_agrees_with_an_independent_experiment(kernel: str) -> None:
    profile, real = profiles.load(f"arm64-{kernel}"), rows(kernel)
    assert set(profile.registers) == real.keys()
    wrong = [(what, lookup(id).name) for id, row in real.items() for what, good in found(profile, id, row).items()
             if not good and not explained(what, lookup(id).name)]
    assert wrong == []


def test_every_explained_difference_is_one_and_vectors_agree_as_far_as_the_file_goes() -> None:
    seen, low = set(), (1 << 64) - 1
    for kernel in KERNELS:
        profile = profiles.load(f"arm64-{kernel}")
        for id, row in rows(kernel).items():
            name = lookup(id).name
            seen |= {(what, pattern) for what, good in found(profile, id, row).items() if not good
                     for which, pattern, _ in DIFFERENCES if which == what and fnmatchcase(name, pattern)}
            if len(profile.defaults[id]) > 8:
                assert int.from_bytes(profile.register_bits[id][1], "little") & low == int(row[3], 16), name
    assert seen == {row[:2] for row in DIFFERENCES}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_experiment_compared_with_is_the_shared_one(kernel: str) -> None:
    name = f"linux-{kernel}.tsv"
    shared = Path(__file__).parents[2] / "shared" / "data" / "arm64" / name
    if not shared.is_file():
        pytest.skip(f"no ../shared/data/arm64/{name} beside this tree; the copy in tests/data is compared all the same")
    assert (DATA / name).read_bytes() == shared.read_bytes()


@pytest.mark.parametrize("kernel", COUNTS)
def test_counts_of_scopes(kernel: str) -> None:
    profile = profiles.load(f"arm64-{kernel}")
    counted = [sum(profile.scopes[id] == scope for id in profile.registers) for scope in ("vm", "vcpu", "fixed")]
    assert tuple(counted) == COUNTS[kernel]
    assert "python -m tests.lab run" in profile.made_by
    assert profile.scope_found.keys() == profile.scopes.keys()


@pytest.mark.parametrize("kernel", ("6.1", "6.12", "7.2"))
def test_a_run_ends_the_bitmaps_and_not_psci_version(kernel: str) -> None:
    profile = profiles.load(f"arm64-{kernel}")
    by_name = {lookup(id).name: pair for id, pair in profile.after_run.items()}
    assert by_name["STD_BMAP"] == (16, 0) and by_name["PSCI_VERSION"] == (0, 0)
    assert profile.behaviour["entering_is_running"] == 1


def test_scope_notes_name_what_differs() -> None:
    profile = profiles.load("arm64-6.12")
    id = next(id for id, scope in profile.scopes.items() if scope == "vm")
    layout = Layout(Scope.VCPU, Phase.STATE, (Slot(id, 8),))
    (note,) = scope_notes([layout], profile)
    assert note.startswith(lookup(id).name) and "once a VM" in note
    assert scope_notes([layout], replace(profile, scopes={id: "fixed"})) == []


class FakeVm:
    """Registers of 8 bytes; some are shared, some take only some bits, one is shared in part."""

    def __init__(self, shared: int, mask: int) -> None:
        self.shared, self.mask, self.values = shared, mask, [0, 0, 0]

    def read(self, layout, first_vcpu, values):  # type: ignore[no-untyped-def]  # as ScratchVm
        values[0, 0] = self.values[first_vcpu]
        return []

    def write(self, layout, first_vcpu, values):  # type: ignore[no-untyped-def]  # as ScratchVm
        new = int(values[0, 0]) & self.mask
        for vcpu in range(3):
            part = (1 << 64) - 1 if vcpu == first_vcpu else self.shared
            self.values[vcpu] = self.values[vcpu] & ~part | new & part
        return []


ALL, ID = (1 << 64) - 1, 0x6030_0000_0013_C080
OPEN = 0x6030_0000_0013_C020
"""ID_AA64PFR0_EL1: kernels differ in whether they keep it once a VM."""


@pytest.mark.parametrize(("shared", "mask", "scope", "kept"), [
    (0, ALL, "vcpu", ALL), (ALL, ALL, "vm", ALL), (ALL, 0xF0, "vm", 0xF0), (0, 0, "fixed", 0),
    (0x80, 0xFF, "vcpu", 0xFF), (0xFF, ALL, "vcpu", ALL),
])
def test_bits_and_scope_of_a_fake(shared: int, mask: int, scope: str, kept: int) -> None:
    scratch = Scratch(FakeVm(shared, mask), 3)  # type: ignore[arg-type]  # all that a Scratch calls
    trial = experiment.try_bits(scratch, OPEN, 8)
    (result,) = experiment.scopes(scratch, {OPEN: trial}).values()
    assert (trial.kept, result.scope) == (kept, scope)
    assert (result == experiment.PARTLY) == (shared not in (0, ALL))


class Runs(FakeVm):
    """Takes no other value once a vCPU has run; entering one is a run, or it isn't, or nothing is ever refused."""

    def __init__(self, entering: bool | None) -> None:
        super().__init__(0, ALL)
        self.entering, self.fixed = entering, False

    def write(self, layout, first_vcpu, values):  # type: ignore[no-untyped-def]  # as ScratchVm
        if self.fixed and int(values[0, 0]) != self.values[first_vcpu]:
            return [Refusal(ID, first_vcpu, "KVM_SET_ONE_REG", errno.EBUSY)]
        return super().write(layout, first_vcpu, values)  # type: ignore[no-untyped-call]  # as above

    def enter(self, vcpu: int) -> None:
        self.fixed = bool(self.entering)

    def start(self) -> None:
        self.fixed = self.entering is not None

    def pause(self) -> None:
        pass


@pytest.mark.parametrize("entering", [True, False, None])
def test_whether_entering_is_running_is_found_out(entering: bool | None) -> None:
    scratch = Scratch(Runs(entering), 3)  # type: ignore[arg-type]  # all that a Scratch calls
    after = experiment.after_run(scratch, {ID: experiment.try_bits(scratch, ID, 8)}, enter=True)
    assert after.entering_is_running is entering
    assert after.errnos == {ID: (0 if entering is None else errno.EBUSY, 0)}


def test_a_captured_profile_counts_on_its_own_host_alone() -> None:
    here = replace(profiles.load("arm64-6.12"), scopes={}, feature_scopes={})
    measured = here.measured_by(profiles.load("arm64-6.12"))
    assert measured.known_scopes[PSCI_VERSION] == "vm" and not here.known_scopes
    assert profiles.recorded(here) is profiles.load("arm64-6.12")
    assert profiles.recorded(replace(here, kernel="Linux 0.1")) is None and here.measured_by(None) is here
    with pytest.raises(UsageError, match=r"of kernel Linux 7\.2.*, this host is Linux 6\.12"):
        here.measured_by(profiles.load("arm64-7.2"))


PSCI_VERSION, X0 = 0x6030_0000_0014_0000, 0x6030_0000_0010_0000


def test_flags_of_the_kernel_win_over_an_experiment() -> None:
    told = replace(profiles.load("arm64-6.12"), scope_flags=(ID,), scopes={PSCI_VERSION: "vm", ID: "vcpu", X0: "vm"})
    assert [told.known_scopes[id] for id in (PSCI_VERSION, ID, X0)] == ["vm", "vcpu", "vm"]
    told = replace(told, capabilities={**told.capabilities, "ARM_REG_SCOPE": 1})
    assert [told.known_scopes[id] for id in (PSCI_VERSION, ID, X0)] == ["vm", "vm", "vcpu"], \
        "PSCI_VERSION is the VM's on every kernel: the series left its flag out"
    layout = Layout(Scope.VCPU, Phase.STATE, (Slot(ID, 8),))
    assert "it says so" in scope_notes([layout], told)[0]


def test_device_attributes_of_a_kernel_are_named() -> None:
    """The maintenance interrupt and the number of PMU counters are newer than 6.12."""
    known = {kernel: {name(id) for id in profiles.load(f"arm64-{kernel}").attributes} for kernel in COUNTS}
    newer = {"KVM_DEV_ARM_VGIC_GRP_MAINT_IRQ", "KVM_ARM_VCPU_PMU_V3_SET_NR_COUNTERS"}
    assert newer <= known["7.2"] and not newer & (known["6.12"] | known["6.1"] | known["5.10"])
    for names in known.values():
        assert {"GICD_IIDR", "GICR_WAKER", "ICC_PMR_EL1", "GITS_CTLR", "GICD_LINE_LEVEL1"} <= names
        assert not [word for word in names if word.startswith("0x")]
