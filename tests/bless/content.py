"""What a stream holds, as JSON: the expected content of a vector."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from migstream.contract import Behaviour
from migstream.frames import Section
from migstream.model import HostSummary, Layout, Machine, MemoryRegion, OpaqueState, RamRun
from migstream.sections import EncodedBank, End, Item, RamLayout, RamPages, Skipped
from migstream.wire import stream as wire
from tests import build

Json = dict[str, Any]


def content(data: bytes) -> Json:
    """Preamble, every section's header and what it holds. Raises: StreamError."""
    read = build.decode(data)
    preamble = read.reader.preamble
    assert preamble is not None
    return {"preamble": {"major": preamble.major, "minor": preamble.minor, "arch": preamble.arch.label},
            "length": len(data), "sections": [_section(*found) for found in read.items]}


def text(value: Json) -> str:
    """JSON as it is stored: short lists of numbers and strings on one line."""
    return _lines(value, "") + "\n"


def _lines(value: Any, indent: str) -> str:
    flat = json.dumps(value, sort_keys=False)
    if len(flat) + len(indent) < 110 or not isinstance(value, dict | list):
        return flat
    inner, pairs = indent + " ", value.items() if isinstance(value, dict) else [(None, item) for item in value]
    rows = [inner + (f"{json.dumps(k)}: " if k is not None else "") + _lines(v, inner) for k, v in pairs]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(rows) + f"\n{indent}{closing}"


def _section(section: Section, item: Item) -> Json:
    header = {"offset": section.offset, "kind": section.kind, "version": section.version,
              "critical": section.critical, "codec": wire.CODECS[section.codec], "stored_length": len(section.stored),
              "raw_length": section.raw_length}
    return {**header, **_SHOW[type(item)](item)}


def _region(region: MemoryRegion) -> Json:
    return {"guest_address": f"{region.guest_address:#x}", "size": region.size}


def _machine(machine: Machine) -> Json:
    return {"arch": machine.arch.label, "vcpus": machine.vcpus, "devices": machine.devices,
            "memory": [_region(region) for region in machine.memory]}


def _behaviour(behaviour: Behaviour) -> Json:
    return {"found": behaviour.found, "unknown": list(behaviour.unknown),
            "behaves_as": {f"{id:#018x}": [value.hex(), behaviour.how.get(id, "")]
                           for id, value in behaviour.behaves_as.items()},
            "firmware": {f"{key:#018x}": f"{x0:#x}" for key, x0 in behaviour.firmware.items()}}


def _layout(layout: Layout) -> Json:
    return {"scope": layout.scope, "phase": layout.phase.name.lower(), "row_words": layout.row_words,
            "registers": [{"id": f"{s.id:#018x}", "size": s.size} for s in layout.slots]}


def _bank(encoded: EncodedBank) -> Json:
    bank = encoded.decode()
    section = encoded.section
    return {"layout": section.layout, "filter": wire.FILTERS[section.filter], "update": bank.update,
            "first_vcpu": bank.first_vcpu, "rows": bank.rows,
            "values": [[value.hex() for _, value in bank.items(row)] for row in _shown(bank.rows)]}


def _shown(rows: int) -> range:
    """All rows of a bank, or of a very long one the last four."""
    return range(rows if rows <= 64 else 0) or range(rows - 4, rows)


def _run(run: RamRun) -> Json:
    where = {"guest_address": f"{run.guest_address:#x}", "pages": run.pages}
    return {**where, "sha256": None if run.data is None else hashlib.sha256(run.data).hexdigest()}


_SHOW: dict[type, Any] = {
    Machine: _machine,
    HostSummary: asdict,
    Behaviour: _behaviour,
    Layout: _layout,
    EncodedBank: _bank,
    RamLayout: lambda item: {"regions": [_region(region) for region in item.regions]},
    RamPages: lambda item: {"runs": [_run(run) for run in item.runs]},
    OpaqueState: lambda item: {"name": item.name, "data": item.data.hex()},
    End: lambda item: {},
    Skipped: lambda item: {"skipped": True},
}
