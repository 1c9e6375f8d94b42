"""`migstream check`: whether hosts can take a stream, register by register, before anything is touched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migstream.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from migstream.plan import Plan
    from migstream.verdicts.policy import Policy

FITS, WITH_LOSS = 0, 10
_WORST = 20
"""Verdicts that one screen shows of a host."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    sub.add_argument("file", metavar="STREAM|-")
    sub.add_argument("--host", action="append", required=True, metavar="P",
                     help="a captured profile, or a name from `host list`; may be given several times")
    sub.add_argument("--policy", metavar="FILE", help="TOML: what the operator tolerates, clamps, ignores, requires")
    sub.add_argument("--all", action="store_true", help="every verdict that has a reason, not the worst alone")


def run(options: argparse.Namespace) -> int:
    """Judge; the exit status is the worst host's. Raises: StreamError and below, UsageError, PolicyError."""
    from migstream.cli_host import open_profile
    from migstream.plan import plan_for
    from migstream.survey import survey
    from migstream.transport import open_source
    from migstream.verdicts.model import Saved

    policy = open_policy(options.policy)
    with open_source(options.file) as source:
        seen = survey(source)
    if seen.error is not None:
        raise seen.error.in_file(options.file)
    machine = seen.reader.machine
    assert machine is not None
    saved = Saved.of(machine, seen.reader.layouts, [bank.decode() for bank in seen.banks], seen.contract())
    plans = {name: plan_for(saved, open_profile(name), policy) for name in options.host}
    if options.json:
        from migstream.show import print_json

        print_json("check", {"file": options.file, "hosts": {name: as_plain(plan) for name, plan in plans.items()}})
    else:
        _print(plans, options.all)
    return max(status(plan) for plan in plans.values())


def open_policy(name: str | None) -> Policy:
    """The policy in a TOML file; the one that overrules nothing for None. Raises: UsageError."""
    from migstream.verdicts.policy import NO_POLICY, parse

    if name is None:
        return NO_POLICY
    try:
        return parse(Path(name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error


def status(plan: Plan) -> int:
    """Exit status for one host: 0, 10 where the policy lets a guest notice something, 11 where it does not fit."""
    if plan.refusals:
        return DoesNotFit.exit_status
    return WITH_LOSS if any(verdict.loses for verdict in plan.verdicts) else FITS


_WORDS = {FITS: "fits", WITH_LOSS: "fits with loss", DoesNotFit.exit_status: "does not fit"}


def as_plain(plan: Plan) -> dict[str, Any]:
    """One host's answer for machines: status, counts by answer, and each verdict that has a reason."""
    return {
        "status": status(plan), "counts": counts(plan), "obstacles": list(plan.obstacles), "notes": list(plan.notes),
        "verdicts": [{"register": v.name, "id": f"{v.slot.id:#x}", "answer": v.answer.name.lower(), "reason": v.reason,
                      "source": v.source, "at_the_pause": v.pending, "tolerated": v.tolerated}
                     for v in plan.verdicts if v.reason],
    }


def counts(plan: Plan) -> dict[str, int]:
    """Registers by answer, the worst first, without answers that nothing has."""
    from migstream.verdicts.model import Answer

    answers = [verdict.answer for verdict in plan.verdicts]
    return {answer.name.lower(): answers.count(answer) for answer in reversed(Answer) if answer in answers}


def _print(plans: dict[str, Plan], everything: bool) -> None:
    from migstream.show import print_pairs

    rows: list[tuple[str, str]] = []
    for name, plan in plans.items():
        said = ", ".join(f"{number} {word.replace('_', ' ')}" for word, number in counts(plan).items())
        rows.append((name, f"{_WORDS[status(plan)]}: {said or 'not judged'}"))
        rows += [("", line) for line in (*plan.obstacles, *_lines(plan, everything), *plan.notes)]
    print_pairs(rows)


def _lines(plan: Plan, everything: bool) -> list[str]:
    """Verdicts with a reason, the worst first; those that stand in the way alone unless all are wanted."""
    from migstream.verdicts.model import Answer

    order = list(Answer)
    told = [v for v in plan.verdicts if v.reason and (everything or v.stands_in_the_way or v.loses)]
    lines = [str(v) for v in sorted(told, key=lambda v: -order.index(v.answer))]
    if everything or len(lines) <= _WORST:
        return lines
    return [*lines[:_WORST], f"… and {len(lines) - _WORST} more; --all shows every one"]
