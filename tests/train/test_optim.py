"""Which parameters decay; schedules against their formulas; optimizers by name."""

import math

import pytest
import torch
from torch import nn

from cpnb.layers import CPConv2d
from cpnb.methods import normalize
from cpnb.train.optim import make_optimizer, make_schedule, param_groups

SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}


def decaying(model, **options):
    """Names of the parameters with decay; checks that every other one has none."""
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in param_groups(model, 0.1, **options)
        for p in group["params"]
    }
    assert sorted(decay) == sorted(names.values())
    assert set(decay.values()) <= {0.1, 0.0}
    return {name for name, value in decay.items() if value}


DECLARED = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
DECLARED.no_decay, DECLARED.factor_names = ("0",), ("1",)
CONV = nn.Conv2d(3, 4, 3)
NORMS = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((2, 4)), nn.RMSNorm((2, 4))
WEIGHT, ONI, CONDITIONED = (
    normalize(nn.Conv2d(3, 4, 3), name) for name in ("weight", "oni", "conditioned")
)
ATTENTION = nn.MultiheadAttention(4, 2, add_bias_kv=True)
FACTORS = {f"0.factors.{n}" for n in range(4)}


@pytest.mark.parametrize(
    ("layers", "kernels", "factors"),
    [
        ((CONV, *NORMS), {"0.weight"}, set()),
        ((ATTENTION,), {"0.in_proj_weight", "0.out_proj.weight"}, set()),
        ((WEIGHT,), {"0.parametrizations.weight.original1"}, set()),
        ((ONI,), {"0.parametrizations.weight.original"}, set()),
        ((CONDITIONED,), {"0.parametrizations.weight.original"}, set()),
        ((CPConv2d(3, 4, 3, rank=2), nn.Linear(4, 4)), {"1.weight"}, FACTORS),
        ((DECLARED, nn.Linear(2, 2)), {"1.weight"}, {"0.1.weight"}),
    ],
    ids=["norms", "attention", "weight", "oni", "conditioned", "CP", "declared"],
)
def test_param_groups_give_decay_to_kernels_and_factors(layers, kernels, factors):
    model = nn.Sequential(*layers)
    assert decaying(model) == kernels | factors
    assert decaying(model, factors=False) == kernels


def test_param_groups_leave_out_frozen_and_count_shared_parameters_once():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    one.bias.requires_grad_(False)
    decaying, others = param_groups(nn.Sequential(one, two), 0.1)
    assert [*map(id, decaying["params"])] == [id(one.weight)]
    assert [*map(id, others["params"])] == [id(two.bias)]


def rates(name, schedule, steps):
    """Learning rate of every step."""
    optimizer = make_optimizer(name, nn.Linear(3, 2), **SETTINGS)
    scheduler, seen = make_schedule(schedule, optimizer, steps), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [1] * 20),
        ("cosine", [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]),
        ("step", [1] * 10 + [0.1] * 5 + [0.01] * 5),
    ],
    ids=["constant", "cosine", "step"],
)
def test_schedule_gives_the_rates_of_its_formula(schedule, expected, name):
    assert rates(name, schedule, 20) == pytest.approx([0.02 * r for r in expected])
    (single,) = rates(name, schedule, 1)
    assert 0 < single <= 0.02


def test_make_optimizer_uses_the_settings_and_parameters_that_are_trained():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    settings = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.01}
    sgd = make_optimizer("sgd", model, **settings)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.01, 0.0]
    assert {(g["lr"], g["momentum"]) for g in sgd.param_groups} == {(0.3, 0.7)}
    assert type(make_optimizer("rmsprop", model, **settings)) is torch.optim.RMSprop
    made = make_optimizer(lambda p: torch.optim.Adam(p, lr=1.0), model, **settings)
    assert made.param_groups[0]["params"] == list(model[1].parameters())


@pytest.mark.parametrize(
    ("name", "schedule", "text"),
    [
        ("lion", None, "optimizer is 'lion', expected one of 'adam', 'sgd', 'rmsprop'"),
        (torch.optim.Adam([torch.zeros(1)]), None, "or a function that makes one, as"),
        ("sgd", "steps", "schedule is 'steps', expected one of None, 'cosine', 'step'"),
    ],
    ids=["name", "object", "schedule"],
)
def test_make_optimizer_and_make_schedule_refuse(name, schedule, text):
    with pytest.raises(ValueError, match=text):
        rates(name, schedule, 10)
