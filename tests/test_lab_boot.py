"""How the kernel lab talks to its emulator: with programs in QEMU's place, and with QEMU where it can."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import __main__ as command_line
from tests.lab import boot, cache, kernels, tier, tools
from tests.lab.console import Console
from tests.lab.cpio import CpioWriter
from tests.lab.errors import LabError, TimeLimitError

# Enough for an interpreter to start on a busy machine; nothing waits for it to pass.
LONG_S = 60.0

# What stands in for QEMU: opens the channels as QEMU would, then does what a test says. The FIFO in LIFELINE
# stays open for as long as any process of it lives.
PREAMBLE = """\
import os, re, subprocess, sys, time
matches = [re.fullmatch(r"file,id=(\\w+),path=(.*)", word) for word in sys.argv]
ends = {match[1]: os.open(match[2], os.O_WRONLY) for match in matches if match}
if "LIFELINE" in os.environ:
    lifeline = os.open(os.environ["LIFELINE"], os.O_WRONLY)
    os.set_inheritable(lifeline, True)
def say(channel, data):
    os.write(ends[channel], data)
def hang():
    while True:
        time.sleep(3600)
"""


class Clock:
    """The lab's clock, which a test can move on when it has seen what it waits for."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def monotonic(self) -> float:
        """As time.monotonic, but ahead of it."""
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        """Let seconds pass at once."""
        self._ahead += seconds


class Emulator:
    """A program in QEMU's place, and the other end of its lifeline."""

    def __init__(self, folder: Path, script: str) -> None:
        self._program = folder / "emulator.py"
        self._program.write_text(PREAMBLE + script)
        self.lifeline = folder / "lifeline"
        os.mkfifo(self.lifeline)
        self._end = os.open(self.lifeline, os.O_RDONLY | os.O_NONBLOCK)

    @property
    def command(self) -> list[str]:
        """What to start."""
        return [sys.executable, str(self._program)]

    def run(self, *, time_limit_s: float = LONG_S, boot_limit_s: float = LONG_S,
            on_stdout: boot.Sink = boot.ignore, console_log: Path | None = None) -> boot.Result:  # fmt: skip
        """As the lab runs QEMU."""
        return boot.converse(self.command, time_limit_s=time_limit_s, boot_limit_s=boot_limit_s,
                             on_stdout=on_stdout, console_log=console_log)  # fmt: skip

    def sign_of_life(self) -> bytes:
        """What it writes to its lifeline, b"" when all its processes have ended; waits a minute at most."""
        readable, _, _ = select.select([self._end], [], [], LONG_S)
        assert readable, "the emulator is neither gone nor says anything"
        return os.read(self._end, 1)

    def gone(self) -> bool:
        """Whether every process that it started has ended."""
        return self.sign_of_life() == b""

    def close(self) -> None:
        """Close the test's end of the lifeline."""
        os.close(self._end)


@pytest.fixture
def emulator(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Emulator]:
    """The emulator whose script is the test's parameter."""
    made = Emulator(tmp_path, request.param)
    monkeypatch.setenv("LIFELINE", str(made.lifeline))
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the lab sees."""
    made = Clock()
    monkeypatch.setattr(boot, "time", made)
    return made


def acts(script: str) -> pytest.MarkDecorator:
    """Have the emulator do this."""
    return pytest.mark.parametrize("emulator", [pytest.param(script, id="emulator")], indirect=True)


def archive(tree: dict[str, bytes], path: Path) -> Path:
    """A file with a cpio archive, as the guest would send it."""
    with path.open("wb") as file:
        writer = CpioWriter(file)
        for name, data in tree.items():
            writer.file(name, data)
        writer.close()
    return path


class TestConverse:
    @acts("""
say("console", b"[    0.1] booting\\n")
say("result", b"begin\\n")
say("stdout", b"out 1\\n"); say("stderr", b"err\\n"); say("stdout", b"out 2\\n")
say("result", b"status 3\\n" + open(os.environ["FILES"], "rb").read() + b"end\\n" + b"\\n" * 256)
""")
    def test_a_command_that_ends(
        self, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        big = os.urandom(1 << 20)
        monkeypatch.setenv("FILES", str(archive({"./small": b"x", "big": big}, tmp_path / "files.cpio")))
        come: list[bytes] = []
        result = emulator.run(on_stdout=come.append)
        assert (result.status, result.stdout, result.stderr) == (3, b"out 1\nout 2\n", b"err\n")
        assert {str(file.name): file.data for file in result.files} == {"small": b"x", "big": big}
        assert b"".join(come) == result.stdout and result.console == "[    0.1] booting"
        assert 0 < result.boot_s <= result.total_s

    @acts("""say("console", b"EFI stub: booting\\n"); say("stdout", b"!"); hang()""")
    def test_a_kernel_that_does_not_boot(self, emulator: Emulator, clock: Clock) -> None:
        message = r"^the kernel did not boot in 40 s; raise --boot-limit .*\nconsole:\n  EFI stub: booting$"
        with pytest.raises(LabError, match=message) as caught:
            emulator.run(boot_limit_s=40, on_stdout=lambda data: clock.advance(41))
        assert caught.value.status == 125
        assert emulator.gone()

    @acts("""
say("result", b"begin\\n"); say("console", b"".join(b"line %d\\n" % n for n in range(100)))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], close_fds=False)
say("stdout", b"!")
hang()
""")
    def test_time_limit_ends_all_of_it(self, emulator: Emulator, clock: Clock) -> None:
        with pytest.raises(TimeLimitError) as caught:
            emulator.run(time_limit_s=50, boot_limit_s=40, on_stdout=lambda data: clock.advance(51))
        first, *rest = str(caught.value).splitlines()
        assert first == ("not done in 50 s; raise --time-limit if it is only slow; "
                         "no file that the command wrote comes back")
        assert rest == ["console:", *(f"  line {number}" for number in range(85, 100))]
        assert caught.value.status == 124
        assert emulator.gone()

    @acts("""say("console", b"[    0.1] booting\\n"); hang()""")
    @pytest.mark.parametrize(("log", "why"), [("/dev/full", "No space left"), ("/nonexist/x", "No such file"),
                                              ("/", "Is a directory")])
    def test_a_console_log_that_can_not_be_written(self, emulator: Emulator, log: str, why: str) -> None:
        with pytest.raises(LabError, match=rf"^--console {log}: {why}[^\n]*$"):
            emulator.run(time_limit_s=50, boot_limit_s=40, console_log=Path(log))

    @pytest.mark.parametrize("talk", [False, True])
    def test_the_kernel_talks_where_its_console_is_kept(self, talk: bool) -> None:
        arguments = boot.emulator_arguments(kernels.kernel("arm64", "6.12"), boot.Machine(), Path("k"), Path("i"), talk)
        assert ("quiet" in arguments[-1].split()) is not talk

    @pytest.mark.parametrize(
        ("emulator", "message"),
        [
            ("""say("console", b"lab: no port\\n")""",
             r"^the guest ended before the command ran: the guest's init said: no port\n"),
            ("""say("console", b"why\\n[ 1.0] Kernel panic - not syncing: VFS\\n[ 1.1] Call trace:\\n")""",
             r"^the guest ended before the command ran: Kernel panic - not syncing: VFS\n"
             r"console:\n  why\n[^\n]*VFS$"),
            ("""say("result", b"begin\\n"); say("console", b"[ 1.0] Internal error: Oops: 96000004\\n")""",
             r"^the guest ended while the command ran: the kernel broke: Internal error: Oops: 96000004\n"),
            ("""print("qemu: no such CPU", file=sys.stderr)""",
             r"^the guest ended before the command ran: qemu: no such CPU\nconsole: silent$"),
            ("", r"^the guest ended before the command ran: no reason given\nconsole: silent$"),
            ("""say("result", b"begin\\nstatus 0\\n0707")""", "^the guest ended while the command ran"),
            ("""say("result", b"begin\\nstatus 0\\nrubbish end\\n")""",
             "^the guest's archive of files is damaged"),
            ("""say("result", b"begin\\nstatus -1\\nend\\n")""", "^the guest ended while the command ran"),
        ],
        ids=["init", "panic", "oops", "qemu", "nothing", "cut off", "no archive", "no status"],
        indirect=["emulator"],
    )  # fmt: skip
    def test_early_ends(self, emulator: Emulator, message: str) -> None:
        with pytest.raises(LabError, match=message):
            emulator.run()
        assert emulator.gone()

    @acts("""
say("result", b"begin\\nstatus 0\\n")
while True:
    say("result", bytes(1 << 16))
""")
    def test_too_much_is_refused(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(boot, "FILES_LIMIT", 1 << 20)
        with pytest.raises(LabError, match="more than 1 MiB of files"):
            emulator.run()
        assert emulator.gone()

    def test_an_emulator_that_is_not_there(self, tmp_path: Path) -> None:
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(LabError, match=r"the guest ended before the command ran: .*not-there"):
            boot.converse([str(tmp_path / "not-there")], time_limit_s=LONG_S, boot_limit_s=LONG_S)
        assert len(os.listdir("/proc/self/fd")) == open_before

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    @acts("""os.write(lifeline, b"!"); hang()""")
    def test_nothing_is_left_when_the_caller_dies(self, emulator: Emulator, number: signal.Signals) -> None:
        call = f"boot.converse({emulator.command!r}, time_limit_s=3600, boot_limit_s=3600)"
        caller = subprocess.Popen([sys.executable, "-c", f"from tests.lab import boot\n{call}"],
                                  stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            assert emulator.sign_of_life() == b"!"
            caller.send_signal(number)
            caller.wait()
            assert emulator.gone()
        finally:
            caller.kill()


class TestConsole:
    def test_unprintable_is_escaped(self) -> None:
        console = Console()
        console.feed(b"\x1b[2Jhello\r\n\xff\n")
        assert console.last_lines() == "console:\n  \\x1b[2Jhello\n  \ufffd"

    def test_only_the_end_is_kept_but_the_log_has_all(self, tmp_path: Path) -> None:
        console = Console(tmp_path / "log")
        for _ in range(100):
            console.feed(b"x" * 1023 + b"\n")
        console.close()
        assert len(console.text) < 70_000
        assert (tmp_path / "log").stat().st_size == 102_400


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(cache.CACHE_ENV, str(tmp_path / "cache"))
        monkeypatch.setattr(tools, "missing", lambda programs: ())

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("run --arch arm64 --kernel 6.1", "no command; put it after --"),
            ("run --arch arm64 --kernel 6.1 --", "no command; put it after --"),
            ("run --arch arm64 -- true", "required: --kernel; see: python -m tests.lab run --help"),
            ("run --arch mips --kernel 6.1 -- true", "invalid choice: 'mips'"),
            ("run --arch arm64 --kernel 4.19 -- true", "no kernel 'arm64-4.19'; there are: arm64-5.10"),
            ("run --arch arm64 --kernel 6.1 --memory 0 -- true", "'0' is not a number above 0"),
            ("run --arch arm64 --kernel 6.1 -- true", "not fetched; run: python -m tests.lab fetch --a"),
            ("run --arch arm64 --kernel 6.1 --out /proc/none -- true", "--out /proc/none can't be written to: "),
            ("run --arch arm64 --kernel 6.1 --out /dev/null/x -- true", "--out /dev/null/x can't be written to: "),
            ("fetch --kernel 4.19", "no kernel fits '4.19'"),
            ("boot", "invalid choice: 'boot'"),
        ],
    )
    def test_misuse_is_one_line(self, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert command_line.main(words.split()) == 125
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lab: ") and message in line

    def test_list_of_an_empty_cache(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert command_line.main(["list", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["format"] == 1 and {row["status"] for row in shown["items"]} == {"not fetched"}
        assert command_line.main(["list"]) == 0
        assert capsys.readouterr().out.splitlines()[0].split() == ["kernel", "arm64-5.10", "not", "fetched"]


@pytest.mark.lab
class TestRealBoot:
    KERNEL = kernels.kernel("arm64", "6.12")
    SCRIPT = """
echo "out $1"; echo err >&2
[ -t 1 ] && echo "a terminal"
mkdir -p made && head -c 1048576 /dev/urandom > made/big && md5sum < made/big && ln -s big made/link
echo changed >> pyproject.toml
df /dev/shm /tmp /proc /sys > /dev/null && [ -c /dev/kvm ] && echo "$MIGSTREAM_LAB,$MIGSTREAM_LAB_FEATURES"
sleep 1000 &
exit 3
"""

    def test_all_that_a_guest_can_send(self) -> None:
        tier.need(self.KERNEL)
        machine = boot.Machine(features=("sve", "pmu"))
        command = ["sh", "-c", self.SCRIPT, "name", "it's 1 word"]
        result = boot.run(self.KERNEL, command, machine, time_limit_s=120)
        assert result.status == 3 and result.stderr == b"err\n"
        first, digest, where = result.stdout.decode().splitlines()
        assert first == "out it's 1 word" and where == "arm64-6.12,sve,pmu"
        content = {str(file.name): file.data for file in result.files}
        assert set(content) == {"made/big", "pyproject.toml"}
        assert hashlib.md5(content["made/big"]).hexdigest() == digest.split()[0]

    def test_time_limit(self) -> None:
        tier.need(self.KERNEL)
        with pytest.raises(TimeLimitError, match=r"^not done in 8 s"):
            boot.run(self.KERNEL, ["sleep", "1000"], time_limit_s=8)

    def test_nothing_is_lost_when_nobody_reads_for_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The guest has long switched off when this machine finds time again: what it sent must be out by then."""
        tier.need(self.KERNEL)
        take = boot._Guest.take_result
        waited: list[int] = []

        def busy(guest: boot._Guest, data: bytes) -> None:
            take(guest, data)
            if len(data) > len(b"begin\nstatus 0\n") and not waited:
                waited.append(len(data))
                time.sleep(5)

        monkeypatch.setattr(boot._Guest, "take_result", busy)
        result = boot.run(self.KERNEL, ["sh", "-c", "head -c 300000 /dev/zero > big"], time_limit_s=120)
        assert (result.status, [len(file.data) for file in result.files]) == (0, [300_000])

    def test_an_image_that_is_no_kernel(self, tmp_path: Path) -> None:
        tier.need(self.KERNEL)
        for name in ("vmlinuz", "initrd"):
            (tmp_path / name).write_bytes(b"\0" * 65536)
        files = (tmp_path / "vmlinuz", tmp_path / "initrd")
        arguments = boot.emulator_arguments(self.KERNEL, boot.Machine(), *files)
        with pytest.raises(LabError, match=r"^the kernel did not boot in 3 s.*\nconsole: silent$"):
            boot.converse(["qemu-system-aarch64", *arguments], time_limit_s=LONG_S, boot_limit_s=3)
