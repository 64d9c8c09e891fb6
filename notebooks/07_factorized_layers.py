# %% [markdown]
# # Where should factors start, and what should decay press on?
#
# A layer of low rank is two thin layers in the place of a thick one. Trained from
# nothing, its two *factors* need a start, and weight decay must press on something: on
# the factors or on their product. **Spectral initialisation** (SI) and **Frobenius
# decay** (FD) answer both by looking at the product. What does each gain alone, what do
# both together, and does either matter in CP form?
#
# **After this notebook you can**
#
# 1. run a convolution as two, start them from the dense kernel's singular values, and
#    compute the gradient of its norm without forming it;
# 2. show that weight decay on factors is a penalty on rank;
# 3. read a 2 × 2 experiment: two effects, and what both do beyond their sum.
#
# **You need** `02_canonical_weight_normalization`, and singular values.
#
# **Time, measured on two CPU cores:** 2.6 minutes; fast mode 0.6. The text states what
# the full mode printed; another processor may change the last digits.

# %%
import math
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import cpnb
from cpnb.explore import plots
from cpnb.methods import FrobeniusDecay, LowRankLinear, ProximalL1, factor_norms
from cpnb.train import REGISTRY, Recipe, fast_mode, paired_difference
from exercises import check
from experiments import read_results, status, with_share

# %%
plots.use_style()
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
print("fast mode" if FAST else "full mode")

# %% [markdown]
# How methods are drawn:


# %%
def look(*names):
    """Colours and markers of methods, as pandas draws them."""
    styles = [plots.METHOD_STYLES[name] for name in names]
    markers = ["-" + style.marker for style in styles]
    return {"color": [style.color for style in styles], "style": markers}


# %% [markdown]
# ## 1. The smallest example, by hand
#
# One input, one output, one number in between: $w = u\,v$. Let $w = 4$, written as $u =
# v = 2$ or as $u = 8$, $v = \tfrac12$.
#
# Weight decay on the factors charges $\tfrac12(u^2 + v^2)$: for the first pair 4, for
# the second $\tfrac12(64 + \tfrac14) = 32.125$. No pair can cost less than $|u v|$,
# because $\tfrac12(u^2 + v^2) - |uv| = \tfrac12(|u| - |v|)^2$.
#
# **So the least that it can charge for $w$ is $|w|$, not $\tfrac12 w^2$.** The first
# has the same slope however small $w$ is, the second has none at zero. For matrices
# $|w|$ becomes the *nuclear norm*, the sum of the singular values:
#
# $$\tfrac12\big(\|U\|_F^2 + \|V\|_F^2\big) \;\ge\; \|U V^\top\|_* .$$

# %%
for u, v in ((2.0, 2.0), (8.0, 0.5)):
    pair = LowRankLinear(1, 1, rank=1)
    with torch.no_grad():
        pair.left.fill_(u)
        pair.right.fill_(v)
    (norms,) = factor_norms(pair).itertuples()
    print(f"u = {u}, v = {v}: |w| = {norms.nuclear}, ½(u² + v²) = {norms.bound}")

# %% [markdown]
# ## 2. A convolution as two
#
# A kernel $W_{o i h w}$ becomes a matrix with a row for each pair $(o, h)$ and a column
# for each pair $(i, w)$. If that matrix is $U V^\top$ with $r$ columns each, the
# convolution is a $1 \times K_w$ one from $I$ to $r$ channels, then a $K_h \times 1$
# one from $r$ to $O$ (Khodak, Tenenholtz, Mackey and Fusi 2021,
# [arXiv:2105.01029](https://arxiv.org/abs/2105.01029)):
#
# $$W_{oihw} = \sum_{r} U_{(o,h),\,r}\; V_{(i,w),\,r} .$$

# %%
generator = torch.Generator().manual_seed(0)
draw = partial(torch.randn, generator=generator, dtype=torch.float64)
U, V = draw(6, 3, 2), draw(4, 3, 2)  # (out, height, rank), (in, width, rank)
kernel = torch.einsum("ohr,iwr->oihw", U, V)
images = draw(5, 4, 9, 9)

across = F.conv2d(images, V.permute(2, 0, 1)[:, :, None], padding=(0, 1))
output = F.conv2d(across, U.permute(0, 2, 1)[:, :, :, None], padding=(1, 0))
torch.testing.assert_close(output, F.conv2d(images, kernel, padding=1))
print(f"{U.numel() + V.numel()} numbers instead of {kernel.numel()}, same output")

# %% [markdown]
# The axes have to be *moved* before the kernel is flattened. The released code flattens
# it as it lies in memory: the right shape, another rank.

# %%
moved = kernel.permute(0, 2, 1, 3).reshape(18, 12)
flattened = kernel.reshape(18, 12)
for name, matrix in {"moved": moved, "flattened": flattened}.items():
    values = torch.linalg.svdvals(matrix)
    error = values[2:].norm() / values.norm()
    print(f"axes {name:9}: relative error {error:.1%} at rank 2")

# %% [markdown]
# The library's layer says its rank as a share of its **break-even rank**, at which it
# holds as many parameters as the dense layer.

# %%
conv = nn.Conv2d(4, 6, 3, padding=1, bias=False, dtype=torch.float64)
with torch.no_grad():
    conv.weight.copy_(kernel)
layer = cpnb.factorize(conv, rank=2, skip=())
torch.testing.assert_close(layer(images), conv(images))
print(layer)

# %% [markdown]
# ## 3. Where the factors start
#
# **Each by itself.** The paper's baseline calls Kaiming's rule on each matrix:
# $\operatorname{Var}(U) = 2/r$ and $\operatorname{Var}(V) = 2/(I K_w)$. An entry of the
# product is a sum of $r$ terms, so that
#
# $$\operatorname{Var}(W) = r\cdot\frac2r\cdot\frac{2}{I K_w} = 2 K_h \cdot
# \frac{2}{I K_h K_w} ,$$
#
# $2K_h$ times what Kaiming's rule asks of the layer: **six times too much for a 3×3
# kernel**, whatever the rank.
#
# **Spectral initialisation.** Take the singular value decomposition $\tilde U \Sigma
# \tilde V^\top$ of the dense start's matrix and keep the $r$ largest values:
# $U = \tilde U_r \Sigma_r^{1/2}$, $V = \tilde V_r \Sigma_r^{1/2}$. No product of rank
# $r$ is nearer to the dense start, and the two factors are of equal size.
#
# ### Exercise 1: the spectral start
#
# Write `my_spectral(kernel, rank)`, which returns $U$ and $V$ of a kernel of shape
# `(out, in, height, width)`.


# %%
def my_spectral(kernel, rank):
    """U, shape (out · height, rank), and V, shape (in · width, rank)."""
    # your code here
    return None


# %%
def check_spectral(name, function):
    """Compare the product and the sizes of the columns with the library's."""
    conv = nn.Conv2d(4, 6, (3, 5), dtype=torch.float64)
    layer = cpnb.factorize(conv, rank=3, skip=())
    expected = layer.left @ layer.right.T, layer.left.T @ layer.left
    got = function(conv.weight, 3)
    check(name, got and (got[0] @ got[1].T, got[1].T @ got[1]), expected)


check_spectral("exercise 1", my_spectral)


# %% tags=["solution"] jupyter={"source_hidden": true}
def my_spectral_solution(kernel, rank):
    """U, shape (out · height, rank), and V, shape (in · width, rank)."""
    out, channels, height, width = kernel.shape
    matrix = kernel.permute(0, 2, 1, 3).reshape(out * height, channels * width)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right.T[:, :rank] * root


check_spectral("exercise 1, solution", my_spectral_solution)

# %% [markdown]
# **Predict:** at rank 7 a 64×32×3×3 kernel holds 11 % of its parameters. How much of
# the dense start does the spectral one keep?

# %%
SHAPE, RANKS = (64, 32, 3, 3), [2, 7, 12, 24, 48, 96]
DRAWS = range(3 if FAST else 10)


def start(init, rank, seed):
    """A convolution from Kaiming's normal start, and its low-rank form."""
    conv = nn.Conv2d(SHAPE[1], SHAPE[0], 3, bias=False)
    draw = torch.Generator().manual_seed(seed)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=draw)
    options = {"generator": torch.Generator().manual_seed(seed), "skip": ()}
    return conv, cpnb.factorize(conv, rank=rank, init=init, **options)


# %%
conv, small = start("spectral", 7, seed=0)
share = (small.left.numel() + small.right.numel()) / conv.weight.numel()
left_over = (conv.weight - small.weight).norm() / conv.weight.norm()
square = (small.weight.norm() / conv.weight.norm()) ** 2
print(f"rank 7: {share:.1%} of the parameters, {square:.0%} of ‖W‖²")
print(f"relative error ‖W − UVᵀ‖ / ‖W‖ = {left_over:.2f}")


# %%
def variance(init, rank):
    """Var(W) over Kaiming's, mean of the draws."""
    squares = [start(init, rank, s)[1].weight.square().mean() for s in DRAWS]
    return torch.stack(squares).mean().item() * math.prod(SHAPE[1:]) / 2


starts = {"each by itself": "kaiming", "spectral": "spectral"}
ratios = pd.DataFrame(
    {name: [variance(init, r) for r in RANKS] for name, init in starts.items()},
    index=RANKS,
)
assert (ratios["each by itself"] / 6 - 1).abs().max() < 0.1
assert abs(ratios.spectral[96] - 1) < 0.05

# %%
ax = ratios.plot(**look("low-rank", "SI"), ylim=(0, 7), xlabel="rank r")
ax.axhline(1, color="#555555", linestyle=":", zorder=0)
ax.set_ylabel("Var(W) / Kaiming's variance")
ax.set_title("One start is six times too wide, the other too narrow below full rank")
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# **Figure:** variance of the product against its rank; the start of each factor by
# itself lies near 6 at every rank, the spectral start rises from below 0.1 at rank 2 to
# Kaiming's variance, the dotted line at 1, at full rank 96.
#
# At 11 % of the parameters the nearest product is not near: it keeps 19 % of $\|W\|^2$,
# a relative error of 0.90.
#
# ## 4. What decay presses on
#
# For a dense kernel weight decay is the gradient of $\tfrac\mu2\|W\|_F^2$. Frobenius
# decay keeps that penalty and lets $W = UV^\top$.
#
# ### Exercise 2: the gradient
#
# Write `frobenius_gradient(U, V, mu)`: the gradients of $\tfrac\mu2\|UV^\top\|_F^2$ by
# $U$ and by $V$, without any matrix of the size of $UV^\top$. Hint: the squared norm is
# $\operatorname{tr}(U^\top U\, V^\top V)$.


# %%
def frobenius_gradient(U, V, mu):
    """Gradients of (μ/2)‖U Vᵀ‖² by U and by V."""
    # your code here
    return None


# %%
def check_gradient(name, function):
    """Compare with automatic differentiation through the product."""
    left, right = draw(18, 2).requires_grad_(), draw(12, 2).requires_grad_()
    (0.3 / 2 * (left @ right.T).square().sum()).backward()
    got = function(left.detach(), right.detach(), 0.3)
    check(name, got, (left.grad, right.grad))


check_gradient("exercise 2", frobenius_gradient)


# %% tags=["solution"] jupyter={"source_hidden": true}
def frobenius_gradient_solution(U, V, mu):
    """Gradients of (μ/2)‖U Vᵀ‖² by U and by V."""
    return mu * U @ (V.T @ V), mu * V @ (U.T @ U)


check_gradient("exercise 2, solution", frobenius_gradient_solution)

# %% [markdown]
# `FrobeniusDecay` adds this gradient before each step and takes the factors out of
# ordinary decay. (The paper has the matrix case; for CP layers we derived it, from
# $\sigma^2\lambda^\top\Gamma\lambda$, the squared norm of `05_truncation`.)
#
# ### What each decay does to singular values
#
# Fit factors to a matrix $T$, with either penalty. For the product the problem is
#
# $$\min_W \tfrac12\|W - T\|^2 + \mu\|W\|_* \qquad\text{or}\qquad
# \min_W \tfrac12\|W - T\|^2 + \tfrac\mu2\|W\|_F^2 ,$$
#
# solved by hand for one singular value $t$ at a time: $\max(t - \mu, 0)$, called *soft
# thresholding*, and $t/(1 + \mu)$.
#
# **Predict:** $T$ has the singular values 4, 3, 2, 1, ½ and ¼ and $\mu = 1$. What is
# the rank of each solution?

# %%
TARGET = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)


def fitted_values(penalty, steps=2000, lr=0.05):
    """Singular values of U Vᵀ after gradient descent on the fit and the penalty."""
    before, after = (torch.linalg.qr(draw(6, 6)).Q for _ in range(2))
    target = before @ torch.diag(TARGET) @ after
    left, right = (
        (0.5 * draw(6, 6)).requires_grad_(),
        (0.5 * draw(6, 6)).requires_grad_(),
    )
    descent = torch.optim.SGD([left, right], lr=lr)
    for _ in range(steps):
        descent.zero_grad()
        error = (left @ right.T - target).square().sum() / 2
        (error + penalty(left, right)).backward()
        descent.step()
    return torch.linalg.svdvals((left @ right.T).detach())


# %%
on_factors = fitted_values(lambda u, v: (u.square().sum() + v.square().sum()) / 2)
on_product = fitted_values(lambda u, v: (u @ v.T).square().sum() / 2)
torch.testing.assert_close(on_factors, (TARGET - 1).clamp_min(0), atol=5e-3, rtol=0)
torch.testing.assert_close(on_product, TARGET / 2, atol=5e-3, rtol=0)
print("gradient descent on the factors arrives at the solutions by hand")

# %%
values = {"target": TARGET, "decay on the factors": on_factors}
values["Frobenius decay"] = on_product
table = pd.DataFrame(values, index=range(1, 7))
ax = table.plot(**look("dense", "low-rank", "FD"), ylabel="size")
ax.set_xlabel("singular value")
left_over = (table > 0.01).sum()
ax.set_title(
    "Decay on the factors leaves rank {1}, Frobenius decay {2}".format(*left_over)
)
plt.show()

# %% [markdown]
# **Figure:** singular values of the target (4 to ¼) and of both solutions; decay on the
# factors lowers the first three by 1 and sets the others to zero, Frobenius decay
# halves all six.
#
# So decay on the factors is a penalty on the *rank*, which nobody asked for where the
# rank is already low. Frobenius decay shrinks all values alike, as decay does in a
# dense layer.
#
# **The same on purpose.** In CP form `ProximalL1` soft-thresholds every
# $|\sigma\lambda_r|$ after each step. What arrives at zero can be removed without any
# change of the output.

# %%
generator = torch.Generator().manual_seed(0)
data = cpnb.load_data("digits")
net = cpnb.DigitsNet(generator=generator)
net = cpnb.canonicalize(net, init="unified", generator=generator)
settings = {"epochs": 8 if FAST else 20, "lr": 0.01, "progress": False}
cpnb.fit(net, data, hooks=[ProximalL1(0.4)], **settings)
left = {n: int(cp.lam.count_nonzero()) for n, cp in cpnb.cp_layers(net).items()}
print("components left", left, f"accuracy {cpnb.accuracy(net, data):.1%}")

# %%
small = cpnb.truncate(net, rank=left)
images = data.validation.standardized()
change = (net.eval()(images) - small.eval()(images)).abs().max().item()
counts = [sum(p.numel() for p in model.parameters()) for model in (net, small)]
print(f"{counts[0]:,} parameters, then {counts[1]:,}; scores moved by {change:.0e}")
assert change < 1e-4

# %% [markdown]
# `conv2` loses 62 of its 84 components, the other layers none.
#
# ## 5. Two decisions, four networks
#
# Now five convolutions with batch norm on the digits. First convolution and classifier
# stay dense; the others are cut to one share of their break-even rank, so that the
# network holds **ten percent of its parameters**.

# %%
SHARE = 0.1


def dense_network(generator, num_classes=10):
    """Five convolutions with batch norm, from Kaiming's start, and a classifier."""
    sizes, layers = (1, 16, 32, 32, 64, 64), []
    for n, (before, size) in enumerate(pairwise(sizes)):
        conv = nn.Conv2d(before, size, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
        layers += [conv, nn.BatchNorm2d(size), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if n in (1, 3) else []
    linear = nn.Linear(sizes[-1], num_classes)
    nn.init.kaiming_uniform_(linear.weight, math.sqrt(5), generator=generator)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


REGISTRY["dense_network"] = dense_network  # for recipes, below


# %%
def small_network(init):
    """The dense network of seed 0 with a tenth of its parameters."""
    generator = torch.Generator().manual_seed(0)
    return with_share(dense_network(generator), SHARE, init, generator)


# %%
dense = dense_network(torch.Generator().manual_seed(0))
for form, init in {"low-rank": "spectral", "CP": "unified"}.items():
    models = (small_network(init), dense)
    held, full = (sum(p.numel() for p in model.parameters()) for model in models)
    print(f"{form}: {held:,} of {full:,} parameters, {held / full:.1%}")

# %% [markdown]
# ### Before the first step
#
# *How far does a step turn the kernel?* Before batch norm only its direction counts,
# and a step of rate $\eta$ turns that by $\eta/\|W\|_F^2$ (the *effective step*,
# notebook 02).
#
# *How fast does decay shrink it?* In units of a dense kernel's decay, decay on the
# factors takes from both sides, so 2. Frobenius decay takes $(\|U^\top W\|_F^2 +
# \|W V\|_F^2)/\|W\|_F^2$. (This measure is ours.)
#
# **Predict:** which start turns faster, and which does Frobenius decay shrink faster?


# %%
def shrinkage(layer):
    """Rate at which Frobenius decay shrinks a kernel, over that of a dense kernel."""
    left, right = layer.left.detach(), layer.right.detach()
    product = left @ right.T
    squares = (left.T @ product).square().sum() + (product @ right).square().sum()
    return (squares / product.square().sum()).item()


def at_start(init):
    """Means over the four low-rank layers."""
    net = small_network(init)
    norms = factor_norms(net, lr=0.1)
    rates = [shrinkage(net.get_submodule(name)) for name in norms.index]
    size = (norms.frobenius**2).mean()
    return [size, norms.effective_step.mean(), 2, sum(rates) / len(rates)]


# %%
kernels = [m.weight for m in dense.modules() if isinstance(m, nn.Conv2d)][1:]
sizes = torch.stack([kernel.detach().square().sum() for kernel in kernels])
rows = {"dense": [sizes.mean().item(), (0.1 / sizes).mean().item(), 1, 1]}
rows |= {init: at_start(init) for init in ("kaiming", "spectral")}
digits = {"‖W‖²": 1, "step at rate 0.1": 5, "factor decay shrinks": 1, "FD shrinks": 1}
pd.DataFrame(rows, index=list(digits)).T.round(digits)

# %% [markdown]
# Neither start has the step of the dense network: with each factor by itself it is more
# than six times smaller, with the spectral start more than six times larger. Frobenius
# decay shrinks the spectral start 3.4 times as fast as decay shrinks a dense kernel,
# the oversized factors 68 times as fast. Each decision changes what the other has to
# do, so **each of the four needs its own learning rate**.
#
# ### Along training
#
# One network each, at one rate, watched after every epoch: the nuclear norm and, over
# it, the bound of section 1.

# %%
# The paper has a decay of 1e-4 and 200 epochs; here 1e-2 has 204 steps to act in.
SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-2, "batch_size": 64}
SGD |= {"epochs": 4 if FAST else 12}
CELLS = {"low-rank": ("kaiming", False), "SI": ("spectral", False)}
CELLS |= {"FD": ("kaiming", True), "SI+FD": ("spectral", True)}


def watched(init, frobenius):
    """Means over the layers of what `factor_norms` says, after 0, 1, … epochs."""
    net = small_network(init)
    log = [factor_norms(net).mean()]
    cpnb.fit(
        *(net, data),
        **SGD,
        lr=0.1,
        schedule=None,
        hooks=[FrobeniusDecay()] if frobenius else [],
        callback=lambda epoch, model, record: log.append(factor_norms(model).mean()),
        progress=False,
    )
    return pd.DataFrame(log, index=range(len(log)))


# %%
courses = {name: watched(*cell) for name, cell in CELLS.items()}
nuclear = pd.DataFrame({name: course.nuclear for name, course in courses.items()})
bound = pd.DataFrame({name: course.bound for name, course in courses.items()})
gap = bound / nuclear
lost = 1 - nuclear.loc[1] / nuclear.loc[0]
values = {"lost in epoch 1": lost, "gap before": gap.iloc[0], "gap after": gap.iloc[-1]}
assert (gap > 1 - 1e-6).all(axis=None)
assert lost.idxmax() == "FD"
pd.DataFrame(values).round(2)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
lines = {**look(*CELLS), "markevery": 3, "xlabel": "epoch"}
nuclear.plot(ax=axes[0], ylabel="nuclear norm", **lines)
gap.plot(ax=axes[1], ylabel="bound / nuclear norm", legend=False, **lines)
axes[0].set_title("FD alone: the nuclear norm falls at once …")
axes[1].set_title("… and the factors stay unbalanced")
plt.show()

# %% [markdown]
# **Figure:** nuclear norm (left) and bound over nuclear norm (right) per epoch, four
# networks; on the left FD alone falls from 55 to 17 in the first epoch, more than any
# other, and on the right it alone ends far above 1, at 5.4.
#
# Frobenius decay does not name the nuclear norm, yet at first lowers it fastest here:
# it shrinks the whole product, through oversized factors. That these are unbalanced
# costs it nothing. Decay on the factors closes the gap, from 2.9 to 1.03; the spectral
# start has none.
#
# ## 6. The grid
#
# Each recipe's learning rate is tuned on the **validation** split, then five fresh
# seeds meet the **test** split once each (as in notebook 04).
#
# In CP form the *power* method's fit of the dense start takes the place of SI, the
# *unified* start (notebook 03) that of Kaiming's rule. Without FD neither $\sigma$ nor
# $\lambda$ decays. FD spares $\sigma$ (`scale=False`): batch norm hides it from the
# loss, so only decay would move it.

# %%
net = small_network("unified")
batch = data.train.standardized()[:64]
scores = net(batch)
with torch.no_grad():
    for layer in cpnb.cp_layers(net).values():
        layer.scale.mul_(2)
torch.testing.assert_close(net(batch), scores, rtol=1e-3, atol=1e-3)
print("every σ doubled: the same scores")

# %% [markdown]
# **Predict:** which low-rank recipe comes nearest to the dense network? Is either
# change good alone? And will CP care?

# %%
CP_CELLS = {"CP": ("unified", False), "CP power": ("power", False)}
CP_CELLS |= {"CP+FD": ("unified", True), "CP power+FD": ("power", True)}
hook = {"name": "FrobeniusDecay", "scale": False}
recipes = [Recipe("dense", "dense_network", settings=SGD)]
for name, (init, frobenius) in (CELLS | CP_CELLS).items():
    parts = ("dense_network", "with_share", {"share": SHARE, "init": init})
    recipes.append(Recipe(name, *parts, [hook] if frobenius else [], SGD))

# %%
RATES = [0.1, 0.3] if FAST else [0.05, 0.15, 0.45]
SEEDS = {"tune_seeds": [300] if FAST else [300, 301]}
SEEDS |= {"seeds": range(200, 202 if FAST else 205)}
low_rank = cpnb.compare(recipes[:5], data, rates=RATES, **SEEDS)

# %%
cp = cpnb.compare(recipes[5:], data, rates=RATES, **SEEDS)

# %%
for grid in (low_rank, cp):
    tried = grid.runs.query("phase == 'tune'").groupby("recipe").lr
    best = pd.Series(grid.best)
    assert tried.min().lt(best).all() and tried.max().gt(best).all()
table = pd.concat([low_rank.table(), cp.table()])
table[["test", "test_std"]] *= 100  # percent
table[["n", "lr", "test", "test_std"]].round(2)

# %% [markdown]
# Every chosen rate lies inside the range that was tried. Kaiming's start on each factor
# wants 0.45, the spectral one, whose effective steps are longer, 0.15.


# %%
def points_of(record):
    """Test accuracy in percent, a row per seed and a column per recipe."""
    shares = {"index": "seed", "columns": "recipe", "values": "test_accuracy"}
    return 100 * record.finals.pivot(**shares)


def draw_grid(ax, points, cells):
    """Mean ± std by start; one line without and one with Frobenius decay."""
    base, start, decay, both = cells
    for name, pair in {"low-rank": [base, start], "FD": [decay, both]}.items():
        style, shift = plots.METHOD_STYLES[name], 0.03 * (name == "FD")
        line = {"color": style.color, "marker": style.marker, "capsize": 4}
        line["label"] = "Frobenius decay" if name == "FD" else "without"
        mean, std = points[pair].mean(), points[pair].std()
        ax.errorbar([shift, 1 + shift], mean, std, **line)
    ax.axhline(points["dense"].mean(), color="#555555", linestyle=":")
    ax.set_xticks([0, 1], [cells[base][0], cells[start][0]])


# %%
points = points_of(low_rank).join(points_of(cp))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
draw_grid(axes[0], points, CELLS)
draw_grid(axes[1], points, CP_CELLS)
axes[0].set(title="Low-rank: FD hurts only after Kaiming's start", xlabel="start")
axes[1].set(title="CP: all four within a point", xlabel="start")
axes[0].set_ylabel("test accuracy, %")
axes[0].legend(loc="lower right")
plt.show()

# %% [markdown]
# **Figure:** test accuracy by start, with and without Frobenius decay, mean ± standard
# deviation of five seeds, the dense network dotted at 99.6 %; low-rank (left) the means
# go from 98.6 % to 99.4 % without FD and from 96.9 % to 99.4 % with it, in CP form
# (right) all lie between 98.3 % and 98.9 %.
#
# ### Two effects and how they combine
#
# One seed gives every recipe the same dense start and order of images, so we ask seed
# by seed: what the start changes, what FD changes, what both change, and the
# *interaction*, what both do beyond the sum of their effects. A difference has its 95 %
# interval (Student's $t$) and is *not told apart* where that holds zero.
#
# The first column is the paper's: ResNet-32 of fourfold width on CIFAR-10 at 10 %
# (quoted second-hand, without deviations). A record of ours adds columns: four
# convolutions with batch norm on all of CIFAR-10, the inner three at 15 % of their
# parameters. The paper's network waits for a GPU.


# %%
def effects(points, cells):
    """Paired differences of a grid, in points of test accuracy."""
    base, start, decay, both = (points[name] for name in cells)
    return {
        "start alone": paired_difference(start, base),
        "FD alone": paired_difference(decay, base),
        "FD, given the start": paired_difference(both, start),
        "both": paired_difference(both, base),
        "interaction": paired_difference(both - start, decay - base),
        "both, less dense": paired_difference(both, points["dense"]),
    }


def in_words(difference):
    """Mean, and ± half of the interval where there are several seeds; * told apart."""
    half = f" ± {difference.half:.2f}" if difference.n > 1 else ""
    return f"{difference.mean:+.2f}{half}{' *' * difference.told_apart}"


# %%
PAPER = {"dense": 94.49, "low-rank": 93.59, "SI": 92.52, "FD": 92.92, "SI+FD": 94.34}
columns = {"paper": effects(pd.DataFrame(PAPER, index=[0]), CELLS)}
columns["digits"] = effects(points, CELLS)
columns["digits, CP"] = effects(points, CP_CELLS)
for name in ("cifar10-small-15", "cifar10-resnet32-tenth"):
    record = read_results().get(name)
    print(f"{name}: {status(name, record)}")
    if record is not None and not record.missing():
        found = points_of(record)
        columns[name] = effects(found, CELLS)
        fd = paired_difference(found["CP+FD"], found["CP"])
        columns[f"{name}, CP"] = {"FD alone": fd}

# %%
texts = {
    column: {name: in_words(value) for name, value in rows.items()}
    for column, rows in columns.items()
}
print(f"points of test accuracy; digits n = {len(points)}; * told apart")
pd.DataFrame(texts).fillna("–")

# %%
signs = {name: value.mean for name, value in columns["digits"].items()}
if not FAST:
    assert signs["start alone"] > 0 > signs["FD alone"]
    assert signs["interaction"] > 0.5 and signs["both"] > 0
    assert columns["paper"]["start alone"].mean < 0
    print("on digits SI alone helps and FD alone hurts; in the paper both alone hurt")

# %% [markdown]
# **Paper and digits differ.** In the paper each change *alone* is worse than neither.
# On digits SI alone *helps* and FD alone hurts, both told apart; after SI, FD is not
# told apart from nothing. Two things agree: the interaction is positive, and SI with FD
# ends near the dense network (here not told apart).
#
# In CP form no effect is told apart from zero, but both together stay 1.28 ± 0.87
# points below the dense network, told apart.
#
# **CIFAR-10 goes with the digits:** FD alone hurts, SI alone is not told apart from
# nothing, and the interaction, +2.83 ± 1.26, is positive. But thin layers are far from
# dense: 65 % at best against 75.7, and FD hurts CP, too.
#
# **How far this reaches.** Two small networks, twelve epochs, one weight decay each; a
# test image of the digits is 0.28 points. Not shown: whether thin layers are faster
# (notebook 06).
#
# ## Summary
#
# - **Where to start:** Kaiming's rule on each factor makes the variance of a 3×3 kernel
#   six times too large. SI is balanced and nearest to the dense start, of which it
#   keeps 19 % of $\|W\|^2$ at 11 % of the parameters.
# - **What to press on:** decay on factors is a penalty on the nuclear norm, and on
#   rank. FD is decay of the product.
# - **The grid**, digits at a tenth of the parameters, five seeds: dense 99.6 %, SI and
#   SI+FD 99.4 %, neither 98.6 %, FD alone 96.9 %. In points, SI alone gives +0.84 ±
#   0.60 (paper −1.07), FD alone −1.67 ± 1.01 (−0.67), the interaction is +1.62 ± 0.96
#   (+2.49); ours are all told apart from zero by their 95 % intervals. In CP form
#   neither start nor FD is told apart from nothing. On CIFAR-10 FD alone hurts, too.
#
# **Next:** `08_scaling_and_conditioning`, what a network's scales do to its training.
#
# **Reference.** Khodak et al., *Initialization and regularization of factorized neural
# layers*, ICLR 2021, arXiv:2105.01029.

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
