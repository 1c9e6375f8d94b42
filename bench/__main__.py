"""`python -m bench codec|startup [--rounds N] [--backend NAME] [--json]`."""

from __future__ import annotations

import argparse
import json
import sys

from bench import codec, startup
from migstream.errors import MigstreamError
from migstream.progress import progress

BENCHES = {"codec": (codec, 31), "startup": (startup, 21)}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--rounds", type=int, help="interleaved rounds")
    parser.add_argument("--backend", default="auto", help="where the guest is saved: auto, kvm, sim")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    module, rounds = BENCHES[options.bench]
    try:
        with progress() as tell:
            result = module.measure(options.rounds or rounds, options.backend, tell)
    except MigstreamError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_status
    if options.json:
        json.dump({"migstream_json": 1, "command": f"bench {options.bench}", **result}, sys.stdout, indent=1)
    else:
        module.print_result(result)
    return 0


sys.exit(main())
