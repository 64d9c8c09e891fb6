# %% [markdown]
# # When is a low-rank layer really faster?
#
# A truncated layer has fewer parameters and needs fewer multiplications. Is it faster?
# A frequent question about factorised layers is "why is it slower?". This
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
import os
import statistics
import subprocess
import sys
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
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
# numbers. Measure both: $F$, the rate of a large matrix product, and $B$, that of a
# copy. (FLOP: one multiplication or addition.)


# %%
def milliseconds(call, turns=15):
    """Median time of a call; reading a number back waits for a GPU."""
    taken = []
    for _ in range(turns + 3):
        begin = time.perf_counter()
        call().flatten()[:1].cpu()
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[3:])


# %%
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
# So **two ratios** decide. $R/R_\text{same}$, the rank over the *break-even* rank of
# equal parameters, says how much work the chain has against the dense layer, and $R/N$
# how much the rebuilding is beside the convolution: with $N$ in the tens of thousands
# it is nothing.
#
# **Predict:** at a quarter of $R_\text{same}$ the chain has a quarter of the
# multiplications. What share of the time will it take?

# %%
layer = cpnb.CPConv2d(64, 64, 3, padding=1, rank=0.25, device=device)
images = torch.randn(16, 64, 32, 32, device=device)
images = images.contiguous(memory_format=torch.channels_last)
dense = cpnb.to_dense(layer).to(memory_format=torch.channels_last)


# %%
@torch.no_grad()
def ways(layer, dense, images):
    """Milliseconds of an inference in each of the three ways."""
    times = {"dense": milliseconds(lambda: dense(images))}
    for name, mode in (("rebuilt", "dense"), ("chain", "chain")):
        layer.forward_mode = mode
        times[name] = milliseconds(lambda: layer(images))
    return times


# %%
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


def crossing(channels, out, bandwidth=bandwidth):
    """R_cross over R_same, by the formula."""
    copy = 16 / bandwidth
    rank = 2 * channels * out * 9 / flops / (2 * (channels + out) / flops + copy)
    return rank / cpnb.cp.break_even_rank((out, channels, 3, 3))


# %%
def measured(channels, out, size, batch, share):
    """Times in the three ways at a share of the break-even rank, and the rank."""
    images = torch.randn(batch, channels, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    layer = cpnb.CPConv2d(channels, out, 3, padding=1, rank=share, device=device)
    dense = cpnb.to_dense(layer).to(memory_format=torch.channels_last)
    return ways(layer, dense, images), layer.rank


tables = {}
for name, case in CASES.items():
    times = pd.DataFrame({share: measured(*case, share)[0] for share in SHARES}).T
    tables[name] = times.div(times.dense, axis=0)[["rebuilt", "chain"]]

# %%
look = {"color": [plots.VERMILION, plots.BLUE], "style": ["s-", "o-"]}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for ax, (name, table) in zip(axes, tables.items(), strict=True):
    table.plot(ax=ax, legend=False, ylim=(0, 3), xlabel="R ÷ R_same", **look)
    line = [0, 1 / crossing(*CASES[name][:2])]
    ax.plot([0, 1], line, ":", color=plots.GREEN, label="chain, predicted")
    ax.plot([0, 1], [0, 1], "--", color=plots.GREY, label="chain, multiplications")
    ax.axhline(1, color=plots.INK, linewidth=1)
    ax.set(title=name, ylabel="time ÷ dense")
fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# **Figure:** time over that of the dense layer against rank over $R_\text{same}$ in
# three panels, one per case; the measured chain (discs) starts far below the solid line
# of equal times and crosses it before $R_\text{same}$, while its multiplications
# (dashed) reach it only there.
#
# The same in numbers; *measured* is where the chain's curve crosses 1:

# %%
rows = {}
for name, (channels, out, size, batch) in CASES.items():
    chain = tables[name].chain.cummax()  # np.interp wants rising numbers
    rows[name] = {
        "positions": batch * size**2,
        "predicted": crossing(channels, out),
        "measured": np.interp(1, chain, chain.index),
        "rebuilt at R_same": tables[name].rebuilt[1.0],
    }
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# On the processor of these outputs the formula puts the crossing at about 0.45 of
# $R_\text{same}$ for 64 channels, whatever the size of the images, and at 0.7 for
# 128→256. The measured ones lie between 0.3 and 0.7, and that of 128→256 is the
# largest, as predicted. On 32×32 images the chain is far slower near $R_\text{same}$
# than two ceilings can explain: the next cell looks for a third. Rebuilding costs
# little where there are many positions (8,192), and about doubles the time where there
# are few beside a large kernel (2,048).

# %%
code = """
import time, torch, cpnb
torch.set_num_threads(1)
chain = cpnb.CPConv2d(64, 64, 3, padding=1, rank=137, forward_mode="chain")
images = torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last)
with torch.inference_mode():
    times = [(time.perf_counter(), chain(images))[0] for _ in range(41)]
print(f"{1000 * (times[-1] - times[1]) / 39:.1f} ms")
"""

# %%
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}
for title, more in (("as installed", {}), ("memory kept", KEPT)):
    command = [sys.executable, "-c", code]
    print(title, subprocess.check_output(command, env=os.environ | more, text=True))

# %% [markdown]
# The third ceiling is the C library. On Linux it gives large tensors back to the
# system, which hands out zeroed pages at the next call; a chain makes three large
# tensors where the dense layer makes one. With two environment variables glibc keeps
# the memory, and the chain takes less than half of the time here.
#
# ## 4. Why one depthwise stage and not two
#
# The window is itself an outer product $c_r \circ d_r$, so that the textbook chain has
# *four* stages: 1×1, a column, a row, 1×1. That saves $K^2 - 2K = 3$ multiplications of
# nine, and adds one more pass over $R$ numbers per position.
#
# **Predict:** which wins?


# %%
def four_stages(layer):
    """The chain with the window taken apart."""
    first, _, last = to_chain(layer)
    lam, (*_, column, row) = layer.components()
    how = {"groups": layer.rank, "bias": False, "device": device}
    down = nn.Conv2d(layer.rank, layer.rank, (3, 1), padding=(1, 0), **how)
    right = nn.Conv2d(layer.rank, layer.rank, (1, 3), padding=(0, 1), **how)
    down.weight.data = (column * lam).T[:, None, :, None].contiguous()
    right.weight.data = row.T[:, None, None].contiguous()
    return nn.Sequential(first, down, right, last)


# %%
with torch.no_grad():
    three, four = to_chain(layer), four_stages(layer)
    torch.testing.assert_close(three(images), four(images), rtol=1e-3, atol=1e-4)
    both = [milliseconds(lambda net=net: net(images)) for net in (three, four)]
print("three stages {:.1f} ms, four {:.1f} ms".format(*both))

# %% [markdown]
# Three stages, by about a tenth here: the pass added weighs more than the
# multiplications saved. The shorter chain, the library's, also keeps one stage less for
# a backward pass.
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
units = {"MiB": ("kept_bytes_", 2**20), "GFLOP": ("flops_", 1e9), "ms": ("ms_", 1)}
totals = {n: costs.filter(like=like).sum() / unit for n, (like, unit) in units.items()}
ways_of = ["dense", "rebuilt", "chain"]
table = pd.DataFrame({n: t.to_numpy() for n, t in totals.items()}, ways_of)
share = table.loc["chain"] / table.loc["dense"]
assert 2.8 < share["MiB"] < 3 and 0.25 < share["GFLOP"] < 0.3
table.round(2)

# %% [markdown]
# As a chain the network has 0.27 of the multiplications and keeps 2.9 times the bytes
# for a backward pass, $R$ numbers per position at two stages. `fc1` is about three
# times as fast, because a linear layer has no window; `conv1`, with a single input
# channel, and `conv2`, probably at the third ceiling, are slower. So `"auto"`, the
# default of every layer, decides layer by layer: a linear layer is a chain up to
# $R_\text{same}$, a convolution below half of it.
#
# ## 6. Another runtime
#
# A chain is made of stock layers, so every exporter takes it. onnxruntime, at half of
# the break-even rank, in our first case:


# %%
@torch.no_grad()
def exported(module, images):
    """A session of onnxruntime on one thread, and the name of its input."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # it calls itself the old exporter
        torch.onnx.export(module.cpu(), (images.cpu(),), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return session, session.get_inputs()[0].name


def run(session, name):
    """Outputs for the images of section 2."""
    return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])


# %%
half = cpnb.CPConv2d(64, 64, 3, padding=1, rank=0.5, device=device)
forms = {"dense": cpnb.to_dense(half), "chain": to_chain(half)}
sessions = {name: exported(form, images) for name, form in forms.items()}
torch.testing.assert_close(*(run(*each) for each in sessions.values()))
times = [milliseconds(lambda each=each: run(*each)) for each in sessions.values()]
print("dense {:.1f} ms, chain {:.1f} ms".format(*times))

# %% [markdown]
# The outputs agree to rounding. At half of the break-even rank the chain is slower
# there, too: it is past the crossing of section 3.
#
# ## 7. Slide the rank
#
# With a running kernel: choose a case and a rank, and see predicted and measured times
# of *this* machine.


# %%
def draw(figure, case, share):
    """Measure one rank of a case, beside the prediction."""
    times, rank = measured(*CASES[case], share)
    times["chain, predicted"] = times["dense"] * share / crossing(*CASES[case][:2])
    ax = figure.subplots()
    ax.barh([*times], [*times.values()], color=plots.BLUE)
    ax.set_xlabel("milliseconds")
    words = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
    return f"rank {rank}: {words}"


explore(draw, case=[*CASES], share=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0])

# %% [markdown]
# **Figure:** four horizontal bars, the milliseconds of the dense layer, the rebuilt
# one, the chain, and the chain as predicted, for 64→64 channels on 32×32 images at 0.05
# of $R_\text{same}$, where the chain is the fastest of the three.
#
# ## 8. Exercises
#
# For square layers, $I = O = C$ with a 3×3 window, by the formula and the ceilings of
# this machine.
#
# **Exercise 1.** At half of $R_\text{same}$: from how many channels on is the chain
# faster than the dense layer?


# %%
def smallest_width():
    """Smallest C at which R_cross is at least half of R_same."""
    return None  # your code; use crossing(C, C)


def check_width(title, width):
    """Compare with the formula on both sides of the answer."""
    if width is None:
        return f"{title}: not solved yet"
    right = crossing(width - 1, width - 1) < 0.5 <= crossing(width, width)
    return f"{title}: {width}, {'correct' if right else 'not yet'}"


print(check_width("exercise 1", smallest_width()))


# %% tags=["solution"] jupyter={"source_hidden": true}
def smallest_width_solution():
    """Try one width after the other: rounding makes a closed form awkward."""
    width = 2
    while crossing(width, width) < 0.5:
        width += 1
    return width


print(check_width("exercise 1, solution", smallest_width_solution()))

# %% [markdown]
# **Exercise 2.** How many times the bandwidth $B$ would this machine need, at the same
# $F$, for the chain of 64 channels to pay up to $R_\text{same}$?


# %%
def needed_bandwidth(channels):
    """Bandwidth at which R_cross is R_same."""
    return None  # your code


def check_bandwidth(title, needed):
    """Put it into the formula."""
    if needed is None:
        return f"{title}: not solved yet"
    right = abs(crossing(64, 64, needed) - 1) < 1e-6
    return f"{title}: {needed / bandwidth:.0f} × B, {'correct' if right else 'not yet'}"


print(check_bandwidth("exercise 2", needed_bandwidth(64)))


# %% tags=["solution"] jupyter={"source_hidden": true}
def needed_bandwidth_solution(channels):
    """What the dense layer's work leaves beside that of the two products."""
    rank = cpnb.cp.break_even_rank((channels, channels, 3, 3))
    spare = 2 * channels**2 * 9 / rank - 2 * (channels + channels)
    return 16 * flops / spare


print(check_bandwidth("exercise 2, solution", needed_bandwidth_solution(64)))

# %% [markdown]
# ## What was not shown
#
# - *Training steps*, which read every stage again on the way back; *more threads* and
#   *half precision*, which have other ceilings.
# - *Linear layers* by themselves: no window and no depthwise stage.
#
# ## The answer
#
# A low-rank layer is faster where its rank is below $R_\text{cross}$, not below
# $R_\text{same}$: on this processor, by the formula, below about 0.45 of it for 64
# channels and 0.7 for 128→256. Between the two ranks it saves parameters and
# multiplications, and costs time; there `to_dense` is the faster form of the same
# network. Measured crossings lay between 0.3 and 0.7, the widest layer's last: the
# formula gives the order, not the number. The chain also costs memory: 2.9 times the
# bytes for LeNet. Two numbers of a machine, $F$ and $B$, say that the crossing comes
# early and that wider layers cross later.
#
# **Next:** `07_factorized_layers`, low-rank layers and what decay does to them.
#
# **References.** S. Williams, A. Waterman, D. Patterson, *Roofline: an insightful
# visual performance model for multicore architectures*, 2009,
# doi:10.1145/1498765.1498785. L. Veeramacheneni, M. Wolter, R. Klein, J. Garcke,
# *Canonical convolutional neural networks*, 2022, arXiv:2206.01509.

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
