"""What a file is that is not what was asked for: half a line for the error. Pure."""

from __future__ import annotations

import json
from typing import Any

from migstream.errors import DocumentError, DocumentTooNew, printable

_MAGIC = bytes.fromhex("894d4947")
"""How a stream begins (formats/SPEC.md, 2.1)."""

_JSON = {"migstream_host_profile": "a host profile", "migstream_contract": "a contract",
         "migstream_json": "the --json output of a command"}
_POLICY = "migstream_policy"


def check_version(name: str, kind: str, found: object, known: int) -> None:
    """Raises: DocumentTooNew, DocumentError for a version that is not the one that this migstream reads."""
    if type(found) is int and found == known:
        return
    newer = isinstance(found, int | float) and not isinstance(found, bool) and found > known
    shown = printable(repr(found))
    raise (DocumentTooNew if newer else DocumentError)(
        f"{name}: field 'migstream_{kind}': {kind} version {shown}; this migstream reads {known}")


def of_object(data: Any) -> str:
    """` (this is a contract)` for an object of ours read from JSON; "" for anything else."""
    found = [text for key, text in _JSON.items() if isinstance(data, dict) and key in data]
    return f" (this is {found[0]})" if found else ""


def of_bytes(data: bytes) -> str:
    """The same for a file's content; streams and policies are known, too."""
    if data.startswith(_MAGIC):
        return " (this is a stream)"
    text = data.decode("utf-8", "replace")
    if text.lstrip().startswith("{"):
        try:
            return of_object(json.loads(text))
        except (ValueError, RecursionError):
            return ""
    return " (this is a policy)" if _is_policy(text) else ""


def _is_policy(text: str) -> bool:
    """TOML with our key: a page about policies has it too."""
    import tomllib

    try:
        return _POLICY in tomllib.loads(text)
    except (ValueError, RecursionError):
        return False
