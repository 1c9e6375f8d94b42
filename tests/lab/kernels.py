"""What the lab can boot: architectures, CPU features, modes, suites, kernels; one row each, with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.lab.errors import LabError

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Arch:
    """One guest architecture: what it is called where, and the machine that QEMU emulates for it."""

    name: str
    debian: str
    machine: str
    """As `uname -m` and the platform tags of wheels say it."""
    emulator: str
    machine_args: tuple[str, ...]
    console: str
    cpu_properties: Mapping[str, str]
    """Properties that the lab adds to a CPU model when it is asked for by this name."""
    reason: str


@dataclass(frozen=True)
class Feature:
    """A name for `--features`, and the QEMU CPU property that it stands for."""

    name: str
    arch: str
    cpu_property: str
    reason: str


@dataclass(frozen=True)
class Mode:
    """A name for `--mode`, and what the kernel's command line needs for it."""

    name: str
    arch: str
    kernel_args: str
    reason: str


@dataclass(frozen=True)
class Suite:
    """A Debian suite that kernels or the root file system come from."""

    name: str
    check_valid_until: bool
    reason: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of the lab: where its packages are and what has to be loaded before the guest is of use."""

    arch: str
    version: str
    suite: str
    packages: tuple[str, ...]
    """Templates of package names; `{release}` is what the suite's linux-image meta package depends on."""
    modules: tuple[str, ...]
    """In the order in which they are loaded."""
    modes: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        """What the cache and messages call this kernel: `arm64-6.1`."""
        return f"{self.arch}-{self.version}"


ARCHES: tuple[Arch, ...] = (
    Arch(
        "arm64", "arm64", "aarch64", "qemu-system-aarch64",
        ("-M", "virt,virtualization=on,gic-version=3"),
        "ttyAMA0",
        {"max": "pauth-impdef=on"},
        "EL2 makes the guest's KVM work; the architected pointer authentication (QARMA5) makes a boot take 4 "
        "times as long in emulation, and only vCPUs with that feature can tell (API and GPI for APA and GPA)",
    ),
    Arch(
        "x86_64", "amd64", "x86_64", "qemu-system-x86_64",
        ("-M", "q35"),
        "ttyS0",
        {},
        "software emulation offers AMD-V and no VMX, so this is always KVM/AMD",
    ),
)  # fmt: skip

FEATURES: tuple[Feature, ...] = (
    Feature("sve", "arm64", "sve=on", "on by default with --cpu max; QEMU refuses it for models without"),
    Feature("pmu", "arm64", "pmu=on", "on by default with every model"),
    Feature("pauth", "arm64", "pauth=on", "on by default with --cpu max"),
    Feature("qarma5", "arm64", "pauth-impdef=off", "the architected algorithm, where APA and GPA matter"),
)

MODES: tuple[Mode, ...] = (
    Mode("vhe", "arm64", "", "what a kernel does by itself on a CPU that has VHE"),
    Mode("nvhe", "arm64", "kvm-arm.mode=nvhe", "the host kernel runs at EL1, as on CPUs without VHE"),
)

SUITES: tuple[Suite, ...] = (
    Suite("bullseye", True, "oldest kernel still met in the field; its Release file never expires"),
    Suite("bookworm", True, "also the root file system's suite: its Python is 3.11"),
    Suite("trixie", True, "stable"),
    Suite("sid", False, "its index is good for a week only, and mirrors may be older; the signature is still "
          "checked, an index from last month is accepted, and for a throw-away guest that is harmless"),
)  # fmt: skip

# The guest's output leaves through virtio-serial, which the older kernels have as modules.
_VIRTIO_5_10 = ("virtio", "virtio_ring", "virtio_pci", "virtio_console")
_VIRTIO_6_1_ARM64 = ("virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console")
_VIRTIO_6_1_X86 = ("virtio", "virtio_ring", *_VIRTIO_6_1_ARM64)
_KVM_AMD = ("irqbypass", "ccp", "kvm", "kvm-amd")
_IMAGE = ("linux-image-{release}",)

KERNELS: tuple[Kernel, ...] = (
    Kernel("arm64", "5.10", "bullseye", _IMAGE, _VIRTIO_5_10, ("vhe",),
           "kvm-arm.mode is not known to it (--cpu cortex-a72 gives nVHE); no firmware bitmap registers"),
    Kernel("arm64", "6.1", "bookworm", _IMAGE, _VIRTIO_6_1_ARM64, ("vhe", "nvhe"),
           "first with the firmware bitmap registers"),
    Kernel("arm64", "6.12", "trixie", _IMAGE, (), ("vhe", "nvhe"),
           "writable ID registers; virtio-serial is built in"),
    Kernel("arm64", "7.2", "sid", ("linux-binary-{release}",), (), ("vhe", "nvhe"),
           "PSCI 1.3; the image is split, and no module is needed, so the modules stay where they are"),
    Kernel("x86_64", "6.1", "bookworm", _IMAGE, (*_VIRTIO_6_1_X86, *_KVM_AMD), (),
           "KVM is modular on x86"),
    Kernel("x86_64", "6.12", "trixie", _IMAGE, _KVM_AMD, (),
           "virtio-serial is built in"),
    Kernel("x86_64", "7.2", "sid", ("linux-binary-{release}", "linux-modules-{release}"), _KVM_AMD, (),
           "KVM_CAP_ONE_REG; the image is split"),
)  # fmt: skip


def arch(name: str) -> Arch:
    """The row of an architecture; raises LabError when there is none."""
    return _one({row.name: row for row in ARCHES}, name, "architecture")


def suite(name: str) -> Suite:
    """The row of a suite; raises LabError when there is none."""
    return _one({row.name: row for row in SUITES}, name, "suite")


def kernel(arch_name: str, version: str) -> Kernel:
    """The row of a kernel; raises LabError when there is none."""
    return _one({row.name: row for row in KERNELS}, f"{arch_name}-{version}", "kernel")


def select(arch_name: str | None = None, version: str | None = None) -> tuple[Kernel, ...]:
    """The kernels that fit; None fits all. Raises LabError when none does."""
    rows = tuple(k for k in KERNELS if arch_name in (None, k.arch) and version in (None, k.version))
    if not rows:
        wanted = "-".join(part for part in (arch_name, version) if part)
        raise LabError(f"no kernel fits {wanted!r}; there are: {', '.join(k.name for k in KERNELS)}")
    return rows


def cpu_argument(where: Arch, model: str, features: Sequence[str]) -> str:
    """QEMU's `-cpu` value for a model and feature names; raises LabError for a name without a row."""
    rows = {row.name: row for row in FEATURES if row.arch == where.name}
    wanted = [_one(rows, name, f"feature of {where.name}").cpu_property for name in features]
    return ",".join(part for part in (model, where.cpu_properties.get(model, ""), *wanted) if part)


def mode_arguments(which: Kernel, mode: str | None) -> str:
    """What a boot mode adds to the kernel's command line; raises LabError when the kernel lacks it."""
    if mode is None:
        return ""
    if mode not in which.modes:
        raise LabError(f"{which.name} has no mode {mode!r}: {which.reason}")
    return next(row.kernel_args for row in MODES if (row.name, row.arch) == (mode, which.arch))


def _one(rows: Mapping[str, _Row], name: str, what: str) -> _Row:
    if name not in rows:
        raise LabError(f"no {what} {name!r}; there are: {', '.join(rows) or 'none'}")
    return rows[name]
