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
from _thread import start_new_thread
from contextlib import suppress
from typing import Any

from migstream.backends.kvm import uapi
from migstream.errors import UsageError, errno_name

KICK = signal.SIGUSR1
_FAILED = "KVM_RUN: "


class Round:
    """One start of all vCPUs, to its pause. The main thread may be interrupted by a signal handler's exception at any
    line, and a later pause still ends all threads: nothing here is undone half. `threading.Event` can't do that: a
    `set()` that is interrupted leaves threads asleep, or its lock taken; nor can `Thread.start()` and `join()`,
    which waits on an Event, and which after an interruption takes a running thread for one that has ended.

    Attributes:
        whole: all threads were started. shut: none may enter its guest any more. entered: vCPUs whose thread is here.
        ended: a lock for each vCPU; its thread releases it at its end.
    """

    def __init__(self, vcpus: int) -> None:
        self.whole = self.shut = False
        self.entered: list[int] = []
        self.ended = [threading.Lock() for _ in range(vcpus)]
        self._idents: dict[int, int] = {}
        self._kicking, self._gate = threading.Lock(), threading.Lock()
        for lock in (self._gate, *self.ended):
            lock.acquire()

    def open(self) -> None:
        """Let all threads through, those that wait and those that come; may be done twice."""
        with suppress(RuntimeError):  # it is open
            self._gate.release()

    def pass_gate(self, k: int) -> bool:
        """A thread's first step: wait until all are there; False where it has to go home."""
        with self._kicking:
            self._idents[k] = threading.get_ident()
        self.entered.append(k)
        with suppress(RuntimeError), self._gate:
            pass
        return not self.shut

    def leave(self, k: int) -> None:
        """A thread's last step: from here on it can't be kicked."""
        with self._kicking:
            del self._idents[k]
        self.ended[k].release()

    def kick(self) -> None:
        """Interrupt every thread that is there."""
        with self._kicking:
            for ident in self._idents.values():
                signal.pthread_kill(ident, KICK)

    def wait(self) -> None:
        """Until all threads have ended that were started, or, where not all were, that may not have seen `shut`."""
        for k in range(len(self.ended)) if self.whole else tuple(self.entered):
            with self.ended[k]:
                pass


class Runner:
    """Runs the vCPUs behind file descriptors with their mapped `kvm_run` pages (owned by the caller)."""

    def __init__(self, fds: list[int], run_pages: list[Any]) -> None:
        self._fds, self._pages = fds, run_pages
        self._round: Round | None = None
        self.exits: dict[int, str] = {}

    def start(self) -> None:
        """Start one thread a vCPU. Raises: UsageError when they run already or the kick signal can't be handled."""
        if self._round:
            raise UsageError("the vCPUs run already")
        _handle_kick()
        self.exits = {}
        this = self._round = Round(len(self._fds))
        for k in range(len(self._fds)):
            start_new_thread(self._loop, (k, this))
        this.whole = True
        this.open()

    def pause(self) -> bool:
        """Stop all vCPUs and wait for their threads; True where vCPUs ran, and each ended with an exit of KVM_RUN.

        After a start that was interrupted no vCPU has run, and none does.
        """
        this = self._round
        if this is None:
            return False
        for page in self._pages:
            page[uapi.RUN_IMMEDIATE_EXIT] = 1
        this.shut = not this.whole
        this.open()
        this.kick()
        this.wait()
        for page in self._pages:
            page[uapi.RUN_IMMEDIATE_EXIT] = 0
        self._round = None
        return this.whole and not any(why.startswith(_FAILED) for why in self.exits.values())

    def _loop(self, k: int, this: Round) -> None:
        """A vCPU's thread. The gate lets all threads exist before the first guest runs: with guests on every CPU,
        making the next thread waits for a time slice, and a start would take longer than the work.
        """
        try:
            if this.pass_gate(k):
                self._run(k)
        finally:
            this.leave(k)

    def _run(self, k: int) -> None:
        """Run until a pause. A guest of ours never exits by itself: any other exit is its end.

        A signal that is nobody's kick (the kernel may give any thread one of the process's) is no end.
        """
        while True:
            try:
                fcntl.ioctl(self._fds[k], uapi.RUN.number, 0)
            except InterruptedError:
                if self._pages[k][uapi.RUN_IMMEDIATE_EXIT]:
                    return
                continue
            except OSError as error:
                self.exits[k] = f"{_FAILED}{errno_name(error.errno or errno.EIO)}"
                return
            break
        (reason,) = struct.unpack_from("<I", self._pages[k], uapi.RUN_EXIT_REASON)
        self.exits[k] = f"KVM_EXIT_{uapi.EXIT_REASONS.get(reason, reason)}"


def _handle_kick() -> None:
    """A handler that does nothing, so that the signal interrupts KVM_RUN and not the process."""
    if signal.getsignal(KICK) is not signal.SIG_DFL:
        return
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("the first start() of a process must come from its main thread (it installs a signal handler)")
    signal.signal(KICK, lambda *_: None)
