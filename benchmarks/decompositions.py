"""Time and fit of cpnb's decompositions against TensorLy's, as ratios in one run.

``python benchmarks/decompositions.py`` takes 20 minutes on one core, ``--quick`` one.
"time to equal fit" is the peer's time over that of the shortest of our fits (`als` from
any of its starts) of at most its error; "error at equal time" is our error over the
peer's. ``--tuned`` keeps large blocks in the C library, which favours TensorLy.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from itertools import product

import numpy as np
import tensorly
import torch
import torch.nn.functional as F
from tensorly.decomposition import CPPower, parafac

import cpnb

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
SHAPES = ((64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3))
SWEEPS = (1, 2, 3, 5, 7, 9, 11, 13, 15, 18, 22, 30, 50, 100, 200)


def kernels(quick):
    """Random kernels, the hard case without structure, and those of a trained LeNet."""
    table = {}
    for shape in SHAPES[:2] if quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        kernel = torch.randn(shape, generator=generator)
        table["x".join(map(str, shape))] = kernel * (2 / kernel[0].numel()) ** 0.5
    train = cpnb.load_data("digits").train
    pair = F.interpolate(train.standardized(), size=28, mode="bilinear"), train.labels
    model = cpnb.LeNet(generator=torch.Generator().manual_seed(0))
    cpnb.fit(model, pair, epochs=1 if quick else 5, progress=False)
    print(f"trained LeNet: {cpnb.accuracy(model, pair):.1%} of its digits right")
    layers = {"trained conv1": model.conv1, "trained conv2": model.conv2}
    return table | {name: layer.weight.detach() for name, layer in layers.items()}


def peer_fit(name, kernel, rank):
    """Relative error of TensorLy's least squares or greedy power method."""
    np.random.seed(0)  # noqa: NPY002 - TensorLy draws from it
    options = {"init": "random", "random_state": 0, "tol": 1e-6}
    if name == "parafac":
        weights, factors = parafac(kernel, rank, n_iter_max=50, **options)
    else:
        weights, factors = CPPower(rank=rank).fit_transform(kernel)
    return cpnb.relative_error(kernel, cpnb.cp_to_kernel(weights, factors)).item()


def ours(method, kernel, rank, **options):
    """Relative error of one of our fits."""
    generator = torch.Generator().manual_seed(0)
    return method(kernel, rank, generator=generator, **options).relative_error


def timed(function, repeats):
    """Result of a call and the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def compare(name, kernel, rank, peer, repeats):
    """Print the peer's numbers and the two ratios."""
    error, seconds = timed(partial(peer_fit, peer, kernel, rank), repeats)
    equal_fit = equal_time = float("inf")
    for start in "greedy", "random":
        for sweeps in SWEEPS:
            options = {"start": start, "sweeps": sweeps, "tol": 0.0}
            fit = partial(ours, cpnb.als, kernel, rank, **options)
            our_error, taken = timed(fit, repeats)
            if our_error <= error:
                equal_fit = min(equal_fit, taken)
            if taken > seconds:
                break
            equal_time = min(equal_time, our_error)
    line = f"{name:14s} rank {rank:3d}  {peer:8s} {seconds:7.3f} s, error {error:.4f}"
    line += f" | time to equal fit {seconds / equal_fit:5.1f}x, "
    line += f"error at equal time {equal_time / error:.3f} of the peer's"
    if peer == "CPPower":
        greedy, taken = timed(partial(ours, cpnb.power_method, kernel, rank), repeats)
        line += f"; power_method {seconds / taken:.1f}x faster, error {greedy:.4f}"
    print(line, flush=True)


def main():
    """Run the comparison and print what it was run with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, parafac only")
    parser.add_argument("--tuned", action="store_true", help="keep large blocks")
    options = parser.parse_args()
    if options.tuned and not all(name in os.environ for name in TUNED):
        sys.exit(subprocess.call([sys.executable, *sys.argv], env=os.environ | TUNED))
    tensorly.set_backend("pytorch")
    warnings.simplefilter("ignore")  # TensorLy's, on converged components
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, TensorLy {tensorly.__version__}, cpnb", end=" ")
    print(f"{cpnb.__version__}, {platform.machine()}, 1 thread, {options}")
    peers = ["parafac"] if options.quick else ["parafac", "CPPower"]
    for name, kernel in kernels(options.quick).items():
        ranks = (4, 8) if kernel.numel() <= 1000 else (32, 64, 128, 256)
        for rank, peer in product(ranks[:2] if options.quick else ranks, peers):
            compare(name, kernel, rank, peer, repeats=1 if options.quick else 2)


if __name__ == "__main__":
    main()
