"""A stream for another host or an older reader: only what the guest can't have seen is changed, and all of it is named.

What has to change comes from the plan of a restore on that host, made from the whole stream. Input is read twice: its
banks say what the new layouts are, which come before the RAM that lies between the banks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from migstream import codec, sections
from migstream.contract import Behaviour, Contract
from migstream.errors import DoesNotFit, UsageError
from migstream.frames import FrameWriter, Section
from migstream.host.behaviour import of_profile
from migstream.host.profile import HostProfile
from migstream.model import Bank, HostSummary, Layout, OpaqueState, Scope
from migstream.plan import Plan, Step, added_bank, make_plan
from migstream.reader import StreamReader
from migstream.registers.catalogue import lookup
from migstream.sections import EncodedBank, RamLayout, RamPages
from migstream.transport.streams import Sink, Source, read_items, write_all
from migstream.wire import stream as wire

_WHAT = "can't be converted so that its guest can't tell"


@dataclass(frozen=True)
class Change:
    """One thing that is another in the new stream: what, and why the guest can't have seen it."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True)
class Conversion:
    """What the new stream is made of; from `plan_conversion`, for `convert`.

    Attributes:
        layouts, banks: all of them, in the order of the stream. minor: of the format.
        behaviour: what its contract section says, None for no such section.
    """

    layouts: tuple[Layout, ...]
    banks: tuple[Bank, ...]
    minor: int
    behaviour: Behaviour | None
    changes: tuple[Change, ...] = field(default=())


def plan_conversion(reader: StreamReader, encoded: Iterable[EncodedBank], contract: Contract,
                    host: HostProfile | None, minor: int | None) -> Conversion:
    """Decide everything, and write nothing.

    Args:
        reader: at the end of the stream. encoded: its banks, all of them, in order. contract: the stream's.
        host: for which host, None for the same registers. minor: of the format at most, None for any.

    Raises: DoesNotFit naming every register that the guest would notice; UsageError for a minor that there isn't.
    """
    if minor is not None and not 0 <= minor <= wire.MINOR:
        raise UsageError(f"--format-minor {minor}: there are 0 to {wire.MINOR}")
    assert reader.machine is not None
    banks = [one.decode() for one in encoded]
    layouts: Sequence[Layout] = reader.layouts
    changes = [Change(f"section {s.kind!r} version {s.version}", "left out: this version doesn't know it, and it is "
                      "ancillary") for s in reader.skipped]
    behaviour = reader.behaviour
    if host is not None:
        plan = make_plan(reader.machine, layouts, host, banks=banks, contract=contract)
        if plan.refusals:
            raise DoesNotFit(plan.refusals, _WHAT)
        changes += _changes(plan)
        layouts, banks = _fitted(plan, layouts, banks, reader.machine.vcpus)
        behaviour = behaviour and _left(behaviour, layouts)
    if behaviour is not None and (minor is not None and minor < wire.KINDS["CNTR"].minor):
        _droppable(_left(behaviour, layouts), host)
        changes.append(Change("CNTR", "left out: minor 0 has no contract section; all that it said of registers is in "
                              f"the banks{', or the host that it is for behaves so' if host else ''}"))
        behaviour = None
    return Conversion(tuple(layouts), tuple(banks), wire.KINDS["CNTR"].minor if behaviour else 0, behaviour,
                      tuple(changes))


def _changes(plan: Plan) -> list[Change]:
    """What is written otherwise, dropped or added."""
    out = [Change(verdict.name, str(verdict).removeprefix(f"{verdict.name}: ")) for step in plan.steps
           for verdict in step.verdicts if verdict.target != verdict.slot or verdict.value is not None]
    return out + [Change(one.verdict.name, f"added: {one.verdict.reason}") for one in plan.additions
                  if one.verdict.target is not None]


def _fitted(plan: Plan, layouts: Sequence[Layout], banks: Sequence[Bank],
            vcpus: int) -> tuple[list[Layout], list[Bank]]:
    """The plan's target layouts and the banks' values for them; additions behind the last of the prologue."""
    steps = dict(zip(layouts, plan.steps, strict=True))
    new = [(step.target, [_bank(step, step.target, bank) for bank in banks if bank.layout == layout])
           for layout, step in steps.items() if step.target is not None]
    added = [pair for scope in (Scope.VM, Scope.VCPU) if (pair := added_bank(plan.additions, scope, vcpus))]
    new += [(bank.layout, [bank]) for _, bank in added]
    new.sort(key=lambda pair: pair[0].phase)
    return [layout for layout, _ in new], [bank for _, found in new for bank in found]


def _bank(step: Step, target: Layout, bank: Bank) -> Bank:
    return replace(bank, layout=target, values=step.fit(bank.values))


def _left(behaviour: Behaviour, layouts: Sequence[Layout]) -> Behaviour:
    """What no bank says now."""
    there = {slot.id for layout in layouts for slot in layout.slots}
    return replace(behaviour, behaves_as={id: v for id, v in behaviour.behaves_as.items() if id not in there},
                   how={id: text for id, text in behaviour.how.items() if id not in there})


def _droppable(behaviour: Behaviour, host: HostProfile | None) -> None:
    """Raises: DoesNotFit for what only the contract section says, unless the host is known to behave so."""
    same = of_profile(host).behaves_as if host is not None else {}
    lost = [f"{lookup(id).name}: the kernel behaved as {int.from_bytes(value, 'little'):#x} without a register, which "
            "minor 0 can't say (convert it --for-host, too)" for id, value in behaviour.behaves_as.items()
            if same.get(id) != value]
    if lost:
        raise DoesNotFit(lost, _WHAT)


def convert(source: Source, out: Sink, first: StreamReader, wanted: Conversion,
            level: int = codec.DEFAULT_LEVEL) -> int:
    """Write the new stream while the old one is read a second time, and return its length in bytes.

    RAM and opaque state go through as they are stored. `first` is the reader of the first time.
    Raises: StreamError, OutputError.
    """
    assert first.machine is not None
    writer = FrameWriter(first.machine.arch, wanted.minor)
    write_all(out, [writer.begin()])
    for made in _sections(source, first, wanted, level):
        write_all(out, writer.send(made))
    write_all(out, writer.end())
    return writer.offset


def _sections(source: Source, first: StreamReader, wanted: Conversion, level: int) -> Iterator[Section]:
    """All sections but the end, in the order of a stream."""
    assert first.machine is not None
    yield sections.encode(first.machine)
    if first.host is not None:
        yield sections.encode(_with_notes(first.host, wanted.changes))
    if wanted.behaviour is not None:
        yield sections.encode(wanted.behaviour)
    yield from (sections.encode(layout) for layout in wanted.layouts)
    early = [bank for bank in wanted.banks if bank.layout.phase.prologue]
    yield from _banks([bank for bank in early if not bank.update], wanted, level)
    yield from _banks([bank for bank in early if bank.update], wanted, level)
    late: Iterable[Section] = _banks([bank for bank in wanted.banks if not bank.layout.phase.prologue], wanted, level)
    for section, item in read_items(source, StreamReader()):
        if isinstance(item, RamLayout | RamPages):
            yield section
        elif isinstance(item, OpaqueState):
            yield from late
            late = ()
            yield section
    yield from late


def _banks(banks: list[Bank], wanted: Conversion, level: int) -> Iterator[Section]:
    numbers = {layout: number for number, layout in enumerate(wanted.layouts)}
    return (sections.encode_bank(bank, numbers[bank.layout], level) for bank in banks)


def _with_notes(host: HostSummary, changes: Sequence[Change]) -> HostSummary:
    """Who reads the stream later sees that it isn't as it was saved."""
    return replace(host, notes=(*host.notes, *(f"converted: {change}" for change in changes)))
