"""Profiles recorded from real hosts, by name. Each is a JSON file here; `made_by` in it is the command that made it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from migstream.errors import UsageError

if TYPE_CHECKING:
    from migstream.host.profile import HostProfile

_SUFFIX = ".json"


def names() -> tuple[str, ...]:
    """Names of all recorded profiles, ascending, such as `x86_64-6.18-pvm`: architecture, kernel, what is special."""
    from importlib import resources

    files = (entry.name for entry in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX)))


@cache
def load(name: str) -> HostProfile:
    """Return a recorded profile. Raises: UsageError for a name that is not in `names()`, or a file that is broken."""
    from importlib import resources

    from migstream.host.profile import from_json

    if name not in names():
        raise UsageError(f"no host profile {name!r}; there are {', '.join(names())}")
    text = resources.files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
    return from_json(text, name)


def scopes_of(arch: str, kernel: str, cpu: str) -> dict[int, str]:
    """Scopes that an experiment found on this very kernel and CPU, by register id; empty where none was recorded.

    Scope is the kernel's doing: another version's profile is no answer.
    """
    for name in names():
        if name.startswith(f"{arch}-"):
            known = load(name)
            if (known.kernel, known.cpu) == (kernel, cpu):
                return {**known.scopes, **known.feature_scopes}
    return {}
