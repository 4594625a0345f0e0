"""The gaps of JAX's interpreter: still there upstream, filled by us, and the races it must see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from parity import frameworks
from parity.frameworks import mosaic_interpreter

GAPS = sorted(mosaic_interpreter.probe_kernels())


def _x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)


def _run(kernel, *args) -> np.ndarray:
    return np.asarray(jax.block_until_ready(jax.jit(lambda *a: kernel(*a))(*args)))


def test_the_gaps_are_still_there_upstream():
    probes = mosaic_interpreter.probes()
    # what XLA makes a maximum of is a matter of the CPU too
    closed = {probe.name for probe in probes if probe.ok} - {"nan_maximum"}
    assert not closed, f"this JAX can do {closed}: take the addition out of mosaic_interpreter.py"
    assert [probe.name for probe in probes if not (probe.ok or probe.detail)] == []


def test_a_plain_copy_that_would_run_on_is_an_error():
    kernel, words = mosaic_interpreter.probe_kernels()["plain_store"], "run on beyond dimension 1"
    with pytest.raises(Exception, match=words), mosaic_interpreter.interpreting():
        _run(kernel, _x())


@pytest.mark.parametrize("gap", [gap for gap in GAPS if gap != "plain_store"])
def test_a_filled_gap_gives_the_right_answer(gap):
    x = np.asarray(_x(), np.float32)
    want = {
        "run_state": x @ x,
        "register_operand": x @ x,
        "wgmma_races": x @ x,
        "atomics": x + 1,
        "tma_reduction": 2 * x,
    }.get(gap, x)
    with mosaic_interpreter.interpreting(detect_races=gap == "wgmma_races"):
        got = _run(mosaic_interpreter.probe_kernels()[gap], _x())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert bool(mosaic_interpreter.races()) == (gap == "wgmma_races")


def _handover(wait: bool):
    """Warpgroup 0 writes a tile, warpgroup 1 reads it: after a barrier, or not."""

    def body(x, y, tile, written):
        wg = lax.axis_index("wg")

        @pl.when(wg == 0)
        def _():
            tile[...] = x[...]
            if wait:
                plgpu.barrier_arrive(written)

        @pl.when(wg == 1)
        def _():
            if wait:
                plgpu.barrier_wait(written)
            y[...] = tile[...]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        num_threads=2,
        thread_name="wg",
    )


@pytest.mark.parametrize("wait", [True, False])
def test_a_missing_barrier_is_a_race(wait):
    with mosaic_interpreter.interpreting(detect_races=True):
        got = _run(_handover(wait), jnp.arange(128, dtype=jnp.float32))
    if wait:
        assert not mosaic_interpreter.races()
        np.testing.assert_array_equal(got, np.arange(128))
    else:
        assert "RACE" in mosaic_interpreter.races()[0]


def test_watched_turns_a_race_into_an_error():
    who = (
        r"RACE: warpgroup \d of block 0 (read|write)s SMEM\[.*\(test_mosaic_interpreter.py:\d+\), "
    )
    with pytest.raises(frameworks.DataRace, match=who + r"warpgroup \d .* nothing orders the two"):
        with mosaic_interpreter.watched(), mosaic_interpreter.interpreting(detect_races=True):
            _run(_handover(False), jnp.zeros(128))


def test_a_race_of_a_pipelines_copy_is_told_in_words_too():
    """The copy has no line; the read has one. And two blocks of a grid have one block_id."""
    warpgroup = "Warpgroup(device_id=0, cluster_id=0, block_id=0, warpgroup_id=0)"

    def raced(space: int, first: str, second: str) -> str:
        key = f"HostAllocationKey(memory_space_id={space}, device_id=0, block_id=0)"
        access = f"{key}[(slice(0, 64, 1),)] from {warpgroup}, "
        return mosaic_interpreter._in_words(
            f"RACE DETECTED\n  write of {access}{first}\n  clock: <a clock>\n"
            f"  read of {access}{second}\n  clock: <a clock>\n"
        )

    assert raced(1, "", "/a/kernel.py:31:15 (body)") == (
        "RACE: warpgroup 0 of block 0 writes SMEM[0:64] (a copy of the pipeline), "
        "warpgroup 0 of block 0 reads SMEM[0:64] (kernel.py:31), and nothing orders the two"
    )
    line = "/a/kernel.py:10:4 (body)"
    assert "warpgroup 0 writes GMEM[0:64] (kernel.py:10), warpgroup 0 reads" in raced(0, line, line)


def _wgmma_ring(wait: bool):
    """Two trips through one slot: the second copy may come only when the first wgmma has ended."""

    def body(x, y, tile, full):
        def product(acc):
            for _ in range(2):
                plgpu.copy_gmem_to_smem(x, tile, full)
                plgpu.barrier_wait(full)
                plgpu.wgmma(acc, tile, tile)
                if wait:
                    plgpu.wgmma_wait(0)
            return acc[...]

        y[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[
            plgpu.SMEM((64, 64), jnp.bfloat16, transforms=transforms),
            plgpu.Barrier(),
        ],
    )


@pytest.mark.parametrize("wait", [True, False])
def test_a_refill_under_a_running_wgmma_is_a_race(wait):
    with mosaic_interpreter.interpreting(detect_races=True):
        _run(_wgmma_ring(wait), _x())
    assert bool(mosaic_interpreter.races()) == (not wait)


def test_memory_nobody_wrote_reads_as_nan():
    kernel = plgpu.kernel(lambda x, y: None, out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32))
    with mosaic_interpreter.interpreting():
        assert np.isnan(_run(kernel, _x())).all()


def test_after_a_failure_the_next_kernel_runs():
    def forgets_to_wait(x, y, tile, full):
        plgpu.copy_gmem_to_smem(x, tile, full)
        plgpu.copy_gmem_to_smem(x, tile, full)
        plgpu.barrier_wait(full)
        y[...] = tile[...].astype(jnp.float32)

    kernel = plgpu.kernel(
        forgets_to_wait,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        scratch_types=[plgpu.SMEM((64, 64), jnp.bfloat16), plgpu.Barrier()],
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="Barrier"):
        with mosaic_interpreter.interpreting():
            _run(kernel, _x())
    with mosaic_interpreter.interpreting():
        np.testing.assert_array_equal(_run(_handover(True), jnp.ones(128)), np.ones(128))


def test_a_private_name_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(mosaic_interpreter._PRIVATE, "core", ("jax._src.core", ("NoSuchThing",)))
    with pytest.raises(RuntimeError, match=r"has no jax\._src\.core\.NoSuchThing"):
        mosaic_interpreter._jax.__wrapped__()
    monkeypatch.setitem(mosaic_interpreter._PRIVATE, "core", ("jax._src.no_such_file", ()))
    with pytest.raises(RuntimeError, match=r"has no jax\._src\.no_such_file"):
        mosaic_interpreter._jax.__wrapped__()
