"""The build hook: compiles `_native.c` and its headers where that can be done, else builds a wheel that is pure Python.

Used by hatchling alone (`[tool.hatch.build.hooks.custom]`); never imported by migstream. `CC` names another compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "_native.abi3.so"
_FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden")


class NativeHook(BuildHookInterface[Any]):  # type: ignore[misc,unused-ignore]  # hatchling is not installed here
    """Compile, and tell hatchling what came of it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable install gets the module beside its source, a wheel gets it as a file of its own."""
        here = Path(self.root) / "migstream" / "native"
        editable = version == "editable"
        out = here / NAME if editable else Path(tempfile.mkdtemp(prefix="migstream-")) / NAME
        if editable:
            out.unlink(missing_ok=True)
        if why := compile_module(here / "_native.c", out):
            self.app.display_warning(f"migstream: no compiled batch, pure Python it is: {why}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{_platform()}"
        if not editable:
            build_data["force_include"][str(out)] = f"migstream/native/{NAME}"


def compile_module(source: Path, out: Path) -> str:
    """Compile, and return "" or why that can't be done here."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc" if shutil.which("cc") else "gcc"]
    headers = sysconfig.get_path("include")
    if not shutil.which(compiler[0]):
        return f"no compiler {compiler[0]}"
    if not (Path(headers) / "Python.h").exists():
        return f"no Python.h in {headers}"
    made = subprocess.run([*compiler, *_FLAGS, f"-I{headers}", str(source), "-o", str(out)], capture_output=True,
                          text=True, check=False)
    return "" if made.returncode == 0 else f"{compiler[0]} failed: {(made.stderr.splitlines() or ['?'])[0]}"


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
