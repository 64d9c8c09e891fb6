"""Spectra, steps and curvature against their definitions written out."""

import copy
import math

import pytest
import torch
from shared import randn, seeded
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb import layers
from cpnb.explore import spectrum, spectrum_report, step_spectrum
from cpnb.methods import LowRankConv2d

# --- spectra --------------------------------------------------------------------------


def numbers_by_hand(matrix):
    """Condition number, effective rank, stable rank and row spread, one by one."""
    values = torch.linalg.svd(matrix)[1].tolist()
    total = sum(values)
    entropy = -sum(s / total * math.log(s / total) for s in values)
    stable = sum(w**2 for w in matrix.flatten().tolist()) / max(values) ** 2
    rows = [math.hypot(*row) for row in matrix.tolist()]
    condition = max(values) / min(values)
    return condition, math.exp(entropy), stable, max(rows) / min(rows)


def numbers(found):
    names = ("condition_number", "effective_rank", "stable_rank", "row_spread")
    return tuple(getattr(found, name) for name in names)


KERNELS = {
    "matrix": randn(5, 7),
    "5 modes": randn(3, 2, 2, 2, 2),
    "linear": nn.Linear(5, 7),
    "conv3d": nn.Conv3d(2, 3, 2),
    "weight norm": parametrizations.weight_norm(nn.Linear(5, 7)),
    "low-rank conv2d": LowRankConv2d(3, 4, 3, rank=5),
    "cp linear": cpnb.CPLinear(5, 7, rank=9),
    "cp conv2d": cpnb.CPConv2d(3, 4, 3, rank=20),
    "cp of one number": cpnb.CPConv2d(1, 1, 1, rank=1),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_spectrum_equals_the_definitions_on_the_unfolding(kernel):
    kernel = kernel.double()
    weight = getattr(kernel, "weight", kernel).detach().flatten(1)
    assert numbers(spectrum(kernel)) == pytest.approx(numbers_by_hand(weight))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_spectrum_of_groups_is_that_of_the_block_diagonal_matrix(kind, groups):
    layer = kind(4, 6, 3, groups=groups, dtype=torch.float64)
    blocks = layer.weight.detach().chunk(groups)
    if kind is nn.ConvTranspose2d:  # stored with the inputs first
        blocks = [block.transpose(0, 1) for block in blocks]
    matrix = torch.block_diag(*(block.flatten(1) for block in blocks))
    found = spectrum(layer)
    assert_close(found.singular_values, torch.linalg.svdvals(matrix))
    rows = matrix.norm(dim=1)
    assert found.row_spread == pytest.approx((rows.max() / rows.min()).item())


def test_condition_number_is_infinite_where_the_dtype_cannot_tell():
    def condition(kernel):
        return spectrum(kernel).condition_number

    assert condition(cpnb.CPLinear(8, 8, rank=7)) == math.inf
    assert condition(cpnb.CPLinear(8, 8, rank=8)) < math.inf
    low = randn(8, 3) @ randn(3, 9, seed=1)
    assert condition(low) == condition(low.float()) == math.inf
    wide = torch.diag(torch.tensor([1.0, 1e-5]))
    assert condition(wide) == pytest.approx(1e5)
    assert condition(1e-7 * wide) == pytest.approx(1e5)
    assert condition(wide.bfloat16()) == math.inf


def test_spectrum_of_zeros_has_numbers_and_no_error():
    assert numbers(spectrum(torch.zeros(3, 4))) == (math.inf, 1.0, 0.0, math.inf)
    row = spectrum(torch.diag(torch.tensor([1.0, 0.0])))
    assert numbers(row) == (math.inf, 1.0, 1.0, math.inf)


class Pair(nn.Sequential):
    """A layer of low rank that is made of layers and has a kernel."""

    weight = property(lambda self: self[1].weight @ self[0].weight)


def test_report_has_a_row_for_each_layer_with_a_kernel():
    pair = Pair(nn.Linear(6, 2, bias=False), nn.Linear(2, 5))
    cp = cpnb.CPLinear(5, 3, rank=2)
    report = spectrum_report(nn.Sequential(nn.BatchNorm1d(6), pair, nn.ReLU(), cp))
    assert report["shape"].to_dict() == {"1": "5×6", "3": "3×5"}
    assert report.loc["1", "condition_number"] == math.inf
    assert report.loc["3", "stable_rank"] == spectrum(cp).stable_rank
    assert list(spectrum_report(pair).index) == ["Pair"]


# --- steps ----------------------------------------------------------------------------

CP = [
    (cpnb.CPConv1d, (12, 24, 5), 1), (cpnb.CPConv2d, (32, 64, 3), 1),
    (cpnb.CPConv3d, (6, 12, 3), 1), (cpnb.CPConv2d, (24, 48, 1), 1),
    (cpnb.CPConv2d, (32, 32, 3), 32), (cpnb.CPConv2d, (32, 32, 3), 4),
    (cpnb.CPLinear, (200, 60), 1), (cpnb.CPConv2d, (1, 32, 3), 1),
    (cpnb.CPConv2d, (3, 32, 3), 1),
]  # fmt: skip


def test_a_step_of_a_dense_and_of_a_weight_normalised_layer_is_that_of_the_kernel():
    for layer in (nn.Conv2d(3, 5, 3), parametrizations.weight_norm(nn.Linear(9, 4))):
        before = [p.clone() for p in layer.parameters()]
        assert step_spectrum(layer, generator=seeded(1)) == pytest.approx((1, 1))
        assert all(map(torch.equal, before, layer.parameters()))


@pytest.mark.parametrize("low", [nn.Linear(5, 4), LowRankConv2d(3, 4, 3, rank=2)])
def test_step_spectrum_is_that_of_the_matrix_written_out(low):
    for layer in (low, cpnb.CPConv2d(3, 4, 3, rank=7)):
        layer = layer.double()
        trained = [p for name, p in layer.named_parameters() if name != "bias"]
        slopes = [
            torch.autograd.grad(entry, trained, retain_graph=True)
            for entry in layer.weight.flatten()
        ]
        rows = [torch.cat([g.flatten() for g in slope]) for slope in slopes]
        values = torch.linalg.svdvals(torch.stack(rows)).square()
        found = step_spectrum(layer, generator=seeded(1))
        assert found.largest == pytest.approx(values.max().item(), rel=0.01)
        assert found.mean == pytest.approx(values.sum().item() / len(rows), rel=0.1)


@pytest.mark.parametrize("share", [0.3, "same"])
@pytest.mark.parametrize(("kind", "sizes", "groups"), CP)
def test_mean_step_is_that_of_its_formula_and_the_largest_bounded(
    kind, sizes, groups, share, monkeypatch
):
    options = {"groups": groups} if groups > 1 else {}
    layer = kind(*sizes, **options, rank=share, generator=seeded(1))
    sizes = [len(factor) for factor in layer.factors]
    columns = sum((n - 1) * n / max(sizes) for n in sizes) / layers.COLUMN**2
    mean = layer.rank * (columns + layers.SLOW**-2) + layers.SLOW**-2
    found = [step_spectrum(layer, generator=seeded(s)).mean for s in range(4)]
    assert sum(found) / 4 == pytest.approx(mean / math.prod(sizes), rel=0.05)
    monkeypatch.setattr(layers, "COLUMN", 2.0)
    assert step_spectrum(cpnb.step_gauge_(layer)).largest <= 2.5


# --- curvature ------------------------------------------------------------------------


BATCH = randn(12, 1, 4, 4), torch.arange(12) % 3

NETS = {
    "two layers": [nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)],
    "pooled": [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
    "norm": [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)],
    "CP": [cpnb.CPConv2d(1, 3, 3, rank=2), nn.Flatten(), cpnb.CPLinear(12, 3, rank=2)],
}


@pytest.fixture(params=NETS)
def net(request):
    return copy.deepcopy(nn.Sequential(*NETS[request.param])).double()


def dense_eigenvalues(net, images, labels):
    """All eigenvalues of the Hessian of the mean cross entropy, ascending."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def loss(flat):
        pieces = zip(names, flat.split(sizes), parameters, strict=True)
        values = {name: piece.view_as(p) for name, piece, p in pieces}
        return F.cross_entropy(functional_call(net, values, (images,)), labels)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))


def top(net, pair, **options):
    options = {"generator": seeded(1), "progress": False} | options
    return cpnb.explore.top_hessian_eigenvalue(net, pair, **options)


@pytest.mark.parametrize("chunk", [1000, 5])
def test_eigenvalue_is_the_largest_of_the_dense_hessian(net, chunk, monkeypatch):
    monkeypatch.setattr("cpnb.explore.diagnostics._CHUNK", chunk)
    state = copy.deepcopy(net.state_dict())
    found = top(net, BATCH, tolerance=1e-5)
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, state[name]) for name, v in net.state_dict().items())
    expected = dense_eigenvalues(net.eval(), *BATCH)[-1].item()
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.residual <= 1e-4 * found.value
    single = top(net.float(), (BATCH[0].float(), BATCH[1]))
    assert single.value == pytest.approx(expected, rel=1e-3)


class Quadratic(nn.Module):
    """Scores whose difference is ½ Σ curve·w²; the images only count."""

    def __init__(self, curves):
        super().__init__()
        self.curves = torch.tensor(curves, dtype=torch.float64)
        self.weight = nn.Parameter(torch.zeros(len(curves), dtype=torch.float64))

    def forward(self, images):
        score = (self.curves * self.weight.square()).sum() / 2
        return torch.stack([score, -score]).expand(len(images), 2)


# At w = 0 the loss is ln 2 and its Hessian −curve for label 0.
@pytest.mark.parametrize(
    ("curves", "value"), [([9.0, 1.0, -2.0], 2.0), ([9.0, 3.0, 1.0], -1.0)]
)
def test_eigenvalue_is_the_largest_beside_larger_negative_ones(curves, value):
    pair = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    assert top(Quadratic(curves), pair).value == pytest.approx(value, abs=1e-6)


def test_eigenvalue_is_of_the_trainable_parameters_alone():
    net = nn.Sequential(*copy.deepcopy(NETS["two layers"])).double()
    net[1].requires_grad_(False)
    values = dense_eigenvalues(net[3], net[:3](BATCH[0]).detach(), BATCH[1])
    assert top(net, BATCH).value == pytest.approx(values[-1].item(), rel=1e-6)
