"""The ioctls of an arm64 vCPU, one call each, with their answer: what the simulator is compared with."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from collections.abc import Sequence

from migstream.backends.kvm import uapi
from migstream.model import Scope
from migstream.registers import gic

Answer = tuple[int, bytes]
"""errno (0 = good) and what was read."""

MEMORY = 1 << 20
_VERBS = {"has": uapi.HAS_DEVICE_ATTR, "get": uapi.GET_DEVICE_ATTR, "set": uapi.SET_DEVICE_ATTR}
_ONE_REG, _LARGEST = struct.Struct("<QQ"), 256
_LIMIT_S, _LINES = 5.0, 4
_EXIT_REASON = 8
"""Offset in struct kvm_run."""

_EXITS = {6: "KVM_EXIT_MMIO", 17: "KVM_EXIT_INTERNAL_ERROR", 24: "KVM_EXIT_SYSTEM_EVENT"}


class RealArm64:
    """A VM of real KVM/arm64 with some vCPUs that nothing was done to."""

    def __init__(self, vcpus: int, caps: Sequence[int] = ()) -> None:
        """`caps`: VM capabilities to enable before there are vCPUs; `enabled` has the errno of each."""
        self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        bits = fcntl.ioctl(self._kvm, uapi.CHECK_EXTENSION.number, uapi.ARM64_CAPABILITIES["ARM_VM_IPA_SIZE"])
        self._vm = fcntl.ioctl(self._kvm, uapi.CREATE_VM.number, bits if 0 < bits < 40 else 0)
        self._ram = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        anchor = ctypes.c_char.from_buffer(self._ram)
        slot = struct.pack("<IIQQQ", 0, 0, 0, MEMORY, ctypes.addressof(anchor))
        fcntl.ioctl(self._vm, uapi.SET_USER_MEMORY_REGION.number, slot)
        del anchor
        self.enabled = [self.enable(number) for number in caps]
        self._vcpus = [fcntl.ioctl(self._vm, uapi.CREATE_VCPU.number, k) for k in range(vcpus)]
        size = fcntl.ioctl(self._kvm, uapi.GET_VCPU_MMAP_SIZE.number, 0)
        self._pages = [mmap.mmap(fd, size) for fd in self._vcpus]
        init = bytearray(32)
        fcntl.ioctl(self._vm, uapi.ARM_PREFERRED_TARGET.number, init)
        self.target = struct.unpack_from("<I", init)[0]
        self._gic: int | None = None
        self._its: int | None = None

    def close(self) -> None:
        """Destroy it."""
        for page in self._pages:
            page.close()
        for fd in (*self._vcpus, *(fd for fd in (self._gic, self._its) if fd is not None), self._vm, self._kvm):
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

    def plain(self, vcpu: int, ids: Sequence[int]) -> list[bytes]:
        """KVM_GET_ONE_REG of many, empty where it is refused: an emulated CPU runs little Python a second."""
        fd, number, place = self._vcpus[vcpu], uapi.GET_ONE_REG.number, ctypes.create_string_buffer(_LARGEST)
        address, out = ctypes.addressof(place), []
        for id in ids:
            try:
                fcntl.ioctl(fd, number, _ONE_REG.pack(id, address))
                out.append(ctypes.string_at(address, 1 << (id >> 52 & 15)))
            except OSError:
                out.append(b"")
        return out

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

    def enable(self, capability: int) -> int:
        """KVM_ENABLE_CAP of the VM."""
        return self._call(self._vm, uapi.ENABLE_CAP, bytearray(struct.pack("<I100x", capability)))

    def set_counter_offset(self, offset: int, reserved: int) -> int:
        """KVM_ARM_SET_COUNTER_OFFSET."""
        return self._call(self._vm, uapi.ARM_SET_COUNTER_OFFSET, bytearray(struct.pack("<QQ", offset, reserved)))

    def create_gic(self) -> int:
        """KVM_CREATE_DEVICE of a vGICv3."""
        no, fd = self._create(gic.GICV3)
        self._gic = self._gic if no else fd
        return no

    def create_its(self) -> int:
        """KVM_CREATE_DEVICE of an ITS; once."""
        no, self._its = self._create(gic.ITS)
        return no

    def _create(self, kind: int) -> tuple[int, int | None]:
        argument = bytearray(struct.pack("<III", kind, 0, 0))
        no = self._call(self._vm, uapi.CREATE_DEVICE, argument)
        return no, None if no else struct.unpack_from("<I", argument, 4)[0]

    def its_attribute(self, verb: str, group: int, attribute: int, value: int = 0) -> Answer:
        """KVM_HAS, GET and SET_DEVICE_ATTR of the ITS."""
        return (errno.EBADF, b"") if self._its is None else self._attribute(self._its, verb, group, attribute, value)

    def peek(self, address: int, size: int) -> bytes:
        """Guest RAM."""
        return self._ram[address:address + size]

    def _attribute(self, fd: int, verb: str, group: int, attribute: int, value: int = 0) -> Answer:
        buffer = ctypes.create_string_buffer(value.to_bytes(8, "little"), 8)
        argument = bytearray(struct.pack("<IIQQ", 0, group, attribute, ctypes.addressof(buffer)))
        no = self._call(fd, _VERBS[verb], argument)
        return no, b"" if no or verb != "get" else buffer.raw

    def gic_attribute(self, verb: str, group: int, attribute: int, value: int = 0) -> Answer:
        """KVM_HAS, GET and SET_DEVICE_ATTR of the vGIC."""
        return (errno.EBADF, b"") if self._gic is None else self._attribute(self._gic, verb, group, attribute, value)

    def gic_register(self, verb: str, vcpu: int, id: int, value: int = 0) -> Answer:
        """A register of the vGIC as the KVM backend does it: in halves, and cleared first where a write only sets."""
        row, (group, attribute) = gic.access(id), gic.attribute(id)
        assert row is not None
        if self._gic is None:
            return errno.EBADF, b""
        place = 0 if row.scope == Scope.VM else vcpu << 32
        if verb == "set" and row.clear is not None:
            no, _ = self._attribute(self._gic, "set", group, place | attribute - row.offset + row.clear, 0xFFFF_FFFF)
            if no:
                return no, b""
        halves = (0, 4) if row.size == 8 and group in (gic.DISTRIBUTOR, gic.REDISTRIBUTOR) else (0,)
        out = b""
        for low in halves:
            no, found = self._attribute(self._gic, verb, group, place | attribute + low, value >> 8 * low)
            if no:
                return no, b""
            out += found[:row.size // len(halves)]
        return 0, out

    def line(self, verb: str, vcpu: int, group: int, attribute: int, value: int = 0) -> Answer:
        """KVM_HAS, GET and SET_DEVICE_ATTR of a vCPU."""
        return self._attribute(self._vcpus[vcpu], verb, group, attribute, value)

    def load(self, address: int, code: bytes) -> None:
        """Put a program into guest RAM."""
        self._ram[address:address + len(code)] = code

    def execute(self, vcpu: int, instructions: int) -> Answer:
        """KVM_RUN until the guest stops by itself: the exit's name. An exit for a timer's line is none."""
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, _LIMIT_S, _LIMIT_S)
        try:
            for _ in range(_LINES):
                no = self._call(self._vcpus[vcpu], uapi.RUN, 0)
                if no != errno.EINTR:
                    reason = struct.unpack_from("<I", self._pages[vcpu], _EXIT_REASON)[0]
                    return no, b"" if no else _EXITS.get(reason, str(reason)).encode()
            return 0, b"nothing stopped it"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def enter(self, vcpu: int) -> Answer:
        """KVM_RUN that leaves before the first instruction; its EINTR counts as good."""
        self._pages[vcpu][uapi.RUN_IMMEDIATE_EXIT] = 1
        no = self._call(self._vcpus[vcpu], uapi.RUN, 0)
        self._pages[vcpu][uapi.RUN_IMMEDIATE_EXIT] = 0
        return 0 if no == errno.EINTR else no, b""
