"""The row type of the catalogue and the look-up over all architectures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from migstream.model import Arch, Klass, Phase, Scope
from migstream.registers import ids


@dataclass(frozen=True, slots=True)
class Register:
    """One row: what a register is and when it is written.

    Attributes:
        id: KVM's id or ours; see `migstream.registers.ids`.
        name: the kernel's or the architecture's own word.
        size: bytes; None where the host tells.
        needs: capability (name as in `HostProfile.capabilities`) that must be non-zero; "" for none.
        struct: key of `migstream.wire.structs.STRUCTS` that decodes the value, "" for a plain number.
        bits: key of a bit table that names the value's bits, "" for none.
        scope_fixed: False where it depends on the kernel whether the register is VM- or vCPU-scoped.
        selector: what the value's first 32 bits must be, where they tell the kernel which register is meant.
        read_first: must be read before the others, because reading it changes them.
        why: the reason for scope, phase, class or place in the order.
    """

    id: int
    name: str
    size: int | None
    scope: Scope
    phase: Phase
    klass: Klass
    why: str
    needs: str = ""
    struct: str = ""
    bits: str = ""
    read_first: bool = False
    known: bool = True
    scope_fixed: bool = True
    selector: int | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """Bits of a register that differ on read-back for a known reason: (lowest bit, width) from its first byte on."""

    spans: tuple[tuple[int, int], ...]
    reason: str


@cache
def lookup(id: int) -> Register:
    """The row for an id. An id without a row is kept: a vCPU register in phase STATE, named by its number."""
    # Imported here, because the modules that hold the rows need this one.
    from migstream.registers import arm64, gic, x86_64

    return x86_64.lookup(id) or arm64.lookup(id) or gic.lookup(id) or Register(
        id, f"{id:#018x}", ids.size_in_id(id), Scope.VCPU, Phase.STATE, Klass.STATE, "not in the catalogue",
        known=False)


def must_have(id: int) -> Scope | None:
    """The one scope that a bank of a stream may have a register at; None where kernels differ, or without a row."""
    row = lookup(id)
    return row.scope if row.known and row.scope_fixed else None


def running(id: int) -> Running | None:
    """What of a register may differ when it is read back, None where nothing may."""
    from migstream.registers import arm64, gic, x86_64

    return x86_64.RUNNING.get(id) or arm64.RUNNING.get(id) or gic.RUNNING.get(id)


def enabled_capability(id: int) -> Register | None:
    """The row of a capability that was enabled, None for any other id."""
    number = ids.capability_number(id)
    return None if number is None else Register(
        id, f"KVM_ENABLE_CAP({number})", 40, Scope.VM, Phase.CREATE, Klass.FEATURE,
        "KVM can be told but not asked: carried by whoever enabled it; before the vCPUs are made", struct="enabled_cap")


def fits_arch(id: int, arch: Arch) -> bool:
    """False for an id that belongs to another architecture."""
    owner = ids.arch_of(id)
    return owner is None or owner == arch
