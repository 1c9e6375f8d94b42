"""Where a stream goes and comes from: real KVM, or a simulated kernel. `base` says what both can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from migstream.backends.base import Backend


def open_backend(name: str = "auto") -> Backend:
    """Return a backend by name: `kvm`, `sim` (the default simulated kernel), `sim:NAME`, `sim:FILE.json`, or `auto`.

    A simulated kernel's name may end in `+RULE`s.

    `auto` is real KVM where it works, else the simulator; ask `backend.name` which it was.

    Raises: BackendUnavailable, UsageError.
    """
    if not isinstance(name, str):
        raise UsageError(f"a backend's name is text, not {type(name).__name__}: kvm, sim, sim:NAME or auto")
    if name == "auto":
        try:
            return open_backend("kvm")
        except BackendUnavailable:
            return open_backend("sim")
    if name == "kvm":
        from migstream.backends.kvm import KvmBackend

        return KvmBackend()
    if name == "sim" or name.startswith(("sim:", "sim+")):
        from migstream.backends.sim import SimBackend

        return SimBackend.named(name)
    raise UsageError(f"no backend {name!r}: kvm, sim, sim:NAME or auto")
