"""What a lesson calls: predictions, checks, real kernels side by side, measured rows, pictures.

    import notebooks._course as course

    course.begin("01")                         first of all: kernels run in the interpreters
    course.predict("programs", 6)              the learner's guess
    course.reveal("programs", computed)        what it really is
    course.twins("softmax", "_softmax_fwd_kernel", 1)
    course.check("scale_add", triton=f, pallas=g)
    course.measured("softmax", "softmax_16384x4096")
    course.end()

Nothing here prints a time, a path or a version of this machine: the committed outputs are the same
everywhere. notebooks/README.md tells how a lesson is written.
"""

import ast
import base64
import html
import importlib
import json
import linecache
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from notebooks import _tracer
from parity import frameworks, record
from parity.drawings import Picture
from parity.record import Row
from parity.report import NAMES, ROOT, TWINS, name_of

OUTCOME = "application/vnd.kernel-parity.outcome+json"  # what build.py reads from an output
DEVICE = "NVIDIA H200"  # whose committed rows are shown where there is no GPU
SEED = 7
QUIZ = ROOT / "notebooks" / "quiz.toml"


@dataclass
class _Lesson:
    number: str = ""
    guesses: dict[str, float] = field(default_factory=dict)
    revealed: dict[str, bool | None] = field(default_factory=dict)  # None: nobody guessed
    checks: dict[str, bool] = field(default_factory=dict)


_lesson = _Lesson()


def begin(number: str) -> None:
    """Starts a lesson: this process enters CPU mode, whatever machine it is.

    Call it before a kernel is imported. GPU cells measure in a process of their own.
    """
    global _lesson
    frameworks.interpreters()
    # jax prints the whole way down to an error in a kernel; what a lesson says of it is enough.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    _lesson = _Lesson(number)
    _say("Ready. Kernels run in the interpreters, on the CPU.")


# Predictions


def predict(name: str, value: Any = ...) -> None:
    """Notes the learner's number; `...` stands for none yet."""
    if value is ...:
        _say(f"{name}: no prediction yet. Put a number in place of the three dots.")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value: expected a number for {name}, got {value!r}")
    _lesson.guesses[name] = float(value)
    _say(f"{name}: you say {_number(value)}.")


def reveal(name: str, truth: float | None = None, *, within: float = 0.0) -> None:
    """Says the computed number, and how far the prediction was off.

    truth: without one, `name` is a question of quiz.toml, which says the right choice, and why; it
    stays closed until there is a guess. within: the share of the truth that a prediction may be off
    and still count as right.
    """
    guess, because = _lesson.guesses.get(name), ""
    if truth is None:
        asked = tomllib.loads(QUIZ.read_text())[_lesson.number][name]
        right, because = float(asked["right"]), " " + asked["because"]
    else:
        right = float(truth)
    if guess is None:
        _lesson.revealed[name] = None
        open_it = f"{_number(right)}. You had not predicted it." if truth is not None else ""
        _say(f"{name}: {open_it or 'choose first, above.'}", {"predict": name, "ok": None})
        return
    ok = abs(guess - right) <= within * abs(right)
    _lesson.revealed[name] = ok
    words = "as you said" if guess == right else "close enough" if ok else "not so"
    said = f"{name}: {_number(right)}. You said {_number(guess)}: {words}.{because}"
    _say(said, {"predict": name, "ok": ok})


# Real kernels, side by side


def twins(stem: str, function: str, stage: int | None = None, part: str = "kernel") -> None:
    """Shows one function of both twins of a stem beside each other, cut from their files.

    stage: only that one, as the kernel's own markers number it. part: what to call it in the title.
    """
    cuts = {}
    for twin in TWINS:
        path = ROOT / f"{twin}_kernels" / f"{stem}.py"
        cuts[twin] = (path.relative_to(ROOT).as_posix(), *cut(path.read_text(), function, stage))
    title = f"{stem}: {part}" + (f", stage {stage}" if stage is not None else "")
    # Two columns where there is room; a code host that strips styles stacks them.
    wrap = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere"
    blocks = "".join(
        f'<div style="min-width:0"><b>{NAMES[twin]}</b> {file}, from line {line}'
        f'<pre style="font-size:80%;{wrap}">{_hanging(code)}</pre>'
        "</div>"
        for twin, (file, line, code) in cuts.items()
    )
    columns = "display:grid;gap:1em;grid-template-columns:repeat(auto-fit,minmax(26em,1fr))"
    text = "\n\n".join(
        f"{NAMES[twin]}, {file}, from line {line}:\n{code}"
        for twin, (file, line, code) in cuts.items()
    )
    page = f'<div style="{columns}">{blocks}</div>'
    _display({"text/html": page, "text/plain": f"{title}\n{text}"})


def _hanging(code: str) -> str:
    """Code as HTML: what is too long for its column goes on below, indented by four more."""
    lines = []
    for line in code.splitlines():
        n = len(line) - len(line.lstrip()) + 4
        style = f"padding-left:{n}ch;text-indent:-{n}ch"
        lines.append(f'<div style="{style}">{html.escape(line) or " "}</div>')
    return "".join(lines)


def cut(source: str, function: str, stage: int | None = None) -> tuple[int, str]:
    """(the line it starts on, the code) of a function, or of one stage of it, dedented.

    Raises ValueError where the source has no such function or stage.
    """
    nodes = ast.walk(ast.parse(source))
    node = next((n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == function), None)
    if node is None:
        raise ValueError(f"function: no {function!r} here")
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = source.splitlines()[first - 1 : node.end_lineno]
    if stage is not None:
        marks = [i for i, line in enumerate(lines) if line.strip().startswith("# --- ")]
        at = [i for i in marks if lines[i].strip().startswith(f"# --- {stage}.")]
        if not at:
            raise ValueError(f"stage: {function} has no stage {stage}")
        end = next((i for i in marks if i > at[0]), len(lines))
        first, lines = first + at[0], lines[at[0] : end]
    return first, textwrap.dedent("\n".join(lines)).rstrip()


# Pictures


def show(picture: Picture) -> None:
    """Puts a picture into the notebook, with its description for those who cannot see it."""
    svg = picture.standing_alone().encode()
    alt = html.escape(f"{picture.title}. {picture.words}", quote=True)
    source = base64.b64encode(svg).decode()
    _display({
        "text/html": f'<img alt="{alt}" src="data:image/svg+xml;base64,{source}">',
        "text/plain": f"{picture.title}\n{picture.words}",
    })  # fmt: skip


def slider(draw: Callable[[Any], Picture], values: Sequence[Any], start: Any, label: str) -> None:
    """A picture that follows a slider; three pictures where there is none, or in a built one."""
    try:
        if built():
            raise ImportError
        import ipywidgets  # pyright: ignore[reportMissingImports] (extra "notebooks")
    except ImportError:
        for value in dict.fromkeys((values[0], start, values[-1])):
            _say(f"{label} = {_number(value)}")
            show(draw(value))
        return
    choice = ipywidgets.SelectionSlider(
        options=[(f"{_number(v)}", v) for v in values], value=start, description=label,
        continuous_update=False,
    )  # fmt: skip
    out = ipywidgets.Output()

    def redraw(change: Mapping[str, Any]) -> None:
        with out:
            out.clear_output(wait=True)
            show(draw(change["new"]))

    choice.observe(redraw, names="value")
    redraw({"new": start})
    _display_object(ipywidgets.VBox([choice, out]))


# Measured rows


def rows(stem: str, workload: str, which: str = "fwd", device: str = DEVICE) -> dict[str, Row]:
    """The committed rows of one pass by implementation, the last of each standing.

    Raises ValueError where none was recorded.
    """
    latest = record.read(record.path_for(device, stem)).latest.values()
    found = {r["impl"]: r for r in latest if (r["workload"], r["pass"]) == (workload, which)}
    if not found:
        raise ValueError(f"workload: no record of {stem} {workload} {which} on {device}")
    return found


def stamp(row: Row) -> str:
    """Where, with what and when a row was measured."""
    versions = row["versions"]
    stack = ", ".join(f"{n} {versions[n]}" for n in ("torch", "triton", "jax") if n in versions)
    driver = f", driver {versions['driver']}" if "driver" in versions else ""
    return (
        f"{row['device']}{driver}; {stack}; commit {row['commit'][:7]}; measured {row['when'][:10]}"
    )


def measured(stem: str, workload: str, which: str = "fwd") -> None:
    """Times one pass of both twins and its peers: here on a Hopper GPU, else as recorded."""
    found, where = {}, ""
    if hopper() and not built():
        _say("Measuring here; this takes a minute or two.")
        found, where = _measured_here(stem, workload, which), "measured here, just now"
    if not found:
        found, where = rows(stem, workload, which), "recorded"
    timed = sorted((r for r in found.values() if r["us"]), key=lambda r: r["us"]["p50"])
    table = [("who", "us", "p10 to p90", "% of the roof")]
    for r in timed:
        us, who = r["us"], name_of(r["impl"])
        roof = f"{100 * r['roof']:.0f}" if r["roof"] else ""
        spread = f"{us['p10']:.4g} to {us['p90']:.4g}"
        table.append((who, f"{us['p50']:.4g}", spread, roof))
    head, *body = (
        "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in line)
        for line, tag in zip(table, ("th", *["td"] * len(timed)), strict=True)
    )
    caption = f"{workload} {which}, {where}: {stamp(timed[0])}"
    _display({
        "text/html": f"<table><tr>{head}</tr>" + "".join(f"<tr>{r}</tr>" for r in body)
        + f"</table><p>{html.escape(caption)}</p>",
        "text/plain": "\n".join(["  ".join(line) for line in table] + [caption]),
    })  # fmt: skip


def _measured_here(stem: str, workload: str, which: str) -> dict[str, Row]:
    """Rows of `parity bench`, in a process of its own; none, and a sentence, on failure."""
    out = ROOT / ".cache" / "lessons" / f"{stem}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    start = "import sys; from parity.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "bench", stem, "-w", f"{stem}/{workload}",
               "--pass", which, "--out", str(out)]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "JAX_PLATFORMS")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    latest = record.read(out).latest.values()
    found = {r["impl"]: r for r in latest if (r["workload"], r["pass"]) == (workload, which)}
    if not found:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing was said"]
        _say(f"It could not be measured here ({said[-1][:200]}); the record stands instead.")
    return found


def hopper() -> bool:
    """Whether this machine has a Hopper GPU that torch can use."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def built() -> bool:
    """Whether build.py runs this lesson: what it shows must not depend on the machine."""
    return "LESSON_BUILD" in os.environ


# Exercises


@dataclass(frozen=True)
class Limits:
    """What a right answer may take at most; None: as much as it likes.

    read, written: bytes, as a multiple of what Problem.cost calls the least for both together.
    """

    launches: int | None = None
    moved: float | None = None


@dataclass(frozen=True)
class Answer:
    """What was found of one kernel: ok, or one word why not, and a sentence."""

    twin: str
    ok: bool
    reason: str = ""
    detail: str = ""
    where: str = ""  # the workload, and its sizes
    cases: int = 0
    moved: float = math.nan  # bytes, as a multiple of the least; of the last workload
    launches: int = 0


def check(name: str, **kernels: Callable[..., Any]) -> None:
    """Judges a learner's kernels: exercises/NAME.py says what they must compute.

    kernels: triton=..., pallas=..., or one of them. Triton's are first watched for accesses outside
    their arrays and for programs that touch each other's elements. Then parity.check judges both on
    every workload, as it judges the project's own twins.
    """
    exercise = importlib.import_module(f"notebooks.exercises.{name}")
    answers = judged(exercise.PROBLEM, getattr(exercise, "LIMITS", Limits()), kernels)
    ok = all(a.ok for a in answers) and set(kernels) == set(exercise.PROBLEM.implementations)
    _lesson.checks[name] = ok
    lines = [_sentence(a) for a in answers]
    missing = sorted(set(exercise.PROBLEM.implementations) - set(kernels))
    lines += [f"{NAMES[twin]}: not given yet." for twin in missing]
    told = {a.twin: a.reason or "pass" for a in answers}
    _say("\n".join(lines), {"check": name, "ok": ok, "verdicts": told})


def conclude(name: str, ok: bool, text: str) -> None:
    """Notes and says what another judge than `check` found of an exercise, NumPy's for example."""
    _lesson.checks[name] = ok
    _say(text, {"check": name, "ok": ok})


def judged(problem: Any, limits: Limits, kernels: Mapping[str, Callable]) -> list[Answer]:
    """One Answer a kernel; workloads after the first that fails are not tried."""
    with np.errstate(all="ignore"):  # a GPU does not warn; the verdict says what is wrong
        return _judged(problem, limits, kernels)


def _judged(problem: Any, limits: Limits, kernels: Mapping[str, Callable]) -> list[Answer]:
    found: dict[str, Answer] = {}
    if "triton" in kernels:
        for work in problem.workloads:
            if wrong := _watched(problem, work, kernels["triton"]):
                found["triton"] = wrong
                break
    for work in problem.workloads:
        live = {twin: fn for twin, fn in kernels.items() if twin not in found}
        if not live:
            break
        found |= _checked(problem, work, live)
    for twin, fn in kernels.items():
        if twin not in found:
            found[twin] = _within(problem, limits, twin, fn)
    return [found[twin] for twin in kernels]


def _checked(problem: Any, work: Any, kernels: Mapping[str, Callable]) -> dict[str, Answer]:
    """The kernels that parity.check finds wrong."""
    from parity.check import check as parity_check
    from parity.frameworks import mosaic_interpreter

    impls = {twin: _kernel(fn) for twin, fn in kernels.items()}
    with mosaic_interpreter.patience(_tracer.PATIENCE) as out:
        checks = parity_check(problem, work, impls=impls, passes=("fwd",), seed=SEED)
    found = {}
    for c in checks:
        if c.impl == "pallas" and out:
            found[c.impl] = Answer(c.impl, False, "timeout", _tracer.WAITS, _at(work))
        elif not c.ok:
            detail = _told(c, kernels[c.impl], problem, work)
            found[c.impl] = Answer(c.impl, False, c.reason, detail, _at(work))
    return found


def _at(work: Any) -> str:
    return f"{work.name} ({', '.join(f'{n}={size}' for n, size in work.sizes.items())})"


_kernels: dict[Callable, frameworks.Kernel] = {}


def _kernel(fn: Callable[..., Any]) -> frameworks.Kernel:
    """One object a function, so that jit's caches hold."""

    def fwd(*inputs: Any, **options: Any) -> tuple[Any, tuple]:
        return fn(*inputs, **options), ()

    def bwd(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("a lesson's kernel has no backward")

    return _kernels.setdefault(fn, frameworks.Kernel(fn, fwd, bwd, ""))


def _told(c: Any, fn: Callable, problem: Any, work: Any) -> str:
    """A sentence of what is wrong, and what the wrong elements have in common."""
    if c.reason == "crash":
        language, arrays = frameworks.twin(c.impl), _draw(problem, work)
        try:
            language.run(fn, [language.native(x) for x in arrays.values()], dict(work.options))
        except Exception as error:
            return _tracer.sentence(error)
    told, detail = c.diagnosis or {}, c.detail.removeprefix("DataRace: RACE: ")
    detail = re.sub(r"\b(\d{5,}\.py):(\d+)", _quoted, detail)  # IPython's own name of a cell
    return "; ".join(filter(None, (detail, told.get("because") or told.get("where"))))


def _quoted(place: re.Match[str]) -> str:
    """The line of a cell, in backquotes: JupyterLab shows no line numbers."""
    file = next((name for name in linecache.cache if name.endswith(f"/{place[1]}")), "")
    line = linecache.getline(file, int(place[2])).strip()
    return f"`{line}`" if line else f"line {place[2]} of its cell"


def _draw(problem: Any, work: Any) -> dict[str, Any]:
    from parity.frameworks import torch as memory

    return memory.draw(problem.inputs(work), SEED)


def _watched(problem: Any, work: Any, fn: Callable[..., Any]) -> Answer | None:
    """What guard bands and the trace of Triton's programs show, if it is a mistake."""
    from parity.frameworks import triton_interpreter
    from puzzles import triton_side

    with triton_interpreter.launches() as launched:
        watch = _tracer.Watch(launched)
        try:
            with triton_interpreter.traffic(watch.each):
                _, seen = triton_side.call(fn, _draw(problem, work), work.options, problem.glue)
        except Exception as error:
            if isinstance(stray := error.__cause__ or error, triton_side.StrayError):
                detail = f"{stray}: is the mask wrong, or the address?"
                return Answer("triton", False, "past_the_end", detail, _at(work))
            return Answer("triton", False, "crash", _tracer.sentence(error), _at(work))
    if seen.beside:
        detail = f"a store went past the end of {seen.beside[0]}"
        return Answer("triton", False, "past_the_end", detail, _at(work))
    if clash := watch.conflict():
        verb = "both store" if clash.both_store else "one loads what the other stores"
        detail = (
            f"programs {clash.first} and {clash.second} meet: {verb} ({clash.lanes} elements in "
            "all). The interpreter runs one after the other; a GPU runs them at once"
        )
        return Answer("triton", False, "race", detail, _at(work))
    return None


def _within(problem: Any, limits: Limits, twin: str, fn: Callable[..., Any]) -> Answer:
    """A right answer, and what it took on the last workload."""
    work = problem.workloads[-1]
    launches, moved = metered(twin, fn, _draw(problem, work), work.options)
    share = moved / problem.cost(work, "fwd").bytes
    found = Answer(twin, True, "", "", _at(work), len(problem.workloads), share, launches)
    if limits.launches is not None and launches > limits.launches:
        detail = f"{launches} kernels were launched, {limits.launches} are enough"
        return Answer(twin, False, "launches", detail, _at(work), 0, share, launches)
    if limits.moved is not None and share > limits.moved:
        detail = f"it moved {share:.2f}x the least bytes; at most {limits.moved:g}x are allowed"
        return Answer(twin, False, "traffic", detail, _at(work), 0, share, launches)
    return found


def metered(
    twin: str, fn: Callable[..., Any], arrays: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, int]:
    """(kernels launched, bytes that they read and wrote in global memory) of one call."""
    language = frameworks.twin(twin)
    args = [language.native(x) for x in arrays.values()]
    if twin == "triton":
        from parity.frameworks import triton_interpreter

        with triton_interpreter.launches() as launched, triton_interpreter.traffic() as moved:
            language.run(fn, args, options)
        return len(launched), moved.read + moved.written
    from parity.frameworks import mosaic_interpreter

    with mosaic_interpreter.traffic() as moved:
        language.run(fn, args, options)
    return language.launched(fn, args, options), moved.read + moved.written


def _sentence(a: Answer) -> str:
    if a.ok:
        return (
            f"{NAMES[a.twin]}: right on all {a.cases} sizes; {a.launches} launch"
            f"{'es' if a.launches != 1 else ''}, {a.moved:.2f}x the least bytes."
        )
    stop = "" if a.detail.endswith("?") else "."
    return f"{NAMES[a.twin]}: not yet, {a.reason} in {a.where}. {a.detail}{stop}"


# The end


def end() -> None:
    """What was predicted and solved in this lesson."""
    guessed = [ok for ok in _lesson.revealed.values() if ok is not None]
    lines = [
        f"Lesson {_lesson.number}: {sum(guessed)} of {len(_lesson.revealed)} predictions right, "
        f"{sum(_lesson.checks.values())} of {len(_lesson.checks)} exercises solved."
    ]
    lines += [f"Open: {name}" for name, ok in _lesson.checks.items() if not ok]
    _say("\n".join(lines))


def _number(x: Any) -> str:
    if isinstance(x, float) and x.is_integer() and abs(x) < 1e15:
        x = int(x)
    return f"{x:,}" if isinstance(x, int) else f"{x:.4g}"


def _say(text: str, outcome: Mapping[str, Any] | None = None) -> None:
    lines = (
        textwrap.wrap(line, _tracer.WIDE, subsequent_indent="  ") or [""]
        for line in text.split("\n")
    )
    text = "\n".join(part for line in lines for part in line)
    data: dict[str, Any] = {"text/plain": text}
    if outcome is not None:
        data[OUTCOME] = json.loads(json.dumps(outcome))
    _display(data)


def _display(data: Mapping[str, Any]) -> None:
    from IPython.display import display

    display(dict(data), raw=True)


def _display_object(thing: Any) -> None:
    from IPython.display import display

    display(thing)


__all__ = [
    "Answer", "Limits", "begin", "check", "conclude", "cut", "end", "judged", "measured", "metered",
    "predict", "reveal", "rows", "show", "slider", "stamp", "twins",
]  # fmt: skip
