"""arm64: what a guest can ask its firmware (KVM) by HVC, and what the answers say of a register that KVM hasn't got.

A kernel that has no register for a firmware interface has a behaviour all the same, and the guest meets it. What it is
comes from asking, never from a version number: distributions carry backports. Sources of the function numbers and
answers: SMC Calling Convention (Arm DEN0028), PSCI (DEN0022), Paravirtualized Time (DEN0057), TRNG (DEN0098); Linux
include/linux/arm-smccc.h, include/uapi/linux/psci.h; who answers when: arch/arm64/kvm/hypercalls.c and psci.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from migstream.registers import arm64_ids

NOT_SUPPORTED = (1 << 64) - 1
"""-1 in X0: SMCCC's and PSCI's word for a call that there isn't. KVM gives 32-bit calls 64 bits of sign, too."""

Answers = Mapping[int, int]
"""X0 after HVC, as an unsigned number, by `key`."""


@dataclass(frozen=True, slots=True)
class Call:
    """A question: W0 and X1 before `hvc #0`; X2 and X3 are 0.

    Attributes:
        clock: the answer is a time: what is kept is 0 where there was one, and NOT_SUPPORTED.
    """

    name: str
    function: int
    argument: int = 0
    clock: bool = False

    @property
    def key(self) -> int:
        """The number under which its answer is kept: function in the upper half, argument in the lower."""
        return self.function << 32 | self.argument

    def answer(self, x0: int) -> int:
        """What is kept of X0."""
        if not supported(x0):
            return NOT_SUPPORTED
        return 0 if self.clock else x0


def supported(x0: int) -> bool:
    """False where X0 says -1, in 64 bits or in the 32 of a 32-bit call."""
    return x0 not in (NOT_SUPPORTED, 0xFFFF_FFFF)


_ARCH_FEATURES, _PSCI_FEATURES = 0x8000_0001, 0x8400_000A
PSCI_VERSION = Call("PSCI_VERSION", 0x8400_0000)
SMCCC_VERSION = Call("SMCCC_VERSION", 0x8000_0000)
WORKAROUND_1 = Call("SMCCC_ARCH_FEATURES(ARCH_WORKAROUND_1)", _ARCH_FEATURES, 0x8000_8000)
WORKAROUND_2 = Call("SMCCC_ARCH_FEATURES(ARCH_WORKAROUND_2)", _ARCH_FEATURES, 0x8000_7FFF)
WORKAROUND_3 = Call("SMCCC_ARCH_FEATURES(ARCH_WORKAROUND_3)", _ARCH_FEATURES, 0x8000_3FFF)
PV_TIME = Call("SMCCC_ARCH_FEATURES(PV_TIME_FEATURES)", _ARCH_FEATURES, 0xC500_0020)
TRNG_VERSION = Call("TRNG_VERSION", 0x8400_0050)
VENDOR_UID = Call("KVM_CALL_UID", 0x8600_FF01)
VENDOR_FEATURES = Call("KVM_FEATURES", 0x8600_0000)
PTP = Call("KVM_PTP", 0x8600_0001, clock=True)
IMPL_VERSION = Call("KVM_DISCOVER_IMPL_VER", 0xC600_0040)
IMPL_CPUS = Call("KVM_DISCOVER_IMPL_CPUS", 0xC600_0041)

_PSCI_FUNCTIONS = {
    "CPU_SUSPEND": 0xC400_0001, "CPU_OFF": 0x8400_0002, "CPU_ON": 0xC400_0003, "AFFINITY_INFO": 0xC400_0004,
    "MIGRATE_INFO_TYPE": 0x8400_0006, "SYSTEM_OFF": 0x8400_0008, "SYSTEM_RESET": 0x8400_0009,
    "PSCI_FEATURES": 0x8400_000A, "SYSTEM_SUSPEND": 0xC400_000E, "SYSTEM_RESET2": 0xC400_0012,
    "SYSTEM_OFF2": 0xC400_0015, "SMCCC_VERSION": 0x8000_0000,
}
CALLS: tuple[Call, ...] = (
    PSCI_VERSION, SMCCC_VERSION, WORKAROUND_1, WORKAROUND_2, WORKAROUND_3, PV_TIME,
    Call("PV_TIME_FEATURES(PV_TIME_FEATURES)", 0xC500_0020, 0xC500_0020),
    TRNG_VERSION, Call("TRNG_FEATURES(TRNG_RND64)", 0x8400_0051, 0xC400_0053),
    VENDOR_UID, VENDOR_FEATURES, PTP, IMPL_VERSION, IMPL_CPUS,
    *(Call(f"PSCI_FEATURES({name})", _PSCI_FEATURES, function) for name, function in _PSCI_FUNCTIONS.items()),
)
"""All questions: harmless ones, which change nothing and give the same answer whenever they are asked."""

CALL_NAMES: dict[int, str] = {call.key: call.name for call in CALLS}


@dataclass(frozen=True, slots=True)
class Absent:
    """What a kernel without this register behaves as.

    Attributes:
        register: KVM's id. asked: the calls whose answers tell it.
        value: from these answers, in their order, to the register's value.
        why: reason, with its source.
    """

    register: int
    asked: tuple[Call, ...]
    value: Callable[..., int]
    why: str


def _bits(*answers: int) -> int:
    """One bit for each call, lowest first: set where it is answered."""
    return sum(1 << bit for bit, x0 in enumerate(answers) if supported(x0))


def _level(x0: int) -> int:
    """NOT_AVAIL 0, AVAIL 1, NOT_REQUIRED 2, from -1, 0 and 1 (SMCCC_ARCH_WORKAROUND_RET_UNAFFECTED)."""
    return {0: 1, 1: 2}.get(x0, 0)


def _level_2(x0: int) -> int:
    """NOT_AVAIL 0, AVAIL 2, NOT_REQUIRED 3, from -1, 0, and 1 or -2 (SMCCC_RET_NOT_REQUIRED)."""
    return {0: 2, 1: 3, (1 << 64) - 2: 3, 0xFFFF_FFFE: 3}.get(x0, 0)


_UPPER = "a bit is one service; the register would be the upper limit of what is answered (fw-pseudo-registers.rst)"
ABSENT: tuple[Absent, ...] = (
    Absent(arm64_ids.firmware(0), (PSCI_VERSION,), lambda x0: x0 & 0xFFFF_FFFF,
           "before 4.17 there is no register; the version is what PSCI_VERSION says (psci.c, kvm_psci_version)"),
    Absent(arm64_ids.firmware(1), (WORKAROUND_1,), _level,
           "before 5.3 there is no register; ARCH_FEATURES answers from the same state (hypercalls.c)"),
    Absent(arm64_ids.firmware(2), (WORKAROUND_2,), _level_2,
           "before 5.3 there is no register; ARCH_FEATURES answers from the same state (hypercalls.c)"),
    Absent(arm64_ids.firmware(3), (WORKAROUND_3,), _level,
           "before 5.18 and its backports there is no register, and the call is not known (hypercalls.c)"),
    Absent(arm64_ids.bitmap(0), (TRNG_VERSION,), _bits, f"bit 0, TRNG_V1_0: since 5.19 a register; {_UPPER}"),
    Absent(arm64_ids.bitmap(1), (PV_TIME,), _bits,
           "bit 0, PV_TIME: there since 5.5, a register since 5.19; ARCH_FEATURES tells whether it is answered, also "
           f"where the VMM gave it no memory; {_UPPER}"),
    Absent(arm64_ids.bitmap(2), (VENDOR_UID, PTP), _bits,
           f"bit 0, FUNC_FEAT: UID and features; bit 1, PTP; {_UPPER}"),
    Absent(arm64_ids.bitmap(3), (IMPL_VERSION, IMPL_CPUS), _bits,
           "target implementation: since 6.15, with a register; 0 there unless a VMM asks for it"),
)
"""One row a firmware register."""


def behaves_as(answers: Answers, listed: frozenset[int]) -> tuple[dict[int, bytes], dict[int, str], tuple[str, ...]]:
    """Return, for firmware registers that are not in `listed`: values, how each was found, and what is not known.

    Args:
        answers: what a scratch guest of the kernel was told; a call that was not asked is missing.
        listed: KVM_GET_REG_LIST.
    """
    values, how, unknown = {}, {}, []
    for row in (row for row in ABSENT if row.register not in listed):
        missing = [call.name for call in row.asked if call.key not in answers]
        if missing:
            unknown.append(f"{_name(row)}: this kernel has none, and nobody asked it {' and '.join(missing)}")
            continue
        found = [answers[call.key] for call in row.asked]
        values[row.register] = row.value(*found).to_bytes(8, "little")
        how[row.register] = "; ".join(f"{call.name}: {words(x0)}" for call, x0 in zip(row.asked, found, strict=True))
    return values, how, tuple(unknown)


def _name(row: Absent) -> str:
    from migstream.registers.catalogue import lookup

    return lookup(row.register).name


def words(x0: int) -> str:
    """An answer for people."""
    return f"{x0:#x}" if supported(x0) else "not supported"
