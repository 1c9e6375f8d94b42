"""The state of one simulated arm64 VM: a matrix for each register, vCPU by 64-bit word.

What a kernel keeps once a VM has one row, and it is stored as the difference from the value that a vCPU with these
features is made with: kernels that let vCPUs differ in features show each its own ID registers, and still keep what
was changed in them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.vgic import Vgic
from migstream.backends.sim.msr_rule import version
from migstream.host.profile import FIXED
from migstream.registers import gic, vcpu_features
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.rules import Rule
    from migstream.backends.sim.clock import HostClock
    from migstream.host.profile import HostProfile
    from migstream.model import Machine, Words

    Mask = NDArray[np.bool_]
    Errnos = NDArray[np.int64]

NO_FEATURES = -1
"""Features of a vCPU that KVM_ARM_VCPU_INIT was not called for."""

_U64 = (1 << 64) - 1
_NARROW_RESETS = {ids.PSTATE: 0x1D3}
"""Of a vCPU whose EL1 is AArch32: VCPU_RESET_PSTATE_SVC."""

_TIMER_LINES = {0: 27, 1: 30, 2: 28, 3: 26}
"""KVM_ARM_VCPU_TIMER_IRQ_VTIMER, _PTIMER, _HVTIMER, _HPTIMER: the PPIs that a VM starts with (arch_timer.c)."""


FEATURE_FIELDS: tuple[tuple[int, int, int, str], ...] = (
    (ids.ID_AA64PFR0, 0xF << 32, vcpu_features.SVE, "SVE"),
    (ids.ID_AA64ZFR0, _U64, vcpu_features.SVE, "all of it: SVE"),
    (ids.ID_AA64ISAR1, 0xFF << 4 | 0xFF << 24, vcpu_features.PTRAUTH, "APA, API, GPA, GPI"),
    (ids.ID_AA64DFR0, 0xF << 8, vcpu_features.PMU_V3, "PMUVer"),
    (ids.ID_DFR0, 0xF << 24, vcpu_features.PMU_V3, "PerfMon"),
)
"""(register, bits, vCPU feature that they are 0 without, fields): arch/arm64/kvm/sys_regs.c, read_id_reg() of 5.10 and
6.1, sanitise_id_*() since. A profile has the values without and with all features."""

EVENT_BITS = {1: 0x3FF, 4: 0xFFFF, 5: 0xFFFF, 6: 0xFFFF, 7: 0xFFFF}
"""By ID_AA64DFR0_EL1.PMUVer: __kvm_pmu_event_mask(); none of another version (measured: 7.2, version 2)."""

INCLUDE_EL2 = 1 << 27
"""ARMV8_PMU_INCLUDE_EL2: there while ID_AA64PFR0_EL1.EL2 says so, kvm_pmu_evtyper_mask()."""


@dataclass(frozen=True, slots=True)
class Survivors:
    """Registers that a second KVM_ARM_VCPU_INIT leaves alone, on kernels from `first` to before `last`.

    `ran`: only those of a vCPU that has run; `finalized`: that was finalized.
    """

    ids: frozenset[int]
    why: str
    first: tuple[int, int] = (0, 0)
    last: tuple[int, int] = (99, 0)
    ran: bool = False
    finalized: bool = False


_SURVIVES_RESET = (
    Survivors(frozenset((*ids.CCSIDR_IDS, *ids.CLOCKS)), "kvm_reset_vcpu() does not touch it"),
    Survivors(frozenset((ids.SVE_VLS,)), "kvm_reset_vcpu() sets the host's where it is not final", finalized=True),
    Survivors(frozenset((ids.SP_EL1, ids.ELR_EL1, ids.SPSR_EL1)),
              "core registers to userspace, to the kernel system registers without a reset"),
    Survivors(frozenset((ids.TIMER_CVAL, ids.PTIMER_CVAL)), "kvm_timer_vcpu_reset() resets the control alone; "
              "measured: 7.2, where they are in the table of system registers, resets them", last=(6, 18)),
    Survivors(frozenset((ids.MPIDR, ids.CLIDR)), "reset_vcpu_ftr_id_reg(): of an initialized vCPU they stay", (6, 5)),
    Survivors(frozenset((ids.VCPU_EVENTS,)), "measured: 6.12, 7.2, not 6.1: a pending SError stays", (6, 2), ran=True),
)


class Guest:
    """Registers of a VM on an arm64 kernel that a profile describes.

    Attributes:
        profile: the kernel. machine: what was created. rules: in the order of the kernel's checks.
        features: of each vCPU, NO_FEATURES before KVM_ARM_VCPU_INIT. finalized: whether its SVE registers are there.
        ran: whether it ever ran. entered: whether any did. told: capabilities enabled, with their arguments.
        offsets: of the virtual and the physical counter, ticks. counter_offset: struct kvm_arm_counter_offset if told.
        uniform: the features of all vCPUs where they are the same, else None. notes: what else the VM was told.
        ignored: bits of a register's id that mean nothing. vgic: the interrupt controller. pmu_made: whether each
            vCPU's PMU was initialized. lines_fixed: whether the timers' interrupts are. timers_on:
            vCPUs whose timers a first run enabled, which may have failed after that.
            steal_time: address by vCPU.
        left_over, off: features by vCPU that a refused KVM_ARM_VCPU_INIT left, and POWER_OFF, before 6.5.
        exited: vCPUs whose last exit was MMIO, which the next KVM_RUN completes: PC goes on then.
        dead: a VM that the kernel gave up. has_its: whether there is an ITS.
    """

    def __init__(self, profile: HostProfile, machine: Machine, host: HostClock, rules: Sequence[Rule]) -> None:
        self.profile, self.machine, self.host, self.rules = profile, machine, host, tuple(rules)
        self.features = np.zeros(0, np.int64)
        self.finalized: Mask = np.zeros(0, np.bool_)
        self.ran: Mask = np.zeros(0, np.bool_)
        self.entered = False
        self.told: dict[int, tuple[int, ...]] = {}
        self.offsets = {ids.TIMER_CNT: host.tsc(), ids.PTIMER_CNT: 0}
        self.counter_offset: tuple[int, int] | None = None
        self.uniform: int | None = None
        self.notes: dict[str, int] = {}
        self.ignored = 0
        self.vgic: Vgic | None = None
        self.pmu_made: Mask = np.zeros(0, np.bool_)
        self.lines_fixed = False
        self.timers_on: set[int] = set()
        self.steal_time: dict[int, int] = {}
        self.left_over: dict[int, int] = {}
        self.off: dict[int, int] = {}
        self.exited: set[int] = set()
        self.dead = False
        self.has_its = "its" in machine.devices
        self._columns: dict[int, Words] = {}
        self._listed: dict[int, frozenset[int]] = {}
        self._programs: dict[int, tuple[Rule, ...]] = {}

    @property
    def vcpus(self) -> int:
        """How many there are by now."""
        return len(self.features)

    def add_vcpus(self, count: int) -> None:
        """More vCPUs, not initialized. Making one sets the virtual counter to 0 (kvm_timer_vcpu_init)."""
        before = self.vcpus
        self.features = np.append(self.features, np.full(count, NO_FEATURES))
        self.finalized = np.append(self.finalized, np.zeros(count, np.bool_))
        self.ran = np.append(self.ran, np.zeros(count, np.bool_))
        self.pmu_made = np.append(self.pmu_made, np.zeros(count, np.bool_))
        self.uniform = None
        for id, column in self._columns.items():
            if not self.shared(id):
                self._columns[id] = np.vstack([column, self._fresh(id, range(before, self.vcpus))])
        if self.counter_offset is None:
            self.offsets = {ids.TIMER_CNT: self.host.tsc(), ids.PTIMER_CNT: 0}

    def reset(self, first: int, count: int, features: int) -> None:
        """Give vCPUs their features and the values that they are made with (kvm_reset_vcpu)."""
        self.features[first:first + count] = features
        self.uniform = features if (self.features == features).all() else None
        survivors = self._survivors(*(bool(of[first:first + count].any()) for of in (self.ran, self.finalized)))
        for id, column in self._columns.items():
            if not self.shared(id) and id not in survivors and id not in gic.LINES and gic.access(id) is None:
                column[first:first + count] = self._fresh(id, range(first, first + count))
        if self._columns.keys() & {ids.ID_AA64DFR0, ids.ID_AA64PFR0} and version(self.profile) >= (6, 7):
            self._reset_events(slice(first, first + count))

    def _reset_events(self, rows: slice) -> None:
        """reset_pmevtyper() since 6.7: only bits that the VM's ID registers say there are by now."""
        features = int(self.features[rows][0])
        bits = _U64 & ~0xFFFF | EVENT_BITS.get(self.field(ids.ID_AA64DFR0, 8, features), 0)
        if not self.field(ids.ID_AA64PFR0, 8, features):
            bits &= ~INCLUDE_EL2
        for id in self.listed(features).intersection(ids.PMEVTYPER):
            self.column(id)[rows] &= np.uint64(bits)

    def field(self, id: int, low: int, features: int) -> int:
        """A field of four bits of an ID register that the VM has once."""
        return (int(self.column(id)[0, 0]) ^ self.initial(id, features)) >> low & 0xF

    def _survivors(self, ran: bool, finalized: bool) -> frozenset[int]:
        release = version(self.profile)
        return frozenset(id for row in _SURVIVES_RESET if row.first <= release < row.last and (ran or not row.ran)
                         and (finalized or not row.finalized)
                         for id in row.ids)

    def listed(self, features: int) -> frozenset[int]:
        """KVM_GET_REG_LIST of a vCPU with these features."""
        if features not in self._listed:
            self._listed[features] = self.profile.with_features(features).listed
        return self._listed[features]

    def named(self, features: int) -> frozenset[int]:
        """The same as the kernel names them; with the scope flag where that was asked for."""
        if not self.ignored:
            return self.listed(features)
        flagged = frozenset(self.profile.scope_flags)
        return frozenset(id | self.ignored if id in flagged else id for id in self.listed(features))

    def resolve(self, id: int) -> int:
        """The register that an id means: without the bits that this kernel ignores."""
        return id & ~self.ignored if id >> 56 != ids.OURS else id

    def shared(self, id: int) -> bool:
        """Whether this kernel keeps a register once a VM, or can't be told another value."""
        if id in ids.ALWAYS_SHARED or (id >> 56 == ids.OURS and lookup(id).scope.name == "VM"):
            return True
        known = self.profile.feature_scopes.get(id) or self.profile.scopes.get(id)
        return known in ("vm", FIXED) and id not in ids.NEVER_SHARED

    def program(self, id: int) -> tuple[Rule, ...]:
        """The rules that are about a register on this kernel."""
        if id not in self._programs:
            self._programs[id] = tuple(rule for rule in self.rules if rule.about(self.profile, id))
        return self._programs[id]

    def timer_line(self, attribute: int) -> int:
        """The interrupt of a timer."""
        return self.notes.get(f"timer {attribute}", _TIMER_LINES[attribute])

    def set_timer_line(self, attribute: int, line: int) -> None:
        """Set it."""
        self.notes[f"timer {attribute}"] = line

    @property
    def most_counters(self) -> int:
        """Event counters of the host's PMU: PMCR_EL0.N of a vCPU that is made with one."""
        return self.initial(ids.PMCR, 0) >> 11 & 0x1F

    def initial(self, id: int, features: int) -> int:
        """The value of a register of up to 64 bits on a vCPU that was made with these features."""
        plain, full = self.profile.defaults.get(id), self.profile.feature_defaults.get(id)
        value = int.from_bytes((plain or full or b"")[:8], "little")
        if plain is None or full is None:
            return value
        with_all = int.from_bytes(full[:8], "little")
        for register, bits, feature, _ in FEATURE_FIELDS:
            if register == id and features != NO_FEATURES and features & feature:
                value = value & ~bits | with_all & bits
        return value

    def initials(self, id: int, features: NDArray[np.int64]) -> NDArray[np.uint64]:
        """`initial` of many vCPUs; the first word of a longer register."""
        if self.uniform is not None:
            return np.full(len(features), self.initial(id, self.uniform), np.uint64)
        return np.array([self.initial(id, one) for one in features.tolist()], np.uint64)

    def column(self, id: int) -> Words:
        """The matrix of a register: a row a vCPU, or one of what the VM has once (its first word as a difference)."""
        if id not in self._columns:
            self._columns[id] = self._fresh(id, range(1 if self.shared(id) else self.vcpus))
        return self._columns[id]

    def _fresh(self, id: int, vcpus: range) -> Words:
        words = -(-(lookup(id).size or 8) // 8)
        rows = np.zeros((len(vcpus), words), np.uint64)
        if self.shared(id) or gic.access(id):
            return rows
        value = self.profile.defaults.get(id) or self.profile.feature_defaults.get(id)
        if value and id not in ids.CLOCKS:
            rows[:] = np.frombuffer(value.ljust(words * 8, b"\0"), np.uint64)
        if id in _NARROW_RESETS:
            features = self.features[vcpus.start:vcpus.stop]
            rows[(features != NO_FEATURES) & (features & vcpu_features.EL1_32BIT != 0)] = _NARROW_RESETS[id]
        if reset := _RESETS.get(id):
            rows[:, 0] = reset(np.array(vcpus, np.uint64))
        return rows


def _mpidr(vcpu: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """reset_mpidr(): 16 vCPUs a cluster, so that GICv3 can name them in an SGI."""
    low, four, eight = np.uint64(0xF), np.uint64(4), np.uint64(0xFF)
    aff1, aff2 = vcpu >> four & eight, vcpu >> np.uint64(12) & eight
    return np.asarray(np.uint64(1 << 31) | vcpu & low | aff1 << np.uint64(8) | aff2 << np.uint64(16), np.uint64)


_RESETS: dict[int, Callable[[NDArray[np.uint64]], NDArray[np.uint64]]] = {ids.MPIDR: _mpidr}


@dataclass(frozen=True, slots=True)
class Access:
    """One register of some vCPUs: what a rule is given to look at and to change.

    Attributes:
        index: which rows of a vCPU register's column, as numpy takes it. numbers: the vCPUs' indices.
    """

    guest: Guest
    id: int
    index: slice | NDArray[np.intp]
    numbers: NDArray[np.intp]

    def of(self, id: int) -> Access:
        """The same vCPUs, another register."""
        return Access(self.guest, id, self.index, self.numbers)

    def where(self, chosen: Mask) -> Access:
        """The chosen of these vCPUs."""
        if chosen.all():
            return self
        return Access(self.guest, self.id, self.numbers[chosen], self.numbers[chosen])

    @property
    def features(self) -> NDArray[np.int64]:
        """Of each vCPU."""
        return self.guest.features[self.index]

    def initials(self) -> NDArray[np.uint64]:
        """What each vCPU was made with; registers of one word."""
        return self.guest.initials(self.id, self.features)

    def load(self) -> Words:
        """The stored values, a row a vCPU; to be read only."""
        column = self.guest.column(self.id)
        if not self.guest.shared(self.id):
            return column[self.index]
        first = (column[0, :1] ^ self.initials())[:, np.newaxis]
        if column.shape[1] == 1:
            return first
        return np.hstack((first, np.broadcast_to(column[0, 1:], (len(first), column.shape[1] - 1))))

    def word(self) -> NDArray[np.uint64]:
        """The first word of `load`."""
        return self.load()[:, 0]

    def store(self, values: Words) -> None:
        """Store whole values. What the VM has once keeps the last row's: KVM was told in this order."""
        column = self.guest.column(self.id)
        if self.guest.shared(self.id):
            column[0] = values[-1]
            column[0, 0] ^= self.initials()[-1]
        else:
            column[self.index] = values
