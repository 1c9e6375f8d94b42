"""What the guest needs of this project: its dependencies, its files, its command."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.errors import LabError

CHECKOUT = Path(__file__).resolve().parents[2]

# Where in the guest the checkout lies; ../shared is beside it, as on the machine.
GUEST_CHECKOUT = "lab/project"

# (path from the checkout, path in the guest)
_COPIED = (
    *((name, f"{GUEST_CHECKOUT}/{name}") for name in (
        "migstream", "formats", "tests", "bench", "pyproject.toml", "README.md")),
    ("../shared/data", "lab/shared/data"),
)  # fmt: skip
_NOT_COPIED = re.compile(r"__pycache__|\..*|.*\.egg-info|build|dist")

# The dependencies when there is no pyproject.toml to ask yet.
_FALLBACK = ("construct", "msgpack", "zstandard", "numpy", "crc32c", "rich")
# Needed to test in the guest; pinned by pyproject.toml where it names them.
_TEST_TOOLS = ("pytest", "hypothesis")


@dataclass(frozen=True)
class Project:
    """The parts of pyproject.toml that the guest needs."""

    name: str
    version: str
    requirements: tuple[str, ...]
    scripts: dict[str, str]


def read(checkout: Path = CHECKOUT) -> Project:
    """Read pyproject.toml; raises LabError when it is not TOML."""
    try:
        raw = tomllib.loads((checkout / "pyproject.toml").read_text())
    except FileNotFoundError:
        raw = {"project": {"dependencies": list(_FALLBACK)}}
    except tomllib.TOMLDecodeError as error:
        raise LabError(f"pyproject.toml is not valid ({error}); mend it and run this again") from error
    table = raw.get("project", {})
    requirements = (*table.get("dependencies", ()), *_test_tools(raw))
    name, scripts = table.get("name", "migstream"), table.get("scripts", {})
    return Project(name, _version(table, checkout), requirements, scripts)


def files(checkout: Path = CHECKOUT) -> Iterator[tuple[str, Path]]:
    """(path in the guest, path here) of every file of the project that goes into the guest."""
    for here, there in _COPIED:
        top = checkout / here
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            parts = path.relative_to(top).parts
            if path.is_file() and not any(_NOT_COPIED.fullmatch(part) for part in parts):
                yield "/".join((there, *parts)), path


def _test_tools(raw: dict[str, Any]) -> Iterator[str]:
    groups = {**raw.get("dependency-groups", {}), **raw.get("project", {}).get("optional-dependencies", {})}
    listed = [row for group in groups.values() for row in group if isinstance(row, str)]
    for tool in _TEST_TOOLS:
        yield next((row for row in listed if re.match(rf"{tool}\b(?!-)", row)), tool)


def _version(table: dict[str, Any], checkout: Path) -> str:
    if "version" in table:
        return str(table["version"])
    module = checkout / "migstream" / "__init__.py"
    text = module.read_text() if module.is_file() else ""
    found = re.search(r"""(?m)^__version__.*?=\s*["']([^"']+)""", text)
    return found[1] if found else "0"
