"""How a puzzle's spec.py says what parity calls a problem: a forward pass and nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

from parity.spec import Array, Cost, Problem, Workload


def case(
    name: str, sizes: Mapping[str, int], *, content: str = "normal", **options: Any
) -> Workload:
    """One case: sizes, what the numbers look like (see puzzles.inputs), static arguments."""
    return Workload(name, sizes, "float32", (content,), options, passes=("fwd",))


def problem(
    stem: str,
    cases: tuple[Workload, ...],
    inputs: Callable[[Workload], dict[str, Any]],
    outputs: Callable[[Workload], dict[str, Array]],
    oracle: Callable[..., tuple],
    *,
    terms: int = 1,
) -> Problem:
    """A Problem for parity's judge, shrink and diagnose. terms: of the sum behind an element."""
    return Problem(
        stem=stem,
        doc="",
        family="gemm",
        workloads=cases,
        inputs=inputs,
        cotangents=lambda work: {},
        outputs=outputs,
        grads=lambda work: {},
        oracle=oracle,
        oracle_bwd=oracle,
        cost=lambda work, which: Cost(0, 0),
        reduction=lambda work, name: terms,
        implementations={},
        peers={},
    )
