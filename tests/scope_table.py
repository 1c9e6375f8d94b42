"""The README's table "Scope, measured", from the recorded profiles: `python -m tests.scope_table` prints it."""

from __future__ import annotations

from collections.abc import Iterator

from migstream.host import profiles
from migstream.host.scope_table import VCPUS, scope_rows

HEAD = ("| profile | vCPU features | VM-scoped | vCPU-scoped | fixed "
        f"| writes for {VCPUS} vCPUs, each register on each | of these after the pause, each at its scope |",
        "|---|---|---|---|---|---|---|")


def lines() -> Iterator[str]:
    """The table as Markdown."""
    yield from HEAD
    for name in profiles.names():
        for row in scope_rows(profiles.load(name)):
            cells = (f"`{name}`", row.features, *row.counts.values(), row.each_on_each, row.late)
            yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print("\n".join(lines()))
