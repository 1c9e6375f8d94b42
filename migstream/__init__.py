"""migstream: a KVM guest's register state as a versioned, checked, compressed stream, replayed where you say.

The names below are the whole public interface; each is imported when first used, so that a program which only wants
the version pays for nothing else. Real KVM is in `migstream.backends.kvm`, so that this package imports on any machine.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, whose import would be half of this package's: `__main__` comes behind it
if TYPE_CHECKING:
    from typing import Any

    from migstream.backends import open_backend
    from migstream.errors import (
        BackendError,
        BackendUnavailable,
        DoesNotFit,
        MigstreamError,
        RestoreFailed,
        StreamError,
        UsageError,
    )
    from migstream.model import Arch, Machine, MemoryRegion, OpaqueState
    from migstream.plan import make_plan
    from migstream.reader import StreamReader
    from migstream.report import Report
    from migstream.transport import Restorer, capture_prologue, restore, save, verify

__version__ = "0.1.0"

_HOMES = {
    "migstream.backends": ("open_backend",),
    "migstream.errors": ("BackendError", "BackendUnavailable", "DoesNotFit", "MigstreamError", "RestoreFailed",
                         "StreamError", "UsageError"),
    "migstream.model": ("Arch", "Machine", "MemoryRegion", "OpaqueState"),
    "migstream.plan": ("make_plan",),
    "migstream.reader": ("StreamReader",),
    "migstream.report": ("Report",),
    "migstream.transport": ("Restorer", "capture_prologue", "restore", "save", "verify"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order in which a reader meets them
    "Arch", "Machine", "MemoryRegion", "OpaqueState",
    "open_backend", "capture_prologue", "save", "restore", "verify",
    "Restorer", "StreamReader", "make_plan", "Report",
    "MigstreamError", "StreamError", "BackendError", "BackendUnavailable", "DoesNotFit", "RestoreFailed", "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'migstream' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
