"""Host profile: what a kernel on a CPU offers, as facts without judgement.

Captured from a backend (see `migstream.host.probe`), kept as documented JSON (formats/SPEC.md, "Host profile"), used
by the plan, and as the ground truth of the simulator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from migstream.errors import StreamError, UsageError
from migstream.model import Arch, Scope

PROFILE_VERSION = 1


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
            (0 = fine; -1 = a short KVM_GET_MSRS or KVM_SET_MSRS count).
        made_by: the command that made it.
        registers: arm64: KVM_GET_REG_LIST of a vCPU without optional features, ascending.
        feature_registers: arm64: by vCPU feature mask, the ids that this feature adds to `registers` (those that are
            not there) or hides (those that are), ascending.
        vcpu_features: arm64: bits that KVM_ARM_VCPU_INIT takes. devices: arm64: what KVM_CREATE_DEVICE makes.
        writable_masks: arm64: KVM_ARM_GET_REG_WRITABLE_MASKS, by register id; empty where the kernel has none.
        scopes: arm64: `vm` or `vcpu` by register id, found by experiment; empty where there was none.
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
    made_by: str = ""
    registers: tuple[int, ...] = ()
    feature_registers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    vcpu_features: int = 0
    devices: tuple[str, ...] = ()
    writable_masks: dict[int, int] = field(default_factory=dict)
    scopes: dict[int, Scope] = field(default_factory=dict)

    @property
    def max_vcpus(self) -> int:
        """vCPUs that one VM may have."""
        return self.capabilities.get("MAX_VCPUS", 0)

    def with_features(self, vcpu_features: int) -> HostProfile:
        """arm64: the same host with `registers` as KVM_GET_REG_LIST names them for a vCPU with these features."""
        changed = (ids for mask, ids in self.feature_registers.items() if mask & ~vcpu_features == 0)
        return replace(self, registers=tuple(sorted(self.listed ^ frozenset().union(*changed))))

    @cached_property
    def listed(self) -> frozenset[int]:
        """`registers`, for looking one up."""
        return frozenset(self.registers)



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
    "registers": _hex,
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
    """Return the profile in JSON text. Raises: UsageError naming `name` and the field."""
    try:
        data = json.loads(text)
        version = data.pop("migstream_host_profile")
        if version != PROFILE_VERSION:
            raise UsageError(f"{name}: host profile version {version}; this migstream reads {PROFILE_VERSION}")
        arch = Arch[str(data.pop("arch")).upper()]
        return HostProfile(arch=arch, **{key: _read(key, value) for key, value in data.items()})
    except (ValueError, KeyError, TypeError, AttributeError, StreamError) as error:
        raise UsageError(f"{name}: not a host profile: {type(error).__name__}: {error}") from error


_READERS: dict[str, Any] = {
    "kernel": str, "cpu": str, "backend": str, "made_by": str,
    "capabilities": lambda v: {str(k): int(n) for k, n in v.items()},
    "msrs": lambda v: tuple(int(n) for n in v),
    "feature_msrs": lambda v: {int(k, 16): int(n) for k, n in v.items()},
    "sizes": lambda v: {int(k, 16): int(n) for k, n in v.items()},
    "cpuid": bytes.fromhex,
    "defaults": lambda v: {int(k, 16): bytes.fromhex(b) for k, b in v.items()},
    "refused": lambda v: {int(k, 16): (int(pair[0]), int(pair[1])) for k, pair in v.items()},
    "registers": lambda v: tuple(int(n, 16) for n in v),
    "feature_registers": lambda v: {int(k, 16): tuple(int(n, 16) for n in ids) for k, ids in v.items()},
    "vcpu_features": int,
    "devices": lambda v: tuple(str(n) for n in v),
    "writable_masks": lambda v: {int(k, 16): int(n, 16) for k, n in v.items()},
    "scopes": lambda v: {int(k, 16): Scope(n) for k, n in v.items()},
}


def _read(key: str, value: Any) -> Any:
    try:
        return _READERS[key](value)
    except KeyError as error:
        raise ValueError(f"unknown field {key!r}") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"field {key!r}: {error}") from error
