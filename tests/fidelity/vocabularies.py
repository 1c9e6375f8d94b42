"""The vocabularies there are, by architecture. Each module is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from migstream.errors import UsageError
from migstream.model import Arch
from tests.fidelity.calls import Vocabulary

VOCABULARIES = {Arch.X86_64: "tests.fidelity.x86_64", Arch.ARM64: "tests.fidelity.arm64"}
"""Architecture to the module whose `VOCABULARY` it is."""


def vocabulary(arch: Arch) -> Vocabulary:
    """The vocabulary of an architecture. Raises: UsageError where there is none."""
    if arch not in VOCABULARIES:
        raise UsageError(f"no fidelity vocabulary for {arch.label} yet")
    return cast(Vocabulary, import_module(VOCABULARIES[arch]).VOCABULARY)
