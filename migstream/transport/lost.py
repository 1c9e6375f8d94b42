"""What read back different for no known reason is nobody's to run, unless the operator's policy accepts it by name."""

from __future__ import annotations

from dataclasses import replace

from migstream.errors import RestoreFailed
from migstream.registers.catalogue import lookup
from migstream.report import Difference, Report
from migstream.verdicts.policy import Policy


def settle(report: Report, policy: Policy) -> None:
    """Let pass what the policy accepts. Raises: RestoreFailed with the first register that it does not."""
    report.differs = [one if one.reason else replace(one, tolerated=_accepted(policy, one)) for one in report.differs]
    lost = [one for one in report.differs if not one.reason and not one.tolerated]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise RestoreFailed(f"{lost[0]}{more}; the VM was destroyed", report)


def _accepted(policy: Policy, difference: Difference) -> str:
    """The reason of the first `tolerate` row that names the register, if it says that a guest may notice; else ""."""
    name = lookup(difference.register).name
    clause = next((one for one in policy.clauses if one.verb == "tolerate" and one.names(name)), None)
    return clause.reason if clause is not None and clause.guest_notices else ""
