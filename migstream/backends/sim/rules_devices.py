"""Rules of what KVM emulates beside the CPU on x86-64: local APIC, interrupt chips, PIT, clocks."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim import cpuid
from migstream.backends.sim.msr_rule import is_svm, version
from migstream.backends.sim.rules import U64, Absent, After, Keep, Refuse, Show, bits, mask
from migstream.registers import ids, x86_64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migstream.backends.sim.guest import Guest, Mask, Rows
    from migstream.model import Words

LAPIC, SREGS, SREGS2, MP_STATE = x86_64.LAPIC.id, x86_64.SREGS.id, x86_64.SREGS2.id, x86_64.MP_STATE.id
REGS = x86_64.REGS.id
PIC_MASTER, PIC_SLAVE, IOAPIC = x86_64.PIC_MASTER.id, x86_64.PIC_SLAVE.id, x86_64.IOAPIC.id
CHIPS = (PIC_MASTER, PIC_SLAVE, IOAPIC)
"""By the kernel's chip_id."""

PIT2, CLOCK = x86_64.PIT2.id, x86_64.CLOCK.id
TSC_KHZ, TSC_OFFSET, NESTED_STATE = x86_64.TSC_KHZ.id, x86_64.TSC_OFFSET.id, x86_64.NESTED_STATE.id
TSC_DEADLINE = ids.msr_id(0x6E0)

CR0, CR8, APIC_BASE, RIP = 28, 32, 34, 16
_LOW = np.uint64(0xFFFF_FFFF)
_ID, _VERSION, _TPR, _PPR, _LDR, _SPIV, _ISR, _ICR, _ICR2, _LVTT, _LVT0, _TMICT, _TMCCT = (
    offset // 8 for offset in (0x20, 0x30, 0x80, 0xA0, 0xD0, 0xF0, 0x100, 0x300, 0x310, 0x320, 0x350, 0x380, 0x390))
"""64-bit words of the APIC page; each register is in the low half of its word."""

_IN_SERVICE = slice(_ISR, _ISR + 16, 2)

_APIC_ENABLE, _X2APIC, _BSP, _PE = 1 << 11, 1 << 10, 1 << 8, 1 << 0
_RESET_CS, _RESET_SELECTOR, _RESET_RIP = 0xFFFF_0000, 0xF000, 0xFFF0
_TIMER_MODE, _DEADLINE = 0b11 << 17, 0b10 << 17
_X2APIC_API, _LONG_IDS = 129, 1
_DISABLE_QUIRKS, _LINT0_QUIRK, _MASKED_LVT = 116, 1, 0x10000


def _no_irqchip(guest: Guest) -> bool:
    return not guest.has("irqchip")


def _no_pit(guest: Guest) -> bool:
    return not guest.has("pit")


ABSENT = (
    Absent("no local APIC in the kernel", (LAPIC,), errno.EINVAL, _no_irqchip, "kvm_arch_vcpu_ioctl: lapic_in_kernel"),
    Absent("no interrupt chips in the kernel", CHIPS, errno.ENXIO, _no_irqchip, "kvm_arch_vm_ioctl: irqchip_kernel"),
    Absent("no PIT in the kernel", (PIT2,), errno.ENXIO, _no_pit, "kvm_arch_vm_ioctl: kvm->arch.vpit"),
)


def _x2apic(rows: Rows) -> Mask:
    return bits(rows.get(SREGS2)[:, APIC_BASE], _X2APIC)


def _long_ids(rows: Rows) -> bool:
    return bool((*rows.guest.told.get(_X2APIC_API, ()), 0)[0] & _LONG_IDS)


def _numbers(rows: Rows) -> NDArray[np.uint64]:
    return rows.numbers.astype(np.uint64)


def _wrong_id(rows: Rows, values: Words) -> Mask:
    return mask(_x2apic(rows) & ((values[:, _ID] & _LOW) != _numbers(rows)) & _long_ids(rows))


def _bad_chip(rows: Rows, values: Words) -> Mask:
    return mask((values[:, 0] & _LOW) >= len(CHIPS))


def _beyond_int(rows: Rows, values: Words) -> Mask:
    return bits(values[:, 0], 1 << 31)


def _too_slow(rows: Rows, values: Words) -> Mask:
    slowest = rows.guest.clock.host.khz * (1_000_000 - 250) // 1_000_000
    khz = values[:, 0] & _LOW
    told = (khz != 0) & (khz != rows.get(TSC_KHZ)[:, 0])  # the backends write a frequency only where it differs
    return mask(told & (khz < slowest) & (not rows.guest.profile.capabilities.get("TSC_CONTROL")))


REFUSALS = (
    Refuse("in x2APIC mode, an id other than the vCPU's", (LAPIC,), errno.EINVAL, _wrong_id,
           "kvm_apic_state_fixup, with KVM_X2APIC_API_USE_32BIT_IDS; SPIV is stored before", stored=True),
    Refuse("a chip that there is not", CHIPS, errno.EINVAL, _bad_chip, "kvm_vm_ioctl_set_irqchip"),
    Refuse("a frequency that KVM_GET_TSC_KHZ could not give back", (TSC_KHZ,), errno.EINVAL, _beyond_int,
           "not the kernel's: its answer would be a negative number, which is an error; both backends stop here"),
    Refuse("slower than the host's TSC, which can't be scaled", (TSC_KHZ,), errno.EINVAL, _too_slow,
           "set_tsc_khz: 250 ppm; measured: the frequency stays as asked", stored=True),
)


def _set_low(page: Words, word: int, values: NDArray[np.uint64]) -> None:
    page[:, word] = page[:, word] & ~_LOW | values & _LOW


def _priority(page: Words, counted: Words) -> NDArray[np.uint64]:
    """The processor priority: of the task, or of the highest interrupt in service.

    KVM_SET_LAPIC computes it with the count of interrupts in service of the page before (`counted`): where that had
    none, it does not look for one.
    """
    service = np.ascontiguousarray(page[:, _IN_SERVICE] & _LOW).astype(np.uint32)
    flags = np.unpackbits(service.view(np.uint8), axis=1, bitorder="little")
    looks = flags.any(axis=1) & (counted[:, _IN_SERVICE] & _LOW).any(axis=1)
    highest = np.where(looks, 255 - flags[:, ::-1].argmax(axis=1), 0).astype(np.uint64)
    task, group = page[:, _TPR] & np.uint64(0xFF), np.uint64(0xF0)
    return np.where(task & group >= highest & group, task, highest & group)


def update_priority(rows: Rows) -> None:
    """Compute the processor priority anew (__apic_update_ppr)."""
    page = rows.get(LAPIC).copy()
    _set_low(page, _PPR, _priority(page, page))
    rows.put(LAPIC, page)


def _one_icr(rows: Rows) -> Mask:
    """Where the ICR is one register of 64 bits, kept as such; kvm-amd keeps two halves (`x2apic_icr_is_split`, which
    Debian's 6.1 has, too; measured)."""
    return _x2apic(rows) & np.bool_(not is_svm(rows.guest.profile))


_OWN_ID = (6, 12)
"""Release since which an APIC in x2APIC mode has the vCPU's number for an id whatever is written, and the short form
of it when it is back in xAPIC mode; measured: 6.1 keeps what is written, and the id as it is."""


def _own_id(rows: Rows) -> bool:
    return version(rows.guest.profile) >= _OWN_ID


def _x2apic_id(rows: Rows, values: Words) -> NDArray[np.uint64]:
    """The id in x2APIC mode, once these values are written."""
    own = _own_id(rows) or _long_ids(rows)  # long ids are refused where they are not the vCPU's
    return _numbers(rows) if own else (values[:, _ID] & _LOW) >> np.uint64(24)


def _to_deadline(rows: Rows, values: Words) -> Mask:
    """Whether the page puts the timer into deadline mode, which is none without CPUID (timer_mode_mask)."""
    offered = bits(cpuid.word(rows.get(cpuid.ID), 1, 0, cpuid.ECX), 1 << 24)
    return offered & mask((values[:, _LVTT] & np.uint64(_TIMER_MODE)) == _DEADLINE)


def _keep_lapic(rows: Rows, values: Words) -> Words:
    """A change to or from deadline mode stops the timer; version and processor priority are not stored."""
    old, out = rows.get(LAPIC), values.copy()
    _set_low(out, _VERSION, old[:, _VERSION])
    x2apic, id = _x2apic(rows), _x2apic_id(rows, values)
    _set_low(out, _ID, np.where(x2apic, id, values[:, _ID]))
    _set_low(out, _LDR, np.where(x2apic, _logical(id), values[:, _LDR]))
    _set_low(out, _PPR, _priority(values, old))
    out[:, _ICR] = np.where(_one_icr(rows), values[:, _ICR] & _LOW | values[:, _ICR2] << np.uint64(32), values[:, _ICR])
    now = _to_deadline(rows, values)
    out[rows.guest.deadline[rows.numbers] != now, _TMICT] &= ~_LOW
    stopped = now | mask((out[:, _TMICT] & _LOW) == 0)
    out[stopped, _TMCCT] &= ~_LOW
    wrong = _wrong_id(rows, values)
    out[wrong] = old[wrong]
    _set_low(out, _SPIV, values[:, _SPIV])
    return out


def _keep_pic(rows: Rows, values: Words) -> Words:
    out = np.zeros_like(values)
    out[:, 0], out[:, 1:3] = values[:, 0] & _LOW, values[:, 1:3]
    return out


def _keep_chip(rows: Rows, values: Words) -> Words:
    """16 bytes of a PIC; 216 of an IOAPIC, whose pending interrupts are those of 24 pins."""
    if int(values[0, 0] & _LOW) != CHIPS.index(IOAPIC):
        return _keep_pic(rows, values)
    out = np.zeros_like(values)
    out[:, 0], out[:, 1:28] = values[:, 0] & _LOW, values[:, 1:28]
    out[:, 3] &= np.uint64(U64 & ~(0xFF << 24))
    return out


def _keep_pit(rows: Rows, values: Words) -> Words:
    """A count of 0 is 65536; channels 1 and 2 were loaded now."""
    out = values.copy()
    for word in (0, 3, 6):
        out[:, word] |= np.where((values[:, word] & _LOW) == 0, np.uint64(0x10000), np.uint64(0))
    out[:, (5, 8)] = rows.guest.clock.host.now_ns()
    out[:, 9] &= _LOW
    out[:, 10:] = 0
    return out


def _keep_khz(rows: Rows, values: Words) -> Words:
    khz = values & _LOW
    return np.where(khz == 0, np.uint64(rows.guest.clock.host.khz), khz)


KEEPS = (
    Keep("timer, version and priority are the APIC's own", (LAPIC,), _keep_lapic,
         "kvm_apic_set_state, apic_update_lvtt"),
    Keep("the chip's own bytes", CHIPS, _keep_chip, "kvm_set_pic, kvm_set_ioapic"),
    Keep("counts and load times", (PIT2,), _keep_pit, "pit_load_count"),
    Keep("0 is the host's frequency", (TSC_KHZ,), _keep_khz, "kvm_arch_vcpu_ioctl: KVM_SET_TSC_KHZ"),
)


def _set_clock(rows: Rows, values: Words, before: Words) -> None:
    rows.guest.clock.set(int(values[-1, 0]))


def _set_offset(rows: Rows, values: Words, before: Words) -> None:
    if rows.guest.profile.behaviour.get("tsc_offset_kept", 1):
        rows.guest.tsc_offsets[rows.index] = values[:, 0]


def _cascade(rows: Rows, values: Words, before: Words) -> None:
    """What the slave wants to deliver is a request on the master's line 2."""
    master, slave = (rows.guest.column(id)[0, 1:3].tobytes() for id in (PIC_MASTER, PIC_SLAVE))
    if _first(slave[1] & ~slave[2], slave) < _first(slave[3], slave) and not master[0] & 1 << _CASCADE:
        rows.guest.column(PIC_MASTER)[0, 1] |= np.uint64(1 << 8 + _CASCADE)


_CASCADE = 2


def _first(lines: int, pic: bytes) -> int:
    """Place in the order of priority of the first of these lines, 8 for none (get_priority)."""
    return next((place for place in range(8) if lines & 1 << (place + pic[4] & 7)), 8)


def _base_changed(rows: Rows, values: Words, before: Words) -> None:
    """CR8 is the task priority; x2APIC mode sets the logical id."""
    if not rows.guest.has("irqchip"):
        return
    page = rows.get(LAPIC).copy()
    possible = mask(values[:, CR8] <= 0xF)
    _set_low(page, _TPR, np.where(possible, values[:, CR8] << np.uint64(4), page[:, _TPR]))
    _set_low(page, _PPR, np.where(possible, _priority(page, page), page[:, _PPR]))
    _set_ids(rows, page, values[:, APIC_BASE], before[:, APIC_BASE])
    rows.put(LAPIC, page)


def mode_changed(rows: Rows, values: Words, before: Words) -> None:
    """The APIC's mode alone, of KVM_SREGS2 as it is now and as it was before."""
    if rows.guest.has("irqchip"):
        page = rows.get(LAPIC).copy()
        _set_ids(rows, page, values[:, APIC_BASE], before[:, APIC_BASE])
        rows.put(LAPIC, page)


def _set_ids(rows: Rows, page: Words, now: NDArray[np.uint64], before: NDArray[np.uint64]) -> None:
    """An APIC that comes to xAPIC mode has the short id, one that comes to x2APIC mode the long and a logical one."""
    number, changed = _numbers(rows), now ^ before
    to_xapic = bits(changed, _APIC_ENABLE | (_X2APIC if _own_id(rows) else 0)) & bits(now, _APIC_ENABLE)
    x2apic = bits(changed, _APIC_ENABLE | _X2APIC) & bits(now, _X2APIC)
    id = np.where(to_xapic, number << np.uint64(24), page[:, _ID])
    _set_low(page, _ID, np.where(x2apic, number, id))
    _set_low(page, _LDR, np.where(x2apic, _logical(number), page[:, _LDR]))


def _logical(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The id of 32 bits that an id in x2APIC mode makes: cluster and bit (kvm_apic_calc_x2apic_ldr)."""
    return number >> np.uint64(4) << np.uint64(16) | np.uint64(1) << (number & np.uint64(0xF))


def _timer_mode(rows: Rows, values: Words, before: Words) -> None:
    """A change to or from deadline mode forgets the deadline."""
    now, was = _to_deadline(rows, values), rows.guest.deadline[rows.numbers]
    now = np.where(_wrong_id(rows, values), was, now)
    rows.guest.deadline[rows.numbers] = now
    if (now != was).any():
        changed = rows.where(now != was)
        changed.put(TSC_DEADLINE, np.zeros((len(changed.numbers), 1), np.uint64))


def _wake_at_reset(rows: Rows, values: Words, before: Words) -> None:
    """A boot processor that is put at the reset vector is runnable: older VMMs count on it."""
    at_reset = ((values[:, 0] == _RESET_CS) & (values[:, 1] >> np.uint64(32) & np.uint64(0xFFFF) == _RESET_SELECTOR)
                & (rows.get(REGS)[:, RIP] == _RESET_RIP))
    woken = mask(at_reset & bits(values[:, APIC_BASE], _BSP) & ~bits(values[:, CR0], _PE))
    if woken.any():
        rows.where(woken).put(MP_STATE, np.zeros((int(woken.sum()), 1), np.uint64))


AFTERS = (
    After("CR8 and the APIC's mode", (SREGS, SREGS2), _base_changed, "kvm_set_cr8, __kvm_apic_set_base"),
    After("the timer's mode, and its deadline with it", (LAPIC,), _timer_mode, "apic_update_lvtt"),
    After("a boot processor at the reset vector is runnable", (SREGS, SREGS2), _wake_at_reset, "__set_sregs_common"),
    After("the slave's interrupts reach the master", CHIPS, _cascade, "kvm_pic_update_irq"),
    After("kvmclock goes on from the value", (CLOCK,), _set_clock, "kvm_vm_ioctl_set_clock"),
    After("the TSC goes on with the offset", (TSC_OFFSET,), _set_offset, "kvm_arch_tsc_set_attr; `tsc_offset_kept`"),
)


def _show_lapic(rows: Rows, values: Words) -> Words:
    """x2APIC: the id in the short or the long form, and an ICR of 64 bits."""
    out, on = values.copy(), _x2apic(rows)
    shift = np.uint64(0 if _long_ids(rows) else 24)
    _set_low(out, _ID, np.where(on, values[:, _ID] << shift, values[:, _ID]))
    _set_low(out, _ICR2, np.where(_one_icr(rows), values[:, _ICR] >> np.uint64(32), values[:, _ICR2]))
    return out


def _show_cr8(rows: Rows, values: Words) -> Words:
    if not rows.guest.has("irqchip"):
        return values
    out = values.copy()
    out[:, CR8] = rows.get(LAPIC)[:, _TPR] >> np.uint64(4) & np.uint64(0xF)
    return out


def _show_clock(rows: Rows, values: Words) -> Words:
    return np.array([[*rows.guest.clock.data(), 0, 0]], np.uint64)


def _show_offset(rows: Rows, values: Words) -> Words:
    return rows.guest.tsc_offsets[rows.numbers, np.newaxis]


SHOWS = (
    Show("CR8 is the APIC's task priority", (SREGS, SREGS2), _show_cr8, "kvm_get_cr8"),
    Show("id in x2APIC mode", (LAPIC,), _show_lapic, "kvm_apic_state_fixup"),
    Show("a running clock", (CLOCK,), _show_clock, "kvm_vm_ioctl_get_clock"),
    Show("the offset that is in use", (TSC_OFFSET,), _show_offset, "kvm_arch_tsc_get_attr"),
)


def _reset_sregs(guest: Guest, numbers: NDArray[np.uint64], rows: Words) -> None:
    rows[numbers != 0, APIC_BASE] &= np.uint64(U64 & ~_BSP)


def _reset_lapic(guest: Guest, numbers: NDArray[np.uint64], rows: Words) -> None:
    rows[:, _ID] = numbers << np.uint64(24) & _LOW
    rows[numbers != 0, _LVT0] = _MASKED_LVT
    if guest.told.get(_DISABLE_QUIRKS, (0,))[0] & _LINT0_QUIRK:
        rows[:, _LVT0] = _MASKED_LVT


def _reset_mp_state(guest: Guest, numbers: NDArray[np.uint64], rows: Words) -> None:
    rows[numbers != 0] = 1 if guest.has("irqchip") else 0


RESETS = {SREGS2: _reset_sregs, LAPIC: _reset_lapic, MP_STATE: _reset_mp_state}
"""How other vCPUs, and VMs without interrupt chips, differ from the profile's vCPU 0 (kvm_lapic_reset,
kvm_arch_vcpu_create: vCPU 0 is the boot processor, the others wait for it). Without KVM_X86_QUIRK_LINT0_REENABLED the
boot processor's LINT0 is masked, too."""
