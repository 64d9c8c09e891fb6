"""Which parameters decay: kernels and directions, no scales."""

import pytest
import torch
from torch import nn

import cpnb


def decaying(model, **options):
    """Names of the parameters with decay; checks that every other one has none."""
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in cpnb.param_groups(model, 0.1, **options)
        for p in group["params"]
    }
    assert sorted(decay) == sorted(names.values())
    assert set(decay.values()) <= {0.1, 0.0}
    return {name for name, value in decay.items() if value}


def test_param_groups_spare_biases_and_norm_layers():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
        *(nn.Flatten(), nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)),
    )
    assert decaying(model) == {"0.weight", "4.weight"}
    attention = decaying(nn.MultiheadAttention(4, 2))
    assert attention == {"in_proj_weight", "out_proj.weight"}


def test_param_groups_spare_the_scales_of_cp_layers_but_not_their_factors():
    model = nn.Sequential(cpnb.CPConv2d(3, 4, 3, rank=2))
    assert decaying(model) == {f"0.factors.{n}" for n in range(4)}


def test_param_groups_spare_factors_on_request():
    model = nn.Sequential(
        *(nn.Linear(4, 4), cpnb.LowRankLinear(4, 4, rank=2, middle=True)),
        cpnb.CPLinear(4, 4, rank=2),
    )
    matrices = {f"1.{name}" for name in ("left", "middle", "right")}
    columns = {"2.factors.0", "2.factors.1"}
    assert decaying(model) == {"0.weight"} | matrices | columns
    assert decaying(model, factors=False) == {"0.weight"}


def test_param_groups_follow_what_a_module_declares():
    class Product(nn.Module):
        no_decay = ("left", "inner")

        def __init__(self):
            super().__init__()
            self.left = nn.Parameter(torch.ones(3, 2))
            self.right = nn.Parameter(torch.ones(3, 2))
            self.inner = nn.Linear(2, 2)

    assert decaying(nn.Sequential(Product(), nn.Linear(2, 2))) == {
        "0.right",
        "1.weight",
    }


def test_param_groups_leave_out_frozen_and_count_shared_parameters_once():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    one.bias.requires_grad_(False)
    groups = cpnb.param_groups(nn.Sequential(one, two), 0.1)
    assert [[id(p) for p in g["params"]] for g in groups] == [
        [id(one.weight)],
        [id(two.bias)],
    ]


def test_param_groups_drop_an_empty_group_and_feed_an_optimizer():
    groups = cpnb.param_groups(nn.BatchNorm1d(3), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    torch.optim.SGD(groups, lr=0.1)


def test_param_groups_move_only_what_decays_when_gradients_are_zero():
    model = nn.Sequential(nn.Linear(3, 3), cpnb.CPLinear(3, 3, rank=2))
    optimizer = torch.optim.SGD(cpnb.param_groups(model, 0.5), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = decaying(model)
    for name, p in model.named_parameters():
        expected = before[name] * (0.5 if name in moved else 1)
        assert torch.equal(p, expected)


@pytest.mark.parametrize(
    ("model", "decay", "error", "text"),
    [
        ("net", 0.1, TypeError, "model is a str"),
        (nn.Linear(2, 2), "0.1", TypeError, "weight_decay is '0.1', expected a number"),
        (nn.Linear(2, 2), True, TypeError, "weight_decay is True"),
        (nn.Linear(2, 2), -0.1, ValueError, "weight_decay is -0.1, expected a finite"),
        (nn.Linear(2, 2), float("nan"), ValueError, "weight_decay is nan"),
    ],
    ids=["model", "text", "bool", "negative", "nan"],
)
def test_param_groups_refuse_bad_input(model, decay, error, text):
    with pytest.raises(error, match=text):
        cpnb.param_groups(model, decay)
