"""What a guest was promised: every register of class *feature* or *identity*, by id, with its value. Pure; no I/O.

A contract has two halves. `values` are registers that the saving kernel had: a stream's prologue banks hold them, so
they are derived from there and stored once. `behaves_as` are feature registers that the saving kernel did *not* have,
with the value that it behaved as all the same: no bank can say that, so a stream carries it in a section of its own
(formats/SPEC.md, `CNTR`). A register of either half is pinned for the guest's life: wherever the guest goes, the
register has this value there, or it is absent and the kernel behaves as this value.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from migstream import filekind
from migstream.errors import Corrupt, DocumentError, DocumentLimit, UsageError, printable
from migstream.limits import MAX_CONTRACT
from migstream.model import Arch, Bank, Klass
from migstream.registers import ids
from migstream.registers.catalogue import fits_arch, lookup

CONTRACT_VERSION = 1

MEASURED = "measured"
"""A scratch guest asked the saving kernel."""

RECORDED = "recorded"
"""From a recorded host profile of this kernel and CPU, whose capture had a scratch guest ask."""

DERIVED = "derived"
"""From registers alone, nobody having asked the kernel: what it behaved as where it has no register isn't known."""

BASELINE = "baseline"
"""Made by `migstream host baseline` for several hosts: it is what a guest is to be started with."""

FOUND = (MEASURED, RECORDED, DERIVED, BASELINE)
PINNED = (Klass.FEATURE, Klass.IDENTITY)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Behaviour:
    """What only the saving side knows of its kernel: the part of a contract that is a section of its own.

    Attributes:
        found: one of `FOUND`: how it was learnt.
        behaves_as: by id of a register that the kernel did not have: the value it behaved as, as wide as the register.
        how: by the same ids: which question had which answer, for people.
        firmware: arm64: what a scratch guest was told: X0 after HVC, by `registers.firmware_arm64.Call.key`; and by
            register id, what it read by MRS where the kernel shows a guest another value than KVM_GET_ONE_REG gives.
        unknown: one line for each thing that could not be found out, by name.
    """

    found: str = DERIVED
    behaves_as: Mapping[int, bytes] = field(default_factory=dict)
    how: Mapping[int, str] = field(default_factory=dict)
    firmware: Mapping[int, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @cached_property
    def sees(self) -> dict[int, bytes]:
        """Registers that the kernel has and shows a guest otherwise, with what the guest reads (CTR_EL0 to 6.1)."""
        return {key: value.to_bytes(8, "little") for key, value in self.firmware.items()
                if ids.arch_of(key) == Arch.ARM64 and key >> 56 != ids.OURS}


@dataclass(frozen=True)
class Contract:
    """Feature and identity registers of one guest.

    Attributes:
        arch: architecture. kernel, cpu: whose it was, for people.
        vcpu_features: arm64: as KVM_ARM_VCPU_INIT took them; 0 on x86-64.
        values: by id: little-endian value of vCPU 0 (or the VM). On x86-64 CPUID, TSC frequency, MSRs, enabled
            capabilities too, under their ids.
        free: by id of `values`: bits that are not pinned, because whoever made the contract said so.
        varies: ids of `values` that are not the same on all vCPUs (MPIDR_EL1, CPUID with its APIC ids), ascending.
        behaviour: the other half.
    """

    arch: Arch
    kernel: str
    cpu: str
    vcpu_features: int = 0
    values: Mapping[int, bytes] = field(default_factory=dict)
    varies: tuple[int, ...] = ()
    free: Mapping[int, int] = field(default_factory=dict)
    behaviour: Behaviour = field(default_factory=Behaviour)

    @property
    def behaves_as(self) -> Mapping[int, bytes]:
        """Registers that the saving kernel did not have, with the value that it behaved as."""
        return self.behaviour.behaves_as

    @property
    def registers(self) -> dict[int, bytes]:
        """Both halves: what the guest has met, by id, ascending; as it read a register, where that is another value."""
        read = {id: value for id, value in self.behaviour.sees.items() if id in self.values}
        return dict(sorted({**self.behaves_as, **self.values, **read}.items()))

    @classmethod
    def of(cls, arch: Arch, banks: Iterable[Bank], *, kernel: str = "", cpu: str = "", vcpu_features: int = 0,
           behaviour: Behaviour | None = None) -> Contract:
        """Return the contract of a saved guest.

        Args:
            banks: the stream's prologue banks, decoded (others have nothing that is pinned, and may be there too); an
                update bank after the bank that it updates.
            behaviour: from the stream's contract section; without one the result says `DERIVED`.
        """
        seen: dict[int, bytes] = {}
        varies: set[int] = set()
        for bank in banks:
            for column, slot in enumerate(bank.layout.slots):
                if lookup(slot.id).klass not in PINNED:
                    continue
                value = bank.raw(0, column)
                if _differs(bank, column) or (not bank.update and seen.get(slot.id, value) != value):
                    varies.add(slot.id)
                if bank.first_vcpu == 0:
                    seen[slot.id] = value
        return cls(arch, kernel, cpu, vcpu_features, dict(sorted(seen.items())), tuple(sorted(varies)),
                   behaviour=_only_absent(behaviour or Behaviour(unknown=(_NOBODY_ASKED,)), seen))


_NOBODY_ASKED = "what the saving kernel behaved as where it had no register: the stream has no contract section"


def _only_absent(behaviour: Behaviour, seen: Mapping[int, bytes]) -> Behaviour:
    """A register that is there speaks for itself."""
    return replace(behaviour, behaves_as={id: v for id, v in behaviour.behaves_as.items() if id not in seen})


def _differs(bank: Bank, column: int) -> bool:
    start, end = bank.layout.offsets[column:column + 2]
    return bool((bank.values[:, start:end] != bank.values[0, start:end]).any())


# As JSON: a file of its own, and what `--json` shows.


def to_plain(contract: Contract) -> dict[str, Any]:
    """Return the object that a contract file holds: ids as hexadecimal keys, values as hexadecimal digits."""
    behaviour = contract.behaviour
    return {
        "migstream_contract": CONTRACT_VERSION, "arch": contract.arch.label, "kernel": contract.kernel,
        "cpu": contract.cpu, "vcpu_features": contract.vcpu_features, "values": _hex_map(contract.values),
        "varies": [f"{id:#x}" for id in contract.varies],
        "free": {f"{id:#x}": f"{mask:#x}" for id, mask in sorted(contract.free.items())}, "found": behaviour.found,
        "behaves_as": _hex_map(behaviour.behaves_as), "how": {f"{id:#x}": text for id, text in behaviour.how.items()},
        "firmware": {f"{key:#x}": f"{answer:#x}" for key, answer in sorted(behaviour.firmware.items())},
        "unknown": list(behaviour.unknown),
    }


def _hex_map(values: Mapping[int, bytes]) -> dict[str, str]:
    return {f"{id:#x}": value.hex() for id, value in sorted(values.items())}


def to_json(contract: Contract) -> str:
    """Return a contract file's text."""
    return json.dumps(to_plain(contract), indent=1) + "\n"


def from_json(text: str, name: str = "contract") -> Contract:
    """Return the contract in a file's text.

    Raises: UsageError for another kind of file of ours; DocumentError naming `name` and the field: no JSON, a version
    that is not read, a field that is missing, unknown or wrong; DocumentTooNew; DocumentLimit.
    """
    if len(text) > MAX_CONTRACT:
        raise DocumentLimit(f"{name}: not a contract: over {MAX_CONTRACT} bytes")
    data = _json(text, name)
    if not isinstance(data, dict) or "migstream_contract" not in data:
        kind = filekind.of_object(data)
        wrong = UsageError if kind else DocumentError
        raise wrong(f"{name}: not a contract: field 'migstream_contract' missing{kind}")
    filekind.check_version(name, "contract", data["migstream_contract"], CONTRACT_VERSION)
    fields = {key: _field(name, data, key, read) for key, read in _READERS.items()}
    if unknown := sorted(map(str, data.keys() - _READERS.keys() - {"migstream_contract"})):
        raise DocumentError(f"{name}: not a contract: unknown field {printable(repr(unknown[0]))}")
    behaviour = Behaviour(*(fields.pop(key) for key in ("found", "behaves_as", "how", "firmware", "unknown")))
    return _checked(name, Contract(**fields, behaviour=behaviour))


class _Twice(Exception):
    """A key is in an object twice."""


def _json(text: str, name: str) -> Any:
    """Raises: DocumentError."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _Twice as twice:
        raise DocumentError(f"{name}: not a contract: field {printable(repr(str(twice)))} is there twice") from None
    except json.JSONDecodeError as error:
        raise DocumentError(f"{name}: not a contract: not JSON: line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise DocumentError(f"{name}: not a contract: not JSON: nested too deep") from error
    except ValueError as error:
        raise DocumentError(f"{name}: not a contract: not JSON: a number of too many digits") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


def _field(name: str, data: dict[str, Any], key: str, read: Callable[[Any], Any]) -> Any:
    if key not in data:
        raise DocumentError(f"{name}: not a contract: field {key!r} missing")
    try:
        return read(data[key])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DocumentError(f"{name}: not a contract: field {key!r}: {printable(error)}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise TypeError(f"expected a number, found {value!r}")
    return value


def _arch(value: Any) -> Arch:
    labels = {arch.label: arch for arch in Arch}
    if value not in labels:
        raise ValueError(f"no architecture {value!r}; there are {', '.join(labels)}")
    return labels[value]


def _found(value: Any) -> str:
    if value not in FOUND:
        raise ValueError(f"expected one of {', '.join(FOUND)}, found {value!r}")
    return str(value)


_HEX = re.compile(r"(0[xX])?[0-9a-fA-F]+")


def _hex(text: Any) -> int:
    if not isinstance(text, str) or not _HEX.fullmatch(text.removeprefix("-")):
        raise ValueError(f"expected a hexadecimal number, found {_short(text)}")
    return int(text, 16)


def _short(value: Any) -> str:
    """What was found, for one line of an error."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_SHOWN = 40


def _register_id(text: Any) -> int:
    number = _hex(text)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"no register id: {_short(text).strip(chr(39))}")
    return number


def _word(text: Any) -> int:
    number = _hex(text)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"expected a number of 64 bits, found {_short(text)}")
    return number


def _mask(text: Any) -> int:
    if (number := _hex(text)) < 0:
        raise ValueError(f"expected bits, found {_short(text)}")
    return number


def _raw(digits: Any) -> bytes:
    if not isinstance(digits, str) or len(digits) % 2 or digits.strip(string.hexdigits):
        raise ValueError(f"expected two hexadecimal digits for each byte, found {_short(digits)}")
    return bytes.fromhex(digits)


def _by_id(found: Any, read: Callable[[Any], _T]) -> dict[int, _T]:
    """An object whose keys are ids, each once however it is spelled."""
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, found {_short(found)}")
    out: dict[int, _T] = {}
    for key, value in found.items():
        if (id := _register_id(key)) in out:
            raise ValueError(f"{key} is there twice")
        out[id] = read(value)
    return out


def _list(found: Any, read: Callable[[Any], _T]) -> tuple[_T, ...]:
    if not isinstance(found, list):
        raise TypeError(f"expected a list, found {_short(found)}")
    return tuple(map(read, found))


_READERS: dict[str, Callable[[Any], Any]] = {
    "arch": _arch, "kernel": _text, "cpu": _text, "vcpu_features": _number,
    "values": lambda v: _by_id(v, _raw),
    "varies": lambda v: _list(v, _register_id),
    "free": lambda v: _by_id(v, _mask),
    "found": _found,
    "behaves_as": lambda v: _by_id(v, _raw),
    "how": lambda v: _by_id(v, _text),
    "firmware": lambda v: _by_id(v, _word),
    "unknown": lambda v: _list(v, _text),
}


def _checked(name: str, contract: Contract) -> Contract:
    """Raises: DocumentError for no register at all, one of another architecture, or a value of another size."""
    if not contract.values:
        raise DocumentError(f"{name}: field 'values': is empty: it promises nothing that could be judged")
    for where, values in (("values", contract.values), ("behaves_as", contract.behaves_as)):
        for id, value in values.items():
            if why := wrong_register(id, value, contract.arch):
                raise DocumentError(f"{name}: field {where!r}: {lookup(id).name}: {why}")
    for id, value in contract.behaves_as.items():
        if contract.values.get(id, value) != value:
            raise DocumentError(f"{name}: field 'behaves_as': {lookup(id).name}: 'values' has another value of it")
    for where, ids_of in (("free", contract.free.keys()), ("how", contract.behaviour.how.keys())):
        if stray := sorted(ids_of - contract.values.keys() - contract.behaves_as.keys()):
            raise DocumentError(f"{name}: field {where!r}: {lookup(stray[0]).name}: neither in 'values' nor in "
                                "'behaves_as'")
    return contract


def wrong_register(id: int, value: bytes, arch: Arch) -> str:
    """Why a register can't be in a contract of this architecture; "" where it can."""
    if not fits_arch(id, arch):
        return f"register of another architecture than {arch.label}"
    size = ids.size_in_id(id) or lookup(id).size
    return "" if size in (None, len(value)) else f"expected {size} bytes, found {len(value)}"


# As plain msgpack types: the payload of the stream's contract section. Its map keys are text, so pairs are lists.

SECTION_FIELDS: dict[str, type] = {"found": str, "behaves_as": list, "firmware": list, "unknown": list}


def behaviour_to_section(behaviour: Behaviour) -> dict[str, Any]:
    """Return the section's fields."""
    return {
        "found": behaviour.found, "unknown": list(behaviour.unknown),
        "behaves_as": [[id, value, behaviour.how.get(id, "")] for id, value in sorted(behaviour.behaves_as.items())],
        "firmware": [[key, answer] for key, answer in sorted(behaviour.firmware.items())],
    }


def behaviour_from_section(fields: Mapping[str, Any]) -> Behaviour:
    """Return what a section's fields say; types of the outer fields have been checked. Raises: Corrupt."""
    if fields["found"] not in FOUND:
        raise Corrupt("no such way to find a contract", field="found", expected=" | ".join(FOUND),
                      found=fields["found"])
    rows = [_typed(row, (int, bytes, str), "behaves_as") for row in fields["behaves_as"]]
    answers = [_typed(row, (int, int), "firmware") for row in fields["firmware"]]
    _ascending([row[0] for row in rows], "behaves_as")
    _ascending([row[0] for row in answers], "firmware")
    if any(type(line) is not str for line in fields["unknown"]):
        raise Corrupt("wrong type", field="unknown", expected="list of str")
    return Behaviour(fields["found"], {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows if row[2]},
                     {row[0]: row[1] for row in answers}, tuple(fields["unknown"]))


def check_behaviour(behaviour: Behaviour, arch: Arch) -> None:
    """Raises: Corrupt for a register of another architecture, or a value of another size than its register."""
    for id, value in behaviour.behaves_as.items():
        if why := wrong_register(id, value, arch):
            raise Corrupt(why, field=f"behaves_as {lookup(id).name}")


def _typed(row: Any, kinds: tuple[type, ...], name: str) -> list[Any]:
    if type(row) is not list or [type(item) for item in row] != list(kinds):
        raise Corrupt("wrong type", field=name, expected=f"[{', '.join(kind.__name__ for kind in kinds)}]",
                      found=row)
    if any(type(item) is int and not 0 <= item < 1 << 64 for item in row):
        raise Corrupt("number out of range", field=name, found=row)
    return row


def _ascending(numbers: list[int], name: str) -> None:
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise Corrupt("must be ascending, each once", field=name)
