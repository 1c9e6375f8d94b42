"""The two parts of the guest's root file system that are made at fetch time: Debian's base and Python wheels.

Each is one cpio archive. Python sources are compiled here, where it costs 10 s, instead of in the emulated
guest at every run, where importing numpy alone would take longer than booting.
"""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import re
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tests.lab import kernels, tools
from tests.lab.cache import Origin, sha256
from tests.lab.cpio import CpioWriter
from tests.lab.errors import LabError

GUEST_PYTHON = "3.11"
SITE = "usr/lib/python3/dist-packages"
ROOT_SUITE = "bookworm"
ROOT_PACKAGES = (
    "busybox-static", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
    "libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5",
    "libuuid1", "libcrypt1",
)  # fmt: skip

# What no test needs; the guest unpacks every byte at every boot.
_DROPPED = {
    "usr/share/": "documentation",
    "usr/lib/[^/]+/gconv/": "20 MB of character sets",
    "usr/lib/[^/]+/(engines-3|ossl-modules)/": "OpenSSL's plug-ins",
    "usr/lib/python3.11/(test|pydoc_data|lib2to3|ensurepip|idlelib|turtledemo)/": "not for programs",
    ".*/__pycache__/": "compiled anew, for the path in the guest",
    f"{SITE}/(?!hypothesis|_pytest)[^/]+(/.+)?/tests/": "the packages' own tests",
    f"{SITE}/numpy/(f2py|distutils|_core/include|_core/lib)/": "for building extensions",
    f"{SITE}/zstandard/_cffi": "a second backend, 10 MB, used on PyPy only",
    f"{SITE}/bin/": "console scripts for another interpreter's path",
    r".*\.(pyi|a|h|pxd)$": "for type checkers and compilers",
}
_DROP = re.compile("|".join(_DROPPED))

_FIXED_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
    "etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
}
_FIXED_FOLDERS = ("dev", "proc", "sys", "run", "root", "var/tmp")
_FIXED_LINKS = {"usr/bin/python3": "python3.11", "usr/bin/python": "python3.11", "bin/sh": "busybox"}

# PEP 600 platforms up to the glibc of the guest (2.36); pip does not derive the older ones by itself.
_GLIBC_MINORS = range(17, 37)


def recipe_key(parts: Sequence[str]) -> str:
    """Identifies what a layer is made of: it has to be made again when this changes."""
    recipe = repr((sorted(_DROPPED), _FIXED_FILES, _FIXED_FOLDERS, _FIXED_LINKS, _bytecode_tag()))
    return f"{' '.join(parts)}; recipe {hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def write_base(debs: Sequence[Path], out: Path) -> None:
    """The Debian layer from package files; raises LabError when one can't be unpacked."""
    with out.open("wb") as file:
        archive = CpioWriter(file)
        for name in _FIXED_FOLDERS:
            archive.folder(name)
        archive.folder("tmp", 0o1777)
        for deb in debs:
            _add_deb(archive, deb)
        for name, data in _FIXED_FILES.items():
            archive.file(name, data)
        for name, target in _FIXED_LINKS.items():
            archive.symlink(name, target)
        archive.close()


def download_wheels(requirements: Sequence[str], arch: kernels.Arch, folder: Path) -> tuple[Origin, ...]:
    """Have pip put the wheels for the guest into the folder; raises LabError when one can't be had."""
    try:
        _pip("download", "--dest", str(folder), *_target(arch), *requirements)
    except LabError as error:
        raise LabError(f"no wheels for {arch.machine}: {error}; check the network, run it again") from error
    return tuple(_wheel_origin(path) for path in sorted(folder.glob("*.whl")))


def write_site(wheels: Path, arch: kernels.Arch, unpacked: Path, out: Path) -> None:
    """The layer of Python packages, from downloaded wheels."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    offline = ("--no-deps", "--no-index", "--no-compile")
    _pip("install", *offline, "--target", str(unpacked), *_target(arch), *files)
    with out.open("wb") as file:
        archive = CpioWriter(file)
        for path in sorted(unpacked.rglob("*")):
            if path.is_file():
                mode = path.stat().st_mode & 0o777
                add_python_file(archive, f"{SITE}/{path.relative_to(unpacked)}", path.read_bytes(), mode)
        archive.close()


def add_python_file(archive: CpioWriter, name: str, data: bytes, mode: int = 0o644) -> None:
    """A file, unless it is one that no test needs; with its bytecode, when it is a module."""
    if _DROP.match(name):
        return
    archive.file(name, data, mode)
    for compiled_name, bytecode in compiled(name, data):
        archive.file(compiled_name, bytecode)


def compiled(name: str, source: bytes) -> Iterator[tuple[str, bytes]]:
    """The bytecode file of a module, if this interpreter compiles for the guest's.

    It is of the kind that is never compared with its source (PEP 552): the two travel together.
    """
    if not name.endswith(".py") or _bytecode_tag() != "cpython-311":
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(source, f"/{name}", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return  # templates and files for other Python versions stay sources
    folder, _, file = name.rpartition("/")
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    yield f"{folder}/__pycache__/{file[:-3]}.{_bytecode_tag()}.pyc", header + marshal.dumps(code)


def members(deb: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Every entry of a package's file tree, in one pass; names without the leading `./`."""
    command = tools.tied(["dpkg-deb", "--fsys-tarfile", str(deb)])
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    member.name = member.name.removeprefix("./")
                    yield member, tar.extractfile(member) if member.isreg() else None
        except tarfile.TarError as error:
            raise LabError(f"a package can't be unpacked ({error}); run the fetch again") from error
        finally:
            process.stdout.close()
            process.kill()


def _add_deb(archive: CpioWriter, deb: Path) -> None:
    for member, content in members(deb):
        if content is not None:
            add_python_file(archive, member.name, content.read(), member.mode)
        elif member.issym() and not _DROP.match(member.name):
            archive.symlink(member.name, member.linkname)


def _target(arch: kernels.Arch) -> Iterator[str]:
    yield from ("--only-binary=:all:", f"--python-version={GUEST_PYTHON}", "--implementation=cp")
    yield from (f"--platform=manylinux_2_{minor}_{arch.machine}" for minor in _GLIBC_MINORS)
    yield f"--platform=manylinux2014_{arch.machine}"


def _pip(*arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    tools.output([sys.executable, "-m", "pip", *arguments, *quiet])


def _wheel_origin(path: Path) -> Origin:
    name, version, *_ = path.name.split("-")
    return Origin(name, version, path.stat().st_size, sha256(path))


def _bytecode_tag() -> str:
    return sys.implementation.cache_tag or "none"
