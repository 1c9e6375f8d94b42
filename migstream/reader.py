"""A whole stream as a sequence of model objects: the order of sections and the rules that span them.

Above `frames` (bytes and checksums) and `sections` (payloads); still without I/O. What it promises when the end is
reached: every layout's registers are there for every vCPU exactly once, every page of the RAM layout exactly once,
and nothing came twice, out of order, at the wrong scope or for another architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from migstream import limits
from migstream.contract import Behaviour, check_behaviour
from migstream.errors import Corrupt, LimitExceeded, StreamError
from migstream.frames import FrameReader, Preamble, Section, SmallBank, SmallBanks
from migstream.model import PAGE, HostSummary, Layout, Machine, OpaqueState, Phase, Scope, Slot
from migstream.registers.catalogue import fits_arch, lookup, must_have
from migstream.sections import EncodedBank, End, Item, RamLayout, RamPages, Skipped, decode
from migstream.wire import structs


class StreamReader:
    """Checked sections and what they hold, in stream order.

    Usage: `feed()` bytes, call `next()` until it gives None, `end_of_input()` when there are no more. After an error
    the object is dead. `layouts`, `machine`, `host`, `behaviour` (its contract section) and `skipped` fill as the
    stream goes by.
    """

    def __init__(self) -> None:
        self.frames = FrameReader()
        self.machine: Machine | None = None
        self.host: HostSummary | None = None
        self.behaviour: Behaviour | None = None
        self.layouts: list[Layout] = []
        self.skipped: list[Skipped] = []
        self._rank = 0
        self._bank = 0
        self._covered: dict[int, int] = {}
        self._updated: set[int] = set()
        self._ram: list[tuple[int, int]] | None = None
        self._scopes: dict[int, Scope] = {}
        self._row_bytes = dict.fromkeys(Scope, 0)
        self._opaque_bytes = 0
        self._expected: list[int] = []
        self._small = SmallBanks(())
        self._all_expected = False

    @property
    def preamble(self) -> Preamble | None:
        """The stream's versions and architecture, once enough bytes came."""
        return self.frames.preamble

    @property
    def wanted(self) -> int:
        """Bytes missing for the next step; 0 after the end."""
        return self.frames.wanted

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes, at most `frames.MAX_FEED`. Raises: UsageError, StreamError."""
        self.frames.feed(data)

    @property
    def paused(self) -> bool:
        """True once a section has come that is written while the guest stands still: an update bank or later."""
        return self._rank >= _UPDATE

    def expect(self, banks: Sequence[SmallBank | None]) -> None:
        """Say where the values of the blackout banks are to go, one a layout, whole: `take_banks` then gives them.

        Args:
            banks: in the order of their layouts; None where one must come out of `next()`, and with it all that follow.

        Nothing comes of it before the prologue is whole, or once such a bank has come. The matrices are the caller's
        and must stay.
        """
        late = [number for number, layout in enumerate(self.layouts) if not layout.phase.prologue]
        early = [number for number, layout in enumerate(self.layouts) if layout.phase.prologue]
        whole = all(self._covered.get(number) == self._rows(self.layouts[number]) for number in early)
        if not _PROLOGUE <= self._rank < _BLACKOUT or len(late) != len(banks) or not whole:
            return
        known = [bank for bank in takewhile(lambda bank: bank is not None, banks) if bank is not None]
        self._small = SmallBanks(known, filled=True)
        self._expected = late[:len(known)]
        self._all_expected = len(known) == len(late)

    def take_banks(self) -> list[int]:
        """Take what was expected, as far as it comes next; the numbers of the layouts whose matrices are filled now.

        One compiled call for all of them. What is not as expected comes out of `next()`, as does everything else.
        """
        if not self._expected or self._ram or self._rank > _BLACKOUT:
            return []
        taken = self.frames.take_banks(self._small, self._small.length - len(self._expected), self._all_expected)
        if not taken:
            return []
        numbers, self._expected = self._expected[:taken], self._expected[taken:]
        for number in numbers:
            self._covered[number] = self._rows(self.layouts[number])
        self._bank, self._rank = numbers[-1], _END if self.frames.ended else _BLACKOUT
        return numbers

    def next(self) -> tuple[Section, Item] | None:
        """Return the next section and what it holds; None when more bytes are needed. Raises: StreamError and below."""
        section = self.frames.next_section()
        if section is None:
            return None
        try:
            item = decode(section, self.layouts)
            self._check(section, item)
        except StreamError as error:
            self.frames.kill(error.at(section.offset, section.title))
            raise
        return section, item

    def end_of_input(self) -> None:
        """Say that no more bytes come. Raises: Truncated unless the end was read."""
        self.frames.end_of_input()

    def _check(self, section: Section, item: Item) -> None:
        if isinstance(item, Skipped):
            if len(self.skipped) >= limits.MAX_SKIPPED:
                raise LimitExceeded("unknown ancillary sections", expected=f"<= {limits.MAX_SKIPPED}")
            self.skipped.append(item)
            return
        rank = _rank(item)
        if self.machine is None and not isinstance(item, Machine):
            raise Corrupt("the machine section must come first")
        if rank < self._rank:
            raise Corrupt("section out of order", found=f"{section.title} after {_RANKS[self._rank]}")
        if rank != self._rank:
            self._leave(self._rank, rank)
            self._rank = rank
        handler = _HANDLERS.get(type(item))
        if handler:
            handler(self, section, item)

    def _leave(self, old: int, new: int) -> None:
        """What must be complete before a later part of the stream begins."""
        prologue = [n for n, layout in enumerate(self.layouts) if layout.phase.prologue]
        if old <= _PROLOGUE < new:
            self._check_covered(prologue)
        if old < _END == new:
            self._check_covered(range(len(self.layouts)))
        if new > _RAM and self._ram:
            raise Corrupt("pages missing", field="RAMP", expected=f"pages from {self._ram[0][0]:#x}", found="none")

    def _check_covered(self, numbers: Any) -> None:
        for number in numbers:
            expected = self._rows(self.layouts[number])
            if self._covered.get(number, 0) != expected:
                raise Corrupt("vCPUs missing" if self.layouts[number].scope == Scope.VCPU else "VM bank missing",
                              field=f"layout {number} ({self.layouts[number].title})", expected=expected,
                              found=self._covered.get(number, 0))

    def _rows(self, layout: Layout) -> int:
        assert self.machine is not None
        return self.machine.vcpus if layout.scope == Scope.VCPU else 1

    def _on_machine(self, section: Section, machine: Machine) -> None:
        if self.machine is not None:
            raise Corrupt("a second machine section")
        if self.preamble is None or machine.arch != self.preamble.arch:
            raise Corrupt("machine and preamble differ", field="arch", found=machine.arch.label)
        self.machine = machine

    def _on_host(self, section: Section, host: HostSummary) -> None:
        if self.host is not None:
            raise Corrupt("a second host section")
        self.host = host

    def _on_contract(self, section: Section, behaviour: Behaviour) -> None:
        if self.behaviour is not None:
            raise Corrupt("a second contract section")
        assert self.machine is not None
        check_behaviour(behaviour, self.machine.arch)
        self.behaviour = behaviour

    def _on_layout(self, section: Section, layout: Layout) -> None:
        if len(self.layouts) >= limits.MAX_LAYOUTS:
            raise LimitExceeded("layouts", expected=f"<= {limits.MAX_LAYOUTS}")
        last = self.layouts[-1] if self.layouts else None
        if last and layout.phase < last.phase:
            raise Corrupt("layout of an earlier phase", field="phase", expected=f">= {last.phase}", found=layout.phase)
        assert self.machine is not None
        for slot in layout.slots:
            self._check_slot(slot.id, layout.scope, self.machine)
            _check_size(slot)
        self._row_bytes[layout.scope] += layout.row_words * 8
        if self._row_bytes[layout.scope] > limits.MAX_STATE:
            raise LimitExceeded(f"all rows of one {layout.scope}", expected=f"<= {limits.MAX_STATE} bytes",
                                found=self._row_bytes[layout.scope])
        self.layouts.append(layout)

    def _check_slot(self, id: int, scope: Scope, machine: Machine) -> None:
        if id in self._scopes:
            raise Corrupt("register in two layouts", field=f"{id:#018x}")
        self._scopes[id] = scope
        if not fits_arch(id, machine.arch):
            raise Corrupt("register of another architecture", field=f"{id:#018x}")
        if (own := must_have(id)) and own != scope:
            raise Corrupt(f"{own}-scoped register in a {scope} bank", field=lookup(id).name)

    def _on_bank(self, section: Section, bank: EncodedBank) -> None:
        number = section.layout
        if bank.update:
            if bank.layout.scope != Scope.VM or not bank.layout.phase.prologue or number in self._updated:
                raise Corrupt("update of a bank that can't have one, or a second one", field="flags")
            self._updated.add(number)
            return
        if number < self._bank:
            raise Corrupt("banks must come in the order of their layouts", field="layout", expected=f">= {self._bank}",
                          found=number)
        self._bank = number
        done = self._covered.get(number, 0)
        limit = self._rows(bank.layout)
        if bank.first_vcpu != done or done + bank.rows > limit:
            raise Corrupt("vCPUs must come in order, each once", field="first_vcpu",
                          expected=f"vCPU {done} of {limit}" if done < limit else f"no more than {limit} vCPUs",
                          found=f"{bank.rows} from {bank.first_vcpu}")
        self._covered[number] = done + bank.rows
        self._came(number, self._covered[number] == limit)

    def _came(self, number: int, whole: bool) -> None:
        """A bank that was expected came another way: the next is still expected, unless this one was in parts."""
        if self._expected:
            self._expected = self._expected[1:] if whole and number == self._expected[0] else []

    def _on_ram_layout(self, section: Section, layout: RamLayout) -> None:
        if self._ram is not None:
            raise Corrupt("a second RAM layout")
        assert self.machine is not None
        for region in layout.regions:
            if not any(m.guest_address <= region.guest_address and region.end <= m.end for m in self.machine.memory):
                raise Corrupt("RAM range outside the machine's memory", found=f"{region.guest_address:#x}")
        self._ram = [(r.guest_address, r.end) for r in layout.regions]

    def _on_ram(self, section: Section, ram: RamPages) -> None:
        if self._ram is None:
            raise Corrupt("RAM pages without a RAM layout")
        for run in ram.runs:
            self._account_run(self._ram, run.guest_address, run.pages * PAGE)

    def _on_opaque(self, section: Section, state: OpaqueState) -> None:
        self._opaque_bytes += section.raw_length
        if self._opaque_bytes > limits.MAX_OPAQUE:
            raise LimitExceeded("opaque state", expected=f"<= {limits.MAX_OPAQUE} bytes", found=self._opaque_bytes)

    def _account_run(self, missing: list[tuple[int, int]], start: int, length: int) -> None:
        expected = missing[0] if missing else (0, 0)
        if start != expected[0] or start + length > expected[1]:
            raise Corrupt("pages must come in order, each once", field="run",
                          expected=f"{expected[0]:#x}..{expected[1]:#x}" if missing else "no more",
                          found=f"{start:#x}..{start + length:#x}")
        missing[0] = (start + length, expected[1])
        if start + length == expected[1]:
            del missing[0]


def _check_size(slot: Slot) -> None:
    """A kernel reads a whole struct, whatever size the stream says: a shorter column would leak what follows."""
    row = lookup(slot.id)
    exact, least = row.size, structs.STRUCTS[row.struct].minimum if row.size is None and row.struct else 0
    if row.known and (slot.size != exact if exact is not None else slot.size < least):
        raise Corrupt("register of another size", field=row.name, expected=exact or f">= {least}", found=slot.size)


_PROLOGUE, _UPDATE, _RAM, _BLACKOUT, _END = 3, 4, 6, 7, 9
_RANKS = ("machine", "host and contract", "register layouts", "prologue banks", "update banks", "RAM layout",
          "RAM pages", "blackout banks", "opaque state", "end")
"""The order of a stream. Ranks never go down; RAM comes before the registers, which may point into it."""

_RANK_OF: dict[type, int] = {Machine: 0, HostSummary: 1, Behaviour: 1, Layout: 2, RamLayout: 5, RamPages: 6,
                            OpaqueState: 8, End: 9}


def _rank(item: Item) -> int:
    if isinstance(item, EncodedBank):
        return _UPDATE if item.update else _PROLOGUE if item.layout.phase <= Phase.FEATURE else _BLACKOUT
    return _RANK_OF[type(item)]


_HANDLERS: dict[type, Callable[[StreamReader, Section, Any], None]] = {
    Machine: StreamReader._on_machine,
    HostSummary: StreamReader._on_host,
    Behaviour: StreamReader._on_contract,
    Layout: StreamReader._on_layout,
    EncodedBank: StreamReader._on_bank,
    RamLayout: StreamReader._on_ram_layout,
    RamPages: StreamReader._on_ram,
    OpaqueState: StreamReader._on_opaque,
}
