"""Register ids: KVM's own, and the namespace of ours for what KVM gives no id.

KVM's ids keep the architecture in bits 63:56 (Documentation/virt/kvm/api.rst, KVM_GET_ONE_REG). Ours have 0xf0
there, which no kernel uses:

| bits  | meaning                                                                                    |
|-------|--------------------------------------------------------------------------------------------|
| 63:56 | 0xf0                                                                                       |
| 55:48 | class: 1 a struct of KVM's UAPI, 2 an enabled capability, 3 a device attribute             |
| 47:32 | class 1 and 2: architecture (ELF machine, 0 = any) · class 3: device type 47:40, group 39:32 |
| 31:0  | class 1: number of the struct · class 2: capability · class 3: low half of the attribute   |
"""

from __future__ import annotations

from migstream.model import OURS as OURS
from migstream.model import Arch

STRUCT, CAPABILITY, ATTRIBUTE = 1, 2, 3

KVM_REG_X86_MSR = 0x2030_0002_0000_0000
"""KVM_REG_X86 | SIZE_U64 | type 2 (MSR) << 32; Linux 6.18 arch/x86/include/uapi/asm/kvm.h."""

KVM_REG_X86_KVM = 0x2030_0003_0000_0000
"""The same with type 3: registers that KVM itself defines."""

KVM_REG_ARM_SCOPE_VM = 1 << 28
"""Set in the id of a VM-scoped arm64 register where a kernel has KVM_CAP_ARM_REG_SCOPE (proposed, not merged)."""

X86_VCPU_FD, ARM64_VCPU_FD, ARM64_VM_FD = 0x00, 0xFE, 0xFD
"""Device types of `attribute_id` for the attributes of a vCPU's or VM's own file descriptor: no device has these
numbers, and the same group and attribute mean different things on two architectures."""

_KERNEL_ARCH = {0x20: Arch.X86_64, 0x60: Arch.ARM64}


def struct_id(arch: Arch, number: int) -> int:
    """Id of a fixed struct of KVM's UAPI."""
    return OURS << 56 | STRUCT << 48 | arch << 32 | number


def capability_id(arch: Arch, capability: int) -> int:
    """Id of a capability that was enabled with KVM_ENABLE_CAP."""
    return OURS << 56 | CAPABILITY << 48 | arch << 32 | capability


_ARM64_DEVICES = (5, 7, 8, 10, ARM64_VCPU_FD, ARM64_VM_FD)
"""KVM_DEV_TYPE_* that only arm64 has: GICv2, GICv3, ITS, paravirtual time; and its file descriptors."""


def attribute_id(device: int, group: int, attribute: int) -> int:
    """Id of a device attribute; device 0 is the file descriptor of an x86-64 vCPU or of a VM."""
    return OURS << 56 | ATTRIBUTE << 48 | device << 40 | group << 32 | attribute


def msr_id(index: int) -> int:
    """Id of an MSR: the kernel's ONE_REG id, used for it on every kernel."""
    return KVM_REG_X86_MSR | index


def msr_index(id: int) -> int | None:
    """The MSR that an id names, None for any other id."""
    return id & 0xFFFF_FFFF if id & ~0xFFFF_FFFF == KVM_REG_X86_MSR else None


def capability_number(id: int) -> int | None:
    """The capability that an id names, None for any other id."""
    return id & 0xFFFF_FFFF if id >> 48 == OURS << 8 | CAPABILITY else None


def arch_of(id: int) -> Arch | None:
    """Architecture that an id belongs to, None where it doesn't say or isn't known."""
    if id >> 56 != OURS:
        return _KERNEL_ARCH.get(id >> 56)
    if id >> 48 & 0xFF == ATTRIBUTE:
        return Arch.ARM64 if id >> 40 & 0xFF in _ARM64_DEVICES else None
    machine = id >> 32 & 0xFFFF
    return Arch(machine) if machine in list(Arch) else None


def size_in_id(id: int) -> int | None:
    """Bytes that a kernel id states for its register; None for an id of ours (its layout alone says)."""
    return None if id >> 56 == OURS else 1 << (id >> 52 & 0xF)
