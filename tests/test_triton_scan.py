"""The scans in Triton beside parity: bad input, layouts of sequences, NaN, autograd's manners."""

import importlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    import os

    if os.environ.get("TRITON_INTERPRET") != "1":
        from parity.frameworks import interpreters

        interpreters()

from triton_kernels import _lib  # noqa: E402

SCAN, RGLRU = (
    importlib.import_module(f"triton_kernels.{stem}") for stem in ("linear_scan", "rglru")
)
DEVICE = "cpu" if _lib.INTERPRETING else "cuda"
HALF, FLOAT = torch.float16, torch.float32
TILES = (8, 32, 1, 1, 1)  # two parts of four steps
ALONE = (4, 64, 1, 1, 1)  # one part
PACKED = [0, 0, 1, 3, 8, 19, 19, 27, 27, 27]  # in one tile, across tiles and chunks, empty


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(*shape, dtype=FLOAT):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def arguments(name, cu, W=5, given=True, dtype=FLOAT):
    """(function, its arguments) of linear_scan or rglru."""
    T, B = cu[-1], len(cu) - 1
    h0 = normal(B, W) if given else None
    if name == "linear_scan":
        a = (0.8 + 0.2 * torch.rand(T, W, device=DEVICE)).to(dtype)
        return SCAN.linear_scan, [a, normal(T, W, dtype=dtype), ints(*cu), h0]
    rows = [normal(T, W, dtype=dtype) for _ in range(3)]
    lam = -3 - torch.rand(W, device=DEVICE)
    return RGLRU.rglru, [*rows, lam, ints(*cu), h0]


def exact(args):
    """(h, h_T) token by token in float64, differentiable."""
    *rows, cu, h0 = args
    hs, last = [], []
    for s in range(len(cu) - 1):
        state = torch.zeros_like(rows[0][0]) if h0 is None else h0[s]
        for t in range(int(cu[s]), int(cu[s + 1])):
            if len(rows) == 2:
                state = rows[0][t] * state + rows[1][t]
            else:
                x, r_pre, i_pre, lam = rows[0][t], rows[1][t], rows[2][t], rows[3]
                i = torch.sigmoid(i_pre)
                log_a = -8 * torch.sigmoid(r_pre) * torch.nn.functional.softplus(lam)
                if h0 is None and t == int(cu[s]):
                    state = i * x
                else:
                    state = log_a.exp() * state + (-torch.expm1(2 * log_a)).sqrt() * i * x
            hs.append(state)
        last.append(state)
    return torch.stack(hs), torch.stack(last)


def lifted(args):
    """In float64, as leaves."""
    return [
        x if x is None or not x.is_floating_point() else x.double().detach().requires_grad_()
        for x in args
    ]


def config_of(function, *tiles):
    return (SCAN if function is SCAN.linear_scan else RGLRU).Config(*tiles)


@pytest.mark.parametrize("name", ["linear_scan", "rglru"])
@pytest.mark.parametrize(
    ("cu", "given", "tiles", "chunks"),
    [(PACKED, True, TILES, 3), ([0, 2, 29], False, TILES, 1), ([0, 2, 29], False, ALONE, 3)],
)
def test_any_layout_in_any_chunks_is_the_recurrence(name, cu, given, tiles, chunks):
    f, args = arguments(name, cu, given=given)
    leaves = lifted(args)
    want = exact(leaves)
    dh, dh_T = normal(*want[0].shape), normal(*want[1].shape)
    wanted = [x for x in leaves if x is not None and x.is_floating_point()]
    grads = torch.autograd.grad(want, wanted, (dh.double(), dh_T.double()), allow_unused=True)
    module = SCAN if name == "linear_scan" else RGLRU
    config = config_of(f, *tiles[:2], chunks, *tiles[3:])
    got, res = getattr(module, f"{name}_fwd")(*args, config=config)
    back = getattr(module, f"{name}_bwd")(res, dh, dh_T, config=config)
    for g, w in zip((*got, *back), (*want, *grads), strict=True):
        w = torch.zeros_like(g) if w is None else w.detach()
        assert torch.allclose(g.double(), w.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["linear_scan", "rglru"])
def test_nan_stays_in_its_sequence(name):
    cu = [0, 9, 9, 20, 27]
    f, args = arguments(name, cu)
    module, config = (SCAN if name == "linear_scan" else RGLRU), config_of(f, *TILES[:2], 3, 1, 1)
    fwd, bwd = (getattr(module, f"{name}_{end}") for end in ("fwd", "bwd"))
    dh = normal(27, 5)
    out, res = fwd(*args, config=config)
    clean = (*out, *bwd(res, dh, normal(4, 5) * 0, config=config))
    args[1][10] = torch.nan  # in sequence 2
    args[-1][3] = torch.nan  # the state before sequence 3
    out, res = fwd(*args, config=config)
    hit = (*out, *bwd(res, dh, normal(4, 5) * 0, config=config))
    for before, after in zip(clean, hit, strict=True):
        if before.dim() == 1:  # dlam is a sum over all
            continue
        sequences = before.shape[0] == 4
        own = slice(0, 2) if sequences else slice(0, 9)
        assert torch.equal(before[own], after[own])
    assert hit[0][10:20].isnan().all() and torch.equal(clean[0][9:10], hit[0][9:10])


def call(**changed):
    f, (a, b, cu, h0) = arguments("linear_scan", [0, 4, 6])
    given = {"a": a, "b": b, "cu_seqlens": cu, "h0": h0, "config": None} | changed
    config = given.pop("config")
    return f(*given.values(), config=config)


def gated(**changed):
    f, values = arguments("rglru", [0, 4, 6])
    names = ("x", "r_pre", "i_pre", "lam", "cu_seqlens", "h0")
    given = dict(zip(names, values, strict=True)) | changed
    options = {n: given.pop(n) for n in ("c", "config") if n in given}
    return f(*given.values(), **options)


BAD = [
    (lambda: call(a=[[1.0]]), TypeError, r"a: expected a torch\.Tensor, got list"),
    (lambda: call(a=normal(6)), ValueError, r"a: expected shape \[T, W\], got \[6\]"),
    (lambda: call(b=normal(6, 4)), ValueError, r"b: expected shape \[6, 5\], got \[6, 4\]"),
    (lambda: call(b=normal(6, 5, dtype=HALF)), TypeError, "b: expected dtype float32"),
    (lambda: call(cu_seqlens=ints(0, 6).long()), TypeError, "cu_seqlens: expected dtype int32"),
    (lambda: call(cu_seqlens=ints(0)[0]), ValueError, r"cu_seqlens: expected shape \[B \+ 1\]"),
    (lambda: call(cu_seqlens=ints()), ValueError, r"cu_seqlens: expected shape \[B \+ 1\]"),
    (lambda: call(h0=normal(3, 5)), ValueError, r"h0: expected shape \[2, 5\], got \[3, 5\]"),
    (lambda: call(h0=normal(2, 5, dtype=HALF)), TypeError, "h0: expected dtype float32"),
    (lambda: call(config=3), TypeError, "config: .*Config or None"),
    (lambda: gated(r_pre=normal(5, 5)), ValueError, r"r_pre: expected shape \[6, 5\]"),
    (lambda: gated(i_pre=normal(6, 5, dtype=HALF)), TypeError, "i_pre: expected dtype float32"),
    (lambda: gated(lam=normal(6)), ValueError, r"lam: expected shape \[5\], got \[6\]"),
    (lambda: gated(c="8"), TypeError, "c: expected a Python float or int"),
    (lambda: gated(config=SCAN.Config()), TypeError, r"config: expected triton_kernels\.rglru"),
    (lambda: SCAN.Config(block_t=12), ValueError, "block_t: expected a power of two"),
    (lambda: SCAN.Config(block_c=512), ValueError, "block_c: expected at most 256"),
    (lambda: SCAN.Config(chunks=0), ValueError, "chunks: expected at least 1"),
    (lambda: SCAN.linear_scan_check(ints(0, 4, 3), T=4), ValueError, r"got 3 after 4 \(sequence 1"),
    (lambda: SCAN.linear_scan_check(ints(0, 4), T=6), ValueError, "to end with T = 6, got 4"),
    (lambda: SCAN.linear_scan_check(ints(1, 6), T=6), ValueError, "to begin with 0, got .1"),
    (lambda: SCAN.linear_scan_step(normal(2, 3), normal(2, 4)), ValueError, "b: expected shape"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_names_the_argument(case):
    bad, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        bad()


def test_a_good_cu_seqlens_passes():
    SCAN.linear_scan_check(ints(0, 0, 4, 6, 6), T=6)
    SCAN.linear_scan_check(ints(0), T=0)


# Rows that no sequence covers stay as they were allocated, and what the backward makes of such bits
# may well overflow: the numbers mean nothing, and so do warnings about them.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(not _lib.INTERPRETING, reason="the interpreter alone tells its accesses")
@pytest.mark.parametrize("wrong", [[0, 20, 5, 16], [3, 900, -7, 16], [9, 9, 9, 9], [0, 0, 0, 0]])
def test_a_wrong_cu_seqlens_stays_inside(wrong):
    """What comes is not defined; that it comes, and that nothing else is touched, is."""
    from parity.frameworks.triton_interpreter import launches, traffic

    a, b, _, h0 = arguments("linear_scan", [0, 4, 9, 16])[1]
    kept = [x.clone() for x in (a, b, h0)]
    config = SCAN.Config(*TILES[:2], 2, 1, 1)
    touched = []

    def note(touch):
        touched.extend((x, x + touch.itemsize) for x in touch.addresses[touch.mask].tolist())

    with launches() as seen, traffic(note):
        (h, h_T), res = SCAN.linear_scan_fwd(a, b, ints(*wrong), h0, config=config)
        grads = SCAN.linear_scan_bwd(res, b, h0, config=config)
    assert [x.shape for x in (h, h_T, *grads)] == [x.shape for x in (a, h0, a, b, h0)]
    assert all(map(torch.equal, kept, (a, b, h0)))
    given = [x for launch in seen for x in launch.arguments.values() if torch.is_tensor(x)]
    spans = {(x.data_ptr(), x.data_ptr() + x.nbytes) for x in given}
    strays = [t for t in set(touched) if not any(i <= t[0] and t[1] <= j for i, j in spans)]
    assert touched and not strays


def test_nothing_to_scan():
    for T, W, cu in ((0, 4, [0, 0, 0]), (3, 0, [0, 3])):
        h0 = normal(len(cu) - 1, W)
        for name, module in (("linear_scan", SCAN), ("rglru", RGLRU)):
            rows = [normal(T, W) for _ in range(2 if name == "linear_scan" else 3)]
            lam = [] if name == "linear_scan" else [normal(W)]
            (h, h_T), res = getattr(module, f"{name}_fwd")(*rows, *lam, ints(*cu), h0)
            assert h.shape == (T, W) and torch.equal(h_T, h0)
            *grads, dh0 = getattr(module, f"{name}_bwd")(res, h, h0)
            assert torch.equal(dh0, h0) and all(not g.any() for g in grads)


@pytest.mark.parametrize("name", ["linear_scan", "rglru"])
def test_autograd_has_manners(name):
    """Strided inputs and cotangents, inputs that need no gradient, outputs that were not used."""
    f, args = arguments(name, [0, 3, 12], W=6)
    want = exact(lifted(args))
    wide = torch.cat([args[0], args[0]], 1)[:, :6]  # rows 12 elements apart
    args[0] = wide.requires_grad_()
    args[1] = args[1].T.contiguous().T
    h, h_T = f(*args)
    assert torch.allclose(h.double(), want[0], atol=1e-5)
    (only_state,) = torch.autograd.grad(h_T.sum(), [args[0]], retain_graph=True)
    assert only_state[0].any() and args[1].grad is None
    (both,) = torch.autograd.grad([h, h_T], [args[0]], [torch.ones_like(h.T).T, 0 * h_T])
    leaves = lifted(args)
    (expected,) = torch.autograd.grad(exact(leaves)[0].sum(), [leaves[0]])
    assert torch.allclose(both.double(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["linear_scan", "rglru"])
@pytest.mark.parametrize("given", [False, True])
def test_a_step_is_a_sequence_of_one_token(name, given):
    f, args = arguments(name, [0, 1, 2, 3], given=given)
    *rows, cu, h0 = args
    step = SCAN.linear_scan_step if name == "linear_scan" else RGLRU.rglru_step
    for got, want in zip(step(*rows, h0), f(*rows, cu, h0), strict=True):
        assert torch.allclose(got, want, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiles_as_one_graph_with_gradients():
    a, b, cu, h0 = arguments("linear_scan", [0, 4, 9])[1]
    operands = [x.requires_grad_() for x in (a, b, h0)]

    def loss(a, b, h0):
        h, h_T = SCAN.linear_scan(a, b, cu, h0)
        return h.square().sum() + h_T.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*operands), operands)
    for mine, eager in zip(got, torch.autograd.grad(loss(*operands), operands), strict=True):
        torch.testing.assert_close(mine, eager)


def test_the_series_of_the_gates_are_precise():
    """Where 1 - a^2 and log(1 + z) would cancel: a gate that is hardly open, and lam far below."""
    lam = torch.linspace(-20, 5, 64, device=DEVICE)
    r_pre = torch.linspace(-9, 9, 64, device=DEVICE).repeat(2, 1)
    x, i_pre = torch.ones(2, 64, device=DEVICE), torch.zeros(2, 64, device=DEVICE)
    args = [x, r_pre, i_pre, lam, ints(0, 2), torch.zeros(1, 64, device=DEVICE)]
    h, _ = RGLRU.rglru(*args)
    want, _ = exact(lifted(args))
    assert ((h.double() - want).abs() <= 3e-6 * want.abs()).all()
    assert np.isfinite(h.cpu().numpy()).all()
