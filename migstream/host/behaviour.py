"""What a host's kernel behaves as where it has no register: from a profile to the contract's second half. Pure."""

from __future__ import annotations

from migstream.contract import DERIVED, RECORDED, Behaviour
from migstream.host.profile import HostProfile
from migstream.model import Arch
from migstream.registers import ids
from migstream.registers.firmware_arm64 import behaves_as

_FEATURE_MSR = "KVM_GET_MSRS on /dev/kvm: a feature MSR that no vCPU lists"


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
        return Behaviour(found if profile.firmware else DERIVED, values, how, profile.firmware, unknown)
    extra = {ids.msr_id(index): value.to_bytes(8, "little") for index, value in profile.feature_msrs.items()
             if index not in profile.msrs}
    return Behaviour(found, extra, dict.fromkeys(extra, _FEATURE_MSR))
