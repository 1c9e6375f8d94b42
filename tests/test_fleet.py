"""Hosts among themselves: the matrix of fresh guests, beside real streams; old and new kernels and VMMs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import show_check
from migstream.backends import open_backend
from migstream.cli import main
from migstream.contract import PINNED
from migstream.demo import run as demo
from migstream.errors import UsageError
from migstream.fleet import Fleet, Vmm, four_way, matrix
from migstream.host import profiles
from migstream.host.profile import HostProfile
from migstream.model import Arch
from migstream.plan import Plan, plan_for
from migstream.registers import arm64_ids, vcpu_features
from migstream.registers.catalogue import lookup
from migstream.survey import survey
from migstream.transport import restore, save
from migstream.verdicts.guest import fresh, moved
from migstream.verdicts.model import Saved

Capture = pytest.CaptureFixture[str]
ALL = vcpu_features.parse("sve,pmu_v3,ptrauth")
PSCI, STD, X0 = arm64_ids.firmware(0), arm64_ids.bitmap(0), arm64_ids.core(0)
TRNG_VERSION = 0x8400_0050 << 32


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


# The matrix.

NAMES = {arch: [name for name in profiles.names() if name.startswith(f"{arch.label}-")] for arch in Arch}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Guests that ran on each simulated kernel and were saved there."""
    out = {}
    for name in profiles.names():
        path = tmp_path_factory.mktemp("fleet") / "v.mig"
        backend = open_backend(f"sim:{name}")
        with path.open("wb") as file:
            demo.run_and_save(backend, demo.machine(backend.arch, 1, 4 << 20), file)
        out[name] = _read(io.BytesIO(path.read_bytes()))
    return out


@pytest.mark.sim
@pytest.mark.parametrize("arch", Arch)
def test_a_fresh_guest_of_a_profile_meets_what_a_saved_one_meets(arch: Arch, streams: dict[str, Saved]) -> None:
    """Feature and identity registers that stand in the way are the same; state depends on what the guest did.

    Without the interrupt controller: the simulator's GICD_IIDR has another revision than the recorded ones. Both with
    what the profile says that its kernel behaves as: a simulated arm64 kernel can't tell.
    """
    hosts = {name: profiles.load(name) for name in NAMES[arch]}
    for (a, b), plan in matrix(hosts, vcpu_features.DEFAULT).items():
        saved = plan_for(replace(streams[a], contract=fresh(hosts[a]).contract), hosts[b])
        assert _pinned(plan) == _pinned(saved), (a, b)


def _pinned(plan: Plan) -> list[str]:
    return sorted(v.name for v in plan.verdicts if v.stands_in_the_way and lookup(v.slot.id).klass in PINNED
                  and not v.name.startswith("GIC"))


def test_matrix_on_one_screen(capsys: Capture) -> None:
    assert main(["check", "--matrix", *NAMES[Arch.ARM64]]) == 11
    lines = capsys.readouterr().out.splitlines()
    count = len(NAMES[Arch.ARM64])
    assert lines[0].split() == ["from", "\\", "to", *(str(n + 1) for n in range(count))]
    assert [line.split()[1] for line in lines[1:count + 1]] == NAMES[Arch.ARM64]
    assert len(lines) <= count + 1 + show_check.SCREEN + 1
    legend = dict(line.split(None, 1) for line in lines[count + 1:])
    cells = [cell for line in lines[1:count + 1] for cell in line.split()[2:] if cell.isalpha() and cell != "fits"]
    assert cells and {*cells} == legend.keys()
    assert any("PSCI_VERSION: refused: PSCI 0x10003" in reason for reason in legend.values())


def test_matrix_for_machines(capsys: Capture) -> None:
    assert main(["check", "--matrix", "arm64-6.12", "arm64-7.2", "x86_64-7.2", "--json"]) == 11
    document = json.loads(capsys.readouterr().out)
    rows = {(row["from"], row["to"]): row for row in document["matrix"]}
    assert (document["migstream_json"], document["command"], len(rows)) == (1, "check", 6)
    assert rows["arm64-6.12", "arm64-7.2"]["status"] == 0
    assert rows["arm64-7.2", "arm64-6.12"]["status"] == 11
    assert rows["arm64-7.2", "x86_64-7.2"]["obstacles"] == ["the stream is arm64, this host is x86_64"]


def test_matrix_of_one_kernel_and_its_like_fits(tmp_path: Path, capsys: Capture) -> None:
    from migstream.host.profile import to_json

    twin = tmp_path / "twin.json"
    twin.write_text(to_json(replace(profiles.load("x86_64-7.2"), cpu="another of the kind")))
    assert main(["check", "--matrix", "x86_64-7.2", str(twin), "--all"]) == 0
    assert f"x86_64-7.2 -> {twin}  fits: " in capsys.readouterr().out
    assert main(["check", "--matrix", "arm64-6.12", "arm64-7.2", "--vcpu-features", "sve,pmu_v3,ptrauth"]) == 11


def test_a_policy_counts_in_a_matrix(tmp_path: Path, capsys: Capture) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text("migstream_policy = 1\n[[clamp]]\nregister = 'PSCI_VERSION'\nreason = 'asked at boot only'\n"
                      "guest_notices = true\n")
    assert main(["check", "--matrix", "arm64-6.12", "arm64-7.2", "--policy", str(policy)]) == 10
    assert "(policy, clamp: asked at boot only)" in capsys.readouterr().out


@pytest.mark.sim
@pytest.mark.parametrize(("a", "b"), [("arm64-6.12", "arm64-7.2"),
                                      ("x86_64-6.1", "x86_64-6.12"), ("x86_64-6.1", "x86_64-7.2"),
                                      ("x86_64-6.12", "x86_64-7.2")])
def test_the_way_back_is_that_of_a_guest_that_really_went(a: str, b: str) -> None:
    """Restored on one simulated kernel and saved there again, it meets at home what `moved` says that it meets."""
    first, host, home = open_backend(f"sim:{a}"), profiles.load(b), profiles.load(a)
    stream = io.BytesIO()
    demo.run_and_save(first, demo.machine(first.arch, 1, 4 << 20), stream)
    saved = _read(stream)
    plan = plan_for(saved, host)
    assert plan.refusals == [] and plan.pair is not None
    back = plan_for(moved(plan.pair, plan.verdicts), home)
    stream.seek(0)
    there = open_backend(f"sim:{b}")
    vm, _ = restore(stream, there)
    again = io.BytesIO()
    with vm:
        save(vm, again, host=there.summary(), pause=lambda: None)
    real = plan_for(replace(_read(again), contract=fresh(host).contract), home)
    assert _in_the_way(back) == _in_the_way(real)


def test_a_guest_can_get_somewhere_and_not_back() -> None:
    """Since 6.4 the physical counter is a register; the kernel before can not set it to what the guest saw."""
    home, host = profiles.load("arm64-6.1"), profiles.load("arm64-7.2")
    plan = plan_for(fresh(home), host)
    assert plan.refusals == [] and plan.pair is not None
    assert "PTIMER_CNT" in _in_the_way(plan_for(moved(plan.pair, plan.verdicts), home))


def _in_the_way(plan: Plan) -> list[str]:
    return sorted(v.name for v in plan.verdicts if v.stands_in_the_way and not v.name.startswith("GIC"))


def _read(stream: io.BytesIO) -> Saved:
    stream.seek(0)
    seen = survey(stream)
    assert seen.reader.machine is not None
    return Saved.of(seen.reader.machine, seen.reader.layouts, [bank.decode() for bank in seen.banks], seen.contract())


# Old and new kernels and VMMs.

OLD = HostProfile(
    Arch.ARM64, "Linux old", "cpu", "kvm", {"MAX_VCPUS": 8}, registers=(X0, PSCI),
    defaults={X0: word(0), PSCI: word(0x10000)}, register_bits={X0: (word(1), word(1))}, scopes={X0: "vcpu"},
    vcpu_features=vcpu_features.DEFAULT, firmware={})
"""PSCI 1.0, no bitmap registers; what it answers is set per test."""

NOT = 2**64 - 1


def _asked(trng: int) -> dict[int, int]:
    """A guest was told of every interface: none but, perhaps, random numbers."""
    from migstream.registers.firmware_arm64 import ABSENT

    return {call.key: NOT for row in ABSENT for call in row.asked} | {TRNG_VERSION: trng}


OLD_KERNEL = replace(OLD, firmware=_asked(NOT))
NEW_KERNEL = replace(OLD, kernel="Linux new", registers=tuple(sorted((X0, PSCI, STD))), firmware=_asked(0x10000),
                     defaults={X0: word(0), PSCI: word(0x10001), STD: word(1)},
                     register_bits={X0: (word(1), word(1)), STD: (word(1), word(1))})
"""PSCI 1.1 and a bitmap register: both can be lowered before the guest runs."""

BLIND = Vmm("old", frozenset({X0, PSCI}))
"""As the mailing list has it: it never heard of the bitmap register."""

FULL = Vmm("new", None, contracts=True, opts_out=True)
OO, ON, NO, NN = range(4)
"""Places: old kernel and old VMM; old, new; new, old; new, new."""


def direct(fleet: Fleet) -> dict[tuple[int, int], str]:
    return {route: (reasons[0] if reasons else "") for route, reasons in show_check.direct(fleet).items()}


def test_the_four_ways_of_the_mailing_list() -> None:
    """A guest of the new kernel under a VMM that can't opt out is stuck there; under one that does, it isn't."""
    fleet = four_way(OLD_KERNEL, NEW_KERNEL, (BLIND, FULL), vcpu_features.DEFAULT)
    moves = direct(fleet)
    assert moves[OO, ON] == moves[ON, OO] == moves[NO, NN] == moves[ON, NN] == moves[NN, ON] == ""
    assert "no contract travels" in moves[OO, NO] and "meets this kernel's default, 0x1" in moves[OO, NO]
    assert moves[NO, OO].startswith("PSCI_VERSION: refused: PSCI 0x10001") and moves[NO, ON] == moves[NO, OO]
    assert "no contract travels" in moves[OO, NN]
    assert "the old VMM has no row for it" in moves[NN, OO]
    assert fleet.fences == [(ON, NN), (NO, NN)]
    assert show_check.fleet_status(fleet) == 10
    assert any("once every old VMM is gone" in line for line in show_check.fence_lines(fleet))
    assert any("once every old kernel is gone" in line for line in show_check.fence_lines(fleet))


def test_two_vmms_that_know_all_need_no_fence() -> None:
    fleet = four_way(OLD_KERNEL, NEW_KERNEL, (replace(FULL, name="old"), FULL), vcpu_features.DEFAULT)
    assert fleet.kept == () and not any(fleet.routes.values())
    assert fleet.fences == [(OO, ON, NO, NN)]
    assert (show_check.fleet_status(fleet), show_check.stranded(fleet)) == (0, {})


def test_a_vmm_that_knows_and_does_not_opt_out_has_no_way_back() -> None:
    lazy = Vmm("new", None, contracts=True, opts_out=False)
    fleet = four_way(OLD_KERNEL, NEW_KERNEL, (BLIND, lazy), vcpu_features.DEFAULT)
    moves = direct(fleet)
    assert moves[ON, NN] == "" and moves[NN, ON].startswith("PSCI_VERSION: refused")
    assert fleet.fences == [(NO, NN)]


def test_a_contract_alone_saves_the_way_there() -> None:
    """Without one the guest of the old kernel wakes up with new calls."""
    silent = replace(FULL, contracts=False)
    assert "no contract travels" in direct(four_way(OLD_KERNEL, NEW_KERNEL, (BLIND, silent), 4))[ON, NN]
    assert direct(four_way(OLD_KERNEL, NEW_KERNEL, (BLIND, FULL), 4))[ON, NN] == ""


def test_a_guest_can_be_stranded() -> None:
    """There it goes, and back it can't: the new kernel's register has no row in the old VMM."""
    told = replace(BLIND, contracts=True, rows=frozenset({X0, PSCI, STD}))
    fleet = four_way(OLD_KERNEL, NEW_KERNEL, (told, FULL), vcpu_features.DEFAULT)
    assert direct(fleet)[OO, NO] == ""
    forgetful = four_way(OLD_KERNEL, NEW_KERNEL, (replace(BLIND, contracts=True), FULL), vcpu_features.DEFAULT)
    stranded = show_check.stranded(forgetful)
    assert "no row for it" in stranded[ON, NN, OO][0]
    assert all(len(route) == 3 and not forgetful.routes[route[:2]] for route in stranded)


def test_no_fence_where_the_kernels_can_not_be_alike() -> None:
    """PSCI 1.1 can't be 1.0 where the contract can't say so and nothing opts out; the last place is alone."""
    alone = four_way(OLD_KERNEL, replace(NEW_KERNEL, vcpu_features=0), (BLIND, FULL), vcpu_features.DEFAULT)
    assert alone.fences == [] and show_check.fleet_status(alone) == 11
    assert show_check.fence_lines(alone)[0].startswith("none:")


def test_what_nobody_asked_is_not_safe() -> None:
    fleet = four_way(OLD, NEW_KERNEL, (BLIND, FULL), vcpu_features.DEFAULT)
    assert any("nobody asked the saving kernel" in reason for reason in fleet.routes[ON, NN])
    assert any("STD_BMAP" in line for line in fleet.kept)


_rows = st.none() | st.frozensets(st.sampled_from([X0, PSCI, STD]))
_vmms = st.builds(Vmm, st.just("v"), _rows, st.booleans(), st.booleans())


@given(_vmms, _vmms, _rows)
def test_a_vmm_that_knows_more_makes_no_move_worse(old: Vmm, new: Vmm, rows: frozenset[int] | None) -> None:
    """More rows, or contracts on both sides: what was safe at once stays safe; and a fence is safe within."""
    before = four_way(OLD_KERNEL, NEW_KERNEL, (old, new), vcpu_features.DEFAULT)
    more = None if rows is None or old.rows is None else old.rows | rows
    for wiser in (replace(old, rows=more), replace(old, rows=None)):
        after = four_way(OLD_KERNEL, NEW_KERNEL, (wiser, new), vcpu_features.DEFAULT)
        assert _safe(before) <= _safe(after)
    told = four_way(OLD_KERNEL, NEW_KERNEL, (replace(old, contracts=True), replace(new, contracts=True)), 4)
    assert _safe(before) <= _safe(told)
    for group in before.fences:
        assert not any(before.routes[route] for route in before.routes if set(route) <= set(group))
        assert NN in group and len(group) > 1


def _safe(fleet: Fleet) -> set[tuple[int, int]]:
    return {route for route, reasons in show_check.direct(fleet).items() if not reasons}


def test_two_architectures_are_no_fleet() -> None:
    with pytest.raises(UsageError, match="a fleet of arm64 and x86_64"):
        four_way(OLD, profiles.load("x86_64-7.2"), (BLIND, FULL), 0)


def test_fleet_on_one_screen(capsys: Capture) -> None:
    status = main(["check", "--fleet", "arm64-6.12", "arm64-7.2"])
    out = capsys.readouterr().out
    assert status == 10 and len(out.splitlines()) < 40
    assert "old VMM" in out and "rows for" in out and "no contracts (minor 0)" in out
    assert "PSCI_VERSION: refused: PSCI 0x10003, this kernel has at most 0x10001" in out
    assert "once every old VMM is gone" in out


def test_fleet_for_machines(capsys: Capture) -> None:
    assert main(["check", "--fleet", "x86_64-6.1", "x86_64-7.2", "--json"]) == 10
    fleet = json.loads(capsys.readouterr().out)["fleet"]
    assert [place["vmm"]["name"] for place in fleet["places"]] == ["old", "new", "old", "new"]
    direct = {tuple(r["places"]): r["safe"] for r in fleet["routes"] if len(r["places"]) == 2}
    assert len(direct) == 12 and direct[1, 3] and direct[3, 1] and not direct[2, 0]
    assert [1, 3] in fleet["fences"] and fleet["pinned"] > 0


def test_vmms_in_words(capsys: Capture) -> None:
    same = "contract,opts-out"
    assert main(["check", "--fleet", "x86_64-6.1", "x86_64-7.2", "--old-vmm", same, "--new-vmm", same, "--all"]) == 0
    assert "none needed: every move is safe, there, on and back" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--fleet", "arm64-6.1", "arm64-7.2", "--new-vmm", "frobnicate"], "--new-vmm: no word 'frobnicate'"),
    (["--fleet", "arm64-6.1", "arm64-7.2", "--old-vmm", "knows:a,knows:b"], "one knows:PROFILE at most"),
    (["--fleet", "arm64-6.1", "arm64-7.2", "--old-vmm", "knows:none"], "no host profile 'none'"),
    (["--fleet", "arm64-6.1", "arm64-7.2", "--policy", "x"], "a policy is one host's"),
    (["--fleet", "arm64-6.1", "arm64-7.2", "--host", "x"], "--host goes with a stream or contract"),
    (["--fleet", "arm64-6.1", "x86_64-7.2"], "no guest moves between them"),
    (["--fleet", "arm64-6.1", "arm64-7.2", "--vcpu-features", "wings"], "no vCPU feature 'wings'"),
    (["--matrix", "arm64-6.1", "arm64-7.2", "--vcpu-features", "el1_32bit"], "arm64-6.1: a fresh vCPU with EL1_32BIT"),
    (["--matrix", "arm64-6.1"], "name two hosts or more"), (["--matrix", "arm64-6.1", "none"], "no host profile"),
    (["--matrix", "arm64-6.1", "arm64-7.2", "--reverse"], "--reverse goes with a stream or contract"),
    (["--matrix", "arm64-6.1", "arm64-7.2", "--old-vmm", "x"], "--old-vmm goes with --fleet"),
    ([], "one of the three"), (["--matrix", "a", "b", "--fleet", "a", "b"], "one of the three"),
])
def test_misuse_is_one_clear_line(capsys: Capture, words: list[str], message: str) -> None:
    assert main(["check", *words]) == 64
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--old-vmm", "knows:x86_64-6.1"], "--old-vmm: knows:x86_64-6.1: a kernel of x86_64; the fleet is arm64"),
    (["--old-vmm", ""], "--old-vmm: says nothing"), (["--new-vmm", " , "], "--new-vmm: says nothing"),
])
def test_words_of_a_vmm_that_say_nothing_of_this_fleet(capsys: pytest.CaptureFixture[str], words: list[str],
                                                       message: str) -> None:
    assert main(["check", "--fleet", "arm64-6.12", "arm64-7.2", *words]) == 64
    assert message in capsys.readouterr().err
