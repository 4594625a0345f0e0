"""The Triton grouped product beside parity: bad input, bad sizes, autograd's manners, edges."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    if os.environ.get("TRITON_INTERPRET") != "1":
        from parity.frameworks import interpreters

        interpreters()

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from parity.frameworks.triton_interpreter import launches  # noqa: E402
from triton_kernels import _lib, grouped_gemm, grouped_gemm_dw  # noqa: E402

MOE = importlib.import_module("triton_kernels.moe_gemm")
DEVICE = "cpu" if _lib.INTERPRETING else "cuda"
HALF, FLOAT = torch.float16, torch.float32
SMALL = MOE.Config(32, 32, 16, 2, 1, False, 4)
DECODE = MOE.Config(16, 64, 32, 2, 8, True, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=HALF, requires_grad=False):
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(requires_grad)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def error(got, want):
    return float((got.double() - want).norm() / (want.norm() + 1e-30))


def exact(x, w, ends, rows=None, bias=None, row_scale=None, swiglu=False):
    """In float64; ends: where each expert's rows end."""
    parts, start = [], 0
    for e, end in enumerate(ends):
        r = torch.arange(start, end, device=DEVICE)
        h = (x[r] if rows is None else x[rows[r].long()]) @ w[e]
        h = h if bias is None else h + bias[e]
        a = torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2] if swiglu else h
        parts.append(a if row_scale is None else a * row_scale[r, None])
        start = max(start, end)
    y = torch.cat(parts)
    M = len(x) if rows is None else len(rows)
    return torch.cat([y, y.new_zeros(M - len(y), y.shape[1])])


def call(**changed):
    given = {"x": normal(6, 16), "w": normal(2, 16, 8), "sizes": ints(2, 3)} | changed
    return grouped_gemm(given.pop("x"), given.pop("w"), given.pop("sizes"), **given)


BAD = [
    (lambda: call(x=[[1.0]]), TypeError, r"x: expected a torch\.Tensor, got list"),
    (lambda: call(x=normal(6)), ValueError, r"x: expected shape \[M, K\], got \[6\]"),
    (lambda: call(x=normal(6, 16, dtype=FLOAT)), TypeError, "x: .*TF32"),
    (lambda: call(w=normal(2, 16, 8, dtype=FLOAT)), TypeError, "w: .*TF32"),
    (lambda: call(w=normal(2, 8, 16)), ValueError, r"w: expected shape \[E, 16, N\]"),
    (lambda: call(transpose_w=True), ValueError, r"w: expected shape \[E, N, 16\]"),
    (lambda: call(transpose_w=1), TypeError, "transpose_w: expected a Python bool"),
    (lambda: call(sizes=ints(2, 3, 1)), ValueError, r"sizes: expected shape \[2\], got \[3\]"),
    (lambda: call(sizes=ints(2, 3).long()), TypeError, "sizes: expected dtype int32, got int64"),
    (lambda: call(rows=ints(2, 3).long()), TypeError, "rows: expected dtype int32"),
    (lambda: call(bias=normal(8)), ValueError, r"bias: expected shape \[2, 8\]"),
    (lambda: call(row_scale=normal(6)), TypeError, "row_scale: expected dtype float32"),
    (lambda: call(row_scale=normal(5, dtype=FLOAT)), ValueError, r"row_scale: .*\[6\]"),
    (lambda: call(activation="gelu"), ValueError, "activation: expected None or 'swiglu'"),
    (lambda: call(w=normal(2, 16, 7), activation="swiglu"), ValueError, "w: expected an even N"),
    (lambda: call(out_dtype="int8"), TypeError, "out_dtype: expected float16 or float32"),
    (lambda: call(config=3), TypeError, "config: .*Config or None"),
    (lambda: MOE.Config(block_n=48), ValueError, "block_n: expected a power of two"),
    (lambda: grouped_gemm_dw(normal(6, 4), normal(5, 3), ints(5)), ValueError, "dy: expected"),
    (
        lambda: grouped_gemm_dw(normal(6, 4), normal(6, 3), ints(5), config=DECODE),
        ValueError,
        "config: expected decode=False",
    ),
    (
        lambda: MOE.grouped_gemm_bwd(
            (normal(6, 4), normal(1, 4, 3), ints(5), *[None] * 4), normal(6, 3), config=DECODE
        ),
        ValueError,
        "config: expected decode=False",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_names_the_argument(case):
    bad, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        bad()


def test_sizes_of_zero_give_zeros():
    for M, K, N, E in ((0, 4, 3, 2), (5, 0, 3, 2), (5, 4, 0, 2), (5, 4, 3, 0)):
        sizes = torch.full((E,), 2, dtype=torch.int32, device=DEVICE)
        y, res = MOE.grouped_gemm_fwd(normal(M, K), normal(E, K, N), sizes)
        dx, dw = MOE.grouped_gemm_bwd(res, normal(M, N))
        for got, shape in ((y, (M, N)), (dx, (M, K)), (dw, (E, K, N))):
            assert torch.equal(got, torch.zeros(shape, dtype=HALF, device=DEVICE))


@pytest.mark.parametrize("config", [None, SMALL, DECODE])
def test_wrong_sizes_and_indices_stay_inside(config):
    """A negative size counts 0, what is beyond M is cut, an index outside x reads zeros."""
    x, w = normal(20, 24), normal(4, 24, 40)
    want = exact(x.double(), w.double(), (7, 7, 15, 20))
    y = grouped_gemm(x, w, ints(7, -5, 8, 2**31 - 1), config=config)
    assert error(y, want) < 5e-4
    rows = torch.arange(19, -1, -1, dtype=torch.int32, device=DEVICE)
    rows[3], rows[18] = 20, -1
    got, res = MOE.grouped_gemm_fwd(x, w, ints(7, 0, 8, 4), rows=rows, config=config)
    want = exact(x.double(), w.double(), (7, 7, 15, 19), rows=rows % 20)
    want[[3, 18]] = 0
    assert error(got, want) < 5e-4
    dx, _ = MOE.grouped_gemm_bwd(res, torch.ones_like(got))
    assert torch.isfinite(dx).all()
    # rows 3 and 18 of y took nothing, row 19 is dead: their rows of x have no gradient
    assert (dx[[16, 1, 0]] == 0).all() and (dx[2] != 0).any()


def test_check_names_what_it_finds():
    check = MOE.grouped_gemm_check
    check(ints(3, 0, 4), M=8)
    check(ints(2, 1), ints(4, 0, 3, 99), M=4, T=5)  # row 3 is dead
    for sizes, rows, T, message in (
        (ints(4, -3, 1), None, None, r"^sizes: expected >= 0, got -3 for expert 1$"),
        (ints(9, 131), None, None, r"^sizes: sum to 140, 4 more than the M = 136 rows$"),
        (ints(136), ints(*[0] * 12, 70, *[0] * 123), 64, r"below T = 64, got 70 at row 12$"),
        (ints(136), ints(*[-1] * 136), 64, "below T = 64, got -1 at row 0$"),
    ):
        with pytest.raises(ValueError, match=message):
            check(sizes, rows, M=136, T=T)
    with pytest.raises(TypeError, match="T: expected a Python int"):
        check(ints(1), ints(0), M=1)
    with pytest.raises(TypeError, match="sizes: expected dtype int32"):
        check(ints(1).long(), M=1)


def test_weights_of_any_strides_need_no_copy_and_are_right():
    x, w, sizes = normal(20, 24), normal(3, 24, 40), ints(9, 0, 11)
    want = exact(x.double(), w.double(), (9, 9, 20))
    views = {
        "stored transposed": w.transpose(1, 2).contiguous().transpose(1, 2),
        "odd pitch": normal(3, 24, 41)[:, :, :40].copy_(w),
        "every other": normal(3, 24, 80)[:, :, ::2].copy_(w),
        "one for all": w[:1].expand(3, 24, 40),
    }
    for name, view in views.items():
        goal = exact(x.double(), view.double(), (9, 9, 20)) if "all" in name else want
        assert error(grouped_gemm(x, view, sizes, config=SMALL), goal) < 5e-4, name
        turned = grouped_gemm(x, view.transpose(1, 2), sizes, transpose_w=True, config=SMALL)
        assert error(turned, goal) < 5e-4, name


def _fused(x, w, bias, row_scale):
    rows = ints(4, 0, 3, 3, 1, 4, 2, 0, 4, 1)
    sizes, options = ints(5, 0, 4), {"rows": rows, "activation": "swiglu"}
    return grouped_gemm(x, w, sizes, bias=bias, row_scale=row_scale, config=SMALL, **options)


def _operands(needed=(True,) * 4):
    # rows of 48 elements: what is gathered goes beside what TMA loads
    shapes = (5, 48), (3, 48, 16), (3, 16), (10,)
    dtypes = (HALF, HALF, HALF, FLOAT)
    return [
        normal(*s, dtype=d, requires_grad=n) for s, d, n in zip(shapes, dtypes, needed, strict=True)
    ]


def test_autograd_and_non_contiguous_cotangents():
    operands = _operands()
    lifted = [x.detach().double().requires_grad_() for x in operands]
    rows = ints(4, 0, 3, 3, 1, 4, 2, 0, 4, 1)
    x, w, bias, scale = lifted
    want = exact(x, w, (5, 5, 9), rows, bias, scale, swiglu=True)
    got = _fused(*operands)
    assert error(got.detach(), want.detach()) < 5e-4
    for dy in (normal(8, 10).t(), torch.ones((), dtype=HALF, device=DEVICE).expand(10, 8)):
        grads = torch.autograd.grad(got, operands, dy, retain_graph=True)
        exacts = torch.autograd.grad(want, lifted, dy.double(), retain_graph=True)
        for grad, exact_grad, operand in zip(grads, exacts, operands, strict=True):
            assert grad.dtype is operand.dtype
            assert error(grad, exact_grad) < 2e-3


# Dynamo makes an instance of the autograd.Function, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_as_one_graph_with_gradients():
    operands = _operands()

    def loss(*args):
        return _fused(*args).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands), loss(*operands))
    got = torch.autograd.grad(compiled(*operands), operands)
    for mine, eager in zip(got, torch.autograd.grad(loss(*operands), operands), strict=True):
        torch.testing.assert_close(mine, eager)


def test_only_needed_gradients_and_one_differentiation():
    for needed in range(4):
        operands = _operands([i == needed for i in range(4)])
        _fused(*operands).sum().backward()
        assert [x.grad is not None for x in operands] == [i == needed for i in range(4)]
    assert not _fused(*_operands((False,) * 4)).requires_grad
    (dx,) = torch.autograd.grad(_fused(*operands).square().sum(), operands[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def _guarded(x):
    """x amid NaN, with rows as wide as before but for 16 bytes at either end."""
    rows, cols = x.shape[-2] + 4, x.shape[-1] + 16
    big = torch.full((*x.shape[:-2], rows, cols), torch.nan, dtype=x.dtype, device=x.device)
    inner = big[..., 2 : 2 + x.shape[-2], 8 : 8 + x.shape[-1]]
    inner.copy_(x)
    return inner


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is the point
@pytest.mark.parametrize("N", [40, 39])  # 16-byte rows for TMA, odd ones for pointers
def test_neighbours_in_memory_never_matter(N):
    x, w, sizes, dy = normal(40, 24), normal(3, 24, N), ints(20, 0, 13), normal(40, N)
    alive = 33
    dead_x, dead_dy = x.clone(), dy.clone()
    dead_x[alive:], dead_dy[alive:] = torch.nan, torch.inf
    for config in (SMALL, DECODE):
        y = grouped_gemm(x, w, sizes, config=config)
        assert torch.equal(grouped_gemm(_guarded(x), _guarded(w), sizes, config=config), y)
        assert torch.equal(grouped_gemm(dead_x, w, sizes, config=config), y)
        assert (y[alive:] == 0).all()
    dw = grouped_gemm_dw(x, dy, sizes, config=SMALL)
    assert dw.dtype is FLOAT and (dw[1] == 0).all()
    assert torch.equal(grouped_gemm_dw(_guarded(x), _guarded(dy), sizes, config=SMALL), dw)
    res = (dead_x, w, sizes, None, None, None, None)
    dx, from_dead = MOE.grouped_gemm_bwd(res, dead_dy, config=SMALL)
    assert torch.equal(from_dead, dw.to(HALF))
    assert torch.isfinite(dx).all() and (dx[alive:] == 0).all()


def test_nan_of_one_expert_stays_with_its_rows():
    x, w, sizes = normal(30, 20), normal(3, 20, 24), ints(9, 8, 13)
    w[1] = torch.nan
    for config in (SMALL, DECODE):  # K = 20 is no multiple of a tile
        y = grouped_gemm(x, w, sizes, config=config)
        assert torch.isfinite(y[:9]).all() and torch.isfinite(y[17:]).all()
        assert y[9:17].isnan().all()


def test_writes_stay_inside_their_outputs(monkeypatch):
    buffers = []
    new_empty = torch.Tensor.new_empty

    def guarded(*args, **kwargs):
        out = new_empty(*args, **kwargs)
        big = torch.full((out.numel() + 256,), 3.0, dtype=out.dtype, device=out.device)
        buffers.append(big)
        return big[128:-128].view(out.shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", guarded)
        for N in (40, 38):
            x, w, sizes, rows = normal(9, 24), normal(3, 24, N), ints(9, 0, 11), ints(*range(9))
            scale = torch.ones(9, dtype=FLOAT, device=DEVICE)
            for options in ({"rows": rows}, {"activation": "swiglu", "row_scale": scale}):
                for config in (SMALL, DECODE):
                    y, res = MOE.grouped_gemm_fwd(x, w, sizes, config=config, **options)
                options.pop("rows", None), options.pop("row_scale", None)
                MOE.grouped_gemm_bwd(res, torch.ones_like(y), config=SMALL, **options)
    assert len(buffers) >= 20
    for big in buffers:
        assert (big[:128] == 3.0).all() and (big[-128:] == 3.0).all()


@pytest.mark.parametrize("config", [SMALL, MOE.Config(64, 128, 64, 3, 2, False, 4), DECODE])
def test_config_changes_no_result(config):
    x, w, sizes = normal(60, 40), normal(4, 40, 72), ints(35, 0, 1, 20)
    bias, scale = normal(4, 72), normal(60, dtype=FLOAT)
    want = exact(x.double(), w.double(), (35, 35, 36, 56), None, bias.double(), scale.double())
    y = grouped_gemm(x, w, sizes, bias=bias, row_scale=scale, config=config)
    assert error(y, want) < 5e-4
    swiglu = grouped_gemm(x, w, sizes, bias=bias, activation="swiglu", config=config)
    want = exact(x.double(), w.double(), (35, 35, 36, 56), None, bias.double(), swiglu=True)
    assert error(swiglu, want) < 5e-4


def test_sums_over_more_rows_than_a_tile_holds():
    """One expert has nearly all rows, in three tiles, and most of them took the same row of x."""
    x, w, bias, dy = normal(5, 8), normal(3, 8, 16), normal(3, 16), normal(600, 16)
    rows = torch.full((600,), 2, dtype=torch.int32, device=DEVICE)
    rows[[7, 300, 559]], sizes = 4, ints(2, 560, 3)
    _, res = MOE.grouped_gemm_fwd(x, w, sizes, rows=rows, bias=bias)
    dx, dw, dbias = MOE.grouped_gemm_bwd(res, dy)
    lifted = [t.double().requires_grad_() for t in (x, w, bias)]
    want = exact(lifted[0], lifted[1], (2, 562, 565), rows, lifted[2])
    exacts = torch.autograd.grad(want, lifted, dy.double())
    for got, goal in zip((dx, dw, dbias), exacts, strict=True):
        assert error(got, goal) < 5e-4
    assert (dx[[0, 1, 3]] == 0).all()


class _HostReads(TorchDispatchMode):
    """Refuses what would bring a value of a tensor to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"), name
        return func(*args, **(kwargs or {}))


def _specialised(value):
    """What of an argument decides which code runs: of a tensor all but its values and place."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        parts = _specialised(value.base), value.shape, value.strides, value.block_shape
        return str(parts)
    return value


def _routed(sizes, x, w, options):
    y, res = MOE.grouped_gemm_fwd(x, w, sizes, config=SMALL, **options)
    activation = {"activation": options.get("activation")}
    MOE.grouped_gemm_bwd(res, torch.ones_like(y), config=SMALL, **activation)
    grouped_gemm_dw(x[: len(y)], x[: len(y)], sizes, config=SMALL)


def test_what_the_host_launches_does_not_depend_on_the_routing():
    """So no routing compiles anew, and a captured CUDA graph serves them all."""
    x, w = normal(60, 16), normal(6, 16, 32)
    fused = {
        "rows": torch.arange(60, dtype=torch.int32, device=DEVICE), "bias": normal(6, 32),
        "row_scale": normal(60, dtype=FLOAT), "activation": "swiglu",
    }  # fmt: skip
    for options, kernels in (({}, 8), (fused, 12)):
        found = set()
        for draw in range(20):
            share = torch.rand(6) ** draw
            share[: draw % 6] = 0
            experts = torch.multinomial(share, 60 - draw, replacement=True)
            sizes = experts.bincount(minlength=6).int().to(DEVICE)
            with launches(ghost=True) as launched, _HostReads():
                _routed(sizes, x, w, options)
            assert len(launched) == kernels
            arguments = [{k: _specialised(v) for k, v in a.items()} for _, a in launched]
            found.add(str(arguments))
        assert len(found) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there are no CUDA graphs and no compilations on a CPU"
)
def test_one_captured_graph_serves_twenty_routings():
    folder = Path(__file__).parent
    cpu_mode = ("TRITON_INTERPRET", "JAX_PLATFORMS")
    env = {k: v for k, v in os.environ.items() if k not in cpu_mode}
    done = subprocess.run(
        [sys.executable, str(folder / "moe_on_gpu.py")],
        env=env | {"PYTHONPATH": str(folder.parent)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["compiled"] > 0 and seen["recompiled"] == 0 and seen["routings"] == 40
