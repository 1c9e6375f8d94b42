"""The sim backend: hosts that are a recorded profile and rules, no /dev/kvm needed."""

from __future__ import annotations

import dataclasses
import difflib
import re
import struct
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from migstream.backends.base import Backend, check_machine
from migstream.backends.sim.arm64 import Arm64SimVm
from migstream.backends.sim.clock import HostClock
from migstream.backends.sim.timing import ModelledTime
from migstream.backends.sim.validate import check
from migstream.backends.sim.variants import MARK, varied
from migstream.backends.sim.vm import SimVm
from migstream.errors import BackendUnavailable, UsageError
from migstream.host import profiles
from migstream.model import Arch, Machine
from migstream.plan import check_devices
from migstream.registers import x86_64

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

DEFAULT = "x86_64-6.18-pvm"
"""The profile of plain `sim`."""

PREFIX = "sim:"


class SimBackend(Backend):
    """A simulated host.

    Attributes:
        name: `sim:` and the profile's name, with `+RULE` for each optional rule and `-NAME` for each capability taken
            away.
    """

    def __init__(self, kernel: str | HostProfile = DEFAULT, *, without: Collection[str] = (),
                 now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Take a profile, or the name of a recorded one (`sim`, `sim:NAME` or `NAME`, with `+RULE`: see `variants`).

        A name with a slash or `.json` at its end is a file, such as `migstream host capture` writes.

        Args:
            without: capabilities, as in a profile, that this kernel does not offer.
            now_ns: the host's time; a model of time gives its own.

        Raises: BackendUnavailable for a name or rule that isn't known, with near ones; UsageError for an unknown
            capability, for an argument that a rule can't have and for rules that contradict each other; ProfileError
            for a profile that makes no sense, with the field; of a file also OutputError.
        """
        title, profile = recorded(kernel) if isinstance(kernel, str) else (kernel.kernel, kernel)
        check(profile, title)
        if unknown := sorted(set(without) - profile.capabilities.keys()):
            known = ", ".join(sorted(profile.capabilities))
            raise UsageError(f"no capability {unknown[0]!r} in {title}; it has {known}")
        self.arch = profile.arch
        self.name = PREFIX + "-".join((title, *sorted(without)))
        capabilities = {name: 0 if name in without else value for name, value in profile.capabilities.items()}
        self._profile = dataclasses.replace(profile, backend=self.name, capabilities=capabilities)
        self._host = HostClock(_khz(profile), now_ns)
        self.stopwatch = ModelledTime(profile.kernel)

    @classmethod
    def named(cls, name: str = "") -> SimBackend:
        """Return the simulator of a recorded profile; "" is the default. Raises: BackendUnavailable with near names."""
        return cls(name or DEFAULT)

    def profile(self) -> HostProfile:
        """See `Backend.profile`."""
        return self._profile

    def create(self, machine: Machine, enabled_caps: Mapping[int, tuple[int, ...]] | None = None) -> SimVm | Arm64SimVm:
        """See `Backend.create`. Raises: BackendError, UsageError."""
        check_machine(machine, self.arch)
        check_devices(machine)
        kind = Arm64SimVm if self.arch == Arch.ARM64 else SimVm
        vm = kind(self._profile, machine, self._host)
        vm.stopwatch = self.stopwatch
        try:
            vm.build(dict(enabled_caps or {}))
        except BaseException:
            vm.close()
            raise
        return vm


_FILE = re.compile(r"(?P<path>.*\.json|[^+]*/[^+]*)(?P<rules>([+].*)?)", re.DOTALL)
"""A profile's file, whose name may have a + before its .json, and optional rules."""


def recorded(name: str) -> tuple[str, HostProfile]:
    """Return the name without its prefix, and the recorded profile under the name's optional rules.

    Raises: BackendUnavailable with the near names, UsageError; see `varied`. Of a file also OutputError, ProfileError.
    """
    if file := _FILE.fullmatch(name.removeprefix(PREFIX)):
        rules = file["rules"].split(MARK)[1:]
        return MARK.join((file["path"], *rules)), varied(file["path"], profiles.read(file["path"]), rules)
    title, *rules = name.removeprefix(PREFIX).split(MARK)
    if not title:
        raise UsageError(f"{name!r} names no simulated kernel: sim:NAME, or plain sim, which is {PREFIX}{DEFAULT}")
    title = DEFAULT if title == PREFIX.removesuffix(":") else title
    known = profiles.names()
    if title not in known:
        near = difflib.get_close_matches(title, known, n=3, cutoff=0.3) or known
        raise BackendUnavailable(f"no simulated kernel {title!r}; near: {', '.join(PREFIX + one for one in near)}")
    return MARK.join((title, *rules)), varied(title, profiles.load(title), rules)


def _khz(profile: HostProfile) -> int:
    """The host's TSC frequency; 1 GHz where the profile does not say."""
    default = profile.defaults.get(x86_64.TSC_KHZ.id)
    return struct.unpack("<I", default)[0] if default else 1_000_000
