"""The demo as a command: both halves, and the one screen that shows what happened."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migstream import show
from migstream.backends import open_backend
from migstream.backends.base import MEASURED, MODELLED, Backend
from migstream.contract import Contract
from migstream.demo import run
from migstream.errors import BackendUnavailable
from migstream.model import Arch, Machine, Phase
from migstream.transport import check_host, open_output, verify
from migstream.transport.streams import Source


@dataclass(frozen=True)
class DemoResult:
    """Both halves of the demo.

    Attributes:
        backend: where it ran; fallback: why not on real KVM, "" where it did or was not asked to.
        saved: the first half. replayed: what the restoring process said, its JSON.
    """

    backend: str
    fallback: str
    output: str | None
    machine: Machine
    saved: run.Saved
    replayed: dict[str, Any]

    @property
    def memory(self) -> int:
        """Bytes of guest RAM."""
        return sum(region.size for region in self.machine.memory)

    def document(self) -> dict[str, Any]:
        """The result for machines."""
        return {"backend": self.backend, "fallback": self.fallback, "file": self.output,
                "vcpus": self.machine.vcpus, "memory": self.memory,
                "save": show.report_json(self.saved.report), "replay": self.replayed,
                "time": show.time_json(self.saved.report), "blackout_ns": self.blackout_ns(),
                "pinned": self.saved.pinned,
                "steps_at_save": self.saved.steps, "steps_after": self.replayed["run"]["steps_after"]}

    def blackout_writes(self) -> dict[str, dict[str, int]]:
        """The restore's register writes after the prologue, by phase and scope."""
        late = {phase.name.lower() for phase in Phase if not phase.prologue} | {"update"}
        return {name: row for name, row in self.replayed["writes"].items() if name in late}

    def blackout_ns(self) -> int:
        """From pause to running again, without the file between: both halves' phases after the prologue, ns."""
        late = {*self.blackout_writes(), "ram", "decode"}
        times: dict[str, int] = self.replayed["times_ns"]
        restored = (ns for name, ns in times.items() if name.split(" ")[0] in late)
        return sum(ns for name, ns in self.saved.report.times.items() if name != "prologue") + sum(restored)

    def print(self) -> None:
        """The result for people, on one screen."""
        save, counters = self.saved.report, self.replayed["run"]
        machine = f"{show.count(self.machine.vcpus, 'vCPU')}, {show.size(self.memory)} RAM on {self.backend}"
        pairs = [("demo", f"{machine}: saved mid-run, restored in another process, "
                          "every counter went on without a gap")]
        if self.fallback:
            pairs.append(("", f"not on real KVM: {self.fallback}"))
        parts = (f"{what} {show.size(raw)} as {show.size(save.stored_bytes[what])} "
                 f"({raw / save.stored_bytes[what]:.1f}:1)" for what, raw in save.raw_bytes.items())
        if save_pinned := self.saved.pinned:
            pairs.append(("contract", f"{save_pinned} registers written or found as it says before the first run, and "
                                      "read back"))
        place = f", in {self.output}" if self.output else ""
        pairs.append(("stream", f"{show.size(save.bytes)}: {', '.join(parts)}{place}"))
        time = show.time_json(save)
        pairs += [("save", show.times(save.times, time)), ("restore", show.times(self.replayed["times_ns"], time)),
                  ("blackout", f"{show.times({'': self.blackout_ns()}, time)}: {_BLACKOUT[time['kind']]}")]
        show.print_pairs([*pairs, *show.time_pairs(time)])
        columns = ("restored in phase", ">VM-scoped writes", ">vCPU-scoped writes", "when")
        show.print_table(show.Table(columns, self._rows()))
        show.print_table(show.Table(("vCPU", ">steps at save", ">restored at", ">later"), self._counters(counters)))
        back = self.replayed["readback"]
        lost = sum(not d["reason"] for d in back["differs"])
        show.print_pairs([("readback", f"{back['compared']} values compared; {len(back['differs'])} registers differ, "
                                       f"{len(back['differs']) - lost} of them for a known reason")])

    def _rows(self) -> list[tuple[str, str, str, str]]:
        late = self.blackout_writes()
        return [(name, str(row["vm"]), str(row["vcpu"]), "in the blackout" if name in late else "before the pause")
                for name, row in self.replayed["writes"].items()]

    def _counters(self, counters: dict[str, Any]) -> list[tuple[str, ...]]:
        rows = [(str(k), *map(str, steps)) for k, steps in
                enumerate(zip(self.saved.steps, counters["steps_before"], counters["steps_after"], strict=True))]
        return rows if len(rows) <= 6 else [*rows[:3], (f"… {len(rows) - 5} more", "", "", ""), *rows[-2:]]


_BLACKOUT = {
    MEASURED: "all of the save after its prologue, and the restore's RAM, state, interrupts and clock",
    MODELLED: "registers read after the prologue, and state, interrupts and clock written",
}
"""What is in the blackout's time, by what the time is."""


def demo(backend_name: str, wanted: Callable[[Arch], Machine], output: str | None, seconds: float, level: int,
         threads: int, tell: Callable[[str], None], contract: Contract | None = None) -> DemoResult:
    """Run the demo; see `migstream demo --help`. Raises: MigstreamError and below; DemoFailed for a counter.

    The restoring process is given a file of this demo's own: another may be writing to the same `output`.
    """
    backend, fallback = _open(backend_name)
    if contract:
        check_host(contract, backend)
    machine = wanted(backend.arch)
    with tempfile.TemporaryDirectory(prefix="migstream-") as folder:
        path = os.path.join(folder, "demo.mig")
        with open_output(path, _check) as out:
            saved = run.run_and_save(backend, machine, out, level=level, threads=threads, progress=tell,
                                     contract=contract)
        if output is not None:
            with open(path, "rb") as source, open_output(output) as kept:
                shutil.copyfileobj(source, kept)
        tell("restoring in another process")
        replayed = run.replay_elsewhere(path, backend.name, seconds, threads)
    run.compare(saved.steps, replayed)
    return DemoResult(backend.name, fallback, output, machine, saved, replayed)


def _open(name: str) -> tuple[Backend, str]:
    """`auto`, and why it is not real KVM."""
    if name != "auto":
        return open_backend(name), ""
    try:
        return open_backend("kvm"), ""
    except BackendUnavailable as error:
        return open_backend("sim"), str(error)


def _check(source: Source) -> None:
    """Read the stream back before it gets its name."""
    from migstream.reader import StreamReader

    verify(source, StreamReader())
