"""The ioctls of an arm64 vCPU, one call each, with their answer: what the simulator is compared with."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

from migstream.backends.kvm import uapi

Answer = tuple[int, bytes]
"""errno (0 = good) and what was read."""

MEMORY = 1 << 20


class RealArm64:
    """A VM of real KVM/arm64 with some vCPUs that nothing was done to."""

    def __init__(self, vcpus: int) -> None:
        self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        bits = fcntl.ioctl(self._kvm, uapi.CHECK_EXTENSION.number, uapi.ARM64_CAPABILITIES["ARM_VM_IPA_SIZE"])
        self._vm = fcntl.ioctl(self._kvm, uapi.CREATE_VM.number, bits if 0 < bits < 40 else 0)
        self._ram = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        anchor = ctypes.c_char.from_buffer(self._ram)
        slot = struct.pack("<IIQQQ", 0, 0, 0, MEMORY, ctypes.addressof(anchor))
        fcntl.ioctl(self._vm, uapi.SET_USER_MEMORY_REGION.number, slot)
        del anchor
        self._vcpus = [fcntl.ioctl(self._vm, uapi.CREATE_VCPU.number, k) for k in range(vcpus)]
        size = fcntl.ioctl(self._kvm, uapi.GET_VCPU_MMAP_SIZE.number, 0)
        self._pages = [mmap.mmap(fd, size) for fd in self._vcpus]
        init = bytearray(32)
        fcntl.ioctl(self._vm, uapi.ARM_PREFERRED_TARGET.number, init)
        self.target = struct.unpack_from("<I", init)[0]

    def close(self) -> None:
        """Destroy it."""
        for page in self._pages:
            page.close()
        for fd in (*self._vcpus, self._vm, self._kvm):
            os.close(fd)
        self._ram.close()

    def _call(self, fd: int, request: uapi.Request, argument: bytearray | int) -> int:
        try:
            fcntl.ioctl(fd, request.number, argument)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def init(self, vcpu: int, features: int, target: int | None = None) -> Answer:
        """KVM_ARM_VCPU_INIT."""
        words = struct.pack("<8I", self.target if target is None else target, features & 0xFFFF_FFFF, 0, 0, 0, 0, 0, 0)
        return self._call(self._vcpus[vcpu], uapi.ARM_VCPU_INIT, bytearray(words)), b""

    def finalize(self, vcpu: int, what: int) -> Answer:
        """KVM_ARM_VCPU_FINALIZE."""
        return self._call(self._vcpus[vcpu], uapi.ARM_VCPU_FINALIZE, bytearray(struct.pack("<i", what))), b""

    def listed(self, vcpu: int, room: int) -> Answer:
        """KVM_GET_REG_LIST into an array with room for so many; the ids, ascending, or the count with E2BIG."""
        buffer = bytearray(struct.pack("<Q", room) + bytes(8 * room))
        no = self._call(self._vcpus[vcpu], uapi.GET_REG_LIST, buffer)
        count = struct.unpack_from("<Q", buffer)[0]
        if no:
            return no, struct.pack("<Q", count) if no == errno.E2BIG else b""
        ids = sorted(struct.unpack_from(f"<{count}Q", buffer, 8))
        return 0, struct.pack(f"<{count}Q", *ids)

    def get(self, vcpu: int, id: int) -> Answer:
        """KVM_GET_ONE_REG."""
        value = ctypes.create_string_buffer(1 << (id >> 52 & 15))
        no = self._call(self._vcpus[vcpu], uapi.GET_ONE_REG, bytearray(struct.pack("<QQ", id, ctypes.addressof(value))))
        return no, b"" if no else value.raw

    def set(self, vcpu: int, id: int, value: bytes) -> Answer:
        """KVM_SET_ONE_REG."""
        buffer = ctypes.create_string_buffer(value, max(len(value), 1))
        argument = bytearray(struct.pack("<QQ", id, ctypes.addressof(buffer)))
        return self._call(self._vcpus[vcpu], uapi.SET_ONE_REG, argument), b""

    def struct_get(self, vcpu: int, request: uapi.Request) -> Answer:
        """KVM_GET_MP_STATE or KVM_GET_VCPU_EVENTS."""
        value = bytearray(request.size)
        no = self._call(self._vcpus[vcpu], request, value)
        return no, b"" if no else bytes(value)

    def struct_set(self, vcpu: int, request: uapi.Request, value: bytes) -> Answer:
        """KVM_SET_MP_STATE or KVM_SET_VCPU_EVENTS."""
        return self._call(self._vcpus[vcpu], request, bytearray(value)), b""

    def enter(self, vcpu: int) -> Answer:
        """KVM_RUN that leaves before the first instruction; its EINTR counts as good."""
        self._pages[vcpu][uapi.RUN_IMMEDIATE_EXIT] = 1
        no = self._call(self._vcpus[vcpu], uapi.RUN, 0)
        self._pages[vcpu][uapi.RUN_IMMEDIATE_EXIT] = 0
        return 0 if no == errno.EINTR else no, b""
