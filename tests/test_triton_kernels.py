"""The Triton twins beside parity: bad input, torch.compile, autograd's manners, edges of memory."""

import importlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    import os

    if os.environ.get("TRITON_INTERPRET") != "1":
        from parity.frameworks import interpreters

        interpreters()

from triton_kernels import _lib, matmul, rms_norm, softmax  # noqa: E402

MATMUL, SOFTMAX, RMS_NORM = (
    importlib.import_module(f"triton_kernels.{stem}") for stem in ("matmul", "softmax", "rms_norm")
)
DEVICE = "cpu" if _lib.INTERPRETING else "cuda"
HALF = torch.float16
SMALL = {
    "matmul": MATMUL.Config(32, 32, 16, 2, 2, 4),
    "softmax": SOFTMAX.Config(2, 16, 4),
    "rms_norm": RMS_NORM.Config(2, 16, 2, 4, 1),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=HALF, requires_grad=False):
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(requires_grad)


def error(got, want):
    return float((got.double() - want).norm() / (want.norm() + 1e-30))


def test_importing_the_package_imports_no_framework():
    code = "import sys, triton_kernels; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_public_functions_are_exported():
    import triton_kernels

    names = ["HybridMeta", "HybridPlan", "decay_attention", "decay_attention_step"]
    names += ["fp8_quantize_blocks", "fp8_quantize_cols", "fp8_quantize_rows"]
    names += ["grouped_gemm", "grouped_gemm_dw", "hadamard_quantize", "hadamard_rotate"]
    names += ["hybrid_attention", "hybrid_attention_atomic", "hybrid_plan"]
    names += ["int4_from_awq", "int4_from_gptq", "int4_matmul", "int4_matmul_atomic"]
    names += ["int4_prepack", "int4_quantize", "int4_to_awq", "int4_to_gptq"]
    names += ["int8_quantize", "linear_scan", "linear_scan_step", "mamba2_ssd", "matmul"]
    names += ["retention", "rglru", "rglru_step", "rms_norm", "softmax"]
    assert dir(triton_kernels) == names
    assert callable(triton_kernels.matmul) and callable(triton_kernels.rms_norm)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        triton_kernels.nothing  # noqa: B018


BAD = [
    (lambda: matmul([[1.0]], normal(1, 1)), TypeError, r"a: expected a torch\.Tensor, got list"),
    (lambda: matmul(normal(3), normal(3, 4)), ValueError, r"a: expected shape \[M, K\], got \[3\]"),
    (lambda: matmul(normal(2, 3), normal(4, 5)), ValueError, r"b: expected shape \[3, N\]"),
    (lambda: matmul(normal(2, 3, dtype=torch.float32), normal(3, 2)), TypeError, "a: .*TF32"),
    (lambda: matmul(normal(2, 3), normal(3, 2, dtype=torch.float32)), TypeError, "b: .*TF32"),
    (lambda: matmul(normal(2, 3), normal(3, 2).int()), TypeError, "b: expected dtype bfloat16 or"),
    (lambda: matmul(normal(2, 3), normal(3, 2), out_dtype="int8"), TypeError, "out_dtype: .*int8"),
    (lambda: matmul(normal(2, 3), normal(3, 2), config=3), TypeError, "config: .*Config or None"),
    (lambda: MATMUL.matmul_bwd((normal(2, 3), normal(3, 4)), normal(2, 3)), ValueError, "dc: "),
    (lambda: MATMUL.Config(block_m=48), ValueError, "block_m: expected a power of two"),
    (lambda: softmax(normal(2, 3, 4)), ValueError, r"x: expected shape \[R, N\]"),
    (lambda: softmax(normal(2, 3).int()), TypeError, "x: expected dtype"),
    (lambda: softmax(normal(2, 3), normal(2, 3)), TypeError, "mask: expected dtype bool"),
    (lambda: softmax(normal(2, 3), scale="1"), TypeError, "scale: expected a Python float or int"),
    (lambda: softmax(normal(2, 3), causal_offset=0.5), TypeError, "causal_offset: .*int"),
    (lambda: softmax(normal(2, 3), config=SMALL["matmul"]), TypeError, "config: "),
    (lambda: SOFTMAX.softmax_bwd((normal(2, 3),), normal(3, 2)), ValueError, "dy: expected shape"),
    (lambda: rms_norm(normal(2, 3), normal(4)), ValueError, r"w: expected shape \[3\], got \[4\]"),
    (lambda: rms_norm(normal(2, 3), normal(3), normal(3, 2)), ValueError, "residual: expected"),
    (lambda: rms_norm(normal(2, 3), normal(3).int()), TypeError, "w: expected dtype float16 or"),
    (lambda: rms_norm(normal(2, 3), normal(3), cast_before_weight=1), TypeError, "Python bool"),
    (lambda: rms_norm(normal(2, 3), normal(3), eps=None), TypeError, "eps: expected a Python"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_names_the_argument(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.skipif(not _lib.INTERPRETING, reason="the interpreter's own refusals")
def test_interpreter_refuses_bfloat16_and_other_devices():
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    for call in (lambda: softmax(x), lambda: rms_norm(x, x[0]), lambda: matmul(x, x.t())):
        with pytest.raises(TypeError, match="bfloat16: Triton's interpreter"):
            call()
    with pytest.raises(ValueError, match=r"x: expected a CPU tensor .* got meta"):
        softmax(torch.empty(2, 2, device="meta"))


def test_cpu_tensor_without_interpreter_is_refused():
    code = (
        "import torch; from triton_kernels import softmax\n"
        "try: softmax(torch.ones(2, 2))\n"
        "except ValueError as e: assert 'x: expected a CUDA tensor, got one on cpu' in str(e), e\n"
        "else: raise SystemExit('accepted')"
    )
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_zero_sizes():
    assert matmul(normal(0, 3), normal(3, 4)).shape == (0, 4)
    assert matmul(normal(2, 3), normal(3, 0)).shape == (2, 0)
    assert torch.equal(matmul(normal(2, 0), normal(0, 4)).cpu(), torch.zeros(2, 4, dtype=HALF))
    for shape in ((0, 5), (5, 0)):
        assert softmax(normal(*shape)).shape == shape
        (dx,) = SOFTMAX.softmax_bwd((normal(*shape),), normal(*shape))
        assert dx.shape == shape
        (y, h), res = RMS_NORM.rms_norm_fwd(normal(*shape), normal(shape[1]), normal(*shape))
        assert y.shape == h.shape == shape
        dx, dw = RMS_NORM.rms_norm_bwd(res, normal(*shape))
        assert dx.shape == shape
        assert torch.equal(dw.cpu(), torch.zeros(shape[1]))


def test_transposed_views_and_odd_pitches_need_no_copy_and_are_right():
    a, b = normal(24, 40), normal(40, 16)
    want = a.double() @ b.double()
    views = {
        "stored transposed": (a.t().contiguous().t(), b.t().contiguous().t()),
        "odd pitch": (normal(24, 41)[:, :40].copy_(a), normal(40, 17)[:, :16].copy_(b)),
        "every other": (normal(24, 80)[:, ::2].copy_(a), normal(80, 16)[::2].copy_(b)),
    }
    for name, (x, y) in views.items():
        assert error(matmul(x, y, config=SMALL["matmul"]), want) < 3e-4, name


def _calls():
    """Public calls of differentiable operands, and the same in float64."""

    def exact_rms(x, w, residual):
        h = x + residual
        return h * (h.square().mean(1, keepdim=True) + 1e-6) ** -0.5 * w, h

    return {
        "matmul": (
            lambda a, b: matmul(a, b, config=SMALL["matmul"]),
            lambda a, b: a @ b,
            ((24, 16), (16, 40)),
        ),
        "softmax": (
            lambda x: softmax(x, scale=0.5, config=SMALL["softmax"]),
            lambda x: torch.softmax(0.5 * x, 1),
            ((5, 40),),
        ),
        "rms_norm": (
            lambda *args: rms_norm(*args, config=SMALL["rms_norm"]),
            exact_rms,
            ((5, 40), (40,), (5, 40)),
        ),
    }


@pytest.mark.parametrize("stem", ["matmul", "softmax", "rms_norm"])
def test_autograd_and_non_contiguous_cotangents(stem):
    ours, exact, shapes = _calls()[stem]
    operands = [normal(*shape, requires_grad=True) for shape in shapes]
    lifted = [x.detach().double().requires_grad_() for x in operands]
    got, want = ours(*operands), exact(*lifted)
    got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    transposed = [normal(*y.shape[::-1]).t() for y in got]
    expanded = [torch.ones((), dtype=HALF, device=DEVICE).expand_as(y) for y in got]
    for cotangents in (transposed, expanded):
        grads = torch.autograd.grad(got, operands, cotangents, retain_graph=True)
        exacts = torch.autograd.grad(
            want, lifted, [c.double() for c in cotangents], retain_graph=True
        )
        for grad, exact_grad in zip(grads, exacts, strict=True):
            assert grad.dtype is HALF
            assert float((grad.double() - exact_grad).abs().max()) < 2e-2


# Dynamo makes an instance of the autograd.Function, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("stem", ["matmul", "softmax", "rms_norm"])
def test_compiles_as_one_graph_with_gradients(stem):
    ours, _, shapes = _calls()[stem]
    operands = [normal(*shape, requires_grad=True) for shape in shapes]

    def loss(*args):
        out = ours(*args)
        return sum(y.float().square().sum() for y in (out if isinstance(out, tuple) else (out,)))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands), loss(*operands))
    got = torch.autograd.grad(compiled(*operands), operands)
    for mine, eager in zip(got, torch.autograd.grad(loss(*operands), operands), strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("stem", ["matmul", "softmax", "rms_norm"])
def test_only_needed_gradients(stem):
    ours, _, shapes = _calls()[stem]
    for needed in range(len(shapes)):
        operands = [normal(*s, requires_grad=i == needed) for i, s in enumerate(shapes)]
        out = ours(*operands)
        out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()
        assert [x.grad is not None for x in operands] == [i == needed for i in range(len(shapes))]
    assert not ours(*(normal(*s) for s in shapes))[0].requires_grad


def test_second_derivatives_are_refused_not_wrong():
    x = normal(2, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def _guarded(x, fill=float("nan")):
    """x inside a larger buffer of poison, and the buffer's poison afterwards."""
    rows, cols = x.shape[0] + 4, x.shape[-1] + 16
    big = torch.full((rows, cols), fill, dtype=x.dtype, device=x.device)
    inner = big[2 : 2 + x.shape[0], 8 : 8 + x.shape[-1]]
    inner.copy_(x)
    return inner


def test_reads_stay_inside_their_operands():
    a, b, x, r = normal(24, 40), normal(40, 16), normal(5, 40), normal(5, 40)
    w = _guarded(normal(1, 40))[0]
    assert torch.equal(matmul(_guarded(a), _guarded(b)), matmul(a, b))
    for config in (None, SMALL["softmax"]):
        y = softmax(x, config=config)
        assert torch.equal(softmax(_guarded(x), config=config), y)
        got = SOFTMAX.softmax_bwd((_guarded(y),), _guarded(r), config=config)
        assert torch.equal(got[0], SOFTMAX.softmax_bwd((y,), r, config=config)[0])
    for config in (None, SMALL["rms_norm"]):
        y, res = RMS_NORM.rms_norm_fwd(x, w, r, config=config)
        guarded = RMS_NORM.rms_norm_fwd(_guarded(x), w, _guarded(r), config=config)[0]
        assert torch.equal(guarded[0], y[0]) and torch.equal(guarded[1], y[1])
        got = RMS_NORM.rms_norm_bwd(
            (_guarded(res[0]), *res[1:]), _guarded(x), _guarded(r), config=config
        )
        for mine, plain in zip(got, RMS_NORM.rms_norm_bwd(res, x, r, config=config), strict=True):
            assert torch.equal(mine, plain)


@pytest.mark.parametrize("N", [48, 256, 272, 300])
def test_rows_of_more_tiles_than_a_program_holds_gradients_for(N: int):
    """Tiles that fill the row, or not, in one group of programs or in two."""
    h, dy, w = (normal(*shape, dtype=torch.float32) for shape in ((5, N), (5, N), (1, N)))
    w, rstd = w[0], torch.rsqrt(h.square().mean(1) + 1e-6)
    got = RMS_NORM.rms_norm_bwd((_guarded(h), w, rstd), _guarded(dy), config=SMALL["rms_norm"])
    xh, g = (h * rstd[:, None]).double(), (dy * w).double()
    dx = rstd[:, None] * (g - xh * (g * xh).mean(1, keepdim=True))
    assert error(got[0], dx) < 1e-6 and error(got[1], (dy * xh).sum(0)) < 1e-6


def test_writes_stay_inside_their_outputs(monkeypatch):
    buffers = []
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def guarded(allocate):
        def call(*args, **kwargs):
            out = allocate(*args, **kwargs)
            big = torch.full((out.numel() + 256,), 3.0, dtype=out.dtype, device=out.device)
            buffers.append(big)
            return big[128:-128].view(out.shape)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded(empty))
        patch.setattr(torch.Tensor, "new_empty", guarded(new_empty))
        for matrix in ((24, 40), (23, 39)):  # 16-byte rows for TMA, odd ones for pointers
            x, w = normal(*matrix), normal(matrix[1])
            _, res = MATMUL.matmul_fwd(x, normal(matrix[1], 17), config=SMALL["matmul"])
            MATMUL.matmul_bwd(res, normal(matrix[0], 17), config=SMALL["matmul"])
            _, res = SOFTMAX.softmax_fwd(x, config=SMALL["softmax"])
            SOFTMAX.softmax_bwd(res, x, config=SMALL["softmax"])
            _, res = RMS_NORM.rms_norm_fwd(x, w, x, config=SMALL["rms_norm"])
            RMS_NORM.rms_norm_bwd(res, x, x, config=SMALL["rms_norm"])
    assert len(buffers) >= 20
    for big in buffers:
        assert (big[:128] == 3.0).all() and (big[-128:] == 3.0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is the point
def test_dead_memory_never_matters():
    x = normal(4, 40)
    mask = torch.rand(4, 40, device=DEVICE) > 0.5
    mask[1] = False
    poisoned = torch.where(mask, x, torch.nan)
    for config in (None, SMALL["softmax"]):
        y = softmax(poisoned, mask, scale=-1.0, config=config)
        assert torch.equal(y, softmax(x, mask, scale=-1.0, config=config))
        assert (y[~mask] == 0).all()
        (dx,) = SOFTMAX.softmax_bwd((y,), x, config=config)
        assert torch.isfinite(dx).all() and (dx[~mask] == 0).all()
        x_inf = x.clone()
        x_inf[2, 3] = torch.inf
        y = softmax(x_inf, config=config)
        assert y[2].isnan().all() and torch.isfinite(y[[0, 1, 3]]).all()
