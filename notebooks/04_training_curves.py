# %% [markdown]
# # How do the normalizations compare in training?
#
# A network can be normalised in many ways: its activations (batch norm), its kernels
# (weight norm, spectral norm, …), or the columns of its factors, which is what a
# canonical network does. The papers show training curves. **Which method trains
# fastest, and which ends best, when each has the learning rate that suits it?**
#
# **After this notebook you can**
#
# 1. say how rates, seeds and test images decide a comparison before the methods do;
# 2. run a fair comparison with one call, stop it, and let it go on;
# 3. read curves against epochs *and* against seconds, and judge a difference by its
#    spread.
#
# **You need** `02_canonical_weight_normalization`; `03_initialization` explains the
# starts.
#
# **Time, measured on two CPU cores:** 1.3 minutes; fast mode 0.7.

# %%
import math
import textwrap

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

import cpnb
from cpnb.explore import explore, plots
from cpnb.train import REGISTRY, Recipe, build, fast_mode, paired_difference
from experiments import EXPERIMENTS, read_results

plots.use_style()
plt.rcParams["figure.dpi"] = 85  # many figures: keeps this file small
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
SEEDS = range(2 if FAST else 5)
print(f"{'fast' if FAST else 'full'} mode, n = {len(SEEDS)} networks per method")

# %% [markdown]
# ## 1. Why not report the best of a few runs?
#
# Say that three learning rates are equally good: whichever is used, a network's test
# accuracy is 97 %, give or take 0.2 points from seed to seed. Somebody trains one
# network at each rate and reports the best of the three *on the test images*.
#
# **Predict:** by how much does this flatter the method, on average?
#
# The best of three independent standard normal numbers has the mean
# $\tfrac{3}{2\sqrt{\pi}} \approx 0.846$, so the report is too high by $0.846 \cdot 0.2
# \approx 0.17$ points; as much as separates many methods. Chosen on *validation* images
# and tested with *fresh* seeds it is too high by nothing:

# %%
generator = torch.Generator().manual_seed(0)
noise = 0.2 * torch.randn(2, 100_000, 3, generator=generator)  # validation, test
flattered = noise[1].max(dim=1).values.mean().item()
choice = noise[0].argmax(dim=1, keepdim=True)
honest = noise[1].gather(1, choice).mean().item()
print(f"best of three on the test images: {flattered:+.3f} points")
print(f"chosen on others, then tested:    {honest:+.3f} points")
torch.testing.assert_close(flattered, 0.2 * 3 / (2 * math.pi**0.5), rtol=0.02, atol=0)
assert abs(honest) < 0.005

# %% [markdown]
# So `cpnb.compare` works in this order, for every method:
#
# 1. **tune**: train at every rate with one set of seeds, and take the rate with the
#    best mean *validation* accuracy after the last epoch; a rate under which a loss was
#    ever not finite is out;
# 2. **train anew** from fresh seeds at that rate;
# 3. **test** each of these networks once, after its training.
#
# ## 2. A comparison on the digits, now
#
# A `Recipe` says how a network is made and trained, in names and numbers. `"none"` is
# the plain network, the others are names in `cpnb.methods.NORMALIZERS`; `"canonical"`
# puts every layer in CP form with as many parameters as it had.
#
# **Predict:** after ten passes over 1,079 small images, who is ahead, and who needs the
# most seconds for it?

# %%
SETTINGS = {"epochs": 6 if FAST else 10, "batch_size": 64, "schedule": None}


def digits_recipe(name, normalizer, **options):
    """Train a small network on the digits with Adam."""
    return Recipe(name, "DigitsNet", normalizer, options, settings=SETTINGS)


recipes = [
    digits_recipe("none", "none"),
    digits_recipe("batch", "batch"),
    digits_recipe("weight", "weight"),
    digits_recipe("conditioned", "conditioned"),
    digits_recipe("canonical-unified", "canonical", init="unified"),
    digits_recipe("canonical-power", "canonical", init="power"),
]
RATES = [0.001, 0.01] if FAST else [0.001, 0.003, 0.01, 0.03]
data = cpnb.load_data()
digits = cpnb.compare(recipes, data, seeds=SEEDS, rates=RATES)
digits.table()

# %% [markdown]
# `compare` hides nothing: one of its networks, made and trained by hand, has the very
# same course.

# %%
network, lr = build(recipes[2], data, seed=0), digits.best["weight"]
again = cpnb.fit(network, data, **SETTINGS, lr=lr, seed=0, progress=False)
ours = [epoch["train_loss"] for epoch in again.history]
curve = digits.final_curves.query("recipe == 'weight' and seed == 0")
theirs = curve.train_loss.tolist()
torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)  # rounded to 5 digits
print("train loss by hand:", *(f"{loss:.4f}" for loss in ours[:5]), "…")
print("train loss in compare:", *(f"{loss:.4f}" for loss in theirs[:5]), "…")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
plots.plot_training(digits.final_curves, ax=axes[0])
plots.plot_training(digits.final_curves, ax=axes[1], axis="seconds")
axes[0].get_legend().remove()
axes[0].set_title("digits: against epochs")
axes[1].set_title("the same against seconds")
axes[1].set_ylabel("")
plt.show()

# %% [markdown]
# **What to see:** lines are means and bands ± one standard deviation over the fresh
# seeds, each method at its own rate. Compare the distance between the ends with the
# bands. Against seconds the curves move apart: computing the kernels anew in every step
# costs time, most of all in the canonical networks. (`edge` in the table says that a
# best rate is the smallest or the largest that was tried.)
#
# ## 3. The paper's setting, from records
#
# These records are older than the step gauge of `02_canonical_weight_normalization`:
# their canonical networks stored unit columns, and want smaller rates than the others.
#
# The paper trains a LeNet on MNIST, with SGD and with RMSprop, and an AlexNet on
# CIFAR-10 and SVHN. Such runs are too long for a notebook: `python experiments.py run
# NAME` makes them, one training after the other, and leaves a record. The next cell
# says which there are. They are read here without any data set.

# %%
results = read_results("results")
SETS = {
    "MNIST, SGD": results["mnist-lenet-sgd-cpu"],
    "Fashion-MNIST, SGD": results["fashion-lenet-sgd-cpu"],
    "MNIST, RMSprop": results["mnist-lenet-rmsprop-cpu"],
}
for title, comparison in SETS.items():
    runs, minutes = comparison.runs, comparison.runs.seconds.sum() / 60
    place = runs.iloc[0]
    print(f"{title}: {runs.recipe.nunique()} methods, {len(runs)} networks")
    print(f"  {comparison.data}")
    print(f"  {place.device}, {place.threads} thread, torch {place.torch}", end=", ")
    print(f"{place.date[:10]}, {minutes:.0f} minutes")
    print(f"  rates {comparison.rates}, {len(comparison.seeds)} fresh seeds;")
    print(f"  {'not complete' if comparison.missing() else 'complete'}")
missing = [name for name in EXPERIMENTS if name not in results]
print(textwrap.fill(f"not run yet: {', '.join(missing)}", 84))

# %% [markdown]
# For a seed all see the images in the same order, without momentum, weight decay or a
# schedule, as in the authors' public code. They also start from the same dense weights,
# but for those that draw a start of their own: weight norm with a start from data, and
# the canonical networks that are not fitted (unified, Gaussian, uniform). This is a
# **reduced size**: 2,000 training images, four passes. What it shows is the beginning
# of a training.
#
# **Predict:** the canonical network has the authors' ranks, slightly *more* parameters
# than the dense one. Does it start faster or slower than the plain network? Do its
# start and the optimizer matter?

# %%
CANONICAL = [name for name in SETS["MNIST, SGD"].recipes if "canonical" in name]
OTHERS = [name for name in SETS["MNIST, SGD"].recipes if name not in CANONICAL]


def chosen(comparison, names):
    """The curves of the tested networks of some methods."""
    curves = comparison.final_curves
    return curves[curves.recipe.isin(names)]


def panel(ax, title, names, measure, axis="epoch"):
    """Draw one panel without a legend of its own."""
    plots.plot_training(chosen(SETS[title], names), measure, ax, axis=axis)
    ax.get_legend().remove()


def tidy(fig, axes):
    """Titles above, labels on the left, one legend below."""
    for ax, title in zip(axes[0], SETS, strict=True):
        ax.set_title(title)
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(lines, labels, loc="outside lower center", ncols=5)
    plt.show()


# %%
fig, axes = plt.subplots(2, len(SETS), figsize=(10, 6.2))
for column, title in enumerate(SETS):
    panel(axes[0, column], title, OTHERS, "train_loss")
    axes[0, column].set_yscale("log")
    axes[0, column].set_ylim(bottom=0.1)
    panel(axes[1, column], title, OTHERS, "validation_accuracy")
tidy(fig, axes)

# %% [markdown]
# **What to see:** means and ± one standard deviation over five seeds. Batch norm, ONI
# and standardized kernels are ahead of the plain network from the first epoch on, in
# loss and in accuracy; only under RMSprop, where the distances are small, has the plain
# one caught up with standardized kernels by the last epoch. Conditioned kernels follow
# them under SGD and fall behind under RMSprop. Weight norm and scaling run beside the
# plain network under SGD, within the bands of both; so does spectral norm. Under
# RMSprop weight norm and spectral norm end below it.
#
# Now the canonical networks, with the plain one to compare with.

# %%
fig, axes = plt.subplots(2, len(SETS), figsize=(10, 6.2))
for column, title in enumerate(SETS):
    names = ["none", *CANONICAL]
    panel(axes[0, column], title, names, "validation_accuracy")
    panel(axes[1, column], title, names, "validation_accuracy", "seconds")
tidy(fig, axes)

# %% [markdown]
# **What to see:** after the first epoch all four starts are behind the plain network,
# in every column. On MNIST the one from the power method comes nearest to it in the
# end, under RMSprop already after the second epoch. The unified start trains at small
# rates only, and slowly there. The widest band is that of the uniform start on MNIST:
# one of its five networks stopped learning, at a rate that had suited the tuning seed
# best. Against seconds the picture is nearly the same: in a LeNet, rebuilding the
# kernels in every step costs little beside the convolutions.
#
# ## 4. The final table
#
# Test accuracy after the last epoch, and the difference to the plain network for each
# seed with a 95 % interval of its mean (Student's $t$, five seeds). When the interval
# contains zero, the methods were not told apart.


# %%
def gaps(comparison, reference="none"):
    """Differences to the reference in points of test accuracy, by method."""
    finals = comparison.finals
    points = 100 * finals.pivot(index="seed", columns="recipe", values="test_accuracy")
    return {
        name: paired_difference(points[name], points[reference])
        for name in comparison.recipes
    }


def ranking(comparison):
    """The methods of which a network finished, the best first."""
    return comparison.table().query("n > 0").sort_values("test", ascending=False)


# %%
differences = {title: gaps(comparison) for title, comparison in SETS.items()}
for title, comparison in SETS.items():
    print(f"{title}: test accuracy, rate, points against none with 95 %")
    for name, row in ranking(comparison).iterrows():
        line = f"{name:20}{row.test:7.2%} ± {100 * row.test_std:.2f}   {row.lr:<7g}"
        if name != "none":
            gap = differences[title][name]
            line += (
                f"{gap.mean:+6.2f} ± {gap.half:.2f}{'' if gap.told_apart else '  ~'}"
            )
        print(line + (f"   {row.diverged} diverged" if row.diverged else ""))
    print()

# %% [markdown]
# ## 5. What tuning changed
#
# The tuning runs are in the records too: one network per method and rate. A gap in a
# line is a rate at which a loss stopped being finite.
#
# **Predict:** if everybody had to use the plain network's best rate, would the order of
# the methods be the same?


# %%
def by_rate(comparison):
    """Validation accuracy after the last epoch, a row per method, a column per rate."""
    runs = comparison.runs.query("phase == 'tune' and status == 'finished'")
    scores = runs.pivot(index="recipe", columns="lr", values="validation_accuracy")
    return scores.loc[list(comparison.recipes)]


fig, axes = plt.subplots(1, 3, figsize=(10, 4.2), sharey=True)
for ax, comparison in zip(axes, SETS.values(), strict=True):
    for name, scores in by_rate(comparison).iterrows():
        label, color, marker = plots.METHOD_STYLES[name]
        ax.plot(scores.index, scores, color=color, marker=marker, label=label)
    ax.set(xscale="log", xlabel="learning rate")
    ax.set_xticks(scores.index, [f"{rate:g}" for rate in scores.index])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
axes[0].set_ylabel("validation accuracy, one network")
tidy(fig, axes[None])

# %%
for title, comparison in SETS.items():
    scores, common = by_rate(comparison), comparison.best["none"]
    own, same = scores.max(axis=1), scores[common]
    worst = (own - same).fillna(1).idxmax()
    lost = own[worst] - same[worst]
    said = "diverges" if math.isnan(lost) else f"loses {lost:.1%}"
    print(f"{title}: at {common:g}, the rate of the plain network, {worst} {said};")
    rank = own.sort_values(ascending=False, kind="stable").index
    print(f"  tuned, the first three are {', '.join(rank[:3])};")
    rank = same.sort_values(ascending=False, kind="stable").index
    print(f"  at that common rate {', '.join(rank[:3])}.")
    table = comparison.table()
    at = ", ".join(table.index[table.edge])
    print(f"  the best rate is at the edge of the grid for {at}.")

# %% [markdown]
# **What to see:** under SGD the lines rise to a rate and then fall off a cliff, and the
# rate is the method's own: batch norm, ONI, standardized and conditioned kernels have
# their best around 0.01 to 0.03, the plain network and most canonical ones ten times
# higher, at or near the end of the grid, and the unified start at 0.003 to 0.01, beyond
# which it does not train at all. The best rate of *one* tuning seed often stands at the
# edge of the cliff, and then a fresh seed may fall: so the wide spreads in the table.
# Under RMSprop, which has a step size for every parameter, most lines change by a few
# points only between 0.0003 and 0.003; at 0.01 several networks, the plain one among
# them, do not train at all.
#
# ## 6. Beside the paper
#
# The published tables were not available to us. These are figures from the authors'
# *public logs, older than the paper* (arXiv:2206.01509); they come from long trainings
# on all images, most of a single run, at one rate for all methods:
#
# | setting | plain | weight norm | canonical |
# |---|---|---|---|
# | MNIST, RMSprop, 50 epochs | 99.15 (1 run) | 99.26 (1) | 99.18 ± 0.05 (8) |
# | MNIST, SGD, last epoch | | | 98.67 ± 0.05 |
# | MNIST, SGD, *first* epoch | 87.6 | 87.0 | 78.2 |
# | CIFAR-10, AlexNet, 100 epochs | 83.90 (1) | 83.77 (1) | 84.25 (1) |
#
# Ours, on a fraction of the images, cannot be held against the first line. The third
# one can be compared in kind: who is behind after the first epoch of SGD?

# %%
for title, comparison in SETS.items():
    curves = comparison.final_curves
    means = curves.pivot_table("validation_accuracy", "epoch", "recipe")
    for epoch, place in (("first", 0), ("last", -1)):
        line = f"{title + ', ' + epoch + ' epoch, validation:':46}"
        for name in ("none", "weight", "canonical-power", "canonical-unified"):
            line += f"  {name} {100 * means[name].iloc[place]:.1f}"
        print(line)

# %% [markdown]
# ## 7. Choose for yourself
#
# The static figures above hold what matters; with a kernel you can look at any record:
# choose the experiment, tick the methods, and choose the measure and whether to draw it
# against epochs or seconds.


# %%
def draw_curves(figure, experiment, methods, measure, axis):
    """Draw the curves of some methods, and say how they end."""
    comparison = results[experiment]
    curves = chosen(comparison, methods)
    if curves.empty:
        return "This experiment has none of these methods."
    ax = figure.subplots()
    plots.plot_training(curves, measure, ax, axis=axis)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    rows = ranking(comparison)
    return "; ".join(
        f"{name}: test accuracy {row.test:.2%} ± {100 * row.test_std:.2f} (n = {row.n})"
        f", rate {row.lr:g}, {row.seconds:.1f} s"
        for name, row in rows[rows.index.isin(methods)].iterrows()
    )


# %%
names = list(dict.fromkeys(name for one in results.values() for name in one.recipes))
explorer = explore(
    draw_curves,
    experiment=sorted(results, key=lambda name: name != "mnist-lenet-sgd-cpu"),
    methods=ipywidgets.SelectMultiple(options=names, value=names, rows=8),
    measure=["validation_accuracy", "train_accuracy", "validation_loss", "train_loss"],
    axis=["epoch", "seconds"],
)
explorer

# %% [markdown]
# ## 8. Exercise: your own normalizer in the comparison
#
# Weight norm gives every *output* a kernel row of separate length. Do it the other way
# round: give every *input* of a layer unit length. With $W$ of shape $(O, I)$, or
# $(O, I, K_h, K_w)$, divide by the norm over the output axis:
#
# ```text
# for every i, h, w:   W[:, i, h, w]  ←  W[:, i, h, w] / √( Σ_o W[o, i, h, w]² )
# ```
#
# Write it as a *parametrization*, which torch recomputes in every forward pass, and
# register it on every convolution and linear layer. A recipe takes a function of your
# own by the name under which it stands in `REGISTRY`.


# %%
class UnitInputs(nn.Module):
    """Every column of the kernel with norm one."""

    def forward(self, weight):
        """Return the kernel that the layer uses."""
        # your code here
        return weight


def unit_inputs(network):
    """Register it on every convolution and linear layer."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", UnitInputs())
    return network


# %%
def check_own(title, normalizer):
    """Check the norms before and after training, then compare."""
    REGISTRY["unit_inputs"] = normalizer
    recipe = digits_recipe("own", "unit_inputs")
    net = build(recipe, data, seed=0)
    norms = [layer.weight.norm(dim=0) for layer in (net.conv2, net.fc1)]
    if any((norm - 1).abs().max() > 1e-4 for norm in norms):
        print(f"{title}: not solved yet, the columns' norms are not one.")
        return
    cpnb.fit(net, data, epochs=1, progress=False)
    torch.testing.assert_close(net.fc1.weight.norm(dim=0), torch.ones(512))
    print(f"{title}: correct, also after training.")
    with_own = cpnb.compare([recipe], data, seeds=SEEDS, rates=RATES)
    both = pd.concat([digits.table(), with_own.table()])
    print(both.round(4).to_string(columns=both.columns[:9]))


check_own("exercise", unit_inputs)


# %% tags=["solution"]
class UnitInputsSolution(nn.Module):
    """Every column of the kernel with norm one."""

    def forward(self, weight):
        """Return the kernel that the layer uses."""
        return weight / weight.norm(dim=0, keepdim=True)


def unit_inputs_solution(network):
    """Register it on every convolution and linear layer."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", UnitInputsSolution())
    return network


check_own("exercise, solution", unit_inputs_solution)

# %% [markdown]
# ## 9. The answer
#
# Written by the next cell from the numbers above, so that text and numbers agree.


# %%
def answer():
    """The paragraph."""
    parts = []
    for title, comparison in SETS.items():
        found, rows = differences[title], ranking(comparison)
        best, worst = rows.index[0], rows.index[-1]
        apart = {name: gap.mean for name, gap in found.items() if gap.told_apart}
        above = [name for name, mean in apart.items() if mean > 0]
        below = [name for name, mean in apart.items() if mean < 0]
        canonical = next(name for name in rows.index if name in CANONICAL)
        seconds = rows.seconds[canonical] / rows.seconds["none"]
        parts.append(
            f"{title}: {best} ends best with {rows.test[best]:.1%}, "
            f"{worst} last with {rows.test[worst]:.1%}. Told apart from the "
            f"plain network are {', '.join(above) or 'nobody'} above and "
            f"{', '.join(below) or 'nobody'} below. The best canonical start is "
            f"{canonical.removeprefix('canonical-')} with "
            f"{found[canonical].mean:+.1f} points, at {seconds:.1f} times the seconds."
        )
    return parts


for paragraph in answer():
    print(textwrap.fill(paragraph, 84), end="\n\n")

# %% [markdown]
# In words: what standardises the input of a layer or spreads the directions of its
# kernel, as batch norm, ONI and standardized kernels do, has the highest means at this
# size, whatever the data set and the optimizer; the table says where five seeds tell
# them apart from the plain network. The canonical network is no short cut here: it
# starts more slowly, and what it reaches depends on its start more than on anything
# else. From the power method it ends within two points of the plain network, from the
# unified start far behind it on MNIST with SGD. That it does as well in the end of a
# long training, as the authors' logs have it, was not tested.
#
# **How far this reaches.** One network, two data sets of grey images, 2,000 training
# images, four passes, one tuning seed, five fresh seeds, rates a factor of three apart:
# this is the beginning of training on a small sample. Nothing here says who wins on all
# images after twenty epochs.
#
# ## What was not shown
#
# - *The full size*: ten seeds, all images, CIFAR-10 with AlexNet, CIFAR-100 with a
#   ResNet. These experiments are defined (`python experiments.py list`) and
#   outstanding; they want a GPU. Of SVHN there is a sample, `svhn-alexnet-sample-cpu`
#   in the explorer above: 651 images are too few to train an AlexNet on.
# - *Momentum, schedules, weight decay*: the authors' code uses none, so neither do we.
# - *Options of the methods*: each has its defaults here, see `cpnb.normalize`.
#
# ## Summary
#
# - The best of several runs on test images flatters by nearly a standard deviation.
#   Tune on validation images, train anew, test once.
# - Rates belong to methods: at one common rate the order is another one, and some
#   methods do not train at all.
# - `cpnb.compare` with a `path` keeps every finished training and goes on where it
#   stopped, here, in several processes, or on a cluster.
#
# **Next:** `05_truncation` takes components away from a trained network.
#
# **References.** L. Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical
# convolutional neural networks*, 2022, arXiv:2206.01509. S. Ioffe, C. Szegedy, *Batch
# normalization*, 2015, arXiv:1502.03167. T. Salimans, D. Kingma, *Weight
# normalization*, 2016, arXiv:1602.07868. T. Miyato et al., *Spectral normalization*,
# 2018, arXiv:1802.05957. S. Qiao et al., *Weight standardization*, 2019,
# arXiv:1903.10520. Q. Yuan, N. Xiao, *Scaling-based weight normalization*, 2019,
# doi:10.1109/ACCESS.2018.2890373 (re-derived from its abstract). L. Huang et al.,
# *Controllable orthogonalization*, 2020, arXiv:2004.00917. H. Saratchandran, T. Wang,
# S. Lucey, *Weight conditioning for smooth optimization*, 2024, arXiv:2409.03424.
# Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, 1998, doi:10.1109/5.726791 (MNIST).
# H. Xiao, K. Rasul, R. Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747.

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
