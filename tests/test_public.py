"""The public interface and the house rules that a program can check."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import migstream
from migstream import native
from migstream.errors import EXIT_STATUS, MigstreamError

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "Arch", "BackendError", "BackendUnavailable", "DoesNotFit", "Machine", "MemoryRegion", "MigstreamError",
    "OpaqueState", "Report", "RestoreFailed", "Restorer", "StreamError", "StreamReader", "UsageError", "__version__",
    "capture_prologue", "make_plan", "open_backend", "restore", "save", "verify",
}


def test_public_names_are_frozen() -> None:
    assert set(migstream.__all__) == PUBLIC
    assert len(migstream.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_object_is_documented(name: str) -> None:
    thing = getattr(migstream, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = [m for n, m in vars(thing).items() if not n.startswith("_") and inspect.isfunction(m)]
        assert [m.__qualname__ for m in methods if not inspect.getdoc(m)] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        migstream.frobnicate  # noqa: B018 - to ask for it is the test


_SILENCED = re.compile(r"# noqa|# type: ignore")
_WITH_REASON = re.compile(r"# noqa: [A-Z0-9, ]+ - \w|# type: ignore\[[\w, -]+\]  # \w")


def test_every_silenced_check_has_its_reason() -> None:
    """As `# type: ignore[arg-type]  # why`, `# noqa: B027 - why`."""
    bare = [f"{path.relative_to(ROOT)}:{number}" for folder in ("migstream", "tests", "bench")
            for path in sorted((ROOT / folder).rglob("*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if _SILENCED.search(line) and "re.compile" not in line and not _WITH_REASON.search(line)]
    assert bare == []


def _errors(of: type[MigstreamError]) -> set[type[MigstreamError]]:
    return {of}.union(*(_errors(sub) for sub in of.__subclasses__()))


def test_every_error_has_a_listed_exit_status() -> None:
    assert {error.exit_status for error in _errors(MigstreamError)} <= EXIT_STATUS.keys()


def test_the_readme_lists_every_exit_status() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [s for s in EXIT_STATUS if f"| {s} |" not in readme] == []


HEAVY = ("numpy", "construct", "rich", "zstandard", "msgpack")


def test_the_version_costs_no_heavy_import() -> None:
    code = ("import sys; from migstream.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
            f"print([m for m in {HEAVY!r} if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [f"migstream {migstream.__version__} ({native.DESCRIPTION})", "[]"]


def _modules() -> list[Path]:
    return sorted((ROOT / "migstream").rglob("*.py")) + sorted((ROOT / "bench").rglob("*.py"))


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_is_over_500_lines_and_each_has_a_head(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(text))


def test_the_median_function_is_short() -> None:
    lengths = []
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lengths.append(sum(n.end_lineno - n.lineno + 1 for n in body if n.end_lineno is not None))
    assert statistics.median(lengths) < 10


def _readme_example() -> str:
    return (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.sim
def test_the_readme_example_runs_in_the_simulator(tmp_path: Path) -> None:
    code = _readme_example().replace('"auto"', '"sim"')
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "guest.mig").stat().st_size > 1000


@pytest.mark.kvm
def test_the_readme_example_runs_on_real_kvm(tmp_path: Path) -> None:
    code = _readme_example().replace('"auto"', '"kvm"')
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "KVM_CLOCK" in result.stdout
