"""Low-rank layers, their starts, Frobenius decay and the proximal step."""

import copy
import itertools
import math

import pytest
import torch
from shared import count, seeded
from torch import nn
from torch.testing import assert_close

import cpnb
from cpnb.methods import (
    FrobeniusDecay,
    LowRankConv2d,
    LowRankLinear,
    ProximalL1,
    factor_norms,
    factorize,
    first_and_last,
    fit_rank,
    frobenius_decay,
)
from cpnb.methods.factorized import STARTS, LowRankLayer, kaiming, spectral, unfold

FLOAT64 = {"dtype": torch.float64}
GEOMETRIES = [
    {},
    {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": "valid", "stride": 2},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
    {"padding": 1, "padding_mode": "replicate", "groups": 2},
    {"groups": 4, "bias": False},
]


def low_rank(model):
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, LowRankLayer)}


# --- kernels as matrices, and starts --------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_unfold_moves_each_entry_where_loops_say(groups):
    kernel = torch.randn(6, 4, 3, 2)
    expected = torch.zeros(groups, 6 // groups * 3, 4 * 2)
    for o, i, h, w in itertools.product(*map(range, kernel.shape)):
        group, inside = divmod(o, 6 // groups)
        expected[group, inside * 3 + h, i * 2 + w] = kernel[o, i, h, w]
    assert torch.equal(unfold(kernel, groups), expected)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_spectral_leaves_the_tail_of_the_singular_values(rank):
    kernel = torch.randn(8, 3, 1, 2, **FLOAT64)
    left, right = spectral(kernel.shape, rank, groups=2, weight=kernel, like=kernel)
    matrices = unfold(kernel, 2)
    rank = min(rank, 4)
    tail = torch.linalg.svdvals(matrices)[:, rank:].square().sum(1).sqrt()
    error = (matrices - left @ right.mT).norm(dim=(1, 2))
    assert_close(error, tail, rtol=1e-10, atol=1e-12)
    # Balanced: both sides hold half of every singular value.
    assert_close(left.mT @ left, right.mT @ right)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (5, 1), (1, 3)])
def test_kaiming_is_twice_the_height_times_too_wide(height, width):
    """Mean of many kernels; their own spread makes 3 % about four standard errors."""
    generator, like = seeded(), torch.empty(0, **FLOAT64)
    squares = []
    for _ in range(300):
        shape = (16, 8, height, width)
        left, right = kaiming(shape, 6, generator=generator, like=like)
        squares.append((left @ right.mT).square().mean())
    ratio = torch.stack(squares).mean().item() / (2 / (8 * height * width))
    assert ratio == pytest.approx(2 * height, rel=0.03)


@pytest.mark.parametrize("init", STARTS)
def test_layers_draw_from_their_generator_alone(init):
    before = torch.get_rng_state()
    generators = [seeded(n) for n in (0, 0, 1)]
    layers = [LowRankConv2d(3, 4, 3, init=init, generator=g) for g in generators]
    assert torch.equal(torch.get_rng_state(), before)
    states = [layer.state_dict() for layer in layers]
    assert_close(states[0], states[1], rtol=0, atol=0)
    assert not any(torch.equal(states[0][n], states[2][n]) for n in states[0])


# --- layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 2), (1, 2), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_conv_convolves_with_its_weight(options, size):
    layer = LowRankConv2d(4, 8, size, **options, rank=1, **FLOAT64)
    dense = cpnb.to_dense(layer)
    assert type(dense) is nn.Conv2d
    images = torch.randn(2, 4, 11, 12, **FLOAT64)
    assert_close(layer(images), dense(images))
    assert_close(layer(images[0]), dense(images[0]))


@pytest.mark.parametrize("options", [*GEOMETRIES, None], ids=str)
def test_factorize_at_full_rank_keeps_the_function_of_any_kernel(options):
    source, shape = nn.Linear(7, 5, **FLOAT64), (2, 3, 7)
    if options is not None:
        source = nn.Conv2d(4, 8, (3, 2), **options, **FLOAT64)
        shape = (2, 4, 11, 12)
    layer = factorize(source, rank=100, skip=())
    inputs = torch.randn(shape, **FLOAT64)
    assert_close(layer(inputs), source(inputs))
    assert_close(cpnb.to_dense(layer).weight, source.weight)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("size", [3, 1, (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_conv_keeps_the_layout_of_its_input(channels, size, rank):
    layer = LowRankConv2d(channels, 8, size, rank=rank)
    images = torch.randn(2, channels, 6, 6)
    output = layer(images)
    plain = output.clone(memory_format=torch.contiguous_format)
    assert output.stride() == plain.stride()
    if channels > 1:
        innermost = layer(images.contiguous(memory_format=torch.channels_last))
        assert innermost.is_contiguous(memory_format=torch.channels_last)
        assert_close(innermost, output, rtol=1e-5, atol=1e-5)


def test_factorize_copies_flags_and_bias_and_leaves_the_source_alone():
    source = nn.Conv2d(3, 4, 3).half().eval()
    source.weight.requires_grad_(False)
    before = copy.deepcopy(source.state_dict())
    layer = factorize(source, rank=4, skip=())
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert_close(source.state_dict(), before, rtol=0, atol=0)


def test_rank_is_said_in_break_even_units():
    layer = LowRankConv2d(16, 32, 3, bias=False, rank="same")
    each = 32 * 3 + 16 * 3
    assert 0 <= count(layer) - 32 * 16 * 9 < each
    assert layer.rank == layer.break_even_rank == 32
    assert LowRankConv2d(16, 32, 3, rank=0.25).rank == 8
    assert LowRankConv2d(2, 8, (3, 5), rank=20).rank == 2 * 5, "that of the matrix"
    assert LowRankConv2d(4, 8, 3, groups=2, rank=20).rank == 2 * 3
    for rank, error in ((0, ValueError), (1.5, ValueError), (True, TypeError)):
        with pytest.raises(error, match=f"rank is {rank}"):
            LowRankLinear(4, 4, rank=rank)
    with pytest.raises(ValueError, match="init is 'he', expected one of"):
        LowRankLinear(4, 4, init="he")


# --- whole models ---------------------------------------------------------------------


def test_factorize_leaves_the_first_and_the_last_layer_dense_unless_told():
    net = cpnb.DigitsNet()
    for skip, expected in (
        (None, {"conv2", "fc1"}),
        ((), {"conv1", "conv2", "fc1", "fc2"}),
        (("conv2", "fc2"), {"conv1", "fc1"}),
        (lambda name, layer: "fc" in name, {"conv1", "conv2"}),
    ):
        assert set(low_rank(factorize(net, rank=0.5, skip=skip))) == expected
    assert first_and_last(net) == ("conv1", "fc2")
    assert first_and_last(nn.Linear(2, 2)) == ("",)


def test_factorize_takes_functions_of_the_matrix_and_mappings():
    net = cpnb.DigitsNet()
    small = factorize(net, rank=fit_rank(0.5))
    for name, layer in low_rank(small).items():
        dense = net.get_submodule(name).weight
        assert cpnb.relative_error(dense, layer.weight) <= 0.5
    mixed = factorize(net, rank={"conv2": fit_rank(0.9), "fc1": 0.25})
    assert mixed.fc1.rank == round(0.25 * mixed.fc1.break_even_rank)


CONV1D = nn.Sequential(*(nn.Conv1d(3, 3, 3) for _ in range(3)))
DIGITS, OTHER = cpnb.DigitsNet(), {"conv2": 1, "fc2": 1}
KIND = "layer '1' is a Conv1d: expected exactly one of Conv2d, Li"
LACKS = r"rank lacks \['fc1'\] and has unknown \['fc2'\]"


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (nn.Linear(4, 4), {"rank": 1}, ValueError, r"skip=\(\) to take them in"),
        (CONV1D, {"rank": 1}, TypeError, KIND),
        (DIGITS, {"rank": 1, "skip": "fc9"}, ValueError, "skip names"),
        (DIGITS, {"rank": OTHER}, ValueError, LACKS),
    ],
    ids=["single layer", "kind", "name", "mapping"],
)
def test_factorize_refuses_bad_input_with_a_clear_error(model, options, error, text):
    with pytest.raises(error, match=text):
        factorize(model, **options)


# --- Frobenius decay ------------------------------------------------------------------

LAYERS = {
    "linear UV": lambda: LowRankLinear(7, 5, rank=3, **FLOAT64),
    "conv UV": lambda: LowRankConv2d(4, 6, (3, 2), groups=2, rank=3, **FLOAT64),
    "CP linear": lambda: cpnb.CPLinear(7, 5, rank=3, **FLOAT64),
    "CP conv": lambda: cpnb.CPConv2d(4, 6, (3, 2), groups=2, rank=5, **FLOAT64),
    "CP unsigned": lambda: cpnb.CPConv2d(4, 6, 3, rank=5, signed=False, **FLOAT64),
    "CP vector": lambda: cpnb.CPLinear(7, 1, rank=2, **FLOAT64),
    "CP number": lambda: cpnb.CPLinear(1, 1, rank=2, **FLOAT64),
    "CP conditioned": lambda: cpnb.normalize(
        cpnb.CPConv2d(4, 6, 3, rank=5, **FLOAT64), "conditioned"
    ),
}


def shaken(make):
    """A layer off every special point: σ ≠ 1, λ of both signs, columns not unit."""
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.7).add_(0.4 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_frobenius_decay_and_its_gradient_are_those_of_the_dense_kernel(make):
    layer = shaken(make)
    named = layer.named_parameters()
    trained = [p for name, p in named if p.requires_grad and name != "bias"]
    both = [frobenius_decay(layer, 0.3), 0.15 * layer.weight.square().sum()]
    assert_close(*both)
    gradients = [torch.autograd.grad(penalty, trained) for penalty in both]
    assert_close(*gradients, rtol=1e-7, atol=1e-10)


def net():
    dense = cpnb.DigitsNet(generator=seeded()).double()
    return factorize(dense, rank=4, generator=seeded(1))


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("mu", [None, 0.05])
def test_frobenius_hook_trains_as_the_loss_term_with_decay_on_the_rest(kind, mu):
    """The optimizer decays everything; the hook takes the factors out of that."""
    images, labels = torch.randn(40, 1, 8, 8, **FLOAT64), torch.arange(40) % 10
    hooked, summed = net(), net()
    make = getattr(torch.optim, kind)
    decayed = make(hooked.parameters(), lr=0.01, weight_decay=0.1)
    factors = [p for m in low_rank(summed).values() for p in (m.left, m.right)]
    others = {*summed.parameters()} - {*factors}
    groups = [{"params": factors, "weight_decay": 0.0}, {"params": [*others]}]
    plain = make(groups, lr=0.01, weight_decay=0.1)
    for step in range(5):
        decayed.zero_grad()
        nn.functional.cross_entropy(hooked(images), labels).backward()
        FrobeniusDecay(mu).before_step(hooked, decayed, step)
        decayed.step()
        plain.zero_grad()
        loss = nn.functional.cross_entropy(summed(images), labels)
        (loss + frobenius_decay(summed, 0.1 if mu is None else mu)).backward()
        plain.step()
    assert_close(hooked.state_dict(), summed.state_dict(), rtol=1e-6, atol=1e-8)


def test_frobenius_hook_spares_the_scale_of_cp_layers_on_request():
    layer = shaken(LAYERS["CP conv"])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.2)
    added = []
    for hook in (FrobeniusDecay(), FrobeniusDecay(scale=False)):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        hook.before_step(layer, optimizer, 0)
        added.append({name: p.grad for name, p in layer.named_parameters()})
    # What is left is the own decay that was taken off, in advance.
    assert_close(added[1].pop("scale"), -0.2 * layer.scale.detach())
    assert added[0].pop("scale").abs() > 0
    assert_close(added[0], added[1])


# --- norms and the proximal step ------------------------------------------------------


def test_factor_norms_are_those_of_the_unfolded_kernel_and_the_bound_holds():
    layer = shaken(lambda: LowRankConv2d(4, 6, 3, groups=2, rank=3, **FLOAT64))
    norms = factor_norms(layer, lr=0.5).loc[""]
    matrices = unfold(layer.weight.detach(), 2)
    nuclear = sum(torch.linalg.matrix_norm(m, "nuc") for m in matrices).item()
    square = layer.weight.square().sum().item()
    assert norms.nuclear == pytest.approx(nuclear)
    assert norms.frobenius == pytest.approx(math.sqrt(square))
    assert norms.effective_step == pytest.approx(0.5 / square)
    factors = layer.left.square().sum() + layer.right.square().sum()
    assert norms.bound == pytest.approx(factors.item() / 2)
    assert norms.bound > norms.nuclear * 1.01


def test_factor_norms_of_a_cp_layer_are_bound_by_its_component_weights():
    layer = shaken(lambda: cpnb.CPConv2d(4, 6, 3, rank=5, **FLOAT64))
    norms = factor_norms(nn.Sequential(layer)).loc["0"]
    assert norms.bound == pytest.approx((layer.sigma * layer.lam).abs().sum().item())
    wide = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), "nuc")
    assert norms.nuclear == pytest.approx(wide.item())
    assert norms.bound > norms.nuclear
    nn.init.zeros_(layer.lam)
    assert factor_norms(layer).effective_step.item() == math.inf
    nn.init.constant_(layer.lam, math.nan)
    assert factor_norms(layer).isna().all(axis=None)


def test_proximal_step_is_the_proximal_operator_of_the_penalty():
    """The new λ minimises |x − λ|²/2 + lr·μ/|σ|·|x|, found here on a fine grid."""
    layer = cpnb.CPLinear(4, 4, rank=6, **FLOAT64)
    with torch.no_grad():
        layer.lam.copy_(torch.linspace(-0.4, 0.5, 6))
        layer.scale.fill_(-1.5)
        layer.unit.fill_(1)
    before = layer.lam.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    ProximalL1(0.5).after_step(layer, optimizer, 0)
    grid = torch.linspace(-1, 1, 20001, **FLOAT64)
    cost = (grid - before[:, None]).square() / 2 + 0.2 * 0.5 / 1.5 * grid.abs()
    assert_close(layer.lam.detach(), grid[cost.argmin(1)], rtol=0, atol=1e-4)


def test_proximal_penalty_makes_zeros_that_truncation_removes_without_a_trace():
    net = cpnb.DigitsNet(generator=seeded())
    net = cpnb.canonicalize(net, init="unified", generator=seeded(1))
    data = cpnb.load_data("digits")
    cpnb.fit(net, data, epochs=8, lr=0.01, hooks=[ProximalL1(0.75)], progress=False)
    layers = cpnb.cp_layers(net)
    ranks = {name: int(layer.lam.count_nonzero()) for name, layer in layers.items()}
    whole = layers["conv2"].rank
    assert 1 < ranks["conv2"] < whole / 2
    small = cpnb.truncate(net.double().eval(), rank=ranks)
    assert small.conv2.rank == ranks["conv2"]
    images = torch.rand(50, 1, 8, 8, **FLOAT64)
    assert_close(small(images), net(images), rtol=1e-12, atol=1e-12)


def test_conv_weight_is_the_kernel_of_loops():
    layer = LowRankConv2d(3, 4, (2, 3), rank=3, init="kaiming", **FLOAT64)
    left, right = layer.left.view(4, 2, 3), layer.right.view(3, 3, 3)
    kernel = torch.zeros(4, 3, 2, 3, **FLOAT64)
    for o, i, h, w, r in itertools.product(*map(range, (4, 3, 2, 3, 3))):
        kernel[o, i, h, w] += (left[o, h, r] * right[i, w, r]).detach()
    assert_close(layer.weight.detach(), kernel)
