"""What `migstream check` found, for people and for JSON. No file, no terminal, no judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from migstream.errors import DoesNotFit
from migstream.fleet import Fleet, Vmm
from migstream.plan import Plan
from migstream.show import Table, policy_json
from migstream.verdicts.model import Answer, Verdict
from migstream.verdicts.policy import Clause

FITS, WITH_LOSS, NOT = 0, 10, DoesNotFit.exit_status
WORDS = {FITS: "fits", WITH_LOSS: "fits with loss", NOT: "does not fit"}
NO_WAY = "the guest does not get there"
SCREEN = 20
"""Lines of reasons that one screen shows."""


def status(plan: Plan) -> int:
    """Exit status for one host: 0, 10 where the policy lets a guest notice something, 11 where it does not fit."""
    if plan.refusals:
        return NOT
    return WITH_LOSS if any(verdict.loses for verdict in plan.verdicts) else FITS


def counts(plan: Plan) -> dict[str, int]:
    """Registers by answer, the worst first, without answers that nothing has."""
    answers = [verdict.answer for verdict in plan.verdicts]
    return {answer.name.lower(): answers.count(answer) for answer in reversed(Answer) if answer in answers}


def plain(plan: Plan) -> dict[str, Any]:
    """One host's answer for machines: status, counts by answer, and each verdict that has a reason."""
    return {
        "status": status(plan), "counts": counts(plan), "obstacles": list(plan.obstacles), "notes": list(plan.notes),
        "verdicts": [plain_verdict(v) for v in plan.verdicts if v.reason],
        "policy": {"changed": sum(v.overruled is not None for v in plan.verdicts), "idle": idle(plan)},
    }


def plain_verdict(verdict: Verdict) -> dict[str, Any]:
    """One register's verdict for machines; `policy` is null where none changed it."""
    return {"register": verdict.name, "id": f"{verdict.slot.id:#x}", "answer": verdict.answer.name.lower(),
            "reason": verdict.reason, "source": verdict.source, "at_the_pause": verdict.pending,
            "tolerated": verdict.tolerated, "policy": policy_json(verdict)}


def idle(plan: Plan) -> list[str]:
    """Rows of the policy that changed nothing here, a line each."""
    return [f"{clause.verb} {', '.join(clause.registers)}" for clause in _idle(plan)]


def _idle(plan: Plan) -> list[Clause]:
    changed = [(v.name, v.overruled.verb) for v in plan.verdicts if v.overruled]
    return [clause for clause in plan.policy.clauses
            if not any(verb == clause.verb and clause.names(name) for name, verb in changed)]


def _names(clause: Clause) -> str:
    first, more = clause.registers[:_NAMES], len(clause.registers) - _NAMES
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


_NAMES = 6
"""Names of a policy's row that one line shows."""


def _idle_lines(plan: Plan) -> list[str]:
    """The same for people: what could not be clamped has another word."""
    bad = [v.name for v in plan.verdicts if v.stands_in_the_way]
    helpless = [clause for clause in _idle(plan) if clause.verb == "clamp" and any(map(clause.names, bad))]
    return [f"policy: {clause.verb} {_names(clause)}: "
            + ("there is no nearer value to write; tolerate is the word for it" if clause in helpless else
               "changes nothing here") for clause in _idle(plan)]


def said(plan: Plan) -> str:
    """`does not fit: 1 refused, 7 noticed, 393 fits`."""
    parts = [f"{number} {word.replace('_', ' ')}" for word, number in counts(plan).items()]
    return f"{WORDS[status(plan)]}: {', '.join(parts) or 'not judged'}"


def worst(plan: Plan) -> str:
    """What stands in the way first, or what is lost first; "" where nothing is."""
    lines = plan.refusals or [str(v) for v in plan.verdicts if v.loses]
    return lines[0] if lines else ""


def host_pairs(name: str, plan: Plan | None, everything: bool) -> list[tuple[str, str]]:
    """One host's answer in lines: what stands in the way, what the policy changed, notes. None: no way there."""
    if plan is None:
        return [(name, f"{WORDS[NOT]}: {NO_WAY}")]
    lines = _lines(plan, everything)
    if not everything and len(lines) > SCREEN:
        lines = [*lines[:SCREEN], f"… and {len(lines) - SCREEN} more; --all shows every one"]
    return [(name, said(plan)), *(("", line) for line in (*plan.obstacles, *lines, *plan.notes, *_idle_lines(plan)))]


def _lines(plan: Plan, everything: bool) -> list[str]:
    """Verdicts with a reason, the worst first; those in the way and those of the policy, unless all are wanted."""
    order = list(Answer)
    told = [v for v in plan.verdicts if v.reason and (everything or v.stands_in_the_way or v.overruled)]
    return [str(v) for v in sorted(told, key=lambda v: -order.index(v.answer))]


def hosts_table(plans: Mapping[str, Plan | None]) -> Table:
    """Several hosts, the worst first: answer, counts, and the worst reason of each; None for no way there."""
    ordered = sorted(plans.items(), key=lambda pair: -NOT if pair[1] is None else -status(pair[1]))
    return Table(("host", "answer", ">refused", ">noticed", ">harmless", ">written as", ">fits", "worst"),
                 [(name, *_host_row(plan)) for name, plan in ordered])


def _host_row(plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return (WORDS[NOT], *[""] * len(Answer), NO_WAY)
    found = counts(plan)
    return (WORDS[status(plan)], *(str(found.get(answer.name.lower(), "")) for answer in reversed(Answer)), worst(plan))


# Tables from one host or place to another.


@dataclass
class Legend:
    """Letters for reasons: a table's cells are narrow, and many have one reason in common."""

    keys: dict[str, str] = field(default_factory=dict)

    def key(self, reason: str) -> str:
        """The reason's letter: a to z, then aa."""
        number = len(self.keys)
        letter = chr(97 + number % 26) * (number // 26 + 1)
        return self.keys.setdefault(reason, letter)

    def pairs(self, everything: bool) -> list[tuple[str, str]]:
        """A line for each, or for as many as one screen shows."""
        rows = [(key, reason) for reason, key in self.keys.items()]
        if everything or len(rows) <= SCREEN:
            return rows
        return [*rows[:SCREEN], ("", f"… and {len(rows) - SCREEN} more; --all shows every one")]


def square(names: Sequence[str], reasons: Mapping[tuple[int, int], Sequence[str]], good: str,
           legend: Legend) -> Table:
    """Rows go from, columns to. A cell: `good`, or the letter of the worst reason and how many there are."""
    def cell(a: int, b: int) -> str:
        if a == b:
            return "·"
        found = reasons[a, b]
        return f"{legend.key(found[0])} {len(found)}" if found else good

    numbers = range(len(names))
    return Table(("", "from \\ to", *(str(n + 1) for n in numbers)),
                 [(str(a + 1), names[a], *(cell(a, b) for b in numbers)) for a in numbers])


def matrix_reasons(names: Sequence[str], plans: Mapping[tuple[str, str], Plan]) -> dict[tuple[int, int], list[str]]:
    """Why a guest that was started on one host does not fit another, or what it loses; by numbers of hosts."""
    place = {name: number for number, name in enumerate(names)}
    return {(place[a], place[b]): plan.refusals or [str(v) for v in plan.verdicts if v.loses]
            for (a, b), plan in plans.items()}


# The four-way matrix.


def vmm_words(vmm: Vmm) -> str:
    """What a VMM knows, in a line."""
    return "; ".join((
        "a row for every register of this catalogue" if vmm.rows is None else f"rows for {len(vmm.rows)} registers",
        "writes and reads contracts (minor 1)" if vmm.contracts else "no contracts (minor 0)",
        "opts out: starts guests under what both kernels can be" if vmm.opts_out else
        "starts guests as the kernel comes"))


def fleet_pairs(fleet: Fleet) -> list[tuple[str, str]]:
    """The kernels and VMMs, and what a VMM that opts out can't opt out of."""
    old, new = fleet.places[0], fleet.places[-1]
    pairs = [("old kernel", f"{old.host.kernel}, {old.host.cpu}"), ("new kernel", f"{new.host.kernel}, {new.host.cpu}"),
             ("old VMM", vmm_words(old.vmm)), ("new VMM", vmm_words(new.vmm))]
    return pairs + [("no opting out" if k == 0 else "", line) for k, line in enumerate(fleet.kept)]


def direct(fleet: Fleet) -> dict[tuple[int, int], tuple[str, ...]]:
    """The moves of guests that were started where they are."""
    return {(route[0], route[1]): reasons for route, reasons in fleet.routes.items() if len(route) == 2}


def stranded(fleet: Fleet) -> dict[tuple[int, ...], tuple[str, ...]]:
    """Guests that moved safely once and can't go on or back."""
    return {route: reasons for route, reasons in fleet.routes.items() if len(route) == 3 and reasons}


def stranded_table(fleet: Fleet, legend: Legend) -> Table:
    """One row a route that ends in a place where the guest does not fit, with the reason's letter."""
    rows = [(*(str(n + 1) for n in route), f"{legend.key(reasons[0])} {len(reasons)}")
            for route, reasons in stranded(fleet).items()]
    return Table(("started", "moved to", "then to", "why not"), rows)


def fence_lines(fleet: Fleet) -> list[str]:
    """Where the fence lies, in words."""
    fences = fleet.fences
    if not fences:
        return ["none: new kernel and new VMM exchange guests safely with no other place"]
    if len(fences[0]) == len(fleet.places):
        return ["none needed: every move is safe, there, on and back"]
    return [f"once every {_gone(fleet, group)} is gone, and no guest is left that was started before: from then on "
            f"every move between {' and '.join(str(n + 1) for n in group)} is safe, there, on and back"
            for group in fences]


def _gone(fleet: Fleet, group: Sequence[int]) -> str:
    """What is not in the fleet any more when only these places are left."""
    left = [fleet.places[n] for n in group]
    if all(place.vmm == fleet.places[-1].vmm for place in left) and len(left) == 2:
        return f"{fleet.places[0].vmm.name} VMM"
    if all(place.kernel == fleet.places[-1].kernel for place in left) and len(left) == 2:
        return f"{fleet.places[0].kernel} kernel"
    return " or ".join(place.name for place in fleet.places if place not in left)


def fleet_status(fleet: Fleet) -> int:
    """0 where every move is safe, 10 where all are after a fence, 11 where there is none."""
    fences = fleet.fences
    if not fences:
        return NOT
    return FITS if len(fences[0]) == len(fleet.places) else WITH_LOSS


def fleet_document(fleet: Fleet) -> dict[str, Any]:
    """For machines: places, each route with its reasons, fences as lists of places."""
    return {
        "status": fleet_status(fleet),
        "places": [{"kernel": place.host.kernel, "vmm": {
            "name": place.vmm.name, "registers": None if place.vmm.rows is None else len(place.vmm.rows),
            "contracts": place.vmm.contracts, "opts_out": place.vmm.opts_out}} for place in fleet.places],
        "routes": [{"places": list(route), "safe": not reasons, "reasons": list(reasons)}
                   for route, reasons in fleet.routes.items()],
        "pinned": len(fleet.pins.values), "kept": list(fleet.kept), "fences": [list(group) for group in fleet.fences],
    }


def rest(ways: int, shown: int) -> str:
    """What a cut table leaves out."""
    return f"… and {ways - shown} more; --all shows every one"
