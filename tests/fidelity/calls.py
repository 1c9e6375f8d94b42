"""What the driver and a vocabulary agree on: calls, answers and stages, all of them plain data at the edges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from migstream.backends.base import Backend
from migstream.errors import BackendError, UsageError, errno_name
from migstream.host.profile import HostProfile
from migstream.model import Arch

Answer = Any
"""What a call gave, as JSON has it: numbers, text, lists and objects with text keys."""

Story = Sequence["Call"]
"""Calls in the order in which they are made on one stage."""


class Call(NamedTuple):
    """One call: the name of the stage's method without `do_`, and its arguments, which are plain data."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """The call as it can be pasted into a test."""
        given = "".join(f", {name}={_literal(value)}" for name, value in self.arguments.items())
        return f'call("{self.name}"{given})'


def call(name: str, /, **arguments: Any) -> Call:
    """A call as tests write it."""
    return Call(name, arguments)


def _literal(value: Any) -> str:
    """Large numbers are ids, masks and addresses: in hexadecimal."""
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple, dict)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, int):
        return hex(value) if value > 255 else str(value)
    return "[" + ", ".join(_literal(item) for item in value) + "]"


class Excluded(NamedTuple):
    """What is not compared: where it would be met, and why comparing it would be unfair."""

    what: str
    reason: str


class Stage:
    """One VM that calls are made on. A subclass has a method `do_NAME` for each call, which returns its answer."""

    def __init__(self, backend: Backend, profile: HostProfile) -> None:
        """`profile` is the recorded one on both sides, so that nothing depends on who is asked."""
        self.backend, self.profile = backend, profile

    def answer(self, made: Call) -> Answer:
        """Make a call. An error that the project knows is an answer; any other one is a bug and is raised."""
        try:
            return getattr(self, f"do_{made.name}")(**made.arguments)
        except BackendError as error:
            return {"error": f"{error.operation}: {errno_name(error.errno)}"}
        except UsageError as error:
            return {"usage": type(error).__name__}

    def close(self) -> None:
        """Destroy the VM."""


class Vocabulary(Protocol):
    """What is said to a kernel of one architecture."""

    arch: Arch
    excluded: tuple[Excluded, ...]

    def story(self, source: random.Random, profile: HostProfile, calls: int) -> list[Call]:
        """Make a sequence of this many calls, from the generator and the profile alone; the first ones build a VM.

        A sequence from which calls were taken away must still be playable: shrinking does that.
        """

    def stage(self, backend: Backend, profile: HostProfile) -> Stage:
        """A fresh stage."""
