"""The Triton four-bit product beside parity: bad input, both orders of weights, any tiles, edges,
autograd's manners."""

import dataclasses
import importlib
import os
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    if os.environ.get("TRITON_INTERPRET") != "1":
        from parity.frameworks import interpreters

        interpreters()

from parity import formats, sass  # noqa: E402
from parity.compile import compile_gate  # noqa: E402
from parity.frameworks.triton_interpreter import launches  # noqa: E402
from parity.problems.int4_matmul import PROBLEM  # noqa: E402
from triton_kernels import _lib  # noqa: E402

INT4 = importlib.import_module("triton_kernels.int4_matmul")
int4_matmul, int4_prepack = INT4.int4_matmul, INT4.int4_prepack
DEVICE = "cpu" if _lib.INTERPRETING else "cuda"
HALF, FLOAT = torch.float16, torch.float32
SMALL = INT4.Config(8, 32, 2, 1, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=HALF):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def error(got, want):
    return float((got.double() - want).norm() / (want.norm() + 1e-30))


def quantized(N, K, group, symmetric=False, seed=0):
    """(W as it is decoded, [N, K], and w_packed, w_scale, w_zero), as parity.formats has it."""
    w = np.random.default_rng(seed).standard_normal((N, K)).astype(np.float16)
    arrays = formats.int4_quantize(w, group=group, symmetric=symmetric)
    w = torch.from_numpy(formats.int4_dequantize(*arrays, group=group))
    arrays = [None if a is None else torch.from_numpy(a).to(DEVICE) for a in arrays]
    return w.double().to(DEVICE), arrays


def call(**changed):
    given = {
        "x": normal(3, 256),
        "w_packed": torch.zeros((16, 128), dtype=torch.uint8, device=DEVICE),
        "w_scale": normal(16, 2),
        "w_zero": torch.zeros((16, 4), dtype=torch.uint8, device=DEVICE),
    } | changed
    arrays = [given.pop(n) for n in ("x", "w_packed", "w_scale", "w_zero")]
    return int4_matmul(*arrays, **given)


def uint8(*shape):
    return torch.zeros(shape, dtype=torch.uint8, device=DEVICE)


def prepacked():
    words, scale, _ = int4_prepack(uint8(16, 128), normal(16, 2))
    return {"w_packed": words, "w_scale": scale}


BAD = [
    (lambda: call(x=[[1.0]]), TypeError, r"x: expected a torch\.Tensor, got list"),
    (lambda: call(x=normal(256)), ValueError, r"x: expected shape \[M, K\], got \[256\]"),
    (lambda: call(x=normal(3, 256, dtype=FLOAT)), TypeError, "x: expected dtype bfloat16 or float"),
    (lambda: call(x=normal(3, 384)), ValueError, r"w_packed: expected shape \[16, 192\]"),
    (lambda: call(w_packed=uint8(16, 64)), ValueError, r"w_packed: expected shape \[16, 128\]"),
    (lambda: call(w_packed=uint8(16, 128).int()), TypeError, "w_packed: expected dtype uint8"),
    (lambda: call(w_packed=uint8(1, 16, 64)), TypeError, "w_packed: expected dtype int16"),
    (lambda: call(w_packed=uint8(128)), ValueError, r"w_packed: expected shape \[N, K / 2\]"),
    (lambda: call(w_scale=normal(16, 4)), ValueError, r"w_scale: expected shape \[16, 2\]"),
    (lambda: call(w_scale=normal(16, 2, dtype=FLOAT)), TypeError, "w_scale: expected dtype floa"),
    (lambda: call(w_zero=uint8(16, 2)), ValueError, r"w_zero: expected shape \[16, 4\]"),
    (lambda: call(w_zero=uint8(16, 4).int()), TypeError, "w_zero: expected dtype uint8"),
    (lambda: call(group=48), ValueError, "group: expected 32, 64, 128 or 256, got 48"),
    (lambda: call(group=True), TypeError, "group: expected a Python int"),
    (lambda: call(x=normal(3, 192)), ValueError, "group: expected 128 to divide K = 192"),
    (lambda: call(split_k=2), ValueError, r'split_k: expected "auto" or 1 \.\. 1, the blocks'),
    (lambda: call(split_k=0), ValueError, "split_k: expected .* got 0"),
    (lambda: call(split_k=1.0), TypeError, "split_k: expected a Python int"),
    (lambda: call(bias=normal(15)), ValueError, r"bias: expected shape \[16\]"),
    (lambda: call(bias=normal(16, dtype=FLOAT)), TypeError, "bias: expected dtype float16"),
    (lambda: call(config=3), TypeError, "config: .*Config or None"),
    (lambda: INT4.int4_quantize(normal(3)), ValueError, r"w: expected shape \[N, K\], got \[3\]"),
    (lambda: INT4.int4_quantize(normal(3, 64)), ValueError, "group: expected 128 to divide K = 64"),
    (lambda: INT4.int4_quantize(normal(3, 64, dtype=FLOAT)), TypeError, "w: expected dtype bfloa"),
    (
        lambda: INT4.int4_quantize(normal(3, 128), symmetric=1),
        TypeError,
        "symmetric: expected a Python bool",
    ),
    (lambda: INT4.Config(block_n=48), ValueError, "block_n: expected a power of two >= 16"),
    (lambda: INT4.Config(block_m=4), ValueError, "block_m: expected a power of two >= 8"),
    (
        lambda: int4_prepack(*int4_prepack(uint8(16, 128), normal(16, 2))),
        ValueError,
        "w_packed: expected shape .* prepacked",
    ),
    (
        lambda: INT4.int4_matmul_bwd(int4_prepack(uint8(16, 128), normal(16, 2)), normal(3, 15)),
        ValueError,
        r"dy: expected shape \[M, 16\]",
    ),
    (
        lambda: INT4.int4_matmul_bwd((uint8(16, 128), normal(16, 2), None), normal(3, 16)),
        ValueError,
        "res: expected prepacked weights",
    ),
    (
        lambda: call(**prepacked() | {"w_scale": normal(16, 2)}),
        ValueError,
        r"w_scale: expected shape \[2, 16\], got \[16, 2\]",
    ),
    (lambda: call(**prepacked()), ValueError, r"w_zero: expected shape \[2, 16\], got \[16, 4\]"),
    (
        lambda: call(x=normal(3, 512), **prepacked()),
        ValueError,
        r"w_packed: expected shape \[2, 16, 64\], got \[1, 16, 64\]",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_names_the_argument(case):
    bad, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        bad()


def _odd_ones(w, group):
    """Zeros, a NaN, infinities, one sign alone, and a range too large for float16."""
    w[0, :group] = 0
    w[1, 3] = np.nan
    w[2, -1], w[2, 0] = np.inf, -np.inf
    w[3] = np.abs(w[3])
    w[4, :group], w[4, 0] = 65504, -65504
    return w


@pytest.mark.filterwarnings("ignore:(invalid|divide|overflow).*:RuntimeWarning")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("K", "group"), [(512, 32), (576, 64), (1280, 128), (256, 256)])
def test_quantizing_is_the_format_bit_for_bit(K, group, symmetric):
    rng = np.random.default_rng(K)
    w = rng.standard_normal((7, K)) * rng.choice([1e-4, 1, 100], (7, 1))
    w = _odd_ones(w.astype(np.float16), group)
    want = formats.int4_quantize(w, group=group, symmetric=symmetric)
    wide = torch.full((7, K + 8), torch.nan, dtype=HALF, device=DEVICE)
    wide[:, 8:] = torch.from_numpy(w)
    for given in (torch.from_numpy(w).to(DEVICE), wide[:, 8:]):
        for y, r in zip(
            INT4.int4_quantize(given, group=group, symmetric=symmetric), want, strict=True
        ):
            assert (y is None) == (r is None)
            if r is not None:
                assert y.cpu().numpy().dtype == r.dtype
                assert np.array_equal(y.cpu().numpy(), r, equal_nan=r.dtype != np.uint8)


def test_sizes_of_zero():
    packed, scale, zero = INT4.int4_quantize(normal(0, 256), symmetric=False)
    assert (packed.shape, scale.shape, zero.shape) == ((0, 128), (0, 2), (0, 4))
    bias = normal(16)
    for M, N, K in ((0, 16, 256), (3, 0, 256), (3, 16, 0)):
        given = normal(M, K), uint8(N, K // 2), normal(N, K // 128)
        y, res = INT4.int4_matmul_fwd(*given, bias=bias[:N])
        assert torch.equal(y, bias[:N].expand(M, N))
        (dx,) = INT4.int4_matmul_bwd(res, torch.ones_like(y))
        assert torch.equal(dx, torch.zeros(M, K, dtype=HALF, device=DEVICE))


@pytest.mark.parametrize("K", [256, 320])
def test_prepacking_moves_every_code_and_loses_none(K):
    N, group = 5, 64
    _, (packed, scale, zero) = quantized(N, K, group)
    words, scales, zeros = int4_prepack(packed, scale, zero, group=group)
    assert words.dtype is torch.int16 and words.shape == (-(-K // 256), N, 64)
    code = torch.stack([words >> 4 * i & 15 for i in range(4)], dim=2)  # [blocks, N, 4, 64]
    code = code.transpose(0, 1).reshape(N, -1)
    assert (code[:, K:] == 8).all()
    code = code[:, :K].cpu().numpy().astype(np.uint8)
    assert np.array_equal(formats.pack_nibbles(code, low_first=True), packed.cpu().numpy())
    assert torch.equal(scales, scale.t())
    back = formats.int4_pack_zeros(np.ascontiguousarray(zeros.t().cpu().numpy()))
    assert np.array_equal(back, zero.cpu().numpy())


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric, tokens", [(True, 9), (False, 9), (False, INT4.FEW_M + 8)])
def test_the_product_of_what_the_formats_quantize(group, symmetric, tokens):
    w, arrays = quantized(40, 512, group, symmetric)
    x, bias = normal(tokens, 512), normal(40)
    want = x.double() @ w.T + bias
    y = int4_matmul(x, *arrays, group=group, bias=bias, config=SMALL)
    assert error(y, want) < 5e-4
    prepacked = int4_prepack(*arrays, group=group)
    assert torch.equal(int4_matmul(x, *prepacked, group=group, bias=bias, config=SMALL), y)


def test_tiles_and_slices_change_only_the_rounding():
    w, (packed, scale, zero) = quantized(40, 1280, 128)
    words, scales, zeros = int4_prepack(packed, scale, zero)
    bias, ones = normal(40), torch.ones_like(scales)
    whole = torch.randint(-3, 4, (20, 1280), device=DEVICE).to(HALF)
    first = int4_matmul(whole, words, ones, zeros, split_k=1)
    x = normal(20, 1280)
    want = x.double() @ w.T + bias
    for slices, config in ((1, SMALL), (1, INT4.Config(16, 128, 2, 1, 4)), (3, None), (5, SMALL)):
        how = {"split_k": slices, "config": config}
        # sums of whole numbers are not rounded
        assert torch.equal(int4_matmul(whole, words, ones, zeros, **how), first)
        # the bias is added to the sum of the slices, once
        assert error(int4_matmul(x, words, scales, zeros, bias=bias, **how), want) < 5e-4


def test_added_as_they_come_the_slices_have_the_same_sum():
    w, arrays = quantized(40, 1280, 128)
    arrays, bias = int4_prepack(*arrays), normal(40)
    x = normal(5, 1280).requires_grad_()
    for slices in (1, 4):
        y = INT4.int4_matmul_atomic(x, *arrays, split_k=slices, bias=bias, config=SMALL)
        assert error(y.detach(), x.detach().double() @ w.T + bias) < 5e-4
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert error(dx, torch.ones_like(y).double() @ w) < 1e-3


def test_many_tokens_are_multiplied_by_weights_written_out(monkeypatch):
    monkeypatch.setattr(INT4, "DENSE_M", 16)
    w, arrays = quantized(40, 320, 64)
    x = normal(24, 320)
    arrays = int4_prepack(*arrays, group=64)
    with launches() as launched:
        y = int4_matmul(x, *arrays, group=64)
    assert [launch.kernel for launch in launched] == ["_int4_dequantize_kernel", "_matmul_kernel"]
    assert error(y, x.double() @ w.T) < 5e-4


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is the point
def test_a_scale_that_is_not_finite_reaches_its_row_alone():
    _, (packed, scale, zero) = quantized(24, 512, 128)
    x = normal(4, 512)
    clean = int4_matmul(x, packed, scale, zero, config=SMALL)
    for bad in (torch.nan, torch.inf):
        scale_bad = scale.clone()
        scale_bad[7, 2] = bad
        y = int4_matmul(x, packed, scale_bad, zero, config=SMALL)
        assert not torch.isfinite(y[:, 7]).any()
        others = [n for n in range(24) if n != 7]
        assert torch.equal(y[:, others], clean[:, others])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is the point
@pytest.mark.parametrize("tokens", [5, INT4.FEW_M + 5])
def test_neighbours_in_memory_never_matter(tokens):
    """x amid NaN; the last block of K is half full, and the last tiles are ragged."""
    w, arrays = quantized(40, 384, 128)
    x = normal(tokens, 384)
    wide = torch.full((tokens + 4, 384 + 16), torch.nan, dtype=HALF, device=DEVICE)
    inner = wide[2:-2, 8:392]
    inner.copy_(x)
    y = int4_matmul(x, *arrays, config=SMALL)
    assert error(y, x.double() @ w.T) < 5e-4
    assert torch.equal(int4_matmul(inner, *arrays, config=SMALL), y)
    odd = torch.full((tokens + 4, 385), torch.nan, dtype=HALF, device=DEVICE)[2:-2, :384]
    odd.copy_(x)
    assert torch.equal(int4_matmul(odd, *arrays, config=SMALL), y)
    assert torch.equal(int4_matmul(x.t().contiguous().t(), *arrays, config=SMALL), y)


def test_autograd_gives_x_its_gradient_and_the_weights_none():
    w, arrays = quantized(40, 384, 64)
    x = normal(6, 384).requires_grad_()
    scale = arrays[1].clone().requires_grad_()
    y = int4_matmul(x, arrays[0], scale, arrays[2], group=64, config=SMALL)
    for dy in (normal(40, 6).t(), torch.ones((), dtype=HALF, device=DEVICE).expand(6, 40)):
        grads = torch.autograd.grad(y, (x, scale), dy, retain_graph=True, allow_unused=True)
        assert grads[0].dtype is HALF and grads[1] is None
        assert error(grads[0], dy.double() @ w) < 1e-3
    assert not int4_matmul(x.detach(), *arrays, group=64).requires_grad
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# Dynamo makes an instance of the autograd.Function, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_as_one_graph_with_its_gradient():
    _, arrays = quantized(40, 256, 128)
    arrays = int4_prepack(*arrays)
    x = normal(6, 256).requires_grad_()

    def loss(x):
        return int4_matmul(x, *arrays, config=SMALL).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    got, want = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_weights_stay_in_registers(tmp_path):
    """Compiled for Hopper, the main loop writes nothing to shared memory but copies from memory."""
    names = ("llama70b_up_m1", "llama70b_up_m16_zeros", "llama70b_up_m64")
    rows = compile_gate([PROBLEM], workloads=names, twins=("triton",), cache=tmp_path)
    assert len(rows) == len(names)
    for row in rows:
        loop = sass.parse((tmp_path / row.listing).read_text()).main_loop
        assert loop is not None and loop.kinds["cp.async"] >= 6
        assert loop.kinds["wgmma" if row.workload == "llama70b_up_m64" else "mma.sync"] >= 16
        assert loop.kinds["shared store"] == loop.kinds["stmatrix"] == loop.kinds["shuffle"] == 0


def multiplied_as_integers(ptx):
    """Integer products, in ptx, of a float32 product's bits."""
    floats, found = set(), []
    for line in ptx.splitlines():
        op, *names = re.findall(r"^[a-z][\w.]*|%?\b[a-z]\w*", line.strip()) or [""]
        if re.match(r"mul\.(\w+\.)*f32", op):
            floats.add(names[0])
        elif not floats.isdisjoint(names[1:]):
            if re.match(r"(mul|mad)(24)?\.(lo|hi|wide)\.[us]", op):
                found.append(line.strip())
            elif re.match(r"(mov|add|sub|neg)\.[bus]", op):
                floats.add(names[0])
    return found


@pytest.mark.parametrize("twin", ["triton", "pallas"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ptxas_is_given_no_product_that_it_mixes_up(tmp_path, twin, symmetric):
    """(x * c) * d, a float's product times an integer's: ptxas has made it x * (c * d)."""
    work = PROBLEM.workload("int4_quantize_8192x8192")
    options = {"group": 128, "symmetric": symmetric}
    work = dataclasses.replace(work, name=f"symmetric_{symmetric}", options=options)
    problem = dataclasses.replace(PROBLEM, workloads=(work,))
    (row,) = compile_gate([problem], workloads=[work.name], twins=(twin,), cache=tmp_path)
    if row.status == "lowered":
        pytest.skip("needs jax's CUDA compiler (make sass)")
    assert not row.fails, row.message
    assert not multiplied_as_integers((tmp_path / row.listing).read_text())


def test_a_product_that_ptxas_mixes_up_is_found():
    ptx = """
        mul.f32 \t%r2, %r1, 0f4B400000;
        sub.s32 \t%r3, 8, %r2;
        shl.b32 \t%r4, %r2, 4;
        mul.lo.s32 \t%r5, %r4, 3;
        mul.lo.s32 \t%r6, %r3, 286331153;
    """
    assert multiplied_as_integers(ptx) == ["mul.lo.s32 \t%r6, %r3, 286331153;"]


def test_defaults_follow_the_sizes():
    config, split = INT4.default_config, INT4.default_split
    assert config(1, 28672, 8192, HALF).block_m == 8
    assert config(9, 28672, 8192, HALF).block_m == 16
    assert config(64, 28672, 8192, HALF).block_m == 64
    assert config(4096, 28672, 8192, HALF).block_m == 128
    # few rows: their K is shared; many tokens: it is not
    assert split(1, 6144, 4096) > split(1, 28672, 8192) == split(4096, 1024, 8192) == 1
    # sums of many tokens are many bytes
    assert split(16, 6144, 4096) < split(1, 6144, 4096)
    assert split(16, 8192, 28672) == split(1, 8192, 28672)
    for M, N, K in ((1, 64, 256), (16, 6144, 4096), (1, 8192, 28672)):
        assert 1 <= split(M, N, K) <= -(-K // 256)
