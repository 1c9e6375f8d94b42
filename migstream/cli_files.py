"""Small files of ours that commands are given: a contract, a policy. Read whole, within their limits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from migstream import filekind
from migstream.errors import DocumentError, DocumentLimit, OutputError, UsageError
from migstream.limits import MAX_PROFILE

if TYPE_CHECKING:
    from migstream.contract import Contract
    from migstream.verdicts.policy import Policy


def open_contract(name: str) -> Contract:
    """The contract in a file. Raises: OutputError, UsageError for another kind of file, DocumentError and below."""
    from migstream.contract import from_json
    from migstream.limits import MAX_CONTRACT

    return from_json(text_of(name, _read(name, MAX_CONTRACT + 1), "contract", MAX_CONTRACT), name)


def open_policy(name: str | None) -> Policy:
    """The policy in a TOML file; the one that overrules nothing for None. Raises: as `open_contract`."""
    from migstream.limits import MAX_POLICY
    from migstream.verdicts.policy import NO_POLICY, parse

    return NO_POLICY if name is None else parse(text_of(name, _read(name, MAX_POLICY + 1), "policy", MAX_POLICY), name)


def stream_only(name: str) -> None:
    """Raises: UsageError for a regular file that is of another kind of ours; OutputError where it can't be opened.

    What else is no stream its reader says.
    """
    from migstream.transport import open_source

    if not os.path.isfile(name):
        return
    with open_source(name) as file:
        head = file.read(_MAGIC_BYTES)
        if filekind.of_bytes(head) != _STREAM and (kind := filekind.of_bytes(head + file.read(MAX_PROFILE))):
            raise UsageError(f"{name}: not a stream{kind}")


_MAGIC_BYTES, _STREAM = 8, " (this is a stream)"


def _read(name: str, size: int) -> bytes:
    from migstream.transport import open_source

    with open_source(name) as file:
        try:
            return file.read(size)
        except OSError as error:
            raise OutputError(f"{name}: {error.strerror or error}") from error


def text_of(name: str, data: bytes, kind: str, limit: int) -> str:
    """The text of a file that should be of this kind.

    Raises: UsageError where it is of another kind of ours, DocumentLimit, DocumentError for no UTF-8.
    """
    if (found := filekind.of_bytes(data)) and found != f" (this is a {kind})":
        raise UsageError(f"{name}: not a {kind}{found}")
    if len(data) > limit:
        raise DocumentLimit(f"{name}: not a {kind}: over {limit} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{name}: not a {kind}: not UTF-8 text") from error
