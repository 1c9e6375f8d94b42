"""A profile that the simulator is made of has to make sense: files are edited by hand, and rules change profiles.

Each check is a row: the field, what must hold of it, and how a break of it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from migstream.errors import ProfileError
from migstream.model import Arch
from migstream.registers import vcpu_features
from migstream.registers.bit_tables import BITS
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

T = TypeVar("T")
_U64 = (1 << 64) - 1
_ERRNOS = range(-1, 4096)
"""-1 is a short count, 0 none; the kernel's own end before 4096 (MAX_ERRNO)."""

_ENTRY = 40


def check(profile: HostProfile, name: str) -> None:
    """Raises: ProfileError naming the profile, the field and the register of the first thing that makes no sense."""
    for row in CHECKS:
        for problem in row.find(profile) if profile.arch in row.archs else ():
            raise ProfileError(f"{name}: field {row.field!r}: {problem}")


def _negative(numbers: dict[str, int]) -> Iterator[str]:
    return (f"{key} is {value}" for key, value in numbers.items() if not 0 <= value <= _U64)


def _behaviour(profile: HostProfile) -> Iterator[str]:
    from migstream.host.probe_arm64 import ENTERING
    from migstream.host.probe_x86_64 import TRAITS

    yield from _negative(profile.behaviour)
    known = (*(trait.name for trait in TRAITS), ENTERING, *_TRAITS_OF_RULES)
    for name in profile.behaviour:
        if name not in known and not _VMX_LEFT.fullmatch(name):
            yield f"no trait {name!r}; there are {', '.join(known)}"


_TRAITS_OF_RULES, _VMX_LEFT = ("sdei", "evmcs_filter"), re.compile("evmcs_msr_4[89][0-9a-f]")
"""What optional rules write (`variants`), beside what a capture finds."""


def _components(profile: HostProfile) -> Iterator[str]:
    known = [field.name for field in BITS["XCR0"]]
    for name in profile.xsave_components:
        if name not in known and not re.fullmatch("bit [0-9]+", name):
            yield f"no XSAVE component {name!r}; there are {', '.join(known)}"
    yield from (f"{name} is there twice" for name in _twice(profile.xsave_components))


def _capabilities(profile: HostProfile) -> Iterator[str]:
    yield from _negative(profile.capabilities)
    if not profile.max_vcpus:
        yield "MAX_VCPUS is 0: no VM could have a vCPU"


def _sizes(profile: HostProfile) -> Iterator[str]:
    for id, size in profile.sizes.items():
        default = profile.defaults.get(id)
        if size < 0 or size % 4:
            yield f"{lookup(id).name} has {size} bytes"
        elif default is not None and len(default) != size:
            yield f"{lookup(id).name} has {size} bytes, its default {len(default)}"


def _defaults(profile: HostProfile) -> Iterator[str]:
    for id, value in profile.defaults.items():
        size = lookup(id).size or len(value)
        if len(value) != size:
            yield f"{lookup(id).name} has {size} bytes, its default {len(value)}"


def _msrs(profile: HostProfile) -> Iterator[str]:
    yield from (f"MSR {index:#x} is there twice" for index in _twice(profile.msrs))
    yield from (f"MSR {index:#x}: an MSR's number has 32 bits" for index in profile.msrs if not 0 <= index < 1 << 32)


def _twice(numbers: Iterable[T]) -> Iterator[T]:
    seen: set[T] = set()
    for number in numbers:
        if number in seen:
            yield number
        seen.add(number)


def _feature_msrs(profile: HostProfile) -> Iterator[str]:
    return _negative({f"MSR {index:#x}": value for index, value in profile.feature_msrs.items()})


def _cpuid(profile: HostProfile) -> Iterator[str]:
    entries, rest = divmod(len(profile.cpuid) - 8, _ENTRY)
    said = int.from_bytes(profile.cpuid[:4], "little")
    if rest or said != entries:
        yield f"{len(profile.cpuid)} bytes, with {said} entries of {_ENTRY} bytes after 8"


def _msr_bits(profile: HostProfile) -> Iterator[str]:
    for index, (taken, kept) in profile.msr_bits.items():
        if not 0 <= taken <= _U64 or not 0 <= kept <= _U64:
            yield f"MSR {index:#x}: bits beyond its 64"
        elif kept & ~taken:
            yield f"MSR {index:#x}: bits {kept & ~taken:#x} are kept and not taken"


def _register_bits(profile: HostProfile) -> Iterator[str]:
    for id, (taken, kept) in profile.register_bits.items():
        default = profile.defaults.get(id, profile.feature_defaults.get(id))
        if default is None:
            yield f"{lookup(id).name} is not in {_default_fields(profile)}"
        elif max(len(taken), len(kept)) > len(default):
            yield f"{lookup(id).name}: bits beyond its {len(default)} bytes"
        elif (extra := int.from_bytes(kept, "little") & ~int.from_bytes(taken, "little")):
            yield f"{lookup(id).name}: bits {extra:#x} are kept and not taken"


def _cpuid_forced(profile: HostProfile) -> Iterator[str]:
    for key, pair in profile.cpuid_forced.items():
        if any(not 0 <= word < 1 << 32 for word in pair) or key & 0xFF > 3:
            yield f"{key:#x}: a word of CPUID is EAX to EDX and has 32 bits"


def _scopes(profile: HostProfile) -> Iterator[str]:
    known = {**profile.defaults, **profile.feature_defaults, **dict.fromkeys(profile.refused)}
    return (f"{lookup(id).name} is not in {_default_fields(profile)}" for id in profile.scopes if id not in known)


def _default_fields(profile: HostProfile) -> str:
    """Where a register's default would be: which of the fields was edited can't be told."""
    return "'defaults' or 'feature_defaults'" if profile.arch == Arch.ARM64 else "'defaults'"


def _errno_pairs(pairs: dict[int, tuple[int, int]]) -> Iterator[str]:
    return (f"{lookup(id).name}: {no} is no errno" for id, pair in pairs.items() for no in pair if no not in _ERRNOS)


def _registers(profile: HostProfile) -> Iterator[str]:
    for id in profile.registers:
        default = profile.defaults.get(id)
        if default is not None and len(default) != 1 << (id >> 52 & 0xF):
            yield f"{lookup(id).name}: its id says {1 << (id >> 52 & 0xF)} bytes, its default has {len(default)}"
    yield from (f"{lookup(id).name} is there twice" for id in _twice(profile.registers))


def _listed_with_features(profile: HostProfile) -> Iterator[str]:
    for mask, changed in profile.feature_registers.items():
        if mask & ~profile.vcpu_features:
            yield f"vCPU features {mask:#x} are not all in 'vcpu_features'"
        yield from (f"{lookup(id).name} is there twice for features {mask:#x}" for id in _twice(changed))


def _vcpu_features(profile: HostProfile) -> Iterator[str]:
    if profile.vcpu_features & ~_NAMED_FEATURES or profile.vcpu_features < 0:
        yield f"{profile.vcpu_features:#x} has bits that are no vCPU feature"
    elif not profile.vcpu_features & vcpu_features.PSCI_0_2:
        yield "no PSCI_0_2, which every vCPU of a recorded guest has"


_NAMED_FEATURES = sum(feature.mask for feature in vcpu_features.FEATURES)


def _devices(profile: HostProfile) -> Iterator[str]:
    return (f"no device {name!r}; there are {', '.join(_DEVICES)}" for name in profile.devices if name not in _DEVICES)


_DEVICES = ("gicv3", "its")


def _writable(profile: HostProfile) -> Iterator[str]:
    return _negative({lookup(id).name: value for id, value in profile.writable_masks.items()})


def _feature_defaults(profile: HostProfile) -> Iterator[str]:
    for id, value in profile.feature_defaults.items():
        if lookup(id).size not in (None, len(value)):
            yield f"{lookup(id).name} has {lookup(id).size} bytes, its default {len(value)}"


def _scope_flags(profile: HostProfile) -> Iterator[str]:
    known = profile.listed.union(*profile.feature_registers.values())
    return (f"{lookup(id).name} is not in 'registers'" for id in profile.scope_flags if id not in known)


def _attributes(profile: HostProfile) -> Iterator[str]:
    for id, value in profile.attributes.items():
        if value and lookup(id).known and lookup(id).size not in (None, len(value)):
            yield f"{lookup(id).name} has {lookup(id).size} bytes, here {len(value)}"


def _answers(profile: HostProfile) -> Iterator[str]:
    return _negative({f"call {key:#x}": value for key, value in profile.firmware.items()})


@dataclass(frozen=True, slots=True)
class Check:
    """What must hold of a field: `find` gives what does not, in words."""

    field: str
    archs: tuple[Arch, ...]
    find: Callable[[HostProfile], Iterator[str]]


_X86, _ARM, _ALL = (Arch.X86_64,), (Arch.ARM64,), (Arch.X86_64, Arch.ARM64)

CHECKS = (
    Check("capabilities", _ALL, _capabilities),
    Check("behaviour", _ALL, _behaviour),
    Check("xsave_components", _X86, _components),
    Check("sizes", _X86, _sizes),
    Check("defaults", _ALL, _defaults),
    Check("msrs", _X86, _msrs),
    Check("feature_msrs", _X86, _feature_msrs),
    Check("cpuid", _X86, _cpuid),
    Check("cpuid_forced", _X86, _cpuid_forced),
    Check("msr_bits", _X86, _msr_bits),
    Check("registers", _ARM, _registers),
    Check("vcpu_features", _ARM, _vcpu_features),
    Check("feature_registers", _ARM, _listed_with_features),
    Check("devices", _ARM, _devices),
    Check("writable_masks", _ARM, _writable),
    Check("feature_defaults", _ARM, _feature_defaults),
    Check("scope_flags", _ARM, _scope_flags),
    Check("attributes", _ARM, _attributes),
    Check("firmware", _ARM, _answers),
    Check("register_bits", _ALL, _register_bits),
    Check("scopes", _ALL, _scopes),
    Check("refused", _ALL, lambda profile: _errno_pairs(profile.refused)),
    Check("after_run", _ALL, lambda profile: _errno_pairs(profile.after_run)),
)
