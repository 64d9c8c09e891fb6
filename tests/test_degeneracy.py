"""The degeneracy meter against definitions on the kernel and known tensors."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb.diagnostics import (
    ENERGY_LIMIT,
    FLOAT32_LIMIT,
    degeneracy,
    degeneracy_report,
)


def random_cp(shape, rank, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rank, **draw), [torch.randn(n, rank, **draw) for n in shape]


def border_rank_pair(step):
    """(a + step·b)^∘3/step − a^∘3/step, which tends to aab + aba + baa."""
    a, b = torch.eye(2, dtype=torch.float64).unbind()
    lam = torch.tensor([1.0, -1.0], dtype=torch.float64) / step
    return lam, [torch.stack([a + step * b, a], 1)] * 3


def terms(lam, factors):
    """Every component as a full tensor of its own, flattened."""
    columns = [
        cpnb.cp_to_kernel(lam[r : r + 1], [f[:, r : r + 1] for f in factors])
        for r in range(len(lam))
    ]
    return torch.stack([column.flatten() for column in columns])


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 4, 3), (6, 5), (7,)], ids=str)
def test_degeneracy_measures_what_the_full_tensors_say(shape):
    lam, factors = random_cp(shape, 4)
    found = degeneracy(lam, factors)
    parts = terms(lam, factors)
    sizes, norm = parts.norm(dim=1), parts.sum(0).norm()
    cosines = [
        (parts[r] @ parts[s] / sizes[r] / sizes[s]).item()
        for r in range(4)
        for s in range(4)
        if r != s
    ]
    assert found.rank == 4
    assert found.finite
    assert found.lam_max == pytest.approx((sizes.max() / norm).item())
    assert found.energy == pytest.approx((sizes.square().sum() / norm**2).item())
    # Without λ's sign a cosine may flip, but not its size.
    assert found.worst_cosine == pytest.approx(max(map(abs, cosines)))
    assert found.worst_cancellation == pytest.approx(min(0, *cosines))
    assert found.float32_error == pytest.approx(2**-23 * (sizes.sum() / norm).item())


def balanced(lam, factors):
    """The same components with all column norms of a component alike."""
    units, norms = cpnb.normalize_columns(factors)
    root = (lam * norms.prod(0)).abs() ** (1 / len(factors))
    signs = lam.sign()
    return [unit * root * (signs if n == 0 else 1) for n, unit in enumerate(units)]


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 4)], ids=str)
def test_sensitivity_is_the_squared_jacobian_of_the_balanced_factors(shape):
    lam, factors = random_cp(shape, 3)
    jacobians = torch.autograd.functional.jacobian(
        lambda *f: cpnb.cp_to_kernel(torch.ones_like(lam), f),
        tuple(balanced(lam, factors)),
    )
    expected = sum(j.square().sum().item() for j in jacobians)
    assert degeneracy(lam, factors).sensitivity == pytest.approx(expected)


def test_sensitivity_is_the_mean_change_under_factor_noise():
    lam, factors = random_cp((8, 6, 3, 3), 5)
    plain = balanced(lam, factors)
    ones = torch.ones_like(lam)
    kernel = cpnb.cp_to_kernel(ones, plain)
    generator = torch.Generator().manual_seed(1)
    std, samples = 1e-5, 2000
    changes = []
    for _ in range(samples):
        noisy = [
            f + std * torch.randn(f.shape, generator=generator, dtype=f.dtype)
            for f in plain
        ]
        changes.append((cpnb.cp_to_kernel(ones, noisy) - kernel).square().sum())
    changes = torch.stack(changes) / std**2
    # Four standard errors of the mean; what is beyond first order is 1e-10 of it.
    tolerance = 4 * changes.std().item() / math.sqrt(samples)
    expected = degeneracy(lam, factors).sensitivity
    assert tolerance < 0.05 * expected
    assert changes.mean().item() == pytest.approx(expected, abs=tolerance)


def test_dropping_half_the_components_costs_what_the_energy_limit_assumes():
    lam, factors = random_cp((6, 5, 4), 10)
    parts = terms(lam, factors)
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10).double()
    lost = (subsets @ parts).square().sum(1).mean() / parts.sum(0).square().sum()
    energy = degeneracy(lam, factors).energy
    assert lost.item() == pytest.approx((1 + energy) / 4)
    assert (1 + ENERGY_LIMIT) / 4 == 1  # the error of the zero kernel


def test_border_rank_tensor_raises_the_flag_the_closer_the_more():
    readings = [degeneracy(*border_rank_pair(10.0**-n)) for n in (1, 2, 3, 4)]
    assert all(found.degenerate for found in readings)
    for near, nearer in itertools.pairwise(readings):
        # λ_max grows like 1/(step·√3).
        assert nearer.lam_max / near.lam_max == pytest.approx(10, rel=0.05)
        assert nearer.worst_cancellation < near.worst_cancellation < -0.98
    assert readings[0].float32_safe
    assert not readings[3].float32_safe


def test_healthy_kernels_do_not_raise_the_flag():
    orthogonal = [torch.eye(n)[:, :3] for n in (5, 4, 3)]
    found = degeneracy(torch.tensor([3.0, -2.0, 1.0]), orthogonal)
    assert found.energy == pytest.approx(1)
    assert found.lam_max == pytest.approx(3 / math.sqrt(14))
    assert (found.worst_cosine, found.worst_cancellation) == (0, 0)
    assert found.float32_safe
    assert not found.degenerate
    for shape in ((64, 32, 3, 3), (16, 8, 3, 3), (10, 20)):
        rank = cpnb.break_even_rank(shape)
        start = cpnb.unified(shape, rank, generator=torch.Generator().manual_seed(0))
        assert not degeneracy(*start).degenerate


def test_components_that_add_up_are_no_cancellation():
    column = torch.ones(3, 2)
    found = degeneracy(torch.ones(2), [column, column])
    assert found.worst_cosine == pytest.approx(1)
    assert found.worst_cancellation == 0
    assert not found.degenerate
    opposed = degeneracy(torch.tensor([1.0, -0.5]), [column, column])
    assert opposed.worst_cancellation == pytest.approx(-1)
    # 1 − ½ leaves ½ of a norm: (1 + ¼)/¼.
    assert opposed.energy == pytest.approx(5)
    assert opposed.degenerate


@pytest.mark.parametrize("cosine", [-0.66, -0.67, -0.9])
def test_equal_pair_is_degenerate_beyond_the_cosine_the_limit_stands_for(cosine):
    rest = math.sqrt(1 - cosine**2)
    turned = torch.tensor([[1.0, cosine], [0.0, rest]], dtype=torch.float64)
    same = torch.ones(1, 2, dtype=torch.float64)
    found = degeneracy(torch.ones(2, dtype=torch.float64), [turned, same])
    assert found.worst_cancellation == pytest.approx(cosine)
    assert found.energy == pytest.approx(1 / (1 + cosine))
    assert found.degenerate == (cosine < 1 / ENERGY_LIMIT - 1)


def test_degeneracy_does_not_depend_on_gauge_scale_or_order():
    lam, factors = random_cp((5, 4, 3), 6)
    expected = degeneracy(lam, factors).to_row()
    order = torch.randperm(6)
    gauges = [
        cpnb.canonical_gauge(lam, factors),
        (lam[order], [f[:, order] for f in factors]),
        (lam / 7, [factors[0] * 7, *factors[1:]]),
        (lam, [*factors, torch.ones(1, 6, dtype=torch.float64)]),
    ]
    for gauge in gauges:
        assert degeneracy(*gauge).to_row() == pytest.approx(expected)
    scaled = degeneracy(1e200 * lam, factors).to_row()
    del scaled["sensitivity"], expected["sensitivity"]
    assert scaled == pytest.approx(expected)


def test_float32_error_is_the_size_of_the_error_of_rounding_to_float32():
    lam, factors = border_rank_pair(1e-4)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(20):
        # In a random basis, or the entries are too round to lose anything.
        frames = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
        turned = [
            q @ f for q, f in zip(torch.linalg.qr(frames)[0], factors, strict=True)
        ]
        units, norms = cpnb.normalize_columns(turned)
        weights = lam * norms.prod(0)
        kernel = cpnb.cp_to_kernel(weights, units)
        rounded = [t.float().double() for t in (weights, *units)]
        rebuilt = cpnb.cp_to_kernel(rounded[0], rounded[1:])
        errors.append(cpnb.relative_error(kernel, rebuilt).item())
        # λ and three factors lose at most 2⁻²⁴ each: twice 2⁻²³ in all.
        estimate = degeneracy(weights, units).float32_error
        assert errors[-1] <= 2 * estimate
    assert estimate > FLOAT32_LIMIT
    assert max(errors) > estimate / 10


def test_zero_kernel_is_healthy_and_total_cancellation_is_not():
    _, factors = random_cp((4, 3, 2), 3)
    zero = degeneracy(torch.zeros(3, dtype=torch.float64), factors)
    assert (zero.energy, zero.lam_max, zero.worst_cosine) == (0, 0, 0)
    assert (zero.sensitivity, zero.float32_error) == (0, 0)
    assert zero.float32_safe
    assert not zero.degenerate
    column = torch.ones(3, 2)
    gone = degeneracy(torch.tensor([1.0, -1.0]), [column, column])
    assert gone.degenerate
    assert not gone.float32_safe
    assert 1e7 < gone.lam_max < 1e8
    assert math.isfinite(gone.energy)


def test_components_without_weight_do_not_count():
    lam, factors = random_cp((4, 3, 2), 3)
    twin = [torch.cat([f, f[:, :1]], 1) for f in factors]
    more = degeneracy(torch.cat([lam, lam.new_zeros(1)]), twin)
    row = degeneracy(lam, factors).to_row()
    assert more.to_row() == pytest.approx(row | {"rank": 4})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_degeneracy_of_bad_numbers_is_a_finding_not_an_error(bad):
    lam, factors = random_cp((4, 3), 2)
    for place in (lam, factors[0]):
        kept = place.flatten()[0].clone()
        place.view(-1)[0] = bad
        found = degeneracy(lam, factors)
        place.view(-1)[0] = kept
        assert not found.finite
        assert found.degenerate
        assert not found.float32_safe
        assert math.isnan(found.energy)
    assert degeneracy(lam, factors).finite


def test_degeneracy_works_in_float64_whatever_the_dtype():
    lam, factors = random_cp((5, 4, 3), 4)
    exact = degeneracy(lam.half(), [f.half() for f in factors])
    same = degeneracy(lam.half().double(), [f.half().double() for f in factors])
    assert exact == same
    assert degeneracy(lam.requires_grad_(), factors).finite


def test_report_has_a_row_per_cp_layer_of_its_own_kernel():
    net = nn.Sequential(
        cpnb.CPConv2d(4, 6, 3, rank=5, signed=False), nn.ReLU(), cpnb.CPLinear(6, 2)
    ).double()
    with torch.no_grad():
        net[0].scale.fill_(-3)
        net[0].lam[0] = -2
    report = degeneracy_report(net)
    assert list(report.layers) == ["0", "2"]
    for name, found in report.layers.items():
        layer = net.get_submodule(name)
        lam, units = layer.components()
        assert found == degeneracy(lam, units)
        norm = layer.weight.norm()
        assert found.lam_max == pytest.approx((lam.abs().max() / norm).item())
    rows = report.to_rows()
    assert [row["layer"] for row in rows] == ["0", "2"]
    assert rows[0] == {"layer": "0"} | report.layers["0"].to_row()
    assert not report.degenerate
    assert report.float32_safe


def test_report_takes_a_bare_layer_and_a_pair():
    layer = cpnb.CPConv1d(3, 4, 3, rank=2)
    assert list(degeneracy_report(layer).layers) == ["CPConv1d"]
    report = degeneracy_report(border_rank_pair(1e-4))
    assert report.degenerate
    assert not report.float32_safe
    point = degeneracy_report(cpnb.CPConv2d(1, 1, 1, rank=2)).layers["CPConv2d"]
    assert point.finite  # no mode has a factor: the kernel is the number Σ λ


def test_report_shows_names_numbers_and_verdicts():
    net = nn.Sequential()
    net.add_module("<first>", cpnb.CPLinear(6, 5, rank=3))
    net.add_module("second", cpnb.CPLinear(6, 5, rank=2))
    net.add_module("third", cpnb.CPLinear(6, 5, rank=2))
    with torch.no_grad():
        for factor in net.second.factors:
            factor[:, 1] = factor[:, 0]
        net.second.lam.copy_(torch.tensor([1.0, -1.0]))
        net.third.lam[0] = float("nan")
    report = degeneracy_report(net)
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("layer")
    assert lines[1].endswith("healthy")
    assert lines[2].startswith("second")
    assert lines[2].endswith("degenerate, unsafe in float32")
    assert "-1.000" in lines[2]
    assert lines[3].endswith("not finite")
    page = report._repr_html_()
    assert page.count("<tr>") == 4
    assert "&lt;first&gt;" in page


def test_report_changes_nothing_and_draws_nothing():
    layer = cpnb.CPConv2d(4, 6, 3, rank=5)
    before = [p.detach().clone() for p in layer.parameters()]
    state = torch.get_rng_state()
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    torch.set_rng_state(state)
    degeneracy_report(layer)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, value in zip(layer.parameters(), before, strict=True):
        assert_close(parameter.detach(), value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: degeneracy(torch.ones(2), [torch.ones(3, 4)]),
            ValueError,
            r"factors\[0\] has 4 columns, expected rank 2",
        ),
        (lambda: degeneracy(torch.ones(2).int(), []), TypeError, "lam has dtype"),
        (lambda: degeneracy([1.0], []), TypeError, "lam is a list"),
        (
            lambda: degeneracy_report(nn.Linear(3, 2)),
            ValueError,
            "model is a Linear without CP layers. Call cpnb.canonicalize",
        ),
    ],
)
def test_degeneracy_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()
