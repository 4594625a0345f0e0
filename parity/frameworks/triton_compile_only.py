"""A driver that compiles for sm_90a and launches nothing.

It answers what triton asks of a CUDA driver as an H200 would, so that a public wrapper runs
unchanged on a machine without a GPU, on meta tensors: same specialization, same machine code.
Instead of loading a kernel it reads resources off ptxas' log and instructions off the disassembly
(the wheel brings nvdisasm). Every private name of triton that the compile gate touches is here,
checked on triton 3.6 and 3.9: runtime.driver, backends.driver.DriverBase, the hook before loading,
the signatures of launchers and of load_binary, where nvdisasm lies.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from parity.frameworks.compile_worker import (
    Row,
    keep_listing,
    ptxas_numbers,
    sass_numbers,
    verdict,
)

NUM_SMS = 132
H200 = {
    "max_shared_mem": 232448,  # bytes a block may ask for
    "max_num_regs": 65536,
    "multiprocessor_count": NUM_SMS,
    "warpSize": 32,
    "sm_clock_rate": 1980000,
    "mem_clock_rate": 3201000,
    "mem_bus_width": 6144,
}


class CompileOnly(DriverBase):
    """Stands in for CUDA's driver and keeps a row of every kernel that is launched."""

    def __init__(self, listings: Path) -> None:
        self.utils = self  # triton asks driver.utils for device properties and for loading
        self.launched: list[Row] = []
        self._seen: set[tuple[Any, ...]] = set()
        self._read: dict[str, Row] = {}  # what was read off each cubin, by its hash
        self.config: Callable[[], dict[str, Any]] = dict  # which Config is running, asked at launch
        self._numbers: Row | None = None
        self._listings = listings
        self._ptx = ""  # of the kernel that is about to be loaded
        self._log = io.StringIO()
        self.unloaded: Row = {}  # a kernel that compiled and was refused before it could be loaded
        self._nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Row]]:
        """The kernels launched inside, in order; the same code on the same grid counts once."""
        self.launched, self.unloaded = [], {}
        self._seen = set()
        self._take_log()
        with contextlib.redirect_stdout(self._log):
            yield self.launched

    def _take_log(self) -> str:
        log = self._log.getvalue()
        self._log.seek(0)
        self._log.truncate()
        return log

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        # triton comes here right after ptxas, and only then finds that shared memory is too small
        self._numbers = ptxas_numbers(self._take_log())
        row = self.unloaded = {
            "kernel": metadata.name,
            "shared_bytes": metadata.shared,
            "threads": metadata.num_warps * 32,
            "tma_descriptors": sum("tensordesc" in str(t) for t in src.signature.values()),
        }

        def launch(grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
            key = (metadata.hash, grid_x, grid_y, grid_z)
            if key not in self._seen:
                self._seen.add(key)
                grid = [grid_x, grid_y, grid_z]
                self.launched.append(row | {"grid": grid, "config": self.config()})

        return launch

    def take_ptx(
        self, module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str
    ) -> None:
        """Triton's hook before a kernel is loaded; metadata_group: the files of its compilation."""
        ptx = [path for path in metadata_group.values() if str(path).endswith(".ptx")]
        self._ptx = Path(ptx[0]).read_text() if ptx else ""

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        key = hashlib.sha256(cubin).hexdigest()
        if self._numbers is not None:
            sass = self._disassemble(cubin)
            listing = {"listing": keep_listing(self._listings, self._ptx, sass)}
            self._read[key] = verdict(self._numbers | sass_numbers(sass) | listing)
        elif key not in self._read:  # a kernel compiled before has no second log
            raise RuntimeError(
                f"{name}: ptxas' log is not where triton {triton.__version__} puts it"
            )
        row, self.unloaded = self.unloaded, {}
        row.update(self._read[key])
        return None, None, row["registers"], row["spills"], 1024

    def _disassemble(self, cubin: bytes) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [str(self._nvdisasm), "-c", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def get_device_properties(self, device: int) -> dict[str, int]:
        return H200

    @classmethod
    def is_active(cls) -> Any:
        return True

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing runs here: a kernel must not tune at call time")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def install(compiled: Path, listings: Path) -> CompileOnly:
    """Makes triton compile for a Hopper that is not there.

    `compiled` is its (empty) cache folder, `listings` that for PTX and machine code to look at.

    Raises RuntimeError when triton was imported for its interpreter.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("triton runs interpreted in this process: nothing would be compiled")
    os.environ["TRITON_CACHE_DIR"] = str(compiled)
    knobs.nvidia.dump_ptxas_log = True
    compile_only = CompileOnly(listings)
    knobs.runtime.kernel_load_start_hook.add(compile_only.take_ptx)
    driver.set_active(compile_only)
    return compile_only
