"""Rules that look at a kernel: the smallest rank that does, and no draw used up."""

import copy
import math

import pytest
import torch
from torch import nn

import cpnb
from cpnb.budgets import ParameterRatio
from cpnb.rules import EffectiveRank, EnergyRank, FitRank


def kernel(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("error", [0.95, 0.7, 0.4])
@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (6, 5, 4), (12, 9)], ids=str)
def test_fit_rank_is_the_first_whose_greedy_fit_is_close_enough(shape, error):
    tensor = kernel(*shape)
    rank = FitRank(error).count(tensor, generator=seeded())
    errors = [
        cpnb.power_method(tensor, k, generator=seeded()).relative_error
        for k in (rank, max(1, rank - 1))
    ]
    assert errors[0] <= error + 1e-12
    assert rank == 1 or errors[1] > error


def test_fit_rank_looks_beyond_its_first_components():
    tensor = kernel(16, 12, 3, 3)
    rank = FitRank(0.35).count(tensor, generator=seeded())
    assert rank > 16  # it asks for 16 components at a time
    errors = [
        cpnb.power_method(tensor, k, generator=seeded()).relative_error
        for k in (rank - 1, rank)
    ]
    assert errors[1] <= 0.35 < errors[0]


def test_fit_rank_of_orthogonal_components_is_their_number():
    lam = torch.tensor([8.0, 4.0, 2.0, 1.0])
    frames = [torch.eye(n)[:, :4] for n in (6, 5, 4)]
    tensor = cpnb.cp_to_kernel(lam, frames)
    # What is left of ‖W‖² = 85 after k components: 21, 5, 1, 0.
    for error, expected in ((0.9, 1), (0.4, 2), (0.2, 3), (0.1, 4)):
        assert FitRank(error).count(tensor) == expected
    for share, expected in ((0.7, 1), (0.9, 2), (0.98, 3), (0.99, 4)):
        assert EnergyRank(share).count(tensor) == expected


def test_energy_rank_is_fit_rank_in_other_words():
    tensor = kernel(9, 8, 3, 3)
    for share in (0.2, 0.6, 0.8):
        energy = EnergyRank(share).count(tensor, generator=seeded())
        fit = FitRank(math.sqrt(1 - share)).count(tensor, generator=seeded())
        assert energy == fit


def test_fit_rank_of_a_matrix_counts_singular_values():
    matrix = kernel(7, 30)
    values = torch.linalg.svdvals(matrix)
    for error in (0.8, 0.3, 1e-3, 1e-12):
        tails = [values[k:].norm() / values.norm() for k in range(7)]
        expected = sum(tail > error for tail in tails)
        assert FitRank(error).count(matrix) == expected
    assert FitRank(1e-12).count(matrix) == 7


def test_effective_rank_is_the_exponential_of_the_entropy():
    tensor = kernel(8, 5, 3, 2)
    rows = torch.stack([tensor[o].flatten() for o in range(8)])
    values = torch.linalg.svdvals(rows)
    share = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist()))
    assert EffectiveRank().count(tensor) == round(expected)
    tall = tensor.reshape(-1, 5)
    assert EffectiveRank().count(tall) == EffectiveRank().count(tall.T)
    assert EffectiveRank().count(torch.ones(4, 3, 2)) == 1
    assert EffectiveRank().count(torch.ones(4)) == 1


@pytest.mark.parametrize(
    "rule", [FitRank(0.1), EnergyRank(0.9), EffectiveRank()], ids=str
)
def test_kernel_rules_give_a_zero_kernel_one_component(rule):
    assert rule.count(torch.zeros(4, 3, 2)) == 1
    assert rule.count(torch.zeros(4, 3)) == 1


@pytest.mark.parametrize("given", [True, False], ids=["generator", "default"])
def test_kernel_rules_draw_nothing_from_the_generator(given):
    generator = torch.Generator().manual_seed(3) if given else None
    source = generator or torch.default_generator
    before = source.get_state()
    first = FitRank(0.5).count(kernel(6, 5, 4), generator=generator)
    assert torch.equal(source.get_state(), before)
    assert FitRank(0.5).count(kernel(6, 5, 4), generator=generator) == first


@pytest.mark.parametrize("generator", [None, 7], ids=["default", "generator"])
@pytest.mark.parametrize("error", [0.5, 0.3])
def test_from_layer_reaches_the_error_it_was_asked_for(error, generator):
    layer = nn.Conv2d(1, 12, (5, 3)) if error == 0.5 else nn.Conv2d(8, 12, 3)
    generator = None if generator is None else seeded(generator)
    new = cpnb.from_layer(layer, rank=FitRank(error), generator=generator)
    found = cpnb.relative_error(layer.weight, new.weight).item()
    assert found <= error + 1e-6  # the layer is rounded to float32
    assert new.rank > 1


def test_from_layer_takes_every_rule_for_every_kind_of_layer():
    layers = [
        nn.Conv1d(3, 4, 3),
        nn.Conv3d(2, 3, 2),
        nn.Linear(6, 5),
        nn.Conv2d(1, 1, 1),
    ]
    rules = [FitRank(0.5), EnergyRank(0.5), EffectiveRank(), ParameterRatio(1.0)]
    for layer in layers[:3]:
        for rule in rules:
            assert cpnb.from_layer(layer, rank=rule).rank >= 1
    for rule in rules[:3]:
        assert cpnb.from_layer(layers[3], rank=rule).rank == 1


def test_canonicalize_takes_a_rule_for_all_layers_or_for_one():
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7))
    same = cpnb.canonicalize(model, rank=EffectiveRank())
    for name, layer in cpnb.cp_layers(same).items():
        expected = EffectiveRank().count(model.get_submodule(name).weight)
        assert layer.rank == expected
    ranks = {"0": FitRank(0.4), "2": ParameterRatio(0.8)}
    mixed = cpnb.cp_layers(cpnb.canonicalize(model, rank=ranks))
    assert mixed["0"].rank == FitRank(0.4).count(model[0].weight)
    # 7·9 + 7 = 70 parameters allow 56: 7 of bias, 1 of σ, 17 for each of 2 components.
    assert mixed["2"].rank == 2


def noisy():
    return kernel(4, 3, 2).fill_(float("nan"))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: FitRank(0), ValueError, r"error is 0, expected a number in \(0, 1\)"),
        (lambda: FitRank(1.0), ValueError, "error is 1.0"),
        (lambda: FitRank(True), ValueError, "error is True"),
        (lambda: FitRank(float("nan")), ValueError, "error is nan"),
        (lambda: EnergyRank(1.5), ValueError, r"share is 1.5, expected a number in"),
        (lambda: FitRank(0.5).count(noisy()), ValueError, "kernel has 24 NaN"),
        (lambda: EffectiveRank().count(noisy()), ValueError, "kernel has 24 NaN"),
        (lambda: FitRank(0.5).count([1.0]), TypeError, "kernel is a list"),
        (
            lambda: FitRank(1e-9).count(kernel(5, 4, 3)),
            ValueError,
            r"FitRank\(error=1e-09\), but the greedy power method leaves a relative "
            r"error of 0.\d+ with 12 components",
        ),
        (
            lambda: cpnb.resolve_rank(FitRank(0.1), (4, 3)),
            ValueError,
            r"rank is FitRank\(error=0.1\), which needs a kernel to look at, expected",
        ),
        (
            lambda: cpnb.CPLinear(4, 3, rank=EffectiveRank()),
            ValueError,
            r"EffectiveRank\(\), which needs a kernel.*cpnb.from_layer",
        ),
    ],
)
def test_kernel_rules_refuse_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_rules_compare_print_and_copy_as_values():
    assert FitRank(0.1) == copy.deepcopy(FitRank(0.1)) != FitRank(0.2)
    assert str(FitRank(0.1)) == "FitRank(error=0.1)"
    assert {FitRank(0.1): 1}[FitRank(0.1)] == 1
    with pytest.raises(AttributeError):
        FitRank(0.1).error = 0.2


@pytest.mark.parametrize("method", [cpnb.power_method, cpnb.als, cpnb.bounded_als])
def test_decompositions_take_a_rule_as_their_rank(method):
    kernel = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    result = method(
        kernel, cpnb.FitRank(0.6), generator=torch.Generator().manual_seed(1)
    )
    greedy = cpnb.power_method(
        kernel, result.lam.numel(), generator=torch.Generator().manual_seed(1)
    )
    assert greedy.relative_error <= 0.6
    assert result.relative_error <= 0.6
