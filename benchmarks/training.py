"""Images per second of `cpnb.fit`, as ratios to a plain PyTorch loop in the same run.

``python benchmarks/training.py`` trains a network on random pixels: in a plain loop
over a DataLoader, with `fit`, and with two processes of `fit` at once; ``--compile``
adds torch.compile, ``--device cuda`` bfloat16 and CUDA graphs. The ways take turns; of
each the epochs after the first count, which warms up and compiles; medians are printed.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import cpnb

SHAPES = {"DigitsNet": (1, 8, 8), "LeNet": (1, 28, 28)}


def network(options):
    """The network, in CP form if a rank is given."""
    generator = torch.Generator().manual_seed(0)
    model = getattr(cpnb.train, options.network)(generator=generator)
    if options.rank is not None:
        choice = {"rank": options.rank, "init": "unified"}
        model = cpnb.canonicalize(model, generator=generator, **choice)
    return model.to(options.device)


def random_pixels(options):
    """A split of noise with random classes."""
    shape = SHAPES[options.network]
    generator = torch.Generator().manual_seed(0)
    size = options.images, *shape
    images = torch.randint(0, 256, size, generator=generator).byte()
    labels = torch.randint(0, 10, size[:1], generator=generator)
    return cpnb.train.Split(images, labels, (127.5,) * shape[0], (73.9,) * shape[0])


def plain_loop(options):
    """Seconds of the epochs after the first, as a tutorial would write them."""
    split, model = random_pixels(options), network(options)
    pairs = TensorDataset(split.standardized(), split.labels)
    loader = DataLoader(pairs, options.batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(1 + options.epochs):
        if epoch == 1:
            begin = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            scores = model(images.to(options.device))
            loss = F.cross_entropy(scores, labels.to(options.device))
            loss.backward()
            optimizer.step()
            loss.item()
    return time.perf_counter() - begin


def fit(options, **arguments):
    """Seconds of the same epochs in `cpnb.fit`."""
    torch.set_num_threads(options.threads)
    settings = {"epochs": 1 + options.epochs, "batch_size": options.batch, "lr": 0.01}
    settings |= {"optimizer": "sgd", "progress": False, **arguments}
    run = cpnb.fit(network(options), random_pixels(options), **settings)
    return sum(record["seconds"] for record in run.history[1:])


def ways(options, pool):
    """Each way of training by its name, as a function without arguments."""
    table = {"plain loop": lambda: plain_loop(options), "fit": lambda: fit(options)}
    both = [options, options]  # side by side: half of the time counts for the images
    table["fit, two processes"] = lambda: max(pool.map(fit, both)) / 2
    if options.compile:
        table["fit, compiled"] = lambda: fit(options, compile=True)
    if options.device == "cuda":
        table["fit, bfloat16"] = lambda: fit(options, amp=True)
        table["fit, CUDA graph"] = lambda: fit(options, compile="reduce-overhead")
    return table


def main():
    """Run every way in turns and print the ratios and what they were made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=SHAPES, default="LeNet")
    parser.add_argument("--rank", type=float, help="CP form, in break-even ranks")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1024, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=1, help="after the first")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(options, f"torch {torch.__version__}, cpnb {cpnb.__version__},", end=" ")
    print(f"{platform.machine()}, {os.cpu_count()} cores, float32")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        table = ways(options, pool)
        turns = [
            {name: way() for name, way in table.items()} for _ in range(options.turns)
        ]
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in table}
    for name, taken in seconds.items():
        speed = options.epochs * options.images / taken
        ratio = seconds["plain loop"] / taken
        print(f"{name:20s} {speed:9.0f} images/s  {ratio:5.2f}x")


if __name__ == "__main__":
    main()
