"""What the compiler of a Mosaic kernel says while it compiles for the GPU of this process.

Only where the compile gate has no ptxas of its own: there its verdict ends at lowering, and spills
show when the kernel is first called. Not public, checked on jax 0.11.2: MOSAIC_GPU_DUMP_PTXAS.
"""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from parity.frameworks.compile_worker import Row, ptxas_numbers, verdict


@contextlib.contextmanager
def overheard() -> Iterator[list[Row]]:
    """Yields a list, and fills it with a row for each kernel that was compiled inside.

    A row has status and message as the compile gate has them. A kernel that was compiled before
    says nothing. The standard streams of the process are taken meanwhile.
    """
    rows: list[Row] = []
    before = os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield rows
        finally:
            ctypes.CDLL(None).fflush(None)
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
            else:
                os.environ["MOSAIC_GPU_DUMP_PTXAS"] = before
            file.seek(0)
            rows += read(file.read().decode(errors="replace"))


def read(printed: str) -> list[Row]:
    """The kernels in ptxas' words: each ends with the registers it uses."""
    parts = re.findall(r".*?Used \d+ registers[^\n]*", printed, re.DOTALL)
    return [verdict(numbers) for part in parts if (numbers := ptxas_numbers(part))]
