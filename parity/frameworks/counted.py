"""One call of one twin for Nsight Compute to count, in a process of its own:
`from parity.frameworks.counted import main; main(target, stem, workload, which, twin)`.

Everything is compiled and warm before counting is switched on, and nothing else is counted.
"""

import torch

from parity import frameworks
from parity.frameworks import torch as memory
from parity.frameworks import tracer
from parity.problems import problem


def main(target: str, stem: str, workload: str, which: str, twin: str) -> None:
    frameworks.gpu()
    described = problem(stem)
    work = described.workload(workload)
    arrays = memory.draw(described.inputs(work) | described.cotangents(work), 0)
    language = frameworks.twin(twin)
    kernel = language.load(target)
    fn, args, options = frameworks.prepared(language, kernel, described, work, which, arrays)
    call = language.thunk(fn, args, options)
    for _ in range(2):
        tracer.wait_for(call())
    torch.cuda.profiler.start()
    tracer.wait_for(call())
    torch.cuda.profiler.stop()
