"""Answers of a kernel that are kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from migstream.errors import UsageError
from migstream.host import profiles
from tests.fidelity import answers


def test_the_kernel_is_asked_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def record() -> bytes:
        asked.append(1)
        return b"packed\n"

    path = tmp_path / "answers"
    assert [answers.kept(path, "ab", record) for _ in range(2)] == [b"packed\n", b"packed\n"]
    assert asked == [1]


def test_answers_to_other_sequences_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    answers.kept(path, "ab", lambda: b"")
    with pytest.raises(UsageError, match="other sequences"):
        answers.kept(path, "cd", lambda: b"")


@pytest.mark.sim
def test_the_digest_tells_seed_number_and_kernel() -> None:
    old, new = profiles.load("arm64-6.1"), profiles.load("arm64-6.12")
    made = [answers.digest(*given) for given in ((old, 1, 30, 2), (old, 2, 30, 2), (old, 1, 30, 3), (new, 1, 30, 2))]
    assert len({*made}) == 4 and answers.digest(old, 1, 30, 2) == made[0]
