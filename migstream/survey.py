"""What is in a stream, without decoding register values: for `inspect` and `verify`."""

from __future__ import annotations

from dataclasses import dataclass, field

from migstream.contract import Contract
from migstream.errors import StreamError
from migstream.frames import Section
from migstream.model import Arch, Layout, OpaqueState, RamRun
from migstream.reader import StreamReader
from migstream.registers import vcpu_features
from migstream.sections import EncodedBank, End, Item, RamPages
from migstream.transport import Source, read_items


@dataclass(frozen=True, slots=True)
class SectionRow:
    """One section, or a run of RAM page sections, as the table shows it. Sizes in bytes, offset from the start."""

    number: int
    kind: str
    what: str
    offset: int
    stored: int
    raw: int
    sections: int = 1


@dataclass
class Survey:
    """Everything that a stream said, up to its end or to the first error.

    Attributes:
        error: what was wrong, None for a good stream. Its checksums are right up to there.
        picked: the section asked for by number, with its payload.
    """

    reader: StreamReader
    rows: list[SectionRow] = field(default_factory=list)
    banks: list[EncodedBank] = field(default_factory=list)
    opaque: list[OpaqueState] = field(default_factory=list)
    ram_data_pages: int = 0
    ram_zero_pages: int = 0
    error: StreamError | None = None
    picked: tuple[Section, Item] | None = None

    @property
    def length(self) -> int:
        """Bytes read."""
        return self.reader.frames.offset

    def bank_bytes(self) -> tuple[int, int]:
        """Register values: bytes as stored, bytes as id+value records (16 a register of 8 bytes), the plain way."""
        records = sum((slot.size + 8) * bank.rows for bank in self.banks for slot in bank.layout.slots)
        return sum(len(bank.section.stored) for bank in self.banks), records

    def contract(self) -> Contract | None:
        """What the guest was promised; None where the stream broke off before its machine. Raises: StreamError."""
        machine, host = self.reader.machine, self.reader.host
        if machine is None:
            return None
        features = machine.devices.get("vcpu_features", vcpu_features.DEFAULT) if machine.arch == Arch.ARM64 else 0
        return Contract.of(machine.arch, (bank.decode() for bank in self.banks if bank.layout.phase.prologue),
                           kernel=host.kernel if host else "", cpu=host.cpu if host else "",
                           vcpu_features=features if type(features) is int else 0, behaviour=self.reader.behaviour)


def survey(source: Source, pick: int | None = None) -> Survey:
    """Read a stream to its end and say what is in it. A broken stream gives what came before, and the error.

    Args:
        pick: number of a section to keep whole. Raises: OutputError.
    """
    seen = Survey(StreamReader())
    try:
        for section, item in read_items(source, seen.reader):
            _note(seen, section, item)
            if section.number == pick:
                seen.picked = section, item
    except StreamError as error:
        seen.error = error
    return seen


def _note(seen: Survey, section: Section, item: Item) -> None:
    if isinstance(item, EncodedBank):
        seen.banks.append(item)
    elif isinstance(item, OpaqueState):
        seen.opaque.append(item)
    elif isinstance(item, RamPages):
        _count_pages(seen, item.runs)
    row = SectionRow(section.number, section.kind.strip(), _what(item), section.offset, len(section.stored),
                     section.raw_length)
    last = seen.rows[-1] if seen.rows else None
    if last and isinstance(item, RamPages) and last.kind == row.kind:
        row = SectionRow(last.number, row.kind, row.what, last.offset, last.stored + row.stored, last.raw + row.raw,
                         last.sections + 1)
        seen.rows.pop()
    seen.rows.append(row)


def _count_pages(seen: Survey, runs: tuple[RamRun, ...]) -> None:
    for run in runs:
        if run.data is None:
            seen.ram_zero_pages += run.pages
        else:
            seen.ram_data_pages += run.pages


def _what(item: Item) -> str:
    if isinstance(item, Layout):
        return f"{item.title}: {len(item.slots)} registers, {item.row_words * 8} B a row"
    if isinstance(item, EncodedBank):
        rows = "" if item.layout.scope == "vm" else f", vCPU {item.first_vcpu}..{item.first_vcpu + item.rows - 1}"
        return f"{item.layout.title}{rows}{' (update)' if item.update else ''}"
    return _WHATS.get(type(item).__name__, "unknown, skipped")


_WHATS = {
    "Machine": "vCPUs, memory map, devices", "HostSummary": "where it was saved",
    "Behaviour": "contract: what the kernel behaved as", "RamLayout": "RAM ranges",
    "RamPages": "RAM pages", "OpaqueState": "a VMM's own device state", End.__name__: "counts and total checksum",
}
