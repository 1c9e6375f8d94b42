"""Baselines: the strongest contract, what each host gives up for it, and that every host really accepts it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.cli import main
from migstream.contract import BASELINE, from_json
from migstream.errors import UsageError
from migstream.host import profiles
from migstream.host.baseline import Baseline, baseline
from migstream.host.baseline_x86_64 import entries, packed
from migstream.host.profile import HostProfile
from migstream.host.profile import to_json as profile_json
from migstream.model import Arch
from migstream.plan import plan_for
from migstream.registers import arm64_ids, gic, ids, vcpu_features, x86_64
from migstream.registers.bit_tables import BITS
from migstream.registers.catalogue import lookup
from migstream.registers.cpuid import RUNTIME_BITS, bit_name
from migstream.registers.firmware_arm64 import ABSENT
from migstream.verdicts.guest import fresh, of_contract

Capture = pytest.CaptureFixture[str]
PSCI, STD, PFR0, X0 = arm64_ids.firmware(0), arm64_ids.bitmap(0), arm64_ids.sysreg(3, 0, 0, 4, 0), arm64_ids.core(0)
MIDR, ISAR0 = arm64_ids.sysreg(3, 0, 0, 0, 0), arm64_ids.sysreg(3, 0, 0, 6, 0)
ALL_BITS = (1 << 64) - 1
TRNG_VERSION = 0x8400_0050 << 32


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def arm64(*, psci: int = 0x10001, isar0: int = 0x0111_1110, writable: int = ALL_BITS, midr: int = 0x410F_D0F0,
          std: int | None = None, trng: bool = False, features: int = vcpu_features.DEFAULT) -> HostProfile:
    """A small kernel. `std`: its bitmap register's default, None for a kernel without one; `trng`: what it answers."""
    values = {X0: 0, PSCI: psci, ISAR0: isar0, MIDR: midr} | ({} if std is None else {STD: std})
    asked = {call.key: ALL_BITS for row in ABSENT for call in row.asked}
    return HostProfile(
        Arch.ARM64, "Linux T", "cpu", "kvm", {"MAX_VCPUS": 8}, registers=tuple(sorted(values)),
        defaults={id: word(value) for id, value in values.items()}, scopes={X0: "vcpu"},
        register_bits={X0: (word(1), word(1)), ISAR0: (word(writable), word(writable)), MIDR: (word(0), word(0))},
        vcpu_features=features, firmware={**asked, TRNG_VERSION: 0x10000 if trng else ALL_BITS})


def names(found: Baseline) -> list[tuple[str, str]]:
    return [(loss.host, loss.name) for loss in found.losses]


def accepted(found: Baseline, hosts: dict[str, HostProfile]) -> None:
    """Every host shows the contract's guest what the contract says, at the start and after any move."""
    assert not found.refusals
    for host in hosts.values():
        assert plan_for(of_contract(found.contract, host), host).refusals == []
    for a, b in itertools.permutations(hosts.values(), 2):
        guest = fresh(a, found.contract.vcpu_features, found.contract)
        contract = set(found.contract.values)
        assert [r for r in plan_for(guest, b).verdicts if r.stands_in_the_way and r.slot.id in contract] == []


# arm64, by hand.


def test_two_equal_hosts_give_up_nothing() -> None:
    hosts = {"a": arm64(), "b": arm64()}
    found = baseline(hosts)
    assert (found.losses, found.refusals) == ((), ())
    assert found.contract.behaviour.found == BASELINE
    assert found.contract.values[PSCI] == word(0x10001) and found.contract.values[ISAR0] == word(0x0111_1110)
    accepted(found, hosts)


def test_the_lower_value_serves_all_and_the_loss_is_named() -> None:
    hosts = {"old": arm64(psci=0x10000, isar0=0x0011_1110), "new": arm64(psci=0x10003)}
    found = baseline(hosts)
    assert names(found) == [("new", "ID_AA64ISAR0_EL1"), ("new", "PSCI_VERSION")]
    assert [str(loss) for loss in found.losses][1] == "new: PSCI_VERSION: PSCI=1.3 -> PSCI=1.0"
    accepted(found, hosts)


def test_a_field_that_can_not_be_lowered_is_refused_by_name_or_left_free() -> None:
    hosts = {"old": arm64(isar0=0x0011_1110), "new": arm64(writable=0)}
    found = baseline(hosts)
    (refusal,) = found.refusals
    assert refusal.startswith("ID_AA64ISAR0_EL1.") and "new can't change" in refusal and ISAR0 not in \
        found.contract.values
    field = refusal.split(":")[0]
    free = baseline(hosts, free=[field])
    assert free.refusals == () and free.contract.free[ISAR0] and f"{field}: not pinned, as asked" in free.left_out
    whole = baseline(hosts, free=["ID_AA64ISAR0_EL1"])
    assert whole.refusals == () and ISAR0 not in whole.contract.values
    with pytest.raises(UsageError, match="no register or field that differs matches 'ID_NONE'"):
        baseline(hosts, free=["ID_NONE"])


def test_a_host_without_the_experiment_is_no_host_that_refuses() -> None:
    untried = replace(arm64(), register_bits={})
    (refusal,) = baseline({"old": arm64(isar0=0x0011_1110), "new": untried}).refusals
    assert "new was captured without the experiment, so nobody knows if it can change" in refusal


def test_a_constant_that_differs_has_no_value_for_both() -> None:
    found = baseline({"a": arm64(), "b": arm64(midr=0x410F_D0F1)})
    assert [line.split(":")[0].split(".")[0] for line in found.refusals] == ["MIDR_EL1"]


def test_a_register_that_one_host_lacks_is_what_it_behaves_as() -> None:
    hosts = {"old": arm64(), "new": arm64(std=1)}
    found = baseline(hosts)
    assert found.contract.values[STD] == word(0) and names(found) == [("new", "STD_BMAP")]
    accepted(found, hosts)
    both = baseline({"old": arm64(trng=True), "new": arm64(std=1)})
    assert both.contract.values[STD] == word(1) and both.losses == ()
    stuck = baseline({"old": arm64(trng=True), "new": arm64(std=0)})
    assert stuck.refusals and "STD_BMAP" in stuck.refusals[0]


def test_what_nobody_asked_is_refused() -> None:
    found = baseline({"old": replace(arm64(), firmware={}), "new": arm64(std=1)})
    assert any("STD_BMAP: what old behaves as isn't known" in line for line in found.refusals)


def test_features_that_not_all_have_are_off() -> None:
    sve = vcpu_features.DEFAULT | vcpu_features.SVE
    hosts = {"a": arm64(features=sve), "b": arm64()}
    found = baseline(hosts)
    assert found.contract.vcpu_features == vcpu_features.DEFAULT
    assert [str(loss) for loss in found.losses] == ["a: vCPU features: SVE -> off"]
    with pytest.raises(UsageError, match="vCPU features SVE: not all these hosts have them"):
        baseline(hosts, sve)


_isar = st.integers(0, 0xFFFF_FFFF)


@given(st.lists(st.tuples(_isar, _isar, st.sampled_from([0x2, 0x10000, 0x10001, 0x10003]),
                          st.sampled_from([None, 0, 1]), st.booleans()), min_size=2, max_size=4))
def test_any_hosts(rows: list[tuple[int, int, int, int | None, bool]]) -> None:
    """A baseline is accepted everywhere, no field of it is above any host's, and the losses tell all that is lost."""
    named = sum(field.mask for field in BITS["ID_AA64ISAR0_EL1"])
    hosts = {f"h{n}": arm64(isar0=isar0 & named, writable=writable & named, psci=psci, std=std, trng=trng)
             for n, (isar0, writable, psci, std, trng) in enumerate(rows)}
    found = baseline(hosts)
    if found.refusals:
        return
    accepted(found, hosts)
    value = int.from_bytes(found.contract.values[ISAR0], "little")
    for name, host in hosts.items():
        own = int.from_bytes(host.defaults[ISAR0], "little")
        assert all(field.signed or value & field.mask <= own & field.mask for field in BITS["ID_AA64ISAR0_EL1"])
        assert ((name, "ID_AA64ISAR0_EL1") in names(found)) == (own != value)
        assert ((name, "PSCI_VERSION") in names(found)) == (host.defaults[PSCI] != found.contract.values[PSCI])


# Recorded hosts.


@pytest.mark.parametrize("chosen", [("x86_64-6.1", "x86_64-6.12"), ("x86_64-6.1", "x86_64-6.12", "x86_64-7.2"),
                                    ("x86_64-6.12", "x86_64-7.2")])
def test_x86_kernels_accept_their_baseline(chosen: tuple[str, ...]) -> None:
    hosts = {name: profiles.load(name) for name in chosen}
    found = baseline(hosts)
    accepted(found, hosts)
    table = entries(found.contract.values[x86_64.CPUID2.id])
    for name, host in hosts.items():
        own = entries(host.cpuid)
        features = [(key, n) for key, n in (((1, 0), 2), ((7, 0), 1), ((0x8000_0001, 0), 2)) if key in table]
        assert all(table[key][1][n] & ~own[key][1][n] & ~RUNTIME_BITS.get((*key, n), 0) == 0
                   for key, n in features), name


def test_order_of_hosts_does_not_matter() -> None:
    chosen = ["x86_64-6.1", "x86_64-6.12", "x86_64-7.2"]
    found = [baseline({name: profiles.load(name) for name in order}) for order in itertools.permutations(chosen)]
    assert len({tuple(one.contract.values[id] for id in sorted(one.contract.values) if id != x86_64.CPUID2.id)
                for one in found}) == 1
    assert len({frozenset(map(str, one.losses)) for one in found}) == 1


def test_a_baseline_of_one_kernel_is_what_it_offers() -> None:
    host = profiles.load("arm64-7.2")
    found = baseline({"a": host, "b": host}, vcpu_features.DEFAULT)
    differ = [lookup(id).name for id, value in found.contract.values.items()
              if host.defaults.get(id) not in (None, value)]
    assert (found.losses, found.refusals, differ) == ((), (), [])


def test_hosts_of_two_architectures() -> None:
    with pytest.raises(UsageError, match="hosts of different architectures: arm64, x86_64"):
        baseline({"a": arm64(), "b": profiles.load("x86_64-7.2")})


@given(st.dictionaries(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
                       st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4)),
                       max_size=10))
def test_cpuid_entries_come_back(table: dict[tuple[int, int], tuple[int, list[int]]]) -> None:
    assert entries(packed(table)) == table


# The command.


def test_the_command_writes_a_contract_or_none(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "c.json"
    assert main(["host", "baseline", "x86_64-6.1", "x86_64-7.2", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "pinned" in shown and "gives up" in shown and "CPUID 0x8000000a EDX" in shown
    contract = from_json(out.read_text())
    assert contract.arch == Arch.X86_64 and contract.behaviour.found == BASELINE
    assert main(["host", "baseline", "x86_64-6.1", "x86_64-7.2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["contract"]["values"] == json.loads(out.read_text())["values"]
    assert {loss["host"] for loss in document["losses"]} == {"x86_64-7.2"}
    out.unlink()
    assert main(["host", "baseline", "arm64-5.10", "arm64-7.2", "-o", str(out)]) == 11
    err = capsys.readouterr().err
    assert "no contract that all of these hosts accept: " in err and not out.exists()


@pytest.mark.sim
def test_no_guest_starts_under_a_contract_that_a_host_can_not_keep(tmp_path: Path, capsys: Capture) -> None:
    """The contract of a newer kernel, on an older one: refused by name, before a guest runs."""
    out = tmp_path / "c.json"
    assert main(["host", "baseline", "arm64-7.2", "arm64-7.2", "-o", str(out)]) == 64
    from migstream.contract import to_json

    host = profiles.load("arm64-7.2")
    out.write_text(to_json(baseline({"a": host, "b": host}, vcpu_features.DEFAULT).contract))
    capsys.readouterr()
    words = ["demo", "--vcpus", "1", "--memory", "4M", "--run", "0", "--contract", str(out)]
    assert main([*words, "--backend", "sim:arm64-7.2"]) == 0
    capsys.readouterr()
    assert main([*words, "--backend", "sim:arm64-6.12"]) == 11
    err = capsys.readouterr().err
    assert "no guest can be started under this contract here: " in err and "PSCI" in err and err.count("\n") == 1


def test_a_bit_that_every_kernel_takes_is_not_given_up(capsys: Capture) -> None:
    """6.1 does not list HYPERVISOR and TSC_DEADLINE, and `check` calls a guest with them a fit there."""
    hosts = {name: profiles.load(name) for name in ("x86_64-6.1", "x86_64-7.2")}
    listed = {name: entries(host.cpuid)[1, 0][1][2] for name, host in hosts.items()}
    assert listed["x86_64-7.2"] & ~listed["x86_64-6.1"] & 1 << 31
    found = baseline(hosts)
    word = entries(found.contract.values[x86_64.CPUID2.id])[1, 0][1][2]
    assert listed["x86_64-7.2"] & 1 << 24 == word & 1 << 24 and word & 1 << 31
    assert not any(loss.name == "CPUID 0x1 ECX" for loss in found.losses), found.losses
    accepted(found, hosts)


def test_what_is_given_up_has_its_name() -> None:
    assert bit_name(7, 0, 3, 4) == "bit 4 FSRM" and bit_name(7, 0, 3, 0) == "bit 0"


def test_one_object_whatever_stands_in_the_way(capsys: Capture) -> None:
    assert main(["host", "baseline", "arm64-5.10", "arm64-7.2", "--json"]) == 11
    document = json.loads(capsys.readouterr().out)
    assert document["contract"] is None and document["refusals"]


FREE = ("ID_DFR0_EL1.PerfMon", "ID_AA64DFR0_EL1.DebugVer", "ID_AA64DFR0_EL1.PMUVer", "ID_AA64MMFR1_EL1.HCX",
        "SMCCC_ARCH_WORKAROUND_3")
GICD_IIDR = ids.attribute_id(gic.GICV3, gic.DISTRIBUTOR, 8)


def test_the_interrupt_controllers_revision_is_the_lowest() -> None:
    hosts = {name: profiles.load(name) for name in ("arm64-5.10", "arm64-6.1", "arm64-6.12", "arm64-7.2")}
    found = baseline(hosts, vcpu_features.DEFAULT, FREE)
    assert int.from_bytes(found.contract.values[GICD_IIDR], "little") == 0x4B00_243B
    lost = [(loss.host, loss.has, loss.gets) for loss in found.losses if loss.name == "GICD_IIDR"]
    assert lost == [(name, "revision 3", "revision 2") for name in hosts if name != "arm64-5.10"]
    other = replace(hosts["arm64-7.2"], attributes={**hosts["arm64-7.2"].attributes, GICD_IIDR: b"\x3b\x34\x00\x4c"})
    assert any("GICD_IIDR" in line for line in baseline({**hosts, "other": other}, None, FREE).left_out)


@pytest.mark.sim
def test_a_guest_of_the_newest_kernel_fits_the_oldest_but_for_its_counter(tmp_path: Path, capsys: Capture) -> None:
    """GICD_IIDR and GICR_CTLR are as the contract says; PTIMER_CNT no contract mends, and that is said beforehand."""
    contract, stream = str(tmp_path / "c.json"), str(tmp_path / "v.mig")
    free = [word for field in FREE for word in ("--free", field)]
    kernels = ["arm64-5.10", "arm64-6.1", "arm64-6.12", "arm64-7.2"]
    assert main(["host", "baseline", *kernels, "-o", contract, *free]) == 0
    assert "PTIMER_CNT: a guest reads the host's own physical counter on arm64-5.10" in capsys.readouterr().out
    assert main(["check", contract, "--host", "arm64-5.10"]) == 0
    assert "PTIMER_CNT" in capsys.readouterr().out
    assert main(["demo", "--backend", "sim:arm64-7.2", "--vcpus", "1", "--memory", "4M", "--contract", contract,
                 "-o", stream]) == 0
    capsys.readouterr()
    main(["check", stream, "--host", "arm64-5.10", "--all", "--json"])
    verdicts = json.loads(capsys.readouterr().out)["hosts"]["arm64-5.10"]["verdicts"]
    bad = {v["register"] for v in verdicts if v["answer"] in ("noticed", "refused")}
    assert "PTIMER_CNT" in bad and not bad & {"GICD_IIDR", "GICR_CTLR"}


def test_a_profile_without_the_experiment_is_named(tmp_path: Path, capsys: Capture) -> None:
    host = profiles.load("x86_64-7.2")
    path = tmp_path / "p.json"
    path.write_text(profile_json(replace(host, register_bits={}, msr_bits={})))
    main(["host", "baseline", "x86_64-7.2", str(path)])
    assert f"{path}: its profile was captured without the experiment" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["host", "baseline", "x86_64-6.1", "x86_64-7.2", "--vcpu-features", "sve"],
    ["check", "--matrix", "x86_64-6.1", "x86_64-7.2", "--vcpu-features", "sve"],
    ["check", "--fleet", "x86_64-6.1", "x86_64-7.2", "--vcpu-features", "none"],
    ["demo", "--backend", "sim:x86_64-7.2", "--vcpu-features", "sve"],
])
def test_vcpu_features_are_arm64s(capsys: Capture, words: list[str]) -> None:
    assert main(words) == 64
    assert "--vcpu-features: vCPUs of arm64 have them" in capsys.readouterr().err


def test_a_full_device_is_named(capsys: Capture) -> None:
    assert main(["host", "baseline", "x86_64-6.1", "x86_64-7.2", "-o", "/dev/full"]) == 74
    assert capsys.readouterr().err == "migstream: /dev/full: No space left on device\n"
