"""Where a stream's scope of a register is not the target kernel's, `replay` says so by name; which word counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migstream import backends
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.cli import main
from migstream.host import profile_rules, profiles
from migstream.host.probe import capture
from migstream.host.profile import SCOPE_CAPABILITY, HostProfile, to_json
from migstream.model import Arch, Machine, MemoryRegion, Scope
from migstream.registers import arm64_ids, ids
from migstream.registers.catalogue import lookup

KERNEL = "arm64-6.12"
MAIR_EL1, PSCI_VERSION = arm64_ids.sysreg(3, 0, 10, 2, 0), 0x6030_0000_0014_0000
"""MAIR_EL1 is the same on each vCPU of the demo's guest: nothing is lost where it is kept once."""

LSTAR = ids.msr_id(0xC000_0082)
PLAIN = profiles.load(KERNEL)
VM_SCOPED = tuple(id for id in PLAIN.listed if PLAIN.known_scopes.get(id, lookup(id).scope) == Scope.VM)
"""What such a kernel has to flag: those that can't be written, too."""
UNFLAGGED = next(id for id in VM_SCOPED if not lookup(id).scope_fixed)
"""Once a VM on some kernels only, so that the kernel's word is needed."""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, saved on KERNEL: PSCI_VERSION once a VM, MAIR_EL1 for each vCPU."""
    path = tmp_path_factory.mktemp("scope") / "v.mig"
    assert main(["demo", "--backend", f"sim:{KERNEL}", "--vcpus", "2", "--run", "0", "-o", str(path)]) == 0
    return path


def measured(**scopes: int) -> HostProfile:
    """KERNEL where an experiment found other scopes."""
    found = {id: name for name, id in scopes.items()}
    return replace(PLAIN, scopes={**PLAIN.scopes, **found}, feature_scopes={})


def telling(profile: HostProfile, *flagged: int) -> HostProfile:
    """The same kernel with the capability and the flag that were proposed."""
    return replace(profile, scope_flags=flagged, capabilities={**profile.capabilities, SCOPE_CAPABILITY: 1})


ONCE = "saved for each vCPU; this kernel keeps it once a VM"
EACH = "saved once a VM; this kernel keeps it for each vCPU"
CASES = [
    ("the kernel that saved it", PLAIN, {}),
    ("never measured: the catalogue's word is the stream's, too", replace(PLAIN, scopes={}, feature_scopes={}), {}),
    ("a profile wins over the catalogue", measured(vm=MAIR_EL1), {"MAIR_EL1": f"{ONCE} (by experiment)"}),
    ("the other way round", measured(vcpu=PSCI_VERSION), {"PSCI_VERSION": f"{EACH} (by experiment)"}),
    ("the kernel's word is the profile's", telling(PLAIN, *VM_SCOPED), {}),
    ("the kernel wins over a profile", telling(measured(vm=MAIR_EL1), *VM_SCOPED), {}),
    ("the kernel's flag", telling(PLAIN, *VM_SCOPED, MAIR_EL1), {"MAIR_EL1": f"{ONCE} (it says so)"}),
    ("no flag", telling(PLAIN, *(id for id in VM_SCOPED if id != UNFLAGGED)),
     {lookup(UNFLAGGED).name: f"{EACH} (it says so)"}),
]


def notes(document: dict[str, Any]) -> dict[str, str]:
    """Notes about scope by register."""
    pairs = (note.split(": ", 1) for note in document["notes"])
    return {name: text.partition(": ")[0] for name, text in pairs if text.startswith("saved ")}


@pytest.mark.sim
@pytest.mark.parametrize(("host", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_replay_names_each_register_whose_scope_differs(host: HostProfile, expected: dict[str, str], stream: Path,
                                                        monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(backends, "open_backend", lambda name: SimBackend(host))
    capsys.readouterr()
    assert main(["replay", str(stream), "--readback", "--json"]) == 0
    assert notes(json.loads(capsys.readouterr().out)) == expected
    assert main(["replay", str(stream), "--readback"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and text in shown for name, text in expected.items())
    assert ("this kernel keeps it" in shown) == bool(expected)


@pytest.mark.sim
@pytest.mark.parametrize(("profile", "id", "scope"), [
    (PLAIN, UNFLAGGED, Scope.VM), (measured(vcpu=UNFLAGGED), UNFLAGGED, Scope.VCPU),
    (replace(PLAIN, scopes={}), UNFLAGGED, Scope.VM), (PLAIN, MAIR_EL1, Scope.VCPU),
    pytest.param(measured(vm=MAIR_EL1), MAIR_EL1, Scope.VCPU, id="streams have it at one scope")])
def test_a_save_goes_by_the_profile_and_else_by_the_catalogue(profile: HostProfile, id: int, scope: Scope) -> None:
    with SimBackend(profile).create(Machine(Arch.ARM64, 2, (MemoryRegion(0, 1 << 20),))) as vm:
        vm.create_vcpus()
        (found,) = {layout.scope for layout in vm.layouts()[0] if id in layout.index}
    assert found == scope


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This machine's profile, with LSTAR the VM's by experiment, as if the catalogue left that open."""
    monkeypatch.setattr(profile_rules, "must_have", lambda id: None)
    backend = KvmBackend()
    found = capture(backend, "pytest", experiments=False)
    backend.close()
    path = tmp_path / "here.json"
    path.write_text(to_json(replace(found, scopes={LSTAR: "vm"})))
    yield path


@pytest.mark.kvm
def test_replay_on_kvm_goes_by_the_profile_of_this_host(here: Path, tmp_path: Path, capsys: Capture) -> None:
    stream = str(tmp_path / "v.mig")
    assert main(["demo", "--backend", "kvm", "--vcpus", "2", "--run", "0", "-o", stream]) == 0
    capsys.readouterr()
    assert main(["replay", stream, "--backend", "kvm", "--json"]) == 0
    assert notes(json.loads(capsys.readouterr().out)) == {}
    assert main(["replay", stream, "--backend", "kvm", "--host", str(here), "--json"]) == 0
    assert notes(json.loads(capsys.readouterr().out)) == {"MSR_LSTAR": f"{ONCE} (by experiment)"}


@pytest.mark.kvm
def test_another_hosts_profile_is_refused(here: Path, tmp_path: Path, capsys: Capture) -> None:
    text = json.loads(here.read_text())
    here.write_text(json.dumps({**text, "kernel": "Linux 0.1"}))
    stream = str(tmp_path / "v.mig")
    assert main(["demo", "--backend", "sim", "--vcpus", "2", "--run", "0", "-o", stream]) == 0
    capsys.readouterr()
    assert main(["replay", stream, "--backend", "kvm", "--host", str(here)]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "Linux 0.1" in line
