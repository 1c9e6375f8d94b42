"""Reading back what was written, and telling what runs by itself from what was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.backends.base import Vm
from migstream.model import Slot
from migstream.registers.catalogue import Running, lookup, running
from migstream.registers.cpuid import follows_state
from migstream.registers.x86_64 import CPUID2
from migstream.report import Difference, Report
from migstream.transport.clocks import went_back
from migstream.transport.written import Written, columns
from migstream.verdicts.model import Kernel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from migstream.model import Words


def compare(vm: Vm, written: list[Written], report: Report) -> None:
    """Read every written register of every vCPU again; put what differs into the report, with the known reason.

    A bank in which something differs for no known reason is read a second time: one bad answer is not a lost value.
    """
    for done in written:
        if done.values is None:
            continue
        report.readback += done.bank.rows * len(done.target.slots)
        found = _differences(vm, done, done.values)
        if any(not difference.reason for difference in found):
            first, found = found, _differences(vm, done, done.values)
            report.notes += _only_once(first, found)
        report.differs += found


def _only_once(first: list[Difference], second: list[Difference]) -> list[str]:
    left = {difference.register for difference in second if not difference.reason}
    return [f"{lookup(difference.register).name}: read back wrong once, and right when it was read again"
            for difference in first if not difference.reason and difference.register not in left]


def _differences(vm: Vm, done: Written, values: Words) -> list[Difference]:
    """What reads back different from `values`; a register that can't be read is different for no known reason."""
    import numpy as np

    actual = np.zeros_like(values)
    refused = vm.read(done.target, done.bank.first_vcpu, actual)
    for no in refused:
        row, words = (no.vcpu or 0) - done.bank.first_vcpu, columns(done.target, done.target.index[no.register])
        actual[row, words] = values[row, words]
    found = [Difference(no.register, () if no.vcpu is None else (no.vcpu,), "") for no in refused]
    for column, slot in enumerate(done.target.slots):
        words = columns(done.target, column)
        found += _column(done, slot, actual[:, words], values[:, words])
    return found


def _column(done: Written, slot: Slot, actual: Words, wanted: Words) -> list[Difference]:
    different = (actual != wanted).any(axis=1)
    if not different.any():
        return []
    known = running(slot.id) or _judged(done, slot) or _computed(slot, wanted)
    unexplained = different if known is None else different & _outside(actual ^ wanted, known.spans)
    unexplained = unexplained | went_back(done.target, slot.id, actual, wanted)
    return [Difference(slot.id, _vcpus(done, rows), reason)
            for rows, reason in ((different & ~unexplained, known.reason if known else ""), (unexplained, ""))
            if rows.any()]


def _judged(done: Written, slot: Slot) -> Running | None:
    """What the plan said of the register: that this kernel takes the value and shows another."""
    for verdict in done.step.verdicts:
        if verdict.target == slot and verdict.kernel == Kernel.DROPS and verdict.value is None and verdict.reason:
            return Running(((0, slot.size * 8),), f"as judged: {verdict.reason}")
    return None


def _computed(slot: Slot, wanted: Words) -> Running | None:
    """Of CPUID what follows the vCPU's state: a guest may have turned XSAVE on after the prologue was saved."""
    if slot.id != CPUID2.id:
        return None
    masks = {follows_state(row.tobytes()) for row in wanted}
    mask = int.from_bytes(masks.pop(), "little") if len(masks) == 1 else 0
    spans = tuple((at, 1) for at in range(mask.bit_length()) if mask >> at & 1)
    return Running(spans, "KVM computes OSXSAVE, APIC, OSPKE and the size of the XSAVE area from the vCPU's state")


def _outside(changed: Words, spans: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
    """Rows that differ in a bit outside `spans` (lowest bit, width)."""
    import numpy as np

    inside = sum(((1 << width) - 1) << low for low, width in spans)
    mask = np.frombuffer(inside.to_bytes(changed.shape[1] * 8, "little"), np.uint64)
    outside: NDArray[np.bool_] = np.any(changed & ~mask, axis=1)
    return outside


def _vcpus(done: Written, rows: NDArray[np.bool_]) -> tuple[int, ...]:
    import numpy as np

    first = done.bank.first_vcpu
    return tuple((np.flatnonzero(rows) + first).tolist()) if done.target.scope == "vcpu" else ()
