"""How each arm64 row of the catalogue is read from and written to KVM, and what an arm64 VM is made of.

Registers go through KVM_GET/SET_ONE_REG with a pointer into the bank, whatever their size; VM-wide ones through the
first vCPU, once. The interrupt controller's are attributes of its device.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from migstream.backends.base import Refusal
from migstream.backends.kvm import uapi
from migstream.backends.kvm.arch import ArchHost, ArchVm
from migstream.backends.kvm.batch import Entry
from migstream.backends.kvm.operations import ATTRIBUTE, ByAddress, EnabledCap, Operation, Row, Struct, register_list
from migstream.backends.kvm.uapi import Request
from migstream.contract import MEASURED, Behaviour
from migstream.errors import BackendError, UsageError, errno_name
from migstream.host.profile import SCOPE_CAPABILITY
from migstream.model import Arch, Layout, Machine, Phase, Scope
from migstream.registers import arm64 as rows
from migstream.registers import arm64_ids, gic, ids, vcpu_features
from migstream.registers import firmware_arm64 as firmware_calls
from migstream.registers.catalogue import lookup

if TYPE_CHECKING:
    from migstream.backends.kvm.backend import KvmBackend, KvmVm
    from migstream.host.profile import HostProfile

_ADDRESS_BITS = 40
"""Guest-physical address bits of a VM made with type 0 (Documentation/virt/kvm/api.rst, KVM_CREATE_VM)."""

_DISTRIBUTOR_ADDRESS, _REDISTRIBUTOR_ADDRESS, _ITS_ADDRESS = 2, 3, 4
"""KVM_VGIC_V3_ADDR_TYPE_DIST, _REDIST, KVM_VGIC_ITS_ADDR_TYPE: attributes of group ADDRESSES."""

_CREATE_DEVICE_TEST = 1
_SVE_FINALIZE = 4
"""KVM_ARM_VCPU_SVE, the argument of KVM_ARM_VCPU_FINALIZE."""

_PMU_INIT = 1
_MPIDR_EL1 = arm64_ids.sysreg(3, 0, 0, 0, 5)
_DEVICE_TYPES = {"gicv3": gic.GICV3, "its": gic.ITS}
_INIT_SIZE, _OFFSET_SIZE, _MASK_COUNT = 32, 16, 192
_ALL_ONES = b"\xff\xff\xff\xff"


def set_attribute(fd: int, group: int, attribute: int, value: bytes = b"") -> None:
    """KVM_SET_DEVICE_ATTR on a device or vCPU; no value for one that is only an order. Raises: BackendError."""
    buffer = ctypes.create_string_buffer(value, len(value)) if value else None
    address = ctypes.addressof(buffer) if buffer is not None else 0
    name = f"group {group} attribute {attribute:#x}"
    uapi.call(fd, uapi.SET_DEVICE_ATTR, bytearray(ATTRIBUTE.pack(0, group, attribute, address)), register=name)


class Affinity(Operation):
    """Where the row's vCPU is, for the attributes that name it so: read once a row, before them.

    The guest's MPIDR_EL1 is restored in an earlier phase, so at that time it is the guest's, not the target's.
    """

    def __init__(self) -> None:
        self.value = ctypes.c_uint64()
        self.packed = 0
        self.argument = struct.pack("<QQ", _MPIDR_EL1, ctypes.addressof(self.value))

    def ask(self, fd: int, vcpu: int | None) -> None:
        """KVM_GET_ONE_REG of MPIDR_EL1: Aff3 goes to bits 63:56 of an attribute, Aff2 to Aff0 to 55:32.

        Raises: BackendError.
        """
        uapi.call(fd, uapi.GET_ONE_REG, bytearray(self.argument), register="MPIDR_EL1", vcpu=vcpu)
        value = self.value.value
        self.packed = (value & 0xFF_FFFF) << 32 | (value >> 32 & 0xFF) << 56

    def read(self, row: Row) -> list[Refusal]:
        """Ask, whoever comes after."""
        self.ask(row.fd, row.vcpu)
        return []

    def write(self, row: Row) -> list[Refusal]:
        """The same."""
        return self.read(row)


class GicRegister(Operation):
    """A register of the interrupt controller: one attribute, or two halves of 4 bytes."""

    def __init__(self, id: int, start: int, device: int, affinity: Affinity) -> None:
        row = gic.access(id)
        assert row is not None
        self.id, self.start, self.device, self.affinity = id, start, device, affinity
        group, attribute = gic.attribute(id)
        in_halves = row.size == 8 and group in (gic.DISTRIBUTOR, gic.REDISTRIBUTOR)
        self.parts = tuple((ATTRIBUTE.pack(0, group, 0, 0)[:8], attribute + offset, offset)
                           for offset in ((0, 4) if in_halves else (0,)))
        self.clear = None if row.clear is None else attribute - row.offset + row.clear
        self.takes_affinity = row.scope == Scope.VCPU
        self.before_read, self.before_write = gic.BEFORE_READ.get(id), gic.BEFORE_WRITE.get(id)

    def _do(self, row: Row, request: Request) -> list[Refusal]:
        place = self.affinity.packed if self.takes_affinity else 0
        try:
            for head, attribute, offset in self.parts:
                tail = struct.pack("<QQ", place | attribute, row.address + self.start + offset)
                fcntl.ioctl(self.device, request.number, bytearray(head + tail))
        except OSError as error:
            return [Refusal(self.id, row.vcpu, request.name, error.errno or errno.EIO)]
        return []

    def read(self, row: Row) -> list[Refusal]:
        """The kernel writes into the bank; what it keeps in guest RAM goes there first."""
        return self._order(row, self.before_read) or self._do(row, uapi.GET_DEVICE_ATTR)

    def write(self, row: Row) -> list[Refusal]:
        """The kernel reads from the bank; bits that a write only sets are cleared before."""
        return self._order(row, self.before_write) or self._clear(row) or self._do(row, uapi.SET_DEVICE_ATTR)

    def _order(self, row: Row, control: int | None) -> list[Refusal]:
        return [] if control is None else self._try(row, gic.CONTROL, control)

    def _clear(self, row: Row) -> list[Refusal]:
        if self.clear is None:
            return []
        place = self.affinity.packed if self.takes_affinity else 0
        return self._try(row, gic.attribute(self.id)[0], place | self.clear, _ALL_ONES)

    def _try(self, row: Row, group: int, attribute: int, value: bytes = b"") -> list[Refusal]:
        try:
            set_attribute(self.device, group, attribute, value)
        except BackendError as error:
            what = f"{error.operation} group {group} attribute {attribute & 0xFFFF_FFFF:#x}"
            return [Refusal(self.id, row.vcpu, what, error.errno)]
        return []


class PmuIrq(ByAddress):
    """The PMU's interrupt; then the PMU is complete."""

    def write(self, row: Row) -> list[Refusal]:
        """KVM_ARM_VCPU_PMU_V3_IRQ, then _INIT: a vCPU whose PMU was not initialized does not run."""
        refused = super().write(row)
        if refused:
            return refused
        try:
            set_attribute(row.fd, 0, _PMU_INIT)
        except BackendError as error:
            return [Refusal(self.id, row.vcpu, "KVM_ARM_VCPU_PMU_V3_INIT", error.errno)]
        return []

    def entry(self, writing: bool) -> Entry | None:
        """Reading alone: writing is two calls."""
        return None if writing else super().entry(writing)


class VectorLengths(ByAddress):
    """KVM_REG_ARM64_SVE_VLS: chosen before the vCPU is finalized, fixed after."""

    def write(self, row: Row) -> list[Refusal]:
        """KVM_SET_ONE_REG, then KVM_ARM_VCPU_FINALIZE: only now the vCPU has its SVE registers."""
        return super().write(row) or self.finalize(row.fd, row.vcpu)

    def entry(self, writing: bool) -> Entry | None:
        """Reading alone: writing is two calls."""
        return None if writing else super().entry(writing)

    def finalize(self, fd: int, vcpu: int | None) -> list[Refusal]:
        """KVM_ARM_VCPU_FINALIZE for SVE."""
        try:
            fcntl.ioctl(fd, uapi.ARM_VCPU_FINALIZE.number, bytearray(struct.pack("<i", _SVE_FINALIZE)))
        except OSError as error:
            return [Refusal(self.id, vcpu, uapi.ARM_VCPU_FINALIZE.name, error.errno or errno.EIO)]
        return []


class ToldInit(Operation):
    """struct kvm_vcpu_init: told, never asked. Reading gives what the vCPUs were made with."""

    def __init__(self, id: int, start: int, init: bytes) -> None:
        self.id, self.start, self.init = id, start, init

    def read(self, row: Row) -> list[Refusal]:
        """Target and features as told."""
        row.memory[self.start:self.start + _INIT_SIZE] = self.init
        return []

    def write(self, row: Row) -> list[Refusal]:
        """Nothing where the features are those that the machine was made with; they can't be changed any more."""
        wanted = bytes(row.memory[self.start + 4:self.start + _INIT_SIZE])
        return [] if wanted == self.init[4:] else [Refusal(self.id, row.vcpu, uapi.ARM_VCPU_INIT.name, errno.EINVAL)]


class CounterOffset(Operation):
    """struct kvm_arm_counter_offset, a VM ioctl: told, never asked."""

    def __init__(self, id: int, start: int, told: Arm64Vm) -> None:
        self.id, self.start, self.told = id, start, told

    def read(self, row: Row) -> list[Refusal]:
        """As told."""
        row.memory[self.start:self.start + _OFFSET_SIZE] = self.told.counter_offset or bytes(_OFFSET_SIZE)
        return []

    def write(self, row: Row) -> list[Refusal]:
        """KVM_ARM_SET_COUNTER_OFFSET; from now on KVM ignores writes of the counters."""
        value = bytearray(row.memory[self.start:self.start + _OFFSET_SIZE])
        try:
            fcntl.ioctl(self.told.vm.fd, uapi.ARM_SET_COUNTER_OFFSET.number, value)
        except OSError as error:
            return [Refusal(self.id, row.vcpu, uapi.ARM_SET_COUNTER_OFFSET.name, error.errno or errno.EIO)]
        self.told.counter_offset = bytes(value)
        return []


_STRUCTS: dict[int, tuple[Request, Request]] = {
    rows.VCPU_EVENTS.id: (uapi.GET_VCPU_EVENTS, uapi.SET_VCPU_EVENTS),
    rows.MP_STATE.id: (uapi.GET_MP_STATE, uapi.SET_MP_STATE),
}


class Arm64Host(ArchHost):
    """What an arm64 kernel says of itself: most of it only about a VM, so a scratch VM is asked."""

    arch = Arch.ARM64
    capabilities = uapi.ARM64_CAPABILITIES

    def complete(self, backend: KvmBackend, profile: HostProfile) -> HostProfile:
        """Register list, vCPU features, devices, writable masks. Raises: BackendError."""
        offered = _taken(backend, vcpu_features.offered(profile.capabilities))
        flagged = {mask: _listed(backend, vcpu_features.DEFAULT | mask)
                   for mask in (0, *vcpu_features.GROUPS) if mask & ~offered == 0}
        plain = {mask: frozenset(id & ~ids.KVM_REG_ARM_SCOPE_VM for id in listed) for mask, listed in flagged.items()}
        listed = plain.pop(0)
        with backend.create(_scratch(0)) as vm:
            devices = tuple(name for name, number in _DEVICE_TYPES.items() if _can_make(vm.fd, number))
            writable = _writable_masks(vm.fd) if profile.capabilities["ARM_SUPPORTED_REG_MASK_RANGES"] & 1 else {}
        return replace(profile, registers=tuple(sorted(listed)), vcpu_features=offered, devices=devices,
                       feature_registers={mask: tuple(sorted(listed ^ more)) for mask, more in plain.items()},
                       writable_masks=writable,
                       scope_flags=tuple(sorted({id & ~ids.KVM_REG_ARM_SCOPE_VM for all in flagged.values()
                                                 for id in all if id & ids.KVM_REG_ARM_SCOPE_VM})))

    def behaviour(self, backend: KvmBackend) -> Behaviour:
        """As a scratch guest meets it; where that can't run, a line that says why."""
        from migstream.host import firmware_arm64
        from migstream.host.behaviour import of_profile

        try:
            answers, registers = firmware_arm64.ask_twice(backend)
        except (BackendError, UsageError) as error:
            known = of_profile(backend.profile())
            return replace(known, unknown=(*known.unknown, f"no scratch guest could ask this kernel: {error}"))
        calls = {key: x0 for key, x0 in answers.items() if key in firmware_calls.CALL_NAMES}
        seen = {key: value for key, value in answers.items() if key not in calls}
        return of_profile(replace(backend.profile(), firmware=calls, guest_registers=seen,
                                  defaults=registers), MEASURED)

    def vm_type(self, kvm_fd: int) -> int:
        """0 is 40 address bits; a host that has fewer wants to be told its own number."""
        bits = uapi.check_extension(kvm_fd, "ARM_VM_IPA_SIZE")
        return bits if 0 < bits < _ADDRESS_BITS else 0

    def vm(self, vm: KvmVm) -> Arm64Vm:
        """The arm64 part of a VM."""
        return Arm64Vm(vm)


def _scratch(features: int) -> Machine:
    return Machine(Arch.ARM64, 1, (), {"vcpu_features": features})


def _taken(backend: KvmBackend, offered: int) -> int:
    """Of the features that capabilities promise, those that vCPUs can be made with; mostly all."""
    if _makes(backend, vcpu_features.DEFAULT | vcpu_features.together(offered)):
        return offered
    refused = {mask for mask in (1 << bit for bit in range(offered.bit_length())) if mask & offered
               and not _makes(backend, vcpu_features.DEFAULT | vcpu_features.whole(mask))}
    return offered & ~sum(refused)


def _makes(backend: KvmBackend, features: int) -> bool:
    try:
        with backend.create(_scratch(features)) as vm:
            vm.create_vcpus()
    except (BackendError, UsageError):
        return False
    return True


def _listed(backend: KvmBackend, features: int) -> frozenset[int]:
    """The registers of a vCPU that was made with these features."""
    with backend.create(_scratch(features)) as vm:
        vm.create_vcpus()
        part = vm.arch
        assert isinstance(part, Arm64Vm)
        return frozenset(part.listed())


def _can_make(vm_fd: int, device_type: int) -> bool:
    try:
        uapi.call(vm_fd, uapi.CREATE_DEVICE, bytearray(struct.pack("<III", device_type, 0, _CREATE_DEVICE_TEST)))
    except BackendError:
        return False
    return True


def _writable_masks(vm_fd: int) -> dict[int, int]:
    """KVM_ARM_GET_REG_WRITABLE_MASKS of the feature id registers: op0 3, op1 0, 1 and 3, CRn 0."""
    masks = (ctypes.c_uint64 * _MASK_COUNT)()
    uapi.call(vm_fd, uapi.ARM_GET_REG_WRITABLE_MASKS, bytearray(struct.pack("<QI52x", ctypes.addressof(masks), 0)))
    op1s = (0, 1, 3)
    return {arm64_ids.sysreg(3, op1s[k >> 6], 0, k >> 3 & 7, k & 7): int(mask) for k, mask in enumerate(masks) if mask}


class Arm64Vm(ArchVm):
    """Features, interrupt controller and register list of one VM."""

    def __init__(self, vm: KvmVm) -> None:
        super().__init__(vm)
        self._made_here = False
        self.counter_offset: bytes | None = None

    @property
    def features(self) -> int:
        """The vCPUs' feature bits."""
        return int(self.vm.machine.devices.get("vcpu_features", vcpu_features.DEFAULT))

    def make_devices(self) -> None:
        """Ask a kernel that can say which registers are the VM's to do so; the interrupt controller comes later.

        Raises: BackendError.
        """
        if uapi.check_extension(self.vm.backend.fd, SCOPE_CAPABILITY):
            argument = bytearray(struct.pack("<II96x", uapi.ARM64_CAPABILITIES[SCOPE_CAPABILITY], 0))
            uapi.call(self.vm.fd, uapi.ENABLE_CAP, argument, register=SCOPE_CAPABILITY)

    def vcpus_created(self) -> None:
        """KVM_ARM_VCPU_INIT for each, then the interrupt controller, whose size is the number of vCPUs.

        Raises: BackendError naming the features that the kernel refuses.
        """
        self._made_here = True
        for k, fd in enumerate(self.vm.vcpu_fds):
            self._initialize(k, fd)
        devices = self.vm.machine.devices
        if "gic_distributor" in devices:
            self._make_gic(devices["gic_distributor"], devices["gic_redistributors"], devices.get("gic_irqs", 64))
        if "its" in devices:
            self._make_its(devices["its"])

    def _initialize(self, vcpu: int, fd: int) -> None:
        try:
            uapi.call(fd, uapi.ARM_VCPU_INIT, bytearray(self.init), vcpu=vcpu)
        except BackendError as error:
            capabilities = {name: uapi.check_extension(self.vm.backend.fd, name) for name in uapi.ARM64_CAPABILITIES}
            missing = vcpu_features.names(self.features & ~vcpu_features.offered(capabilities))
            what = f"{errno_name(error.errno)} for vCPU features {', '.join(vcpu_features.names(self.features))}"
            raise BackendError(error.operation, errno=error.errno, vcpu=vcpu,
                               what=what + (f"; this host has no {', '.join(missing)}" if missing else "")) from error

    @cached_property
    def init(self) -> bytes:
        """struct kvm_vcpu_init of all vCPUs: what this host prefers, with the machine's features."""
        init = bytearray(_INIT_SIZE)
        uapi.call(self.vm.fd, uapi.ARM_PREFERRED_TARGET, init)
        struct.pack_into("<I", init, 4, struct.unpack_from("<I", init, 4)[0] | self.features)
        return bytes(init)

    def _device(self, name: str, device_type: int) -> int:
        argument = bytearray(struct.pack("<III", device_type, 0, 0))
        uapi.call(self.vm.fd, uapi.CREATE_DEVICE, argument, register=name)
        fd = self.vm.device_fds[name] = int(struct.unpack_from("<I", argument, 4)[0])
        return fd

    def _make_gic(self, distributor: int, redistributors: int, irqs: int) -> None:
        fd = self._device("gic", gic.GICV3)
        set_attribute(fd, gic.ADDRESSES, _DISTRIBUTOR_ADDRESS, struct.pack("<Q", distributor))
        set_attribute(fd, gic.ADDRESSES, _REDISTRIBUTOR_ADDRESS, struct.pack("<Q", redistributors))
        set_attribute(fd, gic.IRQ_COUNT, 0, struct.pack("<I", irqs))
        set_attribute(fd, gic.CONTROL, gic.INIT)

    def _make_its(self, address: int) -> None:
        fd = self._device("its", gic.ITS)
        set_attribute(fd, gic.ADDRESSES, _ITS_ADDRESS, struct.pack("<Q", address))
        set_attribute(fd, gic.CONTROL, gic.INIT)

    def registers(self) -> tuple[int, ...]:
        """What the first vCPU has, by the ids that every kernel takes: without scope flags. Raises: BackendError."""
        return tuple(id & ~ids.KVM_REG_ARM_SCOPE_VM for id in self.listed())

    def listed(self) -> tuple[int, ...]:
        """KVM_GET_REG_LIST of the first vCPU; SVE lengths that nobody has chosen become the host's.

        Raises: BackendError.
        """
        if self._made_here and self.features & vcpu_features.SVE:
            for k, fd in enumerate(self.vm.vcpu_fds):
                self._finalize(k, fd)
        return register_list(self.vm.vcpu_fds[0])

    def _finalize(self, vcpu: int, fd: int) -> None:
        """A vCPU that is finalized already answers EPERM."""
        for no in VectorLengths(arm64_ids.SVE_VLS, 0, uapi.GET_ONE_REG, uapi.SET_ONE_REG, b"").finalize(fd, vcpu):
            if no.errno != errno.EPERM:
                raise BackendError(no.operation, errno=no.errno, register="SVE", vcpu=vcpu)

    def layouts(self) -> tuple[Layout, ...]:
        """The kernel's list, structs, interrupt lines and the interrupt controller."""
        scopes = self.vm.backend.profile().bank_scopes
        found = (*rows.layouts(self.registers(), scopes, self._extra()), *self._gic_layouts())
        return tuple(sorted(found, key=lambda layout: layout.phase))

    def _extra(self) -> list[int]:
        """What the kernel doesn't list; interrupt lines where there is an interrupt controller at their end."""
        extra = [ids.capability_id(Arch.ARM64, capability) for capability in self.vm.enabled_caps]
        extra += [rows.VCPU_EVENTS.id, rows.MP_STATE.id]
        extra += [rows.COUNTER_OFFSET.id] if self.counter_offset is not None else []
        if self._gic_fd is not None:
            extra += [gic.VTIMER_IRQ.id, gic.PTIMER_IRQ.id]
            extra += [gic.PMU_IRQ.id] if self.features & vcpu_features.PMU_V3 else []
        return extra

    @property
    def _gic_fd(self) -> int | None:
        return self.vm.device_fds.get("gic")

    def _gic_layouts(self) -> tuple[Layout, ...]:
        if self._gic_fd is None:
            return ()
        irqs = int(self.vm.machine.devices.get("gic_irqs", 64))
        return gic.layouts(irqs, gic.active_priority_registers(self._icc_ctlr()), "its" in self.vm.device_fds)

    def _icc_ctlr(self) -> int:
        """ICC_CTLR_EL1 of the first vCPU."""
        affinity, value = Affinity(), ctypes.c_uint64()
        affinity.ask(self.vm.vcpu_fds[0], 0)
        group, attribute = gic.attribute(gic.ICC_CTLR)
        argument = bytearray(ATTRIBUTE.pack(0, group, affinity.packed | attribute, ctypes.addressof(value)))
        uapi.call(self.vm.device_fds["gic"], uapi.GET_DEVICE_ATTR, argument, register="ICC_CTLR_EL1", vcpu=0)
        return value.value

    def operations(self, layout: Layout) -> list[Operation]:
        """One a column; with interrupt controller registers, the row's affinity before them.

        Raises: UsageError for a column of another size than its register: KVM would go past its memory.
        """
        for slot in layout.slots:
            if slot.size != (size := lookup(slot.id).size):
                raise UsageError(f"{lookup(slot.id).name}: a column of {slot.size} bytes for {size}")
        affinity = Affinity()
        out: list[Operation] = [affinity] if any(gic.access(slot.id) for slot in layout.slots) else []
        for column, slot in enumerate(layout.slots):
            out.append(self._operation(slot.id, layout.offsets[column] * 8, slot.size, affinity))
        return out

    def _operation(self, id: int, start: int, size: int, affinity: Affinity) -> Operation:
        access = gic.access(id)
        if access is not None:
            return GicRegister(id, start, self.vm.device_fds["its" if access.device == gic.ITS else "gic"], affinity)
        if id in _STRUCTS:
            return Struct(id, start, size, *_STRUCTS[id])
        if id == rows.VCPU_INIT.id:
            return ToldInit(id, start, self.init)
        if id == rows.COUNTER_OFFSET.id:
            return CounterOffset(id, start, self)
        if ids.capability_number(id) is not None:
            return EnabledCap(id, start, self.vm.enabled_caps)
        make, get, set, head = self._by_address(id)
        return make(id, start, get, set, head)

    def _by_address(self, id: int) -> tuple[Callable[..., ByAddress], Request, Request, bytes]:
        if id in gic.LINES:
            group, attribute = gic.attribute(id)
            line = PmuIrq if id == gic.PMU_IRQ.id else ByAddress
            return line, uapi.GET_DEVICE_ATTR, uapi.SET_DEVICE_ATTR, ATTRIBUTE.pack(0, group, attribute, 0)[:16]
        make = VectorLengths if id == arm64_ids.SVE_VLS else ByAddress
        return make, uapi.GET_ONE_REG, uapi.SET_ONE_REG, struct.pack("<Q", id)

    def read_order(self, layout: Layout, program: list[Operation]) -> list[Operation]:
        """As they are written: nothing on arm64 changes by being read."""
        return program

    def attribute_fd(self, id: int) -> int | None:
        """By the id's device type. A vCPU's attributes of the interrupt controller are the first vCPU's: affinity 0."""
        fds = {gic.GICV3: self._gic_fd, gic.ITS: self.vm.device_fds.get("its"), ids.ARM64_VM_FD: self.vm.fd,
               ids.ARM64_VCPU_FD: self.vm.vcpu_fds[0] if self.vm.vcpu_fds else None}
        return fds.get(id >> 40 & 0xFF)

    def through_vcpu(self, layout: Layout) -> bool:
        """Everything but what comes before the vCPUs: KVM has no VM-wide ONE_REG."""
        return layout.scope == Scope.VCPU or layout.phase != Phase.CREATE
