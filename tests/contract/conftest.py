"""The backends that the contract is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migstream.backends.base import Backend, Vm
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from tests.contract.access import create

KVM = pytest.param("kvm", marks=pytest.mark.kvm)
PURE = pytest.param("kvm-pure", marks=pytest.mark.kvm)
BACKENDS = ("sim", KVM, PURE)


def opened(name: str) -> Backend:
    """A backend by the name of its parameter."""
    if name == "sim":
        return SimBackend()
    backend = KvmBackend()
    backend.batched = name == "kvm"
    return backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return opened(request.param)


@pytest.fixture
def vm(backend: Backend) -> Iterator[Vm]:
    """Two vCPUs with the supported CPUID."""
    with create(backend) as made:
        yield made


@pytest.fixture
def recorded_kernel(backend: Backend) -> None:
    """Skip where real KVM is not the one whose answers were recorded: they would say nothing of this one."""
    here, recorded = backend.profile(), SimBackend().profile()
    if (here.msrs, here.cpu) != (recorded.msrs, recorded.cpu):
        pytest.skip(f"the rows were measured on {recorded.cpu} ({recorded.kernel}); this is {here.cpu} ({here.kernel})")
