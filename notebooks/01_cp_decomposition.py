# %% [markdown]
# # What is a CP decomposition, how is it computed, and when does it fail?
#
# A convolution kernel is a table of numbers with four indices, a **tensor**. This
# notebook takes it apart into **rank-one** pieces, the simplest tensors there are.
#
# **After this notebook you can**
#
# 1. build a tensor from outer products;
# 2. compute a decomposition with the power method and with alternating least squares,
#    and say which of the two can be cut to fewer pieces;
# 3. recognise a *degenerate* decomposition, a small error made of huge, cancelling
#    pieces, and know what to do about it.
#
# **You need** matrices and vectors, and a little Python.
#
# **Time, measured on two CPU cores:** 0.3 minutes; fast mode 0.2.

# %%
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import torch

import cpnb
from cpnb.cp import canonical_gauge, component_gram, khatri_rao
from cpnb.explore import explore, plots
from cpnb.methods import degeneracy
from cpnb.train import fast_mode
from exercises import check

# %%
plots.use_style()
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
SEEDS = range(2 if FAST else 3)
print("fast mode" if FAST else "full mode")


# %%
def gen(seed):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 1. Outer products by hand
#
# The **outer product** of three vectors of two numbers each is the 2×2×2 tensor of all
# products of one entry from each:
#
# $$T_{ijk} = a_i\, b_j\, c_k .$$
#
# **Predict:** for $a=(1,2)$, $b=(3,1)$, $c=(1,-1)$, what is $T_{100}$? (Indices start
# at zero.)

# %%
a, b, c = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, -1.0]])

T = torch.zeros(2, 2, 2)
for i in range(2):
    for j in range(2):
        for k in range(2):
            T[i, j, k] = a[i] * b[j] * c[k]
print("T[1, 0, 0] =", T[1, 0, 0].item())
print("slices k = 0 and k = 1:", T[:, :, 0].tolist(), T[:, :, 1].tolist())

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
# This is a **CP form** (canonical polyadic form, Hitchcock 1927). Its terms are the
# **components**, their number $R$ is the **rank**. The vectors are kept as columns of
# **factor matrices**, one for each index, or **mode**.

# %%
lam = torch.tensor([1.0, 4.0])
A = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # columns a_1 and a_2
B = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
C = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])

total = torch.einsum("r,ir,jr,kr->ijk", lam, A, B, C)
torch.testing.assert_close(cpnb.cp_to_kernel(lam, [A, B, C]), total)
print("slices k = 0 and k = 1:", total[:, :, 0].tolist(), total[:, :, 1].tolist())

# %% [markdown]
# By hand, $T_{010}=1\cdot(1\cdot1\cdot1)+4\cdot(1\cdot1\cdot2)=9$.
#
# Doubling $a_1$ and halving $c_1$ changes nothing in the sum. We therefore agree on
# *unit columns*, with the lengths collected in $\lambda$; in the first term that is
# $\|a_1\|\|b_1\|\|c_1\| = \sqrt5\,\sqrt{10}\,\sqrt2 = 10$.

# %%
unit_lam, units = canonical_gauge(lam, [A, B, C])
again, _ = canonical_gauge(lam, [2 * A, B, C / 2])
print("λ with unit columns:", unit_lam, "after rescaling:", again)
torch.testing.assert_close(cpnb.cp_to_kernel(unit_lam, units), total)

# %% [markdown]
# ### Exercise 1: rebuild a tensor from its CP form
#
# Write `my_kernel(lam, factors)` for *any* number of modes, with no loop over entries.


# %%
def my_kernel(lam, factors):
    """Sum the rank-one terms of any number of factor matrices."""
    # your code here: factors is the list [A, B, C, …]
    return None


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
# ## 3. The power method
#
# Now a real tensor. We train a small network on handwritten digits and take the kernel
# of its second convolution: 32 output channels, 16 input channels, 3×3 pixels.

# %%
data = cpnb.load_data("digits")


def kernels_of_a_network(seed):
    """Kernel of the second convolution before and after training, in float64."""
    net = cpnb.DigitsNet(generator=gen(seed))
    start = net.conv2.weight.detach().double().clone()
    cpnb.fit(net, data, epochs=4 if FAST else 10, seed=seed, progress=False)
    return start, net.conv2.weight.detach().double()


untrained, trained = kernels_of_a_network(seed=0)
print("break-even rank, see 00_tour:", cpnb.cp.break_even_rank(trained.shape))

# %% [markdown]
# The best rank-one approximation $\lambda\, a\circ b\circ c\circ d$ with unit vectors
# has the largest possible
#
# $$\lambda = \sum_{oihw} W_{oihw}\, a_o b_i c_h d_w .$$
#
# With three of the vectors held fixed, this sum is an inner product with the fourth,
# and the best unit vector points along what the others leave over. Doing this for one
# vector after the other, repeatedly, is the **power method**. No sweep over the
# four can lower $\lambda$.

# %%
LEFT_OVER = ["oihw,i,h,w->o", "oihw,o,h,w->i", "oihw,o,i,w->h", "oihw,o,i,h->w"]


def power_sweep(kernel, vectors):
    """Improve the vectors in place, one after the other; return λ."""
    for n, equation in enumerate(LEFT_OVER):
        others = vectors[:n] + vectors[n + 1 :]
        best = torch.einsum(equation, kernel, *others)
        vectors[n] = best / best.norm()
    return best.norm().item()


# %% [markdown]
# **Predict:** for a matrix, almost every start leads to the same largest singular
# value. Will twenty random starts agree on $\lambda$ here?

# %%
for name, kernel in {"untrained": untrained, "trained": trained}.items():
    generator, runs = gen(0), []
    for _ in range(20):
        start = [torch.randn(n, generator=generator).double() for n in kernel.shape]
        runs.append([power_sweep(kernel, start) for _ in range(60)])
    assert (torch.tensor(runs).diff() > -1e-9).all(), "a sweep has lowered λ"
    print(f"{name}: λ reached {sorted({round(history[-1], 3) for history in runs})}")

# %% [markdown]
# On the kernel before training they end at eight values between 0.449 and 0.5: the
# method can stop at a local maximum. So `cpnb.power_method` starts several times and
# keeps the best.
#
# ### Greedy deflation
#
# Subtract the component, look for the best component of what is left, repeat. The
# remainder is orthogonal to the component just removed, so Pythagoras gives the error:
#
# $$\frac{\|W-\hat W\|_F}{\|W\|_F} =
# \sqrt{1 - \sum_{r\le R}\lambda_r^2 / \|W\|_F^2}\, .$$
#
# And the components are **nested**: the first ten of a long run are the result of a
# short run.

# %%
found = cpnb.power_method(trained, 84, generator=gen(0))
short = cpnb.power_method(trained, 10, generator=gen(0))
torch.testing.assert_close(short.lam, found.lam[:10])
print("a run of 10 gives the first 10 components of the run of 84")

# %%
ranks = range(1, 85)
prefixes = ((found.lam[:k], [f[:, :k] for f in found.factors]) for k in ranks)
kept = [cpnb.relative_error(trained, cpnb.cp_to_kernel(*form)) for form in prefixes]
measured = torch.stack(kept)
formula = (1 - found.lam.square().cumsum(0) / trained.norm() ** 2).sqrt()
print("largest difference:", (measured - formula).abs().max().item())

# %%
curves = {"formula": (ranks, formula), "measured": (ranks[::4], measured[::4])}
ax = plots.plot_truncation_panel(curves)
ax.set_title(f"Half of the components leave an error of {measured[41]:.2f}")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# **Figure:** relative error against the number of components kept, by the formula and
# as measured: two curves that coincide, falling from 0.94 with one component to 0.46
# with 42 and 0.27 with 84.

# %% [markdown]
# ## 4. Alternating least squares
#
# Greedy is not optimal: once a component is chosen, it is never corrected.
# **Alternating least squares** (ALS) fits all $R$ components together. With all factor
# matrices but one held fixed, the kernel is a *linear* function of that one. For the
# first mode, with $W_{(1)}$ the kernel as a matrix of 32 rows and $K = B\odot C\odot D$
# the **Khatri–Rao product**, whose columns are $b_r\otimes c_r\otimes d_r$:
#
# $$\min_A \|W_{(1)} - A\,K^\top\|_F
# \quad\Longrightarrow\quad
# A = W_{(1)} K\,(K^\top K)^{-1},\qquad
# K^\top K = (B^\top B) * (C^\top C) * (D^\top D)$$
#
# ($*$ multiplies entry by entry; Kolda and Bader 2009, section 3.4). One sweep solves
# for each mode once.


# %%
def als_sweep(kernel, factors):
    """Solve for each factor matrix in turn, the others fixed."""
    factors = list(factors)
    for n in range(kernel.ndim):
        others = factors[:n] + factors[n + 1 :]
        product = kernel.movedim(n, 0).flatten(1) @ khatri_rao(others)
        gram = component_gram(others)  # KᵀK, an R×R matrix
        factors[n] = torch.linalg.solve(gram, product.T).T
    return factors


# %%
generator = gen(0)
factors = [torch.randn(n, 8, generator=generator).double() for n in trained.shape]
*others, last = als_sweep(trained, factors)
solved = torch.linalg.lstsq(khatri_rao(others), trained.flatten(0, 2)).solution.T
torch.testing.assert_close(last, solved)
print("the last factor of a sweep is that of torch.linalg.lstsq")

# %% [markdown]
# No update can raise the error. But where to start? We compare normal random numbers,
# of either sign, with uniform ones between 0 and 1, TensorLy's random start, and with
# `cpnb.als`, which starts from a short power method, damps (section 6) and
# extrapolates (goes on along the last change, where that lowers the error).
#
# **Predict:** after 200 sweeps, will the start still matter?

# %%
SWEEPS = [1, 2, 5, 10, 20, 40, 60] + ([] if FAST else [100, 200])


def als_by_hand(kernel, rank, draw, seed):
    """Textbook ALS: weights, unit factors, and the error after each sweep."""
    generator, errors = gen(seed), []
    factors = [draw(n, rank, generator=generator).double() for n in kernel.shape]
    one = torch.ones(rank).double()
    for _ in range(SWEEPS[-1]):
        factors = als_sweep(kernel, factors)
        near = cpnb.cp_to_kernel(one, factors)
        errors.append(cpnb.relative_error(kernel, near).item())
        lam, units = canonical_gauge(one, factors)
        factors = [u * lam ** (1 / kernel.ndim) for u in units]  # keep norms alike
    return SimpleNamespace(lam=lam, factors=units, errors=errors)


# %%
STARTS = {"textbook, centred": torch.randn, "textbook, positive": torch.rand}
courses = {}
for name, draw in STARTS.items():
    runs = [als_by_hand(trained, 84, draw, seed).errors for seed in SEEDS]
    assert (torch.tensor(runs).diff() < 1e-9).all(), "a sweep has raised the error"
    courses[name] = pd.DataFrame(runs, columns=range(1, SWEEPS[-1] + 1))[SWEEPS]


# %%
def library_error(seed, sweeps):
    """Error of `cpnb.als` after some sweeps."""
    fit = cpnb.als(trained, 84, sweeps=sweeps, tol=0, generator=gen(seed))
    return fit.relative_error


errors = [[library_error(seed, sweeps) for sweeps in SWEEPS] for seed in SEEDS]
courses["cpnb.als"] = pd.DataFrame(errors, columns=SWEEPS)

# %%
look = {"color": [plots.PURPLE, plots.ORANGE, plots.GREEN], "style": ["-X", "-v", "-^"]}
means = pd.DataFrame({name: course.mean() for name, course in courses.items()})
ax = means.plot(logx=True, xlabel="sweeps", ylim=(0, None), **look)
ax.set_ylabel(f"relative error, mean of {len(SEEDS)} seeds")
ax.set_title("Trained kernel, rank 84: the start still matters at the end")
plt.show()
pd.DataFrame({n: course.iloc[:, -1] for n, course in courses.items()}).round(3)

# %% [markdown]
# **Figure:** relative error against sweeps, three falling curves that do not meet and
# end at 0.113 (positive start), 0.077 (centred) and 0.041 (`cpnb.als`).
#
# Seeds differ far less than starts do. The start leaves another trace, one that the
# error does not show:
#
# ## 5. Why components of ALS cannot be cut like those of the SVD
#
# The terms of a matrix's SVD are orthogonal: cut some off, and what remains is the best
# of its rank (Eckart and Young 1936). Components of a CP fit are not. Removing a set
# $S$ of them changes the kernel by
#
# $$\Bigl\|\sum_{r\in S}\lambda_r\, t_r\Bigr\|^2
# = \sum_{r\in S}\lambda_r^2 + \sum_{r\ne s\in S}\lambda_r\lambda_s\Gamma_{rs},
# \qquad \Gamma_{rs} = \langle t_r, t_s\rangle,$$
#
# with unit terms $t_r$. If two components cancel, $\Gamma_{rs}<0$, removing *both* is
# cheap; removing one leaves the other alone, huge. The **energy**
# $\sum\lambda_r^2/\|\hat W\|^2$ is 1 for orthogonal terms and grows with the
# cancellation. It predicts the damage: drop each component with probability ½, and the
# squared change over $\|\hat W\|^2$ is $(1+\text{energy})/4$ on average.

# %%
whole = cpnb.als(trained, 85, generator=gen(0))
gram = component_gram(whole.factors)
halves = whole.lam * (torch.rand(500, 85, generator=gen(1)) < 0.5)
changes = (halves @ gram * halves).sum(1) / (whole.lam @ gram @ whole.lam)
change, error = changes.mean(), changes.std() / 500**0.5
predicted = (1 + degeneracy(whole.lam, whole.factors).energy) / 4
print(f"(1 + energy) / 4 = {predicted:.3f}; of 500 halves {change:.3f} ± {error:.3f}")
assert abs(change - predicted) < 4 * error, "more than four standard errors apart"

# %% [markdown]
# ### Exercise 2: the partner
#
# Component $r$ has to go, and one more may. Which partner leaves the least damage, for
# every $r$? Without building kernels.


# %%
def best_partners(lam, gram):
    """For each component, the other one that is cheapest to drop with it."""
    # your code here: gram holds Γ
    return None


# %%
def check_partners(name, partners):
    """Compare the first three with what dropping a pair costs the kernel itself."""
    cheapest = []
    for r in range(3):
        costs = []
        for s in range(85):
            units = [factor[:, [r, s]] for factor in whole.factors]
            costs.append(cpnb.cp_to_kernel(whole.lam[[r, s]], units).norm())
        costs[r] = torch.tensor(torch.inf)
        cheapest.append(int(torch.stack(costs).argmin()))
    check(name, None if partners is None else partners[:3].tolist(), cheapest)


check_partners("exercise 2", best_partners(whole.lam, gram))


# %% tags=["solution"] jupyter={"source_hidden": true}
def best_partners_solution(lam, gram):
    """λ_s² + 2 λ_r λ_s Γ_rs is what the partner adds."""
    added = lam.square() + 2 * lam[:, None] * lam * gram
    return added.fill_diagonal_(torch.inf).argmin(1)


check_partners("exercise 2, solution", best_partners_solution(whole.lam, gram))

# %% [markdown]
# ### The experiment
#
# We fit rank 85, about break-even, to trained kernels in five ways, and keep the $k$
# components of largest $\lambda$, as they are. A **ridge** adds a small multiple of the
# squared factor entries to the squared error. The target to beat is a **fresh fit**, a
# new `cpnb.als` of rank $k$.
#
# **Predict:** half of the components are cut. Which fits are then *worse than a kernel
# of zeros*, whose relative error is 1?

# %%
R, KEPT = 85, [85, 63, 42, 21]
RIDGE = {"damping": 0, "ridge": 1e-3}
FITS = {
    "power method": lambda w, s: cpnb.power_method(w, R, generator=gen(s)),
    "ALS with ridge": lambda w, s: cpnb.als(w, R, generator=gen(s), **RIDGE),
    "cpnb.als": lambda w, s: cpnb.als(w, R, generator=gen(s)),
    **{n: lambda w, s, d=d: als_by_hand(w, R, d, s) for n, d in STARTS.items()},
}
kernels = [trained, *(kernels_of_a_network(seed)[1] for seed in SEEDS[1:])]
fits = {n: [fit(w, s) for s, w in enumerate(kernels)] for n, fit in FITS.items()}


# %%
def kept_error(kernel, fit, count):
    """Relative error after keeping the components of largest λ."""
    keep = fit.lam.argsort(descending=True)[:count]
    cut = cpnb.cp_to_kernel(fit.lam[keep], [f[:, keep] for f in fit.factors])
    return cpnb.relative_error(kernel, cut).item()


# %%
rows = []
for seed, w in enumerate(kernels):
    fresh = [cpnb.als(w, k, generator=gen(seed)).relative_error for k in KEPT]
    rows.append(["fresh", torch.nan, *fresh])
    for name, fit in ((name, each[seed]) for name, each in fits.items()):
        energy = degeneracy(fit.lam, fit.factors).energy
        rows.append([name, energy, *(kept_error(w, fit, k) for k in KEPT)])

# %%
columns = ["fit", "energy", *(f"{k} kept" for k in KEPT)]
groups = pd.DataFrame(rows, columns=columns).groupby("fit", sort=False)
mean, std = groups.mean(), groups.std()
print(f"mean ± standard deviation of n = {len(kernels)} kernels")
mean.map("{:.2f}".format) + " ± " + std.map("{:.2f}".format)

# %%
errors, half = mean.drop(columns="energy"), mean["42 kept"].drop("fresh")
assert (errors.loc["fresh"] < errors.min() + 1e-9).all(), "a cut beats a fresh fit"
assert errors["85 kept"].idxmax() == half.idxmin() == "power method"
assert half.is_monotonic_increasing and mean.energy[1:].is_monotonic_increasing
gap = errors.loc["power method"] - errors.loc["fresh"]
assert gap.is_monotonic_decreasing
print("the power method less a fresh fit:", gap.round(2).to_dict())

# %%
steps = [1, *range(5, R, 4), R]
curves = {}
for name, (fit, *_) in fits.items():
    curves[name] = steps, [kept_error(trained, fit, k) for k in steps]
two = {name: curves[name] for name in ("power method", "ALS with ridge")}
fresh = KEPT, groups.get_group("fresh")[columns[2:]].iloc[0].tolist()

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
plots.plot_truncation_panel(curves, left)
left.set(title="Five fits of one kernel, cut", ylim=(0, 7))
left.legend(loc="upper right")
plots.plot_truncation_panel(two | {"fresh": fresh}, right)
right.set_title("The two that can be cut, and the target")
plt.show()

# %% [markdown]
# **Figure:** relative error against the number of components kept; left, the textbook
# fits and `cpnb.als` rise above the dashed line of a kernel of zeros, the power method
# and the ridge stay below it; right, these two lie above the fresh fits.
#
# In numbers (the last digit depends on the processor): with all 85 components the power
# method is the worst fit, 0.27, and `cpnb.als` the best, 0.06. With
# 42 it is 0.47 against 1.01, no better than zeros, and the textbook fits have 1.60 and
# 3.35: the order that the energy told before the cut. A ridge costs 0.03 at full rank
# and leaves 0.54 with half.
#
# No cut reaches a fresh fit: the power method has 0.36 against 0.20 with 63 components,
# 0.47 against 0.37 with 42, 0.62 against 0.56 with 21. A layer in CP form can also be
# trained after the cut (`05_truncation`).
#
# ## 6. Degeneracy
#
# Is cancellation only bad luck with the start? No. A best rank-$R$ approximation always
# exists for matrices; for tensors of three and more modes it **may not** (de Silva and
# Lim 2008). The classical example is
#
# $$T = a\circ a\circ b + a\circ b\circ a + b\circ a\circ a ,$$
#
# which needs three terms. Yet two get as close as you like, when $n$ is large:
#
# $$T_n = n\,\bigl(a+\tfrac1n b\bigr)\circ\bigl(a+\tfrac1n b\bigr)\circ
# \bigl(a+\tfrac1n b\bigr) - n\; a\circ a\circ a .$$
#
# **Predict:** multiply out the first term. What is left of $T_n$ when $n$ is large, and
# what happens to the weights?

# %%
a, b = torch.eye(2, dtype=torch.float64)
aab = torch.einsum("i,j,k->ijk", a, a, b)
border = aab + aab.permute(0, 2, 1) + aab.permute(2, 1, 0)

# %%
rows = {}
for n in [1, 10, 100, 1000]:
    terms = torch.tensor([n, -n]).double(), [torch.stack([a + b / n, a], 1)] * 3
    error = cpnb.relative_error(border, cpnb.cp_to_kernel(*terms)).item()
    rows[f"n = {n}"] = {"error": error} | degeneracy(*terms).to_row()
columns = ["error", "lam_max", "energy", "worst_cancellation", "degenerate"]
pd.DataFrame.from_dict(rows, orient="index")[columns].round(3)

# %% [markdown]
# The error goes to zero as $1/n$, and the weights grow without bound (`lam_max` is the
# largest over $\|T_n\|$). The cosine of the two components (`worst_cancellation`) goes
# to −1: they nearly cancel. This is **degeneracy**.
#
# `cpnb.methods.degeneracy` reads all of it from $\Gamma$. It raises its flag at an
# energy above 3: by the rule of section 5, dropping a random half of the components
# then costs more than dropping them all.
#
# ### What keeps an algorithm from it?
#
# A ridge holds the components small, always; **damping**, the default of `cpnb.als`,
# does so with a multiple that shrinks with the error, so that a fit can still become
# exact.
#
# **Predict:** which of them stops the growth of the weights on this tensor?

# %%
TEXTBOOK = {"damping": 0, "extrapolate": False, "start": "random"}
WAYS = {
    "textbook": TEXTBOOK,
    "ridge 0.01": TEXTBOOK | {"ridge": 1e-2},
    "cpnb.als (damped)": {"start": "random"},
}
LONG = [1, 3, 10, 30, 100, 300] + ([] if FAST else [1000])


# %%
def watch(way, sweeps):
    """Error, largest λ and cosine of the two terms after some sweeps of ALS."""
    fit = cpnb.als(border, 2, sweeps=sweeps, tol=0, generator=gen(0), **WAYS[way])
    cosine = degeneracy(fit.lam, fit.factors).worst_cancellation
    return [fit.relative_error, fit.lam.max().item(), cosine]


rows = {(sweeps, way): watch(way, sweeps) for sweeps in LONG for way in WAYS}
watched = pd.DataFrame(rows, ["relative error", "largest λ", "cosine"]).T

# %%
growth = watched["largest λ"][LONG[-1]] / watched["largest λ"][LONG[-2]]
assert growth.drop("ridge 0.01").min() > 1.2 and growth["ridge 0.01"] < 1.001
watched.loc[LONG[-1]].assign(**{f"λ ÷ λ at {LONG[-2]}": growth}).round(4)

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3))
look = {"color": [plots.PURPLE, plots.VERMILION, plots.GREEN]}
look["style"] = ["-X", "-s", "-^"]
for ax, name in zip(axes, watched, strict=True):
    course = watched[name].unstack()[[*WAYS]]
    course.plot(ax=ax, logx=True, legend=name == "largest λ", title=name, **look)
    ax.set_xlabel("ALS sweeps")
axes[0].set_yscale("log")
plt.show()

# %% [markdown]
# **Figure:** error, largest λ and cosine of the two terms against sweeps; without a
# ridge the error keeps falling, λ keeps growing and the cosine creeps towards −1, and
# with the ridge all three are flat after 30 sweeps, at an error of 0.08.
#
# Damping does not stop the growth, as it goes with the error. Take a ridge where the
# meter raises its flag.
#
# ## 7. Slide the rank and the ridge
#
# Textbook ALS on the trained kernel, 50 sweeps from one centred start, cut as in
# section 5. (Without a kernel you see the picture.)


# %%
def draw(figure, rank, ridge):
    """Fit, keep only the largest components, and draw the error."""
    fit = cpnb.als(trained, rank, ridge=ridge, generator=gen(0), **TEXTBOOK)
    kept = range(1, rank + 1)
    errors = [kept_error(trained, fit, count) for count in kept]
    ax = figure.subplots()
    plots.plot_truncation_panel({f"ridge {ridge:g}": (kept, errors)}, ax)
    ax.set_xlim(0, 85)
    energy = degeneracy(fit.lam, fit.factors).energy
    half = errors[max(1, rank // 2) - 1]
    words = f"rank {rank}, ridge {ridge:g}: error {errors[-1]:.3f}, energy {energy:.2f}"
    return f"{words}, with half of the components error {half:.3f}"


ridges = [0.0, *(10.0 ** (n / 2) for n in range(-12, -1))]
explorer = explore(draw, rank=range(1, 85), ridge=ridges)
explorer.controls["rank"].value = 84
explorer

# %% [markdown]
# **Figure:** relative error against the components kept of a fit of rank 84 without a
# ridge: 0.11 with all of them, 1.17 with half, above the dashed line of a kernel of
# zeros.
#
# **Try:** which ridge brings half of the components below 1, and what does it cost at
# full rank?
#
# ## What was not shown
#
# What a rank costs in accuracy (`05_truncation`); all errors here are errors of one
# kernel, every entry counted alike. And *uniqueness*: tensors of order three and more
# often have only one CP form, up to order and scale (Kruskal 1977).
#
# ## The answer
#
# - A CP form is a weighted sum of outer products, with weights $\lambda$ if all columns
#   are units. A 32×16×3×3 kernel holds as many numbers as 84 components.
# - The power method takes one component at a time. Its components are nested and can be
#   cut: an error of 0.27 with 85, 0.47 with half.
# - ALS fits all together: 0.06 with 85. But its components cancel one another, so that
#   half of them are worth no more than zeros. With a ridge: 0.09, and 0.54.
# - It fails where no best approximation exists: $\lambda$ grows without bound. The
#   energy shows it; a ridge holds it.
#
# **Next:** `02_canonical_weight_normalization` makes $\lambda$ and the factors the
# parameters of a layer, and trains them.
#
# **References.** Hitchcock, J. Math. Phys. 1927. Eckart and Young, Psychometrika 1936.
# Kruskal, Linear Algebra Appl. 1977. Kolda and Bader, SIAM Review 2009,
# [doi:10.1137/07070111X](https://doi.org/10.1137/07070111X). De Silva and Lim, SIAM J.
# Matrix Anal. Appl. 2008,
# [doi:10.1137/06066518X](https://doi.org/10.1137/06066518X).

# %%
print("cpnb", cpnb.__version__, "· torch", torch.__version__.split("+")[0])
