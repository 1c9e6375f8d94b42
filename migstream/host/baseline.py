"""The strongest contract that several hosts all accept, and what each of them gives up for it. Pure.

A guest started under it can go to each of the hosts and back. arm64 is here: ID registers field by field as KVM
compares them, firmware registers, SVE vector lengths; x86-64's CPUID and MSRs are in `baseline_x86_64`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from migstream.contract import BASELINE, Behaviour, Contract
from migstream.errors import UsageError
from migstream.host.behaviour import of_profile
from migstream.host.profile import HostProfile
from migstream.model import Arch, Klass
from migstream.registers import arm64, arm64_ids, firmware_arm64, gic, ids, vcpu_features
from migstream.registers.bit_tables import BITS
from migstream.registers.bits import Field
from migstream.registers.catalogue import Register, lookup

Hosts = Mapping[str, HostProfile]
"""Profiles by the name that people gave."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a host gives up: of which register or thing, what it has and what the contract has."""

    host: str
    name: str
    has: str
    gets: str

    def __str__(self) -> str:
        return f"{self.host}: {self.name}: {self.has} -> {self.gets}"


@dataclass(frozen=True)
class Baseline:
    """A contract, and how it came about.

    Attributes:
        contract: complete only where there are no `refusals`.
        losses: what each host gives up. refusals: by name, what no value would do for, a line each.
        left_out: registers that are not in the contract, with the reason. notes: what it can't promise, or was made
            without knowing.
    """

    contract: Contract
    losses: tuple[Loss, ...] = ()
    refusals: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Draft:
    """A baseline while it is made."""

    values: dict[int, bytes] = field(default_factory=dict)
    free: dict[int, int] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    patterns: Sequence[str] = ()

    def is_free(self, name: str) -> bool:
        """Whether somebody said that this register or `REGISTER.FIELD` is not to be pinned."""
        found = [p for p in self.patterns if fnmatch.fnmatchcase(name.lower(), p.lower())]
        self.used |= {*found}
        return bool(found)


def baseline(hosts: Hosts, features: int | None = None, free: Sequence[str] = ()) -> Baseline:
    """Return the strongest contract of two hosts or more.

    Args:
        features: arm64: vCPU features of the guest; all that the hosts have in common where it isn't given.
        free: globs of `REGISTER` or `REGISTER.FIELD` that are not pinned.

    Raises: UsageError for hosts of different architectures, a profile without what is needed, a pattern that matches
        nothing.
    """
    archs = {profile.arch for profile in hosts.values()}
    if len(archs) != 1:
        raise UsageError(f"hosts of different architectures: {', '.join(sorted(arch.label for arch in archs))}")
    draft = Draft(patterns=free)
    if archs == {Arch.X86_64}:
        from migstream.host.baseline_x86_64 import fill

        fill(draft, hosts)
        features = 0
    else:
        features = _arm64(draft, hosts, features)
    if unused := [pattern for pattern in free if pattern not in draft.used]:
        raise UsageError(f"no register or field that differs matches {unused[0]!r}")
    names = " + ".join(dict.fromkeys(profile.kernel for profile in hosts.values()))
    contract = Contract(archs.pop(), names, "", features, dict(sorted(draft.values.items())), free=draft.free,
                        behaviour=Behaviour(BASELINE))
    draft.notes += [f"{name}: its profile was captured without the experiment: which bits its kernel lets be changed "
                    "nobody has tried" for name, host in hosts.items() if not host.register_bits and not host.msr_bits]
    return Baseline(contract, tuple(draft.losses), tuple(draft.refusals), tuple(draft.left_out), tuple(draft.notes))


# arm64

_OWN = {
    **{row.id: "cache geometry: the host's, or what its kernel makes up" for row in arm64.CCSIDR},
    arm64.MPIDR_EL1: "each vCPU's own place",
    arm64.VCPU_INIT.id: "told as vCPU features",
}
"""Registers of the classes that a contract has, which a baseline leaves to each host or vCPU."""


def _arm64(draft: Draft, hosts: Hosts, features: int | None) -> int:
    common = _common_features(draft, hosts, features)
    views = {name: View(profile.with_features(common), common) for name, profile in hosts.items()}
    listed = sorted(set().union(*(view.pinned for view in views.values()),
                                (row.register for row in firmware_arm64.ABSENT)))
    for id in listed:
        row = lookup(id)
        if id in _OWN:
            continue
        if draft.is_free(row.name):
            draft.left_out.append(f"{row.name}: not pinned, as asked")
            continue
        offers = {name: view.tried(id, view.offer(id)) for name, view in views.items()}
        if unknown := [name for name, offer in offers.items() if offer is None]:
            draft.refusals.append(f"{row.name}: what {unknown[0]} behaves as isn't known (its profile was captured "
                                  "before hosts were asked by a guest)")
            continue
        _settle(draft, row, {name: offer for name, offer in offers.items() if offer})
    _chip(draft, hosts)
    _physical_counter(draft, views)
    reasons = sorted({*_OWN.values()})
    draft.left_out += [f"{', '.join(_short(reason, listed))}: {reason}" for reason in reasons
                       if _short(reason, listed)]
    return common


def _chip(draft: Draft, hosts: Hosts) -> None:
    """GICD_IIDR: the lowest revision, which every kernel takes from 2 to its own (vgic_mmio_uaccess_write_v3_misc)."""
    found = {name: int.from_bytes(host.attributes.get(GICD_IIDR, b""), "little") for name, host in hosts.items()}
    if not all(found.values()):
        return
    if draft.is_free("GICD_IIDR"):
        draft.left_out.append("GICD_IIDR: not pinned, as asked")
        return
    lowest = min(found.values(), key=lambda number: number & _REVISION)
    if len({number & ~_REVISION for number in found.values()}) > 1 or lowest & _REVISION < _FIRST_REVISION:
        draft.left_out.append("GICD_IIDR: interrupt controllers differ in more than their revision")
        return
    draft.values[GICD_IIDR] = lowest.to_bytes(4, "little")
    words = {number: f"revision {(number & _REVISION) >> 12}" for number in found.values()}
    draft.losses += [Loss(name, "GICD_IIDR", words[number], words[lowest]) for name, number in found.items()
                     if number != lowest]


_REVISION, _FIRST_REVISION = 0xF000, 0x2000


def _physical_counter(draft: Draft, views: Mapping[str, View]) -> None:
    """What no contract can promise: CNTPCT_EL0 of a guest's own on some hosts, and the host's on others."""
    without = [name for name, view in views.items() if PTIMER_CNT not in view.host.listed]
    if without and len(without) < len(views):
        draft.notes.append(physical_counter(without))


def physical_counter(hosts: Iterable[str]) -> str:
    """What a guest meets on hosts without PTIMER_CNT if it was started on one that has it."""
    return (f"PTIMER_CNT: a guest reads the host's own physical counter on {', '.join(hosts)}: started on a kernel "
            "that keeps it the guest's (since 6.4), it would notice the jump, and no contract mends that")


GICD_IIDR = ids.attribute_id(gic.GICV3, gic.DISTRIBUTOR, 8)
PTIMER_CNT = arm64_ids.sysreg(3, 3, 14, 0, 1)


def _short(reason: str, listed: Iterable[int]) -> list[str]:
    names = [lookup(id).name for id in listed if _OWN.get(id) == reason]
    plain = [name for name in names if not name.startswith("CCSIDR")]
    return plain + (["CCSIDR"] if len(plain) < len(names) else [])


def _common_features(draft: Draft, hosts: Hosts, wanted: int | None) -> int:
    offered = {name: vcpu_features.DEFAULT | vcpu_features.together(p.vcpu_features) for name, p in hosts.items()}
    common = vcpu_features.DEFAULT | sum(mask for mask in vcpu_features.GROUPS
                                         if all(mask & ~has == 0 for has in offered.values()))
    if wanted is not None:
        if missing := wanted & ~common:
            raise UsageError(f"vCPU features {', '.join(vcpu_features.names(missing))}: not all these hosts have them")
        return wanted
    draft.losses += [Loss(name, "vCPU features", ", ".join(vcpu_features.names(has & ~common)), "off")
                     for name, has in offered.items() if has & ~common]
    return common


@dataclass(frozen=True, slots=True)
class Offer:
    """What one host can show in a register: its own value, and bits that it lets be changed before the first run.

    Attributes:
        how: which question had which answer, where the host has no such register.
        tried: whether anybody tried what it lets be changed, or the kernel says so.
    """

    value: int
    writable: int
    size: int
    how: str = ""
    tried: bool = True

    @property
    def stuck(self) -> str:
        """What to say of bits that are not `writable`."""
        return "can't change" if self.tried else "was captured without the experiment, so nobody knows if it can change"


class View:
    """A host for a vCPU with certain features."""

    def __init__(self, host: HostProfile, features: int) -> None:
        self.host, self.features = host, features
        self.behaviour = of_profile(host)

    @property
    def pinned(self) -> Iterable[int]:
        """Registers of the classes that a contract has."""
        return (id for id in self.host.registers if lookup(id).klass in (Klass.FEATURE, Klass.IDENTITY))

    def offer(self, id: int) -> Offer | None:
        """What the host has or behaves as; None where nobody knows."""
        if (seen := self.behaviour.sees.get(id)) is not None:
            return Offer(int.from_bytes(seen, "little"), 0, len(seen), "as a guest reads it")
        if id in self.host.listed:
            value = self._value(id)
            return None if value is None else Offer(int.from_bytes(value, "little"), self._writable(id), len(value))
        if id in self.behaviour.behaves_as:
            value = self.behaviour.behaves_as[id]
            return Offer(int.from_bytes(value, "little"), 0, len(value), self.behaviour.how.get(id, ""))
        if id in _READS_0:
            return Offer(0, 0, 8, "hidden: reads 0")
        return None

    def tried(self, id: int, offer: Offer | None) -> Offer | None:
        """The offer, and whether its writable bits are known: a profile without the experiment has none."""
        known = bool(self.host.register_bits) or id in self.host.writable_masks or id not in self.host.listed
        return offer if offer is None or known else replace(offer, tried=False)

    def _wide(self, id: int) -> bool:
        needed = vcpu_features.DEPENDENT.get(lookup(id).name, 0)
        return bool(needed & self.features) or id not in self.host.defaults

    def _value(self, id: int) -> bytes | None:
        full = self.host.feature_defaults.get(id) if self._wide(id) else None
        return full or self.host.defaults.get(id)

    def _writable(self, id: int) -> int:
        tried = (self.host.feature_bits.get(id) if self._wide(id) else None) or self.host.register_bits.get(id)
        flipped = int.from_bytes(tried[1], "little") if tried else 0
        return flipped | self.host.writable_masks.get(id, 0)


_READS_0 = frozenset(arm64_ids.sysreg(3, 0, 0, crm, op2) for crm in range(1, 8) for op2 in range(8))
"""The ID space: a register that a kernel hides there reads 0 (ID_AA64ZFR0_EL1 without SVE)."""

_Offers = Mapping[str, Offer]


def _settle(draft: Draft, row: Register, offers: _Offers) -> None:
    """Find the register's value, or say why there is none."""
    size = next(iter(offers.values())).size
    value = _SPECIAL.get(row.id, _by_field)(draft, row, offers)
    if value is None:
        return
    draft.values[row.id] = value.to_bytes(size, "little")
    for name, offer in offers.items():
        if (offer.value ^ value) & ~draft.free.get(row.id, 0):
            draft.losses.append(Loss(name, row.name, *_words(row, offer.value, value)))


def _words(row: Register, has: int, gets: int) -> tuple[str, str]:
    """Only the fields that differ."""
    named = [f for f in BITS.get(row.bits, ()) if (has ^ gets) & f.mask]
    if not named or (has ^ gets) & ~sum(f.mask for f in named):
        return f"{has:#x}", f"{gets:#x}"
    return ", ".join(_shown(f, has) for f in named), ", ".join(_shown(f, gets) for f in named)


def _shown(f: Field, value: int) -> str:
    return f.show(value) or f"{f.name}=0"


def _by_field(draft: Draft, row: Register, offers: _Offers) -> int | None:
    """Each named field by its rule; bits without a name must be the same everywhere."""
    table = BITS.get(row.bits, ())
    fields = table if row.klass == Klass.FEATURE and table else (Field(row.name, 0, 64),)
    rest = ~sum(f.mask for f in fields) & (1 << 64) - 1
    value, refused = 0, len(draft.refusals)
    for f in (*fields, *(Field(f"bit {bit}", bit) for bit in range(64) if rest >> bit & 1)):
        found = _field(draft, row, f, offers)
        value |= 0 if found is None else found << f.low
    return value if len(draft.refusals) == refused else None


def _field(draft: Draft, row: Register, f: Field, offers: _Offers) -> int | None:
    """The field's value as an unsigned number; None, and a refusal, where there is none that all hosts accept."""
    has = {name: (offer.value & f.mask) >> f.low for name, offer in offers.items()}
    if len(set(has.values())) == 1:
        return next(iter(has.values()))
    if draft.is_free(f"{row.name}.{f.name}"):
        draft.free[row.id] = draft.free.get(row.id, 0) | f.mask
        draft.left_out.append(f"{row.name}.{f.name}: not pinned, as asked")
        return min(has.values())
    target = _RULES.get((row.name, f.name), _lowest)(f, has)
    why = [f"{name} {offers[name].stuck} {_shown(f, offers[name].value)}"
           f"{f' ({offers[name].how})' if offers[name].how else ''}" for name in has
           if has[name] != target and f.mask & ~offers[name].writable]
    if not why:
        return target
    low = next(name for name in has if has[name] == target) if target in has.values() else ""
    less = f"{low} has {_shown(f, offers[low].value)}; " if low else ""
    draft.refusals.append(f"{row.name}.{f.name}: {less}{'; '.join(why)}")
    return None


def _lowest(f: Field, has: Mapping[str, int]) -> int:
    """FTR_LOWER_SAFE; a signed field's lowest is the most negative."""
    return min(has.values(), key=lambda number: number - (1 << f.width)
               if f.signed and number >> f.width - 1 else number)


def _highest_or_zero(f: Field, has: Mapping[str, int]) -> int:
    """FTR_HIGHER_OR_ZERO_SAFE: 0 says nothing, else the largest granule serves all."""
    return 0 if 0 in has.values() else max(has.values())


def _exact(safe: int) -> Callable[[Field, Mapping[str, int]], int]:
    """FTR_EXACT: hosts that differ get the value that the kernel calls safe."""
    return lambda f, has: safe


_RULES: dict[tuple[str, str], Callable[[Field, Mapping[str, int]], int]] = {
    ("CTR_EL0", "CWG"): _highest_or_zero, ("CTR_EL0", "ERG"): _highest_or_zero,
    ("CTR_EL0", "L1Ip"): _exact(2),
    ("ID_AA64ISAR1_EL1", "APA"): _exact(0), ("ID_AA64ISAR1_EL1", "API"): _exact(0),
    ("ID_AA64ISAR2_EL1", "APA3"): _exact(0),
    ("ID_AA64MMFR0_EL1", "TGRAN4_2"): _exact(1), ("ID_AA64MMFR0_EL1", "TGRAN16_2"): _exact(1),
    ("ID_AA64MMFR0_EL1", "TGRAN64_2"): _exact(1),
}
"""Fields that are not simply lowered (arch/arm64/kernel/cpufeature.c, ftr_ctr, ftr_id_aa64*; the others are
FTR_LOWER_SAFE or, for DebugVer and PMUVer, made so by KVM: sys_regs.c, arm64_check_features)."""


def _psci(draft: Draft, row: Register, offers: _Offers) -> int | None:
    """The lowest version: each kernel with the register takes every version from 0.2 to its own."""
    lowest = min(offer.value for offer in offers.values())
    taking = {name: replace(offer, writable=(1 << 64) - 1) for name, offer in offers.items() if not offer.how}
    return _whole(draft, row, {**offers, **taking}, lowest)


def _bitmap(draft: Draft, row: Register, offers: _Offers) -> int | None:
    """What all hosts answer; a host that has the register takes any subset of its bits."""
    common = (1 << 64) - 1
    for offer in offers.values():
        common &= offer.value
    taking = {name: replace(offer, writable=offer.value) for name, offer in offers.items() if not offer.how}
    return _whole(draft, row, {**offers, **taking}, common)


def _level(draft: Draft, row: Register, offers: _Offers) -> int | None:
    """KVM only checks what is written and shows the guest the host's own level: it has to be the same everywhere."""
    lowest = min(offer.value for offer in offers.values())
    return _whole(draft, row, {name: replace(offer, writable=0) for name, offer in offers.items()}, lowest)


def _whole(draft: Draft, row: Register, offers: _Offers, target: int) -> int | None:
    """The register as one number."""
    stuck = [f"{name} {offer.stuck} {_words(row, offer.value, target)[0]}{f' ({offer.how})' if offer.how else ''}"
             for name, offer in offers.items() if (offer.value ^ target) & ~offer.writable]
    if not stuck:
        return target
    draft.refusals.append(f"{row.name}: the least is {target:#x}; {'; '.join(stuck)}")
    return None


def _vector_lengths(draft: Draft, row: Register, offers: _Offers) -> int | None:
    """The longest maximum up to which all hosts have the same lengths: KVM takes no gap that the host hasn't got."""
    for length in range(512, 0, -1):
        below = (1 << length) - 1
        sets = {offer.value & below for offer in offers.values()}
        if len(sets) == 1 and (common := sets.pop()) >> length - 1:
            return common
    draft.refusals.append(f"{row.name}: no vector length in common")
    return None


def _geometry(draft: Draft, row: Register, offers: _Offers) -> int | None:
    """One host's value, if all others take it; else each shows its own, which `check` calls harmless."""
    for value in dict.fromkeys(offer.value for offer in offers.values()):
        if not any((offer.value ^ value) & ~offer.writable for offer in offers.values()):
            return value
    draft.left_out.append(f"{row.name}: cache geometry: hosts differ, and no value serves all")
    return None


_SPECIAL: dict[int, Callable[[Draft, Register, _Offers], int | None]] = {
    arm64_ids.firmware(0): _psci,
    **{arm64_ids.firmware(n): _level for n in (1, 2, 3)},
    **{arm64_ids.bitmap(n): _bitmap for n in range(4)},
    arm64_ids.SVE_VLS: _vector_lengths,
    arm64_ids.sysreg(3, 1, 0, 0, 1): _geometry,
}
"""Registers that are not judged field by field: firmware (fw-pseudo-registers.rst, hypercalls.c, psci.c), SVE, and
CLIDR_EL1: a constant up to 6.2, since then whatever CTR_EL0 lets it be."""
