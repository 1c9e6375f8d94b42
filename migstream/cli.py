"""The command line: arguments, exit status, and which text goes where. The work is done elsewhere.

Data goes to standard output; progress (on a terminal only) and errors (one line) to standard error. Every import that
costs time is inside the command that needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from migstream import __version__, cli_check, cli_convert, cli_host, ending, native
from migstream.cli_files import open_contract, open_policy, stream_only
from migstream.cli_host import BACKENDS, Parser, open_profile
from migstream.errors import EXIT_STATUS, UsageError

if TYPE_CHECKING:
    from migstream.contract import Contract
    from migstream.model import Arch, Machine
    from migstream.report import Report
    from migstream.survey import Survey


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status (`errors.EXIT_STATUS`); 130 and the like where a signal said stop."""
    return ending.run("migstream", _run, argv)


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    epilog = "exit status: " + " · ".join(f"{number} {what}" for number, what in EXIT_STATUS.items())
    parser = Parser(prog="migstream", description="Save and restore the register state of KVM guests.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"migstream {__version__} ({native.DESCRIPTION})")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of the one-line error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, (run, build, text, examples) in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, epilog="examples: " + " · ".join(examples))
        sub.add_argument("--json", action="store_true", help="one JSON object instead of text")
        sub.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
        build(sub)
        sub.set_defaults(run=run)
    return parser


def _memory(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: 64M, 2G, 1048576")
    return int(number) * unit


def _vcpus(text: str) -> int:
    from migstream.limits import MAX_VCPUS

    if not text.isdigit() or not 1 <= int(text) <= MAX_VCPUS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_VCPUS}")
    return int(text)


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads from 1 to 256, or 0")
    return int(text)


def _add_threads(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--threads", type=_threads, default=0, metavar="N",
                     help="threads that read and write vCPUs; 0 = one for every 4 vCPUs, as many as CPUs (0)")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return value


def _vcpu_features(text: str) -> int:
    from migstream.registers import vcpu_features

    try:
        return vcpu_features.parse("" if text == "none" else text)
    except KeyError as error:
        words = ", ".join(vcpu_features.WORDS)
        raise argparse.ArgumentTypeError(f"no vCPU feature {error}; there are {words}") from error


# demo


def _demo_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--vcpus", type=_vcpus, default=4, metavar="N",
                     help="number of vCPUs (4); each host allows its own number")
    sub.add_argument("--memory", type=_memory, default=64 << 20, metavar="SIZE", help="guest RAM (64M)")
    sub.add_argument("--backend", default="auto", metavar="NAME", help=BACKENDS)
    sub.add_argument("--vcpu-features", type=_vcpu_features, default=0, metavar="LIST",
                     help="arm64: vCPU features by name, such as sve,pmu_v3,ptrauth")
    sub.add_argument("--contract", metavar="FILE", help="start the guest under a contract (`host baseline -o FILE`)")
    sub.add_argument("-o", dest="output", metavar="FILE", help="keep the stream in FILE")
    sub.add_argument("--run", dest="seconds", type=_seconds, default=0.2, metavar="SECONDS",
                     help="run on at least this long (0.2)")
    sub.add_argument("--level", type=int, default=1, metavar="N", help="zstd level, 0 = none (1)")
    _add_threads(sub)


def _demo(options: argparse.Namespace) -> int:
    from migstream.demo import run, screen
    from migstream.progress import progress

    if options.output == "-":
        raise UsageError("-o -: the demo's own result goes to standard output; name a file")

    contract = open_contract(options.contract) if options.contract else None
    if contract and options.vcpu_features:
        raise UsageError("--vcpu-features: the contract says them")
    features = contract.vcpu_features if contract else options.vcpu_features

    def machine(arch: Arch) -> Machine:
        return run.machine(arch, options.vcpus, options.memory, features)

    with progress() as tell:
        result = screen.demo(options.backend, machine, options.output, options.seconds, options.level,
                             options.threads, tell, contract)
    if options.json:
        from migstream.show import print_json

        print_json("demo", result.document())
    else:
        result.print()
    return 0


# inspect and verify


def _inspect_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", metavar="FILE|-")
    sub.add_argument("--vm", action="store_true", help="show VM-scoped registers")
    sub.add_argument("--vcpu", metavar="K|all", help="show registers of a vCPU; equal values of several together")
    sub.add_argument("--reg", metavar="GLOB", help="only registers or fields whose name (or id) matches")
    sub.add_argument("--contract", action="store_true",
                     help="what the guest was promised: feature and identity registers by name and field")
    sub.add_argument("-o", dest="output", metavar="FILE", help="with --contract: write it as a contract file")
    sub.add_argument("--section", type=int, metavar="N", help="show one section")
    sub.add_argument("--hex", action="store_true", help="with --section: its payload, decompressed, in hexadecimal")


def _inspect(options: argparse.Namespace) -> int:
    from migstream import show
    from migstream.survey import survey
    from migstream.transport import open_source

    if options.contract and (contract := _contract_file(options.file)):
        _check_inspect(options)
        if options.output is not None:
            raise UsageError(f"inspect -o: {options.file} is a contract file already")
        document = {"file": options.file, "contract": _shown_contract(contract, options.json)}
        if options.json:
            show.print_json("inspect", document)
        return 0
    stream_only(options.file)
    with open_source(options.file) as source:
        seen = survey(source, options.section)
    if seen.reader.preamble is None and seen.error:
        raise seen.error.in_file(options.file)
    document = show.survey_json(seen)
    _check_inspect(options)
    if options.contract:
        document["contract"] = _contract(options, seen)
        _keep_contract(options, seen)
    elif options.section is not None:
        document["section"] = _section(options, seen)
    elif options.vm or options.vcpu or options.reg is not None:
        document["registers"] = _registers(options, seen)
    elif not options.json:
        show.print_pairs(show.survey_pairs(options.file, seen))
        show.print_table(show.section_table(seen))
    if options.json:
        show.print_json("inspect", document)
    if seen.error:
        print(f"migstream: {seen.error.in_file(options.file)}", file=sys.stderr)
        return seen.error.exit_status
    return 0


def _contract_file(name: str) -> Contract | None:
    """The contract in a file of its own; None for any other file, and for a stream from a pipe."""
    if name == "-" or not os.path.isfile(name):
        return None
    with open(name, "rb") as file:
        return open_contract(name) if file.read(1) == b"{" else None


def _contract(options: argparse.Namespace, seen: Survey) -> dict[str, Any]:
    contract = seen.contract()
    return {} if contract is None else _shown_contract(contract, options.json)  # {}: an error, and it is said last


def _keep_contract(options: argparse.Namespace, seen: Survey) -> None:
    """Write the contract of a whole stream to a file of its own. Raises: OutputError."""
    from migstream.contract import to_json
    from migstream.transport import open_output

    contract = seen.contract()
    if options.output is None or contract is None or seen.error:
        return
    with open_output(options.output) as file:
        file.write(to_json(contract).encode())


def _shown_contract(contract: Contract, as_json: bool) -> dict[str, Any]:
    from migstream import show, show_contract

    if not as_json:
        show.print_pairs(show_contract.head(contract))
        show.print_table(show_contract.table(contract), 0)
        if zeros := show_contract.zeros(contract):
            show.print_pairs([("", f"{show.count(zeros, 'register')} more of these classes: 0")])
    return show_contract.document(contract)


def _check_inspect(options: argparse.Namespace) -> None:
    if options.output is not None and (not options.contract or options.output == "-"):
        raise UsageError("inspect -o: a file for what --contract shows of a stream")
    if options.contract and (options.vm or options.vcpu or options.reg is not None or options.section is not None):
        raise UsageError("--contract shows the contract alone: not with --vm, --vcpu, --reg or --section")
    if options.hex and options.section is None:
        raise UsageError("--hex goes with --section")
    if options.reg == "":
        raise UsageError("--reg: an empty pattern matches nothing")
    if options.section is not None and (options.vm or options.vcpu or options.reg is not None):
        raise UsageError("--section shows a section, --vm, --vcpu and --reg show registers: one or the other")


def _registers(options: argparse.Namespace, seen: Survey) -> list[dict[str, Any]]:
    from migstream import show
    from migstream.model import Scope

    if seen.reader.machine is None:
        return []  # likewise
    vcpus = _vcpu_range(options.vcpu, seen.reader.machine.vcpus)
    scopes = [(Scope.VM, options.vm or not options.vcpu), (Scope.VCPU, bool(options.vcpu) or not options.vm)]
    pattern = "*" if options.reg is None else options.reg
    groups = [group for scope, wanted in scopes if wanted
              for group in show.register_groups(seen.banks, scope, vcpus, pattern)]
    if not groups and seen.error:  # what is asked for may stand behind the fault: that is the answer
        return []
    if not groups:
        hint = next((f"; {there} shows one" for scope, there in ((Scope.VM, "--vm"), (Scope.VCPU, "--vcpu all"))
                     if any(show.register_groups(seen.banks, scope, range(seen.reader.machine.vcpus), pattern))), "")
        raise UsageError(f"{options.file}: no register or field here matches {pattern!r}{hint}")
    if not options.json:
        for group in groups:
            show.print_group(group, pattern)
    return [show.group_json(group) for group in groups] if options.json else []


def _vcpu_range(text: str | None, count: int) -> range:
    if text is None or text == "all":
        return range(count)
    if not text.isdigit() or int(text) >= count:
        raise UsageError(f"--vcpu {text}: this stream has vCPUs 0 to {count - 1}")
    return range(int(text), int(text) + 1)


def _section(options: argparse.Namespace, seen: Survey) -> dict[str, Any]:
    from migstream import codec, show

    if seen.picked is None and seen.error:
        return {}
    if seen.picked is None:
        raise UsageError(f"{options.file}: no section {options.section}; it has 0 to {seen.rows[-1].number}")
    section, item = seen.picked
    names = ("kind", "version", "flags", "scope", "codec", "filter", "layout", "first_vcpu", "vcpu_count", "offset",
             "raw_length")
    header = {name: getattr(section, name) for name in names} | {"stored_length": len(section.stored)}
    raw = codec.decompress(section.codec, bytes(section.stored), section.raw_length) if options.hex else b""
    if not options.json:
        show.print_pairs((name, str(value)) for name, value in header.items())
        if options.hex:
            print("\n".join(show.hex_lines(raw)))
        else:
            show.print_pairs([("content", repr(item))])
    return header | ({"payload": raw.hex()} if options.hex else {})


def _verify_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", metavar="FILE|-")
    sub.add_argument("-q", "--quiet", action="store_true", help="say nothing: the exit status is the answer")


def _verify(options: argparse.Namespace) -> int:
    from migstream import show
    from migstream.errors import StreamError
    from migstream.reader import StreamReader
    from migstream.transport import open_source, verify

    reader = StreamReader()
    stream_only(options.file)
    try:
        with open_source(options.file) as source:
            length = verify(source, reader)
    except StreamError as error:
        if options.quiet:
            return error.exit_status
        raise error.in_file(options.file) from error.__cause__
    assert reader.machine is not None
    if options.json:
        show.print_json("verify", {"good": True, "length": length, "vcpus": reader.machine.vcpus})
    elif not options.quiet:
        print(f"{options.file}: good; {show.size(length)}, {reader.machine.vcpus} vCPUs, "
              f"{len(reader.layouts)} layouts, all checksums and values decoded")
    return 0


# replay


def _replay_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", metavar="FILE|-")
    sub.add_argument("--backend", default="auto", metavar="NAME", help=BACKENDS)
    sub.add_argument("--host", metavar="FILE", help="this host's profile from `host capture`: its measured scopes")
    sub.add_argument("--readback", action="store_true", help="read every register back and compare")
    sub.add_argument("--policy", metavar="FILE", help="TOML: what the operator overrules, as for `check`")
    sub.add_argument("--fault", metavar="WHAT", help=argparse.SUPPRESS)
    sub.add_argument("--run", dest="seconds", type=_seconds, metavar="SECONDS",
                     help="let the guest run on, then stop it")
    _add_threads(sub)


def _replay(options: argparse.Namespace) -> int:
    from migstream import show
    from migstream.backends import open_backend
    from migstream.backends.faulty import FaultyBackend, parse
    from migstream.errors import StreamError
    from migstream.transport import Restorer, open_source, read_chunks

    stream_only(options.file)
    policy = open_policy(options.policy)
    backend = open_backend(options.backend)
    if options.host:
        backend.know(open_profile(options.host))
    if options.fault is not None:
        backend = FaultyBackend(backend, parse(options.fault, backend.profile()))
    ran: dict[str, Any] = {}
    try:
        with (open_source(options.file) as source,
              Restorer(backend, readback=options.readback, policy=policy, threads=options.threads) as restorer):
            for data in read_chunks(source, restorer.reader):
                restorer.feed(data)
            vm, report = restorer.finish()
    except StreamError as error:
        raise error.in_file(options.file) from error.__cause__
    with vm:
        if options.seconds is not None:
            from migstream.demo.run import continue_guest

            ran = continue_guest(vm, report.opaque, options.seconds)
    if isinstance(backend, FaultyBackend):
        backend.check()
    if options.json:
        show.print_json("replay", {"backend": backend.name, **show.report_json(report), "run": ran})
    else:
        _print_replay(options, backend.name, report, ran)
    return 10 if report.lossy or any(verdict.loses for verdict in report.verdicts) else 0


def _print_replay(options: argparse.Namespace, backend: str, report: Report, ran: dict[str, Any]) -> None:
    from migstream import show

    show.print_pairs([("restored", f"{options.file}, {show.size(report.bytes)}, on {backend}")])
    show.print_table(show.writes_table(report))
    time = show.time_json(report)
    pairs = [("time", show.times(report.times, time)), *show.time_pairs(time), *show.report_remarks(report)]
    if "steps_after" in ran:
        before, after = ran["steps_before"][0], ran["steps_after"][0]
        pairs.append(("ran on", f"every vCPU counted on without a gap; vCPU 0: {before} -> {after}"))
    elif ran:
        pairs.append(("ran on", f"{len(ran['exits'])} vCPUs stopped by themselves" if ran["exits"] else "all vCPUs"))
    show.print_pairs(pairs)


_COMMANDS: dict[str, tuple[Any, Any, str, tuple[str, str]]] = {
    "demo": (_demo, _demo_arguments, "save a running guest, restore it in another process, check that it counts on",
             ("migstream demo", "migstream demo --vcpus 240 --backend kvm -o v.mig")),
    "inspect": (_inspect, _inspect_arguments, "show what is in a stream; FILE - is standard input",
                ("migstream inspect v.mig", "migstream inspect v.mig --vcpu all --reg 'MSR_*TSC*'")),
    "check": (cli_check.run, cli_check.arguments, "whether hosts can take a guest, and give it back, by register",
              ("migstream check v.mig --host arm64-7.2 --reverse", "migstream check --fleet arm64-6.12 arm64-7.2")),
    "convert": (cli_convert.run, cli_convert.arguments,
                "a stream for another host or an older format; only what the guest can't have seen is changed",
                ("migstream convert v.mig -o w.mig --for-host arm64-7.2",
                 "migstream convert v.mig -o w.mig --format-minor 0")),
    "verify": (_verify, _verify_arguments, "check every byte of a stream",
               ("migstream verify v.mig", "cat v.mig | migstream verify -q -")),
    "replay": (_replay, _replay_arguments, "restore a stream into a fresh VM and report what was written",
               ("migstream replay v.mig --backend kvm --readback", "migstream replay v.mig --backend sim --run 1")),
    "host": (cli_host.run, cli_host.arguments, "capture, list, show and compare host profiles",
             ("migstream host capture -o here.json", "migstream host diff here.json arm64-6.12")),
}
