"""`python -m bench`: blackout, calibrate, check, codec, compare, lock, model, simulator, startup; see `--help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from migstream.errors import MigstreamError
from migstream.progress import progress

BENCHES = {
    "blackout": "blackout against vCPU count, by strategy, beside C and QEMU",
    "calibrate": "what each ioctl costs on this machine, for modelled time",
    "check": "a stream of 512 vCPUs judged against 100 host profiles",
    "codec": "what it costs to turn registers into a bank and back",
    "compare": "two runs of blackout side by side",
    "lock": "one write for each vCPU by several threads, for real and in the model",
    "model": "the model against real KVM, point by point, with its error",
    "simulator": "how long the simulator itself takes to restore 512 and 4096 vCPUs",
    "startup": "how long a command takes from nothing",
}
MODULES = {"model": "against"}
"""Where a command's module has another name."""

INTERRUPTED = 130
"""The exit status of what Ctrl-C ended, as shells give it."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True, metavar="COMMAND")
    for name, text in BENCHES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="one JSON document on standard output")
        _module(name).arguments(command)
    return parser


def _module(name: str) -> Any:
    return import_module(f"bench.{MODULES.get(name, name)}")


def main(words: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status."""
    options = _parser().parse_args(words)
    module = _module(options.bench)
    try:
        with progress() as tell:
            result = module.run(options, tell)
    except MigstreamError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_status
    try:
        _print(module, options, result)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more; the interpreter must not find that out again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return int(result.get("exit_status", 0 if result.get("complete", True) else INTERRUPTED))


def _print(module: Any, options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.json:
        json.dump({"migstream_json": 1, "command": f"bench {options.bench}", **result}, sys.stdout, indent=1)
        print()
    else:
        module.print_result(result)


if __name__ == "__main__":
    sys.exit(main())
