"""The part that runs inside a lab guest: saves running guests, or restores streams and tells every answer.

    python3 -m tests.verdicts.inside save SEED SETS [BASELINE]       writes NAME.mig for each guest
    python3 -m tests.verdicts.inside restore SEED FORGED FILE…       writes answers.json, and guests that go on

A stream is first restored *blindly*: register by register, without a plan, and then so again with forged values. The
same boot then does what a user would do: `replay`, verdicts applied, read back. Streams of the guest that looks around
(`eyes-…`) are restored and it looks again; one that is on a journey (`eyes-chain`) is saved anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from migstream.backends import open_backend
from migstream.backends.base import Backend, Vm
from migstream.contract import Contract, from_json
from migstream.demo import run
from migstream.errors import DoesNotFit, MigstreamError, RestoreFailed
from migstream.model import Arch, OpaqueState
from migstream.registers import vcpu_features
from migstream.report import Report
from migstream.transport import apply_contract, capture_prologue, restore, save
from migstream.verdicts.policy import NO_POLICY, Policy, parse
from tests import eyes_arm64 as eyes
from tests.verdicts import blind, vary

VCPUS, MEMORY, STEPS = 2, 4 << 20, 5
SETS: dict[Arch, dict[str, int]] = {
    Arch.ARM64: {"plain": 0, "all": vcpu_features.parse("sve,pmu_v3,ptrauth")}, Arch.X86_64: {"plain": 0}}
"""vCPU features of the saved machines, by the name of the set."""

VARIED = "varied"
CHAIN = "eyes-chain"
WHATEVER = parse("""
migstream_policy = 1
[[clamp]]
register = ["ID_*", "SVE_VLS"]
reason = "as near as the target comes"
guest_notices = true
[[tolerate]]
register = "*"
reason = "to see what becomes of the rest"
guest_notices = true
""", "whatever fits")
"""For streams that do not fit: all that is judged to fit has to be there all the same."""


def save_all(seed: str, sets: Sequence[str], baseline: str) -> dict[str, Any]:
    """Save a guest of each set, as the kernel makes it and varied; the same with guests that look around."""
    backend = open_backend("kvm")
    said: dict[str, Any] = {}
    for name in sets:
        features = SETS[backend.arch][name]
        for suffix in ("", f"-{VARIED}"):
            dice = Random(f"{seed} {backend.profile().kernel} {name}") if suffix else None
            said[name + suffix] = _save_demo(backend, features, f"{name}{suffix}.mig", dice)
            if backend.arch == Arch.ARM64:
                _save_eyes(backend, features, f"eyes-{name}{suffix}.mig", dice)
    if baseline:
        contract = from_json(Path(baseline).read_text(), baseline)
        said["baseline"] = _save_eyes(backend, contract.vcpu_features, "eyes-baseline.mig", None, contract)
        Path(f"{CHAIN}.mig").write_bytes(Path("eyes-baseline.mig").read_bytes())
    return said


def _save_demo(backend: Backend, features: int, path: str, dice: Random | None) -> list[str]:
    """The demo's guest, mid-run; names of the registers that were varied before."""
    guest, machine = run.guest_for(backend.arch), run.machine(backend.arch, VCPUS, MEMORY, features)
    with backend.create(machine, run.BOARDS[backend.arch].caps) as vm, open(path, "wb") as out:
        vm.create_vcpus()
        early = vary.vary(dice, vm) if dice and backend.arch == Arch.ARM64 else []
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        late = vary.vary(dice, vm) if dice and backend.arch == Arch.X86_64 else []  # CPUID decides what MSRs there are
        prologue = capture_prologue(vm)
        vm.start()
        run.wait_for(vm, guest, [STEPS] * VCPUS, lambda _: None)
        save(vm, out, host=backend.summary(), pause=vm.pause, prologue=prologue,
             opaque=[OpaqueState(guest.NAME, bytes(8))])
    return early + late


def _save_eyes(backend: Backend, features: int, path: str, dice: Random | None,
               contract: Contract | None = None) -> list[str]:
    """A guest that has looked around; what it sees otherwise than its contract says."""
    with backend.create(eyes.machine(features or vcpu_features.DEFAULT)) as vm:
        vm.create_vcpus()
        if dice:
            vary.vary(dice, vm)
        if contract:
            apply_contract(vm, contract)
        eyes.install(vm)
        seen = eyes.save_seen(vm, path, backend.summary())
    return eyes.contradictions(contract, seen) if contract else []


def restore_all(seed: str, forged: int, files: Sequence[str]) -> dict[str, Any]:
    """What this kernel says to each stream, by file name without its suffix."""
    backend = open_backend("kvm")
    return {Path(file).stem: _eyes(backend, file) if "eyes-" in file else
            {"blind": _blind(backend, file), "forged": _forged(backend, file, seed, forged),
             "replay": _replay(backend, file)} for file in files}


def _blind(backend: Backend, file: str) -> dict[str, Any]:
    reader, banks = blind.load(file)
    assert reader.machine is not None
    try:
        return {"registers": blind.answers(backend, reader.machine, banks)}
    except MigstreamError as error:
        return {"failed": str(error)}


def _forged(backend: Backend, file: str, seed: str, times: int) -> list[dict[str, Any]]:
    """The same with other values; what is not forged and comes after the prologue is left out."""
    reader, banks = blind.load(file)
    assert reader.machine is not None
    out = []
    for n in range(times):
        values = vary.forge(Random(f"{seed} {Path(file).stem} {n}"), banks)
        if not values:
            break
        answers = blind.answers(backend, reader.machine, vary.with_values(banks, values), values)
        out.append({"values": {f"{id:#x}": value.hex() for id, value in values.items()}, "registers": answers})
    return out


def _restored(backend: Backend, file: str) -> tuple[Vm, Report, list[str]]:
    """Restored as it is, or where it does not fit, as far as it does; the reasons why not, last."""
    refused: list[str] = []
    policy: Policy = NO_POLICY
    while True:
        try:
            with open(file, "rb") as source:
                return *restore(source, backend, readback=True, policy=policy), refused
        except (DoesNotFit, RestoreFailed) as error:
            at_the_pause = isinstance(error, RestoreFailed) and str(error).startswith("at the pause")
            if refused or not (at_the_pause or isinstance(error, DoesNotFit)):
                raise
            refused, policy = list(error.reasons) if isinstance(error, DoesNotFit) else [str(error)], WHATEVER


def _replay(backend: Backend, file: str) -> dict[str, Any]:
    """What `replay` comes to, and whether the guest counts on."""
    try:
        vm, report, refused = _restored(backend, file)
    except MigstreamError as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    with vm:
        try:
            went_on = run.continue_guest(vm, report.opaque, 0.05)
        except MigstreamError as error:
            return {**_told(report, refused), "failed": f"{type(error).__name__}: {error}"}
        return {**_told(report, refused), "ran": went_on.get("steps_after", [])}


def _told(report: Report, refused: list[str]) -> dict[str, Any]:
    return {"does_not_fit": refused, "readback": report.readback,
            "refused": [f"{no}: {why}" for no, why in report.refused],
            "differs": [str(one) for one in report.differs if not one.reason]}


def _eyes(backend: Backend, file: str) -> dict[str, Any]:
    """What a guest that has looked around can tell apart now, by name: before and after."""
    try:
        vm, report, refused = _restored(backend, file)
    except MigstreamError as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    with vm:
        before = json.loads(next(state.data for state in report.opaque if state.name == eyes.SEEN))
        after = eyes.save_seen(vm, f"{CHAIN}.mig", backend.summary()) if CHAIN in file else eyes.look(vm)
    both = {name: (before.get(name), after.get(name)) for name in {**before, **after}}
    return {**_told(report, refused), "asked": len(both),
            "sees": {name: pair for name, pair in both.items() if pair[0] != pair[1]}}


def main(words: list[str]) -> int:
    """Run one verb."""
    verb, seed, *rest = words
    if verb == "save":
        said: Any = save_all(seed, rest[0].split(","), rest[1] if len(rest) > 1 else "")
    else:
        said = restore_all(seed, int(rest[0]), rest[1:])
    Path("answers.json").write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
