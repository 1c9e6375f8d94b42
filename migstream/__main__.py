"""The program's entry: `migstream`, or `python -m migstream`. It answers signals before anything else is imported."""

import os
import signal
import sys


def main() -> int:
    """Run the command line."""
    begin()
    from migstream import cli

    return cli.main()


def begin() -> None:
    """Ctrl-C while a command line is being imported ends it at once: there is nothing to clean up yet."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))


if __name__ == "__main__":
    sys.exit(main())
