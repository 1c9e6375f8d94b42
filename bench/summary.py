"""From samples to the document that `--json` prints, and to tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.fit import TERMS, fit_curve
from bench.journal import Journal
from bench.measure import Timing
from migstream.show import Table, print_pairs, print_table

QEMU = "QEMU"
"""Its guest's XMM registers are zero: the one against which our bytes with zeroed ones are told."""

_TIMES = ("total", "save", "load")
_COUNTS = ("vm_writes", "vcpu_writes", "early_writes", "bytes", "still", "stream")


def summarize(journal: Journal, things: Sequence[str], vcpus: Iterable[int], *, times: bool = True) -> dict[str, Any]:
    """Curves by thing: at each vCPU count p50, p99 and max, phases and counts; base, slope, curvature. Times in ns.

    Args:
        times: False for counts alone.
    """
    counts, curve = list(vcpus), _curve if times else _counted
    return {thing: curve(journal, thing, counts) for thing in things
            if any(True for n in counts for _ in journal.of(n, thing))}


def _curve(journal: Journal, thing: str, vcpus: list[int]) -> dict[str, Any]:
    found = {n: samples for n in vcpus if (samples := list(journal.of(n, thing)))}
    fits = {}
    for name in _TIMES:
        fit = fit_curve({n: [s[name] for s in samples] for n, samples in found.items()})
        fits[name] = fit and fit.document()
    return {"points": [{"vcpus": n, **_point(samples)} for n, samples in found.items()], "fit": fits}


def _counted(journal: Journal, thing: str, vcpus: list[int]) -> dict[str, Any]:
    found = {n: samples for n in vcpus if (samples := list(journal.of(n, thing)))}
    return {"points": [{"vcpus": n, "samples": len(samples), **_writes(samples)} for n, samples in found.items()]}


def _writes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(s.get(name, 0) for s in samples) for name in _COUNTS}


def _point(samples: list[dict[str, Any]]) -> dict[str, Any]:
    first = samples[0]
    out: dict[str, Any] = {"samples": len(samples)}
    for name in _TIMES:
        timing = Timing(tuple(s[name] for s in samples))
        out[name] = {"min": min(timing.samples), "p50": timing.median, "p99": timing.p99, "max": max(timing.samples)}
    out["phases"] = {name: statistics.median(s["phases"][name] for s in samples) for name in first["phases"]}
    out["before"], out["made"] = (statistics.median(s[name] for s in samples) for name in ("before", "made"))
    return out | _writes(samples)


def point(document: dict[str, Any], thing: str, vcpus: int) -> dict[str, Any] | None:
    """One point of a document's curve."""
    curve = document["curves"].get(thing, {"points": []})
    return next((at for at in curve["points"] if at["vcpus"] == vcpus), None)


def ratios(document: dict[str, Any], things: Sequence[str]) -> list[dict[str, Any]]:
    """Medians of every strategy against everything else, at each vCPU count that both have."""
    others = list(document["curves"])
    return [_ratio(thing, at, other, there)
            for thing in things if thing in document["curves"] for at in document["curves"][thing]["points"]
            for other in others if other != thing
            if (there := point(document, other, at["vcpus"])) and _timed(there)]


def _timed(at: dict[str, Any]) -> bool:
    """Whether something can be divided by its times."""
    return bool(at["total"]["min"] and all(at[name]["p50"] for name in _TIMES))


def _ratio(thing: str, at: dict[str, Any], other: str, there: dict[str, Any]) -> dict[str, Any]:
    return {"vcpus": at["vcpus"], "thing": thing, "against": other,
            **{name: at[name]["p50"] / there[name]["p50"] for name in _TIMES},
            "least": at["total"]["min"] / there["total"]["min"],
            "bytes": at["bytes"] / there["bytes"] if there["bytes"] else None,
            "still": at["still"] / there["bytes"] if there["bytes"] and other == QEMU else None}


def print_document(document: dict[str, Any]) -> None:
    """The document as tables."""
    machine = document["machine"]
    print_pairs([("blackout", f"{document['backend']}; {_KINDS[document['kind']]}; {document['date']}"),
                 ("machine", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['kernel']}"),
                 ("software", _software(document)),
                 *((("resumed", document["resumed"]),) if document.get("resumed") else ()),
                 *(("left out", reason) for reason in document["left_out"])])
    if document["kind"] == "counted":
        _print_counts(document)
        return
    _print_points(document)
    _print_fits(document)
    _print_ratios(document)
    if model := document["model"]:
        print_pairs([("model", f"against what was measured here: median error {model['median_error']:.0%}, worst "
                               f"{model['worst_error']:.0%}; calibrated by {model['calibration']['method']}")])


def _software(document: dict[str, Any]) -> str:
    """Versions of what measured, in words; older documents have only Python's."""
    known, machine = document.get("software", {}), document["machine"]
    names = {"migstream": "migstream", "revision": "commit", "native": "", "c": "", "qemu": ""}
    return ", ".join([*(f"{title} {known[name]}".strip() for name, title in names.items() if known.get(name)),
                      f"Python {machine.get('python', 'unknown')}"])


_KINDS = {"measured": "wall time", "modelled": "MODELLED time, not measured; ioctls only, no encoding",
          "counted": "register writes counted, no times"}


def _points(document: dict[str, Any]) -> list[tuple[int, str, dict[str, Any]]]:
    """(vCPUs, way, point), by vCPU count."""
    return sorted(((at["vcpus"], name, at) for name, curve in document["curves"].items() for at in curve["points"]),
                  key=lambda row: row[0])


def _print_counts(document: dict[str, Any]) -> None:
    print_table(Table(("vCPUs", "way", ">VM-scoped writes in the blackout", ">vCPU-scoped", ">writes before the pause"),
                      [(str(vcpus), name, *(f"{at[key]:.0f}" for key in ("vm_writes", "vcpu_writes", "early_writes")))
                       for vcpus, name, at in _points(document)]))


def _ms(ns: float) -> str:
    return f"{ns / 1e6:,.3f}"


def _print_points(document: dict[str, Any]) -> None:
    head = ("vCPUs", "way", ">p50 ms", ">p99", ">max", ">save", ">load", ">n", ">VM-scoped writes in the blackout",
            ">vCPU-scoped", ">bytes in the blackout")
    print_table(Table(head, [
        (str(vcpus), name, *(_ms(at["total"][key]) for key in ("p50", "p99", "max")), _ms(at["save"]["p50"]),
         _ms(at["load"]["p50"]), str(at["samples"]),
         *(f"{at[key]:.0f}" if at[key] else "" for key in ("vm_writes", "vcpu_writes", "bytes")))
        for vcpus, name, at in _points(document)]))


_SCALE = {"base": (1e3, "us"), "slope": (1e3, "us a vCPU"), "curvature": (1.0, "ns a vCPU²")}


def _print_fits(document: dict[str, Any]) -> None:
    rows = []
    for name, curve in document["curves"].items():
        if fit := curve["fit"]["total"]:
            rows.append((name, *(_term(fit, term) for term in TERMS), f"{fit['worst_relative_error']:.0%}"))
    if rows:
        print_table(Table(("least squares", *(f">{term}, {_SCALE[term][1]} [95 %]" for term in TERMS), ">worst point"),
                          rows))


def _term(fit: dict[str, Any], term: str) -> str:
    scale, found = _SCALE[term][0], fit[term]
    interval = "" if found["low"] is None else f" [{found['low'] / scale:,.1f}..{found['high'] / scale:,.1f}]"
    return f"{found['value'] / scale:,.1f}{interval}"


def _print_ratios(document: dict[str, Any]) -> None:
    """Those that mean something to people; `--json` has all."""
    threads = document["options"]["threads"]
    pairs = (("per-vCPU", "scoped"), ("scoped", "C plain"), ("prologue", "C best"),
             ("prologue+threads", f"C best, {threads} threads"), ("prologue+threads", "C plain"),
             ("prologue+threads", QEMU))
    rows = [(one["thing"], one["against"], str(one["vcpus"]), *(f"{one[key]:.2f}" for key in (*_TIMES, "least")),
             *(f"{one[key]:.3f}" if one[key] else "" for key in ("bytes", "still")))
            for pair in pairs for one in document["ratios"] if (one["thing"], one["against"]) == pair]
    if rows:
        head = ("ratio of", "to", ">vCPUs", ">save+load", ">save", ">load", ">fastest rounds", ">bytes",
                ">with XMM zero")
        print_table(Table(head, rows))
