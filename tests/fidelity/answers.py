"""A real kernel's answers in a file: recorded once, compared with each change of the simulator without a boot.

The file begins with the SHA-256 of the sequences that were played, in hexadecimal and a line feed; then what
`guest.record` packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from migstream.errors import UsageError
from migstream.host.profile import HostProfile
from tests.fidelity import driver
from tests.fidelity.vocabularies import vocabulary


def digest(profile: HostProfile, seed: int, calls: int, sequences: int) -> str:
    """What tells sequences from others: their calls."""
    words, found = vocabulary(profile.arch), hashlib.sha256(profile.kernel.encode())
    for index in range(sequences):
        found.update("".join(map(str, driver.story(words, profile, seed, index, calls))).encode())
    return found.hexdigest()


def kept(path: Path, wanted: str, record: Callable[[], bytes]) -> bytes:
    """The answers in a file, which is made where there is none. Raises: UsageError for those to other sequences."""
    if not path.exists():
        packed = record()
        path.write_bytes(wanted.encode() + b"\n" + packed)
        return packed
    head, _, packed = path.read_bytes().partition(b"\n")
    if head.decode(errors="replace") != wanted:
        raise UsageError(f"{path} holds the answers to other sequences: another seed, number, vocabulary or profile")
    return packed
