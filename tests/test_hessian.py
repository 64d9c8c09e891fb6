"""The top Hessian eigenvalue against the dense Hessian of tiny networks."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import cpnb
from cpnb import top_hessian_eigenvalue


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(12) % 3


def conv(in_, out, size):
    return nn.Conv2d(in_, out, size)


NETS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    "two layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)
    ),
    "convolution": lambda: nn.Sequential(
        conv(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)
    ),
    "batch norm": lambda: nn.Sequential(
        conv(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ),
    "CP": lambda: nn.Sequential(
        cpnb.CPConv2d(1, 3, 3, rank=2),
        nn.ReLU(),
        nn.Flatten(),
        cpnb.CPLinear(12, 3, rank=2),
    ),
}


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
    options = {
        "generator": torch.Generator().manual_seed(1),
        "progress": False,
    } | options
    return top_hessian_eigenvalue(net, pair, **options)


@pytest.mark.parametrize("chunk_size", [1000, 5])
@pytest.mark.parametrize("build", NETS.values(), ids=NETS)
def test_eigenvalue_is_the_largest_of_the_dense_hessian(batch, build, chunk_size):
    net = build().double()
    found = top(net, batch, iterations=2000, tolerance=1e-5, chunk_size=chunk_size)
    values = dense_eigenvalues(net.eval(), *batch)
    assert found.converged
    assert found.value == pytest.approx(values[-1].item(), rel=1e-6)
    assert found.magnitude == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert found.residual <= 1e-5 * found.value
    assert not found.negative_dominates


def test_eigenvalue_with_batch_statistics_is_that_of_the_training_loss(batch):
    net = NETS["batch norm"]().double()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = top(net, batch, iterations=2000, tolerance=1e-5, batch_statistics=True)
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(p.grad is None for p in net.parameters())
    net[1].track_running_stats = False
    values = dense_eigenvalues(net.train(), *batch)
    assert found.value == pytest.approx(values[-1].item(), rel=1e-6)


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
    ("curves", "value", "magnitude", "dominates"),
    [
        ([9.0, 1.0, -2.0], 2.0, 9.0, True),  # −9, −1, 2
        ([9.0, 3.0, 1.0], -1.0, 9.0, True),  # curved downward everywhere
        ([4.0, -4.0, 1.0], 4.0, 4.0, False),  # of equal size: they hold each other up
        ([-4.0, 1.0], 4.0, 4.0, False),
        ([0.0, 0.0], 0.0, 0.0, False),
    ],
)
def test_largest_eigenvalue_is_found_beside_larger_negative_ones(
    curves, value, magnitude, dominates
):
    pair = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    found = top(Quadratic(curves), pair, iterations=200, tolerance=1e-4)
    assert found.converged
    assert found.value == pytest.approx(value, abs=1e-5)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-6)
    assert found.negative_dominates == dominates


def test_unconverged_search_says_so_and_stays_below_the_eigenvalue(batch):
    net = NETS["two layers"]().double()
    found = top(net, batch, iterations=2, tolerance=1e-6)
    values = dense_eigenvalues(net, *batch)
    assert not found.converged
    assert found.iterations == 4  # two of each run
    assert found.value <= values[-1].item() * (1 + 1e-9)
    assert (values - found.value).abs().min().item() <= found.residual


def test_search_is_repeatable_and_leaves_global_randomness_alone(batch):
    net = NETS["convolution"]().double()
    state = torch.get_rng_state()
    assert top(net, batch, iterations=5) == top(net, batch, iterations=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_trainable_parameters_count(batch):
    net = NETS["two layers"]().double()
    net[1].requires_grad_(False)
    found = top(net, batch, iterations=500, tolerance=1e-5)
    hidden = net[:3](batch[0]).detach()
    values = dense_eigenvalues(net[3], hidden, batch[1])
    assert found.value == pytest.approx(values[-1].item(), rel=1e-6)


def test_interruption_returns_what_is_known(batch, monkeypatch):
    net, calls = NETS["two layers"]().double(), []
    plain = torch.autograd.grad

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 5:  # the gradient, then three products
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    found = top(net, batch, tolerance=1e-9)
    assert (found.iterations, found.converged) == (3, False)
    assert found.value > 0


def test_search_shows_its_progress(batch, capsys):
    top(NETS["linear"]().double(), batch, progress=True)
    assert "Hessian-vector products" in capsys.readouterr().err


def test_search_refuses_bad_arguments(batch):
    net = NETS["linear"]().double()
    with pytest.raises(ValueError, match="iterations is 0"):
        top(net, batch, iterations=0)
    with pytest.raises(ValueError, match=r"tolerance is 1, expected a number in \(0"):
        top(net, batch, tolerance=1)
    with pytest.raises(ValueError, match="Sequential without trainable parameters"):
        top(net.requires_grad_(False), batch)
    broken = NETS["linear"]().double()
    with torch.no_grad():
        broken[1].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        top(broken, batch)
