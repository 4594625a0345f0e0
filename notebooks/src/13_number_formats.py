# %% [markdown]
# # 13 Number formats
#
# 1. Know which values int8, int4, NF4, e4m3 and the MX formats can represent, and what each costs.
# 2. Write the five codecs in NumPy, to the last bit.
# 3. Predict how much a format loses, and write a kernel that quantizes in one pass, twice.
#
# **Time:** 60 minutes. **You need:** lessons 01, 02 and 04, and NumPy. No GPU.

# %% setup="yes"
import notebooks._course as course

course.begin("13")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import triton
import triton.language as tl
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from notebooks import _codecs as codecs
from notebooks import _pictures as pictures
from notebooks._tracer import guarded
from parity import formats

# %% [markdown]
# ## 1. The idea
#
# A large model spends much of its time on fetching weights from memory. A weight in 4 bits
# instead of 16 is fetched four times as fast. To *quantize* is to replace each number by the
# nearest of a few allowed values, and to store only which one it was: its *code*.
#
# With 4 bits there are 16 codes, so the 16 values had better lie where the numbers are. So each
# format does two things:
#
# * **A set of values.** Evenly spaced (int8, int4), like a small floating-point number (e4m3,
#   e2m1), or where a normal distribution has its weight (NF4).
# * **A scale.** Some numbers share a factor that stretches the set until the largest of them fits.
#   The fewer share one, the better it fits, and the more scales have to be stored.
#
# ### Predict
#
# MXFP4 has codes of 4 bits, and one scale of 8 bits for every 32 numbers. How many bits is that
# for each number? And e4m3 has 8 bits: of its 256 codes two are NaN, and two are zero, +0 and -0.
# How many different numbers are there?

# %% answer="guess_bits"
course.predict("bits", 4.25)
course.predict("numbers", 253)

# %%
x = np.zeros(3200, np.float32)
codes, scales = formats.mx_quantize(x, "e2m1")
course.reveal("bits", 8 * (codes.nbytes + scales.nbytes) / x.size)
values = formats.E4M3.values
course.reveal("numbers", len(np.unique(values[np.isfinite(values)])))

# %% [markdown]
# ## 2. The picture: where the values lie
#
# At the top, 4096 weights as a histogram: many are small, few are large, as in a real model.
# Below it all values of each format, stretched until the largest one fits the largest weight.

# %%
weights = 0.02 * np.random.default_rng(13).standard_normal(4096).astype(np.float32)
course.show(pictures.number_lines(weights))

# %% [markdown]
# The integers are evenly spaced, and half of int4's values lie where hardly a weight is. NF4's
# crowd in the middle. The floats get denser towards zero: halving a number halves the distance to
# its neighbour, until the smallest exponent is reached. e5m2 gives one bit of e4m3's
# mantissa to the exponent: fewer steps, a wider range.
#
# Now you write each of them. `codecs.check` tries all codes, all values, and all middles between
# two values with their neighbours, and compares with the project's own formats bit for bit.
#
# ## 3. int8: round and clip
#
# `code = round(x / scale)`, kept to -127 .. 127, as `np.int8`. If x / scale is exactly in the
# middle, the even number wins: that is what `np.rint` does.


# %% answer="int8_encode"
def int8_encode(x, scale):
    # BEGIN SOLUTION
    # Divide, round, clip, and make it int8.
    # INSTEAD return x
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    # END SOLUTION


# %%
codecs.check("int8", int8_encode)

# %% [markdown]
# Why ties to even? If every half went up, sums of many rounded numbers would lean upwards. And
# why divide, when a multiplication by `1 / scale` is faster? You may do either, but not one in
# the kernel that writes and the other in the one that checks: they differ at some ties.
#
# ## 4. int4: two codes to a byte
#
# An int4 code is `round(x / scale) + 8`, so that it is never negative. There is no array of 4-bit
# numbers, so two codes from 0 to 15 go into a byte: here the first into the *low nibble*, the
# lower four bits, and the second into the high one. The codes come as uint8 `[..., 2n]`, the
# bytes are uint8 `[..., n]`. Shifts are `<<` and `>>`, the lower four bits are `& 15`, and
# `x[..., 0::2]` is every second element.


# %% answer="int4"
def int4_pack(codes):
    # BEGIN SOLUTION
    # INSTEAD return codes
    return codes[..., 0::2] | codes[..., 1::2] << 4
    # END SOLUTION


def int4_unpack(packed):
    # BEGIN SOLUTION
    # np.stack((a, b), axis=-1).reshape(...) puts a and b alternately.
    # INSTEAD return packed
    pair = np.stack((packed & 15, packed >> 4), axis=-1)
    return pair.reshape(*packed.shape[:-1], -1)
    # END SOLUTION


# %%
codecs.check("int4", int4_pack, int4_unpack)

# %% [markdown]
# ## 5. e4m3: a small float
#
# Eight bits: one for the sign, four for the exponent E, three for the mantissa M.
#
#     S EEEE MMM
#     E > 0:    (1 + M / 8) * 2 ** (E - 7)        the leading 1 is not stored
#     E == 0:   (0 + M / 8) * 2 ** (1 - 7)        subnormal: evenly spaced down to zero
#     E == 15 and M == 7:  NaN                    there is no infinity; the largest is 448
#
# Decode first, uint8 to float32. Then encode with what you have: the 127 values that are not
# negative rise with their codes, 0 to 126, so look up the nearest. `np.searchsorted(middles, x)`
# counts the middles below x; with `side="right"` a middle that equals x counts too, and that is
# how a tie shows. The even code wins. Too large becomes 448. NaN is not asked for.
#
# Mind uint8 on the way: 3 - 7 is 252 there. Turn `exponent` into float32 before you subtract.


# %% answer="e4m3"
def e4m3_decode(code):
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    # BEGIN SOLUTION
    # INSTEAD return code.astype(np.float32)
    power = np.ldexp(np.float32(1), np.maximum(exponent, 1).astype(np.int32) - 7)
    value = ((exponent > 0) + mantissa / np.float32(8)) * power
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return np.where(sign == 1, -value, value).astype(np.float32)
    # END SOLUTION


def e4m3_encode(x):
    values = e4m3_decode(np.arange(127, dtype=np.uint8))
    middles = (values[1:] + values[:-1]) / 2
    lower = np.searchsorted(middles, np.abs(x))
    # BEGIN SOLUTION
    # 1. Where `lower` and its side="right" differ there is a tie: take the even one.
    # 2. Add the sign bit, 128, where np.signbit(x).
    # INSTEAD return lower.astype(np.uint8)
    upper = np.searchsorted(middles, np.abs(x), side="right")
    code = np.where(lower % 2 == 0, lower, upper)
    return (code + 128 * np.signbit(x)).astype(np.uint8)
    # END SOLUTION


# %%
codecs.check("e4m3", e4m3_decode, e4m3_encode)

# %% [markdown]
# ## 6. NF4: uneven steps
#
# NF4 has sixteen values between -1 and 1; x has already been divided by the largest magnitude of
# its block. They are chosen so that a normal distribution uses each about equally often.
# `formats.NF4` is an array of them, rising. The nearest again; here a tie takes the lower code.


# %% answer="nf4"
def nf4_encode(x):
    # BEGIN SOLUTION
    # INSTEAD return np.zeros(x.shape, np.uint8)
    middles = (formats.NF4[1:] + formats.NF4[:-1]) / np.float32(2)
    return np.searchsorted(middles, x).astype(np.uint8)
    # END SOLUTION


# %%
codecs.check("nf4", nf4_encode)

# %% [markdown]
# ## 7. MX: a scale that is a power of two
#
# In the *microscaling* formats 32 neighbours share a scale, and the scale is a power of two, so
# that it changes exponents and never rounds. Let m be the largest magnitude of the block. e4m3's
# largest value, 448, is 1.75 * 2^8, so its exponent is 8, and
#
#     e = floor(log2(m)) - 8        x is divided by 2 ** e, and then encoded as e4m3
#
# Stored is `e + 127`, kept to 0 .. 254, in a byte; a block of zeros has 0. (MXFP8 is this; MXFP4
# has e2m1 in place of e4m3, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6
# and a sign.)
#
# `np.log2` is rounded, and may be off by one right below a power of two. Take `np.frexp(m)`, which
# returns (f, k) with m = f * 2^k and 0.5 <= f < 1.


# %% answer="mx"
def mx_scale(m):
    # BEGIN SOLUTION
    # INSTEAD return np.zeros(m.shape, np.uint8)
    _, k = np.frexp(m)
    code = np.clip(k - 1 - 8 + 127, 0, 254)
    return np.where(m == 0, 0, code).astype(np.uint8)
    # END SOLUTION


# %%
codecs.check("mx", mx_scale)

# %% [markdown]
# ## 8. How much is lost?
#
# *SQNR*, the signal-to-quantization-noise ratio, compares numbers with the error made on them, in
# decibel: ten times the logarithm of the ratio of their squares.
#
#     SQNR = 10 * log10(sum of x^2 / sum of (x - quantized x)^2)
#
# 20 dB means that the error is a tenth of the number, 40 dB a hundredth. Here is int8, one scale
# for 128 neighbours. The distance between two values is `largest / 127`, and the error is at most
# half of that.


# %%
def sqnr(x, quantized):
    return 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((x - quantized) ** 2.0))


def integers(x, levels):
    """x after a trip through -levels .. levels, a scale for every 128."""
    groups = x.reshape(-1, 128)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(levels)
    return (np.rint(groups / scale) * scale).reshape(x.shape)


print(f"int8: {sqnr(weights, integers(weights, 127)):.1f} dB")

# %% [markdown]
# ### Predict
#
# int4, in its symmetric form, has -7 .. 7. The steps are 127 / 7 times as large, and so are the
# errors. What is its SQNR, within 1 dB? (20 * log10(127 / 7) is 25.2.)
#
# And int3, -3 .. 3? (20 * log10(7 / 3) is 7.4.)

# %% answer="guess_sqnr"
course.predict("int4_db", 18.6)
course.predict("int3_db", 11.2)

# %%
int4_db, int3_db = (float(sqnr(weights, integers(weights, levels))) for levels in (7, 3))
course.reveal("int4_db", int4_db, within=1 / int4_db)
course.reveal("int3_db", int3_db, within=1 / int3_db)

# %% [markdown]
# Each bit is worth about 6 dB: it halves the steps. The next picture has all formats; `int4/128`
# is int4 with one scale for 128 neighbours. Circles are the weights from above. Triangles are the
# same with four *outliers*, weights 20 times as large as usual, which real models have. The two
# numbers behind a name are the SQNRs of both. FP8 is e4m3 with a float32 scale; `int8/all` has
# one scale for all weights. Dashed: integers of 2 to 8 bits.

# %%
outliers = weights.copy()
outliers[::1024] = 0.4
course.show(pictures.sqnr_against_bits({"normal": weights, "outliers": outliers}))

# %% [markdown]
# Two lessons. **Who shares a scale matters.** One outlier stretches the scale of all its
# neighbours: with one scale for everything, int8 falls far, with one for 128 only those near an
# outlier suffer. **Floats take it lightly.** Their relative error is the same for large and
# small, so e4m3 gains nothing from a better scale, and loses little from a bad one. (Here its SQNR
# even rises: the four outliers add to the squares, and are themselves met almost exactly.)
#
# ## 9. Do it in Triton: there and back in one kernel
#
# In training, or to see what a format would cost, weights make the trip to int8 and back. With a
# kernel for each step, the numbers would go to memory and back several times. One kernel does it
# all: it reads 128 neighbours once, finds their scale, rounds, and stores.
#
#     scale = max |x| * step               step is 1 / 127 or 1 / 7; 1 where all are zero
#     out = round(x / scale) * scale       ties to even
#
# Three notes.
#
# * `step` is a factor because compilers like to replace a division by a constant by a product,
#   and that changes the last bit. On a GPU Triton's `/` is an approximation; `tl.div_rn(a, b)` is
#   the correctly rounded division.
# * Triton has no rounding that also works in the interpreter. `_nearest` is a trick: next to
#   1.5 * 2^23 float32 has no room for a fraction, so the addition rounds.
# * A group of zeros must not divide by zero: its scale is 1.


# %% answer="round_trip_triton"
@triton.jit
def _nearest(x):
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23; ties go to even


@triton.jit
def _round_trip_kernel(x_ptr, out_ptr, step, group: tl.constexpr):
    k = tl.program_id(0) * group + tl.arange(0, group)
    x = tl.load(x_ptr + k)
    # BEGIN SOLUTION
    # 1. The scale, from tl.max(tl.abs(x)); tl.where(a == b, c, d) where all are zero.
    # 2. Round x / scale, by tl.div_rn and _nearest; multiply by scale.
    # INSTEAD out = x
    scale = tl.max(tl.abs(x)) * step
    scale = tl.where(scale == 0.0, 1.0, scale)
    out = _nearest(tl.div_rn(x, scale)) * scale
    # END SOLUTION
    tl.store(out_ptr + k, out)


def round_trip_triton(x, *, step):
    out = torch.empty_like(x)
    _round_trip_kernel[(x.numel() // 128,)](x, out, step, 128)
    return out


# %%
course.check("round_trip", triton=round_trip_triton)

# %% [markdown]
# ## 10. Do it in Pallas
#
# The same, 128 neighbours for a block of 128 threads. `jnp.round` sends ties to the even number.


# %% answer="round_trip_pallas"
def _round_trip_body(x_gmem, out_gmem, *, step):
    g = lax.axis_index("group")
    x = x_gmem[g]
    # BEGIN SOLUTION
    # jnp.max, jnp.abs, jnp.where, jnp.round.
    # INSTEAD out = x
    scale = jnp.max(jnp.abs(x)) * step
    scale = jnp.where(scale == 0.0, 1.0, scale)
    out = jnp.round(x / scale) * scale
    # END SOLUTION
    out_gmem[g] = out


def round_trip_pallas(x, *, step):
    groups = x.reshape(-1, 128)
    out = plgpu.kernel(
        lambda *refs: _round_trip_body(*refs, step=step),
        out_type=jax.ShapeDtypeStruct(groups.shape, x.dtype),
        grid=(groups.shape[0],),
        grid_names=("group",),
    )(groups)
    return out.reshape(x.shape)


# %%
course.check("round_trip", triton=round_trip_triton, pallas=round_trip_pallas)

# %% [markdown]
# ## 11. Parity
#
# Quantization leaves no room for "about right": one code more or less is an error of a whole
# step. So here the two languages agree in every bit.

# %%
mine = weights.reshape(8, 512)
one = guarded(round_trip_triton, torch.from_numpy(mine), step=1 / 7).numpy()
two = np.asarray(guarded(round_trip_pallas, jnp.asarray(mine), step=1 / 7))
print(f"Triton and Pallas agree on {(one == two).mean():.0%} of the elements")
if (one != mine).any():
    print(f"SQNR of the int4 that your kernel makes: {sqnr(mine, one):.1f} dB")

# %% [markdown]
# ## 12. A real kernel
#
# Every kernel of the project computes in float32 and rounds when it stores. Where it rounds is
# part of what it must compute: below, RMSNorm's last stage. `cast_before_weight` rounds once more
# in the middle, because some models were trained that way, and a kernel that leaves it out
# differs in the last bit of many elements.

# %%
course.twins("rms_norm", "_rms_norm_fwd_kernel", 4)

# %% [markdown]
# And why fewer bits are faster. This kernel has bfloat16 in and out, 2 bytes a number, and runs
# at the roof of the memory. Nothing but fewer bytes can make it quicker.

# %%
course.measured("rms_norm", "rms_norm_16384x4096")

# %% [markdown]
# ## 13. Explain it back
#
# **A.** All weights of a layer are multiplied by 16. What becomes of the SQNR of e4m3 without a
# scale, if no weight gets too large or too small? (1) It rises by 24 dB. (2) It stays the same.
# (3) It falls by 24 dB.
#
# **B.** One weight of a million is 100 times as large as the others. Which format suffers most?
# (1) int8 with one scale for all. (2) int8 with a scale for every 128. (3) MXFP8, a scale for
# every 32.
#
# **C.** Why is an MX scale a power of two? (1) It is more precise than a float32 scale. (2) It
# takes a byte, and dividing by it rounds nothing. (3) It makes the values evenly spaced.

# %% answer="guess_explain"
course.predict("A", 2)
course.predict("B", 1)
course.predict("C", 2)

# %%
course.reveal("A")
course.reveal("B")
course.reveal("C")

# %% [markdown]
# ## In five lines
#
# 1. A format is a set of values and a rule for who shares a scale.
# 2. Integers are evenly spaced, floats get denser towards zero, NF4 follows a normal distribution.
# 3. A bit is worth 6 dB; scales cost bits too: MXFP4 has 4.25 for each number.
# 4. Ties, NaN, zero blocks and saturation belong to the format: codes agree bit for bit or not.
# 5. Quantize in one kernel: largest magnitude, scale, round, store.
#
# Next: `puzzles next`, or [the list of lessons](../notebooks/README.md).

# %%
course.end()
