"""Time of `rank_sweep` against cutting and evaluating once per rank, in one run.

``python benchmarks/sweep.py`` takes about five minutes on one core, with ``--full``
about forty. The network is the paper's LeNet at its authors' ranks, trained for a
moment on MNIST; the images are 1,000 of the validation split. Naive is
``evaluate(truncate(net, ...), images)`` at one rank after the other: in one forward
pass of all images, as they come, which the goals are about; and in its fastest form, in
small batches and channels_last. All take turns, and ratios are of medians. Unless
``--full``, naive runs at every tenth position and its time is multiplied accordingly.
The numbers of right answers are compared wherever naive has run; the exit status is 1
if any differ. ``--data digits`` needs no download.
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


class SmoothLeNet(cpnb.LeNet):
    """LeNet without ReLU and max pooling: nothing after conv2 is of a special kind."""

    def forward(self, images):
        """Scores, shape ``(n, classes)``."""
        hidden = F.avg_pool2d(F.silu(self.conv2(F.silu(self.conv1(images)))), 2)
        return self.fc2(F.silu(self.fc1(hidden.flatten(1))))


CASES = [  # name, network, axis, goal against naive in one forward pass
    ("conv1", cpnb.LeNet, "conv1", None),
    ("conv2", cpnb.LeNet, "conv2", 10),
    ("conv2, arbitrary tail", SmoothLeNet, "conv2", 3),
    ("fc1", cpnb.LeNet, "fc1", 50),
    ("fc2", cpnb.LeNet, "fc2", None),
    ("all layers, 1 to 100 %", cpnb.LeNet, "*", 6),
]


def load(name):
    """Training pair and 1,000 validation images of 28x28 pixels with their labels."""
    data = cpnb.load_data(name, train_size=None if name == "digits" else 2000)
    pairs = [
        (F.interpolate(split.standardized(), size=28, mode="bilinear"), split.labels)
        for split in (data.train, data.validation)
    ]
    return pairs[0], tuple(part[:1000] for part in pairs[1])


def trained(kind, pair):
    """A network at the authors' ranks after two epochs."""
    generator = torch.Generator().manual_seed(0)
    net = cpnb.canonicalize(kind(generator=generator), rank=RANKS, generator=generator)
    cpnb.fit(net, pair, epochs=2, lr=1e-3, seed=0, progress=False)
    return net.eval()


def positions(axis):
    """Where on an axis to measure: every rank, or every percent."""
    if axis == "*":
        return [percent / 100 for percent in range(1, 101)]
    return list(range(1, RANKS[axis] + 1))


def timed(function):
    """Result and seconds of one call."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def naive(net, axis, places, pair, batch_size):
    """Right answers at each position, one network after the other."""
    found = {}
    for place in places:
        how = {"keep": place} if axis == "*" else {"rank": {axis: place}}
        cut = cpnb.truncate(net, **how)
        accuracy = cpnb.accuracy(cut, pair, batch_size=batch_size)
        found[place] = round(accuracy * len(pair[1]))
    return found


def together(net, axis, pair):
    """Right answers at every position, and how they were found."""
    sweep = cpnb.rank_sweep(net, pair, ranks={axis: positions(axis)}, progress=False)
    right = {at: round(p.accuracy * len(pair[1])) for at, p in sweep.curve(axis)}
    return right, sweep.methods[axis]


def compare(name, net, axis, goal, pair, options):
    """Print seconds, ratios and whether all numbers agree; return the last."""
    images, labels = pair
    # Cloned in this order: torch calls one-channel images channels_last as they are.
    innermost = images.permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2), labels
    every = positions(axis)
    places = every if options.full else every[4::10] if len(every) > 20 else every
    times = {"naive": [], "fastest": [], "together": []}
    agree = True
    for _ in range(options.repeats):
        expected, seconds = timed(lambda: naive(net, axis, places, pair, len(labels)))
        times["naive"].append(seconds * len(every) / len(places))
        (found, method), seconds = timed(lambda: together(net, axis, pair))
        times["together"].append(seconds)
        last, seconds = timed(lambda: naive(net, axis, places, innermost, None))
        times["fastest"].append(seconds * len(every) / len(places))
        agree = agree and all(
            found[place] == expected[place] == last[place] for place in places
        )
    plain, fastest, ours = (statistics.median(values) for values in times.values())
    print(
        f"{name:24s} {len(every):3d} points  naive {plain:7.1f} s  sweep {ours:6.2f} s "
        f"| {plain / ours:6.1f}x (goal {goal or '-'}), {fastest / ours:6.1f}x over the "
        f"fastest naive | {len(places)} counts {'equal' if agree else 'DIFFER'} "
        f"[{method}]",
        flush=True,
    )
    return agree


def main():
    """Run the comparison and print what it was run with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="naive at every position")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="mnist", help="mnist, or digits enlarged")
    parser.add_argument("--only", help="only the case of this name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, pair = load(options.data)
    print(
        f"torch {torch.__version__}, cpnb {cpnb.__version__}, {platform.machine()}, "
        f"{options.threads} threads, {len(pair[1]):,} images of {options.data}, naive "
        f"{'in full' if options.full else 'at every tenth position, multiplied'}; "
        f"median of {options.repeats}"
    )
    nets, agree = {}, []
    for name, kind, axis, goal in CASES:
        if options.only in (None, name):
            if kind not in nets:
                nets[kind] = trained(kind, train)
                accuracy = cpnb.accuracy(nets[kind], pair)
                print(f"{kind.__name__}: accuracy {accuracy:.1%} at full rank")
            agree.append(compare(name, nets[kind], axis, goal, pair, options))
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
