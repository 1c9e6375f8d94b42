"""What two hosts' profiles hold besides registers' properties, compared key by key: a row for each such table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from migstream.errors import errno_name
from migstream.host.attributes_arm64 import name
from migstream.host.profile import HostProfile
from migstream.model import Klass
from migstream.registers import ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.registers.cpuid import cpuid_words
from migstream.registers.firmware_arm64 import CALL_NAMES

_CPUID_WORDS = ("EAX", "EBX", "ECX", "EDX")
_NOT_RECORDED = "not recorded"


@dataclass(frozen=True, slots=True)
class Compared:
    """A table of a profile.

    Attributes:
        what: the property that is another. of: the table. title: of a key. show: a value.
        apart: keys that are not compared: what runs by itself differs each time.
    """

    what: str
    of: Callable[[HostProfile], Mapping[Any, Any]]
    title: Callable[[Any], str]
    show: Callable[[Any], str] = hex
    apart: Callable[[Any], bool] = lambda key: False


def _runs(id: int) -> bool:
    return lookup(id).klass == Klass.CLOCK


def _word(key: tuple[int, int, int]) -> str:
    leaf, subleaf, word = key
    return f"CPUID {leaf:#x}.{subleaf} {_CPUID_WORDS[word]}"


def _forced(key: int) -> str:
    return _word((key >> 32, key >> 8 & 0xFF_FFFF, key & 0xFF))


_APIC_ID = {(1, 1): 0xFF00_0000, (0xB, 3): 0xFFFF_FFFF, (0x1F, 3): 0xFFFF_FFFF}
"""By leaf and word: the APIC id of the CPU that happened to answer."""


def _cpuid(profile: HostProfile) -> Mapping[tuple[int, int, int], int]:
    """Supported CPUID without what differs from CPU to CPU of one host."""
    words = cpuid_words(profile.cpuid) if profile.cpuid else {}
    return {key: word & ~_APIC_ID.get((key[0], key[2]), 0) for key, word in words.items()}


def _offered(profile: HostProfile) -> Mapping[int, int]:
    """Feature MSRs that a vCPU lists, too; the others are registers of their own in the diff."""
    return {index: value for index, value in profile.feature_msrs.items() if index in profile.msrs}


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]:#x}, {values[1]:#x}"


def _errnos(values: tuple[int, ...]) -> str:
    return ", ".join(errno_name(no) if no > 0 else "a short count" for no in values)


TABLES: tuple[Compared, ...] = (
    Compared("found by trial", lambda p: p.behaviour, str),
    Compared("supported CPUID", _cpuid, _word),
    Compared("CPUID bits kept, bits set", lambda p: p.cpuid_forced, _forced, _pair),
    Compared("feature MSR offered", _offered, lambda index: name(ids.msr_id(index))),
    Compared("KVM_ENABLE_CAP takes", lambda p: p.enable_caps, lambda number: f"capability {number}"),
    Compared("size in bytes", lambda p: p.sizes, name, str),
    Compared("vCPU refused", lambda p: p.features_refused, lambda mask: ", ".join(vcpu_features.names(mask)),
             errno_name),
    Compared("writable, says the kernel", lambda p: p.writable_masks, name),
    Compared("bits refused with", lambda p: p.bit_errnos, name, _errnos, _runs),
    Compared("a guest's HVC, X0", lambda p: p.firmware, lambda key: CALL_NAMES.get(key, f"{key:#x}")),
    Compared("a guest's MRS", lambda p: p.guest_registers, name),
)


def table_differences(left: HostProfile, right: HostProfile) -> Iterator[tuple[str, str, str, str]]:
    """(name, property, left, right) of what differs. A table that one host was never asked for is one line."""
    for table in TABLES:
        ours, theirs = table.of(left), table.of(right)
        if bool(ours) != bool(theirs):
            yield "host", table.what, _many(ours), _many(theirs)
            continue
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key) and not table.apart(key):
                yield table.title(key), table.what, _shown(table, ours, key), _shown(table, theirs, key)


def _many(values: Mapping[Any, Any]) -> str:
    return f"{len(values)} recorded" if values else _NOT_RECORDED


def _shown(table: Compared, values: Mapping[Any, Any], key: Any) -> str:
    return table.show(values[key]) if key in values else "-"
