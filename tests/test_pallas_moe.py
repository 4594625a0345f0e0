"""What the harness does not ask of the Pallas grouped product: bad input, no elements, any tiles,
JAX's transformations.

The kernels run in the interpreter, which conftest.py switches on with its race detector.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_gemm, grouped_gemm_dw
from pallas_kernels.moe_gemm import (
    Config,
    default_config,
    grouped_gemm_bwd,
    grouped_gemm_check,
    grouped_gemm_fwd,
)
from pallas_kernels.moe_gemm_plan import tile_plan
from parity.frameworks import mosaic_interpreter


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _sizes(*sizes: int) -> jax.Array:
    return jnp.array(sizes, jnp.int32)


def _groups(sizes: jax.Array) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        yield e, slice(start, start + size)
        start += size


def _product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> np.ndarray:
    y = np.zeros((x.shape[0], w.shape[2]))
    for e, rows in _groups(sizes):
        y[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[e]
    return y


def _close(got: jax.Array, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 4e-3 * np.linalg.norm(want)


X, W, SIZES = (
    jnp.zeros((16, 32), jnp.bfloat16),
    jnp.zeros((3, 32, 8), jnp.bfloat16),
    _sizes(4, 0, 9),
)
ROWS, DY = jnp.zeros(16, jnp.int32), jnp.zeros((16, 8), jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: grouped_gemm(X[0], W, SIZES), ValueError, r"x: expected shape \[M, K\], got"),
        (lambda: grouped_gemm(X, W[0], SIZES), ValueError, r"w: expected shape \[E, 32, N\], got"),
        (lambda: grouped_gemm(X, W, SIZES, transpose_w=True), ValueError, r"w: .*\[E, N, 32\]"),
        (lambda: grouped_gemm(X, W, SIZES[1:]), ValueError, r"sizes: expected shape \[3\], got"),
        (lambda: grouped_gemm(X, W, SIZES.astype("int16")), TypeError, "sizes: expected dtype int"),
        (lambda: grouped_gemm(X, W.astype("float16"), SIZES), TypeError, "w: expected dtype bfloa"),
        (lambda: grouped_gemm(X.astype("float32"), W, SIZES), TypeError, "float32, which wgmma wo"),
        (lambda: grouped_gemm(X, W, SIZES, out_dtype="int8"), TypeError, "out_dtype: expected bfl"),
        (lambda: grouped_gemm(X, W, SIZES, transpose_w=1), TypeError, "transpose_w: expected a Py"),
        (lambda: grouped_gemm(X, W, SIZES, activation="gelu"), ValueError, "activation: expected "),
        (lambda: grouped_gemm(X, W[..., 1:], SIZES, activation="swiglu"), ValueError, "an even nu"),
        (lambda: grouped_gemm(X, W, SIZES, rows=ROWS[None]), ValueError, "rows: expected shape"),
        (lambda: grouped_gemm(X, W, SIZES, bias=W[:, 0, 1:]), ValueError, "bias: expected shape"),
        (lambda: grouped_gemm(X, W, SIZES, row_scale=ROWS), TypeError, "row_scale: expected dtype"),
        (lambda: grouped_gemm(X, W, SIZES, config=1), TypeError, "config: expected .*Config"),
        (lambda: grouped_gemm_dw(X, DY[1:], SIZES), ValueError, r"dy: expected shape \[16, N\]"),
        (lambda: Config(block_m=100), ValueError, "block_m: expected a multiple of 8, got 100"),
        (
            lambda: grouped_gemm(X, W, SIZES, config=Config(block_n=192)),
            ValueError,
            "config: expected at most 256 rows and a multiple of 128 columns for y, got 128 and",
        ),
        (
            lambda: grouped_gemm(X, W, SIZES, activation="swiglu", config=Config(block_m=72)),
            ValueError,
            "config: expected a multiple of 64 rows under swiglu, got 72",
        ),
        (
            lambda: grouped_gemm_dw(X, DY, SIZES, config=Config(stages=2)),
            ValueError,
            "config: expected .* at least 3 stages for dw",
        ),
        (lambda: Config(cluster=3), ValueError, "cluster: expected 1 or 2"),
        (lambda: grouped_gemm_check(_sizes(4, -3, 2), M=9), ValueError, "got -3 for expert 1"),
        (lambda: grouped_gemm_check(SIZES, M=10), ValueError, "sum to 13, 3 more than the M = 10"),
        (
            lambda: grouped_gemm_check(SIZES, ROWS.at[12].set(7), M=16, T=7),
            ValueError,
            "rows: expected indices below T = 7, got 7 at row 12",
        ),
        (
            lambda: jax.jit(lambda s: grouped_gemm_check(s, M=16))(SIZES),
            TypeError,
            "sizes: expected an array with values, got a tracer",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_check_passes_what_is_right():
    # What dead rows would take does not matter.
    grouped_gemm_check(SIZES, ROWS.at[13].set(-1), M=16, T=7)


@pytest.mark.parametrize(("M", "K", "N"), [(0, 32, 8), (16, 32, 0), (16, 0, 8)])
def test_without_elements(M, K, N):
    x, w = _normal(0, M, K), _normal(1, 3, K, N)
    y, res = grouped_gemm_fwd(x, w, SIZES)
    dx, dw = grouped_gemm_bwd(res, jnp.ones((M, N), jnp.bfloat16))
    assert (y.shape, dx.shape, dw.shape) == ((M, N), (M, K), (3, K, N))
    assert not any(np.asarray(array, np.float32).any() for array in (y, dx, dw))


def test_sizes_that_are_wrong_reach_no_other_memory():
    x, w = _normal(0, 40, 40), _normal(1, 3, 40, 48)
    # A negative size counts 0, what is beyond the last row is cut off.
    y = jax.jit(grouped_gemm)(x, w, _sizes(30, -4, 60))
    _close(y, _product(x, w, _sizes(30, 0, 10)))


def test_indices_that_x_does_not_have_read_zeros():
    x, w, sizes = _normal(0, 9, 64), _normal(1, 2, 64, 64), _sizes(3, 4)
    rows = _sizes(3, 9, -5, 0, 8, 8, 1, 2)
    run = jax.jit(lambda *given: grouped_gemm(*given[:3], rows=given[3]))
    taken = jnp.where(((rows >= 0) & (rows < 9))[:, None], x[rows], 0)
    _close(run(x, w, sizes, rows), _product(taken, w, sizes))


@pytest.mark.parametrize(
    "config",
    [
        Config(block_m=64, block_n=64, stages=3, group_m=1, warpgroups=1),
        Config(block_n=64, block_k=128, warpgroups=1, cluster=2),
    ],
    ids=["small", "two stores a warpgroup"],
)
def test_with_any_tiles(config):
    x, w, dy = _normal(0, 83, 72), _normal(1, 3, 72, 72), _normal(2, 83, 72)
    sizes = _sizes(70, 0, 9)
    _close(jax.jit(lambda *g: grouped_gemm(*g, config=config))(x, w, sizes), _product(x, w, sizes))
    dw = np.zeros(w.shape)
    for e, rows in _groups(sizes):
        dw[e] = np.asarray(x, np.float64)[rows].T @ np.asarray(dy, np.float64)[rows]
    _close(jax.jit(lambda *g: grouped_gemm_dw(*g, config=config))(x, dy, sizes), dw)


def test_a_tall_tile_is_stored_in_parts():
    # Four slots leave room for 80 of its 152 rows: 80, then 72.
    x, w, sizes = _normal(0, 163, 72), _normal(1, 2, 72, 72), _sizes(3, 150)
    run = jax.jit(lambda *given: grouped_gemm(*given, config=Config(block_m=152)))
    _close(run(x, w, sizes), _product(x, w, sizes))


@pytest.mark.parametrize(("E", "M", "num_n", "group_m"), [(3, 400, 3, 2), (130, 20, 2, 1)])
def test_the_plan_has_every_tile_once(E, M, num_n, group_m):
    config = Config(block_m=64, block_n=64, group_m=group_m, warpgroups=1)
    # Some experts without rows; then a negative size, and one that is cut off.
    rng = np.random.default_rng(E)
    sizes = rng.multinomial(M - 5, rng.dirichlet(np.full(E, 0.3))).astype(np.int32)
    run = jax.jit(lambda sizes: tile_plan(sizes, M, 64 * num_n - 7, config))
    for wrong in (False, True):
        if wrong:
            sizes[:2] = -5, M
        ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), M)
        starts = np.r_[0, ends[:-1]]
        want = [
            (e, row, start, end, n)
            for e, (start, end) in enumerate(zip(starts, ends, strict=True))
            if start < end
            for row in range(start // 8 * 8, end, 64)
            for n in range(num_n)
        ]
        plan = np.asarray(run(sizes))
        assert (plan[7:] == [[len(want)], [ends[-1]]]).all()
        tiles = [tuple(tile) for tile in plan[:5, : len(want)].T.tolist()]
        assert sorted(tiles) == want and [t[0] for t in tiles] == [t[0] for t in want]
        # As many row tiles as a group has meet a tile of columns before the next one comes.
        first = [t for t in tiles if t[0] == tiles[0][0]]
        height = next((i for i, t in enumerate(first) if t[4] != first[0][4]), len(first))
        assert height <= group_m and len({t[1] for t in first[:height]}) == height
        assert (plan[5:7, :E] == [starts, ends]).all()


def test_one_compiled_kernel_serves_twenty_routings():
    x, w = _normal(0, 24, 64), _normal(1, 3, 64, 64)
    run = jax.jit(lambda *given: grouped_gemm(*given))
    rng = np.random.default_rng(0)
    routings = [rng.multinomial(24 - n % 5, rng.dirichlet(np.full(3, 0.5))) for n in range(18)]
    for routing in (*routings, (24, 0, 0), (0, 0, 24)):
        sizes = _sizes(*routing)
        _close(run(x, w, sizes), _product(x, w, sizes))
    assert run._cache_size() == 1


def _everything(x: Any, w: Any, sizes: Any, rows: Any, bias: Any, scale: Any, out: str) -> Any:
    """Forward, backward and dw, plain and fused."""
    dy = jnp.ones((rows.shape[0], w.shape[2]), out)
    fused = {"activation": "swiglu", "row_scale": scale, "bias": bias, "rows": rows}
    found = [grouped_gemm_dw(x[rows], dy, sizes, out_dtype=out)]
    for options, columns in (({}, 1), ({"row_scale": scale}, 1), (fused, 2)):
        taken = x if "rows" in options else x[rows]
        y, res = grouped_gemm_fwd(taken, w, sizes, out_dtype=out, **options)
        act = {"activation": options.get("activation")}
        found += [y, grouped_gemm_bwd(res, dy[:, : w.shape[2] // columns], **act)]
    return found


GIVEN = (
    jax.ShapeDtypeStruct((50, 72), jnp.bfloat16),
    jax.ShapeDtypeStruct((3, 72, 144), jnp.bfloat16),
    jax.ShapeDtypeStruct((3,), jnp.int32),
    jax.ShapeDtypeStruct((99,), jnp.int32),
    jax.ShapeDtypeStruct((3, 144), jnp.bfloat16),
    jax.ShapeDtypeStruct((99,), jnp.float32),
)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _broken_rows(traced: Any) -> list[str]:
    """Accesses of shared memory that Mosaic takes, and gets wrong without a word (jax 0.11.2):
    values written to a part of a swizzled row, and stores by TMA that do not start at a multiple of
    128 bytes. Dynamic starts within a tile are trusted."""
    found = []
    for eqn in _equations(traced.jaxpr):
        name = eqn.primitive.name
        if name not in ("swap", "copy_smem_to_gmem"):
            continue
        tree = eqn.params["tree" if name == "swap" else "src_transforms_treedef"]
        transforms = jax.tree.unflatten(tree, eqn.invars[2 : 2 + tree.num_leaves])
        size = eqn.invars[0].aval.dtype.itemsize
        swizzle = [t.swizzle for t in transforms if hasattr(t, "swizzle")]
        for at in (t for t in transforms if hasattr(t, "indices")):
            last, width = at.indices[-1], at.shape[-1]
            if swizzle and (last.size * size % swizzle[0] or not isinstance(last.size, int)):
                found.append(f"{name} of {last.size} of {width} columns")
            for d, index in enumerate(at.indices if name == "copy_smem_to_gmem" else ()):
                whole = getattr(index, "size", None) == at.shape[d]
                if not whole and int(np.prod(at.shape[d + 1 :])) * size % 128:
                    found.append(f"{name} from within row {d} of {at.shape}")
    return found


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_shared_memory_is_accessed_as_mosaic_can(out):
    # Traced, not run: so no size is read on the host either.
    traced = jax.make_jaxpr(lambda *given: _everything(*given, out))(*GIVEN)
    assert _broken_rows(traced) == []


def test_a_broken_access_is_seen():
    def body(x: Any, y: Any, smem: Any) -> None:
        smem.at[:, pl.ds(32, 32)][...] = x[...]
        plgpu.copy_smem_to_gmem(smem.at[:, pl.ds(32, 32)], y)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((64, 64), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(128),))
        ],
    )
    assert len(_broken_rows(jax.make_jaxpr(kernel)(jnp.zeros((64, 32), jnp.bfloat16)))) == 3


def test_under_vmap():
    x, w, sizes = _normal(0, 2, 40, 40), _normal(1, 3, 40, 48), jnp.stack([SIZES, _sizes(0, 40, 0)])
    y = jax.jit(jax.vmap(grouped_gemm, (0, None, 0)))(x, w, sizes)
    _close(y, np.stack([_product(x[i], w, sizes[i]) for i in range(2)]))


def test_default_config_follows_the_sizes():
    # many rows an expert: tall tiles; 256 on average: two tiles of 144 rows; 512: four of 136
    assert default_config(16384, 14336, 4096, 8, jnp.bfloat16) == Config(192, stages=3)
    assert default_config(65536, 2048, 7168, 256, jnp.bfloat16) == Config(144)
    assert default_config(65536, 768, 2048, 128, jnp.bfloat16) == Config(136)
    # tiles of dw in pairs, if they pair
    assert default_config(65536, 768, 2048, 128, jnp.bfloat16, dw=True).cluster == 2
    assert default_config(65536, 2880, 2880, 128, jnp.bfloat16, dw=True).cluster == 1
    # few rows an expert: tiles of as many, as wide as there are multiprocessors to share them
    few = default_config(16, 14336, 4096, 8, jnp.bfloat16)
    assert (few.block_m, few.block_n) == (16, 256)
    assert default_config(2, 14336, 4096, 8, jnp.bfloat16).block_n == 128
