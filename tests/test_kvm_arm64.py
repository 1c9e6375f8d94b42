"""KVM/arm64 without a kernel: request numbers, rows of the interrupt controller, operations on a stand-in for KVM.

What real kernels say to all this is in the lab's tier.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from migstream.backends.kvm import arm64, backend, operations, uapi
from migstream.errors import BackendError, UsageError
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Phase, Scope, Slot
from migstream.registers import arm64 as rows
from migstream.registers import arm64_ids, gic, ids, vcpu_features
from migstream.registers.catalogue import lookup

VM_FD, GIC_FD, ITS_FD, VCPU_FDS = 10, 11, 12, (20, 21, 22)
X0, Z3 = arm64_ids.core(0), arm64_ids.zreg(3)
PSCI_VERSION, MPIDR = arm64_ids.firmware(0), arm64_ids.sysreg(3, 0, 0, 0, 5)


# request numbers


@pytest.mark.parametrize(("request_", "size", "direction"), [
    (uapi.ARM_PREFERRED_TARGET, 32, 2), (uapi.ARM_VCPU_INIT, 32, 1), (uapi.ARM_VCPU_FINALIZE, 4, 1),
    (uapi.ARM_GET_REG_WRITABLE_MASKS, 64, 2), (uapi.ARM_SET_COUNTER_OFFSET, 16, 1), (uapi.CREATE_DEVICE, 12, 3),
    (uapi.GET_REG_LIST, 8, 3), (uapi.GET_ONE_REG, 16, 1), (uapi.SET_ONE_REG, 16, 1),
    (uapi.GET_DEVICE_ATTR, 24, 1), (uapi.SET_DEVICE_ATTR, 24, 1), (uapi.HAS_DEVICE_ATTR, 24, 1),
    (uapi.GET_VCPU_EVENTS, 64, 2), (uapi.SET_VCPU_EVENTS, 64, 1), (uapi.GET_MP_STATE, 4, 2), (uapi.SET_MP_STATE, 4, 1),
])
def test_request_numbers_carry_size_and_direction(request_: uapi.Request, size: int, direction: int) -> None:
    assert request_.size == size
    assert request_.number >> 30 == direction
    assert request_.number >> 8 & 0xFF == 0xAE


def test_numbers_are_used_once_a_kind_of_fd() -> None:
    keys = [(request.fd, request.number) for request in uapi.REQUESTS]
    assert len(keys) == len(set(keys))


def test_capabilities_of_both_architectures_agree() -> None:
    both = uapi.CAPABILITIES.keys() & uapi.ARM64_CAPABILITIES.keys()
    assert {uapi.CAPABILITIES[name] for name in both} == {uapi.ARM64_CAPABILITIES[name] for name in both}
    assert {f.capability for f in vcpu_features.FEATURES} <= uapi.ARM64_CAPABILITIES.keys()


# rows of the interrupt controller


@pytest.mark.parametrize("irqs", range(64, 1025, 32))
def test_gic_rows_grow_with_the_interrupts(irqs: int) -> None:
    distributor, redistributor, its = gic.layouts(irqs, 1, True)
    shared = min(irqs, 1020) - 32
    bits, config, priority = -(-shared // 32), -(-shared // 16), -(-shared // 4)
    assert len(distributor.slots) == 4 + 5 * bits + config + priority + shared
    assert [len(redistributor.slots), len(its.slots)] == [19 + 9, 13]
    assert len({slot.id for layout in (distributor, redistributor, its) for slot in layout.slots}) == sum(
        len(layout.slots) for layout in (distributor, redistributor, its))


@pytest.mark.parametrize(("bits", "registers"), [(4, 1), (5, 1), (6, 2), (7, 4)])
def test_active_priority_registers_follow_the_priority_bits(bits: int, registers: int) -> None:
    assert gic.active_priority_registers((bits - 1) << 8 | 0x8000) == registers
    names = [lookup(slot.id).name for slot in gic.layouts(96, registers, False)[1].slots]
    assert sum(name.startswith("ICC_AP") for name in names) == 2 * registers


@pytest.mark.parametrize(("name", "group", "attribute"), [
    ("ICC_PMR_EL1", 6, 0xC230), ("ICC_BPR0_EL1", 6, 0xC643), ("ICC_AP0R0_EL1", 6, 0xC644), ("ICC_AP1R3_EL1", 6, 0xC64B),
    ("ICC_BPR1_EL1", 6, 0xC663), ("ICC_CTLR_EL1", 6, 0xC664), ("ICC_SRE_EL1", 6, 0xC665),
    ("ICC_IGRPEN0_EL1", 6, 0xC666), ("ICC_IGRPEN1_EL1", 6, 0xC667),
    ("GICD_IIDR", 1, 0x8), ("GICD_ISENABLER1", 1, 0x104), ("GICD_IPRIORITYR254", 1, 0x7F8),
    ("GICD_IROUTER32", 1, 0x6100), ("GICD_IROUTER1019", 1, 0x7FD8), ("GICD_LINE_LEVEL2", 7, 64),
    ("GICR_LINE_LEVEL", 7, 0), ("GICR_PENDBASER", 5, 0x78), ("GICR_ISENABLER0", 5, 0x10100),
    ("GICR_ICFGR1", 5, 0x10C04),
    ("GITS_BASER7", 8, 0x138), ("GITS_IIDR", 8, 4),
])
def test_gic_attributes_are_the_architectures(name: str, group: int, attribute: int) -> None:
    layouts = gic.layouts(1024, 4, True)
    found = {lookup(slot.id).name: slot.id for layout in layouts for slot in layout.slots}
    assert gic.attribute(found[name]) == (group, attribute)


def test_every_gic_row_is_known_and_in_a_layout_of_its_scope() -> None:
    for layout in gic.layouts(1024, 4, True):
        for slot in layout.slots:
            row = lookup(slot.id)
            assert row.known and row.why
            assert (row.scope, row.phase, row.size) == (layout.scope, layout.phase, slot.size)
            assert ids.arch_of(slot.id) == Arch.ARM64


_ORDER = [
    ("GICD_IIDR", "GICD_CTLR"), ("GICD_CTLR", "GICD_ISENABLER1"), ("GICD_ICFGR2", "GICD_ISPENDR1"),
    ("GICD_IROUTER32", "GICD_ISPENDR1"), ("GICD_LINE_LEVEL1", "GICD_ISPENDR1"), ("GICD_IPRIORITYR8", "GICD_ISENABLER1"),
    ("GICR_PROPBASER", "GICR_CTLR"), ("GICR_PENDBASER", "GICR_CTLR"), ("GICR_LINE_LEVEL", "GICR_ISPENDR0"),
    ("GICR_CTLR", "GITS_IIDR"), ("ICC_CTLR_EL1", "ICC_BPR1_EL1"), ("ICC_SRE_EL1", "ICC_PMR_EL1"),
    ("GITS_IIDR", "GITS_CBASER"), ("GITS_CBASER", "GITS_CREADR"), ("GITS_CREADR", "GITS_CWRITER"),
    ("GITS_BASER7", "GITS_CTLR"),
]


@pytest.mark.parametrize(("first", "then"), _ORDER)
def test_gic_order_of_a_restore(first: str, then: str) -> None:
    names = [lookup(slot.id).name for layout in gic.layouts(96, 4, True) for slot in layout.slots]
    assert names.index(first) < names.index(then)


def test_lines_of_arm64_and_tsc_offset_of_x86_are_different_registers() -> None:
    assert lookup(gic.PMU_IRQ.id).name == "KVM_ARM_VCPU_PMU_V3_IRQ"
    assert lookup(ids.attribute_id(0, 0, 0)).name == "KVM_VCPU_TSC_OFFSET"


# operations, on a stand-in for KVM


@dataclass
class FakeKvm:
    """Answers ioctls of arm64 file descriptors out of dicts, through the same pointers as a kernel."""

    registers: dict[tuple[int, int], bytes] = field(default_factory=dict)
    attributes: dict[tuple[int, int, int], bytes] = field(default_factory=dict)
    refuse: dict[tuple[str, int], int] = field(default_factory=dict)
    calls: list[tuple[int, str, int]] = field(default_factory=list)
    listed: tuple[int, ...] = ()

    def ioctl(self, fd: int, number: int, argument: Any = 0) -> int:
        request = next(r for r in _ARM_REQUESTS if r.number == number)
        name = request.name.removeprefix("KVM_").lower()
        handler = getattr(self, name, None)
        key = handler(fd, argument) if handler else 0
        self.calls.append((fd, request.name, key))
        if (request.name, key) in self.refuse:
            raise OSError(self.refuse[request.name, key], "")
        return 0

    def get_one_reg(self, fd: int, argument: bytearray) -> int:
        id, address = _pointer(argument)
        size = 1 << (id >> 52 & 0xF)
        ctypes.memmove(address, self.registers.get((fd, id), bytes(size)), size)
        return id

    def set_one_reg(self, fd: int, argument: bytearray) -> int:
        id, address = _pointer(argument)
        self.registers[fd, id] = ctypes.string_at(address, 1 << (id >> 52 & 0xF))
        return id

    def get_device_attr(self, fd: int, argument: bytearray) -> int:
        group, attribute, address = _attribute(argument)
        size = _attribute_size(group)
        ctypes.memmove(address, self.attributes.get((fd, group, attribute), bytes(size)), size)
        return group << 64 | attribute

    def set_device_attr(self, fd: int, argument: bytearray) -> int:
        group, attribute, address = _attribute(argument)
        if address:
            self.attributes[fd, group, attribute] = ctypes.string_at(address, _attribute_size(group))
        return group << 64 | attribute

    def get_reg_list(self, fd: int, argument: bytearray) -> int:
        (room,) = struct.unpack_from("<Q", argument)
        struct.pack_into("<Q", argument, 0, len(self.listed))
        if room < len(self.listed):
            raise OSError(errno.E2BIG, "")
        struct.pack_into(f"<{len(self.listed)}Q", argument, 8, *self.listed)
        return 0

    def arm_preferred_target(self, fd: int, argument: bytearray) -> int:
        struct.pack_into("<I", argument, 0, 5)
        return 0


_ARM_REQUESTS = (uapi.GET_ONE_REG, uapi.SET_ONE_REG, uapi.GET_DEVICE_ATTR, uapi.SET_DEVICE_ATTR, uapi.GET_REG_LIST,
                 uapi.ARM_PREFERRED_TARGET, uapi.ARM_VCPU_INIT, uapi.ARM_VCPU_FINALIZE, uapi.ARM_SET_COUNTER_OFFSET,
                 uapi.GET_MP_STATE, uapi.SET_MP_STATE, uapi.GET_VCPU_EVENTS, uapi.SET_VCPU_EVENTS, uapi.CHECK_EXTENSION)


def _pointer(argument: bytearray) -> tuple[int, int]:
    """Id and address of struct kvm_one_reg."""
    id, address = struct.unpack("<QQ", argument)
    return id, address


def _attribute(argument: bytearray) -> tuple[int, int, int]:
    """Group, attribute and address of struct kvm_device_attr."""
    _, group, attribute, address = struct.unpack("<IIQQ", argument)
    return group, attribute, address


def _attribute_size(group: int) -> int:
    return 8 if group in (gic.CPU_INTERFACE, gic.ITS_REGISTERS) else 4


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> FakeKvm:
    fake = FakeKvm()
    for k, fd in enumerate(VCPU_FDS):
        fake.registers[fd, MPIDR] = struct.pack("<Q", 0x04_8003_0200 | k)
    for module in (operations, arm64, uapi):
        monkeypatch.setattr(module.fcntl, "ioctl", fake.ioctl)
    monkeypatch.setattr(backend, "host_arch", lambda: Arch.ARM64)
    monkeypatch.setattr(backend.KvmBackend, "batched", False)
    return fake


def attached(features: int = vcpu_features.DEFAULT, **profile: Any) -> backend.KvmVm:
    devices = {"gic_distributor": 0, "gic_redistributors": 0, "gic_irqs": 96, "its": 0, "vcpu_features": features}
    vm = backend.KvmBackend.attach(5, VM_FD, VCPU_FDS, Machine(Arch.ARM64, 3, (), devices), [],
                                   device_fds={"gic": GIC_FD, "its": ITS_FD})
    vm.backend._profile = HostProfile(Arch.ARM64, "Linux", "", "kvm", {"ONE_REG": 1}, **profile)
    return vm


def layout_of(*slots: tuple[int, int], scope: Scope = Scope.VCPU, phase: Phase = Phase.STATE) -> Layout:
    return Layout(scope, phase, tuple(Slot(*slot) for slot in slots))


def matrix(layout: Layout, *values: list[int]) -> Any:
    data = [value.to_bytes(slot.words * 8, "little") for row in values
            for slot, value in zip(layout.slots, row, strict=True)]
    return np.frombuffer(b"".join(data), np.uint64).reshape(len(values), -1).copy()


def test_an_attached_vm_lets_go_of_its_owners_memory(kvm: FakeKvm) -> None:
    ram = bytearray(4096)
    machine = Machine(Arch.ARM64, 3, (MemoryRegion(0, 4096),))
    backend.KvmBackend.attach(5, VM_FD, VCPU_FDS, machine, [memoryview(ram)]).close()
    ram.append(0)
    assert kvm.calls == []


@pytest.mark.parametrize("log2", range(9))
def test_registers_of_all_sizes_go_through_the_banks_memory(kvm: FakeKvm, log2: int) -> None:
    id, size = arm64_ids.ARM64 | log2 << 52 | arm64_ids.SVE | 0x20, 1 << log2
    layout = layout_of((X0, 8), (id, size), (arm64_ids.core(64), 8))
    wide = int.from_bytes(bytes(range(1, 256)) + b"\xff", "little") >> 8 * (256 - size)
    wanted = matrix(layout, [1, wide, 3], [4, wide - 1, 6], [7, 0, 9])
    vm = attached()
    assert vm.write(layout, 0, wanted) == []
    assert kvm.registers[21, id] == (wide - 1).to_bytes(size, "little")
    found = np.zeros_like(wanted)
    assert vm.read(layout, 0, found) == []
    assert (found == wanted).all()


@pytest.mark.parametrize(("id", "size"), [(X0, 4), (Z3, 16), (rows.MP_STATE.id, 8), (gic.PMU_IRQ.id, 8),
                                          (gic.ICC_CTLR, 4), (arm64_ids.sysreg(3, 3, 15, 15, 7), 4)])
def test_a_column_of_another_size_never_reaches_kvm(kvm: FakeKvm, id: int, size: int) -> None:
    layout = layout_of((id, size))
    with pytest.raises(UsageError, match=f"a column of {size} bytes"):
        attached().write(layout, 0, matrix(layout, [0]))
    assert kvm.calls == []


def test_one_ioctl_a_register_and_vcpu(kvm: FakeKvm) -> None:
    layout = layout_of((X0, 8), (Z3, 256))
    attached().write(layout, 1, matrix(layout, [1, 2], [3, 4]))
    assert kvm.calls == [(fd, "KVM_SET_ONE_REG", id) for fd in (21, 22) for id in (X0, Z3)]


def test_vm_scoped_registers_go_through_the_first_vcpu_once(kvm: FakeKvm) -> None:
    for phase, id in ((Phase.FEATURE, PSCI_VERSION), (Phase.CLOCK, rows.COUNTERS[0].id)):
        layout = layout_of((id, 8), scope=Scope.VM, phase=phase)
        attached().write(layout, 0, matrix(layout, [0x10001]))
    assert [(fd, id) for fd, _, id in kvm.calls] == [(20, PSCI_VERSION), (20, rows.COUNTERS[0].id)]


def test_a_refused_register_is_named_and_the_rest_goes_on(kvm: FakeKvm) -> None:
    kvm.refuse["KVM_SET_ONE_REG", PSCI_VERSION] = errno.EINVAL
    layout = layout_of((PSCI_VERSION, 8), (X0, 8), scope=Scope.VM, phase=Phase.FEATURE)
    (refusal,) = attached().write(layout, 0, matrix(layout, [1, 2]))
    assert str(refusal) == "VM: PSCI_VERSION: KVM_SET_ONE_REG: EINVAL"
    assert (20, X0) in kvm.registers


def test_vector_lengths_finalize_each_vcpu(kvm: FakeKvm) -> None:
    layout = layout_of((arm64_ids.SVE_VLS, 64), phase=Phase.FINALIZE)
    assert attached().write(layout, 0, matrix(layout, [1], [1], [1])) == []
    assert [(fd, name) for fd, name, _ in kvm.calls] == [
        (fd, name) for fd in VCPU_FDS for name in ("KVM_SET_ONE_REG", "KVM_ARM_VCPU_FINALIZE")]


def test_refused_vector_lengths_do_not_finalize(kvm: FakeKvm) -> None:
    kvm.refuse["KVM_SET_ONE_REG", arm64_ids.SVE_VLS] = errno.EINVAL
    layout = layout_of((arm64_ids.SVE_VLS, 64), phase=Phase.FINALIZE)
    assert len(attached().write(layout, 0, matrix(layout, [1], [1], [1]))) == 3
    assert "KVM_ARM_VCPU_FINALIZE" not in {name for _, name, _ in kvm.calls}


def test_the_pmu_is_initialized_after_its_interrupt(kvm: FakeKvm) -> None:
    layout = layout_of((gic.PMU_IRQ.id, 4), phase=Phase.FEATURE)
    attached().write(layout, 0, matrix(layout, [23], [23], [23]))
    assert [key for fd, _, key in kvm.calls if fd == 21] == [0, 1]
    assert kvm.attributes[21, 0, 0] == struct.pack("<I", 23)


def _gic_id(name: str) -> int:
    return next(s.id for at in gic.layouts(96, 1, True) for s in at.slots if lookup(s.id).name == name)


def test_redistributor_attributes_name_the_vcpu_by_its_affinity(kvm: FakeKvm) -> None:
    layout = layout_of((_gic_id("GICR_IGROUPR0"), 4), (_gic_id("ICC_PMR_EL1"), 8), phase=Phase.INTERRUPTS)
    attached().write(layout, 2, matrix(layout, [5, 6]))
    place = 0x04_03_02_02 << 32   # MPIDR_EL1 0x4_8003_0202: Aff3 4, Aff2 3, Aff1 2, Aff0 2; bit 31 is no affinity
    assert kvm.attributes == {(GIC_FD, 5, place | 0x10080): struct.pack("<I", 5),
                              (GIC_FD, 6, place | 0xC230): struct.pack("<Q", 6)}


def test_wide_distributor_registers_are_two_halves(kvm: FakeKvm) -> None:
    layout = layout_of((_gic_id("GICD_IROUTER33"), 8), scope=Scope.VM, phase=Phase.INTERRUPTS)
    wanted = matrix(layout, [0x1_0000_0203])
    vm = attached()
    vm.write(layout, 0, wanted)
    assert kvm.attributes == {(GIC_FD, 1, 0x6108): struct.pack("<I", 0x203),
                              (GIC_FD, 1, 0x610C): struct.pack("<I", 1)}
    found = np.zeros_like(wanted)
    vm.read(layout, 0, found)
    assert (found == wanted).all()


def test_set_only_registers_are_cleared_first(kvm: FakeKvm) -> None:
    layout = layout_of((_gic_id("GICD_ISENABLER2"), 4), scope=Scope.VM, phase=Phase.INTERRUPTS)
    attached().write(layout, 0, matrix(layout, [0x10]))
    written = [key & 0xFFFF for _, name, key in kvm.calls if name == "KVM_SET_DEVICE_ATTR"]
    assert written == [0x188, 0x108]
    assert kvm.attributes[GIC_FD, 1, 0x188] == b"\xff" * 4


@pytest.mark.parametrize(("name", "write", "order"), [
    ("GITS_CTLR", True, gic.ITS_RESTORE_TABLES), ("GITS_IIDR", False, gic.ITS_SAVE_TABLES),
    ("GICD_IIDR", False, gic.SAVE_PENDING_TABLES),
])
def test_tables_in_ram_are_saved_and_restored_just_before(kvm: FakeKvm, name: str, write: bool, order: int) -> None:
    id = _gic_id(name)
    layout = layout_of((id, lookup(id).size or 0), scope=Scope.VM, phase=Phase.INTERRUPTS)
    vm = attached()
    (vm.write if write else vm.read)(layout, 0, matrix(layout, [0]))
    attributes = [(fd, key >> 64, key & 0xFFFF) for fd, name, key in kvm.calls if name.endswith("DEVICE_ATTR")]
    device = GIC_FD if name == "GICD_IIDR" else ITS_FD
    assert attributes == [(device, gic.CONTROL, order), (device, *gic.attribute(id))]


def test_a_failed_table_restore_is_a_refusal_of_its_register(kvm: FakeKvm) -> None:
    kvm.refuse["KVM_SET_DEVICE_ATTR", gic.CONTROL << 64 | gic.ITS_RESTORE_TABLES] = errno.EFAULT
    layout = layout_of((_gic_id("GITS_CTLR"), 8), scope=Scope.VM, phase=Phase.INTERRUPTS)
    (refusal,) = attached().write(layout, 0, matrix(layout, [1]))
    assert str(refusal) == "VM: GITS_CTLR: KVM_SET_DEVICE_ATTR group 4 attribute 0x2: EFAULT"
    assert (ITS_FD, gic.ITS_REGISTERS, 0) not in kvm.attributes


def test_vcpu_init_is_told_and_can_not_be_changed(kvm: FakeKvm) -> None:
    layout = layout_of((rows.VCPU_INIT.id, 32), phase=Phase.CREATE)
    vm = attached(vcpu_features.DEFAULT | vcpu_features.SVE)
    found = matrix(layout, [0], [0], [0])
    assert vm.read(layout, 0, found) == []
    assert found[1].tolist() == [5 | (1 << 2 | 1 << 4) << 32, 0, 0, 0]
    assert vm.write(layout, 0, found) == []
    found[1, 0] += 8 << 32
    (refusal,) = vm.write(layout, 0, found)
    assert (refusal.vcpu, refusal.errno) == (1, errno.EINVAL)


def test_a_counter_offset_is_told_on_the_vm(kvm: FakeKvm) -> None:
    layout = layout_of((rows.COUNTER_OFFSET.id, 16), scope=Scope.VM, phase=Phase.CLOCK)
    vm = attached()
    wanted = matrix(layout, [123])
    vm.write(layout, 0, wanted)
    assert kvm.calls == [(VM_FD, "KVM_ARM_SET_COUNTER_OFFSET", 0)]
    found = np.zeros_like(wanted)
    vm.read(layout, 0, found)
    assert (found == wanted).all()


@pytest.mark.parametrize("count", [0, 1, 362, 1024, 1025, 5000])
def test_the_register_list_may_have_any_length(kvm: FakeKvm, count: int) -> None:
    kvm.listed = tuple(range(count))
    assert operations.register_list(20) == kvm.listed
    assert len(kvm.calls) == 1


def test_a_list_that_is_refused_is_an_error(kvm: FakeKvm) -> None:
    kvm.refuse["KVM_GET_REG_LIST", 0] = errno.EPERM
    with pytest.raises(BackendError, match="KVM_GET_REG_LIST: EPERM"):
        operations.register_list(20)


@pytest.mark.parametrize("features", [vcpu_features.DEFAULT, vcpu_features.DEFAULT | vcpu_features.PMU_V3])
def test_layouts_have_every_listed_register_once_and_run_through_the_phases(kvm: FakeKvm, features: int) -> None:
    kvm.listed = (X0, PSCI_VERSION, MPIDR, rows.COUNTERS[0].id, arm64_ids.sysreg(3, 3, 15, 15, 7))
    kvm.attributes = {(fd, 0, 0): struct.pack("<I", 23) for fd in VCPU_FDS}
    layouts, refused = attached(features).layouts()
    slots = [slot.id for layout in layouts for slot in layout.slots]
    assert not refused
    assert sorted({*kvm.listed} - {*slots}) == [] and len(slots) == len({*slots})
    assert [layout.phase for layout in layouts] == sorted(layout.phase for layout in layouts)
    assert (gic.PMU_IRQ.id in slots) == bool(features & vcpu_features.PMU_V3)
    assert [layout.scope for layout in layouts if layout.phase == Phase.INTERRUPTS] == [Scope.VM, Scope.VCPU, Scope.VM]


def test_scope_is_the_profiles_where_it_has_one(kvm: FakeKvm) -> None:
    """Unless streams have the register at one scope alone: no reader would take another."""
    kvm.listed = (X0, PSCI_VERSION, PFR0)
    found = titles(attached(scopes={PFR0: Scope.VCPU, PSCI_VERSION: Scope.VCPU}))
    assert (found[PFR0], found[PSCI_VERSION]) == ("vcpu/feature", "vm/feature")


def test_the_kernels_own_word_on_scope_wins(kvm: FakeKvm) -> None:
    """KVM_CAP_ARM_REG_SCOPE as it was proposed: the list flags what is the VM's; the ids in a stream have no flag."""
    kvm.listed = (X0, PFR0 | ids.KVM_REG_ARM_SCOPE_VM, TPIDR)
    vm = attached(scopes={PFR0: "vcpu", TPIDR: "vm"}, registers=(X0, PFR0, TPIDR), scope_flags=(PFR0,))
    assert titles(vm)[PFR0] == "vcpu/feature"
    profile = vm.backend.profile()
    vm.backend._profile = dataclasses.replace(profile, capabilities={**profile.capabilities, "ARM_REG_SCOPE": 1})
    assert (titles(vm)[PFR0], titles(vm)[TPIDR]) == ("vm/feature", "vcpu/state")


PFR0 = arm64_ids.sysreg(3, 0, 0, 4, 0)
"""Kernels differ in whether they keep it once a VM."""

TPIDR = arm64_ids.sysreg(3, 3, 13, 0, 2)


def titles(vm: backend.KvmVm) -> dict[int, str]:
    return {slot.id: at.title for at in vm.layouts()[0] for slot in at.slots}


# features that capabilities promise and vCPUs do not get


class Picky:
    """A host whose vCPUs are refused with some features, or with two of them together."""

    def __init__(self, refused: int, together: int = 0) -> None:
        self.refused, self.together, self.open = refused, together, 0

    def create(self, machine: Machine) -> Picky:
        self.features = machine.devices["vcpu_features"]
        return self

    def __enter__(self) -> Picky:
        self.open += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.open -= 1

    def create_vcpus(self) -> None:
        if self.features & self.refused or (self.together and self.features & self.together == self.together):
            raise BackendError("KVM_ARM_VCPU_INIT", errno=errno.EINVAL)


ALL = vcpu_features.DEFAULT | vcpu_features.PMU_V3 | vcpu_features.SVE | vcpu_features.PTRAUTH


@pytest.mark.parametrize(("refused", "together", "taken"), [
    (0, 0, ALL), (vcpu_features.PMU_V3, 0, ALL & ~vcpu_features.PMU_V3),
    (vcpu_features.PTRAUTH, 0, ALL & ~vcpu_features.PTRAUTH),
    (0, vcpu_features.PMU_V3 | vcpu_features.SVE, ALL),
])
def test_features_are_those_that_a_vcpu_can_be_made_with(refused: int, together: int, taken: int) -> None:
    host = Picky(refused, together)
    assert arm64._taken(host, ALL) == taken  # type: ignore[arg-type]  # all that is used of a host
    assert host.open == 0
