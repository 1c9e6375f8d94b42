"""A simulated VM: the primitives of `migstream.backends.base.Vm` on a guest's columns."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.base import Refusal, check_startable
from migstream.backends.sim import rules_cpu, rules_devices, rules_hyperv
from migstream.backends.sim.access import AnyColumn, column, enable, operation
from migstream.backends.sim.guest import Guest, Rows
from migstream.backends.sim.runner import Runner
from migstream.backends.sim.timing import timed
from migstream.backends.sim.turns import TurnsVm
from migstream.contract import Behaviour
from migstream.errors import BackendError, UsageError
from migstream.host.behaviour import of_profile
from migstream.model import Layout, Machine, Scope
from migstream.plan import DEVICES
from migstream.registers import ids, x86_64

if TYPE_CHECKING:
    from migstream.backends.sim.access import Errnos
    from migstream.backends.sim.clock import HostClock
    from migstream.host.profile import HostProfile
    from migstream.model import Words


class SimVm(TurnsVm):
    """A VM on a simulated kernel. Made by `SimBackend.create`."""

    def __init__(self, profile: HostProfile, machine: Machine, host: HostClock) -> None:
        super().__init__(machine)
        self.guest = Guest(profile, machine, host, {**rules_devices.RESETS, **rules_hyperv.RESETS})
        self._programs: dict[Layout, list[AnyColumn]] = {}

    def build(self, enabled_caps: dict[int, tuple[int, ...]]) -> None:
        """Memory, interrupt chips, capabilities, in KVM's order. Raises: BackendError, UsageError."""
        known = DEVICES[self.machine.arch]
        if unknown := sorted(self.machine.devices.keys() - known):
            raise UsageError(f"the simulator can't make a device {unknown[0]!r}; it knows {', '.join(sorted(known))}")
        self.memory = self._ram.build(self.machine.memory)
        if self.machine.devices.get("pit") and not self.machine.devices.get("irqchip"):
            raise BackendError("KVM_CREATE_PIT2", errno=errno.ENOENT)
        for capability, args in enabled_caps.items():
            if no := enable(self.guest, capability, args):
                raise BackendError("KVM_ENABLE_CAP", errno=no, register=f"capability {capability}")

    def behaviour(self) -> Behaviour:
        """As the recorded kernel."""
        return of_profile(self.guest.profile)

    def create_vcpus(self) -> None:
        """See `Vm.create_vcpus`."""
        self._check_open()
        room = self.guest.profile.max_vcpus - self.guest.vcpus
        wanted = self.machine.vcpus - self.guest.vcpus
        if wanted > 0:
            self.guest.add_vcpus(min(wanted, room))
        if wanted > room:
            raise BackendError("KVM_CREATE_VCPU", errno=errno.EINVAL, vcpu=self.guest.vcpus)

    def create_vcpu(self, number: int) -> None:
        """Create one vCPU, which must be the next. Raises: BackendError with KVM's errno (kvm_vm_ioctl_create_vcpu)."""
        if number >= self.guest.profile.capabilities.get("MAX_VCPU_ID", 0):
            raise BackendError("KVM_CREATE_VCPU", errno=errno.EINVAL)
        if number < self.guest.vcpus:
            raise BackendError("KVM_CREATE_VCPU", errno=errno.EEXIST)
        if number > self.guest.vcpus:
            raise UsageError("the simulator's vCPUs are numbered without a gap")
        self.guest.add_vcpus(1)

    def layouts(self) -> tuple[tuple[Layout, ...], list[Refusal]]:
        """See `Vm.layouts`."""
        self._check_open()
        profile = self.guest.profile
        sizes = {**profile.sizes, x86_64.CPUID2.id: self._cpuid_size()}
        msr_list = (*profile.msrs, *(index for index in profile.feature_msrs if index not in profile.msrs))
        unreadable = {id: pair[0] for id, pair in profile.refused.items()
                      if pair[0] and ids.msr_index(id) in msr_list}
        kept = [index for index in msr_list if ids.msr_id(index) not in unreadable]
        layouts = x86_64.layouts(self._offered(), sizes, kept, self._kvm_registers(), self.guest.told,
                                 self.guest.profile.bank_scopes)
        return layouts, [Refusal(id, 0, "KVM_GET_MSRS", no) for id, no in unreadable.items()]

    def _offered(self) -> dict[str, int]:
        """The capabilities, without those of devices that this VM was made without."""
        lacks = {name for name, device in (("IRQCHIP", "irqchip"), ("PIT_STATE2", "pit")) if not self.guest.has(device)}
        return {name: 0 if name in lacks else value for name, value in self.guest.profile.capabilities.items()}

    def _kvm_registers(self) -> Sequence[int]:
        """What KVM_GET_REG_LIST gave on the recorded kernel."""
        profile = self.guest.profile
        listed = [id for id in profile.defaults if id & ~0xFFFF_FFFF == ids.KVM_REG_X86_KVM]
        return listed if profile.capabilities.get("ONE_REG") else ()

    def _cpuid_size(self) -> int:
        entries = self.guest.column(x86_64.CPUID2.id)[:, 0] & np.uint64(0xFFFF_FFFF)
        return 8 + 40 * int(entries.max(initial=0))

    @timed("get")
    def read(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.read`. MP_STATE comes first, because reading it accepts pending INIT and SIPI."""
        rows, found = self._rows(layout, first_vcpu, values), []
        program = self._program(layout)
        for number in sorted(range(len(program)), key=lambda n: program[n].slot.id != x86_64.MP_STATE.id):
            part = values[:, layout.offsets[number]:layout.offsets[number + 1]]
            found.append((number, program[number].read(rows, part)))
        return self._refusals(layout, first_vcpu, found, "GET")

    @timed("set")
    def write(self, layout: Layout, first_vcpu: int, values: Words) -> list[Refusal]:
        """See `Vm.write`."""
        rows, found = self._rows(layout, first_vcpu, values), []
        for number, one in enumerate(self._program(layout)):
            part = values[:, layout.offsets[number]:layout.offsets[number + 1]]
            found.append((number, one.write(rows, part)))
        return self._refusals(layout, first_vcpu, found, "SET")

    def _program(self, layout: Layout) -> list[AnyColumn]:
        if layout not in self._programs:
            self._programs[layout] = [column(slot) for slot in layout.slots]
        return self._programs[layout]

    def _rows(self, layout: Layout, first: int, values: Words) -> Rows:
        self._check_bank(layout, first, values, self.guest.vcpus)
        return Rows.span(self.guest, first, len(values))

    def _refusals(self, layout: Layout, first: int, found: list[tuple[int, Errnos]], verb: str) -> list[Refusal]:
        """In the order in which KVM meets them: vCPU after vCPU."""
        places = [(int(row), number, int(errnos[row])) for number, errnos in found for row in np.flatnonzero(errnos)]
        slots, vm = layout.slots, layout.scope == Scope.VM
        return [Refusal(id := slots[number].id, None if vm else first + row, operation(self.guest, id, verb), no)
                for row, number, no in sorted(places)]

    def enter(self, vcpu: int) -> None:
        """See `Vm.enter`. x86-64: what a run fixes is not fixed by it: a vCPU has run when it reached the guest."""
        self._check_still()
        self._check_vcpu(vcpu, self.guest.vcpus)
        rules_cpu.enter(Rows.span(self.guest, vcpu, 1))

    def start(self) -> None:
        """See `Vm.start`."""
        self._check_still()
        check_startable(self.guest.vcpus)
        self._runner = Runner(self.guest, self.memory)
        self._runner.start()
