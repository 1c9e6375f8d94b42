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
        struct: key of `migstream.wire.x86_64.STRUCTS` that decodes the value, "" for a plain number.
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


@cache
def lookup(id: int) -> Register:
    """The row for an id. An id without a row is kept: a vCPU register in phase STATE, named by its number."""
    from migstream.registers import x86_64

    row = x86_64.lookup(id)
    return row if row is not None else Register(id, f"{id:#018x}", ids.size_in_id(id), Scope.VCPU, Phase.STATE,
                                                Klass.STATE, "not in the catalogue", known=False)


def fits_arch(id: int, arch: Arch) -> bool:
    """False for an id that belongs to another architecture."""
    owner = ids.arch_of(id)
    return owner is None or owner == arch
