"""The compiled part, if it was built: `compiled` is the module or None, and everything works either way.

The build makes it where it finds a compiler and Python's headers (`build.py`). `MIGSTREAM_PURE=1` in the environment
leaves it out, so that the same tests run on both paths.
"""

from __future__ import annotations

import os
from types import ModuleType

VERSION = 6
"""What a compiled part must say of itself; one from another build is left out."""


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("MIGSTREAM_PURE", "") not in ("", "0"):
        return None, "pure Python: MIGSTREAM_PURE is set"
    try:
        from migstream.native import _native
    except ImportError:
        return None, "pure Python"
    if _native.VERSION != VERSION:
        return None, "pure Python: the compiled part is of another build; install again"
    return _native, "compiled batch"


compiled, DESCRIPTION = _load()
"""The module or None; the words that `migstream --version` shows."""
