"""The proximal ℓ1 step: soft thresholding, exact zeros, and their removal."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb import ProximalL1, nonzero_ranks, truncate


def step(layer, mu, lr, **options):
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    hook = ProximalL1(mu)
    hook.start(layer, optimizer)
    hook.after_step(layer, optimizer, 0)


@pytest.mark.parametrize("signed", [True, False])
def test_step_moves_lam_towards_zero_and_stops_there(signed):
    layer = cpnb.CPLinear(4, 4, rank=5, signed=signed, dtype=torch.float64)
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([1.0, -1.0, 0.05, -0.05, 0.0]))
    step(layer, mu=0.5, lr=0.2)  # threshold lr · μ = 0.1
    expected = torch.tensor([0.9, -0.9, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert_close(layer.lam.detach(), expected)
    assert layer.lam.count_nonzero() == 2


def test_step_is_the_proximal_operator_of_the_penalty():
    """The new λ minimises |x − λ|²/2 + lr·μ·|σ|·|x|, found here on a fine grid."""
    layer = cpnb.CPLinear(4, 4, rank=6, dtype=torch.float64)
    with torch.no_grad():
        layer.lam.copy_(torch.linspace(-0.4, 0.5, 6))
        layer.scale.fill_(-1.5)
    before = layer.lam.detach().clone()
    step(layer, mu=0.5, lr=0.2)
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    cost = (grid - before[:, None]).square() / 2 + 0.2 * 0.5 * 1.5 * grid.abs()
    assert_close(layer.lam.detach(), grid[cost.argmin(1)], rtol=0, atol=1e-4)


def test_step_leaves_a_frozen_lam_alone():
    layer = cpnb.CPLinear(4, 4, rank=2)
    before = layer.lam.detach().clone()
    optimizer = torch.optim.SGD(layer.factors.parameters(), lr=1.0)
    ProximalL1(1.0).after_step(layer, optimizer, 0)
    assert torch.equal(layer.lam, before)


def test_penalty_in_fit_makes_zeros_that_truncation_removes_without_a_trace():
    generator = torch.Generator().manual_seed(0)
    net = cpnb.canonicalize(cpnb.DigitsNet(generator=generator), generator=generator)
    cpnb.fit(
        *(net, cpnb.load_data("digits")),
        epochs=8,
        lr=0.01,
        hooks=[ProximalL1(1.0)],
        progress=False,
    )
    ranks, whole = nonzero_ranks(net), cpnb.cp_layers(net)["conv2"].rank
    assert 1 < ranks["conv2"] < whole / 2
    small = truncate(net, rank=ranks).double().eval()
    assert small.conv2.rank == ranks["conv2"]
    images = torch.rand(50, 1, 8, 8, dtype=torch.float64)
    assert_close(small(images), net.double().eval()(images), rtol=1e-12, atol=1e-12)


def test_nonzero_ranks_keep_one_component_of_a_layer_without_any():
    net = nn.Sequential(cpnb.CPLinear(4, 4, rank=3), cpnb.CPLinear(4, 4, rank=2))
    nn.init.zeros_(net[0].lam)
    assert nonzero_ranks(net) == {"0": 1, "1": 2}
    small = truncate(net, rank=nonzero_ranks(net))
    rows = torch.randn(3, 4)
    assert_close(small(rows), net(rows))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ProximalL1(-1), ValueError, "mu is -1, expected a finite number >= 0"),
        (lambda: ProximalL1(None), TypeError, "mu is None"),
        (lambda: nonzero_ranks(nn.Linear(2, 2)), ValueError, "without CP layers"),
        (lambda: step(nn.Linear(2, 2), 0.1, 0.1), ValueError, "without CP layers"),
    ],
)
def test_proximal_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()
