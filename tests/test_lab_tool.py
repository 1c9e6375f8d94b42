"""The kernel lab's parts that need neither network nor QEMU: sources, packages, cache, archives, files."""

from __future__ import annotations

import hashlib
import io
import marshal
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab import apt, cache, cpio, fetch, files, image, kernels, layers, project, sources, tier, tools
from tests.lab.errors import LabError
from tests.lab.files import GuestFile

ARM64 = kernels.arch("arm64")
KERNEL = kernels.kernel("arm64", "6.1")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv(cache.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv("MIGSTREAM_LAB", raising=False)
    monkeypatch.delenv(tier.REQUIRED_ENV, raising=False)
    return tmp_path / "cache"


class TestSources:
    ONE_LINE = """\
# deb http://commented.example.invalid/debian bookworm main
deb-src http://source.example.invalid/debian bookworm main
deb [arch=amd64 signed-by=/some/key.gpg] http://one.example.invalid/debian bookworm main contrib # why
deb http://short.example.invalid/debian
"""
    DEB822 = """\
Types: deb deb-src
# a comment inside a stanza
URIs: http://first.example.invalid/debian
 http://second.example.invalid/debian
Suites: trixie trixie-updates
Components: main
 contrib

Types: deb
URIs: http://off.example.invalid/debian
Suites: trixie
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example.invalid/debian
Suites: trixie
Components: main
"""

    def test_one_line_format(self) -> None:
        (row,) = sources.one_line(self.ONE_LINE)
        assert row == sources.Source("http://one.example.invalid/debian", "bookworm", ("main", "contrib"))

    def test_deb822_format(self) -> None:
        rows = list(sources.deb822(self.DEB822))
        assert [(row.uri.split("//")[1].split(".")[0], row.suite) for row in rows] == [
            ("first", "trixie"), ("first", "trixie-updates"),
            ("second", "trixie"), ("second", "trixie-updates"),
        ]  # fmt: skip
        assert {row.components for row in rows} == {("main", "contrib")}

    @pytest.mark.parametrize(
        ("name", "text"),
        [("main.list", ONE_LINE), ("debian.sources", DEB822.replace("first", "one"))],
    )
    def test_mirror_from_either_format(
        self, name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(sources.MIRROR_ENV, raising=False)
        (tmp_path / "sources.list.d").mkdir()
        (tmp_path / "sources.list.d" / name).write_text(text)
        assert sources.mirror(tmp_path) == "http://one.example.invalid/debian"

    @pytest.mark.parametrize("suite", ["bookworm-security", "bookworm-updates", "nodistro", "jammy"])
    def test_other_archives_are_no_mirror(
        self, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(sources.MIRROR_ENV, raising=False)
        (tmp_path / "sources.list").write_text(f"deb http://other.example.invalid/x {suite} main\n")
        with pytest.raises(LabError, match=r"no Debian mirror .* set MIGSTREAM_LAB_MIRROR"):
            sources.mirror(tmp_path)

    def test_environment_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(sources.MIRROR_ENV, "http://mine.example.invalid/debian")
        (tmp_path / "sources.list").write_text(self.ONE_LINE)
        assert sources.mirror(tmp_path) == "http://mine.example.invalid/debian"


class TestKernels:
    def test_the_seven(self) -> None:
        names = [kernel.name for kernel in kernels.KERNELS]
        assert len(names) == len(set(names)) == 7

    @pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
    def test_rows_refer_to_rows(self, kernel: kernels.Kernel) -> None:
        assert kernels.arch(kernel.arch).emulator in tools.PACKAGES
        assert kernels.suite(kernel.suite).reason and kernel.reason
        for mode in kernel.modes:
            kernels.mode_arguments(kernel, mode)

    def test_features_become_cpu_properties(self) -> None:
        # QEMU takes the last of two values.
        named = kernels.cpu_argument(ARM64, "max", ("sve", "qarma5"))
        assert named == "max,pauth-impdef=on,sve=on,pauth-impdef=off"
        assert kernels.cpu_argument(ARM64, "cortex-a72", ()) == "cortex-a72"

    def test_unknown_names_list_the_known(self) -> None:
        with pytest.raises(LabError, match="no feature of arm64 'svee'; there are: sve, pmu"):
            kernels.cpu_argument(ARM64, "max", ("svee",))
        with pytest.raises(LabError, match=r"no kernel 'arm64-4\.19'; there are: arm64-5\.10"):
            kernels.kernel("arm64", "4.19")
        with pytest.raises(LabError, match=r"no kernel fits 'x86_64-5\.10'"):
            kernels.select("x86_64", "5.10")

    def test_a_mode_that_a_kernel_lacks(self) -> None:
        assert kernels.mode_arguments(KERNEL, "nvhe") == "kvm-arm.mode=nvhe"
        with pytest.raises(LabError, match=r"arm64-5\.10 has no mode 'nvhe'.*cortex-a72"):
            kernels.mode_arguments(kernels.kernel("arm64", "5.10"), "nvhe")


class TestApt:
    PACKAGE = apt.Package("linux", "1", "", 3, hashlib.sha256(b"abc").hexdigest())
    OTHER = apt.Package("other", "1", "", 0, hashlib.sha256(b"").hexdigest())

    @pytest.fixture
    def client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> apt.Apt:
        key = tmp_path / "key.gpg"
        key.touch()
        monkeypatch.setattr(apt, "KEYRING", key)
        monkeypatch.setenv(sources.MIRROR_ENV, "http://mirror.example.invalid/debian")
        monkeypatch.setattr(tools, "output", lambda *a, **k: 'Acquire::http::Proxy "p";\nAPT::Other "x";\n')
        return apt.Apt(ARM64, kernels.suite("sid"), tmp_path / "home")

    def test_private_state(self, client: apt.Apt, tmp_path: Path) -> None:
        home = tmp_path / "home"
        line = (home / "sources.list").read_text()
        assert line.startswith(f"deb [signed-by={apt.KEYRING} check-valid-until=no] http://mirror.example.invalid")
        settings = (home / "apt.conf").read_text()
        assert 'Acquire::http::Proxy "p";' in settings and "APT::Other" not in settings
        folders = [row.split('"')[1] for row in settings.splitlines() if row.startswith("Dir::")]
        assert all(not folder or folder.startswith(str(home)) for folder in folders)

    def test_signatures_are_asked_of_every_suite(self) -> None:
        for suite in kernels.SUITES:
            line = apt.source_line("http://mirror.example.invalid/debian", suite)
            assert "signed-by=" in line and "trusted" not in line
            assert ("check-valid-until=no" in line) == (suite.name == "sid")

    def test_interrupted_download_goes_on(
        self, client: apt.Apt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def apt_get(command: list[str], *, cwd: Path, env: dict[str, str]) -> str:
            asked.append(command[-1])
            (cwd / "half.deb").write_bytes(b"ab" if command[-1] == "other=1" else b"abc")
            if len(asked) == 2:
                raise KeyboardInterrupt
            (cwd / "half.deb").write_bytes(b"" if command[-1] == "other=1" else b"abc")
            return ""

        monkeypatch.setattr(tools, "output", apt_get)
        with pytest.raises(KeyboardInterrupt):
            client.download([self.PACKAGE, self.OTHER], tmp_path)
        assert [path.name for path in tmp_path.glob("*.deb")] == [f"{self.PACKAGE.sha256}.deb"]
        come = client.download([self.PACKAGE, self.OTHER], tmp_path)
        assert [path.read_bytes() for path in come] == [b"abc", b""]
        assert asked == ["linux=1", "other=1", "other=1"]

    def test_wrong_checksum(self, client: apt.Apt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def apt_get(command: list[str], *, cwd: Path, env: dict[str, str]) -> str:
            (cwd / "package.deb").write_bytes(b"something else")
            return ""

        monkeypatch.setattr(tools, "output", apt_get)
        with pytest.raises(LabError, match="linux came with a wrong checksum"):
            client.download([self.PACKAGE], tmp_path)
        assert not list(tmp_path.glob("*.deb"))

    def test_offline(self, client: apt.Apt, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*arguments: object, **keywords: object) -> str:
            raise LabError("apt-get failed: E: Failed to fetch")

        monkeypatch.setattr(tools, "output", offline)
        with pytest.raises(LabError, match=r"^no package index of Debian sid: .*check the network.*$"):
            client.update()


class TestTools:
    def test_the_telling_line_is_shown(self) -> None:
        assert tools.complaint("W: first\nE: the reason\nE: more\n") == "E: the reason"
        assert tools.complaint("one\ntwo\n\n") == "two"
        assert tools.complaint("") == "no message"

    def test_missing_programs_name_their_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(LabError, match=r"run: apt-get install qemu-system-arm apt$"):
            tools.require(["qemu-system-aarch64", "apt-get", "apt-cache"])


class TestCache:
    ORIGIN = cache.Origin("package", "1.2-3", 4, "00")

    @pytest.fixture
    def item(self, tmp_path: Path) -> Path:
        made = tmp_path / "made"
        (made / "modules").mkdir(parents=True)
        (made / "vmlinuz").write_bytes(b"kernel")
        (made / "modules" / "kvm.ko").write_bytes(b"module")
        cache.seal(made, "title", "key", "1.2-3", (self.ORIGIN,))
        cache.install(made, tmp_path / "items" / "item")
        return tmp_path / "items" / "item"

    def test_what_was_sealed_is_read_back(self, item: Path) -> None:
        manifest = cache.checked(item)
        assert manifest and manifest.origins == (self.ORIGIN,) and manifest.size == 12
        assert set(manifest.files) == {"vmlinuz", "modules/kvm.ko"}
        assert cache.checked(item.parent / "other") is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda item: (item / "vmlinuz").write_bytes(b"kerneL"),
            lambda item: (item / "vmlinuz").write_bytes(b"kern"),
            lambda item: (item / "modules" / "kvm.ko").unlink(),
            lambda item: (item / cache.MANIFEST).write_text("{"),
            lambda item: (item / cache.MANIFEST).write_text('{"format": 99}'),
            lambda item: (item / cache.MANIFEST).write_text("[]"),
        ],
        ids=["changed", "truncated", "missing", "half a manifest", "other format", "no manifest at all"],
    )
    def test_damage_is_seen_before_use(self, damage: Callable[[Path], object], item: Path) -> None:
        damage(item)
        with pytest.raises(LabError, match=r"^item.*run: python -m tests\.lab fetch$"):
            cache.checked(item)

    def test_one_fetch_at_a_time(self, tmp_path: Path) -> None:
        busy = pytest.raises(LabError, match="another fetch")
        with cache.only_fetch(tmp_path), busy, cache.only_fetch(tmp_path):
            pass
        with cache.only_fetch(tmp_path):
            pass

    def test_folder_that_can_not_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(LabError, match=r"cannot write the cache .*set MIGSTREAM_LAB_CACHE"), \
                cache.only_fetch(tmp_path / "file"):  # fmt: skip
            pass


class TestFetch:
    @staticmethod
    def item(name: str, calls: list[str], *, fails: bool = False, key: str = "key") -> fetch.Item:
        def make(work: Path, out: Path) -> fetch.Made:
            calls.append(name)
            (out / "half").write_bytes(b"data")
            if fails:
                raise LabError(f"{name}: the network is gone")
            return fetch.Made("1", ())

        return fetch.Item(name, f"items/{name}", key, make)

    def test_goes_on_after_a_failure(self, cache_folder: Path) -> None:
        calls: list[str] = []
        with pytest.raises(LabError, match="b: the network is gone"):
            fetch.fetch([self.item("a", calls), self.item("b", calls, fails=True)], jobs=1)
        assert self.item("a", calls).status(cache_folder)[0] is fetch.Status.READY
        assert self.item("b", calls).status(cache_folder)[0] is fetch.Status.MISSING
        made = fetch.fetch([self.item("a", calls), self.item("b", calls)], jobs=1)
        assert calls == ["a", "b", "b"] and list(made) == ["a", "b"]
        assert not (cache_folder / "partial").exists()

    def test_makes_again_what_is_damaged_outdated_or_asked_for(self, cache_folder: Path) -> None:
        calls: list[str] = []
        fetch.fetch([self.item("a", calls)])
        (cache_folder / "items" / "a" / "half").write_bytes(b"DATA")
        assert self.item("a", calls).status(cache_folder)[0] is fetch.Status.DAMAGED
        fetch.fetch([self.item("a", calls)])
        assert self.item("a", calls, key="new").status(cache_folder)[0] is fetch.Status.OUTDATED
        fetch.fetch([self.item("a", calls, key="new")])
        fetch.fetch([self.item("a", calls, key="new")])
        fetch.fetch([self.item("a", calls, key="new")], refresh=True)
        assert len(calls) == 4

    def test_kernel_packages_follow_the_meta_package(self) -> None:
        index = {
            "linux-image-arm64": apt.Package("meta", "7.2.1-1", "base, linux-image-7.2.1+x (= 1)", 0, ""),
            "linux-binary-7.2.1+x": apt.Package("linux-binary-7.2.1+x", "7.2.1-1", "", 0, ""),
        }
        found = fetch.kernel_packages(kernels.kernel("arm64", "7.2"), ARM64, index.__getitem__)
        assert [package.name for package in found] == ["linux-binary-7.2.1+x"]
        with pytest.raises(LabError, match=r"arm64-6\.1: Debian bookworm has Linux 7\.2\.1-1 now"):
            fetch.kernel_packages(KERNEL, ARM64, index.__getitem__)

    def test_every_kernel_needs_kernel_base_and_wheels(self) -> None:
        titles = [item.title for item in fetch.items(kernels.KERNELS)]
        assert len(titles) == len(set(titles)) == 7 + 2 + 2

    def test_packages_are_unpacked(self, tmp_path: Path) -> None:
        # Busybox has a dpkg-deb too, which can't build.
        if tools.missing(["dpkg-deb"]) or "MIGSTREAM_LAB" in os.environ:
            pytest.skip("no dpkg-deb that builds packages; run: apt-get install dpkg")
        tree = tmp_path / "tree"
        (tree / "boot").mkdir(parents=True)
        (tree / "boot" / "vmlinuz-6.1.0-1").write_bytes(b"kernel")
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN" / "control").write_text(
            "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.invalid>\nDescription: d\n"
        )
        subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "p.deb"], check=True, capture_output=True)
        content = {member.name: file.read() for member, file in layers.members(tmp_path / "p.deb") if file}
        assert content == {"boot/vmlinuz-6.1.0-1": b"kernel"}
        (tmp_path / "bad.deb").write_bytes((tmp_path / "p.deb").read_bytes()[:-40])
        with pytest.raises(LabError, match="can't be unpacked"):
            list(layers.members(tmp_path / "bad.deb"))


class TestProject:
    def test_requirements_and_test_tools(self, tmp_path: Path) -> None:
        (tmp_path / "pyproject.toml").write_text(
            '[project]\nname = "m"\nversion = "1"\ndependencies = ["numpy>=2"]\n'
            'scripts = {m = "m.cli:main"}\n'
            '[project.optional-dependencies]\ntest = ["pytest-benchmark==1", "pytest>=8", "ruff"]\n'
        )
        assert project.read(tmp_path) == project.Project(
            "m", "1", ("numpy>=2", "pytest>=8", "hypothesis"), {"m": "m.cli:main"}
        )

    def test_without_or_with_a_broken_pyproject(self, tmp_path: Path) -> None:
        assert "construct" in project.read(tmp_path).requirements
        (tmp_path / "pyproject.toml").write_text("[project")
        with pytest.raises(LabError, match=r"pyproject\.toml is not valid"):
            project.read(tmp_path)

    def test_files_of_this_checkout(self) -> None:
        names = [name for name, _ in project.files()]
        assert "lab/project/tests/lab/guest/smoke_kvm.py" in names
        assert not [name for name in names if "__pycache__" in name or "/." in name]


class TestCpio:
    NAMES = st.text("abc/", min_size=1, max_size=12).filter(lambda name: "//" not in f"/{name}/")

    @given(st.dictionaries(NAMES, st.binary(max_size=9), max_size=4).filter(
        lambda tree: not any(a != b and f"{a}/".startswith(f"{b}/") for a in tree for b in tree)
    ))  # fmt: skip
    def test_what_is_written_is_read(self, tree: dict[str, bytes]) -> None:
        entries = list(cpio.read(archive(tree)))
        assert {e.name: e.data for e in entries if stat.S_ISREG(e.mode)} == tree
        folders = [entry.name for entry in entries if stat.S_ISDIR(entry.mode)]
        assert len(folders) == len(set(folders))

    @given(st.data())
    def test_no_part_of_an_archive_is_an_archive(self, data: st.DataObject) -> None:
        whole = archive({"a/b": b"content", "c": b""})
        end = whole.index(b"TRAILER!!!")
        cut = whole[: data.draw(st.integers(0, end))]
        with pytest.raises(ValueError):
            list(cpio.read(cut))

    def test_no_part_of_an_entry_is_an_entry(self) -> None:
        whole = archive({"a": b"content"})
        with pytest.raises(ValueError, match="entry at byte 0 is truncated"):
            next(cpio.read(whole[: whole.index(b"content") + 3]))


class TestFiles:
    @pytest.mark.parametrize("name", [
        "/etc/passwd", "..", "a/../../b", "a//b", "", "a/", "./", ".", "a/./b", "\x1b[2J", "a\nb", "a\0b",
        "x" * 256,
    ])  # fmt: skip
    def test_unsafe_names(self, name: str) -> None:
        with pytest.raises(LabError, match="unsafe name"):
            files.safe_name(name)

    def test_safe_names(self) -> None:
        assert files.safe_name("./a/b c.json") == PurePosixPath("a/b c.json")

    def test_only_plain_files(self) -> None:
        out = io.BytesIO()
        writer = cpio.CpioWriter(out)
        writer.symlink("link", "/etc/passwd")
        writer.close()
        with pytest.raises(LabError, match="'link', which is no plain file; nothing was written"):
            files.unpack(out.getvalue())

    def test_damaged_archive(self) -> None:
        with pytest.raises(LabError, match="damaged"):
            files.unpack(archive({"a": b"b"})[:60])

    def test_a_name_that_is_no_utf8_comes_out_as_it_went_in(self, tmp_path: Path) -> None:
        name = os.fsdecode(b"caf\xe9")
        out = io.BytesIO()
        writer = cpio.CpioWriter(out)
        writer.file(name, b"x")
        writer.close()
        files.save(files.unpack(out.getvalue()), tmp_path)
        assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9"]

    @pytest.mark.parametrize("wrong", ["b", "sub/c", "new/d/e"])
    def test_all_files_are_written_or_none(self, wrong: str, tmp_path: Path) -> None:
        """A folder where a file goes, a file where a folder goes, a file that is a folder, too."""
        (tmp_path / "b").mkdir()
        (tmp_path / "sub").write_bytes(b"mine")
        sent = [GuestFile(PurePosixPath(name), b"x") for name in ("a", wrong, "z", *(["new/d"] * ("new" in wrong)))]
        with pytest.raises(LabError, match=r"is in the way; nothing was written; .*--out"):
            files.save(sent, tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "sub"]
        assert (tmp_path / "sub").read_bytes() == b"mine"

    def test_files_have_the_mode_of_any_other(self, tmp_path: Path) -> None:
        files.save([GuestFile(PurePosixPath("a/b"), b"x")], tmp_path / "new")
        (tmp_path / "plain").write_bytes(b"")
        assert (tmp_path / "new/a/b").stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]

    def test_a_link_out_of_the_folder_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(LabError, match="a link leads out of"):
            files.save([GuestFile(PurePosixPath("link/file"), b"x")], tmp_path / "out")
        assert not list((tmp_path / "outside").iterdir())

    def test_a_linked_file_is_replaced_and_not_written_through(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_bytes(b"mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").symlink_to(tmp_path / "precious")
        files.save([GuestFile(PurePosixPath("file"), b"x")], tmp_path / "out")
        assert (tmp_path / "precious").read_bytes() == b"mine"
        assert (tmp_path / "out" / "file").read_bytes() == b"x"

    def test_a_folder_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").mkdir()
        with pytest.raises(LabError, match=r"file can't be written: .*--out"):
            files.save([GuestFile(PurePosixPath("file"), b"x")], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestImage:
    @given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
    def test_every_word_of_a_command_arrives(self, words: list[str]) -> None:
        script = image.command_script(["printf", "%s\\0", *words], {"A": "it's; $HOME"})
        shell, printf = shutil.which("sh"), shutil.which("printf")
        assert shell and printf
        # Whatever a word turns into if it is not quoted well: there it can call nothing and hit no file.
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(printf, f"{folder}/printf")
            out = subprocess.run([shell, "-c", script], capture_output=True, check=True, cwd=folder,
                                 env={"PATH": folder}).stdout  # fmt: skip
        assert out.decode().split("\0")[:-1] == words

    def test_the_top_layer(self, tmp_path: Path) -> None:
        for name in KERNEL.modules:
            (tmp_path / f"{name}.ko").write_text(name)
        out = io.BytesIO()
        image.write_top(out, KERNEL, tmp_path, ["true"], {})
        entries = {entry.name: entry for entry in cpio.read(out.getvalue())}
        loaded = sorted(name for name in entries if name.startswith("lab/modules/"))
        assert [entries[name].data.decode() for name in loaded] == list(KERNEL.modules)
        assert entries["init"].mode & 0o111 and b"exec true" in entries["lab/command"].data

    def test_what_is_missing_and_how_to_get_it(self, cache_folder: Path) -> None:
        with pytest.raises(LabError, match=r"run: python -m tests\.lab fetch --arch arm64 --kernel 6\.1$"):
            image.ready(KERNEL)

    def test_bytecode_runs(self) -> None:
        made = dict(layers.compiled("x/module.py", b"value = 6 * 7\n"))
        # Only the guest's own Python version compiles for it.
        expected = {"x/__pycache__/module.cpython-311.pyc"} if sys.version_info[:2] == (3, 11) else set()
        assert set(made) == expected
        for bytecode in made.values():
            scope: dict[str, int] = {}
            exec(marshal.loads(bytecode[16:]), scope)
            assert scope["value"] == 42
        assert not list(layers.compiled("x/template.py", b"{{ not python }"))
        assert not list(layers.compiled("x/data.txt", b""))


class TestTier:
    def test_reason_names_the_command(self, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tools, "missing", lambda programs: ())
        assert tier.unavailable(KERNEL) == "the lab's kernels are not fetched; run: python -m tests.lab fetch"
        with pytest.raises(pytest.skip.Exception):
            tier.need(KERNEL)

    def test_required_fails(self, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(tier.REQUIRED_ENV, "1")
        # A skip that comes instead must not skip this test.
        either = (pytest.fail.Exception, pytest.skip.Exception)
        with pytest.raises(either, match="MIGSTREAM_LAB_REQUIRED=1, but"):
            tier.need(KERNEL)


def archive(tree: dict[str, bytes]) -> bytes:
    """A cpio archive of files."""
    out = io.BytesIO()
    writer = cpio.CpioWriter(out)
    for name, data in tree.items():
        writer.file(name, data)
    writer.close()
    return out.getvalue()
