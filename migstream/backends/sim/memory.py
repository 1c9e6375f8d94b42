"""Guest RAM of a simulated VM."""

from __future__ import annotations

import errno
import mmap

from migstream.backends.base import GuestMemory, no_memory
from migstream.errors import BackendError
from migstream.model import PAGE, MemoryRegion

_MAX_ADDRESS = 1 << 52
"""First guest-physical address that no memory slot may reach (kvm_mmu_max_gfn without hardware paging)."""


class Memory:
    """The mappings behind a VM's RAM; whoever made the VM closes them."""

    def __init__(self) -> None:
        self._mappings: list[mmap.mmap] = []

    def build(self, regions: tuple[MemoryRegion, ...]) -> GuestMemory:
        """Map all regions. Raises: BackendError as KVM_SET_USER_MEMORY_REGION would."""
        parts = [(region, self._add(region, regions[:number])) for number, region in enumerate(regions)]
        return GuestMemory(parts, self._discard)

    def _add(self, region: MemoryRegion, before: tuple[MemoryRegion, ...]) -> memoryview:
        try:
            mapping = mmap.mmap(-1, region.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise no_memory(region, getattr(error, "errno", 0) or errno.ENOMEM) from error
        self._mappings.append(mapping)
        if no := _errno(region, before):
            raise BackendError("KVM_SET_USER_MEMORY_REGION", errno=no, register=f"{region.guest_address:#x}")
        return memoryview(mapping)

    def _discard(self, part: int, start: int, length: int) -> None:
        self._mappings[part].madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Give the memory back; the views of it must be released before."""
        for mapping in self._mappings:
            mapping.close()
        self._mappings = []


def _errno(region: MemoryRegion, before: tuple[MemoryRegion, ...]) -> int:
    """KVM_SET_USER_MEMORY_REGION beside the regions that are there (kvm_set_memory_region)."""
    if region.guest_address % PAGE or region.size % PAGE or not region.size or region.end > _MAX_ADDRESS:
        return errno.EINVAL
    overlaps = any(region.guest_address < other.end and other.guest_address < region.end for other in before)
    return errno.EEXIST if overlaps else 0
