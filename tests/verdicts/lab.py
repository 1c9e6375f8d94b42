"""Boots: every kernel saves once, then every kernel is given all the others' streams, all in one boot each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.lab import boot
from tests.lab.errors import LabError
from tests.lab.kernels import Kernel

TIME_LIMIT_S = 500.0
_INSIDE = ("python3", "-m", "tests.verdicts.inside")
_STREAMS = "lab/streams"

Say = Callable[[str], None]


def streams(kernels: Sequence[Kernel], folder: Path, say: Say) -> None:
    """Let each kernel save its guests into `folder` as `KERNEL+FEATURES.mig`."""
    for kernel in kernels:
        say(f"{kernel.name}: save")
        for file in _run(kernel, "save").files:
            (folder / f"{kernel.name}+{file.name.name}").write_bytes(file.data)


def answers(kernels: Sequence[Kernel], folder: Path, say: Say) -> None:
    """Give each kernel the streams of its architecture in `folder`; its answers go to `KERNEL.json` there."""
    for kernel in kernels:
        brought = {f"{_STREAMS}/{path.name}": path.read_bytes() for path in sorted(folder.glob(f"{kernel.arch}-*.mig"))}
        say(f"{kernel.name}: restore {len(brought)} streams")
        result = _run(kernel, "restore", *(f"/{name}" for name in brought), bring=brought)
        (folder / f"{kernel.name}.json").write_bytes(next(f.data for f in result.files if f.name.suffix == ".json"))


def load(kernel: Kernel, folder: Path) -> dict[str, Any]:
    """The answers of a kernel, by stream. Raises: LabError where there are none."""
    path = folder / f"{kernel.name}.json"
    if not path.is_file():
        raise LabError(f"no answers of {kernel.name} in {folder}; run without --from")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _run(kernel: Kernel, *words: str, bring: dict[str, bytes] | None = None) -> boot.Result:
    result = boot.run(kernel, [*_INSIDE, *words], time_limit_s=TIME_LIMIT_S, bring=bring or {})
    if result.status:
        raise LabError(f"{kernel.name}: {words[0]}: status {result.status}: "
                       f"{(result.stderr.decode(errors='replace').strip().splitlines() or ['no word'])[-1]}")
    return result
