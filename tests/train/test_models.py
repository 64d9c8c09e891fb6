"""The classifiers: sizes, layer names, memory layouts, initial weights."""

import pytest
import torch
from shared import count, randn, seeded
from torch import nn
from torch.nn import functional as F

from cpnb.train.models import DigitsNet, LeNet
from networks import AlexNet, LeNet5, ResNet, SmallConvNet

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
SIZES = [(DigitsNet, (1, 8, 8)), (LeNet, GREY), (AlexNet, COLOUR), (ResNet, COLOUR)]
SIZES += [(LeNet5, GREY), (SmallConvNet, COLOUR)]


@pytest.mark.parametrize(
    ("network", "per_layer"),
    [
        (DigitsNet, [160, 4640, 32832, 650]),
        (LeNet, [320, 18496, 1179776, 1290]),
        (LeNet5, [156, 2416, 48120, 10164, 850]),
        (SmallConvNet, [448, 2320, 4640, 18496, 2570]),
        (AlexNet, [1792, 110784, 663936, 884992, 590080, 4195328, 524800, 5130]),
    ],
)
def test_network_has_the_parameters_of_the_paper(network, per_layer):
    layers = [layer for layer in network().children() if count(layer)]
    assert [count(layer) for layer in layers] == per_layer
    assert all(type(layer) in (nn.Conv2d, nn.Linear) for layer in layers)


# 0.27 and 0.46 million in the paper.
@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154)])
def test_resnet_has_the_parameters_of_the_paper(depth, parameters):
    assert count(ResNet(depth)) == parameters
    wide = ResNet(depth, width=2)
    convs = [layer for layer in wide.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) + 1 == depth
    assert [convs[n].out_channels for n in (0, depth // 2, -1)] == [32, 64, 128]


def test_resnet_shortcut_takes_every_second_pixel_and_appends_channels_of_zeros():
    block = ResNet(8).eval().stage2[0]
    nn.init.zeros_(block.bn2.weight)  # the branch gives nothing
    hidden = randn(3, 16, 6, 6, dtype=torch.float32).relu()
    out = block(hidden)
    assert torch.equal(out[:, :16], hidden[:, :, ::2, ::2])
    assert out.shape == (3, 32, 3, 3)
    assert not out[:, 16:].any()


@pytest.mark.parametrize("network", [each for each, _ in SIZES])
def test_generator_gives_the_weights_of_torch_layers_made_in_the_same_order(network):
    state = torch.get_rng_state()
    model = network(generator=seeded(5))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            drawn = [parameter.clone() for parameter in layer.parameters()]
            if layer.bias is None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                layer.reset_parameters()
            assert all(map(torch.equal, drawn, layer.parameters()))


@pytest.mark.parametrize(("network", "shape"), SIZES)
def test_network_agrees_in_both_layouts_and_reaches_every_parameter(network, shape):
    model = network(num_classes=7).double().eval()
    images = randn(3, *shape)
    scores = model(images)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), scores)
    F.cross_entropy(scores, torch.tensor([0, 3, 6])).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("network", "shape"), SIZES[1:3])
def test_network_drops_units_only_in_training(network, shape):
    model, images = network(), randn(3, *shape, dtype=torch.float32)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
