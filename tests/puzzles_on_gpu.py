"""Run by test_puzzles_speed.py on a GPU, in a process without the interpreters: every puzzle's
solutions compiled, and cheats in q08's race that only speed invites.

Prints {"solutions": {"q01 triton": "pass" or what is wrong}, "cheats": {name: [what the race says,
how many times faster than the baseline]}}.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parity import frameworks
from puzzles import child, gpu_side, speed
from puzzles.grade import grade
from puzzles.process import Child
from puzzles.puzzle import HOME, Puzzle, load, track

AT_ONCE = 8
SEED = "1"
RETURN, CALL = "    return q, scale", "_token_kernel[(M,)]"


def verdict(puzzle: Puzzle, backend: str) -> str:
    with Child(backend, puzzle.limits, gpu=True) as process:
        solution = puzzle.solution(backend)
        found = grade(puzzle, backend, solution, seed=SEED, explain=False, child=process)
    return found.verdict if found.ok else f"{found.verdict}, {found.detail}, seed {SEED}"


def cheats(honest: str) -> dict[str, str]:
    """q08's Triton solution, made to look fast.

    A side stream is no cheat: the ruler follows kernels on whichever stream they run, so the answer
    is right, and as fast as it is.
    """

    def edited(body: str, end: str = RETURN) -> str:
        text = honest.replace(
            "def solve(x):\n", f"import torch\nkept = {{}}\n\n\ndef solve(x):\n{body}"
        )
        return text.replace(RETURN, end)

    return {
        "honest": honest,
        "by_pointer": edited(
            "    if x.data_ptr() in kept:\n        return kept[x.data_ptr()]\n",
            f"    kept[x.data_ptr()] = q, scale\n{RETURN}",
        ),
        "by_shape": edited(
            "    if x.shape in kept:\n        return kept[x.shape]\n",
            f"    kept[x.shape] = q, scale\n{RETURN}",
        ),
        "one_output": edited(
            "",
            "    first = kept.setdefault(0, (q, scale))\n"
            "    first[0].copy_(q)\n    first[1].copy_(scale)\n    return first",
        ),
        "zeroes_its_input": edited(
            "    x.zero_()\n"
            "    codes = torch.zeros(x.shape, dtype=torch.int8, device=x.device)\n"
            "    return codes, torch.ones(x.shape[0], device=x.device)\n"
        ),
        "half_the_rows": honest.replace(CALL, "_token_kernel[(M // 2,)]"),
        "side_stream": edited(
            "    lane = kept.setdefault(0, torch.cuda.Stream())\n"
            "    lane.wait_stream(torch.cuda.current_stream())\n"
            "    torch.cuda.set_stream(lane)\n",
            f"    torch.cuda.set_stream(torch.cuda.default_stream())\n{RETURN}",
        ),
    }


def solutions() -> dict[str, str]:
    pairs = [(puzzle, backend) for puzzle in track() for backend in puzzle.backends]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = list(pool.map(lambda pair: verdict(*pair), pairs))
    return {f"{p.id} {b}": v for (p, b), v in zip(pairs, verdicts, strict=True)}


def raced() -> dict[str, tuple[str, float]]:
    """What the race says of each cheat, and how many times faster than the baseline it was."""
    frameworks.gpu()
    puzzle, side = load(HOME / "q08"), child._side("triton", True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in cheats(puzzle.solution("triton")).items():
            file = Path(folder) / f"{name}.py"
            file.write_text(text)
            # one at a time: who spoils the inputs must not spoil another's
            try:
                solve = (side, child._load(side, file))
                told = speed.Raced(**gpu_side.race(puzzle, {name: solve}, 3, 6)).speed(name, (1.0,))
                found[name] = told.state, told.ratio
            except Exception as e:
                found[name] = type(e).__name__, 0.0
    return found


def main() -> None:
    print(json.dumps({"solutions": solutions(), "cheats": raced()}))


if __name__ == "__main__":
    main()
