"""Faults planted on purpose: what the judge must catch, and for which reason.

A fault in the answer is applied to the model's own output, so that nothing but the fault is wrong
with it; a fault in behaviour wraps a real kernel. A tolerance that a wrong kernel passes is a
defect of the judge.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat

from parity import frameworks
from parity.frameworks import Kernel
from parity.judge import judge, truth_and_model
from parity.spec import Arithmetic, Array, Problem, Workload, dtype_named


@dataclass(frozen=True)
class Caught:
    """One planted fault: `reasons` are right answers, `found` is the judge's."""

    problem: str
    workload: str
    which: str
    fault: str
    reasons: tuple[str, ...]
    found: str
    detail: str

    @property
    def ok(self) -> bool:
        return self.found in self.reasons


@dataclass(frozen=True)
class Case:
    """One pass of one workload with its right answer, which a fault makes wrong."""

    xp: Any
    problem: Problem
    work: Workload
    which: str
    arrays: Mapping[str, Any]
    truth: tuple[Any, ...]  # float64
    good: tuple[Any, ...]  # the model, rounded to the storage dtype: passes
    specs: Mapping[str, Array]

    def rounded(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        dtypes = [dtype_named(self.xp, s.dtype) for s in self.specs.values()]
        return tuple(self.xp.astype(x, d) for x, d in zip(arrays, dtypes, strict=True))

    def recomputed(self, ar: Arithmetic, work: Workload, arrays: Mapping[str, Any]) -> tuple:
        oracle = self.problem.oracle_of(self.which)
        return self.rounded(oracle(ar, work, **arrays))

    def edited(self, edit: Callable[[Any], None]) -> tuple[Any, ...]:
        """The good answer with its first output edited in place."""
        first = self.xp.asarray(self.good[0], copy=True)
        edit(first)
        return (first, *self.good[1:])


# --- faults in the answer: case -> a wrong answer, or None where the fault has no meaning


def _tail(x: Any) -> Any:
    """The last ragged piece of the last axis, as a kernel without edge handling would miss it."""
    return (..., slice((x.shape[-1] - 1) // 64 * 64, None))


def skipped_tile(c: Case) -> Any:
    """One tile was never computed: its elements are zero."""

    def edit(x: Any) -> None:
        x[: 64 if x.ndim > 1 else 8, ..., :64] = 0

    return c.edited(edit)


def dropped_tail(c: Case) -> Any:
    """What lies beyond the last whole tile was never computed: it is zero."""

    def edit(x: Any) -> None:
        x[_tail(x)] = 0

    return c.edited(edit)


def unwritten_tail(c: Case) -> Any:
    """What lies beyond the last whole tile was never written: it still holds NaN."""

    def edit(x: Any) -> None:
        x[_tail(x)] = c.xp.nan

    return c.edited(edit)


def shifted_by_one(c: Case, by: int = 1, axis: int = -1) -> Any:
    """Every element holds its neighbour's value: an index is off by one."""
    return (c.xp.roll(c.good[0], by, axis=axis), *c.good[1:])


def wrong_element(c: Case) -> Any:
    """One element has the wrong sign, and the norm hardly notices."""
    flat = c.xp.reshape(c.good[0], (-1,))
    at = int(c.xp.argmax(c.xp.abs(c.xp.astype(flat, c.xp.float32))))

    def edit(x: Any) -> None:
        i, j = divmod(at, x.shape[-1])
        x.reshape(-1, x.shape[-1])[i, j] = -flat[at]

    return c.edited(edit)


def mask_off_by_one(c: Case, by: int = 1) -> Any:
    """The mask lies one column beside its place."""
    options, arrays = dict(c.work.options), dict(c.arrays)
    if "causal_offset" in options:
        options["causal_offset"] += by
    elif "mask" in arrays:
        arrays["mask"] = c.xp.roll(arrays["mask"], by, axis=-1)
    else:
        return None
    work = replace(c.work, options=options)
    return c.recomputed(Arithmetic.model(c.xp), work, arrays)


def reduced_input(c: Case) -> str | None:
    """The input over whose last axis the forward sums."""
    if c.problem.family == "scan":  # sums over time
        return None
    name = {"matmul": "a", "hybrid_attention": "q"}.get(c.problem.stem, "x")
    return name if c.which == "fwd" else None


def last_term_missing(c: Case, terms: int = 1) -> Any:
    """The sum stops one term early.

    A term: one k of a product, one column of a softmax or a norm.
    """
    arrays = dict(c.arrays)
    name = reduced_input(c)
    if name is None:
        return None
    x = c.xp.asarray(arrays[name], copy=True)
    x[..., x.shape[-1] - terms :] = 0 if c.problem.stem != "softmax" else -60000
    arrays[name] = x
    if c.problem.stem == "rms_norm" and "residual" in arrays:
        return None  # h is an output there: dropped_tail is the same fault
    return c.recomputed(Arithmetic.model(c.xp), c.work, arrays)


def option_ignored(c: Case, name: str) -> Any:
    """An option or an optional input is not looked at."""
    options = {k: v for k, v in c.work.options.items() if k != name}
    arrays = {k: v for k, v in c.arrays.items() if k != name}
    oracle = c.problem.oracle_of(c.which)
    try:
        answer = oracle(Arithmetic.model(c.xp), replace(c.work, options=options), **arrays)
    except ValueError:
        return None  # without it the sizes of the rest do not fit
    shapes = [tuple(spec.shape) for spec in c.specs.values()]
    return c.rounded(answer) if [tuple(y.shape) for y in answer] == shapes else None


def one_precision_lower(c: Case) -> Any:
    """The inputs went through the next smaller format on their way."""
    return c.recomputed(Arithmetic.one_precision_lower(c.xp), c.work, c.arrays)


def truncating_store(c: Case) -> Any:
    """Rounds toward zero: whatever the rounded value overshoots is taken back."""
    if next(iter(c.specs.values())).dtype == "float32":
        return None
    if float(c.xp.max(c.xp.abs(c.xp.astype(c.good[0], c.xp.float64) - c.truth[0]))) == 0:
        return None  # nothing was rounded
    xp, out = c.xp, []
    for y, r, spec in zip(c.good, c.truth, c.specs.values(), strict=True):
        big = xp.abs(xp.astype(y, xp.float64)) > xp.abs(r)
        signed = xp.int16 if spec.dtype != "float32" else xp.int32
        bits = y.view(signed)
        out.append(xp.where(big & (y != 0), bits - 1, bits).view(y.dtype))
    return tuple(out)


def accumulated_in_storage(c: Case) -> Any:
    """The accumulator is kept in the storage dtype between trips of 16."""
    if c.problem.stem != "matmul" or c.which == "bwd" or c.specs["c"].dtype == "float32":
        return None
    a, b = c.arrays["a"], c.arrays["b"]
    acc = c.good[0] * 0
    for k in range(0, a.shape[1], 16):
        part = c.xp.astype(a[:, k : k + 16], c.xp.float32) @ c.xp.astype(
            b[k : k + 16, :], c.xp.float32
        )
        acc = c.xp.astype(c.xp.astype(acc, c.xp.float32) + part, acc.dtype)
    return (acc,)


def wrong_dtype(c: Case) -> Any:
    """The values are right, the dtype is another."""
    wide = c.xp.float64 if next(iter(c.specs.values())).dtype == "float32" else c.xp.float32
    return (c.xp.astype(c.good[0], wide), *c.good[1:])


def wrong_shape(c: Case) -> Any:
    """The last column is missing from the shape; the values are right."""
    return (c.good[0][..., :-1], *c.good[1:])


_NUMERIC = ("norm", "tile", "peak", "bias")
ANSWERS: Mapping[Callable[[Case], Any], tuple[str, ...]] = {
    skipped_tile: ("zeros",),
    dropped_tail: ("zeros",),
    unwritten_tail: ("nonfinite",),
    shifted_by_one: (*_NUMERIC, "zeros"),
    wrong_element: _NUMERIC,
    mask_off_by_one: (*_NUMERIC, "zeros", "nonfinite"),
    last_term_missing: (*_NUMERIC, "zeros"),
    one_precision_lower: (*_NUMERIC, "zeros"),  # e4m3 underflows early
    truncating_store: ("norm", "tile", "bias"),
    accumulated_in_storage: _NUMERIC,
    wrong_dtype: ("dtype",),
    wrong_shape: ("shape",),
}

# What there is to plant in whole numbers: bounds, indices, codes.
EXACT: Mapping[Callable[[Case], Any], tuple[str, ...]] = {
    shifted_by_one: ("probe",),
    wrong_dtype: ("dtype",),
    wrong_shape: ("shape",),
}


# --- faults in behaviour: a kernel -> a kernel that cheats


def cached_output(kernel: Kernel, twin: Any, library: Callable[..., Any] | None) -> Kernel:
    memory: list[Any] = []

    def fwd(*inputs: Any, **options: Any) -> Any:
        if not memory:
            memory.append(kernel.fwd(*inputs, **options))
        return memory[0]

    return replace(kernel, fwd=fwd)


def library_call(kernel: Kernel, twin: Any, library: Callable[..., Any] | None) -> Kernel:
    """Launches our kernel for show and returns what the framework's own operations computed.

    Where the mathematics is not written in those, they finish what the kernel returned.
    """

    def fwd(*inputs: Any, **options: Any) -> Any:
        out, res = kernel.fwd(*inputs, **options)
        if library is not None:
            return library(*inputs, **options), res
        *others, last = out if isinstance(out, tuple) else (out,)
        return ((*others, last * 1) if others else last * 1), res

    return replace(kernel, fwd=fwd)


def mutated_input(kernel: Kernel, twin: Any, library: Callable[..., Any] | None) -> Kernel:
    def fwd(*inputs: Any, **options: Any) -> Any:
        out = kernel.fwd(*inputs, **options)
        inputs[0][-1, -1] = 1.0
        return out

    return replace(kernel, fwd=fwd)


def differs_between_runs(kernel: Kernel, twin: Any, library: Callable[..., Any] | None) -> Kernel:
    runs = [0]

    def fwd(*inputs: Any, **options: Any) -> Any:
        runs[0] += 1
        out, res = kernel.fwd(*inputs, **options)
        first = out[0] if isinstance(out, tuple) else out
        # another row's value each time: codes know no multiplication
        first[0, 0] = first[runs[0] % first.shape[0], 0]
        return out, res

    return replace(kernel, fwd=fwd)


def one_output_too_many(kernel: Kernel, twin: Any, library: Callable[..., Any] | None) -> Kernel:
    def fwd(*inputs: Any, **options: Any) -> Any:
        out, res = kernel.fwd(*inputs, **options)
        return (*(out if isinstance(out, tuple) else (out,)), inputs[0]), res

    return replace(kernel, fwd=fwd)


def raises(kernel: Kernel, twin: Any, library: Callable[..., Any] | None) -> Kernel:
    def fwd(*inputs: Any, **options: Any) -> Any:
        raise RuntimeError("illegal memory access")

    return replace(kernel, fwd=fwd)


BEHAVIOURS: Mapping[Callable[..., Kernel], tuple[str, ...]] = {
    cached_output: ("cached",),
    library_call: ("witness",),
    mutated_input: ("mutated",),
    differs_between_runs: ("nondeterministic",),
    one_output_too_many: ("shape",),
    raises: ("crash",),
}
# jax arrays cannot be written to, and a jitted function is a function of its arguments alone
TORCH_ONLY = (mutated_input, differs_between_runs, cached_output)


def _same(xp: Any, a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether the fault changed nothing here (a tail that the mask covers anyway, say)."""
    return all(
        x.shape == y.shape and x.dtype == y.dtype and bool(xp.all(x == y))
        for x, y in zip(a, b, strict=True)
    )


def case_of(
    problem: Problem,
    work: Workload,
    which: str,
    arrays: Mapping[str, Any],
    truth: tuple[Any, ...],
    model: tuple[Any, ...],
) -> Case:
    """arrays: what the oracle of that pass reads; truth and model: what it says of them."""
    specs = problem.results(work, which)
    xp = array_api_compat.array_namespace(truth[0])
    case = Case(xp, problem, work, which, arrays, truth, (), specs)
    return replace(case, good=case.rounded(model))


def answers(problem: Problem, work: Workload, seed: int = 0) -> Iterator[Caught]:
    """Judges every wrong answer, and the right one (fault "none", which must not be caught)."""
    from parity.frameworks import torch as memory

    drawn = memory.draw({**problem.inputs(work), **problem.cotangents(work)}, seed)
    for which in work.passes:
        arrays = {n: drawn[n] for n in problem.reads(work, which)}
        truth, model = truth_and_model(problem, work, which, arrays)
        case = case_of(problem, work, which, arrays, truth, model)

        def verdict(wrong: tuple, case: Case = case, model: tuple = model) -> tuple[str, str]:
            for (name, spec), y, r, m in zip(
                case.specs.items(), wrong, case.truth, model, strict=True
            ):
                terms = problem.reduction(work, name)
                v = judge(name, y, r, m, spec, family=problem.family, terms=terms)
                if not v.ok:
                    return v.reason, v.detail
            return "", ""

        yield Caught(problem.stem, work.name, which, "none", ("",), *verdict(case.good))
        first = next(iter(case.specs.values()))
        exact = first.exact or "int" in first.dtype
        for fault, reasons in {**(EXACT if exact else ANSWERS), **problem.faults}.items():
            wrong = fault(case)
            if wrong is not None and not _same(case.xp, wrong, case.good):
                name = fault.__name__
                yield Caught(problem.stem, work.name, which, name, reasons, *verdict(wrong))


def behaviours(problem: Problem, work: Workload, twin_name: str) -> Iterator[Caught]:
    """Checks kernels that cheat: the real twin, wrapped."""
    from parity.check import check

    twin = frameworks.twin(twin_name)
    kernel = twin.load(problem.implementations[twin_name])
    for fault, reasons in BEHAVIOURS.items():
        if twin_name == "pallas" and fault in TORCH_ONLY:
            continue
        cheat = fault(kernel, twin, twin.library(problem.stem))
        row = check(problem, work, impls={twin_name: cheat}, passes=("fwd",), repeats=2)[0]
        yield Caught(
            problem.stem, work.name, twin_name, fault.__name__, reasons, row.reason, row.detail
        )
