"""A simulated arm64 VM: the primitives of `migstream.backends.base.Vm`, and single ioctls for whoever wants those."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from migstream.backends.base import Refusal, check_startable
from migstream.backends.sim.arm64 import access, entering, ids, rules, rules_cpu, rules_firmware, rules_id
from migstream.backends.sim.arm64 import gic as chip
from migstream.backends.sim.arm64.board import make_devices
from migstream.backends.sim.arm64.guest import NO_FEATURES, Access, Guest
from migstream.backends.sim.arm64.ioctls import DeviceIoctls, alive
from migstream.backends.sim.arm64.its import CTLR
from migstream.backends.sim.arm64.proposals import ASYMMETRIC_CAP, PROPOSED_RULES, SCOPE_CAP
from migstream.backends.sim.arm64.rules import since
from migstream.backends.sim.arm64.runner import Runner
from migstream.backends.sim.arm64.told import CAPABILITIES, CapabilityColumn, InitColumn, OffsetColumn
from migstream.backends.sim.timing import timed
from migstream.backends.sim.turns import TurnsVm
from migstream.contract import Behaviour
from migstream.errors import BackendError, UsageError, errno_name
from migstream.host.behaviour import of_profile
from migstream.model import Arch, Layout, Machine, Scope
from migstream.plan import DEVICES
from migstream.registers import arm64 as rows
from migstream.registers import gic, vcpu_features
from migstream.registers import ids as all_ids
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Errnos
    from migstream.backends.sim.arm64.rules import Rule
    from migstream.backends.sim.clock import HostClock
    from migstream.host.profile import HostProfile
    from migstream.model import Words

RULES: tuple[Rule, ...] = (
    *rules_id.RULES, *rules_firmware.RULES, *rules_cpu.RULES, *PROPOSED_RULES, *rules.PROFILE_RULES)
"""All rules; of one register, in the order of the kernel's checks."""

_VALID_FEATURES = 0x7F
_POWER_OFF, _STOPPED = 1, 5
_E2H0 = 1 << 8
"""KVM_ARM_VCPU_HAS_EL2_E2H0: kernels that know it take it also without HAS_EL2, where it means nothing."""

SVE_FINALIZE = 4
"""KVM_ARM_VCPU_SVE, the argument of KVM_ARM_VCPU_FINALIZE."""


class AnyColumn(Protocol):
    """How one register of a bank is read and written."""

    def read(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """Fill `values`; an errno a row."""

    def write(self, guest: Guest, rows: slice, numbers: NDArray[np.intp], values: Words) -> Errnos:
        """Store `values`; an errno a row."""


class Arm64SimVm(DeviceIoctls, TurnsVm):
    """A VM on a simulated arm64 kernel. Made by `SimBackend.create`."""

    def __init__(self, profile: HostProfile, machine: Machine, host: HostClock,
                 rules: Sequence[Rule] = RULES) -> None:
        super().__init__(machine)
        self.profile = profile
        self.guest = Guest(profile, machine, host, rules)
        self._programs: dict[Layout, list[AnyColumn]] = {}
        self.its = self.new_its() if "its" in machine.devices else None

    def build(self, enabled_caps: dict[int, tuple[int, ...]]) -> None:
        """Memory and capabilities, in KVM's order. Raises: BackendError, UsageError."""
        known = DEVICES[self.machine.arch]
        if unknown := sorted(self.machine.devices.keys() - known):
            raise UsageError(f"the simulator can't make a device {unknown[0]!r}; it knows {', '.join(sorted(known))}")
        self.memory = self._ram.build(self.machine.memory)
        if self.profile.says_scope:  # as the KVM backend does
            self.enable(SCOPE_CAP, ())
        for capability, args in enabled_caps.items():
            if no := self.enable(capability, args):
                raise BackendError("KVM_ENABLE_CAP", errno=no, register=f"capability {capability}")

    def enable(self, capability: int, args: tuple[int, ...] = (), flags: int = 0) -> int:
        """KVM_ENABLE_CAP: 0, or the errno."""
        if capability == SCOPE_CAP and self.profile.says_scope and not flags and not any(args):
            self.guest.ignored = all_ids.KVM_REG_ARM_SCOPE_VM
            return 0  # a matter between the kernel and who asks: nothing of it travels
        offered = CAPABILITIES.get(capability)
        name = offered.capability if offered else ""
        if self.guest.dead:
            return errno.EIO
        if flags or not self.profile.capabilities.get(name):
            return errno.EINVAL
        if offered and offered.before_vcpus and self.guest.vcpus:
            return errno.EINVAL
        self.guest.told[capability] = args
        return 0

    # Vm

    def create_vcpus(self) -> None:
        """See `Vm.create_vcpus`: created, then KVM_ARM_VCPU_INIT for each."""
        self._check_open()
        room = self.profile.max_vcpus - self.guest.vcpus
        first, wanted = self.guest.vcpus, self.machine.vcpus - self.guest.vcpus
        if wanted > 0:
            self.guest.add_vcpus(min(wanted, room))
        if wanted > room:
            raise BackendError("KVM_CREATE_VCPU", errno=errno.EINVAL, vcpu=self.guest.vcpus)
        if wanted <= 0:
            return
        if no := self._init_errno(self.features):
            missing = vcpu_features.names(self.features & ~vcpu_features.offered(self.profile.capabilities))
            what = f"{errno_name(no)} for vCPU features {', '.join(vcpu_features.names(self.features))}"
            raise BackendError("KVM_ARM_VCPU_INIT", errno=no, vcpu=first,
                               what=what + (f"; this host has no {', '.join(missing)}" if missing else ""))
        self.guest.reset(first, wanted, self.features)
        self.guest.vgic = make_devices(self.profile, self.machine.devices, self.guest.vcpus)

    @property
    def features(self) -> int:
        """The vCPUs' feature bits."""
        return int(self.machine.devices.get("vcpu_features", vcpu_features.DEFAULT))

    def layouts(self) -> tuple[tuple[Layout, ...], list[Refusal]]:
        """See `Vm.layouts`; what vCPU 0 can't read is left out, as a PMU's interrupt that nobody has set.

        SVE lengths that nobody has chosen become the host's.
        """
        self._check_open()
        if self.guest.vcpus and self.features & vcpu_features.SVE:
            self.guest.finalized[:] = True
        if self.guest.vcpus and self.guest.uniform is None:
            raise UsageError("the vCPUs have different features: a layout is for all of them alike")
        listed = self.guest.listed(self.features)
        found = (*rows.layouts(listed, self.profile.bank_scopes, self._extra()), *self._gic_layouts())
        layouts = tuple(sorted(found, key=lambda layout: layout.phase))
        refused = [no for at in layouts for no in self.read(at, 0, np.zeros((1, at.row_words), np.uint64))]
        bad = {refusal.register for refusal in refused}
        kept = (Layout(at.scope, at.phase, tuple(slot for slot in at.slots if slot.id not in bad)) for at in layouts)
        return tuple(layout for layout in kept if layout.slots), refused

    def _extra(self) -> list[int]:
        """As on KVM: structs, what was told, and interrupt lines where there is an interrupt controller."""
        extra = [all_ids.capability_id(Arch.ARM64, capability) for capability in self.guest.told]
        extra += [ids.VCPU_EVENTS, ids.MP_STATE]
        extra += [rows.COUNTER_OFFSET.id] if self.guest.counter_offset is not None else []
        return extra + self._lines()

    def _lines(self) -> list[int]:
        if "gic_distributor" not in self.machine.devices:
            return []
        pmu = [gic.PMU_IRQ.id] if self.features & vcpu_features.PMU_V3 else []
        return [gic.VTIMER_IRQ.id, gic.PTIMER_IRQ.id, *pmu]

    def _gic_layouts(self) -> tuple[Layout, ...]:
        if "gic_distributor" not in self.machine.devices:
            return ()
        irqs = int(self.machine.devices.get("gic_irqs", 64))
        priorities = gic.active_priority_registers(chip.RULES["ICC_CTLR_EL1"].start)
        return gic.layouts(irqs, priorities, self.its is not None)

    @timed("get")
    def read(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.read`."""
        return self._each(layout, first_vcpu, values, "GET")

    @timed("set")
    def write(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.write`."""
        return self._each(layout, first_vcpu, values, "SET")

    def _each(self, layout: Layout, first: int, values: Words, verb: str) -> list[Refusal]:
        self._check_bank(layout, first, values, self.guest.vcpus)
        span, numbers = slice(first, first + len(values)), np.arange(first, first + len(values))
        places, found = layout.offsets, []
        for number, column in enumerate(self._program(layout)):
            part = values[:, places[number]:places[number + 1]]
            errnos = (column.read if verb == "GET" else column.write)(self.guest, span, numbers, part)
            if errnos.any():
                found += [(int(row), number, int(errnos[row])) for row in np.flatnonzero(errnos)]
        vm = layout.scope == Scope.VM
        return [Refusal(id := layout.slots[number].id, None if vm else first + row, access.operation(id, verb), no)
                for row, number, no in sorted(found)]

    def _program(self, layout: Layout) -> list[AnyColumn]:
        if layout not in self._programs:
            for slot in layout.slots:
                if slot.size != (size := lookup(slot.id).size):
                    raise UsageError(f"{lookup(slot.id).name}: a column of {slot.size} bytes for {size}")
            self._programs[layout] = [self._column(slot.id) for slot in layout.slots]
        return self._programs[layout]

    def _column(self, id: int) -> AnyColumn:
        row = gic.access(id)
        if row is not None:
            return self._gic_column(id, row)
        if id in gic.LINES:
            return chip.PmuLine(id) if id == gic.PMU_IRQ.id else chip.TimerLine(id)
        if id == rows.VCPU_INIT.id:
            return InitColumn(self.features)
        if id == rows.COUNTER_OFFSET.id:
            return OffsetColumn()
        number = all_ids.capability_number(id)
        if number is not None:
            return CapabilityColumn(number, self.enable)
        return access.FinalizingColumn(id) if id == ids.SVE_VLS else access.Column(id)

    def _gic_column(self, id: int, row: gic.GicRow) -> AnyColumn:
        if row.device == gic.ITS:
            assert self.its is not None
            save = self.its.save_tables if id in gic.BEFORE_READ else None
            restore = self.its.restore_tables if row.offset == CTLR else None
            return chip.Ordered(chip.ItsColumn(self.its, row.offset), save, restore)
        column = chip.GicColumn(id, chip.rule(self.guest, id))
        if id in gic.BEFORE_READ and self.its:
            return chip.Ordered(column, self.its.save_pending)
        return chip.Ordered(column, after_write=self.its.switched) if id == chip.GICR_CTLR and self.its else column

    def start(self) -> None:
        """See `Vm.start`. Raises: BackendError where a vCPU is not complete."""
        self._check_still()
        check_startable(self.guest.vcpus)
        for vcpu in range(self.guest.vcpus):
            if no := entering.enter(self.guest, vcpu):
                raise BackendError("KVM_RUN", errno=no, vcpu=vcpu)
        self._runner = Runner(self.guest, self.memory)
        self._runner.start()

    def enter(self, vcpu: int) -> None:
        """See `Vm.enter`."""
        self._check_still()
        self._check_vcpu(vcpu, self.guest.vcpus)
        if no := self.run(vcpu)[0]:
            raise BackendError("KVM_RUN", errno=no, vcpu=vcpu)

    def behaviour(self) -> Behaviour:
        """What the profile's guest was told."""
        return of_profile(self.profile)

    # single ioctls of one vCPU: (errno, what was read)

    def _init_before_6_5(self, vcpu: int, features: int) -> tuple[int, bytes]:
        """kvm_vcpu_set_target(): bit by bit; POWER_OFF is a feature as others, and an unknown one leaves those before.

        Those that are left are there at the next call: nothing takes them away but a reset that fails.
        """
        known, old = self._known_features, int(self.guest.features[vcpu])
        if old != NO_FEATURES and (old | self._off(vcpu)) & known != features & known:
            return errno.EINVAL, b""
        if features & ~known:
            self.guest.left_over[vcpu] = self.guest.left_over.get(vcpu, 0) | (features & known if old == -1 else 0)
            return errno.ENOENT, b""
        features |= self.guest.left_over.get(vcpu, 0)
        if no := self._width(vcpu, features) or self._init_errno(features):
            self.guest.features[vcpu] = NO_FEATURES
            self.guest.left_over[vcpu] = 0
            return no, b""
        self.guest.off[vcpu] = features & _POWER_OFF
        self._reset(vcpu, features)
        return 0, b""

    def _width(self, vcpu: int, features: int) -> int:
        """All vCPUs AArch32 at EL1 or none: EINVAL.

        kvm_set_vm_width() since 5.18, where the first to be initialized decides; before, vcpu_allowed_register_width()
        looks at the others, of which one that was not initialized is AArch64.
        """
        wanted = features & vcpu_features.EL1_32BIT
        if since(self.profile, 5, 18):
            return 0 if self.guest.notes.setdefault("width", wanted) == wanted else errno.EINVAL
        others = (k for k in range(self.guest.vcpus) if k != vcpu)
        return errno.EINVAL if any(self._told(k) & vcpu_features.EL1_32BIT != wanted for k in others) else 0

    def _told(self, vcpu: int) -> int:
        features = int(self.guest.features[vcpu])
        return self.guest.left_over.get(vcpu, 0) if features == NO_FEATURES else features

    def _off(self, vcpu: int) -> int:
        return self.guest.off.get(vcpu, 0)

    def _reset(self, vcpu: int, features: int) -> None:
        self.guest.reset(vcpu, 1, features & ~_POWER_OFF)
        self.guest.column(ids.MP_STATE)[vcpu] = _STOPPED if features & _POWER_OFF else 0

    def _init_errno(self, features: int) -> int:
        """kvm_vcpu_init_check_features(): unknown ones ENOENT, those that this host lacks and half pairs EINVAL."""
        if features & ~self._known_features:
            return errno.ENOENT
        harmless = 0 if _E2H0 in self.profile.features_refused else _E2H0
        if features & ~(self.profile.vcpu_features | _POWER_OFF | harmless):
            return errno.EINVAL
        pair = features & vcpu_features.PTRAUTH
        return errno.EINVAL if pair and pair != vcpu_features.PTRAUTH else 0

    @property
    def _known_features(self) -> int:
        """Features that the kernel has a name for: those that it did not answer ENOENT for."""
        unknown = [mask for mask, no in self.profile.features_refused.items() if no == errno.ENOENT]
        return (min(unknown) if unknown else _VALID_FEATURES + 1) - 1

    @alive
    def init(self, vcpu: int, features: int, target: int | None = None) -> tuple[int, bytes]:
        """KVM_ARM_VCPU_INIT; the target is what this host prefers unless told."""
        if target not in (None, self.target):
            return errno.EINVAL, b""
        if not since(self.profile, 6, 5):
            return self._init_before_6_5(vcpu, features)
        kept, old = features & ~_POWER_OFF, int(self.guest.features[vcpu])
        if no := self._init_errno(features):
            return no, b""
        if old not in (NO_FEATURES, kept) or (old == NO_FEATURES and self._asymmetric(kept)):
            return errno.EINVAL, b""
        self._reset(vcpu, features)
        return 0, b""

    target = 5
    """KVM_ARM_TARGET_GENERIC_V8."""

    def _asymmetric(self, features: int) -> bool:
        """Whether another vCPU has other features, on a kernel that wants the same of all (since 6.5)."""
        if not self.uniform_features:
            return False
        others = self.guest.features[self.guest.features != NO_FEATURES]
        return bool((others != features).any())

    @property
    def uniform_features(self) -> bool:
        """Whether all vCPUs must have the same features: kernels that keep ID registers once a VM."""
        return bool(self.profile.writable_masks) and ASYMMETRIC_CAP not in self.guest.told

    @alive
    def finalize(self, vcpu: int, what: int) -> tuple[int, bytes]:
        """KVM_ARM_VCPU_FINALIZE."""
        features = int(self.guest.features[vcpu])
        if features == NO_FEATURES:
            return errno.ENOEXEC, b""
        if what != SVE_FINALIZE or not features & vcpu_features.SVE:
            return errno.EINVAL, b""
        if self.guest.finalized[vcpu]:
            return errno.EPERM, b""
        self.guest.finalized[vcpu] = True
        return 0, b""

    @alive
    def listed(self, vcpu: int, room: int) -> tuple[int, bytes]:
        """KVM_GET_REG_LIST into an array with room for so many; the ids, ascending, or the count with E2BIG."""
        if no := entering.unfinished(self.guest, vcpu):
            return no, b""
        found = sorted(self.guest.named(int(self.guest.features[vcpu])))
        if len(found) > room:
            return errno.E2BIG, struct.pack("<Q", len(found))
        return 0, struct.pack(f"<{len(found)}Q", *found)

    @alive
    def get(self, vcpu: int, id: int) -> tuple[int, bytes]:
        """KVM_GET_ONE_REG; KVM_GET_MP_STATE and KVM_GET_VCPU_EVENTS by our ids."""
        size = lookup(id).size or 1 << (id >> 52 & 0xF)
        values = np.zeros((1, -(-size // 8)), np.uint64)
        no = int(access.read(self._at(vcpu, id), values)[0])
        return no, b"" if no else values.tobytes()[:size]

    @alive
    def set(self, vcpu: int, id: int, value: bytes) -> tuple[int, bytes]:
        """KVM_SET_ONE_REG; KVM_SET_MP_STATE and KVM_SET_VCPU_EVENTS by our ids."""
        padded = value.ljust(-(-len(value) // 8) * 8, b"\0")
        return int(access.write(self._at(vcpu, id), np.frombuffer(padded, np.uint64)[np.newaxis])[0]), b""

    def _at(self, vcpu: int, id: int) -> Access:
        return Access(self.guest, self.guest.resolve(id), slice(vcpu, vcpu + 1), np.arange(vcpu, vcpu + 1))

    @alive
    def run(self, vcpu: int) -> tuple[int, bytes]:
        """KVM_RUN that leaves before the first instruction; its EINTR counts as good."""
        no = entering.enter(self.guest, vcpu)
        if not no:
            entering.complete(self.guest, vcpu)
        if not no and self.profile.behaviour.get("entering_is_running"):
            entering.through_cpu(self.guest, np.array([vcpu]))
        return no, b""
