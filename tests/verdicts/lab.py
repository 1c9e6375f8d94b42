"""Boots: every kernel saves once, then every kernel is given all the others' streams: two boots a kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import boot
from tests.lab.errors import LabError
from tests.lab.kernels import Kernel

TIME_LIMIT_S = 570.0
_INSIDE = ("python3", "-m", "tests.verdicts.inside")
_STREAMS, _BASELINE = "lab/streams", "lab/baseline.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be tried: kernels of one architecture, sets of vCPU features, a seed, how often streams are forged.

    `folder` keeps streams and answers; `baseline` is a contract's text, "" for none.
    """

    kernels: tuple[Kernel, ...]
    sets: tuple[str, ...]
    seed: str
    forged: int
    folder: Path
    baseline: str = ""


def save(wanted: Wanted, kernel: Kernel, say: Say) -> None:
    """Let a kernel save its guests into the folder as `KERNEL+GUEST.mig`."""
    bring = {_BASELINE: wanted.baseline.encode()} if wanted.baseline else {}
    result = _run(kernel, say, "save", wanted.seed, ",".join(wanted.sets), *(f"/{name}" for name in bring), bring=bring)
    for name, data in result.items():
        if name.endswith(".mig"):
            (wanted.folder / f"{kernel.name}+{name}").write_bytes(data)
    (wanted.folder / f"{kernel.name}-saved.json").write_bytes(result["answers.json"])


def restore(wanted: Wanted, kernel: Kernel, say: Say, chain: str = "") -> None:
    """Give a kernel the other kernels' streams; its answers go to `KERNEL.json`.

    `chain`: the kernel where the guest that is on a journey is now, "" for none.
    """
    brought = {}
    for other in wanted.kernels:
        for path in sorted(wanted.folder.glob(f"{other.name}+*.mig")) if other != kernel else ():
            if "eyes-chain" not in path.name or other.name == chain:
                brought[f"{_STREAMS}/{path.name}"] = path.read_bytes()
    result = _run(kernel, say, "restore", wanted.seed, str(wanted.forged), *(f"/{name}" for name in brought),
                  bring=brought)
    (wanted.folder / f"{kernel.name}.json").write_bytes(result["answers.json"])
    arrived = wanted.folder / f"{kernel.name}+eyes-chain.mig"
    if "eyes-chain.mig" in result and not arrived.exists():  # where the journey began, what left is what is kept
        arrived.write_bytes(result["eyes-chain.mig"])


def all_boots(wanted: Wanted, say: Say) -> None:
    """Save everywhere, then restore everywhere, the first kernel last: there the journey ends where it began."""
    for kernel in wanted.kernels:
        save(wanted, kernel, say)
    (first, *others), place = wanted.kernels, wanted.kernels[0]
    for kernel in (*others, first):
        restore(wanted, kernel, say, place.name if wanted.baseline else "")
        place = kernel


def load(folder: Path, name: str) -> dict[str, Any]:
    """Answers that a boot left in the folder. Raises: LabError where there are none."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise LabError(f"no answers of {name} in {folder}; run without --from")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _run(kernel: Kernel, say: Say, *words: str, bring: dict[str, bytes]) -> dict[str, bytes]:
    result = boot.run(kernel, [*_INSIDE, *words], time_limit_s=TIME_LIMIT_S, bring=bring)
    say(f"{kernel.name}: {words[0]}: {result.total_s:.0f} s, {result.boot_s:.0f} s of them until it was ready")
    if result.status:
        raise LabError(f"{kernel.name}: {words[0]}: status {result.status}: "
                       f"{(result.stderr.decode(errors='replace').strip().splitlines() or ['no word'])[-1]}")
    return {file.name.name: file.data for file in result.files}
