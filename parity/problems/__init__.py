"""All problems, in the order in which they are best learned."""

from parity.problems import (
    decay_attention,
    fp8_quantize,
    hadamard,
    hybrid_attention,
    hybrid_attention_atomic,
    int4_matmul,
    int8_quantize,
    linear_scan,
    mamba2_ssd,
    matmul,
    moe_gemm,
    retention,
    rglru,
    rms_norm,
    softmax,
)
from parity.spec import Problem

PROBLEMS: tuple[Problem, ...] = (
    matmul.PROBLEM,
    softmax.PROBLEM,
    rms_norm.PROBLEM,
    moe_gemm.PROBLEM,
    hybrid_attention.PROBLEM,
    hybrid_attention_atomic.PROBLEM,
    int8_quantize.PROBLEM,
    fp8_quantize.PROBLEM,
    hadamard.PROBLEM,
    int4_matmul.PROBLEM,
    linear_scan.PROBLEM,
    rglru.PROBLEM,
    decay_attention.PROBLEM,
    retention.PROBLEM,
    mamba2_ssd.PROBLEM,
)


def problem(stem: str) -> Problem:
    """The problem called `stem`; KeyError names the nearest one."""
    by_stem = {p.stem: p for p in PROBLEMS}
    if stem not in by_stem:
        import difflib

        near = difflib.get_close_matches(stem, by_stem, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"no problem {stem!r}{hint} (there are: {', '.join(by_stem)})")
    return by_stem[stem]
