"""`migstream check`: whether hosts can take a guest, register by register, before anything is touched."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from migstream import filekind
from migstream.cli_files import open_policy, text_of
from migstream.errors import UsageError
from migstream.limits import MAX_CONTRACT, MAX_POLICY

if TYPE_CHECKING:
    from migstream.contract import Contract
    from migstream.fleet import Vmm
    from migstream.host.profile import HostProfile
    from migstream.model import Arch
    from migstream.plan import Plan
    from migstream.transport import Source
    from migstream.verdicts.model import Saved
    from migstream.verdicts.policy import Policy

_FULL = 3
"""Hosts that are shown with all that stands in the way; more of them are a line each."""

_ROWS = 40
"""Hosts, and ways back, that one screen shows."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    sub.add_argument("file", metavar="STREAM|CONTRACT|-", nargs="?")
    sub.add_argument("--host", action="append", default=[], metavar="P",
                     help="a captured profile, or a name from `host list`; may be given several times")
    sub.add_argument("--reverse", action="store_true", help="and whether the guest can come back from there")
    sub.add_argument("--source", metavar="P", help="with --reverse: where it comes from, if no recorded profile is its")
    sub.add_argument("--matrix", nargs="+", metavar="P", help="a fresh guest of each of these hosts on each other one")
    sub.add_argument("--fleet", nargs=2, metavar=("OLD", "NEW"),
                     help="old and new kernel with old and new VMM: which moves are safe, and where the fence lies")
    sub.add_argument("--old-vmm", metavar="WORDS", help=f"{_VMM_WORDS}; default knows:OLD")
    sub.add_argument("--new-vmm", metavar="WORDS", help="likewise; default contract,opts-out")
    sub.add_argument("--vcpu-features", metavar="LIST", help="arm64, of the guests of --matrix and --fleet (none)")
    sub.add_argument("--policy", metavar="FILE", help="TOML: what the operator tolerates, clamps, ignores, requires")
    sub.add_argument("--all", action="store_true", help="every verdict that has a reason, not the worst alone")


_VMM_WORDS = "a VMM: contract, opts-out, knows:PROFILE (rows for that kernel's registers alone), with commas"


def run(options: argparse.Namespace) -> int:
    """Judge; the exit status is the worst answer's.

    Raises: StreamError, DocumentError and below, UsageError, OutputError, PolicyError.
    """
    asked = [name for name in ("file", "matrix", "fleet") if getattr(options, name) is not None]
    if len(asked) != 1:
        raise UsageError("check: a stream or contract with --host, or --matrix, or --fleet: one of the three")
    for name, only in _ONLY.items():
        if getattr(options, name) not in (None, [], False) and asked[0] not in only:
            raise UsageError(f"check: --{name.replace('_', '-')} goes with {_ASKED[only[0]]}")
    return _MODES[asked[0]](options)


_ASKED = {"file": "a stream or contract", "matrix": "--matrix or --fleet", "fleet": "--fleet"}
_ONLY: dict[str, tuple[str, ...]] = {
    "host": ("file",), "reverse": ("file",), "source": ("file",), "old_vmm": ("fleet",), "new_vmm": ("fleet",),
    "vcpu_features": ("matrix", "fleet"),
}
"""Which options go with which of the three questions; `policy` and `all` with most, see `_fleet`."""


# A stream or a contract.


def _file(options: argparse.Namespace) -> int:
    from migstream import show, show_check
    from migstream.cli_host import open_profile
    from migstream.plan import plan_for

    if not options.host:
        raise UsageError("check: --host says where the guest is to go")
    if options.source and not options.reverse:
        raise UsageError("check: --source goes with --reverse")
    policy = open_policy(options.policy)
    given = read_input(options.file)
    hosts = {name: open_profile(name) for name in options.host}
    given.notes += _no_promise(given, hosts)
    plans = {name: plan_for(given.saved(host), host, policy) for name, host in hosts.items()}
    if options.reverse:
        source = given.source(options, hosts)
        back = {name: _way_back(plan, source, policy) for name, plan in plans.items()}
    else:
        back = {}
    statuses = [show_check.status(plan) for plan in (*plans.values(), *filter(None, back.values()))]
    if options.json:
        show.print_json("check", {"file": options.file, "kind": given.kind, "notes": given.notes,
                                  "hosts": _hosts_json(plans, back)})
    else:
        _print_hosts(plans, back, given, options.all)
    return max(*statuses, show_check.NOT if None in back.values() else 0)


def _way_back(plan: Plan, source: HostProfile, policy: Policy) -> Plan | None:
    """The guest as the host would save it after the move, on where it came from; None where it can't move."""
    from migstream.plan import plan_for
    from migstream.verdicts.guest import moved

    if plan.refusals or plan.pair is None:
        return None
    return plan_for(moved(plan.pair, plan.verdicts), source, policy)


def _hosts_json(plans: Mapping[str, Plan], back: Mapping[str, Plan | None]) -> dict[str, Any]:
    from migstream.show_check import plain

    out: dict[str, Any] = {name: plain(plan) for name, plan in plans.items()}
    for name, plan in back.items():
        out[name]["back"] = None if plan is None else plain(plan)
    return out


def _print_hosts(plans: Mapping[str, Plan], back: Mapping[str, Plan | None], given: Input, everything: bool) -> None:
    from migstream import show, show_check

    rows: list[tuple[str, str]] = [("note" if k == 0 else "", line) for k, line in enumerate(given.notes)]
    ways: dict[str, Plan | None] = {**plans, **{f"{name} and back": plan for name, plan in back.items()}}
    if len(plans) > _FULL and not everything:
        table = show_check.hosts_table(ways)
        show.print_table(show.Table(table.columns, table.rows[:_ROWS]), 0)
        rows += [("", show_check.rest(len(ways), _ROWS))] if len(ways) > _ROWS else []
    else:
        rows += [row for name, plan in ways.items() for row in show_check.host_pairs(name, plan, everything)]
    show.print_pairs(rows)


class Input:
    """A guest to be judged: a stream's or a contract's.

    Attributes:
        kind: `stream` or `contract`. notes: what is worth knowing of it, a line each.
    """

    def __init__(self, name: str, kind: str, found: Saved | Contract, kernel: str, cpu: str) -> None:
        self.name, self.kind, self._found, self._kernel, self._cpu = name, kind, found, kernel, cpu
        self.notes = _contract_notes(found) if kind == "contract" else []

    def saved(self, host: HostProfile) -> Saved:
        """The guest, as it would go to a host."""
        from migstream.contract import Contract
        from migstream.verdicts.guest import of_contract

        return of_contract(self._found, host) if isinstance(self._found, Contract) else self._found

    def source(self, options: argparse.Namespace, hosts: Mapping[str, HostProfile]) -> HostProfile:
        """The host that the guest comes from: --source, one of the hosts, or a recorded one. Raises: UsageError."""
        from migstream.cli_host import open_profile
        from migstream.host import profiles
        from migstream.host.profile import HostProfile

        arch = self.saved(next(iter(hosts.values()))).machine.arch
        if options.source:
            named = open_profile(options.source)
            if named.arch != arch:
                raise UsageError(f"check: --source {options.source}: a host of {named.arch.label}; the guest is of "
                                 f"{arch.label}")
            return named
        for host in hosts.values():
            if (host.kernel, host.cpu) == (self._kernel, self._cpu):
                return host
        found = profiles.recorded(HostProfile(arch, self._kernel, self._cpu, ""))
        if found is None:
            raise UsageError(f"{self.name}: no recorded profile of where it comes from ({self._kernel or 'not said'}): "
                             "name it with --source")
        return found


def _no_promise(given: Input, hosts: Mapping[str, HostProfile]) -> list[str]:
    """What a contract can't say of these hosts."""
    from migstream.host.baseline import PTIMER_CNT, physical_counter
    from migstream.model import Arch

    without = [name for name, host in hosts.items()
               if host.arch == Arch.ARM64 and host.listed and PTIMER_CNT not in host.listed]
    return [physical_counter(without)] if without and given.kind == "contract" else []


def _contract_notes(contract: Any) -> list[str]:
    from migstream.registers.catalogue import lookup

    if not contract.varies:
        return []
    return [f"{', '.join(lookup(id).name for id in contract.varies)}: not the same on all vCPUs; judged by vCPU 0's"]


def read_input(name: str) -> Input:
    """Read a stream or a contract, told apart by how they begin.

    Raises: StreamError and below, DocumentError and below, OutputError; UsageError for another kind of file.
    """
    from migstream.transport import open_source

    with open_source(name) as file:
        head = file.read(1)
        if head in (b"{", b" ", b"\n", b"\t", b"\r", b"["):
            return _contract(name, head + file.read(MAX_CONTRACT))
        if head.isascii() and head.decode().isprintable():  # no stream begins so; a policy may
            head += file.read(MAX_POLICY)
            if kind := filekind.of_bytes(head):
                raise UsageError(f"{name}: neither a stream nor a contract{kind}")
        return _stream(name, _Resumed(head, file))


class _Resumed:
    """A source whose first byte was read already."""

    def __init__(self, head: bytes, rest: Source) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int, /) -> bytes:
        """See `Source.read`."""
        head, self._head = self._head[:size], b""
        return head + self._rest.read(size - len(head)) if size > len(head) else head


def _contract(name: str, data: bytes) -> Input:
    from migstream.contract import from_json

    contract = from_json(text_of(name, data, "contract", MAX_CONTRACT), name)
    return Input(name, "contract", contract, contract.kernel, contract.cpu)


def _stream(name: str, source: Source) -> Input:
    from migstream.survey import survey
    from migstream.verdicts.model import Saved

    seen = survey(source)
    if seen.error is not None:
        raise seen.error.in_file(name)
    machine, host = seen.reader.machine, seen.reader.host
    assert machine is not None
    saved = Saved.of(machine, seen.reader.layouts, [bank.decode() for bank in seen.banks], seen.contract())
    return Input(name, "stream", saved, host.kernel if host else "", host.cpu if host else "")


# Hosts among themselves.


def _matrix(options: argparse.Namespace) -> int:
    from migstream import show, show_check
    from migstream.cli_host import open_profile
    from migstream.fleet import matrix

    names = list(dict.fromkeys(options.matrix))
    if len(names) < 2:
        raise UsageError("check --matrix: name two hosts or more")
    hosts = {name: open_profile(name) for name in names}
    plans = matrix(hosts, _features(options, hosts.values()), open_policy(options.policy))
    if options.json:
        show.print_json("check", {"matrix": [{"from": a, "to": b, **show_check.plain(plan)}
                                             for (a, b), plan in plans.items()]})
    else:
        legend = show_check.Legend()
        show.print_table(show_check.square(names, show_check.matrix_reasons(names, plans), "fits", legend), 0)
        show.print_pairs(legend.pairs(options.all))
        if options.all:
            show.print_pairs(row for (a, b), plan in plans.items()
                             for row in show_check.host_pairs(f"{a} -> {b}", plan, True))
    return max(map(show_check.status, plans.values()))


def _features(options: argparse.Namespace, hosts: Iterable[HostProfile]) -> int:
    from migstream.cli_host import parse_features
    from migstream.registers import vcpu_features

    found = parse_features(options.vcpu_features, hosts)
    return vcpu_features.DEFAULT if found is None else found


def _fleet(options: argparse.Namespace) -> int:
    from migstream import show, show_check
    from migstream.cli_host import open_profile
    from migstream.fleet import four_way

    if options.policy:
        raise UsageError("check: --policy goes with a stream, a contract or --matrix: a policy is one host's")
    old, new = (open_profile(name) for name in options.fleet)
    default = f"knows:{options.fleet[0]}"
    words = (default if options.old_vmm is None else options.old_vmm,
             "contract,opts-out" if options.new_vmm is None else options.new_vmm)
    vmms = (_vmm("old", words[0], old.arch), _vmm("new", words[1], old.arch))
    fleet = four_way(old, new, vmms, _features(options, (old, new)))
    if options.json:
        show.print_json("check", {"fleet": show_check.fleet_document(fleet)})
        return show_check.fleet_status(fleet)
    legend = show_check.Legend()
    show.print_pairs(show_check.fleet_pairs(fleet))
    show.print_table(show_check.square([place.name for place in fleet.places], show_check.direct(fleet), "safe",
                                       legend), 0)
    stranded = show_check.stranded_table(fleet, legend)
    if stranded.rows:
        show.print_table(stranded, 0)
    show.print_pairs([*legend.pairs(options.all), *(("fence", line) for line in show_check.fence_lines(fleet))])
    if options.all:
        show.print_pairs((" -> ".join(str(n + 1) for n in route) if k == 0 else "", reason)
                         for route, reasons in fleet.routes.items() for k, reason in enumerate(reasons))
    return show_check.fleet_status(fleet)


def _vmm(name: str, words: str, arch: Arch) -> Vmm:
    """A VMM from its words. Raises: UsageError."""
    from migstream.cli_host import open_profile
    from migstream.fleet import Vmm

    flags = {word.strip() for word in words.split(",") if word.strip()}
    known = [word for word in flags if word.startswith("knows:")]
    if unknown := sorted(flags - {*known, "contract", "opts-out"}):
        raise UsageError(f"--{name}-vmm: no word {unknown[0]!r}; {_VMM_WORDS}")
    if not flags:
        raise UsageError(f"--{name}-vmm: says nothing; {_VMM_WORDS}")
    if len(known) > 1:
        raise UsageError(f"--{name}-vmm: one knows:PROFILE at most")
    kernel = open_profile(known[0].removeprefix("knows:")) if known else None
    if kernel is not None and kernel.arch != arch:
        raise UsageError(f"--{name}-vmm: {known[0]}: a kernel of {kernel.arch.label}; the fleet is {arch.label}")
    rows = None if kernel is None else _rows_of(kernel)
    return Vmm(name, rows, "contract" in flags, "opts-out" in flags)


def _rows_of(host: HostProfile) -> frozenset[int]:
    """What a VMM that was written for this kernel has rows for."""
    return frozenset({*host.listed, *host.with_all_features().listed, *host.defaults, *host.attributes})


_MODES = {"file": _file, "matrix": _matrix, "fleet": _fleet}
