"""A simulated KVM/x86-64: profiles recorded from real hosts, plus rules."""

from migstream.backends.sim.backend import DEFAULT, SimBackend

__all__ = ["DEFAULT", "SimBackend"]
