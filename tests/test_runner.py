"""The threads that run vCPUs of real KVM, on a KVM_RUN that returns at once: what an interruption may leave behind."""

from __future__ import annotations

import fcntl
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from migstream.backends.kvm import run

VCPUS = 4
LONG_S = 20.0
"""Far more than joining a few threads takes; only a pause that waits for ever reaches it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, at a place that a test has chosen."""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> run.Runner:
    def interrupted(fd: int, number: int, argument: int) -> int:
        time.sleep(0.0001)
        raise InterruptedError

    monkeypatch.setattr(fcntl, "ioctl", interrupted)
    return run.Runner(list(range(VCPUS)), [bytearray(4096) for _ in range(VCPUS)])


class AtCall:
    """Ctrl-C at the nth place, below one call, where the interpreter looks for signals: as a Python function begins,
    and as a C function has returned."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_return") and self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise Interrupted

    def interrupts(self, call: Callable[[], object]) -> bool:
        """Whether it came to that place."""
        sys.setprofile(self)
        try:
            call()
        except Interrupted:
            return True
        finally:
            sys.setprofile(None)
        return False


def stops(runner: run.Runner) -> None:
    """A pause ends, and with it every thread that may still run a guest."""
    failed: list[BaseException] = []
    pause = threading.Thread(target=paused, args=(runner, failed), daemon=True)
    pause.start()
    pause.join(LONG_S)
    assert not pause.is_alive(), "a pause after Ctrl-C waits for ever"
    assert failed == []


def test_ctrl_c_at_any_call_of_a_start_is_no_hang(runner: run.Runner) -> None:
    """An Event as the gate let threads sleep for ever where its set() was interrupted."""
    signal.signal(run.KICK, lambda *_: None)
    for number in itertools.count():
        came = AtCall(number).interrupts(runner.start)
        stops(runner)
        assert not runner.pause()
        if not came:
            break
    signal.signal(run.KICK, signal.SIG_DFL)
    assert number > 10


def test_ctrl_c_at_any_call_of_a_pause_is_no_hang(runner: run.Runner) -> None:
    """Thread.join() took a thread that ran for one that had ended: its VM was unmapped below it."""
    signal.signal(run.KICK, lambda *_: None)
    for number in itertools.count():
        runner.start()
        came = AtCall(number).interrupts(runner.pause)
        stops(runner)
        if not came:
            break
    signal.signal(run.KICK, signal.SIG_DFL)
    assert number > 10


def test_a_signal_that_is_no_kick_does_not_stop_a_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may give a signal of the process to any of its threads."""
    calls: list[int] = []

    def interrupted(fd: int, number: int, argument: int) -> int:
        calls.append(fd)
        time.sleep(0.001)
        raise InterruptedError

    monkeypatch.setattr(fcntl, "ioctl", interrupted)
    before = signal.getsignal(run.KICK)
    runner = run.Runner([0], [bytearray(4096)])
    runner.start()
    while len(calls) < 5:
        time.sleep(0.001)
    assert runner.pause() and not runner.exits and runner._round is None
    signal.signal(run.KICK, before)


def paused(runner: run.Runner, failed: list[BaseException]) -> None:
    """Pause; keep what it raises."""
    try:
        runner.pause()
    except BaseException as error:
        failed.append(error)
