"""Which moves of a fleet are safe while its kernels and its VMMs change, and after which fence all of them are. Pure.

Guests are fresh ones of a host's profile (`verdicts.guest`), moved by the same plan as any restore. A move is *safe*
where the plan has no obstacle, and where the VMMs on both sides know enough to carry it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from migstream.contract import Contract
from migstream.errors import UsageError
from migstream.host.baseline import baseline
from migstream.host.profile import HostProfile
from migstream.model import Arch
from migstream.plan import Plan, plan_for
from migstream.registers import vcpu_features
from migstream.registers.catalogue import lookup
from migstream.verdicts.guest import fresh, moved
from migstream.verdicts.judge import unexplained
from migstream.verdicts.model import Answer, Saved, Verdict
from migstream.verdicts.policy import NO_POLICY, Policy


def matrix(hosts: Mapping[str, HostProfile], features: int,
           policy: Policy = NO_POLICY) -> dict[tuple[str, str], Plan]:
    """Judge a guest that was started on each host on every other one, in the order of `hosts`.

    Raises: PolicyError; UsageError for vCPU features that a host hasn't got, or that no profile is captured with.
    """
    for name, host in hosts.items():
        if missing := _offered(host, features) & ~_captured(host):
            raise UsageError(f"{name}: a fresh vCPU with {', '.join(vcpu_features.names(missing))}: the host has none, "
                             "or none was captured")
    guests = {name: fresh(host, _offered(host, features)) for name, host in hosts.items()}
    return {(a, b): plan_for(guests[a], hosts[b], policy) for a, b in itertools.permutations(hosts, 2)}


def _captured(host: HostProfile) -> int:
    return vcpu_features.DEFAULT | vcpu_features.together(host.vcpu_features)


def _offered(host: HostProfile, features: int) -> int:
    return features if host.arch == Arch.ARM64 else 0


@dataclass(frozen=True)
class Vmm:
    """A VMM, as far as a move depends on what it knows.

    Attributes:
        rows: ids of the registers that its catalogue has a row for, None for all of this migstream's. What it has no
            row for it saves by number, writes where the target lists it, and can't drop or add for a reason.
        contracts: it writes and reads contract sections: streams of minor 1; else minor 0, and a contract is skipped.
        opts_out: it starts guests under the strongest contract of all the fleet's kernels; else as the kernel comes.
    """

    name: str
    rows: frozenset[int] | None = None
    contracts: bool = False
    opts_out: bool = False

    def knows(self, id: int) -> bool:
        """Whether it has a row for a register."""
        return self.rows is None or id in self.rows


@dataclass(frozen=True)
class Place:
    """A kernel and the VMM on it."""

    kernel: str
    host: HostProfile
    vmm: Vmm

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel} kernel, {self.vmm.name} VMM"


Route = tuple[int, ...]
"""Numbers of places: where a guest was started, and where it went."""


@dataclass(frozen=True)
class Fleet:
    """The four-way matrix.

    Attributes:
        places: old kernel and old VMM; old kernel, new VMM; new kernel, old VMM; new and new.
        routes: why the last move of each route is not safe, empty where it is; of two places, and of three where the
            first move is safe.
        pins: what a VMM that opts out starts guests under. kept: what it can't opt out of, a line each.
    """

    places: tuple[Place, ...]
    routes: Mapping[Route, tuple[str, ...]]
    pins: Contract
    kept: tuple[str, ...] = field(default=())

    @property
    def fences(self) -> list[tuple[int, ...]]:
        """The largest sets of two places or more, new kernel and new VMM among them, that are safe in themselves.

        A guest that was started in one and stays within goes anywhere in it, and on from there. Once no other place
        is left, nor a guest from there, the fence is passed.
        """
        last = len(self.places) - 1
        for size in range(len(self.places), 1, -1):
            found = [group for group in itertools.combinations(range(len(self.places)), size)
                     if last in group and self._closed(group)]
            if found:
                return found
        return []

    def _closed(self, group: Sequence[int]) -> bool:
        inside = [route for route in self.routes if set(route) <= set(group)]
        return not any(self.routes[route] for route in inside)


def four_way(old: HostProfile, new: HostProfile, vmms: tuple[Vmm, Vmm], features: int) -> Fleet:
    """Return the matrix of an old and a new kernel with an old and a new VMM.

    Args:
        features: arm64: of the guests' vCPUs.

    Raises: UsageError for kernels of two architectures, or features that not both have.
    """
    if old.arch != new.arch:
        raise UsageError(f"a fleet of {old.arch.label} and {new.arch.label}: no guest moves between them")
    found = baseline({"old": old, "new": new}, _offered(old, features))
    places = tuple(Place(name, host, vmm) for name, host in (("old", old), ("new", new)) for vmm in vmms)
    return Fleet(places, dict(_routes(places, _offered(old, features), found.contract)), found.contract,
                 found.refusals)


def _routes(places: Sequence[Place], features: int, pins: Contract) -> Iterator[tuple[Route, tuple[str, ...]]]:
    for a, b in itertools.permutations(range(len(places)), 2):
        start, there = places[a], places[b]
        guest = fresh(start.host, features, pins if start.vmm.opts_out else None)
        reasons, later = move(guest, start.vmm, there)
        yield (a, b), reasons
        for c in range(len(places)) if not reasons else ():
            if c != b:
                yield (a, b, c), move(later, there.vmm, places[c])[0]


def move(guest: Saved, saving: Vmm, target: Place) -> tuple[tuple[str, ...], Saved]:
    """Return why a move is not safe, the worst first, and the guest as the target would save it.

    Args:
        guest: with a contract that says the truth, whether or not a stream carries it.
    """
    plan = plan_for(guest, target.host)
    if plan.pair is None:
        return tuple(plan.refusals), guest
    told = saving.contracts and target.vmm.contracts
    ignorant = [v for step in plan.steps for v in step.verdicts if _needs_a_row(v) and not target.vmm.knows(v.slot.id)]
    reasons = [*plan.refusals, *(f"{v.name}: the {target.vmm.name} VMM has no row for it, and does not know that it "
                                 f"may go: {v.reason}" for v in ignorant), *unexplained(plan.pair)]
    written = [v for step in plan.steps for v in step.verdicts]
    for verdict in (one.verdict for one in plan.additions if one.verdict.target is not None):
        if told and target.vmm.knows(verdict.slot.id):
            written.append(verdict)
        elif (default := plan.pair.default(verdict.slot.id)) != int.from_bytes(verdict.value or b"", "little"):
            why = "no contract travels" if not told else f"the {target.vmm.name} VMM has no row for it"
            reasons.append(f"{verdict.name}: the guest's kernel behaved as {_number(verdict)}, and {why}: the guest "
                           f"meets this kernel's default, {default or 0:#x}")
    return tuple(reasons), moved(plan.pair, written)


def _needs_a_row(verdict: Verdict) -> bool:
    """The target's kernel would not just take the value: somebody has to know why it may be left out."""
    return verdict.answer in (Answer.HARMLESS, Answer.WRITTEN_AS) and lookup(verdict.slot.id).known


def _number(verdict: Verdict) -> str:
    return f"{int.from_bytes(verdict.value or b'', 'little'):#x}"
