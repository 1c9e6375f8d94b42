"""What an x86-64 kernel offers, asked on the system fd and, for forced CPUID bits, on a scratch VM."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator, Mapping

from migstream.backends.kvm import uapi
from migstream.backends.kvm.operations import ATTRIBUTE
from migstream.backends.kvm.uapi import Request
from migstream.errors import BackendError
from migstream.host.profile import cpuid_word
from migstream.registers import x86_64 as rows

CPUID_ENTRY = 40
"""Bytes of a struct kvm_cpuid_entry2."""

CPUID_CAPACITY = 256
"""Entries of a table that KVM is asked to fill."""

_MSR_LIST_CAPACITY = 4096


def msr_list(fd: int, request: Request) -> tuple[int, ...]:
    """KVM_GET_MSR_INDEX_LIST, or the feature MSRs', in the kernel's order. Raises: BackendError."""
    buffer = bytearray(4 + 4 * _MSR_LIST_CAPACITY)
    struct.pack_into("<I", buffer, 0, _MSR_LIST_CAPACITY)
    uapi.call(fd, request, buffer)
    (count,) = struct.unpack_from("<I", buffer)
    return struct.unpack_from(f"<{count}I", buffer, 4)


def feature_msr(fd: int, index: int) -> int:
    """KVM_GET_MSRS on the system fd: what the kernel offers of one. Raises: BackendError."""
    buffer = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
    uapi.call(fd, uapi.GET_FEATURE_MSRS, buffer, register=f"{index:#x}")
    return int(struct.unpack_from("<Q", buffer, 16)[0])


def supported_cpuid(fd: int) -> bytes:
    """KVM_GET_SUPPORTED_CPUID: a struct kvm_cpuid2. Raises: BackendError."""
    buffer = bytearray(8 + CPUID_ENTRY * CPUID_CAPACITY)
    struct.pack_into("<I", buffer, 0, CPUID_CAPACITY)
    uapi.call(fd, uapi.GET_SUPPORTED_CPUID, buffer)
    (count,) = struct.unpack_from("<I", buffer)
    return bytes(buffer[:8 + CPUID_ENTRY * count])


def forced_cpuid(kvm_fd: int, supported: bytes) -> dict[int, tuple[int, int]]:
    """Bits that a vCPU of this KVM has though the supported table, which it was given, has not; on a scratch VM.

    Bits that other bits' values or the vCPU's own state switch on may be among them; an experiment tells them apart.
    """
    vm_fd = uapi.call(kvm_fd, uapi.CREATE_VM, 0)
    try:
        vcpu_fd = uapi.call(vm_fd, uapi.CREATE_VCPU, 0)
        try:
            back = bytearray(supported)
            uapi.call(vcpu_fd, uapi.SET_CPUID2, back)
            uapi.call(vcpu_fd, uapi.GET_CPUID2, back)
        finally:
            os.close(vcpu_fd)
    finally:
        os.close(vm_fd)
    return dict(_more_bits(supported, back))


def _more_bits(given: bytes, back: bytes | bytearray) -> Iterator[tuple[int, tuple[int, int]]]:
    for at in range(8, len(given) - CPUID_ENTRY + 1, CPUID_ENTRY):
        function, index = struct.unpack_from("<2I", given, at)
        for register in range(4):
            place = at + 12 + 4 * register
            before, after = (struct.unpack_from("<I", table, place)[0] for table in (given, back))
            if after & ~before:
                yield cpuid_word(function, index, register), (0xFFFF_FFFF, after & ~before)


_XSAVE_LEAF, _XCOMP_GUEST_SUPP = 0xD, 0
"""CPUID leaf; attribute of group 0 of the system fd."""


def xsave_mask(fd: int, capabilities: Mapping[str, int], cpuid: bytes) -> int:
    """Components that guests may have: bits of XCR0 and IA32_XSS."""
    mask = ctypes.c_uint64()
    if capabilities["SYS_ATTRIBUTES"]:
        argument = bytearray(ATTRIBUTE.pack(0, 0, _XCOMP_GUEST_SUPP, ctypes.addressof(mask)))
        with contextlib.suppress(BackendError):
            uapi.call(fd, uapi.GET_SYSTEM_ATTR, argument)
    found = mask.value
    for offset in range(8, len(cpuid), CPUID_ENTRY):
        leaf, index, _, eax, _, ecx, edx = struct.unpack_from("<7I", cpuid, offset)
        if leaf == _XSAVE_LEAF and index < 2:
            found |= edx << 32 | (ecx if index else eax)
    return found


def sizes(capabilities: Mapping[str, int]) -> dict[int, int]:
    """Bytes of the registers whose size the host tells, by id."""
    return {rows.XSAVE.id: max(capabilities["XSAVE2"], 4096), rows.NESTED_STATE.id: capabilities["NESTED_STATE"]}
