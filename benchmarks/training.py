"""Images per second of several networks at once, each way of training as a ratio.

``python benchmarks/training.py`` trains four LeNets on random pixels: one after the
other in either memory layout, and all in one vectorised graph. ``--compile`` adds each
of these through torch.compile; ``--device cuda`` adds mixed precision and CUDA graphs.
The ways take turns. Of each turn the epochs after the first count, which compiles and
captures; images per second are those of all networks over the time of all, the median
of the turns. "cost" is the time of all over that of one network trained alone, in the
fastest way for one.
"""

import argparse
import os
import platform
import statistics

import torch

import cpnb

SHAPES = {
    "DigitsNet": (1, 8, 8),
    "LeNet": (1, 28, 28),
    "AlexNet": (3, 32, 32),
    "ResNet": (3, 32, 32),
}


def ways(device, compiled):
    """Name and arguments of each way to train one network, and of each for several.

    The others relate to the first of those.
    """
    found = {
        "one after the other": {"vectorise": False, "channels_last": False},
        "channels_last": {"vectorise": False},
        "one graph": {"vectorise": True},
    }
    options = {}
    if device == "cuda":
        options |= {"bfloat16": {"amp": True}, "captured": {"cuda_graph": True}}
        options["bfloat16, captured"] = {"amp": True, "cuda_graph": True}
    if compiled:
        options["compiled"] = {"compile": True}
    alone = {"alone": {}} | {f"alone, {more}": extra for more, extra in options.items()}
    return alone, found | {
        f"{name}, {more}": arguments | extra
        for name, arguments in found.items()
        for more, extra in options.items()
    }


def random_pixels(shape, count):
    """A split of noise with random classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), generator=generator).byte()
    labels = torch.randint(0, 10, (count,), generator=generator)
    return cpnb.Split(images, labels, (127.5,) * shape[0], (73.9,) * shape[0])


def networks(options, count):
    """Networks from seeds of their own, in CP form if asked for."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model = getattr(cpnb, options.network)(generator=generator)
        if options.rank is not None:
            model = cpnb.canonicalize(
                model, rank=options.rank, init="unified", generator=generator
            )
        made.append(model.to(options.device))
    return made


def images_per_second(options, data, count, arguments):
    """Of ``count`` networks together, without the first epoch."""
    runs = cpnb.fit(
        networks(options, count),
        data,
        seeds=range(count),
        epochs=1 + options.epochs,
        batch_size=options.batch,
        optimizer="sgd",
        lr=0.01,
        progress=False,
        **arguments,
    )
    seconds = sum(record["seconds"] for run in runs for record in run.history[1:])
    return count * options.epochs * options.images / seconds


def main():
    """Run every way in turns and print the ratios and what they were made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=SHAPES, default="LeNet")
    parser.add_argument("--rank", type=float, help="CP form, in break-even ranks")
    parser.add_argument("--networks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=512, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=1, help="after the first")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = platform.machine()
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    form = "dense" if options.rank is None else f"CP at {options.rank} of break-even"
    print(
        f"{options.networks} x {options.network}, {form}, batch {options.batch}; torch "
        f"{torch.__version__}, cpnb {cpnb.__version__}, {name}, {options.threads} "
        f"threads of {os.cpu_count()} cores, float32"
    )
    data = random_pixels(SHAPES[options.network], options.images)
    alone, together = ways(options.device, options.compile)
    counts = dict.fromkeys(alone, 1) | dict.fromkeys(together, options.networks)
    speeds, refused = {name: [] for name in counts}, {}
    for _ in range(options.turns):
        for name, arguments in (alone | together).items():
            try:
                found = images_per_second(options, data, counts[name], arguments)
            except ValueError as error:  # one graph cannot train these networks so
                refused[name] = error
            else:
                speeds[name].append(found)
    for name, error in refused.items():
        print(f"{name}: refused, {error}")
    medians = {
        name: statistics.median(found) for name, found in speeds.items() if found
    }
    first, fastest = medians[next(iter(together))], max(medians[n] for n in alone)
    for name, speed in medians.items():
        cost = counts[name] * fastest / speed
        print(
            f"{name:40s} {speed:9.0f} images/s  {speed / first:5.2f}x  cost {cost:5.2f}"
        )


if __name__ == "__main__":
    main()
