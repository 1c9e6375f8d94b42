"""TSC offsets of the vCPUs, where MSR_IA32_TSC alone can't restore them.

Writing MSR_IA32_TSC to vCPUs one after the other makes KVM synchronise them: all get one offset. That is right unless
the saved offsets differ, which the guest then arranged (by writing TSC or TSC_ADJUST). Then each offset is moved by
what the two hosts' clocks say, as Linux Documentation/virt/kvm/devices/vcpu.rst prescribes:

    new = saved + (host TSC at save - host TSC now) + (guest clock now - guest clock at save) * frequency
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from migstream.backends.base import Vm
from migstream.model import Layout, Phase, Scope, Slot
from migstream.registers import x86_64
from migstream.report import Report
from migstream.transport.written import Written

if TYPE_CHECKING:
    from migstream.model import Words

_CLOCK = struct.Struct("<QIIQQ")
_HOST_TSC = 8
_CLOCK_LAYOUT = Layout(Scope.VM, Phase.CLOCK, (Slot(x86_64.CLOCK.id, 48),))
_OFFSET_LAYOUT = Layout(Scope.VCPU, Phase.CLOCK, (Slot(x86_64.TSC_OFFSET.id, 8),))


def restore_offsets(vm: Vm, written: list[Written], report: Report) -> None:
    """Write the vCPUs' TSC offsets if they differ from each other; report why not, where that can't be done."""
    import numpy as np

    found = [column for w in written if (column := w.column(x86_64.TSC_OFFSET.id)) is not None]
    if all(column[0, 0] == found[0][0, 0] and (len(column) == 1 or (column == column[0]).all()) for column in found):
        return
    offsets = np.concatenate(found)
    moved = _moved(vm, written)
    if moved is None:
        report.notes.append("KVM_VCPU_TSC_OFFSET: the vCPUs' offsets differ and a host gives no host TSC with its "
                            "clock; MSR_IA32_TSC was written instead and KVM may have made them equal")
        return
    refused = vm.write(_OFFSET_LAYOUT, 0, offsets + np.uint64(moved % 2**64))
    report.refused += [(no, "MSR_IA32_TSC was written") for no in refused]
    report.count("clock", Scope.VCPU, len(offsets) - len(refused))


def _moved(vm: Vm, written: list[Written]) -> int | None:
    """Ticks to add to every offset; None where one of the hosts does not tell its TSC."""
    import numpy as np

    saved, khz = _first(written, x86_64.CLOCK.id), _first(written, x86_64.TSC_KHZ.id)
    now = np.zeros((1, 6), np.uint64)
    if saved is None or khz is None or vm.read(_CLOCK_LAYOUT, 0, now):
        return None
    then_clock, then_flags, _, _, then_tsc = _CLOCK.unpack_from(saved.tobytes())
    now_clock, now_flags, _, _, now_tsc = _CLOCK.unpack_from(now.tobytes())
    if not then_flags & now_flags & _HOST_TSC:
        return None
    return int(then_tsc - now_tsc + (now_clock - then_clock) * int(khz[0]) // 1_000_000)


def _first(written: list[Written], id: int) -> Words | None:
    return next((column[0] for w in written if (column := w.column(id)) is not None), None)
