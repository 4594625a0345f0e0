"""The compile gate: toy kernels that must be red for the right reason, a real one, kept answers."""

import dataclasses
import importlib.metadata
import json
import queue
import subprocess
import sys
import textwrap
import threading
import types

import pytest

from parity import compile as gate
from parity.compile import CompileRow, compile_gate
from parity.frameworks import compile_worker
from parity.problems import problem
from parity.spec import Workload

TRITON_TOYS = """
    import os
    import torch, triton
    import triton.language as tl

    @triton.jit
    def _dot_kernel(x, y, K, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr):
        m, n, k = tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, depth)
        acc = tl.zeros((rows, columns), tl.float32)
        for ki in range(0, K, depth):
            a = tl.load(x + m[:, None] * K + k[None, :] + ki)
            b = tl.load(x + n[None, :] * K + k[:, None] + ki)
            acc = tl.dot(a, b, acc)
        tl.store(y + m[:, None] * columns + n[None, :], acc)

    @triton.jit
    def _hundred_kernel(x, y):
        c = tl.arange(0, 100)
        tl.store(y + c, tl.load(x + c))

    def _dot(x, rows, columns, depth, **options):
        y = torch.empty((rows, columns), dtype=torch.float32, device=x.device)
        _dot_kernel[(1,)](x, y, x.shape[1], rows, columns, depth, **options)
        return y

    def spills(x):  # 256 accumulators for each of 128 threads, which have 255 registers
        return _dot(x, 128, 256, 64, num_warps=4, num_stages=3)

    def overflows(x):
        return _dot(x, 64, 128, 128, num_warps=4, num_stages=6)

    def cannot_lower(x):
        y = torch.empty_like(x)
        _hundred_kernel[(1,)](x, y)
        return y

    def launches_nothing(x):
        return 2 * x

    waits = launches_nothing

    def dies(x):
        os._exit(3)
"""

PALLAS_TOYS = """
    import jax, jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def _through_smem(x, rows, function):
        def copy_kernel(x_gmem, y_gmem, x_smem, barrier):
            block = pl.ds(0, rows)
            plgpu.copy_gmem_to_smem(x_gmem.at[block], x_smem, barrier)
            plgpu.barrier_wait(barrier)
            x_smem[...] = function(x_smem[...])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_smem, y_gmem.at[block])
            plgpu.wait_smem_to_gmem(0)

        scratch = [plgpu.SMEM((rows, x.shape[1]), x.dtype, transforms=SWIZZLED), plgpu.Barrier()]
        return plgpu.kernel(copy_kernel, out_type=jax.typeof(x), grid=(1,), grid_names=("i",),
                            scratch_types=scratch)(x)

    def overflows(x):
        return _through_smem(x, 256, lambda v: v + v)

    def cannot_lower(x):
        return _through_smem(x, 64, lambda v: jnp.cumsum(v, axis=1))

    def launches_nothing(x):
        return 2 * x

    def waits(x):
        def greedy_kernel(x_gmem, y_gmem):
            group = jax.lax.axis_index("wg")

            @pl.when(group == 2)
            def _memory():
                plgpu.set_max_registers(32, action="decrease")

            @pl.when(group < 2)
            def _compute():
                plgpu.set_max_registers(240, action="increase")
                y_gmem[...] = x_gmem[...]

        return plgpu.kernel(greedy_kernel, out_type=x, grid=(1,), grid_names=("i",),
                            num_threads=3, thread_name="wg", kernel_name="greedy_kernel")(x)

    def spills(x):
        def wide_kernel(x_gmem, y_gmem, a_smem, b_smem, barrier):
            def products(acc):
                @pl.loop(0, x.shape[1] // 64)
                def _step(ki):
                    k = pl.ds(ki * 64, 64)
                    plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(0, 128), k], a_smem, barrier)
                    plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(0, 256), k], b_smem, barrier)
                    plgpu.barrier_wait(barrier)
                    plgpu.wgmma(acc, a_smem, b_smem.T)
                    plgpu.wgmma_wait(0)
                return acc[...]

            y_gmem[...] = pl.run_scoped(products, plgpu.ACC((128, 256), jnp.float32))

        tile = lambda rows: plgpu.SMEM((rows, 64), x.dtype, transforms=SWIZZLED)
        return plgpu.kernel(wide_kernel, out_type=jax.ShapeDtypeStruct((128, 256), jnp.float32),
                            grid=(1,), grid_names=("i",), kernel_name="wide_kernel",
                            scratch_types=[tile(128), tile(256), plgpu.Barrier(num_arrivals=2)])(x)
"""

TOY = Workload("toy", {"R": 512, "N": 512}, "bfloat16", ("model",), absent=("mask",))
TINY = Workload("tiny", {"M": 264, "N": 520, "K": 136}, "bfloat16", ("model",))

needs_ptxas = pytest.mark.skipif(
    gate.find_sass() is None, reason="no .venv-sass with jax's CUDA plugin (make sass), or no cc"
)


def toy_problem(name, files, twins=gate.TWINS):
    return dataclasses.replace(
        problem("softmax"),
        stem=name,
        workloads=(dataclasses.replace(TOY, passes=("fwd",)),),
        implementations={twin: f"{files / f'{twin}_toys.py'}:{name}" for twin in twins},
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the slow tests look at, by (problem, pass, twin): one worker per twin compiles all."""
    files = tmp_path_factory.mktemp("toys")
    (files / "triton_toys.py").write_text(textwrap.dedent(TRITON_TOYS))
    (files / "pallas_toys.py").write_text(textwrap.dedent(PALLAS_TOYS))
    names = ("spills", "waits", "overflows", "cannot_lower", "launches_nothing", "dies")
    matmul = dataclasses.replace(problem("matmul"), workloads=(TINY,))
    found = {}
    problems = [matmul, *(toy_problem(name, files) for name in names)]
    for row in compile_gate(problems, cache=files / "cache"):
        found.setdefault((row.problem, row.which, row.twin), []).append(row)
    return found


def only(rows, name, twin):
    (row,) = rows[name, "fwd", twin]
    assert "\n" not in row.message
    return row


def test_a_real_triton_twin_is_machine_code(rows):
    (fwd,), bwd = rows["matmul", "fwd", "triton"], rows["matmul", "bwd", "triton"]
    assert len(bwd) == 2  # da and db: two different kernels
    for row in (fwd, *bwd):
        assert (row.kernel, row.status, row.message) == ("_matmul_kernel", "ok", "")
        assert 32 < row.registers <= 255 and row.spills == row.local == 0
        assert row.wgmma > 0 and row.tma_load > 0 and row.tma_store > 0 and row.mma_sync == 0
        assert 0 < row.shared_bytes <= 232448 and row.threads == 32 * row.config["warps"]
        assert row.serialised_wgmma is False


def test_a_real_pallas_twin_lowers(rows):
    fwd, bwd = rows["matmul", "fwd", "pallas"], rows["matmul", "bwd", "pallas"]
    assert len(fwd) == 1 and len(bwd) == 2
    for row in (*fwd, *bwd):
        assert row.kernel == "matmul_kernel"
        assert row.status in ("ok", "lowered") and row.message == ""
        assert row.wgmma > 0 and row.tma_load > 0 and row.tma_store > 0
        assert row.tma_descriptors == 3 and 0 < row.shared_bytes <= 232448
        assert (
            row.grid is not None and row.grid[0] > 2
        )  # sized for an H200, not for the interpreter
        assert row.threads == 128 * (row.config["warpgroups"] + 1)


@needs_ptxas
def test_a_real_pallas_twin_is_machine_code(rows):
    for which in ("fwd", "bwd"):
        for row in rows["matmul", which, "pallas"]:
            assert row.status == "ok" and 32 < row.registers <= 255
            assert row.spills == row.local == row.stack == 0 and row.serialised_wgmma is False


def test_triton_spill_and_serialised_wgmma_are_red(rows):
    row = only(rows, "spills", "triton")
    assert row.fails and row.spills > 0 and row.stack > 0 and row.local > 0 and row.serialised_wgmma
    assert f"spills {row.spills} bytes at 255 registers" in row.message
    assert "wgmma serialised: insufficient register resources" in row.message


@needs_ptxas
def test_pallas_spill_and_serialised_wgmma_are_red(rows):
    row = only(rows, "spills", "pallas")
    assert row.fails and row.kernel == "wide_kernel" and row.spills > 0 and row.serialised_wgmma
    assert f"spills {row.spills} bytes at 255 registers" in row.message
    assert "wgmma serialised" in row.message


def test_waiting_for_registers_that_no_block_has_is_red(rows):
    row = only(rows, "waits", "pallas")
    assert row.fails and row.kernel == "greedy_kernel"
    assert row.message == "waits for ever: 3 warpgroups want 512 registers of a thread's, of 504"


def test_shared_memory_overflow_is_red(rows):
    triton, pallas = (only(rows, "overflows", twin) for twin in gate.TWINS)
    assert triton.fails and triton.kernel == "_dot_kernel" and triton.shared_bytes > 232448
    assert "shared memory" in triton.message and str(triton.shared_bytes) in triton.message
    assert pallas.fails and "exceeds available shared memory" in pallas.message


def test_what_cannot_be_lowered_is_red(rows):
    triton, pallas = (only(rows, "cannot_lower", twin) for twin in gate.TWINS)
    assert triton.fails and "arange's range must be a power of 2" in triton.message
    assert "c = tl.arange(0, 100)" in triton.message  # where
    assert pallas.fails and "Unimplemented primitive" in pallas.message
    assert "cumsum" in pallas.message


def test_a_function_without_a_kernel_is_red(rows):
    triton, pallas = (only(rows, "launches_nothing", twin) for twin in gate.TWINS)
    assert triton.fails and triton.message == "launched no Triton kernel"
    assert pallas.fails and pallas.message == "lowered to no Mosaic GPU kernel"


def test_a_compiler_that_dies_costs_its_own_row_only(rows):
    row = only(rows, "dies", "triton")
    assert row.fails and "the compiler process ended with 3" in row.message
    assert "has no function 'dies'" in only(rows, "dies", "pallas").message


def test_an_explicit_config_is_the_one_compiled(tmp_path):
    matmul = dataclasses.replace(problem("matmul"), workloads=(TINY,))
    config = {"block_m": 128, "block_n": 128, "block_k": 64, "stages": 3, "warpgroups": 2}
    (row,) = compile_gate(
        [matmul],
        twins=("pallas",),
        passes=("fwd",),
        configs={"pallas": config},
        sass=False,
        cache=tmp_path,
    )
    assert row.status == "lowered" and row.registers is None
    assert config.items() <= row.config.items()


def test_a_stalled_compiler_is_stopped():
    answers = queue.Queue()
    task = gate._Task("p", "w", "triton", {"implementation": "m:f", "passes": ["fwd", "bwd"]})
    gate._drive("import time; time.sleep(60)", [task], 0.5, answers, gate._Crew())
    _, found, keep = answers.get_nowait()
    assert [row["pass"] for row in found] == ["fwd", "bwd"] and not keep
    assert all("no answer in 0.5 s" in row["message"] for row in found)


def test_a_broken_or_dismissed_crew_leaves_no_task_unanswered():
    answers = queue.Queue()
    tasks = [
        gate._Task("p", n, "pallas", {"implementation": "m:f", "passes": ["fwd"]}) for n in "ab"
    ]
    gate._drive("raise SystemExit('no jax here')", tasks, 60, answers, gate._Crew())
    found = [answers.get_nowait() for _ in tasks]
    assert [task.workload for task, *_ in found] == ["a", "b"]
    assert all("no jax here" in rows[0]["message"] and not keep for _, rows, keep in found)
    crew = gate._Crew()
    crew.dismiss()
    gate._drive("", tasks, 60, answers, crew)
    assert answers.empty() and not crew.workers


# Kept answers, with workers that cost nothing.


@pytest.fixture
def fake_workers(monkeypatch):
    """Replaces the compilers; returns the tasks they were asked for."""
    asked = []

    def compile_all(shares, site, cache, timeout, finish):
        for task in [task for _, tasks in shares for task in tasks]:
            asked.append((task.workload, task.twin))
            row = {"pass": "fwd", "kernel": "k", "status": "ok", "config": {"block_m": 64}}
            finish(task, [row | {"grid": [132, 1, 1]}], True)

    monkeypatch.setattr(gate, "_compile_all", compile_all)
    return asked


def toys(tmp_path, text="def toy(x): pass\n"):
    (tmp_path / "triton_toys.py").write_text(text)
    return [toy_problem("toy", tmp_path, ("triton",))]


def run(problems, tmp_path, **keywords):
    return compile_gate(problems, twins=("triton",), cache=tmp_path / "cache", **keywords)


def test_the_second_run_compiles_nothing(tmp_path, fake_workers):
    first = run(toys(tmp_path), tmp_path)
    seen = []
    second = run(toys(tmp_path), tmp_path, progress=lambda *step: seen.append(step))
    assert first == second and len(fake_workers) == 1 and seen == [(1, 1, "toy toy triton")]


def test_another_source_or_config_or_size_is_another_answer(tmp_path, fake_workers):
    run(toys(tmp_path), tmp_path)
    run(toys(tmp_path, "def toy(x): return x\n"), tmp_path)
    (tmp_path / "helper.py").write_text("rows = 1\n")
    run(toys(tmp_path, "import helper\ndef toy(x): pass\n"), tmp_path)
    (tmp_path / "helper.py").write_text("rows = 2\n")  # what a kernel imports counts too
    run(toys(tmp_path, "import helper\ndef toy(x): pass\n"), tmp_path)
    run(toys(tmp_path), tmp_path, configs={"triton": {"block_m": 64}})
    bigger = dataclasses.replace(TOY, sizes={"R": 1024, "N": 512})
    run([dataclasses.replace(toys(tmp_path)[0], workloads=(bigger,))], tmp_path)
    assert len(fake_workers) == 6


def test_trials_of_many_configs_share_the_compilers_and_keep_their_order(tmp_path, fake_workers):
    (toy,) = toys(tmp_path)
    configs = [None, *({"block_m": 2**i} for i in range(5))]
    trials = [gate.Trial(toy, toy.workloads[0], "fwd", "triton", config) for config in configs]
    seen = []
    found = gate.compile_trials(
        trials, cache=tmp_path, jobs=3, progress=lambda *step: seen.append(step[:2])
    )
    assert len(found) == len(fake_workers) == 6 and seen[-1] == (6, 6)
    assert all([row.which for row in rows] == ["fwd"] for rows in found)
    assert gate.compile_trials(trials[:2], cache=tmp_path) == found[:2] and len(fake_workers) == 6


def test_an_answer_of_edited_sources_is_not_kept(tmp_path, monkeypatch):
    def compile_all(shares, site, cache, timeout, finish):
        toys(tmp_path, "def toy(x): return 'edited meanwhile'\n")
        for task in [task for _, tasks in shares for task in tasks]:
            finish(task, [{"pass": "fwd", "kernel": "k", "status": "ok"}], True)

    monkeypatch.setattr(gate, "_compile_all", compile_all)
    assert [row.status for row in run(toys(tmp_path), tmp_path)] == ["ok"]
    assert not list((tmp_path / "cache").glob("*.json"))


def test_equal_sizes_under_two_names_share_an_answer(tmp_path, fake_workers):
    run(toys(tmp_path), tmp_path)
    renamed = dataclasses.replace(toys(tmp_path)[0].workloads[0], name="renamed")
    (row,) = run([dataclasses.replace(toys(tmp_path)[0], workloads=(renamed,))], tmp_path)
    assert row.workload == "renamed" and len(fake_workers) == 1


@pytest.mark.parametrize("damage", ["", '{"key": "', "[]", '{"key": "k", "rows": [{"odd": 1}]}'])
def test_a_damaged_answer_is_compiled_again(tmp_path, fake_workers, damage):
    first = run(toys(tmp_path), tmp_path)
    (kept,) = (tmp_path / "cache").glob("*.json")
    kept.write_text(damage)
    assert run(toys(tmp_path), tmp_path) == first and len(fake_workers) == 2
    assert run(toys(tmp_path), tmp_path) == first and len(fake_workers) == 2


def test_two_writers_of_one_answer_leave_a_whole_one(tmp_path):
    rows = [[{"pass": "fwd", "kernel": "k" * size, "status": "ok"}] for size in (10, 100_000)]
    writers = [
        threading.Thread(target=lambda r=r: [gate._store(tmp_path, "key", r) for _ in range(20)])
        for r in rows
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert gate._fetch(tmp_path, "key") in [None, *rows]
    assert gate._fetch(tmp_path, "key") in rows
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]  # no part left over


# The pieces.


def test_rows_survive_json():
    row = CompileRow("p", "w", "bwd", "pallas", "k", "ok", grid=(132, None, 1), spills=0)
    text = json.dumps(row.to_json())
    assert json.loads(text)["pass"] == "bwd"
    assert CompileRow.from_json(json.loads(text)) == row
    with pytest.raises(TypeError, match="unknown"):
        CompileRow.from_json(row.to_json() | {"unknown": 1})


def test_only_model_workloads_are_compiled_unless_named(tmp_path, fake_workers):
    run([problem("softmax")], tmp_path)
    assert {name for name, _ in fake_workers} == {
        w.name for w in problem("softmax").workloads if "model" in w.tags
    }
    fake_workers.clear()
    run([problem("softmax")], tmp_path, workloads=["ci_causal"])
    assert fake_workers == [("ci_causal", "triton")]


def test_sass_where_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="make sass"):
        compile_gate([], sass=tmp_path)
    assert gate.find_sass(tmp_path) in (None, gate.find_sass())


def test_a_plugin_of_another_release_is_not_taken(tmp_path):
    site = tmp_path / ".venv-sass" / "lib" / "python3.12" / "site-packages"
    for file in ("jax_plugins/xla_cuda13/xla_cuda_plugin.so", "nvidia/cu13/bin/ptxas"):
        (site / file).parent.mkdir(parents=True)
        (site / file).touch()
    (site / "jax_cuda13_pjrt-0.0.1.dist-info").mkdir()
    assert gate._site_packages(tmp_path / ".venv-sass") is None
    (site / f"jax_cuda13_pjrt-{importlib.metadata.version('jax')}.dist-info").mkdir()
    assert gate._site_packages(tmp_path / ".venv-sass") == site
    assert gate._site_packages(site) == site


def test_ptxas_log():
    log = """
    ptxas info    : (C7519) warpgroup.arrive is injected in around line 687 by compiler
    ptxas info    : Function properties for k
        1032 bytes stack frame, 2312 bytes spill stores, 1800 bytes spill loads
    ptxas info    : Used 255 registers, used 1 barriers, 1032 bytes cumulative stack size
    """
    numbers = compile_worker.ptxas_numbers(log)
    assert numbers == {"registers": 255, "stack": 1032, "spills": 4112, "serialised_wgmma": ""}
    assert compile_worker.ptxas_numbers("ptxas fatal : no") is None


def test_sass_counts():
    sass = """
        /*0010*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/ UTMALDG.2D [UR16], [UR6], desc[UR8] ;
        /*0030*/ UTMASTG.2D [UR16], [UR6] ;
        /*0040*/ STL.64 [R1+0x8], R2 ;
        /*0050*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    """
    assert set(compile_worker.sass_numbers(sass).values()) == {1}


def test_configs_are_recorded_and_checked(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Config:
        block_m: int

    module = types.ModuleType("recorded")
    module.Config, module.default_config = Config, lambda rows: Config(rows)

    def public():
        pass

    public.__module__ = "recorded"
    monkeypatch.setitem(sys.modules, "recorded", module)
    choose = module.default_config
    with compile_worker.Configs(public, None) as configs:
        module.default_config(64)
        module.default_config(rows=128)
    assert configs.of_calls(2) == [{"block_m": 64}, {"block_m": 128}] and configs.keywords == {}
    assert configs.of_calls(1) == [{"block_m": 128}] and module.default_config is choose
    assert compile_worker.Configs(public, {"block_m": 8}).of_calls(2) == [{"block_m": 8}] * 2
    with pytest.raises(TypeError, match="block_q"):
        compile_worker.Configs(public, {"block_q": 8})


def test_a_failure_of_this_machine_is_not_kept():
    request = {"implementation": "m:f"}
    assert compile_worker.failure("fwd", request, ImportError("no jax")).get("transient")
    assert "transient" not in compile_worker.failure("fwd", request, ValueError("too big"))


def test_importing_the_gate_imports_no_framework():
    code = "import sys, parity.compile; print({'torch', 'triton', 'jax'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
