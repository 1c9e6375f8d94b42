"""What calls on an x86-64 VM do, what of a value is never written, and what of an answer is not compared."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from migstream.backends.base import Refusal, Vm
from migstream.host.profile import HostProfile
from migstream.model import Arch, Layout, Machine, MemoryRegion, Scope, Slot
from migstream.registers import ids, x86_64
from migstream.registers.catalogue import lookup
from tests.fidelity import guest_x86_64 as guest
from tests.fidelity.calls import Answer, Excluded, Stage

if TYPE_CHECKING:
    from migstream.model import Words

SIZES = {row.id: row.size for row in x86_64.ROWS if row.size}
CHIPS = (x86_64.PIC_MASTER.id, x86_64.PIC_SLAVE.id, x86_64.IOAPIC.id)
ABSOLUTE = (x86_64.TSC_OFFSET.id, ids.msr_id(0x10), x86_64.CLOCK.id)
"""Clocks: written whole, because a change to what they stand at is never the same twice."""

UNREADABLE = (x86_64.CLOCK.id, ids.msr_id(0x10), ids.msr_id(0x4000_0010), ids.msr_id(0x4000_0020))

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
    Excluded("MSRs that a kernel knows and does not list, but EFER and the APIC base",
             "a profile can't tell them from those that it has not"),
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
        return len(self.profile.cpuid) if id == x86_64.CPUID2.id else SIZES.get(id, 8)

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
