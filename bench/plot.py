"""Pictures of a blackout run, SVG and PNG, that can be read without explanation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.program import LeftOut
from bench.strategies import PHASES, STRATEGIES

_COLOURS = {"per-vCPU": "#d62728", "scoped": "#ff9f1c", "prologue": "#1f77b4", "prologue+threads": "#2ca02c",
            "C plain": "#555555", "C best": "#888888", "QEMU": "#8e44ad"}
_PHASE_COLOURS = dict(zip(PHASES, ("#4c78a8", "#9ecae9", "#bab0ac", "#f58518", "#54a24b", "#e45756", "#dddddd"),
                          strict=True))
_LABELS = {"per-vCPU": "per-vCPU: VM registers written once for each vCPU, all in the pause",
           "scoped": "scoped: VM registers written once, all in the pause",
           "prologue": "prologue: what is fixed is sent before the pause",
           "prologue+threads": "prologue, {threads} threads",
           "C plain": "plain C loop over the same ioctls (no stream)", "QEMU": "QEMU, device state only"}
_SUFFIXES = ("png", "svg")


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every picture that the document has data for; returns the files. Raises: LeftOut without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise LeftOut("plots: matplotlib is not installed (pip install 'migstream[bench]')") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "svg.hashsalt": "migstream", "axes.spines.top": False,
                                "axes.spines.right": False, "figure.dpi": 110})
    files = []
    for name, picture in (("blackout", _curves), ("phases", _phases)):
        figure = picture(document)
        if figure is not None:
            files += list(_save(figure, folder, name))
    return files


def _save(figure: Any, folder: Path, name: str) -> Iterator[Path]:
    from matplotlib import pyplot

    for suffix in _SUFFIXES:
        path = folder / f"{name}.{suffix}"
        figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
        yield path
    pyplot.close(figure)


def _title(document: dict[str, Any], what: str) -> str:
    machine = document["machine"]
    kind = ("MODELLED time, not measured" if document["modelled"] else "measured on real KVM")
    return (f"{what}\n{kind}: {machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, "
            f"{document['date']}")


def _curves(document: dict[str, Any]) -> Any:
    """Blackout against vCPUs, both logarithmic, and beside it what each costs against the best strategy."""
    from matplotlib import pyplot

    curves = {name: curve["points"] for name, curve in document["curves"].items() if curve["points"]}
    if not curves:
        return None
    figure, axes = pyplot.subplots(figsize=(10.5, 6.6), layout="constrained")
    for name, points in curves.items():
        _line(axes, document, name, points)
    counts = sorted({at["vcpus"] for points in curves.values() for at in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_xlabel("vCPUs of the guest")
    axes.set_ylabel("time the guest stands still for its registers, ms (median; bars to the 99th percentile)")
    _plain_milliseconds(axes)
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, fontsize=9)
    axes.set_title(_title(document, "Blackout for saving and restoring all registers of a guest, RAM not counted"),
                   loc="left", fontsize=11)
    return figure


def _line(axes: Any, document: dict[str, Any], name: str, points: list[dict[str, Any]]) -> None:
    x = [at["vcpus"] for at in points]
    y = [at["total"]["p50"] / 1e6 for at in points]
    high = [max(at["total"]["p99"] / 1e6 - middle, 0) for at, middle in zip(points, y, strict=True)]
    strategy = name in STRATEGIES
    axes.errorbar(x, y, yerr=[[0] * len(y), high], label=_label(document, name), color=_colour(name),
                  linestyle="-" if strategy else "--", marker="o" if strategy else "s", markersize=5 if strategy else 4,
                  linewidth=2 if strategy else 1.3, elinewidth=1, capsize=2)


def _colour(name: str) -> str:
    return _COLOURS.get(name) or _COLOURS.get(name.split(",")[0], "#000000")


def _label(document: dict[str, Any], name: str) -> str:
    threads = document["options"]["threads"]
    if name.startswith("C best"):
        return f"best possible C loop{name.removeprefix('C best') or ', 1 thread'} (no stream)"
    return _LABELS.get(name, name).format(threads=threads)


def _plain_milliseconds(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _phases(document: dict[str, Any]) -> Any:
    """Where the time goes: a bar for each vCPU count and strategy, its parts on top of each other."""
    from matplotlib import pyplot

    names = [name for name in STRATEGIES if name in document["curves"]]
    points = {name: document["curves"][name]["points"] for name in names}
    counts = sorted({at["vcpus"] for name in names for at in points[name]})[-4:]
    if not counts:
        return None
    figure, panels = pyplot.subplots(1, len(counts), figsize=(3.1 * len(counts) + 1.5, 6.2), layout="constrained",
                                     squeeze=False)
    for axes, vcpus in zip(panels[0], counts, strict=True):
        _stack(axes, {name: at for name in names for at in points[name] if at["vcpus"] == vcpus})
        axes.set_title(f"{vcpus} vCPUs", fontsize=10)
    panels[0][0].set_ylabel("blackout, ms (median of each part); each panel has its own scale")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(_title(document, "Where a blackout's time goes, and how often VM-scoped registers are written"),
                    x=0.01, ha="left", fontsize=11)
    return figure


def _stack(axes: Any, points: dict[str, dict[str, Any]]) -> None:
    bottom = [0.0] * len(points)
    for phase in PHASES:
        heights = [max(at["phases"].get(phase, 0), 0) / 1e6 for at in points.values()]
        axes.bar(list(range(len(points))), heights, bottom=bottom, color=_PHASE_COLOURS[phase], label=phase, width=0.7)
        bottom = [low + more for low, more in zip(bottom, heights, strict=True)]
    for place, (at, top) in enumerate(zip(points.values(), bottom, strict=True)):
        axes.annotate(f"{at['vm_writes']:.0f} VM\nwrites", (place, top), ha="center", va="bottom", fontsize=8,
                      xytext=(0, 2), textcoords="offset points")
    axes.set_xticks(range(len(points)), [name.replace("+", "\n+") for name in points], rotation=30, fontsize=8)
    axes.margins(y=0.12)
    axes.grid(True, axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
