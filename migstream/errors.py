"""Every exception of the project on one page, each with the exit status that it gives the command line.

Three families, so that a caller can tell who is to blame: *the file is wrong* (`StreamError`, `DocumentError`),
*the host can't* (`BackendError`, `DoesNotFit`), *you misused me* (`UsageError`). Each message is one line: where;
what; expected; found. Text that came out of a stream is escaped before it gets into a message.
"""

from __future__ import annotations

import errno as _errno

EXIT_STATUS = {
    0: "good",
    1: "corrupt",
    2: "truncated",
    3: "too new",
    4: "over a limit or policy",
    10: "fits with loss",
    11: "does not fit",
    64: "usage",
    69: "backend not available",
    70: "our own bug",
    74: "I/O",
}


def printable(text: object, limit: int = 80) -> str:
    """`text` made safe for a terminal: control characters and escapes shown as `\\x1b`, cut at `limit` characters."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def errno_name(number: int) -> str:
    """The kernel's word for an errno: `EINVAL`, or `errno 4242` for one that this platform doesn't name."""
    return _errno.errorcode.get(number, f"errno {number}")


class MigstreamError(Exception):
    """Root of all errors that migstream raises on purpose. `exit_status` is stable and listed in the README."""

    exit_status = 70


class StreamError(MigstreamError):
    """The stream is wrong. After one, the reader that raised it is dead.

    Attributes:
        offset: bytes from the start of the stream to the section (or preamble) that is wrong; None if not known.
        section: what is there, such as `BANK[3]` or `preamble`.
        field: the field that is wrong.
        expected, found: as text, "" where the error has no such pair.
    """

    exit_status = 1

    def __init__(self, what: str, *, offset: int | None = None, section: str = "", field: str = "",
                 expected: object = "", found: object = "") -> None:
        self.what, self.offset, self.section, self.field = what, offset, section, field
        self.file = ""
        self.expected, self.found = printable(expected), printable(found)
        super().__init__(what)

    def at(self, offset: int, section: str) -> StreamError:
        """Fill in the place, if the raiser didn't know it, and return the error itself."""
        if self.offset is None:
            self.offset = offset
        self.section = self.section or section
        return self

    def in_file(self, name: str) -> StreamError:
        """Fill in the file that the stream came from, and return the error itself."""
        self.file = name
        return self

    def __str__(self) -> str:
        place = f"{printable(self.file)}: " if self.file else ""
        place += "" if self.offset is None else f"offset {self.offset}: "
        subject = ".".join(printable(p) for p in (self.section, self.field) if p)
        line = f"{place}{subject + ': ' if subject else ''}{self.what}"
        if self.expected:
            line += f"; expected {self.expected}"
        return f"{line}; found {self.found}" if self.found else line


class Corrupt(StreamError):
    """The bytes contradict themselves, a checksum, or the specification."""


class Truncated(StreamError):
    """The stream ends before its end section."""

    exit_status = 2


class TooNew(StreamError):
    """A newer major version, or a critical section that this reader doesn't know."""

    exit_status = 3


class LimitExceeded(StreamError):
    """A count or length above the limits of formats/SPEC.md; nothing was allocated for it."""

    exit_status = 4


class UsageError(MigstreamError):
    """The caller asked for something that can't be; nothing was done."""

    exit_status = 64


class OutputError(MigstreamError):
    """A file or pipe could not be read or written."""

    exit_status = 74


class DocumentError(MigstreamError):
    """A file of ours beside the stream is wrong: a contract, a policy, a host profile. Another kind is `UsageError`."""

    exit_status = 1


class DocumentTooNew(DocumentError):
    """A contract or policy of a version that this migstream doesn't know yet."""

    exit_status = 3


class DocumentLimit(DocumentError):
    """A contract or policy above the limits of formats/SPEC.md."""

    exit_status = 4


class ProfileError(DocumentError):
    """A host profile is wrong: no JSON, an old version, a field that is missing, damaged, or contradicts another."""


class ProfileTooNew(ProfileError):
    """A host profile of a version that this migstream doesn't know yet."""

    exit_status = 3


class ProfileLimit(ProfileError):
    """A host profile above the limits of formats/SPEC.md."""

    exit_status = 4


class BackendUnavailable(MigstreamError):
    """There is no such backend here: no /dev/kvm, no permission, an unknown simulated kernel."""

    exit_status = 69


class BackendError(MigstreamError):
    """The host refused an operation.

    Attributes:
        operation: the primitive or ioctl, such as `KVM_SET_MSRS`.
        register: the name of the register concerned, "" where there is none.
        errno: the kernel's number, positive; 0 where the kernel gave none (a short count).
        vcpu: index of the vCPU, None for a VM-wide operation.
    """

    exit_status = 69

    def __init__(self, operation: str, *, errno: int = 0, register: str = "", vcpu: int | None = None,
                 what: str = "") -> None:
        self.operation, self.errno, self.register, self.vcpu = operation, errno, register, vcpu
        where = "" if vcpu is None else f"vCPU {vcpu}: "
        detail = what or (errno_name(errno) if errno else "refused")
        super().__init__(f"{where}{operation}{' ' + register if register else ''}: {detail}")


class RestoreFailed(MigstreamError):
    """The target refused part of a restore after the plan had let it pass, or a value read back different for no known
    reason and no policy accepts that. The VM was closed and can't run.

    Attributes:
        report: the `Report` of what was done until then.
    """

    exit_status = 11

    def __init__(self, message: str, report: object = None) -> None:
        self.report = report
        super().__init__(message)


class DoesNotFit(MigstreamError):
    """The plan says no: nothing was made, nothing was written.

    Attributes:
        reasons: one line for each register or property that can't be restored, the worst first.
    """

    exit_status = 11

    def __init__(self, reasons: list[str], what: str = "does not fit this host") -> None:
        self.reasons = reasons
        more = f" (and {len(reasons) - 1} more: see `--json`)" if len(reasons) > 1 else ""
        super().__init__(f"{what}: {reasons[0]}{more}")
