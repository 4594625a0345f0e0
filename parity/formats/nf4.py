"""NF4 with double quantization, in the bytes that bitsandbytes stores.

    am = max |w| of 64 neighbours            code = nearest of 16 values to w * (1 / am)
    byte j = code[2j] << 4 | code[2j + 1]    the even index in the high nibble

    offset = mean(am)    d = am - offset     the second quantization
    am2 = max |d| of 256 neighbours          q = nearest of 256 values to d * (1 / am2)

    am ~ map[q] * am2 + offset               w ~ NF4[code] * am

All in float32, over the flat tensor. "Nearest" counts the midpoints that lie below a value, so a
tie goes to the lower one. A number costs 4 + 8 / 64 + 32 / (64 * 256) bits.

Sources: the QLoRA paper (2305.14314); the 8-bit map from 1511.04561; constants, layout and order of
operations as in bitsandbytes 0.50.2 (functional.py, backends/default/ops.py, csrc/cpu_ops.cpp,
csrc/kernels.cu). Where its backends disagree with each other:

* the offset is a float32 mean, whose last bits depend on the order of summation: pass bitsandbytes'
  own as `offset` to get its am2; ours is the exact mean, rounded once;
* q: its CPU code looks values up in 65536 bins, which misses the nearest by one now and then, and
  its CUDA code sends ties to the even q;
* a ragged last block: its PyTorch code divides by am, as we do, its CUDA code multiplies by 1 / am;
* an all-zero block: its CUDA code stores code 0 (-1 times 0), its PyTorch code 7 (0), as we do.
"""

from typing import Any, NamedTuple

import numpy as np

from parity.formats import _arguments as arguments
from parity.formats.integers import pack_nibbles, unpack_nibbles

NF4 = np.array(
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022833234 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1".split(),
    np.float32,
)
NF4_THRESHOLDS = (NF4[1:] + NF4[:-1]) / np.float32(2)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those bitsandbytes has
NESTED_BLOCKSIZE = 256
_LEAST = np.float32(1e-38)  # what stands in for the largest magnitude of an all-zero block


def _dynamic_map() -> np.ndarray:
    """float32 [256], sorted: 0 and 1, and for i = 0 .. 6 the middles of 2 ** i equal steps from a
    tenth of 10 ** (i - 6) up to it, with both signs."""
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        count = 1 << i
        # As torch.linspace: a float32 step, counted from the nearer end, rounded once.
        step = float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count)))
        index = np.arange(count + 1)
        up, down = float(np.float32(0.1)) + step * index, 1 - step * (count - index)
        edges = np.where(index < (count + 1) // 2, up, down).astype(np.float32)
        means = (edges[1:] + edges[:-1]) / np.float32(2)
        values += [np.float32(10.0 ** (i - 6)) * means, np.float32(-(10.0 ** (i - 6))) * means]
    return np.sort(np.concatenate(values))


DYNAMIC_MAP = _dynamic_map()


class Nf4State(NamedTuple):
    """What double quantization leaves of the absmax of n values in blocks of 64 (or blocksize)."""

    qabsmax: np.ndarray  # uint8 [ceil(n / 64)], an index into code
    absmax2: np.ndarray  # float32 [ceil(ceil(n / 64) / 256)]
    offset: np.ndarray  # float32 []
    code: np.ndarray  # float32 [256], the map


def nf4_encode(x: np.ndarray) -> np.ndarray:
    """The nearest of sixteen values, x in [-1, 1] -> uint8. Ties go down, NaN to code 0.

    Raises TypeError unless x is float32, float16 or bfloat16.
    """
    return _nearest(arguments.lifted(x), NF4_THRESHOLDS)


def nf4_decode(code: np.ndarray) -> np.ndarray:
    """The values, float32, of codes. TypeError unless whole numbers, ValueError outside 0 .. 15."""
    return np.asarray(NF4[arguments.codes(code, 4)])


def nf4_quantize(
    w: np.ndarray,
    *,
    blocksize: int = 64,
    double: bool = True,
    offset: np.ndarray | np.float32 | None = None,
) -> tuple[np.ndarray, Nf4State | np.ndarray]:
    """w, n values of any shape -> (packed uint8 [ceil(n / 2)], state).

    state: an Nf4State, or without double quantization the absmax, float32 [ceil(n / blocksize)].
    offset: float32 [], in place of the exact mean of the absmax. An odd n is filled with a zero.

    All-zero blocks: absmax 0, codes 7; a smaller absmax than 1e-38 counts as that in the quotient.
    A NaN or an infinity: the block's absmax is NaN and its codes 0, so that it decodes to NaN;
    double quantization, whose offset is a mean over all blocks, spreads that over the whole tensor,
    as it does in bitsandbytes.

    Raises TypeError unless w is float32, float16 or bfloat16; ValueError for a blocksize that
    bitsandbytes does not have, or an offset without double quantization.
    """
    arguments.one_of(blocksize, BLOCKSIZES, "blocksize")
    if offset is not None and not double:
        raise ValueError("offset: expected none without double quantization")
    x = arguments.lifted(w, "w").reshape(-1)
    x = np.where(np.isinf(x), np.float32(np.nan), x)
    code, absmax = _blockwise(x, blocksize, NF4_THRESHOLDS)
    code = np.append(code, nf4_encode(np.zeros(code.size % 2, np.float32)))
    packed = pack_nibbles(code, low_first=False)
    return packed, _double(absmax, offset) if double else absmax


def nf4_absmax(state: Nf4State | np.ndarray) -> np.ndarray:
    """float32 [blocks]: map[q] * am2, rounded, plus offset, rounded (no fused multiply-add).

    Raises TypeError for a state's array of another dtype, ValueError for one of another shape.
    """
    if not isinstance(state, Nf4State):
        return arguments.dtype(state, np.float32, "state")
    arguments.dtype(state.qabsmax, np.uint8, "state.qabsmax")
    arguments.rank(state.qabsmax, 1, "state.qabsmax")
    blocks = state.qabsmax.size
    shapes = {"absmax2": (-(-blocks // NESTED_BLOCKSIZE),), "offset": (), "code": (256,)}
    for name, shape in shapes.items():
        arguments.dtype(getattr(state, name), np.float32, f"state.{name}")
        arguments.shape(getattr(state, name), shape, f"state.{name}")
    scale = np.repeat(state.absmax2, NESTED_BLOCKSIZE)[:blocks]
    with np.errstate(invalid="ignore"):
        return state.code[state.qabsmax] * scale + state.offset


def nf4_dequantize(
    packed: np.ndarray,
    state: Nf4State | np.ndarray,
    n: int,
    dtype: Any = np.float32,
    *,
    blocksize: int = 64,
) -> np.ndarray:
    """The n values, [n] in dtype: NF4[code] * absmax in float32, then rounded to the dtype.

    Raises TypeError unless packed is uint8 and as nf4_absmax does, ValueError for a blocksize that
    bitsandbytes does not have, or a packed or a state that is not that of n values.
    """
    arguments.one_of(blocksize, BLOCKSIZES, "blocksize")
    arguments.shape(packed, (-(-n // 2),), "packed")
    absmax = nf4_absmax(state)
    arguments.shape(absmax, (-(-n // blocksize),), "state")
    code = unpack_nibbles(packed, low_first=False)[:n]
    return (NF4[code] * np.repeat(absmax, blocksize)[:n]).astype(dtype)


def _double(absmax: np.ndarray, offset: np.ndarray | np.float32 | None) -> Nf4State:
    if offset is None:
        offset = np.float32(absmax.mean(dtype=np.float64) if absmax.size else 0)
    offset = np.asarray(offset, np.float32)
    arguments.shape(offset, (), "offset")
    thresholds = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
    code, absmax2 = _blockwise(absmax - offset, NESTED_BLOCKSIZE, thresholds, divide_tail=False)
    # Where all of a block equals the offset, bitsandbytes' CPU and CUDA code store code 0.
    code = np.where(np.repeat(absmax2, NESTED_BLOCKSIZE)[: code.size] == 0, np.uint8(0), code)
    return Nf4State(code, absmax2, offset, DYNAMIC_MAP)


def _blockwise(
    x: np.ndarray, blocksize: int, thresholds: np.ndarray, *, divide_tail: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """x float32 [n] -> (codes uint8 [n], largest magnitudes float32 [ceil(n / blocksize)])."""
    full = x.size - x.size % blocksize
    absmax = np.abs(np.pad(x, (0, -x.size % blocksize))).reshape(-1, blocksize).max(axis=1)
    divisor = np.repeat(np.maximum(absmax, _LEAST), blocksize)[: x.size]
    scaled = x * (np.float32(1) / divisor)
    if divide_tail:
        scaled[full:] = x[full:] / divisor[full:]
    return _nearest(scaled, thresholds), absmax


def _nearest(x: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    code = np.searchsorted(thresholds, x, side="left")
    return np.where(np.isnan(x), 0, code).astype(np.uint8)
