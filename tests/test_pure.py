"""The same tests in a process without the compiled part: everything works either way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migstream.native import compiled

TESTS = ("contract", "test_bounds.py", "test_codec.py", "test_faults.py", "test_frames.py", "test_ready.py",
         "test_reader.py", "test_sections.py", "test_transport.py")
"""Those that go through code which asks whether there is a compiled part."""


@pytest.mark.skipif(compiled is None, reason="nothing compiled is here: all tests are such")
@pytest.mark.parametrize("tests", TESTS)
def test_without_the_compiled_part(tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], env={**os.environ, "MIGSTREAM_PURE": "1"},
                           capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed" in ended.stdout
