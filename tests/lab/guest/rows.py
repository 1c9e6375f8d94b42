"""Runs several commands in a lab guest, one after another, each with a limit of its own: booting costs most.

The argument is a JSON list of (name, command, limit in seconds). What a command says comes as it is, between two lines
that begin with MARK. Ends with 0 whatever the commands ended with: their status is in the second line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

MARK = "== lab row "
TIMED_OUT = 124


def run(name: str, command: list[str], limit_s: float) -> None:
    """One command, its output and its status."""
    print(f"{MARK}{name} begins", flush=True)
    began = time.monotonic()
    try:
        status = subprocess.run(command, stderr=subprocess.STDOUT, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    print(f"\n{MARK}{name} ends {status} {time.monotonic() - began:.1f}", flush=True)


if __name__ == "__main__":
    for row in json.loads(sys.argv[1]):
        run(*row)
