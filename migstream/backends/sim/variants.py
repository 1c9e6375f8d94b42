"""Kernels that nobody has yet: optional rules on a recorded profile, by name: `sim:x86_64-7.2+evmcs=6.1`.

A rule makes a profile of a profile, before the simulator is made. What a rule changes in behaviour it writes into
`HostProfile.behaviour`, where the tables of rules look for it; so a kernel stays data, whatever its name. Each
architecture has its own table of rules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from migstream.errors import BackendUnavailable, UsageError
from migstream.model import Arch

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

MARK = "+"
"""What stands before each rule in a kernel's name."""


Subject = tuple[object, ...]
"""What a rule is about. Two rules contradict each other where one's is the beginning of the other's, or the same."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An optional rule.

    Attributes:
        name: as in a kernel's name, up to its argument. argument: what the argument is, as shown to people; "" for a
            rule without one. pattern: what the argument may look like (`re.fullmatch`).
        archs: architectures that it is for. what: what it does. source: the proposal, patch or reason that it follows.
        apply: makes the new profile. Raises: UsageError where this kernel or argument won't do.
        several: whether it may be given more than once.
        takes: what the argument has to be, in words; "" for a rule without one.
        subject: what a rule with an argument is about, for contradictions; () for what nothing else is about.
    """

    name: str
    argument: str
    pattern: str
    archs: tuple[Arch, ...]
    what: str
    source: str
    apply: Callable[[HostProfile, str], HostProfile]
    several: bool = False
    subject: Callable[[str], Subject] = lambda argument: ()
    takes: str = ""

    @property
    def title(self) -> str:
        """As it is written, with what its argument is."""
        return self.name + self.argument

    def match(self, word: str) -> str | None:
        """The argument in a word that is this rule, None for another word."""
        found = re.fullmatch(re.escape(self.name) + f"({self.pattern})", word)
        return found[1] if found else None

    def begins(self, word: str) -> bool:
        """Whether a word is this rule with something that its argument can't be."""
        rest = word.removeprefix(self.name)
        return word.startswith(self.name) and (rest[:1] in ("", "=") or rest[0].isdigit())


def variants(arch: Arch) -> tuple[Variant, ...]:
    """The optional rules of an architecture."""
    from migstream.backends.sim.variants_arm64 import VARIANTS as ARM64
    from migstream.backends.sim.variants_x86_64 import VARIANTS as X86_64

    return tuple(rule for rule in (*ARM64, *X86_64) if arch in rule.archs)


def varied(title: str, profile: HostProfile, words: list[str]) -> HostProfile:
    """Return the profile under optional rules, applied in the order in which they are given.

    Args:
        title: the recorded kernel's name, for messages. words: rules with their arguments.

    Raises: BackendUnavailable for a rule that there is not, with near ones; UsageError for an argument that a rule
        can't have, for two that contradict each other, and for one that this kernel can't follow.
    """
    chosen = [_find(title, profile.arch, word) for word in words]
    for earlier, later in _pairs(chosen):
        _agree(title, earlier, later)
    for rule, argument, word in chosen:
        try:
            profile = rule.apply(profile, argument)
        except UsageError as error:
            raise UsageError(f"sim:{title}{MARK}{word}: {error}") from error
    return profile


_Chosen = tuple[Variant, str, str]


def _find(title: str, arch: Arch, word: str) -> _Chosen:
    known = variants(arch)
    for rule in known:
        if (argument := rule.match(word)) is not None:
            return rule, argument, word
    for rule in known:
        if rule.begins(word):
            raise UsageError(f"sim:{title}{MARK}{word}: +{rule.title} takes {rule.takes or 'no argument'}")
    titles = {rule.name: rule.title for rule in known}
    near = difflib.get_close_matches(re.split("[=0-9]", word)[0], titles, n=3, cutoff=0.4) or sorted(titles)
    raise BackendUnavailable(f"no rule {word!r} for sim:{title}; near: "
                             f"{', '.join(MARK + titles[one] for one in near)}; `migstream host list` names all")


def _pairs(chosen: list[_Chosen]) -> Iterator[tuple[_Chosen, _Chosen]]:
    return ((earlier, later) for number, later in enumerate(chosen) for earlier in chosen[:number])


def _agree(title: str, earlier: _Chosen, later: _Chosen) -> None:
    (one, argument, first), (other, others, second) = earlier, later
    if first == second:
        raise UsageError(f"sim:{title}: {MARK}{first} is there twice")
    if (one is other and not one.several) or _overlap(one.subject(argument), other.subject(others)):
        raise UsageError(f"sim:{title}: {MARK}{first} and {MARK}{second} contradict each other")


def _overlap(one: Subject, other: Subject) -> bool:
    shared = min(len(one), len(other))
    return shared > 0 and one[:shared] == other[:shared]


def behaves(profile: HostProfile, **traits: int) -> HostProfile:
    """The profile with more entries in `behaviour`."""
    return replace(profile, behaviour={**profile.behaviour, **traits})
