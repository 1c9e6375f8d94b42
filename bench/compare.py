"""`python -m bench compare A B`: two runs of blackout, median by median; of two counted runs, count by count."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.document import load
from bench.hosts import COUNTED, MODELLED
from bench.summary import point
from migstream.errors import UsageError
from migstream.show import Table, print_pairs, print_table

SAME_MACHINE = ("cpu", "cpus", "kernel", "system")
"""What must be the same for two runs' times to be compared."""

WRITES = ("vm_writes", "vcpu_writes", "early_writes")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("before", type=Path, help="blackout.json of a run, or its directory")
    parser.add_argument("after", type=Path, help="of another")
    parser.add_argument("--other-machine", action="store_true", help="compare runs of different machines")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the ratios after/before. Raises: UsageError for runs that can't be compared, OutputError."""
    before, after = load(options.before), load(options.after)
    if before["kind"] != after["kind"] and COUNTED in (before["kind"], after["kind"]):
        raise UsageError(f"one run is {before['kind']}, the other {after['kind']}: counts and times say nothing about "
                         "each other")
    differ = differences(before, after)
    if differ and not options.other_machine:
        raise UsageError(f"the runs are not of the same machine ({'; '.join(differ)}): their figures say nothing about "
                         "each other; --other-machine compares them nevertheless")
    compared = _counts if after["kind"] == COUNTED else _ratios
    rows = [row for pair in _common(before, after) for row in compared(*pair)]
    if not rows:
        raise UsageError("the runs have nothing in common: no way at the same vCPU count")
    return {"before": str(options.before), "after": str(options.after), "kind": after["kind"],
            "differ": [*differ, *remarks(before, after)], "counts" if after["kind"] == COUNTED else "ratios": rows}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same of the two machines, of the simulated kernels, and of measured and modelled time.

    Counts are the kernel's, whatever machine counted them.
    """
    one, other = before["machine"], after["machine"]
    names = () if before["kind"] == after["kind"] == COUNTED else SAME_MACHINE
    out = [f"{name} {one.get(name)} and {other.get(name)}" for name in names if one.get(name) != other.get(name)]
    if before["kind"] != after["kind"]:
        out.append(f"one is {before['kind']}, the other {after['kind']}")
    elif after["kind"] in (MODELLED, COUNTED) and before.get("backend") != after.get("backend"):
        out.append(f"backend {before.get('backend')} and {after.get('backend')}")
    return out


_REMARKS = (("options", "threads", "threads"), ("machine", "python", "Python"), ("machine", "implementation", "Python"),
            ("software", "native", "migstream's compiled part"), ("software", "qemu", "QEMU"),
            ("software", "c", "C compiler"))
"""What changes times without being the machine: part of the document, its field, its name."""


def remarks(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What else is not the same; ratios of such runs are shown, with these words."""
    if ("software" in before) != ("software" in after):
        yield f"the one {'before' if 'software' in after else 'after'} does not say which software measured"
    for part, field, name in _REMARKS:
        one, other = (document.get(part, {}).get(field) for document in (before, after))
        if None not in (one, other) and one != other:
            yield f"{name}: {one} and {other}"


def _common(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for thing, curve in after["curves"].items():
        for at in curve["points"]:
            if then := point(before, thing, at["vcpus"]):
                yield thing, then, at


def _ratios(thing: str, then: dict[str, Any], at: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"vcpus": at["vcpus"], "thing": thing, "before": then["total"]["p50"], "after": at["total"]["p50"],
           "ratio": at["total"]["p50"] / then["total"]["p50"]}


def _counts(thing: str, then: dict[str, Any], at: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in WRITES:
        yield {"vcpus": at["vcpus"], "thing": thing, "what": name, "before": then[name], "after": at[name]}


def print_result(result: dict[str, Any]) -> None:
    """The ratios, or the counts, as a table."""
    print_pairs([("before", result["before"]), ("after", result["after"]),
                 *(("differs", what) for what in result["differ"])])
    if "counts" in result:
        print_table(Table(("vCPUs", "way", "register writes", ">before", ">after"), [
            (str(one["vcpus"]), one["thing"], one["what"].removesuffix("_writes"), f"{one['before']:.0f}",
             f"{one['after']:.0f}") for one in result["counts"]]))
        return
    print_table(Table(("vCPUs", "way", ">before ms", ">after ms", ">after/before"), [
        (str(one["vcpus"]), one["thing"], f"{one['before'] / 1e6:.3f}", f"{one['after'] / 1e6:.3f}",
         f"{one['ratio']:.2f}") for one in result["ratios"]]))
