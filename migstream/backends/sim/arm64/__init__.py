"""A simulated KVM/arm64: profiles recorded from real kernels, plus rules."""

from migstream.backends.sim.arm64.vm import Arm64SimVm

__all__ = ["Arm64SimVm"]
