"""Host profile: what a kernel on a CPU offers, as facts without judgement.

Captured from a backend (see `migstream.host.probe`), kept as documented JSON (formats/SPEC.md, "Host profile"), used
by the plan, and as the ground truth of the simulator.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from migstream import filekind, limits
from migstream.errors import ProfileError, ProfileLimit, ProfileTooNew, UsageError
from migstream.host import profile_rules
from migstream.host import profile_values as values
from migstream.model import Arch, Scope
from migstream.registers import vcpu_features
from migstream.registers.catalogue import must_have
from migstream.registers.cpuid import COMPUTED, STATE_BITS

PROFILE_VERSION = 2
"""1 had two more lists of registers, which followed from `registers` and `feature_registers`; capture it again."""

SCOPE_CAPABILITY = "ARM_REG_SCOPE"
"""A kernel with it says which registers are the VM's (KVM_CAP_ARM_REG_SCOPE, proposed)."""

FIXED = "fixed"
"""The scope of a register that no write changes: the catalogue's scope serves."""


@dataclass(frozen=True)
class HostProfile:
    """What one host offers.

    Attributes:
        arch: architecture of its guests. kernel, cpu: as the host names them. backend: `kvm` or `sim:…`.
        capabilities: KVM_CHECK_EXTENSION by name, without `KVM_CAP_`.
        msrs: KVM_GET_MSR_INDEX_LIST, in the kernel's order. feature_msrs: values that the kernel offers, by index.
        sizes: bytes of the registers whose size the host tells, by register id.
        cpuid: KVM_GET_SUPPORTED_CPUID as bytes (struct kvm_cpuid2).
        defaults: value of each register on a vCPU that never ran, by id (VM-scoped ones too), as bytes.
        refused: what answered an error, by register id: errno of the read, errno of writing the read value back
            (0 = fine; -1 = a short KVM_GET_MSRS or KVM_SET_MSRS count). For what can't be read, the second is the
            errno of writing 0: a write-only register has 0 there.
        msr_bits: by MSR index, found by trial one bit at a time on a vCPU with the supported CPUID: bits that the
            kernel takes, and of these the ones that read back. Running clocks are left out.
        cpuid_forced: words of CPUID entries that do not read back as written, by `cpuid_word()`: bits that are kept
            as written, bits that are set whatever was written.
        enable_caps: VM capabilities that KVM_ENABLE_CAP takes, by number: the bits that its first argument may have.
        behaviour: what other trials found, by name; `migstream.host.probe_x86_64.TRAITS` says what each means.
        made_by: the command that made it.
        registers: arm64: KVM_GET_REG_LIST of a vCPU with PSCI_0_2 alone, ascending, without scope flags.
        scope_flags: arm64: those of `registers` (with any features) that the list flags as the VM's; the kernel flags
            only where `capabilities` has ARM_REG_SCOPE, which was proposed for Linux and never merged.
        feature_registers: arm64: by vCPU feature mask, the ids that this feature adds to `registers` (those that are
            not there) or hides (those that are), ascending.
        vcpu_features: arm64: bits that KVM_ARM_VCPU_INIT takes. devices: arm64: what KVM_CREATE_DEVICE makes.
        writable_masks: arm64: KVM_ARM_GET_REG_WRITABLE_MASKS, by register id; empty where the kernel has none.
        scopes: `vm`, `vcpu` or `fixed` (no other value sticks) by register id, found by experiment; empty where there
            was none. scope_found: how, in words, likewise.
        feature_defaults: arm64: as `defaults` with all features, where that differs or is only there then.
        feature_bits: arm64: as `register_bits` with all features, of what is in both and has another default then.
            feature_scopes: as `scopes`, of these, where it differs.
        features_refused: arm64: by mask of one vCPU feature: errno of KVM_ARM_VCPU_INIT.
        attributes: arm64: device attributes that KVM_HAS_DEVICE_ATTR knows, of interrupt controllers, vCPUs and the VM,
            by id: the value on a VM that never ran, of vCPU 0; empty for what can't be read (orders, write-only ones).
        xsave_components: x86-64: what guests may have in KVM_XSAVE, by name, in the order of their bits: CPUID leaf
            0xD and KVM_X86_XCOMP_GUEST_SUPP, which also has what a process must ask for first.
        register_bits: by register id, found by flipping bits of the default: bits that the kernel takes, and of these
            the ones that read back flipped, as bytes. x86-64: of all MSRs, feature MSRs too.
        bit_errnos: by register id: errnos of the flips that were refused, ascending.
        firmware: arm64: X0 after HVC of a guest of a VM with nothing set, by `registers.firmware_arm64.Call.key`.
        guest_registers: arm64: what the same guest read by MRS, by register id.
        readback: by register id: a value that was taken and what it read back as, where that differs.
        after_run: by register id, of those that can be written: errno of writing another value after the first
            KVM_RUN, errno of writing the same one; 0 = taken.
    """

    arch: Arch
    kernel: str
    cpu: str
    backend: str
    capabilities: dict[str, int] = field(default_factory=dict)
    msrs: tuple[int, ...] = ()
    feature_msrs: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    cpuid: bytes = b""
    defaults: dict[int, bytes] = field(default_factory=dict)
    refused: dict[int, tuple[int, int]] = field(default_factory=dict)
    msr_bits: dict[int, tuple[int, int]] = field(default_factory=dict)
    cpuid_forced: dict[int, tuple[int, int]] = field(default_factory=dict)
    enable_caps: dict[int, int] = field(default_factory=dict)
    behaviour: dict[str, int] = field(default_factory=dict)
    made_by: str = ""
    registers: tuple[int, ...] = ()
    feature_registers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    vcpu_features: int = 0
    devices: tuple[str, ...] = ()
    writable_masks: dict[int, int] = field(default_factory=dict)
    scopes: dict[int, str] = field(default_factory=dict)
    scope_found: dict[int, str] = field(default_factory=dict)
    feature_defaults: dict[int, bytes] = field(default_factory=dict)
    feature_bits: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    feature_scopes: dict[int, str] = field(default_factory=dict)
    features_refused: dict[int, int] = field(default_factory=dict)
    register_bits: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    bit_errnos: dict[int, tuple[int, ...]] = field(default_factory=dict)
    readback: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    after_run: dict[int, tuple[int, int]] = field(default_factory=dict)
    scope_flags: tuple[int, ...] = ()
    attributes: dict[int, bytes] = field(default_factory=dict)
    xsave_components: tuple[str, ...] = ()
    firmware: dict[int, int] = field(default_factory=dict)
    guest_registers: dict[int, int] = field(default_factory=dict)

    @property
    def max_vcpus(self) -> int:
        """vCPUs that one VM may have."""
        return self.capabilities.get("MAX_VCPUS", 0)

    def with_features(self, vcpu_features: int) -> HostProfile:
        """arm64: the same host with `registers` as KVM_GET_REG_LIST names them for a vCPU with these features."""
        changed = (ids for mask, ids in self.feature_registers.items() if mask & ~vcpu_features == 0)
        return replace(self, registers=tuple(sorted(self.listed ^ frozenset().union(*changed))))

    def with_all_features(self) -> HostProfile:
        """arm64: `with_features` of all those that one vCPU can have together."""
        return self.with_features(vcpu_features.DEFAULT | vcpu_features.together(self.vcpu_features))

    def measured_by(self, other: HostProfile | None) -> HostProfile:
        """The same with the scopes that `other` has by experiment. Raises: UsageError where that is another host's."""
        if other is None:
            return self
        for name in ("arch", "kernel", "cpu"):
            here, there = (one.arch.label if name == "arch" else getattr(one, name) for one in (self, other))
            if here != there:
                raise UsageError(f"the host profile is of {name} {there}, this host is {here}; capture it here")
        return replace(self, scopes=other.scopes, scope_found=other.scope_found, feature_scopes=other.feature_scopes)

    def completed_by(self, other: HostProfile | None) -> HostProfile:
        """The same with what `other`, captured from this very kernel and CPU, has and this one was never asked."""
        if other is None:
            return self
        missing = (item.name for item in fields(self) if not getattr(self, item.name) and item.name != "arch")
        return replace(self, **{name: getattr(other, name) for name in missing})

    @property
    def says_scope(self) -> bool:
        """Whether the kernel says which registers are the VM's."""
        return bool(self.capabilities.get(SCOPE_CAPABILITY))

    @cached_property
    def known_scopes(self) -> dict[int, Scope]:
        """By register id: what the kernel says where it says (`scope_flags`), else what an experiment found.

        Fixed registers are left out: the catalogue's scope serves. So it does for what is the VM's on every kernel and
        has no flag: the series that proposed flags did not mark all of it (PSCI_VERSION).
        """
        found = {id: Scope(name) for id, name in {**self.scopes, **self.feature_scopes}.items() if name != FIXED}
        if not self.says_scope:
            return found
        told = {id: Scope.VCPU for id in self.with_all_features().listed | self.listed if must_have(id) != Scope.VM}
        return {**found, **told, **dict.fromkeys(self.scope_flags, Scope.VM)}

    @cached_property
    def bank_scopes(self) -> dict[int, Scope]:
        """`known_scopes` as far as a stream may have them (`must_have`): the scopes that a save's layouts have."""
        return {id: scope for id, scope in self.known_scopes.items() if must_have(id) in (None, scope)}

    @cached_property
    def listed(self) -> frozenset[int]:
        """`registers`, for looking one up."""
        return frozenset(self.registers)


def cpuid_word(function: int, index: int, register: int) -> int:
    """Key of `HostProfile.cpuid_forced`: leaf, subleaf (below 2^24), and 0 to 3 for EAX, EBX, ECX, EDX."""
    return function << 32 | index << 8 | register


def shown_cpuid(profile: HostProfile) -> bytes:
    """The supported CPUID as a vCPU reads it back, as far as it does not depend on the vCPU's state (`STATE_BITS`).

    Some hosts show features that they don't list, whatever is written.
    """
    table = bytearray(profile.cpuid)
    for at in range(8, len(table) - 39, 40):
        leaf, subleaf, _, *words = struct.unpack_from("<7I", table, at)
        for n, word in enumerate(words):
            kept, put = profile.cpuid_forced.get(cpuid_word(leaf, subleaf, n), (0xFFFF_FFFF, 0))
            own = STATE_BITS.get((leaf, subleaf, n), 0) | COMPUTED.get((leaf, subleaf, n), 0)
            struct.pack_into("<I", table, at + 12 + 4 * n, word & own | (word & kept | put) & ~own)
    return bytes(table)


def to_json(profile: HostProfile) -> str:
    """Return the profile as JSON text, keys sorted, ids and bytes in hexadecimal."""
    out: dict[str, Any] = {"migstream_host_profile": PROFILE_VERSION}
    for item in fields(profile):
        value = getattr(profile, item.name)
        out[item.name] = _plain(_WRITERS[item.name](value) if item.name in _WRITERS else value)
    out["arch"] = profile.arch.label
    return json.dumps(out, indent=1, sort_keys=True) + "\n"


def _hex(values: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"{value:#x}" for value in values)


_WRITERS: dict[str, Any] = {
    "registers": _hex, "scope_flags": _hex,
    "firmware": lambda answers: dict(zip(answers, _hex(tuple(answers.values())), strict=True)),
    "guest_registers": lambda values: dict(zip(values, _hex(tuple(values.values())), strict=True)),
    "feature_registers": lambda changed: {mask: _hex(ids) for mask, ids in changed.items()},
    "writable_masks": lambda masks: dict(zip(masks, _hex(tuple(masks.values())), strict=True)),
}
"""Numbers of 64 bits as text: many readers of JSON lose bits above 53."""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(k): _plain(v) for k, v in sorted(value.items())}
    if isinstance(value, bytes):
        return value.hex()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _key(key: int | str) -> str:
    return key if isinstance(key, str) else f"{key:#x}"


def from_json(text: str, name: str = "profile") -> HostProfile:
    """Return the profile in JSON text. Raises: ProfileError and below naming `name` and the field; UsageError for a
    file of ours that is of another kind."""
    try:
        return _profile(values.document(text), name)
    except values.OverLimit as error:
        raise ProfileLimit(f"{name}: not a host profile: {error}") from error
    except ValueError as error:
        raise ProfileError(f"{name}: not a host profile: {error}") from error


def _profile(data: Any, name: str) -> HostProfile:
    if not isinstance(data, dict) or "migstream_host_profile" not in data:
        kind = filekind.of_object(data)
        wrong = UsageError if kind else ProfileError
        raise wrong(f"{name}: not a host profile: no object with a field 'migstream_host_profile'{kind}")
    _check_version(data.pop("migstream_host_profile"), name)
    read = {key: _read(key, value) for key, value in data.items()}
    if missing := [key for key in _REQUIRED if key not in read]:
        raise ValueError(f"no field {missing[0]!r}")
    profile = HostProfile(**read)
    profile_rules.check(profile, read.keys())
    return profile


def _check_version(version: Any, name: str) -> None:
    if type(version) is int and version == PROFILE_VERSION:
        return
    new = type(version) is int and version > PROFILE_VERSION
    older = "; capture it again" if type(version) is int and not new else ""
    raise (ProfileTooNew if new else ProfileError)(
        f"{name}: not a host profile: field 'migstream_host_profile': version {values.shown(version)}; this migstream "
        f"reads {PROFILE_VERSION}{older}")


_REQUIRED = ("arch", "kernel", "cpu", "backend")


def _arch(value: Any) -> Arch:
    for arch in Arch:
        if arch.label == value:
            return arch
    raise ValueError(f"no architecture {values.shown(value)}")


def _scope(value: Any) -> str:
    if value not in ("vm", "vcpu", FIXED):
        raise ValueError(f"no scope {values.shown(value)}")
    return str(value)


_u32, _u64, _errno = values.whole(0, values.U32), values.whole(0, values.U64), values.whole(0, 4095)
_result, _trial = values.whole(0, (1 << 31) - 1), values.whole(-1, 4095)
_id, _key32 = values.hexadecimal(values.U64), values.hexadecimal(values.U32)
_id_list = values.listing(_id, ascending=True)
_raws = values.table(_id, values.raw)
_raw_pairs = values.table(_id, values.pair(values.raw, values.raw))
_bit_pairs = values.pair(_u64, _u64)

_READERS: dict[str, Callable[[Any], Any]] = {
    "arch": _arch, "kernel": values.text, "cpu": values.text, "backend": values.text, "made_by": values.text,
    "capabilities": values.table(values.text, _result),
    "msrs": values.listing(_u32),
    "feature_msrs": values.table(_key32, _u64),
    "sizes": values.table(_id, values.whole(0, limits.MAX_ROW)),
    "cpuid": values.raw,
    "defaults": _raws,
    "refused": values.table(_id, values.pair(_trial, _trial)),
    "msr_bits": values.table(_key32, _bit_pairs), "cpuid_forced": values.table(_id, _bit_pairs),
    "enable_caps": values.table(_key32, _u64),
    "behaviour": values.table(values.text, _u64),
    "registers": _id_list,
    "feature_registers": values.table(_key32, _id_list),
    "vcpu_features": _u32,
    "devices": values.listing(values.text),
    "writable_masks": values.table(_id, _id),
    "scopes": values.table(_id, _scope),
    "scope_found": values.table(_id, values.text),
    "scope_flags": _id_list,
    "attributes": _raws,
    "xsave_components": values.listing(values.text),
    "feature_defaults": _raws,
    "features_refused": values.table(_key32, _errno),
    "register_bits": _raw_pairs, "feature_bits": _raw_pairs, "feature_scopes": values.table(_id, _scope),
    "firmware": values.table(_id, _id),
    "guest_registers": values.table(_id, _id),
    "readback": _raw_pairs, "after_run": values.table(_id, values.pair(_errno, _errno)),
    "bit_errnos": values.table(_id, values.listing(_trial)),
}


def _read(key: str, value: Any) -> Any:
    if key not in _READERS:
        raise ValueError(f"unknown field {values.shown(key)}")
    try:
        return _READERS[key](value)
    except ValueError as error:
        raise type(error)(f"field {key!r}: {error}") from error
