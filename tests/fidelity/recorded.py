"""A divergence as a test: a row of `test_recorded` or `test_recorded_arm64`, and its text, which is Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migstream.model import Arch
from tests.fidelity import driver
from tests.fidelity.calls import Answer, Call

FILES = {Arch.X86_64: "tests/fidelity/test_recorded.py", Arch.ARM64: "tests/fidelity/test_recorded_arm64.py"}
"""Where the rows of an architecture stand, in `ROWS`."""

MOST_COMMENTS = 20
"""Differences that are said in words; the row itself has all."""


WHOLE = ""
"""The key of an answer as a whole: not all are objects."""


@dataclass(frozen=True)
class Recorded:
    """What kernels answer to the last of these calls: parts of the answer, by key, by `value.WORD`, or `WHOLE`."""

    kernels: tuple[str, ...]
    calls: tuple[Call, ...]
    expected: dict[str, Any]
    why: str


def holds(answer: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """The expected parts of an answer."""
    return {key: answer if key == WHOLE else _part(answer, key) for key in expected}


def _part(answer: Any, key: str) -> Any:
    """None where there is none."""
    for name in ("value", key.removeprefix("value.")) if key.startswith("value.") else (key,):
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer


def recorded(found: driver.Divergence, kernel: str, seed: int) -> Recorded:
    """The row that the simulator fails as long as the divergence is there: the kernel's answer where it differs."""
    return Recorded((kernel,), found.story, _expected(found.real, found.simulated),
                    f"seed {seed}, sequence {found.index}")


def _expected(real: Answer, simulated: Answer) -> dict[str, Any]:
    """The parts that differ; None for what the kernel's answer has not."""
    if not isinstance(real, dict) or not isinstance(simulated, dict):
        return {WHOLE: real}
    parts: dict[str, Any] = {}
    for key in sorted(real.keys() | simulated.keys()):
        here, there = real.get(key), simulated.get(key)
        if here == there:
            continue
        if key == "value" and isinstance(here, dict) and isinstance(there, dict):
            parts |= {f"value.{word}": here.get(word) for word in sorted(here.keys() | there.keys())
                      if here.get(word) != there.get(word)}
        else:
            parts[key] = here
    return parts


def pasteable(found: driver.Divergence, kernel: str, arch: Arch, seed: int) -> str:
    """The divergence as a row that runs on the simulator alone, whole, with what differs as comments."""
    row = recorded(found, kernel, seed)
    comments = driver.difference(found.real, found.simulated)
    lines = [f"# {kernel}, seed {seed}, sequence {found.index}: a row for ROWS in {FILES[arch]}",
             *(f"#   {line}" for line in comments[:MOST_COMMENTS])]
    if len(comments) > MOST_COMMENTS:
        lines.append(f"#   and {len(comments) - MOST_COMMENTS} more")
    calls = [f"    {made}," for made in row.calls]
    return "\n".join((*lines, f"Recorded({row.kernels!r}, (", *calls, f"), {row.expected!r},", f"    {row.why!r}),"))


def not_shown(indices: Sequence[int], shown: int) -> str:
    """A comment about the divergences beyond those that were made short; "" for none."""
    rest = indices[shown:]
    if not rest:
        return ""
    more = "divergence is" if len(rest) == 1 else "divergences are"
    named = ", ".join(map(str, rest[:MOST_COMMENTS])) + (", …" if len(rest) > MOST_COMMENTS else "")
    return f"\n# {len(rest)} more {more} not shown: sequence {named}"
