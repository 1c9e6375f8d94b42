"""How KVM/arm64 numbers registers, and a name for a number that has no row.

Source: Linux arch/arm64/include/uapi/asm/kvm.h. Bits 63:56 are the architecture, 55:52 the size, 27:16 the class;
each class has its own use of 15:0.
"""

from __future__ import annotations

ARM64 = 0x60 << 56
U32, U64, U128, U256, U512, U2048 = (log2 << 52 for log2 in (2, 3, 4, 5, 6, 8))
CORE, DEMUX, SYSREG, FW, SVE, FW_FEAT_BMAP = (number << 16 for number in (0x10, 0x11, 0x13, 0x14, 0x15, 0x16))

CLASS_MASK = 0x0FFF_0000
"""Bits of an id that say its class."""

SLICE_MASK = 0x1F
"""Bits of an SVE register's id that number its slice of 2048 (Z) or 256 (P, FFR) bits; kernels have slice 0 alone."""


def core(word: int, size: int = U64) -> int:
    """Id of a register in struct kvm_regs, at this offset in 32-bit words."""
    return ARM64 | size | CORE | word


def sysreg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """Id of a system register: the operands of its MRS instruction."""
    return ARM64 | U64 | SYSREG | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def firmware(number: int) -> int:
    """Id of a firmware pseudo-register."""
    return ARM64 | U64 | FW | number


def bitmap(number: int) -> int:
    """Id of a firmware feature bitmap."""
    return ARM64 | U64 | FW_FEAT_BMAP | number


def ccsidr(selector: int) -> int:
    """Id of CCSIDR_EL1 as it reads with this value in CSSELR_EL1."""
    return ARM64 | U32 | DEMUX | selector


def zreg(number: int) -> int:
    """Id of the first slice of an SVE vector register."""
    return ARM64 | U2048 | SVE | number << 5


def preg(number: int) -> int:
    """Id of the first slice of an SVE predicate register; 16 is FFR, at base 0x600."""
    return ARM64 | U256 | SVE | 0x400 + (number << 5)


SVE_VLS = ARM64 | U512 | SVE | 0xFFFF


def class_of(id: int) -> int | None:
    """The class of an id of KVM/arm64's, None for any other and for one with bits set that have no meaning."""
    return id & CLASS_MASK if id & ~(0xF << 52 | CLASS_MASK | 0xFFFF) == ARM64 else None


def sysreg_name(id: int) -> str:
    """What the kernel's own sources write for a system register without a name: `ARM64_SYS_REG(3, 0, 1, 2, 3)`."""
    operands = (id >> 14 & 3, id >> 11 & 7, id >> 7 & 15, id >> 3 & 15, id & 7)
    return f"ARM64_SYS_REG({', '.join(map(str, operands))})"
