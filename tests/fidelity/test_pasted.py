"""What a divergence prints is Python: a row that fails on what diverges, and passes on what does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from migstream.backends.sim import SimBackend
from migstream.host import profiles
from tests.fidelity import driver, recorded
from tests.fidelity.calls import Call, call
from tests.fidelity.recorded import Recorded
from tests.fidelity.test_recorded import ask
from tests.fidelity.vocabularies import vocabulary

PAIRS = (("x86_64-7.2", "x86_64-6.1"), ("arm64-7.2", "arm64-5.10"))
"""(stands for the real kernel, stands for its simulator): they differ often."""

SEED = 7


def parted(real: str, simulated: str, index: int) -> driver.Divergence | None:
    host = profiles.load(real)
    words = vocabulary(host.arch)
    story = driver.story(words, host, SEED, index, 30)
    answers = driver.play(words, SimBackend(real), host, story)
    return driver.diverges(words, SimBackend(simulated), host, story, answers, index)


def divergences(real: str, simulated: str) -> Iterator[driver.Divergence]:
    return (found for index in range(12) if (found := parted(real, simulated, index)))


def evaluated(text: str) -> Recorded:
    """As it would stand in a tuple of rows; no other name is needed."""
    (row,) = eval(f"({text})", {"Recorded": Recorded, "call": call})
    assert isinstance(row, Recorded)
    return row


def plain(row: Recorded) -> tuple[Any, ...]:
    """Tuples of arguments are lists in what is printed."""
    return row.kernels, json.dumps(row.calls), row.expected, row.why


@pytest.mark.sim
@pytest.mark.parametrize(("real", "simulated"), PAIRS)
def test_what_is_printed_is_the_row(real: str, simulated: str) -> None:
    arch, count = profiles.load(real).arch, 0
    for found in divergences(real, simulated):
        text = recorded.pasteable(found, real, arch, SEED)
        row = evaluated(text)
        assert plain(row) == plain(recorded.recorded(found, real, SEED)) and row.expected and row.why
        assert recorded.FILES[arch] in text.splitlines()[0] and "…" not in text
        assert ask(SimBackend(real), real, row) == row.expected
        assert recorded.holds(found.simulated, row.expected) != row.expected
        count += 1
    assert count >= 3


def test_an_answer_is_printed_whole_however_long() -> None:
    real = {"answer": [], "value": {str(n): f"{n:#x}" for n in range(1000)}}
    found = driver.Divergence(3, (Call("read", {"register": 1 << 60, "vcpu": 0}),), real, {"answer": ["no"]})
    row = evaluated(recorded.pasteable(found, "x86_64-7.2", profiles.load("x86_64-7.2").arch, 1))
    assert row.expected == real and row.calls == found.story


def test_parts_that_the_kernel_has_not_are_expected_to_be_absent() -> None:
    """An answer without an error, which is empty, would else hold for any; one that is no object is told whole."""
    assert recorded.holds([22], {"": [0], "value.1": 0, "answer": []}) == {"": [22], "value.1": None, "answer": None}
    found = driver.Divergence(0, (call("enter", vcpu=0),), {}, {"error": "KVM_RUN: EIO"})
    row = recorded.recorded(found, "x86_64-7.2", 1)
    assert row.expected == {"error": None} == recorded.holds({}, row.expected)
    assert recorded.holds(found.simulated, row.expected) != row.expected


def test_what_is_not_shown_is_counted() -> None:
    assert recorded.not_shown(range(5), 5) == ""
    assert "1 more divergence is not shown: sequence 5" in recorded.not_shown(range(6), 5)
    assert "95 more divergences are not shown: sequence 5, 6, " in recorded.not_shown(range(100), 5)
