# %% [markdown]
# # What is a CP decomposition, how is it computed, and when does it fail?
#
# A convolution kernel is a table of numbers with four indices. This notebook takes such
# a table apart into **rank-one** pieces, the simplest tables there are, and puts it
# together again. Everything that comes later, layers, training and truncation, is built
# from these pieces.
#
# **After this notebook you can**
#
# 1. build a tensor from outer products by hand, and say how many numbers that saves;
# 2. compute a decomposition with the power method and with alternating least squares,
#    and say which of the two can be cut to fewer pieces;
# 3. recognise a *degenerate* decomposition, a small error made of huge, cancelling
#    pieces, and know what to do about it.
#
# **You need** matrices and vectors, a little Python, and no knowledge of tensors.
#
# **Time, measured on two CPU cores:** 0.5 minutes; fast mode 0.3.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import cpnb
from cpnb.cp import canonical_gauge, component_gram, khatri_rao
from cpnb.explore import explore, plots
from cpnb.methods import bounded_als, degeneracy
from cpnb.train import fast_mode

plots.use_style()
plt.rcParams["figure.dpi"] = 96  # many figures, and the notebook stays below 1 MB
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
print("fast mode" if FAST else "full mode")


# %% [markdown]
# The exercises check themselves with this small function.


# %%
def check(name, got, expected):
    """Say whether an exercise is solved."""
    if got is None:
        print(f"{name}: not solved yet, the function returned None.")
        return
    torch.testing.assert_close(got, expected)
    print(f"{name}: correct.")


# %% [markdown]
# ## 1. Outer products by hand
#
# Take three vectors of two numbers each. Their **outer product** is the 2×2×2 tensor of
# all products of one entry from each:
#
# $$T_{ijk} = a_i\, b_j\, c_k .$$
#
# **Predict:** for $a=(1,2)$, $b=(3,1)$, $c=(1,-1)$, what is $T_{100}$, the product of
# the *second* entry of $a$ with the *first* entries of $b$ and $c$? (Indices start at
# zero, as in Python.)

# %%
a, b, c = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, -1.0]])

T = torch.zeros(2, 2, 2)
for i in range(2):
    for j in range(2):
        for k in range(2):
            T[i, j, k] = a[i] * b[j] * c[k]
print("T[1, 0, 0] =", T[1, 0, 0].item())
print("slice k = 0:", T[:, :, 0].tolist())
print("slice k = 1:", T[:, :, 1].tolist())

# %% [markdown]
# The slice for $k=1$ is the slice for $k=0$ times $-1$, because $c=(1,-1)$. In an outer
# product *all* slices are multiples of one another: a tensor of this kind has **rank
# one**. The three loops are one line for `torch.einsum`:

# %%
torch.testing.assert_close(torch.einsum("i,j,k->ijk", a, b, c), T)
print("einsum gives the same tensor")

# %% [markdown]
# ## 2. CP: a weighted sum of outer products
#
# Adding a second outer product, with weights $\lambda_1 = 1$ and $\lambda_2 = 4$, gives
# a tensor that is no longer of rank one:
#
# $$T = \sum_{r=1}^{R} \lambda_r\; a_r \circ b_r \circ c_r .$$
#
# This is a **CP form** (canonical polyadic form, Hitchcock 1927; survey: Kolda and
# Bader 2009, [doi:10.1137/07070111X](https://doi.org/10.1137/07070111X)). The vectors
# are kept as columns of **factor matrices**, one matrix per mode; the number of columns
# is the rank $R$.

# %%
lam = torch.tensor([1.0, 4.0])
A = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # columns a_1 and a_2
B = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
C = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])

first, second = (
    lam[r] * torch.einsum("i,j,k->ijk", A[:, r], B[:, r], C[:, r]) for r in (0, 1)
)
total = first + second
print("slice k = 0:", total[:, :, 0].tolist())
print("slice k = 1:", total[:, :, 1].tolist())

# %% [markdown]
# Check the entry $T_{010}$ by hand:
# $1\cdot(1\cdot1\cdot1) + 4\cdot(1\cdot1\cdot2) = 9$. The library's `cp_to_kernel` does
# the same sum for any number of modes and components:

# %%
torch.testing.assert_close(cpnb.cp_to_kernel(lam, [A, B, C]), total)
print("cp_to_kernel gives the same tensor")

# %%
fig, axes = plt.subplots(1, 6, figsize=(10, 2.2))
terms = {"first": first, "second": second, "sum": total}
for n, (name, tensor) in enumerate(terms.items()):
    for k in range(2):
        ax, picture = axes[2 * n + k], tensor[:, :, k]
        image = ax.imshow(picture, cmap="RdBu_r", vmin=-9, vmax=9)
        for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            shade = "white" if abs(picture[i, j]) > 5 else "black"
            ax.text(j, i, f"{picture[i, j]:g}", ha="center", va="center", color=shade)
        ax.set(title=f"{name}, k = {k}", xticks=[], yticks=[])
fig.colorbar(image, ax=axes, shrink=0.8)
plt.show()

for name, tensor in terms.items():
    print(
        name,
        "rows of all slices span",
        int(torch.linalg.matrix_rank(tensor.reshape(2, 4))),
        "dimension(s)",
    )

# %% [markdown]
# **What to see:** in each of the two terms the second slice is a multiple of the first;
# in their sum it is not.
#
# ### One form among many
#
# Doubling $a_1$ and halving $c_1$ changes nothing in the sum, and the order of the
# terms does not matter either. We therefore agree on *unit columns*: each column is
# divided by its length and the lengths are collected in $\lambda$. For the first term
# that is $\|a_1\|\|b_1\|\|c_1\| = \sqrt5\,\sqrt{10}\,\sqrt2 = 10$.

# %%
gauge_lam, gauge_factors = canonical_gauge(lam, [A, B, C])
again_lam, _ = canonical_gauge(lam, [2 * A, B, C / 2])
print("λ with unit columns:", [round(value, 4) for value in gauge_lam.tolist()])
print("after rescaling    :", [round(value, 4) for value in again_lam.tolist()])
torch.testing.assert_close(cpnb.cp_to_kernel(gauge_lam, gauge_factors), total)

# %% [markdown]
# ### What it saves
#
# A 2×2×2 tensor has 8 numbers, and each component costs $2+2+2+1 = 7$: nothing is
# saved. The picture changes as tensors grow, because the tensor grows with the
# *product* of the sizes and a component only with their *sum*. The rank at which both
# cost the same is the **break-even rank**.

# %%
print("shape             numbers  per component  break-even rank")
for shape in [(2, 2, 2), (32, 16, 3, 3), (256, 128, 3, 3)]:
    dense, component = torch.Size(shape).numel(), sum(shape) + 1
    rank = cpnb.cp.break_even_rank(shape)
    print(f"{shape!s:16} {dense:8,} {component:14} {rank:16}")

# %% [markdown]
# ### Exercise 1: rebuild a tensor from its CP form
#
# Write `my_kernel(lam, factors)` for three modes. The specification, in loops:
#
# ```text
# for i, j, k:   T[i,j,k] = Σ_r  lam[r] · A[i,r] · B[j,r] · C[k,r]
# ```


# %%
def my_kernel(lam, factors):
    """Sum the rank-one terms of three factor matrices."""
    # your code here: factors is the list [A, B, C]
    return None


# %%
check("exercise 1", my_kernel(lam, [A, B, C]), total)


# %% tags=["solution"]
def my_kernel_solution(lam, factors):
    """Sum the rank-one terms of three factor matrices."""
    A, B, C = factors
    return torch.einsum("r,ir,jr,kr->ijk", lam, A, B, C)


check("exercise 1, solution", my_kernel_solution(lam, [A, B, C]), total)

# %% [markdown]
# ## 3. The kernel of a trained network
#
# Now a real tensor. We train a small network on handwritten digits and look at the
# kernel of its second convolution: 32 output channels, 16 input channels, 3×3 pixels.

# %%
data = cpnb.load_data("digits")
EPOCHS = 4 if FAST else 10


def kernels_of_a_network(seed, progress=False):
    """Kernel of the second convolution before and after training, in float64."""
    net = cpnb.DigitsNet(generator=torch.Generator().manual_seed(seed))
    start = net.conv2.weight.detach().double().clone()
    run = cpnb.fit(net, data, epochs=EPOCHS, seed=seed, progress=progress)
    return start, net.conv2.weight.detach().double(), run


untrained, trained, run = kernels_of_a_network(seed=0, progress=True)
print(f"validation accuracy {run.history[-1]['validation_accuracy']:.1%}")
print("kernel", tuple(trained.shape), "with norm", round(trained.norm().item(), 3))

# %% [markdown]
# A four-way tensor does not fit on paper, so we lay it out as a mosaic: one 3×3 tile
# for each pair of an input channel (row of tiles) and an output channel (column of
# tiles); 8 and 14 of them are shown. Beside it are the first rank-one component and the
# sum of the first 32, found by the method of the next section.
#
# **Predict:** a rank-one kernel is $a_o b_i\,(c_h d_w)$. What will its tiles have in
# common?

# %%
found = cpnb.power_method(trained, 84, generator=torch.Generator().manual_seed(0))


def first_terms(result, count):
    """Kernel of the first components of a decomposition."""
    return cpnb.cp_to_kernel(result.lam[:count], [f[:, :count] for f in result.factors])


def mosaic(kernel):
    """Tiles of 8 input channels (rows) and 14 output channels (columns)."""
    tiles = torch.nn.functional.pad(kernel[:14, :8], (0, 1, 0, 1), value=torch.nan)
    return tiles.permute(1, 2, 0, 3).reshape(8 * 4, 14 * 4)[:-1, :-1]


# %%
shown = {
    "trained kernel": trained,
    "its first component": first_terms(found, 1),
    "its first 32 components": first_terms(found, 32),
}
fig, axes = plt.subplots(1, 3, figsize=(10, 2.6))
limit = 0.7 * trained.abs().max().item()
for ax, (name, kernel) in zip(axes, shown.items(), strict=True):
    image = ax.imshow(mosaic(kernel), cmap="RdBu_r", vmin=-limit, vmax=limit)
    error = cpnb.relative_error(trained, kernel)
    ax.set(title=f"{name}\nrelative error {error:.2f}", xticks=[], yticks=[])
    ax.set(xlabel="output channels", ylabel="input channels")
    ax.spines[:].set_visible(False)
fig.colorbar(image, ax=axes, shrink=0.8, extend="both")
plt.show()

# %% [markdown]
# **What to see:** in the rank-one kernel every tile is the *same* 3×3 stamp, only
# stronger, weaker or with the sign flipped; 32 such kernels together begin to look like
# the trained one.
#
# The stamp is $c_h d_w$, and the strengths are $a_o$ and $b_i$. Here are the pieces of
# the first four components.

# %%
fig, axes = plt.subplots(2, 4, figsize=(10, 3.2))
a_all, b_all, c_all, d_all = found.factors
for r, (top, bottom) in enumerate(axes.T):
    stamp = torch.outer(c_all[:, r], d_all[:, r])
    image = top.imshow(stamp, cmap="RdBu_r", vmin=-1, vmax=1)
    top.set(title=f"component {r + 1}, λ = {found.lam[r]:.2f}", xticks=[], yticks=[])
    bottom.bar(range(32), a_all[:, r], color="C0", label="$a$, outputs")
    bottom.bar(range(33, 49), b_all[:, r], color="C1", label="$b$, inputs")
    bottom.set(ylim=(-0.9, 0.6), xticks=[])
    bottom.axhline(0, color="#333333", linewidth=0.5)
axes[1, 0].legend(fontsize="x-small", ncols=2, loc="lower left")
fig.colorbar(image, ax=axes[0], shrink=0.8)
plt.show()

# %% [markdown]
# **What to see:** each component pairs one small stamp (top) with one pattern over the
# output channels and one over the input channels (bottom); all four vectors have length
# one, and $\lambda$ says how much of the component there is.
#
# ## 4. The power method
#
# How are such components found? The best rank-one approximation
# $\lambda\, a\circ b\circ c\circ d$ with unit vectors has the largest possible
#
# $$\lambda = \sum_{oihw} W_{oihw}\, a_o b_i c_h d_w .$$
#
# With three of the vectors held fixed, this sum is an inner product with the fourth,
# and the best unit vector simply points along what the others leave over. Doing this
# for one vector after the other, again and again, is the **power method** (for matrices
# it is the power iteration that finds the largest singular value). No sweep can lower
# $\lambda$.


# %%
def one_component(kernel, a, b, c, d, sweeps):
    """Power sweeps from given vectors; λ after each sweep, and the vectors."""
    history = []
    for _ in range(sweeps):
        a = torch.einsum("oihw,i,h,w->o", kernel, b, c, d)
        a = a / a.norm()
        b = torch.einsum("oihw,o,h,w->i", kernel, a, c, d)
        b = b / b.norm()
        c = torch.einsum("oihw,o,i,w->h", kernel, a, b, d)
        c = c / c.norm()
        d = torch.einsum("oihw,o,i,h->w", kernel, a, b, c)
        history.append(d.norm().item())
        d = d / d.norm()
    return history, [a, b, c, d]


# %% [markdown]
# **Predict:** for a matrix, almost every start leads to the same largest singular
# value. Will twenty random starts agree on $\lambda$ here? On the kernel before
# training, which is random, and on the trained one?


# %%
def random_starts(kernel, count=20, sweeps=60):
    """Power sweeps from random vectors, the best result first."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(count):
        start = [torch.randn(n, generator=generator).double() for n in kernel.shape]
        results.append(one_component(kernel, *start, sweeps=sweeps))
    return sorted(results, key=lambda result: -result[0][-1])


starts = {"untrained": random_starts(untrained), "trained": random_starts(trained)}

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for ax, (name, results) in zip(axes, starts.items(), strict=True):
    for history, _ in results:
        ax.plot(range(1, 61), history, color="C3", alpha=0.5)
    ends = {round(history[-1], 3) for history, _ in results}
    ax.set_title(f"{name}: number of ends of 20 starts: {len(ends)}")
    ax.set(xlabel="sweep", ylabel="λ", xscale="log")
    print(f"{name}: λ reached {sorted(ends)}")
plt.show()

# %% [markdown]
# **What to see:** every curve only rises, but the curves need not end at the same
# height: unlike the power iteration for matrices, the method can stop at a local
# maximum (the titles count the ends). So one starts several times and keeps the best.
# `cpnb.power_method` does that, all starts in one batch:

# %%
history, vectors = starts["trained"][0]
library = cpnb.power_method(
    trained, 1, sweeps=60, generator=torch.Generator().manual_seed(1)
)
by_hand = history[-1] * torch.einsum("o,i,h,w->oihw", *vectors)
print(f"λ by hand {history[-1]:.8f}, by cpnb.power_method {library.lam.item():.8f}")
print(
    "the two rank-one kernels differ by",
    cpnb.relative_error(
        by_hand, cpnb.cp_to_kernel(library.lam, library.factors)
    ).item(),
)

# %% [markdown]
# ### Greedy deflation
#
# Subtract the component, and look for the best component of what is left. Repeat. The
# remainder is orthogonal to the component just removed, so Pythagoras gives the error
# without looking at the kernel again:
#
# $$\frac{\|W-\hat W\|_F}{\|W\|_F} =
# \sqrt{1 - \sum_{r\le R}\lambda_r^2 / \|W\|_F^2}\, .$$
#
# And the components are **nested**: the first ten of a long run are the result of a
# short run.

# %%
rest, measured = trained.clone(), []
for r in range(84):
    vectors = [factor[:, r] for factor in found.factors]
    rest -= found.lam[r] * torch.einsum("o,i,h,w->oihw", *vectors)
    measured.append(rest.norm() / trained.norm())
measured = torch.stack(measured)
formula = (1 - found.lam.square().cumsum(0) / trained.norm() ** 2).sqrt()
print("largest difference to the formula:", (measured - formula).abs().max().item())

short = cpnb.power_method(trained, 10, generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(short.lam, found.lam[:10])
print("a run of 10 gives the first 10 components of the run of 84")

# %%
fig, ax = plt.subplots()
ranks = torch.arange(1, 85)
ax.plot(ranks, formula, color="C3", label="formula, from λ alone")
ax.plot(ranks[::4], measured[::4], "X", color="#333333", label="measured on the kernel")
ax.axhline(1, color="#555555", linestyle=":")
ax.text(84, 0.98, "zero kernel", ha="right", va="top", color="#555555")
ax.set(xlabel="components kept", ylabel="relative error", ylim=(0, 1.05))
ax.set_title(f"half of the components leave an error of {measured[41]:.2f}")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# **What to see:** the measured errors lie on the curve computed from $\lambda$ alone,
# and the error falls quickly at first, slowly later.
#
# ### Exercise 2: the error from the weights
#
# Write `errors_from_lam(lam, kernel_norm)`: all relative errors after $1, 2, \dots, R$
# components of a *power method* result, shape $(R,)$.
#
# ```text
# for k in 1..R:   error[k-1] = sqrt(1 - (lam[0]² + … + lam[k-1]²) / kernel_norm²)
# ```


# %%
def errors_from_lam(lam, kernel_norm):
    """Relative error after 1, 2, … components."""
    # your code here
    return None


# %%
check("exercise 2", errors_from_lam(found.lam, trained.norm()), measured)


# %% tags=["solution"]
def errors_from_lam_solution(lam, kernel_norm):
    """Relative error after 1, 2, … components."""
    return (1 - lam.square().cumsum(0) / kernel_norm**2).sqrt()


check(
    "exercise 2, solution",
    errors_from_lam_solution(found.lam, trained.norm()),
    measured,
)

# %% [markdown]
# ## 5. Alternating least squares
#
# Greedy is not optimal: once a component is chosen, it is never corrected.
# **Alternating least squares** (ALS) fits all $R$ components together. With all factor
# matrices but one held fixed, the kernel is a *linear* function of that one. Written
# for the first mode, with $W_{(1)}$ the kernel as a matrix of 32 rows and
# $K = B\odot C\odot D$ the **Khatri–Rao product**, whose columns are
# $b_r\otimes c_r\otimes d_r$:
#
# $$\min_A \|W_{(1)} - A\,K^\top\|_F
# \quad\Longrightarrow\quad
# A = W_{(1)} K\,(K^\top K)^{-1},\qquad
# K^\top K = (B^\top B) * (C^\top C) * (D^\top D)$$
#
# ($*$ multiplies entry by entry; Kolda and Bader 2009, section 3.4). One sweep solves
# for each mode once. Here weights stay inside the factors; $\lambda$ is read off at
# the end.


# %%
def als_sweep(kernel, factors):
    """Solve for each factor matrix in turn, the others fixed."""
    factors = list(factors)
    for n in range(kernel.ndim):
        others = factors[:n] + factors[n + 1 :]
        gram = component_gram(others)  # KᵀK, an R×R matrix
        product = kernel.movedim(n, 0).flatten(1) @ khatri_rao(others)
        factors[n] = torch.linalg.solve(gram, product.T).T
    return factors


def gen(seed):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# Check: the last factor that a sweep solves for is the least-squares solution that
# torch finds from $K$ itself.

# %%
draw = gen(0)
factors = [torch.randn(n, 8, generator=draw).double() for n in trained.shape]
a8, b8, c8, d8 = als_sweep(trained, factors)
K = khatri_rao([a8, b8, c8])
solved = torch.linalg.lstsq(K, trained.flatten(0, 2)).solution.T
torch.testing.assert_close(d8, solved)
print("the same as torch.linalg.lstsq")

# %% [markdown]
# No update can raise the error. But where do the factors start? We compare normal
# random numbers, of either sign, with uniform ones between 0 and 1, the default of some
# tensor libraries, and with `cpnb.als`, which starts from a short power method, damps
# and extrapolates.
#
# **Predict:** after 200 sweeps, will the start still matter?

# %%
HAND_SWEEPS = 60 if FAST else 200
STARTS = range(2 if FAST else 3)
LOG_SWEEPS = [1, 2, 5, 10, 20, 40, 60] + ([] if FAST else [100, 200])


def als_by_hand(kernel, rank, draw, seed, sweeps=HAND_SWEEPS):
    """Textbook ALS; weights, unit factors, and the error after each sweep."""
    generator = gen(seed)
    factors = [draw(n, rank, generator=generator).double() for n in kernel.shape]
    one, errors = torch.ones(rank).double(), []
    for _ in range(sweeps):
        factors = als_sweep(kernel, factors)
        near = cpnb.cp_to_kernel(one, factors)
        errors.append(cpnb.relative_error(kernel, near).item())
        lam, units = canonical_gauge(one, factors)
        factors = [u * lam ** (1 / kernel.ndim) for u in units]  # keep norms alike
    return lam, units, errors


# %%
courses = {
    "textbook, positive start": [
        als_by_hand(trained, 84, torch.rand, seed)[2] for seed in STARTS
    ],
    "textbook, centred start": [
        als_by_hand(trained, 84, torch.randn, seed)[2] for seed in STARTS
    ],
}
library = [
    [
        cpnb.als(trained, 84, sweeps=n, tol=0, generator=gen(seed)).relative_error
        for n in LOG_SWEEPS
    ]
    for seed in STARTS
]

# %%
LOOKS = {
    "textbook, positive start": {"color": "C1", "marker": "v"},
    "textbook, centred start": {"color": "C5", "marker": "s"},
    "cpnb.als (damped)": {"color": "C4", "marker": "h"},
    "bounded_als, same error": {"color": "C0", "marker": "o"},
    "power method": {"color": "C3", "marker": "X"},
}

# %%
fig, ax = plt.subplots()
for name, runs in courses.items():
    for n, errors in enumerate(runs):
        label = name if n == 0 else None
        some = [errors[sweeps - 1] for sweeps in LOG_SWEEPS]
        ax.plot(LOG_SWEEPS, some, label=label, **LOOKS[name])
for n, errors in enumerate(library):
    label = "cpnb.als (damped)" if n == 0 else None
    ax.plot(LOG_SWEEPS, errors, label=label, **LOOKS["cpnb.als (damped)"])
ax.set(xlabel="sweeps", xscale="log", ylabel="relative error", ylim=(0, None))
ax.set_title("Trained kernel, rank 84: the start still matters at the end")
ax.legend()
plt.show()

for name, runs in courses.items():
    last = torch.tensor(runs)
    rises = (last.diff() > 1e-9).sum().item()
    print(f"{name}: error {last[:, -1].mean():.3f} at the end, rises {rises} times")
last = torch.tensor(library)[:, -1]
print(f"cpnb.als: error {last.mean():.3f} at the end")

# %% [markdown]
# **What to see:** one line per seed. Both textbook runs only ever go down, slowly;
# from the positive start they are still behind when they stop. A good start and
# extrapolation are worth many sweeps. Section 8 shows that the start leaves another
# trace, one that the error does not show.
#
# ## 6. Uniqueness
#
# Why would one care about single components at all? A matrix has endless
# factorisations: with any invertible $M$, $AB^\top = (AM)(BM^{-\top})^\top$, so that
# the columns of $A$ mean nothing until one asks for more, such as orthogonality. A
# tensor of order three or more is different. If its factor matrices are rich enough,
# its CP form is **unique** up to order and scale. Kruskal's condition, extended to $N$
# modes (Kruskal 1977; Sidiropoulos and Bro 2000), is enough for that:
#
# $$\sum_{n=1}^{N} k_n \ge 2R + N - 1,$$
#
# where $k_n$ is the number such that *any* $k_n$ columns of factor $n$ are linearly
# independent; for random factors $k_n = \min(\text{size}_n, R)$.
#
# **Predict:** we hide six random components in a 12×8×3×3 kernel and let ALS look for
# them. Will it find *these* six, or six others of the same sum? And what if we give the
# SVD the same numbers as a 12×72 matrix?


# %%
def hide(shape, rank, seed):
    """A kernel of exactly this rank, and the unit factors it is made of."""
    generator = gen(seed)
    normal = [torch.randn(n, rank, generator=generator).double() for n in shape]
    lam, factors = canonical_gauge(torch.ones(rank).double(), normal)
    return cpnb.cp_to_kernel(lam, factors), factors


def cosines(left, right):
    """|cosine| between the rank-one terms of two decompositions."""
    pairs = (a.T @ b for a, b in zip(left, right, strict=True))
    return torch.stack(list(pairs)).prod(0).abs()


kernel, hidden = hide((12, 8, 3, 3), 6, seed=0)
seen = cpnb.als(kernel, 6, sweeps=300, start="random", generator=gen(1))
again = cpnb.als(kernel, 6, sweeps=300, start="random", generator=gen(2))
flat = cpnb.power_method(kernel.flatten(1), 6)  # of a matrix this is the SVD
as_matrix = [hidden[0], khatri_rao(hidden[1:])]
panels = {
    "ALS, first start": (cosines(hidden, seen.factors), seen),
    "ALS, other start": (cosines(hidden, again.factors), again),
    "SVD of the 12×72 matrix": (cosines(as_matrix, flat.factors), flat),
}

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.2))
for ax, (name, (table, fit)) in zip(axes, panels.items(), strict=True):
    image = ax.imshow(table, cmap="viridis", vmin=0, vmax=1)
    found_well = int((table.amax(1) > 0.99).sum())
    ax.set(title=f"{name}\n{found_well} of 6 found", xticks=[], yticks=[])
    ax.set(xlabel="found components", ylabel="hidden components")
    print(f"{name}: error {fit.relative_error:.6f}, {found_well} of 6 found")
fig.colorbar(image, ax=axes, shrink=0.8, label="|cosine|")
plt.show()

# %% [markdown]
# **What to see:** all three rebuild the kernel. In the first two pictures each row has
# an entry of one: ALS found the hidden components themselves, from either start (their
# order is that of $\lambda$). The SVD found other terms with the same sum.
#
# How far does that reach? Kruskal's condition is enough, but not necessary.


# %%
def kruskal_rank(shape):
    """Largest rank at which random factors meet Kruskal's condition."""
    rank = 1
    while sum(min(n, rank + 1) for n in shape) >= 2 * (rank + 1) + len(shape) - 1:
        rank += 1
    return rank


shape = (32, 16, 3, 3)
print(f"Kruskal's condition for {shape}: up to rank {kruskal_rank(shape)}")
for rank in [10, 19, 40, 80]:
    kernel, hidden = hide(shape, rank, seed=0)
    fit = cpnb.als(kernel, rank, sweeps=300, start="random", generator=gen(1))
    count = int((cosines(hidden, fit.factors).amax(1) > 0.99).sum())
    print(f"rank {rank}: ALS found {count} of {rank}, error {fit.relative_error:.4f}")

for rank in [2, 10, 84]:
    one, two = (
        cpnb.als(trained, rank, sweeps=300, start="random", generator=gen(seed)).factors
        for seed in (1, 2)
    )
    shared = int((cosines(one, two).amax(1) > 0.99).sum())
    print(f"trained kernel, rank {rank}: two starts share {shared} components")

# %% [markdown]
# **What to see:** the components come back well beyond Kruskal's bound. Where they do
# not, the error says that this start did not reach the hidden kernel at all. A trained
# kernel is not *exactly* of low rank, and then nothing is promised: the last lines say
# how many components two starts agree on. So a single component of a large fit should
# not be given a meaning before a second start has found it too.
#
# ## 7. Error against rank
#
# **Predict** two things before you run the cell. Which method needs fewer components
# for the same error? And which kernel is easier to approximate: one of random numbers,
# as before training, or a trained one?

# %%
SEEDS = range(2 if FAST else 5)
RANKS = [1, 10, 21, 42, 84] if FAST else [1, 5, 10, 21, 42, 63, 84, 105]
pairs = [(untrained, trained)]  # the network of seed 0, from above
pairs += [kernels_of_a_network(seed)[:2] for seed in SEEDS if seed > 0]


def error_curves(kernel, seed):
    """Relative error at each rank: power method and ALS, shape (2, ranks)."""
    generator = torch.Generator().manual_seed(seed)
    nested = cpnb.power_method(kernel, max(RANKS), generator=generator)
    greedy = [cpnb.relative_error(kernel, first_terms(nested, r)) for r in RANKS]
    fits = [cpnb.als(kernel, r, generator=generator).relative_error for r in RANKS]
    return torch.tensor([greedy, fits])


curves = {
    name: torch.stack([error_curves(pair[n], s) for s, pair in enumerate(pairs)])
    for n, name in enumerate(["untrained", "trained"])
}

# %%
STYLES = {
    "power method": {"color": "C3", "marker": "X"},
    "ALS": {"color": "C4", "marker": "h"},
}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax, (name, values) in zip(axes, curves.items(), strict=True):
    mean, std = values.mean(0), values.std(0)
    for n, (label, look) in enumerate(STYLES.items()):
        ax.plot(RANKS, mean[n], label=label, **look)
        band = mean[n] - std[n], mean[n] + std[n]
        ax.fill_between(RANKS, *band, color=look["color"], alpha=0.2, linewidth=0)
    ax.axvline(84, color="#555555", linestyle="--")
    ax.axhline(1, color="#555555", linestyle=":")
    at = RANKS.index(21)
    ax.set_title(f"{name}: error at rank 21 is {mean[0, at]:.2f} and {mean[1, at]:.2f}")
    ax.set(xlabel="rank (dashed: break-even, 84)", ylim=(0, 1.05))
axes[0].set_ylabel("relative error")
axes[0].text(105, 0.98, "zero kernel", color="#555555", va="top", ha="right")
axes[0].legend(loc="lower left")
plt.show()

# %%
print(f"relative error, mean ± std over n = {len(pairs)} networks")
print("rank           " + "".join(f"{rank:>12}" for rank in RANKS))
for name, values in curves.items():
    for n, method in enumerate(["power", "ALS"]):
        row = zip(values.mean(0)[n].tolist(), values.std(0)[n].tolist(), strict=True)
        print(f"{name:9} {method:5}" + "".join(f" {m:.3f}±{s:.3f}" for m, s in row))


def where(smaller):
    """Ranks at which a comparison of mean errors holds."""
    return [rank for rank, yes in zip(RANKS, smaller.tolist(), strict=True) if yes]


LESS = 1 - 1e-3  # errors closer than 0.1 % count as equal
print("smaller means: by more than 0.1 %")
for name, values in curves.items():
    power, fitted = values.mean(0)
    print(f"{name}: ALS has the smaller error at ranks {where(fitted < LESS * power)}")
for n, method in enumerate(["power method", "ALS"]):
    lower = curves["trained"].mean(0)[n] < LESS * curves["untrained"].mean(0)[n]
    print(f"{method}: the trained kernel has the smaller error at ranks {where(lower)}")

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over the networks,
# whose number the table states (the bands are narrow). At one component both methods do
# the same job; with many, ALS is clearly ahead. The trained kernel is the easier one
# wherever the last two lines say so: training has put some structure into it. At the
# dashed line, where the CP form costs as much as the kernel itself, an error remains.
#
# Two warnings follow from this figure. To the right of the dashed line nothing is
# compressed, whatever the error. And a small relative error of a *kernel* is not yet a
# good *network*: accuracy has to be measured, which `05_truncation` does.
#
# ## 8. Why components of ALS cannot be cut like those of the SVD
#
# The terms of an SVD are orthogonal. Cut some off, and the error is the root of the sum
# of their squared $\sigma$; what remains is the best of its rank (Eckart and Young
# 1936). So one fits once and cuts later to any rank. Here for the trained kernel as a
# 32×144 matrix, against ALS that looks for $k$ terms afresh:

# %%
matrix = trained.flatten(1)
svd = cpnb.power_method(matrix, 32)
for k in [24, 16, 8]:
    cut = cpnb.relative_error(matrix, first_terms(svd, k))
    rule = svd.lam[k:].norm() / matrix.norm()
    anew = als_by_hand(matrix, k, torch.randn, seed=0)[2][-1]
    print(f"SVD cut to {k:2}: {cut:.5f}, from σ: {rule:.5f}, ALS afresh: {anew:.5f}")

# %% [markdown]
# Components of a CP fit are not orthogonal. If a set $S$ of them is removed, the kernel
# changes by
#
# $$\Bigl\|\sum_{r\in S}\lambda_r\, t_r\Bigr\|^2
# = \sum_{r\in S}\lambda_r^2 + \sum_{r\ne s\in S}\lambda_r\lambda_s\Gamma_{rs},
# \qquad \Gamma_{rs} = \langle t_r, t_s\rangle,$$
#
# with unit terms $t_r$. If two components cancel, $\Gamma_{rs}<0$, removing *both* is
# cheap; removing one leaves the other alone, huge. The sum of all squares,
# $\sum\lambda_r^2/\|W\|^2$, the **energy**, is 1 for orthogonal terms and grows with
# the cancellation. It even predicts the damage: if each component is dropped with
# probability ½, the squared relative error is $(1+\text{energy})/4$ on average.
#
# ### Exercise 3: the price of removing components
#
# Write `removal_error(lam, gram, drop)`: the norm of the sum of the dropped components.
#
# ```text
# square = Σ_{r in drop} Σ_{s in drop}  lam[r] · lam[s] · gram[r, s]
# return sqrt(square)
# ```


# %%
def removal_error(lam, gram, drop):
    """Norm of the change when components are dropped."""
    # your code here: drop is a list of indices
    return None


# %%
whole = cpnb.als(trained, 85, generator=gen(0))
gram, drop = component_gram(whole.factors), [0, 3, 4]
gone = cpnb.cp_to_kernel(whole.lam[drop], [f[:, drop] for f in whole.factors])
check("exercise 3", removal_error(whole.lam, gram, drop), gone.norm())


# %% tags=["solution"]
def removal_error_solution(lam, gram, drop):
    """Norm of the change when components are dropped."""
    return (lam[drop] @ gram[drop][:, drop] @ lam[drop]).sqrt()


check(
    "exercise 3, solution", removal_error_solution(whole.lam, gram, drop), gone.norm()
)

# %% [markdown]
# The prediction from the energy, checked with 500 random halves of this fit:

# %%
halves = torch.rand(500, 85, generator=gen(1)) < 0.5
changes = [((whole.lam * h) @ gram @ (whole.lam * h)).item() for h in halves]
energy = degeneracy(whole.lam, whole.factors).energy
share = torch.tensor(changes) / trained.norm().float() ** 2
print(f"mean squared change over ‖W‖²: {share.mean():.3f}", end=" ")
print(f"± {share.std() / 500**0.5:.3f} (standard error)")
print(f"(1 + energy) / 4:              {(1 + energy) / 4:.3f}")

# %% [markdown]
# ### The experiment
#
# We fit rank 85, about break-even, to two kinds of 32×16×3×3 kernels, random normal
# numbers and the trained kernels, in seven ways, and keep the $k$ components of largest
# $\lambda$, as they are or with their $\lambda$ **refitted** by least squares. The
# power method needs no choice: its first $k$ terms are its fit of rank $k$. The target
# to beat is **fresh**, a new `cpnb.als` of rank $k$.
#
# `bounded_als` (error-preserving correction, Phan et al. 2020) looks for the components
# of least energy that keep a given error: that of `cpnb.als`, or 0.05 more.
#
# **Predict:** half of the components are cut. Which fits are then *worse than a kernel
# of zeros*, whose relative error is 1? Are trained kernels easier to cut?


# %%
R, KEPT = 85, [63, 42, 21]


def bounded(kernel, seed, extra):
    """Smallest components within the error of ALS, or a little more."""
    bound = cpnb.als(kernel, R, generator=gen(seed)).relative_error + extra
    return bounded_als(
        kernel, R, max_error=bound, sweeps=15 if FAST else 50, generator=gen(seed)
    )


FITS = {
    "textbook, positive start": lambda w, s: als_by_hand(w, R, torch.rand, s),
    "textbook, centred start": lambda w, s: als_by_hand(w, R, torch.randn, s),
    "cpnb.als (damped)": lambda w, s: cpnb.als(w, R, generator=gen(s)),
    "ALS with ridge 1e-3": lambda w, s: cpnb.als(
        w, R, damping=0, ridge=1e-3, generator=gen(s)
    ),
    "bounded_als, same error": lambda w, s: bounded(w, s, 0.0),
    "bounded_als, error + 0.05": lambda w, s: bounded(w, s, 0.05),
    "power method": lambda w, s: cpnb.power_method(w, R, generator=gen(s)),
}


# %%
def kept_error(kernel, lam, factors, count, refit=False):
    """Relative error after keeping the components of largest λ."""
    keep = lam.argsort(descending=True)[:count]
    units = [f[:, keep] for f in factors]
    left = lam[keep]
    if refit:  # ⟨t_r, Ŵ⟩ = Σ_s Γ_rs λ'_s, solved for the λ' that stay
        gram = component_gram(factors)
        left = torch.linalg.lstsq(gram[keep][:, keep], gram[keep] @ lam).solution
    return cpnb.relative_error(kernel, cpnb.cp_to_kernel(left, units)).item()


def measure(kernel, lam, factors):
    """All of the table's numbers for one fit, and the curve of the figure."""
    meter = degeneracy(lam, factors)
    cut = [kept_error(kernel, lam, factors, k) for k in [R, *KEPT]]
    refitted = [kept_error(kernel, lam, factors, k, refit=True) for k in KEPT]
    return [meter.energy, meter.lam_max, meter.worst_cancellation, *cut, *refitted]


# %%
COUNT = 2 if FAST else 3
kinds = {
    "random": [torch.randn(shape, generator=gen(n)).double() for n in range(COUNT)],
    "trained": [after for _, after in pairs[:COUNT]],
}
fits, numbers, fresh = {}, {}, {}
for kind, kernels in kinds.items():
    fresh[kind] = torch.tensor(
        [
            [cpnb.als(w, k, generator=gen(s)).relative_error for k in [R, *KEPT]]
            for s, w in enumerate(kernels)
        ]
    )
    for name, method in FITS.items():
        results = [method(w, seed) for seed, w in enumerate(kernels)]
        made = [r[:2] if isinstance(r, tuple) else (r.lam, r.factors) for r in results]
        fits[kind, name] = made[0]
        rows = [measure(w, *fit) for w, fit in zip(kernels, made, strict=True)]
        numbers[kind, name] = torch.tensor(rows)

# %%
for kind in kinds:
    print(f"{kind} kernels, n = {COUNT}: relative error with k of {R} components")
    print(f"{'':25}{'energy':>9}{'all 85':>13}", end="")
    print("".join(f"{f'{k}, cut / refit':>19}" for k in KEPT))
    for name in FITS:
        mean, std = numbers[kind, name].mean(0), numbers[kind, name].std(0)
        line = f"{name:25}{mean[0]:5.1f}±{std[0]:<4.1f}{mean[3]:6.3f}±{std[3]:.3f}"
        for n in range(3):
            cut = f"{mean[4 + n]:.2f}±{std[4 + n]:.2f}"
            line += f"{cut} / {mean[7 + n]:.2f}".rjust(19)
        print(line)
    mean, std = fresh[kind].mean(0), fresh[kind].std(0)
    line = f"{'fresh cpnb.als at k':25}{'':10}{mean[0]:6.3f}±{std[0]:.3f}"
    for n in range(3):
        line += f"{mean[1 + n]:.2f}±{std[1 + n]:.2f}".rjust(19)
    print(line + "\n")

# %%
steps = list(range(1, R + 1, 4))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for ax, (kind, kernels) in zip(axes, kinds.items(), strict=True):
    for name, look in LOOKS.items():
        curve = [kept_error(kernels[0], *fits[kind, name], k) for k in steps]
        ax.plot(steps, curve, label=name, markevery=4, **look)
    again = fresh[kind][0]
    ax.plot([R, *KEPT], again, "P", color="C2", markersize=9, label="fresh cpnb.als")
    ax.axhline(1, color="#555555", linestyle=":")
    half = numbers[kind, "cpnb.als (damped)"][0, 5]
    ax.set_title(f"{kind}: 42 of cpnb.als leave {half:.2f}, fresh {again[2]:.2f}")
    ax.set(xlabel=f"components kept of {R}, largest λ first", ylim=(0, None))
axes[0].set_ylabel("relative error (dotted: zero kernel)")
axes[1].legend()
plt.show()

# %% [markdown]
# **What to see:** these are the first kernels of each kind. With all components, at the
# right end, the power method is the worst fit; towards the left the order turns round.
# The fit from the positive start soon climbs far above the dotted line: cut to half, it
# is worse than no kernel at all.
# The power method's curve keeps near the fresh fits.
#
# Where do random and trained kernels differ? From the numbers of the table:


# %%
def listed(kind, column, limit):
    """Fits whose mean is above a limit in a column of the table."""
    return [name for name in FITS if numbers[kind, name].mean(0)[column] > limit]


for n, k in enumerate(KEPT):
    for kind in kinds:
        worse = listed(kind, 4 + n, 1.0)
        print(f"k = {k}, {kind}, worse than a zero kernel: {', '.join(worse) or '-'}")
print()
for name in FITS:
    random, tuned = (numbers[kind, name].mean(0)[5] for kind in kinds)
    say = "less" if tuned < random else "more"
    print(f"{name:26} k = 42: trained {tuned:.2f}, random {random:.2f}, {say} damage")
for kind in kinds:
    gap = [numbers[kind, "power method"].mean(0)[5], fresh[kind].mean(0)[2]]
    print(f"{kind}: power method above a fresh fit by {gap[0] - gap[1]:.2f} at k = 42")

# %% [markdown]
# **What to see:** the lines above name the cases. What they have in common: structure
# in the trained kernels makes every *fresh* fit and the power method better than on
# random numbers, but it does not protect a badly started ALS, whose components cancel
# here as well. Refitting $\lambda$ brings every error to 1 at most ($\lambda'=0$ would
# do that), but where components cancel it does not bring it near a fresh fit. Limits on
# the components help more: with a ridge, or with `bounded_als`, the energy is lower and
# so is every error after the cut.
#
# So there are three honest ways to a smaller rank: cut a nested fit (power method), fit
# anew at the rank wanted, or bound the components first. A layer in CP form adds a
# fourth, to train after the cut (`05_truncation`).
#
# ## 9. Border rank and degeneracy
#
# Is cancellation only bad luck with the start? No. For matrices a best rank-$R$
# approximation always exists: cut the singular value decomposition. For tensors of
# order three and more it may **not exist** (de Silva and Lim 2008,
# [doi:10.1137/06066518X](https://doi.org/10.1137/06066518X)). The classical example is
#
# $$T = a\circ a\circ b + a\circ b\circ a + b\circ a\circ a ,$$
#
# three terms, and indeed of rank three. Yet two terms get as close as you like: with
# $n$ large,
#
# $$T_n = n\,\bigl(a+\tfrac1n b\bigr)\circ\bigl(a+\tfrac1n b\bigr)\circ
# \bigl(a+\tfrac1n b\bigr) - n\; a\circ a\circ a .$$
#
# One says that the **border rank** of $T$ is two.
#
# **Predict:** multiply out the first term. What is left of $T_n$ when $n$ is large, and
# what happens to the weights meanwhile?


# %%
def outer(x, y, z):
    """Rank-one tensor of three vectors."""
    return torch.einsum("i,j,k->ijk", x, y, z)


a, b = torch.eye(2, dtype=torch.float64)
border = outer(a, a, b) + outer(a, b, a) + outer(b, a, a)


def two_terms(n):
    """The approximation T_n as weights and factors."""
    lam = torch.tensor([n, -n], dtype=torch.float64)
    return lam, [torch.stack([a + b / n, a], 1)] * 3


for n in [1, 10, 100, 1000]:
    error = cpnb.relative_error(border, cpnb.cp_to_kernel(*two_terms(n)))
    print(f"n = {n:4}: relative error {error:.6f}")

# %% [markdown]
# ### The degeneracy meter
#
# The error goes to zero, but at what price? `cpnb.methods.degeneracy` measures it from
# the $R\times R$ Gram matrix of the components, without building the kernel, so that it
# can also watch a training run:


# %%
def meter_table(meters):
    """What the meters read, one row each."""
    columns = ["rank", "lam_max", "energy", "worst_cosine", "worst_cancellation"]
    columns += ["sensitivity", "float32_error", "degenerate"]
    rows = [meter.to_row() for meter in meters.values()]
    return pd.DataFrame(rows, index=list(meters))[columns]


meter_table({f"n = {n}": degeneracy(*two_terms(n)) for n in [1, 10, 100]})

# %% [markdown]
# **What to see:** the weights grow without bound (`lam_max` is the largest of them over
# $\|T_n\|$), and the most negative cosine of two components, signs included
# (`worst_cancellation`), goes to −1: the two nearly cancel, and the small difference is
# the approximation. This is **degeneracy**. The meter raises its flag at an energy
# above 3: by the rule of section 8, dropping a random half of the components then costs
# more than dropping them all.
#
# `float32_error` estimates what rounding the parameters to 32 bits does to the kernel:
# $2^{-23}\sum|\lambda_r|/\|W\|$. Measured:

# %%
turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)  # a rotation
for n in [10, 1000, 100_000]:
    lam, factors = two_terms(n)
    lam, factors = canonical_gauge(lam, [turn @ f for f in factors])
    exact = cpnb.cp_to_kernel(lam, factors)
    rounded = cpnb.cp_to_kernel(lam.float(), [f.float() for f in factors]).double()
    measured_error = cpnb.relative_error(exact, rounded)
    found_by_meter = degeneracy(lam, factors).float32_error
    print(f"n = {n}: estimated {found_by_meter:.0e}, measured {measured_error:.0e}")

# %% [markdown]
# ### What keeps an algorithm from it?
#
# An algorithm that only looks at the error walks straight into it. Four remedies:
#
# - a **ridge** adds a small multiple of the squared factor entries to the squared
#   error, always;
# - **damping**, the default of `cpnb.als`, does the same with a multiple that shrinks
#   with the error, so that a kernel that *can* be met exactly is;
# - `bounded_als` asks for the least energy at a given error, here 0.05;
# - more components: at rank three this tensor has an exact form.
#
# **Predict:** which of them stop the growth of the weights on this tensor? (One of them
# fades just when it is needed.)

# %%
SWEEPS = [1, 3, 10, 30, 100, 300] + ([] if FAST else [1000])
TEXTBOOK = {"damping": 0, "extrapolate": False, "start": "random"}
WAYS = {
    "textbook": TEXTBOOK,
    "ridge 0.001": TEXTBOOK | {"ridge": 1e-3},
    "ridge 0.01": TEXTBOOK | {"ridge": 1e-2},
    "cpnb.als (damped)": {"start": "random"},
}


def watch(way):
    """Error, largest weight and cancellation after some sweeps of ALS."""
    rows = []
    for sweeps in SWEEPS:
        fit = cpnb.als(border, 2, sweeps=sweeps, tol=0, generator=gen(0), **WAYS[way])
        cancellation = degeneracy(fit.lam, fit.factors).worst_cancellation
        rows.append((fit.relative_error, fit.lam.max().item(), cancellation))
    return torch.tensor(rows), fit


watched = {way: watch(way) for way in WAYS}
held = bounded_als(border, 2, max_error=0.05, generator=gen(0))

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3))
meter = degeneracy(held.lam, held.factors)
ends = [held.relative_error, held.lam.max(), meter.worst_cancellation]
names = ["relative error", "largest λ", "cosine of the two terms"]
colours = {
    "textbook": LOOKS["textbook, centred start"],
    "ridge 0.001": {"color": "C2", "marker": "^", "alpha": 0.5},
    "ridge 0.01": {"color": "C2", "marker": "^"},
    "cpnb.als (damped)": LOOKS["cpnb.als (damped)"],
}
for n, (ax, name) in enumerate(zip(axes, names, strict=True)):
    for label, (rows, _) in watched.items():
        ax.plot(SWEEPS, rows[:, n], label=label, **colours[label])
    ax.axhline(ends[n], color="C0", linestyle="--", label="bounded_als, 0.05")
    ax.set(xlabel="ALS sweeps", xscale="log", title=name)
axes[0].set(yscale="log")
axes[2].set(ylim=(-1.02, 0.05))
axes[1].legend(fontsize="x-small")
plt.show()

# %%
three = cpnb.als(border, 3, sweeps=1000, generator=gen(0))
ended = {way: fit for way, (_, fit) in watched.items()}
ended |= {"bounded_als, 0.05": held, "cpnb.als, rank 3": three}
finals = {name: degeneracy(fit.lam, fit.factors) for name, fit in ended.items()}
meter_table(finals)

# %%
more = SWEEPS[-1] - SWEEPS[-2]
for way, (rows, _) in watched.items():
    growth = rows[-1, 1] / rows[-2, 1]
    error = rows[-1, 0]
    print(
        f"{way:18} error {error:.4f}, λ grew × {growth:.3f} in the last {more} sweeps"
    )
print(f"bounded_als, 0.05  error {held.relative_error:.4f}")
print(f"cpnb.als, rank 3   error {three.relative_error:.6f}")

# %% [markdown]
# **What to see:** without a ridge the error keeps falling, the weights keep growing and
# the cosine creeps towards −1; none of them arrives. Damping does not stop it: as the
# error goes, so does the damping, and extrapolation only gets there sooner. With a
# ridge all three settle, at a larger error. `bounded_als` lets you name the error and
# returns the tamest fit with it. In practice: damping for kernels that some CP form
# fits well, a ridge or a bound where the meter raises its flag.
#
# Now the meter on trained kernels at rank 85, the first fits of section 8:

# %%
meter_table({name: degeneracy(*fits["trained", name]) for name in FITS})

# %% [markdown]
# **What to see:** the larger the energy, the worse, roughly, the cut in section 8. A
# flag is no reason not to *use* a fit as it is, and the column of float32 errors shows
# no trouble; it is a reason not to cut it, and to watch it during training.
#
# ### Exercise 4: a meter of your own
#
# Write `worst_cosine(factors)`: the most negative cosine between two *different*
# rank-one terms (weights taken positive). For unit columns the cosine of two outer
# products is the product of the cosines of their vectors:
#
# ```text
# for every pair r < s:   cosine[r,s] = (a_r·a_s)(b_r·b_s)(c_r·c_s)…
# return the smallest
# ```


# %%
def worst_cosine(factors):
    """Most negative cosine between two rank-one terms with unit columns."""
    # your code here
    return None


# %%
two = watched["textbook"][1]
t0, t1 = (outer(*(f[:, r] for f in two.factors)) for r in (0, 1))
check("exercise 4", worst_cosine(two.factors), (t0 * t1).sum())


# %% tags=["solution"]
def worst_cosine_solution(factors):
    """Most negative cosine between two rank-one terms with unit columns."""
    gram = torch.ones(())
    for factor in factors:
        gram = gram * (factor.T @ factor)
    return gram.fill_diagonal_(1).min()


check("exercise 4, solution", worst_cosine_solution(two.factors), (t0 * t1).sum())

# %% [markdown]
# ## 10. Slide the rank and the ridge
#
# Both at once, on the trained kernel: textbook ALS, 50 sweeps from one centred random
# start.
#
# **Predict:** at a fixed rank, does more ridge always mean a larger error?

# %%
GRID_RANKS = [5, 21, 42, 63, 84]
GRID_RIDGES = [0.0, 1e-5, 1e-4, 1e-3, 1e-2]
grid = [
    [
        cpnb.als(trained, rank, ridge=ridge, generator=gen(0), **TEXTBOOK)
        for rank in GRID_RANKS
    ]
    for ridge in GRID_RIDGES
]
meters = [[degeneracy(fit.lam, fit.factors) for fit in row] for row in grid]
maps = {
    "relative error": [[fit.relative_error for fit in row] for row in grid],
    "largest λ/‖W‖": [[meter.lam_max for meter in row] for row in meters],
    "energy": [[meter.energy for meter in row] for row in meters],
    "cancellation": [[meter.worst_cancellation for meter in row] for row in meters],
}

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 3.2), sharey=True)
for ax, (name, values) in zip(axes, maps.items(), strict=True):
    ax.imshow(values, cmap="viridis_r" if name == "cancellation" else "viridis")
    ax.grid(False)
    middle = (max(map(max, values)) + min(map(min, values))) / 2
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = (value > middle) == (name == "cancellation")
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black")  # fmt: skip
    ax.set(title=name, xlabel="rank", xticks=range(5), yticks=range(5))
    ax.set(xticklabels=GRID_RANKS, yticklabels=GRID_RIDGES)
axes[0].set_ylabel("ridge")
plt.show()

best = min(range(5), key=lambda n: maps["relative error"][n][-1])
print(f"rank 84: the smallest error is at ridge {GRID_RIDGES[best]:g}")
top = max((meter.energy, meter.rank) for row in meters for meter in row)
print(f"the largest energy, {top[0]:.1f}, is at rank {top[1]}")

# %% [markdown]
# **What to see:** down a column, the ridge lowers the energy and pulls the cancellation
# towards zero long before the error rises much; the first printed line says whether a
# little ridge even lowers the error after so few sweeps. A small rank is no protection:
# see where the energy is largest.
#
# Now every rank and more ridges, with sliders. The curve on the left is that of section
# 8: the error when only the largest components are kept. On the right is every fit you
# have visited. (It needs a running kernel; the picture stands for it elsewhere. The
# sliders answer to the arrow keys.)

# %%
SEEN = {}  # by rank and ridge: errors of the cut fit, and what the meter reads


def visit(rank, ridge):
    """Fit by textbook ALS once, and cut the fit to every number of components."""
    if (rank, ridge) not in SEEN:
        fit = cpnb.als(trained, rank, ridge=ridge, generator=gen(0), **TEXTBOOK)
        kept = range(1, rank + 1)
        errors = [kept_error(trained, fit.lam, fit.factors, count) for count in kept]
        SEEN[rank, ridge] = errors, degeneracy(fit.lam, fit.factors)
    return SEEN[rank, ridge]


# %%
def draw(figure, rank, ridge):
    """The cut fit on the left; error and energy of all fits seen on the right."""
    errors, meter = visit(rank, ridge)
    left, right = figure.subplots(1, 2)
    left.plot(range(1, rank + 1), errors, color="C1")
    left.axhline(1, color="0.4", linestyle="--")
    left.set(xlim=(0, 85), xlabel="components kept", ylabel="relative error")
    left.set_title("dashed: a kernel of zeros")
    for cut, other in SEEN.values():
        right.plot(cut[-1], other.energy, "o", color="C0", alpha=0.5)
    right.plot(errors[-1], meter.energy, "o", color="C4", markersize=10)
    right.axhline(3, color="0.4", linestyle="--")
    right.set(xlim=(0, 1), ylim=(0.3, 100), yscale="log")
    right.set(xlabel="relative error, all components", ylabel="energy Σλ²/‖W‖²")
    right.set_title("above the dashed line: degenerate")
    right.minorticks_off()  # and plain numbers, as formulas are for one thread only
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return (
        f"Rank {rank}, ridge {ridge:g}: error {errors[-1]:.3f}, energy "
        f"{meter.energy:.2f}, largest λ/‖W‖ {meter.lam_max:.2f}, cancellation "
        f"{meter.worst_cancellation:.2f}. Half of the components: error "
        f"{errors[max(1, rank // 2) - 1]:.3f}."
    )


# %%
ridges = [0.0, *(10.0 ** (n / 2) for n in range(-12, -1))]
explorer = explore(draw, rank=range(1, 85), ridge=ridges)
explorer.controls["rank"].value = 84
explorer

# %%
explorer.controls["rank"].value = 42
explorer.controls["ridge"].value = 1e-3
print(SEEN[42, 1e-3][1].energy, "with the sliders")
print(maps["energy"][3][2], "in the picture above")
explorer.controls["ridge"].value = 0.0
explorer.controls["rank"].value = 84

# %% [markdown]
# Put `border` in the place of `trained` as well: rank two without a ridge is the
# degenerate fit of section 9.
#
# ## What was not shown
#
# - *Choosing the rank*: `05_truncation` measures what a rank costs in accuracy.
# - *Errors that matter*: all errors here are errors of one kernel, with every entry
#   counted alike, of one small network on one small data set. `cpnb.truncate(...,
#   refit="data")` weighs them by the inputs that the layer sees.
# - *When a decomposition of a given rank is unique or exists at all* is in general hard
#   to say; Kruskal's condition is the best known sufficient one.
#
# ## Summary
#
# - A CP form is a weighted sum of outer products; with unit columns the weights are
#   $\lambda$. It is often unique.
# - The power method takes one component at a time; its components are nested, its error
#   follows from $\lambda$ alone, and it can be cut.
# - ALS fits all components together and, at larger ranks, needs fewer of them; but its
#   components may cancel one another, and then they cannot be cut.
# - At worst no best approximation exists, and $\lambda$ grows without bound. The meter
#   (`cpnb.methods.degeneracy`) shows it; a ridge or `bounded_als` keeps the weights
#   bounded.
#
# **Next:** `02_canonical_weight_normalization` makes $\lambda$ and the factors the
# parameters of a layer, and trains them.
#
# **References.** C. Eckart, G. Young, *The approximation of one matrix by another of
# lower rank*, Psychometrika 1936. J. Kruskal, *Three-way arrays: rank and uniqueness of
# trilinear decompositions*, Linear Algebra Appl. 1977. N. Sidiropoulos, R. Bro, *On the
# uniqueness of multilinear decomposition of N-way arrays*, J. Chemometrics 2000. T.
# Kolda, B. Bader, *Tensor decompositions and applications*, SIAM Review 2009,
# doi:10.1137/07070111X. V. de Silva, L.-H. Lim, *Tensor rank and the ill-posedness of
# the best low-rank approximation problem*, SIAM J. Matrix Anal. Appl. 2008,
# doi:10.1137/06066518X. A.-H. Phan et al., *Stable low-rank tensor decomposition for
# compression of convolutional neural network*, 2020, arXiv:2008.05441. L.
# Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical convolutional neural
# networks*, 2022, arXiv:2206.01509.

# %%
print("cpnb", cpnb.__version__, "· torch", torch.__version__.split("+")[0])
