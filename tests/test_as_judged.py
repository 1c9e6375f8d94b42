"""`check` says what `replay --readback` then finds: pairs of which a trial found that they did not agree."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

from migstream.backends.sim import SimBackend
from migstream.cli import main
from migstream.host import profiles
from migstream.registers import x86_64
from migstream.registers.catalogue import running
from tests.contract.arm64 import by_name, create, read, write_errnos

Capture = pytest.CaptureFixture[str]
XCR0_AT = 464
"""Of the legacy area: the first of xstate_fx_sw_bytes."""


@pytest.mark.sim
@pytest.mark.parametrize(("a", "b"), list(permutations(("x86_64-6.12", "x86_64-6.18-pvm"), 2)))
def test_xsaves_bytes_for_software_are_no_loss(capsys: Capture, tmp_path: Path, a: str, b: str) -> None:
    """Two hosts of other XCR0, under a contract that both keep; what is left a policy tolerates."""
    area = [profiles.load(name).defaults[x86_64.XSAVE.id] for name in (a, b)]
    assert area[0][XCR0_AT:XCR0_AT + 8] != area[1][XCR0_AT:XCR0_AT + 8]
    contract, stream, policy = tmp_path / "c.json", tmp_path / "v.mig", tmp_path / "p.toml"
    assert main(["host", "baseline", a, b, "-o", str(contract)]) in (0, 11)
    start = ["--contract", str(contract)] if contract.exists() else []
    assert main(["demo", "--backend", f"sim:{a}", "--vcpus", "1", "--memory", "4M", "-o", str(stream), *start]) == 0
    capsys.readouterr()
    main(["check", str(stream), "--host", b, "--json", "--all"])
    answer = json.loads(capsys.readouterr().out)["hosts"][b]
    bad = [v["register"] for v in answer["verdicts"] if v["answer"] in ("refused", "noticed")]
    policy.write_text('migstream_policy = 1\n[[tolerate]]\nreason = "x"\nguest_notices = true\nregister = '
                      f'{json.dumps([*bad, "KVM_CPUID2"])}\n')
    assert main(["replay", str(stream), "--backend", f"sim:{b}", "--readback", "--json", "--policy",
                 str(policy)]) in (0, 10), capsys.readouterr()
    report = json.loads(capsys.readouterr().out)
    (xsave,) = [d for d in report["readback"]["differs"] if d["register"] == "KVM_XSAVE"]
    assert "bytes 464 to 511" in xsave["reason"]


def test_nothing_but_software_bytes_of_xsave_may_differ() -> None:
    known = running(x86_64.XSAVE.id)
    assert known is not None and known.spans == ((464 * 8, 48 * 8),)


@pytest.mark.parametrize("name", ["arm64-6.1", "arm64-6.12", "arm64-7.2"])
def test_a_redistributor_shows_ces_and_ir_from_revision_3_on(name: str) -> None:
    """vgic_mmio_read_v3r_ctlr()."""
    with create(SimBackend(name), 1) as vm:
        places = by_name(vm)
        iidr, ctlr = places["GICD_IIDR"], places["GICR_CTLR"]
        (own,) = read(vm, iidr)
        for revision, shown in ((2, 0), (3, 6)):
            word = int.from_bytes(own, "little") & ~0xF000 | revision << 12
            assert write_errnos(vm, iidr, [word.to_bytes(4, "little")]) == []
            assert [int.from_bytes(value, "little") & 6 for value in read(vm, ctlr)] == [shown]


@pytest.mark.sim
def test_a_guest_of_revision_2_fits_with_loss_on_both_ways(capsys: Capture, tmp_path: Path) -> None:
    stream, policy = tmp_path / "v.mig", tmp_path / "p.toml"
    policy.write_text('migstream_policy = 1\n[[tolerate]]\nreason = "x"\nguest_notices = true\n'
                      'register = ["ID_*DFR0_EL1", "SMCCC_ARCH_WORKAROUND_3"]\n')
    assert main(["demo", "--backend", "sim:arm64-5.10", "--vcpus", "1", "--memory", "4M", "-o", str(stream)]) == 0
    words = ["--policy", str(policy)]
    assert main(["check", str(stream), "--host", "arm64-7.2", *words]) == 10, capsys.readouterr()
    assert main(["replay", str(stream), "--backend", "sim:arm64-7.2", "--readback", *words]) == 10, capsys.readouterr()
