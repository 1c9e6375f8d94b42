"""`python -m bench compare A B`: two runs of blackout, median by median."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.summary import point
from migstream.errors import OutputError, UsageError
from migstream.show import Table, print_pairs, print_table

SAME_MACHINE = ("cpu", "cpus", "kernel", "system")
"""What must be the same for two runs' times to be compared."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("before", type=Path, help="blackout.json of a run")
    parser.add_argument("after", type=Path, help="of another")
    parser.add_argument("--other-machine", action="store_true", help="compare runs of different machines")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the ratios after/before. Raises: UsageError for runs that can't be compared, OutputError."""
    before, after = load(options.before), load(options.after)
    differ = differences(before, after)
    if differ and not options.other_machine:
        raise UsageError(f"the runs are of different machines ({'; '.join(differ)}): their times say nothing about "
                         "each other; --other-machine compares them nevertheless")
    return {"before": str(options.before), "after": str(options.after), "differ": differ,
            "ratios": _ratios(before, after)}


def load(path: Path) -> dict[str, Any]:
    """Read a run's document. Raises: OutputError, UsageError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["bench"] != "blackout" or not isinstance(document["curves"], dict):
            raise ValueError("not a run of blackout")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is no result of `python -m bench blackout`") from None
    return dict(document)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same of the two machines, and of measured and modelled time."""
    one, other = before["machine"], after["machine"]
    out = [f"{name} {one.get(name)} and {other.get(name)}" for name in SAME_MACHINE if one.get(name) != other.get(name)]
    if before["kind"] != after["kind"]:
        out.append(f"one is {before['kind']}, the other {after['kind']}")
    return out


def _ratios(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"vcpus": at["vcpus"], "thing": thing, "before": then["total"]["p50"], "after": at["total"]["p50"],
             "ratio": at["total"]["p50"] / then["total"]["p50"]}
            for thing, curve in after["curves"].items() for at in curve["points"]
            if (then := point(before, thing, at["vcpus"]))]


def print_result(result: dict[str, Any]) -> None:
    """The ratios as a table."""
    print_pairs([("before", result["before"]), ("after", result["after"]),
                 *(("differs", what) for what in result["differ"])])
    print_table(Table(("vCPUs", "way", ">before ms", ">after ms", ">after/before"), [
        (str(one["vcpus"]), one["thing"], f"{one['before'] / 1e6:.3f}", f"{one['after'] / 1e6:.3f}",
         f"{one['ratio']:.2f}") for one in result["ratios"]]))
