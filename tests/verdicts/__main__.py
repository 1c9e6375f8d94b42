"""The command line: saves on each lab kernel, restores on each other one, and holds `check` against what they say.

Exit status: 0 where every answer was as predicted; 1 where one was not; 125 where the lab failed.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from migstream.host import profiles
from tests.lab import kernels
from tests.lab.errors import LabError
from tests.verdicts import compare, lab

SETS = {"arm64": ("plain", "all"), "x86_64": ("plain",)}
_SHOWN = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="migstream-verdicts-") as room:
            folder = options.folder or options.recorded or Path(room)
            folder.mkdir(parents=True, exist_ok=True)
            return max(run(wanted(options, arch, folder), boots=options.recorded is None)
                       for arch in ([options.arch] if options.arch else SETS))
    except LabError as error:
        print(f"verdicts: {error}", file=sys.stderr)
        return error.status


def wanted(options: argparse.Namespace, arch: str, folder: Path) -> lab.Wanted:
    """What the options ask for. Raises: LabError for a kernel or set that there is not."""
    named = [kernels.kernel(arch, version) for version in options.kernels.split(",")] if options.kernels \
        else kernels.select(arch)
    if len(named) < 2:
        raise LabError(f"two kernels or more; {', '.join(kernel.name for kernel in named)} has nowhere to go")
    sets = [word for word in options.features.split(",") if word] or SETS[arch]
    if unknown := sorted({*sets} - {*SETS[arch]}):
        raise LabError(f"no set of features {unknown[0]!r} on {arch}; there are {', '.join(SETS[arch])}")
    baseline = baseline_of(named) if arch == "arm64" else ""
    return lab.Wanted(tuple(named), tuple(sets), options.seed, options.forged, folder, baseline)


def baseline_of(named: Sequence[kernels.Kernel]) -> str:
    """The contract that guests which travel everywhere are started under: all but what no value would do for."""
    from migstream.contract import to_json
    from migstream.host.baseline import baseline

    hosts = {kernel.name: profiles.load(kernel.name) for kernel in named}
    refused = baseline(hosts).refusals
    for line in refused:
        print(f"not in the baseline: {line}")
    found = baseline(hosts, free=[line.partition(": ")[0] for line in refused])
    return to_json(found.contract)


def run(want: lab.Wanted, boots: bool = True) -> int:
    """Boot (or take what is in the folder), compare, print; the exit status."""
    print(f"seed {want.seed}; {', '.join(kernel.name for kernel in want.kernels)}; features {', '.join(want.sets)}; "
          f"each stream as saved and {want.forged} times forged", flush=True)
    if boots:
        lab.all_boots(want, lambda line: print(line, flush=True))
    outcomes = collect(want)
    _print(compare.table((name, one) for name, one in outcomes.items()))
    total = compare.Outcome()
    for name, one in outcomes.items():
        for line in one.differences[:_SHOWN]:
            print(f"{name}: {line}")
        total.add(one)
    for reason, number in total.unknown.most_common(_SHOWN):
        print(f"not predicted, {number}: {reason}")
    print(f"{total.answers} answers, {total.restores} restores, {total.eyes} questions asked twice by guests "
          f"({total.told} with another answer, as check had said): {len(total.differences)} differences")
    return 1 if total.differences else 0


def collect(want: lab.Wanted) -> dict[str, compare.Outcome]:
    """What came of each ordered pair, by its name. Raises: LabError where a kernel answered nothing."""
    outcomes: dict[str, compare.Outcome] = {}
    for target in want.kernels:
        said = lab.load(want.folder, target.name)
        for stream in sorted(said):
            source, _, _ = stream.partition("+")
            one = compare.pair(want.folder / f"{stream}.mig", profiles.load(target.name), said[stream])
            one.differences = [f"{stream.partition('+')[2]}: {line}" for line in one.differences]
            outcomes.setdefault(f"{source} -> {target.version}", compare.Outcome()).add(one)
    return dict(sorted(outcomes.items()))


def _print(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) if place else cell.ljust(width)
                        for place, (cell, width) in enumerate(zip(row, widths, strict=True))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.verdicts", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=[*SETS], help="only this architecture")
    parser.add_argument("--kernels", default="", metavar="A,B", help="of one architecture, as in 5.10,7.2")
    parser.add_argument("--features", default="", metavar="A,B", help="sets of vCPU features: plain, all")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="what guests and forgeries are varied by (new)")
    parser.add_argument("--forged", type=int, default=8, metavar="N", help="forgeries of each stream (8)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep streams and answers there")
    parser.add_argument("--from", dest="recorded", type=Path, metavar="DIR", help="boot nothing: answers kept there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
