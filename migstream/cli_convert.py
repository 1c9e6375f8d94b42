"""`migstream convert`: a stream for another host, or for a reader of an older minor."""

from __future__ import annotations

import argparse
import os
from typing import BinaryIO

from migstream.cli_files import stream_only
from migstream.errors import UsageError


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    sub.add_argument("file", metavar="FILE", help="a stream; it is read twice, so not -")
    sub.add_argument("-o", dest="output", required=True, metavar="OUT", help="the new stream")
    sub.add_argument("--for-host", metavar="P", help="for this host: a captured file, or a name from `host list`")
    sub.add_argument("--format-minor", type=int, metavar="N", help="for readers of minor N")


def run(options: argparse.Namespace) -> int:
    """Convert; nothing has the new name unless the whole stream was written, read back and judged."""
    from migstream import show
    from migstream.cli_host import open_profile
    from migstream.errors import StreamError
    from migstream.survey import survey
    from migstream.transport import convert, open_output, open_source, plan_conversion

    if "-" in (options.file, options.output) or _is_read_once(options.file):
        raise UsageError("convert reads its input twice and checks its output before it has a name: name two files")
    if _is_same(options.file, options.output):
        raise UsageError(f"{options.output}: convert reads its input twice and keeps it: name another file with -o")
    if options.for_host is None and options.format_minor is None:
        raise UsageError("convert: --for-host or --format-minor says what for")
    host = open_profile(options.for_host) if options.for_host else None
    stream_only(options.file)
    with open_source(options.file) as source:
        seen = survey(source)
    if seen.error is not None:
        raise seen.error.in_file(options.file)
    contract = seen.contract()
    assert contract is not None
    try:
        wanted = plan_conversion(seen.reader, seen.banks, contract, host, options.format_minor)
        with open_source(options.file) as source, open_output(options.output, _check) as out:
            length = convert(source, out, seen.reader, wanted)
    except StreamError as error:
        raise error.in_file(options.file) from error.__cause__
    changes = [str(change) for change in wanted.changes]
    if options.json:
        show.print_json("convert", {"file": options.output, "bytes": length, "minor": wanted.minor, "changes": changes})
    else:
        stays = "" if (options.format_minor or 0) <= wanted.minor else ": nothing in it needs a newer one"
        show.print_pairs([("converted", f"{options.output}, {show.size(length)}, format 1.{wanted.minor}{stays}"),
                          *(("changed" if k == 0 else "", text) for k, text in enumerate(changes or ["nothing"]))])
    return 0


def _is_read_once(name: str) -> bool:
    """A pipe, a socket, a device."""
    return os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)


def _is_same(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _check(source: BinaryIO) -> None:
    """Read the new stream back before it gets its name."""
    from migstream.reader import StreamReader
    from migstream.transport import verify

    verify(source, StreamReader())
