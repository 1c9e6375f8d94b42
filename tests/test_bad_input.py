"""What a capture, the lab and a kernel may be given that is wrong: one clear error each, nothing half-written.

Profile files that are corrupt or older are in `test_probe_cli`, emulators and images that don't boot in
`test_lab_boot`: what has to be seen here is the whole command, from its arguments to its files.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from migstream import backends
from migstream.backends.base import Backend, Refusal, Vm
from migstream.backends.faulty import FaultyBackend, parse
from migstream.backends.sim import SimBackend
from migstream.cli import main
from migstream.errors import BackendError
from migstream.host import experiment, firmware_arm64, profiles
from migstream.host.compare import differences, entries
from migstream.host.probe import capture
from migstream.host.profile import HostProfile, from_json, to_json
from migstream.host.scratch import Scratch
from migstream.model import Layout, Machine
from migstream.registers import arm64_ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.show_host import entry_lines
from tests.lab import __main__ as lab
from tests.lab import boot, tools
from tests.lab.errors import LabError, TimeLimitError

pytestmark = pytest.mark.sim
ARM64 = [name for name in profiles.names() if name.startswith("arm64")]
TPIDR_EL1 = arm64_ids.sysreg(3, 0, 13, 0, 4)


@cache
def captured(kernel: str) -> HostProfile:
    """What a capture of the simulator of a kernel finds."""
    return capture(SimBackend(kernel), "pytest")


class Unreadable(SimBackend):
    """A simulated host that refuses to read one register, though it lists it."""

    def __init__(self, kernel: str, id: int) -> None:
        super().__init__(kernel)
        self.id = id

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> Any:
        """The VM with that read failing."""
        vm = super().create(machine, enabled_caps)
        read = vm.read

        def failing(layout: Layout, first_vcpu: int, values: Any) -> list[Refusal]:
            found = read(layout, first_vcpu, values)
            there = self.id in layout.index
            return [*found, *([Refusal(self.id, first_vcpu, "KVM_GET_ONE_REG", errno.EIO)] if there else [])]

        vm.read = failing  # type: ignore[method-assign]  # one VM, not the class: others read it
        return vm


@pytest.mark.parametrize("kernel", ARM64)
def test_a_register_whose_read_fails_is_in_the_profile_by_name(kernel: str) -> None:
    """Recorded with its errno, never dropped, never given a value; all others are as without it."""
    whole, found = captured(kernel), capture(Unreadable(kernel, TPIDR_EL1), "pytest")
    assert TPIDR_EL1 in found.registers and found.refused[TPIDR_EL1] == (errno.EIO, 0)
    assert TPIDR_EL1 not in {*found.defaults, *found.scopes, *found.register_bits, *found.after_run}
    changed = {change.name for change in differences(whole, found)}
    assert changed == {"TPIDR_EL1"}
    assert from_json(to_json(found)) == found
    assert any("read EIO" in line for line in entry_lines(entries(found)[TPIDR_EL1]))


KNOWN = {
    ("ID_AA64PFR0_EL1", "writable"): "6.12 takes EL0 and EL1 of a vCPU without AArch32; this rule doesn't",
    ("ID_AA64PFR0_EL1", "with all features"): "likewise",
    ("HAS_EL2_E2H0", "vCPU refused"): "7.2 takes the bit alone on a CPU that can't nest; the simulator doesn't",
}
"""(register, property) in which a captured simulator is not the kernel that it simulates, with the reason."""


@pytest.mark.parametrize("kernel", ARM64)
def test_a_capture_of_a_simulated_kernel_is_the_kernels(kernel: str) -> None:
    """Lists, defaults, writable bits, scopes, errnos, what a run ends: every trial answered as the real one did."""
    recorded = profiles.load(kernel)
    changes = [change for change in differences(recorded, captured(kernel))
               if (change.name, change.what) not in KNOWN and (change.what, change.right) != ("listed", "no")]
    assert changes == []


@pytest.mark.parametrize("kernel", ARM64)
def test_what_a_simulator_lacks_are_device_attributes_alone(kernel: str) -> None:
    recorded, simulated = profiles.load(kernel), captured(kernel)
    missing = entries(recorded).keys() - entries(simulated).keys()
    assert missing == recorded.attributes.keys() and not simulated.attributes


@pytest.mark.parametrize(("kernel", "fault"), [
    ("arm64-6.12", "create#2=EIO"), ("arm64-6.12", "create_vcpus#1=EIO"), ("arm64-6.12", "layouts#2=EIO"),
    ("arm64-6.12", "start#1=EIO"), ("arm64-6.12", "pause#1=EIO"), ("arm64-6.12", "enter#1=EIO"),
    ("x86_64-6.12", "create#2=EIO"), ("x86_64-6.12", "create_vcpus#1=EIO"), ("x86_64-6.12", "start#1=EIO")])
def test_a_capture_that_fails_writes_nothing(kernel: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """The old file stays as it was, and no other is there."""
    host = FaultyBackend(SimBackend(kernel), parse(fault, profiles.load(kernel)))
    monkeypatch.setattr(backends, "open_backend", lambda name: host)
    target = tmp_path / "profile.json"
    target.write_text("old")
    assert main(["host", "capture", "-o", str(target)]) == 69
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("migstream: ") and fault.split("#")[0] in line
    assert (target.read_text(), [path.name for path in tmp_path.iterdir()]) == ("old", ["profile.json"])
    host.check()


class Silent:
    """A VM whose vCPU runs and never stops by itself."""

    memory: Any

    def __init__(self) -> None:
        self.running = False

    def start(self) -> None:
        self.running = True

    def pause(self) -> None:
        self.running = False

    def exits(self) -> dict[int, str]:
        return {}

    def read(self, layout: Layout, first_vcpu: int, values: Any) -> Sequence[Refusal]:
        return []

    write = read


def test_a_guest_that_does_not_answer_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware_arm64, "_LIMIT_S", 0.01)
    vm = Silent()
    with pytest.raises(BackendError, match=r"vCPU 0: KVM_RUN: a guest that asks its firmware: no answer in 0.01 s"):
        firmware_arm64.look(vm, firmware_arm64.questions(), 0x4000)  # type: ignore[arg-type]  # what is used of one
    assert not vm.running


@pytest.mark.parametrize(("words", "status", "text"), [
    (["--backend", "sim:arm64-5.10", "--vcpu-features", "has_el2"], 69, "this host has no HAS_EL2"),
    (["--backend", "sim:arm64-6.12", "--vcpu-features", "sve,warp"], 64, "no vCPU feature 'warp'"),
])
def test_a_vcpu_feature_that_is_refused(words: list[str], status: int, text: str, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words, "-o", str(tmp_path / "v.mig")]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line and list(tmp_path.iterdir()) == []


def test_a_stream_of_a_feature_that_the_target_lacks_is_refused_before_a_vm_is_made(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = str(tmp_path / "sve.mig")
    assert main(["demo", "--backend", "sim:arm64-6.12", "--vcpu-features", "sve", "-o", stream]) == 0
    without = profiles.load("arm64-6.12")
    listed = {mask: ids for mask, ids in without.feature_registers.items() if not mask & vcpu_features.SVE}
    features = without.vcpu_features & ~vcpu_features.SVE
    poorer = SimBackend(replace(without, vcpu_features=features, feature_registers=listed))
    made: list[Machine] = []
    monkeypatch.setattr(poorer, "create", lambda machine, caps=None: made.append(machine))
    monkeypatch.setattr(backends, "open_backend", lambda name: poorer)
    capsys.readouterr()
    assert main(["replay", stream]) == 11
    (line,) = capsys.readouterr().err.splitlines()
    assert "this kernel has no vCPU feature SVE" in line and made == []


@pytest.mark.parametrize("error", [
    LabError("the kernel did not boot in 40 s; raise --boot-limit if it is only slow\nconsole:\n  EFI stub: booting"),
    TimeLimitError("not done in 50 s; raise --time-limit if it is only slow\nconsole: silent")])
def test_a_kernel_that_does_not_boot_writes_nothing(error: LabError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: its status, the console's last lines, no file."""
    def fails(*_: object, **__: object) -> boot.Result:
        raise error

    monkeypatch.setattr(tools, "missing", lambda programs: ())
    monkeypatch.setattr(boot, "run", fails)
    out = tmp_path / "out"
    words = ["run", "--arch", "arm64", "--kernel", "6.1", "--out", str(out), "--", "migstream", "host", "capture"]
    assert lab.main(words) == error.status != 0
    said = capsys.readouterr()
    assert said.err == f"lab: {error}\n" and said.out == "" and not out.exists()


def test_a_register_that_can_not_be_read_again_is_no_crash() -> None:
    """Read once, refused in the experiments: its scope stays what was seen, and nothing raises."""
    host: Backend = SimBackend("arm64-6.12")
    profile = profiles.load("arm64-6.12")
    with host.create(Machine(profile.arch, 3, ())) as vm:
        assert isinstance(vm, Vm)
        vm.create_vcpus()
        scratch = Scratch(vm, 3)
        trial = experiment.try_bits(scratch, TPIDR_EL1, 8)
        read, calls = vm.read, [0]

        def sometimes(layout: Layout, first_vcpu: int, values: Any) -> list[Refusal]:
            calls[0] += 1
            refused = [Refusal(TPIDR_EL1, first_vcpu, "KVM_GET_ONE_REG", errno.EIO)] if calls[0] % 2 else []
            return [*read(layout, first_vcpu, values), *refused]

        vm.read = sometimes  # type: ignore[method-assign]  # this VM alone
        (found,) = experiment.scopes(scratch, {TPIDR_EL1: trial}).values()
    assert found.scope in ("vm", "vcpu", "fixed") and lookup(TPIDR_EL1).name == "TPIDR_EL1"
