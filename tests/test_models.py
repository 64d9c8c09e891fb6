"""The classifiers: sizes, layer names, memory layouts, initial weights."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpnb.cp import relative_error
from cpnb.models import AlexNet, DigitsNet, LeNet
from cpnb.resnet import VGG, ResNet
from cpnb.surgery import canonicalize, cp_layers, to_dense

NETWORKS = [DigitsNet, LeNet, AlexNet, ResNet, VGG]
SIZES = [
    (DigitsNet, (1, 8, 8)),
    (LeNet, (1, 28, 28)),
    (AlexNet, (3, 32, 32)),
    (ResNet, (3, 32, 32)),
    (VGG, (3, 32, 32)),
]


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def images_for(shape, n=3, **options):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=generator, **options)


def test_lenet_has_the_parameters_of_the_paper():
    assert parameter_count(LeNet()) == 1_199_882
    per_layer = [parameter_count(layer) for layer in LeNet().children()]
    assert per_layer == [320, 18_496, 0, 1_179_776, 0, 1_290]


def test_digits_net_has_the_parameters_of_its_layers():
    conv = (16 * 1 * 9 + 16) + (32 * 16 * 9 + 32)
    assert parameter_count(DigitsNet()) == conv + (512 * 64 + 64) + (64 * 10 + 10)


def test_alexnet_has_the_parameters_of_the_paper():
    assert parameter_count(AlexNet()) == 6_976_842
    per_layer = [parameter_count(layer) for layer in AlexNet().children()]
    convs = [1_792, 110_784, 663_936, 884_992, 590_080]
    assert per_layer == [*convs, 0, 4_195_328, 0, 524_800, 5_130]


@pytest.mark.parametrize(("depth", "width"), [(8, 1), (20, 2), (32, 1), (32, 2)])
def test_resnet_has_the_parameters_of_its_layers(depth, width):
    stages = [16 * width, 32 * width, 64 * width]
    sizes, before = [(3, stages[0])], stages[0]
    for channels in stages:
        sizes += [(before, channels)]
        sizes += [(channels, channels)] * ((depth - 2) // 3 - 1)
        before = channels
    expected = sum(9 * i * o + 2 * o for i, o in sizes) + before * 5 + 5
    model = ResNet(depth, width, 5)
    assert parameter_count(model) == expected
    convs = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) + 1 == depth


def test_resnet_shortcut_takes_every_second_pixel_and_appends_channels_of_zeros():
    model = ResNet(8).eval()
    block = model.stage2[0]
    nn.init.zeros_(block.bn2.weight)  # the branch gives nothing
    hidden = images_for((16, 6, 6)).relu()
    out = block(hidden)
    assert torch.equal(out[:, :16], hidden[:, :, ::2, ::2])
    assert out.shape == (3, 32, 3, 3)
    assert not out[:, 16:].any()


@pytest.mark.parametrize("network", [ResNet, VGG])
def test_kernels_before_batch_norm_have_the_variance_of_he(network):
    model = network(generator=torch.Generator().manual_seed(0))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            # The sample variance of n normal numbers has a relative standard
            # deviation of sqrt(2/n); five of them.
            tolerance = 5 * (2 / layer.weight.numel()) ** 0.5
            ratio = layer.weight.square().mean().item() * fan_in / 2
            assert ratio == pytest.approx(1, abs=tolerance), name
            assert layer.bias is None


@pytest.mark.parametrize(("network", "shape"), SIZES)
def test_network_traces_symbolically(network, shape):
    model, images = network().eval(), images_for(shape)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


@pytest.mark.parametrize(("network", "shape"), SIZES)
def test_network_converts_to_cp_form_and_back(network, shape):
    model, images = network(num_classes=3).eval(), images_for(shape)
    small = canonicalize(model, rank=2)
    weighted = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert list(cp_layers(small)) == weighted
    scores = small(images)
    assert scores.shape == (3, 3)
    assert relative_error(to_dense(small)(images), scores) < 1e-5


@pytest.mark.parametrize("network", [DigitsNet, LeNet])
def test_network_is_made_of_stock_layers_under_the_agreed_names(network):
    layers = {
        name: type(layer)
        for name, layer in network().named_children()
        if list(layer.parameters())
    }
    conv, linear = nn.Conv2d, nn.Linear
    assert layers == {"conv1": conv, "conv2": conv, "fc1": linear, "fc2": linear}


@pytest.mark.parametrize(("network", "shape"), SIZES)
def test_network_agrees_in_both_memory_layouts_and_reaches_every_parameter(
    network, shape
):
    model = network(num_classes=7).double().eval()
    images = images_for(shape, dtype=torch.float64)
    last = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    scores = model(images)
    assert scores.shape == (3, 7)
    torch.testing.assert_close(model(last.permute(0, 3, 1, 2)), scores)
    F.cross_entropy(scores, torch.arange(3)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("network", "shape"), [(LeNet, (1, 28, 28)), (AlexNet, (3, 32, 32))]
)
def test_network_drops_units_only_in_training(network, shape):
    model, images = network(), images_for(shape)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("network", [DigitsNet, LeNet, AlexNet])
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


@pytest.mark.parametrize("network", NETWORKS)
def test_generator_decides_the_weights_and_spares_the_global_state(network):
    state = torch.get_rng_state()
    models = [
        network(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    layers = models[0].named_modules()
    drawn = [
        f"{name}.weight"
        for name, layer in layers
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("network", NETWORKS)
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
        network(num_classes=num_classes)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"depth": 21}, ValueError, "depth is 21, expected 6·blocks + 2"),
        ({"depth": 2}, ValueError, "depth is 2, expected at least 8"),
        ({"depth": 20.0}, TypeError, "depth is 20.0, expected an int"),
        ({"width": 0}, ValueError, "width is 0, expected at least 1"),
    ],
)
def test_resnet_refuses(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ResNet(**arguments)
