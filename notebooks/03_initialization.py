# %% [markdown]
# # Where should a canonical network start?
#
# The paper on canonical networks starts from a dense kernel that the *power method*
# takes apart, and names two cheaper ways: Gaussian and uniform factors. A later paper
# derives the *unified* start, from the variance that the rebuilt kernel should have.
# **Does a start that costs nothing replace the power method?**
#
# **After this notebook you can**
#
# 1. compute the variance of a kernel that is rebuilt from random factors, and set it;
# 2. say what a wrong variance does to a deep network, forwards and backwards;
# 3. judge starts by training: rates tuned for each, several seeds, an interval.
#
# **You need** `01_cp_decomposition` and `02_canonical_weight_normalization`.
#
# **Time, measured on two CPU cores:** 3.3 minutes; fast mode 0.7.

# %%
import math
import textwrap
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cpnb
from cpnb.cp import normalize_columns
from cpnb.explore import plots
from cpnb.initializers import gaussian, unified, uniform
from cpnb.methods import FORMATS, unified_variance
from cpnb.train import evaluate, fast_mode, paired_difference
from experiments import EXPERIMENTS, STARTS, read_results

plots.use_style()
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
print("fast mode" if FAST else "full mode")

# %% [markdown]
# The starts, in the order and with the looks that all figures here share. The exercises
# check themselves with the small function below.

# %%
NAMES = ["unified", "power", "unified_small", "als", "gaussian", "uniform"]
LOOKS = {
    name: {"color": f"C{number}", "marker": marker, "label": name}
    for number, (name, marker) in enumerate(zip(NAMES, "os^Xvp", strict=True))
}


def check(name, got, expected, **tolerance):
    """Say whether an exercise is solved."""
    if got is None:
        print(f"{name}: not solved yet, the function returned None.")
        return
    torch.testing.assert_close(got, expected, **tolerance)
    print(f"{name}: correct.")


# %% [markdown]
# ## 1. One component, by hand
#
# A canonical layer uses *unit* columns. Take a linear layer with two outputs and two
# inputs and one component, $W = \lambda\, \hat a \circ \hat b$, both columns drawn
# evenly from the unit circle.
#
# **Predict:** what is the variance of the entry $W_{11} = \lambda\,\hat a_1 \hat b_1$?
#
# The squares of a unit column sum to one and no entry is special, so each has mean
# $\mathbb E[\hat a_1^2] = 1/2$; signs are even, so the mean of $W_{11}$ is zero:
#
# $$\operatorname{Var}(W_{11}) = \lambda^2 \cdot \tfrac12 \cdot \tfrac12 .$$

# %%
generator = torch.Generator().manual_seed(0)
draws = torch.randn(2, 2, 100_000, generator=generator)  # column, entry, draw
a, b = draws / draws.norm(dim=1, keepdim=True)
entry = 3 * a[0] * b[0]  # λ = 3
print(f"variance {entry.var().item():.3f}, by hand {3**2 / 4:.3f}")
torch.testing.assert_close(entry.var().item(), 9 / 4, rtol=0.02, atol=0)

# %% [markdown]
# ## 2. The rule
#
# The same argument for a kernel with $O$ outputs, $I$ inputs, a window of
# $K_h \times K_w$ and $R$ independent components with equal $\lambda$:
#
# $$\operatorname{Var}(W) = \sigma^2\, \frac{R\,\lambda^2}{O\, I\, K_h K_w} .$$
#
# Kaiming's rule asks for $\operatorname{Var}(W) = 2/\text{fan}$ with ReLU: fan-in
# $I K_h K_w$ keeps the variance of *activations* from layer to layer, fan-out
# $O K_h K_w$ that of *gradients*. Set the two equal, with $\sigma = 1$:
#
# $$\lambda = \sqrt{2O/R} \quad\text{(fan-in)}, \qquad
# \lambda = \sqrt{2I/R} \quad\text{(fan-out)} .$$
#
# This is `unified`. It is the unit-column form of the rule of Pan et al. 2022
# ([arXiv:2205.15307](https://arxiv.org/abs/2205.15307)), re-derived here from the
# paper's abstract; the cells below check it, they do not quote it.

# %%
SHAPE, RANK = (64, 32, 3, 3), 16
HE = 2 / math.prod(SHAPE[1:])  # the target: Kaiming's variance, fan-in
lam, factors = unified(SHAPE, RANK, generator=generator, dtype=torch.float64)
torch.testing.assert_close(lam, torch.full_like(lam, math.sqrt(2 * 64 / RANK)))
kernel = cpnb.cp_to_kernel(lam, factors)
print(f"Var(W) / target = {kernel.square().mean().item() / HE:.3f} in one draw")

# %% [markdown]
# The paper's Gaussian start draws entries from $N(0, 2/R)$ with $\lambda = 1$. The
# columns are then normalised, so the $2/R$ **cancels**: $\operatorname{Var}(W) =
# R/(O I K_h K_w)$, which is $R/(2O)$ times the target. Whether that is too much or too
# little depends on the rank alone.

# %%
for rank in (16, 128, 1024):
    start = partial(gaussian, SHAPE, rank, dtype=torch.float64)
    kernels = []
    for _ in range(20):
        lam, factors = start(generator=generator)
        kernels.append(cpnb.cp_to_kernel(lam, normalize_columns(factors)[0]))
    ratio = torch.stack(kernels).square().mean().item() / HE
    print(
        f"gaussian, R = {rank:4}: {ratio:.3f} of the target, R/(2O) = {rank / 128:.3f}"
    )
    torch.testing.assert_close(ratio, rank / 128, rtol=0.1, atol=0)

# %% [markdown]
# ### Exercise 1: the right λ for any activation
#
# Kaiming's rule in general is $\operatorname{Var}(W) = 1/(\varphi\,\text{fan})$, with
# $\varphi = \tfrac12$ for ReLU and 1 for a linear layer. Write
# `matched_lam(shape, rank, mode, phi)`, the λ that reaches it; `shape` is
# `(out, in, *kernel_size)` and `mode` is `"fan_in"` or `"fan_out"`.
#
# ```text
# Var(W) = rank · lam² / (out · in · K_h · K_w)   must equal   1 / (phi · fan)
# ```


# %%
def matched_lam(shape, rank, mode, phi):
    """λ of every component."""
    # your code here
    return None


# %%
def library_lam(mode, nonlinearity):
    """λ of `unified` for comparison."""
    options = {"mode": mode, "nonlinearity": nonlinearity, "dtype": torch.float64}
    return unified((64, 32, 3, 3), 7, **options)[0][0].item()


def check_lam(title, function):
    """Compare a solution of exercise 1 with the library."""
    for mode in ("fan_in", "fan_out"):
        for nonlinearity, phi in (("relu", 0.5), ("linear", 1.0)):
            got = function((64, 32, 3, 3), 7, mode, phi)
            check(
                f"{title}, {mode}, {nonlinearity}", got, library_lam(mode, nonlinearity)
            )


check_lam("exercise 1", matched_lam)


# %% tags=["solution"] jupyter={"source_hidden": true}
def matched_lam_solution(shape, rank, mode, phi):
    """λ of every component."""
    channels = shape[0] if mode == "fan_in" else shape[1]
    return math.sqrt(channels / (phi * rank))


check_lam("exercise 1, solution", matched_lam_solution)

# %% [markdown]
# ## 3. The variance of every start, over the rank
#
# Besides the starts of the library there are three that are easily written down, and
# wrong. Their factors are *free*: used at the length at which they are drawn.
#
# - **Kaiming on each factor**: `nn.init.kaiming_normal_` on every $N \times R$ matrix
#   takes $R$ for the fan-in, so each factor has variance $2/R$ and the kernel
#   $R\,(2/R)^4 = 16/R^3$.
# - **Uniform ±1/√O on each factor**, the default of a public tensor-layer library:
#   $R\,(1/3O)^4$.
# - **Kaiming on each link of a chain**: seen as four convolutions in a row (1×1, two
#   one-dimensional ones for each component, 1×1), each link gets the ReLU gain
#   2/fan-in. But three of the links are followed by no ReLU: a factor $2^3 = 8$ too
#   much.
#
# `unified_small` is a control for later: the directions of `unified` with the variance
# of *torch's* default dense start, which is a sixth of Kaiming's, because
# `nn.Conv2d` draws from $U(\pm 1/\sqrt{\text{fan-in}})$. That default is also what
# `power` and `als` are fitted to.
#
# **Predict:** which curves are flat in the rank? And why are `power` and `als` not?


# %%
def as_cp(factors):
    """λ and unit columns of free factors: the lengths go into λ."""
    units, norms = normalize_columns(factors)
    return norms.prod(0), units


def kaiming_each(shape, rank, *, generator=None, **_):
    """Kaiming's start on each factor matrix."""
    factors = [torch.empty(n, rank, dtype=torch.float64) for n in shape]
    return as_cp([nn.init.kaiming_normal_(f, generator=generator) for f in factors])


def uniform_out(shape, rank, *, generator=None, **_):
    """U(±1/√O) on each factor matrix."""
    factors = [torch.empty(n, rank, dtype=torch.float64) for n in shape]
    bound = shape[0] ** -0.5
    return as_cp([f.uniform_(-bound, bound, generator=generator) for f in factors])


def kaiming_chain(shape, rank, *, generator=None, **_):
    """Variance 2/fan-in in each link; the last link gathers the components."""
    fans = [rank, *shape[1:]]
    factors = [torch.empty(n, rank, dtype=torch.float64) for n in shape]
    pairs = zip(factors, fans, strict=True)
    return as_cp([f.normal_(0, (2 / n) ** 0.5, generator=generator) for f, n in pairs])


# %%
FOILS = {
    "Kaiming on each factor": kaiming_each,
    "U(±1/√O) on each factor": uniform_out,
    "Kaiming on each link": kaiming_chain,
}
RANKS = [1, 4, 16, 64, 256]
DRAWS = 40 if FAST else 200


def variance_ratio(start, rank, draws, seed=0):
    """Var(W) / target, one value per draw; float64."""
    generator, ratios = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        lam, factors = start(SHAPE, rank, generator=generator, dtype=torch.float64)
        kernel = cpnb.cp_to_kernel(lam, normalize_columns(factors)[0])
        ratios.append(kernel.square().mean().item() / HE)
    return torch.tensor(ratios, dtype=torch.float64)


# %%
ratios = {}
for name, start in {**STARTS, **FOILS}.items():
    draws = 1 if name in ("power", "als") else DRAWS  # one fit tells: they hardly vary
    ratios[name] = [variance_ratio(start, rank, draws) for rank in RANKS]
print(f"{'Var(W) / target':24}" + "".join(f"{f'R = {r}':>10}" for r in RANKS))
for name, values in ratios.items():
    print(f"{name:24}" + "".join(f"{v.mean().item():10.2g}" for v in values))

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for name in NAMES:
    wide = {"linewidth": 4, "markersize": 9} if name == "gaussian" else {}
    axes[0].plot(RANKS, [v.mean() for v in ratios[name]], **LOOKS[name], **wide)
for ax in axes:
    ax.axhline(1, color="#555555", linestyle=":", zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="rank R")
    ax.set_xticks(RANKS, RANKS)
    ax.set_xticks([], minor=True)
for (name, values), style in zip(
    {"unified": ratios["unified"], **{n: ratios[n] for n in FOILS}}.items(),
    [LOOKS["unified"], *({"color": "#555555", "marker": m} for m in "<>D")],
    strict=True,
):
    means = [v.mean() for v in values]
    axes[1].plot(RANKS, means, **{**style, "label": name})
axes[0].set_ylabel("Var(W) / Kaiming's variance")
axes[0].legend(loc="lower right", ncols=2)
axes[1].set_ylim(bottom=1e-14)
axes[1].legend(loc="lower left")
axes[0].set_title("starts of a CP kernel")
worst = max(abs(v.mean().item() - 1) for v in ratios["unified"])
axes[1].set_title(f"three foils; unified stays within {worst:.1%}")
plt.show()

# %% [markdown]
# **What to see:** means over the draws of a 64×32×3×3 kernel; the dotted line is the
# target. `unified` and `unified_small` are flat, by construction. The paper's two
# starts rise with $R$ and lie on top of each other: after the normalisation the
# distribution of the entries hardly matters. `power` and `als` rise because a fit of
# low rank holds only a part of the dense kernel, until they reach its variance, a sixth
# of the target. The foils miss by a factor of 8, by many powers of ten, or by a power
# of the rank.
#
# The formulas, tested against the draws:

# %%
expected = {
    "unified": [1.0 for _ in RANKS],
    "unified_small": [1 / 6 for _ in RANKS],
    "gaussian": [r / (2 * SHAPE[0]) for r in RANKS],
    "uniform": [r / (2 * SHAPE[0]) for r in RANKS],
    "Kaiming on each factor": [16 / r**3 / HE for r in RANKS],
    "U(±1/√O) on each factor": [r / (3 * SHAPE[0]) ** 4 / HE for r in RANKS],
    "Kaiming on each link": [8.0 for _ in RANKS],
}
far = 0.0
for name, values in expected.items():
    for found, value in zip(ratios[name], values, strict=True):
        error = found.std() / len(found) ** 0.5  # standard error of the mean
        # Where components are few, the sample's own error counts as well.
        distance = abs(found.mean().item() - value) / (error.item() + 1e-9 * value)
        far = max(far, distance)
        assert distance < 5, (name, found.mean(), value)
print(f"all {len(expected) * len(RANKS)} means within {far:.1f} standard errors")

# %% [markdown]
# ### Exercise 2: the spread of one draw
#
# A network is started once, so the spread of *single* draws counts too. Write
# `spread(ratios)`: the standard deviation of the draws as a share of their mean.
# Then read the print-out: what do unit columns with one λ save you?
#
# ```text
# mean = Σ ratios / n;   spread = √( Σ (ratio − mean)² / (n − 1) ) / mean
# ```


# %%
def spread(ratios):
    """Standard deviation over mean."""
    # your code here
    return None


# %%
def free_gaussian(shape, rank, *, generator=None, **_):
    """Free Gaussian factors with the variance of the unified rule."""
    std = unified_variance("cp", shape, rank) ** 0.5
    factors = [torch.empty(n, rank, dtype=torch.float64) for n in shape]
    return as_cp([f.normal_(0, std, generator=generator) for f in factors])


def check_spread(title, function):
    """Check exercise 2, and print the spread over the rank."""
    sample = torch.tensor([1.0, 2.0, 3.0])
    check(title, function(sample), torch.tensor(0.5))
    if function(sample) is None:
        return
    for name, start in {"unit columns": unified, "free": free_gaussian}.items():
        draws = [variance_ratio(start, rank, DRAWS, seed=1) for rank in RANKS]
        print(f"{name:14}" + "".join(f"{function(d).item():8.0%}" for d in draws))


check_spread("exercise 2", spread)


# %% tags=["solution"] jupyter={"source_hidden": true}
def spread_solution(ratios):
    """Standard deviation over mean."""
    return ratios.std() / ratios.mean()


check_spread("exercise 2, solution", spread_solution)

# %% [markdown]
# ## 4. Not only CP
#
# The rule of Pan et al. holds for every tensor format, with *free* factors of equal
# variance: take the product of all contracted dimensions (input channels, window, every
# rank), times φ, to the power of minus one over the number of factors,
#
# $$\sigma_w^2 = \Big(\varphi \prod_e e\Big)^{-1/n} .$$
#
# For backward passes the same rule is applied to the *equivalent convolution* of the
# backward pass, in which output and input channels have changed places.

# %%
SMALL, SMALL_RANK, MONTE_CARLO = (16, 12, 3, 3), 4, 300 if FAST else 1000
sizes = {"O": 16, "I": 12, "H": 3, "W": 3, "K": 9}
ring = {"O": 4, "P": 4, "I": 4, "J": 3}  # the ring has two cores for each channel mode
generator = torch.Generator().manual_seed(0)
print("format    weights        σ²   Var(W) / target, mean ± standard error")
for name, form in FORMATS.items():
    variance = unified_variance(name, SMALL, SMALL_RANK)
    edges = {**sizes, **(ring if name == "tr" else {})}
    edges |= dict.fromkeys(form.ranks, SMALL_RANK)
    squares = []
    for _ in range(MONTE_CARLO):
        shapes = [[edges[e] for e in vertex] for vertex in form.vertices]
        weights = [torch.randn(s, generator=generator) for s in shapes]
        kernel = form.rebuild([variance**0.5 * w for w in weights])
        squares.append(kernel.square().mean() / (2 / (12 * 9)))
    mean, error = torch.stack(squares).mean(), torch.stack(squares).std()
    error = error / MONTE_CARLO**0.5
    print(f"{name:10}{len(shapes):7} {variance:9.4f}   {mean:.3f} ± {error:.3f}")
    assert (mean - 1).abs() < 5 * error

# %% [markdown]
# ## 5. Twenty layers
#
# Why one factor per layer matters: twenty layers multiply it twenty times. We send
# noise through twenty CP convolutions with ReLU and growing width, and a random
# gradient back. (The window wraps around the image, so that no border takes signal
# away; there is no bias and no training.)
#
# **Predict:** the rank is 32 and the widths grow from 16 to 64. By which power of ten
# do activations change from the first to the last layer with Kaiming on each factor?
# With the paper's Gaussian start? And which of fan-in and fan-out will keep what?

# %%
WIDTHS = [round(16 * 4 ** (k / 20)) for k in range(21)]
DEPTH_RANK, DEPTH_SEEDS = 32, range(2 if FAST else 8)
DEPTH_STARTS = {
    "Kaiming on each factor": kaiming_each,
    "gaussian": gaussian,
    "uniform": uniform,
    "unified, fan-in": unified,
    "unified, fan-out": partial(unified, mode="fan_out"),
}


def signals(start, seed):
    """Variance of the activations 0 to 20 and of the gradients there, shape (2, 21)."""
    options = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    z = [torch.randn(16, WIDTHS[0], 8, 8, **options).requires_grad_()]
    for i, o in pairwise(WIDTHS):
        layer = cpnb.CPConv2d(
            i, o, 3, padding=1, padding_mode="circular", bias=False,
            rank=DEPTH_RANK, init=start, **options,
        )  # fmt: skip
        z.append(layer(F.relu(z[-1])))
    gradients = torch.autograd.grad(z[-1], z, torch.randn(z[-1].shape, **options))
    return torch.tensor([[t.var().item() for t in group] for group in (z, gradients)])


# %%
depth = {}
for name, start in DEPTH_STARTS.items():
    found = torch.stack([signals(start, seed) for seed in DEPTH_SEEDS])
    depth[name] = found.log10().unbind(1)  # activations, gradients: (seeds, layers)

fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
STYLES = {
    "Kaiming on each factor": {"color": "#555555", "marker": "<"},
    "gaussian": LOOKS["gaussian"],
    "uniform": LOOKS["uniform"],
    "unified, fan-in": LOOKS["unified"],
    "unified, fan-out": {"color": "C2", "marker": "D"},
}
for name, groups in depth.items():
    for ax, values in zip(axes, groups, strict=True):
        mean, std = values.mean(0), values.std(0)
        ax.plot(mean, **{**STYLES[name], "label": name}, markevery=4)
        color = STYLES[name]["color"]
        ax.fill_between(range(21), mean - std, mean + std, color=color, alpha=0.2, lw=0)
for ax, what in zip(axes, ("activations", "gradients"), strict=True):
    ax.set(xlabel="layer", ylabel=f"log10 of the variance of the {what}")
    ax.set_xticks(range(0, 21, 4))
axes[0].legend(loc="lower left")
axes[0].set_title("forward: noise enters at layer 0")
axes[1].set_title("backward: a gradient enters at layer 20")
plt.show()

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over seeds, in
# powers of ten. Only the two unified starts stay near zero. Gaussian and uniform
# factors fall together. With Kaiming on each factor nothing arrives. At this scale
# fan-in and fan-out look alike; the table tells them apart.

# %%
print(f"factor on the variance over 20 layers, R = {DEPTH_RANK}, "
      f"{len(DEPTH_SEEDS)} seeds (geometric mean)")  # fmt: skip
print(f"{'':24}{'activations':>14}{'gradients':>14}")
change = {}
for name, (forward, backward) in depth.items():
    change[name] = (
        (forward.mean(0)[-1] - forward.mean(0)[0]).item(),
        (backward.mean(0)[0] - backward.mean(0)[-1]).item(),
    )
    print(f"{name:24}" + "".join(f"{10**value:14.2g}" for value in change[name]))
by_rule = sum(math.log10(DEPTH_RANK / (2 * o)) for o in WIDTHS[1:])
print(f"the rule for gaussian, Π R/(2O): {10**by_rule:.2g} forwards")
print(f"the rule for fan-out, Π I/O: {WIDTHS[0] / WIDTHS[-1]:.2g} forwards, "
      f"and for fan-in, Π O/I: {WIDTHS[-1] / WIDTHS[0]:.2g} backwards")  # fmt: skip

# %% [markdown]
# By the rule fan-in keeps the activations and lets the gradients grow with the width,
# fan-out the other way round. The rule speaks of the *mean* variance; the typical
# network lies below it, because twenty kernels of low rank multiply their fluctuations
# and the logarithm of such a product is on average below the logarithm of its mean.
#
# ### Exercise 3: a start in between
#
# Write `balanced(shape, rank, **options)`: the directions of `unified`, with the
# *geometric mean* of the fan-in and the fan-out λ. By the rule activations then shrink
# by the factor by which gradients grow: two, the root of what one of them had to bear.
#
# ```text
# lam, factors = unified start with mode fan-in
# lam → √(lam_fan_in · lam_fan_out)
# ```


# %%
def balanced(shape, rank, **options):
    """λ and factors of a start between fan-in and fan-out."""
    # your code here
    return None


# %%
def check_balanced(title, start):
    """Check λ, then look at the depth."""
    if start(SHAPE, 8, dtype=torch.float64) is None:
        print(f"{title}: not solved yet, the function returned None.")
        return
    lam, _ = start(SHAPE, 8, dtype=torch.float64)
    check(title, lam, torch.full_like(lam, (2 / 8) ** 0.5 * (64 * 32) ** 0.25))
    found = torch.stack([signals(start, seed) for seed in DEPTH_SEEDS]).log10().mean(0)
    z, g = 10 ** (found[0, -1] - found[0, 0]), 10 ** (found[1, 0] - found[1, -1])
    print(f"activations × {z:.2f} (rule: 0.5), gradients × {g:.2f} (rule: 2)")


check_balanced("exercise 3", balanced)


# %% tags=["solution"] jupyter={"source_hidden": true}
def balanced_solution(shape, rank, **options):
    """λ and factors of a start between fan-in and fan-out."""
    lam, factors = unified(shape, rank, **options)
    return lam * (shape[1] / shape[0]) ** 0.25, factors


check_balanced("exercise 3, solution", balanced_solution)

# %% [markdown]
# ## 6. The race on digits
#
# Variance is a means; training is the end. The rules: `cpnb.DigitsNet` in CP form at
# break-even rank, Adam with a cosine schedule. For each start the learning rate is
# chosen on the **validation** split with a seed used for nothing else. Then fresh seeds
# train at that rate, and each trained network sees the **test** split once.
#
# The network has four layers, not twenty.
#
# **Predict:** will the start with the right variance win? Will the two fitted starts,
# which know a dense start, be ahead of the random ones?

# %%
data = cpnb.load_data("digits")
EPOCHS = 3 if FAST else 6
RATES = [0.003, 0.01] if FAST else [0.003, 0.01, 0.03]
TUNING_SEEDS, SEEDS = ([100], range(2)) if FAST else ([100, 101, 102], range(5))
FIRST_LOSS = {}  # before training, over the fresh seeds


def train(name, lr, seed):
    """A trained network and the record of its run."""
    generator = torch.Generator().manual_seed(seed)
    dense = cpnb.DigitsNet(generator=generator)
    net = cpnb.canonicalize(dense, init=STARTS[name], generator=generator)
    return net, fit(net, name, lr, seed)


def fit(net, name, lr, seed):
    """The record of a training on the digits; notes the loss before it."""
    loss = evaluate(net, data)["loss"]
    FIRST_LOSS.setdefault(name, []).append(loss)
    options = {"epochs": EPOCHS, "batch_size": 64, "progress": False}
    return cpnb.fit(net, data, lr=lr, seed=seed, **options)


# %%
def race(train, names, rates, tuning_seeds=TUNING_SEEDS):
    """Tune each start, train fresh seeds: best rates, runs, test accuracies."""
    best, races, tested = {}, {}, {}
    for name in tqdm(names, desc="starts"):
        tops = torch.zeros(len(rates), len(tuning_seeds))
        for row, lr in enumerate(rates):
            for column, seed in enumerate(tuning_seeds):
                run = train(name, lr, seed)[1]
                if run.status == "finished":  # one that diverged counts as nothing
                    tops[row, column] = run.history[-1]["validation_accuracy"]
        best[name] = rates[int(tops.mean(1).argmax())]
        trained = [train(name, best[name], seed) for seed in SEEDS]
        races[name] = [run for _, run in trained]
        tested[name] = [cpnb.accuracy(net, data.test) for net, _ in trained]
        scores = "".join(f"{value:8.1%}" for value in tops.mean(1))
        print(f"{name:26}{scores}   best rate {best[name]:g}")
    return best, races, tested


print("validation accuracy at the rates", RATES)
best, races, tested = race(train, NAMES, RATES)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
plots.plot_training(races, "train_loss", ax=axes[0])
plots.plot_training(races, "validation_accuracy", ax=axes[1])
axes[0].set_yscale("log")
axes[0].set_title("loss on the training images")
axes[1].set_title("accuracy on the validation images")
plt.show()

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over the fresh
# seeds, each start at its own rate. Whatever distance there is in the first epochs,
# look at how much of it is left in the last.
#
# For a verdict we take the difference to `power` for each seed, and a 95 % interval for
# its mean (Student's $t$, because the seeds are few). When the interval contains zero,
# the starts were not told apart; that is not the same as being equal.


# %%
def report(accuracies, rates, reference="power"):
    """Print a table of test accuracies; return the differences, in points."""
    points, base = {}, pd.Series([*accuracies[reference]])
    n = len(base)
    print(f"test accuracy, mean ± std, n = {n}; difference to {reference}, 95 %")
    for name, accuracy in accuracies.items():
        values = pd.Series([*accuracy])
        line = f"{name:26} lr {rates[name]:<7g}{values.mean():.2%} ± {values.std():.2%}"
        points[name] = paired_difference(100 * values, 100 * base)
        if name != reference:
            line += f"   {points[name].mean:+.2f} ± {points[name].half:.2f} points"
        print(line)
    return points


digits_gaps = report(tested, best)
print(f"one test image is {1 / len(data.test.labels):.2%}")

# %% [markdown]
# ### A suspect: the last layer
#
# `unified` and `unified_small` have the same directions and differ in nothing but the
# variance. If the larger variance, right for depth, does harm here, where? Look at the
# loss *before* the first step; a network that does not know anything should have
# $\ln 10 \approx 2.30$.

# %%
for name in NAMES:
    print(f"{name:14} first loss {sum(FIRST_LOSS[name]) / len(FIRST_LOSS[name]):.2f}")

# %% [markdown]
# The last layer is followed by no ReLU and its outputs are the scores themselves: with
# Kaiming's variance they are large from the start, and wrong with confidence.
#
# **Predict:** what happens when the unified start keeps its variance in all layers but
# the last, whose λ we divide by ten?

# %%
LAST = "unified, last layer / 10"


def train_small_last(name, lr, seed):
    """A trained network, from a unified start with a small last layer."""
    generator = torch.Generator().manual_seed(seed)
    dense = cpnb.DigitsNet(generator=generator)
    net = cpnb.canonicalize(dense, init="unified", generator=generator)
    with torch.no_grad():
        net.fc2.lam.div_(10)
    return net, fit(net, name, lr, seed)


print("validation accuracy at the rates", RATES)
last_best, _, last_tested = race(train_small_last, [LAST], RATES)
print(f"first loss {sum(FIRST_LOSS[LAST]) / len(FIRST_LOSS[LAST]):.2f}")
last_gaps = report(
    {"power": tested["power"], "unified": tested["unified"], **last_tested},
    {**best, **last_best},
)

# %% [markdown]
# ## 7. The race in depth
#
# Four layers forgive much. Now a network of twenty CP linear layers, 64 wide, on the
# same digits, by the same rules (one tuning seed). There is one more start,
# `power (Kaiming)`: the power method applied to dense kernels with *Kaiming's* variance
# instead of torch's default. If the fit mattered, both power starts would do well; if
# the variance, only the second.
#
# **Predict:** which of the five train at all?


# %%
def power_kaiming(shape, rank, *, weight=None, generator=None, **options):
    """The power method on a dense kernel with Kaiming's variance."""
    weight = (
        torch.randn(*shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
    )
    return STARTS["power"](shape, rank, weight=weight, generator=generator, **options)


DEEP = {
    "unified": unified,
    "power": "power",
    LAST: unified,
    "power (Kaiming)": power_kaiming,
    "gaussian": gaussian,
}
DEEP_RATES = [0.001] if FAST else [0.0003, 0.001, 0.003]
DEEP_EPOCHS = 5 if FAST else 10


# %%
def train_deep(name, lr, seed):
    """Twenty CP linear layers and the record of their training."""
    options = {"init": DEEP[name], "generator": torch.Generator().manual_seed(seed)}
    layers = [nn.Flatten()]
    for _ in range(19):
        layers += [cpnb.CPLinear(64, 64, **options), nn.ReLU()]
    net = nn.Sequential(*layers, cpnb.CPLinear(64, 10, **options))
    if name == LAST:
        with torch.no_grad():
            net[-1].lam.div_(10)
    recipe = {"epochs": DEEP_EPOCHS, "batch_size": 64, "progress": False}
    return net, cpnb.fit(net, data, lr=lr, seed=seed, **recipe)


print("validation accuracy at the rates", DEEP_RATES)
deep_best, deep_races, deep_tested = race(
    train_deep, list(DEEP), DEEP_RATES, TUNING_SEEDS[:1]
)

# %%
fig, ax = plt.subplots()
plots.plot_training(deep_races, "validation_accuracy", ax=ax)
ax.set_ylim(0, 1)
top = max(DEEP, key=lambda name: sum(deep_tested[name]))
ax.set_title(f"Twenty layers: best on the test images is {top}")
plt.show()

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over the fresh
# seeds; chance is one in ten. The starts that keep the variance train; those that lose
# it layer by layer do not leave chance, or hardly.

# %%
print(f"test accuracy after {DEEP_EPOCHS} epochs, mean ± std, n = {len(SEEDS)}")
for name, values in deep_tested.items():
    values = torch.tensor(values)
    print(f"{name:26} lr {deep_best[name]:<7g}{values.mean():.1%} ± {values.std():.1%}")

# %% [markdown]
# ## 8. The same rule in four other formats
#
# The paper of the unified rule is about all tensorial networks, and claims that they
# train stably and faster with it. A convolution in any of `FORMATS`, its weights drawn
# by the rule, or as one would draw weights without knowing of it: Xavier's or Kaiming's
# variance for each weight by itself.


# %%
class TensorConv(nn.Module):
    """A 3×3 convolution with 16 channels whose kernel is a tensor network of rank 4."""

    def __init__(self, name, start, generator):
        super().__init__()
        self.form = FORMATS[name]
        edges = {"O": 16, "I": 16, "K": 9} | dict.fromkeys(self.form.ranks, 4)
        if name == "tr":  # the ring has two cores for each channel mode
            edges |= dict.fromkeys("OPIJ", 4)
        std = unified_variance(name, (16, 16, 3, 3), 4) ** 0.5
        fill = {
            "unified": partial(nn.init.normal_, std=std),
            "Xavier": nn.init.xavier_normal_,
            "Kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
        }[start]
        empty = [torch.empty([edges[e] for e in v]) for v in self.form.vertices]
        drawn = [nn.Parameter(fill(w, generator=generator)) for w in empty]
        self.weights = nn.ParameterList(drawn)

    def forward(self, x):
        """Convolve; shape kept."""
        kernel = self.form.rebuild(list(self.weights)).reshape(16, 16, 3, 3)
        return F.relu(F.conv2d(x, kernel, padding=1))


# %%
TENSOR_LAYERS, TENSOR_EPOCHS = 8, 2 if FAST else 5
TENSOR_RATES = [0.003] if FAST else [0.0003, 0.001, 0.003, 0.01, 0.03]
DRAWS = ("unified", "Xavier", "Kaiming")
TENSOR_FORMATS = {"tucker2": "Tucker-2", "tt": "train", "tr": "ring", "btd": "blocks"}
TENSOR = [f"{form}, {start}" for form in TENSOR_FORMATS for start in DRAWS]


def train_tensor(name, lr, seed):
    """A deep network of such convolutions and the record of its training."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the two ordinary layers
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    layers += [
        TensorConv(*name.split(", "), generator=generator) for _ in range(TENSOR_LAYERS)
    ]
    net = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    recipe = {"epochs": TENSOR_EPOCHS, "batch_size": 64, "progress": False}
    return net, cpnb.fit(net, data, lr=lr, seed=seed, **recipe)


print("validation accuracy at the rates", TENSOR_RATES)
tensor_best, tensor_races, tensor_tested = race(
    train_tensor, TENSOR, TENSOR_RATES, TUNING_SEEDS[:1]
)

# %%
for format, label in TENSOR_FORMATS.items():
    values = {start: tensor_tested[f"{format}, {start}"] for start in DRAWS}
    base = 100 * pd.Series(values["unified"])
    print(f"{label}: unified {base.mean():.1f} ± {base.std():.1f} %", end="")
    for start in DRAWS[1:]:
        gap = paired_difference(base, 100 * pd.Series(values[start]))
        verb = "told apart" if gap.told_apart else "not told apart"
        print(f"; against {start} {gap.mean:+.1f} ± {gap.half:.1f} ({verb})", end="")
    print()

# %% [markdown]
# **What to see:** the paper's claim, bounded. Where Kaiming's variance for each weight
# is far off (Tucker-2, train) its networks do not learn to read at any rate, and with
# the rule they do. In the ring it happens to be near the rule's, and does as well. With
# Xavier's variance they learn more slowly at small rates; at their best rate three of
# the four catch up, and the blocks do not. So the rule is not the only variance that
# trains; it is the one that works in all four formats.
#
# ## 9. The race on MNIST, from the record
#
# The same race with the paper's LeNet at the authors' ranks takes longer than a
# notebook should. `python notebooks/experiments.py run initialization-mnist` runs it;
# this cell reads the record of such a run, and no data set is needed.

# %%
NAME = "initialization-mnist"
wanted, mnist = EXPERIMENTS[NAME], read_results()[NAME]
runs, recipe = mnist.runs, mnist.recipes["unified"]
place, minutes = runs.iloc[0], runs.seconds.sum() / 60
print(wanted.title)
print(mnist.data)
ranks = recipe.options["rank"].items()
print("ranks:", ", ".join(f"{name} {rank}" for name, rank in ranks))
print("{optimizer}, batch {batch_size}, rates".format(**recipe.settings), *mnist.rates)
print(f"{len(runs)} runs, {minutes:.0f} minutes of training, {place.date[:10]}")
print(f"{place.device}, {place.threads} thread, torch {place.torch}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
curves = mnist.curves.query("phase == 'final'")
plots.plot_training(curves, "train_loss", ax=axes[0])
plots.plot_training(curves, "validation_accuracy", ax=axes[1])
axes[0].set_yscale("log")
axes[0].set_title("MNIST: loss on the training images")
axes[1].set_title("MNIST: accuracy on the validation images")
plt.show()

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over the seeds, at
# a reduced size: few training images, few epochs.

# %%
tests = mnist.runs.query("phase == 'final'").groupby("recipe")
rates = tests.lr.first()
mnist_gaps = report({n: tests.get_group(n).test_accuracy for n in NAMES}, rates)
for name, loss in tests.start_validation_loss.mean()[NAMES].items():
    print(f"{name:14} first loss {loss:.2f}")
for name in rates.index[rates.isin([min(mnist.rates), max(mnist.rates)])]:
    print(f"{name}: the best rate is at the edge of the grid")

# %% [markdown]
# **What to see in the table:** how much of the distance between `unified` and the
# fitted starts is the variance, and how much the fit: `unified_small` has random
# directions with the variance that the fitted starts have at full rank.
#
# What does the fit itself cost? The seconds to start one LeNet, before any training:

# %%
waits = runs.groupby("recipe").start_seconds.median()[NAMES]
epoch = torch.tensor([*mnist.curves.seconds]).median().item()
for name, seconds in waits.items():
    print(f"{name:14} {seconds:6.2f} s, {seconds / epoch:6.1%} of an epoch")

# %% [markdown]
# ## 10. The answer
#
# Written by the next cell from the numbers above, so that text and numbers agree.


# %%
def verdict(name, gaps):
    """A start against the power method, in points of test accuracy."""
    gap, seen = gaps[name], "not told apart"
    if gap.told_apart:
        seen = "better" if gap.mean > 0 else "worse"
    return f"{name} {gap.mean:+.2f} ± {gap.half:.2f} ({seen})"


cheap = ("unified", "unified_small", "gaussian", "uniform")


# %%
def answer():
    """The paragraph."""
    pairs = [gaps[n] for gaps in (digits_gaps, mnist_gaps) for n in cheap]
    wins = sum(gap.told_apart and gap.mean > 0 for gap in pairs)
    near = {n: max(cheap, key=lambda x: g[x].mean)
            for n, g in (("digits", digits_gaps), ("MNIST", mnist_gaps))}  # fmt: skip
    share = {n: torch.tensor(values).mean().item() for n, values in deep_tested.items()}
    return (
        f"In {wins} of {2 * len(cheap)} comparisons at four layers a random start was "
        f"better than the power method. Points of test accuracy against it, 95 %: on "
        f"digits (n = {len(SEEDS)}) "
        + ", ".join(verdict(name, digits_gaps) for name in (*cheap, "als"))
        + f"; on MNIST at reduced size (n = {len(mnist.seeds)}) "
        + ", ".join(verdict(name, mnist_gaps) for name in (*cheap, "als"))
        + f". The nearest random starts are {near['digits']} on digits and "
        f"{near['MNIST']} on MNIST. For the unified start the last layer matters: with "
        f"its λ divided by ten, {verdict(LAST, last_gaps)} on digits. What the fit "
        f"costs is {waits['power']:.1f} s for a LeNet, {waits['power'] / epoch:.0%} of "
        f"one epoch of this size. At twenty layers the variance decides: the power "
        f"method reaches {share['power']:.0%} when fitted to torch's default kernels "
        f"and {share['power (Kaiming)']:.0%} when fitted to Kaiming's, unified "
        f"{share['unified']:.0%} and with a small last layer {share[LAST]:.0%}, "
        f"gaussian {share['gaussian']:.0%}."
    )


print(textwrap.fill(answer(), 84))

# %% [markdown]
# **How far this reaches.** One small and one reduced data set, networks of four and of
# twenty layers, Adam, few epochs, rates from a coarse grid. The intervals speak of
# seeds, not of other data. That two starts were not told apart is a statement about
# these few seeds.
#
# ## What was not shown
#
# - *MNIST at full size, CIFAR-10, SGD and RMSprop*, the paper's setting: the race of
#   the six starts is defined for Adam and the reduced size only.
# - *Batch normalization*, which repairs a wrong variance at run time.
# - *Starting from a trained kernel*: there a fit is not a luxury but the point, see
#   `01_cp_decomposition`.
#
# ## Summary
#
# - With unit columns $\operatorname{Var}(W) = R\lambda^2/(O I K_h K_w)$; the paper's
#   $2/R$ cancels, and its starts have $R/(2O)$ of Kaiming's variance.
# - $\lambda = \sqrt{2O/R}$ gives Kaiming's variance at every rank, in nearly every
#   draw; for any tensor format `unified_variance` gives the variance of free
#   factors.
# - A factor per layer is a power in depth: deep networks need the right variance.
# - At four layers the fitted starts are ahead or not told apart; the fit costs a
#   fraction of an epoch. A cheap start does not beat it here.
# - The layer that makes the scores is no hidden layer, and Kaiming's variance makes the
#   first loss large. A smaller $\lambda$ there helped the unified start at four layers;
#   at twenty it did not.
# - A fit copies the variance of what it is fitted to: at twenty layers the fit of
#   torch's default kernels does not train and that of Kaiming's is ahead of the unified
#   start. So the right variance is necessary, and not all that a fit brings.
# - In Tucker-2, tensor-train, tensor-ring and block-term layers the unified variance
#   trains everywhere; Kaiming's for each weight fails in two formats, Xavier's in one.
#
# **One recommendation.** Give the *dense* network a good start, Kaiming's variance if
# it is deep and torch's default if it has a few layers, and let `canonicalize` fit it,
# which is its default. At four layers nothing in sections 6 and 9 is better than that
# fit, at twenty nothing in section 7 is. Without a dense network to fit, take
# `"unified"`, with a smaller $\lambda$ in the last layer of a shallow one. The races of
# `04_training_curves` and `07_factorized_layers` start as they say there; where they
# contradict this, they were made before the step gauge or at a tenth of the parameters.
#
# **Next:** `04_training_curves` compares the normalizations on all images.
#
# **References.** L. Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical
# convolutional neural networks*, 2022, arXiv:2206.01509. Y. Pan et al., *A
# unified weight initialization paradigm for tensorial convolutional neural networks*,
# 2022, arXiv:2205.15307. K. He, X. Zhang, S. Ren, J. Sun, *Delving deep into
# rectifiers*, 2015, arXiv:1502.01852. Y. LeCun, L. Bottou, Y. Bengio, P. Haffner,
# *Gradient-based learning applied to document recognition*, 1998,
# doi:10.1109/5.726791 (MNIST).

# %%
print(f"here: cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
print(f"records: cpnb {place.cpnb}, torch {place.torch}, python {place.python}")
