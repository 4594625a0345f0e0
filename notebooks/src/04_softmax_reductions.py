# %% [markdown]
# # 04 Softmax and reductions
#
# 1. Turn a row of any length into one number while reading it once.
# 2. See why softmax needs the largest value, and how a running sum is corrected when it changes.
# 3. Write log-sum-exp and softmax of long rows that survive logits of 10000 and rows of -inf.
#
# **Time:** 45 minutes. **You need:** lessons 01 and 02, and what `exp` and `log` do. No GPU.

# %% setup="yes"
import notebooks._course as course

course.begin("04")

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

# %% [markdown]
# ## 1. The idea
#
# A *reduction* makes one number of many: a sum, a maximum. A row may be far longer than what a
# program can hold, so the program walks over it block by block and keeps a small *state*. For a
# sum the state is one number. What is it for softmax?
#
#     y[n] = exp(x[n]) / sum of exp(x[j]) over the row
#
# The x of a softmax are called *logits*. One problem comes first: `exp` of a large number
# overflows, it becomes infinity, and infinity divided by infinity is NaN, "not a number".
#
# ### Predict
#
# What is the smallest whole number whose `exp` overflows in float32? (The largest float32 is
# about 3.4 * 10^38, and the natural logarithm of 10 is 2.303.)

# %% answer="guess_overflow"
course.predict("overflow", 89)

# %%
with np.errstate(over="ignore"):
    powers = np.exp(np.arange(200, dtype=np.float32))
course.reveal("overflow", int(np.argmax(np.isinf(powers))))

# %% [markdown]
# So a softmax must never compute `exp(x)` itself. Divide numerator and denominator by `exp(top)`,
# where `top` is the largest x of the row. Nothing changes in the mathematics:
#
#     y[n] = exp(x[n] - top) / sum of exp(x[j] - top)
#
# Now no exponent is above 0, no `exp` is above 1, and at least one is exactly 1, so the sum is
# never 0.
#
# But the largest x is only known at the end of the row. Must we read the row once for `top`, and
# once more for the sum? No. Keep a state of two numbers, *(top, total)*: the largest value so
# far, and the sum of `exp(x - top)` so far. If a new block brings a larger value, the old sum was
# measured against the wrong top, and one multiplication puts that right:
#
#     new   = max(top, largest of the block)
#     total = total * exp(top - new) + sum of exp(x - new) over the block
#     top   = new
#
# This is called *online softmax*.
#
# ### Predict
#
# The state is top = 2, total = 3. The next block is `[4, 2]`. What is the new total? To two
# digits after the point; exp(-2) is 0.135.

# %% answer="guess_total"
course.predict("total", 1.54)

# %%
new = max(2, 4, 2)
course.reveal("total", 3 * np.exp(2 - new) + np.exp(4 - new) + np.exp(2 - new), within=0.01)

# %% [markdown]
# ## 2. The picture: the state while blocks arrive
#
# A row of 24 logits in blocks of four. The points are the logits, the line is `top`. Under each
# block stands the state after it, and in the last line the sum that you would have without `top`.
#
# In JupyterLab a slider brings the blocks one by one. Move it to the end.

# %%
rng = np.random.default_rng(0)
row = (np.linspace(0, 110, 24) + rng.normal(0, 12, 24)).astype(np.float32)
row[20:] -= 70
course.slider(lambda seen: pictures.running_softmax(row, 4, seen), range(1, 7), 3, "blocks seen")

# %% [markdown]
# Look at *old total times*. It is 1 where the largest value stayed, and tiny where it grew: what
# was summed before hardly counts any more. In block 1 it is 0, for nothing was summed before.
#
# ### Two details
#
# **Nothing so far.** At the start `top` is minus infinity, the largest of no values, and `total`
# is 0. Softmax also meets real `-inf`: attention puts it where a token may not look. If a row
# begins with a whole block of `-inf`, then `top` and `new` are both `-inf`, and `-inf - (-inf)`
# is NaN. So subtract a `base` that is `new`, or 0 while `new` is still `-inf`; then all the `exp`
# are 0, as they should be.
#
# **Idle lanes.** The last block is rarely full. In lesson 01 an idle lane's value did not matter,
# because it was never stored. Here it reaches the sum. It must hold what changes nothing, and
# this is not the same for every reduction.
#
# ### Predict
#
# Which value `other=` in `tl.load` changes neither the maximum nor the sum of `exp`? Write it as
# the number of the choice: (1) 0.0 (2) 1.0 (3) float("-inf")

# %% answer="guess_other"
course.predict("other", 3)

# %%
padded = [np.append(np.float32([-3, -5]), v) for v in np.float32([0, 1, -np.inf])]
right = [v.max() == -3 and np.isclose(np.exp(v).sum(), np.exp([-3, -5]).sum()) for v in padded]
course.reveal("other", 1 + right.index(True))

# %% [markdown]
# ## 3. Do it in Triton: log-sum-exp
#
# The state at the end of the row says it all: `out = top + log(total)` is the logarithm of the
# sum of `exp(x)`, the number that cross-entropy losses and attention keep. One program walks over
# one row and loads each element once. A row of nothing but `-inf` gives `-inf`.


# %% answer="logsumexp_triton"
@triton.jit
def _logsumexp_kernel(x_ptr, out_ptr, N, block: tl.constexpr):
    m = tl.program_id(0)
    top, total = float("-inf"), 0.0
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        # BEGIN SOLUTION
        # 1. Load the block. What do idle lanes hold?
        # 2. The new top: tl.maximum(a, b) of two values, tl.max(x) of a block. And its base.
        # 3. Correct total, add the block's tl.sum(tl.exp(...)).
        # INSTEAD pass
        x = tl.load(x_ptr + m * N + n, mask=n < N, other=float("-inf"))
        new = tl.maximum(top, tl.max(x))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base))
        top = new
        # END SOLUTION
    tl.store(out_ptr + m, top + tl.log(tl.where(total == 0.0, 1.0, total)))


def logsumexp_triton(x):
    M, N = x.shape
    out = torch.empty(M, dtype=x.dtype, device=x.device)
    _logsumexp_kernel[(M,)](x, out, N, 512)
    return out


# %%
course.check("logsumexp", triton=logsumexp_triton)

# %% [markdown]
# The sizes: rows shorter than a block and longer, logits that rise from block to block, logits
# between -10000 and 10000, a row of `-inf`, and a row that begins with a whole block of them. The
# check also counts bytes: whoever reads x twice is told so.
#
# ## 4. Do it in Pallas: log-sum-exp
#
# A loop with a state is `lax.fori_loop(first, end, step, state)`: it calls `step(i, state)`,
# which returns the new state. A Ref in the GPU's memory can also be read without the copy engine,
# `x_gmem[m, pl.ds(start, 512)]`; that is enough here.
#
# `logsumexp_pallas` fills the rows up to a multiple of 512 with `-inf`. And 128 threads work
# together in a block, so the smallest piece they store is 128 elements: the result is written 128
# times, and the wrapper takes one.


# %% answer="logsumexp_pallas"
def _logsumexp_body(x_gmem, out_gmem):
    m = lax.axis_index("row")

    def step(i, state):
        top, total = state
        x = x_gmem[m, pl.ds(i * 512, 512)]
        # BEGIN SOLUTION
        # The same three lines as in Triton: jnp.maximum, jnp.max, jnp.where, jnp.exp, jnp.sum.
        # INSTEAD return top, total
        new = jnp.maximum(top, jnp.max(x))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        return new, total * jnp.exp(top - base) + jnp.sum(jnp.exp(x - base))
        # END SOLUTION

    start = jnp.float32(-jnp.inf), jnp.float32(0)
    top, total = lax.fori_loop(0, x_gmem.shape[1] // 512, step, start)
    out_gmem[m] = jnp.full((128,), top + jnp.log(jnp.where(total == 0.0, 1.0, total)))


def logsumexp_pallas(x):
    M, N = x.shape
    x = jnp.pad(x, ((0, 0), (0, -N % 512)), constant_values=-jnp.inf)
    out = plgpu.kernel(
        _logsumexp_body,
        out_type=jax.ShapeDtypeStruct((M, 128), x.dtype),
        grid=(M,),
        grid_names=("row",),
    )(x)
    return out[:, 0]


# %%
course.check("logsumexp", triton=logsumexp_triton, pallas=logsumexp_pallas)

# %% [markdown]
# ## 5. Softmax: a second walk
#
# For softmax the row must be read again: y needs the final `top` and `total`, and they are known
# only at the end. (A row that fits into a tile is different: it stays in the program, and is read
# once.)
#
# ### Predict
#
# Log-sum-exp read x once. Softmax of a long row reads x and writes y. With N elements in a row,
# how many times N elements does the online form move between memory and kernel? And how many does
# a naive form move, which reads once for `top`, once for the sum, and once for the result?

# %% answer="guess_moved"
course.predict("online", 3)
course.predict("naive", 4)

# %% [markdown]
# In Triton. Copy your loop, then write the second one.


# %% answer="long_softmax_triton"
@triton.jit
def _long_softmax_kernel(x_ptr, y_ptr, N, block: tl.constexpr):
    m = tl.program_id(0)
    top, total = float("-inf"), 0.0
    # BEGIN SOLUTION
    # 1. First walk: as above.
    # 2. Between: the last base, and 1 in place of a total of 0 (a row of -inf gives zeros).
    # 3. Second walk: load again, store exp(x - base) / total.
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        x = tl.load(x_ptr + m * N + n, mask=n < N, other=float("-inf"))
        new = tl.maximum(top, tl.max(x))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base))
        top = new
    last = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        x = tl.load(x_ptr + m * N + n, mask=n < N, other=float("-inf"))
        tl.store(y_ptr + m * N + n, tl.exp(x - last) / total, mask=n < N)
    # END SOLUTION


def long_softmax_triton(x):
    M, N = x.shape
    y = torch.empty_like(x)
    _long_softmax_kernel[(M,)](x, y, N, 512)
    return y


# %%
course.check("long_softmax", triton=long_softmax_triton)

# %% [markdown]
# In Pallas the second loop returns nothing: its step stores to `y_gmem[m, pl.ds(...)]` and
# returns `None`.


# %% answer="long_softmax_pallas"
def _long_softmax_body(x_gmem, y_gmem):
    m = lax.axis_index("row")
    blocks = x_gmem.shape[1] // 512

    def gather(i, state):
        top, total = state
        # BEGIN SOLUTION
        # 1. First walk: as above.
        # INSTEAD return top, total
        x = x_gmem[m, pl.ds(i * 512, 512)]
        new = jnp.maximum(top, jnp.max(x))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        return new, total * jnp.exp(top - base) + jnp.sum(jnp.exp(x - base))
        # END SOLUTION

    top, total = lax.fori_loop(0, blocks, gather, (jnp.float32(-jnp.inf), jnp.float32(0)))
    # BEGIN SOLUTION
    # 2. Between: the last base, and 1 in place of a total of 0.
    last = jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.where(total == 0.0, 1.0, total)
    # END SOLUTION

    def finish(i, _):
        # BEGIN SOLUTION
        # 3. Second walk.
        # INSTEAD return None
        block = pl.ds(i * 512, 512)
        y_gmem[m, block] = jnp.exp(x_gmem[m, block] - last) / total
        # END SOLUTION

    lax.fori_loop(0, blocks, finish, None)


def long_softmax_pallas(x):
    M, N = x.shape
    x = jnp.pad(x, ((0, 0), (0, -N % 512)), constant_values=-jnp.inf)
    y = plgpu.kernel(
        _long_softmax_body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(M,),
        grid_names=("row",),
    )(x)
    return y[:, :N]


# %%
course.check("long_softmax", triton=long_softmax_triton, pallas=long_softmax_pallas)

# %% [markdown]
# Here is the naive form, and what the meter says of it. It is right, and it moves a third more.


# %%
@triton.jit
def _naive_kernel(x_ptr, y_ptr, N, block: tl.constexpr):
    m = tl.program_id(0)
    top = float("-inf")
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        top = tl.maximum(top, tl.max(tl.load(x_ptr + m * N + n, n < N, float("-inf"))))
    total = 0.0
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        total += tl.sum(tl.exp(tl.load(x_ptr + m * N + n, n < N, float("-inf")) - top))
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        x = tl.load(x_ptr + m * N + n, n < N, float("-inf"))
        tl.store(y_ptr + m * N + n, tl.exp(x - top) / total, n < N)


def naive(x):
    y = torch.empty_like(x)
    _naive_kernel[(x.shape[0],)](x, y, x.shape[1], 512)
    return y


x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(2))
seen = {"naive": trace(naive, x), "yours": trace(long_softmax_triton, x)}
bars = {label: (t.read, t.written) for label, t in seen.items()}
course.show(pictures.traffic(bars, (x.nbytes, x.nbytes)))

# %%
course.reveal("naive", sum(bars["naive"]) / x.nbytes)
from triton_kernels import softmax  # this project's own, which is online

_, moved = course.metered("triton", softmax, {"x": x.numpy()}, {})
course.reveal("online", moved / x.nbytes)

# %% [markdown]
# ## 6. Splitting a row
#
# One program a row is fine when there are many rows. With two rows of 100000 elements, 2 of the
# 132 multiprocessors of an H200 have something to do. Then several programs share a row; each
# ends with a state of its own, and a last step merges the states. The formula is the one you
# know, since a state is all that is left of a block:
#
#     new   = max(top1, top2)
#     total = total1 * exp(top1 - new) + total2 * exp(top2 - new)
#
# The order of merging does not matter, up to rounding. So states may also be merged pair by pair,
# or each thread of a program may keep its own: this is what the project's kernel does below.

# %%
parts = [part.astype(np.float64) for part in np.array_split(row, 5)]
states = [(part.max(), np.exp(part - part.max()).sum()) for part in parts]


def merge(one, two):
    new = max(one[0], two[0])
    return new, one[1] * np.exp(one[0] - new) + two[1] * np.exp(two[0] - new)


def all_of(states):
    result = states[0]
    for state in states[1:]:
        result = merge(result, state)
    return result


for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
    top, total = all_of([states[i] for i in order])
    print(f"merged in the order {order}: log-sum-exp {top + np.log(total):.10f}")

# %% [markdown]
# ## 7. Parity
#
# Your two kernels for one problem, on logits of up to 10000. They need not agree to the last bit:
# their `exp` is not the same, and neither is the order in which a block is summed.

# %%
x = 1e4 * torch.rand(4, 1500, generator=torch.Generator().manual_seed(3))
one = guarded(long_softmax_triton, x).numpy()
two = np.asarray(guarded(long_softmax_pallas, jnp.asarray(x.numpy())))
print(f"largest difference: {np.abs(one - two).max():.1e}, rows sum to {one.sum(1).round(3)}")

# %% [markdown]
# ## 8. A real kernel
#
# The first walk of the project's softmax in both languages. You will find your three lines again.
# What is new:
#
# * **Many states a row.** Triton keeps one for each run of 8 columns, Pallas for each run of its
#   own. Nobody waits for anybody until the end, where they are merged: stage 3.
# * **Triton: `exp2`.** 2 to the power of x is a single instruction of the GPU, so x is multiplied
#   by log2(e) first.
# * **Pallas: a ring of slots.** The copy engine brings the next chunks while this one is summed.

# %%
course.twins("softmax", "_softmax_fwd_kernel", 2)

# %% [markdown]
# And what it is worth, for rows as long as the vocabulary of a language model, 151936 logits. The
# roof is the least number of bytes, x once and y once, at the speed of a copy. By the meter the
# online form cannot exceed two thirds of it, and the naive form one half. Who is above two thirds
# did not fetch all of x twice: the second walk found some of it in a cache, or in shared memory.

# %%
course.measured("softmax", "softmax_1024x151936")

# %% [markdown]
# ## 9. Explain it back
#
# **A.** Why does softmax subtract the largest value of the row? (1) It makes the result more
# accurate by centring it. (2) So that no `exp` overflows; the result is the same in mathematics.
# (3) So that the sum is 1.
#
# **B.** In the loop, `total` is not multiplied by `exp(top - new)`. When is the result still
# right? (1) Never. (2) If the largest value stands in the first block. (3) If all values are
# positive.
#
# **C.** Why can softmax of a long row not be done with one read of x? (1) Each y needs the sum of
# the whole row, and x is gone by then. (2) `exp` must be computed twice. (3) It can, with
# atomics.

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
# 1. A reduction walks over a row with a small state; log-sum-exp needs one read of it.
# 2. `exp` overflows at 89, so softmax subtracts the largest value of the row.
# 3. Online: state (top, total); when top grows, total is multiplied by exp(old top - new top).
# 4. Idle lanes hold what changes nothing: 0 for a sum, -inf for a maximum. Mind `-inf - (-inf)`.
# 5. States merge in any order: over blocks, threads, programs.
#
# Next: [05 RMSNorm forward](05_rms_norm_forward.ipynb), or, for the puzzles,
# [13 Number formats](13_number_formats.ipynb).

# %%
course.end()
