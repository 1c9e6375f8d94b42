"""Profiles recorded from real hosts, by name. Each is a JSON file here; `made_by` in it is the command that made it."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING

from migstream import filekind
from migstream.errors import OutputError, ProfileError, ProfileLimit, UsageError, printable
from migstream.limits import MAX_PROFILE

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


def read(path: str) -> HostProfile:
    """Return the profile in a file, which is read up to the limit.

    Raises: OutputError for a file that can't be read, UsageError for one of another kind, ProfileError and below.
    """
    from migstream.host.profile import from_json

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PROFILE + 1)
    except (OSError, ValueError) as error:
        raise OutputError(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not data.lstrip().startswith(b"{") and (kind := filekind.of_bytes(data)):
        raise UsageError(f"{path}: not a host profile{kind}")
    if len(data) > MAX_PROFILE:
        raise ProfileLimit(f"{path}: not a host profile: over {MAX_PROFILE} bytes")
    try:
        return from_json(data.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not a host profile: not UTF-8 text") from error


def recorded(host: HostProfile) -> HostProfile | None:
    """The profile that was recorded of this very kernel and CPU, None where there is none.

    Another version's is no answer: scope is the kernel's doing. Files are compared as text before one is read.
    """
    from importlib import resources

    wanted = [f"{key}: {json.dumps(value)}" for key, value in (('"kernel"', host.kernel), ('"cpu"', host.cpu))]
    for name in names():
        if name.startswith(f"{host.arch.label}-"):
            text = resources.files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
            if all(line in text for line in wanted):
                return load(name)
    return None
