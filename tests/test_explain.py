"""explain: what it reads off machine code, what it says of kernels that are slow on purpose, and
that it says none of it of ours."""

import dataclasses
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from parity import compile as gate
from parity import explain, ncu, ptx, record, sass, timing, waterfall
from parity.cli import main
from parity.compile import CompileRow, compile_gate
from parity.problems import PROBLEMS, problem
from parity.spec import Launch

VARIANTS = Path(__file__).parent / "variants"

needs_ptxas = pytest.mark.skipif(
    gate.find_sass() is None, reason="no .venv-sass with jax's CUDA plugin (make sass), or no cc"
)

# Machine code.

LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R14 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0030*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;
        /*0050*/                   FMUL R8, R4, R5 ;
        /*0060*/                   FADD R9, R8, R9 ;
        /*0070*/                   FMUL R8, R6, R7 ;
        /*0080*/              @P2 BRA `(.L_x_5) ;
        /*0090*/                   STG.E.U16 desc[UR6][R2.64], R9 ;
.L_x_5:
        /*00a0*/              @P1 BRA `(.L_x_2) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R14 ;
        /*00d0*/              @!P0 BRA `(.L_x_3) ;
        /*00e0*/                   BRA `(.L_x_4) ;
.L_x_6:
        /*00f0*/                   BRA `(.L_x_6);
"""


def test_a_wait_behind_the_end_belongs_to_the_loop_and_is_none_itself():
    code = sass.parse(LOOP)
    (loop,) = code.loops
    assert loop is code.main_loop and loop.depth == 1 and loop.innermost
    inside = {i.address for i in loop.instructions}
    assert inside == {*range(0x10, 0xB0, 0x10), 0xC0, 0xD0, 0xE0}
    assert inside - loop.every_trip == {0x90, 0xC0, 0xD0, 0xE0}  # a store, and the long wait


def test_instructions_are_counted_by_what_they_do():
    code = sass.parse(LOOP)
    assert code.counts["multiply"] == 2 and code.counts["add"] == 1 and code.counts["wait"] == 2
    assert code.wgmma == {"64x256x16 BF16": 1} and "fma" not in code.counts
    assert code.widths("global load") == {128: 1} and code.widths("global store") == {16: 1}
    # R8 = R4 * R5 is added once and then overwritten; the second product is never added
    assert code.unfused == 1
    (product,) = [i for i in code.instructions if i.kind == "wgmma"]
    assert sass.accumulator(product) == (24, 128)
    assert explain.longest_batch(code) == 128
    assert sass.parse("").main_loop is None


def test_an_annotated_loop_shows_what_loads_multiplies_and_waits():
    (loop,) = sass.parse(LOOP).loops
    roles = [line.role for line in sass.annotated(loop) if line.role]
    assert roles == ["wait", "load", "multiply", "multiply"]
    (sometimes,) = [line for line in sass.annotated(loop) if "global store" in line.text]
    assert sometimes.sometimes and sometimes.role == ""


# Addresses of a warp.

PTX = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b32 %r9, [k_param_1];
    mov.u32 %r1, %tid.x;
    and.b32 %r2, %r1, 31;
    mad.wide.s32 %rd2, %r2, {lane}, %rd1;
$L__BB0_1:
    @%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd2 + 0 ];
    @%p2 bra $L__BB0_1;
    mul.lo.s32 %r7, %r2, %r9;
    mad.wide.s32 %rd4, %r7, 2, %rd1;
    st.global.b16 [ %rd4 + 0 ], { %rs1 };
    ld.global.b32 %r8, [%rd1];
    add.s64 %rd5, %rd1, %rd9;
    ld.global.b32 %r8, [%rd5];
"""


def test_sectors_of_a_warp():
    load, store, one = ptx.accesses(PTX.replace("{lane}", "16"))
    assert (load.useful, load.sectors, load.used, load.scattered) == (512, 16, 1.0, False)
    assert (store.kind, store.useful, store.sectors, store.scattered) == ("store", 64, 32, True)
    assert store.used == 1 / 16
    assert (one.useful, one.sectors, one.scattered) == (4, 1, False)  # all lanes, one value
    assert ptx.accesses(PTX.replace("{lane}", "32"))[0].used == 0.5


def test_what_depends_on_loaded_data_is_not_guessed():
    assert len(ptx.accesses(PTX.replace("{lane}", "16"))) == 3  # %rd9 comes from nowhere
    assert len(ptx.accesses(PTX)) == 2  # nor is this one known: mad with an odd operand


def test_two_walks_over_an_array_are_seen():
    once = PTX.replace("{lane}", "16")
    again = "$L__BB0_2:\n ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd2 + 512 ];\n"
    assert not ptx.read_twice(once)
    assert ptx.read_twice(once + again + "@%p2 bra $L__BB0_2;\n")
    assert not ptx.read_twice(once + again)  # no second loop


# Arithmetic.


@pytest.mark.parametrize(
    "threads, registers, shared, blocks, by",
    [
        (1024, 64, 128, 1, "registers"),
        (512, 31, 197_720, 1, "shared memory"),
        (128, 56, 16, 9, "registers"),
        (128, 32, 0, 16, "threads"),
        (32, 16, 0, 32, "blocks"),
        (384, 168, 229_440, 1, "registers"),
    ],
)
def test_how_many_blocks_fit(threads, registers, shared, blocks, by):
    found = explain.Occupancy.of(threads, registers, shared)
    assert (found.blocks, found.by) == (blocks, by)


def made(stem, name, which, rows, measured=None, listing="", **how):
    p = problem(stem)
    return explain.explanation(
        p, p.workload(name), which, rows, measured or {}, listing=lambda row: listing, **how
    )


def row(twin="pallas", **facts):
    known = {"kernel": "k", "status": "ok", "registers": 32, "threads": 512, "grid": (132, 1, 1)}
    known |= {"shared_bytes": 198_000, "which": "fwd"} | facts
    return CompileRow("p", "w", twin=twin, **known)


CONFIG = {"block_m": 1, "block_n": 4096, "stages": 2, "warpgroups": 4}


def test_the_last_round():
    e = made("softmax", "softmax_4096x32768", "fwd", [row(config=CONFIG)])
    (k,) = e.sides[0].kernels
    assert k.rounds == (4096, 132, 4096 / 132) and k.idle_at_last == 128
    assert k.tail == pytest.approx(128 / 132 / 32)
    (tail,) = [s for s in e.sentences if s.topic == "tail"]
    assert "31.03 rounds" in tail.text and "up to 3.0% of the time" in tail.text
    # Several blocks on each: in the last round every multiprocessor still has one.
    small = row(config=CONFIG, grid=(4096, 1, 1), shared_bytes=20_000, threads=128)
    full = made("softmax", "softmax_4096x32768", "fwd", [small])
    assert full.sides[0].kernels[0].resident == 11 and not full.sides[0].kernels[0].tail


def test_what_a_ring_cannot_hold_is_read_twice():
    config = CONFIG | {"stages": 7}
    work = problem("softmax").workload("softmax_1024x151936")
    e = made("softmax", work.name, "fwd", [row(config=config, grid=(1024, 1, 1))])
    assert e.sides[0].again == 1024 * (151936 - 7 * 4 * 4096) * 2
    assert e.sides[0].kernels[0].kept_in == ""
    (told,) = [s for s in e.sentences if s.topic == "read twice"]
    assert "76.3 MB twice" in told.text and "89% of the roof" in told.text
    held = made("softmax", "softmax_4096x32768", "fwd", [row(config=CONFIG)])
    assert held.sides[0].again == 0


def test_a_matrix_product_shares_its_operands():
    config = {"block_m": 128, "block_n": 256, "cluster": 2}
    launch = Launch("pallas", "kernel", 0, 132, config)
    plan = problem("matmul").plan(problem("matmul").workload("gemm_8192"), "fwd", launch)
    assert plan.tiles == 64 * 32 and plan.shared == plan.tiles * 8192 * (128 + 128) * 2
    e = made("matmul", "gemm_8192", "fwd", [row(config=config)])
    assert e.compute_bound and any("8.59 GB" in s.text for s in e.sentences)


def test_stores_that_may_not_overlap():
    (told,) = [
        s
        for s in made("matmul", "gemm_49152_49152_512", "fwd", [row()]).sentences
        if s.topic == "beside"
    ]
    assert "4.93 GB" in told.text and 1000 < told.numbers["us"] < 1300
    assert not [
        s for s in made("matmul", "gemm_8192", "fwd", [row()]).sentences if s.topic == "beside"
    ]


# Measured time.


def measured_row(**facts):
    known = explain.recorded(problem("softmax"), problem("softmax").workloads[6], "fwd")
    base = json.loads(json.dumps(known["pallas"].row))
    return base | facts


def timed(us, **facts):
    return measured_row(us={"p10": us, "p50": us, "p90": us}, busy_us=us, **facts)


def test_what_is_not_accounted_for_is_said():
    ceilings = {"copy_gbps": 4000.0, "read_gbps": 4000.0, "gemm_tflops": 800.0}
    m = explain.Measured(timed(200.0, ceilings=ceilings, config=CONFIG), "f.jsonl:1")
    e = made("softmax", "softmax_4096x32768", "fwd", [row(config=CONFIG)], {"pallas": m})
    parts = e.accounts(e.sides[0])
    named = [p.what for p in parts]
    assert named == ["the least work at the ceiling", "the last round", "unexplained"]
    assert sum(p.us for p in parts) == pytest.approx(200.0)
    assert parts[0].us == pytest.approx(e.cost.bytes / 4e6)
    told = e.sentences[-1]
    assert told.topic == "unexplained" and f"{parts[-1].us:.1f} us" in told.text


def test_counted_bytes_settle_what_was_read_twice():
    config = CONFIG | {"stages": 7}
    cost = problem("softmax").cost(problem("softmax").workload("softmax_1024x151936"), "fwd")
    counted = [launch("k", 190.0, dram_bytes=cost.bytes + 4e7)]
    m = explain.Measured(timed(190.0, config=config, launches=counted), "f.jsonl:1")
    rows = [row(config=config, grid=(1024, 1, 1))]
    e = made("softmax", "softmax_1024x151936", "fwd", rows, {"pallas": m})
    (told,) = [s for s in e.sentences if s.topic == "read twice"]
    assert "48% of the second reads or more" in told.text  # 40 of 76 MB came from memory
    parts = {p.what: p for p in e.accounts(e.sides[0])}
    assert not parts["more bytes than the least, counted"].at_most


def test_a_time_of_another_config_is_not_accounted_for():
    m = explain.Measured(timed(200.0, config=CONFIG | {"stages": 3}), "f.jsonl:1")
    e = made("softmax", "softmax_4096x32768", "fwd", [row(config=CONFIG)], {"pallas": m})
    assert e.accounts(e.sides[0]) == []
    assert "another Config" in e.sentences[-1].text and "stages 3" in e.sentences[-1].text
    assert "pallas" in explain.conclusion(e).split("another Config")[1]


def test_a_profile_tells_the_registers_that_no_assembler_told():
    lowered = row(registers=None, status="lowered", kernel="softmax_fwd_kernel", config=CONFIG)
    ran = [launch("softmax_fwd_kernel_mosaic_gpu_kernel", 150.0, registers=168)]
    m = explain.Measured(timed(150.0, config=CONFIG, launches=ran), "f.jsonl:1")
    e = made("softmax", "softmax_4096x32768", "fwd", [lowered], {"pallas": m})
    assert e.sides[0].kernels[0].row.registers == 168
    (told,) = [s for s in e.sentences if s.topic == "missing"]
    assert "registers, spills" not in told.text and "make sass" in told.text


def test_every_committed_row_can_be_cited():
    for p in PROBLEMS:
        work = next(w for w in p.workloads if "model" in w.tags)
        for m in explain.recorded(p, work, "fwd").values():
            path, _, line = m.source.rpartition(":")
            text = (record.RECORDS.parents[1] / path).read_text().splitlines()[int(line) - 1]
            assert json.loads(text) == m.row


# Kernels that are slow on purpose, and ours.

SLOW = {
    "triton": {
        "spilling": ["spills"],
        "uncoalesced": ["uncoalesced"],
        "few_programs": ["under-occupied"],
        "one_warp": ["under-occupied"],
    },
    "pallas": {
        "spilling": ["spills"],
        "few_blocks": ["under-occupied"],
        # a lane a row: too few rows for the device as well
        "uncoalesced": ["uncoalesced", "under-occupied"],
    },
}
OURS = {
    "matmul": ("gemm_4096", ("fwd",)),
    "softmax": ("softmax_1024x151936", ("fwd",)),
    "rms_norm": ("rms_norm_16384x4096", ("fwd", "bwd")),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Everything the slow tests look at, from one worker for each twin: (rows, their listings)."""
    cache = tmp_path_factory.mktemp("explained")
    softmax = problem("softmax")
    wide = {"spilling": "softmax_4096x32768", "uncoalesced": "softmax_8192x8192"}
    problems = []
    for name in sorted({name for names in SLOW.values() for name in names}):
        work = softmax.workload(wide.get(name, "softmax_8192x8192"))
        impls = {
            twin: f"{VARIANTS / f'{twin}_softmax.py'}:{name}" for twin in SLOW if name in SLOW[twin]
        }
        if name == "spilling":  # enough for Triton's one warp
            impls.pop("triton")
            narrow = dataclasses.replace(softmax.workload("softmax_8192x8192"), passes=("fwd",))
            triton = {"triton": f"{VARIANTS / 'triton_softmax.py'}:spilling"}
            problems.append(slow_problem("spilling_triton", narrow, triton))
        problems.append(slow_problem(name, dataclasses.replace(work, passes=("fwd",)), impls))
    for stem, (name, passes) in OURS.items():
        p = problem(stem)
        work = dataclasses.replace(p.workload(name), passes=passes)
        problems.append(dataclasses.replace(p, workloads=(work,)))

    def compile_all(twin):
        having = [p for p in problems if twin in p.implementations]
        return compile_gate(having, twins=(twin,), cache=cache)

    with ThreadPoolExecutor() as both:
        rows = [row for rows in both.map(compile_all, gate.TWINS) for row in rows]
    return rows, cache


def slow_problem(name, work, impls):
    stem = f"slow_{name}"
    return dataclasses.replace(
        problem("softmax"), stem=stem, workloads=(work,), implementations=impls, plan=None
    )


def explained(compiled, stem, twin, p, work, which="fwd"):
    rows, cache = compiled
    own = [row for row in rows if (row.problem, row.twin, row.which) == (stem, twin, which)]
    assert own
    return explain.explanation(
        p,
        work,
        which,
        own,
        {},
        listing=lambda row: (cache / row.listing).read_text() if row.listing else "",
        foreign=(twin,) if stem.startswith("slow") else (),
    )


@pytest.mark.parametrize("name", SLOW["triton"])
def test_the_right_cause_is_named_in_triton(compiled, name):
    stem = "slow_spilling_triton" if name == "spilling" else f"slow_{name}"
    p = problem("softmax")
    e = explained(compiled, stem, "triton", p, p.workload("softmax_8192x8192"))
    assert [s.topic for s in e.sentences if s.cause] == SLOW["triton"][name]


@needs_ptxas
@pytest.mark.parametrize("name", SLOW["pallas"])
def test_the_right_cause_is_named_in_pallas(compiled, name):
    p = problem("softmax")
    size = "softmax_4096x32768" if name == "spilling" else "softmax_8192x8192"
    e = explained(compiled, f"slow_{name}", "pallas", p, p.workload(size))
    assert [s.topic for s in e.sentences if s.cause] == SLOW["pallas"][name]


@pytest.mark.parametrize("twin", gate.TWINS)
@pytest.mark.parametrize("stem", OURS)
def test_no_fault_is_named_of_ours(compiled, stem, twin):
    name, passes = OURS[stem]
    p = problem(stem)
    for which in passes:
        e = explained(compiled, stem, twin, p, p.workload(name), which)
        assert [s.text for s in e.sentences if s.cause] == []
        assert all(k.blocks for side in e.sides for k in side.kernels)
        if e.sides[0].kernels[0].row.status == "ok":
            assert all(k.code and k.in_flight for k in e.sides[0].kernels)


def test_the_sentences_stand_on_numbers(compiled):
    p = problem("softmax")
    work = p.workload("softmax_8192x8192")
    (spill,) = [
        s
        for s in explained(compiled, "slow_spilling_triton", "triton", p, work).sentences
        if s.cause
    ]
    assert spill.numbers["registers"] == 255 and spill.numbers["local"] > 0
    assert f"{spill.numbers['local']} instructions" in spill.text
    (few,) = [
        s for s in explained(compiled, "slow_few_programs", "triton", p, work).sentences if s.cause
    ]
    assert "16 blocks for 132 multiprocessors" in few.text
    (strided,) = [
        s for s in explained(compiled, "slow_uncoalesced", "triton", p, work).sentences if s.cause
    ]
    assert "64 bytes touches 32 sectors" in strided.text and "6% of what moves" in strided.text


def test_what_the_plan_calls_two_walks_the_code_has(compiled):
    e = explained(
        compiled,
        "softmax",
        "triton",
        problem("softmax"),
        problem("softmax").workload("softmax_1024x151936"),
    )
    (k,) = e.sides[0].kernels
    assert ptx.read_twice(k.listing) == (k.again > 0)


@pytest.mark.parametrize("name", SLOW["triton"])
def test_the_slow_variants_are_right(name):
    import torch

    from parity import frameworks

    function, _ = frameworks.load_target(f"{VARIANTS / 'triton_softmax.py'}:{name}")
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    e = np.exp(0.5 * x.astype(np.float64))
    found = function(torch.from_numpy(x), scale=0.5).numpy()
    np.testing.assert_allclose(found, e / e.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


# From one row to another.


def launch(name, us, **facts):
    shape = {"grid": [132, 1, 1], "block": [256, 1, 1], "registers": 64, "shared_bytes": 1024}
    return {"name": name, "us": us, "share": 1.0} | shape | facts


def test_a_waterfall_adds_up():
    ceilings = {"copy_gbps": 4000.0, "read_gbps": 4000.0, "gemm_tflops": 800.0}
    before = timed(200.0, ceilings=ceilings, kernels=["a", "b"])
    before |= {
        "busy_us": 190.0,
        "launches": [launch("a", 150.0, dram_bytes=6e8), launch("b", 40.0)],
    }
    slower = ceilings | {"copy_gbps": 3800.0}
    after = timed(160.0, ceilings=slower, kernels=["a"])
    after |= {"launches": [launch("a", 160.0, dram_bytes=6e8, registers=128)]}
    found = waterfall.waterfall(before, after)
    steps = {step.what: step.us for step in found.steps}
    assert steps["the device"] == pytest.approx(200 * (4000 / 3800 - 1))
    assert steps["between kernels"] == -10.0 and steps["kernels gone"] == -40.0
    assert sum(steps.values()) == pytest.approx(-40.0) and "bytes moved" not in steps
    assert "a registers: 64 -> 128" in found.changed
    assert "a blocks on a multiprocessor: 4 -> 2" in found.changed
    assert any("bytes that memory moved" in line for line in found.missing)


def test_counted_bytes_are_a_step():
    before = timed(200.0, launches=[launch("a", 200.0, dram_bytes=9e8, instructions={"fma": 4})])
    after = timed(150.0, launches=[launch("a", 150.0, dram_bytes=6e8, instructions={"fma": 8})])
    found = waterfall.waterfall(before, after)
    gbps = after["ceilings"]["copy_gbps"]
    assert {s.what: s.us for s in found.steps}["bytes moved"] == pytest.approx(-3e5 / gbps)
    assert "a fma: 4 -> 8 instructions" in found.changed and not found.missing


def test_old_rows_leave_the_rest_unexplained():
    before, after = (
        {key: value for key, value in timed(us).items() if key != "launches"}
        for us in (200.0, 150.0)
    )
    found = waterfall.waterfall(before, after)
    assert [(s.what, s.us) for s in found.steps] == [("unexplained", -50.0)]
    assert any("each launch" in line for line in found.missing)


def test_rows_of_different_work_explain_nothing():
    with pytest.raises(ValueError, match="not of one pass"):
        waterfall.waterfall(timed(1.0), timed(1.0) | {"pass": "bwd"})
    with pytest.raises(ValueError, match="row after was not timed"):
        waterfall.waterfall(timed(1.0), timed(1.0) | {"us": None})


# Hardware counters: a synthetic sample of the format that ncu prints, not a measurement.

_LEFT = '"{id}","77","python","host","{kernel}","1","7","(512, 1, 1)","(132, 1, 1)","0","9.0",'
_LEFT += '"Command line profiler metrics",'
_HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_sample():
    lines = ["==PROF== Connected to process 77", _HEAD]
    for id_, kernel in enumerate(("_k(float *)", "_dw")):
        left = _LEFT.format(id=id_, kernel=kernel)
        lines += [
            left + '"dram__bytes_read.sum","byte","600,000,000"',
            left + '"dram__bytes_write.sum","byte","200,000,000"',
            left + '"lts__t_sector_hit_rate.pct","%","41.5"',
            left + '"sm__warps_active.avg.pct_of_peak_sustained_active","%","49.2"',
            left + '"smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio","inst","n/a"',
            left
            + '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","inst",'
            '"7.25"',
        ]
    return "\n".join([*lines, "==PROF== Disconnected from process 77"])


def test_counters_are_read():
    first, second = ncu.read(ncu_sample())
    assert first["name"] == "_k(float *)" and second["name"] == "_dw"
    assert first["dram_read_bytes"] == 6e8 and first["l2_hit"] == 41.5
    assert first["stalls"] == {"long_scoreboard": 7.25}
    told = "; ".join(ncu.sentences(first, 4e8))
    assert "2.00 times the least" in told and "7.25 warps wait for memory" in told


@pytest.mark.parametrize(
    "output, why",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "administrators"),
        ("==ERROR== Failed to load", "Failed to load"),
        ("", "printed no counters"),
    ],
)
def test_why_there_are_no_counters(output, why):
    with pytest.raises(ncu.NoCounters, match=why):
        ncu.read(output)


def test_without_ncu_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr(ncu.shutil, "which", lambda name: None)
    with pytest.raises(ncu.NoCounters, match="no ncu on the PATH"):
        ncu.counters("m:f", "softmax", "ci", "fwd", "triton")


def test_ncu_is_asked_to_leave_the_clocks_alone(monkeypatch):
    asked = []

    def ran(command, **how):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, ncu_sample(), "")

    monkeypatch.setattr(ncu.shutil, "which", lambda name: "ncu")
    monkeypatch.setattr(ncu.subprocess, "run", ran)
    assert len(ncu.counters("m:f", "softmax", "ci", "fwd", "triton")) == 2
    words = " ".join(asked[0])
    assert "--clock-control none" in words and "dram__bytes_read.sum" in words


def test_a_trace_tells_how_kernels_were_launched():
    from parity.frameworks import tracer

    args = {"grid": [132, 1, 1], "block": [256, 1, 1], "registers per thread": 64}
    trace = {
        "traceEvents": [
            {"cat": "kernel", "name": "late", "ts": 5.0, "args": args | {"shared memory": 512}},
            {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 2.0, "args": {}},
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1.0},
        ]
    }
    fill, kernel = tracer.shapes_of(trace)
    assert kernel == {"grid": [132, 1, 1], "block": [256, 1, 1]} | {
        "registers": 64,
        "shared_bytes": 512,
    }
    assert set(fill.values()) == {None}


# The command.


@pytest.fixture
def quick(monkeypatch):
    """No compilers: one made-up row for each twin and pass."""

    def rows(problems, *, twins, passes, **how):
        return [row(twin, which=which, config=CONFIG) for which in passes for twin in twins]

    monkeypatch.setattr(gate, "compile_gate", rows)


def test_the_conclusion_comes_first(quick, capsys):
    assert main(["explain", "softmax", "-w", "softmax_4096x32768"]) == 0
    out = capsys.readouterr().out
    first, *rest = out.splitlines()
    assert first.startswith("softmax softmax_4096x32768 (R 4096, N 32768, bfloat16)")
    assert rest[0].startswith("fwd: ") and " us" in rest[0]
    assert any(s.startswith("bwd: ") for s in rest)
    assert "blocks on each SM" in out and "unexplained" in out and "softmax.jsonl:" in out


def test_json_is_one_value(quick, capsys):
    assert main(["explain", "matmul", "--pass", "bwd", "--twin", "triton", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["explanations"]
    assert told["workload"] == "gemm_8192" and set(told["sides"]) == {"triton"}
    assert told["bound"] == "compute" and told["ceilings_source"].startswith("parity/records")


@pytest.mark.parametrize("columns", [150, 80])
def test_main_loops_stand_side_by_side_where_there_is_room(quick, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("parity.commands.explain.listing_of", lambda row: LOOP)
    assert main(["explain", "matmul", "--sass"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "HGMMA.64x256x16" in line]
    assert [line.count("HGMMA.64x256x16") for line in lines] == ([2] if columns == 150 else [1, 1])
    assert "R24 to R151 of each of 128 threads" in " ".join(out.split())
    assert "Legend" in out and "TMA load" not in out  # only what is there


@pytest.mark.parametrize(
    "words, code, why",
    [
        (["softmx"], 2, "did you mean 'softmax'"),
        ([], 2, "one STEM"),
        (["softmax", "-w", "softmax_16384"], 2, "did you mean 'softmax_16384x4096'"),
        (["softmax", "--ncu"], 3, "no Hopper GPU"),
        (["softmax", "--out", "x.jsonl"], 3, "no Hopper GPU"),
        (["--before", "a.jsonl:1"], 2, "goes with --after"),
        (["--before", "nowhere.jsonl:1", "--after", "nowhere.jsonl:2"], 2, "no file"),
    ],
)
def test_bad_words(words, code, why, capsys, monkeypatch):
    monkeypatch.setattr("parity.commands.explain.gpu_is_here", lambda: False)
    assert main(["explain", *words]) == code
    assert why in capsys.readouterr().err


def test_from_one_committed_row_to_another(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for us in (200.0, 150.0):
        record.append(file, timed(us))
    assert main(["explain", "--before", f"{file}:1", "--after", f"{file}:2"]) == 0
    out = capsys.readouterr().out
    assert "FASTER, 200.0 -> 150.0 us (-50.0 us, -25.0%)" in out.splitlines()[0]
    assert "unexplained" in out and "Not in these rows" in out
    # one key: its last row stands, and choosing finds it
    choose = ["--before", f"{file}:1", "--after", str(file), "-w", timed(1.0)["workload"]]
    assert main(["explain", *choose, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"] == 150.0
    assert main(["explain", "--before", f"{file}:9", "--after", f"{file}:1"]) == 2
    assert "no row in line 9" in capsys.readouterr().err


def test_verdicts_in_words(quick, capsys):
    m = {
        twin: explain.Measured(timed(us, impl=twin, config=CONFIG), "f:1")
        for twin, us in (("triton", 100.0), ("pallas", 101.0))
    }
    rows = [row(twin, config=CONFIG) for twin in gate.TWINS]
    e = made("softmax", "softmax_4096x32768", "fwd", rows, m)
    assert "both take the same time" in explain.conclusion(e)
    assert timing.verdict(m["triton"].us, m["pallas"].us) == timing.SAME
