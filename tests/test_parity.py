"""Every problem on every ci workload, in both languages, against float64."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from parity.check import check
from parity.frameworks import prepared, twin
from parity.frameworks.torch import draw
from parity.judge import truth_and_model
from parity.problems import PROBLEMS
from parity.spec import Arithmetic

CI = [(p, w) for p in PROBLEMS for w in p.workloads if "ci" in w.tags]
CASES = pytest.mark.parametrize(("problem", "work"), CI, ids=[f"{p.stem}-{w.name}" for p, w in CI])
# Long rows have the residuals and the gradients of short ones: check sees to them.
BACK = [(p, w) for p, w in CI if "bwd" in w.passes and not w.name.endswith("long_row")]
BACKWARD = pytest.mark.parametrize(
    ("problem", "work"), BACK, ids=[f"{p.stem}-{w.name}" for p, w in BACK]
)
SMALLEST = list({p.stem: (p, w) for p, w in reversed(BACK)}.values())[::-1]
FIRST = pytest.mark.parametrize(("problem", "work"), SMALLEST, ids=[p.stem for p, _ in SMALLEST])


@CASES
def test_both_twins_are_right(problem, work):
    rows = check(problem, work)
    assert {(row.which, row.impl) for row in rows} == {
        (which, impl) for which in work.passes for impl in ("triton", "pallas")
    }
    assert [
        f"{row.impl} {row.which}: {row.reason} {row.detail}" for row in rows if not row.ok
    ] == []


def _arrays(problem, work):
    arrays = draw({**problem.inputs(work), **problem.cotangents(work)}, seed=3)
    return arrays, [arrays[n] for n in problem.cotangents(work)]


def _differentiable(problem, work):
    """Of the positional arguments: frozen weights have no gradient, though they are numbers."""
    return [f"d{name}" in problem.grads(work) for name in problem.positional(work)]


@BACKWARD
def test_one_twins_residuals_feed_the_others_backward(problem, work):
    """`res` means the same in both languages: fed with the same residuals, the backwards agree."""
    arrays, cotangents = _arrays(problem, work)
    options = {k: v for k, v in work.options.items() if k in problem.bwd_options}
    residuals, grads = {}, []
    for name, other in (("triton", "triton"), ("pallas", "triton"), ("triton", "pallas")):
        ours, theirs = twin(name), twin(other)
        if other not in residuals:
            kernel = theirs.load(problem.implementations[other])
            _, args, given = prepared(theirs, kernel, problem, work, "fwd", arrays)
            _, res = theirs.run(kernel.fwd, args, given)
            residuals[other] = [None if x is None else np.array(theirs.harness(x)) for x in res]
        res = tuple(None if x is None else ours.native(x) for x in residuals[other])
        bwd = ours.load(problem.implementations[name]).bwd
        out = ours.run(bwd, [res, *(ours.native(x) for x in cotangents)], options)
        grads.append([ours.harness(x).astype(np.float64) for x in out])
    read = {n: arrays[n] for n in problem.reads(work, "bwd")}
    exact = zip(*truth_and_model(problem, work, "bwd", read), strict=True)
    for first, same, others, spec, (r, model) in zip(
        *grads, problem.grads(work).values(), exact, strict=True
    ):
        size = np.linalg.norm(first)
        # sums of 16-bit products differ by what a product's factors lose
        close = max(1e-5, 3 * np.linalg.norm(model - r) / (np.linalg.norm(r) or 1))
        close = close if spec.dtype == "float32" and not spec.of else 1e-3
        assert np.linalg.norm(first - same) < close * size
        # what a forward stores in 16 bits, the other may round the other way
        assert np.linalg.norm(first - others) < 1e-3 * size


class _Smooth(Arithmetic):
    """The truth without the rounding of h, which would make the oracle a staircase."""

    def rounded(self, x, dtype):
        return x


@BACKWARD
def test_directional_derivatives_of_the_oracle_agree_with_oracle_bwd(problem, work):
    """oracle_bwd is itself proved: <grad, v> = d/dt oracle(x + t v) . cotangent, in float64."""
    rng = np.random.default_rng(5)
    inputs, cotangents = (
        {n: d.draw(rng) for n, d in f(work).items()} for f in (problem.inputs, problem.cotangents)
    )
    floats = {n for n, x in inputs.items() if np.issubdtype(x.dtype, np.floating)}
    inputs = {n: x.astype(np.float64) if n in floats else x for n, x in inputs.items()}
    cotangents = {n: x.astype(np.float64) for n, x in cotangents.items()}
    ar = _Smooth(xp, "float64", rounds=False)
    grads = dict(
        zip(problem.grads(work), problem.oracle_bwd(ar, work, **inputs, **cotangents), strict=True)
    )

    def value(**moved):
        outs = problem.oracle(ar, work, **{**inputs, **moved})
        pairs = zip(outs, cotangents.values(), strict=True)
        live = ((o, c, ~np.isnan(c)) for o, c in pairs)  # dead rows hold NaN
        return sum(float((o[at] * c[at]).sum()) for o, c, at in live)

    # a residual is added into x, and has its gradient; a slope of ALiBi has none
    of = {n: "dx" if n == "residual" else "d" + n for n in sorted(floats)}
    for name, of_name in of.items():
        if of_name not in grads:
            continue
        direction = rng.standard_normal(inputs[name].shape)
        step = 1e-5
        slope = (
            value(**{name: inputs[name] + step * direction})
            - value(**{name: inputs[name] - step * direction})
        ) / (2 * step)
        grad = grads[of_name]
        expected = float((grad * direction).sum())
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6 * np.linalg.norm(grad))


@FIRST
def test_autograd_through_the_public_function_is_the_backward(problem, work):
    import torch

    torch_side = twin("triton")
    arrays, cotangents = _arrays(problem, work)
    cotangents = [torch_side.native(x) for x in cotangents]
    kernel = torch_side.load(problem.implementations["triton"])
    _, args, given = prepared(torch_side, kernel, problem, work, "fwd", arrays)
    smooth = _differentiable(problem, work)
    leaves = [x.clone().requires_grad_() if s else x for x, s in zip(args, smooth, strict=True)]
    torch.autograd.backward(torch_side.outputs_of(kernel.public(*leaves, **given)), cotangents)
    _, res = kernel.fwd(*args, **given)
    options = {k: v for k, v in work.options.items() if k in problem.bwd_options}
    expected = kernel.bwd(res, *cotangents, **options)
    wanted = [leaf for leaf, s in zip(leaves, smooth, strict=True) if s]
    for leaf, grad in zip(wanted, expected, strict=True):
        assert torch_side.same_bits(leaf.grad, grad.to(leaf.dtype))


@FIRST
def test_vjp_through_the_public_function_is_the_backward(problem, work):
    import jax

    jax_side = twin("pallas")
    arrays, cotangents = _arrays(problem, work)
    cotangents = tuple(jax_side.native(x) for x in cotangents)
    kernel = jax_side.load(problem.implementations["pallas"])
    _, inputs, given = prepared(jax_side, kernel, problem, work, "fwd", arrays)

    def both(*args):
        out, pull = jax.vjp(lambda *xs: kernel.public(*xs, **given), *args)
        options = {k: v for k, v in work.options.items() if k in problem.bwd_options}
        found = pull(cotangents if isinstance(out, tuple) else cotangents[0])
        smooth = _differentiable(problem, work)
        wanted = [g for g, s in zip(found, smooth, strict=True) if s]
        return wanted, kernel.bwd(kernel.fwd(*args, **given)[1], *cotangents, **options)

    got, expected = jax_side.run(both, inputs, {})
    for a, b in zip(got, expected, strict=True):
        assert jax_side.same_bits(a, b.astype(a.dtype))
