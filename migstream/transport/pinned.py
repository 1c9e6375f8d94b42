"""Starting a guest under a contract: written before the first run, read back, compared; refused by name otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from migstream.backends.base import Backend, Vm
from migstream.contract import Contract
from migstream.errors import BackendError, DoesNotFit, UsageError, errno_name
from migstream.model import Arch, Layout, Phase, Scope, Slot
from migstream.registers import arm64_ids, gic, ids, vcpu_features, x86_64
from migstream.registers.bit_tables import BITS
from migstream.registers.catalogue import lookup
from migstream.registers.cpuid import cpuid_words

_CPUID_OWN: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (1, 0): ((1, 0xFF00_0000), (2, 1 << 27), (3, 1 << 9)), (7, 0): ((2, 1 << 4),),
    (0xB, 0): ((3, 0xFFFF_FFFF),), (0xB, 1): ((3, 0xFFFF_FFFF),),
    (0x1F, 0): ((3, 0xFFFF_FFFF),), (0x1F, 1): ((3, 0xFFFF_FFFF),),
    (0xD, 0): ((1, 0xFFFF_FFFF),), (0xD, 1): ((1, 0xFFFF_FFFF),),
}
"""CPUID words of each vCPU's own, by leaf and subleaf: (EAX to EDX as 0 to 3, bits). The APIC id; and what KVM computes
from the vCPU's state: OSXSAVE, APIC, OSPKE, the size of the XSAVE area (kvm_update_cpuid_runtime)."""

_GICD_IIDR = ids.attribute_id(gic.GICV3, gic.DISTRIBUTOR, 8)
"""Of a machine with an interrupt controller; a contract is for machines without one, too."""

_TOLD = (ids.struct_id(Arch.ARM64, 1),)
"""KVM_ARM_VCPU_INIT: the machine's vCPU features, compared as such."""


def check_host(contract: Contract, backend: Backend) -> None:
    """Say what can be said before a VM is made. Raises: DoesNotFit."""
    profile = backend.profile()
    if contract.arch != profile.arch:
        raise DoesNotFit([f"the contract is {contract.arch.label}, this host is {profile.arch.label}"], _WHAT)
    missing = contract.vcpu_features & ~profile.vcpu_features if contract.arch == Arch.ARM64 else 0
    if missing:
        raise DoesNotFit([f"this kernel has no vCPU feature {', '.join(vcpu_features.names(missing))}"], _WHAT)


_WORDS = ("EAX", "EBX", "ECX", "EDX")
_WHAT = "no guest can be started under this contract here"


def apply_contract(vm: Vm, contract: Contract) -> int:
    """Make the VM's feature and identity registers what the contract says, and return how many were compared.

    Call it after `create_vcpus()` and before the first run; the machine has the contract's `vcpu_features`. VM-scoped
    registers are written once, the others for each vCPU, in the order of a restore; a value that the register has
    already is not written. A register that this kernel hasn't got is satisfied where it behaves as the contract says.

    Raises: DoesNotFit naming every register and field that this kernel shows otherwise; UsageError for a machine that
        the contract does not fit; BackendError.
    """
    features = vm.machine.devices.get("vcpu_features", vcpu_features.DEFAULT)
    if vm.machine.arch != contract.arch or (contract.arch == Arch.ARM64 and features != contract.vcpu_features):
        raise UsageError("the machine has another architecture, or other vCPU features, than the contract")
    wanted = {id: value for id, value in contract.registers.items()
              if id not in contract.varies and id not in _TOLD and ids.capability_number(id) is None
              and (id != _GICD_IIDR or "gic_distributor" in vm.machine.devices)}
    if (lengths := wanted.get(arm64_ids.SVE_VLS)) is not None:
        _write(vm, Layout(Scope.VCPU, Phase.FINALIZE, (Slot(arm64_ids.SVE_VLS, len(lengths)),)), [lengths])
    wrong, there, sees = [], set(), vm.behaviour().sees
    for layout in _parts(vm, wanted, sees):
        there |= {slot.id for slot in layout.slots} - sees.keys()
        wrong += _pin(vm, layout, wanted, contract.free)
    wrong += _absent(vm, {id: value for id, value in wanted.items() if id not in there}, contract.free)
    if wrong:
        raise DoesNotFit(wrong, _WHAT)
    return len(wanted)


def _parts(vm: Vm, wanted: Mapping[int, bytes], sees: Mapping[int, bytes]) -> Iterator[Layout]:
    """The contract's part of each of the VM's layouts, in restore order; not what a guest reads otherwise anyway."""
    for layout in vm.layouts()[0]:
        if slots := tuple(slot for slot in layout.slots if slot.id in wanted and slot.id not in sees):
            yield Layout(layout.scope, layout.phase, slots)


def _pin(vm: Vm, layout: Layout, wanted: Mapping[int, bytes], free: Mapping[int, int]) -> list[str]:
    """Write what differs, a register at a time (one refusal must not hide the rest), then read back and compare."""
    wrong = []
    for slot in layout.slots:
        alone = Layout(layout.scope, layout.phase, (slot,))
        row, value = lookup(slot.id), wanted[slot.id]
        if not (len(value) <= slot.size if slot.id == x86_64.CPUID2.id else len(value) == slot.size):
            wrong.append(f"{row.name}: {len(value)} bytes in the contract, {slot.size} here")
            continue
        before = _read(vm, alone)
        targets = [_with_free(slot.id, value, has, free.get(slot.id, 0)) for has in before]
        refused = _write(vm, alone, targets) if targets != before and slot.id != arm64_ids.SVE_VLS else ""
        after = _read(vm, alone)
        if different := [(want, has) for want, has in zip(targets, after, strict=True) if want != has]:
            want, has = different[0]
            wrong.append(f"{row.name}: {_words(slot.id, want, has)}{f'; {refused}' if refused else ''}")
    return wrong


def _with_free(id: int, value: bytes, has: bytes, mask: int) -> bytes:
    """The contract's value, with what is not pinned (and each vCPU's own) as the host has it."""
    if id == x86_64.CPUID2.id:
        return _own_cpuid(value, has)
    if not mask:
        return value
    number = int.from_bytes(value, "little") & ~mask | int.from_bytes(has, "little") & mask
    return number.to_bytes(len(value), "little")


def _own_cpuid(value: bytes, has: bytes) -> bytes:
    """The contract's entries with this vCPU's APIC id, as long as the register here: the rest is zero."""
    import struct

    own = {struct.unpack_from("<2I", has, at): at for at in range(8, len(has) - 39, 40)}
    out = bytearray(value)
    for at in range(8, len(out) - 39, 40):
        key = struct.unpack_from("<2I", out, at)
        for word, mask in _CPUID_OWN.get(key, ()):
            if key in own:
                theirs = struct.unpack_from("<I", has, own[key] + 12 + 4 * word)[0]
                ours = struct.unpack_from("<I", out, at + 12 + 4 * word)[0]
                struct.pack_into("<I", out, at + 12 + 4 * word, ours & ~mask | theirs & mask)
    return bytes(out[:len(has)].ljust(len(has), b"\0"))


def _words(id: int, want: bytes, has: bytes) -> str:
    """Only what differs, by field."""
    if id == x86_64.CPUID2.id:
        return _cpuid_words(want, has)
    if len(want) > 8:
        return "other bytes than the contract's"
    wanted, found = int.from_bytes(want, "little"), int.from_bytes(has, "little")
    fields = [f for f in BITS.get(lookup(id).bits, ()) if (wanted ^ found) & f.mask]
    named = [f"{f.show(wanted) or f.name + '=0'}, here {f.show(found) or f.name + '=0'}" for f in fields]
    return ", ".join(named) or f"{wanted:#x}, here {found:#x}"


def _cpuid_words(want: bytes, has: bytes) -> str:
    wanted, found = cpuid_words(want), cpuid_words(has)
    differ = [f"{leaf:#x}.{subleaf} {_WORDS[n]} {value:#x}, here {found.get((leaf, subleaf, n), 0):#x}"
              for (leaf, subleaf, n), value in wanted.items() if found.get((leaf, subleaf, n), 0) != value]
    return ", ".join(differ) or "other entries than the contract's"


def _absent(vm: Vm, wanted: Mapping[int, bytes], free: Mapping[int, int]) -> list[str]:
    """Registers that this kernel hasn't got, or a guest doesn't meet: whether it is as the contract says all the same.
    """
    behaviour = vm.behaviour() if wanted else None
    wrong = []
    for id, value in wanted.items():
        assert behaviour is not None
        has = behaviour.sees.get(id) or behaviour.behaves_as.get(id, bytes(8) if _reads_0(id) else None)
        if has is None:
            why = "; ".join(behaviour.unknown) or "nobody knows what it behaves as"
            wrong.append(f"{lookup(id).name}: this kernel has none, and {why}")
        elif (int.from_bytes(value, "little") ^ int.from_bytes(has, "little")) & ~free.get(id, 0):
            how = behaviour.how.get(id, "")
            wrong.append(f"{lookup(id).name}: {_words(id, value, has)}: this kernel can't change it, and behaves "
                         f"so{f' ({how})' if how else ''}")
    return wrong


def _reads_0(id: int) -> bool:
    """A register of arm64's ID space that a kernel hides reads 0 (ID_AA64ZFR0_EL1 without SVE)."""
    first, last = arm64_ids.sysreg(3, 0, 0, 1, 0), arm64_ids.sysreg(3, 0, 0, 7, 7)
    return first <= id <= last


def _read(vm: Vm, layout: Layout) -> list[bytes]:
    """The one register of each row. Raises: BackendError."""
    import numpy as np

    rows = vm.machine.vcpus if layout.scope == Scope.VCPU else 1
    matrix = np.zeros((rows, layout.row_words), np.uint64)
    for refusal in vm.read(layout, 0, matrix):
        raise BackendError(refusal.operation, errno=max(refusal.errno, 0), vcpu=refusal.vcpu, what=str(refusal))
    return [row.tobytes()[:layout.slots[0].size] for row in matrix]


def _write(vm: Vm, layout: Layout, values: list[bytes]) -> str:
    """Write one register of each row; the first refusal in words, "" where there is none."""
    import numpy as np

    rows = vm.machine.vcpus if layout.scope == Scope.VCPU else 1
    packed = b"".join(value.ljust(layout.row_words * 8, b"\0") for value in (values * rows)[:rows])
    refused = vm.write(layout, 0, np.frombuffer(packed, np.uint64).reshape(rows, -1).copy())
    return f"{refused[0].operation}: {errno_name(refused[0].errno)}" if refused else ""
