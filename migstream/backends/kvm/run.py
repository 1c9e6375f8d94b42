"""Threads that run vCPUs: one each, in KVM_RUN, and how they are stopped.

A pause sets `immediate_exit` on every vCPU and kicks its thread with a signal, so that KVM_RUN returns with EINTR
between two guest instructions, whether the vCPU was in the guest, about to enter it, or blocked in the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import signal
import struct
import threading
from typing import Any

from migstream.backends.kvm import uapi
from migstream.errors import UsageError, errno_name

KICK = signal.SIGUSR1
_FAILED = "KVM_RUN: "


class Runner:
    """Runs the vCPUs behind file descriptors with their mapped `kvm_run` pages (owned by the caller)."""

    def __init__(self, fds: list[int], run_pages: list[Any]) -> None:
        self._fds, self._pages = fds, run_pages
        self._threads: list[threading.Thread] = []
        self.exits: dict[int, str] = {}

    def start(self) -> None:
        """Start one thread a vCPU. Raises: UsageError when they run already or the kick signal can't be handled."""
        if self._threads:
            raise UsageError("the vCPUs run already")
        _handle_kick()
        self.exits = {}
        gate = threading.Event()
        self._threads = [threading.Thread(target=self._loop, args=(k, gate), daemon=True)
                         for k in range(len(self._fds))]
        try:
            for thread in self._threads:
                thread.start()
        finally:
            gate.set()

    def pause(self) -> bool:
        """Stop all vCPUs and join their threads; True where vCPUs ran, and each ended with an exit of KVM_RUN."""
        ran = bool(self._threads)
        for page in self._pages:
            page[uapi.RUN_IMMEDIATE_EXIT] = 1
        for thread in self._threads:
            if thread.is_alive() and thread.ident is not None:
                signal.pthread_kill(thread.ident, KICK)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._threads = []
        for page in self._pages:
            page[uapi.RUN_IMMEDIATE_EXIT] = 0
        return ran and not any(why.startswith(_FAILED) for why in self.exits.values())

    def _loop(self, k: int, gate: threading.Event) -> None:
        """Run until kicked. A guest of ours never exits by itself: any other exit is its end.

        The gate lets all threads exist before the first guest runs: with guests on every CPU, making the next
        thread waits for a time slice, and a start would take longer than the work.
        """
        gate.wait()
        try:
            fcntl.ioctl(self._fds[k], uapi.RUN.number, 0)
        except InterruptedError:
            return
        except OSError as error:
            self.exits[k] = f"{_FAILED}{errno_name(error.errno or errno.EIO)}"
            return
        (reason,) = struct.unpack_from("<I", self._pages[k], uapi.RUN_EXIT_REASON)
        self.exits[k] = f"KVM_EXIT_{uapi.EXIT_REASONS.get(reason, reason)}"


def _handle_kick() -> None:
    """A handler that does nothing, so that the signal interrupts KVM_RUN and not the process."""
    if signal.getsignal(KICK) is not signal.SIG_DFL:
        return
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("the first start() of a process must come from its main thread (it installs a signal handler)")
    signal.signal(KICK, lambda *_: None)
