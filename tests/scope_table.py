"""The README's table "Scope, measured", from the recorded profiles: `python -m tests.scope_table` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from migstream.host import profiles
from migstream.host.compare import scope_counts
from migstream.host.profile import HostProfile
from migstream.model import Scope
from migstream.registers.catalogue import lookup

VCPUS = 64
HEAD = ("| profile | vCPU features | VM-scoped | vCPU-scoped | fixed "
        f"| writes for {VCPUS} vCPUs, each register on each | of these after the pause, each at its scope |",
        "|---|---|---|---|---|---|---|")


def rows() -> Iterator[tuple[str, str, HostProfile]]:
    """(profile's name, which registers, the host with these registers)."""
    for name in profiles.names():
        profile = profiles.load(name)
        if profile.registers:
            yield name, "PSCI_0_2", replace(profile, feature_scopes={}, feature_registers={})
            yield name, "all", profile.with_all_features()
        else:
            yield name, "MSRs", profile


def registers(host: HostProfile) -> tuple[int, ...]:
    """arm64: those that it lists; x86-64: the listed and feature MSRs that can be read."""
    return host.registers or tuple(host.scopes)


def late_writes(host: HostProfile) -> int:
    """Register writes of a restore after the pause: VM-scoped ones once, the others for each vCPU."""
    late = [row for row in map(lookup, registers(host)) if not row.phase.prologue]
    return sum(VCPUS if host.known_scopes.get(row.id, row.scope) == Scope.VCPU else 1 for row in late)


def lines() -> Iterator[str]:
    """The table as Markdown."""
    yield from HEAD
    for name, what, host in rows():
        counts = scope_counts(host, registers(host))
        cells = (f"`{name}`", what, *counts.values(), VCPUS * sum(counts.values()), late_writes(host))
        yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print("\n".join(lines()))
