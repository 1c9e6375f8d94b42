"""The time of a simulated host: what kvmclock, the TSC and the PIT are counted from.

A clock is a function that returns nanoseconds and never goes back. The default is the process's own; a model of time
(a discrete-event run, say) gives its own function to `SimBackend`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_U64 = (1 << 64) - 1
_FLAGS = 0b1110
"""TSC_STABLE, REALTIME and HOST_TSC of struct kvm_clock_data."""


@dataclass
class HostClock:
    """A host's time.

    Attributes:
        khz: frequency of the host's TSC. now_ns: monotonic time in ns.
    """

    khz: int
    now_ns: Callable[[], int] = time.monotonic_ns

    def tsc(self) -> int:
        """The host's TSC, ticks."""
        return self.now_ns() * self.khz // 1_000_000 & _U64


class GuestClock:
    """A VM's kvmclock: counts ns from the VM's creation, or from the value that KVM_SET_CLOCK gave it."""

    def __init__(self, host: HostClock) -> None:
        self.host = host
        self._zero = host.now_ns()
        self.master = False

    def set(self, value: int) -> None:
        """KVM_SET_CLOCK without flags: go on from `value` ns. From then on the clock is stable."""
        self._zero, self.master = self.host.now_ns() - value, True

    def data(self) -> tuple[int, int, int, int]:
        """Words of struct kvm_clock_data: clock, flags, real time (ns), host TSC.

        The flags and the last two are there once the clock is stable: after KVM_SET_CLOCK or the first run.
        """
        clock = self.host.now_ns() - self._zero & _U64
        if not self.master:
            return clock, 0, 0, 0
        return clock, _FLAGS, time.time_ns(), self.host.tsc()
