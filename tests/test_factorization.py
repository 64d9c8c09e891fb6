"""Whole models in low-rank form: budgets, what stays dense, exactness, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb import ParameterRatio, factorize
from cpnb.lowrank_base import LowRankLayer
from cpnb.rules import FitRank


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def low_rank(model):
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LowRankLayer)
    }


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_factorize_spends_a_share_of_all_parameters_and_hardly_less(ratio, middle):
    net = cpnb.ResNet(20)
    small = factorize(net, rank=ParameterRatio(ratio), middle=middle)
    budget = ratio * parameters(net)
    held = parameters(small)
    assert held <= budget
    # The bisection stops where one more step of the common fraction is too much; the
    # layers of one stage step together.
    layers = low_rank(small).values()
    largest = max(
        sum(
            (p.numel() // layer.rank)
            for layer in layers
            if layer.rank == rank
            for p in layer.parameters()
        )
        for rank in {layer.rank for layer in layers}
    )
    assert held > budget - 3 * largest
    shares = [layer.rank / layer.break_even_rank for layer in layers]
    steps = [1 / layer.break_even_rank for layer in layers]
    assert max(shares) - min(shares) <= max(steps)


def test_factorize_leaves_the_first_and_the_last_layer_dense_unless_told():
    net = cpnb.DigitsNet()
    assert set(low_rank(factorize(net, rank=0.5))) == {"conv2", "fc1"}
    everything = factorize(net, rank=0.5, skip=())
    assert set(low_rank(everything)) == {"conv1", "conv2", "fc1", "fc2"}
    named = factorize(net, rank=0.5, skip=("conv2", "fc2"))
    assert set(low_rank(named)) == {"conv1", "fc1"}
    chosen = factorize(net, rank=0.5, skip=lambda name, layer: "fc" in name)
    assert set(low_rank(chosen)) == {"conv1", "conv2"}
    assert cpnb.first_and_last(net) == ("conv1", "fc2")
    assert cpnb.first_and_last(nn.Linear(2, 2)) == ("",)


def test_factorize_at_full_rank_keeps_the_function_of_a_trained_network():
    net = cpnb.ResNet(8).double()
    cpnb.fit(
        net,
        (torch.randn(64, 3, 32, 32).double(), torch.arange(64) % 10),
        epochs=1,
        progress=False,
    )
    before = copy.deepcopy(net.state_dict())
    full = {
        name: min(layer.out_channels, layer.in_channels) * 3
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d) and name != "conv1"
    }
    images = torch.randn(4, 3, 32, 32).double()
    for middle in (False, True):
        exact = factorize(net, rank=full, middle=middle).eval()
        assert len(low_rank(exact)) == 6
        assert_close(exact(images), net.eval()(images))
        assert_close(cpnb.to_dense(exact)(images), net(images))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_factorize_starts_in_either_way_reproducibly():
    net = cpnb.DigitsNet(generator=torch.Generator().manual_seed(0))
    spectral = factorize(net, rank=4)
    assert torch.equal(spectral.fc1.weight, factorize(net, rank=4).fc1.weight)
    kaiming = [
        factorize(
            net, rank=4, init="kaiming", generator=torch.Generator().manual_seed(n)
        )
        for n in (1, 1, 2)
    ]
    assert torch.equal(kaiming[0].fc1.weight, kaiming[1].fc1.weight)
    assert not torch.equal(kaiming[0].fc1.weight, kaiming[2].fc1.weight)
    assert torch.equal(kaiming[0].fc1.bias, net.fc1.bias)


def test_factorize_takes_a_rule_and_a_mapping():
    net = cpnb.DigitsNet()
    small = factorize(net, rank=FitRank(0.5))
    for name, layer in low_rank(small).items():
        dense = net.get_submodule(name).weight
        assert cpnb.relative_error(dense, layer.weight) <= 0.5
    mixed = factorize(net, rank={"conv2": FitRank(0.9), "fc1": 0.25})
    assert mixed.fc1.rank == round(0.25 * mixed.fc1.break_even_rank)


def test_factorize_names_the_layer_whose_rank_it_clips():
    with pytest.warns(UserWarning, match=r"of layer 'conv2' is a \(96, 48\)") as caught:
        small = factorize(cpnb.DigitsNet(), rank=60)
    assert caught[0].filename == __file__
    assert (small.conv2.rank, small.fc1.rank) == (48, 60)


def test_factorize_takes_a_single_layer_without_skip():
    assert factorize(nn.Linear(6, 4), rank=2, skip=()).rank == 2


def tied():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[2].weight = model[1].weight
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (nn.ReLU(), {"rank": 1}, ValueError, "no convolution or linear layer"),
        (nn.Linear(4, 4), {"rank": 1}, ValueError, r"skip=\(\) takes them in"),
        (tied(), {"rank": 1}, ValueError, "shares a parameter"),
        (
            nn.Sequential(*(nn.Conv1d(3, 3, 3) for _ in range(3))),
            {"rank": 1},
            TypeError,
            "layer '1' is a Conv1d: expected a Conv2d or a Linear. To leave it dense",
        ),
        (cpnb.DigitsNet(), {"rank": 1, "skip": "fc9"}, ValueError, "skip names"),
        (
            cpnb.DigitsNet(),
            {"rank": {"conv2": 1, "fc2": 1}},
            ValueError,
            r"rank lacks \['fc1'\] and has unknown \['fc2'\]",
        ),
        (
            cpnb.DigitsNet(),
            {"rank": ParameterRatio(0.01)},
            ValueError,
            "Expected a ratio of at least 0.0425",
        ),
        (
            cpnb.DigitsNet(),
            {"rank": cpnb.FlopRatio(0.5, (1, 1, 8, 8))},
            TypeError,
            "spends a budget",
        ),
        ("net", {"rank": 1}, TypeError, "model is a str"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_factorize_refuses_bad_input_with_a_clear_error(model, options, error, text):
    with pytest.raises(error, match=text):
        factorize(model, **options)
