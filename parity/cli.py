"""The command line: `parity list|check|faults|compile|bench|report|diff|doctor|all`.

Exit codes: 0 all is well, 1 a check failed (or a gate, or a comparison), 2 the command was not
understood, 3 this machine cannot do it, 130 interrupted. Every command says what its numbers mean
before it prints them; with --json it prints one JSON value on stdout and nothing else. Progress
goes to stderr.

`parity list` answers in under 0.3 s with no framework installed: argparse and not typer, and every
import in the function that needs it (NumPy, which the problems need, takes half of that time).
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import rich.console

    import parity.spec

PASS, FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
TWINS = ("triton", "pallas")
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "report" / "index.html"

Pair = tuple["parity.spec.Problem", "parity.spec.Workload"]


class Stop(Exception):
    """Ends the command with one sentence on stderr and an exit code."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


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
            message = f"no {kind} {word!r}{_nearest(word, choices)}"
        raise Stop(USAGE, f"{message} (`{self.prog} --help`)")

    def options(self) -> list[str]:
        return [o for action in self._actions for o in action.option_strings]


def _nearest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(choices)})"


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

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        sub = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        sub.add_argument("--json", action="store_true", help="machine-readable output on stdout")
        sub.set_defaults(run=run)
        commands[name] = sub
        return sub

    def choosing(sub: _Parser, default: str, *, impl: bool = True) -> None:
        sub.add_argument("stems", nargs="*", metavar="STEM", help="problems (default: all)")
        sub.add_argument(
            "-w",
            "--workload",
            action="append",
            metavar="NAME|TAG",
            help=f"a workload, or ci, model, huge, all; may be repeated (default: {default})",
        )
        sub.add_argument("--twin", choices=TWINS, help="only this one")
        if impl:
            sub.add_argument(
                "--impl", metavar="FILE.py:function", help="your kernel in place of a twin"
            )
            sub.add_argument("--as", dest="impl_as", choices=TWINS, help="its language")

    sub = command("list", _list, "problems, their workloads, and what runs on this machine")
    sub.add_argument("stem", nargs="?", metavar="STEM", help="show the workloads of one problem")

    sub = command("check", _check, "compare both twins with the float64 oracle")
    choosing(sub, "ci on a CPU, ci and model on a GPU")
    sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    sub.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    sub.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help="for one workload (default: 120 with --impl, else 300, on a GPU 600)",
    )
    sub.add_argument("--jobs", type=int, metavar="N", help="processes (default: 2 on a CPU)")

    sub = command("faults", _faults, "plant faults and see that the judge catches each")
    choosing(sub, "ci", impl=False)
    sub.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")

    sub = command("compile", _compile, "compile both twins for sm_90a; no GPU needed")
    choosing(sub, "model")
    sub.add_argument("--sass", action="store_true", help="insist on ptxas for the Pallas half")

    sub = command("bench", _bench, "time both twins beside their peers; needs a Hopper GPU")
    choosing(sub, "model, without huge")
    sub.add_argument("--resume", action="store_true", help="only what the record file lacks")
    sub.add_argument("--budget", type=_seconds, metavar="9m", help="stop in time: 90s, 9m, 1h")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the JSONL record file")
    sub.add_argument("--rounds", type=int, metavar="N", help="how often A B B A is repeated")
    sub.add_argument("--no-peers", action="store_true", help="only the twins")

    sub = command("report", _report, "tables and a page from the records and the latest results")
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

    sub = command("diff", _diff, "compare two record files")
    sub.add_argument("old", type=Path, metavar="OLD")
    sub.add_argument("new", type=Path, metavar="NEW")
    sub.add_argument("--fail-on", choices=("slower",), help="exit 1 if anything became so")

    command("doctor", _doctor, "what this machine can run, and why not the rest")

    sub = command("all", _all, "check, compile, bench on a Hopper GPU, report: `make parity`")
    sub.add_argument("--budget", type=_seconds, metavar="9m", help="for the bench")
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
        hint = _nearest(word, prog.options()) if kind == "option" else ""
        raise Stop(USAGE, f"{prog.prog} takes no {kind} {word!r}{hint} (`{prog.prog} --help`)")
    if not args.command:
        parser.print_help()
        args.json, args.run = False, lambda _: USAGE
    return args


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected more than 0 seconds, not {text!r}")
    return value


def _seconds(text: str) -> float:
    """'90s', '9m', '1h', '1h30m' or a plain number, in seconds."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not parts or not any(parts.groups()):
        raise argparse.ArgumentTypeError(f"expected 90s, 9m, 1h or 1h30m, not {text!r}")
    hours, minutes, seconds = (int(p or 0) for p in parts.groups())
    return float(3600 * hours + 60 * minutes + seconds)


def _problems(stems: Sequence[str]) -> list["parity.spec.Problem"]:
    from parity.problems import PROBLEMS, problem

    try:
        return [problem(stem) for stem in dict.fromkeys(stems)] if stems else list(PROBLEMS)
    except KeyError as e:
        raise Stop(USAGE, e.args[0]) from None


def _selected(args: argparse.Namespace, default: Sequence[str]) -> list[Pair]:
    """The workloads that the names and tags of -w mean, in the order of the problems."""
    problems = _problems(args.stems)
    words = args.workload or default
    names = {w.name for p in problems for w in p.workloads}
    tags = {t for p in problems for w in p.workloads for t in w.tags} | {"all"}
    for word in args.workload or ():
        if word not in names | tags:
            where = f"{', '.join(p.stem for p in problems)} "
            near = _nearest(word, [*tags, *names])
            near = near if near.startswith(";") else " (`parity list` shows them)"
            raise Stop(USAGE, f"{where}has no workload {word!r}{near}")
    wanted = [
        (p, w)
        for p in problems
        for w in p.workloads
        if any(word in (w.name, "all", *w.tags) for word in words)
    ]
    return wanted


def _implementations(args: argparse.Namespace) -> dict[str, str] | None:
    """What --impl and --as ask for: {twin: target}, or None for the twins of each problem."""
    if not args.impl:
        if args.impl_as:
            raise Stop(USAGE, "--as goes with --impl FILE.py:function")
        return None
    if len(args.stems) != 1:
        raise Stop(USAGE, "--impl needs exactly one STEM to be checked against")
    place, _, name = args.impl.rpartition(":")
    if not place or not name.isidentifier():
        raise Stop(USAGE, f"--impl takes FILE.py:function, not {args.impl!r}")
    twin = args.impl_as or args.twin
    if twin is None:
        raise Stop(USAGE, "--impl needs --as triton or --as pallas")
    if args.twin not in (None, twin):
        raise Stop(USAGE, f"--twin {args.twin} contradicts --as {twin}")
    if not place.endswith(".py"):
        return {twin: args.impl}
    path = Path(place)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = _nearest(path.name, beside) if beside else ""
        raise Stop(USAGE, f"no file {place!r}{near if near.startswith(';') else ''}")
    return {twin: f"{path.resolve()}:{name}"}


# What is shown.


def _console(*, stderr: bool = False) -> "rich.console.Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 120
    return Console(stderr=stderr, highlight=False, width=wide, soft_wrap=False)


def _print_json(value: Any) -> None:
    from parity.workers import finite

    print(json.dumps(finite(value), default=str))


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr; where stderr is no terminal, one plain line per finished step.

    Yields tell(phrase, done=None): `done` steps are finished, `phrase` is what happens now.
    """
    if not sys.stderr.isatty():
        last = 0

        def plain(phrase: str, done: int | None = None) -> None:
            nonlocal last
            if done is not None and done > last:
                last = done
                print(f"{what} {done}/{total}: {phrase}", file=sys.stderr, flush=True)

        yield plain
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(what),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total or None)

        def tell(phrase: str, done: int | None = None) -> None:
            bar.update(task, description=phrase, completed=done)

        yield tell


# parity list


def _list(args: argparse.Namespace) -> int:
    from parity import doctor

    problems = _problems([args.stem] if args.stem else [])
    machine = doctor.machine()
    if args.json:
        _print_json(
            {
                "machine": machine.to_json(),
                "problems": [_described(p) for p in problems],
            }
        )
        return PASS
    print(machine.sentence())
    if not args.stem:
        width = max(len(p.stem) for p in problems)
        for p in problems:
            line = p.doc.strip().splitlines()[0].rstrip(".:")
            tags = [sum(tag in w.tags for w in p.workloads) for tag in ("ci", "model")]
            print(f"\n{p.stem:<{width}}  {line}")
            print(f"{'':<{width}}  {tags[0]} ci and {tags[1]} model workloads; {_who(p)}")
        print("\n`parity list STEM` shows the workloads, `parity check STEM` checks them.")
        return PASS
    p = problems[0]
    print(f"\n{p.doc.strip()}\n\nTwins: {_who(p)}\n")
    names = max(len(w.name) for w in p.workloads)
    for w in p.workloads:
        sizes = " ".join(f"{k}={v}" for k, v in w.sizes.items())
        options = "".join(f" {k}={v}" for k, v in w.options.items())
        print(f"  {w.name:<{names}}  {w.dtype:<9} {', '.join(w.tags):<21} {sizes}{options}")
    return PASS


def _who(p: "parity.spec.Problem") -> str:
    return ", ".join((*p.implementations, *(f"peer:{name}" for name in p.peers)))


def _described(p: "parity.spec.Problem") -> dict[str, Any]:
    return {
        "stem": p.stem,
        "doc": p.doc.strip(),
        "implementations": dict(p.implementations),
        "peers": dict(p.peers),
        "workloads": [
            {
                "name": w.name,
                "sizes": dict(w.sizes),
                "dtype": w.dtype,
                "tags": list(w.tags),
                "options": dict(w.options),
                "passes": list(w.passes),
            }
            for w in p.workloads
        ],
    }


# parity check


def _mode(device: str) -> str:
    """ "cpu" for the interpreters or "gpu" for compiled kernels."""
    from parity import doctor

    machine = doctor.machine()
    if device == "gpu" and not machine.compiled():
        why = machine.problem or machine.sentence()
        raise Stop(ENVIRONMENT, f"--device gpu: {why} (`parity check --device cpu` works here)")
    return "cpu" if device == "cpu" or not machine.compiled() else "gpu"


def _runnable(twins: Sequence[str], mode: str) -> dict[str, str]:
    """{twin: why it cannot run here}, "" for one that can."""
    from parity import doctor

    needs = {"triton": ("torch", "triton"), "pallas": ("torch", "jax")}
    why = dict.fromkeys(twins, "")
    for twin in twins:
        missing = [name for name in needs[twin] if importlib.util.find_spec(name) is None]
        if missing:
            why[twin] = f"{' and '.join(missing)} not installed"
        elif mode == "gpu" and twin not in doctor.machine().compiled():
            why[twin] = "the Pallas twins need a Hopper GPU (--device cpu interprets them)"
    if all(why.values()):
        reasons = "; ".join(f"{twin}: {reason}" for twin, reason in why.items())
        raise Stop(ENVIRONMENT, f"no twin can run here ({reasons}); `parity doctor` says more")
    return why


_NOT_ON_A_CPU = (
    "bfloat16 at full size: Triton's interpreter gets bfloat16 products wrong, and an interpreter "
    "would take hours (the compile gate compiles it; a GPU checks it)"
)


def _skipped(p: "parity.spec.Problem", w: "parity.spec.Workload") -> dict[str, str]:
    return {"problem": p.stem, "workload": w.name, "why": _NOT_ON_A_CPU}


def _judged(
    selection: Sequence[Pair],
    *,
    mode: str,
    twins: Sequence[str] = TWINS,
    impls: dict[str, str] | None = None,
    seed: int = 0,
    timeout: float | None = None,
    workers: int | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Runs the checks in child processes: (rows in order, what was not run and why)."""
    from parity import report
    from parity import workers as crew

    able = _runnable(tuple(impls or twins), mode)
    jobs, skipped = [], []
    for p, w in selection:
        if mode == "cpu" and "ci" not in w.tags:
            skipped.append(_skipped(p, w))
            continue
        targets = dict(impls or {twin: p.implementations[twin] for twin in twins})
        skipped += [
            {"problem": p.stem, "workload": w.name, "twin": twin, "why": able[twin]}
            for twin in targets
            if able[twin]
        ]
        targets = {twin: target for twin, target in targets.items() if not able[twin]}
        alone = "huge" in w.tags
        jobs.append(crew.Job(p.stem, w.name, w.passes, w.dtype, targets, seed, alone))
    if not jobs and selection:
        raise Stop(ENVIRONMENT, f"none of the workloads runs here: {skipped[0]['why']}")

    log = report.LOCAL / "workers.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    answers: dict[str, tuple[dict, ...]] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or (min(2, cores or 1) if mode == "cpu" and not impls else 1)
    with _progress(len(jobs), "check") as tell, _broken_is_environment():
        events = crew.run(
            jobs,
            mode=mode,
            workers=workers,
            timeout=timeout,
            give_up=impls is not None,
            log=log,
        )
        with contextlib.closing(events):
            for event in events:
                if event.rows is None:
                    tell(event.phrase)
                    continue
                answers[event.job.name] = event.rows
                if impls is None:
                    report.keep_checks(event.rows, mode, event.job.impls)
                bad = next((row["reason"] for row in event.rows if not row["ok"]), "")
                tell(f"{event.job.name}: {bad or 'ok'}", len(answers))
    return [row for job in jobs for row in answers[job.name]], skipped


@contextlib.contextmanager
def _broken_is_environment() -> Iterator[None]:
    from parity.workers import Broken

    try:
        yield
    except Broken as e:
        raise Stop(ENVIRONMENT, f"no check can run here: {e} (`parity doctor` says more)") from None


def _check(args: argparse.Namespace) -> int:
    impls = _implementations(args)
    mode = _mode(args.device)
    selection = _selected(args, ("ci",) if mode == "cpu" else ("ci", "model"))
    began = time.perf_counter()
    rows, skipped = _judged(
        selection,
        mode=mode,
        twins=(args.twin,) if args.twin else TWINS,
        impls=impls,
        seed=args.seed,
        timeout=args.timeout or (120.0 if impls else 300.0 if mode == "cpu" else 600.0),
        workers=args.jobs,
    )
    if mode == "cpu" and not args.workload:  # what the default leaves out is said, not hidden
        everything = [(p, w) for p in _problems(args.stems) for w in p.workloads]
        skipped += [_skipped(p, w) for p, w in everything if "ci" not in w.tags]
    ok = all(row["ok"] for row in rows)
    if args.json:
        _print_json(
            {"ok": ok, "device": mode, "seed": args.seed, "checks": rows, "not_run": skipped}
        )
    else:
        _show_checks(rows, skipped, mode, time.perf_counter() - began)
    return PASS if ok else FAILED


def _show_checks(rows: list[dict], skipped: list[dict], mode: str, seconds: float) -> None:
    from parity import report

    console = _console()
    bad = [row for row in rows if not row["ok"]]
    console.print(report.sentence_of_checks(rows, mode) + f" ({seconds:.0f} s)")
    console.print(report.check_table(rows, console.width))
    alike: dict[tuple[str, str], list[str]] = {}
    for row in bad:
        name = f"{row['problem']} {row['workload']} {row['which']} {row['impl']}"
        alike.setdefault((row["reason"], row["detail"]), []).append(name)
    for (reason, detail), names in alike.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"[bold red]{reason}[/]: {', '.join(names[:3])}{more}")
        console.print(f"  {detail}", markup=False)
    if any(row["reason"] in ("crash", "timeout") for row in bad):
        console.print(f"What the workers printed: {report.LOCAL / 'workers.log'}", markup=False)
    by_reason: dict[str, list[dict]] = {}
    for item in skipped:
        by_reason.setdefault(item["why"], []).append(item)
    for why, items in by_reason.items():
        names = list(dict.fromkeys(i.get("twin") or i["problem"] for i in items))
        console.print(
            f"Not run: {len(items)} workloads of {', '.join(names)}. {why[0].upper() + why[1:]}.",
            markup=False,
        )


# parity compile


def _faults(args: argparse.Namespace) -> int:
    """Wrong answers on each workload; kernels that cheat on the first of each problem."""
    pairs = _selected(args, ("ci",))
    mode = _mode(args.device)
    wanted = (args.twin,) if args.twin else TWINS
    twins = [twin for twin, why in _runnable(wanted, mode).items() if not why]
    from parity import faults, frameworks

    frameworks.interpreters() if mode == "cpu" else frameworks.gpu()
    firsts = {p.stem: w for p, w in reversed(pairs)}
    rows: list[faults.Caught] = []
    with _progress(len(pairs), "faults") as tell:
        for done, (p, w) in enumerate(pairs, 1):
            tell(f"{p.stem} {w.name}")
            rows += faults.answers(p, w)
            for twin in twins if firsts[p.stem] is w else ():
                tell(f"{p.stem} {w.name}: {twin} cheats")
                rows += faults.behaviours(p, w, twin)
            tell(f"{p.stem} {w.name}", done)
    ok = all(row.ok for row in rows)
    if args.json:
        _print_json([asdict(row) | {"ok": row.ok} for row in rows])
        return PASS if ok else FAILED
    _show_faults(rows, mode)
    return PASS if ok else FAILED


def _show_faults(rows: list[Any], mode: str) -> None:
    from rich.table import Table

    console = _console()
    planted = [row for row in rows if row.fault != "none"]
    killed = sum(row.ok for row in planted)
    where = "in the interpreters" if mode == "cpu" else "on the GPU"
    console.print(
        f"Kill rate {killed} of {len(planted)} {where}: each fault was planted on purpose, and "
        f"counts as caught only for the right reason. The right answers passed "
        f"{sum(row.ok for row in rows if row.fault == 'none')} times."
    )
    table = Table(box=None, header_style="bold")
    for column in ("fault", "caught", "planted", "for being"):
        table.add_column(column, justify="right" if column in ("caught", "planted") else "left")
    for fault in dict.fromkeys(row.fault for row in planted):
        of = [row for row in planted if row.fault == fault]
        found = ", ".join(sorted({row.found or "nothing" for row in of}))
        table.add_row(fault.replace("_", " "), str(sum(r.ok for r in of)), str(len(of)), found)
    console.print(table)
    for row in rows:
        if not row.ok:
            console.print(
                f"[red]{row.problem} {row.workload} {row.which}[/red]: {row.fault} was judged "
                f"{row.found or 'right'!r}, expected {' or '.join(row.reasons) or 'a pass'}. "
                f"{row.detail}"
            )


def _compile(args: argparse.Namespace) -> int:
    rows, skipped = _gated(
        _selected(args, ("model",)),
        twins=(args.twin,) if args.twin else TWINS,
        impls=_implementations(args),
        sass=True if args.sass else None,
    )
    ok = not any(row["status"] == "fail" for row in rows)
    if args.json:
        _print_json({"ok": ok, "kernels": rows, "not_run": skipped})
    else:
        _show_compiles(rows, skipped)
    return PASS if ok else FAILED


def _gated(
    selection: Sequence[Pair],
    *,
    twins: Sequence[str] = TWINS,
    impls: dict[str, str] | None = None,
    sass: bool | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Runs the compile gate: (rows, what was not run and why)."""
    from parity import report
    from parity.compile import compile_gate

    able = _runnable(tuple(impls or twins), "cpu")
    chosen = [twin for twin in (impls or twins) if not able[twin]]
    skipped = [{"twin": twin, "why": why} for twin, why in able.items() if why]
    problems = list({p.stem: p for p, _ in selection}.values())
    names = {w.name for _, w in selection}  # words of -w mean the same in every problem
    with _progress(len(selection) * len(chosen), "compile") as tell:
        try:
            found = compile_gate(
                problems,
                workloads=names,
                twins=chosen,
                implementations=impls,
                sass=sass,
                progress=lambda done, _, what: tell(what, done),
            )
        except FileNotFoundError as e:
            raise Stop(ENVIRONMENT, str(e)) from None
    rows = [row.to_json() for row in found]
    if impls is None:
        report.keep_compiles(rows)
    return rows, skipped


def _show_compiles(rows: list[dict], skipped: list[dict], *, only_failures: bool = False) -> None:
    from parity import report

    console = _console()
    console.print(report.sentence_of_compiles(rows))
    bad = [row for row in rows if row["status"] == "fail"]
    shown = bad if only_failures else rows
    if shown:
        console.print(report.compile_table(shown, console.width))
    for row in bad:
        place = f"{row['problem']} {row['workload']} {row['pass']} {row['twin']} {row['kernel']}"
        console.print(f"{place}: {row['message']}", markup=False)
    for item in skipped:
        console.print(f"Not compiled: {item['twin']} ({item['why']}).", markup=False)


# parity bench


def _bench(args: argparse.Namespace) -> int:
    impls = _implementations(args)
    selection = _selected(args, ("model",))
    if not args.workload:
        selection = [(p, w) for p, w in selection if _worth_timing(w)]
    if any("ci" in w.tags for _, w in selection):
        raise Stop(USAGE, "ci workloads are too small to be timed; choose model ones")
    rows, left = _timed(
        selection,
        twins=(args.twin,) if args.twin else TWINS,
        impls=impls,
        out=args.out,
        resume=args.resume,
        budget=args.budget,
        rounds=args.rounds,
        peers=not args.no_peers,
    )
    red = any(row["check"].startswith("fail") for row in rows)
    if args.json:
        _print_json({"ok": not red, "rows": rows, "left": left})
    else:
        _show_bench(rows, left)
    return FAILED if red else PASS


def _needs_hopper() -> None:
    from parity import doctor

    machine = doctor.machine()
    if not machine.hopper:
        here = machine.gpu.name if machine.gpu else machine.problem
        raise Stop(ENVIRONMENT, f"timing needs a Hopper GPU, and here is none: {here}")


def _timed(
    selection: Sequence[Pair],
    *,
    twins: Sequence[str] = TWINS,
    impls: dict[str, str] | None = None,
    out: Path | None = None,
    resume: bool = False,
    budget: float | None = None,
    rounds: int | None = None,
    peers: bool = True,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures and records: (new rows, the steps that the budget did not reach)."""
    _needs_hopper()
    _runnable(tuple(impls or twins), "gpu")
    from parity import frameworks, report
    from parity.bench import Campaign, Machine
    from parity.device import WarmCache
    from parity.timing import NothingSeen

    frameworks.gpu()
    if impls is not None:  # someone's own kernel never lands among the twins' records
        out = out or report.LOCAL / "bench-impl.jsonl"
    end = None if budget is None else time.monotonic() + budget
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    by_problem: dict[str, list[tuple[Any, Any]]] = {}
    for p, w in selection:
        by_problem.setdefault(p.stem, []).append((p, w))
    total = sum(len(w.passes) for _, w in selection)
    done = 0
    with _progress(total, "bench") as tell:
        try:
            machine = Machine.here()
            for pairs in by_problem.values():
                p = pairs[0][0]
                how: dict[str, Any] = {"peers": peers, "progress": tell}
                how["impls"] = impls or {twin: p.implementations[twin] for twin in twins}
                if rounds:
                    how["rounds"] = rounds
                campaign = Campaign(
                    pairs,
                    out=out,
                    resume=resume,
                    budget=None if end is None else max(0.0, end - time.monotonic()),
                    machine=machine,
                    **how,
                )
                done += len(campaign.standing)
                remaining = len(campaign.left)
                for row in campaign:
                    rows.append(row)
                    finished = remaining - len(campaign.left)
                    tell(f"{row['problem']} {row['workload']} {row['pass']}", done + finished)
                done += remaining
                left += [f"{s.problem.stem} {s.work.name} {s.which}" for s in campaign.left]
        except (NothingSeen, WarmCache) as e:
            raise Stop(ENVIRONMENT, f"nothing can be timed here: {e} (`parity doctor`)") from None
    return rows, left


def _show_bench(rows: list[dict], left: list[str]) -> None:
    from parity import report

    console = _console()
    lines = report.lines_of(rows)
    if lines:
        console.print(report.sentence_of_lines(lines))
        console.print(report.bench_table(lines, console.width))
    else:
        console.print("Nothing was left to measure." if not left else "Nothing was measured.")
    for row in rows:
        if row.get("note"):
            name = f"{row['workload']} {row['pass']} {row['impl']}"
            console.print(f"Not timed: {name}: {row['note']}", markup=False)
    if left:
        console.print(
            f"The budget is spent. Left: {len(left)}, first {left[0]}; "
            "`parity bench --resume` goes on.",
            markup=False,
        )


# parity report


def _report(args: argparse.Namespace) -> int:
    from parity import report

    if args.check and not args.readme:
        raise Stop(USAGE, "--check goes with --readme")
    results = report.Results.here()
    for name, line, why in results.refused:
        print(f"parity: {name}:{line} refused: {why}; the good rows are kept", file=sys.stderr)
    said: dict[str, Any] = {"ok": True, "refused": [list(r) for r in results.refused]}
    if args.readme:
        said |= _readme(results, only_check=args.check)
    if args.html is not None:
        with _progress(1, "report") as tell:
            tell("drawing")
            page = report.html(results)
            report.replace_text(args.html, page)
            tell(f"{args.html}", 1)
        said["html"] = str(args.html.resolve())
    if args.json:
        said["records"] = [row for rows in results.records.values() for row in rows.values()]
        said["checks"] = list(results.checks)
        said["kernels"] = list(results.compiles)
        said["coverage"] = [
            {
                "problem": p.stem,
                "workload": w.name,
                "pass": which,
                "dtype": w.dtype,
                "twins": {twin: {"state": c.state, "text": c.text} for twin, c in cells.items()},
            }
            for p, w, which, cells in results.coverage()
        ]
        _print_json(said)
        return PASS if said["ok"] else FAILED
    console = _console()
    if args.readme:
        console.print(said["readme"], markup=False)
    if args.html is not None:
        console.print(f"The report is in {said['html']}", markup=False, soft_wrap=True)
    if args.coverage:
        console.print(report.sentence_of_coverage(results))
        console.print(report.coverage_table(results, console.width))
        console.print(report.COVERAGE_LEGEND, markup=False)
    elif not args.readme and args.html is None:
        _show_report(results)
    return PASS if said["ok"] else FAILED


def _readme(results: Any, *, only_check: bool) -> dict[str, Any]:
    from parity import report

    try:
        text = report.README.read_text()
        fresh = report.render_readme(text, results)
    except (OSError, ValueError) as e:
        raise Stop(ENVIRONMENT, f"{report.README}: {e}") from None
    if fresh == text:
        return {"readme": "README.md's table is what the records say."}
    if only_check:
        stale = "README.md's table is stale: `parity report --readme` renders it again."
        return {"ok": False, "readme": stale}
    report.replace_text(report.README, fresh)
    return {"readme": "README.md's table was rendered again."}


def _show_report(results: Any) -> None:
    from parity import report

    console = _console()
    if not results.records:
        console.print("No committed records: nothing has been timed on a Hopper GPU yet.")
    for device in results.records:
        lines = list(results.lines(device))
        console.print(f"[bold]{report.escape(device)}[/]: {report.sentence_of_lines(lines)}")
        console.print(report.bench_table(lines, console.width))
    for mode in ("gpu", "cpu"):
        rows = [row for row in results.checks if row["device"] == mode]
        if rows:
            console.print(f"Checked here last: {report.sentence_of_checks(rows, mode)}")
    if results.compiles:
        console.print(f"Compiled here last: {report.sentence_of_compiles(results.compiles)}")
    console.print(report.sentence_of_coverage(results) + " `parity report --coverage` shows them.")


# parity diff


def _diff(args: argparse.Namespace) -> int:
    from parity import record, report

    files = []
    for path in (args.old, args.new):
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
            near = _nearest(path.name, beside) if beside else ""
            raise Stop(USAGE, f"no file {str(path)!r}{near if near.startswith(';') else ''}")
        found = record.read(path)
        for refused in found.refused:
            print(f"parity: {path}:{refused.line} refused: {refused.why}", file=sys.stderr)
        files.append(found)
    changes = report.changes(*files)
    verdicts = [change.verdict for change in changes]
    counts = {word: verdicts.count(word) for word in dict.fromkeys(verdicts)}
    bad = counts.get("red", 0) + counts.get("SLOWER", 0)
    failed = args.fail_on == "slower" and bad > 0
    if args.json:
        _print_json({"ok": not failed, "counts": counts, "changes": [c.to_json() for c in changes]})
    else:
        console = _console()
        said = ", ".join(f"{n} {word.lower()}" for word, n in counts.items())
        both = ", ".join(sorted({r["device"] for f in files for r in f.rows}))
        console.print(f"{len(changes)} results compared: {said or 'none'} ({both}).")
        if changes:
            console.print(report.change_table(changes, console.width))
    return FAILED if failed else PASS


# parity doctor


def _doctor(args: argparse.Namespace) -> int:
    from parity import doctor

    with _progress(doctor.STEPS, "doctor") as tell:
        findings = doctor.examine(tell)
    worst = doctor.worst(findings)
    machine = doctor.machine()
    if args.json:
        _print_json(
            {
                "ok": worst != doctor.RED,
                "worst": worst,
                "machine": machine.to_json(),
                "findings": [f.to_json() for f in findings],
            }
        )
        return ENVIRONMENT if worst == doctor.RED else PASS
    console = _console()
    red = sum(f.colour == doctor.RED for f in findings)
    able = "Nothing stands in the way."
    if red:
        able = f"[bold red]{red} thing{'s stand' if red > 1 else ' stands'} in the way.[/]"
    console.print(f"{able} {machine.sentence()}\n")
    from rich.table import Table

    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(max_width=18, overflow="fold")
    lines.add_column(overflow="fold")
    for f in findings:
        do = f"\n-> {doctor.escape(f.do)}" if f.do else ""
        lines.add_row(f"[{f.colour}]{f.colour}[/]", f.name, doctor.escape(f.says) + do)
    console.print(lines)
    return ENVIRONMENT if red else PASS


# parity all


def _all(args: argparse.Namespace) -> int:
    """Check, compile gate, bench where a Hopper GPU is, HTML report; the worst exit code."""
    from parity import doctor, report

    console = _console()
    codes: list[int] = []
    said: dict[str, Any] = {}

    def part(name: str, run: Callable[[], bool]) -> None:
        if not args.json:
            console.print(f"\n[bold]{name}[/]")
        try:
            codes.append(PASS if run() else FAILED)
        except Stop as stop:
            codes.append(stop.code)
            said[name] = {"error": str(stop)}
            print(f"parity: {name}: {stop}", file=sys.stderr)

    def check() -> bool:
        mode = _mode(args.device)
        tags = {"ci"} if mode == "cpu" else {"ci", "model"}
        everything = [(p, w) for p in _problems(()) for w in p.workloads]
        began = time.perf_counter()
        chosen = [(p, w) for p, w in everything if tags & {*w.tags}]
        limit = 300.0 if mode == "cpu" else 600.0
        rows, skipped = _judged(chosen, mode=mode, timeout=limit)
        skipped += [_skipped(p, w) for p, w in everything if not tags & {*w.tags}]
        said["check"] = {"checks": rows, "not_run": skipped}
        if not args.json:
            _show_checks(rows, skipped, mode, time.perf_counter() - began)
        return all(row["ok"] for row in rows)

    def gate() -> bool:
        chosen = [(p, w) for p in _problems(()) for w in p.workloads if "model" in w.tags]
        rows, skipped = _gated(chosen)
        said["compile"] = {"kernels": rows, "not_run": skipped}
        if not args.json:
            _show_compiles(rows, skipped, only_failures=True)
        return not any(row["status"] == "fail" for row in rows)

    def bench() -> bool:
        rows, left = _timed(
            [(p, w) for p in _problems(()) for w in p.workloads if _worth_timing(w)],
            resume=True,
            budget=args.budget,
        )
        said["bench"] = {"rows": rows, "left": left}
        if not args.json:
            _show_bench(rows, left)
        return not any(row["check"].startswith("fail") for row in rows)

    def page() -> bool:
        report.replace_text(PAGE, report.html(report.Results.here()))
        said["html"] = str(PAGE)
        if not args.json:
            console.print(f"The report is in {PAGE}", markup=False, soft_wrap=True)
        return True

    part("check", check)
    part("compile", gate)
    if doctor.machine().hopper and args.device != "cpu":
        part("bench", bench)
    part("report", page)
    code = next((c for c in (FAILED, ENVIRONMENT, USAGE) if c in codes), PASS)
    if args.json:
        _print_json({"ok": code == PASS, "exit": code} | said)
    return code


def _worth_timing(w: "parity.spec.Workload") -> bool:
    return "model" in w.tags and "huge" not in w.tags
