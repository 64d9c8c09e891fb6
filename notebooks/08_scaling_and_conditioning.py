# %% [markdown]
# # Does it matter how a network is scaled, when its function stays the same?
#
# A network with ReLU has a symmetry: what a unit gains, the layer above can take back.
# The outputs do not notice; gradient descent does. Two papers act on that.
# *Scaling-based weight normalization* (SBWN) walks along the symmetry to better scaled
# weights; *weight conditioning* divides the rows of each kernel by their norms. **When
# do they help, and when is there nothing to repair?**
#
# **After this notebook you can**
#
# 1. rescale a network by hand without changing its outputs, biases included;
# 2. say what a bad scale does to the curvature, and so to the learning rate;
# 3. tell from the row norms whether equilibration will lower a condition number.
#
# **You need** the chain rule, singular values, and `02_canonical_weight_normalization`.
#
# **Time, measured on two CPU cores:** 5.8 minutes; fast mode 1.1.

# %%
import copy
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cpnb
from cpnb.explore import (
    explore,
    loss_slice,
    plots,
    spectrum,
    spectrum_report,
    top_hessian_eigenvalue,
)
from cpnb.train import fast_mode, paired_difference

plots.use_style()
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
print("fast mode" if FAST else "full mode")


# %% [markdown]
# The exercises check themselves with this small function.


# %%
def check(name, got, expected, **tolerance):
    """Say whether an exercise is solved."""
    if got is None:
        print(f"{name}: not solved yet, the function returned None.")
        return
    torch.testing.assert_close(got, expected, **tolerance)
    print(f"{name}: correct.")


# %% [markdown]
# ## 1. The symmetry, by hand
#
# Two inputs, two hidden units, one output:
#
# $$f(x) = V\,\mathrm{ReLU}(W x + b), \qquad
# W = \begin{pmatrix} 1 & -1\\ 2 & 0\end{pmatrix},\;
# b = \begin{pmatrix} 1\\ -1\end{pmatrix},\; V = \begin{pmatrix} 1 & 3\end{pmatrix}.$$
#
# For $c > 0$ we have $\mathrm{ReLU}(cz) = c\,\mathrm{ReLU}(z)$. So multiply row $j$ of
# $W$ by $d_j > 0$ and divide column $j$ of $V$ by it.
#
# **Predict:** at $x = (2, 1)$, what is $f(x)$, and what is it with $d = (10, 0.1)$? And
# if we forget the bias?

# %%
x = torch.tensor([2.0, 1.0])
W, b = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([1.0, -1.0])
V, d = torch.tensor([[1.0, 3.0]]), torch.tensor([10.0, 0.1])


def f(W, b, V):
    """The two-layer network."""
    return (V @ F.relu(W @ x + b)).item()


print("as it is:        ", f(W, b, V))
print("rescaled:        ", round(f(d[:, None] * W, d * b, V / d), 5))
print("bias forgotten:  ", round(f(d[:, None] * W, b, V / d), 5))

# %% [markdown]
# ## 2. What a step makes of it
#
# The loss is the same at both points, its gradient is not. Along the symmetry (chain
# rule, one line each)
#
# $$\frac{\partial\ell}{\partial W_j} \to \frac1{d_j}\,
# \frac{\partial\ell}{\partial W_j}, \qquad
# \frac{\partial\ell}{\partial V_{:,j}} \to d_j\,
# \frac{\partial\ell}{\partial V_{:,j}} .$$
#
# Written back in the old coordinates, one step of SGD with rate $\eta$ in the rescaled
# network is a step with rate $\eta/d_j^2$ for $W_j$ and $\eta\, d_j^2$ for $V_{:,j}$.
# **A badly scaled network has a learning rate of its own for every unit.** Checked on a
# random layer:

# %%
generator = torch.Generator().manual_seed(0)
options = {"generator": generator, "dtype": torch.float64}
images, target = torch.randn(20, 5, **options), torch.randn(20, 2, **options)
weights = [torch.randn(4, 5, **options), torch.randn(2, 4, **options)]
d = torch.tensor([10.0, 1.0, 0.1, 3.0], dtype=torch.float64)


def sgd_step(W, V, rate_W, rate_V):
    """One step of gradient descent on the squared error."""
    W, V = W.clone().requires_grad_(), V.clone().requires_grad_()
    loss = (F.relu(images @ W.T) @ V.T - target).square().mean()
    grad_W, grad_V = torch.autograd.grad(loss, [W, V])
    return W.detach() - rate_W * grad_W, V.detach() - rate_V * grad_V


W, V = weights
new_W, new_V = sgd_step(d[:, None] * W, V / d, 0.1, 0.1)
same_W, same_V = sgd_step(W, V, 0.1 / d[:, None] ** 2, 0.1 * d**2)
torch.testing.assert_close(new_W / d[:, None], same_W)
torch.testing.assert_close(new_V * d, same_V)
print("the step of the rescaled layer is a step with rates 0.1/d² and 0.1·d²")

# %% [markdown]
# The smallest picture: one weight below, one above, $\ell(w, v) = \tfrac12 (wv - 1)^2$
# with both positive. All points of the curve $wv = 1$ are the same function, and
# minima. The Hessian there is
#
# $$H = \begin{pmatrix} v^2 & 1\\ 1 & w^2\end{pmatrix}, \qquad
# \text{eigenvalues } 0 \text{ and } w^2 + v^2 .$$
#
# **Predict:** where on the curve is the largest learning rate allowed?

# %%
grid = torch.linspace(0.2, 4, 200)
w, v = torch.meshgrid(grid, grid, indexing="xy")
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
levels = [0.02, 0.1, 0.3, 1, 3, 10, 30]
axes[0].contour(w, v, (w * v - 1).square() / 2, levels, cmap="viridis", linewidths=0.8)
axes[0].plot(grid, 1 / grid, color="C0", label="the same function, loss 0")
axes[0].plot(1, 1, "o", color="C1", label="balanced")
axes[0].set(xlim=(0.2, 4), ylim=(0.2, 4), xlabel="w", ylabel="v", aspect="equal")
axes[0].legend(loc="upper right")
axes[0].set_title("one valley of equal functions")
axes[1].plot(grid, grid**2 + 1 / grid**2, color="C0")
axes[1].plot(1, 2, "o", color="C1")
axes[1].set(xscale="log", yscale="log", xlabel="w on the curve")
axes[1].set_ylabel("top Hessian eigenvalue")
axes[1].set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
axes[1].set_xticks([], minor=True)
axes[1].set_title("sharpest at the ends, flattest where w = v")
plt.show()

# %% [markdown]
# **What to see:** the valley is the same height everywhere, but its walls are steepest
# at the ends. Gradient descent on a quadratic needs a rate below $2/\lambda_{\max}$, so
# the balanced point allows the largest. Sharpness is a property of the weights, not of
# the function (Dinh et al. 2017,
# [arXiv:1703.04933](https://arxiv.org/abs/1703.04933)).
#
# ### Exercise 1: the balanced point
#
# For a unit with input weights $w$ and output weights $v$ (vectors), find the scale
# $d > 0$ for which $\|d\,w\|^2 + \|v/d\|^2$ is smallest. Write `balance(w, v)`.


# %%
def balance(w, v):
    """The scale that makes the sum of squares smallest."""
    # your code here: set the derivative for d to zero
    return None


# %%
def check_balance(title, function):
    """Compare with a search over many scales."""
    w, v = torch.randn(7, **options), torch.randn(3, **options)
    scales = torch.logspace(-2, 2, 200_001, dtype=torch.float64)
    sums = scales.square() * w.square().sum() + v.square().sum() / scales.square()
    check(title, function(w, v), scales[sums.argmin()], rtol=1e-4, atol=0)


check_balance("exercise 1", balance)


# %% tags=["solution"] jupyter={"source_hidden": true}
def balance_solution(w, v):
    """The scale that makes the sum of squares smallest."""
    return (v.norm() / w.norm()).sqrt()


check_balance("exercise 1, solution", balance_solution)

# %% [markdown]
# ## 3. A whole network
#
# The scales pass through everything that is positively homogeneous: ReLU, max pooling,
# dropout, flattening (where one channel becomes many columns). They do not pass through
# a sigmoid or a softmax. For `cpnb.DigitsNet` we can still do it by hand.
#
# ### Exercise 2: through pooling and flattening
#
# `conv2` has 32 channels; after pooling and `flatten`, `fc1` reads 16 columns for each
# of them, one after the other. Complete `columns(d, layer)`: the divisor of every input
# of `layer`, in the order in which the layer reads them.
#
# ```text
# inputs of layer = its weight.shape[1], a multiple of len(d)
# columns[i] = d[the channel that input i comes from]
# ```


# %%
def columns(d, layer):
    """Scale of each input of a layer, shape (inputs,)."""
    # your code here
    return None


# %%
def check_columns(title, function):
    """Compare with a channel that is marked."""
    marks = torch.arange(32.0).view(1, 32, 1, 1).expand(1, 32, 4, 4)
    check(title, function(torch.arange(32.0), nn.Linear(512, 64)), marks.flatten())


check_columns("exercise 2", columns)


# %% tags=["solution"] jupyter={"source_hidden": true}
def columns_solution(d, layer):
    """Scale of each input of a layer, shape (inputs,)."""
    return d.repeat_interleave(layer.weight.shape[1] // len(d))


check_columns("exercise 2, solution", columns_solution)

# %%
LAYERS = ("conv1", "conv2", "fc1", "fc2")


@torch.no_grad()
def spread_rows(net, spread, seed):
    """A copy with row scales 10^(spread · N(0, 1)) in every hidden layer."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    layers = [getattr(net, name) for name in LAYERS]
    for below, above in pairwise(layers):
        d = 10 ** (spread * torch.randn(len(below.weight), generator=generator))
        below.weight.mul_(d.view(-1, *[1] * (below.weight.ndim - 1)))
        below.bias.mul_(d)
        d = columns_solution(d, above)
        above.weight.div_(d.view(1, -1, *[1] * (above.weight.ndim - 2)))
    return net


# %%
data = cpnb.load_data("digits")
net = cpnb.DigitsNet(generator=torch.Generator().manual_seed(0))
ill = spread_rows(net, 0.7, seed=1)
pixels = data.validation.standardized()
with torch.no_grad():
    change = cpnb.relative_error(net(pixels), ill(pixels)).item()
print(f"relative change of the scores: {change:.1e}")
spectrum_report(ill).round(3)

# %% [markdown]
# The column `row_spread` says how far the rows are apart: hundreds or thousands to one,
# and the network still computes what it did. `cpnb.rescale_` walks the symmetry on its
# own. It lets a scale pass through everything that is no layer, and takes biases, batch
# norm, residual sums, CP layers and an optimizer's momentum along. The images are there
# for a check: a copy with random weights must keep its scores, or it is refused.
#
# Two destinations. **`"unit"`** gives every hidden row norm one, from input to output:
# this is *SBWN, re-derived from the abstract*
# ([doi:10.1109/ACCESS.2018.2890373](https://doi.org/10.1109/ACCESS.2018.2890373), of
# which no more was available to us). **`"balanced"`** is the scale of exercise 1, unit
# by unit: Equi-normalization
# ([arXiv:1902.10416](https://arxiv.org/abs/1902.10416)).

# %%
for mode in ("unit", "balanced"):
    repaired = copy.deepcopy(ill)
    sweeps = 1 if mode == "unit" else 30  # a balanced sweep disturbs its neighbours
    for _ in range(sweeps):
        report = cpnb.rescale_(repaired, pixels, mode=mode)
    with torch.no_grad():
        change = cpnb.relative_error(net(pixels), repaired(pixels)).item()
    square = sum(p.square().sum().item() for p in repaired.parameters() if p.ndim > 1)
    print(f"{mode}: scores change by {change:.1e}, Σ‖W‖² = {square:.1f}")
square = sum(p.square().sum().item() for p in net.parameters() if p.ndim > 1)
print(f"as it was drawn: Σ‖W‖² = {square:.1f}")
report.groupby("layer")[["norm_before", "norm_after", "scale"]].agg(["min", "max"])

# %% [markdown]
# **What to see:** both undo the scales, without touching the scores. `"balanced"` ends
# with a smaller sum of squares than the network was drawn with. The report lists row
# norms and scales of its last sweep: thirty sweeps in, the scales are nearly one.
#
# `"unit"` even forgets where it came from. Two networks that differ by scales become
# the *same weights*, so a training with SBWN cannot depend on how its start was scaled:

# %%
ends = [copy.deepcopy(net), copy.deepcopy(ill)]
for end in ends:
    cpnb.rescale_(end, pixels, mode="unit")
for a, b in zip(*(end.parameters() for end in ends), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print("the well scaled and the ill scaled network became the same weights")

# %% [markdown]
# ## 4. What SGD does with an ill scaled start
#
# The rules. Plain SGD, constant rate, no momentum: nothing that adapts. For each method
# the rate is chosen on the **validation** split, with seeds used for nothing else. Then
# fresh seeds train at that rate, and each trained network sees the **test** split once.
# Ill scaled means: the same function at the start, its rows spread by a random factor
# with a standard deviation of $10^{0.7} \approx 5$.
#
# The repairs work after every step: SBWN and balancing move the weights along the
# symmetry, conditioning divides the rows of each kernel by their norms inside the
# forward pass (section 6; it does *not* keep the function).
#
# **Predict:** will the ill scaled network train at all? Will its best rate be smaller
# or larger? And does conditioning help the network that is scaled well?

# %%
SPREAD, EPOCHS = 0.7, 3 if FAST else 6
RATES = [0.003, 0.03, 0.2] if FAST else [0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8]
TUNING_SEEDS = range(300, 302 if FAST else 305)
SEEDS = range(2 if FAST else 5)
SGD = {
    "optimizer": "sgd", "momentum": 0.0, "schedule": None, "batch_size": 64,
    "epochs": EPOCHS, "progress": False,
}  # fmt: skip
METHODS = {
    "well scaled": (False, None, {}),
    "ill scaled": (True, None, {}),
    "ill + SBWN": (True, "scaling", {"mode": "unit"}),
    "ill + balanced": (True, "scaling", {"mode": "balanced"}),
    "ill + conditioned": (True, "conditioned", {}),
    "well + conditioned": (False, "conditioned", {}),
}


# %%
def build(method, seed):
    """The start of a method."""
    spread, normalizer, options = METHODS[method]
    net = cpnb.DigitsNet(generator=torch.Generator().manual_seed(seed))
    net = spread_rows(net, SPREAD, seed=1000 + seed) if spread else net
    options = options | ({"data": pixels} if normalizer == "scaling" else {})
    return cpnb.normalize(net, normalizer or "none", **options)


def train(method, lr, seed, **options):
    """A trained network and the record of its run."""
    net = build(method, seed)
    return net, cpnb.fit(net, data, lr=lr, seed=seed, **SGD, **options)


def course(run):
    """Validation accuracy after each epoch; chance from where a run diverged."""
    seen = [epoch["validation_accuracy"] for epoch in run.history]
    return seen + [0.1] * (EPOCHS - len(seen))


# %%
tuned = {}
for method in tqdm(METHODS, desc="tuning"):
    tuned[method] = torch.tensor(
        [[course(train(method, lr, s)[1])[-1] for s in TUNING_SEEDS] for lr in RATES]
    )
best = {m: RATES[int(values.mean(1).argmax())] for m, values in tuned.items()}
print(f"validation accuracy, n = {len(TUNING_SEEDS)}, at the rates")
print(" " * 20 + "".join(f"{lr:8g}" for lr in RATES))
for method, values in tuned.items():
    print(f"{method:20}" + "".join(f"{value:8.1%}" for value in values.mean(1)))

# %%
races, tested = {m: [] for m in METHODS}, {m: [] for m in METHODS}
for method in tqdm(METHODS, desc="fresh seeds"):
    for seed in SEEDS:
        trained, run = train(method, best[method], seed)
        races[method].append(run)
        trained_well = run.status == "finished"  # one that diverged is at chance
        tested[method].append(
            cpnb.accuracy(trained, data.test) if trained_well else 0.1
        )
tested = {method: torch.tensor(values) for method, values in tested.items()}

# %%
COLORS = ("#555555", "C1", "C0", "C2", "C3", "C4")
LOOKS = {
    method: {"color": color, "marker": marker}
    for method, color, marker in zip(METHODS, COLORS, "Dvo^XP", strict=True)
}

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for method, values in tuned.items():
    axes[0].plot(RATES, values.mean(1), label=method, **LOOKS[method])
axes[0].set(xscale="log", xlabel="learning rate", ylabel="validation accuracy")
axes[0].set_ylim(0, 1.02)
for method, runs in races.items():
    values = torch.tensor([course(run) for run in runs])
    epochs, mean, std = range(1, EPOCHS + 1), values.mean(0), values.std(0)
    axes[1].plot(epochs, mean, **LOOKS[method])
    band = {"color": LOOKS[method]["color"], "alpha": 0.12, "linewidth": 0}
    axes[1].fill_between(epochs, mean - std, mean + std, **band)
axes[1].set(xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1.02))
axes[1].set_xticks(epochs)
fig.legend(loc="outside lower center", ncols=6, fontsize="small")
axes[0].set_title(f"tuning: means over n = {len(TUNING_SEEDS)} seeds")
axes[1].set_title(f"at the best rate: mean ± 1 std, n = {len(SEEDS)}")
plt.show()

# %% [markdown]
# **What to see:** on the left, each method's useful rates end at a cliff. For the ill
# scaled network it comes more than an order of magnitude earlier. SBWN and balancing
# bring it back to about where the well scaled network has it. Conditioning is another
# matter. With it the well scaled network learns at *smaller* rates (its rows then have
# norm $\sqrt2$, about 2.4 times what torch draws). The ill scaled one it cannot repair:
# the columns keep the scales of the layer below, and the biases their own.
#
# A run that diverged counts as chance, one in ten.


# %%
def verdict(method, reference):
    """One line on the paired differences in test accuracy."""
    gap = paired_difference(100 * tested[method], 100 * tested[reference])
    lower = int((tested[method] < tested[reference]).sum())
    return f"{gap}, lower in {lower}"


print(f"test accuracy after {EPOCHS} epochs, mean ± std over n = {len(SEEDS)} seeds;")
print("then points against the well scaled network, paired, with 95 % intervals")
for method, values in tested.items():
    gap = "" if method == "well scaled" else verdict(method, "well scaled")
    lost = sum(run.status == "diverged" for run in races[method])
    share = f"{values.mean():.1%} ± {values.std():.1%}, median {values.median():.1%}"
    share += f", {lost} diverged" if lost else ""
    print(f"{method:20} rate {best[method]:<6g} {share}   {gap}".rstrip())

# %% [markdown]
# Intervals are Student's, as in every notebook. With so few seeds "not told apart" says
# little; where a run diverged the interval is so wide that medians and the count of
# seeds that are lower say more.
#
# Section 2 says that each unit of the ill scaled network has a learning rate of its
# own. The angle by which a row turns in training does not depend on its length, so it
# shows who moved: the 64 rows of `fc1`.

# %%
turned = {}
for method in ("well scaled", "ill scaled", "ill + SBWN"):
    first = build(method, SEEDS[-1]).fc1.weight.detach()
    last = train(method, best[method], SEEDS[-1])[0].fc1.weight.detach()
    cosine = F.cosine_similarity(first, last, dim=1).clamp(-1, 1)
    turned[method] = cosine.acos().rad2deg().sort().values
    low, middle, high = turned[method][[6, 32, 57]]
    print(f"{method:12} 10 % below {low:.2f}°, half below {middle:.2f}°, "
          f"90 % below {high:.2f}°")  # fmt: skip

# %% [markdown]
# ## 5. The curvature
#
# Why the cliff? `top_hessian_eigenvalue` multiplies the Hessian of the loss with
# vectors (two passes of backpropagation each) and iterates. A small network lets us
# check it against the whole Hessian:

# %%
little = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10))
little = little.double()
for parameter in little.parameters():
    nn.init.normal_(parameter, std=0.2, generator=generator)
count = 200 if FAST else 400
curve = data.train.standardized()[:count], data.train.labels[:count]
pair = curve[0][:50].double(), curve[1][:50]
shapes = {name: p.shape for name, p in little.named_parameters()}


def loss_of(vector):
    """Loss as a function of all parameters, one after the other."""
    parts = vector.split([shape.numel() for shape in shapes.values()])
    values = {n: v.view(shapes[n]) for n, v in zip(shapes, parts, strict=True)}
    scores = torch.func.functional_call(little, values, (pair[0],))
    return F.cross_entropy(scores, pair[1])


# %%
vector = nn.utils.parameters_to_vector(little.parameters()).detach()
dense = torch.func.hessian(loss_of)(vector)
found = top_hessian_eigenvalue(
    little, pair, tolerance=1e-3, generator=generator, progress=False
)
expected = torch.linalg.eigvalsh(dense)[-1].item()
torch.testing.assert_close(found.value, expected, rtol=1e-3, atol=0)
print(f"{found.products} products: {found.value:.4f}, residual {found.residual:.4f}")
print(f"from the {tuple(dense.shape)} matrix: {expected:.4f}")

# %% [markdown]
# Now the networks of the race at their best rates, after every epoch. On a quadratic,
# full gradient descent diverges where the top eigenvalue is above $2/\eta$.
#
# **Predict:** where do the eigenvalues start, and where do they go?


# %%
def watch_curvature(method, seed):
    """Top eigenvalue before training and after each epoch."""
    generator = torch.Generator().manual_seed(0)
    seen = []

    def watch(epoch, model, record):
        options = {"generator": generator, "progress": False}
        seen.append(top_hessian_eigenvalue(model, curve, **options).value)

    watch(0, build(method, seed), {})
    train(method, best[method], seed, callback=watch)
    return seen + [torch.nan] * (EPOCHS + 1 - len(seen))  # a run may diverge


WATCHED = ("well scaled", "ill scaled", "ill + SBWN", "ill + balanced")
WATCHED_SEEDS = range(1 if FAST else 2)
curvature = {}
for method in tqdm(WATCHED, desc="curvature"):
    seen = [watch_curvature(method, seed) for seed in WATCHED_SEEDS]
    curvature[method] = torch.tensor(seen)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.6))
for method, values in curvature.items():
    logs = values.log10()
    mean, look = logs.nanmean(0), LOOKS[method]
    ax.plot(10**mean, label=f"{method}, rate {best[method]:g}", **look)
    ax.axhline(2 / best[method], color=look["color"], linestyle=":", linewidth=1)
ax.set(yscale="log", xlabel="epoch", ylabel="top Hessian eigenvalue")
ax.set_xticks(range(EPOCHS + 1))
ax.set_title("dotted: 2 / learning rate")
ax.legend(loc="upper right", fontsize="small")
plt.show()
for method, values in curvature.items():
    first, *_, last = 10 ** values.log10().nanmean(0)
    limit = 2 / best[method]
    print(f"{method:16} start {first:9.3g}   end {last:8.3g}   2/rate {limit:.3g}")

# %% [markdown]
# **What to see:** geometric means over the seeds. The ill scaled network starts far
# sharper than the others although it *is* the same function, and falls within an epoch.
# From then on every method is found around its own dotted line, the *edge of stability*
# (Cohen et al. 2021, [arXiv:2103.00065](https://arxiv.org/abs/2103.00065)): curvature
# and rate settle together, and a small rate is a life among steep walls. Note also
# what is *not* seen: SBWN and balancing do not start flatter than the network that was
# drawn well. The valley of section 2 is flattest where it is balanced; a deep network
# need not be.
#
# ### What a slice shows
#
# If sharpness can be had for nothing, what do pictures of the loss show? A usual way
# out are *filter-normalised* slices: look along a random direction in which every
# filter, a row of its layer, moves in proportion to its norm (Li et al. 2018,
# [arXiv:1712.09913](https://arxiv.org/abs/1712.09913)). Take the trained well scaled
# network, spread its rows, balance that again, and look.
#
# **Predict:** the rows are normalised. Will the three slices of one function agree?

# %%
trained, _ = train("well scaled", best["well scaled"], seed=0)
spread = spread_rows(trained, 0.3, seed=1)
balanced = copy.deepcopy(spread)
for _ in range(30):
    cpnb.rescale_(balanced, pixels, mode="balanced")
slices = {}
for name, model in {
    "as trained": trained, "rows spread": spread, "then balanced": balanced
}.items():  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    options = {"generator": generator, "progress": False}
    value = top_hessian_eigenvalue(model, curve, **options).value
    slices[name] = loss_slice(model, curve, points=21, **options)
    walls = slices[name][1][[0, -1]].mean()
    print(f"{name:14} top eigenvalue {value:8.3g}, loss at the ends {walls:8.3g}")

# %%
fig, ax = plt.subplots()
for (name, (offsets, losses)), look in zip(slices.items(), "os^", strict=True):
    (line,) = ax.plot(offsets, losses, marker=look, markevery=(int(look == "^"), 2))
    rise = {"as trained": -7, "then balanced": 7}.get(name, 0)  # beside the line's end
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    text = ax.annotate(name, (1, losses[-1]), (5, rise), va="center", **place)
    text.set_color(line.get_color())
ax.set(yscale="log", xlabel="offset, in filter norms", ylabel="cross entropy in nats")
ax.set_title("one function, three slices: normalising rows is not enough")
plt.show()

# %% [markdown]
# **What to see:** no. The loss in the middle is the same, the walls are not, for a
# spread of only $10^{0.3} = 2$. The direction follows the scales of the rows; the
# *columns* that were divided are not normalised, and a small step along a column that
# is read from a large unit is a large one. To compare slices of ReLU networks, balance
# the networks first.
#
# ## 6. Conditioning the weights
#
# *Weight conditioning* (Saratchandran, Wang and Lucey 2024,
# [arXiv:2409.03424](https://arxiv.org/abs/2409.03424)) wants the *condition number*
# $\kappa = s_{\max}/s_{\min}$ of each kernel small, and uses $E W$ in place of $W$ with
#
# $$E = \mathrm{diag}(1/\|W_1\|, \dots, 1/\|W_O\|),$$
#
# recomputed in every forward pass. (How a convolution is unfolded for this, one row per
# output and by group, is re-derived here.) Among all diagonal scalings $D$ this one is
# nearly the best: $\kappa(EW) \le \sqrt{O}\,\min_D \kappa(DW)$ (van der Sluis 1969,
# [doi:10.1007/BF02165096](https://doi.org/10.1007/BF02165096)).
#
# ### Exercise 3: equilibrate
#
# Write `equilibrate(W)`, which gives every row of a matrix norm one.


# %%
def equilibrate(W):
    """Rows of norm one."""
    # your code here
    return None


# %%
def check_equilibrate(title, function):
    """Compare with the library, which keeps a gain of √2 unless told otherwise."""
    layer = nn.Linear(5, 4)
    conditioned = cpnb.normalize(layer, "conditioned", gain=1.0)
    check(title, function(layer.weight), conditioned.weight)


check_equilibrate("exercise 3", equilibrate)


# %% tags=["solution"] jupyter={"source_hidden": true}
def equilibrate_solution(W):
    """Rows of norm one."""
    return W / W.norm(dim=1, keepdim=True)


check_equilibrate("exercise 3, solution", equilibrate_solution)

# %% [markdown]
# **Predict:** for which of these matrices does $\kappa$ fall, and for which not?

# %%
generator = torch.Generator().manual_seed(0)
options = {"generator": generator, "dtype": torch.float64}
gaussian = torch.randn(64, 288, **options)
uneven = torch.randn(64, 1, **options).exp()
MATRICES = {
    "Gaussian, 64×288": gaussian,
    "uneven rows, 64×288": uneven * gaussian,
    "uneven columns, 64×288": torch.randn(1, 288, **options).exp() * gaussian,
    "Gaussian, square 64×64": torch.randn(64, 64, **options),
}
print(f"{'':24}{'row norms':>12}{'κ before':>10}{'κ after':>10}")
for name, matrix in MATRICES.items():
    before, after = spectrum(matrix), spectrum(equilibrate_solution(matrix))
    print(
        f"{name:24}{before.row_spread:9.3g}: 1{before.condition_number:10.3g}"
        f"{after.condition_number:10.3g}"
    )

# %%
ratios = []
for _ in range(500 if FAST else 5000):
    matrix = torch.randn(8, 12, **options)
    pair = matrix, equilibrate_solution(matrix)
    before, after = map(torch.linalg.svdvals, pair)
    ratios.append((after[0] / after[-1]) / (before[0] / before[-1]))
ratios = torch.stack(ratios)
rose = (ratios > 1).double().mean().item()
print(f"{rose:.1%} of {len(ratios)} Gaussian 8×12 matrices have a larger κ afterwards")

fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for number, (name, matrix) in enumerate(MATRICES.items()):
    for values, line in ((matrix, "-"), (equilibrate_solution(matrix), ":")):
        values = torch.linalg.svdvals(values)
        label = name if line == "-" else None
        axes[0].plot(values / values[0], line, color=f"C{number}", label=label)
axes[0].set(yscale="log", xlabel="number of the singular value")
axes[0].set_ylabel("singular value / largest")
axes[0].legend(loc="lower left", fontsize="small")
axes[0].set_title("only uneven rows are repaired")
axes[1].hist(ratios.numpy(), bins=60, color="C0")
axes[1].axvline(1, color="#555555")
axes[1].set(xlabel="κ after / κ before", ylabel="matrices")
axes[1].set_title(f"8×12 Gaussian: κ rises for {rose:.1%}")
plt.show()

# %% [markdown]
# **What to see:** solid lines before, dotted after. Where rows are uneven,
# equilibration gives the flat spectrum of the Gaussian matrix back. Where they are even
# already it changes next to nothing, and $\kappa$ may rise. Uneven *columns* it cannot
# see, and the small singular values of a square matrix do not come from its row norms.
#
# And in a network? Ill scaled rows in one layer are ill scaled columns in the next.

# %%
LAYER_NETS = {
    "drawn": build("well scaled", 0),
    "trained": trained,
    "ill scaled": build("ill scaled", 0),
}
MODES = ("row", "column", "row-column")
print(f"{'κ':12}{'layer':8}{'plain':>10}" + "".join(f"{mode:>12}" for mode in MODES))
for name, model in LAYER_NETS.items():
    versions = [model, *(cpnb.normalize(model, "conditioned", mode=m) for m in MODES)]
    reports = [spectrum_report(version).condition_number for version in versions]
    for layer in LAYERS:
        numbers = [report[layer] for report in reports]
        line = "".join(f"{number:12.3g}" for number in numbers[1:])
        print(f"{name:12}{layer:8}{numbers[0]:10.3g}{line}")

# %% [markdown]
# **What to see:** in the drawn and the trained network there is little to repair, and
# now and then $\kappa$ rises a little. In the ill scaled one the rows are nearly all of
# the illness: $\kappa$ falls from thousands to a few. What is left belongs to the
# columns, and goes when both sides are equilibrated. Yet in the race this network, with
# its fine condition numbers, did badly: **$\kappa$ of single kernels does not tell how
# a network trains.**
#
# Two relations. With the gradient through $E$, conditioning *is* weight normalization
# with the lengths frozen; and a CP layer keeps its rank, because $E W_{(1)} =
# (E A)\,\mathrm{diag}(\lambda)\,(\dots)^\top$ scales rows of one factor:

# %%
layer = nn.Linear(6, 4, bias=False).double()
inputs = torch.randn(9, 6, dtype=torch.float64)
conditioned = cpnb.normalize(layer, "conditioned", gain=1.0)
v = layer.weight.detach().clone().requires_grad_()
normed = v / v.norm(dim=1, keepdim=True)  # weight norm, g = 1
(inputs @ normed.T).square().sum().backward()
conditioned(inputs).square().sum().backward()
(stored,) = (p for p in conditioned.parameters() if p.shape == v.shape)
torch.testing.assert_close(stored.grad, v.grad)

cp = cpnb.CPConv2d(8, 16, 3, rank=24, generator=generator)
conditioned = cpnb.normalize(cp, "conditioned")
before, after = spectrum(cp), spectrum(conditioned)
print(f"rank {cp.rank} stays {conditioned.rank};", end=" ")
print(f"row norms {before.row_spread:.2f} : 1 become {after.row_spread:.2f} : 1")

# %% [markdown]
# ### The largest singular value of a convolution
#
# A kernel is not yet the whole linear map. On a torus (circular padding) the Fourier
# transform takes a convolution apart into one `(out, in)` matrix for each frequency,
# and the largest of their 2-norms is the factor by which it can amplify (Sedghi, Gupta
# and Long 2019, [arXiv:1805.10408](https://arxiv.org/abs/1805.10408)). It is exact and
# differentiable:


# %%
def circular_lipschitz(kernel, size):
    """Largest singular value of a circular convolution of stride 1 and dilation 1."""
    # Mirrored frequencies of a real kernel have the same norm: half of them do.
    matrices = torch.fft.rfftn(kernel, s=size, dim=tuple(range(2, kernel.ndim)))
    return torch.linalg.matrix_norm(matrices.movedim((0, 1), (-2, -1)), 2).max()


kernel = torch.randn(3, 2, 3, 3, **options)
units = torch.eye(2 * 5 * 4, dtype=torch.float64).view(-1, 2, 5, 4)
outputs = F.conv2d(F.pad(units, (1, 1, 1, 1), "circular"), kernel).flatten(1)
whole = torch.linalg.matrix_norm(outputs, 2)  # of the map on 2×5×4 images, unit by unit
torch.testing.assert_close(circular_lipschitz(kernel, (5, 4)), whole)
spectral = torch.linalg.matrix_norm(kernel.flatten(1), 2)
print(f"amplifies by up to {whole:.3f}; the unfolded kernel says {spectral:.3f}")

# %% [markdown]
# With zeros as padding the map is a part of the one on a torus that is larger by the
# window less one, so the number for that size is a bound.

# %%
outputs = F.conv2d(units, kernel, padding=1).flatten(1)
zero_padded = torch.linalg.matrix_norm(outputs, 2)
bound = circular_lipschitz(kernel, (5 + 2, 4 + 2))
assert zero_padded <= bound
print(f"with zeros as padding {zero_padded:.3f}, bounded by {bound:.3f}")

# %% [markdown]
# ## 7. Slide the spread
#
# How bad must the scales be before it matters? For each spread: the largest condition
# number of a layer, plain and with equilibrated rows; the top eigenvalue at the start,
# plain and balanced; and the accuracy after training at the best of some rates.

# %%
SPREADS = [0, 0.3, 0.6, 1] if FAST else [n / 10 for n in range(11)]
TABLE_RATES = [0.0003, 0.01, 0.1] if FAST else [0.0001, 0.001, 0.01, 0.1, 0.4]


def worst_condition(net):
    """Largest condition number of a layer."""
    return spectrum_report(net).condition_number.max()


def best_of_rates(net):
    """Best validation accuracy after training, and the rate that reached it."""
    runs = {lr: cpnb.fit(copy.deepcopy(net), data, lr=lr, **SGD) for lr in TABLE_RATES}
    scores = {lr: course(run)[-1] for lr, run in runs.items()}
    rate = max(scores, key=scores.get)
    return {"accuracy": scores[rate], "rate": rate}


# %%
def table_row(spread):
    """Measurements at one spread."""
    net = spread_rows(build("well scaled", 0), spread, seed=1)
    balanced = copy.deepcopy(net)
    for _ in range(30):
        cpnb.rescale_(balanced, pixels, mode="balanced")
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "progress": False}
    tops = [top_hessian_eigenvalue(m, curve, **options) for m in (net, balanced)]
    hooked = cpnb.normalize(balanced, "scaling", mode="balanced", data=pixels)
    run = cpnb.fit(hooked, data, lr=best["ill + balanced"], **SGD)
    return {
        "spread": spread,
        "condition": worst_condition(net),
        "equilibrated": worst_condition(cpnb.normalize(net, "conditioned")),
        "curvature": tops[0].value,
        "balanced_curvature": tops[1].value,
        **best_of_rates(net),
        "balanced_accuracy": course(run)[-1],
    }


# %%
table = [table_row(spread) for spread in tqdm(SPREADS, desc="spreads")]

PANELS = (
    ("condition", "equilibrated", "largest condition number"),
    ("curvature", "balanced_curvature", "top Hessian eigenvalue"),
    ("accuracy", "balanced_accuracy", "validation accuracy"),
)


# %%
def draw_scales(figure, spread):
    """Draw three measures over the spread, mark one spread, and say its numbers."""
    row = table[SPREADS.index(spread)]
    for ax, (plain, repaired, what) in zip(figure.subplots(1, 3), PANELS, strict=True):
        word = "equilibrated" if plain == "condition" else "balanced"
        ax.plot(SPREADS, [r[plain] for r in table], "o-", color="C1", label="as scaled")
        ax.plot(SPREADS, [r[repaired] for r in table], "s-", color="C0", label=word)
        ax.axvline(spread, color="#555555", linestyle=":")
        ax.set(xlabel="spread of the row scales", ylabel=what)
        ax.set_yscale("linear" if plain == "accuracy" else "log")
        ax.yaxis.set_major_formatter("{x:g}")  # no formula, as a widget needs it
        ax.yaxis.set_minor_formatter("")
        ax.legend(loc="best", fontsize="small")
    ax.set_ylim(0, 1.02)
    return (
        f"Row scales spread over a factor of {10**spread:.3g}: condition number "
        f"{row['condition']:.3g}, equilibrated {row['equilibrated']:.3g}; top Hessian "
        f"eigenvalue {row['curvature']:.3g}, balanced {row['balanced_curvature']:.3g}; "
        f"accuracy {row['accuracy']:.1%} at its best rate {row['rate']:g}, balanced "
        f"{row['balanced_accuracy']:.1%}."
    )


# %%
fig = plt.figure(figsize=(10, 3.2), layout="constrained")
print(draw_scales(fig, SPREADS[-1]))
plt.show()

# %% [markdown]
# **What to see:** one seed, so small steps up and down are noise. A curve that ends
# early became infinite: float32 cannot tell the smallest singular value from zero. Up
# to a spread of about 0.3, a factor of two, nothing happens to the accuracy.
#
# The same with a slider, which moves the dotted line, or with the menu beside it.

# %%
explorer = explore(draw_scales, spread=SPREADS)
explorer

# %% [markdown]
# ## 8. The answer
#
# Written by the next cell from the numbers above, so that text and numbers agree.


# %%
def points(method):
    """Mean test accuracy in percent."""
    return f"{tested[method].mean():.1%}"


start = {m: 10 ** values[:, 0].log10().mean() for m, values in curvature.items()}
sharper = start["ill scaled"] / start["well scaled"]
even, uneven_rows = (spectrum(MATRICES[n]) for n in list(MATRICES)[:2])
for line in (
    f"The same function with spread rows starts {sharper:.2g} times as sharp.",
    f"SGD's best rate for it is {best['ill scaled']:g} instead of "
    f"{best['well scaled']:g}, and it reaches {points('ill scaled')} instead of "
    f"{points('well scaled')}.",
    f"From the same start SBWN reaches {points('ill + SBWN')}, balancing "
    f"{points('ill + balanced')}, conditioning {points('ill + conditioned')}.",
    "Against the well scaled network, in points of test accuracy: "
    + "; ".join(f"{m}: {verdict(m, 'well scaled')}" for m in list(METHODS)[1:])
    + ".",
    f"Equilibration took κ of a matrix with uneven rows from "
    f"{uneven_rows.condition_number:.3g} to about that of the even one, "
    f"{even.condition_number:.3g}, and made κ worse in {rose:.1%} of small even ones.",
):
    print("-", line)

# %% [markdown]
# **How far this reaches.** One small network on one small data set, plain SGD, few
# epochs, coarse rates, an artificial start: torch's own starts have even rows, so the
# illness that is cured here is one that we made. The intervals speak of seeds. SBWN's
# scale factor and schedule are ours, as its paper was not available.
#
# ## What was not shown
#
# - *The papers' own experiments*: SBWN on CIFAR-100, conditioning on transformers.
# - *Momentum and Adam*: `cpnb.rescale_` transforms their state, and Adam is far less
#   hurt by scales, because it divides every step by the gradient's size.
# - *Batch norm*, which cancels the row scales by itself.
# - *Effective learning rates* where the length of a weight does not matter at all:
#   section 4 of `02_canonical_weight_normalization`.
#
# ## Summary
#
# - Rows of one layer and columns of the next may trade a factor without a trace in the
#   output. SGD sees it: the rates of the two become $\eta/d^2$ and $\eta d^2$.
# - The top Hessian eigenvalue belongs to the weights, not to the function; along the
#   symmetry it can be made as large as one likes, and the rate has to follow it.
# - SBWN (re-derived) forgets how the start was scaled; balancing minimises the sum of
#   squares. Both bring the rate back. Flatter than a start that was drawn well they are
#   not.
# - Row equilibration repairs the condition number where rows are uneven, and nothing
#   else; and a small condition number is no promise.
# - Filter-normalised slices are not safe from the symmetry: balance first.
#
# **Next:** `09_your_own_model` compresses a network of your own.
#
# **References.** Yuan, Xiao, *Scaling-based weight normalization for deep neural
# networks*, 2019, doi:10.1109/ACCESS.2018.2890373. P. Stock, B. Graham, R. Gribonval,
# H. Jégou, *Equi-normalization of neural networks*, 2019, arXiv:1902.10416. H.
# Saratchandran, T. X. Wang, S. Lucey, *Weight conditioning for smooth optimization of
# neural networks*, 2024, arXiv:2409.03424. A. van der Sluis, *Condition numbers and
# equilibration of matrices*, 1969, doi:10.1007/BF02165096. L. Dinh, R. Pascanu, S.
# Bengio, Y. Bengio, *Sharp minima can generalize for deep nets*, 2017,
# arXiv:1703.04933. J. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, *Gradient
# descent on neural networks typically occurs at the edge of stability*, 2021,
# arXiv:2103.00065. H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, *Visualizing the
# loss landscape of neural nets*, 2018, arXiv:1712.09913. B. A. Pearlmutter, *Fast exact
# multiplication by the Hessian*, 1994, doi:10.1162/neco.1994.6.1.147.

# %%
print("cpnb", cpnb.__version__, "· torch", torch.__version__.split("+")[0])
