"""Schedules against their formulas, step by step, as a training sees them."""

import math

import pytest
import torch
from torch import nn

from cpnb.hooks import Hook
from cpnb.optimizers import SCHEDULES, build_optimizer, build_schedule
from cpnb.training import fit

PAIR = (
    torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),
    torch.arange(8) % 2,
)


class Rates(Hook):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.seen = []

    def before_step(self, model, optimizer, step):
        self.seen.append(optimizer.param_groups[0]["lr"])


def annealed(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(step, steps):
    top = 0.3 * steps - 1
    if step <= top:
        return annealed(1 / 25, 1, step / top)
    return annealed(1, 1 / 25e4, (step - top) / (steps - 1 - top))


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [1] * 20),
        ("cosine", [annealed(1, 0, step / 20) for step in range(20)]),
        ("step", [1] * 10 + [0.1] * 5 + [0.01] * 5),
        ("one-cycle", [one_cycle(step, 20) for step in range(20)]),
    ],
)
def test_schedule_gives_the_rates_of_its_formula(schedule, expected, name):
    rates = Rates()
    settings = {"optimizer": name, "lr": 0.02, "schedule": schedule}
    run = fit(
        nn.Linear(3, 2),
        PAIR,
        epochs=5,
        batch_size=2,
        hooks=[rates],
        progress=False,
        **settings,
    )
    assert rates.seen == pytest.approx([0.02 * rate for rate in expected])
    assert run.recipe["schedule"] == schedule


@pytest.mark.parametrize("schedule", ["cosine", "step", "one-cycle"])
def test_schedule_of_a_single_step_trains(schedule):
    rates = Rates()
    fit(
        nn.Linear(3, 2),
        PAIR,
        epochs=1,
        schedule=schedule,
        lr=0.02,
        hooks=[rates],
        progress=False,
    )
    assert len(rates.seen) == 1
    assert 0 < rates.seen[0] <= 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_optimizer_to_be_captured_takes_the_same_steps(schedule):
    """Its rates are tensors; of the three only SGD has such a step on a CPU."""
    found = []
    for capturable in (False, True):
        shares = [
            ({"weight": torch.ones(3), "bias": torch.ones(2)}, rate)
            for rate in (0.1, 0.03)
        ]
        decays = [(["weight"], 0.02), (["bias"], 0.0)]
        optimizer = build_optimizer("sgd", shares, decays, 0.9, capturable=capturable)
        steps = build_schedule(schedule, optimizer, 10)
        tensors = [tensor for share, _ in shares for tensor in share.values()]
        for step in range(10):
            for tensor in tensors:
                tensor.grad = torch.arange(float(len(tensor))) * step + tensor
            optimizer.step()
            if steps is not None:
                steps.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert all(torch.is_tensor(rate) == capturable for rate in rates)
        found.append([*tensors, torch.tensor(list(map(float, rates)))])
    torch.testing.assert_close(*found)
