"""What a line of a blackout's journal must be: whose sample, of which round, and numbers that can be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bench.strategies import PHASES, Sample
from migstream.errors import printable

MOST = 1 << 62
"""Times in ns, lengths and counts are below it."""

_FIELDS = frozenset(vars(Sample()))
_LEAST = {"total": 1, "save": 1, "load": 1}
_SIGNED = "rest"
"""The part that is a difference: threads can make it negative."""


class Wrong(Exception):
    """What is wrong with a line, in words."""


def whole(value: object, least: int, most: int, name: str) -> int:
    """`value` if it is a whole number in the range. Raises: Wrong."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Wrong(f"{name} is {_short(value)}, not a whole number from {least} to {most}")
    return value


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > MOST:
        return "a huge number"
    return printable(json.dumps(value), 40)


def line_check(vcpus: Collection[int], things: Collection[str], reps: int) -> Callable[[Mapping[str, Any]], None]:
    """A function that raises Wrong for a journal's line that no such run can have written."""
    def check(line: Mapping[str, Any]) -> None:
        if line["vcpus"] not in vcpus:
            raise Wrong(f"{line['vcpus']} vCPUs are not of this run")
        if line["thing"] not in things:
            raise Wrong(f"{_short(line['thing'])} is not of this run")
        whole(line["round"], 0, reps - 1, "round")
        _sample(line["sample"])
    return check


def _sample(sample: Mapping[str, Any]) -> None:
    if sample.keys() != _FIELDS:
        odd = sorted(sample.keys() ^ _FIELDS)
        raise Wrong(f"the sample's field {_short(odd[0])} is {'unknown' if odd[0] in sample else 'missing'}")
    for name in sorted(_FIELDS - {"phases"}):
        whole(sample[name], _LEAST.get(name, 0), MOST, f"sample.{name}")
    if sample["total"] != sample["save"] + sample["load"]:
        raise Wrong("the sample's total is not its save and load")
    phases = sample["phases"]
    if not isinstance(phases, dict) or (phases and phases.keys() != set(PHASES)):
        raise Wrong("sample.phases are not those of a blackout")
    for name, value in phases.items():
        whole(value, -MOST if name == _SIGNED else 0, MOST, f"sample.phases.{name}")


def key_check(line: object) -> None:
    """Raises Wrong for what is no journal's line at all."""
    names = {"vcpus", "thing", "round", "date", "sample"}
    if not isinstance(line, dict) or line.keys() != names:
        raise Wrong("it is no sample: " + ", ".join(sorted(names)) + " are wanted")
    whole(line["vcpus"], 1, MOST, "vcpus")
    whole(line["round"], 0, MOST, "round")
    if not isinstance(line["thing"], str) or not isinstance(line["sample"], dict):
        raise Wrong("thing is text, sample an object")
    if not isinstance(line["date"], str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"], re.ASCII):
        raise Wrong(f"date is {_short(line['date'])}, not YYYY-MM-DD")
