"""Run by test_triton_moe.py on a GPU, in a process without the interpreter: 20 routings of one
grouped product, eager and replayed from one CUDA graph, while no host read is allowed.

Prints {"compiled": kernels, "recompiled": those beyond the first routing, "routings": how many}.
"""

import importlib
import json

import torch
import triton

PARTS = [
    importlib.import_module(f"triton_kernels.{part}")
    for part in ("moe_gemm", "moe_gemm_dw", "moe_gemm_fusions", "moe_gemm_plan")
]
MOE, BF16 = PARTS[0], torch.bfloat16
E, K, N = 12, 272, 272


def compiled():
    """Kernels that Triton has compiled for these files."""
    kernels = {
        id(k): k for p in PARTS for k in vars(p).values() if isinstance(k, triton.JITFunction)
    }
    return sum(len(found[0]) for k in kernels.values() for found in k.device_caches.values())


def routings(M):
    """Sizes [E]: uniform, skewed, one for all, half of the experts empty, rows left over, none."""
    torch.manual_seed(0)
    one, none = torch.zeros(E), torch.zeros(E)
    one[3] = M
    found = [one, none, one.roll(1) - 5 * one.roll(1) / M]
    while len(found) < 20:
        share = torch.rand(E) ** (len(found) % 5)
        share[: len(found) % 7] = 0
        rows = M - 7 * (len(found) % 3)
        found.append(torch.multinomial(share, rows, replacement=True).bincount(minlength=E))
    return [sizes.round().int().cuda() for sizes in found]


def everything(M):
    """A call that computes all there is of M rows, and the sizes that it reads."""
    T = M // 2
    x, w, dy = torch.randn(M, K), torch.randn(E, K, N) / 16, torch.randn(M, N)
    x, w, dy = (t.cuda().to(BF16) for t in (x, w, dy))
    rows = torch.randint(0, T, (M,), dtype=torch.int32).cuda()
    bias, scale = torch.randn(E, N).cuda().to(BF16), torch.rand(M).cuda()
    sizes = torch.zeros(E, dtype=torch.int32).cuda()
    fused = {"rows": rows, "bias": bias, "row_scale": scale, "activation": "swiglu"}

    def call():
        y, res = MOE.grouped_gemm_fwd(x, w, sizes)
        z, fused_res = MOE.grouped_gemm_fwd(x[:T], w, sizes, **fused)
        dz = dy[:, : N // 2]
        return (
            y, *MOE.grouped_gemm_bwd(res, dy), MOE.grouped_gemm_dw(x, dy, sizes),
            z, *MOE.grouped_gemm_bwd(fused_res, dz, activation="swiglu"),
        )  # fmt: skip

    def exact():
        """y, dx, dw, and dw in float32, one expert after the other."""
        y, dx = torch.zeros(M, N).cuda(), torch.zeros(M, K).cuda()
        dw = torch.zeros(E, K, N).cuda()
        start = 0
        for e, size in enumerate(sizes.tolist()):
            own = slice(start, start := start + size)
            y[own] = x[own].float() @ w[e].float()
            dx[own] = dy[own].float() @ w[e].float().T
            dw[e] = x[own].float().T @ dy[own].float()
        return y, dx, dw, dw

    return call, exact, sizes


def main():
    seen = {"compiled": 0, "recompiled": 0, "routings": 0}
    for M in (1000, 100):  # whole tiles, and the decode form
        call, exact, sizes = everything(M)
        first, *others = routings(M)
        sizes.copy_(first)
        call()
        before = compiled()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = call()
        for routing in others:
            sizes.copy_(routing)
            eager = call()
            graph.replay()
            torch.cuda.set_sync_debug_mode("default")
            assert all(map(torch.equal, eager, replayed)), routing
            assert all(bool(t.isfinite().all()) for t in eager)
            for got, want in zip(eager, exact(), strict=False):
                assert float((got - want).norm()) <= 3e-3 * float(want.norm()), routing
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")
        seen["compiled"] += before
        seen["recompiled"] += compiled() - before
        seen["routings"] += 1 + len(others)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
