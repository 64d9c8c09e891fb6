"""Time and fit of cpnb's decompositions against TensorLy's, as ratios in one run.

``python benchmarks/decompositions.py`` takes about 20 minutes on one core, with
``--quick`` about one. Each kernel is decomposed by both, in turns, on one thread and
under the same allocator. "time to equal fit" is the peer's time over that of the
shortest of our fits (`als` from any of its starts) whose error is at most the peer's;
"error at equal time" is our error over the peer's in the time it took. ``--tuned``
repeats it in a process whose C library keeps large blocks, which favours TensorLy.
"""

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings

import torch
import torch.nn.functional as F

import cpnb

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
SWEEPS = (1, 2, 3, 5, 7, 9, 11, 13, 15, 18, 22, 30, 50, 100, 200)


def random_kernel(shape):
    """Kaiming's start for a convolution, the hard case: no structure to find."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5


def trained_kernels(epochs):
    """Convolution kernels of a LeNet trained on the digits, enlarged to 28 x 28."""
    data = cpnb.load_data("digits")
    model = cpnb.LeNet(generator=torch.Generator().manual_seed(0))
    images = F.interpolate(data.train.standardized(), size=28, mode="bilinear")
    cpnb.fit(model, (images, data.train.labels), epochs=epochs, progress=False)
    accuracy = cpnb.accuracy(model, (images, data.train.labels))
    print(f"trained LeNet: {accuracy:.1%} of its training digits right")
    return {"trained conv1": model.conv1.weight, "trained conv2": model.conv2.weight}


def peers(kernel, rank, quick):
    """TensorLy's two methods as functions that return a relative error."""
    import numpy as np
    from tensorly.decomposition import CPPower, parafac

    def error(weights, factors):
        rebuilt = cpnb.cp_to_kernel(weights, list(factors))
        return cpnb.relative_error(kernel, rebuilt).item()

    def als():
        weights, factors = parafac(
            kernel, rank, n_iter_max=50, init="random", random_state=0, tol=1e-6
        )
        return error(weights, factors)

    def power():
        np.random.seed(0)  # noqa: NPY002 - TensorLy draws from it
        return error(*CPPower(rank=rank).fit_transform(kernel))

    return {"parafac": als} if quick else {"parafac": als, "CPPower": power}


def timed(function):
    """Result and seconds of one call."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def ours(kernel, rank, sweeps, start):
    """One of our fits: its error and its seconds."""
    generator = torch.Generator().manual_seed(0)
    fit = functools.partial(cpnb.als, tol=0.0, start=start, generator=generator)
    return timed(lambda: fit(kernel, rank, sweeps=sweeps).relative_error)


def best_of_ours(kernel, rank, error, seconds, repeats):
    """Least seconds to at most ``error``, and least error in at most ``seconds``."""
    equal_fit = equal_time = float("inf")
    for start in ("svd", "random", "greedy"):
        for sweeps in SWEEPS:
            runs = [ours(kernel, rank, sweeps, start) for _ in range(repeats)]
            our_error, taken = runs[0][0], statistics.median(t for _, t in runs)
            if our_error <= error:
                equal_fit = min(equal_fit, taken)
            if taken <= seconds:
                equal_time = min(equal_time, our_error)
            if taken > seconds:
                break
    return equal_fit, equal_time


def compare(name, kernel, rank, quick, repeats):
    """One line per peer: its numbers and the two ratios."""
    kernel = kernel.detach()
    for peer, run in peers(kernel, rank, quick).items():
        runs = [timed(run) for _ in range(repeats)]
        error, seconds = runs[0][0], statistics.median(t for _, t in runs)
        equal_fit, equal_time = best_of_ours(kernel, rank, error, seconds, repeats)
        line = (
            f"{name:14s} rank {rank:3d}  {peer:8s} {seconds:7.3f} s, error {error:.4f} "
            f"| time to equal fit {seconds / equal_fit:5.1f}x, error at equal time "
            f"{equal_time / error:.3f} of the peer's"
        )
        if peer == "CPPower":  # like with like: both are greedy and nested
            generator = torch.Generator().manual_seed(0)
            fit = functools.partial(cpnb.power_method, generator=generator)
            greedy, taken = timed(functools.partial(fit, kernel, rank))
            line += (
                f"; power_method {seconds / taken:.1f}x faster, error "
                f"{greedy.relative_error:.4f}"
            )
        print(line, flush=True)


def main():
    """Run the comparison and print what it was run with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, parafac only")
    parser.add_argument("--tuned", action="store_true", help="keep large blocks")
    options = parser.parse_args()
    if options.tuned and not all(name in os.environ for name in TUNED):
        sys.exit(subprocess.call([sys.executable, *sys.argv], env=os.environ | TUNED))
    import tensorly

    tensorly.set_backend("pytorch")
    warnings.simplefilter("ignore")  # TensorLy's on converged or empty components
    torch.set_num_threads(1)
    allocator = "tuned" if options.tuned else "as installed"
    print(
        f"torch {torch.__version__}, TensorLy {tensorly.__version__}, cpnb "
        f"{cpnb.__version__}, {platform.machine()}, 1 thread, allocator {allocator}; "
        "float32 kernels, cpnb computes in float64"
    )
    shapes = [(64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3)]
    ranks = (32, 64, 128, 256)
    if options.quick:
        shapes, ranks = shapes[:2], ranks[:2]
    kernels = {"x".join(map(str, s)): random_kernel(torch.Size(s)) for s in shapes}
    kernels |= trained_kernels(epochs=1 if options.quick else 5)
    for name, kernel in kernels.items():
        for rank in ranks if kernel.numel() > 1000 else (4, 8):
            compare(
                name, kernel, rank, options.quick, repeats=1 if options.quick else 2
            )


if __name__ == "__main__":
    main()
