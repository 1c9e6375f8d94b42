"""Brings kernels, the root file system and wheels into the cache; what is whole is not fetched again."""

from __future__ import annotations

import lzma
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import IO

from tests.lab import cache, kernels, layers, project, tools
from tests.lab.apt import Apt, Package, origins
from tests.lab.cache import Manifest, Origin
from tests.lab.errors import LabError
from tests.lab.kernels import Arch, Kernel
from tests.lab.sources import MIRROR_ENV

_PROGRAMS = ("apt-get", "apt-cache", "apt-config", "dpkg-deb", "setpriv")


class Status(Enum):
    """What became of an item, in the words that people are shown."""

    READY = "fetched"
    MISSING = "not fetched"
    DAMAGED = "damaged"
    OUTDATED = "outdated"


@dataclass(frozen=True)
class Made:
    """What making an item found out: the exact version, and what it was made from."""

    version: str
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class Item:
    """Something the cache holds, and how it is made: `make(work folder, output folder)`."""

    title: str
    folder: str
    key: str
    make: Callable[[Path, Path], Made]

    def status(self, root: Path) -> tuple[Status, Manifest | None]:
        """Whether the item can be used, and its manifest if there is a readable one."""
        try:
            manifest = cache.checked(root / self.folder)
        except LabError:
            return Status.DAMAGED, None
        if manifest is None:
            return Status.MISSING, None
        return (Status.READY if manifest.key == self.key else Status.OUTDATED), manifest


def kernel_item(kernel: Kernel) -> Item:
    """A kernel's image and the modules that the lab loads."""
    key = f"{kernel.suite} {' '.join((*kernel.packages, *kernel.modules))}"
    return Item(f"kernel {kernel.name}", f"kernels/{kernel.name}", key,
                lambda w, o: _make_kernel(kernel, w, o))  # fmt: skip


def base_item(arch: Arch) -> Item:
    """Busybox, Python and the libraries that they and the wheels need."""
    key = layers.recipe_key((layers.ROOT_SUITE, *layers.ROOT_PACKAGES))
    return Item(f"root file system {arch.name}", f"root/{arch.name}", key,
                lambda w, o: _make_base(arch, w, o))  # fmt: skip


def wheels_item(arch: Arch, requirements: Sequence[str]) -> Item:
    """The project's dependencies and what its tests need."""
    key = layers.recipe_key(requirements)
    return Item(f"wheels {arch.name}", f"wheels/{arch.name}", key,
                lambda w, o: _make_wheels(arch, requirements, w, o))  # fmt: skip


def items(selected: Iterable[Kernel]) -> Iterator[Item]:
    """Everything that these kernels need, the largest first."""
    selected = tuple(selected)
    arches = [kernels.arch(name) for name in dict.fromkeys(kernel.arch for kernel in selected)]
    requirements = project.read().requirements
    yield from map(kernel_item, selected)
    for arch in arches:
        yield base_item(arch)
        yield wheels_item(arch, requirements)


def fetch(wanted: Sequence[Item], *, jobs: int = 2, refresh: bool = False) -> dict[str, Manifest]:
    """Make every item that is not whole, `jobs` at a time; returns the manifests by title.

    What an interrupted call had completed is used. Raises LabError with the first failure, after the items
    that were already being made have ended.
    """
    root = cache.cache_root()
    with cache.only_fetch(root), ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = {item.title: pool.submit(_whole, item, root, refresh) for item in wanted}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        shutil.rmtree(root / "partial", ignore_errors=True)
    return {title: future.result() for title, future in futures.items()}


def _whole(item: Item, root: Path, refresh: bool) -> Manifest:
    status, manifest = item.status(root)
    return manifest if manifest and status is Status.READY and not refresh else _make(item, root)


def _make(item: Item, root: Path) -> Manifest:
    work = root / "partial" / item.folder.replace("/", "-")
    made = work / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    _progress(f"{item.title}: fetching")
    result = item.make(work, made)
    manifest = cache.seal(made, item.title, item.key, result.version, result.origins)
    cache.install(made, root / item.folder)
    _progress(f"{item.title}: {result.version}, {manifest.size / 1e6:.0f} MB")
    return manifest


def _make_kernel(kernel: Kernel, work: Path, out: Path) -> Made:
    arch = kernels.arch(kernel.arch)
    apt = _updated(arch, kernel.suite, work)
    packages = kernel_packages(kernel, arch, apt.package)
    wanted = {f"{name}.ko": out / "modules" / f"{name}.ko" for name in kernel.modules}
    for deb in apt.download(packages, work / "debs"):
        _extract_kernel(deb, out, wanted)
    missing = [path.name for path in (out / "vmlinuz", *wanted.values()) if not path.is_file()]
    if missing:
        lacking = f"{packages[0].name} lacks {', '.join(missing)}"
        raise LabError(f"{lacking}; mend the row of {kernel.name} in tests/lab/kernels.py")
    return Made(packages[0].version, origins(packages))


def kernel_packages(kernel: Kernel, arch: Arch, find: Callable[[str], Package]) -> list[Package]:
    """The packages that hold a kernel, found from the suite's meta package.

    Raises LabError when the suite has gone on to another kernel version than the row says.
    """
    meta = find(f"linux-image-{arch.debian}")
    release = re.search(r"linux-image-([^ ,]+)", meta.depends)
    if not meta.version.startswith(f"{kernel.version}.") or release is None:
        raise LabError(
            f"{kernel.name}: Debian {kernel.suite} has Linux {meta.version} now; "
            f"change its row in tests/lab/kernels.py, or set {MIRROR_ENV} to a mirror that still has it"
        )
    return [find(template.format(release=release[1])) for template in kernel.packages]


def _extract_kernel(deb: Path, out: Path, wanted: dict[str, Path]) -> None:
    for member, content in layers.members(deb):
        name = PurePosixPath(member.name).name
        if content is None:
            continue
        if name.startswith("vmlinuz"):
            (out / "vmlinuz").write_bytes(content.read())
        elif name.removesuffix(".xz") in wanted:
            _write_module(content, name, wanted[name.removesuffix(".xz")])


def _write_module(content: IO[bytes], name: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    raw = content.read()
    path.write_bytes(lzma.decompress(raw) if name.endswith(".xz") else raw)


def _make_base(arch: Arch, work: Path, out: Path) -> Made:
    apt = _updated(arch, layers.ROOT_SUITE, work)
    packages = [apt.package(name) for name in layers.ROOT_PACKAGES]
    layers.write_base(apt.download(packages, work / "debs"), out / "root.cpio")
    return Made(f"Debian {layers.ROOT_SUITE}", origins(packages))


def _make_wheels(arch: Arch, requirements: Sequence[str], work: Path, out: Path) -> Made:
    folder, unpacked = work / "wheels", work / "unpacked"
    folder.mkdir(exist_ok=True)
    shutil.rmtree(unpacked, ignore_errors=True)
    wheels = layers.download_wheels(requirements, arch, folder)
    layers.write_site(folder, arch, unpacked, out / "site.cpio")
    return Made(f"{len(wheels)} wheels", wheels)


def _updated(arch: Arch, suite: str, work: Path) -> Apt:
    tools.require(_PROGRAMS)
    apt = Apt(arch, kernels.suite(suite), work / "apt")
    apt.update()
    return apt


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
