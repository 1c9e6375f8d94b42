"""Host profiles for people: what a register is on one host, and what differs between two. No file, no terminal."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migstream.host.attributes_arm64 import name
from migstream.host.compare_tables import table_differences
from migstream.host.profile import FIXED, HostProfile
from migstream.model import Klass
from migstream.registers import ids, vcpu_features
from migstream.registers.bit_tables import BITS, decode
from migstream.registers.catalogue import lookup, running
from migstream.registers.x86_64 import TSC_KHZ

SCOPES = ("vm", "vcpu", FIXED)
_UNTRIED = "not tried"
HV_X64_MSR_TSC_FREQUENCY = 0x4000_0022
_NUMBER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One register of a profile.

    Attributes:
        default: None where it can't be read. bits: names of what is set in it.
        scope: one of SCOPES, or "" where there was no experiment. how: it was found.
        writable: bits that read back when flipped, None where none were tried. told: what the kernel calls writable,
            None where it has no word. refused: errnos of the read and of writing the default.
        after_run: errnos of writing another value and the same one after a run; None where nothing can be written.
        full: the default, the writable bits and the scope on a vCPU with all features, None each where it is the same.
    """

    id: int
    default: bytes | None
    scope: str
    how: str
    writable: int | None
    told: int | None
    refused: tuple[int, int]
    after_run: tuple[int, int] | None
    full: tuple[bytes | None, int | None, str | None] = (None, None, None)

    @property
    def name(self) -> str:
        """As in the catalogue, or in KVM's header."""
        return name(self.id)

    @property
    def bits(self) -> list[str]:
        """Names of what is set in the default."""
        return bit_names(self.id, self.default)


def bit_names(id: int, value: bytes | None) -> list[str]:
    """Names of what is set in a value; none where the register has no bit table."""
    table = lookup(id).bits
    if value is None or len(value) > _NUMBER_BYTES or table not in BITS:
        return []
    return decode(table, int.from_bytes(value, "little"))


def entries(profile: HostProfile) -> dict[int, Entry]:
    """Every register of a profile by id, ascending: listed ones, structs, the refused, and device attributes."""
    feature_msrs = {ids.msr_id(index): value.to_bytes(8, "little") for index, value in profile.feature_msrs.items()}
    attributes = {id: value or None for id, value in profile.attributes.items()}
    defaults = {**attributes, **feature_msrs, **profile.feature_defaults, **profile.defaults}
    listed = {*defaults, *profile.registers, *profile.refused, *map(ids.msr_id, profile.msrs)}
    return {id: _entry(profile, id, defaults.get(id)) for id in sorted(listed)}


def _entry(profile: HostProfile, id: int, default: bytes | None) -> Entry:
    return Entry(id, default, profile.scopes.get(id, ""), profile.scope_found.get(id, _UNTRIED), _writable(profile, id),
                 profile.writable_masks.get(id), profile.refused.get(id, (0, 0)), profile.after_run.get(id),
                 _full(profile, id))


def _full(profile: HostProfile, id: int) -> tuple[bytes | None, int | None, str | None]:
    bits = profile.feature_bits.get(id)
    runs = lookup(id).klass == Klass.CLOCK
    default = profile.feature_defaults.get(id) if id in profile.defaults and not runs else None
    return default, None if bits is None else int.from_bytes(bits[1], "little"), profile.feature_scopes.get(id)


def _writable(profile: HostProfile, id: int) -> int | None:
    if id in profile.register_bits:
        return int.from_bytes(profile.register_bits[id][1], "little")
    bits = profile.msr_bits.get(ids.msr_index(id) or -1)
    return bits and bits[1]


def matching(profile: HostProfile, pattern: str) -> list[Entry]:
    """The registers whose name or id a glob matches, in any case."""
    glob = pattern.lower()
    return [entry for entry in entries(profile).values()
            if fnmatch.fnmatchcase(entry.name.lower(), glob) or fnmatch.fnmatchcase(f"{entry.id:#018x}", glob)]


def scope_counts(profile: HostProfile, registers: tuple[int, ...] | None = None) -> dict[str, int]:
    """How many registers have which scope by experiment.

    Args:
        registers: those to count, with the scopes that they have with all vCPU features; all that were tried with the
            scope that a vCPU without further features has, where it is not given.
    """
    known = profile.scopes if registers is None else {**profile.scopes, **profile.feature_scopes}
    wanted = known.keys() if registers is None else known.keys() & {*registers}
    return {scope: sum(known[id] == scope for id in wanted) for scope in SCOPES}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs between two hosts: of what (a name), which property, and what it is on each."""

    name: str
    what: str
    left: str
    right: str


def differences(left: HostProfile, right: HostProfile) -> list[Change]:
    """What differs, by name: of the host, capabilities, registers and attributes in the order of their ids, tables.

    A register's property that was not tried on one of the hosts is not compared.
    """
    out = [change for what, of in _HOST for change in _only(what, of(left), of(right))]
    out += [Change(name, "capability", str(left.capabilities.get(name, 0)), str(right.capabilities.get(name, 0)))
           for name in sorted({*left.capabilities, *right.capabilities})
           if left.capabilities.get(name, 0) != right.capabilities.get(name, 0)]
    ours, theirs = entries(left), entries(right)
    for id in sorted({*ours, *theirs}):
        out += _register(id, ours.get(id), theirs.get(id))
    return out + [Change(*row) for row in table_differences(left, right)]


_HOST: tuple[tuple[str, Callable[[HostProfile], list[str]]], ...] = (
    ("vCPU features", lambda profile: vcpu_features.names(profile.vcpu_features)),
    ("devices", lambda profile: list(profile.devices)),
    ("XSAVE components", lambda profile: list(profile.xsave_components)),
)
"""(property of a host, its names)."""


def _only(what: str, left: list[str], right: list[str]) -> Iterator[Change]:
    """What one has and the other hasn't."""
    if {*left} != {*right}:
        ours, theirs = ([name for name in a if name not in b] for a, b in ((left, right), (right, left)))
        yield Change("host", what, _words(ours), _words(theirs))


def _register(id: int, left: Entry | None, right: Entry | None) -> Iterator[Change]:
    if left is None or right is None:
        yield Change(name(id), "listed", _there(left), _there(right))
        return
    for what, differs, show in _COMPARED:
        if differs(left, right):
            ours, theirs = show(left, right)
            yield Change(left.name, what, ours, theirs)


def _there(entry: Entry | None) -> str:
    return "no" if entry is None else "yes"


def _default_differs(left: Entry, right: Entry) -> bool:
    """Running clocks always do; what of other registers runs is not compared, nor what one host calibrates anew."""
    return lookup(left.id).klass != Klass.CLOCK and _still(left) != _still(right) and not _calibrated(left, right)


_FREQUENCIES = frozenset((TSC_KHZ.id, ids.msr_id(HV_X64_MSR_TSC_FREQUENCY)))
_SAME_PPM = 1000
"""A kernel measures the TSC's frequency at its boot; the same CPU gives another one each time, a few ppm apart."""


def _calibrated(left: Entry, right: Entry) -> bool:
    if left.id not in _FREQUENCIES or left.default is None or right.default is None:
        return False
    ours, theirs = (int.from_bytes(entry.default or b"", "little") for entry in (left, right))
    return ours != theirs and abs(ours - theirs) * 1_000_000 <= _SAME_PPM * max(ours, theirs)


def calibrated(left: HostProfile, right: HostProfile) -> list[str]:
    """Registers that `differences` leaves out because they only say what a host's kernel measured at its boot."""
    ours, theirs = entries(left), entries(right)
    return [ours[id].name for id in sorted(_FREQUENCIES & ours.keys() & theirs.keys())
            if _calibrated(ours[id], theirs[id])]


def _still(entry: Entry) -> int | bytes | None:
    """The default with the bits cleared that run by themselves."""
    runs = running(entry.id)
    if entry.default is None or runs is None:
        return entry.default
    moving = sum((1 << width) - 1 << low for low, width in runs.spans)
    return int.from_bytes(entry.default, "little") & ~moving


def _defaults(left: Entry, right: Entry) -> tuple[str, str]:
    """Only the bits that one has and the other hasn't, by name; the values where they have no names."""
    ours, theirs = left.bits, right.bits
    if not ours or not theirs:
        return show_value(left.default), show_value(right.default)
    only = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    if any(only):
        return (_words(only[0]) if only[0] else show_value(left.default),
                _words(only[1]) if only[1] else show_value(right.default))
    return show_value(left.default), show_value(right.default)


def _full_differs(left: Entry, right: Entry) -> bool:
    """Only where both have another default with further features."""
    return None not in (left.full[0], right.full[0]) and left.full != right.full


def _fulls(left: Entry, right: Entry) -> tuple[str, str]:
    """Default, writable bits and scope: of each only what differs."""
    (ours, mine, scope), (theirs, yours, other) = left.full, right.full
    words: tuple[list[str], list[str]] = ([], [])
    if ours != theirs:
        _add(words, show_value(ours), show_value(theirs))
    if mine != yours:
        _add(words, *(f"writable: only {mask_words(left.id, (a or 0) & ~(b or 0))}" for a, b in (
            (mine, yours), (yours, mine))))
    if scope != other:
        _add(words, *(f"scope {entry.full[2] or entry.scope}" for entry in (left, right)))
    return "; ".join(words[0]), "; ".join(words[1])


def _add(words: tuple[list[str], list[str]], ours: str, theirs: str) -> None:
    words[0].append(ours)
    words[1].append(theirs)


def full_words(entry: Entry) -> str:
    """What the register is on a vCPU with all features, where that is something else."""
    default, writable, scope = entry.full
    words = [show_value(default)] if default is not None else []
    words += [f"writable: {mask_words(entry.id, writable)}"] if writable is not None else []
    return "; ".join(words + ([f"scope {scope}"] if scope else []))


def _words(names: list[str]) -> str:
    return ", ".join(names) or "-"


def _writable_differs(left: Entry, right: Entry) -> bool:
    return None not in (left.writable, right.writable) and left.writable != right.writable


def _writables(left: Entry, right: Entry) -> tuple[str, str]:
    ours, theirs = left.writable or 0, right.writable or 0
    return f"only {mask_words(left.id, ours & ~theirs)}", f"only {mask_words(left.id, theirs & ~ours)}"


def mask_words(id: int, mask: int) -> str:
    """The bits of a mask: fields by name, others as ranges."""
    names = []
    for row in BITS.get(lookup(id).bits, ()):
        if mask & row.mask:
            whole = mask & row.mask == row.mask
            names.append(row.name if whole else f"{row.name}[{_ranges((mask & row.mask) >> row.low)}]")
            mask &= ~row.mask
    return ", ".join(names + ([f"bits {_ranges(mask)}"] if mask else [])) or "none"


def _ranges(mask: int) -> str:
    """`63:60,3` for a mask with these bits."""
    out = []
    while mask:
        top = mask.bit_length() - 1
        low = (~mask & (1 << top) - 1).bit_length()
        out.append(f"{top}:{low}" if top > low else str(top))
        mask &= (1 << low) - 1
    return ",".join(out)


def show_value(value: bytes | None) -> str:
    """A number up to 64 bits, longer ones in bytes; all-zero ones by their length."""
    if value is None:
        return "can't be read"
    if len(value) <= _NUMBER_BYTES:
        return f"{int.from_bytes(value, 'little'):#x}"
    return value.hex() if any(value) else f"{len(value)} bytes, all zero"


_COMPARED: tuple[tuple[str, Callable[[Entry, Entry], bool], Callable[[Entry, Entry], tuple[str, str]]], ...] = (
    ("default", _default_differs, _defaults),
    ("writable", _writable_differs, _writables),
    ("scope", lambda a, b: bool(a.scope and b.scope) and a.scope != b.scope, lambda a, b: (a.scope, b.scope)),
    ("after a run", lambda a, b: None not in (a.after_run, b.after_run) and a.after_run != b.after_run,
     lambda a, b: (str(a.after_run), str(b.after_run))),
    ("with all features", _full_differs, _fulls),
    ("refused", lambda a, b: a.refused != b.refused, lambda a, b: (str(a.refused), str(b.refused))),
)
"""(property, whether it differs, how both are worded)."""
