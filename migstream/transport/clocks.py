"""Clocks when they are read back: they run, so another value is no loss, but one that went back is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.model import Layout
from migstream.registers import arm64, x86_64

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from migstream.model import Words

FORWARD = frozenset((*(row.id for row in arm64.COUNTERS), x86_64.CLOCK.id))
"""Clocks whose first word only grows: one that reads less than what was written has lost it. A guest's TSC is not among
them: KVM brings those of a VM's vCPUs together as it likes."""


def went_back(layout: Layout, id: int, actual: Words, wanted: Words) -> NDArray[np.bool_]:
    """Rows of a register that read less than what was written. A counter offset, where one is told, decides instead."""
    import numpy as np

    if id not in FORWARD or arm64.COUNTER_OFFSET.id in layout.index:
        return np.zeros(len(actual), np.bool_)
    back: NDArray[np.bool_] = actual[:, 0] < wanted[:, 0]
    return back
