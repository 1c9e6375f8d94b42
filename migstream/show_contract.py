"""A contract for people and for JSON: what a guest was promised, by name and field. No file, no terminal."""

from __future__ import annotations

from typing import Any

from migstream.contract import DERIVED, Contract, to_plain
from migstream.describe import fields
from migstream.host.baseline import Baseline
from migstream.model import Arch, Slot
from migstream.registers import vcpu_features, x86_64
from migstream.registers.catalogue import lookup
from migstream.registers.cpuid import cpuid_words
from migstream.registers.firmware_arm64 import CALL_NAMES, words
from migstream.show import Table, count

_NUMBER_BYTES = 8


def head(contract: Contract) -> list[tuple[str, str]]:
    """Whose it is, and how it was found."""
    pairs = [("contract", f"{contract.arch.label} guest of {contract.kernel or 'no one kernel'}"
              + (f", {contract.cpu}" if contract.cpu else ""))]
    if contract.arch == Arch.ARM64:
        pairs.append(("vCPU features", ", ".join(vcpu_features.names(contract.vcpu_features)) or "none"))
    found = contract.behaviour.found
    pairs.append(("found", f"{found}: the stream has no contract section" if found == DERIVED else found))
    return pairs + [("not known" if k == 0 else "", line) for k, line in enumerate(contract.behaviour.unknown)]


def table(contract: Contract) -> Table:
    """One row a register that is not 0; what it says by field; registers that no bank carries say `behaved as`."""
    rows = []
    for id, value in contract.registers.items():
        if any(value) or id in contract.behaves_as:
            rows.append((lookup(id).name, _value(value), _where(contract, id), says(id, value)))
    return Table(("register", ">value", "from", "says"), rows)


def zeros(contract: Contract) -> int:
    """Registers that read 0 and are left out of the table."""
    return sum(not any(value) and id not in contract.behaves_as for id, value in contract.registers.items())


def _where(contract: Contract, id: int) -> str:
    if contract.behaviour.sees.get(id, contract.values.get(id)) != contract.values.get(id):
        return f"as the guest reads it; KVM says {_value(contract.values[id])}"
    if id in contract.behaves_as:
        return f"behaved as ({contract.behaviour.how.get(id, 'no register')})"
    return "vCPU 0; others differ" if id in contract.varies else ""


def _value(value: bytes) -> str:
    return f"{int.from_bytes(value, 'little'):#x}" if len(value) <= _NUMBER_BYTES else f"{len(value)} bytes"


def says(id: int, value: bytes) -> str:
    """What is set in a value, in words; "" where it is a plain number."""
    if id == x86_64.CPUID2.id:
        return _cpuid(value)
    shown = [field for field in fields(Slot(id, len(value)), value) if not field.filler]
    named = [f"{field.path}: {', '.join(field.bits)}" if field.path else ", ".join(field.bits)
             for field in shown if field.bits]
    return "; ".join(named)


def _cpuid(value: bytes) -> str:
    """Entries, and XSAVE components (leaf 0xD, subleaf 0: EAX, EDX) by name."""
    from migstream.registers.bit_tables import decode

    entries = cpuid_words(value)
    components = entries.get((0xD, 0, 0), 0) | entries.get((0xD, 0, 3), 0) << 32
    return f"{len(entries) // 4} entries; XSAVE: {', '.join(decode('XCR0', components)) or 'none'}"


def calls(contract: Contract) -> Table:
    """arm64: what the saving kernel answers a guest of a VM with nothing set."""
    rows = [(CALL_NAMES.get(key, f"{key >> 32:#x}({key & 0xFFFF_FFFF:#x})"), words(x0))
            for key, x0 in contract.behaviour.firmware.items() if key not in contract.behaviour.sees]
    return Table(("firmware call of a VM with nothing set", "answer"), rows)


def document(contract: Contract) -> dict[str, Any]:
    """For machines: the contract as in its file, and each register by name with its fields and bits."""
    return {**to_plain(contract), "registers": [_register(contract, id, value)
                                                for id, value in contract.registers.items()]}


def _register(contract: Contract, id: int, value: bytes) -> dict[str, Any]:
    shown = fields(Slot(id, len(value)), value)
    return {"name": lookup(id).name, "id": f"{id:#018x}", "class": str(lookup(id).klass), "value": value.hex(),
            "behaved_as": id in contract.behaves_as, "how": contract.behaviour.how.get(id, ""),
            "varies": id in contract.varies,
            "fields": {f.path or "value": f.value.hex() if isinstance(f.value, bytes) else f.value for f in shown},
            "bits": {f.path or "value": list(f.bits) for f in shown if f.bits}}


# baseline


def baseline_pairs(found: Baseline, output: str | None) -> list[tuple[str, str]]:
    """The result, what no value would do for, and what is not in it."""
    pinned = len(found.contract.values)
    result = "no contract that all of these hosts accept" if found.refusals else \
        f"{count(pinned, 'register')} pinned, for a guest that may go to each of these hosts and back"
    pairs = [("baseline", result + (f", in {output}" if output and not found.refusals else ""))]
    if found.contract.arch == Arch.ARM64:
        pairs.append(("vCPU features", ", ".join(vcpu_features.names(found.contract.vcpu_features))))
    pairs += [("stands in the way" if k == 0 else "", line) for k, line in enumerate(found.refusals)]
    pairs += [("note" if k == 0 else "", line) for k, line in enumerate(found.notes)]
    return pairs + [("not pinned" if k == 0 else "", line) for k, line in enumerate(found.left_out)]


def losses(found: Baseline) -> Table:
    """What each host gives up."""
    rows = [(loss.host, loss.name, loss.has, loss.gets) for loss in found.losses]
    return Table(("host", "gives up", "has", "gets"), rows)


def baseline_document(found: Baseline) -> dict[str, Any]:
    """For machines."""
    return {"contract": None if found.refusals else to_plain(found.contract), "refusals": list(found.refusals),
            "losses": [{"host": loss.host, "name": loss.name, "has": loss.has, "gets": loss.gets}
                       for loss in found.losses], "left_out": list(found.left_out),
            "notes": list(found.notes)}
