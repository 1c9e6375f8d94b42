"""The Debian mirror of the machine that the lab runs on, read from its apt sources in either format.

No address of a mirror is written in this project: which one is near is the machine's knowledge.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.errors import LabError

MIRROR_ENV = "MIGSTREAM_LAB_MIRROR"
APT_FOLDER = Path("/etc/apt")

# Only a suite of the main archive tells that its mirror has the other suites too: -security, -updates and
# third-party repositories live elsewhere or hold less.
MAIN_SUITES = re.compile(r"(old)*stable|testing|unstable|sid|bullseye|bookworm|trixie|forky|duke")


@dataclass(frozen=True)
class Source:
    """One row of apt's sources: an address, a suite, and the components taken from it."""

    uri: str
    suite: str
    components: tuple[str, ...]


def one_line(text: str) -> Iterator[Source]:
    """The rows of a file in the one-line format (`*.list`)."""
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", " ", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield Source(words[1], words[2], tuple(words[3:]))


def deb822(text: str) -> Iterator[Source]:
    """The rows of a file in the deb822 format (`*.sources`), without the disabled stanzas."""
    for stanza in _stanzas(text):
        enabled = stanza.get("enabled", "yes").lower() not in ("no", "false")
        if enabled and "deb" in stanza.get("types", "").split():
            components = tuple(stanza.get("components", "").split())
            for uri in stanza.get("uris", "").split():
                yield from (Source(uri, suite, components) for suite in stanza.get("suites", "").split())


def machine_sources(folder: Path = APT_FOLDER) -> list[Source]:
    """All rows of the machine's sources, in apt's own order of files."""
    parts = sorted((folder / "sources.list.d").glob("*"))
    formats = {".list": one_line, ".sources": deb822}
    return [
        row
        for path in (folder / "sources.list", *parts)
        if path.suffix in formats and path.is_file()
        for row in formats[path.suffix](path.read_text(errors="replace"))
    ]


def mirror(folder: Path = APT_FOLDER) -> str:
    """The address of a Debian mirror; raises LabError when the machine has none.

    The environment variable MIGSTREAM_LAB_MIRROR wins over the machine's sources.
    """
    found = os.environ.get(MIRROR_ENV) or _first(machine_sources(folder))
    if not found:
        raise LabError(f"no Debian mirror in {folder}; set {MIRROR_ENV} to the address of one")
    return found


def _first(rows: Iterable[Source]) -> str | None:
    usable = (r.uri for r in rows if MAIN_SUITES.fullmatch(r.suite) and "main" in r.components)
    return next(usable, None)


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    for block in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields: dict[str, str] = {}
        # A line that starts with a space goes on with the field before it.
        for line in re.sub(r"\n[ \t]+", " ", block).splitlines():
            name, colon, value = line.partition(":")
            if colon:
                fields[name.strip().lower()] = value.strip()
        yield fields
