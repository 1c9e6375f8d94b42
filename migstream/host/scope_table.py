"""What scope makes of a restore's register writes, for one host: counted from its profile, never timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from migstream.host.compare import scope_counts
from migstream.host.profile import HostProfile
from migstream.model import Scope
from migstream.registers.catalogue import lookup

VCPUS = 64
"""vCPUs of the VM that the writes are counted for."""


@dataclass(frozen=True, slots=True)
class ScopeRow:
    """A host with one set of vCPU features.

    Attributes:
        features: which: `PSCI_0_2` alone or `all`; `MSRs` on x86-64, of which the listed and feature MSRs count that
            can be read. counts: registers by scope, by experiment.
        each_on_each: register writes for `VCPUS` vCPUs, each register on each. late: of these after the pause, each at
            its scope. A register that changed after the prologue and is written again is not in it: which do depends
            on how long the prologue was ago (on x86-64 HV_X64_MSR_TIME_REF_COUNT, one write a VM).
    """

    features: str
    counts: dict[str, int]
    each_on_each: int
    late: int


def scope_rows(profile: HostProfile) -> Iterator[ScopeRow]:
    """A row for each set of features; none where there was no experiment."""
    if not profile.scopes:
        return
    if profile.registers:
        yield _row("PSCI_0_2", replace(profile, feature_scopes={}, feature_registers={}))
        yield _row("all", profile.with_all_features())
    else:
        yield _row("MSRs", profile)


def _row(features: str, host: HostProfile) -> ScopeRow:
    registers = host.registers or tuple(host.scopes)
    counts = scope_counts(host, registers)
    late = [row for row in map(lookup, registers) if not row.phase.prologue]
    writes = sum(VCPUS if host.known_scopes.get(row.id, row.scope) == Scope.VCPU else 1 for row in late)
    return ScopeRow(features, counts, VCPUS * sum(counts.values()), writes)
