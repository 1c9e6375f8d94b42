"""KVM's ioctl numbers, capabilities and struct sizes, as linux/kvm.h and asm/kvm.h fix them.

The numbers carry direction and struct size in their upper half (asm-generic/ioctl.h), so they are stated whole and a
test takes them apart. KVM reuses numbers across kinds of file descriptor: the kind is part of the key.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from migstream.errors import BackendError

API_VERSION = 12


@dataclass(frozen=True, slots=True)
class Request:
    """One ioctl: its name, its number, and the kind of fd that takes it (`system`, `vm`, `vcpu`, `device`)."""

    name: str
    number: int
    fd: str

    @property
    def size(self) -> int:
        """Bytes of the argument's struct, without a flexible array; 0 where the argument is an integer."""
        return self.number >> 16 & 0x3FFF


GET_API_VERSION = Request("KVM_GET_API_VERSION", 0x0000AE00, "system")
CREATE_VM = Request("KVM_CREATE_VM", 0x0000AE01, "system")
GET_MSR_INDEX_LIST = Request("KVM_GET_MSR_INDEX_LIST", 0xC004AE02, "system")
GET_MSR_FEATURE_INDEX_LIST = Request("KVM_GET_MSR_FEATURE_INDEX_LIST", 0xC004AE0A, "system")
CHECK_EXTENSION = Request("KVM_CHECK_EXTENSION", 0x0000AE03, "system")
GET_VCPU_MMAP_SIZE = Request("KVM_GET_VCPU_MMAP_SIZE", 0x0000AE04, "system")
GET_SUPPORTED_CPUID = Request("KVM_GET_SUPPORTED_CPUID", 0xC008AE05, "system")
GET_SYSTEM_ATTR = Request("KVM_GET_DEVICE_ATTR", 0x4018AEE2, "system")
GET_FEATURE_MSRS = Request("KVM_GET_MSRS", 0xC008AE88, "system")

CREATE_VCPU = Request("KVM_CREATE_VCPU", 0x0000AE41, "vm")
SET_USER_MEMORY_REGION = Request("KVM_SET_USER_MEMORY_REGION", 0x4020AE46, "vm")
SET_TSS_ADDR = Request("KVM_SET_TSS_ADDR", 0x0000AE47, "vm")
CREATE_IRQCHIP = Request("KVM_CREATE_IRQCHIP", 0x0000AE60, "vm")
GET_IRQCHIP = Request("KVM_GET_IRQCHIP", 0xC208AE62, "vm")
SET_IRQCHIP = Request("KVM_SET_IRQCHIP", 0x8208AE63, "vm")
CREATE_PIT2 = Request("KVM_CREATE_PIT2", 0x4040AE77, "vm")
GET_PIT2 = Request("KVM_GET_PIT2", 0x8070AE9F, "vm")
SET_PIT2 = Request("KVM_SET_PIT2", 0x4070AEA0, "vm")
GET_CLOCK = Request("KVM_GET_CLOCK", 0x8030AE7C, "vm")
SET_CLOCK = Request("KVM_SET_CLOCK", 0x4030AE7B, "vm")
ENABLE_CAP = Request("KVM_ENABLE_CAP", 0x4068AEA3, "vm")
ARM_PREFERRED_TARGET = Request("KVM_ARM_PREFERRED_TARGET", 0x8020AEAF, "vm")
ARM_SET_COUNTER_OFFSET = Request("KVM_ARM_SET_COUNTER_OFFSET", 0x4010AEB5, "vm")
ARM_GET_REG_WRITABLE_MASKS = Request("KVM_ARM_GET_REG_WRITABLE_MASKS", 0x8040AEB6, "vm")
CREATE_DEVICE = Request("KVM_CREATE_DEVICE", 0xC00CAEE0, "vm")

RUN = Request("KVM_RUN", 0x0000AE80, "vcpu")
GET_REGS = Request("KVM_GET_REGS", 0x8090AE81, "vcpu")
SET_REGS = Request("KVM_SET_REGS", 0x4090AE82, "vcpu")
GET_SREGS = Request("KVM_GET_SREGS", 0x8138AE83, "vcpu")
SET_SREGS = Request("KVM_SET_SREGS", 0x4138AE84, "vcpu")
GET_SREGS2 = Request("KVM_GET_SREGS2", 0x8140AECC, "vcpu")
SET_SREGS2 = Request("KVM_SET_SREGS2", 0x4140AECD, "vcpu")
GET_MSRS = Request("KVM_GET_MSRS", 0xC008AE88, "vcpu")
SET_MSRS = Request("KVM_SET_MSRS", 0x4008AE89, "vcpu")
GET_LAPIC = Request("KVM_GET_LAPIC", 0x8400AE8E, "vcpu")
SET_LAPIC = Request("KVM_SET_LAPIC", 0x4400AE8F, "vcpu")
SET_CPUID2 = Request("KVM_SET_CPUID2", 0x4008AE90, "vcpu")
GET_CPUID2 = Request("KVM_GET_CPUID2", 0xC008AE91, "vcpu")
GET_MP_STATE = Request("KVM_GET_MP_STATE", 0x8004AE98, "vcpu")
SET_MP_STATE = Request("KVM_SET_MP_STATE", 0x4004AE99, "vcpu")
GET_VCPU_EVENTS = Request("KVM_GET_VCPU_EVENTS", 0x8040AE9F, "vcpu")
SET_VCPU_EVENTS = Request("KVM_SET_VCPU_EVENTS", 0x4040AEA0, "vcpu")
GET_DEBUGREGS = Request("KVM_GET_DEBUGREGS", 0x8080AEA1, "vcpu")
SET_DEBUGREGS = Request("KVM_SET_DEBUGREGS", 0x4080AEA2, "vcpu")
SET_TSC_KHZ = Request("KVM_SET_TSC_KHZ", 0x0000AEA2, "vcpu")
GET_TSC_KHZ = Request("KVM_GET_TSC_KHZ", 0x0000AEA3, "vcpu")
GET_XSAVE = Request("KVM_GET_XSAVE", 0x9000AEA4, "vcpu")
SET_XSAVE = Request("KVM_SET_XSAVE", 0x5000AEA5, "vcpu")
GET_XCRS = Request("KVM_GET_XCRS", 0x8188AEA6, "vcpu")
SET_XCRS = Request("KVM_SET_XCRS", 0x4188AEA7, "vcpu")
GET_ONE_REG = Request("KVM_GET_ONE_REG", 0x4010AEAB, "vcpu")
SET_ONE_REG = Request("KVM_SET_ONE_REG", 0x4010AEAC, "vcpu")
GET_REG_LIST = Request("KVM_GET_REG_LIST", 0xC008AEB0, "vcpu")
ARM_VCPU_INIT = Request("KVM_ARM_VCPU_INIT", 0x4020AEAE, "vcpu")
ARM_VCPU_FINALIZE = Request("KVM_ARM_VCPU_FINALIZE", 0x4004AEC2, "vcpu")
GET_NESTED_STATE = Request("KVM_GET_NESTED_STATE", 0xC080AEBE, "vcpu")
SET_NESTED_STATE = Request("KVM_SET_NESTED_STATE", 0x4080AEBF, "vcpu")
GET_XSAVE2 = Request("KVM_GET_XSAVE2", 0x9000AECF, "vcpu")
SET_DEVICE_ATTR = Request("KVM_SET_DEVICE_ATTR", 0x4018AEE1, "device")
GET_DEVICE_ATTR = Request("KVM_GET_DEVICE_ATTR", 0x4018AEE2, "device")
HAS_DEVICE_ATTR = Request("KVM_HAS_DEVICE_ATTR", 0x4018AEE3, "device")

REQUESTS = tuple(value for value in globals().values() if isinstance(value, Request))

CAPABILITIES: dict[str, int] = {
    "IRQCHIP": 0, "NR_VCPUS": 9, "NR_MEMSLOTS": 10, "MP_STATE": 14, "PIT2": 33, "PIT_STATE2": 35,
    "ADJUST_CLOCK": 39, "VCPU_EVENTS": 41, "HYPERV": 44, "DEBUGREGS": 50, "XSAVE": 55, "XCRS": 56,
    "TSC_CONTROL": 60, "GET_TSC_KHZ": 61, "MAX_VCPUS": 66, "ONE_REG": 70, "TSC_DEADLINE_TIMER": 72, "SYNC_REGS": 74,
    "ENABLE_CAP_VM": 98, "VCPU_ATTRIBUTES": 127, "MAX_VCPU_ID": 128, "X2APIC_API": 129, "IMMEDIATE_EXIT": 136,
    "GET_MSR_FEATURES": 153, "NESTED_STATE": 157, "HYPERV_ENLIGHTENED_VMCS": 163, "EXCEPTION_PAYLOAD": 164,
    "SREGS2": 200, "XSAVE2": 208, "SYS_ATTRIBUTES": 209, "VM_TSC_CONTROL": 214, "X86_TRIPLE_FAULT_EVENT": 218,
}
"""Capabilities that a profile states on x86-64, by the kernel's name without `KVM_CAP_` (include/uapi/linux/kvm.h)."""

ARM64_CAPABILITIES: dict[str, int] = {
    "IRQCHIP": 0, "NR_VCPUS": 9, "NR_MEMSLOTS": 10, "MP_STATE": 14, "VCPU_EVENTS": 41, "MAX_VCPUS": 66, "ONE_REG": 70,
    "DEVICE_CTRL": 89, "ARM_EL1_32BIT": 93, "ENABLE_CAP_VM": 98, "VM_ATTRIBUTES": 101, "ARM_PSCI_0_2": 102,
    "ARM_PMU_V3": 126, "VCPU_ATTRIBUTES": 127, "MAX_VCPU_ID": 128, "IMMEDIATE_EXIT": 136,
    "ARM_INJECT_SERROR_ESR": 158, "ARM_VM_IPA_SIZE": 165, "ARM_SVE": 170, "ARM_PTRAUTH_ADDRESS": 171,
    "ARM_PTRAUTH_GENERIC": 172, "ARM_IRQ_LINE_LAYOUT_2": 174, "STEAL_TIME": 187, "PTP_KVM": 198, "ARM_MTE": 205,
    "ARM_REG_SCOPE": 210,
    "ARM_SYSTEM_SUSPEND": 216, "COUNTER_OFFSET": 227, "ARM_SUPPORTED_REG_MASK_RANGES": 230,
    "ARM_WRITABLE_IMP_ID_REGS": 239, "ARM_EL2": 240, "ARM_EL2_E2H0": 241,
}
"""The same on arm64; ARM_REG_SCOPE was proposed and never merged (its number is KVM_CAP_PPC_AIL_MODE_3 on powerpc)."""

_NUMBERS = CAPABILITIES | ARM64_CAPABILITIES

EXIT_REASONS = {0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR",
                17: "INTERNAL_ERROR", 24: "SYSTEM_EVENT", 28: "ARM_NISV"}
"""`kvm_run.exit_reason` values that a guest of ours can meet."""

RUN_IMMEDIATE_EXIT = 1
"""Byte of `struct kvm_run` that makes the next KVM_RUN return at once with EINTR."""

RUN_VALID_REGS, RUN_REGS, RUN_SREGS = 288, 304, 448
"""Byte offsets in x86-64's `struct kvm_run` of what KVM is asked to put there at each exit, and where it puts it."""

RUN_EXIT_REASON = 8
"""Byte offset of the 32-bit `exit_reason` in `struct kvm_run`."""


def call(fd: int, request: Request, argument: int | bytearray | memoryview = 0, *, register: str = "",
         vcpu: int | None = None) -> int:
    """Do one ioctl, in place where the argument is a buffer, and return its result.

    Raises: BackendError with ioctl, register and errno.
    """
    try:
        return ioctl(fd, request, argument)
    except OSError as error:
        raise BackendError(request.name, errno=error.errno or errno.EIO, register=register, vcpu=vcpu) from error


def ioctl(fd: int, request: Request, argument: int | bytearray | memoryview = 0) -> int:
    """fcntl.ioctl, also for an integer that does not fit a C int, which it does not take. Raises: OSError."""
    if not isinstance(argument, int) or -1 << 31 <= argument < 1 << 31:
        return fcntl.ioctl(fd, request.number, argument)
    result = int(_libc_ioctl()(fd, request.number, argument))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@cache
def _libc_ioctl() -> Any:
    function = ctypes.CDLL(None, use_errno=True).ioctl
    function.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
    return function


def check_extension(fd: int, name: str) -> int:
    """Value of a capability on a system or VM fd; 0 where there is none."""
    return call(fd, CHECK_EXTENSION, _NUMBERS[name])


def open_kvm(path: str = "/dev/kvm") -> int:
    """Open the system fd. Raises: OSError."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
