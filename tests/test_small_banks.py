"""Small banks take a way of their own, many in one compiled call: nothing but the time may tell."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from migstream import codec, sections
from migstream.errors import Corrupt, StreamError, UsageError
from migstream.frames import FrameWriter, Section, SmallBank, SmallBanks
from migstream.model import Arch, Bank, Layout, Machine, MemoryRegion, OpaqueState, Phase, RamRun, Scope, Slot
from migstream.native import compiled
from migstream.reader import StreamReader
from migstream.registers import ids, x86_64
from migstream.sections import EncodedBank, RamLayout
from tests import strategies

pytestmark = pytest.mark.skipif(compiled is None, reason="nothing compiled is here")

STATE = Layout(Scope.VCPU, Phase.STATE, (Slot(ids.msr_id(0x9000_0000), 8), Slot(ids.msr_id(0x9000_0001), 8)))
PIC = Layout(Scope.VM, Phase.INTERRUPTS, (Slot(x86_64.PIC_SLAVE.id, x86_64.PIC_SLAVE.size or 0),))
CLOCK = Layout(Scope.VM, Phase.CLOCK, (Slot(ids.msr_id(0x9000_0002), 8),))
EARLY = Layout(Scope.VM, Phase.FEATURE, (Slot(ids.msr_id(0x9000_0003), 8),))
LAYOUTS = (EARLY, STATE, PIC, CLOCK)
MACHINE = Machine(Arch.X86_64, 2, (MemoryRegion(0, 1 << 20),), {})
WORTH = codec.WORTH_IN_A_PAUSE


def bank(layout: Layout, rows: int = 1, first: int = 0, **word: int) -> Bank:
    """Values 1, 2, 3 …, where a selector's column has what it must have."""
    values = np.arange(1, rows * layout.row_words + 1, dtype=np.uint64).reshape(rows, layout.row_words)
    if layout is PIC:
        values[:, 0] = word.get("selector", 1)
        values[:, -1] = 0
    return Bank(layout, first, values)


def begun() -> tuple[FrameWriter, bytes]:
    """A writer after the prologue, and what it wrote."""
    writer = FrameWriter(Arch.X86_64)
    parts: list[Any] = [writer.begin(), *writer.send(sections.encode(MACHINE))]
    for layout in LAYOUTS:
        parts += writer.send(sections.encode(layout))
    parts += writer.send(sections.encode_bank(bank(EARLY), 0))
    return writer, b"".join(parts)


def plainly(writer: FrameWriter, banks: Iterable[tuple[int, Bank]], worth: int = WORTH) -> bytes:
    """The sections one by one."""
    out: list[Any] = []
    for number, one in banks:
        out += writer.send(sections.encode_bank(one, number, worth=worth))
    return b"".join(out)


def small(banks: Iterable[tuple[int, Bank]], more: bytes = b"") -> list[SmallBank]:
    """The same for the compiled part."""
    return [sections.small_bank(one, number, more) for number, one in banks]


# Sending


@st.composite
def many(draw: st.DrawFn) -> list[tuple[int, Bank]]:
    """Banks of any shape, with no register that has rules of its own."""
    out = []
    for number in range(draw(st.integers(1, 4))):
        values = draw(strategies.matrices())
        slots = tuple(Slot(ids.msr_id(0x9000_0000 + k), 8) for k in range(values.shape[1]))
        out.append((number, Bank(Layout(Scope.VCPU, Phase.STATE, slots), draw(st.integers(0, 9)), values)))
    return out


@given(many(), st.sampled_from([0, 8, 100, 600, 2000, 1 << 20]), st.booleans())
def test_the_bytes_are_those_of_sections_sent_one_by_one(banks: list[tuple[int, Bank]], worth: int, end: bool) -> None:
    one, other = FrameWriter(Arch.X86_64), FrameWriter(Arch.X86_64)
    expected = one.begin() + plainly(one, banks, worth) + (b"".join(one.end()) if end else b"")
    out, first, lent = other.begin(), 0, SmallBanks(small(banks))
    while first < len(banks):
        data, sent = other.send_banks(lent, first, end, worth)
        out, first = out + data, first + sent
        if first < len(banks):
            out += plainly(other, banks[first:first + 1], worth)
            first += 1
    if end and not other.ended:
        out += b"".join(other.end())
    assert out == expected
    assert other.offset == len(out)


@pytest.mark.parametrize("longer", [False, True])
def test_what_is_worth_compressing_is_left_to_it(longer: bool) -> None:
    one = bank(STATE, 2)
    length = len(codec.filter_bank(one.values, codec.DELTA))
    data, sent = FrameWriter(Arch.X86_64).send_banks(SmallBanks(small([(1, one)])), 0, False, length + (not longer))
    assert (len(data), sent) == ((0, 0) if longer else (48 + length, 1))


def test_a_large_matrix_is_not_looked_through_twice() -> None:
    same = Bank(STATE, 0, np.ones((40, 2), np.uint64))
    for worth, expected in ((64, 1), (19, 0)):
        assert FrameWriter(Arch.X86_64).send_banks(SmallBanks(small([(1, same)])), 0, False, worth)[1] == expected


def test_a_value_that_no_reader_would_take_is_not_sent() -> None:
    banks = [(1, bank(STATE, 2)), (2, bank(PIC, selector=7)), (3, bank(CLOCK))]
    data, sent = FrameWriter(Arch.X86_64).send_banks(SmallBanks(small(banks)), 0, True, WORTH)
    assert sent == 1
    assert data == plainly(FrameWriter(Arch.X86_64), banks[:1])


def test_nothing_follows_the_end() -> None:
    writer, lent = FrameWriter(Arch.X86_64), SmallBanks(small([(3, bank(CLOCK))]))
    assert writer.send_banks(lent, 0, True, WORTH)[1] == 2
    assert writer.ended
    with pytest.raises(UsageError, match="after the end section"):
        writer.send_banks(lent, 0, True, WORTH)


# Receiving: a reader that expects the banks, and one that does not, must say the same.


class Outcome:
    """What a reader made of some bytes: the late banks' values in their order, whether it ended, or the error."""

    def __init__(self, expecting: bool) -> None:
        self.reader, self.expecting = StreamReader(), expecting
        self.rooms = {number: np.zeros((2 if layout is STATE else 1, layout.row_words), np.uint64)
                      for number, layout in enumerate(LAYOUTS) if layout is not EARLY}
        self.found: list[tuple[int, int, list[list[int]]]] = []
        self.error = ""
        self.by_the_way = 0

    def feed(self, data: bytes) -> None:
        """Take bytes until there is an error."""
        if self.error:
            return
        try:
            self.reader.feed(data)
            while True:
                self._banks()
                if (found := self.reader.next()) is None:
                    return
                self._note(*found)
        except StreamError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _banks(self) -> None:
        numbers = self.reader.take_banks()
        self.by_the_way += len(numbers)
        self.found += [(number, 0, self.rooms[number].tolist()) for number in numbers]

    def _note(self, section: Any, item: Any) -> None:
        if isinstance(item, EncodedBank) and item.layout != EARLY:
            self.found.append((section.layout, item.first_vcpu, item.decode().values.tolist()))

    def expect(self, none: Sequence[int] = ()) -> None:
        """Once the prologue is there."""
        if self.expecting:
            self.reader.expect([None if number in none else small([(number, Bank(LAYOUTS[number], 0, room))])[0]
                                for number, room in self.rooms.items()])

    def end(self) -> tuple[Any, ...]:
        """All of it, to be compared."""
        if not self.error:
            try:
                self.reader.end_of_input()
            except StreamError as error:
                self.error = f"{type(error).__name__}: {error}"
        return self.found, self.error, self.reader.frames.ended, self.reader.frames.offset


def same(late: bytes, sizes: Iterable[int] = (), none: Sequence[int] = (), when: int = 0) -> Outcome:
    """Feed both readers; what they make of it must be the same. Returns the one that expects, from piece `when` on."""
    _, prologue = begun()
    outcomes = []
    for expecting in (True, False):
        one, position = Outcome(expecting), 0
        one.feed(prologue)
        for number, size in enumerate((*sizes, len(late))):
            if number == when and not one.error:
                one.expect(none)
            one.feed(late[position:position + size])
            position += size
        outcomes.append(one)
    assert outcomes[0].end() == outcomes[1].end()
    return outcomes[0]


def late() -> bytes:
    """The blackout's part of a stream."""
    writer, _ = begun()
    return plainly(writer, whole()) + b"".join(writer.end())


def whole() -> list[tuple[int, Bank]]:
    """All late banks, each whole."""
    return [(1, bank(STATE, 2)), (2, bank(PIC)), (3, bank(CLOCK))]


LATE = late()


def test_all_of_it_goes_the_short_way() -> None:
    outcome = same(LATE)
    assert (outcome.by_the_way, outcome.error, outcome.reader.frames.ended) == (3, "", True)


@given(strategies.chunk_sizes)
def test_any_chunks(sizes: list[int]) -> None:
    assert same(LATE, sizes).error == ""


def test_cut_anywhere() -> None:
    for length in range(len(LATE)):
        assert same(LATE[:length]).error.startswith("Truncated")


def test_any_bit_changed() -> None:
    for bit in range(len(LATE) * 8):
        broken = bytearray(LATE)
        broken[bit // 8] ^= 1 << bit % 8
        assert same(bytes(broken)).error, bit


def test_bytes_after_the_end() -> None:
    assert "bytes after the end section" in same(LATE + b"\0").error


@pytest.mark.parametrize("none", [(1,), (2,), (3,), (1, 3)])
def test_what_must_be_judged_comes_out_of_next_and_all_after_it(none: tuple[int, ...]) -> None:
    assert same(LATE, none=none).by_the_way == none[0] - 1


PIECES: dict[str, Callable[[FrameWriter], list[Any]]] = {
    "state": lambda w: w.send(sections.encode_bank(bank(STATE, 2), 1)),
    "vCPU 0": lambda w: w.send(sections.encode_bank(bank(STATE, 1), 1)),
    "vCPU 1": lambda w: w.send(sections.encode_bank(bank(STATE, 1, first=1), 1)),
    "state, zstd": lambda w: w.send(sections.encode_bank(bank(STATE, 2), 1, worth=0)),
    "state, rows": lambda w: w.send(sections.encode_bank(bank(STATE, 2), 1, how=codec.NONE)),
    "pic": lambda w: w.send(sections.encode_bank(bank(PIC), 2, worth=WORTH)),
    "no pic": lambda w: w.send(sections.encode_bank(bank(PIC, selector=3), 2, worth=WORTH)),
    "clock": lambda w: w.send(sections.encode_bank(bank(CLOCK), 3)),
    "update": lambda w: w.send(sections.encode_bank(Bank(EARLY, 0, bank(EARLY).values, update=True), 0)),
    "opaque": lambda w: w.send(sections.encode(OpaqueState("disk", b"1"))),
    "RAM layout": lambda w: w.send(sections.encode(RamLayout((MemoryRegion(0x1000, 0x2000),)))),
    "page": lambda w: w.send(sections.encode_ram([RamRun(0x1000, 1, None)])),
    "pages": lambda w: w.send(sections.encode_ram([RamRun(0x1000, 2, None)])),
    "looks like state": lambda w: w.send(_ancillary(b"".join(FrameWriter(Arch.X86_64).send(
        sections.encode_bank(bank(STATE, 2), 1, worth=WORTH))))),
    "end of another": lambda w: w.send(_ancillary(struct.pack("<IIQ", 99, 0, 0))._replace(kind="END ", flags=1)),
}


def _ancillary(payload: bytes) -> Section:
    """A section of a kind that no reader knows and may skip."""
    return Section("XYZZ", payload, len(payload), flags=0)


@given(st.lists(st.sampled_from(list(PIECES)), max_size=7), strategies.chunk_sizes, st.sampled_from([(), (1,), (2,)]),
       st.integers(0, 3))
def test_any_order_of_anything(names: list[str], sizes: list[int], none: tuple[int, ...], when: int) -> None:
    writer, _ = begun()
    parts = [part for name in names for part in PIECES[name](writer)]
    same(b"".join([*parts, *writer.end()]), sizes, none, when)


@pytest.mark.parametrize(("names", "none"), [(["state"], (2,)), (["state"], (3,)), (["pic", "state", "clock"], ()),
                                             (["pic", "pic", "clock"], ()), (["state", "pic", "pic"], ()),
                                             (["RAM layout", "page", "state", "pic", "clock"], ()),
                                             (["RAM layout", "state", "pic", "clock"], ()),
                                             (["state", "pic", "clock", "end of another"], ())])
def test_what_is_missing_or_twice_is_said_on_both_ways(names: list[str], none: tuple[int, ...]) -> None:
    writer, _ = begun()
    parts = [part for name in names for part in PIECES[name](writer)]
    assert same(b"".join([*parts, *writer.end()]), none=none).error


@pytest.mark.parametrize("names", [["state", "state", "pic", "clock"], ["state", "pic", "clock"]], ids=str)
def test_a_bank_that_came_before_it_was_expected_is_not_expected_any_more(names: list[str]) -> None:
    writer, _ = begun()
    parts = [b"".join(PIECES[name](writer)) for name in names]
    outcome = same(b"".join([*parts, *writer.end()]), [len(parts[0])], when=1)
    assert (outcome.by_the_way, bool(outcome.error)) == (0, len(names) == 4)


def test_a_payload_is_never_taken_for_a_section() -> None:
    """Its header came before: what follows is its payload, whatever it looks like."""
    writer, _ = begun()
    parts = [part for name in ("looks like state", "state", "pic", "clock") for part in PIECES[name](writer)]
    assert same(b"".join([*parts, *writer.end()]), [48]).error == ""


@pytest.mark.parametrize(("names", "short", "error"), [
    (["state", "pic", "clock"], 3, ""),
    (["update", "state", "pic", "clock", "opaque"], 3, ""),
    (["vCPU 0", "vCPU 1", "pic", "clock"], 0, ""),
    (["state, rows", "pic", "clock"], 2, ""),
    (["state", "state", "pic", "clock"], 1, "vCPUs must come in order"),
    (["state", "clock"], 1, "VM bank missing"),
    (["pic", "clock"], 0, "vCPUs missing"),
    (["vCPU 0", "pic", "clock"], 0, "vCPUs missing"),
    (["state", "no pic", "clock"], 1, "pic"),
    (["state", "update"], 1, "out of order"),
    (["state", "pic", "opaque", "clock"], 2, "out of order")])
def test_orders_that_matter(names: list[str], short: int, error: str) -> None:
    writer, _ = begun()
    parts = [part for name in names for part in PIECES[name](writer)]
    outcome = same(b"".join([*parts, *writer.end()]))
    assert outcome.by_the_way == short
    assert error in outcome.error.lower() if error.islower() else error in outcome.error
    assert bool(error) == bool(outcome.error)


def test_values_out_of_the_bounds_asked_for_are_not_taken() -> None:
    from migstream.bounds import bound

    _, prologue = begun()
    for least, expected in ((1, 1), (2, 0)):
        one = Outcome(expecting=False)
        one.feed(prologue)
        one.reader.expect([small([(1, Bank(STATE, 0, one.rooms[1]))], bound(0, least, 9))[0], None, None])
        one.feed(LATE)
        assert (one.by_the_way, one.error, len(one.found)) == (expected, "", 3)


def test_nothing_is_expected_before_the_prologue_is_whole_or_once_a_bank_came() -> None:
    _, prologue = begun()
    one = Outcome(expecting=True)
    one.feed(prologue[:-8])
    one.expect()
    one.feed(prologue[-8:] + LATE)
    assert (one.by_the_way, one.error, len(one.found)) == (0, "", 3)
    one = Outcome(expecting=True)
    one.feed(prologue + LATE[:-100])
    one.expect()
    one.feed(LATE[-100:])
    assert (one.by_the_way, one.error, len(one.found)) == (0, "", 3)


def test_a_dead_reader_stays_dead() -> None:
    one = Outcome(expecting=True)
    one.feed(begun()[1])
    one.expect()
    one.feed(LATE[:48][::-1])
    assert one.error
    with pytest.raises(Corrupt):
        one.reader.take_banks()


# The compiled part itself


@given(st.binary(max_size=100))
def test_the_checksum_is_the_packages(data: bytes) -> None:
    assert compiled is not None
    assert [compiled.checksum(data, portable) for portable in (False, True)] == [crc32c(data)] * 2


HEAD = small([(1, bank(STATE))])[0].head


@pytest.mark.parametrize("wrong", [
    (HEAD[1:], bytes(16), 2, b""), (HEAD, bytes(16), 0, b""), (HEAD, bytes(16), -1, b""), (HEAD, bytes(8), 2, b""),
    (HEAD, b"", 2, b""), (HEAD, bytes(16), 2, np.array([2, 0, 0, 0, 0], np.uint64).tobytes()),
    (HEAD, bytes(16), 2, np.array([0, 64, 0, 0, 0], np.uint64).tobytes()), (HEAD, bytes(16), 2**61, b""),
    (HEAD, bytes(16), 2, bytes(39))], ids=str)
def test_a_bank_that_does_not_fit_its_matrix_is_refused(wrong: tuple[bytes, bytes, int, bytes]) -> None:
    assert compiled is not None
    with pytest.raises(ValueError, match="does not fit"):
        compiled.small([wrong], False)


def test_misuse_of_the_compiled_part_is_refused() -> None:
    assert compiled is not None
    made, counts = compiled.small([], False), bytearray(16)
    for wrong in ((made, 1, counts, b""), (made, 0, bytearray(15), b""), (made, 0, counts, b"x"),
                  (None, 0, counts, b"")):
        with pytest.raises(ValueError):
            compiled.pack(*wrong, 0)
        with pytest.raises(ValueError):
            compiled.unpack(*wrong, b"")
    for worth in (-1, 1 << 62):
        with pytest.raises(ValueError, match="small"):
            compiled.pack(made, 0, counts, b"", worth)
    with pytest.raises(TypeError):
        compiled.small((), False)
    with pytest.raises(TypeError, match="tuples"):
        compiled.small([b"no tuple"], False)
    with pytest.raises(TypeError, match="tuples"):
        compiled.prepare([b"no tuple"], False, bytearray(8))
    for rows, words in ((2**61, 8), (2**60, 16), (1, 2**61)):
        with pytest.raises(ValueError, match="do not fit"):
            compiled.bounded(b"", rows, words, b"")
    with pytest.raises(TypeError, match="read-write"):
        compiled.small([(HEAD, bytes(16), 2, b"")], True)
