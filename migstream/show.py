"""Rows for people and JSON. Knows no backend and no file: it is given results and a place to write."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from migstream.backends.base import MEASURED
from migstream.errors import DoesNotFit, MigstreamError, RestoreFailed, StreamError, printable
from migstream.model import Scope, Slot
from migstream.registers.catalogue import lookup
from migstream.report import Report

if TYPE_CHECKING:
    from migstream.describe import Shown
    from migstream.plan import Verdict
    from migstream.sections import EncodedBank
    from migstream.survey import Survey

JSON_VERSION = 1
"""Version of every `--json` document; a key is never renamed within one."""


def print_json(command: str, document: dict[str, Any], out: TextIO | None = None) -> None:
    """Write a result for machines: one object with `migstream_json` (the version) and `command`."""
    json.dump({"migstream_json": JSON_VERSION, "command": command, **document}, out or sys.stdout, indent=1)
    (out or sys.stdout).write("\n")


def size(count: int | float) -> str:
    """A number of bytes for people: `832 B`, `14.2 kB`, `64.0 MiB` (powers of 1024)."""
    for unit, step in (("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)):
        if count < step * 1024 or unit == "GiB":
            return f"{count:.0f} B" if step == 1 else f"{count / step:.1f} {unit}"
    return ""


def count(number: int, what: str) -> str:
    """`1 vCPU`, `4 vCPUs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def milliseconds(ns: int) -> str:
    """A time for people."""
    return f"{ns / 1e6:.2f} ms"


@dataclass(frozen=True)
class Table:
    """Rows for people. Columns that start with `>` are right-aligned."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def _print(table: Any, indent: int = 0, width: int | None = 10_000) -> None:
    """Write a rich table `width` columns wide at most (None: the terminal's). NO_COLOR is heeded by rich."""
    from rich.console import Console
    from rich.padding import Padding

    wide = Console(width=width, file=sys.stdout, highlight=False)
    with wide.capture() as capture:
        wide.print(Padding(table, (0, 0, 0, indent), expand=False))
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def print_table(table: Table, indent: int = 2) -> None:
    """Write a table to standard output; the head line is bold on a terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    out = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in table.columns:
        out.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    for row in table.rows:
        out.add_row(*(Text(printable(cell, 200)) for cell in row))
    _print(out, indent)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Write `name  value` lines; a list's later lines have no name. Long values wrap on a terminal, and only there."""
    from rich.table import Table as RichTable
    from rich.text import Text

    out = RichTable.grid(padding=(0, 2, 0, 0))
    for name, value in pairs:
        out.add_row(Text(name, style="bold", no_wrap=True), Text(printable(value, 600)))
    _print(out, width=None if sys.stdout.isatty() else 10_000)


# inspect


def survey_pairs(name: str, seen: Survey) -> list[tuple[str, str]]:
    """The head of the first screen."""
    reader, machine = seen.reader, seen.reader.machine
    pairs = [("stream", f"{name}, {size(seen.length)}")]
    if reader.preamble:
        version = f"{reader.preamble.major}.{reader.preamble.minor}"
        pairs.append(("format", f"migstream {version}, {reader.preamble.arch.label}"))
    if reader.host:
        pairs.append(("saved on", f"{reader.host.kernel}, {reader.host.cpu}, backend {reader.host.backend}"))
    if machine:
        ram = sum(region.size for region in machine.memory)
        devices = ", ".join(f"{k}={v:#x}" if type(v) is int else k for k, v in sorted(machine.devices.items()) if v)
        pairs.append(("machine", f"{count(machine.vcpus, 'vCPU')}, {size(ram)} RAM in "
                      f"{count(len(machine.memory), 'region')}; {devices or 'no devices'}"))
    stored, records = seen.bank_bytes()
    if stored:
        ratio = f"{records / stored:.1f}:1"
        pairs.append(("registers", f"{size(stored)} stored, {size(records)} as id+value records ({ratio})"))
    if seen.ram_data_pages or seen.ram_zero_pages:
        pairs.append(("RAM", f"{seen.ram_data_pages} data pages, {seen.ram_zero_pages} zero pages"))
    return [*pairs, *_totals(seen), *_remarks(seen)]


def _totals(seen: Survey) -> list[tuple[str, str]]:
    return [(f"{scope} scope", f"{row['registers']} registers, {row['values']} values")
            for scope, row in scope_totals(seen).items()]


def scope_totals(seen: Survey) -> dict[str, dict[str, int]]:
    """Registers and values (registers x vCPUs) by scope."""
    vcpus = seen.reader.machine.vcpus if seen.reader.machine else 0
    out = {}
    for scope, rows in ((Scope.VM, 1), (Scope.VCPU, vcpus)):
        registers = sum(len(layout.slots) for layout in seen.reader.layouts if layout.scope == scope)
        out[str(scope)] = {"registers": registers, "values": registers * rows}
    return out


def _remarks(seen: Survey) -> list[tuple[str, str]]:
    notes = list(seen.reader.host.notes) if seen.reader.host else []
    unknown = [slot for layout in seen.reader.layouts for slot in layout.slots if not lookup(slot.id).known]
    notes += [f"unknown to this version, kept: {lookup(slot.id).name}, {slot.size} bytes" for slot in unknown]
    notes += [f"unknown section {s.kind!r} version {s.version}, skipped" for s in seen.reader.skipped]
    return [("note" if k == 0 else "", note) for k, note in enumerate(notes)]


def section_table(seen: Survey) -> Table:
    """The section table; a section is only listed once its checksums were right."""
    rows = [(str(r.number) if r.sections == 1 else f"{r.number}+{r.sections - 1}", r.kind, r.what, str(r.offset),
             str(r.stored), str(r.raw), "good") for r in seen.rows]
    return Table((">#", "kind", "what", ">offset", ">stored", ">raw", "checksum"), rows)


def survey_json(seen: Survey) -> dict[str, Any]:
    """The first screen for machines."""
    reader = seen.reader
    stored, records = seen.bank_bytes()
    return {
        "format": None if reader.preamble is None else {"major": reader.preamble.major, "minor": reader.preamble.minor},
        "arch": None if reader.preamble is None else reader.preamble.arch.label,
        "host": None if reader.host is None else {"kernel": reader.host.kernel, "cpu": reader.host.cpu,
                                                  "backend": reader.host.backend, "notes": list(reader.host.notes)},
        "machine": None if reader.machine is None else {
            "vcpus": reader.machine.vcpus, "devices": reader.machine.devices,
            "memory": [[r.guest_address, r.size] for r in reader.machine.memory]},
        "sections": [{"number": r.number, "kind": r.kind, "what": r.what, "offset": r.offset, "stored": r.stored,
                      "raw": r.raw, "sections": r.sections} for r in seen.rows],
        "scopes": scope_totals(seen), "bank_bytes": {"stored": stored, "records": records},
        "ram_pages": {"data": seen.ram_data_pages, "zero": seen.ram_zero_pages},
        "skipped": [{"kind": s.kind, "version": s.version} for s in reader.skipped],
        "length": seen.length, "error": None if seen.error is None else error_json(seen.error),
    }


@dataclass(frozen=True)
class Group:
    """vCPUs (empty for the VM) that have one value of a register."""

    slot: Slot
    vcpus: tuple[int, ...]
    value: bytes

    @property
    def who(self) -> str:
        """`VM`, `vCPU 3`, `vCPUs 0-63`."""
        if not self.vcpus:
            return "VM"
        return f"vCPU{'s' if len(self.vcpus) > 1 else ''} {ranges(self.vcpus)}"


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for (0, 1, 2, 3, 7)."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def register_groups(banks: Iterable[EncodedBank], scope: Scope, vcpus: range, pattern: str) -> Iterator[Group]:
    """Values of the registers that match, equal ones together. Raises: Corrupt from decoding.

    `pattern` is matched, in any case, against the register's name and id and its fields' names.
    """
    values: dict[Slot, dict[bytes, list[int]]] = {}
    for encoded in banks:
        wanted = [(c, s) for c, s in enumerate(encoded.layout.slots) if matches(s, pattern)]
        if encoded.layout.scope != scope or not wanted:
            continue
        bank = encoded.decode()
        for row in range(bank.rows):
            if scope == Scope.VM or bank.first_vcpu + row in vcpus:
                for column, slot in wanted:
                    values.setdefault(slot, {}).setdefault(bank.raw(row, column), []).append(bank.first_vcpu + row)
    for slot, by_value in values.items():
        for value, who in by_value.items():
            yield Group(slot, () if scope == Scope.VM else tuple(who), value)


def matches(slot: Slot, pattern: str) -> bool:
    """True where a glob names the register, its id or one of its fields."""
    glob = pattern.lower()
    if fnmatch.fnmatchcase(lookup(slot.id).name.lower(), glob) or fnmatch.fnmatchcase(f"{slot.id:#018x}", glob):
        return True
    return any(_field_matches(shown, glob) for shown in _fields(slot, bytes(slot.size)))


def _fields(slot: Slot, value: bytes) -> list[Shown]:
    from migstream.describe import fields

    return fields(slot, value)


def _field_matches(shown: Shown, glob: str) -> bool:
    path = shown.path.lower()
    return fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path.rsplit(".", 1)[-1], glob)


def print_group(group: Group, pattern: str) -> None:
    """Write one register with its fields: all of them, or those that the pattern names."""
    row = lookup(group.slot.id)
    shown = [field for field in _fields(group.slot, group.value) if not field.filler]
    if not fnmatch.fnmatchcase(row.name.lower(), pattern.lower()):
        named = [field for field in shown if _field_matches(field, pattern.lower())]
        shown = named or shown
    head = f"{row.name}  {group.slot.id:#018x}  {group.who}"
    if len(shown) == 1 and not shown[0].path:
        print(f"{head}  {_value(shown[0])}")
        return
    print(head)
    for field in shown:
        print(f"    {field.path} = {_value(field)}")


def _value(field: Shown) -> str:
    if isinstance(field.value, bytes):
        return f"{len(field.value)} bytes, all zero" if not any(field.value) else field.value.hex()
    bits = f"  ({', '.join(field.bits)})" if field.bits else ""
    return f"{field.value:#x}{bits}"


def group_json(group: Group) -> dict[str, Any]:
    """One register's value for machines."""
    row = lookup(group.slot.id)
    shown = _fields(group.slot, group.value)
    fields = {f.path or "value": f.value.hex() if isinstance(f.value, bytes) else f.value for f in shown}
    return {"name": row.name, "id": f"{group.slot.id:#018x}", "size": group.slot.size, "vcpus": list(group.vcpus),
            "value": group.value.hex(), "fields": fields, "known": row.known,
            "bits": {f.path or "value": list(f.bits) for f in shown if f.bits}}


def hex_lines(data: bytes | memoryview, base: int = 0) -> Iterator[str]:
    """A hex dump: offset, 16 bytes, printable characters."""
    for start in range(0, len(data), 16):
        row = bytes(data[start:start + 16])
        text = "".join(chr(c) if 0x20 <= c < 0x7F else "." for c in row)
        yield f"{base + start:08x}  {row.hex(' ', 1):<47}  |{text}|"


# reports and errors


def time_json(report: Report) -> dict[str, str]:
    """What the times of a report are: `measured` here, or `modelled`, and from what."""
    return {"kind": report.stopwatch.kind, "what": report.stopwatch.what}


def time_pairs(time: dict[str, str]) -> list[tuple[str, str]]:
    """What people have to be told of the times above."""
    if time["kind"] == MEASURED:
        return []
    return [("", f"{time['kind']} time, {time['what']}; nothing was measured: it is not KVM's")]


def times(phases: dict[str, int], time: dict[str, str]) -> str:
    """Phases with their times, and what these are unless they were measured."""
    shown = ", ".join(f"{name} {milliseconds(ns)}".lstrip() for name, ns in phases.items())
    return shown if time["kind"] == MEASURED else f"{time['kind']} {shown}"


def report_json(report: Report) -> dict[str, Any]:
    """A save's or restore's report for machines. Times in ns, sizes in bytes."""
    return {
        "time": time_json(report), "times_ns": dict(report.times), "bytes": report.bytes, "raw_bytes": report.raw_bytes,
        "stored_bytes": report.stored_bytes,
        "writes": {phase: {str(scope): n for scope, n in row.items()} for phase, row in report.writes.items()},
        "verdicts": [{"register": v.name, "id": f"{v.slot.id:#018x}", "answer": v.answer.name.lower(),
                      "reason": v.reason, "policy": policy_json(v)} for v in report.verdicts],
        "refused": [{"register": lookup(no.register).name, "vcpu": no.vcpu, "operation": no.operation,
                     "errno": no.errno, "why_harmless": why} for no, why in report.refused],
        "readback": {"compared": report.readback, "differs": [
            {"register": lookup(d.register).name, "vcpus": list(d.vcpus), "reason": d.reason, "tolerated": d.tolerated}
            for d in report.differs]},
        "notes": list(report.notes),
    }


def policy_json(verdict: Verdict) -> dict[str, str] | None:
    """What a policy made of a verdict: its word, its reason, and the answer before; None where it did nothing."""
    by = verdict.overruled
    return None if by is None else {"verb": by.verb, "reason": by.reason, "was": by.was.name.lower()}


def writes_table(report: Report) -> Table:
    """Register writes by phase and scope, with the time of each phase."""
    rows = []
    for phase, row in report.writes.items():
        ns = sum(t for name, t in report.times.items() if name.split(" ")[0] == phase)
        rows.append((phase, str(row[Scope.VM]), str(row[Scope.VCPU]), milliseconds(ns) if ns else ""))
    title = ">time" if report.stopwatch.kind == MEASURED else f">{report.stopwatch.kind} time"
    return Table(("phase", ">VM-scoped", ">vCPU-scoped", title), rows)


def report_remarks(report: Report) -> list[tuple[str, str]]:
    """The plan's exceptions, refusals, differences and notes, one line each."""
    pairs = [("plan", str(verdict)) for verdict in report.verdicts]
    pairs += [("refused", f"{no}{'; harmless: ' + why if why else ''}") for no, why in report.refused]
    if report.readback:
        pairs.append(("readback", f"{report.readback} values compared, {len(report.differs)} registers differ"))
        pairs += [("differs", str(difference)) for difference in report.differs]
    return pairs + [("note", note) for note in report.notes]


def error_json(error: MigstreamError) -> dict[str, Any]:
    """An error for machines; `exit_status` is the process's."""
    out: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "exit_status": error.exit_status}
    if isinstance(error, StreamError):
        out |= {"offset": error.offset, "section": error.section, "field": error.field, "expected": error.expected,
                "found": error.found}
    if isinstance(error, DoesNotFit):
        out["reasons"] = error.reasons
    if isinstance(error, RestoreFailed) and isinstance(error.report, Report):
        out["report"] = report_json(error.report)
    return out


