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
# 2. compute a decomposition with the power method and read its error off its weights;
# 3. recognise a *degenerate* decomposition: a small error made of huge, cancelling
#    pieces.
#
# **You need** matrices and vectors, a little Python, and no knowledge of tensors.
#
# **Time, measured on two CPU cores:** 0.3 minutes, 0.2 in fast mode.

# %%
import matplotlib.pyplot as plt
import torch

import cpnb
from cpnb import plots

plots.use_style()
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = cpnb.fast_mode()
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
gauge_lam, gauge_factors = cpnb.canonical_gauge(lam, [A, B, C])
again_lam, _ = cpnb.canonical_gauge(lam, [2 * A, B, C / 2])
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
    rank = cpnb.break_even_rank(shape)
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
# ## 5. Error against rank
#
# Greedy is not optimal: once a component is chosen, it is never corrected.
# **Alternating least squares** (ALS) fits all components together. It solves for one
# whole factor matrix at a time, a linear least-squares problem, while the others are
# held fixed.
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


for name, values in curves.items():
    power, fitted = values.mean(0)
    print(f"{name}: ALS has the smaller error at ranks {where(fitted < power)}")
for n, method in enumerate(["power method", "ALS"]):
    lower = curves["trained"].mean(0)[n] < curves["untrained"].mean(0)[n]
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
# ## 6. A first look at degeneracy
#
# For matrices a best rank-$R$ approximation always exists: cut the singular value
# decomposition. For tensors of order three and more it may **not exist** (de Silva and
# Lim 2008, [doi:10.1137/06066518X](https://doi.org/10.1137/06066518X)). The classical
# example is
#
# $$T = a\circ a\circ b + a\circ b\circ a + b\circ a\circ a ,$$
#
# three terms, and indeed of rank three. Yet two terms get as close as you like: with
# $n$ large,
#
# $$T_n = n\,\bigl(a+\tfrac1n b\bigr)\circ\bigl(a+\tfrac1n b\bigr)\circ
# \bigl(a+\tfrac1n b\bigr) - n\; a\circ a\circ a .$$
#
# **Predict:** multiply out the first term. What is left of $T_n$ when $n$ is large, and
# what happens to the weights meanwhile?


# %%
def outer(x, y, z):
    """Rank-one tensor of three vectors."""
    return torch.einsum("i,j,k->ijk", x, y, z)


a, b = torch.eye(2, dtype=torch.float64)
border = outer(a, a, b) + outer(a, b, a) + outer(b, a, a)

print("     n   relative error    λ_1    λ_2   cosine of the two terms")
for n in [1, 10, 100, 1000]:
    x = a + b / n
    error = cpnb.relative_error(border, n * outer(x, x, x) - n * outer(a, a, a))
    weight, cosine = n * x.norm() ** 3, -((x @ a / x.norm()) ** 3)
    print(f"{n:6} {error:16.4f} {weight:6.0f} {n:6} {cosine:16.6f}")

# %% [markdown]
# The error goes to zero while both weights grow without bound, and the two terms, signs
# included, point in opposite directions: they nearly cancel, and the small difference
# is the approximation. This is called **degeneracy**. An algorithm that only looks at
# the error walks straight into it. Textbook ALS (`ridge=0`) on this tensor at rank two:
#
# **Predict:** a *ridge* adds a small multiple of the squared factor entries to the
# error. What will it do to the weights, and at what price?

# %%
SWEEPS = [1, 3, 10, 30, 100, 300, 1000] + ([] if FAST else [3000])
RIDGES = {"ridge 0 (textbook)": 0.0, "ridge 0.001": 1e-3, "ridge 0.01": 1e-2}


def watch(ridge, sweeps):
    """Error, largest weight and cosine of the two terms after some sweeps of ALS."""
    generator = torch.Generator().manual_seed(0)
    fit = cpnb.als(border, 2, sweeps=sweeps, ridge=ridge, tol=0.0, generator=generator)
    cosine = cpnb.component_gram(fit.factors)[0, 1].item()
    return fit.relative_error, fit.lam.max().item(), cosine


watched = {
    name: torch.tensor([watch(ridge, sweeps) for sweeps in SWEEPS])
    for name, ridge in RIDGES.items()
}

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3))
names = ["relative error", "largest λ", "cosine of the two terms"]
for n, (ax, name) in enumerate(zip(axes, names, strict=True)):
    for label, values in watched.items():
        ax.plot(SWEEPS, values[:, n], marker="o", label=label)
    ax.set(xlabel="ALS sweeps", xscale="log", title=name)
axes[0].set(yscale="log")
axes[2].set(ylim=(-1.02, 0))
axes[0].legend()
plt.show()

# %%
for name, values in watched.items():
    error, weight, cosine = values[-1].tolist()
    print(
        f"{name:19} after {SWEEPS[-1]} sweeps: error {error:.4f}, "
        f"largest λ {weight:.2f}, cosine {cosine:.3f}"
    )

# %% [markdown]
# **What to see:** without ridge the error keeps falling, the weights keep growing and
# the cosine creeps towards −1, and none of them arrives; with a ridge all three settle,
# at a larger error.
#
# Is this only a curiosity of a hand-made tensor? Three fits of the trained kernel at
# the break-even rank, with the same three measures:

# %%
print("                       error  largest λ/‖W‖  Σλ²/‖W‖²  most negative cosine")
for name, options in {
    "power method": None,
    "ALS, ridge 0": {"ridge": 0.0},
    "ALS, ridge 1e-6": {},
    "ALS, ridge 1e-3": {"ridge": 1e-3},
}.items():
    generator = torch.Generator().manual_seed(0)
    method = cpnb.power_method if options is None else cpnb.als
    fit = method(trained, 84, generator=generator, **(options or {}))
    share = fit.lam / trained.norm()
    cosine = cpnb.component_gram(fit.factors).min()
    numbers = f"{share.max():13.2f} {share.square().sum():10.2f} {cosine:16.3f}"
    print(f"{name:20} {fit.relative_error:8.3f} {numbers}")

# %% [markdown]
# **What to see:** for orthogonal terms $\sum\lambda^2/\|W\|^2$ would be at most one. In
# the greedy fit it stays below one by construction. The more a fit exceeds one, the
# more its terms cancel one another, and the most negative cosine shows the worst pair.
# More ridge lowers both, at the price of a larger error. This is far from the
# catastrophe above, and yet it matters as soon as components are *removed*.
#
# Take one of two cancelling terms away, and the other stands alone. The next exercise
# shows it.
#
# ### Exercise 3: cut a fit to its largest components
#
# Write `cut(result, count)`: the kernel that the `count` components of largest
# $\lambda$ of a decomposition make. (`result.lam` is not negative; the power method's
# $\lambda$ need not be sorted.)
#
# ```text
# keep the indices of the `count` largest entries of result.lam
# add up lam[r] · a_r ∘ b_r ∘ c_r ∘ d_r over these indices
# ```

# %%
als_fit = cpnb.als(trained, 84, generator=torch.Generator().manual_seed(0))


def cut(result, count):
    """Kernel of the components of largest weight."""
    # your code here
    return None


# %%
top = als_fit.lam.argmax()
vectors = [factor[:, top] for factor in als_fit.factors]
strongest = als_fit.lam[top] * torch.einsum("o,i,h,w->oihw", *vectors)
check("exercise 3, one component", cut(als_fit, 1), strongest)
everything = cpnb.cp_to_kernel(als_fit.lam, als_fit.factors)
check("exercise 3, all components", cut(als_fit, 84), everything)


# %% tags=["solution"]
def cut_solution(result, count):
    """Kernel of the components of largest weight."""
    keep = result.lam.topk(count).indices
    return cpnb.cp_to_kernel(result.lam[keep], [f[:, keep] for f in result.factors])


check("exercise 3, solution", cut_solution(als_fit, 84), everything)

# %% tags=["solution"]
counts = list(range(1, 85))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax, (name, kernel) in zip(
    axes, {"untrained": untrained, "trained": trained}.items(), strict=True
):
    for label, look in STYLES.items():
        method = cpnb.als if label == "ALS" else cpnb.power_method
        fit = method(kernel, 84, generator=torch.Generator().manual_seed(0))
        errors = [cpnb.relative_error(kernel, cut_solution(fit, k)) for k in counts]
        ax.plot(counts, errors, label=label, markevery=8, **look)
    ax.axhline(1, color="#555555", linestyle=":")
    ax.set_title(f"{name}: half of ALS leaves {errors[41]:.2f}, all {errors[-1]:.2f}")
    ax.set(xlabel="components kept, largest λ first", ylim=(0, None))
axes[0].set_ylabel("relative error (dotted: zero kernel)")
axes[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# **What to see in the picture of the solution:** the curves cross. With all its
# components ALS is better; cut short, it is worse than the greedy fit, and where its
# curve lies above the dotted line, no kernel at all would be closer to the original
# than the cut one. Components that were fitted *together* belong together.
#
# ### Exercise 4: a degeneracy meter
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
two = cpnb.als(border, 2, ridge=0.0, generator=torch.Generator().manual_seed(0))
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
# ## What was not shown
#
# - *Uniqueness*: under mild conditions a CP decomposition is unique up to order and
#   scale, unlike a matrix factorisation. It is one reason for CP's fame, and was not
#   used here.
# - *Choosing the rank*, and methods that bound the weights while fitting (Phan et al.
#   2020, [arXiv:2008.05441](https://arxiv.org/abs/2008.05441)).
# - *Accuracy*: all errors here are errors of one kernel, of one small network on one
#   small data set.
#
# ## Summary
#
# - A CP form is a weighted sum of outer products; with unit columns the weights are
#   $\lambda$.
# - The power method takes one component at a time; its components are nested and its
#   error follows from $\lambda$ alone.
# - ALS fits all components together and, at larger ranks, needs fewer of them; but its
#   components may cancel one another, and at worst no best approximation exists. A
#   ridge keeps the weights bounded.
#
# **Next:** `02_canonical_weight_normalization` makes $\lambda$ and the factors the
# parameters of a layer, and trains them.
#
# **References.** T. Kolda, B. Bader, *Tensor decompositions and applications*, SIAM
# Review 2009, doi:10.1137/07070111X. V. de Silva, L.-H. Lim, *Tensor rank and the
# ill-posedness of the best low-rank approximation problem*, SIAM J. Matrix Anal. Appl.
# 2008, doi:10.1137/06066518X. A.-H. Phan et al., *Stable low-rank tensor decomposition
# for compression of convolutional neural network*, 2020, arXiv:2008.05441. L.
# Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical convolutional neural
# networks*, 2022, arXiv:2206.01509.

# %%
print("cpnb", cpnb.__version__, "· torch", torch.__version__.split("+")[0])
