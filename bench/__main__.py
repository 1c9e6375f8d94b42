"""The entry, `python -m bench`: as `python -m migstream`'s, it answers signals before anything else is imported."""

import sys

from migstream.__main__ import begin


def main(words: list[str] | None = None) -> int:
    """Run one benchmark and return the exit status."""
    if words is None:
        begin()
    from bench import commands

    return commands.main(words)


if __name__ == "__main__":
    sys.exit(main())
