"""The commands of `migstream host`, and what all commands' arguments share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from migstream.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from migstream.host.profile import HostProfile


class Parser(argparse.ArgumentParser):
    """Reports misuse as our one-line error."""

    def error(self, message: str) -> NoReturn:
        """Raises: UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, which hides that help could not be written."""
        print(message, end="", file=file or sys.stderr)


BACKENDS = ("auto (real KVM where it works, else the simulator), kvm, sim, or sim:NAME, with +RULE (host list); "
            "sim:FILE.json is a captured profile")
"""Help text of `--backend`."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the verbs."""
    verbs = sub.add_subparsers(metavar="VERB", required=True, dest="verb", parser_class=Parser)
    capture = verbs.add_parser("capture", help="ask a backend what it offers, on scratch VMs; JSON")
    capture.add_argument("--backend", default="kvm", metavar="NAME",
                         help="kvm (this: no simulator is taken in its place), auto, sim, or sim:NAME, with +RULE")
    capture.add_argument("-o", dest="output", default="-", metavar="FILE")
    capture.add_argument("--made-by", metavar="TEXT", help="what the profile says it was made by (this command)")
    capture.add_argument("--no-experiment", action="store_true", help="only what the host tells and reads")
    listing = verbs.add_parser("list", help="name the recorded profiles, and the optional rules of simulated kernels")
    show = verbs.add_parser("show", help="one screen of a profile, or its registers")
    show.add_argument("profile", metavar="FILE|NAME", help="a captured file, or a name from `host list`")
    show.add_argument("--reg", metavar="GLOB", help="registers whose name or id matches")
    diff = verbs.add_parser("diff", help="what differs between two profiles, by register name and bit")
    diff.add_argument("left", metavar="A")
    diff.add_argument("right", metavar="B")
    baseline = verbs.add_parser("baseline", help="the strongest contract that all these hosts accept")
    baseline.add_argument("profiles", nargs="+", metavar="P", help="captured files, or names from `host list`")
    baseline.add_argument("-o", dest="output", metavar="FILE", help="write the contract; - is standard output")
    baseline.add_argument("--vcpu-features", metavar="LIST", help="arm64: by name, `none` for none; all common ones")
    baseline.add_argument("--free", action="append", default=[], metavar="GLOB",
                          help="a REGISTER or REGISTER.FIELD that is not pinned; may be given several times")
    for verb in (listing, show, diff, baseline):  # the word may stand before the verb or behind it
        verb.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run one verb."""
    return _VERBS[options.verb](options)


def open_profile(name: str) -> HostProfile:
    """Return a captured file's profile, or a recorded one by name, under the optional rules that the name gives.

    Raises: UsageError for a name that there is not, and a file of another kind; ProfileError and below; OutputError for
    a file that can't be read; BackendUnavailable for a rule that there is not.
    """
    from migstream.backends.sim.backend import recorded
    from migstream.backends.sim.validate import check
    from migstream.backends.sim.variants import MARK
    from migstream.host import profiles

    if os.path.exists(name):
        profile = profiles.read(name)
    elif MARK in name or os.sep in name or name.endswith(".json"):
        profile = recorded(name)[1]
    else:
        return profiles.load(name.removeprefix("sim:"))
    check(profile, name)
    return profile


def _capture(options: argparse.Namespace) -> int:
    from migstream.backends import open_backend
    from migstream.host.probe import capture
    from migstream.host.profile import to_json
    from migstream.transport import open_output

    backend = open_backend(options.backend)
    text = to_json(capture(backend, options.made_by or _made_by(options), not options.no_experiment))
    with open_output(options.output) as file:
        file.write(text.encode())
    return 0


RUN_BY = "MIGSTREAM_RUN_BY"
"""Environment variable: what stands before this command where another one runs it, such as the lab's; for `made_by`."""


def _made_by(options: argparse.Namespace) -> str:
    words = [f"-o {Path(options.output).name}" if options.output != "-" else "",
             f"--backend {options.backend}" if options.backend != "kvm" else "",
             "--no-experiment" if options.no_experiment else ""]
    return " ".join(filter(None, [os.environ.get(RUN_BY, ""), "migstream host capture", *words]))


def _list(options: argparse.Namespace) -> int:
    from migstream import show
    from migstream.backends.sim.variants import variants
    from migstream.host import profiles
    from migstream.model import Arch

    known = [(f"sim:{name}", profiles.load(name)) for name in profiles.names()]
    rules = [(arch, rule) for arch in Arch for rule in variants(arch)]
    if options.json:
        rows = [{"name": n, "arch": p.arch.label, "kernel": p.kernel, "cpu": p.cpu} for n, p in known]
        listed = [{"name": rule.title, "arch": arch.label, "what": rule.what, "source": rule.source}
                  for arch, rule in rules]
        show.print_json("host list", {"profiles": rows, "rules": listed})
        return 0
    show.print_table(show.Table(("name", "kernel", "cpu"), [(n, p.kernel, p.cpu) for n, p in known]), 0)
    print("\noptional rules, as in sim:NAME+RULE")
    show.print_table(show.Table(("rule", "arch", "what"), [(f"+{r.title}", a.label, r.what) for a, r in rules]), 0)
    return 0


def _show(options: argparse.Namespace) -> int:
    from migstream import show, show_host
    from migstream.host.compare import matching

    profile = open_profile(options.profile)
    found = matching(profile, options.reg) if options.reg else []
    if options.reg and not found:
        raise UsageError(f"{options.profile}: no register here matches {options.reg!r}")
    if options.json:
        registers = [show_host.entry_json(entry) for entry in found]
        show.print_json("host show", {**show_host.profile_json(profile), "registers": registers})
    elif found:
        print("\n".join(line for entry in found for line in show_host.entry_lines(entry)))
    else:
        show.print_pairs(show_host.host_pairs(profile))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from migstream import show, show_host
    from migstream.host.compare import calibrated, differences

    left, right = open_profile(options.left), open_profile(options.right)
    if left.arch != right.arch:
        raise UsageError(f"{options.left} is {left.arch.label}, {options.right} is {right.arch.label}: "
                         "they have no register in common")
    changes = differences(left, right)
    if options.json:
        show.print_json("host diff", {"changes": [show_host.change_json(change) for change in changes],
                                      "calibrated": calibrated(left, right)})
        return 0
    if changes:
        show.print_table(show_host.changes_table(changes, options.left, options.right), 0)
    else:
        print("no difference")
    if names := calibrated(left, right):
        print(f"not compared: {', '.join(names)}: the TSC's frequency as each kernel measured it at its boot")
    return 0


def _baseline(options: argparse.Namespace) -> int:
    from migstream import show, show_contract
    from migstream.contract import to_json
    from migstream.host.baseline import baseline
    from migstream.transport import open_output

    if len(set(options.profiles)) < 2:
        raise UsageError("host baseline: name two hosts or more")
    hosts = {name: open_profile(name) for name in dict.fromkeys(options.profiles)}
    found = baseline(hosts, parse_features(options.vcpu_features, hosts.values()), options.free)
    if options.output is not None and not found.refusals:
        with open_output(options.output) as file:
            file.write(to_json(found.contract).encode())
    if options.json:
        show.print_json("host baseline", show_contract.baseline_document(found))
        return DoesNotFit.exit_status if found.refusals else 0
    if options.output != "-":
        show.print_pairs(show_contract.baseline_pairs(found, options.output))
        if found.losses:
            show.print_table(show_contract.losses(found), 0)
    if found.refusals:
        raise DoesNotFit(list(found.refusals), "no contract that all of these hosts accept")
    return 0


def parse_features(words: str | None, hosts: Iterable[HostProfile]) -> int | None:
    """The mask of `--vcpu-features` for guests of these hosts; None where it isn't given. Raises: UsageError."""
    from migstream.model import Arch
    from migstream.registers import vcpu_features

    if words is None:
        return None
    if not any(host.arch == Arch.ARM64 for host in hosts):
        raise UsageError("--vcpu-features: vCPUs of arm64 have them; these hosts are x86_64")
    try:
        return vcpu_features.parse("" if words == "none" else words)
    except KeyError as error:
        raise UsageError(f"--vcpu-features: no vCPU feature {error}; there are "
                         f"{', '.join(vcpu_features.WORDS)}") from error


_VERBS = {"capture": _capture, "list": _list, "show": _show, "diff": _diff, "baseline": _baseline}
