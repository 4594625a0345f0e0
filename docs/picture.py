"""Draws docs/parity.svg: one problem, its two twins stage by stage, and what judges them.

The code in it is read from the twins, so that the picture cannot lie: `make docs` draws it again,
and a test fails while the committed one is stale.
"""

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "parity.svg"

STEM = "matmul"
# What one stage is in either language: the name of a call in the twin, shown as it stands there.
STAGES = (
    ("1", "which tile", "tl.range", "plgpu.nd_loop"),
    ("2", "main loop", "tl.dot", "plgpu.wgmma"),
    ("3", "epilogue", "left.to", "acc.astype"),
    ("4", "store", "_store_tile", "plgpu.copy_smem_to_gmem"),
)
GATES = (
    (
        "the judge",
        "against float64; an error may be 1.5 times what float32 loses on the same formula. "
        "Zeros, NaN, data races, and who did the work",
    ),
    (
        "the compile gate",
        "both twins to sm_90a machine code with no GPU in the machine: layouts, registers, spills, "
        "shared memory, wgmma, TMA",
    ),
    (
        "the ruler",
        "on a Hopper GPU: the same addresses, one profiler, cold L2, A B B A beside cuBLAS, "
        "torch.compile, JAX and measured ceilings",
    ),
)

STYLE = """
  text { font: 13px ui-sans-serif, system-ui, "Segoe UI", Helvetica, sans-serif; fill: #1f2328 }
  .code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
  .title { font-size: 15px; font-weight: 600 }
  .soft { fill: #59636e }
  .box { fill: #f6f8fa; stroke: #d1d9e0 }
  .triton { stroke: #0969da } .pallas { stroke: #bc4c00 }
  text.triton { fill: #0969da; stroke: none } text.pallas { fill: #bc4c00; stroke: none }
  .line { stroke: #818b98; fill: none; stroke-width: 1.5 }
  .head { fill: #818b98 }
  .band { fill: #818b98; opacity: .12 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .soft { fill: #9198a1 } .box { fill: #151b23; stroke: #3d444d }
    .triton { stroke: #4493f8 } .pallas { stroke: #f0883e }
    text.triton { fill: #4493f8 } text.pallas { fill: #f0883e }
  }
"""


def call(file: Path, name: str) -> str:
    """The first call of `name` in the file as one line of code; ValueError if there is none."""
    calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    calls = [n for n in calls if ast.unparse(n.func) == name]
    if not calls:
        raise ValueError(f"{file.name} calls no {name}")
    return ast.unparse(min(calls, key=lambda n: (n.lineno, n.col_offset)))


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, style: str = "") -> str:
    where = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {where} rx="8" stroke-width="1.5" class="box {style}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (y + to_y) / 2
    path = f"M{x} {y} C{x} {middle} {to_x} {middle} {to_x} {to_y - 7}"
    head = f"M{to_x - 5} {to_y - 8} h10 l-5 8 z"
    return f'<path class="line" d="{path}"/><path class="head" d="{head}"/>'


def shortened(code: str, width: int = 51) -> str:
    return code if len(code) <= width else code[: code.rindex(",", 0, width - 3) + 1] + " …)"


def draw() -> str:
    """The whole picture as SVG."""
    triton, pallas = (ROOT / f"{p}_kernels" / f"{STEM}.py" for p in ("triton", "pallas"))
    out = [
        box(240, 12, 480, 66),
        text(480, 38, f"parity/problems/{STEM}.py", "title code", "middle"),
        text(480, 61, "what it must compute: formula, oracle, workloads, costs", "soft", "middle"),
        arrow(360, 78, 236, 112),
        arrow(600, 78, 724, 112),
        box(12, 112, 456, 208, "triton"),
        box(492, 112, 456, 208, "pallas"),
        text(28, 138, f"triton_kernels/{STEM}.py", "title code triton"),
        text(452, 138, "Triton, PyTorch", "soft", "end"),
        text(508, 138, f"pallas_kernels/{STEM}.py", "title code pallas"),
        text(932, 138, "Pallas Mosaic GPU, JAX", "soft", "end"),
    ]
    for row, (number, stage, ours, theirs) in enumerate(STAGES):
        y = 152 + 41 * row
        out += [
            f'<rect x="13" y="{y}" width="934" height="37" class="band"/>',
            text(28, y + 15, f"{number}. {stage}", "soft"),
            text(508, y + 15, f"{number}. {stage}", "soft"),
            text(28, y + 31, shortened(call(triton, ours)), "code"),
            text(508, y + 31, shortened(call(pallas, theirs)), "code"),
        ]
    for gate, (title, words) in enumerate(GATES):
        x = 12 + 318 * gate
        out += [
            arrow(480, 320, x + 150, 362),
            box(x, 362, 300, 112),
            text(x + 16, 387, title, "title"),
            *(
                text(x + 16, 408 + 18 * i, line, "soft")
                for i, line in enumerate(textwrap.wrap(words, 36))
            ),
        ]
    label = "One problem, two twins with the same four stages, and the three gates both pass"
    body = "\n".join(out)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 486" role="img" '
        f'aria-label="{label}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def main() -> None:
    PICTURE.write_text(draw(), encoding="utf-8")
