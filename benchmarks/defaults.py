"""Does a canonical network train like a dense one, with defaults and a plain loop?

A network as torch makes it, the same with weight norm, and ``cpnb.canonicalize`` of it
are trained by a loop of plain torch at rates that differ by two, until no best rate is
the last one. Per method the accuracies on validation images say which rate is best; the
test images are read once, at every rate, and decide nothing.

    python benchmarks/defaults.py mnist --images 12000
"""

import argparse
import time
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import cpnb


def small_net() -> nn.Sequential:
    """Three convolutions and two linear layers for 32×32 colour images."""
    sizes = [(3, 32), (32, 64), (64, 64)]
    layers = [
        layer
        for size in sizes
        for layer in (nn.Conv2d(*size, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    top = (nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(*layers, *top)


def weight_normed(network: nn.Module) -> nn.Module:
    """Put torch's weight norm on every layer that has a kernel."""
    for module in [*network.modules()]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight_norm(module)
    return network


NETWORKS = {"mnist": cpnb.LeNet, "fashion_mnist": cpnb.LeNet, "cifar10": small_net}
METHODS = {"dense": nn.Identity(), "weight norm": weight_normed}
METHODS["canonical"] = cpnb.canonicalize


def train(network, split, rate, optimizer, epochs):
    """Train by the most ordinary loop; False if the loss is no number."""
    images, labels = split
    if optimizer == "sgd":
        steps = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    else:
        steps = torch.optim.AdamW(network.parameters(), lr=rate)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            if not loss.isfinite():
                return False
            steps.zero_grad()
            loss.backward()
            steps.step()
    return True


def run(method, rate, seed, data, options):
    """Train one network; accuracies in % on validation and test images."""
    torch.manual_seed(seed)
    network = METHODS[method](NETWORKS[options.data]())
    torch.manual_seed(1000 + seed)
    train_images = data.train.standardized().contiguous(
        memory_format=torch.channels_last
    )
    split = train_images, data.train.labels
    if not train(network, split, rate, options.optimizer, options.epochs):
        return 0.0, 0.0
    return tuple(
        100 * cpnb.accuracy(network, split) for split in (data.validation, data.test)
    )


def main():
    """Print a line for every method and rate, then each method at its best rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=NETWORKS)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--fixed", action="store_true", help="only the rates given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = cpnb.load_data(options.data, train_size=options.images)
    best = {}
    for method in options.methods:
        found = {}
        pending = list(options.rates)
        while pending:
            rate = pending.pop(0)
            began = time.perf_counter()
            runs = [run(method, rate, s, data, options) for s in range(options.seeds)]
            seconds = (time.perf_counter() - began) / options.seeds
            found[rate] = [*zip(*runs, strict=True)]
            text = " ".join(f"{test:.2f}" for test in found[rate][1])
            print(
                f"{method:12} rate {rate:<8g} validation {mean(found[rate][0]):6.2f} "
                f"test {mean(found[rate][1]):6.2f}  ({text})  {seconds:.1f} s",
                flush=True,
            )
            top = max(found, key=lambda one: mean(found[one][0]))
            if not pending and not options.fixed:
                wanted = {min(found): min(found) / 2, max(found): max(found) * 2}
                pending = [wanted[top]] if top in wanted else []
        best[method] = top, found[top][1]
    for method, (rate, tests) in best.items():
        spread = stdev(tests) if len(tests) > 1 else 0.0
        print(f"{method:12} best rate {rate:g}: test {mean(tests):.2f} ± {spread:.2f}")


if __name__ == "__main__":
    main()
