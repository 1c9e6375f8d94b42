"""Ask a host what it offers, by trial where there is nobody to ask. Everything happens on scratch VMs of its own.

The backend comes in as an object: this layer is below the backends and only says (as protocols) what it uses of one.
Nothing here runs a guest, so the trials may put nonsense into registers.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from migstream.errors import MigstreamError, UsageError
from migstream.host.profile import HostProfile, cpuid_word
from migstream.model import Arch, Klass, Layout, Machine, MemoryRegion, Slot
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from types import TracebackType

    from migstream.model import Words

DEVICES = {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}
"""What the scratch VM has: all that KVM emulates, and the TSS address that some Intel hosts want."""

_U64 = (1 << 64) - 1
_ENTRY = 40


class Refused(Protocol):
    """What a host says no with; see `migstream.backends.base.Refusal`."""

    @property
    def register(self) -> int:
        """Id of the register."""

    @property
    def errno(self) -> int:
        """The kernel's number, or -1 for a short count."""


class ScratchVm(Protocol):
    """What a probe does with a VM; see `migstream.backends.base.Vm`."""

    def create_vcpus(self) -> None:
        """Create the vCPUs."""

    def layouts(self) -> tuple[tuple[Layout, ...], Sequence[Refused]]:
        """What can be saved, and what is listed and can't be read."""

    def read(self, layout: Layout, first_vcpu: int, values: Words) -> Sequence[Refused]:
        """Fill `values`."""

    def write(self, layout: Layout, first_vcpu: int, values: Words) -> Sequence[Refused]:
        """Write `values`."""

    def __enter__(self) -> Any:
        """Give the VM itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None, /) -> None:
        """Close it."""


class Host(Protocol):
    """What a probe does with a backend; see `migstream.backends.base.Backend`."""

    def profile(self) -> HostProfile:
        """What the host says of itself without a VM."""

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> ScratchVm:
        """Make a VM without vCPUs."""


@dataclass(frozen=True, slots=True)
class _Scratch:
    """A VM with one vCPU and access to single registers of it."""

    vm: ScratchVm

    def read(self, id: int, size: int) -> bytes | int:
        """The register's value, or the errno of the refusal."""
        layout, values = _alone(id, size)
        refused = self.vm.read(layout, 0, values)
        return refused[0].errno if refused else values.tobytes()[:size]

    def write(self, id: int, value: bytes) -> int:
        """0, or the errno of the refusal."""
        layout, values = _alone(id, len(value))
        values.view("u1")[0, :len(value)] = memoryview(value)
        refused = self.vm.write(layout, 0, values)
        return refused[0].errno if refused else 0

    def number(self, id: int) -> int | None:
        """A 64-bit register as a number; None where it can't be read."""
        value = self.read(id, 8)
        return int.from_bytes(value, "little") if isinstance(value, bytes) else None

    def put(self, id: int, number: int) -> int:
        """Write a 64-bit register; 0, or the errno of the refusal."""
        return self.write(id, number.to_bytes(8, "little"))


def _alone(id: int, size: int) -> tuple[Layout, Words]:
    import numpy as np

    row = lookup(id)
    layout = Layout(row.scope, row.phase, (Slot(id, size),))
    return layout, np.zeros((1, layout.row_words), np.uint64)


@contextmanager
def _scratch(host: Host, cpuid: bytes = b"",
             enabled_caps: dict[int, tuple[int, ...]] | None = None) -> Iterator[_Scratch]:
    """A VM with one vCPU that never runs; with the CPUID table given, or without one. Raises: BackendError."""
    machine = Machine(host.profile().arch, 1, (MemoryRegion(0, 1 << 20),), DEVICES)
    with host.create(machine, enabled_caps) as vm:
        vm.create_vcpus()
        scratch = _Scratch(vm)
        if cpuid:
            scratch.write(x86_64.CPUID2.id, cpuid)
        yield scratch


def capture(host: Host, command: str) -> HostProfile:
    """Return the complete profile of a host.

    Args:
        host: a backend. command: what made the profile, kept in it as `made_by`.

    Raises: UsageError for an architecture that can't be probed yet; BackendError, BackendUnavailable.
    """
    base = host.profile()
    if base.arch != Arch.X86_64:
        raise UsageError(f"can't probe {base.arch.label} hosts yet")
    with _scratch(host) as fresh:
        defaults, unreadable = _defaults(fresh, base)
    with _scratch(host, base.cpuid) as ready:
        refused = _refusals(ready, defaults, unreadable)
    return dataclasses.replace(
        base, defaults=defaults, refused=refused, msr_bits=_msr_bits(host, base),
        cpuid_forced=_cpuid_forced(host, base), enable_caps=_enable_caps(host),
        behaviour={trial.name: trial.run(host, base) for trial in TRIALS}, made_by=command)


def _defaults(scratch: _Scratch, base: HostProfile) -> tuple[dict[int, bytes], list[Refused]]:
    """Every register of every layout, and the older form of those that have two."""
    layouts, unreadable = scratch.vm.layouts()
    sizes = {slot.id: slot.size for layout in layouts for slot in layout.slots}
    if x86_64.SREGS2.id in sizes:
        sizes[x86_64.SREGS.id] = x86_64.SREGS.size or 0
    values = {id: scratch.read(id, size) for id, size in sizes.items()}
    return {id: value for id, value in values.items() if isinstance(value, bytes)}, list(unreadable)


def _refusals(scratch: _Scratch, defaults: dict[int, bytes], unreadable: list[Refused]) -> dict[int, tuple[int, int]]:
    found = {no.register: (no.errno, scratch.put(no.register, 0)) for no in unreadable}
    for id in defaults:
        value = scratch.read(id, 8) if ids.msr_index(id) is not None else b""
        if isinstance(value, bytes) and value and (errno := scratch.write(id, value)):
            found[id] = (0, errno)
    return found


def _msr_bits(host: Host, base: HostProfile) -> dict[int, tuple[int, int]]:
    with _scratch(host, base.cpuid) as scratch:
        return {index: _taken_kept(scratch, id) for index in base.msrs
                if lookup(id := ids.msr_id(index)).klass != Klass.CLOCK}


def _taken_kept(scratch: _Scratch, id: int) -> tuple[int, int]:
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
    with _scratch(host, base.cpuid) as scratch:
        found = {}
        for offset in range(8, len(base.cpuid), _ENTRY):
            function, index = struct.unpack_from("<II", base.cpuid, offset)
            for register in range(4):
                masks = _forced_word(scratch, base.cpuid, offset + 12 + 4 * register)
                if masks != (0xFFFF_FFFF, 0):
                    found[cpuid_word(function, index, register)] = masks
    return found


def _forced_word(scratch: _Scratch, table: bytes, at: int) -> tuple[int, int]:
    """(kept, set) of one word. A host that refuses all ones there is taken to keep what it does not set."""
    zeros, ones = (_cpuid_through(scratch, table, at, value) for value in (0, 0xFFFF_FFFF))
    if zeros is None:
        return 0xFFFF_FFFF, 0
    if ones is None:
        return (0, zeros) if zeros else (0xFFFF_FFFF, 0)
    return ones & ~zeros, zeros


def _cpuid_through(scratch: _Scratch, table: bytes, at: int, value: int) -> int | None:
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
        with _scratch(host, enabled_caps={capability: (argument,)}):
            return True
    except MigstreamError:
        return False


_FAR = 1 << 40
"""Ticks: about six minutes at 3 GHz; no trial takes as long."""


def _tsc_follows(host: Host, base: HostProfile) -> int:
    with _scratch(host, base.cpuid) as scratch:
        tsc = ids.msr_id(0x10)
        target = (scratch.number(tsc) or 0) + _FAR
        return int(not scratch.put(tsc, target) and 0 <= (scratch.number(tsc) or 0) - target < _FAR // 2)


def _tsc_offset_kept(host: Host, base: HostProfile) -> int:
    with _scratch(host, base.cpuid) as scratch:
        id = x86_64.TSC_OFFSET.id
        return int(not scratch.put(id, _FAR) and scratch.number(id) == _FAR)


def _smm(host: Host, base: HostProfile) -> int:
    with _scratch(host, base.cpuid) as scratch:
        events = scratch.read(x86_64.VCPU_EVENTS.id, 64)
        assert isinstance(events, bytes)
        return int(not scratch.write(x86_64.VCPU_EVENTS.id, events[:24] + b"\1" + events[25:]))


def _long_mode(scratch: _Scratch) -> bytearray:
    """KVM_SREGS for 64-bit mode: some bits are refused outside of it."""
    sregs = scratch.read(x86_64.SREGS.id, x86_64.SREGS.size or 0)
    assert isinstance(sregs, bytes)
    out = bytearray(sregs)
    for word, value in ((CR0, 0x8001_0033), (CR3, 0), (CR4, 0x20), (EFER, 0x500)):
        struct.pack_into("<Q", out, 8 * word, value)
    return out


CR0, CR2, CR3, CR4, CR8, EFER, APIC_BASE = 28, 29, 30, 31, 32, 33, 34
"""64-bit words of struct kvm_sregs and kvm_sregs2."""

PDPTRS_VALID, PDPTRS = 35, 36
"""64-bit words of struct kvm_sregs2 alone: the flag, the first of four."""

RFLAGS = 17
"""64-bit word of struct kvm_regs."""


def _sregs_taken(host: Host, base: HostProfile, word: int) -> int:
    """Bits of a control register that may be flipped in 64-bit mode."""
    with _scratch(host, base.cpuid) as scratch:
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
    with _scratch(host, base.cpuid) as scratch:
        scratch.write(x86_64.SREGS.id, bytes(_long_mode(scratch)))
        for bit in (1 << n for n in range(64)):
            refused = scratch.write(x86_64.REGS.id, struct.pack("<18Q", *(0,) * RFLAGS, bit))
            back = scratch.read(x86_64.REGS.id, 144)
            assert isinstance(back, bytes)
            kept |= 0 if refused else struct.unpack_from("<Q", back, 8 * RFLAGS)[0] & bit
    return kept


def _pdptrs_kept(host: Host, base: HostProfile) -> int:
    if not base.capabilities.get("SREGS2"):
        return 0
    with _scratch(host, base.cpuid) as scratch:
        sregs = bytearray(_long_mode(scratch).ljust(320, b"\0"))
        for word, value in ((EFER, 0), (CR0, 0x8000_0011), (PDPTRS_VALID, 1), (PDPTRS, 0x1001)):
            struct.pack_into("<Q", sregs, 8 * word, value)
        scratch.write(x86_64.SREGS2.id, bytes(sregs))
        back = scratch.read(x86_64.SREGS2.id, 320)
        assert isinstance(back, bytes)
        return int(struct.unpack_from("<Q", back, 8 * PDPTRS)[0] == 0x1001)


@dataclass(frozen=True, slots=True)
class Trial:
    """One behaviour that is found by trying: its name in `HostProfile.behaviour`, how, and what the number means."""

    name: str
    run: Callable[[Host, HostProfile], int]
    meaning: str


TRIALS: tuple[Trial, ...] = (
    Trial("tsc_follows", _tsc_follows, "1: MSR_IA32_TSC goes on from a written value; 0: a write is taken and ignored"),
    Trial("tsc_offset_kept", _tsc_offset_kept, "1: KVM_VCPU_TSC_OFFSET reads back; 0: a write is taken and ignored"),
    Trial("smm", _smm, "1: KVM_VCPU_EVENTS may say that the vCPU is in system management mode (CONFIG_KVM_SMM)"),
    Trial("cr4_taken", _cr4_taken, "bits that CR4 may have in 64-bit mode, with the supported CPUID"),
    Trial("efer_taken", _efer_taken, "bits that EFER may have in KVM_SET_SREGS"),
    Trial("pdptrs_kept", _pdptrs_kept, "1: KVM_GET_SREGS2 gives PAE page-directory pointers; 0: takes and drops them"),
    Trial("rflags_kept", _rflags_kept, "bits of RFLAGS that read back as written"),
)
"""A kernel that differs in one of these differs in this number, not in the simulator's code."""
