"""The command line: `parity list|check|faults|compile|tune|bench|report|diff|new|doctor|all`.

Exit codes: 0 all is well, 1 a check failed (or a gate, or a comparison), 2 the command was not
understood, 3 this machine cannot do it, 130 interrupted. Every command says what its numbers mean
before it prints them; with --json it prints one JSON value on stdout and nothing else. Progress
goes to stderr.

`parity list` answers in under 0.3 s with no framework installed: argparse and not typer, and every
import in the function that needs it (NumPy, which the problems need, takes half of that time). This
file only parses; each command is the `run` of its file in parity/commands.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from parity.commands.shared import (
    INTERRUPTED,
    PAGE,
    PASS,
    TWINS,
    USAGE,
    Stop,
    nearest,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    as_json = False
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        as_json = args.json
        with _ended_like_interrupted():
            return args.run(args)
    except Stop as stop:
        print(f"parity: {stop}", file=sys.stderr)
        if as_json:
            print(json.dumps({"ok": False, "exit": stop.code, "error": str(stop)}))
        return stop.code
    except KeyboardInterrupt:
        print("parity: interrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `parity list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PASS


@contextlib.contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """SIGTERM (a job's time limit) ends the workers too, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever runs it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What was asked.


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints end in the nearest right word."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            word, choices = found[1], re.findall(r"[\w.-]+", found[2])
            subject = re.match(r"argument ([^:]*)", message)
            kind = subject[1] if subject and subject[1] != "command" else "command"
            message = f"no {kind} {word!r}{nearest(word, choices)}"
        raise Stop(USAGE, f"{message} (`{self.prog} --help`)")

    def options(self) -> list[str]:
        return [o for action in self._actions for o in action.option_strings]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="parity",
        description="GPU kernels written twice, in Triton and in Pallas: one judge, one ruler.",
        epilog="Exit codes: 0 pass, 1 a check failed, 2 usage, 3 this machine cannot.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands: dict[str, _Parser] = {}
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> _Parser:
        sub = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        sub.add_argument("--json", action="store_true", help="machine-readable output on stdout")
        sub.set_defaults(run=lambda args: import_module(f"parity.commands.{name}").run(args))
        commands[name] = sub
        return sub

    def one_pass(sub: _Parser) -> None:
        # parity.spec's, which is not imported for a word of help
        passes = "fwd bwd dw plan blocks cols int8 e4m3 prepack atomic".split()
        sub.add_argument("--pass", dest="which", choices=passes, help="only this one")

    def choosing(sub: _Parser, default: str, *, impl: bool = True) -> None:
        sub.add_argument("stems", nargs="*", metavar="STEM", help="problems (default: all)")
        sub.add_argument(
            "-w",
            "--workload",
            action="append",
            metavar="TAG|NAME",
            help="ci, model, huge or all, else a workload's name; STEM/NAME is that one alone, "
            f"even if it is named like a tag; may be repeated (default: {default})",
        )
        sub.add_argument("--twin", choices=TWINS, help="only this one")
        if impl:
            sub.add_argument(
                "--impl", metavar="FILE.py:function", help="your kernel in place of a twin"
            )
            sub.add_argument("--as", dest="impl_as", choices=TWINS, help="its language")

    sub = command("list", "problems, their workloads, and what runs on this machine")
    sub.add_argument("stem", nargs="?", metavar="STEM", help="show the workloads of one problem")

    sub = command("check", "compare both twins with the float64 oracle")
    choosing(sub, "ci on a CPU, ci and model on a GPU")
    sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    sub.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    sub.add_argument(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help="for one workload (default: 120 with --impl, else 300, on a GPU 600)",
    )
    sub.add_argument("--jobs", type=int, metavar="N", help="processes (default: 2 on a CPU)")
    one_pass(sub)
    sub.add_argument(
        "-s", "--sizes", type=sizes, metavar="M=3,N=70", help="instead of the workload's own"
    )
    sub.add_argument(
        "--without", type=names, metavar="NAME,...", help="options and optional inputs to leave out"
    )
    sub.add_argument(
        "--no-shrink",
        dest="shrink",
        action="store_false",
        help="do not look for the smallest case that fails",
    )

    sub = command("faults", "plant faults and see that the judge catches each")
    choosing(sub, "ci", impl=False)
    sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")

    sub = command("compile", "compile both twins for sm_90a; no GPU needed")
    choosing(sub, "model")
    sub.add_argument("--sass", action="store_true", help="insist on ptxas for the Pallas half")

    sub = command("explain", "why the twins are as fast as they are; no GPU needed")
    sub.add_argument("stems", nargs="*", metavar="STEM", help="a problem")
    sub.add_argument("-w", "--workload", metavar="NAME", help="a workload (default: the first)")
    one_pass(sub)
    sub.add_argument("--twin", choices=TWINS, help="only this one")
    sub.add_argument("--impl", metavar="FILE.py:function", help="your kernel in place of a twin")
    sub.add_argument("--as", dest="impl_as", choices=TWINS, help="its language")
    sub.add_argument(
        "--sass", action="store_true", help="the main loops in machine code, annotated"
    )
    sub.add_argument("--ncu", action="store_true", help="hardware counters too, on a GPU with ncu")
    sub.add_argument("--recorded", action="store_true", help="measure nothing, even on a GPU")
    sub.add_argument("--out", type=Path, metavar="FILE", help="append what was measured now")
    for side in ("--before", "--after"):
        text = "FILE.jsonl:LINE, or FILE.jsonl and -w, --pass, --twin: from one row to another"
        sub.add_argument(side, metavar="ROW", help=text)

    sub = command("tune", "search for faster Configs; prunes without a GPU, measures on a Hopper")
    choosing(sub, "model, without huge", impl=False)
    one_pass(sub)
    sub.add_argument("--exhaustive", action="store_true", help="every Config of the space")
    sub.add_argument("--resume", action="store_true", help="go on where the results stop")
    sub.add_argument("--budget", type=seconds, metavar="9m", help="stop in time: 90s, 9m, 1h")
    sub.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the results (default: parity/tuned/<device>)"
    )
    sub.add_argument("--dry-run", action="store_true", help="prune, and say what is left")
    sub.add_argument("--emit", action="store_true", help="write winners into default_config")

    sub = command("bench", "time both twins beside their peers; needs a Hopper GPU")
    choosing(sub, "model, without huge")
    one_pass(sub)
    sub.add_argument("--resume", action="store_true", help="only what the record file lacks")
    sub.add_argument("--budget", type=seconds, metavar="9m", help="stop in time: 90s, 9m, 1h")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the JSONL record file")
    sub.add_argument("--rounds", type=int, metavar="N", help="how often A B B A is repeated")
    sub.add_argument("--no-peers", action="store_true", help="only the twins")

    sub = command("report", "tables and a page from the records and the latest results")
    sub.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=PAGE,
        metavar="FILE",
        help="write one self-contained page (default: report/index.html)",
    )
    sub.add_argument("--readme", action="store_true", help="render README.md's table again")
    sub.add_argument("--check", action="store_true", help="with --readme: only say if it is stale")
    sub.add_argument("--coverage", action="store_true", help="what is green and timed, or why not")

    sub = command("diff", "what became faster or slower between two runs")
    sub.add_argument(
        "old",
        nargs="?",
        metavar="OLD",
        help="a record file, a folder of them or a git revision (default: the last commit's "
        "records; a single path is NEW)",
    )
    sub.add_argument("new", nargs="?", metavar="NEW", help="likewise (default: the records here)")
    sub.add_argument(
        "--fail-on", choices=("slower",), help="exit 1 if a twin became so, or its check red"
    )
    sub.add_argument("--all", action="store_true", help="every result, not only what changed")

    sub = command("new", "the files of a new problem, which run and are honestly wrong")
    sub.add_argument("stem", metavar="STEM", help="its name: a file, a function and a word here")
    sub.add_argument("--dry-run", action="store_true", help="print it as a patch, write nothing")

    command("doctor", "what this machine can run, and why not the rest")

    sub = command("all", "check, compile, bench on a Hopper GPU, report: `make parity`")
    sub.add_argument("--budget", type=seconds, metavar="9m", help="for the bench")
    sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")

    args, extra = parser.parse_known_args(argv)
    if args.version:
        from parity import __version__

        args.json, args.run = False, lambda _: print(f"parity {__version__}") or PASS
        return args
    if extra:
        # only options can be left over, or words that no positional takes
        prog = commands[args.command] if args.command else parser
        word = extra[0].partition("=")[0]
        kind = "option" if word.startswith("-") else "argument"
        hint = nearest(word, prog.options()) if kind == "option" else ""
        raise Stop(USAGE, f"{prog.prog} takes no {kind} {word!r}{hint} (`{prog.prog} --help`)")
    if not args.command:
        parser.print_help()
        args.json, args.run = False, lambda _: USAGE
    return args


def positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected more than 0 seconds, not {text!r}")
    return value


def sizes(text: str) -> dict[str, int]:
    """'M=3,N=70' as {"M": 3, "N": 70}."""
    found: dict[str, int] = {}
    for part in text.split(","):
        letter, equals, number = part.strip().partition("=")
        if not (equals and letter.isidentifier() and number.isdecimal()) or letter in found:
            raise argparse.ArgumentTypeError(f"expected M=3,N=70, not {text!r}")
        found[letter] = int(number)
    return found


def names(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def seconds(text: str) -> float:
    """'90s', '9m', '1h', '1h30m' or a plain number, in seconds."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not parts or not any(parts.groups()):
        raise argparse.ArgumentTypeError(f"expected 90s, 9m, 1h or 1h30m, not {text!r}")
    hours, minutes, seconds = (int(p or 0) for p in parts.groups())
    return float(3600 * hours + 60 * minutes + seconds)
