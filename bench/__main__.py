"""`python -m bench codec|startup|calibrate|model [--rounds N] [--backend NAME] [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench import against, calibrate, codec, startup
from bench.model import load_calibration
from migstream.errors import MigstreamError
from migstream.progress import progress

BENCHES = {"codec": (codec, 31), "startup": (startup, 21), "calibrate": (calibrate, 11),
           "model": (against, 11)}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--rounds", type=int, help="interleaved rounds")
    parser.add_argument("--backend", default="auto", help="where the guest is saved: auto, kvm, sim")
    parser.add_argument("-o", dest="output", metavar="FILE", help="calibrate: write the calibration to FILE")
    parser.add_argument("--calibration", metavar="FILE", help="model: the calibration to check (bench/data's)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    module, rounds = BENCHES[options.bench]
    more: dict[str, Any] = {}
    try:
        if options.bench == "model":
            more["calibration"] = load_calibration(options.calibration)
        with progress() as tell:
            result = module.measure(options.rounds or rounds, options.backend, tell, **more)
        if options.output and options.bench == "calibrate":
            calibrate.write(result, options.output)
    except MigstreamError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_status
    if options.json:
        json.dump({"migstream_json": 1, "command": f"bench {options.bench}", **result}, sys.stdout, indent=1)
    else:
        module.print_result(result)
    return 0


sys.exit(main())
