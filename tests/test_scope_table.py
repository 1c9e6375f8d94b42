"""The README's counts of scopes are those of the recorded profiles; ids that no row names."""

from __future__ import annotations

from pathlib import Path

import pytest

from migstream.host import profiles
from migstream.host.attributes_arm64 import name as attribute_name
from migstream.registers.catalogue import lookup
from tests import scope_table

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_table_is_the_profiles() -> None:
    """`python -m tests.scope_table` prints what belongs there."""
    text = README.read_text("utf-8").splitlines()
    begin = text.index(scope_table.HEAD[0])
    end = next(number for number, line in enumerate(text[begin:], begin) if not line.startswith("|"))
    assert text[begin:end] == list(scope_table.lines())


@pytest.mark.parametrize("name", profiles.names())
def test_every_listed_id_has_a_row(name: str) -> None:
    """All that a kernel lists, with every feature on, and all that was read: 0 of them without a row."""
    profile = profiles.load(name)
    listed = {*profile.registers, *profile.with_all_features().registers, *profile.defaults,
              *profile.feature_defaults, *profile.refused, *profile.scopes}
    without = sorted(f"{id:#x}" for id in listed if not lookup(id).known)
    assert (without, len(listed) > 40) == ([], True)


@pytest.mark.parametrize("name", [name for name in profiles.names() if name.startswith("arm64")])
def test_every_device_attribute_has_a_row_or_a_name(name: str) -> None:
    """What has no row is no state (an order, an address that the machine section has): it has a name all the same."""
    attributes = profiles.load(name).attributes
    assert [id for id in attributes if attribute_name(id).startswith("0x")] == []
    assert sum(lookup(id).known for id in attributes) > 40
