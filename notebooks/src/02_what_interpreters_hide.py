# %% [markdown]
# # 02 What the interpreters do not tell you
#
# 1. Know what a run on a laptop proves about a kernel, and what it does not.
# 2. Find three bugs that give the right answer here and a wrong one on a GPU, and one that lies
#    the other way round.
# 3. Learn the tools that show them: guard bands, a trace, the race detector.
#
# **Time:** 35 minutes. **You need:** lesson 01. No GPU.

# %% setup="yes"
import notebooks._course as course

course.begin("02")

import jax
import jax.numpy as jnp
import torch
import triton
import triton.language as tl
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from notebooks import _pictures as pictures
from notebooks import _probes as probes
from notebooks._tracer import guarded

# %% [markdown]
# ## 1. Two interpreters
#
# In lesson 01 every kernel ran on the CPU. Triton's interpreter turns each program into NumPy
# calls and runs one program after the other. Pallas' interpreter goes further: it keeps shared
# memory and barriers as a GPU has them, and a *race detector* looks for two accesses that nothing
# puts in order.
#
# Both are made for finding mistakes, and both are silent about some. If you know which, you can
# trust the rest.
#
# ### Predict
#
# *bfloat16* is a number in 16 bits: float32 with the lower half of its bits gone. In Triton's
# interpreter a product of two bfloat16 matrices is wrong, and says nothing. By how many powers of
# ten is it too large? (Nothing so far tells you: guess.) And when a float32 becomes a bfloat16
# there, the lower half is just cut off, where a GPU rounds: in how many of 100 cases is the
# result not the nearest bfloat16?

# %% answer="guess_bf16"
course.predict("powers_of_ten", 10)
course.predict("percent_of_casts", 50)

# %%
import math

course.reveal("powers_of_ten", round(math.log10(probes.bf16_product_error())), within=0.25)
course.reveal("percent_of_casts", round(100 * probes.wrong_casts(torch.bfloat16)), within=0.1)

# %% [markdown]
# The interpreter keeps a bfloat16 as the 16-bit integer that its bits would make, and multiplies
# those integers. And what is cut off leaves the neighbour nearer to zero, but half of all numbers
# lie nearer to the other one.
#
# ## 2. The picture: what is seen, and by whom?
#
# Each cell of the first two columns was found just now, by a small kernel that does the forbidden
# thing. The last column is what a GPU does, and no GPU is asked here: it is what is known
# ([silent lies](../docs/silent-lies.md) has more). *Unseen* is the dangerous word: the kernel is
# wrong and the answer is right, here.

# %%
note = "Columns 1 and 2: found now. Column 3: known."
course.show(pictures.truth_table(probes.table(), probes.COLUMNS, "Who sees what", note))

# %% [markdown]
# The two complete each other. Triton's side is blind where Pallas' side looks, and this course
# adds to Triton what is missing: `course.check` puts guard bands of poison around every array,
# and notes which program touches which address.
#
# Now four kernels, each with one bug. Run each as it stands, look at what it gives, and read what
# the check says. Then fix it, and run the cell and the check again.
#
# ## 3. Bug A, Triton: past the end
#
# `out = x + 1`, 64 elements a program.


# %% answer="add_one_triton"
@triton.jit
def _add_one_kernel(x_ptr, out_ptr, N, block: tl.constexpr):
    n = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + n, mask=n < N, other=0.0)
    # BEGIN SOLUTION
    # This line has the bug.
    # INSTEAD tl.store(out_ptr + n, x + 1)
    tl.store(out_ptr + n, x + 1, mask=n < N)
    # END SOLUTION


def add_one_triton(x):
    out = torch.empty_like(x)
    _add_one_kernel[(triton.cdiv(x.shape[0], 64),)](x, out, x.shape[0], 64)
    return out


# %% [markdown]
# `guarded` runs it with spare memory on both sides of every array, so that a stray store does no
# harm.

# %%
print(guarded(add_one_triton, torch.zeros(5)))
course.check("add_one", triton=add_one_triton)

# %% [markdown]
# `[1, 1, 1, 1, 1]` was right before your fix, too. But 59 lanes stored to memory that is not the
# output's. On a GPU that is some other tensor of your model, which is now slightly wrong.
#
# ## 4. Bug B, Triton: bfloat16
#
# A product of two square matrices. This one lies the other way round: it is right on a GPU and
# wrong here, so for once it is the interpreter you work around. Let the numbers be float32 before
# they are multiplied: a bfloat16 fits into a float32 exactly. `input_precision="ieee"` asks for
# real float32 products; a GPU would else round the operands to fewer bits.
#
# When numbers are wrong, the check gives the *error*, which is the distance to the right answer
# over its size, and the most that rounding explains. *The model's own* is what the same
# mathematics, done in float32, loses on these numbers.


# %% answer="bf16_product_triton"
@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    # BEGIN SOLUTION
    # Make a and b float32 first: x.to(tl.float32).
    # INSTEAD c = tl.dot(a, b, input_precision="ieee")
    c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    # END SOLUTION
    tl.store(c_ptr + i, c)


def bf16_product_triton(a, b):
    c = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    _product_kernel[(1,)](a, b, c, a.shape[0])
    return c


# %%
course.check("bf16_product", triton=bf16_product_triton)

# %% [markdown]
# This project does it differently, because on a GPU the fix would be slow: under the interpreter
# its kernels refuse bfloat16 and are tested in float16. This is what they say:

# %%
import textwrap

from triton_kernels import softmax

try:
    softmax(torch.zeros(2, 8, dtype=torch.bfloat16))
except TypeError as error:
    print(textwrap.fill(str(error), 96))

# %% [markdown]
# ## 5. Bug C, Pallas: nobody waits
#
# The copy engine works on its own. `copy_gmem_to_smem` only *starts* a copy, and the kernel goes
# on; whoever reads shared memory before `barrier_wait` may read what was there before.
#
# `out = 2 * x`, 128 elements a block, for arrays of whole blocks, so there is no edge. The way
# back needs no copy engine: `out_gmem[part] = ...` stores at once.


# %% answer="double_pallas"
def _double_body(x_gmem, out_gmem, x_smem, arrived):
    part = pl.ds(lax.axis_index("part") * 128, 128)
    plgpu.copy_gmem_to_smem(x_gmem.at[part], x_smem, arrived)
    # BEGIN SOLUTION
    # Something is missing before x_smem may be read.
    plgpu.barrier_wait(arrived)
    # END SOLUTION
    out_gmem[part] = 2 * x_smem[...]


def double_pallas(x):
    return plgpu.kernel(
        _double_body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM((128,), x.dtype), plgpu.Barrier()],
        grid=(x.shape[0] // 128,),
        grid_names=("part",),
    )(x)


# %%
x = jnp.arange(384.0)
print(bool((guarded(double_pallas, x) == 2 * x).all()))
course.check("double", pallas=double_pallas)

# %% [markdown]
# `True` even without the wait: in the interpreter the copy happens to be finished in time. The
# race detector does not look at values. It asks of every two accesses to the same memory whether
# something, a barrier for example, puts one before the other.
#
# ## 6. Bug D, Triton: programs that count on their order
#
# Row sums. Each program takes 64 columns of a row, adds them up, and adds that to what is already
# in `out`. In the interpreter the programs of a row come one after the other.
#
# ### Predict
#
# On a GPU they run at once. Say 5 programs share a row of 300 ones. All of them load `out`, which
# is 0; then all of them add their part and store, the one with the last columns last. What is in
# `out`?

# %% answer="guess_sum"
course.predict("sum", 44)

# %%
out = 0
parts = [64, 64, 64, 64, 44]
loaded = [out for _ in parts]  # all load first
for seen, part in zip(loaded, parts, strict=True):  # then all store
    out = seen + part
course.reveal("sum", out)

# %% [markdown]
# So nobody may meet: let one program take a whole row. A kernel may have a loop,
# `for start in range(0, N, block):`, and a sum starts before it as what it will be: `0.0` for one
# number, `tl.zeros((block,), tl.float32)` for one number a lane.


# %% answer="row_sums_triton"
@triton.jit
def _row_sums_kernel(x_ptr, out_ptr, N, block: tl.constexpr):
    # BEGIN SOLUTION
    # Let one program take a whole row: walk over its blocks, keep a running sum, store once.
    # INSTEAD m, n = tl.program_id(0), tl.program_id(1) * block + tl.arange(0, block)
    # INSTEAD part = tl.sum(tl.load(x_ptr + m * N + n, mask=n < N, other=0.0))
    # INSTEAD tl.store(out_ptr + m, tl.load(out_ptr + m) + part)
    m = tl.program_id(0)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, N, block):
        n = start + tl.arange(0, block)
        total += tl.load(x_ptr + m * N + n, mask=n < N, other=0.0)
    tl.store(out_ptr + m, tl.sum(total))
    # END SOLUTION


def row_sums_triton(x):
    M, N = x.shape
    out = torch.zeros(M, dtype=x.dtype, device=x.device)
    # BEGIN SOLUTION
    # The grid changes with it.
    # INSTEAD grid = (M, triton.cdiv(N, 64))
    grid = (M,)
    # END SOLUTION
    _row_sums_kernel[grid](x, out, N, 64)
    return out


# %%
print(guarded(row_sums_triton, torch.ones(2, 300)))
course.check("row_sums", triton=row_sums_triton)

# %% [markdown]
# `[300, 300]` from the start, in this order of programs. The check saw that two programs store to
# the same element. The Pallas interpreter finds the same mistake by itself, when it is run with
# its race detector on:


# %%
def _meeting_body(x_gmem, out_gmem):
    out_gmem[...] = out_gmem[...] + x_gmem[...]


def meeting(x):
    kernel = plgpu.kernel(
        _meeting_body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(2,),
        grid_names=("block",),
    )
    return kernel(x)


from parity import frameworks
from parity.frameworks import jax as pallas_side

try:
    pallas_side.run(meeting, [jnp.ones(128)], {})
except frameworks.DataRace:
    print("a race: two blocks store to the same elements, and nothing orders them")

# %% [markdown]
# ## 7. Parity: what the laptop proves
#
# This is how the project judges its own softmax without a GPU: both twins, against the same
# mathematics in float64, with the race detector on.

# %%
from parity.check import check
from parity.problems import problem

described = problem("softmax")
for row in check(described, described.workload("ci"), passes=("fwd",)):
    print(f"{row.impl}: {'pass' if row.ok else row.reason}, {row.dtype}")

# %% [markdown]
# It proves the indexing, the masks, the mathematics, and in Pallas the order of all accesses, on
# the sizes that were tried. It proves nothing about bfloat16 in Triton, registers, speed, or
# races in Triton: the watch that saw bug D is this course's, and `parity check` has none. Two
# more gates close most of that gap: `parity compile` compiles both twins for a Hopper GPU on a
# machine without one, and `parity check` on a GPU runs everything three times and wants the same
# bits each time. This row was checked there, in bfloat16; the error is what rounding to bfloat16
# costs:

# %%
row = course.rows("softmax", "softmax_16384x4096")["triton"]
print(f"{row['workload']}, {row['dtype']}: check {row['check']}, error {row['error']:.2e}")
print(course.stamp(row))

# %% [markdown]
# ## 8. A real kernel
#
# The first loop of softmax's backward, in both languages. Look for what this lesson was about: in
# Triton the mask (`inside`) and the value that idle lanes get; in Pallas the `barrier_wait`
# before shared memory is read, and the `commit_smem` before it is filled again. It orders reads
# of shared memory, too: a copy that is started after it finds them done.

# %%
course.twins("softmax", "_softmax_bwd_kernel", 2)

# %% [markdown]
# ## 9. Explain it back
#
# **A.** A Triton kernel passes all tests on your laptop. On the GPU each run gives slightly
# different numbers. What do you look for first? (1) Two programs that touch one element. (2)
# bfloat16. (3) A wrong formula.
#
# **B.** What does the Triton interpreter prove? (1) That the kernel has no races. (2) That
# indices and masks are right on the sizes you tried, if there are guard bands. (3) That it is
# fast.
#
# **C.** Why are the sizes in tests odd numbers like 19 and 261? (1) They are quick. (2) They
# cross the edge of every tile. (3) GPUs like them.

# %% answer="guess_explain"
course.predict("A", 1)
course.predict("B", 2)
course.predict("C", 2)

# %%
course.reveal("A")
course.reveal("B")
course.reveal("C")

# %% [markdown]
# ## In five lines
#
# 1. A right answer in an interpreter is a beginning, not a proof.
# 2. Triton's interpreter: bfloat16 and float8 are wrong, stray stores and races are unseen.
# 3. Pallas' interpreter refuses stray stores, fills new memory with NaN, and finds races.
# 4. Every program owns its output: if two touch one element, the order decides, and there is
#    none.
# 5. Guard bands, odd sizes, a trace and the compile gate find on a laptop most of what a GPU
#    would punish.
#
# Next: [03 Memory, bytes and the roofline](03_memory_and_roofline.ipynb).

# %%
course.end()
