"""A guest program of one page that is the same in every VM: an entry for each system register, and one for HVC.

The same, because the lab's emulator runs what it has translated of a page before where a guest's page was written anew
(measured: programs written for each run gave answers of the ones before).
"""

from __future__ import annotations

import struct

from migstream.host import firmware_arm64
from migstream.host.firmware_arm64 import SystemRegister
from migstream.registers.firmware_arm64 import Call

ADDRESS = 0x4000
QUESTIONS = {question.key: question for question in firmware_arm64.questions()}
RESULT, _PLACE = 4, 29
"""X4 is what was asked for; X29 the address that is stored to, where there is no RAM: KVM_EXIT_MMIO."""

_STORE, _HVC, _MOVE = 0xF900_0000 | _PLACE << 5 | RESULT, 0xD400_0002, 0xAA00_03E0 | RESULT
_STOP = 0x1400_0000
_REGISTERS = tuple(question for question in QUESTIONS.values() if isinstance(question, SystemRegister))


def code() -> bytes:
    """The page."""
    words = [_HVC, _MOVE, _STORE, _STOP]
    for register in _REGISTERS:
        words += [0xD530_0000 | (register.key & 0xFFFF) - 0x8000 << 5 | RESULT, _STORE, _STOP, _STOP]
    return struct.pack(f"<{len(words)}I", *words)


def start(question: firmware_arm64.Question) -> dict[int, int]:
    """X registers by number, and PC as number 32, for a question."""
    if isinstance(question, Call):
        return {0: question.function, 1: question.argument, 2: 0, 3: 0, _PLACE: firmware_arm64.NO_RAM, 32: ADDRESS}
    return {_PLACE: firmware_arm64.NO_RAM, 32: ADDRESS + 16 * (1 + _REGISTERS.index(question))}
