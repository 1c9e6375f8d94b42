"""Lists of ioctls, run by a small C program that is compiled on the fly: no Python between two of them."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.program import CURE, LeftOut, compile_c
from migstream.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Longs = NDArray[np.int64]

SOURCE = Path(__file__).with_name("ioctls.c")


@cache
def library() -> Any:
    """The compiled `ioctls.c`. Raises: LeftOut where there is no C compiler, or it fails."""
    with tempfile.TemporaryDirectory(prefix="migstream-") as folder:
        out = compile_c(SOURCE, Path(folder) / "ioctls.so", "-shared", "-fPIC", "-pthread")
        try:
            loaded = ctypes.CDLL(str(out))
        except OSError as error:
            raise LeftOut(f"{SOURCE.name}: what the C compiler made can't be loaded; {CURE}") from error
    loaded.run.restype = ctypes.c_long
    loaded.run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p,
                           ctypes.c_void_p)
    return loaded


def run_parts(parts: Sequence[Longs], *, each: Longs | None = None) -> int:
    """Run lists of ioctls, one list a thread, each thread pinned to a CPU of its own; return ns from start to end.

    Args:
        parts: matrices of (fd, request, argument). The memory that arguments point to is the caller's.
        each: takes the ns of every ioctl, in the order of the parts; one long an ioctl.

    Raises: BackendError where an ioctl failed or there are fewer CPUs than parts.
    """
    import numpy as np

    cpus = sorted(os.sched_getaffinity(0))
    if len(parts) > len(cpus):
        raise BackendError("threads", what=f"{len(parts)} threads need as many CPUs; there are {len(cpus)}")
    ops = np.ascontiguousarray(np.concatenate(list(parts)), np.int64)
    first = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    failures = ctypes.c_long(0)
    where = np.array(cpus[:len(parts)], np.int32)
    ns = library().run(ops.ctypes.data, first.ctypes.data, where.ctypes.data, len(parts),
                       None if each is None else each.ctypes.data, ctypes.byref(failures))
    if ns < 0 or failures.value:
        raise BackendError("ioctls", what=f"{failures.value} of {len(ops)} ioctls failed" if ns >= 0 else "no threads")
    return int(ns)
