"""CP layers against torch's own: every geometry, both forwards, every gradient."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared import randn, seeded
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import cpnb
from cpnb import CPConv1d, CPConv2d, CPConv3d, CPLinear, layers, to_dense
from cpnb.convert import step_gauge_
from cpnb.cp import relative_error
from cpnb.initializers import INITIALIZERS
from cpnb.layers import COLUMN, SHORTEST, SLOW

KINDS = {1: (CPConv1d, (9,)), 2: (CPConv2d, (8, 9)), 3: (CPConv3d, (6, 5, 7))}
MODES = ["dense", "chain"]


def loop_conv2d(images, weight, bias, stride, padding, dilation, groups):
    """Convolution as sums over zero-padded images, one product at a time."""
    (top, left), (step_y, step_x), (gap_y, gap_x) = padding, stride, dilation
    images = nn.functional.pad(images, (left, left, top, top))
    out, per_group, height, width = weight.shape
    rows = (images.shape[2] - gap_y * (height - 1) - 1) // step_y + 1
    columns = (images.shape[3] - gap_x * (width - 1) - 1) // step_x + 1
    result = torch.zeros(len(images), out, rows, columns, dtype=images.dtype)
    sizes = out, rows, columns, per_group, height, width
    for o, y, x, i, h, w in itertools.product(*map(range, sizes)):
        channel = o // (out // groups) * per_group + i
        row, column = y * step_y + h * gap_y, x * step_x + w * gap_x
        result[:, o, y, x] += weight[o, i, h, w] * images[:, channel, row, column]
    return result + bias[:, None, None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("signed", [True, False])
def test_conv2d_equals_the_loop_specification(mode, signed):
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    groups = 2 if signed else 1
    options = {"groups": groups, "rank": 3, "forward_mode": mode, "signed": signed}
    layer = CPConv2d(4, 4, (3, 2), **geometry, **options, dtype=torch.float64)
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([1.0, -2.0, 0.5]))
        layer.scale.fill_(-1.5)
    lam = layer.lam if signed else layer.lam.abs()
    units = [factor / factor.norm(dim=0) for factor in layer.factors]
    kernel = torch.einsum("r,or,ir,hr,wr->oihw", layer.sigma * lam, *units).detach()
    images = randn(1, 4, 5, 5)
    expected = loop_conv2d(images, kernel, layer.bias, **geometry, groups=groups)
    assert_close(layer(images), expected)
    assert_close(layer.weight, kernel)


@st.composite
def geometries(draw):
    """A valid convolution: dimension, channels, kernel, stride, padding and so on."""
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    per_axis = st.tuples(*[st.integers(1, 3)] * ndim)
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    numbers = st.integers(0, 2) | st.tuples(*[st.integers(0, 2)] * ndim)
    padding = draw(numbers | st.sampled_from(["same", "valid"]))
    modes = ["zeros", "zeros", "reflect", "replicate", "circular"]
    return {
        "ndim": ndim,
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(st.integers(1, 3) | per_axis),
        "stride": 1 if padding == "same" else draw(st.integers(1, 3) | per_axis),
        "padding": padding,
        "dilation": draw(st.sampled_from([1, 2])),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(modes)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }


# Torch says so itself, for its own layers too, on the first such call.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=120)
@given(
    geometry=geometries(),
    rank=st.integers(1, 7),
    batched=st.booleans(),
    channels_last=st.booleans(),
    signed=st.booleans(),
)
def test_conv_dense_and_chain_and_stock_forward_agree(
    geometry, rank, batched, channels_last, signed
):
    ndim = geometry.pop("ndim")
    kind, size = KINDS[ndim]
    generator = seeded(rank)
    layer = kind(**geometry, rank=1, signed=signed, generator=generator)
    layer.resize(rank)  # also above the ranks that are of use
    layer.reset_parameters(generator)
    images = randn(2, geometry["in_channels"], *size, dtype=geometry["dtype"])
    if channels_last and ndim > 1:
        layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
        images = images.to(memory_format=layouts[ndim])
    if not batched:
        images = images[0]
    expected = to_dense(layer)(images)
    for mode in (*MODES, "auto"):
        layer.forward_mode = mode
        assert_close(layer(images), expected, msg=lambda text, m=mode: f"{m}: {text}")


@settings(max_examples=80)
@given(
    data=st.data(), geometry=geometries(), rank=st.integers(1, 5), batched=st.booleans()
)
def test_transposed_convolution_agrees_with_torchs(data, geometry, rank, batched):
    ndim, dtype = geometry["ndim"], geometry["dtype"]
    names = ["in_channels", "out_channels", "kernel_size", "stride", "groups", "bias"]
    options = {name: geometry[name] for name in [*names, "dilation", "dtype"]}
    kind, size = getattr(layers, f"CPConvTranspose{ndim}d"), KINDS[ndim][1]
    room = kind(**options, rank=1)
    extra = [data.draw(st.integers(0, step - 1)) for step in room.stride]
    options["output_padding"] = tuple(extra)
    options["padding"] = data.draw(st.integers(0, 1))
    layer = kind(**options, rank=1)
    layer.resize(rank)
    layer.reset_parameters(seeded(rank))
    stock = to_dense(layer)
    assert type(stock) is kind.stock and stock.extra_repr() in repr(layer)
    images = randn(2, geometry["in_channels"], *size, dtype=dtype)
    if ndim == 2:
        images = images.to(memory_format=torch.channels_last)
    images = images if batched else images[0]
    expected = stock(images)
    wanted = expected.shape[-ndim:]  # said in words instead of by output_padding
    for mode in (*MODES, "auto"):
        layer.forward_mode = mode
        assert_close(layer(images), expected)
        assert_close(layer(images, wanted), stock(images, wanted))
    assert layer.bias is None or layer.bias.shape == stock.bias.shape


@settings(max_examples=40)
@given(
    features=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    lead=st.lists(st.integers(1, 3), max_size=2),
    rank=st.integers(1, 7),
    bias=st.booleans(),
)
def test_linear_dense_and_chain_and_stock_forward_agree(features, lead, rank, bias):
    layer = CPLinear(*features, bias, rank=1, dtype=torch.float64)
    layer.resize(rank)
    layer.reset_parameters()
    rows = randn(*lead, features[0])
    expected = to_dense(layer)(rows)
    for mode in (*MODES, "auto"):
        layer.forward_mode = mode
        assert_close(layer(rows), expected)
        assert_close(layer(input=rows), expected)  # torch's name of the argument


SIZES = {CPConv2d: (16, 16, 3), CPConv1d: (4, 8, 5), CPLinear: (24, 12)}


def scaled(layer, exponents, dtype):
    """The layer with its columns at other lengths, and in float64 with unit columns."""
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        for factor, exponent in zip(layer.factors, exponents, strict=False):
            factor.mul_(10.0**exponent)
        layer.to(dtype)
        exact = copy.deepcopy(layer).double()
        for factor in exact.factors:
            factor.div_(factor.norm(dim=0))
    return layer, exact


def assert_equal_functions(layer, exact, limit):
    """The same kernel and, by both forwards, the same outputs, to ``limit``."""
    assert relative_error(exact.weight, layer.weight.double()) < limit
    sizes = [6] * (len(layer.kernel_shape) - 2)
    inputs = randn(2, layer.kernel_shape[1], *sizes).to(layer.lam.dtype)
    expected = exact(inputs.double())
    for mode in MODES:
        layer.forward_mode = mode
        output = layer(inputs)
        assert output.dtype == layer.lam.dtype
        assert relative_error(expected, output.double()) < 2 * limit
    for unit, wanted in zip(layer.components()[1], exact.factors, strict=True):
        assert relative_error(wanted, unit.double()) < limit


@pytest.mark.parametrize("kind", SIZES)
@settings(max_examples=25)
@given(st.lists(st.floats(-15, 15), min_size=4, max_size=4))
@example([15.0] * 4)
@example([-15.0] * 4)
@example([15.0, -15.0, 15.0, -15.0])
@example([-15.0, -15.0, 15.0, 15.0])
@example([15.0, 0.0, 0.0, -15.0])
def test_function_does_not_depend_on_the_length_of_columns(kind, exponents):
    start = kind(*SIZES[kind], rank=8)
    assert_equal_functions(*scaled(start, exponents, torch.float32), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIZES)
def test_function_is_right_for_all_columns_half_precision_can_store(kind, dtype):
    info = torch.finfo(dtype)
    start = kind(*SIZES[kind], rank=8)
    least = math.log10(info.smallest_normal) + 1
    most = math.log10(info.max) - 0.5
    alike = [[each] * 4 for each in (0, least, most, least / 2, most / 2)]
    mixed = [[least, most] * 2, [most, least] * 2, [least, 0, 0, most]]
    for exponents in alike + mixed:
        assert_equal_functions(*scaled(start, exponents, dtype), 2 * info.eps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "lam", "exponent"),
    # With weight a gradient is as large as columns are short: half has no room for it.
    [
        (torch.float32, 0.0, -15),
        (torch.float32, 1.0, -15),
        (torch.float16, 0.0, -4.2),
        (torch.float16, 1.0, -2),
        (torch.bfloat16, 0.0, -37),
    ],
)
def test_gradients_are_finite_for_tiny_and_zero_columns(dtype, lam, exponent, mode):
    start = CPConv2d(6, 8, 3, rank=4, forward_mode=mode)
    with torch.no_grad():
        start.lam.fill_(lam)
        start.factors[0][:, 3] = 0
    layer, _ = scaled(start, [exponent] * 4, dtype)
    layer(randn(1, 6, 5, 5).to(dtype)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    assert layer.lam.grad[:3].abs().min() > 0  # weight zero can come back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_agrees_with_full_precision(dtype, mode):
    layer = CPConv2d(3, 8, 3, rank=6, forward_mode=mode)
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype):
        output = layer(images)
    assert output.dtype == dtype
    assert_close(output.float(), layer(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("init", sorted(INITIALIZERS))
def test_every_start_and_a_truncation_are_in_the_step_gauge(init, signed):
    layer = CPConv2d(4, 8, 3, rank=9, init=init, signed=signed, dtype=torch.float64)
    for one in (layer, cpnb.truncate(layer, keep=0.6)):
        slope = torch.autograd.grad(one.weight.square().sum().sqrt(), one.scale)[0]
        assert slope.item() == pytest.approx(1 / SLOW, rel=1e-6)
        assert one.sigma.item() == pytest.approx(1 / SLOW)
        lam = one.components()[0].abs()
        for factor in one.factors:
            wanted = COLUMN * math.sqrt(8 / len(factor)) * torch.ones_like(lam)
            assert_close(factor.norm(dim=0) / lam, wanted)


@pytest.mark.parametrize("signed", [True, False])
def test_step_gauge_changes_the_stored_lengths_and_not_the_function(signed):
    layer = CPConv2d(3, 6, 3, rank=5, signed=signed, dtype=torch.float64)
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([2.0, -1.0, 0.0, 1e-6, 3.0]))
        layer.scale.fill_(-7.0)
        for factor in layer.factors:
            factor.mul_(torch.logspace(-3, 3, 5))
    kernel = layer.weight.detach().clone()
    assert step_gauge_(layer) is layer
    assert_close(layer.weight, kernel)
    shortest = COLUMN * SHORTEST * layer.components()[0].square().mean().sqrt()
    assert_close(layer.factors[0].norm(dim=0)[2:4], shortest.expand(2))  # not 0
    with torch.no_grad():
        for factor in layer.factors:  # as weight decay does
            factor.mul_(0.5)
    assert_close(layer.weight, kernel)


def test_step_gauge_takes_zero_kernels_and_refuses_computed_columns():
    zero = CPLinear(4, 3, rank=2)
    nn.init.zeros_(zero.lam)
    assert not step_gauge_(zero).weight.any()
    assert zero.scale.item() == SLOW
    with pytest.raises(TypeError, match="remove_normalizer"):
        step_gauge_(cpnb.normalize(CPLinear(4, 3, rank=2), "conditioned"))


def test_checkpoint_without_a_unit_keeps_its_function():
    old, new = CPLinear(6, 4, rank=3), CPLinear(6, 4, rank=3)
    nn.init.ones_(old.unit)
    state = old.state_dict()
    del state["unit"]
    new.load_state_dict(state)
    assert torch.equal(new.weight, old.weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (4, 2)])
def test_forward_keeps_the_memory_layout_of_its_input(mode, channels, groups):
    layer = CPConv2d(channels, 8, 3, groups=groups, rank=4, forward_mode=mode)
    images = torch.randn(2, 6, 6, channels).permute(0, 3, 1, 2)
    output = layer(images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output = layer(images.reshape(-1).view(2, channels, 6, 6))
    assert output.is_contiguous()
    output.view(2, -1)  # what many networks do before their linear layers


CASES = {
    "conv": (lambda r: CPConv2d(32, 64, 3, padding=1, rank=r), (32, 8, 8)),
    "groups": (lambda r: CPConv2d(32, 64, 3, 2, groups=4, rank=r), (32, 9, 9)),
    "pointwise": (lambda r: CPConv2d(32, 64, 1, rank=r), (32, 8, 8)),
    "grey": (lambda r: CPConv2d(1, 64, 5, rank=r), (1, 12, 12)),
    "linear": (lambda r: CPLinear(300, 100, rank=r), (300,)),
}


def flops(call, *arguments):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


def test_layer_has_torchs_argument_order_and_repr():
    layer = CPConv2d(4, 8, (3, 5), 2, 1, 2, 4, False, "reflect", rank=3)
    stock = nn.Conv2d(4, 8, (3, 5), 2, 1, 2, 4, False, "reflect")
    assert stock.extra_repr() in repr(layer)
    assert "rank=3 (0.38 of break-even 8)" in repr(layer)
    assert "signed" not in repr(layer)
    assert "signed=False" in repr(CPLinear(4, 2, rank=1, signed=False))
    assert "forward_mode='chain'" in repr(CPLinear(4, 2, forward_mode="chain"))


@pytest.mark.parametrize("kind", SIZES)
def test_generator_makes_a_layer_repeatable_and_leaves_the_global_one(kind):
    state = torch.get_rng_state()
    generators = seeded(7), seeded(7)
    first, again = (kind(*SIZES[kind], generator=each) for each in generators)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    first.reset_parameters(seeded(8))
    assert not torch.allclose(first.weight, again.weight)


@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_state_dict_of_another_rank_is_adopted_by_the_same_parameters(rank, optimizer):
    source, target = (nn.Sequential(CPConv2d(3, 4, 3, rank=r)) for r in (5, rank))
    before = list(target.parameters())
    steps = optimizer(target.parameters(), lr=0.1)
    target(torch.randn(2, 3, 6, 6)).sum().backward()  # gradients of another shape
    target.load_state_dict(source.state_dict())
    assert target[0].rank == 5
    assert torch.equal(target[0].weight, source[0].weight)
    assert all(map(lambda a, b: a is b, target.parameters(), before))
    # So an optimizer made before trains them.
    target(torch.randn(2, 3, 6, 6)).square().sum().backward()
    steps.step()
    assert not any(map(torch.equal, target.parameters(), source.parameters()))


SMALL = CPConv2d(3, 4, 3, rank=2).state_dict()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (CPConv2d(3, 6, 3, rank=2).state_dict(), "size mismatch for factors.0"),
        (nn.Conv2d(3, 4, 3).state_dict(), "dense weight.*call cpnb.canonicalize"),
        (SMALL | {"lam": torch.ones(9)}, "size mismatch for lam"),
    ],
    ids=["sizes", "dense", "ranks"],
)
def test_state_dict_of_another_layer_is_refused_and_the_rank_kept(state, text):
    layer = CPConv2d(3, 4, 3, rank=5)
    with pytest.raises(RuntimeError, match=f"(?s){text}"):
        layer.load_state_dict(state)
    assert layer.rank == 5


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (CPConv2d, {"rank": 0}, "rank is 0, expected"),
        (CPConv2d, {"groups": 2}, "divisible by groups"),
        (CPConv2d, {"init": "he"}, r"init is 'he', expected one of \['als'"),
        (CPConv2d, {"padding": "full"}, "padding string"),
        (CPConv2d, {"padding_mode": "x"}, "padding_mode"),
        (CPConv1d, {"forward_mode": "fast"}, "forward_mode is 'fast', expected"),
    ],
)
def test_layers_refuse_bad_arguments_with_a_clear_error(kind, options, text):
    with pytest.raises(ValueError, match=text):
        kind(3, 4, 3, **options)(torch.zeros(1, 3, 5))


@pytest.mark.parametrize("mode", MODES)
def test_conv_says_that_the_channels_are_wrong_and_takes_an_empty_batch(mode):
    layer = CPConv2d(3, 4, 3, forward_mode=mode)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        layer(torch.zeros(2, 5, 6, 6))
    assert layer(torch.zeros(0, 3, 6, 6)).shape == (0, 4, 4, 4)


@pytest.mark.parametrize("case", CASES)
def test_auto_takes_the_chain_below_a_share_of_the_rank_of_equal_work(case):
    """By the operations that torch counts, without those that rebuild the kernel."""
    limit = 1.0 if case.startswith("linear") else 0.5
    make, shape = CASES[case]
    for rank in (1, 3, 6, 12, 24, 36, 48, 80, 160):
        work = {}
        for mode in (*MODES, "auto"):
            layer = make(1)
            layer.resize(rank)
            layer.forward_mode = mode
            work[mode] = flops(layer, torch.zeros(2, *shape))
        share = work["chain"] / (work["dense"] - flops(getattr, layer, "weight"))
        if abs(share / limit - 1) > 0.35:  # its edges cost the chain some more
            expected = "chain" if share < limit else "dense"
            assert work["auto"] == work[expected], (rank, share)
