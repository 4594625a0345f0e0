"""The command line: `puzzles list|next|check|hint|show|reset|watch|report|doctor|author`.

Exit codes as parity's: 0 all is well, 1 a check failed, 2 the command was not understood, 3 this
machine cannot do it, 130 interrupted. A machine that cannot is never counted as a failure.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from parity.commands.shared import INTERRUPTED, PASS, TWINS, USAGE, Stop, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    as_json = False
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        as_json = args.json
        return import_module("puzzles.commands").COMMANDS[args.command](args)
    except Stop as stop:
        print(f"puzzles: {stop}", file=sys.stderr)
        if as_json:
            print(json.dumps({"ok": False, "exit": stop.code, "error": str(stop)}))
        return stop.code
    except KeyboardInterrupt:
        print("puzzles: interrupted; progress is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `puzzles list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PASS


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints end in the nearest right word."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            word, choices = found[1], re.findall(r"[\w.-]+", found[2])
            message = f"no {word!r} here{nearest(word, choices)}"
        raise Stop(USAGE, f"{message} (`{self.prog} --help`)")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="puzzles",
        description="Quantized kernels, one hole at a time: fill it in Triton or Pallas, and be "
        "told precisely what is wrong. No GPU needed.",
        epilog="Start with `puzzles next`. Exit codes: 0 pass, 1 a check failed, 2 usage, 3 this "
        "machine cannot.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, *, puzzle: str | None = "", backend: bool = False) -> _Parser:
        sub = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        if puzzle != "":
            sub.add_argument("puzzle", nargs=puzzle, metavar="qNN", help="a puzzle")
        if backend:
            sub.add_argument("-b", "--backend", choices=TWINS, help="the language")
        sub.add_argument("--folder", type=Path, help="yours (default: ./my_puzzles)")
        sub.add_argument("--json", action="store_true", help="machine-readable output on stdout")
        return sub

    command("list", "the track: what is solved, what can be reached on this machine")
    command(
        "next", "the next puzzle, or this one: its statement, and a skeleton to fill",
        puzzle="?", backend=True,
    )  # fmt: skip
    sub = command("check", "grade your file", puzzle=None, backend=True)
    sub.add_argument("--seed", type=seed, help="of an earlier check, to see it again")
    sub.add_argument("--file", type=Path, help="grade this file instead of yours")
    command("hint", "one more hint; the earlier ones too", puzzle=None)
    command("show", "statement, and the solution once you solved it", puzzle=None, backend=True)
    command("reset", "put the skeleton back; your file is kept", puzzle=None, backend=True)
    command("watch", "check a file again whenever you save it", puzzle="?", backend=True)
    command("report", "what you have done so far")
    command("doctor", "what this machine can run")
    sub = command("author", "for authors: new, check, mutants, calibrate")
    sub.add_argument("action", choices=("new", "check", "mutants", "calibrate"))
    sub.add_argument("puzzles", nargs="*", metavar="qNN", help="default: all")
    sub.add_argument("-b", "--backend", choices=TWINS, help="only this language")

    args, extra = parser.parse_known_args(argv)
    if extra:
        raise Stop(USAGE, f"{args.command or 'puzzles'} takes no {extra[0]!r} (`puzzles --help`)")
    if not args.command:
        parser.print_help()
        raise SystemExit(USAGE)
    return args


def seed(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{1,16}", text):
        raise argparse.ArgumentTypeError(f"expected hexadecimal digits, not {text!r}")
    return text.lower()
