"""The degeneracy meter on known tensors, and the fit that holds components small."""

import itertools
import math

import pytest
import torch
from shared import random_cp, seeded

from cpnb.cp import canonical_gauge, cp_to_kernel, normalize_columns
from cpnb.initializers import unified
from cpnb.methods.degeneracy import ENERGY_LIMIT, degeneracy


def border_rank_pair(step):
    """(a + step·b)^∘3/step − a^∘3/step, which tends to aab + aba + baa."""
    a, b = torch.eye(2, dtype=torch.float64).unbind()
    lam = torch.tensor([1.0, -1.0], dtype=torch.float64) / step
    return lam, [torch.stack([a + step * b, a], 1)] * 3


def terms(lam, factors):
    """Every component as a full tensor of its own, flattened. Shape ``(rank, all)``."""
    units = torch.eye(len(lam), dtype=lam.dtype)
    return torch.stack([cp_to_kernel(lam * unit, factors).flatten() for unit in units])


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 4, 3), (6, 5), (7,)], ids=str)
def test_degeneracy_measures_what_the_full_tensors_say(shape):
    lam, factors = random_cp(shape, 4)
    meter = degeneracy(lam, factors)
    parts = terms(lam, factors)
    sizes = parts.norm(dim=1)
    norm = parts.sum(0).norm()
    pairs = itertools.permutations(range(4), 2)
    cosines = [(parts[r] @ parts[s] / sizes[r] / sizes[s]).item() for r, s in pairs]
    assert meter.rank == 4
    assert meter.finite
    assert meter.lam_max == pytest.approx((sizes.max() / norm).item())
    assert meter.energy == pytest.approx((sizes.square().sum() / norm**2).item())
    # Without λ's sign a cosine may flip, but not its size.
    assert meter.worst_cosine == pytest.approx(max(map(abs, cosines)))
    assert meter.worst_cancellation == pytest.approx(min(0, *cosines))
    assert meter.float32_error == pytest.approx(2**-23 * (sizes.sum() / norm).item())


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 4)], ids=str)
def test_sensitivity_is_the_squared_jacobian_of_the_balanced_factors(shape):
    """The mean of ‖ΔW‖² for noise of unit variance, to first order."""
    lam, factors = random_cp(shape, 3)
    units, norms = normalize_columns(factors)
    root = (lam * norms.prod(0)).abs() ** (1 / len(factors))
    balanced = [units[0] * root * lam.sign(), *[unit * root for unit in units[1:]]]
    jacobians = torch.autograd.functional.jacobian(
        lambda *f: cp_to_kernel(torch.ones_like(lam), f), tuple(balanced)
    )
    expected = sum(j.square().sum().item() for j in jacobians)
    assert degeneracy(lam, factors).sensitivity == pytest.approx(expected)


def test_dropping_half_the_components_costs_what_the_energy_limit_assumes():
    lam, factors = random_cp((6, 5, 4), 10)
    parts = terms(lam, factors)
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10).double()
    lost = (subsets @ parts).square().sum(1).mean() / parts.sum(0).square().sum()
    assert lost.item() == pytest.approx((1 + degeneracy(lam, factors).energy) / 4)
    assert (1 + ENERGY_LIMIT) / 4 == 1  # the error of the zero kernel


def test_border_rank_tensor_raises_the_flag_the_closer_the_more():
    readings = [degeneracy(*border_rank_pair(10.0**-n)) for n in (1, 2, 3, 4)]
    assert all(meter.degenerate for meter in readings)
    for near, nearer in itertools.pairwise(readings):
        # λ_max grows like 1/(step·√3).
        assert nearer.lam_max / near.lam_max == pytest.approx(10, rel=0.05)
        assert nearer.worst_cancellation < near.worst_cancellation < -0.98


def test_healthy_kernels_do_not_raise_the_flag():
    orthogonal = [torch.eye(n)[:, :3] for n in (5, 4, 3)]
    meter = degeneracy(torch.tensor([3.0, -2.0, 1.0]), orthogonal)
    assert meter.energy == pytest.approx(1)
    assert (meter.worst_cosine, meter.worst_cancellation) == (0, 0)
    start = unified((64, 32, 3, 3), 179, generator=seeded())
    assert not degeneracy(*start).degenerate
    column = torch.ones(3, 2)  # components that add up cancel nothing
    meter = degeneracy(torch.ones(2), [column, column])
    assert (meter.worst_cancellation, meter.degenerate) == (0, False)


def test_degeneracy_does_not_depend_on_gauge_scale_or_order():
    lam, factors = random_cp((5, 4, 3), 6)
    expected = degeneracy(lam, factors).to_row()
    order = torch.randperm(6)
    gauges = [
        canonical_gauge(lam, factors),
        (lam[order], [f[:, order] for f in factors]),
        (lam / 7, [factors[0] * 7, *factors[1:]]),
        (lam, [*factors, torch.ones(1, 6, dtype=torch.float64)]),
    ]
    for gauge in gauges:
        assert degeneracy(*gauge).to_row() == pytest.approx(expected)
    scaled = degeneracy(1e200 * lam, factors).to_row()
    del scaled["sensitivity"], expected["sensitivity"]
    assert scaled == pytest.approx(expected)


def test_zero_kernel_is_healthy_and_total_cancellation_is_not():
    _, factors = random_cp((4, 3, 2), 3)
    row = degeneracy(torch.zeros(3, dtype=torch.float64), factors).to_row()
    assert (row.pop("rank"), row.pop("finite")) == (3, 1)
    assert not any(row.values())
    column = torch.ones(3, 2)
    gone = degeneracy(torch.tensor([1.0, -1.0]), [column, column])
    assert gone.degenerate
    assert 1e7 < gone.lam_max < 1e8
    assert math.isfinite(gone.energy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_degeneracy_of_bad_numbers_is_a_finding_not_an_error(bad, place):
    lam, factors = random_cp((4, 3), 2)
    (lam, *factors)[place].view(-1)[0] = bad
    meter = degeneracy(lam, factors)
    assert not meter.finite
    assert meter.degenerate
    assert math.isnan(meter.energy)


def test_degeneracy_refuses_shapes_that_disagree():
    text = r"factors\[0\] has 4 columns, expected rank 2 \(from lam\)"
    with pytest.raises(ValueError, match=text):
        degeneracy(torch.ones(2), [torch.ones(3, 4)])
