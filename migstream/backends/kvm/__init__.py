"""Real KVM through its file descriptors."""

from migstream.backends.kvm.backend import KvmBackend

__all__ = ["KvmBackend"]
