"""What is said to an arm64 kernel: single ioctls of vCPUs that nothing was done to yet."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from migstream.backends.base import Backend
from migstream.backends.kvm import KvmBackend, uapi
from migstream.backends.sim.arm64 import Arm64SimVm, ids
from migstream.host import firmware_arm64
from migstream.host.profile import HostProfile
from migstream.model import Arch, Klass, Machine, MemoryRegion
from migstream.registers import arm64_ids, gic, vcpu_features
from migstream.registers.catalogue import lookup
from tests.fidelity import arm64_devices as devices
from tests.fidelity import arm64_its as its
from tests.fidelity import arm64_program as program
from tests.fidelity.arm64_kvm import RealArm64
from tests.fidelity.calls import Answer, Call, Excluded, Stage, call

EXCLUDED = (
    Excluded("the values of TIMER_CNT and PTIMER_CNT", "they run; what a write of them answers is compared"),
    Excluded("TIMER_CVAL and PTIMER_CVAL are written far below or far above the counters",
             "ISTATUS would depend on the time between two calls"),
    Excluded("KVM_VCPU_EVENTS byte 2 (ext_dabt_pending) is 0 in what is written",
             "the kernel delivers the abort into ESR_EL1, FAR_EL1, PC and PSTATE: no simulator of an exception here"),
    Excluded("no guest programs on vCPUs with EL1_32BIT; it is not asked for together with SVE",
             "they are AArch64's; 5.10 refuses both and leaves SVE behind"),
    Excluded("guest programs run with the OS lock off (OSLSR_EL1.OSLK)",
             "else 7.2 saves MDCCINT_EL1 from the CPU, and QEMU has a NOP there: it reads as what the general register "
             "held (target/arm/debug_helper.c; measured: 20 of 20 such runs, none without the lock)"),
    Excluded("the value of DBGVCR32_EL2 on vCPUs with EL1_32BIT", "KVM saves it from the CPU after a run; a NOP, too"),
    Excluded("guest programs run on vCPUs without a PMU, at EL1 with the MMU off and exceptions masked",
             "cycles are time; a guest that takes exceptions is no matter of the register interface"),
    Excluded("of a call's results X0 is compared; X1 to X3 are cleared after it", "a profile has X0 alone"),
    Excluded("KVM_ARM_VCPU_PMU_V3_SET_PMU is told a PMU that there is not", "the others' numbers are a boot's"),
    Excluded("guest programs run with group 0 interrupts off: ICC_IGRPEN0_EL1 is 0 again after a write was compared",
             "since 6.19 KVM asks for an interrupt when a guest turns group 0 off, and QEMU's GIC looks at group 1 "
             "for that: it never ends (maintenance_interrupt_state() in hw/intc/arm_gicv3_cpuif.c; measured: 7.2)"),
    Excluded("an ITS: LPIs are not enabled in their table", "they would be queued to a vCPU; no guest takes one"),
    Excluded("an ITS: collections that events go to are not taken away, and tables are read into an ITS that was reset",
             "vgic_its_save_ite() then follows a pointer that is NULL: the kernel would end (read, not tried)"),
    Excluded("KVM_PTP's answer to a guest is compared as answered or not", "it is a time"),
)

SVE, PMU, PTRAUTH, PSCI = vcpu_features.SVE, vcpu_features.PMU_V3, vcpu_features.PTRAUTH, vcpu_features.PSCI_0_2
NARROW = vcpu_features.EL1_32BIT
_SETS = (PSCI, PSCI, PSCI, PSCI | PMU, PSCI | PMU, PSCI | SVE, PSCI | PTRAUTH, PSCI | SVE | PMU | PTRAUTH, 0,
         SVE | PTRAUTH, PSCI | NARROW, PSCI | NARROW | PMU)
_ODD_SETS = (PSCI | NARROW, NARROW | PTRAUTH,
             PSCI | 1, PSCI | 1 << 5, PSCI | 1 << 6, PSCI | 1 << 7, PSCI | 1 << 8, PSCI | 1 << 9, 1 << 31)

_WORDS = (0, 1, 2, 3, 0xF, 0x10, 1 << 31, 1 << 32, 1 << 63, (1 << 32) - 1, (1 << 64) - 1, 0x3C5, 0x1D3, 0x10000,
          0x10001, 0x10002, 0x10003, 0x10004, 0x12, 0x13, 0x1F)
_BUSY = (ids.PSTATE, ids.PSCI_VERSION, *ids.WORKAROUNDS, *ids.BITMAPS, ids.CTR, ids.CLIDR, ids.ID_AA64PFR0,
         ids.ID_AA64PFR1, ids.ID_AA64DFR0, ids.ID_DFR0, ids.ID_AA64MMFR0, ids.ID_AA64ISAR1, ids.PMCR, ids.PMCNTENSET,
         ids.PMCNTENCLR, ids.PMOVSSET, ids.PMINTENCLR, ids.TIMER_CTL, ids.PTIMER_CTL, ids.OSLSR, ids.SVE_VLS, ids.PC,
         arm64_ids.ccsidr(0), arm64_ids.ccsidr(1), ids.Z[0], ids.P[16], ids.X[5], ids.X[20], ids.MPIDR, ids.V[0])
"""Registers with more rules than others are used more often."""

_STRANGE = (
    arm64_ids.core(1), arm64_ids.core(0, arm64_ids.U32), arm64_ids.core(216), arm64_ids.core(214, arm64_ids.U32),
    arm64_ids.core(215, arm64_ids.U32), arm64_ids.core(82), arm64_ids.core(84), arm64_ids.core(0x1234),
    arm64_ids.firmware(4), arm64_ids.firmware(12), arm64_ids.bitmap(4), arm64_ids.bitmap(0) & ~(1 << 52),
    arm64_ids.firmware(0) & ~(1 << 52), ids.SVE_VLS & ~(1 << 52), ids.Z[1] | 1, ids.P[3] | 2, ids.Z[31] | 31,
    ids.Z[0] & ~(1 << 52), arm64_ids.ARM64 | arm64_ids.U64 | arm64_ids.SVE | 0x700, arm64_ids.ccsidr(14),
    arm64_ids.ccsidr(200), arm64_ids.ccsidr(0x100), arm64_ids.ccsidr(0) | 1 << 52, arm64_ids.sysreg(3, 0, 15, 15, 7),
    arm64_ids.sysreg(3, 3, 0, 0, 1) & ~(1 << 52), arm64_ids.ARM64 | arm64_ids.U64 | 0x17 << 16,
    1 << 32 | arm64_ids.firmware(0), 0x4030_0000_0013_C080, ids.PSCI_VERSION | 1 << 28, ids.X[0] | 1 << 28,
    ids.Z[0] | 1 << 28, ids.CTR | 1 << 28, ids.MPIDR, ids.PMCR, ids.Z[0], ids.V[3], ids.SVE_VLS,
)
"""Ids that no kernel has, or not in this size, or only with a feature."""

_X_PC = {**dict(enumerate(ids.X)), 32: ids.PC}
_AT_START = ((ids.MP_STATE, 0), (ids.SCTLR, 0x30C5_0830), (ids.MDSCR, 0), (ids.PSTATE, 0x3C5))
"""A vCPU that may run, MMU and debugging off, at EL1 with everything masked."""

_PMU_IRQ = (0, 0)
_STRUCTS = {ids.MP_STATE: (uapi.GET_MP_STATE, uapi.SET_MP_STATE),
            ids.VCPU_EVENTS: (uapi.GET_VCPU_EVENTS, uapi.SET_VCPU_EVENTS)}
_CAPABILITIES = (205, 216, 239, 9999)
"""ARM_MTE, ARM_SYSTEM_SUSPEND, ARM_WRITABLE_IMP_ID_REGS, and one that there is not."""

_ITS_CALLS = 16
"""Of a VM with an ITS, after it is made."""

_GROUP_0 = next(id for id in devices.REGISTERS if lookup(id).name == "ICC_IGRPEN0_EL1")

_CWRITER, _CREADR = 0x88, 0x90
_TABLE_REGISTERS = (0x80, 0x100, 0x108)
"""GITS_CBASER, GITS_BASER0, GITS_BASER1."""

_OSLK = 2
_ITS_RESET = 4
"""KVM_DEV_ARM_ITS_CTRL_RESET."""

_FAR = (0, 1, 1 << 63, (1 << 64) - 1)


class Side(Protocol):
    """What both kernels do: an errno, and what was read."""

    def init(self, vcpu: int, features: int, target: int | None = None) -> tuple[int, bytes]: ...
    def finalize(self, vcpu: int, what: int) -> tuple[int, bytes]: ...
    def listed(self, vcpu: int, room: int) -> tuple[int, bytes]: ...
    def get(self, vcpu: int, id: int) -> tuple[int, bytes]: ...
    def set(self, vcpu: int, id: int, value: bytes) -> tuple[int, bytes]: ...
    def plain(self, vcpu: int, ids: Sequence[int]) -> list[bytes]: ...
    def run(self, vcpu: int) -> tuple[int, bytes]: ...
    def load(self, address: int, code: bytes) -> None: ...
    def execute(self, vcpu: int, instructions: int) -> tuple[int, bytes]: ...
    def enable(self, capability: int) -> int: ...
    def set_counter_offset(self, offset: int, reserved: int) -> int: ...
    def create_gic(self) -> int: ...
    def gic_attribute(self, verb: str, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]: ...
    def gic_register(self, verb: str, vcpu: int, id: int, value: int = 0) -> tuple[int, bytes]: ...
    def create_its(self) -> int: ...
    def its_attribute(self, verb: str, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]: ...
    def peek(self, address: int, size: int) -> bytes: ...
    def line(self, verb: str, vcpu: int, group: int, attribute: int, value: int = 0) -> tuple[int, bytes]: ...
    def close(self) -> None: ...


class RealSide(RealArm64):
    """The real kernel; structs by our ids, too."""

    def get(self, vcpu: int, id: int) -> tuple[int, bytes]:
        return self.struct_get(vcpu, _STRUCTS[id][0]) if id in _STRUCTS else super().get(vcpu, id)

    def set(self, vcpu: int, id: int, value: bytes) -> tuple[int, bytes]:
        return self.struct_set(vcpu, _STRUCTS[id][1], value) if id in _STRUCTS else super().set(vcpu, id, value)

    def run(self, vcpu: int) -> tuple[int, bytes]:
        return self.enter(vcpu)


class Arm64Stage(Stage):
    """One VM, with vCPUs that KVM_ARM_VCPU_INIT was not called for."""

    side: Side | None = None
    vcpus = 0

    def __init__(self, backend: Backend, profile: HostProfile) -> None:
        """See `Stage`."""
        super().__init__(backend, profile)
        self._narrow: set[int] = set()

    def close(self) -> None:
        """Destroy the VM."""
        if self.side:
            self.side.close()
            self.side = None

    def do_create(self, vcpus: int, caps: Sequence[int] = ()) -> Answer:
        """Make a VM instead of the one that there is: KVM_ENABLE_CAP, then vCPUs."""
        self.close()
        self.vcpus = vcpus
        self._narrow = set()
        if isinstance(self.backend, KvmBackend):
            self.side = RealSide(vcpus, caps)
            self.side.load(program.ADDRESS, program.code())
            return self.side.enabled
        vm = self.backend.create(Machine(Arch.ARM64, vcpus, (MemoryRegion(0, 1 << 20),), {}))
        assert isinstance(vm, Arm64SimVm)
        enabled = [vm.enable(number) for number in caps]
        vm.guest.add_vcpus(vcpus)
        self.side = vm
        vm.load(program.ADDRESS, program.code())
        return enabled

    def _ask(self, vcpu: int, ask: Callable[[Side], tuple[int, bytes]]) -> Answer:
        if self.side is None or vcpu >= self.vcpus:
            return {"no": "vCPU"}
        no, value = ask(self.side)
        if no or not value:
            return {"errno": no}
        return {"exit": value.decode()} if value.startswith(b"KVM_EXIT") else {"value": value.hex()}

    def do_init(self, vcpu: int, features: int, target: int | None = None) -> Answer:
        """KVM_ARM_VCPU_INIT."""
        answer = self._ask(vcpu, lambda side: side.init(vcpu, features, target))
        if answer == {"errno": 0} and features & NARROW:
            self._narrow.add(vcpu)
        return answer

    def do_finalize(self, vcpu: int, what: int) -> Answer:
        """KVM_ARM_VCPU_FINALIZE."""
        return self._ask(vcpu, lambda side: side.finalize(vcpu, what))

    def do_listed(self, vcpu: int, room: int) -> Answer:
        """KVM_GET_REG_LIST: the ids, ascending."""
        return self._ask(vcpu, lambda side: side.listed(vcpu, room))

    def do_get(self, vcpu: int, id: int) -> Answer:
        """KVM_GET_ONE_REG."""
        answer = self._ask(vcpu, lambda side: side.get(vcpu, id))
        unfair = id in ids.CLOCKS or (id == ids.DBGVCR32 and vcpu in self._narrow)
        return {"value": "runs"} if unfair and "value" in answer else answer

    def do_set(self, vcpu: int, id: int, value: str) -> Answer:
        """KVM_SET_ONE_REG; then the register on this vCPU and on the next."""
        answer = {"set": self._ask(vcpu, lambda side: side.set(vcpu, id, bytes.fromhex(value)))}
        for other in {vcpu, (vcpu + 1) % max(self.vcpus, 1)}:
            answer[f"vCPU {other}"] = self.do_get(other, id)
        return answer

    def do_run(self, vcpu: int) -> Answer:
        """KVM_RUN that leaves at once."""
        return self._ask(vcpu, lambda side: side.run(vcpu))

    def do_execute(self, vcpu: int, asked: list[int]) -> Answer:
        """A guest at EL1 with its MMU off asks its firmware and reads registers: what it sees of each."""
        if self.side is None or vcpu >= self.vcpus:
            return {"no": "vCPU"}
        if not self.side.line("has", vcpu, *_PMU_IRQ)[0]:
            return {"no": "program on a vCPU with a PMU"}
        self._unlock(self.side, vcpu)
        for id, value in _AT_START:
            if self.side.set(vcpu, id, value.to_bytes(lookup(id).size or 8, "little"))[0]:
                return {"no": f"start: {lookup(id).name}"}
        seen = {program.QUESTIONS[key].name: self._seen(self.side, vcpu, program.QUESTIONS[key]) for key in asked}
        for number in range(program.RESULT + 1):
            self.side.set(vcpu, ids.X[number], bytes(8))  # of a call's results only X0 is compared, and no time
        return seen

    @staticmethod
    def _unlock(side: Side, vcpu: int) -> None:
        no, lock = side.get(vcpu, ids.OSLSR)
        if not no and lock[0] & _OSLK:
            side.set(vcpu, ids.OSLSR, bytes([lock[0] & ~_OSLK]) + lock[1:])

    def _seen(self, side: Side, vcpu: int, question: firmware_arm64.Question) -> Answer:
        side.run(vcpu)  # completes the exit before
        for number, value in program.start(question).items():
            side.set(vcpu, _X_PC[number], value.to_bytes(8, "little"))
        answer = self._ask(vcpu, lambda side: side.execute(vcpu, 10))
        seen = int.from_bytes(side.get(vcpu, ids.X[program.RESULT])[1], "little")
        return answer if "errno" in answer else {**answer, "seen": hex(question.answer(seen))}

    def do_enable(self, capability: int) -> Answer:
        """KVM_ENABLE_CAP of a VM that has vCPUs."""
        return self._ask(0, lambda side: (side.enable(capability), b""))

    def do_offset(self, offset: int, reserved: int) -> Answer:
        """KVM_ARM_SET_COUNTER_OFFSET."""
        return self._ask(0, lambda side: (side.set_counter_offset(offset, reserved), b""))

    def do_gic_create(self) -> Answer:
        """KVM_CREATE_DEVICE of a vGICv3."""
        return {"no": "VM"} if self.side is None else {"errno": self.side.create_gic()}

    def do_gic(self, verb: str, group: int, attribute: int, value: int = 0) -> Answer:
        """KVM_HAS, GET or SET_DEVICE_ATTR of what makes the vGIC."""
        return self._ask(0, lambda side: side.gic_attribute(verb, group, attribute, value))

    def do_gic_get(self, vcpu: int, id: int) -> Answer:
        """A register of the vGIC."""
        return self._ask(vcpu, lambda side: side.gic_register("get", vcpu, id))

    def do_gic_set(self, vcpu: int, id: int, value: int) -> Answer:
        """The same; then it is read."""
        answer = self._ask(vcpu, lambda side: side.gic_register("set", vcpu, id, value))
        found = self.do_gic_get(vcpu, id)
        if id == _GROUP_0 and self.side is not None:
            self.side.gic_register("set", vcpu, id, 0)
        return {"set": answer, "get": found}

    def do_its_create(self) -> Answer:
        """KVM_CREATE_DEVICE of an ITS."""
        if self.side is None:
            return {"no": "VM"}
        self.side.load(*its.FIRST_LEVEL_TABLE)
        return {"errno": self.side.create_its()}

    def do_its(self, verb: str, group: int, attribute: int, value: int = 0) -> Answer:
        """KVM_HAS, GET or SET_DEVICE_ATTR of the ITS."""
        return self._ask(0, lambda side: side.its_attribute(verb, group, attribute, value))

    def do_its_command(self, words: Sequence[int]) -> Answer:
        """A command in the queue, where GITS_CWRITER is, which goes on: then GITS_CREADR."""
        at = self.do_its("get", gic.ITS_REGISTERS, _CWRITER)
        if self.side is None or "value" not in at:
            return at
        place = int.from_bytes(bytes.fromhex(at["value"]), "little")
        if place < 4096:
            self.side.load(its.QUEUE + place, struct.pack("<4Q", *words))
        return {"set": self.do_its("set", gic.ITS_REGISTERS, _CWRITER, (place + 32) % 4096),
                "get": self.do_its("get", gic.ITS_REGISTERS, _CREADR)}

    def do_its_save(self) -> Answer:
        """KVM_DEV_ARM_ITS_SAVE_TABLES: then what is in the tables in guest RAM."""
        return self._with_tables(self.do_its("set", gic.CONTROL, gic.ITS_SAVE_TABLES))

    def do_its_restore(self) -> Answer:
        """KVM_DEV_ARM_ITS_CTRL_RESET, the tables' registers, and KVM_DEV_ARM_ITS_RESTORE_TABLES; the tables."""
        before = [self.do_its("get", gic.ITS_REGISTERS, offset).get("value", "") for offset in _TABLE_REGISTERS]
        out = [self.do_its("set", gic.CONTROL, _ITS_RESET)]
        for offset, value in zip(_TABLE_REGISTERS, before, strict=True):
            out.append(self.do_its("get", gic.ITS_REGISTERS, offset))
            self.do_its("set", gic.ITS_REGISTERS, offset, int.from_bytes(bytes.fromhex(value), "little"))
        out.append(self.do_its("set", gic.CONTROL, gic.ITS_RESTORE_TABLES))
        return [*out, self._with_tables(self.do_its("set", gic.ITS_REGISTERS, 0, 1))]

    def do_gic_pending(self) -> Answer:
        """KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES; then the tables."""
        return self._with_tables(self.do_gic("set", gic.CONTROL, gic.SAVE_PENDING_TABLES))

    def _with_tables(self, answer: Answer) -> Answer:
        """With all words of the tables that are not 0, by address."""
        found: dict[str, str] = {}
        for first, end in its.TABLES if self.side else ():
            words = np.frombuffer(self.side.peek(first, end - first), np.uint64) if self.side else np.zeros(0)
            found |= {hex(first + 8 * int(n)): hex(int(words[n])) for n in np.flatnonzero(words)}
        return {**answer, "tables": found}

    def do_line(self, verb: str, vcpu: int, group: int, attribute: int, value: int = 0) -> Answer:
        """KVM_HAS, GET or SET_DEVICE_ATTR of a vCPU."""
        return self._ask(vcpu, lambda side: side.line(verb, vcpu, group, attribute, value))

    def do_dump(self, vcpu: int) -> Answer:
        """Every register of a vCPU that is not what the profile's vCPUs are made with, by name."""
        if self.side is None or vcpu >= self.vcpus:
            return {"no": "vCPU"}
        no, listed = self.side.listed(vcpu, 2000)
        if no:
            return {"errno": no}
        values = {}
        found = struct.unpack(f"<{len(listed) // 8}Q", listed)
        plain = {id: _plain(self.profile, id) for id in found}
        values_now = zip(found, self.side.plain(vcpu, found), strict=True)
        as_made = [id for id, value in values_now if value and value == plain[id]]
        for id in (*sorted({*found}.difference(as_made)), *_STRUCTS):
            answer = self.do_get(vcpu, id)
            if answer.get("value", "") not in (_made_with(self.profile, id), "runs"):
                values[lookup(id).name] = answer
        return values


def _made_with(profile: HostProfile, id: int) -> str:
    return _plain(profile, id).hex()


def _plain(profile: HostProfile, id: int) -> bytes:
    return profile.defaults.get(id) or profile.feature_defaults.get(id, b"")


class Arm64:
    """See `tests.fidelity.calls.Vocabulary`."""

    arch = Arch.ARM64
    excluded = EXCLUDED

    def story(self, source: random.Random, profile: HostProfile, calls: int) -> list[Call]:
        """A VM, mostly vCPUs with one set of features and finalized; then anything."""
        return Author(source, profile).story(calls)

    def stage(self, backend: Backend, profile: HostProfile) -> Stage:
        """A fresh stage."""
        return Arm64Stage(backend, profile)

    def facts(self, real: Backend) -> dict[str, int]:
        """None: an arm64 profile holds nothing that is another number at each boot."""
        return {}

    def told(self, profile: HostProfile, facts: dict[str, int]) -> HostProfile:
        """The profile as it is."""
        return profile


class Author:
    """Makes one sequence."""

    def __init__(self, source: random.Random, profile: HostProfile) -> None:
        self.random, self.profile = source, profile
        self.vcpus = source.choice((1, 2, 2, 3))
        self.features = source.choice(_SETS)
        self.gic = source.random() < 0.35
        self.its = self.gic and source.random() < 0.4
        self.ids = sorted(profile.with_features(self.features).listed)
        kinds: dict[tuple[Klass, int], list[int]] = {}
        for id in self.ids:
            kinds.setdefault((lookup(id).klass, id >> 16 & 0xFFF), []).append(id)
        self.kinds = [kinds[key] for key in sorted(kinds)]

    def story(self, calls: int) -> list[Call]:
        """So many calls."""
        caps = [number for number in _CAPABILITIES if self.random.random() < 0.25]
        out = [call("create", vcpus=self.vcpus, caps=caps)]
        for vcpu in range(self.vcpus):
            if self.random.random() < 0.1:
                out += [self.any_call() for _ in range(2)]
            if self.random.random() < 0.95:
                out += self.made(vcpu)
        if self.gic:
            out += devices.made(self.random)
        if self.features & PMU and self.random.random() < 0.8:
            out += devices.pmu(self.random, self.vcpus, self.gic)
        if self.its:
            out += its.made(self.random, self.vcpus)
            calls = max(calls, len(out) + _ITS_CALLS)
        while len(out) < calls - 1:
            out.append(self.any_call())
        return [*out, call("dump", vcpu=self.random.randrange(self.vcpus))]

    def made(self, vcpu: int) -> list[Call]:
        """A vCPU as a VMM makes it."""
        out = [call("init", vcpu=vcpu, features=self.features)]
        if self.features & SVE and self.random.random() < 0.9:
            if self.random.random() < 0.4:
                out.append(call("set", vcpu=vcpu, id=ids.SVE_VLS, value=self.value(ids.SVE_VLS)))
            out.append(call("finalize", vcpu=vcpu, what=4))
        return out

    def any_call(self) -> Call:
        """One call."""
        vcpu, kind = self.random.randrange(self.vcpus), self.random.random()
        if self.its and self.random.random() < 0.6:
            return its.any_call(self.random)
        if kind < 0.03:
            return call("init", vcpu=vcpu, features=self.random.choice((*_ODD_SETS, *_SETS, self.features | 1)))
        if kind < 0.05:
            return call("init", vcpu=vcpu, features=self.features, target=self.random.choice((0, 1, 5, 6)))
        if kind < 0.08:
            return call("init", vcpu=vcpu, features=self.features)
        if kind < 0.085:
            return call("enable", capability=self.random.choice(_CAPABILITIES))
        if kind < 0.09:
            return call("offset", offset=self.random.choice((0, 1 << 20)), reserved=self.random.choice((0, 0, 1)))
        if kind < 0.11:
            return call("finalize", vcpu=vcpu, what=self.random.choice((4, 4, 0, 5)))
        if kind < 0.14:
            return call("listed", vcpu=vcpu, room=self.random.choice((0, 1, 100, 2000)))
        if kind < 0.19:
            return call("run", vcpu=vcpu)
        if kind < 0.23:
            return call("execute", vcpu=vcpu, asked=self.random.sample(sorted(program.QUESTIONS), 2))
        if kind < (0.42 if self.gic else 0.27):
            return devices.any_call(self.random, vcpu, self.gic)
        if self.random.random() < 0.12:
            return call("get", vcpu=vcpu, id=self.id())
        id = self.id()
        return call("set", vcpu=vcpu, id=id, value=self.value(id))

    def id(self) -> int:
        """A register."""
        kind = self.random.random()
        if kind < 0.35:
            return self.random.choice(_BUSY)
        if kind < 0.43:
            return self.random.choice(_STRANGE)
        if kind < 0.5:
            return self.random.choice(tuple(_STRUCTS))
        return self.random.choice(self.random.choice(self.kinds) if kind < 0.8 else self.ids)

    def value(self, id: int) -> str:
        """A value, near the one that vCPUs are made with or far from it."""
        size = lookup(id).size or 1 << (id >> 52 & 0xF)
        plain, full = self.profile.defaults.get(id), self.profile.feature_defaults.get(id)
        start = full if self.features & ~PSCI and full else plain or full or bytes(size)
        number = int.from_bytes(start, "little")
        number = self._special(id, number, size)
        return (number & (1 << 8 * size) - 1).to_bytes(size, "little").hex()

    def _special(self, id: int, number: int, size: int) -> int:
        choose = self.random.choice
        if id in (ids.TIMER_CVAL, ids.PTIMER_CVAL):
            return choose(_FAR)
        if id in ids.CLOCKS:
            return choose((0, 1, 1 << 20, 1 << 60))
        if id == ids.MP_STATE:
            return choose((0, 5, 10, 1, 3, 11, 1 << 31))
        if id == ids.VCPU_EVENTS:
            return self._events()
        if id == ids.SVE_VLS and self.random.random() < 0.7:
            return number & (1 << self.random.randrange(1, 18)) - 1
        if lookup(id).klass in (Klass.FEATURE, Klass.IDENTITY) and self.random.random() < 0.8:
            return self._nibbles(number, size)
        return self._mixed(number, size)

    def _nibbles(self, number: int, size: int) -> int:
        for _ in range(self.random.choice((0, 1, 1, 1, 2))):
            low = 4 * self.random.randrange(2 * size)
            if number >> low & 0xF and self.random.random() < 0.6:
                new = (number >> low & 0xF) - 1
            else:
                new = self.random.randrange(16)
            number = number & ~(0xF << low) | new << low
        return number

    def _mixed(self, number: int, size: int) -> int:
        kind = self.random.random()
        if kind < 0.3:
            return number ^ 1 << self.random.randrange(8 * size)
        if kind < 0.6:
            return self.random.choice(_WORDS)
        return self.random.getrandbits(8 * size) if kind < 0.9 else number

    def _events(self) -> int:
        first = self.random.choice((0, 1, 0x101, 0x100, 0x101, 1 << 24, 2))
        esr = self.random.choice((0, 0x123, 1 << 24, 1 << 25, 0x1FF_FFFF))
        rest = self.random.choice((0, 0, 0, 1)) << 8 * self.random.randrange(16, 64)
        return first | esr << 64 | rest


VOCABULARY = Arm64()
