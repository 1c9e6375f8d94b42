"""Reading back what was written, and telling what runs by itself from what was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.backends.base import Vm
from migstream.model import Slot
from migstream.registers.catalogue import running
from migstream.report import Difference, Report
from migstream.transport.written import Written, columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from migstream.model import Words


def compare(vm: Vm, written: list[Written], report: Report) -> None:
    """Read every written register of every vCPU again; put what differs into the report, with the known reason."""
    import numpy as np

    for done in written:
        if done.values is None:
            continue
        actual = np.zeros_like(done.values)
        refused = vm.read(done.target, done.bank.first_vcpu, actual)
        report.differs += [Difference(no.register, () if no.vcpu is None else (no.vcpu,), "") for no in refused]
        report.readback += done.bank.rows * len(done.target.slots)
        for column, slot in enumerate(done.target.slots):
            words = columns(done.target, column)
            _column(done, slot, actual[:, words], done.values[:, words], report)


def _column(done: Written, slot: Slot, actual: Words, wanted: Words, report: Report) -> None:
    different = (actual != wanted).any(axis=1)
    if not different.any():
        return
    known = running(slot.id)
    unexplained = different if known is None else different & _outside(actual ^ wanted, known.spans)
    for rows, reason in ((different & ~unexplained, known.reason if known else ""), (unexplained, "")):
        if rows.any():
            report.differs.append(Difference(slot.id, _vcpus(done, rows), reason))


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
