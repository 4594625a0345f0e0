# %% [markdown]
# # 01 First tile kernel, twice
#
# 1. Write one small kernel in Triton, and once more in Pallas.
# 2. See which program owns which element, and what happens at the edges.
# 3. Have both judged as this project judges its own kernels.
#
# **Time:** 40 minutes. **You need:** Python, and NumPy's arrays and slices. No GPU, no CUDA.
#
# Run the cells from top to bottom with Shift+Enter. Where a cell says `YOUR CODE HERE`, write;
# where it says `...`, put a number. A wrong answer costs nothing.

# %% setup="yes"
import notebooks._course as course

course.begin("01")

import functools

import jax
import jax.numpy as jnp
import torch
import triton
import triton.language as tl
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from notebooks import _pictures as pictures
from notebooks._tracer import guarded, trace

# %% [markdown]
# ## 1. The idea
#
# A GPU is fast because it does many things at once. So a kernel is not one loop over an array: it
# is a short function that many *programs* run at the same time, and each takes a small piece of
# the array, a *tile*. The set of all programs is the *grid*.
#
# Every kernel answers three questions. **Which tile is mine?** **What do I compute with it?**
# **Where does the result go?**
#
# Take an array of 10 rows and 7 columns, and tiles of 4 rows and 4 columns. Neither 10 nor 7 is a
# multiple of 4, and that is on purpose: real sizes never are.
#
# ### Predict
#
# How many programs does it take? And how many of the places in their tiles, the *lanes*, lie
# outside the array and have nothing to do?

# %% answer="guess_programs"
course.predict("programs", 6)
course.predict("idle_lanes", 26)

# %% [markdown]
# ## 2. A kernel that only copies, in Triton
#
# Read it line by line. In memory an array is one long line, row after row: element `[m, n]` of an
# array with `N` columns has the number `m * N + n`. `x_ptr` is a bare address; Triton makes one
# of each tensor that you pass. So `x_ptr + m * N + n` is the addresses of all 16 lanes of the
# tile at once, and the *mask* says which of them are inside the array. A lane whose mask is False
# loads nothing and stores nothing: `tl.load` gives it what you pass as `other=`, and without that
# nothing you may rely on.
#
# `tl.constexpr` marks a number that is known when the kernel is compiled, as the size of a tile
# must be.


# %%
@triton.jit
def _copy_kernel(x_ptr, out_ptr, M, N, block_m: tl.constexpr, block_n: tl.constexpr):
    # which tile is mine?
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)[:, None]  # [block_m, 1]
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)[None, :]  # [1, block_n]
    inside = (m < M) & (n < N)  # [block_m, block_n]
    # what do I compute, and where does it go?
    x = tl.load(x_ptr + m * N + n, mask=inside)
    tl.store(out_ptr + m * N + n, x, mask=inside)


def copy_triton(x):
    M, N = x.shape
    out = torch.empty_like(x)
    grid = (triton.cdiv(M, 4), triton.cdiv(N, 4))  # cdiv divides and rounds up
    _copy_kernel[grid](x, out, M, N, 4, 4)
    return out


copy_triton(torch.arange(70.0).reshape(10, 7))

# %% [markdown]
# `_copy_kernel[grid](...)` starts one program for each place in the grid. Nothing says in which
# order they run, and on a GPU they run at once: no program may count on what another has done.
#
# ## 3. The same in Pallas
#
# Pallas (here always its Mosaic GPU half, the one for NVIDIA GPUs) names what Triton hides.
# Memory comes in two kinds: `x_gmem` is the array in the GPU's large, slow memory; `tile_smem` is
# a small piece of *shared memory* close to the cores. You tell a copy engine to bring the tile
# over, wait for it at a *barrier*, and tell it to take the result back.
#
# There is no mask. The copy engine knows the array's shape: beyond the edge it brings zeros, and
# on the way back it drops what lies outside.
#
# `plgpu.kernel` calls the body with the inputs, then the outputs, then what `scratch_types`
# lists, here a tile of shared memory and a barrier. All memory comes as *Refs*: `x_gmem.at[tile]`
# names a part of one, and moves nothing yet. `wait_smem_to_gmem(0)` waits until 0 copies back are
# under way.


# %%
def _copy_body(x_gmem, out_gmem, tile_smem, arrived):
    # which tile is mine?
    m, n = lax.axis_index("rows") * 4, lax.axis_index("columns") * 4
    tile = pl.ds(m, 4), pl.ds(n, 4)  # ds(start, size) is a slice
    # bring it, wait, and take it back
    plgpu.copy_gmem_to_smem(x_gmem.at[tile], tile_smem, arrived)
    plgpu.barrier_wait(arrived)
    plgpu.copy_smem_to_gmem(tile_smem, out_gmem.at[tile])
    plgpu.wait_smem_to_gmem(0)


def copy_pallas(x):
    M, N = x.shape
    return plgpu.kernel(
        _copy_body,
        out_type=jax.ShapeDtypeStruct((M, N), x.dtype),
        scratch_types=[plgpu.SMEM((4, 4), x.dtype), plgpu.Barrier()],
        grid=(pl.cdiv(M, 4), pl.cdiv(N, 4)),
        grid_names=("rows", "columns"),
    )(x)


copy_pallas(jnp.arange(70.0).reshape(10, 7))

# %% [markdown]
# Tiles of 4 x 4 are for looking at; a GPU wants hundreds of elements in each, as in yours below.
#
# Side by side:
#
# | question | Triton | Pallas |
# |---|---|---|
# | which program am I? | `tl.program_id(0)` | `lax.axis_index("rows")` |
# | my tile | addresses: `x_ptr + m * N + n` | a slice of a *Ref*: `x_gmem.at[tile]` |
# | the edge | a mask that you write | the copy engine clips |
# | load | `tl.load` | `copy_gmem_to_smem`, then `barrier_wait` |
# | store | `tl.store` | `copy_smem_to_gmem`, then `wait_smem_to_gmem` |
# | the grid | given where the kernel is called | given where the kernel is made, with names |
#
# ## 4. The picture: who stores which element?
#
# Both kernels ran in an *interpreter*: a program on the CPU that does what the GPU would, one
# step after the other, and can be watched. This is what it saw.

# %%
in_triton = trace(copy_triton, torch.arange(70.0).reshape(10, 7))
in_pallas = trace(copy_pallas, jnp.arange(70.0).reshape(10, 7))
course.show(pictures.ownership({"Triton": in_triton, "Pallas": in_pallas}))

# %%
course.reveal("programs", in_triton.programs)
course.reveal("idle_lanes", in_triton.programs * 4 * 4 - 10 * 7)

# %% [markdown]
# ### Why the mask matters
#
# Count rows and columns from 0. The lane at row 3, column 7 is outside an array of 7 columns.
# Without the mask its address, element number `m * 7 + n`, is still that of *some* element. In
# which row is that one?

# %% answer="guess_row"
course.predict("row", 4)

# %%
course.reveal("row", (3 * 7 + 7) // 7)

# %% [markdown]
# So a forgotten mask does not crash. It writes into the next row, or past the end of the array
# into somebody else's data.
#
# ## 5. Do it in Triton
#
# Now yours: `out = scale * x + y`, all float32. The tile is 8 rows and 128 columns, a size that
# suits a GPU. Begin with the kernel of section 2; what is new is a second array and a number.
#
# The cell after yours checks it. It makes random arrays of five sizes, some with edges and one
# without, fills the output with NaN, puts *guard bands* around all of them, memory that nobody
# may touch, runs your kernel, and compares with the right answer in float64. It also looks
# whether two programs ever touch the same element, whether an input was changed, and how many
# bytes were moved. If it is not satisfied, it says why in one word, on which size, and where:
#
# | word | what was found |
# |---|---|
# | `past_the_end` | an access outside the arrays |
# | `race` | two accesses to one element, one of them a store, and nothing says which is first |
# | `nonfinite` | NaN or infinity where a number belongs; NaN everywhere: it was never written |
# | `norm` | wrong numbers |
# | `crash`, `timeout` | an error; a wait without end, given up after 30 seconds |
#
# A Triton grid has three axes, so program `(1, 0, 0)` is the second one along the rows.


# %% answer="scale_add_triton"
@triton.jit
def _scale_add_kernel(
    x_ptr, y_ptr, out_ptr, M, N, scale, block_m: tl.constexpr, block_n: tl.constexpr
):
    # BEGIN SOLUTION
    # 1. Which tile is mine? Rows m [block_m, 1], columns n [1, block_n], and the mask.
    # 2. Load x and y, compute, store.
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)[:, None]
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)[None, :]
    inside = (m < M) & (n < N)
    x = tl.load(x_ptr + m * N + n, mask=inside)
    y = tl.load(y_ptr + m * N + n, mask=inside)
    tl.store(out_ptr + m * N + n, scale * x + y, mask=inside)
    # END SOLUTION


def scale_add_triton(x, y, *, scale):
    M, N = x.shape
    out = torch.empty_like(x)
    # BEGIN SOLUTION
    # 3. How many programs, along rows and along columns?
    # INSTEAD grid = (1, 1)
    grid = (triton.cdiv(M, 8), triton.cdiv(N, 128))
    # END SOLUTION
    _scale_add_kernel[grid](x, y, out, M, N, scale, 8, 128)
    return out


# %%
course.check("scale_add", triton=scale_add_triton)

# %% [markdown]
# ## 6. Do it in Pallas
#
# Two arrays come in, so two copies arrive at one barrier: `num_arrivals=2`. Read a whole tile
# with `x_smem[...]`, write one with `x_smem[...] = value`. After writing to shared memory say
# `plgpu.commit_smem()`, so that the copy engine sees what you wrote.
#
# The copy engine wants rows that start at multiples of 16 bytes. The interpreter does not mind, a
# GPU does. So `scale_add_pallas` pads the columns to a multiple of 4 floats first, and cuts them
# off again; that part is done.
#
# In what the check says, a *block* is what Triton calls a program, and the *warpgroup* is the 128
# threads that run it together. `SMEM[0:8, 0:128]` is a part of a tile in shared memory.


# %% answer="scale_add_pallas"
def _scale_add_body(x_gmem, y_gmem, out_gmem, x_smem, y_smem, arrived, *, scale):
    # BEGIN SOLUTION
    # 1. Which tile is mine? 8 rows from m on, 128 columns from n on.
    # 2. Bring x's tile to x_smem and y's to y_smem. Wait once: the barrier counts both.
    # 3. Compute into x_smem, and commit.
    # 4. Take it to out_gmem, and wait until it is there.
    m, n = lax.axis_index("rows") * 8, lax.axis_index("columns") * 128
    tile = pl.ds(m, 8), pl.ds(n, 128)
    plgpu.copy_gmem_to_smem(x_gmem.at[tile], x_smem, arrived)
    plgpu.copy_gmem_to_smem(y_gmem.at[tile], y_smem, arrived)
    plgpu.barrier_wait(arrived)
    x_smem[...] = scale * x_smem[...] + y_smem[...]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, out_gmem.at[tile])
    plgpu.wait_smem_to_gmem(0)
    # END SOLUTION


def scale_add_pallas(x, y, *, scale):
    M, N = x.shape
    x, y = (jnp.pad(a, ((0, 0), (0, -N % 4))) for a in (x, y))
    tile = plgpu.SMEM((8, 128), x.dtype)
    out = plgpu.kernel(
        functools.partial(_scale_add_body, scale=scale),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[tile, tile, plgpu.Barrier(num_arrivals=2)],
        grid=(pl.cdiv(M, 8), pl.cdiv(x.shape[1], 128)),
        grid_names=("rows", "columns"),
    )(x, y)
    return out[:, :N]


# %%
course.check("scale_add", triton=scale_add_triton, pallas=scale_add_pallas)

# %% [markdown]
# ## 7. Parity
#
# Two kernels for one problem should give one answer. Here is how many of the elements agree bit
# for bit, on 19 rows and 261 columns. The check above asks for less: it allows what float32
# rounding explains. On a GPU a multiplication and an addition become one instruction that rounds
# once, and even a right kernel may differ from NumPy in the last bit.
#
# `guarded` calls a kernel where mistakes do no harm: a store past the end of an array in the
# interpreter is a real one and could crash this notebook, and a Pallas kernel may wait for ever.

# %%
x, y = torch.randn(2, 19, 261, generator=torch.Generator().manual_seed(1))
one = guarded(scale_add_triton, x, y, scale=0.5).numpy()
two = guarded(scale_add_pallas, jnp.asarray(x.numpy()), jnp.asarray(y.numpy()), scale=0.5)
print(f"{(one == jax.device_get(two)).mean():.0%} of the elements agree bit for bit")

# %% [markdown]
# ## 8. A real kernel
#
# This is one of the smallest kernels of the project, cut out of the two files as they are: it
# adds up the rows of an array that an earlier kernel has filled. Both are in the same four
# stages, and so is every other kernel here: *which tile*, *main loop*, *epilogue* (what is done
# to a result before it is stored), *store*.
#
# You know stages 1 and 4. New in Triton is a loop: a program walks over the rows of its columns.
# In Pallas `emit_pipeline` is that loop: it calls `add_rows` for one block of rows after the
# other, and brings the next ones meanwhile. Its `layout` and `BlockSpec` can wait.

# %%
course.twins("rms_norm", "_rms_norm_dw_kernel")

# %% [markdown]
# And this is what such twins are worth on a GPU: another pair of the project, softmax, on 16384
# rows of 4096 columns. On a machine with a Hopper GPU this cell measures; on any other it shows
# the committed record and its stamp. *us* is the median in microseconds, 8 of 10 runs lie between
# *p10* and *p90*, and *% of the roof* says how much of what the memory can deliver was used.
# Lesson 03 explains it.

# %%
course.measured("softmax", "softmax_16384x4096")

# %% [markdown]
# ## 9. Explain it back
#
# **A.** A kernel's grid is rounded *down* instead of up: `M // 8` in place of `cdiv(M, 8)`. What
# happens to an array of 19 rows? (1) The last 3 rows are computed twice. (2) The last 3 rows are
# never written. (3) The kernel crashes.
#
# **B.** In Triton a lane's mask is False. What does `tl.load` give it? (1) Zero, always. (2)
# Whatever you pass as `other`, and nothing you may rely on if you pass none. (3) The element of
# the next row.

# %% answer="guess_explain"
course.predict("A", 2)
course.predict("B", 2)

# %%
course.reveal("A")
course.reveal("B")

# %% [markdown]
# ## In five lines
#
# 1. A kernel is a function that many programs run at once; each owns one tile.
# 2. Triton: addresses and masks, `tl.program_id`, `tl.load`, `tl.store`.
# 3. Pallas: Refs and slices, `lax.axis_index`, copies to shared memory, a barrier to wait at.
# 4. Edges: in Triton your mask, in Pallas the copy engine. A forgotten mask writes somewhere
#    else.
# 5. Round the grid up. No program may count on the order of programs.
#
# Next: [02 What the interpreters do not tell you](02_what_interpreters_hide.ipynb).

# %%
course.end()
