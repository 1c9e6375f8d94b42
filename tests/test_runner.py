"""The threads that run vCPUs of real KVM, on a KVM_RUN that returns at once: what an interruption may leave behind."""

from __future__ import annotations

import fcntl
import signal
import threading

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
        raise InterruptedError

    monkeypatch.setattr(fcntl, "ioctl", interrupted)
    return run.Runner(list(range(VCPUS)), [bytearray(4096) for _ in range(VCPUS)])


@pytest.mark.parametrize("begun", range(VCPUS))
def test_ctrl_c_while_the_threads_start_is_no_hang(runner: run.Runner, begun: int,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that began waited for those that never did; a pause joined both."""
    start, left = threading.Thread.start, [begun]

    def some(thread: threading.Thread) -> None:
        if thread.name != "pause" and not left[0]:
            raise Interrupted
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", some)
    before = signal.getsignal(run.KICK)
    with pytest.raises(Interrupted):
        runner.start()
    failed: list[BaseException] = []
    pause = threading.Thread(target=paused, args=(runner, failed), name="pause", daemon=True)
    start(pause)
    pause.join(LONG_S)
    signal.signal(run.KICK, before)
    assert not pause.is_alive(), "a pause after Ctrl-C waits for ever"
    assert failed == []


def paused(runner: run.Runner, failed: list[BaseException]) -> None:
    """Pause; keep what it raises."""
    try:
        runner.pause()
    except BaseException as error:
        failed.append(error)
