"""Truncation against brute force, and the faults of the released code."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import cpnb


def make_layer(rank=6, seed=0, kind=cpnb.CPConv2d, **options):
    generator = torch.Generator().manual_seed(seed)
    sizes = (3, 5, 3) if kind is cpnb.CPConv2d else (7, 5)
    layer = kind(*sizes, rank=rank, dtype=torch.float64, generator=generator, **options)
    with torch.no_grad():
        layer.lam.copy_(torch.randn(rank, generator=generator, dtype=torch.float64))
        layer.scale.fill_(-1.5)
        layer.factors[0].mul_(torch.linspace(0.1, 3, rank))
    return layer


def kernel_of(layer, index):
    lam, units = layer.components()
    index = torch.as_tensor(index)
    kernel = cpnb.cp_to_kernel(lam[index], [u[:, index] for u in units])
    return kernel.view(layer.kernel_shape).detach()


def small_net():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    return cpnb.canonicalize(
        model, rank={"0": 5, "3": 8}, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("kind", [cpnb.CPConv2d, cpnb.CPLinear])
def test_truncate_keeps_the_largest_absolute_lambda(kind):
    layer = make_layer(kind=kind)
    for rank in range(1, 7):
        kept = layer.lam.abs().topk(rank).indices
        cut = cpnb.truncate(layer, rank=rank)
        assert cut.rank == rank
        assert_close(cut.weight, kernel_of(layer, kept))


def test_truncate_keeps_large_negative_lambda():
    """Sorting by signed λ, as the released code does, would throw the kernel away."""
    layer = cpnb.CPConv2d(8, 16, 3, rank=10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([-9.0, -8.0, *[0.5] * 8]))
    weight = layer.weight.detach()
    honest = cpnb.truncate(layer, keep=0.5)
    by_sign = cpnb.select_components(layer, layer.lam.argsort(descending=True)[:5])
    assert cpnb.relative_error(weight, honest.weight.detach()) < 0.1
    assert cpnb.relative_error(weight, by_sign.weight.detach()) > 0.95
    assert (honest.lam < 0).sum() == 2


def brute_force_greedy(layer):
    """Remove, one at a time, the component whose loss leaves the nearest kernel."""
    whole = layer.weight.detach()
    left, removed = list(range(layer.rank)), []
    while len(left) > 1:
        worst = min(
            left,
            key=lambda r: (
                whole - kernel_of(layer, [s for s in left if s != r])
            ).norm(),
        )
        left.remove(worst)
        removed.append(worst)
    return [left[0], *removed[::-1]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("signed", [True, False])
def test_greedy_order_equals_brute_force_on_kernels(seed, signed):
    layer = make_layer(seed=seed, signed=signed)
    order = cpnb.component_order(layer, "greedy").tolist()
    assert order == brute_force_greedy(layer)


def test_greedy_beats_lambda_when_components_cancel():
    """Once 0.5u is gone, removing -0.6u as well brings the kernel nearer, not away."""
    layer = cpnb.CPLinear(6, 6, rank=4, dtype=torch.float64)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.eye(6, dtype=torch.float64)[:, [0, 0, 1, 2]])
        layer.lam.copy_(torch.tensor([0.5, -0.6, 0.55, 0.58]))
    weight = layer.weight.detach()
    by_lam = cpnb.truncate(layer, rank=2).weight.detach()
    greedy = cpnb.truncate(layer, rank=2, key="greedy").weight.detach()
    assert cpnb.relative_error(weight, by_lam) > 0.9
    assert cpnb.relative_error(weight, greedy) < 0.15


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 5),
    key=st.sampled_from(["lam", "greedy"]),
    signed=st.booleans(),
)
def test_refit_solves_least_squares_and_never_raises_the_error(seed, rank, key, signed):
    layer = make_layer(seed=seed, signed=signed)
    weight = layer.weight.detach()
    plain = cpnb.truncate(layer, rank=rank, key=key)
    refit = cpnb.truncate(layer, rank=rank, key=key, refit=True)
    kept = cpnb.component_order(layer, key)[:rank].sort().values
    _, units = layer.components()
    columns = cpnb.khatri_rao([unit[:, kept] for unit in units])
    solution = torch.linalg.lstsq(columns.detach(), weight.reshape(-1, 1)).solution
    best = (columns @ solution).view_as(weight).detach()
    assert_close(refit.weight.detach(), best, rtol=1e-6, atol=1e-8)
    error = cpnb.relative_error(weight, refit.weight.detach())
    assert error <= cpnb.relative_error(weight, plain.weight.detach()) + 1e-12


def test_truncation_of_a_power_fit_has_the_predicted_error():
    """Greedy power terms are nested: cutting them costs exactly their own λ."""
    stock = nn.Conv2d(8, 16, 3, dtype=torch.float64)
    layer = cpnb.from_layer(stock, rank=30, generator=torch.Generator().manual_seed(0))
    for rank in (1, 10, 25):
        cut = cpnb.truncate(layer, rank=rank)
        explained = (cut.lam / stock.weight.norm()).square().sum()
        error = cpnb.relative_error(stock.weight, cut.weight)
        assert_close(error, (1 - explained).sqrt())


@pytest.mark.parametrize(
    ("keep", "expected"), [(1.0, 6), (0.99, 5), (0.5, 3), (0.1, 1), (1e-6, 1)]
)
def test_truncate_keeps_the_floor_of_a_fraction_but_at_least_one(keep, expected):
    assert cpnb.truncate(make_layer(), keep=keep).rank == expected


@given(rank=st.integers(1, 300), percent=st.integers(1, 100))
def test_kept_rank_is_the_floor_in_exact_arithmetic(rank, percent):
    assert cpnb.kept_rank(rank, percent / 100) == max(1, rank * percent // 100)


def test_truncate_of_a_model_takes_int_mapping_and_fraction_and_copies():
    model = small_net()
    before = copy.deepcopy(model.state_dict())

    def ranks(cut):
        return [layer.rank for layer in cpnb.cp_layers(cut).values()]

    assert ranks(cpnb.truncate(model, rank=6)) == [5, 6]
    assert ranks(cpnb.truncate(model, rank={"3": 2})) == [5, 2]
    assert ranks(cpnb.truncate(model, keep=0.5)) == [2, 4]
    cut = cpnb.truncate(model, rank=1)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.add_(1)
    assert ranks(model) == [5, 8]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_truncate_keeps_what_a_layer_is():
    layer = make_layer(signed=False, forward_mode="chain").eval()
    layer.lam.requires_grad_(False)
    cut = cpnb.truncate(layer, rank=3)
    assert not cut.signed
    assert cut.forward_mode == "chain"
    assert not cut.training
    assert not cut.lam.requires_grad
    assert cut.factors[0].requires_grad
    assert cut.weight.dtype == torch.float64
    assert_close(cut.bias, layer.bias)
    assert cut.bias is not layer.bias


def test_truncate_at_full_rank_changes_nothing():
    layer = make_layer()
    for refit, key in itertools.product([False, True], ["lam", "greedy"]):
        cut = cpnb.truncate(layer, rank=6, key=key, refit=refit)
        assert torch.equal(cut.weight, layer.weight)


def test_truncated_parameters_learn_with_a_new_optimizer_only():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cut = cpnb.truncate(model, keep=0.5)
    before = copy.deepcopy(cut.state_dict())

    def step(steps):
        cut(torch.ones(2, 1, 8, 8)).square().mean().backward()
        steps.step()
        return [torch.equal(v, before[k]) for k, v in cut.state_dict().items()]

    assert all(step(optimizer))
    assert not any(step(torch.optim.SGD(cut.parameters(), lr=0.1)))


def test_truncated_state_dict_loads_into_a_fresh_full_rank_model():
    cut = cpnb.truncate(small_net(), keep=0.5)
    fresh = small_net()
    fresh.load_state_dict(cut.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert_close(fresh(images), cut(images))


def broken(value):
    layer = make_layer()
    with torch.no_grad():
        layer.lam[0] = value
    return layer


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cpnb.truncate(nn.Linear(3, 2), rank=1), ValueError, "without CP lay"),
        (lambda: cpnb.truncate(make_layer()), ValueError, "rank is None and keep is N"),
        (
            lambda: cpnb.truncate(make_layer(), rank=2, keep=0.5),
            ValueError,
            "rank is 2 and keep is 0.5, expected exactly one",
        ),
        (lambda: cpnb.truncate(make_layer(), rank=0), ValueError, "rank is 0, expect"),
        (lambda: cpnb.truncate(make_layer(), rank=-3), ValueError, "rank is -3"),
        (
            lambda: cpnb.truncate(make_layer(), rank=0.5),
            TypeError,
            "rank is 0.5, expected an int >= 1. For a fraction use keep",
        ),
        (lambda: cpnb.truncate(make_layer(), rank=True), TypeError, "rank is True"),
        (
            lambda: cpnb.truncate(make_layer(), rank=7),
            ValueError,
            "rank is 7 for layer '', expected at most the 6 components",
        ),
        (
            lambda: cpnb.truncate(small_net(), rank={"1": 2}),
            ValueError,
            r"rank names \['1'\], expected some of \['0', '3'\]",
        ),
        (
            lambda: cpnb.truncate(small_net(), rank={"3": 9}),
            ValueError,
            "rank is 9 for layer '3', expected at most the 8",
        ),
        (
            lambda: cpnb.truncate(small_net(), rank={"3": 1.5}),
            TypeError,
            r"rank\['3'\] is 1.5",
        ),
        (lambda: cpnb.truncate(make_layer(), keep=0.0), ValueError, "keep is 0.0"),
        (lambda: cpnb.truncate(make_layer(), keep=1.5), ValueError, "keep is 1.5"),
        (
            lambda: cpnb.truncate(make_layer(), keep=float("nan")),
            ValueError,
            r"keep is nan, expected a fraction in \(0, 1\]",
        ),
        (
            lambda: cpnb.truncate(make_layer(), rank=2, key="size"),
            ValueError,
            r"key is 'size', expected one of \('lam', 'greedy', 'nested', ",
        ),
        (
            lambda: cpnb.truncate(broken(float("nan")), rank=2),
            ValueError,
            "NaN or infinite parameters.*before training diverged",
        ),
        (
            lambda: cpnb.select_components(make_layer(), [1, 1]),
            ValueError,
            r"index is \[1, 1\], expected distinct",
        ),
        (
            lambda: cpnb.select_components(make_layer(), []),
            ValueError,
            r"index is \[\]",
        ),
        (lambda: cpnb.select_components(make_layer(), [-1]), ValueError, r"\[-1\]"),
        (lambda: cpnb.select_components(make_layer(), [6]), ValueError, "less than 6"),
    ],
)
def test_truncation_refuses_bad_input_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()
