"""Debian packages of any suite and architecture, through apt with a state of its own.

The machine's apt state is never read or written, except for how to reach the network (its proxy settings).
Every index is verified by its signature against the machine's Debian keyring, every package by the index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import kernels, sources, tools
from tests.lab.cache import Origin, sha256
from tests.lab.errors import LabError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_FOLDERS = ("lists/partial", "archives/partial", "empty")
_CONFIG = """\
APT::Architecture "{debian}";
APT::Architectures {{ "{debian}"; }};
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
Dir::Etc::main "{home}/empty/none";
Dir::Etc::parts "{home}/empty";
Dir::Etc::sourcelist "{home}/sources.list";
Dir::Etc::sourceparts "{home}/empty";
Dir::Etc::preferences "{home}/empty/none";
Dir::Etc::preferencesparts "{home}/empty";
Dir::State::lists "{home}/lists";
Dir::State::status "{home}/status";
Dir::State::extended_states "{home}/extended_states";
Dir::Cache "{home}";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""


@dataclass(frozen=True)
class Package:
    """A package as its suite's index describes it: size in bytes, sha256 in hexadecimal."""

    name: str
    version: str
    depends: str
    size: int
    sha256: str


class Apt:
    """The packages of one suite for one architecture, with apt's state in the folder `home`."""

    def __init__(self, arch: kernels.Arch, suite: kernels.Suite, home: Path) -> None:
        self.suite = suite
        self._env = {**os.environ, "APT_CONFIG": str(home / "apt.conf"), "LC_ALL": "C"}
        _write_state(arch, suite, home)

    def update(self) -> None:
        """Fetch and verify the suite's index; raises LabError when the mirror can't be read."""
        try:
            tools.output(["apt-get", "-q", "update"], env=self._env)
        except LabError as error:
            hint = f"check the network, or set {sources.MIRROR_ENV} to a mirror that has it, and run it again"
            raise LabError(f"no package index of Debian {self.suite.name}: {error}; {hint}") from error

    def package(self, name: str) -> Package:
        """What the index says of a package; raises LabError when the suite does not have it."""
        try:
            text = tools.output(["apt-cache", "show", "--no-all-versions", name], env=self._env)
        except LabError as error:
            raise LabError(f"Debian {self.suite.name} has no package {name} ({error})") from error
        fields = dict(re.findall(r"(?m)^([A-Za-z0-9-]+): (.*)$", text))
        return Package(fields["Package"], fields["Version"], fields.get("Depends", ""),
                       int(fields["Size"]), fields["SHA256"])  # fmt: skip

    def download(self, packages: Sequence[Package], folder: Path) -> list[Path]:
        """The package files, each under its sha256 in the folder; those that are there already stay.

        A package comes into `incoming` first and gets its name when it is whole, so the names in the folder
        can be trusted after an interruption. Raises LabError when a package can't be had.
        """
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [(package, folder / f"{package.sha256}.deb") for package in packages]
        for package, path in wanted:
            if not path.is_file():
                self._download_one(package, folder / f"incoming-{package.name}", path)
        return [path for _, path in wanted]

    def _download_one(self, package: Package, incoming: Path, path: Path) -> None:
        incoming.mkdir(exist_ok=True)
        for leftover in incoming.iterdir():
            leftover.unlink()
        exact = f"{package.name}={package.version}"
        tools.output(["apt-get", "-q", "download", exact], cwd=incoming, env=self._env)
        (come,) = incoming.iterdir()
        if sha256(come) != package.sha256:
            raise LabError(f"{package.name} came with a wrong checksum; run the fetch again")
        come.rename(path)
        incoming.rmdir()


def origins(packages: Sequence[Package]) -> tuple[Origin, ...]:
    """What a manifest keeps of packages."""
    return tuple(Origin(p.name, p.version, p.size, p.sha256) for p in packages)


def source_line(mirror: str, suite: kernels.Suite) -> str:
    """The one row of a private sources.list."""
    options = f"signed-by={KEYRING}" + ("" if suite.check_valid_until else " check-valid-until=no")
    return f"deb [{options}] {mirror} {suite.name} main\n"


def _write_state(arch: kernels.Arch, suite: kernels.Suite, home: Path) -> None:
    if not KEYRING.is_file():
        raise LabError("the Debian archive's keys are missing; run: apt-get install debian-archive-keyring")
    for name in _FOLDERS:
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "status").touch()
    (home / "sources.list").write_text(source_line(sources.mirror(), suite))
    (home / "apt.conf").write_text(_CONFIG.format(debian=arch.debian, home=home) + _network_settings())


def _network_settings() -> str:
    dump = tools.output(["apt-config", "dump"])
    return "".join(f"{line}\n" for line in dump.splitlines() if re.match(r"Acquire::(https?|ftp)::", line))
