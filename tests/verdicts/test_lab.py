"""`check` against real kernels: a small share of what `python -m tests.verdicts` does, always the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import kernels, tier
from tests.verdicts import __main__ as verdicts
from tests.verdicts import lab

PAIRS = {"arm64": ("5.10", "7.2"), "x86_64": ("6.1", "7.2")}
"""The oldest and the newest: the most differs between them."""

FORGED, SEED = 3, "3"


@pytest.mark.lab
@pytest.mark.parametrize("arch", PAIRS)
def test_what_check_says_is_what_the_kernels_answer(arch: str, tmp_path: Path) -> None:
    named = [kernels.kernel(arch, version) for version in PAIRS[arch]]
    for kernel in named:
        tier.need(kernel)
    baseline = verdicts.baseline_of(named) if arch == "arm64" else ""
    want = lab.Wanted(tuple(named), verdicts.SETS[arch], SEED, FORGED, tmp_path, baseline)
    again = f"--arch {arch} --kernels {','.join(PAIRS[arch])} --seed {want.seed} --forged {FORGED}"
    assert verdicts.run(want) == 0, f"again: python -m tests.verdicts {again}"
