"""What `check` says of XSAVE by component and of CPUID, and what this machine's own KVM answers: not the lab's CPU."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from migstream.backends import open_backend
from migstream.backends.base import Backend
from migstream.host import profiles
from migstream.host.profile import HostProfile, shown_cpuid
from migstream.host.scratch import scratch_vm
from migstream.model import Slot
from migstream.registers import x86_64
from migstream.registers.bit_tables import BITS
from migstream.registers.cpuid import COMPUTED, STATE_BITS, cpuid_words
from migstream.verdicts.facts import Pair
from migstream.verdicts.guest import fresh
from migstream.verdicts.judge import judge
from migstream.verdicts.model import Column, Kernel
from migstream.verdicts.x86_64 import components
from tests.verdicts.test_rules import with_words

pytestmark = pytest.mark.kvm

_ALWAYS = 0b11


@pytest.fixture(scope="module")
def backend() -> Backend:
    return open_backend("kvm")


def said(host: HostProfile, id: int, value: bytes) -> Kernel:
    made, slot = fresh(host), Slot(id, len(value))
    return judge(Pair(replace(made, columns={**made.columns, id: Column.of(slot, value)}), host), slot).kernel


@pytest.mark.parametrize("bit", range(20))
def test_a_component_in_use(backend: Backend, bit: int) -> None:
    """KVM_SET_XSAVE takes what the CPU has, component by component, and refuses the others."""
    host = backend.profile()
    with scratch_vm(backend) as scratch:
        scratch.write(x86_64.CPUID2.id, host.cpuid, 0)
        size = host.sizes[x86_64.XSAVE.id]
        value = bytearray(_bytes(scratch.read(x86_64.XSAVE.id, size, 0)))
        struct.pack_into("<Q", value, 512, _ALWAYS | 1 << bit)
        errno = scratch.write(x86_64.XSAVE.id, bytes(value), 0)
    predicted = said(host, x86_64.XSAVE.id, bytes(value))
    assert (predicted == Kernel.REFUSES) == bool(errno), f"{_name(bit)}: errno {errno}"
    assert bool(errno) == (not components(host.cpuid) >> bit & 1 and bit > 1)


@pytest.mark.parametrize("width", [0, 48, 52, 57])
def test_linear_addresses(backend: Backend, width: int) -> None:
    host = backend.profile()
    table = with_words(host.cpuid, {(0x8000_0008, 0, 0): width << 8 | 40})
    with scratch_vm(backend) as scratch:
        errno = scratch.write(x86_64.CPUID2.id, table, 0)
    assert (said(host, x86_64.CPUID2.id, table) == Kernel.REFUSES) == bool(errno), f"errno {errno}"


def test_a_component_that_a_process_has_to_ask_for(backend: Backend) -> None:
    host = backend.profile()
    table = with_words(host.cpuid, {(0xD, 0, 0): components(host.cpuid) & 0xFFFF_FFFF | 1 << 18})
    with scratch_vm(backend) as scratch:
        errno = scratch.write(x86_64.CPUID2.id, table, 0)
    assert (said(host, x86_64.CPUID2.id, table) == Kernel.REFUSES) == bool(errno), f"errno {errno}"


def _bytes(value: bytes | int) -> bytes:
    assert isinstance(value, bytes), f"errno {value}"
    return value


def _name(bit: int) -> str:
    return next((field.name for field in BITS["XCR0"] if field.low == bit), f"bit {bit}")


def test_what_a_host_shows_whatever_is_written(backend: Backend) -> None:
    """The supported CPUID reads back as `shown_cpuid` has it of the recorded profile: a baseline goes by that."""
    recorded = profiles.recorded(backend.profile())
    if recorded is None:
        pytest.skip("no recorded profile of this machine's kernel and CPU")
    with scratch_vm(backend) as scratch:
        scratch.write(x86_64.CPUID2.id, recorded.cpuid, 0)
        found = cpuid_words(_bytes(scratch.read(x86_64.CPUID2.id, len(recorded.cpuid), 0)))
    meant = cpuid_words(shown_cpuid(recorded))
    state = STATE_BITS | COMPUTED
    assert {word: found[word] & ~state.get(word, 0) for word in meant} == {
        word: value & ~state.get(word, 0) for word, value in meant.items()}
