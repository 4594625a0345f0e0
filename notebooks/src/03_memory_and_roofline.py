# %% [markdown]
# # 03 Memory, bytes and the roofline
#
# 1. Count the bytes and the operations of a kernel before it exists.
# 2. Say from these two numbers how fast it can be at most on a GPU, and what limits it.
# 3. Make three kernels into one, and see on a meter what that saves.
#
# **Time:** 40 minutes. **You need:** lesson 01. No GPU.

# %% setup="yes"
import notebooks._course as course

course.begin("03")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import triton
import triton.language as tl
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from notebooks import _pictures as pictures
from notebooks._tracer import guarded, trace
from parity.problems import problem

# %% [markdown]
# ## 1. The idea
#
# A GPU has two kinds of work: it moves bytes, and it computes. Both go on at the same time, so a
# kernel takes as long as the slower of the two:
#
#     time >= max(bytes / bytes per second, operations / operations per second)
#
# Nearly always bytes are the slower one, because memory comes in layers, and what is large is far
# away. On an H200, a GPU with 132 *multiprocessors*, each a core of its own with its own memory:
#
# | memory | how much | who sees it |
# |---|--:|---|
# | registers | 256 KB each multiprocessor | one thread each |
# | shared memory | up to 228 KB each multiprocessor | the threads of one program |
# | L2 cache | 50 MB | all programs |
# | GPU memory (HBM) | 141 GB | everybody, and it stays after the kernel |
#
# Whatever a kernel wants to keep must go to GPU memory, and the next kernel must fetch it from
# there. We count only those bytes: the *traffic*. (A cache may serve a second load of the same
# bytes, if they are few; the count does not rely on it.) Operations are those on floating-point
# numbers, additions, multiplications and the like, *FLOP*; `a * b + c` is two.
#
# ## 2. Count
#
# The least traffic of any kernel is easy: each input once, each output once.
#
# ### Predict
#
# Powers of two, to make it easy to calculate: 4096 * 4096 is 16.8 million.
#
# * `add_mb`: x and y are float32 arrays (4 bytes a number) of 4096 x 4096, and the kernel stores
#   x + y. How many megabytes (millions of bytes) does it move?
# * `gemm_gflop`: a product of two 4096 x 4096 matrices has 4096 * 4096 results; each takes 4096
#   multiplications and as many additions. How many GFLOP (billions of operations) is that?
# * `gemm_mb`: the same product, the matrices in bfloat16 (2 bytes). How many megabytes at least?

# %% answer="guess_counts"
course.predict("add_mb", 201)
course.predict("gemm_gflop", 137)
course.predict("gemm_mb", 101)

# %%
matmul = problem("matmul")
gemm = matmul.cost(matmul.workload("gemm_4096"), "fwd")  # what the project itself counts
course.reveal("add_mb", 3 * 4 * 4096**2 / 1e6, within=0.02)
course.reveal("gemm_gflop", gemm.flops / 1e9, within=0.02)
course.reveal("gemm_mb", gemm.bytes / 1e6, within=0.02)

# %% [markdown]
# Divide the two: FLOP per byte is called *arithmetic intensity*. It says how much there is to do
# with each byte that was fetched.
#
# ### Predict
#
# * `add`: the intensity of x + y in float32. One operation, three numbers of 4 bytes.
# * `gemm`: the intensity of the product above.
# * `one_row`: the product of *one* row [1, 4096] and a matrix [4096, 4096], in bfloat16. This is
#   what a language model does for each token that it writes. (Nearly all bytes are the matrix's.)

# %% answer="guess_intensity"
course.predict("add", 0.083)
course.predict("gemm", 1365)
course.predict("one_row", 1)

# %%


def gemm_intensity(M):
    """FLOP per byte of [M, 4096] @ [4096, 4096] in bfloat16."""
    return 2 * M * 4096**2 / (2 * (M * 4096 + 4096**2 + M * 4096))


course.reveal("add", 1 / 12, within=0.02)
course.reveal("gemm", gemm.flops / gemm.bytes, within=0.02)
course.reveal("one_row", gemm_intensity(1), within=0.02)

# %% [markdown]
# ## 3. The picture: what is the limit?
#
# Every record of this project stands beside two ceilings, measured in the same run: how fast this
# GPU copies memory, and how fast it multiplies large matrices.

# %%
record = course.rows("rms_norm", "rms_norm_16384x4096")["triton"]
copy_gbps, tflops = (record["ceilings"][rate] for rate in ("copy_gbps", "gemm_tflops"))
print(f"It copies {copy_gbps:.0f} GB/s and multiplies at {tflops:.0f} TFLOP/s.")
print(course.stamp(record))

# %% [markdown]
# ### Predict
#
# * `ridge`: how many FLOP for each byte must a kernel have, so that computing takes as long as
#   moving? (A TFLOP/s is 1000 GFLOP/s.)
# * `rows`: how many rows M must the product [M, 4096] @ [4096, 4096] have to get there? Its
#   intensity is nearly M while M is small. A guess within 20% is fine.

# %% answer="guess_ridge"
course.predict("ridge", 193)
course.predict("rows", 213)

# %%
ridge = 1e3 * tflops / copy_gbps
course.reveal("ridge", ridge, within=0.05)
course.reveal("rows", ridge * 4096 / (4096 - 2 * ridge), within=0.2)

# %% [markdown]
# The *roofline* shows both limits at once. To the right goes the intensity, upwards the
# operations per second; both scales are logarithmic, each line of the grid is ten times the last.
# On the slope memory is the limit: twice the operations per byte are twice the speed, for free.
# On the flat part arithmetic is. The corner is the ridge.
#
# Move the slider: it is the number of rows M of the product.

# %%
dots = {"x + y": 1 / 12, "softmax": 5 / 4, "product": gemm.flops / gemm.bytes}
course.slider(
    lambda M: pictures.roofline(dots, copy_gbps, tflops, record["device"], gemm_intensity(M)),
    [2**i for i in range(14)],
    128,
    "M",
)

# %% [markdown]
# So the very same matrix is a memory problem for one row and an arithmetic problem for a
# thousand. And all that works element by element, or row by row, is far down the slope: softmax,
# norms, activations. For these only one thing helps: fewer bytes.
#
# ## 4. Fusion
#
# Take `out = scale * max(x + y, 0)`. (`max(x, 0)` is known as *relu*.) Written step by step, as
# one writes NumPy or PyTorch, it is three kernels, and each of them takes the trip to memory and
# back.


# %%
@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, N, block: tl.constexpr):
    n = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + n, mask=n < N)
    y = tl.load(y_ptr + n, mask=n < N)
    tl.store(out_ptr + n, x + y, mask=n < N)


@triton.jit
def _relu_kernel(x_ptr, out_ptr, N, block: tl.constexpr):
    n = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + n, mask=n < N)
    tl.store(out_ptr + n, tl.maximum(x, 0.0), mask=n < N)


@triton.jit
def _scale_kernel(x_ptr, out_ptr, N, scale, block: tl.constexpr):
    n = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + n, mask=n < N)
    tl.store(out_ptr + n, scale * x, mask=n < N)


def three_kernels(x, y, *, scale):
    N = x.shape[0]
    grid = (triton.cdiv(N, 256),)
    total, positive, out = (torch.empty_like(x) for _ in range(3))
    _add_kernel[grid](x, y, total, N, 256)
    _relu_kernel[grid](total, positive, N, 256)
    _scale_kernel[grid](positive, out, N, scale, 256)
    return out


# %% [markdown]
# ### Predict
#
# The least is 3 trips for each element: load x, load y, store out. How many times the least do
# the three kernels move?

# %% answer="guess_fusion"
course.predict("times", 2.33)

# %%
x, y = torch.randn(2, 3000, generator=torch.Generator().manual_seed(3))
apart = trace(three_kernels, x, y, scale=0.5)
course.reveal("times", (apart.read + apart.written) / (3 * x.nbytes), within=0.02)

# %% [markdown]
# The *meter* has counted it: `trace` ran the three kernels in the interpreter and added up the
# bytes of all their loads and stores.
#
# ## 5. Do it in Triton
#
# To *fuse* is to do all steps while the numbers are in registers. One kernel, three trips.


# %% answer="relu_sum_triton"
@triton.jit
def _relu_sum_kernel(x_ptr, y_ptr, out_ptr, N, scale, block: tl.constexpr):
    n = tl.program_id(0) * block + tl.arange(0, block)
    # BEGIN SOLUTION
    # Load x and y, compute, store once.
    # INSTEAD pass
    x = tl.load(x_ptr + n, mask=n < N)
    y = tl.load(y_ptr + n, mask=n < N)
    tl.store(out_ptr + n, scale * tl.maximum(x + y, 0.0), mask=n < N)
    # END SOLUTION


def relu_sum_triton(x, y, *, scale):
    N = x.shape[0]
    out = torch.empty_like(x)
    _relu_sum_kernel[(triton.cdiv(N, 256),)](x, y, out, N, scale, 256)
    return out


# %%
course.check("relu_sum", triton=relu_sum_triton)

# %% [markdown]
# ## 6. Do it in Pallas
#
# The same with the copy engine: two tiles to shared memory, one back. `jnp.maximum(a, 0.0)` is
# the relu. The wrapper fills up to whole tiles of 256 elements; that part is done.


# %% answer="relu_sum_pallas"
def _relu_sum_body(x_gmem, y_gmem, out_gmem, x_smem, y_smem, arrived, *, scale):
    part = pl.ds(lax.axis_index("part") * 256, 256)
    # BEGIN SOLUTION
    # 1. Bring both tiles, and wait: one barrier counts both.
    # 2. Compute into x_smem, and commit it.
    # 3. Take it to out_gmem, and wait.
    plgpu.copy_gmem_to_smem(x_gmem.at[part], x_smem, arrived)
    plgpu.copy_gmem_to_smem(y_gmem.at[part], y_smem, arrived)
    plgpu.barrier_wait(arrived)
    x_smem[...] = scale * jnp.maximum(x_smem[...] + y_smem[...], 0.0)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, out_gmem.at[part])
    plgpu.wait_smem_to_gmem(0)
    # END SOLUTION


def relu_sum_pallas(x, y, *, scale):
    N = x.shape[0]
    x, y = (jnp.pad(a, (0, -N % 256)) for a in (x, y))
    tile = plgpu.SMEM((256,), x.dtype)
    out = plgpu.kernel(
        lambda *refs: _relu_sum_body(*refs, scale=scale),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[tile, tile, plgpu.Barrier(num_arrivals=2)],
        grid=(x.shape[0] // 256,),
        grid_names=("part",),
    )(x, y)
    return out[:N]


# %%
course.check("relu_sum", triton=relu_sum_triton, pallas=relu_sum_pallas)

# %% [markdown]
# ## 7. Parity, on the meter and on the roof
#
# Your kernels beside the three. The dashed line is the least that is possible.

# %%
in_triton = trace(relu_sum_triton, x, y, scale=0.5)
in_pallas = trace(relu_sum_pallas, jnp.asarray(x.numpy()), jnp.asarray(y.numpy()), scale=0.5)
seen = {"three kernels": apart, "yours, Triton": in_triton, "yours, Pallas": in_pallas}
bars = {label: (t.read, t.written) for label, t in seen.items()}
course.show(pictures.traffic(bars, (2 * x.nbytes, x.nbytes)))

# %% [markdown]
# And as dots on the roofline: 3 operations for an element, and the bytes that the meter counted.

# %%
ends = {"three kernels": apart, "yours": in_triton}
moved = {label: t.read + t.written for label, t in ends.items()}
mine = {label: 3 * 3000 / n for label, n in moved.items() if n}
course.show(pictures.roofline(mine, copy_gbps, tflops, record["device"]))

# %%
one = guarded(relu_sum_triton, x, y, scale=0.5).numpy()
two = np.asarray(
    guarded(relu_sum_pallas, jnp.asarray(x.numpy()), jnp.asarray(y.numpy()), scale=0.5)
)
print(f"{(one == two).mean():.0%} of the elements agree bit for bit")

# %% [markdown]
# The three kernels did not compute anything more. They only stood farther to the left.
#
# A fused kernel saves one more thing. Starting a kernel costs some microseconds of its own, and
# for small arrays this is more than the work.
#
# ## 8. A real kernel
#
# RMSNorm divides each row by the root of its mean square; in a language model the row is often a
# sum, `x + residual`, and others want to have that sum too. Apart, the sum would be stored and
# loaded again. The project's kernel adds while it loads: look for `has_residual` and `residual`.

# %%
course.twins("rms_norm", "_rms_norm_fwd_kernel", 2)

# %% [markdown]
# ### Predict
#
# RMSNorm without residual: 16384 rows of 4096 numbers in bfloat16, read once and written once. By
# the copy speed above, how many microseconds does it take at least?

# %% answer="guess_us"
course.predict("us", 65.6)

# %%
course.reveal("us", record["bytes"] / copy_gbps / 1e3, within=0.05)

# %% [markdown]
# That time is *the roof* of this kernel, and this is what was reached. The ceilings are measured
# as well, each time anew, so a good kernel may come out at 101%.

# %%
course.measured("rms_norm", "rms_norm_16384x4096")

# %% [markdown]
# And with the residual, where there is more to fuse:

# %%
course.measured("rms_norm", "rms_norm_16384x4096_residual")

# %% [markdown]
# The other end of the roofline: the product of two 4096 x 4096 matrices, where the roof is
# arithmetic.

# %%
course.measured("matmul", "gemm_4096")

# %% [markdown]
# ## 9. Explain it back
#
# **A.** A kernel that adds two arrays runs at 98% of the roof. A colleague wants to make it twice
# as fast with a better instruction for the addition. What do you say? (1) Try it. (2) It cannot
# help: memory is the limit, only fewer bytes would. (3) It needs more programs.
#
# **B.** Writing tokens one at a time, a model multiplies one row with each weight matrix. What
# makes it faster? (1) Weights in fewer bits. (2) A GPU with more TFLOP/s. (3) A better tile size.
#
# **C.** When is fusing two kernels of no use for the traffic? (1) When both are simple. (2) When
# the second does not read what the first has written. (3) When the arrays are large.

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
# 1. A kernel takes at least max(bytes / memory speed, operations / arithmetic speed).
# 2. Least bytes: each input once, each output once. FLOP per byte is the arithmetic intensity.
# 3. Roofline: below the ridge memory is the limit, above it arithmetic.
# 4. Element by element and row by row is always below it: only fewer bytes help.
# 5. Fusing keeps numbers in registers between two steps, and saves the trip to memory and back.
#
# Next: [04 Softmax and reductions](04_softmax_reductions.ipynb).

# %%
course.end()
