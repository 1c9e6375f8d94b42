"""Section payload <-> model: the one gate for errors, and the place where old versions are lifted.

Everything untyped ends here: no construct Container and no msgpack dict leaves this module unchecked. One table row
a kind says how its payload becomes a model object and back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack
from construct import Construct, ConstructError

from migstream import codec, limits
from migstream.bounds import bound, within
from migstream.contract import SECTION_FIELDS, Behaviour, behaviour_from_section, behaviour_to_section
from migstream.errors import Corrupt, LimitExceeded, StreamError, TooNew, UsageError, printable
from migstream.frames import Section, SmallBank, head_of
from migstream.model import (
    PAGE,
    Arch,
    Bank,
    HostSummary,
    Layout,
    Machine,
    MemoryRegion,
    OpaqueState,
    Phase,
    RamRun,
    Scope,
    Slot,
)
from migstream.packing import pack, typed_list, unpack
from migstream.registers import ids
from migstream.registers.catalogue import Register, lookup
from migstream.wire import stream as wire
from migstream.wire import structs
from migstream.wire.schema import Count

if TYPE_CHECKING:
    from migstream.model import Words

_T = TypeVar("_T")
_SCOPES = {1: Scope.VM, 2: Scope.VCPU}
_SCOPE_NUMBERS = {scope: number for number, scope in _SCOPES.items()}
_SLOT = struct.Struct("<QII")
_RUN = struct.Struct("<QQII")


@dataclass(frozen=True)
class RamLayout:
    """Which guest-physical ranges the stream carries; a VMM may carry others itself."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True)
class EncodedBank:
    """A bank whose values are still encoded: its checksum was right, its matrix is within the limits."""

    layout: Layout
    section: Section

    @property
    def first_vcpu(self) -> int:
        """Index of the vCPU of row 0."""
        return self.section.first_vcpu

    @property
    def rows(self) -> int:
        """vCPUs covered; 1 for the VM."""
        return self.section.vcpu_count if self.layout.scope == Scope.VCPU else 1

    @property
    def update(self) -> bool:
        """True for VM registers sent again because they had changed by the pause."""
        return bool(self.section.flags & wire.UPDATE)

    def decode(self, out: Words | None = None) -> Bank:
        """Return the values, in `out` (rows x words, C-contiguous) where one is given and the filter allows it.

        Raises: Corrupt, LimitExceeded, with this section's place.
        """
        return gate(self.section, lambda: self._decode(out))

    def _decode(self, out: Words | None) -> Bank:
        raw = codec.decompress(self.section.codec, bytes(self.section.stored), self.section.raw_length)
        values = codec.unfilter_bank(raw, self.section.filter, self.rows, self.layout.row_words, out)
        check_bank(self.layout, values)
        return Bank(self.layout, self.first_vcpu, values, self.update)


@dataclass(frozen=True)
class RamPages:
    """Runs of guest pages, ascending; their data are views of one buffer that they keep alive."""

    runs: tuple[RamRun, ...]


@dataclass(frozen=True)
class End:
    """The end section; its counts have been checked."""


@dataclass(frozen=True)
class Skipped:
    """An ancillary section of a kind or version that this reader doesn't know; to be reported."""

    kind: str
    version: int


Item = Machine | HostSummary | Behaviour | Layout | EncodedBank | RamLayout | RamPages | OpaqueState | End | Skipped


def gate(section: Section, step: Callable[[], _T]) -> _T:
    """Run `step`; whatever a payload makes it raise comes out as one of our errors, with the section's place."""
    try:
        return step()
    except StreamError as error:
        raise error.at(section.offset, section.title) from error.__cause__
    except ConstructError as error:
        field = str(getattr(error, "path", "") or "").removeprefix("(parsing) -> ").strip()
        raise Corrupt("payload does not match its layout", field=field).at(section.offset, section.title) from error
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise Corrupt(f"payload: {printable(error)}").at(section.offset, section.title) from error


def _encode_machine(machine: Machine) -> bytes:
    return pack({"arch": int(machine.arch), "vcpus": machine.vcpus, "devices": machine.devices,
                  "memory": [[r.guest_address, r.size] for r in machine.memory]})


def _decode_machine(raw: bytes, _: Section) -> Machine:
    fields = unpack(raw, {"arch": int, "vcpus": int, "devices": dict, "memory": list})
    if fields["arch"] not in list(Arch):
        raise TooNew("unknown architecture", field="arch", found=fields["arch"])
    if not 1 <= fields["vcpus"] <= limits.MAX_VCPUS:
        raise LimitExceeded("vCPU count", field="vcpus", expected=f"1..{limits.MAX_VCPUS}", found=fields["vcpus"])
    for name, value in fields["devices"].items():
        if type(name) is not str or type(value) not in (bool, int, str):
            raise Corrupt("wrong type", field=f"devices.{name}", found=type(value).__name__)
    pairs = [typed_list(pair, int, "memory") for pair in typed_list(fields["memory"], list, "memory")]
    return Machine(Arch(fields["arch"]), fields["vcpus"], _regions(pairs), fields["devices"])


def _regions(pairs: list[Any]) -> tuple[MemoryRegion, ...]:
    if len(pairs) > limits.MAX_REGIONS:
        raise LimitExceeded("memory regions", field="memory", expected=f"<= {limits.MAX_REGIONS}", found=len(pairs))
    end = 0
    for pair in pairs:
        if len(pair) != 2 or pair[0] % PAGE or pair[1] % PAGE or pair[1] <= 0 or pair[0] < end:
            raise Corrupt("memory regions must be ascending, apart and whole pages", field="memory", found=pair)
        end = pair[0] + pair[1]
    if end > limits.MAX_ADDRESS:
        raise LimitExceeded("guest-physical address", field="memory", expected=f"<= {limits.MAX_ADDRESS:#x}",
                            found=hex(end))
    return tuple(MemoryRegion(*pair) for pair in pairs)


def _encode_host(host: HostSummary) -> bytes:
    return pack({"kernel": host.kernel, "cpu": host.cpu, "backend": host.backend, "notes": list(host.notes)})


def _decode_host(raw: bytes, _: Section) -> HostSummary:
    fields = unpack(raw, {"kernel": str, "cpu": str, "backend": str, "notes": list})
    return HostSummary(fields["kernel"], fields["cpu"], fields["backend"],
                       tuple(typed_list(fields["notes"], str, "notes")))


def _encode_contract(behaviour: Behaviour) -> bytes:
    return pack(behaviour_to_section(behaviour))


def _decode_contract(raw: bytes, _: Section) -> Behaviour:
    return behaviour_from_section(unpack(raw, SECTION_FIELDS))


def _encode_opaque(state: OpaqueState) -> bytes:
    return pack({"name": state.name, "data": state.data})


def _decode_opaque(raw: bytes, _: Section) -> OpaqueState:
    fields = unpack(raw, {"name": str, "data": bytes}, limits.MAX_RAW)
    return OpaqueState(fields["name"], fields["data"])


# Register layouts and banks.


def _encode_layout(layout: Layout) -> bytes:
    head = wire.LAYOUT_HEAD.build({"phase": layout.phase, "count": len(layout.slots)})
    return bytes(head) + b"".join(_SLOT.pack(slot.id, slot.size, 0) for slot in layout.slots)


def _decode_layout(raw: bytes, section: Section) -> Layout:
    head = wire.LAYOUT_HEAD.parse(raw)
    if head.count > limits.MAX_SLOTS:
        raise LimitExceeded("columns", field="count", expected=f"<= {limits.MAX_SLOTS}", found=head.count)
    body = _body(raw, wire.LAYOUT_HEAD, head.count, _SLOT.size)
    if section.scope not in _SCOPES or head.phase not in list(Phase) or not head.count:
        raise Corrupt("no such scope or phase, or no column", found=f"scope {section.scope}, phase {head.phase}, "
                      f"count {head.count}")
    layout = Layout(_SCOPES[section.scope], Phase(head.phase), tuple(_slots(body)))
    if len(layout.index) != len(layout.slots):
        raise Corrupt("duplicate register id", field="id")
    if layout.row_words * 8 > limits.MAX_ROW:
        raise LimitExceeded("row too long", expected=f"<= {limits.MAX_ROW} bytes", found=layout.row_words * 8)
    return layout.shared


def _body(raw: bytes, head: Construct[Any, Any], count: int, each: int) -> memoryview:
    expected = head.sizeof() + count * each
    if len(raw) != expected:
        raise Corrupt("payload length differs from its count", field="count", expected=f"{expected} bytes",
                      found=len(raw))
    return memoryview(raw)[head.sizeof():]


def _slots(body: memoryview) -> Iterable[Slot]:
    for id, size, reserved in _SLOT.iter_unpack(body):
        if reserved or not 0 < size <= limits.MAX_ROW:
            raise Corrupt("size or reserved bytes", field=f"{id:#018x}", found=f"size {size}, reserved {reserved:#x}")
        stated = ids.size_in_id(id)
        if stated is not None and stated != size:
            raise Corrupt("size differs from the one in the id", field=f"{id:#018x}", expected=stated, found=size)
        yield Slot(id, size)


def check_bank(layout: Layout, values: Words) -> None:
    """Refuse a bank by both checks below; only a bad one is looked at column by column.

    Raises: Corrupt.
    """
    if not within(values, _bounds(layout)):
        check_padding(layout, values)
        check_values(layout, values)


@lru_cache(maxsize=limits.MAX_LAYOUTS)
def _bounds(layout: Layout) -> bytes:
    """What `check_padding` and `check_values` ask."""
    asked = [bound(layout.offsets[column + 1] - 1, 0, shift=8 * used) for column, used in layout.partial]
    for row, slot, word in _checked(layout):
        if row.selector is not None:
            asked.append(bound(word, row.selector, mask=0xFFFF_FFFF))
        if row.struct in structs.COUNTS:
            count, minimum = structs.COUNTS[row.struct], structs.STRUCTS[row.struct].minimum
            most = _capacity(count, slot.size, minimum)
            asked.append(bound(word, 0, most, shift=count.offset * 8, mask=0xFFFF_FFFF))
    return b"".join(asked)


def check_padding(layout: Layout, values: Words) -> None:
    """Refuse a bank whose bytes past a register's size are not zero. Raises: Corrupt."""
    for column, used in layout.partial:
        last = layout.offsets[column + 1] - 1
        if (values[:, last] >> (8 * used)).any():
            raise Corrupt("bytes past the register's size are not zero", field=f"{layout.slots[column].id:#018x}")


def check_values(layout: Layout, values: Words) -> None:
    """Refuse what would lead a kernel astray: a count beyond its register, a number that names another register.

    Raises: Corrupt.
    """
    for row, slot, word in _checked(layout):
        first = values[:, word]
        if row.selector is not None and (first & 0xFFFF_FFFF != row.selector).any():
            raise Corrupt("value names another register", field=row.name, expected=row.selector,
                          found=int(first[0]) & 0xFFFF_FFFF)
        if row.struct in structs.COUNTS:
            _check_count(row.name, structs.COUNTS[row.struct], slot.size, structs.STRUCTS[row.struct].minimum, first)


@lru_cache(maxsize=limits.MAX_LAYOUTS)
def _checked(layout: Layout) -> tuple[tuple[Register, Slot, int], ...]:
    """The columns whose values can lead a kernel astray: row, slot, first word."""
    found = ((lookup(slot.id), slot, layout.offsets[column]) for column, slot in layout.ours)
    return tuple((row, slot, word) for row, slot, word in found
                 if row.selector is not None or row.struct in structs.COUNTS)


def _check_count(name: str, count: Count, size: int, minimum: int, first: Any) -> None:
    """The counts stand in the first word of their structs."""
    capacity = _capacity(count, size, minimum)
    found = first >> (count.offset * 8) & 0xFFFF_FFFF
    if (found > capacity).any():
        raise Corrupt("count in the value is beyond its register", field=f"{name}.{count.field}",
                      expected=f"<= {capacity}", found=int(found.max()))


def _capacity(count: Count, size: int, minimum: int) -> int:
    capacity = count.capacity if count.capacity is not None else size
    return min(capacity, (size - minimum) // count.entry) if count.entry else capacity


def encode_bank(bank: Bank, number: int, level: int = codec.DEFAULT_LEVEL, how: int = codec.DELTA,
                worth: int = codec.WORTH) -> Section:
    """Return the section of one bank. `number` is its layout's position among the stream's layouts."""
    raw = codec.filter_bank(bank.values, how)
    if max(len(raw), bank.values.nbytes) > limits.MAX_MATRIX:
        raise UsageError(f"bank of {bank.values.nbytes} bytes; split it (limit {limits.MAX_MATRIX})")
    codec_number, stored = codec.compress(raw, level, worth)
    return _bank_section(bank, number)._replace(stored=stored, raw_length=len(raw), codec=codec_number, filter=how)


def _bank_section(bank: Bank, number: int) -> Section:
    """Without its payload."""
    return Section("BANK", b"", 0, scope=_SCOPE_NUMBERS[bank.layout.scope], layout=number, first_vcpu=bank.first_vcpu,
                   vcpu_count=bank.rows if bank.layout.scope == Scope.VCPU else 0,
                   flags=wire.CRITICAL | (wire.UPDATE if bank.update else 0))


def small_bank(bank: Bank, number: int, more: bytes = b"") -> SmallBank:
    """The bank for the compiled part: its bytes are those of `encode_bank` where they are not worth compressing.

    Args:
        more: bounds that its values must be within, too (`migstream.bounds`).
    """
    head = head_of(_bank_section(bank, number)._replace(filter=codec.DELTA))
    return SmallBank(head, bank.values.data, bank.layout.row_words, _bounds(bank.layout) + more)


def decode_bank(section: Section, layout: Layout) -> EncodedBank:
    """Check a bank's header against its layout; the values stay encoded. Raises: Corrupt, LimitExceeded."""
    rows = section.vcpu_count if layout.scope == Scope.VCPU else 1
    if section.scope != _SCOPE_NUMBERS[layout.scope] or (layout.scope == Scope.VM and section.vcpu_count):
        raise Corrupt("bank and layout have different scopes", offset=section.offset, section=section.title,
                      field="scope", expected=layout.scope, found=wire.SCOPE_CODES[section.scope] or "none")
    if layout.scope == Scope.VM and section.first_vcpu:
        raise Corrupt("a VM bank has no vCPU", offset=section.offset, section=section.title, field="first_vcpu",
                      expected=0, found=section.first_vcpu)
    if rows < 1:
        raise Corrupt("bank of no vCPU", offset=section.offset, section=section.title, field="vcpu_count")
    if rows * layout.row_words * 8 > limits.MAX_MATRIX:
        raise LimitExceeded("bank too large", offset=section.offset, section=section.title,
                            expected=f"<= {limits.MAX_MATRIX} bytes", found=rows * layout.row_words * 8)
    return EncodedBank(layout, section)


# RAM.


def _encode_ram_layout(layout: RamLayout) -> bytes:
    head = wire.RAM_LAYOUT_HEAD.build({"page_size": PAGE, "count": len(layout.regions)})
    return bytes(head) + b"".join(struct.pack("<QQ", r.guest_address, r.size) for r in layout.regions)


def _decode_ram_layout(raw: bytes, _: Section) -> RamLayout:
    head = wire.RAM_LAYOUT_HEAD.parse(raw)
    if head.count > limits.MAX_REGIONS:
        raise LimitExceeded("memory regions", field="count", expected=f"<= {limits.MAX_REGIONS}", found=head.count)
    if head.page_size != PAGE:
        raise Corrupt("page size", field="page_size", expected=PAGE, found=head.page_size)
    body = _body(raw, wire.RAM_LAYOUT_HEAD, head.count, 16)
    return RamLayout(_regions([list(pair) for pair in struct.iter_unpack("<QQ", body)]))


def encode_ram(runs: list[RamRun], level: int = codec.DEFAULT_LEVEL) -> Section:
    """Return a section of ascending runs, at most `limits.RAM_CHUNK` bytes of data in all."""
    head = wire.RAM_PAGES_HEAD.build({"count": len(runs)})
    table = b"".join(_RUN.pack(r.guest_address, r.pages, wire.RUN_ZERO if r.data is None else wire.RUN_DATA, 0)
                     for r in runs)
    raw = b"".join((head, table, *(r.data for r in runs if r.data is not None)))
    number, stored = codec.compress(raw, level)
    return Section("RAMP", stored, len(raw), codec=number)


def _ram_runs(section: Section) -> tuple[RamRun, ...]:
    raw = codec.decompress(section.codec, bytes(section.stored), section.raw_length)
    head = wire.RAM_PAGES_HEAD.parse(raw)
    if not 1 <= head.count <= limits.MAX_RUNS:
        raise LimitExceeded("runs", field="count", expected=f"1..{limits.MAX_RUNS}", found=head.count)
    start = wire.RAM_PAGES_HEAD.sizeof()
    data = start + head.count * _RUN.size
    if data > len(raw):
        raise Corrupt("payload shorter than its table", field="count", expected=f"{data} bytes", found=len(raw))
    runs, view = [], memoryview(raw)
    for address, pages, kind, reserved in _RUN.iter_unpack(view[start:data]):
        length = _check_run(address, pages, kind, reserved, len(raw) - data)
        runs.append(RamRun(address, pages, view[data:data + length] if kind == wire.RUN_DATA else None))
        data += length
    if data != len(raw):
        raise Corrupt("bytes after the last run", field="data", expected=f"{data} bytes", found=len(raw))
    return tuple(runs)


def _check_run(address: int, pages: int, kind: int, reserved: int, left: int) -> int:
    if kind not in (wire.RUN_DATA, wire.RUN_ZERO) or reserved or address % PAGE or not pages:
        raise Corrupt("no such run", field=f"run at {address:#x}", found=f"kind {kind}, pages {pages}")
    if address + pages * PAGE > limits.MAX_ADDRESS:
        raise LimitExceeded("guest-physical address", field="pages", expected=f"<= {limits.MAX_ADDRESS:#x}")
    length = pages * PAGE if kind == wire.RUN_DATA else 0
    if length > left:
        raise Corrupt("run longer than the section", field=f"run at {address:#x}", expected=f"<= {left}", found=length)
    return length


# One row a kind: (model type, payload -> model, model -> payload). BANK and RAMP keep their payload encoded.

_Decoder = Callable[[bytes, Section], Any]
_PLAIN: dict[str, tuple[type, _Decoder, Callable[[Any], bytes]]] = {
    "MACH": (Machine, _decode_machine, _encode_machine),
    "HOST": (HostSummary, _decode_host, _encode_host),
    "CNTR": (Behaviour, _decode_contract, _encode_contract),
    "REGL": (Layout, _decode_layout, _encode_layout),
    "RAML": (RamLayout, _decode_ram_layout, _encode_ram_layout),
    "OPAQ": (OpaqueState, _decode_opaque, _encode_opaque),
}
_KIND_OF = {model: kind for kind, (model, _, _) in _PLAIN.items()}


def encode(item: Machine | HostSummary | Behaviour | Layout | RamLayout | OpaqueState) -> Section:
    """Return the section of a model object (banks and RAM: `encode_bank`, `encode_ram`).

    What a reader would refuse is refused here, while the guest that it describes still exists. Raises: UsageError.
    """
    kind = _KIND_OF[type(item)]
    raw = _PLAIN[kind][2](item)
    scope = _SCOPE_NUMBERS[item.scope] if isinstance(item, Layout) else 0
    flags = wire.CRITICAL if wire.KINDS[kind].critical else 0
    section = Section(kind, raw, len(raw), scope=scope, flags=flags)
    try:
        decode(section, [])
    except StreamError as error:
        raise UsageError(f"can't be saved: {error}") from error
    return section


def encode_opaque(states: Sequence[OpaqueState]) -> list[Section]:
    """Return the sections of all opaque state of one stream. Raises: UsageError where a reader would refuse it."""
    made = [encode(state) for state in states]
    if (total := sum(section.raw_length for section in made)) > limits.MAX_OPAQUE:
        raise UsageError(f"can't be saved: opaque state: {total} bytes; a stream takes at most {limits.MAX_OPAQUE}")
    return made


def decode(section: Section, layouts: list[Layout]) -> Item:
    """Return what a section holds. `layouts` are those read so far. Raises: StreamError and below, with the place."""
    known = wire.KINDS.get(section.kind)
    if known is not None and known.critical and not section.critical:
        raise Corrupt("this kind is critical in every version", offset=section.offset, section=section.title,
                      field="flags", found=f"{section.flags:#x}")
    if known is None or section.version > known.version:
        if section.critical:
            raise TooNew("unknown critical section; read it with a newer migstream", offset=section.offset,
                         section=section.title, found=f"{section.kind!r} version {section.version}")
        return Skipped(section.kind, section.version)
    return gate(section, lambda: _decode_known(section, layouts))


def _decode_known(section: Section, layouts: list[Layout]) -> Item:
    _check_header_use(section)
    if section.kind == "END ":
        return End()
    if section.kind == "RAMP":
        return RamPages(_ram_runs(section))
    if section.kind == "BANK":
        if section.layout >= len(layouts):
            raise Corrupt("no such layout", field="layout", expected=f"< {len(layouts)}", found=section.layout)
        return decode_bank(section, layouts[section.layout])
    raw = codec.decompress(section.codec, bytes(section.stored), section.raw_length)
    item: Item = _PLAIN[section.kind][1](raw, section)
    return item


def _check_header_use(section: Section) -> None:
    """Header fields that a kind has no use for are zero; a flag that is wrong for it is an error."""
    for name in _UNUSED.get(section.kind, _BANK_ONLY):
        if getattr(section, name):
            raise Corrupt("header field has no use here and is not zero", field=name, found=getattr(section, name))
    if section.kind != "BANK" and section.flags & wire.UPDATE:
        raise Corrupt("update flag on something that is not a bank", field="flags")
    if wire.KINDS[section.kind].critical != section.critical:
        raise Corrupt("critical flag differs from the specification", field="flags", found=f"{section.flags:#x}")


_BANK_ONLY = ("scope", "layout", "first_vcpu", "vcpu_count", "filter")
_UNUSED = {
    "BANK": (),
    "REGL": ("layout", "first_vcpu", "vcpu_count", "filter"),
    "END ": (*_BANK_ONLY, "codec"),  # found by its length alone
}
"""Header fields that a kind has no use for; every kind that is not here: `_BANK_ONLY`."""
