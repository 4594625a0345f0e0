"""Mosaic GPU's own compiler, from a lowered module to machine code, on a machine without a GPU.

jax's CUDA plugin exports the function that turns a serialised Mosaic module into machine code. It
asks the driver library which GPU there is; a stand-in library that knows only 'one sm_90 device'
answers, the compiler runs MLIR -> PTX -> ptxas -> nvdisasm, and its last step, loading the code,
fails harmlessly. Runs in a process of its own without jax, so that a crash costs one kernel.

Not public, checked on jax-cuda13-plugin 0.11.2: MosaicGpuCompile and the MOSAIC_GPU_* variables.
"""

import base64
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parity.frameworks.compile_worker import (
    Row,
    keep_listing,
    ptxas_numbers,
    sass_numbers,
    verdict,
)

# 75 is CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; the minor version is 0
_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int name, int device) { *value = 9 * (name == 75); return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
"""
_PLUGIN = "jax_plugins/xla_cuda13/xla_cuda_plugin.so"


class Assembler:
    """A child process that compiles modules one by one; one that kills it costs only itself."""

    def __init__(self, environment: Path, cache: Path):
        """`environment`: site-packages with the plugin. RuntimeError without a C compiler."""
        self._job = {
            "site": str(environment),
            "driver": str(_driver(cache)),
            "listings": str(cache),
        }
        self._known: dict[str, Row] = {}
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, module: bytes) -> Row:
        """Numbers and verdict of the machine code of one serialised Mosaic module."""
        key = hashlib.sha256(module).hexdigest()
        if key not in self._known:
            self._known[key] = self._ask(module)
        return dict(self._known[key])

    def _ask(self, module: bytes) -> Row:
        if self._child is None:
            code = "from parity.frameworks.compile_sass import main; main()"
            self._child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._write(json.dumps(self._job))
        self._write(base64.b64encode(module).decode())
        assert self._child.stdout is not None
        answer = self._child.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self.close()
        return {"status": "fail", "message": f"Mosaic GPU's compiler died (exit status {code})"}

    def _write(self, line: str) -> None:
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says so
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()

    def close(self) -> int:
        """Ends the child, if there is one, and tells its exit status."""
        child, self._child = self._child, None
        if child is None:
            return 0
        with contextlib.suppress(BrokenPipeError):
            child.communicate()
        return child.returncode


def _driver(cache: Path) -> Path:
    """The stand-in driver library, built once per cache folder."""
    library = cache / f"driver-{hashlib.sha256(_DRIVER.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    compiler = next((c for c in map(shutil.which, ("cc", "gcc", "clang")) if c), None)
    if compiler is None:
        raise RuntimeError("ptxas needs a C compiler (cc, gcc or clang) for its stand-in driver")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as building:
        source, built = Path(building, "driver.c"), Path(building, "driver.so")
        source.write_text(_DRIVER)
        flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        command = [compiler, *flags, "-o", str(built), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} cannot build the stand-in driver: {done.stderr[-200:]}")
        os.replace(built, library)
    return library


# The child's side.


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    job = json.loads(sys.stdin.readline())
    site = Path(job["site"])
    with tempfile.TemporaryDirectory() as root:
        _toolkit(site, Path(root, "bin"))
        os.environ.update(
            MOSAIC_GPU_CUDA_ROOT=root,
            MOSAIC_GPU_DUMP_PTX="1",
            MOSAIC_GPU_DUMP_PTXAS="1",
            MOSAIC_GPU_DUMP_SASS="1",
        )
        # loaded first and by its name, the stand-in is the libcuda.so.1 that the plugin finds
        ctypes.CDLL(job["driver"], ctypes.RTLD_GLOBAL)
        compile_module = ctypes.CDLL(str(site / _PLUGIN)).MosaicGpuCompile
        compile_module.argtypes, compile_module.restype = (
            [ctypes.c_char_p, ctypes.c_int],
            ctypes.c_void_p,
        )
        for line in sys.stdin:
            module = base64.b64decode(line)
            printed = _printed_by(compile_module, module, len(module))
            answers.write(json.dumps(_numbers(printed, Path(job["listings"]))) + "\n")
            answers.flush()


def _toolkit(site: Path, folder: Path) -> None:
    """A CUDA toolkit as far as Mosaic looks: the plugin's ptxas and triton's nvdisasm."""
    folder.mkdir()
    tools = [next(site.glob("nvidia/cu*/bin/ptxas")), *site.glob("nvidia/cu*/bin/nvdisasm")]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        tools.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    for tool in tools:
        if tool.is_file() and not (folder / tool.name).exists():
            (folder / tool.name).symlink_to(tool)


def _printed_by(function: Any, *args: Any) -> str:
    """What a C function writes to this process's standard output and error."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            function(*args)
        finally:
            ctypes.CDLL(None).fflush(None)
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
        file.seek(0)
        return file.read().decode(errors="replace")


def _numbers(printed: str, listings: Path) -> Row:
    numbers = ptxas_numbers(printed)
    if numbers is None:
        lines = [line for line in printed.splitlines() if "error" in line or "fatal" in line]
        message = (lines or ["no machine code, and no word why"])[0].strip()
        return {"status": "fail", "message": message[:300]}
    ptx, _, sass = printed.partition("ptxas info")
    # without a disassembler the counts of the lowered module stand
    counts = sass_numbers(sass) if ".text." in sass else {}
    return verdict(numbers | counts | {"listing": keep_listing(listings, ptx, sass)})
