"""Ctrl-C and its like: the status says so, whatever the interruption became on its way, and nothing else is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import os, signal, sys
from migstream import cli, {module}
def act(*arguments, **more):
    try:
        os.kill(os.getpid(), signal.{signal})
        import time; time.sleep(20)
    except KeyboardInterrupt as error:
        {then}
{module}.{name} = act
{before}
sys.argv = ["migstream", "verify", "nothing.mig"]
sys.exit(cli.main())
"""
BECOMES = {
    "itself": "raise",
    "an interrupted import": "raise RuntimeError('Error calling __set_name__') from error",
    "a view that a frame holds": "raise BufferError('cannot close exported pointers exist') from None",
    "an import that failed": "raise ImportError('numpy') from error",
    "a file that was closed": "raise OSError(9, 'Bad file descriptor') from None",
    "an error of ours": "raise cli.UsageError('no') from error",
    "nothing": "return None",
    "an exit": "sys.exit(3)",
}


def run(number: signal.Signals, then: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = RUN.format(module="transport", name="open_source", signal=number.name, then=then, before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("then", BECOMES.values(), ids=BECOMES.keys())
def test_what_follows_from_a_signal_is_its_status(number: signal.Signals, then: str) -> None:
    done = run(number, then)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_what_was_ignored_stays_ignored() -> None:
    """nohup, and what a script starts in the background."""
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN); import time; time.sleep = lambda s: None"
    done = run(signal.SIGHUP, "raise", before)
    assert done.returncode == 70 and "a bug of ours" in done.stderr  # it went on, with what the test returned


@pytest.mark.parametrize("words", [
    ["-m", "migstream", "--version"], ["-m", "bench", "codec"],
    ["-c", "import sys; from migstream.__main__ import main; sys.exit(main())", "--version"]])
def test_ctrl_c_while_the_command_line_is_imported(words: list[str], tmp_path: Path) -> None:
    """The entry answers before it imports: here a module of the command line is as slow as can be."""
    (tmp_path / "argparse.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True)
    assert child.stdout and child.stdout.readline() == "importing\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "")
