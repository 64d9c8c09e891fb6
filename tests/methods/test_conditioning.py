"""Weight conditioning against loops, weight norm and the dense kernel of CP layers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb.methods import normalize, remove_normalizer

MODES = ["row", "column", "row-column"]
DENSE = {
    "conv1d": lambda: nn.Conv1d(3, 5, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, (3, 2)),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "linear": lambda: nn.Linear(6, 4),
    "tall": lambda: nn.Linear(3, 8),
}
CP = {
    "conv1d": (lambda: cpnb.CPConv1d(3, 5, 3, rank=4), (2, 3, 9)),
    "conv2d": (lambda: cpnb.CPConv2d(3, 4, (3, 2), rank=4), (2, 3, 6, 5)),
    "conv3d": (lambda: cpnb.CPConv3d(2, 3, 2, rank=3), (2, 2, 4, 4, 4)),
    "grouped": (lambda: cpnb.CPConv2d(4, 6, 3, groups=2, rank=3), (2, 4, 5, 5)),
    "one channel": (lambda: cpnb.CPConv2d(1, 4, 3, rank=3), (2, 1, 5, 5)),
    "one output": (lambda: cpnb.CPConv2d(3, 1, 3, rank=3), (2, 3, 5, 5)),
    "one weight": (lambda: cpnb.CPConv2d(1, 1, 1, rank=2), (2, 1, 5, 5)),
    "linear": (lambda: cpnb.CPLinear(6, 4, rank=3), (2, 6)),
    "unsigned": (lambda: cpnb.CPLinear(6, 4, rank=3, signed=False), (2, 6)),
}


@torch.no_grad()
def scattered(layer):
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return layer


def spec_rows(matrix):
    for row in matrix:
        norm = math.sqrt(sum(v * v for v in row))
        row[:] = [v / norm for v in row]


def spec_columns(matrix, length=1.0):
    for j in range(len(matrix[0])):
        norm = math.sqrt(sum(row[j] ** 2 for row in matrix))
        for row in matrix:
            row[j] *= length / norm


def spec_conditioned(kernel, mode="row", groups=1):
    """Equilibrate, with loops, the matrix of each group; the gain is √2."""
    result = []
    for part in kernel.detach().chunk(groups):
        matrix = [row.flatten().tolist() for row in part]
        if mode == "row":
            spec_rows(matrix)
        elif mode == "column":
            spec_columns(matrix, math.sqrt(len(matrix) / len(matrix[0])))
        else:
            for _ in range(3):
                spec_columns(matrix)
                spec_rows(matrix)
        result += matrix
    return math.sqrt(2) * torch.tensor(result, dtype=torch.float64).view(kernel.shape)


# --- stock layers ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DENSE)
def test_conditioned_kernel_equals_loops(kind, mode):
    source = DENSE[kind]().double()
    layer = normalize(source, "conditioned", mode=mode)
    expected = spec_conditioned(source.weight, mode, getattr(source, "groups", 1))
    assert_close(layer.weight, expected)
    rows = layer.weight.flatten(1).square().sum(1)
    assert rows.mean().item() == pytest.approx(2, rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_conditioned_has_the_gradient_of_finite_differences(mode):
    layer = normalize(nn.Linear(4, 3).double(), "conditioned", mode=mode)
    module = layer.parametrizations.weight[0]
    kernel = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, kernel)


@pytest.mark.parametrize("mode", MODES)
def test_conditioned_trains_without_nan_from_zero_rows_and_columns(mode):
    layers = [nn.Conv2d(3, 4, 2), cpnb.CPConv2d(3, 4, 2, rank=5)][: 1 + (mode == "row")]
    for layer in layers:
        first = layer.weight.data if isinstance(layer, nn.Conv2d) else layer.factors[0]
        with torch.no_grad():
            first[1] = 0
        new = normalize(layer, "conditioned", mode=mode)
        new(torch.randn(2, 3, 5, 5)).square().sum().backward()
        trained = [p for p in new.parameters() if p.requires_grad]
        assert all(p.grad.isfinite().all() for p in trained)
        assert not new.weight[1].any()
        assert new.weight.any()


# --- CP layers ------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), CP.values(), ids=CP)
def test_conditioned_cp_layer_equals_loops_and_becomes_a_plain_one(make, shape):
    source = scattered(make().double())
    source.scale.data.abs_().neg_()  # a sign that the gain has to keep
    layer = normalize(source, "conditioned")
    expected = spec_conditioned(source.weight)
    assert_close(layer.weight, expected)
    assert layer.rank == source.rank
    lam, units = layer.components()
    if units:
        kernel = cpnb.cp_to_kernel(lam, units)
        assert_close(kernel.view(layer.kernel_shape), expected)
    inputs = torch.randn(shape, dtype=torch.float64)
    dense = remove_normalizer(layer)
    for forward_mode in ("dense", "chain"):
        layer.forward_mode = forward_mode
        assert_close(layer(inputs), dense(inputs))
    layer.scale.data.neg_()
    before = copy.deepcopy(layer.state_dict())
    plain = remove_normalizer(layer, keep_cp=True)
    assert type(plain) is type(source)
    assert plain.rank == source.rank
    assert all(p.requires_grad for p in plain.parameters())
    assert_close(plain.weight, layer.weight)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert cpnb.truncate(plain, rank=1).rank == 1  # no trace left


@pytest.mark.parametrize("forward_mode", ["dense", "chain"])
def test_conditioned_cp_layer_has_the_gradient_of_the_dense_formula(forward_mode):
    source = scattered(cpnb.CPConv2d(3, 4, 2, rank=3).double())
    layer = normalize(source, "conditioned")
    layer.forward_mode = forward_mode
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    layer(images).pow(3).sum().backward()
    rows = source.weight.flatten(1)  # in the same graph
    scales = rows.norm(dim=1)
    kernel = math.sqrt(2) * source.weight / scales.view(-1, 1, 1, 1)
    nn.functional.conv2d(images, kernel, source.bias).pow(3).sum().backward()
    named = dict(layer.named_parameters())
    stored = [named["factors.parametrizations.0.original"]]
    stored += [named[f"factors.{n}"] for n in (1, 2, 3)]
    for ours, expected in zip(stored, source.factors, strict=True):
        assert_close(ours.grad, expected.grad)
    lam = named["parametrizations.lam.original"]
    assert_close(lam.grad, source.lam.grad)
    assert layer.scale.grad is None


def test_conditioned_cp_layer_follows_copies_checkpoints_and_edits():
    layer = normalize(cpnb.CPConv2d(3, 4, 3, rank=5), "conditioned")
    fresh = normalize(cpnb.CPConv2d(3, 4, 3, rank=5), "conditioned")
    fresh.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    for other in (twin, fresh):
        assert torch.equal(other.weight, layer.weight)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(fresh.weight, layer.weight), "the copy has parameters of its own"
    rows = twin.weight.flatten(1).norm(dim=1)
    assert_close(rows, twin.scale.detach().expand(4))
