"""Values that no rule was made from: what a VMM may have set before the first run, by a seed.

Two uses. A guest is *varied*: before it runs, its own kernel is asked to take other values, and what it takes is what
the stream has. A stream is *forged*: its feature and identity registers are given values that perhaps no kernel would
have saved; only what a target says to each is then of interest.
"""

from __future__ import annotations

import fnmatch
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import TYPE_CHECKING

from migstream.backends.base import Vm
from migstream.contract import PINNED
from migstream.host.scratch import Scratch
from migstream.model import Bank, Scope, Slot
from migstream.registers import arm64_ids, ids, vcpu_features, x86_64
from migstream.registers.bit_tables import BITS
from migstream.registers.bits import Field
from migstream.registers.catalogue import Register, lookup
from migstream.registers.cpuid import FEATURE_WORDS, RUNTIME_BITS
from migstream.verdicts.x86_64 import ADDRESSES, FLAGS

if TYPE_CHECKING:
    from migstream.model import Words

Change = Callable[[Random, Register, int], int]

PSCI_VERSIONS = (1, 2, 0x1_0000, 0x1_0001, 0x1_0002, 0x1_0003, 0x1_0004, 0x2_0000)
_MODES = (0, 4, 5, 8, 9, 0x10, 0x13, 0xC, 0xD)


def _psci(dice: Random, row: Register, value: int) -> int:
    return dice.choice(PSCI_VERSIONS)


def _level(dice: Random, row: Register, value: int) -> int:
    return dice.choice((0, 1, 2, 3, 4, 0x12, 0x13))


def _bitmap(dice: Random, row: Register, value: int) -> int:
    return dice.getrandbits(3) if dice.random() < 0.8 else 1 << dice.randrange(64)


def _lengths(dice: Random, row: Register, value: int) -> int:
    """All lengths up to some maximum; now and then one too many or too few."""
    below = value & (2 << dice.randrange(value.bit_length() or 1)) - 1
    return below if dice.random() < 0.7 else below ^ 1 << dice.randrange(16)


def _flip(dice: Random, row: Register, value: int) -> int:
    width = 8 * (row.size or 8)
    return value ^ 1 << dice.randrange(width) ^ (1 << dice.randrange(width) if dice.random() < 0.3 else 0)


def _mode(dice: Random, row: Register, value: int) -> int:
    return value & ~0x1F | dice.choice(_MODES)


def _revision(dice: Random, row: Register, value: int) -> int:
    return value & ~0xF000 | dice.randrange(6) << 12 if dice.random() < 0.8 else _flip(dice, row, value)


def _fields(dice: Random, row: Register, value: int) -> int:
    """One field or two lowered, or something else; bits without a name now and then."""
    table = BITS.get(row.bits, ())
    if not table or dice.random() < 0.1:
        return _flip(dice, row, value)
    for _ in range(1 + (dice.random() < 0.3)):
        value = _field(dice, dice.choice(table), value)
    return value


def _field(dice: Random, field: Field, value: int) -> int:
    now, kind = (value & field.mask) >> field.low, dice.random()
    lower = dice.randrange(now) if now else 0
    wanted = lower if kind < 0.6 else 0 if kind < 0.7 else min(now + 1, (1 << field.width) - 1) if kind < 0.8 \
        else dice.getrandbits(field.width)
    return value & ~field.mask | wanted << field.low


def _cpuid(dice: Random, row: Register, value: int) -> int:
    """A feature bit or two of a struct kvm_cpuid2 flipped, but for those that a vCPU's own state decides."""
    size = (value.bit_length() + 7) // 8
    table = value.to_bytes(size, "little")
    entries = {struct.unpack_from("<II", table, at): at for at in range(8, size - 39, 40)}
    words = [word for word in sorted(FEATURE_WORDS) if word[:2] in entries]
    for leaf, subleaf, word in (dice.choice(words) for _ in range(dice.randrange(1, 4))):
        bit = 1 << dice.randrange(32) & ~RUNTIME_BITS.get((leaf, subleaf, word), 0)
        value ^= bit << 8 * (entries[leaf, subleaf] + 12 + 4 * word)
    return value


def _khz(dice: Random, row: Register, value: int) -> int:
    return dice.choice((value // 2, value - 1, value + 1, value + value // 8, 2 * value, 1000))


def _types(dice: Random, row: Register, value: int) -> int:
    """Memory types of MSR_IA32_CR_PAT; now and then one that there is not."""
    kinds = (0, 1, 4, 5, 6, 7) if dice.random() < 0.7 else (0, 1, 2, 3, 4, 5, 6, 7, 0x10)
    return int.from_bytes(bytes(dice.choice(kinds) for _ in range(8)), "little")


def _address(dice: Random, row: Register, value: int) -> int:
    """Of 48 bits, of 57, or of none."""
    width = dice.choice((48, 48, 57, 64))
    number = dice.getrandbits(width)
    return number | (1 << 64) - (1 << width) if number >> width - 1 else number


def _flags(dice: Random, row: Register, value: int) -> int:
    """One to three bits flipped, named ones and low ones more often."""
    named = [field.low for field in BITS.get(row.bits, ())] or [dice.randrange(64)]
    for _ in range(dice.randrange(1, 4)):
        kind = dice.random()
        value ^= 1 << (dice.choice(named) if kind < 0.4 else dice.randrange(20) if kind < 0.8 else dice.randrange(64))
    return value


CHANGES: tuple[tuple[str, Change], ...] = (
    ("PSCI_VERSION", _psci), ("SMCCC_ARCH_WORKAROUND_?", _level), ("*_BMAP *_BMAP_2", _bitmap), ("SVE_VLS", _lengths),
    ("GICD_IIDR", _revision), ("PSTATE", _mode),
    ("KVM_CPUID2", _cpuid), ("KVM_TSC_KHZ", _khz), ("MSR_IA32_CR_PAT", _types), (ADDRESSES, _address), (FLAGS, _flags),
    ("MSR_IA32_UCODE_REV MPIDR_EL1 KVM_*", lambda dice, row, value: value),
    ("CCSIDR* CLIDR_EL1 MIDR_EL1 REVIDR_EL1 AIDR_EL1 MSR_*", _flip), ("*", _fields))
"""By register name, the first that fits. What is each vCPU's own place, or a structure, stays."""

MSRS = (
    "MSR_IA32_SPEC_CTRL", "MSR_IA32_MISC_ENABLE", "MSR_IA32_XSS", "MSR_IA32_TSX_CTRL", "MSR_MISC_FEATURES_ENABLES",
    "MSR_K7_HWCR", "MSR_KVM_POLL_CONTROL", "MSR_KVM_MIGRATION_CONTROL", "MSR_VM_CR", "MSR_IA32_CR_PAT",
    "MSR_IA32_DEBUGCTLMSR", "MSR_MTRR*", "MSR_IA32_MCG_*", "MSR_IA32_MC?_*", "MSR_K7_EVNTSEL*", "MSR_K7_PERFCTR*",
    "MSR_F15H_*", "MSR_AMD64_*", "MSR_TSC_AUX", "MSR_STAR", "MSR_CSTAR", "MSR_SYSCALL_MASK", "MSR_IA32_SYSENTER_CS")
"""x86-64: state whose change the demo guest does not feel; its values differ from host to host of a fleet."""


def _change_of(name: str) -> Change:
    return next(change for globs, change in CHANGES
                if any(fnmatch.fnmatchcase(name, glob) for glob in globs.split()))


def altered(dice: Random, id: int, value: bytes) -> bytes:
    """Another value for a register; the same one now and then."""
    row = lookup(id)
    number = _change_of(row.name)(dice, row, int.from_bytes(value, "little"))
    return (number & (1 << 8 * len(value)) - 1).to_bytes(len(value), "little")


STATE = (f"PSTATE OSLSR_EL1 PMCR_EL0 PMEV* PMCC* PMUSERENR_EL0 PMSELR_EL0 VBAR_EL1 SCTLR_EL1 FPCR GICD_IIDR {FLAGS} "
         f"{ADDRESSES} MSR_IA32_CR_PAT KVM_CPUID2 KVM_TSC_KHZ").split()
"""What is forged besides features and identities: what rules judge by value, and some that they don't. Not registers
that share their storage (PMCNTENSET and PMCNTENCLR): no kernel saves two values for one."""


@cache
def eligible(id: int) -> bool:
    """Whether a register's values are forged: a number of the prologue that is pinned, and what `STATE` names."""
    row = lookup(id)
    if any(fnmatch.fnmatchcase(row.name, glob) for glob in STATE):
        return True
    return row.klass in PINNED and row.phase.prologue and ids.capability_number(id) is None \
        and (not row.struct or row.name == "SVE_VLS") and ids.msr_index(id) is None


def forge(dice: Random, banks: Sequence[Bank]) -> dict[int, bytes]:
    """New values for most of the eligible registers of a stream, by id: the same for all vCPUs."""
    values = {slot.id: bank.raw(0, column) for bank in banks for column, slot in enumerate(bank.layout.slots)
              if eligible(slot.id)}
    return {id: changed for id, value in values.items()
            if dice.random() < 0.8 and (changed := altered(dice, id, value)) != value}


def with_values(banks: Sequence[Bank], values: Mapping[int, bytes]) -> list[Bank]:
    """Copies of the banks in which these registers have these values on every vCPU."""
    return [replace(bank, values=_replaced(bank, values)) for bank in banks]


def _replaced(bank: Bank, values: Mapping[int, bytes]) -> Words:
    import numpy as np

    out = bank.values.copy()
    for column, slot in enumerate(bank.layout.slots):
        if (value := values.get(slot.id)) is not None:
            start, end = bank.layout.offsets[column:column + 2]
            out[:, start:end] = np.frombuffer(value.ljust(slot.words * 8, b"\0"), np.uint64)
    return out


def vary(dice: Random, vm: Vm) -> list[str]:
    """Ask a VM that never ran to take other values, a few for each register; names of those that are now different."""
    scratch = Scratch(vm, vm.machine.vcpus)
    if int(vm.machine.devices.get("vcpu_features", 0)) & vcpu_features.SVE:  # before the list is asked for: it closes
        _try(dice, scratch, Slot(arm64_ids.SVE_VLS, 64), Scope.VCPU)
    wanted = [(slot, layout.scope) for layout in vm.layouts()[0] for slot in layout.slots if _varied(slot.id)]
    return [lookup(slot.id).name for slot, scope in wanted if _try(dice, scratch, slot, scope)]


def _try(dice: Random, scratch: Scratch, slot: Slot, scope: Scope) -> bool:
    """Offer a register some values; whether it has another one now."""
    vcpus = [None] if scope == Scope.VM else range(scratch.vcpus)
    before = scratch.read(slot.id, slot.size, vcpus[0])
    if isinstance(before, int):
        return False
    for _ in range(4):
        value = altered(dice, slot.id, before)
        if value != before and not any([scratch.write(slot.id, value, vcpu) for vcpu in vcpus]):
            break
    return scratch.read(slot.id, slot.size, vcpus[0]) != before


def _varied(id: int) -> bool:
    row = lookup(id)
    pinned = row.klass in PINNED and eligible(id) and id not in (x86_64.CPUID2.id, x86_64.TSC_KHZ.id)
    return pinned or any(fnmatch.fnmatchcase(row.name, glob) for glob in MSRS)
