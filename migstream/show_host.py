"""Host profiles on the screen and as JSON."""

from __future__ import annotations

from typing import Any

from migstream.errors import errno_name
from migstream.host.compare import Change, Entry, full_words, mask_words, show_value
from migstream.host.profile import HostProfile
from migstream.host.scope_table import VCPUS, ScopeRow, scope_rows
from migstream.registers import vcpu_features
from migstream.show import Table


def host_pairs(profile: HostProfile) -> list[tuple[str, str]]:
    """One screen of a profile."""
    pairs = [("kernel", profile.kernel), ("cpu", profile.cpu), ("architecture", profile.arch.label),
             ("backend", profile.backend), ("made by", profile.made_by or "not said"),
             ("vCPUs", f"up to {profile.max_vcpus}")]
    if profile.registers:
        features = ", ".join(vcpu_features.names(profile.vcpu_features))
        pairs += [("vCPU features", features or "none"), ("registers", _lists(profile)),
                  ("writable masks", f"{len(profile.writable_masks)} told by the kernel")]
    else:
        pairs += [("registers", f"{len(profile.msrs)} MSRs, {len(profile.feature_msrs)} feature MSRs"),
                  ("XSAVE components", ", ".join(profile.xsave_components) or "not recorded")]
    pairs += [("features refused", f"{', '.join(vcpu_features.names(mask))}: {errno_name(no)}")
              for mask, no in profile.features_refused.items()]
    return [*pairs, *_scope_pairs(profile), *_run_pairs(profile)]


def _lists(profile: HostProfile) -> str:
    base, full = profile.listed, profile.with_all_features().listed
    return (f"{len(base)} with PSCI_0_2 alone, {len(full)} with all vCPU features, {len(base | full)} different ones; "
            f"{len(profile.attributes)} device attributes")


def _scope_pairs(profile: HostProfile) -> list[tuple[str, str]]:
    rows = list(scope_rows(profile))
    out = [(f"scope, {row.features}", f"{_counts(row.counts)}; {VCPUS} vCPUs: {row.each_on_each} writes, each register "
            f"on each; {row.late} after the pause, each at its scope") for row in rows]
    return out or [("scope", "no experiment")]


def _counts(counts: dict[str, int]) -> str:
    return f"{counts['vm']} VM-scoped, {counts['vcpu']} vCPU-scoped, {counts['fixed']} fixed, by experiment"


def _run_pairs(profile: HostProfile) -> list[tuple[str, str]]:
    closed = sum(other != 0 for other, _ in profile.after_run.values())
    out = [("after a run", f"{closed} of {len(profile.after_run)} that can be written take no other value")]
    return out if profile.after_run else []


_WHOLE = "no bit of its default alone, but other values as a whole"


def entry_lines(entry: Entry) -> list[str]:
    """One register with all that is known of it."""
    head = f"{entry.name}  {entry.id:#018x}  {show_value(entry.default)}"
    lines = [head + (f"  ({', '.join(entry.bits)})" if entry.bits else "")]
    lines.append(f"    scope: {entry.scope or 'unknown'}: {entry.how}")
    if entry.writable is not None:
        whole = not entry.writable and entry.scope in ("vm", "vcpu")  # PSCI_VERSION: a version, or EINVAL
        words = _WHOLE if whole else mask_words(entry.id, entry.writable)
        lines.append(f"    writable, by trial: {words}")
    if entry.told is not None:
        lines.append(f"    writable, says the kernel: {mask_words(entry.id, entry.told)}")
    if words := full_words(entry):
        lines.append(f"    with all vCPU features: {words}")
    if entry.after_run:
        other, alike = (errno_name(no) if no else "taken" for no in entry.after_run)
        lines.append(f"    after a run: another value {other}, the same one {alike}")
    if any(entry.refused):
        read, write = (errno_name(no) if no > 0 else str(no) for no in entry.refused)
        lines.append(f"    refused: read {read}, write {write} (0 = fine, -1 = a short count)")
    return lines


def entry_json(entry: Entry) -> dict[str, Any]:
    """One register for machines."""
    return {"name": entry.name, "id": f"{entry.id:#018x}", "default": entry.default and entry.default.hex(),
            "bits": entry.bits, "scope": entry.scope, "how": entry.how, "writable": entry.writable,
            "writable_mask": entry.told, "refused": list(entry.refused),
            "after_run": entry.after_run and list(entry.after_run), "with_all_features": _full_json(entry)}


def _full_json(entry: Entry) -> dict[str, Any]:
    default, writable, scope = entry.full
    return {"default": default and default.hex(), "writable": writable, "scope": scope}


def profile_json(profile: HostProfile) -> dict[str, Any]:
    """The first screen for machines."""
    return {"kernel": profile.kernel, "cpu": profile.cpu, "arch": profile.arch.label, "backend": profile.backend,
            "made_by": profile.made_by, "xsave_components": list(profile.xsave_components),
            "max_vcpus": profile.max_vcpus, "scopes": [_scope_json(row) for row in scope_rows(profile)],
            "features_refused": {", ".join(vcpu_features.names(mask)): no
                                 for mask, no in profile.features_refused.items()}}


def _scope_json(row: ScopeRow) -> dict[str, Any]:
    return {"features": row.features, **row.counts, "vcpus": VCPUS, "writes_each_on_each": row.each_on_each,
            "writes_after_pause": row.late}


def changes_table(changes: list[Change], left: str, right: str) -> Table:
    """What differs, one line a register and property."""
    return Table(("name", "what", left, right), [(c.name, c.what, c.left, c.right) for c in changes])


def change_json(change: Change) -> dict[str, str]:
    """One difference for machines."""
    return {"name": change.name, "what": change.what, "left": change.left, "right": change.right}
