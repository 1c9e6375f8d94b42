"""A whole stream: model to bytes to model, and the rules that span sections."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import limits
from migstream.errors import Corrupt, LimitExceeded, StreamError, Truncated
from migstream.model import Arch, Phase, Scope
from migstream.reader import StreamReader
from migstream.sections import EncodedBank
from migstream.transport.streams import verify
from tests import build, strategies
from tests.build import VCPU, VM


@given(strategies.saved(), strategies.levels, strategies.filters, strategies.chunk_sizes)
def test_model_to_bytes_to_model(saved: build.Saved, level: int, how: int, sizes: list[int]) -> None:
    data = build.encode(saved, level=level, how=how)
    assert build.equal(build.decode(data, sizes).saved(), saved)


@given(strategies.saved(), strategies.levels, strategies.filters)
def test_same_state_same_bytes(saved: build.Saved, level: int, how: int) -> None:
    data = build.encode(saved, level=level, how=how)
    assert build.encode(build.decode(data).saved(), level=level, how=how) == data


@given(strategies.saved())
def test_verify_reads_it_all(saved: build.Saved) -> None:
    data = build.encode(saved)
    assert verify(io.BytesIO(data), StreamReader()) == len(data)


def test_what_a_reader_knows_as_it_goes() -> None:
    reader = StreamReader()
    assert (reader.preamble, reader.machine, reader.host, reader.layouts) == (None, None, None, [])
    reader.feed(build.stream(build.mach(3), build.host(), *build.plain()[1:2], end=None))
    while reader.next():
        pass
    assert reader.preamble is not None and reader.preamble.arch == Arch.X86_64
    assert reader.machine is not None and reader.machine.vcpus == 3
    assert reader.host is not None and reader.host.kernel == "6.18.5"
    assert [(layout.scope, layout.phase) for layout in reader.layouts] == [(Scope.VM, Phase.FEATURE)]


@pytest.mark.parametrize("call", ("feed", "next", "end_of_input"))
def test_dead_after_an_error_of_any_layer(call: str) -> None:
    reader = StreamReader()
    reader.feed(build.stream(build.mach(), build.mach()))
    assert reader.next()
    with pytest.raises(Corrupt) as first:
        reader.next()
    arguments = [b""] if call == "feed" else []
    with pytest.raises(Corrupt) as again:
        getattr(reader, call)(*arguments)
    assert again.value is first.value


def test_next_after_the_end() -> None:
    read = build.decode(build.stream(build.mach()))
    assert read.reader.next() is None
    read.reader.end_of_input()


def read_error(*parts: build.Part) -> StreamError | None:
    """What a reader says of these sections."""
    try:
        build.decode(build.stream(*parts))
    except StreamError as error:
        return error
    return None


def _layout(number: int) -> build.Part:
    return build.regl(VM, 3, (build.STRUCT | 0x8000 + number, 8))


def _bank(number: int) -> build.Part:
    return build.bank(number, [[number]], scope=VM)


SKIPPABLE = build.Part(b"XTRA", flags=0)

# What is counted over a whole stream: (sections for a count of n, limit).
LIMITS: dict[str, tuple[Callable[[int], list[build.Part]], int]] = {
    "layouts": (lambda n: [*map(_layout, range(n)), *map(_bank, range(n))], limits.MAX_LAYOUTS),
    "skipped": (lambda n: [SKIPPABLE] * n, limits.MAX_SKIPPED),
}


@pytest.mark.parametrize("what", LIMITS)
@pytest.mark.parametrize("beyond", (-1, 0, 1))
def test_counts_over_a_stream(what: str, beyond: int) -> None:
    sections, limit = LIMITS[what]
    error = read_error(build.mach(), *sections(limit + beyond))
    assert type(error) is (LimitExceeded if beyond > 0 else type(None))


@pytest.mark.parametrize("beyond", (0, 1))
def test_memory_regions_at_their_limit(beyond: int) -> None:
    memory = [[2 * n * 4096, 4096] for n in range(limits.MAX_REGIONS + beyond)]
    ram = [build.raml(*((address, size) for address, size in memory)),
           build.ramp(*((address, 1, 1) for address, _ in memory))]
    assert type(read_error(build.mach(memory=memory), *ram)) is (LimitExceeded if beyond else type(None))


def test_opaque_state_over_a_stream() -> None:
    """64 MiB in sections of a few hundred bytes: what a restorer would have to hold is limited, not only each part."""
    head = b"\x82\xa4data\xc6" + (limits.MAX_RAW - 64).to_bytes(4, "big")
    tail = b"\xa4name\xa1d"
    raw = len(head) + limits.MAX_RAW - 64 + len(tail)
    part = build.Part(b"OPAQ", build.zstd_frame(build.zstd_blocks(head, (0, limits.MAX_RAW - 64), tail), raw),
                      codec=1, raw_length=raw)
    fits = limits.MAX_OPAQUE // raw
    assert read_error(build.mach(), *[part] * fits) is None
    assert type(read_error(build.mach(), *[part] * (fits + 1))) is LimitExceeded


@pytest.mark.parametrize("scope", (VM, VCPU))
@pytest.mark.parametrize("beyond", (0, 8))
def test_rows_over_a_stream(scope: int, beyond: int) -> None:
    sizes = [limits.MAX_ROW] * (limits.MAX_STATE // limits.MAX_ROW) + [beyond] * (beyond > 0)
    layouts = [build.regl(scope, 4, (build.STRUCT | 0x8000 + n, size)) for n, size in enumerate(sizes)]
    banks = [build.bank(n, [[0] * (size // 8)], scope=scope) for n, size in enumerate(sizes)]
    assert type(read_error(build.mach(), *layouts, *banks)) is (LimitExceeded if beyond else type(None))


def test_as_many_vcpus_as_allowed_in_as_many_banks() -> None:
    banks = [build.bank(0, [[k]], first=k) for k in range(limits.MAX_VCPUS)]
    layout = build.regl(VCPU, 4, (build.LSTAR, 8))
    read = build.decode(build.stream(build.mach(limits.MAX_VCPUS), layout, *banks))
    rows = [item.decode().values[0, 0] for _, item in read.items if isinstance(item, EncodedBank)]
    assert rows == list(range(limits.MAX_VCPUS))


@given(st.integers(1, 40), st.lists(st.integers(1, 39), max_size=5))
def test_any_split_of_the_vcpus(vcpus: int, cuts: list[int]) -> None:
    edges = sorted({0, vcpus, *(cut for cut in cuts if cut < vcpus)})
    banks = [build.bank(0, [[k] for k in range(a, b)], first=a, filter=2)
             for a, b in pairwise(edges)]
    layout = build.regl(VCPU, 4, (build.LSTAR, 8))
    assert read_error(build.mach(vcpus), layout, *banks) is None
    error = read_error(build.mach(vcpus), layout, *banks[:-1])
    assert error is not None and error.section.endswith("END")


def test_a_socket_that_closes_early() -> None:
    data = build.stream(*build.plain(2))
    with pytest.raises(Truncated) as caught:
        verify(io.BytesIO(data[:-1]), StreamReader())
    assert caught.value.offset == len(data) - 1
