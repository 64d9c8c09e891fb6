"""Every reparametrised kernel against loops in float64, and what it promises."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import cpnb
from cpnb._normalizers.kernels import newton_orthogonal

LAYERS = {
    "conv1d": lambda: nn.Conv1d(3, 5, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, (3, 2)),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "tall": lambda: nn.Conv2d(1, 9, 2),
    "linear": lambda: nn.Linear(6, 4),
    "square": lambda: nn.Linear(5, 5),
}
KERNELS = ["weight", "spectral", "orthogonal", "standardized", "centered", "oni"]


def kernel_rows(kernel):
    """A kernel as one list of numbers per output."""
    return [row.flatten().tolist() for row in kernel]


def per_group(groups, function):
    """Apply a function of a list of rows to the rows of each group by themselves."""

    def apply(rows):
        size = len(rows) // groups
        parts = [rows[n * size : (n + 1) * size] for n in range(groups)]
        return [row for part in parts for row in function(part)]

    return apply


def transpose(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def product(left, right):
    columns = transpose(right)
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns]
        for row in left
    ]


def combine(a, left, b, right):
    return [
        [a * x + b * y for x, y in zip(one, other, strict=True)]
        for one, other in zip(left, right, strict=True)
    ]


def spec_weight(rows, g):
    result = []
    for row, length in zip(rows, g, strict=True):
        norm = math.sqrt(sum(v * v for v in row))
        result.append([length * v / norm for v in row])
    return result


def spec_centered(rows, g):
    means = [sum(row) / len(row) for row in rows]
    shifted = [[v - m for v in row] for row, m in zip(rows, means, strict=True)]
    return spec_weight(shifted, g)


def spec_standardized(rows):
    result = []
    for row in rows:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
        result.append([(v - mean) / (deviation + 1e-5) for v in row])
    return result


def spec_spectral(rows):
    """Divide by the root of the largest eigenvalue, from a high power of ``WWᵀ``."""
    gram = product(rows, transpose(rows))
    power = gram
    for _ in range(14):
        power = product(power, power)
        largest = max(abs(v) for row in power for v in row)
        power = [[v / largest for v in row] for row in power]
    column = max(transpose(power), key=lambda values: sum(v * v for v in values))
    image = [sum(a * b for a, b in zip(row, column, strict=True)) for row in gram]
    overlap = sum(a * b for a, b in zip(column, image, strict=True))
    norm = math.sqrt(overlap / sum(v * v for v in column))
    return [[v / norm for v in row] for row in rows]


def spec_orthogonal(rows, transposed=False):
    """Gram-Schmidt on the columns, or on the rows where there are fewer."""
    if len(rows) >= len(rows[0]) and not transposed:
        return transpose(spec_orthogonal(transpose(rows), transposed=True))
    done = []
    for row in rows:
        for other in done:
            overlap = sum(a * b for a, b in zip(row, other, strict=True))
            row = [a - overlap * b for a, b in zip(row, other, strict=True)]
        norm = math.sqrt(sum(v * v for v in row))
        done.append([v / norm for v in row])
    return done


def spec_oni(rows, iterations=5):
    means = [sum(row) / len(row) for row in rows]
    z = [[v - m for v in row] for row, m in zip(rows, means, strict=True)]
    tall = len(z) > len(z[0])
    z = transpose(z) if tall else z
    eye = [[float(a == b) for b in range(len(z))] for a in range(len(z))]
    s = combine(1, product(z, transpose(z)), 1e-5, eye)
    norm = math.sqrt(sum(v * v for row in s for v in row))
    s = combine(1 / norm, s, 0, s)
    b = eye
    for _ in range(iterations):
        b = combine(1.5, b, -0.5, product(product(product(b, b), b), s))
    w = combine(1 / math.sqrt(norm), product(b, z), 0, product(b, z))
    return transpose(w) if tall else w


def scattered(layer, seed=1):
    """Move every parameter of a layer to somewhere it did not start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


def expected_kernel(name, layer):
    kernel = layer.parametrizations["weight"]
    v = kernel.original1 if name == "weight" else kernel.original
    g = {"weight": lambda: kernel.original0, "centered": lambda: kernel[0].gain}
    groups = getattr(layer, "groups", 1)
    specs = {
        "weight": lambda rows: spec_weight(rows, g[name]().flatten().tolist()),
        "centered": lambda rows: spec_centered(rows, g[name]().flatten().tolist()),
        "spectral": spec_spectral,
        "standardized": spec_standardized,
        "orthogonal": per_group(groups, spec_orthogonal),
        "oni": per_group(groups, spec_oni),
    }
    rows = torch.tensor(specs[name](kernel_rows(v)), dtype=torch.float64)
    factor = kernel[0].gain if name in ("orthogonal", "oni") else 1.0
    return rows.view(v.shape) * factor


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_loops(name, kind):
    layer = scattered(cpnb.normalize(LAYERS[kind]().double(), name))
    for _ in range(1000 if name == "spectral" else 0):
        assert layer.weight.isfinite().all()  # each access improves the estimate
    assert_close(layer.eval().weight, expected_kernel(name, layer), rtol=1e-7, atol=0)
    assert layer.weight.dtype == torch.float64


class Weight(nn.Module):
    """Turns a layer into the function that computes its kernel."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight


@pytest.mark.parametrize(
    "name", ["weight", "orthogonal", "standardized", "centered", "oni"]
)
@pytest.mark.parametrize("kind", ["grouped", "tall"])
def test_kernel_has_the_gradient_of_finite_differences(name, kind):
    layer = scattered(cpnb.normalize(LAYERS[kind]().double(), name))
    module = Weight(layer)
    named = {n: p for n, p in module.named_parameters() if n != "layer.bias"}

    def kernel(*values):
        swapped = dict(zip(named, values, strict=True))
        return torch.func.functional_call(module, swapped, ())

    assert torch.autograd.gradcheck(kernel, tuple(named.values()))


# --- ONI ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(2, 40),
    st.integers(1, 7),
    st.sampled_from(["normal", "zero", "zero row", "equal rows", "tiny", "huge"]),
)
def test_oni_never_diverges(rows, columns, iterations, kind):
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    matrix = torch.randn(rows, columns, generator=generator)
    if kind == "zero row":
        matrix[0] = 0
    elif kind == "equal rows":
        matrix[:] = matrix[0].clone()
    else:
        matrix *= {"normal": 1, "zero": 0, "tiny": 1e-8, "huge": 1e8}[kind]
    matrix.requires_grad_()
    result = newton_orthogonal(matrix, iterations)
    result.sum().backward()
    assert torch.linalg.matrix_norm(result, 2) <= 1 + 1e-5
    assert result.isfinite().all()
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (32, 33), (33, 32)])
def test_oni_comes_close_to_orthogonal_and_closer_with_more_steps(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    values = [torch.linalg.svdvals(newton_orthogonal(matrix, n)) for n in (3, 5, 7)]
    # Centred rows are orthogonal to the ones, so that one direction may be missing.
    assert all((b >= a - 1e-12).all() for a, b in pairwise(values))
    assert values[-1][: min(shape) // 2].min() > 0.95


def test_oni_stays_bounded_where_the_plain_iteration_diverges():
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    z = matrix - matrix.mean(1, keepdim=True)
    s = z @ z.T + 1e-5 * torch.eye(32)
    b = torch.eye(32)
    for _ in range(15):
        b = 1.5 * b - 0.5 * b @ b @ b @ (s / s.norm())
    assert not (b @ z).norm() < 1e6
    assert torch.linalg.matrix_norm(newton_orthogonal(matrix, 15), 2) < 1.001


def test_oni_refuses_more_iterations_than_its_cap():
    with pytest.raises(ValueError, match="iterations is 8, expected at most 7"):
        cpnb.normalize(nn.Linear(3, 3), "oni", iterations=8)
    with pytest.raises(ValueError, match="iterations is 0, expected at least 1"):
        cpnb.normalize(nn.Linear(3, 3), "oni", iterations=0)


# --- orthogonal -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("map_", [None, "householder", "cayley", "matrix_exp"])
def test_orthogonal_starts_as_torchs_own_on_the_flat_kernel_and_keeps_the_norm(
    kind, map_
):
    source = LAYERS[kind]().double()
    groups = getattr(source, "groups", 1)
    layer = cpnb.normalize(source, "orthogonal", orthogonal_map=map_)
    matrices = source.weight.detach().reshape(groups, len(source.weight) // groups, -1)
    own = nn.Linear(1, 1, bias=False)
    own.weight = nn.Parameter(matrices)
    parametrizations.orthogonal(own)
    q = own.weight.detach().reshape(source.weight.shape)
    assert_close(layer.weight / layer.weight.norm(), q / q.norm())
    assert_close(layer.weight.norm(), source.weight.norm())


@pytest.mark.parametrize("map_", ["cayley", "matrix_exp"])
def test_orthogonal_maps_of_torch_repeat_with_a_generator(map_):
    def build(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"orthogonal_map": map_, "generator": generator}
        return cpnb.normalize(source, "orthogonal", **options).parametrizations.weight

    source = nn.Linear(6, 3)
    before = torch.get_rng_state()
    one, two, other = build(1), build(1), build(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0].base, two[0].base)
    assert not torch.equal(one[0].base, other[0].base)


def test_orthogonal_householder_survives_weight_decay_by_param_groups():
    layer = cpnb.normalize(
        nn.Linear(6, 4), "orthogonal", orthogonal_map="householder", gain=1.0
    )
    optimizer = torch.optim.AdamW(cpnb.param_groups(layer, 0.5), lr=0.1)
    for _ in range(3):
        layer(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    assert_close(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-5, rtol=0)


def test_orthogonal_starts_from_a_kernel_below_full_rank():
    source = nn.Linear(5, 3)
    nn.init.zeros_(source.weight)
    layer = cpnb.normalize(source, "orthogonal", gain=2.0)
    assert_close(layer.weight @ layer.weight.T, 4 * torch.eye(3))


def test_orthogonal_weight_that_turned_to_nan_is_nan_and_does_not_raise():
    layer = cpnb.normalize(nn.Linear(5, 3), "orthogonal")
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(float("nan"))
    assert layer.weight.isnan().all()


# --- zeros, gains, layouts ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standardized", {}),
        ("centered", {}),
        ("oni", {}),
        ("conditioned", {"mode": "row"}),
        ("conditioned", {"mode": "column"}),
        ("conditioned", {"mode": "row-column"}),
    ],
)
def test_kernel_with_zero_rows_and_columns_trains_without_nan(name, options):
    source = nn.Conv2d(3, 4, 2)
    with torch.no_grad():
        source.weight[1] = 0
        source.weight[:, 2] = 0
    layer = cpnb.normalize(source, name, **options)
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert not layer.weight[1].any()


@pytest.mark.parametrize("name", ["orthogonal", "oni", "conditioned", "standardized"])
def test_gain_multiplies_the_kernel_or_keeps_its_norm(name):
    source = nn.Conv2d(3, 4, 3)
    one, three = (cpnb.normalize(source, name, gain=g).weight for g in (1.0, 3.0))
    assert_close(three, 3 * one)
    learned = cpnb.normalize(source, name, gain="learnable")
    assert_close(learned.weight.norm(), source.weight.norm())
    learned(torch.randn(2, 3, 5, 5)).square().sum().backward()
    gain = learned.parametrizations.weight[0].gain
    assert isinstance(gain, nn.Parameter)
    assert gain.grad != 0


def test_standardized_with_a_gain_has_rows_of_that_norm():
    layer = cpnb.normalize(nn.Conv2d(3, 4, 3), "standardized", gain=1.5)
    # A sample's deviation: n - 1 in the denominator.
    expected = torch.full((4,), 1.5 * math.sqrt(26 / 27))
    assert_close(layer.weight.flatten(1).norm(dim=1), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["orthogonal", "standardized", "centered", "oni"])
def test_kernel_keeps_the_channels_innermost(name, channels):
    layer = cpnb.normalize(nn.Conv2d(channels, 4, 3), name)
    expected = layer.weight.detach()
    kernel = layer.parametrizations.weight
    innermost = kernel.original.detach().movedim(1, -1)
    innermost = innermost.clone(memory_format=torch.contiguous_format)
    kernel.original = nn.Parameter(innermost.movedim(-1, 1))
    assert layer.weight.movedim(1, -1).is_contiguous()
    assert layer.weight.stride(1) == 1
    assert_close(layer.weight, expected)
