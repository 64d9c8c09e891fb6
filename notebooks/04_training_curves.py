# %% [markdown]
# # How do the normalizations compare in training?
#
# A network can be normalised in many ways: its activations (batch norm), the rows of
# its kernels (weight norm), or the columns of their factors, which is what a canonical
# network does. **On real data, trained to the end, at the rate that suits each: which
# method ends best, by how much, is that more than chance, and what does a step cost?**
#
# **After this notebook you can**
#
# 1. say how rates, seeds and test images decide a comparison before the methods do;
# 2. run a fair comparison with one call, stop it, and let it go on;
# 3. judge a difference by an interval over seeds, and say when there is none.
#
# **You need** `02_canonical_weight_normalization`; `03_initialization` explains the
# starts.
#
# **Time, measured on two CPU cores:** 0.7 minutes; fast mode 0.3.

# %%
import math
import tempfile
import threading
from _thread import interrupt_main
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parametrize

import cpnb
from cpnb.explore import explore, plots
from cpnb.train import REGISTRY, Recipe, build, fast_mode, paired_difference
from experiments import EXPERIMENTS, METHODS, TO_THE_END, curves, read_results

# %%
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
#    best mean *validation* accuracy. Where that is the smallest or the largest rate,
#    try the next one beyond it, until it is not: a best rate at the edge of its grid
#    says only that the grid was too small;
# 2. **train anew** from fresh seeds at that rate;
# 3. **test** each of these networks once, after its training.
#
# ## 2. The methods
#
# Every layer takes part, at the rank that holds as many parameters as the dense kernel;
# $V$, $v$ and the vectors with hats are what is trained.
# Two more are left out: spectral norm fixes the scale of a kernel, which a classifier
# needs, and standardised kernels want a norm layer behind them.

# %%
ROWS = {
    "none": ("W", "nothing", "what all are compared with"),
    "batch": ("γ (Wx − μ)/s + β", "mean, spread of outputs", "signals keep their size"),
    "weight": ("rows g v/‖v‖", "length, direction apart", "a long v turns slowly"),
    "conditioned": ("√2 V, rows ÷ ‖v‖", "length of rows", "a rounder loss"),
    "scaling": ("W, rows to length 1", "the function", "a balanced network"),
    "canonical": ("σ Σ λ â∘b̂∘ĉ∘d̂, fitted", "length of columns", "terms can be cut"),
    "oni": ("centred V, made orthogonal", "singular values ≈ 1", "no direction lost"),
    "canonical-unified": ("the same, drawn", "length of columns", "from nothing"),
    "SI+FD": ("UVᵀ from the SVD", "decay on ‖UVᵀ‖²", "low rank trained well"),
}
methods = pd.DataFrame(ROWS, ["kernel", "held fixed", "why"]).T

# %% [markdown]
# What does a step cost? The next cell trains each method for one pass over the digits,
# enlarged to 28×28, with LeNet-5, in turns.

# %%
digits = cpnb.load_data()
RECIPES = {recipe.name: recipe for recipe in EXPERIMENTS["mnist-lenet5"].recipes}
pixels = nn.functional.interpolate(digits.train.images, 28)
large = replace(digits, train=replace(digits.train, images=pixels))


# %%
def step_milliseconds(recipe):
    """One pass with gradients; training includes the hook of a method."""
    network = build(recipe, large, seed=0)
    how = {"optimizer": "sgd", "lr": 1e-4, "epochs": 1, "batch_size": 64}
    run = cpnb.fit(network, large.train, **how, progress=False)
    return 1000 * run.seconds / (len(pixels) // 64)


# %%
turns = [
    {name: step_milliseconds(recipe) for name, recipe in RECIPES.items()}
    for _ in range(3 if FAST else 7)
]
methods["ms per step"] = pd.DataFrame(turns).median()
methods["÷ none"] = methods["ms per step"] / methods.at["none", "ms per step"]
methods.round(2)

# %% [markdown]
# The numbers are of this processor and one thread. In a network as small as LeNet-5
# the kernels are tiny and every extra operation counts.
#
# ## 3. A comparison on the digits, now, stopped and continued
#
# A `Recipe` says how a network is made and trained, in names and numbers. With a `path`
# every finished training is written at once. The next cell is stopped after three
# seconds, by what Ctrl-C does.

# %%
folder = tempfile.TemporaryDirectory()
recipes = curves("DigitsNet", TO_THE_END | {"epochs": 4 if FAST else 10}, METHODS)
PLAN = {"seeds": SEEDS, "rates": [0.02, 0.04, 0.08], "path": folder.name}

# %%
threading.Timer(3, interrupt_main).start()
try:
    cpnb.compare(recipes, digits, **PLAN, progress=False)
except KeyboardInterrupt:
    kept = cpnb.train.Comparison.load(folder.name).runs
    print(f"stopped; {len(kept)} trainings kept")

# %% [markdown]
# The same call goes on with the next training.
#
# **Predict:** after ten passes over 1,079 small images, who is ahead?

# %%
found = cpnb.compare(recipes, digits, **PLAN)
(100 * found.table()[["test", "test_std"]]).round(2).assign(lr=found.best)

# %%
found.against("none").round(2)

# %% [markdown]
# `mean` is the difference of test accuracy to the plain network in points, paired seed
# by seed, and `mean ± half` its 95 % interval (Student's $t$). When the interval holds
# zero, the two were **not told apart**: the seeds alone may explain it. This is the
# rule of every notebook. On 359 test images one image is 0.28 points. Batch norm is
# ahead; the canonical network has the lowest mean, and is not told apart.
#
# ## 4. All images, to the end
#
# Now the real thing, from records: all training images, ten or twelve passes, the rate
# going down to zero along a cosine, three seeds to tune and five fresh ones. `python
# experiments.py run NAME` makes such a record, or goes on with it.

# %%
SETS = {
    "MNIST, LeNet-5": "mnist-lenet5",
    "Fashion-MNIST, LeNet-5": "fashion-lenet5",
    "CIFAR-10, four convolutions": "cifar10-small",
}
results = read_results("results")
print("no record yet:", *(name for name in EXPERIMENTS if name not in results))

# %%
records = {title: results[name] for title, name in SETS.items() if name in results}
for title, record in records.items():
    runs = record.runs
    where = runs[["device", "processor", "threads", "torch"]].iloc[-1]
    print(f"{title}: {len(runs)} networks, {runs.seconds.sum() / 60:.0f} minutes,")
    state = "not complete" if record.missing() else "complete"
    print(f"  {state}; {', '.join(map(str, where))}, commit {runs.commit.iloc[-1][:7]}")

# %% [markdown]
# **Predict:** the canonical network starts from a fit of the plain one. Does it learn
# as fast? Where does it end?


# %%
def panels(names, measure="validation_accuracy"):
    """Curves of some methods, a panel for each data set."""
    fig, axes = plt.subplots(1, len(records), figsize=(11, 3.6))
    for ax, (title, record) in zip(axes, records.items(), strict=True):
        own = record.final_curves[record.final_curves.recipe.isin(names)]
        plots.plot_training(own, measure, ax)
        means = own.groupby(["recipe", "epoch"])[measure].mean().unstack()
        learned = means[means.iloc[:, -1] > 0.5 * means.max().max()]  # not at chance
        ax.set(title=title, ylim=(learned[3].min() - 0.01, own[measure].max() + 0.005))
        ax.get_legend().remove()
    for ax in axes[1:]:
        ax.set_ylabel("")
    lines, labels = axes[0].get_legend_handles_labels()
    fig.legend(lines, labels, loc="outside lower center", ncols=3)
    plt.show()


# %%
panels(METHODS)

# %% [markdown]
# **Figure:** validation accuracy by epoch, mean ± 1 standard deviation over the fresh
# networks, six methods at their own rates, a panel per data set; batch norm (triangles)
# is ahead from the first pass on, and the canonical network (thick line) ends within
# half a point of the plain one (diamonds) on all three.
#
# On CIFAR-10 the canonical network is ahead of the plain one until both arrive at the
# same place. Scaling has no line where a rate chosen after two passes was too large for
# the longer training: of five networks one diverged on MNIST, all on Fashion-MNIST, and
# on CIFAR-10 they diverged or fell to chance.

# %%
panels(["none", "canonical", "canonical-unified", "oni", "SI+FD"])

# %% [markdown]
# **Figure:** the same for the canonical network from a fit (thick line) and from
# nothing (stars), ONI (pentagons) and SI+FD (plus signs) beside the plain one; ONI
# learns fastest, SI+FD, low rank from a fit, follows the fitted canonical network, and
# the start from nothing ends lowest. (On CIFAR-10 only two were run.)
#
# ## 5. Who ends best, and is it more than chance?


# %%
def dots(ax, record):
    """Test accuracies: a dot per network, the mean with its 95 % interval."""
    finals = record.finals.query("status == 'finished'")
    for place, name in enumerate(reversed(list(RECIPES))):
        values = 100 * finals.test_accuracy[finals.recipe == name]
        if len(values) < 2 or values.mean() < 50:  # chance is off the axis
            continue
        look = plots.METHOD_STYLES[name]
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
        ax.plot(values, [place + 0.25] * len(values), ".", color=look.color, alpha=0.5)
        bar = {"color": look.color, "marker": look.marker, "capsize": 3}
        ax.errorbar(values.mean(), place, xerr=half, **bar)
    ax.set_xlabel("test accuracy, %")


# %%
order = list(reversed(list(RECIPES)))
labels = [plots.METHOD_STYLES[name].label for name in order]
fig, axes = plt.subplots(1, len(records) + 1, figsize=(11, 3.8), sharey=True)
for ax, (title, record) in zip(axes, records.items(), strict=False):
    dots(ax, record)
    ax.set_title(title.replace(", ", "\n"))
axes[0].set_yticks(range(len(order)), labels)
axes[-1].barh(range(len(order)), methods["÷ none"][order], color=plots.GREY)
axes[-1].axvline(1, color=plots.INK, linewidth=1)
axes[-1].set(title="time of a step\n(LeNet-5, section 2)", xlabel="÷ none")
plt.show()

# %% [markdown]
# **Figure:** test accuracies, a dot per network and a bar for the 95 % interval of the
# mean, and on the right the time of a step over that of the plain network; batch norm
# is highest on all three data sets, and ONI takes more than twice the time of none.
#
# | test accuracy, % | batch norm | weight norm | canonical | none |
# |---|---|---|---|---|
# | MNIST | 99.30 | 99.21 | 99.21 | 99.18 |
# | Fashion-MNIST | 91.33 | 90.71 | 90.17 | 90.52 |
# | CIFAR-10 | 75.1 | 72.5 | 69.9 | 69.8 |
#
# A step costs little more for weight norm, and about a third more for the canonical
# network.
#
# The same as differences to weight norm, the method that canonical
# weight normalization extends:

# %%
apart = {title: record.against("weight") for title, record in records.items()}
columns = {}
for title, table in apart.items():
    marks = table.told_apart.map({True: "", False: " ~"})
    words = table["mean"].map("{:+.2f} ± ".format) + table.half.map("{:.2f}".format)
    columns[title] = (words + marks).where(table.n > 1, "diverged")
pd.DataFrame(columns).reindex(RECIPES).drop("weight").fillna("")

# %% [markdown]
# `~`: not told apart from weight norm. On MNIST the canonical network differs from it
# by 0.00 ± 0.02 points; on Fashion-MNIST it is 0.54 ± 0.35 below, on CIFAR-10 2.6 ±
# 1.2. So the paper's claim, that it is competitive, holds on the first of these data
# sets and not on the others.
#
# ## 6. Rates belong to methods
#
# The tuning runs are in the records too: three networks per method and rate, two
# passes. A gap in a line is a rate at which a loss stopped being finite.
#
# **Predict:** if everybody had to use the plain network's best rate, would the order be
# the same?


# %%
def by_rate(record):
    """Mean validation accuracy, a row per method, a column per rate."""
    runs = record.runs.query("phase == 'tune'")
    scores = runs.validation_accuracy.where(runs.status == "finished")
    means = scores.groupby([runs.recipe, runs.lr]).agg(lambda x: x.mean(skipna=False))
    return means.unstack()


# %%
def draw_rates(ax, errors):
    """A line per method over its rates, both axes logarithmic."""
    for name, line in errors.iterrows():
        label, color, marker = plots.METHOD_STYLES[name]
        ax.plot(line.index, line, color=color, marker=marker, label=label)
    ax.set(xscale="log", yscale="log", xlabel="learning rate")
    ax.set_xticks([0.001, 0.01, 0.1], ["0.001", "0.01", "0.1"])
    ax.set_xticks([], minor=True)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9]
    ax.set_yticks(ticks, [f"{share:.0%}" for share in ticks])
    ax.set_yticks([], minor=True)
    ax.set_ylim(0.9 * errors.min().min(), 1.1 * errors.max().max())


# %%
fig, axes = plt.subplots(1, len(records), figsize=(11, 3.6))
for ax, (title, record) in zip(axes, records.items(), strict=True):
    draw_rates(ax, 1 - by_rate(record).loc[METHODS])
    ax.set_title(title)
axes[0].set_ylabel("validation error after two passes")
lines, labels = axes[0].get_legend_handles_labels()
fig.legend(lines, labels, loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# **Figure:** validation error after two passes against the rate, both axes logarithmic,
# a line per method and a panel per data set; five methods have their least error at
# 0.02 to 0.08, conditioned kernels (crosses) only below 0.01.

# %%
for title, record in records.items():
    scores, common = by_rate(record), record.best["none"]
    own = scores.max(axis=1).sort_values(ascending=False)
    same = scores[common].sort_values(ascending=False)
    print(f"{title}: each at its own rate {', '.join(own.index[:3])} lead;")
    print(f"  all at {common:g}, the plain network's: {', '.join(same.index[:3])}.")

# %% [markdown]
# Every chosen rate has a worse one on both sides: where the best was at an end,
# `compare` went on. The plain network, weight norm and the fitted canonical network
# want similar rates, 0.02 to 0.04, which is what the step gauge of notebook 02 is for;
# so at the plain network's rate nearly the same methods lead. Conditioned kernels want
# rates eight to thirty times smaller: with the gain of √2 their rows are 2.4 times as
# long as torch draws them, and at the plain network's rate they stay at or near chance.
#
# ## 7. Beside the paper
#
# The published tables were not available to us. These are figures from the authors'
# *public logs, older than the paper* (arXiv:2206.01509), most of a single run:
#
# | setting | plain | weight norm | canonical |
# |---|---|---|---|
# | MNIST, LeNet, RMSprop, 50 epochs | 99.15 (1 run) | 99.26 (1) | 99.18 ± 0.05 (8) |
# | CIFAR-10, AlexNet, 100 epochs | 83.90 (1) | 83.77 (1) | 84.25 (1) |
#
# Ours, in the first setting but for ten epochs instead of fifty (`power`: the authors'
# canonical form, and variants of it from notebook 05):

# %%
PAPER = ("mnist-lenet-paper", "truncation-mnist-lenet-paper-cpu")
ours = pd.concat([results[name].finals for name in PAPER]).query("epochs == 10")
points = 100 * ours.pivot(index="seed", columns="recipe", values="test_accuracy")
print(points.agg(["mean", "std", "count"]).T.round(2).to_string())
for name in ("none", "weight"):
    print(f"power less {name}: {paired_difference(points['power'], points[name])}")

# %% [markdown]
# **What agrees:** after ten passes the canonical network is told apart from neither the
# plain one nor weight norm; in their logs, after fifty, the three lie within 0.11
# points. **What does not:** on CIFAR-10 their canonical AlexNet is ahead of both; our
# small network is behind weight norm. AlexNet itself wants a GPU.
#
# ## 8. Choose for yourself
#
# The figures above hold what matters; with Python running you can look at any record.


# %%
def draw_curves(figure, record, methods, measure, axis):
    """Draw the curves of some methods, and say how they end."""
    comparison = results[record]
    own = comparison.final_curves
    own = own[own.recipe.isin(methods)]
    if own.empty:
        return "This record has none of these methods."
    ax = figure.subplots()
    plots.plot_training(own, measure, ax, axis=axis)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    rows = comparison.table().query("n > 0")
    ends = rows[rows.index.isin(methods)].itertuples()
    return "; ".join(f"{row.Index} {row.test:.2%} at {row.lr:g}" for row in ends)


# %%
explore(
    draw_curves,
    record=[name for name in SETS.values() if name in results],
    methods=ipywidgets.SelectMultiple(options=[*RECIPES], value=METHODS, rows=9),
    measure=["validation_accuracy", "train_accuracy", "validation_loss", "train_loss"],
    axis=["epoch", "seconds"],
)

# %% [markdown]
# **Figure:** validation accuracy by epoch of six methods on MNIST, as in section 4,
# with menus for record, methods, measure and axis.
#
# ## 9. Exercises
#
# **How many seeds?** Two methods differ by 0.10 points on average, and their paired
# differences have a standard deviation of 0.20 points. How many seeds does it take
# until the interval of section 3 is expected to leave out zero?


# %%
def seeds_needed(mean, std):
    """Smallest n whose 95 % interval around the mean is narrower than the mean."""
    # your code here
    return 2


# %%
def check_seeds(title, function):
    """Compare with what intervals of invented differences say."""
    n = function(0.10, 0.20)
    halves = [stats.t.ppf(0.975, k - 1) * 0.20 / k**0.5 for k in (n - 1, n) if k > 1]
    is_right = len(halves) == 2 and halves[1] < 0.10 <= halves[0]
    print(f"{title}: {n} seeds, {'correct' if is_right else 'not solved yet'}.")


check_seeds("exercise", seeds_needed)


# %% tags=["solution"] jupyter={"source_hidden": true}
def seeds_needed_solution(mean, std):
    """Try one after the other: the quantile depends on n as well."""
    n = 2
    while stats.t.ppf(0.975, n - 1) * std / n**0.5 >= mean:
        n += 1
    return n


check_seeds("exercise, solution", seeds_needed_solution)

# %% [markdown]
# Five seeds tell apart only what is larger than 1.24 standard deviations of the paired
# differences.
#
# **Your own normalizer.** Weight norm gives each *output* of a layer a row of separate
# length. Do it the other way round: every *input* of a layer gets weights of length
# one, in a convolution at each place of the window. Which axis of the kernel does the
# norm run over?


# %%
class UnitInputs(nn.Module):
    """A parametrization: torch calls it in every forward pass."""

    def forward(self, weight):
        """Return the kernel that the layer uses."""
        # your code here
        return weight


# %%
def unit_inputs(network, parametrization=UnitInputs):
    """Register it on every convolution and linear layer."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", parametrization())
    return network


# %%
def check_own(title, normalizer):
    """Check the norms, then compare with the methods of section 3."""
    REGISTRY["unit_inputs"] = normalizer
    recipe = Recipe("own", "DigitsNet", "unit_inputs", settings=recipes[0].settings)
    net = build(recipe, digits, seed=0)
    norms = [layer.weight.norm(dim=0) for layer in (net.conv2, net.fc1)]
    if any((norm - 1).abs().max() > 1e-4 for norm in norms):
        print(f"{title}: not solved yet, the norms are not one.")
        return
    own = cpnb.compare([recipe], digits, **PLAN | {"path": None}, progress=False)
    row = own.table().loc["own"]
    print(f"{title}: correct. Test accuracy {row.test:.2%}, rate {row.lr:g}.")


check_own("exercise", unit_inputs)


# %% tags=["solution"] jupyter={"source_hidden": true}
class UnitInputsSolution(nn.Module):
    """Output channels are the first axis, in both kinds of layer."""

    def forward(self, weight):
        """Return the kernel that the layer uses."""
        return weight / weight.norm(dim=0, keepdim=True)


def unit_inputs_solution(network):
    """Register the solution."""
    return unit_inputs(network, UnitInputsSolution)


check_own("exercise, solution", unit_inputs_solution)

# %% [markdown]
# ## What was not shown
#
# - *Large networks on a GPU*: AlexNet on CIFAR-10, ResNets. They are defined, and
#   `python experiments.py gpu --minutes 10` runs them in order of importance;
#   `--dry-run` says how long the whole list takes.
# - *Weight decay*: none here, but for what Frobenius decay is (μ = 0.0001).
# - *Options of the methods*: each has its defaults, see `cpnb.normalize`.
#
# ## The answer
#
# - **Which method ends best?** Batch norm has the highest mean on all three: 91.3 % on
#   Fashion-MNIST (ONI's 91.0 is not told apart) and 75.1 % on CIFAR-10, told apart from
#   weight norm (90.7 and 72.5); on MNIST its 99.30 % is not told apart from weight
#   norm's 99.21.
# - **And the canonical network?** 99.21 % on MNIST, not told apart from weight norm;
#   0.5 points below it on Fashion-MNIST (0.4 below the plain network, told apart) and
#   2.6 on CIFAR-10, not told apart from the plain one. From a unified start it is
#   behind: 98.8 % on MNIST.
# - **Is it more than chance?** Five seeds, paired (scaling: those that did not
#   diverge): the table of section 5 says it for each. **At which rate?** Its own, tuned
#   on validation images, none at an edge.
# - **On which device, and how long is a step?** One thread of a CPU; section 2 has the
#   milliseconds.
#
# **Next:** `05_truncation` takes components away from a trained network.
#
# **References.** L. Veeramacheneni, M. Wolter, R. Klein, J. Garcke, *Canonical
# convolutional neural networks*, 2022, arXiv:2206.01509. S. Ioffe, C. Szegedy, *Batch
# normalization*, 2015, arXiv:1502.03167. T. Salimans, D. Kingma, *Weight
# normalization*, 2016, arXiv:1602.07868. Q. Yuan, N. Xiao, *Scaling-based weight
# normalization*, 2019, doi:10.1109/ACCESS.2018.2890373 (re-derived from its abstract).
# L. Huang et al., *Controllable orthogonalization*, 2020, arXiv:2004.00917.
# H. Saratchandran, T. Wang, S. Lucey, *Weight conditioning for smooth optimization*,
# 2024, arXiv:2409.03424. M. Khodak, N. Tenenholtz, L. Mackey, N. Fusi, *Initialization
# and regularization of factorized neural layers*, 2021, arXiv:2105.01029. Y. LeCun,
# L. Bottou, Y. Bengio, P. Haffner, 1998, doi:10.1109/5.726791 (LeNet-5, MNIST).
# H. Xiao, K. Rasul, R. Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747.
# A. Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
