"""Runs a command on a kernel: starts QEMU, takes what comes out until it ends, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from migstream.cli_host import RUN_BY
from tests.lab import image, kernels, tools
from tests.lab.console import Console
from tests.lab.errors import LabError, TimeLimitError
from tests.lab.files import GuestFile, unpack
from tests.lab.kernels import Kernel

Sink = Callable[[bytes], object]

TIME_LIMIT_S = 600.0
# The slowest boot (QARMA5 on a busy machine) takes 20 s.
BOOT_LIMIT_S = 120.0
# All files that a command may send back, in bytes.
FILES_LIMIT = 256 << 20
_CHUNK = 1 << 16
_BEGIN, _END = b"begin\n", b"end\n"
# By whether the guest was still booting: the error, what did not happen, and what allows more time for it.
_LIMITS: dict[bool, tuple[type[LabError], str, str]] = {
    True: (LabError, "the kernel did not boot", "--boot-limit"),
    False: (TimeLimitError, "not done", "--time-limit"),
}
_MORE = {
    True: "--console FILE has all that the kernel says",
    False: "no file that the command wrote comes back",
}
_KERNEL_ARGS = "console={console} {quiet} panic=-1 rdinit=/init {mode}"


@dataclass(frozen=True)
class Machine:
    """The emulated machine: QEMU's CPU model, names from kernels.FEATURES and MODES, memory in MiB."""

    cpu: str = "max"
    features: tuple[str, ...] = ()
    mode: str | None = None
    memory_mib: int = 1024
    cpus: int = 1


@dataclass(frozen=True)
class Result:
    """What came of a command: exit status, output, the files that it wrote, and how long all of it took.

    `boot_s` is from the start of QEMU until the guest was ready, `total_s` until QEMU had ended.
    """

    status: int
    stdout: bytes
    stderr: bytes
    files: tuple[GuestFile, ...]
    console: str
    boot_s: float
    total_s: float


@dataclass
class _Guest:
    """What has come out of a running guest so far."""

    console: Console
    on_stdout: Sink
    on_stderr: Sink
    stdout: io.BytesIO = field(default_factory=io.BytesIO)
    stderr: io.BytesIO = field(default_factory=io.BytesIO)
    result: io.BytesIO = field(default_factory=io.BytesIO)
    emulator_says: bytearray = field(default_factory=bytearray)
    begun_at: float | None = None

    def take_stdout(self, data: bytes) -> None:
        self.stdout.write(data)
        self.on_stdout(data)

    def take_stderr(self, data: bytes) -> None:
        self.stderr.write(data)
        self.on_stderr(data)

    def take_result(self, data: bytes) -> None:
        if self.begun_at is None:
            self.begun_at = time.monotonic()
        self.result.write(data)
        if self.result.tell() > FILES_LIMIT:
            limit = f"{FILES_LIMIT >> 20} MiB"
            raise LabError(f"the command wrote more than {limit} of files; write less, or to /tmp")


def ignore(data: bytes) -> None:
    """A sink for output that nobody wants to see while it comes."""


def run(
    kernel: Kernel,
    command: Sequence[str],
    machine: Machine = Machine(),
    *,
    time_limit_s: float = TIME_LIMIT_S,
    boot_limit_s: float = BOOT_LIMIT_S,
    on_stdout: Sink = ignore,
    on_stderr: Sink = ignore,
    console_log: Path | None = None,
    bring: Mapping[str, bytes] = MappingProxyType({}),
) -> Result:
    """Boot a kernel, run a command in the project's folder there, and return what came of it.

    `bring` are further files for the guest, by path from its root. Raises LabError when the kernel is not fetched,
    does not boot or ends early, and TimeLimitError when the command was not done in time; QEMU is gone in every case.
    """
    arch = kernels.arch(kernel.arch)
    tools.require((arch.emulator, "setpriv"))
    vmlinuz = image.ready(kernel) / "vmlinuz"
    # A file without a name: even if this process is killed, nothing of it stays on the disk.
    with tempfile.TemporaryFile(prefix="migstream-lab-") as initrd:
        image.write(kernel, command, environment(kernel, machine), initrd, bring)
        initrd.flush()
        path = Path(f"/dev/fd/{initrd.fileno()}")
        emulator = [arch.emulator, *emulator_arguments(kernel, machine, vmlinuz, path, console_log is not None)]
        return converse(emulator, time_limit_s=time_limit_s, boot_limit_s=boot_limit_s, on_stdout=on_stdout,
                        on_stderr=on_stderr, console_log=console_log, inherit=(initrd.fileno(),))  # fmt: skip


def environment(kernel: Kernel, machine: Machine) -> Mapping[str, str]:
    """What tells a program in the guest where it is."""
    return {
        "MIGSTREAM_LAB": kernel.name,
        "MIGSTREAM_LAB_ARCH": kernel.arch,
        "MIGSTREAM_LAB_KERNEL": kernel.version,
        "MIGSTREAM_LAB_CPU": machine.cpu,
        "MIGSTREAM_LAB_FEATURES": ",".join(machine.features),
        "MIGSTREAM_LAB_MODE": machine.mode or "",
        RUN_BY: command_line(kernel, machine),
    }


def command_line(kernel: Kernel, machine: Machine) -> str:
    """What to type before a command to run it on this kernel and machine; what is as by default is left out."""
    words = ["python", "-m", "tests.lab", "run", "--arch", kernel.arch, "--kernel", kernel.version]
    for option, value, default in (
        ("--cpu", machine.cpu, Machine.cpu), ("--features", ",".join(machine.features), ""),
        ("--mode", machine.mode, None), ("--memory", machine.memory_mib, Machine.memory_mib),
        ("--smp", machine.cpus, Machine.cpus),
    ):
        words += [option, str(value)] if value != default else []
    return shlex.join([*words, "--"])


def emulator_arguments(kernel: Kernel, machine: Machine, vmlinuz: Path, initrd: Path, talk: bool = False) -> list[str]:
    """QEMU's command line, but for the channels; raises LabError for a feature or mode that there is not.

    With `talk` the kernel says all on its console from its first line on, else only what is wrong: that is faster.
    """
    arch = kernels.arch(kernel.arch)
    kernel_args = _KERNEL_ARGS.format(console=arch.console, quiet="" if talk else "quiet",
                                      mode=kernels.mode_arguments(kernel, machine.mode))
    return [
        *arch.machine_args, "-accel", "tcg",
        "-cpu", kernels.cpu_argument(arch, machine.cpu, machine.features),
        "-m", str(machine.memory_mib), "-smp", str(machine.cpus),
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-net", "none",
        "-kernel", str(vmlinuz), "-initrd", str(initrd), "-append", kernel_args.strip(),
    ]  # fmt: skip


def converse(
    emulator: Sequence[str],
    *,
    time_limit_s: float,
    boot_limit_s: float,
    on_stdout: Sink = ignore,
    on_stderr: Sink = ignore,
    console_log: Path | None = None,
    inherit: tuple[int, ...] = (),
) -> Result:
    """Start an emulator, add the channels to its command line, and take everything until it ends.

    It inherits the file descriptors in `inherit`. Raises as `run` does.
    """
    guest = _Guest(Console(console_log), on_stdout, on_stderr)
    started = time.monotonic()
    try:
        with _started(emulator, guest, inherit) as streams:
            _pump(streams, guest, started, time_limit_s, boot_limit_s)
    finally:
        guest.console.close()
    return _result(guest, started)


@contextmanager
def _started(
    emulator: Sequence[str], guest: _Guest, inherit: tuple[int, ...]
) -> Iterator[dict[int, Sink]]:
    sinks: dict[str, Sink] = {
        "console": guest.console.feed,
        "stdout": guest.take_stdout,
        "stderr": guest.take_stderr,
        "result": guest.take_result,
    }
    pipes = {name: os.pipe() for name in sinks}
    own = os.pipe()
    ends = [*(write for _, write in pipes.values()), own[1]]
    try:
        command = tools.tied([*emulator, *_channels({name: write for name, (_, write) in pipes.items()})])
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=own[1], stderr=own[1],
                                   pass_fds=(*ends, *inherit), start_new_session=True)  # fmt: skip
    finally:
        for end in ends:
            os.close(end)
    try:
        yield {**{pipes[name][0]: sink for name, sink in sinks.items()}, own[0]: guest.emulator_says.extend}
    finally:
        _end(process)
        for read in (*(read for read, _ in pipes.values()), own[0]):
            os.close(read)


def _channels(ends: Mapping[str, int]) -> list[str]:
    """QEMU's arguments that lead the console and the three ports of init.sh to our pipes.

    Virtio-serial because it is the one way out that all kernels have, and it is fast: 10 MB in 0.05 s, for
    0.1 s of loading modules on the older ones. PCI serial ports need no module, but carry 0.6 MB/s and stall
    on 7.2; the arm64 machine's own serial port is the console; 9p and disks need more modules than this.
    """
    devices = {
        "console": ("-serial", "chardev:console"),
        "stdout": ("-device", "virtserialport,nr=1,chardev=stdout"),
        "stderr": ("-device", "virtserialport,nr=2,chardev=stderr"),
        "result": ("-device", "virtserialport,nr=3,chardev=result"),
    }
    arguments = ["-device", "virtio-serial-pci"]
    for name, end in ends.items():
        arguments += ["-chardev", f"file,id={name},path=/dev/fd/{end}", *devices[name]]
    return arguments


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left in the emulator's process group; it has one of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pump(streams: Mapping[int, Sink], guest: _Guest, started: float,
          time_limit_s: float, boot_limit_s: float) -> None:  # fmt: skip
    with selectors.DefaultSelector() as selector:
        for end, sink in streams.items():
            selector.register(end, selectors.EVENT_READ, sink)
        while selector.get_map():
            booting = guest.begun_at is None and boot_limit_s < time_limit_s
            limit_s = boot_limit_s if booting else time_limit_s
            left = started + limit_s - time.monotonic()
            if left <= 0:
                raise _too_late(guest, booting, limit_s)
            for key, _ in selector.select(left):
                data = os.read(key.fd, _CHUNK)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fd)


def _too_late(guest: _Guest, booting: bool, limit_s: float) -> LabError:
    kind, what, option = _LIMITS[booting]
    advice = f"raise {option} if it is only slow; {_MORE[booting]}"
    return kind(f"{what} in {limit_s:g} s; {advice}\n{guest.console.last_lines()}")


def _result(guest: _Guest, started: float) -> Result:
    sent = guest.result.getvalue().rstrip(b"\n") + b"\n"  # without init.sh's filler
    status, _, rest = sent.removeprefix(_BEGIN).partition(b"\n")
    word, _, number = status.partition(b" ")
    if word != b"status" or not number.isdigit() or not rest.endswith(_END) or guest.begun_at is None:
        raise LabError(_why_it_ended(guest))
    return Result(int(number), guest.stdout.getvalue(), guest.stderr.getvalue(), unpack(rest[: -len(_END)]),
                  guest.console.text, guest.begun_at - started, time.monotonic() - started)  # fmt: skip


def _why_it_ended(guest: _Guest) -> str:
    own = guest.emulator_says.decode(errors="replace").strip().splitlines()[-1:]
    reason = guest.console.failure() or (own[0] if own else "no reason given")
    when = "before the command ran" if guest.begun_at is None else "while the command ran"
    return f"the guest ended {when}: {reason}\n{guest.console.last_lines()}"
