"""Ask a host what it offers, by trial where there is nobody to ask. Everything happens on scratch VMs of its own.

Scratch VMs never hold a guest: the trials may put nonsense into registers, and the one that runs has only zeroes for
code. What architectures share is in `scratch` and `experiment`; each has a module with what only it has.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from migstream.host import probe_arm64, probe_x86_64
from migstream.model import Arch

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile
    from migstream.host.scratch import Host

_PROBES = {Arch.X86_64: probe_x86_64.probe, Arch.ARM64: probe_arm64.probe}


def capture(host: Host, command: str, experiments: bool = True) -> HostProfile:
    """Return the complete profile of a host.

    Args:
        host: a backend. command: what made the profile, kept in it as `made_by`.
        experiments: find by trial what the host does not tell: writable bits, scope, what may change after a run.

    Raises: BackendError, BackendUnavailable.
    """
    return dataclasses.replace(_PROBES[host.profile().arch](host, experiments), made_by=command)
