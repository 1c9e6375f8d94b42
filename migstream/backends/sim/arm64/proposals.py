"""What was proposed for KVM/arm64 and never merged, as rules and registers of simulated kernels.

SDEI (Arm DEN0054), "KVM: arm64: Support SDEI Virtualization" by Gavin Shan. Version 7 carries its state in firmware
pseudo-registers of each vCPU. Version 5 had an ioctl with a command for each object: events that the VM exposes and
those that its guest registered, and a state of each vCPU; the review asked for what is generic instead. So here the
same objects are firmware pseudo-registers, too, of the VM and of the vCPU: their ids and shapes are the simulator's.
No event is delivered here, as no interrupt is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64.rules import Rule, mask
from migstream.model import Scope
from migstream.registers import arm64_ids

if TYPE_CHECKING:
    from migstream.backends.sim.arm64.guest import Access
    from migstream.host.profile import HostProfile
    from migstream.model import Words

SDEI = "sdei"
"""In `HostProfile.behaviour`: the version of the series."""

SCOPE_CAP = 210
"""KVM_CAP_ARM_REG_SCOPE, as proposed for 5.18; the number is another capability's now."""

ASYMMETRIC, ASYMMETRIC_CAP = "ARM_ASYMMETRIC_VCPUS", 1 << 16
"""A capability, with a number that no kernel uses: KVM_ARM_VCPU_INIT takes other features than the first vCPU's."""

EVENTS = 2
"""Events that a kernel implements: 0, the one that software signals, and one for asynchronous page faults."""


@dataclass(frozen=True, slots=True)
class PseudoRegister:
    """A firmware pseudo-register; `reset`: its value on a new VM, of its size."""

    id: int
    scope: Scope
    reset: bytes
    what: str


def _row(number: int, size: int, bits: int, what: str, scope: Scope = Scope.VCPU, reset: int = 0) -> PseudoRegister:
    return PseudoRegister(arm64_ids.ARM64 | size | arm64_ids.FW | number, scope, reset.to_bytes(bits // 8, "little"),
                          what)


_MASKED = 1
"""SDEI 1.1, 5.1.16: a PE is masked at reset."""

HANDLERS = tuple(_row(4 + n, arm64_ids.U128, 128, f"event handler {n}: entry point, argument") for n in range(4))
BITMAPS = tuple(_row(8 + n, arm64_ids.U64, 64, f"events {what}")
                for n, what in enumerate(("registered", "enabled", "running", "pending")))

SDEI_VERSIONS: dict[int, tuple[PseudoRegister, ...]] = {
    7: (*HANDLERS, *BITMAPS,
        _row(12, arm64_ids.U2048, 2048, "event context: PC, PSTATE, X0 to X17"),
        _row(13, arm64_ids.U64, 64, "PE state: masked", reset=_MASKED)),
    5: (*(_row(0x100 + n, arm64_ids.U128, 128, f"exposed event {n}: number, type, signaled, priority", Scope.VM)
          for n in range(EVENTS)),
        *(_row(0x110 + n, arm64_ids.U2048, 2048, f"registered event {n}: number, reference count, route, entry point, "
               "argument, and for each of 512 vCPUs whether it is registered and enabled", Scope.VM)
          for n in range(EVENTS)),
        _row(0x120, arm64_ids.U256, 256, "vCPU state: masked, critical and normal event", reset=_MASKED),
        *(_row(0x121 + n, arm64_ids.U2048, 2048, f"context of a {kind} event: X0 to X17, PC, PSTATE")
          for n, kind in enumerate(("critical", "normal")))),
}
"""By version of the series, in the order of their numbers."""

_HANDLER, _ALL_VCPUS = 0x4000_0000, b"\xff" * 64

REGISTERED_EVENT: tuple[dict[int, bytes], ...] = (
    {HANDLERS[0].id: struct.pack("<2Q", _HANDLER, 0x5DE1), BITMAPS[0].id: struct.pack("<Q", 1),
     BITMAPS[1].id: struct.pack("<Q", 1)},
    {SDEI_VERSIONS[5][0].id: struct.pack("<QBBB5x", 0, 0, 1, 0),
     SDEI_VERSIONS[5][EVENTS].id: struct.pack("<5Q", 0, 1, 0, _HANDLER, 0x5DE1) + 2 * _ALL_VCPUS + bytes(88)},
)
"""By version, 7 and 5: what a guest leaves that has event 0, the one that software signals, registered and enabled."""

_BITMAP_IDS = frozenset(row.id for row in BITMAPS)
_LATER_HANDLERS = frozenset(row.id for row in HANDLERS[EVENTS:])


def _sdei_bitmap(profile: HostProfile, id: int) -> bool:
    return id in _BITMAP_IDS and profile.behaviour.get(SDEI) == 7


def _no_such_handler(profile: HostProfile, id: int) -> bool:
    return id in _LATER_HANDLERS and profile.behaviour.get(SDEI) == 7


def _implemented(at: Access, values: Words) -> Words:
    return values & mask((1 << EVENTS) - 1)


def _nothing(at: Access, values: Words) -> Words:
    return np.zeros_like(values)


PROPOSED_RULES: tuple[Rule, ...] = (
    Rule("bits of events that there are", _sdei_bitmap, "SDEI v7: kvm_sdei_set_reg()", keep=_implemented),
    Rule("a handler of no event is taken and dropped", _no_such_handler, "SDEI v7: kvm_sdei_set_reg()", keep=_nothing),
)
"""Beside these the pseudo-registers are kept as written."""
