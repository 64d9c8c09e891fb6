"""Time of `rank_sweep` against cutting and evaluating once per rank, in one run.

``python benchmarks/sweep.py`` takes about ten minutes on one core. The networks are
trained for a moment on digits, enlarged to 28x28 for LeNet, which has the ranks of its
authors; 1,000 images are classified. Naive is ``accuracy(truncate(net, ...), images)``
at one rank after the other. The two take turns, and ratios are of medians. Unless
``--full``, naive runs at every tenth rank and its time is multiplied accordingly.
Numbers of right answers are compared wherever naive has run; the exit status is 1 if
any differ.
"""

import argparse
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import cpnb

RANKS = {"conv1": 11, "conv2": 270, "fc1": 128, "fc2": 10}
EVERY = {name: list(range(1, rank + 1)) for name, rank in RANKS.items()}
PERCENTS = [percent / 100 for percent in range(1, 101)]
CASES = [  # name, network, what is swept (None: as by default), goal
    ("LeNet conv1", "lenet", {"conv1": EVERY["conv1"]}, 1),
    ("LeNet conv2, every rank", "lenet", {"conv2": EVERY["conv2"]}, 4),
    ("LeNet fc1", "lenet", {"fc1": EVERY["fc1"]}, 30),
    ("LeNet, 1 to 100 % everywhere", "lenet", {"*": PERCENTS}, 1),
    ("LeNet, all of these by default", "lenet", None, 3),
    ("DigitsNet conv2, 16 ranks", "digits", {"conv2": list(range(5, 84, 5))}, 1),
]


def network(name, data):
    """A network after two epochs, and 1,000 images (or what there is) with labels."""
    generator = torch.Generator().manual_seed(0)
    images, labels = data.train.standardized(), data.train.labels
    net = cpnb.DigitsNet(generator=generator)
    ranks = "same"
    if name == "lenet":
        images = F.interpolate(images, size=28, mode="bilinear")
        net = cpnb.LeNet(generator=generator)
        ranks = RANKS
    net = cpnb.canonicalize(net, rank=ranks, init="gaussian", generator=generator)
    cpnb.fit(net, (images, labels), epochs=2, seed=0, progress=False)
    return net.eval(), (images[:1000], labels[:1000])


def timed(function):
    """Result and seconds of one call."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def naive(net, points, pair):
    """Right answers at each point, one network after the other."""
    found = {}
    for axis, place in points:
        how = {"keep": place} if axis == "*" else {"rank": {axis: place}}
        found[axis, place] = cpnb.accuracy(cpnb.truncate(net, **how), pair)
    return {point: round(share * len(pair[1])) for point, share in found.items()}


def together(net, ranks, pair):
    """Right answers at each point, and how they were found."""
    sweep = cpnb.rank_sweep(net, pair, ranks=ranks, progress=False)
    found = {}
    for row in sweep.table.to_dict("records"):
        place = row["keep"] if row["axis"] == "*" else row["rank"]
        found[row["axis"], place] = row["right"]
    return found, sweep.methods


def compare(name, net, ranks, goal, pair, options):
    """Print seconds and ratios; return whether all numbers agree."""
    every = list(together(net, ranks, pair)[0])
    some = every if options.full or len(every) < 20 else every[4::10]
    slow, fast, agree = [], [], True
    for _ in range(options.repeats):
        expected, seconds = timed(lambda: naive(net, some, pair))
        slow.append(seconds * len(every) / len(some))
        (found, methods), seconds = timed(lambda: together(net, ranks, pair))
        fast.append(seconds)
        agree = agree and all(found[point] == expected[point] for point in some)
    ratio = statistics.median(slow) / statistics.median(fast)
    print(
        f"{name:31s} {len(every):3d} points  naive {statistics.median(slow):7.2f} s "
        f"(min {min(slow):.2f})  sweep {statistics.median(fast):6.2f} s (min "
        f"{min(fast):.2f})  {ratio:6.1f}x (goal {goal})  {len(some)} counts "
        f"{'equal' if agree else 'DIFFER'}  {set(methods.values())}",
        flush=True,
    )
    return agree


def main():
    """Run the comparison and print what it was run with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="naive at every rank")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="only cases with this in the name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, cpnb {cpnb.__version__}, {platform.machine()}, "
        f"{options.threads} threads; median of {options.repeats}"
    )
    data = cpnb.load_data("digits")
    made = {name: network(name, data) for name in ("lenet", "digits")}
    agree = []
    for name, kind, ranks, goal in CASES:
        if options.only is None or options.only in name:
            net, pair = made[kind]
            agree.append(compare(name, net, ranks, goal, pair, options))
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
