"""What the harness does not ask of the Pallas twins: bad input, no elements, JAX's transformations.

The kernels run in the interpreter, which conftest.py switches on with its race detector.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import matmul, rms_norm, softmax
from pallas_kernels.matmul import Config, default_config, matmul_bwd, matmul_fwd
from parity.frameworks import mosaic_interpreter


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def _normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _close(got: jax.Array, want: np.ndarray, tolerance: float = 4e-3) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def _f64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def test_the_package_exports_functions_and_loads_them_late():
    names = ["HybridMeta", "HybridPlan", "decay_attention", "decay_attention_step"]
    names += ["fp8_quantize_blocks", "fp8_quantize_cols", "fp8_quantize_rows"]
    names += ["grouped_gemm", "grouped_gemm_dw", "hadamard_quantize", "hadamard_rotate"]
    names += ["hybrid_attention", "hybrid_attention_atomic", "hybrid_plan"]
    names += ["int4_from_awq", "int4_from_gptq", "int4_matmul", "int4_matmul_atomic"]
    names += ["int4_prepack", "int4_quantize", "int4_to_awq", "int4_to_gptq"]
    names += ["int8_quantize", "linear_scan", "linear_scan_step", "mamba2_ssd", "matmul"]
    names += ["retention", "rglru", "rglru_step", "rms_norm", "softmax"]
    assert dir(pallas_kernels) == names
    assert callable(matmul) and callable(rms_norm) and callable(softmax)
    with pytest.raises(AttributeError, match="no_such"):
        _ = pallas_kernels.no_such
    code = "import sys, pallas_kernels; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


A, B = jnp.zeros((16, 32), jnp.bfloat16), jnp.zeros((32, 8), jnp.bfloat16)
X, W = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros(64, jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: matmul(A[0], B), ValueError, r"a: expected shape \[M, K\], got \[32\]"),
        (lambda: matmul(A, B[1:]), ValueError, r"b: expected shape \[32, N\], got \[31, 8\]"),
        (lambda: matmul(A, B.astype(jnp.float16)), TypeError, "b: expected dtype bfloat16, got fl"),
        (lambda: matmul(A.astype(jnp.float32), B), TypeError, "float32, which wgmma would"),
        (lambda: matmul(A.astype(jnp.int8), B), TypeError, "a: expected dtype bfloat16 or float16"),
        (lambda: matmul([1], B), TypeError, "a: expected a JAX array, got list"),
        (lambda: matmul(A, B, out_dtype="float16"), TypeError, "out_dtype: expected bfloat16 or"),
        (lambda: matmul(A, B, out_dtype="no"), TypeError, "no"),
        (lambda: matmul(A, B, config={"block_m": 64}), TypeError, "config: expected .*Config"),
        (lambda: Config(block_m=192), ValueError, "block_m: expected a multiple of 64 rows"),
        (lambda: Config(block_k=32), ValueError, "block_k: expected a multiple of 64, got 32"),
        (lambda: Config(stages=1), ValueError, "stages: expected at least 2, got 1"),
        (lambda: Config(cluster=4), ValueError, "cluster: expected 1 or 2, got 4"),
        (lambda: softmax(X[0]), ValueError, "x: expected shape"),
        (lambda: softmax(X, X), TypeError, "mask: expected dtype bool"),
        (lambda: softmax(X, scale="2"), TypeError, "scale: expected"),
        (lambda: softmax(X, causal_offset=1.5), TypeError, "causal_offset: expected"),
        (lambda: softmax(X, config=Config()), TypeError, "config: expected"),
        (lambda: rms_norm(X, W[1:]), ValueError, "w: expected shape"),
        (lambda: rms_norm(X, W, X[1:]), ValueError, "residual: expected shape"),
        (lambda: rms_norm(X, W.astype(jnp.float16)), TypeError, "w: expected dtype"),
        (lambda: rms_norm(X, W, eps=jnp.zeros(())), TypeError, "eps: expected"),
        (lambda: rms_norm(X, W, config=Config()), TypeError, "config: expected"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("M", "K", "N"), [(0, 32, 8), (16, 32, 0), (16, 0, 8)])
def test_matmul_without_elements(M, K, N):
    a, b = _normal(0, M, K), _normal(1, K, N)
    c, res = matmul_fwd(a, b)
    da, db = matmul_bwd(res, jnp.ones((M, N), jnp.bfloat16))
    assert (c.shape, da.shape, db.shape) == ((M, N), (M, K), (K, N))
    assert not any(np.asarray(x, np.float32).any() for x in (c, da, db))


def test_softmax_and_rms_norm_without_elements():
    for shape in ((0, 64), (4, 0)):
        x, w = jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape[1:], jnp.bfloat16)
        assert softmax(x).shape == shape
        assert rms_norm(x, w).shape == shape
    dw = jax.grad(lambda w: rms_norm(X[:0], w).astype(jnp.float32).sum())(W)
    assert dw.shape == (64,) and not np.asarray(dw, np.float32).any()


def test_matmul_takes_every_size():
    # One element beyond a tile in each direction, one short of it, and less than one of anything.
    for M, N, K in ((129, 129, 65), (127, 127, 63), (1, 1, 1)):
        a, b = _normal(0, M, K), _normal(1, K, N)
        _close(jax.jit(matmul)(a, b), np.matmul(*_f64(a, b)))


def test_matmul_does_not_read_beyond_its_operands():
    # The tile hangs over all edges; what lies there counts as zero, in a NaN's product too.
    a = _normal(0, 70, 72).at[:, 0].set(jnp.nan)
    b = _normal(1, 72, 80)
    assert np.isnan(np.asarray(jax.jit(matmul)(a, b), np.float32)).all()
    c = jax.jit(matmul)(a[:, 1:], b[1:])
    _close(c, np.matmul(*_f64(a[:, 1:], b[1:])))


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(block_n=64, stages=2, group_m=1),
        Config(block_m=64, block_n=192, block_k=128, stages=3, warpgroups=1, cluster=1),
    ],
    ids=["of large products", "one store", "one warpgroup"],
)
def test_matmul_with_any_tiles(config):
    # Several tiles a block, also with an odd number of stores, more steps than slots: rings go
    # round.
    a, b, dc = _normal(0, 260, 200), _normal(1, 200, 130), _normal(2, 260, 130)
    c, res = jax.jit(lambda a, b: matmul_fwd(a, b, config=config))(a, b)
    da, db = jax.jit(lambda res, dc: matmul_bwd(res, dc, config=config))(res, dc)
    a, b, dc = _f64(a, b, dc)
    _close(c, a @ b)
    _close(da, dc @ b.T)
    _close(db, a.T @ dc)


def test_default_config_counts_waves():
    large = Config()
    for M, N in ((8192, 8192), (8192, 14336), (4096, 4096), (16384, 6144), (1024, 4096)):
        assert default_config(M, N, 4096, jnp.bfloat16) == large
    assert default_config(3072, 3072, 3072, jnp.bfloat16) == Config(block_n=192)
    areas = [
        config.block_m * config.block_n
        for config in (default_config(M, 4096, 4096, jnp.bfloat16) for M in (1024, 512, 256, 128))
    ]
    assert areas == [128 * 256, 128 * 128, 64 * 128, 64 * 64]


def test_matmul_gradient_takes_a_float32_cotangent():
    a, b = _normal(0, 72, 40), _normal(1, 40, 48)
    weight = _normal(2, 72, 48, dtype=jnp.float32)

    def loss(a, b):
        return (matmul(a, b, out_dtype=jnp.float32) * weight).sum()

    da, db = jax.jit(jax.grad(loss, (0, 1)))(a, b)
    assert da.dtype == db.dtype == jnp.bfloat16
    a, b, dc = _f64(a, b, weight.astype(jnp.bfloat16))
    _close(da, dc @ b.T)
    _close(db, a.T @ dc)


def test_matmul_under_vmap():
    a, b = _normal(0, 2, 72, 40), _normal(1, 40, 48)

    def loss(a, b):
        return jax.vmap(matmul, (0, None))(a, b).astype(jnp.float32).sum()

    _close(jax.jit(jax.vmap(matmul, (0, None)))(a, b), np.matmul(*_f64(a, b)))
    da, db = jax.jit(jax.grad(loss, (0, 1)))(a, b)
    a, b = _f64(a, b)
    _close(da, np.broadcast_to(b.sum(1), a.shape))
    _close(db, np.broadcast_to(a.sum((0, 1))[:, None], b.shape), 1e-2)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from parity import frameworks
from pallas_kernels import matmul

frameworks.interpreters()
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (32, 64), "bfloat16")
w = jax.random.normal(jax.random.key(1), (64, 64), "bfloat16")

def grads(f):
    return jax.jit(jax.grad(lambda x, w: (f(x, w).astype("float32") ** 2).sum(), (0, 1)))(x, w)

wanted = [np.float32(want) for want in grads(matmul)]
for check_vma in (True, False):
    sharded = jax.shard_map(
        matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check_vma
    )
    # No race detector: of two devices at once it has said that a thread races with itself.
    for got, want in zip(grads(sharded), wanted, strict=True):
        assert np.linalg.norm(np.float32(got) - want) < 1e-2 * np.linalg.norm(want)
"""


def test_matmul_under_shard_map():
    # Two devices exist only in a process that asks for them before JAX starts.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=env)
