"""x86-64 structs that the compiled batch need not always ask the kernel for, or give it."""

from __future__ import annotations

from dataclasses import replace

from migstream.backends.kvm import uapi
from migstream.backends.kvm.batch import Entry, Flag
from migstream.backends.kvm.operations import Struct
from migstream.registers import x86_64 as rows

IN_PAGE = 1 | 2
"""KVM_SYNC_X86_REGS and KVM_SYNC_X86_SREGS: what KVM is asked to put into the run page at each exit."""

_PLACES = {
    rows.REGS.id: (uapi.RUN_REGS, 144),
    rows.SREGS.id: (uapi.RUN_SREGS, 312),
    rows.SREGS2.id: (uapi.RUN_SREGS, 280),  # as kvm_sregs up to apic_base; then flags and PDPTRs, 0 but in PAE mode
}
"""struct kvm_sync_regs: where each begins in the run page, and how much of it is there."""

PAGED = frozenset(_PLACES)
"""Registers that are read without an ioctl, after a pause, where KVM offers all of `IN_PAGE`."""

SETTLED = frozenset((rows.XCRS.id, rows.DEBUGREGS.id, rows.VCPU_EVENTS.id))
"""Registers that no other register's write changes to another value than a fresh vCPU's. DR0 to DR7 and XCR0 are
written by nothing else (kvm_vcpu_ioctl_x86_set_debugregs, _set_xcrs). KVM_SET_REGS and KVM_SET_SREGS only take pending
events away, but for an interrupt that KVM_SREGS itself carries: the saved events have it then, and are written."""


class Shared(Struct):
    """A struct that the batch may find in the run page, or leave out of a write: `_PLACES`, `SETTLED`."""

    settled = False

    def entry(self, writing: bool) -> Entry | None:
        """As `Struct.entry`, with what else the batch has to know."""
        entry = super().entry(writing)
        if entry is None or writing:
            return entry and replace(entry, flags=Flag.SETTLED if self.settled else 0)
        page, size = _PLACES.get(self.id, (0, 0))
        return replace(entry, page=page, page_size=size, flags=Flag.GATE if self.id == rows.LAPIC.id else 0)
