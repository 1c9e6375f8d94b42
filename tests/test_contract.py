"""Contracts: from banks, as a file, in a stream, for people; and guests started under one."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream import cli
from migstream.backends import open_backend
from migstream.contract import BASELINE, DERIVED, Behaviour, Contract, from_json, to_json, to_plain
from migstream.errors import DocumentError, DocumentTooNew, DoesNotFit, UsageError
from migstream.model import Arch, Bank, Layout, Phase, Scope, Slot
from migstream.registers import arm64_ids, ids, x86_64
from migstream.survey import survey
from migstream.transport import apply_contract, capture_prologue, check_host, save
from tests import build
from tests.bless import good
from tests.strategies import behaviours

PSCI, STD = arm64_ids.firmware(0), arm64_ids.bitmap(0)
MPIDR, MIDR = arm64_ids.sysreg(3, 0, 0, 0, 5), arm64_ids.sysreg(3, 0, 0, 0, 0)
X0 = arm64_ids.core(0)


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


CONTRACT = Contract(Arch.ARM64, "Linux 5.10", "a CPU", 4, {MIDR: word(0x410FD0F0), PSCI: word(0x10000)}, (MPIDR,), {},
                    Behaviour("measured", {STD: word(0)}, {STD: "TRNG_VERSION: not supported"}, {build.TRNG: 2**64 - 1},
                              ("one thing",)))


def test_from_banks() -> None:
    vm = Layout(Scope.VM, Phase.FEATURE, (Slot(PSCI, 8), Slot(MIDR, 8)))
    vcpu = Layout(Scope.VCPU, Phase.FEATURE, (Slot(MPIDR, 8),))
    late = Layout(Scope.VCPU, Phase.STATE, (Slot(X0, 8),))
    banks = [Bank(vm, 0, build.matrix([[0x10001, 7]])), Bank(vcpu, 0, build.matrix([[0], [1]])),
             Bank(late, 0, build.matrix([[5], [6]])), Bank(vm, 0, build.matrix([[0x10000, 7]]), update=True)]
    behaviour = Behaviour("measured", {STD: word(0), PSCI: word(9)})
    found = Contract.of(Arch.ARM64, banks, kernel="k", vcpu_features=4, behaviour=behaviour)
    assert found.values == {MIDR: word(7), MPIDR: word(0), PSCI: word(0x10000)}
    assert found.varies == (MPIDR,)
    assert found.behaves_as == {STD: word(0)}  # a register that is there speaks for itself
    assert list(found.registers) == sorted((MIDR, MPIDR, PSCI, STD))


def test_a_value_that_differs_between_two_banks_of_one_layout() -> None:
    vcpu = Layout(Scope.VCPU, Phase.FEATURE, (Slot(MPIDR, 8), Slot(MIDR, 8)))
    banks = [Bank(vcpu, 0, build.matrix([[0, 3]])), Bank(vcpu, 1, build.matrix([[1, 3]]))]
    found = Contract.of(Arch.ARM64, banks)
    assert (found.varies, found.values[MPIDR]) == ((MPIDR,), word(0))
    assert found.behaviour.found == DERIVED and "no contract section" in found.behaviour.unknown[0]


def test_file_comes_back() -> None:
    whole = dataclasses.replace(CONTRACT, free={PSCI: 0xFFFF})
    assert from_json(to_json(whole)) == whole


@given(behaviours())
def test_file_of_any_behaviour_comes_back(behaviour: Behaviour) -> None:
    whole = Contract(Arch.X86_64, "k", "c", values={x86_64.TSC_KHZ.id: bytes(4)}, behaviour=behaviour)
    assert from_json(to_json(whole)) == whole


def changed(**fields: Any) -> str:
    """The file with some fields otherwise; None takes one out."""
    document = {**to_plain(CONTRACT), **fields}
    return json.dumps({key: value for key, value in document.items() if value is not None})


# text, what the error says.
BAD = (
    ("", "not JSON"), ("[]", "field 'migstream_contract' missing"), ("7", "field 'migstream_contract' missing"),
    (json.dumps({"migstream_host_profile": 2}), "field 'migstream_contract' missing (this is a host profile)"),
    (json.dumps({"migstream_json": 1}), "(this is the --json output of a command)"),
    (changed(migstream_contract=2), "field 'migstream_contract': contract version 2; this migstream reads 1"),
    (changed(migstream_contract="\x1b[2J"), "contract version '\\x1b[2J"),
    (changed(arch="riscv"), "field 'arch': \"no architecture 'riscv'; there are x86_64, arm64\""),
    (changed(arch="x86_64"), "field 'values': MIDR_EL1: register of another architecture than x86_64"),
    (changed(arch=None), "field 'arch' missing"), (changed(more=1), "unknown field 'more'"),
    (changed(kernel=5), "field 'kernel': expected text, found int"),
    (changed(vcpu_features=-1), "field 'vcpu_features': expected a number, found -1"),
    (changed(vcpu_features=True), "field 'vcpu_features': expected a number, found True"),
    (changed(values={"x": ""}), "field 'values'"), (changed(values={"0x1": 5}), "field 'values'"),
    (changed(values=[]), "field 'values'"),
    (changed(values={hex(PSCI): "00"}), "PSCI_VERSION: expected 8 bytes, found 1"),
    (changed(behaves_as={hex(STD): "zz"}), "field 'behaves_as'"),
    (changed(behaves_as={hex(ids.msr_id(1)): "00" * 8}), "field 'behaves_as': MSR"),
    (changed(found="guessed"), "field 'found': expected one of measured"), (changed(firmware={"0x1": 1}), "'firmware'"),
    (changed(unknown=[1]), "field 'unknown': expected text"), (changed(varies=[1]), "field 'varies'"),
    (changed(free={"0x1": "q"}), "field 'free'"), (changed(how={"0x1": 1}), "field 'how'"),
)


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_file_that_is_wrong_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises((DocumentError, UsageError)) as caught:
        from_json(text, "c.json")
    line = str(caught.value)
    assert line.startswith("c.json: ") and "\n" not in line and "\x1b" not in line
    assert message.replace('"', "") in line.replace('"', "")


_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                         st.sampled_from([hex(PSCI), hex(STD), "0x1", "x", "-0x1", "1_0"]), inner, max_size=3),
                     max_leaves=6)


@given(st.dictionaries(st.sampled_from([*to_plain(CONTRACT), "more"]), _json, max_size=3))
def test_any_fields_are_a_contract_or_our_error(fields: dict[str, Any]) -> None:
    """And what is taken comes back the same."""
    try:
        found = from_json(json.dumps({**to_plain(CONTRACT), **fields}), "c.json")
    except DocumentError as error:
        assert str(error).startswith("c.json: ") and "\n" not in str(error)
        return
    assert from_json(to_json(found)) == found


# In a stream.


def stream(tmp_path: Path, name: str) -> str:
    path = tmp_path / "v.mig"
    path.write_bytes(good.VECTORS[name].data)
    return str(path)


def test_survey_has_the_contract() -> None:
    contract = survey(io.BytesIO(good.VECTORS["contract"].data)).contract()
    assert contract is not None
    assert contract.behaviour.found == "measured"
    assert {id: value for id, value in contract.registers.items()} == {
        PSCI: word(0x10000), build.STD: word(0), build.STD_HYP: word(1)}


def test_inspect_shows_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", stream(tmp_path, "contract"), "--contract"]) == 0
    out = capsys.readouterr().out
    assert "PSCI=1.0" in out and "STD_HYP_BMAP" in out and "behaved as (TRNG_VERSION: not supported)" in out


def test_inspect_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", stream(tmp_path, "contract"), "--contract", "--json"]) == 0
    contract = json.loads(capsys.readouterr().out)["contract"]
    by_name = {row["name"]: row for row in contract["registers"]}
    assert by_name["STD_HYP_BMAP"]["behaved_as"] and by_name["STD_HYP_BMAP"]["bits"] == {"value": ["PV_TIME"]}
    registers = contract.pop("registers")
    assert len(registers) == 3 and from_json(json.dumps(contract)).arch == Arch.ARM64


def test_inspect_of_a_stream_without_the_section_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", stream(tmp_path, "arm64"), "--contract"]) == 0
    assert "derived: the stream has no contract section" in capsys.readouterr().out


@pytest.mark.parametrize("more", (["--vm"], ["--vcpu", "0"], ["--reg", "*"], ["--section", "0"]))
def test_contract_and_something_else_is_misuse(tmp_path: Path, more: list[str]) -> None:
    assert cli.main(["inspect", stream(tmp_path, "contract"), "--contract", *more]) == 64


# A guest under a contract, on a simulated kernel.


@pytest.fixture
def vm() -> Any:
    """A VM with vCPUs that have what a demo guest has."""
    from migstream.demo import guest_x86_64, run

    backend = open_backend("sim:x86_64-6.12")
    with backend.create(run.machine(Arch.X86_64, 2, 1 << 24)) as made:
        made.create_vcpus()
        guest_x86_64.install(made, backend.profile().cpuid, backend.profile().capabilities)
        yield made


def own_contract(vm: Any) -> Contract:
    prologue = capture_prologue(vm)
    return Contract.of(Arch.X86_64, prologue.banks, behaviour=prologue.behaviour)


@pytest.mark.sim
def test_a_save_carries_a_contract(vm: Any) -> None:
    out = io.BytesIO()
    save(vm, out, host=open_backend("sim:x86_64-6.12").summary(), pause=vm.pause)
    found = survey(io.BytesIO(out.getvalue()))
    assert found.error is None and found.reader.behaviour is not None
    assert found.reader.preamble is not None and found.reader.preamble.minor == 1
    contract = found.contract()
    assert contract is not None and x86_64.CPUID2.id in contract.varies


@pytest.mark.sim
def test_a_vm_fits_its_own_contract(vm: Any) -> None:
    contract = own_contract(vm)
    assert apply_contract(vm, contract) == len(
        [id for id in contract.registers if id not in contract.varies and ids.capability_number(id) is None])


@pytest.mark.sim
def test_a_register_is_written_and_read_back(vm: Any) -> None:
    index = ids.msr_id(0xCE)  # MSR_PLATFORM_INFO: VM-wide, may be written
    contract = own_contract(vm)
    wanted = dataclasses.replace(contract, values={**contract.values, index: word(0)})
    apply_contract(vm, wanted)
    assert own_contract(vm).values[index] == word(0)


@pytest.mark.sim
def test_what_is_free_stays_the_hosts(vm: Any) -> None:
    index = ids.msr_id(0xCE)
    contract = own_contract(vm)
    before = contract.values[index]
    other = word(int.from_bytes(before, "little") ^ 1 << 31)
    apply_contract(vm, dataclasses.replace(contract, values={**contract.values, index: other}, free={index: 1 << 31}))
    assert own_contract(vm).values[index] == before


@pytest.mark.sim
def test_what_this_kernel_can_not_be_is_refused_by_name(vm: Any) -> None:
    contract = own_contract(vm)
    behaviour = Behaviour(BASELINE, {ids.msr_id(0x345): word(1 << 63), ids.msr_id(0x9000_0000): word(0)})
    bad = dataclasses.replace(contract, values={id: v for id, v in contract.values.items() if id != ids.msr_id(0x345)},
                              behaviour=behaviour)
    with pytest.raises(DoesNotFit) as caught:
        apply_contract(vm, bad)
    reasons = "\n".join(caught.value.reasons)
    assert "MSR_IA32_PERF_CAPABILITIES: " in reasons and "KVM_SET_MSRS" in reasons
    assert "MSR_0x90000000: this kernel has none, and nobody knows what it behaves as" in reasons
    assert "no guest can be started under this contract here" in str(caught.value)


@pytest.mark.sim
def test_another_machine_than_the_contracts(vm: Any) -> None:
    with pytest.raises(UsageError, match="another architecture"):
        apply_contract(vm, CONTRACT)
    with pytest.raises(DoesNotFit, match="the contract is arm64, this host is x86_64"):
        check_host(CONTRACT, open_backend("sim:x86_64-6.12"))


@pytest.mark.sim
def test_demo_under_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    assert cli.main(["host", "baseline", "x86_64-6.1", "x86_64-6.12", "x86_64-7.2", "-o", str(path)]) == 0
    contract = from_json(path.read_text())
    assert contract.behaviour.found == BASELINE
    capsys.readouterr()
    for kernel in ("6.1", "6.12", "7.2"):
        assert cli.main(["demo", "--backend", f"sim:x86_64-{kernel}", "--vcpus", "2", "--memory", "16M", "--contract",
                         str(path), "--json", "--run", "0"]) == 0
        assert json.loads(capsys.readouterr().out)["pinned"] == len(contract.values)


@pytest.mark.sim
def test_demo_under_a_contract_that_the_host_can_not_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(to_json(CONTRACT))
    assert cli.main(["demo", "--backend", "sim:x86_64-6.12", "--contract", str(path)]) == 11
    assert "the contract is arm64" in capsys.readouterr().err
    assert cli.main(["demo", "--contract", str(tmp_path / "none")]) == 74
    path.write_bytes(b"\xff\xfe")
    assert cli.main(["demo", "--contract", str(path)]) == 1
    path.write_bytes(good.VECTORS["contract"].data)
    assert cli.main(["demo", "--contract", str(path)]) == 64
    assert "not a contract (this is a stream)" in capsys.readouterr().err


def _text(**more: object) -> str:
    """A contract file of one register, MIDR_EL1, with other fields."""
    fields = {"migstream_contract": 1, "arch": "arm64", "kernel": "", "cpu": "", "vcpu_features": 4,
              "values": {MIDR_ID: "11" * 8}, "varies": [], "free": {}, "found": "baseline", "behaves_as": {}, "how": {},
              "firmware": {}, "unknown": []}
    return json.dumps({**fields, **more})


MIDR_ID = "0x603000000013c000"
ISAR0_ID = "0x603000000013c030"


@pytest.mark.parametrize(("text", "message"), [
    (_text(behaves_as={MIDR_ID: "22" * 8}), "field 'behaves_as': MIDR_EL1: 'values' has another value of it"),
    (_text(free={ISAR0_ID: "0xf"}), "field 'free': ID_AA64ISAR0_EL1: neither in 'values' nor in 'behaves_as'"),
    (_text(how={ISAR0_ID: "x"}), "field 'how': ID_AA64ISAR0_EL1: neither in 'values' nor in 'behaves_as'"),
    (_text()[:-1] + ', "arch": "arm64"}', "field 'arch' is there twice"),
    (_text(values={MIDR_ID: "11" * 8, MIDR_ID.upper().replace("X", "x"): "11" * 8}), "is there twice"),
    (_text(values={MIDR_ID: "zz" * 8}), "expected two hexadecimal digits for each byte, found 'zzzz"),
    (_text(values={MIDR_ID: 5}), "expected two hexadecimal digits for each byte, found 5"),
    (_text(values={"no": "11"}), "expected a hexadecimal number, found 'no'"),
    (_text(values=[1]), "expected an object, found [1]"),
    (_text(varies={"a": 1}), "expected a list, found {'a': 1}"),
    (_text(free={MIDR_ID: "-0x1"}), "expected bits, found '-0x1'"),
    (_text(firmware={"0x1": "0x" + "f" * 17}), "expected a number of 64 bits"),
    ("\0" * 1000, "not JSON: line 1, column 1"),
    ("[" * 100_000, "nested too deep"),
    ("9" * 5000, "a number of too many digits"),
])
def test_what_a_file_says_amiss_is_said_in_our_words(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        from_json(text, "c.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["2", "1e999", "Infinity"])
def test_a_version_above_ours_is_too_new(version: str) -> None:
    with pytest.raises(DocumentTooNew):
        from_json(_text().replace('"migstream_contract": 1', f'"migstream_contract": {version}'))
