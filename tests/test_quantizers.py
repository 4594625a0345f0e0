"""The quantizers and the rotation beside parity: codes and scales of both twins are bit for bit
those of parity.formats; the arithmetic behind them, for every mantissa; bad input, edges."""

import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from parity import formats
from parity.compile import compile_gate
from parity.frameworks import mosaic_interpreter, twin
from parity.problems import problem

torch = pytest.importorskip("torch")
STEMS = ("int8_quantize", "fp8_quantize", "hadamard")
TRITON, PALLAS = (
    {stem: importlib.import_module(f"{package}.{stem}") for stem in STEMS}
    for package in ("triton_kernels", "pallas_kernels")
)
HALF, BF16 = np.float16, ml_dtypes.bfloat16
TWINS = pytest.mark.parametrize("side", ["triton", "pallas"])


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    with mosaic_interpreter.watched():
        yield


def call(side: str, stem: str, name: str, *arrays: np.ndarray, **options) -> list[np.ndarray]:
    """What a public function of that twin returns, as NumPy arrays; e4m3 as codes."""
    of = twin(side)
    function = getattr({"triton": TRITON, "pallas": PALLAS}[side][stem], name)
    with np.errstate(all="ignore"):  # NumPy computes what the interpreter of Triton does
        out = of.outputs_of(of.run(function, [of.native(x) for x in arrays], options))
    found = [np.array(of.harness(x)) for x in out]
    return [x.view(np.uint8) if x.dtype == ml_dtypes.float8_e4m3fn else x for x in found]


def awkward(rows: int, columns: int, dtype=HALF) -> np.ndarray:
    """Rows of zeros, ties, infinities, NaN, large and small numbers, and plain ones."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)) * 3)
    x = np.clip(x, -6e4, 6e4).astype(dtype)
    x[0] = 0
    x[1] = (np.arange(columns) % 255 - 127) / 2
    x[2, columns // 3], x[2, columns // 2] = np.inf, -np.inf
    x[3, 1] = np.nan
    x[4, -1], x[4, 0] = np.inf, np.nan
    x[5] *= dtype(1e-5)
    return x


def same(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got, want, strict=True)


# --- codes and scales are those of parity.formats


@TWINS
@pytest.mark.parametrize(
    ("columns", "group"),
    [(1003, None), (1056, 32), (2, None), (24, 8)],
)
def test_int8_is_that_of_the_formats(side: str, columns: int, group: int | None):
    x = awkward(7, columns)
    q, scale = call(side, "int8_quantize", "int8_quantize", x, axis=-1, group=group)
    want = formats.int8_quantize(x, axis=-1, group=group)
    same(q, want[0])
    same(scale, want[1])


@TWINS
@pytest.mark.parametrize(
    ("name", "rows", "columns", "ue8m0"),
    [
        ("fp8_quantize_rows", 13, 256, True),
        ("fp8_quantize_blocks", 131, 200, False),
        ("fp8_quantize_cols", 128, 77, False),
    ],
)
def test_fp8_is_that_of_the_formats(side: str, name: str, rows: int, columns: int, ue8m0: bool):
    x = awkward(rows, columns)
    q, scale = call(side, "fp8_quantize", name, x, ue8m0=ue8m0)
    want = getattr(formats, name)(x, ue8m0=ue8m0)
    # 0 * infinity has a sign on a CPU: XLA makes the other NaN of it, 0xFF
    same(np.where(q == 0xFF, 0x7F, q), want[0])
    same(scale, want[1])


@TWINS
def test_transposed_scales_are_rows_of_16_bytes(side: str):
    x = awkward(14, 384)
    q, scale = call(side, "fp8_quantize", "fp8_quantize_rows", x, transposed=True)
    want = formats.fp8_quantize_rows(np.concatenate([x, np.zeros((2, 384), HALF)]))
    same(np.where(q == 0xFF, 0x7F, q), want[0][:14])
    same(scale, want[1].T)


@TWINS
def test_rotated_codes_are_those_of_what_is_rotated(side: str, n: int = 256):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((5, 14, n)).astype(HALF)
    x[1, 3] = 0
    signs = rng.choice(np.array([-1, 1], np.int8), n)
    (y,) = call(side, "hadamard", "hadamard_rotate", x, signs)
    q, scale = call(side, "hadamard", "hadamard_quantize", x, signs, fmt="int8")
    want = formats.int8_quantize(y, axis=-1)
    same(q, want[0])
    same(scale, want[1])
    q, scale = call(side, "hadamard", "hadamard_quantize", x, signs, fmt="e4m3")
    # a scale for n elements: all blocks of 128, or the whole of half of one, share it
    top = np.abs(y.astype(np.float32)).max(axis=-1)
    want = np.maximum(top, np.float32(1e-4)) / np.float32(448)
    same(scale, want)
    scaled = y.astype(np.float32) * (np.float32(1) / want)[..., None]
    same(q, formats.E4M3.encode(scaled))


@TWINS
def test_rotation_there_and_back(side: str):
    rng = np.random.default_rng(5)
    x = rng.integers(-9, 9, (67, 64)).astype(HALF)
    signs = rng.choice(np.array([-1, 1], HALF), 64)
    (y,) = call(side, "hadamard", "hadamard_rotate", x, signs)
    (back,) = call(side, "hadamard", "hadamard_rotate", y, signs, inverse=True)
    same(back, x)  # sqrt(64) and whole numbers: nothing was rounded
    product, rotated = (a.astype(np.float64) @ a.T.astype(np.float64) for a in (x, y))
    same(rotated, product)  # orthogonal


@TWINS
def test_nan_reaches_its_own_vector_and_no_other(side: str):
    x = np.ones((70, 128), HALF)
    x[3, 5], x[66, 7] = np.nan, np.inf
    signs = np.ones(128, np.float32)
    (y,) = call(side, "hadamard", "hadamard_rotate", x, signs)
    assert not np.isfinite(y[[3, 66]]).any() and np.isfinite(np.delete(y, [3, 66], 0)).all()
    q, scale = call(side, "hadamard", "hadamard_quantize", x, signs, fmt="int8")
    assert not q[[3, 66]].any() and np.isnan(scale[3]) and np.isinf(scale[66])
    assert np.isfinite(np.delete(scale, [3, 66])).all()
    q, scale = call(side, "hadamard", "hadamard_quantize", x, signs, fmt="e4m3")
    assert (q[3] & 0x7F == 0x7F).all() and np.isnan(scale[3]) and np.isinf(scale[66])


# --- the arithmetic, for all mantissas: what Mosaic's division leaves to be done by hand


def mantissas(bits: int) -> np.ndarray:
    return np.arange(1 << bits, 2 << bits).astype(np.float32)


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 7), (HALF, 10)])
def test_int8_codes_are_right_for_all_mantissas(dtype, bits: int):
    """Every x over every largest magnitude, 2^10 to 1 apart; whether or not a sum is fused."""
    int8 = PALLAS["int8_quantize"]
    top = mantissas(bits)
    scale = top / np.float32(127)
    same(np.asarray(int8._scale(jnp.asarray(top))), scale)
    power = np.asarray(int8._power(jnp.asarray(scale)))[:, None]
    factors = int8._factors(jnp.asarray(top), jnp.asarray(scale), dtype)
    factors = [np.asarray(factor)[:, None] for factor in factors]
    ties = 0
    for exponent in range(10):
        x = (mantissas(bits) * np.float32(2.0**-exponent))[None]
        x = np.where(x <= top[:, None], x, np.float32(0)) * power
        quotient = x / (scale[:, None] * power)  # by a power of two on both sides
        want = np.rint(quotient)
        ties += np.count_nonzero(np.abs(quotient - want) == 0.5)
        for rounded in rounded_products(x, factors):
            assert np.array_equal(rounded - MAGIC, want)
    assert ties  # (there were some to get wrong)


MAGIC = np.float32(1.5 * 2**23)


def rounded_products(x: np.ndarray, factors: list[np.ndarray]) -> list[np.ndarray]:
    """x by one factor, or by the sum of two, plus MAGIC: whichever sum is fused, or none."""
    if len(factors) == 1:
        (factor,) = factors
        return [x * factor + MAGIC, (np.float64(x) * factor + MAGIC).astype(np.float32)]
    first, last = (x * factor for factor in factors)
    fused = np.float64(x) * factors[1] + first, np.float64(x) * factors[0] + last
    return [sum_ + MAGIC for sum_ in (first + last, *(f.astype(np.float32) for f in fused))]


def test_int8_codes_are_right_for_all_of_bfloat16():
    """Every x under tops of all exponents, scaled in bfloat16 as on a GPU; nothing is clipped. A
    GPU's reciprocal may be two units off."""
    int8 = PALLAS["int8_quantize"]
    rng = np.random.default_rng(3)
    tops = np.concatenate([np.arange(1, 90, 9), np.arange(0x3F80, 0x4000, 5), [0x3FFE, 0x407E]])
    for top in np.concatenate([tops, rng.integers(90, 0x7F80, 60)]).astype(np.uint16):
        x = np.arange(top + 1, dtype=np.uint16).view(BF16)
        scale = x[-1:].astype(np.float32) / np.float32(127)
        # XLA on a CPU makes zeros of what is below float32's normal numbers: scaled in NumPy
        power = (np.int32(254 << 23) - (scale.view(np.int32) & 0x7F800000)).view(np.float32)
        tops_and_scale = (jnp.asarray(v * power) for v in (x[-1:].astype(np.float32), scale))
        (inverse,) = map(np.asarray, int8._factors(*tops_and_scale, BF16))
        inverse = inverse * np.asarray(int8._power(jnp.asarray(scale * power)))
        scaled = (x * power.astype(BF16)).astype(np.float32)
        want = formats.int8_quantize(x[None], axis=-1)[0][0]
        exact = scale * power == np.exp2(np.rint(np.log2(scale * power)))
        for off in (0,) if exact else (-2, 0, 2):
            factor = (inverse.view(np.int32) + np.int32(off)).view(np.float32)
            for rounded in rounded_products(scaled, [factor]):
                same(rounded.view(np.int32).astype(np.int8), want)


@TWINS
def test_e4m3_codes_are_right_for_all_mantissas_of_float16(side: str):
    x = np.random.default_rng(4).uniform(-1, 1, (1024, 128)).astype(HALF)
    x[:, 7] = mantissas(10) / np.float32(1024)
    q, scale = call(side, "fp8_quantize", "fp8_quantize_rows", x)
    want = formats.fp8_quantize_rows(x)
    same(q, want[0])
    same(scale, want[1])


def test_e4m3_scales_and_reciprocals_are_right_for_all_mantissas():
    fp8 = PALLAS["fp8_quantize"]
    top = np.concatenate([mantissas(10), mantissas(10) * np.float32(2.0**-30)])
    scale = np.maximum(top, np.float32(1e-4)) / np.float32(448)
    same(np.asarray(fp8._scale(jnp.asarray(top), False)), scale)
    first, last = top * np.float32(585 / 2**18), top * np.float32(1 / (448 * 2**12))
    for fused in (np.float64(top) * np.float32(585 / 2**18) + last, np.float64(last) + first):
        same(np.maximum(fused.astype(np.float32), np.float32(1e-4 / 448)), scale)
    want = np.float32(1) / scale
    same(np.asarray(fp8._reciprocal(jnp.asarray(scale))), want)
    # Mosaic's 1 / x is up to two units off: Newton's step must not mind, fused or not
    power = (np.int32(254 << 23) - (scale.view(np.int32) & 0x7F800000)).view(np.float32)
    divisor = scale * power
    first = np.asarray(fp8._leading_bits(jnp.asarray(divisor)))
    last = divisor - first
    for off in (-2, -1, 1, 2):
        near = ((want / power).view(np.int32) + np.int32(off)).view(np.float32)
        high = np.asarray(fp8._leading_bits(jnp.asarray(near)))
        low = near - high
        left = np.float32(1) - high * first - high * last - low * first - low * last
        same((near + left * near) * power, want)
        same((np.float64(left) * near + near).astype(np.float32) * power, want)
        # Triton's step: both sums fused
        left = (1 - np.float64(divisor) * near).astype(np.float32)
        same((np.float64(left) * near + near).astype(np.float32) * power, want)


def test_tiny_scales_below_float32s_normal_numbers():
    """bfloat16 reaches them. XLA on a CPU takes them for zero in a product: scales alone."""
    int8 = PALLAS["int8_quantize"]
    top = (np.arange(128, 256) * 2.0**-130).astype(np.float32)
    for exponent in range(0, 12):
        found = np.asarray(int8._scale(jnp.asarray(top * np.float32(2.0**exponent))))
        same(found, top * np.float32(2.0**exponent) / np.float32(127))


def test_what_no_interpreter_sees_compiles(tmp_path):
    """PTX for pairs of float16, TMA over rows that 8 does not divide."""
    workloads = ("ci_quantize",)
    rows = compile_gate([problem("hadamard")], workloads=workloads, sass=False, cache=tmp_path)
    assert len(rows) == 4
    assert all(row.status in ("ok", "lowered") and not row.message for row in rows), rows


# --- bad input

X, SIGNS = np.zeros((6, 192), HALF), np.ones(64, np.int8)


@TWINS
@pytest.mark.parametrize(
    ("stem", "name", "arrays", "options", "error", "words"),
    [
        ("int8_quantize", "", (X,), {"axis": 0}, ValueError, "axis: expected -1, the last"),
        ("int8_quantize", "", (X,), {"axis": None}, TypeError, "axis: expected a Python int"),
        ("int8_quantize", "", (X,), {"axis": -1, "group": 36}, ValueError, "group: expected a div"),
        ("int8_quantize", "", (X,), {"axis": -1, "group": 0}, ValueError, "group: expected a div"),
        ("int8_quantize", "", (X[0],), {"axis": -1}, ValueError, r"x: expected shape \[M, K\]"),
        ("int8_quantize", "", (X.astype("f"),), {"axis": -1}, TypeError, "x: expected dtype"),
        ("int8_quantize", "", (X,), {"axis": -1, "config": 3}, TypeError, "config: expected"),
        ("fp8_quantize", "_rows", (X,), {}, ValueError, "x: expected 128 to divide K, got 192"),
        ("fp8_quantize", "_cols", (X,), {}, ValueError, "x: expected 128 to divide M, got 6"),
        ("fp8_quantize", "_blocks", (X[0],), {}, ValueError, r"w: expected shape \[M, K\]"),
        ("fp8_quantize", "_blocks", (X,), {"ue8m0": 1}, TypeError, "ue8m0: expected a Python bool"),
        ("fp8_quantize", "_blocks", (X.astype("f"),), {}, TypeError, "w: expected dtype"),
        ("hadamard", "_rotate", (X, SIGNS), {}, ValueError, "x: expected a last dimension of 64"),
        ("hadamard", "_rotate", (X[:, :128], SIGNS), {}, ValueError, "signs: expected shape"),
        ("hadamard", "_rotate", (X[:, :64].astype("f"), SIGNS), {}, TypeError, "x: expected dtype"),
        ("hadamard", "_rotate", (X[:, :64], SIGNS), {"inverse": 1}, TypeError, "inverse: expected"),
        ("hadamard", "_quantize", (X[:, :64], SIGNS), {"fmt": "int4"}, ValueError, "fmt: expected"),
    ],
)
def test_bad_input_is_named(side, stem, name, arrays, options, error, words):
    function = getattr({"triton": TRITON, "pallas": PALLAS}[side][stem], stem + name)
    native = twin(side).native
    with pytest.raises(error, match=words):
        function(*map(native, arrays), **options)


@TWINS
def test_no_elements(side: str):
    empty, none = np.zeros((0, 128), HALF), np.zeros((3, 0), HALF)
    q, scale = call(side, "int8_quantize", "int8_quantize", none, axis=-1)
    assert q.shape == (3, 0)
    same(scale, np.ones(3, np.float32))
    for name in ("rows", "cols", "blocks"):
        q, scale = call(side, "fp8_quantize", f"fp8_quantize_{name}", empty)
        assert q.shape == (0, 128) and scale.size == 0
    (y,) = call(side, "hadamard", "hadamard_rotate", empty, np.ones(128, np.int8))
    assert y.shape == (0, 128)


# --- each framework's manners


def test_any_pitch_any_leading_dimensions():
    x = torch.randn(6, 600, dtype=torch.float16)[:, 4:388]
    int8, fp8, had = (TRITON[stem] for stem in STEMS)
    for function in (lambda v: int8.int8_quantize(v, axis=-1, group=64), fp8.fp8_quantize_rows):
        for ours, packed in zip(function(x), function(x.contiguous()), strict=True):
            assert twin("triton").same_bits(ours, packed)
    signs = torch.ones(128, dtype=torch.int8)
    q, scale = had.hadamard_quantize(x.reshape(6, 3, 128), signs, "int8")
    assert q.shape == (6, 3, 128) and scale.shape == (6, 3)


def test_torch_compile_sees_one_operator():
    x = torch.randn(5, 256, dtype=torch.float16)
    signs = torch.ones(256, dtype=torch.int8)
    int8, fp8, had = (TRITON[stem] for stem in STEMS)

    def both(v):
        return (
            *int8.int8_quantize(v, axis=-1, group=32),
            *fp8.fp8_quantize_rows(v, transposed=True),
            *had.hadamard_quantize(v, signs, "e4m3"),
        )

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert all(map(twin("triton").same_bits, compiled(x), both(x)))


def test_vmap_and_gradient_of_the_rotation():
    rotate, signs = PALLAS["hadamard"].hadamard_rotate, jnp.ones(64, jnp.int8)
    x = jax.random.randint(jax.random.key(1), (2, 3, 64), -9, 9).astype(jnp.float16)
    y, pull = jax.vjp(lambda v: rotate(v, signs), x)
    assert jnp.array_equal(jax.vmap(lambda one: rotate(one, signs))(x), y)
    assert jnp.array_equal(pull(y)[0], x)  # the way back, and nothing was rounded


def test_the_rotation_is_one_kernel():
    """Beside one of 60 us, a second that only converts the signs takes two."""
    quantize, signs = PALLAS["hadamard"].hadamard_quantize, jnp.ones(128, jnp.int8)
    x = jnp.ones((64, 128), jnp.float16)
    traced = jax.make_jaxpr(lambda v, s: quantize(v, s, "int8"))(x, signs)
    calls = [eqn for eqn in traced.eqns if eqn.primitive.name != "stop_gradient"]
    assert len(calls) == 1 and len(calls[0].params["call"].eqns) == 1


def test_no_gradient_flows_through_codes_and_none_is_missed():
    """A straight-through estimator differentiates beside them, as with torch's detached ones."""
    int8, fp8, had = (PALLAS[stem] for stem in STEMS)
    x, signs = jnp.ones((2, 128), jnp.float16), jnp.ones(128, jnp.int8)

    def scales(v):
        found = (
            int8.int8_quantize(v, axis=-1),
            fp8.fp8_quantize_rows(v),
            had.hadamard_quantize(v, signs, "int8"),
        )
        return sum(scale.sum() for _, scale in found)

    assert not jax.grad(scales)(x).any()
    assert not any(
        y.requires_grad
        for y in TRITON["int8_quantize"].int8_quantize(
            torch.ones(2, 64, dtype=torch.float16, requires_grad=True), axis=-1
        )
    )
