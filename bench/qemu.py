"""QEMU's own save and load of device state on this machine's KVM, by its own events.

A guest (its BIOS, with no disk) is stopped and migrated to a file and from there into a second QEMU. Times are those of
QEMU's MIGRATION events: *save* from `device` (RAM is sent, QEMU reads and writes device state) to `completed`; *load*
from `active` to `completed`. A load has RAM in it, as QEMU gives no event between: pages of a guest that ran a BIOS.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import die_with_parent, end, version
from bench.program import LeftOut
from migstream.errors import printable

PROGRAM = "qemu-system-x86_64"
MACHINE = ("-accel", "kvm", "-M", "pc,suppress-vmdesc=on", "-cpu", "host,arch-capabilities=off", "-m", "64M",
           "-nodefaults", "-display", "none", "-nographic")
"""Without the JSON description of the stream at its end, and without the MSR that QEMU 7.2 can't set on every host."""

MOST_VCPUS = 240
_LIMIT_S, _POLL_S = 60.0, 0.1
_BIOS_S = 0.3


@dataclass(frozen=True)
class Moved:
    """ns of QEMU's device phase and load; bytes of the stream without RAM."""

    save: int
    load: int
    bytes: int


class Monitor:
    """One QEMU and its QMP socket. A context manager: QEMU runs from its begin to its end."""

    def __init__(self, folder: Path, vcpus: int, *more: str) -> None:
        self._folder, self._path = folder, folder / f"qmp-{time.monotonic_ns()}"
        self._command = [PROGRAM, *MACHINE, "-smp", str(vcpus), "-qmp", f"unix:{self._path}", *more]
        self._owned = contextlib.ExitStack()
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Monitor:
        """Start QEMU and greet it. Raises: LeftOut with QEMU's words, OSError."""
        try:
            self._start()
        except BaseException:
            self._owned.close()
            raise
        return self

    def _start(self) -> None:
        self._errors = self._owned.enter_context((self._folder / "qemu.err").open("w+b"))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self._path))
            self._owned.callback(self._path.unlink, missing_ok=True)
            server.listen(1)
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
                start_new_session=True, preexec_fn=die_with_parent)
            self._owned.callback(end, self._process)
            self._connection = self._owned.enter_context(self._accept(server))
        self._lines = self._owned.enter_context(self._connection.makefile("rb"))
        self._read(lambda message: "QMP" in message)
        self.command("qmp_capabilities")

    def _accept(self, server: socket.socket) -> socket.socket:
        server.settimeout(_POLL_S)
        limit = time.monotonic() + _LIMIT_S
        while time.monotonic() < limit:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                connection.settimeout(_LIMIT_S)
                return connection
            if self._process.poll() is not None:
                raise LeftOut(f"{PROGRAM}: {self._said() or f'exit status {self._process.returncode}'}")
        raise LeftOut(f"{PROGRAM}: no answer within {_LIMIT_S:.0f} s")

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _said(self) -> str:
        self._errors.seek(0)
        return printable(next(iter(self._errors.read().decode(errors="replace").strip().splitlines()), ""), 200)

    def _read(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.readline()
            except TimeoutError:
                line = b""
            if not line:
                raise LeftOut(f"{PROGRAM}: {self._said() or 'it ended or is silent'}")
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            if wanted(message):
                return dict(message)

    def command(self, name: str, **arguments: Any) -> Any:
        """Do one QMP command. Raises: LeftOut with QEMU's words."""
        self._connection.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        answer = self._read(lambda message: "return" in message or "error" in message)
        if "error" in answer:
            raise LeftOut(f"{PROGRAM}: {name}: {answer['error']['desc']}")
        return answer["return"]

    def wait_migration(self, status: str) -> int:
        """Wait until QEMU says so and return its time stamp, ns. Raises: LeftOut when it failed."""
        ends = (status, "failed")
        known = [e for e in self.events if _status(e) in ends]
        event = known[0] if known else self._read(lambda message: _status(message) in ends)
        if _status(event) != status:
            reason = self.command("query-migrate").get("error-desc", "migration failed")
            raise LeftOut(f"{PROGRAM}: {reason}")
        return int(event["timestamp"]["seconds"]) * 10**9 + int(event["timestamp"]["microseconds"]) * 1000


def _status(message: dict[str, Any]) -> str:
    return str(message["data"]["status"]) if message.get("event") == "MIGRATION" else ""


class Qemu:
    """QEMU as a peer of a benchmark."""

    most_vcpus = MOST_VCPUS

    def __init__(self, folder: Path) -> None:
        """Raises: LeftOut where there is none or it can't run here."""
        path = shutil.which(PROGRAM)
        if path is None:
            raise LeftOut(f"{PROGRAM} is not installed (Debian: qemu-system-x86)")
        known, reason = version(path)
        if known is None:
            raise LeftOut(f"{PROGRAM}: {reason}")
        self._folder, self.version = folder, known
        self.move(1)

    def move(self, vcpus: int) -> Moved:
        """Save a guest and load it once. Raises: LeftOut."""
        try:
            moved = self._move(vcpus)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise LeftOut(f"{PROGRAM}: not what QEMU says or does: {type(error).__name__}: {error}") from error
        if min(moved.save, moved.load) <= 0 or moved.bytes < 0:
            raise LeftOut(f"{PROGRAM}: its events say that time went back")
        return moved

    def _move(self, vcpus: int) -> Moved:
        path = self._folder / "qemu.state"
        with Monitor(self._folder, vcpus) as source:
            time.sleep(_BIOS_S)
            source.command("stop")
            _capabilities(source, "events", "pause-before-switchover")
            source.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            source.command("migrate", uri=f"exec:cat > {path}")
            source.wait_migration("pre-switchover")
            source.command("migrate-continue", state="pre-switchover")
            start, end = source.wait_migration("device"), source.wait_migration("completed")
            ram = int(source.command("query-migrate")["ram"]["transferred"])
        size = path.stat().st_size
        with Monitor(self._folder, vcpus, "-S", "-incoming", "defer") as target:
            _capabilities(target, "events")
            target.command("migrate-incoming", uri=f"exec:cat {path}")
            active, completed = target.wait_migration("active"), target.wait_migration("completed")
        path.unlink()
        return Moved(end - start, completed - active, size - ram)


def _capabilities(monitor: Monitor, *names: str) -> None:
    monitor.command("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])
