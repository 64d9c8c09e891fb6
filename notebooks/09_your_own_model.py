# %% [markdown]
# # How do I compress a network of my own?
#
# Take a network that this package has never seen, trained with a loop of your own. This
# notebook puts it into canonical form, finds out which layers can be cut, cuts it under
# a budget, trains it on, and hands it over: as a file that needs no class of yours, and
# as a page with sliders for a colleague. **What does that cost in accuracy, and is it
# better than to train a small network in the first place?**
#
# **After this notebook you can**
#
# 1. do all of this with about twenty lines;
# 2. say what of your network is converted and what is left alone;
# 3. compare a compressed network with the honest rival of the same size.
#
# **You need** `00_tour`; the notebooks before this one explain each step.
#
# **Time, measured on two CPU cores:** 1.9 minutes; fast mode 0.9.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import cpnb
from cpnb.explore import RankSweep, cost_table, to_chain
from cpnb.methods import fit_rank
from cpnb.train import fast_mode, paired_difference, param_groups
from networks import SmallConvNet

# %%
torch.set_num_threads(1)  # small tensors: a second thread mostly waits for the first
FAST = fast_mode()
EPOCHS, AGAIN = (6, 2) if FAST else (20, 8)
SEEDS = range(2 if FAST else 5)
data = cpnb.load_data("digits")
images, labels = data.train.standardized(), data.train.labels
print(f"{'fast' if FAST else 'full'} mode, n = {len(SEEDS)} networks")

# %% [markdown]
# ## 1. A network of yours
#
# A small residual network with batch norm, and a plain training loop, which know of
# this package in one place only.


# %%
class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        """Map ``(n, channels, h, w)`` to the same shape."""
        branch = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(branch))).relu()


def my_network(channels=32):
    """A stem, two blocks with a pool between them, and a linear layer."""
    stem = nn.Conv2d(1, channels, 3, padding=1)
    body = Block(channels), nn.MaxPool2d(2), Block(channels), nn.MaxPool2d(2)
    return nn.Sequential(stem, *body, nn.Flatten(), nn.Linear(4 * channels, 10))


# %%
def train(net, epochs, lr, seed):
    """A plain loop: SGD with momentum, the rate going down to zero."""
    torch.manual_seed(seed)
    groups = param_groups(net, 1e-4)  # spares σ, λ, biases and norms
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


# %%
def trained(seed, channels=32, epochs=EPOCHS):
    """A network of yours, trained."""
    torch.manual_seed(seed)
    return train(my_network(channels), epochs, 0.05, seed)


nets = [trained(seed) for seed in SEEDS]
net = nets[0]
print("validation accuracy:", *(f"{cpnb.accuracy(net, data):.1%}" for net in nets))

# %% [markdown]
# (`param_groups` is that place: it keeps weight decay off what should not shrink.
# Without decay no loop needs to be changed.)
#
# ## 2. Look
#
# Where are the parameters, and where does the time go? `break_even` is the rank at
# which a layer in CP form holds as many parameters as the dense one.

# %%
costs = cost_table(net, (64, 1, 8, 8), turns=9)
costs[["parameters", "break_even", "flops_dense", "ms_dense"]].round(3)

# %% [markdown]
# ## 3. Into canonical form
#
# **Predict:** at the break-even rank a fit cannot hold every kernel exactly. Does the
# accuracy notice?

# %%
rows = {}
for name, rank in (("same", "same"), ("error ≤ 0.1", fit_rank(0.1, method="als"))):
    form = cpnb.canonicalize(net, rank=rank, init="als", progress=False)
    size = sum(p.numel() for p in form.parameters())
    rows[name] = [size, cpnb.accuracy(net, data), cpnb.accuracy(form, data)]
columns = ["parameters", "accuracy before", "as converted"]
pd.DataFrame(rows, columns).T.round(4)

# %% [markdown]
# At the break-even rank the network of seed 0 loses two of the 359 validation images. A
# rank for each layer that keeps its error below 0.1 holds *fewer* parameters, because
# trained kernels differ, and loses one. Training for a few epochs, below, brings that
# back.
#
# What cannot be converted exactly is refused with the layer's name and the reason, such
# as hooks, tied weights, or a subclass of `nn.Linear`; `skip=` leaves it alone. The
# output layer of `nn.MultiheadAttention` is such a subclass: `skip=lambda name, _:
# name.endswith("out_proj")`. Layers of other kinds, such as batch norm, stay as they
# are.
#
# ## 4. Sweep, spend a budget, cut, train on
#
# This is the whole of it. The fit is by ALS, which is the closest; its components
# cannot be cut as they are (`01_cp_decomposition`), so they are first trained, then
# dropped greedily with the λ of the others re-solved (`05_truncation`):


# %%
def compressed(net, budget, seed):
    """A network with a share of the parameters, the one it is cut from, its sweep."""
    form = cpnb.canonicalize(net, init="als", progress=False)
    train(form, AGAIN, 0.02, seed)  # lets the components settle
    sweep = cpnb.rank_sweep(form, data, key="greedy", refit=True, progress=False)
    choice = cpnb.allocate_ranks(sweep, int(budget * sweep.dense_parameters))
    cut = cpnb.truncate(form, rank=choice.ranks, key="greedy", refit=True)
    return train(cut, AGAIN, 0.02, seed), form, sweep


BUDGET = 0.25
made = [compressed(net, BUDGET, seed) for seed, net in zip(SEEDS, nets, strict=True)]
small, form, sweep = made[0]
print(f"seed 0 in canonical form, trained on: {cpnb.accuracy(form, data):.1%}")
print({name: layer.rank for name, layer in cpnb.cp_layers(small).items()})

# %% [markdown]
# ## 5. The honest rival
#
# A network with no more parameters can also be made by being narrow, and trained for as
# long as all of the above together.
#
# **Predict:** which is better on the test images, a wide network that was cut or a
# narrow one?

# %%
size = sum(p.numel() for p in small.parameters())
widths = {c: sum(p.numel() for p in my_network(c).parameters()) for c in range(4, 33)}
width = max(c for c, count in widths.items() if count <= size)
rivals = [trained(seed, width, EPOCHS + 2 * AGAIN) for seed in SEEDS]
groups = {"dense": nets, "compressed": [cut for cut, *_ in made], "narrow": rivals}
tests = {n: [100 * cpnb.accuracy(m, data.test) for m in g] for n, g in groups.items()}
table = pd.DataFrame(tests).agg(["mean", "std"]).T.round(2)
sizes = {n: sum(p.numel() for p in g[0].parameters()) for n, g in groups.items()}
table.assign(parameters=sizes)

# %%
for other in ("dense", "narrow"):
    gap = paired_difference(tests["compressed"], tests[other])
    print(f"compressed against {other}, points of test accuracy: {gap}")

# %% [markdown]
# After 16 more epochs a quarter of the parameters costs nothing that five seeds can
# tell, 98.11 % against 97.99. But the narrow network, which was never large, has 98.50
# %, and is not told apart either. So on digits compression has earned nothing over
# training small: it pays where the large network exists already, or where only it can
# be trained at all.
#
# ## 6. Hand it over
#
# `to_dense` and `to_chain` give stock layers. What is exported then needs neither this
# package nor the class of your network. Here another process, which cannot import
# either, loads the file and computes:

# %%
folder = Path(tempfile.mkdtemp())
example = data.test.standardized()[:100]
program = torch.export.export(to_chain(small), (example,))
torch.export.save(program, folder / "net.pt2")
torch.save((example, data.test.labels[:100]), folder / "images.pt")
code = """
import sys, torch
sys.modules["cpnb"] = None  # to import it would be an error
net = torch.export.load(sys.argv[1] + "/net.pt2").module()
images, labels = torch.load(sys.argv[1] + "/images.pt")
print("right answers in another process:", int((net(images).argmax(1) == labels).sum()))
"""
done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True)
print(done.stdout.decode() or done.stderr.decode()[-500:])
ours = (small(example).argmax(1) == data.test.labels[:100]).sum()
print("right answers here:              ", int(ours))

# %% [markdown]
# And one file for a colleague who has no Python: every rank that was measured, with
# sliders.

# %%
page = sweep.to_html(folder / "ranks.html")
print(f"ranks.html: {len(page.encode()) / 1000:.0f} kB, {len(sweep.table)} networks")

# %% [markdown]
# ## 7. A checkpoint of somebody else
#
# The file has the plain network of notebook 04's CIFAR-10 record (`python
# experiments.py checkpoint` trained it), and its canonical form: each kernel fitted by
# ALS at the smallest rank with an error of at most 0.1. A CP layer takes the rank of
# what it loads.

# %%
kept = torch.load("checkpoints/cifar10-small.pt")
theirs = SmallConvNet()
theirs.load_state_dict(kept["dense"])
canonical = cpnb.canonicalize(SmallConvNet(), init="unified")
canonical.load_state_dict(kept["canonical"])
ranks = {n: [x.rank, x.break_even_rank] for n, x in cpnb.cp_layers(canonical).items()}
pd.DataFrame(ranks, ["rank", "break-even"]).T

# %% [markdown]
# Its sweep lies beside it, so that a budget can be shared out with no image at hand. A
# sweep belongs to one network, bit by bit, and `check_model` refuses any other.

# %%
measured = RankSweep.load("checkpoints/cifar10-small-sweep.json")
measured.check_model(canonical)
whole = measured.curve("*").accuracy.iloc[-1]
print(f"canonical: {whole:.2%} of {measured.images:,} validation images")
rows = {}
for budget in (1.0, 0.75, 0.5, 0.35):
    choice = cpnb.allocate_ranks(measured, budget * measured.dense_parameters)
    rows[budget] = {"promised": choice.accuracy, **choice.ranks}
table = pd.DataFrame(rows).T
table.round(4)

# %% [markdown]
# What is promised takes the losses of the layers to add up. Where the images are at
# hand, it can be measured:

# %%
if Path(os.environ.get("CPNB_DATA", ""), "cifar10").is_dir():
    cifar = cpnb.load_data("cifar10")
    print(f"dense: {cpnb.accuracy(theirs, cifar):.2%}")
    for budget, row in rows.items():
        wanted = {name: row[name] for name in ranks}
        cut = cpnb.truncate(canonical, rank=wanted, key="greedy", refit=True)
        got = cpnb.accuracy(cut, cifar)
        print(f"{budget:.0%}: promised {row['promised']:.2%}, measured {got:.2%}")
        assert abs(got - row["promised"]) < 0.04
else:
    print("CPNB_DATA names no folder with cifar10/: nothing is measured here")

# %% [markdown]
# The promise is kept to within four points. But cut to three quarters of its 28,474
# parameters the network reads 58 % of the images instead of 70: so small a network has
# little to spare, and training on after the cut, as in section 4, is part of the
# method.
#
# ## 8. More data, more machines
#
# - **A `DataLoader`**: your loop keeps it. Where this package asks for data, to sweep
#   or to measure, it wants a pair of tensors; a loader is put together by
#   `tuple(map(torch.cat, zip(*loader)))`.
# - **A cluster**: `cpnb.compare(..., executor=..., path=...)` takes any executor of
#   `concurrent.futures`, such as a pool of processes here or the client of dask or
#   submitit there; each finished training is written at once, and the same call goes on
#   where it was stopped (`04_training_curves`).
# - **A GPU**: move the network; everything follows it.
#
# ## 9. Exercise: without training
#
# `sweep` knows how every layer of `form` takes a cut, and `rank_front(sweep)` in
# `cpnb.explore` lists the allocator's choices, the cheapest first. With no training
# after the cut: how few parameters still reach 95 % of the validation images? Measure
# each network, as the allocator only predicts. How far off are its promises here?


# %%
def fewest_parameters():
    """Parameters of the smallest cut that reads 95 % of the images."""
    return None  # your code


print("exercise:", fewest_parameters() or "not solved yet")


# %% tags=["solution"] jupyter={"source_hidden": true}
def fewest_parameters_solution():
    """From the cheapest choice upwards, the first that is good enough."""
    for choice in cpnb.explore.rank_front(sweep):
        cut = cpnb.truncate(form, rank=choice.ranks, key="greedy", refit=True)
        if (reached := cpnb.accuracy(cut, data)) >= 0.95:
            print(f"predicted {choice.accuracy:.1%}, measured {reached:.1%}")
            return choice.cost
    return sweep.parameters({})


print("exercise, solution:", fewest_parameters_solution(), "of", sizes["dense"])

# %% [markdown]
# On this network the allocator promised 99.2 % for what reads 95.3: it lets losses add
# up, and they do worse than that.
#
# ## The answer
#
# Six calls: `cost_table`, `canonicalize`, `rank_sweep`, `allocate_ranks`, `truncate`,
# `to_chain`, and your own loop in between. A quarter of the parameters is not told
# apart from all of them in accuracy, nor from a narrow network trained from the start:
# always train that rival, too, before you say what compression was worth.
#
# This is the last notebook; `07_factorized_layers` and `08_scaling_and_conditioning`
# are where to look for other forms and for what scales do.

# %%
print(f"cpnb {cpnb.__version__}, torch {torch.__version__.split('+')[0]}")
