"""`python -m bench`: blackout, calibrate, check, codec, compare, lock, model, simulator, startup; see `--help`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from migstream import ending
from migstream.cli_host import Parser
from migstream.errors import MigstreamError, UsageError
from migstream.progress import progress

PROGRAM = "python -m bench"
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


def main(words: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status, as `migstream`'s command line does."""
    kept: list[str] = []

    def stopped(number: int) -> None:
        what = kept[0] if kept else "nothing was kept"
        print(f"bench: stopped by {signal.Signals(number).name}; {what}", file=sys.stderr)

    return ending.run("bench", lambda arguments: _run(arguments, kept), words, stopped)


def _run(arguments: list[str], kept: list[str]) -> int:
    """Run it; what an interrupted run has kept goes into `kept`, a line. Raises: MigstreamError, KeyboardInterrupt."""
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        raise UsageError("which benchmark? One of the commands above")
    options = parser.parse_args(arguments)
    module = _module(options.bench)
    try:
        with progress() as tell:
            result = module.run(options, tell)
    except KeyboardInterrupt as error:
        if isinstance(error, MigstreamError):  # it says itself what became of the work
            kept.append(str(error))
        raise
    complete = result.get("complete", True)
    if not complete:
        kept.append(f"what was measured until then is in {options.folder}")
    _print(module, options, result)
    return int(result.get("exit_status", 0 if complete else INTERRUPTED))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in BENCHES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="one JSON document on standard output")
        command.add_argument("--debug", action="store_true", help="show a traceback instead of the one-line error")
        _module(name).arguments(command)
    return parser


def _module(name: str) -> Any:
    return import_module(f"bench.{MODULES.get(name, name)}")


def _print(module: Any, options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.json:
        json.dump({"migstream_json": 1, "command": f"bench {options.bench}", **result}, sys.stdout, indent=1)
        print()
    else:
        module.print_result(result)
