"""Core registers, SVE, timers, PMU, and the structs of a vCPU."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from migstream.backends.sim.arm64 import exceptions, ids
from migstream.backends.sim.arm64.rules import Rule, invalid, kept, mask, refused, registers, since

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from migstream.backends.sim.arm64.guest import Access, Errnos, Mask
    from migstream.host.profile import HostProfile
    from migstream.model import Words

_EL1_32BIT = 1 << 1
_MODE, _AARCH32 = 0x1F, 1 << 4
_AARCH32_USR, _AARCH32_SYS = 0x10, 0x1F
_AARCH32_MODES = (0x11, 0x12, 0x13, 0x17, 0x1B, _AARCH32_SYS)
"""FIQ, IRQ, SVC, ABT, UND, SYS: those of a vCPU whose EL1 is AArch32."""

_AARCH64_MODES = (0b00000, 0b00100, 0b00101)
"""EL0t, EL1t, EL1h."""


def _pstate(at: Access, values: Words) -> Errnos:
    mode, narrow = values[:, 0] & np.uint64(_MODE), at.features & _EL1_32BIT != 0
    wide_ones = np.isin(mode, np.array(_AARCH64_MODES, np.uint64))
    narrow_ones = np.isin(mode, np.array(_AARCH32_MODES, np.uint64))
    return invalid(~((mode == _AARCH32_USR) | (wide_ones & ~narrow) | (narrow_ones & narrow)))


def _narrow(at: Access, values: Words) -> None:
    """In an AArch32 mode every write of a core register cuts those of the mode, and PC, to 32 bits."""
    pstate = at.of(ids.PSTATE).load()[:, 0]
    modes = np.where(pstate & np.uint64(_AARCH32) != 0, pstate & np.uint64(_MODE), np.uint64(0))
    for mode in np.unique(modes[modes != 0]).tolist():
        for id in (*(ids.X[number] for number in _narrowed(at.guest.profile, mode)), ids.PC):
            cut = at.of(id).where(modes == mode)
            cut.store(cut.load() & np.uint64(0xFFFF_FFFF))


def _narrowed(profile: HostProfile, mode: int) -> Sequence[int]:
    """X registers by number."""
    if mode in (_AARCH32_USR, _AARCH32_SYS):
        return range(15)
    return range(31) if since(profile, 5, 11) else _BANKED[mode]


_BANKED = {0x11: (*range(8), *range(24, 31)), 0x12: (*range(13), 16, 17), 0x13: (*range(13), 18, 19),
           0x17: (*range(13), 20, 21), 0x1B: (*range(13), 22, 23)}
"""Where R0 to R14 of FIQ, IRQ, SVC, ABT and UND are: vcpu_reg_offsets of 5.10, measured: SVC."""


def _is_core(profile: HostProfile, id: int) -> bool:
    return id >> 56 == 0x60 and id >> 16 & 0xFFFF == 0x10


def vector_words(at: Access) -> NDArray[np.int64]:
    """64-bit words of a Z register of each vCPU: the longest length that SVE_VLS has."""
    return 2 * np.maximum(highest_bit(at.of(ids.SVE_VLS).load()) + 1, 1)


def highest_bit(words: Words) -> NDArray[np.int64]:
    """Number of the highest bit that is set in each row; -1 for none. 512 bits."""
    unpacked = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    last = unpacked.shape[1] - 1 - np.argmax(unpacked[:, ::-1], axis=1)
    return np.where(unpacked.any(axis=1), last, -1).astype(np.int64)


def _vls_late(at: Access, values: Words) -> Errnos:
    return refused(at.guest.finalized[at.index], errno.EPERM)


def _vls(at: Access, values: Words) -> Errnos:
    """The host's set of lengths, cut off somewhere; not empty."""
    default = at.guest.profile.feature_defaults.get(ids.SVE_VLS, bytes(64))
    host = np.unpackbits(np.frombuffer(default, np.uint8), bitorder="little")
    asked = np.unpackbits(np.ascontiguousarray(values).view(np.uint8), axis=1, bitorder="little")
    top = highest_bit(values)
    within = np.arange(asked.shape[1])[np.newaxis] <= top[:, np.newaxis]
    return invalid((top < 0) | ((asked != host) & within).any(axis=1))


def _vector(profile: HostProfile, id: int) -> bool:
    return id in _VECTORS


_VECTORS = frozenset((*ids.Z, *ids.P))


def _cut_vector(at: Access, values: Words) -> Words:
    """What is above the vCPU's vector length is not stored: it reads 0."""
    length = vector_words(at) * 64 if at.id in ids.Z else vector_words(at) * 8
    return _cut(values, length)


def _cut(values: Words, lengths: NDArray[np.int64]) -> Words:
    low = np.arange(values.shape[1])[np.newaxis] * 64
    bits = np.clip(lengths[:, np.newaxis] - low, 0, 64)
    masks = np.where(bits == 64, mask(-1), (np.uint64(1) << (bits % 64).astype(np.uint64)) - np.uint64(1))
    return values & masks


def _timer(profile: HostProfile, id: int) -> bool:
    return id in (ids.TIMER_CTL, ids.PTIMER_CTL)


_ISTATUS = np.uint64(4)


def _keep_control(at: Access, values: Words) -> Words:
    return values & mask(kept(at.guest.profile, at.id) or 0xFFFF_FFFB) & ~_ISTATUS


def _shows_status(profile: HostProfile, id: int) -> bool:
    return _timer(profile, id) and profile.defaults.get(id, b"\0")[0] & 4 != 0


def _show_control(at: Access, values: Words) -> Words:
    """ISTATUS: the compare value has been reached; whether the timer is on does not matter."""
    return np.where(reached(at), values | _ISTATUS, values & ~_ISTATUS)


def reached(at: Access) -> Mask:
    """Whether a timer's counter has reached its compare value, a column."""
    compare, count = (ids.TIMER_CVAL, ids.TIMER_CNT) if at.id == ids.TIMER_CTL else (ids.PTIMER_CVAL, ids.PTIMER_CNT)
    return np.asarray(at.of(compare).load() <= np.uint64(now(at, count)))


def now(at: Access, counter: int) -> int:
    """The virtual or physical counter of a VM, ticks."""
    return at.guest.host.tsc() - at.guest.offsets[counter] & (1 << 64) - 1


def _show_count(at: Access, values: Words) -> Words:
    return np.full((len(values), 1), now(at, at.id), np.uint64)


def _set_count(at: Access, values: Words) -> None:
    """The whole VM's; ignored once KVM_ARM_SET_COUNTER_OFFSET was used."""
    if at.guest.counter_offset is None:
        at.guest.offsets[at.id] = at.guest.host.tsc() - int(values[-1, 0]) & (1 << 64) - 1


def _no_cut(at: Access, values: Words) -> Words:
    return at.load()


_PAIRS = (*ids.SAME_STORAGE, *ids.SAME_STORAGE.values())
_CYCLE = 1 << 31


def _masked_pairs(profile: HostProfile, id: int) -> bool:
    """Kernels that mask the counters' bits to those that there are (since 6.8)."""
    return id in _PAIRS and kept(profile, ids.PMCNTENSET) not in (0, (1 << 64) - 1)


def _sets_and_clears(profile: HostProfile, id: int) -> bool:
    """Of these, kernels on which a write of the clearing register clears (6.8 to 6.14)."""
    return _masked_pairs(profile, id) and kept(profile, ids.PMCNTENCLR) != kept(profile, ids.PMCNTENSET)


def _stored_elsewhere(profile: HostProfile, id: int) -> bool:
    return id in ids.SAME_STORAGE


def counters(at: Access) -> NDArray[np.uint64]:
    """Bits of the counters that a VM has: PMCR_EL0.N of them, and the cycle counter."""
    number = _counter_number(at)
    return np.full(len(at.numbers), (1 << number) - 1 | _CYCLE, np.uint64)


def _counter_number(at: Access) -> int:
    return at.guest.notes.get("counters", at.guest.initial(ids.PMCR, 0) >> 11 & 0x1F)


def _keep_counters(at: Access, values: Words) -> Words:
    return values & counters(at)[:, np.newaxis]


def _set_or_clear(at: Access, values: Words) -> Words:
    old, wanted = at.of(ids.SAME_STORAGE.get(at.id, at.id)).load(), values & counters(at)[:, np.newaxis]
    return old & ~wanted if at.id in ids.SAME_STORAGE else old | wanted


def _store_pair(at: Access, values: Words) -> None:
    at.of(ids.SAME_STORAGE[at.id]).store(at.load().copy())


def _show_pair(at: Access, values: Words) -> Words:
    return at.of(ids.SAME_STORAGE[at.id]).load()


def _show_counters(at: Access, values: Words) -> Words:
    return values & counters(at)[:, np.newaxis]


def _wide_counters(profile: HostProfile, id: int) -> bool:
    return id in ids.PMEVCNTR and since(profile, 6, 3)


_PMU_3P5 = 6
"""ID_AA64DFR0_EL1.PMUVer."""


def _show_event_counter(at: Access, values: Words) -> Words:
    """The VM's PMUVer decides, which can be lowered and raised again: the upper half stays stored."""
    wide = at.guest.field(ids.ID_AA64DFR0, 8, int(at.features[0])) >= _PMU_3P5
    return values if wide else values & np.uint64(0xFFFF_FFFF)


def _counted_pmcr(profile: HostProfile, id: int) -> bool:
    """Kernels where PMCR_EL0.N is the VM's and can be lowered (since 6.8)."""
    return id == ids.PMCR and kept(profile, id) not in (0, (1 << 64) - 1)


_N = np.uint64(0x1F << 11)


def _keep_pmcr(at: Access, values: Words) -> Words:
    return values & mask(kept(at.guest.profile, at.id)) & ~_N


def _lower_n(at: Access, values: Words) -> None:
    """N is taken where it is not above the host's, before the first run; else it is ignored."""
    wanted, most = int(values[-1, 0]) >> 11 & 0x1F, at.guest.initial(ids.PMCR, 0) >> 11 & 0x1F
    if not at.guest.entered and wanted <= most:
        at.guest.notes["counters"] = wanted


def _show_pmcr(at: Access, values: Words) -> Words:
    return values & ~_N | np.uint64(_counter_number(at) << 11)


_STATES = {0: "RUNNABLE", 5: "STOPPED", 10: "SUSPENDED"}


def _mp_state(at: Access, values: Words) -> Errnos:
    known = [state for state in _STATES if state != 10 or at.guest.profile.capabilities.get("ARM_SYSTEM_SUSPEND")]
    return invalid(~np.isin(values[:, 0] & np.uint64(0xFFFF_FFFF), np.array(known, np.uint64)))


_ISS = 0x1FF_FFFF
_ESR_ISV = 1 << 24


def _events(at: Access, values: Words) -> Errnos:
    """Padding is zero, and the syndrome within its 25 bits."""
    padding = (values[:, 0] >> np.uint64(24) != 0) | (values[:, 2:] != 0).any(axis=1)
    pending, has_esr = _flags(values)
    return invalid(padding | (pending & has_esr & (values[:, 1] & mask(~_ISS) != 0)))


def _flags(values: Words) -> tuple[Mask, Mask]:
    """serror_pending and serror_has_esr."""
    return values[:, 0] & np.uint64(0xFF) != 0, values[:, 0] & np.uint64(0xFF00) != 0


def _asked(at: Access, values: Words) -> tuple[Mask, NDArray[np.uint64]]:
    """Which vCPUs are given an SError, and its syndrome."""
    pending, has_esr = _flags(values)
    return pending, np.where(has_esr, values[:, 1], np.uint64(_ESR_ISV))


def _delivers(profile: HostProfile, id: int) -> bool:
    return id == ids.VCPU_EVENTS and since(profile, 6, 17)


def _keep_events(at: Access, values: Words) -> Words:
    """An SError that is pending stays so: a write can only add one."""
    old, out = at.load(), np.zeros_like(values)
    pending, syndrome = _asked(at, values)
    if _delivers(at.guest.profile, at.id):
        pending = pending & ~exceptions.unmasked(at)
    out[:, 0] = np.where(pending, np.uint64(1), old[:, 0] & np.uint64(1))
    out[:, 1] = np.where(pending, syndrome, old[:, 1])
    return out


def _deliver(at: Access, values: Words) -> None:
    pending, syndrome = _asked(at, values)
    chosen = pending & exceptions.unmasked(at)
    if chosen.any():
        exceptions.take(at.where(chosen), exceptions.SERROR, syndrome[chosen] | np.uint64(exceptions.SYNDROME))


def _show_events(at: Access, values: Words) -> Words:
    out = values.copy()
    out[:, 0] |= np.uint64(1 << 8 if at.guest.profile.capabilities.get("ARM_INJECT_SERROR_ESR") else 0)
    return out


RULES: tuple[Rule, ...] = (
    Rule("a mode that the vCPU has", registers(ids.PSTATE), "set_core_reg()", refuse=_pstate),
    Rule("AArch32 registers have 32 bits", _is_core, "set_core_reg()", after=_narrow),
    Rule("vector lengths end with KVM_ARM_VCPU_FINALIZE", registers(ids.SVE_VLS), "set_sve_vls()", refuse=_vls_late),
    Rule("the host's vector lengths, cut off", registers(ids.SVE_VLS), "set_sve_vls()", refuse=_vls),
    Rule("vectors are as long as the vCPU's", _vector, "sve_reg_to_region(): the rest is user padding",
         keep=_cut_vector),
    Rule("ISTATUS is not stored", _timer, "kvm_arm_timer_write(); profile: register_bits", keep=_keep_control),
    Rule("ISTATUS is computed", _shows_status, "read_timer_ctl() up to 6.16", show=_show_control),
    Rule("counters run", registers(*ids.CLOCKS), "kvm_arm_timer_read()", after=_set_count, show=_show_count),
    Rule("bits of counters that there are", _masked_pairs, "set_pmreg() since 6.8", keep=_keep_counters),
    Rule("one sets, the other clears", _sets_and_clears, "set_pmreg() 6.8 to 6.14", keep=_set_or_clear),
    Rule("both show the same", _stored_elsewhere, "sys_reg_descs: both name the setting one's storage",
         after=_store_pair, show=_show_pair),
    Rule("no bits of counters that went away", _masked_pairs, "get_pmreg() since 6.8", show=_show_counters),
    Rule("event counters have 64 bits since PMUv3p5", _wide_counters, "kvm_pmc_is_64bit() since 6.3; measured: 6.12, "
         "7.2", show=_show_event_counter),
    Rule("the number of counters is the VM's", _counted_pmcr, "set_pmcr() since 6.8", keep=_keep_pmcr, after=_lower_n,
         show=_show_pmcr),
    Rule("a state that vCPUs have", registers(ids.MP_STATE), "kvm_arch_vcpu_ioctl_set_mpstate()", refuse=_mp_state),
    Rule("an SError with a syndrome that it can have", registers(ids.VCPU_EVENTS), "__kvm_arm_vcpu_set_events()",
         refuse=_events, keep=_keep_events, show=_show_events),
    Rule("an SError that is not masked is taken at once", _delivers, "kvm_inject_serror_esr() and "
         "commit_pending_events() since 6.17; measured: 7.2", after=_deliver),
)
