"""Spectra of kernels and layers against definitions written out."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb import spectrum, spectrum_report


def draw(*shape, seed=0):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def numbers_by_hand(matrix):
    """Condition number, effective rank, stable rank and row spread, one by one."""
    values = torch.linalg.svd(matrix)[1].tolist()
    total = sum(values)
    entropy = -sum(s / total * math.log(s / total) for s in values)
    stable = sum(w**2 for w in matrix.flatten().tolist()) / max(values) ** 2
    rows = [math.sqrt(sum(w**2 for w in row)) for row in matrix.tolist()]
    spread = max(rows) / min(rows)
    return max(values) / min(values), math.exp(entropy), stable, spread


def numbers(found):
    names = ("condition_number", "effective_rank", "stable_rank", "row_spread")
    return tuple(getattr(found, name) for name in names)


@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 2), (4, 3, 3, 3), (3, 2, 2, 2, 2)])
def test_spectrum_equals_the_definitions_on_the_unfolding(shape):
    kernel = draw(*shape)
    found = spectrum(kernel)
    assert found.shape == shape
    assert found.rank == min(shape[0], math.prod(shape[1:]))
    assert numbers(found) == pytest.approx(numbers_by_hand(kernel.flatten(1)))


LAYERS = {
    "linear": nn.Linear(5, 7),
    "conv1d": nn.Conv1d(3, 4, 3),
    "conv2d": nn.Conv2d(3, 4, 3),
    "conv3d": nn.Conv3d(2, 3, 2),
    "weight norm": parametrizations.weight_norm(nn.Linear(5, 7)),
    "low-rank conv2d": cpnb.LowRankConv2d(3, 4, 3, rank=5),
    "low-rank linear": cpnb.LowRankLinear(5, 7, rank=5),
    "cp linear": cpnb.CPLinear(5, 7, rank=9),
    "cp conv1d": cpnb.CPConv1d(3, 4, 3, rank=9),
    "cp conv2d": cpnb.CPConv2d(3, 4, 3, rank=20),
    "cp conv3d": cpnb.CPConv3d(2, 3, 2, rank=20),
    "cp of one output": cpnb.CPConv2d(3, 1, 3, rank=5),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_spectrum_of_a_layer_is_that_of_its_weight(layer):
    layer = layer.double()
    weight = layer.weight.detach().flatten(1)
    assert numbers(spectrum(layer)) == pytest.approx(numbers_by_hand(weight))


def test_spectrum_of_groups_is_that_of_the_block_diagonal_matrix():
    conv = nn.Conv2d(6, 4, 3, groups=2, dtype=torch.float64)
    blocks = conv.weight.detach().flatten(1).chunk(2)
    expected = torch.linalg.svdvals(torch.block_diag(*blocks)).tolist()
    found = spectrum(conv)
    assert found.singular_values == pytest.approx(expected)
    assert found.row_norms == pytest.approx(
        conv.weight.detach().flatten(1).norm(dim=1).tolist()
    )
    depthwise = nn.Conv2d(4, 4, 3, groups=4, dtype=torch.float64)
    assert spectrum(depthwise).condition_number == pytest.approx(
        spectrum(depthwise).row_spread
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_spectrum_of_a_transposed_convolution_has_a_row_for_each_output(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, dtype=torch.float64)
    rows = [
        weight.transpose(0, 1).flatten(1)
        for weight in layer.weight.detach().chunk(groups)
    ]
    found = spectrum(layer)
    assert len(found.row_norms) == 6
    assert_close(
        torch.tensor(found.singular_values, dtype=torch.float64),
        torch.linalg.svdvals(torch.block_diag(*rows)),
    )


def test_condition_number_is_infinite_below_full_rank():
    assert spectrum(cpnb.CPLinear(8, 8, rank=7)).condition_number == math.inf
    low = draw(8, 3) @ draw(3, 9, seed=1)
    for dtype in (torch.float64, torch.float32):
        found = spectrum(low.to(dtype))
        assert (found.rank, found.condition_number) == (3, math.inf)
    assert spectrum(cpnb.CPLinear(8, 8, rank=8)).condition_number < math.inf


def test_condition_number_stays_finite_as_long_as_the_dtype_can_tell():
    wide = torch.diag(torch.tensor([1.0, 1e-5]))
    assert spectrum(wide).condition_number == pytest.approx(1e5)
    assert spectrum(1e-7 * wide).condition_number == pytest.approx(1e5)
    assert spectrum(wide.bfloat16()).condition_number == math.inf


def test_spectrum_of_a_zero_kernel_and_a_zero_row():
    zero = spectrum(torch.zeros(3, 4))
    assert numbers(zero) == (math.inf, 1.0, 0.0, math.inf)
    row = spectrum(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert numbers(row) == (math.inf, 1.0, 1.0, math.inf)


def test_spectrum_of_a_broken_kernel_is_nan_and_no_error():
    kernel = draw(3, 4)
    kernel[1, 2] = math.nan
    found = spectrum(kernel)
    assert all(map(math.isnan, numbers(found)[:3]))
    assert "nan" in str(spectrum_report(_with_weight(kernel)))


def _with_weight(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def test_lambda_spectrum_is_sorted_and_has_the_scale_folded_in():
    layer = cpnb.CPLinear(5, 4, rank=3)
    with torch.no_grad():
        layer.scale.fill_(-2.0)
        layer.lam.copy_(torch.tensor([1.0, -3.0, 0.0]))
    found = spectrum(layer)
    assert found.lam == (6.0, 2.0, 0.0)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found.effective_components == pytest.approx(expected)
    assert spectrum(nn.Linear(3, 2)).effective_components is None


class Pair(nn.Module):
    """A layer of low rank that is made of layers and has a kernel."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 2, bias=False), nn.Linear(2, 5)

    @property
    def weight(self):
        return self.last.weight @ self.first.weight


def test_report_counts_a_layer_with_a_kernel_once_and_names_the_others():
    pair = Pair()
    net = nn.Sequential(nn.BatchNorm1d(6), pair, nn.ReLU(), cpnb.CPLinear(5, 3, rank=2))
    report = spectrum_report(net)
    assert list(report.layers) == ["1", "3"]
    assert report.layers["1"] == spectrum(pair)
    rows = report.to_rows()
    assert [row["layer"] for row in rows] == ["1", "3"]
    assert rows[0]["condition_number"] == math.inf
    lines = str(report).splitlines()
    assert len(lines) == 3 and "effective rank" in lines[0] and "5×6" in lines[1]
    assert report._repr_html_().count("<tr>") == 3
    assert list(spectrum_report(pair).layers) == ["Pair"]


def test_repr_is_short_and_a_report_is_its_table():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2, 3))
    assert repr(spectrum(layer)) == (
        "Spectrum(2×3: κ 1, effective rank 2.0, stable rank 2.0 of 2)"
    )
    report = spectrum_report(layer)
    assert repr(report) == str(report)


def test_report_changes_nothing_in_a_model_that_updates_itself_when_looked_at():
    layer = parametrizations.spectral_norm(nn.Linear(5, 4))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    spectrum_report(layer)
    assert layer.training
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("kernel", "error", "match"),
    [
        ([1.0], TypeError, "kernel is a list, expected a torch.Tensor"),
        (torch.ones(2, 2).int(), TypeError, "floating-point"),
        (torch.ones(3), ValueError, r"shape \(3,\), expected two modes or more"),
        (torch.ones(3, 0), ValueError, r"shape \(3, 0\).*none empty"),
        (nn.ReLU(), TypeError, "kernel is a ReLU without a weight.*spectrum_report"),
    ],
)
def test_spectrum_refuses_what_has_no_unfolding(kernel, error, match):
    with pytest.raises(error, match=match):
        spectrum(kernel)


def test_report_refuses_models_without_kernels():
    with pytest.raises(ValueError, match="BatchNorm1d without a layer whose weight"):
        spectrum_report(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="model is a list"):
        spectrum_report([nn.Linear(2, 2)])
