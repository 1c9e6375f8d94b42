"""The demo guest for arm64: real machine code that counts in a register and in RAM, and checks itself.

Each vCPU runs the same loop at EL1, identity-mapped with caches on (without them a host would not see the guest's
writes on hardware), interrupts masked, integer instructions only:

    step:  add  x0, x0, #1       count in a register
           mul  x1, x1, x2       a chain of values, each from the one before: a step that is lost or
           add  x1, x1, x3       done twice leaves it wrong for ever
           ldr  x6, [x4]
           add  x6, x6, #1
           str  x6, [x4]         count in RAM
           ldr  x7, [x4]
           cmp  x0, x7
           b.ne fail
           str  x1, [x4, #8]     chain in RAM
           b    step
    fail:  str  x0, [x4, #16]
           str  x0, [x5]         no RAM there: KVM_EXIT_MMIO, the host sees it
           b    .

The state between any two instructions is known (`_STATES`), so the host checks the guest exactly, wherever the pause
fell. All that the loop does not use holds another value on every vCPU (`_MARKS`) and must survive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from migstream.backends.base import Vm
from migstream.demo import msi_arm64
from migstream.demo.guest_x86_64 import INCREMENT, MULTIPLIER, Counter, chain, scattered, seed
from migstream.errors import BackendError, printable
from migstream.model import PAGE, Layout, Phase, Scope, Slot
from migstream.registers import arm64_ids, gic, vcpu_features
from migstream.registers.catalogue import lookup

NAME = "migstream.demo.arm64"

RAM = 0x4000_0000
TABLE, CODE, CELLS = RAM + 0x1000, RAM + 0x9000, RAM + msi_arm64.END
CELL = 64
NO_RAM = 0x0900_0000
"""Below RAM, where boards have devices: mapped by the page table, not backed by anything."""

PMU_PPI = 23
"""Interrupt of the PMU: the PPI that Arm's Base System Architecture names for it."""

PROGRAM = struct.pack("<14I", 0x91000400, 0x9B027C21, 0x8B030021, 0xF9400086, 0x910004C6, 0xF9000086, 0xF9400087,
                      0xEB07001F, 0x54000061, 0xF9000481, 0x17FFFFF6, 0xF9000880, 0xF90000A0, 0x14000000)

_F, _F1, _MUL = "f(n)", "f(n-1)", "f(n-1)*multiplier"
_STATES = {  # PC relative to step: (chain in x1, RAM count minus n, chain in RAM, x6 minus n, x7 minus n)
    0x00: (_F, 0, _F, 0, 0),
    0x04: (_F1, -1, _F1, -1, -1),
    0x08: (_MUL, -1, _F1, -1, -1),
    0x0C: (_F, -1, _F1, -1, -1),
    0x10: (_F, -1, _F1, -1, -1),
    0x14: (_F, -1, _F1, 0, -1),
    0x18: (_F, 0, _F1, 0, -1),
    0x1C: (_F, 0, _F1, 0, 0),
    0x20: (_F, 0, _F1, 0, 0),
    0x24: (_F, 0, _F1, 0, 0),
    0x28: (_F, 0, _F, 0, 0),
}

_EL1H_MASKED = 0x3C5
_EQUAL = 0x6000_0000
"""NZCV after a comparison of equals; the guest starts with it, so that PSTATE is always the same."""

_Mark = Callable[[int], int]


def _same(value: int) -> _Mark:
    return lambda vcpu: value


def _own(number: int) -> _Mark:
    """64 bits that no other register and no other vCPU has."""
    return lambda vcpu: scattered(vcpu * 256 + number)


def _wide(number: int, size: int) -> _Mark:
    """`size` bytes of the same kind."""
    words = range(-(-size // 8))
    return lambda vcpu: sum(scattered(vcpu * 4096 + number * 32 + k) << 64 * k for k in words) % (1 << 8 * size)


_START: dict[str, _Mark] = {
    "X0": _same(0), "X1": lambda vcpu: seed(vcpu), "X2": _same(MULTIPLIER), "X3": _same(INCREMENT),
    "X4": lambda vcpu: CELLS + CELL * vcpu, "X5": _same(NO_RAM), "X6": _same(0), "X7": _same(0),
    "PC": _same(CODE), "PSTATE": _same(_EQUAL | _EL1H_MASKED),
}
"""What the loop uses, at its start."""

_SETUP: dict[str, _Mark] = {
    "KVM_MP_STATE": _same(0),                      # RUNNABLE
    "GICR_CTLR": lambda vcpu: int(vcpu == 0),      # LPIs on; reads back with read-only bits
    "GITS_CTLR": _same(1),                         # on: now the ITS does what is in its command queue
}
"""What is written and not compared bit for bit."""

_MARKS: dict[str, _Mark] = {
    "MAIR_EL1": _same(0xFF),             # attribute 0: normal, write-back; 1: device
    "TCR_EL1": _same(0x2_0080_3519),     # 39-bit addresses, 4 KiB pages, write-back walks, TTBR1 off, 40-bit physical
    "TTBR0_EL1": _same(TABLE),
    "SCTLR_EL1": _same(0x30D0_1805),     # MMU and caches on
    "CPACR_EL1": _same(0x33_0000),       # FP and SVE without traps
    **{f"X{n}": _own(n) for n in range(8, 31)},
    **{name: _own(40 + n) for n, name in enumerate((
        "TPIDR_EL0", "TPIDRRO_EL0", "TPIDR_EL1", "SP", "SP_EL1", "ELR_EL1", "FAR_EL1"))},
    "VBAR_EL1": lambda vcpu: scattered(vcpu) & 0x7F_FFFF_F800,
    "CONTEXTIDR_EL1": lambda vcpu: scattered(vcpu) & 0xFFFF_FFFF,
    "FPSR": lambda vcpu: 0x0800_0000 | vcpu & 0x1F,
    "FPCR": lambda vcpu: (vcpu & 3) << 22,
    "TIMER_CVAL": _own(60),
    **{f"AP{key}KEY{half}_EL1": _own(64 + 2 * n + (half == "HI"))
       for n, key in enumerate(("IA", "IB", "DA", "DB", "GA")) for half in ("LO", "HI")},
    **{f"V{n}": _wide(n, 16) for n in range(32)},
    # the interrupt controller: nothing is delivered to a guest that masks interrupts
    "GICD_CTLR": _same(0x52),            # group 1 on, affinity routing, one security state
    "GICD_IPRIORITYR9": _same(0xA0B0_C0D0), "GICD_ISENABLER1": _same(0x0000_00F1), "GICD_ICFGR2": _same(0x0000_000A),
    "GICD_IGROUPR1": _same(0xFFFF_FF0F), "GICD_ISPENDR1": _same(0x10), "GICD_IROUTER33": _same(0),
    "GICR_IGROUPR0": _same(0xFFFF_FFFF),
    "GICR_ISENABLER0": lambda vcpu: 0x0800_FF0F & ~(1 << vcpu % 4),
    "GICR_IPRIORITYR6": lambda vcpu: 0x10101010 * (vcpu % 15 + 1), "GICR_ISPENDR0": lambda vcpu: 1 << vcpu % 16,
    "GICR_PROPBASER": _same(msi_arm64.PROPBASER + RAM),
    "GICR_PENDBASER": lambda vcpu: msi_arm64.PENDBASER + (RAM if vcpu == 0 else -msi_arm64.PENDING),
    **{name: _same(value + RAM) for name, value in msi_arm64.TABLE_REGISTERS.items()},
    "GITS_CWRITER": _same(msi_arm64.QUEUE_LENGTH),
    "ICC_PMR_EL1": lambda vcpu: 0x80 + 8 * (vcpu % 16), "ICC_IGRPEN1_EL1": _same(1),
}
"""What a kernel would have put there: a save and restore must keep it."""


def min_memory(vcpus: int) -> int:
    """Bytes of RAM that the guest needs."""
    return -(-(CELLS - RAM + CELL * vcpus) // PAGE) * PAGE


def install(vm: Vm, cpuid: bytes, capabilities: Mapping[str, int]) -> None:
    """Put the guest into a fresh VM with vCPUs: RAM, then registers. Raises: BackendError."""
    _load_ram(vm)
    if _features(vm) & vcpu_features.PMU_V3:
        line = Layout(Scope.VCPU, Phase.FEATURE, (Slot(gic.PMU_IRQ.id, 4),))
        _write(vm, line, [[PMU_PPI]] * vm.machine.vcpus)
    for layout, marks in _marked(vm, {**_marks(vm), **_START, **_SETUP}):
        _write(vm, layout, [[mark(k) for mark in marks] for k in range(_rows(vm, layout))])
    _register_event(vm)


def _register_event(vm: Vm) -> None:
    """Where a simulated kernel has SDEI: the guest has registered and enabled an event."""
    from migstream.backends.sim.arm64.proposals import REGISTERED_EVENT

    places = {slot.id: (layout, slot) for layout in vm.layouts()[0] for slot in layout.slots}
    for values in REGISTERED_EVENT:
        for id in values if values.keys() <= places.keys() else ():
            layout, slot = places[id]
            alone = Layout(layout.scope, layout.phase, (slot,))
            _write(vm, alone, [[int.from_bytes(values[id], "little")]] * _rows(vm, alone))


def _features(vm: Vm) -> int:
    return int(vm.machine.devices.get("vcpu_features", vcpu_features.DEFAULT))


def _marks(vm: Vm) -> dict[str, _Mark]:
    """What the loop does not use: `_MARKS`, with a PMU its counters, with SVE its registers as wide as they are here.

    Not the cycle counter: the PMCR_EL0 that 6.1 makes a vCPU with has C set, and the first KVM_RUN obeys it.
    """
    counters = {f"PMEVCNTR{n}_EL0": (lambda vcpu, n=n: scattered(vcpu * 2 + n) & 0xFFFF_FFFF) for n in range(2)}
    return {**_MARKS, **(counters if _features(vm) & vcpu_features.PMU_V3 else {}),
            **(_sve(_vector_bytes(vm)) if _features(vm) & vcpu_features.SVE else {})}


def _vector_bytes(vm: Vm) -> int:
    """The longest vector of the VM's vCPUs: bit n of SVE_VLS stands for n + 1 times 16 bytes."""
    layout = Layout(Scope.VCPU, Phase.FINALIZE, (Slot(arm64_ids.SVE_VLS, 64),))
    return 16 * _read(vm, layout)[0][0].bit_length()


def _sve(size: int) -> dict[str, _Mark]:
    """A first-fault register is a run of ones from bit 0."""
    return {**{f"Z{n}": _wide(n, size) for n in range(32)}, **{f"P{n}": _wide(32 + n, size // 8) for n in range(16)},
            "FFR": lambda vcpu: (1 << vcpu % size + 1) - 1, "ZCR_EL1": _same(size // 16 - 1)}


def _load_ram(vm: Vm) -> None:
    normal, device = 0x701, 0x405 | 3 << 53
    entries = [device, *(gib << 30 | normal for gib in range(1, 512))]
    vm.memory.view(TABLE, PAGE)[:] = struct.pack("<512Q", *entries)
    vm.memory.view(CODE, len(PROGRAM))[:] = PROGRAM
    for k in range(vm.machine.vcpus):
        vm.memory.view(CELLS + CELL * k, 16)[:] = struct.pack("<QQ", 0, seed(k))
    if "its" in vm.machine.devices:
        msi_arm64.load(vm.memory, RAM)


def _marked(vm: Vm, marks: Mapping[str, _Mark]) -> list[tuple[Layout, list[_Mark]]]:
    """The parts of the VM's layouts that have a mark, with it; in restore order."""
    out = []
    for layout in vm.layouts()[0]:
        found = [(slot, mark) for slot in layout.slots if (mark := marks.get(lookup(slot.id).name))]
        if found and not layout.phase.prologue:
            part = Layout(layout.scope, layout.phase, tuple(slot for slot, _ in found))
            out.append((part, [mark for _, mark in found]))
    return out


def _rows(vm: Vm, layout: Layout) -> int:
    return vm.machine.vcpus if layout.scope == Scope.VCPU else 1


def _write(vm: Vm, layout: Layout, rows: list[list[int]]) -> None:
    packed = [b"".join(value.to_bytes(slot.words * 8, "little") for slot, value in zip(layout.slots, row, strict=True))
              for row in rows]
    matrix = np.frombuffer(b"".join(packed), np.uint64).reshape(len(rows), -1).copy()
    for refusal in vm.write(layout, 0, matrix):
        raise BackendError(refusal.operation, errno=max(refusal.errno, 0), vcpu=refusal.vcpu, what=str(refusal))


def _read(vm: Vm, layout: Layout) -> list[list[int]]:
    matrix = np.zeros((_rows(vm, layout), layout.row_words), np.uint64)
    for refusal in vm.read(layout, 0, matrix):
        raise BackendError(refusal.operation, errno=max(refusal.errno, 0), vcpu=refusal.vcpu, what=str(refusal))
    places = list(zip(layout.offsets, layout.offsets[1:], strict=False))
    return [[int.from_bytes(row[a:b].tobytes(), "little") for a, b in places] for row in matrix]


def counts(vm: Vm) -> list[int]:
    """Steps of each vCPU as its RAM cell shows them; may be asked while the guest runs."""
    return [struct.unpack("<Q", vm.memory.view(CELLS + CELL * k, 8))[0] for k in range(vm.machine.vcpus)]


def counters(vm: Vm) -> list[Counter]:
    """Check every vCPU of a paused guest against what its count says everything else must be."""
    lost = _lost_marks(vm)
    ((layout, _),) = _marked(vm, _START)
    names = [lookup(slot.id).name for slot in layout.slots]
    return [_check(vm, k, dict(zip(names, row, strict=True)), lost.get(k, lost.get(-1, "")))
            for k, row in enumerate(_read(vm, layout))]


def _lost_marks(vm: Vm) -> dict[int, str]:
    """The first mark that is not as it was, by vCPU; -1 for the VM's."""
    lost: dict[int, str] = {}
    if "its" in vm.machine.devices:
        msi_arm64.forget_tables(vm.memory, RAM)
    for layout, marks in _marked(vm, _marks(vm)):
        for k, row in enumerate(_read(vm, layout)):
            for slot, mark, found in zip(layout.slots, marks, row, strict=True):
                if found != mark(k):
                    key = k if layout.scope == Scope.VCPU else -1
                    lost.setdefault(key, f"{lookup(slot.id).name} {_hex(found)}, expected {_hex(mark(k))}")
    if "its" in vm.machine.devices and (wrong := msi_arm64.lost(vm.memory, RAM)):
        lost.setdefault(0, wrong)
    return lost


def _hex(value: int) -> str:
    return printable(hex(value), 40)


def _check(vm: Vm, vcpu: int, regs: dict[str, int], lost: str) -> Counter:
    steps, place = regs["X0"], regs["PC"] - CODE
    ram_count, ram_chain, failed = struct.unpack("<3Q", vm.memory.view(CELLS + CELL * vcpu, 24))
    if place not in _STATES or failed:
        return Counter(steps, f"vCPU {vcpu} is at step{place:+#x}: its self-check failed at step {failed}")
    register_chain, lag, memory_chain, x6, x7 = _STATES[place]
    before = chain(vcpu, steps - 1) if steps else seed(vcpu)
    values = {_F: chain(vcpu, steps), _F1: before, _MUL: before * MULTIPLIER % 2**64}
    wanted = {"X1": values[register_chain], "X6": steps + x6, "X7": steps + x7, "count in RAM": steps + lag,
              "chain in RAM": values[memory_chain],
              **{name: _START[name](vcpu) for name in ("X2", "X3", "X4", "X5", "PSTATE")}}
    found = {**regs, "count in RAM": ram_count, "chain in RAM": ram_chain}
    wrong = [f"{name} {found[name]:#x}, expected {value:#x}" for name, value in wanted.items() if found[name] != value]
    wrong += [lost] if lost else []
    return Counter(steps, f"vCPU {vcpu} at step {steps}: {wrong[0]}" if wrong else "")
