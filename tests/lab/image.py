"""The root file system of one run: the two layers from the cache, and on top this project and the command."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from tests.lab import cache, fetch, project
from tests.lab.cpio import CpioWriter
from tests.lab.errors import LabError
from tests.lab.kernels import Kernel
from tests.lab.layers import SITE, add_python_file

_INIT = Path(__file__).with_name("init.sh")
_SCRIPT = """\
#!/usr/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""
_ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}


def ready(kernel: Kernel) -> Path:
    """The folder of a fetched kernel, everything that it needs compared with its checksums.

    Raises LabError, with the command that mends it, when something is missing, damaged or outdated.
    """
    root = cache.cache_root()
    for item in fetch.items([kernel]):
        status, _ = item.status(root)
        if status is not fetch.Status.READY:
            raise LabError(f"{item.title} is {status.value}; run: {fetch_command(kernel)}")
    return root / fetch.kernel_item(kernel).folder


def fetch_command(kernel: Kernel) -> str:
    """What to type to have a kernel fetched."""
    return f"{cache.FETCH} --arch {kernel.arch} --kernel {kernel.version}"


def write(kernel: Kernel, command: Sequence[str], environment: Mapping[str, str], out: BinaryIO,
          bring: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Write the initrd for one run of a command; `bring` are further files by path from the guest's root."""
    root = cache.cache_root()
    for layer in (f"root/{kernel.arch}/root.cpio", f"wheels/{kernel.arch}/site.cpio"):
        with (root / layer).open("rb") as source:
            shutil.copyfileobj(source, out, 1 << 20)
    write_top(out, kernel, root / "kernels" / kernel.name / "modules", command, environment, bring)


def write_top(out: BinaryIO, kernel: Kernel, modules: Path, command: Sequence[str],
              environment: Mapping[str, str], bring: Mapping[str, bytes] = MappingProxyType({})) -> None:  # fmt: skip
    """The archive with what differs from run to run: init, modules, this project, the command."""
    archive = CpioWriter(out)
    archive.file("init", _INIT.read_bytes(), 0o755)
    archive.file("lab/command", command_script(command, environment).encode())
    for position, name in enumerate(kernel.modules):
        # The number keeps the order in which init loads them.
        archive.file(f"lab/modules/{position:02}-{name}.ko", (modules / f"{name}.ko").read_bytes())
    for path, data in bring.items():
        archive.file(path, data)
    _add_project(archive, project.CHECKOUT)
    archive.close()


def command_script(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The shell script that init runs; every word of the command arrives as it is."""
    variables = {**_ENVIRONMENT, **environment}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"{exports}exec {shlex.join(command)}\n"


def _add_project(archive: CpioWriter, checkout: Path) -> None:
    described = project.read(checkout)
    for name, path in project.files(checkout):
        add_python_file(archive, name, path.read_bytes(), path.stat().st_mode & 0o777)
    # What an installation would leave: the code on the path, its metadata, its commands.
    archive.file(f"{SITE}/{described.name}.pth", f"/{project.GUEST_CHECKOUT}\n".encode())
    metadata = f"Metadata-Version: 2.1\nName: {described.name}\nVersion: {described.version}\n"
    archive.file(f"{SITE}/{described.name}-{described.version}.dist-info/METADATA", metadata.encode())
    for name, entry in described.scripts.items():
        module, _, function = entry.partition(":")
        script = _SCRIPT.format(module=module, function=function)
        archive.file(f"usr/local/bin/{name}", script.encode(), 0o755)
