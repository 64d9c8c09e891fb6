"""Effective learning rates: which lengths do not matter, and how far a step turns."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb import step_report


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 1, 5, 5, generator=generator), torch.arange(20) % 3


def head(layer, *between):
    """A layer before ReLU and a plain classifier."""
    return nn.Sequential(
        layer, *between, nn.ReLU(), nn.Flatten(), nn.Linear(36, 3, bias=False)
    )


NETS = {
    "plain": (head(nn.Conv2d(1, 4, 3)), {}),
    "batch norm": (
        head(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        {"0.weight": ("row", 4)},
    ),
    "weight norm": (
        head(parametrizations.weight_norm(nn.Conv2d(1, 4, 3))),
        {"0.parametrizations.weight.original1": ("row", 4)},
    ),
    "spectral norm": (
        head(parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))),
        {"0.parametrizations.weight.original": ("whole", 1)},
    ),
    "layer norm": (
        head(nn.Conv2d(1, 4, 3, bias=False), nn.GroupNorm(1, 4)),
        {"0.weight": ("whole", 1)},
    ),
    "CP": (
        head(cpnb.CPConv2d(1, 4, 3, rank=5)),
        {f"0.factors.{n}": ("column", 5) for n in range(3)},
    ),
}


@pytest.mark.parametrize(("net", "expected"), NETS.values(), ids=NETS)
def test_report_finds_the_parts_whose_length_does_not_matter(batch, net, expected):
    report = step_report(net, batch, lr=0.1)
    found = {n: (s.part, len(s.norms)) for n, s in report.parameters.items()}
    assert found == expected


def test_rates_are_the_learning_rate_over_the_squared_norms(batch):
    net = NETS["CP"][0]
    step = step_report(net, batch, lr=0.3).parameters["0.factors.1"]
    norms = [math.sqrt(sum(x**2 for x in c)) for c in net[0].factors[1].T.tolist()]
    assert step.norms == pytest.approx(norms)
    assert step.rates == pytest.approx([0.3 / n**2 for n in norms])
    assert step.typical == pytest.approx(sorted(step.rates)[2])


def test_equal_effective_rates_turn_a_column_by_equal_angles(batch):
    images, labels = batch[0].double(), batch[1]
    angles = []
    for length in (1.0, 4.0):
        net = nn.Sequential(nn.Flatten(), cpnb.CPLinear(25, 3, rank=1)).double()
        torch.manual_seed(0)
        net[1].reset_parameters()
        factor = net[1].factors[1]
        with torch.no_grad():
            factor.mul_(length)
        lr = 0.01 * length**2
        rate = step_report(net, (images, labels), lr).parameters["1.factors.1"].typical
        assert rate == pytest.approx(0.01)
        F.cross_entropy(net(images), labels).backward()
        turned = factor.detach() - lr * factor.grad
        cosine = F.cosine_similarity(turned, factor.detach(), dim=0)
        angles.append(cosine.clamp(max=1).acos())
    assert_close(*angles, rtol=1e-6, atol=0)


def test_growth_compares_columns_with_an_earlier_report(batch):
    net = NETS["CP"][0]
    start = step_report(net, batch, 0.1)
    with torch.no_grad():
        net[0].factors[0].mul_(3)
    growth = step_report(net, batch, 0.1).growth(start)
    assert growth == pytest.approx(
        {"0.factors.0": 3.0, "0.factors.1": 1.0, "0.factors.2": 1.0}
    )
    with pytest.raises(ValueError, match=r"start has the parts .* at one rank"):
        step_report(NETS["plain"][0], batch, 0.1).growth(start)


def test_report_leaves_the_model_as_it_was(batch):
    net = NETS["batch norm"][0].train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    step_report(net, batch, 0.1)
    assert net.training and net[1].training and net[1].track_running_stats
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


def test_report_is_a_table(batch):
    report = step_report(NETS["CP"][0], batch, 0.1)
    lines = str(report).splitlines()
    assert len(lines) == 4 and "5 columns" in lines[1]
    assert report._repr_html_().count("<tr>") == 4
    assert report.to_rows()[0]["parts"] == 5
    assert str(step_report(NETS["plain"][0], batch, 0.1)).count("\n") == 0


def test_zero_part_has_an_infinite_rate(batch):
    net = head(cpnb.CPConv2d(1, 4, 3, rank=2))
    with torch.no_grad():
        net[0].factors[0][:, 0] = 0
    report = step_report(net, batch, 0.1)
    assert report.parameters["0.factors.0"].rates[0] == math.inf


def test_report_refuses_bad_arguments(batch):
    with pytest.raises(ValueError, match="lr is 0, expected a finite number above 0"):
        step_report(NETS["plain"][0], batch, 0)
    with pytest.raises(TypeError, match="model is a list"):
        step_report([], batch, 0.1)
