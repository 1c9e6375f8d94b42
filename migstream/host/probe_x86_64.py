"""What only an x86-64 host is asked: MSRs by bit, CPUID as it reads back, capabilities, and behaviour by trial."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from migstream.errors import MigstreamError
from migstream.host import experiment
from migstream.host.profile import HostProfile, cpuid_word
from migstream.host.scratch import Host, Refused, Scratch, scratch_vm
from migstream.model import Klass
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup

_ENTRY = 40


def probe(host: Host, experiments: bool) -> HostProfile:
    """Return the profile of an x86-64 host. Raises: BackendError."""
    base = host.profile()
    with scratch_vm(host) as fresh:
        defaults, unreadable = _defaults(fresh, base)
    with _ready(host, base) as ready:
        refused = _refusals(ready, defaults, unreadable)
    found = dataclasses.replace(base, **experiment.UNTRIED, defaults=defaults, refused=refused)
    return _experiments(host, found) if experiments else found


def _experiments(host: Host, base: HostProfile) -> HostProfile:
    found = dataclasses.replace(
        base, msr_bits=_msr_bits(host, base), cpuid_forced=_cpuid_forced(host, base), enable_caps=_enable_caps(host),
        behaviour={trait.name: trait.run(host, base) for trait in TRAITS})
    return _scopes(host, found)


@contextmanager
def _ready(host: Host, base: HostProfile, vcpus: int = 1) -> Iterator[Scratch]:
    """A scratch VM whose vCPUs have the CPUID that the host supports."""
    with scratch_vm(host, vcpus) as scratch:
        for vcpu in range(vcpus):
            scratch.write(x86_64.CPUID2.id, base.cpuid, vcpu)
        yield scratch


PREPARE = (
    (0x4000_0000, 1, "HV_X64_MSR_GUEST_OS_ID: a hypercall page is only taken from a guest that has said who it is"),
)
"""(MSR, value, reason): written before the scope experiment, because others depend on it."""


def _scopes(host: Host, base: HostProfile) -> HostProfile:
    """Scope of every MSR, and what may still change after the first run."""
    listed = [ids.msr_id(index) for index in dict.fromkeys((*base.msrs, *base.feature_msrs))]
    with _ready(host, base, experiment.VCPUS) as scratch:
        readable = [id for id in listed if isinstance(scratch.read(id, 8, 0), bytes)]
        for index, value, _ in PREPARE:
            scratch.write(ids.msr_id(index), value.to_bytes(8, "little"), 0)
        trials = {id: experiment.try_bits(scratch, id, 8) for id in readable}
        scopes = experiment.scopes(scratch, trials)
    with _ready(host, base, experiment.VCPUS) as scratch:
        after = experiment.after_run(scratch, trials).errnos
    return experiment.recorded(base, trials, scopes, after)


def _defaults(scratch: Scratch, base: HostProfile) -> tuple[dict[int, bytes], list[Refused]]:
    """Every register of every layout, and the older form of those that have two."""
    layouts, unreadable = scratch.vm.layouts()
    sizes = {slot.id: slot.size for layout in layouts for slot in layout.slots}
    if x86_64.SREGS2.id in sizes:
        sizes[x86_64.SREGS.id] = x86_64.SREGS.size or 0
    values = {id: scratch.read(id, size) for id, size in sizes.items()}
    return {id: value for id, value in values.items() if isinstance(value, bytes)}, list(unreadable)


def _refusals(scratch: Scratch, defaults: dict[int, bytes], unreadable: list[Refused]) -> dict[int, tuple[int, int]]:
    found = {no.register: (no.errno, scratch.put(no.register, 0)) for no in unreadable}
    for id in defaults:
        value = scratch.read(id, 8) if ids.msr_index(id) is not None else b""
        if isinstance(value, bytes) and value and (errno := scratch.write(id, value)):
            found[id] = (0, errno)
    return found


def _msr_bits(host: Host, base: HostProfile) -> dict[int, tuple[int, int]]:
    with _ready(host, base) as scratch:
        return {index: _taken_kept(scratch, id) for index in base.msrs
                if lookup(id := ids.msr_id(index)).klass != Klass.CLOCK}


def _taken_kept(scratch: Scratch, id: int) -> tuple[int, int]:
    """The bits that are taken one at a time, and those that are there afterwards; leaves the register as it was."""
    before, taken, kept = scratch.number(id), 0, 0
    for bit in (1 << n for n in range(64)):
        if not scratch.put(id, bit):
            taken |= bit
            kept |= (scratch.number(id) or 0) & bit
    scratch.put(id, before or 0)
    return taken, kept


def _cpuid_forced(host: Host, base: HostProfile) -> dict[int, tuple[int, int]]:
    """Write each word of the table as 0 and as all ones, and see what reads back."""
    with _ready(host, base) as scratch:
        found = {}
        for offset in range(8, len(base.cpuid), _ENTRY):
            function, index = struct.unpack_from("<II", base.cpuid, offset)
            for register in range(4):
                masks = _forced_word(scratch, base.cpuid, offset + 12 + 4 * register)
                if masks != (0xFFFF_FFFF, 0):
                    found[cpuid_word(function, index, register)] = masks
    return found


def _forced_word(scratch: Scratch, table: bytes, at: int) -> tuple[int, int]:
    """(kept, set) of one word. A host that refuses all ones there is taken to keep what it does not set."""
    zeros, ones = (_cpuid_through(scratch, table, at, value) for value in (0, 0xFFFF_FFFF))
    if zeros is None:
        return 0xFFFF_FFFF, 0
    if ones is None:
        return (0, zeros) if zeros else (0xFFFF_FFFF, 0)
    return ones & ~zeros, zeros


def _cpuid_through(scratch: Scratch, table: bytes, at: int, value: int) -> int | None:
    changed = table[:at] + struct.pack("<I", value) + table[at + 4:]
    if scratch.write(x86_64.CPUID2.id, changed):
        return None
    back = scratch.read(x86_64.CPUID2.id, len(changed))
    return int(struct.unpack_from("<I", back, at)[0]) if isinstance(back, bytes) else None


VM_CAPS = (116, 129, 143, 147, 159, 164, 168, 186, 188, 195, 213, 218, 219, 220)
"""VM capabilities of x86 that KVM_ENABLE_CAP may take with a small first argument (include/uapi/linux/kvm.h)."""


def _enable_caps(host: Host) -> dict[int, int]:
    return {cap: sum(1 << bit for bit in range(16) if _enables(host, cap, 1 << bit))
            for cap in VM_CAPS if _enables(host, cap, 0)}


def _enables(host: Host, capability: int, argument: int) -> bool:
    try:
        with scratch_vm(host, enabled_caps={capability: (argument,)}):
            return True
    except MigstreamError:
        return False


_FAR = 1 << 40
"""Ticks: about six minutes at 3 GHz; no trial takes as long."""


def _tsc_follows(host: Host, base: HostProfile) -> int:
    with _ready(host, base) as scratch:
        tsc = ids.msr_id(0x10)
        target = (scratch.number(tsc) or 0) + _FAR
        return int(not scratch.put(tsc, target) and 0 <= (scratch.number(tsc) or 0) - target < _FAR // 2)


def _tsc_offset_kept(host: Host, base: HostProfile) -> int:
    with _ready(host, base) as scratch:
        id = x86_64.TSC_OFFSET.id
        return int(not scratch.put(id, _FAR) and scratch.number(id) == _FAR)


def _smm(host: Host, base: HostProfile) -> int:
    with _ready(host, base) as scratch:
        events = scratch.read(x86_64.VCPU_EVENTS.id, 64)
        assert isinstance(events, bytes)
        return int(not scratch.write(x86_64.VCPU_EVENTS.id, events[:24] + b"\1" + events[25:]))


def _long_mode(scratch: Scratch) -> bytearray:
    """KVM_SREGS for 64-bit mode: some bits are refused outside of it."""
    sregs = scratch.read(x86_64.SREGS.id, x86_64.SREGS.size or 0)
    assert isinstance(sregs, bytes)
    out = bytearray(sregs)
    for word, value in ((CR0, 0x8001_0033), (CR3, 0), (CR4, 0x20), (EFER, 0x500)):
        struct.pack_into("<Q", out, 8 * word, value)
    return out


CR0, CR2, CR3, CR4, CR8, EFER, APIC_BASE = 28, 29, 30, 31, 32, 33, 34
"""64-bit words of struct kvm_sregs and kvm_sregs2."""

RFLAGS = 17
"""64-bit word of struct kvm_regs."""


def _sregs_taken(host: Host, base: HostProfile, word: int) -> int:
    """Bits of a control register that may be flipped in 64-bit mode."""
    with _ready(host, base) as scratch:
        sregs, taken = _long_mode(scratch), 0
        for bit in range(64):
            changed = bytearray(sregs)
            changed[8 * word + bit // 8] ^= 1 << bit % 8
            taken |= (not scratch.write(x86_64.SREGS.id, bytes(changed))) << bit
    return taken


def _cr4_taken(host: Host, base: HostProfile) -> int:
    return _sregs_taken(host, base, CR4) | 0x20


def _efer_taken(host: Host, base: HostProfile) -> int:
    return _sregs_taken(host, base, EFER) | 0x500


def _rflags_kept(host: Host, base: HostProfile) -> int:
    kept = 0
    with _ready(host, base) as scratch:
        scratch.write(x86_64.SREGS.id, bytes(_long_mode(scratch)))
        for bit in (1 << n for n in range(64)):
            refused = scratch.write(x86_64.REGS.id, struct.pack("<18Q", *(0,) * RFLAGS, bit))
            back = scratch.read(x86_64.REGS.id, 144)
            assert isinstance(back, bytes)
            kept |= 0 if refused else struct.unpack_from("<Q", back, 8 * RFLAGS)[0] & bit
    return kept


def _legacy_paging(host: Host, base: HostProfile) -> int:
    with _ready(host, base) as scratch:
        sregs = _long_mode(scratch)
        for word, value in ((EFER, 0), (CR0, _PAGING), (CR4, 0)):
            struct.pack_into("<Q", sregs, 8 * word, value)
        refused = scratch.write(x86_64.SREGS.id, bytes(sregs))
        back = scratch.read(x86_64.SREGS.id, x86_64.SREGS.size or 0)
        assert isinstance(back, bytes)
        return int(not refused and struct.unpack_from("<Q", back, 8 * CR0)[0] == _PAGING)


_PAGING = 0x8000_0011
"""CR0: PG, ET, PE."""


@dataclass(frozen=True, slots=True)
class Trait:
    """One behaviour that is found by trying: its name in `HostProfile.behaviour`, how, and what the number means."""

    name: str
    run: Callable[[Host, HostProfile], int]
    meaning: str


TRAITS: tuple[Trait, ...] = (
    Trait("tsc_follows", _tsc_follows, "1: MSR_IA32_TSC goes on from a written value; 0: a write is taken and ignored"),
    Trait("tsc_offset_kept", _tsc_offset_kept, "1: KVM_VCPU_TSC_OFFSET reads back; 0: a write is taken and ignored"),
    Trait("smm", _smm, "1: KVM_VCPU_EVENTS may say that the vCPU is in system management mode (CONFIG_KVM_SMM)"),
    Trait("cr4_taken", _cr4_taken, "bits that CR4 may have in 64-bit mode, with the supported CPUID"),
    Trait("efer_taken", _efer_taken, "bits that EFER may have in KVM_SET_SREGS"),
    Trait("legacy_paging", _legacy_paging,
          "1: CR0.PG outside of 64-bit mode stays; 0: it is taken, cleared, and the vCPU has a triple fault pending"),
    Trait("rflags_kept", _rflags_kept, "bits of RFLAGS that read back as written"),
)
"""A kernel that differs in one of these differs in this number, not in the simulator's code."""
