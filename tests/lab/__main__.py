"""The lab's command line: `python -m tests.lab fetch | list | run`.

Exit status of `run`: the command's own; 124 when its time was over; 125 when the lab failed. Else: 0 or 125.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from tests.lab import boot, cache, fetch, files, kernels
from tests.lab.errors import LabError

LIST_FORMAT = 1
_INTERRUPTED = 130
_STATUS = ("exit status: the command's own; 124 when its time was over, and then no file of it comes back; "
           "125 when the lab failed")


class _Parser(argparse.ArgumentParser):
    """Reports misuse as a failure of the lab: 2 could be the command's own status."""

    def error(self, message: str) -> NoReturn:
        raise LabError(f"{message}; see: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    words, command = _split(sys.argv[1:] if arguments is None else list(arguments))
    try:
        options = _parser().parse_args(words)
        act: Callable[[argparse.Namespace, list[str]], int] = options.act
        return act(options, command)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more; the interpreter must not find that out a second time when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return LabError.status
    except OSError as error:
        print(f"lab: {error}", file=sys.stderr)
        return LabError.status


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The lab's own words, and the command after `--`."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _fetch(options: argparse.Namespace, command: list[str]) -> int:
    wanted = list(fetch.items(kernels.select(options.arch, options.kernel)))
    for title, manifest in fetch.fetch(wanted, jobs=options.jobs, refresh=options.refresh).items():
        print(f"{title:24} {manifest.version:18} {manifest.size / 1e6:5.0f} MB")
    return 0


def _list(options: argparse.Namespace, command: list[str]) -> int:
    rows = [_row(item) for item in fetch.items(kernels.KERNELS)]
    if options.json:
        print(json.dumps({"format": LIST_FORMAT, "cache": str(cache.cache_root()), "items": rows}, indent=1))
        return 0
    for row in rows:
        size = "" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:5.0f} MB"
        print(f"{row['title']:24} {row['status']:12} {row['version'] or '':18} {size}".rstrip())
    return 0


def _row(item: fetch.Item) -> dict[str, Any]:
    status, manifest = item.status(cache.cache_root())
    return {
        "title": item.title,
        "status": status.value,
        "version": manifest.version if manifest else None,
        "size_bytes": manifest.size if manifest else None,
        "packages": [{"name": o.name, "version": o.version} for o in manifest.origins] if manifest else [],
    }


def _run(options: argparse.Namespace, command: list[str]) -> int:
    if not command:
        raise LabError("no command; put it after --, as in: run --arch arm64 --kernel 6.1 -- uname -a")
    files.require_folder(options.out)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    features = tuple(name for name in options.features.split(",") if name)
    machine = boot.Machine(options.cpu, features, options.mode, options.memory, options.smp)
    result = boot.run(
        kernels.kernel(options.arch, options.kernel), command, machine,
        time_limit_s=options.time_limit, boot_limit_s=options.boot_limit, console_log=options.console,
        on_stdout=_writer(sys.stdout.buffer), on_stderr=_writer(sys.stderr.buffer),
    )  # fmt: skip
    files.save(result.files, options.out)
    if sys.stderr.isatty():
        times = f"booted in {result.boot_s:.1f} s, {result.total_s:.1f} s in all"
        print(f"lab: status {result.status}, {len(result.files)} files, {times}", file=sys.stderr)
    return result.status


def _writer(stream: BinaryIO) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that QEMU and the temporary folder go too."""
    raise SystemExit(128 + number)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0")
    return int(word)


def _parser() -> _Parser:
    parser = _Parser(prog="python -m tests.lab", description="Real KVM of Debian's kernels, in emulation.")
    actions = parser.add_subparsers(required=True, metavar="fetch | list | run")
    arch_names = [row.name for row in kernels.ARCHES]

    fetching = actions.add_parser("fetch", help="bring kernels and what they need into the cache")
    fetching.add_argument("--arch", choices=arch_names, help="only this architecture")
    fetching.add_argument("--kernel", metavar="VERSION", help="only this kernel, as in 6.1")
    fetching.add_argument("--jobs", type=_positive, default=2, metavar="N", help="items made at a time (2)")
    fetching.add_argument("--refresh", action="store_true", help="fetch anew what is there already")
    fetching.set_defaults(act=_fetch)

    listing = actions.add_parser("list", help="what there is, fetched or not, with exact versions and sizes")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(act=_list)

    _add_run(actions.add_parser("run", usage="%(prog)s --arch A --kernel K [options] -- COMMAND...",
                                epilog=_STATUS,
                                help="boot a kernel and run a command there"))  # fmt: skip
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    default = boot.Machine()
    feature_names = ", ".join(row.name for row in kernels.FEATURES)
    time_limit, boot_limit = int(boot.TIME_LIMIT_S), int(boot.BOOT_LIMIT_S)
    add = parser.add_argument
    add("--arch", required=True, choices=[row.name for row in kernels.ARCHES])
    add("--kernel", required=True, metavar="VERSION", help="as in 6.1")
    add("--cpu", default=default.cpu, metavar="MODEL", help="QEMU's CPU model (max)")
    add("--mode", choices=[row.name for row in kernels.MODES], help="arm64: how the host kernel runs (vhe)")
    add("--features", default="", metavar="A,B", help=f"arm64 CPU features: {feature_names}")
    add("--memory", type=_positive, default=default.memory_mib, metavar="MIB", help="guest memory (1024)")
    add("--smp", type=_positive, default=default.cpus, metavar="N", help="guest CPUs (1)")
    add("--time-limit", type=_positive, default=time_limit, metavar="S", help="for all of it (600)")
    add("--boot-limit", type=_positive, default=boot_limit, metavar="S", help="until ready (120)")
    add("--out", type=Path, default=Path(), metavar="DIR", help="where files from the guest go (here)")
    add("--console", type=Path, metavar="FILE", help="write all that the kernel says to a file")
    parser.set_defaults(act=_run)


if __name__ == "__main__":
    sys.exit(main())
