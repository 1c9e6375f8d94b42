"""Pictures of a blackout run, SVG and PNG, that can be read without explanation."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf, log10
from pathlib import Path
from typing import Any

from bench.hosts import COUNTED, MODELLED
from bench.lock import WRITES, Write
from bench.modelled import KNOWN_PARTS
from bench.strategies import PHASES, STRATEGIES

_COLOURS = {"per-vCPU": "#d62728", "scoped": "#ff9f1c", "prologue": "#1f77b4", "prologue+threads": "#2ca02c",
            "C plain": "#333333", "C best": "#777777", "QEMU": "#8e44ad"}
_PHASE_COLOURS = dict(zip(PHASES, ("#4c78a8", "#9ecae9", "#bab0ac", "#f58518", "#54a24b", "#e45756", "#dddddd"),
                          strict=True))
_PHASE_LABELS = {"CPUID and features": "write CPUID, features", "vCPU registers": "write vCPU registers",
                 "VM registers": "write VM registers", "rest": "plan, framing, checks"}
_LABELS = {"per-vCPU": "migstream, per-vCPU: VM-scoped registers written once for each vCPU, all in the pause",
           "scoped": "migstream, scoped: VM-scoped registers written once, all in the pause",
           "prologue": "migstream, prologue: what can't change any more is restored before the pause",
           "prologue+threads": "migstream, prologue and {threads} threads",
           "C plain": "C program, plain: all ioctls in the pause, 1 thread, no stream",
           "QEMU": "QEMU, its device state saved and loaded"}
_SUFFIXES = ("png", "svg")


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every picture of a blackout run that it has data for; returns the files.

    Without matplotlib nothing is drawn, and the document's `left_out` says so. Raises: OSError.
    """
    pictures = {"blackout": _curves, "phases": _phases, "model": _model}
    return _draw(document, folder, {} if document["kind"] == COUNTED else pictures)


def draw_lock(document: dict[str, Any], folder: Path) -> list[Path]:
    """The same for a run of `bench lock`."""
    return _draw(document, folder, {"lock": _lock})


def _draw(document: dict[str, Any], folder: Path,
          pictures: Mapping[str, Callable[[dict[str, Any]], Any]]) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        document["left_out"].append("plots: matplotlib is not installed (pip install 'migstream[bench]')")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "svg.hashsalt": "migstream", "axes.spines.top": False,
                                "axes.spines.right": False, "figure.dpi": 110})
    figures = ((name, picture(document)) for name, picture in pictures.items())
    return [path for name, figure in figures if figure is not None for path in _save(figure, folder, name)]


def _save(figure: Any, folder: Path, name: str) -> Iterator[Path]:
    from matplotlib import pyplot

    for suffix in _SUFFIXES:
        path = folder / f"{name}.{suffix}"
        with whole(path) as unfinished:
            figure.savefig(unfinished, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
        yield path
    pyplot.close(figure)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the name of a file beside `path` that becomes `path` when the body has ended well, else is removed."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _head(figure: Any, text: str) -> None:
    """The picture's title at its left, its lines broken where the picture ends."""
    width = int(figure.get_figwidth() / _TITLE_CHARACTER)
    lines = (part for line in text.splitlines() for part in textwrap.wrap(line, width))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=_TITLE_POINTS)


_TITLE_POINTS, _TITLE_CHARACTER = 11, 0.09
"""The title's size, and the inches that a character of it takes at most, on average."""


def _title(document: dict[str, Any], what: str) -> str:
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, {document['date']}"
    if document.get("kind") == MODELLED:
        return (f"{what}\nMODELLED time of {document['backend']}, not measured; ioctls only, no encoding; costs "
                f"calibrated on {where}")
    return f"{what}\nmeasured on real KVM: {where}"


def _curves(document: dict[str, Any]) -> Any:
    """Blackout against vCPUs: as it grows (linear), and for small guests too (both axes logarithmic)."""
    from matplotlib import pyplot

    curves = {name: curve["points"] for name, curve in document["curves"].items() if curve["points"]}
    if not curves:
        return None
    figure, (linear, logarithmic) = pyplot.subplots(1, 2, figsize=(13.5, 7.2), layout="constrained")
    for axes in (linear, logarithmic):
        for name, points in curves.items():
            _line(axes, document, name, points)
        axes.set_xlabel("vCPUs of the guest")
        axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    modelled = document.get("kind") == MODELLED
    linear.set_ylabel(f"blackout, ms ({MODELLED.upper() if modelled else 'median; bars reach to the 99th percentile'})")
    linear.set_title("linear: how it grows", fontsize=10)
    logarithmic.set_title("the same, both axes logarithmic: small guests", fontsize=10)
    linear.set_ylim(0, 1.06 * max(at["total"]["p99"] for points in curves.values() for at in points) / 1e6)
    linear.set_xlim(left=0)
    linear.xaxis.get_major_locator().set_params(integer=True)
    _log_axes(logarithmic, sorted({at["vcpus"] for points in curves.values() for at in points}))
    handles, labels = linear.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _head(figure, _title(document, "Blackout: how long a guest stands still while all its registers are saved and "
                         "restored (RAM not counted)"))
    return figure


def _log_axes(axes: Any, counts: list[int]) -> None:
    """Both logarithmic, after the data: so many ticks of y have a number that any value can be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = [n for n in counts if n & (n - 1) == 0]
    axes.set_xticks(shown or counts, [str(n) for n in shown or counts])
    low, high = axes.get_ylim()
    decades = log10(high / low)
    between = next(subs for most, subs in _NUMBERED if decades < most)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(LogLocator(subs=between) if between else NullLocator())
    if not between and decades < 1:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="minor", axis="y", color="#f0f0f0", linewidth=0.6)


_NUMBERED: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0.5, ()), (1.2, (1.5, 2, 3, 4, 5, 6, 7, 8, 9)), (3, (2, 5)), (inf, ()))
"""Below so many decades of an axis: which parts of a decade have a number; below half a one ticks stand evenly."""


def _line(axes: Any, document: dict[str, Any], name: str, points: list[dict[str, Any]]) -> None:
    x = [at["vcpus"] for at in points]
    y = [at["total"]["p50"] / 1e6 for at in points]
    strategy = name in STRATEGIES
    high = [max(at["total"]["p99"] / 1e6 - middle, 0) for at, middle in zip(points, y, strict=True)]
    bars = None if document.get("kind") == MODELLED else [[0] * len(y), high]
    axes.errorbar(x, y, yerr=bars, label=_label(document, name), **_style(name), elinewidth=1,
                  capsize=2, markersize=5 if strategy else 4, linewidth=2 if strategy else 1.4)


def _style(name: str) -> dict[str, Any]:
    if name in STRATEGIES:
        return {"color": _COLOURS[name], "linestyle": "-", "marker": "o"}
    several = "threads" in name
    return {"color": _COLOURS.get(name.split(",")[0], "#000000"), "linestyle": ":" if several else "--",
            "marker": "^" if several else "s"}


def _label(document: dict[str, Any], name: str) -> str:
    threads = document["options"]["threads"]
    if name.startswith("C best"):
        threads = name.removeprefix("C best") or ", 1 thread"
        return f"C program, best way{threads}: ioctls of the prologue plan, no stream"
    return _LABELS.get(name, name).format(threads=threads)


def _phases(document: dict[str, Any]) -> Any:
    """Where the time goes: a bar for each vCPU count and strategy, its parts on top of each other."""
    from matplotlib import pyplot

    names = [name for name in STRATEGIES if name in document["curves"]]
    points = {name: document["curves"][name]["points"] for name in names}
    counts = sorted({at["vcpus"] for name in names for at in points[name]})
    counts = ([n for n in counts if n & (n - 1) == 0] or counts)[-4:]
    if not counts:
        return None
    figure, panels = pyplot.subplots(1, len(counts), figsize=(max(3.1 * len(counts) + 1.5, 8), 6.2),
                                     layout="constrained", squeeze=False)
    for axes, vcpus in zip(panels[0], counts, strict=True):
        _stack(axes, {name: at for name in names for at in points[name] if at["vcpus"] == vcpus},
               document["kind"] == MODELLED)
        axes.set_title(f"{vcpus} vCPU{'s' * (vcpus > 1)}", fontsize=10)
    what = MODELLED.upper() if document["kind"] == MODELLED else "median of each part"
    panels[0][0].set_ylabel(f"blackout, ms ({what}); each panel has its own scale")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9)
    _head(figure, _title(document, "Where a blackout's time goes, and how often VM-scoped registers are written"))
    return figure


def _stack(axes: Any, points: dict[str, dict[str, Any]], modelled: bool) -> None:
    bottom = [0.0] * len(points)
    for phase in PHASES:
        heights = [max(at["phases"].get(phase, 0), 0) / 1e6 for at in points.values()]
        if modelled and phase not in KNOWN_PARTS:
            continue
        axes.bar(list(range(len(points))), heights, bottom=bottom, color=_PHASE_COLOURS[phase],
                 label=_PHASE_LABELS.get(phase, phase), width=0.7)
        bottom = [low + more for low, more in zip(bottom, heights, strict=True)]
    for place, (at, top) in enumerate(zip(points.values(), bottom, strict=True)):
        axes.annotate(f"{at['vm_writes']:.0f} VM\nwrites", (place, top), ha="center", va="bottom", fontsize=8,
                      xytext=(0, 2), textcoords="offset points")
    axes.set_xticks(range(len(points)), [name.replace("+", "\n+") for name in points], rotation=30, fontsize=8)
    axes.set_ylim(0, 1.15 * max(bottom))
    axes.grid(True, axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _model(document: dict[str, Any]) -> Any:
    """What the model says (lines) and what was measured (points), for the parts that are ioctls."""
    from matplotlib import pyplot

    if not document.get("model"):
        return None
    model = document["model"]
    curves = {name: points for name, points in model["curves"].items() if points}
    figure, axes = pyplot.subplots(figsize=(10.5, 6.6), layout="constrained")
    for name, points in curves.items():
        x = [at["vcpus"] for at in points]
        axes.plot(x, [at["modelled"] / 1e6 for at in points], color=_COLOURS[name], label=f"{name}: modelled")
        axes.plot(x, [at["measured"] / 1e6 for at in points], color=_COLOURS[name], linestyle="none", marker="o",
                  label=f"{name}: measured")
    _log_axes(axes, sorted({at["vcpus"] for points in curves.values() for at in points}))
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    axes.set_xlabel("vCPUs of the guest")
    axes.set_ylabel("reading and writing registers, ms (medians; no encoding)")
    axes.legend(frameon=False, ncols=2, fontsize=9)
    _head(figure, _title(document, f"Model against measurement: median error {model['median_error']:.0%}, worst "
                         f"{model['worst_error']:.0%} (lines modelled, points measured)"))
    return figure


_WRITE_COLOURS = dict(zip((write.command for write in WRITES), ("#2ca02c", "#1f77b4", "#ff9f1c", "#d62728"),
                          strict=True))


def _lock(document: dict[str, Any]) -> Any:
    """Left: bursts that were measured, with the model's lines. Right: the model alone, far beyond this machine."""
    from matplotlib import pyplot

    figure, (near, far) = pyplot.subplots(1, 2, figsize=(13.5, 7.2), layout="constrained")
    for write in WRITES:
        _lock_measured(near, document["measured"], write.command)
        _lock_modelled(far, document["model"], write)
    _lock_signs(near, document["measured"])
    counts = sorted({at["vcpus"] for at in document["measured"]}) or [1, 2]
    _log_axes(near, counts)
    _log_axes(far, sorted({at["threads"] for at in document["model"]}))
    errors = sorted(abs(at["error"]) for at in document["measured"])
    error = f"error where measured: median {errors[len(errors) // 2]:.0%}, worst {errors[-1]:.0%}" if errors else ""
    kept = document["calibration"]["machine"]
    near.set_title("measured (points) and modelled (lines)" if errors else "nothing was measured here", fontsize=10)
    near.set_xlabel("vCPUs; one write for each")
    near.set_ylabel("all writes together, ms (median)")
    most = max(at["vcpus"] for at in document["model"])
    far.set_title(f"MODELLED, not measured: {most} vCPUs, as if {kept['cpu']} had a CPU for each thread\n{error}",
                  fontsize=10)
    far.set_xlabel("threads")
    far.set_ylabel("all writes together, ms")
    for axes in (near, far):
        axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    handles, labels = far.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    what = "One write for each vCPU: what several threads gain, and where a VM-wide lock takes it away"
    _head(figure, _title(document, what) if errors else
          f"{what}\nMODELLED, not measured; costs calibrated on {kept['cpu']}, Linux {kept['kernel']}")
    return figure


def _lock_signs(axes: Any, measured: list[dict[str, Any]]) -> None:
    """A legend of what points and lines are, whatever their colour."""
    from matplotlib.lines import Line2D

    lines: dict[int, Any] = {at["threads"]: _dashes(at["threads"]) for at in measured}
    nothing: Any = "none"
    signs = [Line2D([], [], color="#555555", label=f"{what}, {threads} thread{'s' * (threads > 1)}", marker=marker,
                    linestyle=line)
             for threads, dashes in sorted(lines.items())
             for what, marker, line in (("measured", _marker(threads), nothing), ("modelled", "", dashes))]
    if signs:
        axes.legend(handles=signs, loc="upper left", frameon=False, fontsize=9)


def _marker(threads: int) -> str:
    return "o" if threads == 1 else "^"


def _dashes(threads: int) -> str:
    return "-" if threads == 1 else ":"


def _widths(command: str) -> float:
    """The vCPU-scoped write is drawn broad, under the one that costs the same."""
    return 4.0 if command == WRITES[0].command else 1.6


def _lock_measured(axes: Any, measured: list[dict[str, Any]], command: str) -> None:
    for threads in sorted({at["threads"] for at in measured}):
        points = [at for at in measured if (at["write"], at["threads"]) == (command, threads)]
        x, style = [at["vcpus"] for at in points], {"color": _WRITE_COLOURS[command], "linewidth": _widths(command)}
        axes.plot(x, [at["p50"] / 1e6 for at in points], linestyle="none", marker=_marker(threads), **style)
        axes.plot(x, [at["modelled"] / 1e6 for at in points], linestyle=_dashes(threads), **style)


def _lock_modelled(axes: Any, model: list[dict[str, Any]], write: Write) -> None:
    most = max(at["vcpus"] for at in model)
    points = [at for at in model if (at["write"], at["vcpus"]) == (write.command, most)]
    axes.plot([at["threads"] for at in points], [at["modelled"] / 1e6 for at in points], marker="o",
              color=_WRITE_COLOURS[write.command], label=write.what, linewidth=_widths(write.command))
    if write.what.startswith("VM-scoped"):
        register = write.what.partition(": ")[2].split()[0]
        axes.axhline(points[0]["once"] / 1e6, color=_WRITE_COLOURS[write.command], linestyle="--", linewidth=0.9,
                     label=f"{register} once, instead of {most} times")
