"""The four-bit product's spec beside its formats: both orders of the codes, and files of others."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from parity import formats
from parity.problems.int4_matmul import BLOCK_K, PROBLEM
from parity.spec import Arithmetic

CI = [w for w in PROBLEM.workloads if "ci" in w.tags and "fwd" in w.passes]
CANONICAL = PROBLEM.workload("ci")


def _draw(work, seed=0):
    rng = np.random.default_rng(seed)
    return {n: d.draw(rng) for n, d in (PROBLEM.inputs(work) | PROBLEM.cotangents(work)).items()}


def _inputs(work, seed=0):
    return {n: x for n, x in _draw(work, seed).items() if n in PROBLEM.inputs(work)}


def _code_of(words, K):
    """Each code where the order says it is, one by one: [N, K]."""
    n, k = np.meshgrid(np.arange(words.shape[1]), np.arange(K), indexing="ij")
    block, within = k // BLOCK_K, k % BLOCK_K
    return words[block, n, within % 64] >> 4 * (within // 64) & 15


@pytest.mark.parametrize("work", CI, ids=[w.name for w in CI])
def test_the_oracle_multiplies_by_what_the_format_decodes(work):
    a, (K, G) = _inputs(work), (work["K"], work["G"])
    (y,) = PROBLEM.oracle(Arithmetic.truth(xp), work, **a)
    if "canonical" in work.tags:
        code = formats.unpack_nibbles(a["w_packed"], low_first=True)
        scale, zero = a["w_scale"], formats.int4_unpack_zeros(a["w_zero"], K // G)
    else:
        code, scale = _code_of(a["w_packed"], K), a["w_scale"].T
        zero = a["w_zero"].T if "w_zero" in a else np.full(scale.shape, 8, np.uint8)
    w = formats.int4_decode(code, np.repeat(scale, G, axis=1), np.repeat(zero, G, axis=1))
    want = a["x"].astype(np.float64) @ w.astype(np.float64).T + a.get("bias", 0.0)
    assert np.allclose(y, want, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_a_linear_function():
    for work in (w for w in CI if "bwd" in w.passes):
        a, ar = _draw(work), Arithmetic.truth(xp)
        dy = a.pop("dy")
        (dx,) = PROBLEM.oracle_bwd(ar, work, **a, dy=dy)
        step = np.zeros_like(a["x"])
        step[-1, -1], step[0, 5] = 0.5, -2
        moved = a | {"x": a["x"].astype(np.float64) + step}
        change = PROBLEM.oracle(ar, work, **moved)[0] - PROBLEM.oracle(ar, work, **a)[0]
        assert np.sum(dx * step) == pytest.approx(np.sum(change * dy), rel=1e-9)


def _quantized(N, K, group, symmetric, seed=0):
    w = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float16)
    return formats.int4_quantize(w, group=group, symmetric=symmetric)


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_gptq_gives_the_product_that_gptq_defines(version):
    """(q - z) * s as AutoGPTQ's own unpacking has it: shifts of the int32 words of its layout."""
    N, K, G = 24, 256, 64
    packed, scale, zero = _quantized(N, K, G, symmetric=False)
    if version == 1:  # which cannot hold a zero point of 0
        zero = formats.int4_pack_zeros(np.maximum(formats.int4_unpack_zeros(zero, K // G), 1))
    file = formats.int4_to_gptq(packed, scale, zero, version=version)
    shifts = 4 * np.arange(8)
    q = (file.qweight[:, None, :] >> shifts[None, :, None] & 15).reshape(K, N)
    z = (file.qzeros[:, :, None] >> shifts & 15).reshape(K // G, N) + (version == 1)
    w = (q - z[file.g_idx]) * file.scales[file.g_idx].astype(np.float64)  # [K, N]
    _same_product(w.T, N, K, G, formats.int4_from_gptq(*file, version=version))


def test_a_file_of_awq_gives_the_product_that_awq_defines():
    N, K, G = 24, 256, 64
    file = formats.int4_to_awq(*_quantized(N, K, G, symmetric=False))
    column = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of eight, where AWQ's nibble order puts it
    q = (file.qweight[:, :, None] >> 4 * column & 15).reshape(K, N)
    z = (file.qzeros[:, :, None] >> 4 * column & 15).reshape(K // G, N)
    group = np.arange(K) // G
    w = (q - z[group]) * file.scales[group].astype(np.float64)
    _same_product(w.T, N, K, G, formats.int4_from_awq(*file))


def _same_product(w, N, K, G, arrays):
    from dataclasses import replace

    packed, scale, zero = arrays
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float16)
    work = replace(CANONICAL, sizes={"M": 3, "N": N, "K": K, "G": G}, absent=("bias",))
    (y,) = PROBLEM.oracle(Arithmetic.truth(xp), work, x, packed, scale, zero)
    assert np.allclose(y, x.astype(np.float64) @ w.T, rtol=1e-9)


@pytest.mark.parametrize("name", ["ci_quantize", "ci_quantize_groups_of_32"])
def test_the_oracle_of_the_quantizer_is_the_format(name):
    work = PROBLEM.workload(name)
    w = PROBLEM.inputs(work)["w"].draw(np.random.default_rng(3))
    w[0, : work["G"]] = 0
    w[1, : work["G"]] = np.abs(w[1, : work["G"]])
    want = formats.int4_quantize(w, group=work["G"], symmetric=False)
    got = PROBLEM.further["plan"].oracle(Arithmetic.truth(xp), work, w)
    for y, r, spec in zip(got, want, PROBLEM.results(work, "plan").values(), strict=True):
        assert spec.exact and (spec.shape, spec.dtype) == (r.shape, r.dtype.name)
        assert np.array_equal(y, r.astype(np.float64))


def test_the_oracle_of_prepacking_puts_each_code_where_the_order_says():
    work = PROBLEM.workload("ci_prepack")
    a, (K, G) = _inputs(work), (work["K"], work["G"])
    given = {n: a[n] for n in ("w_packed", "w_scale", "w_zero")}
    got = PROBLEM.further["prepack"].oracle(Arithmetic.truth(xp), work, **given)
    for y, spec in zip(got, PROBLEM.results(work, "prepack").values(), strict=True):
        assert spec.exact and spec.shape == y.shape
        assert np.array_equal(y, y.astype(spec.dtype))  # whole, and within the dtype
    words, scale, zero = (y.astype(s) for y, s in zip(got, ("int16", "f2", "u1"), strict=True))
    code = formats.unpack_nibbles(a["w_packed"], low_first=True)
    assert np.array_equal(_code_of(words, K), code)
    left = K % BLOCK_K  # of the last block
    assert (_code_of(words[-1:], BLOCK_K)[:, left:] == 8).all()
    assert np.array_equal(scale, a["w_scale"].T)
    assert np.array_equal(zero, formats.int4_unpack_zeros(a["w_zero"], K // G).T)


def test_prepacking_is_timed_and_asks_for_no_kernel():
    from parity import compile

    work = PROBLEM.workload("int4_prepack_28672x8192")
    assert [PROBLEM.launches(which) for which in ("fwd", "plan", "prepack")] == [True, True, False]
    (task,) = compile._tasks(PROBLEM, work, ("triton",), None, {}, {})
    assert task.request["passes"] == []  # nothing for the gate
    read = [PROBLEM.inputs(work)[n] for n in PROBLEM.reads(work, "prepack")]
    written = PROBLEM.results(work, "prepack").values()
    size = sum(np.prod(x.shape) * np.dtype(_np(x.dtype)).itemsize for x in (*read, *written))
    assert PROBLEM.cost(work, "prepack").bytes == size


def _np(name):
    return "uint16" if name == "bfloat16" else name


def test_sums_of_the_probe_are_exact_in_float32():
    for work in (w for w in PROBLEM.workloads if "fwd" in w.passes):
        probe = PROBLEM.probe(work)
        assert probe is not None
        x, scale = probe["x"], probe["w_scale"]
        weight = 15 * max(-scale.low, scale.high)
        assert weight < 1 << 8  # bfloat16 has 8 bits
        terms = max(work["K"], work["N"] if "bwd" in work.passes else 0)
        assert weight * max(-x.low, x.high) * terms < 1 << 24


def test_costs_count_half_a_byte_for_each_weight():
    work = PROBLEM.workload("llama70b_up_m1")
    M, N, K = (work[letter] for letter in "MNK")
    cost = PROBLEM.cost(work, "fwd")
    assert cost.bytes == N * K / 2 + N * K // 128 * 2 + 2 * M * (K + N)
    assert cost.flops == 2 * M * N * K
    zeros = PROBLEM.cost(PROBLEM.workload("llama70b_up_m16_zeros"), "fwd").bytes
    plain = PROBLEM.cost(PROBLEM.workload("llama70b_up_m16"), "fwd").bytes
    assert zeros - plain == N * K // 128 / 2 + 2 * N  # zero points and the bias


def test_the_workloads_of_the_issue_are_there():
    names = {w.name for w in PROBLEM.workloads}
    assert names >= {f"llama70b_up_m{M}" for M in (1, 8, 16, 64, 256, 4096)}
    assert names >= {f"llama70b_down_m{M}" for M in (1, 8, 16, 64, 256, 4096)}
    assert names >= {"llama8b_qkv_m1", "llama8b_qkv_m16"}
    assert names >= {f"llama8b_up_m{M}" for M in (1, 16, 256)}
    assert names >= {"int4_quantize_8192x8192", "int4_quantize_4096x14336"}
    assert "int4_prepack_28672x8192" in names


def test_addresses_beyond_32_bits_are_asked_for():
    beyond = 1 << 31
    (huge,) = (w for w in PROBLEM.workloads if "huge" in w.tags and "fwd" in w.passes)
    assert np.prod(PROBLEM.inputs(huge)["w_packed"].shape, dtype=np.int64) > beyond
    (huge,) = (w for w in PROBLEM.workloads if "huge" in w.tags and "plan" in w.passes)
    assert np.prod(PROBLEM.inputs(huge)["w"].shape, dtype=np.int64) > beyond
