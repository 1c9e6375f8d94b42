"""The real kernel's side: plays sequences on the KVM of the machine that this runs on.

    python -m tests.fidelity.guest record PROFILE SEED CALLS OUTPUT FIRST LAST
    python -m tests.fidelity.guest shrink PROFILE SEED CALLS OUTPUT INDEX...
    python -m tests.fidelity.guest fresh SEQUENCES [SEED]

`record` writes the answers of sequences FIRST to LAST - 1, a zstd-packed line of JSON each; `shrink` makes sequences
that diverge as short as they get, with the simulator beside the real kernel, and writes what can be pasted. `fresh`
does both in a lab guest, with a new seed if none is given, prints it, and ends with 1 where something diverges.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

from migstream.backends.base import Backend
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.host import profiles
from migstream.host.profile import HostProfile
from tests.fidelity import driver, recorded
from tests.fidelity.calls import Answer, Story, Vocabulary
from tests.fidelity.vocabularies import vocabulary


def record(real: Backend, profile: HostProfile, seed: int, calls: int, indices: Sequence[int]) -> bytes:
    """The answers of a real kernel to some sequences, packed."""
    words = vocabulary(profile.arch)
    lines = [json.dumps(words.facts(real))]
    for index in indices:
        story = driver.story(words, profile, seed, index, calls)
        lines.append(json.dumps(list(driver.play(words, real, profile, story)), separators=(",", ":")))
    return zstandard.compress("\n".join(lines).encode())


def unpacked(packed: bytes) -> tuple[dict[str, int], Iterator[list[Answer]]]:
    """What `record` packed: facts of that boot, and the answers of each sequence."""
    text = zstandard.ZstdDecompressor().decompressobj().decompress(packed).decode()
    facts, *lines = text.splitlines()
    return json.loads(facts), (json.loads(line) for line in lines)


def compare(profile: HostProfile, seed: int, calls: int, indices: Sequence[int],
            packed: bytes) -> list[driver.Divergence]:
    """The sequences in which the simulator of the profile answers otherwise than `record` packed."""
    words, found = vocabulary(profile.arch), []
    facts, answers = unpacked(packed)
    simulator = SimBackend(words.told(profile, facts))
    for index, real in zip(indices, answers, strict=True):
        story = driver.story(words, profile, seed, index, calls)
        if parted := driver.diverges(words, simulator, profile, story, iter(real), index):
            found.append(parted)
    return found


def checker(words: Vocabulary, real: Backend, profile: HostProfile, index: int) -> driver.Check:
    """Plays a sequence on the real kernel and on the simulator."""
    simulator = SimBackend(words.told(profile, words.facts(real)))

    def check(story: Story) -> driver.Divergence | None:
        answers = driver.play(words, real, profile, story)
        return driver.diverges(words, simulator, profile, story, answers, index)

    return check


def shrunk(real: Backend, profile: HostProfile, seed: int, calls: int, index: int) -> driver.Divergence | None:
    """A sequence that diverges, as short as it gets; None where it does not diverge here."""
    words = vocabulary(profile.arch)
    check = checker(words, real, profile, index)
    found = check(driver.story(words, profile, seed, index, calls))
    return driver.shrink(found, check) if found else None


def _shrink(profile: HostProfile, kernel: str, seed: int, calls: int, indices: Sequence[int]) -> bytes:
    real, out = KvmBackend(), []
    for index in indices:
        found = shrunk(real, profile, seed, calls, index)
        out.append(recorded.pasteable(found, kernel, profile.arch, seed) if found else
                   f"# {kernel}, seed {seed}, sequence {index}: not seen again: something else than the calls decides")
    return ("\n\n".join(out) + "\n").encode()


def fresh(sequences: int, seed: int, calls: int = 30) -> int:
    """Compare with the lab kernel that this runs on."""
    name = os.environ["MIGSTREAM_LAB"]
    profile, real = profiles.load(name), KvmBackend()
    found = compare(profile, seed, calls, range(sequences), record(real, profile, seed, calls, range(sequences)))
    if found:
        indices = [one.index for one in found]
        print(_shrink(profile, name, seed, calls, indices[:3]).decode() + recorded.not_shown(indices, 3))
    print(f"{sequences} sequences, {sequences * calls} calls, {len(found)} divergences, seed {seed}, kernel {name}")
    return 1 if found else 0


def main(arguments: Sequence[str]) -> int:
    """Run one command line; every word is there."""
    verb, name, *rest = arguments
    if verb == "fresh":
        return fresh(int(name), int(rest[0]) if rest else random.SystemRandom().randrange(1 << 32))
    seed, calls, output = int(rest[0]), int(rest[1]), Path(rest[2])
    numbers, profile = [int(word) for word in rest[3:]], profiles.load(name)
    if verb == "record":
        output.write_bytes(record(KvmBackend(), profile, seed, calls, range(*numbers)))
    else:
        output.write_bytes(_shrink(profile, name, seed, calls, numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
