"""What a guest sees by itself: system registers by MRS, its firmware by HVC.

Sources: arch/arm64/kvm/sys_regs.c (what traps), hypercalls.c and psci.c. What the host decides is the profile's
`guest_registers` and `firmware`; what the VM was told decides which of it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import ids
from migstream.backends.sim.arm64.access import read
from migstream.backends.sim.arm64.guest import Access
from migstream.backends.sim.arm64.rules import since
from migstream.registers import arm64_ids, vcpu_features
from migstream.registers import firmware_arm64 as calls

if TYPE_CHECKING:
    from migstream.backends.sim.arm64.guest import Guest

NOT_SUPPORTED = calls.NOT_SUPPORTED


@dataclass(frozen=True, slots=True)
class HostsOwn:
    """Registers that a guest reads as the host's, whatever KVM_GET_ONE_REG says, on kernels before `until`."""

    ids: frozenset[int]
    why: str
    until: tuple[int, int]


HOSTS_OWN = (
    HostsOwn(frozenset((ids.CTR, ids.CLIDR)), "measured: 5.10 and 6.1, where the guest reads another CTR_EL0; since "
             "6.3 and 6.12 they trap and show the vCPU's and the VM's", (6, 3)),
)


@dataclass(frozen=True, slots=True)
class Gate:
    """A bit of a firmware bitmap that a call is answered for."""

    register: int
    bit: int
    why: str


_TRNG = Gate(arm64_ids.bitmap(0), 0, "KVM_REG_ARM_STD_BIT_TRNG_V1_0")
_PV_TIME = Gate(arm64_ids.bitmap(1), 0, "KVM_REG_ARM_STD_HYP_BIT_PV_TIME")
_FUNC_FEAT = Gate(arm64_ids.bitmap(2), 0, "KVM_REG_ARM_VENDOR_HYP_BIT_FUNC_FEAT")
GATES: dict[int, Gate] = {
    0x8400_0050: _TRNG, 0x8400_0051: _TRNG, 0xC500_0020: _PV_TIME, 0x8600_FF01: _FUNC_FEAT, 0x8600_0000: _FUNC_FEAT,
    0x8600_0001: Gate(arm64_ids.bitmap(2), 1, "KVM_REG_ARM_VENDOR_HYP_BIT_PTP"),
}
"""By function: kvm_smccc_test_fw_bmap(). Kernels before 5.19 have no bitmaps and answer as their profile says."""

_PSCI_FEATURES, _ARCH_FEATURES, _KVM_FEATURES = 0x8400_000A, 0x8000_0001, 0x8600_0000
_PSCI_1_0 = 0x1_0000
_SINCE_PSCI = {0xC400_0012: 0x1_0001, 0x8400_0012: 0x1_0001, 0xC400_0015: 0x1_0003, 0x8400_0015: 0x1_0003}
"""Functions that PSCI_FEATURES knows from a version on: kvm_psci_1_x_call()."""

_PV_FEATURES, _PV_TIME_ST = 0xC500_0020, 0xC500_0021
_WORKAROUND_2, NOT_REQUIRED = 0x8000_7FFF, (1 << 64) - 2
_SYSTEM_SUSPEND, _SUSPEND_CAPABILITY = 0xC400_000E, 216


@dataclass(frozen=True, slots=True)
class Eyes:
    """What one vCPU sees; `migstream.backends.sim.arm64.cpu.Host`."""

    guest: Guest
    vcpu: int

    def system_register(self, encoding: int) -> int | None:
        """What MRS gives."""
        id = arm64_ids.ARM64 | arm64_ids.U64 | arm64_ids.SYSREG | encoding
        known = self.guest.profile.guest_registers
        if id not in known:
            return None
        if any(id in row.ids and not since(self.guest.profile, *row.until) for row in HOSTS_OWN):
            return known[id]
        return self._register(id) if id in self._listed else known[id]

    @property
    def _listed(self) -> frozenset[int]:
        return self.guest.listed(int(self.guest.features[self.vcpu]))

    def _register(self, id: int) -> int:
        values = np.zeros((1, 1), np.uint64)
        read(Access(self.guest, id, slice(self.vcpu, self.vcpu + 1), np.arange(self.vcpu, self.vcpu + 1)), values)
        return int(values[0, 0])

    def hypercall(self, function: int, argument: int) -> int:
        """What X0 is after HVC; NOT_SUPPORTED for what nobody answers."""
        if function >> 24 == 0x84 and function < 0x8400_0050:
            return self._psci(function, argument)
        if function == _PV_FEATURES and self.vcpu in self.guest.steal_time and argument in (_PV_FEATURES, _PV_TIME_ST):
            return 0 if self._allowed(GATES[function]) else NOT_SUPPORTED
        if function == _ARCH_FEATURES and argument == _WORKAROUND_2 and self._register(ids.WORKAROUND_2) > self._host():
            return NOT_REQUIRED
        gate = GATES.get(argument & 0xFFFF_FFFF if function == _ARCH_FEATURES else function)
        if gate and not self._allowed(gate):
            return NOT_SUPPORTED
        if function == _KVM_FEATURES and gate and gate.register in self._listed:
            return self._register(gate.register)
        return self._answer(function, argument)

    def _allowed(self, gate: Gate) -> bool:
        return gate.register not in self._listed or bool(self._register(gate.register) >> gate.bit & 1)

    def _host(self) -> int:
        return self.guest.initial(ids.WORKAROUND_2, int(self.guest.features[self.vcpu]))

    def _answer(self, function: int, argument: int) -> int:
        """As the profile's guest had it: with and without the argument, of which most calls have none."""
        known = self.guest.profile.firmware
        return known.get(function << 32 | argument, known.get(function << 32, NOT_SUPPORTED))

    def _psci(self, function: int, argument: int) -> int:
        version = self._register(ids.PSCI_VERSION)
        if not int(self.guest.features[self.vcpu]) & vcpu_features.PSCI_0_2:
            return NOT_SUPPORTED
        if function == calls.PSCI_VERSION.function:
            return version
        if function != _PSCI_FEATURES or version < _PSCI_1_0 or version < _SINCE_PSCI.get(argument, 0):
            return NOT_SUPPORTED
        if argument == _SYSTEM_SUSPEND and _SUSPEND_CAPABILITY in self.guest.told:
            return 0
        return self._answer(function, argument)
