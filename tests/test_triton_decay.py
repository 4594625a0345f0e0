"""Decay attention and its adapters in Triton beside parity: all options, chunks, bad input, NaN."""

import importlib
import itertools

import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    import os

    if os.environ.get("TRITON_INTERPRET") != "1":
        from parity.frameworks import interpreters

        interpreters()

from triton_kernels import _lib  # noqa: E402

DECAY, STEP, RETENTION, MAMBA = (
    importlib.import_module(f"triton_kernels.{stem}")
    for stem in ("decay_attention", "decay_attention_step", "retention", "mamba2_ssd")
)
DEVICE = "cpu" if _lib.INTERPRETING else "cuda"
HALF, FLOAT = torch.float16, torch.float32
PACKED = [0, 0, 5, 42, 42]  # within a chunk, across chunks and spans, empty


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(*shape, dtype=FLOAT):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def arguments(cu, H=2, Hq=1, K=16, V=32, constant=False, weighted=True, given=True):
    """q, k, v, g, i, S0, cu_seqlens."""
    T, B = cu[-1], len(cu) - 1
    q, k = (normal(T, Hq, K, dtype=HALF) for _ in range(2))
    g = -torch.rand(*((H,) if constant else (T, H)), device=DEVICE)
    i = normal(T, H) if weighted else None
    S0 = normal(B, H, K, V) if given else None
    return [q, k, normal(T, H, V, dtype=HALF), g, i, S0, ints(*cu)]


def unaligned(x):
    """x where rows begin 8 bytes beside a multiple of 16."""
    return torch.cat([x[..., :4], x], -1)[..., 4:]


def exact(q, k, v, g, i, S0, cu, scale):
    """(y, S_T) token by token in float64, differentiable."""
    (T, Hq, K), (H, V) = q.shape, v.shape[1:]
    q, k = (x.repeat_interleave(H // Hq, 1) for x in (q, k))
    g = g.expand(T, H)
    w = torch.ones_like(g) if i is None else i.exp()
    ys, last = [v[:0].double()], []
    for s, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        S = torch.zeros(H, K, V, device=v.device, dtype=torch.float64) if S0 is None else S0[s]
        for t in range(start, stop):
            added = w[t, :, None, None] * k[t, :, :, None] * v[t, :, None, :]
            S = g[t].exp()[:, None, None] * S + added
            ys.append(scale * torch.einsum("hk,hkv->hv", q[t], S)[None])
        last.append(S)
    return torch.cat(ys), torch.stack(last)


def lifted(args):
    """In float64, as leaves."""
    return [
        x if x is None or not x.is_floating_point() else x.double().detach().requires_grad_()
        for x in args
    ]


def near(got, want, limit):
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-3)
    assert error < limit, f"{error:.2e}"


# float16 rounds to 2^-11, of which about a third is the norm; products of two rounded operands
LIMIT = {HALF: 1e-3, FLOAT: 2e-3}


def same(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        near(g, w.detach(), LIMIT[g.dtype])


def back_and_forth(module, name, args, want, leaves, **options):
    """Outputs and gradients of module.name are those of the definition, `want` of `leaves`."""
    cotangents = normal(*want[0].shape, dtype=HALF), normal(*want[1].shape)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = torch.autograd.grad(want, wanted, [x.double() for x in cotangents])
    got, res = getattr(module, f"{name}_fwd")(*args, **options)
    same((*got, *getattr(module, f"{name}_bwd")(res, *cotangents, **options)), (*want, *grads))


@pytest.mark.parametrize(
    ("cu", "given", "chunk", "config"),
    [
        # two heads a q head, added by one program; spans of two chunks; K and V no powers of two
        (PACKED, {"K": 48, "V": 48}, 16, (64, 2, 2)),
        # three heads a q head in two programs, decays that stay, three tiles of v
        ([0, 7, 40], {"H": 3, "V": 48, "constant": True}, 32, (16, 1, 2)),
        # no weights and states; rows that TMA cannot address, so that pointers load them
        ([0, 9, 40], {"Hq": 2, "weighted": False, "given": False}, 32, (32, 1, 1)),
        # so many keys that states are multiplied from shared memory
        ([0, 20, 37], {"H": 1, "K": 144}, 16, (32, 2, 1)),
    ],
)
def test_any_layout_is_the_recurrence(cu, given, chunk, config):
    args = arguments(cu, **given)
    if "weighted" in given:
        args[:3] = map(unaligned, args[:3])
    leaves = lifted(args)
    options = {"scale": 0.25, "chunk": chunk, "config": DECAY.Config(*config)}
    want = exact(*leaves, 0.25)
    back_and_forth(DECAY, "decay_attention", args, want, leaves, **options)


# gradients by the same walk, in spans and whole; so many keys that they are decay attention's
@pytest.mark.parametrize(("K", "config"), [(16, (16, 2)), (16, None), (144, None)])
def test_retention_is_decay_attention_with_its_decays(K, config):
    q, k, v, _, _, S0, cu = arguments([0, 7, 7, 40], Hq=2, K=K)
    leaves = lifted([q, k, v, S0])
    g = torch.log1p(-(2.0 ** (-5 - torch.arange(2, device=DEVICE).double())))
    want = exact(*leaves[:3], g, None, leaves[3], cu, K**-0.5)
    options = {"chunk": 16, "config": config and RETENTION.Config(*config)}
    back_and_forth(RETENTION, "retention", [q, k, v, S0, cu], want, leaves, **options)


def ssd(x, dt, A, B, C, D, z, dt_bias, cu, h0, softplus, limit):
    """(y, h_T) of Mamba-2, token by token in float64, differentiable."""
    (_, H, P), N = x.shape, B.shape[2]
    B, C = (m.repeat_interleave(H // m.shape[1], 1) for m in (B, C))
    u = dt if dt_bias is None else dt + dt_bias
    u = (torch.nn.functional.softplus(u) if softplus else u).clamp(*limit)
    ys, last = [], []
    for s, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        h = x.new_zeros(H, P, N) if h0 is None else h0[s]
        for t in range(start, stop):
            added = u[t, :, None, None] * x[t, :, :, None] * B[t, :, None, :]
            h = (u[t] * A).exp()[:, None, None] * h + added
            ys.append(torch.einsum("hpn,hn->hp", h, C[t])[None])
        last.append(h)
    y = torch.cat(ys)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return y if z is None else y * z * torch.sigmoid(z), torch.stack(last)


@pytest.mark.parametrize("everything", [True, False])
def test_mamba2_ssd_is_its_recurrence(everything):
    T, H, G, P, N = 37, 2, 1, 16, 32
    x, z = (normal(T, H, P, dtype=HALF) for _ in range(2))
    B, C = (normal(T, G, N, dtype=HALF) for _ in range(2))
    dt, A = torch.rand(T, H, device=DEVICE), -torch.rand(H, device=DEVICE)
    D, bias, h0 = normal(H, P) if everything else normal(H), normal(H), normal(3, H, P, N)
    dt[::5] = 0  # a step that is none has a gradient too
    options = {"dt_softplus": True, "dt_limit": (0.4, 1.1)} if everything else {}
    z, bias, h0 = (z, bias, h0) if everything else (None, None, None)
    args = [x, dt, A, B, C, D, z, bias, ints(0, 21, 21, T), h0]
    leaves = lifted(args)
    limit = options.get("dt_limit", (0.0, float("inf")))
    want = ssd(*leaves, options.get("dt_softplus", False), limit)
    back_and_forth(MAMBA, "mamba2_ssd", args, want, leaves, chunk=16, **options)


def test_chunks_and_tiles_change_the_last_bits_alone():
    args = arguments([0, 50], H=1)
    dy = normal(50, 1, 32, dtype=HALF)
    found = []
    for chunk, config in ((16, (16, 1)), (16, (32, 3)), (64, (32, 1))):
        options = {"chunk": chunk, "config": DECAY.Config(*config)}
        out, res = DECAY.decay_attention_fwd(*args, **options)
        found.append((*out, *DECAY.decay_attention_bwd(res, dy, **options)))
    for other in found[1:]:
        same(other, [x.double() for x in found[0]])


def test_nothing_decays_at_a_first_token_without_a_state():
    """The gradient of its gate is 0, not what rounding leaves of sums that cancel."""
    args = arguments([0, 50, 50, 83], H=4, V=48, given=False)
    dy = normal(83, 4, 48, dtype=HALF)
    for S0 in (None, torch.zeros(3, 4, 16, 48, device=DEVICE)):
        args[5] = S0
        _, res = DECAY.decay_attention_fwd(*args, chunk=32)
        dg = DECAY.decay_attention_bwd(res, dy, normal(3, 4, 16, 48), chunk=32)[3]
        assert not dg[[0, 50]].any() and dg[[1, 51]].all()


@pytest.mark.parametrize("tma", [True, False])
def test_nan_stays_in_its_sequence(tma):
    args = arguments([0, 18, 18, 37, 42], H=1)
    if not tma:
        args[:3] = map(unaligned, args[:3])
    dy = normal(42, 1, 32, dtype=HALF)
    config = DECAY.Config(32, 2, 1)

    def run():
        out, res = DECAY.decay_attention_fwd(*args, chunk=16, config=config)
        return (*out, *DECAY.decay_attention_bwd(res, dy, normal(4, 1, 16, 32) * 0, chunk=16))

    clean = run()
    for x in args[:5]:
        x[25] = torch.nan  # in sequence 2
    args[5][2] = torch.nan
    for before, after in zip(clean, run(), strict=True):
        own = slice(0, 2) if len(before) == 4 else slice(0, 18)
        rest = slice(3, 4) if len(before) == 4 else slice(37, 42)
        assert torch.equal(before[own], after[own]) and torch.equal(before[rest], after[rest])
        assert after.isnan().any()


def call(**changed):
    q, k, v, g, i, S0, cu = arguments([0, 4, 6])
    given = {"q": q, "k": k, "v": v, "g": g, "i": i, "S0": S0, "cu_seqlens": cu} | changed
    options = {n: given.pop(n) for n in ("scale", "chunk", "config") if n in given}
    return DECAY.decay_attention(*given.values(), **options)


def step_sizes(**changed):
    rows = {"x": normal(6, 2, 16, dtype=HALF), "dt": normal(6, 2), "A": -torch.rand(2).to(DEVICE)}
    rows |= {n: normal(6, 1, 16, dtype=HALF) for n in "BC"} | {"D": None, "z": None}
    given = rows | {"dt_bias": None, "cu_seqlens": ints(0, 6), "h0": None} | changed
    options = {n: given.pop(n) for n in ("dt_softplus", "dt_limit", "config") if n in given}
    return MAMBA.mamba2_ssd(*given.values(), **options)


def narrow(*shape):
    return normal(*shape, dtype=HALF)


BAD = [
    (lambda: call(q=[1.0]), TypeError, r"q: expected a torch\.Tensor, got list"),
    (lambda: call(q=normal(6, 1, 16)), TypeError, "q: expected .*float16, got float32: tensor"),
    (lambda: call(q=narrow(6, 1, 8), k=narrow(6, 1, 8)), ValueError, "q: .* 16, 32, .. 256, got 8"),
    (lambda: call(k=narrow(6, 2, 16)), ValueError, r"k: expected shape \[6, 1, 16\]"),
    (lambda: call(v=narrow(6, 2, 20)), ValueError, "v: expected a width .* multiple of 16, got 20"),
    (lambda: call(v=narrow(5, 2, 16)), ValueError, r"v: expected shape \[6, H, V\], got"),
    (
        lambda: call(q=narrow(6, 3, 16), k=narrow(6, 3, 16)),
        ValueError,
        "v: expected heads that are a multiple of the 3 of q, got 2",
    ),
    (lambda: call(g=normal(6, 3)), ValueError, r"g: expected shape \[6, 2\], got \[6, 3\]"),
    (lambda: call(g=normal(3)), ValueError, r"g: expected shape \[2\], got \[3\]"),
    (lambda: call(g=narrow(6, 2)), TypeError, "g: expected dtype float32"),
    (lambda: call(i=normal(6)), ValueError, r"i: expected shape \[6, 2\]"),
    (lambda: call(S0=normal(1, 2, 16, 32)), ValueError, r"S0: expected shape \[2, 2, 16, 32\]"),
    (lambda: call(cu_seqlens=ints(0, 6).long()), TypeError, "cu_seqlens: expected dtype int32"),
    (lambda: call(cu_seqlens=ints()), ValueError, r"cu_seqlens: expected shape \[B \+ 1\]"),
    (lambda: call(scale="1"), TypeError, "scale: expected a Python float or int"),
    (lambda: call(chunk=48), ValueError, r"chunk: expected one of \(16, 32, 64\), got 48"),
    (lambda: call(config=3), TypeError, "config: .*Config or None"),
    (lambda: step_sizes(C=narrow(6, 2, 16)), ValueError, r"B: expected shape \[6, 2, 16\]"),
    (lambda: step_sizes(dt=narrow(6, 2)), TypeError, "dt: expected dtype float32"),
    (lambda: step_sizes(D=normal(3)), ValueError, r"D: expected shape \[2\], got \[3\]"),
    (lambda: step_sizes(z=normal(6, 2, 16)), TypeError, "z: expected dtype float16"),
    (lambda: step_sizes(h0=normal(1, 2, 32, 16)), ValueError, r"h0: expected shape \[1, 2, 16, 16"),
    (lambda: step_sizes(dt_softplus=1), TypeError, "dt_softplus: expected a Python bool"),
    (lambda: step_sizes(dt_limit=(1.0, 0.5)), ValueError, r"dt_limit: expected \(low, high\)"),
    (lambda: step_sizes(config=DECAY.Config()), TypeError, r"config: .*mamba2_ssd\.Config"),
    (lambda: DECAY.Config(block_v=24), ValueError, "block_v: expected a power of two"),
    (lambda: DECAY.Config(spans=0), ValueError, "spans: expected at least 1"),
    (lambda: DECAY.Config(warps=3), ValueError, "warps: expected a power of two"),
    (lambda: DECAY.decay_attention_check(ints(0, 4), T=6), ValueError, "to end with T = 6"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_names_the_argument(case):
    bad, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        bad()


# Of tokens that no sequence covers nothing is written: the numbers mean nothing.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(not _lib.INTERPRETING, reason="the interpreter alone tells its accesses")
@pytest.mark.parametrize("wrong", [[0, 30, 5, 40], [3, 900, -7, 40], [0, 40, 0, 40]])
def test_a_wrong_cu_seqlens_stays_inside(wrong):
    """What comes is not defined; that it comes, and that nothing else is touched, is."""
    from parity.frameworks.triton_interpreter import launches, traffic

    args = arguments([0, 4, 9, 40], H=1)
    args[6] = ints(*wrong)
    config = DECAY.Config(32, 2)
    touched = []

    def note(touch):
        touched.extend((x, x + touch.itemsize) for x in touch.addresses[touch.mask].tolist())

    with launches() as seen, traffic(note):
        out, res = DECAY.decay_attention_fwd(*args, chunk=16, config=config)
        DECAY.decay_attention_bwd(res, *out, chunk=16, config=config)
    given = [getattr(x, "base", x) for launch in seen for x in launch.arguments.values()]
    spans = {(x.data_ptr(), x.data_ptr() + x.nbytes) for x in given if torch.is_tensor(x)}
    strays = [t for t in set(touched) if not any(i <= t[0] and t[1] <= j for i, j in spans)]
    assert touched and not strays


def test_nothing_to_attend():
    for T, B in ((0, 2), (0, 0)):
        args = arguments([0] * (B + 1))
        (y, S_T), res = DECAY.decay_attention_fwd(*args)
        assert y.shape == (T, 2, 32) and torch.equal(S_T, args[5])
        *grads, dS0 = DECAY.decay_attention_bwd(res, y, S_T)
        assert torch.equal(dS0, S_T) and all(not x.any() for x in grads)


def test_autograd_has_manners():
    """Strided inputs and cotangents, inputs that need no gradient, outputs that were not used."""
    args = arguments([0, 3, 20])
    leaves = lifted(args)
    want, _ = exact(*leaves, 1.0)
    (expected,) = torch.autograd.grad(want.sum(), [leaves[2]])
    wide = torch.cat([args[2], args[2]], 2)[:, :, :32]  # heads 64 elements apart
    args[2] = wide.requires_grad_()
    args[0] = args[0].mT.contiguous().mT
    y, S_T = DECAY.decay_attention(*args, chunk=16)
    near(y, want, LIMIT[HALF])
    (only_state,) = torch.autograd.grad(S_T.sum(), [args[2]], retain_graph=True)
    assert only_state.any() and args[0].grad is None
    (both,) = torch.autograd.grad([y, S_T], [args[2]], [torch.ones_like(y.mT).mT, 0 * S_T])
    near(both, expected, LIMIT[HALF])


@pytest.mark.parametrize("constant", [False, True])
def test_a_step_is_a_sequence_of_one_token(constant):
    q, k, v, g, i, S0, cu = arguments([0, 1, 2, 3], constant=constant, weighted=not constant)
    step = STEP.decay_attention_step(q, k, v, g, i, S0, scale=0.5)
    leaves = lifted([q, k, v, g, i, S0])
    same(step, exact(*leaves, cu, 0.5))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiles_as_one_graph_with_gradients():
    args = arguments([0, 4, 9], H=1)
    operands = [x.requires_grad_() for x in args[:6]]

    def loss(*operands):
        y, S_T = DECAY.decay_attention(*operands, args[6], chunk=16)
        return y.float().square().sum() + S_T.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*operands), operands)
    for mine, eager in zip(got, torch.autograd.grad(loss(*operands), operands), strict=True):
        torch.testing.assert_close(mine, eager)
