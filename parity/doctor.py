"""What this machine can run, and why not the rest. No framework is imported into this process.

`machine()` asks the CUDA driver itself, through its C library: it takes milliseconds and says the
same with and without torch. `examine()` adds versions, what shadows what, and child processes that
try things out.
"""

import ctypes
import ctypes.util
import functools
import importlib.machinery
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes

    @property
    def hopper(self) -> bool:
        return self.capability == (9, 0)

    def sentence(self) -> str:
        major, minor = self.capability
        what = f"{self.name} (compute capability {major}.{minor}, {self.memory / 2**30:.0f} GiB)"
        if self.hopper:
            return f"{what}: Hopper, both twins run compiled and can be timed"
        if major >= 10:
            return (
                f"{what}: Blackwell or newer, the Triton twins run compiled; the Pallas twins are "
                "written for Hopper's wgmma, refuse this GPU by name and run in the interpreter"
            )
        if major == 8:
            return (
                f"{what}: Ampere or Ada, the Triton twins run compiled (pointer path, no TMA); the "
                "Pallas twins need Hopper and run in the interpreter"
            )
        return f"{what}: older than Ampere, both twins run in the interpreters only"


@dataclass(frozen=True)
class Machine:
    """The GPUs of this machine as the driver lists them; `problem` says why there is none."""

    gpus: tuple[Gpu, ...]
    driver: str
    problem: str = ""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that is used: the first visible one."""
        return self.gpus[0] if self.gpus else None

    @property
    def hopper(self) -> bool:
        return self.gpu is not None and self.gpu.hopper

    def compiled(self) -> tuple[str, ...]:
        """The twins that run compiled on this machine."""
        if self.gpu is None or self.gpu.capability < (8, 0):
            return ()
        return ("triton", "pallas") if self.hopper else ("triton",)

    def sentence(self) -> str:
        if self.gpu is None:
            return (
                "No CUDA GPU: both twins run in their interpreters, the compile gate runs, "
                "and nothing can be timed."
            )
        return self.gpu.sentence() + "."

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"compiled": self.compiled(), "sentence": self.sentence()}


@functools.cache
def machine() -> Machine:
    """Asks libcuda. A missing library, driver or GPU is an answer, not an error."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return Machine((), "", f"no NVIDIA driver ({name} is not on this machine)")
    count, version = ctypes.c_int(), ctypes.c_int()
    if status := cuda.cuInit(0):
        return Machine((), "", f"the NVIDIA driver answers cuInit with error {status}")
    cuda.cuDriverGetVersion(ctypes.byref(version))
    driver = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        device, memory = ctypes.c_int(), ctypes.c_size_t()
        text, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(text, len(text), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        gpus.append(Gpu(text.value.decode(), (major.value, minor.value), memory.value))
    return Machine(tuple(gpus), driver, "" if gpus else "the driver lists no GPU")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what is so, and what to do about it."""

    name: str
    colour: str
    says: str
    do: str = ""
    details: tuple[str, ...] = ()  # only in JSON

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(progress: Callable[[str, int | None], None] | None = None) -> list[Finding]:
    """Every finding, in the order in which a reader needs them. Takes about ten seconds."""
    tell = progress or (lambda phrase, done=None: None)
    findings = [*_python(), *_versions(), *_gpu(), *_shadows()]
    steps = (
        ("importing the frameworks", _imports),
        ("probing Triton's interpreter", lambda: _probes("triton")),
        ("probing Mosaic GPU's interpreter", lambda: _probes("mosaic")),
        ("opening a profiler session", _profiler),
        ("looking for the compile gate's tools", _tools),
    )
    for done, (phrase, step) in enumerate(steps):
        tell(phrase, None)
        findings += step()
        tell(phrase, done + 1)
    return findings


STEPS = 5


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    says = f"{version} at {sys.executable}, {platform.system()} {platform.machine()}"
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 12):
        do = "use Python 3.12 or newer: jax with Mosaic GPU's interpreter needs it"
        yield Finding("python", RED, says, do)
    else:
        yield Finding("python", GREEN, says)


# distribution, lowest version that works, first one that does not, what it is for
_NEEDS = (
    ("numpy", (2, 1), None, "everything"),
    ("ml_dtypes", (0, 5), None, "everything"),
    ("torch", (2, 11), None, "the Triton twins, and every check"),
    ("triton", (3, 6), None, "the Triton twins"),
    ("jax", (0, 11, 2), (0, 12), "the Pallas twins"),
    ("jaxlib", (0, 11, 2), (0, 12), "the Pallas twins"),
    ("absl-py", None, None, "the Pallas twins: Mosaic GPU imports it"),
    ("matplotlib", (3, 9), None, "the report"),
)


def installed(distribution: str) -> tuple[str, tuple[int, ...]] | None:
    """('2.11.0+cu130', (2, 11, 0)), or None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        text = version(distribution)
    except PackageNotFoundError:
        return None
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return text, tuple(numbers)


def _versions() -> Iterator[Finding]:
    for name, least, below, purpose in _NEEDS:
        found = installed(name)
        if found is None:
            if name == "triton" and sys.platform != "linux":
                do = "nothing to do: Triton exists for Linux (and WSL) only"
                yield Finding(name, YELLOW, f"not installed: {purpose} cannot run here", do)
            else:
                do = "`make parity` installs it"
                yield Finding(name, RED, f"not installed; needed for {purpose}", do)
            continue
        text, numbers = found
        wanted = (f">= {_dotted(least)}" if least else "") + (
            f", < {_dotted(below)}" if below else ""
        )
        if (least and numbers < least) or (below and numbers >= below):
            do = f"install {name} {wanted} (constraints/verified.txt has the measured stack)"
            yield Finding(name, RED, f"{text} is outside {wanted}; {purpose} may not run", do)
        else:
            yield Finding(name, GREEN, text)
    numpy, triton = installed("numpy"), installed("triton")
    if numpy and triton and numpy[1] >= (2, 4) and triton[1] < (3, 7):
        yield Finding(
            "numpy + triton",
            RED,
            f"numpy {numpy[0]} breaks the interpreter of triton {triton[0]} (arrays of size 1 no "
            "longer turn into numbers): Triton's twins fail on a CPU",
            "install numpy < 2.4, or triton >= 3.7",
        )
    if machine().gpus and not (installed("jax-cuda13-plugin") or installed("jax-cuda12-plugin")):
        yield Finding(
            "jax cuda plugin",
            RED,
            "there is a GPU but jax has no CUDA plugin: the Pallas twins cannot use it",
            "install `jax[cuda13]` of the same version as jax (`make parity` does)",
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _gpu() -> Iterator[Finding]:
    here = machine()
    if here.gpu is None:
        do = "nothing, unless you want speed: timing needs a Hopper GPU"
        yield Finding("gpu", YELLOW, f"{here.problem}. {here.sentence()}", do)
        return
    colour = GREEN if here.hopper else YELLOW
    do = "" if here.hopper else "`parity check --device cpu` runs both twins interpreted"
    yield Finding("gpu", colour, here.sentence(), do)
    more = f"; {len(here.gpus) - 1} more visible, not used" if len(here.gpus) > 1 else ""
    release, busy = _nvidia_smi()
    yield Finding("driver", GREEN, f"{release or 'release unknown'}, up to {here.driver}{more}")
    if busy:
        do = "wait until they are gone before `parity bench`"
        yield Finding("gpu load", YELLOW, f"other processes compute on this GPU: {busy}", do)


def _nvidia_smi() -> tuple[str, str]:
    """(driver release, other compute processes); empty where nvidia-smi is missing or silent."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", ""

    def ask(query: str) -> str:
        command = [tool, query, "--format=csv,noheader"]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    release = ask("--query-gpu=driver_version").splitlines()
    busy = ask("--query-compute-apps=pid,process_name").splitlines()
    return (release[0] if release else ""), "; ".join(busy)


def _shadows() -> Iterator[Finding]:
    """`triton_kernels` is also a folder of Triton's own repository, and a package on PyPI."""
    for package in ("triton_kernels", "pallas_kernels"):
        found = []
        for entry in sys.path:
            spec = importlib.machinery.PathFinder.find_spec(package, [entry or os.getcwd()])
            if spec is not None and spec.submodule_search_locations:
                place = Path(next(iter(spec.submodule_search_locations))).resolve()
                if place not in found:
                    found.append(place)
        ours = ROOT / package
        foreign = [p for p in found if p != ours]
        spec = importlib.util.find_spec(package)
        first = next(iter((spec and spec.submodule_search_locations) or ()), None)
        if first is None:
            do = "run `parity` from the checkout, or install it with `make parity`"
            yield Finding(package, RED, f"not importable; expected at {ours}", do)
        elif Path(first).resolve() != ours:
            yield Finding(
                package,
                RED,
                f"a foreign package shadows ours: {first} is imported instead of {ours}",
                f"uninstall it (`pip uninstall {package}`) or use the checkout's own .venv",
            )
        elif foreign:
            yield Finding(
                package,
                YELLOW,
                f"ours is imported, and a foreign one waits behind it: {foreign[0]}",
                "nothing now; a different sys.path would pick the other one",
            )
        else:
            yield Finding(package, GREEN, f"{ours}")


def _child(code: str, *arguments: str, timeout: float = 180) -> tuple[Any, str]:
    """(what the code left in `answer`, why there is none)."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    after = "\nimport json; sys.stderr.flush(); print('\\n@answer ' + json.dumps(answer))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", prelude + code + after, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer after {timeout:g} s"
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("@answer "):
            return json.loads(line.removeprefix("@answer ")), ""
    words = [line for line in done.stderr.splitlines() if line.strip()]
    return None, (words[-1].strip() if words else f"exit code {done.returncode}")[:300]


_IMPORTS = """
import importlib, os
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
answer = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        answer[name] = ""
    except BaseException as e:
        words = str(e).strip().splitlines() or [""]
        answer[name] = f"{type(e).__name__}: {words[0]}"
"""


def _imports() -> Iterator[Finding]:
    names = {
        "torch": "torch",
        "triton": "triton",
        "jax": "jax",
        "jax.experimental.pallas.mosaic_gpu": "jax",
        "parity.frameworks.torch": "torch",
        "parity.frameworks.jax": "jax",
    }
    names = {module: need for module, need in names.items() if installed(need)}
    answer, why = _child(_IMPORTS, *names)
    if answer is None:
        do = "import torch and jax by hand to see the whole message"
        yield Finding("imports", RED, f"importing the frameworks ended the process: {why}", do)
        return
    broken = {name: said for name, said in answer.items() if said}
    for name, said in broken.items():
        yield Finding(f"import {name}", RED, said, "reinstall the package with `make parity`")
    if not broken:
        yield Finding("imports", GREEN, "torch, triton, jax and Mosaic GPU import")


_PROBES = """
from parity import frameworks
frameworks.interpreters()
import importlib
module = importlib.import_module("parity.frameworks." + sys.argv[1] + "_interpreter")
answer = []
for probe in module.probes():
    found = probe._asdict()
    wrong = found["wrong"] if "wrong" in found else not found["ok"]
    answer.append([found["name"], bool(wrong), found["detail"]])
"""


def _probes(which: str) -> Iterator[Finding]:
    """What the stock interpreter gets wrong or lacks; what we know of, we refuse or fill."""
    name = f"{which} interpreter"
    if not all(
        installed(d) for d in (("torch", "triton") if which == "triton" else ("jax", "torch"))
    ):
        yield Finding(name, YELLOW, "not probed: its framework is not installed")
        return
    answer, why = _child(_PROBES, which)
    if answer is None:
        do = "`parity check --device cpu` cannot work until this does"
        yield Finding(name, RED, f"does not run: {why}", do)
        return
    wrong = [probe for probe, lies, _ in answer if lies]
    right = [probe for probe, lies, _ in answer if not lies]
    says = "runs"
    if wrong:
        says += f"; as it comes, still wrong or missing: {', '.join(wrong)}"
    if right:
        says += f"; right: {', '.join(right)}"
    do = "docs/silent-lies.md says what the harness does about each" if wrong else ""
    details = tuple(f"{probe}: {detail}" for probe, _, detail in answer)
    yield Finding(name, GREEN, says, do, details)


_PROFILER = """
from parity import frameworks
frameworks.gpu()
import torch
from torch.profiler import ProfilerActivity, profile
x = torch.ones(1024, device="cuda")
torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CUDA]) as session:
    x.add_(1)
    torch.cuda.synchronize()
answer = sum(event.device_type.name == "CUDA" for event in session.events())
"""

# who asks the driver to load a profiler into every process
_INJECTIONS = (
    "CUDA_INJECTION64_PATH",
    "NVTX_INJECTION64_PATH",
    "NSYS_PROFILING_SESSION_ID",
    "NV_NSIGHT_INJECTION_TRANSPORT_TYPE",
    "KINETO_USE_DAEMON",
)


def _profiler() -> Iterator[Finding]:
    held = [name for name in _INJECTIONS if os.environ.get(name)]
    if machine().gpu is None:
        yield Finding("profiler", YELLOW, "CUPTI was not tried: there is no GPU to time")
        return
    if not installed("torch"):
        yield Finding("profiler", RED, "CUPTI was not tried: torch is missing", "`make parity`")
        return
    answer, why = _child(_PROFILER)
    if answer:
        says = f"a session opens and sees kernels ({answer} device events)"
        if held:
            do = f"unset {', '.join(held)}: CUPTI takes one subscriber per process"
            yield Finding("profiler", YELLOW, f"{says}, though {held[0]} is set", do)
        else:
            yield Finding("profiler", GREEN, says)
        return
    holder = (
        f"{', '.join(held)} in the environment" if held else "another profiler in this process tree"
    )
    says = f"no kernel was seen: {why or 'the session stayed empty'}; CUPTI is held by {holder}"
    do = "run outside nsys, ncu and other profilers: CUPTI takes one subscriber per process"
    yield Finding("profiler", RED, says, do)


def _tools() -> Iterator[Finding]:
    try:
        from parity.compile import find_sass
    except ImportError:
        return
    place = find_sass()
    if place:
        yield Finding("ptxas for Pallas", GREEN, f"in {place}")
    else:
        says = "the Pallas half of the compile gate lowers, but stops before ptxas"
        yield Finding("ptxas for Pallas", YELLOW, says, "`make sass` builds the environment for it")


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def worst(findings: Sequence[Finding]) -> str:
    colours = {f.colour for f in findings}
    return next((c for c in (RED, YELLOW) if c in colours), GREEN)
