"""A kernel's answers against what the rules say of the same values and that kernel's recorded profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migstream.contract import Contract
from migstream.host.profile import HostProfile
from migstream.model import Bank, Slot
from migstream.plan import Plan, plan_for
from migstream.reader import StreamReader
from migstream.registers import vcpu_features
from migstream.registers.catalogue import lookup, running
from migstream.registers.firmware_arm64 import ABSENT
from migstream.verdicts.facts import Pair
from migstream.verdicts.judge import judge
from migstream.verdicts.model import Answer, Kernel, Saved, Verdict
from tests.verdicts import blind, vary


@dataclass
class Outcome:
    """What came of one ordered pair of kernels, or of several: registers are counted once for each vCPU and write.

    Attributes:
        answers: written blindly. refused: of these, by the kernel. predicted: refusals that the rules had said.
        dropped: taken, and read back different. unknown: what no rule ventures to say, by reason.
        restores: with verdicts applied. fitting: of these, without a policy. readback: registers read back.
        eyes: questions that guests asked twice. told: of these, with another answer, as check had said.
        differences: a line each, where the kernel did not what the rules say.
    """

    answers: int = 0
    refused: int = 0
    predicted: int = 0
    dropped: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    restores: int = 0
    fitting: int = 0
    readback: int = 0
    eyes: int = 0
    told: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Count another outcome in."""
        for name in ("answers", "refused", "predicted", "dropped", "unknown", "restores", "fitting", "readback",
                     "eyes", "told", "differences"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def pair(stream: Path, host: HostProfile, said: Mapping[str, Any]) -> Outcome:
    """Hold one target's answers to one stream against the rules; `said` is what `inside.restore_all` gave."""
    reader, banks = blind.load(str(stream))
    out = Outcome()
    if "blind" in said:
        _blind(out, reader, banks, host, said["blind"])
        for trial in said["forged"]:
            values = {int(id, 16): bytes.fromhex(value) for id, value in trial["values"].items()}
            _blind(out, reader, vary.with_values(banks, values), host, trial)
    _restored(out, plan_of(reader, banks, host), said.get("replay", said))
    return out


def plan_of(reader: StreamReader, banks: Sequence[Bank], host: HostProfile) -> Plan:
    """What `migstream check` makes of a stream."""
    return plan_for(saved_of(reader, banks), host)


def saved_of(reader: StreamReader, banks: Sequence[Bank]) -> Saved:
    """The guest in a stream."""
    assert reader.machine is not None
    features = int(reader.machine.devices.get("vcpu_features", vcpu_features.DEFAULT))
    contract = Contract.of(reader.machine.arch, [bank for bank in banks if bank.layout.phase.prologue],
                           vcpu_features=features, behaviour=reader.behaviour)
    return Saved.of(reader.machine, tuple(reader.layouts), banks, contract)


def _blind(out: Outcome, reader: StreamReader, banks: Sequence[Bank], host: HostProfile,
           said: Mapping[str, Any]) -> None:
    if "failed" in said:
        out.differences.append(f"the kernel makes no such VM: {said['failed']}")
        return
    judged = Pair(saved_of(reader, banks), host)
    slots = {slot.id: slot for layout in reader.layouts for slot in layout.slots}
    verdicts: dict[int, Verdict] = {}
    lines: dict[str, None] = {}
    for text, _, errno, found in said["registers"]:
        slot = slots[int(text, 16)]
        verdict = verdicts.get(slot.id) or verdicts.setdefault(slot.id, judge(judged, slot))
        _count(out, verdict, errno, found)
        if problem := _difference(slot, verdict.kernel, errno, found):
            lines[f"{lookup(slot.id).name} ({_shown(judged, slot)}): {problem}"] = None
    out.differences += lines


def _count(out: Outcome, verdict: Verdict, errno: int, found: str) -> None:
    out.answers += 1
    out.refused += errno != 0
    out.predicted += errno != 0 and verdict.kernel == Kernel.REFUSES
    out.dropped += not errno and bool(found) and running(verdict.slot.id) is None
    if verdict.kernel == Kernel.UNKNOWN:
        out.unknown[f"{verdict.name}: {verdict.reason.partition(' (')[0] or verdict.answer}"] += 1


def _shown(judged: Pair, slot: Slot) -> str:
    numbers, default = judged.saved.columns[slot.id].numbers, judged.default(slot.id)
    return f"{numbers[0]:#x}, default {default:#x}" if default is not None else f"{numbers[0]:#x}"


def _difference(slot: Slot, predicted: Kernel, errno: int, found: str) -> str:
    if predicted == Kernel.UNKNOWN:
        return ""
    if errno:
        return "" if predicted == Kernel.REFUSES else f"predicted {predicted}, the kernel refused it ({errno})"
    if predicted == Kernel.REFUSES:
        return "predicted refuses, the kernel took it"
    if running(slot.id) is not None or bool(found) == (predicted == Kernel.DROPS):
        return ""
    return f"predicted {predicted}, {f'it read back {found[:40]}' if found else 'it read back the same'}"


def _restored(out: Outcome, plan: Plan, said: Mapping[str, Any]) -> None:
    """A restore with verdicts applied: it went as the plan says, all read back right, and nobody sees anything else."""
    out.restores += 1
    out.fitting += not plan.refusals
    out.readback += said.get("readback", 0)
    out.eyes += said.get("asked", 0)
    if "failed" in said:
        out.differences.append(f"restore: {said['failed']}")
    out.differences += [f"restore: refused {line}" for line in said.get("refused", ()) if line.endswith(": ")]
    out.differences += [f"restore: read back different: {line}" for line in said.get("differs", ())]
    if bool(plan.refusals) != bool(said.get("does_not_fit")) and "does_not_fit" in said:
        out.differences.append(f"check said {plan.refusals[:1] or 'fits'}, replay {said['does_not_fit'][:1] or 'fits'}")
    noticed = {verdict.name for verdict in plan.verdicts if verdict.answer in (Answer.NOTICED, Answer.REFUSED)
               or (verdict.answer == Answer.HARMLESS and "cache geometry" in verdict.reason)}
    out.told += sum(bool(noticed & registers_of(name)) for name in said.get("sees", {}))
    out.differences += [f"the guest sees {_pair(both)} of {name}, and check did not say so"
                        for name, both in said.get("sees", {}).items() if not noticed & registers_of(name)]


def _pair(both: Sequence[int]) -> str:
    return f"{both[0]:#x}, then {both[1]:#x}"


_ASKED: dict[str, set[str]] = {}
for _row in ABSENT:
    for _call in _row.asked:
        _ASKED.setdefault(_call.name, set()).add(lookup(_row.register).name)
_ASKED["KVM_FEATURES"] = {"VENDOR_HYP_BMAP", "VENDOR_HYP_BMAP_2"}
_ASKED["TRNG_FEATURES(TRNG_RND64)"] = {"STD_BMAP"}
_ASKED["PV_TIME_FEATURES(PV_TIME_FEATURES)"] = {"STD_HYP_BMAP"}


def registers_of(question: str) -> set[str]:
    """Names of the registers that a guest's question is about: an ID register is about itself."""
    return {"PSCI_VERSION"} if question.startswith("PSCI_FEATURES") else _ASKED.get(question, {question})


def table(outcomes: Iterable[tuple[str, Outcome]]) -> list[list[str]]:
    """Rows for people: a pair each, totals last."""
    head = ["pair", "answers", "refusals predicted", "refusals came", "read back other", "unknown", "restores",
            "of them fitting", "read back", "asked by guests", "other, as check said", "differences"]
    total = Outcome()
    rows = [head]
    for name, one in outcomes:
        rows.append(_row_of(name, one))
        total.add(one)
    return [*rows, _row_of("total", total)]


def _row_of(name: str, one: Outcome) -> list[str]:
    return [name, *map(str, (one.answers, one.predicted, one.refused, one.dropped, sum(one.unknown.values()),
                             one.restores, one.fitting, one.readback, one.eyes, one.told, len(one.differences)))]
