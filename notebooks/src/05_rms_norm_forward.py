# %% [markdown]
# # 05 RMSNorm forward
#
# 1. Fuse four small operations into one kernel, and count the bytes that this saves.
# 2. See why a sum of 16-bit numbers must be kept in 32 bits.
# 3. Write residual + RMSNorm that survives large rows, tiny rows and rows of zeros.
#
# **Time:** 40 minutes. **You need:** lessons 01 and 02, and the sum of a row from 04. No GPU.

# %% setup="yes"
import notebooks._course as course

course.begin("05")

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from notebooks import _pictures as pictures
from notebooks._tracer import guarded, trace

# %% [markdown]
# ## 1. The idea
#
# In a language model every token is a row of a few thousand numbers. Layer after layer adds
# something to the row, and the numbers would grow. So each layer first divides the row by its
# typical size, the *root mean square*, and multiplies column n by a learned weight `w[n]`:
#
#     h    = x + residual                     what came in, and what the last layer adds
#     rms  = square root of mean(h * h)       one number a row
#     y    = h / rms * w
#
# This is *RMSNorm*. y goes into the next layer, h goes on as its residual, so both are stored.
#
# ### Predict
#
# A row of two numbers, h = [1, 7]. What is its rms?

# %% answer="guess_rms"
course.predict("rms", 5)

# %%
h = np.array([1.0, 7.0])
course.reveal("rms", np.sqrt(np.mean(h * h)))
print("h / rms =", h / np.sqrt(np.mean(h * h)))

# %% [markdown]
# ## 2. Four kernels or one
#
# Written line by line, as in NumPy, each line is a kernel of its own. It reads its inputs from
# the GPU's memory and writes its result back, and the next line reads that again. Here are four
# such kernels. Each program takes 32 whole rows. (`rstd` is 1 / rms.)


# %%
@triton.jit
def _add_kernel(x_ptr, residual_ptr, h_ptr, N: tl.constexpr):
    at = (tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]) * N + tl.arange(0, N)[None, :]
    tl.store(h_ptr + at, tl.load(x_ptr + at) + tl.load(residual_ptr + at))


@triton.jit
def _rstd_kernel(h_ptr, rstd_ptr, N: tl.constexpr):
    m = tl.program_id(0) * 32 + tl.arange(0, 32)
    h = tl.load(h_ptr + m[:, None] * N + tl.arange(0, N)[None, :]).to(tl.float32)
    tl.store(rstd_ptr + m, tl.rsqrt(tl.sum(h * h, 1) / N))


@triton.jit
def _scale_kernel(h_ptr, rstd_ptr, scaled_ptr, N: tl.constexpr):
    m = tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]
    at = m * N + tl.arange(0, N)[None, :]
    tl.store(scaled_ptr + at, tl.load(h_ptr + at) * tl.load(rstd_ptr + m))


@triton.jit
def _weight_kernel(scaled_ptr, w_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)[None, :]
    at = (tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]) * N + n
    tl.store(y_ptr + at, tl.load(scaled_ptr + at) * tl.load(w_ptr + n))


def run(kernel, *arrays, out):
    x = arrays[0]
    kernel[(x.shape[0] // 32,)](*arrays, out, x.shape[1])
    return out


def add(x, residual):
    return run(_add_kernel, x, residual, out=torch.empty_like(x))


def row_rstd(h):
    return run(_rstd_kernel, h, out=torch.empty(h.shape[0]))


def scale(h, rstd):
    return run(_scale_kernel, h, rstd, out=torch.empty_like(h))


def weight(scaled, w):
    return run(_weight_kernel, scaled, w, out=torch.empty_like(scaled))


# %% [markdown]
# ### Predict
#
# Count arrays of M x N: how many do the four kernels read and write together? Forget `w` and
# `rstd`, which are small. And how many if one kernel does it all, and keeps h to itself between
# the lines?

# %% answer="guess_arrays"
course.predict("four_kernels", 8)
course.predict("one_kernel", 4)

# %% [markdown]
# ### The picture: where do the bytes go?
#
# One kernel, which is the project's own in Pallas, and the four kernels from above. The
# interpreters counted what each reads and writes.

# %%
x, residual = torch.randn(2, 64, 1024, generator=torch.Generator().manual_seed(5)).half()
w = torch.ones(1024).half()
h = add(x, residual)
rstd = row_rstd(h)
steps = {
    "add": trace(add, x, residual),
    "rstd": trace(row_rstd, h),
    "scale": trace(scale, h, rstd),
    "weight": trace(weight, scale(h, rstd), w),
}
from pallas_kernels import rms_norm

arrays = [jnp.asarray(a.numpy()) for a in (x, w, residual)]
steps["all of it"] = trace(rms_norm, *arrays)
moves = {name: (seen.read, seen.written) for name, seen in steps.items()}
bars = {
    "one kernel": {"all of it": moves.pop("all of it")},
    "four kernels": moves,
}
course.show(pictures.operations(bars, x.nbytes, "arrays of M x N"))

# %%
moved = {label: sum(map(sum, parts.values())) / x.nbytes for label, parts in bars.items()}
course.reveal("four_kernels", moved["four kernels"], within=0.1)
course.reveal("one_kernel", moved["one kernel"], within=0.1)

# %% [markdown]
# The little that is over is w: every program reads all of it, however few its rows, and the
# Pallas kernel's programs take only four. On a GPU w waits in a cache, and costs next to nothing.
#
# Putting operations into one kernel so that what lies between them never goes to memory is called
# *fusion*. It saves no arithmetic at all. But a GPU does dozens of operations in the time
# that one number takes from memory, so here bytes are time.
#
# ## 3. 16 bits are not enough for a sum
#
# The rows are stored in 16 bits, float16 or bfloat16. May the sum of squares be kept in 16 bits
# too? float16 has 11 significant bits.
#
# ### Predict
#
# Start at 0 in float16 and add 1, four thousand times. What do you get?

# %% answer="guess_ones"
course.predict("ones", 2048)

# %%
total = np.float16(0)
for _ in range(4000):
    total += np.float16(1)
course.reveal("ones", float(total))

# %% [markdown]
# From 2048 on, float16 can only hold even numbers. 2049 lies in the middle and is rounded back to
# 2048: the sum stands still, and each further term is lost. bfloat16 has only 8 significant bits,
# so there the sum stands still at 256.
#
# Here are the squares of N random numbers, summed one by one, and how far the mean is off:

# %%
squares = np.random.default_rng(0).standard_normal(16384) ** 2
print(f"{'N':>8}{'bfloat16':>11}{'float16':>11}{'float32':>11}")
for N in (64, 256, 1024, 4096, 16384):
    off = [
        abs(float(np.add.accumulate(squares[:N].astype(d))[-1]) / squares[:N].sum() - 1)
        for d in (ml_dtypes.bfloat16, np.float16, np.float32)
    ]
    print(f"{N:>8}" + "".join(f"{e:>11.0e}" for e in off))

# %% [markdown]
# Storing a number in float16 costs at most 0.05 % (5e-04), in bfloat16 0.4 %. A mean in float32
# is far better than that at any N; one in 16 bits is worse as soon as rows get long.
#
# float16 has a second problem: its range. It ends at 65504, and the squares of a thousand numbers
# of size 30 sum to 900000: infinity. Dividing by N *before* summing does not help either. Then
# the terms of small rows are below 6e-8, the smallest positive float16, and become 0.
#
# So the rule of every kernel here: **load 16 bits, compute in float32, round once when storing.**
#
# ### A row of zeros
#
# rms is 0, and 0 / 0 is NaN. So a small number *eps* is added to the mean, under the root:
#
#     rstd = 1 / square root of (mean(h * h) + eps)
#
# ### Predict
#
# With eps = 1e-6, what is rstd of a row of zeros?

# %% answer="guess_rstd"
course.predict("rstd_of_zeros", 1000)

# %%
course.reveal("rstd_of_zeros", 1 / np.sqrt(0 + 1e-6), within=0.01)

# %% [markdown]
# It is finite, and 0 times it is 0. An ordinary row does not notice so small an eps.
#
# ## 4. Do it in Triton
#
# All of it in one kernel. One program takes one row; `block` is the next power of two, so the
# whole row is one tile. It is read once, and stays with the program.
#
# Two calls that are new: `.to(tl.float32)` turns a tile into float32, and
# `h_ptr.dtype.element_ty` is the type that h_ptr points to. Round h to it *before* you square:
# the mean must be that of the h which is stored, because the layers after this one read that h.


# %% answer="residual_rms_norm_triton"
@triton.jit
def _residual_rms_norm_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, N, eps, block: tl.constexpr
):
    m = tl.program_id(0)
    n = tl.arange(0, block)
    # BEGIN SOLUTION
    # 1. Load x and residual, each to float32. What do the idle lanes hold?
    # 2. h is their sum, rounded to its own type. Store it; go on with it in float32.
    # 3. rstd, with tl.sum and tl.rsqrt (1 / square root). Which number do you divide by?
    # 4. Load w, to float32. Store y; tl.store rounds it.
    x = tl.load(x_ptr + m * N + n, mask=n < N, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + m * N + n, mask=n < N, other=0.0).to(tl.float32)
    h = (x + residual).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + m * N + n, h, mask=n < N)
    h = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h) / N + eps)
    w = tl.load(w_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, h * rstd * w, mask=n < N)
    # END SOLUTION


def residual_rms_norm_triton(x, residual, w, *, eps):
    M, N = x.shape
    y, h = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(N)
    _residual_rms_norm_kernel[(M,)](x, residual, w, y, h, N, eps, block)
    return y, h


# %%
course.check("residual_rms_norm", triton=residual_rms_norm_triton)

# %% [markdown]
# The sizes: five in float16 and one in float32. Among them rows of large values, rows of small
# ones, a row of zeros, rows of one number. Your error may be 1.5 times that of a model which
# computes in float32 and rounds once, so a sum in 16 bits does not get through. The bytes are
# counted too, on the last size: a fifth above the least is right, since w is read for each of
# six rows.
#
# ## 5. Do it in Pallas
#
# The same lines in the same order. A whole row is `x_gmem[m, :]`, and `.astype(jnp.float32)`
# turns it into float32. Storing does not round by itself: say `.astype(y_gmem.dtype)`.
#
# `residual_rms_norm_pallas` fills the rows up to a multiple of 128 with zeros, because 128
# threads share a row. So `x_gmem.shape[1]` is not N; N comes as an argument.


# %% answer="residual_rms_norm_pallas"
def _residual_rms_norm_body(x_gmem, residual_gmem, w_gmem, y_gmem, h_gmem, *, N, eps):
    m = lax.axis_index("row")
    # BEGIN SOLUTION
    # 1. to 4. as in Triton, with jnp.sum and lax.rsqrt. w is w_gmem[...].
    x = x_gmem[m, :].astype(jnp.float32)
    residual = residual_gmem[m, :].astype(jnp.float32)
    h = (x + residual).astype(h_gmem.dtype)
    h_gmem[m, :] = h
    h = h.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.sum(h * h) / N + eps)
    w = w_gmem[...].astype(jnp.float32)
    y_gmem[m, :] = (h * rstd * w).astype(y_gmem.dtype)
    # END SOLUTION


def residual_rms_norm_pallas(x, residual, w, *, eps):
    M, N = x.shape
    x, residual = (jnp.pad(a, ((0, 0), (0, -N % 128))) for a in (x, residual))
    rows = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y, h = plgpu.kernel(
        functools.partial(_residual_rms_norm_body, N=N, eps=eps),
        out_type=[rows, rows],
        grid=(M,),
        grid_names=("row",),
    )(x, residual, jnp.pad(w, (0, -N % 128)))
    return y[:, :N], h[:, :N]


# %%
course.check("residual_rms_norm", triton=residual_rms_norm_triton, pallas=residual_rms_norm_pallas)

# %% [markdown]
# ## 6. Parity
#
# Your two kernels on the same 64 rows. Each sums in its own order, so two results in float32
# differ in their last bits. Rounding to float16 hides nearly all of it.

# %%
mine = guarded(residual_rms_norm_triton, x, residual, w, eps=1e-6)
arrays = [jnp.asarray(a.numpy()) for a in (x, residual, w)]
theirs = guarded(residual_rms_norm_pallas, *arrays, eps=1e-6)
for name, one, two in zip("yh", mine, theirs, strict=True):
    print(f"{name}: {(one.numpy() == np.asarray(two)).mean():.2%} agree bit for bit")

# %% [markdown]
# ## 7. A real kernel
#
# The main loop and the epilogue of the project's forward, in both languages. Your lines are all
# there. What is new:
#
# * **Rows longer than a tile.** Both walk over the row, as in lesson 04, and once more to store
#   y. `squares` is a whole tile of float32: every lane adds up its own columns, and the lanes
#   meet once at the end.
# * **Triton: `evict_last`** asks the cache to keep the row for the second walk, so that it comes
#   from memory only once.
# * **Pallas: slots.** The copy engine brings the row to shared memory, where it stays for the
#   second walk. Threads that share a row exchange their sums through shared memory: `met`.

# %%
course.twins("rms_norm", "_rms_norm_fwd_kernel", 2)

# %%
course.twins("rms_norm", "_rms_norm_fwd_kernel", 3)

# %% [markdown]
# ### Predict
#
# 16384 rows of 4096 bfloat16, with a residual. Below is how large one such array is, and how fast
# the GPU of the records copies (bytes read and bytes written counted together). How many
# microseconds must one fused kernel take at least?

# %%
row = course.rows("rms_norm", "rms_norm_16384x4096_residual")["triton"]
copy_gbps = row["ceilings"]["copy_gbps"]
print(f"An array has {16384 * 4096 * 2 / 1e6:.0f} MB, a copy moves {copy_gbps:.0f} GB per second.")

# %% answer="guess_us"
course.predict("microseconds", 128)

# %%
least = row["bytes"] / copy_gbps / 1e3  # GB/s are bytes per nanosecond
course.reveal("microseconds", least, within=0.05)
print(f"By the same rule four kernels would take {least * 8 / 4:.0f} us; that is not measured.")

# %% [markdown]
# And this is what was measured. *% of the roof* compares with the time you just worked out: a
# kernel that only moves bytes cannot be much faster than a copy. A little over 100 is no mistake:
# the roof is a copy that was measured, too.

# %%
course.measured("rms_norm", "rms_norm_16384x4096_residual")

# %% [markdown]
# ## 8. Explain it back
#
# **A.** What does fusing the four operations save? (1) Multiplications. (2) Trips of h and of
# h / rms through memory. (3) Accuracy: fewer digits are needed.
#
# **B.** A row of 1000 is in a tile of 1024 whose idle lanes hold 0. A kernel divides the sum of
# squares by 1024. What happens? (1) Nothing, the idle lanes add 0. (2) y is about 1.2 % too
# large. (3) y is NaN.
#
# **C.** y is rounded to 16 bits anyway. Why is the sum in float32? (1) A 16-bit sum loses terms
# that are small beside it, and its error grows with N. (2) A GPU cannot add 16-bit numbers. (3)
# Because float32 is faster.

# %% answer="guess_explain"
course.predict("A", 2)
course.predict("B", 2)
course.predict("C", 1)

# %%
course.reveal("A")
course.reveal("B")
course.reveal("C")

# %% [markdown]
# ## In five lines
#
# 1. RMSNorm divides a row by its root mean square and multiplies by a weight for each column.
# 2. Fusion keeps what lies between operations out of memory: 4 arrays move instead of 8.
# 3. Load 16 bits, compute in float32, round once when storing.
# 4. Divide by N, not by the tile; idle lanes hold 0; eps stands under the root.
# 5. What is bound by bytes takes bytes divided by the speed of a copy.
#
# Next: [06 RMSNorm backward](06_rms_norm_backward.ipynb).

# %%
course.end()
