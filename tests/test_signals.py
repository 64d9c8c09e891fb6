"""Variance of activations and gradients against a forward and backward by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cpnb
from cpnb import signal_report


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 2, 5, 5, generator=generator, dtype=torch.float64)
    return images, torch.arange(7) % 3


def make_net(*, inplace=False, norm=False):
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(inplace),
        nn.Flatten(),
        nn.Dropout(0.5),
        cpnb.CPLinear(36, 3, rank=2),
    ]
    return nn.Sequential(*layers).double()


def by_hand(net, images, labels):
    """Population variance of both layers' outputs and of the gradients there."""
    net = net.eval()
    first = net[0](images)
    scores = net[5](F.relu(net[1](first)).flatten(1))
    loss = F.cross_entropy(scores, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [first, scores])
    return {
        name: (value.var(correction=0).item(), gradient.var(correction=0).item())
        for name, value, gradient in zip("05", (first, scores), gradients, strict=True)
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_report_equals_variances_by_hand(batch, inplace, chunk_size):
    net = make_net(inplace=inplace)
    report = signal_report(net, batch, chunk_size=chunk_size)
    for name, expected in by_hand(net, *batch).items():
        found = report.layers[name]
        assert (found.activation, found.gradient) == pytest.approx(expected)


def test_report_adds_up_the_calls_of_a_shared_layer(batch):
    layer = nn.Linear(3, 3, dtype=torch.float64)
    images = batch[0].flatten(1)[:, :3]
    found = signal_report(nn.Sequential(layer, layer), (images, batch[1])).layers["0"]
    both = torch.cat([layer(images), layer(layer(images))])
    assert found.activation == pytest.approx(both.var(correction=0).item())


def test_report_leaves_the_model_as_it_was(batch):
    net = make_net(norm=True)
    net[4].eval()
    for parameter in net[5].parameters():
        parameter.requires_grad_(False)
    net(batch[0]).sum().backward()
    gradient = net[0].weight.grad.clone()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    for batch_statistics in (False, True):
        signal_report(net, batch, batch_statistics=batch_statistics)
    assert [module.training for module in net.modules()] == flags
    assert net[1].track_running_stats
    assert torch.equal(net[0].weight.grad, gradient)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_report_removes_its_hooks_after_an_error(batch):
    def fail(module, inputs):
        if inputs[0].requires_grad:  # the measurement, not the check of the data
            raise ArithmeticError("no")

    net = make_net()
    net[5].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="no"):
        signal_report(net, batch)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


def test_batch_statistics_are_those_of_training(batch):
    net = make_net(norm=True)
    net[4].p = 0.0
    with torch.no_grad():
        net[0].weight.mul_(50)
    report = signal_report(net, batch, batch_statistics=True)
    scores = net.train()(batch[0])
    assert report.layers["5"].activation == pytest.approx(
        scores.var(correction=0).item()
    )
    recorded = signal_report(make_net(norm=True), batch).layers["5"].activation
    assert recorded != pytest.approx(report.layers["5"].activation)


def test_batch_statistics_take_in_an_image_left_over(batch):
    images, labels = batch[0].flatten(1), batch[1]
    net = nn.Sequential(nn.Linear(50, 3), nn.BatchNorm1d(3)).double()
    found = signal_report(net, (images, labels), batch_statistics=True, chunk_size=3)
    assert found.layers["0"].activation == pytest.approx(
        net[0](images).var(correction=0).item()
    )


def test_report_says_nan_where_nothing_passes(batch):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(50, 3), nn.Linear(2, 2)

        def forward(self, images):
            return self.used(images.flatten(1))

    report = signal_report(Idle().double(), batch)
    assert math.isnan(report.layers["idle"].activation)
    assert math.isnan(report.layers["idle"].gradient)
    assert [row["layer"] for row in report.to_rows()] == ["used", "idle"]
    assert "activation variance" in str(report).splitlines()[0]
    assert report._repr_html_().count("<tr>") == 3


def test_report_refuses_bad_arguments(batch):
    with pytest.raises(TypeError, match="model is a function"):
        signal_report(lambda x: x, batch)
    with pytest.raises(ValueError, match="without a layer whose weight"):
        signal_report(nn.Flatten(), batch)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        signal_report(make_net(), batch, chunk_size=0)
