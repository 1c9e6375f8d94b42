"""The operator's say: which verdicts are overruled, register by register, each with a reason. Never from a stream.

    migstream_policy = 1

    [[tolerate]]                         # go on although the guest would notice, or the target refuses
    register = "ID_AA64DFR0_EL1"         # a name, a glob, or a list of them
    reason = "no guest of ours reads PMUVer without a PMU"
    guest_notices = true                 # has to be said where it is so

    [[clamp]]                            # write the nearest value that the target takes
    [[ignore]]                           # write nothing: the target's own value stays
    [[require]]                          # as saved, and nothing else: whatever the rules would let pass
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from migstream import filekind
from migstream.errors import DocumentError, DocumentLimit, MigstreamError, printable
from migstream.limits import MAX_POLICY, MAX_POLICY_NAMES
from migstream.model import Klass
from migstream.registers import arm64, gic, x86_64
from migstream.registers.catalogue import lookup
from migstream.registers.msrs import MSRS
from migstream.verdicts import id_fields
from migstream.verdicts.facts import Case, NotYet, Pair
from migstream.verdicts.model import Answer, Kernel, Overruled, Verdict

POLICY_VERSION = 1
_NUMBER_BYTES = 8
VERBS = ("tolerate", "clamp", "ignore", "require")
STRICTEST_FIRST = ("require", "ignore", "clamp", "tolerate")
_ROW_FIELDS = {"register", "reason", "guest_notices"}


class PolicyError(MigstreamError):
    """A policy would let a guest notice something and does not say so."""

    exit_status = 4


@dataclass(frozen=True)
class Clause:
    """One row of a policy: what, for which registers (globs), why, and whether a guest may notice."""

    verb: str
    registers: tuple[str, ...]
    reason: str
    guest_notices: bool = False

    def names(self, register: str) -> bool:
        """Whether the row is about a register of this name."""
        return self._pattern.match(register) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """All globs of the row as one."""
        return re.compile("|".join(map(fnmatch.translate, self.registers)))


@dataclass(frozen=True)
class Policy:
    """Rows in the file's order; of one verb's the first that names a register counts, of several verbs the strictest.

    Attributes:
        name: of the file, for errors.
    """

    clauses: tuple[Clause, ...] = ()
    name: str = "policy"

    def apply(self, pair: Pair, verdict: Verdict) -> Verdict:
        """Return the verdict as the policy wants it, with `overruled` where that is another. Raises: PolicyError."""
        if not self.clauses:
            return verdict
        for verb in STRICTEST_FIRST:
            clause = next((c for c in self.clauses if c.verb == verb and c.names(verdict.name)), None)
            if clause is not None:
                changed = _APPLY[verb](pair, verdict, clause)
                if changed is not verdict:
                    return replace(self._checked(changed, clause),
                                   overruled=Overruled(verb, clause.reason, verdict.answer))
        return verdict

    def _checked(self, verdict: Verdict, clause: Clause) -> Verdict:
        if verdict.loses and not clause.guest_notices:
            raise PolicyError(f"{self.name}: {clause.verb} {verdict.name}: a guest would notice: {verdict.reason}; "
                              "say guest_notices = true in the row, or take it out")
        return verdict


def _require(pair: Pair, verdict: Verdict, clause: Clause) -> Verdict:
    if verdict.answer == Answer.FITS:
        return verdict
    return replace(verdict, answer=Answer.REFUSED, target=None, value=None,
                   reason=f"the policy requires it as saved; it is: {str(verdict).removeprefix(f'{verdict.name}: ')}")


def _ignore(pair: Pair, verdict: Verdict, clause: Clause) -> Verdict:
    """Nothing is written. The guest would notice where the target's own value is another, or nobody knows."""
    case = Case(pair, verdict.slot)
    try:
        same = case.default is not None and case.known.only(case.default)
    except NotYet:
        same = False
    if verdict.target is None and verdict.answer == Answer.HARMLESS:
        return verdict
    if same:
        return replace(verdict, answer=Answer.HARMLESS, target=None, value=None, pending=False,
                       reason="a fresh VM here has the same value")
    stays = "the target's own clock goes on" if case.row.klass == Klass.CLOCK else "the target's own value stays"
    return replace(verdict, answer=Answer.NOTICED, target=None, value=None, tolerated=clause.reason, pending=False,
                   reason=verdict.reason or stays)


def _clamp(pair: Pair, verdict: Verdict, clause: Clause) -> Verdict:
    """The nearest value that the target takes: of an ID register field by field, else the host's own.

    Of a structure (KVM_CPUID2) nothing is nearest, and of a value that the target takes as it is: they stay as judged.
    """
    if not verdict.stands_in_the_way or verdict.pending or verdict.slot.size > _NUMBER_BYTES:
        return verdict
    case = Case(pair, verdict.slot)
    nearest = id_fields.nearest(case) if case.fields and case.listed else case.default
    if nearest is None or not case.listed or case.known.only(nearest):
        return verdict
    value = nearest.to_bytes(verdict.slot.size, "little")
    return replace(verdict, answer=Answer.NOTICED, target=verdict.slot, value=value, tolerated=clause.reason,
                   reason=f"{verdict.reason}; written as {nearest:#x}")


def _tolerate(pair: Pair, verdict: Verdict, clause: Clause) -> Verdict:
    if not verdict.stands_in_the_way:
        return verdict
    written = verdict.target if verdict.kernel in (Kernel.TAKES, Kernel.DROPS) else None
    return replace(verdict, answer=Answer.NOTICED, target=written, tolerated=clause.reason)


_APPLY = {"require": _require, "ignore": _ignore, "clamp": _clamp, "tolerate": _tolerate}


# Reading the file.


def parse(text: str, name: str = "policy") -> Policy:
    """Return the policy in TOML text. Raises: DocumentError and below naming `name`, the row and the field."""
    if len(text) > MAX_POLICY:
        raise DocumentLimit(f"{name}: not a policy: over {MAX_POLICY} bytes")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DocumentError(f"{name}: not a policy: not TOML: {printable(error)}") from error
    version = data.pop("migstream_policy", None)
    if version is None:
        raise DocumentError(f"{name}: not a policy: no migstream_policy = {POLICY_VERSION}")
    filekind.check_version(name, "policy", version, POLICY_VERSION)
    if unknown := sorted(data.keys() - {*VERBS}):
        raise DocumentError(f"{name}: unknown word {printable(repr(unknown[0]))}; there are {', '.join(VERBS)}")
    clauses = tuple(_clause(name, verb, row) for verb in VERBS for row in _rows(name, verb, data))
    if (count := sum(len(clause.registers) for clause in clauses)) > MAX_POLICY_NAMES:
        raise DocumentLimit(f"{name}: {count} names and globs; at most {MAX_POLICY_NAMES}")
    for clause in clauses:
        for glob in clause.registers:
            if not _is_known(glob):
                raise DocumentError(f"{name}: [[{clause.verb}]]: no register is called {printable(repr(glob))}"
                                    f"{_meant(glob)}")
    _none_shadowed(name, clauses)
    return Policy(clauses, name)


def _meant(glob: str) -> str:
    """What somebody may have meant who wrote this."""
    register, dot, _ = glob.partition(".")
    if dot and _is_known(register):
        return f": a policy is about whole registers ({register}), not about fields"
    nearest = difflib.get_close_matches(glob[:_LONGEST_NAME].upper(), known_names(), 1)
    return f"; nearest is {nearest[0]}" if nearest else ""


_LONGEST_NAME = 100


def _none_shadowed(name: str, clauses: Sequence[Clause]) -> None:
    """Of one verb the first row that names a register counts. Raises: DocumentError for one that never does."""
    for k, clause in enumerate(clauses):
        earlier = [other for other in clauses[:k] if other.verb == clause.verb]
        for glob in clause.registers:
            if any(glob in other.registers or (glob in known_names() and other.names(glob)) for other in earlier):
                raise DocumentError(f"{name}: [[{clause.verb}]] {printable(glob)}: an earlier [[{clause.verb}]] row is "
                                    "about it already")


def _is_known(glob: str) -> bool:
    return glob in known_names() or any(map(re.compile(fnmatch.translate(glob)).match, known_names()))


def _rows(name: str, verb: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows = data.get(verb, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DocumentError(f"{name}: {verb}: rows are written [[{verb}]]")
    yield from rows


def _clause(name: str, verb: str, row: dict[str, Any]) -> Clause:
    where = f"{name}: [[{verb}]]"
    if unknown := sorted(row.keys() - _ROW_FIELDS):
        raise DocumentError(f"{where}: unknown field {printable(repr(unknown[0]))}; there are register, reason, "
                         "guest_notices")
    registers = row.get("register")
    globs = [registers] if isinstance(registers, str) else registers
    if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) for glob in globs):
        raise DocumentError(f"{where}: register: expected a name, a glob, or a list of them")
    reason, notices = row.get("reason"), row.get("guest_notices", False)
    if not isinstance(reason, str) or not reason.strip():
        raise DocumentError(f"{where} {printable(globs[0])}: no reason; every row of a policy has one")
    if not isinstance(notices, bool):
        raise DocumentError(f"{where} {printable(globs[0])}: guest_notices: expected true or false")
    return Clause(verb, tuple(globs), reason.strip(), notices)


NO_POLICY = Policy()
"""Nothing is overruled."""


@cache
def known_names() -> frozenset[str]:
    """Names of all registers of the catalogue, of both architectures."""
    lines = (lookup(id).name for id in gic.LINES)
    return frozenset({*(row.name for row in (*arm64.ROWS, *x86_64.ROWS)), *(row.name for row in MSRS), *lines,
                      *gic.names()})
