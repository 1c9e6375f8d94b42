"""The words of a `struct kvm_cpuid2` (include/uapi/asm/kvm.h of x86)."""

from __future__ import annotations

import struct


def cpuid_words(value: bytes) -> dict[tuple[int, int, int], int]:
    """Words of a `struct kvm_cpuid2` by leaf, subleaf and 0 to 3 for EAX to EDX."""
    (count,) = struct.unpack_from("<I", value)
    out: dict[tuple[int, int, int], int] = {}
    for at in range(8, min(8 + 40 * count, len(value) - 39), 40):
        function, index, _, *words = struct.unpack_from("<7I", value, at)
        out |= {(function, index, n): word for n, word in enumerate(words)}
    return out
