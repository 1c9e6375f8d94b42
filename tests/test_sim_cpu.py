"""The simulator's interpreter: known answers, every addressing form, and random code beside a real CPU."""

from __future__ import annotations

import random
import struct
import time

import pytest

from migstream.backends.base import Backend, GuestMemory, Vm
from migstream.backends.kvm import KvmBackend
from migstream.backends.sim import SimBackend
from migstream.backends.sim.cpu_x86_64 import AF, CF, OF, PF, SF, ZF, CodeCache, Cpu
from migstream.backends.sim.mmu import ACCESSED, DIRTY, LARGE, Exit, Mmu
from migstream.demo import guest_x86_64 as guest
from migstream.model import MemoryRegion
from migstream.registers import x86_64
from tests.contract.access import create, patched, read, write

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9 = range(10)
FLAGS = CF | PF | AF | ZF | SF | OF
TOP = 1 << 63
ALL = (1 << 64) - 1
ROOT, NEXT, LAST, TABLE, CODE, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0x9000
WRITABLE = 0b11


def memory(size: int = 0x40000) -> GuestMemory:
    """RAM with page tables: the first 2 MiB by 4 KiB pages, the rest of the first GiB large, the second GiB huge."""
    ram = GuestMemory([(MemoryRegion(0, size), memoryview(bytearray(size)))])
    tables = {ROOT: {0: NEXT | WRITABLE}, NEXT: {0: LAST | WRITABLE, 1: 0 | WRITABLE | LARGE},
              LAST: {0: TABLE | WRITABLE, 1: 0 | WRITABLE | LARGE},
              TABLE: {n: n << 12 | WRITABLE for n in range(0x40) if n != 0x30} | {0x50: 0x5000 | 1}}
    for table, entries in tables.items():
        for n, entry in entries.items():
            ram.view(table + 8 * n, 8)[:] = struct.pack("<Q", entry)
    return ram


def cpu(code: bytes, ram: GuestMemory | None = None, **registers: int) -> Cpu:
    ram = ram or memory()
    ram.view(CODE, len(code))[:] = code
    values = [0] * 16
    for name, value in registers.items():
        values[globals()[name.upper()]] = value
    return Cpu(values, CODE, 2, Mmu(ram, 0x8001_0033, ROOT), CodeCache())


def after(code: str, steps: int = 1, **registers: int) -> Cpu:
    made = cpu(bytes.fromhex(code), None, **registers)
    made.run(steps)
    return made


@pytest.mark.parametrize(("code", "a", "b", "result", "flags", "why"), [
    ("4801c8", 1, 2, 3, PF, "add: two bits set is even parity"),
    ("4801c8", ALL, 1, 0, CF | PF | AF | ZF, "add: out of the top"),
    ("4801c8", TOP - 1, 1, TOP, PF | AF | SF | OF, "add: into the sign"),
    ("4801c8", TOP, TOP, 0, CF | PF | ZF | OF, "add: two negative numbers"),
    ("01c8", 0xFFFF_FFFF, 1, 0, CF | PF | AF | ZF, "add of 32 bits: out of their top"),
    ("01c8", 0x7FFF_FFFF | TOP, 1, 0x8000_0000, PF | AF | SF | OF, "add of 32 bits clears the upper half"),
    ("4829c8", 1, 2, ALL, CF | PF | AF | SF, "sub: below 0"),
    ("4829c8", TOP, 1, TOP - 1, PF | AF | OF, "sub: out of the negative numbers"),
    ("4839c8", 5, 5, 5, PF | ZF, "cmp: equal, and nothing stored"),
    ("4831c8", 0xF0, 0xFF, 0x0F, PF, "xor"),
    ("4821c8", TOP | 1, TOP, TOP, PF | SF, "and"),
    ("4809c8", 0x10, 0x01, 0x11, PF, "or"),
    ("4885c8", 0x10, 0x01, 0x10, PF | ZF, "test: nothing stored"),
    ("48ffc0", ALL, 0, 0, PF | AF | ZF, "inc: CF stays as it was"),
    ("48ffc8", TOP, 0, TOP - 1, PF | AF | OF, "dec"),
    ("480fafc1", 3, ALL, ALL - 2, 0, "imul: 3 times -1 fits"),
    ("480fafc1", TOP, 2, 0, CF | OF, "imul: does not fit"),
    ("4883c0ff", 1, 0, 0, CF | PF | AF | ZF, "an 8-bit immediate is sign-extended"),
    ("4881c000000080", 0, 0, ALL - 0x7FFF_FFFF, PF | SF, "a 32-bit immediate is sign-extended"),
    ("4883e80a", 5, 0, ALL - 4, CF | AF | SF, "sub of an immediate"),
    ("48f7c001000000", 2, 0, 2, PF | ZF, "test with an immediate"),
])
def test_results_and_flags(code: str, a: int, b: int, result: int, flags: int, why: str) -> None:
    made = after(code, rax=a, rcx=b)
    assert (made.registers[RAX], made.rflags & FLAGS) == (result, flags), why
    assert made.rip == CODE + len(code) // 2


def test_increments_keep_the_carry() -> None:
    made = after("4801c8" "48ffc0", 2, rax=ALL, rcx=1)
    assert (made.registers[RAX], made.rflags & CF) == (1, CF)


@pytest.mark.parametrize(("code", "why"), [
    ("488b06", "mov rax, [rsi]"),
    ("488b4610", "mov rax, [rsi + disp8]"),
    ("488b8600010000", "mov rax, [rsi + disp32]"),
    ("488b46f0", "mov rax, [rsi - 16]"),
    ("488b0424", "mov rax, [rsp]: a SIB byte without an index"),
    ("488b04fe", "mov rax, [rsi + rdi*8]"),
    ("488b44fe08", "mov rax, [rsi + rdi*8 + disp8]"),
    ("488b04fd00900000", "mov rax, [rdi*8 + disp32]: no base"),
    ("488b042500900000", "mov rax, [disp32]: neither base nor index"),
    ("488b05f90f0000", "mov rax, [rip + disp32]: from the next instruction"),
    ("498b00", "mov rax, [r8]: REX.B"),
    ("4b8b04c8", "mov rax, [r8 + r9*8]: REX.X and REX.B"),
    ("4a8b04ce", "mov rax, [rsi + r9*8]: REX.X"),
    ("488b4500", "mov rax, [rbp + 0]: RBP has no form without a displacement"),
])
def test_every_addressing_form(code: str, why: str) -> None:
    """Every word of the data page holds its own address, so what was loaded says where from."""
    ram = memory()
    ram.view(DATA, 0x1000)[:] = struct.pack("<512Q", *range(DATA, DATA + 0x1000, 8))
    made = cpu(bytes.fromhex(code), ram, rsi=DATA + 0x20, rdi=3, rsp=DATA + 0x40, rbp=DATA + 0x48, r8=DATA + 0x80, r9=2)
    made.run(1)
    expected = {
        "488b06": 0x20, "488b4610": 0x30, "488b8600010000": 0x120, "488b46f0": 0x10, "488b0424": 0x40,
        "488b04fe": 0x38, "488b44fe08": 0x40, "488b04fd00900000": 0x18, "488b042500900000": 0,
        "488b05f90f0000": 0, "498b00": 0x80, "4b8b04c8": 0x90, "4a8b04ce": 0x30, "488b4500": 0x48}[code]
    assert made.registers[RAX] == DATA + expected, why


def test_moves() -> None:
    assert after("48b8efcdab8967452301").registers[RAX] == 0x0123456789ABCDEF
    assert after("b8ffffffff", rax=ALL).registers[RAX] == 0xFFFF_FFFF
    assert after("49b90100000000000080").registers[R9] == TOP | 1
    assert after("48c7c0ffffffff").registers[RAX] == ALL
    assert after("4989c0", rax=5).registers[R8] == 5
    made = after("48890e", rsi=DATA, rcx=0x1122334455667788)
    assert made.mmu.load(DATA, 8) == 0x1122334455667788


def test_a_store_over_the_end_of_a_page_reaches_both() -> None:
    made = after("48890e" "488b06", 2, rsi=DATA + 0xFFD, rcx=0x1122334455667788)
    assert made.registers[RAX] == 0x1122334455667788
    assert (made.mmu.load(DATA + 0xFFD, 3), made.mmu.load(DATA + 0x1000, 5)) == (0x667788, 0x1122334455)


CONDITIONS = (
    (0x70, OF, True, "o"), (0x71, OF, False, "no"), (0x72, CF, True, "b"), (0x73, CF, False, "ae"),
    (0x74, ZF, True, "e"), (0x75, ZF, False, "ne"), (0x76, CF, True, "be"), (0x76, ZF, True, "be"),
    (0x77, ZF, False, "a"), (0x78, SF, True, "s"), (0x79, SF, False, "ns"), (0x7A, PF, True, "p"),
    (0x7B, PF, False, "np"), (0x7C, SF, True, "l"), (0x7C, OF, True, "l"), (0x7D, SF, False, "ge"),
    (0x7C, SF | OF, False, "l"), (0x7E, ZF, True, "le"), (0x7F, ZF, False, "g"), (0x7F, SF | OF, True, "g"),
    (0x7E, SF | OF, False, "le"),
)


@pytest.mark.parametrize(("opcode", "flags", "taken", "name"), CONDITIONS)
def test_conditional_jumps(opcode: int, flags: int, taken: bool, name: str) -> None:
    made = cpu(bytes([opcode, 0x10]))
    made.rflags |= flags
    made.run(1)
    assert made.rip == CODE + 2 + (0x10 if taken else 0), name


def test_jumps_backward_and_nop() -> None:
    assert after("ebfe").rip == CODE
    assert after("90").rip == CODE + 1


@pytest.mark.parametrize(("code", "reason", "why"), [
    ("0f0b", "KVM_EXIT_INTERNAL_ERROR", "ud2: an opcode that it does not know"),
    ("0f6fc0", "KVM_EXIT_INTERNAL_ERROR", "an MMX instruction"),
    ("66ffc0", "KVM_EXIT_INTERNAL_ERROR", "an operand-size prefix"),
    ("ffd0", "KVM_EXIT_INTERNAL_ERROR", "call: group 5 beyond INC and DEC"),
    ("4811c8", "KVM_EXIT_INTERNAL_ERROR", "adc: not in the subset"),
    ("4983d000", "KVM_EXIT_INTERNAL_ERROR", "adc with an immediate"),
    ("48f7d8", "KVM_EXIT_INTERNAL_ERROR", "neg: group 3 beyond TEST"),
    ("f4", "KVM_EXIT_HLT", "hlt"),
    ("488b06", "KVM_EXIT_SHUTDOWN", "a load from a page that is not there"),
])
def test_what_ends_a_vcpu(code: str, reason: str, why: str) -> None:
    made = cpu(bytes.fromhex(code), None, rsi=0x3000_0000_0000)
    with pytest.raises(Exit) as caught:
        made.run(1)
    assert caught.value.reason == reason, why
    assert made.rip == CODE + (1 if reason == "KVM_EXIT_HLT" else 0)


@pytest.mark.parametrize(("address", "write", "reason", "why"), [
    (0x30_000, False, "KVM_EXIT_SHUTDOWN", "not present"),
    (0x50_000, True, "KVM_EXIT_SHUTDOWN", "read-only, and CR0.WP"),
    (0x0000_8000_0000_0000, False, "KVM_EXIT_SHUTDOWN", "not canonical"),
    (0xFFFF_8000_0000_0000, False, "KVM_EXIT_SHUTDOWN", "canonical, and not mapped"),
    (0x0020_0000 + 0x50_000, False, "KVM_EXIT_MMIO", "mapped to where no RAM is, by a large page"),
    (0x4000_0000 + 0x1000_0000, True, "KVM_EXIT_MMIO", "mapped to where no RAM is, by a huge page"),
])
def test_translation_that_fails(address: int, write: bool, reason: str, why: str) -> None:
    with pytest.raises(Exit) as caught:
        Mmu(memory(), 0x8001_0033, ROOT).page(address, write)
    assert caught.value.reason == reason, why


@pytest.mark.parametrize(("address", "physical"), [
    (0x9123, 0x9000), (0x0020_0000 + 0xA000, 0xA000), (0x4000_0000 + 0xB000, 0xB000)])
def test_pages_of_every_size(address: int, physical: int) -> None:
    assert Mmu(memory(), 0x8001_0033, ROOT).page(address, True).address == physical


def test_the_walk_marks_what_was_used() -> None:
    ram = memory()
    mmu = Mmu(ram, 0x8001_0033, ROOT)

    def entry(table: int, number: int) -> int:
        return int(struct.unpack("<Q", ram.view(table + 8 * number, 8))[0])

    mmu.page(0x9000, False)
    assert (entry(TABLE, 9) & (ACCESSED | DIRTY), entry(ROOT, 0) & (ACCESSED | DIRTY)) == (ACCESSED, ACCESSED)
    mmu.page(0x9000, True)
    assert entry(TABLE, 9) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert entry(LAST, 0) & DIRTY == 0


def test_code_that_is_written_is_decoded_again() -> None:
    changed = int.from_bytes(bytes.fromhex("48ffc8" "48890e" "ebf8"), "little")
    made = cpu(bytes.fromhex("48ffc0" "48890e" "ebf8"), None, rsi=CODE, rcx=changed)
    made.run(2)
    assert made.registers[RAX] == 1, "inc rax; mov [rsi], rcx makes it dec rax"
    made.run(2)
    assert made.registers[RAX] == 0, "the jump, and dec rax"


_NUMBERS = (0, 1, 4, 5, 6, 7)
_TARGETS = (RAX, RCX, RDX, RBX, RBP)


def _instruction(chosen: random.Random) -> bytes:
    """One random instruction on registers or on a few words at [RSI]."""
    rex, number = 0x40 | chosen.choice((0, 8)), chosen.choice(_NUMBERS)
    target, source = chosen.choice(_TARGETS), chosen.choice(_TARGETS)
    in_memory = bytes([0x40 | source << 3 | RSI, chosen.randrange(0, 64, 8)])
    modrm = bytes([0xC0 | source << 3 | target]) if chosen.random() < 0.6 else in_memory
    return chosen.choice((
        bytes([rex, number << 3 | chosen.choice((1, 3))]) + modrm,
        bytes([rex, 0x83, 0xC0 | number << 3 | target, chosen.randrange(256)]),
        bytes([rex, 0xFF, 0xC0 | chosen.choice((0, 8)) | target]),
        bytes([rex, chosen.choice((0x89, 0x8B))]) + modrm,
        bytes([rex, 0x81, 0xC0 | number << 3 | target]) + chosen.randbytes(4),
        bytes([rex, 0x85]) + modrm,
        bytes([0x70 | chosen.randrange(16), 0]),
    ))


def _ran(backend: Backend, code: bytes, values: list[int]) -> tuple[list[int], bytes]:
    """The registers and the memory behind them after a run to HLT."""
    with create(backend, 1, devices={"tss_address": 0x7FFB_D000}) as vm:
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        vm.memory.view(guest.CODE, len(code))[:] = code
        words = dict(zip((0, 1, 2, 3, 7), values, strict=True)) | {4: guest.CELLS}
        regs = patched(read(vm, x86_64.REGS.id)[0], words)
        assert write(vm, x86_64.REGS.id, [regs]) == []
        assert _halted(vm) == {0: "KVM_EXIT_HLT"}
        found = list(struct.unpack("<18Q", read(vm, x86_64.REGS.id)[0]))
        return found, bytes(vm.memory.view(guest.CELLS, 128))


def _halted(vm: Vm) -> dict[int, str]:
    vm.start()
    deadline = time.monotonic() + 10
    while not vm.exits() and time.monotonic() < deadline:
        time.sleep(0.001)
    vm.pause()
    return vm.exits()


@pytest.mark.kvm
@pytest.mark.parametrize("seed", range(20))
def test_random_code_leaves_what_a_real_cpu_leaves(seed: int) -> None:
    """IMUL is left out, and so is AF: the flags that some instructions leave undefined differ from CPU to CPU."""
    chosen = random.Random(seed)
    code = b"".join(_instruction(chosen) for _ in range(60)) + b"\xf4"
    values = [chosen.getrandbits(64) for _ in range(5)]
    real, sim = (_ran(backend, code, values) for backend in (KvmBackend(), SimBackend()))
    for registers, _ in (real, sim):
        registers[17] &= FLAGS & ~AF
    assert real == sim, code.hex()


def test_two_hundred_and_forty_vcpus_all_get_on() -> None:
    with create(SimBackend(), 240) as vm:
        guest.install(vm, SimBackend().profile().cpuid, SimBackend().profile().capabilities)
        vm.start()
        deadline = time.monotonic() + 60
        while min(guest.counts(vm)) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
        vm.pause()
        counters = guest.counters(vm)
    assert min(one.steps for one in counters) >= 30
    assert {one.fault for one in counters} == {""}


def test_a_vcpu_outside_of_64_bit_mode_is_beyond_the_interpreter() -> None:
    with create(SimBackend(), 2) as vm:
        assert _halted(vm) == {0: "KVM_EXIT_INTERNAL_ERROR"}, "the other waits for its start-up interrupt"


def test_vcpus_may_run_in_address_spaces_of_their_own() -> None:
    """One address is two places: what was decoded for one vCPU is not the other's code."""
    backend = SimBackend()
    with create(backend, 2, devices={"tss_address": 0x7FFB_D000}) as vm:
        guest.install(vm, backend.profile().cpuid, backend.profile().capabilities)
        for k, code in enumerate(("48ffc0f4", "48ffc8f4")):
            root, pdpt, pd, table, page = (0x40_000 + 0x8000 * k + 0x1000 * n for n in range(5))
            entry = table + 8 * (guest.CODE >> 12)
            for at, value in ((root, pdpt | 3), (pdpt, pd | 3), (pd, table | 3), (entry, page | 3)):
                vm.memory.view(at, 8)[:] = struct.pack("<Q", value)
            vm.memory.view(page + guest.CODE % 0x1000, 4)[:] = bytes.fromhex(code)
        sregs = [patched(v, {30: 0x40_000 + 0x8000 * k}) for k, v in enumerate(read(vm, x86_64.SREGS.id))]
        assert write(vm, x86_64.SREGS.id, sregs) == []
        vm.start()
        deadline = time.monotonic() + 10
        while len(vm.exits()) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        vm.pause()
        regs = [struct.unpack("<18Q", value) for value in read(vm, x86_64.REGS.id)]
    assert [(one[0], one[16]) for one in regs] == [(1, guest.CODE + 4), (ALL, guest.CODE + 4)]
