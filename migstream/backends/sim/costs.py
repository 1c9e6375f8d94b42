"""Modelled time: what each primitive costs on a machine, and threads that meet at a VM-wide lock.

The numbers come from `python -m bench calibrate` on real KVM and are stored with that machine's description. A cost is
linear in the VM's vCPUs and in the registers of a batch; an *exclusive* primitive holds a lock of the VM for the part
of its cost that grows with vCPUs. `elapsed` is the discrete-event part. Nothing here reads a clock.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from migstream.errors import Corrupt, UsageError

CALIBRATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of one primitive in ns: `base + per_vcpu * vCPUs + per_register * registers`.

    Attributes:
        first: added for the first use by a thread, whose caches are cold.
        hold: of `base`, what is spent inside the VM-wide lock; the part that grows with vCPUs is inside it too.
            None where no lock was found: threads do it at the same time.
        parallel: how many times longer it takes while another thread does the same on another vCPU.
    """

    base: float
    per_vcpu: float = 0.0
    per_register: float = 0.0
    first: float = 0.0
    hold: float | None = None
    parallel: float = 1.0

    def total(self, vcpus: int, registers: int = 1) -> float:
        """ns of one use on a VM of so many vCPUs, alone."""
        return self.base + self.per_vcpu * vcpus + self.per_register * registers

    def held(self, vcpus: int) -> float:
        """ns of it inside the lock; 0 where there is none."""
        return 0.0 if self.hold is None else self.hold + self.per_vcpu * vcpus


@dataclass(frozen=True)
class Calibration:
    """Costs as measured on one machine.

    Attributes:
        machine: what it was: CPU, kernel, cores. costs: by `get NAME` or `set NAME` with the catalogue's name;
            `get MSRs` and `set MSRs` are batches. handoff: ns from one thread's unlock to the next one's lock.
        method: how it was measured, for people. points: vCPU counts that it was measured at.
    """

    machine: Mapping[str, Any]
    costs: Mapping[str, Cost]
    handoff: float
    method: str = ""
    points: tuple[int, ...] = ()

    def cost(self, name: str) -> Cost:
        """The cost of a primitive. Raises: UsageError where it was not measured."""
        try:
            return self.costs[name]
        except KeyError:
            raise UsageError(f"{name}: not in this calibration; measure it with `python -m bench calibrate`") from None

    def to_json(self) -> str:
        """As a file holds it; times in ns."""
        return json.dumps({"migstream_calibration": CALIBRATION_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote. Raises: Corrupt with the field."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _wrong("not a calibration: no JSON") from error
        if not isinstance(raw, dict) or "migstream_calibration" not in raw:
            raise _wrong("not a calibration: `python -m bench calibrate -o FILE` writes one")
        if raw.pop("migstream_calibration") != CALIBRATION_VERSION:
            raise _wrong("another version", "migstream_calibration")
        for name, (kind, what) in _KINDS.items():
            if not isinstance(raw.get(name), kind):
                raise _wrong(f"missing, or not {what}", name)
        if more := raw.keys() - _KINDS:
            raise _wrong("nothing of a calibration", min(more))
        _check("handoff", raw["handoff"])
        if not all(isinstance(point, int) for point in raw["points"]):
            raise _wrong("not whole numbers", "points")
        return cls(raw["machine"], {name: _cost(name, row) for name, row in raw["costs"].items()},
                   float(raw["handoff"]), raw["method"], tuple(raw["points"]))


_KINDS: dict[str, tuple[Any, str]] = {
    "machine": (dict, "an object"), "costs": (dict, "an object"), "handoff": ((int, float), "a number"),
    "method": (str, "text"), "points": (list, "a list")}
"""The fields of a calibration's file."""


def _wrong(what: str, field: str = "", found: object = "") -> Corrupt:
    return Corrupt(what, section="calibration", field=field, found=found)


def _cost(name: str, row: object) -> Cost:
    known = {item.name for item in fields(Cost)}
    if not isinstance(row, dict) or "base" not in row or not row.keys() <= known:
        raise _wrong(f"not a cost: an object with base, and any of {', '.join(sorted(known - {'base'}))}", name)
    for field, value in row.items():
        if value is not None or field != "hold":
            _check(f"{name}.{field}", value)
    return Cost(**row)


def _check(field: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise _wrong("a time that can't be", field, value)


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a thread's work: ns outside the VM-wide lock, then ns inside it."""

    free: float
    held: float


@dataclass(frozen=True)
class Work:
    """What one thread does: `first`, then `rows` times the same segments, each row ending with `tail` ns outside."""

    rows: int
    segments: tuple[Segment, ...] = ()
    tail: float = 0.0
    first: float = 0.0


def elapsed(threads: Sequence[Work], handoff: float) -> float:
    """ns until the last thread has done its work. All begin at 0; who asks for the lock first gets it first.

    Args:
        handoff: ns that a thread waits longer when it gets the lock from another.
    """
    if not any(work.segments for work in threads):
        return max((work.first + work.rows * work.tail for work in threads), default=0.0)
    plans = [_requests(work) for work in threads]
    waiting: list[tuple[float, int, float]] = []
    for number, plan in enumerate(plans):
        _ask(waiting, plan, number, 0.0)
    free_at, ended = 0.0, 0.0
    while waiting:
        asked, number, held = heapq.heappop(waiting)
        start = asked if asked >= free_at else free_at + handoff
        free_at = start + held
        ended = max(ended, _ask(waiting, plans[number], number, free_at))
    return ended


def _ask(waiting: list[tuple[float, int, float]], plan: Iterator[Segment], number: int, now: float) -> float:
    """Put a thread's next request for the lock into the queue; return when it has nothing more to do, else 0."""
    segment = next(plan)
    if segment.held < 0:
        return now + segment.free
    heapq.heappush(waiting, (now + segment.free, number, segment.held))
    return 0.0


def _requests(work: Work) -> Iterator[Segment]:
    """The thread's segments; the last one has a negative hold and is what it does after its last lock."""
    before = work.first
    for _ in range(work.rows):
        for segment in work.segments:
            yield Segment(before + segment.free, segment.held)
            before = 0.0
        before += work.tail
    yield Segment(before, -1.0)
