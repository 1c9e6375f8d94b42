"""`python -m bench codec`: what it costs to turn 512 vCPUs x 400 registers into a bank and back.

The values are real: the words of a bank that was saved from a running guest (from real KVM where there is one). Each
way is measured in the same rounds as ours: construct for every register, struct, msgpack, a plain copy, and zstd alone
on the very bytes that ours gives it.
"""

from __future__ import annotations

import argparse
import io
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import zstandard
from construct import Array, Int64ul, Struct

from bench.measure import Timing, interleaved, machine, microseconds
from bench.options import number_of_rounds
from bench.restores import saved_stream
from bench.strategies import without_xmm
from migstream import codec, sections
from migstream.backends import open_backend
from migstream.frames import FrameReader, FrameWriter
from migstream.model import Arch, Bank, Layout, Phase, Scope, Slot
from migstream.reader import StreamReader
from migstream.registers import ids
from migstream.sections import EncodedBank
from migstream.show import Table, print_pairs, print_table
from migstream.transport import read_items

VCPUS, REGISTERS = 512, 400
FIRST_MSR = 0xC0000000


def saved_state(vcpus: int, backend_name: str = "auto") -> tuple[str, Bank]:
    """Save a demo guest mid-run and return where, and its vCPU state bank."""
    backend = open_backend(backend_name)
    items = [item for _, item in read_items(io.BytesIO(saved_stream(backend, vcpus)), StreamReader())]
    banks = [item for item in items if isinstance(item, EncodedBank)
             and (item.layout.scope, item.layout.phase) == (Scope.VCPU, Phase.STATE)]
    assert len(banks) == 1
    return backend.name, banks[0].decode()


def registers(state: Bank, count: int) -> Bank:
    """`count` 64-bit registers whose values are words of a saved state: those that differ first."""
    differ = (state.values != state.values[0]).any(axis=0)
    order = np.concatenate([np.flatnonzero(differ), np.flatnonzero(~differ & (state.values[0] != 0)),
                            np.flatnonzero(~differ & (state.values[0] == 0))])[:count]
    slots = tuple(Slot(ids.msr_id(FIRST_MSR + k), 8) for k in range(count))
    return Bank(Layout(Scope.VCPU, Phase.STATE, slots), 0, np.ascontiguousarray(state.values[:, np.sort(order)]))


class Ways:
    """The same registers, written and read in each way."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.values = bank, bank.values
        self.ids = [slot.id for slot in bank.layout.slots]
        self.raw = bytes(codec.filter_bank(self.values, codec.DELTA))
        self.packed = codec.compress(self.raw, codec.DEFAULT_LEVEL)[1]
        self.framed = b"".join(self._frame())
        numbers = np.broadcast_to(np.array(self.ids, np.uint64), self.values.shape)
        self.records = np.stack([numbers, self.values], 2).tobytes()
        self.list_form = list(struct.iter_unpack("<QQ", self.records))
        self.schema = Array(self.values.size, Struct("id" / Int64ul, "value" / Int64ul))
        self.containers: list[dict[str, Any] | None] = [{"id": id, "value": value} for id, value in self.list_form]
        self.msgpacked = bytes(msgpack.packb([self.ids, self.values.tolist()]))

    def _frame(self) -> list[bytes | memoryview]:
        return FrameWriter(Arch.X86_64).send(sections.encode_bank(self.bank, 0))

    def _unframe(self) -> None:
        reader = FrameReader()
        reader.feed(FrameWriter(Arch.X86_64).begin())
        reader.feed(self.framed)
        section = reader.next_section()
        assert section is not None
        sections.decode_bank(section, self.bank.layout).decode()

    def things(self) -> dict[str, Callable[[], object]]:
        """Everything that is timed, by name."""
        words, rows = self.bank.layout.row_words, self.bank.rows
        turned = np.ascontiguousarray(self.values.T)
        big = zstandard.ZstdCompressor(level=codec.DEFAULT_LEVEL)
        whole = self.values.tobytes()
        whole_packed = big.compress(whole)
        return {
            "migstream build": lambda: codec.filter_bank(self.values, codec.DELTA),
            "migstream encode": self._frame,
            "migstream decode": self._unframe,
            "migstream parse": lambda: codec.unfilter_bank(self.raw, codec.DELTA, rows, words),
            "zstd alone, compress": lambda: big.compress(self.raw),
            "zstd alone, decompress": lambda: zstandard.ZstdDecompressor().decompress(self.packed),
            "zstd on the whole matrix, compress": lambda: big.compress(whole),
            "zstd on the whole matrix, decompress": lambda: zstandard.ZstdDecompressor().decompress(whole_packed),
            "transpose": lambda: np.ascontiguousarray(self.values.T),
            "transpose back": lambda: np.ascontiguousarray(turned.T),
            "memcpy": lambda: self.values.copy(),
            "struct build": lambda: b"".join(struct.pack("<QQ", id, value) for id, value in self.list_form),
            "struct parse": lambda: list(struct.iter_unpack("<QQ", self.records)),
            "msgpack build": lambda: msgpack.packb([self.ids, self.values.tolist()]),
            "msgpack parse": lambda: msgpack.unpackb(self.msgpacked),
            "construct build": lambda: self.schema.build(self.containers),
            "construct parse": lambda: self.schema.parse(self.records),
        }


SLOW = {"construct build": 2, "construct parse": 2, "struct build": 9, "struct parse": 9, "msgpack build": 9,
        "msgpack parse": 9}
"""Rounds of what takes a second or many milliseconds."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rounds", type=number_of_rounds, default=31, help="interleaved rounds")
    parser.add_argument("--backend", default="auto", help="where the guest is saved: auto, kvm, sim")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """See `measure`."""
    return measure(options.rounds, options.backend, tell)


def measure(rounds: int, backend: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure and return the document that `--json` prints. Times in ns, sizes in bytes."""
    tell(f"saving a guest of {VCPUS} vCPUs mid-run")
    where, state = saved_state(VCPUS, backend)
    ways = Ways(registers(state, REGISTERS))
    timings = interleaved(ways.things(), rounds, SLOW, tell)
    level1 = zstandard.ZstdCompressor(level=1)
    whole_state = sections.encode_bank(state, 0)
    records = sum(slot.size + 8 for slot in state.layout.slots) * state.rows
    return {
        "machine": machine(), "values_from": where, "vcpus": VCPUS, "registers": REGISTERS, "rounds": rounds,
        "median_ns": {name: timing.median for name, timing in timings.items()},
        "p99_ns": {name: timing.p99 for name, timing in timings.items()},
        "ratios": _ratios(timings),
        "bytes": {"id+value records": len(ways.records), "the same, zstd 1": len(level1.compress(ways.records)),
                  "bank, zstd 1": len(ways.packed), "whole vCPU state, id+value records": records,
                  "whole vCPU state, bank, zstd 1": len(whole_state.stored),
                  "the same without XMM registers": len(sections.encode_bank(without_xmm(state), 0).stored)},
    }


def _ratios(timings: dict[str, Timing]) -> dict[str, float]:
    def ratio(a: str, *b: str) -> float:
        return timings[a].median / sum(timings[name].median for name in b)

    zstd, unzstd = "zstd alone, compress", "zstd alone, decompress"
    return {
        "encode / zstd on the same bytes + plain transpose": ratio("migstream encode", zstd, "transpose"),
        "decode / zstd on the same bytes + plain transpose": ratio("migstream decode", unzstd, "transpose back"),
        "encode / zstd on the same bytes + filter": ratio("migstream encode", zstd, "migstream build"),
        "decode / zstd on the same bytes + filter": ratio("migstream decode", unzstd, "migstream parse"),
        "encode / zstd on the same bytes": ratio("migstream encode", zstd),
        "decode / zstd on the same bytes": ratio("migstream decode", unzstd),
        "encode / zstd on the whole matrix": ratio("migstream encode", "zstd on the whole matrix, compress"),
        "decode / zstd on the whole matrix": ratio("migstream decode", "zstd on the whole matrix, decompress"),
        "construct build / migstream build": ratio("construct build", "migstream build"),
        "construct parse / migstream parse": ratio("construct parse", "migstream parse"),
        "struct build / migstream build": ratio("struct build", "migstream build"),
        "msgpack build / migstream build": ratio("msgpack build", "migstream build"),
        "migstream build / memcpy": ratio("migstream build", "memcpy"),
    }


def print_result(result: dict[str, Any]) -> None:
    """The document as tables."""
    print_pairs([("codec", f"{VCPUS} vCPUs x {REGISTERS} registers, values of a guest saved on "
                           f"{result['values_from']}; {result['rounds']} interleaved rounds"),
                 ("machine", f"{result['machine']['cpu']}, Python {result['machine']['python']}")])
    count = VCPUS * REGISTERS
    rows = [(name, microseconds(ns), microseconds(result["p99_ns"][name]), f"{ns / count:,.2f}")
            for name, ns in result["median_ns"].items()]
    print_table(Table(("way", ">median us", ">p99 us", ">ns a register"), rows))
    print_table(Table(("ratio", ">x"), [(name, f"{value:,.2f}") for name, value in result["ratios"].items()]))
    small, plain = result["bytes"]["bank, zstd 1"], result["bytes"]["id+value records"]
    state = result["bytes"]["whole vCPU state, bank, zstd 1"]
    whole, still = (result["bytes"][name] for name in ("whole vCPU state, id+value records",
                                                       "the same without XMM registers"))
    print_table(Table(("size", ">bytes"), [(name, str(value)) for name, value in result["bytes"].items()]))
    print_pairs([("bank", f"{plain / small:.1f}:1 against id+value records; whole state "
                          f"{whole / state:.1f}:1, its XMM registers zeroed {whole / still:.0f}:1")])
