"""What several benchmarks' options take."""

from __future__ import annotations

import argparse

MOST_ROUNDS = 1_000_000


def number_of_rounds(text: str) -> int:
    """How often something is measured. Raises: ArgumentTypeError."""
    if not text.isdecimal() or not 1 <= int(text) <= MOST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds from 1 to {MOST_ROUNDS}")
    return int(text)
