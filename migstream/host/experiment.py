"""Experiments on registers of a scratch VM: which bits can be written, whose register it is, what a run ends.

A register's id and size are all that is known of it here. Every trial puts back what it found.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from migstream.model import Klass
from migstream.registers.catalogue import lookup, must_have

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile
    from migstream.host.scratch import Scratch

VCPUS = 3
"""vCPUs of the scope experiment: one that writes, one that answers, and one that only looks on."""

_WIDE = 16
"""Bytes: of a longer register no single bits are tried; no kernel treats the bits of vectors differently."""

_DRIFT_BITS = 40
"""A running clock may have gone on by less than that many bits say between a write and a read; at 1 GHz, 18 minutes.
Flips of lower bits could not be told from that, so they are not tried one at a time."""

_ALL = (1 << 8 * 2048) - 1
_CLOCK_PATTERNS = (0x5555_5555_5555_5555, 0xAAAA_AAAA_AAAA_AAAA)
"""All bits in two writes, far from the old value both; all bits at once are -1 - value, near it for a small one."""

_TICK_S = 0.001
_ENOUGH = VCPUS + 1
"""Values that work: one more than vCPUs, so that one is no vCPU's own."""

_RUN_S = 0.02


@dataclass(frozen=True, slots=True)
class Trial:
    """What a register does with values other than its own.

    Attributes:
        before: the value that it had. works: other values that read back as written, a few; none where none was found.
        taken: bits that a write may flip. kept: of these, the ones that read back flipped.
        errnos: of the refused writes. odd: a value that was taken and what it read back as, where that differs.
        runs: whether it is a clock that goes on by itself.
    """

    before: bytes
    works: tuple[bytes, ...] = ()
    taken: int = 0
    kept: int = 0
    errnos: frozenset[int] = frozenset()
    odd: tuple[bytes, bytes] | None = None
    runs: bool = False


OTHER_VALUES: tuple[tuple[Callable[[int], int], str], ...] = (
    (lambda v: 0, "a level: none"),
    (lambda v: v - 1, "the level below"),
    (lambda v: v + 1, "the level above"),
    (lambda v: 2, "PSCI 0.2: taken on every kernel for a vCPU with the feature PSCI_0_2, and no bit flip from 1.0"),
)
"""(value to try, reason) where no single bit sticks, tried in order."""


def try_bits(scratch: Scratch, id: int, size: int, vcpu: int = 0) -> Trial:
    """Flip the bits of a register and see what sticks: all at once, then one at a time where that didn't."""
    before = scratch.read(id, size, vcpu)
    assert isinstance(before, bytes)
    one = _Bits(scratch, id, vcpu, before, _runs(scratch, id, before, vcpu))
    for pattern in _CLOCK_PATTERNS if one.runs else (_ALL,):
        one.flip(pattern & (1 << 8 * size) - 1)
    if not one.works and size <= _WIDE:
        one.forget()
        for bit in range(_DRIFT_BITS + 1 if one.runs else 0, 8 * size):
            one.flip(1 << bit)
    if not one.works and not one.runs:
        one.other_values()
    return Trial(before, tuple(one.works), one.taken, one.kept, frozenset(one.errnos), one.odd, one.runs)


def _runs(scratch: Scratch, id: int, before: bytes, vcpu: int) -> bool:
    """Whether the register changes by itself; only of a clock that is waited for."""
    if lookup(id).klass == Klass.CLOCK:
        time.sleep(_TICK_S)
    return scratch.read(id, len(before), vcpu) != before


class _Bits:
    """One register while its bits are tried."""

    def __init__(self, scratch: Scratch, id: int, vcpu: int, before: bytes, runs: bool) -> None:
        self.scratch, self.id, self.vcpu, self.before, self.runs = scratch, id, vcpu, before, runs
        self.number = int.from_bytes(before, "little")
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.works: list[bytes] = []
        self.odd: tuple[bytes, bytes] | None = None
        self.taken = self.kept = 0
        self.errnos: set[int] = set()

    def flip(self, bits: int) -> None:
        """Write the value with these bits flipped."""
        back = self._through(self.number ^ bits)
        if back is not None:
            self.taken |= bits
            self.kept |= bits & ~(int.from_bytes(back, "little") ^ self.number ^ bits)

    def other_values(self) -> None:
        """Try values that are no bit flip."""
        for make, _ in OTHER_VALUES:
            value = make(self.number) & (1 << 8 * len(self.before)) - 1
            if value != self.number:
                self._through(value)

    def _through(self, number: int) -> bytes | None:
        """Write a value, read it back, put the old one back; None where it is refused. Clocks seem to stand still."""
        value = number.to_bytes(len(self.before), "little")
        if no := self.scratch.write(self.id, value, self.vcpu):
            self.errnos.add(no)
            return None
        back = self.scratch.read(self.id, len(value), self.vcpu)
        back = back if isinstance(back, bytes) else self.before
        self.scratch.write(self.id, self.before, self.vcpu)
        if same(value, back, self.runs):
            self.works[_ENOUGH - 1:] = [value]  # the first few and the last: high bits may be another field
            return value
        self.odd = self.odd or (value, back)
        return back


def same(written: bytes, read: bytes, runs: bool = False) -> bool:
    """Whether a value reads back as written; a running clock may have gone on a little."""
    if not runs:
        return written == read
    return (int.from_bytes(read, "little") - int.from_bytes(written, "little")) % (1 << 64) >> _DRIFT_BITS == 0


@dataclass(frozen=True, slots=True)
class Found:
    """A register's scope (`vm`, `vcpu` or `fixed`) and how it was found, in words."""

    scope: str
    how: str


def scopes(scratch: Scratch, trials: Mapping[int, Trial]) -> dict[int, Found]:
    """Write through one vCPU, read through the others; then write through another, read through the first."""
    return {id: _possible(id, _scope(scratch, id, trial)) for id, trial in trials.items()}


def _possible(id: int, found: Found) -> Found:
    """The catalogue's scope where no stream may have another: what was found instead stays in the words."""
    own = must_have(id)
    if found.scope == "fixed" or own in (None, found.scope):
        return found
    return Found(str(own), f"as on every other kernel, though by experiment {found.scope}: {found.how}")


def _scope(scratch: Scratch, id: int, trial: Trial) -> Found:
    before = [scratch.read(id, len(trial.before), vcpu) for vcpu in range(scratch.vcpus)]
    values = [value if isinstance(value, bytes) else trial.before for value in before]
    if not trial.works:
        return Found("fixed", _fixed(values, trial.runs))
    news = [value for value in trial.works if value not in values]
    if not news:
        return Found("vcpu", "each vCPU has a value of its own")
    found = []
    for value in news:
        found.append(_seen(scratch, id, (value, values[1]), trial.runs))
        for vcpu, old in enumerate(values):
            scratch.write(id, old, vcpu)
    return found[0] if len(set(found)) == 1 else PARTLY


PARTLY = Found("vcpu", "some bits are read through other vCPUs, too, and some are not: each vCPU has to be written")


def _fixed(values: list[bytes], runs: bool) -> str:
    alike = all(same(values[0], value, runs) for value in values)
    return f"no other value sticks; {'the same' if alike else 'a different one'} on each vCPU"


def _seen(scratch: Scratch, id: int, news: tuple[bytes, bytes], runs: bool) -> Found:
    """Write the first value through vCPU 0, then the second through vCPU 1, and see who reads what.

    What was there before is read anew: a register that only sets or clears bits can't be put back.
    """
    def reads(vcpu: int) -> bytes:
        value = scratch.read(id, len(news[0]), vcpu)
        return value if isinstance(value, bytes) else b""

    before = [reads(vcpu) for vcpu in range(1, scratch.vcpus)]
    if scratch.write(id, news[0], 0):
        return Found("vcpu", "taken on vCPU 0 before and refused now: not shown to be shared")
    there = {_which(reads(vcpu), news[0], before[vcpu - 1], runs) for vcpu in range(1, scratch.vcpus)}
    own = reads(0)
    back = "old" if scratch.write(id, news[1], 1) else _which(reads(0), news[1], own, runs)
    return _JUDGED.get((there.pop() if len(there) == 1 else "", back), PARTLY)


def _which(value: bytes, new: bytes, old: bytes, runs: bool) -> str:
    """`new` or `old`, or "" for neither."""
    return "new" if same(new, value, runs) else "old" if same(old, value, runs) else ""


_JUDGED = {
    ("new", "new"): Found("vm", "written through vCPU 0, read through all others; then the other way round"),
    ("old", "old"): Found("vcpu", "written through vCPU 0, not read through any other; nor the other way round"),
}
"""By what the other vCPUs read after a write through vCPU 0, and what that reads after one through vCPU 1."""


@dataclass(frozen=True, slots=True)
class AfterRun:
    """What a run ended.

    Attributes:
        errnos: by register id: errno of writing another value, errno of writing the same one; 0 = taken.
        entering_is_running: a KVM_RUN that leaves before the first instruction ended the same; None where no
            register can tell, or the backend can't do that.
    """

    errnos: dict[int, tuple[int, int]]
    entering_is_running: bool | None = None


def after_run(scratch: Scratch, trials: Mapping[int, Trial], enter: bool = False) -> AfterRun:
    """Run the vCPUs, and write again what could be written before; through the last vCPU, `enter` through another."""
    wanted = {id: trial for id, trial in trials.items() if trial.works}
    entered = {}
    if enter:
        scratch.vm.enter(0)
        entered = _writes(scratch, wanted)
    scratch.vm.start()
    time.sleep(_RUN_S)
    scratch.vm.pause()
    errnos = _writes(scratch, wanted)
    tells = [id for id, pair in errnos.items() if pair[0]]
    return AfterRun(errnos, all(entered[id] == errnos[id] for id in tells) if enter and tells else None)


def _writes(scratch: Scratch, trials: Mapping[int, Trial]) -> dict[int, tuple[int, int]]:
    return {id: pair for id, trial in trials.items() if (pair := _write(scratch, id, trial, scratch.vcpus - 1))}


def _write(scratch: Scratch, id: int, trial: Trial, vcpu: int) -> tuple[int, int] | None:
    now = scratch.read(id, len(trial.before), vcpu)
    if not isinstance(now, bytes):
        return None
    same_value = scratch.write(id, now, vcpu)
    other = scratch.write(id, next(value for value in (*trial.works, trial.before) if value != now), vcpu)
    scratch.write(id, now, vcpu)
    return other, same_value


UNTRIED: dict[str, Any] = {
    name: {} for name in ("scopes", "scope_found", "register_bits", "bit_errnos", "readback", "after_run")}
"""What `recorded` fills. A simulated host's profile has it already, which must not pass for found."""


def recorded(profile: HostProfile, trials: Mapping[int, Trial], found: Mapping[int, Found],
             after: Mapping[int, tuple[int, int]]) -> HostProfile:
    """The profile with what the experiments found added to it."""
    return dataclasses.replace(
        profile, after_run={**profile.after_run, **after},
        register_bits={**profile.register_bits, **{id: bits_of(trial) for id, trial in trials.items()}},
        bit_errnos={**profile.bit_errnos, **{id: tuple(sorted(t.errnos)) for id, t in trials.items() if t.errnos}},
        readback={**profile.readback, **{id: t.odd for id, t in trials.items() if t.odd}},
        scopes={**profile.scopes, **{id: one.scope for id, one in found.items()}},
        scope_found={**profile.scope_found, **{id: one.how for id, one in found.items()}})


def bits_of(trial: Trial) -> tuple[bytes, bytes]:
    """Bits that are taken and bits that are kept, as long as the register."""
    size = len(trial.before)
    return trial.taken.to_bytes(size, "little"), trial.kept.to_bytes(size, "little")
