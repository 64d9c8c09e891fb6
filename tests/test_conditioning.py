"""Weight conditioning against loops, weight norm and the dense kernel of CP layers."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb

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


def scattered(layer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


def spec_rows(matrix):
    for row in matrix:
        norm = math.sqrt(sum(v * v for v in row))
        row[:] = [v / norm for v in row]


def spec_columns(matrix, width=1, length=1.0):
    """Scale blocks of ``width`` neighbouring columns each to one norm."""
    for first in range(0, len(matrix[0]), width):
        block = range(first, first + width)
        norm = math.sqrt(sum(row[j] ** 2 for row in matrix for j in block))
        for row in matrix:
            for j in block:
                row[j] *= length / norm


def spec_conditioned(kernel, mode, gain, groups=1, width=1):
    """Equilibrate, with loops, the matrix of each group."""
    result = []
    for part in kernel.detach().chunk(groups):
        matrix = [row.flatten().tolist() for row in part]
        blocks = len(matrix[0]) // width
        if mode == "row":
            spec_rows(matrix)
        elif mode == "column":
            spec_columns(matrix, width, math.sqrt(len(matrix) / blocks))
        else:
            for _ in range(3):
                spec_columns(matrix, width)
                spec_rows(matrix)
        result += matrix
    return gain * torch.tensor(result, dtype=torch.float64).view(kernel.shape)


# --- dense ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DENSE)
def test_conditioned_equals_loops(kind, mode):
    source = DENSE[kind]().double()
    layer = cpnb.normalize(source, "conditioned", mode=mode)
    groups = getattr(source, "groups", 1)
    expected = spec_conditioned(source.weight, mode, math.sqrt(2), groups)
    assert_close(layer.weight, expected)
    rows = layer.weight.flatten(1).square().sum(1)
    assert rows.mean().item() == pytest.approx(2, rel=1e-9)


def test_conditioned_row_is_weight_norm_with_frozen_g():
    source = nn.Conv2d(4, 6, 3, groups=2).double()
    ours = cpnb.normalize(source, "conditioned", gain=1.0)
    torchs = parametrizations.weight_norm(copy.deepcopy(source))
    kernel = torchs.parametrizations.weight
    with torch.no_grad():
        kernel.original0.fill_(1.0)
    kernel.original0.requires_grad_(False)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for _ in range(3):
        for layer in (ours, torchs):
            layer.zero_grad()
            layer(images).pow(3).sum().backward()
            with torch.no_grad():
                for p in layer.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad
        gradient = ours.parametrizations.weight.original.grad
        assert_close(gradient, kernel.original1.grad)
        assert_close(ours.weight, torchs.weight)


def test_conditioned_detached_drops_the_projection():
    source = nn.Linear(5, 3).double()
    features = torch.randn(4, 5, dtype=torch.float64)
    gradients = {}
    for detach in (False, True):
        layer = cpnb.normalize(source, "conditioned", detach=detach, gain=1.0)
        layer(features).pow(2).sum().backward()
        gradients[detach] = layer.parametrizations.weight.original.grad
    rows = source.weight.detach()
    along = (gradients[False] * rows).sum(1)
    assert_close(along, torch.zeros(3, dtype=torch.float64))
    assert (gradients[True] * rows).sum(1).abs().min() > 1e-3
    units = rows / rows.norm(dim=1, keepdim=True)
    radial = (gradients[True] * units).sum(1, keepdim=True) * units
    assert_close(gradients[True] - radial, gradients[False])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("detach", [False, True])
def test_conditioned_has_the_gradient_of_finite_differences_unless_detached(
    mode, detach
):
    layer = cpnb.normalize(nn.Linear(4, 3).double(), "conditioned", mode=mode)
    module = layer.parametrizations.weight[0]
    module.detach = detach
    kernel = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, kernel, raise_exception=False) != detach


def test_conditioned_repairs_uneven_rows_and_not_even_ones():
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(64, 288, generator=generator)
    uneven = even * torch.randn(64, 1, generator=generator).exp()
    conditions = []
    for kernel in (even, uneven):
        layer = nn.Linear(288, 64)
        with torch.no_grad():
            layer.weight.copy_(kernel)
        new = cpnb.normalize(layer, "conditioned")
        conditions.append([torch.linalg.cond(m.weight).item() for m in (layer, new)])
    (before, after), (worse, mended) = conditions
    assert after == pytest.approx(before, rel=0.05)
    assert worse > 20
    assert mended == pytest.approx(after, rel=0.05)


# --- CP layers ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CP)
def test_conditioned_cp_layer_equals_loops_on_its_dense_kernel(kind, mode):
    make, shape = CP[kind]
    source = scattered(make().double())
    with torch.no_grad():
        source.scale.abs_().neg_()  # a sign that the gain has to keep
    layer = cpnb.normalize(source, "conditioned", mode=mode)
    width = math.prod(source.kernel_shape[2:])
    expected = spec_conditioned(source.weight, mode, math.sqrt(2), width=width)
    assert_close(layer.weight, expected)
    assert layer.rank == source.rank
    lam, units = layer.components()
    sizes = [n for n in layer.kernel_shape if n > 1]
    if units:
        kernel = cpnb.cp_to_kernel(lam, units)
        assert [len(unit) for unit in units] == sizes
        assert_close(kernel.view(layer.kernel_shape), expected)
    inputs = torch.randn(shape, dtype=torch.float64)
    dense = layer.to_dense()
    for forward_mode in ("dense", "chain"):
        layer.forward_mode = forward_mode
        for training in (True, False):
            assert_close(layer.train(training)(inputs), dense(inputs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CP)
def test_conditioned_cp_layer_becomes_a_plain_one_of_the_same_kernel(kind, mode):
    source = scattered(CP[kind][0]().double())
    layer = cpnb.normalize(source, "conditioned", mode=mode)
    with torch.no_grad():
        layer.scale.neg_()
    before = copy.deepcopy(layer.state_dict())
    plain = cpnb.remove_normalizer(layer, keep_cp=True)
    assert type(plain) is type(source)
    assert plain.rank == source.rank
    assert all(p.requires_grad for p in plain.parameters())
    assert_close(plain.weight, layer.weight)
    assert_close(cpnb.remove_normalizer(layer).weight, layer.weight)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    cpnb.normalize(plain, "conditioned")  # no trace left


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("forward_mode", ["dense", "chain"])
def test_conditioned_cp_layer_has_the_gradient_of_the_dense_formula(
    mode, detach, forward_mode
):
    source = scattered(cpnb.CPConv2d(3, 4, 2, rank=3).double())
    layer = cpnb.normalize(source, "conditioned", mode=mode, detach=detach)
    layer.forward_mode = forward_mode
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    layer(images).pow(3).sum().backward()
    # Equilibrate the dense kernel in the same graph; all taps of a channel together.
    weight = source.weight / source.scale.detach()
    squares = (weight.detach() if detach else weight).square().sum((2, 3))
    rows, columns = torch.ones(4).double(), torch.ones(3).double()
    for side in {"row": "r", "column": "c", "row-column": "crcrcr"}[mode]:
        if side == "r":
            rows = (squares @ columns.square()).rsqrt()
        else:
            columns = (rows.square() @ squares).rsqrt()
    factor = math.sqrt(2) * (math.sqrt(4 / 3) if mode == "column" else 1)
    kernel = factor * weight * torch.outer(rows, columns)[..., None, None]
    nn.functional.conv2d(images, kernel, source.bias).pow(3).sum().backward()
    for ours, expected in zip(layer.factors, source.factors, strict=True):
        assert_close(ours.grad, expected.grad)
    assert_close(layer.lam.grad, source.lam.grad)
    assert layer.scale.grad is None


def test_conditioned_cp_layer_trains_sigma_as_its_gain():
    source = cpnb.CPConv2d(3, 4, 3, rank=5)
    layer = cpnb.normalize(source, "conditioned", gain="learnable")
    assert_close(layer.weight.norm(), source.weight.norm())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    start = layer.scale.item()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
    assert layer.scale.item() != start
    rows = layer.weight.flatten(1).norm(dim=1)
    assert_close(rows, layer.scale.detach().expand(4))


def test_conditioned_cp_layer_leaves_zero_rows_and_columns_at_zero():
    layer = cpnb.CPConv2d(3, 4, 3, rank=5)
    with torch.no_grad():
        layer.factors[0][1] = 0
        layer.factors[1][2] = 0
    for mode in MODES:
        new = cpnb.normalize(layer, "conditioned", mode=mode)
        new(torch.randn(2, 3, 5, 5)).square().sum().backward()
        grads = [p.grad for p in new.parameters() if p.requires_grad]
        assert all(grad.isfinite().all() for grad in grads)
        assert not new.weight[1].any()
        assert not new.weight[:, 2].any()
        assert new.weight.any()


def test_conditioned_cp_layer_copies_pickles_and_loads():
    layer = cpnb.normalize(cpnb.CPConv2d(3, 4, 3, rank=5), "conditioned", mode="column")
    fresh = cpnb.normalize(cpnb.CPConv2d(3, 4, 3, rank=5), "conditioned", mode="column")
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other.weight, layer.weight)
        assert type(other) is type(layer)


def test_conditioned_cp_layer_follows_edits_in_evaluation():
    layer = cpnb.normalize(cpnb.CPLinear(6, 4, rank=3), "conditioned").eval()
    features = torch.randn(2, 6)
    with torch.no_grad():
        before = layer(features)
        layer.factors[0][0] *= 100
        layer.scale *= 2
        lengths = layer.weight.norm(dim=1)
        assert_close(lengths, torch.full((4,), 2 * math.sqrt(2)))
        assert not torch.allclose(layer(features), before)


def test_conditioned_cp_layer_says_what_it_is_and_refuses_to_be_cut():
    layer = cpnb.normalize(cpnb.CPLinear(6, 4, rank=3), "conditioned", detach=True)
    assert repr(layer) == (
        "ConditionedCPLinear(6, 4, rank=3 (1.00 of break-even 3)"
        ", mode='row', detach=True)"
    )
    with pytest.raises(TypeError, match=r"rank 3, expected no.*keep_cp=True\) first"):
        cpnb.truncate(layer, rank=2)
    plain = cpnb.remove_normalizer(layer, keep_cp=True)
    assert cpnb.truncate(plain, rank=2).rank == 2


def test_conditioned_cp_layer_equilibrates_its_active_components():
    layer = cpnb.normalize(cpnb.CPConv2d(3, 4, 3, rank=5), "conditioned")
    whole = layer.weight.detach()
    layer.active_rank = 3
    assert_close(layer.weight.flatten(1).norm(dim=1), torch.full((4,), math.sqrt(2)))
    assert not torch.allclose(layer.weight, whole)


def test_conditioned_cp_layer_is_full_precision_under_autocast():
    layer = cpnb.normalize(cpnb.CPConv2d(8, 8, 3, rank=9), "conditioned", gain=1.0)
    expected = layer._folded()
    with torch.autocast("cpu", torch.bfloat16):
        lam, factors = layer._folded()
    assert torch.equal(lam, expected[0])
    assert all(map(torch.equal, factors, expected[1]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "rows"}, ValueError, r"mode is 'rows', expected one of \('row', "),
        ({"detach": 1}, TypeError, "detach is 1, expected True or False"),
        ({"gain": "big"}, TypeError, "gain is 'big', expected a number or 'learnable'"),
        ({"gain": True}, TypeError, "gain is True, expected a number"),
        ({"gain": 0.0}, ValueError, "gain is 0.0, expected a number above 0"),
        ({"gain": math.nan}, ValueError, "gain is nan, expected a number above 0"),
    ],
)
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: cpnb.CPLinear(3, 2)])
def test_conditioned_refuses_bad_options(make, options, error, text):
    with pytest.raises(error, match=text):
        cpnb.normalize(make(), "conditioned", **options)
