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

DECAY = importlib.import_module("triton_kernels.decay_attention")
DEVICE = "cpu" if _lib.INTERPRETING else "cuda"
HALF, FLOAT = torch.float16, torch.float32
PACKED = [0, 0, 1, 20, 53, 53, 70, 70]  # within a chunk, across chunks and spans, empty


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


# the limits of SPECS for float16: of y and gradients by rows, of states and gates in float32
LIMIT = {HALF: 2e-3, FLOAT: 5e-3}


@pytest.mark.parametrize(
    ("cu", "options", "chunk", "config"),
    [
        # two heads a q head, added by one program; spans of two chunks; K and V no powers of two
        (PACKED, {"H": 2, "Hq": 1, "K": 48, "V": 48}, 16, (32, 3, 2)),
        # three heads a q head in two programs, decays that stay; sequences whole
        ([0, 37, 70], {"H": 3, "Hq": 1, "constant": True}, 32, (32, 1, 2)),
        ([0, 9, 40], {"H": 2, "Hq": 2, "weighted": False, "given": False}, 32, (16, 1, 1)),
        ([0, 70], {"constant": True, "weighted": False, "given": False}, 16, (32, 2, 1)),
    ],
)
def test_any_layout_is_the_recurrence(cu, options, chunk, config):
    args = arguments(cu, **options)
    leaves = lifted(args)
    scale = 0.25
    want = exact(*leaves, scale)
    dy, dS_T = normal(*want[0].shape, dtype=HALF), normal(*want[1].shape)
    wanted = [x for x in leaves[:6] if x is not None]
    grads = torch.autograd.grad(want, wanted, (dy.double(), dS_T.double()))
    options = {"scale": scale, "chunk": chunk, "config": DECAY.Config(*config)}
    got, res = DECAY.decay_attention_fwd(*args, **options)
    back = DECAY.decay_attention_bwd(res, dy, dS_T, **options)
    for g, w in zip((*got, *back), (*want, *grads), strict=True):
        assert g.shape == w.shape
        near(g, w.detach(), LIMIT[g.dtype])
