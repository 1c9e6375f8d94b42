"""What the fields of one host profile must be to each other, so that verdicts follow from them: a table of rules.

A profile that lacks what verdicts rest on would call everything a fit; so it is refused, with the field named.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from migstream.model import OURS, Arch
from migstream.registers.catalogue import lookup, must_have
from migstream.registers.ids import arch_of

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

_X86, _ARM, _BOTH = (Arch.X86_64,), (Arch.ARM64,), tuple(Arch)

FIELDS: dict[str, tuple[Arch, ...]] = {
    **dict.fromkeys(("capabilities", "sizes", "defaults", "refused", "enable_caps", "behaviour", "made_by", "scopes",
                     "scope_found", "register_bits", "bit_errnos", "readback", "after_run"), _BOTH),
    **dict.fromkeys(("msrs", "feature_msrs", "cpuid", "msr_bits", "cpuid_forced", "xsave_components"), _X86),
    **dict.fromkeys(("registers", "feature_registers", "vcpu_features", "devices", "writable_masks", "feature_defaults",
                     "feature_bits", "feature_scopes", "features_refused", "attributes", "firmware",
                     "guest_registers"), _ARM),
}
"""Architectures that have a field: there it is in every profile, `made_by` to `after_run`, on the other it is empty."""

FILLED: dict[Arch, dict[str, str]] = {
    Arch.X86_64: {"capabilities": "vCPUs and optional structs", "msrs": "which MSRs there are",
                  "cpuid": "what a guest may be promised", "defaults": "what a fresh vCPU has"},
    Arch.ARM64: {"capabilities": "vCPUs and devices", "registers": "which registers there are",
                 "defaults": "what a fresh vCPU has"},
}
"""Fields that are never empty, and what follows from them."""

Found = Iterator[tuple[str, str]]


def check(profile: HostProfile, given: Collection[str]) -> None:
    """Refuse a profile whose fields don't go together; `given` are those that were there. Raises: ValueError."""
    for rule in RULES:
        for field, what in rule(profile, given):
            raise ValueError(f"field {field!r}: {what}")


def _whole(profile: HostProfile, given: Collection[str]) -> Found:
    """Nothing that captures write is missing: a part of a profile is another profile."""
    for field, archs in FIELDS.items():
        if profile.arch in archs and field not in given:
            yield field, "is missing; capture the profile again"


def _own(profile: HostProfile, given: Collection[str]) -> Found:
    """What only the other architecture has is empty."""
    for field, archs in FIELDS.items():
        if profile.arch not in archs and getattr(profile, field):
            yield field, f"is not empty, and {profile.arch.label} has no such thing"


def _filled(profile: HostProfile, given: Collection[str]) -> Found:
    """What verdicts rest on is there."""
    for field, why in FILLED[profile.arch].items():
        if not getattr(profile, field):
            yield field, f"is empty: it says {why}"


def _ids(profile: HostProfile, given: Collection[str]) -> Found:
    """Registers are of the profile's architecture."""
    named = {field: getattr(profile, field) for field in _BY_ID}
    wrong = {id for id in set().union(*named.values()) if not _may_have(profile.arch, id)}
    for field, ids in named.items() if wrong else ():
        for id in (id for id in ids if id in wrong):
            yield field, f"{id:#x} is no register of {profile.arch.label}"


def _may_have(arch: Arch, id: int) -> bool:
    owner = arch_of(id)
    return owner == arch or (owner is None and id >> 56 == OURS)


_BY_ID = ("sizes", "defaults", "refused", "scopes", "scope_found", "register_bits", "bit_errnos", "readback",
          "after_run", "registers", "scope_flags", "writable_masks", "feature_defaults", "feature_bits",
          "feature_scopes", "attributes", "guest_registers")


def _widths(profile: HostProfile, given: Collection[str]) -> Found:
    """Values are as wide as their register, where the catalogue or the id itself says; a device attribute may be
    empty."""
    for field, values in _WIDE.items():
        table: Mapping[int, Any] = getattr(profile, field)
        for id, item in table.items():
            size = lookup(id).size
            if size is not None and any(len(value) != size for value in values(item)):
                sizes = ", ".join(str(len(value)) for value in values(item))
                yield field, f"{id:#x}: {sizes} bytes; {lookup(id).name} has {size}"


_WIDE: dict[str, Callable[[Any], tuple[bytes, ...]]] = {
    **dict.fromkeys(("defaults", "feature_defaults"), lambda value: (value,)),
    "attributes": lambda value: (value,) if value else (),
    **dict.fromkeys(("register_bits", "feature_bits", "readback"), lambda pair: pair),
}


def _scopes(profile: HostProfile, given: Collection[str]) -> Found:
    """No register is at a scope at which no stream may have it; what is fixed is at the catalogue's."""
    for field in ("scopes", "feature_scopes"):
        for id, scope in getattr(profile, field).items():
            own = must_have(id)
            if scope != "fixed" and own not in (None, scope):
                yield field, f"{id:#x}: {scope}; {lookup(id).name} is {own} on every kernel"


_ENTRY, _MOST_ENTRIES = 40, 256


def _cpuid(profile: HostProfile, given: Collection[str]) -> Found:
    """A struct kvm_cpuid2: a count, padding, and as many entries."""
    table = profile.cpuid
    if not table:
        return
    count = struct.unpack_from("<I", table)[0] if len(table) >= 8 else 0
    if not 0 < count <= _MOST_ENTRIES or len(table) != 8 + _ENTRY * count:
        yield "cpuid", f"{len(table)} bytes and a count of {count} are no struct kvm_cpuid2"


RULES: tuple[Callable[[HostProfile, Collection[str]], Found], ...] = (
    _whole, _own, _filled, _ids, _widths, _scopes, _cpuid)
