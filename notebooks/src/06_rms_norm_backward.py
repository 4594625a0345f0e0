# %% [markdown]
# # 06 RMSNorm backward
#
# 1. Derive the two gradients of RMSNorm, and check them without trusting the derivation.
# 2. Sum over all rows in two stages, and see why that gives the same bits every time.
# 3. Write the backward kernel, which reads everything once.
#
# **Time:** 50 minutes. **You need:** lesson 05, and the chain rule. No GPU.

# %% setup="yes"
import notebooks._course as course

course.begin("06")

import functools

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
# ## 1. What comes back
#
# Training changes each number so that the *loss*, one number that says how bad the model is, gets
# smaller. So a layer must answer: if I change this input a little, how much does the loss change?
# That is the *gradient*. From the layer above comes `dy`, the gradient of each y. From it the
# backward makes `dx` for each x, and `dw` for each weight.
#
# The forward, without a residual, for one row m:
#
#     rstd = (mean of x[n]^2 + eps)^(-1/2)       xh[n] = x[n] * rstd       y[n] = xh[n] * w[n]
#
# **dw.** w[n] is used in every row, each time as y = xh * w. All rows add up:
#
#     dw[n] = sum over rows of dy[n] * xh[n]
#
# **dx.** Let g[n] = dy[n] * w[n], the gradient of xh[n]. Now x[n] acts on two ways. On the short
# one, xh[n] = x[n] * rstd, it gets g[n] * rstd. On the long one it changes rstd, and with it
# every xh of the row: the derivative of rstd by x[n] is -rstd^3 * x[n] / N, and rstd gets the sum
# of g[j] * x[j]. Add the two, and write xh for x * rstd:
#
#     dx[n] = rstd * (g[n] - xh[n] * mean of g[j] * xh[j])
#
# ### Predict
#
# x = [1, 7], w = [1, 1], eps = 0, and dy = [1, 7] too: the loss would grow if y became longer.
# What is dx[0]? (Use the formula: rstd is 1/5. Or think: what does y do when x is doubled?)

# %% answer="guess_dx"
course.predict("dx", 0)

# %% [markdown]
# The formulas once more, as data. The next cells compute with them, and draw them.

# %%
formulas = {
    "xh": "x * rstd",
    "g": "dy * w",
    "mean": "mean_over_the_row(g * xh)",
    "dx": "rstd * (g - xh * mean)",
    "dw": "sum_over_rows(dy * xh)",
}


def backward(x, w, rstd, dy):
    known = {"x": x, "w": w, "rstd": rstd[:, None], "dy": dy}
    known["mean_over_the_row"] = lambda a: a.mean(1, keepdims=True)
    known["sum_over_rows"] = lambda a: a.sum(0)
    for name, formula in formulas.items():
        known[name] = eval(formula, {}, known)
    return known["dx"], known["dw"]


x = np.array([[1.0, 7.0]])
course.reveal("dx", round(backward(x, np.ones(2), np.array([1 / 5]), x)[0][0, 0], 9))

# %% [markdown]
# Nothing comes back, because y does not depend on the length of x at all. In general, without
# eps, RMSNorm's dx has no part in the direction of x: the subtraction takes it out.
#
# ### Do not believe a derivation
#
# There is a check that needs no chain rule. Move one input a little up and a little down, and see
# how much the loss changes: a *finite difference*. As a loss take the sum of dy * y; then dy is
# its gradient by y. Below, one element of x and one of w.


# %%
def forward(x, w):
    return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * w


rng = np.random.default_rng(6)
x, dy, w = rng.standard_normal((5, 8)), rng.standard_normal((5, 8)), rng.standard_normal(8)
dx, dw = backward(x, w, ((x * x).mean(1) + 1e-6) ** -0.5, dy)
step_x, step_w = np.zeros((5, 8)), np.zeros(8)
step_x[2, 3] = step_w[3] = 1e-5
by_x = (dy * (forward(x + step_x, w) - forward(x - step_x, w))).sum() / 2e-5
by_w = (dy * (forward(x, w + step_w) - forward(x, w - step_w))).sum() / 2e-5
print(f"dx[2, 3]: formula {dx[2, 3]:.6f}, finite difference {by_x:.6f}")
print(f"dw[3]:    formula {dw[3]:.6f}, finite difference {by_w:.6f}")

# %% [markdown]
# ## 2. The picture: what waits for what?
#
# An arrow says: is needed for. A heavy frame says: a sum over many elements. There are two, in
# different directions: `mean` along a row, `dw` across all rows. No arrow leads from one to the
# other.

# %%
places = {"x": (0, 0), "rstd": (0, 1), "dy": (0, 2.2), "w": (0, 3.4), "xh": (0.95, 0.5),
          "g": (0.95, 3.4), "mean": (1.85, 2.15), "dx": (3, 2), "dw": (3, 0.1)}  # fmt: skip
course.show(pictures.dependencies(formulas, places))

# %% [markdown]
# Read it as a kernel would. One row of x and dy, with w and rstd, is enough for that row of dx:
# the program reads a row, sums along it, and writes dx. That is lesson 05 again. On the way it
# has dy * xh, its row's share of dw, for nothing. But dw is complete only when every row was
# there.
#
# ### Saved or computed again?
#
# The backward needs rstd. The forward could save it, or the backward could compute it again from
# x, with one more sum along each row. rstd is one float32 for a row, next to nothing, so it is
# saved. xh is as large as x, so it is *not* saved: one multiplication brings it back.
#
# ### Predict
#
# Arrays of M x N again: how many does the backward read and write at least, w, rstd and dw
# forgotten? And with 16384 rows of 4096 in bfloat16: how many kilobytes is the saved rstd?

# %% answer="guess_arrays"
course.predict("arrays", 3)
course.predict("kilobytes", 65.5)

# %%
row = course.rows("rms_norm", "rms_norm_16384x4096", "bwd")["triton"]
M, N = row["sizes"]["R"], row["sizes"]["N"]
course.reveal("arrays", row["bytes"] / (M * N * 2), within=0.02)
course.reveal("kilobytes", M * 4 / 1000, within=0.05)

# %% [markdown]
# ## 3. A sum over all rows
#
# dw is a sum over rows that different programs own. Three ways:
#
# * **Everybody adds to dw.** Two programs read the same old value, both add, both store; one
#   share is lost. You know this race from lesson 02.
# * **Atomics.** `tl.atomic_add` reads, adds and stores in one step that nobody can divide.
#   Nothing is lost. But the order is whoever comes first, and may be another one in every run.
# * **Two stages.** A few programs share the rows. Each keeps its own sum in registers while it
#   walks, and stores it once, to a row of its own. A second kernel adds these rows in a fixed
#   order.
#
# Why does the order matter?
#
# ### Predict
#
# In float32: 16777216 + 1 + 1, added from left to right. And 1 + 1 + 16777216? (16777216 is 2^24,
# and float32 has 24 significant bits. Think of the 2048 of lesson 05.)

# %% answer="guess_order"
course.predict("large_first", 16777216)
course.predict("small_first", 16777218)

# %%
one, large = np.float32(1), np.float32(2**24)
course.reveal("large_first", float(large + one + one))
course.reveal("small_first", float(one + one + large))

# %% [markdown]
# So a sum of floats depends on the order. Here are 132 partial sums of one dw, added in a
# thousand different orders. None of the results is wrong, but which one you get is left to
# chance.

# %%
shares = rng.standard_normal(132).astype(np.float32)
results = {float(np.add.accumulate(rng.permutation(shares))[-1]) for _ in range(1000)}
print(f"{len(results)} different results, from {min(results):.7f} to {max(results):.7f}")

# %% [markdown]
# That is small, and yet training that cannot be repeated to the bit is hard to debug: is it a
# mistake, or only the order? The project's judge runs every kernel three times on a GPU, and
# calls it `nondeterministic` if one bit differs. On your laptop it cannot know: interpreters run
# the programs in order, so atomics look well-behaved there.
#
# ### The picture: two stages
#
# Column sums of 10 rows and 8 columns. Three programs share the rows: program p takes the rows p,
# p + 3, p + 6, and so on. Then the two programs of a second kernel, A and B, add the three
# partial rows; each has four columns.


# %% setup="yes"
@triton.jit
def _total_kernel(partial_ptr, dw_ptr, P, N, block: tl.constexpr):
    n = tl.program_id(0) * block + tl.arange(0, block)
    dw = tl.zeros((block,), tl.float32)
    for p in range(P):  # the same order every time
        dw += tl.load(partial_ptr + p * N + n, mask=n < N, other=0.0)
    tl.store(dw_ptr + n, dw, mask=n < N)


def _total_body(partial_gmem, dw_gmem):
    n = pl.ds(lax.axis_index("columns") * 128, 128)

    def step(p, dw):
        return dw + partial_gmem[p, n]

    dw_gmem[n] = lax.fori_loop(0, partial_gmem.shape[0], step, jnp.zeros(128))


# %%
@triton.jit
def _partial_kernel(x_ptr, partial_ptr, M, N, block: tl.constexpr):
    n = tl.arange(0, block)
    share = tl.zeros((block,), tl.float32)
    for m in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        share += tl.load(x_ptr + m * N + n, mask=n < N, other=0.0)
    tl.store(partial_ptr + tl.program_id(0) * N + n, share, mask=n < N)


def column_sums(x):
    M, N = x.shape
    total, partial = torch.empty(N), torch.empty(3, N)
    _partial_kernel[(3,)](x, partial, M, N, triton.next_power_of_2(N))
    _total_kernel[(triton.cdiv(N, 4),)](partial, total, 3, N, 4)
    return total, partial


course.show(pictures.two_stages(trace(column_sums, torch.ones(10, 8))))

# %% [markdown]
# ### Predict
#
# The GPU of our records has 132 multiprocessors, and one program for each. In float32 and for
# 4096 columns: how many megabytes do their partial sums have? And how many if every one of 16384
# rows stored its share?

# %% answer="guess_partial"
course.predict("by_program", 2.16)
course.predict("by_row", 268)

# %%
course.reveal("by_program", row["facts"]["sms"] * N * 4 / 1e6, within=0.05)
course.reveal("by_row", M * N * 4 / 1e6, within=0.05)
print(f"All that the backward must move is {row['bytes'] / 1e6:.0f} MB.")

# %% [markdown]
# ## 4. Do it in Triton
#
# The first kernel is yours; the second is the `_total_kernel` above. Program p starts with row p
# and goes on in steps of the number of programs. w is loaded once, before the loop.


# %% answer="rms_norm_backward_triton"
@triton.jit
def _rms_norm_backward_kernel(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, dx_ptr, partial_ptr, M, N, block: tl.constexpr
):
    p = tl.program_id(0)
    n = tl.arange(0, block)
    w = tl.load(w_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    dw = tl.zeros((block,), tl.float32)
    for m in tl.range(p, M, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + m)
        # BEGIN SOLUTION
        # 1. Load this row of x and of dy, to float32.
        # 2. xh, g, and the mean of g * xh over the row.
        # 3. Store dx. Add this row's share to dw.
        x = tl.load(x_ptr + m * N + n, mask=n < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m * N + n, mask=n < N, other=0.0).to(tl.float32)
        xh = x * rstd
        g = dy * w
        mean = tl.sum(g * xh) / N
        tl.store(dx_ptr + m * N + n, rstd * (g - xh * mean), mask=n < N)
        dw += dy * xh
        # END SOLUTION
    # BEGIN SOLUTION
    # 4. Store dw to row p of the partial sums.
    tl.store(partial_ptr + p * N + n, dw, mask=n < N)
    # END SOLUTION


def rms_norm_backward_triton(x, w, rstd, dy):
    M, N = x.shape
    programs = min(M, 4)
    dx, dw = torch.empty_like(x), torch.empty(N)
    partial = torch.empty(programs, N)
    block = triton.next_power_of_2(N)
    _rms_norm_backward_kernel[(programs,)](x, w, rstd, dy, dx, partial, M, N, block)
    _total_kernel[(triton.cdiv(N, 128),)](partial, dw, programs, N, 128)
    return dx, dw


# %%
course.check("rms_norm_backward", triton=rms_norm_backward_triton)

# %% [markdown]
# dx and dw are both compared with float64. dw is judged as float32, although x and dy may be
# float16: a dw that was summed in 16 bits does not get through. Launches are counted, two of
# them, and bytes: about a fifth above the least is right, because of the partial sums and of w
# for each program.
#
# ## 5. Do it in Pallas
#
# The loop is `lax.fori_loop`, as in lesson 04, and its state is dw. `step` returns the new one.


# %% answer="rms_norm_backward_pallas"
def _rms_norm_backward_body(x_gmem, w_gmem, rstd_gmem, dy_gmem, dx_gmem, partial_gmem, *, N):
    p, programs = lax.axis_index("program"), lax.axis_size("program")
    w = w_gmem[...].astype(jnp.float32)

    def step(i, dw):
        m = p + i * programs
        rstd = rstd_gmem[m]
        # BEGIN SOLUTION
        # 1. to 3. as in Triton. What do you return?
        # INSTEAD return dw
        x = x_gmem[m, :].astype(jnp.float32)
        dy = dy_gmem[m, :].astype(jnp.float32)
        xh = x * rstd
        g = dy * w
        mean = jnp.sum(g * xh) / N
        dx_gmem[m, :] = (rstd * (g - xh * mean)).astype(dx_gmem.dtype)
        return dw + dy * xh
        # END SOLUTION

    rows = lax.div(x_gmem.shape[0] - p + programs - 1, programs)
    dw = lax.fori_loop(0, rows, step, jnp.zeros_like(w))
    # BEGIN SOLUTION
    # 4. Store dw to row p of the partial sums.
    # INSTEAD del dw
    partial_gmem[p, :] = dw
    # END SOLUTION


def rms_norm_backward_pallas(x, w, rstd, dy):
    M, N = x.shape
    x, dy = (jnp.pad(a, ((0, 0), (0, -N % 128))) for a in (x, dy))
    w = jnp.pad(w, (0, -N % 128))
    programs = min(M, 4)
    dx, partial = plgpu.kernel(
        functools.partial(_rms_norm_backward_body, N=N),
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, w.size), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("program",),
    )(x, w, rstd, dy)
    dw = plgpu.kernel(
        _total_body,
        out_type=jax.ShapeDtypeStruct((w.size,), jnp.float32),
        grid=(w.size // 128,),
        grid_names=("columns",),
    )(partial)
    return dx[:, :N], dw[:N]


# %%
course.check("rms_norm_backward", triton=rms_norm_backward_triton, pallas=rms_norm_backward_pallas)

# %% [markdown]
# ## 6. Parity
#
# Your two kernels against a third party: `torch.autograd`, which derives the backward by itself
# from a forward in float64. It knows nothing of our formulas.

# %%
x, dy = torch.randn(2, 24, 640, generator=torch.Generator().manual_seed(7)).float()
w = torch.linspace(-1, 1, 640)
rstd = torch.rsqrt((x * x).mean(1) + 1e-6)
x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
y = x64 * torch.rsqrt((x64 * x64).mean(1, keepdim=True) + 1e-6) * w64
true = torch.autograd.grad(y, (x64, w64), dy.double())
arrays = (x, w, rstd, dy)
mine = guarded(rms_norm_backward_triton, *arrays)
theirs = guarded(rms_norm_backward_pallas, *(jnp.asarray(a.numpy()) for a in arrays))
for i, name in enumerate(("dx", "dw")):
    size = true[i].abs().max()
    for twin, found in (("Triton", mine[i]), ("Pallas", torch.tensor(np.asarray(theirs[i])))):
        print(f"{name} in {twin}: largest error {(found - true[i]).abs().max() / size:.0e}")

# %% [markdown]
# ## 7. A real kernel
#
# The main loop and the epilogue of the project's backward. Here h is what you called x: with a
# residual, the forward normalised h. The mean is `total * rstd / N`, because g is multiplied by h
# and not by xh: one multiplication for a row instead of one for each element.

# %%
course.twins("rms_norm", "_rms_norm_bwd_kernel", 2)

# %%
course.twins("rms_norm", "_rms_norm_bwd_kernel", 3)

# %% [markdown]
# And the second stage. You saw it in lesson 01 without knowing what it was for.

# %%
course.twins("rms_norm", "_rms_norm_dw_kernel")

# %% [markdown]
# What both are worth, and how the time of the two kernels divides, from the same record.

# %%
course.measured("rms_norm", "rms_norm_16384x4096", "bwd")

# %%
for launch in row["launches"]:
    print(f"{launch['name']}: {launch['grid'][0]} programs, {launch['share']:.0%} of the time")

# %% [markdown]
# ## 8. Explain it back
#
# **A.** A kernel stores dx = rstd * g and forgets the rest. What did it assume? (1) That w is 1.
# (2) That rstd does not depend on x. (3) That eps is 0.
#
# **B.** With atomics nothing is lost. Why does the project not use them for dw? (1) The order of
# the additions is left to chance, and with it the last bits. (2) Atomics round to 16 bits. (3)
# They need a second kernel.
#
# **C.** Why does a program walk over many rows, instead of one program for each? (1) A GPU cannot
# start 16384 programs. (2) So that rstd can be shared. (3) So that there are few partial sums to
# write and read again.

# %% answer="guess_explain"
course.predict("A", 2)
course.predict("B", 1)
course.predict("C", 3)

# %%
course.reveal("A")
course.reveal("B")
course.reveal("C")

# %% [markdown]
# ## In five lines
#
# 1. dx = rstd * (g - xh * mean(g * xh)) with g = dy * w; dw = sum over rows of dy * xh.
# 2. Finite differences check a gradient without a derivation.
# 3. Save what is small and slow to get again (rstd), recompute what is large and quick (xh).
# 4. dw in two stages: few programs, each with a sum of its own; then one fixed order.
# 5. Sums of floats depend on the order. Atomics leave it to chance; a fixed order repeats.
#
# Next: [the list of lessons](../notebooks/README.md).

# %%
course.end()
