"""Budgets: the largest common fraction of break-even that stays within them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cpnb
from cpnb.budgets import FlopRatio, ParameterRatio
from cpnb.ranks import cp_parameters


class Net(nn.Module):
    """Strides, groups, one input channel, batch norm, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.point = nn.Conv2d(16, 16, 1, stride=2, padding_mode="circular", padding=1)
        self.twice = nn.Conv2d(16, 16, (3, 1), padding="same", padding_mode="reflect")
        self.head = nn.Linear(16 * 9, 10)

    def forward(self, images):
        hidden = self.down(self.norm(self.stem(images)).relu()).relu()
        hidden = self.twice(self.twice(self.point(hidden)).relu())
        return self.head(hidden.flatten(1))


NAMES = ["stem", "down", "point", "twice", "head"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model, shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(shape))
    return counter.get_total_flops()


def as_chains(model):
    for layer in cpnb.cp_layers(model).values():
        layer.forward_mode = "chain"
    return model


def every_share(model, names):
    """All rank tables that one fraction of break-even in (0, 1] can give."""
    even = {n: cpnb.break_even_rank(model.get_submodule(n).weight.shape) for n in names}
    steps = {(k + 0.5) / e for e in even.values() for k in range(e)} | {1.0}
    fractions = sorted(
        {min(1.0, s * (1 + tilt)) for s in steps for tilt in (-1e-9, 0, 1e-9)}
    )
    return [
        {n: max(1, round(fraction * e)) for n, e in even.items()}
        for fraction in fractions
    ]


@pytest.mark.parametrize("ratio", [0.13, 0.3, 0.55, 0.8, 1.0])
def test_parameter_ratio_equals_brute_force_and_keeps_within_budget(ratio):
    model = Net()
    small = cpnb.canonicalize(model, rank=ParameterRatio(ratio))
    assert parameters(small) <= ratio * parameters(model)
    found = {name: layer.rank for name, layer in cpnb.cp_layers(small).items()}

    def spent(ranks):
        copy = cpnb.canonicalize(model, rank=ranks)
        return parameters(copy)

    within = [
        r for r in every_share(model, NAMES) if spent(r) <= ratio * parameters(model)
    ]
    assert found == within[-1]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_flop_ratio_equals_brute_force_and_keeps_within_budget(ratio):
    model, shape = Net(), (2, 1, 8, 8)
    budget = ratio * flops(model, shape)
    small = as_chains(cpnb.canonicalize(model, rank=FlopRatio(ratio, shape)))
    assert flops(small, shape) <= budget
    found = {name: layer.rank for name, layer in cpnb.cp_layers(small).items()}
    shares = every_share(model, NAMES)
    # Counting is slow: look only for the first rank table beyond the one found.
    following = shares[max(n for n, r in enumerate(shares) if r == found) + 1 :]
    if following:
        larger = as_chains(cpnb.canonicalize(model, rank=following[0]))
        assert flops(larger, shape) > budget
    else:
        assert found == shares[-1]


def test_flop_ratio_does_not_depend_on_the_batch():
    one, many = (FlopRatio(0.4, (n, 1, 8, 8)).counts(Net(), NAMES) for n in (1, 5))
    assert one == many


def test_flop_ratio_takes_layers_that_get_their_input_by_keyword():
    class Keyword(Net):
        def forward(self, images):
            hidden = self.down(self.norm(self.stem(input=images)).relu()).relu()
            hidden = self.twice(input=self.twice(self.point(hidden)).relu())
            return self.head(input=hidden.flatten(1))

    rule = FlopRatio(0.4, (1, 1, 8, 8))
    assert rule.counts(Keyword(), NAMES) == rule.counts(Net(), NAMES)


def test_budgets_count_what_is_left_alone():
    model = Net()
    for rule in (ParameterRatio(0.5), FlopRatio(0.5, (1, 1, 8, 8))):
        every = rule.counts(model, NAMES)
        fewer = rule.counts(model, [name for name in NAMES if name != "down"])
        # The layer that stays dense takes more than its share from the others.
        assert all(rank <= every[name] for name, rank in fewer.items())
        assert sum(fewer.values()) < sum(every.values()) - every["down"]


def test_parameter_ratio_of_one_layer_is_exact():
    layer = nn.Conv2d(16, 32, 3)
    new = cpnb.from_layer(layer, rank=ParameterRatio(0.25), init="unified")
    total = 16 * 32 * 9 + 32
    assert parameters(new) <= 0.25 * total
    assert cp_parameters((32, 16, 3, 3), new.rank + 1) + 32 > 0.25 * total


def test_budgets_leave_the_model_as_it_was():
    model = Net().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    FlopRatio(0.5, (1, 1, 8, 8)).counts(model, NAMES)
    ParameterRatio(0.5).counts(model, NAMES)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_canonicalize_with_a_budget_keeps_layers_already_in_cp_form():
    once = cpnb.canonicalize(Net(), rank=3, skip=NAMES[1:])
    twice = cpnb.canonicalize(once, rank=ParameterRatio(0.5))
    assert twice.stem.rank == 3
    assert parameters(twice) <= 0.5 * parameters(once)
    thrice = cpnb.canonicalize(twice, rank=ParameterRatio(0.1))
    assert parameters(thrice) == parameters(twice)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ParameterRatio(0.0), ValueError, r"ratio is 0.0, expected a share"),
        (lambda: ParameterRatio(1.1), ValueError, "ratio is 1.1"),
        (lambda: ParameterRatio(True), ValueError, "ratio is True"),
        (lambda: FlopRatio(-1, (1, 3)), ValueError, "ratio is -1"),
        (
            lambda: cpnb.CPLinear(4, 3, rank=ParameterRatio(0.5)),
            TypeError,
            r"ParameterRatio\(ratio=0.5\), which spends a budget.*cpnb.canonicalize",
        ),
        (
            lambda: cpnb.canonicalize(Net(), rank=ParameterRatio(0.01)),
            ValueError,
            r"a budget of \d+ of [\d,]+ parameters, but rank 1 in each of 5 layers "
            r"takes \d+ .* Expected a ratio of at least 0.\d{4}",
        ),
        (
            lambda: cpnb.canonicalize(Net(), rank=FlopRatio(1e-4, (1, 1, 8, 8))),
            ValueError,
            "FLOPs, but rank 1 in each of 5 layers",
        ),
        (
            lambda: cpnb.canonicalize(Net(), rank=FlopRatio(0.5, (1, 3, 8, 8))),
            ValueError,
            r"input_shape is \(1, 3, 8, 8\), which the model does not take: ",
        ),
    ],
)
def test_budgets_refuse_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_least_ratio_named_by_the_refusal_is_enough():
    with pytest.raises(ValueError, match="at least") as caught:
        cpnb.canonicalize(Net(), rank=ParameterRatio(0.01))
    least = float(str(caught.value).split()[-1].rstrip("."))
    small = cpnb.canonicalize(Net(), rank=ParameterRatio(least + 1e-4))
    assert {layer.rank for layer in cpnb.cp_layers(small).values()} == {1}
