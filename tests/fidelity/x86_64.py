"""What is said to an x86-64 kernel."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from migstream.backends.base import Backend, Refusal, Vm
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from tests.fidelity import guest_x86_64 as guest
from tests.fidelity.calls import Answer, Call, Excluded, Stage, call

if TYPE_CHECKING:
    from migstream.model import Words

DEVICES: tuple[dict[str, Any], ...] = (
    {"irqchip": True, "pit": True, "tss_address": 0x7FFB_D000}, {"irqchip": True}, {})
CAPS: tuple[dict[str, list[int]], ...] = (
    {}, {}, {}, {"129": [3]}, {"164": [1]}, {"218": [1]}, {"164": [1], "218": [1], "129": [1]}, {"164": [1]},
    {"218": [1], "188": [7]}, {"116": [1]}, {"129": [2], "159": [0]}, {"129": [0x20]}, {"188": [8]}, {"999": [1]})
"""KVM_ENABLE_CAP by number: X2APIC_API, EXCEPTION_PAYLOAD, X86_TRIPLE_FAULT_EVENT, X86_USER_SPACE_MSR, DISABLE_QUIRKS
(LINT0), MSR_PLATFORM_INFO; then arguments that no kernel takes, and a capability that none has."""

_SIZES = {row.id: row.size for row in x86_64.ROWS if row.size}
CHIPS = (x86_64.PIC_MASTER.id, x86_64.PIC_SLAVE.id, x86_64.IOAPIC.id)
BUSY = (x86_64.SREGS2.id, x86_64.SREGS.id, x86_64.LAPIC.id, x86_64.VCPU_EVENTS.id, x86_64.MP_STATE.id, x86_64.XCRS.id,
        x86_64.XSAVE.id, x86_64.REGS.id)
"""Registers with more rules than others are written more often."""

ABSOLUTE = (x86_64.TSC_OFFSET.id, ids.msr_id(0x10), x86_64.CLOCK.id)
"""Clocks: written whole, because a change to what they stand at is never the same twice."""

UNREADABLE = (x86_64.CLOCK.id, ids.msr_id(0x10), ids.msr_id(0x4000_0010), ids.msr_id(0x4000_0020))

WORDS = (0, 1, 2, 3, 4, 7, 0xFF, 0x20, 0x500, 0x8001_0033, 0x11, 0xE7, 0xFEE0_0900, 0xFEE0_0D00, 1 << 47, (1 << 48) - 1,
         0x1001, 0x7_F001, 0xFFFF_F001, 0x0007_0406_0007_0406, (1 << 64) - 1)
"""64-bit words that mean something somewhere: modes, APIC bases, an area in RAM and one outside, memory types."""

_SEGMENTS = (
    (224, "word", (0x8001_0033, 0x6000_0010, 0x11, 0x10, 0x8000_0001, 0x2000_0010, 1 << 32)),       # CR0
    (240, "word", (0, 0x1000, 1 << 51, (1 << 63) | 0x1000)),                                        # CR3
    (248, "word", (0, 0x20, 0x6A0, 0x4_0020, 0x1_0000, 0x2_0020, 0x2000, 0x30_0000, 0x1000, 0x800)),  # CR4
    (256, "word", (0, 5, 15, 16)),                                                                  # CR8
    (264, "word", (0, 0x500, 0x1500, 0x1000, 0x100, 0xD01, 0x800, 0x400, 0x4000)),                  # EFER
    (272, "word", (0xFEE0_0900, 0xFEE0_0D00, 0xFEE0_0C00, 0xFEE0_0800, 0xFEE0_0400, 0xFEE0_0000, 0x1234_5900)),
    (13, "byte", (0, 1)), (12, "byte", (0, 3, 11)), (14, "byte", (0, 3)),                           # CS
    (132, "byte", (0, 3)), (134, "byte", (0, 3)),                                                   # SS
)
AIMS: dict[int, tuple[tuple[int, str, tuple[int, ...]], ...]] = {
    x86_64.SREGS.id: (*_SEGMENTS, (280, "word", (0, 1 << 32, 1 << 63))),
    x86_64.SREGS2.id: (*_SEGMENTS, (280, "word", (0, 1, 2)), (288, "word", (0x1001, 0x2001))),
    x86_64.REGS.id: ((136, "word", (2, 0x202, 0x1_0002, 0x2_0002, 0x102, 0)), (128, "word", (0, 0xFFF0, 1 << 47))),
    x86_64.LAPIC.id: tuple((offset, "word", values) for offset, values in (
        (0x20, (0, 1, 1 << 24, 0xFF00_0000)), (0x30, (0, 0x5_0014)), (0x80, (0, 0x20, 0xFF)), (0xA0, (0, 0x30)),
        (0xD0, (0, 1 << 24, 0xFF00_0000)), (0xE0, (0xFFFF_FFFF, 0x0FFF_FFFF, 0)), (0xF0, (0xFF, 0x1FF, 0x11FF, 0x10)),
        (0x100, (0, 1 << 31)), (0x120, (0, 1 << 8)), (0x170, (0, 1 << 31)), (0x180, (1 << 4,)), (0x270, (0, 1 << 31)),
        (0x220, (0, 1 << 8)), (0x280, (0, 0x40)), (0x300, (0, 0x8_00F1, 0x4500, 0x1000)), (0x310, (0, 1 << 24, 1)),
        (0x320, (0x1_0000, 0x2_00EC, 0x4_00EC, 0x6_00EC, 0xEC)), (0x350, (0x700, 0x1_0000, 0x8700)),
        (0x360, (0x400, 0x1_0400)), (0x3E0, (0, 0xB)))),
    x86_64.VCPU_EVENTS.id: ((0, "byte", (0, 1)), (1, "byte", (1, 2, 3, 4, 14, 32)), (2, "byte", (0, 1)),
                            (3, "byte", (0, 1)), (8, "byte", (0, 1)), (9, "byte", (0x20, 0xFF)), (10, "byte", (0, 1)),
                            (11, "byte", (0, 1, 2, 3)), (12, "byte", (0, 1)), (13, "byte", (0, 1, 2, 3)),
                            (14, "byte", (0, 1)), (16, "byte", (0, 0x9F)), (24, "byte", (0, 1)), (25, "byte", (0, 1)),
                            (26, "byte", (0, 1)), (28, "byte", (0, 1)), (55, "byte", (0, 1)), (56, "word", (0, 0x1000)),
                            (20, "byte", (0, 1, 2, 4, 8, 0xD, 0xF, 0x10, 0x1F, 0x20, 0x2F, 0x3F, 0x40))),
    x86_64.MP_STATE.id: ((0, "byte", (0, 1, 2, 3, 4, 5, 9, 10)),),
    x86_64.XCRS.id: ((0, "byte", (0, 1, 2, 17)), (4, "byte", (0, 1)), (8, "byte", (0, 1)),
                     (16, "word", (0, 1, 2, 3, 5, 6, 7, 0xE7, 1 << 63))),
    x86_64.XSAVE.id: ((512, "word", (0, 1, 2, 3, 4, 7, 0xE7, 1 << 62)), (520, "word", (0, 1 << 63)),
                      (24, "byte", (0, 0x80)), (26, "byte", (0, 1)), (160, "word", (0, 1)), (576, "word", (0, 7))),
    x86_64.NESTED_STATE.id: ((0, "byte", (0, 1, 2, 4)), (1, "byte", (0, 1, 2)), (2, "byte", (0, 1, 2)),
                             (4, "byte", (0, 0x7F, 0x80)), (0, "word", (0x80_0001_0100, 0x80_0001_0000))),
    x86_64.DEBUGREGS.id: ((0, "word", (0, 1 << 63)), (32, "word", (0xFFFF_0FF0, 0, 0x4000, 1 << 32)),
                          (40, "word", (0x400, 0, 0xFF, 1 << 32)), (48, "word", (0, 1))),
}
"""(place, how, values) as `do_change` takes them: modes, interrupt controller states, pending events."""

STRANGE_MSRS = (0x0123_4567, 0x5000_0000, 0xC000_0999)
"""MSRs that no kernel has."""

EXCLUDED = (
    Excluded("the values of KVM_CLOCK, IA32_TSC, HV_X64_MSR_TIME_REF_COUNT, HV_X64_MSR_VP_RUNTIME and of the "
             "TSC offset", "they run; what a write answers is compared, and that they go on from what was written"),
    Excluded("the words of KVM_GET_SUPPORTED_CPUID (its leaves are compared)",
             "some are those of the CPU that happens to be asked: APIC id, frequencies"),
    Excluded("count_load_time in KVM_PIT2", "it is the host's time when the channel was loaded"),
    Excluded("in KVM_PIT2, the mode of channel 0 is 5 in what is written",
             "the modes below would start a timer, which interrupts at a time of the kernel's choice"),
    Excluded("KVM_LAPIC bytes 0x380 to 0x39f are 0 in what is written", "the APIC timer would run"),
    Excluded("IA32_TSC_DEADLINE is 0, or has bit 62, in what is written", "the APIC timer would fire"),
    Excluded("KVM_VCPU_EVENTS byte 27 (a latched INIT) is 0 in what is written",
             "it resets the vCPU at a time of the kernel's choice"),
    Excluded("bytes 24 to 27 of what is written to an interrupt chip are 0",
             "interrupts pending in the IOAPIC are delivered to vCPUs at a time of the kernel's choice"),
    Excluded("bit 31 of KVM_TSC_KHZ is 0 in what is written", "KVM_GET_TSC_KHZ would answer a negative number"),
    Excluded("MSRs that a kernel knows and does not list", "a profile can't tell them from those that it has not"),
    Excluded("HV_X64_MSR_RESET with bit 0", "the next KVM_RUN asks userspace to reset the machine"),
    Excluded("the high half of MSR_IA32_SYSENTER_CS is 0 in what is written",
             "how much of it a VMCB keeps is the CPU's choice; QEMU's emulation keeps 32 bits"),
    Excluded("the highest 16 bits of the bases of FS, GS, TR and LDT, of SYSENTER_ESP and EIP and of KERNEL_GS_BASE "
             "are 0 in what is written",
             "VMLOAD makes them canonical, at a run of the CPU's choice"),
    Excluded("a valid VMCB in KVM_NESTED_STATE", "it would put the vCPU into a guest of the guest"),
    Excluded("in KVM_XSAVE, FCW is 0x37f and FSW, FOP, FIP, FDP and the padding of the x87 registers are 0 in what is "
             "written", "what of them comes back from FXRSTOR and FXSAVE is the CPU's choice"),
    Excluded("MXCSR_MASK in KVM_XSAVE", "the CPU fills it in when it first saves the state; it can't be set"),
    Excluded("XSTATE_BV after the first KVM_RUN; what is written then says that all components are in use",
             "whether a component in its initial state counts as in use is the CPU's choice (XINUSE)"),
    Excluded("RIP after `run`", "a store to an unmapped address is finished by the next KVM_RUN"),
)


class X86Stage(Stage):
    """One VM. Its vCPUs are there as soon as it is made."""

    vm: Vm | None = None
    entered = False
    """Whether KVM_RUN was called: from then on the CPU decides which XSAVE components count as in use."""

    def close(self) -> None:
        """Destroy the VM."""
        if self.vm:
            self.vm.close()
            self.vm = None

    def do_create(self, vcpus: int, devices: dict[str, Any], caps: dict[str, list[int]]) -> Answer:
        """Make a VM instead of the one that there is."""
        self.close()
        self.entered = False
        machine = Machine(Arch.X86_64, vcpus, (MemoryRegion(0, 1 << 20),), devices)
        self.vm = self.backend.create(machine, {int(number): tuple(args) for number, args in caps.items()})
        self.vm.create_vcpus()
        return {}

    def do_cpuid(self, vcpu: int, clear: list[list[int]], entries: int | None = None) -> Answer:
        """The supported CPUID, with bits (leaf, subleaf, register, bit) cleared, or only the first entries of it."""
        table = bytearray(self.profile.cpuid)
        for entry in range(8, len(table), 40):
            leaf, subleaf = struct.unpack_from("<II", table, entry)
            for at, sub, register, bit in clear:
                if (at, sub) == (leaf, subleaf):
                    table[entry + 12 + 4 * register + bit // 8] &= ~(1 << bit % 8) & 0xFF
        if entries is not None:
            table = table[:8 + 40 * entries]
            struct.pack_into("<I", table, 0, min(entries, len(table) // 40))
        return self._put(x86_64.CPUID2.id, vcpu, bytes(table))

    def do_change(self, register: int, vcpu: int, edits: list[tuple[int, str, int]]) -> Answer:
        """Change what a register holds: (byte, how, number) flips a bit, sets a byte, or sets the 64-bit word there."""
        value = bytearray(self._get(register, vcpu, self._size(register))[1])
        for place, how, number in edits:
            _EDITS[how](value, place, number)
        _mend(register, value)
        if register == x86_64.XSAVE.id and self.entered:
            struct.pack_into("<Q", value, _XSTATE_BV, _components(self.profile))
        return self._put(register, vcpu, bytes(value))

    def do_write(self, register: int, vcpu: int, value: int) -> Answer:
        """Write a whole 64-bit value, at the start of a longer register."""
        size = self._size(register)
        whole = bytearray(value.to_bytes(8, "little")[:size].ljust(size, b"\0"))
        _mend(register, whole)
        return self._put(register, vcpu, bytes(whole))

    def do_read(self, register: int, vcpu: int) -> Answer:
        """Read a register."""
        return self._shown(register, vcpu, self._size(register))

    def do_goes_on(self, register: int, vcpu: int, value: int) -> Answer:
        """Write a clock, and tell whether it is read back as a clock that goes on from there (an offset: the same)."""
        answer = self._put(register, vcpu, value.to_bytes(8, "little").ljust(self._size(register), b"\0"))["answer"]
        refused, now = self._get(register, vcpu, self._size(register))
        passed = int.from_bytes(now[:8], "little") - value
        before, after = self._tolerated(register, vcpu)
        return {"answer": answer, "refused": refused, "goes_on": -before <= passed <= after}

    def _tolerated(self, register: int, vcpu: int) -> tuple[int, int]:
        """How much less and more a clock may show than what was just written: a minute more; an offset, nothing.

        A TSC within a second of the other vCPUs' is made the same as theirs (kvm_synchronize_tsc): a second less, as
        long as the vCPU's own frequency says that it is.
        """
        khz = int.from_bytes(self._get(x86_64.TSC_KHZ.id, vcpu, 4)[1], "little")
        return {x86_64.CLOCK.id: (10**9, 60 * 10**9), ids.msr_id(0x10): (1100 * khz, 60 * 10**10)}.get(register, (0, 0))

    def do_copy(self, source: int, vcpu: int) -> Answer:
        """Write everything that a save would read of one vCPU to another, or to itself, as a restore does."""
        answer, vm = [], self._vm()
        for at in vm.layouts()[0]:
            if at.scope == Scope.VCPU:
                values = np.zeros((1, at.row_words), np.uint64)
                vm.read(at, self._there(source), values)
                self._tell_components(at, values)
                answer += _words(vm.write(at, self._there(vcpu), values))
        return {"answer": answer, **self.do_dump(vcpu)}

    def do_host(self) -> Answer:
        """What the host says of itself without a VM: capabilities, sizes, MSR lists, feature MSRs."""
        host = self.backend.profile()
        return {"capabilities": host.capabilities, "sizes": {lookup(id).name: size for id, size in host.sizes.items()},
                "msrs": list(host.msrs), "feature_msrs": {f"{k:#x}": f"{v:#x}" for k, v in host.feature_msrs.items()},
                "max_vcpus": host.max_vcpus, "cpuid": [list(struct.unpack_from("<II", host.cpuid, entry))
                                                       for entry in range(8, len(host.cpuid), 40)]}

    def do_list(self) -> Answer:
        """What there is to save."""
        layouts, refused = self._vm().layouts()
        return {"layouts": [[at.title, len(at.slots), sum(slot.id for slot in at.slots) % 2**64] for at in layouts],
                "refused": _words(refused)}

    def do_dump(self, vcpu: int) -> Answer:
        """Everything that a save would read of a vCPU and of the VM."""
        layouts, refused = self._vm().layouts()
        out: dict[str, Any] = {"refused": _words(refused)}
        for at in layouts:
            first = self._there(vcpu) if at.scope == Scope.VCPU else 0
            values = np.zeros((1, at.row_words), np.uint64)
            out[at.title] = _words(self._vm().read(at, first, values))
            for number, slot in enumerate(at.slots):
                row = values[0, at.offsets[number]:at.offsets[number + 1]].tobytes()[:slot.size]
                if shown := self._fair(slot.id, row):
                    out[lookup(slot.id).name] = shown
        return out

    def do_enter(self, vcpu: int) -> Answer:
        """Begin to run and leave before the first instruction."""
        self._vm().enter(self._there(vcpu))
        self.entered = True
        return {}

    def do_run(self, steps: int) -> Answer:
        """Put all vCPUs into 64-bit mode, let them count, and take what they stored and hold then."""
        vm = self._vm()
        if refused := guest.install(vm, steps):
            return {"refused": _words(refused)}
        self.entered = True
        vm.start()
        deadline = time.monotonic() + 20
        while len(vm.exits()) < vm.machine.vcpus and time.monotonic() < deadline:
            time.sleep(0.001)
        vm.pause()
        return {"exits": {str(k): reason for k, reason in sorted(vm.exits().items())}, "vcpus": guest.results(vm)}

    def _vm(self) -> Vm:
        if self.vm is None:
            self.do_create(1, {}, {})
        assert self.vm
        return self.vm

    def _size(self, id: int) -> int:
        if id in (x86_64.XSAVE.id, x86_64.NESTED_STATE.id):
            return self.profile.sizes[id] or 128
        return len(self.profile.cpuid) if id == x86_64.CPUID2.id else _SIZES.get(id, 8)

    def _get(self, id: int, vcpu: int, size: int) -> tuple[list[str], bytes]:
        at, first = self._place(id, vcpu, size)
        values = np.zeros((1, at.row_words), np.uint64)
        refused = self._vm().read(at, first, values)
        return _words(refused), bytes(size) if refused else values.tobytes()[:size]

    def _place(self, id: int, vcpu: int, size: int) -> tuple[Layout, int]:
        """An MSR that the VM has once is reached through any vCPU."""
        row = lookup(id)
        scope = Scope.VCPU if ids.msr_index(id) is not None else row.scope
        return Layout(scope, row.phase, (Slot(id, size),)), self._there(vcpu) if scope == Scope.VCPU else 0

    def _there(self, vcpu: int) -> int:
        """The vCPU, or the last there is: a shrunk sequence may have fewer."""
        return min(vcpu, self._vm().machine.vcpus - 1)

    def _tell_components(self, at: Layout, values: Words) -> None:
        """See `EXCLUDED`: after a run, what is written says that all XSAVE components are in use."""
        place = at.index.get(x86_64.XSAVE.id)
        if place is not None and self.entered:
            values[0, at.offsets[place] + _XSTATE_BV // 8] = _components(self.profile)

    def _shown(self, id: int, vcpu: int, size: int) -> Answer:
        refused, value = self._get(id, vcpu, size)
        return {"refused": refused, "value": self._fair(id, value)}

    def _fair(self, id: int, value: bytes) -> dict[str, str]:
        if id == x86_64.XSAVE.id and self.entered:
            value = value[:_XSTATE_BV] + bytes(8) + value[_XSTATE_BV + 8:]
        return _nonzero(_fair(id, value))

    def _put(self, id: int, vcpu: int, value: bytes) -> Answer:
        at, first = self._place(id, vcpu, len(value))
        matrix = np.frombuffer(value.ljust(at.row_words * 8, b"\0"), np.uint64).reshape(1, -1).copy()
        refused = self._vm().write(at, first, matrix)
        return {"answer": _words(refused), **self._shown(id, vcpu, len(value))}


_XSTATE_BV = 512
"""Its offset in struct kvm_xsave."""


def _components(profile: HostProfile) -> int:
    """XSAVE components of the host: CPUID leaf 0xd, EAX."""
    for entry in range(8, len(profile.cpuid), 40):
        if struct.unpack_from("<II", profile.cpuid, entry) == (0xD, 0):
            return int(struct.unpack_from("<I", profile.cpuid, entry + 12)[0])
    return 3


def _flip(value: bytearray, place: int, bit: int) -> None:
    value[place] ^= 1 << bit


def _byte(value: bytearray, place: int, number: int) -> None:
    value[place] = number


def _word(value: bytearray, place: int, number: int) -> None:
    struct.pack_into("<Q", value, place // 8 * 8, number)


_EDITS: dict[str, Callable[[bytearray, int, int], None]] = {"flip": _flip, "byte": _byte, "word": _word}


def _mend(id: int, value: bytearray) -> None:
    """Take out what `EXCLUDED` says is never written."""
    if id == x86_64.XSAVE.id:
        struct.pack_into("<HH", value, 0, 0x37F, 0)
    for register, first, last, kept in _NEVER:
        if id == register:
            value[first:last] = bytes(byte & kept for byte in value[first:last])
    if id == x86_64.PIT2.id:
        value[13] = 5
    if id == _TSC_DEADLINE and any(value):
        value[7] |= 0x40


_TSC_DEADLINE = ids.msr_id(0x6E0)

_NEVER = ((x86_64.VCPU_EVENTS.id, 27, 28, 0), (x86_64.LAPIC.id, 0x380, 0x3A0, 0), (x86_64.TSC_KHZ.id, 3, 4, 0x7F),
          (ids.msr_id(0x174), 4, 8, 0), *((ids.msr_id(index), 6, 8, 0) for index in (0x175, 0x176, 0xC000_0102)),
          (x86_64.XSAVE.id, 5, 24, 0),
          *((x86_64.XSAVE.id, start + 10, start + 16, 0) for start in range(32, 160, 16)),
          *((sregs, 24 * place + 6, 24 * place + 8, 0) for sregs in (x86_64.SREGS.id, x86_64.SREGS2.id)
            for place in (3, 4, 6, 7)),
          *((chip, 24, 28, 0) for chip in CHIPS))
"""(register, first byte, byte after the last, bits that are kept)."""


def _fair(id: int, value: bytes) -> bytes:
    """The value without the bits that run by themselves."""
    if id in UNREADABLE:
        return b""
    number = int.from_bytes(value, "little")
    for low, width in (*(x86_64.RUNNING[id].spans if id in x86_64.RUNNING else ()), *_MASKED.get(id, ())):
        number &= ~((1 << width) - 1 << low)
    return number.to_bytes(len(value), "little")


_MASKED = {x86_64.XSAVE.id: ((28 * 8, 32),)}
"""Bits that are not compared, (first, count), by register: MXCSR_MASK."""


def _nonzero(value: bytes) -> dict[str, str]:
    """The 64-bit words that are not zero, by number."""
    padded = value.ljust(-(-len(value) // 8) * 8, b"\0")
    return {str(n): f"{word:#x}" for n, word in enumerate(struct.unpack(f"<{len(padded) // 8}Q", padded)) if word}


def _words(refused: list[Refusal]) -> list[str]:
    return [str(no) for no in refused]


class X86Vocabulary:
    """Calls of a VMM that saves, restores and now and then does what it should not."""

    arch = Arch.X86_64
    excluded = EXCLUDED

    def stage(self, backend: Backend, profile: HostProfile) -> X86Stage:
        """See `Vocabulary.stage`."""
        return X86Stage(backend, profile)

    def facts(self, real: Backend) -> dict[str, int]:
        """The TSC's frequency, which a kernel measures when it boots."""
        stage = X86Stage(real, real.profile())
        try:
            stage.do_create(1, {}, {})
            return {"tsc_khz": int(stage.do_read(x86_64.TSC_KHZ.id, 0)["value"].get("0", "0"), 16)}
        finally:
            stage.close()

    def told(self, profile: HostProfile, facts: dict[str, int]) -> HostProfile:
        """The profile with that frequency."""
        khz = facts["tsc_khz"].to_bytes(4, "little")
        return replace(profile, defaults={**profile.defaults, x86_64.TSC_KHZ.id: khz})

    def story(self, source: random.Random, profile: HostProfile, calls: int) -> list[Call]:
        """See `Vocabulary.story`."""
        return list(_story(source, profile, calls))


def _story(source: random.Random, profile: HostProfile, calls: int) -> Iterator[Call]:
    vcpus = source.choice((1, 2, 2, 3))
    yield call("create", vcpus=vcpus, devices=source.choice(DEVICES), caps=source.choice(CAPS))
    first = [call("cpuid", vcpu=k, clear=_cleared(source)) for k in range(vcpus)] if source.random() < 0.85 else []
    yield from first
    last = [call("dump", vcpu=source.randrange(vcpus)) for _ in range(2)]
    for _ in range(calls - 1 - len(first) - len(last)):
        make = source.choices(*_WEIGHTED)[0]
        yield make(source, profile, source.randrange(vcpus))
    yield from last


def _cleared(source: random.Random) -> list[list[int]]:
    """What is taken from a table; often nothing, so that a vCPU that ran is given the same one again."""
    if source.random() < 0.6:
        return []
    return [list(source.choice(_FEATURES)) for _ in range(source.choice((1, 1, 2)))]


_FEATURES = ((1, 0, 2, 21), (1, 0, 2, 26), (1, 0, 2, 17), (1, 0, 2, 24), (1, 0, 3, 14), (7, 0, 1, 1), (7, 0, 1, 0),
             (7, 0, 2, 3), (7, 0, 1, 7), (7, 0, 3, 29), (7, 0, 1, 20), (0xD, 0, 0, 2), (0x8000_0001, 0, 2, 2),
             (0x8000_0001, 0, 3, 20), (0x8000_0001, 0, 3, 29), (0x8000_0008, 0, 0, 5), (0x8000_000A, 0, 3, 4))
"""(leaf, subleaf, register, bit) of features that something else is checked against: x2APIC, XSAVE, PCID, TSC
deadline, PGE, TSC_ADJUST, FSGSBASE, PKU, SMEP, SMAP, AVX state, SVM, NX, long mode, ARCH_CAPABILITIES, a narrower
physical address, TSC rate."""


def _struct(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    register = source.choice(BUSY) if source.random() < 0.6 else source.choice(_structs(profile))
    return call("change", register=register, vcpu=vcpu, edits=_edits(source, _length(profile, register)))


def _aimed(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    """Values that switch something on or off, in places where a rule looks."""
    register = source.choice([id for id in AIMS if id != x86_64.NESTED_STATE.id or profile.sizes.get(id)])
    places = [source.choice(AIMS[register]) for _ in range(source.choice((1, 1, 2, 3)))]
    edits = [[place, how, source.choice(values)] for place, how, values in places]
    return call("change", register=register, vcpu=vcpu, edits=edits)


def _structs(profile: HostProfile) -> list[int]:
    kept = [id for id in _SIZES if id not in ABSOLUTE]
    return [*kept, *(id for id in (x86_64.NESTED_STATE.id,) if profile.sizes.get(id))]


def _length(profile: HostProfile, id: int) -> int:
    return 24 if id == x86_64.NESTED_STATE.id else min(profile.sizes.get(id) or _SIZES.get(id, 8), 1024)


def _edits(source: random.Random, length: int) -> list[list[Any]]:
    return [_edit(source, length) for _ in range(source.choice((1, 1, 2, 3, 8)))]


def _edit(source: random.Random, length: int) -> list[Any]:
    place, kind = source.randrange(length), source.random()
    if kind < 0.5 or length < 8:
        return [place, "flip", source.randrange(8)]
    if kind < 0.8:
        return [place // 8 * 8, "word", source.choice(WORDS)]
    return [place, "byte", source.choice((0, 1, 2, 4, 0x80, 0xFF))]


def _msr(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    index = source.choice((*profile.msrs, *profile.feature_msrs))
    register = ids.msr_id(index)
    if index == _HV_RESET:
        return call("write", register=register, vcpu=vcpu, value=_value(source) & ~1)
    if register in UNREADABLE or source.random() < 0.2:
        return call("write", register=register, vcpu=vcpu, value=_value(source))
    return call("change", register=register, vcpu=vcpu, edits=_edits(source, 8))


_HV_RESET = 0x4000_0003


def _value(source: random.Random) -> int:
    return source.choice((*WORDS, 1 << source.randrange(64), source.randrange(1 << 64)))


def _strange_msr(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("write", register=ids.msr_id(source.choice(STRANGE_MSRS)), vcpu=vcpu, value=_value(source))


def _clock(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("goes_on", register=source.choice(ABSOLUTE), vcpu=vcpu, value=source.randrange(1 << 36, 1 << 40))


def _read(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    msrs = (*profile.msrs, *profile.feature_msrs, *STRANGE_MSRS)
    register = source.choice((*_structs(profile), *map(ids.msr_id, msrs)))
    return call("read", register=register, vcpu=vcpu)


def _cpuid(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    if source.random() < 0.85:
        return call("cpuid", vcpu=vcpu, clear=_cleared(source))
    return call("cpuid", vcpu=vcpu, clear=[], entries=source.choice((0, 1, 2, 5, 12, 20, 257)))


def _copy(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("copy", source=source.choice((0, vcpu)), vcpu=vcpu)


def _host(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("host")


def _enter(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("enter", vcpu=vcpu)


def _run(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("run", steps=source.choice((1, 5, 300)))


def _list(source: random.Random, profile: HostProfile, vcpu: int) -> Call:
    return call("list")


_WEIGHTS: tuple[tuple[Callable[[random.Random, HostProfile, int], Call], float], ...] = (
    (_struct, 30), (_aimed, 20), (_msr, 25), (_strange_msr, 3), (_clock, 3), (_read, 7), (_cpuid, 4), (_copy, 2),
    (_enter, 4), (_run, 3), (_list, 1), (_host, 0.3))
_WEIGHTED = ([make for make, _ in _WEIGHTS], [weight for _, weight in _WEIGHTS])

VOCABULARY = X86Vocabulary()
