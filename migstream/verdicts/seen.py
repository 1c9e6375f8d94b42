"""ID registers that some kernel shows a guest otherwise than KVM_GET_ONE_REG has them: what the guest read decides.

Up to 6.5 a guest reads CTR_EL0 from the CPU and KVM_GET_ONE_REG gives the kernel's own idea of it; later kernels trap
the read and show the register, which can be written. So the register's value may be equal where the guest would notice,
and different where it would not.
"""

from __future__ import annotations

import re
from dataclasses import replace

from migstream.model import Arch
from migstream.verdicts import id_fields
from migstream.verdicts.facts import Case
from migstream.verdicts.model import Answer, Kernel, Verdict

_SOURCE = "arch/arm64/kvm/sys_regs.c access_ctr; HCR_EL2.TID2, set for every guest since 6.6; asked by a guest's MRS"


def judge(case: Case) -> Verdict | None:
    """The answer where the saving kernel or the host shows a guest another value; None elsewhere. Raises: NotYet."""
    if case.pair.arch != Arch.ARM64:
        return None
    contract, here = case.pair.saved.contract, case.pair.host_unlike.get(case.slot.id)
    read = contract.behaviour.sees.get(case.slot.id) if contract else None
    if here is None and read is None:
        return None
    plain = id_fields.judge(case) or Verdict(case.slot, Answer.FITS, case.slot)
    met = case.known.numbers[0] if read is None else int.from_bytes(read, "little")
    if here is None:
        return _shown(case, met, plain.kernel)
    if read is None and contract and _traps(contract.kernel):
        return _stuck(case, met, here, plain.kernel)
    if read is None and not (contract and contract.kernel == case.host.kernel):
        return _untold(case, met, here, plain.kernel)
    return _stuck(case, here if read is None else met, here, plain.kernel)


def _traps(kernel: str) -> bool:
    """Whether guests of this kernel read what KVM_GET_ONE_REG has; False for several kernels, or none told."""
    version = None if _SEVERAL in kernel else re.match(r"(?:Linux )?(\d{1,4})\.(\d{1,4})", kernel)
    return version is not None and (int(version[1]), int(version[2])) >= _TRAPPED


_SEVERAL = " + "
"""Between the kernels that a baseline is of."""

_TRAPPED = (6, 6)
"""The first kernel that sets HCR_EL2.TID2 for every guest."""


def _stuck(case: Case, met: int, here: int, kernel: Kernel) -> Verdict:
    """The host's guests read the CPU's own value, whatever the register has."""
    target = case.slot if kernel == Kernel.TAKES else None
    if met != here:
        return Verdict(case.slot, Answer.NOTICED, target, f"the guest read {met:#x}, and reads {here:#x} here: this "
                       "kernel does not trap it", _SOURCE, kernel=kernel)
    if target is not None:
        return Verdict(case.slot, Answer.FITS, target, source=_SOURCE)
    return Verdict(case.slot, Answer.HARMLESS, None, f"a guest reads {here:#x} here, as it did, whatever the register "
                   "has", _SOURCE, kernel=kernel)


def _untold(case: Case, register: int, here: int, kernel: Kernel) -> Verdict:
    """The stream does not say what the guest read: its kernel may have shown it the register, or the CPU's own."""
    target = case.slot if kernel == Kernel.TAKES else None
    if register == here:
        return Verdict(case.slot, Answer.FITS if target else Answer.HARMLESS, target, "" if target else
                       f"a guest reads {here:#x} here, whatever the register has", _SOURCE, kernel=kernel)
    return Verdict(case.slot, Answer.NOTICED, target, f"a guest reads {here:#x} here, whatever the register has; the "
                   f"register had {register:#x} where it was saved, and the stream does not say whether the guest "
                   "read that", _SOURCE, kernel=kernel)


def _shown(case: Case, met: int, kernel: Kernel) -> Verdict:
    """The host shows the register: it has to have what the guest read."""
    verdict = id_fields.judge(case.with_value(met)) or Verdict(case.slot, Answer.FITS, case.slot)
    if verdict.answer != Answer.FITS or case.known.only(met):
        return replace(verdict, kernel=kernel)
    return Verdict(case.slot, Answer.WRITTEN_AS, case.slot, f"{met:#x}: so the guest read it where it was saved; "
                   "KVM_GET_ONE_REG had another value", _SOURCE, met.to_bytes(case.slot.size, "little"), kernel)
