"""Time of CP layers as ratios to what a user would pick instead, in the same run.

``python benchmarks/layers.py`` measures three things: rebuilding a kernel against the
one matrix product it holds, a training step in canonical form against the dense one,
and the chain against the dense convolution; beside each, tensorly-torch's layer of the
same rank, if it is installed. All take turns; medians are printed as a table, and
``--write`` puts the table into the README.

glibc gives large tensors back to the system and has them zeroed at every call, which
doubles the time of a chain; the table is made with that switched off, and has the chain
once more as installed.
"""

import argparse
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cpnb
from cpnb.convolution import innermost

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
from networks import LeNet5  # noqa: E402

# Large tensors stay with the process; other C libraries than glibc take no notice.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PART = re.compile(r"(?<=<!-- benchmarks/layers.py -->\n).*?(?=<!-- end -->)", re.S)
KERNELS = [((64, 64, 3, 3), 64), ((128, 64, 3, 3), 128), ((256, 128, 3, 3), 256)]


def peer(rank, how):
    """tensorly-torch's convolution from 64 to 64 channels; None if not installed."""
    try:
        from tltorch import FactorizedConv
    except ImportError:
        return None
    sizes = {"kernel_size": 3, "order": 2, "padding": 1, "rank": rank}
    layer = FactorizedConv(64, 64, factorization="cp", implementation=how, **sizes)
    nn.init.normal_(layer.weight.weights)
    for factor in layer.weight.factors:
        nn.init.normal_(factor)
    return layer.to(memory_format=torch.channels_last)


def conv(rank, mode):
    """Our convolution from 64 to 64 channels."""
    layer = cpnb.CPConv2d(64, 64, 3, padding=1, rank=rank, forward_mode=mode)
    return layer.to(memory_format=torch.channels_last)


def training(model, images):
    """A step: forward, backward, and SGD with momentum, as everybody trains."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.arange(len(images)) % 10

    def step():
        scores = model(images).flatten(1)
        optimizer.zero_grad()
        F.cross_entropy(scores, labels).backward()
        optimizer.step()

    return step


def inference(model, images):
    """A forward pass that keeps nothing."""
    return torch.inference_mode()(lambda: model(images))


def rebuilding(shape, rank):
    """The product; the kernel with and, as the peer has it, without column norms."""
    layer = cpnb.CPConv2d(shape[1], shape[0], shape[2], rank=rank)
    first, rest = torch.randn(shape[0], rank), torch.randn(rank, math.prod(shape[1:]))
    ways = [lambda: first @ rest, lambda: layer.weight]
    other = peer(rank, "reconstructed") if shape[:2] == (64, 64) else None
    if other is not None:
        ways.append(other.weight.to_tensor)
    return [torch.no_grad()(way) for way in ways]


def networks(make, shape):
    """A training step of a small network, dense and canonical at break-even."""
    dense, images = make(), innermost(torch.randn(64, *shape))  # as `fit` hands them
    models = [dense, cpnb.canonicalize(dense, init="unified")]
    return [training(m.to(memory_format=torch.channels_last), images) for m in models]


def cases():
    """Yield name, goal, and functions: the reference, ours, the peer's or none."""
    for shape, rank in KERNELS:
        name = f"rebuild {'×'.join(map(str, shape))} at rank {rank} ÷ one product"
        yield name, 2.5 if shape[0] == 64 else 1.3, rebuilding(shape, rank)
    maps = torch.randn(128, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    dense = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    same = cpnb.CPConv2d(64, 64, 3).rank
    layers = [dense, conv(same, "dense"), peer(same, "reconstructed")]
    steps = [training(layer, maps) for layer in layers if layer]
    yield f"step, 64 → 64 on 32×32 maps, rank {same} ÷ dense", 1.05, steps
    yield "step, LeNet-5, batch 64 ÷ dense", 1.25, networks(LeNet5, (1, 28, 28))
    yield "step, DigitsNet, batch 64 ÷ dense", 1.25, networks(cpnb.DigitsNet, (1, 8, 8))
    quarter = round(64 * 64 * 9 / (64 + 64 + 9) / 4)
    layers = [dense, conv(quarter, "chain"), peer(quarter, "factorized")]
    passes = [inference(layer, maps) for layer in layers if layer]
    yield f"chain, 64 → 64 on 32×32 maps, rank {quarter} ÷ dense", 0.45, passes


def medians(ways, seconds):
    """Median seconds of each function, called in turns."""
    taken = [[] for _ in ways]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 7:
        for way, times in zip(ways, taken, strict=True):
            begin = time.perf_counter()
            way()
            times.append(time.perf_counter() - begin)
    return [statistics.median(times[2:]) for times in taken]


def main():
    """Measure, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="of each case")
    parser.add_argument("--write", action="store_true", help="into the README")
    parser.add_argument("--as-installed", action="store_true", help="the chain only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| time ÷ reference | goal | cpnb | tensorly-torch |", "|---|---|---|---|"]
    if not options.as_installed and not KEPT.items() <= os.environ.items():
        sys.exit(subprocess.call([sys.executable, *sys.argv], env=os.environ | KEPT))
    for name, goal, ways in [*cases()][-1 if options.as_installed else 0 :]:
        reference, *others = medians(ways, options.seconds)
        ratios = [f"{value / reference:.2f}" for value in others]
        lines.append(f"| {' | '.join([name, f'≤ {goal}', *ratios, '–'][:4])} |")
        print(lines[-1], flush=True)
    if options.as_installed:
        return
    plain = {name: os.environ[name] for name in os.environ.keys() - KEPT.keys()}
    again = [sys.executable, sys.argv[0], "--as-installed"]
    row = subprocess.check_output(again, env=plain, text=True).strip()
    lines.append(row.replace("÷ dense", "÷ dense, memory as installed"))
    where = f"{platform.machine()}, one thread of {os.cpu_count()} cores"
    lines += ["", f"float32, {where}, torch {torch.__version__.split('+')[0]}."]
    table = "\n".join([*lines, ""])
    print(f"\n{table}")
    if options.write:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(PART.sub(lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()
