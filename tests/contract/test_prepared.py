"""Reads and writes that were made ready ahead of a pause do what they do otherwise, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from migstream.backends.base import SHORT_COUNT, Backend, Vm
from migstream.errors import UsageError
from migstream.model import Bank, Layout, Phase, Scope, Slot
from tests.contract.access import CSTAR, LSTAR, STAR, UNKNOWN_MSR, WALL_CLOCK, create, msr, u64, write

VCPUS = 3


@pytest.fixture
def three(backend: Backend) -> Iterator[Vm]:
    with create(backend, VCPUS) as made:
        yield made


def of_vcpus(*indices: int) -> Bank:
    layout = Layout(Scope.VCPU, Phase.STATE, tuple(Slot(msr(index), 8) for index in indices))
    return Bank(layout, 0, np.zeros((VCPUS, layout.row_words), np.uint64))


def of_vm(*indices: int) -> Bank:
    layout = Layout(Scope.VM, Phase.FEATURE, tuple(Slot(msr(index), 8) for index in indices or (WALL_CLOCK,)))
    return Bank(layout, 0, np.zeros((1, layout.row_words), np.uint64))


def test_a_prepared_read_sees_what_is_there_when_it_is_called(three: Vm) -> None:
    banks = [of_vcpus(STAR, LSTAR), of_vm(), of_vcpus(CSTAR)]
    read = three.reading(banks)
    for n in (1, 2):
        for index in (STAR, LSTAR, CSTAR):
            assert write(three, msr(index), [u64(n * 0x1000 + k) for k in range(VCPUS)]) == []
        for bank in banks:
            bank.values.fill(0)
        assert read() == []
        for bank in (banks[0], banks[2]):
            assert bank.values.tolist() == [[n * 0x1000 + k] * bank.layout.row_words for k in range(VCPUS)]


def test_a_prepared_write_writes_what_is_there_when_it_is_called(three: Vm) -> None:
    banks = [of_vcpus(STAR), of_vcpus(LSTAR, CSTAR)]
    todo = three.writing(banks)
    for n in (1, 2):
        for bank in banks:
            bank.values[:] = n * 0x1000 + np.arange(VCPUS, dtype=np.uint64)[:, None]
        assert todo() == []
        assert len(todo.ns) == len(banks)
        assert min(todo.ns) >= 0
        again = [of_vcpus(STAR), of_vcpus(LSTAR, CSTAR)]
        assert three.read_all(again) == []
        assert [bank.values.tolist() for bank in again] == [bank.values.tolist() for bank in banks]


def test_what_a_prepared_call_is_refused_hides_nothing_and_is_said_each_time(three: Vm) -> None:
    bad, good = of_vcpus(UNKNOWN_MSR, STAR), of_vcpus(LSTAR)
    bad.values[:, 1], good.values[:] = 5 << 32, 0x7000
    expected = [(msr(UNKNOWN_MSR), k, SHORT_COUNT) for k in range(VCPUS)]
    todo, look = three.writing([bad, good]), three.reading([bad, good])
    for call in (todo, todo, look, look):
        assert [(no.register, no.vcpu, no.errno) for no in call()] == expected
    assert (bad.values[:, 1].tolist(), good.values[:, 0].tolist()) == ([5 << 32] * VCPUS, [0x7000] * VCPUS)


@pytest.mark.parametrize("vcpus", [(STAR, LSTAR), (STAR, UNKNOWN_MSR), (UNKNOWN_MSR, STAR)], ids=str)
@pytest.mark.parametrize("vm", [(WALL_CLOCK,), (UNKNOWN_MSR,), (WALL_CLOCK, UNKNOWN_MSR), (UNKNOWN_MSR, WALL_CLOCK)],
                         ids=str)
def test_msrs_of_the_vm_are_read_with_a_vcpus_and_neither_hides_the_other(three: Vm, vcpus: tuple[int, ...],
                                                                        vm: tuple[int, ...]) -> None:
    """The compiled part asks for both in one ioctl, which stops at the first MSR that the kernel refuses."""
    for index, value in ((STAR, 0x1000), (LSTAR, 0x2000)):
        assert write(three, msr(index), [u64(value + k) for k in range(VCPUS)]) == []
    assert write(three, msr(WALL_CLOCK), [u64(0x5000)]) == []
    for first in (0, 1):
        banks = [of_vcpus(*vcpus), of_vm(*vm)]
        banks[0] = Bank(banks[0].layout, first, banks[0].values[first:].copy())
        alone = [Bank(bank.layout, bank.first_vcpu, np.zeros_like(bank.values)) for bank in banks]
        expected = [no for bank in alone for no in three.read(bank.layout, bank.first_vcpu, bank.values)]
        assert three.reading(banks)() == expected
        assert [bank.values.tolist() for bank in banks] == [bank.values.tolist() for bank in alone]
        assert {no.vcpu for no in expected} == {
            *(range(first, VCPUS) if UNKNOWN_MSR in vcpus else ()), *((None,) if UNKNOWN_MSR in vm else ())}
        if WALL_CLOCK in vm:
            assert int(banks[1].values[0, vm.index(WALL_CLOCK)]) == 0x5000


def test_msrs_of_the_vm_are_written_after_the_vcpus(three: Vm) -> None:
    banks = [of_vcpus(STAR), of_vm()]
    banks[0].values[:], banks[1].values[:] = 0x1000, 0x5000
    assert three.writing(banks)() == []
    again = [of_vcpus(STAR), of_vm()]
    assert three.read_all(again) == []
    assert [bank.values.tolist() for bank in again] == [bank.values.tolist() for bank in banks]


def test_nothing_is_nothing(three: Vm) -> None:
    todo = three.writing([])
    assert (three.reading([])(), todo(), list(todo.ns)) == ([], [], [])


def test_what_was_prepared_for_a_vm_that_is_closed_is_a_mistake(three: Vm) -> None:
    calls: list[Callable[[], object]] = [three.reading([of_vcpus(STAR)]), three.writing([of_vcpus(STAR)])]
    three.close()
    for call in calls:
        with pytest.raises(UsageError, match="closed"):
            call()
