# %% [markdown]
# # When is a low-rank layer really faster?
#
# A truncated layer has fewer parameters and needs fewer multiplications. Is it faster?
# The most frequent question about factorised layers is "why is it slower?". This
# notebook measures two ceilings of the machine it runs on, predicts from them at which
# rank a layer becomes faster than the dense one, and checks the prediction.
#
# **After this notebook you can**
#
# 1. say why half of the multiplications need not be half of the time;
# 2. predict from two numbers of a machine at which rank a layer pays;
# 3. choose between rebuilding the kernel and running through the components, and hand a
#    network to another runtime.
#
# **You need** `02_canonical_weight_normalization`; `05_truncation` for the ranks.
#
# **Time, measured on two CPU cores:** 0.2 minutes; fast mode 0.2.

# %%
import io
import statistics
import time
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

import cpnb
from cpnb.explore import cost_table, explore, plots, to_chain
from cpnb.train import fast_mode

# %%
plots.use_style()
torch.set_num_threads(1)
FAST = fast_mode()
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"{'fast' if FAST else 'full'} mode, on {device}, one thread on a CPU")
print("All times are of this machine; yours has others, and other crossings.")

# %% [markdown]
# ## 1. Two ceilings
#
# A layer can be limited by how fast the machine multiplies, or by how fast it moves
# numbers. Measure both: the largest rate of a matrix product, $F$, and of a copy, $B$.


# %%
def milliseconds(call, turns=15):
    """Median time of a call; reading a number back waits for a GPU."""
    taken = []
    for _ in range(turns + 3):
        begin = time.perf_counter()
        call().flatten()[:1].cpu()
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[3:])


square = torch.randn(1024, 1024, device=device)
flops = 2 * 1024**3 / milliseconds(lambda: square @ square) * 1000
block = torch.randn(8, 1024, 1024, device=device)
bandwidth = 2 * block.nbytes / milliseconds(block.clone) * 1000
print(f"F = {flops / 1e9:.0f} GFLOP/s, B = {bandwidth / 1e9:.0f} GB/s")
print(f"moving one number (4 bytes) takes as long as {4 * flops / bandwidth:.0f} FLOP")

# %% [markdown]
# ## 2. Three ways to compute one layer
#
# A convolution from $I$ to $O$ channels with a $K\times K$ window at $N$ output
# positions (images × height × width):
#
# | way | multiplications | what it moves besides |
# |---|---|---|
# | dense | $N\,O I K^2$ | – |
# | rebuilt | $N\,O I K^2 + R\,O I K^2$ | the kernel, once a batch |
# | chain, 1×1 → depthwise → 1×1 | $N\,R\,(I + K^2 + O)$ | $N R$ numbers, twice |
#
# So **two ratios** decide. $R/R_\text{same}$ says how much work the chain has against
# the dense layer, and $R/N$ how much the rebuilding is beside the convolution: with $N$
# in the tens of thousands it is nothing.
#
# **Predict:** at a quarter of $R_\text{same}$ the chain has a quarter of the
# multiplications. What share of the time will it take?

# %%
layer = cpnb.CPConv2d(64, 64, 3, padding=1, rank=0.25, device=device)
images = torch.randn(16, 64, 32, 32, device=device)
images = images.contiguous(memory_format=torch.channels_last)
dense = cpnb.to_dense(layer).to(memory_format=torch.channels_last)


def ways(layer, dense, images):
    """Milliseconds of an inference in each of the three ways."""
    times = {"dense": milliseconds(lambda: dense(images))}
    for name, mode in (("rebuilt", "dense"), ("chain", "chain")):
        layer.forward_mode = mode
        times[name] = milliseconds(lambda: layer(images))
    return times


with torch.no_grad():
    times = ways(layer, dense, images)
print({name: f"{value:.1f} ms" for name, value in times.items()})
print(f"the chain: {times['chain'] / times['dense']:.2f} of the time")

# %% [markdown]
# The depthwise stage in the middle has $K^2 = 9$ multiplications for every number that
# it reads and writes: it waits for memory. Two products of full speed and one stage at
# the speed of a copy, four times over (write, read, write, read):
#
# $$t_\text{chain} \approx N R \Bigl(\frac{2(I+O)}{F} + \frac{16\ \text{bytes}}{B}
# \Bigr),\qquad t_\text{dense} \approx \frac{2 N O I K^2}{F} .$$
#
# ## 3. Predict the crossing, then measure it
#
# Setting both equal gives the rank at which the chain stops being faster:
#
# $$R_\text{cross} = \frac{2\,O I K^2 / F}{2(I+O)/F + 16/B} .$$
#
# **Predict:** is it larger or smaller than $R_\text{same}$? Does it depend on the size
# of the images?

# %%
CASES = {
    "64→64, 32×32": (64, 64, 32, 8),
    "64→64, 8×8": (64, 64, 8, 64),
    "128→256, 8×8": (128, 256, 8, 32),
}
SHARES = [0.1, 0.25, 0.5, 0.75, 1.0] if FAST else [0.06, 0.12, 0.25, 0.4, 0.6, 0.8, 1.0]


def crossing(channels, out):
    """Rank at which chain and dense layer take as long, by the formula."""
    work = 2 * channels * out * 9 / flops
    return work / (2 * (channels + out) / flops + 16 / bandwidth)


@torch.no_grad()
def measured(channels, out, size, batch):
    """Times over the dense layer's, at shares of the break-even rank."""
    images = torch.randn(batch, channels, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    rows = {}
    for share in SHARES:
        layer = cpnb.CPConv2d(channels, out, 3, padding=1, rank=share, device=device)
        dense = cpnb.to_dense(layer).to(memory_format=torch.channels_last)
        times = ways(layer, dense, images)
        rows[share] = {n: times[n] / times["dense"] for n in ("rebuilt", "chain")}
    return pd.DataFrame(rows).T


tables = {name: measured(*case) for name, case in CASES.items()}

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for ax, (name, table) in zip(axes, tables.items(), strict=True):
    channels, out, *_ = CASES[name]
    even = cpnb.cp.break_even_rank((out, channels, 3, 3))
    cross = crossing(channels, out) / even
    ax.plot(table.index, table.rebuilt, "s-", color=plots.VERMILION, label="rebuilt")
    ax.plot(table.index, table.chain, "o-", color=plots.BLUE, label="chain")
    ax.plot([0, 1], [0, 1 / cross], ":", color=plots.BLUE, label="chain, predicted")
    ax.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1, label="its multiplications")
    ax.axhline(1, color=plots.INK, linewidth=1)
    ax.set(xlabel="R ÷ R_same", title=f"{name}: crossing predicted at {cross:.2f}")
    ax.set_ylim(0, 3)
axes[0].set_ylabel("time ÷ dense")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %%
for name, table in tables.items():
    faster = table.index[table.chain < 1]
    says = f"up to {faster.max():g}" if len(faster) else "at no rank tried"
    extra = table.rebuilt.iloc[-1]
    channels, out, *_ = CASES[name]
    even = cpnb.cp.break_even_rank((out, channels, 3, 3))
    cross = crossing(channels, out) / even
    print(f"{name}: crossing predicted at {cross:.2f} of R_same,")
    print(f"  the chain is faster {says}; rebuilt at R_same {extra:.2f} of dense")

# %% [markdown]
# **What to see** (on the processor of these outputs): the formula puts the crossing at
# 0.44 of $R_\text{same}$ for 64 channels, whatever the size of the images, and at 0.7
# for 128→256. Measured, the chain wins up to 0.25, 0.4 and 0.6 and loses at the next
# rank tried; in the first case it becomes slower still where its $N R$ numbers no
# longer fit the cache, which the formula does not know. The thin line, its share of the
# multiplications, lies far below: what is missing is the stage that waits for memory.
# Rebuilding is cheap where there are many
# positions (8,192: a seventh more at most) and doubles the time where there are few
# (2,048, with a large kernel).
#
# ## 4. Why one depthwise stage and not two
#
# The window is itself an outer product $c_r \circ d_r$, so that the textbook chain has
# *four* stages: 1×1, a column, a row, 1×1. That saves $K^2 - 2K = 3$ multiplications of
# nine, and adds one more pass over $R$ numbers per position. Which wins?


# %%
def four_stages(layer):
    """The chain with the window taken apart."""
    first, _, last = to_chain(layer)
    *_, column, row = layer.components()[1]
    rank, how = layer.rank, {"groups": layer.rank, "bias": False, "device": device}
    down = nn.Conv2d(rank, rank, (3, 1), padding=(1, 0), **how)
    right = nn.Conv2d(rank, rank, (1, 3), padding=(0, 1), **how)
    lam = layer.components()[0]
    with torch.no_grad():
        down.weight.copy_((column * lam).T[:, None, :, None])
        right.weight.copy_(row.T[:, None, None])
    return nn.Sequential(first, down, right, last)


with torch.no_grad():
    three, four = to_chain(layer), four_stages(layer)
    torch.testing.assert_close(three(images), four(images), rtol=1e-3, atol=1e-4)
    both = [milliseconds(lambda net=net: net(images)) for net in (three, four)]
print("three stages {:.1f} ms, four {:.1f} ms".format(*both), end=", ")
print(f"{both[1] / both[0]:.2f} times as long")

# %% [markdown]
# Neither: the multiplications saved and the pass added weigh the same here, as both
# chains wait for memory. But in training a forward keeps $N R$ numbers at every stage
# for the backward, at two stages in the merged chain and at three in the other.
#
# ## 5. A whole network, and what training keeps
#
# `cost_table` puts all of this into one table: for each layer parameters, FLOPs, bytes
# that a forward keeps for the backward, and times. Here for the paper's LeNet at a
# quarter of the break-even ranks, 64 images.

# %%
lenet = cpnb.canonicalize(cpnb.LeNet(), rank=0.25, init="unified").to(device)
costs = cost_table(lenet, (64, 1, 28, 28), turns=5 if FAST else 15)
costs.filter(regex="parameters|break_even|ms_").round(2)

# %%
kept = costs.filter(like="kept_bytes").sum() / 2**20
work = costs.filter(like="flops").sum() / 1e9
taken = costs.filter(like="ms_").sum()
pd.DataFrame(
    {"MiB kept": kept.to_numpy(), "GFLOP": work.to_numpy(), "ms": taken.to_numpy()},
    ["dense", "rebuilt", "chain"],
).round(2)

# %% [markdown]
# **What to see:** as a chain the network has a quarter of the multiplications and keeps
# three times the bytes, $R$ numbers per position at two stages. Not every layer gains:
# `conv1`, with a single input channel, is slower as a chain, and `fc1` is faster by a
# factor of three, because a linear layer has no window. So `"auto"`, the default of
# every layer, decides layer by layer.
#
# ## 6. Another runtime
#
# A chain is made of stock layers, so every exporter takes it. onnxruntime, at half of
# the break-even rank, in our first case:


# %%
@torch.no_grad()
def in_onnxruntime(module, images):
    """Milliseconds in onnxruntime, one thread, and the outputs."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # it calls itself the old exporter
        torch.onnx.export(module.cpu(), (images.cpu(),), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    (outputs,) = session.run(None, feed)
    return milliseconds(lambda: torch.from_numpy(session.run(None, feed)[0])), outputs


half = cpnb.CPConv2d(64, 64, 3, padding=1, rank=0.5, device=device)
plain, chain = cpnb.to_dense(half), to_chain(half)
results = [in_onnxruntime(module, images) for module in (plain, chain)]
gap = abs(results[0][1] - results[1][1]).max()
print(f"dense {results[0][0]:.1f} ms, chain {results[1][0]:.1f} ms, ", end="")
print(f"largest difference of the outputs {gap:.1e}")

# %% [markdown]
# The outputs agree to rounding. At half of the break-even rank the chain is no faster
# there either: it is past the crossing of section 3.
#
# ## 7. Slide the rank
#
# The static figure of section 3 holds the measured points. With a kernel: choose a case
# and a rank, and see predicted and measured times of *this* machine.


# %%
@torch.no_grad()
def draw(figure, case, share):
    """Measure one rank of a case, beside the prediction."""
    channels, out, size, batch = CASES[case]
    layer = cpnb.CPConv2d(channels, out, 3, padding=1, rank=share, device=device)
    images = torch.randn(batch, channels, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    times = ways(layer, cpnb.to_dense(layer), images)
    positions = batch * size * size
    guess = positions * layer.rank * (2 * (channels + out) / flops + 16 / bandwidth)
    times["chain, predicted"] = 1000 * guess
    ax = figure.subplots()
    ax.barh([*times], [*times.values()], color=plots.BLUE)
    ax.set_xlabel("milliseconds")
    words = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
    return f"rank {layer.rank}: {words}"


explore(draw, case=[*CASES], share=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0])

# %% [markdown]
# ## 8. Exercise: at which channel count does it pay?
#
# For square layers, $I = O = C$ with a 3×3 window, at half of $R_\text{same}$: from how
# many channels on is the chain faster than the dense layer, by the formula and the two
# ceilings of this machine?


# %%
def smallest_width(flops, bandwidth):
    """Smallest C at which R_cross is at least half of R_same."""
    # your code here
    return None


def check_width(title, width):
    """Compare with the formula on both sides of the answer."""
    if width is None:
        return f"{title}: not solved yet"
    pays = [
        crossing(c, c) >= 0.5 * cpnb.cp.break_even_rank((c, c, 3, 3))
        for c in (width - 1, width)
    ]
    return f"{title}: {width}, {'correct' if pays == [False, True] else 'not yet'}"


print(check_width("exercise", smallest_width(flops, bandwidth)))


# %% tags=["solution"] jupyter={"source_hidden": true}
def smallest_width_solution(flops, bandwidth):
    """Try one width after the other: rounding makes a closed form awkward."""
    width = 2
    while crossing(width, width) < 0.5 * cpnb.cp.break_even_rank((width, width, 3, 3)):
        width += 1
    return width


print(check_width("exercise, solution", smallest_width_solution(flops, bandwidth)))

# %% [markdown]
# ## What was not shown
#
# - *Training steps*: the copy term counts about five times, as every stage is read
#   again on the way back; the chain pays at lower ranks only.
# - *More threads, half precision*: other ceilings, the same formula.
# - *Linear layers*: no window and no depthwise stage; they follow their
#   multiplications.
#
# ## The answer
#
# A low-rank layer is faster where its rank is below $R_\text{cross}$, not below
# $R_\text{same}$: on this processor below 0.44 of it for 64 channels, 0.7 for 128→256.
# Between the two ranks it saves parameters and multiplications, and costs time; there
# `to_dense` is the faster form of the same network. The chain also pays in memory:
# three times the bytes for LeNet. Two numbers of a machine, $F$ and $B$, predict all
# of this.
#
# **Next:** `07_factorized_layers`, low-rank layers and what decay does to them.
#
# **References.** S. Williams, A. Waterman, D. Patterson, *Roofline: an insightful
# visual performance model for multicore architectures*, 2009,
# doi:10.1145/1498765.1498785. L. Veeramacheneni, M. Wolter, R. Klein, J. Garcke,
# *Canonical convolutional neural networks*, 2022, arXiv:2206.01509.

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
