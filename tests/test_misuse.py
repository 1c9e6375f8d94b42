"""The library called with what it can't be: a `UsageError` in words, and no bare exception."""

from __future__ import annotations

from typing import Any

import pytest

from migstream import Arch, Machine, MemoryRegion, UsageError, open_backend
from migstream.demo import run

BACKENDS = (pytest.param("sim:arm64-7.2", marks=pytest.mark.sim), pytest.param("sim:x86_64-7.2", marks=pytest.mark.sim),
            pytest.param("kvm", marks=pytest.mark.kvm))


@pytest.mark.parametrize("name", [None, 5, b"sim", ["sim"]])
def test_a_backend_is_named_by_text(name: Any) -> None:
    with pytest.raises(UsageError, match="name is text"):
        open_backend(name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vcpu", [9, 2, -1])
def test_a_vcpu_that_there_is_not_can_not_be_entered(name: str, vcpu: int) -> None:
    backend = open_backend(name)
    with backend.create(run.machine(backend.arch, 2, 1 << 20)) as vm:
        with pytest.raises(UsageError, match=f"no vCPU {vcpu}: 0 were made"):
            vm.enter(vcpu)
        vm.create_vcpus()
        with pytest.raises(UsageError, match=f"no vCPU {vcpu}: 2 were made, numbered from 0"):
            vm.enter(vcpu)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", ["sve", [4, 20], (4, 20), None, -1, 1 << 64, 4.0])
def test_a_device_value_that_is_no_number_is_refused(name: str, value: Any) -> None:
    backend = open_backend(name)
    device = "vcpu_features" if backend.arch == Arch.ARM64 else "irqchip"
    with pytest.raises(UsageError, match=f"device '{device}': .* is no address, number or flag"):
        backend.create(Machine(backend.arch, 1, (MemoryRegion(0, 1 << 20),), {device: value}))
