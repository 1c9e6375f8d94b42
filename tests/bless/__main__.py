"""`python -m tests.bless [--force]`: write formats/ from the code, all but SPEC.md.

What was released only grows: a file that would lose or change what it says is left alone and named, unless `--force`.
"""

from __future__ import annotations

import argparse
import sys

from tests.bless.files import FORMATS, write


def main(argv: list[str] | None = None) -> int:
    """Write; 1 where a file was refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.bless", description=__doc__.split("\n")[0])
    parser.add_argument("--force", action="store_true", help="change released files too")
    written, refused = write(force=parser.parse_args(argv).force)
    for path in written:
        print(f"wrote {FORMATS.name}/{path}")
    for path in refused:
        print(f"released, not changed: {FORMATS.name}/{path} (--force changes it)", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
