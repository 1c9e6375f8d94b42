"""arm64: the features that a vCPU can be made with (KVM_ARM_VCPU_INIT, arch/arm64/include/uapi/asm/kvm.h).

They are the machine's: KVM wants the same on every vCPU of a VM. POWER_OFF is not here, because it is no property but a
state: KVM_MP_STATE carries it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Feature:
    """One bit of `kvm_vcpu_init.features` and the capability that a kernel with it has."""

    bit: int
    name: str
    capability: str

    @property
    def mask(self) -> int:
        """The bit as a number."""
        return 1 << self.bit


FEATURES: tuple[Feature, ...] = (
    Feature(1, "EL1_32BIT", "ARM_EL1_32BIT"),
    Feature(2, "PSCI_0_2", "ARM_PSCI_0_2"),
    Feature(3, "PMU_V3", "ARM_PMU_V3"),
    Feature(4, "SVE", "ARM_SVE"),
    Feature(5, "PTRAUTH_ADDRESS", "ARM_PTRAUTH_ADDRESS"),
    Feature(6, "PTRAUTH_GENERIC", "ARM_PTRAUTH_GENERIC"),
    Feature(7, "HAS_EL2", "ARM_EL2"),
    Feature(8, "HAS_EL2_E2H0", "ARM_EL2_E2H0"),
)

EL1_32BIT, PSCI_0_2, PMU_V3, SVE = 1 << 1, 1 << 2, 1 << 3, 1 << 4
PTRAUTH = 1 << 5 | 1 << 6
"""Address and generic: KVM wants both or neither."""

GROUPS = (PMU_V3, SVE, PTRAUTH)
"""Features that change what a kernel lists, as they can be asked for."""

DEPENDENT: dict[str, int] = {
    "ID_AA64PFR0_EL1": SVE, "ID_AA64ZFR0_EL1": SVE, "ID_AA64DFR0_EL1": PMU_V3, "ID_DFR0_EL1": PMU_V3,
    "ID_AA64ISAR1_EL1": PTRAUTH, "ID_AA64ISAR2_EL1": PTRAUTH,
}
"""ID registers whose default and writable bits depend on a feature (arch/arm64/kvm/sys_regs.c, sanitized per vCPU)."""

DEFAULT = PSCI_0_2
"""What a machine has that doesn't say."""


def names(mask: int) -> list[str]:
    """The features in a mask, by name; a bit without one as `bit 9`."""
    known = {feature.bit: feature.name for feature in FEATURES}
    return [known.get(bit, f"bit {bit}") for bit in range(mask.bit_length()) if mask >> bit & 1]


def offered(capabilities: dict[str, int]) -> int:
    """The mask of features that a kernel with these capabilities takes."""
    return sum(feature.mask for feature in FEATURES if capabilities.get(feature.capability))


def together(mask: int) -> int:
    """A mask of the features that one vCPU can have all at once."""
    return mask & sum(GROUPS)


def whole(mask: int) -> int:
    """A mask with the other half of pointer authentication, which only comes in a pair."""
    return mask | PTRAUTH if mask & PTRAUTH else mask


WORDS: dict[str, int] = {**{feature.name.lower(): feature.mask for feature in FEATURES}, "ptrauth": PTRAUTH}
"""What people write for a feature."""


def parse(text: str) -> int:
    """The mask of a list such as `sve,pmu_v3,ptrauth`, with what every machine has. Raises: KeyError with the word."""
    return DEFAULT | sum({word: WORDS[word] for word in text.lower().split(",") if word}.values())
