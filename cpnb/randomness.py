"""Repeatable randomness where torch offers no ``generator=``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that dropout reads; put their states back on exit.

    Args:
        seed: The seed.
        device: Where the network runs; its generator is seeded beside the CPU's.
    """
    # Not torch.manual_seed, which also seeds devices whose state is not put back.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
