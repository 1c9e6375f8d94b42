"""Any bytes at all give sections or one of our errors: in bounded time, in bounded memory, and never a wrong good."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.errors import Corrupt, MigstreamError, StreamError, Truncated
from migstream.reader import StreamReader
from migstream.sections import EncodedBank
from migstream.transport.streams import verify
from tests import build, strategies
from tests.bless import good
from tests.bless.files import BAD, FORMATS
from tests.build import guarded

SMALL = good.VECTORS["everything-1"].data
STREAMS = [vector.data for vector in good.VECTORS.values()]

# Every class of hostile input that has broken a save and restore parser somewhere: the vectors that stand for it.
CLASSES: dict[str, tuple[str, ...]] = {
    "zero, huge and off-by-one counts": (
        "vcpus-0", "vcpus-4097", "vcpus-max", "layout-count-more", "layout-count-less", "layout-count-over",
        "layout-count-max", "ram-count-0", "ram-count-max", "ram-count-more", "ram-count-less", "ram-layout-count",
        "ram-layout-count-max", "vcpus-over-header", "vcpus-max-header", "ram-pages-max"),
    "negative numbers": ("vcpus-negative", "memory-negative", "memory-negative-size", "stored-length-2-63"),
    "zero vCPUs, zero registers, empty section": (
        "vcpus-0", "layout-no-register", "bank-no-vcpu", "machine-empty", "layout-empty", "ram-empty", "end-empty",
        "ram-layout-empty", "bank-empty-0", "bank-empty-1", "delta-empty"),
    "length beyond what remains": (
        "stored-length-beyond", "stored-length-max", "msgpack-text-claims", "ram-data-short"),
    "cap plus one": (
        "stored-length-over", "raw-length-over", "layout-count-over", "vcpus-4097", "state-over", "row-over"),
    "duplicate section": ("machine-twice", "host-twice", "ram-layout-twice", "update-twice", "end-twice"),
    "duplicate vCPU": ("vcpu-twice", "vcpu-overlap", "bank-vm-twice"),
    "vCPU index beyond the count": ("vcpu-beyond", "vcpu-beyond-after"),
    "gap in vCPUs": ("vcpu-gap", "vcpu-not-from-0", "vcpu-missing"),
    "register at the wrong scope": ("vm-register-in-vcpu", "vcpu-register-in-vm", "bank-scope", "bank-vm-count"),
    "duplicate register id": ("register-twice", "register-in-two-layouts"),
    "size in the id against the slot": ("slot-size-in-id", "slot-size-known", "slot-size-0", "slot-size-max"),
    "state that contradicts the configuration": (
        "arch-contradicts", "register-of-arm64", "register-of-x86", "ram-layout-outside", "value-cpuid-count",
        "value-nested-size"),
    "missing end": ("missing-end", "only-preamble", "blackout-missing", "prologue-missing", "ram-missing", "ram-none"),
    "bytes after the end": ("after-end", "two-streams", "end-twice"),
    "wrong section order": (
        "machine-not-first", "layout-after-bank", "bank-before-layout", "banks-swapped", "ram-after-blackout",
        "bank-after-opaque", "layout-earlier-phase", "sections-swapped"),
    "unknown critical section": ("unknown-critical", "newer-version", "newer-host-critical"),
    "a critical section passed off as ancillary": ("critical-as-ancillary", "newer-as-ancillary", "end-as-ancillary"),
    "checksum right and content wrong": ("memory-overlaps", "machine-field-missing", "delta-short", "ram-gap"),
    "declared size too small and too big": (
        "zstd-size-small", "zstd-size-lies-small", "zstd-size-lies-large", "raw-length-differs", "bank-short-0",
        "bank-long-1"),
    "bombs": ("zstd-ratio", "zstd-1-tib", "raw-length-1-tib", "bomb-bank", "msgpack-wide-bomb", "bank-matrix-over"),
    "two frames": ("zstd-two-frames", "zstd-junk", "zstd-skippable"),
    "a frame cut short": ("zstd-cut", "zstd-head-cut", "zstd-empty"),
    "reserved bits and padding": (
        "preamble-reserved", "preamble-flags", "header-reserved", "layout-reserved", "slot-reserved", "ram-reserved",
        "ram-run-reserved", "padding", "value-padding", "delta-stray-padding"),
    "non-canonical encodings": (
        "msgpack-wide-integer", "msgpack-wide-text", "msgpack-wide-map", "msgpack-key-order", "msgpack-key-twice",
        "delta-not-canonical", "delta-one-row", "delta-stray-bit"),
    "recursion": ("msgpack-deep", "msgpack-deep-bomb"),
    "extensions": ("msgpack-extension", "msgpack-timestamp"),
    "terminal escapes": ("kind-escape", "devices-escape", "machine-field-escape"),
    "bad UTF-8": ("msgpack-utf8", "msgpack-surrogate"),
    "newer major": ("newer-major", "newer-major-65535"),
    "unknown flag, codec, filter or scope": ("flag-unknown", "codec-unknown", "filter-unknown", "scope-unknown"),
    "RAM out of order, overlapping, outside": (
        "ram-order", "ram-twice", "ram-beyond", "ram-unaligned", "ram-layout-overlap", "ram-layout-wraps"),
}


def outcome(data: bytes) -> MigstreamError | None:
    """None for a good stream, else its error; anything that is not ours goes through and fails the test."""
    try:
        verify(io.BytesIO(data), StreamReader())
    except MigstreamError as error:
        return error
    return None


def _one_row_filters() -> set[int]:
    return {section.offset + 10 for section, item in build.decode(SMALL).items
            if isinstance(item, EncodedBank) and item.rows == 1}


# Bytes of the small stream that can change and say the same.
SAYS_THE_SAME = {
    10, 11,                                         # the minor version
    *_one_row_filters(),                            # of one row, filters 0 and 1 are the same
    SMALL.index(build.ZSTD_MAGIC) + 4,              # zstd's frame head has a bit that nobody uses
}


def same(data: bytes) -> bool:
    """A stream says what the small one says."""
    return build.equal(build.decode(data).saved(), build.decode(SMALL).saved())


def check(error: MigstreamError | None) -> StreamError:
    """The properties that every error of a stream has."""
    assert isinstance(error, StreamError)
    assert error.offset is not None and error.section
    assert error.exit_status in (1, 2, 3, 4)
    assert str(error).isprintable()
    return error


def test_truncated_at_every_byte() -> None:
    with guarded(len(SMALL) / 100):
        for length in range(len(SMALL)):
            error = check(outcome(SMALL[:length]))
            assert (type(error), error.exit_status, error.offset) == (Truncated, 2, length)


@pytest.mark.parametrize("part", range(8))
def test_every_bit_flipped(part: int) -> None:
    with guarded(len(SMALL) / 100):
        for bit in range(part, len(SMALL) * 8, 8):
            data = bytearray(SMALL)
            data[bit // 8] ^= 1 << bit % 8
            error = check(outcome(bytes(data)))
            # a length that grew within the limits is noticed by its own header's checksum, never by waiting
            assert type(error) is Corrupt and error.exit_status == 1 and (error.offset or 0) <= bit // 8


@pytest.mark.parametrize("part", range(8))
def test_every_bit_flipped_and_the_checksums_right(part: int) -> None:
    """Behind the checksums: what is still good says something else, but for the bytes of `SAYS_THE_SAME`."""
    with guarded(len(SMALL) / 50):
        for bit in range(part, len(SMALL) * 8, 8):
            flipped = bytearray(SMALL)
            flipped[bit // 8] ^= 1 << bit % 8
            data = build.resum(bytes(flipped))
            error = outcome(data)
            if data == SMALL:
                continue
            if error is not None:
                check(error)
            else:
                assert not same(data) or bit // 8 in SAYS_THE_SAME


@pytest.mark.parametrize("name", CLASSES)
def test_class_of_hostile_input(name: str) -> None:
    for vector in CLASSES[name]:
        with guarded():
            error = check(outcome(BAD[vector].data))
        assert type(error) is BAD[vector].error


def test_every_vector_is_of_a_class_or_a_plain_mistake() -> None:
    named = {vector for vectors in CLASSES.values() for vector in vectors}
    assert named <= BAD.keys()
    assert len(named) > len(BAD) // 2


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    check(outcome(data))


@given(st.binary(max_size=400), st.sampled_from([32, 80]))
def test_any_bytes_after_a_good_beginning(data: bytes, good_bytes: int) -> None:
    check(outcome(SMALL[:good_bytes] + data))


@given(st.lists(st.builds(
    build.Part, st.sampled_from([b"MACH", b"HOST", b"REGL", b"BANK", b"RAML", b"RAMP", b"OPAQ", b"END ", b"XXXX"]),
    st.binary(max_size=80), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2),
    st.integers(0, 3), st.integers(0, 1), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=6))
def test_any_sections(parts: list[build.Part]) -> None:
    error = outcome(build.stream(*parts))
    assert check(error).exit_status != 2


@given(st.sampled_from([b"MACH", b"HOST", b"REGL", b"RAML", b"RAMP", b"OPAQ"]), st.binary(max_size=200))
def test_any_payload_with_its_checksums_right(kind: bytes, payload: bytes) -> None:
    flags = 0 if kind == b"HOST" else build.CRITICAL
    before = [] if kind == b"MACH" else [build.mach(memory=[[0, 0x4000]])]
    before += [build.raml((0, 0x4000))] if kind == b"RAMP" else []
    check(outcome(build.stream(*before, build.Part(kind, payload, flags=flags, scope=2 * (kind == b"REGL")))))


@settings(max_examples=600)
@given(strategies.broken(STREAMS))
def test_broken_streams_with_their_checksums_right(data: bytes) -> None:
    with guarded():
        error = outcome(data)
    if error is None:
        assert build.equal(build.decode(data).saved(), build.decode(data, [1] * len(data)).saved())
    else:
        check(error)


_PEAK = """
import io, sys
from migstream.errors import MigstreamError
from migstream.reader import StreamReader
from migstream.sections import EncodedBank
from migstream.transport.streams import verify
from tests import build
for name in sys.argv[1:]:
    try:
        verify(io.BytesIO(build.read_hex(name)), StreamReader())
        print("good", name)
    except MigstreamError:
        pass
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_no_vector_takes_much_memory() -> None:
    """The most that a process of its own ever held: 200 MB with Python, numpy and zstd themselves.

    VmHWM, because getrusage() goes on from the process that started it.
    """
    files = sorted(map(str, (FORMATS / "vectors" / "bad").glob("*.hex")))
    done = subprocess.run([sys.executable, "-c", _PEAK, *files], cwd=FORMATS.parent, capture_output=True, text=True,
                          check=True, timeout=60)
    found = re.fullmatch(r"peak (\d+)\n", done.stdout)
    assert found, done.stdout + done.stderr
    assert int(found[1]) < 200_000  # kB


def test_the_guard_guards() -> None:
    with pytest.raises(TimeoutError), guarded(0.01):
        while True:
            pass
