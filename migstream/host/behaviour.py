"""What a host's kernel behaves as where it has no register: from a profile to the contract's second half. Pure."""

from __future__ import annotations

from migstream.contract import DERIVED, RECORDED, Behaviour
from migstream.host.profile import HostProfile
from migstream.model import Arch
from migstream.registers import ids
from migstream.registers.firmware_arm64 import behaves_as

_FEATURE_MSR = "KVM_GET_MSRS on /dev/kvm: a feature MSR that no vCPU lists"


def unlike(profile: HostProfile) -> dict[int, int]:
    """arm64: registers that a guest reads otherwise than KVM_GET_ONE_REG has them, with what it reads.

    KVM can't be told to change such a register for the guest: it reads the CPU's own. CTR_EL0 was so until it was
    always trapped (6.6): on a CPU without IDC whose caches need no maintenance, the register has IDC, the guest none.
    """
    return {id: seen for id, seen in profile.guest_registers.items() if id in profile.defaults
            and seen != int.from_bytes(profile.defaults[id], "little") and not _writable(profile, id)}


def _writable(profile: HostProfile, id: int) -> bool:
    """What can be written is what a guest is shown; it may change with the first run (no GIC: ID_AA64PFR0_EL1)."""
    return any(profile.register_bits.get(id, (b"",))[0]) or bool(profile.writable_masks.get(id))


def of_profile(profile: HostProfile, found: str = RECORDED) -> Behaviour:
    """Return what the host behaves as.

    arm64: firmware registers that it does not list, from its answers to a guest. x86-64: feature MSRs that a guest
    reads and no bank carries, because KVM_GET_MSR_INDEX_LIST leaves them out.

    Args:
        found: how the profile was come by. Without answers in it (captured before there were any) the result says
            `DERIVED`, and names each register that nobody knows.
    """
    if profile.arch == Arch.ARM64:
        values, how, unknown = behaves_as(profile.firmware, profile.listed)
        told = {**profile.firmware, **unlike(profile)}
        return Behaviour(found if profile.firmware else DERIVED, values, how, dict(sorted(told.items())), unknown)
    extra = {ids.msr_id(index): value.to_bytes(8, "little") for index, value in profile.feature_msrs.items()
             if index not in profile.msrs}
    return Behaviour(found, extra, dict.fromkeys(extra, _FEATURE_MSR))
