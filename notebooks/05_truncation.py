# %% [markdown]
# # Accuracy against rank: what to cut, in which layer, and does training bring it back?
#
# A trained canonical network can be made smaller at once: drop components. This
# notebook measures what that costs, with several networks instead of one, and against
# references that keep us honest: a fresh fit of the same rank, a kernel of zeros, the
# dense network, and a small network trained from scratch.
#
# **After this notebook you can**
#
# 1. order components by $|\lambda|$ or by their exact effect on the kernel, and say why
#    the sign of λ must not count;
# 2. read a truncation panel: what a cut loses, and what a fresh fit would lose;
# 3. decide which layer to cut, and train the small network again without the mistake
#    that makes such training do nothing.
#
# **You need** `00_tour`; `01_cp_decomposition` helps.
#
# **Time, measured on two CPU cores:** 1.9 minutes; fast mode 0.8.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import cpnb
from cpnb import plots

plots.use_style()
torch.set_num_threads(1)  # rounding, and so every number, depends on it
FAST = cpnb.fast_mode()
SEEDS = range(3 if FAST else 5)
print(f"{'fast' if FAST else 'full'} mode, n = {len(SEEDS)} networks")

# %% [markdown]
# ## 1. Four components by hand
#
# Take components that are orthogonal, so that everything can be checked on paper: $W =
# \sum_r \lambda_r\, e_r \circ e_r$ is the diagonal matrix of the λ. Two of them are
# large and negative.
#
# **Predict:** two of the four components may stay. Which two, and what is the relative
# error $\lVert W-\hat W\rVert/\lVert W\rVert$ then?

# %%
lam = torch.tensor([-5.0, -4.0, 1.5, 1.0])
layer = cpnb.CPLinear(4, 4, rank=4, bias=False)
with torch.no_grad():
    layer.scale.fill_(1.0)
    layer.lam.copy_(lam)
    for factor in layer.factors:
        factor.copy_(torch.eye(4))
print(layer.weight.detach())

# %%
by_size = cpnb.truncate(layer, rank=2)
signed = cpnb.select_components(layer, lam.argsort(descending=True)[:2])
for name, cut in (("largest |λ|", by_size), ("largest signed λ", signed)):
    error = cpnb.relative_error(layer.weight, cut.weight).item()
    print(f"{name:>16}: keeps {cut.lam.tolist()}, error {error:.3f}")

# %% [markdown]
# By hand: for orthogonal components the squared error is the sum of the dropped
# $\lambda_r^2$. Keeping $-5$ and $-4$ gives $\sqrt{(1.5^2+1^2)/44.25}$; sorting by the
# *signed* value keeps the two small ones and loses $\sqrt{(5^2+4^2)/44.25}$, nearly
# everything. The public code of the paper (Veeramacheneni et al. 2022,
# [arXiv:2206.01509](https://arxiv.org/abs/2206.01509)) sorts by signed λ; this library
# sorts by size.

# %%
torch.testing.assert_close(
    cpnb.relative_error(layer.weight, by_size.weight),
    torch.tensor((1.5**2 + 1**2) / 44.25).sqrt(),
)
torch.testing.assert_close(
    cpnb.relative_error(layer.weight, signed.weight),
    torch.tensor((5**2 + 4**2) / 44.25).sqrt(),
)
print("both errors are those computed by hand")

# %% [markdown]
# ## 2. Components that overlap
#
# Components of a trained layer are not orthogonal. With
# $\Gamma_{rs}$ the inner product of two components of unit length (a small matrix,
# computed from the factors), dropping a set $S$ costs exactly
#
# $$\lVert W-\hat W\rVert^2 \;=\; \sum_{r\in S}\sum_{s\in S}
# \lambda_r\,\Gamma_{rs}\,\lambda_s ,$$
#
# so $|\lambda|$ alone does not decide. There are four ways to cut in this library:
#
# - `key="lam"`: keep the largest $|\lambda_r|$, as the paper does;
# - `key="greedy"`: remove one component at a time, always the one for which the sum
#   above grows least;
# - either one with `refit=True`: afterwards re-solve the remaining λ by least squares,
#   $\Gamma_{KK}\lambda' = \Gamma_{K:}\lambda$ for the kept components $K$.
#
# As references, a **fresh fit** of the dense kernel at the same rank (`als`), which may
# choose all components anew, and a **kernel of zeros**, of error 1.
#
# Now the networks: the same recipe as in the tour, one per seed.


# %%
def trained(seed, rank="same", epochs=20):
    """Train DigitsNet in CP form."""
    generator = torch.Generator().manual_seed(seed)
    plain = cpnb.DigitsNet(generator=generator)
    net = cpnb.canonicalize(plain, rank=rank, init="gaussian", generator=generator)
    cpnb.fit(net, data, epochs=epochs, lr=0.01, seed=seed, progress=False)
    return net


def summary(values):
    """Mean and standard deviation, in percent."""
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} %"


data = cpnb.load_data("digits")
nets = [trained(seed) for seed in SEEDS]
whole = [cpnb.accuracy(net, data) for net in nets]
lams = [layer.lam for net in nets for layer in cpnb.cp_layers(net).values()]
print(f"validation accuracy {summary(whole)}, n = {len(nets)}")
print(f"negative λ: {sum((lam < 0).sum().item() for lam in lams)}")

# %% [markdown]
# All accuracies in this notebook are on the 359 *validation* images, because we make
# choices with them; the test images stay closed. (The last line says whether the sign
# of λ would have mattered for these networks, whose λ started at 1. A sorting rule has
# to be right for those where it does.)
#
# **Predict:** the kernel of `conv2` has 84 components. Half of them go. Is the relative
# error nearer to 0.1, to 0.5 or to 1? And a fresh fit with 42 components?

# %%
ways = {
    "lam": {"key": "lam"},
    "lam+refit": {"key": "lam", "refit": True},
    "greedy": {"key": "greedy"},
    "greedy+refit": {"key": "greedy", "refit": True},
}
kept = [1, 4, 8, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77, 81, 84]


def errors(layer, options):
    """Relative kernel errors of a layer cut to each rank in ``kept``."""
    cuts = [cpnb.truncate(layer, rank=rank, **options) for rank in kept]
    return [cpnb.relative_error(layer.weight, cut.weight).item() for cut in cuts]


conv2 = cpnb.cp_layers(nets[0])["conv2"]
kernel = conv2.weight.detach()
panel = {name: (kept, errors(conv2, options)) for name, options in ways.items()}

# %%
generator = torch.Generator().manual_seed(0)
fresh = [cpnb.als(kernel, k, generator=generator).relative_error for k in kept]
panel["fresh"] = (kept, fresh)
ax = plots.plot_truncation_panel(panel)
ax.set_title("A trained conv2: what is kept matters less than fitting anew")
plt.show()
half = kept.index(42)
print({name: round(curve[half], 3) for name, (_, curve) in panel.items()})

# %% [markdown]
# **What to see:** the four ways to drop components lie close together: greedy is below
# $|\lambda|$, and refitting λ lowers both, all by little. The fresh fit is far below
# all of them. So the *kernel* needs few components; the *components that training
# found* are just not the ones to keep. Their $|\lambda|$ hardly differ, there is
# nothing to sort.
#
# Two of these orders hold for every layer, by construction, and a cell can check them:

# %%
for plain, better in (("lam", "lam+refit"), ("greedy", "greedy+refit")):
    pairs = zip(panel[plain][1], panel[better][1], strict=True)
    assert all(refit <= error + 1e-6 for error, refit in pairs)
print("refitting λ never raised the error")

# %% [markdown]
# Greedy against $|\lambda|$ is *not* such a theorem: greedy looks one step ahead only.
#
# **A second panel.** Is a fresh fit then the better thing to *cut*? Decompose the same
# kernel into 84 components in four ways, and drop the smallest of those. ALS solves for
# all components together, for 50 or 500 sweeps; a *ridge* holds its components small.
# The power method finds one component after the other, each for what the earlier ones
# left over. Beside it, the same for a kernel of random numbers, the hardest case.
#
# **Predict:** 500 sweeps fit the kernel better than 50. Are they better to cut, too?

# %%
methods = {
    "ALS, 50 sweeps": lambda w: cpnb.als(w, 84, generator=generator),
    "ALS, 500 sweeps": lambda w: cpnb.als(w, 84, sweeps=500, generator=generator),
    "ALS, ridge 0.001": lambda w: cpnb.als(w, 84, ridge=1e-3, generator=generator),
    "power method": lambda w: cpnb.power_method(w, 84, generator=generator),
}


def cut_fit(kernel, method):
    """Errors when the largest components of one fit are kept; λ² over the kernel's."""
    fit = method(kernel)
    order = fit.lam.abs().argsort(descending=True)
    cuts = [
        cpnb.cp_to_kernel(fit.lam[i], [f[:, i] for f in fit.factors])
        for i in (order[:rank] for rank in kept)
    ]
    energy = fit.lam.square().sum() / kernel.square().sum()
    return [cpnb.relative_error(kernel, cut).item() for cut in cuts], energy.item()


# %%
random_kernel = torch.randn(kernel.shape, generator=generator)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, title, w in zip(
    axes, ("trained conv2", "random"), (kernel, random_kernel), strict=True
):
    curves = {}
    for name, method in methods.items():
        found, energy = cut_fit(w, method)
        curves[name] = (kept, found)
        print(
            f"{title:>13}, {name:>16}: error {found[-1]:.3f} with all 84, "
            f"{found[half]:.2f} with 42; Σλ²/‖W‖² = {energy:.1f}"
        )
    plots.plot_truncation_panel(curves, ax=ax).legend(loc="lower left")
    ax.set_title(f"One fit of a {title} kernel, cut by |λ|")
plt.show()

# %% [markdown]
# **What to see:** the longer ALS fits, the smaller its error with all components and
# the *larger* its error once some are dropped, up to above the dashed line: a cut that
# is worse than no kernel at all. The last number printed says why. $\sum\lambda_r^2$
# far above $\lVert W\rVert^2$ means large components that cancel one another, and a cut
# breaks the balance (Phan et al. 2020 study this in depth). The ridge and the power
# method fit less well and are far better to cut. A good fit at one rank says nothing
# about the ranks below it.
#
# ## 3. Accuracy against rank, all layers together
#
# A kernel error is not yet an accuracy. `rank_sweep` measures it at every fraction
# asked for; we do this for every network and every way to cut. The fresh fit is a
# network in which each kernel is decomposed anew (`canonicalize(..., init="als")`).
#
# **Predict:** greedy has the smaller kernel error. Does it also have the higher
# accuracy?

# %%
shares = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def fresh_network(net, share):
    """The network with every kernel fitted anew at a share of its rank."""
    ranks = {
        name: cpnb.kept_rank(layer.rank, share)
        for name, layer in cpnb.cp_layers(net).items()
    }
    generator = torch.Generator().manual_seed(0)
    return cpnb.canonicalize(
        cpnb.to_dense(net), rank=ranks, init="als", generator=generator
    )


everywhere = {name: [] for name in [*ways, "fresh"]}  # (network, share) accuracies
for net in nets:
    for name, options in ways.items():
        sweep = cpnb.rank_sweep(
            net, data, ranks={"*": shares}, progress=False, **options
        )
        everywhere[name].append([row["accuracy"] for row in sweep.to_rows()])
    refitted = [fresh_network(net, share) for share in shares]
    everywhere["fresh"].append([cpnb.accuracy(net, data) for net in refitted])


# %%
def band(ax, x, values, name):
    """Draw mean ± 1 std over networks, in the colour and marker of the method."""
    label, color, marker = plots.METHOD_STYLES[name]
    mean, spread = np.mean(values, 0), np.std(values, 0, ddof=1)
    ax.plot(x, mean, color=color, marker=marker, label=label)
    ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


fig, ax = plt.subplots()
for name, values in everywhere.items():
    band(ax, shares, values, name)
ax.set(xlabel="share of components kept, every layer", ylabel="accuracy")
ax.set_title(f"Same share in every layer; mean ± 1 std, n = {len(nets)} networks")
ax.legend()
plt.show()

# %% [markdown]
# **What to see:** the fresh fit, far better than any cut in the figure before, also
# keeps the accuracy longest. Refitting λ changes little. For greedy against
# $|\lambda|$ the bands overlap at most shares, so compare network by network:

# %%
lam_values, greedy_values = np.array(everywhere["lam"]), np.array(everywhere["greedy"])
print("greedy minus top |λ|, in percentage points of accuracy")
ahead, rest = {}, {}  # share kept → mean gain
for n, share in enumerate(shares[:-1]):
    gain = 100 * (greedy_values[:, n] - lam_values[:, n])
    mean, spread, wins = gain.mean(), gain.std(ddof=1), int((gain > 0).sum())
    print(f"{share:.0%} kept: {mean:+5.1f} ± {spread:4.1f}, ", end="")
    print(f"ahead in {wins} of {len(nets)} networks")
    clear = mean > 1 and 5 * wins >= 4 * len(nets)
    (ahead if clear else rest)[f"{share:.0%}"] = mean

print("\nahead by more than one point, and in four fifths of the networks or more:")
print(f"at {', '.join(ahead) or 'no share'} kept")
for name, found in {"there": ahead, "elsewhere": rest}.items():
    if found:
        low, high = min(found.values()), max(found.values())
        print(f"mean difference {name}: {low:+.1f} to {high:+.1f} points")

# %% [markdown]
# Read the table before believing either side, and each mean beside its spread. A
# smaller kernel error is a reason to expect a higher accuracy and no guarantee of it:
# the error counts all directions of a kernel alike, and the digits do not.
#
# ## 4. One layer at a time
#
# **Predict:** which of `conv1`, `conv2`, `fc1`, `fc2` tolerates the deepest cut?

# %%
names = list(cpnb.cp_layers(nets[0]))
grid = {
    "conv2": [2, 5, 10, 15, 21, 30, 42, 63, 84],
    "fc1": [2, 5, 10, 15, 21, 28, 42, 57],
}
grid |= {"conv1": range(1, 8), "fc2": range(1, 10)}
alone = {(name, way): [] for name in names for way in ("lam", "greedy")}
for net in nets:
    for way in ("lam", "greedy"):
        sweep = cpnb.rank_sweep(net, data, ranks=grid, key=way, progress=False)
        for name in names:
            found = [r["accuracy"] for r in sweep.to_rows() if r["layer"] == name]
            alone[name, way].append(found)

# %%
fig, axes = plt.subplots(1, 4, figsize=(10, 3.2), sharey=True)
for ax, name in zip(axes, names, strict=True):
    for way in ("lam", "greedy"):
        band(ax, list(grid[name]), alone[name, way], way)
    ax.set_xlabel(f"rank of {name}")
axes[0].set_ylabel("accuracy")
axes[0].legend()
fig.suptitle(f"One layer cut, the others whole; mean ± 1 std, n = {len(nets)}")
plt.show()

# %% [markdown]
# **What to see:** `conv2` and `fc1` give up half of their components almost for free.
# `conv1` and `fc2` have few components and lose accuracy soon. The common share of
# section 3 was limited by its two smallest layers.
#
# ## 5. What is saved: parameters, against the dense network
#
# The small layers hold few parameters. So cut `conv2` and `fc1` and leave the others
# whole; the x-axis is now what counts, the parameters of the network divided by those
# of the dense one.

# %%
layers = cpnb.cp_layers(nets[0])
total = sum(layer.dense_parameters for layer in layers.values())
for name, layer in layers.items():
    share = layer.dense_parameters / total
    print(
        f"{name}: break-even {layer.break_even_rank:2}, {share:5.1%} of the dense net"
    )


def ranks_at(share, only):
    """Ranks when the layers in ``only`` keep a share, the others everything."""
    return {name: cpnb.kept_rank(layers[name].rank, share) for name in only}


# %%
plans = {"every layer": names, "conv2 and fc1 only": ["conv2", "fc1"]}
size, reached = {}, {}
for plan, only in plans.items():
    cuts = [
        [
            cpnb.truncate(net, rank=ranks_at(share, only), key="greedy", refit=True)
            for share in shares
        ]
        for net in nets
    ]
    size[plan] = [sum(p.numel() for p in cut.parameters()) / total for cut in cuts[0]]
    reached[plan] = [[cpnb.accuracy(cut, data) for cut in row] for row in cuts]

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for (name, layer), marker in zip(layers.items(), "osv^", strict=True):
    ranks = np.linspace(1, 1.5 * layer.break_even_rank, 10).round().astype(int)
    ratio = [layer.parameters_at(int(rank)) / layer.dense_parameters for rank in ranks]
    left.plot(ranks / layer.break_even_rank, ratio, marker=marker, label=name)
left.axhline(1, color="#555555", ls="--")
left.axvline(1, color="#555555", ls=":")
left.set(xlabel="rank ÷ break-even rank", ylabel="parameters ÷ dense")
left.set_title("From break-even on, CP form is larger than dense")
for plan, line in zip(plans, ("o--", ">-"), strict=True):
    mean, spread = np.mean(reached[plan], 0), np.std(reached[plan], 0, ddof=1)
    right.plot(size[plan], mean, line, color="#0072b2", label=plan)
    right.errorbar(size[plan], mean, spread, fmt="none", ecolor="#0072b2")
right.axvline(1, color="#555555", ls="--")
right.set(xlabel="parameters ÷ dense, whole network", ylabel="accuracy", ylim=(0, 1.05))
right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
right.set_title(f"Where to cut matters; mean ± 1 std, n = {len(nets)}")
for ax in (left, right):
    ax.legend(handlelength=3)
plt.show()

# %% [markdown]
# **What to see:** left, each layer reaches 1 at its break-even rank or, for the small
# ones, a component before it (rounding, and σ): there is no
# compression to the right of it, whatever the number of components dropped. Right, for
# the same number of parameters, leaving the two small layers alone is far better than
# cutting everything alike: a larger effect than any choice of key in section 3.
#
# ## 6. Training after the cut
#
# A cut network can be trained again. There is a trap on the way: an optimizer holds
# *references to parameters*. One that was built before the cut holds the old ones.

# %%
net = nets[0]
stale = torch.optim.SGD(net.parameters(), lr=0.1)
small = cpnb.truncate(net, rank=ranks_at(0.3, ["conv2", "fc1"]))
before = [p.detach().clone() for p in small.parameters()]

images, labels = data.train.standardized(), data.train.labels
torch.nn.functional.cross_entropy(small(images), labels).backward()
stale.step()
moved = sum(
    not torch.equal(*pair) for pair in zip(before, small.parameters(), strict=True)
)
print(f"parameters that moved: {moved} of {len(before)}")

# %% [markdown]
# No error, no warning, and nothing learned. `cpnb.fit` builds a new optimizer every
# time it is called:

# %%
cpnb.fit(small, data, epochs=1, lr=0.01, progress=False)
moved = sum(
    not torch.equal(*pair) for pair in zip(before, small.parameters(), strict=True)
)
print(f"parameters that moved: {moved} of {len(before)}")

# %% [markdown]
# Now with care, for every layer cut to the same share. The honest rival is a network
# that had these small ranks **from the start** and was trained for as long in total.
#
# **Predict:** ten epochs of training after the cut: how much comes back? And who wins,
# the network that was cut, or the one that was always small?

# %%
cut_shares = [0.35] if FAST else [0.2, 0.35, 0.5]
steps = ["cut", "cut + 10 epochs", "small from the start"]
outcome = {step: {share: [] for share in cut_shares} for step in steps}
for seed, net in zip(SEEDS, nets, strict=True):
    for share in cut_shares:
        small = cpnb.truncate(net, keep=share, key="greedy", refit=True)
        outcome["cut"][share].append(cpnb.accuracy(small, data))
        cpnb.fit(small, data, epochs=10, lr=0.01, seed=seed, progress=False)
        outcome["cut + 10 epochs"][share].append(cpnb.accuracy(small, data))
        scratch = trained(seed, ranks_at(share, names), epochs=30)
        outcome["small from the start"][share].append(cpnb.accuracy(scratch, data))
for share in cut_shares:
    print(f"{share:.0%} kept, n = {len(nets)}")
    for step in steps:
        print(f"  {step:>20}: {summary(outcome[step][share])}")

# %%
fig, ax = plt.subplots()
for number, (step, color) in enumerate(
    zip(steps, ("#99c7e0", "#0072b2", "#cc79a7"), strict=True)
):
    place = np.arange(len(cut_shares)) + 0.26 * (number - 1)
    values = [outcome[step][share] for share in cut_shares]
    spread = np.std(values, 1, ddof=1)
    ax.bar(place, np.mean(values, 1), 0.24, yerr=spread, color=color, label=step)
ax.axhline(np.mean(whole), color="#555555", ls="--", label="before the cut")
ax.set_xticks(range(len(cut_shares)), [f"{share:.0%} kept" for share in cut_shares])
ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
ax.set(ylabel="accuracy", ylim=(0, 1.05))
ax.set_title(f"Training after the cut; mean ± 1 std, n = {len(nets)}")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# **What to see:** training brings back most of what the cut took, except at the deepest
# cut of the full run, which leaves a single component in `conv1` and in `fc2`. There
# the network that was small from the start does better; at the milder cuts the one that
# was cut and trained again ends a little ahead. That gain, the last two bars and not
# the first two, is what truncation has earned.
#
# ## 7. The explorer
#
# First the picture that it starts from, for pages without a kernel: one network, greedy
# with refit.

# %%
sweep = cpnb.rank_sweep(nets[0], data, key="greedy", refit=True, progress=False)
ax = plots.plot_rank_curve(sweep.to_rows(), "*")
ax.set_title("All layers cut to the same share: one network, greedy with refit")
plt.show()

# %% [markdown]
# **What to see:** the steps come from the small layers, which can only lose whole
# components. Below, move `conv2` and `fc1` first and leave the other two alone.

# %%
explorer = cpnb.RankExplorer(nets[0], data, sweep=sweep)
explorer

# %% [markdown]
# ## 8. Exercises
#
# **Exercise 1.** The exact cost of removing a set of components, from the formula of
# section 2.
#
# ```text
# cost = 0
# for r in dropped:
#     for s in dropped:
#         cost += lam[r] * gram[r, s] * lam[s]
# ```


# %%
def removal_cost(lam, gram, dropped):
    """Squared kernel error when the components in ``dropped`` are removed."""
    return None  # your code


# %%
def check_cost(function):
    """Compare with the error of the truncated kernel itself."""
    lam, units = conv2.components(torch.float64)
    gram = cpnb.component_gram(units)
    for count in (1, 10, 60):
        order = cpnb.component_order(conv2)
        cut = cpnb.select_components(conv2, order[:-count])
        expected = (conv2.weight - cut.weight).double().square().sum()
        found = function(lam, gram, order[-count:])
        if found is None:
            return "not solved yet"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    return "correct"


check_cost(removal_cost)


# %% tags=["solution"]
def removal_cost_solution(lam, gram, dropped):
    """Squared kernel error when the components in ``dropped`` are removed."""
    weights = lam[dropped]
    return weights @ gram[dropped][:, dropped] @ weights


check_cost(removal_cost_solution)

# %% [markdown]
# **Exercise 2.** Is $|\lambda|$ any better than chance? Cut `conv2` to `rank`
# components drawn at random (`torch.randperm(..., generator=generator)` and
# `cpnb.select_components`) and return the relative kernel error of the result.


# %%
def random_error(layer, rank, generator):
    """Relative kernel error when ``rank`` random components are kept."""
    return None  # your code


# %%
def check_random(function):
    """Compare the mean of ten draws with the order by size."""
    generator = torch.Generator().manual_seed(0)
    draws = [function(conv2, 42, generator) for _ in range(10)]
    if None in draws:
        return "not solved yet"
    if function(conv2, 84, generator) > 1e-6:
        return "not yet: keeping all components must leave the kernel as it is"
    if np.std(draws) == 0:
        return "not yet: ten draws gave the same error"
    sized = panel["lam"][1][half]
    return f"plausible: random {np.mean(draws):.3f}, largest |λ| {sized:.3f}"


check_random(random_error)


# %% tags=["solution"]
def random_error_solution(layer, rank, generator):
    """Relative kernel error when ``rank`` random components are kept."""
    index = torch.randperm(layer.rank, generator=generator)[:rank]
    cut = cpnb.select_components(layer, index)
    return cpnb.relative_error(layer.weight, cut.weight).item()


check_random(random_error_solution)

# %% [markdown]
# **Exercise 3.** Choose the ranks of `nets[0]` so that at least 95 % of the validation
# images are read correctly with as few parameters as you can. The check cuts the
# network (greedy with refit, no training) and says how far you came.


# %%
def my_ranks():
    """Rank of every layer."""
    return {"conv1": 7, "conv2": 84, "fc1": 57, "fc2": 9}  # your numbers


# %%
def check_ranks(function):
    """Cut, count, and compare with the same share in every layer."""
    cut = cpnb.truncate(nets[0], rank=function(), key="greedy", refit=True)
    accuracy = cpnb.accuracy(cut, data)
    if accuracy < 0.95:
        return f"not yet: accuracy {accuracy:.1%}"
    enough = [row for row in sweep.to_rows() if row["accuracy"] >= 0.95]
    common = min(row["parameters"] for row in enough if row["layer"] == "*")
    ours = sum(p.numel() for p in cut.parameters())
    return f"accuracy {accuracy:.1%}, {ours:,} parameters; same share: {common:,}"


check_ranks(my_ranks)


# %% tags=["solution"]
def my_ranks_solution():
    """Shrink the layers in turn, while the accuracy lasts."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    for name in ("fc1", "conv2"):
        for rank in range(ranks[name], 0, -1):
            trial = ranks | {name: rank}
            cut = cpnb.truncate(nets[0], rank=trial, key="greedy", refit=True)
            if cpnb.accuracy(cut, data) < 0.955:
                break
            ranks = trial
    return ranks


check_ranks(my_ranks_solution)

# %% [markdown]
# ## What was not shown
#
# - **Other data.** All numbers are for one small network on 8×8 digits, chosen and
#   measured on the same validation images.
# - **Keys that look at data**, such as gradients or activations, and an automatic
#   choice of the ranks under a budget.
# - **Training that keeps the components sorted**, so that they can be cut without
#   training again.
# - **Time.** Fewer parameters are not yet fewer milliseconds.
#
# ## Summary
#
# Drop components by size, never by signed value. In networks trained in plain CP form
# the λ are alike: whether greedy removal helps depends on the cut (the table of
# section 3), the choice of the *layer* helps far more, and a fresh fit shows how much
# better the same rank could do. A longer ALS fit is a better copy and a worse thing to
# cut. Training after the cut brings much back, with a new optimizer, and has to be
# compared with a network that was small from the start.
#
# **References.** Veeramacheneni, Wolter, Klein and Garcke, *Canonical convolutional
# neural networks*, IJCNN 2022, [arXiv:2206.01509](https://arxiv.org/abs/2206.01509).
# Phan et al., *Stable low-rank tensor decomposition for compression of convolutional
# neural networks*, ECCV 2020, [arXiv:2008.05441](https://arxiv.org/abs/2008.05441).
# Kolda and Bader, *Tensor decompositions and applications*, SIAM Review 2009,
# [doi:10.1137/07070111X](https://doi.org/10.1137/07070111X).

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
