"""What several test files make: random numbers from a seed, CP forms, sizes."""

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def random_cp(shape, rank, seed=0):
    """λ and factors, all of them normal."""
    draw = {"generator": seeded(seed), "dtype": torch.float64}
    return torch.randn(rank, **draw), [torch.randn(n, rank, **draw) for n in shape]


def count(model):
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
