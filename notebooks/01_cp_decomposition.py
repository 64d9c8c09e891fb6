# %% [markdown]
# # What is a CP decomposition, how is it computed, and when does it fail?
#
# A convolution kernel is a table of numbers with four indices. This notebook takes such
# a table apart into **rank-one** pieces, the simplest tables there are. Everything that
# comes later, layers, training and truncation, is built from these pieces.
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
# **Time, measured on two CPU cores:** 0.3 minutes; fast mode 0.2.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import cpnb
from cpnb.cp import canonical_gauge, component_gram, khatri_rao
from cpnb.explore import explore, plots
from cpnb.methods import degeneracy
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
# The slice for $k=1$ is that for $k=0$ times $-1$, because $c=(1,-1)$. In an outer
# product *all* slices are multiples of one another: it has **rank one**. For
# `torch.einsum` the three loops are one line:

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

# %% [markdown]
# ### One form among many
#
# Doubling $a_1$ and halving $c_1$ changes nothing in the sum. We therefore agree on
# *unit columns*, with the lengths collected in $\lambda$; in the first term that is
# $\|a_1\|\|b_1\|\|c_1\| = \sqrt5\,\sqrt{10}\,\sqrt2 = 10$.

# %%
gauge_lam, gauge_factors = canonical_gauge(lam, [A, B, C])
again_lam, _ = canonical_gauge(lam, [2 * A, B, C / 2])
print("λ with unit columns:", [round(value, 4) for value in gauge_lam.tolist()])
print("after rescaling    :", [round(value, 4) for value in again_lam.tolist()])
torch.testing.assert_close(cpnb.cp_to_kernel(gauge_lam, gauge_factors), total)

# %% [markdown]
# ### What it saves
#
# A 2×2×2 tensor has 8 numbers, and a component costs $2+2+2+1 = 7$: nothing is saved.
# But a tensor grows with the *product* of its sizes and a component only with their
# *sum*. The rank at which both cost the same is the **break-even rank**.

# %%
print("shape             numbers  per component  break-even rank")
for shape in [(2, 2, 2), (32, 16, 3, 3), (256, 128, 3, 3)]:
    dense, component = torch.Size(shape).numel(), sum(shape) + 1
    rank = cpnb.cp.break_even_rank(shape)
    print(f"{shape!s:16} {dense:8,} {component:14} {rank:16}")

# %% [markdown]
# ### Exercise 1: rebuild a tensor from its CP form
#
# Write `my_kernel(lam, factors)` for *any* number of modes, with no loop over entries.
# (A hint: build one term after the other, or the sum by one mode after the other.)


# %%
def my_kernel(lam, factors):
    """Sum the rank-one terms of any number of factor matrices."""
    # your code here: factors is the list [A, B, C, …]
    return None


# %%
check("exercise 1", my_kernel(lam, [A, B, C]), total)


# %% tags=["solution"] jupyter={"source_hidden": true}
def my_kernel_solution(lam, factors):
    """One mode after the other; the components stay the last axis until the end."""
    terms = lam
    for factor in factors:
        terms = terms[..., None, :] * factor
    return terms.sum(-1)


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
# We lay it out as a mosaic: one 3×3 tile for each pair of an input channel (row of
# tiles) and an output channel (column). Beside it are the first rank-one component and
# the sum of the first 32, found by the method of the next section.
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
# ## 4. The power method
#
# How are such components found? The best rank-one approximation
# $\lambda\, a\circ b\circ c\circ d$ with unit vectors has the largest possible
#
# $$\lambda = \sum_{oihw} W_{oihw}\, a_o b_i c_h d_w .$$
#
# With three of the vectors held fixed, this sum is an inner product with the fourth,
# and the best unit vector points along what the others leave over. Doing this for one
# vector after the other, again and again, is the **power method**. No sweep can lower
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
# **What to see:** every curve only rises, but they do not end at the same height (the
# titles count the ends): unlike the power iteration for matrices, the method can stop
# at a local maximum. So one starts several times and keeps the best, as
# `cpnb.power_method` does.
#
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
# ### Exercise 2: how many components?
#
# How many components of a *power method* result does a relative error of 0.5 take? Find
# it from $\lambda$ and the kernel's norm, without building a kernel.


# %%
def components_for(lam, kernel_norm, error):
    """Smallest number of components with at most this error."""
    # your code here
    return None


EXPECTED = int((measured > 0.5).sum()) + 1
check("exercise 2", components_for(found.lam, trained.norm(), 0.5), EXPECTED)


# %% tags=["solution"] jupyter={"source_hidden": true}
def components_for_solution(lam, kernel_norm, error):
    """The first prefix whose λ² leave at most error² of the kernel's."""
    enough = lam.square().cumsum(0) >= (1 - error**2) * kernel_norm**2
    return int((~enough).sum()) + 1


solved = components_for_solution(found.lam, trained.norm(), 0.5)
check("exercise 2, solution", solved, EXPECTED)

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
    "ALS with ridge 1e-3": {"color": "C0", "marker": "o"},
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
# **What to see:** one line per seed. Both textbook runs only ever go down, slowly; from
# the positive start they are still behind when they stop. The start leaves another
# trace, one that the error does not show:
#
# ## 6. Why components of ALS cannot be cut like those of the SVD
#
# The terms of an SVD are orthogonal: cut some off, and what remains is the best of its
# rank (Eckart and Young 1936). Components of a CP fit are not. If a set $S$ of them is
# removed, the kernel changes by
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
# ### Exercise 3: the partner
#
# Component $r$ has to go, and one more may. Dropping the right partner can even lower
# the damage. Which one is it, for every $r$? Without building kernels.


# %%
def best_partners(lam, gram):
    """For each component, the other one that is cheapest to drop with it."""
    # your code here: gram holds Γ
    return None


whole = cpnb.als(trained, 85, generator=gen(0))
gram = component_gram(whole.factors)


def cost_of(drop):
    """Norm of the change, measured on the kernel itself."""
    units = [factor[:, drop] for factor in whole.factors]
    return cpnb.cp_to_kernel(whole.lam[drop], units).norm()


measured = [min((s for s in range(85) if s != r), key=lambda s: cost_of([r, s]))
            for r in range(3)]  # fmt: skip
partners = best_partners(whole.lam, gram)
check("exercise 3", None if partners is None else partners[:3].tolist(), measured)


# %% tags=["solution"] jupyter={"source_hidden": true}
def best_partners_solution(lam, gram):
    """λ_s² + 2 λ_r λ_s Γ_rs is what the partner adds."""
    added = lam.square() + 2 * lam[:, None] * lam * gram
    return added.fill_diagonal_(torch.inf).argmin(1)


partners = best_partners_solution(whole.lam, gram)[:3].tolist()
check("exercise 3, solution", partners, measured)

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
# We fit rank 85, about break-even, to random and to trained kernels of shape
# 32×16×3×3 in five ways, and keep the $k$ components of largest $\lambda$, as they are.
# A *ridge* adds a small multiple of the squared factor entries to the squared error.
# The power method's first $k$ terms are its fit of rank $k$. The target to beat is
# **fresh**, a new `cpnb.als` of rank $k$.
#
# **Predict:** half of the components are cut. Which fits are then *worse than a kernel
# of zeros*, whose relative error is 1? Are trained kernels easier to cut?

# %%
R, KEPT = 85, [63, 42, 21]
FITS = {
    "textbook, positive start": lambda w, s: als_by_hand(w, R, torch.rand, s)[:2],
    "textbook, centred start": lambda w, s: als_by_hand(w, R, torch.randn, s)[:2],
    "cpnb.als (damped)": lambda w, s: cpnb.als(w, R, generator=gen(s)),
    "ALS with ridge 1e-3": lambda w, s: cpnb.als(
        w, R, damping=0, ridge=1e-3, generator=gen(s)
    ),
    "power method": lambda w, s: cpnb.power_method(w, R, generator=gen(s)),
}


# %%
def kept_error(kernel, lam, factors, count):
    """Relative error after keeping the components of largest λ."""
    keep = lam.argsort(descending=True)[:count]
    cut = cpnb.cp_to_kernel(lam[keep], [f[:, keep] for f in factors])
    return cpnb.relative_error(kernel, cut).item()


def fitted(method, kernel, seed):
    """Weights and unit factors of one of the fits."""
    found = method(kernel, seed)
    return found if isinstance(found, tuple) else (found.lam, found.factors)


COUNT = 2 if FAST else 3
shape = trained.shape
kinds = {"trained": [trained], "random": []}
kinds["trained"] += [kernels_of_a_network(seed)[1] for seed in range(1, COUNT)]
kinds["random"] += [torch.randn(shape, generator=gen(n)).double() for n in range(COUNT)]

# %%
fits, rows = {}, {}
for kind, kernels in kinds.items():
    for name, method in FITS.items():
        made = [fitted(method, w, seed) for seed, w in enumerate(kernels)]
        fits[kind, name] = made[0]
        each = [
            [degeneracy(*fit).energy, *(kept_error(w, *fit, k) for k in [R, *KEPT])]
            for w, fit in zip(kernels, made, strict=True)
        ]
        rows[kind, name] = torch.tensor(each).mean(0).tolist()
    fresh = [
        [cpnb.als(w, k, generator=gen(s)).relative_error for k in [R, *KEPT]]
        for s, w in enumerate(kernels)
    ]
    rows[kind, "fresh cpnb.als"] = [float("nan"), *torch.tensor(fresh).mean(0).tolist()]
columns = ["energy", *(f"{k} kept" for k in [R, *KEPT])]
table = pd.DataFrame(rows, columns).T
print(f"relative error, mean of n = {COUNT} kernels")
table.round(2)

# %%
steps = list(range(1, R + 1, 4))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for ax, (kind, kernels) in zip(axes, kinds.items(), strict=True):
    for name, look in LOOKS.items():
        curve = [kept_error(kernels[0], *fits[kind, name], k) for k in steps]
        ax.plot(steps, curve, label=name, markevery=4, **look)
    ax.axhline(1, color="#555555", linestyle=":")
    ax.set(xlabel=f"components kept of {R}, largest λ first", ylim=(0, 4.5))
    ax.set_title(f"the first {kind} kernel")
axes[0].set_ylabel("relative error (dotted: zero kernel)")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# **What to see:** (for this processor; another adds in another order) with all 85
# components the power method is the worst fit of the trained kernels, 0.27, and
# `cpnb.als` the best, 0.06. With half of them the order is turned round: the power
# method has 0.47, `cpnb.als` 1.01, no better than a kernel of zeros, and the two
# textbook fits are far above it. The column "energy" told so before the cut. A ridge
# costs 0.03 at full rank and makes the fit as cuttable as a nested one, 0.54. What
# nobody reaches by cutting is a fresh fit, 0.37. On random kernels all numbers are
# larger and the order is the same.
#
# So there are three honest ways to a smaller rank: cut a nested fit (power method), fit
# anew at the rank wanted, or hold the components small with a ridge. A layer in CP form
# adds a fourth, to train after the cut (`05_truncation`).
#
# ## 7. Border rank and degeneracy
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
# above 3: by the rule of section 6, dropping a random half of the components then costs
# more than dropping them all.
# %% [markdown]
# ### What keeps an algorithm from it?
#
# An algorithm that only looks at the error walks straight into it. A **ridge** holds
# the components small, always; **damping**, the default of `cpnb.als`, does the same
# with a multiple that shrinks with the error, so that a kernel that *can* be met
# exactly is.
#
# **Predict:** which of them stops the growth of the weights on this tensor?

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

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3))
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
    ax.set(xlabel="ALS sweeps", xscale="log", title=name)
axes[0].set(yscale="log")
axes[2].set(ylim=(-1.02, 0.05))
axes[1].legend(fontsize="x-small")
plt.show()

# %%
more = SWEEPS[-1] - SWEEPS[-2]
for way, (rows, _) in watched.items():
    growth = rows[-1, 1] / rows[-2, 1]
    error = rows[-1, 0]
    print(
        f"{way:18} error {error:.4f}, λ grew × {growth:.3f} in the last {more} sweeps"
    )

# %% [markdown]
# **What to see:** without a ridge the error keeps falling, the weights keep growing and
# the cosine creeps towards −1; none of them arrives. Damping does not stop it: as the
# error goes, so does the damping. With a ridge all three settle, at a larger error. So
# take damping for kernels that some CP form fits well, and a ridge where the meter
# raises its flag.
#
# ## 8. Slide the rank and the ridge
#
# Textbook ALS on the trained kernel, 50 sweeps from one centred random start. Left, the
# error when only the largest components are kept, as in section 6; right, every fit you
# have visited. (It needs a running kernel; the picture stands for it elsewhere.)

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

# %% [markdown]
# ## What was not shown
#
# - *Choosing the rank*: `05_truncation` measures what a rank costs in accuracy.
# - *Errors that matter*: all errors here are errors of one kernel, with every entry
#   counted alike, of one small network on one small data set. `cpnb.truncate(...,
#   refit="data")` weighs them by the inputs that the layer sees.
# - *Uniqueness*: tensors of order three and more often have only one CP form, up to
#   order and scale (Kruskal 1977).
#
# ## Summary
#
# - A CP form is a weighted sum of outer products; with unit columns the weights are
#   $\lambda$. A 32×16×3×3 kernel holds as many numbers as 84 components.
# - The power method takes one component at a time. Its components are nested and its
#   error follows from $\lambda$ alone: it can be cut, to 0.47 with half of 85.
# - ALS fits all components together: 0.06 instead of 0.27 at rank 85. But its
#   components cancel one another, so that half of them are worth no more than zeros. A
#   fit with a ridge is nearly as good (0.09) and can be cut (0.54).
# - At worst no best approximation exists, and $\lambda$ grows without bound. The meter
#   (`cpnb.methods.degeneracy`) shows it; a ridge holds it.
#
# **Next:** `02_canonical_weight_normalization` makes $\lambda$ and the factors the
# parameters of a layer, and trains them.
#
# **References.** C. Eckart, G. Young, *The approximation of one matrix by another of
# lower rank*, Psychometrika 1936. J. Kruskal, *Three-way arrays: rank and uniqueness of
# trilinear decompositions*, Linear Algebra Appl. 1977. T.
# Kolda, B. Bader, *Tensor decompositions and applications*, SIAM Review 2009,
# doi:10.1137/07070111X. V. de Silva, L.-H. Lim, *Tensor rank and the ill-posedness of
# the best low-rank approximation problem*, SIAM J. Matrix Anal. Appl. 2008,
# doi:10.1137/06066518X. L.
# Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical convolutional neural
# networks*, 2022, arXiv:2206.01509.

# %%
print("cpnb", cpnb.__version__, "· torch", torch.__version__.split("+")[0])
