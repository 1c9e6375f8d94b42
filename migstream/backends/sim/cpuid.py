"""CPUID of simulated vCPUs: what a table means to other registers, and what the kernel changes in it.

A table is struct kvm_cpuid2 as 64-bit words: one of header, then five for each entry (function and index, flags and
EAX, EBX and ECX, EDX and padding).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from migstream.backends.sim.rules import After, Keep, Refuse, Show, mask
from migstream.registers import x86_64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Mask, Rows
    from migstream.model import Words

ID = x86_64.CPUID2.id
ENTRY = 5
MAX_ENTRIES = 256
EAX, EBX, ECX, EDX = range(4)
_PLACE = {EAX: (1, 32), EBX: (2, 0), ECX: (2, 32), EDX: (3, 0)}
"""Register to (word of the entry, shift)."""

_ALL = 0xFFFF_FFFF
_LOW = np.uint64(_ALL)


class Tables:
    """The tables of some vCPUs. Most often all have the same leaves in the same order, which is looked up once."""

    def __init__(self, values: Words) -> None:
        """`values` is changed in place by `change()`."""
        self.values = values
        count = (values.shape[1] - 1) // ENTRY
        self.entries = values[:, 1:1 + ENTRY * count].reshape(len(values), count, ENTRY)
        self._used = np.arange(count, dtype=np.uint64) < (values[:, :1] & _LOW)
        self._keys = self.entries[:, :, 0]
        uniform = len(values) > 0 and (self._keys == self._keys[0]).all() and (self._used == self._used[0]).all()
        self._index = self._places() if uniform else None

    def _places(self) -> dict[int, list[int]]:
        out: dict[int, list[int]] = {}
        for place, (key, used) in enumerate(zip(self._keys[0].tolist(), self._used[0].tolist(), strict=True)):
            if used:
                out.setdefault(key, []).append(place)
        return out

    def _find(self, function: int, index: int) -> tuple[Any, Mask]:
        """Which entries to look at, and in which rows they are the leaf."""
        key = function | index << 32
        if self._index is not None:
            places = self._index.get(key, [])
            return places, np.ones((len(self.values), len(places)), np.bool_)
        return slice(None), self._used & (self._keys == np.uint64(key))

    def word(self, function: int, index: int, register: int) -> NDArray[np.uint64]:
        """A register of a leaf for each vCPU; 0 where its table has no such leaf."""
        places, found = self._find(function, index)
        at, shift = _PLACE[register]
        values = np.where(found, self.entries[:, places, at] >> np.uint64(shift) & _LOW, np.uint64(0))
        first: NDArray[np.uint64] = values.max(axis=1, initial=0)
        return first

    def change(self, place: tuple[int, int, int], kept: int, also: int | NDArray[np.uint64]) -> None:
        """In place: a register (leaf, subleaf, register) becomes `(value & kept) | also`, where a vCPU has the leaf."""
        function, index, register = place
        places, found = self._find(function, index)
        at, shift = _PLACE[register]
        more = np.broadcast_to(np.asarray(also, np.uint64).reshape(-1, 1), found.shape) << np.uint64(shift)
        stays = np.uint64(kept) << np.uint64(shift) | _LOW << np.uint64(32 - shift)
        old = self.entries[:, places, at]
        self.entries[:, places, at] = np.where(found, old & stays | more, old)


def word(tables: Words, function: int, index: int, register: int) -> NDArray[np.uint64]:
    """A register of a leaf for each vCPU; 0 where its table has no such leaf."""
    return Tables(tables).word(function, index, register)


def user_xcr0(tables: Words) -> NDArray[np.uint64]:
    """XSAVE components that the vCPU's table allows; 0 without leaf 0xd."""
    return word(tables, 0xD, 0, EAX) | word(tables, 0xD, 0, EDX) << np.uint64(32)


def physical_bits(tables: Words) -> NDArray[np.uint64]:
    """Width of a physical address; 36 where the table does not say (cpuid_query_maxphyaddr)."""
    bits = word(tables, 0x8000_0008, 0, EAX) & np.uint64(0xFF)
    return np.where(bits == 0, np.uint64(36), bits)


def _too_many(rows: Rows, values: Words) -> Mask:
    return mask((values[:, 0] & _LOW) > MAX_ENTRIES)


def _beyond(rows: Rows, values: Words) -> Mask:
    return mask((values[:, 0] & _LOW) > (values.shape[1] - 1) // ENTRY)


def _virtual_width(rows: Rows, values: Words) -> Mask:
    width = word(values, 0x8000_0008, 0, EAX) >> np.uint64(8) & np.uint64(0xFF)
    return mask(~np.isin(width, (0, 48, 57)))


def _dynamic_feature(rows: Rows, values: Words) -> Mask:
    return mask((user_xcr0(values) & np.uint64(1 << 18)) != 0)


def _changed(rows: Rows, values: Words) -> Mask:
    """Another table than the vCPU has run with. Padding and the order of the runtime updates don't count."""
    current, asked = rows.get(ID), runtime(rows, values)
    width = max(current.shape[1], asked.shape[1])
    now, new = (np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in (runtime(rows, current), asked))
    return mask(rows.guest.ran[rows.numbers] & (now != new).any(axis=1))


def _not_run_and(test: Mask, rows: Rows) -> Mask:
    return test & ~rows.guest.ran[rows.numbers]


REFUSALS = (
    Refuse("more entries than a table may have", (ID,), errno.E2BIG, _too_many,
           "kvm_vcpu_ioctl_set_cpuid2: KVM_MAX_CPUID_ENTRIES"),
    Refuse("more entries than there are", (ID,), errno.E2BIG, _beyond,
           "not the kernel's: it would read past the buffer, so both backends stop here"),
    Refuse("a table other than the one it has run with", (ID,), errno.EINVAL, _changed,
           "kvm_set_cpuid: kvm_can_set_cpuid_and_feature_msrs, kvm_cpuid_check_equal"),
    Refuse("virtual addresses neither 48 nor 57 bits wide", (ID,), errno.EINVAL,
           lambda rows, values: _not_run_and(_virtual_width(rows, values), rows), "kvm_check_cpuid"),
    Refuse("an XSAVE component that the process has not asked for", (ID,), errno.EPERM,
           lambda rows, values: _not_run_and(_dynamic_feature(rows, values), rows),
           "kvm_check_cpuid: fpu_enable_guest_xfd_features (ARCH_REQ_XCOMP_GUEST_PERM)"),
)


def _forced(rows: Rows, values: Words) -> Words:
    out = values.copy()
    tables = Tables(out)
    for key, (kept, also) in rows.guest.profile.cpuid_forced.items():
        tables.change((key >> 32, key >> 8 & 0xFF_FFFF, key & 0xFF), kept, also)
    rows.guest.widen(ID, out.shape[1])
    return np.pad(out, ((0, 0), (0, rows.get(ID).shape[1] - out.shape[1])))


_XSTATE = 0xD


def _with_xstate(rows: Rows, values: Words) -> Words:
    """The table with all of leaf 0xd behind it, where it has leaf 1 and none of 0xd."""
    leaves = _own_leaves(rows.guest.profile.cpuid_forced, _XSTATE)
    count = (values[:, 0] & _LOW).astype(np.intp)
    keys = values[:, 1::ENTRY][:, :(values.shape[1] - 1) // ENTRY] & _LOW
    used = np.arange(keys.shape[1]) < count[:, np.newaxis]
    lacks = mask((used & (keys == 1)).any(axis=1) & ~(used & (keys == _XSTATE)).any(axis=1))
    if not leaves.size or not lacks.any():
        return values
    out = np.pad(values, ((0, 0), (0, leaves.size)))
    places = 1 + ENTRY * count[lacks, np.newaxis] + np.arange(leaves.size)
    out[np.flatnonzero(lacks)[:, np.newaxis], places] = leaves.reshape(-1)
    out[lacks, 0] += np.uint64(len(leaves))
    return out


def _own_leaves(forced: dict[int, tuple[int, int]], function: int) -> Words:
    """The entries of a leaf of which the kernel makes every word itself, subleaf after subleaf."""
    found: dict[int, list[int]] = {}
    for key, (kept, also) in sorted(forced.items()):
        if key >> 32 == function and not kept:
            found.setdefault(key >> 8 & 0xFF_FFFF, []).append(also)
    rows = [(function | index << 32, 1 | words[EAX] << 32, words[EBX] | words[ECX] << 32, words[EDX], 0)
            for index, words in found.items() if len(words) == len(_PLACE)]
    return np.array(rows, np.uint64).reshape(-1, ENTRY)


KEEPS = (
    Keep("leaf 0xd, where the kernel makes it itself", (ID,), _with_xstate,
         "measured on pvm, whose `cpuid_forced` has the whole leaf; upstream keeps the table as long as it is"),
    Keep("bits that the kernel sets itself", (ID,), _forced, "measured: `cpuid_forced` of the profile"),
)


def _given(rows: Rows, values: Words, before: Words) -> None:
    """A vCPU that ran keeps the table that it ran with: the same one again is compared, and not given."""
    rows.guest.has_cpuid[rows.numbers] |= ~rows.guest.ran[rows.numbers]


AFTERS = (
    After("an empty table is a table", (ID,), _given, "kvm_vcpu_after_set_cpuid: cr4_guest_rsvd_bits; kvm_set_cpuid"),
)


def _xsave_size(rows: Rows, components: NDArray[np.uint64], *, compact: bool) -> NDArray[np.uint64]:
    """Bytes of an XSAVE area with these components (xstate_required_size)."""
    size = np.full(len(components), 576, np.uint64)
    for number, start, length, aligned in extents(rows.guest.profile.cpuid):
        here = (components >> np.uint64(number) & np.uint64(1)) != 0
        step = np.uint64(64 if aligned else 1)
        packed = (size + step - np.uint64(1)) // step * step + np.uint64(length)
        size = np.where(here, packed if compact else np.maximum(size, np.uint64(start + length)), size)
    return size


def extents(table: bytes) -> list[tuple[int, int, int, bool]]:
    """XSAVE components from 2 on: (number, offset, bytes, 64-byte aligned when compacted), from a CPUID table."""
    out = []
    for entry in np.frombuffer(table, np.uint32, offset=8).reshape(-1, 10).tolist():
        function, index, _, eax, ebx, ecx = entry[:6]
        if function == 0xD and index >= 2 and eax:
            out.append((index, ebx, eax, bool(ecx & 2)))
    return out


def runtime(rows: Rows, values: Words) -> Words:
    """The table with the bits that follow other registers (kvm_update_cpuid_runtime)."""
    out = values.copy()
    sregs, xcr0 = rows.get(x86_64.SREGS2.id), rows.get(x86_64.XCRS.id)[:, 2]
    osxsave = (sregs[:, 31] >> np.uint64(18) & np.uint64(1)) << np.uint64(27)
    apic = (sregs[:, 34] >> np.uint64(11) & np.uint64(1)) << np.uint64(9)
    ospke = (sregs[:, 31] >> np.uint64(22) & np.uint64(1)) << np.uint64(4)
    tables = Tables(out)
    tables.change((1, 0, ECX), _ALL & ~(1 << 27), osxsave)
    tables.change((1, 0, EDX), _ALL & ~(1 << 9), apic)
    tables.change((7, 0, ECX), _ALL & ~(1 << 4), ospke)
    tables.change((0xD, 0, EBX), 0, _xsave_size(rows, xcr0, compact=False))
    if (tables.word(0xD, 1, EAX) & np.uint64(0b1010)).any():
        tables.change((0xD, 1, EBX), 0, _xsave_size(rows, xcr0, compact=True))
    return out


SHOWS = (
    Show("bits that follow other registers", (ID,), runtime, "kvm_update_cpuid_runtime: CR4, APIC base, XCR0"),
)
