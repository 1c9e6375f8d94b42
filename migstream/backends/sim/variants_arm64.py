"""Optional rules of arm64 kernels: the proposals that never merged, and what a next kernel may add, hide or raise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migstream.backends.sim.arm64.proposals import ASYMMETRIC, SDEI, SDEI_VERSIONS
from migstream.backends.sim.variants import Subject, Variant, behaves
from migstream.errors import UsageError
from migstream.host.profile import SCOPE_CAPABILITY
from migstream.model import Arch, Scope
from migstream.registers import arm64, arm64_ids, firmware_arm64, ids
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

_ARM = (Arch.ARM64,)
_REGISTER = "=(?:0x[0-9a-f]{1,16}|[A-Za-z0-9_]+)"
_BY_NAME = {row.name: row.id for row in arm64.ROWS if row.id >> 56 != ids.OURS}


def _id(argument: str) -> int:
    """The register that an argument names: by the kernel's name or by KVM's id."""
    word = argument.removeprefix("=")
    if word in _BY_NAME:
        return _BY_NAME[word]
    try:
        return int(word, 0)
    except ValueError:
        raise UsageError(f"no register {word!r}; give its id or the kernel's name") from None


def _subject(argument: str) -> Subject:
    try:
        return ("register", _id(argument))
    except UsageError:
        return ("register", argument)


def _everywhere(profile: HostProfile) -> frozenset[int]:
    """What vCPUs of this kernel may have, whatever their features."""
    return profile.listed.union(*profile.feature_registers.values())


# which registers are the VM's, said by the kernel


def _reg_scope(profile: HostProfile, argument: str) -> HostProfile:
    flagged = _V4_FLAGS if argument else _once_a_vm(profile)
    return replace(profile, capabilities={**profile.capabilities, SCOPE_CAPABILITY: 1},
                   scope_flags=tuple(sorted(_everywhere(profile).intersection(flagged))))


def _once_a_vm(profile: HostProfile) -> frozenset[int]:
    """By experiment; of what no write changes, by the catalogue."""
    found = profile.known_scopes
    return frozenset(id for id in _everywhere(profile) if found.get(id, lookup(id).scope) == Scope.VM)


_V4_FLAGS = frozenset((
    arm64_ids.firmware(1), arm64_ids.firmware(2), *(arm64_ids.bitmap(n) for n in range(4)),
    *(row.id for version in SDEI_VERSIONS.values() for row in version if row.scope == Scope.VM)))
"""Those that version 4 of the series marked; PSCI_VERSION was left out, which the review objected to. And SDEI's."""


# registers that come and go


def _with_register(profile: HostProfile, id: int, default: bytes, scope: Scope, bits: bytes) -> HostProfile:
    return replace(profile, registers=tuple(sorted((*profile.registers, id))),
                   defaults={**profile.defaults, id: default}, scopes={**profile.scopes, id: scope.value},
                   register_bits={**profile.register_bits, id: (bits, bits)})


def _add_register(profile: HostProfile, argument: str) -> HostProfile:
    id = _id(argument) if argument else _NEW
    size = ids.size_in_id(id)
    if arm64_ids.class_of(id) not in (arm64_ids.SYSREG, arm64_ids.FW) or size is None:
        raise UsageError(f"{id:#x} is no id of a system or firmware register")
    if id in _everywhere(profile):
        raise UsageError(f"the kernel has {lookup(id).name} already")
    return _with_register(profile, id, bytes(size), lookup(id).scope, b"\xff" * size)


_NEW = arm64_ids.sysreg(3, 0, 11, 3, 1)
"""An encoding that no architecture extension up to 2024 gives a register."""


def _hide_register(profile: HostProfile, argument: str) -> HostProfile:
    id = _id(argument)
    if id not in _everywhere(profile):
        raise UsageError(f"the kernel has no {lookup(id).name} to hide")
    if arm64_ids.class_of(id) == arm64_ids.CORE:
        raise UsageError(f"{lookup(id).name}: no vCPU is without its core registers")
    gone: dict[str, Any] = {field: {key: value for key, value in getattr(profile, field).items() if key != id}
                            for field in _BY_ID}
    lists = {mask: tuple(one for one in changed if one != id) for mask, changed in profile.feature_registers.items()}
    return replace(profile, registers=tuple(one for one in profile.registers if one != id), feature_registers=lists,
                   scope_flags=tuple(one for one in profile.scope_flags if one != id), **gone)


_BY_ID = ("defaults", "feature_defaults", "refused", "scopes", "scope_found", "feature_scopes", "register_bits",
          "feature_bits", "bit_errnos", "readback", "after_run", "writable_masks", "guest_registers")
"""Fields of a profile that are kept by register id."""


# firmware: what a guest may call


_PSCI_VERSION = arm64_ids.firmware(0)


def _psci(profile: HostProfile, argument: str) -> HostProfile:
    major, minor = (int(number) for number in argument.split("."))
    wanted, now = major << 16 | minor, int.from_bytes(profile.defaults[_PSCI_VERSION], "little")
    if wanted <= now:
        raise UsageError(f"the kernel has PSCI {now >> 16}.{now & 0xFFFF} already")
    call = firmware_arm64.PSCI_VERSION.key
    told = {call: wanted} if call in profile.firmware else {}
    return replace(profile, defaults={**profile.defaults, _PSCI_VERSION: wanted.to_bytes(8, "little")},
                   firmware={**profile.firmware, **told})


_BITMAPS = {row.name: row.id for row in arm64.BITMAPS}
_OPT_IN = _BITMAPS["VENDOR_HYP_BMAP_2"]
_FIRST_BITMAP = "STD_BMAP"


def _bitmap(argument: str) -> tuple[int, int | None]:
    """Id and bit of `=NAME.BIT`; the bit is None where it is the next free one."""
    name, _, bit = (argument.removeprefix("=") or _FIRST_BITMAP).partition(".")
    return _BITMAPS[name], int(bit) if bit else None


def _bitmap_subject(argument: str) -> Subject:
    id, bit = _bitmap(argument)
    return ("register", id, bit)


def _bitmap_bit(profile: HostProfile, argument: str) -> HostProfile:
    """A service that is on unless the VMM takes it away; in the bitmap that is opt-in, one that is off."""
    id, bit = _bitmap(argument)
    if id not in profile.listed:
        raise UsageError(f"the kernel has no {lookup(id).name}")
    taken = int.from_bytes(profile.register_bits[id][0], "little")
    default = int.from_bytes(profile.defaults[id], "little")
    bit = (taken | default).bit_length() if bit is None else bit
    if (taken | default) >> bit & 1:
        raise UsageError(f"{lookup(id).name} has bit {bit} already")
    bits = (taken | 1 << bit).to_bytes(8, "little")
    on = default if id == _OPT_IN else default | 1 << bit
    return replace(profile, defaults={**profile.defaults, id: on.to_bytes(8, "little")},
                   register_bits={**profile.register_bits, id: (bits, bits)})


# SDEI and vCPUs that differ


def _sdei(profile: HostProfile, argument: str) -> HostProfile:
    version = int(argument.removeprefix("=v") or max(SDEI_VERSIONS))
    for row in SDEI_VERSIONS[version]:
        if row.id in _everywhere(profile):
            raise UsageError(f"the kernel has {lookup(row.id).name} already")
        profile = _with_register(profile, row.id, row.reset, row.scope, b"\xff" * len(row.reset))
    if profile.says_scope:
        of_vm = (row.id for row in SDEI_VERSIONS[version] if row.scope == Scope.VM)
        profile = replace(profile, scope_flags=tuple(sorted({*profile.scope_flags, *of_vm})))
    return behaves(profile, **{SDEI: version})


def _asymmetric(profile: HostProfile, argument: str) -> HostProfile:
    if not profile.writable_masks:
        raise UsageError("the kernel lets vCPUs have different features anyway (up to 6.4)")
    return replace(profile, capabilities={**profile.capabilities, ASYMMETRIC: 1})


_A_REGISTER = "a register's id in hexadecimal, or the kernel's name of it"

VARIANTS = (
    Variant("reg-scope", "[=v4]", "(?:=v4)?", _ARM,
            "KVM_CAP_ARM_REG_SCOPE (210): KVM_GET_REG_LIST sets bit 28 in the id of what a VM has once; v4: of the "
            "workarounds 1 and 2 and the bitmaps alone, as in the series",
            "\"KVM: arm64: Add support for hypercall services selection\", v4 (2022-02-24), patches 2 and 3",
            _reg_scope, takes="v4 or nothing"),
    Variant("sdei", "[=v5|v7]", "(?:=v[57])?", _ARM,
            "SDEI pseudo-registers: v7 of a vCPU (64, 128 and 2048 bits), v5 with exposed and registered events of "
            "the VM", "\"KVM: arm64: Support SDEI Virtualization\", v7 (2022-05-27) and v5 (2022-03-22)", _sdei,
            takes="v5 or v7"),
    Variant("asymmetric", "", "", _ARM,
            "a capability with which KVM_ARM_VCPU_INIT takes other features than the first vCPU's. The ioctl alone: a "
            "machine has one set of features here, so such a VM is neither saved nor restored",
            "the review of the scope series (2022): asymmetric vCPUs may come, opt-in; 6.5 forbids them", _asymmetric),
    Variant("psci", "MAJOR.MINOR", "[1-9][.][0-9]{1,2}", _ARM, "a newer PSCI version, which is the default",
            "5.18 made it 1.1, 6.13 made it 1.3", _psci, subject=lambda argument: ("register", _PSCI_VERSION),
            takes="a version from 1.0 to 9.99"),
    Variant("bitmap-bit", "[=BITMAP[.BIT]]", f"(?:=(?:{'|'.join(_BITMAPS)})(?:[.](?:[1-5]?[0-9]|6[0-3]))?)?", _ARM,
            "one more service in a firmware bitmap: on by default, but in VENDOR_HYP_BMAP_2; STD_BMAP and the next "
            "free bit unless told", "Documentation/virt/kvm/arm/fw-pseudo-registers.rst; 6.15 added two", _bitmap_bit,
            several=True, subject=_bitmap_subject, takes=f"one of {', '.join(_BITMAPS)}, and a bit from 0 to 63"),
    Variant("add-register", "[=REGISTER]", f"(?:{_REGISTER})?", _ARM,
            "one more system or firmware register: all bits are kept, 0 at first",
            "7.2 lists registers that 6.12 has not", _add_register, several=True,
            subject=lambda argument: _subject(argument) if argument else ("register", _NEW), takes=_A_REGISTER),
    Variant("hide-register", "=REGISTER", _REGISTER, _ARM, "the kernel knows this register no more",
            "6.13 hides TCR2_EL1, PIRE0_EL1 and PIR_EL1 of guests without them", _hide_register, several=True,
            subject=_subject, takes=_A_REGISTER),
)
