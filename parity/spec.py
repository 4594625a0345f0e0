"""A problem, declared once: what a kernel must compute, on which sizes, at what least cost.

Nothing here knows a framework. `Problem` and `Workload` are frozen data, the oracle is a few lines
in the Python array API standard, and `Arithmetic` says in which precision those lines run: the same
lines give the float64 truth and the float32 `model` that sets the yardstick (the idea of judging an
error by the error of the same mathematics at the kernel's own precision is FlashAttention's test
suite's).
"""

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np

PASSES = ("fwd", "bwd", "dw", "plan", "blocks", "cols", "int8", "e4m3", "prepack", "atomic")
# a problem has the first, most the second, others as `further` says

NUMPY_DTYPES: Mapping[str, np.dtype] = types.MappingProxyType(
    {
        name: np.dtype(getattr(ml_dtypes, name, name))
        for name in (
            "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 "
            "int64 int32 int16 int8 uint8 bool"
        ).split()
    }
)


def dtype_named(xp: Any, name: str) -> Any:
    """The dtype called `name` in the array namespace `xp` (NumPy's small floats are ml_dtypes')."""
    return NUMPY_DTYPES[name] if array_api_compat.is_numpy_namespace(xp) else getattr(xp, name)


def dtype_name(dtype: Any) -> str:
    """'bfloat16' for ml_dtypes' scalar type, NumPy's dtype and torch's alike."""
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


# Inputs are described, not made: `ci` sizes are drawn by NumPy, `model` sizes on the device.


@dataclass(frozen=True)
class Normal:
    """Independent normal values with the given standard deviation.

    Runs [a, b) of `dead` along `axis` are dead memory: NaN.
    """

    shape: tuple[int, ...]
    dtype: str
    std: float = 1.0
    dead: tuple[tuple[int, int], ...] = ()
    axis: int = 0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = (rng.standard_normal(self.shape, np.float32) * self.std).astype(_np(self.dtype))
        return with_dead(x, self)


@dataclass(frozen=True)
class Uniform:
    """Independent values, all alike between low and high: decays, say."""

    shape: tuple[int, ...]
    dtype: str
    low: float = 0.0
    high: float = 1.0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = rng.random(self.shape, np.float32)
        return (x * (self.high - self.low) + self.low).astype(_np(self.dtype))


@dataclass(frozen=True)
class Integers:
    """Whole numbers in [low, high]: sums of their products are exact in float32.

    Runs [a, b) of `dead` along `axis` are dead memory: NaN, or -1 in an array of integers.
    """

    shape: tuple[int, ...]
    dtype: str
    low: int = -3
    high: int = 3
    dead: tuple[tuple[int, int], ...] = ()
    axis: int = 0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        x = rng.integers(self.low, self.high, self.shape, endpoint=True).astype(_np(self.dtype))
        return with_dead(x, self)


@dataclass(frozen=True)
class Keep:
    """A bool mask, True with probability `p`; rows listed in `dead_rows` keep nothing."""

    shape: tuple[int, ...]
    p: float = 0.7
    dead_rows: tuple[int, ...] = ()
    dtype: str = "bool"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        keep = rng.random(self.shape) < self.p
        keep[list(self.dead_rows)] = False
        return keep


@dataclass(frozen=True)
class Routing:
    """Group sizes [E] that sum to `rows`: how many rows a router sends to each of E experts.

    uniform: every row picks an expert, all alike (multinomial). zipf: the expert of rank r is
    picked as 1 / r. onehot: one expert gets all. half: every other expert, by rank, gets none.
    ragged: no chance at all; the first gets about half, one gets none and one a single row. Which
    expert has which rank is drawn too.
    """

    shape: tuple[int, ...]
    rows: int
    kind: str = "uniform"
    dtype: str = "int32"

    def shares(self) -> np.ndarray:
        """The probability of each rank."""
        rank = np.arange(1, self.shape[0] + 1)
        weight = {
            "uniform": np.ones(len(rank)),
            "zipf": 1 / rank,
            "onehot": rank == 1,
            "half": rank % 2,
        }[self.kind]
        return weight / max(1, weight.sum())

    @property
    def expected(self) -> np.ndarray:
        """The rows of each rank, on average."""
        return self._ragged() if self.kind == "ragged" else self.rows * self.shares()

    @property
    def active(self) -> float:
        """How many experts have rows, on average."""
        if self.kind == "ragged":
            return float(np.count_nonzero(self._ragged()))
        return float((1 - (1 - self.shares()) ** self.rows).sum())

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        if self.shape[0] == 0:
            return np.zeros(0, _np(self.dtype))
        if self.kind == "ragged":
            return self._ragged().astype(_np(self.dtype))
        return rng.multinomial(self.rows, rng.permutation(self.shares())).astype(_np(self.dtype))

    def _ragged(self) -> np.ndarray:
        sizes = np.zeros(self.shape[0], np.int64)
        left = self.rows
        for e in range(self.shape[0]):
            half = -(-left // 2)
            sizes[e] = {1: 0, 2: min(1, left)}.get(e, half) if e < self.shape[0] - 1 else left
            left -= sizes[e]
        return sizes


@dataclass(frozen=True)
class Given:
    """These very values: what `make` returns, with no chance in it."""

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return np.array(self.make(), _np(self.dtype))


Descriptor = Normal | Uniform | Integers | Keep | Routing | Given


@dataclass(frozen=True)
class Array:
    """Shape and dtype of an output or a gradient; exact: one answer is right, every bit of it, as
    with whole numbers of any dtype; of: gradients of gates, in float32, out of products of this
    dtype; few: sums of a few terms that have been rounded to the dtype themselves."""

    shape: tuple[int, ...]
    dtype: str
    exact: bool = False
    of: str = ""
    few: bool = False


@dataclass(frozen=True)
class Cost:
    """The least work the mathematics needs for these inputs: nothing can beat the roof it sets."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a pass: what `Problem.plan` is asked about."""

    twin: str
    kernel: str
    number: int  # from 0, in the order of the pass
    blocks: int  # programs, thread blocks
    config: Mapping[str, Any]  # fields of its Config


@dataclass(frozen=True)
class Plan:
    """What a Config makes of a launch, as far as arithmetic tells; bytes are beyond the least."""

    tiles: int  # pieces of work that its blocks share
    again: float = 0  # bytes that a block reads twice, if its code walks over them twice
    window: float = 0  # bytes a block reads until it comes back to the first: a cache may hold them
    shared: float = 0  # bytes of operands that many blocks ask for: mostly from L2
    extra: float = 0  # bytes of intermediate results: written, and read by a later kernel


@dataclass(frozen=True)
class Workload:
    """One named set of sizes: `ci` ones run in the interpreters, `model` ones are real layers.

    `options` are the static keyword arguments of the public function; `absent` names optional array
    arguments this workload leaves out.
    """

    name: str
    sizes: Mapping[str, int]
    dtype: str
    tags: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    passes: tuple[str, ...] = ("fwd", "bwd")

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    @property
    def itemsize(self) -> int:
        return NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Arithmetic:
    """The precision in which an oracle's lines run.

    `truth(xp)` computes in float64 and never rounds. `model(xp)` computes in float32 with exactly
    the roundings a kernel is entitled to. `one_precision_lower(xp)` first rounds what it reads, and
    must fail.
    """

    xp: Any
    working: str
    rounds: bool
    reads_as: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def truth(xp: Any) -> "Arithmetic":
        return Arithmetic(xp, "float64", rounds=False)

    @staticmethod
    def model(xp: Any) -> "Arithmetic":
        return Arithmetic(xp, "float32", rounds=True)

    @staticmethod
    def one_precision_lower(xp: Any) -> "Arithmetic":
        lower = {"float32": "bfloat16", "float16": "bfloat16", "bfloat16": "float8_e4m3fn"}
        return Arithmetic(xp, "float32", rounds=True, reads_as=lower)

    def lift(self, x: Any) -> Any:
        """x in the working precision."""
        lower = self.reads_as.get(dtype_name(x.dtype))
        return self._cast(self._cast(x, lower) if lower else x, self.working)

    def stored(self, x: Any, dtype: str) -> Any:
        """x after a trip through memory as `dtype`: a rounding a kernel is entitled to."""
        return self._cast(self._cast(x, dtype), self.working) if self.rounds else x

    def rounded(self, x: Any, dtype: str) -> Any:
        """x rounded to `dtype` where that belongs to the definition: the truth rounds too."""
        return self._cast(self._cast(x, dtype), self.working)

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        device = array_api_compat.device(like)
        return self.xp.empty(shape, dtype=dtype_named(self.xp, self.working), device=device)

    def _cast(self, x: Any, dtype: str) -> Any:
        return self.xp.astype(x, dtype_named(self.xp, dtype))


def row_blocks(x: Any, elements: int = 1 << 28) -> Iterator[slice]:
    """Slices of rows of about `elements` elements: float64 intermediates stay small."""
    rows = max(1, elements // max(1, x.shape[1]))
    for start in range(0, x.shape[0], rows):
        yield slice(start, min(start + rows, x.shape[0]))


@dataclass(frozen=True)
class Further:
    """One more public function of a stem beside X, judged and timed as a pass of its own."""

    function: str  # its name in both twins' files
    reads: tuple[str, ...]  # its arguments, in order: names of inputs, cotangents and bundles
    options: Callable[[Workload], dict[str, Any]]
    outputs: Callable[[Workload], dict[str, Array]]
    oracle: Callable[..., Any]  # (ar, work, **what it reads) -> a tuple
    kernels: bool = True  # of ours; False: operations of the framework do it, once for each model


@dataclass(frozen=True)
class Problem:
    """What a kernel must compute. Every function takes the workload; arrays come by name.

    inputs(work), cotangents(work) -> {name: descriptor}, in the argument order of X / of X_bwd
    outputs(work), grads(work)     -> {name: Array}, in the order X_fwd / X_bwd return them
    oracle(ar, work, **inputs)     -> a tuple of arrays in `ar`'s working precision
    oracle_bwd(ar, work, **inputs, **cotangents) -> likewise, one for each gradient
    cost(work, which)              -> Cost of one pass, an expectation where inputs decide it
    counted(work, which, arrays)   -> Cost for these arrays, in such a case
    reduction(work, name)          -> how many terms the sum behind an output or gradient has
    probe(work)                    -> {name: Integers(...)}; None where there is a transcendental,
                                      in every workload (no probe at all) or in this one
    plan(work, which, launch)      -> the Plan of one launch of our twins, None if it has none
    """

    stem: str
    doc: str
    family: str  # the row of SPECS 0.3 that caps the error: "gemm", "norm", "attention", "scan"
    workloads: tuple[Workload, ...]
    inputs: Callable[[Workload], dict[str, Descriptor]]
    cotangents: Callable[[Workload], dict[str, Descriptor]]
    outputs: Callable[[Workload], dict[str, Array]]
    grads: Callable[[Workload], dict[str, Array]]
    oracle: Callable[..., Any]
    oracle_bwd: Callable[..., Any]
    cost: Callable[[Workload, str], Cost]
    reduction: Callable[[Workload, str], int]
    implementations: Mapping[str, str]  # twin -> "module:public function"
    peers: Mapping[str, str]  # name -> "module:function"
    probe: Callable[[Workload], dict[str, Descriptor] | None] | None = None
    plan: Callable[[Workload, str, Launch], Plan | None] | None = None
    counted: Callable[[Workload, str, Mapping[str, Any]], Cost] | None = None
    bwd_options: tuple[str, ...] = ()  # which of the workload's options X_bwd takes too
    glue: tuple[str, ...] = ()  # framework operations a twin may use around its kernels
    keywords: tuple[str, ...] = ()  # inputs that X takes by keyword
    arguments: tuple[str, ...] = ()  # what X takes by position, absent or not, if not the other
    # inputs in order
    bundles: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    # argument -> (a class of both twins' files, the inputs it is made of; None for an absent one)
    further: Mapping[str, Further] = field(default_factory=dict)  # pass -> the function behind it
    unordered: tuple[str, ...] = ()  # results that are summed in no order, of functions named
    # *_atomic alone: their last bits may differ from run to run
    faults: Mapping[Callable[[Any], Any], tuple[str, ...]] = field(default_factory=dict)
    # as parity.faults.ANSWERS: wrong answers that only this problem can give

    def reads(self, work: Workload, which: str) -> tuple[str, ...]:
        """The arrays that a pass reads, by name."""
        if which in self.further:
            return self.spread(work, self.further[which].reads)
        return (*self.inputs(work), *(self.cotangents(work) if which == "bwd" else ()))

    def spread(self, work: Workload, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """The arrays behind arguments: those of a bundle one by one, absent ones left out."""
        named = (self.bundles[a][1] if a in self.bundles else (a,) for a in arguments)
        return tuple(n for names in named for n in names if n not in work.absent)

    def positional(self, work: Workload) -> tuple[str, ...]:
        """What X takes by position; None stands for an absent one of `arguments`."""
        return self.arguments or tuple(n for n in self.inputs(work) if n not in self.keywords)

    def results(self, work: Workload, which: str) -> dict[str, Array]:
        """What a pass returns."""
        if which in self.further:
            return self.further[which].outputs(work)
        return (self.outputs if which == "fwd" else self.grads)(work)

    def oracle_of(self, which: str) -> Callable[..., Any]:
        if which in self.further:
            return self.further[which].oracle
        return self.oracle if which == "fwd" else self.oracle_bwd

    def cost_of(self, work: Workload, which: str, arrays: Mapping[str, Any]) -> Cost:
        """The cost for these arrays."""
        return self.counted(work, which, arrays) if self.counted else self.cost(work, which)

    def launches(self, which: str) -> bool:
        """Whether a pass is made of our kernels, and not of the framework's operations alone."""
        return which not in self.further or self.further[which].kernels

    def workload(self, name: str) -> Workload:
        return next(w for w in self.workloads if w.name == name)


def with_dead(x: Any, d: Normal | Integers) -> Any:
    """The array with its dead memory filled."""
    for a, b in d.dead:
        x[(slice(None),) * d.axis + (slice(a, b),)] = -1 if "int" in dtype_name(x.dtype) else np.nan
    return x


def _np(name: str) -> np.dtype:
    return NUMPY_DTYPES[name]
