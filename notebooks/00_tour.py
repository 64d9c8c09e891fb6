# %% [markdown]
# # What is a canonical network, and what does sliding its rank do?
#
# This is the whole idea in five minutes of reading. We take one layer apart by hand,
# train a small network of such layers on real handwritten digits, cut it down, and end
# with sliders that show what each cut costs.
#
# **After this notebook you can**
#
# 1. write the kernel of a layer as a sum of rank-one components, and rebuild it;
# 2. train such a network in a few lines and keep the test images for the last number;
# 3. say what a cut saves and what it costs, measured against the *dense* network.
#
# **You need** a little Python and the idea of a convolution. No tensor algebra.
#
# **Time, measured on two CPU cores:** 0.2 minutes; fast mode 0.2.

# %%
import matplotlib.pyplot as plt
import torch

import cpnb
from cpnb.explore import plots
from cpnb.train import fast_mode

plots.use_style()
torch.set_num_threads(1)  # rounding, and so every number, depends on it
FAST = fast_mode()
SEED = 0
print("fast mode" if FAST else "full mode")

# %% [markdown]
# ## 1. One layer by hand
#
# A linear layer with two inputs and two outputs has a kernel of four numbers. In
# **canonical form** (CP form) we do not store the kernel itself but *components*, each
# one made of a vector for the outputs, a vector for the inputs and a weight:
#
# $$W \;=\; \sigma \sum_{r=1}^{R} \lambda_r \, \hat a_r \circ \hat b_r ,
# \qquad \hat a_r = \frac{a_r}{\lVert a_r\rVert},\quad
# \hat b_r = \frac{b_r}{\lVert b_r\rVert}.$$
#
# The hats say that only the *direction* of a vector counts. Its length is carried by
# $\lambda_r$, one number per component, and by $\sigma$, one number per layer
# (Veeramacheneni et al. 2022, [arXiv:2206.01509](https://arxiv.org/abs/2206.01509)).
#
# **Predict:** with $a_1=(3,4)$, $b_1=(1,0)$, $\lambda_1=10$ and $a_2=(0,2)$,
# $b_2=(0,5)$, $\lambda_2=5$ and $\sigma=1$, what is the kernel? (Normalise first:
# $\hat a_1 = (0.6,\,0.8)$.)

# %%
first = 10 * torch.outer(torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0]))
second = 5 * torch.outer(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
by_hand = first + second
print(by_hand)

# %% [markdown]
# Column one is component one, column two is component two. The library's layer takes
# the vectors at any length, as columns of its **factor matrices**, and does the rest:

# %%
layer = cpnb.CPLinear(2, 2, rank=2, bias=False)
with torch.no_grad():
    layer.unit.fill_(1.0)  # σ is stored as scale · unit
    layer.scale.fill_(1.0)
    layer.lam.copy_(torch.tensor([10.0, 5.0]))
    layer.factors[0].copy_(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))  # a_1, a_2
    layer.factors[1].copy_(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))  # b_1, b_2
torch.testing.assert_close(layer.weight, by_hand)
print("the layer's kernel is the one computed by hand")

# %% [markdown]
# A convolution kernel has four indices, so a component has four vectors: outputs,
# inputs, height and width. The sum is the same:
#
# $$W_{oihw} \;=\; \sigma \sum_r \lambda_r\,
# \hat a_{or}\,\hat b_{ir}\,\hat c_{hr}\,\hat d_{wr}.$$

# %%
conv = cpnb.CPConv2d(16, 32, 3, rank=5, generator=torch.Generator().manual_seed(SEED))
A, B, C, D = (factor / factor.norm(dim=0) for factor in conv.factors)
W = conv.sigma * torch.einsum("r,or,ir,hr,wr->oihw", conv.lam, A, B, C, D)
torch.testing.assert_close(conv.weight, W)

images = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(SEED))
torch.testing.assert_close(
    conv(images), torch.nn.functional.conv2d(images, W, conv.bias)
)
print("same kernel, and the same output as torch's convolution with it")

# %% [markdown]
# **What does it save?** For each component, a CP layer stores one number for each entry
# of its vectors, plus its $\lambda_r$. The rank at which it holds as many parameters as
# the dense kernel is its **break-even rank**, $R_\text{same}$. Every rank $R$ in this
# project is read against it, as $R/R_\text{same}$: above 1 a CP layer compresses
# nothing.

# %%
for rank in (5, 42, 84, 168):
    count, dense = conv.parameters_at(rank), conv.dense_parameters
    share = rank / conv.break_even_rank
    print(
        f"rank {rank:3}: {count:5,} parameters, dense {dense:,}, R/R_same {share:.2f}"
    )

# %% [markdown]
# ## 2. A network of such layers
#
# The data are 1,797 handwritten digits of 8×8 pixels that come with scikit-learn. They
# are split into three parts: one to train on, one to make choices with (*validation*),
# and one that stays closed until there is one last number to read (*test*).

# %%
data = cpnb.load_data("digits")
print(data)
plots.plot_images(data.train.images[:20], data.train.labels[:20].tolist())
plt.show()

# %% [markdown]
# **Figure:** the first twenty training images in two rows of ten, each under its label;
# at 8×8 pixels most digits are clear, and a few would make you hesitate too.
#
# `DigitsNet` is a small network of ordinary torch layers. `canonicalize` returns a copy
# in which every convolution and linear layer is in CP form, here at break-even rank:
# the same number of parameters as before, give or take rounding. By default it fits the
# kernels that are there, with the greedy power method; `init` names other starts.

# %%
generator = torch.Generator().manual_seed(SEED)
plain = cpnb.DigitsNet(generator=generator)
net = cpnb.canonicalize(plain, generator=generator)
print(net)
for name, model in (("plain", plain), ("CP", net)):
    print(f"{name:>5}: {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# **Predict:** guessing gives 10 %. How many of a hundred digits does the network read
# correctly after 20 passes over 1,079 images, a few seconds of work?

# %%
run = cpnb.fit(net, data, epochs=20, lr=0.01, seed=SEED)
print(f"validation accuracy {run.history[-1]['validation_accuracy']:.1%}")

# %%
ax = plots.plot_training({"canonical": run})
ax.set_title("The CP network learns to read digits within a few epochs")
plt.show()

# %% [markdown]
# **Figure:** validation accuracy after each of 20 epochs, one curve that starts at
# 91 %, falls back by more than four points once, and from the eighth epoch on stays
# above 97 %.
#
# Now the test images, for the first and only time. All further choices are made on the
# validation images.

# %%
test_accuracy = cpnb.accuracy(net, data.test)
print(f"test accuracy {test_accuracy:.1%} on {len(data.test.labels)} images")
assert test_accuracy >= 0.97

# %% [markdown]
# ## 3. Look inside
#
# The first convolution sees one input channel, so each of its components is a 3×3
# window $\hat c_r \circ \hat d_r$ and a vector $\hat a_r$ that says how much of this
# window each of the 16 filters (outputs) takes. The seven windows are an alphabet, and
# every filter is spelled with it.

# %%
conv1 = cpnb.cp_layers(net)["conv1"]
lam, (out, height, width) = conv1.components()
windows = torch.einsum("r,hr,wr->rhw", lam, height, width).detach()
names = [f"λ = {value:.2f}" for value in lam.tolist()]
ax = plots.plot_components(windows, names)
ax.set_title("The seven windows of the first layer, each times its λ", pad=16)
plt.show()

# %% [markdown]
# **Figure:** seven windows of 3×3 entries in a row, each under its λ, the largest about
# twice the smallest; every window is a column pattern times a row pattern, so its rows
# are multiples of one another.
#
# The λ do not fall off fast, and that holds for every layer:

# %%
for name, cp in cpnb.cp_layers(net).items():
    sizes = cp.lam.detach().abs()
    ratio = (sizes.max() / sizes.min()).item()
    print(f"{name}: {cp.rank:2} components, largest |λ| is {ratio:.1f} × the smallest")

# %% [markdown]
# No layer has components of no importance. That will matter in a moment.
#
# ## 4. Cut
#
# To **truncate** a layer is to keep its components with the largest $|\lambda|$ and
# drop the others. It needs no data and no training.

# %%
order = conv1.lam.abs().argsort(descending=True)
rows = []
for rank in (7, 4, 1):
    rows.append(cpnb.truncate(conv1, rank=rank).weight.detach()[:8, 0])
    torch.testing.assert_close(
        rows[-1],
        torch.einsum("rhw,or->ohw", windows[order[:rank]], out[:8, order[:rank]]),
    )
print("truncation keeps the first components in the order", order.tolist())

# %%
ax = plots.plot_components(torch.stack(rows))
ax.set_title("Eight filters spelled with 7, 4 and 1 components (top to bottom)")
plt.show()

# %% [markdown]
# **Figure:** the same eight filters in three rows, made of 7, 4 and 1 components; with
# four they are already simplified, with one all of them are the same window, up to a
# factor.
#
# **Predict:** the whole network now, every layer cut to half of its components. Its
# parameters will halve. What happens to the accuracy: a few points lost, or many?

# %%
half = cpnb.truncate(net, keep=0.5)
cpnb.truncation_report(net, half, data).round(3)

# %% [markdown]
# The table counts parameters against the *dense* network, the only fair reference.
# `relative_error` is that of the kernel, $\lVert W-\hat W\rVert/\lVert W\rVert$: 0 is a
# perfect copy, 1 is as far off as a kernel of zeros. Without further training, this cut
# is far too much. How much is left may also depend on the *start*: the power method
# finds the largest component first, and training keeps some of that order. A start that
# gives all components the same weight has no order to keep:

# %%
equal = cpnb.canonicalize(plain, init="unified", generator=generator)
cpnb.fit(equal, data, epochs=20, lr=0.01, seed=SEED, progress=False)
cut = {"power method": half, "equal weights": cpnb.truncate(equal, keep=0.5)}
whole = {"power method": net, "equal weights": equal}
for name, model in cut.items():
    print(
        f"start by {name}: {cpnb.accuracy(whole[name], data):.1%} whole, "
        f"{cpnb.accuracy(model, data):.1%} at half"
    )

# %% [markdown]
# How the order of components, the start and the training decide what a cut costs is the
# subject of `05_truncation`.
#
# ## 5. Accuracy against rank
#
# Which layer is to blame? `rank_sweep` measures the accuracy at every rank of every
# layer, the other layers left whole, and for all layers cut together.

# %%
sweep = cpnb.rank_sweep(net, data)
print(sweep)

# %% tags=["readme-figure"]
fig, axes = plt.subplots(1, 4, figsize=(10, 3.2), sharey=True)
for ax, name in zip(axes, sweep.ranks, strict=True):
    plots.plot_rank_curve(sweep, name, ax=ax)
    ax.label_outer()
fig.suptitle("Accuracy on digits when one layer is cut and the others stay whole")
plt.show()

# %% [markdown]
# **Figure:** accuracy against rank in four panels, one for each layer; `conv2` and
# `fc1` are nearly flat over the right half of their panels, and `fc2`, which has only
# nine components, falls most there.
#
# The same in numbers, with what each layer weighs:

# %%
for name, layer in sweep.layers.items():
    rank = layer.rank // 2
    share = layer.dense_parameters / sweep.dense_parameters
    print(
        f"{name}: rank {rank:2} of {layer.rank:2} alone gives "
        f"{sweep.accuracy({name: rank}):.1%}; "
        f"it holds {share:5.1%} of the dense parameters"
    )

# %% [markdown]
# The two layers that tolerate a cut best hold nearly all of the parameters, and the two
# with few components hold nearly none. So cut only `conv2` and `fc1` to half, and leave
# the others:

# %%
better = cpnb.truncate(net, rank={"conv2": 42, "fc1": 28})
print(f"every layer at half: {cpnb.accuracy(half, data):.1%}")
print(f"conv2 and fc1 only:  {cpnb.accuracy(better, data):.1%}")
cpnb.truncation_report(net, better, data).round(3)

# %% [markdown]
# Nearly the same parameters saved, at a fraction of the loss. *Where* to cut matters
# more than any other choice in this notebook.
#
# ## 6. Slide the ranks yourself
#
# The figure above, live. The slider at the top cuts all layers to the same share, the
# others, under *Each layer*, one layer each; the line under the picture says what is
# left. (On a page without Python you see the picture of the whole network.)
#
# **Predict**, then try: setting each layer on its own, how few parameters can the
# network have and still reach 95 %?

# %%
explorer = cpnb.RankExplorer(sweep, net, data)
explorer

# %% [markdown]
# **Figure:** accuracy against the number of components that all layers hold together, a
# curve with steps that climbs from 10 % at 4 to 98 % at all 157, where a large disc
# marks the ranks that the sliders show.
#
# ## 7. Exercises
#
# Each one has a stub that runs as it is, a check, and a solution to compare with.
#
# **Exercise 1.** Count the parameters of a CP kernel (no bias): one σ, and for each
# component one λ and one entry per row of each factor. Modes of size 1 have no factor.
#
# ```text
# count = 1
# for each component:
#     count += 1, plus the sizes of all modes larger than 1
# ```


# %%
def kernel_parameters(shape, rank):
    """Parameters of a CP kernel of this shape and rank."""
    return None  # your code


# %%
def check_parameters(function):
    """Compare with what layers really hold."""
    for shape, rank in (((32, 16, 3, 3), 5), ((16, 1, 3, 3), 7), ((8, 4, 5, 1), 3)):
        out_channels, in_channels, *size = shape
        layer = cpnb.CPConv2d(in_channels, out_channels, size, rank=rank, bias=False)
        expected = sum(p.numel() for p in layer.parameters())
        if (found := function(shape, rank)) != expected:
            return f"not yet: {shape} at rank {rank} holds {expected}, got {found}"
    return "correct"


check_parameters(kernel_parameters)


# %% tags=["solution"] jupyter={"source_hidden": true}
def kernel_parameters_solution(shape, rank):
    """Parameters of a CP kernel of this shape and rank."""
    return 1 + rank * (1 + sum(size for size in shape if size > 1))


check_parameters(kernel_parameters_solution)

# %% [markdown]
# **Exercise 2.** The table `sweep.curve("*")` has a row for each share of components,
# the same in all layers, with the columns `keep` and `accuracy`. Find the smallest
# share at which the network still reaches a target accuracy. (Any share below 100 %
# takes a component from every layer, from `fc2` too.) The check does not look into the
# table: it cuts the network itself.

# %%
sweep.curve("*")[["keep", "rank", "accuracy", "parameters"]].head(3)


# %%
def smallest_share(table, target):
    """Smallest fraction of components with at least the target accuracy."""
    return None  # your code


# %%
def check_share(function, target=0.85):
    """Cut the network to the share found, and to every smaller percent."""
    if (keep := function(sweep.curve("*"), target)) is None:
        return "not solved yet"
    shares = [percent / 100 for percent in range(1, round(100 * keep) + 1)]
    reached = [
        cpnb.accuracy(cpnb.truncate(net, keep=share), data) >= target
        for share in shares
    ]
    right = reached[-1] and not any(reached[:-1])
    return f"correct: {keep:.0%}" if right else f"not yet: {keep:.0%} is not it"


check_share(smallest_share)


# %% tags=["solution"] jupyter={"source_hidden": true}
def smallest_share_solution(table, target):
    """Smallest fraction of components with at least the target accuracy."""
    return table.keep[table.accuracy >= target].min()


check_share(smallest_share_solution)

# %% [markdown]
# ## What was not shown
#
# - **Error bars.** Everything here is one network and one seed. `05_truncation` repeats
#   the cut over several.
# - **Training after the cut**, which brings back much of what is lost: `05_truncation`.
# - **Whether CP form trains better** than plain layers:
#   `02_canonical_weight_normalization`.
# - **Speed.** Fewer parameters do not by themselves mean less time:
#   `06_from_ranks_to_speed`.
# - **Writers.** All splits contain digits of all writers, so the test accuracy does not
#   speak about a new person's handwriting.
#
# ## Summary
#
# A canonical layer stores its kernel as $\sigma\sum_r\lambda_r\,\hat a_r\circ\hat
# b_r\circ\dots$ and trains like any other layer. Dropping components makes it smaller
# at once; the honest price is measured against the dense network, layer by layer, and
# the explorer shows it for every rank.
#
# **Next:** `01_cp_decomposition`: how such a sum is computed, and when that fails.
#
# **References.** Veeramacheneni, Wolter, Klein and Garcke, *Canonical convolutional
# neural networks*, IJCNN 2022, [arXiv:2206.01509](https://arxiv.org/abs/2206.01509).
# Kolda and Bader, *Tensor decompositions and applications*, SIAM Review 2009,
# [doi:10.1137/07070111X](https://doi.org/10.1137/07070111X). Digits: Alpaydin and
# Kaynak, UCI Machine Learning Repository 1998,
# [doi:10.24432/C50P49](https://doi.org/10.24432/C50P49).

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
