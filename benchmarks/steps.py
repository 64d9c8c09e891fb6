"""Milliseconds of a training step of AlexNet, as ratios to the dense network's.

``python benchmarks/steps.py --device cuda`` takes the forms in turns: dense, weight
norm, canonical at a share of the break-even rank with its kernels rebuilt, and as a
chain; by batch, in float32, in bfloat16, and compiled with CUDA graphs, until the
seconds given are over. Medians are printed, the most important ones first.
"""

import argparse
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import cpnb

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from networks import AlexNet

FORMS = ["dense", "weight norm", "canonical", "canonical chain"]


def network(form, options):
    """AlexNet in one of the forms, in train mode."""
    generator = torch.Generator().manual_seed(0)
    model = AlexNet(generator=generator)
    if form == "weight norm":
        model = cpnb.normalize(model, "weight")
    elif form != "dense":
        start = {"rank": options.rank, "init": "unified", "generator": generator}
        model = cpnb.canonicalize(model, **start)
        for layer in cpnb.cp_layers(model).values():
            layer.forward_mode = "chain" if form.endswith("chain") else "dense"
    return model.to(options.device, memory_format=torch.channels_last)


def stepper(form, batch, how, options):
    """A function that trains one step on random images."""
    model = network(form, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 3, 32, 32, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=options.device) % 10
    is_graph = how == "CUDA graph"
    forward = torch.compile(model, mode="reduce-overhead") if is_graph else model
    kind = torch.device(options.device).type

    def step():
        with torch.autocast(kind, torch.bfloat16, enabled=how != "float32"):
            loss = F.cross_entropy(forward(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def milliseconds(step, count):
    """Time of one of several steps; reading the loss waits for the device."""
    begin = time.perf_counter()
    for _ in range(count):
        loss = step()
    loss.item()
    return 1000 * (time.perf_counter() - begin) / count


def main():
    """Time group after group and print the ratios to the dense network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024, 512, 256])
    parser.add_argument("--rank", type=float, default=0.5, help="in break-even ranks")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    is_gpu = options.device.startswith("cuda")
    chip = torch.cuda.get_device_name() if is_gpu else platform.machine()
    print(f"AlexNet, rank {options.rank:g} of break-even, {chip}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    begin = time.monotonic()
    groups = [*itertools.product(options.batches, ["float32", "bfloat16"])]
    groups += [(options.batches[0], "CUDA graph")] if is_gpu else []
    for batch, how in groups:
        if time.monotonic() - begin > options.seconds:
            print(f"no time for batch {batch}, {how}")
            continue
        steps = {form: stepper(form, batch, how, options) for form in FORMS}
        for step in steps.values():
            milliseconds(step, 3)  # warms up, and compiles
        turns = [
            {form: milliseconds(step, options.steps) for form, step in steps.items()}
            for _ in range(options.turns)
        ]
        taken = {
            form: statistics.median(turn[form] for turn in turns) for form in FORMS
        }
        for form, value in taken.items():
            ratio = value / taken["dense"]
            line = f"batch {batch:5d}  {how:10s} {form:16s}"
            print(f"{line}{value:9.2f} ms {ratio:6.2f}x", flush=True)


if __name__ == "__main__":
    main()
