"""x86-64's part of a baseline: CPUID word by word, and MSRs that are feature registers.

KVM takes any CPUID that a VMM gives, so nothing here is fixed by a host but what it would do in silence: a feature
that a host lacks. Sources: Intel SDM vol. 2A CPUID, AMD APM vol. 3 appendix E, Linux arch/x86/kvm/cpuid.c.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING

from migstream.host.profile import HostProfile, cpuid_word, shown_cpuid
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from migstream.registers.cpuid import COMPUTED, EAX, EBX, ECX, EDX, FEATURE_WORDS, RUNTIME_BITS, STATE_BITS, bit_name

if TYPE_CHECKING:
    from migstream.host.baseline import Draft

_REGISTERS = ("EAX", "EBX", "ECX", "EDX")
_ENTRY = struct.Struct("<7I12x")
_Entries = dict[tuple[int, int], tuple[int, list[int]]]
"""(leaf, subleaf) -> flags and the four words."""

LOWEST: dict[tuple[int, int], tuple[int, ...]] = {
    (0, 0): (EAX,), (7, 0): (EAX,), (0x14, 0): (EAX,), (0x8000_0000, 0): (EAX,), (0x4000_0000, 0): (EAX,),
}
"""Words that are the highest leaf or subleaf."""

SIZES = {(0x8000_0008, 0, EAX): 0xFFFF}
"""Words of numbers of eight bits (physical and linear address bits) of which the lowest serves all; which bits."""

EXACT = {**{(0, 0, n): "vendor" for n in (EBX, ECX, EDX)}, (1, 0, EAX): "family, model and stepping"}
"""Words that are who the CPU is: a guest of one can't be told that it is another."""


def fill(draft: Draft, hosts: Mapping[str, HostProfile]) -> None:
    """Add CPUID and feature MSRs to a draft."""
    tables = {name: entries(shown_cpuid(profile)) for name, profile in hosts.items()}
    common: _Entries = {}
    first = next(iter(tables.values()))
    for key, (flags, own) in first.items():
        if any(key not in table for table in tables.values()):
            continue
        common[key] = flags, [_word(draft, key, n, {name: table[key][1][n] for name, table in tables.items()},
                                    {name: _beyond(host, key, n) for name, host in hosts.items()})
                              for n in range(len(own))]
    for name, table in tables.items():
        gone = [_leaf(key) for key in table if key not in common]
        if gone:
            _lose(draft, name, "CPUID leaves", ", ".join(gone), "none")
    _forced(draft, hosts, common)
    draft.values[x86_64.CPUID2.id] = packed(common)
    _msrs(draft, hosts)


def _forced(draft: Draft, hosts: Mapping[str, HostProfile], common: _Entries) -> None:
    """Words that some kernel does not keep as they are written."""
    for name, host in hosts.items():
        for key, (_, words) in common.items():
            for n, word in enumerate(words):
                kept, put = host.cpuid_forced.get(cpuid_word(*key, n), (0xFFFF_FFFF, 0))
                changed = (word ^ (word & kept | put)) & ~COMPUTED.get((*key, n), 0) & ~STATE_BITS.get((*key, n), 0)
                label = f"CPUID {_leaf(key)} {_REGISTERS[n]}"
                if changed and draft.is_free(label):
                    draft.left_out.append(f"{label}: not the same everywhere, as asked")
                elif changed:
                    shown_otherwise = _bits(changed, (*key, n))
                    draft.refusals.append(f"{label}: {name} shows {shown_otherwise} otherwise, whatever is written")


def _lose(draft: Draft, host: str, name: str, has: str, gets: str) -> None:
    from migstream.host.baseline import Loss

    draft.losses.append(Loss(host, name, has, gets))


def _leaf(key: tuple[int, int]) -> str:
    return f"{key[0]:#x}.{key[1]}" if key[1] else f"{key[0]:#x}"


def _beyond(host: HostProfile, key: tuple[int, int], n: int) -> int:
    """Bits that a guest may have whatever the host lists: `check` calls them a fit, too."""
    return RUNTIME_BITS.get((*key, n), 0) | host.cpuid_forced.get(cpuid_word(*key, n), (0, 0))[1]


def _word(draft: Draft, key: tuple[int, int], n: int, has: Mapping[str, int], taken: Mapping[str, int]) -> int:
    values = list(has.values())
    if len(set(values)) == 1:
        return values[0]
    name = f"CPUID {_leaf(key)} {_REGISTERS[n]}"
    if draft.is_free(name):
        draft.left_out.append(f"{name}: the first host's, as asked")
        return values[0]
    if (*key, n) in FEATURE_WORDS:
        return _features(draft, key, n, has, taken)
    if n in LOWEST.get(key, ()) or (*key, n) in SIZES:
        return _least(draft, name, has, SIZES.get((*key, n), 0))
    pinned = ~COMPUTED.get((*key, n), 0)
    if len({value & pinned for value in values}) > 1:
        if (*key, n) in EXACT:
            draft.refusals.append(f"{name} ({EXACT[*key, n]}): {', '.join(f'{h} {v:#x}' for h, v in has.items())}")
        else:
            draft.left_out.append(f"{name}: the first host's, {values[0]:#x}; hosts differ, and any may show it")
    return values[0]


def _features(draft: Draft, key: tuple[int, int], n: int, has: Mapping[str, int], taken: Mapping[str, int]) -> int:
    """Bits that some host lists and every one takes."""
    common = reduce(or_, has.values()) & reduce(and_, (value | taken[host] for host, value in has.items()))
    for host, value in has.items():
        if gone := value & ~common:
            _lose(draft, host, f"CPUID {_leaf(key)} {_REGISTERS[n]}", _bits(gone, (*key, n)), "0")
    return common


def _common(draft: Draft, name: str, has: Mapping[str, int]) -> int:
    both = reduce(and_, has.values())
    for host, value in has.items():
        if value != both:
            _lose(draft, host, name, _bits(value & ~both), "0")
    return both


def _least(draft: Draft, name: str, has: Mapping[str, int], sizes: int) -> int:
    """The lowest number; with `sizes`, the lowest of each of these bytes, and the first host's of the others."""
    values = list(has.values())
    least = min(values) if not sizes else values[0] & ~sizes | sum(
        min(value & 0xFF << low for value in values) for low in range(0, 32, 8) if sizes >> low & 0xFF)
    for host, value in has.items():
        if value & (sizes or -1) != least & (sizes or -1):
            _lose(draft, host, name, f"{value:#x}", f"{least:#x}")
    return least


def _bits(mask: int, word: tuple[int, int, int] = (0, 0, 0)) -> str:
    """Bits by number, and those of a CPUID word by name."""
    return ", ".join(bit_name(*word, bit) for bit in range(mask.bit_length()) if mask >> bit & 1)


def _msrs(draft: Draft, hosts: Mapping[str, HostProfile]) -> None:
    """Feature MSRs that all hosts offer: bits in common where bits are features, else they have to be the same."""
    offered = set.intersection(*({*profile.feature_msrs, *_saved(profile)} for profile in hosts.values()))
    for index in sorted(offered):
        has = {name: shown(profile, index) for name, profile in hosts.items()}
        row = lookup(ids.msr_id(index))
        if row.klass != "feature" or draft.is_free(row.name):
            continue
        if len(set(has.values())) > 1 and index not in _BITS:
            draft.left_out.append(f"{row.name}: hosts differ ({', '.join(f'{h} {v:#x}' for h, v in has.items())}), "
                                  "and no rule says which serves all")
            continue
        draft.values[row.id] = _common(draft, row.name, has).to_bytes(8, "little")


def _saved(host: HostProfile) -> list[int]:
    """MSRs that the host lists and has a value of, whether or not it offers them as feature MSRs."""
    return [index for index in host.msrs if ids.msr_id(index) in host.defaults]


def shown(host: HostProfile, index: int) -> int:
    """What a vCPU with the supported CPUID shows of a feature MSR: what is offered where it takes that, else its own.

    Newer kernels answer 0 as long as a vCPU has no CPUID, and some refuse what they offer.
    """
    own = int.from_bytes(host.defaults.get(ids.msr_id(index), b""), "little")
    offered = host.feature_msrs.get(index, own)
    taken = host.msr_bits.get(index)
    return own if taken is not None and (offered ^ own) & ~taken[0] else offered


_BITS = (0x10A, 0x345, 0xC001_1029, 0xCF)
"""MSR_IA32_ARCH_CAPABILITIES, _PERF_CAPABILITIES, MSR_AMD64_DE_CFG, MSR_IA32_CORE_CAPS: a bit is a promise."""


def entries(cpuid: bytes) -> _Entries:
    """The entries of a `struct kvm_cpuid2`, in its order."""
    (count,) = struct.unpack_from("<I", cpuid) if len(cpuid) >= 4 else (0,)
    rows = (_ENTRY.unpack_from(cpuid, 8 + 40 * n) for n in range(count))
    return {(row[0], row[1]): (row[2], list(row[3:])) for row in rows}


def packed(table: _Entries) -> bytes:
    """A `struct kvm_cpuid2` of these entries."""
    rows = [_ENTRY.pack(leaf, subleaf, flags, *words) for (leaf, subleaf), (flags, words) in table.items()]
    return struct.pack("<II", len(rows), 0) + b"".join(rows)
