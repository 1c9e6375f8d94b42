"""Plays sequences, compares answers, and makes a sequence that diverges as short as it gets. No architecture here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from migstream.backends.base import Backend
from migstream.host.profile import HostProfile
from tests.fidelity.calls import Answer, Call, Story, Vocabulary


@dataclass(frozen=True)
class Divergence:
    """Where two backends part: the sequence up to there, and the last call's two answers."""

    index: int
    story: tuple[Call, ...]
    real: Answer
    simulated: Answer


def story(words: Vocabulary, profile: HostProfile, seed: int, index: int, calls: int) -> list[Call]:
    """Sequence `index` of a seed: the same everywhere, and independent of the others."""
    return words.story(random.Random(f"{seed}/{index}"), profile, calls)


def play(words: Vocabulary, backend: Backend, profile: HostProfile, calls: Story) -> Iterator[Answer]:
    """Make the calls on a fresh stage, and give each answer as JSON would bring it."""
    stage = words.stage(backend, profile)
    try:
        for made in calls:
            yield json.loads(json.dumps(stage.answer(made)))
    finally:
        stage.close()


def diverges(words: Vocabulary, simulator: Backend, profile: HostProfile, calls: Story, real: Iterator[Answer],
             index: int = 0) -> Divergence | None:
    """The first call that the simulator answers otherwise than the given answers of a real kernel; None for none."""
    simulated = play(words, simulator, profile, calls)
    for number, (expected, found) in enumerate(zip(real, simulated, strict=True)):
        if expected != found:
            return Divergence(index, tuple(calls[:number + 1]), expected, found)
    return None


Check = Callable[[Story], Divergence | None]


def shrink(found: Divergence, check: Check) -> Divergence:
    """The shortest sequence near this one that diverges: calls are left out, then parts of calls."""
    while True:
        shorter = _once(found, check)
        if shorter is None:
            return found
        found = shorter


def _once(found: Divergence, check: Check) -> Divergence | None:
    size = len(found.story) // 2
    while size:
        for start in range(0, len(found.story) - size, size):
            if shorter := check((*found.story[:start], *found.story[start + size:])):
                return shorter
        size //= 2
    return _smaller_calls(found, check)


def _smaller_calls(found: Divergence, check: Check) -> Divergence | None:
    for number, made in enumerate(found.story):
        for smaller in _less(made):
            if same := check((*found.story[:number], smaller, *found.story[number + 1:])):
                return same
    return None


def _less(made: Call) -> Iterator[Call]:
    """The call with one element less in one of its lists, or one entry less in one of its objects."""
    for name, value in made.arguments.items():
        for shorter in _shorter(value):
            yield Call(made.name, {**made.arguments, name: shorter})


def _shorter(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from ({k: v for k, v in value.items() if k != gone} for gone in value)
    elif isinstance(value, (list, tuple)):
        yield from ([*value[:n], *value[n + 1:]] for n in range(len(value)))


def difference(real: Answer, simulated: Answer) -> list[str]:
    """Where two answers differ, a line each."""
    return list(_differences("", real, simulated))


def _differences(path: str, real: Answer, simulated: Answer) -> Iterator[str]:
    if isinstance(real, dict) and isinstance(simulated, dict):
        for key in sorted(real.keys() | simulated.keys()):
            yield from _differences(f"{path}.{key}".lstrip("."), real.get(key), simulated.get(key))
    elif real != simulated:
        yield f"{path or 'answer'}: real {json.dumps(real)}, simulated {json.dumps(simulated)}"
