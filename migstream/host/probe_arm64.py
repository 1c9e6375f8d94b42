"""What only an arm64 host is asked: its register list with and without vCPU features, and the features it refuses.

A room is a VM whose vCPUs have one set of features. What is listed in both is tried in the first, and in the second,
too, where its default is another there: a feature's ID register is fixed at 0 on a vCPU without the feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from migstream.errors import BackendError
from migstream.host import attributes_arm64, experiment, firmware_arm64
from migstream.host.profile import HostProfile
from migstream.host.scratch import Host, Scratch, scratch_vm
from migstream.model import Klass
from migstream.registers import gic, ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.registers.firmware_arm64 import CALL_NAMES

_IRQS, _ITS = 64, 0x808_0000
_GIC = {"gic_distributor": 0x800_0000, "gic_redistributors": 0x80A_0000, "gic_irqs": _IRQS}
_PMU_IRQ = (23).to_bytes(4, "little")
"""A private interrupt; a vCPU with a PMU runs only when the PMU has one."""


@dataclass(frozen=True, slots=True)
class Room:
    """What vCPUs with these features have.

    Attributes:
        features: mask. values: default by register id. refused: errno of the read, for what can't be read.
    """

    features: int
    values: Mapping[int, bytes]
    refused: Mapping[int, int]


def probe(host: Host, experiments: bool) -> HostProfile:
    """Return the profile of an arm64 host. Raises: BackendError."""
    base = host.profile()
    plain = _room(host, vcpu_features.DEFAULT)
    full = _room(host, vcpu_features.DEFAULT | vcpu_features.together(base.vcpu_features))
    defaults = dict(plain.values)
    profile = dataclasses.replace(
        base, **_UNTRIED, defaults=defaults, attributes=_attributes(host, full.features),
        feature_defaults={id: value for id, value in full.values.items() if defaults.get(id) != value},
        refused={id: (no, 0) for id, no in {**full.refused, **plain.refused}.items()},
        features_refused=_features_refused(host), **_seen_by_a_guest(host))
    if not experiments:
        return profile
    return _with_features(host, _experiments(host, profile, plain, plain.values), full)


_UNTRIED: dict[str, Any] = {**experiment.UNTRIED, "behaviour": {}, "feature_bits": {}, "feature_scopes": {}}


def _seen_by_a_guest(host: Host) -> dict[str, Any]:
    """`firmware` and `guest_registers`; a host that says them itself, a simulated one, isn't asked.

    Raises: BackendError.
    """
    if host.profile().firmware:
        return {}
    answers = firmware_arm64.ask(host)
    return {"firmware": {key: x0 for key, x0 in answers.items() if key in CALL_NAMES},
            "guest_registers": {key: value for key, value in answers.items() if key not in CALL_NAMES}}


def _with_features(host: Host, profile: HostProfile, full: Room) -> HostProfile:
    """What is only there with all features is recorded like the rest; what is another then, beside it."""
    added = {id: value for id, value in full.values.items() if id not in profile.defaults}
    profile = _experiments(host, profile, full, added)
    changed = {id: value for id, value in full.values.items()
               if id in profile.defaults and profile.defaults[id] != value and lookup(id).klass != Klass.CLOCK}
    with _vm(host, full.features) as scratch:
        trials = {id: experiment.try_bits(scratch, id, len(value)) for id, value in changed.items()}
        found = experiment.scopes(scratch, trials)
    return dataclasses.replace(
        profile, feature_bits={id: experiment.bits_of(trial) for id, trial in trials.items()},
        feature_scopes={id: one.scope for id, one in found.items() if one.scope != profile.scopes[id]})


def _attributes(host: Host, features: int) -> dict[int, bytes]:
    """Of a vCPU with all features and an interrupt controller with all that the kernel can make of one."""
    made = host.profile().devices
    devices = {**(_GIC if "gicv3" in made else {}), **({"its": _ITS} if "its" in made else {})}
    with scratch_vm(host, devices={"vcpu_features": features, **devices}) as scratch:
        scratch.vm.layouts()  # closes the set of registers: SVE
        return attributes_arm64.ask(scratch, _IRQS)


def _room(host: Host, features: int) -> Room:
    with scratch_vm(host, devices={"vcpu_features": features}) as scratch:
        layouts, refused = scratch.vm.layouts()
        sizes = {slot.id: slot.size for layout in layouts for slot in layout.slots if slot.id >> 56 != ids.OURS}
        read = {id: scratch.read(id, size, 0) for id, size in sizes.items()}
    values = {id: value for id, value in read.items() if isinstance(value, bytes)}
    errnos = {id: value for id, value in read.items() if isinstance(value, int)}
    return Room(features, values, errnos | {no.register: no.errno for no in refused if no.register >> 56 != ids.OURS})


def _experiments(host: Host, profile: HostProfile, room: Room, values: Mapping[int, bytes]) -> HostProfile:
    """Bits and scope on vCPUs that never ran; then what a run ends, on others."""
    with _vm(host, room.features) as scratch:
        trials = {id: experiment.try_bits(scratch, id, len(value)) for id, value in values.items()}
        found = experiment.scopes(scratch, trials)
    with _vm(host, room.features, runs=True) as scratch:
        after = experiment.after_run(scratch, trials, enter=True)
    behaviour = dict(profile.behaviour)
    if after.entering_is_running is not None:
        behaviour.setdefault(ENTERING, int(after.entering_is_running))
    profile = dataclasses.replace(profile, behaviour=behaviour)
    return experiment.recorded(profile, trials, found, after.errnos)


@contextmanager
def _vm(host: Host, features: int, runs: bool = False) -> Iterator[Scratch]:
    """A scratch VM of several vCPUs, complete enough to run where that is asked for."""
    pmu = runs and bool(features & vcpu_features.PMU_V3)
    devices = {"vcpu_features": features, **(_GIC if pmu else {})}
    with scratch_vm(host, experiment.VCPUS, devices=devices) as scratch:
        scratch.vm.layouts()  # closes the set of registers: SVE
        for vcpu in range(scratch.vcpus if pmu else 0):
            scratch.write(gic.PMU_IRQ.id, _PMU_IRQ, vcpu)
        yield scratch


ENTERING = "entering_is_running"
"""In `HostProfile.behaviour`: 1: a KVM_RUN that leaves before the first instruction (`immediate_exit`) ends all that a
run ends; 0: it doesn't; absent: no register can tell."""

_UNKNOWN_FEATURE = 1 << (vcpu_features.FEATURES[-1].bit + 1)
"""The first bit without a name: the errno of what a kernel does not know is a fact, too."""


def _features_refused(host: Host) -> dict[int, int]:
    """Features that a vCPU can't be made with, each alone (pointer authentication only comes in a pair)."""
    masks = [*(feature.mask for feature in vcpu_features.FEATURES), _UNKNOWN_FEATURE]
    return {mask: no for mask in masks
            if (no := _refused(host, vcpu_features.DEFAULT | vcpu_features.whole(mask)))}


def _refused(host: Host, features: int) -> int:
    try:
        with scratch_vm(host, devices={"vcpu_features": features}):
            return 0
    except BackendError as error:
        return error.errno
