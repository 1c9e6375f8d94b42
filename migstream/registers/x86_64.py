"""x86-64: one row a register, in the order in which a restore writes them.

The order's sources: Linux Documentation/virt/kvm/api.rst and arch/x86/kvm/x86.c (what each ioctl checks or clears),
and the orders that QEMU, Firecracker, cloud-hypervisor and crosvm use in production.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from migstream.model import Arch, Klass, Layout, Phase, Scope, Slot
from migstream.registers import ids, msrs
from migstream.registers.catalogue import Register, Running, enabled_capability

_X86 = Arch.X86_64


def _struct(number: int, name: str, size: int | None, scope: Scope, phase: Phase, klass: Klass, why: str, *,
            struct: str, needs: str = "", read_first: bool = False, selector: int | None = None) -> Register:
    return Register(ids.struct_id(_X86, number), name, size, scope, phase, klass, why, needs=needs, struct=struct,
                    read_first=read_first, selector=selector)


_VM, _VCPU = Scope.VM, Scope.VCPU
_FEATURE, _STATE, _CLOCK = Klass.FEATURE, Klass.STATE, Klass.CLOCK

CPUID2 = _struct(1, "KVM_CPUID2", None, _VCPU, Phase.CREATE, _FEATURE,
                 "MSRs, XSAVE and nested state are checked against it, and it is fixed after the first KVM_RUN",
                 struct="kvm_cpuid2")
TSC_KHZ = _struct(2, "KVM_TSC_KHZ", 4, _VCPU, Phase.CREATE, _FEATURE,
                  "scales every later TSC value; kHz; written only where the target's own differs",
                  struct="tsc_khz", needs="GET_TSC_KHZ")
SREGS2 = _struct(3, "KVM_SREGS2", 320, _VCPU, Phase.STATE, _STATE,
                 "carries EFER and the APIC base: before LAPIC and nested state", struct="kvm_sregs2", needs="SREGS2")
SREGS = _struct(4, "KVM_SREGS", 312, _VCPU, Phase.STATE, _STATE,
                "what a kernel without KVM_CAP_SREGS2 (before 5.14) has instead", struct="kvm_sregs")
NESTED_STATE = _struct(5, "KVM_NESTED_STATE", None, _VCPU, Phase.STATE, _STATE,
                       "after EFER.SVME / CR4.VMXE (SREGS) and FEAT_CTL, before the registers that it would replace",
                       struct="kvm_nested_state", needs="NESTED_STATE")
REGS = _struct(6, "KVM_REGS", 144, _VCPU, Phase.STATE, _STATE,
               "KVM_SET_REGS drops pending exceptions: before KVM_VCPU_EVENTS", struct="kvm_regs")
XSAVE = _struct(7, "KVM_XSAVE", None, _VCPU, Phase.STATE, _STATE,
                "after CPUID2, which says which components are allowed", struct="kvm_xsave", needs="XSAVE")
XCRS = _struct(8, "KVM_XCRS", 392, _VCPU, Phase.STATE, _STATE, "XCR0 is checked against CPUID2",
               struct="kvm_xcrs", needs="XCRS")
DEBUGREGS = _struct(9, "KVM_DEBUGREGS", 128, _VCPU, Phase.STATE, _STATE, "no dependency but after SREGS (CR4.DE)",
                    struct="kvm_debugregs", needs="DEBUGREGS")
LAPIC = _struct(10, "KVM_LAPIC", 1024, _VCPU, Phase.STATE, _STATE,
                "after the APIC base (SREGS), before TSC_DEADLINE, whose mode it sets", struct="kvm_lapic_state",
                needs="IRQCHIP")
VCPU_EVENTS = _struct(11, "KVM_VCPU_EVENTS", 64, _VCPU, Phase.STATE, _STATE,
                      "after REGS (which clears exceptions) and LAPIC", struct="kvm_vcpu_events", needs="VCPU_EVENTS")
MP_STATE = _struct(12, "KVM_MP_STATE", 4, _VCPU, Phase.STATE, _STATE,
                   "last, when LAPIC and events say what may wake the vCPU; read first: reading it accepts pending "
                   "INIT and SIPI, which changes registers and LAPIC", struct="kvm_mp_state", needs="MP_STATE",
                   read_first=True)
PIC_MASTER = _struct(13, "KVM_IRQCHIP_PIC_MASTER", 520, _VM, Phase.INTERRUPTS, _STATE,
                     "after the LAPICs: what it raises must not be overwritten", struct="kvm_irqchip_pic",
                     needs="IRQCHIP", selector=0)
PIC_SLAVE = _struct(14, "KVM_IRQCHIP_PIC_SLAVE", 520, _VM, Phase.INTERRUPTS, _STATE, "after its master, as all VMMs do",
                    struct="kvm_irqchip_pic", needs="IRQCHIP", selector=1)
IOAPIC = _struct(15, "KVM_IRQCHIP_IOAPIC", 520, _VM, Phase.INTERRUPTS, _STATE,
                 "KVM delivers what is pending while it is set: after the LAPICs; its cost grows with vCPUs, so once",
                 struct="kvm_irqchip_ioapic", needs="IRQCHIP", selector=2)
PIT2 = _struct(16, "KVM_PIT2", 112, _VM, Phase.INTERRUPTS, _STATE,
               "starts its timer: after the PICs that it interrupts", struct="kvm_pit_state2", needs="PIT_STATE2")
CLOCK = _struct(17, "KVM_CLOCK", 48, _VM, Phase.CLOCK, _CLOCK,
                "runs from the moment it is written, and the handler loops over all vCPUs: last, and once",
                struct="kvm_clock_data", needs="ADJUST_CLOCK")
TSC_OFFSET = Register(ids.attribute_id(0, 0, 0), "KVM_VCPU_TSC_OFFSET", 8, _VCPU, Phase.CLOCK, _CLOCK,
                      "relative to one host's TSC: written only where the vCPUs' offsets differ, moved by what the two "
                      "hosts' KVM_CLOCK say (Documentation/virt/kvm/devices/vcpu.rst); IA32_TSC restores the rest",
                      needs="VCPU_ATTRIBUTES", struct="tsc_offset")

MSRS_BEFORE = SREGS2.id
"""MSRs of class feature are prologue; FEAT_CTL has a run of its own before this row (nested state needs it)."""

MSRS_AFTER = LAPIC.id
"""All other vCPU MSRs come after this row: TSC_DEADLINE needs the LAPIC's timer mode."""

ROWS: tuple[Register, ...] = (
    CPUID2, TSC_KHZ,
    SREGS2, SREGS, NESTED_STATE, REGS, XSAVE, XCRS, DEBUGREGS, LAPIC, VCPU_EVENTS, MP_STATE,
    PIC_MASTER, PIC_SLAVE, IOAPIC, PIT2,
    CLOCK, TSC_OFFSET,
)

RUNNING: dict[int, Running] = {
    CLOCK.id: Running(((0, 384),), "a running clock; flags and host times are the target's"),
    ids.msr_id(0x10): Running(((0, 64),), "a running clock (or one that this KVM can't set)"),
    LAPIC.id: Running(((0x390 * 8, 32),), "the LAPIC timer's current count runs"),
    PIT2.id: Running(((128, 64), (320, 64), (512, 64)), "count_load_time is the target's own time of loading"),
    ids.msr_id(0x40000020): Running(((0, 64),), "a running clock: the partition's reference counter"),
    ids.msr_id(0x40000010): Running(((0, 64),), "a running clock: the time that the vCPU has run"),
    TSC_OFFSET.id: Running(((0, 64),), "relative to the target's TSC"),
    XSAVE.id: Running(((464 * 8, 48 * 8),), "bytes 464 to 511 are the kernel's own: its signal frames' magic and XCR0"),
}
"""What differs on read-back though nothing was lost.

KVM_XSAVE: hardware leaves bytes 464 to 511 to software (Intel SDM 1, 10.5.1), KVM_GET_XSAVE puts xstate_fx_sw_bytes
there, which has the host's user components, and KVM_SET_XSAVE does not look at it (arch/x86/kernel/fpu/xstate.c).
"""

_BY_ID = {row.id: row for row in ROWS}
_FEAT_CTL = 0x3A
_MSR_PHASES = {
    (Scope.VM, Klass.FEATURE): Phase.FEATURE,
    (Scope.VM, Klass.STATE): Phase.FEATURE,   # set at boot; read again at the pause, sent again if it changed
    (Scope.VM, Klass.CLOCK): Phase.FEATURE,
    (Scope.VM, Klass.IDENTITY): Phase.FEATURE,
    (Scope.VCPU, Klass.FEATURE): Phase.FEATURE,
    (Scope.VCPU, Klass.IDENTITY): Phase.FEATURE,
    (Scope.VCPU, Klass.STATE): Phase.STATE,
    (Scope.VCPU, Klass.CLOCK): Phase.STATE,   # IA32_TSC before TSC_DEADLINE, in one batch
}
_KVM_REGISTERS = {0: "KVM_REG_GUEST_SSP"}


def lookup(id: int) -> Register | None:
    """The row of an id of ours, of an MSR, of an enabled capability or of a KVM-defined register; else None."""
    index = ids.msr_index(id)
    if index is not None:
        return _msr(index)
    if ids.capability_number(id) is not None and ids.arch_of(id) == _X86:
        return enabled_capability(id)
    if id & ~0xFFFF_FFFF == ids.KVM_REG_X86_KVM:
        number = id & 0xFFFF_FFFF
        return Register(id, _KVM_REGISTERS.get(number, f"KVM_REG_{number:#x}"), 8, _VCPU, Phase.STATE, _STATE,
                        "from KVM_GET_REG_LIST; after the MSRs (MSR_IA32_S_CET enables it)", needs="ONE_REG",
                        known=number in _KVM_REGISTERS)
    return _BY_ID.get(id)


def _msr(index: int) -> Register:
    row = msrs.lookup(index)
    return Register(ids.msr_id(index), row.name, 8, row.scope, _MSR_PHASES[row.scope, row.klass], row.klass, row.why,
                    struct="msr", bits=row.name, known=row.name != f"MSR_{index:#010x}")


def layouts(capabilities: Mapping[str, int], sizes: Mapping[int, int], msr_list: Iterable[int],
            kvm_registers: Iterable[int] = (), enabled_caps: Iterable[int] = (),
            scopes: Mapping[int, Scope] | None = None) -> tuple[Layout, ...]:
    """The layouts of a VM on a kernel that offers this, in restore order; empty ones are left out.

    Args:
        capabilities: by name, as in a host profile; a row whose capability is 0 or absent is left out.
        sizes: bytes of the rows whose size the host tells (CPUID2, XSAVE, nested state), by id.
        msr_list: MSRs to save. kvm_registers: ids from KVM_GET_REG_LIST. enabled_caps: VM capabilities told.
        scopes: of MSRs, as an experiment found them, by id; the catalogue's scope otherwise.
    """
    by_place: dict[tuple[Phase, Scope], list[Slot]] = {}
    for row in _ordered(capabilities, list(msr_list), kvm_registers, enabled_caps):
        size = row.size if row.size is not None else sizes.get(row.id)
        if size:
            scope = (scopes or {}).get(row.id, row.scope)
            phase = row.phase if scope == row.scope else _MSR_PHASES[scope, row.klass]
            by_place.setdefault((phase, scope), []).append(Slot(row.id, size))
    return tuple(Layout(scope, phase, tuple(slots))
                 for (phase, scope), slots in sorted(by_place.items(), key=lambda kv: _place(*kv[0])))


def _place(phase: Phase, scope: Scope) -> tuple[int, bool]:
    """VM before vCPU within a phase: capabilities before CPUID, the clock before what is set against it."""
    return phase, scope == Scope.VCPU


def _ordered(capabilities: Mapping[str, int], msr_list: list[int], kvm_registers: Iterable[int],
             enabled_caps: Iterable[int]) -> list[Register]:
    rows = [_require(ids.capability_id(_X86, cap)) for cap in sorted(enabled_caps)]
    sorted_msrs = [_msr(index) for index in msrs.sort_for_restore(msr_list) if index != _FEAT_CTL]
    for row in ROWS:
        if row.id == MSRS_BEFORE and _FEAT_CTL in msr_list:
            rows.append(_msr(_FEAT_CTL))
        if _offered(row, capabilities):
            rows.append(row)
        if row.id == MSRS_AFTER:
            rows += sorted_msrs
            rows += [_require(id) for id in sorted(kvm_registers)]
    return rows


def _offered(row: Register, capabilities: Mapping[str, int]) -> bool:
    if row is SREGS and capabilities.get("SREGS2"):
        return False
    return not row.needs or capabilities.get(row.needs, 0) > 0


def _require(id: int) -> Register:
    row = lookup(id)
    assert row is not None
    return row
