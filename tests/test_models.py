"""The two classifiers: sizes, layer names, memory layouts, initial weights."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpnb.models import DigitsNet, LeNet

SIZES = [(DigitsNet, 8), (LeNet, 28)]


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def images_for(size, n=3, **options):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, size, size, generator=generator, **options)


def test_lenet_has_the_parameters_of_the_paper():
    assert parameter_count(LeNet()) == 1_199_882
    per_layer = [parameter_count(layer) for layer in LeNet().children()]
    assert per_layer == [320, 18_496, 0, 1_179_776, 0, 1_290]


def test_digits_net_has_the_parameters_of_its_layers():
    conv = (16 * 1 * 9 + 16) + (32 * 16 * 9 + 32)
    assert parameter_count(DigitsNet()) == conv + (512 * 64 + 64) + (64 * 10 + 10)


@pytest.mark.parametrize("network", [DigitsNet, LeNet])
def test_network_is_made_of_stock_layers_under_the_agreed_names(network):
    layers = {
        name: type(layer)
        for name, layer in network().named_children()
        if list(layer.parameters())
    }
    conv, linear = nn.Conv2d, nn.Linear
    assert layers == {"conv1": conv, "conv2": conv, "fc1": linear, "fc2": linear}


@pytest.mark.parametrize(("network", "size"), SIZES)
def test_network_agrees_in_both_memory_layouts_and_reaches_every_parameter(
    network, size
):
    model = network(7).double().eval()
    images = images_for(size, dtype=torch.float64)
    last = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    scores = model(images)
    assert scores.shape == (3, 7)
    torch.testing.assert_close(model(last.permute(0, 3, 1, 2)), scores)
    F.cross_entropy(scores, torch.arange(3)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_lenet_drops_units_only_in_training():
    model, images = LeNet(), images_for(28)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("network", [DigitsNet, LeNet])
def test_initial_weights_equal_those_of_torch_layers_built_in_the_same_order(network):
    torch.manual_seed(5)
    model = network()
    torch.manual_seed(5)
    for layer in model.children():
        if isinstance(layer, nn.Conv2d):
            size = layer.weight.shape
            stock = nn.Conv2d(size[1], size[0], layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            stock = nn.Linear(layer.in_features, layer.out_features)
        else:
            continue
        assert torch.equal(stock.weight, layer.weight)
        assert torch.equal(stock.bias, layer.bias)


@pytest.mark.parametrize("network", [DigitsNet, LeNet])
def test_generator_decides_the_weights_and_spares_the_global_state(network):
    state = torch.get_rng_state()
    models = [
        network(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("network", [DigitsNet, LeNet])
@pytest.mark.parametrize(
    ("num_classes", "error", "text"),
    [
        (1, ValueError, "num_classes is 1, expected at least 2"),
        (10.0, TypeError, "num_classes is 10.0, expected an int"),
        (True, TypeError, "num_classes is True, expected an int"),
    ],
)
def test_network_refuses_num_classes(network, num_classes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        network(num_classes)
