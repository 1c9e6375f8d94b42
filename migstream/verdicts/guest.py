"""Guests to be judged that no stream holds: started under a contract, fresh on a host, or moved to one. Pure.

All three are a `Saved` with the values that a host's profile, a contract or a plan says: of every register that the
host lists for a vCPU with these features. Layouts are by scope and phase alone; nothing is written from them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace

from migstream.contract import Contract
from migstream.host.baseline_x86_64 import shown
from migstream.host.behaviour import of_profile
from migstream.host.profile import HostProfile, shown_cpuid
from migstream.model import Arch, Klass, Layout, Machine, Phase, Scope, Slot
from migstream.registers import gic, ids, vcpu_features, x86_64
from migstream.registers.catalogue import lookup
from migstream.verdicts.facts import Pair
from migstream.verdicts.model import Column, Kernel, Saved, Verdict


def of_contract(contract: Contract, host: HostProfile) -> Saved:
    """Return a guest of one vCPU that was started under a contract.

    Args:
        host: where it is to go: bits that the contract leaves free are as there.
    """
    devices = {"vcpu_features": contract.vcpu_features} if contract.arch == Arch.ARM64 else {}
    machine = Machine(contract.arch, 1, (), devices)
    own = Pair(Saved(machine, ()), host)
    values = {id: _with_free(value, contract.free.get(id, 0), own.default(id)) for id, value in contract.values.items()}
    return _saved(machine, _columns(values), contract)


def _with_free(value: bytes, mask: int, host: int | None) -> bytes:
    if not mask or host is None:
        return value
    return (int.from_bytes(value, "little") & ~mask | host & mask).to_bytes(len(value), "little")


def fresh(host: HostProfile, features: int = vcpu_features.DEFAULT, pinned: Contract | None = None) -> Saved:
    """Return a guest of one vCPU, started on a host and saved before it ran.

    Args:
        features: arm64: as KVM_ARM_VCPU_INIT takes them.
        pinned: what whoever started it had pinned; None for the kernel's own defaults.
    """
    machine = Machine(host.arch, 1, (), _devices(host, features))
    pair = Pair(Saved(machine, ()), host)
    values = dict(_defaults(pair))
    if pinned is not None:
        values |= {id: _with_free(value, pinned.free.get(id, 0), int.from_bytes(values[id], "little"))
                   for id, value in pinned.values.items() if id in values}
    return _saved(machine, _columns(values), _promise(host, features, values))


def moved(pair: Pair, verdicts: Iterable[Verdict]) -> Saved:
    """Return the guest of a pair as its host would save it after a restore by these verdicts.

    What the stream lacked and the host has is there with the value that was added, or the host's own.
    """
    columns = _columns(dict(_defaults(pair)))
    for verdict in verdicts:
        if verdict.target is None:
            continue
        column = pair.saved.columns.get(verdict.slot.id)
        if verdict.value is not None:
            columns[verdict.target.id] = Column.of(verdict.target, verdict.value)
        elif column is not None and verdict.target == verdict.slot and verdict.kernel != Kernel.DROPS:
            columns[verdict.slot.id] = column
    kept = _promise(pair.host, pair.features, columns)
    before = pair.saved.contract.behaves_as if pair.saved.contract else {}
    behaves_as = {**{id: value for id, value in before.items() if id not in columns}, **kept.behaves_as}
    contract = replace(kept, behaviour=replace(kept.behaviour, behaves_as=behaves_as))
    return _saved(pair.saved.machine, columns, contract)


def _devices(host: HostProfile, features: int) -> dict[str, int]:
    if host.arch != Arch.ARM64:
        return {}
    chip = {"gic_distributor": 0, "gic_redistributors": 0x10_0000} if "gicv3" in host.devices else {}
    return {"vcpu_features": features, **chip}


def _promise(host: HostProfile, features: int, there: Container[int]) -> Contract:
    """What the host behaves as where it has no register."""
    found = of_profile(host.with_features(features) if host.arch == Arch.ARM64 else host)
    absent = {id: value for id, value in found.behaves_as.items() if id not in there}
    return Contract(host.arch, host.kernel, host.cpu, features, behaviour=replace(found, behaves_as=absent))


def _defaults(pair: Pair) -> Iterator[tuple[int, bytes]]:
    """Every register that the host saves of a vCPU that never ran, with its value."""
    host = pair.host
    if host.arch == Arch.ARM64:
        for id in host.registers:
            value = pair.default(id)
            size = ids.size_in_id(id)
            if value is not None and size is not None:
                yield id, value.to_bytes(size, "little")
        if "gic_distributor" in pair.saved.machine.devices:
            yield from _chip(host)
        return
    for id, bytes_ in host.defaults.items():
        if id not in (x86_64.CPUID2.id, x86_64.SREGS.id if host.capabilities.get("SREGS2") else 0):
            yield id, bytes_
    for index in host.feature_msrs:
        id = ids.msr_id(index)
        if index in host.msr_bits and lookup(id).klass == Klass.FEATURE:
            yield id, shown(host, index).to_bytes(8, "little")
    yield x86_64.CPUID2.id, shown_cpuid(host)


def _chip(host: HostProfile) -> Iterator[tuple[int, bytes]]:
    """Of the interrupt controller, what a catalogue row knows and a fresh VM answers."""
    return ((id, value) for id, value in host.attributes.items()
            if value and lookup(id).known and id >> 40 & 0xFF == gic.GICV3)


def _columns(values: Mapping[int, bytes]) -> dict[int, Column]:
    return {id: Column.of(Slot(id, len(value)), value) for id, value in values.items()}


def _saved(machine: Machine, columns: Mapping[int, Column], contract: Contract) -> Saved:
    places: dict[tuple[Phase, Scope], list[Slot]] = {}
    for id, column in columns.items():
        row = lookup(id)
        places.setdefault((row.phase, row.scope), []).append(column.slot)
    layouts = tuple(Layout(scope, phase, tuple(slots)) for (phase, scope), slots in sorted(places.items()))
    return Saved(machine, layouts, columns, contract)
