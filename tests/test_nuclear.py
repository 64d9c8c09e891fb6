"""Norms of factorized kernels against those of the multiplied-out ones."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb import factor_norms
from cpnb.matrices import unfold


def shaken(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("middle", [False, True])
def test_norms_are_those_of_the_unfolded_kernel_and_the_bound_holds(middle):
    layer = shaken(
        cpnb.LowRankConv2d(
            *(4, 6, 3), groups=2, rank=3, middle=middle, dtype=torch.float64
        )
    )
    norms = factor_norms(layer, lr=0.5)[""]
    matrices = unfold(layer.weight.detach(), 2)
    nuclear = sum(torch.linalg.matrix_norm(m, "nuc") for m in matrices)
    square = layer.weight.square().sum().item()
    assert_close(norms.nuclear, nuclear.item())
    assert_close(norms.frobenius, math.sqrt(square))
    assert_close(norms.effective_step, 0.5 / square)
    assert norms.bound > norms.nuclear * 1.01


def test_bound_is_half_of_what_ordinary_decay_presses_on():
    layer = shaken(cpnb.LowRankLinear(7, 5, rank=3, bias=False))
    expected = sum(p.square().sum().item() for p in layer.parameters()) / 2
    assert factor_norms(layer)[""].bound == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("middle", [False, True])
def test_bound_is_reached_after_spectral_initialisation_only(middle):
    for init in ("spectral", "kaiming"):
        layer = cpnb.LowRankConv2d(4, 6, 3, rank=3, middle=middle, init=init)
        norms = factor_norms(layer)[""]
        reached = norms.bound / norms.nuclear < 1 + 1e-5
        assert reached == (init == "spectral")


def test_bound_of_a_cp_layer_is_the_sum_of_its_component_weights():
    layer = shaken(cpnb.CPConv2d(4, 6, 3, rank=5, dtype=torch.float64))
    norms = factor_norms(layer)[""]
    assert_close(norms.bound, (layer.scale * layer.lam).abs().sum().item())
    wide = layer.weight.detach().flatten(1)
    assert_close(norms.nuclear, torch.linalg.matrix_norm(wide, "nuc").item())
    assert norms.bound > norms.nuclear


def test_norms_come_by_layer_name_and_serve_a_callback():
    net = cpnb.factorize(cpnb.DigitsNet(), rank=4)
    log = []
    cpnb.fit(
        net,
        cpnb.load_data("digits"),
        epochs=2,
        callback=lambda epoch, model, record: log.append(factor_norms(model)),
        progress=False,
    )
    assert [list(norms) for norms in log] == [["conv2", "fc1"]] * 2
    assert log[0]["fc1"].nuclear < log[0]["fc1"].bound


@pytest.mark.parametrize("make", [cpnb.LowRankLinear, cpnb.CPLinear])
def test_norms_of_zero_and_broken_kernels_and_of_nothing(make):
    layer = make(3, 3, rank=1)
    nn.init.zeros_(next(layer.parameters()))
    assert factor_norms(layer)[""].effective_step == math.inf
    nn.init.constant_(next(layer.parameters()), math.nan)
    assert math.isnan(factor_norms(layer)[""].nuclear)
    with pytest.raises(ValueError, match="without low-rank or CP layers"):
        factor_norms(nn.Linear(2, 2))
