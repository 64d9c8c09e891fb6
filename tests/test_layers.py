"""CP layers against torch's own: every geometry, both forwards, every gradient."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

import cpnb

KINDS = {
    1: (nn.Conv1d, cpnb.CPConv1d, (9,)),
    2: (nn.Conv2d, cpnb.CPConv2d, (8, 9)),
    3: (nn.Conv3d, cpnb.CPConv3d, (6, 5, 7)),
}


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def loop_conv2d(images, weight, bias, stride, padding, dilation, groups):
    """Convolution as four sums over zero-padded images, one output at a time."""
    (top, left), (step_y, step_x), (gap_y, gap_x) = padding, stride, dilation
    images = nn.functional.pad(images, (left, left, top, top))
    out, per_group, height, width = weight.shape
    rows = (images.shape[2] - gap_y * (height - 1) - 1) // step_y + 1
    columns = (images.shape[3] - gap_x * (width - 1) - 1) // step_x + 1
    result = torch.zeros(len(images), out, rows, columns, dtype=images.dtype)
    for o in range(out):
        first = o // (out // groups) * per_group
        for y in range(rows):
            for x in range(columns):
                for i in range(per_group):
                    for h in range(height):
                        for w in range(width):
                            result[:, o, y, x] += (
                                weight[o, i, h, w]
                                * images[
                                    :,
                                    first + i,
                                    y * step_y + h * gap_y,
                                    x * step_x + w * gap_x,
                                ]
                            )
        if bias is not None:
            result[:, o] += bias[o]
    return result


@st.composite
def geometries(draw):
    """A valid convolution: dimension, channels, kernel, stride, padding and so on."""
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    per_axis = st.tuples(*[st.integers(1, 3)] * ndim)
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = draw(st.one_of(st.integers(1, 3), per_axis))
    padding = draw(
        st.one_of(
            st.integers(0, 2),
            st.tuples(*[st.integers(0, 2)] * ndim),
            st.sampled_from(["same", "valid"]),
        )
    )
    stride = 1 if padding == "same" else draw(st.one_of(st.integers(1, 3), per_axis))
    return {
        "ndim": ndim,
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": draw(st.sampled_from([1, 2])),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(
            st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])
        ),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }


# Torch says so itself, for its own layers too, on the first such call.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=150)
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
    _, kind, size = KINDS[ndim]
    generator = torch.Generator().manual_seed(rank)
    layer = kind(**geometry, rank=rank, signed=signed, generator=generator)
    images = randn(2, geometry["in_channels"], *size, dtype=geometry["dtype"])
    if channels_last and ndim > 1:
        layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
        images = images.to(memory_format=layouts[ndim])
    if not batched:
        images = images[0]
    expected = layer.to_dense()(images)
    for mode in ("dense", "chain", "auto"):
        layer.forward_mode = mode
        assert_close(layer(images), expected, msg=lambda text, m=mode: f"{m}: {text}")


@settings(max_examples=40)
@given(
    features=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    lead=st.lists(st.integers(1, 3), max_size=2),
    rank=st.integers(1, 7),
    bias=st.booleans(),
)
def test_linear_dense_and_chain_and_stock_forward_agree(features, lead, rank, bias):
    layer = cpnb.CPLinear(*features, bias, rank=rank, dtype=torch.float64)
    rows = randn(*lead, features[0])
    expected = layer.to_dense()(rows)
    for mode in ("dense", "chain", "auto"):
        layer.forward_mode = mode
        assert_close(layer(rows), expected)


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_equals_the_loop_specification(mode, groups):
    stride, padding, dilation = (2, 1), (1, 2), (1, 2)
    layer = cpnb.CPConv2d(
        *(4, 6, (3, 2), stride, padding, dilation, groups),
        rank=5,
        forward_mode=mode,
        dtype=torch.float64,
    )
    lam, units = layer.components()
    kernel = torch.zeros(6, 4 // groups, 3, 2, dtype=torch.float64)
    for r in range(5):
        kernel += lam[r] * torch.einsum("o,i,h,w->oihw", *(u[:, r] for u in units))
    images = randn(2, 4, 7, 6)
    expected = loop_conv2d(
        images, kernel, layer.bias, stride, padding, dilation, groups
    )
    assert_close(layer(images), expected)
    assert_close(layer.weight, kernel)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_from_layer_keeps_the_function_of_the_stock_layer(ndim):
    stock_kind, kind, size = KINDS[ndim]
    for options in (
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"groups": 2, "padding": 1, "padding_mode": "circular", "bias": False},
    ):
        stock = stock_kind(4, 6, 2, dtype=torch.float64, **options)
        rank = 2 * math.prod(stock.weight.shape[1:])  # enough to be exact
        images = randn(3, 4, *size)
        for convert in (kind.from_layer, cpnb.from_layer):
            layer = convert(
                stock, rank=rank, init="als", generator=torch.Generator().manual_seed(0)
            )
            assert type(layer) is kind
            assert_close(layer(images), stock(images), rtol=0, atol=1e-4)
            assert_close(layer.to_dense()(images), layer(images))


def test_from_layer_of_a_matrix_is_exact_at_full_rank():
    for stock in (
        nn.Linear(7, 4, dtype=torch.float64),
        nn.Conv2d(7, 4, 1, dtype=torch.float64),
    ):
        layer = cpnb.from_layer(stock, rank=4)
        assert_close(layer.weight, stock.weight.detach(), check_stride=False)


def test_from_layer_copies_and_never_shares():
    stock = nn.Conv2d(3, 4, 3).eval()
    stock.weight.requires_grad_(False)
    before = copy.deepcopy(stock.state_dict())
    layer = cpnb.from_layer(stock, rank=2)
    assert not layer.training
    assert not layer.lam.requires_grad
    assert layer.bias.requires_grad
    with torch.no_grad():
        layer.bias.add_(1)
        layer.lam.add_(1)
    for name, value in stock.state_dict().items():
        assert torch.equal(value, before[name])
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    assert not dense.training
    assert dense.bias.data_ptr() != layer.bias.data_ptr()
    assert not dense.weight.requires_grad


def test_layer_has_torchs_argument_order_and_repr():
    layer = cpnb.CPConv2d(4, 8, (3, 5), 2, 1, 2, 4, False, "reflect", rank=3)
    stock = nn.Conv2d(4, 8, (3, 5), 2, 1, 2, 4, False, "reflect")
    assert stock.extra_repr() in repr(layer)
    assert "rank=3 (0.38 of break-even 8)" in repr(layer)
    assert "signed" not in repr(layer)
    assert "signed=False" in repr(cpnb.CPLinear(4, 2, rank=1, signed=False))
    assert "forward_mode='chain'" in repr(cpnb.CPLinear(4, 2, forward_mode="chain"))


def test_layer_counts_its_parameters():
    layer = cpnb.CPConv2d(32, 64, 3, rank=10)
    assert layer.parameters_at(10) == sum(p.numel() for p in layer.parameters())
    dense = layer.to_dense()
    assert layer.dense_parameters == sum(p.numel() for p in dense.parameters())
    even = layer.parameters_at(layer.break_even_rank)
    below = layer.parameters_at(layer.break_even_rank - 1)
    assert below <= layer.dense_parameters <= even


def test_layer_rank_takes_int_fraction_and_same():
    assert cpnb.CPConv2d(32, 64, 3).rank == 179
    assert cpnb.CPConv2d(32, 64, 3, rank=0.1).rank == 18
    assert cpnb.CPConv2d(32, 64, 3, rank=5).rank == 5


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gradient_reaches_every_parameter_and_units_survive_steps(mode, optimizer):
    layer = cpnb.CPConv2d(3, 5, 3, rank=6, forward_mode=mode, dtype=torch.float64)
    with torch.no_grad():
        layer.lam[::2] *= -1
    steps = optimizer(layer.parameters(), lr=0.1)
    for seed in range(4):
        steps.zero_grad()
        layer(randn(2, 3, 6, 6, seed=seed)).square().mean().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.abs().max() > 0, name
        steps.step()
        units = [f / f.norm(dim=0) for f in layer.factors]
        lam = layer.scale * layer.lam
        kernel = torch.einsum("r,or,ir,hr,wr->oihw", lam, *units)
        assert_close(layer.weight, kernel)
        for unit, found in zip(units, layer.components()[1], strict=True):
            assert_close(found, unit)
    assert (layer.lam[::2] < 0).any()  # signs are kept, not folded away
    assert_close(layer.weight, layer.to_dense().weight)


def test_gradients_follow_the_closed_formulas():
    """∂σ = ⟨G,W⟩/σ, ∂λ_r = σ⟨G, unit term r⟩, and ∂a_r is orthogonal to a_r."""
    layer = cpnb.CPConv2d(3, 5, 3, rank=4, dtype=torch.float64)
    with torch.no_grad():
        layer.scale.fill_(1.7)
        layer.factors[0].mul_(3)
    weight = layer.weight
    slope = randn(*weight.shape, seed=3)
    (weight * slope).sum().backward()
    units = [f.detach() / f.detach().norm(dim=0) for f in layer.factors]
    inner = torch.einsum("oihw,or,ir,hr,wr->r", slope, *units)
    assert_close(layer.scale.grad, (slope * weight).sum().detach() / 1.7)
    assert_close(layer.lam.grad, 1.7 * inner)
    toward = torch.einsum("oihw,ir,hr,wr->or", slope, *units[1:])
    tangent = toward - units[0] * (units[0] * toward).sum(0)
    size = layer.factors[0].detach().norm(dim=0)
    assert_close(layer.factors[0].grad, 1.7 * layer.lam.detach() / size * tangent)
    for factor in layer.factors:
        radial = (factor.grad * factor).sum(0)
        assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["dense", "chain"])
@pytest.mark.parametrize("signed", [True, False])
def test_conv_passes_gradcheck(mode, signed):
    layer = cpnb.CPConv2d(
        *(2, 4, (2, 1), 1, 1, 1, 2),
        rank=3,
        forward_mode=mode,
        signed=signed,
        dtype=torch.float64,
    )
    names = [name for name, _ in layer.named_parameters()]

    def output(images, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, state, (images,))

    inputs = [randn(1, 2, 3, 3).requires_grad_(), *layer.parameters()]
    assert gradcheck(output, inputs)


def test_zero_columns_and_zero_lambda_give_finite_values_and_gradients():
    for mode in ("dense", "chain"):
        layer = cpnb.CPConv2d(3, 5, 3, rank=4, forward_mode=mode)
        with torch.no_grad():
            layer.factors[0][:, 0] = 0
            layer.factors[2][:, 1] = 0
            layer.lam[2] = 0
        output = layer(torch.randn(1, 3, 6, 6))
        output.sum().backward()
        assert output.isfinite().all()
        for parameter in layer.parameters():
            assert parameter.grad.isfinite().all()
        assert layer.lam.grad[2] != 0  # a component of weight zero can come back
        with torch.no_grad():
            layer.lam.zero_()
        assert_close(layer.weight, torch.zeros(5, 3, 3, 3))


def test_unsigned_layer_reproduces_absolute_lambda():
    layer = cpnb.CPConv2d(3, 4, 3, rank=5, signed=False)
    with torch.no_grad():
        layer.lam[:3] *= -1
    signed = copy.deepcopy(layer)
    signed.signed = True
    assert not torch.allclose(layer.weight, signed.weight)
    with torch.no_grad():
        signed.lam.abs_()
    assert_close(layer.weight, signed.weight)


def test_size_one_modes_carry_no_factor():
    layer = cpnb.CPConv2d(1, 8, (3, 1), rank=4)
    assert [f.shape[0] for f in layer.factors] == [8, 3]
    assert layer.weight.shape == (8, 1, 3, 1)
    scalar = cpnb.CPLinear(1, 1, rank=3)
    assert len(scalar.factors) == 0
    assert_close(scalar.weight, (scalar.lam.sum() * scalar.scale).view(1, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_forward_keeps_the_memory_layout_of_its_input(channels):
    layer = cpnb.CPConv2d(channels, 8, 3, rank=4, forward_mode="dense")
    images = torch.randn(2, 6, 6, channels).permute(0, 3, 1, 2)
    output = layer(images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output = layer(images.reshape(-1).view(2, channels, 6, 6))
    assert output.is_contiguous()
    output.view(2, -1)  # what many networks do before their linear layers


def test_kept_kernel_follows_every_change_of_a_parameter():
    layer = cpnb.CPConv2d(3, 4, 3, rank=5, forward_mode="dense").eval()
    images = torch.randn(1, 3, 6, 6)

    def check():
        with torch.no_grad():
            found = [layer(images), layer(images)]
        expected = layer.to_dense()(images).detach()
        assert_close(found, [expected, expected])

    check()
    with torch.no_grad():
        layer.lam.add_(1)
    check()
    layer.lam.data.mul_(2)  # does not move the version counter
    check()
    layer.factors[1].data = layer.factors[1].data.clone().add_(1)
    check()
    layer.scale = nn.Parameter(torch.tensor(3.0))
    check()
    layer.load_state_dict(cpnb.CPConv2d(3, 4, 3, rank=2).state_dict())
    check()
    layer.double()
    images = images.double()
    check()


def test_kept_kernel_saves_the_rebuild_and_never_blocks_gradients(monkeypatch):
    layer = cpnb.CPLinear(6, 4, rank=3, forward_mode="dense").eval()
    calls = []
    build = layer._rebuild
    monkeypatch.setattr(layer, "_rebuild", lambda cl: calls.append(cl) or build(cl))
    rows = torch.randn(2, 6)
    with torch.no_grad():
        layer(rows), layer(rows)
    assert len(calls) == 1
    layer(rows).sum().backward()
    assert layer.lam.grad is not None
    assert len(calls) == 2


def test_auto_takes_the_cheaper_forward_and_explain_says_so():
    layer = cpnb.CPConv2d(64, 64, 3, padding=1, rank=10)
    images = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        assert layer.cost(images.shape).mode == "chain"
        text = layer.explain(images)
    assert "auto takes 'chain'" in text
    assert "rank 10 of" not in text
    assert "inference" in text
    wide = cpnb.CPConv2d(3, 64, 3, padding=1, rank=30)
    assert "auto takes 'dense'" in wide.explain((2, 3, 16, 16))
    assert "training step" in wide.explain()
    assert "one output position" in wide.explain()


@pytest.mark.parametrize("rank", [4, 30, 60, 120, 240])
def test_cost_counts_the_flops_torch_counts(rank):
    """The FLOP part of the model against torch's counter; memory traffic left out."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = cpnb.CPConv2d(32, 64, 3, padding=1, rank=rank)
    images = torch.randn(2, 32, 8, 8)
    counts = {}
    for mode in ("dense", "chain"):
        layer.forward_mode = mode
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(images)
        counts[mode] = counter.get_total_flops()
    with torch.no_grad():
        cost = layer.cost(images.shape)
    assert cost.dense + cost.rebuild == pytest.approx(counts["dense"], rel=1e-6)
    traffic = 288 * rank * 2 * 8 * 8
    assert cost.chain - traffic == pytest.approx(counts["chain"], rel=1e-6)


@pytest.mark.parametrize("kind", [cpnb.CPConv2d, cpnb.CPLinear])
def test_generator_makes_a_layer_repeatable_and_leaves_the_global_one(kind):
    state = torch.get_rng_state()
    sizes = (3, 4, 3) if kind is cpnb.CPConv2d else (3, 4)
    layers = [kind(*sizes, generator=torch.Generator().manual_seed(7)) for _ in "ab"]
    for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    before = layers[0].weight.detach()
    layers[0].reset_parameters(torch.Generator().manual_seed(8))
    assert not torch.allclose(layers[0].weight, before)


def test_state_dict_of_another_rank_is_adopted():
    source = cpnb.CPConv2d(3, 4, 3, rank=5)
    for rank in (2, 9):
        target = cpnb.CPConv2d(3, 4, 3, rank=rank)
        target.load_state_dict(source.state_dict())
        assert target.rank == 5
        assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (cpnb.CPConv2d(3, 6, 3, rank=2).state_dict(), "size mismatch for factors.0"),
        (nn.Conv2d(3, 4, 3).state_dict(), "dense weight.*call cpnb.canonicalize"),
        (
            cpnb.CPConv2d(3, 4, 3, rank=2).state_dict() | {"lam": torch.ones(9)},
            "size mismatch for lam",
        ),
    ],
    ids=["sizes", "dense", "ranks"],
)
def test_state_dict_of_another_layer_is_refused_and_the_rank_kept(state, text):
    layer = cpnb.CPConv2d(3, 4, 3, rank=5)
    with pytest.raises(RuntimeError, match=f"(?s){text}"):
        layer.load_state_dict(state)
    assert layer.rank == 5


def test_deepcopy_and_pickle_keep_the_layer_working():
    layer = cpnb.CPConv2d(3, 4, 3, rank=5, forward_mode="dense").eval()
    images = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        expected = layer(images)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_close(twin(images), expected)
            twin.lam.add_(1)
            assert not torch.allclose(twin(images), expected)
            twin.reset_parameters()
        assert_close(layer(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_agree_with_the_dense_layer(dtype):
    layer = cpnb.CPConv2d(3, 8, 3, rank=6)
    images = torch.randn(2, 3, 8, 8)
    expected = layer(images)
    low = copy.deepcopy(layer).to(dtype)(images.to(dtype))
    assert low.dtype == dtype
    assert_close(low.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images).dtype == torch.bfloat16
    assert_close(layer(images), expected)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cpnb.CPConv2d(3, 4, 3, rank=0), ValueError, "rank is 0"),
        (lambda: cpnb.CPConv2d(3, 4, 3, rank=-1), ValueError, "rank is -1"),
        (lambda: cpnb.CPConv2d(3, 4, 3, rank=2.0), ValueError, "rank is 2.0"),
        (lambda: cpnb.CPConv2d(3, 4, 0), ValueError, "expected every size >= 1"),
        (lambda: cpnb.CPConv2d(3, 4, 3, groups=2), ValueError, "divisible by groups"),
        (lambda: cpnb.CPConv2d(3, 4, 3, padding="full"), ValueError, "padding string"),
        (lambda: cpnb.CPConv2d(3, 4, 3, padding_mode="x"), ValueError, "padding_mode"),
        (
            lambda: cpnb.CPConv2d(3, 4, 3, forward_mode="fast"),
            ValueError,
            r"forward_mode is 'fast', expected one of \('auto', 'dense', 'chain'\)",
        ),
        (
            lambda: cpnb.CPConv2d(3, 4, 3, dtype=torch.int64),
            TypeError,
            "dtype is torch.int64, expected a floating-point dtype",
        ),
        (lambda: cpnb.CPLinear(0, 4), ValueError, "in_features=0"),
    ],
)
def test_layers_refuse_bad_arguments_with_a_clear_error(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("mode", ["dense", "chain"])
def test_conv_says_that_the_channels_are_wrong(mode):
    layer = cpnb.CPConv2d(3, 4, 3, forward_mode=mode)
    with pytest.raises(RuntimeError, match="3 channels"):
        layer(torch.zeros(2, 5, 6, 6))


def test_weight_is_read_only():
    layer = cpnb.CPLinear(3, 2)
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(2, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_chain_forward_keeps_the_memory_layout_of_its_input(groups):
    layer = cpnb.CPConv2d(4, 8, 3, groups=groups, rank=4, forward_mode="chain")
    images = torch.randn(2, 4, 6, 6)
    assert layer(images).is_contiguous()
    spread = images.to(memory_format=torch.channels_last)
    assert layer(spread).is_contiguous(memory_format=torch.channels_last)
